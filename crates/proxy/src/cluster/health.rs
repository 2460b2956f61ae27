//! What the results of active health checks mean: thresholds, flags and intervals, as Envoy has them. No I/O.

use std::time::Duration;

use super::shared::{HealthFlag, HostShared, now_ms};
use crate::{plan::health_check::HealthCheck, worker::Random};

/// The result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckResult {
    /// It passed; the host may ask to be used last.
    Passed { degraded: bool },
    /// It did not.
    Failed {
        /// How.
        kind: FailureKind,
        /// Counts against the threshold even where the answer was plainly wrong.
        retriable: bool,
    },
}

/// How a check failed, with the numbers of Envoy's event (`HealthCheckFailureType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// A wrong answer.
    Active = 0,
    /// A request's response said it.
    Passive = 1,
    /// No connection, or one that broke.
    Network = 2,
    /// No answer in time.
    NetworkTimeout = 3,
}

/// What a result did to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    Unchanged,
    /// Its health is another one.
    Changed,
    /// It will be, when the next results are the same.
    Pending,
}

/// The state of one host's checks.
#[derive(Debug)]
pub(crate) struct Session {
    first: bool,
    healthy: u32,
    unhealthy: u32,
}

/// Everything that follows from one result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) transition: Transition,
    /// This was the first check of the host.
    pub(crate) first: bool,
    /// Became healthy (true) or unhealthy (false).
    pub(crate) turned: Option<bool>,
    /// Became degraded (true) or ceased to be (false).
    pub(crate) degraded: Option<bool>,
    /// Workers must be told: a flag that choosing looks at has changed.
    pub(crate) visible: bool,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            first: true,
            healthy: 0,
            unhealthy: 0,
        }
    }
}

impl Session {
    /// Takes a result in and sets the host's flags.
    pub(crate) fn apply(
        &mut self,
        host: &HostShared,
        check: &HealthCheck,
        result: CheckResult,
    ) -> Verdict {
        let mut verdict = Verdict {
            transition: Transition::Unchanged,
            first: std::mem::replace(&mut self.first, false),
            turned: None,
            degraded: None,
            visible: host.set_flag(HealthFlag::PendingActiveHc, false),
        };
        match result {
            CheckResult::Passed { degraded } => {
                self.unhealthy = 0;
                if host.flag(HealthFlag::FailedActiveHc) {
                    self.healthy += 1;
                    // The very first check suffices: the start is faster, and little is risked.
                    if verdict.first || self.healthy >= check.healthy_threshold {
                        host.set_flag(HealthFlag::FailedActiveHc, false);
                        host.set_flag(HealthFlag::ActiveHcTimeout, false);
                        host.set_flag(HealthFlag::ExcludedViaImmediateHcFail, false);
                        let now = std::sync::atomic::Ordering::Relaxed;
                        host.healthy_since.store(now_ms(), now);
                        verdict.turned = Some(true);
                        verdict.transition = Transition::Changed;
                    } else {
                        verdict.transition = Transition::Pending;
                    }
                }
                if host.set_flag(HealthFlag::DegradedActiveHc, degraded) {
                    verdict.degraded = Some(degraded);
                    verdict.transition = Transition::Changed;
                }
            }
            CheckResult::Failed { kind, retriable } => {
                self.healthy = 0;
                host.set_flag(
                    HealthFlag::ActiveHcTimeout,
                    kind == FailureKind::NetworkTimeout,
                );
                if !host.flag(HealthFlag::FailedActiveHc) {
                    let counts = retriable
                        || matches!(kind, FailureKind::Network | FailureKind::NetworkTimeout);
                    self.unhealthy += 1;
                    if !counts || self.unhealthy >= check.unhealthy_threshold {
                        self.unhealthy = 0;
                        host.set_flag(HealthFlag::FailedActiveHc, true);
                        verdict.turned = Some(false);
                        verdict.transition = Transition::Changed;
                    } else {
                        verdict.transition = Transition::Pending;
                    }
                }
            }
        }
        verdict.visible |= verdict.turned.is_some() || verdict.degraded.is_some();
        verdict
    }
}

/// How long to wait before the next check. `traffic` is whether the cluster ever had a connection.
pub(crate) fn interval(
    check: &HealthCheck,
    passed: bool,
    transition: Transition,
    traffic: bool,
    random: &Random,
) -> Duration {
    let pending = transition == Transition::Pending;
    let base = match (traffic, passed, pending) {
        (false, true, _) => check.no_traffic_healthy_interval,
        (false, false, _) => check.no_traffic_interval,
        (true, true, true) => check.healthy_edge_interval,
        (true, true, false) => check.interval,
        (true, false, true) => check.unhealthy_edge_interval,
        (true, false, false) => check.unhealthy_interval,
    };
    let up_to = |limit: u64| Duration::from_millis(random.below(limit));
    let share = base.as_millis() as u64 * u64::from(check.interval_jitter_percent) / 100;
    let wait = base + up_to(share) + up_to(check.interval_jitter.as_millis() as u64);
    wait.max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::health_check::{Checker, TcpCheck};

    fn check(unhealthy_threshold: u32, healthy_threshold: u32) -> HealthCheck {
        let seconds = Duration::from_secs;
        HealthCheck {
            name: None,
            transport_match: None,
            checker: Checker::Tcp(TcpCheck::default()),
            timeout: seconds(1),
            interval: seconds(1),
            initial_jitter: Duration::ZERO,
            interval_jitter: Duration::ZERO,
            interval_jitter_percent: 0,
            unhealthy_threshold,
            healthy_threshold,
            reuse_connection: true,
            no_traffic_interval: seconds(60),
            no_traffic_healthy_interval: seconds(50),
            unhealthy_interval: seconds(2),
            unhealthy_edge_interval: seconds(3),
            healthy_edge_interval: seconds(4),
            alpn_protocols: Vec::new(),
            event_logs: Vec::new(),
            always_log_failures: false,
            always_log_success: false,
        }
    }

    const PASSED: CheckResult = CheckResult::Passed { degraded: false };
    const REFUSED: CheckResult = CheckResult::Failed {
        kind: FailureKind::Network,
        retriable: false,
    };
    const WRONG: CheckResult = CheckResult::Failed {
        kind: FailureKind::Active,
        retriable: false,
    };

    fn new_host() -> HostShared {
        let host = HostShared::new();
        host.set_flag(HealthFlag::FailedActiveHc, true);
        host
    }

    #[test]
    fn thresholds_count_results_in_a_row() {
        let (host, check, mut session) = (new_host(), check(2, 3), Session::default());
        let mut apply = |result| {
            let verdict = session.apply(&host, &check, result);
            (verdict.transition, host.flag(HealthFlag::FailedActiveHc))
        };
        use Transition::{Changed, Pending, Unchanged};
        assert_eq!(apply(PASSED), (Changed, false), "the first one suffices");
        assert_eq!(apply(REFUSED), (Pending, false));
        assert_eq!(apply(PASSED), (Unchanged, false));
        assert_eq!(apply(REFUSED), (Pending, false));
        assert_eq!(apply(REFUSED), (Changed, true));
        assert_eq!(apply(PASSED), (Pending, true));
        assert_eq!(apply(PASSED), (Pending, true));
        assert_eq!(apply(REFUSED), (Unchanged, true));
        assert_eq!(apply(PASSED), (Pending, true));
        assert_eq!(apply(PASSED), (Pending, true));
        assert_eq!(apply(PASSED), (Changed, false));
        assert_eq!(
            apply(WRONG),
            (Changed, true),
            "a wrong answer needs no second"
        );
    }

    #[test]
    fn a_retriable_status_needs_the_threshold() {
        let (host, check, mut session) = (new_host(), check(2, 1), Session::default());
        session.apply(&host, &check, PASSED);
        let retriable = CheckResult::Failed {
            kind: FailureKind::Active,
            retriable: true,
        };
        let first = session.apply(&host, &check, retriable);
        assert_eq!(first.transition, Transition::Pending);
        let second = session.apply(&host, &check, retriable);
        assert_eq!(second.turned, Some(false));
    }

    #[test]
    fn intervals_follow_the_state() {
        let (check, random) = (check(2, 2), Random::seeded(1));
        use Transition::{Changed, Pending, Unchanged};
        for (passed, transition, traffic, want) in [
            (true, Unchanged, true, 1),
            (false, Unchanged, true, 2),
            (false, Changed, true, 2),
            (false, Pending, true, 3),
            (true, Pending, true, 4),
            (true, Unchanged, false, 50),
            (false, Pending, false, 60),
        ] {
            let found = interval(&check, passed, transition, traffic, &random);
            assert_eq!(found, Duration::from_secs(want), "{passed} {transition:?}");
        }
        let jitter = HealthCheck {
            interval_jitter_percent: 50,
            interval_jitter: Duration::from_millis(100),
            ..check
        };
        for _ in 0..1000 {
            let found = interval(&jitter, true, Unchanged, true, &random).as_millis();
            assert!((1000..1600).contains(&found), "{found}");
        }
    }
}
