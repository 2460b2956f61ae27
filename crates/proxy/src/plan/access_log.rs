//! Access logs: which requests are logged, in which form, to where.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{
    cel::Expr,
    ext_authz::GrpcCall,
    format::Template,
    matcher::{Fraction, HeaderMatcher, MetadataMatcher},
    tag::CustomTag,
    tracing::Collector,
};

/// `envoy.config.accesslog.v3.AccessLog`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLog {
    /// As configured.
    pub name: Arc<str>,
    /// Only what it lets through is logged.
    pub filter: Option<AccessLogFilter>,
    /// What is written, and where to.
    pub output: LogOutput,
}

/// What a log writes, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogOutput {
    /// Lines.
    Lines {
        /// Where to.
        sink: LogSink,
        /// What a line looks like; the newline is part of it.
        format: LogFormat,
    },
    /// Records for an `envoy.service.accesslog.v3.AccessLogService`.
    Grpc(Arc<GrpcLog>),
    /// Records for a collector of OpenTelemetry.
    OpenTelemetry(Arc<OpenTelemetryLog>),
}

/// How records get to a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Who takes them.
    pub service: GrpcCall,
    /// The longest that one waits for others. Default 1 s.
    pub flush_interval: Duration,
    /// Bytes that wait for others at most. Default 16 KiB; 0 lets none wait.
    pub buffer_size: usize,
}

/// `HttpGrpcAccessLogConfig` or `TcpGrpcAccessLogConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcLog {
    /// How records get there.
    pub delivery: Delivery,
    /// What the service knows this log by.
    pub log_name: Arc<str>,
    /// Records are of requests; else of connections.
    pub http: bool,
    /// Headers of the request that a record has.
    pub request_headers: Vec<Arc<str>>,
    /// Headers of the response that a record has.
    pub response_headers: Vec<Arc<str>>,
    /// Trailers of the response that a record has.
    pub response_trailers: Vec<Arc<str>>,
    /// Filter state that a record has.
    pub filter_state: Vec<Arc<str>>,
    /// Tags that a record has.
    pub tags: Vec<CustomTag>,
}

/// `OpenTelemetryAccessLogConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenTelemetryLog {
    /// Who takes records.
    pub collector: Collector,
    /// The longest that one waits for others. Default 1 s.
    pub flush_interval: Duration,
    /// Bytes that wait for others at most. Default 16 KiB; 0 lets none wait.
    pub buffer_size: usize,
    /// What the collector knows this log by.
    pub log_name: Arc<str>,
    /// The resource says log, zone, cluster and node.
    pub builtin_labels: bool,
    /// What was found out about it (`resource_detectors`); counts before the labels.
    pub detected: Vec<(Arc<str>, Arc<str>)>,
    /// What else it says; texts are taken as they are. Counts before all others.
    pub resource: Vec<(Arc<str>, JsonNode)>,
    /// A record's body.
    pub body: Option<JsonNode>,
    /// A record's attributes.
    pub attributes: Vec<(Arc<str>, JsonNode)>,
    /// Filter state that becomes attributes, as JSON.
    pub filter_state: Vec<Arc<str>>,
    /// Tags that become attributes.
    pub tags: Vec<CustomTag>,
    /// Of its stats.
    pub stat_prefix: Arc<str>,
}

/// Where lines go. Opening, buffering and flushing are the live side's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LogSink {
    /// The process's standard output.
    Stdout,
    /// The process's standard error.
    Stderr,
    /// Appended to a file.
    File(PathBuf),
}

/// What a line looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogFormat {
    /// Text; absent values are printed as `-`.
    Text {
        /// Ends with a newline where the configuration says so.
        template: Template,
        /// Absent values are printed as nothing instead of `-`.
        omit_empty_values: bool,
    },
    /// One JSON object and a newline.
    Json {
        /// Its members.
        root: JsonNode,
        /// Members with absent values are left out instead of null.
        omit_empty_values: bool,
    },
}

/// A JSON value whose strings may hold operators. A string that is one operator alone keeps the operator's type
/// (numbers stay numbers).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JsonNode {
    /// Members in the order they are printed (sorted, as Envoy does).
    Object(Vec<(Box<str>, JsonNode)>),
    /// A list.
    List(Vec<JsonNode>),
    /// Text with operators.
    Template(Template),
    /// Printed as it is: numbers, true, false, null (already JSON text).
    Literal(Box<str>),
}

/// Which requests or connections are logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogFilter {
    /// Response status compared.
    StatusCode(Comparison),
    /// Duration in milliseconds compared.
    Duration(Comparison),
    /// No health checks.
    NotHealthCheck,
    /// Traced requests.
    Traceable,
    /// A share of all.
    Fraction {
        /// The share.
        fraction: Fraction,
        /// Draws independently of the request id.
        use_independent_randomness: bool,
    },
    /// All of them.
    And(Vec<AccessLogFilter>),
    /// One of them.
    Or(Vec<AccessLogFilter>),
    /// A request header.
    Header(HeaderMatcher),
    /// An expression that must hold (`envoy.access_loggers.extension_filters.cel`).
    Expression(Arc<Expr>),
    /// One of these response flags in their short form (`NR`, `UF` …); empty: any flag.
    ResponseFlags(Vec<Arc<str>>),
    /// gRPC status.
    GrpcStatus {
        /// Numbers 0–16.
        statuses: Vec<u8>,
        /// All but these.
        exclude: bool,
    },
    /// Dynamic metadata.
    Metadata {
        /// The condition.
        matcher: MetadataMatcher,
        /// Answer when the key is missing. Default true.
        match_if_key_not_found: bool,
    },
    /// The moment of the line.
    LogType {
        /// As `%ACCESS_LOG_TYPE%` prints them.
        types: Vec<&'static str>,
        /// All but these.
        exclude: bool,
    },
}

/// A number compared with a fixed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// How.
    pub op: ComparisonOp,
    /// With what.
    pub value: u32,
}

/// How numbers are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComparisonOp {
    /// Equal.
    Eq,
    /// Greater or equal.
    Ge,
    /// Less or equal.
    Le,
    /// Not equal.
    Ne,
}

impl Comparison {
    /// Whether `left OP value` holds.
    pub fn holds(self, left: u64) -> bool {
        let right = u64::from(self.value);
        match self.op {
            ComparisonOp::Eq => left == right,
            ComparisonOp::Ge => left >= right,
            ComparisonOp::Le => left <= right,
            ComparisonOp::Ne => left != right,
        }
    }
}
