//! The API of old (v2): what people copy from articles, with what to write instead.
//!
//! Each old form is reported and then turned into the new one, so that what else is wrong in it is found in the same
//! run.

use serde_json::{Map, Value, json};

use crate::plan::PlanError;

/// Reports and replaces old forms everywhere in a bootstrap.
pub(super) fn modernize(root: &mut Value) -> Vec<PlanError> {
    let mut errors = Vec::new();
    walk(root, "", &mut errors);
    errors
}

fn walk(value: &mut Value, path: &str, errors: &mut Vec<PlanError>) {
    match value {
        Value::Object(members) => {
            replace(members, path, errors);
            for (key, value) in members.iter_mut() {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                walk(value, &path, errors);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter_mut().enumerate() {
                walk(value, &format!("{path}[{index}]"), errors);
            }
        }
        _ => {}
    }
}

fn replace(members: &mut Map<String, Value>, path: &str, errors: &mut Vec<PlanError>) {
    let at = |field: &str| {
        if path.is_empty() {
            field.to_owned()
        } else {
            format!("{path}.{field}")
        }
    };
    let mut report = |field: &str, message: String| {
        errors.push(PlanError {
            path: at(field),
            message,
        })
    };
    let name = members
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    // Only filters, sockets and logs had `config`, and they all have a name.
    if !name.is_empty() && members.contains_key("config") && !members.contains_key("typed_config") {
        let type_url = TYPES
            .iter()
            .find(|(names, _)| names.contains(&name.as_str()))
            .map(|(_, t)| *t);
        let instead = match type_url {
            Some(type_url) => format!("write `typed_config` with \"@type\": {type_url}"),
            None => {
                "write `typed_config` with the \"@type\" of this extension's v3 message".to_owned()
            }
        };
        report(
            "config",
            format!("is the v2 form of an extension's configuration; {instead}"),
        );
        let config = members.remove("config").unwrap_or(Value::Null);
        if let (Value::Object(mut config), Some(type_url)) = (config, type_url) {
            config.insert("@type".to_owned(), type_url.into());
            members.insert("typed_config".to_owned(), Value::Object(config));
        }
    }
    let cluster = members.contains_key("connect_timeout") || members.contains_key("lb_policy");
    if cluster && let Some(hosts) = members.remove("hosts") {
        report(
            "hosts",
            "is the v2 form of a cluster's endpoints; write `load_assignment` with cluster_name and \
             endpoints[].lb_endpoints[].endpoint.address"
                .to_owned(),
        );
        let hosts = hosts.as_array().cloned().unwrap_or_default();
        let endpoints: Vec<Value> = hosts
            .into_iter()
            .map(|address| json!({ "endpoint": { "address": address } }))
            .collect();
        let assignment =
            json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] });
        members.entry("load_assignment").or_insert(assignment);
    }
    if let Some(mut context) = members.remove("tls_context") {
        let (side, name) = match cluster {
            true => ("UpstreamTlsContext", "envoy.transport_sockets.tls"),
            false => ("DownstreamTlsContext", "envoy.transport_sockets.tls"),
        };
        let type_url =
            format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{side}");
        report(
            "tls_context",
            format!(
                "is the v2 form of TLS; write `transport_socket` with name {name} and typed_config \"@type\": {type_url}"
            ),
        );
        if let Value::Object(members) = &mut context {
            members.insert("@type".to_owned(), type_url.into());
        }
        let socket = json!({ "name": name, "typed_config": context });
        members.entry("transport_socket").or_insert(socket);
    }
    if let Some(regex) = members
        .get("regex")
        .and_then(Value::as_str)
        .map(ToOwned::to_owned)
        && path.ends_with(".match")
    {
        report(
            "regex",
            "is the v2 form; write `safe_regex: { regex: … }`".to_owned(),
        );
        members.remove("regex");
        members
            .entry("safe_regex")
            .or_insert(json!({ "regex": regex }));
    }
}

/// Names of extensions, old and new, with the type of their configuration.
const TYPES: &[(&[&str], &str)] = &[
    (
        &[
            "envoy.filters.network.http_connection_manager",
            "envoy.http_connection_manager",
        ],
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    ),
    (
        &["envoy.filters.network.tcp_proxy", "envoy.tcp_proxy"],
        "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
    ),
    (
        &["envoy.filters.http.router", "envoy.router"],
        "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
    ),
    (
        &["envoy.filters.http.cors", "envoy.cors"],
        "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors",
    ),
    (
        &["envoy.filters.http.fault", "envoy.fault"],
        "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
    ),
    (
        &["envoy.access_loggers.file", "envoy.file_access_log"],
        "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
    ),
    (
        &[
            "envoy.filters.listener.tls_inspector",
            "envoy.listener.tls_inspector",
        ],
        "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
    ),
    (
        &[
            "envoy.filters.listener.http_inspector",
            "envoy.listener.http_inspector",
        ],
        "type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector",
    ),
    (
        &[
            "envoy.filters.listener.original_dst",
            "envoy.listener.original_dst",
        ],
        "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
    ),
];
