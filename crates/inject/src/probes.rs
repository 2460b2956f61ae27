//! The rewrite of probes: kubelet cannot speak the mesh's TLS, so it asks the agent, and the agent asks the app.
//!
//! Every HTTP, TCP and gRPC probe, and every HTTP or TCP life-cycle hook, of every container but the proxy becomes an
//! HTTP call of the agent's port; the original goes to the agent as JSON in `ISTIO_KUBE_APP_PROBERS`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    annotations,
    schema::{self, Type},
};

/// The agent's variable with the original probes.
pub const VARIABLE: &str = "ISTIO_KUBE_APP_PROBERS";

/// Where a probe stands in a container, and the path by which the agent knows it.
const PLACES: [(&str, &str, &str, bool); 5] = [
    ("readinessProbe", "/app-health", "readyz", true),
    ("livenessProbe", "/app-health", "livez", true),
    ("startupProbe", "/app-health", "startupz", true),
    ("preStop", "/app-lifecycle", "prestopz", false),
    ("postStart", "/app-lifecycle", "poststartz", false),
];

/// Whether probes are rewritten: the pod's annotation says so, else the install.
pub fn wanted(annotation: Option<&str>, install: bool) -> bool {
    match annotation.map(annotations::truth) {
        Some(Ok(wanted)) => wanted,
        _ => install,
    }
}

/// The originals as the agent wants them, none if there are none. Probes that ask `agent_port` are rewritten already.
pub fn originals(pod: &Value, agent_port: i64) -> Option<String> {
    let mut found = BTreeMap::new();
    for list in ["initContainers", "containers"] {
        for container in items(pod, list) {
            for (field, prefix, suffix, probe) in PLACES {
                let action = match probe {
                    true => &container[field],
                    false => &container["lifecycle"][field],
                };
                if let Some(text) = original(container, action, probe, agent_port) {
                    let name = container["name"].as_str().unwrap_or_default();
                    found.insert(format!("{prefix}/{name}/{suffix}"), text);
                }
            }
        }
    }
    if found.is_empty() {
        return None;
    }
    let entries: Vec<String> = found
        .iter()
        .map(|(path, text)| format!("{}:{text}", schema::string(path)))
        .collect();
    Some(format!("{{{}}}", entries.join(",")))
}

/// The union of what a former injection found and what this one found; the former wins.
pub fn merged(former: &str, new: &str) -> Option<String> {
    let read = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
    let (former, new) = (read(former)?, read(new)?);
    let all: BTreeMap<_, _> = new.into_iter().chain(former).collect();
    let entries: Vec<String> = all
        .iter()
        .map(|(path, probe)| format!("{}:{}", schema::string(path), prober(probe)))
        .collect();
    Some(format!("{{{}}}", entries.join(",")))
}

/// Makes every probe of `pod` ask the agent at `port`.
pub fn rewrite(pod: &mut Value, port: i64) {
    for list in ["containers", "initContainers"] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers
            .iter_mut()
            .filter(|c| c["name"] != crate::template::PROXY)
        {
            let name = container["name"].as_str().unwrap_or_default().to_string();
            for (field, prefix, suffix, probe) in PLACES {
                let parent = match probe {
                    true => Some(&mut *container),
                    false => container.get_mut("lifecycle"),
                };
                if let Some(Value::Object(action)) = parent.and_then(|p| p.get_mut(field)) {
                    redirect(action, &format!("{prefix}/{name}/{suffix}"), port, probe);
                }
            }
        }
    }
}

fn items<'a>(pod: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    pod["spec"][list]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|c| c["name"] != crate::template::PROXY)
}

fn original(container: &Value, action: &Value, probe: bool, agent_port: i64) -> Option<String> {
    let kinds: &[&str] = if probe {
        &["httpGet", "tcpSocket", "grpc"]
    } else {
        &["httpGet", "tcpSocket"]
    };
    let kind = *kinds.iter().find(|k| action.get(**k).is_some())?;
    let mut call = action[kind].clone();
    if kind != "grpc" {
        match &call["port"] {
            Value::String(name) => {
                let port = container["ports"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .find(|p| {
                        p["name"]
                            .as_str()
                            .is_some_and(|n| !n.is_empty() && n == name)
                    });
                // A name that no port has: the agent cannot ask, and kubelet could not either.
                call["port"] = port?["containerPort"].clone();
            }
            Value::Number(n) if n.as_i64() == Some(agent_port) => return None,
            _ => {}
        }
    }
    let mut out = json!({ kind: call });
    if probe && let Some(seconds) = action.get("timeoutSeconds") {
        out["timeoutSeconds"] = seconds.clone();
    }
    Some(prober(&out))
}

/// One original in the field order of the agent's type.
fn prober(value: &Value) -> String {
    let parts = [
        ("httpGet", Type::HttpGet),
        ("tcpSocket", Type::TcpSocket),
        ("grpc", Type::Grpc),
        ("timeoutSeconds", Type::Any),
    ];
    let fields: Vec<String> = parts
        .iter()
        .filter_map(|(name, kind)| {
            Some(format!(
                "\"{name}\":{}",
                schema::json_text(*kind, value.get(*name)?)
            ))
        })
        .collect();
    format!("{{{}}}", fields.join(","))
}

fn redirect(action: &mut Map<String, Value>, path: &str, port: i64, probe: bool) {
    let former = action.get("httpGet").and_then(Value::as_object).cloned();
    let mut call = match former {
        Some(call) => call,
        None if action.remove("tcpSocket").is_some() => Map::new(),
        None if probe && action.remove("grpc").is_some() => Map::new(),
        None => return,
    };
    call.insert("path".into(), path.into());
    call.insert("port".into(), port.into());
    if call.get("scheme").is_some_and(|s| s == "HTTPS") {
        call.insert("scheme".into(), "HTTP".into());
    }
    action.insert("httpGet".into(), call.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_and_hooks_go_to_the_agent_and_originals_stay_known() {
        let mut pod = json!({"spec": {"containers": [
            {"name": "istio-proxy", "readinessProbe": {"httpGet": {"port": 15021}}},
            {"name": "web", "ports": [{"name": "http", "containerPort": 80}],
             "readinessProbe": {"grpc": {"port": 9}, "timeoutSeconds": 4},
             "livenessProbe": {"httpGet": {"port": "http", "path": "/l", "scheme": "HTTPS"}},
             "startupProbe": {"exec": {"command": ["true"]}},
             "lifecycle": {"preStop": {"tcpSocket": {"port": 80}}, "postStart": {"httpGet": {"port": "none"}}}},
        ]}});
        assert_eq!(
            originals(&pod, 15020).unwrap(),
            r#"{"/app-health/web/livez":{"httpGet":{"path":"/l","port":80,"scheme":"HTTPS"}},"/app-health/web/readyz":{"grpc":{"port":9,"service":null},"timeoutSeconds":4},"/app-lifecycle/web/prestopz":{"tcpSocket":{"port":80}}}"#
        );
        rewrite(&mut pod, 15020);
        let web = &pod["spec"]["containers"][1];
        assert_eq!(
            web["livenessProbe"]["httpGet"],
            json!({"path": "/app-health/web/livez", "port": 15020, "scheme": "HTTP"})
        );
        assert_eq!(
            web["readinessProbe"],
            json!({"httpGet": {"path": "/app-health/web/readyz", "port": 15020}, "timeoutSeconds": 4})
        );
        assert!(web["startupProbe"].get("exec").is_some());
        assert_eq!(
            web["lifecycle"]["preStop"]["httpGet"]["path"],
            "/app-lifecycle/web/prestopz"
        );
        assert_eq!(
            pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"],
            15021
        );
        assert_eq!(originals(&pod, 15020), None);
        let former = r#"{"/a":{"tcpSocket":{"port":1}}}"#;
        let new = r#"{"/a":{"tcpSocket":{"port":2}},"/b":{"grpc":{"port":3}}}"#;
        let both = merged(former, new).unwrap();
        assert_eq!(
            both,
            r#"{"/a":{"tcpSocket":{"port":1}},"/b":{"grpc":{"port":3,"service":null}}}"#
        );
    }
}
