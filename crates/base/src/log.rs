//! Logging of the programs: one line an event on standard error, in the columns that Istio's logs have.

use std::{fmt, io::IsTerminal};

use jiff::Timestamp;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Starts logging at `level` (`info`, or a filter such as `info,control=debug`); `RUST_LOG` wins where it is set.
/// A second call has no effect.
pub fn init(level: &str) {
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(level))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    // It fails only where logging has been started already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(Columns)
        .try_init();
}

/// `TIME<tab>level<tab>target<tab>message key=value`.
struct Columns;

impl<S, N> FormatEvent<S, N> for Columns
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::DEBUG => "debug",
            Level::ERROR => "error",
            Level::INFO => "info",
            Level::TRACE => "trace",
            Level::WARN => "warn",
        };
        let target = event
            .metadata()
            .target()
            .split("::")
            .next()
            .unwrap_or_default();
        let target = target.strip_prefix("outrigger_").unwrap_or(target);
        write!(out, "{:.6}\t{level}\t{target}\t", Timestamp::now())?;
        context.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
