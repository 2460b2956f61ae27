//! `envoy.filters.http.health_check`: answers the checks that others make of this proxy, or passes them on and remembers
//! the answer.

use std::{cell::Cell, sync::Arc, sync::atomic::Ordering::Relaxed, time::Instant};

use outrigger_http::ResponseHead;

use super::{Filter, Interests, Step};
use crate::{
    http::{Exchange, Flags, LocalReply},
    plan::{
        health_check::HealthCheckFilter as Plan, http_filter::RouteFilterConfig, matcher::Percent,
    },
    worker::Worker,
};

/// What the filter knows of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HealthCheckRequest {
    /// The upstream answers it.
    Passed,
    /// We answer it.
    Answered,
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct HealthCheckFilter {
    plan: Arc<Plan>,
    /// The last answer of the upstream, on this worker: status, whether it was degraded, and when.
    last: Cell<Option<(u16, bool, Instant)>>,
}

impl HealthCheckFilter {
    pub(super) fn new(plan: Arc<Plan>) -> Self {
        let last = Cell::new(None);
        Self { plan, last }
    }

    /// The upstream's last answer, while it may serve for further checks.
    fn cached(&self) -> Option<(u16, bool)> {
        let time = self.plan.cache_time?;
        let (status, degraded, at) = self.last.get()?;
        (at.elapsed() < time).then_some((status, degraded))
    }

    fn answer(&self, worker: &Worker) -> LocalReply {
        if worker.shared.health_failed.load(Relaxed) {
            return LocalReply::new(503, "", "health_check_failed")
                .flag(Flags::FAILED_LOCAL_HEALTH_CHECK);
        }
        if let Some((status, degraded)) = self.cached() {
            let reply = LocalReply::new(status, "", "health_check_cached");
            return match degraded {
                true => reply.header("x-envoy-degraded", ""),
                false => reply,
            };
        }
        let lacking = self.plan.min_healthy.iter().find_map(|(name, least)| {
            match worker.clusters.find(name) {
                None => Some("health_check_no_cluster_found"),
                Some(cluster) => {
                    let hosts = cluster.hosts();
                    let good = hosts.healthy() + hosts.degraded();
                    too_few(good, hosts.hosts().len(), *least)
                }
            }
        });
        match lacking {
            Some(details) => LocalReply::new(503, "", details),
            None => LocalReply::new(200, "", "health_check_ok"),
        }
    }
}

impl Filter for HealthCheckFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let view = &*exchange;
        if !self.plan.headers.iter().all(|header| header.matches(view)) {
            return Step::Continue;
        }
        let failed = worker.shared.health_failed.load(Relaxed);
        if self.plan.pass_through && !failed && self.cached().is_none() {
            exchange.filters.health_check = Some(HealthCheckRequest::Passed);
            return Step::Continue;
        }
        exchange.filters.health_check = Some(HealthCheckRequest::Answered);
        Step::Reply(self.answer(worker))
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, worker: &Worker) {
        let Some(request) = exchange.filters.health_check else {
            // Whoever balances over proxies like this one learns from any answer that it is about to go.
            if worker.shared.health_failed.load(Relaxed) {
                let name = "x-envoy-immediate-health-check-fail";
                response.headers.set(name, "true");
            }
            return;
        };
        if request == HealthCheckRequest::Passed && self.plan.cache_time.is_some() {
            let degraded = response.headers.contains("x-envoy-degraded");
            self.last
                .set(Some((response.status, degraded, Instant::now())));
        }
        let own = worker.bootstrap.node.cluster.as_bytes();
        response
            .headers
            .set("x-envoy-upstream-healthchecked-cluster", own);
    }
}

/// Why a cluster with so many usable hosts does not suffice.
fn too_few(usable: usize, all: usize, least: Percent) -> Option<&'static str> {
    match all {
        0 if least == Percent::default() => None,
        0 => Some("health_check_cluster_empty"),
        // In millionths, so that nothing is rounded.
        _ if 1_000_000 * (usable as u64) < all as u64 * u64::from(least.ppm()) => {
            Some("health_check_cluster_unhealthy")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_needs_its_share_of_usable_hosts() {
        let half = Percent::whole(50);
        assert_eq!(too_few(2, 4, half), None);
        assert_eq!(too_few(1, 3, half), Some("health_check_cluster_unhealthy"));
        assert_eq!(too_few(0, 0, half), Some("health_check_cluster_empty"));
        assert_eq!(too_few(0, 0, Percent::whole(0)), None);
    }
}
