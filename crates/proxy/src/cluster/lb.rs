//! How one worker chooses among the hosts of a cluster.

use std::{
    cell::RefCell,
    cmp::Ordering,
    collections::BinaryHeap,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use super::{
    hash::HashTable,
    host::{Host, HostList, HostSet},
};
use crate::{
    plan::{
        Cluster,
        cluster::{LbPolicy, SlowStart},
    },
    worker::Random,
};

/// Where a worker stands in each list of the current [`HostSet`].
#[derive(Debug, Default)]
pub(crate) struct Balancer {
    lists: RefCell<Vec<Option<State>>>,
}

#[derive(Debug)]
enum State {
    /// The next one of equal hosts.
    Turn(usize),
    /// Unequal hosts, the one whose turn comes first on top.
    Deadlines { heap: BinaryHeap<Entry>, now: f64 },
}

/// A host in the order of turns (earliest deadline first: a host of weight 2 comes twice as often).
#[derive(Debug, PartialEq)]
struct Entry {
    deadline: f64,
    index: usize,
}

impl Eq for Entry {}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        // A heap has its greatest on top.
        other
            .deadline
            .total_cmp(&self.deadline)
            .then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Balancer {
    /// Begins anew: the lists have changed.
    pub(crate) fn reset(&self) {
        self.lists.borrow_mut().clear();
    }

    /// A host, or `None` where none is usable. `attempt` counts picks for the same request.
    pub(crate) fn choose(
        &self,
        plan: &Cluster,
        set: &HostSet,
        hash: Option<u64>,
        attempt: u32,
        random: &Random,
    ) -> Option<Arc<Host>> {
        let percent = match hash {
            Some(hash) if attempt == 0 => (hash % 100) as u32,
            _ => random.below(100) as u32,
        };
        let at = set.list(percent, hash.unwrap_or_else(|| random.bits()))?;
        let list = &set.lists[at];
        match (&list.hosts[..], &plan.lb_policy) {
            ([], _) => None,
            ([only], _) => Some(only.clone()),
            (_, LbPolicy::RoundRobin(slow_start)) => {
                let weight = |host: &Host| f64::from(host.weight) * warm(host, slow_start.as_ref());
                Some(self.in_turn(set, at, slow_start.is_none(), weight, random))
            }
            (
                hosts,
                LbPolicy::LeastRequest {
                    choice_count,
                    slow_start,
                    ..
                },
            ) if list.equal_weights && slow_start.is_none() => {
                let draw = || &hosts[random.below(hosts.len() as u64) as usize];
                let load = |host: &Arc<Host>| host.shared.rq_active.load(Relaxed);
                let mut best = draw();
                for _ in 1..(*choice_count).max(1) {
                    let other = draw();
                    if load(other) < load(best) {
                        best = other;
                    }
                }
                Some(best.clone())
            }
            (
                _,
                LbPolicy::LeastRequest {
                    active_request_bias_ppm,
                    slow_start,
                    ..
                },
            ) => {
                let bias = f64::from(*active_request_bias_ppm) / 1e6;
                let weight = |host: &Host| {
                    let active = host.shared.rq_active.load(Relaxed) as f64 + 1.0;
                    f64::from(host.weight) * warm(host, slow_start.as_ref()) / active.powf(bias)
                };
                Some(self.in_turn(set, at, false, weight, random))
            }
            (hosts, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. }) if hash.is_some() => {
                by_hash(plan, list, hosts, hash.unwrap_or_default(), attempt)
            }
            (hosts, _) => Some(hosts[random.below(hosts.len() as u64) as usize].clone()),
        }
    }

    fn in_turn(
        &self,
        set: &HostSet,
        at: usize,
        fixed: bool,
        weight: impl Fn(&Host) -> f64,
        random: &Random,
    ) -> Arc<Host> {
        let list = &set.lists[at];
        let mut states = self.lists.borrow_mut();
        if states.len() < set.lists.len() {
            states.resize_with(set.lists.len(), || None);
        }
        // Workers begin at different places, so that they do not all load the same host.
        let state = states[at].get_or_insert_with(|| {
            if list.equal_weights && fixed {
                return State::Turn(random.below(list.hosts.len() as u64) as usize);
            }
            let heap = list
                .hosts
                .iter()
                .enumerate()
                .map(|(index, host)| {
                    let part = random.below(1 << 20) as f64 / f64::from(1 << 20);
                    Entry {
                        deadline: part / weight(host),
                        index,
                    }
                })
                .collect();
            State::Deadlines { heap, now: 0.0 }
        });
        let index = match state {
            State::Turn(next) => {
                let index = *next % list.hosts.len();
                *next = index + 1;
                index
            }
            State::Deadlines { heap, now } => match heap.pop() {
                Some(Entry { deadline, index }) => {
                    *now = deadline;
                    heap.push(Entry {
                        deadline: *now + 1.0 / weight(&list.hosts[index]),
                        index,
                    });
                    index
                }
                None => 0,
            },
        };
        list.hosts[index].clone()
    }
}

fn by_hash(
    plan: &Cluster,
    list: &HostList,
    hosts: &[Arc<Host>],
    hash: u64,
    attempt: u32,
) -> Option<Arc<Host>> {
    // A racing worker computes the same table.
    if list.table.get().is_none()
        && let Some(table) = HashTable::new(plan, hosts)
    {
        let _ = list.table.set(table);
    }
    hosts.get(list.table.get()?.choose(hash, attempt)?).cloned()
}

/// The share of its weight that a host gets while slow start lasts, between 0 and 1.
fn warm(host: &Host, slow_start: Option<&SlowStart>) -> f64 {
    let (Some(slow), Some(born)) = (slow_start, host.shared.born) else {
        return 1.0;
    };
    let part = born.elapsed().as_secs_f64() / slow.window.as_secs_f64();
    if part >= 1.0 {
        return 1.0;
    }
    let aggression = f64::from(slow.aggression_milli.max(1)) / 1000.0;
    part.max(1e-3)
        .powf(1.0 / aggression)
        .max(slow.min_weight.ratio())
}
