//! EnvoyFilter's operations, beyond those that a real istiod's answer shows.

mod support;

use outrigger_control::{listener, model::Proxy, route};
use serde_json::{Value, json};
use support::*;

const A: &str = "outbound|80||a.one.svc.cluster.local";

fn filter(namespace: &str, more: &str, patches: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{name: f, namespace: {namespace}}}\nspec:\n{more}  configPatches:\n{patches}---\n"
    )
}

fn client(yaml: &str, labels: Value) -> (outrigger_control::model::Mesh, Proxy) {
    let mesh = mesh(&(service("a", "one", "10.0.0.1") + yaml));
    let proxy = sidecar(&mesh, "client", "one", "10.9.9.9", labels);
    (mesh, proxy)
}

/// Names of the HTTP filters of the listener for port 80.
fn http_filters(patches: &str) -> Vec<String> {
    let yaml = if patches.is_empty() {
        String::new()
    } else {
        filter("one", "", patches)
    };
    let (mesh, proxy) = client(&yaml, json!({}));
    let all = listener::build(&mesh, &proxy);
    let listener = shown(all.iter().find(|l| l.name == "0.0.0.0_80").unwrap());
    let chain = &listener["filterChains"]
        .as_array()
        .map_or(Value::Null, |c| c[0].clone());
    let chain = if chain.is_null() {
        &listener["defaultFilterChain"]
    } else {
        chain
    };
    let hcm = chain["filters"]
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["name"] == "envoy.filters.network.http_connection_manager")
        .unwrap();
    let filters = hcm["typedConfig"]["httpFilters"].as_array().unwrap();
    filters
        .iter()
        .map(|f| f["name"].as_str().unwrap().to_owned())
        .collect()
}

fn on(sub: &str, operation: &str) -> String {
    let sub = if sub.is_empty() {
        String::new()
    } else {
        format!(", subFilter: {{name: {sub}}}")
    };
    format!(
        "  - applyTo: HTTP_FILTER\n    match: {{context: SIDECAR_OUTBOUND, listener: {{filterChain: {{filter: {{name: envoy.filters.network.http_connection_manager{sub}}}}}}}}}\n    patch: {{operation: {operation}, value: {{name: new, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault}}}}}}\n"
    )
}

#[test]
fn http_filters_are_put_before_after_and_instead() {
    let plain = http_filters("");
    let at = |list: &[String], name: &str| list.iter().position(|n| n == name);
    let router = "envoy.filters.http.router";
    let before = http_filters(&on(router, "INSERT_BEFORE"));
    assert_eq!(
        at(&before, "new").unwrap() + 1,
        at(&before, router).unwrap()
    );
    let cors = "envoy.filters.http.cors";
    let after = http_filters(&on(cors, "INSERT_AFTER"));
    assert_eq!(at(&after, "new").unwrap(), at(&after, cors).unwrap() + 1);
    assert_eq!(http_filters(&on("", "INSERT_FIRST"))[0], "new");
    let replaced = http_filters(&on(cors, "REPLACE"));
    assert_eq!((replaced.len(), at(&replaced, cors)), (plain.len(), None));
    let removed = http_filters(&on(cors, "REMOVE"));
    assert_eq!((removed.len(), at(&removed, cors)), (plain.len() - 1, None));
    assert_eq!(http_filters(&on("nobody", "INSERT_AFTER")), plain);
}

#[test]
fn clusters_are_removed_by_name_and_patches_follow_priority() {
    let cluster = |value: &str| {
        format!(
            "  - applyTo: CLUSTER\n    match: {{context: SIDECAR_OUTBOUND, cluster: {{name: '{A}'}}}}\n    patch: {{operation: MERGE, value: {{connect_timeout: {value}}}}}\n"
        )
    };
    let own = filter("one", "  priority: 5\n", &cluster("5s"));
    let root = filter("istio-system", "  priority: 9\n", &cluster("9s"));
    let (mesh, proxy) = client(&(own + &root), json!({}));
    assert_eq!(cluster_of(&mesh, &proxy, A)["connectTimeout"], "9s");
    let gone = "  - applyTo: CLUSTER\n    match: {cluster: {service: a.one.svc.cluster.local}}\n    patch: {operation: REMOVE}\n";
    let (mesh, proxy) = client(&filter("one", "", gone), json!({}));
    assert_eq!(cluster_of(&mesh, &proxy, A), Value::Null);
}

#[test]
fn a_patch_is_for_the_selected_workload_and_the_named_versions() {
    let timeout = |more: &str, proxy_match: &str, labels: Value| {
        let patch = format!(
            "  - applyTo: CLUSTER\n    match: {{context: SIDECAR_OUTBOUND{proxy_match}}}\n    patch: {{operation: MERGE, value: {{connect_timeout: 7s}}}}\n"
        );
        let (mesh, proxy) = client(&filter("one", more, &patch), labels);
        cluster_of(&mesh, &proxy, A)["connectTimeout"].clone()
    };
    let selector = "  workloadSelector: {labels: {app: x}}\n";
    assert_eq!(timeout(selector, "", json!({"app": "x"})), "7s");
    assert_eq!(timeout(selector, "", json!({"app": "y"})), "10s");
    assert_eq!(
        timeout("", ", proxy: {proxyVersion: '^1\\.30.*'}", json!({})),
        "7s"
    );
    assert_eq!(
        timeout("", ", proxy: {proxyVersion: '^1\\.29.*'}", json!({})),
        "10s"
    );
    assert_eq!(
        timeout(
            "",
            ", proxy: {metadata: {CLUSTER_ID: Kubernetes}}",
            json!({})
        ),
        "7s"
    );
    assert_eq!(
        timeout("", ", proxy: {metadata: {CLUSTER_ID: other}}", json!({})),
        "10s"
    );
}

#[test]
fn virtual_hosts_and_routes_are_added_and_removed() {
    let patches = "  - applyTo: VIRTUAL_HOST\n    match: {routeConfiguration: {name: '80'}}\n    patch: {operation: ADD, value: {name: extra, domains: [extra.example], routes: [{match: {prefix: /}, direct_response: {status: 204}}]}}\n  - applyTo: HTTP_ROUTE\n    match: {context: SIDECAR_OUTBOUND, routeConfiguration: {vhost: {name: 'a.one.svc.cluster.local:80'}}}\n    patch: {operation: INSERT_FIRST, value: {name: first, match: {prefix: /x}, direct_response: {status: 418}}}\n";
    let (mesh, proxy) = client(&filter("one", "", patches), json!({}));
    let routes = shown(&route::build(&mesh, &proxy, &["80".to_owned()])[0]);
    let hosts = routes["virtualHosts"].as_array().unwrap();
    assert_eq!(hosts.last().unwrap()["name"], "extra");
    let a = hosts
        .iter()
        .find(|h| h["name"] == "a.one.svc.cluster.local:80")
        .unwrap();
    assert_eq!(a["routes"][0]["name"], "first");
}

#[test]
fn the_example_of_rate_limits_reaches_the_proxies_that_it_is_for() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../examples/rate-limit.yaml"
    );
    let example = std::fs::read_to_string(path).unwrap();
    let limits = "apiVersion: v1\nkind: Service\nmetadata: {name: ratelimit, namespace: shop}\nspec: {clusterIP: 10.0.0.2, selector: {app: ratelimit}, ports: [{name: grpc-limits, port: 8081}]}\n---\n";
    let mesh = mesh(&(service("shop", "shop", "10.0.0.1") + limits + &example));
    let inbound = |labels: Value| {
        let proxy = sidecar(&mesh, "pod", "shop", "10.9.9.9", labels);
        let all = listener::build(&mesh, &proxy);
        let listener = all.iter().find(|l| l.name == "virtualInbound").unwrap();
        (proxy, shown(listener).to_string())
    };
    let (proxy, listener) = inbound(json!({"app": "shop"}));
    for part in [
        "\"envoy.filters.http.ratelimit\"",
        "\"descriptorKey\":\"PATH\"",
        "\"failureModeDeny\":true",
        "\"clusterName\":\"outbound|8081||ratelimit.shop.svc.cluster.local\"",
    ] {
        assert!(listener.contains(part), "{part}: {listener}");
    }
    let cluster = cluster_of(
        &mesh,
        &proxy,
        "outbound|8081||ratelimit.shop.svc.cluster.local",
    );
    assert!(
        cluster.to_string().contains("http2ProtocolOptions"),
        "{cluster}"
    );
    let (_, other) = inbound(json!({"app": "other"}));
    assert!(!other.contains("ratelimit.v3"), "{other}");
}

#[test]
fn a_plain_envoy_gets_none_of_istios_filters_in_clusters() {
    let mesh = mesh(&service("a", "one", "10.0.0.1"));
    let plain = proxy(
        &mesh,
        "sidecar",
        "c",
        "one",
        "10.9.9.9",
        json!({}),
        json!({"ISTIO_FILTERS": "false"}),
    );
    let cluster = cluster_of(&mesh, &plain, A);
    assert_eq!(cluster["filters"], Value::Null);
    let tls =
        &cluster["transportSocketMatches"][0]["transportSocket"]["typedConfig"]["commonTlsContext"];
    assert_eq!(tls["alpnProtocols"], json!(["istio-http/1.1", "istio"]));
}
