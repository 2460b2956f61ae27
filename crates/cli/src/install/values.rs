//! Values of an install, in the form of Istio's charts: defaults, files, `--set`.

use std::{fs, path::PathBuf};

use anyhow::{Context, bail};
use serde_json::{Map, Value, json};

/// All values. Read by dotted path.
#[derive(Debug, Clone)]
pub(super) struct Values {
    all: Value,
    /// What differs from the defaults because somebody said so.
    given: Value,
}

impl Values {
    /// Defaults, then what a former install was given, then files, then single values.
    pub(super) fn read(former: Value, files: &[PathBuf], set: &[String]) -> anyhow::Result<Self> {
        let mut out = if former.is_object() {
            former
        } else {
            json!({})
        };
        for file in files {
            let name = file.display();
            let text = fs::read_to_string(file).with_context(|| name.to_string())?;
            let document = config::yaml::document(&text, 1)
                .map_err(|e| anyhow::anyhow!("{name}:{}: {}", e.line, e.message))?;
            let mut value = document.map_or(Value::Null, |d| d.value);
            // An IstioOperator holds values and mesh configuration below `spec`.
            if value["kind"] == "IstioOperator" {
                value = operator(value["spec"].take()).with_context(|| name.to_string())?;
            }
            merge(&mut out, value);
        }
        for one in set {
            let Some((path, text)) = one.split_once('=') else {
                bail!("--set {one}: give PATH=VALUE");
            };
            let path = path.strip_prefix("values.").unwrap_or(path);
            let mut value = scalar(text);
            for part in split(path).into_iter().rev() {
                if part.is_empty() {
                    bail!("--set {one}: a part of the path is empty");
                }
                value = Value::Object(Map::from_iter([(part, value)]));
            }
            merge(&mut out, value);
        }
        let mut all = defaults();
        merge(&mut all, out.clone());
        // Pods are then injected without an init container that needs rights.
        if all["cni"]["enabled"] == true && all["pilot"]["cni"]["enabled"].is_null() {
            merge(&mut all, json!({"pilot": {"cni": {"enabled": true}}}));
        }
        check(&all)?;
        Ok(Values { all, given: out })
    }

    /// The value at a path.
    pub(super) fn at(&self, path: &[&str]) -> &Value {
        path.iter().fold(&self.all, |v, key| &v[*key])
    }

    /// The text at a path, or empty.
    pub(super) fn text(&self, path: &[&str]) -> String {
        match self.at(path) {
            Value::String(s) => s.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        }
    }

    /// Everything, for the ConfigMap that injection reads.
    pub(super) fn all(&self) -> &Value {
        &self.all
    }

    /// What is not a default, for whoever changes this install later.
    pub(super) fn given(&self) -> &Value {
        &self.given
    }

    /// An image of ours.
    pub(super) fn image(&self, name: &str) -> String {
        format!(
            "{}/{name}:{}",
            self.text(&["global", "hub"]),
            self.text(&["global", "tag"])
        )
    }
}

impl Values {
    /// Whether the control plane answers on port 15010, without TLS, whoever asks.
    pub(super) fn plaintext_xds(&self) -> bool {
        self.at(&["pilot", "plaintextXds"]) == true
    }

    /// The image of proxies: a name beside ours, or a full reference.
    pub(super) fn proxy_image(&self) -> String {
        let name = self.text(&["global", "proxy", "image"]);
        match name.contains('/') {
            true => name,
            false => self.image(&name),
        }
    }
}

/// What counts where nothing is given.
pub(super) fn defaults() -> Value {
    json!({
        "global": {
            "hub": "outrigger.local",
            "tag": env!("CARGO_PKG_VERSION"),
            "imagePullPolicy": "",
            "imagePullSecrets": [],
            "proxy": {"image": "outrigger-proxy"},
            "proxy_init": {"image": "outrigger-proxy"},
        },
        "pilot": {
            "image": "outrigger",
            "replicaCount": 1,
            "resources": {"requests": {"cpu": "500m", "memory": "2048Mi"}},
            "env": {},
            "plaintextXds": false,
            "podAnnotations": {},
            "nodeSelector": {},
            "tolerations": [],
        },
        "gateways": {
            "istio-ingressgateway": {
                "enabled": true,
                "replicaCount": 1,
                "type": "LoadBalancer",
                "resources": {
                    "requests": {"cpu": "100m", "memory": "128Mi"},
                    "limits": {"cpu": "2000m", "memory": "1024Mi"},
                },
            },
        },
        "cni": {
            "enabled": false,
            "cniBinDir": "/opt/cni/bin",
            "cniConfDir": "/etc/cni/net.d",
            "excludeNamespaces": ["kube-system"],
            "resources": {"requests": {"cpu": "100m", "memory": "100Mi"}},
        },
        "meshConfig": {},
        // `istioctl analyze` reads it, and ends where it is not there.
        "sidecarInjectorWebhook": {"enableNamespacesByDefault": false},
    })
}

/// What is read here; the rest of the tree is read by injection, which has rules of its own.
fn check(values: &Value) -> anyhow::Result<()> {
    let known = [
        "cni",
        "global",
        "pilot",
        "gateways",
        "meshConfig",
        "meshNetworks",
        "sidecarInjectorWebhook",
        "revision",
    ];
    for (key, value) in values.as_object().into_iter().flatten() {
        if !known.contains(&key.as_str()) {
            bail!(
                "value {key}: not known here; known are {}",
                known.join(", ")
            );
        }
        if key == "cni" {
            let cni = [
                "cniBinDir",
                "cniConfDir",
                "enabled",
                "excludeNamespaces",
                "resources",
            ];
            only("cni", value, &cni)?;
        }
        if key == "pilot" {
            let pilot = [
                "cni",
                "env",
                "image",
                "nodeSelector",
                "plaintextXds",
                "podAnnotations",
                "replicaCount",
                "resources",
                "tolerations",
            ];
            only("pilot", value, &pilot)?;
        }
    }
    plaintext(values)?;
    if values["sidecarInjectorWebhook"]["enableNamespacesByDefault"] == true {
        bail!(
            "value sidecarInjectorWebhook.enableNamespacesByDefault: only namespaces with a label are injected; leave it out"
        );
    }
    inject::Values::new(values).map_err(|e| anyhow::anyhow!("{e}"))?;
    config::mesh::merge(&values["meshConfig"]).map_err(|e| anyhow::anyhow!("meshConfig.{e}"))?;
    Ok(())
}

/// A mesh whose proxies are sent to a port that is closed would come up without one of them.
fn plaintext(values: &Value) -> anyhow::Result<()> {
    let Some(open) = values["pilot"]["plaintextXds"].as_bool() else {
        bail!("value pilot.plaintextXds: it is true or false");
    };
    let address = &values["meshConfig"]["defaultConfig"]["discoveryAddress"];
    let address = address.as_str().unwrap_or_default();
    let ours = address.starts_with("istiod.") || address.starts_with("istiod-");
    if !open && ours && address.ends_with(":15010") {
        bail!(
            "value meshConfig.defaultConfig.discoveryAddress: {address} is closed unless pilot.plaintextXds is true; \
             leave it out, and proxies use port 15012"
        );
    }
    Ok(())
}

/// Refuses keys that are not known.
fn only(of: &str, value: &Value, known: &[&str]) -> anyhow::Result<()> {
    for name in value.as_object().into_iter().flatten().map(|(k, _)| k) {
        if !known.contains(&name.as_str()) {
            bail!(
                "value {of}.{name}: not known here; known are {}",
                known.join(", ")
            );
        }
    }
    Ok(())
}

/// The parts of an IstioOperator that are values.
fn operator(mut spec: Value) -> anyhow::Result<Value> {
    let mut out = spec["values"].take();
    if !out.is_object() {
        out = json!({});
    }
    for (key, value) in spec.as_object_mut().into_iter().flatten() {
        match key.as_str() {
            "values" | "profile" => {}
            "meshConfig" => out["meshConfig"] = value.take(),
            "hub" | "tag" => out["global"][key.as_str()] = value.take(),
            "revision" => out["revision"] = value.take(),
            other => bail!("spec.{other}: not read; give it as values"),
        }
    }
    Ok(out)
}

fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (base, over) => *base = over,
    }
}

/// Helm's rule: numbers and truth values are such, everything else is text.
fn scalar(text: &str) -> Value {
    match text {
        "true" => true.into(),
        "false" => false.into(),
        "null" => Value::Null,
        text => text
            .parse::<i64>()
            .map_or_else(|_| text.into(), Value::from),
    }
}

/// The parts of a path; a dot after a backslash is part of a name.
fn split(path: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match (c, out.last_mut()) {
            ('\\', Some(last)) => last.extend(chars.next()),
            ('.', _) => out.push(String::new()),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_values_win_and_unknown_ones_are_named() {
        let set = [
            "values.global.hub=example.test/mesh",
            "pilot.replicaCount=2",
            "meshConfig.enableAutoMtls=false",
        ];
        let values = Values::read(Value::Null, &[], &set.map(str::to_owned)).unwrap();
        assert_eq!(
            values.image("outrigger"),
            format!("example.test/mesh/outrigger:{}", env!("CARGO_PKG_VERSION"))
        );
        assert_eq!(values.at(&["pilot", "replicaCount"]), 2);
        assert_eq!(values.at(&["meshConfig", "enableAutoMtls"]), false);
        let wrong = Values::read(Value::Null, &[], &["pilot.replicas=2".to_owned()]).unwrap_err();
        assert!(wrong.to_string().contains("pilot.replicas"), "{wrong}");
        let all = ["sidecarInjectorWebhook.enableNamespacesByDefault=true".to_owned()];
        let wrong = Values::read(Value::Null, &[], &all).unwrap_err();
        assert!(
            wrong.to_string().contains("only namespaces with a label"),
            "{wrong}"
        );
        let none = ["pilot.plaintextXds=yes".to_owned()];
        let wrong = Values::read(Value::Null, &[], &none).unwrap_err();
        assert!(wrong.to_string().contains("true or false"), "{wrong}");
        assert_eq!(split(r"a.b\.c/d.e"), ["a", "b.c/d", "e"]);
    }
    #[test]
    fn proxies_are_not_sent_to_a_port_that_is_closed() {
        let read = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
            Values::read(Value::Null, &[], &set)
        };
        let address = "meshConfig.defaultConfig.discoveryAddress=istiod.istio-system.svc:15010";
        let wrong = read(&[address]).unwrap_err().to_string();
        assert!(wrong.contains("discoveryAddress"), "{wrong}");
        assert!(wrong.contains("pilot.plaintextXds"), "{wrong}");
        assert!(
            read(&[address, "pilot.plaintextXds=true"])
                .unwrap()
                .plaintext_xds()
        );
        // Another control plane has ports of its own.
        let elsewhere = "meshConfig.defaultConfig.discoveryAddress=control.example:15010";
        assert!(!read(&[elsewhere]).unwrap().plaintext_xds());
    }
}
