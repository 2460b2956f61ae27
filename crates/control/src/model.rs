//! The model of the mesh that translation reads.
//!
//! [`Mesh`] is made from a `config::Snapshot`: services, workloads and endpoints from Kubernetes' objects and
//! ServiceEntries; VirtualServices, DestinationRules, Gateways and PeerAuthentications by who sees them. A [`Node`] is
//! what a proxy says about itself; [`Proxy`] places it in a mesh: its labels, the services that it serves, and its
//! [`SidecarScope`], which is all that it may see. Translation is a pure function of mesh and proxy, and proxies with
//! the same [`Proxy::view_key`] share its result.

pub mod destination_rule;
mod discovery;
pub mod endpoint;
pub mod endpoints;
pub mod gateway;
pub mod host;
pub mod kubernetes;
pub mod mesh;
pub mod node;
pub mod origin;
pub mod peer_authentication;
pub mod port;
pub mod proxy;
pub(crate) mod referenced;
pub mod service;
mod service_entry;
pub mod services;
pub mod sidecar;
mod targets;
pub mod virtual_service;
pub mod workload;

pub use destination_rule::MergedRule;
pub use endpoint::{Endpoint, Health};
pub use gateway::BoundGateway;
pub use mesh::{Mesh, Settings};
pub use node::{Interception, IstioVersion, Node, NodeError, NodeKind};
pub use origin::{Origin, Resource};
pub use peer_authentication::{MtlsMode, WorkloadMtls};
pub use port::{Port, Protocol, TargetPort};
pub use proxy::{Proxy, ServiceTarget};
pub use service::{Registry, Resolution, Service};
pub use services::Services;
pub use sidecar::{EgressListener, OutboundMode, SidecarScope};
pub use virtual_service::{MESH, Routes};

/// Labels or annotations, sorted.
pub type Labels = std::collections::BTreeMap<String, String>;

/// When an object was made, in seconds since the epoch; 0 where nobody says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Created(pub i64);
