//! What the control plane may do in the cluster: what it does, and nothing else.

use kubernetes::lease;
use serde_json::{Value, json};

use super::manifests::Place;

/// The account and its rights.
pub(super) fn control_plane(place: &Place) -> Vec<Value> {
    let account = place.named("istiod");
    let role = place.cluster_wide("istiod-clusterrole");
    let subjects =
        json!([{"kind": "ServiceAccount", "name": account, "namespace": place.namespace}]);
    let labels = place.labels("istiod");
    vec![
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": place.meta(&account, "istiod"),
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": role, "labels": labels},
            "rules": everywhere(place),
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": role, "labels": labels},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": subjects,
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": place.meta(&account, "istiod"),
            "rules": at_home(place),
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": place.meta(&account, "istiod"),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
            "subjects": subjects,
        }),
    ]
}

fn everywhere(place: &Place) -> Value {
    let read = json!(["get", "list", "watch"]);
    let istio = [
        "extensions.istio.io",
        "networking.istio.io",
        "security.istio.io",
        "telemetry.istio.io",
    ];
    let reports: Vec<String> = config::Kind::ALL
        .iter()
        .filter(|k| k.is_istio())
        .map(|k| format!("{}/status", kubernetes::resource::plural(*k)))
        .collect();
    let gateway_reports: Vec<String> = config::Kind::ALL
        .iter()
        .filter(|k| k.is_gateway_api())
        .map(|k| format!("{}/status", kubernetes::resource::plural(*k)))
        .collect();
    json!([
        // What proxies are told of. Secrets: the certificates of gateways, wherever those are.
        {"apiGroups": [""], "resources": ["namespaces", "nodes", "pods", "services", "secrets"], "verbs": read},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        {"apiGroups": istio, "resources": ["*"], "verbs": read},
        {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["*"], "verbs": read},
        // What managed Gateways are run by, in their namespaces (see `admission`), and the class that is ours.
        {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "create", "patch"]},
        {"apiGroups": [""], "resources": ["services", "serviceaccounts"], "verbs": ["get", "create", "patch"]},
        {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["gatewayclasses"],
         "resourceNames": [control::gateway_api::DEFAULT_CLASS], "verbs": ["create", "patch"]},
        {"apiGroups": ["gateway.networking.k8s.io"], "resources": gateway_reports, "verbs": ["patch", "update"]},
        // Reports below `status`.
        {"apiGroups": istio, "resources": reports, "verbs": ["patch", "update"]},
        // Settings, authorities of backends, and the mesh's roots, which are put in every namespace. What is applied
        // has a name when it is created, too.
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": read},
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [kubernetes::trust::CONFIG_MAP],
         "verbs": ["create", "patch"]},
        // The authority of our webhooks.
        {"apiGroups": ["admissionregistration.k8s.io"],
         "resources": ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
         "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["admissionregistration.k8s.io"],
         "resources": ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
         "resourceNames": [super::webhooks::injector(place), super::webhooks::validator(place)],
         "verbs": ["patch"]},
        // Whose a token is.
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
    ])
}

fn at_home(place: &Place) -> Value {
    let leases = [
        lease::NAMESPACES.to_owned(),
        kubernetes::of_revision(lease::STATUS, &place.revision),
        kubernetes::of_revision(lease::GATEWAYS, &place.revision),
    ];
    json!([
        // Which replica writes. `create` cannot be bound to names.
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
         "resourceNames": leases, "verbs": ["get", "update"]},
        // What the replicas tell the leader of proxies; an install puts it in.
        {"apiGroups": [""], "resources": ["configmaps"],
         "resourceNames": [kubernetes::of_revision(kubernetes::rejections::CONFIG_MAP, &place.revision)],
         "verbs": ["patch"]},
        // The authority's key, made by the first replica.
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["istio-ca-secret"], "verbs": ["get"]},
    ])
}
