//! The proxy as a child: started once, and the agent ends with it.
//!
//! Four ends: the proxy exits by itself (the agent exits with its status, and whoever runs the container restarts
//! it); `/quitquitquit` (at once); SIGTERM or SIGINT (drain, wait, stop); `/drain` and later SIGTERM (the wait has
//! been had already: stop at once).

use std::{
    env,
    ffi::OsString,
    io,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{
    AgentError,
    settings::{Role, Settings},
    status::{Order, Status},
};

/// How long a proxy that was asked to end may take before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts the proxy and stays until it has ended; gives the exit code for the agent.
pub(crate) async fn run(
    settings: &Settings,
    bootstrap: &Path,
    status: &Arc<Status>,
    mut orders: mpsc::Receiver<Order>,
) -> Result<u8, AgentError> {
    let fail = |path: &Path, source: io::Error| AgentError::Start {
        path: path.to_owned(),
        source,
    };
    let (program, own) = program(settings)?;
    let arguments = arguments(settings, bootstrap);
    let shown: Vec<_> = arguments.iter().map(|a| a.to_string_lossy()).collect();
    info!("starting {} {}", program.display(), shown.join(" "));
    let mut command = Command::new(&program);
    if own {
        // This very program is the proxy under that name, and `ps` shows what users look for.
        command.arg0("envoy");
    }
    let mut child = command
        .args(&arguments)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| fail(&program, e))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| fail(&program, e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| fail(&program, e))?;
    let mut drained = false;
    loop {
        let order = tokio::select! {
            exit = child.wait() => return Ok(exited(exit.map_err(|e| fail(&program, e))?)),
            Some(order) = orders.recv() => order,
            signal = async { tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }} => {
                info!("received {signal}");
                break;
            }
        };
        match order {
            Order::Drain => {
                drained = true;
                status
                    .drain_proxy(&format!("{}graceful&skip_exit", scope(settings)))
                    .await;
            }
            Order::Quit => {
                info!("told to quit: stopping the proxy without draining");
                status.terminate();
                stop(&mut child, Duration::ZERO).await;
                return Ok(0);
            }
        }
    }
    status.terminate();
    if !drained {
        status
            .drain_proxy(&format!("{}graceful", scope(settings)))
            .await;
        info!("draining for {:?}", settings.termination_drain);
        tokio::select! {
            exit = child.wait() => return Ok(exited(exit.map_err(|e| fail(&program, e))?)),
            () = sleep(settings.termination_drain) => {}
            _ = async { while orders.recv().await != Some(Order::Quit) {} } => {}
        }
    }
    stop(&mut child, STOP_TIMEOUT).await;
    Ok(0)
}

/// A sidecar goes on serving the application's own calls while it drains.
fn scope(settings: &Settings) -> &'static str {
    match settings.role {
        Role::Router => "",
        Role::Sidecar => "inboundonly&",
    }
}

/// The proxy to run, and whether that is this very program.
fn program(settings: &Settings) -> Result<(PathBuf, bool), AgentError> {
    match &settings.binary {
        Some(path) if path.exists() => return Ok((path.clone(), false)),
        // Old injectors name Envoy's usual path always; an image that has none means this program.
        Some(path) if path == Path::new("/usr/local/bin/envoy") => {
            info!(
                "{} does not exist: this program is the proxy",
                path.display()
            );
        }
        Some(path) => {
            return Err(AgentError::Start {
                path: path.clone(),
                source: io::Error::new(
                    io::ErrorKind::NotFound,
                    "no such file in this pod (binaryPath of ProxyConfig, or --binaryPath)",
                ),
            });
        }
        None => {}
    }
    let own = env::current_exe().map_err(|source| AgentError::Start {
        path: "/proc/self/exe".into(),
        source,
    })?;
    Ok((own, true))
}

fn arguments(settings: &Settings, bootstrap: &Path) -> Vec<OsString> {
    let seconds = |d: Duration| d.as_secs().to_string();
    let version = if settings.addresses[0].is_ipv4() {
        "v4"
    } else {
        "v6"
    };
    let mut out: Vec<OsString> = vec!["-c".into(), bootstrap.into()];
    let mut add = |words: &[&str]| out.extend(words.iter().map(OsString::from));
    add(&["--drain-time-s", &seconds(settings.drain)]);
    add(&["--drain-strategy", "immediate"]);
    add(&[
        "--parent-shutdown-time-s",
        &seconds(settings.parent_shutdown),
    ]);
    add(&["--local-address-ip-version", version]);
    add(&["--file-flush-interval-msec", "1000"]);
    add(&["--disable-hot-restart", "--allow-unknown-static-fields"]);
    add(&["-l", &settings.log_level]);
    if !settings.component_log_level.is_empty() {
        add(&["--component-log-level", &settings.component_log_level]);
    }
    if settings.concurrency > 0 {
        add(&["--concurrency", &settings.concurrency.to_string()]);
    }
    out
}

fn exited(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(0), _) => {
            info!("the proxy has exited");
            0
        }
        (Some(code), _) => {
            error!("the proxy exited with status {code}");
            u8::try_from(code).unwrap_or(1)
        }
        (None, Some(9)) => {
            error!("the proxy was killed (signal 9); out of memory?");
            137
        }
        (None, signal) => {
            let signal = signal.unwrap_or(0);
            error!("the proxy died of signal {signal}");
            u8::try_from(128 + signal).unwrap_or(1)
        }
    }
}

async fn stop(child: &mut Child, patience: Duration) {
    if let Some(pid) = child.id().and_then(|p| i32::try_from(p).ok())
        && !patience.is_zero()
    {
        // SIGTERM would have it drain, which it has done for as long as it may. Failing means that it has gone already.
        let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
        if timeout(patience, child.wait()).await.is_ok() {
            info!("the proxy has stopped");
            return;
        }
        warn!("the proxy did not stop within {patience:?}: killing it");
    }
    if let Err(e) = child.kill().await {
        warn!("cannot kill the proxy: {e}");
    }
}
