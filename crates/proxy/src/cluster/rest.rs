//! How long an origin keeps a connection that rests, learned from the ones that it closed.
//!
//! An origin closes a resting connection without a word, and a request that is sent in the same moment is lost. Who
//! knows the origin's timeout stays a tenth below it. It is learned for each host and worker: two connections that were
//! closed at about the same age make a timeout, an older one that still lives refutes it. `Keep-Alive: timeout=N` in a
//! response says it outright.

use std::{cell::Cell, time::Duration};

/// What is known about one host.
#[derive(Debug, Default)]
pub(crate) struct OriginTimeout {
    learned: Cell<Option<Duration>>,
    votes: Cell<u8>,
    told: Cell<Option<Duration>>,
}

impl OriginTimeout {
    /// A connection was closed by the origin after it had rested for so long.
    pub(crate) fn closed_after(&self, rest: Duration) {
        let votes = self.votes.get();
        match self.learned.get() {
            Some(learned) if rest * 5 > learned * 4 && rest * 4 < learned * 5 => {
                self.learned.set(Some(learned.min(rest)));
                self.votes.set(votes.saturating_add(1).min(MOST));
            }
            // A longer life is rather the rule, a shorter one rather an accident: a restart, a limit of requests.
            Some(learned) if votes > 1 && rest < learned => self.votes.set(votes - 1),
            _ => {
                self.learned.set(Some(rest));
                self.votes.set(1);
            }
        }
    }

    /// A connection that has rested for so long is still open.
    pub(crate) fn alive_after(&self, rest: Duration) {
        if self
            .learned
            .get()
            .is_some_and(|learned| rest * 4 >= learned * 5)
        {
            self.learned.set(None);
            self.votes.set(0);
        }
    }

    /// What the origin says itself.
    pub(crate) fn told(&self, timeout: Duration) {
        self.told.set(Some(timeout));
    }

    /// From this age on a connection is not used any more.
    pub(crate) fn limit(&self) -> Option<Duration> {
        let learned = self.learned.get().filter(|_| self.votes.get() >= ENOUGH);
        let timeout = match (learned, self.told.get()) {
            (Some(learned), Some(told)) => learned.min(told),
            (learned, told) => learned.or(told)?,
        };
        Some(timeout * 9 / 10)
    }
}

/// Connections that have to agree.
const ENOUGH: u8 = 2;

/// More agreement than this does not make it surer: so many accidents in a row are a new rule.
const MOST: u8 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn two_that_agree_make_a_timeout() {
        let origin = OriginTimeout::default();
        origin.closed_after(ms(5000));
        assert_eq!(origin.limit(), None);
        origin.closed_after(ms(5100));
        assert_eq!(origin.limit(), Some(ms(4500)));
        origin.closed_after(ms(4900));
        assert_eq!(origin.limit(), Some(ms(4410)));
    }

    #[test]
    fn a_restart_is_no_timeout_and_one_that_was_raised_is_noticed() {
        let origin = OriginTimeout::default();
        (0..4).for_each(|_| origin.closed_after(ms(1000)));
        origin.closed_after(ms(3));
        assert_eq!(origin.limit(), Some(ms(900)));
        origin.alive_after(ms(1100));
        assert_eq!(origin.limit(), Some(ms(900)));
        origin.alive_after(ms(1300));
        assert_eq!(origin.limit(), None);
        // One that was lowered.
        (0..9).for_each(|_| origin.closed_after(ms(1000)));
        (0..6).for_each(|_| origin.closed_after(ms(20)));
        assert_eq!(origin.limit(), Some(ms(18)));
    }

    #[test]
    fn what_the_origin_says_counts_at_once() {
        let origin = OriginTimeout::default();
        origin.told(ms(5000));
        assert_eq!(origin.limit(), Some(ms(4500)));
        origin.closed_after(ms(2000));
        origin.closed_after(ms(2000));
        assert_eq!(origin.limit(), Some(ms(1800)));
    }
}
