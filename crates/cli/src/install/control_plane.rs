//! The control plane itself: its settings, its pods and how they are reached.

use serde_json::{Value, json};

use super::manifests::{Place, security_context};

/// The ConfigMaps that it reads, and the one by which its replicas tell each other of proxies.
pub(super) fn settings(place: &Place) -> Vec<Value> {
    let service = format!("{}.{}.svc", place.named("istiod"), place.namespace);
    let mut mesh = json!({
        "rootNamespace": place.namespace,
        "trustDomain": "cluster.local",
        "defaultConfig": {"discoveryAddress": format!("{service}:15012")},
        "enablePrometheusMerge": true,
    });
    merge(&mut mesh, place.values.at(&["meshConfig"]));
    let networks = match place.values.at(&["meshNetworks"]) {
        Value::Null => json!({}),
        networks => json!({"networks": networks}),
    };
    let mut values = place.values.all().clone();
    values["global"]["istioNamespace"] = place.namespace.as_str().into();
    values["revision"] = match place.is_default() {
        true => "".into(),
        false => place.revision.as_str().into(),
    };
    if values["global"]["caAddress"].is_null() {
        values["global"]["caAddress"] = format!("{service}:15012").into();
    }
    // The control plane's own part of the values is of no use to injection.
    if let Some(values) = values.as_object_mut() {
        values.remove("gateways");
        values.remove("cni");
    }
    vec![
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": place.meta(&place.named("istio"), "istiod"),
            "data": {
                "mesh": inject::yaml::print(&mesh),
                "meshNetworks": inject::yaml::print(&networks),
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": place.meta(&place.named("istio-sidecar-injector"), "sidecar-injector"),
            "data": {
                "config": "policy: enabled\n",
                "values": format!("{:#}\n", values),
                // What an upgrade starts from.
                "original-values": format!("{:#}\n", place.values.given()),
            },
        }),
        // Without data: what the replicas put there is none of the install's.
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": place.meta(&place.named(kubernetes::rejections::CONFIG_MAP), "istiod"),
        }),
    ]
}

/// Deployment, Service, disruption budget and network policy.
pub(super) fn workload(place: &Place) -> Vec<Value> {
    let name = place.named("istiod");
    let selector = json!({"app": "istiod", "istio.io/rev": place.revision});
    vec![
        deployment(place, &name, &selector),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": place.meta(&name, "istiod"),
            "spec": {
                "selector": selector,
                "ports": [
                    {"name": "grpc-xds", "port": 15010, "protocol": "TCP"},
                    {"name": "https-dns", "port": 15012, "protocol": "TCP"},
                    {"name": "https-webhook", "port": 443, "targetPort": 15017, "protocol": "TCP"},
                    {"name": "http-monitoring", "port": 15014, "protocol": "TCP"},
                ],
            },
        }),
        json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": place.meta(&name, "istiod"),
            // With a single replica a budget of one would keep its node from ever being drained.
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
        }),
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": place.meta(&name, "istiod"),
            "spec": {
                "podSelector": {"matchLabels": selector},
                "policyTypes": ["Ingress"],
                "ingress": [{"ports": [
                    {"port": 15010, "protocol": "TCP"},
                    {"port": 15012, "protocol": "TCP"},
                    {"port": 15014, "protocol": "TCP"},
                    {"port": 15017, "protocol": "TCP"},
                    {"port": 8080, "protocol": "TCP"},
                ]}],
            },
        }),
    ]
}

fn deployment(place: &Place, name: &str, selector: &Value) -> Value {
    let values = &place.values;
    let mut labels = place.labels("istiod");
    merge(
        &mut labels,
        &json!({"istio": "pilot", "sidecar.istio.io/inject": "false", "istio.io/dataplane-mode": "none"}),
    );
    let mut environment = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        json!({"name": "REVISION", "value": place.revision}),
    ];
    for (name, value) in values
        .at(&["pilot", "env"])
        .as_object()
        .into_iter()
        .flatten()
    {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        environment.push(json!({"name": name, "value": text}));
    }
    let mut container = json!({
        "name": "discovery",
        "image": values.image(&values.text(&["pilot", "image"])),
        "args": [
            "control", "--grpcAddr=:15010", "--secureGRPCAddr=:15012", "--httpsAddr=:15017",
            "--monitoringAddr=:15014", "--httpAddr=:8080", "--stateDir=/var/lib/outrigger",
        ],
        "env": environment,
        "ports": [
            {"name": "http-ready", "containerPort": 8080, "protocol": "TCP"},
            {"name": "grpc-xds", "containerPort": 15010, "protocol": "TCP"},
            {"name": "tls-xds", "containerPort": 15012, "protocol": "TCP"},
            {"name": "https-webhooks", "containerPort": 15017, "protocol": "TCP"},
            {"name": "http-monitoring", "containerPort": 15014, "protocol": "TCP"},
        ],
        "readinessProbe": {
            "httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTP"},
            "initialDelaySeconds": 1,
            "periodSeconds": 3,
            "timeoutSeconds": 5,
        },
        "resources": values.at(&["pilot", "resources"]),
        "securityContext": security_context(),
        "volumeMounts": [
            {"name": "state", "mountPath": "/var/lib/outrigger"},
            {"name": "cacerts", "mountPath": "/etc/cacerts", "readOnly": true},
        ],
    });
    let policy = values.text(&["global", "imagePullPolicy"]);
    if !policy.is_empty() {
        container["imagePullPolicy"] = policy.into();
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": place.meta(name, "istiod"),
        "spec": {
            "replicas": values.at(&["pilot", "replicaCount"]),
            "selector": {"matchLabels": selector},
            "strategy": {"rollingUpdate": {"maxSurge": "100%", "maxUnavailable": "25%"}},
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": with(
                        json!({"prometheus.io/port": "15014", "prometheus.io/scrape": "true"}),
                        values.at(&["pilot", "podAnnotations"]),
                    ),
                },
                "spec": {
                    "containers": [container],
                    "imagePullSecrets": pull_secrets(values.at(&["global", "imagePullSecrets"])),
                    "nodeSelector": values.at(&["pilot", "nodeSelector"]),
                    "securityContext": {"fsGroup": 1337},
                    "serviceAccountName": name,
                    "tolerations": values.at(&["pilot", "tolerations"]),
                    "volumes": [
                        {"name": "state", "emptyDir": {"medium": "Memory"}},
                        {"name": "cacerts", "secret": {"secretName": "cacerts", "optional": true}},
                    ],
                },
            },
        },
    })
}

fn field(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}})
}

/// Names of Secrets, as a pod lists them.
pub(super) fn pull_secrets(names: &Value) -> Value {
    let names = names.as_array().into_iter().flatten();
    names.map(|n| json!({"name": n})).collect()
}

fn with(mut base: Value, over: &Value) -> Value {
    merge(&mut base, over);
    base
}

fn merge(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (base, over) => *base = over.clone(),
    }
}
