//! Which rate limits a request falls under, and the descriptors that they make of it: for the filters that limit rates.

use std::net::IpAddr;

use serde_json::Value;

use crate::{
    access_log::{self, format},
    http::{Exchange, RouteRef},
    plan::{
        Metadata,
        cel::Expr,
        filter_config::VirtualHostLimits,
        format::Template,
        rate_limit::{Descriptor, FORMAT_SWITCH, RateLimit, RateLimitContext},
        route::Action,
    },
    router,
    worker::Worker,
};

/// The rate limits that count for a filter: its own, or else those of the route and its virtual host.
pub(super) fn limits<'l>(
    own: &'l [RateLimit],
    stage: u32,
    virtual_host: VirtualHostLimits,
    route: &'l RouteRef,
) -> impl Iterator<Item = &'l RateLimit> {
    let (first, second, stage) = match (own, route.get()) {
        ([], None) => (&[][..], &[][..], None),
        ([], Some((host, route))) => {
            let (of_route, include) = match &route.action {
                Action::Route(action) => (&*action.rate_limits, action.include_vh_rate_limits),
                _ => (&[][..], false),
            };
            let with_host = include
                || match virtual_host {
                    VirtualHostLimits::Override => of_route.is_empty(),
                    VirtualHostLimits::Include => true,
                    VirtualHostLimits::Ignore => false,
                };
            let of_host = if with_host { &*host.rate_limits } else { &[] };
            (of_route, of_host, Some(stage))
        }
        // A filter's own have no stage.
        (own, _) => (own, &[][..], None),
    };
    let all = first.iter().chain(second);
    all.filter(move |limit| stage.is_none_or(|stage| limit.stage == stage))
}

/// A request whose rate is limited.
pub(super) struct Limited<'e, 'c> {
    pub(super) exchange: &'e Exchange<'c>,
    /// The route that it is limited by.
    pub(super) route: &'e RouteRef,
    pub(super) worker: &'e Worker,
}

impl Limited<'_, '_> {
    /// The descriptors of the limits that are asked for now, or at the end of the request.
    pub(super) fn descriptors<'l>(
        &self,
        limits: impl Iterator<Item = &'l RateLimit>,
        at_end: bool,
    ) -> Vec<Descriptor> {
        limits
            .filter(|limit| limit.apply_on_stream_done == at_end)
            .filter_map(|limit| limit.descriptor(self.exchange, self))
            .collect()
    }
}

impl RateLimitContext for Limited<'_, '_> {
    fn service_cluster(&self) -> &str {
        &self.worker.bootstrap.node.cluster
    }

    fn route_cluster(&self) -> Option<&str> {
        router::route_cluster(self.route, &self.exchange.request)
    }

    fn client(&self) -> Option<IpAddr> {
        self.exchange.client
    }

    fn route_metadata(&self) -> Option<&Metadata> {
        Some(&self.route.route()?.metadata)
    }

    fn formats_values(&self) -> bool {
        let switch = self.worker.bootstrap.runtime.get(FORMAT_SWITCH);
        switch == Some(&Value::Bool(true))
    }

    fn format(&self, template: &Template) -> String {
        let mut out = Vec::new();
        format::header_value(template, self.exchange, None, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    fn expression(&self, expression: &Expr) -> Option<String> {
        access_log::expression(expression, self.exchange)
    }
}
