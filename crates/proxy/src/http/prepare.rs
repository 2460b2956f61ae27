//! What a connection manager does to a request before anything routes it: checks, the path's
//! normal form, who the client is, which x-envoy headers may stay, the request id.

use std::net::{IpAddr, SocketAddr};

use outrigger_http::{
    Method, Version,
    path::{EscapedSlashes, Normalized, PathRules},
    reason,
};

use super::{Exchange, Flags, LocalReply, stats::ConnectionManagerStats, xfcc};
use crate::{
    plan::{
        HttpConnectionManager,
        http::{self, ForwardProto, StripPort, Underscores},
    },
    router,
    worker::Worker,
};

/// Prepares a request; the error is the answer to it.
pub(super) fn prepare(
    plan: &HttpConnectionManager,
    worker: &Worker,
    stats: &ConnectionManagerStats,
    exchange: &mut Exchange<'_>,
) -> Result<(), LocalReply> {
    check(plan, exchange)?;
    path(plan, worker, stats, exchange)?;
    strip_host(plan, exchange);
    router::headers::mutate_request(&plan.early_header_mutations, exchange);
    let edge = client(plan, exchange);
    if !exchange.internal {
        clean(exchange, edge);
    }
    xfcc::set(plan, exchange);
    request_id(plan, worker, exchange, edge);
    if plan.add_user_agent {
        add_user_agent(worker, exchange);
    }
    if let Some(via) = &plan.via {
        append(&mut exchange.request.headers, "via", via.as_bytes(), ", ");
    }
    if exchange.request.expects_continue && !plan.proxy_100_continue {
        exchange.request.headers.remove("expect");
    }
    if exchange.request.upgrade && is_ignored_upgrade(exchange) {
        exchange.request.upgrade = false;
        exchange.request.headers.remove("upgrade");
        exchange.request.headers.remove("http2-settings");
    }
    Ok(())
}

fn check(plan: &HttpConnectionManager, exchange: &mut Exchange<'_>) -> Result<(), LocalReply> {
    let request = &mut exchange.request;
    if request.version == Version::Http10 {
        if !plan.http1.accept_http_10 {
            return Err(LocalReply::new(426, reason(426), "low_version")
                .flag(Flags::DOWNSTREAM_PROTOCOL_ERROR));
        }
        if let Some(host) = &plan.http1.default_host_for_http_10
            && request.authority().is_empty()
        {
            request.set_authority(host);
        }
    }
    if request.authority_bytes().is_empty() {
        return Err(LocalReply::new(400, "", "missing_host_header"));
    }
    // Its body is the question, and means nothing without a type (as Envoy has it).
    if matches!(&request.method, Method::Other(token) if &**token == "QUERY")
        && !request.headers.contains("content-type")
    {
        return Err(LocalReply::new(400, "", "query_missing_content_type"));
    }
    match plan.common.underscores {
        Underscores::Allow => {}
        Underscores::RejectRequest => {
            if request.headers.iter().any(|(name, _)| name.contains('_')) {
                // As in Envoy, where the codec refuses it: `transfer_encoding` may have been meant for somebody.
                let details = "http1.unexpected_underscore";
                return Err(LocalReply::new(400, "Bad Request", details)
                    .flag(Flags::DOWNSTREAM_PROTOCOL_ERROR)
                    .closing());
            }
        }
        Underscores::DropHeader => request.headers.retain(|name, _| !name.contains('_')),
    }
    Ok(())
}

/// Brings the path into its normal form.
pub(super) fn path(
    plan: &HttpConnectionManager,
    worker: &Worker,
    stats: &ConnectionManagerStats,
    exchange: &mut Exchange<'_>,
) -> Result<(), LocalReply> {
    let request = &mut exchange.request;
    if request.method == Method::Connect {
        return Ok(());
    }
    let path = request.path_bytes();
    if path.is_empty() {
        return Err(LocalReply::new(404, "", "missing_path_rejected"));
    }
    // `OPTIONS *`, too: it asks about the server, which no route leads to.
    if path[0] != b'/' {
        stats.downstream_rq_non_relative_path().inc();
        return Err(LocalReply::new(404, "", "absolute_path_rejected"));
    }
    if let Some(at) = memchr::memchr(b'#', path) {
        let reject = worker.bootstrap.runtime.get(FRAGMENT_SWITCH);
        if reject.is_none_or(|value| value != &serde_json::Value::Bool(false)) {
            stats.downstream_rq_failed_path_normalization().inc();
            return Err(LocalReply::new(400, "", "path_normalization_failed"));
        }
        let stripped = request.path()[..at].to_owned();
        request.set_path(&stripped);
    }
    let rules = PathRules {
        normalize: plan.normalize_path,
        merge_slashes: plan.merge_slashes,
        escaped_slashes: match plan.escaped_slashes {
            http::EscapedSlashes::KeepUnchanged => EscapedSlashes::Keep,
            http::EscapedSlashes::RejectRequest => EscapedSlashes::Reject,
            http::EscapedSlashes::UnescapeAndRedirect => EscapedSlashes::UnescapeAndRedirect,
            http::EscapedSlashes::UnescapeAndForward => EscapedSlashes::UnescapeAndForward,
        },
    };
    let grpc = request.is_grpc();
    match rules.apply(request.path()) {
        Normalized::Path(std::borrow::Cow::Borrowed(_)) => {}
        Normalized::Path(std::borrow::Cow::Owned(path)) => request.set_path(&path),
        // A gRPC client could not follow it.
        Normalized::Redirect(to) if !grpc => {
            stats.downstream_rq_redirected_with_normalized_path().inc();
            return Err(
                LocalReply::new(307, "", "path_normalization_failed").header("location", to)
            );
        }
        Normalized::Redirect(_) | Normalized::Reject => {
            stats.downstream_rq_failed_path_normalization().inc();
            return Err(LocalReply::new(400, "", "path_normalization_failed"));
        }
    }
    Ok(())
}

/// Envoy's runtime switch; Istio's bootstrap turns it off, then fragments are cut off.
const FRAGMENT_SWITCH: &str = "envoy.reloadable_features.http_reject_path_with_fragment";

fn strip_host(plan: &HttpConnectionManager, exchange: &mut Exchange<'_>) {
    if plan.strip_port == StripPort::Never && !plan.strip_trailing_host_dot {
        return;
    }
    let authority = exchange.request.authority();
    // The port as it is spelt: what is not stripped stays.
    let at = match authority.rfind(':') {
        Some(colon) if !authority[colon..].contains(']') => colon,
        _ => authority.len(),
    };
    let (mut host, mut port) = authority.split_at(at);
    let number = port.get(1..).and_then(|port| port.parse::<u32>().ok());
    let strip = match (plan.strip_port, number, exchange.connection.local) {
        (StripPort::Any, Some(_), _) => true,
        (StripPort::Matching, Some(port), Some(local)) => port == u32::from(local.port()),
        _ => false,
    };
    if strip {
        port = "";
    }
    if plan.strip_trailing_host_dot {
        host = host.strip_suffix('.').unwrap_or(host);
    }
    if host.len() + port.len() != authority.len() {
        let new = format!("{host}{port}");
        exchange.request.set_authority(&new);
    }
}

/// Host and port of an authority.
pub(crate) fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}

/// Finds out who the client is; tells whether this is the edge facing an external client.
fn client(plan: &HttpConnectionManager, exchange: &mut Exchange<'_>) -> bool {
    let peer = exchange.connection.remote.map(|address| address.ip());
    let hops = plan.xff_num_trusted_hops as usize;
    let headers = &mut exchange.request.headers;
    let forwarded = headers
        .joined("x-forwarded-for")
        .map(|value| value.into_owned());
    let (address, alone);
    if plan.use_remote_address {
        alone = forwarded.is_none();
        address = match hops {
            0 => peer,
            hops => forwarded
                .as_deref()
                .and_then(|value| from_right(value, hops - 1))
                .or(peer),
        };
        if !plan.skip_xff_append
            && let Some(peer) = peer
        {
            append(headers, "x-forwarded-for", peer.to_string().as_bytes(), ",");
        }
        if hops == 0 {
            headers.remove("x-forwarded-proto");
        }
    } else {
        address = forwarded
            .as_deref()
            .and_then(|value| from_right(value, hops));
        alone = forwarded
            .as_deref()
            .is_some_and(|value| !value.contains(&b','));
    }
    // Whoever balanced the connection before may have ended its TLS: then the port tells.
    let meant = exchange
        .connection
        .local
        .filter(|_| exchange.connection.local_restored);
    let by_port = |known: &ForwardProto| known.scheme(meant?.port());
    let scheme = match (
        plan.forward_proto.as_ref().and_then(by_port),
        &exchange.connection.tls,
    ) {
        (Some(scheme), _) => scheme,
        (None, Some(_)) => "https",
        (None, None) => "http",
    };
    // What whoever is trusted says stays, whatever it is.
    if let Some(scheme) = &plan.scheme_to_overwrite {
        headers.set("x-forwarded-proto", &**scheme);
    } else if !headers.contains("x-forwarded-proto") {
        headers.set("x-forwarded-proto", scheme);
    }
    let untrusted = plan.use_remote_address && hops == 0;
    if plan.append_x_forwarded_port
        && let Some(local) = exchange.connection.local
        && (untrusted || !headers.contains("x-forwarded-port"))
    {
        headers.set("x-forwarded-port", itoa::Buffer::new().format(local.port()));
    }
    exchange.internal =
        alone && address.is_some_and(|address| plan.internal_addresses.contains(address));
    exchange.client = address.or(peer);
    let edge = plan.use_remote_address && !exchange.internal;
    if exchange.internal {
        headers.set("x-envoy-internal", "true");
    } else {
        headers.remove("x-envoy-internal");
        if edge && let Some(client) = exchange.client {
            headers.set("x-envoy-external-address", client.to_string());
        }
    }
    let said = exchange.request.headers.get("x-forwarded-proto");
    match (&plan.scheme_to_overwrite, said) {
        (Some(scheme), _) => exchange.request.set_scheme(scheme),
        // What the client says stays, even where `x-forwarded-proto` says something else.
        (None, _) if !exchange.request.scheme().is_empty() => {}
        (None, Some(said)) if said.eq_ignore_ascii_case(b"https") => {
            exchange.request.set_scheme("https");
        }
        (None, Some(said)) if said.eq_ignore_ascii_case(b"http") => {
            exchange.request.set_scheme("http");
        }
        (None, _) => exchange.request.set_scheme(scheme),
    }
    edge
}

/// The address `skip` entries from the right of a list.
fn from_right(list: &[u8], skip: usize) -> Option<IpAddr> {
    let text = std::str::from_utf8(list).ok()?;
    let entry = text.rsplit(',').nth(skip)?.trim();
    entry
        .parse()
        .ok()
        .or_else(|| entry.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

/// Takes off what only internal clients may say.
fn clean(exchange: &mut Exchange<'_>, edge: bool) {
    let headers = &mut exchange.request.headers;
    if !headers.contains_prefix("x-envoy-") {
        return;
    }
    headers.retain(|name, _| {
        let envoy = name.len() > 8 && name.as_bytes()[..8].eq_ignore_ascii_case(b"x-envoy-");
        let is = |list: &[&str]| {
            list.iter()
                .any(|other| name[8..].eq_ignore_ascii_case(other))
        };
        !(envoy && (is(&INTERNAL) || edge && is(&EDGE)))
    });
}

/// Tells who sends this on, and answers for a client that does not say what it is.
fn add_user_agent(worker: &Worker, exchange: &mut Exchange<'_>) {
    let node = &worker.bootstrap.node;
    let headers = &mut exchange.request.headers;
    headers.set("x-envoy-downstream-service-cluster", &*node.cluster);
    if headers.get("user-agent").is_none_or(<[u8]>::is_empty) {
        headers.set("user-agent", &*node.cluster);
    }
    if !node.id.is_empty() {
        headers.set("x-envoy-downstream-service-node", &*node.id);
    }
}

/// `x-envoy-…` headers of internal clients.
const INTERNAL: [&str; 14] = [
    "retriable-status-codes",
    "retriable-header-names",
    "retry-on",
    "retry-grpc-on",
    "max-retries",
    "upstream-alt-stat-name",
    "upstream-rq-timeout-ms",
    "upstream-rq-per-try-timeout-ms",
    "upstream-rq-timeout-alt-response",
    "expected-rq-timeout-ms",
    "force-trace",
    "ip-tags",
    "original-url",
    "hedge-on-per-try-timeout",
];
/// `x-envoy-…` headers that pass inside the mesh, but not in from outside.
const EDGE: [&str; 5] = [
    "decorator-operation",
    "downstream-service-cluster",
    "downstream-service-node",
    "original-host",
    "original-path",
];

/// Gives the request an id where it has none, and decides about its trace.
fn request_id(
    plan: &HttpConnectionManager,
    worker: &Worker,
    exchange: &mut Exchange<'_>,
    edge: bool,
) {
    let headers = &mut exchange.request.headers;
    if plan.generate_request_id
        && (edge && !plan.preserve_external_request_id || !headers.contains("x-request-id"))
    {
        let id = worker.random.uuid().hyphenated();
        headers.set("x-request-id", id.encode_lower(&mut [0; 36]));
    }
    let Some(tracing) = &plan.tracing else { return };
    let id = headers
        .get("x-request-id")
        .and_then(|value| <[u8; 36]>::try_from(value).ok());
    let Some(mut id) = id else { return };
    // The version nibble says why a request is traced: 4 it is not, 9 sampled, a forced, b client.
    let reason = match id[14] {
        b'4' if exchange.internal && headers.contains("x-envoy-force-trace") => b'a',
        b'4' if headers.contains("x-client-trace-id")
            && tracing.client_sampling.hits(worker.random.bits()) =>
        {
            b'b'
        }
        b'4' if tracing.random_sampling.hits(worker.random.bits()) => b'9',
        known => known,
    };
    exchange.traced =
        matches!(reason, b'9' | b'a' | b'b') && tracing.overall_sampling.hits(worker.random.bits());
    if plan.pack_trace_reason && reason != id[14] {
        id[14] = reason;
        headers.set("x-request-id", id);
    }
}

/// `Upgrade: h2c` and `TLS/1.0…` are offers that a server may ignore (RFC 9110, 7.8).
fn is_ignored_upgrade(exchange: &Exchange<'_>) -> bool {
    exchange
        .request
        .headers
        .get("upgrade")
        .is_some_and(|value| {
            value.eq_ignore_ascii_case(b"h2c")
                || value
                    .get(..4)
                    .is_some_and(|start| start.eq_ignore_ascii_case(b"tls/"))
        })
}

/// Appends to a list header.
pub(crate) fn append(headers: &mut outrigger_http::Headers, name: &str, value: &[u8], comma: &str) {
    let joined = match headers.joined(name) {
        Some(old) if !old.is_empty() => [&old, comma.as_bytes(), value].concat(),
        _ => value.to_vec(),
    };
    headers.set(name, joined);
}

/// The flags and reply for a request that the codec refused.
pub(super) fn refused(refusal: outrigger_http::Refusal) -> LocalReply {
    LocalReply::new(refusal.status, reason(refusal.status), refusal.detail)
        .flag(Flags::DOWNSTREAM_PROTOCOL_ERROR)
}
