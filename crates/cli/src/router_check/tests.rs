use std::path::Path;

use super::*;

fn pair(name: &str) -> Arguments {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/router-check");
    Arguments {
        config: Some(folder.join(format!("{name}.yaml"))),
        tests: Some(folder.join(format!("{name}.golden.proto.json"))),
        ..Default::default()
    }
}

#[test]
fn every_pair_passes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/router-check");
    let (mut count, mut failed) = (0, Vec::new());
    for entry in fs::read_dir(folder).expect("the folder of pairs") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_string_lossy();
        let Some(name) = name.strip_suffix(".yaml") else {
            continue;
        };
        if !run(&pair(name)).unwrap_or_else(|e| panic!("{name}: {e:#}")) {
            failed.push(name.to_owned());
        }
        count += 1;
    }
    assert!(failed.is_empty(), "{failed:?}");
    assert!(count >= 15, "only {count} pairs");
}

fn written(config: &str, tests: &str) -> (tempfile::TempDir, Arguments) {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = ["routes.yaml", "tests.json"].map(|name| folder.path().join(name));
    fs::write(&paths[0], config).expect("written");
    fs::write(&paths[1], tests).expect("written");
    let [config, tests] = paths.map(Some);
    let arguments = Arguments {
        config,
        tests,
        details: true,
        ..Default::default()
    };
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
    assert!(!run(&arguments).expect("legal"));
    let routes = Arc::new(routes(arguments.config().expect("given")).expect("legal"));
    let tests = document::read(tests, Format::Yaml).expect("legal");
    let outcome = check(&routes, &tests[0].input).expect("a request");
    let mismatches = tests[0].assertions.iter();
    let mismatches: Vec<_> = mismatches.filter_map(|a| mismatch(a, &outcome)).collect();
    assert_eq!(mismatches, [r#"cluster_name: expected "d", got "c""#]);
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
    assert!(run(&arguments).expect("legal"));
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
        let error = format!(
            "{:#}",
            document::read(tests, Format::Yaml).expect_err(tests)
        );
        assert!(error.contains(words), "{error}");
    }
    let (_folder, arguments) = written("virtual_hosts: [{ name: a }]", "{}");
    assert!(run(&arguments).is_err());
}

#[test]
fn the_text_format_says_the_same() {
    let text = r#"
        # One of each kind of field.
        tests {
          test_name: "a" ' and' "\x20b\101"
          input: {
            authority: "a.test", path: "/"; method: "GET" random_value: 0x10 ssl: true
            additional_request_headers: [{ key: "x-a" value: "1" }, < key: "x-b" >]
            dynamic_metadata {
              metadata_namespace: "n"
              value { fields { key: "k" value { list_value { values { string_value: "v" } } } } }
            }
          }
          validate {
            cluster_name {}
            virtual_host_name: { value: "h" }
            code_redirect { value: 301 }
            timeout { seconds: 2 nanos: 500000000 }
            request_header_matches { name: "x-a" range_match { start: -1 end: 5 } }
          }
        }
        tests { test_name: "c" }"#;
    let expected = serde_json::json!({"tests": [
        {
            "test_name": "a and bA",
            "input": {
                "authority": "a.test", "path": "/", "method": "GET", "random_value": 16, "ssl": true,
                "additional_request_headers": [{"key": "x-a", "value": "1"}, {"key": "x-b"}],
                "dynamic_metadata": [{"metadata_namespace": "n", "value": {"k": ["v"]}}],
            },
            "validate": {
                "cluster_name": "", "virtual_host_name": "h", "code_redirect": 301,
                "timeout": "2.500000000s",
                "request_header_matches": [{"name": "x-a", "range_match": {"start": -1, "end": 5}}],
            },
        },
        {"test_name": "c"},
    ]});
    assert_eq!(text_format::read(text).expect("legal"), expected);
    for (text, words) in [
        ("tests {\n test_name", "line 2: test_name: needs a `:`"),
        (
            "tests {\n test_name: \"a",
            "line 2: test_name: the text is not closed",
        ),
        ("tests { test_name: 'a' test_name: 'b' }", "given twice"),
        ("tests { input { path: ['a'] } }", "path: is no list"),
        ("tests { test_name: 'a' }}", "`}` closes nothing"),
        ("tests { ", "the text ends before `}`"),
        ("tests { [a.b/c] {} }", "is no field's name"),
        ("tests { test_name: '\\q' }", "is no escape"),
        (&"tests {".repeat(200), "more than 100 messages"),
    ] {
        let error = format!("{:#}", text_format::read(text).expect_err(text));
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn coverage_counts_routes_and_their_fields() {
    let routes = "virtual_hosts: [{ name: a, domains: [a.test], routes: [
        { match: { prefix: /r }, redirect: { path_redirect: /x } },
        { name: n, match: { prefix: /u }, route: { cluster: c } },
        { match: { prefix: / }, route: { weighted_clusters: { clusters: [
            { name: d, weight: 1 }, { name: e, weight: 1 } ] } } } ] }]";
    let tests = r#"{"tests": [
        {"test_name": "r", "input": {"authority": "a.test", "path": "/r", "method": "GET"},
         "validate": {"path_redirect": "http://a.test/x", "cluster_name": ""}},
        {"test_name": "e", "input": {"authority": "a.test", "path": "/", "method": "GET", "random_value": 1},
         "validate": {"cluster_name": "e", "virtual_host_name": "a", "path_redirect": ""}}]}"#;
    let (_folder, mut arguments) = written(routes, tests);
    let table = super::routes(arguments.config().expect("given")).expect("legal");
    let table = Arc::new(table);
    let mut coverage = Coverage::default();
    for test in document::read(tests, Format::Yaml).expect("legal") {
        let outcome = check(&table, &test.input).expect("a request");
        for assertion in &test.assertions {
            coverage.met(&table, outcome.place.expect("a route"), assertion);
        }
    }
    assert_eq!(coverage.percent(&table, false), 50.0);
    assert_eq!(coverage.percent(&table, true), 100.0 * (0.5 + 0.4) / 4.0);
    assert_eq!(
        coverage.missing(&table),
        ["Missing test for host: a, route: routes[1] `n`"]
    );
    arguments.fail_under = Some(50.0);
    assert!(run(&arguments).expect("legal"));
    arguments.covall = true;
    assert!(!run(&arguments).expect("legal"));
}

#[test]
fn files_are_taken_as_the_tool_of_envoy_takes_them() {
    let parse = |args: &[&str]| Arguments::try_parse_from(args);
    for args in [
        &["router-check", "c", "t"][..],
        &[
            "router-check",
            "-c",
            "c",
            "-t",
            "t",
            "-d",
            "--only-show-failures",
        ],
        &[
            "router-check",
            "--config-path",
            "c",
            "--test-path",
            "t",
            "--disable-deprecation-check",
        ],
        &["router-check", "c", "t", "-f", "80.5", "--covall"],
    ] {
        let arguments = parse(args).expect("legal");
        assert_eq!(arguments.config().expect("given"), Path::new("c"));
        assert_eq!(arguments.tests().expect("given"), Path::new("t"));
    }
    for args in [
        &["router-check", "c"][..],
        &["router-check", "-c", "c"],
        &["router-check", "-c", "c", "t"],
        &["router-check", "-t", "t", "c"],
    ] {
        assert!(parse(args).is_err(), "{args:?}");
    }
}
