//! From arguments to a running proxy, and to its end.

use std::{io, process::ExitCode, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::LocalSet,
};

use super::{Arguments, Mode};
use crate::{
    bootstrap::{self, BootstrapError, Sources, load},
    plan::{
        Bootstrap,
        bootstrap::{StatsMatcher, StatsTagSource},
    },
    server::{Change, Server, State},
    worker::Options,
};

/// Runs to the end of the process.
pub(super) fn run(arguments: &Arguments, command_line: Vec<String>) -> ExitCode {
    let bootstrap = match read(arguments) {
        Ok(bootstrap) => Arc::new(bootstrap),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.mode == Mode::Validate {
        let path = arguments.config_path.as_ref();
        let path = path.map_or_else(String::new, |path| path.display().to_string());
        println!("configuration '{path}' OK");
        return ExitCode::SUCCESS;
    }
    let store = stats::Store::default();
    if let Err(error) = configure(&store, &bootstrap) {
        eprintln!("stats_config: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let options = arguments.options(command_line);
    let init_only = arguments.mode == Mode::InitOnly;
    match LocalSet::new().block_on(&runtime, serve(bootstrap, options, store, init_only)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn read(arguments: &Arguments) -> Result<Bootstrap, BootstrapError> {
    let loaded = load(&Sources {
        path: arguments.config_path.clone(),
        yaml: arguments.config_yaml.clone(),
        service_node: arguments.service_node.clone(),
        service_cluster: arguments.service_cluster.clone(),
        service_zone: arguments.service_zone.clone(),
        allow_unknown_fields: arguments.allow_unknown_static_fields,
    })?;
    for warning in loaded.warnings {
        tracing::warn!("{warning}");
    }
    bootstrap::forget_descriptors();
    Ok(loaded.bootstrap)
}

/// Brings the bootstrap to life and serves until the process is asked to end.
async fn serve(
    bootstrap: Arc<Bootstrap>,
    options: Options,
    store: stats::Store,
    init_only: bool,
) -> Result<(), String> {
    // Before anything else: a signal during the start ends it in good order.
    let mut signals = Signals::new().map_err(|error| format!("signals: {error}"))?;
    let server = Server::start(bootstrap.clone(), options, store)
        .map_err(|error| format!("cannot start the workers: {error}"))?;
    let clusters = bootstrap
        .static_clusters
        .iter()
        .map(|(plan, _)| Change::UpsertCluster(plan.clone()));
    apply(&server, clusters.collect())?;
    // Listeners open when the clusters that they lead to know their hosts.
    server.clusters_warmed(FIRST_RESOLUTION).await;
    server.set_state(State::Initializing);
    let listeners = bootstrap
        .static_listeners
        .iter()
        .map(|(plan, _)| Change::UpsertListener(plan.clone()));
    apply(&server, listeners.collect())?;
    server.settled().await;
    server.set_state(State::Live);
    tracing::info!("all clusters and listeners of the bootstrap are there: starting to serve");
    if !init_only {
        tokio::select! {
            name = signals.next() => tracing::warn!("caught {name}: ending"),
            () = server.quitting() => tracing::warn!("asked to end by the admin endpoint"),
        }
    }
    server.shut_down();
    Ok(())
}

/// How long the first answers of name servers are waited for, at most.
const FIRST_RESOLUTION: Duration = Duration::from_secs(5);

/// Applies a part of the bootstrap; what cannot be applied ends the start.
fn apply(server: &Rc<Server>, changes: Vec<Change>) -> Result<(), String> {
    let failed: Vec<String> = server
        .apply(changes)
        .into_iter()
        .filter_map(|result| result.err().map(|error| error.to_string()))
        .collect();
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed.join("\n"))
    }
}

/// Which stats exist and what their tags are.
fn configure(store: &stats::Store, bootstrap: &Bootstrap) -> Result<(), stats::TagError> {
    let config = &bootstrap.stats;
    let mut rules = if config.use_all_default_tags {
        stats::TagRules::default()
    } else {
        stats::TagRules::none()
    };
    for tag in &config.tags {
        match &tag.source {
            StatsTagSource::Regex(regex) => rules.regex(&tag.name, regex.as_str())?,
            StatsTagSource::Fixed(value) => rules.fixed(&tag.name, value),
        }
    }
    let matcher: Option<stats::Matcher> = match &config.matcher {
        StatsMatcher::All => None,
        matcher => {
            let matcher = matcher.clone();
            Some(Arc::new(move |name: &str| matcher.admits(name)))
        }
    };
    store.configure(rules, matcher);
    Ok(())
}

/// The signals that end the process. SIGHUP and SIGPIPE are ignored, as Envoy does.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    _hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
