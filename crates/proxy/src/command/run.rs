//! From arguments to a running proxy, and to its end.

use std::{io, path::Path, process::ExitCode, rc::Rc, sync::Arc, thread, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::LocalSet,
};

use super::{Arguments, Mode};
use crate::{
    admin::{self, Admin},
    bootstrap::{BootstrapError, Sources, load},
    discovery::Discovery,
    plan::{
        Bootstrap,
        bootstrap::{StatsMatcher, StatsTagSource},
    },
    server::{Server, State},
    worker::Options,
};

/// Runs to the end of the process.
pub(super) fn run(arguments: &Arguments, command_line: Vec<String>) -> ExitCode {
    // On a thread of its own: what reading takes goes back to the system with the thread's heap.
    let read = thread::scope(|scope| scope.spawn(|| read(arguments)).join());
    let bootstrap = match read {
        Ok(Ok(bootstrap)) => Arc::new(bootstrap),
        Ok(Err(error)) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
        Err(_) => {
            eprintln!("the configuration cannot be read: this is a bug");
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
    match LocalSet::new().block_on(
        &runtime,
        serve(
            bootstrap,
            options,
            store,
            init_only,
            arguments.admin_address_path.as_deref(),
        ),
    ) {
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
    Ok(loaded.bootstrap)
}

/// Brings the bootstrap to life and serves until the process is asked to end.
async fn serve(
    bootstrap: Arc<Bootstrap>,
    options: Options,
    store: stats::Store,
    init_only: bool,
    admin_address_path: Option<&Path>,
) -> Result<(), String> {
    // Before anything else: a signal during the start ends it in good order.
    let mut signals = Signals::new().map_err(|error| format!("signals: {error}"))?;
    let reopen =
        signal(SignalKind::user_defined1()).map_err(|error| format!("signals: {error}"))?;
    let server = Server::start(bootstrap.clone(), options, store)
        .map_err(|error| format!("cannot start the workers: {error}"))?;
    let mut discovery = Discovery::new(server.clone());
    // Admin answers from the beginning: the agent asks it how far the start has come.
    if let Some(plan) = &bootstrap.admin {
        let admin = Admin {
            server: server.clone(),
            truth: discovery.truth(),
        };
        let bound = admin::start(admin, &plan.address)
            .map_err(|error| format!("admin: cannot listen on {}: {error}", plan.address))?;
        if let Some(path) = admin_address_path {
            std::fs::write(path, bound.to_string())
                .map_err(|error| format!("--admin-address-path {}: {error}", path.display()))?;
        }
    }
    let begin = async {
        discovery.begin().await?;
        tracing::info!("all clusters and listeners of the bootstrap are there");
        Ok::<_, String>(discovery)
    };
    let discovery = tokio::select! {
        begun = begin => begun?,
        name = signals.next() => {
            tracing::warn!("caught {name} during the start: ending");
            server.shut_down();
            return Ok(());
        }
    };
    tokio::task::spawn_local(discovery.run());
    tokio::task::spawn_local(trim(server.clone()));
    tokio::task::spawn_local(reopen_logs(reopen));
    let end = async {
        if init_only {
            server.reached(State::Live).await;
        } else {
            server.quitting().await;
            tracing::warn!("asked to end by the admin endpoint");
        }
    };
    let asked = tokio::select! {
        name = signals.next() => name,
        () = end => "",
    };
    if asked == SIGTERM {
        let most = server.options.drain_time.as_secs();
        tracing::warn!(
            "caught {asked}: draining for {most} s at most; a second signal ends at once"
        );
        tokio::select! {
            () = server.drain_to_the_end() => tracing::warn!("drained: ending"),
            name = signals.next() => tracing::warn!("caught {name} while draining: ending"),
            () = server.quitting() => tracing::warn!("asked to end by the admin endpoint"),
        }
    } else if !asked.is_empty() {
        tracing::warn!("caught {asked}: ending");
    }
    server.shut_down();
    Ok(())
}

/// SIGUSR1 says that log files were moved away.
async fn reopen_logs(mut signal: tokio::signal::unix::Signal) {
    while signal.recv().await.is_some() {
        admin::reopen_logs();
    }
}

/// Gives back what only the start needed, when it is over and once more when its last followers have ended: memory that
/// was freed, and pages of the program that nothing runs through any more. After that, memory after each burst of changes.
async fn trim(server: Rc<Server>) {
    server.reached(State::Live).await;
    for pause in [
        Duration::ZERO,
        Duration::from_millis(300),
        Duration::from_secs(5),
    ] {
        tokio::time::sleep(pause).await;
        base::memory::give_back_heap();
        base::memory::give_back_files();
    }
    loop {
        server.changed.notified().await;
        // Now and then: what is given back and needed again costs page faults.
        tokio::time::sleep(Duration::from_secs(30)).await;
        base::memory::give_back_heap();
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
            StatsTagSource::Regex(regex) => rules.regex(&tag.name, regex)?,
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
    let buckets = config.histogram_buckets.iter().map(|(names, bounds)| {
        let names = names.clone();
        let matcher: stats::Matcher = Arc::new(move |name: &str| names.matches(name.as_bytes()));
        (matcher, bounds.iter().map(|bound| bound.get()).collect())
    });
    store.configure_buckets(buckets.collect());
    Ok(())
}

/// The signals that end the process: SIGTERM once it has drained, SIGINT at once. SIGHUP and SIGPIPE are ignored, as Envoy
/// does.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    _hang_up: tokio::signal::unix::Signal,
}

const SIGTERM: &str = "SIGTERM";

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
            _ = self.terminate.recv() => SIGTERM,
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
