//! The ADS server: one task a stream, each of which brings its proxy to the current state of the mesh.
//!
//! A push is a mark on every connection, not a queue of copies: however many changes come while a proxy is being
//! served, it has at most one push ahead of it, and that one brings it to the newest state. How many proxies are worked
//! on at once is bounded; writing to a slow one happens outside of that bound.

mod connection;
mod rejection;
pub mod secure;
mod status;
mod stream;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use config::{Kind, ObjectKey, Problem, Severity, Snapshot, Update, Watch};
use jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tracing::{error, info, warn};

pub use self::{
    connection::{Connection, TypeState},
    rejection::Rejection,
    stream::Ads,
};
use crate::{
    metrics::Metrics,
    model::{Mesh, Settings, referenced},
    push::{Change, Debounce, Interner, Push, Scope, Timing, Views},
    security::{self, keys::KeySets},
    translate::Translate,
    unserved,
};
use xds::type_url::SDS;

/// The control plane's state, shared by its streams and its debug pages.
pub struct Server {
    translate: Box<dyn Translate>,
    settings: Settings,
    /// The metrics.
    pub metrics: Metrics,
    interner: Interner,
    views: Views,
    current: RwLock<Option<Arc<Push>>>,
    problems: RwLock<Arc<Vec<Problem>>>,
    /// Keys of token issuers.
    keys: Arc<KeySets>,
    /// The objects as they were read last, and what was wrong with them.
    read: RwLock<Option<Read>>,
    connections: Mutex<BTreeMap<u64, Arc<Connection>>>,
    next_connection: AtomicU64,
    throttle: Semaphore,
    /// Responses so far.
    sent: AtomicU64,
}

type Read = (Arc<Snapshot>, Arc<Vec<Problem>>);

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("connections", &self.connections.lock().len())
            .finish_non_exhaustive()
    }
}

impl Server {
    /// A server without a mesh, which refuses streams until [`Server::load`].
    pub fn new(translate: Box<dyn Translate>, settings: Settings) -> Arc<Self> {
        let server = Server {
            translate,
            settings,
            metrics: Metrics::default(),
            interner: Interner::default(),
            views: Views::default(),
            current: RwLock::default(),
            problems: RwLock::default(),
            keys: Arc::default(),
            read: RwLock::default(),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(1),
            throttle: Semaphore::new(throttle()),
            sent: AtomicU64::new(0),
        };
        server
            .metrics
            .set("pilot_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        Arc::new(server)
    }

    /// The state of the mesh that proxies are brought to; `None` until objects were read.
    pub fn current(&self) -> Option<Arc<Push>> {
        self.current.read().clone()
    }

    /// Whether streams are served.
    pub fn is_ready(&self) -> bool {
        self.current.read().is_some()
    }

    /// What is wrong in the user's files.
    pub fn problems(&self) -> Arc<Vec<Problem>> {
        self.problems.read().clone()
    }

    /// The streams that are open, oldest first.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        self.connections.lock().values().cloned().collect()
    }

    /// The newest stream of a proxy, by `POD.NAMESPACE`.
    pub fn connection_of(&self, proxy: &str) -> Option<Arc<Connection>> {
        self.connections
            .lock()
            .values()
            .rev()
            .find(|c| c.node.workload == proxy)
            .cloned()
    }

    /// Starts with these objects.
    pub fn load(&self, snapshot: Arc<Snapshot>, problems: Arc<Vec<Problem>>) {
        let started = Instant::now();
        let filled = self.keys.fill(snapshot.clone());
        let mesh = Arc::new(Mesh::new(filled, self.settings.clone(), None));
        self.note_problems(&snapshot, &problems, Some(&mesh));
        *self.read.write() = Some((snapshot, problems));
        self.metrics
            .time("pilot_pushcontext_init_seconds", &[], started.elapsed());
        self.note_sizes(&mesh);
        *self.current.write() = Some(Arc::new(Push::first(mesh, version(1))));
    }

    /// Gives memory back whenever nothing was sent for a while: what a push or the start of a fleet took would else stay
    /// until the next one.
    pub async fn tidy(self: Arc<Self>) {
        const QUIET: Duration = Duration::from_secs(2);
        // What reading the configuration took is given back too.
        let (mut seen, mut given) = (0, u64::MAX);
        loop {
            tokio::time::sleep(QUIET).await;
            let sent = self.sent.load(Ordering::Relaxed);
            if sent == seen && sent != given {
                given = sent;
                // A thread of its own may take its time.
                let _ = tokio::task::spawn_blocking(base::memory::give_back_heap).await;
            }
            seen = sent;
        }
    }

    /// Fetches the keys of token issuers before the first proxy is served, for as long as `longest`.
    pub async fn fetch_keys(&self, snapshot: &Arc<Snapshot>, longest: Duration) {
        self.keys.fill(snapshot.clone());
        self.keys.settle(longest).await;
    }

    /// Pushes what a watch tells of, until it ends.
    pub async fn follow(self: Arc<Self>, mut watch: Watch, timing: Timing) {
        let mut debounce = Debounce::new(timing);
        let (told, mut keys) = mpsc::unbounded_channel();
        let fetching = {
            let server = self.clone();
            let read = move || {
                server
                    .read
                    .read()
                    .as_ref()
                    .map(|(snapshot, _)| snapshot.clone())
            };
            // Whoever is told is this function, which ends the task with itself.
            tokio::spawn(
                self.keys
                    .clone()
                    .run(read, move |keys| drop(told.send(keys))),
            )
        };
        let _fetching = AbortOnDrop(fetching);
        loop {
            let due = debounce.due().map(tokio::time::Instant::from_std);
            tokio::select! {
                update = watch.next() => {
                    let Some(Update { snapshot, changed, problems }) = update else {
                        error!("the watch of the configuration has ended: changes are no longer seen; restart");
                        return;
                    };
                    // New places of keys are asked at once.
                    self.keys.fill(snapshot.clone());
                    let push = self.current();
                    self.note_problems(&snapshot, &problems, push.as_ref().map(|p| &*p.mesh));
                    *self.read.write() = Some((snapshot, problems));
                    for key in &changed {
                        self.metrics.count("pilot_k8s_cfg_events", &[("type", key.kind.name()), ("event", "update")]);
                    }
                    let changed = changed.into_iter().filter(|key| self.is_read(key)).collect();
                    if debounce.add(changed, Instant::now()) > 0 {
                        self.metrics.count("pilot_inbound_updates", &[("type", "config")]);
                    }
                }
                Some(objects) = keys.recv() => {
                    if let Some((snapshot, problems)) = self.read.read().clone() {
                        let push = self.current();
                        self.note_problems(&snapshot, &problems, push.as_ref().map(|p| &*p.mesh));
                    }
                    debounce.add(objects, Instant::now());
                }
                () = sleep_until(due), if due.is_some() => {}
            }
            let Some((keys, first)) = debounce.take(Instant::now()) else {
                continue;
            };
            let Some((snapshot, _)) = self.read.read().clone() else {
                continue;
            };
            let snapshot = self.keys.fill(snapshot);
            self.clone().push(snapshot, keys, first).await;
        }
    }

    /// Whether an object that changed counts at all. The next push has it in any case.
    fn is_read(&self, key: &ObjectKey) -> bool {
        if !matches!(key.kind, Kind::ConfigMap | Kind::Secret) {
            return true;
        }
        let Some((snapshot, _)) = self.read.read().clone() else {
            return true;
        };
        let connections = self.connections();
        referenced::is_read(&snapshot, key, |name| {
            connections.iter().any(|c| c.watches(SDS, name))
        })
    }

    /// Builds the mesh of these objects and marks every connection.
    async fn push(
        self: Arc<Self>,
        snapshot: Arc<Snapshot>,
        keys: std::collections::BTreeSet<config::ObjectKey>,
        first: Instant,
    ) {
        let Some(old) = self.current() else { return };
        let settings = self.settings.clone();
        let previous = old.mesh.clone();
        let started = Instant::now();
        let built = tokio::task::spawn_blocking(move || {
            let mesh = Arc::new(Mesh::new(snapshot, settings, Some(&previous)));
            let change = Change::between(keys, &previous, &mesh);
            (mesh, change)
        });
        let (mesh, change) = match built.await {
            Ok(built) => built,
            Err(e) => {
                // One object that translation cannot bear must not end the control plane.
                self.metrics.count("pilot_total_xds_internal_errors", &[]);
                error!("the mesh could not be built ({e}): proxies keep what they have");
                return;
            }
        };
        self.metrics
            .time("pilot_pushcontext_init_seconds", &[], started.elapsed());
        self.metrics
            .time("pilot_debounce_time", &[], first.elapsed());
        self.metrics
            .count("pilot_push_triggers", &[("type", change.reason())]);
        self.note_sizes(&mesh);
        if !old.mesh.gateway_api().same_reports(mesh.gateway_api())
            && let Some((snapshot, problems)) = self.read.read().clone()
        {
            self.note_problems(&snapshot, &problems, Some(&mesh));
        }
        self.views.sweep();
        let number = old.generation + 1;
        let connections = self.connections();
        info!(
            "push {number}: {} changed ({}), {} proxies",
            change.keys.len(),
            change
                .keys
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
            connections.len()
        );
        let push = Arc::new(old.next(mesh, version(number), Arc::new(change), first));
        *self.current.write() = Some(push);
        for connection in connections {
            connection.mark(first);
        }
    }

    /// Ends all streams, so that proxies look for another control plane at once.
    pub fn close_streams(&self) {
        for connection in self.connections() {
            connection.close();
        }
    }

    fn scope<'a>(&'a self, push: &'a Push) -> Scope<'a> {
        Scope {
            push,
            translate: &*self.translate,
            interner: &self.interner,
        }
    }

    fn note_sizes(&self, mesh: &Mesh) {
        self.metrics
            .set("pilot_services", &[], mesh.services().iter().count() as f64);
        self.metrics.set(
            "pilot_virt_services",
            &[],
            mesh.snapshot().virtual_services.len() as f64,
        );
    }

    /// Keeps what is wrong now; what is new of it goes to the log.
    fn note_problems(&self, snapshot: &Snapshot, read: &[Problem], mesh: Option<&Mesh>) {
        let mut all = read.to_vec();
        let gateway_api = mesh.map(|m| m.gateway_api().problems(snapshot));
        let found = unserved::problems(snapshot).into_iter();
        let found = found.chain(gateway_api.into_iter().flatten());
        for problem in found.chain(security::problems(snapshot, Some(&self.keys))) {
            let known = self.problems.read().contains(&problem);
            if !known {
                warn!("{problem}");
            }
            all.push(problem);
        }
        let errors = read
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .count();
        self.metrics
            .set("pilot_total_rejected_configs", &[], errors as f64);
        *self.problems.write() = Arc::new(all);
    }

    fn register(&self, make: impl FnOnce(u64) -> Connection) -> Arc<Connection> {
        let number = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(make(number));
        self.connections.lock().insert(number, connection.clone());
        self.metrics.add(
            "pilot_xds",
            &[("version", &connection.istio_version())],
            1.0,
        );
        connection
    }

    fn unregister(&self, connection: &Connection) {
        self.connections.lock().remove(&connection.number);
        self.metrics.add(
            "pilot_xds",
            &[("version", &connection.istio_version())],
            -1.0,
        );
        self.metrics.count("istiod_connection_terminations", &[]);
    }
}

/// Ends a task with its owner.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn sleep_until(due: Option<tokio::time::Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}

/// istiod's form of a version: when, and which push.
fn version(number: u64) -> String {
    format!(
        "{}/{number}",
        Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ")
    )
}

/// How many proxies are worked on at once, as istiod counts it when it is not told.
fn throttle() -> usize {
    let set = std::env::var("PILOT_PUSH_THROTTLE")
        .ok()
        .and_then(|t| t.parse().ok())
        .filter(|n| *n > 0);
    set.unwrap_or_else(|| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (15 + 5 * cores).min(100)
    })
}
