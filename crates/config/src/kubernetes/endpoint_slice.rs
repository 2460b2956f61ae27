//! `discovery.k8s.io/v1 EndpointSlice`.

use serde::Deserialize;

use super::null_as_default;

/// The label that names the Service of a slice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// `discovery.k8s.io/v1 EndpointSlice`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// What `addresses` are.
    pub address_type: AddressType,
    /// Endpoints.
    #[serde(deserialize_with = "null_as_default")]
    pub endpoints: Vec<Endpoint>,
    /// Ports that all endpoints serve.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<EndpointPort>,
}

/// `addressType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum AddressType {
    /// IPv4 addresses.
    #[default]
    IPv4,
    /// IPv6 addresses.
    IPv6,
    /// Names; a mesh does not use such slices.
    #[serde(rename = "FQDN")]
    Fqdn,
}

/// One endpoint of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    /// Addresses; only the first is used by Kubernetes itself.
    #[serde(deserialize_with = "null_as_default")]
    pub addresses: Vec<String>,
    /// Conditions.
    #[serde(deserialize_with = "null_as_default")]
    pub conditions: EndpointConditions,
    /// Host name below the service's, or empty.
    #[serde(deserialize_with = "null_as_default")]
    pub hostname: String,
    /// The node it runs on, or empty.
    #[serde(deserialize_with = "null_as_default")]
    pub node_name: String,
    /// Its zone, or empty.
    #[serde(deserialize_with = "null_as_default")]
    pub zone: String,
    /// The pod behind it.
    #[serde(deserialize_with = "null_as_default")]
    pub target_ref: Option<TargetRef>,
}

/// `conditions` of an endpoint; `None` is "unknown", which counts as ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// Ready for traffic.
    pub ready: Option<bool>,
    /// Able to serve, even while terminating.
    pub serving: Option<bool>,
    /// Going away.
    pub terminating: Option<bool>,
}

/// The object behind an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// `Pod` for all that matters here.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
}

/// One port of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// Name of the service's port, or empty.
    #[serde(deserialize_with = "null_as_default")]
    pub name: String,
    /// `TCP` (also when empty), `UDP` or `SCTP`.
    #[serde(deserialize_with = "null_as_default")]
    pub protocol: String,
    /// The number; `None` means "all ports".
    pub port: Option<u16>,
    /// Application protocol.
    pub app_protocol: Option<String>,
}
