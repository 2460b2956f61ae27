//! PeerAuthentication, RequestAuthentication and AuthorizationPolicy.

use proto::istio::security::v1beta1::{
    AuthorizationPolicy, JwtRule, Operation, PeerAuthentication, RequestAuthentication, Source,
    authorization_policy::{Action, ActionDetail},
};

use super::{Report, names};

pub(super) fn peer(report: &mut Report, spec: &PeerAuthentication) {
    let selects = spec
        .selector
        .as_ref()
        .is_some_and(|s| !s.match_labels.is_empty());
    if !selects && !spec.port_level_mtls.is_empty() {
        report.error(
            "spec.portLevelMtls",
            "needs a selector: ports are those of certain workloads",
        );
    }
    for port in spec.port_level_mtls.keys() {
        report.port(format!("spec.portLevelMtls[{:?}]", port.to_string()), *port);
    }
    report.selector(spec.selector.as_ref());
}

pub(super) fn request(report: &mut Report, spec: &RequestAuthentication) {
    report.targets(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
    );
    for (i, rule) in spec.jwt_rules.iter().enumerate() {
        jwt(report, &format!("spec.jwtRules[{i}]"), rule);
    }
}

fn jwt(report: &mut Report, field: &str, rule: &JwtRule) {
    if rule.issuer.is_empty() && rule.jwks_uri.is_empty() {
        report.error(
            format!("{field}.issuer"),
            "one of issuer and jwksUri is needed",
        );
    }
    for (name, list) in [
        ("audiences", &rule.audiences),
        ("fromParams", &rule.from_params),
        ("fromCookies", &rule.from_cookies),
    ] {
        empty_values(report, &format!("{field}.{name}"), list);
    }
    if !rule.jwks_uri.is_empty() {
        let rest = rule
            .jwks_uri
            .strip_prefix("https://")
            .or_else(|| rule.jwks_uri.strip_prefix("http://"));
        if rest.is_none_or(|r| r.is_empty() || r.starts_with('/')) {
            report.error(
                format!("{field}.jwksUri"),
                format!("{:?} is no http or https URL", rule.jwks_uri),
            );
        }
    }
    if !rule.jwks.is_empty() {
        let parsed = serde_json::from_str::<serde_json::Value>(&rule.jwks);
        if !parsed
            .as_ref()
            .is_ok_and(|v| v["keys"].is_array() || v["kty"].is_string())
        {
            report.error(
                format!("{field}.jwks"),
                "is no JSON Web Key Set: {\"keys\": [...]}",
            );
        }
    }
    for (i, location) in rule.from_headers.iter().enumerate() {
        if location.name.is_empty() {
            report.error(format!("{field}.fromHeaders[{i}].name"), "is missing");
        }
    }
    for (i, output) in rule.output_claim_to_headers.iter().enumerate() {
        let field = format!("{field}.outputClaimToHeaders[{i}]");
        if output.claim.is_empty() {
            report.error(format!("{field}.claim"), "is missing");
        }
        let simple = output
            .header
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        if output.header.is_empty() || !simple {
            report.error(
                format!("{field}.header"),
                format!(
                    "{:?} is no header name of letters, digits, \"-\" and \"_\"",
                    output.header
                ),
            );
        }
    }
    report.duration(format!("{field}.timeout"), rule.timeout.as_ref());
}

pub(super) fn authorization(report: &mut Report, spec: &AuthorizationPolicy) {
    report.targets(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
    );
    let action = spec.action();
    let provider = spec
        .action_detail
        .as_ref()
        .map(|ActionDetail::Provider(p)| p.name.as_str());
    if action == Action::Custom && provider.unwrap_or_default().is_empty() {
        report.error("spec.provider.name", "is needed for action CUSTOM");
    }
    if action != Action::Custom && provider.is_some() {
        report.error("spec.provider", "has an effect only with action CUSTOM");
    }
    if matches!(action, Action::Deny | Action::Custom) && spec.rules.is_empty() {
        report.error(
            "spec.rules",
            "without rules this never happens; for every request give one empty rule: [{}]",
        );
    }
    for (i, rule) in spec.rules.iter().enumerate() {
        let field = format!("spec.rules[{i}]");
        let (mut tcp_source, mut tcp_operation) = (false, false);
        for (j, from) in rule.from.iter().enumerate() {
            let field = format!("{field}.from[{j}].source");
            match &from.source {
                Some(s) => tcp_source |= source(report, &field, s, action),
                None => report.error(field, "is missing"),
            }
        }
        for (j, to) in rule.to.iter().enumerate() {
            let field = format!("{field}.to[{j}].operation");
            match &to.operation {
                Some(o) => tcp_operation |= operation(report, &field, o),
                None => report.error(field, "is missing"),
            }
        }
        for (j, when) in rule.when.iter().enumerate() {
            let field = format!("{field}.when[{j}]");
            if when.key.is_empty() {
                report.error(format!("{field}.key"), "is missing");
                continue;
            }
            let own = matches!(
                when.key.as_str(),
                "source.namespace"
                    | "source.serviceAccount"
                    | "source.trustDomain"
                    | "source.principal"
            );
            if action == Action::Custom && (own || when.key.starts_with("request.auth.")) {
                report.error(
                    format!("{field}.key"),
                    format!("{} is not supported with action CUSTOM", when.key),
                );
            }
            if when.values.is_empty() && when.not_values.is_empty() {
                report.error(
                    format!("{field}.values"),
                    "one of values and notValues is needed",
                );
            }
            for (name, values) in [("values", &when.values), ("notValues", &when.not_values)] {
                if !values.is_empty() {
                    report.check(format!("{field}.{name}"), attribute(&when.key, values));
                }
            }
        }
        let http_only = (!rule.from.is_empty() && rule.to.is_empty() && !tcp_source)
            || (!rule.to.is_empty() && !tcp_operation);
        if action == Action::Deny && http_only {
            let message = "names only what HTTP has: on TCP ports it denies everything; name ports to limit it";
            report.warning(&field, message);
        }
    }
}

/// Whether it names something that TCP has too.
fn source(report: &mut Report, field: &str, s: &Source, action: Action) -> bool {
    let identities = [
        ("principals", &s.principals),
        ("notPrincipals", &s.not_principals),
        ("requestPrincipals", &s.request_principals),
        ("notRequestPrincipals", &s.not_request_principals),
        ("namespaces", &s.namespaces),
        ("notNamespaces", &s.not_namespaces),
        ("serviceAccounts", &s.service_accounts),
        ("notServiceAccounts", &s.not_service_accounts),
        ("trustDomains", &s.trust_domains),
        ("notTrustDomains", &s.not_trust_domains),
    ];
    let addresses = [
        ("ipBlocks", &s.ip_blocks),
        ("notIpBlocks", &s.not_ip_blocks),
        ("remoteIpBlocks", &s.remote_ip_blocks),
        ("notRemoteIpBlocks", &s.not_remote_ip_blocks),
    ];
    if identities
        .iter()
        .chain(&addresses)
        .all(|(_, list)| list.is_empty())
    {
        report.error(field, "is empty: name who calls, or leave from out");
    }
    for (name, list) in identities {
        empty_values(report, &format!("{field}.{name}"), list);
        if action == Action::Custom && !list.is_empty() {
            report.error(
                format!("{field}.{name}"),
                "is not supported with action CUSTOM",
            );
        }
    }
    for (name, list) in addresses {
        for (i, text) in list.iter().enumerate() {
            report.check(format!("{field}.{name}[{i}]"), names::subnet(text));
        }
    }
    let accounts = !s.service_accounts.is_empty() || !s.not_service_accounts.is_empty();
    let others = [
        &s.principals,
        &s.not_principals,
        &s.namespaces,
        &s.not_namespaces,
    ];
    if accounts && others.iter().any(|l| !l.is_empty()) {
        report.error(
            format!("{field}.serviceAccounts"),
            "cannot stand beside principals or namespaces",
        );
    }
    for (name, list) in [
        ("serviceAccounts", &s.service_accounts),
        ("notServiceAccounts", &s.not_service_accounts),
    ] {
        for (i, text) in list
            .iter()
            .enumerate()
            .filter(|(_, t)| t.matches('/').count() > 1)
        {
            report.error(
                format!("{field}.{name}[{i}]"),
                format!("{text:?} must be NAME or NAMESPACE/NAME"),
            );
        }
    }
    let http_only = [
        &s.request_principals,
        &s.not_request_principals,
        &s.trust_domains,
        &s.not_trust_domains,
    ];
    let total: usize = identities
        .iter()
        .chain(&addresses)
        .map(|(_, l)| l.len())
        .sum();
    total > http_only.iter().map(|l| l.len()).sum()
}

fn operation(report: &mut Report, field: &str, o: &Operation) -> bool {
    let all = [
        ("hosts", &o.hosts),
        ("notHosts", &o.not_hosts),
        ("ports", &o.ports),
        ("notPorts", &o.not_ports),
        ("methods", &o.methods),
        ("notMethods", &o.not_methods),
        ("paths", &o.paths),
        ("notPaths", &o.not_paths),
    ];
    if all.iter().all(|(_, list)| list.is_empty()) {
        report.error(field, "is empty: name what is called, or leave to out");
    }
    for (name, list) in all {
        empty_values(report, &format!("{field}.{name}"), list);
    }
    for (name, list) in [("ports", &o.ports), ("notPorts", &o.not_ports)] {
        for (i, port) in list.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            if !port.parse::<u32>().is_ok_and(|p| (1..=65535).contains(&p)) {
                report.error(
                    format!("{field}.{name}[{i}]"),
                    format!("{port:?} is no port: give 1 to 65535"),
                );
            }
        }
    }
    for (name, list) in [("paths", &o.paths), ("notPaths", &o.not_paths)] {
        for (i, path) in list.iter().enumerate() {
            report.check(format!("{field}.{name}[{i}]"), path_template(path));
        }
    }
    !o.ports.is_empty() || !o.not_ports.is_empty()
}

/// `{*}` stands for one segment of a path, `{**}` for the rest or a middle of any length; without them it is a plain
/// path with `*` at either end.
fn path_template(path: &str) -> Result<(), String> {
    if !path.contains('{') && !path.contains('}') {
        return Ok(());
    }
    let wrong = |why: &str| Err(format!("{path:?}: {why}"));
    let mut deep = false;
    for segment in path.trim_start_matches('/').split('/') {
        let operator = matches!(segment, "{*}" | "{**}");
        if deep && operator {
            return wrong("{**} must be the last operator");
        }
        deep |= segment == "{**}";
        if !operator && segment.contains(['{', '}']) {
            return wrong("{*} and {**} must stand for a whole segment");
        }
        if !operator && segment.contains('*') {
            return wrong("\"*\" cannot be mixed with {*} and {**}");
        }
    }
    Ok(())
}

fn attribute(key: &str, values: &[String]) -> Result<(), String> {
    let bracketed = |prefix: &str| {
        key.strip_prefix(prefix)
            .map(|r| r.starts_with('[') && r.ends_with(']') && r.len() > 2)
    };
    if let Some(ok) = bracketed("request.headers").or_else(|| bracketed("request.auth.claims")) {
        return if ok {
            Ok(())
        } else {
            Err(format!(
                "{key} needs a name in brackets, as in {}[x-token]",
                key.trim_end_matches("[]")
            ))
        };
    }
    match key {
        "source.ip" | "remote.ip" | "destination.ip" => {
            values.iter().try_for_each(|v| names::subnet(v))
        }
        "destination.port" => values.iter().try_for_each(|v| {
            let ok = v.parse::<u32>().is_ok_and(|p| (1..=65535).contains(&p));
            if ok {
                Ok(())
            } else {
                Err(format!("{v:?} is no port: give 1 to 65535"))
            }
        }),
        "source.namespace"
        | "source.serviceAccount"
        | "source.trustDomain"
        | "source.principal"
        | "request.auth.principal"
        | "request.auth.audiences"
        | "request.auth.presenter"
        | "connection.sni" => Ok(()),
        _ if key.starts_with("experimental.envoy.filters.") => Ok(()),
        _ => Err(format!("unknown key {key:?}")),
    }
}

fn empty_values(report: &mut Report, field: &str, list: &[String]) {
    for (i, _) in list.iter().enumerate().filter(|(_, v)| v.is_empty()) {
        report.error(format!("{field}[{i}]"), "is empty; leave it out");
    }
}
