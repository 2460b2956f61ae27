//! Clusters: groups of endpoints, how they are found, chosen and connected to.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use serde_json::Value;

use super::{
    address::Address,
    bootstrap::ConfigSource,
    endpoint::ClusterLoadAssignment,
    health_check::HealthCheck,
    http::{Http1Options, Http2Options, HttpOptions},
    http_filter::MetadataExchange,
    lb::{CommonLb, LbPolicy, OverrideSource, SubsetLb},
    matcher::Percent,
    metadata::{Metadata, TRANSPORT_SOCKET_MATCH},
    proxy_protocol::ProxyProtocolTransport,
    socket::SocketOption,
    tls::UpstreamTls,
};

/// `envoy.config.cluster.v3.Cluster`. Its name is its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// Unique name.
    pub name: Arc<str>,
    /// Replaces the name in stats.
    pub alt_stat_name: Option<Arc<str>>,
    /// How its endpoints are found.
    pub discovery: Discovery,
    /// Limit of a TCP connect (and TLS handshake). Default 5 s.
    pub connect_timeout: Duration,
    /// How an endpoint is chosen.
    pub lb_policy: LbPolicy,
    /// What all policies share.
    pub lb: CommonLb,
    /// Subsets of endpoints by their metadata.
    pub subsets: Option<Arc<SubsetLb>>,
    /// Where a request names its hosts itself, in order of preference; empty where it does not.
    pub override_sources: Vec<OverrideSource>,
    /// Limits.
    pub circuit_breakers: CircuitBreakers,
    /// Which HTTP is spoken.
    pub protocol: UpstreamProtocol,
    /// Options of both protocols.
    pub http: HttpOptions,
    /// Options of HTTP/1.
    pub http1: Http1Options,
    /// Options of HTTP/2.
    pub http2: Http2Options,
    /// Requests choose the server name of TLS.
    pub auto_sni: Option<AutoSni>,
    /// Active health checks.
    pub health_check: Option<Arc<HealthCheck>>,
    /// Passive health checks.
    pub outlier_detection: Option<OutlierDetection>,
    /// What bytes are wrapped in, where no match applies.
    pub transport_socket: UpstreamTransport,
    /// By endpoint metadata; the first that fits applies. See [`Cluster::transport_for`].
    pub transport_socket_matches: Vec<TransportMatch>,
    /// Address that connections start from.
    pub bind: Option<BindConfig>,
    /// TCP keep-alive of connections.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Runs on each new TCP connection (Istio's metadata exchange).
    pub metadata_exchange: Option<MetadataExchange>,
    /// Soft limit of buffered bytes per direction. Default 1 MiB.
    pub per_connection_buffer_limit: u32,
    /// Existing connections to a host that fails are closed, those of TCP too.
    pub close_connections_on_host_health_failure: bool,
    /// A host that went from discovery is dropped although active health checks find it healthy.
    pub ignore_health_on_host_removal: bool,
    /// One pool for each downstream connection.
    pub connection_pool_per_downstream_connection: bool,
    /// Free structures.
    pub metadata: Metadata,
}

/// The server name of TLS comes from the request: from its host as the upstream gets it, without port; an address is not sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AutoSni {
    /// The header that has the name instead, where a request has it.
    pub header: Option<Box<str>>,
    /// The peer's certificate must be valid for the name (or address).
    pub validate: bool,
}

impl Cluster {
    /// The transport for an endpoint: the first match whose every key its metadata has with that value.
    pub fn transport_for(&self, endpoint: &Metadata) -> &UpstreamTransport {
        let labels = endpoint.namespace(TRANSPORT_SOCKET_MATCH);
        self.transport_socket_matches
            .iter()
            .find(|m| {
                m.criteria
                    .iter()
                    .all(|(k, v)| labels.and_then(|l| l.get(&**k)) == Some(v))
            })
            .map_or(&self.transport_socket, |m| &m.transport_socket)
    }

    /// The name under `cluster.` in stats.
    pub fn stat_name(&self) -> &Arc<str> {
        self.alt_stat_name.as_ref().unwrap_or(&self.name)
    }
}

/// How endpoints are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    /// They are part of the cluster.
    Static(Arc<ClusterLoadAssignment>),
    /// Every address of every name.
    StrictDns {
        /// Endpoints, names among them.
        load_assignment: Arc<ClusterLoadAssignment>,
        /// How names are resolved.
        dns: DnsOptions,
    },
    /// One name; each new connection takes the first address of the latest answer.
    LogicalDns {
        /// Exactly one endpoint.
        load_assignment: Arc<ClusterLoadAssignment>,
        /// How the name is resolved.
        dns: DnsOptions,
    },
    /// From EDS.
    Eds {
        /// Name of the assignment to ask for.
        service_name: Arc<str>,
        /// Where it is asked for.
        source: ConfigSource,
    },
    /// The address that the downstream connection was meant for.
    OriginalDst {
        /// Replaces the port.
        port_override: Option<u16>,
        /// Takes the address from this request header (lower case) instead.
        http_header: Option<Arc<str>>,
        /// How long a host without connections is kept.
        cleanup_interval: Duration,
    },
    /// The hosts of other clusters, the first that has healthy ones.
    Aggregate(Vec<Arc<str>>),
}

/// How names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsOptions {
    /// Between two resolutions. Default 5 s.
    pub refresh_rate: Duration,
    /// Added at random. Default 0.
    pub jitter: Duration,
    /// After a failure: base and cap; `None` takes the refresh rate.
    pub failure_refresh: Option<(Duration, Duration)>,
    /// The answer's TTL replaces the refresh rate.
    pub respect_ttl: bool,
    /// Families.
    pub family: DnsLookupFamily,
    /// Servers to ask; empty: the system's.
    pub resolvers: Vec<Address>,
    /// Asks over TCP only.
    pub use_tcp: bool,
    /// Searches the domains of resolv.conf.
    pub search_domains: bool,
}

/// `Cluster.DnsLookupFamily`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DnsLookupFamily {
    /// IPv6, else IPv4.
    #[default]
    Auto,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// IPv4, else IPv6.
    V4Preferred,
    /// Both.
    All,
}

/// `CircuitBreakers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CircuitBreakers {
    /// For priority DEFAULT.
    pub default: Thresholds,
    /// For priority HIGH.
    pub high: Thresholds,
    /// Connections to one host.
    pub per_host_max_connections: Option<u32>,
}

/// Limits of one priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thresholds {
    /// Default 1024.
    pub max_connections: u32,
    /// Default 1024.
    pub max_pending_requests: u32,
    /// Default 1024.
    pub max_requests: u32,
    /// Default 3; a budget replaces it.
    pub max_retries: u32,
    /// Share of active requests that may be retries.
    pub retry_budget: Option<RetryBudget>,
    /// Publishes `remaining_*` gauges.
    pub track_remaining: bool,
    /// No limit by default.
    pub max_connection_pools: Option<u32>,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
            track_remaining: false,
            max_connection_pools: None,
        }
    }
}

/// Share of active requests that may be retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// Counts the requests that began within it in place of those under way.
    pub interval: Option<Duration>,
    /// Default 20 %.
    pub budget: Percent,
    /// Allowed in any case. Default 3.
    pub min_retry_concurrency: u32,
}

/// Which HTTP is spoken to endpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// As the downstream request.
    Downstream {
        /// The options of HTTP/2 are given: what has no downstream request (a TCP proxy's tunnel) goes by HTTP/2.
        http2: bool,
    },
    /// By ALPN (`auto_config`).
    Alpn,
}

/// `OutlierDetection`. Percentages 0–100 are chances that an ejection is carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlierDetection {
    /// 5xx in a row. Default 5.
    pub consecutive_5xx: u32,
    /// Default 100.
    pub enforcing_consecutive_5xx: u32,
    /// 502, 503, 504 in a row. Default 5.
    pub consecutive_gateway_failure: u32,
    /// Default 0.
    pub enforcing_consecutive_gateway_failure: u32,
    /// Local failures in a row, where split. Default 5.
    pub consecutive_local_origin_failure: u32,
    /// Default 100.
    pub enforcing_consecutive_local_origin_failure: u32,
    /// Local failures have counters of their own.
    pub split_external_local_origin_errors: bool,
    /// Between sweeps. Default 10 s.
    pub interval: Duration,
    /// Times the number of ejections. Default 30 s.
    pub base_ejection_time: Duration,
    /// Default 300 s or the base, whichever is longer.
    pub max_ejection_time: Duration,
    /// Added at random. Default 0.
    pub max_ejection_time_jitter: Duration,
    /// Share of hosts that may be out. Default 10.
    pub max_ejection_percent: u32,
    /// Ejects one host whatever that share is.
    pub always_eject_one_host: bool,
    /// A host whose good answer has `x-envoy-degraded` is used last for a while. Default false.
    pub detect_degraded_hosts: bool,
    /// A passed active health check ends an ejection. Default true.
    pub uneject_on_health_check: bool,
    /// Statistical ejection by success rate.
    pub success_rate: SuccessRate,
    /// Ejection by share of failures.
    pub failure_percentage: FailurePercentage,
}

/// Statistical ejection by success rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuccessRate {
    /// Chance of an ejection. Default 100.
    pub enforcing: u32,
    /// For local failures, where split. Default 100.
    pub enforcing_local_origin: u32,
    /// Hosts with enough requests that it takes. Default 5.
    pub minimum_hosts: u32,
    /// Requests in an interval that make enough. Default 100.
    pub request_volume: u32,
    /// Thousandths of a standard deviation. Default 1900.
    pub stdev_factor: u32,
}

/// Ejection by share of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Default 85.
    pub threshold: u32,
    /// Default 0.
    pub enforcing: u32,
    /// Default 0.
    pub enforcing_local_origin: u32,
    /// Default 5.
    pub minimum_hosts: u32,
    /// Default 50.
    pub request_volume: u32,
}

/// What bytes to an endpoint are wrapped in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpstreamTransport {
    /// Nothing.
    RawBuffer,
    /// TLS.
    Tls(Arc<UpstreamTls>),
    /// A PROXY header, then one of the others.
    ProxyProtocol(Arc<ProxyProtocolTransport>),
}

impl UpstreamTransport {
    /// What the bytes are wrapped in once a PROXY header is out, and that header.
    pub fn after_header(&self) -> (&Self, Option<&ProxyProtocolTransport>) {
        match self {
            Self::ProxyProtocol(proxy) => (&proxy.inner, Some(proxy)),
            other => (other, None),
        }
    }
}

/// A transport for endpoints with certain metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportMatch {
    /// Unique within the cluster.
    pub name: Arc<str>,
    /// Keys and values of `envoy.transport_socket_match`; empty fits every endpoint.
    pub criteria: Vec<(Arc<str>, Value)>,
    /// The transport.
    pub transport_socket: UpstreamTransport,
}

/// Address that connections start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindConfig {
    /// The first of the endpoint's family is taken; empty: the system chooses.
    pub sources: Vec<SocketAddr>,
    /// IP_FREEBIND.
    pub freebind: bool,
    /// Set on each socket before it connects.
    pub socket_options: Arc<[SocketOption]>,
}

impl BindConfig {
    /// The source for an endpoint: of its family where there is one, else none.
    pub fn source_for(&self, endpoint: SocketAddr) -> Option<SocketAddr> {
        self.sources
            .iter()
            .find(|s| s.is_ipv4() == endpoint.is_ipv4())
            .copied()
    }
}

/// TCP keep-alive; `None` leaves the system's value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// Lost probes that end the connection.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Between probes.
    pub interval: Option<Duration>,
}
