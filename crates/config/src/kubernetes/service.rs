//! `v1 Service`.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;

use super::null_as_default;

/// `v1 Service`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Service {
    /// `spec`.
    #[serde(deserialize_with = "null_as_default")]
    pub spec: ServiceSpec,
    /// `status`.
    #[serde(deserialize_with = "null_as_default")]
    pub status: ServiceStatus,
}

/// `spec` of a Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `ClusterIP` (also when empty), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub kind: String,
    /// An address, `None` for a headless service, or empty.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// All addresses of a dual-stack service; the first equals `cluster_ip`.
    #[serde(rename = "clusterIPs", deserialize_with = "null_as_default")]
    pub cluster_ips: Vec<String>,
    /// Addresses outside the cluster that lead here.
    #[serde(rename = "externalIPs", deserialize_with = "null_as_default")]
    pub external_ips: Vec<String>,
    /// Target of an `ExternalName` service.
    pub external_name: String,
    /// The requested load-balancer address.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: String,
    /// Ports.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<ServicePort>,
    /// Labels of the pods behind the service; empty: endpoints come from elsewhere.
    #[serde(deserialize_with = "null_as_default")]
    pub selector: BTreeMap<String, String>,
    /// Whether pods that are not ready count as ready.
    pub publish_not_ready_addresses: bool,
    /// `Cluster` (also when empty) or `Local`.
    pub internal_traffic_policy: String,
    /// `Cluster` (also when empty) or `Local`.
    pub external_traffic_policy: String,
    /// `PreferClose`, `PreferSameZone`, `PreferSameNode` or empty.
    pub traffic_distribution: String,
    /// `IPv4`, `IPv6`, in order of preference.
    #[serde(deserialize_with = "null_as_default")]
    pub ip_families: Vec<String>,
}

/// One port of a Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Its name; may be empty where there is one port.
    pub name: String,
    /// `TCP` (also when empty), `UDP` or `SCTP`.
    pub protocol: String,
    /// 1–65535.
    pub port: u16,
    /// Port of the pod, by number or by the container port's name; defaults to `port`.
    #[serde(deserialize_with = "null_as_default")]
    pub target_port: Option<IntOrString>,
    /// Port on every node, or 0.
    pub node_port: u16,
    /// Application protocol; wins over the name's prefix.
    #[serde(deserialize_with = "null_as_default")]
    pub app_protocol: Option<String>,
}

/// `status` of a Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    #[serde(deserialize_with = "null_as_default")]
    load_balancer: LoadBalancerStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct LoadBalancerStatus {
    #[serde(deserialize_with = "null_as_default")]
    ingress: Vec<LoadBalancerIngress>,
}

/// One address of the load balancer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct LoadBalancerIngress {
    /// Its address, or empty.
    pub ip: String,
    /// Its name, or empty.
    pub hostname: String,
}

/// Kubernetes' number-or-name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// A number.
    Int(u16),
    /// A name (or a number in quotes, which Kubernetes takes as a name).
    String(String),
}

impl ServiceStatus {
    /// `status.loadBalancer.ingress`.
    pub fn ingress(&self) -> &[LoadBalancerIngress] {
        &self.load_balancer.ingress
    }
}

impl Service {
    /// Whether `clusterIP: None`.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ip == "None"
    }

    /// Whether `type: ExternalName`.
    pub fn is_external_name(&self) -> bool {
        self.spec.kind == "ExternalName"
    }
}

impl ServicePort {
    /// The protocol with Kubernetes' default.
    pub fn protocol(&self) -> &str {
        if self.protocol.is_empty() {
            "TCP"
        } else {
            &self.protocol
        }
    }
}

impl fmt::Display for IntOrString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IntOrString::Int(n) => n.fmt(f),
            IntOrString::String(s) => s.fmt(f),
        }
    }
}
