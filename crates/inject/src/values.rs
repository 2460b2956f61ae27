//! The values of an install: those of Istio's chart, as far as injection reads them.

use serde_json::{Value, json};

use crate::Error;

/// The values, defaults included. Read by dotted path.
#[derive(Clone, Debug)]
pub struct Values(Value);

impl Default for Values {
    fn default() -> Self {
        Values(defaults())
    }
}

impl Values {
    /// The user's values over the defaults, object by object. What would change a pod and is not built in is refused.
    pub fn new(user: &Value) -> Result<Values, Error> {
        let mut out = defaults();
        match user {
            Value::Null => {}
            Value::Object(_) => overlay(&mut out, user),
            _ => {
                return Err(Error::Invalid {
                    path: "values".into(),
                    why: "an object is expected: the values of the install".into(),
                });
            }
        }
        let out = Values(out);
        if let Some(Value::Object(own)) = out.at("sidecarInjectorWebhook.templates")
            && let Some(name) = own.keys().next()
        {
            return Err(Error::Invalid {
                path: format!("values: sidecarInjectorWebhook.templates.{name}"),
                why: format!(
                    "templates of one's own are not built in; the shipped ones are {}",
                    crate::template::NAMES.join(", ")
                ),
            });
        }
        Ok(out)
    }

    /// The value at a path such as `global.proxy.logLevel`, unless it is null.
    pub fn at(&self, path: &str) -> Option<&Value> {
        path.split('.')
            .try_fold(&self.0, |v, key| v.get(key))
            .filter(|v| !v.is_null())
    }

    /// The value as text; numbers and truth values too. Empty if it is not there.
    pub fn text(&self, path: &str) -> String {
        self.at(path).map(text).unwrap_or_default()
    }

    /// Whether the value is there and true in the sense of a template: not false, 0 or empty.
    pub fn is(&self, path: &str) -> bool {
        match self.at(path) {
            None => false,
            Some(Value::Bool(b)) => *b,
            Some(Value::Number(n)) => n.as_f64() != Some(0.0),
            Some(Value::String(s)) => !s.is_empty(),
            Some(Value::Array(a)) => !a.is_empty(),
            Some(Value::Object(o)) => !o.is_empty(),
            Some(Value::Null) => false,
        }
    }

    /// A list of texts; empty if it is not there.
    pub fn texts(&self, path: &str) -> Vec<String> {
        let list = self.at(path).and_then(Value::as_array);
        list.into_iter().flatten().map(text).collect()
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn overlay(base: &mut Value, user: &Value) {
    match (base, user) {
        (Value::Object(base), Value::Object(user)) => {
            for (key, value) in user {
                // What is given as a whole: merging would bring back limits that the user took out.
                if key == "resources" {
                    base.insert(key.clone(), value.clone());
                } else {
                    overlay(base.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (base, user) => *base = user.clone(),
    }
}

/// The defaults of the chart.
fn defaults() -> Value {
    json!({
        "gateways": {"securityContext": {}},
        "global": {
            "caAddress": "",
            "caName": "",
            "hub": "docker.io/istio",
            "imagePullPolicy": "",
            "imagePullSecrets": [],
            "istioNamespace": "istio-system",
            "logAsJson": false,
            "logging": {"level": "default:info"},
            "meshID": "",
            "mountMtlsCerts": false,
            "multiCluster": {"clusterName": ""},
            "nativeNftables": false,
            "network": "",
            "pilotCertProvider": "istiod",
            "proxy": {
                "clusterDomain": "cluster.local",
                "componentLogLevel": "misc:error",
                "excludeIPRanges": "",
                "excludeInboundPorts": "",
                "excludeOutboundPorts": "",
                "image": "proxyv2",
                "includeIPRanges": "*",
                "includeInboundPorts": "*",
                "includeOutboundPorts": "",
                "logLevel": "warning",
                "outlierLogPath": "",
                "privileged": false,
                "readinessFailureThreshold": 4,
                "readinessInitialDelaySeconds": 0,
                "readinessPeriodSeconds": 15,
                "resources": {
                    "limits": {"cpu": "2000m", "memory": "1024Mi"},
                    "requests": {"cpu": "100m", "memory": "128Mi"},
                },
                "seccompProfile": {},
                "startupProbe": {"enabled": true, "failureThreshold": 600},
                "statusPort": 15020,
                "tracer": "none",
            },
            "proxy_init": {"forceApplyIptables": false, "image": "proxyv2"},
            "sds": {"token": {"aud": "istio-ca"}},
            "sts": {"servicePort": 0},
            "tag": "1.30.0",
            "variant": "",
        },
        "pilot": {"cni": {"enabled": false, "provider": "default"}, "env": {}},
        "revision": "",
        "sidecarInjectorWebhook": {"rewriteAppHTTPProbe": true, "templates": {}},
    })
}
