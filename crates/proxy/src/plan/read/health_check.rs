//! Active health checks.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use proto::envoy::{
    config::core::v3::{self as core, health_check as nested},
    extensions::{
        filters::http::health_check::v3 as filter,
        health_check::event_sinks::file::v3::HealthCheckEventFileSink,
    },
    r#type::v3::{self as types, CodecClientType},
};

use super::{
    common::{
        above_zero, enumeration, header_matcher, header_name, json, percent, positive,
        string_matcher, typed_config,
    },
    route::option,
    socket::bare_header,
};
use crate::plan::{
    error::{At, Step},
    header::AppendAction,
    health_check::{Checker, GrpcCheck, HealthCheck, HealthCheckFilter, HttpCheck, TcpCheck},
    metadata::{Metadata, TRANSPORT_SOCKET_MATCH},
};

/// `HealthCheck`.
pub(super) fn health_check(at: At<'_>, m: &core::HealthCheck) -> Step<Arc<HealthCheck>> {
    let core::HealthCheck {
        timeout,
        interval,
        initial_jitter,
        interval_jitter,
        interval_jitter_percent,
        unhealthy_threshold,
        healthy_threshold,
        // Envoy reads neither this nor the service for events.
        alt_port: _,
        reuse_connection,
        no_traffic_interval,
        no_traffic_healthy_interval,
        unhealthy_interval,
        unhealthy_edge_interval,
        healthy_edge_interval,
        event_log_path,
        event_logger,
        event_service: _,
        always_log_health_check_failures,
        always_log_health_check_success,
        tls_options,
        transport_socket_match_criteria,
        health_checker,
        name,
    } = m;
    let needed = |name: &str, m: &Option<proto::Duration>| {
        above_zero(&at, name, m)?.ok_or_else(|| at.field(name).error("is required"))
    };
    let threshold =
        |name: &str, m: &Option<u32>| m.ok_or_else(|| at.field(name).error("is required"));
    let or = |name: &str, m: &Option<proto::Duration>, default: Duration| {
        Ok(above_zero(&at, name, m)?.unwrap_or(default))
    };
    let interval = needed("interval", interval)?;
    let unhealthy_interval = or("unhealthy_interval", unhealthy_interval, interval)?;
    let no_traffic_interval = or(
        "no_traffic_interval",
        no_traffic_interval,
        Duration::from_secs(60),
    )?;
    let mut event_logs: Vec<std::path::PathBuf> = at.each("event_logger", event_logger, |at, m| {
        let found = typed_config(&at, &m.typed_config, "event sink")?;
        let at = at.field("typed_config");
        match found.name.as_str() {
            "envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink" => {
                let m: HealthCheckEventFileSink = found.decode(&at)?;
                Ok(at
                    .text("event_log_path", &m.event_log_path)?
                    .as_ref()
                    .into())
            }
            _ => Err(found.unknown(&at, "event sink")),
        }
    });
    if !event_log_path.is_empty() {
        event_logs.push(event_log_path.into());
    }
    let checker = match health_checker {
        None => {
            return Err(
                at.error("needs one of http_health_check, tcp_health_check, grpc_health_check")
            );
        }
        Some(nested::HealthChecker::HttpHealthCheck(m)) => {
            Checker::Http(Box::new(http(at.field("http_health_check"), m)?))
        }
        Some(nested::HealthChecker::TcpHealthCheck(m)) => {
            Checker::Tcp(tcp(at.field("tcp_health_check"), m)?)
        }
        Some(nested::HealthChecker::GrpcHealthCheck(m)) => {
            Checker::Grpc(grpc(at.field("grpc_health_check"), m)?)
        }
        Some(nested::HealthChecker::CustomHealthCheck(m)) => {
            return Err(at.field("custom_health_check").not_implemented(format!(
                "health checker {} is not implemented; write http_, tcp_ or grpc_health_check",
                m.name
            )));
        }
    };
    Ok(Arc::new(HealthCheck {
        checker,
        timeout: needed("timeout", timeout)?,
        interval,
        initial_jitter: positive(&at, "initial_jitter", initial_jitter)?.unwrap_or_default(),
        interval_jitter: positive(&at, "interval_jitter", interval_jitter)?.unwrap_or_default(),
        interval_jitter_percent: *interval_jitter_percent,
        unhealthy_threshold: threshold("unhealthy_threshold", unhealthy_threshold)?,
        healthy_threshold: threshold("healthy_threshold", healthy_threshold)?,
        reuse_connection: reuse_connection.unwrap_or(true),
        name: option(name),
        transport_match: transport_socket_match_criteria.as_ref().map(|m| {
            let namespace = (TRANSPORT_SOCKET_MATCH.into(), json(m));
            Metadata::new([namespace].into())
        }),
        alpn_protocols: tls_options
            .iter()
            .flat_map(|options| &options.alpn_protocols)
            .map(|protocol| protocol.as_str().into())
            .collect(),
        no_traffic_interval,
        no_traffic_healthy_interval: or(
            "no_traffic_healthy_interval",
            no_traffic_healthy_interval,
            no_traffic_interval,
        )?,
        unhealthy_interval,
        unhealthy_edge_interval: or(
            "unhealthy_edge_interval",
            unhealthy_edge_interval,
            unhealthy_interval,
        )?,
        healthy_edge_interval: or("healthy_edge_interval", healthy_edge_interval, interval)?,
        event_logs,
        always_log_failures: *always_log_health_check_failures,
        always_log_success: *always_log_health_check_success,
    }))
}

fn http(at: At<'_>, m: &nested::HttpHealthCheck) -> Step<HttpCheck> {
    let nested::HttpHealthCheck {
        host,
        path,
        send,
        receive,
        response_buffer_size,
        request_headers_to_add,
        request_headers_to_remove,
        expected_statuses,
        retriable_statuses,
        codec_client_type,
        service_name_matcher,
        method,
        use_alpn_protocol,
    } = m;
    let method: core::RequestMethod = enumeration(&at, "method", *method)?;
    let method = match method {
        core::RequestMethod::MethodUnspecified => "GET",
        core::RequestMethod::Connect => {
            return Err(at.field("method").error("cannot be CONNECT"));
        }
        given => given.as_str_name(),
    };
    let body = at.optional("send", send, payload)?.unwrap_or_default();
    if !body.is_empty() && !matches!(method, "POST" | "PUT" | "PATCH" | "OPTIONS") {
        // Envoy refuses a body that the method gives no meaning.
        at.field("send")
            .error("needs a method that has a body: POST, PUT, PATCH, OPTIONS");
    }
    let http2 = match enumeration(&at, "codec_client_type", *codec_client_type)? {
        CodecClientType::Http1 => false,
        CodecClientType::Http2 => true,
        CodecClientType::Http3 => {
            return Err(at
                .field("codec_client_type")
                .not_implemented("HTTP3 is not implemented; write HTTP1 or HTTP2"));
        }
    };
    let path = at.text("path", path)?;
    if !path.starts_with('/') || path.bytes().any(|b| b <= b' ' || b == 0x7f) {
        at.field("path")
            .error("must begin with / and have no space or control character");
    }
    let mut expected = statuses(&at, "expected_statuses", expected_statuses);
    if expected_statuses.is_empty() {
        expected.push(200..=200);
    }
    Ok(HttpCheck {
        host: host.as_str().into(),
        path,
        method: method.into(),
        send: body,
        receive: at.each("receive", receive, payload),
        response_buffer_size: response_buffer_size.unwrap_or(1024),
        headers_to_add: at.each("request_headers_to_add", request_headers_to_add, header),
        headers_to_remove: at.each(
            "request_headers_to_remove",
            request_headers_to_remove,
            |_, m| Ok(Arc::from(m.to_ascii_lowercase())),
        ),
        expected_statuses: expected,
        retriable_statuses: statuses(&at, "retriable_statuses", retriable_statuses),
        http2,
        http2_by_alpn: *use_alpn_protocol,
        service_name: at.optional("service_name_matcher", service_name_matcher, string_matcher)?,
    })
}

/// `Int64Range`s, whose end does not belong to them.
fn statuses(at: &At<'_>, field: &str, list: &[types::Int64Range]) -> Vec<RangeInclusive<u16>> {
    at.each(field, list, |at, m| {
        let valid = 100 <= m.start && m.start < m.end && m.end <= 600;
        match (u16::try_from(m.start), u16::try_from(m.end)) {
            (Ok(start), Ok(end)) if valid => Ok(start..=end - 1),
            _ => Err(at.error("must be a range with 100 ≤ start < end ≤ 600")),
        }
    })
}

fn header(at: At<'_>, m: &core::HeaderValueOption) -> Step<(Arc<str>, Arc<str>, AppendAction)> {
    use core::header_value_option::HeaderAppendAction as A;
    let action = match enumeration(&at, "append_action", m.append_action)? {
        A::AppendIfExistsOrAdd if m.append == Some(false) => AppendAction::OverwriteIfExistsOrAdd,
        A::AppendIfExistsOrAdd => AppendAction::AppendIfExistsOrAdd,
        A::OverwriteIfExistsOrAdd => AppendAction::OverwriteIfExistsOrAdd,
        A::AddIfAbsent => AppendAction::AddIfAbsent,
        A::OverwriteIfExists => AppendAction::OverwriteIfExists,
    };
    at.required("header", &m.header, |at, m| {
        if m.value.contains('%') {
            return Err(at
                .field("value")
                .not_implemented("substitutions are not implemented for health checks"));
        }
        let name = header_name(&at, "key", &m.key)?;
        Ok((name, m.value.as_str().into(), action))
    })
}

fn tcp(at: At<'_>, m: &nested::TcpHealthCheck) -> Step<TcpCheck> {
    let nested::TcpHealthCheck {
        send,
        receive,
        proxy_protocol_config,
    } = m;
    let proxy = at.optional("proxy_protocol_config", proxy_protocol_config, bare_header)?;
    Ok(TcpCheck {
        proxy,
        send: at.optional("send", send, payload)?.unwrap_or_default(),
        receive: at.each("receive", receive, payload),
    })
}

fn grpc(at: At<'_>, m: &nested::GrpcHealthCheck) -> Step<GrpcCheck> {
    let nested::GrpcHealthCheck {
        service_name,
        authority,
        initial_metadata,
    } = m;
    Ok(GrpcCheck {
        service_name: service_name.as_str().into(),
        authority: authority.as_str().into(),
        initial_metadata: at.each("initial_metadata", initial_metadata, |at, m| {
            header(at, m).map(|(name, value, _)| (name, value))
        }),
    })
}

/// `Payload`: hexadecimal text, or bytes.
fn payload(at: At<'_>, m: &nested::Payload) -> Step<Arc<[u8]>> {
    use nested::payload::Payload as P;
    match &m.payload {
        Some(P::Binary(bytes)) => Ok(bytes.as_slice().into()),
        Some(P::Text(text)) => {
            let at = at.field("text");
            let digit = |byte: u8| (byte as char).to_digit(16).map(|d| d as u8);
            let bytes: Option<Vec<u8>> = match text.len() % 2 {
                0 => text
                    .as_bytes()
                    .chunks(2)
                    .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
                    .collect(),
                _ => None,
            };
            match bytes {
                Some(bytes) if !bytes.is_empty() => Ok(bytes.into()),
                _ => Err(at.error("must be hexadecimal digits, two for each byte")),
            }
        }
        None => Err(at.error("needs one of text, binary")),
    }
}

/// `envoy.extensions.filters.http.health_check.v3.HealthCheck`.
pub(super) fn health_check_filter(at: At<'_>, m: &filter::HealthCheck) -> Step<HealthCheckFilter> {
    let filter::HealthCheck {
        pass_through_mode,
        cache_time,
        cluster_min_healthy_percentages,
        headers,
    } = m;
    let Some(pass_through) = *pass_through_mode else {
        return Err(at.field("pass_through_mode").error("is required"));
    };
    let cache_time = positive(&at, "cache_time", cache_time)?;
    if cache_time.is_some() && !pass_through {
        at.field("cache_time")
            .error("can only be given with pass_through_mode");
    }
    let field = at.field("cluster_min_healthy_percentages");
    let least = cluster_min_healthy_percentages
        .iter()
        .filter_map(|(name, share)| {
            Some((name.as_str().into(), percent(field.key(name), share).ok()?))
        });
    Ok(HealthCheckFilter {
        pass_through,
        cache_time,
        min_healthy: least.collect(),
        headers: at.each("headers", headers, header_matcher),
    })
}
