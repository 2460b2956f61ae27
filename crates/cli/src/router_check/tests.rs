use std::path::Path;

use super::*;

fn pair(name: &str) -> Arguments {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/router-check");
    Arguments {
        config: folder.join(format!("{name}.yaml")),
        tests: folder.join(format!("{name}.golden.proto.json")),
        details: false,
    }
}

#[test]
fn every_pair_passes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/router-check");
    let mut count = 0;
    for entry in fs::read_dir(folder).expect("the folder of pairs") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_string_lossy();
        let Some(name) = name.strip_suffix(".yaml") else {
            continue;
        };
        let failed = run(&pair(name)).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert_eq!(failed, 0, "{name}");
        count += 1;
    }
    assert!(count >= 10, "only {count} pairs");
}

fn written(config: &str, tests: &str) -> (tempfile::TempDir, Arguments) {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments = Arguments {
        config: folder.path().join("routes.yaml"),
        tests: folder.path().join("tests.json"),
        details: true,
    };
    fs::write(&arguments.config, config).expect("written");
    fs::write(&arguments.tests, tests).expect("written");
    (folder, arguments)
}

const ROUTES: &str = "virtual_hosts: [{ name: a, domains: [a.test], routes: [{ match: { prefix: / }, \
                      route: { cluster: c } }] }]";

#[test]
fn a_mismatch_is_counted_and_said() {
    let tests = r#"{"tests": [
        {"test_name": "wrong", "input": {"authority": "a.test", "path": "/", "method": "GET"},
         "validate": {"cluster_name": "d", "virtual_host_name": "a"}},
        {"test_name": "right", "input": {"authority": "a.test", "path": "/", "method": "GET"},
         "validate": {"cluster_name": "c", "path_redirect": ""}},
    ]}"#;
    let (_folder, arguments) = written(ROUTES, tests);
    assert_eq!(run(&arguments).expect("legal"), 1);
    let routes = Arc::new(routes(&arguments.config).expect("legal"));
    let tests = document::read(tests).expect("legal");
    let outcome = check(&routes, &tests[0].input).expect("a request");
    assert_eq!(
        mismatches(&tests[0].assertions, &outcome),
        [r#"cluster_name: expected "d", got "c""#]
    );
    assert_eq!(
        outcome.explanation,
        ["virtual host `a`", "routes[0]: matches"]
    );
}

#[test]
fn the_older_form_without_a_schema_is_read() {
    let tests = r#"[{"test_name": "old", "input": {":authority": "a.test", ":path": "/x"},
        "validate": {"cluster_name": "c", "header_fields": [{"field": ":path", "value": "/x"}]}}]"#;
    let (_folder, arguments) = written(ROUTES, tests);
    assert_eq!(run(&arguments).expect("legal"), 0);
}

#[test]
fn what_is_wrong_in_a_document_is_said_with_its_place() {
    for (tests, words) in [
        (r#"{"tests": []}"#, "at least one test"),
        (
            r#"{"tests": [{"test_name": "t", "input": {"authority": "a", "path": "/", "method": "GET"},
                "validate": {"cluster": "c"}}]}"#,
            "unknown field `cluster`",
        ),
        (
            r#"{"tests": [{"test_name": "t", "input": {"authority": "a", "path": "/", "method": "G"},
                "validate": {"cluster_name": "c"}}]}"#,
            "tests[0] `t`: input.method",
        ),
        (
            r#"{"tests": [{"test_name": "t", "input": {"authority": "a", "path": "/", "method": "GET"},
                "validate": {}}]}"#,
            "needs at least one field",
        ),
        ("{", ""),
    ] {
        let error = format!("{:#}", document::read(tests).expect_err(tests));
        assert!(error.contains(words), "{error}");
    }
    let (_folder, arguments) = written("virtual_hosts: [{ name: a }]", "{}");
    assert!(run(&arguments).is_err());
}
