#[path = "../../../testkit/src/conformance.rs"]
mod finder;

use std::{fs, path::Path};

use serde_json::Value;

use crate::{Severity, Snapshot, yaml};

/// The fields of an object that are wrong, and those that are warned of with a `?` before them.
fn fields(yaml: &str) -> Vec<String> {
    let (_, problems) = Snapshot::from_texts([(Path::new("case"), yaml)]);
    let shown = problems.iter().map(|p| match p.severity {
        Severity::Error => p.field.clone(),
        _ => format!("?{}", p.field),
    });
    shown.collect()
}

#[test]
fn patches_of_what_the_proxy_is_given_are_checked() {
    let filter = |patch: &str| {
        let all = fields(&format!(
            "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{name: f, namespace: default}}\nspec: {{configPatches: [{{{patch}}}]}}"
        ));
        assert_eq!(all[0], "?spec.configPatches", "{all:?}");
        all[1..].join(" ")
    };
    let value = "patch: {operation: MERGE, value: {name: a}}";
    let at = "spec.configPatches[0]";
    for (patch, wrong) in [
        (format!("applyTo: CLUSTER, {value}"), String::new()),
        (value.to_owned(), format!("{at}.applyTo")),
        ("applyTo: CLUSTER".to_owned(), format!("{at}.patch")),
        ("applyTo: CLUSTER, patch: {value: {}}".to_owned(), format!("{at}.patch.operation")),
        ("applyTo: CLUSTER, patch: {operation: ADD}".to_owned(), format!("{at}.patch.value")),
        ("applyTo: CLUSTER, patch: {operation: REMOVE}".to_owned(), String::new()),
        (
            "applyTo: CLUSTER, patch: {operation: ADD, value: {connect_timeout: [1]}}".to_owned(),
            format!("{at}.patch.value.connect_timeout"),
        ),
        (
            "applyTo: CLUSTER, patch: {operation: ADD, value: {of_a_later_version: 1}}".to_owned(),
            format!("?{at}.patch.value.of_a_later_version"),
        ),
        (
            "applyTo: HTTP_FILTER, patch: {operation: ADD, value: {name: x, typed_config: {'@type': type.googleapis.com/no.Such}}}".to_owned(),
            format!("{at}.patch.value.typed_config.@type"),
        ),
        (
            format!("applyTo: CLUSTER, match: {{listener: {{}}}}, {value}"),
            format!("{at}.match"),
        ),
        (
            format!("applyTo: CLUSTER, match: {{proxy: {{proxyVersion: '('}}}}, {value}"),
            format!("{at}.match.proxy.proxyVersion"),
        ),
        (
            format!("applyTo: NETWORK_FILTER, match: {{listener: {{filterChain: {{filter: {{name: envoy.tcp_proxy}}}}}}}}, {value}"),
            format!("?{at}.match.listener.filterChain.filter.name ?{at}.patch.value"),
        ),
        (
            format!("applyTo: NETWORK_FILTER, match: {{listener: {{filterChain: {{filter: {{name: a, subFilter: {{name: b}}}}}}}}}}, {value}"),
            format!("{at}.match.listener.filterChain.filter.subFilter"),
        ),
    ] {
        assert_eq!(filter(&patch), wrong, "{patch}");
    }
}

#[test]
fn groups_settings_and_extensions_are_checked() {
    let group = |spec: &str| {
        fields(&format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {{name: g, namespace: default}}\nspec: {{{spec}}}"
        ))
    };
    assert_eq!(group("template: {}"), [""; 0]);
    assert_eq!(group("probe: {}"), ["spec.template"]);
    assert_eq!(group("template: {}, probe: {}"), ["spec.probe"]);
    assert_eq!(
        group("template: {}, probe: {periodSeconds: -1, httpGet: {port: 0, scheme: FTP}}"),
        [
            "spec.probe.periodSeconds",
            "spec.probe.httpGet.port",
            "spec.probe.httpGet.scheme"
        ]
    );
    let proxy = "apiVersion: networking.istio.io/v1beta1\nkind: ProxyConfig\nmetadata: {name: p, namespace: default}\nspec: {concurrency: -1}";
    assert_eq!(fields(proxy), ["spec.concurrency"]);
    let extension = |spec: &str| {
        fields(&format!(
            "apiVersion: extensions.istio.io/v1alpha1\nkind: TrafficExtension\nmetadata: {{name: e, namespace: default}}\nspec: {{{spec}}}"
        ))
    };
    assert_eq!(extension(""), ["spec"]);
    assert_eq!(extension("lua: {}"), ["spec.lua.inlineCode"]);
    assert_eq!(
        extension("wasm: {url: 'ftp://a', sha256: a}, match: [{ports: [{number: 0}]}]"),
        [
            "spec.wasm.url",
            "spec.wasm.sha256",
            "spec.match[0].ports[0].number"
        ]
    );
}

#[test]
fn expressions_are_bounded() {
    let with = |expression: &str| {
        let object = format!(
            "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: v, namespace: shop}}
spec: {{hosts: [a], http: [{{match: [{{uri: {{regex: '{expression}'}}}}], route: [{{destination: {{host: a}}}}]}}]}}"
        );
        let (_, problems) = Snapshot::from_texts([(Path::new("v.yaml"), object.as_str())]);
        let errors = problems.iter().filter(|p| p.severity == Severity::Error);
        errors
            .map(|p| format!("{}: {}", p.field, p.message))
            .collect::<Vec<_>>()
    };
    // Takes an engine that goes back on its steps a life; ours takes the time of the text.
    assert_eq!(with("/(a+)+b"), Vec::<String>::new());
    assert_eq!(with(&"a".repeat(1024)), Vec::<String>::new());
    let field = "spec.http[0].match[0].uri.regex: ";
    for (expression, why) in [
        (&*"a".repeat(1025), "longer than 1024"),
        (&"a".repeat(1 << 20), "longer than 1024"),
        // Short, and large when it is compiled.
        ("((a{1000}){1000}){1000}", "size"),
        ("(a", "not a regular expression"),
        ("(a)\\1", "not a regular expression"),
    ] {
        let errors = with(expression).join("; ");
        let short = &expression[..expression.len().min(20)];
        assert!(
            errors.contains(field) && errors.contains(why),
            "{short}: {errors}"
        );
    }
}

#[test]
fn verdicts_are_istios() {
    let Some(path) = finder::conformance("validation/cases.yaml") else {
        return;
    };
    let text = fs::read_to_string(path).unwrap();
    let (mut wrong, mut cases) = (Vec::new(), 0);
    for case in yaml::documents(&text) {
        let case = case.unwrap().value;
        let object = case["object"].to_string();
        let name = case["object"]["metadata"]["name"]
            .as_str()
            .unwrap()
            .to_owned();
        // What the API server's schema refuses never reaches validation: either verdict refuses the object.
        let accepted = case["validate"]["accepted"] == Value::Bool(true)
            && case["schema"]["accepted"] == Value::Bool(true);
        let (_, problems) = Snapshot::from_texts([(Path::new("case"), object.as_str())]);
        let errors: Vec<String> = problems
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .map(ToString::to_string)
            .collect();
        cases += 1;
        if errors.is_empty() != accepted {
            wrong.push(format!(
                "{name}: accepted by Istio: {accepted}; we say {errors:?}; Istio: {}",
                case["validate"]
            ));
        }
        for p in problems.iter().filter(|p| p.severity == Severity::Error) {
            assert!(!p.field.is_empty(), "{p}");
        }
    }
    assert!(cases > 100, "{cases}");
    assert!(
        wrong.is_empty(),
        "{} of {cases}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
