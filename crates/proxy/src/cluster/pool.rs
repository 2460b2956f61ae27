//! Connections of one worker to the hosts of one cluster.
//!
//! HTTP/1: a connection serves one request at a time and rests in between; the one used last is taken first, so that
//! the others grow old and go. HTTP/2: a connection serves many. A connection at rest holds no buffer, and one that
//! has seen anything happen while it rested is never handed out. A connection with its codec stays in one place in memory
//! from its beginning to its end: what moves from hand to hand is a pointer.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use outrigger_http::{Error, Limits, h1};
use tls::session::Session;
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    LocalPlan,
    connect::{Account, Established, Upstream, connect},
    error::UpstreamError,
    host::Host,
    http2::Http2Connection,
    rest::OriginTimeout,
    shared::{BreakerShared, Permit, now_ms},
    stats::ClusterStats,
};
use crate::{
    codec::{http1_spelling, response_limits},
    io::Ended,
    listener::{ConnectionInfo, UpstreamSource},
    plan::{Cluster as Plan, cluster::Thresholds},
    transport::{AutoName, Upstreams},
    worker::moment,
};

/// The pools of a cluster by host, and by downstream connection where the cluster wants pools of their own.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    hosts: RefCell<HashMap<PoolKey, Rc<HostPool>, foldhash::fast::RandomState>>,
}

/// Host; downstream connection, where the cluster asks for it; and what makes connections to a host differ otherwise.
pub(crate) type PoolKey = (u64, u64, u64);

/// The connections to one host.
#[derive(Debug, Default)]
pub(crate) struct HostPool {
    idle: RefCell<Vec<Idle>>,
    waiting: RefCell<VecDeque<oneshot::Sender<Idle>>>,
    pub(crate) http2: RefCell<Vec<Rc<Http2Connection>>>,
    pub(crate) http2_changed: Notify,
    pub(crate) http2_connecting: Cell<u32>,
    pub(crate) http2_waiting: Cell<u32>,
    /// How long the host keeps a connection that rests.
    origin: OriginTimeout,
    /// Where ALPN decides: what it was the first time.
    pub(crate) http2_negotiated: Cell<Option<bool>>,
    /// HTTP/1 connections, at rest or not.
    open: Cell<u32>,
    /// The host is gone: connections end with their request.
    closed: Cell<bool>,
    /// Counts the pool.
    _permit: Option<Permit>,
}

#[derive(Debug)]
struct Idle {
    connection: Box<h1::ClientConnection<Upstream>>,
    uses: u32,
    since: Instant,
}

impl Idle {
    fn new(upstream: Upstream, since: Instant) -> Self {
        Self {
            connection: Box::new(h1::ClientConnection::new(upstream, Limits::default())),
            uses: 0,
            since,
        }
    }
}

/// An HTTP/1 connection for one request; [`Http1::release`] gives it back. Dropped without that, it is closed.
#[derive(Debug)]
pub struct Http1 {
    /// The connection with its codec.
    pub connection: Box<h1::ClientConnection<Upstream>>,
    lease: Lease,
}

/// The place that a connection in use has in its pool. Dropped, the connection counts as closed by us.
#[derive(Debug)]
struct Lease {
    /// Nowhere once the books of the connection are kept by somebody else.
    pool: Weak<HostPool>,
    plan: LocalPlan,
    stats: Rc<ClusterStats>,
    uses: u32,
    reused: bool,
}

/// What one acquisition needs to know.
#[derive(Clone, Copy)]
pub(crate) struct Acquire<'a> {
    pub(crate) plan: &'a LocalPlan,
    pub(crate) stats: &'a Rc<ClusterStats>,
    pub(crate) breaker: &'a BreakerShared,
    pub(crate) thresholds: &'a Thresholds,
    pub(crate) host: &'a Arc<Host>,
    pub(crate) downstream: Option<&'a ConnectionInfo>,
    pub(crate) source: Option<UpstreamSource>,
    pub(crate) tls: &'a Rc<Upstreams>,
    pub(crate) alpn: Option<&'a [Arc<str>]>,
    pub(crate) auto_name: Option<AutoName<'a>>,
    pub(crate) fresh: bool,
}

impl Acquire<'_> {
    /// The right to one more connection, by the limits of the cluster and of the host.
    pub(crate) fn connection(&self) -> Option<Permit> {
        let permit = Permit::acquire(&self.breaker.connections, self.thresholds.max_connections)?;
        match self.plan.circuit_breakers.per_host_max_connections {
            Some(limit) => permit.and(&self.host.shared.connections, limit),
            None => Some(permit),
        }
    }

    /// The connection that a request waited for did not come about.
    pub(crate) fn ejected(&self) {
        self.stats.upstream_rq_pending_failure_eject().inc();
    }
}

impl Pools {
    pub(crate) fn of(
        &self,
        key: PoolKey,
        with: Acquire<'_>,
    ) -> Result<Rc<HostPool>, UpstreamError> {
        let mut hosts = self.hosts.borrow_mut();
        if let Some(pool) = hosts.get(&key) {
            return Ok(pool.clone());
        }
        let tally = &with.breaker.pools;
        let permit = match with.thresholds.max_connection_pools {
            None => Permit::force(tally),
            Some(limit) => {
                let mut permit = Permit::acquire(tally, limit);
                if permit.is_none() {
                    // One that is not in use makes room.
                    hosts.retain(|_, pool| !pool.make_room());
                    permit = Permit::acquire(tally, limit);
                }
                permit.ok_or_else(|| {
                    with.stats.upstream_cx_pool_overflow().inc();
                    UpstreamError::Overflow("max_connection_pools")
                })?
            }
        };
        let pool = Rc::new(HostPool {
            _permit: Some(permit),
            ..HostPool::default()
        });
        hosts.insert(key, pool.clone());
        Ok(pool)
    }

    /// Closes the pools of hosts that are gone.
    pub(crate) fn retain(&self, mut keep: impl FnMut(u64) -> bool) {
        self.hosts.borrow_mut().retain(|(host, ..), pool| {
            let keep = keep(*host);
            if !keep {
                pool.close();
            }
            keep
        });
    }

    /// Closes what a downstream connection had for itself.
    pub(crate) fn forget_downstream(&self, downstream: u64) {
        self.hosts.borrow_mut().retain(|key, pool| {
            if key.1 == downstream && downstream != 0 {
                pool.close();
                return false;
            }
            true
        });
    }

    /// Closes connections that have rested too long or that their peer has closed.
    pub(crate) fn sweep(&self, plan: &Plan, stats: &ClusterStats) {
        let mut hosts = self.hosts.borrow_mut();
        for pool in hosts.values() {
            pool.idle.borrow_mut().retain_mut(|idle| {
                if plan
                    .http
                    .idle_timeout
                    .is_some_and(|limit| idle.since.elapsed() >= limit)
                {
                    stats.upstream_cx_idle_timeout().inc();
                    pool.open.set(pool.open.get() - 1);
                    return false;
                }
                let quiet = idle.connection.io().stream.is_quiet();
                if quiet {
                    pool.origin.alive_after(idle.since.elapsed());
                } else {
                    pool.lost(idle);
                }
                quiet
            });
            pool.http2.borrow_mut().retain(|connection| {
                let rested = connection.rested();
                let old = plan
                    .http
                    .idle_timeout
                    .is_some_and(|limit| rested.is_some_and(|time| time >= limit));
                if old {
                    stats.upstream_cx_idle_timeout().inc();
                }
                !old && !connection.is_closed()
            });
        }
        hosts.retain(|_, pool| !pool.is_empty());
    }
}

impl HostPool {
    fn close(&self) {
        self.closed.set(true);
        self.waiting.borrow_mut().clear();
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        self.open
            .set(self.open.get().saturating_sub(idle.len() as u32));
        // Requests on HTTP/2 connections go on; the connection ends with the last of them.
        self.http2
            .borrow_mut()
            .drain(..)
            .for_each(|connection| connection.retire());
        self.http2_changed.notify_waiters();
    }

    /// Closes connections at rest for the sake of another pool; `true` when nothing is left.
    fn make_room(&self) -> bool {
        let resting = self.idle.borrow().len() as u32;
        let http2 = self
            .http2
            .borrow()
            .iter()
            .all(|connection| connection.rested().is_some());
        if self.open.get() != resting || !http2 || self.http2_connecting.get() > 0 {
            return false;
        }
        self.close();
        true
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    fn is_empty(&self) -> bool {
        self.open.get() == 0
            && self.http2.borrow().is_empty()
            && self.http2_connecting.get() == 0
            && self.waiting.borrow().is_empty()
    }

    /// A connection at rest that is still good.
    fn take_idle(&self, stats: &ClusterStats) -> Option<Idle> {
        loop {
            let mut idle = self.idle.borrow_mut().pop()?;
            let rested = Instant::from_std(moment::now()).saturating_duration_since(idle.since);
            // The event loop tells of a close only when it is asked. A connection that has rested for a while is worth
            // the system call that asks the kernel itself; between requests that follow each other closely it is not.
            let stream = &mut idle.connection.io().stream;
            let quiet =
                stream.is_quiet() && (rested < ASK_KERNEL_AFTER || stream.is_quiet_in_kernel());
            if !quiet {
                self.lost(&mut idle);
                continue;
            }
            self.origin.alive_after(rested);
            if self.origin.limit().is_some_and(|limit| rested >= limit) {
                stats.upstream_cx_idle_timeout().inc();
                self.open.set(self.open.get() - 1);
                continue;
            }
            return Some(idle);
        }
    }

    /// The host has closed a connection that rested.
    fn lost(&self, idle: &mut Idle) {
        idle.connection.io().account.ended(Ended {
            remote: true,
            active: false,
        });
        self.open.set(self.open.get() - 1);
        // What the kernel heard last was the close.
        let silent = idle.connection.io().stream.since_last_segment();
        let rested = idle.since.elapsed();
        if let Some(rested) = silent.and_then(|silent| rested.checked_sub(silent))
            && rested >= LEARNED_FROM
        {
            self.origin.closed_after(rested);
        }
    }

    /// A connection: one at rest, else a new one, else the next that somebody gives back.
    pub(crate) async fn http1(self: &Rc<Self>, with: Acquire<'_>) -> Result<Http1, UpstreamError> {
        match self.rested(with) {
            Some(http1) => Ok(http1),
            // Few requests come here, and none should carry the state of connecting with it.
            None => Box::pin(self.next_http1(with)).await,
        }
    }

    /// A connection at rest, where the request may have one.
    fn rested(self: &Rc<Self>, with: Acquire<'_>) -> Option<Http1> {
        let idle = match with.fresh {
            true => None,
            false => self.take_idle(with.stats),
        }?;
        let used = idle.uses > 0;
        Some(self.lease(with, idle, used))
    }

    async fn next_http1(self: &Rc<Self>, with: Acquire<'_>) -> Result<Http1, UpstreamError> {
        let mut pending = None;
        loop {
            if let Some(http1) = self.rested(with) {
                return Ok(http1);
            }
            if pending.is_none() {
                pending = Some(Pending::acquire(with)?);
            }
            if self.closed.get() {
                return Err(UpstreamError::NoHealthyHost);
            }
            let mut permit = with.connection();
            if permit.is_none() && self.open.get() == 0 {
                // Each worker may have one connection to a host in any case: nobody could give it another worker's.
                permit = Some(Permit::force(&with.breaker.connections));
            }
            let Some(permit) = permit else {
                with.stats.upstream_cx_overflow().inc();
                let (sender, receiver) = oneshot::channel();
                self.waiting.borrow_mut().push_back(sender);
                match receiver.await {
                    Ok(idle) => return Ok(self.lease(with, idle, true)),
                    // A connection has ended, so there may be room for a new one.
                    Err(_) => continue,
                }
            };
            let open = Open::new(self);
            let upstream = connect(with, permit).await;
            let upstream = upstream.inspect_err(|_| with.ejected())?.counted();
            self.expect(with, &upstream, false)?;
            with.stats.upstream_cx_http1_total().inc();
            open.keep();
            return Ok(self.lease(with, Idle::new(upstream, Instant::now()), false));
        }
    }

    fn lease(self: &Rc<Self>, with: Acquire<'_>, mut idle: Idle, reused: bool) -> Http1 {
        idle.connection.set_limits(response_limits(with.plan));
        idle.connection
            .set_spelling(http1_spelling(&with.plan.http1));
        Http1 {
            connection: idle.connection,
            lease: Lease {
                pool: Rc::downgrade(self),
                plan: with.plan.clone(),
                stats: with.stats.clone(),
                uses: idle.uses + 1,
                reused,
            },
        }
    }

    /// Takes a new connection in that nobody has asked for yet.
    pub(crate) fn adopt(&self, upstream: Upstream, since: Instant) {
        self.open.set(self.open.get() + 1);
        self.put_back(Idle::new(upstream, since));
    }

    /// Takes a connection back, or gives it to who waits longest.
    fn put_back(&self, mut idle: Idle) {
        loop {
            let waiting = self.waiting.borrow_mut().pop_front();
            match waiting {
                None => return self.idle.borrow_mut().push(idle),
                Some(waiting) => match waiting.send(idle) {
                    Ok(()) => return,
                    Err(back) => idle = back,
                },
            }
        }
    }

    /// A connection ended while requests wait for one: wake the first, which then finds the slot free.
    fn closed_one(&self) {
        self.open.set(self.open.get().saturating_sub(1));
        self.waiting.borrow_mut().pop_front();
    }
}

/// Rest after which the kernel is asked whether a connection still lives. What had happened when the event loop last
/// waited is known without: under load that is a few milliseconds ago, and no origin is known to close that soon.
const ASK_KERNEL_AFTER: Duration = Duration::from_millis(10);

/// A shorter rest says nothing about how long an origin keeps connections.
const LEARNED_FROM: Duration = Duration::from_millis(1);

/// Counts a connection that is being opened, so that a dropped attempt is counted off again.
struct Open<'a>(Option<&'a HostPool>);

impl<'a> Open<'a> {
    fn new(pool: &'a HostPool) -> Self {
        pool.open.set(pool.open.get() + 1);
        Self(Some(pool))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.0 {
            pool.closed_one();
        }
    }
}

/// A request that waits for its connection.
pub(crate) struct Pending<'a> {
    stats: &'a ClusterStats,
    _permit: Permit,
}

impl<'a> Pending<'a> {
    pub(crate) fn acquire(with: Acquire<'a>) -> Result<Self, UpstreamError> {
        with.stats.upstream_rq_pending_total().inc();
        let Some(permit) =
            Permit::acquire(&with.breaker.pending, with.thresholds.max_pending_requests)
        else {
            with.stats.upstream_rq_pending_overflow().inc();
            return Err(UpstreamError::Overflow("max_pending_requests"));
        };
        with.stats.upstream_rq_pending_active().inc();
        Ok(Self {
            stats: with.stats,
            _permit: permit,
        })
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.stats.upstream_rq_pending_active().dec();
    }
}

impl Http1 {
    /// The host says how long it keeps a connection that rests (`Keep-Alive: timeout`).
    pub fn told_timeout(&self, timeout: Duration) {
        if let Some(pool) = self.lease.pool.upgrade() {
            pool.origin.told(timeout);
        }
    }

    /// The connection has ended in the middle of an exchange: by the host, or by us since it broke the protocol.
    pub fn broken(&mut self, error: &Error) {
        let remote = matches!(error, Error::Closed | Error::Io(_));
        let ended = Ended {
            remote,
            active: true,
        };
        self.connection.io().account.ended(ended);
    }

    /// Whether this connection has served a request before: only then can the peer have closed it in the meantime, so
    /// that a request that got no answer at all may be sent again.
    pub fn is_reused(&self) -> bool {
        self.lease.reused
    }

    /// What TLS agreed on.
    pub fn session(&mut self) -> Option<Arc<Session>> {
        self.connection.io().stream.session().cloned()
    }

    /// How the connection came to be.
    pub fn established(&mut self) -> Established {
        self.connection.io().established
    }

    /// Gives the connection back after a complete exchange. It is closed instead where the codec or its peer is not done
    /// with it, where it has served its number of requests or its time, or where its host is gone.
    pub fn release(mut self) {
        let lease = &mut self.lease;
        let Some(pool) = lease.pool.upgrade() else {
            return;
        };
        if !self.connection.is_reusable() {
            return;
        }
        lease.pool = Weak::new();
        let http = &lease.plan.http;
        let upstream = self.connection.io();
        let spent = http
            .max_requests_per_connection
            .is_some_and(|limit| lease.uses >= limit);
        let old = http
            .max_connection_duration
            .is_some_and(|limit| upstream.account.age() >= limit);
        if spent {
            lease.stats.upstream_cx_max_requests().inc();
        }
        if old {
            lease.stats.upstream_cx_max_duration_reached().inc();
        }
        let quiet = upstream.stream.is_quiet();
        if spent || old || pool.closed.get() || !quiet {
            // What is heard of a host that has answered is its close.
            upstream.account.ended(Ended {
                remote: !quiet,
                active: false,
            });
            pool.closed_one();
            return;
        }
        self.connection.rest();
        pool.put_back(Idle {
            connection: self.connection,
            uses: self.lease.uses,
            since: Instant::from_std(moment::now()),
        });
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.closed_one();
        }
    }
}

/// Keeps the counts of a connection that left its pool.
#[derive(Debug)]
pub struct UpstreamAccount {
    account: Account,
    established: Established,
}

impl UpstreamAccount {
    pub(crate) fn new(account: Account, established: Established) -> Self {
        let account = Self {
            account,
            established,
        };
        account.ended(false);
        account
    }

    /// How the connection came to be.
    pub fn established(&self) -> Established {
        self.established
    }

    /// Says who has ended the connection. There was always something under way on it: it was nobody else's.
    pub fn ended(&self, remote: bool) {
        let active = true;
        self.account.ended(Ended { remote, active });
    }
}

/// One request under way: what `max_requests` and LEAST_REQUEST count.
#[derive(Debug)]
pub struct RequestGuard {
    stats: Rc<ClusterStats>,
    host: Arc<Host>,
    _permit: Permit,
}

impl RequestGuard {
    pub(crate) fn new(with: Acquire<'_>) -> Result<Self, UpstreamError> {
        let limit = with.thresholds.max_requests;
        let Some(permit) = Permit::acquire(&with.breaker.requests, limit) else {
            with.stats.upstream_rq_pending_overflow().inc();
            return Err(UpstreamError::Overflow("max_requests"));
        };
        if let Some(interval) = with.thresholds.retry_budget.and_then(|b| b.interval) {
            with.breaker.recent.add(interval, now_ms());
        }
        Ok(Self::counted(with, permit))
    }

    /// A connection of TCP, which is no request but counts like one. Envoy holds no limit of requests against it.
    pub(super) fn of_connection(with: Acquire<'_>) -> Self {
        Self::counted(with, Permit::force(&with.breaker.requests))
    }

    /// The response has said that its connection ends with it.
    pub fn told_close(&self) {
        self.stats.upstream_cx_close_notify().inc();
    }

    fn counted(with: Acquire<'_>, permit: Permit) -> Self {
        with.stats.upstream_rq_total().inc();
        with.stats.upstream_rq_active().inc();
        with.host.shared.rq_active.fetch_add(1, Relaxed);
        with.host.shared.rq_total.fetch_add(1, Relaxed);
        Self {
            stats: with.stats.clone(),
            host: with.host.clone(),
            _permit: permit,
        }
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.stats.upstream_rq_active().dec();
        self.host.shared.rq_active.fetch_sub(1, Relaxed);
    }
}
