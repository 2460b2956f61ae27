//! The main thread: it owns the truth and tells the workers.
//!
//! Everything that is configured passes through [`Server::apply`] as a batch of [`Change`]s: the static part of the bootstrap,
//! xDS, tests. The main thread opens sockets (so that a failure is known at once and can be answered with a NACK),
//! resolves names and keeps what admin shows. Workers get a batch in one piece.

mod apply;
mod dns_task;
pub(crate) mod figures;
mod health;
mod life;
mod outlier;
mod sockets;
mod stale;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::spawn_local,
};

use crate::{
    cluster::{ClusterEntry, Rates, registry::Registry, shared::ProcessShared},
    command,
    plan::{
        Address, Bootstrap, ClusterLoadAssignment, LazyCluster, Listener, RouteConfiguration,
        tls::{SdsSecret, Secret},
    },
    transport::{self, Keeper, Material, Source},
    worker::{Command, Options, Seed, WorkerHandle, spawn},
};
use dns_task::DnsTask;
use sockets::Sockets;

/// One change of configuration.
#[derive(Clone, Debug)]
pub enum Change {
    /// A new cluster or a new version of one.
    UpsertCluster(Arc<LazyCluster>),
    /// The cluster of this name is gone.
    RemoveCluster(Arc<str>),
    /// Endpoints of EDS clusters.
    Endpoints(Arc<ClusterLoadAssignment>),
    /// No EDS cluster asks for the endpoints of this name any more.
    RemoveEndpoints(Arc<str>),
    /// A new listener or a new version of one.
    UpsertListener(Arc<Listener>),
    /// The listener of this name is gone; its connections drain.
    RemoveListener(Arc<str>),
    /// Routes by name.
    UpsertRoutes(Arc<RouteConfiguration>),
    /// No listener needs them any more.
    RemoveRoutes(Arc<str>),
    /// A secret that SDS brought.
    Secret(SdsSecret, Arc<Secret>),
    /// The secret is gone, or nobody asks for it any more.
    RemoveSecret(SdsSecret),
}

/// Why a change could not be applied. The others of its batch are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// A listener's socket cannot be opened.
    #[error("listener {listener}: cannot listen on {address}: {reason}")]
    Bind {
        /// The listener.
        listener: Arc<str>,
        /// Its address.
        address: String,
        /// What the system says.
        reason: String,
    },
    /// A certificate, a key or authorities cannot be used.
    #[error("{subject}: {reason}")]
    Secret {
        /// What needs it, or its name.
        subject: String,
        /// What is wrong.
        reason: String,
    },
    /// A cluster's resolver cannot be set up.
    #[error("cluster {cluster}: cannot resolve names: {reason}")]
    Resolver {
        /// The cluster.
        cluster: Arc<str>,
        /// What is wrong.
        reason: String,
    },
}

/// Where the process stands, with the numbers and names of Envoy (`server.state`, `/server_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Serving.
    Live = 0,
    /// Told to drain.
    Draining = 1,
    /// Clusters are not there yet.
    PreInitializing = 2,
    /// Listeners are not there yet.
    Initializing = 3,
}

/// A listener as the main thread knows it.
#[derive(Debug)]
pub struct ListenerStatus {
    /// What the configuration says.
    pub plan: Arc<Listener>,
    /// The addresses that its sockets have (with the port that the system chose); those of the plan without sockets.
    pub addresses: Vec<Address>,
    sockets: Option<Sockets>,
}

/// The main thread's side of everything.
#[derive(Debug)]
pub struct Server {
    /// What the process began with.
    pub bootstrap: Arc<Bootstrap>,
    /// What the command line said.
    pub options: Arc<Options>,
    /// All stats.
    pub store: stats::Store,
    /// The main thread's own stats.
    pub stats: stats::Stats,
    /// What all threads share.
    pub shared: Arc<ProcessShared>,
    /// When the process began.
    pub started: Instant,
    clusters: RefCell<Registry>,
    listeners: RefCell<BTreeMap<Arc<str>, ListenerStatus>>,
    /// Ports that this process has had a socket on.
    ports: RefCell<BTreeSet<u16>>,
    routes: RefCell<BTreeMap<Arc<str>, Arc<RouteConfiguration>>>,
    dns: RefCell<BTreeMap<Arc<str>, DnsTask>>,
    keeper: RefCell<Keeper>,
    checks: RefCell<health::Checks>,
    /// A cluster came or went whose hosts are watched for outliers.
    outliers_changed: Rc<Notify>,
    workers: RefCell<Vec<WorkerHandle>>,
    state: watch::Sender<State>,
    stop: watch::Sender<bool>,
    /// A graceful drain has begun.
    draining: Cell<bool>,
    /// After each batch of changes.
    pub(crate) changed: Notify,
}

impl Server {
    /// Starts the workers. Must be called within a `LocalSet` of the main thread's runtime.
    pub fn start(
        bootstrap: Arc<Bootstrap>,
        options: Options,
        store: stats::Store,
    ) -> io::Result<Rc<Self>> {
        let count = options.concurrency.max(1);
        let options = Arc::new(options);
        let shared = Arc::new(ProcessShared {
            max_downstream_connections: sockets::connection_limit(
                bootstrap.max_downstream_connections.or_else(|| {
                    // What the monitor took the place of.
                    bootstrap.runtime_number("overload.global_downstream_max_connections")
                }),
            ),
            workers: (0..count).map(|_| Default::default()).collect(),
            peer_metadata: transport::own(&bootstrap.node),
            secrets: Arc::new(transport::Secrets::new(options.clock.clone())),
            maintenance: bootstrap
                .runtime
                .keys()
                .filter_map(|key| {
                    let name = key.strip_prefix("upstream.maintenance_mode.")?;
                    Some((name.to_owned(), bootstrap.runtime_number(key)?))
                })
                .collect(),
            ..ProcessShared::default()
        });
        let (reports, mut reported) = mpsc::unbounded_channel();
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mpsc::unbounded_channel()).unzip();
        let mut workers = Vec::new();
        for (index, receiver) in receivers.into_iter().enumerate() {
            let seed = Seed {
                index,
                bootstrap: bootstrap.clone(),
                options: options.clone(),
                store: store.clone(),
                shared: shared.clone(),
                reports: reports.clone(),
                peers: senders.clone(),
            };
            workers.push(spawn(seed, receiver)?);
        }
        let mut keeper = Keeper::new(shared.secrets.clone());
        for secret in &bootstrap.static_secrets {
            let name = SdsSecret {
                name: secret.name.clone(),
                source: None,
            };
            let delivered = keeper.deliver(name, Arc::new(secret.clone()));
            delivered
                .map_err(|reason| io::Error::other(format!("secret {}: {reason}", secret.name)))?;
        }
        let stats = store.stats();
        let server = Rc::new(Self {
            bootstrap,
            options,
            store,
            stats,
            shared,
            started: Instant::now(),
            clusters: RefCell::default(),
            listeners: RefCell::default(),
            ports: RefCell::default(),
            routes: RefCell::default(),
            dns: RefCell::default(),
            keeper: RefCell::new(keeper),
            checks: RefCell::default(),
            outliers_changed: Rc::default(),
            workers: RefCell::new(workers),
            state: watch::Sender::new(State::PreInitializing),
            stop: watch::Sender::new(false),
            changed: Notify::new(),
            draining: Cell::new(false),
        });
        server.set_state(State::PreInitializing);
        server.stats.gauge("server.concurrency").set(count as i64);
        let version = (server.bootstrap.server_version).unwrap_or_else(command::revision_number);
        server.stats.gauge("server.version").set(version as i64);
        if let Some(plan) = &server.bootstrap.overload {
            let watch = crate::overload::watch(plan.clone(), Rc::downgrade(&server));
            spawn_local(watch);
        }
        if let Some(local) = &server.bootstrap.local_cluster_name {
            let own = server.bootstrap.node.locality.clone();
            server.clusters.borrow_mut().set_local(local.clone(), own);
        }
        server.watch_outliers();
        let weak = Rc::downgrade(&server);
        spawn_local(async move {
            let mut ticks = tokio::time::interval(FILES_INTERVAL);
            loop {
                ticks.tick().await;
                let Some(server) = weak.upgrade() else { return };
                server.look_at_files();
            }
        });
        let weak = Rc::downgrade(&server);
        spawn_local(async move {
            while let Some(report) = reported.recv().await {
                let Some(server) = weak.upgrade() else { return };
                server.reported(report);
            }
        });
        Ok(server)
    }

    /// Reads files of certificates again that have changed.
    fn look_at_files(&self) {
        if !self.keeper.borrow().watches() {
            return;
        }
        for (files, result) in self.keeper.borrow_mut().look() {
            match result {
                Ok(()) => {
                    self.stats
                        .counter("server.certificate_files.update_success")
                        .inc();
                    tracing::info!("{files}: read again");
                }
                Err(reason) => {
                    self.stats
                        .counter("server.certificate_files.update_failure")
                        .inc();
                    tracing::warn!("{files}: {reason}; what was read before stays in use");
                }
            }
        }
    }

    fn stat_name(&self, cluster: &str) -> Arc<str> {
        self.clusters
            .borrow()
            .find(cluster)
            .map_or_else(|| cluster.into(), |entry| entry.plan.stat_name().clone())
    }

    /// Completes when every cluster that resolves names has had its first answer (or failure) and every host that is
    /// checked its first check, or when the time is over.
    pub async fn clusters_warmed(&self, limit: Duration) {
        let waiting: Vec<_> = self
            .dns
            .borrow()
            .values()
            .map(DnsTask::first_answer)
            .collect();
        let all = async {
            for mut first in waiting {
                // A task that is gone will not answer.
                let _ = first.wait_for(|answered| *answered).await;
            }
            let checks = self.checks.borrow().first_results();
            for mut first in checks {
                let _ = first.wait_for(|answered| *answered).await;
            }
        };
        let _ = tokio::time::timeout(limit, all).await;
    }

    /// Completes when all workers have applied everything that was sent before.
    pub async fn settled(&self) {
        let reached: Vec<_> = self
            .workers
            .borrow()
            .iter()
            .map(|worker| {
                let (sender, receiver) = oneshot::channel();
                worker.send(Command::Barrier(sender));
                receiver
            })
            .collect();
        for reached in reached {
            // A worker that is gone has nothing left to apply.
            let _ = reached.await;
        }
    }

    /// Certificates and authorities in use, for admin.
    pub(crate) fn tls_materials(&self) -> Vec<(Source, Arc<Material>)> {
        self.keeper.borrow().materials()
    }

    /// Every cluster by name, for admin.
    pub fn clusters(&self) -> Vec<Arc<ClusterEntry>> {
        self.clusters.borrow().iter().cloned().collect()
    }

    /// Brings `cluster.NAME.membership_*` up to date.
    fn publish_memberships(&self) {
        for membership in self.clusters.borrow_mut().memberships() {
            let scope = self
                .stats
                .scope(&format!("cluster.{}.membership_", membership.stat_name));
            let hosts = membership.hosts;
            for (name, count) in [
                ("total", hosts.total),
                ("healthy", hosts.healthy),
                ("degraded", hosts.degraded),
                ("excluded", membership.excluded),
            ] {
                scope.gauge(name).set(count.into());
            }
            scope.counter("change").add(membership.changes);
        }
    }

    /// Success rates of a cluster's hosts: of answers, and of this side's own part.
    pub fn success_rates(&self, cluster: &str) -> Option<[Rates; 2]> {
        self.clusters.borrow().success_rates(cluster)
    }

    /// One cluster.
    pub fn cluster(&self, name: &str) -> Option<Arc<ClusterEntry>> {
        self.clusters.borrow().find(name).cloned()
    }

    /// Every listener by name: its plan, and the addresses of its sockets.
    pub fn listeners(&self) -> Vec<(Arc<Listener>, Vec<Address>)> {
        let listeners = self.listeners.borrow();
        listeners
            .values()
            .map(|status| (status.plan.clone(), status.addresses.clone()))
            .collect()
    }

    /// The first socket address of a listener: where a test connects to.
    pub fn listener_address(&self, name: &str) -> Option<SocketAddr> {
        self.listeners
            .borrow()
            .get(name)?
            .addresses
            .first()?
            .socket()
    }

    /// Every route configuration that came by name.
    pub fn routes(&self) -> Vec<Arc<RouteConfiguration>> {
        self.routes.borrow().values().cloned().collect()
    }
}

/// How often files of certificates are looked at. A look is one system call a file; following links, it sees a
/// directory that was swapped as a whole, as Kubernetes does it.
const FILES_INTERVAL: Duration = Duration::from_secs(1);
