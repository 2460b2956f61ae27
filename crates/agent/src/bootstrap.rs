//! The proxy's bootstrap: node, admin, xDS over the agent's socket, and the static listeners 15021 and 15090.
//!
//! It is what Istio's agent gives to Envoy, in our own words; a real Envoy takes it as well as our proxy does.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use proto::envoy::config::bootstrap::v3::Bootstrap;
use serde_json::{Map, Value, json};

use crate::{AgentError, settings::Settings};

/// Name of the unix socket of the xDS relay, in the config path.
pub const XDS_SOCKET: &str = "XDS";

/// Writes `envoy-rev.json`, and `envoy-rev0.json` beside it (the name of releases before 1.13, which users still
/// look for), and gives the path of the former.
pub fn write(settings: &Settings) -> Result<PathBuf, AgentError> {
    let value = build(settings)?;
    let dir = &settings.config_path;
    let io = |path: &Path, e: std::io::Error| AgentError::Write {
        path: path.to_owned(),
        source: e,
    };
    fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
    let text = serde_json::to_string_pretty(&value).expect("a JSON value is always writable");
    let path = dir.join("envoy-rev.json");
    for path in [&path, &dir.join("envoy-rev0.json")] {
        fs::write(path, &text).map_err(|e| io(path, e))?;
    }
    Ok(path)
}

/// Where the workload's certificate is served: by the agent, or by another who was there before (SPIRE).
pub(crate) fn workload_socket() -> PathBuf {
    let name = env::var("WORKLOAD_IDENTITY_SOCKET_FILE").ok();
    let name = name.filter(|n| !n.is_empty());
    Path::new("/var/run/secrets/workload-spiffe-uds").join(name.as_deref().unwrap_or("socket"))
}

/// Where the agent serves files while another serves the workload's socket.
pub(crate) const FILES_SOCKET: &str = "/var/run/secrets/credential-uds/files-socket";
/// An external secret service of the operator's, for `sds://NAME`.
const CREDENTIAL_SOCKET: &str = "/var/run/secrets/credential-uds/socket";

/// Whether somebody listens there; the agent itself does so only later.
fn is_served(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

/// The bootstrap as canonical JSON; it is known to be one.
pub fn build(settings: &Settings) -> Result<Value, AgentError> {
    let socket = settings.config_path.join(XDS_SOCKET);
    let wildcard = if settings.addresses[0].is_ipv4() {
        "0.0.0.0"
    } else {
        "::"
    };
    let value = json!({
        "node": node(settings)?,
        "layeredRuntime": {"layers": [
            {"name": "global config", "staticLayer": {
                "re2.max_program_size.error_level": "32768",
                "envoy.deprecated_features:envoy.config.listener.v3.Listener.hidden_envoy_deprecated_use_original_dst": true,
                "envoy.reloadable_features.http_reject_path_with_fragment": false,
            }},
            {"name": "admin", "adminLayer": {}},
        ]},
        "statsConfig": {"useAllDefaultTags": true},
        "admin": {"address": socket_address("127.0.0.1", settings.admin_port)},
        "dynamicResources": {
            "ldsConfig": {"ads": {}, "initialFetchTimeout": "0s", "resourceApiVersion": "V3"},
            "cdsConfig": {"ads": {}, "initialFetchTimeout": "0s", "resourceApiVersion": "V3"},
            "adsConfig": {
                "apiType": if delta(settings) { "DELTA_GRPC" } else { "GRPC" },
                "setNodeOnFirstMessageOnly": true,
                "transportApiVersion": "V3",
                "grpcServices": [{"envoyGrpc": {"clusterName": "xds-grpc"}}],
            },
        },
        "staticResources": {
            "clusters": [
                static_cluster("prometheus_stats", json!(socket_address("127.0.0.1", settings.admin_port))),
                static_cluster("agent", json!(socket_address("127.0.0.1", settings.status_port))),
                grpc_cluster("sds-grpc", &format!(".{}", workload_socket().display())),
                grpc_cluster("xds-grpc", &socket.to_string_lossy()),
            ],
            "listeners": [
                forwarding_listener(wildcard, settings.prometheus_port, "/stats/prometheus", "prometheus_stats", "stats"),
                forwarding_listener(wildcard, settings.ready_port, "/healthz/ready", "agent", "agent"),
            ],
        },
    });
    let mut value = value;
    if is_served(&workload_socket())
        && let Some(clusters) = value["staticResources"]["clusters"].as_array_mut()
    {
        clusters.push(grpc_cluster("sds-files-grpc", FILES_SOCKET));
    }
    // Read it the way the proxy will, so that a mistake shows here and not in a restart loop.
    let message: Bootstrap = proto::json::from_value(&value)
        .map_err(|e| AgentError::Config(format!("the bootstrap is not valid: {e}")))?;
    Ok(proto::json::to_value(&message))
}

/// `ISTIO_DELTA_XDS` chooses the form of the protocol; delta where it is not set.
fn delta(settings: &Settings) -> bool {
    let meta = settings
        .proxy_config
        .get("proxyMetadata")
        .and_then(|m| m.get("ISTIO_DELTA_XDS"));
    meta.and_then(Value::as_str)
        .map(str::to_owned)
        .or_else(|| env::var("ISTIO_DELTA_XDS").ok())
        .is_none_or(|v| v != "false")
}

fn node(settings: &Settings) -> Result<Value, AgentError> {
    let mut node = json!({
        "id": settings.node_id(),
        "cluster": settings.service_cluster,
        "metadata": metadata(settings)?,
    });
    if let Some(locality) = locality(&settings.labels) {
        node["locality"] = locality;
    }
    Ok(node)
}

/// `region/zone/subzone` of the label `topology.istio.io/locality`, or of `istio-locality` with dots for slashes.
fn locality(labels: &BTreeMap<String, String>) -> Option<Value> {
    let text = labels
        .get("topology.istio.io/locality")
        .cloned()
        .or_else(|| labels.get("istio-locality").map(|v| v.replace('.', "/")))?;
    let mut parts = text.splitn(3, '/');
    let mut part = || parts.next().unwrap_or_default().to_owned();
    Some(json!({"region": part(), "zone": part(), "subZone": part()}))
}

/// Metadata of the node, from the environment that the injector writes, the pod's labels and ProxyConfig.
pub fn metadata(settings: &Settings) -> Result<Map<String, Value>, AgentError> {
    let mut out = Map::new();
    let meta = settings
        .proxy_config
        .get("proxyMetadata")
        .and_then(Value::as_object);
    for (key, value) in meta.into_iter().flatten() {
        if let Some(name) = key.strip_prefix("ISTIO_META_") {
            out.insert(name.to_owned(), value.clone());
        }
    }
    for (key, value) in env::vars() {
        if let Some(name) = key.strip_prefix("ISTIO_META_") {
            out.insert(name.to_owned(), value.into());
        } else if key.starts_with("ISTIO_METAJSON_") {
            let fields: Map<String, Value> = serde_json::from_str(&value).map_err(|e| {
                AgentError::Config(format!(
                    "environment variable {key}: not a JSON object: {e}"
                ))
            })?;
            out.extend(fields);
        }
    }
    let addresses: Vec<_> = settings.addresses.iter().map(ToString::to_string).collect();
    let mut labels = settings.labels.clone();
    labels.remove("pod-template-hash");
    let fixed = [
        ("INSTANCE_IPS", json!(addresses.join(","))),
        ("LABELS", json!(labels)),
        ("NAME", json!(settings.pod)),
        ("NAMESPACE", json!(settings.namespace)),
        ("PROXY_CONFIG", Value::Object(settings.proxy_config.clone())),
        ("ENVOY_STATUS_PORT", json!(settings.ready_port)),
        ("ENVOY_PROMETHEUS_PORT", json!(settings.prometheus_port)),
    ];
    out.extend(fixed.map(|(k, v)| (k.to_owned(), v)));
    if !settings.annotations.is_empty() {
        out.insert("ANNOTATIONS".into(), json!(settings.annotations));
    }
    for (key, variable) in [
        ("SERVICE_ACCOUNT", "SERVICE_ACCOUNT"),
        ("NODE_NAME", "ISTIO_META_NODE_NAME"),
    ] {
        if let Ok(value) = env::var(variable)
            && !value.is_empty()
        {
            out.entry(key).or_insert_with(|| value.into());
        }
    }
    // Which names the control plane may use: `sds://NAME`, and files beside a workload socket that is another's.
    for (key, served) in [
        ("credential", is_served(Path::new(CREDENTIAL_SOCKET))),
        ("file-credential", is_served(&workload_socket())),
    ] {
        if served {
            out.insert(key.into(), "true".into());
        }
    }
    for (key, default) in [
        ("CLUSTER_ID", "Kubernetes"),
        ("INTERCEPTION_MODE", "REDIRECT"),
        ("MESH_ID", "cluster.local"),
    ] {
        out.entry(key).or_insert_with(|| default.into());
    }
    out.entry("ISTIO_VERSION")
        .or_insert_with(|| ISTIO_VERSION.into());
    Ok(out)
}

/// The release of Istio whose behaviour the proxy has: control planes gate features on it.
pub const ISTIO_VERSION: &str = "1.30.0";

fn socket_address(address: &str, port: u16) -> Value {
    json!({"socketAddress": {"address": address, "portValue": port}})
}

fn static_cluster(name: &str, address: Value) -> Value {
    json!({
        "name": name,
        "altStatName": format!("{name};"),
        "type": "STATIC",
        "connectTimeout": "0.250s",
        "loadAssignment": assignment(name, address),
    })
}

fn grpc_cluster(name: &str, path: &str) -> Value {
    json!({
        "name": name,
        "altStatName": format!("{name};"),
        "type": "STATIC",
        "connectTimeout": "1s",
        "typedExtensionProtocolOptions": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicitHttpConfig": {"http2ProtocolOptions": {}},
        }},
        "loadAssignment": assignment(name, json!({"pipe": {"path": path}})),
    })
}

fn assignment(name: &str, address: Value) -> Value {
    json!({
        "clusterName": name,
        "endpoints": [{"lbEndpoints": [{"endpoint": {"address": address}}]}],
    })
}

fn forwarding_listener(address: &str, port: u16, path: &str, cluster: &str, prefix: &str) -> Value {
    json!({
        "address": socket_address(address, port),
        "name": format!("{address}_{port}"),
        "filterChains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typedConfig": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "statPrefix": prefix,
                "routeConfig": {"virtualHosts": [{
                    "name": "backend",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": path}, "route": {"cluster": cluster}}],
                }]},
                "httpFilters": [{
                    "name": "envoy.filters.http.router",
                    "typedConfig": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
                }],
            },
        }]}],
    })
}
