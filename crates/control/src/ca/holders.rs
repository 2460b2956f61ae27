//! Who has certificates, and who of them has the root that comes next.
//!
//! The protocol has no acknowledgement of roots. But every answer carries the roots of its moment, so that whoever was
//! given a certificate since a root was introduced has that root; and whoever was given none since then is harmless once
//! its certificate has ended.

use std::{collections::HashMap, net::IpAddr};

use base::spiffe::Identity;

/// An identity, and where it is used.
pub(super) type Holder = (Identity, Option<IpAddr>);

/// Holders that are remembered. With more, what is not known is waited for.
const MAX_HOLDERS: usize = 100_000;

/// The holders of certificates that are good. Times are seconds since 1970.
#[derive(Debug)]
pub(super) struct Holders {
    /// Everybody is known who was given a certificate from then on.
    since: u64,
    all: HashMap<Holder, Held>,
}

#[derive(Debug)]
struct Held {
    /// When the last of its certificates ends.
    until: u64,
    /// The answer had the next root in it.
    informed: bool,
}

impl Holders {
    /// Nobody; and nothing is known of the time before.
    pub(super) fn since(since: u64) -> Self {
        Self {
            since,
            all: HashMap::new(),
        }
    }

    /// Somebody is given a certificate, and the roots of now.
    pub(super) fn given(&mut self, holder: Holder, until: u64, now: u64) {
        if self.all.len() >= MAX_HOLDERS && !self.all.contains_key(&holder) {
            self.all.retain(|_, held| held.until > now);
            if self.all.len() >= MAX_HOLDERS {
                self.since = now;
                return;
            }
        }
        let held = self.all.entry(holder).or_insert(Held {
            until,
            informed: true,
        });
        held.until = held.until.max(until);
        held.informed = true;
    }

    /// A root is introduced that nobody has.
    pub(super) fn introduce(&mut self) {
        for held in self.all.values_mut() {
            held.informed = false;
        }
    }

    /// Whether somebody may lack the root that was introduced at `introduced`, where the longest life of a certificate
    /// is `longest`.
    pub(super) fn lack(&self, introduced: u64, longest: u64, now: u64) -> bool {
        if now >= introduced.saturating_add(longest) {
            return false;
        }
        // Somebody may have a certificate that was given before we began to look.
        let unknown = introduced < self.since.saturating_add(longest) && self.since > 0;
        unknown
            || self
                .all
                .values()
                .any(|held| !held.informed && held.until > now)
    }

    /// How many lack the root that was introduced last, and one of them.
    pub(super) fn lacking(&self, now: u64) -> Option<(usize, &Holder)> {
        let lacks = |held: &Held| !held.informed && held.until > now;
        let mut all = self.all.iter().filter(|(_, held)| lacks(held));
        let (first, _) = all.next()?;
        Some((1 + all.count(), first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(account: &str) -> Holder {
        let identity = Identity::new("td".to_owned(), "ns".to_owned(), account.to_owned());
        (identity.expect("an identity"), None)
    }

    #[test]
    fn a_root_waits_for_all_who_have_a_certificate_that_is_good() {
        let mut holders = Holders::since(0);
        assert!(!holders.lack(100, 1000, 100), "nobody has anything");
        holders.given(holder("a"), 600, 50);
        holders.given(holder("b"), 300, 50);
        holders.introduce();
        assert!(holders.lack(100, 1000, 150));
        holders.given(holder("a"), 900, 160);
        assert!(holders.lack(100, 1000, 200), "b has not come");
        let (count, (identity, _)) = holders.lacking(200).expect("b");
        assert_eq!(
            (count, identity.to_string().as_str()),
            (1, "spiffe://td/ns/ns/sa/b")
        );
        assert!(!holders.lack(100, 1000, 300), "b has nothing that is good");
        // One that came later has it from the start.
        holders.given(holder("c"), 900, 310);
        assert!(!holders.lack(100, 1000, 310));
    }

    #[test]
    fn after_a_restart_the_longest_life_is_waited_for() {
        let mut holders = Holders::since(90);
        holders.given(holder("a"), 600, 95);
        assert!(holders.lack(100, 1000, 1099));
        assert!(!holders.lack(100, 1000, 1100));
        // Long enough ago that everybody has come by.
        let holders = Holders::since(90);
        assert!(!holders.lack(1090, 1000, 1091));
    }
}
