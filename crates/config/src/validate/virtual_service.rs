//! VirtualService.

use proto::istio::networking::v1alpha3::{
    CorsPolicy, Destination, Headers, HttpFaultInjection, HttpMatchRequest, HttpRedirect,
    HttpRetry, HttpRewrite, HttpRoute, Percent, RouteDestination, StringMatch, VirtualService,
    http_body, http_fault_injection, http_redirect, string_match::MatchType,
};

use super::{Report, names};
use crate::Meta;

/// Header keys that stand for a claim of a token.
const CLAIM_PREFIXES: [&str; 2] = ["@request.auth.claims", "@request.auth.claims."];

pub(super) fn check(report: &mut Report, meta: &Meta, spec: &VirtualService) {
    let delegate = spec.hosts.is_empty();
    let bound = spec.gateways.iter().any(|g| g != "mesh");
    if delegate {
        if !spec.gateways.is_empty() {
            report.error(
                "spec.gateways",
                "a VirtualService without hosts is a delegate, which takes its caller's gateways",
            );
        }
        if spec.http.is_empty() {
            report.error(
                "spec.http",
                "a VirtualService without hosts is a delegate, which needs http routes",
            );
        }
        if !spec.tls.is_empty() || !spec.tcp.is_empty() {
            report.error(
                "spec.tls",
                "a VirtualService without hosts is a delegate, which routes HTTP only",
            );
        }
    } else if spec.http.is_empty() && spec.tcp.is_empty() && spec.tls.is_empty() {
        report.error("spec.http", "one of http, tls and tcp is needed");
    }
    gateways(report, "spec.gateways", &spec.gateways);
    hosts(report, spec, bound);
    for (i, route) in spec.http.iter().enumerate() {
        http(report, &format!("spec.http[{i}]"), route, delegate, bound);
    }
    for (i, tls) in spec.tls.iter().enumerate() {
        let field = format!("spec.tls[{i}]");
        if tls.r#match.is_empty() {
            report.error(
                format!("{field}.match"),
                "a TLS route needs a match with sniHosts",
            );
        }
        for (j, m) in tls.r#match.iter().enumerate() {
            let field = format!("{field}.match[{j}]");
            if m.sni_hosts.is_empty() {
                report.error(format!("{field}.sniHosts"), "is missing");
            }
            for (k, sni) in m.sni_hosts.iter().enumerate() {
                sni_host(
                    report,
                    &format!("{field}.sniHosts[{k}]"),
                    sni,
                    meta,
                    spec,
                    bound,
                );
            }
            l4(
                report,
                &field,
                &m.destination_subnets,
                m.port,
                &m.source_labels,
                &m.gateways,
            );
        }
        l4_routes(report, &field, &tls.route);
    }
    for (i, tcp) in spec.tcp.iter().enumerate() {
        let field = format!("spec.tcp[{i}]");
        for (j, m) in tcp.r#match.iter().enumerate() {
            let field = format!("{field}.match[{j}]");
            l4(
                report,
                &field,
                &m.destination_subnets,
                m.port,
                &m.source_labels,
                &m.gateways,
            );
        }
        l4_routes(report, &field, &tcp.route);
    }
    report.export_to(&meta.namespace, &spec.export_to, false);
}

fn hosts(report: &mut Report, spec: &VirtualService, bound: bool) {
    let mut valid = true;
    for (i, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{i}]");
        let generated = bound && !spec.tls.is_empty() && host.starts_with("outbound_");
        if !generated && names::ip(host).is_err() {
            let checked = names::wildcard_domain(host);
            valid &= checked.is_ok();
            report.check(&field, checked);
        }
        if host == "*" && !bound {
            valid = false;
            report.error(
                &field,
                "\"*\" is allowed only for a VirtualService of a gateway: name hosts, or gateways",
            );
        }
    }
    if !valid {
        return;
    }
    for (i, a) in spec.hosts.iter().enumerate() {
        for (j, b) in spec.hosts.iter().enumerate().skip(i + 1) {
            if names::covers(a, b) || names::covers(b, a) {
                report.error(
                    format!("spec.hosts[{j}]"),
                    format!("{b} stands for hosts that {a} (hosts[{i}]) has already"),
                );
            }
        }
    }
}

fn gateways(report: &mut Report, field: &str, all: &[String]) {
    for (i, name) in all.iter().enumerate() {
        report.check(format!("{field}[{i}]"), names::gateway(name));
    }
}

fn http(report: &mut Report, field: &str, route: &HttpRoute, in_delegate: bool, bound: bool) {
    let has_route = !route.route.is_empty();
    if route.delegate.is_some() && !in_delegate {
        if has_route {
            report.error(
                format!("{field}.route"),
                "a rule that delegates has no routes of its own",
            );
        }
        if route.redirect.is_some() {
            report.error(
                format!("{field}.redirect"),
                "a rule that delegates has no redirect of its own",
            );
        }
    } else {
        if route.delegate.is_some() {
            report.error(
                format!("{field}.delegate"),
                "a delegate cannot delegate further",
            );
        }
        let kinds = [
            ("redirect", route.redirect.is_some()),
            ("directResponse", route.direct_response.is_some()),
        ];
        match kinds.iter().find(|(_, given)| *given) {
            Some((kind, _)) => {
                let others = [
                    ("route", has_route),
                    ("fault", route.fault.is_some()),
                    ("rewrite", route.rewrite.is_some()),
                    (
                        "directResponse",
                        *kind == "redirect" && route.direct_response.is_some(),
                    ),
                ];
                for (other, _) in others.iter().filter(|(_, given)| *given) {
                    report.error(
                        format!("{field}.{other}"),
                        format!("cannot stand beside {kind}: give one of the two"),
                    );
                }
            }
            None if !has_route => {
                report.error(
                    format!("{field}.route"),
                    "one of route, redirect and directResponse is needed",
                );
            }
            None => {}
        }
    }
    for (i, m) in route.r#match.iter().enumerate() {
        http_match(report, &format!("{field}.match[{i}]"), m, bound);
    }
    headers(report, &format!("{field}.headers"), route.headers.as_ref());
    if let Some(cors) = &route.cors_policy {
        self::cors(report, &format!("{field}.corsPolicy"), cors);
    }
    if let Some(fault) = &route.fault {
        self::fault(report, &format!("{field}.fault"), fault);
    }
    if route.mirror.is_some() && !route.mirrors.is_empty() {
        report.error(
            format!("{field}.mirrors"),
            "cannot stand beside mirror: give one of the two",
        );
    }
    if route.mirror_percent.is_some_and(|p| p > 100) {
        report.error(format!("{field}.mirrorPercent"), "must be at most 100");
    }
    whole_percentage(
        report,
        &format!("{field}.mirrorPercentage"),
        route.mirror_percentage.as_ref(),
    );
    if let Some(mirror) = &route.mirror {
        destination(report, &format!("{field}.mirror"), mirror);
    }
    for (i, mirror) in route.mirrors.iter().enumerate() {
        let field = format!("{field}.mirrors[{i}]");
        match &mirror.destination {
            Some(d) => destination(report, &format!("{field}.destination"), d),
            None => report.error(format!("{field}.destination"), "is missing"),
        }
        whole_percentage(
            report,
            &format!("{field}.percentage"),
            mirror.percentage.as_ref(),
        );
    }
    if let Some(redirect) = &route.redirect {
        self::redirect(
            report,
            &format!("{field}.redirect"),
            redirect,
            &route.r#match,
        );
    }
    if let Some(direct) = &route.direct_response {
        status(
            report,
            &format!("{field}.directResponse.status"),
            i64::from(direct.status),
        );
        let size = match direct.body.as_ref().and_then(|b| b.specifier.as_ref()) {
            Some(http_body::Specifier::String(s)) => s.len(),
            Some(http_body::Specifier::Bytes(b)) => b.len(),
            None => 0,
        };
        if size > 1 << 20 {
            report.error(
                format!("{field}.directResponse.body"),
                "must be at most 1 MiB",
            );
        } else if size > 100 << 10 {
            report.warning(
                format!("{field}.directResponse.body"),
                "every proxy holds this body: above 100 KiB it costs",
            );
        }
    }
    if let Some(retries) = &route.retries {
        self::retries(report, &format!("{field}.retries"), retries);
    }
    if let Some(rewrite) = &route.rewrite {
        self::rewrite(report, &format!("{field}.rewrite"), rewrite);
    }
    let mut total = 0_i64;
    for (i, r) in route.route.iter().enumerate() {
        let field = format!("{field}.route[{i}]");
        total += route_destination(report, &field, r.destination.as_ref(), r.weight);
        headers(report, &format!("{field}.headers"), r.headers.as_ref());
    }
    if route.route.len() > 1 && total == 0 {
        report.error(
            format!("{field}.route"),
            "the weights of several routes must not add up to 0",
        );
    }
    report.duration(format!("{field}.timeout"), route.timeout.as_ref());
}

fn http_match(report: &mut Report, field: &str, m: &HttpMatchRequest, bound: bool) {
    for (part, all) in [
        ("headers", &m.headers),
        ("withoutHeaders", &m.without_headers),
    ] {
        for (name, value) in all {
            let field = format!("{field}.{part}[{name:?}]");
            if CLAIM_PREFIXES.iter().any(|p| name.starts_with(p)) {
                if !bound {
                    report.error(
                        &field,
                        "routing by the claims of a token works only at a gateway",
                    );
                }
            } else if !matches!(
                name.as_str(),
                ":method" | ":scheme" | ":authority" | ":path" | ":status"
            ) {
                report.check(&field, names::header(name));
            }
            let any = part == "withoutHeaders"
                && matches!(&value.match_type, Some(MatchType::Regex(r)) if r == "*");
            if !any {
                string_match(report, &field, Some(value), false);
            }
        }
    }
    string_match(report, &format!("{field}.uri"), m.uri.as_ref(), true);
    for (part, value) in [
        ("scheme", &m.scheme),
        ("method", &m.method),
        ("authority", &m.authority),
    ] {
        string_match(report, &format!("{field}.{part}"), value.as_ref(), false);
    }
    for (name, value) in &m.query_params {
        string_match(
            report,
            &format!("{field}.queryParams[{name:?}]"),
            Some(value),
            false,
        );
    }
    if m.port != 0 {
        report.port(format!("{field}.port"), m.port);
    }
    report.check(
        format!("{field}.sourceLabels"),
        names::label_map(&m.source_labels),
    );
    gateways(report, &format!("{field}.gateways"), &m.gateways);
    if !m.source_namespace.is_empty() {
        report.check(
            format!("{field}.sourceNamespace"),
            names::label(&m.source_namespace),
        );
    }
}

/// `empty_prefix`: a path may be matched by the empty prefix, which every path has.
fn string_match(report: &mut Report, field: &str, m: Option<&StringMatch>, empty_prefix: bool) {
    match m.and_then(|m| m.match_type.as_ref()) {
        Some(MatchType::Prefix(p)) if p.is_empty() && !empty_prefix => {
            report.error(
                format!("{field}.prefix"),
                "is empty; leave the match out to match everything",
            );
        }
        Some(MatchType::Regex(r)) => report.check(format!("{field}.regex"), names::regex(r)),
        _ => {}
    }
}

fn headers(report: &mut Report, field: &str, headers: Option<&Headers>) {
    let Some(headers) = headers else { return };
    for (side, operations) in [
        ("request", &headers.request),
        ("response", &headers.response),
    ] {
        let Some(operations) = operations else {
            continue;
        };
        let authority = |name: &str| {
            side == "request"
                && (name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority"))
        };
        for (part, all) in [("set", &operations.set), ("add", &operations.add)] {
            for (name, value) in all {
                let field = format!("{field}.{side}.{part}[{name:?}]");
                if !authority(name) {
                    report.check(&field, operated(name));
                }
                if value.chars().any(|c| c.is_control() && c != '\t') {
                    report.error(&field, "a header's value has no control characters");
                }
            }
        }
        for (i, name) in operations.remove.iter().enumerate() {
            report.check(format!("{field}.{side}.remove[{i}]"), operated(name));
        }
    }
}

fn operated(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("a header needs a name".into());
    }
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(format!("{name} cannot be changed here; see rewrite"));
    }
    Ok(())
}

fn cors(report: &mut Report, field: &str, cors: &CorsPolicy) {
    for (i, origin) in cors.allow_origins.iter().enumerate() {
        let field = format!("{field}.allowOrigins[{i}]");
        match &origin.match_type {
            Some(MatchType::Exact(s) | MatchType::Prefix(s)) if !s.is_empty() => {}
            Some(MatchType::Regex(r)) if !r.is_empty() => {
                report.check(format!("{field}.regex"), names::regex(r))
            }
            _ => report.error(field, "is empty: give exact, prefix or regex"),
        }
    }
    const METHODS: [&str; 10] = [
        "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*",
    ];
    for (i, method) in cors.allow_methods.iter().enumerate() {
        if !METHODS.contains(&method.as_str()) {
            report.error(
                format!("{field}.allowMethods[{i}]"),
                format!("{method:?} is none of {}", METHODS.join(", ")),
            );
        }
    }
    for (part, all) in [
        ("allowHeaders", &cors.allow_headers),
        ("exposeHeaders", &cors.expose_headers),
    ] {
        for (i, name) in all.iter().enumerate().filter(|(_, n)| *n != "*") {
            report.check(format!("{field}.{part}[{i}]"), names::header(name));
        }
    }
    report.duration(format!("{field}.maxAge"), cors.max_age.as_ref());
    if cors.max_age.is_some_and(|d| d.nanos > 0) {
        report.error(format!("{field}.maxAge"), "must be in whole seconds");
    }
}

fn fault(report: &mut Report, field: &str, fault: &HttpFaultInjection) {
    use http_fault_injection::{abort::ErrorType, delay::HttpDelayType};
    if fault.abort.is_none() && fault.delay.is_none() {
        report.error(field, "one of abort and delay is needed");
    }
    if let Some(abort) = &fault.abort {
        percentage(
            report,
            &format!("{field}.abort.percentage"),
            abort.percentage.as_ref(),
        );
        match &abort.error_type {
            Some(ErrorType::HttpStatus(s)) => {
                status(report, &format!("{field}.abort.httpStatus"), i64::from(*s))
            }
            Some(ErrorType::GrpcStatus(s)) if !GRPC_STATUS.contains(&s.as_str()) => {
                report.error(
                    format!("{field}.abort.grpcStatus"),
                    format!("{s:?} is none of {}", GRPC_STATUS.join(", ")),
                );
            }
            Some(ErrorType::GrpcStatus(_)) => {}
            Some(ErrorType::Http2Error(_)) => {
                report.error(format!("{field}.abort.http2Error"), "is not supported")
            }
            None => report.warning(
                format!("{field}.abort"),
                "aborts nothing: give httpStatus or grpcStatus",
            ),
        }
    }
    if let Some(delay) = &fault.delay {
        percentage(
            report,
            &format!("{field}.delay.percentage"),
            delay.percentage.as_ref(),
        );
        match &delay.http_delay_type {
            Some(HttpDelayType::FixedDelay(d)) => {
                report.duration(format!("{field}.delay.fixedDelay"), Some(d))
            }
            Some(HttpDelayType::ExponentialDelay(_)) => {
                report.error(
                    format!("{field}.delay.exponentialDelay"),
                    "is not supported; give fixedDelay",
                );
            }
            None => {}
        }
    }
}

fn redirect(
    report: &mut Report,
    field: &str,
    redirect: &HttpRedirect,
    matches: &[HttpMatchRequest],
) {
    if !redirect.uri.is_empty() && !redirect.prefix_rewrite.is_empty() {
        report.error(
            format!("{field}.prefixRewrite"),
            "cannot stand beside uri: give one of the two",
        );
    }
    let other = |m: &HttpMatchRequest| {
        m.uri
            .as_ref()
            .is_some_and(|u| !matches!(u.match_type, Some(MatchType::Prefix(_))))
    };
    if !redirect.prefix_rewrite.is_empty() && matches.iter().any(other) {
        report.error(
            format!("{field}.prefixRewrite"),
            "needs every match to be by uri.prefix",
        );
    }
    let texts = [
        &redirect.uri,
        &redirect.prefix_rewrite,
        &redirect.authority,
        &redirect.scheme,
    ];
    if texts.iter().all(|t| t.is_empty()) && redirect.redirect_port.is_none() {
        report.error(
            field,
            "changes nothing: give uri, authority, scheme or port",
        );
    }
    if redirect.redirect_code != 0 && !(300..=399).contains(&redirect.redirect_code) {
        report.error(
            format!("{field}.redirectCode"),
            format!("{} is no redirect: give 300 to 399", redirect.redirect_code),
        );
    }
    if !matches!(redirect.scheme.as_str(), "" | "http" | "https") {
        report.error(format!("{field}.scheme"), "must be http or https");
    }
    if let Some(http_redirect::RedirectPort::Port(port)) = redirect.redirect_port
        && port != 0
    {
        report.port(format!("{field}.port"), port);
    }
}

pub(super) fn retries(report: &mut Report, field: &str, retries: &HttpRetry) {
    if retries.attempts < 0 {
        report.error(format!("{field}.attempts"), "must not be negative");
    }
    let more = retries.per_try_timeout.is_some()
        || !retries.retry_on.is_empty()
        || retries.retry_remote_localities.is_some();
    if retries.attempts == 0 && more {
        report.error(
            format!("{field}.attempts"),
            "is 0, which turns retries off; remove what else stands here",
        );
    }
    report.duration(
        format!("{field}.perTryTimeout"),
        retries.per_try_timeout.as_ref(),
    );
    report.duration(format!("{field}.backoff"), retries.backoff.as_ref());
    for policy in retries
        .retry_on
        .split(',')
        .filter(|_| !retries.retry_on.is_empty())
    {
        let code = policy.parse::<u16>().is_ok_and(|c| (100..600).contains(&c));
        if !code && !RETRY_ON.contains(&policy) {
            let message = format!(
                "{policy:?} is neither a status code nor one of {}",
                RETRY_ON.join(", ")
            );
            report.error(format!("{field}.retryOn"), message);
        }
    }
}

fn rewrite(report: &mut Report, field: &str, rewrite: &HttpRewrite) {
    if let Some(regex) = &rewrite.uri_regex_rewrite {
        if !rewrite.uri.is_empty() {
            report.error(
                format!("{field}.uriRegexRewrite"),
                "cannot stand beside uri: give one of the two",
            );
        }
        if regex.rewrite.is_empty() {
            report.error(format!("{field}.uriRegexRewrite.rewrite"), "is missing");
        }
        report.check(
            format!("{field}.uriRegexRewrite.match"),
            names::regex(&regex.r#match),
        );
    } else if rewrite.uri.is_empty() && rewrite.authority.is_empty() {
        report.error(
            field,
            "changes nothing: give uri, uriRegexRewrite or authority",
        );
    }
}

fn route_destination(
    report: &mut Report,
    field: &str,
    to: Option<&Destination>,
    weight: i32,
) -> i64 {
    match to {
        Some(d) => destination(report, &format!("{field}.destination"), d),
        None => report.error(format!("{field}.destination"), "is missing"),
    }
    if weight < 0 {
        report.error(
            format!("{field}.weight"),
            format!("{weight} must not be negative"),
        );
    }
    i64::from(weight)
}

pub(super) fn destination(report: &mut Report, field: &str, destination: &Destination) {
    if destination.host == "*" {
        report.error(
            format!("{field}.host"),
            "\"*\" is no destination: name a host",
        );
    } else {
        report.check(
            format!("{field}.host"),
            names::wildcard_domain(&destination.host),
        );
    }
    if !destination.subset.is_empty() {
        report.check(format!("{field}.subset"), names::label(&destination.subset));
    }
    if let Some(port) = &destination.port {
        report.port(format!("{field}.port.number"), port.number);
    }
}

fn l4_routes(report: &mut Report, field: &str, routes: &[RouteDestination]) {
    if routes.is_empty() {
        report.error(format!("{field}.route"), "is missing");
    }
    let mut total = 0;
    for (i, r) in routes.iter().enumerate() {
        total += route_destination(
            report,
            &format!("{field}.route[{i}]"),
            r.destination.as_ref(),
            r.weight,
        );
    }
    if routes.len() > 1 && total == 0 {
        report.error(
            format!("{field}.route"),
            "the weights of several routes must not add up to 0",
        );
    }
}

fn l4(
    report: &mut Report,
    field: &str,
    subnets: &[String],
    port: u32,
    labels: &std::collections::BTreeMap<String, String>,
    of_gateways: &[String],
) {
    for (i, subnet) in subnets.iter().enumerate() {
        report.check(
            format!("{field}.destinationSubnets[{i}]"),
            names::subnet(subnet),
        );
    }
    if port != 0 {
        report.port(format!("{field}.port"), port);
    }
    report.check(format!("{field}.sourceLabels"), names::label_map(labels));
    gateways(report, &format!("{field}.gateways"), of_gateways);
}

fn sni_host(
    report: &mut Report,
    field: &str,
    sni: &str,
    meta: &Meta,
    spec: &VirtualService,
    bound: bool,
) {
    if names::ip(sni).is_ok() {
        report.warning(
            field,
            "clients send no addresses as SNI: this match is not met by most of them",
        );
        return;
    }
    if !(bound && sni.starts_with("outbound_"))
        && let Err(e) = names::wildcard_domain(sni)
    {
        report.error(field, e);
        return;
    }
    // A short host stands for the service's whole name, which is what a client sends. (Istio's validation does not see
    // that; its translation does.)
    let whole = |host: &str| {
        !host.contains('.') && sni.starts_with(&format!("{host}.{}.svc.", meta.namespace))
    };
    if !spec.hosts.iter().any(|h| names::covers(h, sni) || whole(h)) {
        report.error(
            field,
            format!(
                "{sni} is none of this VirtualService's hosts ({})",
                spec.hosts.join(", ")
            ),
        );
    }
}

fn status(report: &mut Report, field: &str, status: i64) {
    // 600 is let through as Istio does.
    if !(200..=600).contains(&status) {
        report.error(
            field,
            format!("{status} is no status to answer with: give 200 to 599"),
        );
    }
}

/// 0 or at least what a proxy can draw: a ten-thousandth of a percent.
fn percentage(report: &mut Report, field: &str, percent: Option<&Percent>) {
    if let Some(p) = percent
        && (p.value < 0.0 || p.value > 100.0 || (p.value > 0.0 && p.value < 0.0001))
    {
        report.error(
            format!("{field}.value"),
            format!("{} is no percentage: give 0, or 0.0001 to 100", p.value),
        );
    }
}

fn whole_percentage(report: &mut Report, field: &str, percent: Option<&Percent>) {
    if let Some(p) = percent
        && !(0.0..=100.0).contains(&p.value)
    {
        report.error(
            format!("{field}.value"),
            format!("{} is no percentage: give 0 to 100", p.value),
        );
    }
}

const RETRY_ON: [&str; 16] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

/// The statuses of gRPC by number.
pub const GRPC_STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
