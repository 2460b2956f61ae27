//! HTTP filters: their configuration on the connection manager and per route.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    ext_authz::{CheckSettings, ExtAuthz},
    filter_config::{
        HeaderMutationFilter, HeaderToMetadata, LocalRateLimit, Lua, LuaPerRoute, Mutations,
        SetMetadata, StatefulSession,
    },
    filter_state::RequestState,
    health_check::HealthCheckFilter,
    jwt_authn::JwtAuthn,
    matcher::{Fraction, HeaderMatcher, StringMatcher},
    rate_limit_service::{RateLimitFilter, RateLimitRoute},
    rbac::Rbac,
};

/// One HTTP filter of a connection manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpFilter {
    /// As configured; per-route configuration finds it by this name.
    pub name: Arc<str>,
    /// Off unless a route switches it on.
    pub disabled: bool,
    /// What it does.
    pub config: HttpFilterConfig,
}

/// The HTTP filters that exist here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpFilterConfig {
    /// `envoy.filters.http.router`.
    Router(RouterFilter),
    /// `envoy.filters.http.fault`.
    Fault(Arc<Fault>),
    /// `envoy.filters.http.cors`; the policy is per route.
    Cors,
    /// `envoy.filters.http.grpc_stats`.
    GrpcStats(GrpcStats),
    /// `envoy.filters.http.grpc_web`.
    GrpcWeb,
    /// `istio.alpn`.
    Alpn(Arc<AlpnFilter>),
    /// `istio.metadata_exchange` (`io.istio.http.peer_metadata.Config`).
    PeerMetadata(PeerMetadata),
    /// `envoy.filters.http.rbac`.
    Rbac(Arc<Rbac>),
    /// `envoy.filters.http.ext_authz`.
    ExtAuthz(Arc<ExtAuthz>),
    /// `envoy.filters.http.jwt_authn`.
    JwtAuthn(Arc<JwtAuthn>),
    /// `istio.stats`.
    IstioStats(Arc<IstioStats>),
    /// `envoy.filters.http.header_mutation`.
    HeaderMutation(Arc<HeaderMutationFilter>),
    /// `envoy.filters.http.header_to_metadata`.
    HeaderToMetadata(Arc<HeaderToMetadata>),
    /// `envoy.filters.http.set_metadata`.
    SetMetadata(Arc<[SetMetadata]>),
    /// `envoy.filters.http.set_filter_state`.
    SetFilterState(Arc<RequestState>),
    /// `envoy.filters.http.stateful_session`.
    StatefulSession(Option<Arc<StatefulSession>>),
    /// `envoy.filters.http.local_ratelimit`.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// `envoy.filters.http.ratelimit`.
    RateLimit(Arc<RateLimitFilter>),
    /// `envoy.filters.http.buffer`: bytes of a request at most.
    Buffer(u32),
    /// `envoy.filters.http.lua`.
    Lua(Arc<Lua>),
    /// `envoy.filters.http.health_check`.
    HealthCheck(Arc<HealthCheckFilter>),
    /// `envoy.filters.http.original_src`.
    OriginalSrc {
        /// SO_MARK of upstream connections; 0 sets none.
        mark: u32,
    },
}

/// `envoy.extensions.filters.http.router.v3.Router`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterFilter {
    /// `dynamic_stats`: per-cluster stats of response codes. Default true.
    pub dynamic_stats: bool,
    /// Adds no x-envoy-* headers.
    pub suppress_envoy_headers: bool,
    /// x-envoy-* request headers whose values are checked strictly (400 when invalid).
    pub strict_check_headers: Vec<Arc<str>>,
    /// An x-envoy-expected-rq-timeout-ms of the request is respected.
    pub respect_expected_rq_timeout: bool,
}

impl Default for RouterFilter {
    fn default() -> Self {
        Self {
            dynamic_stats: true,
            suppress_envoy_headers: false,
            strict_check_headers: Vec::new(),
            respect_expected_rq_timeout: false,
        }
    }
}

/// `envoy.extensions.filters.http.fault.v3.HTTPFault`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fault {
    /// Delay before the request goes on.
    pub delay: Option<FaultDelay>,
    /// Answer instead of forwarding.
    pub abort: Option<FaultAbort>,
    /// Only for requests with these headers.
    pub headers: Vec<HeaderMatcher>,
    /// Only for this upstream cluster.
    pub upstream_cluster: Option<Arc<str>>,
    /// Only for these downstream nodes (x-envoy-downstream-service-node).
    pub downstream_nodes: Vec<Arc<str>>,
    /// Faults at once; `None` is no limit.
    pub max_active_faults: Option<u32>,
    /// No `fault.<cluster>.` stats.
    pub disable_downstream_cluster_stats: bool,
}

/// How a request is delayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultDelay {
    /// Which share of requests.
    pub percentage: Fraction,
    /// How long.
    pub source: FaultDelaySource,
}

/// Where the length of a delay comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultDelaySource {
    /// Always this.
    Fixed(Duration),
    /// `x-envoy-fault-delay-request` in milliseconds.
    Header,
}

/// How a request is aborted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultAbort {
    /// Which share of requests.
    pub percentage: Fraction,
    /// With what.
    pub source: FaultAbortSource,
    /// The reply's text. Default `fault filter abort`.
    pub body: Bytes,
}

/// With what a request is aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAbortSource {
    /// HTTP status 200–599.
    HttpStatus(u16),
    /// gRPC status.
    GrpcStatus(u32),
    /// `x-envoy-fault-abort-request` or `x-envoy-fault-abort-grpc-request`.
    Header,
}

/// `envoy.extensions.filters.http.cors.v3.CorsPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorsPolicy {
    /// Which origins are allowed.
    pub allow_origin: Vec<StringMatcher>,
    /// access-control-allow-methods; empty: not sent.
    pub allow_methods: Arc<str>,
    /// access-control-allow-headers; empty: not sent.
    pub allow_headers: Arc<str>,
    /// access-control-expose-headers; empty: not sent.
    pub expose_headers: Arc<str>,
    /// access-control-max-age; empty: not sent.
    pub max_age: Arc<str>,
    /// Sends access-control-allow-credentials.
    pub allow_credentials: Option<bool>,
    /// Sends access-control-allow-private-network when asked.
    pub allow_private_network_access: Option<bool>,
    /// Forwards preflights whose origin is not allowed. Default true.
    pub forward_not_matching_preflights: Option<bool>,
    /// Share of requests it is applied to. Default all.
    pub enabled: Fraction,
    /// Share of requests it is evaluated for without effect.
    pub shadow_enabled: Fraction,
}

impl CorsPolicy {
    /// This policy, with what it does not say as a more general one has it. What share of requests a policy is for is the
    /// most specific one's alone.
    pub fn or(mut self, general: &CorsPolicy) -> CorsPolicy {
        if self.allow_origin.is_empty() {
            self.allow_origin.clone_from(&general.allow_origin);
        }
        for (own, other) in [
            (&mut self.allow_methods, &general.allow_methods),
            (&mut self.allow_headers, &general.allow_headers),
            (&mut self.expose_headers, &general.expose_headers),
            (&mut self.max_age, &general.max_age),
        ] {
            if own.is_empty() {
                own.clone_from(other);
            }
        }
        self.allow_credentials = self.allow_credentials.or(general.allow_credentials);
        self.allow_private_network_access = self
            .allow_private_network_access
            .or(general.allow_private_network_access);
        self.forward_not_matching_preflights = self
            .forward_not_matching_preflights
            .or(general.forward_not_matching_preflights);
        self
    }
}

/// `envoy.extensions.filters.http.grpc_stats.v3.FilterConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcStats {
    /// Counts messages into filter state, for other filters.
    pub emit_filter_state: bool,
    /// Which methods get stats of their own.
    pub methods: GrpcStatsMethods,
    /// Histograms of upstream duration.
    pub enable_upstream_stats: bool,
}

/// Which gRPC methods get stats of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrpcStatsMethods {
    /// None: totals only.
    None,
    /// All.
    All,
    /// Service name with its methods.
    Listed(Vec<(Arc<str>, Vec<Arc<str>>)>),
}

/// `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AlpnFilter {
    /// ALPN offered upstream, by the protocol of the upstream connection.
    pub overrides: Vec<AlpnOverride>,
}

/// One row of [`AlpnFilter`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlpnOverride {
    /// For which upstream protocol.
    pub upstream_protocol: AlpnProtocol,
    /// The list to offer.
    pub alpn: Vec<Arc<str>>,
}

/// Protocols that `istio.alpn` tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlpnProtocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
}

/// `io.istio.http.peer_metadata.Config`: workload metadata in `x-envoy-peer-metadata` headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerMetadata {
    /// Reads the downstream peer from the request's headers.
    pub downstream_discovery_headers: bool,
    /// Reads the upstream peer from the response's headers.
    pub upstream_discovery_headers: bool,
    /// Writes our metadata into the response.
    pub downstream_propagation: bool,
    /// Writes our metadata into the request.
    pub upstream_propagation: bool,
    /// `shared_with_upstream`: peers reach upstream connections too.
    pub shared_with_upstream: bool,
}

/// `envoy.tcp.metadataexchange.config.MetadataExchange`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataExchange {
    /// ALPN under which the exchange happens (`istio-peer-exchange`).
    pub protocol: Arc<str>,
}

/// `stats.PluginConfig`: Istio's request and TCP metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IstioStats {
    /// Unknown hosts are not taken from the Host header (inbound and gateways).
    pub disable_host_header_fallback: bool,
    /// How often TCP metrics of open connections are reported. Default 5 s.
    pub tcp_reporting_duration: Option<Duration>,
    /// Which metrics change, in order; empty names mean all.
    pub metrics: Vec<IstioMetricOverride>,
    /// Metrics defined in the configuration.
    pub definitions: Vec<IstioMetricDefinition>,
    /// Reports as a gateway or waypoint does.
    pub server_gateway: bool,
}

/// One entry of `metrics`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IstioMetricOverride {
    /// Metric name without `istio_`; empty: all.
    pub name: Arc<str>,
    /// Not reported.
    pub drop: bool,
    /// Dimensions taken off.
    pub tags_to_remove: Vec<Arc<str>>,
    /// Dimensions set or added: name and expression.
    pub dimensions: Vec<(Arc<str>, Arc<str>)>,
}

/// A metric defined in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstioMetricDefinition {
    /// Name without `istio_`.
    pub name: Arc<str>,
    /// Expression of its value.
    pub value: Arc<str>,
    /// `COUNTER`, `GAUGE` or `HISTOGRAM`.
    pub kind: Arc<str>,
}

/// What a route, virtual host or weighted cluster says about one HTTP filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteFilterConfig {
    /// The filter does not run.
    Disabled,
    /// The filter runs although it is `disabled` on the connection manager.
    Enabled,
    /// Fault of its own.
    Fault(Arc<Fault>),
    /// CORS policy.
    Cors(Arc<CorsPolicy>),
    /// Mutations of its own, with those of the other levels.
    HeaderMutation(Arc<Mutations>),
    /// Rules in place of the filter's.
    HeaderToMetadata(Arc<HeaderToMetadata>),
    /// Entries in place of the filter's.
    SetMetadata(Arc<[SetMetadata]>),
    /// Objects of its own, with those of the other levels.
    SetFilterState(Arc<RequestState>),
    /// A session in place of the filter's.
    StatefulSession(Arc<StatefulSession>),
    /// Limits in place of the filter's.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// Which rate limits a service is asked about.
    RateLimit(Arc<RateLimitRoute>),
    /// A limit in place of the filter's.
    Buffer(u32),
    /// Policies of its own.
    Rbac(Arc<Rbac>),
    /// What `ext_authz` tells its service of a route, and whether with the body.
    ExtAuthz(Arc<CheckSettings>),
    /// Which script runs, and what it is told.
    Lua(Arc<LuaPerRoute>),
    /// What `jwt_authn` needs, by the name of a requirement.
    JwtRequirement(Arc<str>),
}

/// `typed_per_filter_config`: configuration by filter name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PerFilterConfig(Vec<(Arc<str>, RouteFilterConfig)>);

impl PerFilterConfig {
    /// From pairs; a later pair of the same name loses.
    pub fn new(mut pairs: Vec<(Arc<str>, RouteFilterConfig)>) -> Self {
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|b, a| a.0 == b.0);
        Self(pairs)
    }

    /// With this for a filter about which nothing is said yet.
    pub(crate) fn or(self, filter: &str, config: RouteFilterConfig) -> Self {
        let mut pairs = self.0;
        pairs.push((filter.into(), config));
        Self::new(pairs)
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is said about one filter.
    pub fn of(&self, filter: &str) -> Option<&RouteFilterConfig> {
        self.0
            .iter()
            .find(|(name, _)| &**name == filter)
            .map(|(_, c)| c)
    }
}
