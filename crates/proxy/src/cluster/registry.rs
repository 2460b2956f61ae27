//! The truth about clusters, on the main thread.
//!
//! It joins what comes from several sides - a cluster's plan, its endpoints from EDS, addresses of names, ejections, active
//! health checks - into one [`HostSet`] and says what workers have to be told. A host keeps its [`HostShared`] as long as
//! its address stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use super::{
    ClusterEntry,
    host::{Arrangement, Host, HostSet},
    outlier::{Detector, Ejection, Event, Rates},
    shared::{ClusterShared, HealthFlag, HostShared},
    stats::BreakerStats,
    view::LocalZone,
};
use crate::{
    plan::{
        Address, Cluster, ClusterLoadAssignment,
        cluster::Discovery,
        endpoint::{Endpoint, Locality, LocalityEndpoints},
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
    /// The cluster of the proxies like this one, and where this one is.
    local: Option<(Arc<str>, Locality)>,
    zone: Option<LocalZone>,
    random: Random,
}

/// One cluster.
#[derive(Debug)]
struct Truth {
    entry: Arc<ClusterEntry>,
    known: HashMap<Address, Arc<HostShared>>,
    /// Addresses of each name; a name that is not in here was not answered yet.
    names: HashMap<Arc<str>, Vec<IpAddr>>,
    detector: Detector,
    /// When the detector's interval ends.
    next_tick: Instant,
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
    pub(crate) excluded: usize,
    /// How often hosts came or went since it was last asked.
    pub(crate) changes: u64,
}

impl Registry {
    /// Says which cluster the proxies like this one are in (`cluster_manager.local_cluster_name`).
    pub(crate) fn set_local(&mut self, cluster: Arc<str>, own: Locality) {
        self.local = Some((cluster, own));
    }

    /// A new or changed cluster; the hosts that it had stay where they are still named.
    pub(crate) fn upsert(&mut self, plan: Arc<Cluster>, now: Instant) -> Vec<WorkerChange> {
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
        let interval = plan.outlier_detection.as_ref().map(|o| o.interval);
        let next_tick = now + interval.unwrap_or_default();
        let mut truth = match old {
            Some(old) => {
                if interval.is_none() {
                    old.readmit_all();
                }
                let entry = Arc::new(ClusterEntry {
                    plan,
                    shared: old.entry.shared.clone(),
                    hosts: old.entry.hosts.clone(),
                    on_demand: old.entry.on_demand.clone(),
                });
                Truth {
                    entry,
                    next_tick,
                    ..old
                }
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
                detector: Detector::default(),
                next_tick,
                changes: 0,
                breakers: None,
            },
        };
        if let Some(service) = asked {
            self.forget(&service);
        }
        truth.rebuild(&self.assignments, self.zone.as_ref());
        let mut changes = vec![WorkerChange::Cluster(truth.entry.clone())];
        self.changed.insert(name.clone());
        self.clusters.insert(name.clone(), truth);
        self.local_changed(&name, &mut changes);
        changes
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
        names.iter().flat_map(|name| self.rebuild(name)).collect()
    }

    /// The clusters that take their endpoints from this name.
    pub(crate) fn of_service(&self, service: &str) -> Vec<Arc<str>> {
        self.by_service.get(service).cloned().unwrap_or_default()
    }

    /// An assignment that is too old: its endpoints are gone. Another one may have come in the meantime.
    pub(crate) fn stale(&mut self, assignment: &Arc<ClusterLoadAssignment>) -> Vec<WorkerChange> {
        let service = &assignment.cluster_name;
        match self.assignments.get(service) {
            Some(current) if Arc::ptr_eq(current, assignment) => {}
            _ => return Vec::new(),
        }
        self.assign(Arc::new(ClusterLoadAssignment {
            localities: Vec::new(),
            drop_overloads: Vec::new(),
            endpoint_stale_after: None,
            ..ClusterLoadAssignment::clone(assignment)
        }))
    }

    /// The addresses of a name.
    pub(crate) fn resolved(
        &mut self,
        cluster: &str,
        name: &Arc<str>,
        addresses: Vec<IpAddr>,
    ) -> Vec<WorkerChange> {
        let Some(truth) = self.clusters.get_mut(cluster) else {
            return Vec::new();
        };
        if truth.names.get(name) == Some(&addresses) {
            return Vec::new();
        }
        truth.names.insert(name.clone(), addresses);
        self.rebuild(cluster)
    }

    /// A host has failed too often in a row.
    pub(crate) fn failing(
        &mut self,
        cluster: &str,
        host: u64,
        reason: Ejection,
        now: Instant,
    ) -> (Vec<WorkerChange>, Vec<Event>) {
        self.watch(cluster, |truth, random| {
            let entry = truth.entry.clone();
            match &entry.plan.outlier_detection {
                Some(plan) => {
                    let hosts = entry.hosts.hosts();
                    truth
                        .detector
                        .failing(plan, hosts, host, reason, now, random)
                }
                None => Vec::new(),
            }
        })
    }

    /// Ends the interval of every detector that is due: the clusters, with what happened in each.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<(Arc<str>, Vec<WorkerChange>, Vec<Event>)> {
        let due: Vec<_> = self
            .clusters
            .iter()
            .filter(|(_, truth)| {
                truth.entry.plan.outlier_detection.is_some() && truth.next_tick <= now
            })
            .map(|(name, _)| name.clone())
            .collect();
        let mut results = Vec::new();
        for name in due {
            let (changes, events) = self.watch(&name, |truth, random| {
                let entry = truth.entry.clone();
                let Some(plan) = &entry.plan.outlier_detection else {
                    return Vec::new();
                };
                truth.next_tick = now + plan.interval;
                truth.detector.tick(plan, entry.hosts.hosts(), now, random)
            });
            results.push((name, changes, events));
        }
        results
    }

    /// When the next interval ends.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let with = self
            .clusters
            .values()
            .filter(|truth| truth.entry.plan.outlier_detection.is_some());
        with.map(|truth| truth.next_tick).min()
    }

    /// An active health check has passed: ends an ejection where the cluster says so.
    pub(crate) fn uneject(
        &mut self,
        cluster: &str,
        host: u64,
        now: Instant,
    ) -> (Vec<WorkerChange>, Vec<Event>) {
        self.watch(cluster, |truth, _| {
            let entry = truth.entry.clone();
            let wanted = entry.plan.outlier_detection.as_ref();
            let found = entry
                .hosts
                .hosts()
                .iter()
                .find(|found| found.shared.id == host && found.shared.ejected.load(Relaxed));
            match found {
                Some(host) if wanted.is_some_and(|o| o.uneject_on_health_check) => {
                    vec![truth.detector.uneject(host, now)]
                }
                _ => Vec::new(),
            }
        })
    }

    /// The health of hosts has changed; `failed` are those that have just become bad.
    pub(crate) fn health_changed(&mut self, cluster: &str, failed: &[u64]) -> Vec<WorkerChange> {
        self.rebuild_after(cluster, failed)
    }

    /// Success rates of a cluster: of answers, and of this side's own part.
    pub fn success_rates(&self, cluster: &str) -> Option<[Rates; 2]> {
        Some(self.clusters.get(cluster)?.detector.rates)
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
                excluded: hosts.iter().filter(|host| host.is_excluded()).count(),
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

    /// Does something that may put hosts of a cluster aside or bring them back, and tells workers where it did.
    fn watch(
        &mut self,
        cluster: &str,
        then: impl FnOnce(&mut Truth, &Random) -> Vec<Event>,
    ) -> (Vec<WorkerChange>, Vec<Event>) {
        let Some(truth) = self.clusters.get_mut(cluster) else {
            return (Vec::new(), Vec::new());
        };
        let aside = |truth: &Truth| -> HashSet<u64> {
            let hosts = truth.entry.hosts.hosts().iter();
            hosts
                .filter(|host| host.shared.ejected.load(Relaxed))
                .map(|host| host.shared.id)
                .collect()
        };
        let before = aside(truth);
        let events = then(truth, &self.random);
        let after = aside(truth);
        if before == after {
            return (Vec::new(), events);
        }
        let failed: Vec<u64> = after.difference(&before).copied().collect();
        (self.rebuild_after(cluster, &failed), events)
    }

    fn rebuild(&mut self, name: &str) -> Vec<WorkerChange> {
        self.rebuild_after(name, &[])
    }

    fn rebuild_after(&mut self, name: &str, failed: &[u64]) -> Vec<WorkerChange> {
        let Some(truth) = self.clusters.get_mut(name) else {
            return Vec::new();
        };
        truth.rebuild(&self.assignments, self.zone.as_ref());
        let entry = truth.entry.clone();
        self.changed.insert(entry.plan.name.clone());
        let mut changes = vec![match failed {
            [] => WorkerChange::Hosts(entry),
            failed => WorkerChange::HostsFailed(entry, failed.into()),
        }];
        self.local_changed(name, &mut changes);
        changes
    }

    /// After a change of the local cluster: where requests go depends on it in every cluster.
    fn local_changed(&mut self, name: &str, changes: &mut Vec<WorkerChange>) {
        let Some((_, own)) = self.local.as_ref().filter(|(local, _)| **local == *name) else {
            return;
        };
        let Some(local) = self.clusters.get(name) else {
            return;
        };
        let entry = &local.entry;
        let zone = LocalZone::new(own, &entry.hosts, entry.plan.lb.panic_percent());
        if self.zone.as_ref() == Some(&zone) {
            return;
        }
        self.zone = Some(zone);
        for (other, truth) in &mut self.clusters {
            if **other != *name {
                truth.rebuild(&self.assignments, self.zone.as_ref());
                changes.push(WorkerChange::Hosts(truth.entry.clone()));
            }
        }
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
    fn rebuild(
        &mut self,
        assignments: &HashMap<Arc<str>, Arc<ClusterLoadAssignment>>,
        zone: Option<&LocalZone>,
    ) {
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
            Discovery::OriginalDst { .. } | Discovery::Aggregate(_) => (None, false),
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
                        .or_insert_with_key(|key| match self.known.remove(key) {
                            Some(shared) => known_host(&plan, endpoint, shared),
                            None => {
                                came = true;
                                new_host(&plan, endpoint)
                            }
                        })
                        .clone();
                    hosts.push(Arc::new(host(&plan, group, endpoint, address, shared)));
                }
            }
        }
        self.keep_healthy(&plan, &mut hosts, &mut known);
        let went = !self.known.is_empty();
        self.changes += u64::from(came || went);
        self.known = known;
        let arrangement = Arrangement {
            overprovisioning: assignment.map_or(140, |found| found.overprovisioning_factor),
            weighted_priority_health: assignment.is_some_and(|a| a.weighted_priority_health),
            localities: &localities,
            zone: zone.filter(|_| !matches!(plan.discovery, Discovery::OriginalDst { .. })),
        };
        let mut set = HostSet::new(&plan, hosts, &arrangement);
        if let Some(assignment) = assignment {
            set.set_drops(&assignment.drop_overloads);
        }
        self.entry = Arc::new(ClusterEntry {
            hosts: Arc::new(set),
            plan,
            shared: self.entry.shared.clone(),
            on_demand: self.entry.on_demand.clone(),
        });
    }

    /// Hosts that discovery names no longer stay as long as active health checks find them healthy: discovery may be
    /// behind, and a check is not.
    fn keep_healthy(
        &mut self,
        plan: &Cluster,
        hosts: &mut Vec<Arc<Host>>,
        known: &mut HashMap<Address, Arc<HostShared>>,
    ) {
        if plan.health_check.is_none() || plan.ignore_health_on_host_removal {
            return;
        }
        for old in self.entry.hosts.hosts() {
            let gone = self.known.contains_key(&old.address);
            if gone && !old.shared.flag(HealthFlag::FailedActiveHc) && !old.is_excluded() {
                self.known.remove(&old.address);
                old.shared.set_flag(HealthFlag::PendingDynamicRemoval, true);
                known.insert(old.address.clone(), old.shared.clone());
                hosts.push(old.clone());
            }
        }
    }

    /// The cluster has no outlier detection any more: nobody would bring its hosts back.
    fn readmit_all(&self) {
        for host in self.entry.hosts.hosts() {
            host.shared.ejected.store(false, Relaxed);
        }
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

/// Facts of a host that was there before. Where nobody checks hosts nothing that checks have found may stay.
fn known_host(plan: &Cluster, endpoint: &Endpoint, shared: Arc<HostShared>) -> Arc<HostShared> {
    match is_checked(plan, endpoint) {
        true => drop(shared.set_flag(HealthFlag::PendingDynamicRemoval, false)),
        false => shared.health_flags.store(0, Relaxed),
    }
    shared
}

fn is_checked(plan: &Cluster, endpoint: &Endpoint) -> bool {
    plan.health_check.is_some() && endpoint.health_check.as_ref().is_none_or(|h| !h.disabled)
}

/// Facts of a host that was not there before. Where hosts are checked it is unhealthy until its first check.
fn new_host(plan: &Cluster, endpoint: &Endpoint) -> Arc<HostShared> {
    let shared = HostShared::new();
    if is_checked(plan, endpoint) {
        shared.set_flag(HealthFlag::FailedActiveHc, true);
        let pending = plan.lb.ignore_new_hosts_until_first_hc;
        shared.set_flag(HealthFlag::PendingActiveHc, pending);
    }
    Arc::new(shared)
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
        health_check: endpoint.health_check.clone(),
    }
}
