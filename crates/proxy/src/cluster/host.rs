//! Hosts of a cluster, sorted for choosing: immutable, made on the main thread, shared by all workers.
//!
//! A change of endpoints makes a new [`HostSet`]. What has to outlive it (counts, pools, ejection) hangs on the host's
//! [`HostShared`], which stays the same as long as the address does.

use std::sync::{Arc, OnceLock, atomic::Ordering::Relaxed};

use super::{hash::HashTable, shared::HostShared};
use crate::plan::{
    Address, Cluster, Metadata,
    cluster::UpstreamTransport,
    endpoint::{HealthStatus, Locality},
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
}

impl Host {
    /// Whether new requests may go there while others suffice.
    pub fn is_healthy(&self) -> bool {
        self.health.is_healthy() && !self.shared.ejected.load(Relaxed)
    }

    pub(crate) fn is_degraded(&self) -> bool {
        self.health == HealthStatus::Degraded && !self.shared.ejected.load(Relaxed)
    }
}

/// The hosts of a cluster at one time.
#[derive(Debug, Default)]
pub struct HostSet {
    hosts: Vec<Arc<Host>>,
    pub(crate) lists: Vec<HostList>,
    pub(crate) levels: Vec<Level>,
}

/// Hosts that one choice is made among.
#[derive(Debug)]
pub(crate) struct HostList {
    pub(crate) hosts: Vec<Arc<Host>>,
    pub(crate) equal_weights: bool,
    /// Ring or table for choices by hash, made at the first such choice.
    pub(crate) table: OnceLock<HashTable>,
}

/// One priority.
#[derive(Debug, Default)]
pub(crate) struct Level {
    /// Share of the traffic in percent that goes to healthy hosts of this priority.
    pub(crate) healthy_load: u32,
    /// Share that goes to degraded ones.
    pub(crate) degraded_load: u32,
    /// Lists with their weights.
    pub(crate) healthy: Vec<(usize, u64)>,
    pub(crate) degraded: Vec<(usize, u64)>,
    /// Every host, for panic.
    pub(crate) all: Option<usize>,
    pub(crate) panic: bool,
}

impl HostSet {
    /// Sorts hosts by priority, locality and health. `localities` gives the weight of each (priority, locality) where
    /// localities are chosen by weight.
    pub fn new(
        plan: &Cluster,
        hosts: Vec<Arc<Host>>,
        overprovisioning: u32,
        localities: &[(u32, Arc<Locality>, u32)],
    ) -> Self {
        let mut set = Self {
            hosts,
            ..Self::default()
        };
        let last = set.hosts.iter().map(|host| host.priority).max();
        let mut health = Vec::new();
        for priority in 0..last.map_or(0, |last| last + 1) {
            let of: Vec<_> = set
                .hosts
                .iter()
                .filter(|host| host.priority == priority)
                .cloned()
                .collect();
            let healthy = of.iter().filter(|host| host.is_healthy()).count() as u32;
            let degraded = of.iter().filter(|host| host.is_degraded()).count() as u32;
            let total = (of.len() as u32).max(1);
            health.push((
                (overprovisioning * healthy / total).min(100),
                (overprovisioning * degraded / total).min(100),
                100.0 * f64::from(healthy + degraded) / f64::from(total),
            ));
            let mut level = Level::default();
            let groups: Vec<_> = localities
                .iter()
                .filter(|entry| entry.0 == priority)
                .collect();
            if plan.lb.locality_weighted && !groups.is_empty() {
                for (_, locality, weight) in groups {
                    let members: Vec<_> = of
                        .iter()
                        .filter(|host| host.locality == *locality)
                        .cloned()
                        .collect();
                    for (degraded, choices) in
                        [(false, &mut level.healthy), (true, &mut level.degraded)]
                    {
                        let usable: Vec<_> = members
                            .iter()
                            .filter(|host| usable(host, degraded))
                            .cloned()
                            .collect();
                        // A locality that has lost hosts counts for less, as a priority does.
                        let share = (overprovisioning as usize * usable.len()
                            / members.len().max(1))
                        .min(100) as u64;
                        let weight = u64::from(*weight) * share;
                        if weight > 0 {
                            choices.push((set.lists.len(), weight));
                            set.lists.push(HostList::new(usable));
                        }
                    }
                }
            } else {
                for (degraded, choices) in
                    [(false, &mut level.healthy), (true, &mut level.degraded)]
                {
                    let usable: Vec<_> = of
                        .iter()
                        .filter(|host| usable(host, degraded))
                        .cloned()
                        .collect();
                    if !usable.is_empty() {
                        choices.push((set.lists.len(), 1));
                        set.lists.push(HostList::new(usable));
                    }
                }
            }
            if !of.is_empty() {
                level.all = Some(set.lists.len());
                set.lists.push(HostList::new(of));
            }
            set.levels.push(level);
        }
        set.spread(plan, &health);
        set
    }

    /// How much traffic each priority takes (Envoy: health times 140 %, lower priorities take what is missing).
    fn spread(&mut self, plan: &Cluster, health: &[(u32, u32, f64)]) {
        let total = health
            .iter()
            .map(|(healthy, degraded, _)| healthy + degraded)
            .sum::<u32>()
            .min(100);
        let threshold = plan.lb.healthy_panic_threshold.ratio() * 100.0;
        if total == 0 {
            // Nobody is healthy: panic, if allowed, among all hosts of the first priority that has any.
            if let Some(level) = self.levels.iter_mut().find(|level| level.all.is_some()) {
                level.healthy_load = 100;
                level.panic = threshold > 0.0 && !plan.lb.fail_traffic_on_panic;
            }
            return;
        }
        let mut left = 100;
        for (level, (healthy, _, _)) in self.levels.iter_mut().zip(health) {
            level.healthy_load = (healthy * 100 / total).min(left);
            left -= level.healthy_load;
        }
        for (level, (_, degraded, _)) in self.levels.iter_mut().zip(health) {
            level.degraded_load = (degraded * 100 / total).min(left);
            left -= level.degraded_load;
        }
        // What rounding left over goes to the first priority that takes anything.
        if let Some(level) = self.levels.iter_mut().find(|level| level.healthy_load > 0) {
            level.healthy_load += left;
        } else if let Some(level) = self.levels.iter_mut().find(|level| level.degraded_load > 0) {
            level.degraded_load += left;
        }
        if total < 100 && !plan.lb.fail_traffic_on_panic {
            for (level, (_, _, percent)) in self.levels.iter_mut().zip(health) {
                level.panic = *percent < threshold;
            }
        }
    }

    /// Every host, usable or not.
    pub fn hosts(&self) -> &[Arc<Host>] {
        &self.hosts
    }

    /// How many hosts are healthy.
    pub fn healthy(&self) -> usize {
        self.hosts.iter().filter(|host| host.is_healthy()).count()
    }

    /// The list that a number between 0 and 99 (for the priority) and a random one (for the locality) lead to.
    pub(crate) fn list(&self, mut percent: u32, random: u64) -> Option<usize> {
        for level in &self.levels {
            if percent < level.healthy_load {
                return level.choose(&level.healthy, random);
            }
            percent -= level.healthy_load;
        }
        for level in &self.levels {
            if percent < level.degraded_load {
                return level.choose(&level.degraded, random);
            }
            percent -= level.degraded_load;
        }
        None
    }
}

impl Level {
    fn choose(&self, choices: &[(usize, u64)], random: u64) -> Option<usize> {
        if self.panic {
            return self.all;
        }
        match choices {
            [] => None,
            [(only, _)] => Some(*only),
            _ => {
                let mut point = random % choices.iter().map(|choice| choice.1).sum::<u64>();
                for (list, weight) in choices {
                    if point < *weight {
                        return Some(*list);
                    }
                    point -= weight;
                }
                None
            }
        }
    }
}

impl HostList {
    fn new(hosts: Vec<Arc<Host>>) -> Self {
        let equal_weights = hosts
            .windows(2)
            .all(|pair| pair[0].weight == pair[1].weight);
        Self {
            hosts,
            equal_weights,
            table: OnceLock::new(),
        }
    }
}

fn usable(host: &Host, degraded: bool) -> bool {
    if degraded {
        host.is_degraded()
    } else {
        host.is_healthy()
    }
}
