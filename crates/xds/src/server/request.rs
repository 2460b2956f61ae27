//! What a client asks, the same for both forms of the protocol.

use proto::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
};

/// A request on an ADS stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Who asks. Sent with the first request of a stream at least.
    pub node: Option<Node>,
    /// Which type of resource it is about.
    pub type_url: String,
    /// The response that this acknowledges; empty for a request of its own accord.
    pub nonce: String,
    /// Set when the response was rejected: why.
    pub error: Option<String>,
    /// Version that the client holds (state of the world only).
    pub version: String,
    /// What is asked for.
    pub names: Names,
}

/// The resources that a request names.
#[derive(Debug, Clone, PartialEq)]
pub enum Names {
    /// Changes to the subscription.
    Delta {
        /// Names to add; `*` is everything.
        subscribe: Vec<String>,
        /// Names to drop.
        unsubscribe: Vec<String>,
        /// What the client holds from an earlier stream: name and version.
        initial: Vec<(String, String)>,
    },
    /// The whole subscription.
    Sotw(Vec<String>),
}

impl From<DiscoveryRequest> for Request {
    fn from(r: DiscoveryRequest) -> Self {
        Self {
            node: r.node,
            type_url: r.type_url,
            nonce: r.response_nonce,
            error: r.error_detail.map(|e| e.message),
            version: r.version_info,
            names: Names::Sotw(r.resource_names),
        }
    }
}

impl From<DeltaDiscoveryRequest> for Request {
    fn from(r: DeltaDiscoveryRequest) -> Self {
        Self {
            node: r.node,
            type_url: r.type_url,
            nonce: r.response_nonce,
            error: r.error_detail.map(|e| e.message),
            version: String::new(),
            names: Names::Delta {
                subscribe: r.resource_names_subscribe,
                unsubscribe: r.resource_names_unsubscribe,
                initial: r.initial_resource_versions.into_iter().collect(),
            },
        }
    }
}
