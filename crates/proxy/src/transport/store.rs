//! What the main thread has read and all workers use.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
};

use base::clock::Clock;
use tls::server::{Tickets, ticketer};

use super::{Material, Source, keeper::source_of};
use crate::plan::format_sources::TextSource;

/// Certificates, keys and authorities by where they come from.
///
/// The locks are taken where a handshake finds that something has changed, and where a context is built: never on the
/// way of a request.
#[derive(Debug, Default)]
pub(crate) struct Secrets {
    generation: AtomicU64,
    held: RwLock<HashMap<Source, Arc<Material>>>,
    /// What seals session tickets, by a digest of what a ticket vouches for. It outlives contexts, so that a client
    /// resumes with every worker and after a rotation.
    tickets: Mutex<HashMap<[u8; 32], Weak<dyn Tickets>>>,
    /// By whose time certificates are judged.
    pub(crate) clock: Clock,
}

impl Secrets {
    /// None yet.
    pub(crate) fn new(clock: Clock) -> Self {
        Self {
            clock,
            ..Self::default()
        }
    }

    /// Changes whenever anything does. Whoever has seen this number has seen all that it stands for.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    pub(crate) fn find(&self, source: &Source) -> Option<Arc<Material>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.get(source).cloned()
    }

    pub(crate) fn sources(&self) -> Vec<Source> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.keys().cloned().collect()
    }

    pub(crate) fn put(&self, source: Source, material: Arc<Material>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.insert(source, material);
        drop(held);
        self.generation.fetch_add(1, Release);
    }

    pub(crate) fn forget(&self, source: &Source) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.remove(source);
        drop(held);
        self.generation.fetch_add(1, Release);
    }

    /// Makes these the ones that this thread's formats print from.
    pub(crate) fn print_here(self: &Arc<Self>) {
        PRINTED.set(Some(self.clone()));
    }

    /// What seals the tickets of contexts with this digest.
    pub(crate) fn tickets(&self, digest: [u8; 32]) -> Result<Arc<dyn Tickets>, String> {
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = tickets.get(&digest).and_then(Weak::upgrade) {
            return Ok(found);
        }
        let made = ticketer().map_err(|error| error.to_string())?;
        tickets.retain(|_, other| other.strong_count() > 0);
        tickets.insert(digest, Arc::downgrade(&made));
        Ok(made)
    }
}

/// Writes what a format prints of a file or secret; `None` where it is not there. The lock is taken for formats with such
/// an operator alone.
pub(crate) fn print(text: &TextSource, out: &mut Vec<u8>) -> Option<()> {
    let found = PRINTED.with_borrow(|ours| ours.as_ref()?.find(&source_of(text)))?;
    match &*found {
        Material::Text(text) => out.extend_from_slice(text),
        Material::Certificate(_) | Material::Validation { .. } => return None,
    }
    Some(())
}

thread_local! {
    /// Formats are filled far from whoever holds the secrets.
    static PRINTED: RefCell<Option<Arc<Secrets>>> = const { RefCell::new(None) };
}
