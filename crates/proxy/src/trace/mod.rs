//! Spans: what others tell of a trace, what we tell of it, and the record of our part.
//!
//! Every request has its place in a trace, which is told upstream whether the trace is recorded or not; a span is made
//! only of one that is recorded. `context` reads and writes headers, `span` says what a span tells, `zipkin` is one form
//! of it and [`crate::grpc::spans`] the other.

mod context;
mod span;
mod zipkin;

use std::{rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use outrigger_http::{Method, RequestHead, Version};

pub(crate) use context::Trace;
pub(crate) use span::{Kind, Span};

use crate::{
    access_log::fill,
    grpc,
    http::{Exchange, side_call},
    plan::{
        listener::TrafficDirection,
        tracing::{Collector, HttpCollector, Tracer as Plan, TracerKind, Tracing},
    },
    report::{Batches, Limits},
    worker::Worker,
};

/// Traces of one connection manager on one worker.
#[derive(Debug)]
pub(crate) struct Tracer {
    plan: Arc<Plan>,
    spans: Rc<Batches<Span>>,
}

impl Tracer {
    /// `None` where nobody collects spans.
    pub(crate) fn new(tracing: Option<&Tracing>, worker: &Worker) -> Option<Self> {
        let plan = tracing?
            .provider
            .as_ref()
            .or(worker.bootstrap.tracer.as_ref())?;
        let (name, lost) = match plan.kind {
            TracerKind::OpenTelemetry { .. } => ("tracing.opentelemetry", "spans_dropped"),
            TracerKind::Zipkin { .. } => ("tracing.zipkin", "reports_dropped"),
        };
        let number = |key: &str, default| {
            let number = worker.bootstrap.runtime_number(&format!("{name}.{key}"));
            number.unwrap_or(default)
        };
        let limits = Limits {
            interval: Duration::from_millis(number("flush_interval_ms", 1000).max(1)),
            size: usize::MAX,
            count: number("min_flush_spans", 100).max(1) as usize,
        };
        let scope = format!("{name}.");
        let of = plan.clone();
        let send = move |worker, spans| send(of.clone(), worker, spans);
        Some(Self {
            plan: plan.clone(),
            spans: Batches::new(worker, limits, &scope, ["spans_sent", lost], send),
        })
    }

    /// Finds the place of a request in its trace, or begins one.
    pub(crate) fn begin(&self, exchange: &mut Exchange<'_>, worker: &Worker) {
        let trace = Trace::of(&self.plan.kind, exchange, worker);
        exchange.trace = Some(trace);
    }

    /// Tells an attempt's server about the trace.
    pub(crate) fn inject(&self, tracing: &Tracing, exchange: &mut Exchange<'_>, worker: &Worker) {
        let Some(trace) = &mut exchange.trace else {
            return;
        };
        if tracing.spawn_upstream_span {
            trace.child = Some(context::new_id(worker));
        }
        if !tracing.no_context_propagation {
            trace.tell(&self.plan.kind, &mut exchange.request.headers);
        }
    }

    /// Records a request that is over.
    pub(crate) fn finish(&self, tracing: &Tracing, exchange: &Exchange<'_>, worker: &Worker) {
        let Some(trace) = exchange.trace.filter(|trace| trace.sampled) else {
            return;
        };
        let outbound = exchange.connection.listener.traffic_direction == TrafficDirection::Outbound;
        let kind = match outbound && !tracing.spawn_upstream_span {
            true => Kind::Client,
            false => Kind::Server,
        };
        let name = name(tracing, exchange, outbound);
        let own = Span::of_request(trace, kind, name, tracing, exchange, worker);
        self.spans.add(own, 0);
        if trace.child.is_some() && exchange.upstream.host.is_some() {
            let name = match &tracing.upstream_operation {
                Some(template) => filled(template, exchange),
                None => {
                    let cluster = exchange.upstream.cluster_name();
                    format!("router {} egress", cluster.unwrap_or_default())
                }
            };
            self.spans.add(Span::of_upstream(trace, name, exchange), 0);
        }
    }
}

/// What a span is called: as the configuration says, as the peer on the application's side has called it, as the route
/// says, or after its direction.
fn name(tracing: &Tracing, exchange: &Exchange<'_>, outbound: bool) -> String {
    if let Some(template) = &tracing.operation {
        return filled(template, exchange);
    }
    if let Some(name) = &exchange.operation {
        return name.to_string();
    }
    if let Some(decorator) = exchange
        .route
        .route()
        .and_then(|route| route.decorator.as_ref())
    {
        return decorator.operation.to_string();
    }
    match outbound {
        true => format!("egress {}", exchange.request.authority()),
        false => "ingress".to_owned(),
    }
}

fn filled(template: &crate::plan::format::Template, exchange: &Exchange<'_>) -> String {
    let mut text = Vec::new();
    fill(template, exchange, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

async fn send(plan: Arc<Plan>, worker: Rc<Worker>, spans: Vec<Span>) -> bool {
    let sent = match (&plan.kind, &plan.collector) {
        (TracerKind::Zipkin { wide, .. }, Collector::Http(to)) => {
            let body = zipkin::report(&spans, *wide, &worker.bootstrap.node.cluster);
            post(&worker, to, "application/json", body.into()).await
        }
        (
            TracerKind::OpenTelemetry {
                service_name,
                resource,
            },
            Collector::Http(to),
        ) => {
            let body = grpc::spans::encoded(&spans, service_name, resource);
            post(&worker, to, "application/x-protobuf", body.into()).await
        }
        (
            TracerKind::OpenTelemetry {
                service_name,
                resource,
            },
            Collector::Grpc(to),
        ) => grpc::spans::export(&worker, to, &spans, service_name, resource).await,
        (TracerKind::Zipkin { .. }, Collector::Grpc(_)) => Err("Zipkin has no gRPC".to_owned()),
    };
    match sent {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(spans = spans.len(), error, "spans are lost");
            false
        }
    }
}

/// Sends a body to a collector; any answer of 2xx has taken it.
pub(crate) async fn post(
    worker: &Worker,
    to: &HttpCollector,
    kind: &str,
    body: Bytes,
) -> Result<(), String> {
    let mut head = RequestHead::new(Version::Http11, Method::Post, &to.authority, &to.path);
    head.headers.set("content-type", kind);
    for (name, value) in &to.headers {
        head.headers.append(name, value.as_bytes());
    }
    let mut length = itoa::Buffer::new();
    head.headers
        .set("content-length", length.format(body.len()));
    let request = (head, body);
    let answer = side_call(
        worker,
        &to.cluster,
        request,
        false,
        MAX_ANSWER,
        Some(to.timeout),
    )
    .await;
    let status = answer.map_err(|error| error.to_string())?.head.status;
    match status {
        200..=299 => Ok(()),
        status => Err(format!("the collector answers {status}")),
    }
}

/// Bytes of an answer that says nothing, at most.
const MAX_ANSWER: usize = 64 * 1024;
