//! What the newest version of its listener says of a connection that is open.
//!
//! A changed chain drains: its connections go on by the old one for a while, which in Envoy is also by the old policies. A
//! policy says who may talk, so here a connection or request that the new one denies ends as soon as that is in place.

use std::{borrow::Cow, sync::Arc};

use super::{ConnectionInfo, Listeners};
use crate::{
    filter::{rbac::details, route_config},
    http::{Exchange, LocalReply},
    plan::{
        FilterChain,
        http_filter::HttpFilterConfig,
        network::NetworkFilterConfig,
        rbac::{Engine, Rbac},
    },
};

impl Listeners {
    /// Why a connection would not be let in any more. `None` where it would, and where nothing takes it any more: then
    /// it drains.
    pub(crate) fn denies(&self, info: &ConnectionInfo) -> Option<Cow<'static, str>> {
        let chain = self.newest_chain(info)?;
        chain
            .filters
            .iter()
            .find_map(|filter| match &filter.config {
                NetworkFilterConfig::Rbac(_, plan) => enforced(plan)
                    .map(|rules| rules.decide(info))
                    .filter(|decision| !decision.allowed)
                    .map(details),
                _ => None,
            })
    }

    /// The answer to a request that would not be let in any more.
    pub(crate) fn denies_request(&self, exchange: &Exchange<'_>) -> Option<LocalReply> {
        let chain = self.newest_chain(exchange.connection)?;
        let managers = chain
            .filters
            .iter()
            .filter_map(|filter| match &filter.config {
                NetworkFilterConfig::HttpConnectionManager(plan) => Some(plan),
                _ => None,
            });
        managers
            .flat_map(|plan| &plan.http_filters)
            // Where a route has its own word, it is the route's that counts, and routes are always the newest.
            .filter(|filter| {
                !filter.disabled && route_config(&exchange.route, &filter.name).is_none()
            })
            .find_map(|filter| match &filter.config {
                HttpFilterConfig::Rbac(plan) => enforced(plan)
                    .map(|rules| rules.decide(exchange))
                    .filter(|decision| !decision.allowed)
                    .map(|decision| LocalReply::new(403, "RBAC: access denied", details(decision))),
                _ => None,
            })
    }

    /// The chain that a connection would find if it began now.
    fn newest_chain(&self, info: &ConnectionInfo) -> Option<Arc<FilterChain>> {
        let listener = self.find(&info.listener.name)?.current();
        let protocols: Vec<&str> = info.application_protocols.iter().map(|p| &**p).collect();
        listener
            .plan
            .find_chain(&info.to_match(&protocols))
            .cloned()
    }
}

/// The rules of a filter that are more than words in a log.
fn enforced(plan: &Rbac) -> Option<&Engine> {
    plan.rules.as_ref().filter(|rules| !rules.only_logs())
}
