//! The values of Envoy's `%OPERATORS%`, for log lines and for header values.

use std::{
    io::Write,
    net::SocketAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use outrigger_http::Headers;
use serde_json::Value;

use super::{Lines, grpc_status, time};
use crate::{
    http::Exchange,
    plan::{
        Metadata,
        format::{
            AddressPart, DurationUnit, NameOrder, Operator, OperatorKind, Original, Part, Template,
            TimePoint,
        },
        format_sources::TextSource,
        matcher::query_parameter,
    },
};

/// What an operator wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// Nothing: there is no such value.
    Absent,
    /// Text.
    Text,
    /// A number or a structure, as JSON.
    Json,
}

/// A text log line; absent values are `-`, or nothing.
pub(super) fn text(
    template: &Template,
    exchange: &Exchange<'_>,
    omit_empty: bool,
    lines: Lines,
    out: &mut Vec<u8>,
) {
    for part in &template.parts {
        match part {
            Part::Text(text) => out.extend_from_slice(text.as_bytes()),
            Part::Operator(operator) => {
                let at = out.len();
                if self::operator(operator, exchange, None, out) == Presence::Absent {
                    if !omit_empty {
                        out.push(b'-');
                    }
                    continue;
                }
                if lines == Lines::Any {
                    continue;
                }
                for byte in &mut out[at..] {
                    if matches!(byte, b'\n' | b'\r') {
                        *byte = b' ';
                    }
                }
            }
        }
    }
}

/// A header value; absent values are nothing. `response`: the response's fields while they are
/// being worked on.
pub(crate) fn header_value(
    template: &Template,
    exchange: &Exchange<'_>,
    response: Option<&Headers>,
    out: &mut Vec<u8>,
) {
    for part in &template.parts {
        match part {
            Part::Text(text) => out.extend_from_slice(text.as_bytes()),
            Part::Operator(operator) => {
                self::operator(operator, exchange, response, out);
            }
        }
    }
}

/// Writes the value of one operator, cut to its maximum length.
pub(super) fn operator(
    operator: &Operator,
    exchange: &Exchange<'_>,
    response: Option<&Headers>,
    out: &mut Vec<u8>,
) -> Presence {
    let at = out.len();
    let presence = value(&operator.kind, exchange, response, out);
    if let Some(length) = operator.max_length
        && presence == Presence::Text
    {
        out.truncate(out.len().min(at + length));
    }
    presence
}

fn value(
    kind: &OperatorKind,
    exchange: &Exchange<'_>,
    response: Option<&Headers>,
    out: &mut Vec<u8>,
) -> Presence {
    use OperatorKind as Op;
    let response = response.or_else(|| exchange.response.as_ref().map(|head| &head.headers));
    let progress = &exchange.progress;
    let upstream = &exchange.upstream;
    let connection = exchange.connection;
    let route = exchange.route.get();
    let since_start =
        |at: Option<Instant>| at.map(|at| at.saturating_duration_since(progress.start));
    if exchange.tcp
        && matches!(
            kind,
            Op::Req { .. }
                | Op::ReqWithoutQuery { .. }
                | Op::Path { .. }
                | Op::QueryParam(_)
                | Op::Protocol
        )
    {
        return Presence::Absent;
    }
    match kind {
        Op::Req { name, alternative } => text_of(
            either(name, alternative, |name| exchange.request.get(name)),
            out,
        ),
        Op::ReqWithoutQuery { name, alternative } => {
            let found = either(name, alternative, |name| exchange.request.get(name));
            text_of(
                found.and_then(|value| value.split(|&byte| byte == b'?').next()),
                out,
            )
        }
        Op::Resp { name, alternative } => {
            if &**name == ":status" {
                return match exchange.status() {
                    0 => Presence::Absent,
                    status => text_of(Some(itoa::Buffer::new().format(status).as_bytes()), out),
                };
            }
            text_of(either(name, alternative, |name| response?.get(name)), out)
        }
        Op::Trailer { name, alternative } => {
            let trailers = exchange.trailers.as_ref();
            text_of(either(name, alternative, |name| trailers?.get(name)), out)
        }
        Op::Path {
            without_query,
            original,
        } => {
            let old = exchange.request.headers.get("x-envoy-original-path");
            let path = match original {
                Original::OrPath => old.or_else(|| exchange.request.get(":path")),
                Original::Path => exchange.request.get(":path"),
                Original::Only => old,
            };
            let cut = |path: &'_ [u8]| -> usize {
                match without_query {
                    true => memchr::memchr(b'?', path).unwrap_or(path.len()),
                    false => path.len(),
                }
            };
            text_of(path.map(|path| &path[..cut(path)]), out)
        }
        Op::QueryParam(name) => {
            let found = query_parameter(exchange.request.path().as_bytes(), name.as_bytes());
            let found = found.map(|value| unescape(&String::from_utf8_lossy(value)));
            text_of(found.as_deref().map(str::as_bytes), out)
        }
        Op::QueryParams { decoded } => {
            let path = exchange.request.path();
            let query = path.split_once('?').map(|(_, query)| query);
            match (query, decoded) {
                (Some(query), true) => not_empty(&unescape(query), out),
                (query, _) => not_empty(query.unwrap_or_default(), out),
            }
        }
        Op::CommonDuration { from, to, unit } => {
            let points = point(*from, exchange).zip(point(*to, exchange));
            // The other way round there is none, as in Envoy.
            match points.and_then(|(from, to)| to.checked_duration_since(from)) {
                Some(lasted) => {
                    let number_of = match unit {
                        DurationUnit::Milliseconds => lasted.as_millis(),
                        DurationUnit::Microseconds => lasted.as_micros(),
                        DurationUnit::Nanoseconds => lasted.as_nanos(),
                    };
                    number(number_of as u64, out)
                }
                None => Presence::Absent,
            }
        }
        Op::UniqueId => {
            let id = uuid::Uuid::new_v4();
            text_of(
                Some(id.hyphenated().encode_lower(&mut [0; 36]).as_bytes()),
                out,
            )
        }
        Op::UpstreamHostsAttempted(part) => {
            let at = out.len();
            for host in &upstream.tried {
                if out.len() > at {
                    out.push(b',');
                }
                match &host.address {
                    crate::plan::Address::Socket(socket) => {
                        address(Some(*socket), *part, out);
                    }
                    other => out.extend_from_slice(other.to_string().as_bytes()),
                }
            }
            if out.len() > at {
                Presence::Text
            } else {
                Presence::Absent
            }
        }
        Op::UpstreamHostNamesAttempted { with_port } => {
            let name = |host: &std::sync::Arc<crate::cluster::Host>| {
                let name = match host.hostname.is_empty() {
                    true => host.address.to_string(),
                    false => host.hostname.to_string(),
                };
                match with_port {
                    true => name,
                    false => crate::http::split_port(&name).0.to_owned(),
                }
            };
            let names: Vec<String> = upstream.tried.iter().map(name).collect();
            not_empty(&names.join(","), out)
        }
        Op::VirtualClusterName => not_empty(
            route
                .and_then(|(host, _)| host.named_virtual_cluster(exchange))
                .unwrap_or_default(),
            out,
        ),
        Op::StartTime(format) => {
            time::write(format, progress.start_time, out);
            Presence::Text
        }
        Op::EmitTime(format) => {
            time::write(format, std::time::SystemTime::now(), out);
            Presence::Text
        }
        Op::RequestDuration => millis(since_start(progress.request_received), out),
        Op::RequestTxDuration => millis(since_start(progress.upstream_last_sent), out),
        Op::ResponseDuration => millis(since_start(progress.upstream_first_received), out),
        Op::ResponseTxDuration => millis(
            progress
                .end
                .zip(progress.upstream_first_received)
                .map(|(end, first)| end.saturating_duration_since(first)),
            out,
        ),
        Op::Duration => millis(Some(exchange.duration()), out),
        Op::BytesReceived => number(progress.received, out),
        Op::BytesSent => number(progress.sent, out),
        Op::RequestHeadersBytes => {
            let request = &exchange.request;
            // HTTP/1's `host` is told once, as `:authority`.
            let host = |host: &[u8]| "host".len() + host.len();
            let host = request.headers.get("host").map_or(0, host);
            let of = |name: &str| request.get(name).map_or(0, |v| name.len() + v.len());
            let pseudo: usize = [":method", ":path", ":authority", ":scheme"]
                .map(of)
                .iter()
                .sum();
            number((pseudo + bare_size(&request.headers) - host) as u64, out)
        }
        Op::ResponseHeadersBytes => number(
            response.map_or(0, |headers| (STATUS_BYTES + bare_size(headers)) as u64),
            out,
        ),
        Op::DownstreamHeaderBytesReceived => {
            number(exchange.request.headers.wire_size() as u64, out)
        }
        Op::UpstreamHeaderBytesSent | Op::UpstreamWireBytesSent if upstream.host.is_none() => {
            number(0, out)
        }
        Op::UpstreamHeaderBytesReceived | Op::UpstreamWireBytesReceived
            if upstream.host.is_none() =>
        {
            number(0, out)
        }
        Op::UpstreamHeaderBytesSent => number(exchange.request.headers.wire_size() as u64, out),
        Op::DownstreamHeaderBytesSent | Op::UpstreamHeaderBytesReceived => number(
            response.map_or(0, |headers| headers.wire_size() as u64),
            out,
        ),
        Op::ResponseTrailersBytes => number(
            exchange
                .trailers
                .as_ref()
                .map_or(0, |trailers| bare_size(trailers) as u64),
            out,
        ),
        Op::DownstreamWireBytesReceived => number(
            progress.received + exchange.request.headers.wire_size() as u64,
            out,
        ),
        Op::UpstreamWireBytesSent => number(
            progress.received + exchange.request.headers.wire_size() as u64,
            out,
        ),
        Op::DownstreamWireBytesSent | Op::UpstreamWireBytesReceived => {
            let head = response.map_or(0, |headers| headers.wire_size() as u64);
            number(progress.sent + head, out)
        }
        Op::Protocol => text_of(Some(exchange.request.version.as_str().as_bytes()), out),
        Op::UpstreamProtocol => text_of(
            upstream.protocol.map(|version| version.as_str().as_bytes()),
            out,
        ),
        Op::ResponseCode => number(exchange.status().into(), out),
        Op::ResponseCodeDetails { white_space } => {
            let at = out.len();
            let presence = not_empty(&exchange.details, out);
            if !white_space {
                underscore(&mut out[at..]);
            }
            presence
        }
        Op::ConnectionTerminationDetails => text_of(
            connection.termination_details.as_deref().map(str::as_bytes),
            out,
        ),
        Op::ResponseFlags => joined(exchange.flags.short(), out),
        Op::ResponseFlagsLong => joined(exchange.flags.long(), out),
        Op::GrpcStatus(_) | Op::GrpcStatusNumber if !exchange.request.is_grpc() => Presence::Absent,
        Op::GrpcStatus(form) => match grpc_status::of(exchange) {
            None => Presence::Absent,
            Some(status) => grpc_status::write(status, *form, out),
        },
        Op::GrpcStatusNumber => match grpc_status::of(exchange) {
            None => Presence::Absent,
            Some(status) => number(status.into(), out),
        },
        Op::UpstreamHost(part) | Op::UpstreamRemoteAddress(part) => {
            match upstream.host.as_ref().map(|host| &host.address) {
                Some(crate::plan::Address::Socket(socket)) => address(Some(*socket), *part, out),
                Some(other) => not_empty(&other.to_string(), out),
                None => Presence::Absent,
            }
        }
        Op::UpstreamHostName | Op::UpstreamHostNameWithoutPort => {
            let Some(host) = &upstream.host else {
                return Presence::Absent;
            };
            if !host.hostname.is_empty() {
                let name = match kind {
                    Op::UpstreamHostNameWithoutPort => crate::http::split_port(&host.hostname).0,
                    _ => &host.hostname,
                };
                return not_empty(name, out);
            }
            match (&host.address, kind) {
                (crate::plan::Address::Socket(socket), Op::UpstreamHostNameWithoutPort) => {
                    not_empty(&socket.ip().to_string(), out)
                }
                (address, _) => not_empty(&address.to_string(), out),
            }
        }
        // A cluster that is named but does not exist is none.
        Op::UpstreamCluster => {
            let name = upstream.cluster.as_ref().map(|cluster| cluster.stat_name());
            not_empty(name.map_or("", |name| &**name), out)
        }
        Op::UpstreamClusterRaw => {
            let name = upstream.cluster.as_ref().and(upstream.cluster_name());
            text_of(name.map(str::as_bytes), out)
        }
        Op::UpstreamLocalAddress(part) => address(upstream.local, *part, out),
        Op::UpstreamRequestAttemptCount => number(upstream.attempts.into(), out),
        Op::UpstreamTransportFailureReason => underscored(&upstream.failure, out),
        Op::DownstreamRemoteAddress(part) => {
            let port = connection.remote.map_or(0, |remote| remote.port());
            // The client by the rules about x-forwarded-for; its port is known only of the peer.
            let same = connection.remote.map(|remote| remote.ip()) == exchange.client;
            let port = if same { port } else { 0 };
            address(
                exchange.client.map(|ip| SocketAddr::new(ip, port)),
                *part,
                out,
            )
        }
        Op::DownstreamDirectRemoteAddress(part) => address(connection.direct_remote, *part, out),
        Op::DownstreamLocalAddress(part) | Op::DownstreamDirectLocalAddress(part) => {
            address(connection.local, *part, out)
        }
        Op::ConnectionId => number(connection.id, out),
        Op::StreamId => not_empty(
            exchange
                .request
                .headers
                .get_str("x-request-id")
                .unwrap_or_default(),
            out,
        ),
        Op::RequestedServerName { name, host } => {
            let sni = connection.requested_server_name.as_deref();
            let sni = sni.map(str::as_bytes);
            let host = || {
                let old = exchange.request.headers.get("x-envoy-original-host");
                let now = || exchange.request.get(":authority");
                match host {
                    _ if exchange.tcp => None,
                    Original::OrPath => old.or_else(now),
                    Original::Path => now(),
                    Original::Only => old,
                }
            };
            let found = match name {
                NameOrder::SniOnly => sni,
                NameOrder::SniFirst => sni.or_else(host),
                NameOrder::HostFirst => host().or(sni),
            };
            text_of(found, out)
        }
        Op::Coalesce(operators) => {
            let at = out.len();
            for operator in operators {
                let presence = self::operator(operator, exchange, response, out);
                if presence != Presence::Absent && out.len() > at {
                    return presence;
                }
                out.truncate(at);
            }
            Presence::Absent
        }
        // None of these can be set here.
        Op::CustomFlags => text_of(Some(b""), out),
        Op::EndpointId | Op::ClientFingerprint => Presence::Absent,
        Op::DownstreamHandshakeDuration => {
            let over = connection.secured.filter(|_| exchange.tcp);
            let lasted = over.map(|over| over.saturating_duration_since(connection.accepted));
            millis(lasted, out)
        }
        Op::UpstreamConnectionId => match upstream.established {
            Some(established) => number(established.id, out),
            None => Presence::Absent,
        },
        Op::UpstreamConnectionIdsAttempted => {
            let ids: Vec<String> = upstream.connections.iter().map(u64::to_string).collect();
            not_empty(&ids.join(","), out)
        }
        Op::UpstreamPoolReadyDuration => millis(upstream.pool_ready, out),
        // Nothing else was seen so far, as Envoy says of connections that are open.
        Op::DownstreamDetectedCloseType => text_of(
            Some(upstream.closed.downstream.unwrap_or("Normal").as_bytes()),
            out,
        ),
        Op::DownstreamLocalCloseReason => word(upstream.closed.downstream_why, out),
        Op::UpstreamDetectedCloseType => word(upstream.closed.upstream, out),
        Op::UpstreamLocalCloseReason => word(upstream.closed.upstream_why, out),
        Op::FilterChainMetadata { namespace, path } => metadata(
            connection.chain.as_ref().map(|chain| &chain.metadata),
            namespace,
            path,
            out,
        ),
        Op::RouteResolutionCount => number(exchange.resolution.count.into(), out),
        Op::RouteResolutionTime => number(exchange.resolution.lasted.as_micros() as u64, out),
        Op::RouteName => not_empty(route.map_or("", |(_, route)| &route.name), out),
        Op::VirtualHostName => not_empty(route.map_or("", |(host, _)| &host.name), out),
        Op::FilterChainName => not_empty(
            connection.chain.as_ref().map_or("", |chain| &chain.name),
            out,
        ),
        Op::AccessLogType => not_empty(exchange.log_type, out),
        Op::Cel { expression, typed } => super::cel::write(expression, *typed, exchange, out),
        Op::TraceId => match exchange.trace {
            None => Presence::Absent,
            Some(trace) if trace.id >> 64 == 0 => not_empty(&format!("{:016x}", trace.id), out),
            Some(trace) => not_empty(&format!("{:032x}", trace.id), out),
        },
        Op::SpanId => match exchange.trace {
            None => Presence::Absent,
            Some(trace) => not_empty(&format!("{:016x}", trace.span), out),
        },
        // As in Envoy, nothing is a text, too: a body that a format makes of it has no dash.
        Op::LocalReplyBody => text_of(Some(exchange.local_reply.as_bytes()), out),
        Op::Environment(name) => {
            let value = std::env::var(&**name).unwrap_or_default();
            or_dash(not_empty(&value, out), out)
        }
        Op::Hostname => {
            let name = rustix::system::uname();
            text_of(Some(name.nodename().to_bytes()), out)
        }
        Op::DynamicMetadata { namespace, path } => {
            let root = exchange.dynamic_metadata.get(&**namespace);
            json(
                path.iter()
                    .try_fold(root, |v, key| v.map(|v| v.get(&**key)))
                    .flatten(),
                out,
            )
        }
        Op::ClusterMetadata { namespace, path } => metadata(
            upstream.cluster.as_ref().map(|cluster| &cluster.metadata),
            namespace,
            path,
            out,
        ),
        Op::UpstreamMetadata { namespace, path } => metadata(
            upstream.host.as_ref().map(|host| &host.metadata),
            namespace,
            path,
            out,
        ),
        Op::RouteMetadata { namespace, path } => metadata(
            route.map(|(_, route)| &route.metadata),
            namespace,
            path,
            out,
        ),
        Op::VirtualHostMetadata { namespace, path } => {
            metadata(route.map(|(host, _)| &host.metadata), namespace, path, out)
        }
        Op::ListenerMetadata { namespace, path } => {
            metadata(Some(&connection.listener.metadata), namespace, path, out)
        }
        Op::FilterState {
            key,
            field,
            plain: _,
        }
        | Op::UpstreamFilterState {
            key,
            field,
            plain: _,
        } => {
            let state = exchange.state(key);
            match field {
                Some(field) => match state {
                    // The parts of an address.
                    Some(Value::String(text)) => match (text.parse::<SocketAddr>(), &**field) {
                        (Ok(address), "ip") => {
                            text_of(Some(address.ip().to_string().as_bytes()), out)
                        }
                        (Ok(address), "port") => number(address.port().into(), out),
                        _ => Presence::Absent,
                    },
                    state => json(state.and_then(|state| state.get(&**field)), out),
                },
                None => json(state, out),
            }
        }
        Op::Source(source) => {
            let at = out.len();
            match crate::transport::print(source, out) {
                // An empty secret is none; an empty file is a text, as in Envoy.
                Some(()) if out.len() > at || matches!(**source, TextSource::File(_)) => {
                    Presence::Text
                }
                _ => Presence::Absent,
            }
        }
        Op::Tls(operator) => {
            let session = match operator.upstream {
                true => upstream.tls.as_deref(),
                false => connection.tls.as_deref(),
            };
            super::tls::write(session, &operator.value, out)
        }
        Op::DownstreamTransportFailureReason => underscored(
            connection.transport_failure.as_deref().unwrap_or_default(),
            out,
        ),
        // What there is not (spans, kernel counters) is absent.
        _ => Presence::Absent,
    }
}

/// A point of time, where it was reached.
fn point(point: TimePoint, exchange: &Exchange<'_>) -> Option<Instant> {
    let progress = &exchange.progress;
    match point {
        TimePoint::DownstreamReceivedFirst => Some(progress.start),
        TimePoint::DownstreamReceivedLast => progress.request_received,
        TimePoint::UpstreamConnectFirst => Some(exchange.upstream.established?.begun),
        TimePoint::UpstreamConnected => Some(exchange.upstream.established?.connected),
        TimePoint::UpstreamSecured => exchange.upstream.established?.secured,
        TimePoint::DownstreamConnected => exchange.tcp.then_some(progress.start),
        TimePoint::DownstreamClosed => progress.end.filter(|_| exchange.tcp),
        TimePoint::DownstreamSecured => exchange.connection.secured,
        TimePoint::UpstreamSentFirst => progress.upstream_first_sent,
        TimePoint::UpstreamSentLast => progress.upstream_last_sent,
        TimePoint::UpstreamReceivedFirst => progress.upstream_first_received,
        TimePoint::UpstreamReceivedBody => progress.upstream_first_body,
        TimePoint::UpstreamReceivedLast => progress.upstream_last_received,
        TimePoint::DownstreamSentFirst => progress.downstream_first_sent,
        TimePoint::DownstreamSentLast => progress.end,
    }
}

/// A text with its percent escapes resolved; what is none stays.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn either<'v>(
    name: &str,
    alternative: &Option<std::sync::Arc<str>>,
    find: impl Fn(&str) -> Option<&'v [u8]>,
) -> Option<&'v [u8]> {
    find(name).or_else(|| find(alternative.as_ref()?))
}

fn text_of(value: Option<&[u8]>, out: &mut Vec<u8>) -> Presence {
    match value {
        Some(value) => {
            out.extend_from_slice(value);
            Presence::Text
        }
        None => Presence::Absent,
    }
}

pub(super) fn not_empty(value: &str, out: &mut Vec<u8>) -> Presence {
    text_of(
        Some(value.as_bytes()).filter(|value| !value.is_empty()),
        out,
    )
}

/// A text of words as one word: what parses lines by their spaces has one column for it.
fn underscored(value: &str, out: &mut Vec<u8>) -> Presence {
    let at = out.len();
    let presence = not_empty(value, out);
    underscore(&mut out[at..]);
    presence
}

fn underscore(text: &mut [u8]) {
    for byte in text.iter_mut().filter(|byte| byte.is_ascii_whitespace()) {
        *byte = b'_';
    }
}

/// The length of all names and values, and of nothing between them.
fn bare_size(headers: &Headers) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum()
}

fn word(value: Option<&'static str>, out: &mut Vec<u8>) -> Presence {
    text_of(value.map(str::as_bytes), out)
}

pub(super) fn number(value: u64, out: &mut Vec<u8>) -> Presence {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    Presence::Json
}

fn millis(value: Option<Duration>, out: &mut Vec<u8>) -> Presence {
    match value {
        Some(value) => number(value.as_millis() as u64, out),
        None => Presence::Absent,
    }
}

/// The values that Envoy has a dash for wherever they stand, in JSON and in headers too.
fn or_dash(presence: Presence, out: &mut Vec<u8>) -> Presence {
    match presence {
        Presence::Absent => text_of(Some(b"-"), out),
        known => known,
    }
}

fn joined(words: impl Iterator<Item = &'static str>, out: &mut Vec<u8>) -> Presence {
    let at = out.len();
    for word in words {
        if out.len() > at {
            out.push(b',');
        }
        out.extend_from_slice(word.as_bytes());
    }
    if out.len() == at {
        // No flag has a text of its own, in JSON too.
        out.push(b'-');
    }
    Presence::Text
}

fn address(value: Option<SocketAddr>, part: AddressPart, out: &mut Vec<u8>) -> Presence {
    let Some(value) = value else {
        return Presence::Absent;
    };
    let _ = match part {
        AddressPart::Whole => write!(out, "{value}"),
        AddressPart::WithoutPort => write!(out, "{}", value.ip()),
        AddressPart::Port => return number(value.port().into(), out),
        AddressPart::Network(bits) => match IpNet::new(value.ip(), bits) {
            Ok(net) => write!(out, "{}", net.trunc()),
            // So many bits the family does not have.
            Err(_) => return Presence::Absent,
        },
    };
    Presence::Text
}

fn metadata(
    metadata: Option<&Metadata>,
    namespace: &str,
    path: &[std::sync::Arc<str>],
    out: &mut Vec<u8>,
) -> Presence {
    json(
        metadata.and_then(|metadata| metadata.lookup(namespace, path)),
        out,
    )
}

/// Texts are printed bare, everything else as JSON.
fn json(value: Option<&Value>, out: &mut Vec<u8>) -> Presence {
    match value {
        None | Some(Value::Null) => Presence::Absent,
        Some(Value::String(text)) => text_of(Some(text.as_bytes()), out),
        Some(other) => {
            let _ = write!(out, "{other}");
            Presence::Json
        }
    }
}

/// The length of `:status` and of its value.
const STATUS_BYTES: usize = 10;
