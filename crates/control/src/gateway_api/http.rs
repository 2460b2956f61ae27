//! Rules of HTTPRoutes and GRPCRoutes as HTTP rules of a VirtualService, one for each match.

use config::{
    Kind, Object,
    gateway_api::{
        BackendRef, Cors, Filter, FilterType, GrpcMatch, GrpcMethodMatch, GrpcRoute, HeaderFilter,
        HeaderMatch, HttpBackendRef, HttpMatch, HttpRoute, HttpRule, MatchType, Mirror, NameValue,
        PathMatchType, PathModifierType, Redirect, Retry, UrlRewrite, duration_nanos,
    },
};
use proto::{
    Duration,
    istio::networking::v1alpha3::{
        CorsPolicy, Destination, Headers, HttpDirectResponse, HttpMatchRequest, HttpMirrorPolicy,
        HttpRedirect, HttpRetry, HttpRewrite, HttpRoute as Rule, HttpRouteDestination, Percent,
        PortSelector, RegexRewrite, StringMatch,
        cors_policy::UnmatchedPreflights,
        headers::HeaderOperations,
        http_redirect::{RedirectPort, RedirectPortSelection},
        string_match::MatchType as Match,
    },
};

use super::{Fault, Inputs, grant::Grants};

/// Tried again besides the codes that the user names.
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled";
const DEFAULT_ATTEMPTS: u32 = 2;

/// Rules, and what of them cannot be followed.
#[derive(Debug, Clone)]
pub(super) struct Rules<R> {
    pub(super) rules: Vec<R>,
    pub(super) fault: Option<Fault>,
}

impl<R> Default for Rules<R> {
    fn default() -> Self {
        Rules {
            rules: Vec::new(),
            fault: None,
        }
    }
}

impl<R> Rules<R> {
    /// Collects rules: the first that cannot be translated at all takes all others with it.
    pub(super) fn collect(
        all: impl IntoIterator<Item = Result<(R, Option<Fault>), Fault>>,
    ) -> Rules<R> {
        let mut out = Rules::default();
        for one in all {
            match one {
                Ok((rule, fault)) => {
                    out.rules.push(rule);
                    out.fault = fault.or(out.fault);
                }
                Err(fault) => {
                    return Rules {
                        rules: Vec::new(),
                        fault: Some(fault),
                    };
                }
            }
        }
        out
    }
}

/// Who refers to backends, and whether references across namespaces need a grant.
#[derive(Clone, Copy)]
pub(super) struct Referrer<'a> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) grants: &'a Grants,
    pub(super) kind: Kind,
    pub(super) namespace: &'a str,
    /// Routes of the mesh need none: the client could call the backend itself.
    pub(super) needs_grant: bool,
}

/// The rules of an HTTPRoute.
pub(super) fn http(of: Referrer<'_>, route: &Object<HttpRoute>) -> Rules<Rule> {
    let rules = route.spec.rules.iter().enumerate();
    Rules::collect(rules.flat_map(|(at, rule)| {
        let name = name(&rule.name, &route.meta, at);
        let matches = split(&rule.matches);
        matches
            .into_iter()
            .map(move |m| http_rule(of, rule, m, &name))
    }))
}

/// The rules of a GRPCRoute.
pub(super) fn grpc(of: Referrer<'_>, route: &Object<GrpcRoute>) -> Rules<Rule> {
    let rules = route.spec.rules.iter().enumerate();
    Rules::collect(rules.flat_map(|(at, rule)| {
        let name = name(&rule.name, &route.meta, at);
        let matches = split(&rule.matches);
        matches.into_iter().map(move |m| {
            let mut out = Rule {
                name: name.clone(),
                r#match: m.map(grpc_match).into_iter().collect(),
                ..Rule::default()
            };
            let mirror_fault = filters(of, &rule.filters, &mut out)?;
            if let Some(fault) = mirror_fault {
                return Err(fault);
            }
            let fault = backends(of, &rule.backend_refs, &mut out)?;
            Ok((out, fault))
        })
    }))
}

/// Each match for itself; `None` for a rule without any.
fn split<M>(matches: &[M]) -> Vec<Option<&M>> {
    if matches.is_empty() {
        vec![None]
    } else {
        matches.iter().map(Some).collect()
    }
}

fn name(given: &Option<String>, meta: &config::Meta, at: usize) -> String {
    match given {
        Some(name) => name.clone(),
        None => format!("{}.{}.{at}", meta.namespace, meta.name),
    }
}

fn http_rule(
    of: Referrer<'_>,
    rule: &HttpRule,
    m: Option<&HttpMatch>,
    name: &str,
) -> Result<(Rule, Option<Fault>), Fault> {
    let mut out = Rule {
        name: name.to_owned(),
        r#match: m.map(http_match).into_iter().collect(),
        ..Rule::default()
    };
    let mirror_fault = filters(of, &rule.filters, &mut out)?;
    out.retries = rule.retry.as_ref().map(retries);
    if let Some(timeouts) = &rule.timeouts {
        let limit = |text: &Option<String>| duration(text.as_deref()).filter(|d| !is_zero(d));
        out.timeout = limit(&timeouts.request);
        if let Some(attempt) = limit(&timeouts.backend_request) {
            match &mut out.retries {
                Some(retries) => retries.per_try_timeout = Some(attempt),
                None => out.timeout = Some(attempt),
            }
        }
    }
    let fault = backends(of, &rule.backend_refs, &mut out)?;
    Ok((out, Fault::join(fault, mirror_fault)))
}

fn http_match(m: &HttpMatch) -> HttpMatchRequest {
    let value = m.path.value.as_str();
    let uri = match m.path.kind {
        // A slash at the end says nothing.
        PathMatchType::PathPrefix if value != "/" => {
            Match::Prefix(value.strip_suffix('/').unwrap_or(value).to_owned())
        }
        PathMatchType::PathPrefix => Match::Prefix(value.to_owned()),
        PathMatchType::Exact => Match::Exact(value.to_owned()),
        PathMatchType::RegularExpression => Match::Regex(value.to_owned()),
    };
    HttpMatchRequest {
        uri: Some(string(uri)),
        headers: header_matches(&m.headers),
        query_params: header_matches(&m.query_params),
        method: m.method.clone().map(|method| string(Match::Exact(method))),
        ..HttpMatchRequest::default()
    }
}

fn grpc_match(m: &GrpcMatch) -> HttpMatchRequest {
    HttpMatchRequest {
        uri: m.method.as_ref().and_then(grpc_path).map(string),
        headers: header_matches(&m.headers),
        ..HttpMatchRequest::default()
    }
}

/// `/SERVICE/METHOD`, with what is left out open.
fn grpc_path(m: &GrpcMethodMatch) -> Option<Match> {
    let exact = m.kind == MatchType::Exact;
    Some(match (m.service.as_deref(), m.method.as_deref()) {
        (None, None) => return None,
        (Some(service), None) if exact => Match::Prefix(format!("/{service}/")),
        (Some(service), None) => Match::Regex(format!("/{service}/.+")),
        (None, Some(method)) => Match::Regex(format!("/[^/]+/{method}")),
        (Some(service), Some(method)) if exact => Match::Exact(format!("/{service}/{method}")),
        (Some(service), Some(method)) => Match::Regex(format!("/{service}/{method}")),
    })
}

type StringMatches = std::collections::BTreeMap<String, StringMatch>;

fn header_matches(all: &[HeaderMatch]) -> StringMatches {
    all.iter()
        .map(|m| {
            let value = m.value.clone();
            let pattern = match m.kind {
                MatchType::Exact => Match::Exact(value),
                MatchType::RegularExpression => Match::Regex(value),
            };
            (m.name.clone(), string(pattern))
        })
        .collect()
}

fn string(pattern: Match) -> StringMatch {
    StringMatch {
        match_type: Some(pattern),
    }
}

/// The filters of a rule; gives what is wrong with mirrors, which leaves the rest in force.
fn filters(of: Referrer<'_>, all: &[Filter], out: &mut Rule) -> Result<Option<Fault>, Fault> {
    let mut mirror_fault = None;
    for filter in all {
        if let Some(change) = &filter.request_header_modifier {
            out.headers.get_or_insert_default().request = Some(operations(change)?);
        } else if let Some(change) = &filter.response_header_modifier {
            out.headers.get_or_insert_default().response = Some(operations(change)?);
        } else if let Some(to) = &filter.request_redirect {
            out.redirect = Some(redirect(to));
        } else if let Some(to) = &filter.request_mirror {
            match mirror(of, to) {
                Ok(policy) => out.mirrors.push(policy),
                Err(fault) => mirror_fault = Some(fault),
            }
        } else if let Some(to) = &filter.url_rewrite {
            out.rewrite = rewrite(to);
        } else if let Some(policy) = &filter.cors {
            out.cors_policy = Some(cors(policy));
        } else {
            return Err(unsupported(filter.kind));
        }
    }
    Ok(mirror_fault)
}

fn unsupported(kind: FilterType) -> Fault {
    Fault::new(
        "InvalidFilter",
        format!("unsupported filter type {:?}", kind.name()),
    )
}

fn operations(filter: &HeaderFilter) -> Result<HeaderOperations, Fault> {
    for header in filter.set.iter().chain(&filter.add) {
        let legal = |b: u8| b == b'\t' || (b >= 0x20 && b != 0x7f);
        if !header.value.bytes().all(legal) {
            return Err(Fault::new(
                "InvalidFilter",
                format!("header {:?} value contains invalid characters", header.name),
            ));
        }
    }
    Ok(HeaderOperations {
        set: by_name(&filter.set),
        add: by_name(&filter.add),
        remove: filter.remove.clone(),
    })
}

/// Of two of a name (in any case) the first counts.
fn by_name(headers: &[NameValue]) -> std::collections::BTreeMap<String, String> {
    let mut out = std::collections::BTreeMap::new();
    for header in headers {
        out.entry(header.name.to_lowercase())
            .or_insert_with(|| header.value.clone());
    }
    out
}

fn redirect(to: &Redirect) -> HttpRedirect {
    let port = match to.port {
        Some(port) => RedirectPort::Port(port),
        // A scheme brings its own port.
        None if to.scheme.is_some() => {
            RedirectPort::DerivePort(RedirectPortSelection::FromProtocolDefault.into())
        }
        None => RedirectPort::DerivePort(RedirectPortSelection::FromRequestPort.into()),
    };
    let mut out = HttpRedirect {
        redirect_code: to.status_code,
        authority: to.hostname.clone().unwrap_or_default(),
        scheme: to.scheme.clone().unwrap_or_default(),
        redirect_port: Some(port),
        ..HttpRedirect::default()
    };
    if let Some(path) = &to.path {
        match path.kind {
            PathModifierType::ReplaceFullPath => {
                out.uri = path.replace_full_path.clone().unwrap_or_default();
            }
            PathModifierType::ReplacePrefixMatch => {
                out.prefix_rewrite = path.replace_prefix_match.clone().unwrap_or_default();
            }
        }
    }
    out
}

fn rewrite(to: &UrlRewrite) -> Option<HttpRewrite> {
    let mut out = HttpRewrite {
        authority: to.hostname.clone().unwrap_or_default(),
        ..HttpRewrite::default()
    };
    if let Some(path) = &to.path {
        match path.kind {
            PathModifierType::ReplacePrefixMatch => {
                let prefix = path.replace_prefix_match.clone().unwrap_or_default();
                let prefix = prefix.strip_suffix('/').unwrap_or(&prefix);
                // Nothing in place of the prefix leaves the slash behind it.
                out.uri = if prefix.is_empty() { "/" } else { prefix }.to_owned();
            }
            PathModifierType::ReplaceFullPath => {
                out.uri_regex_rewrite = Some(RegexRewrite {
                    r#match: "/.*".to_owned(),
                    rewrite: path.replace_full_path.clone().unwrap_or_default(),
                });
            }
        }
    }
    (out != HttpRewrite::default()).then_some(out)
}

fn mirror(of: Referrer<'_>, to: &Mirror) -> Result<HttpMirrorPolicy, Fault> {
    let (destination, fault) = destination(of, &to.backend_ref)?;
    if let Some(fault) = fault {
        return Err(fault);
    }
    let percentage = match (to.fraction, to.percent) {
        (Some(f), _) => Some(100.0 * f64::from(f.numerator) / f64::from(f.denominator.max(1))),
        (None, Some(percent)) => Some(f64::from(percent)),
        (None, None) => None,
    };
    Ok(HttpMirrorPolicy {
        destination: Some(destination),
        percentage: percentage.map(|value| Percent { value }),
    })
}

fn cors(policy: &Cors) -> CorsPolicy {
    let origin = |origin: &String| {
        let stars = origin.matches('*').count();
        Some(string(match origin.as_str() {
            "" => return None,
            // Any origin, but nothing that is none.
            "*" => Match::Regex(r"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s?#]+$".to_owned()),
            exact if stars == 0 => Match::Exact(exact.to_owned()),
            prefix if stars == 1 && prefix.ends_with('*') => {
                Match::Prefix(prefix[..prefix.len() - 1].to_owned())
            }
            pattern => {
                let escaped = regex::escape(pattern).replace(r"\*", ".*");
                Match::Regex(format!("^{escaped}$"))
            }
        }))
    };
    CorsPolicy {
        allow_origins: policy.allow_origins.iter().filter_map(origin).collect(),
        allow_credentials: policy.allow_credentials.filter(|c| *c),
        allow_methods: policy.allow_methods.clone(),
        allow_headers: policy.allow_headers.clone(),
        expose_headers: policy.expose_headers.clone(),
        max_age: (policy.max_age > 0).then(|| Duration {
            seconds: i64::from(policy.max_age),
            nanos: 0,
        }),
        unmatched_preflights: UnmatchedPreflights::Ignore.into(),
        ..CorsPolicy::default()
    }
}

fn retries(retry: &Retry) -> HttpRetry {
    let attempts = retry.attempts.unwrap_or(DEFAULT_ATTEMPTS);
    let codes = retry.codes.iter().map(|code| format!(",{code}"));
    HttpRetry {
        attempts: i32::try_from(attempts).unwrap_or(i32::MAX),
        retry_on: if attempts == 0 {
            String::new()
        } else {
            std::iter::once(RETRY_ON.to_owned()).chain(codes).collect()
        },
        backoff: duration(retry.backoff.as_deref()),
        ..HttpRetry::default()
    }
}

fn duration(text: Option<&str>) -> Option<Duration> {
    let nanos = duration_nanos(text?)?;
    Some(Duration {
        seconds: nanos / 1_000_000_000,
        nanos: (nanos % 1_000_000_000) as i32,
    })
}

fn is_zero(d: &Duration) -> bool {
    d.seconds == 0 && d.nanos == 0
}

/// Where a rule leads: its backends by weight; 500 where all of them have none.
fn backends(
    of: Referrer<'_>,
    all: &[HttpBackendRef],
    out: &mut Rule,
) -> Result<Option<Fault>, Fault> {
    let counted: Vec<&HttpBackendRef> = all.iter().filter(|b| b.weight > 0).collect();
    if counted.is_empty() {
        if out.redirect.is_none() {
            out.direct_response = Some(HttpDirectResponse {
                status: 500,
                ..HttpDirectResponse::default()
            });
        }
        return Ok(None);
    }
    let mut found = None;
    for to in &counted {
        let (destination, fault) = destination(of, &to.backend())?;
        found = fault.or(found);
        let mut headers: Option<Headers> = None;
        for filter in &to.filters {
            if let Some(change) = &filter.request_header_modifier {
                headers.get_or_insert_default().request = Some(operations(change)?);
            } else if let Some(change) = &filter.response_header_modifier {
                headers.get_or_insert_default().response = Some(operations(change)?);
            } else {
                return Err(unsupported(filter.kind));
            }
        }
        out.route.push(HttpRouteDestination {
            destination: Some(destination),
            weight: weight(to.weight, counted.len()),
            headers,
        });
    }
    Ok(found)
}

/// A share beside others; a backend alone has none.
pub(super) fn weight(weight: u32, of: usize) -> i32 {
    if of == 1 {
        0
    } else {
        i32::try_from(weight).unwrap_or(i32::MAX)
    }
}

/// A backend: where requests go, and what is wrong with it. What may not be reached is no destination at all, which
/// answers 500; what does not exist (yet) is named all the same.
pub(super) fn destination(
    of: Referrer<'_>,
    to: &BackendRef,
) -> Result<(Destination, Option<Fault>), Fault> {
    let namespace = to.namespace.as_deref().unwrap_or(of.namespace);
    let target = (
        to.group.as_str(),
        to.kind.as_str(),
        namespace,
        to.name.as_str(),
    );
    if of.needs_grant && !of.grants.allow((of.kind, of.namespace), target) {
        let fault = Fault::new(
            "RefNotPermitted",
            format!(
                "backendRef {}/{namespace} not accessible to a {} in namespace {:?} (missing a ReferenceGrant?)",
                to.name, of.kind, of.namespace
            ),
        );
        return Ok((Destination::default(), Some(fault)));
    }
    let (host, exists) = match (to.group.as_str(), to.kind.as_str()) {
        ("" | "core", "Service") => {
            if to.name.contains('.') {
                return Err(Fault::new(
                    "InvalidDestination",
                    "service name invalid; the name of the Service must be used, not the hostname.",
                ));
            }
            let services = &of.inputs.snapshot.services;
            (
                of.inputs.service_host(&to.name, namespace),
                services.get(namespace, &to.name).is_some(),
            )
        }
        ("networking.istio.io", "Hostname") => {
            if to.namespace.is_some() {
                return Err(Fault::new(
                    "InvalidDestination",
                    "namespace may not be set with Hostname type",
                ));
            }
            (to.name.clone(), has_host(of.inputs, &to.name, namespace))
        }
        ("multicluster.x-k8s.io", "ServiceImport") => {
            let services = &of.inputs.snapshot.services;
            (
                of.inputs.service_host(&to.name, namespace),
                services.get(namespace, &to.name).is_some(),
            )
        }
        (group, kind) => {
            let fault = Fault::new(
                "InvalidKind",
                format!("referencing unsupported backendRef: group {group:?} kind {kind:?}"),
            );
            return Ok((Destination::default(), Some(fault)));
        }
    };
    let Some(port) = to.port else {
        return Err(Fault::new(
            "InvalidDestination",
            "port is required in backendRef",
        ));
    };
    let fault =
        (!exists).then(|| Fault::new("BackendNotFound", format!("backend({host}) not found")));
    let destination = Destination {
        host,
        port: Some(PortSelector { number: port }),
        ..Destination::default()
    };
    Ok((destination, fault))
}

/// Whether a service of the namespace has that host.
fn has_host(inputs: &Inputs<'_>, hostname: &str, namespace: &str) -> bool {
    let snapshot = inputs.snapshot;
    snapshot
        .service_entries
        .in_namespace(namespace)
        .any(|o| o.spec.hosts.iter().any(|h| h == hostname))
        || snapshot
            .services
            .in_namespace(namespace)
            .any(|o| inputs.service_host(&o.meta.name, namespace) == hostname)
}
