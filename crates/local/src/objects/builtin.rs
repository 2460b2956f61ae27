//! Objects that the mesh brings along: the control plane, its namespace, the node, and the mesh's settings.
//!
//! An object of the user's with the same kind, namespace and name replaces each of them; of the settings only the keys
//! that the user writes.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{text, workload::NODE};

/// Folders of the mesh that the control plane works with.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    /// The completed objects.
    pub(crate) config: PathBuf,
    /// The keys of its authority.
    pub(crate) authority: PathBuf,
    /// The public keys of who signs tokens.
    pub(crate) token_keys: PathBuf,
}

/// The public keys of who signs tokens, in their folder.
pub(crate) const TOKEN_KEYS: &str = "keys.json";

/// The objects, for a mesh with these folders.
pub(crate) fn objects(folders: &Folders) -> Vec<Value> {
    vec![
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "default", "labels": {"kubernetes.io/metadata.name": "default"}}}),
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "istio-system", "labels": {"kubernetes.io/metadata.name": "istio-system"}}}),
        json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE, "kubernetes.io/os": "linux"}},
            "status": {"addresses": [{"type": "InternalIP", "address": crate::node::network::GATEWAY.to_string()},
                {"type": "Hostname", "address": NODE}]}}),
        json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "istiod", "namespace": "istio-system"}}),
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "istiod", "namespace": "istio-system",
                "labels": {"app": "istiod", "istio": "pilot", "istio.io/rev": "default"}},
            "spec": {"selector": {"app": "istiod", "istio": "pilot"}, "ports": [
                {"name": "grpc-xds", "port": 15010},
                {"name": "https-dns", "port": 15012},
                {"name": "https-webhook", "port": 443, "targetPort": 15017},
                {"name": "http-monitoring", "port": 15014}]}}),
        json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "istiod", "namespace": "istio-system", "labels": {"app": "istiod"}},
        "spec": {"replicas": 1,
            "selector": {"matchLabels": {"app": "istiod", "istio": "pilot"}},
            "template": {
                "metadata": {"labels": {"app": "istiod", "istio": "pilot", "istio.io/rev": "default",
                    "sidecar.istio.io/inject": "false"}},
                "spec": {
                    "serviceAccountName": "istiod",
                    "containers": [{
                        "name": "discovery",
                        "image": "outrigger.local/control",
                        "args": ["--config", "/etc/outrigger/config", "--secureGRPCAddr", ":15012",
                            "--stateDir", "/var/lib/outrigger",
                            // Pods here have a new root within a second or two.
                            "--rootOverlap", "20s",
                            "--tokenKeys", format!("/etc/outrigger/token-keys/{TOKEN_KEYS}")],
                        "ports": [{"containerPort": 15010, "name": "grpc-xds"},
                            {"containerPort": 15012, "name": "https-dns"},
                            {"containerPort": 15014, "name": "monitoring"}],
                        "readinessProbe": {"httpGet": {"path": "/ready", "port": 15014}, "periodSeconds": 1},
                        "volumeMounts": [
                            {"name": "config", "mountPath": "/etc/outrigger/config", "readOnly": true},
                            {"name": "token-keys", "mountPath": "/etc/outrigger/token-keys", "readOnly": true},
                            {"name": "authority", "mountPath": "/var/lib/outrigger"}],
                    }],
                    "volumes": [{"name": "config", "hostPath": {"path": folders.config}},
                        {"name": "token-keys", "hostPath": {"path": folders.token_keys}},
                        {"name": "authority", "hostPath": {"path": folders.authority}}],
                }}}}),
    ]
}

/// The settings of this mesh where the user's ConfigMap `istio-system/istio` says nothing else.
pub(crate) fn mesh_defaults() -> Value {
    json!({
        "accessLogFile": "/dev/stdout",
        "enableAutoMtls": true,
        "trustDomain": "cluster.local",
        "rootNamespace": "istio-system",
        "defaultConfig": {"discoveryAddress": "istiod.istio-system.svc:15012"},
    })
}

/// The mesh's settings: the user's over ours, key by key. The text is what stands in a ConfigMap's `mesh`.
pub(crate) fn mesh_settings(config_map: Option<&Value>) -> Result<Value, String> {
    let mut mesh = mesh_defaults();
    if let Some(map) = config_map {
        let given = text(map, &["data", "mesh"]);
        if !given.trim().is_empty() {
            let given: Value = serde_saphyr::from_str(given).map_err(|e| {
                format!(
                    "`data.mesh` is not YAML: {}",
                    e.to_string().lines().next().unwrap_or_default()
                )
            })?;
            merge(&mut mesh, given);
        }
    }
    Ok(mesh)
}

/// The ConfigMap with these settings; its other keys stay the user's.
pub(crate) fn mesh_config_map(config_map: Option<&Value>, mesh: &Value) -> Value {
    let mut map = config_map.cloned().unwrap_or_else(|| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}})
    });
    let text = serde_saphyr::to_string(mesh).expect("every JSON value is YAML");
    *super::at_mut(&mut map, &["data", "mesh"]) = json!(text);
    map
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (into, from) => *into = from,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_settings_win_key_by_key() {
        let map =
            json!({"data": {"mesh": "enableAutoMtls: false\ndefaultConfig:\n  concurrency: 1\n"}});
        let mesh = mesh_settings(Some(&map)).unwrap();
        assert_eq!(mesh["enableAutoMtls"], false);
        assert_eq!(mesh["defaultConfig"]["concurrency"], 1);
        assert_eq!(
            mesh["defaultConfig"]["discoveryAddress"],
            "istiod.istio-system.svc:15012"
        );
        assert_eq!(mesh["accessLogFile"], "/dev/stdout");
        let out = mesh_config_map(Some(&map), &mesh);
        assert!(text(&out, &["data", "mesh"]).contains("enableAutoMtls: false"));
    }

    #[test]
    fn settings_that_are_not_yaml_are_refused() {
        assert!(
            mesh_settings(Some(&json!({"data": {"mesh": "a: ["}})))
                .unwrap_err()
                .contains("data.mesh")
        );
    }
}
