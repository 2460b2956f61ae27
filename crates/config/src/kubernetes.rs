//! The Kubernetes kinds that a mesh reads, with the fields that matter to it.
//!
//! Other fields are passed over: the API server has validated these objects, or would have. A wrong type in a field that
//! is read is an error with its path.

mod endpoint_slice;
mod pod;
mod service;

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Deserializer, de::Error};

pub use endpoint_slice::{
    AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice, SERVICE_NAME_LABEL,
    TargetRef,
};
pub use pod::{Container, ContainerPort, Pod, PodCondition, PodSpec, PodStatus};
pub use service::{
    IntOrString, LoadBalancerIngress, Service, ServicePort, ServiceSpec, ServiceStatus,
};

/// `v1 Namespace`: everything that matters is in its metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Namespace {}

/// `v1 Node`: topology labels are in its metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Node {
    /// `status`.
    #[serde(deserialize_with = "null_as_default")]
    pub status: NodeStatus,
}

/// `status` of a Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses by type (`InternalIP`, `ExternalIP`, `Hostname` …).
    #[serde(deserialize_with = "null_as_default")]
    pub addresses: Vec<NodeAddress>,
    /// What runs on it.
    #[serde(rename = "nodeInfo", deserialize_with = "null_as_default")]
    pub info: NodeInfo,
}

/// `status.nodeInfo` of a Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeInfo {
    /// e.g. `v1.36.3`.
    pub kubelet_version: String,
}

/// One element of `status.addresses` of a Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` …
    #[serde(rename = "type")]
    pub kind: String,
    /// The address.
    pub address: String,
}

/// `v1 ServiceAccount`: its name is all that matters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ServiceAccount {}

/// `v1 ConfigMap`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigMap {
    /// Text by key.
    #[serde(deserialize_with = "null_as_default")]
    pub data: BTreeMap<String, String>,
    /// Bytes by key (base64 in the file).
    #[serde(deserialize_with = "bytes_map")]
    pub binary_data: BTreeMap<String, Vec<u8>>,
}

/// `v1 Secret`; its content never appears in a log or dump.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Secret {
    /// e.g. `kubernetes.io/tls`.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(deserialize_with = "bytes_map")]
    data: BTreeMap<String, Vec<u8>>,
    #[serde(deserialize_with = "null_as_default")]
    string_data: BTreeMap<String, String>,
}

impl Secret {
    /// The bytes under `key`; `stringData` wins over `data`, as in a cluster.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        match self.string_data.get(key) {
            Some(text) => Some(text.as_bytes()),
            None => self.data.get(key).map(Vec::as_slice),
        }
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys: Vec<&String> = self.data.keys().chain(self.string_data.keys()).collect();
        f.debug_struct("Secret")
            .field("kind", &self.kind)
            .field("keys", &keys)
            .finish_non_exhaustive()
    }
}

pub(crate) use crate::object::null_as_default;

fn bytes_map<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, Vec<u8>>, D::Error> {
    let text = Option::<BTreeMap<String, String>>::deserialize(deserializer)?.unwrap_or_default();
    text.into_iter()
        .map(|(key, value)| {
            // Folded YAML scalars leave line breaks inside base64.
            let clean: String = value.split_whitespace().collect();
            match BASE64_STANDARD.decode(clean) {
                Ok(bytes) => Ok((key, bytes)),
                Err(e) => Err(D::Error::custom(format!(
                    "{key}: not base64 ({e}); plain text goes under stringData"
                ))),
            }
        })
        .collect()
}
