//! One endpoint as it can be connected to, and all of a cluster at one time.
//!
//! A change of endpoints or of their health makes a new [`HostSet`] on the main thread, which all workers share. What has
//! to outlive it (counts, pools, ejection) hangs on the host's [`HostShared`], which stays the same as long as the
//! address does.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
};

use serde_json::Value;

use super::{
    shared::{HealthFlag, HostShared},
    subset::Subsets,
    view::{LocalZone, View},
};
use crate::plan::{
    Address, Cluster, Fraction, Metadata,
    cluster::UpstreamTransport,
    endpoint::{EndpointHealthCheck, HealthStatus, Locality},
};

/// One endpoint as it can be connected to.
#[derive(Clone, Debug)]
pub struct Host {
    /// What lives on when the rest changes.
    pub shared: Arc<HostShared>,
    /// Where to connect: a socket or a pipe.
    pub address: Address,
    /// Tried after the first, for hosts with several addresses.
    pub additional_addresses: Vec<Address>,
    /// Name, for `auto` host rewrite and SNI; empty when there is none.
    pub hostname: Arc<str>,
    /// Where it is.
    pub locality: Arc<Locality>,
    /// 0 is used first.
    pub priority: u32,
    /// Share of its locality, at least 1.
    pub weight: u32,
    /// What discovery says.
    pub health: HealthStatus,
    /// Free structures.
    pub metadata: Metadata,
    /// What bytes to it are wrapped in.
    pub transport: UpstreamTransport,
    /// How it is checked, where that is not as the cluster says.
    pub health_check: Option<Arc<EndpointHealthCheck>>,
}

impl Host {
    /// Whether new requests may go there while others suffice.
    pub fn is_healthy(&self) -> bool {
        self.health.is_healthy() && !self.has_failed() && !self.says_degraded()
    }

    /// Whether it is used when healthy hosts do not suffice.
    pub fn is_degraded(&self) -> bool {
        !self.has_failed()
            && (self.health == HealthStatus::Degraded
                || self.health.is_healthy() && self.says_degraded())
    }

    /// Whether it counts for nothing, neither as healthy nor as missing.
    pub fn is_excluded(&self) -> bool {
        self.shared.flag(HealthFlag::PendingActiveHc)
            || self.shared.flag(HealthFlag::ExcludedViaImmediateHcFail)
    }

    /// What is known from all sides, as `override_host_status` names it.
    pub fn status(&self) -> HealthStatus {
        if self.has_failed() {
            return HealthStatus::Unhealthy;
        }
        match self.health {
            HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout => self.health,
            _ if self.says_degraded() => HealthStatus::Degraded,
            other => other,
        }
    }

    /// Whether it has said itself, to a check or in an answer, that it is to be used last.
    fn says_degraded(&self) -> bool {
        self.shared.flag(HealthFlag::DegradedActiveHc)
            || self.shared.flag(HealthFlag::DegradedOutlierDetection)
    }

    /// Whether outlier detection or an active check has found it bad.
    fn has_failed(&self) -> bool {
        self.shared.ejected.load(Relaxed) || self.shared.flag(HealthFlag::FailedActiveHc)
    }
}

/// The hosts of a cluster at one time.
#[derive(Debug, Default)]
pub struct HostSet {
    hosts: Vec<Arc<Host>>,
    /// What a choice is made among; views refer to them by index.
    pub(super) lists: Vec<HostList>,
    /// How many schedulers of localities the views have together.
    pub(super) schedulers: usize,
    /// All hosts.
    pub(super) all: View,
    /// Hosts by metadata, where the cluster has subsets.
    pub(super) subsets: Option<Box<Subsets>>,
    /// Share of requests refused, by category.
    drops: Vec<(Arc<str>, Fraction)>,
    /// For requests that name their host; made at the first of them.
    by_address: OnceLock<HashMap<SocketAddr, usize>>,
}

/// Hosts that one choice is made among.
#[derive(Debug)]
pub(super) struct HostList {
    pub(super) hosts: Vec<Arc<Host>>,
    pub(super) equal_weights: bool,
    /// When the last of them became healthy, in milliseconds of [`now_ms`](super::shared::now_ms).
    pub(super) newest: u64,
}

/// What an assignment says beside its hosts.
#[derive(Debug, Default)]
pub(crate) struct Arrangement<'a> {
    /// In percent.
    pub(crate) overprovisioning: u32,
    /// Health of a priority is a share of its weight.
    pub(crate) weighted_priority_health: bool,
    /// Weight of each (priority, locality).
    pub(crate) localities: &'a [(u32, Arc<Locality>, u32)],
    /// Where requests should stay in this proxy's own locality.
    pub(crate) zone: Option<&'a LocalZone>,
    /// When the hosts were heard of, in milliseconds of [`now_ms`](super::shared::now_ms).
    pub(crate) heard: u64,
}

impl HostSet {
    /// Sorts hosts by priority, locality and health.
    pub(crate) fn new(
        plan: &Cluster,
        hosts: Vec<Arc<Host>>,
        arrangement: &Arrangement<'_>,
    ) -> Self {
        for host in &hosts {
            if host.is_healthy() {
                // The first healthy moment.
                let _ = host.shared.healthy_since.compare_exchange(
                    0,
                    arrangement.heard,
                    Relaxed,
                    Relaxed,
                );
            }
        }
        let mut set = Self::default();
        let weights = plan.lb.locality_weighted.then_some(arrangement.localities);
        match &plan.subsets {
            None => set.all = View::new(plan, &hosts, weights, arrangement, &mut set),
            Some(subsets) => {
                // Weights of localities count within a subset only where the cluster says so.
                let weights = weights.filter(|_| subsets.locality_weight_aware);
                set.all = View::new(plan, &hosts, weights, arrangement, &mut set);
                let subsets = Subsets::new(plan, subsets, &hosts, weights, arrangement, &mut set);
                set.subsets = Some(Box::new(subsets));
            }
        }
        set.hosts = hosts;
        set
    }

    /// Every host, usable or not.
    pub fn hosts(&self) -> &[Arc<Host>] {
        &self.hosts
    }

    /// How many hosts are healthy.
    pub fn healthy(&self) -> usize {
        self.hosts.iter().filter(|host| host.is_healthy()).count()
    }

    /// How many are degraded.
    pub fn degraded(&self) -> usize {
        self.hosts.iter().filter(|host| host.is_degraded()).count()
    }

    /// How many count for nothing.
    pub fn excluded(&self) -> usize {
        self.hosts.iter().filter(|host| host.is_excluded()).count()
    }

    /// Says which share of requests is refused.
    pub(super) fn set_drops(&mut self, drops: &[(Arc<str>, Fraction)]) {
        self.drops = drops.to_vec();
    }

    /// Whether a request is refused; the numbers are drawn one for each category.
    pub(super) fn drops(&self, mut random: impl FnMut() -> u64) -> bool {
        self.drops.iter().any(|(_, share)| share.hits(random()))
    }

    /// The host with this address, in whatever health.
    pub fn at(&self, address: SocketAddr) -> Option<&Arc<Host>> {
        let by_address = self.by_address.get_or_init(|| {
            let sockets = self.hosts.iter().enumerate();
            sockets
                .filter_map(|(index, host)| Some((host.address.socket()?, index)))
                .collect()
        });
        self.hosts.get(*by_address.get(&address)?)
    }

    /// Adds a list of hosts; `None` where there is none. Lists that are the same are one.
    pub(super) fn list(&mut self, hosts: Vec<Arc<Host>>) -> Option<usize> {
        if hosts.is_empty() {
            return None;
        }
        let same = |list: &HostList| {
            list.hosts.len() == hosts.len()
                && list
                    .hosts
                    .iter()
                    .zip(&hosts)
                    .all(|(a, b)| Arc::ptr_eq(a, b))
        };
        // The last ones only: lists that are alike (all, healthy) are made one after the other.
        let recent = self.lists.len().saturating_sub(2);
        if let Some(at) = self.lists[recent..].iter().position(same) {
            return Some(recent + at);
        }
        self.lists.push(HostList::new(hosts));
        Some(self.lists.len() - 1)
    }
}

impl HostList {
    fn new(hosts: Vec<Arc<Host>>) -> Self {
        let equal_weights = hosts
            .windows(2)
            .all(|pair| pair[0].weight == pair[1].weight);
        let since = |host: &Arc<Host>| host.shared.healthy_since.load(Relaxed);
        Self {
            newest: hosts.iter().map(since).max().unwrap_or(0),
            hosts,
            equal_weights,
        }
    }
}

/// Whether metadata of a host (its `envoy.lb` namespace) holds each of these; of a list any element, where `list_as_any`.
pub(super) fn metadata_fits(
    metadata: Option<&Value>,
    wanted: &BTreeMap<String, Value>,
    list_as_any: bool,
) -> bool {
    wanted.iter().all(
        |(key, value)| match metadata.and_then(|members| members.get(key.as_str())) {
            Some(found) if found == value => true,
            Some(Value::Array(list)) if list_as_any => list.contains(value),
            _ => false,
        },
    )
}
