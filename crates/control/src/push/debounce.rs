//! When to push: changes of configuration wait for each other, changes of endpoints do not.
//!
//! istiod's rule: push when nothing came for [`Timing::quiet`], or [`Timing::longest`] after the first change. A batch
//! that holds endpoint changes only is pushed at once: a pod that went away must not get traffic for another 100 ms.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use config::ObjectKey;

use super::change::{is_endpoint_kind, matters};

/// How long changes wait.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Time without a change after which a batch is pushed (`PILOT_DEBOUNCE_AFTER`).
    pub quiet: Duration,
    /// The longest that a batch waits (`PILOT_DEBOUNCE_MAX`).
    pub longest: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            quiet: Duration::from_millis(100),
            longest: Duration::from_secs(10),
        }
    }
}

/// Collects changes until they are due. Sans-io: the caller tells the time.
#[derive(Debug)]
pub struct Debounce {
    timing: Timing,
    endpoints: Batch,
    others: Batch,
}

#[derive(Debug, Default)]
struct Batch {
    keys: BTreeSet<ObjectKey>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Debounce {
    /// With nothing waiting.
    pub fn new(timing: Timing) -> Self {
        Debounce {
            timing,
            endpoints: Batch::default(),
            others: Batch::default(),
        }
    }

    /// Takes changed objects in. How many of them can matter to a proxy.
    pub fn add(&mut self, keys: BTreeSet<ObjectKey>, now: Instant) -> usize {
        let mut count = 0;
        for key in keys.into_iter().filter(matters) {
            count += 1;
            let batch = if is_endpoint_kind(key.kind) {
                &mut self.endpoints
            } else {
                &mut self.others
            };
            batch.keys.insert(key);
            batch.first.get_or_insert(now);
            batch.last = Some(now);
        }
        count
    }

    /// When to call [`Debounce::take`] next; `None` while nothing waits.
    pub fn due(&self) -> Option<Instant> {
        let others = match (self.others.first, self.others.last) {
            (Some(first), Some(last)) => {
                Some((last + self.timing.quiet).min(first + self.timing.longest))
            }
            _ => None,
        };
        match (others, self.endpoints.first) {
            // New pods come with new services: what came together goes together, but endpoints never wait for long.
            (Some(others), Some(endpoints)) => Some(others.min(endpoints + self.timing.quiet)),
            (Some(others), None) => Some(others),
            (None, endpoints) => endpoints,
        }
    }

    /// What is due now: the changed objects, and when the first of them came.
    pub fn take(&mut self, now: Instant) -> Option<(BTreeSet<ObjectKey>, Instant)> {
        if self.due().is_none_or(|due| due > now) {
            return None;
        }
        let (mut others, endpoints) = (
            std::mem::take(&mut self.others),
            std::mem::take(&mut self.endpoints),
        );
        others.keys.extend(endpoints.keys);
        let first = [others.first, endpoints.first]
            .into_iter()
            .flatten()
            .min()?;
        Some((others.keys, first))
    }
}

#[cfg(test)]
mod tests {
    use config::Kind;

    use super::*;

    fn keys(kind: Kind) -> BTreeSet<ObjectKey> {
        BTreeSet::from([ObjectKey::new(kind, "default", "x")])
    }

    #[test]
    fn configuration_waits_for_quiet_but_not_for_ever() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut debounce = Debounce::new(Timing::default());
        assert_eq!(debounce.due(), None);
        debounce.add(keys(Kind::VirtualService), at(0));
        debounce.add(keys(Kind::VirtualService), at(90));
        assert_eq!(debounce.due(), Some(at(190)));
        assert!(debounce.take(at(189)).is_none());
        let (taken, first) = debounce.take(at(190)).unwrap();
        assert_eq!((taken.len(), first), (1, at(0)));
        assert_eq!(debounce.due(), None);
        for ms in (0..=9_950).step_by(50) {
            debounce.add(keys(Kind::Gateway), at(ms));
        }
        assert_eq!(debounce.due(), Some(at(10_000)));
    }

    #[test]
    fn endpoints_alone_do_not_wait_and_others_take_them_along() {
        let now = Instant::now();
        let mut debounce = Debounce::new(Timing::default());
        debounce.add(keys(Kind::EndpointSlice), now);
        assert_eq!(debounce.take(now).unwrap().0.len(), 1);
        debounce.add(keys(Kind::Service), now);
        debounce.add(keys(Kind::EndpointSlice), now);
        assert!(debounce.take(now).is_none());
        assert_eq!(
            debounce
                .take(now + Duration::from_millis(100))
                .unwrap()
                .0
                .len(),
            2
        );
    }

    #[test]
    fn what_matters_to_no_proxy_makes_no_push() {
        let mut debounce = Debounce::new(Timing::default());
        let account = BTreeSet::from([ObjectKey::new(Kind::ServiceAccount, "default", "app")]);
        assert_eq!(debounce.add(account, Instant::now()), 0);
        assert_eq!(debounce.due(), None);
    }
}
