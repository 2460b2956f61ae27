//! The HTTP connection manager, and protocol options of both sides.

use std::{sync::Arc, time::Duration};

use proto::envoy::{
    config::core::v3 as core,
    extensions::{
        filters::network::http_connection_manager::v3::{
            self as pb, http_connection_manager as nested,
        },
        request_id::uuid::v3::UuidRequestIdConfig,
    },
};

use super::{
    access_log::{access_log, body_format},
    client_cert,
    common::{
        above_zero, ads_source, cidr, duration, enumeration, extension, or_disabled, percent,
        positive,
    },
    header::{early_header_mutations, header_adds},
    http_filter::http_filters,
    http2_settings::CustomSettings,
    route::{body_source, option, route_configuration},
    scoped_route::scoped_routes,
};
use crate::plan::{
    error::{At, Step, unsupported},
    http::{
        CodecType, EscapedSlashes, ForwardProto, HeaderCase, Http1Options, Http2Keepalive,
        Http2Options, HttpConnectionManager, HttpOptions, InternalAddresses, RouteSource,
        ServerHeader, StripPort, Underscores, Upgrade,
    },
    local_reply::{LocalReplyConfig, ResponseMapper},
    matcher::Percent,
    scoped_route::Scope,
};

/// `HttpConnectionManager`.
pub(super) fn connection_manager(
    at: At<'_>,
    m: &pb::HttpConnectionManager,
) -> Step<HttpConnectionManager> {
    let pb::HttpConnectionManager {
        codec_type,
        stat_prefix,
        http_filters: filters,
        add_user_agent,
        tracing,
        common_http_protocol_options,
        http1_safe_max_connection_duration: _,
        http_protocol_options,
        http2_protocol_options,
        http3_protocol_options,
        server_name,
        server_header_transformation,
        scheme_header_transformation,
        max_request_headers_kb,
        stream_idle_timeout,
        stream_flush_timeout,
        request_timeout,
        request_headers_timeout,
        drain_timeout,
        delayed_close_timeout,
        access_log: logs,
        access_log_flush_interval,
        flush_access_log_on_new_request,
        access_log_options,
        use_remote_address,
        xff_num_trusted_hops,
        original_ip_detection_extensions,
        early_header_mutation_extensions,
        internal_address_config,
        skip_xff_append,
        via,
        generate_request_id,
        preserve_external_request_id,
        always_set_request_id_in_response,
        forward_client_cert_details,
        set_current_client_cert_details,
        forward_client_cert_matcher,
        proxy_100_continue,
        represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        upgrade_configs,
        normalize_path,
        merge_slashes,
        path_with_escaped_slashes_action,
        request_id_extension,
        local_reply_config: local_reply,
        strip_matching_host_port,
        stream_error_on_invalid_http_message,
        path_normalization_options,
        strip_trailing_host_dot,
        proxy_status_config,
        typed_header_validation_config,
        append_x_forwarded_port,
        append_local_overload,
        // Only the PROXY protocol of an upstream socket reads it, and there is none.
        add_proxy_protocol_connection_state: _,
        route_specifier,
        strip_port_mode,
        drain_timeout_jitter,
        forward_proto_config,
        record_route_resolution_stats,
    } = m;
    unsupported!(
        at,
        http3_protocol_options,
        original_ip_detection_extensions,
        represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        path_normalization_options,
        proxy_status_config,
        typed_header_validation_config,
        append_local_overload,
    );
    let stat_prefix = at.text("stat_prefix", stat_prefix);
    let routes = route_source(&at, route_specifier);
    let own_filters = http_filters(&at, "http_filters", filters);
    let scheme_to_overwrite = at.optional(
        "scheme_header_transformation",
        scheme_header_transformation,
        |at, m| {
            let core::SchemeHeaderTransformation {
                match_upstream,
                transformation,
            } = m;
            unsupported!(at, match_upstream);
            Ok(transformation.as_ref().map(
                |core::scheme_header_transformation::Transformation::SchemeToOverwrite(s)| {
                    Arc::from(s.as_str())
                },
            ))
        },
    )?;
    let mut flush_interval = at.optional(
        "access_log_flush_interval",
        access_log_flush_interval,
        duration,
    )?;
    let mut flush_on_new = *flush_access_log_on_new_request;
    let mut flush_on_tunnel = false;
    if let Some(options) = access_log_options {
        let at = at.field("access_log_options");
        let nested::HcmAccessLogOptions {
            access_log_flush_interval,
            flush_access_log_on_new_request,
            flush_log_on_tunnel_successfully_established,
        } = options;
        flush_on_tunnel = *flush_log_on_tunnel_successfully_established;
        flush_interval = at.optional(
            "access_log_flush_interval",
            access_log_flush_interval,
            duration,
        )?;
        flush_on_new |= flush_access_log_on_new_request;
    }
    let (pack_trace_reason, use_request_id_for_trace_sampling) = at
        .optional("request_id_extension", request_id_extension, request_id)?
        .unwrap_or((true, true));
    let common = at.optional(
        "common_http_protocol_options",
        common_http_protocol_options,
        http_options,
    )?;
    let http1 = at.optional(
        "http_protocol_options",
        http_protocol_options,
        http1_options,
    )?;
    let http2 = at.optional(
        "http2_protocol_options",
        http2_protocol_options,
        http2_options,
    )?;
    let internal_addresses = at.optional(
        "internal_address_config",
        internal_address_config,
        |at, m| {
            let cidr_ranges = at.each("cidr_ranges", &m.cidr_ranges, cidr);
            Ok(InternalAddresses {
                cidr_ranges,
                unix_sockets: m.unix_sockets,
            })
        },
    )?;
    let upgrades = at.each("upgrade_configs", upgrade_configs, |at, m| {
        let nested::UpgradeConfig {
            upgrade_type,
            filters,
            enabled,
        } = m;
        let filters = match &filters[..] {
            [] => Vec::new(),
            own => http_filters(&at, "filters", own),
        };
        let upgrade_type = at
            .text("upgrade_type", upgrade_type)?
            .to_ascii_lowercase()
            .into();
        Ok(Upgrade {
            upgrade_type,
            enabled: enabled.unwrap_or(true),
            filters,
        })
    });
    let details = at.optional(
        "set_current_client_cert_details",
        set_current_client_cert_details,
        client_cert::details,
    );
    let early = at.each(
        "early_header_mutation_extensions",
        early_header_mutation_extensions,
        early_header_mutations,
    );
    let strip_port = match (strip_matching_host_port, strip_port_mode) {
        (true, Some(nested::StripPortMode::StripAnyHostPort(true))) => {
            return Err(
                at.error("only one of strip_matching_host_port, strip_any_host_port can be given")
            );
        }
        (true, _) => StripPort::Matching,
        (_, Some(nested::StripPortMode::StripAnyHostPort(true))) => StripPort::Any,
        _ => StripPort::Never,
    };
    let headers_kb = max_request_headers_kb.unwrap_or(60);
    if !(1..=8192).contains(&headers_kb) {
        at.field("max_request_headers_kb")
            .error("must be from 1 to 8192");
    }
    let field_kb = http2.as_ref().and_then(|m| m.max_header_field_size_kb);
    if field_kb.is_some_and(|kb| kb > headers_kb) {
        at.field("http2_protocol_options")
            .field("max_header_field_size_kb")
            .error("must not be more than max_request_headers_kb");
    }
    let codec = match enumeration(&at, "codec_type", *codec_type)? {
        nested::CodecType::Auto => CodecType::Auto,
        nested::CodecType::Http1 => CodecType::Http1,
        nested::CodecType::Http2 => CodecType::Http2,
        nested::CodecType::Http3 => {
            return Err(at
                .field("codec_type")
                .not_implemented("HTTP3 is not implemented; write AUTO"));
        }
    };
    let local_reply = at.optional("local_reply_config", local_reply, local_reply_config)?;
    let access_logs = at.each("access_log", logs, access_log);
    Ok(HttpConnectionManager {
        stat_prefix: stat_prefix?,
        codec,
        routes: routes?,
        local_reply: local_reply.unwrap_or_default(),
        http_filters: own_filters,
        common: common.unwrap_or_default(),
        http1: http1.unwrap_or_else(default_http1),
        http2: http2.unwrap_or_default(),
        server_name: option(server_name).unwrap_or_else(|| "envoy".into()),
        server_header: match enumeration(
            &at,
            "server_header_transformation",
            *server_header_transformation,
        )? {
            nested::ServerHeaderTransformation::Overwrite => ServerHeader::Overwrite,
            nested::ServerHeaderTransformation::AppendIfAbsent => ServerHeader::AppendIfAbsent,
            nested::ServerHeaderTransformation::PassThrough => ServerHeader::PassThrough,
        },
        scheme_to_overwrite: scheme_to_overwrite.flatten(),
        max_request_headers_kb: headers_kb,
        stream_idle_timeout: or_disabled(
            &at,
            "stream_idle_timeout",
            stream_idle_timeout,
            Some(Duration::from_secs(300)),
        )?,
        stream_flush_timeout: at
            .optional("stream_flush_timeout", stream_flush_timeout, duration)?
            .map(|limit| Some(limit).filter(|limit| !limit.is_zero())),
        request_timeout: positive(&at, "request_timeout", request_timeout)?,
        request_headers_timeout: positive(&at, "request_headers_timeout", request_headers_timeout)?,
        drain_timeout: at
            .optional("drain_timeout", drain_timeout, duration)?
            .unwrap_or(Duration::from_secs(5)),
        drain_timeout_jitter: at
            .optional("drain_timeout_jitter", drain_timeout_jitter, percent)?
            .unwrap_or(Percent::whole(0)),
        forward_proto: at.optional("forward_proto_config", forward_proto_config, forward_proto)?,
        delayed_close_timeout: or_disabled(
            &at,
            "delayed_close_timeout",
            delayed_close_timeout,
            Some(Duration::from_secs(1)),
        )?,
        access_logs,
        access_log_flush_interval: flush_interval.filter(|d| !d.is_zero()),
        flush_access_log_on_new_request: flush_on_new,
        flush_access_log_on_tunnel: flush_on_tunnel,
        use_remote_address: use_remote_address.unwrap_or(false),
        xff_num_trusted_hops: *xff_num_trusted_hops,
        internal_addresses: internal_addresses.unwrap_or_default(),
        skip_xff_append: *skip_xff_append,
        via: option(via),
        generate_request_id: generate_request_id.unwrap_or(true),
        preserve_external_request_id: *preserve_external_request_id,
        always_set_request_id_in_response: *always_set_request_id_in_response,
        pack_trace_reason,
        use_request_id_for_trace_sampling,
        tracing: at.optional("tracing", tracing, super::tracing::tracing)?,
        forward_client_cert: client_cert::forward(&at, *forward_client_cert_details)?,
        client_cert_details: details?.unwrap_or_default(),
        forward_client_cert_matcher: at.optional(
            "forward_client_cert_matcher",
            forward_client_cert_matcher,
            client_cert::by_request,
        )?,
        early_header_mutations: early.into_iter().flatten().collect(),
        record_route_resolution_stats: *record_route_resolution_stats,
        proxy_100_continue: *proxy_100_continue,
        upgrades,
        normalize_path: normalize_path.unwrap_or(false),
        merge_slashes: *merge_slashes,
        escaped_slashes: match enumeration(
            &at,
            "path_with_escaped_slashes_action",
            *path_with_escaped_slashes_action,
        )? {
            nested::PathWithEscapedSlashesAction::ImplementationSpecificDefault
            | nested::PathWithEscapedSlashesAction::KeepUnchanged => EscapedSlashes::KeepUnchanged,
            nested::PathWithEscapedSlashesAction::RejectRequest => EscapedSlashes::RejectRequest,
            nested::PathWithEscapedSlashesAction::UnescapeAndRedirect => {
                EscapedSlashes::UnescapeAndRedirect
            }
            nested::PathWithEscapedSlashesAction::UnescapeAndForward => {
                EscapedSlashes::UnescapeAndForward
            }
        },
        strip_port,
        strip_trailing_host_dot: *strip_trailing_host_dot,
        append_x_forwarded_port: *append_x_forwarded_port,
        add_user_agent: add_user_agent.unwrap_or(false),
        stream_error_on_invalid_http_message: stream_error_on_invalid_http_message.unwrap_or(false),
    })
}

fn forward_proto(at: At<'_>, m: &pb::ForwardProtoConfig) -> Step<ForwardProto> {
    let pb::ForwardProtoConfig {
        https_destination_ports,
        http_destination_ports,
    } = m;
    let ports = |field: &str, list: &[u32]| {
        at.each(field, list, |at, port| {
            let port = u16::try_from(*port).ok().filter(|port| *port > 0);
            port.ok_or_else(|| at.error("must be a port from 1 to 65535"))
        })
    };
    let plan = ForwardProto {
        https: ports("https_destination_ports", https_destination_ports),
        http: ports("http_destination_ports", http_destination_ports),
    };
    if let Some(port) = plan.https.iter().find(|port| plan.http.contains(port)) {
        return Err(at.error(format!("has port {port} in both of its lists")));
    }
    Ok(plan)
}

fn route_source(at: &At<'_>, m: &Option<nested::RouteSpecifier>) -> Step<RouteSource> {
    match m {
        Some(nested::RouteSpecifier::RouteConfig(m)) => Ok(RouteSource::Inline(Arc::new(
            route_configuration(at.field("route_config"), m)?,
        ))),
        Some(nested::RouteSpecifier::Rds(m)) => {
            let at = at.field("rds");
            Ok(RouteSource::Rds {
                name: at.text("route_config_name", &m.route_config_name)?,
                source: at.required("config_source", &m.config_source, ads_source)?,
            })
        }
        Some(nested::RouteSpecifier::ScopedRoutes(m)) => {
            let at = at.field("scoped_routes");
            let routes = scoped_routes(at, m)?;
            let source = at.optional("rds_config_source", &m.rds_config_source, ads_source)?;
            let named = |scope: &Scope| matches!(scope, Scope::Named(_));
            if source.is_none() && routes.scopes.values().any(named) {
                return Err(at
                    .field("rds_config_source")
                    .error("is required where scopes name their routes"));
            }
            Ok(RouteSource::Scoped { routes, source })
        }
        None => Err(at.error("needs one of rds, route_config, scoped_routes")),
    }
}

fn local_reply_config(at: At<'_>, m: &pb::LocalReplyConfig) -> Step<LocalReplyConfig> {
    let pb::LocalReplyConfig {
        mappers,
        body_format: format,
    } = m;
    Ok(LocalReplyConfig {
        mappers: at.each("mappers", mappers, |at, m| {
            let pb::ResponseMapper {
                filter,
                status_code,
                body,
                body_format_override,
                headers_to_add,
            } = m;
            let status = status_code.map(|code| {
                u16::try_from(code)
                    .ok()
                    .filter(|code| (200..600).contains(code))
                    .ok_or_else(|| at.field("status_code").error("must be from 200 to 599"))
            });
            Ok(ResponseMapper {
                filter: at.required("filter", filter, super::access_log::filter)?,
                status: status.transpose()?,
                body: at.optional("body", body, |at, m| body_source(at, m, MAX_REPLY))?,
                body_format: at
                    .optional("body_format_override", body_format_override, body_format)?
                    .map(Arc::new),
                headers_to_add: header_adds(&at, "headers_to_add", headers_to_add),
            })
        }),
        body_format: at
            .optional("body_format", format, body_format)?
            .map(Arc::new),
    })
}

/// Bytes of a reply's text that a configuration may give.
const MAX_REPLY: usize = 1024 * 1024;

/// The UUIDs' `pack_trace_reason` and `use_request_id_for_trace_sampling`.
pub(super) fn request_id(at: At<'_>, m: &pb::RequestIdExtension) -> Step<(bool, bool)> {
    let Some(any) = &m.typed_config else {
        return Ok((true, true));
    };
    let at = at.field("typed_config");
    let found = extension(&at, any)?;
    if found.name != "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" {
        return Err(found.unknown(&at, "request id extension"));
    }
    let m: UuidRequestIdConfig = found.decode(&at)?;
    Ok((
        m.pack_trace_reason.unwrap_or(true),
        m.use_request_id_for_trace_sampling.unwrap_or(true),
    ))
}

/// `HttpProtocolOptions` of the core API: what both protocols share.
pub(super) fn http_options(at: At<'_>, m: &core::HttpProtocolOptions) -> Step<HttpOptions> {
    use core::http_protocol_options::HeadersWithUnderscoresAction as U;
    let core::HttpProtocolOptions {
        idle_timeout,
        max_connection_duration,
        max_headers_count,
        max_response_headers_kb,
        max_stream_duration,
        headers_with_underscores_action,
        max_requests_per_connection,
        max_connection_duration_jitter,
    } = m;
    let default = HttpOptions::default();
    if *max_headers_count == Some(0) {
        at.field("max_headers_count").error("must be at least 1");
    }
    Ok(HttpOptions {
        idle_timeout: or_disabled(&at, "idle_timeout", idle_timeout, default.idle_timeout)?,
        max_connection_duration: positive(&at, "max_connection_duration", max_connection_duration)?,
        max_connection_duration_jitter: at
            .optional(
                "max_connection_duration_jitter",
                max_connection_duration_jitter,
                percent,
            )?
            .unwrap_or(Percent::whole(0)),
        max_headers_count: max_headers_count.unwrap_or(default.max_headers_count),
        max_response_headers_kb: max_response_headers_kb.unwrap_or(default.max_response_headers_kb),
        max_stream_duration: positive(&at, "max_stream_duration", max_stream_duration)?,
        underscores: match enumeration(
            &at,
            "headers_with_underscores_action",
            *headers_with_underscores_action,
        )? {
            U::Allow => Underscores::Allow,
            U::RejectRequest => Underscores::RejectRequest,
            U::DropHeader => Underscores::DropHeader,
        },
        max_requests_per_connection: max_requests_per_connection.filter(|n| *n > 0),
    })
}

/// HTTP/1 options where none are given.
pub(super) fn default_http1() -> Http1Options {
    Http1Options {
        allow_absolute_url: true,
        ..Http1Options::default()
    }
}

/// `Http1ProtocolOptions`.
pub(super) fn http1_options(at: At<'_>, m: &core::Http1ProtocolOptions) -> Step<Http1Options> {
    use core::http1_protocol_options::header_key_format::HeaderFormat as F;
    let core::Http1ProtocolOptions {
        allow_absolute_url,
        accept_http_10,
        default_host_for_http_10,
        header_key_format,
        enable_trailers,
        allow_chunked_length,
        override_stream_error_on_invalid_http_message,
        send_fully_qualified_url,
        // There is one parser.
        use_balsa_parser: _,
        allow_custom_methods,
        ignore_http_11_upgrade,
    } = m;
    unsupported!(at, ignore_http_11_upgrade);
    let header_case = at.optional("header_key_format", header_key_format, |at, m| {
        match &m.header_format {
            Some(F::ProperCaseWords(_)) => Ok(HeaderCase::Proper),
            Some(F::StatefulFormatter(m)) => {
                let at = at.field("stateful_formatter");
                let found = super::common::typed_config(&at, &m.typed_config, "formatter")?;
                match found.name.as_str() {
                    "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig" => {
                        Ok(HeaderCase::Preserve)
                    }
                    _ => Err(found.unknown(&at.field("typed_config"), "header formatter")),
                }
            }
            None => Err(at.error("needs one of proper_case_words, stateful_formatter")),
        }
    })?;
    Ok(Http1Options {
        allow_absolute_url: allow_absolute_url.unwrap_or(true),
        accept_http_10: *accept_http_10,
        default_host_for_http_10: option(default_host_for_http_10),
        header_case: header_case.unwrap_or_default(),
        enable_trailers: *enable_trailers,
        allow_chunked_length: *allow_chunked_length,
        stream_error_on_invalid_http_message: *override_stream_error_on_invalid_http_message,
        send_fully_qualified_url: *send_fully_qualified_url,
        allow_custom_methods: *allow_custom_methods,
    })
}

/// `Http2ProtocolOptions`.
pub(super) fn http2_options(at: At<'_>, m: &core::Http2ProtocolOptions) -> Step<Http2Options> {
    let core::Http2ProtocolOptions {
        hpack_table_size,
        max_concurrent_streams,
        initial_stream_window_size,
        initial_connection_window_size,
        allow_connect,
        allow_metadata,
        // What waits to be written is bounded in bytes (docs/accepted-without-effect.md).
        max_outbound_frames: _,
        max_outbound_control_frames,
        max_consecutive_inbound_frames_with_empty_payload,
        max_inbound_priority_frames_per_stream,
        max_inbound_window_update_frames_per_data_frame_sent,
        stream_error_on_invalid_http_messaging,
        override_stream_error_on_invalid_http_message,
        custom_settings_parameters,
        connection_keepalive,
        use_oghttp2_codec: _,
        max_metadata_size: _,
        enable_huffman_encoding,
        max_header_field_size_kb,
        disallow_obs_text,
        stream_reset_burst,
        stream_reset_rate,
    } = m;
    unsupported!(at, allow_metadata);
    let custom = CustomSettings::read(&at, custom_settings_parameters, m);
    if max_header_field_size_kb.is_some_and(|kb| !(64..=256).contains(&kb)) {
        at.field("max_header_field_size_kb")
            .error("must be from 64 to 256");
    }
    let default = Http2Options::default();
    let window = |field: &str, given: Option<u32>, default: u32| match given {
        Some(size) if !(65_535..=0x7fff_ffff).contains(&size) => {
            Err(at.field(field).error("must be from 65535 to 2147483647"))
        }
        given => Ok(given.unwrap_or(default)),
    };
    let at_least_one = |field: &str, given: Option<u32>, default: u32| match given {
        Some(0) => Err(at.field(field).error("must be at least 1")),
        given => Ok(given.unwrap_or(default)),
    };
    Ok(Http2Options {
        max_consecutive_inbound_frames_with_empty_payload:
            max_consecutive_inbound_frames_with_empty_payload
                .unwrap_or(default.max_consecutive_inbound_frames_with_empty_payload),
        max_inbound_priority_frames_per_stream: max_inbound_priority_frames_per_stream
            .unwrap_or(default.max_inbound_priority_frames_per_stream),
        max_inbound_window_update_frames_per_data_frame_sent: at_least_one(
            "max_inbound_window_update_frames_per_data_frame_sent",
            *max_inbound_window_update_frames_per_data_frame_sent,
            default.max_inbound_window_update_frames_per_data_frame_sent,
        )?,
        max_header_field_size_kb: *max_header_field_size_kb,
        disallow_obs_text: disallow_obs_text.unwrap_or(default.disallow_obs_text),
        huffman: enable_huffman_encoding.unwrap_or(default.huffman),
        stream_reset_burst: stream_reset_burst.unwrap_or(default.stream_reset_burst),
        stream_reset_rate: stream_reset_rate.unwrap_or(default.stream_reset_rate),
        max_outbound_control_frames: at_least_one(
            "max_outbound_control_frames",
            *max_outbound_control_frames,
            default.max_outbound_control_frames,
        )?,
        hpack_table_size: custom
            .header_table()
            .or(*hpack_table_size)
            .unwrap_or(default.hpack_table_size),
        max_concurrent_streams: custom
            .concurrent_streams()
            .or(*max_concurrent_streams)
            .unwrap_or(default.max_concurrent_streams),
        initial_stream_window_size: match custom.stream_window() {
            Some(size) => size,
            None => window(
                "initial_stream_window_size",
                *initial_stream_window_size,
                default.initial_stream_window_size,
            )?,
        },
        custom_settings: custom.others(),
        initial_connection_window_size: window(
            "initial_connection_window_size",
            *initial_connection_window_size,
            default.initial_connection_window_size,
        )?,
        allow_connect: *allow_connect,
        stream_error_on_invalid_http_message: override_stream_error_on_invalid_http_message
            .unwrap_or(*stream_error_on_invalid_http_messaging),
        keepalive: at.optional("connection_keepalive", connection_keepalive, |at, m| {
            let core::KeepaliveSettings {
                interval,
                timeout,
                interval_jitter,
                connection_idle_interval,
            } = m;
            let Some(timeout) = above_zero(&at, "timeout", timeout)? else {
                return Err(at.field("timeout").error("is required"));
            };
            Ok(Http2Keepalive {
                interval: above_zero(&at, "interval", interval)?,
                interval_jitter: match interval_jitter {
                    Some(percent)
                        if percent.value > 100.0
                            || percent.value.is_nan()
                            || percent.value < 0.0 =>
                    {
                        return Err(at.field("interval_jitter").error("must be from 0 to 100"));
                    }
                    Some(percent) => percent.value.round() as u32,
                    None => 15,
                },
                timeout,
                connection_idle_interval: positive(
                    &at,
                    "connection_idle_interval",
                    connection_idle_interval,
                )?,
            })
        })?,
    })
}
