//! The merge of metrics: Prometheus scrapes the agent, and the agent scrapes the app and the proxy.
//!
//! The annotations by which the user told Prometheus where the app's metrics are go to the agent as JSON in
//! `ISTIO_PROMETHEUS_ANNOTATIONS`, and new ones name the agent instead.

use serde_json::{Map, Value, json};

use crate::{Error, annotations, schema};

/// The agent's variable with the user's annotations.
pub const VARIABLE: &str = "ISTIO_PROMETHEUS_ANNOTATIONS";

/// Points the annotations of a pod to the agent at `agent_port`; what the user had said comes back for the agent.
/// Nothing is done if the user, or the mesh (`merge`), does not want it, or if it was done before.
pub fn merge(
    metadata: &mut Map<String, Value>,
    merge: bool,
    agent_port: i64,
) -> Result<Option<String>, Error> {
    let given = metadata
        .get("annotations")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    let find = |name: &str| -> Option<String> {
        let (_, value) = given.iter().find(|(key, _)| plain(key) == name)?;
        value.as_str().map(String::from)
    };
    let refused = find(SCRAPE).is_some_and(|v| annotations::truth(&v) == Ok(false));
    let switch = given
        .get("prometheus.istio.io/merge-metrics")
        .and_then(Value::as_str);
    let wanted = match switch.map(annotations::truth) {
        Some(Ok(wanted)) => wanted,
        _ => merge,
    };
    if refused || !wanted || find(PORT) == Some(agent_port.to_string()) {
        return Ok(None);
    }
    let mut targets = targets(&find(TARGETS).unwrap_or_default());
    let mut port = find(PORT).unwrap_or_default();
    let mut path = find(PATH).unwrap_or_default();
    let scrape = find(SCRAPE).unwrap_or_default();
    if let Some((first_port, first_path)) = targets.first() {
        // Agents that know one target only scrape the first.
        (port, path) = (first_port.clone(), first_path.clone());
        for (port, _) in &targets {
            allowed(port, agent_port, "targets", "target port")?;
        }
    } else if !port.is_empty() {
        allowed(&port, agent_port, "configuration", "port")?;
    }
    let mut out = given.clone();
    out.retain(|key, _| ![SCRAPE, PORT, PATH, TARGETS].contains(&plain(key).as_str()));
    out.insert("prometheus.io/port".into(), agent_port.to_string().into());
    out.insert("prometheus.io/path".into(), "/stats/prometheus".into());
    out.insert("prometheus.io/scrape".into(), "true".into());
    metadata.insert("annotations".into(), out.into());
    if scrape.is_empty() && path.is_empty() && port.is_empty() {
        return Ok(None);
    }
    let mut text = format!(
        "{{\"scrape\":{},\"path\":{},\"port\":{}",
        schema::string(&scrape),
        schema::string(&path),
        schema::string(&port)
    );
    let list: Vec<String> = targets
        .drain(..)
        .map(|(port, path)| {
            format!(
                "{{\"port\":{},\"path\":{}}}",
                schema::string(&port),
                schema::string(&path)
            )
        })
        .collect();
    if !list.is_empty() {
        text.push_str(&format!(",\"targets\":[{}]", list.join(",")));
    }
    text.push('}');
    Ok(Some(text))
}

/// Names the port of metrics over TLS, if the proxy serves one and the user has not named it.
pub fn secure_port(metadata: &mut Value, env: &Value) {
    let said = metadata["annotations"].as_object();
    if said
        .into_iter()
        .flatten()
        .any(|(key, _)| plain(key) == SECURE)
    {
        return;
    }
    let port = env.as_array().into_iter().flatten().find_map(|v| {
        (v["name"] == "ENVOY_SECURE_MERGED_METRICS_PORT").then(|| v["value"].as_str())?
    });
    if let Some(port) = port.filter(|p| !p.is_empty() && *p != "0") {
        metadata["annotations"]["prometheus.istio.io/secure-port"] = json!(port);
    }
}

/// Whether the annotations name the agent already.
pub fn names_agent(metadata: &Value, agent_port: i64) -> bool {
    let port = agent_port.to_string();
    let annotations = metadata["annotations"].as_object();
    annotations
        .into_iter()
        .flatten()
        .any(|(key, value)| plain(key) == PORT && *value == port)
}

/// Takes the annotations of scraping away.
pub fn clear(metadata: &mut Value) {
    if let Some(annotations) = metadata
        .get_mut("annotations")
        .and_then(Value::as_object_mut)
    {
        annotations.retain(|key, _| ![SCRAPE, PORT, PATH, TARGETS].contains(&plain(key).as_str()));
    }
}

/// `port:path` entries; an entry without a port voids the whole list.
fn targets(text: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for entry in text.split(',').map(str::trim).filter(|e| !e.is_empty()) {
        let (port, path) = entry.split_once(':').unwrap_or((entry, ""));
        if port.trim().is_empty() {
            return Vec::new();
        }
        let path = if path.trim().is_empty() {
            "/metrics"
        } else {
            path.trim()
        };
        out.push((port.trim().to_string(), path.to_string()));
    }
    out
}

fn allowed(port: &str, agent_port: i64, what: &str, noun: &str) -> Result<(), Error> {
    let fail = |why: String| {
        Err(Error::Prometheus(format!(
            "invalid prometheus scrape {what}: {why}"
        )))
    };
    let number = match port.parse::<i64>() {
        Ok(n) if (1..=65535).contains(&n) => n,
        _ => return fail(format!("invalid {noun} {port:?}")),
    };
    if number == agent_port {
        return fail(format!("{noun} {port} conflicts with agent port"));
    }
    if let Some((_, use_of)) = RESERVED.iter().find(|(p, _)| *p == number) {
        return fail(format!(
            "{noun} {port} is reserved for Istio ({use_of}) and cannot be scraped"
        ));
    }
    Ok(())
}

/// An annotation's key as a Prometheus label: any spelling of it that means the same.
fn plain(key: &str) -> String {
    key.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect()
}

const SCRAPE: &str = "prometheus_io_scrape";
const PORT: &str = "prometheus_io_port";
const PATH: &str = "prometheus_io_path";
const TARGETS: &str = "prometheus_istio_io_scrape_targets";
const SECURE: &str = "prometheus_istio_io_secure_port";

const RESERVED: [(i64, &str); 9] = [
    (15000, "Envoy admin"),
    (15001, "outbound traffic capture"),
    (15004, "pilot debug"),
    (15006, "inbound traffic capture"),
    (15008, "HBONE tunnel"),
    (15020, "pilot-agent status / merged Prometheus"),
    (15021, "Envoy health"),
    (15053, "DNS proxy"),
    (15090, "Envoy Prometheus (already merged)"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn run(given: Value, on: bool) -> (Result<Option<String>, String>, Value) {
        let mut metadata = json!({ "annotations": given });
        let object = metadata.as_object_mut().unwrap();
        let out = merge(object, on, 15020).map_err(|e| e.to_string());
        (out, metadata["annotations"].clone())
    }

    #[test]
    fn the_users_annotations_go_to_the_agent() {
        let agent = json!({"prometheus.io/port": "15020", "prometheus.io/path": "/stats/prometheus", "prometheus.io/scrape": "true"});
        assert_eq!(run(json!({}), true), (Ok(None), agent.clone()));
        let (text, after) = run(
            json!({"prometheus.io/port": "90", "prometheus/io.path": "/m"}),
            true,
        );
        assert_eq!(
            text.unwrap().unwrap(),
            r#"{"scrape":"","path":"/m","port":"90"}"#
        );
        assert_eq!(after, agent);
        let (text, _) = run(
            json!({"prometheus.istio.io/scrape-targets": "90:/a, 91"}),
            true,
        );
        assert_eq!(
            text.unwrap().unwrap(),
            r#"{"scrape":"","path":"/a","port":"90","targets":[{"port":"90","path":"/a"},{"port":"91","path":"/metrics"}]}"#
        );
        for (given, on) in [
            (json!({"prometheus.io/scrape": "false"}), true),
            (json!({"prometheus.istio.io/merge-metrics": "false"}), true),
            (json!({"prometheus.io/port": "15020"}), true),
            (json!({}), false),
        ] {
            assert_eq!(run(given.clone(), on), (Ok(None), given));
        }
        let (error, _) = run(json!({"prometheus.io/port": "15090"}), true);
        assert!(
            error
                .unwrap_err()
                .contains("port 15090 is reserved for Istio")
        );
    }
}
