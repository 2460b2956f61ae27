//! The process's own log: Envoy's components, levels and patterns.
//!
//! A component is a part of the proxy (`upstream`, `router` …) with a level of its own, which `/logging` can change while
//! the process runs. Lines follow a pattern in the language of spdlog (`--log-format`).

use std::{
    fmt::{self, Write as _},
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
};

use jiff::{Timestamp, tz::TimeZone};
use tracing::{
    Event, Metadata, Subscriber,
    callsite::rebuild_interest_cache,
    field::{Field, Visit},
    metadata::LevelFilter,
    span,
    subscriber::Interest,
};

/// Envoy's default pattern.
pub const DEFAULT_FORMAT: &str = "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v";

/// Levels in Envoy's order and words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// What helps to understand a problem.
    Debug,
    /// What happens.
    Info,
    /// What may be wrong.
    Warning,
    /// What is wrong.
    Error,
    /// What ends the process.
    Critical,
    /// Nothing.
    Off,
}

const LEVELS: [(LogLevel, &str); 7] = [
    (LogLevel::Trace, "trace"),
    (LogLevel::Debug, "debug"),
    (LogLevel::Info, "info"),
    (LogLevel::Warning, "warning"),
    (LogLevel::Error, "error"),
    (LogLevel::Critical, "critical"),
    (LogLevel::Off, "off"),
];

/// Components and the modules that log under their name. Envoy's other names are known, so that a command line that
/// sets them works; nothing logs under them.
const COMPONENTS: &[(&str, &[&str])] = &[
    ("admin", &["admin"]),
    ("config", &["discovery", "plan", "bootstrap"]),
    ("conn_handler", &["listener"]),
    // Not `misc`, which Istio's injector silences: here stands why a client was refused.
    ("connection", &["transport"]),
    ("filter", &["network", "filter"]),
    ("http", &["http"]),
    ("main", &["server", "worker", "command"]),
    ("misc", &[]),
    ("router", &["router"]),
    ("upstream", &["cluster"]),
    ("alternate_protocols_cache", &[]),
    ("assert", &[]),
    ("aws", &[]),
    ("backtrace", &[]),
    ("cache_filter", &[]),
    ("client", &[]),
    ("decompression", &[]),
    ("dns", &[]),
    ("dubbo", &[]),
    ("dynamic_modules", &[]),
    ("envoy_bug", &[]),
    ("ext_authz", &[]),
    ("ext_proc", &[]),
    ("file", &[]),
    ("forward_proxy", &[]),
    ("grpc", &[]),
    ("happy_eyeballs", &[]),
    ("hc", &[]),
    ("health_checker", &[]),
    ("http2", &[]),
    ("hystrix", &[]),
    ("init", &[]),
    ("io", &[]),
    ("jwt", &[]),
    ("kafka", &[]),
    ("lua", &["lua"]),
    ("matcher", &[]),
    ("mongo", &[]),
    ("multi_connection", &[]),
    ("oauth2", &[]),
    ("pool", &[]),
    ("quic", &[]),
    ("quic_stream", &[]),
    ("rate_limit_quota", &[]),
    ("rbac", &[]),
    ("redis", &[]),
    ("rocketmq", &[]),
    ("runtime", &[]),
    ("secret", &[]),
    ("stats", &[]),
    ("stats_sinks", &[]),
    ("tap", &[]),
    ("testing", &[]),
    ("thrift", &[]),
    ("tracing", &[]),
    ("udp", &[]),
    ("wasm", &[]),
    ("websocket", &[]),
];

static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    levels: Vec<AtomicU8>,
    pattern: Vec<Part>,
    sink: Mutex<Option<File>>,
    path: Option<PathBuf>,
}

impl LogLevel {
    /// From Envoy's word; `warn` and `err` are taken, too.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "warn" => Some(Self::Warning),
            "err" => Some(Self::Error),
            word => LEVELS
                .iter()
                .find(|(_, name)| *name == word)
                .map(|(level, _)| *level),
        }
    }

    /// Envoy's word.
    pub fn as_str(self) -> &'static str {
        LEVELS[self as usize].1
    }
}

/// Starts logging; `path` is written to in place of standard error. Only the first call has an effect.
pub fn init(
    level: LogLevel,
    components: &[(String, LogLevel)],
    format: &str,
    path: Option<&Path>,
) -> io::Result<()> {
    let file = path.map(open).transpose()?;
    let levels = COMPONENTS
        .iter()
        .map(|_| AtomicU8::new(level as u8))
        .collect();
    let log = Log {
        levels,
        pattern: parse(format),
        sink: Mutex::new(file),
        path: path.map(Path::to_owned),
    };
    if LOG.set(log).is_ok() {
        for (component, level) in components {
            set(component, *level);
        }
        // It fails where something else logs already, as in tests.
        let _ = tracing::subscriber::set_global_default(Logger);
    }
    Ok(())
}

/// Opens the file of `--log-path` anew; the old one stays where that fails.
///
/// # Errors
/// The system's.
pub fn reopen() -> io::Result<()> {
    if let Some(log) = LOG.get()
        && let Some(path) = &log.path
    {
        let file = open(path)?;
        *log.sink
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(file);
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Whether there is a component of this name.
pub fn is_component(name: &str) -> bool {
    COMPONENTS.iter().any(|(component, _)| *component == name)
}

/// Every component with its level, by name.
pub fn levels() -> Vec<(&'static str, LogLevel)> {
    let mut all: Vec<_> = COMPONENTS
        .iter()
        .enumerate()
        .map(|(index, (name, _))| (*name, LEVELS[usize::from(level_of(index))].0))
        .collect();
    all.sort_unstable();
    all
}

/// Sets the level of a component; `false` where there is none of this name.
pub fn set(component: &str, level: LogLevel) -> bool {
    let Some(index) = COMPONENTS.iter().position(|(name, _)| *name == component) else {
        return false;
    };
    if let Some(log) = LOG.get() {
        log.levels[index].store(level as u8, Relaxed);
        rebuild_interest_cache();
    }
    true
}

/// Sets the level of every component.
pub fn set_all(level: LogLevel) {
    if let Some(log) = LOG.get() {
        log.levels
            .iter()
            .for_each(|of| of.store(level as u8, Relaxed));
        rebuild_interest_cache();
    }
}

fn level_of(component: usize) -> u8 {
    LOG.get().map_or(LogLevel::Info as u8, |log| {
        log.levels[component].load(Relaxed)
    })
}

/// The component of a module path, by its first part within this crate.
fn component(target: &str) -> Option<usize> {
    let mut parts = target.split("::");
    let own = parts.next() == Some("outrigger_proxy");
    let module = parts.next().unwrap_or_default();
    let found = COMPONENTS
        .iter()
        .position(|(_, modules)| own && modules.contains(&module));
    found.or_else(|| {
        let other = if target.starts_with("outrigger_http") {
            "http"
        } else {
            "misc"
        };
        target
            .starts_with("outrigger_")
            .then(|| COMPONENTS.iter().position(|(name, _)| *name == other))
            .flatten()
    })
}

fn severity(level: &tracing::Level) -> LogLevel {
    match *level {
        tracing::Level::TRACE => LogLevel::Trace,
        tracing::Level::DEBUG => LogLevel::Debug,
        tracing::Level::INFO => LogLevel::Info,
        tracing::Level::WARN => LogLevel::Warning,
        tracing::Level::ERROR => LogLevel::Error,
    }
}

/// Events to lines. There are no spans: a request's way is told by its access log.
struct Logger;

impl Subscriber for Logger {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = severity(metadata.level());
        match component(metadata.target()) {
            Some(component) => level as u8 >= level_of(component),
            // Libraries speak up only when something is wrong.
            None => level >= LogLevel::Error && metadata.is_event(),
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let lowest = (0..COMPONENTS.len())
            .map(level_of)
            .min()
            .unwrap_or_default();
        Some(match LEVELS[usize::from(lowest)].0 {
            LogLevel::Trace => LevelFilter::TRACE,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Warning => LevelFilter::WARN,
            _ => LevelFilter::ERROR,
        })
    }

    fn event(&self, event: &Event<'_>) {
        let Some(log) = LOG.get() else { return };
        let line = render(&log.pattern, event);
        let mut sink = log
            .sink
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        // There is nowhere to report that the log cannot be written.
        let _ = match &mut *sink {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().lock().write_all(line.as_bytes()),
        };
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Literal(String),
    Flag(char),
}

fn parse(format: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        match character {
            '%' => match rest.next() {
                Some('%') | None => literal.push('%'),
                Some(flag) => {
                    if !literal.is_empty() {
                        parts.push(Part::Literal(std::mem::take(&mut literal)));
                    }
                    parts.push(Part::Flag(flag));
                }
            },
            '\\' => match rest.next() {
                Some('t') => literal.push('\t'),
                Some('n') => literal.push('\n'),
                Some(other) => literal.extend(['\\', other]),
                None => literal.push('\\'),
            },
            other => literal.push(other),
        }
    }
    if !literal.is_empty() {
        parts.push(Part::Literal(literal));
    }
    parts
}

fn render(pattern: &[Part], event: &Event<'_>) -> String {
    let metadata = event.metadata();
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    let level = severity(metadata.level()).as_str();
    let mut line = String::with_capacity(160);
    for part in pattern {
        // Writing to a String cannot fail.
        let _ = match part {
            Part::Literal(text) => line.write_str(text),
            Part::Flag(flag) => match flag {
                'v' | 'j' | '_' => {
                    let mut message = Message(String::new());
                    event.record(&mut message);
                    let text = message.0;
                    match flag {
                        'v' => line.write_str(&text),
                        'j' => line.write_str(
                            serde_json::to_string(&text)
                                .unwrap_or_default()
                                .trim_matches('"'),
                        ),
                        _ => line.write_str(&text.replace('\n', "\\n")),
                    }
                }
                'l' => line.write_str(level),
                'L' => line.write_str(&level[..1].to_ascii_uppercase()),
                'n' => line
                    .write_str(component(metadata.target()).map_or("misc", |at| COMPONENTS[at].0)),
                'g' | 's' => line.write_str(metadata.file().unwrap_or_default()),
                '#' => write!(line, "{}", metadata.line().unwrap_or_default()),
                't' => write!(line, "{}", rustix::thread::gettid().as_raw_nonzero()),
                'P' => write!(line, "{}", std::process::id()),
                'e' => write!(line, "{:03}", now.millisecond()),
                'f' => write!(
                    line,
                    "{:06}",
                    i32::from(now.millisecond()) * 1000 + i32::from(now.microsecond())
                ),
                'F' => write!(line, "{:09}", now.subsec_nanosecond()),
                'E' => write!(line, "{}", now.timestamp().as_second()),
                'Y' | 'm' | 'd' | 'H' | 'M' | 'S' | 'T' | 'D' | 'z' | 'a' | 'A' | 'b' | 'B'
                | 'I' | 'p' | 'R' | 'y' => {
                    write!(line, "{}", now.strftime(&format!("%{flag}")))
                }
                other => write!(line, "%{other}"),
            },
        };
    }
    line.push('\n');
    line
}

/// The message of an event, then its fields as `name=value`.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            // The message comes first among the fields.
            let fields = std::mem::take(&mut self.0);
            write!(
                self.0,
                "{value:?}{}{}",
                if fields.is_empty() { "" } else { " " },
                fields
            )
        } else {
            let space = if self.0.is_empty() { "" } else { " " };
            write!(self.0, "{space}{}={value:?}", field.name())
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_spdlogs() {
        assert_eq!(
            parse("[%Y] 100%% %v\\t"),
            [
                Part::Literal("[".into()),
                Part::Flag('Y'),
                Part::Literal("] 100% ".into()),
                Part::Flag('v'),
                Part::Literal("\t".into())
            ]
        );
    }

    #[test]
    fn modules_log_under_their_component() {
        for (target, name) in [
            ("outrigger_proxy::cluster::pool", Some("upstream")),
            ("outrigger_proxy::listener", Some("conn_handler")),
            ("outrigger_proxy::transport::downstream", Some("connection")),
            ("outrigger_proxy", Some("misc")),
            ("outrigger_http::h1", Some("http")),
            ("h2::codec", None),
        ] {
            assert_eq!(
                component(target).map(|at| COMPONENTS[at].0),
                name,
                "{target}"
            );
        }
    }

    #[test]
    fn a_line_has_everything_the_pattern_asks_for() {
        init(
            LogLevel::Info,
            &[("upstream".into(), LogLevel::Debug)],
            DEFAULT_FORMAT,
            None,
        )
        .expect("there is no file to open");
        assert!(levels().contains(&("upstream", LogLevel::Debug)));
        assert!(levels().contains(&("router", LogLevel::Info)));
        assert!(set("router", LogLevel::Error) && !set("nobody", LogLevel::Error));
        assert!(levels().contains(&("router", LogLevel::Error)));
    }
}
