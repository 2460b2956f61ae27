//! The control plane itself: its settings, its pods and how they are reached.

use serde_json::{Value, json};

use super::manifests::{Place, security_context};

/// Where proxies are told without TLS what they are to do. Whoever gets there may ask as anybody, so it is closed unless
/// value `pilot.plaintextXds` opens it.
const PLAINTEXT: u16 = 15010;

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
    let mut ports = vec![
        json!({"name": "https-dns", "port": 15012, "protocol": "TCP"}),
        json!({"name": "https-webhook", "port": 443, "targetPort": 15017, "protocol": "TCP"}),
        json!({"name": "http-monitoring", "port": 15014, "protocol": "TCP"}),
    ];
    let mut reached = vec![15012, 15014, 15017, 8080];
    if place.values.plaintext_xds() {
        ports.insert(
            0,
            json!({"name": "grpc-xds", "port": PLAINTEXT, "protocol": "TCP"}),
        );
        reached.insert(0, PLAINTEXT);
    }
    let reached: Vec<Value> = reached
        .into_iter()
        .map(|port| json!({"port": port, "protocol": "TCP"}))
        .collect();
    vec![
        deployment(place, &name, &selector),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": place.meta(&name, "istiod"),
            "spec": {"selector": selector, "ports": ports},
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
                "ingress": [{"ports": reached}],
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
    let mut ports = vec![
        json!({"name": "http-ready", "containerPort": 8080, "protocol": "TCP"}),
        json!({"name": "tls-xds", "containerPort": 15012, "protocol": "TCP"}),
        json!({"name": "https-webhooks", "containerPort": 15017, "protocol": "TCP"}),
        json!({"name": "http-monitoring", "containerPort": 15014, "protocol": "TCP"}),
    ];
    // Said in both cases: without the flag the program opens the port.
    let mut plaintext = "--grpcAddr=".to_owned();
    if values.plaintext_xds() {
        plaintext += &format!(":{PLAINTEXT}");
        ports.insert(
            1,
            json!({"name": "grpc-xds", "containerPort": PLAINTEXT, "protocol": "TCP"}),
        );
    }
    let mut container = json!({
        "name": "discovery",
        "image": values.image(&values.text(&["pilot", "image"])),
        "args": [
            "control", plaintext, "--secureGRPCAddr=:15012", "--httpsAddr=:15017",
            "--monitoringAddr=:15014", "--httpAddr=:8080", "--stateDir=/var/lib/outrigger",
        ],
        "env": environment,
        "ports": ports,
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

#[cfg(test)]
mod tests {
    use super::{super::values::Values, *};

    fn objects(set: &[&str]) -> Vec<Value> {
        let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        workload(&Place {
            namespace: "istio-system".into(),
            revision: "default".into(),
            values: Values::read(Value::Null, &[], &set).unwrap(),
        })
    }

    /// The ports that an object of that kind speaks of.
    fn ports(objects: &[Value], kind: &str) -> Vec<u64> {
        let object = objects.iter().find(|o| o["kind"] == kind).unwrap();
        let list = match kind {
            "Deployment" => &object["spec"]["template"]["spec"]["containers"][0]["ports"],
            "Service" => &object["spec"]["ports"],
            _ => &object["spec"]["ingress"][0]["ports"],
        };
        let of = |p: &Value| p["port"].as_u64().or(p["containerPort"].as_u64());
        list.as_array().unwrap().iter().filter_map(of).collect()
    }

    #[test]
    fn nobody_is_answered_without_tls_unless_a_value_says_so() {
        let args = |objects: &[Value]| {
            let container = &objects[0]["spec"]["template"]["spec"]["containers"][0];
            container["args"].as_array().unwrap().clone()
        };
        let closed = objects(&[]);
        // An empty address turns a server off; without the flag the program would open it.
        assert!(args(&closed).contains(&"--grpcAddr=".into()));
        assert!(args(&closed).contains(&"--secureGRPCAddr=:15012".into()));
        assert_eq!(ports(&closed, "Service"), [15012, 443, 15014]);
        assert_eq!(ports(&closed, "Deployment"), [8080, 15012, 15017, 15014]);
        assert_eq!(ports(&closed, "NetworkPolicy"), [15012, 15014, 15017, 8080]);

        let open = objects(&["pilot.plaintextXds=true"]);
        assert!(args(&open).contains(&"--grpcAddr=:15010".into()));
        assert_eq!(ports(&open, "Service"), [15010, 15012, 443, 15014]);
        assert_eq!(
            ports(&open, "Deployment"),
            [8080, 15010, 15012, 15017, 15014]
        );
        assert_eq!(
            ports(&open, "NetworkPolicy"),
            [15010, 15012, 15014, 15017, 8080]
        );
    }
}
