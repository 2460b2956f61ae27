//! What happens to a matched request: forward, redirect or answer.

use proto::{
    Duration,
    envoy::{
        config::{
            core::v3::{
                DataSource, HeaderValue, HeaderValueOption, RuntimeFractionalPercent, data_source,
                header_value_option::HeaderAppendAction,
            },
            route::v3::{
                DirectResponseAction, RedirectAction, Route, RouteAction, WeightedCluster,
                redirect_action::{
                    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
                },
                route,
                route_action::{
                    self, ClusterNotFoundResponseCode, ClusterSpecifier, HashPolicy,
                    HostRewriteSpecifier, RequestMirrorPolicy, hash_policy,
                },
                route_match::PathSpecifier,
                weighted_cluster::{ClusterWeight, cluster_weight},
            },
        },
        r#type::matcher::v3::RegexMatchAndSubstitute,
    },
    istio::networking::v1alpha3::{
        Destination, Headers, HttpDirectResponse, HttpRedirect, HttpRoute, HttpRouteDestination,
        Percent,
        http_body::Specifier,
        http_redirect::{RedirectPort, RedirectPortSelection},
        load_balancer_settings::{ConsistentHashLb, consistent_hash_lb::HashKey},
    },
};

use super::{
    Rules, Semantics, matching,
    per_filter::{hundredths, millionths},
    retry,
};
use crate::{compat::Compat, names, weights};

/// Envoy would give up after 15 s unless told otherwise; Istio never does.
pub const NO_TIMEOUT: Duration = Duration {
    seconds: 0,
    nanos: 0,
};

/// Header changes of a rule or of one destination.
#[derive(Debug, Default)]
pub(super) struct HeaderOperations {
    pub(super) request_add: Vec<HeaderValueOption>,
    pub(super) request_remove: Vec<String>,
    pub(super) response_add: Vec<HeaderValueOption>,
    pub(super) response_remove: Vec<String>,
    /// A new `Host`: a rewrite, not a header operation, for Envoy.
    pub(super) authority: Option<String>,
}

impl HeaderOperations {
    /// Sets first, then adds; each sorted by name.
    pub(super) fn new(headers: Option<&Headers>) -> HeaderOperations {
        let mut out = HeaderOperations::default();
        let Some(headers) = headers else { return out };
        if let Some(request) = &headers.request {
            out.authority = authority(&request.set).or_else(|| authority(&request.add));
            out.request_add = changes(&request.set, &request.add);
            out.request_remove = removals(&request.remove);
        }
        if let Some(response) = &headers.response {
            out.response_add = changes(&response.set, &response.add);
            out.response_remove = removals(&response.remove);
        }
        out
    }
}

/// Forwards to the rule's destinations.
pub(super) fn forward(
    out: &mut Route,
    rule: &HttpRoute,
    rules: &Rules<'_>,
    authority: Option<String>,
) {
    let mut action = RouteAction::default();
    let timeout = rule.timeout.unwrap_or(NO_TIMEOUT);
    limit(&mut action, timeout, rules.compat);
    if rules.semantics == Semantics::Gateway {
        action.cluster_not_found_response_code =
            ClusterNotFoundResponseCode::InternalServerError.into();
    }
    let authority = rewrite(&mut action, out, rule, rules).or(authority);
    action.host_rewrite_specifier = authority.map(HostRewriteSpecifier::HostRewriteLiteral);
    action.request_mirror_policies = mirrors(rule, rules);

    let mut consistent_hash = false;
    if let [only] = rule.route.as_slice() {
        consistent_hash = one_destination(out, &mut action, only, rules);
    } else {
        let mut clusters: Vec<ClusterWeight> = rule
            .route
            .iter()
            .filter(|d| d.weight > 0)
            .map(|d| weighted_destination(&mut action, d, rules))
            .collect();
        weights::fit(&mut clusters, |c| c.weight.as_mut());
        action.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters,
            ..Default::default()
        }));
    }
    let policy = rule
        .retries
        .as_ref()
        .or(rules.mesh.default_http_retry_policy.as_ref());
    action.retry_policy = retry::outbound(policy, consistent_hash, rules.compat);
    out.action = Some(route::Action::Route(action));
}

/// Sends the client elsewhere. An unknown code leaves the route without action, which validation prevents.
pub(super) fn redirect(redirect: &HttpRedirect, rules: &Rules<'_>) -> Option<route::Action> {
    let code = match redirect.redirect_code {
        0 | 301 => RedirectResponseCode::MovedPermanently,
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => return None,
    };
    let path = if redirect.prefix_rewrite.is_empty() {
        PathRewriteSpecifier::PathRedirect(redirect.uri.clone())
    } else {
        PathRewriteSpecifier::PrefixRewrite(redirect.prefix_rewrite.clone())
    };
    let scheme = Some(redirect.scheme.as_str()).filter(|s| !s.is_empty());
    Some(route::Action::Redirect(RedirectAction {
        host_redirect: redirect.authority.clone(),
        port_redirect: redirect_port(redirect, rules),
        response_code: code.into(),
        path_rewrite_specifier: Some(path),
        scheme_rewrite_specifier: scheme
            .map(|s| SchemeRewriteSpecifier::SchemeRedirect(s.to_owned())),
        ..Default::default()
    }))
}

/// Answers in the name of the service.
pub(super) fn direct_response(response: &HttpDirectResponse) -> route::Action {
    let body = response
        .body
        .as_ref()
        .and_then(|b| b.specifier.as_ref())
        .map(|specifier| {
            let specifier = match specifier {
                Specifier::String(text) => data_source::Specifier::InlineString(text.clone()),
                Specifier::Bytes(bytes) => data_source::Specifier::InlineBytes(bytes.clone()),
            };
            DataSource {
                specifier: Some(specifier),
                ..Default::default()
            }
        });
    route::Action::DirectResponse(DirectResponseAction {
        status: response.status,
        body,
        ..Default::default()
    })
}

/// The cluster of a destination: its own port, else the service's only one, else the listener's.
pub(super) fn cluster_of(destination: &Destination, rules: &Rules<'_>) -> String {
    let service = rules.lookup.service(&destination.host);
    names::destination_cluster(destination, service.as_ref(), rules.client.port)
}

/// What a consistent hash is computed from, in Envoy's words.
pub fn hash_policy(lb: &ConsistentHashLb) -> Option<HashPolicy> {
    use hash_policy::PolicySpecifier as P;
    let specifier = match lb.hash_key.as_ref()? {
        HashKey::HttpHeaderName(name) => P::Header(hash_policy::Header {
            header_name: name.clone(),
            ..Default::default()
        }),
        HashKey::HttpCookie(cookie) => P::Cookie(hash_policy::Cookie {
            name: cookie.name.clone(),
            ttl: cookie.ttl,
            path: cookie.path.clone(),
            attributes: cookie
                .attributes
                .iter()
                .map(|a| hash_policy::CookieAttribute {
                    name: a.name.clone(),
                    value: a.value.clone(),
                })
                .collect(),
        }),
        HashKey::UseSourceIp(source_ip) => {
            P::ConnectionProperties(hash_policy::ConnectionProperties {
                source_ip: *source_ip,
            })
        }
        HashKey::HttpQueryParameterName(name) => {
            P::QueryParameter(hash_policy::QueryParameter { name: name.clone() })
        }
    };
    Some(HashPolicy {
        policy_specifier: Some(specifier),
        ..Default::default()
    })
}

/// The rule's rewrites; gives the new authority.
fn rewrite(
    action: &mut RouteAction,
    out: &Route,
    rule: &HttpRoute,
    rules: &Rules<'_>,
) -> Option<String> {
    let rewrite = rule.rewrite.as_ref()?;
    action.append_x_forwarded_host = rules.append_x_forwarded_host;
    if let Some(regex) = &rewrite.uri_regex_rewrite {
        action.regex_rewrite = Some(RegexMatchAndSubstitute {
            pattern: Some(matching::regex(&regex.r#match)),
            substitution: regex.rewrite.clone(),
        });
    } else if rewrite.uri == "/" && rules.semantics == Semantics::Gateway {
        // A path-separated prefix replaced by "/" must not leave "//" behind.
        let prefix = match out.r#match.as_ref().and_then(|m| m.path_specifier.as_ref()) {
            Some(PathSpecifier::PathSeparatedPrefix(p)) => p.as_str(),
            _ => "",
        };
        action.regex_rewrite = Some(RegexMatchAndSubstitute {
            pattern: Some(matching::regex(&format!(
                "^{}(/?)(.*)",
                regex::escape(prefix)
            ))),
            substitution: r"/\2".to_owned(),
        });
    } else {
        action.prefix_rewrite = rewrite.uri.clone();
    }
    Some(rewrite.authority.clone()).filter(|a| !a.is_empty())
}

fn mirrors(rule: &HttpRoute, rules: &Rules<'_>) -> Vec<RequestMirrorPolicy> {
    let share = |percentage: Option<&Percent>, whole: Option<u32>| match (percentage, whole) {
        (Some(p), _) => (p.value > 0.0).then(|| millionths(p)),
        (None, Some(p)) => (p > 0).then(|| hundredths(p)),
        (None, None) => Some(hundredths(100)),
    };
    let old = rule.mirror.as_ref().map(|destination| {
        (
            destination,
            share(rule.mirror_percentage.as_ref(), rule.mirror_percent),
        )
    });
    let new = rule.mirrors.iter().filter_map(|m| {
        m.destination
            .as_ref()
            .map(|destination| (destination, share(m.percentage.as_ref(), None)))
    });
    old.into_iter()
        .chain(new)
        .filter_map(|(destination, share)| {
            Some(RequestMirrorPolicy {
                cluster: cluster_of(destination, rules),
                runtime_fraction: Some(RuntimeFractionalPercent {
                    default_value: Some(share?),
                    ..Default::default()
                }),
                trace_sampled: Some(false),
                disable_shadow_host_suffix_append: rules.compat.disable_shadow_host_suffix(),
                ..Default::default()
            })
        })
        .collect()
}

/// A single destination's header changes join the route's own. Tells whether it is balanced by a hash.
fn one_destination(
    out: &mut Route,
    action: &mut RouteAction,
    to: &HttpRouteDestination,
    rules: &Rules<'_>,
) -> bool {
    let destination = to.destination.clone().unwrap_or_default();
    action.cluster_specifier = Some(ClusterSpecifier::Cluster(cluster_of(&destination, rules)));
    let operations = HeaderOperations::new(to.headers.as_ref());
    out.request_headers_to_add.extend(operations.request_add);
    out.request_headers_to_remove
        .extend(operations.request_remove);
    out.response_headers_to_add.extend(operations.response_add);
    out.response_headers_to_remove
        .extend(operations.response_remove);
    if action.host_rewrite_specifier.is_none() {
        action.host_rewrite_specifier = operations
            .authority
            .map(HostRewriteSpecifier::HostRewriteLiteral);
    }
    let hash = rules.lookup.consistent_hash(&destination);
    action
        .hash_policy
        .extend(hash.as_ref().and_then(hash_policy));
    hash.is_some()
}

fn weighted_destination(
    action: &mut RouteAction,
    to: &HttpRouteDestination,
    rules: &Rules<'_>,
) -> ClusterWeight {
    let destination = to.destination.clone().unwrap_or_default();
    let operations = HeaderOperations::new(to.headers.as_ref());
    let hash = rules.lookup.consistent_hash(&destination);
    action
        .hash_policy
        .extend(hash.as_ref().and_then(hash_policy));
    ClusterWeight {
        name: cluster_of(&destination, rules),
        weight: Some(to.weight.max(0) as u32),
        request_headers_to_add: operations.request_add,
        request_headers_to_remove: operations.request_remove,
        response_headers_to_add: operations.response_add,
        response_headers_to_remove: operations.response_remove,
        host_rewrite_specifier: operations
            .authority
            .map(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral),
        ..Default::default()
    }
}

/// A port is left out where it is the scheme's own.
fn redirect_port(redirect: &HttpRedirect, rules: &Rules<'_>) -> u32 {
    let port = match &redirect.redirect_port {
        Some(RedirectPort::Port(port)) => *port,
        Some(RedirectPort::DerivePort(selection))
            if *selection == RedirectPortSelection::FromRequestPort as i32 =>
        {
            rules.client.port
        }
        _ => return 0,
    };
    let scheme = match redirect.scheme.as_str() {
        "" if rules.tls => "https",
        "" => "http",
        scheme => scheme,
    };
    match (port, scheme) {
        (80, "http") | (443, "https") => 0,
        _ => port,
    }
}

type HeaderMap = std::collections::BTreeMap<String, String>;

fn changes(set: &HeaderMap, add: &HeaderMap) -> Vec<HeaderValueOption> {
    let option = |action: HeaderAppendAction| {
        move |(key, value): (&String, &String)| HeaderValueOption {
            header: Some(HeaderValue {
                key: key.clone(),
                value: value.clone(),
                ..Default::default()
            }),
            append_action: action.into(),
            ..Default::default()
        }
    };
    let own = |(key, _): &(&String, &String)| !is_internal(key);
    let sets = set
        .iter()
        .filter(own)
        .map(option(HeaderAppendAction::OverwriteIfExistsOrAdd));
    let adds = add
        .iter()
        .filter(own)
        .map(option(HeaderAppendAction::AppendIfExistsOrAdd));
    sets.chain(adds).collect()
}

fn removals(names: &[String]) -> Vec<String> {
    names.iter().filter(|n| !is_internal(n)).cloned().collect()
}

fn authority(headers: &HeaderMap) -> Option<String> {
    headers
        .iter()
        .find(|(k, _)| k.eq_ignore_ascii_case("host") || k.eq_ignore_ascii_case(":authority"))
        .map(|(_, v)| v.clone())
        .filter(|v| !v.is_empty())
}

/// Envoy rejects operations on `Host` and pseudo headers.
fn is_internal(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

/// Limits a stream by `timeout` (0: not at all) and lets the caller's grpc-timeout count up to it.
pub(super) fn limit(action: &mut RouteAction, timeout: Duration, compat: Compat) {
    action.timeout = Some(timeout);
    if compat.limits_streams() {
        action.max_stream_duration = Some(route_action::MaxStreamDuration {
            max_stream_duration: Some(timeout),
            grpc_timeout_header_max: Some(timeout),
            ..Default::default()
        });
    } else {
        max_grpc_timeout(action, timeout);
    }
}

/// Deprecated, but what Istio sends: it ends a stream only where the caller set a timeout.
#[allow(deprecated)]
fn max_grpc_timeout(action: &mut RouteAction, timeout: Duration) {
    action.max_grpc_timeout = Some(timeout);
}

/// Everything behind `inbound|PORT||`: no timeout of ours, also not from the caller's grpc-timeout.
pub(super) fn unlimited_stream() -> route_action::MaxStreamDuration {
    route_action::MaxStreamDuration {
        max_stream_duration: Some(NO_TIMEOUT),
        grpc_timeout_header_max: Some(NO_TIMEOUT),
        ..Default::default()
    }
}
