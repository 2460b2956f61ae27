//! Who sees what: services, rules, VirtualServices and scopes, as users meet them in clusters and endpoints.

mod support;

use std::sync::Arc;

use outrigger_control::model::{MESH, Mesh, OutboundMode, Settings};
use serde_json::{Value, json};
use support::*;

const A: &str = "outbound|80||a.one.svc.cluster.local";

fn rule(name: &str, namespace: &str, host: &str, timeout: &str, more: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  host: {host}\n  trafficPolicy: {{connectionPool: {{tcp: {{connectTimeout: {timeout}}}}}}}\n{more}---\n"
    )
}

fn timeout(yaml: &str, namespace: &str, labels: Value) -> Value {
    let mesh = mesh(yaml);
    let client = sidecar(&mesh, "client", namespace, "10.9.9.9", labels);
    cluster_of(&mesh, &client, A)["connectTimeout"].clone()
}

#[test]
fn a_clients_own_rule_beats_the_services_which_beats_the_roots() {
    let base = service("a", "one", "10.0.0.1");
    let root = rule("r", "istio-system", "'*.one.svc.cluster.local'", "3s", "");
    let own = rule("r", "one", "a", "2s", "");
    let client = rule("r", "two", "a.one.svc.cluster.local", "1s", "");
    assert_eq!(timeout(&base, "two", json!({})), "10s");
    assert_eq!(timeout(&(base.clone() + &root), "two", json!({})), "3s");
    assert_eq!(
        timeout(&(base.clone() + &root + &own), "two", json!({})),
        "2s"
    );
    let all = base + &root + &own + &client;
    assert_eq!(timeout(&all, "two", json!({})), "1s");
    assert_eq!(timeout(&all, "one", json!({})), "2s");
    assert_eq!(timeout(&all, "three", json!({})), "2s");
}

#[test]
fn a_rule_that_is_not_exported_counts_at_home_only() {
    let yaml = service("a", "one", "10.0.0.1") + &rule("r", "one", "a", "2s", "  exportTo: [.]\n");
    assert_eq!(timeout(&yaml, "one", json!({})), "2s");
    assert_eq!(timeout(&yaml, "two", json!({})), "10s");
    let yaml =
        service("a", "one", "10.0.0.1") + &rule("r", "one", "a", "2s", "  exportTo: [two]\n");
    assert_eq!(timeout(&yaml, "two", json!({})), "2s");
    assert_eq!(timeout(&yaml, "three", json!({})), "10s");
}

#[test]
fn the_most_specific_host_and_a_matching_selector_win() {
    let yaml = service("a", "one", "10.0.0.1")
        + &rule("wide", "two", "'*.svc.cluster.local'", "4s", "")
        + &rule("near", "two", "'*.one.svc.cluster.local'", "5s", "");
    assert_eq!(timeout(&yaml, "two", json!({})), "5s");
    let selector = "  workloadSelector: {matchLabels: {app: x}}\n";
    let yaml = yaml + &rule("mine", "two", "'*.one.svc.cluster.local'", "6s", selector);
    assert_eq!(timeout(&yaml, "two", json!({"app": "x"})), "6s");
    assert_eq!(timeout(&yaml, "two", json!({"app": "y"})), "5s");
}

#[test]
fn rules_for_one_host_join_their_subsets_and_the_first_policy_stays() {
    let subsets = |list: &str| format!("  subsets: [{list}]\n");
    let yaml = service("a", "one", "10.0.0.1")
        + &rule(
            "a",
            "one",
            "a",
            "2s",
            &subsets("{name: v1, labels: {version: v1}}"),
        )
        + &rule(
            "b",
            "one",
            "a",
            "3s",
            &subsets("{name: v1, labels: {version: x}}, {name: v2, labels: {version: v2}}"),
        );
    let mesh = mesh(&yaml);
    let client = sidecar(&mesh, "client", "one", "10.9.9.9", json!({}));
    assert_eq!(cluster_of(&mesh, &client, A)["connectTimeout"], "2s");
    let v1 = endpoints_of(&mesh, &client, "outbound|80|v1|a.one.svc.cluster.local");
    assert_eq!(addresses(&v1), [("10.0.0.1".to_owned(), 0)]);
    let v2 = cluster_of(&mesh, &client, "outbound|80|v2|a.one.svc.cluster.local");
    assert_eq!(v2["metadata"]["filterMetadata"]["istio"]["subset"], "v2");
    assert_eq!(
        addresses(&endpoints_of(
            &mesh,
            &client,
            "outbound|80|v2|a.one.svc.cluster.local"
        )),
        []
    );
}

#[test]
fn a_ports_settings_stand_alone_and_a_subsets_overlay() {
    let yaml = service("a", "one", "10.0.0.1")
        + "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: r, namespace: one}
spec:
  host: a
  trafficPolicy:
    loadBalancer: {simple: RANDOM}
    connectionPool: {tcp: {maxConnections: 7}}
    portLevelSettings: [{port: {number: 81}, connectionPool: {tcp: {maxConnections: 9}}}]
  subsets:
  - {name: s, labels: {version: v1}, trafficPolicy: {connectionPool: {tcp: {maxConnections: 8}}}}
";
    let one = "ports: [{name: http, port: 80, targetPort: 8080}]";
    let two = "ports: [{name: http, port: 80, targetPort: 8080}, {name: http-b, port: 81, targetPort: 8080}]";
    let yaml = yaml.replace(one, two);
    let mesh = mesh(&yaml);
    let client = sidecar(&mesh, "client", "one", "10.9.9.9", json!({}));
    let max = |c: &Value| c["circuitBreakers"]["thresholds"][0]["maxConnections"].clone();
    let of = |name: &str| cluster_of(&mesh, &client, name);
    let whole = of(A);
    assert_eq!(
        (max(&whole), &whole["lbPolicy"]),
        (json!(7), &json!("RANDOM"))
    );
    let port = of("outbound|81||a.one.svc.cluster.local");
    assert_eq!(
        (max(&port), &port["lbPolicy"]),
        (json!(9), &json!("LEAST_REQUEST"))
    );
    let subset = of("outbound|80|s|a.one.svc.cluster.local");
    assert_eq!(
        (max(&subset), &subset["lbPolicy"]),
        (json!(8), &json!("RANDOM"))
    );
}

#[test]
fn a_sidecar_by_selector_beats_the_namespaces_which_beats_the_roots() {
    let scope = |name: &str, namespace: &str, selector: &str, hosts: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n{selector}  egress: [{{hosts: [{hosts}]}}]\n---\n"
        )
    };
    let services = service("a", "one", "10.0.0.1")
        + &service("b", "two", "10.0.0.2")
        + &service("c", "three", "10.0.0.3");
    let yaml = services
        + &scope("root", "istio-system", "", "one/*")
        + &scope("space", "two", "", "./*")
        + &scope(
            "own",
            "two",
            "  workloadSelector: {labels: {app: x}}\n",
            "'*/c.three.svc.cluster.local'",
        );
    let mesh = mesh(&yaml);
    let seen = |namespace: &str, labels: Value| {
        let proxy = sidecar(&mesh, "client", namespace, "10.9.9.9", labels);
        proxy
            .scope
            .services
            .iter()
            .map(|s| s.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(seen("two", json!({"app": "x"})), ["c"]);
    assert_eq!(seen("two", json!({"app": "y"})), ["b"]);
    assert_eq!(seen("one", json!({})), ["a"]);
    let gateway = proxy(
        &mesh,
        "router",
        "gw",
        "two",
        "10.9.9.8",
        json!({}),
        json!({}),
    );
    assert_eq!(gateway.scope.services.len(), 3);
}

#[test]
fn a_scope_takes_in_where_its_virtual_services_lead() {
    let yaml = service("a", "one", "10.0.0.1")
        + &service("b", "two", "10.0.0.2")
        + "apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: one}
spec: {egress: [{hosts: ['./*']}], outboundTrafficPolicy: {mode: REGISTRY_ONLY}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: v, namespace: one}
spec: {hosts: [a], http: [{route: [{destination: {host: b.two.svc.cluster.local}}]}]}
";
    let mesh = mesh(&yaml);
    let client = sidecar(&mesh, "client", "one", "10.9.9.9", json!({}));
    let names: Vec<_> = client
        .scope
        .services
        .iter()
        .map(|s| s.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(client.scope.outbound_mode, OutboundMode::RegistryOnly);
    assert_eq!(client.scope.egress[0].virtual_services.len(), 1);
}

#[test]
fn a_service_is_seen_where_it_is_exported_to() {
    let yaml = service("a", "one", "10.0.0.1").replace(
        "{name: a, namespace: one}",
        "{name: a, namespace: one, annotations: {networking.istio.io/exportTo: '., two'}}",
    );
    let mesh = mesh(&yaml);
    let sees = |ns: &str| {
        sidecar(&mesh, "client", ns, "10.9.9.9", json!({}))
            .scope
            .services
            .len()
    };
    assert_eq!([sees("one"), sees("two"), sees("three")], [1, 1, 0]);
}

#[test]
fn delegates_are_merged_into_their_root() {
    let yaml = "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: root, namespace: one}
spec:
  hosts: [a]
  http:
  - {name: r, match: [{uri: {prefix: /x}}], timeout: 3s, delegate: {name: leaf, namespace: two}}
  - {route: [{destination: {host: a}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: leaf, namespace: two}
spec:
  http:
  - {name: l, match: [{uri: {prefix: /x/y}}], route: [{destination: {host: b}}]}
  - {name: other, match: [{uri: {prefix: /z}}], route: [{destination: {host: b}}]}
";
    let mesh = mesh(yaml);
    let all: Vec<_> = mesh.virtual_services().for_gateway("one", MESH).collect();
    assert_eq!(all.len(), 1);
    let http = &all[0].spec().http;
    assert_eq!(
        http.iter().map(|h| h.name.as_str()).collect::<Vec<_>>(),
        ["r-l", ""]
    );
    assert_eq!(http[0].timeout.unwrap().seconds, 3);
    assert_eq!(
        http[0].route[0].destination.as_ref().unwrap().host,
        "b.two.svc.cluster.local"
    );
    assert_eq!(all[0].from.len(), 2);
}

#[test]
fn external_names_are_aliases_without_a_cluster() {
    let alias = |name: &str, to: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: one}}\nspec: {{type: ExternalName, externalName: {to}}}\n---\n"
        )
    };
    let yaml = service("a", "one", "10.0.0.1")
        + &alias("n1", "n2.one.svc.cluster.local")
        + &alias("n2", "a.one.svc.cluster.local")
        + &alias("l1", "l2.one.svc.cluster.local")
        + &alias("l2", "l1.one.svc.cluster.local");
    let mesh = mesh(&yaml);
    let a = mesh
        .services()
        .get("a.one.svc.cluster.local", "one")
        .unwrap();
    let names: Vec<_> = a
        .aliases
        .iter()
        .map(|(_, host)| host.split('.').next().unwrap())
        .collect();
    assert_eq!(names, ["n1", "n2"]);
    let client = sidecar(&mesh, "client", "one", "10.9.9.9", json!({}));
    assert_eq!(
        cluster_of(&mesh, &client, "outbound|80||n1.one.svc.cluster.local"),
        Value::Null
    );
}

#[test]
fn a_new_mesh_shares_what_did_not_change() {
    let yaml = service("a", "one", "10.0.0.1") + &service("b", "one", "10.0.0.2");
    let old = mesh(&yaml);
    let client = sidecar(&old, "client", "one", "10.9.9.9", json!({}));
    let grown = yaml.clone() + &pod("a", "one", "10.0.0.7", "v2", "node-a", true);
    let new = Mesh::new(with_pods_of(&old, &grown), Settings::default(), Some(&old));
    let changed = new.endpoint_changes(&old);
    let key = ("a.one.svc.cluster.local".to_owned(), "one".to_owned());
    assert_eq!(
        changed.into_iter().collect::<Vec<_>>(),
        std::slice::from_ref(&key)
    );
    assert!(!new.endpoint_change_needs_clusters(&old, &key));
    let again = sidecar(&new, "client", "one", "10.9.9.9", json!({}));
    assert!(Arc::ptr_eq(&client.scope, &again.scope));
    assert_eq!(addresses(&endpoints_of(&new, &again, A)).len(), 2);
    // A pod of another identity changes whom clusters trust.
    let other = yaml
        + &pod("a", "one", "10.0.0.7", "v2", "node-a", true)
            .replace("serviceAccountName: a", "serviceAccountName: z");
    let newer = Mesh::new(snapshot(&other), Settings::default(), Some(&new));
    assert!(newer.endpoint_change_needs_clusters(&new, &key));
}

/// The objects of a mesh with only pods and slices taken from other YAML, as a store hands them on.
fn with_pods_of(mesh: &Mesh, yaml: &str) -> Arc<config::Snapshot> {
    let read = snapshot(yaml);
    let mut out = (**mesh.snapshot()).clone();
    out.pods = read.pods.clone();
    out.endpoint_slices = read.endpoint_slices.clone();
    Arc::new(out)
}

#[test]
fn proxies_that_differ_in_nothing_that_matters_share_a_view() {
    let yaml = service("a", "one", "10.0.0.1")
        + &rule(
            "r",
            "one",
            "a",
            "2s",
            "  workloadSelector: {matchLabels: {tier: gold}}\n",
        );
    let mesh = mesh(&yaml);
    let key = |pod: &str, namespace: &str, labels: Value| {
        sidecar(
            &mesh,
            pod,
            namespace,
            &format!("10.9.9.{}", pod.len()),
            labels,
        )
        .view_key(&mesh)
    };
    let one = key("p1", "one", json!({"app": "x"}));
    assert_eq!(one, key("other", "one", json!({"app": "y"})));
    assert_ne!(one, key("p1", "two", json!({"app": "x"})));
    assert_ne!(one, key("p1", "one", json!({"tier": "gold"})));
}

#[test]
fn only_discovered_namespaces_are_taken_in() {
    let namespace = |name: &str, labels: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {labels}}}\n---\n"
        )
    };
    let objects = namespace("one", "{mesh: 'on'}")
        + &namespace("two", "{mesh: 'off'}")
        + &namespace("three", "{}")
        + &service("a", "one", "10.0.0.1")
        + &service("b", "two", "10.0.0.2")
        + &service("c", "three", "10.0.0.3")
        + &rule("r", "two", "a.one.svc.cluster.local", "1s", "");
    let seen = |selectors: &str| {
        let yaml = mesh_config(&format!("discoverySelectors: {selectors}")) + &objects;
        let mesh = mesh(&yaml);
        let client = sidecar(&mesh, "client", "one", "10.9.9.9", json!({}));
        client
            .scope
            .services
            .iter()
            .map(|s| s.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(seen("[]"), ["a", "b", "c"]);
    assert_eq!(seen("[{matchLabels: {mesh: 'on'}}]"), ["a"]);
    assert_eq!(
        seen("[{matchExpressions: [{key: mesh, operator: NotIn, values: ['off']}]}]"),
        ["a", "c"]
    );
}

#[test]
fn metadata_of_a_proxys_own_splits_a_view_only_where_a_patch_asks_for_it() {
    let keys = |yaml: &str| {
        let mesh = mesh(&(service("a", "one", "10.0.0.1") + yaml));
        ["x", "y"].map(|name| {
            let more = json!({"NAME": name, "WORKLOAD_NAME": name});
            proxy(&mesh, "sidecar", name, "one", "10.9.9.9", json!({}), more).view_key(&mesh)
        })
    };
    let [x, y] = keys("");
    assert_eq!(x, y);
    let [x, y] = keys(
        "apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: f, namespace: one}
spec:
  configPatches:
  - applyTo: CLUSTER
    match: {proxy: {metadata: {NAME: x}}}
    patch: {operation: REMOVE}
",
    );
    assert_ne!(x, y);
}

#[test]
fn sidecars_of_one_name_in_two_namespaces_are_two_views() {
    let yaml = service("a", "one", "10.0.0.1")
        + "apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: istio-system}
spec: {egress: [{hosts: ['one/*']}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: two}
spec: {workloadSelector: {labels: {app: x}}, egress: [{hosts: ['./*']}]}
";
    let mesh = mesh(&yaml);
    let of = |app: &str| sidecar(&mesh, "client", "two", "10.9.9.9", json!({"app": app}));
    assert_eq!(
        (of("x").scope.services.len(), of("y").scope.services.len()),
        (0, 1)
    );
    assert_ne!(of("x").view_key(&mesh), of("y").view_key(&mesh));
}

#[test]
fn callers_on_other_nodes_are_another_view_where_the_node_counts() {
    let keys = |distribution: &str| {
        let spec = format!("  clusterIP: 10.96.0.1\n  trafficDistribution: {distribution}\n");
        let yaml = service("a", "one", "10.0.0.1").replace("  clusterIP: 10.96.0.1\n", &spec);
        let mesh = mesh(&yaml);
        ["node-a", "node-b"].map(|node| {
            let more = json!({"NODE_NAME": node});
            proxy(&mesh, "sidecar", "c", "one", "10.9.9.9", json!({}), more).view_key(&mesh)
        })
    };
    let [a, b] = keys("PreferSameZone");
    assert_eq!(a, b);
    let [a, b] = keys("PreferSameNode");
    assert_ne!(a, b);
}
