//! A mesh from YAML, and proxies in it.
#![allow(dead_code)] // Each test program uses a part.

use std::{path::Path, sync::Arc};

use config::{Severity, Snapshot};
use outrigger_control::{
    cluster, endpoint,
    model::{Mesh, Node, Proxy, Resource, Settings},
};
use proto::envoy::config::core::v3::{Locality, Node as EnvoyNode};
use serde_json::{Value, json};

/// The objects of some YAML; nothing in it may be wrong.
pub(crate) fn snapshot(yaml: &str) -> Arc<Snapshot> {
    let (snapshot, problems) = Snapshot::from_texts([(Path::new("test.yaml"), yaml)]);
    let errors: Vec<_> = problems
        .iter()
        .filter(|p| p.severity == Severity::Error)
        .collect();
    assert!(errors.is_empty(), "{}", errors[0]);
    Arc::new(snapshot)
}

/// The mesh of some YAML.
pub(crate) fn mesh(yaml: &str) -> Mesh {
    Mesh::new(snapshot(yaml), Settings::default(), None)
}

/// A MeshConfig document to put in front of other YAML.
pub(crate) fn mesh_config(fields: &str) -> String {
    let fields = fields.replace('\n', "\n    ");
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    {fields}\n---\n"
    )
}

/// A Service `name` in `namespace` with selector `app: NAME`, port 80 → 8080 named `http`, and one pod.
pub(crate) fn service(name: &str, namespace: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  clusterIP: 10.96.0.{}\n  selector: {{app: {name}}}\n  ports: [{{name: http, port: 80, targetPort: 8080}}]\n---\n{}",
        ip.rsplit('.').next().unwrap(),
        pod(name, namespace, ip, "v1", "node-a", true),
    )
}

/// A pod `NAME-VERSION` with a sidecar.
pub(crate) fn pod(
    app: &str,
    namespace: &str,
    ip: &str,
    version: &str,
    node: &str,
    ready: bool,
) -> String {
    let ready = if ready { "True" } else { "False" };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {app}-{version}, namespace: {namespace}, labels: {{app: {app}, version: {version}, security.istio.io/tlsMode: istio}}}}\nspec: {{serviceAccountName: {app}, nodeName: {node}, containers: [{{name: app, ports: [{{name: web, containerPort: 8080}}]}}]}}\nstatus: {{phase: Running, podIP: {ip}, conditions: [{{type: Ready, status: '{ready}'}}]}}\n---\n"
    )
}

/// Nodes `node-a` (eu/eu-1), `node-b` (eu/eu-2) and `node-c` (us/us-1).
pub(crate) fn nodes() -> String {
    [("node-a", "eu", "eu-1"), ("node-b", "eu", "eu-2"), ("node-c", "us", "us-1")]
        .map(|(name, region, zone)| {
            format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{topology.kubernetes.io/region: {region}, topology.kubernetes.io/zone: {zone}}}}}\n---\n"
            )
        })
        .concat()
}

/// A sidecar `POD.NAMESPACE` with labels, on node-a.
pub(crate) fn sidecar(mesh: &Mesh, pod: &str, namespace: &str, ip: &str, labels: Value) -> Proxy {
    proxy(mesh, "sidecar", pod, namespace, ip, labels, json!({}))
}

/// A proxy with more metadata.
pub(crate) fn proxy(
    mesh: &Mesh,
    kind: &str,
    pod: &str,
    namespace: &str,
    ip: &str,
    labels: Value,
    more: Value,
) -> Proxy {
    let mut metadata = json!({
        "CLUSTER_ID": "Kubernetes", "NAMESPACE": namespace, "INSTANCE_IPS": ip, "LABELS": labels,
        "NODE_NAME": "node-a", "ISTIO_VERSION": "1.30.0",
    });
    metadata
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let id = format!("{kind}~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local");
    let mut node: EnvoyNode =
        proto::json::from_value(&json!({"id": id, "metadata": metadata})).unwrap();
    node.locality = Some(Locality {
        region: "eu".into(),
        zone: "eu-1".into(),
        ..Locality::default()
    });
    Proxy::new(mesh, Arc::new(Node::parse(&node).unwrap()))
}

/// A resource as JSON.
pub(crate) fn shown(resource: &Resource) -> Value {
    proto::json::any_to_value(&resource.any())
}

/// The cluster of that name; null where there is none.
pub(crate) fn cluster_of(mesh: &Mesh, proxy: &Proxy, name: &str) -> Value {
    let all = cluster::build(mesh, proxy);
    all.iter()
        .find(|c| c.name == name)
        .map_or(Value::Null, shown)
}

/// The assignment of that name.
pub(crate) fn endpoints_of(mesh: &Mesh, proxy: &Proxy, name: &str) -> Value {
    shown(&endpoint::assignment(mesh, proxy, name))
}

/// Addresses of an assignment, each with its priority.
pub(crate) fn addresses(assignment: &Value) -> Vec<(String, u64)> {
    let places = assignment["endpoints"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    places
        .iter()
        .flat_map(|place| {
            let priority = place["priority"].as_u64().unwrap_or(0);
            let list = place["lbEndpoints"].as_array().cloned().unwrap_or_default();
            list.into_iter().map(move |e| {
                let address = e["endpoint"]["address"]["socketAddress"]["address"].clone();
                (address.as_str().unwrap().to_owned(), priority)
            })
        })
        .collect()
}
