//! Outlier detection: hosts that answer badly are put aside for a while. Envoy's arithmetic, on the main thread.
//!
//! Workers only count ([`super::shared::ResultCounts`]) and say when a count of failures in a row is reached; whether a
//! host goes, for how long and when it comes back is decided here.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{host::Host, shared::HealthFlag};
use crate::{
    plan::cluster::{FailurePercentage, OutlierDetection, SuccessRate},
    worker::Random,
};

/// Why a host is put aside, with the numbers of Envoy's event (`OutlierEjectionType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ejection {
    Consecutive5xx = 0,
    ConsecutiveGatewayFailure = 1,
    SuccessRate = 2,
    ConsecutiveLocalOriginFailure = 3,
    SuccessRateLocalOrigin = 4,
    FailurePercentage = 5,
    FailurePercentageLocalOrigin = 6,
}

impl Ejection {
    /// What follows `ejections_detected_` and `ejections_enforced_` in stats.
    pub(crate) fn stat(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "consecutive_5xx",
            Self::ConsecutiveGatewayFailure => "consecutive_gateway_failure",
            Self::SuccessRate => "success_rate",
            Self::ConsecutiveLocalOriginFailure => "consecutive_local_origin_failure",
            Self::SuccessRateLocalOrigin => "local_origin_success_rate",
            Self::FailurePercentage => "failure_percentage",
            Self::FailurePercentageLocalOrigin => "local_origin_failure_percentage",
        }
    }

    /// The chance that an ejection is carried out, in percent.
    fn enforcing(self, plan: &OutlierDetection) -> u32 {
        match self {
            Self::Consecutive5xx => plan.enforcing_consecutive_5xx,
            Self::ConsecutiveGatewayFailure => plan.enforcing_consecutive_gateway_failure,
            Self::SuccessRate => plan.success_rate.enforcing,
            Self::ConsecutiveLocalOriginFailure => plan.enforcing_consecutive_local_origin_failure,
            Self::SuccessRateLocalOrigin => plan.success_rate.enforcing_local_origin,
            Self::FailurePercentage => plan.failure_percentage.enforcing,
            Self::FailurePercentageLocalOrigin => plan.failure_percentage.enforcing_local_origin,
        }
    }
}

/// Something to count and to log.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) host: Arc<Host>,
    pub(crate) kind: EventKind,
    /// How often the host was ejected so far.
    pub(crate) ejections: u32,
    /// Since it was last put aside or brought back, whichever is the other of what happens now.
    pub(crate) since_last: Option<Duration>,
    /// Success rates for the log: host, average, threshold.
    pub(crate) rates: (f64, f64, f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    /// A host behaves badly.
    Detected(Ejection),
    /// The limits allow to put it aside; it was, unless the chance was against it.
    Ejected(Ejection, bool),
    /// Too many are aside already.
    Overflow,
    /// It is back.
    Unejected,
    /// It has said that it is to be used last.
    Degraded,
    /// It is used as any other again.
    Undegraded,
}

/// Average success rate and the rate below which a host is an outlier, in percent; -1 where there is too little to tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of the hosts with enough requests.
    pub average: f64,
    /// Below it a host is ejected.
    pub threshold: f64,
}

/// The state of one cluster.
#[derive(Debug)]
pub(crate) struct Detector {
    monitors: HashMap<u64, Monitor>,
    /// Of answers, and of this side's own part.
    pub(crate) rates: [Rates; 2],
}

/// The state of one host.
#[derive(Debug, Default)]
struct Monitor {
    ejections: u32,
    /// What the base time is multiplied with.
    backoff: u32,
    jitter: Duration,
    ejected: Option<Instant>,
    unejected: Option<Instant>,
    degradation: Degradation,
    /// Successes and failures at the end of the last interval, of answers and of this side's own part.
    seen: [(u64, u64); 2],
}

/// Since when a host is used last, and for how long: as with ejections, but apart from them.
#[derive(Debug, Default)]
struct Degradation {
    backoff: u32,
    jitter: Duration,
    begun: Option<Instant>,
    ended: Option<Instant>,
}

impl Default for Detector {
    fn default() -> Self {
        Self {
            monitors: HashMap::new(),
            rates: [UNKNOWN; 2],
        }
    }
}

impl Detector {
    /// A worker has counted as many failures in a row as the limit says.
    pub(crate) fn failing(
        &mut self,
        plan: &OutlierDetection,
        hosts: &[Arc<Host>],
        host: u64,
        reason: Ejection,
        now: Instant,
        random: &Random,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        let Some(host) = hosts.iter().find(|found| found.shared.id == host) else {
            return events;
        };
        let shared = &host.shared;
        if !shared.ejected.load(Relaxed) {
            self.detect(plan, hosts, host, reason, now, random, &mut events);
        }
        // Whatever is decided, the count begins again: else it would never be equal to the limit a second time.
        match reason {
            Ejection::Consecutive5xx => shared.consecutive_5xx.store(0, Relaxed),
            Ejection::ConsecutiveGatewayFailure => shared.consecutive_gateway.store(0, Relaxed),
            _ => shared.consecutive_local.store(0, Relaxed),
        }
        events
    }

    /// What happens at the end of each interval.
    pub(crate) fn tick(
        &mut self,
        plan: &OutlierDetection,
        hosts: &[Arc<Host>],
        now: Instant,
        random: &Random,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        if self.monitors.is_empty() && hosts.iter().all(|host| is_untouched(host)) {
            // A cluster without requests costs nothing.
            return events;
        }
        self.monitors
            .retain(|id, _| hosts.iter().any(|host| host.shared.id == *id));
        for host in hosts {
            let monitor = self.monitors.entry(host.shared.id).or_default();
            let over = monitor.ejected.is_some_and(|at| {
                let time = plan.base_ejection_time.saturating_mul(monitor.backoff);
                time.min(plan.max_ejection_time) + monitor.jitter <= now - at
            });
            if over && host.shared.ejected.load(Relaxed) {
                events.push(self.uneject(host, now));
            }
            events.extend(self.undegrade(plan, host, now));
            for rate in &host.shared.success_rate {
                rate.store((-1f64).to_bits(), Relaxed);
            }
        }
        for which in [0, 1] {
            self.success_rates(which, plan, hosts, now, random, &mut events);
        }
        for host in hosts {
            let monitor = self.monitors.entry(host.shared.id).or_default();
            let calm = monitor
                .unejected
                .is_some_and(|at| now - at >= plan.interval);
            if calm && !host.shared.ejected.load(Relaxed) {
                monitor.backoff = monitor.backoff.saturating_sub(1);
            }
            let past = &mut monitor.degradation;
            let calm = past.ended.is_some_and(|at| now - at >= plan.interval);
            if calm && !host.shared.flag(HealthFlag::DegradedOutlierDetection) {
                past.backoff = past.backoff.saturating_sub(1);
            }
        }
        events
    }

    /// A host has said in an answer that it is to be used last. One that is put aside stays aside.
    pub(crate) fn degraded(
        &mut self,
        plan: &OutlierDetection,
        hosts: &[Arc<Host>],
        host: u64,
        now: Instant,
        random: &Random,
    ) -> Option<Event> {
        let host = hosts.iter().find(|found| found.shared.id == host)?;
        let flag = HealthFlag::DegradedOutlierDetection;
        if host.shared.ejected.load(Relaxed) || !host.shared.set_flag(flag, true) {
            return None;
        }
        let monitor = self.monitors.entry(host.shared.id).or_default();
        let now_is = &mut monitor.degradation;
        now_is.begun = Some(now);
        let most = plan.max_ejection_time_jitter.as_millis() as u64;
        now_is.jitter = Duration::from_millis(random.below(most + 1));
        let base = plan.base_ejection_time;
        if base.saturating_mul(now_is.backoff) < plan.max_ejection_time + base {
            now_is.backoff += 1;
        }
        Some(Event {
            host: host.clone(),
            kind: EventKind::Degraded,
            ejections: monitor.ejections,
            since_last: now_is.ended.map(|at| now - at),
            rates: (-1.0, -1.0, -1.0),
        })
    }

    /// Uses a host as any other again once its time is over. No check of its health does that before.
    fn undegrade(
        &mut self,
        plan: &OutlierDetection,
        host: &Arc<Host>,
        now: Instant,
    ) -> Option<Event> {
        let monitor = self.monitors.entry(host.shared.id).or_default();
        let was = &mut monitor.degradation;
        let since = now - was.begun?;
        let time = plan.base_ejection_time.saturating_mul(was.backoff);
        if since < time.min(plan.max_ejection_time) + was.jitter
            || !host
                .shared
                .set_flag(HealthFlag::DegradedOutlierDetection, false)
        {
            return None;
        }
        was.ended = Some(now);
        Some(Event {
            host: host.clone(),
            kind: EventKind::Undegraded,
            ejections: monitor.ejections,
            since_last: Some(since),
            rates: (-1.0, -1.0, -1.0),
        })
    }

    /// Brings a host back, before its time where an active health check has passed.
    pub(crate) fn uneject(&mut self, host: &Arc<Host>, now: Instant) -> Event {
        let monitor = self.monitors.entry(host.shared.id).or_default();
        let shared = &host.shared;
        shared.ejected.store(false, Relaxed);
        for count in [
            &shared.consecutive_5xx,
            &shared.consecutive_gateway,
            &shared.consecutive_local,
        ] {
            count.store(0, Relaxed);
        }
        monitor.unejected = Some(now);
        Event {
            host: host.clone(),
            kind: EventKind::Unejected,
            ejections: monitor.ejections,
            since_last: monitor.ejected.map(|at| now - at),
            rates: (-1.0, -1.0, -1.0),
        }
    }

    /// Rates of the interval that ends now, and what follows from them.
    fn success_rates(
        &mut self,
        which: usize,
        plan: &OutlierDetection,
        hosts: &[Arc<Host>],
        now: Instant,
        random: &Random,
        events: &mut Vec<Event>,
    ) {
        let (rate, failure) = (&plan.success_rate, &plan.failure_percentage);
        self.rates[which] = UNKNOWN;
        let mut measured = Vec::new();
        for host in hosts {
            let results = &host.shared.results;
            let now = match which {
                0 => (results.success.load(Relaxed), results.failure.load(Relaxed)),
                _ => (
                    results.local_success.load(Relaxed),
                    results.local_failure.load(Relaxed),
                ),
            };
            let monitor = self.monitors.entry(host.shared.id).or_default();
            let before = std::mem::replace(&mut monitor.seen[which], now);
            let (good, bad) = (now.0 - before.0, now.1 - before.1);
            let volume = good + bad;
            if volume > 0 && !host.shared.ejected.load(Relaxed) {
                measured.push((host, good as f64 * 100.0 / volume as f64, volume));
            }
        }
        if hosts.len() < rate.minimum_hosts as usize && hosts.len() < failure.minimum_hosts as usize
        {
            return;
        }
        let enough = |least: u32| move |volume: u64| volume >= u64::from(least);
        let shown = enough(rate.request_volume.min(failure.request_volume));
        for (host, percent, _) in measured.iter().filter(|entry| shown(entry.2)) {
            host.shared.success_rate[which].store(percent.to_bits(), Relaxed);
        }
        let of = |least: u32| -> Vec<(&Arc<Host>, f64)> {
            let enough = enough(least);
            let some = measured.iter().filter(|entry| enough(entry.2));
            some.map(|(host, percent, _)| (*host, *percent)).collect()
        };
        for host in self.below_threshold(which, rate, &of(rate.request_volume)) {
            let reason = [Ejection::SuccessRate, Ejection::SuccessRateLocalOrigin][which];
            self.detect(plan, hosts, host, reason, now, random, events);
        }
        for host in failing_too_often(failure, &of(failure.request_volume)) {
            let reason = [
                Ejection::FailurePercentage,
                Ejection::FailurePercentageLocalOrigin,
            ][which];
            self.detect(plan, hosts, host, reason, now, random, events);
        }
    }

    /// Hosts whose rate is lower than the mean by more than so many standard deviations.
    fn below_threshold<'a>(
        &mut self,
        which: usize,
        plan: &SuccessRate,
        hosts: &[(&'a Arc<Host>, f64)],
    ) -> Vec<&'a Arc<Host>> {
        if hosts.is_empty() || hosts.len() < plan.minimum_hosts as usize {
            return Vec::new();
        }
        let rates: Vec<f64> = hosts.iter().map(|host| host.1).collect();
        let found = ejection_threshold(&rates, f64::from(plan.stdev_factor) / 1000.0);
        self.rates[which] = found;
        let below = hosts.iter().filter(|host| host.1 < found.threshold);
        below.map(|host| host.0).collect()
    }

    #[allow(clippy::too_many_arguments)] // One decision, and all it depends on.
    fn detect(
        &mut self,
        plan: &OutlierDetection,
        hosts: &[Arc<Host>],
        host: &Arc<Host>,
        reason: Ejection,
        now: Instant,
        random: &Random,
        events: &mut Vec<Event>,
    ) {
        // With a success rate and a failure percentage a host can be found twice in one interval.
        let already = host.shared.ejected.load(Relaxed);
        let aside = hosts
            .iter()
            .filter(|host| host.shared.ejected.load(Relaxed))
            .count();
        let rates = match reason {
            Ejection::SuccessRate | Ejection::FailurePercentage => Some(0),
            Ejection::SuccessRateLocalOrigin | Ejection::FailurePercentageLocalOrigin => Some(1),
            _ => None,
        };
        let rates = rates.map_or((-1.0, -1.0, -1.0), |which| {
            let Rates { average, threshold } = self.rates[which];
            (host.shared.success_rate(which), average, threshold)
        });
        let monitor = self.monitors.entry(host.shared.id).or_default();
        let mut tell = |kind, monitor: &Monitor| {
            events.push(Event {
                host: host.clone(),
                kind,
                ejections: monitor.ejections,
                since_last: monitor.unejected.map(|at| now - at),
                rates,
            });
        };
        tell(EventKind::Detected(reason), monitor);
        if already {
            return;
        }
        let percent = 100.0 * (aside + 1) as f64 / hosts.len() as f64;
        let allowed = percent <= f64::from(plan.max_ejection_percent.min(100))
            || plan.always_eject_one_host && aside == 0;
        if !allowed {
            return tell(EventKind::Overflow, monitor);
        }
        let enforced = random.below(100) < u64::from(reason.enforcing(plan));
        if enforced {
            host.shared.ejected.store(true, Relaxed);
            monitor.ejections += 1;
            monitor.ejected = Some(now);
            let most = plan.max_ejection_time_jitter.as_millis() as u64;
            monitor.jitter = Duration::from_millis(random.below(most + 1));
            let base = plan.base_ejection_time;
            if base.saturating_mul(monitor.backoff) < plan.max_ejection_time + base {
                monitor.backoff += 1;
            }
        }
        tell(EventKind::Ejected(reason, enforced), monitor);
    }
}

/// Whether no request to the host has ended yet.
fn is_untouched(host: &Host) -> bool {
    let results = &host.shared.results;
    [
        &results.success,
        &results.failure,
        &results.local_success,
        &results.local_failure,
    ]
    .iter()
    .all(|count| count.load(Relaxed) == 0)
}

/// Mean of success rates (percent), and the mean less `factor` standard deviations.
fn ejection_threshold(rates: &[f64], factor: f64) -> Rates {
    let count = rates.len() as f64;
    let average = rates.iter().sum::<f64>() / count;
    let variance = rates.iter().map(|r| (r - average).powi(2)).sum::<f64>() / count;
    Rates {
        average,
        threshold: average - factor * variance.sqrt(),
    }
}

fn failing_too_often<'a>(
    plan: &FailurePercentage,
    hosts: &[(&'a Arc<Host>, f64)],
) -> Vec<&'a Arc<Host>> {
    if hosts.len() < plan.minimum_hosts as usize {
        return Vec::new();
    }
    let bad = hosts
        .iter()
        .filter(|host| 100.0 - host.1 >= f64::from(plan.threshold));
    bad.map(|host| host.0).collect()
}

const UNKNOWN: Rates = Rates {
    average: -1.0,
    threshold: -1.0,
};

#[cfg(test)]
mod tests;
