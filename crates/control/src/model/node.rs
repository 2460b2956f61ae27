//! The xDS Node of a proxy: what it says about itself when it connects.

use std::net::IpAddr;

use proto::{
    envoy::config::core::v3::{Locality, Node as EnvoyNode},
    istio::mesh::v1alpha1::ProxyConfig,
};
use serde_json::Value;

use super::Labels;

/// What kind of proxy asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NodeKind {
    Sidecar,
    /// A gateway.
    Router,
}

/// How traffic comes to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Interception {
    #[default]
    Redirect,
    Tproxy,
    /// Nothing is captured: listeners bind real ports.
    None,
}

/// Why a Node is not one that can be served.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NodeError {
    #[error(
        "node id {0:?} is not TYPE~IP~POD.NAMESPACE~DOMAIN: start the proxy with --service-node of that form"
    )]
    Form(String),
    #[error("node type {kind:?} in node id {id:?} is not served: use sidecar or router")]
    Kind { kind: String, id: String },
    #[error("node id {0:?} and metadata INSTANCE_IPS hold no IP address: set one of them")]
    Address(String),
    #[error("node metadata {key}: {message}")]
    Metadata { key: &'static str, message: String },
}

/// A container port that the proxy's pod declares (`POD_PORTS`).
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
pub struct PodPort {
    pub name: String,
    pub container_port: u32,
    pub protocol: String,
}

/// The Node, read once when a stream opens.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// `TYPE~IP~POD.NAMESPACE~DOMAIN`.
    pub id: String,
    pub kind: NodeKind,
    /// The third part of the id: `POD.NAMESPACE`.
    pub workload: String,
    /// All addresses, the first one first.
    pub addresses: Vec<IpAddr>,
    /// DNS domain of the proxy: `NAMESPACE.svc.cluster.local`.
    pub domain: String,
    /// The namespace whose configuration it gets.
    pub namespace: String,
    pub version: IstioVersion,
    /// `node.cluster`.
    pub cluster: String,
    pub locality: Option<Locality>,
    pub interception: Interception,
    /// `LABELS`: of the pod template.
    pub labels: Labels,
    pub static_labels: Labels,
    /// `PROXY_CONFIG`: ProxyConfig as frozen at injection, where the proxy sent it.
    pub proxy_config: Option<ProxyConfig>,
    pub pod_ports: Vec<PodPort>,
    /// All metadata as sent.
    pub metadata: Value,
}

impl Node {
    /// Reads a Node.
    pub fn parse(node: &EnvoyNode) -> Result<Self, NodeError> {
        let parts: Vec<&str> = node.id.split('~').collect();
        let [kind, ip, workload, domain] = parts[..] else {
            return Err(NodeError::Form(node.id.clone()));
        };
        let kind = match kind {
            "sidecar" => NodeKind::Sidecar,
            "router" => NodeKind::Router,
            other => {
                return Err(NodeError::Kind {
                    kind: other.to_owned(),
                    id: node.id.clone(),
                });
            }
        };
        let metadata = node
            .metadata
            .as_ref()
            .map_or(Value::Null, |m| object(&m.fields));
        let mut addresses: Vec<IpAddr> = list(&metadata, "INSTANCE_IPS");
        if addresses.is_empty() {
            addresses.extend(ip.parse::<IpAddr>().ok());
        }
        if addresses.is_empty() {
            return Err(NodeError::Address(node.id.clone()));
        }
        let namespace = match text(&metadata, "NAMESPACE") {
            Some(namespace) => namespace.to_owned(),
            None => domain
                .split_once('.')
                .map_or("", |(first, _)| first)
                .to_owned(),
        };
        let proxy_config = match metadata.get("PROXY_CONFIG") {
            None | Some(Value::Null) => None,
            Some(value) => {
                Some(
                    proto::json::from_value(value).map_err(|e| NodeError::Metadata {
                        key: "PROXY_CONFIG",
                        message: e.to_string(),
                    })?,
                )
            }
        };
        let pod_ports = match metadata.get("POD_PORTS") {
            Some(Value::String(text)) if !text.is_empty() => {
                serde_json::from_str(text).map_err(|e| NodeError::Metadata {
                    key: "POD_PORTS",
                    message: format!("not a JSON list of ports: {e}"),
                })?
            }
            _ => Vec::new(),
        };
        Ok(Self {
            id: node.id.clone(),
            kind,
            workload: workload.to_owned(),
            addresses,
            domain: domain.to_owned(),
            namespace,
            version: IstioVersion::parse(text(&metadata, "ISTIO_VERSION").unwrap_or_default()),
            cluster: node.cluster.clone(),
            locality: node.locality.clone(),
            interception: match text(&metadata, "INTERCEPTION_MODE") {
                Some("TPROXY") => Interception::Tproxy,
                Some("NONE") => Interception::None,
                _ => Interception::Redirect,
            },
            labels: map(&metadata, "LABELS"),
            static_labels: map(&metadata, "STATIC_LABELS"),
            proxy_config,
            pod_ports,
            metadata,
        })
    }

    /// Whether the proxy has Istio's own filters. A plain Envoy has not, and would reject what names them: it says so by
    /// the metadata `ISTIO_FILTERS: "false"`.
    pub fn has_istio_filters(&self) -> bool {
        self.meta("ISTIO_FILTERS") != Some("false")
    }

    /// A metadata value that is a non-empty string.
    pub fn meta(&self, key: &str) -> Option<&str> {
        text(&self.metadata, key)
    }

    /// A metadata flag: `true`, `"true"` or `"1"`.
    pub fn flag(&self, key: &str) -> bool {
        match self.metadata.get(key) {
            Some(Value::Bool(on)) => *on,
            Some(Value::String(on)) => matches!(on.as_str(), "true" | "1"),
            _ => false,
        }
    }

    /// A metadata number, given as one or as text.
    pub fn number(&self, key: &str) -> Option<u32> {
        match self.metadata.get(key)? {
            Value::Number(n) => n.as_f64().map(|n| n as u32),
            Value::String(n) => n.parse().ok(),
            _ => None,
        }
    }

    /// The Kubernetes cluster that the proxy runs in.
    pub fn cluster_id(&self) -> &str {
        self.meta("CLUSTER_ID").unwrap_or_default()
    }

    /// `POD` of `POD.NAMESPACE`.
    pub fn pod_name(&self) -> &str {
        self.workload
            .rsplit_once('.')
            .map_or(&self.workload, |(pod, _)| pod)
    }

    /// Whether one of its addresses is IPv4.
    pub fn supports_v4(&self) -> bool {
        self.addresses.iter().any(IpAddr::is_ipv4)
    }

    /// Whether one of its addresses is IPv6.
    pub fn supports_v6(&self) -> bool {
        self.addresses.iter().any(IpAddr::is_ipv6)
    }
}

/// Istio's version of a proxy; an unknown one counts as the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IstioVersion {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl IstioVersion {
    /// Newer than every release.
    pub const NEWEST: Self = Self {
        major: u32::MAX,
        minor: u32::MAX,
        patch: u32::MAX,
    };

    /// Reads `1.30.2`, `1.30-dev`, `1.30.0-alpha.1`; anything else is [`IstioVersion::NEWEST`].
    pub fn parse(text: &str) -> Self {
        let core = text.split(['-', '_', '+']).next().unwrap_or_default();
        let mut parts = core.split('.');
        let mut next = || parts.next().and_then(|p| p.parse::<u32>().ok());
        match (next(), next()) {
            (Some(major), Some(minor)) => Self {
                major,
                minor,
                patch: next().unwrap_or(u32::MAX),
            },
            _ => Self::NEWEST,
        }
    }

    /// Whether it is at least `major.minor.patch`.
    pub fn at_least(self, major: u32, minor: u32, patch: u32) -> bool {
        self >= Self {
            major,
            minor,
            patch,
        }
    }
}

/// A protobuf struct as JSON.
pub(crate) fn value_of(from: &proto::Struct) -> Value {
    object(&from.fields)
}

fn object(fields: &std::collections::BTreeMap<String, proto::Value>) -> Value {
    Value::Object(fields.iter().map(|(k, v)| (k.clone(), value(v))).collect())
}

fn value(from: &proto::Value) -> Value {
    use proto::prost_types::value::Kind;
    match &from.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(n)) => {
            serde_json::Number::from_f64(*n).map_or(Value::Null, Value::Number)
        }
        Some(Kind::StringValue(s)) => Value::String(s.clone()),
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::StructValue(s)) => object(&s.fields),
        Some(Kind::ListValue(l)) => Value::Array(l.values.iter().map(value).collect()),
    }
}

fn text<'a>(metadata: &'a Value, key: &str) -> Option<&'a str> {
    metadata.get(key)?.as_str().filter(|t| !t.is_empty())
}

fn list(metadata: &Value, key: &str) -> Vec<IpAddr> {
    text(metadata, key)
        .into_iter()
        .flat_map(|t| t.split(','))
        .filter_map(|t| t.trim().parse().ok())
        .collect()
}

fn map(metadata: &Value, key: &str) -> Labels {
    let entries = metadata
        .get(key)
        .and_then(Value::as_object)
        .into_iter()
        .flatten();
    entries
        .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_must_name_type_address_and_domain() {
        let parse = |id: &str| {
            Node::parse(&EnvoyNode {
                id: id.to_owned(),
                ..EnvoyNode::default()
            })
        };
        let node = parse("sidecar~10.0.0.1~p.ns~ns.svc.cluster.local").unwrap();
        assert_eq!((node.namespace.as_str(), node.pod_name()), ("ns", "p"));
        assert!(node.supports_v4() && !node.supports_v6());
        assert!(matches!(
            parse("sidecar~10.0.0.1~p.ns"),
            Err(NodeError::Form(_))
        ));
        assert!(matches!(
            parse("robot~10.0.0.1~p.ns~d"),
            Err(NodeError::Kind { .. })
        ));
        assert!(matches!(
            parse("sidecar~x~p.ns~d"),
            Err(NodeError::Address(_))
        ));
    }

    #[test]
    fn versions_compare() {
        assert!(IstioVersion::parse("1.30.0").at_least(1, 29, 2));
        assert!(!IstioVersion::parse("1.29.1").at_least(1, 29, 2));
        assert!(IstioVersion::parse("1.29-dev").at_least(1, 29, 2));
        assert_eq!(IstioVersion::parse("dev"), IstioVersion::NEWEST);
    }
}
