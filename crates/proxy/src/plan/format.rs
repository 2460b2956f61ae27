//! Format strings: text with `%OPERATORS%`, in access logs and header values.
//!
//! The plan reads a format once; whoever knows the request gives the values. An operator that does not exist here is
//! an error with its name, so that a log never silently misses a column.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use super::{
    format_arguments::{coalesce, common_duration, path, requested_server_name},
    format_sources::{Formatters, TextSource},
    format_tls::TlsOperator,
};

/// A text with operators.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Template {
    /// In order; never two texts in a row.
    pub parts: Vec<Part>,
}

/// Part of a [`Template`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Literal text.
    Text(Box<str>),
    /// A value.
    Operator(Operator),
}

/// One operator, e.g. `%REQ(X-REQUEST-ID):8%`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// Which value.
    pub kind: OperatorKind,
    /// Bytes after which the value is cut.
    pub max_length: Option<usize>,
}

/// Header names are lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The names are Envoy's operators, one to one.
pub enum OperatorKind {
    /// Request header, else the alternative.
    Req {
        name: Arc<str>,
        alternative: Option<Arc<str>>,
    },
    /// Request header without its query part (`REQ_WITHOUT_QUERY`).
    ReqWithoutQuery {
        name: Arc<str>,
        alternative: Option<Arc<str>>,
    },
    /// Response header, else the alternative.
    Resp {
        name: Arc<str>,
        alternative: Option<Arc<str>>,
    },
    /// Response trailer, else the alternative.
    Trailer {
        name: Arc<str>,
        alternative: Option<Arc<str>>,
    },
    /// Path of the request (`PATH`).
    Path {
        without_query: bool,
        original: Original,
    },
    /// Value of a query parameter.
    QueryParam(Arc<str>),
    /// The whole query; as it came, or with its escapes resolved.
    QueryParams {
        decoded: bool,
    },
    /// From one point of time to another.
    CommonDuration {
        from: TimePoint,
        to: TimePoint,
        unit: DurationUnit,
    },
    /// A number of this log line alone.
    UniqueId,
    /// The first of these that has a value.
    Coalesce(Vec<Operator>),
    /// Flags that filters set: none here does.
    CustomFlags,
    /// The number of an address inside the process: no address here has one.
    EndpointId,
    /// Hash of a ClientHello, which only a setting of `tls_inspector` makes that is rejected.
    ClientFingerprint,
    /// From the start of a connection to the end of its handshake (TCP).
    DownstreamHandshakeDuration,
    UpstreamConnectionIdsAttempted,
    UpstreamLocalCloseReason,
    UpstreamDetectedCloseType,
    UpstreamHostsAttempted(AddressPart),
    UpstreamHostNamesAttempted {
        with_port: bool,
    },
    StartTime(TimeFormat),
    EmitTime(TimeFormat),
    RequestDuration,
    RequestTxDuration,
    ResponseDuration,
    ResponseTxDuration,
    Duration,
    RoundtripDuration,
    BytesReceived,
    BytesSent,
    BytesRetransmitted,
    PacketsRetransmitted,
    UpstreamWireBytesSent,
    UpstreamWireBytesReceived,
    UpstreamHeaderBytesSent,
    UpstreamHeaderBytesReceived,
    DownstreamWireBytesSent,
    DownstreamWireBytesReceived,
    DownstreamHeaderBytesSent,
    DownstreamHeaderBytesReceived,
    RequestHeadersBytes,
    ResponseHeadersBytes,
    ResponseTrailersBytes,
    Protocol,
    UpstreamProtocol,
    ResponseCode,
    /// With `_` for white space, unless it shall stay.
    ResponseCodeDetails {
        white_space: bool,
    },
    ConnectionTerminationDetails,
    ResponseFlags,
    ResponseFlagsLong,
    GrpcStatus(GrpcStatusForm),
    GrpcStatusNumber,
    UpstreamHost(AddressPart),
    UpstreamHostName,
    UpstreamHostNameWithoutPort,
    UpstreamCluster,
    UpstreamClusterRaw,
    UpstreamLocalAddress(AddressPart),
    UpstreamRemoteAddress(AddressPart),
    UpstreamRequestAttemptCount,
    UpstreamTransportFailureReason,
    UpstreamConnectionId,
    UpstreamPoolReadyDuration,
    DownstreamRemoteAddress(AddressPart),
    DownstreamDirectRemoteAddress(AddressPart),
    DownstreamLocalAddress(AddressPart),
    DownstreamDirectLocalAddress(AddressPart),
    DownstreamTransportFailureReason,
    DownstreamLocalCloseReason,
    DownstreamDetectedCloseType,
    /// What TLS says of a connection.
    Tls(TlsOperator),
    ConnectionId,
    StreamId,
    /// Server name, and which header stands in for it.
    RequestedServerName {
        name: NameOrder,
        host: Original,
    },
    RouteName,
    /// How often a route was looked for.
    RouteResolutionCount,
    /// How long that took, in microseconds.
    RouteResolutionTime,
    VirtualHostName,
    VirtualClusterName,
    FilterChainName,
    AccessLogType,
    Hostname,
    LocalReplyBody,
    TraceId,
    SpanId,
    /// `typed`: numbers, booleans and null keep their type in JSON.
    Cel {
        expression: Box<super::cel::Expr>,
        typed: bool,
    },
    /// Environment variable.
    Environment(Arc<str>),
    /// Dynamic metadata of the request.
    DynamicMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// Metadata of the upstream cluster.
    ClusterMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// Metadata of the upstream host.
    UpstreamMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// Metadata of the route.
    RouteMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// Metadata of the listener.
    ListenerMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// Metadata of the filter chain.
    FilterChainMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// Metadata of the virtual host.
    VirtualHostMetadata {
        namespace: Arc<str>,
        path: Vec<Arc<str>>,
    },
    /// What stands in a file, or a secret.
    Source(Box<TextSource>),
    /// A filter state object of the downstream side; `plain` asks for its text form instead of JSON.
    FilterState {
        key: Arc<str>,
        plain: bool,
        field: Option<Arc<str>>,
    },
    /// A filter state object of the upstream side.
    UpstreamFilterState {
        key: Arc<str>,
        plain: bool,
        field: Option<Arc<str>>,
    },
}

/// What `%REQUESTED_SERVER_NAME()%` prefers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NameOrder {
    /// The server name alone.
    #[default]
    SniOnly,
    /// The server name, else the host.
    SniFirst,
    /// The host, else the server name.
    HostFirst,
}

/// Which of a changed header's two values is meant: of the path, of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Original {
    /// The one before it was rewritten (x-envoy-original-…), else the present one.
    #[default]
    OrPath,
    /// The present one.
    Path,
    /// The one before it was rewritten.
    Only,
}

/// Which part of an address is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AddressPart {
    /// `1.2.3.4:80`.
    #[default]
    Whole,
    /// `1.2.3.4`.
    WithoutPort,
    /// `80`.
    Port,
    /// `1.2.0.0/16`: so many bits of it.
    Network(u8),
}

/// Form of `%GRPC_STATUS%`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GrpcStatusForm {
    /// `NotFound`.
    #[default]
    CamelString,
    /// `NOT_FOUND`.
    SnakeString,
    /// `5`.
    Number,
}

/// A point of time in the life of a request (`COMMON_DURATION`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The names are Envoy's, in words: DS_RX_BEG is `DownstreamReceivedFirst`.
pub enum TimePoint {
    DownstreamReceivedFirst,
    DownstreamReceivedLast,
    UpstreamConnectFirst,
    UpstreamConnected,
    UpstreamSecured,
    UpstreamSentFirst,
    UpstreamSentLast,
    UpstreamReceivedFirst,
    UpstreamReceivedBody,
    UpstreamReceivedLast,
    DownstreamSentFirst,
    DownstreamSentLast,
    /// Of a TCP proxy's connection.
    DownstreamConnected,
    /// Of a TCP proxy's connection.
    DownstreamClosed,
    DownstreamSecured,
}

/// Unit of a duration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DurationUnit {
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

/// Form of a time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum TimeFormat {
    /// `2026-11-21T13:45:00.123Z`.
    #[default]
    Rfc3339Millis,
    /// strftime with Envoy's `%f`, `%1f`–`%9f` (fraction of a second) and `%3s` (seconds with a fraction).
    Strftime(Arc<str>),
    /// The same in the zone of the machine; empty is RFC 3339 with milliseconds.
    Local(Arc<str>),
}

impl Template {
    /// Reads a format string.
    ///
    /// # Errors
    /// What is wrong, with the operator it is about.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::parse_with(text, &Formatters::default())
    }

    /// Reads a format string that may have the operators of formatters.
    ///
    /// # Errors
    /// What is wrong, with the operator it is about.
    pub fn parse_with(text: &str, formatters: &Formatters) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(percent) = rest.find('%') {
            literal.push_str(&rest[..percent]);
            rest = &rest[percent + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let (operator, after) = operator(rest, formatters)?;
            if !literal.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut literal).into()));
            }
            parts.push(Part::Operator(operator));
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Text(literal.into()));
        }
        Ok(Self { parts })
    }

    /// The text where it holds no operator.
    pub fn as_literal(&self) -> Option<&str> {
        match &*self.parts {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }
}

/// Reads one operator after its first `%`; gives the text after its last one.
fn operator<'t>(text: &'t str, formatters: &Formatters) -> Result<(Operator, &'t str), String> {
    let shown = || text.chars().take(40).collect::<String>();
    let name_end = text
        .find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
        .unwrap_or(text.len());
    let name = &text[..name_end];
    if name.is_empty() {
        return Err(format!(
            "`%{}` is no operator; write `%%` for a percent sign",
            shown()
        ));
    }
    let mut rest = &text[name_end..];
    let mut argument = None;
    if let Some(after) = rest.strip_prefix('(') {
        let end = after
            .find(")%")
            .or_else(|| after.find("):"))
            .ok_or_else(|| format!("`%{}` has a `(` without its `)`", shown()))?;
        // `):` can stand inside a time format that ends in `)%`; the nearer end is the right one.
        let end = after.find("):").filter(|colon| *colon < end).unwrap_or(end);
        argument = Some(&after[..end]);
        rest = &after[end + 1..];
    }
    let mut max_length = None;
    if let Some(after) = rest.strip_prefix(':') {
        let end = after.find('%').unwrap_or(after.len());
        let length = after[..end].parse();
        max_length =
            Some(length.map_err(|_| {
                format!("`%{}`: `{}` is no length in bytes", shown(), &after[..end])
            })?);
        rest = &after[end..];
    }
    let after = rest.strip_prefix('%').ok_or_else(|| {
        format!(
            "`%{}` is not closed by a `%`; write `%%` for a percent sign",
            shown()
        )
    })?;
    let kind = formatters
        .operator(name, argument)
        .unwrap_or_else(|| kind(name, argument))
        .map_err(|why| format!("%{name}%: {why}"))?;
    Ok((Operator { kind, max_length }, after))
}

/// Whether a format that was read asks how long it took to find routes: where none does, no request reads a clock for it.
/// Formats stand in listeners, routes and filters alike, so that it is told for the whole process, and for good.
static ROUTE_TIMES: AtomicBool = AtomicBool::new(false);

/// Whether the time is to be taken that finding a route takes.
pub(crate) fn wants_route_times() -> bool {
    ROUTE_TIMES.load(Relaxed)
}

/// Key of a filter state, whether it is printed plainly, and one field of it.
type State = (Arc<str>, bool, Option<Arc<str>>);

pub(super) fn kind(name: &str, argument: Option<&str>) -> Result<OperatorKind, String> {
    use AddressPart::{Port, Whole, WithoutPort};
    use OperatorKind as K;
    let needed = || {
        argument
            .filter(|a| !a.is_empty())
            .ok_or("needs an argument in parentheses")
    };
    let headers = || -> Result<(Arc<str>, Option<Arc<str>>), String> {
        let text = needed()?;
        let mut names = text
            .splitn(2, '?')
            .map(|n| Arc::from(n.trim().to_ascii_lowercase()));
        let first = names.next().ok_or("needs a header name")?;
        Ok((first, names.next()))
    };
    let metadata = |text: &str| -> (Arc<str>, Vec<Arc<str>>) {
        let mut keys = text.split(':').map(Arc::from);
        (keys.next().unwrap_or_default(), keys.collect())
    };
    let state = || -> Result<State, String> {
        let mut words = needed()?.split(':');
        let key = words.next().unwrap_or_default().into();
        match (words.next(), words.next()) {
            (None, _) | (Some("TYPED"), None) => Ok((key, false, None)),
            (Some("PLAIN"), None) => Ok((key, true, None)),
            (Some("FIELD"), Some(field)) => Ok((key, true, Some(field.into()))),
            (Some(other), _) => Err(format!("`{other}` is none of PLAIN, TYPED, FIELD")),
        }
    };
    let time = || match argument {
        None | Some("") => TimeFormat::Rfc3339Millis,
        Some(format) => TimeFormat::Strftime(format.into()),
    };
    let bare = || -> Result<AddressPart, String> {
        match argument {
            None | Some("") => Ok(WithoutPort),
            Some(length) => match length.parse() {
                Ok(length) if length <= 128 => Ok(AddressPart::Network(length)),
                _ => Err(format!("`{length}` is no number of bits from 0 to 128")),
            },
        }
    };
    let simple = match name {
        "REQ" | "REQUEST_HEADER" => {
            let (name, alternative) = headers()?;
            return Ok(K::Req { name, alternative });
        }
        "REQ_WITHOUT_QUERY" => {
            let (name, alternative) = headers()?;
            return Ok(K::ReqWithoutQuery { name, alternative });
        }
        "RESP" | "RESPONSE_HEADER" => {
            let (name, alternative) = headers()?;
            return Ok(K::Resp { name, alternative });
        }
        "TRAILER" | "RESPONSE_TRAILER" => {
            let (name, alternative) = headers()?;
            return Ok(K::Trailer { name, alternative });
        }
        "PATH" => return path(argument.unwrap_or_default()),
        "QUERY_PARAM" => return Ok(K::QueryParam(needed()?.into())),
        "QUERY_PARAMS" => {
            return Ok(K::QueryParams {
                decoded: match argument {
                    None | Some("" | "ORIG") => false,
                    Some("DECODED") => true,
                    Some(other) => return Err(format!("`{other}` is neither ORIG nor DECODED")),
                },
            });
        }
        "COMMON_DURATION" => return common_duration(needed()?),
        "START_TIME_LOCAL" => {
            return Ok(K::StartTime(TimeFormat::Local(
                argument.unwrap_or_default().into(),
            )));
        }
        "EMIT_TIME_LOCAL" => {
            return Ok(K::EmitTime(TimeFormat::Local(
                argument.unwrap_or_default().into(),
            )));
        }
        "START_TIME" => return Ok(K::StartTime(time())),
        "EMIT_TIME" => return Ok(K::EmitTime(time())),
        "ENVIRONMENT" => return Ok(K::Environment(needed()?.into())),
        "GRPC_STATUS" => {
            return Ok(K::GrpcStatus(match argument {
                None | Some("" | "CAMEL_STRING") => GrpcStatusForm::CamelString,
                Some("SNAKE_STRING") => GrpcStatusForm::SnakeString,
                Some("NUMBER") => GrpcStatusForm::Number,
                Some(other) => {
                    return Err(format!(
                        "`{other}` is none of CAMEL_STRING, SNAKE_STRING, NUMBER"
                    ));
                }
            }));
        }
        "DYNAMIC_METADATA" => {
            let (namespace, path) = metadata(needed()?);
            return Ok(K::DynamicMetadata { namespace, path });
        }
        "CLUSTER_METADATA" => {
            let (namespace, path) = metadata(needed()?);
            return Ok(K::ClusterMetadata { namespace, path });
        }
        "UPSTREAM_METADATA" => {
            let (namespace, path) = metadata(needed()?);
            return Ok(K::UpstreamMetadata { namespace, path });
        }
        "METADATA" => {
            let text = needed()?;
            let (of, rest) = text.split_once(':').ok_or("needs TYPE:NAMESPACE:KEY")?;
            let (namespace, path) = metadata(rest);
            return Ok(match of {
                "DYNAMIC" => K::DynamicMetadata { namespace, path },
                "CLUSTER" => K::ClusterMetadata { namespace, path },
                "UPSTREAM_HOST" => K::UpstreamMetadata { namespace, path },
                "ROUTE" => K::RouteMetadata { namespace, path },
                "LISTENER" => K::ListenerMetadata { namespace, path },
                "LISTENER_FILTER_CHAIN" => K::FilterChainMetadata { namespace, path },
                "VIRTUAL_HOST" => K::VirtualHostMetadata { namespace, path },
                other => return Err(format!("`{other}` is no kind of metadata")),
            });
        }
        "FILTER_STATE" => {
            let (key, plain, field) = state()?;
            return Ok(K::FilterState { key, plain, field });
        }
        "UPSTREAM_FILTER_STATE" => {
            let (key, plain, field) = state()?;
            return Ok(K::UpstreamFilterState { key, plain, field });
        }
        "REQUESTED_SERVER_NAME" => return requested_server_name(argument.unwrap_or_default()),
        "COALESCE" => return coalesce(needed()?),
        "CUSTOM_FLAGS" => K::CustomFlags,
        "DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID"
        | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_ENDPOINT_ID"
        | "UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID" => K::EndpointId,
        "TLS_JA3_FINGERPRINT" | "TLS_JA4_FINGERPRINT" => K::ClientFingerprint,
        "DOWNSTREAM_HANDSHAKE_DURATION" => K::DownstreamHandshakeDuration,
        "UPSTREAM_CONNECTION_IDS_ATTEMPTED" => K::UpstreamConnectionIdsAttempted,
        "UPSTREAM_LOCAL_CLOSE_REASON" => K::UpstreamLocalCloseReason,
        "UPSTREAM_DETECTED_CLOSE_TYPE" => K::UpstreamDetectedCloseType,
        "UNIQUE_ID" => K::UniqueId,
        "UPSTREAM_HOSTS_ATTEMPTED" => K::UpstreamHostsAttempted(Whole),
        "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT" => K::UpstreamHostsAttempted(WithoutPort),
        "UPSTREAM_HOST_NAMES_ATTEMPTED" => K::UpstreamHostNamesAttempted { with_port: true },
        "UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT" => {
            K::UpstreamHostNamesAttempted { with_port: false }
        }
        // Heads are counted as they are, whichever way they were packed.
        "UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT" => K::UpstreamHeaderBytesSent,
        "UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED" => K::UpstreamHeaderBytesReceived,
        "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT" => K::DownstreamHeaderBytesSent,
        "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED" => K::DownstreamHeaderBytesReceived,
        "REQUEST_DURATION" => K::RequestDuration,
        "REQUEST_TX_DURATION" => K::RequestTxDuration,
        "RESPONSE_DURATION" => K::ResponseDuration,
        "RESPONSE_TX_DURATION" => K::ResponseTxDuration,
        "DURATION" => K::Duration,
        "ROUNDTRIP_DURATION" => K::RoundtripDuration,
        "BYTES_RECEIVED" => K::BytesReceived,
        "BYTES_SENT" => K::BytesSent,
        "BYTES_RETRANSMITTED" => K::BytesRetransmitted,
        "PACKETS_RETRANSMITTED" => K::PacketsRetransmitted,
        "UPSTREAM_WIRE_BYTES_SENT" => K::UpstreamWireBytesSent,
        "UPSTREAM_WIRE_BYTES_RECEIVED" => K::UpstreamWireBytesReceived,
        "UPSTREAM_HEADER_BYTES_SENT" => K::UpstreamHeaderBytesSent,
        "UPSTREAM_HEADER_BYTES_RECEIVED" => K::UpstreamHeaderBytesReceived,
        "DOWNSTREAM_WIRE_BYTES_SENT" => K::DownstreamWireBytesSent,
        "DOWNSTREAM_WIRE_BYTES_RECEIVED" => K::DownstreamWireBytesReceived,
        "DOWNSTREAM_HEADER_BYTES_SENT" => K::DownstreamHeaderBytesSent,
        "DOWNSTREAM_HEADER_BYTES_RECEIVED" => K::DownstreamHeaderBytesReceived,
        "REQUEST_HEADERS_BYTES" => K::RequestHeadersBytes,
        "RESPONSE_HEADERS_BYTES" => K::ResponseHeadersBytes,
        "RESPONSE_TRAILERS_BYTES" => K::ResponseTrailersBytes,
        "PROTOCOL" => K::Protocol,
        "UPSTREAM_PROTOCOL" => K::UpstreamProtocol,
        "RESPONSE_CODE" => K::ResponseCode,
        "RESPONSE_CODE_DETAILS" => {
            return Ok(K::ResponseCodeDetails {
                // Envoy takes any other word without effect.
                white_space: match argument {
                    None | Some("") => false,
                    Some("ALLOW_WHITESPACES") => true,
                    Some(other) => return Err(format!("`{other}` is not ALLOW_WHITESPACES")),
                },
            });
        }
        "CONNECTION_TERMINATION_DETAILS" => K::ConnectionTerminationDetails,
        "RESPONSE_FLAGS" => K::ResponseFlags,
        "RESPONSE_FLAGS_LONG" => K::ResponseFlagsLong,
        "GRPC_STATUS_NUMBER" => K::GrpcStatusNumber,
        "UPSTREAM_HOST" => K::UpstreamHost(Whole),
        "UPSTREAM_HOST_NAME" => K::UpstreamHostName,
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" => K::UpstreamHostNameWithoutPort,
        "UPSTREAM_CLUSTER" => K::UpstreamCluster,
        "UPSTREAM_CLUSTER_RAW" => K::UpstreamClusterRaw,
        "UPSTREAM_LOCAL_ADDRESS" => K::UpstreamLocalAddress(Whole),
        "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => return Ok(K::UpstreamLocalAddress(bare()?)),
        "UPSTREAM_LOCAL_PORT" => K::UpstreamLocalAddress(Port),
        "UPSTREAM_REMOTE_ADDRESS" => K::UpstreamRemoteAddress(Whole),
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => return Ok(K::UpstreamRemoteAddress(bare()?)),
        "UPSTREAM_REMOTE_PORT" => K::UpstreamRemoteAddress(Port),
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => K::UpstreamRequestAttemptCount,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => K::UpstreamTransportFailureReason,
        "UPSTREAM_CONNECTION_ID" => K::UpstreamConnectionId,
        "UPSTREAM_CONNECTION_POOL_READY_DURATION" => K::UpstreamPoolReadyDuration,
        "DOWNSTREAM_REMOTE_ADDRESS" => K::DownstreamRemoteAddress(Whole),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => return Ok(K::DownstreamRemoteAddress(bare()?)),
        "DOWNSTREAM_REMOTE_PORT" => K::DownstreamRemoteAddress(Port),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => K::DownstreamDirectRemoteAddress(Whole),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            return Ok(K::DownstreamDirectRemoteAddress(bare()?));
        }
        "DOWNSTREAM_DIRECT_REMOTE_PORT" => K::DownstreamDirectRemoteAddress(Port),
        "DOWNSTREAM_LOCAL_ADDRESS" => K::DownstreamLocalAddress(Whole),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => return Ok(K::DownstreamLocalAddress(bare()?)),
        "DOWNSTREAM_LOCAL_PORT" => K::DownstreamLocalAddress(Port),
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS" => K::DownstreamDirectLocalAddress(Whole),
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT" => {
            return Ok(K::DownstreamDirectLocalAddress(bare()?));
        }
        "DOWNSTREAM_DIRECT_LOCAL_PORT" => K::DownstreamDirectLocalAddress(Port),
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => K::DownstreamTransportFailureReason,
        "DOWNSTREAM_LOCAL_CLOSE_REASON" => K::DownstreamLocalCloseReason,
        "DOWNSTREAM_DETECTED_CLOSE_TYPE" => K::DownstreamDetectedCloseType,
        "CONNECTION_ID" => K::ConnectionId,
        "STREAM_ID" => K::StreamId,
        "ROUTE_NAME" => K::RouteName,
        "ROUTE_RESOLUTION_COUNT" => K::RouteResolutionCount,
        "ROUTE_RESOLUTION_TIME_US" => {
            ROUTE_TIMES.store(true, Relaxed);
            K::RouteResolutionTime
        }
        "VIRTUAL_HOST_NAME" => K::VirtualHostName,
        "VIRTUAL_CLUSTER_NAME" => K::VirtualClusterName,
        "FILTER_CHAIN_NAME" => K::FilterChainName,
        "ACCESS_LOG_TYPE" => K::AccessLogType,
        "HOSTNAME" => K::Hostname,
        "LOCAL_REPLY_BODY" => K::LocalReplyBody,
        "TRACE_ID" => K::TraceId,
        "SPAN_ID" => K::SpanId,
        "CEL" | "TYPED_CEL" => {
            return Ok(K::Cel {
                expression: Box::new(super::cel::parse(needed()?)?),
                typed: name == "TYPED_CEL",
            });
        }
        _ => match TlsOperator::named(name, time) {
            // Only times take an argument, and theirs is read.
            Some(operator) if operator.value.takes_argument() => return Ok(K::Tls(operator)),
            Some(operator) => K::Tls(operator),
            None => return Err("is not an operator that is implemented".into()),
        },
    };
    if argument.is_some() {
        return Err("takes no argument".into());
    }
    Ok(simple)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_operators_alternate() {
        let template = Template::parse("a%%b %REQ(X-A?:PATH):12%%DURATION%\n").expect("legal");
        let req = OperatorKind::Req {
            name: "x-a".into(),
            alternative: Some(":path".into()),
        };
        assert_eq!(
            template.parts,
            [
                Part::Text("a%b ".into()),
                Part::Operator(Operator {
                    kind: req,
                    max_length: Some(12)
                }),
                Part::Operator(Operator {
                    kind: OperatorKind::Duration,
                    max_length: None
                }),
                Part::Text("\n".into()),
            ]
        );
    }

    #[test]
    fn a_time_format_keeps_its_own_percent_signs() {
        let template = Template::parse("%START_TIME(%Y/%m:%3f)% x").expect("legal");
        let format = TimeFormat::Strftime("%Y/%m:%3f".into());
        let kind = OperatorKind::StartTime(format);
        assert_eq!(
            template.parts[0],
            Part::Operator(Operator {
                kind,
                max_length: None
            })
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, word) in [
            ("%NOPE%", "NOPE"),
            ("%REQ(a%", "without its"),
            ("50% off", "percent sign"),
            ("%DURATION(x)%", "no argument"),
            ("%REQ(a):x%", "no length"),
            ("%COALESCE({})%", "operators"),
            ("%COALESCE({\"operators\": []})%", "at least one"),
            ("%COALESCE({\"operators\": [\"NOPE\"]})%", "NOPE"),
            (
                "%COALESCE({\"operators\": [{\"command\": \"COALESCE\", \"param\": \"{}\"}]})%",
                "itself",
            ),
            (
                "%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(129)%",
                "number of bits",
            ),
            ("%REQUESTED_SERVER_NAME(SNI)%", "SNI_ONLY"),
            ("%COMMON_DURATION(DS_RX_BEG:NEVER)%", "NEVER"),
            ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:ms:x)%", "two points"),
            ("%RESPONSE_CODE_DETAILS(SPACES)%", "ALLOW_WHITESPACES"),
        ] {
            let error = Template::parse(text).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
