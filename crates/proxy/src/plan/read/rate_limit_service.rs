//! `ratelimit`, HTTP and network.

use std::time::Duration;

use proto::envoy::{
    config::ratelimit::v3::RateLimitServiceConfig,
    extensions::{
        common::ratelimit::v3::RateLimitDescriptor,
        filters::{http::ratelimit::v3 as pb, network::ratelimit::v3 as network_pb},
    },
    r#type::v3::{HttpStatus, RateLimitUnit, StatusCode},
};

use super::{
    common::{enumeration, runtime_fraction},
    ext_authz::{api_version, grpc_call, longest},
    header::header_adds,
    rate_limit::own_rate_limits,
    route::option,
};
use crate::plan::{
    access_log::LogFormat,
    error::{At, Step, unsupported},
    ext_authz::GrpcCall,
    filter_config::VirtualHostLimits,
    format::Template,
    matcher::Fraction,
    rate_limit::{Limit, MOST_HITS},
    rate_limit_service::{
        ConnectionDescriptor, NetworkRateLimit, RateLimitFilter, RateLimitRoute, RequestType,
    },
};

/// `RateLimit`.
pub(super) fn rate_limit_filter(at: At<'_>, m: &pb::RateLimit) -> Step<RateLimitFilter> {
    use pb::rate_limit::XRateLimitHeadersRfcVersion as X;
    let pb::RateLimit {
        domain,
        stage,
        request_type,
        timeout,
        failure_mode_deny,
        rate_limited_as_resource_exhausted,
        rate_limit_service,
        enable_x_ratelimit_headers,
        disable_x_envoy_ratelimited_header,
        rate_limited_status,
        response_headers_to_add,
        status_on_error,
        stat_prefix,
        filter_enabled,
        filter_enforced,
        failure_mode_deny_percent,
        rate_limits,
        metadata_namespace,
        enable_retry_after_header,
    } = m;
    if *stage > 10 {
        at.field("stage").error("must be from 0 to 10");
    }
    if response_headers_to_add.len() > 10 {
        at.field("response_headers_to_add")
            .error("must not have more than 10 headers");
    }
    let requests = match request_type.as_str() {
        "" | "both" => RequestType::Both,
        "internal" => RequestType::Internal,
        "external" => RequestType::External,
        _ => {
            return Err(at
                .field("request_type")
                .error("must be one of internal, external, both"));
        }
    };
    let domain = at.text("domain", domain);
    let service = at.required("rate_limit_service", rate_limit_service, service);
    let timeout = at.optional("timeout", timeout, longest)?;
    // What says that nothing is wrong would not stop a client.
    let limited = at.optional("rate_limited_status", rate_limited_status, status)?;
    let on_error = at.optional("status_on_error", status_on_error, |at, m| {
        match status(at, m)? {
            informational if informational < 200 => {
                Err(at.field("code").error("must be from 200 to 511"))
            }
            status => Ok(status),
        }
    })?;
    let share = |name: &str, m: &Option<_>| at.optional(name, m, runtime_fraction);
    let deny = share("failure_mode_deny_percent", failure_mode_deny_percent)?;
    Ok(RateLimitFilter {
        service: GrpcCall {
            timeout: timeout.unwrap_or(DEFAULT),
            ..service?
        },
        domain: domain?,
        stage: *stage,
        requests,
        failure_deny: deny.unwrap_or(match failure_mode_deny {
            true => Fraction::ALL,
            false => Fraction::NONE,
        }),
        status_on_error: on_error.unwrap_or(500),
        status: limited.filter(|status| *status >= 400).unwrap_or(429),
        resource_exhausted: *rate_limited_as_resource_exhausted,
        ratelimit_headers: enumeration::<X>(
            &at,
            "enable_x_ratelimit_headers",
            *enable_x_ratelimit_headers,
        )? == X::DraftVersion03,
        ratelimited_header: !disable_x_envoy_ratelimited_header,
        retry_after: *enable_retry_after_header,
        response_headers: header_adds(&at, "response_headers_to_add", response_headers_to_add),
        stat_prefix: stat_prefix.as_str().into(),
        enabled: share("filter_enabled", filter_enabled)?.unwrap_or(Fraction::ALL),
        enforced: share("filter_enforced", filter_enforced)?.unwrap_or(Fraction::ALL),
        rate_limits: own_rate_limits(&at, rate_limits),
        metadata_namespace: match metadata_namespace.as_str() {
            "" => "envoy.filters.http.ratelimit".into(),
            name => name.into(),
        },
    })
}

/// `RateLimitPerRoute`.
pub(super) fn rate_limit_per_route(at: At<'_>, m: &pb::RateLimitPerRoute) -> Step<RateLimitRoute> {
    use pb::rate_limit_per_route::VhRateLimitsOptions as V;
    let pb::RateLimitPerRoute {
        vh_rate_limits,
        override_option,
        rate_limits,
        domain,
    } = m;
    // Envoy hides it as not implemented, too.
    unsupported!(at, override_option);
    Ok(RateLimitRoute {
        virtual_host: match enumeration(&at, "vh_rate_limits", *vh_rate_limits)? {
            V::Override => VirtualHostLimits::Override,
            V::Include => VirtualHostLimits::Include,
            V::Ignore => VirtualHostLimits::Ignore,
        },
        rate_limits: own_rate_limits(&at, rate_limits),
        domain: option(domain),
    })
}

/// `RateLimit` of connections.
pub(super) fn network_rate_limit(at: At<'_>, m: &network_pb::RateLimit) -> Step<NetworkRateLimit> {
    let network_pb::RateLimit {
        stat_prefix,
        domain,
        descriptors,
        timeout,
        failure_mode_deny,
        rate_limit_service,
    } = m;
    if descriptors.is_empty() {
        at.field("descriptors").error("needs at least one");
    }
    let service = at.required("rate_limit_service", rate_limit_service, service);
    let timeout = at.optional("timeout", timeout, longest)?;
    Ok(NetworkRateLimit {
        stat_prefix: at.text("stat_prefix", stat_prefix)?,
        domain: at.text("domain", domain)?,
        descriptors: at.each("descriptors", descriptors, descriptor),
        failure_deny: *failure_mode_deny,
        service: GrpcCall {
            timeout: timeout.unwrap_or(DEFAULT),
            ..service?
        },
    })
}

/// `RateLimitDescriptor`; its values are formats, as in Envoy.
fn descriptor(at: At<'_>, m: &RateLimitDescriptor) -> Step<ConnectionDescriptor> {
    let RateLimitDescriptor {
        entries,
        limit,
        hits_addend,
        is_negative_hits,
    } = m;
    if entries.is_empty() {
        at.field("entries").error("needs at least one");
    }
    if hits_addend.is_some_and(|hits| hits > MOST_HITS) {
        at.field("hits_addend")
            .error(format!("must be at most {MOST_HITS}"));
    }
    Ok(ConnectionDescriptor {
        entries: at.each("entries", entries, |at, m| {
            let format = LogFormat::Text {
                template: Template::parse(&m.value).map_err(|why| at.field("value").error(why))?,
                omit_empty_values: false,
            };
            Ok((at.text("key", &m.key)?, format))
        }),
        limit: at.optional("limit", limit, |at, m| {
            let unit = enumeration::<RateLimitUnit>(&at, "unit", m.unit)?;
            Ok(Limit {
                requests: m.requests_per_unit,
                unit: unit.as_str_name().into(),
                units: m.unit_multiplier,
            })
        })?,
        hits_addend: *hits_addend,
        negative_hits: *is_negative_hits,
    })
}

/// `RateLimitServiceConfig`.
fn service(at: At<'_>, m: &RateLimitServiceConfig) -> Step<GrpcCall> {
    let RateLimitServiceConfig {
        grpc_service,
        transport_api_version,
    } = m;
    api_version(&at, *transport_api_version)?;
    at.required("grpc_service", grpc_service, grpc_call)
}

/// One of Envoy's status codes.
fn status(at: At<'_>, m: &HttpStatus) -> Step<u16> {
    match StatusCode::try_from(m.code) {
        Ok(code) if code != StatusCode::Empty => Ok(m.code as u16),
        _ => Err(at.field("code").error("must be an HTTP status")),
    }
}

/// How long the service may take.
const DEFAULT: Option<Duration> = Some(Duration::from_millis(20));
