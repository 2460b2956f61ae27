//! Hosts that a request names for itself: for the `override_host` load balancing policy, and for ORIGINAL_DST with
//! `use_http_header`.

use std::net::SocketAddr;

use crate::{
    cluster::Cluster,
    http::Exchange,
    plan::{
        cluster::Discovery, filter_state::ObjectKind, lb::OverrideSource, route_match::RequestView,
    },
};

/// Most requests name one host.
pub(crate) type Preferred = smallvec::SmallVec<[SocketAddr; 2]>;

/// The addresses in the request's headers and metadata, in order; what is not an address is left out.
pub(crate) fn hosts(cluster: &Cluster, exchange: &Exchange<'_>) -> Preferred {
    let mut found = Preferred::new();
    for source in &cluster.plan.override_sources {
        let text = match source {
            OverrideSource::Header(name) => exchange.request.get_str(name),
            OverrideSource::Metadata(namespace, path) => exchange
                .dynamic_metadata(namespace)
                .and_then(|root| path.iter().try_fold(root, |value, key| value.get(&**key)))
                .and_then(serde_json::Value::as_str),
        };
        let addresses = text.into_iter().flat_map(|text| text.split(','));
        found.extend(addresses.filter_map(|address| address.trim().parse().ok()));
    }
    found
}

/// Where the client wanted to go: what a header says, where the cluster reads one, else what filters say, else what the
/// connection was meant for.
pub(crate) fn original_dst(cluster: &Cluster, exchange: &Exchange<'_>) -> Option<SocketAddr> {
    if let Discovery::OriginalDst {
        http_header: Some(name),
        ..
    } = &cluster.plan.discovery
        && let Some(text) = exchange.request.get_str(name)
    {
        match text.trim().parse() {
            Ok(address) => return Some(address),
            Err(_) => cluster.stats().original_dst_host_invalid().inc(),
        }
    }
    let named = exchange.well_known(ObjectKind::OriginalDst);
    match named.and_then(serde_json::Value::as_str) {
        Some(address) => address.parse().ok(),
        None => exchange.connection.original_dst(),
    }
}
