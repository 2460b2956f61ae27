//! Endpoints: the hosts of a cluster by priority and locality.

use std::{sync::Arc, time::Duration};

use super::{address::Address, matcher::Fraction, metadata::Metadata};

/// `envoy.config.endpoint.v3.ClusterLoadAssignment`. Empty is legal: the cluster has no host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterLoadAssignment {
    /// Name it was asked for by.
    pub cluster_name: Arc<str>,
    /// Groups of endpoints; priorities are without gaps, beginning with 0.
    pub localities: Vec<LocalityEndpoints>,
    /// How much a priority counts for when some of its hosts are down, in percent. Default 140.
    pub overprovisioning_factor: u32,
    /// Health of a priority is a share of its weight, not of the number of its hosts.
    pub weighted_priority_health: bool,
    /// After this time without a new assignment its hosts are gone.
    pub endpoint_stale_after: Option<Duration>,
    /// Share of requests refused, by category.
    pub drop_overloads: Vec<(Arc<str>, Fraction)>,
}

impl ClusterLoadAssignment {
    /// All endpoints with their group.
    pub fn endpoints(&self) -> impl Iterator<Item = (&LocalityEndpoints, &Endpoint)> {
        self.localities
            .iter()
            .flat_map(|l| l.endpoints.iter().map(move |e| (l, e)))
    }
}

/// The endpoints of one locality and priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalityEndpoints {
    /// Where they are.
    pub locality: Arc<Locality>,
    /// 0 is used first.
    pub priority: u32,
    /// Share of the locality, with `locality_weighted`; `None` gets no traffic then.
    pub weight: Option<u32>,
    /// Hosts.
    pub endpoints: Vec<Endpoint>,
}

/// Where an endpoint or this proxy is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Locality {
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Sub-zone.
    pub sub_zone: String,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where to connect; hosts are the same when this is.
    pub address: Address,
    /// Further addresses of the same host (dual stack), tried after the first.
    pub additional_addresses: Vec<Address>,
    /// Name of the host, for `auto` host rewrite; empty when none.
    pub hostname: Arc<str>,
    /// What discovery says about it.
    pub health: HealthStatus,
    /// Share among its locality. Default 1.
    pub weight: u32,
    /// Free structures; chooses the transport.
    pub metadata: Metadata,
    /// How its health is checked, where that is not as the rest says.
    pub health_check: Option<Arc<EndpointHealthCheck>>,
}

/// `Endpoint.HealthCheckConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointHealthCheck {
    /// Port to check in place of the endpoint's.
    pub port: Option<u16>,
    /// Host header in place of the cluster's name.
    pub hostname: Arc<str>,
    /// Address to check in place of the endpoint's.
    pub address: Option<Address>,
    /// It is not checked, and counts as healthy.
    pub disabled: bool,
}

/// `envoy.config.core.v3.HealthStatus`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum HealthStatus {
    /// Not said: healthy.
    #[default]
    Unknown,
    /// Healthy.
    Healthy,
    /// Not used.
    Unhealthy,
    /// Not used for new requests.
    Draining,
    /// Not used.
    Timeout,
    /// Used when healthy ones do not suffice.
    Degraded,
}

impl HealthStatus {
    /// Whether new requests may go there while others suffice.
    pub fn is_healthy(self) -> bool {
        matches!(self, Self::Unknown | Self::Healthy)
    }

    /// Envoy's word in `/clusters?format=json` (`eds_health_status`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Healthy => "HEALTHY",
            Self::Unhealthy => "UNHEALTHY",
            Self::Draining => "DRAINING",
            Self::Timeout => "TIMEOUT",
            Self::Degraded => "DEGRADED",
        }
    }
}
