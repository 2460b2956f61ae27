//! What of former listeners is left, for `listener_manager.total_listeners_draining` and `total_filter_chains_draining`.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use crate::plan::{FilterChain, Listener};

/// Listeners and filter chains that were replaced or removed, and that still have connections in some worker.
#[derive(Debug, Default)]
pub struct Drains {
    listeners: Mutex<Counts>,
    chains: Mutex<Counts>,
}

/// How many workers drain a plan, by the plan's address.
type Counts = HashMap<usize, u32>;

/// Held by a worker while something of its plan drains.
#[derive(Debug)]
pub(crate) struct Draining {
    what: Former,
    drains: Arc<Drains>,
}

/// What drains. It is kept, so that no other plan gets its address.
#[derive(Debug)]
pub(super) enum Former {
    Listener(Arc<Listener>),
    Chain(Arc<FilterChain>),
}

impl Drains {
    /// How many listeners and chains there are.
    pub(crate) fn count(&self) -> [usize; 2] {
        [self.listeners.lock().len(), self.chains.lock().len()]
    }
}

impl Draining {
    pub(super) fn new(what: Former, drains: &Arc<Drains>) -> Self {
        let draining = Self {
            what,
            drains: drains.clone(),
        };
        let (key, counts) = draining.place();
        *counts.lock().entry(key).or_default() += 1;
        draining
    }

    fn place(&self) -> (usize, &Mutex<Counts>) {
        match &self.what {
            Former::Listener(plan) => (Arc::as_ptr(plan) as usize, &self.drains.listeners),
            Former::Chain(plan) => (Arc::as_ptr(plan) as usize, &self.drains.chains),
        }
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        let (key, counts) = self.place();
        let mut counts = counts.lock();
        if let Some(workers) = counts.get_mut(&key) {
            *workers -= 1;
            if *workers == 0 {
                counts.remove(&key);
            }
        }
    }
}
