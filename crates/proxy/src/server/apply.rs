//! Putting changes in force: checked and opened here, then told to the workers in one piece.

use std::{rc::Rc, sync::Arc, time::Instant};

use super::{
    Change, ChangeError, ListenerStatus, Server,
    dns_task::DnsTask,
    sockets::{self, Sockets},
};
use crate::{
    plan::Listener,
    transport::{self, Owner, Source},
    worker::{Command, Timing, WorkerChange},
};

impl Server {
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
                let prints = self.keeper.borrow().prints(&plan);
                prints.map_err(|reason| ChangeError::Secret {
                    subject: format!("listener {}", plan.name),
                    reason,
                })?;
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

    pub(super) fn broadcast(&self, changes: Vec<WorkerChange>) {
        if changes.is_empty() {
            return;
        }
        for worker in self.workers.borrow().iter() {
            let changes = changes.iter().map(WorkerChange::share).collect();
            worker.send(Command::Changes(changes, None));
        }
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
