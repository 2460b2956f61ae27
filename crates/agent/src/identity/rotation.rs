//! When a certificate is to be replaced.

use std::{
    hash::{BuildHasher, RandomState},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tls::certificate::Certificate;

/// A clock that was set back by more than this since a certificate came makes it worth a new one: its begin may lie
/// ahead of the time that peers see.
const SET_BACK: Duration = Duration::from_secs(60);

/// How early certificates are replaced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// The part of its life that is left when a certificate is replaced (`SECRET_GRACE_PERIOD_RATIO`).
    pub ratio: f64,
    /// How far from that each is, by chance, so that a fleet that started together does not come back together.
    pub jitter: f64,
}

/// The life of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// When it came.
    pub since: SystemTime,
    /// When it ends.
    pub until: SystemTime,
    /// When it is to be replaced.
    pub renew: SystemTime,
}

impl Term {
    /// The life of a certificate that came at `now`.
    ///
    /// Its begin does not count: authorities set it back, for clocks that are behind.
    pub fn of(leaf: &Certificate, now: SystemTime, policy: Policy) -> Self {
        let until = UNIX_EPOCH + Duration::from_secs(u64::try_from(leaf.not_after).unwrap_or(0));
        let life = until.duration_since(now).unwrap_or_default();
        let part = (policy.ratio + policy.jitter * (2.0 * random() - 1.0)).clamp(0.0, 1.0);
        Self {
            since: now,
            until,
            renew: until - life.mul_f64(part),
        }
    }

    /// Whether it is time for the next one.
    pub fn due(&self, now: SystemTime) -> bool {
        now >= self.renew || now + SET_BACK < self.since
    }

    /// Time until then.
    pub fn wait(&self, now: SystemTime) -> Duration {
        match self.due(now) {
            true => Duration::ZERO,
            false => self.renew.duration_since(now).unwrap_or_default(),
        }
    }

    /// Since when it has been worthless, if it is.
    pub fn expired(&self, now: SystemTime) -> Option<Duration> {
        (now >= self.until).then(|| now.duration_since(self.until).unwrap_or_default())
    }

    /// Its whole life.
    pub fn life(&self) -> Duration {
        self.until.duration_since(self.since).unwrap_or_default()
    }
}

/// From 0 to 1. Each `RandomState` is keyed anew: a hash of nothing is randomness enough for jitter.
fn random() -> f64 {
    RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(until: SystemTime) -> Certificate {
        let mut params = rcgen::CertificateParams::default();
        params.not_before = (until - Duration::from_secs(90_000)).into();
        params.not_after = until.into();
        let key = rcgen::KeyPair::generate().expect("key");
        let made = params.self_signed(&key).expect("signed");
        Certificate::read(made.der()).expect("certificate")
    }

    #[test]
    fn a_certificate_is_replaced_at_half_its_life_and_when_the_clock_was_set() {
        let hour = Duration::from_secs(3600);
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let policy = Policy {
            ratio: 0.5,
            jitter: 0.01,
        };
        let mut renewals = Vec::new();
        for _ in 0..50 {
            let term = Term::of(&leaf(now + 24 * hour), now, policy);
            let at = term.renew.duration_since(now).expect("later");
            assert!(
                at >= hour.mul_f64(11.76) && at <= hour.mul_f64(12.24),
                "{at:?}"
            );
            renewals.push(at);
        }
        renewals.dedup();
        assert!(renewals.len() > 40, "each at a time of its own");

        let term = Term::of(&leaf(now + 24 * hour), now, policy);
        // An hour ahead nothing is due, an hour back a new one is.
        assert!(!term.due(now) && !term.due(now + hour) && term.due(now - hour));
        assert!(term.due(now + 13 * hour));
        assert_eq!(term.expired(now + 23 * hour), None);
        assert_eq!(term.expired(now + 25 * hour), Some(hour));
        assert_eq!(term.wait(now + 13 * hour), Duration::ZERO);
        assert_eq!(term.life(), 24 * hour);
        // One of ten seconds, and the clock an hour ahead: it has expired, and is due.
        let short = Term::of(&leaf(now + Duration::from_secs(10)), now, policy);
        assert!(short.due(now + hour) && short.expired(now + hour).is_some());
        assert!(short.due(now - hour) && short.expired(now - hour).is_none());
    }
}
