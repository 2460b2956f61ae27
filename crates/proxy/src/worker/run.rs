//! The thread of a worker: applies what the main thread sends.

use std::{
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::{
    runtime::LocalOptions,
    sync::{mpsc, oneshot},
    task::spawn_local,
    time::{MissedTickBehavior, interval, timeout, timeout_at},
};

use super::{Options, Random, Routes, Worker, WorkerRef, drain::DrainStrategy};
use crate::{
    cluster::{ClusterEntry, Clusters, Report, SWEEP_INTERVAL, shared::ProcessShared},
    listener::{ListenSocket, Listeners, handed_over},
    plan::{Bootstrap, Listener, RouteConfiguration},
    report::Reports,
};

/// What the main thread (or another worker) asks of a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// A batch, applied between two polls.
    Changes(Vec<WorkerChange>, Option<Arc<Timing>>),
    /// An accepted connection.
    Connection {
        listener: Arc<str>,
        stream: std::net::TcpStream,
        peer: SocketAddr,
    },
    /// Begins to drain.
    Drain {
        inbound_only: bool,
        over: Duration,
        strategy: DrainStrategy,
    },
    /// The process is about to end: what is under way is finished, and nothing is waited for.
    End,
    /// Closes listening sockets.
    StopAccepting { inbound_only: bool },
    /// Answers when everything sent before is applied.
    Barrier(oneshot::Sender<()>),
    /// Ends the thread; connections are closed.
    Stop,
}

/// How long a batch takes to reach every worker.
#[derive(Debug)]
pub(crate) struct Timing {
    began: Instant,
    left: AtomicUsize,
}

impl Timing {
    pub(crate) fn new(began: Instant, workers: usize) -> Self {
        Self {
            began,
            left: AtomicUsize::new(workers),
        }
    }

    /// One more worker is done; the last one learns how long it took.
    fn applied(&self) -> Option<Duration> {
        (self.left.fetch_sub(1, Relaxed) == 1).then(|| self.began.elapsed())
    }
}

/// One change as a worker sees it.
#[derive(Debug)]
pub(crate) enum WorkerChange {
    Cluster(Arc<ClusterEntry>),
    Hosts(Arc<ClusterEntry>),
    /// The same, and these hosts have just become bad.
    HostsFailed(Arc<ClusterEntry>, Arc<[u64]>),
    RemoveCluster(Arc<str>),
    Listener {
        plan: Arc<Listener>,
        sockets: Option<Vec<ListenSocket>>,
    },
    RemoveListener(Arc<str>),
    Routes(Arc<RouteConfiguration>),
    RemoveRoutes(Arc<str>),
}

impl WorkerChange {
    /// The same change for another worker. A listener's sockets belong to one worker, so they are not copied.
    pub(crate) fn share(&self) -> Self {
        match self {
            Self::Cluster(entry) => Self::Cluster(entry.clone()),
            Self::Hosts(entry) => Self::Hosts(entry.clone()),
            Self::HostsFailed(entry, failed) => Self::HostsFailed(entry.clone(), failed.clone()),
            Self::RemoveCluster(name) => Self::RemoveCluster(name.clone()),
            Self::Listener { plan, .. } => Self::Listener {
                plan: plan.clone(),
                sockets: None,
            },
            Self::RemoveListener(name) => Self::RemoveListener(name.clone()),
            Self::Routes(routes) => Self::Routes(routes.clone()),
            Self::RemoveRoutes(name) => Self::RemoveRoutes(name.clone()),
        }
    }
}

/// What a worker needs to begin.
#[derive(Debug)]
pub(crate) struct Seed {
    pub(crate) index: usize,
    pub(crate) bootstrap: Arc<Bootstrap>,
    pub(crate) options: Arc<Options>,
    pub(crate) store: stats::Store,
    pub(crate) shared: Arc<ProcessShared>,
    pub(crate) reports: mpsc::UnboundedSender<Report>,
    pub(crate) peers: Vec<mpsc::UnboundedSender<Command>>,
}

/// The main thread's side of a worker.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    pub(crate) commands: mpsc::UnboundedSender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    pub(crate) fn send(&self, command: Command) {
        // A worker that is gone has nothing left to change.
        let _ = self.commands.send(command);
    }

    /// Waits for the thread of a worker that was told to stop.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a worker has panicked");
        }
    }
}

/// Starts the thread of a worker.
pub(crate) fn spawn(
    seed: Seed,
    commands: mpsc::UnboundedReceiver<Command>,
) -> io::Result<WorkerHandle> {
    let sender = seed.peers[seed.index].clone();
    // The runtime of a thread is made there; a failure ends the start all the same.
    let (made, outcome) = std::sync::mpsc::channel();
    let thread = thread::Builder::new()
        .name(format!("wrk:worker_{}", seed.index))
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build_local(LocalOptions::default());
            let runtime = match runtime {
                Ok(runtime) => runtime,
                // Whoever starts us waits for the word.
                Err(error) => return drop(made.send(Err(error))),
            };
            drop(made.send(Ok(())));
            seed.shared.secrets.print_here();
            let worker = Rc::new_cyclic(|me| Worker::new(seed, me.clone()));
            runtime.block_on(run(worker, commands));
        })?;
    outcome
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("a worker ended as it began")))?;
    Ok(WorkerHandle {
        commands: sender,
        thread: Some(thread),
    })
}

impl Worker {
    pub(crate) fn new(seed: Seed, me: WorkerRef) -> Self {
        let stats = seed.store.stats();
        let random = Rc::new(Random::default());
        Self {
            index: seed.index,
            clusters: Clusters::new(
                stats.clone(),
                random.clone(),
                seed.reports,
                seed.shared.clone(),
            ),
            bootstrap: seed.bootstrap,
            options: seed.options,
            stats,
            random,
            routes: Routes::default(),
            shared: seed.shared,
            listeners: Listeners::default(),
            reports: Reports::default(),
            me,
            peers: seed.peers,
        }
    }

    /// Applies one change.
    pub(crate) fn apply(self: &Rc<Self>, change: WorkerChange) {
        match change {
            WorkerChange::Cluster(entry) => self.clusters.upsert(entry),
            WorkerChange::Hosts(entry) => self.clusters.set_hosts(entry),
            WorkerChange::HostsFailed(entry, failed) => {
                self.clusters.hosts_failed(&entry.plan.name, &failed);
                self.clusters.set_hosts(entry);
            }
            WorkerChange::RemoveCluster(name) => self.clusters.remove(&name),
            WorkerChange::Listener { plan, sockets } => self.listeners.upsert(plan, sockets, self),
            WorkerChange::RemoveListener(name) => self.listeners.remove(&name, self),
            WorkerChange::Routes(routes) => self.routes.upsert(routes),
            WorkerChange::RemoveRoutes(name) => self.routes.remove(&name),
        }
    }
}

async fn run(worker: Rc<Worker>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let sweeper = spawn_local({
        let worker = worker.clone();
        async move {
            let mut ticks = interval(SWEEP_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                worker.clusters.sweep();
            }
        }
    });
    while let Some(command) = commands.recv().await {
        match command {
            // No await in here: nothing else runs on this thread before the whole batch is in place.
            Command::Changes(changes, timing) => {
                changes.into_iter().for_each(|change| worker.apply(change));
                if let Some(took) = timing.and_then(|timing| timing.applied()) {
                    let scope = worker.stats.scope("cluster_manager.eds.");
                    scope.counter("apply_time_us").add(took.as_micros() as u64);
                    scope.counter("applied").inc();
                }
            }
            Command::Connection {
                listener,
                stream,
                peer,
            } => {
                handed_over(&listener, stream, peer, &worker);
            }
            Command::Drain {
                inbound_only,
                over,
                strategy,
            } => {
                worker.listeners.drain(inbound_only, over, strategy);
            }
            Command::End => worker.listeners.end(),
            Command::StopAccepting { inbound_only } => {
                worker.listeners.stop_accepting(inbound_only)
            }
            Command::Barrier(reached) => {
                // The tasks of removed listeners end, and close their sockets, when their turn comes: before it the kernel
                // would still give them connections.
                tokio::task::yield_now().await;
                // Who asked may have given up.
                let _ = reached.send(());
            }
            Command::Stop => break,
        }
    }
    sweeper.abort();
    worker.listeners.stop_accepting(false);
    worker.listeners.close_all();
    // One turn for connections to see it.
    tokio::task::yield_now().await;
    if !worker.reports.is_empty() {
        last_records(&worker).await;
    }
}

/// Delivers what connections have left to be told, also of their end. Neither a client that lingers nor a service that does
/// not answer holds up the end of the process for long.
async fn last_records(worker: &Worker) {
    let limit = LAST_RECORDS.min(worker.options.drain_time);
    let end = tokio::time::Instant::now() + limit;
    let _ = timeout(limit / 2, worker.listeners.released()).await;
    let _ = timeout_at(end, worker.reports.settle()).await;
}

/// How long records may hold up the end of a worker, where the drain time is not shorter.
const LAST_RECORDS: Duration = Duration::from_secs(1);
