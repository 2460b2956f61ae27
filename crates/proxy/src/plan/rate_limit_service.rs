//! `ratelimit`, HTTP and network: which rate limit service is asked about requests or connections, and what becomes of
//! its answer.

use std::sync::Arc;

use super::{
    access_log::LogFormat,
    ext_authz::GrpcCall,
    filter_config::VirtualHostLimits,
    header::HeaderAdd,
    matcher::Fraction,
    rate_limit::{Limit, RateLimit},
};

/// `envoy.extensions.filters.http.ratelimit.v3.RateLimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateLimitFilter {
    /// Who is asked; its timeout is the filter's, by default 20 ms.
    pub service: GrpcCall,
    /// Whose limits they are.
    pub domain: Arc<str>,
    /// Which rate limits of routes make descriptors.
    pub stage: u32,
    /// Which requests it is asked about.
    pub requests: RequestType,
    /// Share of requests that are refused where it cannot be asked. Default none.
    pub failure_deny: Fraction,
    /// Status of such refusals. Default 500.
    pub status_on_error: u16,
    /// Status of requests over the limit. Default 429.
    pub status: u16,
    /// gRPC clients get RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub resource_exhausted: bool,
    /// Tells limit, remaining and reset in x-ratelimit headers.
    pub ratelimit_headers: bool,
    /// Tells of a request over the limit in `x-envoy-ratelimited`. Default true.
    pub ratelimited_header: bool,
    /// Tells whoever is refused with 429 when to come again.
    pub retry_after: bool,
    /// For refusals.
    pub response_headers: Vec<HeaderAdd>,
    /// `ratelimit.<stat_prefix>.` in the cluster's stats; empty: without it.
    pub stat_prefix: Arc<str>,
    /// Share of requests that it is asked about. Default all.
    pub enabled: Fraction,
    /// Share of those over the limit that are refused. Default all.
    pub enforced: Fraction,
    /// In place of the route's rate limits.
    pub rate_limits: Vec<RateLimit>,
    /// Where the service's metadata goes. Default `envoy.filters.http.ratelimit`.
    pub metadata_namespace: Arc<str>,
}

/// `request_type`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RequestType {
    /// Of clients of the mesh.
    Internal,
    /// Of others.
    External,
    /// All.
    #[default]
    Both,
}

impl RequestType {
    /// Whether it has a request in it.
    pub fn has(self, internal: bool) -> bool {
        match self {
            Self::Internal => internal,
            Self::External => !internal,
            Self::Both => true,
        }
    }
}

/// `RateLimitPerRoute`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RateLimitRoute {
    /// How the virtual host's rate limits count.
    pub virtual_host: VirtualHostLimits,
    /// In place of the filter's and the route's rate limits.
    pub rate_limits: Vec<RateLimit>,
    /// In place of the filter's.
    pub domain: Option<Arc<str>>,
}

/// `envoy.extensions.filters.network.ratelimit.v3.RateLimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRateLimit {
    /// `ratelimit.<stat_prefix>.` of its stats.
    pub stat_prefix: Arc<str>,
    /// Who is asked; its timeout is the filter's, by default 20 ms.
    pub service: GrpcCall,
    /// Whose limits they are.
    pub domain: Arc<str>,
    /// At least one.
    pub descriptors: Vec<ConnectionDescriptor>,
    /// Connections are refused where the service cannot be asked.
    pub failure_deny: bool,
}

/// `envoy.extensions.common.ratelimit.v3.RateLimitDescriptor` of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionDescriptor {
    /// Keys, and what makes the values; at least one.
    pub entries: Vec<(Arc<str>, LogFormat)>,
    /// Replaces the service's limit.
    pub limit: Option<Limit>,
    /// What a connection counts, where it is not one.
    pub hits_addend: Option<u64>,
    /// It is given back instead of taken.
    pub negative_hits: bool,
}
