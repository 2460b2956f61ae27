//! Environment variables: `value` with `$(VAR)`, `valueFrom` and `envFrom`, as the kubelet makes them.

use std::collections::HashMap;

use serde_json::Value;

use super::quantity;
use crate::objects::{Key, at, list, text};

/// What variables and volumes may refer to.
#[derive(Debug)]
pub(crate) struct References<'a> {
    /// The Pod, its status with podIP and hostIP included.
    pub(crate) pod: &'a Value,
    pub(crate) config_maps: &'a HashMap<Key, Value>,
    pub(crate) secrets: &'a HashMap<Key, Value>,
    /// What peers in the mesh are trusted by, PEM; none before the control plane has made it.
    pub(crate) roots: Option<&'a str>,
}

impl References<'_> {
    pub(crate) fn namespace(&self) -> &str {
        text(self.pod, &["metadata", "namespace"])
    }

    /// The entries of a ConfigMap, `None` where there is none.
    pub(crate) fn config_map(&self, name: &str) -> Option<Vec<(String, Vec<u8>)>> {
        let map = self
            .config_maps
            .get(&(self.namespace().to_owned(), name.to_owned()))?;
        let mut out = entries(&map["data"], |text| Some(text.as_bytes().to_vec()));
        out.extend(entries(&map["binaryData"], decode_base64));
        Some(out)
    }

    /// The entries of a Secret, decoded; `None` where there is none.
    pub(crate) fn secret(&self, name: &str) -> Option<Vec<(String, Vec<u8>)>> {
        let secret = self
            .secrets
            .get(&(self.namespace().to_owned(), name.to_owned()))?;
        let mut out = entries(&secret["data"], decode_base64);
        out.extend(entries(&secret["stringData"], |text| {
            Some(text.as_bytes().to_vec())
        }));
        Some(out)
    }

    /// The text of a field of the pod, as the downward API gives it.
    pub(crate) fn field(&self, path: &str) -> Result<String, String> {
        if let Some((path, key)) = path.strip_suffix("']").and_then(|p| p.split_once("['")) {
            let map = match path {
                "metadata.labels" => at(self.pod, &["metadata", "labels"]),
                "metadata.annotations" => at(self.pod, &["metadata", "annotations"]),
                _ => {
                    return Err(format!(
                        "`{path}` has no keys: write metadata.labels['k'] or metadata.annotations['k']"
                    ));
                }
            };
            return Ok(map[key].as_str().unwrap_or("").to_owned());
        }
        Ok(match path {
            "metadata.name"
            | "metadata.namespace"
            | "metadata.uid"
            | "spec.nodeName"
            | "spec.serviceAccountName"
            | "status.podIP"
            | "status.hostIP" => {
                let parts: Vec<_> = path.split('.').collect();
                text(self.pod, &parts).to_owned()
            }
            "status.podIPs" => text(self.pod, &["status", "podIP"]).to_owned(),
            "status.hostIPs" => text(self.pod, &["status", "hostIP"]).to_owned(),
            "metadata.labels" => lines(at(self.pod, &["metadata", "labels"])),
            "metadata.annotations" => lines(at(self.pod, &["metadata", "annotations"])),
            other => {
                return Err(format!(
                    "fieldPath {other:?} is not one of the downward API"
                ));
            }
        })
    }

    /// A limit or request of a container (`None`: of the node where there is no limit).
    pub(crate) fn resource(
        &self,
        container: &Value,
        resource: &str,
        divisor: &str,
    ) -> Result<String, String> {
        let bad = || {
            format!(
                "resourceFieldRef: {resource:?} is not limits.* or requests.* of cpu, memory or ephemeral-storage"
            )
        };
        let (class, name) = resource.split_once('.').ok_or_else(bad)?;
        if !matches!(class, "limits" | "requests") {
            return Err(bad());
        }
        let given = match &container["resources"][class][name] {
            Value::String(s) => s.clone(),
            Value::Number(n) => n.to_string(),
            // A limit that is not set is the node's; a request is the limit, or nothing.
            _ if class == "requests" => "0".to_owned(),
            _ => match name {
                "cpu" => std::thread::available_parallelism()
                    .map_or(1, usize::from)
                    .to_string(),
                "memory" => format!("{}Ki", node_memory_kib()),
                "ephemeral-storage" => "0".to_owned(),
                _ => return Err(bad()),
            },
        };
        quantity::divided(&given, divisor)
            .map(|n| n.to_string())
            .ok_or_else(|| format!("resources.{class}.{name}: {given:?} is not a quantity"))
    }
}

/// `key="value"` lines, escaped, in order: the form of downward API files.
fn lines(map: &Value) -> String {
    let mut lines: Vec<String> = map
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={:?}", v.as_str().unwrap_or("")))
        .collect();
    lines.sort();
    lines.join("\n")
}

fn entries(map: &Value, decode: impl Fn(&str) -> Option<Vec<u8>>) -> Vec<(String, Vec<u8>)> {
    map.as_object()
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), decode(v.as_str()?)?)))
        .collect()
}

/// Standard base64, white space allowed; `None` where it is not.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for c in text
        .bytes()
        .filter(|c| !c.is_ascii_whitespace() && *c != b'=')
    {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

fn node_memory_kib() -> u64 {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|t| t.lines().next()?.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// The variables of a container, in order, after those of its image.
pub(crate) fn variables(
    container: &Value,
    image: &[(String, String)],
    refs: &References<'_>,
) -> Result<Vec<(String, String)>, String> {
    let mut out: Vec<(String, String)> = vec![
        ("PATH".to_owned(), super::run::DEFAULT_PATH.to_owned()),
        ("HOSTNAME".to_owned(), hostname(refs.pod).to_owned()),
        ("HOME".to_owned(), "/".to_owned()),
    ];
    for (name, value) in image {
        set(&mut out, name, value.clone());
    }
    for (i, source) in list(container, &["envFrom"]).iter().enumerate() {
        let (found, kind, name) = if source["secretRef"].is_object() {
            let name = text(source, &["secretRef", "name"]);
            (refs.secret(name), "secretRef", name)
        } else {
            let name = text(source, &["configMapRef", "name"]);
            (refs.config_map(name), "configMapRef", name)
        };
        match found {
            Some(entries) => {
                for (key, value) in entries {
                    let name = format!("{}{key}", text(source, &["prefix"]));
                    set(
                        &mut out,
                        &name,
                        String::from_utf8_lossy(&value).into_owned(),
                    );
                }
            }
            None if source[kind]["optional"] == Value::Bool(true) => {}
            None => {
                return Err(format!(
                    "envFrom[{i}].{kind}: there is no {name:?} in {}",
                    refs.namespace()
                ));
            }
        }
    }
    for (i, variable) in list(container, &["env"]).iter().enumerate() {
        let name = text(variable, &["name"]);
        if name.is_empty() {
            return Err(format!("env[{i}].name is missing"));
        }
        let value = if variable["valueFrom"].is_object() {
            match from_source(container, &variable["valueFrom"], refs)
                .map_err(|e| format!("env {name}: {e}"))?
            {
                Some(value) => value,
                None => continue,
            }
        } else {
            let written = match &variable["value"] {
                Value::String(s) => s.clone(),
                Value::Null => String::new(),
                other => return Err(format!("env {name}: {other} is not text: put it in quotes")),
            };
            expand(&written, &out)
        };
        set(&mut out, name, value);
    }
    Ok(out)
}

fn from_source(
    container: &Value,
    source: &Value,
    refs: &References<'_>,
) -> Result<Option<String>, String> {
    if source["fieldRef"].is_object() {
        return refs
            .field(text(source, &["fieldRef", "fieldPath"]))
            .map(Some);
    }
    if let Some(r) = source["resourceFieldRef"].as_object() {
        let field = |k: &str| match r.get(k) {
            Some(Value::String(s)) => s.clone(),
            Some(Value::Number(n)) => n.to_string(),
            _ => String::new(),
        };
        return refs
            .resource(container, &field("resource"), &field("divisor"))
            .map(Some);
    }
    for (kind, what) in [("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")] {
        let r = &source[kind];
        if !r.is_object() {
            continue;
        }
        let (name, key) = (text(r, &["name"]), text(r, &["key"]));
        let found = if what == "Secret" {
            refs.secret(name)
        } else {
            refs.config_map(name)
        };
        let value = found.and_then(|entries| entries.into_iter().find(|(k, _)| k == key));
        return match value {
            Some((_, value)) => Ok(Some(String::from_utf8_lossy(&value).into_owned())),
            None if r["optional"] == Value::Bool(true) => Ok(None),
            None => Err(format!(
                "there is no key {key:?} in {what} {}/{name}",
                refs.namespace()
            )),
        };
    }
    Err("valueFrom needs fieldRef, resourceFieldRef, configMapKeyRef or secretKeyRef".to_owned())
}

fn set(out: &mut Vec<(String, String)>, name: &str, value: String) {
    match out.iter_mut().find(|(n, _)| n == name) {
        Some((_, old)) => *old = value,
        None => out.push((name.to_owned(), value)),
    }
}

/// Replaces `$(NAME)` where the variable is known; `$$` is one dollar sign.
pub(crate) fn expand(text: &str, variables: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match variables.iter().find(|(n, _)| n == name) {
                Some((_, value)) => out.push_str(value),
                // An unknown name stays as it is written.
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// The host name of a pod.
pub(crate) fn hostname(pod: &Value) -> &str {
    match text(pod, &["spec", "hostname"]) {
        "" => text(pod, &["metadata", "name"]),
        name => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn variables_of(container: Value) -> Result<HashMap<String, String>, String> {
        let pod = json!({"metadata": {"name": "web", "namespace": "a", "uid": "u", "labels": {"app": "web", "b": "x\"y"}},
            "spec": {"nodeName": "local", "serviceAccountName": "sa"}, "status": {"podIP": "10.244.0.5", "hostIP": "10.244.0.1"}});
        let maps = HashMap::from([(("a".into(), "m".into()), json!({"data": {"k": "v"}}))]);
        let secrets = HashMap::from([(("a".into(), "s".into()), json!({"data": {"p": "aGk="}}))]);
        let refs = References {
            pod: &pod,
            config_maps: &maps,
            secrets: &secrets,
            roots: None,
        };
        variables(
            &container,
            &[("COLOR".to_owned(), "black".to_owned())],
            &refs,
        )
        .map(|v| v.into_iter().collect())
    }

    #[test]
    fn every_source_gives_its_value() {
        let env = variables_of(json!({
            "resources": {"limits": {"cpu": "1500m"}},
            "envFrom": [{"configMapRef": {"name": "m"}, "prefix": "P_"}],
            "env": [
                {"name": "NS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1"}}},
                {"name": "K", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}},
                {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "p"}}},
                {"name": "O", "valueFrom": {"secretKeyRef": {"name": "x", "key": "p", "optional": true}}},
                {"name": "HOST", "value": "$(APP).$(NS).svc $$(NS) $(NOPE) $x"},
            ]
        }))
        .unwrap();
        for (name, value) in [
            ("NS", "a"),
            ("IP", "10.244.0.5"),
            ("APP", "web"),
            ("CPU", "2"),
            ("K", "v"),
            ("S", "hi"),
            ("P_k", "v"),
            ("COLOR", "black"),
            ("HOST", "web.a.svc $(NS) $(NOPE) $x"),
            ("HOSTNAME", "web"),
        ] {
            assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!env.contains_key("O"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let e = variables_of(
            json!({"env": [{"name": "K", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "z"}}}]}),
        );
        assert!(e.unwrap_err().contains("no key \"z\" in ConfigMap a/m"));
        let e = variables_of(
            json!({"env": [{"name": "K", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}]}),
        );
        assert!(e.unwrap_err().contains("spec.x"));
        let e = variables_of(json!({"env": [{"name": "K", "value": 1}]}));
        assert!(e.unwrap_err().contains("quotes"));
    }
}
