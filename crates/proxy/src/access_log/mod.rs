//! Access logs: one line for each request or connection that their filters let through.
//!
//! `format` fills templates (route headers use it too), `json` writes structured lines, `filter`
//! decides, `sink` collects lines per worker and hands them to a writer thread.

mod filter;
pub(crate) mod format;
mod json;
mod sink;
mod time;
mod tls;

use std::rc::Rc;

use crate::{
    http::Exchange,
    plan::access_log::{AccessLog, LogFormat},
    worker::Worker,
};

pub(crate) use sink::{Sink, reopen, settle};

/// An access log on one worker.
#[derive(Debug)]
pub(crate) struct Logger {
    plan: AccessLog,
    sink: Rc<Sink>,
}

impl Logger {
    /// Makes the logs live; logs to the same file share a buffer.
    pub(crate) fn all(plans: &[AccessLog], worker: &Worker) -> Vec<Logger> {
        let interval = worker.options.file_flush_interval;
        plans
            .iter()
            .map(|plan| Logger {
                plan: plan.clone(),
                sink: Sink::open(&plan.sink, interval),
            })
            .collect()
    }

    /// Writes a line, if the filter lets the request through.
    pub(crate) fn log(&self, exchange: &Exchange<'_>, random: u64) {
        if self
            .plan
            .filter
            .as_ref()
            .is_some_and(|plan| !filter::passes(plan, exchange, random))
        {
            return;
        }
        self.sink
            .write(|line| write(&self.plan.format, exchange, Lines::One, line));
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
