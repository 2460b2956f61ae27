//! Reloads when something in the folder changes.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc as async_mpsc;
use tracing::warn;

use super::{Folder, Update};

/// New states of a store (a folder, or a cluster's API server), as they come. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    updates: async_mpsc::Receiver<Update>,
}

impl Watch {
    /// A watch, and where its store sends new states. Room for one makes a slow reader get fewer and larger updates.
    pub fn channel() -> (async_mpsc::Sender<Update>, Watch) {
        let (send, updates) = async_mpsc::channel(1);
        (send, Watch { updates })
    }

    /// The next state; `None` when the store is gone. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Update> {
        self.updates.recv().await
    }
}

impl Folder {
    /// Watches the folder from a thread of its own. Changes that come together make one update; whoever takes updates
    /// slowly gets fewer and larger ones.
    pub fn watch(self) -> io::Result<Watch> {
        let (events, woken) = mpsc::channel();
        let watching = Watching::start(self.root(), events);
        let (send, watch) = Watch::channel();
        thread::Builder::new()
            .name("config-folder".into())
            .spawn(move || run(self, watching, &woken, &send))?;
        Ok(watch)
    }
}

fn run(
    mut folder: Folder,
    mut watching: Watching,
    woken: &mpsc::Receiver<()>,
    send: &async_mpsc::Sender<Update>,
) {
    // What changed between the first reading and the first watch is found by the first pass.
    let mut wait = Duration::ZERO;
    loop {
        match woken.recv_timeout(wait) {
            Ok(()) => settle(woken),
            Err(RecvTimeoutError::Timeout) => {}
            // Without a watcher nobody sends: the poll alone finds changes.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(wait),
        }
        if send.is_closed() {
            return;
        }
        watching.follow(folder.root());
        let reloaded = folder.reload();
        if let Some(update) = reloaded.update
            && send.blocking_send(update).is_err()
        {
            return;
        }
        wait = reloaded.again.unwrap_or(POLL);
    }
}

/// Waits until nothing has happened for a moment: a writer that replaces several files is mostly done by then.
fn settle(woken: &mpsc::Receiver<()>) {
    let start = Instant::now();
    while start.elapsed() < SETTLE_MAX {
        if woken.recv_timeout(SETTLE).is_err() {
            return;
        }
    }
}

/// The kernel's watches, and the folder that they were set on: a link may lead to another one by now.
struct Watching {
    watcher: Option<RecommendedWatcher>,
    target: Option<PathBuf>,
}

impl Watching {
    fn start(root: &Path, events: mpsc::Sender<()>) -> Self {
        let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the files makes access events of its own; errors (a full queue) mean "look again".
            if event.is_ok_and(|e| e.kind.is_access() && e.kind != CLOSED_AFTER_WRITE) {
                return;
            }
            let _ = events.send(());
        });
        let watcher = made.inspect_err(|e| unwatched(root, e)).ok();
        let mut out = Watching {
            watcher,
            target: None,
        };
        out.follow(root);
        out
    }

    fn follow(&mut self, root: &Path) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        let target = root.canonicalize().ok();
        if target == self.target {
            return;
        }
        if let Some(old) = self.target.take() {
            let _ = watcher.unwatch(&old);
        }
        // The link itself lives in the folder above, whose events tell of a swap.
        if root.is_symlink()
            && let Some(above) = root.parent().filter(|p| !p.as_os_str().is_empty())
        {
            let _ = watcher.watch(above, RecursiveMode::NonRecursive);
        }
        if let Some(target) = target {
            if let Err(e) = watcher.watch(&target, RecursiveMode::Recursive) {
                unwatched(root, &e);
            }
            self.target = Some(target);
        }
    }
}

fn unwatched(root: &Path, e: &notify::Error) {
    warn!(
        "{}: cannot be watched ({e}); it is looked at every {} s instead",
        root.display(),
        POLL.as_secs()
    );
}

const CLOSED_AFTER_WRITE: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
const SETTLE: Duration = Duration::from_millis(10);
const SETTLE_MAX: Duration = Duration::from_millis(500);
/// Finds what no event told of (file systems without events, links swapped further up).
const POLL: Duration = Duration::from_secs(2);
