//! Network filters: what is done with the bytes of a connection.

use std::{sync::Arc, time::Duration};

use super::{
    access_log::AccessLog,
    http::HttpConnectionManager,
    http_filter::{IstioStats, MetadataExchange},
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
}

impl NetworkFilterConfig {
    /// Whether a chain ends here.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::HttpConnectionManager(_) | Self::TcpProxy(_))
    }
}

/// `envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpProxy {
    /// `tcp.<stat_prefix>.` of its stats.
    pub stat_prefix: Arc<str>,
    /// Where connections go.
    pub cluster: TcpClusters,
    /// Closes a connection without bytes in either direction; `None` never. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// Closes a connection of this age; `None` never.
    pub max_downstream_connection_duration: Option<Duration>,
    /// How often to try to connect (each time a fresh pick). Default 1.
    pub max_connect_attempts: u32,
    /// Hashes the source address for RING_HASH and MAGLEV.
    pub hash_source_ip: bool,
    /// One line per connection.
    pub access_logs: Vec<AccessLog>,
    /// Also writes the access log at this interval while the connection lasts.
    pub access_log_flush_interval: Option<Duration>,
    /// Also writes the access log when the upstream connection stands.
    pub flush_access_log_on_connected: bool,
}

/// Where a TCP proxy sends its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TcpClusters {
    /// All to one.
    Cluster(Arc<str>),
    /// By weight; the sum is at least 1.
    Weighted {
        /// Cluster names with their weights.
        clusters: Vec<(Arc<str>, u32)>,
        /// Sum of the weights.
        total: u64,
    },
}

impl TcpClusters {
    /// The cluster for a connection with this random number.
    pub fn pick(&self, random: u64) -> &Arc<str> {
        match self {
            Self::Cluster(name) => name,
            Self::Weighted { clusters, total } => {
                let mut rest = random % total;
                for (name, weight) in clusters {
                    let weight = u64::from(*weight);
                    if rest < weight {
                        return name;
                    }
                    rest -= weight;
                }
                &clusters[clusters.len() - 1].0
            }
        }
    }
}
