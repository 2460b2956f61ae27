//! How one worker chooses among the hosts of a cluster.

use std::{
    cell::RefCell,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use super::{
    LbContext, Report,
    edf::Edf,
    host::{Host, HostList, HostSet},
    shared::{ClusterShared, now_ms},
    stats::ClusterStats,
    subset::Found,
    view::{Level, Source, View, Zone, ZoneProblem},
};
use crate::{
    plan::{
        Cluster,
        lb::{LbPolicy, SlowStart},
    },
    worker::Random,
};

/// Where a worker stands in each list of the current [`HostSet`].
#[derive(Debug, Default)]
pub(crate) struct Balancer {
    lists: RefCell<Vec<Turns>>,
    /// Turns among localities.
    localities: RefCell<Vec<Option<Edf>>>,
}

/// Where a worker stands in one list.
#[derive(Debug, Default)]
struct Turns {
    /// The next one of equal hosts.
    next: Option<usize>,
    /// Unequal hosts.
    deadlines: Option<Edf>,
}

/// What a choice needs to know of the cluster.
#[derive(Clone, Copy)]
pub(super) struct Chooser<'a> {
    pub(super) plan: &'a Cluster,
    pub(super) set: &'a HostSet,
    pub(super) shared: &'a ClusterShared,
    pub(super) stats: &'a ClusterStats,
    pub(super) random: &'a Random,
    /// Tells the main thread what is known only when a table is made.
    pub(super) report: &'a dyn Fn(Report),
}

impl Balancer {
    /// Begins anew: the lists have changed.
    pub(crate) fn reset(&self) {
        self.lists.borrow_mut().clear();
        self.localities.borrow_mut().clear();
    }

    /// A host, or `None` where none is usable. `attempt` counts picks for the same request.
    pub(super) fn choose(
        &self,
        with: Chooser<'_>,
        context: &LbContext<'_>,
        attempt: u32,
    ) -> Option<Arc<Host>> {
        let set = with.set;
        match &set.subsets {
            None => self.choose_in_view(with, &set.all, context, attempt),
            Some(subsets) => subsets.choose(
                context.metadata_match,
                &set.all,
                with.stats,
                &|found| match found {
                    Found::View(view) => self.choose_in_view(with, view, context, attempt),
                    Found::Host(host) => Some(host.clone()),
                },
            ),
        }
    }

    fn choose_in_view(
        &self,
        with: Chooser<'_>,
        view: &View,
        context: &LbContext<'_>,
        attempt: u32,
    ) -> Option<Arc<Host>> {
        let hashes = with.plan.lb_policy.hashes();
        let number = match context.hash {
            Some(hash) if hashes => hash,
            _ => with.random.bits(),
        };
        let (level, degraded) = view.level(number, context.avoid_priorities)?;
        if level.load.panic {
            with.stats.lb_healthy_panic().inc();
        }
        if hashes {
            return by_hash(with, level, number, attempt);
        }
        let list = match level.load.panic {
            true if with.plan.lb.fail_traffic_on_panic => None,
            true => level.all,
            false if degraded => self.by_locality(with, &level.degraded),
            false if !level.healthy.localities.is_empty() => self.by_locality(with, &level.healthy),
            false => in_zone(with, level),
        }?;
        self.choose_in_list(with, list)
    }

    /// Localities take turns by weight, where weights count.
    fn by_locality(&self, with: Chooser<'_>, source: &Source) -> Option<usize> {
        match &source.localities[..] {
            [] => source.flat,
            [(only, _)] => Some(*only),
            localities => {
                let mut all = self.localities.borrow_mut();
                if all.len() < with.set.schedulers {
                    all.resize_with(with.set.schedulers, || None);
                }
                let weight = |index: usize| localities[index].1;
                let edf = all[source.scheduler]
                    .get_or_insert_with(|| Edf::new(localities.len(), weight, with.random));
                edf.pick(weight).map(|index| localities[index].0)
            }
        }
    }

    fn choose_in_list(&self, with: Chooser<'_>, at: usize) -> Option<Arc<Host>> {
        let list = &with.set.lists[at];
        let hosts = &list.hosts;
        let random = with.random;
        match (&hosts[..], &with.plan.lb_policy) {
            ([], _) => None,
            ([only], _) => Some(only.clone()),
            (_, LbPolicy::RoundRobin(slow_start)) => match warming(list, slow_start.as_ref()) {
                None if list.equal_weights => Some(self.in_turn(with, at)),
                slow => {
                    let weight = |host: &Host| f64::from(host.weight) * warm(host, slow);
                    self.by_deadline(with, at, weight)
                }
            },
            (
                _,
                LbPolicy::LeastRequest {
                    choice_count,
                    active_request_bias_ppm,
                    full_scan,
                    slow_start,
                },
            ) => match warming(list, slow_start.as_ref()) {
                None if list.equal_weights && *full_scan => least_of_all(hosts, random),
                None if list.equal_weights => Some(least_of(hosts, *choice_count, random)),
                slow => {
                    let bias = f64::from(*active_request_bias_ppm) / 1e6;
                    let weight = |host: &Host| {
                        let active = load(host) as f64 + 1.0;
                        let divisor = match bias {
                            1.0 => active,
                            0.0 => 1.0,
                            bias => active.powf(bias),
                        };
                        f64::from(host.weight) * warm(host, slow) / divisor
                    };
                    self.by_deadline(with, at, weight)
                }
            },
            _ => Some(any_of(hosts, random).clone()),
        }
    }

    fn in_turn(&self, with: Chooser<'_>, at: usize) -> Arc<Host> {
        let hosts = &with.set.lists[at].hosts;
        self.turns(with, at, |turns| {
            // Workers begin at different places, so that they do not all load the same host.
            let begin = || with.random.below(hosts.len() as u64) as usize;
            let index = turns.next.unwrap_or_else(begin) % hosts.len();
            turns.next = Some(index + 1);
            hosts[index].clone()
        })
    }

    fn by_deadline(
        &self,
        with: Chooser<'_>,
        at: usize,
        weight: impl Fn(&Host) -> f64,
    ) -> Option<Arc<Host>> {
        let hosts = &with.set.lists[at].hosts;
        let weight = |index: usize| weight(&hosts[index]);
        self.turns(with, at, |turns| {
            let edf = turns
                .deadlines
                .get_or_insert_with(|| Edf::new(hosts.len(), weight, with.random));
            edf.pick(weight).map(|index| hosts[index].clone())
        })
    }

    fn turns<T>(&self, with: Chooser<'_>, at: usize, then: impl FnOnce(&mut Turns) -> T) -> T {
        let mut all = self.lists.borrow_mut();
        if all.len() <= at {
            all.resize_with(with.set.lists.len(), Turns::default);
        }
        then(&mut all[at])
    }
}

fn by_hash(with: Chooser<'_>, level: &Level, hash: u64, attempt: u32) -> Option<Arc<Host>> {
    let (table, made) = level.table(with.plan, with.set);
    let table = table?;
    if made {
        (with.report)(Report::HashTable {
            cluster: with.plan.name.clone(),
            size: table.size(),
            entries_per_host: table.entries_per_host,
        });
    }
    let host = match with.plan.lb.hash_balance_factor {
        Some(factor) if factor > 0 => {
            let breakers = &with.shared.breakers;
            let active = breakers
                .iter()
                .map(|breaker| u64::from(breaker.requests.count()));
            table.choose_bounded(hash, attempt, factor, active.sum())
        }
        _ => table.choose(hash, attempt),
    };
    host.cloned()
}

/// The healthy hosts of this proxy's own locality or of another, where zone-aware routing is done; else all.
fn in_zone(with: Chooser<'_>, level: &Level) -> Option<usize> {
    let (stats, random) = (with.stats, with.random);
    let all = level.healthy.flat;
    if matches!(level.zone, Zone::Off | Zone::NotDone(_))
        || !with.plan.lb.zone_aware.routing_enabled.hits(random.bits())
    {
        return all;
    }
    match &level.zone {
        Zone::LocalPanic => {
            stats.lb_local_cluster_not_ok().inc();
            all.filter(|_| !with.plan.lb.fail_traffic_on_panic)
        }
        Zone::Direct(list) => {
            stats.lb_zone_routing_all_directly().inc();
            Some(*list)
        }
        Zone::Residual { local, lists, room } => {
            if random.below(10_000) < *local {
                stats.lb_zone_routing_sampled().inc();
                return lists[0];
            }
            stats.lb_zone_routing_cross_zone().inc();
            match room.last() {
                None | Some(0) => {
                    stats.lb_zone_no_capacity_left().inc();
                    lists[random.below(lists.len() as u64) as usize].or(all)
                }
                Some(whole) => {
                    let point = random.below(*whole);
                    lists[room.partition_point(|sum| *sum <= point)]
                }
            }
        }
        Zone::Off | Zone::NotDone(_) => all,
    }
}

/// Counts why the zones of a new set of hosts are not looked at.
pub(super) fn count_zones(set: &HostSet, stats: &ClusterStats) {
    let Some(level) = set.all.levels.first() else {
        return;
    };
    match level.zone {
        Zone::Off => return,
        Zone::NotDone(ZoneProblem::LocalClusterNotOk) => stats.lb_local_cluster_not_ok().inc(),
        Zone::NotDone(ZoneProblem::ClusterTooSmall) => stats.lb_zone_cluster_too_small().inc(),
        _ => {}
    }
    stats.lb_recalculate_zone_structures().inc();
}

fn any_of<'a>(hosts: &'a [Arc<Host>], random: &Random) -> &'a Arc<Host> {
    &hosts[random.below(hosts.len() as u64) as usize]
}

fn load(host: &Host) -> u64 {
    host.shared.rq_active.load(Relaxed)
}

fn least_of(hosts: &[Arc<Host>], choice_count: u32, random: &Random) -> Arc<Host> {
    let mut best = any_of(hosts, random);
    for _ in 1..choice_count {
        let other = any_of(hosts, random);
        if load(other) < load(best) {
            best = other;
        }
    }
    best.clone()
}

/// Any of those with the fewest requests.
fn least_of_all(hosts: &[Arc<Host>], random: &Random) -> Option<Arc<Host>> {
    let (mut best, mut ties) = (None::<(u64, &Arc<Host>)>, 0);
    for host in hosts {
        let load = load(host);
        match best {
            Some((least, _)) if load > least => continue,
            Some((least, _)) if load == least => ties += 1,
            _ => ties = 1,
        }
        if ties == 1 || random.below(ties) == 0 {
            best = Some((load, host));
        }
    }
    best.map(|(_, host)| host.clone())
}

/// The slow start that some host of the list is still in.
fn warming<'a>(list: &HostList, slow_start: Option<&'a SlowStart>) -> Option<&'a SlowStart> {
    slow_start.filter(|slow| {
        list.newest > 0
            && u128::from(now_ms().saturating_sub(list.newest)) <= slow.window.as_millis()
    })
}

/// The share of its weight that a host gets while slow start lasts, between 0 and 1.
fn warm(host: &Host, slow_start: Option<&SlowStart>) -> f64 {
    let since = host.shared.healthy_since.load(Relaxed);
    match slow_start {
        Some(slow) if since > 0 => warmth(slow, now_ms().saturating_sub(since)),
        _ => 1.0,
    }
}

/// Envoy's factor: `max((time / window) ^ (1 / aggression), min_weight)`.
fn warmth(slow: &SlowStart, age_ms: u64) -> f64 {
    let window = slow.window.as_millis() as f64;
    let part = age_ms.max(1) as f64 / window;
    if part >= 1.0 {
        return 1.0;
    }
    let aggression = f64::from(slow.aggression_milli) / 1000.0;
    part.powf(1.0 / aggression).max(slow.min_weight.ratio())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plan::matcher::Percent;

    #[test]
    fn a_new_host_s_share_grows_as_envoy_s_documentation_draws_it() {
        let slow = |aggression_milli| SlowStart {
            window: Duration::from_secs(60),
            aggression_milli,
            min_weight: Percent::whole(10),
        };
        for (aggression, age, want) in [
            (1000, 0, 0.1),
            (1000, 6_000, 0.1),
            (1000, 30_000, 0.5),
            (1000, 60_000, 1.0),
            (2000, 15_000, 0.5),
            (500, 30_000, 0.25),
            (500, 1_000, 0.1),
        ] {
            let found = warmth(&slow(aggression), age);
            assert!((found - want).abs() < 1e-9, "{aggression} {age}: {found}");
        }
    }

    #[test]
    fn a_full_scan_finds_the_least_loaded() {
        use crate::cluster::tests::host;
        let hosts: Vec<_> = (0..9).map(host).collect();
        for (index, host) in hosts.iter().enumerate() {
            let load = if index % 4 == 2 { 1 } else { 5 };
            host.shared.rq_active.store(load, Relaxed);
        }
        let random = Random::seeded(1);
        let mut chosen: Vec<_> = (0..100)
            .filter_map(|_| least_of_all(&hosts, &random))
            .map(|host| host.address.port())
            .collect();
        chosen.sort();
        chosen.dedup();
        assert_eq!(chosen, [Some(2), Some(6)]);
    }
}
