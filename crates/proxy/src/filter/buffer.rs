//! `envoy.filters.http.buffer`: the whole request is here before the upstream sees any of it.

use super::{Filter, Interests, Step};
use crate::{http::Exchange, plan::http_filter::RouteFilterConfig, worker::Worker};

/// The filter of one connection manager: bytes of a request at most.
#[derive(Debug)]
pub(super) struct BufferFilter(pub(super) u32);

impl Filter for BufferFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        _: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        match config {
            Some(RouteFilterConfig::Buffer(limit)) => Step::Buffer(*limit),
            _ => Step::Buffer(self.0),
        }
    }
}
