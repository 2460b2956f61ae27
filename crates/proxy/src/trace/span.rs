//! What a span tells of a request: Envoy's tags, and those of the configuration.

use std::time::{Duration, SystemTime};

use outrigger_http::Version;

use super::Trace;
use crate::{access_log::tag, http::Exchange, plan::tracing::Tracing, worker::Worker};

/// A record of a part of a trace.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) trace: u128,
    pub(crate) id: u64,
    pub(crate) parent: Option<u64>,
    /// The client has the same span.
    pub(crate) shared: bool,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) start: SystemTime,
    pub(crate) lasted: Duration,
    /// The request failed.
    pub(crate) failed: bool,
    pub(crate) tags: Vec<(String, String)>,
    /// `tracestate` of the client.
    pub(crate) state: String,
    /// Our address, where it is known.
    pub(crate) local: Option<std::net::SocketAddr>,
}

/// Which end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Client,
    Server,
}

impl Span {
    /// The span of a request.
    pub(super) fn of_request(
        trace: Trace,
        kind: Kind,
        name: String,
        tracing: &Tracing,
        exchange: &Exchange<'_>,
        worker: &Worker,
    ) -> Span {
        let mut tags = Tags(Vec::with_capacity(24));
        let request = &exchange.request;
        let header = |name| request.headers.get_str(name);
        let or_none = |value: Option<&str>| value.unwrap_or("-").to_owned();
        let node = &worker.bootstrap.node;
        tags.add("component", "proxy");
        tags.add("node_id", &*node.id);
        tags.add("zone", &*node.locality.zone);
        if let Some(id) = header("x-request-id") {
            tags.add("guid:x-request-id", id);
        }
        if let Some(id) = header("x-client-trace-id") {
            tags.add("guid:x-client-trace-id", id);
        }
        let path = header("x-envoy-original-path").unwrap_or(request.path());
        let path = cut(path, tracing.max_path_tag_length);
        let url = format!("{}://{}{path}", request.scheme(), request.authority());
        tags.add("http.url", url);
        tags.add("http.method", request.method.as_str());
        tags.add(
            "downstream_cluster",
            or_none(header("x-envoy-downstream-service-cluster")),
        );
        tags.add("user_agent", or_none(header("user-agent")));
        tags.add("http.protocol", protocol(request.version));
        if let Some(peer) = exchange.connection.direct_remote {
            tags.add("peer.address", peer.ip().to_string());
        }
        tags.add("request_size", exchange.progress.received.to_string());
        if request.is_grpc() {
            tags.add("grpc.path", request.path());
            tags.add("grpc.authority", request.authority());
            tags.add("grpc.content_type", or_none(header("content-type")));
            if let Some(timeout) = header("grpc-timeout") {
                tags.add("grpc.timeout", timeout);
            }
        }
        tags.add("response_size", exchange.progress.sent.to_string());
        let failed = outcome(exchange, &mut tags);
        for tag in &tracing.tags {
            if let Some(value) = tag::value(tag, exchange) {
                tags.add(&tag.name, value);
            }
        }
        Span {
            trace: trace.id,
            id: trace.span,
            parent: trace.parent,
            shared: trace.shared,
            kind,
            name,
            start: exchange.progress.start_time,
            lasted: exchange.duration(),
            failed,
            tags: tags.0,
            state: header("tracestate").unwrap_or_default().to_owned(),
            local: exchange.connection.local,
        }
    }

    /// The span of the attempt that ended a request.
    pub(super) fn of_upstream(trace: Trace, name: String, exchange: &Exchange<'_>) -> Span {
        let mut tags = Tags(Vec::with_capacity(12));
        tags.add("component", "proxy");
        if let Some(version) = exchange.upstream.protocol {
            tags.add("http.protocol", protocol(version));
        }
        if let Some(host) = &exchange.upstream.host {
            tags.add("peer.address", host.address.to_string());
        }
        let failed = outcome(exchange, &mut tags);
        let progress = &exchange.progress;
        let begin = progress.upstream_first_sent.unwrap_or(progress.start);
        let end = progress
            .upstream_last_received
            .or(progress.end)
            .unwrap_or(begin);
        Span {
            trace: trace.id,
            id: trace.child.unwrap_or_default(),
            parent: Some(trace.span),
            shared: false,
            kind: Kind::Client,
            name,
            start: progress.start_time + begin.saturating_duration_since(progress.start),
            lasted: end.saturating_duration_since(begin),
            failed,
            tags: tags.0,
            state: String::new(),
            local: exchange.upstream.local,
        }
    }
}

/// How it ended; whether it failed.
fn outcome(exchange: &Exchange<'_>, tags: &mut Tags) -> bool {
    let status = exchange.status();
    tags.add("http.status_code", status.to_string());
    let flags: Vec<_> = exchange.flags.short().collect();
    tags.add(
        "response_flags",
        match flags.is_empty() {
            true => "-".to_owned(),
            false => flags.join(","),
        },
    );
    if let Some(cluster) = exchange.upstream.cluster_name() {
        tags.add("upstream_cluster", cluster);
        tags.add("upstream_cluster.name", cluster);
    }
    if let Some(host) = &exchange.upstream.host {
        tags.add("upstream_address", host.address.to_string());
    }
    let mut failed = status == 0 || status >= 500;
    if exchange.request.is_grpc() {
        let of = |name| {
            let trailers = exchange.trailers.as_ref().and_then(|t| t.get_str(name));
            let head = exchange.response.as_ref();
            trailers.or_else(|| head.and_then(|head| head.headers.get_str(name)))
        };
        if let Some(code) = of("grpc-status") {
            tags.add("grpc.status_code", code);
            failed |= code.trim() != "0";
        }
        if let Some(message) = of("grpc-message") {
            tags.add("grpc.message", message);
        }
    }
    if failed {
        tags.add("error", "true");
    }
    failed
}

struct Tags(Vec<(String, String)>);

impl Tags {
    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((name.to_owned(), value.into()));
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::Http10 => "HTTP/1.0",
        Version::Http11 => "HTTP/1.1",
        Version::Http2 => "HTTP/2",
    }
}

/// The first bytes of a text, as whole characters.
fn cut(text: &str, most: usize) -> &str {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
