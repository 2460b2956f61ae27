//! How far each proxy is, and what is wrong.

use std::time::SystemTime;

use config::{Problem, Severity};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use xds::{
    Mode,
    type_url::{CDS, ECDS, EDS, LDS, RDS},
};

use crate::{
    model::{Mesh, NodeKind, Proxy},
    security::Selected,
    server::{Connection, Rejection, Server},
};

/// istiod's prefixes of the flat fields.
const FLAT: [(&str, &str); 5] = [
    (CDS, "cluster"),
    (LDS, "listener"),
    (RDS, "route"),
    (EDS, "endpoint"),
    (ECDS, "extensionconfig"),
];

/// One element of `/debug/syncz`.
pub(super) fn sync(connection: &Connection) -> Value {
    let node = &connection.node;
    let mut out = Map::new();
    out.insert("cluster_id".into(), node.cluster_id().into());
    out.insert("proxy".into(), node.workload.clone().into());
    out.insert("proxy_type".into(), kind(connection).into());
    out.insert("istio_version".into(), connection.istio_version().into());
    let mut resources = Map::new();
    for (type_url, state) in connection.types() {
        if let Some((_, name)) = FLAT.iter().find(|(t, _)| *t == &*type_url) {
            insert_text(&mut out, &format!("{name}_sent"), &state.sent);
            insert_text(&mut out, &format!("{name}_acked"), &state.acked);
        }
        let mut one = Map::new();
        insert_text(&mut one, "sent", &state.sent);
        insert_text(&mut one, "acked", &state.acked);
        if let Some(at) = state.sent_at {
            one.insert("sentTime".into(), time(at).into());
        }
        if let Some(rejected) = &state.rejected {
            one.insert("lastError".into(), rejected.to_string().into());
            one.insert("lastErrorDetail".into(), rejection(rejected));
        }
        resources.insert(type_url.to_string(), Value::Object(one));
    }
    out.insert("resources".into(), Value::Object(resources));
    Value::Object(out)
}

/// `/debug/adsz`.
pub(super) fn clients(server: &Server) -> Value {
    let clients: Vec<Value> = server
        .connections()
        .iter()
        .map(|c| {
            let mut watches = Map::new();
            for (type_url, state) in c.types() {
                let held = c.sent(&type_url).map_or(0, |set| set.len());
                watches.insert(type_url.to_string(), json!({"names": state.names, "resources": held}));
            }
            json!({
                "connectionId": c.id,
                "connectedAt": time(c.connected),
                "address": c.peer,
                "proxy": c.node.workload,
                "proxyType": kind(c),
                "protocol": match c.mode { Mode::Delta => "delta", Mode::Sotw => "state of the world" },
                "labels": c.node.labels,
                "watches": watches,
            })
        })
        .collect();
    json!({"totalClients": clients.len(), "clients": clients})
}

/// One element of `/debug/problems`.
pub(super) fn problem(problem: &Problem) -> Value {
    json!({
        "severity": match problem.severity { Severity::Error => "error", Severity::Warning => "warning" },
        "file": problem.file.display().to_string(),
        "line": problem.line,
        "object": problem.object.as_ref().map(ToString::to_string),
        "field": problem.field,
        "message": problem.message,
    })
}

/// The policies that a proxy enforces.
pub(super) fn policies(connection: &Connection, mesh: &Mesh) -> Value {
    let proxy = Proxy::new(mesh, connection.node.clone());
    let selected = mesh.policies().selection(&proxy);
    let one = |s: &Selected| {
        let (key, source) = (s.origin.key(), s.origin.source());
        json!({
            "kind": key.kind.name(),
            "namespace": key.namespace,
            "name": key.name,
            "action": s.action,
            "dryRun": s.dry_run,
            "rules": s.rules,
            "issuers": s.issuers,
            "file": source.file.display().to_string(),
            "line": source.line,
        })
    };
    selected.iter().map(one).collect()
}

fn rejection(rejection: &Rejection) -> Value {
    let resources: Vec<Value> = rejection
        .resources
        .iter()
        .map(|(name, from)| {
            let from: Vec<Value> = from
                .iter()
                .map(|o| {
                    json!({
                        "kind": o.key().kind.name(),
                        "namespace": o.key().namespace,
                        "name": o.key().name,
                        "file": o.source().file.display().to_string(),
                        "line": o.source().line,
                    })
                })
                .collect();
            json!({"name": name, "from": from})
        })
        .collect();
    json!({
        "nonce": rejection.nonce,
        "message": rejection.message,
        "at": time(rejection.at),
        "resources": resources,
    })
}

fn kind(connection: &Connection) -> &'static str {
    match connection.node.kind {
        NodeKind::Router => "router",
        NodeKind::Sidecar => "sidecar",
    }
}

fn insert_text(map: &mut Map<String, Value>, key: &str, value: &str) {
    if !value.is_empty() {
        map.insert(key.to_owned(), value.into());
    }
}

fn time(at: SystemTime) -> String {
    Timestamp::try_from(at)
        .map(|t| t.to_string())
        .unwrap_or_default()
}
