//! A cluster as the main thread hands it to workers, and the hosts that are made of its endpoints.
//!
//! Of ten thousand clusters a proxy may use ten: hosts, and the facts that workers share about them, are made when the
//! first request asks for them, on whichever thread that is.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, atomic::Ordering::Relaxed},
};

use super::{
    host::{Arrangement, Host, HostSet},
    shared::{ClusterShared, HealthFlag, HostShared, now_ms},
    view::LocalZone,
};
use crate::plan::{
    Address, Cluster, ClusterLoadAssignment,
    cluster::Discovery,
    endpoint::{Endpoint, LocalityEndpoints},
    lazy::{HostCounts, LazyCluster},
};

/// What the main thread hands to workers for one cluster.
#[derive(Debug)]
pub struct ClusterEntry {
    /// What the configuration says.
    pub plan: Arc<LazyCluster>,
    /// Counts that workers share, from their first use.
    shared: Arc<LazyLock<Arc<ClusterShared>>>,
    source: Source,
    hosts: OnceLock<Arc<HostSet>>,
}

/// The facts of a cluster's hosts by address, over all versions of its endpoints.
pub(crate) type KnownHosts = Mutex<HashMap<Address, Arc<HostShared>>>;

/// What hosts are made of, beside the plan.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// From EDS.
    pub(super) assigned: Option<Arc<ClusterLoadAssignment>>,
    /// Addresses of each name; a name that is not in here was not answered yet.
    pub(super) names: Option<Arc<HashMap<Arc<str>, Vec<IpAddr>>>>,
    pub(super) zone: Option<Arc<LocalZone>>,
    /// When the endpoints were heard of, in milliseconds of [`now_ms`]: slow start counts from here.
    heard: u64,
}

impl Source {
    pub(super) fn new(
        assigned: Option<Arc<ClusterLoadAssignment>>,
        names: Option<Arc<HashMap<Arc<str>, Vec<IpAddr>>>>,
        zone: Option<Arc<LocalZone>>,
    ) -> Self {
        Self {
            assigned,
            names,
            zone,
            heard: now_ms(),
        }
    }
}

impl ClusterEntry {
    /// A cluster without a host.
    pub(super) fn new(plan: Arc<LazyCluster>) -> Self {
        Self {
            plan,
            shared: Arc::new(LazyLock::new(Arc::default)),
            source: Source::default(),
            hosts: OnceLock::new(),
        }
    }

    /// The next version of the cluster, and whether hosts came or went with it.
    ///
    /// The hosts are made at once where somebody uses them. Those that it had keep their facts where they are still named.
    pub(super) fn next(&self, plan: Arc<LazyCluster>, source: Source) -> (Self, bool) {
        let next = Self {
            plan,
            shared: self.shared.clone(),
            source,
            hosts: OnceLock::new(),
        };
        let changed = if self.hosts.get().is_some() || next.plan.is_kept() {
            next.make_after(self)
        } else if self.counts().0.total == 0 {
            next.counts().0.total > 0
        } else {
            next.addresses() != self.addresses()
        };
        (next, changed)
    }

    /// Its hosts, made now where nobody has asked before.
    pub fn hosts(&self) -> &Arc<HostSet> {
        self.hosts.get_or_init(|| {
            let plan = self.plan.plan();
            // Versions of the endpoints may be made on two threads at once, and share the facts of a host in both.
            let mut known = lock(&self.shared.hosts);
            let hosts = self.source.hosts(plan, &mut known);
            Arc::new(self.source.arranged(plan, hosts))
        })
    }

    /// Its plan and hosts for a look, which does not bring it to life.
    pub fn look(&self) -> (Arc<Cluster>, Arc<HostSet>) {
        let plan = self.plan.look();
        let hosts = self.hosts.get().cloned().unwrap_or_else(|| {
            let hosts = self.source.hosts(&plan, &mut HashMap::new());
            Arc::new(self.source.arranged(&plan, hosts))
        });
        (plan, hosts)
    }

    /// Counts that workers share.
    pub(crate) fn shared(&self) -> &Arc<ClusterShared> {
        &self.shared
    }

    /// The same where somebody has asked before.
    pub(super) fn made_shared(&self) -> Option<&Arc<ClusterShared>> {
        LazyLock::get(&self.shared)
    }

    /// How many hosts are healthy, degraded and excluded, and how many there are; does not make them.
    pub(super) fn counts(&self) -> (HostCounts, u32) {
        let Some(set) = self.hosts.get() else {
            let assigned = self.source.assigned.as_deref();
            return (assigned.map_or(self.plan.own_hosts(), HostCounts::of), 0);
        };
        let counts = HostCounts {
            total: set.hosts().len() as u32,
            healthy: set.healthy() as u32,
            degraded: set.degraded() as u32,
        };
        (counts, set.excluded() as u32)
    }

    /// Makes the hosts with what is known of them; says whether any came or went.
    fn make_after(&self, old: &Self) -> bool {
        let plan = self.plan.plan();
        let mut known = lock(&self.shared.hosts);
        let before = known.len();
        let mut hosts = self.source.hosts(plan, &mut known);
        let with_new = known.len();
        if let Some(old) = old.hosts.get() {
            keep_healthy(plan, old, &mut hosts);
        }
        let named: HashSet<u64> = hosts.iter().map(|host| host.shared.id).collect();
        known.retain(|_, shared| named.contains(&shared.id));
        let changed = with_new > before || known.len() < with_new;
        drop(known);
        // Nobody else has this version yet.
        let _ = self.hosts.set(Arc::new(self.source.arranged(plan, hosts)));
        changed
    }

    /// Where its hosts are, of a cluster that nobody uses.
    fn addresses(&self) -> HashSet<Address> {
        let plan = (self.plan.own_hosts().total > 0).then(|| self.plan.look());
        let own = plan.as_deref().and_then(|plan| match &plan.discovery {
            Discovery::Static(assignment) => Some(assignment),
            _ => None,
        });
        let assignment = own.or(self.source.assigned.as_ref());
        let endpoints = assignment.iter().flat_map(|a| a.endpoints());
        endpoints.map(|(_, e)| e.address.clone()).collect()
    }
}

impl Source {
    /// Where a cluster's endpoints are, and whether all addresses of its name are one host.
    fn assignment<'s>(&'s self, plan: &'s Cluster) -> (Option<&'s ClusterLoadAssignment>, bool) {
        match &plan.discovery {
            Discovery::Static(assignment) => (Some(assignment), false),
            Discovery::StrictDns {
                load_assignment, ..
            } => (Some(load_assignment), false),
            Discovery::LogicalDns {
                load_assignment, ..
            } => (Some(load_assignment), true),
            Discovery::Eds { .. } => (self.assigned.as_deref(), false),
            Discovery::OriginalDst { .. } | Discovery::Aggregate(_) => (None, false),
        }
    }

    /// The hosts; what is new about them becomes known.
    fn hosts(
        &self,
        plan: &Cluster,
        known: &mut HashMap<Address, Arc<HostShared>>,
    ) -> Vec<Arc<Host>> {
        let (assignment, logical) = self.assignment(plan);
        let mut hosts = Vec::new();
        for (group, endpoint) in assignment.iter().flat_map(|a| a.endpoints()) {
            for address in self.addresses(endpoint, logical) {
                // A logical host is one host whatever its address is now.
                let key = if logical { &endpoint.address } else { &address };
                let shared = match known.get(key) {
                    Some(shared) => known_host(plan, endpoint, shared.clone()),
                    None => {
                        let shared = new_host(plan, endpoint);
                        known.insert(key.clone(), shared.clone());
                        shared
                    }
                };
                hosts.push(Arc::new(host(plan, group, endpoint, address, shared)));
            }
        }
        hosts
    }

    fn arranged(&self, plan: &Cluster, hosts: Vec<Arc<Host>>) -> HostSet {
        let (assignment, _) = self.assignment(plan);
        let groups = assignment.iter().flat_map(|a| &a.localities);
        let localities: Vec<_> = groups
            .map(|group| {
                (
                    group.priority,
                    group.locality.clone(),
                    group.weight.unwrap_or(0),
                )
            })
            .collect();
        let zone = self.zone.as_deref();
        let arrangement = Arrangement {
            overprovisioning: assignment.map_or(140, |found| found.overprovisioning_factor),
            weighted_priority_health: assignment.is_some_and(|a| a.weighted_priority_health),
            localities: &localities,
            zone: zone.filter(|_| !matches!(plan.discovery, Discovery::OriginalDst { .. })),
            heard: self.heard,
        };
        let mut set = HostSet::new(plan, hosts, &arrangement);
        if let Some(assignment) = assignment {
            set.set_drops(&assignment.drop_overloads);
        }
        set
    }

    fn addresses(&self, endpoint: &Endpoint, logical: bool) -> Vec<Address> {
        match &endpoint.address {
            Address::Name { host, port } => {
                let found = self.names.as_ref().and_then(|names| names.get(host));
                let found = found.map_or(&[][..], |found| found);
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

/// Hosts that discovery names no longer stay as long as active health checks find them healthy: discovery may be behind,
/// and a check is not.
fn keep_healthy(plan: &Cluster, old: &HostSet, hosts: &mut Vec<Arc<Host>>) {
    if plan.health_check.is_none() || plan.ignore_health_on_host_removal {
        return;
    }
    let named: HashSet<u64> = hosts.iter().map(|host| host.shared.id).collect();
    for old in old.hosts() {
        let gone = !named.contains(&old.shared.id);
        if gone && !old.shared.flag(HealthFlag::FailedActiveHc) && !old.is_excluded() {
            old.shared.set_flag(HealthFlag::PendingDynamicRemoval, true);
            hosts.push(old.clone());
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

fn lock(known: &KnownHosts) -> std::sync::MutexGuard<'_, HashMap<Address, Arc<HostShared>>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}
