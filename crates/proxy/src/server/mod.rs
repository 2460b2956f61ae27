//! The main thread: it owns the truth and tells the workers.
//!
//! Everything that is configured passes through [`Server::apply`] as a batch of [`Change`]s: the static part of the bootstrap,
//! xDS, tests. The main thread opens sockets (so that a failure is known at once and can be answered with a NACK),
//! resolves names and keeps what admin shows. Workers get a batch in one piece.

mod dns_task;
mod health;
mod outlier;
mod sockets;
mod stale;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::spawn_local,
};

use crate::{
    cluster::{ClusterEntry, Rates, registry::Registry, shared::ProcessShared},
    plan::{
        Address, Bootstrap, Cluster, ClusterLoadAssignment, LazyCluster, Listener,
        RouteConfiguration,
        cluster::Discovery,
        tls::{SdsSecret, Secret},
    },
    transport::{self, Keeper, Material, Owner, Source},
    worker::{
        Command, Options, Seed, Timing, WorkerChange, WorkerHandle, drain::DrainStrategy, spawn,
    },
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
    /// Tells what is only known when it is asked for; before stats are read.
    pub fn publish(&self) {
        self.clusters.borrow_mut().publish_breakers(&self.stats);
    }

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

    /// Applies a batch: all workers see all of it or nothing. The answer has one entry for each change, in order.
    pub fn apply(self: &Rc<Self>, changes: Vec<Change>) -> Vec<Result<(), ChangeError>> {
        self.apply_batch(changes, None)
    }

    /// The same, with the time from `began` (when the change was read) until the last worker has applied it counted in
    /// `cluster_manager.eds.apply_time_us`, and the batch in `cluster_manager.eds.applied`.
    pub(crate) fn apply_since(
        self: &Rc<Self>,
        changes: Vec<Change>,
        began: Instant,
    ) -> Vec<Result<(), ChangeError>> {
        let workers = self.workers.borrow().len();
        self.apply_batch(changes, Some(Arc::new(Timing::new(began, workers))))
    }

    fn apply_batch(
        self: &Rc<Self>,
        changes: Vec<Change>,
        timing: Option<Arc<Timing>>,
    ) -> Vec<Result<(), ChangeError>> {
        let count = self.workers.borrow().len();
        let mut batches: Vec<Vec<WorkerChange>> = (0..count).map(|_| Vec::new()).collect();
        let mut results = Vec::with_capacity(changes.len());
        for change in changes {
            results.push(self.apply_one(change, &mut batches));
        }
        for (worker, batch) in self.workers.borrow().iter().zip(batches) {
            if !batch.is_empty() {
                worker.send(Command::Changes(batch, timing.clone()));
            }
        }
        self.update_gauges();
        self.changed.notify_one();
        results
    }

    fn apply_one(
        self: &Rc<Self>,
        change: Change,
        batches: &mut [Vec<WorkerChange>],
    ) -> Result<(), ChangeError> {
        let mut tell = |change: WorkerChange| {
            for batch in batches.iter_mut() {
                batch.push(change.share());
            }
        };
        match change {
            Change::UpsertCluster(plan) => {
                // A plan that was not kept has no names to resolve.
                let names = match plan.made() {
                    Some(plan) => DnsTask::wanted(plan)?,
                    None => None,
                };
                let owner = Owner::Cluster(plan.name.clone());
                self.require(owner, plan.needs().to_vec(), || {
                    format!("cluster {}", plan.name)
                })?;
                let known = self.clusters.borrow().find(&plan.name).is_some();
                let count = if known {
                    "cluster_modified"
                } else {
                    "cluster_added"
                };
                self.stats
                    .counter(&format!("cluster_manager.{count}"))
                    .inc();
                let name = plan.name.clone();
                let changes = self.clusters.borrow_mut().upsert(plan, Instant::now());
                changes.into_iter().for_each(tell);
                self.outliers_changed.notify_one();
                self.sync_checks(&name);
                self.dns.borrow_mut().remove(&name);
                if let Some(names) = names {
                    let task = DnsTask::start(names, Rc::downgrade(self));
                    self.dns.borrow_mut().insert(name, task);
                }
            }
            Change::RemoveCluster(name) => {
                self.dns.borrow_mut().remove(&name);
                let owner = Owner::Cluster(name.clone());
                self.keeper.borrow_mut().release(&owner);
                let entry = self.clusters.borrow().find(&name).cloned();
                if let Some(change) = self.clusters.borrow_mut().remove(&name) {
                    self.stats.counter("cluster_manager.cluster_removed").inc();
                    tell(change);
                }
                self.sync_checks(&name);
                if let Some(entry) = entry {
                    self.store
                        .remove(&format!("cluster.{}.", entry.plan.stat_name()));
                }
            }
            Change::Endpoints(assignment) => {
                let service = assignment.cluster_name.clone();
                self.forget_when_stale(&assignment);
                let changes = self.clusters.borrow_mut().assign(assignment);
                changes.into_iter().for_each(tell);
                self.sync_checks_of(&service);
            }
            Change::RemoveEndpoints(name) => self.clusters.borrow_mut().forget(&name),
            Change::UpsertListener(plan) => {
                let owner = Owner::Listener(plan.name.clone());
                let needs = transport::of_listener(&plan);
                self.require(owner, needs, || format!("listener {}", plan.name))?;
                return self.upsert_listener(plan, batches);
            }
            Change::RemoveListener(name) => {
                let owner = Owner::Listener(name.clone());
                self.keeper.borrow_mut().release(&owner);
                if self.listeners.borrow_mut().remove(&name).is_some() {
                    self.stats
                        .counter("listener_manager.listener_removed")
                        .inc();
                    tell(WorkerChange::RemoveListener(name));
                }
            }
            Change::UpsertRoutes(routes) => {
                self.routes
                    .borrow_mut()
                    .insert(routes.name.clone(), routes.clone());
                tell(WorkerChange::Routes(routes));
            }
            Change::RemoveRoutes(name) => {
                self.routes.borrow_mut().remove(&name);
                tell(WorkerChange::RemoveRoutes(name));
            }
            Change::Secret(name, secret) => {
                let subject = format!("secret {}", name.name);
                let delivered = self.keeper.borrow_mut().deliver(name, secret);
                return delivered.map_err(|reason| ChangeError::Secret { subject, reason });
            }
            Change::RemoveSecret(name) => self.keeper.borrow_mut().withdraw(&name),
        }
        Ok(())
    }

    /// Reads what the contexts of a cluster or listener need. Whoever has no TLS costs nothing.
    fn require(
        &self,
        owner: Owner,
        needs: Vec<Source>,
        subject: impl FnOnce() -> String,
    ) -> Result<(), ChangeError> {
        let required = self.keeper.borrow_mut().require(owner, needs);
        required.map_err(|reason| ChangeError::Secret {
            subject: subject(),
            reason,
        })
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

    fn upsert_listener(
        &self,
        plan: Arc<Listener>,
        batches: &mut [Vec<WorkerChange>],
    ) -> Result<(), ChangeError> {
        let mut listeners = self.listeners.borrow_mut();
        let old = listeners.remove(&plan.name);
        let count = if old.is_some() {
            "listener_modified"
        } else {
            "listener_added"
        };
        let keeps = old
            .as_ref()
            .is_some_and(|old| sockets::same_sockets(&old.plan, &plan));
        let (sockets, addresses) = match old {
            // The same address keeps its sockets, and with them the connections that wait to be accepted.
            Some(old) if keeps => (old.sockets, old.addresses),
            old => match self.open(&plan, batches.len()) {
                Ok(opened) => {
                    let addresses = opened.as_ref().map_or_else(
                        || sockets::plan_addresses(&plan).cloned().collect(),
                        Sockets::addresses,
                    );
                    (opened, addresses)
                }
                Err(error) => {
                    self.stats
                        .counter("listener_manager.listener_create_failure")
                        .inc();
                    if let Some(old) = old {
                        listeners.insert(plan.name.clone(), old);
                    }
                    return Err(error);
                }
            },
        };
        for (index, batch) in batches.iter_mut().enumerate() {
            let own = match &sockets {
                _ if keeps => None,
                Some(sockets) => {
                    Some(
                        sockets
                            .for_worker(index)
                            .map_err(|error| ChangeError::Bind {
                                listener: plan.name.clone(),
                                address: plan.address.to_string(),
                                reason: error.to_string(),
                            })?,
                    )
                }
                None => Some(Vec::new()),
            };
            batch.push(WorkerChange::Listener {
                plan: plan.clone(),
                sockets: own,
            });
        }
        self.stats
            .counter(&format!("listener_manager.{count}"))
            .inc();
        let name = plan.name.clone();
        listeners.insert(
            name,
            ListenerStatus {
                plan,
                addresses,
                sockets,
            },
        );
        Ok(())
    }

    /// Opens a listener's sockets, and remembers whose ports they are.
    fn open(&self, plan: &Listener, workers: usize) -> Result<Option<Sockets>, ChangeError> {
        let mut ports = self.ports.borrow_mut();
        let opened = Sockets::open(plan, workers, &ports)?;
        let addresses = opened.iter().flat_map(Sockets::addresses);
        ports.extend(addresses.filter_map(|address| Some(address.socket()?.port())));
        Ok(opened)
    }

    fn stat_name(&self, cluster: &str) -> Arc<str> {
        self.clusters
            .borrow()
            .find(cluster)
            .map_or_else(|| cluster.into(), |entry| entry.plan.stat_name().clone())
    }

    /// The addresses of a name of a cluster; called by its task.
    pub(crate) fn resolved(
        self: &Rc<Self>,
        cluster: &str,
        name: &Arc<str>,
        addresses: Vec<std::net::IpAddr>,
    ) {
        let changes = self
            .clusters
            .borrow_mut()
            .resolved(cluster, name, addresses);
        if !changes.is_empty() {
            self.broadcast(changes);
            self.sync_checks(cluster);
        }
    }

    fn broadcast(&self, changes: Vec<WorkerChange>) {
        if changes.is_empty() {
            return;
        }
        for worker in self.workers.borrow().iter() {
            let changes = changes.iter().map(WorkerChange::share).collect();
            worker.send(Command::Changes(changes, None));
        }
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

    /// Brings `cluster.NAME.membership_*` up to date; called before stats are read.
    pub fn publish_memberships(&self) {
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

    /// Where the process stands.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Completes when the process is in this state.
    pub async fn reached(&self, state: State) {
        // The sender lives as long as self.
        let _ = self.state.subscribe().wait_for(|now| *now == state).await;
    }

    /// Goes on to another state.
    pub fn set_state(&self, state: State) {
        self.state.send_replace(state);
        self.stats.gauge("server.state").set(state as i64);
        self.stats
            .gauge("server.live")
            .set(i64::from(state == State::Live));
        if state == State::Live {
            self.stats.gauge("listener_manager.workers_started").set(1);
        }
    }

    /// `/healthcheck/fail` and `/healthcheck/ok`.
    pub fn fail_health_check(&self, fail: bool) {
        self.shared.health_failed.store(fail, Relaxed);
    }

    /// Drains listeners (`/drain_listeners`): gracefully means that sockets go on accepting until the drain time is over,
    /// and with `stay` after it as well; else they close at once. A graceful drain that has begun is not begun again.
    pub fn drain_listeners(self: &Rc<Self>, inbound_only: bool, graceful: bool, stay: bool) {
        if graceful && self.draining.replace(true) {
            return;
        }
        let (over, strategy) = (self.options.drain_time, self.options.drain_strategy);
        self.tell_workers(|| Command::Drain {
            inbound_only,
            over,
            strategy,
        });
        if !graceful {
            self.stop_accepting(inbound_only);
            return;
        }
        if stay {
            return;
        }
        let weak = Rc::downgrade(self);
        spawn_local(async move {
            tokio::time::sleep(over).await;
            if let Some(server) = weak.upgrade() {
                server.stop_accepting(inbound_only);
            }
        });
    }

    /// Begins to drain at once, whatever the strategy; for tests and for the end of the process.
    pub fn drain_now(&self) {
        self.tell_workers(|| Command::Drain {
            inbound_only: false,
            over: Duration::ZERO,
            strategy: DrainStrategy::Immediate,
        });
    }

    fn stop_accepting(&self, inbound_only: bool) {
        self.tell_workers(|| Command::StopAccepting { inbound_only });
        // The main thread's copies keep the port open otherwise.
        for status in self.listeners.borrow_mut().values_mut() {
            if !inbound_only || status.plan.traffic_direction == INBOUND {
                status.sockets = None;
            }
        }
    }

    fn tell_workers(&self, command: impl Fn() -> Command) {
        self.workers
            .borrow()
            .iter()
            .for_each(|worker| worker.send(command()));
    }

    /// Asks the process to end (`/quitquitquit`, signals).
    pub fn quit(&self) {
        self.stop.send_replace(true);
    }

    /// Completes when [`Server::quit`] was called.
    pub async fn quitting(&self) {
        // The sender lives as long as self.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the workers: connections close, and what they logged is written.
    pub fn shut_down(&self) {
        if self.workers.borrow().is_empty() {
            return;
        }
        self.workers
            .borrow_mut()
            .iter_mut()
            .for_each(WorkerHandle::stop);
        self.workers.borrow_mut().clear();
        crate::access_log::settle();
    }

    fn update_gauges(&self) {
        let clusters = self.clusters.borrow().len() as i64;
        self.stats
            .gauge("cluster_manager.active_clusters")
            .set(clusters);
        self.stats.gauge("cluster_manager.warming_clusters").set(0);
        let listeners = self.listeners.borrow().len() as i64;
        self.stats
            .gauge("listener_manager.total_listeners_active")
            .set(listeners);
        self.stats
            .gauge("listener_manager.total_listeners_warming")
            .set(0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// How often files of certificates are looked at. A look is one system call a file; following links, it sees a
/// directory that was swapped as a whole, as Kubernetes does it.
const FILES_INTERVAL: Duration = Duration::from_secs(1);

const INBOUND: crate::plan::listener::TrafficDirection =
    crate::plan::listener::TrafficDirection::Inbound;

/// Whether names have to be resolved for a cluster.
fn resolves(plan: &Cluster) -> bool {
    matches!(
        plan.discovery,
        Discovery::StrictDns { .. } | Discovery::LogicalDns { .. }
    )
}
