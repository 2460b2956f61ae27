//! What a worker tells of requests and hosts, for outlier detection, health checks and stats.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::{Cluster, Host, Outcome, Report, outlier::Ejection, shared::HealthFlag};

impl Cluster {
    /// Whether a request is refused since the cluster is under maintenance; asked once for each request.
    pub fn is_maintained(&self) -> bool {
        let refuses = self.maintenance > 0 && self.random.below(100) < self.maintenance;
        if refuses {
            self.stats.upstream_rq_maintenance_mode().inc();
        }
        refuses
    }

    /// Whether a request is refused to relieve the cluster (`drop_overloads`); asked once for each request.
    pub fn drops(&self) -> bool {
        let drops = self.hosts.borrow().drops(|| self.random.bits());
        if drops {
            self.stats.upstream_rq_drop_overload().inc();
        }
        drops
    }

    /// The host has told in a response that it wants no traffic. Its next health check decides anew.
    pub fn immediate_health_check_fail(&self, host: &Host) {
        if self.plan.health_check.is_some() && !host.shared.flag(HealthFlag::FailedActiveHc) {
            self.tell(Report::ImmediateFail {
                cluster: self.plan.name.clone(),
                host: host.shared.id,
            });
        }
    }

    /// An answer of the host, with whether it says that the host is to be used last (`x-envoy-degraded`).
    pub fn answered(&self, host: &Host, status: u16, says_degraded: impl FnOnce() -> bool) {
        let Some(outlier) = &self.plan.outlier_detection else {
            return;
        };
        if outlier.detect_degraded_hosts
            && (200..300).contains(&status)
            && says_degraded()
            && !host.shared.flag(HealthFlag::DegradedOutlierDetection)
        {
            self.tell(Report::Degraded {
                cluster: self.plan.name.clone(),
                host: host.shared.id,
            });
        }
    }

    /// Tells how a request went. Connections and failed ones of [`Cluster::tcp`], and failed ones of [`Cluster::http1`] and
    /// [`Cluster::http2`], are reported already.
    pub fn report(&self, host: &Arc<Host>, outcome: Outcome) {
        let shared = &host.shared;
        let (status, local) = match outcome {
            Outcome::Status(status) => (status, false),
            Outcome::Connected => (200, true),
            Outcome::ConnectFailed | Outcome::Reset => (503, true),
            Outcome::Timeout => {
                shared.rq_timeout.fetch_add(1, Relaxed);
                (504, true)
            }
        };
        let failed = status >= 500;
        if !matches!(outcome, Outcome::ConnectFailed | Outcome::Connected) {
            let count = match failed {
                true => &shared.rq_error,
                false => &shared.rq_success,
            };
            count.fetch_add(1, Relaxed);
        }
        let Some(outlier) = &self.plan.outlier_detection else {
            return;
        };
        if outlier.split_external_local_origin_errors {
            // An answer means that there was a connection.
            self.count_local(
                host,
                local && failed,
                outlier.consecutive_local_origin_failure,
            );
            if local {
                return;
            }
        }
        let results = &shared.results;
        if !failed {
            results.success.fetch_add(1, Relaxed);
            // The common case writes only when something has failed before.
            if shared.consecutive_5xx.load(Relaxed) != 0 {
                shared.consecutive_5xx.store(0, Relaxed);
                shared.consecutive_gateway.store(0, Relaxed);
            }
            return;
        }
        results.failure.fetch_add(1, Relaxed);
        if matches!(status, 502..=504) {
            let count = shared.consecutive_gateway.fetch_add(1, Relaxed) + 1;
            if count == outlier.consecutive_gateway_failure {
                self.failing(host, Ejection::ConsecutiveGatewayFailure);
            }
        } else {
            shared.consecutive_gateway.store(0, Relaxed);
        }
        let count = shared.consecutive_5xx.fetch_add(1, Relaxed) + 1;
        if count == outlier.consecutive_5xx {
            self.failing(host, Ejection::Consecutive5xx);
        }
    }

    /// Counts this side's own part of a request, where that is counted apart.
    fn count_local(&self, host: &Arc<Host>, failed: bool, limit: u32) {
        let shared = &host.shared;
        if !failed {
            shared.results.local_success.fetch_add(1, Relaxed);
            if shared.consecutive_local.load(Relaxed) != 0 {
                shared.consecutive_local.store(0, Relaxed);
            }
            return;
        }
        shared.results.local_failure.fetch_add(1, Relaxed);
        if shared.consecutive_local.fetch_add(1, Relaxed) + 1 == limit {
            self.failing(host, Ejection::ConsecutiveLocalOriginFailure);
        }
    }

    fn failing(&self, host: &Arc<Host>, reason: Ejection) {
        self.tell(Report::Failing {
            cluster: self.plan.name.clone(),
            host: host.shared.id,
            reason,
        });
    }

    /// Completes when the host is put aside or fails its health checks, for clusters that want their connections closed
    /// then.
    pub async fn host_failed(&self, host: &Host) {
        if !self.plan.close_connections_on_host_health_failure {
            std::future::pending::<()>().await;
        }
        loop {
            self.failures.notified().await;
            let shared = &host.shared;
            if shared.ejected.load(Relaxed) || shared.flag(HealthFlag::FailedActiveHc) {
                return;
            }
        }
    }
}
