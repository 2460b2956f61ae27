//! Hosts sorted for choosing: by priority, then by locality where localities have weights or this proxy's own is
//! preferred.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, OnceLock},
};

use super::{
    hash::HashTable,
    host::{Arrangement, Host, HostSet},
    priority::{self, Census, Load, Weights},
};
use crate::plan::{Cluster, endpoint::Locality};

/// Weight of each (priority, locality).
pub(super) type LocalityWeights<'a> = &'a [(u32, Arc<Locality>, u32)];

/// All hosts of a cluster, or those of a subset.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) levels: Vec<Level>,
}

/// One priority.
#[derive(Debug, Default)]
pub(super) struct Level {
    pub(super) load: Load,
    pub(super) census: Census,
    /// Every host, for panic.
    pub(super) all: Option<usize>,
    pub(super) healthy: Source,
    pub(super) degraded: Source,
    /// Localities with a weight, in Envoy's order; empty where weights do not count.
    weighted: Vec<(Arc<Locality>, u32)>,
    pub(super) zone: Zone,
    /// Ring or table for choices by hash, made at the first such choice.
    table: OnceLock<Option<HashTable>>,
}

/// Hosts of one health in one priority.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// All of them.
    pub(super) flat: Option<usize>,
    /// By locality, with effective weights greater than 0; empty where weights do not count.
    pub(super) localities: Vec<(usize, f64)>,
    /// Which scheduler of a worker's turns among localities is theirs.
    pub(super) scheduler: usize,
}

/// How requests stay in this proxy's own locality.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Zone {
    /// They do not.
    #[default]
    Off,
    /// They would, but something is missing.
    NotDone(ZoneProblem),
    /// So many proxies are down that the shares mean nothing.
    LocalPanic,
    /// All of them do.
    Direct(usize),
    /// A part does, in ten thousandths; the rest goes where others have more room than need.
    Residual {
        local: u64,
        /// The own locality's list and, running, the room of each further one.
        lists: Vec<Option<usize>>,
        room: Vec<u64>,
    },
}

/// Why requests do not stay in this proxy's own locality.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZoneProblem {
    LocalClusterNotOk,
    ClusterTooSmall,
}

/// What is known of the proxies that share the traffic: the hosts of the local cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LocalZone {
    /// This proxy's own locality.
    pub(crate) own: Locality,
    /// Healthy proxies of each locality.
    pub(crate) healthy: BTreeMap<Locality, u64>,
    /// How many localities there are.
    pub(crate) localities: usize,
    /// There is a proxy in this proxy's locality.
    pub(crate) has_own: bool,
    /// So many proxies are down that the numbers mean nothing.
    pub(crate) panic: bool,
}

impl LocalZone {
    /// From the local cluster's hosts.
    pub(crate) fn new(own: &Locality, local: &HostSet, panic_threshold: u32) -> Self {
        let mut zone = Self {
            own: own.clone(),
            ..Self::default()
        };
        let mut all = BTreeSet::new();
        for host in local.hosts() {
            all.insert(&*host.locality);
            if host.is_healthy() {
                *zone.healthy.entry((*host.locality).clone()).or_default() += 1;
            }
        }
        zone.localities = all.len();
        zone.has_own = all.contains(own);
        zone.panic = census(local.hosts(), false).in_panic(panic_threshold);
        zone
    }
}

impl View {
    /// The view of these hosts. Lists and schedulers are added to `set`.
    pub(super) fn new(
        plan: &Cluster,
        hosts: &[Arc<Host>],
        weights: Option<LocalityWeights<'_>>,
        arrangement: &Arrangement<'_>,
        set: &mut HostSet,
    ) -> Self {
        let count = hosts.iter().map(|host| host.priority + 1).max();
        let mut levels: Vec<Level> = (0..count.unwrap_or(0))
            .map(|priority| level(plan, priority, hosts, weights, arrangement, set))
            .collect();
        let censuses: Vec<_> = levels.iter().map(|level| level.census).collect();
        let loads = priority::loads(&censuses, plan.lb.panic_percent());
        for (level, load) in levels.iter_mut().zip(loads) {
            level.load = load;
        }
        Self { levels }
    }

    /// The priority that a number leads to, and whether its degraded hosts are meant. Priorities of `avoid` (a bit for
    /// each) take nothing while others can serve.
    pub(super) fn level(&self, number: u64, avoid: u64) -> Option<(&Level, bool)> {
        if avoid != 0 {
            let left = |(at, level): (usize, &Level)| match at < 64 && avoid >> at & 1 == 1 {
                true => Census::default(),
                false => level.census,
            };
            let left: Vec<_> = self.levels.iter().enumerate().map(left).collect();
            if left
                .iter()
                .any(|census| census.healthy + census.degraded > 0)
            {
                // Without a threshold: who avoids a priority wants none of its hosts, in panic neither.
                let loads = priority::loads(&left, 0);
                let (at, degraded) = priority::choose(loads.into_iter(), number)?;
                return Some((&self.levels[at], degraded));
            }
        }
        let loads = self.levels.iter().map(|level| level.load);
        let (at, degraded) = priority::choose(loads, number)?;
        Some((&self.levels[at], degraded))
    }
}

impl Level {
    /// The ring or table over its healthy hosts (in panic over all), and whether this call has made it.
    pub(super) fn table(&self, plan: &Cluster, set: &HostSet) -> (Option<&HashTable>, bool) {
        let mut made = false;
        // A racing worker computes the same table.
        let table = self.table.get_or_init(|| {
            made = true;
            HashTable::new(plan, self.shares(set))
        });
        (table.as_ref(), made)
    }

    /// Each host that a hash may lead to, with its share of the whole.
    fn shares(&self, set: &HostSet) -> Vec<(Arc<Host>, f64)> {
        let hosts = |list: Option<usize>| list.map_or(&[][..], |at| &set.lists[at].hosts);
        let usable = match self.load.panic {
            true => hosts(self.all),
            false => hosts(self.healthy.flat.or(self.degraded.flat)),
        };
        let share = |of: &[&Arc<Host>], whole: f64| -> Vec<(Arc<Host>, f64)> {
            let sum: u64 = of.iter().map(|host| u64::from(host.weight)).sum();
            of.iter()
                .map(|host| {
                    let share = f64::from(host.weight) * whole / sum as f64;
                    (Arc::clone(host), share)
                })
                .collect()
        };
        if self.weighted.is_empty() {
            return share(&usable.iter().collect::<Vec<_>>(), 1.0);
        }
        let sum: u64 = self
            .weighted
            .iter()
            .map(|(_, weight)| u64::from(*weight))
            .sum();
        self.weighted
            .iter()
            .filter(|(_, weight)| *weight > 0)
            .flat_map(|(locality, weight)| {
                let of: Vec<_> = usable
                    .iter()
                    .filter(|host| host.locality == *locality)
                    .collect();
                share(&of, f64::from(*weight) / sum as f64)
            })
            .collect()
    }
}

fn level(
    plan: &Cluster,
    priority: u32,
    hosts: &[Arc<Host>],
    weights: Option<LocalityWeights<'_>>,
    arrangement: &Arrangement<'_>,
    set: &mut HostSet,
) -> Level {
    let of: Vec<Arc<Host>> = hosts
        .iter()
        .filter(|host| host.priority == priority)
        .cloned()
        .collect();
    let only = |wanted: fn(&Host) -> bool| -> Vec<Arc<Host>> {
        of.iter().filter(|host| wanted(host)).cloned().collect()
    };
    let mut level = Level {
        census: Census {
            overprovisioning: arrangement.overprovisioning.into(),
            ..census(&of, arrangement.weighted_priority_health)
        },
        ..Level::default()
    };
    level.healthy.flat = set.list(only(Host::is_healthy));
    level.degraded.flat = set.list(only(Host::is_degraded));
    let own = arrangement.zone.map(|zone| &zone.own);
    if let Some(weights) = weights {
        level.weighted = in_order(&of, own)
            .into_iter()
            .map(|locality| {
                // Of two groups of one locality the last says the weight.
                let found = weights
                    .iter()
                    .rfind(|(p, l, _)| *p == priority && *l == locality);
                let weight = found.map_or(0, |entry| entry.2);
                (locality, weight)
            })
            .collect();
        for (locality, weight) in &level.weighted {
            let members: Vec<_> = of.iter().filter(|h| h.locality == *locality).collect();
            let counted = members.iter().filter(|host| !host.is_excluded()).count();
            for (source, wanted) in [
                (&mut level.healthy, Host::is_healthy as fn(&Host) -> bool),
                (&mut level.degraded, Host::is_degraded),
            ] {
                let usable: Vec<_> = members
                    .iter()
                    .filter(|host| wanted(host))
                    .map(|host| Arc::clone(host))
                    .collect();
                let weight =
                    effective_weight(*weight, usable.len(), counted, arrangement.overprovisioning);
                if weight > 0.0
                    && let Some(list) = set.list(usable)
                {
                    source.localities.push((list, weight));
                }
            }
        }
        level.healthy.scheduler = set.schedulers;
        level.degraded.scheduler = set.schedulers + 1;
        set.schedulers += 2;
    }
    // Only the first priority: how others fail over cannot be known here.
    if let Some(zone) = arrangement.zone
        && priority == 0
        && !plan.lb_policy.hashes()
    {
        level.zone = zone_routing(plan, zone, &of, set);
    }
    level.all = set.list(of);
    level
}

/// A locality that has lost hosts counts for less, as a priority does.
fn effective_weight(weight: u32, usable: usize, all: usize, overprovisioning: u32) -> f64 {
    if all == 0 {
        return 0.0;
    }
    let available = usable as f64 / all as f64;
    f64::from(weight) * (f64::from(overprovisioning) / 100.0 * available).min(1.0)
}

fn census(hosts: &[Arc<Host>], by_weight: bool) -> Census {
    let count = |wanted: fn(&Host) -> bool| hosts.iter().filter(|host| wanted(host)).count() as u64;
    let sum = |wanted: &dyn Fn(&Host) -> bool| {
        let of = hosts.iter().filter(|host| wanted(host));
        of.map(|host| u64::from(host.weight)).sum::<u64>()
    };
    Census {
        hosts: hosts.len() as u64,
        excluded: count(Host::is_excluded),
        healthy: count(Host::is_healthy),
        degraded: count(Host::is_degraded),
        overprovisioning: 100,
        weights: by_weight.then(|| Weights {
            total: sum(&|host| !host.is_excluded()),
            healthy: sum(&Host::is_healthy),
            degraded: sum(&Host::is_degraded),
        }),
    }
}

/// The localities of these hosts: this proxy's own first, then by name.
fn in_order(hosts: &[Arc<Host>], own: Option<&Locality>) -> Vec<Arc<Locality>> {
    let mut all: Vec<Arc<Locality>> = hosts.iter().map(|host| host.locality.clone()).collect();
    all.sort();
    all.dedup();
    all.sort_by_key(|locality| own != Some(&**locality));
    all
}

/// Envoy's zone-aware routing: as much of this locality's traffic stays in it as its share of the cluster carries; what
/// is left goes to localities whose share of the cluster is greater than their share of the traffic.
fn zone_routing(plan: &Cluster, zone: &LocalZone, hosts: &[Arc<Host>], set: &mut HostSet) -> Zone {
    let config = &plan.lb.zone_aware;
    let localities = in_order(hosts, Some(&zone.own));
    let force = config.force_locality_direct_routing;
    if localities.len() < 2 || zone.localities < 2 && !force {
        return Zone::Off;
    }
    if !zone.has_own {
        return Zone::NotDone(ZoneProblem::LocalClusterNotOk);
    }
    if zone.panic {
        return Zone::LocalPanic;
    }
    let mut members: HashMap<&Locality, Vec<Arc<Host>>> = HashMap::new();
    let mut total = 0;
    for host in hosts.iter().filter(|host| host.is_healthy()) {
        members
            .entry(&host.locality)
            .or_default()
            .push(host.clone());
        total += 1u64;
    }
    if total < config.min_cluster_size {
        return Zone::NotDone(ZoneProblem::ClusterTooSmall);
    }
    let proxies: u64 = zone.healthy.values().sum();
    // (share of the traffic, share of the cluster) in ten thousandths.
    let shares: Vec<(u64, u64)> = localities
        .iter()
        .map(|locality| {
            let share = |part: u64, whole: u64| (10_000 * part).checked_div(whole).unwrap_or(0);
            let there = members.get(&**locality).map_or(0, |of| of.len() as u64);
            let here = zone.healthy.get(&**locality).copied().unwrap_or(0);
            match there {
                0 => (0, 0),
                _ => (share(here, proxies), share(there, total)),
            }
        })
        .collect();
    let lists: Vec<_> = localities
        .iter()
        .map(|locality| set.list(members.remove(&**locality).unwrap_or_default()))
        .collect();
    let has_own = *localities[0] == zone.own;
    let (traffic, capacity) = shares[0];
    if has_own
        && (capacity > 0 && capacity >= traffic || force)
        && let Some(list) = lists[0]
    {
        return Zone::Direct(list);
    }
    let local = match has_own {
        true => (capacity * 10_000).checked_div(traffic).unwrap_or(0),
        false => 0,
    };
    let mut sum = 0;
    let room = shares
        .iter()
        .enumerate()
        .map(|(at, (traffic, capacity))| {
            if !(at == 0 && has_own) {
                sum += capacity.saturating_sub(*traffic);
            }
            sum
        })
        .collect();
    Zone::Residual { local, lists, room }
}
