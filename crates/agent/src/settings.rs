//! What the agent is told: command line, mesh file, `PROXY_CONFIG`, annotation and environment, merged.
//!
//! Precedence (Istio): built-in defaults < `defaultConfig` of the mesh file < `PROXY_CONFIG` < annotation
//! `proxy.istio.io/config`; flags of the command line, which only old injectors write, win over all of them.

use std::{
    collections::BTreeMap,
    env, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value, json};

use crate::{AgentError, flags::Flags};

/// What kind of proxy this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A gateway.
    Router,
    /// Beside an application.
    Sidecar,
}

impl Role {
    /// The first part of the node id.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Sidecar => "sidecar",
        }
    }
}

/// Everything that the agent needs to know, settled.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Kind of proxy.
    pub role: Role,
    /// The pod's addresses; the first is the primary one.
    pub addresses: Vec<IpAddr>,
    /// Name of the pod.
    pub pod: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// DNS domain of the pod, `NAMESPACE.svc.cluster.local`.
    pub domain: String,
    /// Folder of the bootstrap file and the xDS socket.
    pub config_path: PathBuf,
    /// The proxy to run; this very program where it is not given.
    pub binary: Option<PathBuf>,
    /// Service cluster of the node.
    pub service_cluster: String,
    /// Where the control plane is, `host:port`.
    pub discovery_address: String,
    /// Whether the control plane is spoken to without TLS.
    pub plaintext: bool,
    /// The proxy's own `--drain-time-s`.
    pub drain: Duration,
    /// The proxy's own `--parent-shutdown-time-s`.
    pub parent_shutdown: Duration,
    /// How long the agent waits between starting to drain and stopping the proxy.
    pub termination_drain: Duration,
    /// Port of the proxy's admin interface on 127.0.0.1.
    pub admin_port: u16,
    /// Port of the agent's own status server.
    pub status_port: u16,
    /// Port of the proxy's readiness listener.
    pub ready_port: u16,
    /// Port of the proxy's metrics listener.
    pub prometheus_port: u16,
    /// Worker threads of the proxy; 0 is one for each core.
    pub concurrency: u32,
    /// The proxy's log level.
    pub log_level: String,
    /// The proxy's log levels by component.
    pub component_log_level: String,
    /// The merged ProxyConfig as it travels in the node's metadata.
    pub proxy_config: Map<String, Value>,
    /// Labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pod.
    pub annotations: BTreeMap<String, String>,
}

impl Settings {
    /// Reads all sources. Errors name the source and what to write instead.
    pub fn read(flags: &Flags) -> Result<Self, AgentError> {
        let role = match flags.role.as_str() {
            "" | "sidecar" => Role::Sidecar,
            "router" => Role::Router,
            other => {
                return Err(AgentError::Flag(format!(
                    "unknown role {other:?}: expected `proxy sidecar` or `proxy router`"
                )));
            }
        };
        let labels = downward(Path::new("/etc/istio/pod/labels"))?;
        let annotations = downward(Path::new("/etc/istio/pod/annotations"))?;
        let mesh_file = flags
            .value("meshConfig")
            .unwrap_or("/etc/istio/config/mesh");
        let own = own_proxy_config(mesh_file, &annotations)?;
        let mut effective = defaults();
        merge(&mut effective, &own);

        let namespace = env_or("POD_NAMESPACE", "default");
        let text = |key: &str| {
            effective
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let flag_or = |flag: &str, key: &str| flags.value(flag).unwrap_or(text(key)).to_owned();
        let port = |flag: &str, key: &str| -> Result<u16, AgentError> {
            match flags.value(flag) {
                Some(v) => number(v)
                    .ok_or_else(|| AgentError::Flag(format!("--{flag}: {v:?} is not a port"))),
                None => effective
                    .get(key)
                    .and_then(Value::as_u64)
                    .and_then(|v| v.try_into().ok())
                    .ok_or_else(|| {
                        AgentError::Config(format!(
                            "ProxyConfig.{key}: not a port between 0 and 65535"
                        ))
                    }),
            }
        };
        let time = |flag: &str, key: &str| -> Result<Duration, AgentError> {
            let text = flag_or(flag, key);
            duration(&text).ok_or_else(|| {
                AgentError::Config(format!(
                    "{key}: {text:?} is not a duration such as 45s or 1m0s"
                ))
            })
        };
        let discovery_address = annotations
            .get("proxy.istio.io/discoveryAddress")
            .cloned()
            .unwrap_or_else(|| flag_or("discoveryAddress", "discoveryAddress"));
        if !discovery_address
            .rsplit_once(':')
            .is_some_and(|(h, p)| !h.is_empty() && number::<u16>(p).is_some())
        {
            return Err(AgentError::Config(format!(
                "discoveryAddress: {discovery_address:?} is not HOST:PORT, e.g. istiod.istio-system.svc:15010"
            )));
        }
        // The proto calls the enum value MUTUAL_TLS or NONE; the flag of 1.5 has the same words.
        let plaintext = discovery_address.ends_with(":15010")
            || flag_or("controlPlaneAuthPolicy", "controlPlaneAuthPolicy") == "NONE"
                && flags.value("controlPlaneAuthPolicy").is_some()
            || text("controlPlaneAuthPolicy") == "NONE";
        let status_port = match annotations.get("status.sidecar.istio.io/port") {
            Some(v) => number(v).ok_or_else(|| {
                AgentError::Config(format!(
                    "annotation status.sidecar.istio.io/port: {v:?} is not a port"
                ))
            })?,
            None => port("statusPort", "statusPort")?,
        };
        let concurrency = match flags.value("concurrency").filter(|v| *v != "0") {
            Some(v) => number(v).ok_or_else(|| {
                AgentError::Flag(format!("--concurrency: {v:?} is not a number of threads"))
            })?,
            None => match effective.get("concurrency").and_then(Value::as_u64) {
                Some(v) => v as u32,
                None => env::var("ISTIO_CPU_LIMIT")
                    .ok()
                    .and_then(|v| number(&v))
                    .unwrap_or(0),
            },
        };
        Ok(Self {
            role,
            addresses: addresses()?,
            pod: env_or("POD_NAME", &hostname()),
            domain: match flags.value("domain") {
                Some(domain) if !domain.is_empty() => domain.to_owned(),
                _ => format!("{namespace}.svc.cluster.local"),
            },
            config_path: PathBuf::from(flag_or("configPath", "configPath")),
            binary: flags
                .value("binaryPath")
                .or_else(|| own.get("binaryPath").and_then(Value::as_str))
                .filter(|p| !p.is_empty())
                .map(PathBuf::from),
            service_cluster: service_cluster(flags, &own, &labels, &namespace),
            discovery_address,
            plaintext,
            drain: time("drainDuration", "drainDuration")?,
            parent_shutdown: time("parentShutdownDuration", "parentShutdownDuration")?,
            termination_drain: time("terminationDrainDuration", "terminationDrainDuration")?,
            admin_port: port("proxyAdminPort", "proxyAdminPort")?,
            status_port,
            ready_port: env_port("ENVOY_STATUS_PORT", 15021)?,
            prometheus_port: env_port("ENVOY_PROMETHEUS_PORT", 15090)?,
            concurrency,
            log_level: flags.value("proxyLogLevel").unwrap_or("warning").to_owned(),
            component_log_level: flags
                .value("proxyComponentLogLevel")
                .unwrap_or_default()
                .to_owned(),
            proxy_config: own,
            labels,
            annotations,
            namespace,
        })
    }

    /// `TYPE~IP~POD.NAMESPACE~DOMAIN`.
    pub fn node_id(&self) -> String {
        let ip = self.addresses[0];
        format!(
            "{}~{ip}~{}.{}~{}",
            self.role.as_str(),
            self.pod,
            self.namespace,
            self.domain
        )
    }
}

/// Istio's defaults of the ProxyConfig fields that matter here.
fn defaults() -> Map<String, Value> {
    let Value::Object(fields) = json!({
        "configPath": "/etc/istio/proxy",
        "controlPlaneAuthPolicy": "MUTUAL_TLS",
        "discoveryAddress": "istiod.istio-system.svc:15012",
        "drainDuration": "45s",
        "parentShutdownDuration": "60s",
        "proxyAdminPort": 15000,
        "statusPort": 15020,
        "terminationDrainDuration": "5s",
    }) else {
        return Map::new();
    };
    fields
}

/// What the sources say of ProxyConfig, without defaults.
fn own_proxy_config(
    mesh_file: &str,
    annotations: &BTreeMap<String, String>,
) -> Result<Map<String, Value>, AgentError> {
    let mut own = Map::new();
    let mut add = |source: &str, text: &str, inner: Option<&str>| -> Result<(), AgentError> {
        let mut value = proto::json::yaml_to_value(text)
            .map_err(|e| AgentError::Config(format!("{source}: {e}")))?;
        if let Some(key) = inner {
            value = value.get(key).cloned().unwrap_or(Value::Null);
        }
        match value {
            Value::Null => Ok(()),
            Value::Object(fields) => {
                let typed = Value::Object(fields.clone());
                proto::json::from_value::<proto::istio::mesh::v1alpha1::ProxyConfig>(&typed)
                    .map_err(|e| AgentError::Config(format!("{source}: {e}")))?;
                merge(&mut own, &fields);
                Ok(())
            }
            other => Err(AgentError::Config(format!(
                "{source}: expected an object, got {other}"
            ))),
        }
    };
    match fs::read_to_string(mesh_file) {
        Ok(text) => add(mesh_file, &text, Some("defaultConfig"))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(AgentError::Config(format!("{mesh_file}: {e}"))),
    }
    if let Ok(text) = env::var("PROXY_CONFIG") {
        add("environment variable PROXY_CONFIG", &text, None)?;
    }
    if let Some(text) = annotations.get("proxy.istio.io/config") {
        add("annotation proxy.istio.io/config", text, None)?;
    }
    Ok(own)
}

/// Objects are merged field by field; anything else is replaced.
fn merge(into: &mut Map<String, Value>, from: &Map<String, Value>) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Object(inner)), Value::Object(more)) => merge(inner, more),
            _ => _ = into.insert(key.clone(), value.clone()),
        }
    }
}

fn service_cluster(
    flags: &Flags,
    own: &Map<String, Value>,
    labels: &BTreeMap<String, String>,
    namespace: &str,
) -> String {
    if let Some(name) = flags.value("serviceCluster").filter(|v| !v.is_empty()) {
        return name.to_owned();
    }
    if let Some(name) = own.get("serviceCluster").and_then(Value::as_str) {
        return name.to_owned();
    }
    let app = ["service.istio.io/canonical-name", "app"]
        .iter()
        .find_map(|k| labels.get(*k));
    match app
        .cloned()
        .or_else(|| env::var("ISTIO_META_WORKLOAD_NAME").ok())
    {
        Some(name) => format!("{name}.{namespace}"),
        None => format!("istio-proxy.{namespace}"),
    }
}

/// A file of the downward API: `key="value"` a line, the value quoted as Go quotes. A missing file is empty.
fn downward(path: &Path) -> Result<BTreeMap<String, String>, AgentError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(AgentError::Config(format!("{}: {e}", path.display()))),
    };
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| {
            line.split_once('=')
                .and_then(|(k, v)| Some((k.to_owned(), unquote(v)?)))
                .ok_or_else(|| {
                    AgentError::Config(format!(
                        "{}:{}: expected key=\"value\", got {line:?}",
                        path.display(),
                        i + 1
                    ))
                })
        })
        .collect()
}

fn unquote(text: &str) -> Option<String> {
    let inner = text.strip_prefix('"')?.strip_suffix('"')?;
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next()? {
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            c @ ('"' | '\\' | '\'') => out.push(c),
            'x' => out.push(code(&mut chars, 2)?),
            'u' => out.push(code(&mut chars, 4)?),
            'U' => out.push(code(&mut chars, 8)?),
            _ => return None,
        }
    }
    Some(out)
}

fn code(chars: &mut std::str::Chars<'_>, digits: usize) -> Option<char> {
    let hex: String = chars.by_ref().take(digits).collect();
    char::from_u32(
        u32::from_str_radix(&hex, 16)
            .ok()
            .filter(|_| hex.len() == digits)?,
    )
}

/// `INSTANCE_IP` first, then the interfaces' own, loopback and link-local left out.
fn addresses() -> Result<Vec<IpAddr>, AgentError> {
    let mut out: Vec<IpAddr> = Vec::new();
    if let Ok(text) = env::var("INSTANCE_IP")
        && !text.is_empty()
    {
        out.push(text.parse().map_err(|_| {
            AgentError::Config(format!(
                "environment variable INSTANCE_IP: {text:?} is no IP address"
            ))
        })?);
    }
    let interfaces = nix::ifaddrs::getifaddrs()
        .map_err(|e| AgentError::Config(format!("cannot list this pod's addresses: {e}")))?;
    for interface in interfaces {
        let Some(address) = interface.address else {
            continue;
        };
        let ip = if let Some(v4) = address.as_sockaddr_in() {
            IpAddr::V4(v4.ip())
        } else if let Some(v6) = address.as_sockaddr_in6() {
            IpAddr::V6(v6.ip())
        } else {
            continue;
        };
        let local = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if !ip.is_loopback() && !local && !out.contains(&ip) {
            out.push(ip);
        }
    }
    if out.is_empty() {
        return Err(AgentError::Config(
            "this pod has no address: set INSTANCE_IP, or bring an interface up".into(),
        ));
    }
    Ok(out)
}

fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|n| n.trim().to_owned())
        .unwrap_or_default()
}

fn env_or(name: &str, default: &str) -> String {
    env::var(name)
        .ok()
        .filter(|v| !v.is_empty())
        .unwrap_or_else(|| default.to_owned())
}

fn env_port(name: &str, default: u16) -> Result<u16, AgentError> {
    match env::var(name) {
        Ok(v) => number(&v).ok_or_else(|| {
            AgentError::Config(format!("environment variable {name}: {v:?} is not a port"))
        }),
        Err(_) => Ok(default),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// A duration as Go writes and reads it: `1m0s`, `1.5h`, `250ms`.
pub fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        total += value
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "ms" => 1e-3,
                "ns" => 1e-9,
                "s" => 1.0,
                "us" | "µs" => 1e-6,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(total).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, ms) in [
            ("45s", 45_000),
            ("1m0s", 60_000),
            ("1.5h", 5_400_000),
            ("250ms", 250),
            ("0", 0),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "5", "s", "5 s", "-1s", "1w"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn downward_files_are_unquoted_and_bad_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("labels");
        fs::write(&path, "app=\"web\"\nnote=\"a \\\"b\\\"\\n\\u00e9\"\n").unwrap();
        let labels = downward(&path).unwrap();
        assert_eq!(labels["app"], "web");
        assert_eq!(labels["note"], "a \"b\"\né");
        fs::write(&path, "app=\"web\"\nbroken\n").unwrap();
        assert!(
            downward(&path)
                .unwrap_err()
                .to_string()
                .contains("labels:2:")
        );
        assert!(downward(&dir.path().join("none")).unwrap().is_empty());
    }

    #[test]
    fn objects_merge_and_lists_are_replaced() {
        let mut into = json!({"a": {"x": 1, "y": 1}, "l": [1, 2]})
            .as_object()
            .unwrap()
            .clone();
        merge(
            &mut into,
            json!({"a": {"y": 2}, "l": [3]}).as_object().unwrap(),
        );
        assert_eq!(
            Value::Object(into),
            json!({"a": {"x": 1, "y": 2}, "l": [3]})
        );
    }
}
