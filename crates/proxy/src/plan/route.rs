//! Route configurations: virtual hosts, routes and what a matched request is done with.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    access_log::LogFormat,
    format::Template,
    header::{HeaderMutation, HeaderMutations},
    http_filter::PerFilterConfig,
    lazy::LazyVirtualHost,
    matcher::{
        CookieMatcher, FilterStateMatcher, Fraction, HeaderMatcher, MetadataMatcher, QueryMatcher,
        RuntimeFraction,
    },
    matcher_tree::Matcher,
    metadata::Metadata,
    rate_limit::RateLimit,
    regex::Regex,
    retry::RetryPolicy,
    route_match::DomainTable,
    uri_template::{UriTemplate, UriTemplateRewrite},
};
use crate::proxy_protocol::Version;

/// `envoy.config.route.v3.RouteConfiguration`. See [`RouteConfiguration::find`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteConfiguration {
    /// Name; empty for a nameless inline one.
    pub name: Arc<str>,
    /// In the order of the message.
    pub virtual_hosts: Vec<LazyVirtualHost>,
    /// Which virtual host serves a domain.
    pub(crate) domains: DomainTable,
    /// Header operations of every request.
    pub headers: HeaderOperations,
    /// Order of header operations: false applies route, virtual host, configuration (the last wins).
    pub most_specific_header_mutations_wins: bool,
    /// Request headers taken off when the client is external.
    pub internal_only_headers: Vec<Arc<str>>,
    /// Ignores the port of the host header when looking for the virtual host.
    pub ignore_port_in_host_matching: bool,
    /// Header that replaces the host when looking for the virtual host.
    pub vhost_header: Option<Arc<str>>,
    /// Leaves `;parameters` out of path matching.
    pub ignore_path_parameters: bool,
    /// A route to a cluster that does not exist rejects the configuration.
    pub validate_clusters: bool,
    /// Copies of requests, where neither route nor virtual host has a policy.
    pub mirrors: Vec<Mirror>,
    /// Configuration by filter name.
    pub per_filter: PerFilterConfig,
    /// Free structures.
    pub metadata: Metadata,
}

/// Header operations of one level.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderOperations {
    /// On the request.
    pub request: HeaderMutations,
    /// On the response.
    pub response: HeaderMutations,
}

/// `envoy.config.route.v3.VirtualHost`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualHost {
    /// Name; used in stats and logs.
    pub name: Arc<str>,
    /// Domains as configured.
    pub domains: Vec<Arc<str>>,
    /// First match wins; those of [`VirtualHost::matcher`] where there is one.
    pub routes: Vec<Route>,
    /// A tree that leads to some of the routes, as their range of numbers.
    pub matcher: Option<Matcher<(u32, u32)>>,
    /// Names for classes of requests, in stats and logs; first match wins.
    pub virtual_clusters: Vec<VirtualCluster>,
    /// Rate limits of every route that has none, or that includes them.
    pub rate_limits: Vec<RateLimit>,
    /// Whether plaintext requests are redirected to https.
    pub require_tls: RequireTls,
    /// Header operations.
    pub headers: HeaderOperations,
    /// Sends x-envoy-attempt-count upstream.
    pub include_request_attempt_count: bool,
    /// Sends x-envoy-attempt-count downstream.
    pub include_attempt_count_in_response: bool,
    /// Sends x-envoy-is-timeout-retry upstream.
    pub include_is_timeout_retry_header: bool,
    /// For routes without one.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// `hedge_policy.hedge_on_per_try_timeout`, for routes without a policy.
    pub hedge_on_per_try_timeout: Option<bool>,
    /// Copies of requests, where the route has no policy.
    pub mirrors: Vec<Mirror>,
    /// How many bytes of a request may be kept for retries and copies; the listener's limit when absent.
    pub request_buffer_limit: Option<u64>,
    /// Configuration by filter name.
    pub per_filter: PerFilterConfig,
    /// Free structures.
    pub metadata: Metadata,
}

/// `envoy.config.route.v3.VirtualCluster`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualCluster {
    /// Stats are named `vhost.<vhost>.vcluster.<name>.`
    pub name: Arc<str>,
    /// All of them must hold.
    pub headers: Vec<HeaderMatcher>,
}

/// `VirtualHost.TlsRequirementType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RequireTls {
    /// No redirect.
    #[default]
    None,
    /// External requests without TLS are redirected.
    ExternalOnly,
    /// All requests without TLS are redirected.
    All,
}

/// `envoy.config.route.v3.Route`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Name; empty when none is configured.
    pub name: Arc<str>,
    /// Which requests it takes.
    pub matches: RouteMatch,
    /// What happens to them.
    pub action: Action,
    /// Header operations.
    pub headers: HeaderOperations,
    /// Operation name of its spans and of x-envoy-decorator-operation.
    pub decorator: Option<Decorator>,
    /// `vhost.<vhost>.route.<stat_prefix>.` stats.
    pub stat_prefix: Option<Arc<str>>,
    /// As on the virtual host, which it overrides.
    pub request_buffer_limit: Option<u64>,
    /// Configuration by filter name.
    pub per_filter: PerFilterConfig,
    /// Free structures (`istio.config` names the object it was made from).
    pub metadata: Metadata,
}

/// `envoy.config.route.v3.Decorator`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decorator {
    /// Name of the operation.
    pub operation: Arc<str>,
    /// Sent to the peer. Default true.
    pub propagate: bool,
}

/// `envoy.config.route.v3.RouteMatch`: all conditions must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteMatch {
    /// Condition on the path without its query.
    pub path: PathMatch,
    /// Whether the path is compared with its case. Default true. A regex has its own say.
    pub case_sensitive: bool,
    /// Conditions on headers.
    pub headers: Vec<HeaderMatcher>,
    /// Conditions on query parameters.
    pub query_parameters: Vec<QueryMatcher>,
    /// Only gRPC requests (`application/grpc` content type).
    pub grpc: bool,
    /// Only this share of requests.
    pub runtime_fraction: Option<RuntimeFraction>,
    /// Conditions on cookies.
    pub cookies: Vec<CookieMatcher>,
    /// Conditions on the client's certificate.
    pub tls: Option<TlsMatch>,
    /// Conditions on what filters before the router wrote.
    pub dynamic_metadata: Vec<MetadataMatcher>,
    /// Conditions on what filters before the router know.
    pub filter_state: Vec<FilterStateMatcher>,
}

/// Condition on a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// Begins with.
    Prefix(Arc<str>),
    /// Equals.
    Path(Arc<str>),
    /// Equals, or begins with it and a `/`. No trailing slash.
    PathSeparatedPrefix(Arc<str>),
    /// Matches as a whole.
    Regex(Regex),
    /// Matches a template.
    Template(UriTemplate),
    /// CONNECT requests.
    Connect,
}

/// Conditions on the client's certificate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TlsMatch {
    /// One was presented, or not.
    pub presented: Option<bool>,
    /// It was validated, or not.
    pub validated: Option<bool>,
}

/// What a matched request is done with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Forwarded.
    Route(Box<RouteAction>),
    /// Answered with a redirect.
    Redirect(Redirect),
    /// Answered with a fixed response.
    DirectResponse(DirectResponse),
    /// Only for filters; the router answers 404.
    NonForwarding,
}

/// `envoy.config.route.v3.RouteAction`. Timeouts: `None` means disabled unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteAction {
    /// Where to.
    pub cluster: ClusterSpecifier,
    /// Status when that cluster does not exist. Default 503.
    pub cluster_not_found_status: u16,
    /// The matched prefix (or path) becomes this.
    pub prefix_rewrite: Option<Arc<str>>,
    /// The path (without query) is rewritten.
    pub regex_rewrite: Option<RegexRewrite>,
    /// The whole path is replaced by this template.
    pub path_rewrite: Option<Template>,
    /// The path (without query) is made anew of the variables of the template that it matched.
    pub template_rewrite: Option<UriTemplateRewrite>,
    /// What becomes of the host.
    pub host_rewrite: HostRewrite,
    /// Appends the old host to x-forwarded-host when it is rewritten.
    pub append_x_forwarded_host: bool,
    /// Whole request with its retries. Default 15 s.
    pub timeout: Option<Duration>,
    /// Overrides the connection manager's stream idle timeout; the outer `None` leaves that one.
    pub idle_timeout: Option<Option<Duration>>,
    /// How long the client may take for the rest of a response that is all there, in place of the connection manager's.
    pub flush_timeout: Option<Option<Duration>>,
    /// Retries; `None` takes the virtual host's.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// `hedge_policy.hedge_on_per_try_timeout`: an attempt that takes too long goes on beside the next; `None` takes the
    /// virtual host's.
    pub hedge_on_per_try_timeout: Option<bool>,
    /// Copies of requests.
    pub mirrors: Vec<Mirror>,
    /// Which circuit breakers count.
    pub priority: Priority,
    /// What consistent hashing hashes.
    pub hash_policy: Vec<HashPolicy>,
    /// Deprecated `max_grpc_timeout`: present → a request's grpc-timeout is used, up to this; `Some(None)` is no cap.
    pub max_grpc_timeout: Option<Option<Duration>>,
    /// Subtracted from a request's grpc-timeout.
    pub grpc_timeout_offset: Option<Duration>,
    /// Limits of a stream's life.
    pub max_stream_duration: Option<MaxStreamDuration>,
    /// Overrides of the connection manager's upgrades.
    pub upgrades: Vec<RouteUpgrade>,
    /// Only endpoints whose `envoy.lb` metadata has these values.
    pub metadata_match: MetadataMatch,
    /// Rate limits of the route.
    pub rate_limits: Vec<RateLimit>,
    /// The virtual host's rate limits count, too.
    pub include_vh_rate_limits: bool,
    /// Redirects of the upstream that are followed here.
    pub internal_redirect: Option<Arc<InternalRedirectPolicy>>,
}

/// `metadata_match`: values that the chosen endpoint's `envoy.lb` metadata must have; none is no condition.
pub type MetadataMatch = Option<Arc<std::collections::BTreeMap<String, serde_json::Value>>>;

/// `InternalRedirectPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalRedirectPolicy {
    /// How many redirects of one request are followed. Default 1.
    pub max_internal_redirects: u32,
    /// Which statuses are followed. Default 302.
    pub codes: Vec<u16>,
    /// The target route must not have been used for this request.
    pub previous_routes: bool,
    /// The target route must have one of these names.
    pub allowed_routes: Option<Vec<Arc<str>>>,
    /// https may lead to http only when the request came by it (`safe_cross_scheme`).
    pub safe_cross_scheme: bool,
    /// The scheme may change.
    pub allow_cross_scheme: bool,
    /// Response headers that the new request gets (lower case).
    pub response_headers_to_copy: Vec<Arc<str>>,
}

/// Limits of a stream's life on a route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MaxStreamDuration {
    /// Outer `None`: the connection manager's; inner `None`: none.
    pub max_stream_duration: Option<Option<Duration>>,
    /// Present → a request's grpc-timeout limits the stream, up to this; inner `None` is no cap.
    pub grpc_timeout_header_max: Option<Option<Duration>>,
    /// Subtracted from a request's grpc-timeout.
    pub grpc_timeout_header_offset: Option<Duration>,
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterSpecifier {
    /// To one cluster.
    Cluster(Arc<str>),
    /// To the cluster that this request header names (lower case).
    Header(Arc<str>),
    /// To one of several by weight.
    Weighted(WeightedClusters),
}

/// `envoy.config.route.v3.WeightedCluster`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedClusters {
    /// At least one.
    pub clusters: Vec<ClusterWeight>,
    /// Sum of the weights, at least 1.
    pub total: u64,
    /// Request header whose number replaces the random one.
    pub header_name: Option<Arc<str>>,
    /// The hash of the route's policy replaces the random number, where there is one.
    pub use_hash_policy: bool,
}

/// One of several clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterWeight {
    /// Cluster name.
    pub name: WeightedTarget,
    /// Its share of the total.
    pub weight: u32,
    /// Header operations, before the route's.
    pub headers: HeaderOperations,
    /// `host_rewrite_literal`.
    pub host_rewrite: Option<Arc<str>>,
    /// Configuration by filter name.
    pub per_filter: PerFilterConfig,
    /// With the route's own, which it overrides key by key.
    pub metadata_match: MetadataMatch,
}

/// The target of a weighted entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightedTarget {
    /// By name.
    Cluster(Arc<str>),
    /// Named by a request header.
    Header(Arc<str>),
}

/// What becomes of the host header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HostRewrite {
    /// Stays.
    #[default]
    None,
    /// Becomes this.
    Literal(Arc<str>),
    /// Becomes the chosen endpoint's host name (DNS clusters).
    Auto,
    /// Becomes this request header's value.
    Header(Arc<str>),
    /// Becomes what the expression makes of the path.
    PathRegex(RegexRewrite),
    /// Becomes the text after substitution.
    Format(Template),
}

/// `RegexMatchAndSubstitute`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegexRewrite {
    /// Searched for, not anchored; every occurrence is replaced.
    pub regex: Regex,
    /// Replacement parsed from `\1` form.
    pub substitution: Substitution,
}

/// A replacement text with group references (`\0` … `\9`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Substitution(pub Vec<SubstitutionPart>);

/// Part of a replacement text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubstitutionPart {
    /// Literal text.
    Text(Box<str>),
    /// The text of this capture group.
    Group(usize),
}

impl RegexRewrite {
    /// The text with every match replaced.
    pub fn rewrite(&self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len());
        let mut last = 0;
        for captures in self.regex.search().captures_iter(text) {
            let Some(whole) = captures.get(0) else {
                continue;
            };
            out.extend_from_slice(&text[last..whole.start()]);
            for part in &self.substitution.0 {
                match part {
                    SubstitutionPart::Text(t) => out.extend_from_slice(t.as_bytes()),
                    SubstitutionPart::Group(n) => {
                        out.extend_from_slice(captures.get(*n).map_or(b"", |m| m.as_bytes()));
                    }
                }
            }
            last = whole.end();
        }
        out.extend_from_slice(&text[last..]);
        out
    }
}

/// `RequestMirrorPolicy`: a copy of a request whose answer nobody reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Where the copy goes.
    pub cluster: ClusterSpecifier,
    /// Share of requests.
    pub fraction: Fraction,
    /// Whether the copy is sampled for traces; `None` as the request.
    pub trace_sampled: Option<bool>,
    /// The copy's host keeps its name instead of getting `-shadow`.
    pub disable_host_suffix: bool,
    /// Host of the copy.
    pub host_rewrite: Option<Arc<str>>,
    /// Header operations on the copy.
    pub header_mutations: Vec<HeaderMutation>,
}

/// Which circuit breakers count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// The usual ones.
    #[default]
    Default,
    /// Those for important traffic.
    High,
}

/// What consistent hashing hashes, in order; a `terminal` policy that gave a hash ends the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashPolicy {
    /// Source of the hash.
    pub source: HashSource,
    /// Ends the list once there is a hash.
    pub terminal: bool,
}

/// Source of a hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashSource {
    /// A request header, rewritten by an expression where one is given.
    Header {
        /// Lower case.
        name: Arc<str>,
        /// Rewrite of the value before it is hashed.
        rewrite: Option<RegexRewrite>,
    },
    /// A cookie; with `ttl` one is set when it is missing.
    Cookie {
        /// Cookie name.
        name: Arc<str>,
        /// Life of a cookie we make; `Some(0)` makes a session cookie.
        ttl: Option<Duration>,
        /// Path attribute of a cookie we make.
        path: Arc<str>,
        /// Further attributes of a cookie we make.
        attributes: Vec<(Arc<str>, Arc<str>)>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    QueryParameter(Arc<str>),
    /// A filter state object.
    FilterState(Arc<str>),
}

/// An upgrade on a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteUpgrade {
    /// Lower case; `connect` is CONNECT.
    pub upgrade_type: Arc<str>,
    /// Its switch.
    pub enabled: bool,
    /// CONNECT ends here: the payload goes to the upstream as raw bytes.
    pub connect_terminate: bool,
    /// They begin with a PROXY header of this version that names the client.
    pub connect_proxy: Option<Version>,
}

/// `envoy.config.route.v3.RedirectAction`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// New host; empty keeps it.
    pub host: Option<Arc<str>>,
    /// New port.
    pub port: Option<u16>,
    /// New scheme.
    pub scheme: RedirectScheme,
    /// New path.
    pub path: RedirectPath,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// Leaves the query out.
    pub strip_query: bool,
}

/// Scheme of a redirect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RedirectScheme {
    /// As the request's.
    #[default]
    Keep,
    /// https.
    Https,
    /// This one.
    Scheme(Arc<str>),
}

/// Path of a redirect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RedirectPath {
    /// As the request's.
    #[default]
    Keep,
    /// Replaced as a whole; a `?` in it replaces the query too.
    Path(Arc<str>),
    /// The matched prefix is replaced.
    Prefix(Arc<str>),
    /// Rewritten.
    Regex(RegexRewrite),
    /// Replaced by what a format makes of the request; by an empty text it is not.
    Format(Template),
}

/// `envoy.config.route.v3.DirectResponseAction`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectResponse {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Bytes,
    /// Makes the body of the text, which it knows as `%LOCAL_REPLY_BODY%`.
    pub body_format: Option<Arc<BodyFormat>>,
}

/// `SubstitutionFormatString` of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BodyFormat {
    /// Text or JSON.
    pub format: LogFormat,
    /// Content type; by default text/plain, for JSON application/json.
    pub content_type: Option<Arc<str>>,
}

impl RouteConfiguration {
    /// Every cluster that is named, with the path of the field that names it.
    pub fn cluster_names(&self) -> impl Iterator<Item = (String, &Arc<str>)> {
        let routes = self.virtual_hosts.iter().enumerate().flat_map(|(v, host)| {
            host.routes
                .iter()
                .enumerate()
                .map(move |(r, route)| (v, r, route))
        });
        routes.flat_map(|(v, r, route)| {
            let path = format!("virtual_hosts[{v}].routes[{r}].route");
            let Action::Route(action) = &route.action else {
                return Vec::new();
            };
            let mut names = Vec::new();
            match &action.cluster {
                ClusterSpecifier::Cluster(name) => names.push((format!("{path}.cluster"), name)),
                ClusterSpecifier::Header(_) => {}
                ClusterSpecifier::Weighted(weighted) => {
                    for (index, entry) in weighted.clusters.iter().enumerate() {
                        if let WeightedTarget::Cluster(name) = &entry.name {
                            let path = format!("{path}.weighted_clusters.clusters[{index}].name");
                            names.push((path, name));
                        }
                    }
                }
            }
            names
        })
    }
}
