//! Access logs that are records for a service.

use std::{sync::Arc, time::Duration};

use proto::{
    envoy::{
        config::core::v3 as core,
        extensions::access_loggers::{grpc::v3 as pb, open_telemetry::v3 as otel},
    },
    opentelemetry::proto::common::v1::{AnyValue, KeyValueList, any_value},
};

use super::{
    access_log::formatters,
    common::{above_zero, enumeration},
    ext_authz::grpc_call,
    tag::custom_tag,
    tracing::{detected, http_service_of},
};
use crate::plan::{
    access_log::{Delivery, GrpcLog, JsonNode, OpenTelemetryLog},
    error::{At, Step, unsupported},
    ext_authz::GrpcCall,
    format::{Part, Template},
    format_sources::Formatters,
    tracing::Collector,
};

/// Envoy's default of `buffer_flush_interval`.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// Envoy's default of `buffer_size_bytes`.
const BUFFER_SIZE: usize = 16 * 1024;

/// `HttpGrpcAccessLogConfig`.
pub(super) fn http(at: At<'_>, m: &pb::HttpGrpcAccessLogConfig) -> Step<GrpcLog> {
    let pb::HttpGrpcAccessLogConfig {
        common_config,
        additional_request_headers_to_log,
        additional_response_headers_to_log,
        additional_response_trailers_to_log,
    } = m;
    let log = at.required("common_config", common_config, common)?;
    Ok(GrpcLog {
        http: true,
        request_headers: names(additional_request_headers_to_log),
        response_headers: names(additional_response_headers_to_log),
        response_trailers: names(additional_response_trailers_to_log),
        ..log
    })
}

/// `TcpGrpcAccessLogConfig`.
pub(super) fn tcp(at: At<'_>, m: &pb::TcpGrpcAccessLogConfig) -> Step<GrpcLog> {
    at.required("common_config", &m.common_config, common)
}

/// `OpenTelemetryAccessLogConfig`.
pub(super) fn open_telemetry(
    at: At<'_>,
    m: &otel::OpenTelemetryAccessLogConfig,
) -> Step<OpenTelemetryLog> {
    let otel::OpenTelemetryAccessLogConfig {
        common_config,
        disable_builtin_labels,
        resource_attributes,
        body,
        attributes,
        stat_prefix,
        formatters: formats,
        http_service,
        grpc_service,
        resource_detectors,
        log_name,
        buffer_flush_interval,
        buffer_size_bytes,
        filter_state_objects_to_log,
        custom_tags,
    } = m;
    let more = formatters(&at, formats);
    let common = at.optional("common_config", common_config, common)?;
    if let Some(common) = &common
        && (!common.filter_state.is_empty() || !common.tags.is_empty())
    {
        return Err(at.field("common_config").not_implemented(
            "filter_state_objects_to_log and custom_tags are not implemented here; write them beside common_config",
        ));
    }
    let collector = match (&common, grpc_service, http_service) {
        (Some(common), None, None) => Collector::Grpc(common.delivery.service.clone()),
        (None, Some(m), None) => Collector::Grpc(patient_call(at.field("grpc_service"), m)?),
        (None, None, Some(m)) => Collector::Http(http_service_of(at.field("http_service"), m)?),
        _ => {
            return Err(at.error("needs one of grpc_service, http_service, common_config"));
        }
    };
    let flush_interval = above_zero(&at, "buffer_flush_interval", buffer_flush_interval)?;
    let delivery = common.as_ref().map(|common| &common.delivery);
    let named = common.as_ref().map(|common| &*common.log_name);
    Ok(OpenTelemetryLog {
        collector,
        flush_interval: flush_interval
            .or(delivery.map(|delivery| delivery.flush_interval))
            .unwrap_or(FLUSH_INTERVAL),
        buffer_size: match (buffer_size_bytes, delivery) {
            (Some(bytes), _) => *bytes as usize,
            (None, Some(delivery)) => delivery.buffer_size,
            (None, None) => BUFFER_SIZE,
        },
        log_name: match log_name.as_str() {
            "" => named.unwrap_or_default().into(),
            name => name.into(),
        },
        detected: detected(&at, resource_detectors),
        filter_state: names_as_written(filter_state_objects_to_log),
        tags: at.each("custom_tags", custom_tags, custom_tag),
        builtin_labels: !disable_builtin_labels,
        resource: at
            .optional("resource_attributes", resource_attributes, |at, m| {
                members(&at, m, None)
            })?
            .unwrap_or_default(),
        body: at.optional("body", body, |at, m| node(&at, m, Some(&more)))?,
        attributes: at
            .optional("attributes", attributes, |at, m| {
                members(&at, m, Some(&more))
            })?
            .unwrap_or_default(),
        stat_prefix: stat_prefix.as_str().into(),
    })
}

fn common(at: At<'_>, m: &pb::CommonGrpcAccessLogConfig) -> Step<GrpcLog> {
    let pb::CommonGrpcAccessLogConfig {
        log_name,
        grpc_service,
        transport_api_version,
        buffer_flush_interval,
        buffer_size_bytes,
        filter_state_objects_to_log,
        grpc_stream_retry_policy,
        custom_tags,
    } = m;
    unsupported!(at, grpc_stream_retry_policy);
    match enumeration(&at, "transport_api_version", *transport_api_version)? {
        // Istio leaves it out, as only one is left.
        core::ApiVersion::V3 | core::ApiVersion::Auto => {}
        core::ApiVersion::V2 => {
            return Err(at.field("transport_api_version").error("must be V3"));
        }
    }
    let flush_interval = above_zero(&at, "buffer_flush_interval", buffer_flush_interval)?;
    Ok(GrpcLog {
        delivery: Delivery {
            service: at.required("grpc_service", grpc_service, patient_call)?,
            flush_interval: flush_interval.unwrap_or(FLUSH_INTERVAL),
            buffer_size: buffer_size_bytes.map_or(BUFFER_SIZE, |bytes| bytes as usize),
        },
        log_name: at.text("log_name", log_name)?,
        http: false,
        request_headers: Vec::new(),
        response_headers: Vec::new(),
        response_trailers: Vec::new(),
        filter_state: names_as_written(filter_state_objects_to_log),
        tags: at.each("custom_tags", custom_tags, custom_tag),
    })
}

/// A service that nobody waits for: without a timeout of its own it has 5 s to take a batch.
pub(super) fn patient_call(at: At<'_>, m: &core::GrpcService) -> Step<GrpcCall> {
    let mut call = grpc_call(at, m)?;
    if m.timeout.is_none() {
        call.timeout = Some(Duration::from_secs(5));
    }
    Ok(call)
}

fn names_as_written(list: &[String]) -> Vec<Arc<str>> {
    list.iter().map(|name| name.as_str().into()).collect()
}

fn names(list: &[String]) -> Vec<Arc<str>> {
    let lower = |name: &String| name.to_ascii_lowercase().into();
    list.iter().map(lower).collect()
}

fn members(
    at: &At<'_>,
    m: &KeyValueList,
    formats: Option<&Formatters>,
) -> Step<Vec<(Arc<str>, JsonNode)>> {
    m.values
        .iter()
        .enumerate()
        .map(|(index, m)| {
            let at = at.field("values");
            let at = at.index(index);
            let node = at.required("value", &m.value, |at, m| node(&at, m, formats))?;
            Ok((m.key.as_str().into(), node))
        })
        .collect()
}

/// A value whose texts hold operators, or are fixed where none is allowed.
fn node(at: &At<'_>, m: &AnyValue, formats: Option<&Formatters>) -> Step<JsonNode> {
    use any_value::Value as V;
    Ok(match &m.value {
        Some(V::StringValue(text)) => JsonNode::Template(match formats {
            None => Template {
                parts: vec![Part::Text(text.as_str().into())],
            },
            Some(formats) => Template::parse_with(text, formats)
                .map_err(|why| at.field("string_value").error(why))?,
        }),
        Some(V::BoolValue(yes)) => JsonNode::Literal(yes.to_string().into()),
        Some(V::IntValue(number)) => JsonNode::Literal(number.to_string().into()),
        // With a point in any case, by which it is known again.
        Some(V::DoubleValue(number)) => JsonNode::Literal(format!("{number:?}").into()),
        Some(V::ArrayValue(list)) => JsonNode::List(
            list.values
                .iter()
                .map(|m| node(at, m, formats))
                .collect::<Step<_>>()?,
        ),
        Some(V::KvlistValue(list)) => JsonNode::Object(
            members(at, list, formats)?
                .into_iter()
                .map(|(name, node)| ((&*name).into(), node))
                .collect(),
        ),
        Some(V::BytesValue(_) | V::StringValueStrindex(_)) => {
            return Err(at
                .field("bytes_value")
                .not_implemented("is not implemented; write string_value"));
        }
        None => JsonNode::Literal("null".into()),
    })
}
