//! Listeners of one worker: accepting, looking at the first bytes, finding the chain.
//!
//! A connection's way: [`accept`] → listener filters ([`filters`]) → hand-off to the listener of its original destination →
//! that listener's filters → filter chain ([`chain`]) → network filters (`network/`).
//!
//! A listener is known by its name. An update keeps the sockets, and keeps the connections of each chain that did not
//! change; the others drain, but those that a new policy denies end at once ([`newer`]).

mod accept;
mod chain;
mod connection;
mod draining;
mod filters;
mod http_inspector;
mod newer;
mod proxy_protocol;
mod stats;

use std::{
    cell::RefCell,
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use tokio::task::AbortHandle;

pub(crate) use accept::{ListenSocket, handed_over};
pub(crate) use chain::LiveChain;
pub use connection::{Connection, ConnectionInfo, ProxyData, UpstreamSource};
pub use draining::Drains;

use crate::{
    access_log::Logger,
    cluster::shared::Tally,
    plan::{Address, Listener, listener::TrafficDirection},
    worker::{
        Worker,
        drain::{Drain, DrainStrategy, Drainer},
    },
};
use draining::{Draining, Former};
use stats::{ListenerStats, WorkerStats};

/// The listeners of a worker.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    by_name: RefCell<HashMap<Arc<str>, Rc<Slot>>>,
    /// Where connections are handed over to.
    by_address: RefCell<HashMap<SocketAddr, Rc<Slot>>>,
    /// Chains that drain since they were replaced or removed.
    former: RefCell<Vec<Weak<LiveChain>>>,
    /// For connections that have no chain yet: moved by the end of the process alone.
    end: Drainer,
}

/// A place that a listener's versions pass through.
#[derive(Debug)]
pub(crate) struct Slot {
    current: RefCell<Rc<LiveListener>>,
    accepting: RefCell<Vec<AbortHandle>>,
}

impl Slot {
    pub(crate) fn current(&self) -> Rc<LiveListener> {
        self.current.borrow().clone()
    }

    fn stop_accepting(&self) {
        self.accepting
            .borrow_mut()
            .drain(..)
            .for_each(|task| task.abort());
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.stop_accepting();
    }
}

/// One version of a listener.
#[derive(Debug)]
pub(crate) struct LiveListener {
    pub(crate) plan: Arc<Listener>,
    pub(crate) stats: Rc<ListenerStats>,
    own_stats: Rc<WorkerStats>,
    /// Logs of its connections as a whole.
    pub(crate) logs: Rc<[Logger]>,
    /// How many connections it may have, and has, over all workers.
    pub(crate) limit: Option<(u32, Arc<Tally>)>,
    /// By the address of the chain's plan: the plan's matching gives us its own `Arc`.
    chains: HashMap<usize, Rc<LiveChain>, foldhash::fast::RandomState>,
}

impl LiveListener {
    fn new(plan: Arc<Listener>, old: Option<&Self>, worker: &Worker) -> Self {
        let (stats, own_stats) = match old {
            Some(old) if stat_name(&old.plan) == stat_name(&plan) => {
                (old.stats.clone(), old.own_stats.clone())
            }
            _ => {
                let name = stat_name(&plan);
                let scope = |name: &str| worker.stats.scope(name);
                let own = format!("listener.{name}.worker_{}.", worker.index);
                (
                    Rc::new(ListenerStats::new(scope(&format!("listener.{name}.")))),
                    Rc::new(WorkerStats::new(scope(&own))),
                )
            }
        };
        // Chains live on only where nothing around them changed.
        let old = old.filter(|old| same_but_chains(&old.plan, &plan));
        let mut chains = HashMap::default();
        for chain in plan.filter_chains.iter().chain(&plan.default_filter_chain) {
            let kept = old.and_then(|old| {
                old.chains
                    .values()
                    .find(|live| live.plan == *chain)
                    .cloned()
            });
            let live = kept.unwrap_or_else(|| Rc::new(LiveChain::new(chain.clone())));
            chains.insert(Arc::as_ptr(chain) as usize, live);
        }
        let logs = Logger::all(&plan.access_logs, worker).into();
        let key = format!(
            "envoy.resource_limits.listener.{}.connection_limit",
            plan.name
        );
        let limit = worker.bootstrap.runtime_number(&key).map(|limit| {
            let limit = u32::try_from(limit).unwrap_or(u32::MAX);
            (limit, worker.shared.limits.of_listener(&plan.name))
        });
        Self {
            plan,
            stats,
            own_stats,
            chains,
            logs,
            limit,
        }
    }

    /// Drains the chains that a newer version has not taken over, and gives them.
    fn drain(&self, newer: Option<&Self>, worker: &Worker) -> Vec<Weak<LiveChain>> {
        let drains = &worker.shared.drains;
        let by_chain = newer.is_some_and(|new| same_but_chains(&self.plan, &new.plan));
        let whole = Former::Listener(self.plan.clone());
        let whole = (!by_chain).then(|| Rc::new(Draining::new(whole, drains)));
        let taken_over = |chain: &&Rc<LiveChain>| {
            newer.is_some_and(|new| new.chains.values().any(|live| Rc::ptr_eq(live, chain)))
        };
        let former = self.chains.values().filter(|chain| !taken_over(chain));
        former
            .map(|chain| {
                let counted = whole.clone().unwrap_or_else(|| {
                    let plan = Former::Chain(chain.plan.clone());
                    Rc::new(Draining::new(plan, drains))
                });
                let (over, strategy) = (worker.options.drain_time, worker.options.drain_strategy);
                chain.clone().retire(over, strategy, counted);
                Rc::downgrade(chain)
            })
            .collect()
    }
}

impl Listeners {
    /// A new listener, or a new version of one. `sockets` replaces those it has; `None` keeps them.
    pub(crate) fn upsert(
        &self,
        plan: Arc<Listener>,
        sockets: Option<Vec<ListenSocket>>,
        worker: &Rc<Worker>,
    ) {
        let slot = self.by_name.borrow().get(&plan.name).cloned();
        let slot = match slot {
            Some(slot) => {
                let old = slot.current();
                let new = Rc::new(LiveListener::new(plan.clone(), Some(&old), worker));
                self.note_former(old.drain(Some(&new), worker));
                *slot.current.borrow_mut() = new;
                self.forget_addresses(&slot);
                slot
            }
            None => {
                let live = Rc::new(LiveListener::new(plan.clone(), None, worker));
                let slot = Rc::new(Slot {
                    current: live.into(),
                    accepting: RefCell::default(),
                });
                self.by_name
                    .borrow_mut()
                    .insert(plan.name.clone(), slot.clone());
                slot
            }
        };
        if self.end.drain().is_ending() {
            let live = slot.current();
            live.chains.values().for_each(|chain| chain.drainer.end());
        }
        for address in std::iter::once(&plan.address).chain(&plan.additional_addresses) {
            if let Address::Socket(address) = address {
                self.by_address.borrow_mut().insert(*address, slot.clone());
            }
        }
        if let Some(sockets) = sockets {
            slot.stop_accepting();
            for socket in sockets {
                let task = accept::spawn(socket, Rc::downgrade(&slot), worker.clone());
                slot.accepting.borrow_mut().push(task);
            }
        }
    }

    /// The listener is gone: no more connections, and those that it has drain.
    pub(crate) fn remove(&self, name: &str, worker: &Worker) {
        let slot = self.by_name.borrow_mut().remove(name);
        if let Some(slot) = slot {
            slot.stop_accepting();
            self.forget_addresses(&slot);
            self.note_former(slot.current().drain(None, worker));
        }
    }

    /// Drains the listeners that the choice takes. Sockets stay open until [`Listeners::stop_accepting`].
    pub(crate) fn drain(&self, inbound_only: bool, over: Duration, strategy: DrainStrategy) {
        for slot in self.chosen(inbound_only) {
            for chain in slot.current().chains.values() {
                chain.drainer.begin(over, strategy);
            }
        }
    }

    /// The process is about to end: all that is open says so to its peer. Sockets stay open.
    pub(crate) fn end(&self) {
        self.end.end();
        self.each_chain(|chain| chain.drainer.end());
    }

    /// What tells a connection without a chain that the process ends.
    pub(crate) fn ending(&self) -> Drain {
        self.end.drain()
    }

    /// Closes listening sockets. Connections stay.
    pub(crate) fn stop_accepting(&self, inbound_only: bool) {
        self.chosen(inbound_only)
            .iter()
            .for_each(|slot| slot.stop_accepting());
    }

    /// Orders every connection to close.
    pub(crate) fn close_all(&self) {
        self.each_chain(|chain| chain.drainer.close());
    }

    /// Completes when no connection is left. Can be dropped at any time.
    pub(crate) async fn released(&self) {
        let mut all = Vec::new();
        self.each_chain(|chain| all.push(chain.clone()));
        for chain in all {
            chain.drainer.released().await;
        }
    }

    pub(crate) fn find(&self, name: &str) -> Option<Rc<Slot>> {
        self.by_name.borrow().get(name).cloned()
    }

    /// The listener for a restored destination: of this very address, else of any address with this port.
    pub(crate) fn for_destination(&self, destination: SocketAddr) -> Option<Rc<LiveListener>> {
        let by_address = self.by_address.borrow();
        let any: IpAddr = match destination {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let port = destination.port();
        let wildcards = [
            SocketAddr::new(any, port),
            (Ipv6Addr::UNSPECIFIED, port).into(),
        ];
        std::iter::once(&destination)
            .chain(&wildcards)
            .find_map(|address| by_address.get(address))
            .map(|slot| slot.current())
    }

    fn chosen(&self, inbound_only: bool) -> Vec<Rc<Slot>> {
        let takes = |slot: &&Rc<Slot>| {
            !inbound_only
                || slot.current.borrow().plan.traffic_direction == TrafficDirection::Inbound
        };
        self.by_name
            .borrow()
            .values()
            .filter(takes)
            .cloned()
            .collect()
    }

    fn each_chain(&self, mut tell: impl FnMut(&Rc<LiveChain>)) {
        for slot in self.chosen(false) {
            slot.current().chains.values().for_each(&mut tell);
        }
        let former = self.former.borrow();
        former
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|c| tell(&c));
    }

    fn note_former(&self, chains: Vec<Weak<LiveChain>>) {
        let mut former = self.former.borrow_mut();
        former.retain(|chain| chain.strong_count() > 0);
        former.extend(chains);
    }

    fn forget_addresses(&self, slot: &Rc<Slot>) {
        self.by_address
            .borrow_mut()
            .retain(|_, other| !Rc::ptr_eq(other, slot));
    }
}

/// The name in `listener.<NAME>.` stats: the prefix, or the address without colons.
fn stat_name(plan: &Listener) -> String {
    match &plan.stat_prefix {
        Some(prefix) => prefix.to_string(),
        None => plan.address.to_string().replace(':', "_"),
    }
}

/// Whether two versions differ at most in their chains.
fn same_but_chains(old: &Listener, new: &Listener) -> bool {
    let bare = |plan: &Listener| {
        let mut plan = plan.clone();
        plan.filter_chains.clear();
        plan.default_filter_chain = None;
        plan.chain_table = Default::default();
        plan
    };
    bare(old) == bare(new)
}
