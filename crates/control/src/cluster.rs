//! CDS: the clusters of a proxy.
//!
//! [`outbound`] makes those for the services that it sees (the same for all proxies of one `Proxy::view_key`), and
//! [`inbound`] those for the ports that it serves itself (the same for one `Proxy::inbound_key`). Names are Istio's:
//! `outbound|PORT|SUBSET|HOST`, `inbound|PORT||`, and the fixed ones that traffic to nowhere in particular takes.

mod draft;
mod inbound;
mod outbound;
mod policy;
pub(crate) mod tls;

pub use inbound::inbound;
pub use outbound::outbound;

use std::collections::BTreeSet;

use crate::model::{Mesh, Proxy, Resource};

/// Inbound traffic to a port that no service names.
pub const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";

/// All clusters of a proxy, each name once: of two with one name the first stays.
pub fn build(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    let mut out = outbound(mesh, proxy);
    out.extend(inbound(mesh, proxy));
    let mut seen = BTreeSet::new();
    out.retain(|r| {
        let first = seen.insert(r.name.clone());
        if !first {
            tracing::warn!(
                "cluster {} of proxy {} is made twice; the first one stays",
                r.name,
                proxy.node.id
            );
        }
        first
    });
    out
}
