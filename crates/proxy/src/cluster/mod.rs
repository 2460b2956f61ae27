//! Clusters: groups of hosts, how one of them is chosen, and the connections to it.
//!
//! The main thread owns the truth ([`registry`]): plans, hosts, names to resolve, hosts put aside. A worker gets each change
//! as a shared [`ClusterEntry`]; it makes a [`Cluster`] of its own (pools, cursors, stats) when the first request asks
//! for it. What workers share while requests run stands in [`shared`].
//!
//! A request's way: [`Clusters::find`] → [`Cluster::choose`] → [`Cluster::http1`] or [`Cluster::http2`] →
//! [`Http1::release`], with [`Cluster::report`] telling how it went.

mod connect;
mod dns;
mod error;
mod hash;
mod host;
mod http2;
mod lb;
mod pool;
pub mod registry;
mod rest;
pub mod shared;
mod stats;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, Mutex, Weak as ArcWeak, atomic::Ordering::Relaxed},
    time::Duration,
};

pub(crate) use dns::Names;
pub use error::UpstreamError;
pub use hash::xxh64 as shared_hash;
pub use host::{Host, HostSet};
pub use http2::Http2;
pub use pool::{Http1, RequestGuard, UpstreamAccount};
pub use stats::ClusterStats;

use connect::connect;
use lb::Balancer;
use pool::{Acquire, Pools};
use serde_json::Value;
use shared::{BreakerShared, ClusterShared, HostShared, Permit};
use tokio::sync::mpsc;

use crate::{
    io::Stream,
    listener::{ConnectionInfo, UpstreamSource},
    plan::{
        Address, Cluster as Plan,
        cluster::{Discovery, Thresholds, UpstreamProtocol},
        endpoint::HealthStatus,
    },
    transport::{Secrets, Upstreams},
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
    /// What the `envoy.lb` metadata of the host must hold (`metadata_match` of the route), for subsets.
    pub metadata_match: Option<&'a BTreeMap<String, Value>>,
    /// The host that a session names, before all others.
    pub override_host: Option<OverrideHost<'a>>,
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

/// What the main thread hands to workers for one cluster.
#[derive(Debug)]
pub struct ClusterEntry {
    /// What the configuration says.
    pub plan: Arc<Plan>,
    /// Counts that workers share.
    pub shared: Arc<ClusterShared>,
    /// The hosts at the time of the hand-over.
    pub hosts: Arc<HostSet>,
    /// Hosts that connections brought into being (ORIGINAL_DST), by address.
    pub(crate) on_demand: Arc<OnDemand>,
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
}

/// Why a host is put aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ejection {
    Consecutive5xx,
    ConsecutiveGatewayFailure,
    ConsecutiveLocalOriginFailure,
}

impl Ejection {
    /// The counter below `outlier_detection.`.
    pub(crate) fn stat(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "ejections_enforced_consecutive_5xx",
            Self::ConsecutiveGatewayFailure => "ejections_enforced_consecutive_gateway_failure",
            Self::ConsecutiveLocalOriginFailure => {
                "ejections_enforced_consecutive_local_origin_failure"
            }
        }
    }
}

/// The clusters of one worker.
#[derive(Debug)]
pub struct Clusters {
    slots: RefCell<HashMap<Arc<str>, Slot, foldhash::fast::RandomState>>,
    stats: ::stats::Stats,
    random: Rc<Random>,
    reports: mpsc::UnboundedSender<Report>,
    secrets: Arc<Secrets>,
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
        secrets: Arc<Secrets>,
    ) -> Self {
        Self {
            slots: RefCell::default(),
            stats,
            random,
            reports,
            secrets,
        }
    }

    /// The cluster of this name, brought to life where this is its first request; `None` where there is none (flag NC).
    pub fn find(&self, name: &str) -> Option<Rc<Cluster>> {
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
            && live.plan == entry.plan
        {
            live.set_hosts(entry.hosts.clone());
            return;
        }
        slots.insert(entry.plan.name.clone(), Slot::Cold(entry));
    }

    /// New hosts of a cluster.
    pub(crate) fn set_hosts(&self, entry: Arc<ClusterEntry>) {
        match self.slots.borrow_mut().get_mut(&entry.plan.name) {
            Some(Slot::Live(live)) => live.set_hosts(entry.hosts.clone()),
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

/// A cluster as one worker sees it.
#[derive(Debug)]
pub struct Cluster {
    /// What the configuration says.
    pub plan: Arc<Plan>,
    hosts: RefCell<Arc<HostSet>>,
    shared: Arc<ClusterShared>,
    on_demand: Arc<OnDemand>,
    on_demand_hosts: RefCell<HashMap<SocketAddr, Arc<Host>>>,
    stats: Rc<ClusterStats>,
    /// Counters of single statuses, as they come up.
    codes: RefCell<Vec<(u16, ::stats::Counter)>>,
    balancer: Balancer,
    pools: Pools,
    tls: Rc<Upstreams>,
    random: Rc<Random>,
    reports: mpsc::UnboundedSender<Report>,
}

impl Cluster {
    fn new(entry: &ClusterEntry, clusters: &Clusters) -> Self {
        let scope = clusters
            .stats
            .scope(&format!("cluster.{}.", entry.plan.stat_name()));
        entry.shared.touched.store(true, Relaxed);
        Self {
            plan: entry.plan.clone(),
            tls: Rc::new(Upstreams::new(clusters.secrets.clone(), &scope)),
            hosts: RefCell::new(entry.hosts.clone()),
            shared: entry.shared.clone(),
            on_demand: entry.on_demand.clone(),
            on_demand_hosts: RefCell::default(),
            stats: Rc::new(ClusterStats::new(scope)),
            codes: RefCell::default(),
            balancer: Balancer::default(),
            pools: Pools::default(),
            random: clusters.random.clone(),
            reports: clusters.reports.clone(),
        }
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
            UpstreamProtocol::Downstream => downstream_is_http2,
            // ALPN is a matter of TLS; in clear Envoy speaks HTTP/1.
            UpstreamProtocol::Alpn => false,
        }
    }

    /// Counts the response to a request by its status: `upstream_rq_2xx`, `upstream_rq_200`, `upstream_rq_completed`.
    pub fn count_response(&self, status: u16) {
        self.stats.response(status);
        let mut codes = self.codes.borrow_mut();
        match codes.iter().find(|(code, _)| *code == status) {
            Some((_, counter)) => counter.inc(),
            None => {
                let counter = self.stats.scope().counter(&format!("upstream_rq_{status}"));
                counter.inc();
                codes.push((status, counter));
            }
        }
    }

    /// A host for a request or a connection.
    pub fn choose(&self, context: &LbContext<'_>) -> Result<Arc<Host>, UpstreamError> {
        if let Discovery::OriginalDst { port_override, .. } = &self.plan.discovery {
            return self.original_dst(context.original_dst, *port_override);
        }
        let set = self.hosts.borrow().clone();
        for attempt in 0..=context.avoid_attempts {
            let Some(host) =
                self.balancer
                    .choose(&self.plan, &set, context.hash, attempt, &self.random)
            else {
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

    /// A connection that is not pooled: for TCP.
    pub async fn tcp(
        &self,
        host: &Arc<Host>,
        context: &LbContext<'_>,
    ) -> Result<(Stream, UpstreamAccount), UpstreamError> {
        let with = self.acquire(host, context);
        let Some(permit) = with.connection() else {
            self.stats.upstream_cx_overflow().inc();
            return Err(UpstreamError::Overflow("max_connections"));
        };
        match connect(with, permit).await {
            Ok(upstream) => Ok((upstream.stream, UpstreamAccount::new(upstream.account))),
            Err(error) => {
                self.failed(host, &error);
                Err(error)
            }
        }
    }

    /// Closes what a downstream connection had for itself; called when it ends.
    pub fn downstream_closed(&self, connection: u64) {
        if self.plan.connection_pool_per_downstream_connection {
            self.pools.forget_downstream(connection);
        }
    }

    /// Tells how a request went. Connection failures of [`Cluster::http1`], [`Cluster::http2`] and [`Cluster::tcp`] are
    /// reported already.
    pub fn report(&self, host: &Arc<Host>, outcome: Outcome) {
        let shared = &host.shared;
        let failed = match outcome {
            Outcome::Status(status) => status >= 500,
            Outcome::ConnectFailed | Outcome::Reset => true,
            Outcome::Timeout => {
                shared.rq_timeout.fetch_add(1, Relaxed);
                true
            }
        };
        let count = if failed {
            &shared.rq_error
        } else {
            &shared.rq_success
        };
        if outcome != Outcome::ConnectFailed {
            count.fetch_add(1, Relaxed);
        }
        let Some(outlier) = &self.plan.outlier_detection else {
            return;
        };
        let local = !matches!(outcome, Outcome::Status(_));
        if local && outlier.split_external_local_origin_errors {
            let count = shared.consecutive_local.fetch_add(1, Relaxed) + 1;
            if count == outlier.consecutive_local_origin_failure {
                self.eject(host, Ejection::ConsecutiveLocalOriginFailure);
            }
            return;
        }
        shared.consecutive_local.store(0, Relaxed);
        if !failed {
            // The common case writes only when something has failed before.
            if shared.consecutive_5xx.load(Relaxed) != 0 {
                shared.consecutive_5xx.store(0, Relaxed);
                shared.consecutive_gateway.store(0, Relaxed);
            }
            return;
        }
        let gateway = local || matches!(outcome, Outcome::Status(502..=504));
        if gateway {
            let count = shared.consecutive_gateway.fetch_add(1, Relaxed) + 1;
            if count == outlier.consecutive_gateway_failure {
                self.eject(host, Ejection::ConsecutiveGatewayFailure);
            }
        } else {
            shared.consecutive_gateway.store(0, Relaxed);
        }
        let count = shared.consecutive_5xx.fetch_add(1, Relaxed) + 1;
        if count == outlier.consecutive_5xx {
            self.eject(host, Ejection::Consecutive5xx);
        }
    }

    fn eject(&self, host: &Arc<Host>, reason: Ejection) {
        let report = Report::Failing {
            cluster: self.plan.name.clone(),
            host: host.shared.id,
            reason,
        };
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
            fresh: context.fresh,
        }
    }

    fn set_hosts(&self, hosts: Arc<HostSet>) {
        let ids: std::collections::HashSet<u64, foldhash::fast::RandomState> =
            hosts.hosts().iter().map(|host| host.shared.id).collect();
        self.pools.retain(|id| ids.contains(&id));
        self.balancer.reset();
        *self.hosts.borrow_mut() = hosts;
    }
}

/// How often [`Clusters::sweep`] should run.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
