//! Access logs: one line for each request or connection that their filters let through.
//!
//! `format` fills templates (route headers use it too), `json` writes structured lines, `filter`
//! decides, `sink` collects lines per worker and hands them to a writer thread. Records for services are made in
//! [`crate::grpc`]; `tag` tells the values of their tags.

mod cel;
mod filter;
pub(crate) mod format;
mod grpc_status;
mod json;
mod sink;
pub(crate) mod tag;
mod time;
mod tls;

use std::rc::Rc;

use crate::{
    grpc,
    http::Exchange,
    plan::{
        access_log::{AccessLog, AccessLogFilter, LogFormat, LogOutput},
        cel::Expr,
        format::Template,
    },
    worker::Worker,
};

pub(crate) use sink::{Sink, reopen, settle};

/// An access log on one worker.
#[derive(Debug)]
pub(crate) struct Logger {
    filter: Option<AccessLogFilter>,
    output: Output,
}

/// What it writes, and where to.
#[derive(Debug)]
enum Output {
    Lines(LogFormat, Rc<Sink>),
    Grpc(grpc::access_log::Log),
    OpenTelemetry(grpc::open_telemetry::Log),
}

impl Logger {
    /// Makes the logs live; logs to the same file share a buffer.
    pub(crate) fn all(plans: &[AccessLog], worker: &Worker) -> Vec<Logger> {
        let interval = worker.options.file_flush_interval;
        plans
            .iter()
            .map(|plan| Logger {
                filter: plan.filter.clone(),
                output: match &plan.output {
                    LogOutput::Lines { sink, format } => {
                        Output::Lines(format.clone(), Sink::open(sink, interval))
                    }
                    LogOutput::Grpc(plan) => {
                        Output::Grpc(grpc::access_log::Log::new(plan.clone(), worker))
                    }
                    LogOutput::OpenTelemetry(plan) => {
                        Output::OpenTelemetry(grpc::open_telemetry::Log::new(plan.clone(), worker))
                    }
                },
            })
            .collect()
    }

    /// Writes a line, if the filter lets the request through.
    pub(crate) fn log(&self, exchange: &Exchange<'_>, random: u64) {
        if self
            .filter
            .as_ref()
            .is_some_and(|plan| !filter::passes(plan, exchange, random))
        {
            return;
        }
        match &self.output {
            Output::Lines(format, sink) => {
                sink.write(|line| write(format, exchange, Lines::One, line));
            }
            Output::Grpc(log) => log.write(exchange),
            Output::OpenTelemetry(log) => log.write(exchange),
        }
    }
}

/// Whether values may hold line ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lines {
    /// A log has one line a request, whatever a client writes into its headers.
    One,
    /// A body may have several.
    Any,
}

/// Fills a format.
pub(crate) fn write(format: &LogFormat, exchange: &Exchange<'_>, lines: Lines, out: &mut Vec<u8>) {
    match format {
        LogFormat::Text {
            template,
            omit_empty_values,
        } => format::text(template, exchange, *omit_empty_values, lines, out),
        LogFormat::Json {
            root,
            omit_empty_values,
        } => {
            json::write(root, exchange, *omit_empty_values, out);
            out.push(b'\n');
        }
    }
}

/// Whether a filter lets a request through.
pub(crate) use filter::passes;

/// The value of an expression as text, as `%CEL(…)%` prints it; `None` where it has none.
pub(crate) fn expression(expression: &Expr, exchange: &Exchange<'_>) -> Option<String> {
    let mut out = Vec::new();
    match cel::write(expression, false, exchange, &mut out) {
        format::Presence::Absent => None,
        _ => Some(String::from_utf8_lossy(&out).into_owned()),
    }
}

/// Fills a text with operators; what is absent is `-`.
pub(crate) fn fill(template: &Template, exchange: &Exchange<'_>, out: &mut Vec<u8>) {
    format::text(template, exchange, false, Lines::Any, out);
}
