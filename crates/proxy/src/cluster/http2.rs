//! HTTP/2 connections to a host: shared by many requests of one worker.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use outrigger_http::{Error, h2, h2::ClientHandle};
use tls::session::Session;
use tokio::time::Instant;

use super::{
    connect::{Established, Upstream, connect},
    error::UpstreamError,
    pool::{Acquire, HostPool, Pending},
    shared::Permit,
};
use crate::{
    codec::{Http2Meter, Http2Stats, http2_settings},
    io::Ended,
    transport::AutoName,
};

/// One connection. It lives in the pool and in each request on it.
#[derive(Debug)]
pub(crate) struct Http2Connection {
    handle: ClientHandle,
    meter: Http2Meter,
    active: Rc<Cell<u32>>,
    uses: Cell<u32>,
    rests_since: Cell<Instant>,
    born: Instant,
    closed: Rc<Cell<bool>>,
    retired: Cell<bool>,
    established: Established,
    session: Option<Arc<Session>>,
}

impl Http2Connection {
    /// How long it has had no request; `None` while it has one.
    pub(crate) fn rested(&self) -> Option<Duration> {
        (self.active.get() == 0).then(|| self.rests_since.get().elapsed())
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Takes no more requests; ends with the last one.
    pub(crate) fn retire(&self) {
        self.retired.set(true);
    }

    /// Streams that it may have: what the cluster and what the peer allow.
    fn limit(&self, configured: u32) -> usize {
        (configured as usize).min(self.handle.max_streams())
    }
}

/// The right to send one request on an HTTP/2 connection.
#[derive(Debug)]
pub struct Http2 {
    connection: Rc<Http2Connection>,
    pool: Rc<HostPool>,
    handle: ClientHandle,
    reused: bool,
}

impl Http2 {
    /// What sends the request; it is ready to take one.
    pub fn handle(&mut self) -> &mut ClientHandle {
        &mut self.handle
    }

    /// Whether the connection has taken requests before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// What TLS agreed on.
    pub fn session(&self) -> Option<Arc<Session>> {
        self.connection.session.clone()
    }

    /// How the connection came to be.
    pub fn established(&self) -> Established {
        self.connection.established
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.active.set(connection.active.get() - 1);
        if connection.active.get() == 0 {
            connection.rests_since.set(Instant::now());
        }
        connection.meter.update();
        if self.pool.http2_waiting.get() > 0 {
            self.pool.http2_changed.notify_waiters();
        }
    }
}

impl HostPool {
    /// A place on a connection: an open one that has room, else a new one.
    pub(crate) async fn http2(self: &Rc<Self>, with: Acquire<'_>) -> Result<Http2, UpstreamError> {
        if let Some(connection) = self.roomy(with) {
            match self.place(connection, with).await {
                Ok(place) => return Ok(place),
                Err(None) => {}
                Err(Some(error)) => return Err(error),
            }
        }
        // Few requests come here, and none should carry the state of connecting with it.
        Box::pin(self.next_http2(with)).await
    }

    async fn next_http2(self: &Rc<Self>, with: Acquire<'_>) -> Result<Http2, UpstreamError> {
        let mut pending = None;
        loop {
            if let Some(connection) = self.roomy(with) {
                match self.place(connection, with).await {
                    Ok(place) => return Ok(place),
                    Err(None) => continue,
                    Err(Some(error)) => return Err(error),
                }
            }
            if pending.is_none() {
                pending = Some(Pending::acquire(with)?);
            }
            if self.is_closed() {
                return Err(UpstreamError::NoHealthyHost);
            }
            // One attempt at a time: the requests that came meanwhile fit on the same connection. And a peer that takes
            // no streams at all (a server that is being drained may say so) takes none on another connection either.
            let refuses = || {
                let connections = self.http2.borrow();
                connections
                    .iter()
                    .any(|other| other.handle.max_streams() == 0)
            };
            if self.http2_connecting.get() > 0 || refuses() {
                self.changed().await;
                continue;
            }
            let permit = match with.connection() {
                None if self.http2.borrow().is_empty() => Permit::force(&with.breaker.connections),
                None => {
                    with.stats.upstream_cx_overflow().inc();
                    self.changed().await;
                    continue;
                }
                Some(permit) => permit,
            };
            let _connecting = Connecting::new(self);
            let connection = self.open(with, permit).await;
            let connection = connection.inspect_err(|_| with.ejected())?;
            if self.is_closed() {
                return Err(UpstreamError::NoHealthyHost);
            }
            self.http2.borrow_mut().push(connection);
        }
    }

    /// Takes a place on a connection; `Err(None)` when it broke or was drained while it rested.
    async fn place(
        self: &Rc<Self>,
        connection: Rc<Http2Connection>,
        with: Acquire<'_>,
    ) -> Result<Http2, Option<UpstreamError>> {
        connection.active.set(connection.active.get() + 1);
        let uses = connection.uses.get() + 1;
        connection.uses.set(uses);
        if with
            .plan
            .http
            .max_requests_per_connection
            .is_some_and(|limit| uses >= limit)
        {
            with.stats.upstream_cx_max_requests().inc();
            connection.retire();
        }
        let mut place = Http2 {
            handle: connection.handle.clone(),
            pool: self.clone(),
            reused: uses > 1,
            connection,
        };
        match place.handle.ready().await {
            Ok(()) => Ok(place),
            Err(error) => {
                place.connection.closed.set(true);
                Err((!place.reused).then(|| UpstreamError::Protocol(error.to_string())))
            }
        }
    }

    /// Waits until there may be room.
    async fn changed(&self) {
        let _waiting = Waiting::new(self);
        self.http2_changed.notified().await;
    }

    /// A connection with room: rather one that has used less than 80 % of its streams. Where none has, one more is
    /// opened beside, before the last place is taken.
    fn roomy(self: &Rc<Self>, with: Acquire<'_>) -> Option<Rc<Http2Connection>> {
        let mut connections = self.http2.borrow_mut();
        if let Some(limit) = with.plan.http.max_connection_duration {
            for connection in connections
                .iter()
                .filter(|connection| connection.born.elapsed() >= limit)
            {
                with.stats.upstream_cx_max_duration_reached().inc();
                connection.retire();
            }
        }
        connections.retain(|connection| !connection.closed.get() && !connection.retired.get());
        let limit = with.plan.http2.max_concurrent_streams;
        let mut full = None;
        for connection in connections.iter() {
            let (active, limit) = (connection.active.get() as usize, connection.limit(limit));
            if active * 5 < limit * 4 {
                return Some(connection.clone());
            }
            if active < limit && full.is_none() {
                full = Some(connection.clone());
            }
        }
        drop(connections);
        if full.is_some() && self.http2_connecting.get() == 0 {
            self.grow(with);
        }
        full
    }

    /// Opens one more connection that nobody waits for.
    fn grow(self: &Rc<Self>, with: Acquire<'_>) {
        // What a PROXY header or a source address says belongs to one downstream connection.
        if with.source.is_some() || with.host.transport.after_header().1.is_some() {
            return;
        }
        let Some(permit) = with.connection() else {
            return;
        };
        let (pool, plan, stats) = (self.clone(), with.plan.clone(), with.stats.clone());
        let (host, breaker, tls) = (with.host.clone(), with.breaker.clone(), with.tls.clone());
        let alpn = with.alpn.map(<[_]>::to_vec);
        let auto_name = with
            .auto_name
            .map(|auto| (auto.name.to_owned(), auto.checked));
        tokio::task::spawn_local(async move {
            let with = Acquire {
                plan: &plan,
                stats: &stats,
                breaker: &breaker,
                thresholds: &plan.circuit_breakers.default,
                host: &host,
                downstream: None,
                source: None,
                tls: &tls,
                alpn: alpn.as_deref(),
                auto_name: auto_name.as_ref().map(|(name, checked)| AutoName {
                    name,
                    checked: *checked,
                }),
                fresh: true,
            };
            let _connecting = Connecting::new(&pool);
            // That it failed is counted; whoever finds no room tries again and tells its client.
            if let Ok(connection) = pool.open(with, permit).await
                && !pool.is_closed()
            {
                pool.http2.borrow_mut().push(connection);
            }
        });
    }

    async fn open(
        self: &Rc<Self>,
        with: Acquire<'_>,
        permit: Permit,
    ) -> Result<Rc<Http2Connection>, UpstreamError> {
        let upstream = connect(with, permit).await?.counted();
        self.expect(with, &upstream, true)?;
        self.begin_http2(with, upstream).await
    }

    /// Begins to speak HTTP/2 on a connection.
    pub(super) async fn begin_http2(
        self: &Rc<Self>,
        with: Acquire<'_>,
        upstream: Upstream,
    ) -> Result<Rc<Http2Connection>, UpstreamError> {
        let established = upstream.established;
        let session = upstream.stream.session().cloned();
        let settings = http2_settings(
            &with.plan.http2,
            with.plan.http.max_response_headers_kb,
            with.plan.http.max_headers_count,
        );
        let (handle, driver) = h2::connect(upstream.stream, &settings)
            .await
            .map_err(|error| UpstreamError::Protocol(error.to_string()))?;
        with.stats.upstream_cx_http2_total().inc();
        let http2_stats = Rc::new(Http2Stats::new(with.stats.scope().scope("http2.")));
        let closed = Rc::new(Cell::new(false));
        let meter = Http2Meter::new(handle.facts(), &http2_stats);
        let (flag, account, stats) = (closed.clone(), upstream.account, with.stats.clone());
        let pool = Rc::downgrade(self);
        let facts = handle.facts().clone();
        let active = Rc::new(Cell::new(0));
        let under_way = active.clone();
        tokio::task::spawn_local(async move {
            let mut driver = pin!(driver);
            let (mut received, mut told) = (0, false);
            let ended = poll_fn(|cx| {
                if let Poll::Ready(ended) = driver.as_mut().poll(cx) {
                    return Poll::Ready(ended);
                }
                // It finishes what it has; the driver ends after the last stream.
                if facts.goaways_received.get() > 0 {
                    flag.set(true);
                    if !std::mem::replace(&mut told, true) {
                        stats.upstream_cx_close_notify().inc();
                    }
                }
                // New settings may make room for who waits.
                let now = facts.received.get();
                if now != std::mem::replace(&mut received, now)
                    && let Some(pool) = pool.upgrade()
                    && pool.http2_waiting.get() > 0
                {
                    pool.http2_changed.notify_waiters();
                }
                Poll::Pending
            })
            .await;
            if facts.goaways_received.get() > 0 && !told {
                stats.upstream_cx_close_notify().inc();
            }
            account.ended(Ended {
                // With the last handle it ends by itself; a host says GOAWAY before it closes.
                remote: match &ended {
                    Ok(()) => facts.goaways_received.get() > 0,
                    Err(error) => matches!(error, Error::Io(_) | Error::Closed),
                },
                active: under_way.get() > 0,
            });
            match ended {
                Ok(()) => {}
                Err(Error::Unresponsive) => http2_stats.keepalive_timeout().inc(),
                Err(Error::Io(_) | Error::Closed) => {}
                Err(_) => stats.upstream_cx_protocol_error().inc(),
            }
            flag.set(true);
            drop(account);
            if let Some(pool) = pool.upgrade() {
                pool.http2
                    .borrow_mut()
                    .retain(|connection| !connection.closed.get());
                pool.http2_changed.notify_waiters();
            }
        });
        Ok(Rc::new(Http2Connection {
            handle,
            meter,
            active,
            uses: Cell::new(0),
            rests_since: Cell::new(Instant::now()),
            born: Instant::now(),
            closed,
            retired: Cell::new(false),
            established,
            session,
        }))
    }
}

/// A request that waits for room.
struct Waiting<'a>(&'a HostPool);

impl<'a> Waiting<'a> {
    fn new(pool: &'a HostPool) -> Self {
        pool.http2_waiting.set(pool.http2_waiting.get() + 1);
        Self(pool)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.http2_waiting.set(self.0.http2_waiting.get() - 1);
    }
}

/// An attempt to connect; its end, good or bad, wakes who waits for it.
pub(super) struct Connecting<'a>(&'a HostPool);

impl<'a> Connecting<'a> {
    pub(super) fn new(pool: &'a HostPool) -> Self {
        pool.http2_connecting.set(pool.http2_connecting.get() + 1);
        Self(pool)
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0
            .http2_connecting
            .set(self.0.http2_connecting.get() - 1);
        self.0.http2_changed.notify_waiters();
    }
}
