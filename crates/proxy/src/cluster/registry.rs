//! The truth about clusters, on the main thread.
//!
//! It joins what comes from several sides - a cluster's plan, its endpoints from EDS, addresses of names, ejections, active
//! health checks - into one [`ClusterEntry`] and says what workers have to be told. A host keeps its facts as long as its
//! address stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use super::{
    ClusterEntry, Host,
    entry::Source,
    outlier::{Detector, Ejection, Event, EventKind, Rates},
    shared::{ClusterShared, HealthFlag},
    stats::BreakerStats,
    view::LocalZone,
};
use crate::{
    plan::{
        ClusterLoadAssignment,
        cluster::OutlierDetection,
        endpoint::Locality,
        lazy::{HostCounts, LazyCluster},
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
    zone: Option<Arc<LocalZone>>,
    random: Random,
}

/// One cluster.
#[derive(Debug)]
struct Truth {
    entry: Arc<ClusterEntry>,
    /// Addresses of each name; a name that is not in here was not answered yet.
    names: Option<Arc<HashMap<Arc<str>, Vec<IpAddr>>>>,
    detector: Detector,
    /// When the detector's interval ends.
    next_tick: Instant,
    /// How often hosts came or went, since it was last asked.
    changes: u64,
    /// What the limits of both priorities are told by, once a worker has used the cluster.
    breakers: Option<Box<[BreakerStats; 2]>>,
}

/// How many hosts a cluster has; what `cluster.NAME.membership_*` tell.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) stat_name: Arc<str>,
    pub(crate) hosts: HostCounts,
    pub(crate) excluded: u32,
    /// How often hosts came or went since it was last asked.
    pub(crate) changes: u64,
}

impl Registry {
    /// Says which cluster the proxies like this one are in (`cluster_manager.local_cluster_name`).
    pub(crate) fn set_local(&mut self, cluster: Arc<str>, own: Locality) {
        self.local = Some((cluster, own));
    }

    /// A new or changed cluster; the hosts that it had stay where they are still named.
    pub(crate) fn upsert(&mut self, plan: Arc<LazyCluster>, now: Instant) -> Vec<WorkerChange> {
        let name = plan.name.clone();
        let old = self.clusters.remove(&name);
        let asked = old.as_ref().and_then(|old| {
            self.unlink(&old.entry.plan);
            old.entry.plan.eds().map(|(service, _)| service.clone())
        });
        if let Some((service, _)) = plan.eds() {
            self.by_service
                .entry(service.clone())
                .or_default()
                .push(name.clone());
        }
        let detection = plan.made().and_then(|p| p.outlier_detection.as_ref());
        let interval = detection.map(|o| o.interval);
        let next_tick = now + interval.unwrap_or_default();
        let mut truth = match old {
            Some(old) => {
                if interval.is_none() && old.outlier_detection().is_some() {
                    old.readmit_all();
                }
                Truth { next_tick, ..old }
            }
            None => Truth::new(plan.clone(), next_tick),
        };
        if let Some(service) = asked {
            self.forget(&service);
        }
        truth.rebuild(plan, &self.assignments, self.zone.as_ref());
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
            let touched = |s: &&Arc<ClusterShared>| s.touched.load(Relaxed);
            let Some(shared) = entry.made_shared().filter(touched) else {
                continue;
            };
            let [default, high] = truth
                .breakers
                .get_or_insert_with(|| {
                    Box::new(["default", "high"].map(|priority| {
                        let name = entry.plan.stat_name();
                        let prefix = format!("cluster.{name}.circuit_breakers.{priority}.");
                        BreakerStats::new(stats.scope(&prefix))
                    }))
                })
                .as_mut();
            let limits = &entry.plan.plan().circuit_breakers;
            default.publish(&limits.default, &shared.breakers[0]);
            high.publish(&limits.high, &shared.breakers[1]);
        }
    }

    /// The cluster is gone.
    pub(crate) fn remove(&mut self, name: &str) -> Option<WorkerChange> {
        let truth = self.clusters.remove(name)?;
        self.unlink(&truth.entry.plan);
        if let Some((service, _)) = truth.entry.plan.eds() {
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
        let known = truth.names.as_ref().and_then(|names| names.get(name));
        if known == Some(&addresses) {
            return Vec::new();
        }
        let names = Arc::make_mut(truth.names.get_or_insert_default());
        names.insert(name.clone(), addresses);
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
        self.detect(cluster, |detector, plan, hosts, random| {
            detector.failing(plan, hosts, host, reason, now, random)
        })
    }

    /// A host has said in an answer that it is to be used last.
    pub(crate) fn degraded(
        &mut self,
        cluster: &str,
        host: u64,
        now: Instant,
    ) -> (Vec<WorkerChange>, Vec<Event>) {
        self.detect(cluster, |detector, plan, hosts, random| {
            Vec::from_iter(detector.degraded(plan, hosts, host, now, random))
        })
    }

    /// Ends the interval of every detector that is due: the clusters, with what happened in each.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<(Arc<str>, Vec<WorkerChange>, Vec<Event>)> {
        let due: Vec<_> = self
            .clusters
            .iter()
            .filter(|(_, truth)| truth.outlier_detection().is_some() && truth.next_tick <= now)
            .map(|(name, _)| name.clone())
            .collect();
        let mut results = Vec::new();
        for name in due {
            let (changes, events) = self.watch(&name, |truth, random| {
                let entry = truth.entry.clone();
                let plan = entry.plan.made();
                let Some(plan) = plan.and_then(|plan| plan.outlier_detection.as_ref()) else {
                    return Vec::new();
                };
                truth.next_tick = now + plan.interval;
                let hosts = entry.hosts().hosts();
                truth.detector.tick(plan, hosts, now, random)
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
            .filter(|truth| truth.outlier_detection().is_some());
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
            let plan = entry.plan.made();
            let wanted = plan.and_then(|plan| plan.outlier_detection.as_ref());
            let found = entry
                .hosts()
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
            let (hosts, excluded) = truth.entry.counts();
            Some(Membership {
                stat_name: truth.entry.plan.stat_name().clone(),
                hosts,
                excluded,
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

    /// Asks the detector of a cluster that has one.
    fn detect(
        &mut self,
        cluster: &str,
        ask: impl FnOnce(&mut Detector, &OutlierDetection, &[Arc<Host>], &Random) -> Vec<Event>,
    ) -> (Vec<WorkerChange>, Vec<Event>) {
        self.watch(cluster, |truth, random| {
            let entry = truth.entry.clone();
            let plan = entry.plan.made();
            match plan.and_then(|plan| plan.outlier_detection.as_ref()) {
                Some(plan) => ask(&mut truth.detector, plan, entry.hosts().hosts(), random),
                None => Vec::new(),
            }
        })
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
            let hosts = truth.entry.hosts().hosts().iter();
            hosts
                .filter(|host| host.shared.ejected.load(Relaxed))
                .map(|host| host.shared.id)
                .collect()
        };
        let before = aside(truth);
        let events = then(truth, &self.random);
        let after = aside(truth);
        let last =
            |event: &Event| matches!(event.kind, EventKind::Degraded | EventKind::Undegraded);
        if before == after && !events.iter().any(last) {
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
        let plan = truth.entry.plan.clone();
        truth.rebuild(plan, &self.assignments, self.zone.as_ref());
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
        let panic = entry.plan.plan().lb.panic_percent();
        let zone = LocalZone::new(own, entry.hosts(), panic);
        if self.zone.as_deref() == Some(&zone) {
            return;
        }
        self.zone = Some(Arc::new(zone));
        for (other, truth) in &mut self.clusters {
            if **other != *name {
                let plan = truth.entry.plan.clone();
                truth.rebuild(plan, &self.assignments, self.zone.as_ref());
                changes.push(WorkerChange::Hosts(truth.entry.clone()));
            }
        }
    }

    fn unlink(&mut self, plan: &LazyCluster) {
        let Some((service, _)) = plan.eds() else {
            return;
        };
        if let Some(names) = self.by_service.get_mut(service) {
            names.retain(|other| *other != plan.name);
            if names.is_empty() {
                self.by_service.remove(service);
            }
        }
    }
}

impl Truth {
    fn new(plan: Arc<LazyCluster>, next_tick: Instant) -> Self {
        Self {
            entry: Arc::new(ClusterEntry::new(plan)),
            names: None,
            detector: Detector::default(),
            next_tick,
            changes: 0,
            breakers: None,
        }
    }

    fn rebuild(
        &mut self,
        plan: Arc<LazyCluster>,
        assignments: &HashMap<Arc<str>, Arc<ClusterLoadAssignment>>,
        zone: Option<&Arc<LocalZone>>,
    ) {
        let assigned = plan.eds().and_then(|(service, _)| assignments.get(service));
        let source = Source::new(assigned.cloned(), self.names.clone(), zone.cloned());
        let (entry, changed) = self.entry.next(plan, source);
        self.changes += u64::from(changed);
        self.entry = Arc::new(entry);
    }

    /// How outliers are found, where they are.
    fn outlier_detection(&self) -> Option<&OutlierDetection> {
        self.entry.plan.made()?.outlier_detection.as_ref()
    }

    /// The cluster has no outlier detection any more: nobody would bring its hosts back.
    fn readmit_all(&self) {
        for host in self.entry.hosts().hosts() {
            host.shared.ejected.store(false, Relaxed);
            let flag = HealthFlag::DegradedOutlierDetection;
            host.shared.set_flag(flag, false);
        }
    }
}
