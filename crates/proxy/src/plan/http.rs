//! The HTTP connection manager and the options of HTTP/1 and HTTP/2, on both sides.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;

use super::{
    access_log::AccessLog,
    bootstrap::ConfigSource,
    header::HeaderMutation,
    http_filter::HttpFilter,
    local_reply::LocalReplyConfig,
    matcher::Percent,
    matcher_tree::Matcher,
    route::RouteConfiguration,
    scoped_route::{Scope, ScopedRoutes},
};

/// `envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`.
///
/// Timeouts: `None` means disabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpConnectionManager {
    /// `http.<stat_prefix>.` of its stats.
    pub stat_prefix: Arc<str>,
    /// Which protocol is spoken.
    pub codec: CodecType,
    /// Where routes come from.
    pub routes: RouteSource,
    /// What replies of our own look like.
    pub local_reply: LocalReplyConfig,
    /// Filters in order; the last is the router.
    pub http_filters: Vec<HttpFilter>,
    /// Options of both protocols.
    pub common: HttpOptions,
    /// Options of HTTP/1.
    pub http1: Http1Options,
    /// Options of HTTP/2.
    pub http2: Http2Options,
    /// Value of the `server` response header. Default `envoy`.
    pub server_name: Arc<str>,
    /// What happens to the `server` header of responses.
    pub server_header: ServerHeader,
    /// `scheme_header_transformation.scheme_to_overwrite`.
    pub scheme_to_overwrite: Option<Arc<str>>,
    /// Limit of a request's header block in KiB. Default 60.
    pub max_request_headers_kb: u32,
    /// A stream without bytes for this long is reset. Default 5 min.
    pub stream_idle_timeout: Option<Duration>,
    /// How long the client may take for the rest of a response that is all there, where that is said apart; `Some(None)`
    /// for ever. By default as long as without a byte.
    pub stream_flush_timeout: Option<Option<Duration>>,
    /// From the first byte to the end of the request. Default disabled.
    pub request_timeout: Option<Duration>,
    /// From the first byte to the end of the request's headers. Default disabled.
    pub request_headers_timeout: Option<Duration>,
    /// Between GOAWAY or `connection: close` and the end. Default 5 s.
    pub drain_timeout: Duration,
    /// Up to this share is added to `drain_timeout` at random.
    pub drain_timeout_jitter: Percent,
    /// What a PROXY header's destination port says of x-forwarded-proto.
    pub forward_proto: Option<ForwardProto>,
    /// How long a closing connection waits for the peer's FIN. Default 1 s; `None` closes at once.
    pub delayed_close_timeout: Option<Duration>,
    /// One line per request.
    pub access_logs: Vec<AccessLog>,
    /// Also writes the access log at this interval while a stream lasts.
    pub access_log_flush_interval: Option<Duration>,
    /// Also writes the access log when a request begins.
    pub flush_access_log_on_new_request: bool,
    /// Also writes the access log when an upgrade or CONNECT was agreed to.
    pub flush_access_log_on_tunnel: bool,
    /// The peer's address is the client (edge); false trusts x-forwarded-for (inside).
    pub use_remote_address: bool,
    /// How many entries of x-forwarded-for, from the right, are trusted proxies.
    pub xff_num_trusted_hops: u32,
    /// Which client addresses count as internal.
    pub internal_addresses: InternalAddresses,
    /// With `use_remote_address`: do not append to x-forwarded-for.
    pub skip_xff_append: bool,
    /// Appended to `via`, when not empty.
    pub via: Option<Arc<str>>,
    /// Makes an x-request-id where there is none. Default true.
    pub generate_request_id: bool,
    /// Keeps an edge request's own x-request-id.
    pub preserve_external_request_id: bool,
    /// Sends x-request-id back.
    pub always_set_request_id_in_response: bool,
    /// Whether the trace decision is written into the request id's version nibble. Default true.
    pub pack_trace_reason: bool,
    /// Whether the request id decides about sampling. Default true.
    pub use_request_id_for_trace_sampling: bool,
    /// Sampling decision of traces; spans themselves are not emitted.
    pub tracing: Option<super::tracing::Tracing>,
    /// What happens to x-forwarded-client-cert.
    pub forward_client_cert: ForwardClientCert,
    /// What is put into x-forwarded-client-cert.
    pub client_cert_details: ClientCertDetails,
    /// Both for single requests; where it finds nothing the two above hold.
    pub forward_client_cert_matcher: Option<Box<Matcher<(ForwardClientCert, ClientCertDetails)>>>,
    /// Changes of the request's head before anything but its form is looked at.
    pub early_header_mutations: Vec<HeaderMutation>,
    /// Histograms of how often, and for how long, a route is looked for.
    pub record_route_resolution_stats: bool,
    /// Forwards `100-continue` instead of answering it. Default false.
    pub proxy_100_continue: bool,
    /// Upgrade types that are let through (lower case: `websocket`, `connect`), with their switch.
    pub upgrades: Vec<Upgrade>,
    /// RFC 3986 normalisation of paths before anything looks at them.
    pub normalize_path: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// What happens to `%2F` and `%5C` in paths.
    pub escaped_slashes: EscapedSlashes,
    /// Which port is taken off the host header before routing and forwarding.
    pub strip_port: StripPort,
    /// Takes a trailing dot off the host.
    pub strip_trailing_host_dot: bool,
    /// Appends x-forwarded-port.
    pub append_x_forwarded_port: bool,
    /// Adds `user-agent` and `x-envoy-downstream-service-cluster` from the node, as asked.
    pub add_user_agent: bool,
    /// Answers an invalid message with an error on its stream instead of closing the connection.
    pub stream_error_on_invalid_http_message: bool,
}

/// `ForwardProtoConfig`: ports of which the scheme is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardProto {
    /// Ports of https.
    pub https: Vec<u16>,
    /// Ports of http.
    pub http: Vec<u16>,
}

impl ForwardProto {
    /// The scheme that a port stands for.
    pub fn scheme(&self, port: u16) -> Option<&'static str> {
        if self.https.contains(&port) {
            Some("https")
        } else {
            self.http.contains(&port).then_some("http")
        }
    }
}

/// Which protocol a connection manager speaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CodecType {
    /// By ALPN, else by the preface.
    #[default]
    Auto,
    /// HTTP/1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// Where a connection manager's routes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteSource {
    /// Part of the listener.
    Inline(Arc<RouteConfiguration>),
    /// By name from RDS; the listener warms until it has arrived.
    Rds {
        /// Name of the route configuration.
        name: Arc<str>,
        /// Where it is asked for.
        source: ConfigSource,
    },
    /// Found by a key that is made of the request's headers.
    Scoped {
        /// The scopes.
        routes: ScopedRoutes,
        /// Where those that come by name are asked for.
        source: Option<ConfigSource>,
    },
}

impl RouteSource {
    /// The names of routes that are asked for over RDS, each with its source.
    pub fn rds(&self) -> Vec<(&str, &ConfigSource)> {
        match self {
            Self::Inline(_) => Vec::new(),
            Self::Rds { name, source } => vec![(&**name, source)],
            Self::Scoped { routes, source } => {
                let named = routes.scopes.values().filter_map(|scope| match scope {
                    Scope::Named(name) => Some((&**name, source.as_ref()?)),
                    Scope::Inline(_) => None,
                });
                named.collect()
            }
        }
    }
}

/// Options that both protocols share (`HttpProtocolOptions`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpOptions {
    /// A connection without requests for this long is closed. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// A connection of this age is drained.
    pub max_connection_duration: Option<Duration>,
    /// Up to this share is added to that age of a client's connection at random.
    pub max_connection_duration_jitter: Percent,
    /// Header fields a message may have. Default 100.
    pub max_headers_count: u32,
    /// Limit of a response's header block in KiB (upstream side). Default 60.
    pub max_response_headers_kb: u32,
    /// A stream of this age is reset.
    pub max_stream_duration: Option<Duration>,
    /// What happens to header names with an underscore.
    pub underscores: Underscores,
    /// Requests after which a connection is closed; `None` is no limit.
    pub max_requests_per_connection: Option<u32>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            max_connection_duration_jitter: Percent::whole(0),
            max_headers_count: 100,
            max_response_headers_kb: 60,
            max_stream_duration: None,
            underscores: Underscores::Allow,
            max_requests_per_connection: None,
        }
    }
}

/// What happens to header names with an underscore.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Underscores {
    /// They pass.
    #[default]
    Allow,
    /// The request is answered 400.
    RejectRequest,
    /// The header is left out.
    DropHeader,
}

/// Options of HTTP/1 (`Http1ProtocolOptions`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Http1Options {
    /// Takes `GET http://host/ HTTP/1.1` as a request for that host. Default true.
    pub allow_absolute_url: bool,
    /// Takes HTTP/1.0 requests instead of answering 426.
    pub accept_http_10: bool,
    /// Host of an HTTP/1.0 request without one.
    pub default_host_for_http_10: Option<Arc<str>>,
    /// How header names are written.
    pub header_case: HeaderCase,
    /// Forwards trailers.
    pub enable_trailers: bool,
    /// Takes `content-length` beside `transfer-encoding: chunked` (and drops it).
    pub allow_chunked_length: bool,
    /// Overrides the connection manager's `stream_error_on_invalid_http_message`.
    pub stream_error_on_invalid_http_message: Option<bool>,
    /// Sends absolute URLs upstream.
    pub send_fully_qualified_url: bool,
    /// Takes methods that are not registered.
    pub allow_custom_methods: bool,
}

/// How HTTP/1 header names are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HeaderCase {
    /// Lower case, Envoy's default.
    #[default]
    Lower,
    /// `Proper-Case`.
    Proper,
    /// As the peer wrote them.
    Preserve,
}

/// Options of HTTP/2 (`Http2ProtocolOptions`). Window sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http2Options {
    /// HPACK table size. Default 4096.
    pub hpack_table_size: u32,
    /// Streams at once. Default 1024.
    pub max_concurrent_streams: u32,
    /// Default 16 MiB.
    pub initial_stream_window_size: u32,
    /// Default 24 MiB.
    pub initial_connection_window_size: u32,
    /// Extended CONNECT.
    pub allow_connect: bool,
    /// Settings that mean nothing here, said to peers that may know them: identifier and value.
    pub custom_settings: Option<Arc<[(u16, u32)]>>,
    /// Answers an invalid message with a stream error instead of closing the connection.
    pub stream_error_on_invalid_http_message: bool,
    /// Pings on idle connections.
    pub keepalive: Option<Http2Keepalive>,
    /// HEADERS, CONTINUATION and DATA in a row without payload. Default 1.
    pub max_consecutive_inbound_frames_with_empty_payload: u32,
    /// PRIORITY frames for each stream. Default 100.
    pub max_inbound_priority_frames_per_stream: u32,
    /// WINDOW_UPDATE frames for each DATA frame sent. Default 10.
    pub max_inbound_window_update_frames_per_data_frame_sent: u32,
    /// Resets that a peer's faults make us send. Default 1000.
    pub max_outbound_control_frames: u32,
    /// KiB of one field, name and value together, 64 to 256; by default as much as of all fields.
    pub max_header_field_size_kb: Option<u32>,
    /// Values of fields have no bytes beyond ASCII.
    pub disallow_obs_text: bool,
    /// Our own heads are said in Huffman code where that is shorter. Default true.
    pub huffman: bool,
    /// Streams that a client may reset at once. Default 1000.
    pub stream_reset_burst: u64,
    /// Resets in a second that are forgiven. Default 33.
    pub stream_reset_rate: u64,
}

impl Default for Http2Options {
    fn default() -> Self {
        Self {
            hpack_table_size: 4096,
            max_concurrent_streams: 1024,
            initial_stream_window_size: 16 << 20,
            initial_connection_window_size: 24 << 20,
            allow_connect: false,
            custom_settings: None,
            stream_error_on_invalid_http_message: false,
            keepalive: None,
            max_consecutive_inbound_frames_with_empty_payload: 1,
            max_inbound_priority_frames_per_stream: 100,
            max_inbound_window_update_frames_per_data_frame_sent: 10,
            max_outbound_control_frames: 1000,
            max_header_field_size_kb: None,
            disallow_obs_text: false,
            huffman: true,
            stream_reset_burst: 1000,
            stream_reset_rate: 33,
        }
    }
}

/// `connection_keepalive` of HTTP/2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http2Keepalive {
    /// Between pings; `None` sends none by time.
    pub interval: Option<Duration>,
    /// Percent of the interval that is added at random. Default 15.
    pub interval_jitter: u32,
    /// The connection is closed when a ping takes longer.
    pub timeout: Duration,
    /// Pings before a stream when the connection was idle for this long.
    pub connection_idle_interval: Option<Duration>,
}

/// What happens to the `server` header of responses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ServerHeader {
    /// Ours replaces the upstream's.
    #[default]
    Overwrite,
    /// Ours where the upstream sent none.
    AppendIfAbsent,
    /// The upstream's or none.
    PassThrough,
}

/// Which client addresses count as internal. Envoy's default since 1.33: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InternalAddresses {
    /// Networks.
    pub cidr_ranges: Vec<IpNet>,
    /// Connections over unix sockets.
    pub unix_sockets: bool,
}

impl InternalAddresses {
    /// Whether a client address is internal.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.cidr_ranges.iter().any(|net| net.contains(&address))
    }
}

/// What happens to x-forwarded-client-cert.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ForwardClientCert {
    /// Taken off.
    #[default]
    Sanitize,
    /// Passed on, on mTLS connections.
    ForwardOnly,
    /// Appended to, on mTLS connections.
    AppendForward,
    /// Replaced, on mTLS connections.
    SanitizeSet,
    /// Passed on always.
    AlwaysForwardOnly,
}

/// What is put into x-forwarded-client-cert beside By and Hash.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClientCertDetails {
    /// `Subject="…"`.
    pub subject: bool,
    /// `Cert="…"`.
    pub cert: bool,
    /// `Chain="…"`.
    pub chain: bool,
    /// `DNS=…`.
    pub dns: bool,
    /// `URI=…`.
    pub uri: bool,
    /// `Issuer="…"`.
    pub issuer: bool,
}

/// An upgrade type and whether it is let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgrade {
    /// Lower case.
    pub upgrade_type: Arc<str>,
    /// Its switch; routes can override it.
    pub enabled: bool,
    /// What its requests go through in place of the connection manager's filters; empty: those.
    pub filters: Vec<HttpFilter>,
}

/// What happens to `%2F` and `%5C` in paths.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// They stay.
    #[default]
    KeepUnchanged,
    /// 400.
    RejectRequest,
    /// 307 to the unescaped path.
    UnescapeAndRedirect,
    /// Unescaped and forwarded.
    UnescapeAndForward,
}

/// Which port is taken off the host header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StripPort {
    /// None.
    #[default]
    Never,
    /// The listener's own.
    Matching,
    /// Any.
    Any,
}
