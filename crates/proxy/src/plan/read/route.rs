//! Route configurations, virtual hosts and routes.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use proto::envoy::config::{core::v3 as core, route::v3 as pb};

use super::{
    common::{
        data_source, duration, enumeration, header_matcher, header_name, metadata,
        metadata_matcher, or_disabled, positive, query_matcher, regex, regex_rewrite,
        runtime_fraction,
    },
    header::operations,
    http_filter::per_filter,
    retry::retry_policy,
};
use crate::plan::{
    error::{At, Step, unsupported},
    format::Template,
    http_filter::{PerFilterConfig, RouteFilterConfig},
    matcher::Fraction,
    route::{
        Action, ClusterSpecifier, ClusterWeight, Decorator, DirectResponse, HashPolicy, HashSource,
        HostRewrite, MaxStreamDuration, Mirror, PathMatch, Priority, Redirect, RedirectPath,
        RedirectScheme, RequireTls, Route, RouteAction, RouteConfiguration, RouteMatch,
        RouteUpgrade, TlsMatch, VirtualHost, WeightedClusters, WeightedTarget,
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
    } = m;
    unsupported!(at, vhds, cluster_specifier_plugins);
    let body_limit = max_direct_response_body_size_bytes.unwrap_or(4096) as usize;
    let virtual_hosts = at.each("virtual_hosts", virtual_hosts, |at, m| {
        virtual_host(at, m, body_limit)
    });
    let domains = domain_table(&at, &virtual_hosts);
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

fn domain_table(at: &At<'_>, virtual_hosts: &[VirtualHost]) -> DomainTable {
    let mut table = DomainTable::default();
    let at = at.field("virtual_hosts");
    let mut names: HashMap<&str, usize> = HashMap::new();
    for (index, host) in virtual_hosts.iter().enumerate() {
        if let Some(first) = names.insert(&host.name, index) {
            let at = at.index(index);
            at.field("name").error(format!(
                "`{}` is also the name of virtual_hosts[{first}]",
                host.name
            ));
        }
        for (number, domain) in host.domains.iter().enumerate() {
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
        matcher,
        require_tls,
        virtual_clusters,
        rate_limits,
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
    } = m;
    unsupported!(
        at,
        matcher,
        virtual_clusters,
        rate_limits,
        retry_policy_typed_config,
        hedge_policy
    );
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
    Ok(VirtualHost {
        name: at.text("name", name)?,
        domains,
        routes: at.each("routes", routes, |at, m| route(at, m, body_limit)),
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
        mirrors: at.each("request_mirror_policies", request_mirror_policies, mirror),
        request_buffer_limit: request_body_buffer_limit
            .or(per_request_buffer_limit_bytes.map(u64::from)),
        per_filter: with_cors(&at, per_filter(&at, typed_per_filter_config), cors)?,
        metadata: metadata(free),
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
    } = m;
    let mut legacy_cors = &None;
    let matches = at.required("match", r#match, route_match);
    let action = match action {
        Some(pb::route::Action::Route(m)) => {
            legacy_cors = &m.cors;
            route_action(at.field("route"), m).map(|a| Action::Route(Box::new(a)))
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

fn route_match(at: At<'_>, m: &pb::RouteMatch) -> Step<RouteMatch> {
    use pb::route_match::PathSpecifier as P;
    let pb::RouteMatch {
        case_sensitive,
        runtime_fraction: fraction,
        headers,
        query_parameters,
        grpc,
        tls_context,
        dynamic_metadata,
        filter_state,
        path_specifier,
    } = m;
    unsupported!(at, filter_state);
    let path = match path_specifier {
        Some(P::Prefix(text)) => PathMatch::Prefix(text.as_str().into()),
        Some(P::Path(text)) => PathMatch::Path(text.as_str().into()),
        Some(P::SafeRegex(m)) => PathMatch::Regex(regex(at.field("safe_regex"), m)?),
        Some(P::ConnectMatcher(_)) => PathMatch::Connect,
        Some(P::PathSeparatedPrefix(text)) => {
            let illegal = text.is_empty() || text.ends_with('/') || text.contains(['?', '#']);
            if illegal || !text.starts_with('/') {
                let at = at.field("path_separated_prefix");
                return Err(at.error(format!(
                    "`{text}` must begin with a slash, not end with one, and hold no query"
                )));
            }
            PathMatch::PathSeparatedPrefix(text.as_str().into())
        }
        Some(P::PathMatchPolicy(_)) => {
            return Err(at
                .field("path_match_policy")
                .not_implemented("is not implemented; write prefix, path or safe_regex"));
        }
        None => {
            return Err(at.error(
                "needs one of prefix, path, path_separated_prefix, safe_regex, connect_matcher",
            ));
        }
    };
    Ok(RouteMatch {
        path,
        case_sensitive: case_sensitive.unwrap_or(true),
        headers: at.each("headers", headers, header_matcher),
        query_parameters: at.each("query_parameters", query_parameters, query_matcher),
        grpc: grpc.is_some(),
        runtime_fraction: at.optional("runtime_fraction", fraction, runtime_fraction)?,
        tls: tls_context.as_ref().map(|m| TlsMatch {
            presented: m.presented,
            validated: m.validated,
        }),
        dynamic_metadata: at.each("dynamic_metadata", dynamic_metadata, metadata_matcher),
    })
}

fn route_action(at: At<'_>, m: &pb::RouteAction) -> Step<RouteAction> {
    use pb::route_action::{ClusterNotFoundResponseCode as Code, HostRewriteSpecifier as H};
    let pb::RouteAction {
        cluster_not_found_response_code,
        metadata_match,
        prefix_rewrite,
        regex_rewrite: rewrite,
        path_rewrite_policy,
        path_rewrite,
        append_x_forwarded_host,
        timeout,
        idle_timeout,
        flush_timeout,
        early_data_policy: _,
        retry_policy: retry,
        retry_policy_typed_config,
        request_mirror_policies,
        priority,
        rate_limits,
        include_vh_rate_limits: _,
        hash_policy: hash,
        cors: _,
        max_grpc_timeout,
        grpc_timeout_offset,
        upgrade_configs,
        internal_redirect_policy,
        internal_redirect_action,
        max_internal_redirects: _,
        hedge_policy,
        max_stream_duration,
        cluster_specifier,
        host_rewrite_specifier,
    } = m;
    unsupported!(
        at,
        metadata_match,
        path_rewrite_policy,
        flush_timeout,
        retry_policy_typed_config,
        rate_limits,
        internal_redirect_policy,
        internal_redirect_action,
        hedge_policy,
    );
    let rewrites = [
        !prefix_rewrite.is_empty(),
        rewrite.is_some(),
        !path_rewrite.is_empty(),
    ];
    if rewrites.into_iter().filter(|set| *set).count() > 1 {
        at.error("only one of prefix_rewrite, regex_rewrite, path_rewrite can be given");
    }
    let cluster = cluster_specifier_of(&at, cluster_specifier);
    let cluster_not_found_status = match enumeration(
        &at,
        "cluster_not_found_response_code",
        *cluster_not_found_response_code,
    )? {
        Code::ServiceUnavailable => 503,
        Code::NotFound => 404,
        Code::InternalServerError => 500,
    };
    let host_rewrite = match host_rewrite_specifier {
        None | Some(H::AutoHostRewrite(false)) => HostRewrite::None,
        Some(H::HostRewriteLiteral(text)) => HostRewrite::Literal(text.as_str().into()),
        Some(H::AutoHostRewrite(true)) => HostRewrite::Auto,
        Some(H::HostRewriteHeader(name)) => {
            HostRewrite::Header(header_name(&at, "host_rewrite_header", name)?)
        }
        Some(H::HostRewritePathRegex(m)) => {
            HostRewrite::PathRegex(regex_rewrite(at.field("host_rewrite_path_regex"), m)?)
        }
        Some(H::HostRewrite(_)) => {
            return Err(at
                .field("host_rewrite")
                .not_implemented("is not implemented; write host_rewrite_literal"));
        }
    };
    let path_rewrite = match path_rewrite.as_str() {
        "" => None,
        text => Some(Template::parse(text).map_err(|why| at.field("path_rewrite").error(why))?),
    };
    let idle_timeout = at.optional("idle_timeout", idle_timeout, duration)?;
    let max_grpc_timeout = at.optional("max_grpc_timeout", max_grpc_timeout, duration)?;
    Ok(RouteAction {
        cluster: cluster?,
        cluster_not_found_status,
        prefix_rewrite: option(prefix_rewrite),
        regex_rewrite: at.optional("regex_rewrite", rewrite, regex_rewrite)?,
        path_rewrite,
        host_rewrite,
        append_x_forwarded_host: *append_x_forwarded_host,
        timeout: or_disabled(&at, "timeout", timeout, Some(Duration::from_secs(15)))?,
        idle_timeout: idle_timeout.map(|d| Some(d).filter(|d| !d.is_zero())),
        retry_policy: at
            .optional("retry_policy", retry, retry_policy)?
            .map(Arc::new),
        mirrors: at.each("request_mirror_policies", request_mirror_policies, mirror),
        priority: match enumeration(&at, "priority", *priority)? {
            core::RoutingPriority::Default => Priority::Default,
            core::RoutingPriority::High => Priority::High,
        },
        hash_policy: at.each("hash_policy", hash, hash_policy),
        max_grpc_timeout: max_grpc_timeout.map(|d| Some(d).filter(|d| !d.is_zero())),
        grpc_timeout_offset: positive(&at, "grpc_timeout_offset", grpc_timeout_offset)?,
        max_stream_duration: at.optional(
            "max_stream_duration",
            max_stream_duration,
            stream_duration,
        )?,
        upgrades: at.each("upgrade_configs", upgrade_configs, upgrade),
    })
}

fn stream_duration(at: At<'_>, m: &pb::route_action::MaxStreamDuration) -> Step<MaxStreamDuration> {
    let none_at_zero = |d: Duration| Some(d).filter(|d| !d.is_zero());
    Ok(MaxStreamDuration {
        max_stream_duration: at
            .optional("max_stream_duration", &m.max_stream_duration, duration)?
            .map(none_at_zero),
        grpc_timeout_header_max: at
            .optional(
                "grpc_timeout_header_max",
                &m.grpc_timeout_header_max,
                duration,
            )?
            .map(none_at_zero),
        grpc_timeout_header_offset: positive(
            &at,
            "grpc_timeout_header_offset",
            &m.grpc_timeout_header_offset,
        )?,
    })
}

fn upgrade(at: At<'_>, m: &pb::route_action::UpgradeConfig) -> Step<RouteUpgrade> {
    let upgrade_type = at
        .text("upgrade_type", &m.upgrade_type)?
        .to_ascii_lowercase();
    if let Some(connect) = &m.connect_config {
        let at = at.field("connect_config");
        let pb::route_action::upgrade_config::ConnectConfig {
            proxy_protocol_config,
            allow_post,
        } = connect;
        unsupported!(at, proxy_protocol_config, allow_post);
        if upgrade_type != "connect" {
            at.error("is only for upgrade_type CONNECT");
        }
    }
    Ok(RouteUpgrade {
        upgrade_type: upgrade_type.into(),
        enabled: m.enabled.unwrap_or(true),
        connect_terminate: m.connect_config.is_some(),
    })
}

fn cluster_specifier_of(
    at: &At<'_>,
    m: &Option<pb::route_action::ClusterSpecifier>,
) -> Step<ClusterSpecifier> {
    use pb::route_action::ClusterSpecifier as C;
    match m {
        Some(C::Cluster(name)) => Ok(ClusterSpecifier::Cluster(at.text("cluster", name)?)),
        Some(C::ClusterHeader(name)) => Ok(ClusterSpecifier::Header(header_name(
            at,
            "cluster_header",
            name,
        )?)),
        Some(C::WeightedClusters(m)) => {
            weighted_clusters(at.field("weighted_clusters"), m).map(ClusterSpecifier::Weighted)
        }
        Some(C::ClusterSpecifierPlugin(_) | C::InlineClusterSpecifierPlugin(_)) => Err(at
            .field("cluster_specifier_plugin")
            .not_implemented("is not implemented; write cluster")),
        None => Err(at.error("needs one of cluster, cluster_header, weighted_clusters")),
    }
}

fn weighted_clusters(at: At<'_>, m: &pb::WeightedCluster) -> Step<WeightedClusters> {
    use pb::weighted_cluster::RandomValueSpecifier as R;
    let pb::WeightedCluster {
        clusters,
        // The sum of the weights counts since Envoy 1.25.
        total_weight: _,
        runtime_key_prefix: _,
        random_value_specifier,
    } = m;
    let header_name = match random_value_specifier {
        None | Some(R::UseHashPolicy(false)) => None,
        Some(R::HeaderName(name)) => Some(header_name(&at, "header_name", name)?),
        Some(R::UseHashPolicy(true)) => {
            return Err(at
                .field("use_hash_policy")
                .not_implemented("is not implemented; remove it"));
        }
    };
    let clusters = at.each("clusters", clusters, cluster_weight);
    let total = clusters.iter().map(|c| u64::from(c.weight)).sum();
    if total == 0 {
        return Err(at
            .field("clusters")
            .error("needs weights whose sum is at least 1"));
    }
    if total > u64::from(u32::MAX) {
        return Err(at
            .field("clusters")
            .error("has weights whose sum is more than 4294967295"));
    }
    Ok(WeightedClusters {
        clusters,
        total,
        header_name,
    })
}

fn cluster_weight(at: At<'_>, m: &pb::weighted_cluster::ClusterWeight) -> Step<ClusterWeight> {
    let pb::weighted_cluster::ClusterWeight {
        name,
        cluster_header,
        weight,
        metadata_match,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        typed_per_filter_config,
        host_rewrite_specifier,
    } = m;
    use pb::weighted_cluster::cluster_weight::HostRewriteSpecifier as H;
    unsupported!(at, metadata_match);
    let target = match (name.as_str(), cluster_header.as_str()) {
        ("", "") => return Err(at.error("needs one of name, cluster_header")),
        ("", header) => WeightedTarget::Header(header_name(&at, "cluster_header", header)?),
        (name, "") => WeightedTarget::Cluster(name.into()),
        _ => return Err(at.error("only one of name, cluster_header can be given")),
    };
    Ok(ClusterWeight {
        name: target,
        weight: weight.unwrap_or(0),
        headers: operations(
            &at,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
        ),
        host_rewrite: host_rewrite_specifier
            .as_ref()
            .map(|H::HostRewriteLiteral(text)| text.as_str().into()),
        per_filter: per_filter(&at, typed_per_filter_config),
    })
}

fn mirror(at: At<'_>, m: &pb::route_action::RequestMirrorPolicy) -> Step<Mirror> {
    let pb::route_action::RequestMirrorPolicy {
        cluster,
        cluster_header,
        runtime_fraction: fraction,
        trace_sampled,
        disable_shadow_host_suffix_append,
        request_headers_mutations,
        host_rewrite_literal,
    } = m;
    unsupported!(at, request_headers_mutations);
    let cluster = match (cluster.as_str(), cluster_header.as_str()) {
        ("", "") => return Err(at.error("needs one of cluster, cluster_header")),
        ("", header) => ClusterSpecifier::Header(header_name(&at, "cluster_header", header)?),
        (name, _) => ClusterSpecifier::Cluster(name.into()),
    };
    Ok(Mirror {
        cluster,
        fraction: at
            .optional("runtime_fraction", fraction, runtime_fraction)?
            .unwrap_or(Fraction::ALL),
        trace_sampled: *trace_sampled,
        disable_host_suffix: *disable_shadow_host_suffix_append,
        host_rewrite: option(host_rewrite_literal),
    })
}

fn hash_policy(at: At<'_>, m: &pb::route_action::HashPolicy) -> Step<HashPolicy> {
    use pb::route_action::hash_policy::PolicySpecifier as P;
    let source = match &m.policy_specifier {
        Some(P::Header(m)) => {
            let at = at.field("header");
            HashSource::Header {
                name: header_name(&at, "header_name", &m.header_name)?,
                rewrite: at.optional("regex_rewrite", &m.regex_rewrite, regex_rewrite)?,
            }
        }
        Some(P::Cookie(m)) => {
            let at = at.field("cookie");
            let pair = |a: &pb::route_action::hash_policy::CookieAttribute| {
                (Arc::from(a.name.as_str()), Arc::from(a.value.as_str()))
            };
            HashSource::Cookie {
                name: at.text("name", &m.name)?,
                ttl: at.optional("ttl", &m.ttl, duration)?,
                path: m.path.as_str().into(),
                attributes: m.attributes.iter().map(pair).collect(),
            }
        }
        Some(P::ConnectionProperties(m)) if m.source_ip => HashSource::SourceIp,
        Some(P::ConnectionProperties(_)) => {
            return Err(at
                .field("connection_properties")
                .field("source_ip")
                .error("must be true"));
        }
        Some(P::QueryParameter(m)) => {
            HashSource::QueryParameter(at.field("query_parameter").text("name", &m.name)?)
        }
        Some(P::FilterState(_)) => {
            return Err(at
                .field("filter_state")
                .not_implemented("is not implemented; remove it"));
        }
        None => {
            return Err(
                at.error("needs one of header, cookie, connection_properties, query_parameter")
            );
        }
    };
    Ok(HashPolicy {
        source,
        terminal: m.terminal,
    })
}

fn redirect(at: At<'_>, m: &pb::RedirectAction) -> Step<Redirect> {
    use pb::redirect_action::{
        PathRewriteSpecifier as P, RedirectResponseCode as C, SchemeRewriteSpecifier as S,
    };
    let scheme = match &m.scheme_rewrite_specifier {
        None | Some(S::HttpsRedirect(false)) => RedirectScheme::Keep,
        Some(S::HttpsRedirect(true)) => RedirectScheme::Https,
        Some(S::SchemeRedirect(scheme)) => RedirectScheme::Scheme(scheme.as_str().into()),
    };
    let path = match &m.path_rewrite_specifier {
        None => RedirectPath::Keep,
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
        body_format,
    } = m;
    unsupported!(at, body_format);
    let status = u16::try_from(*status)
        .ok()
        .filter(|s| (200..600).contains(s))
        .ok_or_else(|| at.field("status").error("must be from 200 to 599"))?;
    let body = match at.optional("body", body, data_source)? {
        None => Bytes::new(),
        Some(DataSource::Inline(bytes)) => bytes,
        Some(DataSource::File(_) | DataSource::Environment(_)) => {
            return Err(at
                .field("body")
                .error("must be given in place: inline_string or inline_bytes"));
        }
    };
    if body.len() > limit {
        let message = format!(
            "has {} bytes, more than max_direct_response_body_size_bytes ({limit})",
            body.len()
        );
        return Err(at.field("body").error(message));
    }
    Ok(DirectResponse { status, body })
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
