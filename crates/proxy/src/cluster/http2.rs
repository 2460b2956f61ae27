//! HTTP/2 connections to a host: shared by many requests of one worker.

use std::{cell::Cell, rc::Rc, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::time::Instant;

use super::{
    connect::connect,
    error::UpstreamError,
    pool::{Acquire, HostPool, Pending},
    shared::Permit,
};

/// One connection. It lives in the pool and in each request on it.
#[derive(Debug)]
pub(crate) struct Http2Connection {
    send: SendRequest<Bytes>,
    active: Cell<u32>,
    uses: Cell<u32>,
    rests_since: Cell<Instant>,
    born: Instant,
    closed: Rc<Cell<bool>>,
    retired: Cell<bool>,
    local: Option<std::net::SocketAddr>,
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

    fn takes_more(&self, limit: u32) -> bool {
        let limit = (limit as usize).min(self.send.current_max_send_streams());
        !self.closed.get() && !self.retired.get() && (self.active.get() as usize) < limit
    }
}

/// The right to send one request on an HTTP/2 connection.
#[derive(Debug)]
pub struct Http2 {
    connection: Rc<Http2Connection>,
    pool: Rc<HostPool>,
    send: SendRequest<Bytes>,
    reused: bool,
}

impl Http2 {
    /// What sends the request; it is ready to take one.
    pub fn sender(&mut self) -> &mut SendRequest<Bytes> {
        &mut self.send
    }

    /// Whether the connection has taken requests before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// The local address, for `%UPSTREAM_LOCAL_ADDRESS%`.
    pub fn local_address(&self) -> Option<std::net::SocketAddr> {
        self.connection.local
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.connection.active.set(self.connection.active.get() - 1);
        self.connection.rests_since.set(Instant::now());
        self.pool.http2_changed.notify_waiters();
    }
}

impl HostPool {
    /// A place on a connection: an open one that has room, else a new one.
    pub(crate) async fn http2(self: &Rc<Self>, with: Acquire<'_>) -> Result<Http2, UpstreamError> {
        let mut pending = None;
        loop {
            if let Some(connection) = self.roomy(with) {
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
                    send: connection.send.clone(),
                    pool: self.clone(),
                    reused: uses > 1,
                    connection,
                };
                match place.send.clone().ready().await {
                    Ok(send) => {
                        place.send = send;
                        return Ok(place);
                    }
                    Err(error) if !place.reused => {
                        place.connection.closed.set(true);
                        return Err(UpstreamError::Protocol(error.to_string()));
                    }
                    // It broke while it rested; another one, or a new one, will do.
                    Err(_) => {
                        place.connection.closed.set(true);
                        continue;
                    }
                }
            }
            if pending.is_none() {
                pending = Some(Pending::acquire(with)?);
            }
            // One attempt at a time: the requests that came meanwhile fit on the same connection.
            if self.http2_connecting.get() > 0 {
                self.http2_changed.notified().await;
                continue;
            }
            let permit =
                Permit::acquire(&with.breaker.connections, with.thresholds.max_connections);
            let permit = match permit {
                None if self.http2.borrow().is_empty() => Permit::force(&with.breaker.connections),
                None => {
                    with.stats.upstream_cx_overflow().inc();
                    self.http2_changed.notified().await;
                    continue;
                }
                Some(permit) => permit,
            };
            let _connecting = Connecting::new(self);
            let connection = self.open(with, permit).await?;
            if !self.is_closed() {
                self.http2.borrow_mut().push(connection);
                continue;
            }
            return Err(UpstreamError::NoHealthyHost);
        }
    }

    fn roomy(&self, with: Acquire<'_>) -> Option<Rc<Http2Connection>> {
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
        connections
            .iter()
            .find(|connection| connection.takes_more(limit))
            .cloned()
    }

    async fn open(
        self: &Rc<Self>,
        with: Acquire<'_>,
        permit: Permit,
    ) -> Result<Rc<Http2Connection>, UpstreamError> {
        let upstream = connect(with, permit).await?;
        let local = upstream.stream.local_address();
        let options = &with.plan.http2;
        let (send, connection) = h2::client::Builder::new()
            .enable_push(false)
            // A stream of small messages is ordinary gRPC: h2 would take a hundred of them in one
            // read for an attack. This is 65,536 of them.
            .data_frame_budget(1 << 24)
            .header_table_size(options.hpack_table_size)
            .initial_window_size(options.initial_stream_window_size)
            .initial_connection_window_size(options.initial_connection_window_size)
            .max_header_list_size(with.plan.http.max_response_headers_kb * 1024)
            .handshake::<_, Bytes>(upstream.stream)
            .await
            .map_err(|error| UpstreamError::Protocol(error.to_string()))?;
        with.stats.upstream_cx_http2_total().inc();
        let closed = Rc::new(Cell::new(false));
        let (flag, account, stats) = (closed.clone(), upstream.account, with.stats.clone());
        let pool = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            if connection.await.is_err() {
                stats.upstream_cx_protocol_error().inc();
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
            send,
            active: Cell::new(0),
            uses: Cell::new(0),
            rests_since: Cell::new(Instant::now()),
            born: Instant::now(),
            closed,
            retired: Cell::new(false),
            local,
        }))
    }
}

/// An attempt to connect; its end, good or bad, wakes who waits for it.
struct Connecting<'a>(&'a HostPool);

impl<'a> Connecting<'a> {
    fn new(pool: &'a HostPool) -> Self {
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
