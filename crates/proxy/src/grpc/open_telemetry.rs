//! Records for a collector of OpenTelemetry: `LogsService/Export`.

use std::{rc::Rc, sync::Arc, time::SystemTime};

use prost::Message;
use proto::opentelemetry::proto::{
    collector::logs::v1::ExportLogsServiceRequest,
    common::v1::{AnyValue, ArrayValue, KeyValue, KeyValueList, any_value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs},
    resource::v1::Resource,
};
use serde_json::Value;

use super::deliver;
use crate::{
    access_log::{self, tag},
    http::Exchange,
    plan::{
        access_log::{JsonNode, OpenTelemetryLog},
        bootstrap::Node,
        format::Part,
        tracing::Collector,
    },
    report::{Batches, LOGS, Limits},
    trace,
    worker::Worker,
};

/// A log on one worker.
#[derive(Debug)]
pub(crate) struct Log {
    plan: Arc<OpenTelemetryLog>,
    batches: Rc<Batches<LogRecord>>,
}

impl Log {
    pub(crate) fn new(plan: Arc<OpenTelemetryLog>, worker: &Worker) -> Self {
        let prefix = match &*plan.stat_prefix {
            "" => String::new(),
            prefix => format!("{prefix}."),
        };
        let scope = format!("access_logs.open_telemetry_access_log.{prefix}");
        let limits = Limits::of_log(plan.flush_interval, plan.buffer_size);
        let of = plan.clone();
        let send = move |worker, logs| send(of.clone(), worker, logs);
        Self {
            plan,
            batches: Batches::new(worker, limits, &scope, LOGS, send),
        }
    }

    /// Puts the record of a request or connection by.
    pub(crate) fn write(&self, exchange: &Exchange<'_>) {
        let plan = &*self.plan;
        let record = LogRecord {
            time_unix_nano: nanos(exchange.progress.start_time),
            body: plan.body.as_ref().map(|node| value(node, exchange)),
            attributes: attributes(plan, exchange),
            trace_id: exchange
                .trace
                .map_or_else(Vec::new, |trace| trace.id.to_be_bytes().into()),
            span_id: exchange
                .trace
                .map_or_else(Vec::new, |trace| trace.span.to_be_bytes().into()),
            ..Default::default()
        };
        let size = record.encoded_len();
        self.batches.add(record, size);
    }
}

/// Of a record: as configured, then the filter state, then the tags. What has no value is left out.
fn attributes(plan: &OpenTelemetryLog, exchange: &Exchange<'_>) -> Vec<KeyValue> {
    let mut all = pairs(&plan.attributes, exchange);
    let state = plan.filter_state.iter();
    all.extend(state.filter_map(|key| Some(attribute(key, &exchange.state(key)?.to_string()))));
    let tags = plan.tags.iter();
    all.extend(tags.filter_map(|tag| Some(attribute(&tag.name, &tag::value(tag, exchange)?))));
    all
}

/// Of the resource; of what is said twice the later counts.
fn resource(plan: &OpenTelemetryLog, node: &Node) -> Vec<KeyValue> {
    let mut all: Vec<KeyValue> = Vec::new();
    let mut put = |new: KeyValue| match all.iter_mut().find(|old| old.key == new.key) {
        Some(old) => *old = new,
        None => all.push(new),
    };
    if plan.builtin_labels {
        for (key, text) in [
            ("log_name", &*plan.log_name),
            ("zone_name", &*node.locality.zone),
            ("cluster_name", &*node.cluster),
            ("node_name", &*node.id),
        ] {
            put(attribute(key, text));
        }
    }
    let detected = plan.detected.iter();
    detected.for_each(|(key, value)| put(attribute(key, value)));
    for (key, node) in &plan.resource {
        put(KeyValue {
            key: key.to_string(),
            value: Some(fixed(node)),
            ..Default::default()
        });
    }
    all
}

async fn send(plan: Arc<OpenTelemetryLog>, worker: Rc<Worker>, logs: Vec<LogRecord>) -> bool {
    let message = ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(Resource {
                attributes: resource(&plan, &worker.bootstrap.node),
                ..Default::default()
            }),
            scope_logs: vec![ScopeLogs {
                log_records: logs,
                ..Default::default()
            }],
            ..Default::default()
        }],
    };
    let path = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
    let sent = match &plan.collector {
        Collector::Grpc(to) => {
            let sent = deliver(&worker, to, path, &message).await;
            sent.map_err(|error| error.to_string())
        }
        Collector::Http(to) => {
            let body = message.encode_to_vec().into();
            trace::post(&worker, to, "application/x-protobuf", body).await
        }
    };
    if let Err(error) = &sent {
        tracing::debug!(log = &*plan.log_name, error, "access log records are lost");
    }
    sent.is_ok()
}

/// Nanoseconds since 1970.
pub(super) fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_nanos() as u64
}

fn attribute(key: &str, text: &str) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(string(text.to_owned())),
        ..Default::default()
    }
}

fn string(text: String) -> AnyValue {
    AnyValue {
        value: Some(any_value::Value::StringValue(text)),
    }
}

fn pairs(list: &[(Arc<str>, JsonNode)], exchange: &Exchange<'_>) -> Vec<KeyValue> {
    let one = |(key, node): &(Arc<str>, JsonNode)| KeyValue {
        key: key.to_string(),
        value: Some(value(node, exchange)),
        ..Default::default()
    };
    list.iter().map(one).collect()
}

/// A value of a record: texts are filled, the others are what they are.
fn value(node: &JsonNode, exchange: &Exchange<'_>) -> AnyValue {
    filled(node, &|node| {
        let mut text = Vec::new();
        access_log::fill(node, exchange, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    })
}

/// A value of the resource, which no request changes.
fn fixed(node: &JsonNode) -> AnyValue {
    filled(node, &|template| {
        let text = template.parts.iter().map(|part| match part {
            Part::Text(text) => &**text,
            Part::Operator(_) => "",
        });
        text.collect()
    })
}

fn filled(node: &JsonNode, fill: &impl Fn(&crate::plan::format::Template) -> String) -> AnyValue {
    use any_value::Value as V;
    let value = match node {
        JsonNode::Template(template) => V::StringValue(fill(template)),
        JsonNode::List(list) => V::ArrayValue(ArrayValue {
            values: list.iter().map(|node| filled(node, fill)).collect(),
        }),
        JsonNode::Object(members) => V::KvlistValue(KeyValueList {
            values: members
                .iter()
                .map(|(key, node)| KeyValue {
                    key: key.to_string(),
                    value: Some(filled(node, fill)),
                    ..Default::default()
                })
                .collect(),
        }),
        JsonNode::Literal(text) => match serde_json::from_str(text) {
            Ok(Value::Bool(yes)) => V::BoolValue(yes),
            Ok(Value::Number(number)) => match number.as_i64() {
                Some(whole) => V::IntValue(whole),
                None => V::DoubleValue(number.as_f64().unwrap_or_default()),
            },
            _ => return AnyValue::default(),
        },
    };
    AnyValue { value: Some(value) }
}
