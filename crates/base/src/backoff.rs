//! Exponential back-off with full jitter.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// Waiting times between attempts: each is drawn evenly from zero to a bound that doubles up to a cap.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    bound: Duration,
}

impl Backoff {
    /// Begins with waits of up to `base`, never above `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap,
            bound: base,
        }
    }

    /// For a broken xDS stream: 500 ms, at most 1 s. Envoy waits up to 30 s; a proxy that comes back within a second
    /// leaves no window in which a restarted control plane looks healthy and its proxies run on old routes.
    pub fn xds() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(1))
    }

    /// How long to wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        let bound = self.bound;
        self.bound = (bound * 2).min(self.cap);
        // Each `RandomState` is keyed anew: a hash of nothing is randomness enough for jitter.
        let random = RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64;
        bound.mul_f64(random)
    }

    /// An attempt succeeded: begin anew.
    pub fn reset(&mut self) {
        self.bound = self.base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_below_a_bound_that_doubles_up_to_the_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(300));
        for bound in [100, 200, 300, 300] {
            assert!(backoff.next_wait() <= Duration::from_millis(bound));
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(100));
    }
}
