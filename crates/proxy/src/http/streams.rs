//! One downstream connection that speaks HTTP/2: a task for each stream, and what ends them all.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use outrigger_http::{BodyReader, BodyWriter, Error, RequestHead, h2};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, sleep, sleep_until},
};

use super::{
    ConnectionManager, Context, Flags,
    connection::{Idle, longest_life},
    serve as exchange,
    timers::Timer,
};
use crate::{
    codec::{Http2Meter, http2_settings},
    io::{Ended, Stream},
    listener::ConnectionInfo,
    plan::overload::ShedPoint,
    worker::{Worker, drain::Drain, moment},
};

/// Serves a connection whose client begins with the preface.
pub(super) async fn serve(
    live: Rc<ConnectionManager>,
    worker: Rc<Worker>,
    stream: Stream,
    info: Box<ConnectionInfo>,
    drain: Drain,
) -> Ended {
    let stats = &live.stats;
    stats.downstream_cx_http2_total().inc();
    stats.downstream_cx_http2_active().inc();
    let plan = live.plan.clone();
    let settings = http2_settings(
        &plan.http2,
        plan.max_request_headers_kb,
        plan.common.max_headers_count,
    );
    // Whoever connects and then says nothing is idle.
    let limit = plan.common.idle_timeout.unwrap_or(HANDSHAKE);
    let handshake = async {
        let stream = match preface(stream).await {
            Ok(stream) => stream,
            Err(stream) => {
                let linger = plan.delayed_close_timeout.unwrap_or(Duration::ZERO);
                let _ = tokio::time::timeout(linger, refuse(stream)).await;
                return Err(Error::Closed);
            }
        };
        h2::ServerConnection::handshake(stream, &settings).await
    };
    let handshake = tokio::time::timeout(limit, handshake);
    let shaken = tokio::select! {
        biased;
        shaken = handshake => shaken,
        () = drain.over(plan.drain_timeout) => {
            stats.downstream_cx_drain_close().inc();
            stats.downstream_cx_http2_active().dec();
            return Ended::default();
        }
    };
    let ended = match shaken {
        Ok(Ok(connection)) => streams(&live, &worker, connection, Rc::from(info), &drain).await,
        Ok(Err(error)) => {
            tracing::debug!(connection = info.id, %error, "no HTTP/2 connection");
            stats.downstream_cx_protocol_error().inc();
            Ended::default()
        }
        Err(_) => {
            stats.downstream_cx_idle_timeout().inc();
            Ended::default()
        }
    };
    stats.downstream_cx_http2_active().dec();
    ended
}

/// For the preface where there is no idle timeout.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// Reads what HTTP/2 begins with and puts it back; the stream of a client that says something else is the error.
async fn preface(mut stream: Stream) -> Result<Stream, Stream> {
    let (mut read, mut length) = ([0; h2::PREFACE.len()], 0);
    while length < read.len() {
        match stream.read(&mut read[length..]).await {
            Ok(count) if count > 0 => length += count,
            _ => return Err(stream),
        }
        if !h2::PREFACE.starts_with(&read[..length]) {
            return Err(stream);
        }
    }
    stream.put_back(Bytes::copy_from_slice(&read));
    Ok(stream)
}

/// Says GOAWAY to a client that does not speak HTTP/2, and lets it finish: bytes left unread would make the close a
/// reset, which could overtake the frame.
async fn refuse(mut stream: Stream) {
    if stream.write_all(&GOAWAY).await.is_err() || stream.shutdown().await.is_err() {
        return;
    }
    let mut rest = vec![0; 4096];
    let mut left = LINGER;
    while left > 0 {
        match stream.read(&mut rest).await {
            Ok(count) if count > 0 => left = left.saturating_sub(count),
            _ => return,
        }
    }
}

/// Last stream 0, PROTOCOL_ERROR (RFC 9113, 6.8).
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Bytes of a client that is refused which are read before its connection closes.
const LINGER: usize = 64 * 1024;

async fn streams(
    live: &Rc<ConnectionManager>,
    worker: &Rc<Worker>,
    mut connection: h2::ServerConnection<Stream>,
    info: Rc<ConnectionInfo>,
    drain: &Drain,
) -> Ended {
    let stats = &live.stats;
    let options = &live.plan.common;
    let strict = !live.plan.http2.stream_error_on_invalid_http_message;
    let meter = Http2Meter::new(connection.facts(), &live.http2_stats);
    let shared = Rc::new(Shared::default());
    let mut idle = Idle::new(options.idle_timeout);
    let mut timer = Timer::default();
    let age = longest_life(options, worker);
    let mut age = pin!(age.map(|age| sleep_until(Instant::from_std(info.accepted) + age)));
    let (mut begin, mut closed) = (pin!(drain.begin()), pin!(drain.closed()));
    let (mut last_words, mut patience) = (pin!(None), pin!(None));
    let (mut requests, mut drained, mut timed_out) = (0_u64, false, false);
    loop {
        let accepted = poll_fn(|cx| {
            if !drained {
                let old = age
                    .as_mut()
                    .as_pin_mut()
                    .is_some_and(|age| age.poll(cx).is_ready());
                if old {
                    stats.downstream_cx_max_duration_reached().inc();
                }
                let spent = options
                    .max_requests_per_connection
                    .is_some_and(|n| requests >= n.into());
                if spent {
                    stats.downstream_cx_max_requests_reached().inc();
                }
                if old || spent || begin.as_mut().poll(cx).is_ready() {
                    stats.downstream_cx_drain_close().inc();
                    drained = true;
                    connection.drain();
                }
            }
            if drained {
                // A client that does not answer may open streams for so long.
                if patience.is_none() {
                    let share = live.plan.drain_timeout_jitter;
                    let most = worker.random.jittered(live.plan.drain_timeout, share);
                    patience.set(Some(sleep(most)));
                }
                if let Some(timer) = patience.as_mut().as_pin_mut()
                    && timer.poll(cx).is_ready()
                {
                    connection.leave();
                }
            }
            loop {
                if let Poll::Ready(accepted) = connection.poll_accept(cx) {
                    return Poll::Ready(Some(accepted));
                }
                if connection.is_ending() {
                    break;
                }
                if shared.resets.are_too_many() {
                    stats.downstream_rq_too_many_premature_resets().inc();
                    connection.end(h2::Reason::ENHANCE_YOUR_CALM);
                } else if strict && connection.facts().protocol_errors_sent.get() > 0 {
                    stats.downstream_cx_protocol_error().inc();
                    connection.end(h2::Reason::PROTOCOL_ERROR);
                } else {
                    break;
                }
            }
            if connection.is_ending() {
                // The GOAWAY is on its way; a client that does not read it is not waited for.
                if last_words.is_none() {
                    let limit = live.plan.delayed_close_timeout.unwrap_or(Duration::ZERO);
                    last_words.set(Some(sleep(limit)));
                }
                if let Some(timer) = last_words.as_mut().as_pin_mut()
                    && timer.poll(cx).is_ready()
                {
                    return Poll::Ready(None);
                }
            }
            if closed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            if connection.has_streams() {
                idle.touch();
            }
            if idle.poll(cx, &mut timer).is_ready() {
                if timed_out {
                    return Poll::Ready(None);
                }
                stats.downstream_cx_idle_timeout().inc();
                (timed_out, drained) = (true, true);
                idle.touch();
                connection.drain();
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
        meter.update();
        match accepted {
            Some(Ok(Some((head, reader, writer)))) => {
                requests += 1;
                idle.touch();
                stats.downstream_rq_http2_total().inc();
                let overload = &worker.shared.overload;
                if overload.sheds(ShedPoint::Http2GoAwayAndClose, worker) {
                    stats.downstream_cx_overload_close().inc();
                    return shared.ended(false, requests);
                }
                if !drained && overload.sheds(ShedPoint::Http2GoAway, worker) {
                    drained = true;
                    connection.drain();
                }
                let mut task = Box::pin(stream(
                    live.clone(),
                    worker.clone(),
                    info.clone(),
                    drain.clone(),
                    shared.clone(),
                    head,
                    reader,
                    writer,
                ));
                // A task is moved on its way to its place, which a pointer is cheaper for.
                tokio::task::spawn_local(poll_fn(move |cx| {
                    moment::turn(|| task.as_mut().poll(cx))
                }));
            }
            // After our GOAWAY it ends by itself.
            Some(Ok(None)) => return shared.ended(!drained, requests),
            None => return shared.ended(false, requests),
            Some(Err(error)) => {
                tracing::debug!(connection = info.id, %error, "HTTP/2 connection ended");
                let remote = matches!(error, Error::Io(_) | Error::Closed);
                match error {
                    Error::Io(_) | Error::Closed => {}
                    Error::Unresponsive => live.http2_stats.keepalive_timeout().inc(),
                    _ => stats.downstream_cx_protocol_error().inc(),
                }
                return shared.ended(remote, requests);
            }
        }
    }
}

#[allow(clippy::too_many_arguments)]
async fn stream(
    live: Rc<ConnectionManager>,
    worker: Rc<Worker>,
    info: Rc<ConnectionInfo>,
    drain: Drain,
    shared: Rc<Shared>,
    head: RequestHead,
    reader: h2::Reader,
    mut writer: h2::Writer,
) {
    let draining = Cell::new(false);
    let cx = Context {
        live: &live,
        worker: &worker,
        connection: &info,
        drain: &drain,
        draining: &draining,
    };
    let begun = moment::now();
    // A stream that was taken back before we looked at it costs neither a route nor an upstream.
    let taken_back = poll_fn(|cx| Poll::Ready(writer.poll_reset(cx).is_ready())).await;
    live.http2_stats.streams_active().inc();
    let reset = if taken_back {
        live.stats.downstream_rq_total().inc();
        live.stats.downstream_rq_rx_reset().inc();
        true
    } else {
        let mut reader: BodyReader<'_, Stream> = BodyReader::H2(reader);
        let mut timer = shared.timers.borrow_mut().pop().unwrap_or_default();
        let writer = &mut BodyWriter::H2(writer);
        // The connection's task ends its streams.
        let flags = exchange::request(&cx, head, &mut reader, writer, &mut timer, None).await;
        let reset = flags.has(Flags::DOWNSTREAM_REMOTE_RESET);
        let mut timers = shared.timers.borrow_mut();
        if timers.len() < TIMERS {
            timers.push(timer);
        }
        reset
    };
    live.http2_stats.streams_active().dec();
    let resets = &shared.resets;
    resets.closed.set(resets.closed.get() + 1);
    if reset && begun.elapsed() < PREMATURE {
        resets.premature.set(resets.premature.get() + 1);
    }
}

/// What the streams of a connection share.
#[derive(Debug, Default)]
struct Shared {
    resets: Resets,
    /// Timers that ended streams have left running: most streams end long before their limits of time, and the next one
    /// takes the timer as it is instead of setting one more.
    timers: RefCell<Vec<Timer>>,
}

impl Shared {
    /// How the connection has ended after so many streams.
    fn ended(&self, remote: bool, streams: u64) -> Ended {
        let active = streams > self.resets.closed.get();
        Ended { remote, active }
    }
}

/// Timers that are kept for streams to come.
const TIMERS: usize = 128;

/// Streams that a client takes back as soon as they are open (CVE-2023-44487), by Envoy's rule: a connection on which
/// half of the first 500 streams, or half of all later, ended like that is closed.
#[derive(Debug, Default)]
struct Resets {
    closed: Cell<u64>,
    premature: Cell<u64>,
}

impl Resets {
    fn are_too_many(&self) -> bool {
        self.premature.get() * 2 >= self.closed.get().max(RESETS_LIMIT)
    }
}

/// `overload.premature_reset_min_stream_lifetime_seconds`.
const PREMATURE: Duration = Duration::from_secs(1);

/// `overload.premature_reset_total_stream_count`.
const RESETS_LIMIT: u64 = 500;
