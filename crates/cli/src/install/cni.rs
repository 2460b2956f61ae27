//! The CNI plug-in's agent: one pod on each node, so that no pod of an application needs NET_ADMIN.

use serde_json::{Value, json};

use super::{control_plane::pull_secrets, manifests::Place};

const NAME: &str = "istio-cni-node";

/// Everything of it, where the values turn it on. Nodes have one for all revisions.
pub(super) fn all(place: &Place) -> Vec<Value> {
    if place.values.at(&["cni", "enabled"]) != true || !place.is_default() {
        return Vec::new();
    }
    let role = place.cluster_wide(NAME);
    let labels = place.labels(NAME);
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": place.meta(NAME, NAME)}),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": role, "labels": labels},
            // It reads how pods want to be captured. Who steals a node's token can read pods, and change none.
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": role, "labels": labels},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": place.namespace}],
        }),
        daemon_set(place),
    ]
}

fn daemon_set(place: &Place) -> Value {
    let values = &place.values;
    let mut labels = place.labels(NAME);
    labels["k8s-app"] = NAME.into();
    labels["sidecar.istio.io/inject"] = "false".into();
    labels["istio.io/dataplane-mode"] = "none".into();
    let (bin, net) = (
        values.text(&["cni", "cniBinDir"]),
        values.text(&["cni", "cniConfDir"]),
    );
    // Its own namespace as well: gateways there take no captured traffic.
    let mut excluded = vec![place.namespace.clone()];
    let given = values.at(&["cni", "excludeNamespaces"]).as_array();
    excluded.extend(
        given
            .into_iter()
            .flatten()
            .filter_map(|n| n.as_str())
            .map(str::to_owned),
    );
    let of = |path: &str| json!({"fieldRef": {"apiVersion": "v1", "fieldPath": path}});
    let mut container = json!({
        "name": "install-cni",
        "image": values.proxy_image(),
        "command": ["/usr/local/bin/outrigger-proxy", "cni", "node"],
        "env": [
            {"name": "NODE_NAME", "valueFrom": of("spec.nodeName")},
            {"name": "POD_NAMESPACE", "valueFrom": of("metadata.namespace")},
            {"name": "CNI_NET_DIR_ON_NODE", "value": net},
            {"name": "EXCLUDE_NAMESPACES", "value": excluded.join(",")},
            {"name": "NATIVE_NFTABLES", "value": (values.at(&["global", "nativeNftables"]) == true).to_string()},
        ],
        "readinessProbe": {
            "exec": {"command": ["/usr/local/bin/outrigger-proxy", "cni", "node", "ready"]},
            "initialDelaySeconds": 1,
            "periodSeconds": 5,
        },
        "resources": values.at(&["cni", "resources"]),
        // To enter the network of a pod that started too early, and to write to the node's folders.
        "securityContext": {
            "allowPrivilegeEscalation": true,
            "capabilities": {"add": ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE", "DAC_OVERRIDE"], "drop": ["ALL"]},
            "privileged": true,
            "readOnlyRootFilesystem": true,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "runAsUser": 0,
        },
        "volumeMounts": [
            {"name": "bin", "mountPath": "/host/opt/cni/bin"},
            {"name": "net", "mountPath": "/host/etc/cni/net.d"},
            {"name": "run", "mountPath": "/run"},
        ],
    });
    let policy = values.text(&["global", "imagePullPolicy"]);
    if !policy.is_empty() {
        container["imagePullPolicy"] = policy.into();
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": place.meta(NAME, NAME),
        "spec": {
            "selector": {"matchLabels": {"k8s-app": NAME}},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": labels, "annotations": {"sidecar.istio.io/inject": "false"}},
                "spec": {
                    "containers": [container],
                    "hostPID": true,
                    "imagePullSecrets": pull_secrets(values.at(&["global", "imagePullSecrets"])),
                    "nodeSelector": {"kubernetes.io/os": "linux"},
                    "priorityClassName": "system-node-critical",
                    "serviceAccountName": NAME,
                    "terminationGracePeriodSeconds": 5,
                    // A node must not take pods without it.
                    "tolerations": [
                        {"effect": "NoSchedule", "operator": "Exists"},
                        {"effect": "NoExecute", "operator": "Exists"},
                        {"key": "CriticalAddonsOnly", "operator": "Exists"},
                    ],
                    "volumes": [
                        {"name": "bin", "hostPath": {"path": bin, "type": "DirectoryOrCreate"}},
                        {"name": "net", "hostPath": {"path": net, "type": "DirectoryOrCreate"}},
                        // iptables wants a place for its lock.
                        {"name": "run", "emptyDir": {"medium": "Memory"}},
                    ],
                },
            },
        },
    })
}
