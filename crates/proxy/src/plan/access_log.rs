//! Access logs: which requests are logged, in which form, to where.

use std::{path::PathBuf, sync::Arc};

use super::{
    format::Template,
    matcher::{Fraction, HeaderMatcher, MetadataMatcher},
};

/// `envoy.config.accesslog.v3.AccessLog`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLog {
    /// As configured.
    pub name: Arc<str>,
    /// Only what it lets through is logged.
    pub filter: Option<AccessLogFilter>,
    /// Where to.
    pub sink: LogSink,
    /// What a line looks like; the newline is part of it.
    pub format: LogFormat,
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
