//! The truth about clusters, on the main thread.
//!
//! It joins what comes from several sides - a cluster's plan, its endpoints from EDS, addresses of names, ejections - into
//! one [`HostSet`] and says what workers have to be told. A host keeps its [`HostShared`] as long as its address stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    ClusterEntry, Ejection,
    host::{Host, HostSet},
    shared::{ClusterShared, HostShared},
    stats::BreakerStats,
};
use crate::{
    plan::{
        Address, Cluster, ClusterLoadAssignment,
        cluster::Discovery,
        endpoint::{Endpoint, LocalityEndpoints},
    },
    worker::{Random, WorkerChange},
};

/// All clusters.
#[derive(Debug, Default)]
pub struct Registry {
    clusters: BTreeMap<Arc<str>, Truth>,
    /// The last endpoints of each EDS name, kept over changes of the cluster.
    assignments: HashMap<Arc<str>, Arc<ClusterLoadAssignment>>,
    by_service: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// Clusters whose hosts may have changed since [`Registry::memberships`].
    changed: BTreeSet<Arc<str>>,
    random: Random,
}

/// One cluster.
#[derive(Debug)]
struct Truth {
    entry: Arc<ClusterEntry>,
    known: HashMap<Address, Arc<HostShared>>,
    /// Addresses of each name; a name that is not in here was not answered yet.
    names: HashMap<Arc<str>, Vec<IpAddr>>,
    /// How often a host was ejected, for the back-off.
    ejections: HashMap<u64, u32>,
    /// How often hosts came or went, since it was last asked.
    changes: u64,
    /// What the limits of both priorities are told by, once a worker has used the cluster.
    breakers: Option<[BreakerStats; 2]>,
}

/// How many hosts a cluster has; what `cluster.NAME.membership_*` tell.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) stat_name: Arc<str>,
    pub(crate) total: usize,
    pub(crate) healthy: usize,
    pub(crate) degraded: usize,
    /// How often hosts came or went since it was last asked.
    pub(crate) changes: u64,
}

impl Registry {
    /// A new or changed cluster; the hosts that it had stay where they are still named.
    pub(crate) fn upsert(&mut self, plan: Arc<Cluster>) -> WorkerChange {
        let name = plan.name.clone();
        let old = self.clusters.remove(&name);
        self.unlink(&name);
        let asked = old
            .as_ref()
            .and_then(|old| service(&old.entry.plan))
            .cloned();
        if let Discovery::Eds { service_name, .. } = &plan.discovery {
            self.by_service
                .entry(service_name.clone())
                .or_default()
                .push(name.clone());
        }
        let mut truth = match old {
            Some(old) => {
                let entry = Arc::new(ClusterEntry {
                    plan,
                    shared: old.entry.shared.clone(),
                    hosts: Arc::default(),
                    on_demand: old.entry.on_demand.clone(),
                });
                Truth { entry, ..old }
            }
            None => Truth {
                entry: Arc::new(ClusterEntry {
                    plan,
                    shared: Arc::<ClusterShared>::default(),
                    hosts: Arc::default(),
                    on_demand: Arc::default(),
                }),
                known: HashMap::new(),
                names: HashMap::new(),
                ejections: HashMap::new(),
                changes: 0,
                breakers: None,
            },
        };
        if let Some(service) = asked {
            self.forget(&service);
        }
        truth.rebuild(&self.assignments);
        let change = WorkerChange::Cluster(truth.entry.clone());
        self.changed.insert(name.clone());
        self.clusters.insert(name, truth);
        change
    }

    /// Tells how near clusters are to their limits; before stats are read. Clusters without a request cost nothing.
    pub(crate) fn publish_breakers(&mut self, stats: &::stats::Stats) {
        for truth in self.clusters.values_mut() {
            let entry = &truth.entry;
            if !entry.shared.touched.load(Relaxed) {
                continue;
            }
            let [default, high] = truth.breakers.get_or_insert_with(|| {
                ["default", "high"].map(|priority| {
                    let name = entry.plan.stat_name();
                    let prefix = format!("cluster.{name}.circuit_breakers.{priority}.");
                    BreakerStats::new(stats.scope(&prefix))
                })
            });
            let limits = &entry.plan.circuit_breakers;
            default.publish(&limits.default, &entry.shared.breakers[0]);
            high.publish(&limits.high, &entry.shared.breakers[1]);
        }
    }

    /// The cluster is gone.
    pub(crate) fn remove(&mut self, name: &str) -> Option<WorkerChange> {
        let truth = self.clusters.remove(name)?;
        self.unlink(name);
        if let Some(service) = service(&truth.entry.plan) {
            self.forget(service);
        }
        Some(WorkerChange::RemoveCluster(truth.entry.plan.name.clone()))
    }

    /// Forgets the endpoints of a name that no cluster asks for.
    pub(crate) fn forget(&mut self, service: &str) {
        if !self.by_service.contains_key(service) {
            self.assignments.remove(service);
        }
    }

    /// Endpoints from EDS, for every cluster that asks for this name.
    pub(crate) fn assign(&mut self, assignment: Arc<ClusterLoadAssignment>) -> Vec<WorkerChange> {
        let service = assignment.cluster_name.clone();
        self.assignments.insert(service.clone(), assignment);
        let names = self.by_service.get(&service).cloned().unwrap_or_default();
        names.iter().filter_map(|name| self.rebuild(name)).collect()
    }

    /// The addresses of a name.
    pub(crate) fn resolved(
        &mut self,
        cluster: &str,
        name: &Arc<str>,
        addresses: Vec<IpAddr>,
    ) -> Option<WorkerChange> {
        let truth = self.clusters.get_mut(cluster)?;
        if truth.names.get(name) == Some(&addresses) {
            return None;
        }
        truth.names.insert(name.clone(), addresses);
        self.rebuild(cluster)
    }

    /// A host has failed too often: puts it aside where the cluster's limits allow it, and says for how long.
    pub(crate) fn eject(
        &mut self,
        cluster: &str,
        host: u64,
        reason: Ejection,
    ) -> Option<(WorkerChange, Duration)> {
        let truth = self.clusters.get_mut(cluster)?;
        let outlier = truth.entry.plan.outlier_detection.as_ref()?;
        let hosts = truth.entry.hosts.hosts();
        let shared = &hosts.iter().find(|found| found.shared.id == host)?.shared;
        // Whatever is decided, the count begins again: else it would never be equal to the limit a second time.
        let enforcing = match reason {
            Ejection::Consecutive5xx => {
                shared.consecutive_5xx.store(0, Relaxed);
                outlier.enforcing_consecutive_5xx
            }
            Ejection::ConsecutiveGatewayFailure => {
                shared.consecutive_gateway.store(0, Relaxed);
                outlier.enforcing_consecutive_gateway_failure
            }
            Ejection::ConsecutiveLocalOriginFailure => {
                shared.consecutive_local.store(0, Relaxed);
                outlier.enforcing_consecutive_local_origin_failure
            }
        };
        if self.random.below(100) >= u64::from(enforcing) || shared.ejected.load(Relaxed) {
            return None;
        }
        let out = hosts
            .iter()
            .filter(|host| host.shared.ejected.load(Relaxed))
            .count();
        let allowed = 100 * (out + 1) <= outlier.max_ejection_percent as usize * hosts.len();
        if !(allowed || out == 0 && outlier.always_eject_one_host) {
            return None;
        }
        shared.ejected.store(true, Relaxed);
        let times = truth.ejections.entry(host).or_default();
        *times += 1;
        let jitter = self
            .random
            .below(outlier.max_ejection_time_jitter.as_millis() as u64 + 1);
        let time = outlier
            .base_ejection_time
            .saturating_mul(*times)
            .min(outlier.max_ejection_time)
            + Duration::from_millis(jitter);
        Some((self.rebuild(cluster)?, time))
    }

    /// The time of an ejection is over.
    pub(crate) fn readmit(&mut self, cluster: &str, host: u64) -> Option<WorkerChange> {
        let truth = self.clusters.get(cluster)?;
        let found = truth
            .entry
            .hosts
            .hosts()
            .iter()
            .find(|found| found.shared.id == host)?;
        found.shared.ejected.store(false, Relaxed);
        self.rebuild(cluster)
    }

    /// The memberships that may have changed since the last call. Stats are made of them only when somebody looks: with
    /// thousands of clusters they would cost more than the clusters.
    pub(crate) fn memberships(&mut self) -> Vec<Membership> {
        let changed = std::mem::take(&mut self.changed);
        let membership = |name: &Arc<str>| {
            let truth = self.clusters.get_mut(name)?;
            let hosts = truth.entry.hosts.hosts();
            Some(Membership {
                stat_name: truth.entry.plan.stat_name().clone(),
                total: hosts.len(),
                healthy: hosts.iter().filter(|host| host.is_healthy()).count(),
                degraded: hosts.iter().filter(|host| host.is_degraded()).count(),
                changes: std::mem::take(&mut truth.changes),
            })
        };
        changed.iter().filter_map(membership).collect()
    }

    /// One cluster as workers see it.
    pub fn find(&self, name: &str) -> Option<&Arc<ClusterEntry>> {
        self.clusters.get(name).map(|truth| &truth.entry)
    }

    /// Every cluster by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ClusterEntry>> {
        self.clusters.values().map(|truth| &truth.entry)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.clusters.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.clusters.is_empty()
    }

    fn rebuild(&mut self, name: &str) -> Option<WorkerChange> {
        let truth = self.clusters.get_mut(name)?;
        truth.rebuild(&self.assignments);
        self.changed.insert(truth.entry.plan.name.clone());
        Some(WorkerChange::Hosts(truth.entry.clone()))
    }

    fn unlink(&mut self, name: &str) {
        self.by_service.retain(|_, names| {
            names.retain(|other| &**other != name);
            !names.is_empty()
        });
    }
}

/// The name under which a cluster asks EDS.
fn service(plan: &Cluster) -> Option<&Arc<str>> {
    match &plan.discovery {
        Discovery::Eds { service_name, .. } => Some(service_name),
        _ => None,
    }
}

impl Truth {
    fn rebuild(&mut self, assignments: &HashMap<Arc<str>, Arc<ClusterLoadAssignment>>) {
        let plan = self.entry.plan.clone();
        let (assignment, logical) = match &plan.discovery {
            Discovery::Static(assignment) => (Some(assignment), false),
            Discovery::StrictDns {
                load_assignment, ..
            } => (Some(load_assignment), false),
            Discovery::LogicalDns {
                load_assignment, ..
            } => (Some(load_assignment), true),
            Discovery::Eds { service_name, .. } => (assignments.get(service_name), false),
            Discovery::OriginalDst { .. } => (None, false),
        };
        let mut hosts = Vec::new();
        let mut known = HashMap::new();
        let mut localities = Vec::new();
        let mut came = false;
        for group in assignment
            .iter()
            .flat_map(|assignment| &assignment.localities)
        {
            localities.push((
                group.priority,
                group.locality.clone(),
                group.weight.unwrap_or(0),
            ));
            for endpoint in &group.endpoints {
                for address in self.addresses(endpoint, logical) {
                    // A logical host is one host whatever its address is now.
                    let key = if logical {
                        endpoint.address.clone()
                    } else {
                        address.clone()
                    };
                    let shared = known
                        .entry(key)
                        .or_insert_with_key(|key| {
                            self.known.remove(key).unwrap_or_else(|| {
                                came = true;
                                Arc::new(HostShared::new())
                            })
                        })
                        .clone();
                    hosts.push(Arc::new(host(&plan, group, endpoint, address, shared)));
                }
            }
        }
        let went = !self.known.is_empty();
        self.changes += u64::from(came || went);
        self.known = known;
        self.ejections
            .retain(|id, _| self.known.values().any(|shared| shared.id == *id));
        let factor = assignment.map_or(140, |assignment| assignment.overprovisioning_factor);
        self.entry = Arc::new(ClusterEntry {
            hosts: Arc::new(HostSet::new(&plan, hosts, factor, &localities)),
            plan,
            shared: self.entry.shared.clone(),
            on_demand: self.entry.on_demand.clone(),
        });
    }

    fn addresses(&self, endpoint: &Endpoint, logical: bool) -> Vec<Address> {
        match &endpoint.address {
            Address::Name { host, port } => {
                let found = self.names.get(host).map_or(&[][..], |found| found);
                let take = if logical { 1 } else { found.len() };
                let mut all: Vec<_> = found
                    .iter()
                    .take(take)
                    .map(|ip| Address::Socket(SocketAddr::new(*ip, *port)))
                    .collect();
                all.dedup();
                all
            }
            address => vec![address.clone()],
        }
    }
}

fn host(
    plan: &Cluster,
    group: &LocalityEndpoints,
    endpoint: &Endpoint,
    address: Address,
    shared: Arc<HostShared>,
) -> Host {
    let hostname = match &endpoint.address {
        Address::Name { host, .. } if endpoint.hostname.is_empty() => host.clone(),
        _ => endpoint.hostname.clone(),
    };
    Host {
        shared,
        address,
        additional_addresses: endpoint.additional_addresses.clone(),
        hostname,
        locality: group.locality.clone(),
        priority: group.priority,
        weight: endpoint.weight.max(1),
        health: endpoint.health,
        transport: plan.transport_for(&endpoint.metadata).clone(),
        metadata: endpoint.metadata.clone(),
    }
}
