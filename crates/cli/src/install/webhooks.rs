//! The configurations by which the API server calls us. Their `caBundle` is written by the control plane.

use serde_json::{Value, json};

use super::manifests::Place;

/// The name of the configuration for pods.
pub(super) fn injector(place: &Place) -> String {
    let name = place.named("istio-sidecar-injector");
    match place.namespace.as_str() {
        "istio-system" => name,
        other => format!("{name}-{other}"),
    }
}

/// The name of the configuration for Istio's objects.
pub(super) fn validator(place: &Place) -> String {
    format!("istio-validator-{}-{}", place.revision, place.namespace)
}

/// Both configurations.
pub(super) fn all(place: &Place) -> Vec<Value> {
    vec![mutating(place), validating(place)]
}

fn mutating(place: &Place) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": injector(place), "labels": place.labels("sidecar-injector")},
        "webhooks": entries(place, &place.revision),
    })
}

/// The entries for pods that name `revision` (or a tag of it); `default` is also what pods mean that name none.
pub(super) fn entries(place: &Place, revision: &str) -> Vec<Value> {
    let rev = |operator: &str| match operator {
        "In" => json!({"key": "istio.io/rev", "operator": "In", "values": [revision]}),
        other => json!({"key": "istio.io/rev", "operator": other}),
    };
    let enabled = |operator: &str| match operator {
        "In" => json!({"key": "istio-injection", "operator": "In", "values": ["enabled"]}),
        other => json!({"key": "istio-injection", "operator": other}),
    };
    let not_false =
        json!({"key": "sidecar.istio.io/inject", "operator": "NotIn", "values": ["false"]});
    let is_true = json!({"key": "sidecar.istio.io/inject", "operator": "In", "values": ["true"]});
    let entry = |name: &str, mut namespace: Vec<Value>, object: Vec<Value>| {
        // No pod of the cluster's own ever waits for us.
        namespace.push(json!({
            "key": "kubernetes.io/metadata.name",
            "operator": "NotIn",
            "values": inject::decide::SYSTEM_NAMESPACES,
        }));
        json!({
            "name": name,
            "admissionReviewVersions": ["v1"],
            "clientConfig": {"service": service(place, "/inject")},
            "failurePolicy": "Fail",
            "matchPolicy": "Equivalent",
            "reinvocationPolicy": "Never",
            "sideEffects": "None",
            "timeoutSeconds": 10,
            "rules": [{
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                "resources": ["pods"], "scope": "Namespaced",
            }],
            "namespaceSelector": {"matchExpressions": namespace},
            "objectSelector": {"matchExpressions": object},
        })
    };
    let mut webhooks = vec![
        entry(
            "rev.namespace.sidecar-injector.istio.io",
            vec![rev("In"), enabled("DoesNotExist")],
            vec![not_false.clone()],
        ),
        entry(
            "rev.object.sidecar-injector.istio.io",
            vec![rev("DoesNotExist"), enabled("DoesNotExist")],
            vec![not_false.clone(), rev("In")],
        ),
    ];
    if revision == "default" {
        webhooks.push(entry(
            "namespace.sidecar-injector.istio.io",
            vec![enabled("In")],
            vec![not_false],
        ));
        webhooks.push(entry(
            "object.sidecar-injector.istio.io",
            vec![enabled("DoesNotExist"), rev("DoesNotExist")],
            vec![is_true, rev("DoesNotExist")],
        ));
    }
    webhooks
}

fn validating(place: &Place) -> Value {
    // The default revision also judges objects that name no revision.
    let revisions = match place.is_default() {
        true => json!([{"key": "istio.io/rev", "operator": "NotIn", "values": ["none"]}]),
        false => json!([{"key": "istio.io/rev", "operator": "In", "values": [place.revision]}]),
    };
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": validator(place), "labels": place.labels("istiod")},
        "webhooks": [{
            "name": "rev.validation.istio.io",
            "admissionReviewVersions": ["v1"],
            "clientConfig": {"service": service(place, "/validate")},
            "failurePolicy": "Fail",
            "matchPolicy": "Equivalent",
            "sideEffects": "None",
            "timeoutSeconds": 10,
            "rules": [{
                "apiGroups": [
                    "extensions.istio.io", "networking.istio.io", "security.istio.io", "telemetry.istio.io",
                ],
                "apiVersions": ["*"],
                "operations": ["CREATE", "UPDATE"],
                "resources": ["*"],
                "scope": "Namespaced",
            }],
            "namespaceSelector": {},
            "objectSelector": {"matchExpressions": revisions},
        }],
    })
}

fn service(place: &Place, path: &str) -> Value {
    json!({"name": place.named("istiod"), "namespace": place.namespace, "path": path, "port": 443})
}
