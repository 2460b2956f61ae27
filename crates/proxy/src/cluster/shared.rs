//! What workers share: the whole list of facts that cross threads on the data path, each an atomic.
//!
//! Everything else belongs to one worker. Counts here are exact across workers, because the limits that they are held
//! against are the user's.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Instant,
};

use crate::{
    network::SharedLimits, overload::Overload, plan::cluster::Thresholds, transport::Secrets,
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
    /// What network filters count over all workers.
    pub limits: SharedLimits,
    /// Certificates, keys and authorities: read by the main thread, used by handshakes.
    pub secrets: Arc<Secrets>,
    /// Whether readiness should fail (`/healthcheck/fail`).
    pub health_failed: AtomicBool,
}

/// The facts of one cluster, one entry for each routing priority (DEFAULT, HIGH).
#[derive(Debug, Default)]
pub struct ClusterShared {
    /// A worker has brought it to life: there is something to tell.
    pub(crate) touched: AtomicBool,
    pub(crate) breakers: [BreakerShared; 2],
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
    /// Connection pools: one a worker and host, and what else keeps connections apart.
    pub pools: Arc<Tally>,
}

impl BreakerShared {
    /// How many retries there may be now: a number, or a share of the requests under way.
    pub(crate) fn retries_allowed(&self, limits: &Thresholds) -> u32 {
        match &limits.retry_budget {
            None => limits.max_retries,
            Some(budget) => {
                let active = f64::from(self.requests.count() + self.pending.count());
                let share = active * budget.budget.ratio();
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
    /// Server errors in a row.
    pub consecutive_5xx: AtomicU32,
    /// 502, 503 and 504 in a row.
    pub consecutive_gateway: AtomicU32,
    /// Failures on this side in a row, where they are counted apart.
    pub consecutive_local: AtomicU32,
    /// When the host was first seen: slow start counts from here.
    pub born: Option<Instant>,
}

impl HostShared {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Relaxed),
            born: Some(Instant::now()),
            ..Self::default()
        }
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
}
