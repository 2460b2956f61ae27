//! What a route does to a request that it forwards.

use std::{sync::Arc, time::Duration};

use proto::envoy::{
    config::{core::v3 as core, route::v3 as pb},
    extensions::{
        internal_redirect::allow_listed_routes::v3::AllowListedRoutesConfig,
        path::rewrite::uri_template::v3::UriTemplateRewriteConfig,
    },
};
use serde_json::Value;

use super::{
    common::{
        duration, enumeration, header_name, json, or_disabled, positive, regex_rewrite,
        runtime_fraction, typed_config,
    },
    header::{header_mutations, operations},
    http_filter::per_filter,
    rate_limit::rate_limits,
    retry::{hedge, retry_policy},
    route::option,
    socket::bare_header,
};
use crate::plan::{
    error::{At, Reported, Step, unsupported},
    format::Template,
    matcher::Fraction,
    route::{
        ClusterSpecifier, ClusterWeight, HashPolicy, HashSource, HostRewrite,
        InternalRedirectPolicy, MaxStreamDuration, MetadataMatch, Mirror, PathMatch, Priority,
        RouteAction, RouteMatch, RouteUpgrade, WeightedClusters, WeightedTarget,
    },
    uri_template::UriTemplateRewrite,
};

/// `RouteAction` of a route with this condition.
pub(super) fn route_action(
    at: At<'_>,
    m: &pb::RouteAction,
    matches: Option<&RouteMatch>,
) -> Step<RouteAction> {
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
        rate_limits: limits,
        include_vh_rate_limits,
        hash_policy: hash,
        cors: _,
        max_grpc_timeout,
        grpc_timeout_offset,
        upgrade_configs,
        internal_redirect_policy,
        internal_redirect_action,
        max_internal_redirects,
        hedge_policy,
        max_stream_duration,
        cluster_specifier,
        host_rewrite_specifier,
    } = m;
    unsupported!(at, retry_policy_typed_config);
    let rewrites = [
        !prefix_rewrite.is_empty(),
        rewrite.is_some(),
        !path_rewrite.is_empty(),
        path_rewrite_policy.is_some(),
    ];
    if rewrites.into_iter().filter(|set| *set).count() > 1 {
        at.error(
            "only one of prefix_rewrite, regex_rewrite, path_rewrite, path_rewrite_policy can be given",
        );
    }
    if !prefix_rewrite.is_empty()
        && matches!(matches.map(|m| &m.path), Some(PathMatch::Template(_)))
    {
        at.field("prefix_rewrite")
            .error("cannot be given where a template matches; use path_rewrite_policy");
    }
    let template_rewrite = at.optional("path_rewrite_policy", path_rewrite_policy, |at, m| {
        template_rewrite(at, m, matches)
    })?;
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
        Some(H::HostRewrite(text)) => HostRewrite::Format(
            Template::parse(text).map_err(|why| at.field("host_rewrite").error(why))?,
        ),
    };
    let path_rewrite = match path_rewrite.as_str() {
        "" => None,
        text => Some(Template::parse(text).map_err(|why| at.field("path_rewrite").error(why))?),
    };
    let internal_redirect = at.optional(
        "internal_redirect_policy",
        internal_redirect_policy,
        internal_redirect_policy_of,
    )?;
    use pb::route_action::InternalRedirectAction as Old;
    let old: Old = enumeration(&at, "internal_redirect_action", *internal_redirect_action)?;
    let internal_redirect = internal_redirect
        // The deprecated switch means the default policy.
        .or(
            (old == Old::HandleInternalRedirect).then(|| InternalRedirectPolicy {
                max_internal_redirects: max_internal_redirects.unwrap_or(1),
                codes: vec![302],
                previous_routes: false,
                allowed_routes: None,
                safe_cross_scheme: false,
                allow_cross_scheme: false,
                response_headers_to_copy: Vec::new(),
            }),
        )
        .map(Arc::new);
    let idle_timeout = at.optional("idle_timeout", idle_timeout, duration)?;
    let max_grpc_timeout = at.optional("max_grpc_timeout", max_grpc_timeout, duration)?;
    let wanted = metadata_match_of(metadata_match);
    let mut cluster = cluster?;
    if let ClusterSpecifier::Weighted(weighted) = &mut cluster {
        for entry in &mut weighted.clusters {
            entry.metadata_match = merged(&wanted, &entry.metadata_match);
        }
    }
    Ok(RouteAction {
        cluster,
        cluster_not_found_status,
        prefix_rewrite: option(prefix_rewrite),
        regex_rewrite: at.optional("regex_rewrite", rewrite, regex_rewrite)?,
        path_rewrite,
        template_rewrite,
        host_rewrite,
        append_x_forwarded_host: *append_x_forwarded_host,
        timeout: or_disabled(&at, "timeout", timeout, Some(Duration::from_secs(15)))?,
        flush_timeout: at
            .optional("flush_timeout", flush_timeout, duration)?
            .map(|d| Some(d).filter(|d| !d.is_zero())),
        idle_timeout: idle_timeout.map(|d| Some(d).filter(|d| !d.is_zero())),
        retry_policy: at
            .optional("retry_policy", retry, retry_policy)?
            .map(Arc::new),
        hedge_on_per_try_timeout: at.optional("hedge_policy", hedge_policy, hedge)?,
        mirrors: at.each("request_mirror_policies", request_mirror_policies, mirror),
        priority: match enumeration(&at, "priority", *priority)? {
            core::RoutingPriority::Default => Priority::Default,
            core::RoutingPriority::High => Priority::High,
        },
        hash_policy: at
            .each("hash_policy", hash, hash_policy)
            .into_iter()
            .flatten()
            .collect(),
        max_grpc_timeout: max_grpc_timeout.map(|d| Some(d).filter(|d| !d.is_zero())),
        grpc_timeout_offset: positive(&at, "grpc_timeout_offset", grpc_timeout_offset)?,
        max_stream_duration: at.optional(
            "max_stream_duration",
            max_stream_duration,
            stream_duration,
        )?,
        upgrades: at.each("upgrade_configs", upgrade_configs, upgrade),
        metadata_match: wanted,
        rate_limits: rate_limits(&at, limits),
        include_vh_rate_limits: include_vh_rate_limits.unwrap_or(false),
        internal_redirect,
    })
}

/// The `envoy.lb` part of a metadata match.
pub(super) fn metadata_match_of(m: &Option<core::Metadata>) -> MetadataMatch {
    let values = m.as_ref()?.filter_metadata.get("envoy.lb")?;
    match json(values) {
        Value::Object(map) if !map.is_empty() => Some(Arc::new(map.into_iter().collect())),
        _ => None,
    }
}

/// One metadata match with another over it.
pub(super) fn merged(one: &MetadataMatch, over: &MetadataMatch) -> MetadataMatch {
    match (one, over) {
        (None, None) => None,
        (Some(only), None) | (None, Some(only)) => Some(only.clone()),
        (Some(one), Some(over)) => {
            let mut all = (**one).clone();
            all.extend(over.iter().map(|(k, v)| (k.clone(), v.clone())));
            Some(Arc::new(all))
        }
    }
}

fn template_rewrite(
    at: At<'_>,
    m: &core::TypedExtensionConfig,
    matches: Option<&RouteMatch>,
) -> Step<UriTemplateRewrite> {
    let found = typed_config(&at, &m.typed_config, "path rewrite policy")?;
    let at = at.field("typed_config");
    if found.name != "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig" {
        return Err(found.unknown(&at, "path rewrite policy"));
    }
    let m: UriTemplateRewriteConfig = found.decode(&at)?;
    let template = match matches.map(|m| &m.path) {
        Some(PathMatch::Template(template)) => template,
        // The condition itself was wrong, and that was said.
        None => return Err(Reported),
        Some(_) => {
            return Err(at.error("needs a path_match_policy with a template in the route's match"));
        }
    };
    UriTemplateRewrite::parse(&m.path_template_rewrite, template)
        .map_err(|why| at.field("path_template_rewrite").error(why))
}

fn internal_redirect_policy_of(
    at: At<'_>,
    m: &pb::InternalRedirectPolicy,
) -> Step<InternalRedirectPolicy> {
    let pb::InternalRedirectPolicy {
        max_internal_redirects,
        redirect_response_codes,
        predicates,
        allow_cross_scheme_redirect,
        response_headers_to_copy,
    } = m;
    let codes = at.each(
        "redirect_response_codes",
        redirect_response_codes,
        |at, code| match *code as u16 {
            code @ (301 | 302 | 303 | 307 | 308) => Ok(code),
            _ => Err(at.error(format!("{code} is none of 301, 302, 303, 307, 308"))),
        },
    );
    let mut policy = InternalRedirectPolicy {
        max_internal_redirects: max_internal_redirects.unwrap_or(1),
        codes: if codes.is_empty() { vec![302] } else { codes },
        previous_routes: false,
        allowed_routes: None,
        safe_cross_scheme: false,
        allow_cross_scheme: *allow_cross_scheme_redirect,
        response_headers_to_copy: at.each(
            "response_headers_to_copy",
            response_headers_to_copy,
            |at, name| match name.starts_with(':') {
                true => Err(at.error("must not be a pseudo header")),
                false => Ok(Arc::from(name.to_ascii_lowercase())),
            },
        ),
    };
    at.each("predicates", predicates, |at, m| {
        let found = typed_config(&at, &m.typed_config, "internal redirect predicate")?;
        let at = at.field("typed_config");
        match found.name.as_str() {
            "envoy.extensions.internal_redirect.previous_routes.v3.PreviousRoutesConfig" => {
                policy.previous_routes = true;
            }
            "envoy.extensions.internal_redirect.allow_listed_routes.v3.AllowListedRoutesConfig" => {
                let m: AllowListedRoutesConfig = found.decode(&at)?;
                let names = m.allowed_route_names.iter().map(|n| n.as_str().into());
                policy.allowed_routes = Some(names.collect());
            }
            "envoy.extensions.internal_redirect.safe_cross_scheme.v3.SafeCrossSchemeConfig" => {
                policy.safe_cross_scheme = true;
            }
            _ => return Err(found.unknown(&at, "internal redirect predicate")),
        }
        Ok(())
    });
    Ok(policy)
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
    let mut proxy = None;
    if let Some(connect) = &m.connect_config {
        let at = at.field("connect_config");
        let pb::route_action::upgrade_config::ConnectConfig {
            proxy_protocol_config,
            allow_post,
        } = connect;
        unsupported!(at, allow_post);
        proxy = at.optional("proxy_protocol_config", proxy_protocol_config, bare_header)?;
        if upgrade_type != "connect" {
            at.error("is only for upgrade_type CONNECT");
        }
    }
    Ok(RouteUpgrade {
        upgrade_type: upgrade_type.into(),
        enabled: m.enabled.unwrap_or(true),
        connect_terminate: m.connect_config.is_some(),
        connect_proxy: proxy,
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
        Some(C::ClusterSpecifierPlugin(_)) => Err(at
            .field("cluster_specifier_plugin")
            .not_implemented("is not implemented; write cluster")),
        Some(C::InlineClusterSpecifierPlugin(_)) => Err(at
            .field("inline_cluster_specifier_plugin")
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
        Some(R::HeaderName(name)) => Some(header_name(&at, "header_name", name)?),
        _ => None,
    };
    let use_hash_policy = matches!(random_value_specifier, Some(R::UseHashPolicy(true)));
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
        use_hash_policy,
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
    let target = match (name.as_str(), cluster_header.as_str()) {
        ("", "") => return Err(at.error("needs one of name, cluster_header")),
        ("", header) => WeightedTarget::Header(header_name(&at, "cluster_header", header)?),
        (name, "") => WeightedTarget::Cluster(name.into()),
        _ => return Err(at.error("only one of name, cluster_header can be given")),
    };
    Ok(ClusterWeight {
        name: target,
        weight: weight.ok_or_else(|| at.field("weight").error("is required"))?,
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
        metadata_match: metadata_match_of(metadata_match),
    })
}

/// `RequestMirrorPolicy`.
pub(super) fn mirror(at: At<'_>, m: &pb::route_action::RequestMirrorPolicy) -> Step<Mirror> {
    let pb::route_action::RequestMirrorPolicy {
        cluster,
        cluster_header,
        runtime_fraction: fraction,
        trace_sampled,
        disable_shadow_host_suffix_append,
        request_headers_mutations,
        host_rewrite_literal,
    } = m;
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
        header_mutations: header_mutations(
            &at,
            "request_headers_mutations",
            request_headers_mutations,
        ),
    })
}

fn hash_policy(at: At<'_>, m: &pb::route_action::HashPolicy) -> Step<Option<HashPolicy>> {
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
        // It asks for nothing.
        Some(P::ConnectionProperties(_)) => return Ok(None),
        Some(P::QueryParameter(m)) => {
            HashSource::QueryParameter(at.field("query_parameter").text("name", &m.name)?)
        }
        Some(P::FilterState(m)) => {
            HashSource::FilterState(at.field("filter_state").text("key", &m.key)?)
        }
        None => {
            return Err(
                at.error("needs one of header, cookie, connection_properties, query_parameter")
            );
        }
    };
    Ok(Some(HashPolicy {
        source,
        terminal: m.terminal,
    }))
}
