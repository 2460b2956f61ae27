//! HTTP filters, and what routes say about them.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use proto::{
    Any,
    envoy::{
        config::{core::v3 as core, route::v3 as route},
        extensions::filters::{
            common::fault::v3 as fault_common,
            http::{
                buffer::v3::{BufferPerRoute, buffer_per_route},
                cors::v3::CorsPolicy as CorsMessage,
                fault::v3 as fault_pb,
                grpc_stats::v3 as grpc_stats_pb,
                header_mutation::v3::HeaderMutationPerRoute,
                lua::v3 as lua_pb,
                original_src::v3::OriginalSrc,
                router::v3::Router,
                stateful_session::v3::{StatefulSessionPerRoute, stateful_session_per_route},
            },
            network::http_connection_manager::v3 as hcm,
        },
    },
};

use super::{
    common::{
        above_zero, enumeration, extension, fraction, header_matcher, runtime_fraction,
        string_matcher,
    },
    ext_authz::{self, ext_authz},
    filter_config,
    filter_state::request_state,
    health_check::health_check_filter,
    jwt_authn::{self, jwt_authn},
    lua::{lua, lua_per_route},
    rate_limit_service::{rate_limit_filter, rate_limit_per_route},
    rbac::{http_rbac, http_rbac_per_route},
    route::option,
};
use crate::plan::{
    error::{At, Step, unsupported},
    http_filter::{
        AlpnFilter, AlpnOverride, AlpnProtocol, CorsPolicy, Fault, FaultAbort, FaultAbortSource,
        FaultDelay, FaultDelaySource, GrpcStats, GrpcStatsMethods, HttpFilter, HttpFilterConfig,
        IstioMetricDefinition, IstioMetricOverride, IstioStats, PeerMetadata, PerFilterConfig,
        RouteFilterConfig, RouterFilter,
    },
    matcher::Fraction,
};

/// The filters of a connection manager, or of an upgrade. Those that are accepted without effect are left out.
pub(super) fn http_filters(
    at: &At<'_>,
    field: &str,
    filters: &[hcm::HttpFilter],
) -> Vec<HttpFilter> {
    let list = at.each(field, filters, http_filter);
    let list: Vec<_> = list.into_iter().flatten().collect();
    let at = at.field(field);
    let routers = list
        .iter()
        .filter(|f| matches!(f.config, HttpFilterConfig::Router(_)))
        .count();
    let last = list
        .last()
        .is_some_and(|f| matches!(f.config, HttpFilterConfig::Router(_)));
    if list.len() == filters.len() && (routers != 1 || !last) {
        at.error(
            "must end with the router: name envoy.filters.http.router, typed_config with \"@type\" \
             type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
        );
    }
    list
}

fn http_filter(at: At<'_>, m: &hcm::HttpFilter) -> Step<Option<HttpFilter>> {
    use hcm::http_filter::ConfigType;
    let name = at.text("name", &m.name)?;
    let any = match &m.config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(_)) => {
            return Err(at
                .field("config_discovery")
                .not_implemented("is not implemented; write typed_config"));
        }
        None => {
            let hint = match &*name {
                "envoy.filters.http.router" | "envoy.router" => {
                    ": write \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                }
                _ => ": the configuration of this filter with its @type",
            };
            return Err(at.field("typed_config").error(format!("is required{hint}")));
        }
    };
    let at = at.field("typed_config");
    let found = extension(&at, any)?;
    let config = match found.name.as_str() {
        "envoy.extensions.filters.http.router.v3.Router" => {
            HttpFilterConfig::Router(router(at, &found.decode(&at)?)?)
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            HttpFilterConfig::Fault(Arc::new(fault(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.http.cors.v3.Cors" => HttpFilterConfig::Cors,
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => {
            HttpFilterConfig::GrpcStats(grpc_stats(at, &found.decode(&at)?)?)
        }
        "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb" => HttpFilterConfig::GrpcWeb,
        "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig" => {
            HttpFilterConfig::Alpn(Arc::new(alpn(at, &found.decode(&at)?)?))
        }
        "io.istio.http.peer_metadata.Config" => {
            HttpFilterConfig::PeerMetadata(peer_metadata(at, &found.decode(&at)?)?)
        }
        "envoy.extensions.filters.http.rbac.v3.RBAC" => {
            HttpFilterConfig::Rbac(Arc::new(http_rbac(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz" => {
            HttpFilterConfig::ExtAuthz(Arc::new(ext_authz(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => {
            HttpFilterConfig::JwtAuthn(Arc::new(jwt_authn(at, &found.decode(&at)?)?))
        }
        "stats.PluginConfig" => {
            HttpFilterConfig::IstioStats(Arc::new(istio_stats(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.http.original_src.v3.OriginalSrc" => {
            let OriginalSrc { mark } = found.decode(&at)?;
            HttpFilterConfig::OriginalSrc { mark }
        }
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation" => {
            let config = filter_config::header_mutation(at, &found.decode(&at)?)?;
            HttpFilterConfig::HeaderMutation(Arc::new(config))
        }
        "envoy.extensions.filters.http.header_to_metadata.v3.Config" => {
            let config = filter_config::header_to_metadata(at, &found.decode(&at)?)?;
            HttpFilterConfig::HeaderToMetadata(Arc::new(config))
        }
        "envoy.extensions.filters.http.set_metadata.v3.Config" => {
            let config = filter_config::set_metadata(at, &found.decode(&at)?)?;
            HttpFilterConfig::SetMetadata(config.into())
        }
        "envoy.extensions.filters.http.set_filter_state.v3.Config" => {
            let config = request_state(at, &found.decode(&at)?)?;
            HttpFilterConfig::SetFilterState(Arc::new(config))
        }
        "envoy.extensions.filters.http.stateful_session.v3.StatefulSession" => {
            let config = filter_config::stateful_session(at, &found.decode(&at)?)?;
            HttpFilterConfig::StatefulSession(config.map(Arc::new))
        }
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => {
            let config = filter_config::local_rate_limit(at, &found.decode(&at)?)?;
            HttpFilterConfig::LocalRateLimit(Arc::new(config))
        }
        "envoy.extensions.filters.http.ratelimit.v3.RateLimit" => {
            let config = rate_limit_filter(at, &found.decode(&at)?)?;
            HttpFilterConfig::RateLimit(Arc::new(config))
        }
        "envoy.extensions.filters.http.health_check.v3.HealthCheck" => {
            let config = health_check_filter(at, &found.decode(&at)?)?;
            HttpFilterConfig::HealthCheck(Arc::new(config))
        }
        "envoy.extensions.filters.http.buffer.v3.Buffer" => {
            HttpFilterConfig::Buffer(filter_config::buffer(at, &found.decode(&at)?)?)
        }
        "envoy.extensions.filters.http.lua.v3.Lua" => {
            let m: lua_pb::Lua = found.decode(&at)?;
            HttpFilterConfig::Lua(Arc::new(lua(at, &m)?))
        }
        // Answers are sent as they are: see docs/accepted-without-effect.md.
        "envoy.extensions.filters.http.compressor.v3.Compressor" => return Ok(None),
        _ if m.is_optional => return Ok(None),
        _ => return Err(found.unknown(&at, "HTTP filter")),
    };
    Ok(Some(HttpFilter {
        name,
        disabled: m.disabled,
        config,
    }))
}

/// What `strict_check_headers` may name.
const CHECKABLE: [&str; 5] = [
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-max-retries",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
];

fn router(at: At<'_>, m: &Router) -> Step<RouterFilter> {
    let Router {
        dynamic_stats,
        start_child_span: _,
        upstream_log,
        upstream_log_options: _,
        suppress_envoy_headers,
        strict_check_headers,
        respect_expected_rq_timeout,
        suppress_grpc_request_failure_code_stats: _,
        upstream_http_filters,
        reject_connect_request_early_data,
    } = m;
    unsupported!(
        at,
        upstream_log,
        upstream_http_filters,
        reject_connect_request_early_data,
    );
    Ok(RouterFilter {
        dynamic_stats: dynamic_stats.unwrap_or(true),
        suppress_envoy_headers: *suppress_envoy_headers,
        strict_check_headers: at.each("strict_check_headers", strict_check_headers, |at, name| {
            match CHECKABLE.contains(&name.as_str()) {
                true => Ok(name.as_str().into()),
                false => Err(at.error(format!("must be one of {}", CHECKABLE.join(", ")))),
            }
        }),
        respect_expected_rq_timeout: *respect_expected_rq_timeout,
    })
}

fn fault(at: At<'_>, m: &fault_pb::HttpFault) -> Step<Fault> {
    let fault_pb::HttpFault {
        delay,
        abort,
        upstream_cluster,
        headers,
        downstream_nodes,
        max_active_faults,
        response_rate_limit,
        delay_percent_runtime: _,
        abort_percent_runtime: _,
        delay_duration_runtime: _,
        abort_http_status_runtime: _,
        max_active_faults_runtime: _,
        response_rate_limit_percent_runtime: _,
        abort_grpc_status_runtime: _,
        disable_downstream_cluster_stats,
        filter_metadata: _,
    } = m;
    unsupported!(at, response_rate_limit);
    Ok(Fault {
        delay: at.optional("delay", delay, fault_delay)?,
        abort: at.optional("abort", abort, fault_abort)?,
        headers: at.each("headers", headers, header_matcher),
        upstream_cluster: option(upstream_cluster),
        downstream_nodes: downstream_nodes.iter().map(|s| s.as_str().into()).collect(),
        max_active_faults: *max_active_faults,
        disable_downstream_cluster_stats: *disable_downstream_cluster_stats,
    })
}

fn fault_delay(at: At<'_>, m: &fault_common::FaultDelay) -> Step<FaultDelay> {
    use fault_common::fault_delay::FaultDelaySecifier as S;
    let source = match &m.fault_delay_secifier {
        Some(S::FixedDelay(m)) => match above_zero(&at, "fixed_delay", &Some(*m))? {
            Some(delay) => FaultDelaySource::Fixed(delay),
            None => return Err(at.field("fixed_delay").error("is required")),
        },
        Some(S::HeaderDelay(_)) => FaultDelaySource::Header,
        None => return Err(at.error("needs one of fixed_delay, header_delay")),
    };
    let percentage = at
        .optional("percentage", &m.percentage, fraction)?
        .unwrap_or(Fraction::NONE);
    Ok(FaultDelay { percentage, source })
}

fn fault_abort(at: At<'_>, m: &fault_pb::FaultAbort) -> Step<FaultAbort> {
    use fault_pb::fault_abort::ErrorType as E;
    let source = match m.error_type {
        Some(E::HttpStatus(status)) => u16::try_from(status)
            .ok()
            .filter(|s| (200..600).contains(s))
            .map(FaultAbortSource::HttpStatus)
            .ok_or_else(|| at.field("http_status").error("must be from 200 to 599"))?,
        Some(E::GrpcStatus(status)) => FaultAbortSource::GrpcStatus(status),
        Some(E::HeaderAbort(_)) => FaultAbortSource::Header,
        None => return Err(at.error("needs one of http_status, grpc_status, header_abort")),
    };
    let percentage = at
        .optional("percentage", &m.percentage, fraction)?
        .unwrap_or(Fraction::NONE);
    let body = match m.response_body.as_str() {
        "" => Bytes::from_static(b"fault filter abort"),
        given => Bytes::copy_from_slice(given.as_bytes()),
    };
    Ok(FaultAbort {
        percentage,
        source,
        body,
    })
}

fn grpc_stats(at: At<'_>, m: &grpc_stats_pb::FilterConfig) -> Step<GrpcStats> {
    use grpc_stats_pb::filter_config::PerMethodStatSpecifier as P;
    let grpc_stats_pb::FilterConfig {
        emit_filter_state,
        enable_upstream_stats,
        replace_dots_in_grpc_service_name,
        per_method_stat_specifier,
    } = m;
    unsupported!(at, replace_dots_in_grpc_service_name);
    let methods = match per_method_stat_specifier {
        None | Some(P::StatsForAllMethods(false)) => GrpcStatsMethods::None,
        Some(P::StatsForAllMethods(true)) => GrpcStatsMethods::All,
        Some(P::IndividualMethodStatsAllowlist(list)) => {
            let service = |s: &core::grpc_method_list::Service| {
                let methods = s.method_names.iter().map(|m| m.as_str().into()).collect();
                (s.name.as_str().into(), methods)
            };
            GrpcStatsMethods::Listed(list.services.iter().map(service).collect())
        }
    };
    Ok(GrpcStats {
        emit_filter_state: *emit_filter_state,
        methods,
        enable_upstream_stats: *enable_upstream_stats,
    })
}

fn alpn(
    at: At<'_>,
    m: &proto::istio::envoy::config::filter::http::alpn::v2alpha1::FilterConfig,
) -> Step<AlpnFilter> {
    use proto::istio::envoy::config::filter::http::alpn::v2alpha1::filter_config::Protocol;
    let overrides = at.each("alpn_override", &m.alpn_override, |at, m| {
        let upstream_protocol = match enumeration(&at, "upstream_protocol", m.upstream_protocol)? {
            Protocol::Http10 => AlpnProtocol::Http10,
            Protocol::Http11 => AlpnProtocol::Http11,
            Protocol::Http2 => AlpnProtocol::Http2,
        };
        let alpn = m.alpn_override.iter().map(|s| s.as_str().into()).collect();
        Ok(AlpnOverride {
            upstream_protocol,
            alpn,
        })
    });
    Ok(AlpnFilter { overrides })
}

fn peer_metadata(
    at: At<'_>,
    m: &proto::io::istio::http::peer_metadata::Config,
) -> Step<PeerMetadata> {
    use proto::io::istio::http::peer_metadata::config::{
        DiscoveryMethod, PropagationMethod, discovery_method::MethodSpecifier as D,
        propagation_method::MethodSpecifier as P,
    };
    // Workload discovery asks a stream that sidecars do not have; headers are what is left.
    let discovered = |field: &str, methods: &[DiscoveryMethod]| {
        let found = at.each(field, methods, |at, m| match &m.method_specifier {
            Some(D::IstioHeaders(_)) => Ok(true),
            Some(D::WorkloadDiscovery(_)) => Ok(false),
            Some(D::Baggage(_)) => Err(at
                .field("baggage")
                .not_implemented("is not implemented; remove it")),
            None => Err(at.error("needs one of istio_headers, workload_discovery")),
        });
        found.contains(&true)
    };
    let propagated = |field: &str, methods: &[PropagationMethod]| {
        let found = at.each(field, methods, |at, m| match &m.method_specifier {
            Some(P::IstioHeaders(_)) => Ok(true),
            Some(P::Baggage(_)) => Err(at
                .field("baggage")
                .not_implemented("is not implemented; remove it")),
            None => Err(at.error("needs istio_headers")),
        });
        found.contains(&true)
    };
    let additional_labels = &m.additional_labels;
    unsupported!(at, additional_labels);
    Ok(PeerMetadata {
        downstream_discovery_headers: discovered("downstream_discovery", &m.downstream_discovery),
        upstream_discovery_headers: discovered("upstream_discovery", &m.upstream_discovery),
        downstream_propagation: propagated("downstream_propagation", &m.downstream_propagation),
        upstream_propagation: propagated("upstream_propagation", &m.upstream_propagation),
        shared_with_upstream: m.shared_with_upstream,
    })
}

/// `stats.PluginConfig`, as HTTP and as network filter.
pub(super) fn istio_stats(at: At<'_>, m: &proto::stats::PluginConfig) -> Step<IstioStats> {
    use proto::stats::{MetricType, Reporter};
    let proto::stats::PluginConfig {
        disable_host_header_fallback,
        tcp_reporting_duration,
        metrics,
        definitions,
        reporter,
        // Of the former Wasm extension; the native filter reads none of them either.
        debug: _,
        max_peer_cache_size: _,
        stat_prefix: _,
        field_separator: _,
        value_separator: _,
        rotation_interval: _,
        graceful_deletion_interval: _,
    } = m;
    let metrics = at.each("metrics", metrics, |at, m| {
        let proto::stats::MetricConfig {
            dimensions,
            name,
            tags_to_remove,
            r#match,
            drop,
        } = m;
        unsupported!(at, r#match);
        let mut dimensions: Vec<(Arc<str>, Arc<str>)> = dimensions
            .iter()
            .map(|(k, v)| (k.as_str().into(), v.as_str().into()))
            .collect();
        dimensions.sort();
        Ok(IstioMetricOverride {
            name: name.as_str().into(),
            drop: *drop,
            tags_to_remove: tags_to_remove.iter().map(|s| s.as_str().into()).collect(),
            dimensions,
        })
    });
    let definitions = at.each("definitions", definitions, |at, m| {
        let kind: MetricType = enumeration(&at, "type", m.r#type)?;
        Ok(IstioMetricDefinition {
            name: at.text("name", &m.name)?,
            value: m.value.as_str().into(),
            kind: kind.as_str_name().into(),
        })
    });
    Ok(IstioStats {
        disable_host_header_fallback: *disable_host_header_fallback,
        tcp_reporting_duration: above_zero(&at, "tcp_reporting_duration", tcp_reporting_duration)?,
        metrics,
        definitions,
        server_gateway: enumeration::<Reporter>(&at, "reporter", *reporter)?
            == Reporter::ServerGateway,
    })
}

/// `typed_per_filter_config`.
pub(super) fn per_filter(at: &At<'_>, map: &BTreeMap<String, Any>) -> PerFilterConfig {
    let at = at.field("typed_per_filter_config");
    let pairs = map.iter().filter_map(|(name, any)| {
        let config = route_filter_config(at.key(name), any).ok()??;
        Some((Arc::from(name.as_str()), config))
    });
    PerFilterConfig::new(pairs.collect())
}

fn route_filter_config(at: At<'_>, any: &Any) -> Step<Option<RouteFilterConfig>> {
    let found = extension(&at, any)?;
    Ok(Some(match found.name.as_str() {
        "envoy.config.route.v3.FilterConfig" => {
            let m: route::FilterConfig = found.decode(&at)?;
            match &m.config {
                _ if m.disabled => RouteFilterConfig::Disabled,
                None => RouteFilterConfig::Enabled,
                Some(any) if any.type_url.ends_with("/google.protobuf.Empty") => {
                    RouteFilterConfig::Enabled
                }
                Some(any) if m.is_optional && !known(any) => return Ok(None),
                Some(any) => return route_filter_config(at.field("config"), any),
            }
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            RouteFilterConfig::Fault(Arc::new(fault(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.http.cors.v3.CorsPolicy" => {
            RouteFilterConfig::Cors(Arc::new(cors(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute" => {
            let m: HeaderMutationPerRoute = found.decode(&at)?;
            let mutations = at.optional("mutations", &m.mutations, filter_config::mutations)?;
            RouteFilterConfig::HeaderMutation(Arc::new(mutations.unwrap_or_default()))
        }
        "envoy.extensions.filters.http.header_to_metadata.v3.Config" => {
            let config = filter_config::header_to_metadata(at, &found.decode(&at)?)?;
            RouteFilterConfig::HeaderToMetadata(Arc::new(config))
        }
        "envoy.extensions.filters.http.set_metadata.v3.Config" => {
            let config = filter_config::set_metadata(at, &found.decode(&at)?)?;
            RouteFilterConfig::SetMetadata(config.into())
        }
        "envoy.extensions.filters.http.set_filter_state.v3.Config" => {
            let config = request_state(at, &found.decode(&at)?)?;
            RouteFilterConfig::SetFilterState(Arc::new(config))
        }
        "envoy.extensions.filters.http.stateful_session.v3.StatefulSessionPerRoute" => {
            use stateful_session_per_route::Override as O;
            let m: StatefulSessionPerRoute = found.decode(&at)?;
            match &m.r#override {
                Some(O::Disabled(true)) => RouteFilterConfig::Disabled,
                Some(O::StatefulSession(m)) => {
                    let at = at.field("stateful_session");
                    match filter_config::stateful_session(at, m)? {
                        Some(config) => RouteFilterConfig::StatefulSession(Arc::new(config)),
                        None => RouteFilterConfig::Disabled,
                    }
                }
                _ => return Err(at.error("needs one of disabled: true, stateful_session")),
            }
        }
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => {
            let config = filter_config::local_rate_limit(at, &found.decode(&at)?)?;
            RouteFilterConfig::LocalRateLimit(Arc::new(config))
        }
        "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute" => {
            let config = rate_limit_per_route(at, &found.decode(&at)?)?;
            RouteFilterConfig::RateLimit(Arc::new(config))
        }
        "envoy.extensions.filters.http.buffer.v3.BufferPerRoute" => {
            use buffer_per_route::Override as O;
            let m: BufferPerRoute = found.decode(&at)?;
            match &m.r#override {
                Some(O::Disabled(true)) => RouteFilterConfig::Disabled,
                Some(O::Buffer(m)) => {
                    RouteFilterConfig::Buffer(filter_config::buffer(at.field("buffer"), m)?)
                }
                _ => return Err(at.error("needs one of disabled: true, buffer")),
            }
        }
        "envoy.extensions.filters.http.lua.v3.LuaPerRoute" => {
            let m: lua_pb::LuaPerRoute = found.decode(&at)?;
            lua_per_route(at, &m)?
        }
        "envoy.extensions.filters.http.rbac.v3.RBACPerRoute" => {
            match http_rbac_per_route(at, &found.decode(&at)?)? {
                Some(rbac) => RouteFilterConfig::Rbac(Arc::new(rbac)),
                None => RouteFilterConfig::Disabled,
            }
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute" => {
            ext_authz::per_route(at, &found.decode(&at)?)?
        }
        "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig" => {
            jwt_authn::per_route(at, &found.decode(&at)?)?
        }
        _ => return Err(found.unknown(&at, "HTTP filter configuration")),
    }))
}

fn known(any: &Any) -> bool {
    let name = proto::any::type_name(&any.type_url);
    [
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        "envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute",
        "envoy.extensions.filters.http.header_to_metadata.v3.Config",
        "envoy.extensions.filters.http.set_metadata.v3.Config",
        "envoy.extensions.filters.http.set_filter_state.v3.Config",
        "envoy.extensions.filters.http.stateful_session.v3.StatefulSessionPerRoute",
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute",
        "envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
        "envoy.extensions.filters.http.lua.v3.LuaPerRoute",
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
        "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig",
        "envoy.extensions.filters.http.rbac.v3.RBACPerRoute",
    ]
    .contains(&name)
}

fn cors(at: At<'_>, m: &CorsMessage) -> Step<CorsPolicy> {
    Ok(CorsPolicy {
        allow_origin: at.each(
            "allow_origin_string_match",
            &m.allow_origin_string_match,
            string_matcher,
        ),
        allow_methods: m.allow_methods.as_str().into(),
        allow_headers: m.allow_headers.as_str().into(),
        expose_headers: m.expose_headers.as_str().into(),
        max_age: m.max_age.as_str().into(),
        allow_credentials: m.allow_credentials,
        allow_private_network_access: m.allow_private_network_access,
        forward_not_matching_preflights: m.forward_not_matching_preflights,
        enabled: at
            .optional("filter_enabled", &m.filter_enabled, runtime_fraction)?
            .unwrap_or(Fraction::ALL),
        shadow_enabled: at
            .optional("shadow_enabled", &m.shadow_enabled, runtime_fraction)?
            .unwrap_or(Fraction::NONE),
    })
}

/// The deprecated `cors` field of routes and virtual hosts: the same policy.
pub(super) fn legacy_cors(at: At<'_>, m: &route::CorsPolicy) -> Step<CorsPolicy> {
    let filter_enabled = m
        .enabled_specifier
        .clone()
        .map(|route::cors_policy::EnabledSpecifier::FilterEnabled(f)| f);
    let same = CorsMessage {
        allow_origin_string_match: m.allow_origin_string_match.clone(),
        allow_methods: m.allow_methods.clone(),
        allow_headers: m.allow_headers.clone(),
        expose_headers: m.expose_headers.clone(),
        max_age: m.max_age.clone(),
        allow_credentials: m.allow_credentials,
        filter_enabled,
        shadow_enabled: m.shadow_enabled.clone(),
        allow_private_network_access: m.allow_private_network_access,
        forward_not_matching_preflights: m.forward_not_matching_preflights,
    };
    cors(at, &same)
}
