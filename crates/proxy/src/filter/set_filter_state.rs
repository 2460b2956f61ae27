//! `envoy.filters.http.set_filter_state`: objects made of the request's head, for routes, load balancing and logs.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Filter, Interests, Step, route_configs};
use crate::{
    filter_state,
    http::Exchange,
    plan::{filter_state::RequestState, http_filter::RouteFilterConfig},
    worker::Worker,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct SetFilterState {
    pub(super) name: Arc<str>,
    pub(super) config: Arc<RequestState>,
}

impl Filter for SetFilterState {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        // The filter's own objects, then those of the virtual host and of the route.
        make(&self.config, exchange);
        let route = exchange.route.clone();
        let levels: SmallVec<[_; 4]> = route_configs(&route, &self.name).collect();
        for config in levels.into_iter().rev() {
            if let RouteFilterConfig::SetFilterState(config) = config {
                make(config, exchange);
            }
        }
        // What a route says of this is not read, in Envoy too.
        exchange.clear_route |= self.config.clear_route_cache;
        Step::Continue
    }
}

fn make(config: &RequestState, exchange: &mut Exchange<'_>) {
    for value in &config.on_request {
        let text = filter_state::text(value, exchange);
        exchange.filter_state.make(value, text);
    }
}
