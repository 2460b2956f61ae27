//! `ext_authz`, HTTP and network.

use std::{sync::Arc, time::Duration};

use proto::envoy::{
    config::core::v3 as core,
    extensions::filters::{http::ext_authz::v3 as pb, network::ext_authz::v3 as network_pb},
    r#type::matcher::v3::ListStringMatcher,
};

use super::{
    common::{
        duration, enumeration, header_name, metadata_matcher, runtime_fraction, string_matcher,
    },
    jwt_authn::http_uri,
};
use crate::plan::{
    error::{At, Step, unsupported},
    ext_authz::{
        BodySettings, CheckSettings, ExtAuthz, GrpcCall, HttpCall, NetworkExtAuthz, Service,
    },
    http_filter::RouteFilterConfig,
    matcher::{Fraction, StringMatcher},
};

/// `ExtAuthz` of HTTP.
pub(super) fn ext_authz(at: At<'_>, m: &pb::ExtAuthz) -> Step<ExtAuthz> {
    use pb::ext_authz::Services as S;
    let pb::ExtAuthz {
        transport_api_version,
        failure_mode_allow,
        failure_mode_allow_header_add,
        with_request_body,
        clear_route_cache,
        status_on_error,
        // Mutations are always validated.
        validate_mutations: _,
        metadata_context_namespaces,
        typed_metadata_context_namespaces,
        route_metadata_context_namespaces,
        route_typed_metadata_context_namespaces,
        filter_enabled,
        filter_enabled_metadata,
        deny_at_disable,
        include_peer_certificate,
        stat_prefix,
        bootstrap_metadata_labels_key,
        allowed_headers,
        disallowed_headers,
        include_tls_session,
        charge_cluster_response_stats,
        encode_raw_headers,
        decoder_header_mutation_rules,
        enable_dynamic_metadata_ingestion,
        filter_metadata,
        emit_filter_state_stats,
        max_denied_response_body_bytes,
        // The codec's limits hold for every response.
        enforce_response_header_limits: _,
        services,
        clear_route_cache_headers,
        shadow_mode,
        // Checks have no span of their own.
        emit_client_span: _,
    } = m;
    unsupported!(
        at,
        typed_metadata_context_namespaces,
        route_typed_metadata_context_namespaces,
        decoder_header_mutation_rules,
        filter_metadata,
        emit_filter_state_stats,
        clear_route_cache_headers,
        shadow_mode,
    );
    api_version(&at, *transport_api_version)?;
    let service = match services {
        Some(S::GrpcService(m)) => Service::Grpc(grpc_call(at.field("grpc_service"), m)?),
        Some(S::HttpService(m)) => Service::Http(Box::new(http_call(at.field("http_service"), m)?)),
        None => return Err(at.error("needs one of grpc_service, http_service")),
    };
    let mut allowed_headers = matchers(&at, "allowed_headers", allowed_headers)?;
    if let Some(S::HttpService(m)) = services
        && let Some(m) = &m.authorization_request
    {
        let at = at.field("http_service");
        let at = at.field("authorization_request");
        let old = matchers(&at, "allowed_headers", &m.allowed_headers)?;
        if old.is_some() && allowed_headers.is_some() {
            return Err(at
                .field("allowed_headers")
                .error("only one of it and the filter's allowed_headers can be given"));
        }
        allowed_headers = allowed_headers.or(old);
    }
    let status = match status_on_error.as_ref().map_or(0, |m| m.code) {
        0 => 403,
        code => u16::try_from(code)
            .ok()
            .filter(|code| (200..600).contains(code))
            .ok_or_else(|| at.field("status_on_error").error("must be from 200 to 599"))?,
    };
    Ok(ExtAuthz {
        service,
        failure_mode_allow: *failure_mode_allow,
        failure_mode_allow_header_add: *failure_mode_allow_header_add,
        with_request_body: at.optional("with_request_body", with_request_body, body)?,
        clear_route_cache: *clear_route_cache,
        status_on_error: status,
        metadata_context_namespaces: names(metadata_context_namespaces),
        route_metadata_context_namespaces: names(route_metadata_context_namespaces),
        enabled: at
            .optional("filter_enabled", filter_enabled, runtime_fraction)?
            .unwrap_or(Fraction::ALL),
        enabled_metadata: at.optional(
            "filter_enabled_metadata",
            filter_enabled_metadata,
            metadata_matcher,
        )?,
        deny_at_disable: deny_at_disable
            .as_ref()
            .and_then(|flag| flag.default_value)
            .unwrap_or(false),
        include_peer_certificate: *include_peer_certificate,
        include_tls_session: *include_tls_session,
        stat_prefix: stat_prefix.as_str().into(),
        labels_key: optional_text(bootstrap_metadata_labels_key),
        allowed_headers,
        disallowed_headers: matchers(&at, "disallowed_headers", disallowed_headers)?
            .unwrap_or_default(),
        encode_raw_headers: *encode_raw_headers,
        charge_cluster_response_stats: charge_cluster_response_stats.unwrap_or(true),
        dynamic_metadata: enable_dynamic_metadata_ingestion.unwrap_or(true),
        max_denied_response_body_bytes: *max_denied_response_body_bytes,
    })
}

/// `ExtAuthzPerRoute`.
pub(super) fn per_route(at: At<'_>, m: &pb::ExtAuthzPerRoute) -> Step<RouteFilterConfig> {
    use pb::ext_authz_per_route::Override as O;
    match &m.r#override {
        Some(O::Disabled(true)) => Ok(RouteFilterConfig::Disabled),
        Some(O::Disabled(false)) => Err(at.field("disabled").error("must be true")),
        Some(O::CheckSettings(m)) => {
            let at = at.field("check_settings");
            let pb::CheckSettings {
                context_extensions,
                disable_request_body_buffering,
                with_request_body,
                service_override,
                emit_client_span: _,
            } = m;
            unsupported!(at, service_override);
            if *disable_request_body_buffering && with_request_body.is_some() {
                return Err(at.error(
                    "only one of disable_request_body_buffering, with_request_body can be given",
                ));
            }
            Ok(RouteFilterConfig::ExtAuthz(Arc::new(CheckSettings {
                context_extensions: context_extensions.clone(),
                disable_request_body_buffering: *disable_request_body_buffering,
                with_request_body: at.optional("with_request_body", with_request_body, body)?,
            })))
        }
        None => Err(at.error("needs one of disabled: true, check_settings")),
    }
}

/// `ExtAuthz` of connections.
pub(super) fn network_ext_authz(at: At<'_>, m: &network_pb::ExtAuthz) -> Step<NetworkExtAuthz> {
    let network_pb::ExtAuthz {
        stat_prefix,
        grpc_service,
        failure_mode_allow,
        include_peer_certificate,
        transport_api_version,
        filter_enabled_metadata,
        bootstrap_metadata_labels_key,
        include_tls_session,
        send_tls_alert_on_denial,
        metadata_context_namespaces,
        typed_metadata_context_namespaces,
        shadow_mode,
    } = m;
    unsupported!(
        at,
        shadow_mode,
        send_tls_alert_on_denial,
        typed_metadata_context_namespaces
    );
    api_version(&at, *transport_api_version)?;
    Ok(NetworkExtAuthz {
        stat_prefix: at.text("stat_prefix", stat_prefix)?,
        service: at.required("grpc_service", grpc_service, grpc_call)?,
        failure_mode_allow: *failure_mode_allow,
        include_peer_certificate: *include_peer_certificate,
        include_tls_session: *include_tls_session,
        enabled_metadata: at.optional(
            "filter_enabled_metadata",
            filter_enabled_metadata,
            metadata_matcher,
        )?,
        labels_key: optional_text(bootstrap_metadata_labels_key),
        metadata_context_namespaces: names(metadata_context_namespaces),
    })
}

pub(super) fn api_version(at: &At<'_>, version: i32) -> Step<()> {
    match enumeration(at, "transport_api_version", version)? {
        // What names none means the only one there is.
        core::ApiVersion::V3 | core::ApiVersion::Auto => Ok(()),
        core::ApiVersion::V2 => Err(at.field("transport_api_version").error("must be V3")),
    }
}

fn body(at: At<'_>, m: &pb::BufferSettings) -> Step<BodySettings> {
    if m.max_request_bytes == 0 {
        return Err(at.field("max_request_bytes").error("must be at least 1"));
    }
    Ok(BodySettings {
        max_request_bytes: m.max_request_bytes,
        allow_partial_message: m.allow_partial_message,
        pack_as_bytes: m.pack_as_bytes,
    })
}

pub(super) fn grpc_call(at: At<'_>, m: &core::GrpcService) -> Step<GrpcCall> {
    use core::grpc_service::TargetSpecifier as T;
    let core::GrpcService {
        timeout,
        initial_metadata,
        retry_policy,
        target_specifier,
    } = m;
    unsupported!(at, retry_policy);
    let (cluster, authority) = match target_specifier {
        Some(T::EnvoyGrpc(m)) => {
            let at = at.field("envoy_grpc");
            let core::grpc_service::EnvoyGrpc {
                cluster_name,
                authority,
                retry_policy,
                max_receive_message_length,
                // No x-envoy headers are sent in any case.
                skip_envoy_headers: _,
            } = m;
            unsupported!(at, retry_policy, max_receive_message_length);
            let cluster = at.text("cluster_name", cluster_name)?;
            let authority = match authority.as_str() {
                "" => cluster.clone(),
                name => name.into(),
            };
            (cluster, authority)
        }
        Some(T::GoogleGrpc(_)) => {
            return Err(at
                .field("google_grpc")
                .not_implemented("is not implemented; write envoy_grpc"));
        }
        None => return Err(at.error("needs envoy_grpc")),
    };
    Ok(GrpcCall {
        cluster,
        authority,
        timeout: at.optional("timeout", timeout, longest)?.unwrap_or(DEFAULT),
        initial_metadata: header_values(&at, "initial_metadata", initial_metadata),
    })
}

fn http_call(at: At<'_>, m: &pb::HttpService) -> Step<HttpCall> {
    let pb::HttpService {
        server_uri,
        path_prefix,
        authorization_request,
        authorization_response,
        retry_policy,
        path_override,
    } = m;
    unsupported!(at, retry_policy, path_override);
    let server = at.required("server_uri", server_uri, http_uri)?;
    if !path_prefix.is_empty() && !path_prefix.starts_with('/') {
        return Err(at.field("path_prefix").error("must begin with /"));
    }
    let headers_to_add = match authorization_request {
        None => Vec::new(),
        Some(m) => {
            let at = at.field("authorization_request");
            header_values(&at, "headers_to_add", &m.headers_to_add)
        }
    };
    let none = pb::AuthorizationResponse::default();
    let response = authorization_response.as_ref().unwrap_or(&none);
    let at = at.field("authorization_response");
    let list = |field, m| matchers(&at, field, m);
    let pb::AuthorizationResponse {
        allowed_upstream_headers,
        allowed_upstream_headers_to_append,
        allowed_client_headers,
        allowed_client_headers_on_success,
        dynamic_metadata_from_headers,
    } = response;
    let or_none = |list: Option<Vec<StringMatcher>>| list.unwrap_or_default();
    Ok(HttpCall {
        cluster: server.cluster,
        timeout: (server.timeout > Duration::ZERO).then_some(server.timeout),
        path_prefix: path_prefix.as_str().into(),
        headers_to_add,
        upstream: or_none(list("allowed_upstream_headers", allowed_upstream_headers)?),
        upstream_append: or_none(list(
            "allowed_upstream_headers_to_append",
            allowed_upstream_headers_to_append,
        )?),
        client: list("allowed_client_headers", allowed_client_headers)?,
        client_on_success: or_none(list(
            "allowed_client_headers_on_success",
            allowed_client_headers_on_success,
        )?),
        metadata: or_none(list(
            "dynamic_metadata_from_headers",
            dynamic_metadata_from_headers,
        )?),
    })
}

/// All or nothing: a list that lost a matcher would be another list.
fn matchers(
    at: &At<'_>,
    field: &str,
    m: &Option<ListStringMatcher>,
) -> Step<Option<Vec<StringMatcher>>> {
    at.optional(field, m, |at, m| {
        let at = at.field("patterns");
        let each = m.patterns.iter().enumerate();
        each.map(|(index, m)| {
            let mut matcher = string_matcher(at.index(index), m)?;
            // Names of headers have no case.
            matcher.ignore_case = true;
            Ok(matcher)
        })
        .collect()
    })
}

fn header_values(
    at: &At<'_>,
    field: &str,
    list: &[core::HeaderValue],
) -> Vec<(Arc<str>, Arc<str>)> {
    at.each(field, list, |at, m| {
        let name = header_name(&at, "key", &m.key)?;
        let value = match m.raw_value.is_empty() {
            true => m.value.clone(),
            false => String::from_utf8(m.raw_value.clone())
                .map_err(|_| at.field("raw_value").error("must be UTF-8"))?,
        };
        if value.contains('%') {
            return Err(at
                .field("value")
                .not_implemented("operators (`%`) are not implemented here; write a fixed text"));
        }
        Ok((name, value.into()))
    })
}

pub(super) fn longest(at: At<'_>, m: &prost_types::Duration) -> Step<Option<Duration>> {
    let time = duration(at, m)?;
    Ok((time > Duration::ZERO).then_some(time))
}

fn names(list: &[String]) -> Vec<Arc<str>> {
    list.iter().map(|name| name.as_str().into()).collect()
}

fn optional_text(text: &str) -> Option<Arc<str>> {
    (!text.is_empty()).then(|| text.into())
}

const DEFAULT: Option<Duration> = Some(Duration::from_millis(200));
