//! What routes and virtual clusters count: `vhost.<vhost>.route.<stat_prefix>.` and `vhost.<vhost>.vcluster.<name>.`

use super::{Context, Exchange};

/// Counts a response of an upstream for its route and virtual cluster, where they have names. The names are put together
/// here, for each request: only configurations that ask for these stats pay for them.
pub(super) fn count(cx: &Context<'_>, exchange: &Exchange<'_>) {
    let Some((host, route)) = exchange.route.get() else {
        return;
    };
    if !exchange.upstream.routed || exchange.status() == 0 {
        return;
    }
    if let Some(prefix) = &route.stat_prefix {
        one(
            cx,
            exchange,
            &format!("vhost.{}.route.{prefix}.", host.name),
        );
    }
    if let Some(name) = host.virtual_cluster(exchange) {
        one(
            cx,
            exchange,
            &format!("vhost.{}.vcluster.{name}.", host.name),
        );
    }
}

fn one(cx: &Context<'_>, exchange: &Exchange<'_>, prefix: &str) {
    let scope = cx.worker.stats.scope(prefix);
    let status = exchange.status();
    scope.counter("upstream_rq_total").inc();
    scope.counter("upstream_rq_completed").inc();
    scope
        .counter(&format!("upstream_rq_{}xx", status / 100))
        .inc();
    scope.counter(&format!("upstream_rq_{status}")).inc();
    let retries = u64::from(exchange.upstream.attempts.saturating_sub(1));
    if retries > 0 {
        scope.counter("upstream_rq_retry").add(retries);
    }
    if exchange.flags.has(super::Flags::UPSTREAM_REQUEST_TIMEOUT) {
        scope.counter("upstream_rq_timeout").inc();
    }
    scope
        .histogram("upstream_rq_time")
        .record(exchange.duration().as_millis() as u64);
}
