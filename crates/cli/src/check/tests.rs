//! Findings by facts, and the command against an API server that plays a part.

use serde_json::json;

use super::*;
use crate::play::Cluster;

fn sound() -> Facts {
    let service = json!({"metadata": {"namespace": "istio-system", "name": "istiod"}});
    let slice = json!({
        "metadata": {"namespace": "istio-system", "labels": {"kubernetes.io/service-name": "istiod"}},
        "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true}}],
    });
    Facts {
        server: Some(look::Server {
            version: "v1.36.3".into(),
            minor: (1, 36),
            ahead: Some(0),
        }),
        nodes: vec![node("a", "6.1.0-13-amd64", "amd64")],
        namespaces: vec![
            json!({"metadata": {"name": "shop", "labels": {"istio-injection": "enabled"}}}),
        ],
        services: vec![service],
        slices: vec![slice],
        mutating: vec![injector("istio-sidecar-injector", "istiod")],
        deployments: vec![json!({
            "metadata": {"namespace": "istio-system", "name": "istiod",
                "labels": {"app": "istiod", "istio.io/rev": "default", "app.kubernetes.io/version": "0.1.0"}},
            "spec": {"replicas": 2}, "status": {"readyReplicas": 2},
        })],
        ..Facts::default()
    }
}

fn node(name: &str, kernel: &str, architecture: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "status": {
            "nodeInfo": {"kernelVersion": kernel, "operatingSystem": "linux", "architecture": architecture},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn injector(name: &str, service: &str) -> Value {
    json!({
        "metadata": {"name": name, "labels": {
            "istio.io/rev": "default", "app": "sidecar-injector", "app.kubernetes.io/part-of": "outrigger"}},
        "webhooks": [{
            "name": "namespace.sidecar-injector.istio.io",
            "clientConfig": {"caBundle": "Q0E=", "service": {"namespace": "istio-system", "name": service}},
            "failurePolicy": "Fail",
            "rules": [{"resources": ["pods"]}],
        }],
    })
}

/// What is worse than fine.
fn complaints(facts: &Facts) -> Vec<String> {
    let mut all = before(facts, "istio-system", "default");
    all.extend(after(facts, "istio-system", "default"));
    all.retain(|f| f.level != Level::Fine);
    all.into_iter().map(|f| f.text).collect()
}

#[track_caller]
fn complains(facts: &Facts, level: Level, words: &str) {
    let mut all = before(facts, "istio-system", "default");
    all.extend(after(facts, "istio-system", "default"));
    let found = all.iter().find(|f| f.text.contains(words));
    assert_eq!(found.map(|f| f.level), Some(level), "{all:#?}");
}

#[test]
fn a_sound_cluster_has_nothing_to_complain_of() {
    assert_eq!(complaints(&sound()), Vec::<String>::new());
}

#[test]
fn servers_and_nodes_that_are_too_old_are_named() {
    let mut facts = sound();
    facts.server = Some(look::Server {
        version: "v1.27.1".into(),
        minor: (1, 27),
        ahead: Some(-300),
    });
    facts.nodes.push(node("old", "3.10.0-1160.el7", "amd64"));
    facts.nodes.push(node("odd", "6.1.0", "s390x"));
    complains(&facts, Level::Error, "v1.27.1");
    complains(&facts, Level::Error, "300 s behind");
    complains(&facts, Level::Error, "node old has kernel 3.10.0");
    complains(&facts, Level::Error, "node odd is s390x");
}

#[test]
fn webhooks_that_inject_twice_or_answer_not_are_named() {
    let mut facts = sound();
    let mut other = injector("istio-sidecar-injector-theirs", "istiod");
    other["metadata"]["labels"]["app.kubernetes.io/part-of"] = "istio".into();
    facts.mutating.push(other);
    let mut dead = injector("policies", "nobody");
    dead["metadata"]["labels"] = json!({});
    dead["webhooks"][0]["name"] = "pods.policies.example".into();
    facts.validating.push(dead);
    complains(&facts, Level::Error, "two sidecars");
    complains(
        &facts,
        Level::Error,
        "Service istio-system/nobody has no pod",
    );
    let mut facts = sound();
    facts.mutating[0]["webhooks"][0]["clientConfig"]["caBundle"] = Value::Null;
    complains(&facts, Level::Error, "without caBundle");
}

#[test]
fn pods_and_namespaces_that_would_break_are_named() {
    let mut facts = sound();
    facts
        .namespaces
        .push(json!({"metadata": {"name": "strict", "labels": {
        "istio-injection": "enabled", "pod-security.kubernetes.io/enforce": "restricted"}}}));
    facts
        .namespaces
        .push(json!({"metadata": {"name": "lost", "labels": {"istio.io/rev": "gone"}}}));
    facts.pods.push(json!({
        "metadata": {"namespace": "shop", "name": "busy"},
        "spec": {"containers": [{"name": "app", "ports": [{"containerPort": 15001}]}]},
    }));
    complains(
        &facts,
        Level::Error,
        "shop/busy (container app, port 15001)",
    );
    complains(&facts, Level::Error, "namespaces strict");
    complains(&facts, Level::Error, "istio.io/rev=gone");
    complains(&facts, Level::Warning, "without a sidecar");
    facts.daemon_sets.push(json!({
        "metadata": {"namespace": "istio-system", "name": "istio-cni-node"},
        "status": {"desiredNumberScheduled": 2, "numberReady": 2},
    }));
    assert!(
        !complaints(&facts)
            .iter()
            .any(|t| t.contains("Pod Security"))
    );
    facts.daemon_sets[0]["status"]["numberReady"] = 1.into();
    complains(&facts, Level::Error, "1 of 2 pods are ready");
}

#[test]
fn objects_stored_in_a_version_that_is_not_served_stop_an_install() {
    let mut facts = sound();
    facts.definitions.push(json!({
        "metadata": {"name": "virtualservices.networking.istio.io", "managedFields": [{"manager": "helm"}]},
        "status": {"storedVersions": ["v1alpha1"]},
    }));
    complains(&facts, Level::Error, "stored as v1alpha1");
    complains(&facts, Level::Warning, "another installer");
}

#[test]
fn who_asks_on_the_port_without_tls_is_named() {
    let with = |argument: &str| {
        let mut facts = sound();
        facts.deployments[0]["spec"]["template"]["spec"]["containers"] =
            json!([{"name": "discovery", "args": ["control", argument]}]);
        facts
    };
    let pod = |name: &str, address: &str| {
        let settings = json!({"discoveryAddress": address}).to_string();
        json!({
            "metadata": {"namespace": "shop", "name": name},
            "spec": {"containers": [
                {"name": "istio-proxy", "env": [{"name": "PROXY_CONFIG", "value": settings}]}]},
        })
    };
    let both = [
        pod("right", "istiod.istio-system.svc:15012"),
        pod("plain", "istiod.istio-system.svc:15010"),
        pod("theirs", "control.example:15010"),
    ];
    let mut facts = with("--grpcAddr=");
    assert_eq!(complaints(&facts), Vec::<String>::new());
    facts.pods.extend(both.clone());
    complains(
        &facts,
        Level::Error,
        "port 15010, which is closed: shop/plain; let their discoveryAddress be istiod.istio-system.svc:15012",
    );
    // Programs without a proxy, whose bootstrap an init container writes.
    facts.pods = vec![json!({
        "metadata": {"namespace": "shop", "name": "simple"},
        "spec": {"initContainers": [{"name": "grpc-bootstrap-init"}], "containers": [{"name": "app"}]},
    })];
    complains(&facts, Level::Error, "which is closed: shop/simple");

    let mut facts = with("--grpcAddr=:15010");
    complains(&facts, Level::Warning, "no pod asks there");
    facts.pods.extend(both);
    complains(&facts, Level::Warning, "on port 15012: shop/plain");
}

#[test]
fn the_command_asks_a_cluster() {
    let cluster = Cluster::new();
    let flags = ["check", "--kubeconfig", cluster.kubeconfig()];
    let flags = Check::try_parse_from(flags).unwrap();
    cluster.block_on(run(&flags)).unwrap();
    cluster.put("/api/v1/nodes", node("old", "3.10.0", "amd64"));
    let failed = cluster.block_on(run(&flags)).unwrap_err();
    assert_eq!(failed.to_string(), "1 errors");
}
