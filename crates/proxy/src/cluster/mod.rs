//! Clusters: groups of hosts, how one of them is chosen, and the connections to it.
//!
//! The main thread owns the truth ([`registry`]): plans, hosts, names to resolve, hosts put aside. A worker gets each change
//! as a shared [`ClusterEntry`]; it makes a [`Cluster`] of its own (pools, cursors, stats) when the first request asks
//! for it. What workers share while requests run stands in [`shared`].
//!
//! A request's way: [`Clusters::find`] → [`Cluster::choose`] → [`Cluster::http1`] or [`Cluster::http2`] →
//! [`Http1::release`], with [`Cluster::report`] telling how it went.

mod aggregate;
mod auto;
mod codes;
mod connect;
mod dns;
mod edf;
mod entry;
mod error;
mod hash;
pub(crate) mod health;
mod host;
mod http2;
mod lb;
mod mt19937;
pub(crate) mod outlier;
mod pool;
mod priority;
mod race;
pub mod registry;
mod report;
mod rest;
pub mod shared;
mod stats;
mod subset;
mod view;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, Mutex, Weak as ArcWeak, atomic::Ordering::Relaxed},
    time::Duration,
};

pub use connect::Established;
pub(crate) use dns::Names;
pub use entry::ClusterEntry;
pub use error::UpstreamError;
pub use hash::xxh64 as shared_hash;
pub use host::{Host, HostSet};
pub use http2::Http2;
pub use pool::{Http1, RequestGuard, UpstreamAccount};
pub use stats::ClusterStats;

pub use crate::transport::AutoName;
use codes::Codes;
use connect::connect;
pub(crate) use connect::{Upstream, open};
use lb::{Balancer, Chooser};
use outlier::Ejection;
pub use outlier::Rates;
use pool::{Acquire, Pending, Pools};
use serde_json::Value;
use shared::{BreakerShared, ClusterShared, HostShared, Permit, ProcessShared};
use subset::Subsets;
use tokio::sync::{Notify, mpsc};

use crate::{
    io::Stream,
    listener::{ConnectionInfo, UpstreamSource},
    plan::{
        Address, Cluster as Plan,
        cluster::{Discovery, Thresholds, UpstreamProtocol, UpstreamTransport},
        endpoint::HealthStatus,
    },
    transport::Upstreams,
    worker::Random,
};

/// Routing priority of a request: it chooses the limits that apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// The usual one.
    #[default]
    Default,
    /// `priority: HIGH` on the route.
    High,
}

/// What choosing a host may depend on.
#[derive(Clone, Copy, Debug, Default)]
pub struct LbContext<'a> {
    /// From the route's hash policy.
    pub hash: Option<u64>,
    /// Where the client wanted to go: the restored destination of the connection, or what a request header says.
    pub original_dst: Option<SocketAddr>,
    /// Hosts that were tried for this request already and should be avoided where others are left.
    pub avoid: &'a [Arc<Host>],
    /// Priorities that were tried and should be avoided where others can serve: a bit for each.
    pub avoid_priorities: u64,
    /// Hosts that will not do for another reason, where others are left.
    pub omit: Option<&'a dyn Omit>,
    /// How often to look for another one. Envoy's default: 1, with Istio's predicate 5.
    pub avoid_attempts: u32,
    /// A connection that rests will not do: one has just turned out dead.
    pub fresh: bool,
    /// Which limits apply.
    pub priority: Priority,
    /// The downstream connection, for clusters that keep a pool for each.
    pub downstream_connection: u64,
    /// What is known about it: what a PROXY header tells.
    pub downstream: Option<&'a ConnectionInfo>,
    /// Address that the upstream connection has to come from, before any that the cluster names.
    pub source: Option<UpstreamSource>,
    /// Protocols to offer in TLS instead of the cluster's (`istio.alpn`).
    pub alpn: Option<&'a [Arc<str>]>,
    /// The server name that the request chooses (`auto_sni`).
    pub auto_name: Option<AutoName<'a>>,
    /// What the `envoy.lb` metadata of the host must hold (`metadata_match` of the route), for subsets.
    pub metadata_match: Option<&'a BTreeMap<String, Value>>,
    /// The host that a session names, before all others.
    pub override_host: Option<OverrideHost<'a>>,
    /// Hosts that the request names for the `override_host` policy, and how many of them earlier attempts had.
    pub preferred: (&'a [SocketAddr], usize),
}

/// A host that a session names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverrideHost<'a> {
    /// `address:port`.
    pub address: &'a str,
    /// No other host will do.
    pub strict: bool,
}

/// Tells hosts that should be avoided.
pub trait Omit: std::fmt::Debug {
    /// Whether this is one.
    fn omits(&self, host: &Host) -> bool;
}

/// Hosts of an ORIGINAL_DST cluster, shared by the workers so that counts and limits are one.
pub(crate) type OnDemand = Mutex<HashMap<SocketAddr, ArcWeak<HostShared>>>;

/// How a request to a host went, for outlier detection and the host's counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered with this status; for gRPC the status that the gRPC code stands for.
    Status(u16),
    /// No connection.
    ConnectFailed,
    /// The connection or the stream broke before the answer was complete.
    Reset,
    /// No answer in time.
    Timeout,
    /// A connection that is all there is to tell (TCP).
    Connected,
}

/// What a worker tells the main thread.
#[derive(Debug)]
pub(crate) enum Report {
    /// A host has failed as often in a row as its cluster allows.
    Failing {
        /// The cluster.
        cluster: Arc<str>,
        /// The host.
        host: u64,
        /// Which count was reached.
        reason: Ejection,
    },
    /// A ring or a table was made.
    HashTable {
        /// The cluster.
        cluster: Arc<str>,
        /// Points or slots.
        size: u64,
        /// Of the host that has fewest and of the one that has most.
        entries_per_host: (u64, u64),
    },
    /// A host has told that it is to be used last (`x-envoy-degraded`).
    Degraded {
        /// The cluster.
        cluster: Arc<str>,
        /// The host.
        host: u64,
    },
    /// A host has told that it wants no traffic (`x-envoy-immediate-health-check-fail`).
    ImmediateFail {
        /// The cluster.
        cluster: Arc<str>,
        /// The host.
        host: u64,
    },
}

/// The clusters of one worker.
#[derive(Debug)]
pub struct Clusters {
    slots: RefCell<HashMap<Arc<str>, Slot, foldhash::fast::RandomState>>,
    stats: ::stats::Stats,
    random: Rc<Random>,
    reports: mpsc::UnboundedSender<Report>,
    shared: Arc<ProcessShared>,
}

#[derive(Debug)]
enum Slot {
    /// Nobody has asked for it.
    Cold(Arc<ClusterEntry>),
    Live(Rc<Cluster>),
}

impl Clusters {
    pub(crate) fn new(
        stats: ::stats::Stats,
        random: Rc<Random>,
        reports: mpsc::UnboundedSender<Report>,
        shared: Arc<ProcessShared>,
    ) -> Self {
        Self {
            slots: RefCell::default(),
            stats,
            random,
            reports,
            shared,
        }
    }

    /// The cluster of this name, brought to life where this is its first request; `None` where there is none (flag NC).
    ///
    /// Of an aggregate it is the cluster among its own that this request goes to.
    pub fn find(&self, name: &str) -> Option<Rc<Cluster>> {
        let cluster = self.live(name)?;
        match &cluster.plan.discovery {
            Discovery::Aggregate(names) => aggregate::choose(self, &cluster, names, &self.random),
            _ => Some(cluster),
        }
    }

    /// The cluster of exactly this name.
    fn live(&self, name: &str) -> Option<Rc<Cluster>> {
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(name)?;
        match slot {
            Slot::Live(cluster) => Some(cluster.clone()),
            Slot::Cold(entry) => {
                let cluster = Rc::new(Cluster::new(entry, self));
                *slot = Slot::Live(cluster.clone());
                Some(cluster)
            }
        }
    }

    /// Whether there is a cluster of this name; does not bring it to life.
    pub fn contains(&self, name: &str) -> bool {
        self.slots.borrow().contains_key(name)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.borrow().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A new or changed cluster. One whose plan is the same keeps its pools.
    pub(crate) fn upsert(&self, entry: Arc<ClusterEntry>) {
        let mut slots = self.slots.borrow_mut();
        if let Some(Slot::Live(live)) = slots.get(&entry.plan.name)
            && *live.plan == *entry.plan.plan()
        {
            live.set_hosts(entry.hosts().clone());
            return;
        }
        slots.insert(entry.plan.name.clone(), Slot::Cold(entry));
    }

    /// Hosts that have just become bad: requests that come find new connections, if any at all.
    pub(crate) fn hosts_failed(&self, cluster: &str, failed: &[u64]) {
        if let Some(Slot::Live(live)) = self.slots.borrow().get(cluster) {
            live.pools.retain(|id| !failed.contains(&id));
            live.failures.notify_waiters();
        }
    }

    /// New hosts of a cluster.
    pub(crate) fn set_hosts(&self, entry: Arc<ClusterEntry>) {
        match self.slots.borrow_mut().get_mut(&entry.plan.name) {
            Some(Slot::Live(live)) => live.set_hosts(entry.hosts().clone()),
            Some(cold) => *cold = Slot::Cold(entry),
            // Removed in the meantime.
            None => {}
        }
    }

    /// The cluster is gone: its idle connections close, requests under way go on.
    pub(crate) fn remove(&self, name: &str) {
        if let Some(Slot::Live(cluster)) = self.slots.borrow_mut().remove(name) {
            cluster.pools.retain(|_| false);
        }
    }

    /// Closes idle connections that are over; called about once a second.
    pub(crate) fn sweep(&self) {
        let live: Vec<_> = self
            .slots
            .borrow()
            .values()
            .filter_map(|slot| match slot {
                Slot::Live(cluster) => Some(cluster.clone()),
                Slot::Cold(_) => None,
            })
            .collect();
        for cluster in live {
            cluster.pools.sweep(&cluster.plan, &cluster.stats);
            cluster.forget_unused();
        }
    }
}

/// The plan of a cluster, counted for one worker alone: each request keeps it twice, which would else be exclusive access
/// to memory that all workers write.
pub type LocalPlan = Rc<Arc<Plan>>;

/// A cluster as one worker sees it.
#[derive(Debug)]
pub struct Cluster {
    /// What the configuration says.
    pub plan: LocalPlan,
    hosts: RefCell<Arc<HostSet>>,
    shared: Arc<ClusterShared>,
    on_demand_hosts: RefCell<HashMap<SocketAddr, Arc<Host>>>,
    stats: Rc<ClusterStats>,
    codes: Codes,
    balancer: Balancer,
    pools: Pools,
    tls: Rc<Upstreams>,
    random: Rc<Random>,
    reports: mpsc::UnboundedSender<Report>,
    /// Some host has just become bad.
    failures: Notify,
    /// How many percent of the requests are refused.
    maintenance: u64,
}

impl Cluster {
    fn new(entry: &ClusterEntry, clusters: &Clusters) -> Self {
        let scope = clusters
            .stats
            .scope(&format!("cluster.{}.", entry.plan.stat_name()));
        entry.shared().touched.store(true, Relaxed);
        let cluster = Self {
            plan: Rc::new(entry.plan.plan().clone()),
            tls: Rc::new(Upstreams::new(clusters.shared.clone(), &scope)),
            hosts: RefCell::default(),
            shared: entry.shared().clone(),
            on_demand_hosts: RefCell::default(),
            stats: Rc::new(ClusterStats::new(scope)),
            codes: Codes::default(),
            balancer: Balancer::default(),
            pools: Pools::default(),
            random: clusters.random.clone(),
            reports: clusters.reports.clone(),
            failures: Notify::new(),
            maintenance: {
                let all = &clusters.shared.maintenance;
                all.get(&*entry.plan.plan().name).copied().unwrap_or(0)
            },
        };
        cluster.set_hosts(entry.hosts().clone());
        cluster
    }

    /// Its counts.
    pub fn stats(&self) -> &Rc<ClusterStats> {
        &self.stats
    }

    /// Its hosts as they are now.
    pub fn hosts(&self) -> Arc<HostSet> {
        self.hosts.borrow().clone()
    }

    /// Whether a request goes out as HTTP/2.
    pub fn speaks_http2(&self, downstream_is_http2: bool) -> bool {
        match self.plan.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::Downstream { .. } => downstream_is_http2,
            // ALPN is a matter of TLS; in clear Envoy speaks HTTP/1.
            UpstreamProtocol::Alpn => false,
        }
    }

    /// Whether a request to this host goes out as HTTP/2; finds it out where ALPN decides.
    ///
    /// Can be dropped at any time.
    pub async fn negotiate_http2(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
        downstream_is_http2: bool,
    ) -> Result<bool, UpstreamError> {
        let encrypted = matches!(host.transport.after_header().0, UpstreamTransport::Tls(_));
        if self.plan.protocol != UpstreamProtocol::Alpn || !encrypted {
            return Ok(self.speaks_http2(downstream_is_http2));
        }
        let with = self.acquire(host, context);
        let pool = self.pools.of(self.pool_key(host, context), with)?;
        pool.negotiated_http2(with)
            .await
            .inspect_err(|error| self.failed(host, error))
    }

    /// A host for a request or a connection.
    pub fn choose(&self, context: &LbContext<'_>) -> Result<Arc<Host>, UpstreamError> {
        if let Discovery::OriginalDst { port_override, .. } = &self.plan.discovery {
            return self.original_dst(context.original_dst, *port_override);
        }
        let set = self.hosts.borrow();
        if let Some(wanted) = &context.override_host {
            let address = wanted.address.parse().ok();
            let known = address.and_then(|address| set.at(address));
            let host = known.filter(|host| {
                let allowed = self.plan.lb.override_host_status;
                allowed.contains(host.status())
            });
            match host {
                Some(host) => return Ok(host.clone()),
                None if wanted.strict => {
                    self.stats.upstream_cx_none_healthy().inc();
                    return Err(match known {
                        Some(_) => UpstreamError::NoHealthyHost,
                        None => UpstreamError::NoSuchHost,
                    });
                }
                None => {}
            }
        }
        let (preferred, used) = context.preferred;
        if let Some(host) = preferred.iter().filter_map(|a| set.at(*a)).nth(used) {
            return Ok(host.clone());
        }
        let with = Chooser {
            plan: &self.plan,
            set: &set,
            shared: &self.shared,
            stats: &self.stats,
            random: &self.random,
            report: &|report| self.tell(report),
        };
        for attempt in 0..=context.avoid_attempts {
            let Some(host) = self.balancer.choose(with, context, attempt) else {
                break;
            };
            let avoid = context
                .avoid
                .iter()
                .any(|tried| tried.shared.id == host.shared.id)
                || context.omit.is_some_and(|omit| omit.omits(&host));
            if !avoid || attempt == context.avoid_attempts {
                return Ok(host);
            }
        }
        self.stats.upstream_cx_none_healthy().inc();
        Err(UpstreamError::NoHealthyHost)
    }

    fn original_dst(
        &self,
        wanted: Option<SocketAddr>,
        port: Option<u16>,
    ) -> Result<Arc<Host>, UpstreamError> {
        let Some(mut address) = wanted else {
            self.stats.original_dst_host_invalid().inc();
            return Err(UpstreamError::NoHealthyHost);
        };
        if let Some(port) = port {
            address.set_port(port);
        }
        if let Some(host) = self.on_demand_hosts.borrow().get(&address) {
            return Ok(host.clone());
        }
        let shared = {
            // Cold: once for each destination and worker.
            let mut all = self
                .shared
                .on_demand
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            all.get(&address)
                .and_then(ArcWeak::upgrade)
                .unwrap_or_else(|| {
                    let shared = Arc::new(HostShared::new());
                    all.insert(address, Arc::downgrade(&shared));
                    shared
                })
        };
        let host = Arc::new(Host {
            shared,
            address: Address::Socket(address),
            additional_addresses: Vec::new(),
            hostname: "".into(),
            locality: Arc::default(),
            priority: 0,
            weight: 1,
            health: HealthStatus::Healthy,
            metadata: Default::default(),
            transport: self.plan.transport_socket.clone(),
            health_check: None,
        });
        self.on_demand_hosts
            .borrow_mut()
            .insert(address, host.clone());
        Ok(host)
    }

    /// Forgets hosts that connections brought into being and that have none left.
    fn forget_unused(&self) {
        let mut hosts = self.on_demand_hosts.borrow_mut();
        if hosts.is_empty() {
            return;
        }
        hosts.retain(|_, host| {
            Arc::strong_count(host) > 1
                || host.shared.cx_active.load(Relaxed) > 0
                || host.shared.rq_active.load(Relaxed) > 0
        });
        let mut all = self
            .shared
            .on_demand
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        all.retain(|_, shared| shared.strong_count() > 0);
    }

    /// The limits that apply to a priority, and how many retries are under way.
    pub fn breaker(&self, priority: Priority) -> (&Thresholds, &BreakerShared) {
        match priority {
            Priority::Default => (
                &self.plan.circuit_breakers.default,
                &self.shared.breakers[0],
            ),
            Priority::High => (&self.plan.circuit_breakers.high, &self.shared.breakers[1]),
        }
    }

    /// The right to retry, held while the retry is under way; `None` where the limit or the budget is used up (UO).
    pub fn retry(&self, priority: Priority) -> Option<Permit> {
        let (thresholds, shared) = self.breaker(priority);
        let limit = shared.retries_allowed(thresholds);
        let permit = Permit::acquire(&shared.retries, limit);
        if permit.is_none() {
            self.stats.upstream_rq_retry_overflow().inc();
        }
        permit
    }

    /// Counts a request as under way until the guard is dropped.
    pub fn request(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
    ) -> Result<RequestGuard, UpstreamError> {
        RequestGuard::new(self.acquire(host, context))
    }

    /// An HTTP/1 connection to a host.
    ///
    /// Can be dropped at any time: a connection that is being opened is then given up.
    pub async fn http1(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
    ) -> Result<Http1, UpstreamError> {
        let with = self.acquire(host, context);
        let pool = self.pools.of(self.pool_key(host, context), with)?;
        pool.http1(with)
            .await
            .inspect_err(|error| self.failed(host, error))
    }

    /// A place on an HTTP/2 connection to a host.
    ///
    /// Can be dropped at any time.
    pub async fn http2(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
    ) -> Result<Http2, UpstreamError> {
        let with = self.acquire(host, context);
        let pool = self.pools.of(self.pool_key(host, context), with)?;
        pool.http2(with)
            .await
            .inspect_err(|error| self.failed(host, error))
    }

    /// A connection that is not pooled: for TCP. It counts like a request that waits for it and then is under way.
    pub async fn tcp(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
    ) -> Result<(Stream, UpstreamAccount, RequestGuard), UpstreamError> {
        let connected = self.tcp_untold(host, context).await;
        connected.inspect(|_| self.tcp_connected(host))
    }

    /// The same for who does not take it for a success of the host yet, and says so by [`Cluster::tcp_connected`] or
    /// [`Cluster::tcp_failed`].
    pub(crate) async fn tcp_untold(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
    ) -> Result<(Stream, UpstreamAccount, RequestGuard), UpstreamError> {
        let with = self.acquire(host, context);
        let pending = Pending::acquire(with)?;
        let Some(permit) = with.connection() else {
            self.stats.upstream_cx_overflow().inc();
            return Err(UpstreamError::Overflow("max_connections"));
        };
        match connect(with, permit).await {
            Ok(upstream) => {
                drop(pending);
                let request = RequestGuard::of_connection(with);
                let account = UpstreamAccount::new(upstream.account, upstream.established);
                Ok((upstream.stream, account, request))
            }
            Err(error) => {
                with.ejected();
                self.failed(host, &error);
                Err(error)
            }
        }
    }

    /// A host can be reached.
    pub(crate) fn tcp_connected(&self, host: &Arc<Host>) {
        self.report(host, Outcome::Connected);
    }

    /// A host can be reached, and is of no use all the same.
    pub(crate) fn tcp_failed(&self, host: &Arc<Host>, error: &UpstreamError) {
        self.failed(host, error);
    }

    /// Closes what a downstream connection had for itself; called when it ends.
    pub fn downstream_closed(&self, connection: u64) {
        if self.plan.connection_pool_per_downstream_connection {
            self.pools.forget_downstream(connection);
        }
    }

    fn tell(&self, report: Report) {
        // At the end of the process nobody listens any more.
        let _ = self.reports.send(report);
    }

    fn failed(&self, host: &Arc<Host>, error: &UpstreamError) {
        if error.is_host_failure() {
            self.report(host, Outcome::ConnectFailed);
        }
    }

    fn pool_key(&self, host: &Arc<Host>, context: &LbContext<'_>) -> pool::PoolKey {
        let own = self.plan.connection_pool_per_downstream_connection;
        (
            host.shared.id,
            if own {
                context.downstream_connection
            } else {
                0
            },
            connect::variant(host, context),
        )
    }

    fn acquire<'a>(&'a self, host: &'a Arc<Host>, context: &LbContext<'a>) -> Acquire<'a> {
        let (thresholds, breaker) = self.breaker(context.priority);
        Acquire {
            plan: &self.plan,
            stats: &self.stats,
            breaker,
            thresholds,
            host,
            downstream: context.downstream,
            source: context.source,
            tls: &self.tls,
            alpn: context.alpn,
            auto_name: context.auto_name,
            fresh: context.fresh,
        }
    }

    fn set_hosts(&self, hosts: Arc<HostSet>) {
        let ids: std::collections::HashSet<u64, foldhash::fast::RandomState> =
            hosts.hosts().iter().map(|host| host.shared.id).collect();
        let changed = {
            let old = self.hosts.borrow();
            let same = |host: &Arc<Host>| ids.contains(&host.shared.id);
            old.hosts().len() != ids.len() || !old.hosts().iter().all(same)
        };
        if changed && self.plan.lb.close_connections_on_host_set_change {
            self.pools.retain(|_| false);
        } else {
            self.pools.retain(|id| ids.contains(&id));
        }
        self.balancer.reset();
        lb::count_zones(&hosts, &self.stats);
        let old = std::mem::replace(&mut *self.hosts.borrow_mut(), hosts.clone());
        Subsets::count(
            old.subsets.as_deref(),
            hosts.subsets.as_deref(),
            &self.stats,
        );
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // What another version of the cluster has is counted by that one.
        let hosts = self.hosts.get_mut();
        Subsets::count(hosts.subsets.as_deref(), None, &self.stats);
    }
}

/// How often [`Clusters::sweep`] should run.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
