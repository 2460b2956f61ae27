//! The time of day, as far as decisions hang on it: expiry, rotation, tokens. Tests step it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

/// Tells the time. Clones tell the same.
#[derive(Clone, Default)]
pub struct Clock(Option<Arc<Mutex<SystemTime>>>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that stands still until it is set.
    pub fn manual(now: SystemTime) -> Self {
        Self(Some(Arc::new(Mutex::new(now))))
    }

    /// The time of day.
    pub fn now(&self) -> SystemTime {
        match &self.0 {
            None => SystemTime::now(),
            Some(hand) => *hand.lock(),
        }
    }

    /// Seconds since the epoch; 0 before it.
    pub fn seconds(&self) -> u64 {
        let since = self.now().duration_since(UNIX_EPOCH);
        since.unwrap_or(Duration::ZERO).as_secs()
    }

    /// Sets a manual clock; the machine's stays as it is.
    pub fn set(&self, now: SystemTime) {
        if let Some(hand) = &self.0 {
            *hand.lock() = now;
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str("Clock(system)"),
            Some(hand) => write!(f, "Clock({:?})", *hand.lock()),
        }
    }
}
