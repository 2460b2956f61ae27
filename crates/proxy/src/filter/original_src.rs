//! `envoy.filters.http.original_src`: the upstream sees the client's address as its peer.

use std::net::SocketAddr;

use super::{Filter, Interests, Step};
use crate::{
    http::Exchange, listener::UpstreamSource, plan::http_filter::RouteFilterConfig, worker::Worker,
};

#[derive(Debug)]
pub(super) struct OriginalSrcFilter {
    /// SO_MARK of upstream connections; 0 sets none.
    pub(super) mark: u32,
}

impl Filter for OriginalSrcFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        // The client by the rules about x-forwarded-for, as in Envoy.
        exchange.source = exchange.client.map(|client| UpstreamSource {
            address: SocketAddr::new(client, 0),
            mark: self.mark,
        });
        Step::Continue
    }
}
