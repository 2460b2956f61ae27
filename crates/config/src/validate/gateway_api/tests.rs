use std::path::Path;

use crate::{Severity, Snapshot};

/// The first error of an object, as `field: message`.
fn first_error(kind: &str, spec: &str) -> Option<String> {
    let text = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: x, namespace: a}}\nspec: {spec}\n"
    );
    let (_, problems) = Snapshot::from_texts([(Path::new("x.yaml"), text.as_str())]);
    let error = problems.iter().find(|p| p.severity == Severity::Error);
    error.map(|p| format!("{}: {}", p.field, p.message))
}

#[test]
fn what_the_definitions_refuse_is_refused_with_its_path() {
    let to = "backendRefs: [{name: b, port: 80}]";
    for (kind, spec, field) in [
        ("Gateway", "{gatewayClassName: istio, listeners: []}".to_owned(), "spec.listeners:"),
        ("Gateway", "{gatewayClassName: istio, listeners: [{name: a, port: 0, protocol: HTTP}]}".to_owned(), "spec.listeners[0].port:"),
        ("Gateway", "{gatewayClassName: istio, listeners: [{name: a, port: 80, protocol: HTTP}, {name: a, port: 81, protocol: HTTP}]}".to_owned(), "spec.listeners[1].name:"),
        ("Gateway", "{gatewayClassName: istio, listeners: [{name: a, port: 80, protocol: HTTP, tls: {}}]}".to_owned(), "spec.listeners[0].tls:"),
        ("Gateway", "{gatewayClassName: istio, listeners: [{name: a, port: 443, protocol: HTTPS, tls: {mode: Passthrough}}]}".to_owned(), "spec.listeners[0].tls.mode:"),
        ("Gateway", "{gatewayClassName: istio, listeners: [{name: a, port: 443, protocol: HTTPS, tls: {mode: Sometimes}}]}".to_owned(), "spec.listeners[0].tls.mode:"),
        ("Gateway", "{gatewayClassName: istio, listeners: [{name: a, port: 80, protocol: HTTP, hostname: 1.2.3.4}]}".to_owned(), "spec.listeners[0].hostname:"),
        ("HTTPRoute", format!("{{rules: [{{matches: [{{path: {{value: shop}}}}], {to}}}]}}"), "spec.rules[0].matches[0].path.value:"),
        ("HTTPRoute", format!("{{rules: [{{matches: [{{method: BREW}}], {to}}}]}}"), "spec.rules[0].matches[0].method:"),
        ("HTTPRoute", format!("{{rules: [{{filters: [{{type: URLRewrite}}], {to}}}]}}"), "spec.rules[0].filters[0].urlRewrite:"),
        ("HTTPRoute", format!("{{rules: [{{filters: [{{type: Shuffle}}], {to}}}]}}"), "spec.rules[0].filters[0].type:"),
        ("HTTPRoute", format!("{{rules: [{{timeouts: {{request: 1d}}, {to}}}]}}"), "spec.rules[0].timeouts.request:"),
        ("HTTPRoute", format!("{{rules: [{{timeouts: {{request: 1s, backendRequest: 2s}}, {to}}}]}}"), "spec.rules[0].timeouts.backendRequest:"),
        ("HTTPRoute", "{rules: [{backendRefs: [{name: b}]}]}".to_owned(), "spec.rules[0].backendRefs[0].port:"),
        ("HTTPRoute", format!("{{rules: [{{sessionPersistence: {{}}, {to}}}]}}"), "spec.rules[0].sessionPersistence:"),
        ("HTTPRoute", format!("{{rules: [{{colour: red, {to}}}]}}"), "spec.rules[0].colour:"),
        ("GRPCRoute", format!("{{rules: [{{matches: [{{method: {{}}}}], {to}}}]}}"), "spec.rules[0].matches[0].method:"),
        ("TCPRoute", "{rules: []}".to_owned(), "spec.rules:"),
        ("TLSRoute", format!("{{hostnames: [\"a.*\"], rules: [{{{to}}}]}}"), "spec.hostnames[0]:"),
        ("ReferenceGrant", "{from: [{kind: HTTPRoute, namespace: b}]}".to_owned(), "spec.to:"),
        ("BackendTLSPolicy", "{targetRefs: [{kind: Service, name: b}], validation: {hostname: b.example}}".to_owned(), "spec.validation:"),
    ] {
        let error = first_error(kind, &spec);
        assert!(
            error.as_ref().is_some_and(|e| e.starts_with(field)),
            "{kind} {spec}: wanted {field} got {error:?}"
        );
    }
}

#[test]
fn defaults_are_those_of_the_definitions() {
    let text = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: x, namespace: a}\n\
        spec: {rules: [{backendRefs: [{name: b, port: 80}]}, {matches: [{method: GET}], filters: [{type: RequestRedirect, requestRedirect: {}}]}]}\n";
    let (snapshot, problems) = Snapshot::from_texts([(Path::new("x.yaml"), text)]);
    assert_eq!(problems, []);
    let route = &snapshot.http_routes.get("a", "x").unwrap().spec;
    assert_eq!(route.rules[0].matches[0].path.value, "/");
    assert_eq!(route.rules[0].backend_refs[0].weight, 1);
    assert_eq!(route.rules[1].matches[0].path.value, "/");
    let redirect = route.rules[1].filters[0].request_redirect.as_ref();
    assert_eq!(redirect.unwrap().status_code, 302);
}
