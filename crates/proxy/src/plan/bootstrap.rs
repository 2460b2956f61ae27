//! The bootstrap: what the process begins with, and where the rest comes from.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::Value;

use super::{
    access_log::AccessLog,
    address::Address,
    endpoint::Locality,
    lazy::LazyCluster,
    listener::Listener,
    matcher::{Finite, StringMatcher},
    overload::OverloadManager,
    tls::Secret,
    tracing::Tracer,
};

/// `envoy.config.bootstrap.v3.Bootstrap`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// Who we are.
    pub node: Node,
    /// Clusters that are always there, with their encoding, a part of [`Bootstrap::encoded`].
    pub static_clusters: Vec<(Arc<LazyCluster>, Bytes)>,
    /// Listeners that are always there, with their encoding, a part of [`Bootstrap::encoded`].
    pub static_listeners: Vec<(Arc<Listener>, Bytes)>,
    /// Secrets that are always there.
    pub static_secrets: Vec<Secret>,
    /// Where listeners come from.
    pub lds: Option<ConfigSource>,
    /// Where clusters come from.
    pub cds: Option<ConfigSource>,
    /// The aggregated stream.
    pub ads: Option<Ads>,
    /// The admin endpoint.
    pub admin: Option<Admin>,
    /// Which stats exist, and their tags.
    pub stats: StatsConfig,
    /// What `server.version` says in place of the revision.
    pub server_version: Option<u64>,
    /// How often stats are flushed to sinks. Default 5 s.
    pub stats_flush_interval: Duration,
    /// Values of the static runtime layers, merged in order.
    pub runtime: std::collections::BTreeMap<String, Value>,
    /// Downstream connections at once; `None` is no limit.
    pub max_downstream_connections: Option<u64>,
    /// What is measured, and what is given up when it is too much.
    pub overload: Option<Arc<OverloadManager>>,
    /// `application_log_config.log_format`.
    pub log_format: Option<LogFormatConfig>,
    /// `cluster_manager.local_cluster_name`: the cluster of the proxies like this one, for zone-aware routing.
    pub local_cluster_name: Option<Arc<str>>,
    /// `cluster_manager.outlier_detection.event_log_path`.
    pub outlier_event_log: Option<PathBuf>,
    /// Who collects spans, where a connection manager traces and does not say.
    pub tracer: Option<Arc<Tracer>>,
    /// Prefix of the headers we add, `x-envoy` by default.
    pub header_prefix: Arc<str>,
    /// The message as it was read (after merging), in its wire form: for `/config_dump` and for the xDS node.
    pub encoded: Bytes,
}

impl Bootstrap {
    /// A whole number of the static runtime layers; none where the key is absent or holds something else.
    pub fn runtime_number(&self, key: &str) -> Option<u64> {
        match self.runtime.get(key)? {
            Value::Number(number) => number
                .as_u64()
                .or_else(|| number.as_f64().filter(|n| *n >= 0.0).map(|n| n as u64)),
            Value::String(text) => text.parse().ok(),
            _ => None,
        }
    }
}

/// `envoy.config.core.v3.Node`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// `sidecar~10.0.0.1~pod.ns~ns.svc.cluster.local` in a mesh.
    pub id: Arc<str>,
    /// Service cluster.
    pub cluster: Arc<str>,
    /// Free structure.
    pub metadata: Value,
    /// Where we are.
    pub locality: Locality,
}

/// Where a resource is asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfigSource {
    /// The place.
    pub kind: ConfigSourceKind,
    /// How long its first answer is waited for; `None` for ever. Default 15 s.
    pub initial_fetch_timeout: Option<Duration>,
}

/// The place of a config source.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConfigSourceKind {
    /// The aggregated stream of the bootstrap.
    Ads,
    /// A gRPC stream of its own to this cluster.
    Grpc {
        /// Cluster name.
        cluster: Arc<str>,
        /// Delta instead of state of the world.
        delta: bool,
    },
    /// A file, read again when it is moved into place.
    Path(PathBuf),
}

/// The aggregated stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ads {
    /// Static cluster it goes to.
    pub cluster: Arc<str>,
    /// Delta instead of state of the world.
    pub delta: bool,
    /// The node is sent in the first request only.
    pub set_node_on_first_message_only: bool,
    /// Metadata of the stream.
    pub initial_metadata: Vec<(Arc<str>, Arc<str>)>,
}

/// The admin endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens.
    pub address: Address,
    /// Log of its requests.
    pub access_logs: Vec<AccessLog>,
}

/// `envoy.config.metrics.v3.StatsConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatsConfig {
    /// Tags taken out of names, in order.
    pub tags: Vec<StatsTag>,
    /// Envoy's own tags too. Default true.
    pub use_all_default_tags: bool,
    /// Which stats exist.
    pub matcher: StatsMatcher,
    /// Buckets by stat name.
    pub histogram_buckets: Vec<(StringMatcher, Vec<Finite>)>,
}

/// One tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatsTag {
    /// Name of the tag.
    pub name: Arc<str>,
    /// Where its value comes from.
    pub source: StatsTagSource,
}

/// Where a tag's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatsTagSource {
    /// Group 2 (or 1) is the value, group 1 is cut out of the name.
    Regex(Arc<str>),
    /// Always this.
    Fixed(Arc<str>),
}

/// Which stats exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum StatsMatcher {
    /// All.
    #[default]
    All,
    /// None.
    None,
    /// Those that one of these fits.
    Include(Vec<StringMatcher>),
    /// Those that none of these fits.
    Exclude(Vec<StringMatcher>),
}

impl StatsMatcher {
    /// Whether a stat of this full name exists.
    pub fn admits(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Include(any) => any.iter().any(|m| m.matches(name.as_bytes())),
            Self::Exclude(none) => !none.iter().any(|m| m.matches(name.as_bytes())),
        }
    }
}

/// `application_log_config.log_format`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogFormatConfig {
    /// spdlog pattern.
    Text(Arc<str>),
    /// JSON members with spdlog patterns.
    Json(Value),
}
