//! Spans for a collector of OpenTelemetry: `TraceService/Export`, over gRPC or as the body of a POST.

use std::sync::Arc;

use prost::Message;
use proto::opentelemetry::proto::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1::{
        ResourceSpans, ScopeSpans, Span as SpanMessage, Status, span::SpanKind, status::StatusCode,
    },
};

use super::{deliver, open_telemetry::nanos};
use crate::{
    plan::ext_authz::GrpcCall,
    trace::{Kind, Span},
    worker::Worker,
};

/// Sends spans to a gRPC service.
pub(crate) async fn export(
    worker: &Worker,
    to: &GrpcCall,
    spans: &[Span],
    service: &str,
    resource: &[(Arc<str>, Arc<str>)],
) -> Result<(), String> {
    let message = message(spans, service, resource);
    let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let sent = deliver(worker, to, path, &message).await;
    sent.map_err(|error| error.to_string())
}

/// The body of a POST.
pub(crate) fn encoded(spans: &[Span], service: &str, resource: &[(Arc<str>, Arc<str>)]) -> Vec<u8> {
    message(spans, service, resource).encode_to_vec()
}

#[allow(deprecated)] // The status has an older number beside its own.
fn message(
    spans: &[Span],
    service: &str,
    resource: &[(Arc<str>, Arc<str>)],
) -> ExportTraceServiceRequest {
    let mut attributes = vec![attribute("service.name", service)];
    attributes.extend(resource.iter().map(|(key, value)| attribute(key, value)));
    let spans = spans.iter().map(|span| {
        let start = nanos(span.start);
        SpanMessage {
            trace_id: span.trace.to_be_bytes().to_vec(),
            span_id: span.id.to_be_bytes().to_vec(),
            parent_span_id: match span.parent {
                Some(parent) => parent.to_be_bytes().to_vec(),
                None => Vec::new(),
            },
            trace_state: span.state.clone(),
            name: span.name.clone(),
            kind: match span.kind {
                Kind::Client => SpanKind::Client,
                Kind::Server => SpanKind::Server,
            }
            .into(),
            start_time_unix_nano: start,
            end_time_unix_nano: start + span.lasted.as_nanos() as u64,
            attributes: span
                .tags
                .iter()
                .map(|(key, value)| attribute(key, value))
                .collect(),
            status: span.failed.then(|| Status {
                code: StatusCode::Error.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    });
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource {
                attributes,
                ..Default::default()
            }),
            scope_spans: vec![ScopeSpans {
                scope: Some(InstrumentationScope {
                    name: "outrigger".to_owned(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    ..Default::default()
                }),
                spans: spans.collect(),
                ..Default::default()
            }],
            ..Default::default()
        }],
    }
}

fn attribute(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue {
            value: Some(any_value::Value::StringValue(value.to_owned())),
        }),
        ..Default::default()
    }
}
