//! Network filters: what is done with the bytes of a connection.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    access_log::{AccessLog, LogFormat},
    ext_authz::NetworkExtAuthz,
    filter_state::ConnectionState,
    format::Template,
    header::HeaderAdd,
    http::HttpConnectionManager,
    http_filter::{IstioStats, MetadataExchange},
    matcher::Percent,
    rate_limit_service::NetworkRateLimit,
    rbac::Rbac,
    route::MetadataMatch,
};

/// One network filter of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkFilter {
    /// As configured, e.g. `envoy.filters.network.http_connection_manager`.
    pub name: Arc<str>,
    /// What it does.
    pub config: NetworkFilterConfig,
}

/// The network filters that exist here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkFilterConfig {
    /// Speaks HTTP; terminal.
    HttpConnectionManager(Arc<HttpConnectionManager>),
    /// Copies bytes to a cluster; terminal.
    TcpProxy(Arc<TcpProxy>),
    /// Istio's exchange of workload metadata at the head of a TCP stream (only where ALPN chose it).
    MetadataExchange(MetadataExchange),
    /// Istio's TCP metrics.
    IstioStats(Arc<IstioStats>),
    /// Lets connections in or refuses them, by policy; with the prefix of its statistics.
    Rbac(Arc<str>, Arc<Rbac>),
    /// Asks a service whether a connection may come in.
    ExtAuthz(Arc<NetworkExtAuthz>),
    /// Asks a service whether there may be another connection.
    RateLimit(Arc<NetworkRateLimit>),
    /// Limits how many connections are open.
    ConnectionLimit(Arc<ConnectionLimit>),
    /// Limits how many connections begin in a time.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// Makes objects of filter state.
    SetFilterState(Arc<ConnectionState>),
    /// The tcp_proxy goes to the cluster that is named like the SNI.
    SniCluster,
    /// Gives back what it gets; terminal.
    Echo,
    /// Says these bytes and closes; terminal.
    DirectResponse(Bytes),
}

impl NetworkFilterConfig {
    /// Whether a chain ends here.
    pub fn is_terminal(&self) -> bool {
        matches!(
            self,
            Self::HttpConnectionManager(_)
                | Self::TcpProxy(_)
                | Self::Echo
                | Self::DirectResponse(_)
        )
    }
}

/// `envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpProxy {
    /// `tcp.<stat_prefix>.` of its stats.
    pub stat_prefix: Arc<str>,
    /// Where connections go.
    pub cluster: TcpClusters,
    /// Only hosts whose `envoy.lb` metadata has these values; weighted clusters have their own.
    pub metadata_match: MetadataMatch,
    /// Closes a connection without bytes in either direction; `None` never. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// Closes a connection of this age; `None` never.
    pub max_downstream_connection_duration: Option<Duration>,
    /// Up to this share is added to that age at random.
    pub max_duration_jitter: Percent,
    /// How often to try to connect (each time a fresh pick). Default 1.
    pub max_connect_attempts: u32,
    /// Waits between these attempts: bound of the first, and of all.
    pub backoff: Option<(Duration, Duration)>,
    /// The upstream is connected to once the client has said something (`ON_DOWNSTREAM_DATA`).
    pub connects_with_data: bool,
    /// The cluster is an HTTP proxy that is asked for a tunnel.
    pub tunneling: Option<Tunneling>,
    /// What is hashed for RING_HASH and MAGLEV.
    pub hash: Option<ConnectionHash>,
    /// Added to the connection's TLVs, for PROXY headers of the upstream.
    pub proxy_tlvs: ProxyTlvs,
    /// A connection that bytes pass on ends once its listener drains.
    pub check_drain_close: bool,
    /// One line per connection.
    pub access_logs: Vec<AccessLog>,
    /// Also writes the access log at this interval while the connection lasts.
    pub access_log_flush_interval: Option<Duration>,
    /// Also writes the access log when the connection has been accepted.
    pub flush_access_log_on_start: bool,
    /// Also writes the access log when the upstream connection stands.
    pub flush_access_log_on_connected: bool,
}

/// `proxy_protocol_tlvs`, and what becomes of those that the client's PROXY header brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyTlvs {
    /// Types and values.
    pub tlvs: Vec<(u8, TlvValue)>,
    /// `proxy_protocol_tlv_merge_policy`.
    pub merge: TlvMerge,
}

/// The value of a TLV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlvValue {
    /// As it is.
    Bytes(Bytes),
    /// Made of what is known about the connection.
    Format(LogFormat),
}

/// How TLVs meet those of the client's PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlvMerge {
    /// They are added only where there was no header.
    AddIfAbsent,
    /// They take the place of those of their type.
    OverwriteByType,
    /// They come behind them.
    Append,
}

/// `envoy.type.v3.HashPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionHash {
    /// The client's address.
    SourceIp,
    /// An object of filter state; without it there is no hash.
    FilterState(Arc<str>),
}

/// `TcpProxy.TunnelingConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunneling {
    /// Host and port that the proxy is asked for.
    pub hostname: Template,
    /// It is asked by POST, with this path; `None` by CONNECT.
    pub post_path: Option<Box<str>>,
    /// Headers of that request.
    pub headers: Vec<HeaderAdd>,
    /// The head of the answer becomes an object of filter state, `envoy.tcp_proxy.propagate_response_headers`.
    pub propagate_headers: bool,
    /// The trailers become one, `envoy.tcp_proxy.propagate_response_trailers`.
    pub propagate_trailers: bool,
    /// The request gets an id.
    pub request_id: Option<TunnelRequestId>,
}

/// Where the id of a request for a tunnel is told. It is a UUID of version 4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelRequestId {
    /// Header of the request, in small letters. Envoy's default: `x-request-id`.
    pub header: Arc<str>,
    /// Key of dynamic metadata in `envoy.filters.network.tcp_proxy`. Envoy's default: `tunnel_request_id`.
    pub metadata_key: Arc<str>,
}

/// `envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimit {
    /// `connection_limit.<stat_prefix>.` of its stats.
    pub stat_prefix: Arc<str>,
    /// Open connections at once, at least 1, over all workers.
    pub max_connections: u32,
    /// How long a refused connection is kept before it is closed.
    pub delay: Option<Duration>,
    /// `runtime_enabled`.
    pub enabled: bool,
}

/// `envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalRateLimit {
    /// `local_rate_limit.<stat_prefix>.` of its stats.
    pub stat_prefix: Arc<str>,
    /// New connections take a token each.
    pub bucket: TokenBucketPlan,
    /// `runtime_enabled`.
    pub enabled: bool,
    /// Filters with the same key and the same bucket share it.
    pub share_key: Option<Arc<str>>,
}

/// `envoy.type.v3.TokenBucket`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenBucketPlan {
    /// What it holds, and begins with; at least 1.
    pub max_tokens: u32,
    /// Added at each filling; at least 1.
    pub tokens_per_fill: u32,
    /// Between two fillings; at least 50 ms.
    pub fill_interval: Duration,
}

/// Where a TCP proxy sends its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TcpClusters {
    /// All to one.
    Cluster(Arc<str>),
    /// By weight; the sum is at least 1.
    Weighted {
        /// Cluster names with their weights and what hosts' metadata must hold.
        clusters: Vec<(Arc<str>, u32, MetadataMatch)>,
        /// Sum of the weights.
        total: u64,
    },
}

impl TcpProxy {
    /// The cluster for a connection with this random number, and what its hosts' metadata must hold.
    pub fn target(&self, random: u64) -> (&Arc<str>, &MetadataMatch) {
        match &self.cluster {
            TcpClusters::Cluster(name) => (name, &self.metadata_match),
            TcpClusters::Weighted { clusters, total } => {
                let mut rest = random % total;
                for (name, weight, wanted) in clusters {
                    let weight = u64::from(*weight);
                    if rest < weight {
                        return (name, wanted);
                    }
                    rest -= weight;
                }
                let (name, _, wanted) = &clusters[clusters.len() - 1];
                (name, wanted)
            }
        }
    }
}
