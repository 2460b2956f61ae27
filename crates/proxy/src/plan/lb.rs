//! How an endpoint is chosen: the policy, and what all policies share.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::Value;

use super::{endpoint::HealthStatus, matcher::Percent};

/// How an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin(Option<SlowStart>),
    /// The less loaded of `choice_count` random ones.
    LeastRequest {
        /// How many are looked at. Default 2.
        choice_count: u32,
        /// Weight of active requests in parts per million when weights differ. Default 1_000_000.
        active_request_bias_ppm: u32,
        /// Looks at all of them.
        full_scan: bool,
        /// New hosts get their share by and by.
        slow_start: Option<SlowStart>,
    },
    /// Any.
    Random,
    /// Ketama ring.
    RingHash {
        /// Default 1024.
        minimum_ring_size: u64,
        /// Default 8 Mi.
        maximum_ring_size: u64,
        /// Murmur 2 in place of xxHash64.
        murmur: bool,
    },
    /// Maglev table.
    Maglev {
        /// A prime. Default 65537.
        table_size: u64,
    },
    /// The cluster itself says (ORIGINAL_DST, aggregate).
    ClusterProvided,
}

impl LbPolicy {
    /// Whether the hash of a request decides.
    pub fn hashes(&self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev { .. })
    }
}

/// `SlowStartConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowStart {
    /// How long a host counts as new.
    pub window: Duration,
    /// Exponent in thousandths. Default 1000.
    pub aggression_milli: u32,
    /// Share a new host begins with. Default 10 %.
    pub min_weight: Percent,
}

/// `CommonLbConfig`, and what the typed policies say of the same things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommonLb {
    /// Below this share of healthy hosts all are used; 0 switches that off. Default 50 %.
    pub healthy_panic_threshold: Percent,
    /// Localities are chosen by weight first.
    pub locality_weighted: bool,
    /// How requests stay in this proxy's own locality; applies where there is a local cluster.
    pub zone_aware: ZoneAware,
    /// In panic no host is chosen at all (`fail_traffic_on_panic`).
    pub fail_traffic_on_panic: bool,
    /// Pools of hosts are drained whenever the set of hosts changes.
    pub close_connections_on_host_set_change: bool,
    /// A new host counts for nothing until its first health check.
    pub ignore_new_hosts_until_first_hc: bool,
    /// Ring and Maglev hash the host name instead of the address.
    pub use_hostname_for_hashing: bool,
    /// Upper bound of a host's load in percent of the average for RING_HASH and MAGLEV; `None` is no bound.
    pub hash_balance_factor: Option<u32>,
    /// Hosts of which health a request may name for itself.
    pub override_host_status: StatusSet,
}

impl Default for CommonLb {
    fn default() -> Self {
        Self {
            healthy_panic_threshold: Percent::whole(50),
            locality_weighted: false,
            zone_aware: ZoneAware::default(),
            fail_traffic_on_panic: false,
            close_connections_on_host_set_change: false,
            ignore_new_hosts_until_first_hc: false,
            use_hostname_for_hashing: false,
            hash_balance_factor: None,
            override_host_status: StatusSet::default(),
        }
    }
}

impl CommonLb {
    /// `healthy_panic_threshold` in whole percent, rounded as Envoy rounds it.
    pub fn panic_percent(&self) -> u32 {
        (self.healthy_panic_threshold.ratio() * 100.0).round() as u32
    }
}

/// `ZoneAwareLbConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneAware {
    /// Share of requests it is done for. Default 100 %.
    pub routing_enabled: Percent,
    /// Healthy hosts below which it is not done. Default 6.
    pub min_cluster_size: u64,
    /// Every request stays where there is a healthy host of this locality.
    pub force_locality_direct_routing: bool,
}

impl Default for ZoneAware {
    fn default() -> Self {
        Self {
            routing_enabled: Percent::whole(100),
            min_cluster_size: 6,
            force_locality_direct_routing: false,
        }
    }
}

/// A set of [`HealthStatus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusSet(u8);

impl StatusSet {
    /// The set of these.
    pub fn new(statuses: impl IntoIterator<Item = HealthStatus>) -> Self {
        Self(statuses.into_iter().fold(0, |set, s| set | 1 << s as u8))
    }

    /// Whether it is one of them.
    pub fn contains(self, status: HealthStatus) -> bool {
        self.0 & 1 << status as u8 != 0
    }
}

impl Default for StatusSet {
    /// What Envoy allows where nothing is said.
    fn default() -> Self {
        Self::new([
            HealthStatus::Unknown,
            HealthStatus::Healthy,
            HealthStatus::Degraded,
        ])
    }
}

/// `LbSubsetConfig`: hosts are chosen among those whose `envoy.lb` metadata is what the route asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsetLb {
    /// Where no subset fits.
    pub fallback: SubsetFallback,
    /// Keys and values of the default subset.
    pub default_subset: BTreeMap<String, Value>,
    /// Which keys make subsets.
    pub selectors: Vec<SubsetSelector>,
    /// Weights of localities count inside of subsets.
    pub locality_weight_aware: bool,
    /// Those weights shrink with the share of a locality's hosts that are in the subset.
    pub scale_locality_weight: bool,
    /// Any host where the fallback gives none.
    pub panic_mode_any: bool,
    /// A list on a host stands for each of its elements.
    pub list_as_any: bool,
    /// Keys of a route that no selector has are left out.
    pub allow_redundant_keys: bool,
    /// `fallback_list` of a route's metadata is tried in order.
    pub metadata_fallback_list: bool,
}

/// Where no subset fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubsetFallback {
    /// No host.
    NoFallback,
    /// Any host.
    AnyEndpoint,
    /// Hosts of the default subset.
    DefaultSubset,
}

/// `LbSubsetSelector`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsetSelector {
    /// Sorted.
    pub keys: Vec<Arc<str>>,
    /// Each subset is one host.
    pub single_host_per_subset: bool,
    /// Where a route has exactly these keys and no subset fits; `None` leaves it to the cluster.
    pub fallback: Option<SelectorFallback>,
}

/// What a selector falls back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SelectorFallback {
    /// No host.
    NoFallback,
    /// Any host.
    AnyEndpoint,
    /// Hosts of the default subset.
    DefaultSubset,
    /// The same again with these keys only.
    KeysSubset(Vec<Arc<str>>),
}

/// Where the `override_host` policy finds the addresses that a request should go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OverrideSource {
    /// A request header, lower case.
    Header(Arc<str>),
    /// Dynamic metadata of the request: namespace and path.
    Metadata(Arc<str>, Vec<Arc<str>>),
}
