//! One downstream connection: what it speaks, its requests one after the other (HTTP/1), and its end.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    task::{Context as TaskContext, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use outrigger_http::{BodyReader, BodyWriter, Error, Limits, RequestHead, h1, h2};
use tokio::time::{Instant, timeout};

use super::{
    ConnectionManager, ConnectionManagerStats, Context, Flags, LocalReply, failure,
    serve as exchange, streams,
    timers::{Expired, Timer},
};
use crate::{
    codec::{http1_grammar, http1_spelling},
    io::{Ended, Stream},
    listener::{Connection, ConnectionInfo},
    plan::{
        http::{CodecType, HttpOptions},
        overload::ShedPoint,
    },
    worker::{Worker, drain::Drain, moment},
};

/// The age at which a connection is drained, drawn anew for each.
pub(super) fn longest_life(options: &HttpOptions, worker: &Worker) -> Option<Duration> {
    let least = options.max_connection_duration?;
    let share = options.max_connection_duration_jitter;
    Some(worker.random.jittered(least, share))
}

/// Serves a connection to its end.
pub(super) async fn serve(
    live: Rc<ConnectionManager>,
    connection: Connection,
    worker: &Rc<Worker>,
) {
    let plan = &live.plan;
    let open = Open::new(live.clone());
    let Connection {
        mut stream,
        info,
        drain,
    } = connection;
    stream.count(
        live.stats.downstream_cx_rx_bytes_total(),
        live.stats.downstream_cx_tx_bytes_total(),
        live.stats.downstream_cx_tx_bytes_buffered(),
    );
    if worker
        .shared
        .overload
        .sheds(ShedPoint::HcmOnDataCreatingCodec, worker)
    {
        live.stats.downstream_cx_overload_close().inc();
        return;
    }
    // What TLS agreed on counts; in clear what the inspector found.
    let known = match &info.tls {
        Some(session) => session.alpn.as_deref() == Some("h2"),
        None => info
            .application_protocols
            .iter()
            .any(|name| matches!(&**name, "h2" | "h2c")),
    };
    let http2 = match plan.codec {
        CodecType::Http1 => Some(false),
        CodecType::Http2 => Some(true),
        CodecType::Auto if known => Some(true),
        CodecType::Auto => None,
    };
    if http2 == Some(true) {
        let ended = streams::serve(live.clone(), worker.clone(), stream, info, drain).await;
        return open.ended.set(ended);
    }
    let limits = Limits {
        head_bytes: plan.max_request_headers_kb as usize * 1024,
        headers: plan.common.max_headers_count as usize,
        trailers: plan.http1.enable_trailers,
        http1: http1_grammar(&plan.http1),
        ..Limits::default()
    };
    let mut http1 = h1::ServerConnection::new(stream, BytesMut::new(), limits);
    http1.set_spelling(http1_spelling(&plan.http1));
    if http2.is_none() {
        match speaks_http2(&mut http1, &live, worker, &info, &drain).await {
            Err(ended) => return open.ended.set(ended),
            Ok(false) => {}
            Ok(true) => {
                let (mut stream, read) = http1.into_parts();
                stream.put_back(Bytes::from(read));
                let ended = streams::serve(live.clone(), worker.clone(), stream, info, drain).await;
                return open.ended.set(ended);
            }
        }
    }
    live.stats.downstream_cx_http1_total().inc();
    live.stats.downstream_cx_http1_active().inc();
    let ended = http1_connection(&live, worker, &mut http1, &info, &drain).await;
    open.ended.set(ended);
    live.stats.downstream_cx_http1_active().dec();
}

/// Looks at the first bytes; the error is the end of a connection that brings none.
async fn speaks_http2(
    connection: &mut h1::ServerConnection<Stream>,
    live: &ConnectionManager,
    worker: &Worker,
    info: &ConnectionInfo,
    drain: &Drain,
) -> Result<bool, Ended> {
    let mut idle = Idle::new(live.plan.common.idle_timeout);
    let longest = longest_life(&live.plan.common, worker);
    idle.until = longest.map(|age| Instant::from_std(info.accepted) + age);
    let mut closed = pin!(drain.closed());
    let mut timer = Timer::default();
    if drain.is_ending() {
        idle.shorten(live.plan.drain_timeout);
    }
    loop {
        if let Some(answer) = connection.has_prefix(h2::PREFACE) {
            return Ok(answer);
        }
        let mut remote = false;
        let more = poll_fn(|cx| {
            if let Poll::Ready(more) = connection.poll_more(cx) {
                remote = true;
                return Poll::Ready(more.unwrap_or(false));
            }
            if closed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(false);
            }
            if drain.has_moved() && drain.is_ending() {
                idle.shorten(live.plan.drain_timeout);
            }
            idle.poll(cx, &mut timer).map(|()| {
                idle.count(&live.stats);
                false
            })
        })
        .await;
        idle.touch();
        if !more {
            // A client that says less than a preface and ends says nothing.
            let active = false;
            return Err(Ended { remote, active });
        }
    }
}

async fn http1_connection(
    live: &Rc<ConnectionManager>,
    worker: &Rc<Worker>,
    connection: &mut h1::ServerConnection<Stream>,
    info: &ConnectionInfo,
    drain: &Drain,
) -> Ended {
    let plan = &live.plan;
    let stats = &live.stats;
    let draining = Cell::new(false);
    let cx = Context {
        live,
        worker,
        connection: info,
        drain,
        draining: &draining,
    };
    let born = Instant::from_std(info.accepted);
    let mut requests = 0;
    let mut idle = Idle::new(plan.common.idle_timeout);
    let mut closed = pin!(drain.closed());
    let longest = longest_life(&plan.common, worker);
    idle.until = longest.map(|age| born + age + plan.drain_timeout);
    // Whether this task is woken by it.
    let mut listens = false;
    if drain.is_ending() {
        idle.shorten(plan.drain_timeout);
    }
    // For rests and requests: setting one costs more than to be woken too early now and then.
    let mut timer = Timer::default();
    loop {
        idle.touch();
        let mut remote = false;
        let readable = {
            let mut readable = pin!(connection.readable());
            poll_fn(|cx| {
                if let Poll::Ready(readable) = readable.as_mut().poll(cx) {
                    remote = true;
                    return Poll::Ready(readable.unwrap_or(false));
                }
                // Each rest would take the lock of the drain for what happens once, if at all.
                let moved = drain.has_moved();
                if !listens || moved {
                    listens = true;
                    if closed.as_mut().poll(cx).is_ready() {
                        stats.downstream_cx_drain_close().inc();
                        return Poll::Ready(false);
                    }
                }
                if moved && drain.is_ending() {
                    idle.shorten(plan.drain_timeout);
                }
                idle.poll(cx, &mut timer).map(|()| {
                    idle.count(stats);
                    false
                })
            })
            .await
        };
        let active = false;
        if !readable {
            return Ended { remote, active };
        }
        let mut left = Ended::default();
        let shed = ShedPoint::Http1AbortDispatch;
        let head = match worker.shared.overload.sheds(shed, worker) {
            true => Err(exchange::overloaded(stats)),
            false => read_head(connection, live).await,
        };
        stats.downstream_rq_http1_total().inc();
        match head {
            Ok(Ok(None)) => return Ended { remote, active },
            Ok(Ok(Some(head))) => {
                requests += 1;
                let (reader, writer) = connection.split();
                let (mut reader, mut writer) = (BodyReader::H1(reader), BodyWriter::H1(writer));
                let old = longest.is_some_and(|d| born.elapsed() >= d);
                let spent = plan
                    .common
                    .max_requests_per_connection
                    .is_some_and(|n| requests >= n);
                if old {
                    stats.downstream_cx_max_duration_reached().inc();
                }
                if spent {
                    stats.downstream_cx_max_requests_reached().inc();
                }
                if old || spent {
                    writer.close_after();
                }
                let mut over = false;
                let mut is_over = |cx: &mut TaskContext<'_>| {
                    // As above.
                    if !listens || drain.has_moved() {
                        listens = true;
                        over = closed.as_mut().poll(cx).is_ready();
                    }
                    over
                };
                let (reader, writer) = (&mut reader, &mut writer);
                let is_over: &mut exchange::IsOver<'_> = &mut is_over;
                let flags =
                    exchange::request(&cx, head, reader, writer, &mut timer, Some(is_over)).await;
                if over {
                    stats.downstream_cx_drain_close().inc();
                    connection.io().reset_on_close();
                    let (remote, active) = (false, true);
                    return Ended { remote, active };
                }
                let gone = flags.has(Flags::DOWNSTREAM_CONNECTION_TERMINATION);
                (left.remote, left.active) = (gone, gone);
            }
            Ok(Err(Error::Refused(refusal))) => {
                let (_, writer) = connection.split();
                exchange::refused(&cx, refusal, &mut BodyWriter::H1(writer)).await;
            }
            Err(reply) => {
                let (_, writer) = connection.split();
                exchange::unread(&cx, reply, &mut BodyWriter::H1(writer)).await;
            }
            Ok(Err(error)) => {
                tracing::debug!(connection = info.id, %error, "a request ended in its head");
                let active = true;
                return Ended { remote, active };
            }
        }
        if cx.draining.get() || !connection.is_reusable() {
            if !connection.is_complete() {
                // The client must not take what it has got for all of the response.
                connection.io().reset_on_close();
                return left;
            }
            let limit = plan.delayed_close_timeout.unwrap_or(Duration::ZERO);
            if timeout(limit, connection.close(LINGER)).await.is_err() && !limit.is_zero() {
                stats.downstream_cx_delayed_close_timeout().inc();
            }
            return left;
        }
    }
}

/// Reads a head within the limits of time that hold for it; the error is the answer to one that
/// came too slowly.
async fn read_head(
    connection: &mut h1::ServerConnection<Stream>,
    live: &ConnectionManager,
) -> Result<Result<Option<RequestHead>, Error>, LocalReply> {
    let mut head = pin!(connection.read_head());
    // Most heads come in one piece and need no timer.
    if let Poll::Ready(head) = poll_fn(|cx| Poll::Ready(head.as_mut().poll(cx))).await {
        return Ok(head);
    }
    let (plan, stats) = (&live.plan, &live.stats);
    // Envoy's timers begin with the first byte, so the ones for a whole request end a head too.
    let first = [
        (plan.request_headers_timeout, Expired::Headers),
        (plan.request_timeout, Expired::Receive),
        (plan.stream_idle_timeout, Expired::Idle),
    ]
    .into_iter()
    .filter_map(|(limit, expired)| Some((limit?, expired)))
    .min_by_key(|(limit, _)| *limit);
    let Some((limit, expired)) = first else {
        return Ok(head.await);
    };
    timeout(limit, head)
        .await
        .map_err(|_| failure::late_head(expired, stats))
}

/// Bytes of a request nobody wants that are read before its connection closes.
const LINGER: usize = 1024 * 1024;

/// The idle limit of a connection. The timer is not set anew for each request: when it fires early, for the sake of an
/// earlier rest or of a request, it is set to what is left.
pub(super) struct Idle {
    limit: Option<Duration>,
    since: Instant,
    /// When a rest is over in any case, since the connection is too old. A request that comes before is answered as its
    /// last one.
    until: Option<Instant>,
    /// The limit is there since the process ends.
    ends: bool,
}

impl Idle {
    pub(super) fn new(limit: Option<Duration>) -> Idle {
        Idle {
            limit,
            since: Instant::now(),
            until: None,
            ends: false,
        }
    }

    /// The process ends: a connection rests no longer than a client may need to hear of it. It tells nobody before a
    /// response does (HTTP/1 has no word for it), so one whose client has been silent for as long is closed at once.
    fn shorten(&mut self, limit: Duration) {
        if self.ends {
            return;
        }
        self.ends = true;
        if self.limit.is_none() {
            self.since = Instant::now();
        }
        self.limit = Some(self.limit.map_or(limit, |own| own.min(limit)));
    }

    /// Counts a connection that has been at rest for too long.
    fn count(&self, stats: &ConnectionManagerStats) {
        if self.ends {
            stats.downstream_cx_drain_close().inc();
        } else if self.until.is_some_and(|until| Instant::now() >= until) {
            stats.downstream_cx_max_duration_reached().inc();
        } else {
            stats.downstream_cx_idle_timeout().inc();
        }
    }

    pub(super) fn touch(&mut self) {
        if self.limit.is_some() {
            self.since = Instant::from_std(moment::now());
        }
    }

    pub(super) fn poll(&self, cx: &mut TaskContext<'_>, timer: &mut Timer) -> Poll<()> {
        let rest = self.limit.map(|limit| self.since + limit);
        let Some(at) = rest.into_iter().chain(self.until).min() else {
            return Poll::Pending;
        };
        loop {
            ready!(timer.poll(at, cx));
            if Instant::now() >= at {
                return Poll::Ready(());
            }
        }
    }
}

/// Counts an open connection.
struct Open {
    live: Rc<ConnectionManager>,
    since: Instant,
    ended: Cell<Ended>,
}

impl Open {
    fn new(live: Rc<ConnectionManager>) -> Open {
        live.stats.downstream_cx_total().inc();
        live.stats.downstream_cx_active().inc();
        Open {
            live,
            since: Instant::now(),
            ended: Cell::default(),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let stats = &self.live.stats;
        stats.downstream_cx_active().dec();
        let Ended { remote, active } = self.ended.get();
        match remote {
            true => stats.downstream_cx_destroy_remote().inc(),
            false => stats.downstream_cx_destroy_local().inc(),
        }
        if active {
            stats.downstream_cx_destroy_active_rq().inc();
            match remote {
                true => stats.downstream_cx_destroy_remote_active_rq().inc(),
                false => stats.downstream_cx_destroy_local_active_rq().inc(),
            }
        }
        stats.downstream_cx_destroy().inc();
        stats
            .downstream_cx_length_ms()
            .record(self.since.elapsed().as_millis() as u64);
    }
}
