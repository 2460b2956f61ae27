//! What becomes of a request that has a route: where it goes, in which form, how long it may take
//! and how often it may be tried. Pure decisions; `http/forward.rs` carries them out.

pub mod check;
pub(crate) mod hash;
pub(crate) mod headers;
pub(crate) mod preferred;
pub(crate) mod redirect;
pub(crate) mod retry;
pub(crate) mod rewrite;
pub(crate) mod strict;
pub(crate) mod timeout;

use std::rc::Rc;

use outrigger_http::RequestHead;

use crate::{
    cluster::{Cluster, Priority},
    http::{Exchange, Flags, LocalReply, RouteRef},
    plan::route::{
        Action, ClusterSpecifier, HostRewrite, MetadataMatch, Priority as RoutePriority,
        RouteAction, WeightedTarget,
    },
    worker::Worker,
};

/// Where a request goes.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) cluster: Rc<Cluster>,
    pub(crate) priority: Priority,
    /// The host header becomes the chosen host's name.
    pub(crate) auto_host: bool,
    /// From the hash policy; worked out of the request as the upstream gets it.
    pub(crate) hash: Option<u64>,
    /// From the route and the weighted cluster.
    pub(crate) metadata_match: MetadataMatch,
}

/// Finds the cluster, or the reply that the route gives instead. `envoy_headers`: a path that a redirect replaces is kept
/// in `x-envoy-original-path`.
pub(crate) fn target(
    exchange: &mut Exchange<'_>,
    worker: &Worker,
    envoy_headers: bool,
) -> Result<Target, LocalReply> {
    if exchange.route.tls_redirect {
        let to = https_redirect(&exchange.request);
        return Err(LocalReply::new(301, "", "https_redirect").header("location", to));
    }
    let Some((_, route)) = exchange.route.get() else {
        return Err(LocalReply::new(404, "", "route_not_found").flag(Flags::NO_ROUTE_FOUND));
    };
    let action = match &route.action {
        Action::Route(action) => action,
        Action::Redirect(redirect) => {
            let location = redirect::location(redirect, &route.matches, exchange);
            let reply = LocalReply::new(redirect.status, "", "direct_response");
            redirect::rewrite(exchange, envoy_headers);
            return Err(reply.header("location", location));
        }
        Action::DirectResponse(direct) => {
            let reply =
                LocalReply::new(direct.status, "", "direct_response").body(direct.body.clone());
            return Err(match direct.body_format.clone() {
                Some(format) => reply.formatted(&format, exchange),
                None => reply,
            });
        }
        Action::NonForwarding => {
            return Err(LocalReply::new(404, "", "route_not_found").flag(Flags::NO_ROUTE_FOUND));
        }
    };
    let weighted = exchange.route.weighted;
    let name = route_cluster(&exchange.route, &exchange.request).unwrap_or_default();
    let missing = action.cluster_not_found_status;
    let auto_host = action.host_rewrite == HostRewrite::Auto;
    let priority = match action.priority {
        RoutePriority::Default => Priority::Default,
        RoutePriority::High => Priority::High,
    };
    let metadata_match = metadata_match(action, weighted);
    let found = worker.clusters.find(name);
    let plan = found.as_ref().map(|found| found.plan.clone());
    exchange.upstream.wants(name, plan);
    let Some(cluster) = found else {
        return Err(LocalReply::new(missing, "", "cluster_not_found").flag(Flags::NO_CLUSTER_FOUND));
    };
    exchange.upstream.routed = true;
    Ok(Target {
        cluster,
        priority,
        auto_host,
        hash: None,
        metadata_match,
    })
}

/// Notes the cluster that the route names, for a request that a filter answers before the router looks for it.
pub(crate) fn note_cluster(exchange: &mut Exchange<'_>, worker: &Worker) {
    let name = route_cluster(&exchange.route, &exchange.request);
    if let Some(name) = name.filter(|_| exchange.upstream.cluster.is_none()) {
        let found = worker.clusters.find(name);
        exchange
            .upstream
            .wants(name, found.map(|found| found.plan.clone()));
    }
}

/// Where a virtual host that wants TLS sends a request without.
fn https_redirect(request: &RequestHead) -> String {
    format!("https://{}{}", request.authority(), request.path())
}

/// Draws among the clusters of a weighted route, each time that the route was found: what the drawn entry says about
/// filters counts for all of them.
pub(crate) fn draw(exchange: &mut Exchange<'_>, random: impl FnOnce() -> u64) {
    let drawn = exchange
        .route
        .action()
        .and_then(|action| drawn(action, exchange, random));
    exchange.route.weighted = drawn;
}

/// The number of the weighted entry that is drawn.
fn drawn(
    action: &RouteAction,
    exchange: &Exchange<'_>,
    random: impl FnOnce() -> u64,
) -> Option<usize> {
    let ClusterSpecifier::Weighted(clusters) = &action.cluster else {
        return None;
    };
    let by_hash = match clusters.use_hash_policy {
        true => hash::of(&action.hash_policy, exchange),
        false => None,
    };
    let random = clusters
        .header_name
        .as_ref()
        .and_then(|name| number(name, exchange))
        .or(by_hash)
        .unwrap_or_else(random);
    let picked = clusters.pick(random);
    clusters
        .clusters
        .iter()
        .position(|entry| std::ptr::eq(entry, picked))
}

/// The number in a header; a header with several fields has none.
fn number(name: &str, exchange: &Exchange<'_>) -> Option<u64> {
    if name.starts_with(':') {
        return exchange.request.get_str(name)?.trim().parse().ok();
    }
    let mut fields = exchange.request.headers.get_all(name);
    let only = fields.next().filter(|_| fields.next().is_none())?;
    std::str::from_utf8(only).ok()?.trim().parse().ok()
}

/// The cluster that a request's route names, where it names one.
pub(crate) fn route_cluster<'e>(route: &'e RouteRef, request: &'e RequestHead) -> Option<&'e str> {
    match &route.action()?.cluster {
        ClusterSpecifier::Cluster(name) => Some(name),
        ClusterSpecifier::Header(header) => request.get_str(header),
        ClusterSpecifier::Weighted(_) => match &headers::weighted(route)?.name {
            WeightedTarget::Cluster(name) => Some(name),
            WeightedTarget::Header(header) => request.get_str(header),
        },
    }
}

/// The conditions on metadata: the route's, or those of the weighted entry, which the plan has joined with them.
fn metadata_match(action: &RouteAction, weighted: Option<usize>) -> MetadataMatch {
    let entry = match (&action.cluster, weighted) {
        (ClusterSpecifier::Weighted(clusters), Some(index)) => clusters.clusters.get(index),
        _ => None,
    };
    entry
        .map_or(&action.metadata_match, |e| &e.metadata_match)
        .clone()
}
