//! The objects of a cluster as a store: one list and watch a kind, all of them into one state.
//!
//! The store is ready when every kind has been listed once; from then on it is in step with the API server and stays so
//! across its restarts: each watch goes on where it stopped, lists again where that is too long ago (410), and waits
//! longer after each failure. A kind that the cluster does not have (Gateway API, say) counts as empty and is asked for
//! again now and then.

mod follow;
mod state;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use config::{Kind, Problem, Snapshot, Update, Watch};
use kube::Client;
use tokio::sync::mpsc;
use tracing::{info, warn};

use self::{follow::Followed, state::State};

/// What of a cluster is read.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where settings are; elsewhere ConfigMaps are read for the authorities in them alone.
    pub root_namespace: String,
    /// The ConfigMap there that holds MeshConfig.
    pub mesh_map: String,
    /// The kinds to read.
    pub kinds: Vec<Kind>,
    /// Waiting time before a kind that the cluster does not have is asked for again.
    pub absent_retry: Duration,
}

impl Options {
    /// Everything that the control plane of a revision needs.
    pub fn new(root_namespace: &str, revision: &str) -> Self {
        // Nothing is taken from service accounts but their names, which pods tell.
        let unread = [Kind::ServiceAccount];
        Options {
            root_namespace: root_namespace.to_owned(),
            mesh_map: crate::of_revision(config::MESH_CONFIG_MAP, revision),
            kinds: Kind::ALL
                .iter()
                .copied()
                .filter(|k| !unread.contains(k))
                .collect(),
            absent_retry: Duration::from_secs(10),
        }
    }
}

/// A store that has read everything once.
#[derive(Debug)]
pub struct Opened {
    /// All objects.
    pub snapshot: Arc<Snapshot>,
    /// What is wrong with those that are not among them.
    pub problems: Arc<Vec<Problem>>,
    /// What changes from now on.
    pub watch: Watch,
}

/// Reads all objects; comes back when every kind has been listed, however long that takes.
pub async fn open(client: Client, options: Options) -> Opened {
    let (send, mut events) = mpsc::channel(1024);
    for kind in &options.kinds {
        tokio::spawn(follow::run(
            client.clone(),
            *kind,
            options.clone(),
            send.clone(),
        ));
    }
    drop(send);
    let mut state = State::new(
        &options.kinds,
        Snapshot::with_mesh_in(&options.root_namespace, &options.mesh_map),
    );
    let started = Instant::now();
    let mut told = Instant::now();
    while !state.is_complete() {
        let next = tokio::time::timeout(TELL, events.recv()).await;
        if let Ok(Some(event)) = next {
            state.apply(event);
        }
        if told.elapsed() > TELL && !state.is_complete() {
            told = Instant::now();
            let missing: Vec<_> = state.missing().map(Kind::name).collect();
            warn!(
                "after {} s still waiting for the API server's lists of {}",
                started.elapsed().as_secs(),
                missing.join(", ")
            );
        }
    }
    let update = state.update().unwrap_or_else(|| state.current());
    info!(
        "all objects of the cluster were read in {:.1} s",
        started.elapsed().as_secs_f64()
    );
    let (updates, watch) = Watch::channel();
    tokio::spawn(pass_on(state, events, updates));
    Opened {
        snapshot: update.snapshot,
        problems: update.problems,
        watch,
    }
}

/// Makes updates of events: those that come together go together.
async fn pass_on(
    mut state: State,
    mut events: mpsc::Receiver<Followed>,
    updates: mpsc::Sender<Update>,
) {
    while let Some(event) = events.recv().await {
        state.apply(event);
        let first = Instant::now();
        while first.elapsed() < SETTLE_MAX {
            match tokio::time::timeout(SETTLE, events.recv()).await {
                Ok(Some(event)) => state.apply(event),
                Ok(None) | Err(_) => break,
            }
        }
        // Half a list is not a state of the cluster; the rest of it is on its way.
        if let Some(update) = state.update()
            && updates.send(update).await.is_err()
        {
            return;
        }
    }
}

/// A moment without an event ends a batch …
const SETTLE: Duration = Duration::from_millis(5);
/// … and this much time does anyway.
const SETTLE_MAX: Duration = Duration::from_millis(100);
const TELL: Duration = Duration::from_secs(10);
