//! The ingress gateway: a Deployment whose proxy the webhook fills in.

use serde_json::{Value, json};

use super::{
    control_plane::pull_secrets,
    manifests::{Place, security_context},
};

const NAME: &str = "istio-ingressgateway";

/// Everything of the gateway, unless the values turn it off.
pub(super) fn all(place: &Place) -> Vec<Value> {
    let values = place.values.at(&["gateways", NAME]);
    if values["enabled"] == false || !place.is_default() {
        return Vec::new();
    }
    let account = format!("{NAME}-service-account");
    let selector = json!({"app": NAME, "istio": "ingressgateway"});
    let meta = |name: &str| {
        let mut meta = place.meta(name, NAME);
        meta["labels"]["istio"] = "ingressgateway".into();
        meta
    };
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta(&account)}),
        deployment(place, values, &account, &selector, meta(NAME)),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta(NAME),
            "spec": {
                "type": values["type"],
                "selector": selector,
                "ports": [
                    {"name": "status-port", "port": 15021, "targetPort": 15021, "protocol": "TCP"},
                    {"name": "http2", "port": 80, "targetPort": 8080, "protocol": "TCP"},
                    {"name": "https", "port": 443, "targetPort": 8443, "protocol": "TCP"},
                ],
            },
        }),
        json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": meta(NAME),
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
        }),
    ]
}

fn deployment(
    place: &Place,
    values: &Value,
    account: &str,
    selector: &Value,
    meta: Value,
) -> Value {
    let labels = json!({
        "app": NAME,
        "istio": "ingressgateway",
        "istio.io/rev": place.revision,
        "sidecar.istio.io/inject": "true",
        "service.istio.io/canonical-name": NAME,
        "service.istio.io/canonical-revision": "latest",
    });
    // Left out, Kubernetes would read the `auto` that stands in for an image as one to be pulled always.
    let pull = match place.values.text(&["global", "imagePullPolicy"]) {
        given if given.is_empty() => "IfNotPresent".to_owned(),
        given => given,
    };
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": values["replicaCount"],
            "selector": {"matchLabels": selector},
            "strategy": {"rollingUpdate": {"maxSurge": "100%", "maxUnavailable": "25%"}},
            "template": {
                "metadata": {
                    "labels": labels,
                    // The image is named so that another one rolls the gateway out.
                    "annotations": {"inject.istio.io/templates": "gateway", "prometheus.io/port": "15020",
                        "prometheus.io/scrape": "true", "prometheus.io/path": "/stats/prometheus",
                        "sidecar.istio.io/proxyImage": place.values.proxy_image()},
                },
                "spec": {
                    "containers": [{
                        "name": "istio-proxy",
                        "image": "auto",
                        "imagePullPolicy": pull,
                        "resources": values["resources"],
                        "securityContext": security_context(),
                        "ports": [
                            {"containerPort": 15021, "protocol": "TCP"},
                            {"containerPort": 8080, "protocol": "TCP"},
                            {"containerPort": 8443, "protocol": "TCP"},
                            {"containerPort": 15090, "protocol": "TCP", "name": "http-envoy-prom"},
                        ],
                    }],
                    "imagePullSecrets": pull_secrets(place.values.at(&["global", "imagePullSecrets"])),
                    "securityContext": {"runAsUser": 1337, "runAsGroup": 1337, "runAsNonRoot": true},
                    "serviceAccountName": account,
                },
            },
        },
    })
}
