//! One request, from its head to its log line.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context as TaskContext, Poll},
    time::Instant,
};

use bytes::Bytes;
use outrigger_http::{
    BodyReader, BodyWriter, Frame, Framing, Headers, Method, RequestHead, reason,
};

use super::{
    Context, Exchange, Flags, LocalReply, failure::Gone, forward, prepare, pump::Kept, respond,
    route_stats, stats::ConnectionManagerStats, timers::Timer,
};
use crate::{
    filter::{InHand, Stage, Step},
    io::Stream,
    plan::{
        HttpConnectionManager, RouteConfiguration,
        format::wants_route_times,
        http::RouteSource,
        listener::TrafficDirection,
        overload::{Action, ShedPoint},
        route::RouteUpgrade,
        scoped_route::Scope,
    },
    router,
    worker::{Worker, moment},
};

/// Serves one request; its limits of time share the timer with the connection. Gives what is to be said of how it went.
///
/// On a connection whose chain drains it goes by the chain that has followed: the old one is kept for the bytes alone.
pub(super) async fn request(
    cx: &Context<'_>,
    head: RequestHead,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
    timer: &mut Timer,
    is_over: Option<&mut IsOver<'_>>,
) -> Flags {
    let drains = cx.drain.begun();
    let newest = match drains {
        true => cx.worker.listeners.newest_manager(cx.connection, cx.worker),
        false => None,
    };
    let cx = &Context {
        live: newest.as_deref().unwrap_or(cx.live),
        ..*cx
    };
    let stats = &cx.live.stats;
    stats.downstream_rq_total().inc();
    stats.downstream_rq_active().inc();
    let mut exchange = Exchange::new(cx.connection, head, cx.worker.random.bits());
    let denied = match drains {
        true => cx.worker.listeners.denies(cx.connection),
        false => None,
    };
    let handled = match denied {
        Some(why) => Err(LocalReply::new(403, "RBAC: access denied", why)),
        None => {
            let handled = {
                let work = pin!(handle(cx, &mut exchange, reader, writer, timer));
                unless_over(work, is_over).await
            };
            match handled {
                Some(handled) => handled,
                None => {
                    exchange.details = "downstream_local_disconnect".into();
                    respond::abort(writer);
                    Ok(())
                }
            }
        }
    };
    if let Err(reply) = handled {
        respond::reply(cx, &mut exchange, reader, writer, reply).await;
    }
    finish(cx, &mut exchange);
    exchange.flags
}

/// Whether a connection has to close now, whatever is being done on it; the task is woken when that changes.
pub(super) type IsOver<'a> = dyn FnMut(&mut TaskContext<'_>) -> bool + 'a;

/// What comes of the work, or nothing where the connection has to close before. The work stays where it is: it is large.
async fn unless_over<T>(
    mut work: Pin<&mut impl Future<Output = T>>,
    mut is_over: Option<&mut IsOver<'_>>,
) -> Option<T> {
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(done));
        }
        match is_over.as_mut().is_some_and(|is_over| is_over(cx)) {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    })
    .await
}

/// A message that could not be read as a request is answered and logged like one.
pub(super) async fn refused(
    cx: &Context<'_>,
    refusal: outrigger_http::Refusal,
    writer: &mut BodyWriter<'_, Stream>,
) {
    cx.live.stats.downstream_cx_protocol_error().inc();
    unread(cx, prepare::refused(refusal), writer).await;
}

/// Answers and logs what never became a request; the connection ends with it.
pub(super) async fn unread(
    cx: &Context<'_>,
    reply: LocalReply,
    writer: &mut BodyWriter<'_, Stream>,
) {
    let stats = &cx.live.stats;
    stats.downstream_rq_total().inc();
    stats.downstream_rq_active().inc();
    let method = Method::Other("".into());
    let head = RequestHead::new(outrigger_http::Version::Http11, method, "", "");
    let mut exchange = Exchange::new(cx.connection, head, cx.worker.random.bits());
    writer.close_after();
    respond::reply(cx, &mut exchange, &mut BodyReader::Empty, writer, reply).await;
    finish(cx, &mut exchange);
}

/// Everything between head and response; the error is the reply to send.
async fn handle(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
    timer: &mut Timer,
) -> Result<(), LocalReply> {
    let plan = &cx.live.plan;
    let overload = &cx.worker.shared.overload;
    if overload.applies(Action::StopAcceptingRequests, &cx.worker.random)
        || overload.sheds(ShedPoint::HttpDecodeHeaders, cx.worker)
    {
        return Err(overloaded(&cx.live.stats));
    }
    prepare::prepare(plan, cx.worker, &cx.live.stats, exchange)?;
    resolve(cx, exchange);
    begin_trace(cx, exchange);
    clean_internal_only(exchange);
    if plan.flush_access_log_on_new_request {
        log_as("DownstreamStart", cx, exchange);
    }
    if exchange.request.expects_continue && !plan.proxy_100_continue {
        // A client that is gone is noticed by whoever reads next.
        let _ = writer.send_informational(100, &Headers::new());
        let _ = writer.flush().await;
    }
    if exchange.request.upgrade {
        if !upgrade_allowed(plan, exchange) {
            cx.live.stats.downstream_rq_ws_on_non_ws_route().inc();
            return Err(LocalReply::new(403, "", "upgrade_failed"));
        }
        exchange.upgrade_filters = cx.live.filters_of_upgrade(upgrade_type(exchange));
    }
    let mut kept = None;
    loop {
        let Some(target) = filtered(cx, exchange, reader, writer, &mut kept).await? else {
            return Ok(());
        };
        kept = forward::forward(cx, exchange, reader, writer, timer, target, kept).await;
        if kept.is_none() {
            return Ok(());
        }
        // A redirect of the upstream is followed: the request goes through all of it again.
        exchange.upstream.host = None;
        exchange.filters.begin_again();
    }
}

/// Runs the filters and finds the cluster; `None` when the client went away meanwhile.
async fn filtered(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
    kept: &mut Option<Kept>,
) -> Result<Option<router::Target>, LocalReply> {
    for index in 0..cx.filters(exchange).len() {
        let mut step = ask_filter(cx, exchange, kept, index, Stage::Head);
        loop {
            match step {
                Step::Continue => break,
                Step::Reply(reply) => return Err(reply),
                Step::Buffer(limit) => {
                    if kept.is_none() && !exchange.request.upgrade {
                        let all =
                            read_body(cx, exchange, reader, limit.into(), false, None).await?;
                        tell_length(&all, exchange);
                        *kept = Some(all);
                    }
                    break;
                }
                Step::Body { limit, partial } => {
                    // Another filter may have wanted less of it.
                    let enough = |kept: &Kept| kept.complete || partial || !kept.is_whole();
                    if !kept.as_ref().is_some_and(enough) {
                        let limit = limit.into();
                        let begun = kept.take();
                        *kept = Some(read_body(cx, exchange, reader, limit, partial, begun).await?);
                    }
                    let body = kept.as_ref();
                    let seen = body.map_or_else(Bytes::new, |kept| kept.first(limit as usize));
                    let whole = body.is_some_and(|kept| kept.complete && kept.size() == seen.len());
                    if !whole && !partial {
                        return Err(too_large(&cx.live.stats));
                    }
                    let stage = Stage::Buffered(seen, whole);
                    step = ask_filter(cx, exchange, kept, index, stage);
                }
                Step::Wait(pause) => {
                    let slept = tokio::time::sleep(pause);
                    if let Err(how) = while_there(slept, reader, writer).await {
                        return Ok(gone(how, exchange, writer));
                    }
                    step = ask_filter(cx, exchange, kept, index, Stage::Resumed);
                }
                Step::Ask(answer) => {
                    let answer = match while_there(answer, reader, writer).await {
                        Ok(answer) => answer,
                        Err(how) => return Ok(gone(how, exchange, writer)),
                    };
                    let stage = Stage::Answered(answer);
                    step = ask_filter(cx, exchange, kept, index, stage);
                }
            }
        }
        if std::mem::take(&mut exchange.clear_route) {
            resolve(cx, exchange);
        }
    }
    let envoy_headers = !cx.filters(exchange).router.suppress_envoy_headers;
    let target = match router::target(exchange, cx.worker, envoy_headers) {
        Ok(target) => target,
        Err(reply) => {
            count(cx, exchange, &reply);
            return Err(reply);
        }
    };
    router::strict::check(&cx.filters(exchange).router.strict_check_headers, exchange)?;
    cx.live.stats.rq_total().inc();
    Ok(Some(target))
}

/// Runs one filter on the request; one that may change bodies is lent what was read of it.
fn ask_filter(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    kept: &mut Option<Kept>,
    index: usize,
    at: Stage,
) -> Step {
    let filters = cx.filters(exchange);
    if !filters.takes_bodies(index) {
        return filters.request(index, exchange, at, cx.worker);
    }
    if let Some(kept) = kept.as_mut().filter(|kept| kept.complete) {
        exchange.filters.in_hand = Some(Box::new(InHand {
            body: kept.first(usize::MAX),
            changed: false,
            trailers: kept.trailers.take(),
        }));
    }
    let step = filters.request(index, exchange, at, cx.worker);
    if let Some(hand) = exchange.filters.in_hand.take() {
        // A request without a body may have got one.
        let kept = kept.get_or_insert_with(|| Kept::new(true, u64::MAX));
        kept.complete = true;
        kept.trailers = hand.trailers;
        if hand.changed {
            kept.replace(hand.body);
        }
    }
    step
}

/// Reads a request's body, or more of it: all, or with `partial` at least so many bytes.
async fn read_body(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    reader: &mut BodyReader<'_, Stream>,
    limit: u64,
    partial: bool,
    begun: Option<Kept>,
) -> Result<Kept, LocalReply> {
    let most = if partial { u64::MAX } else { limit };
    let mut kept = begun.unwrap_or_else(|| Kept::new(true, most));
    kept.limit_to(most);
    let filters = cx.filters(exchange);
    let read = async {
        loop {
            match std::future::poll_fn(|cx| reader.poll_frame(cx)).await {
                Some(Ok(Frame::Data(mut data))) => {
                    exchange.progress.received += data.len() as u64;
                    if let Err(refusal) = filters.request_data(exchange, &mut data) {
                        let reply =
                            LocalReply::new(refusal.status, reason(refusal.status), refusal.detail);
                        return Err(reply.flag(Flags::DOWNSTREAM_PROTOCOL_ERROR));
                    }
                    if data.is_empty() {
                        continue;
                    }
                    kept.add(&data);
                    if !kept.is_whole() {
                        return Err(too_large(&cx.live.stats));
                    }
                    if partial && kept.size() as u64 >= limit {
                        return Ok(false);
                    }
                }
                Some(Ok(Frame::Trailers(mut trailers))) => {
                    if let Some(added) = filters.request_end(exchange, Some(&mut trailers)) {
                        kept.add(&added);
                    }
                    kept.trailers = Some(trailers);
                    break;
                }
                None => {
                    if let Some(added) = filters.request_end(exchange, None) {
                        kept.add(&added);
                    }
                    break;
                }
                Some(Err(_)) => {
                    return Err(LocalReply::new(
                        400,
                        "Bad Request",
                        "downstream_remote_disconnect",
                    )
                    .flag(Flags::DOWNSTREAM_CONNECTION_TERMINATION));
                }
            }
        }
        Ok(true)
    };
    // The limits of a request that waits here are those of one that goes on: nothing is read for ever.
    let plan = &cx.live.plan;
    let longest = [plan.request_timeout, plan.stream_idle_timeout]
        .into_iter()
        .flatten()
        .min();
    let complete = match longest {
        None => read.await?,
        Some(longest) => match tokio::time::timeout(longest, read).await {
            Ok(read) => read?,
            Err(_) => {
                cx.live.stats.downstream_rq_timeout().inc();
                return Err(LocalReply::new(
                    408,
                    "request timeout",
                    "request_overall_timeout",
                ));
            }
        },
    };
    kept.complete = complete;
    if complete {
        exchange.progress.request_received = Some(moment::now());
    }
    Ok(kept)
}

/// The length of a request that was read as a whole is known now, and the upstream is told.
fn tell_length(kept: &Kept, exchange: &mut Exchange<'_>) {
    if kept.trailers.is_none() && exchange.request.framing == Framing::Chunked {
        let length = kept.size();
        exchange.request.framing = Framing::Length(length as u64);
        exchange
            .request
            .headers
            .set("content-length", itoa::Buffer::new().format(length));
        exchange.request.headers.remove("transfer-encoding");
    }
}

fn too_large(stats: &ConnectionManagerStats) -> LocalReply {
    stats.downstream_rq_too_large().inc();
    LocalReply::new(413, "Payload Too Large", "request_payload_too_large")
}

/// Takes off what only internal clients may say to these routes.
fn clean_internal_only(exchange: &mut Exchange<'_>) {
    if !exchange.internal
        && let Some(routes) = exchange.route.configuration()
        && !routes.internal_only_headers.is_empty()
    {
        let names = routes.internal_only_headers.clone();
        names.iter().for_each(|name| {
            exchange.request.headers.remove(name);
        });
    }
}

/// Finds the route of a request. Clocks are read for it only where the answer is wanted.
pub(super) fn resolve(cx: &Context<'_>, exchange: &mut Exchange<'_>) {
    let plan = &cx.live.plan;
    let timed = plan.record_route_resolution_stats || wants_route_times();
    let begun = timed.then(Instant::now);
    exchange.find_route(routes(plan, cx.worker, exchange));
    // Not the number that decided about the route: the two draws are independent.
    router::draw(exchange, || cx.worker.random.bits());
    exchange.resolution.count += 1;
    if let Some(begun) = begun {
        exchange.resolution.lasted += begun.elapsed();
    }
}

/// The route configuration of a request.
fn routes(
    plan: &HttpConnectionManager,
    worker: &Worker,
    exchange: &Exchange<'_>,
) -> Option<Arc<RouteConfiguration>> {
    match &plan.routes {
        RouteSource::Inline(routes) => Some(routes.clone()),
        RouteSource::Rds { name, .. } => worker.routes.find(name),
        RouteSource::Scoped { routes, .. } => match routes.find(exchange)? {
            Scope::Inline(routes) => Some(routes.clone()),
            Scope::Named(name) => worker.routes.find(name),
        },
    }
}

/// The answer to a request that is refused because of load.
pub(super) fn overloaded(stats: &ConnectionManagerStats) -> LocalReply {
    stats.downstream_rq_overload_close().inc();
    LocalReply::new(503, "envoy overloaded", "overload").flag(Flags::OVERLOAD_MANAGER)
}

/// What a filter waits for; the error is a client that went away before.
async fn while_there<T>(
    what: impl Future<Output = T>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
) -> Result<T, Gone> {
    let gone = std::future::poll_fn(|cx| super::failure::poll_gone(cx, reader, writer));
    tokio::select! {
        biased;
        value = what => Ok(value),
        gone = gone => Err(gone),
    }
}

/// Nobody waits for an answer any more.
fn gone(
    how: Gone,
    exchange: &mut Exchange<'_>,
    writer: &mut BodyWriter<'_, Stream>,
) -> Option<router::Target> {
    how.tell(exchange);
    respond::abort(writer);
    None
}

/// Counts a request that the router answers itself.
fn count(cx: &Context<'_>, exchange: &Exchange<'_>, reply: &LocalReply) {
    let stats = &cx.live.stats;
    if reply.flags.has(Flags::NO_ROUTE_FOUND) {
        stats.no_route().inc();
    } else if reply.flags.has(Flags::NO_CLUSTER_FOUND) {
        stats.no_cluster().inc();
    } else if exchange.route.tls_redirect || (300..400).contains(&reply.status) {
        stats.rq_redirect().inc();
    } else {
        stats.rq_direct_response().inc();
    }
}

/// What a request wants its connection to become.
fn upgrade_type<'e>(exchange: &'e Exchange<'_>) -> &'e str {
    let named = || exchange.request.headers.get_str("upgrade");
    match exchange.request.method {
        Method::Connect => "connect",
        _ => named().unwrap_or_default(),
    }
}

/// Whether the route, or else the connection manager, lets this upgrade through.
fn upgrade_allowed(plan: &HttpConnectionManager, exchange: &Exchange<'_>) -> bool {
    let asked = upgrade_type(exchange);
    let action = exchange.route.action();
    let own = action.and_then(|action| {
        let is = |upgrade: &&RouteUpgrade| upgrade.upgrade_type.eq_ignore_ascii_case(asked);
        action.upgrades.iter().find(is)
    });
    match own {
        Some(upgrade) => upgrade.enabled,
        // Without a route there is a better answer than 403.
        None if action.is_none() => true,
        None => plan
            .upgrades
            .iter()
            .any(|upgrade| upgrade.enabled && upgrade.upgrade_type.eq_ignore_ascii_case(asked)),
    }
}

/// Counts and logs what has happened.
fn finish(cx: &Context<'_>, exchange: &mut Exchange<'_>) {
    exchange.progress.end.get_or_insert_with(Instant::now);
    let stats = &cx.live.stats;
    stats.downstream_rq_active().dec();
    match exchange.status() {
        0 => {}
        status => stats.response(status),
    }
    stats
        .downstream_rq_time()
        .record(exchange.duration().as_millis() as u64);
    if cx.live.plan.record_route_resolution_stats {
        let found = exchange.resolution;
        stats
            .downstream_rq_route_resolution_time_us()
            .record(found.lasted.as_micros() as u64);
        stats
            .downstream_rq_route_resolutions()
            .record(found.count.into());
    }
    route_stats::count(cx, exchange);
    cx.filters(exchange).complete(exchange, cx.worker);
    if let (Some(tracer), Some(tracing)) = (&cx.live.tracer, &cx.live.plan.tracing) {
        tracer.finish(tracing, exchange, cx.worker);
    }
    log(cx, exchange);
}

/// Finds the place of a request in its trace.
fn begin_trace(cx: &Context<'_>, exchange: &mut Exchange<'_>) {
    let Some(tracer) = &cx.live.tracer else {
        return;
    };
    tracer.begin(exchange, cx.worker);
    if exchange.connection.listener.traffic_direction != TrafficDirection::Outbound {
        // The client's proxy has said what it calls the operation.
        let name = exchange
            .request
            .headers
            .get_str("x-envoy-decorator-operation");
        exchange.operation = name.filter(|name| !name.is_empty()).map(Into::into);
        exchange
            .request
            .headers
            .remove("x-envoy-decorator-operation");
    }
}

/// Logs a request that goes on.
pub(super) fn log_as(log_type: &'static str, cx: &Context<'_>, exchange: &mut Exchange<'_>) {
    let end = std::mem::replace(&mut exchange.log_type, log_type);
    log(cx, exchange);
    exchange.log_type = end;
}

fn log(cx: &Context<'_>, exchange: &Exchange<'_>) {
    for log in &cx.live.logs {
        log.log(exchange, cx.worker.random.bits());
    }
}
