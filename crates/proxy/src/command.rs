//! `outrigger proxy`, also by the name `envoy`: Envoy's command line.

mod run;

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum, error::ErrorKind};

use crate::{
    logging::{self, LogLevel},
    worker::{Options, drain::DrainStrategy},
};

/// The arguments of Envoy, with its defaults.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "proxy",
    about = "Run the proxy: Envoy's configuration and command line",
    args_override_self = true,
    disable_version_flag = true
)]
pub(crate) struct Arguments {
    /// Path to the bootstrap configuration (YAML or JSON)
    #[arg(short = 'c', long, value_name = "FILE")]
    pub(crate) config_path: Option<PathBuf>,
    /// Bootstrap configuration as YAML or JSON; merged over the one in the file
    #[arg(long, value_name = "YAML")]
    pub(crate) config_yaml: Option<String>,
    /// Name of the cluster that this proxy belongs to, where the bootstrap names none
    #[arg(long, default_value = "")]
    pub(crate) service_cluster: String,
    /// Name of this node, where the bootstrap names none
    #[arg(long, default_value = "")]
    pub(crate) service_node: String,
    /// Zone of this node, where the bootstrap names none
    #[arg(long, default_value = "")]
    pub(crate) service_zone: String,
    /// Number of worker threads; 0 and absent: one for each processor
    #[arg(long)]
    pub(crate) concurrency: Option<usize>,
    /// How long draining takes, in seconds: of listeners that change or go, and of the process after SIGTERM
    #[arg(long, default_value_t = 600)]
    pub(crate) drain_time_s: u64,
    /// Whether connections end over the drain time or at once
    #[arg(long, value_enum, default_value_t = Strategy::Gradual)]
    pub(crate) drain_strategy: Strategy,
    /// How long a former process goes on after a hot restart, in seconds
    #[arg(long, default_value_t = 900)]
    pub(crate) parent_shutdown_time_s: u64,
    /// Epoch of hot restarts (accepted: a new process takes over by SO_REUSEPORT)
    #[arg(long, default_value_t = 0)]
    pub(crate) restart_epoch: u32,
    /// Family of the local address: v4 or v6
    #[arg(long, default_value = "v4", value_parser = ["v4", "v6"])]
    pub(crate) local_address_ip_version: String,
    /// How often access logs are written out, in milliseconds
    #[arg(long, default_value_t = 10_000)]
    pub(crate) file_flush_interval_msec: u64,
    /// How much is collected before an access log is written out, in KiB
    #[arg(long, default_value_t = 64)]
    pub(crate) file_flush_min_size_kb: u64,
    /// Level of the log: trace, debug, info, warning, error, critical, off
    #[arg(short = 'l', long, default_value = "info", value_parser = level)]
    pub(crate) log_level: LogLevel,
    /// Levels of components: `upstream:debug,router:trace`
    #[arg(long, default_value = "")]
    pub(crate) component_log_level: String,
    /// Pattern of log lines, in the language of spdlog
    #[arg(long, default_value = logging::DEFAULT_FORMAT)]
    pub(crate) log_format: String,
    /// File to log to, in place of standard error
    #[arg(long)]
    pub(crate) log_path: Option<PathBuf>,
    /// `serve`, `validate` (say whether the configuration is good) or `init_only`
    #[arg(long, value_enum, default_value_t = Mode::Serve)]
    pub(crate) mode: Mode,
    /// File to write the admin address to
    #[arg(long)]
    pub(crate) admin_address_path: Option<PathBuf>,
    /// Print the version
    #[arg(long)]
    version: bool,
    /// Take unknown fields in the static configuration (with a warning)
    #[arg(long, alias = "allow-unknown-fields")]
    pub(crate) allow_unknown_static_fields: bool,
    /// Refuse unknown fields in what xDS sends
    #[arg(long)]
    pub(crate) reject_unknown_dynamic_fields: bool,
    /// Do not warn about unknown fields in what xDS sends
    #[arg(long)]
    pub(crate) ignore_unknown_dynamic_fields: bool,
    #[command(flatten)]
    without_effect: WithoutEffect,
}

/// Taken, so that command lines written for Envoy work; they change nothing here.
#[derive(Clone, Debug, clap::Args)]
struct WithoutEffect {
    /// Accepted without effect: there is no shared memory to name
    #[arg(long)]
    base_id: Option<u32>,
    /// Accepted without effect
    #[arg(long)]
    use_dynamic_base_id: bool,
    /// Accepted without effect
    #[arg(long)]
    base_id_path: Option<PathBuf>,
    /// Accepted without effect
    #[arg(long)]
    disable_hot_restart: bool,
    /// Accepted without effect
    #[arg(long)]
    skip_hot_restart_on_no_parent: bool,
    /// Accepted without effect
    #[arg(long)]
    skip_hot_restart_parent_stats: bool,
    /// Accepted without effect
    #[arg(long)]
    socket_path: Option<PathBuf>,
    /// Accepted without effect
    #[arg(long)]
    socket_mode: Option<String>,
    /// Accepted without effect
    #[arg(long)]
    skip_deprecated_logs: bool,
    /// Accepted without effect: log lines are never escaped twice
    #[arg(long)]
    log_format_escaped: bool,
    /// Accepted without effect
    #[arg(long)]
    enable_fine_grain_logging: bool,
    /// Accepted without effect
    #[arg(long)]
    enable_core_dump: bool,
    /// Accepted without effect: use --concurrency
    #[arg(long)]
    cpuset_threads: bool,
    /// Accepted without effect: only version 3 exists
    #[arg(long)]
    bootstrap_version: Option<u32>,
    /// Removed from Envoy years ago; accepted with a warning
    #[arg(long)]
    max_obj_name_len: Option<u64>,
    /// Removed from Envoy years ago; accepted with a warning
    #[arg(long)]
    max_stats: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Strategy {
    Gradual,
    Immediate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Mode {
    Serve,
    Validate,
    InitOnly,
}

fn level(word: &str) -> Result<LogLevel, String> {
    LogLevel::parse(word)
        .ok_or_else(|| "it is one of trace, debug, info, warning, error, critical, off".to_owned())
}

/// Runs the command; `args[0]` is its own name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let given: Vec<String> = args
        .iter()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let arguments = match Arguments::try_parse_from(&args) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Printing fails only where nobody can read it.
            let _ = error.print();
            let good = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return if good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
    };
    if arguments.version {
        println!(
            "\n{}  version: {}\n",
            given.first().map_or("proxy", |name| name),
            version()
        );
        return ExitCode::SUCCESS;
    }
    match arguments.components().and_then(|components| {
        logging::init(
            arguments.log_level,
            &components,
            &arguments.log_format,
            arguments.log_path.as_deref(),
        )
        .map_err(|error| format!("--log-path: {error}"))
    }) {
        Ok(()) => {}
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    for (flag, given) in [
        (
            "--max-obj-name-len",
            arguments.without_effect.max_obj_name_len.is_some(),
        ),
        ("--max-stats", arguments.without_effect.max_stats.is_some()),
    ] {
        if given {
            tracing::warn!("{flag} was removed from Envoy and has no effect; leave it out");
        }
    }
    run::run(&arguments, given)
}

/// As `/server_info` and `--version` print it: revision, version, state of the tree, build type, TLS library.
pub fn version() -> String {
    let revision = REVISION.unwrap_or("unknown");
    let build = if cfg!(debug_assertions) {
        "DEBUG"
    } else {
        "RELEASE"
    };
    format!(
        "{revision}/{}/Clean/{build}/AWS-LC",
        env!("CARGO_PKG_VERSION")
    )
}

const REVISION: Option<&str> = option_env!("OUTRIGGER_REVISION");

/// The first six hexadecimal digits of the revision as a number, which is what `server.version` says; 0 where the revision
/// is unknown.
pub(crate) fn revision_number() -> u64 {
    let digits = REVISION.and_then(|revision| revision.get(..6));
    digits.map_or(0, |digits| u64::from_str_radix(digits, 16).unwrap_or(0))
}

impl Arguments {
    fn components(&self) -> Result<Vec<(String, LogLevel)>, String> {
        let entry = |entry: &str| {
            let (name, word) = entry.split_once(':').ok_or_else(|| {
                format!("--component-log-level: `{entry}` is not COMPONENT:LEVEL")
            })?;
            let level = level(word).map_err(|reason| {
                format!("--component-log-level: `{word}` is no level: {reason}")
            })?;
            if !logging::is_component(name) {
                return Err(format!(
                    "--component-log-level: there is no component `{name}`"
                ));
            }
            Ok((name.to_owned(), level))
        };
        let list = self
            .component_log_level
            .split(',')
            .filter(|entry| !entry.is_empty());
        list.map(entry).collect()
    }

    /// What the workers need to know.
    pub(crate) fn options(&self, command_line: Vec<String>) -> Options {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        Options {
            concurrency: self
                .concurrency
                .filter(|count| *count > 0)
                .unwrap_or_else(processors),
            drain_time: Duration::from_secs(self.drain_time_s),
            drain_strategy: match self.drain_strategy {
                Strategy::Gradual => DrainStrategy::Gradual,
                Strategy::Immediate => DrainStrategy::Immediate,
            },
            parent_shutdown_time: Duration::from_secs(self.parent_shutdown_time_s),
            file_flush_interval: Duration::from_millis(self.file_flush_interval_msec),
            restart_epoch: self.restart_epoch,
            command_line,
            clock: base::clock::Clock::system(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Arguments {
        Arguments::try_parse_from(line.split(' ')).expect(line)
    }

    #[test]
    fn what_pilot_agent_passes_is_taken() {
        let line = "envoy -c etc/istio/proxy/envoy-rev.json --drain-time-s 45 --drain-strategy immediate \
                    --local-address-ip-version v4 --file-flush-interval-msec 1000 --disable-hot-restart \
                    --allow-unknown-static-fields -l warning --component-log-level misc:error --concurrency 2";
        let arguments = parse(&line.split_whitespace().collect::<Vec<_>>().join(" "));
        let options = arguments.options(Vec::new());
        assert_eq!(options.concurrency, 2);
        assert_eq!(options.drain_time, Duration::from_secs(45));
        assert_eq!(options.drain_strategy, DrainStrategy::Immediate);
        assert_eq!(arguments.log_level, LogLevel::Warning);
        assert_eq!(
            arguments.components(),
            Ok(vec![("misc".to_owned(), LogLevel::Error)])
        );
    }

    #[test]
    fn the_seeds_command_line_is_taken() {
        let arguments = parse(
            "envoy -c /etc/e.yaml --restart-epoch 0 --parent-shutdown-time-s 60 --service-cluster c \
             --service-node n --max-obj-name-len 189 --base-id 1 --skip-deprecated-logs --mode validate"
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .as_str(),
        );
        assert_eq!(arguments.mode, Mode::Validate);
        assert_eq!(arguments.without_effect.max_obj_name_len, Some(189));
    }

    #[test]
    fn mistakes_name_what_is_wrong() {
        let arguments = parse("envoy -c a --component-log-level upstream:loud");
        assert!(
            arguments
                .components()
                .expect_err("loud is no level")
                .contains("`loud`")
        );
        let arguments = parse("envoy -c a --component-log-level nobody:info");
        assert!(
            arguments
                .components()
                .expect_err("nobody is nobody")
                .contains("`nobody`")
        );
        assert!(Arguments::try_parse_from(["envoy", "--drain-strategy", "never"]).is_err());
    }
}
