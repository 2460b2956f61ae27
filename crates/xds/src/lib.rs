//! The xDS transport protocol, both ends, aggregated (ADS), in its delta and its state-of-the-world form.
//!
//! The rules — subscriptions, nonces, versions, ACK and NACK, resubscription — are sans-io state machines:
//! [`server::Stream`] for the control plane's end of one stream, [`client::Session`] for the proxy's. Around them
//! stand thin tonic adaptors: [`server::Service`] and [`client::connect`].
//!
//! Specification: Envoy's "xDS REST and gRPC protocol" page; where istiod's practice is stricter it is named in place.

pub mod client;
pub mod resource;
pub mod server;
pub mod type_url;

pub use resource::{Resource, ResourceSet};

/// Which of the two forms of the protocol a stream speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Changes only: `DeltaAggregatedResources`.
    Delta,
    /// State of the world: `StreamAggregatedResources`.
    Sotw,
}
