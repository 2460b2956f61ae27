//! Filters that let a connection in or not: `connection_limit` and `local_ratelimit`.
//!
//! What they count is one for all workers. Each worker finds it in [`SharedLimits`] when the chain comes to life.

use std::{
    any::Any,
    collections::HashMap,
    rc::Rc,
    sync::{
        Arc, Mutex, Weak,
        atomic::{
            AtomicU64,
            Ordering::{AcqRel, Acquire},
        },
    },
    time::{Duration, Instant},
};

use crate::{
    cluster::shared::{Permit, Tally},
    plan::network::{ConnectionLimit, LocalRateLimit, TokenBucketPlan},
    worker::Worker,
};

stats::group! {
    /// `connection_limit.PREFIX.`
    pub(super) struct ConnectionLimitStats {
        counter limited_connections,
        gauge active_connections,
    }
}

stats::group! {
    /// `local_rate_limit.PREFIX.`
    pub(super) struct LocalRateLimitStats {
        counter rate_limited,
    }
}

/// One such filter as a worker runs it.
#[derive(Debug)]
pub(super) enum Gate {
    ConnectionLimit {
        plan: Arc<ConnectionLimit>,
        stats: Rc<ConnectionLimitStats>,
        open: Arc<Tally>,
    },
    LocalRateLimit {
        plan: Arc<LocalRateLimit>,
        stats: LocalRateLimitStats,
        bucket: Arc<TokenBucket>,
    },
}

/// Held while the connection is open.
#[derive(Debug)]
pub(super) struct Entered(Option<(Rc<ConnectionLimitStats>, Permit)>);

/// The connection has to close.
#[derive(Debug)]
pub(super) struct Refusal {
    delay: Option<Duration>,
}

impl Refusal {
    /// Waits as long as the configuration keeps a refused client waiting.
    pub(super) async fn wait(&self) {
        if let Some(delay) = self.delay {
            tokio::time::sleep(delay).await;
        }
    }
}

impl Gate {
    pub(super) fn connection_limit(plan: &Arc<ConnectionLimit>, worker: &Worker) -> Self {
        let scope = format!("connection_limit.{}.", plan.stat_prefix);
        let key = Key::Plan(Arc::as_ptr(plan) as usize);
        Self::ConnectionLimit {
            plan: plan.clone(),
            stats: Rc::new(ConnectionLimitStats::new(worker.stats.scope(&scope))),
            open: worker.shared.limits.find(key, Tally::default),
        }
    }

    pub(super) fn local_rate_limit(plan: &Arc<LocalRateLimit>, worker: &Worker) -> Self {
        let scope = format!("local_rate_limit.{}.", plan.stat_prefix);
        let key = match &plan.share_key {
            Some(name) => Key::Named(name.clone(), plan.bucket),
            None => Key::Plan(Arc::as_ptr(plan) as usize),
        };
        let make = || TokenBucket::new(plan.bucket);
        Self::LocalRateLimit {
            plan: plan.clone(),
            stats: LocalRateLimitStats::new(worker.stats.scope(&scope)),
            bucket: worker.shared.limits.find(key, make),
        }
    }

    /// Lets a connection in, or not.
    pub(super) fn enter(&self) -> Result<Entered, Refusal> {
        match self {
            Self::ConnectionLimit { plan, stats, open } => {
                if !plan.enabled {
                    return Ok(Entered(None));
                }
                match Permit::acquire(open, plan.max_connections) {
                    Some(permit) => {
                        stats.active_connections().inc();
                        Ok(Entered(Some((stats.clone(), permit))))
                    }
                    None => {
                        stats.limited_connections().inc();
                        Err(Refusal { delay: plan.delay })
                    }
                }
            }
            Self::LocalRateLimit {
                plan,
                stats,
                bucket,
            } => {
                if !plan.enabled || bucket.take(Instant::now()) {
                    return Ok(Entered(None));
                }
                stats.rate_limited().inc();
                Err(Refusal { delay: None })
            }
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some((stats, _)) = &self.0 {
            stats.active_connections().dec();
        }
    }
}

/// What gates of all workers count together; kept while a worker uses it.
#[derive(Debug, Default)]
pub struct SharedLimits(Mutex<HashMap<Key, Weak<dyn Any + Send + Sync>>>);

#[derive(Debug, PartialEq, Eq, Hash)]
enum Key {
    /// The address of the filter's plan, which all workers share, and which lives as long as what is kept under it.
    Plan(usize),
    /// Filters of the same `share_key` and the same bucket.
    Named(Arc<str>, TokenBucketPlan),
    /// The connections of the listener of this name.
    Listener(Arc<str>),
}

impl SharedLimits {
    /// The count of a listener's connections.
    pub(crate) fn of_listener(&self, name: &Arc<str>) -> Arc<Tally> {
        self.find(Key::Listener(name.clone()), Tally::default)
    }

    /// What is kept under the key; called when a chain comes to life, never for a connection.
    fn find<T: Any + Send + Sync>(&self, key: Key, make: impl FnOnce() -> T) -> Arc<T> {
        let mut all = self
            .0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        all.retain(|_, kept| kept.strong_count() > 0);
        let kept = all.get(&key).and_then(Weak::upgrade);
        if let Some(kept) = kept.and_then(|kept| kept.downcast().ok()) {
            return kept;
        }
        let made = Arc::new(make());
        let weak: Weak<dyn Any + Send + Sync> = Arc::downgrade(&(made.clone() as Arc<_>));
        all.insert(key, weak);
        made
    }
}

/// Tokens that are filled up at an interval; one word, so that workers need no lock.
#[derive(Debug)]
pub(super) struct TokenBucket {
    plan: TokenBucketPlan,
    began: Instant,
    /// Number of the last filling in the upper half, tokens in the lower.
    state: AtomicU64,
}

impl TokenBucket {
    fn new(plan: TokenBucketPlan) -> Self {
        Self {
            plan,
            began: Instant::now(),
            state: AtomicU64::new(u64::from(plan.max_tokens)),
        }
    }

    /// Takes a token, if there is one.
    fn take(&self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.began);
        let fillings = passed.as_nanos() / self.plan.fill_interval.as_nanos().max(1);
        let fillings = u32::try_from(fillings).unwrap_or(u32::MAX);
        let taken = self.state.fetch_update(AcqRel, Acquire, |state| {
            let (filled, tokens) = ((state >> 32) as u32, state as u32);
            let more = fillings
                .saturating_sub(filled)
                .saturating_mul(self.plan.tokens_per_fill);
            let tokens = tokens.saturating_add(more).min(self.plan.max_tokens);
            let tokens = tokens.checked_sub(1)?;
            Some(u64::from(fillings.max(filled)) << 32 | u64::from(tokens))
        });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fills_up_at_its_interval_and_never_over() {
        let bucket = TokenBucket::new(TokenBucketPlan {
            max_tokens: 3,
            tokens_per_fill: 2,
            fill_interval: Duration::from_secs(1),
        });
        let at = |millis| bucket.began + Duration::from_millis(millis);
        let take = |millis, times| (0..times).filter(|_| bucket.take(at(millis))).count();
        assert_eq!(take(0, 5), 3, "it begins full");
        assert_eq!(take(999, 5), 0);
        assert_eq!(take(1000, 5), 2);
        assert_eq!(take(9000, 5), 3, "no more than it holds");
        assert_eq!(take(8000, 5), 0, "a clock that lags fills nothing twice");
    }

    #[test]
    fn limits_are_shared_while_they_are_used() {
        let limits = SharedLimits::default();
        let first = limits.find(Key::Plan(1), Tally::default);
        assert!(Arc::ptr_eq(
            &first,
            &limits.find(Key::Plan(1), Tally::default)
        ));
        assert!(!Arc::ptr_eq(
            &first,
            &limits.find(Key::Plan(2), Tally::default)
        ));
        first.force();
        drop(first);
        assert_eq!(limits.find(Key::Plan(1), Tally::default).count(), 0);
    }
}
