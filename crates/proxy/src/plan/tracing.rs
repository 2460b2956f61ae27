//! Tracing: which requests have spans, what is on them, and who collects them.

use std::{sync::Arc, time::Duration};

use super::{ext_authz::GrpcCall, format::Template, matcher::Percent, tag::CustomTag};

/// `HttpConnectionManager.Tracing`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracing {
    /// Share of requests with x-client-trace-id that are traced.
    pub client_sampling: Percent,
    /// Share of requests that are traced.
    pub random_sampling: Percent,
    /// Upper bound of all.
    pub overall_sampling: Percent,
    /// Bytes of a path that a span tells. Default 256.
    pub max_path_tag_length: usize,
    /// Tags beside those that every span has.
    pub tags: Vec<CustomTag>,
    /// Servers are told nothing of the trace.
    pub no_context_propagation: bool,
    /// A span of its own for what happens upstream.
    pub spawn_upstream_span: bool,
    /// What a span is called, in place of the route's decorator.
    pub operation: Option<Template>,
    /// What the span of the upstream is called.
    pub upstream_operation: Option<Template>,
    /// Who collects spans; `None`: whom the bootstrap says.
    pub provider: Option<Arc<Tracer>>,
}

/// Who collects spans, and how traces are told to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracer {
    /// What is spoken.
    pub kind: TracerKind,
    /// Where to.
    pub collector: Collector,
}

/// What is spoken, and in which headers traces are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TracerKind {
    /// `envoy.config.trace.v3.OpenTelemetryConfig`: OTLP, W3C trace context.
    OpenTelemetry {
        /// `service.name`. Default `unknown_service:envoy`.
        service_name: Arc<str>,
        /// Further attributes of the resource.
        resource: Vec<(Arc<str>, Arc<str>)>,
    },
    /// `envoy.config.trace.v3.ZipkinConfig`: JSON of version 2, B3.
    Zipkin {
        /// Traces that begin here have identifiers of 128 bits.
        wide: bool,
        /// The span of a server is that of its client. Default true.
        shared: bool,
        /// W3C trace context is understood and told, too.
        w3c: bool,
    },
}

/// Who collects spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Collector {
    /// A gRPC service.
    Grpc(GrpcCall),
    /// An HTTP server.
    Http(HttpCollector),
}

/// An HTTP server that collects spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCollector {
    /// Where it is.
    pub cluster: Arc<str>,
    /// Its name.
    pub authority: Arc<str>,
    /// Where it takes spans.
    pub path: Arc<str>,
    /// Headers of each call.
    pub headers: Vec<(Arc<str>, Arc<str>)>,
    /// How long one may take. Default 5 s.
    pub timeout: Duration,
}
