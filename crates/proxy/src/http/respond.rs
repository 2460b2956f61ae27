//! What a connection manager does to every response, and replies of our own.

use std::{cell::RefCell, sync::atomic::Ordering::Relaxed, time::SystemTime};

use bytes::Bytes;
use outrigger_http::{
    BodyReader, BodyWriter, Error, Frame, Framing, Method, ResponseHead, Version, h2,
};
use tokio::time::timeout;

use super::{Context, Exchange, LocalReply, bodies::flush_limit, hold};
use crate::{
    io::Stream,
    plan::{http::ServerHeader, listener::TrafficDirection, overload::Action},
    router,
    worker::moment,
};

/// Sends a reply of our own.
pub(super) async fn reply(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
    reply: LocalReply,
) {
    if reply.closes {
        writer.close_after();
    }
    router::note_cluster(exchange, cx.worker);
    let config = &cx.live.plan.local_reply;
    let (mut head, body) = match exchange.route.route().is_some() {
        true => reply.render_routed(exchange, config),
        false => reply.render(exchange, config),
    };
    // For filters; the route's operations on the head of a reply of our own know none yet, as in Envoy.
    exchange.upstream.status = head.status;
    let envoy = !cx.filters(exchange).router.suppress_envoy_headers;
    if exchange.flags.has(super::Flags::UPSTREAM_OVERFLOW) && envoy {
        head.headers.set("x-envoy-overloaded", "true");
    }
    let body = match cx.filters(exchange).take_bodies() {
        true => Box::pin(hold::filter_local(cx, exchange, &mut head, body)).await,
        false => {
            cx.filters(exchange)
                .response(exchange, &mut head, cx.worker);
            body
        }
    };
    send_reply(cx, exchange, reader, writer, (head, body)).await;
}

/// Sends a reply that no filter sees (any more).
pub(super) async fn send_reply(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
    (mut head, body): (ResponseHead, Bytes),
) {
    finish_head(cx, exchange, &mut head, false);
    if !request_is_over(reader).await {
        // The rest of the request may still come; what follows it could not be told from it.
        writer.close_after();
    }
    let own = flush_limit(&cx.live.plan, exchange);
    let limit = own.unwrap_or(cx.live.plan.stream_idle_timeout);
    let sent = {
        let sent = send(exchange, writer, head, body);
        match limit {
            Some(limit) => timeout(limit, sent).await,
            None => Ok(sent.await),
        }
    };
    match sent {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a reply could not be sent"),
        // Nobody takes it.
        Err(_) => {
            if own.is_some() && exchange.request.version == Version::Http2 {
                cx.live.http2_stats.tx_flush_timeout().inc();
            }
            cx.live.stats.downstream_rq_tx_reset().inc();
            abort(writer);
        }
    }
}

/// Whether the request's body was read; takes what is here already, without waiting.
async fn request_is_over(reader: &mut BodyReader<'_, Stream>) -> bool {
    std::future::poll_fn(|cx| {
        let mut left = DRAINED;
        loop {
            match reader.poll_frame(cx) {
                std::task::Poll::Ready(None) => return std::task::Poll::Ready(true),
                std::task::Poll::Ready(Some(Ok(Frame::Data(data)))) if data.len() < left => {
                    left -= data.len();
                }
                std::task::Poll::Ready(Some(Ok(Frame::Trailers(_)))) => {}
                _ => return std::task::Poll::Ready(reader.is_end()),
            }
        }
    })
    .await
}

/// Bytes of a body that are read and thrown away so that a connection can be kept.
const DRAINED: usize = 64 * 1024;

async fn send(
    exchange: &mut Exchange<'_>,
    writer: &mut BodyWriter<'_, Stream>,
    head: ResponseHead,
    body: Bytes,
) -> Result<(), Error> {
    exchange.progress.downstream_first_sent = Some(moment::now());
    writer.send_response(&head, head.framing)?;
    exchange.response = Some(head);
    if !body.is_empty() {
        exchange.progress.sent += body.len() as u64;
        writer.send_data(body)?;
    }
    writer.send_end(None)?;
    writer.flush().await
}

/// The headers that every response gets. `upstream`: it came from one.
pub(super) fn finish_head(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    head: &mut ResponseHead,
    upstream: bool,
) {
    let plan = &cx.live.plan;
    match plan.server_header {
        ServerHeader::Overwrite => head.headers.set("server", plan.server_name.as_bytes()),
        ServerHeader::AppendIfAbsent => {
            head.headers
                .set_if_absent("server", plan.server_name.as_bytes());
        }
        ServerHeader::PassThrough => {}
    }
    if !head.headers.contains("date") {
        DATE.with_borrow_mut(|date| head.headers.append("date", date.now()));
    }
    if let Some(via) = &plan.via {
        super::append(&mut head.headers, "via", via.as_bytes(), ", ");
    }
    let request = &exchange.request.headers;
    // Only internal clients can force a trace: of others the header is gone.
    let forced = exchange.internal && request.contains("x-envoy-force-trace");
    if (plan.always_set_request_id_in_response || forced)
        && let Some(id) = request.get("x-request-id")
    {
        head.headers.set("x-request-id", id);
    }
    if upstream {
        // Meant for us: the name that the server gave to the operation.
        if cx.live.tracer.is_some()
            && cx.connection.listener.traffic_direction == TrafficDirection::Outbound
        {
            let name = head.headers.get_str("x-envoy-decorator-operation");
            let name = name.filter(|name| !name.is_empty()).map(Into::into);
            exchange.operation = name.or(exchange.operation.take());
        }
        head.headers.remove("x-envoy-decorator-operation");
    }
    // A body that ends with the host's connection need not end the client's, who learns so, too, whether it has all of it.
    match (exchange.request.version, head.framing) {
        (Version::Http10, Framing::Chunked) => head.framing = Framing::UntilClose,
        (Version::Http11, Framing::UntilClose) => head.framing = Framing::Chunked,
        _ => {}
    }
    if exchange.request.method == Method::Head && head.framing != Framing::Tunnel {
        head.framing = Framing::None;
    }
    // Whether the upstream keeps its connection is no business of the client's.
    // Behind a CONNECT that failed may stand what was meant for its tunnel: not a request.
    head.keep_alive = exchange.request.method != Method::Connect || head.framing == Framing::Tunnel;
    if should_drain(cx) {
        cx.live.stats.downstream_cx_drain_close().inc();
        head.keep_alive = false;
        cx.draining.set(true);
    } else if exchange.request.version != Version::Http2
        && cx
            .worker
            .shared
            .overload
            .applies(Action::DisableHttpKeepalive, &cx.worker.random)
    {
        let stats = &cx.live.stats;
        stats.downstream_cx_overload_disable_keepalive().inc();
        head.keep_alive = false;
        cx.draining.set(true);
    }
}

/// Whether the connection should end with this response: its listener drains, or the process has failed its health check
/// and clients had better go elsewhere.
fn should_drain(cx: &Context<'_>) -> bool {
    let shared = &cx.worker.shared;
    cx.drain.should_close(&cx.worker.random)
        || shared.health_failed.load(Relaxed) && !cx.connection.listener.drain_modify_only
}

/// Ends a response that cannot be completed: the client must see that it is not.
pub(super) fn abort(writer: &mut BodyWriter<'_, Stream>) {
    writer.reset(h2::Reason::INTERNAL_ERROR);
}

/// The `date` header, made once a second.
#[derive(Default)]
struct Date {
    second: u64,
    text: String,
}

impl Date {
    fn now(&mut self) -> &str {
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        if since.as_secs() != self.second || self.text.is_empty() {
            self.second = since.as_secs();
            let stamp = jiff::Timestamp::from_second(self.second as i64).unwrap_or_default();
            self.text = stamp.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        }
        &self.text
    }
}

thread_local! {
    static DATE: RefCell<Date> = RefCell::default();
}

/// Says how many attempts were made, where the virtual host wants it said: of replies made here, too.
pub(super) fn tell_attempts(exchange: &Exchange<'_>, head: &mut ResponseHead) {
    let attempts = exchange.upstream.attempts;
    let told = exchange
        .route
        .get()
        .is_some_and(|(host, _)| host.include_attempt_count_in_response);
    if told && attempts > 0 {
        let mut text = itoa::Buffer::new();
        head.headers
            .set("x-envoy-attempt-count", text.format(attempts));
    }
}
