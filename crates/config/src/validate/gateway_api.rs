//! Gateway API: what the schemas of its definitions refuse, and what is known here without being acted upon.

use std::collections::BTreeSet;

use super::{Report, names};
use crate::gateway_api::{
    BackendRef, BackendTlsPolicy, Filter, FilterType, FromNamespaces, Gateway, GatewayClass,
    GrpcRoute, HeaderFilter, HeaderMatch, HttpBackendRef, HttpMatch, HttpRoute, L4Rule, Listener,
    ListenerSet, MatchType, ParentReference, PathMatchType, PathModifier, PathModifierType,
    ReferenceGrant, SubjectAltNameType, TcpRoute, TlsMode, TlsRoute, duration_nanos,
};

const METHODS: [&str; 9] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
];
const MAX_LISTENERS: usize = 64;
const MAX_RULES: usize = 16;
const MAX_BACKENDS: usize = 16;
const MAX_MATCHES: usize = 64;
const MAX_WEIGHT: u32 = 1_000_000;

pub(super) fn class(report: &mut Report, spec: &GatewayClass) {
    if spec.controller_name.is_empty() {
        report.error(
            "spec.controllerName",
            "is missing; ours is istio.io/gateway-controller",
        );
    }
    if spec.parameters_ref.is_some() {
        report.warning(
            "spec.parametersRef",
            "has no effect here; give each Gateway infrastructure.parametersRef instead",
        );
    }
}

pub(super) fn gateway(report: &mut Report, spec: &Gateway) {
    if spec.gateway_class_name.is_empty() {
        report.error("spec.gatewayClassName", "is missing; ours is istio");
    }
    // Where ListenerSets may add listeners a Gateway needs none of its own.
    let needed = spec.allowed_listeners.is_none();
    listeners(report, &spec.listeners, false, needed);
    for (i, address) in spec.addresses.iter().enumerate() {
        let at = format!("spec.addresses[{i}]");
        match address.kind.as_str() {
            "IPAddress" if !address.value.is_empty() => {
                report.check(format!("{at}.value"), names::ip(&address.value));
            }
            "Hostname" => {
                report.check(format!("{at}.value"), names::fqdn(&address.value));
            }
            _ => {}
        }
    }
    if let Some(tls) = &spec.tls {
        if tls.backend.is_some() {
            report.warning(
                "spec.tls.backend",
                "has no effect here: backends are shown no certificate of the Gateway's own",
            );
        }
        for (i, port) in tls.frontend.iter().flat_map(|f| &f.per_port).enumerate() {
            report.port(format!("spec.tls.frontend.perPort[{i}].port"), port.port);
        }
    }
    if spec.default_scope.is_some() {
        report.warning(
            "spec.defaultScope",
            "has no effect here: routes name their Gateways",
        );
    }
}

pub(super) fn listener_set(report: &mut Report, spec: &ListenerSet) {
    match &spec.parent_ref {
        None => report.error("spec.parentRef", "is missing; it names the Gateway"),
        Some(parent) => parent_ref(report, "spec.parentRef", parent),
    }
    listeners(report, &spec.listeners, true, true);
}

fn listeners(report: &mut Report, all: &[Listener], of_set: bool, needed: bool) {
    if all.is_empty() && needed {
        report.error("spec.listeners", "give at least one listener");
    }
    too_many(report, "spec.listeners", all.len(), MAX_LISTENERS);
    let mut seen = BTreeSet::new();
    let mut known = BTreeSet::new();
    for (i, listener) in all.iter().enumerate() {
        let at = format!("spec.listeners[{i}]");
        if !seen.insert(&listener.name) {
            report.error(
                format!("{at}.name"),
                format!("{:?} is the name of an earlier listener", listener.name),
            );
        }
        let same = (listener.port, &listener.protocol, &listener.hostname);
        if !known.insert(same) {
            report.error(
                &at,
                "an earlier listener has the same port, protocol and hostname",
            );
        }
        check_listener(report, &at, listener, of_set);
    }
}

fn check_listener(report: &mut Report, at: &str, listener: &Listener, of_set: bool) {
    report.check(format!("{at}.name"), names::fqdn(&listener.name));
    if let Some(hostname) = &listener.hostname {
        report.check(format!("{at}.hostname"), host(hostname, true));
    }
    if !(of_set && listener.port == 0) {
        report.port(format!("{at}.port"), listener.port);
    }
    if listener.protocol.is_empty() {
        report.error(
            format!("{at}.protocol"),
            "is missing: give HTTP, HTTPS, TLS or TCP",
        );
    }
    let plain = matches!(listener.protocol.as_str(), "HTTP" | "TCP" | "UDP");
    if plain && listener.tls.is_some() {
        report.error(
            format!("{at}.tls"),
            format!("must be left out: {} is plaintext", listener.protocol),
        );
    }
    if matches!(listener.protocol.as_str(), "TCP" | "UDP") && listener.hostname.is_some() {
        report.error(
            format!("{at}.hostname"),
            format!("must be left out: {} carries none", listener.protocol),
        );
    }
    if let Some(tls) = &listener.tls {
        if listener.protocol == "HTTPS" && tls.mode != TlsMode::Terminate {
            report.error(
                format!("{at}.tls.mode"),
                "must be Terminate for HTTPS; use protocol TLS to hand it on",
            );
        }
        if tls.mode == TlsMode::Terminate
            && tls.certificate_refs.is_empty()
            && tls.options.is_empty()
        {
            report.error(
                format!("{at}.tls.certificateRefs"),
                "give a Secret with the server's certificate: TLS ends here",
            );
        }
        for (i, reference) in tls.certificate_refs.iter().enumerate() {
            if reference.name.is_empty() {
                report.error(format!("{at}.tls.certificateRefs[{i}].name"), "is missing");
            }
        }
    }
    let namespaces = &listener.allowed_routes.namespaces;
    if namespaces.from == FromNamespaces::Selector && namespaces.selector.is_none() {
        report.error(
            format!("{at}.allowedRoutes.namespaces.selector"),
            "is missing, although from is Selector",
        );
    }
}

pub(super) fn http(report: &mut Report, spec: &HttpRoute) {
    common(
        report,
        &spec.parent_refs,
        &spec.hostnames,
        spec.use_default_gateways.as_ref(),
    );
    too_many(report, "spec.rules", spec.rules.len(), MAX_RULES);
    for (i, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{i}]");
        too_many(
            report,
            &format!("{at}.matches"),
            rule.matches.len(),
            MAX_MATCHES,
        );
        for (j, m) in rule.matches.iter().enumerate() {
            http_match(report, &format!("{at}.matches[{j}]"), m);
        }
        filters(report, &at, &rule.filters);
        let has = |kind| rule.filters.iter().any(|f| f.kind == kind);
        if has(FilterType::RequestRedirect) && has(FilterType::UrlRewrite) {
            report.error(
                format!("{at}.filters"),
                "give either RequestRedirect or URLRewrite",
            );
        }
        if has(FilterType::RequestRedirect) && !rule.backend_refs.is_empty() {
            report.error(
                format!("{at}.backendRefs"),
                "must be left out beside RequestRedirect: no request gets there",
            );
        }
        let prefix = |p: Option<&PathModifier>| {
            p.is_some_and(|p| p.kind == PathModifierType::ReplacePrefixMatch)
        };
        let replaces = rule.filters.iter().any(|f| {
            prefix(f.request_redirect.as_ref().and_then(|r| r.path.as_ref()))
                || prefix(f.url_rewrite.as_ref().and_then(|r| r.path.as_ref()))
        });
        let one_prefix = matches!(rule.matches.as_slice(), [only] if only.path.kind == PathMatchType::PathPrefix);
        if replaces && !one_prefix {
            report.error(
                format!("{at}.matches"),
                "ReplacePrefixMatch needs exactly one match, of type PathPrefix",
            );
        }
        http_backends(report, &at, &rule.backend_refs);
        timeouts(report, &at, rule);
        retry(report, &at, rule.retry.as_ref());
        if rule.session_persistence.is_some() {
            report.error(
                format!("{at}.sessionPersistence"),
                "is not supported here; use a DestinationRule with consistentHash",
            );
        }
    }
}

fn timeouts(report: &mut Report, at: &str, rule: &crate::gateway_api::HttpRule) {
    let Some(t) = &rule.timeouts else { return };
    let mut read = |name: &str, text: Option<&String>| {
        let nanos = text.map(|t| duration_nanos(t));
        if nanos == Some(None) {
            report.error(
                format!("{at}.timeouts.{name}"),
                "is no duration: give e.g. 10s, 500ms or 1m30s",
            );
        }
        nanos.flatten()
    };
    let request = read("request", t.request.as_ref());
    let attempt = read("backendRequest", t.backend_request.as_ref());
    if let (Some(request), Some(attempt)) = (request, attempt)
        && request != 0
        && attempt > request
    {
        report.error(
            format!("{at}.timeouts.backendRequest"),
            "must not be longer than request",
        );
    }
}

fn retry(report: &mut Report, at: &str, retry: Option<&crate::gateway_api::Retry>) {
    let Some(retry) = retry else { return };
    for (i, code) in retry.codes.iter().enumerate() {
        if !(400..=599).contains(code) {
            report.error(
                format!("{at}.retry.codes[{i}]"),
                "must be between 400 and 599",
            );
        }
    }
    if retry
        .backoff
        .as_ref()
        .is_some_and(|b| duration_nanos(b).is_none())
    {
        report.error(
            format!("{at}.retry.backoff"),
            "is no duration: give e.g. 100ms",
        );
    }
}

fn http_match(report: &mut Report, at: &str, m: &HttpMatch) {
    let value = &m.path.value;
    match m.path.kind {
        PathMatchType::RegularExpression => {
            report.check(format!("{at}.path.value"), names::regex(value));
        }
        PathMatchType::Exact | PathMatchType::PathPrefix => {
            report.check(format!("{at}.path.value"), path(value));
        }
    }
    header_matches(report, &format!("{at}.headers"), &m.headers);
    header_matches(report, &format!("{at}.queryParams"), &m.query_params);
    if let Some(method) = &m.method
        && !METHODS.contains(&method.as_str())
    {
        report.error(
            format!("{at}.method"),
            format!(
                "{method:?} is no method: give one of {}",
                METHODS.join(", ")
            ),
        );
    }
}

fn path(value: &str) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{value:?} {what}"));
    if !value.starts_with('/') {
        return wrong("must begin with /");
    }
    if value.len() > 1024 {
        return wrong("is longer than 1024 bytes");
    }
    let lower = value.to_lowercase();
    for part in ["//", "/./", "/../", "%2f", "#"] {
        if lower.contains(part) {
            return wrong(&format!("must not contain {part}"));
        }
    }
    if value.ends_with("/..") || value.ends_with("/.") {
        return wrong("must not end with a dot segment");
    }
    Ok(())
}

fn header_matches(report: &mut Report, at: &str, all: &[HeaderMatch]) {
    let mut seen = BTreeSet::new();
    for (i, m) in all.iter().enumerate() {
        if m.name.is_empty() {
            report.error(format!("{at}[{i}].name"), "is missing");
        } else if !seen.insert(&m.name) {
            report.error(
                format!("{at}[{i}].name"),
                format!("{:?} is matched by an earlier entry", m.name),
            );
        }
        if m.kind == MatchType::RegularExpression {
            report.check(format!("{at}[{i}].value"), names::regex(&m.value));
        }
    }
}

fn filters(report: &mut Report, at: &str, all: &[Filter]) {
    let mut seen = BTreeSet::new();
    for (i, filter) in all.iter().enumerate() {
        let at = format!("{at}.filters[{i}]");
        let repeatable = matches!(
            filter.kind,
            FilterType::RequestMirror | FilterType::ExtensionRef
        );
        if !seen.insert(filter.kind.name()) && !repeatable {
            report.error(
                format!("{at}.type"),
                format!("{} is given twice", filter.kind.name()),
            );
        }
        let given: [(FilterType, &str, bool); 8] = [
            (
                FilterType::RequestHeaderModifier,
                "requestHeaderModifier",
                filter.request_header_modifier.is_some(),
            ),
            (
                FilterType::ResponseHeaderModifier,
                "responseHeaderModifier",
                filter.response_header_modifier.is_some(),
            ),
            (
                FilterType::RequestMirror,
                "requestMirror",
                filter.request_mirror.is_some(),
            ),
            (
                FilterType::RequestRedirect,
                "requestRedirect",
                filter.request_redirect.is_some(),
            ),
            (
                FilterType::UrlRewrite,
                "urlRewrite",
                filter.url_rewrite.is_some(),
            ),
            (FilterType::Cors, "cors", filter.cors.is_some()),
            (
                FilterType::ExternalAuth,
                "externalAuth",
                filter.external_auth.is_some(),
            ),
            (
                FilterType::ExtensionRef,
                "extensionRef",
                filter.extension_ref.is_some(),
            ),
        ];
        for (kind, field, is_given) in given {
            if kind == filter.kind && !is_given {
                report.error(
                    format!("{at}.{field}"),
                    format!("is missing, although type is {}", kind.name()),
                );
            } else if kind != filter.kind && is_given {
                report.error(
                    format!("{at}.{field}"),
                    format!("must be left out: type is {}", filter.kind.name()),
                );
            }
        }
        header_filter(
            report,
            &format!("{at}.requestHeaderModifier"),
            filter.request_header_modifier.as_ref(),
        );
        header_filter(
            report,
            &format!("{at}.responseHeaderModifier"),
            filter.response_header_modifier.as_ref(),
        );
        other_filters(report, &at, filter);
    }
}

fn other_filters(report: &mut Report, at: &str, filter: &Filter) {
    if let Some(mirror) = &filter.request_mirror {
        backend(
            report,
            &format!("{at}.requestMirror.backendRef"),
            &mirror.backend_ref,
        );
        if mirror.percent.is_some() && mirror.fraction.is_some() {
            report.error(
                format!("{at}.requestMirror"),
                "give either percent or fraction",
            );
        }
        if mirror.percent.is_some_and(|p| p > 100) {
            report.error(
                format!("{at}.requestMirror.percent"),
                "must be between 0 and 100",
            );
        }
        if mirror
            .fraction
            .is_some_and(|f| f.denominator == 0 || f.numerator > f.denominator)
        {
            report.error(
                format!("{at}.requestMirror.fraction"),
                "must be between 0 and 1",
            );
        }
    }
    if let Some(redirect) = &filter.request_redirect {
        let at = format!("{at}.requestRedirect");
        if redirect
            .scheme
            .as_ref()
            .is_some_and(|s| !matches!(s.as_str(), "http" | "https"))
        {
            report.error(format!("{at}.scheme"), "must be http or https");
        }
        if !matches!(redirect.status_code, 301 | 302 | 303 | 307 | 308) {
            report.error(
                format!("{at}.statusCode"),
                "must be 301, 302, 303, 307 or 308",
            );
        }
        if let Some(port) = redirect.port {
            report.port(format!("{at}.port"), port);
        }
        if let Some(hostname) = &redirect.hostname {
            report.check(format!("{at}.hostname"), host(hostname, false));
        }
        path_modifier(report, &at, redirect.path.as_ref());
    }
    if let Some(rewrite) = &filter.url_rewrite {
        let at = format!("{at}.urlRewrite");
        if let Some(hostname) = &rewrite.hostname {
            report.check(format!("{at}.hostname"), host(hostname, false));
        }
        path_modifier(report, &at, rewrite.path.as_ref());
    }
    if let Some(cors) = &filter.cors {
        for (i, origin) in cors.allow_origins.iter().enumerate() {
            if origin != "*" && !origin.contains("://") {
                report.error(
                    format!("{at}.cors.allowOrigins[{i}]"),
                    format!("{origin:?} must be * or SCHEME://HOST"),
                );
            }
        }
    }
}

fn path_modifier(report: &mut Report, at: &str, modifier: Option<&PathModifier>) {
    let Some(m) = modifier else { return };
    let (needed, wrong) = match m.kind {
        PathModifierType::ReplaceFullPath => (
            ("replaceFullPath", &m.replace_full_path),
            ("replacePrefixMatch", &m.replace_prefix_match),
        ),
        PathModifierType::ReplacePrefixMatch => (
            ("replacePrefixMatch", &m.replace_prefix_match),
            ("replaceFullPath", &m.replace_full_path),
        ),
    };
    if needed.1.is_none() {
        report.error(
            format!("{at}.path.{}", needed.0),
            "is missing, although type asks for it",
        );
    }
    if wrong.1.is_some() {
        report.error(
            format!("{at}.path.{}", wrong.0),
            "must be left out: type says otherwise",
        );
    }
}

fn header_filter(report: &mut Report, at: &str, filter: Option<&HeaderFilter>) {
    let Some(filter) = filter else { return };
    let lists = [("set", &filter.set), ("add", &filter.add)];
    for (list, headers) in lists {
        for (i, header) in headers.iter().enumerate() {
            report.check(
                format!("{at}.{list}[{i}].name"),
                names::header(&header.name),
            );
        }
    }
    for (i, name) in filter.remove.iter().enumerate() {
        report.check(format!("{at}.remove[{i}]"), names::header(name));
    }
}

fn http_backends(report: &mut Report, at: &str, all: &[HttpBackendRef]) {
    too_many(
        report,
        &format!("{at}.backendRefs"),
        all.len(),
        MAX_BACKENDS,
    );
    for (i, to) in all.iter().enumerate() {
        let at = format!("{at}.backendRefs[{i}]");
        backend(report, &at, &to.backend());
        filters(report, &at, &to.filters);
    }
}

fn backend(report: &mut Report, at: &str, to: &BackendRef) {
    if to.name.is_empty() {
        report.error(format!("{at}.name"), "is missing");
    }
    if to.weight > MAX_WEIGHT {
        report.error(
            format!("{at}.weight"),
            format!("must not be more than {MAX_WEIGHT}"),
        );
    }
    match to.port {
        Some(port) => report.port(format!("{at}.port"), port),
        None if to.group.is_empty() && to.kind == "Service" => {
            report.error(format!("{at}.port"), "is missing: a Service has ports");
        }
        None => {}
    }
}

pub(super) fn grpc(report: &mut Report, spec: &GrpcRoute) {
    common(
        report,
        &spec.parent_refs,
        &spec.hostnames,
        spec.use_default_gateways.as_ref(),
    );
    too_many(report, "spec.rules", spec.rules.len(), MAX_RULES);
    for (i, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{i}]");
        too_many(
            report,
            &format!("{at}.matches"),
            rule.matches.len(),
            MAX_MATCHES,
        );
        for (j, m) in rule.matches.iter().enumerate() {
            let at = format!("{at}.matches[{j}]");
            if let Some(method) = &m.method {
                if method.service.is_none() && method.method.is_none() {
                    report.error(format!("{at}.method"), "give service, method or both");
                }
                for (field, text) in [("service", &method.service), ("method", &method.method)] {
                    let Some(text) = text else { continue };
                    let field = format!("{at}.method.{field}");
                    match method.kind {
                        MatchType::RegularExpression => report.check(field, names::regex(text)),
                        MatchType::Exact if text.is_empty() || text.contains('/') => {
                            report.error(field, "is the name alone, without /");
                        }
                        MatchType::Exact => {}
                    }
                }
            }
            header_matches(report, &format!("{at}.headers"), &m.headers);
        }
        filters(report, &at, &rule.filters);
        for (j, filter) in rule.filters.iter().enumerate() {
            if matches!(
                filter.kind,
                FilterType::RequestRedirect | FilterType::UrlRewrite | FilterType::Cors
            ) {
                report.error(
                    format!("{at}.filters[{j}].type"),
                    format!("{} is for HTTPRoute only", filter.kind.name()),
                );
            }
        }
        http_backends(report, &at, &rule.backend_refs);
        if rule.session_persistence.is_some() {
            report.error(
                format!("{at}.sessionPersistence"),
                "is not supported here; use a DestinationRule with consistentHash",
            );
        }
    }
}

pub(super) fn tls(report: &mut Report, spec: &TlsRoute) {
    common(
        report,
        &spec.parent_refs,
        &spec.hostnames,
        spec.use_default_gateways.as_ref(),
    );
    l4_rules(report, &spec.rules);
}

pub(super) fn tcp(report: &mut Report, spec: &TcpRoute) {
    common(
        report,
        &spec.parent_refs,
        &[],
        spec.use_default_gateways.as_ref(),
    );
    l4_rules(report, &spec.rules);
}

fn l4_rules(report: &mut Report, rules: &[L4Rule]) {
    if rules.is_empty() {
        report.error("spec.rules", "give at least one rule");
    }
    too_many(report, "spec.rules", rules.len(), MAX_RULES);
    for (i, rule) in rules.iter().enumerate() {
        let at = format!("spec.rules[{i}].backendRefs");
        too_many(report, &at, rule.backend_refs.len(), MAX_BACKENDS);
        for (j, to) in rule.backend_refs.iter().enumerate() {
            backend(report, &format!("{at}[{j}]"), to);
        }
    }
}

/// What all routes have.
fn common(
    report: &mut Report,
    parents: &[ParentReference],
    hostnames: &[String],
    use_default: Option<&String>,
) {
    too_many(report, "spec.parentRefs", parents.len(), 32);
    let mut seen = BTreeSet::new();
    for (i, parent) in parents.iter().enumerate() {
        let at = format!("spec.parentRefs[{i}]");
        parent_ref(report, &at, parent);
        if !seen.insert(parent) {
            report.error(&at, "is the same as an earlier one");
        }
    }
    too_many(report, "spec.hostnames", hostnames.len(), 16);
    for (i, hostname) in hostnames.iter().enumerate() {
        report.check(format!("spec.hostnames[{i}]"), host(hostname, true));
    }
    if use_default.is_some() {
        report.warning(
            "spec.useDefaultGateways",
            "has no effect here: name the Gateways in parentRefs",
        );
    }
}

fn parent_ref(report: &mut Report, at: &str, parent: &ParentReference) {
    if parent.name.is_empty() {
        report.error(format!("{at}.name"), "is missing");
    }
    if let Some(port) = parent.port {
        report.port(format!("{at}.port"), port);
    }
}

pub(super) fn grant(report: &mut Report, spec: &ReferenceGrant) {
    if spec.from.is_empty() {
        report.error("spec.from", "say who may refer");
    }
    if spec.to.is_empty() {
        report.error("spec.to", "say to what");
    }
    for (i, from) in spec.from.iter().enumerate() {
        for (field, text) in [("kind", &from.kind), ("namespace", &from.namespace)] {
            if text.is_empty() {
                report.error(format!("spec.from[{i}].{field}"), "is missing");
            }
        }
    }
    for (i, to) in spec.to.iter().enumerate() {
        if to.kind.is_empty() {
            report.error(format!("spec.to[{i}].kind"), "is missing");
        }
    }
}

pub(super) fn backend_tls(report: &mut Report, spec: &BackendTlsPolicy) {
    if spec.target_refs.is_empty() {
        report.error("spec.targetRefs", "name the backends");
    }
    too_many(report, "spec.targetRefs", spec.target_refs.len(), 16);
    for (i, target) in spec.target_refs.iter().enumerate() {
        for (field, text) in [("kind", &target.kind), ("name", &target.name)] {
            if text.is_empty() {
                report.error(format!("spec.targetRefs[{i}].{field}"), "is missing");
            }
        }
    }
    let validation = &spec.validation;
    if validation.hostname.is_empty() {
        report.error("spec.validation.hostname", "is missing");
    } else {
        report.check(
            "spec.validation.hostname",
            host(&validation.hostname, false),
        );
    }
    match (
        validation.ca_certificate_refs.is_empty(),
        validation.well_known_ca_certificates.is_some(),
    ) {
        (true, false) => report.error(
            "spec.validation",
            "give caCertificateRefs or wellKnownCACertificates",
        ),
        (false, true) => report.error(
            "spec.validation",
            "give either caCertificateRefs or wellKnownCACertificates",
        ),
        _ => {}
    }
    for (i, name) in validation.subject_alt_names.iter().enumerate() {
        let (field, text) = match name.kind {
            SubjectAltNameType::Hostname => ("hostname", &name.hostname),
            SubjectAltNameType::Uri => ("uri", &name.uri),
        };
        if text.is_empty() {
            report.error(
                format!("spec.validation.subjectAltNames[{i}].{field}"),
                "is missing, although type asks for it",
            );
        }
    }
    if !spec.options.is_empty() {
        report.warning("spec.options", "have no effect here");
    }
}

/// A hostname, perhaps with `*.` before it; never an address.
fn host(text: &str, wildcard: bool) -> Result<(), String> {
    if names::ip(text).is_ok() {
        return Err(format!("{text:?} is an address: give a hostname"));
    }
    let bare = match text.strip_prefix("*.") {
        Some(_) if !wildcard => return Err(format!("{text:?} must not have a wildcard")),
        Some(bare) => bare,
        None => text,
    };
    names::fqdn(bare).map_err(|e| format!("{text:?} is no hostname: {e}"))
}

fn too_many(report: &mut Report, at: &str, count: usize, most: usize) {
    if count > most {
        report.error(at, format!("{count} are given; {most} are allowed"));
    }
}

#[cfg(test)]
mod tests;
