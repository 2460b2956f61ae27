//! Random numbers of one worker: fast, not secret (load balancing, percentages, jitter).

use std::{
    cell::Cell,
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use crate::plan::matcher::Percent;

/// A generator (SplitMix64) that belongs to one thread.
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Default for Random {
    /// Seeded by the system, through the standard library's keys of hash maps.
    fn default() -> Self {
        Self::seeded(RandomState::new().hash_one(0))
    }
}

impl Random {
    /// A generator with a known sequence.
    pub fn seeded(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// 64 random bits.
    pub fn bits(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A UUID of version 4, as request ids are.
    pub(crate) fn uuid(&self) -> uuid::Uuid {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.bits().to_ne_bytes());
        bytes[8..].copy_from_slice(&self.bits().to_ne_bytes());
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    }

    /// A duration, longer by up to a share of itself: what begins together does not end together.
    pub fn jittered(&self, least: Duration, share: Percent) -> Duration {
        let most = least.mul_f64(share.ratio());
        least + Duration::from_millis(self.below(most.as_millis() as u64 + 1))
    }

    /// A number in `0..limit`; 0 where `limit` is 0.
    pub fn below(&self, limit: u64) -> u64 {
        // The bias of the multiplication is far below what any use here could notice.
        ((u128::from(self.bits()) * u128::from(limit)) >> 64) as u64
    }
}
