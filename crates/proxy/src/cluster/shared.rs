//! What workers share: the whole list of facts that cross threads on the data path, each an atomic.
//!
//! Everything else belongs to one worker. Counts here are exact across workers, because the limits that they are held
//! against are the user's.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::{Duration, Instant},
};

use super::{OnDemand, entry::KnownHosts};
use crate::{
    listener::Drains, network::SharedLimits, overload::Overload, plan::cluster::Thresholds,
    transport::Secrets,
};

/// The facts of the whole process.
#[derive(Debug, Default)]
pub struct ProcessShared {
    /// Downstream connections of all listeners, for the limit of the process.
    pub downstream_connections: Tally,
    /// How many there may be at once.
    pub max_downstream_connections: u32,
    /// Downstream connections of each worker, for balancing.
    pub workers: Vec<AtomicU64>,
    /// Source of connection ids.
    pub next_connection: AtomicU64,
    /// What is given up under overload.
    pub overload: Overload,
    /// Clusters of which so many percent of the requests are refused (`upstream.maintenance_mode.NAME` of the runtime).
    pub(crate) maintenance: HashMap<String, u64>,
    /// What network filters count over all workers.
    pub limits: SharedLimits,
    /// Certificates, keys and authorities: read by the main thread, used by handshakes.
    pub(crate) secrets: Arc<Secrets>,
    /// What Istio's metadata exchange says of this workload.
    pub(crate) peer_metadata: bytes::Bytes,
    /// Former listeners and chains that are not gone yet.
    pub(crate) drains: Arc<Drains>,
    /// Whether readiness should fail (`/healthcheck/fail`).
    pub health_failed: AtomicBool,
}

/// The facts of one cluster, one entry for each routing priority (DEFAULT, HIGH).
#[derive(Debug, Default)]
pub struct ClusterShared {
    /// A worker has brought it to life: there is something to tell.
    pub(crate) touched: AtomicBool,
    pub(crate) breakers: [BreakerShared; 2],
    /// Never touched by a request, but for the first one.
    pub(crate) hosts: KnownHosts,
    /// Hosts that connections brought into being (ORIGINAL_DST).
    pub(crate) on_demand: OnDemand,
}

/// What circuit breakers count.
#[derive(Clone, Debug, Default)]
pub struct BreakerShared {
    /// Upstream connections, pooled ones included.
    pub connections: Arc<Tally>,
    /// Requests that wait for a connection.
    pub pending: Arc<Tally>,
    /// Requests under way.
    pub requests: Arc<Tally>,
    /// Retries under way.
    pub retries: Arc<Tally>,
    /// Requests that began lately, counted where a retry budget has an interval.
    pub(crate) recent: Arc<Recent>,
    /// Connection pools: one a worker and host, and what else keeps connections apart.
    pub pools: Arc<Tally>,
}

impl BreakerShared {
    /// How many retries there may be now: a number, or a share of the requests under way.
    pub(crate) fn retries_allowed(&self, limits: &Thresholds) -> u32 {
        match &limits.retry_budget {
            None => limits.max_retries,
            Some(budget) => {
                let requests = match budget.interval {
                    Some(interval) => self.recent.count(interval, now_ms()),
                    None => self.requests.count() + self.pending.count(),
                };
                let share = f64::from(requests) * budget.budget.ratio();
                (share as u32).max(budget.min_retry_concurrency)
            }
        }
    }
}

/// The facts of one host, kept over changes of its metadata, weight and place.
#[derive(Debug, Default)]
pub struct HostShared {
    /// Unique in the process; pools are kept by it.
    pub id: u64,
    /// Connections held against the limit of a single host, where there is one.
    pub connections: Arc<Tally>,
    /// Open connections.
    pub cx_active: AtomicU64,
    /// Connections ever tried.
    pub cx_total: AtomicU64,
    /// Connections that were not established.
    pub cx_connect_fail: AtomicU64,
    /// Requests under way: what LEAST_REQUEST compares.
    pub rq_active: AtomicU64,
    /// Requests ever sent.
    pub rq_total: AtomicU64,
    /// Requests answered without a server error.
    pub rq_success: AtomicU64,
    /// Requests answered with a server error or not at all.
    pub rq_error: AtomicU64,
    /// Requests that ran into a timeout.
    pub rq_timeout: AtomicU64,
    /// Put aside by outlier detection.
    pub ejected: AtomicBool,
    /// What active health checks say: [`HealthFlag`]s.
    pub health_flags: AtomicU32,
    /// Server errors in a row.
    pub consecutive_5xx: AtomicU32,
    /// 502, 503 and 504 in a row.
    pub consecutive_gateway: AtomicU32,
    /// Failures on this side in a row, where they are counted apart.
    pub consecutive_local: AtomicU32,
    /// Results for outlier detection, counted while the cluster has it.
    pub results: ResultCounts,
    /// When the host was last found healthy after it was not, in milliseconds of [`now_ms`]; 0 is never yet. Slow start
    /// counts from here.
    pub healthy_since: AtomicU64,
    /// Success rates of the last interval in percent, as the bits of an `f64`, -1 where there were too few requests: of
    /// answers, and of this side's own part where that is counted apart.
    pub(crate) success_rate: [AtomicU64; 2],
}

/// How requests to a host ended, since it was first seen.
#[derive(Debug, Default)]
pub struct ResultCounts {
    /// Answers other than server errors.
    pub success: AtomicU64,
    /// Server errors; also failures on this side, where they are not counted apart.
    pub failure: AtomicU64,
    /// Connections and answers in time.
    pub local_success: AtomicU64,
    /// No connection, no answer in time.
    pub local_failure: AtomicU64,
}

/// What active health checks say of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthFlag {
    /// Unhealthy.
    FailedActiveHc = 1,
    /// Not checked yet, in a cluster where that matters (`ignore_new_hosts_until_first_hc`).
    PendingActiveHc = 2,
    /// Healthy, but of itself it says to be used last.
    DegradedActiveHc = 4,
    /// The last failure was that no answer came in time.
    ActiveHcTimeout = 8,
    /// It has told that it wants no traffic (`x-envoy-immediate-health-check-fail`).
    ExcludedViaImmediateHcFail = 16,
    /// Discovery names it no longer; it is kept while it is healthy.
    PendingDynamicRemoval = 32,
    /// An answer to a request has said that the host is to be used last (outlier detection).
    DegradedOutlierDetection = 64,
}

impl HostShared {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Relaxed),
            success_rate: [(); 2].map(|()| AtomicU64::new((-1f64).to_bits())),
            ..Self::default()
        }
    }

    /// Whether a flag is set.
    pub fn flag(&self, flag: HealthFlag) -> bool {
        self.health_flags.load(Relaxed) & flag as u32 != 0
    }

    /// Sets or clears a flag; only the main thread does. True where that changed it.
    pub(crate) fn set_flag(&self, flag: HealthFlag, on: bool) -> bool {
        let bit = flag as u32;
        let before = match on {
            true => self.health_flags.fetch_or(bit, Relaxed),
            false => self.health_flags.fetch_and(!bit, Relaxed),
        };
        (before & bit != 0) != on
    }

    /// The success rate of the last interval in percent, -1 where there was too little to count: of answers (0), or of
    /// this side's own part (1).
    pub fn success_rate(&self, which: usize) -> f64 {
        f64::from_bits(self.success_rate[which].load(Relaxed))
    }
}

/// Milliseconds since the process began, and never 0.
pub(crate) fn now_ms() -> u64 {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    1 + BEGAN.get_or_init(Instant::now).elapsed().as_millis() as u64
}

/// How many things happened within the last while, whatever has become of them since.
///
/// Time is cut into slots; a thing is forgotten with its slot, up to a sixteenth of the while too late.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    /// The slot's number in the upper half, its count in the lower.
    slots: [AtomicU64; Self::SLOTS as usize],
}

impl Recent {
    /// Slots of a while, and the one that is being filled.
    const SLOTS: u64 = 17;

    fn slot(interval: Duration, now_ms: u64) -> u32 {
        let width = interval.as_micros() as u64 / (Self::SLOTS - 1);
        (now_ms * 1000 / width.max(1)) as u32
    }

    /// Counts one more.
    pub(crate) fn add(&self, interval: Duration, now_ms: u64) {
        let number = u64::from(Self::slot(interval, now_ms));
        let slot = &self.slots[(number % Self::SLOTS) as usize];
        let _ = slot.fetch_update(Relaxed, Relaxed, |old| match old >> 32 == number {
            true => Some(old + 1),
            // What it held is over.
            false => Some(number << 32 | 1),
        });
    }

    /// The count of the last while.
    pub(crate) fn count(&self, interval: Duration, now_ms: u64) -> u32 {
        let now = Self::slot(interval, now_ms);
        let slots = self.slots.iter().map(|slot| slot.load(Relaxed));
        slots
            .filter(|slot| now.wrapping_sub((slot >> 32) as u32) < Self::SLOTS as u32)
            .map(|slot| slot as u32)
            .sum()
    }
}

/// A count with a limit that is held exactly.
#[derive(Debug, Default)]
pub struct Tally(AtomicU32);

impl Tally {
    /// Counts one more unless `limit` is reached.
    pub fn acquire(&self, limit: u32) -> bool {
        self.0
            .fetch_update(AcqRel, Acquire, |count| {
                (count < limit).then_some(count + 1)
            })
            .is_ok()
    }

    /// Counts one more whatever the limit is.
    pub fn force(&self) {
        self.0.fetch_add(1, AcqRel);
    }

    /// Counts one less.
    pub fn release(&self) {
        self.0.fetch_sub(1, AcqRel);
    }

    /// The count.
    pub fn count(&self) -> u32 {
        self.0.load(Acquire)
    }
}

/// One unit of a [`Tally`], or of two, given back when it is dropped.
#[derive(Debug)]
pub struct Permit(Arc<Tally>, Option<Arc<Tally>>);

impl Permit {
    /// A unit, unless `limit` is reached.
    pub fn acquire(tally: &Arc<Tally>, limit: u32) -> Option<Self> {
        tally.acquire(limit).then(|| Self(tally.clone(), None))
    }

    /// A unit beyond any limit.
    pub fn force(tally: &Arc<Tally>) -> Self {
        tally.force();
        Self(tally.clone(), None)
    }

    /// With a unit of another tally, unless its limit is reached.
    pub fn and(mut self, tally: &Arc<Tally>, limit: u32) -> Option<Self> {
        if !tally.acquire(limit) {
            return None;
        }
        self.1 = Some(tally.clone());
        Some(self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.release();
        if let Some(tally) = &self.1 {
            tally.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{cluster::RetryBudget, matcher::Percent};

    #[test]
    fn a_limit_is_exact_across_threads() {
        let tally = Arc::new(Tally::default());
        let permits: Vec<_> = (0..4)
            .map(|_| {
                let tally = tally.clone();
                std::thread::spawn(move || {
                    (0..1000)
                        .filter_map(|_| Permit::acquire(&tally, 100))
                        .collect::<Vec<_>>()
                })
            })
            .flat_map(|thread| thread.join().expect("the thread ends well"))
            .collect();
        assert_eq!((permits.len(), tally.count()), (100, 100));
        drop(permits);
        assert_eq!(tally.count(), 0);
    }

    #[test]
    fn what_happened_lately_counts_for_so_long() {
        let recent = Recent::default();
        let interval = Duration::from_millis(1600);
        (0..10).for_each(|_| recent.add(interval, 1000));
        recent.add(interval, 2000);
        for (now, count) in [(1000, 10), (2000, 11), (2600, 11), (2700, 1), (3700, 0)] {
            assert_eq!(recent.count(interval, now), count, "at {now} ms");
        }
        // A slot is used again.
        recent.add(interval, 1000 + 17 * 100 * 5);
        assert_eq!(recent.count(interval, 1000 + 17 * 100 * 5), 1);
    }

    #[test]
    fn a_budget_with_an_interval_counts_what_is_over_too() {
        let shared = BreakerShared::default();
        let interval = Duration::from_secs(60);
        let limits = |interval| Thresholds {
            retry_budget: Some(RetryBudget {
                interval,
                budget: Percent::whole(20),
                min_retry_concurrency: 3,
            }),
            ..Thresholds::default()
        };
        (0..40).for_each(|_| shared.recent.add(interval, now_ms()));
        assert_eq!(shared.retries_allowed(&limits(Some(interval))), 8);
        assert_eq!(shared.retries_allowed(&limits(None)), 3);
    }
}
