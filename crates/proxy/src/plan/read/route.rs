//! Route configurations, virtual hosts and routes; what a route does to a forwarded request is in `route_action`.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;
use proto::{
    envoy::config::{core::v3 as core, route::v3 as pb},
    xds::r#type::matcher::v3 as xds,
};

use super::{
    access_log::plain_body_format,
    common::{data_source, enumeration, header_matcher, header_name, metadata, regex_rewrite},
    header::operations,
    http_filter::per_filter,
    matcher_tree::matcher,
    rate_limit::rate_limits,
    retry::{hedge, retry_policy},
    route_action::{mirror, route_action},
    route_match::route_match,
};
use crate::plan::{
    error::{At, Step, collect_lenient, unsupported},
    format::Template,
    http_filter::{PerFilterConfig, RouteFilterConfig},
    lazy::LazyVirtualHost,
    matcher_tree::Matcher,
    route::{
        Action, Decorator, DirectResponse, Redirect, RedirectPath, RedirectScheme, RequireTls,
        Route, RouteConfiguration, VirtualCluster, VirtualHost,
    },
    route_match::DomainTable,
    tls::DataSource,
};

/// `RouteConfiguration`.
pub(super) fn route_configuration(
    at: At<'_>,
    m: &pb::RouteConfiguration,
) -> Step<RouteConfiguration> {
    let pb::RouteConfiguration {
        name,
        virtual_hosts,
        vhds,
        internal_only_headers,
        response_headers_to_add,
        response_headers_to_remove,
        request_headers_to_add,
        request_headers_to_remove,
        most_specific_header_mutations_wins,
        validate_clusters,
        max_direct_response_body_size_bytes,
        cluster_specifier_plugins,
        request_mirror_policies,
        ignore_port_in_host_matching,
        vhost_header,
        ignore_path_parameters_in_path_matching,
        typed_per_filter_config,
        metadata: free,
        route_specifiers,
    } = m;
    unsupported!(at, vhds, cluster_specifier_plugins);
    no_specifiers(&at, route_specifiers);
    let body_limit = max_direct_response_body_size_bytes.unwrap_or(4096) as usize;
    let many = virtual_hosts.len() > PLANNED_AT_ONCE;
    let mut heads = Vec::with_capacity(virtual_hosts.len());
    let virtual_hosts = at.each("virtual_hosts", virtual_hosts, |at, m| {
        let plan = virtual_host(at, m, body_limit)?;
        heads.push((plan.name.clone(), plan.domains.clone()));
        // A body may come from a file, which is read once.
        let reads = |r: &Route| matches!(r.action, Action::DirectResponse(_));
        Ok(if many && !plan.routes.iter().any(reads) {
            LazyVirtualHost::later(m.encode_to_vec().into(), body_limit)
        } else {
            plan.into()
        })
    });
    let domains = domain_table(&at, &heads);
    Ok(RouteConfiguration {
        name: name.as_str().into(),
        domains,
        virtual_hosts,
        headers: operations(
            &at,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
        ),
        most_specific_header_mutations_wins: *most_specific_header_mutations_wins,
        internal_only_headers: internal_only_headers
            .iter()
            .map(|n| n.to_ascii_lowercase().into())
            .collect(),
        ignore_port_in_host_matching: *ignore_port_in_host_matching,
        vhost_header: header_option(&at, "vhost_header", vhost_header)?,
        ignore_path_parameters: *ignore_path_parameters_in_path_matching,
        validate_clusters: validate_clusters.unwrap_or(false),
        mirrors: at.each("request_mirror_policies", request_mirror_policies, mirror),
        per_filter: per_filter(&at, typed_per_filter_config),
        metadata: metadata(free),
    })
}

/// Up to so many virtual hosts keep their plans. Of more, most will never see a request: each is planned again at its
/// first one.
const PLANNED_AT_ONCE: usize = 100;

/// The plan of a virtual host that was planned without an error before, strictly or leniently.
pub(in crate::plan) fn planned_again(encoded: &[u8], body_limit: usize) -> VirtualHost {
    let planned = pb::VirtualHost::decode(encoded)
        .ok()
        .and_then(|m| collect_lenient(|at| virtual_host(at, &m, body_limit)).ok());
    planned
        .map(|(plan, _)| plan)
        .expect("a plan depends on its message alone, and there was one")
}

fn domain_table(at: &At<'_>, virtual_hosts: &[(Arc<str>, Vec<Arc<str>>)]) -> DomainTable {
    let mut table = DomainTable::default();
    let at = at.field("virtual_hosts");
    let mut names: HashMap<&str, usize> = HashMap::new();
    for (index, (name, domains)) in virtual_hosts.iter().enumerate() {
        if let Some(first) = names.insert(name, index) {
            let at = at.index(index);
            at.field("name").error(format!(
                "`{name}` is also the name of virtual_hosts[{first}]"
            ));
        }
        for (number, domain) in domains.iter().enumerate() {
            if !table.insert(domain, index as u32) {
                let at = at.index(index);
                let at = at.field("domains");
                at.index(number).error(format!(
                    "`{domain}` is a domain of another virtual host already"
                ));
            }
        }
    }
    table
}

fn virtual_host(at: At<'_>, m: &pb::VirtualHost, body_limit: usize) -> Step<VirtualHost> {
    let pb::VirtualHost {
        name,
        domains,
        routes,
        matcher: tree,
        require_tls,
        virtual_clusters,
        rate_limits: limits,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        cors,
        typed_per_filter_config,
        include_request_attempt_count,
        include_attempt_count_in_response,
        retry_policy: retry,
        retry_policy_typed_config,
        hedge_policy,
        include_is_timeout_retry_header,
        per_request_buffer_limit_bytes,
        request_body_buffer_limit,
        request_mirror_policies,
        metadata: free,
        route_specifiers,
    } = m;
    unsupported!(at, retry_policy_typed_config);
    no_specifiers(&at, route_specifiers);
    let require_tls = match enumeration(&at, "require_tls", *require_tls)? {
        pb::virtual_host::TlsRequirementType::None => RequireTls::None,
        pb::virtual_host::TlsRequirementType::ExternalOnly => RequireTls::ExternalOnly,
        pb::virtual_host::TlsRequirementType::All => RequireTls::All,
    };
    if domains.is_empty() {
        at.field("domains").error("needs at least one domain");
    }
    let domains = at.each("domains", domains, |at, domain| match domain.as_str() {
        "" => Err(at.error("must not be empty")),
        domain => Ok(Arc::from(domain)),
    });
    if tree.is_some() && !routes.is_empty() {
        at.error("only one of routes, matcher can be given");
    }
    let mut routes = at.each("routes", routes, |at, m| route(at, m, body_limit));
    let matcher = at.optional("matcher", tree, |at, m| {
        route_tree(at, m, body_limit, &mut routes)
    })?;
    Ok(VirtualHost {
        name: at.text("name", name)?,
        domains,
        routes,
        matcher,
        virtual_clusters: at.each("virtual_clusters", virtual_clusters, |at, m| {
            if m.headers.is_empty() {
                at.field("headers").error("needs at least one condition");
            }
            Ok(VirtualCluster {
                name: at.text("name", &m.name)?,
                headers: at.each("headers", &m.headers, header_matcher),
            })
        }),
        rate_limits: rate_limits(&at, limits),
        require_tls,
        headers: operations(
            &at,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
        ),
        include_request_attempt_count: *include_request_attempt_count,
        include_attempt_count_in_response: *include_attempt_count_in_response,
        include_is_timeout_retry_header: *include_is_timeout_retry_header,
        retry_policy: at
            .optional("retry_policy", retry, retry_policy)?
            .map(Arc::new),
        hedge_on_per_try_timeout: at.optional("hedge_policy", hedge_policy, hedge)?,
        mirrors: at.each("request_mirror_policies", request_mirror_policies, mirror),
        request_buffer_limit: request_body_buffer_limit
            .or(per_request_buffer_limit_bytes.map(u64::from)),
        per_filter: with_cors(&at, per_filter(&at, typed_per_filter_config), cors)?,
        metadata: metadata(free),
    })
}

/// A tree whose actions are routes; they are added to the list.
fn route_tree(
    at: At<'_>,
    m: &xds::Matcher,
    body_limit: usize,
    routes: &mut Vec<Route>,
) -> Step<Matcher<(u32, u32)>> {
    matcher(at, m, &mut |at, found| {
        let from = routes.len() as u32;
        match found.name.as_str() {
            "envoy.config.route.v3.Route" => {
                routes.push(route(at, &found.decode(&at)?, body_limit)?);
            }
            "envoy.config.route.v3.RouteList" => {
                let list: pb::RouteList = found.decode(&at)?;
                routes.extend(at.each("routes", &list.routes, |at, m| route(at, m, body_limit)));
            }
            _ => return Err(found.unknown(&at, "route action")),
        }
        Ok((from, routes.len() as u32))
    })
}

fn route(at: At<'_>, m: &pb::Route, body_limit: usize) -> Step<Route> {
    let pb::Route {
        name,
        r#match,
        metadata: free,
        decorator,
        typed_per_filter_config,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        tracing: _,
        per_request_buffer_limit_bytes,
        stat_prefix,
        request_body_buffer_limit,
        action,
        route_specifiers,
    } = m;
    no_specifiers(&at, route_specifiers);
    let mut legacy_cors = &None;
    let matches = at.required("match", r#match, route_match);
    let action = match action {
        Some(pb::route::Action::Route(m)) => {
            legacy_cors = &m.cors;
            let matches = matches.as_ref().ok();
            route_action(at.field("route"), m, matches).map(|a| Action::Route(Box::new(a)))
        }
        Some(pb::route::Action::Redirect(m)) => {
            redirect(at.field("redirect"), m).map(Action::Redirect)
        }
        Some(pb::route::Action::DirectResponse(m)) => {
            direct_response(at.field("direct_response"), m, body_limit).map(Action::DirectResponse)
        }
        Some(pb::route::Action::NonForwardingAction(_)) => Ok(Action::NonForwarding),
        Some(pb::route::Action::FilterAction(_)) => Err(at
            .field("filter_action")
            .not_implemented("is not implemented; remove it")),
        None => {
            Err(at.error("needs one of route, redirect, direct_response, non_forwarding_action"))
        }
    };
    let decorator = at.optional("decorator", decorator, |at, m| {
        let operation = at.text("operation", &m.operation)?;
        Ok(Decorator {
            operation,
            propagate: m.propagate.unwrap_or(true),
        })
    });
    let headers = operations(
        &at,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
    );
    let per_filter = with_cors(&at, per_filter(&at, typed_per_filter_config), legacy_cors);
    Ok(Route {
        name: name.as_str().into(),
        matches: matches?,
        action: action?,
        headers,
        decorator: decorator?,
        stat_prefix: option(stat_prefix),
        request_buffer_limit: request_body_buffer_limit
            .or(per_request_buffer_limit_bytes.map(u64::from)),
        per_filter: per_filter?,
        metadata: metadata(free),
    })
}

fn redirect(at: At<'_>, m: &pb::RedirectAction) -> Step<Redirect> {
    use pb::redirect_action::{
        PathRewriteSpecifier as P, RedirectResponseCode as C, SchemeRewriteSpecifier as S,
    };
    let scheme = match &m.scheme_rewrite_specifier {
        None | Some(S::HttpsRedirect(false)) => RedirectScheme::Keep,
        Some(S::HttpsRedirect(true)) => RedirectScheme::Https,
        Some(S::SchemeRedirect(scheme)) if scheme.is_empty() => RedirectScheme::Keep,
        Some(S::SchemeRedirect(scheme)) => RedirectScheme::Scheme(scheme.as_str().into()),
    };
    // An empty text is none, as istiod writes it for a redirect to another host alone.
    let path = match &m.path_rewrite_specifier {
        None => RedirectPath::Keep,
        Some(P::PathRedirect(text) | P::PrefixRewrite(text)) if text.is_empty() => {
            RedirectPath::Keep
        }
        Some(P::PathRewrite(text)) if text.is_empty() => RedirectPath::Keep,
        Some(P::PathRewrite(text)) => RedirectPath::Format(
            Template::parse(text).map_err(|why| at.field("path_rewrite").error(why))?,
        ),
        Some(P::PathRedirect(path)) => RedirectPath::Path(path.as_str().into()),
        Some(P::PrefixRewrite(prefix)) => RedirectPath::Prefix(prefix.as_str().into()),
        Some(P::RegexRewrite(m)) => {
            RedirectPath::Regex(regex_rewrite(at.field("regex_rewrite"), m)?)
        }
    };
    let status = match enumeration(&at, "response_code", m.response_code)? {
        C::MovedPermanently => 301,
        C::Found => 302,
        C::SeeOther => 303,
        C::TemporaryRedirect => 307,
        C::PermanentRedirect => 308,
    };
    let port = match m.port_redirect {
        0 => None,
        port => Some(
            u16::try_from(port)
                .map_err(|_| at.field("port_redirect").error("must be at most 65535"))?,
        ),
    };
    Ok(Redirect {
        host: option(&m.host_redirect),
        port,
        scheme,
        path,
        status,
        strip_query: m.strip_query,
    })
}

fn direct_response(at: At<'_>, m: &pb::DirectResponseAction, limit: usize) -> Step<DirectResponse> {
    let pb::DirectResponseAction {
        status,
        body,
        body_format: format,
    } = m;
    let status = u16::try_from(*status)
        .ok()
        .filter(|s| (200..600).contains(s))
        .ok_or_else(|| at.field("status").error("must be from 200 to 599"))?;
    let body = at
        .optional("body", body, |at, m| body_source(at, m, limit))?
        .unwrap_or_default();
    Ok(DirectResponse {
        status,
        body,
        body_format: at
            .optional("body_format", format, plain_body_format)?
            .map(Arc::new),
    })
}

/// A body of a reply; files are read once, when the configuration arrives.
pub(super) fn body_source(at: At<'_>, m: &core::DataSource, limit: usize) -> Step<Bytes> {
    let body = match data_source(at, m)? {
        DataSource::Inline(bytes) => bytes,
        DataSource::File(path) => file(&path, limit).map_err(|e| {
            at.field("filename")
                .error(format!("{} cannot be read: {e}", path.display()))
        })?,
        DataSource::Environment(name) => match std::env::var(&*name) {
            Ok(value) => value.into(),
            Err(_) => {
                return Err(at
                    .field("environment_variable")
                    .error(format!("`{name}` is not set")));
            }
        },
    };
    if body.len() > limit {
        return Err(at.error(format!(
            "has more bytes than max_direct_response_body_size_bytes ({limit})"
        )));
    }
    Ok(body)
}

/// A regular file, up to one byte more than the limit.
fn file(path: &Path, limit: usize) -> io::Result<Bytes> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut body = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut body)?;
    Ok(body.into())
}

/// A CORS policy of the deprecated field counts where the filter's own is not given.
fn with_cors(
    at: &At<'_>,
    per_filter: PerFilterConfig,
    m: &Option<pb::CorsPolicy>,
) -> Step<PerFilterConfig> {
    let Some(m) = m else { return Ok(per_filter) };
    let policy = super::http_filter::legacy_cors(at.field("cors"), m)?;
    Ok(per_filter.or(
        "envoy.filters.http.cors",
        RouteFilterConfig::Cors(Arc::new(policy)),
    ))
}

fn header_option(at: &At<'_>, field: &str, name: &str) -> Step<Option<Arc<str>>> {
    if name.is_empty() {
        Ok(None)
    } else {
        header_name(at, field, name).map(Some)
    }
}

/// A text where empty means none.
pub(super) fn option(text: &str) -> Option<Arc<str>> {
    (!text.is_empty()).then(|| text.into())
}

/// Route specifiers change the route that was found by code that is loaded into Envoy; there are no others.
fn no_specifiers(at: &At<'_>, specifiers: &[core::TypedExtensionConfig]) {
    at.each("route_specifiers", specifiers, |at, m| {
        Err::<(), _>(at.not_implemented(format!(
            "there is no route specifier here: code cannot be loaded; remove `{}`",
            m.name
        )))
    });
}
