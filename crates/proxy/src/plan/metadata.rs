//! Metadata: free structures by filter name, attached to hosts, clusters, listeners and routes.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

/// Structures by namespace (`istio`, `envoy.transport_socket_match` …). Cheap to clone; most objects have none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata(Option<Arc<BTreeMap<String, Value>>>);

impl Metadata {
    /// The given structures by namespace.
    pub fn new(by_namespace: BTreeMap<String, Value>) -> Self {
        Self((!by_namespace.is_empty()).then(|| Arc::new(by_namespace)))
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The structure of one namespace.
    pub fn namespace(&self, name: &str) -> Option<&Value> {
        self.0.as_ref()?.get(name)
    }

    /// The value under a path of keys inside a namespace.
    pub fn lookup<'a>(&'a self, namespace: &str, path: &[impl AsRef<str>]) -> Option<&'a Value> {
        let root = self.namespace(namespace)?;
        path.iter().try_fold(root, |v, key| v.get(key.as_ref()))
    }

    /// Every namespace with its structure, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0
            .iter()
            .flat_map(|m| m.iter().map(|(k, v)| (k.as_str(), v)))
    }
}

/// The namespace that load balancing looks at.
pub const LB: &str = "envoy.lb";

/// The namespace that [`crate::plan::cluster::TransportMatch`] looks at on an endpoint.
pub const TRANSPORT_SOCKET_MATCH: &str = "envoy.transport_socket_match";
