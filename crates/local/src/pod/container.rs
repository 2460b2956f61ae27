//! One container of a pod: its process, its probes and hooks, and what happens when it ends.

use std::{
    fs,
    path::PathBuf,
    process::ExitStatus,
    rc::Rc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tokio::{
    process::Child,
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    lifecycle::{Pod, Stop, stopping},
    probe::{self, Action, Probe},
    process,
    run::RunSpec,
};
use crate::{
    error::{Doing, Result},
    state::{ContainerStatus, namespace_inode},
};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Init,
    /// An init container that keeps running beside the others.
    Sidecar,
    App,
}

/// A container of a pod.
pub(super) struct Container {
    pub(super) pod: Rc<Pod>,
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) spec: RunSpec,
    pub(super) startup: Option<Probe>,
    pub(super) readiness: Option<Probe>,
    pub(super) liveness: Option<Probe>,
    pub(super) post_start: Option<Action>,
    pub(super) pre_stop: Option<Action>,
    pub(super) folder: PathBuf,
}

impl Container {
    pub(super) fn update(&self, change: impl FnOnce(&mut ContainerStatus)) {
        self.pod.update(|s| {
            if let Some(c) = s.containers.iter_mut().find(|c| c.name == self.name) {
                change(c);
            }
            s.ready = s.phase != "Failed"
                && s.phase != "Succeeded"
                && s.containers.iter().filter(|c| !c.init).all(|c| c.ready);
        });
    }

    pub(super) fn current(&self) -> ContainerStatus {
        let status = self.pod.status.borrow();
        status
            .containers
            .iter()
            .find(|c| c.name == self.name)
            .cloned()
            .unwrap_or_default()
    }

    pub(super) fn file(&self, end: &str) -> PathBuf {
        self.folder.join(format!("{}.{end}", self.name))
    }

    fn start(&self) -> Result<Child> {
        let log = self.file("log");
        if log.exists() {
            fs::rename(&log, self.file("previous.log"))
                .doing(|| format!("set {} aside", log.display()))?;
        }
        let child = process::start(
            &self.pod.context.program,
            &self.spec,
            &self.file("run.json"),
            &log,
        )?;
        let pid = child.id().unwrap_or(0) as i32;
        self.update(|s| {
            s.state = "running".to_owned();
            s.pid = pid;
        });
        Ok(child)
    }

    /// Waits for the end of a process and of everything that it left behind in its mount namespace.
    async fn wait(&self, child: &mut Child) -> Option<ExitStatus> {
        let status = child.wait().await.ok();
        process::signal_namespace("mnt", self.current().mount_namespace, Signal::SIGKILL);
        self.update(|s| {
            s.state = "terminated".to_owned();
            s.pid = 0;
            s.mount_namespace = 0;
            s.ready = false;
            s.last_exit = status.map_or_else(|| "unknown".to_owned(), |s| s.to_string());
        });
        status
    }

    /// An init container: again until it succeeds, unless the pod never restarts.
    pub(super) async fn run_once_to_success(&self, policy: &str) -> bool {
        let mut pause = Backoff::new();
        loop {
            match self.start() {
                Ok(mut child) => {
                    self.note_namespace();
                    if self.wait(&mut child).await.is_some_and(|s| s.success()) {
                        self.update(|s| s.ready = true);
                        self.pod.update(|s| s.reason.clear());
                        return true;
                    }
                }
                Err(e) => self.update(|s| s.last_exit = e.to_string()),
            }
            let last = self.current().last_exit;
            self.pod.update(|s| {
                s.reason = format!(
                    "init container {}: {last} (see `outrigger local logs`)",
                    self.name
                )
            });
            if policy == "Never" {
                return false;
            }
            sleep(pause.next()).await;
            self.update(|s| s.restarts += 1);
        }
    }

    /// The mount namespace is the container's own only once the process has entered it.
    fn note_namespace(&self) {
        let status = self.current();
        let inode = namespace_inode(status.pid, "mnt");
        let own = namespace_inode(std::process::id() as i32, "mnt");
        let of_pod = namespace_inode(self.spec.holder, "mnt");
        if inode != 0 && inode != own && inode != of_pod && inode != status.mount_namespace {
            self.update(|s| s.mount_namespace = inode);
        }
    }

    /// Keeps the container running as its policy says; `true` where it ended well for good.
    pub(super) async fn keep_running(
        self: Rc<Self>,
        policy: String,
        started: watch::Sender<bool>,
        mut stop: Stop,
    ) -> bool {
        let mut pause = Backoff::new();
        loop {
            let begun = Instant::now();
            let outcome = match self.start() {
                Ok(mut child) => self.watch_over(&mut child, &started).await,
                Err(e) => {
                    self.update(|s| s.last_exit = e.to_string());
                    None
                }
            };
            let well = outcome.is_some_and(|s| s.success());
            if stop.borrow().is_some() {
                return well;
            }
            match policy.as_str() {
                "Never" => return well,
                "OnFailure" if well => return true,
                _ => {}
            }
            if begun.elapsed() > Duration::from_secs(60) {
                pause = Backoff::new();
            }
            let last = self.current().last_exit;
            let wait = pause.next();
            eprintln!(
                "{}: container {}: {last}; again in {:.1} s",
                self.pod.name(),
                self.name,
                wait.as_secs_f32()
            );
            self.pod.update(|s| {
                s.reason = format!(
                    "container {}: {last} (see `outrigger local logs`)",
                    self.name
                )
            });
            tokio::select! {
                () = sleep(wait) => {}
                _ = stopping(&mut stop) => return well,
            }
            self.update(|s| s.restarts += 1);
        }
    }

    /// Probes a running process until it ends; ends it where a probe says so.
    async fn watch_over(
        &self,
        child: &mut Child,
        started: &watch::Sender<bool>,
    ) -> Option<ExitStatus> {
        let probes = async {
            // The process becomes the container's within milliseconds; from then on its namespace is known.
            for _ in 0..50 {
                sleep(Duration::from_millis(20)).await;
                self.note_namespace();
                if self.current().mount_namespace != 0 {
                    break;
                }
            }
            if let Some(hook) = &self.post_start
                && let Err(e) = self.ask(hook, HOOK_LIMIT, "post-start").await
            {
                return format!("postStart failed: {e}");
            }
            if let Some(probe) = &self.startup
                && let Err(e) = self.until_success(probe).await
            {
                return format!("startupProbe failed: {e}");
            }
            started.send_replace(true);
            if self.readiness.is_none() {
                self.update(|s| s.ready = true);
                self.pod.update(|s| s.reason.clear());
            }
            tokio::join!(self.keep_ready(), self.until_unhealthy()).1
        };
        tokio::select! {
            reason = probes => {
                eprintln!("{}: container {}: {reason}", self.pod.name(), self.name);
                self.signal(Signal::SIGTERM);
                if timeout(SIDECAR_GRACE, child.wait()).await.is_err() {
                    self.signal(Signal::SIGKILL);
                }
                let status = self.wait(child).await;
                self.update(|s| s.last_exit = reason);
                status
            }
            status = child.wait() => { drop(status); self.wait(child).await }
        }
    }

    async fn until_success(&self, probe: &Probe) -> Result<(), String> {
        sleep(probe.initial_delay).await;
        let mut failures = 0;
        // Of slow probes the first rounds are quick, so that a pod is up as soon as it can be.
        let mut period = probe.period.min(FIRST_PERIOD);
        loop {
            match self.ask(&probe.action, probe.timeout, "startup").await {
                Ok(()) => return Ok(()),
                Err(e) => {
                    if period >= probe.period {
                        failures += 1;
                    }
                    if failures >= probe.failure_threshold {
                        return Err(e);
                    }
                    self.pod
                        .update(|s| s.reason = format!("container {} is starting: {e}", self.name));
                }
            }
            sleep(period).await;
            period = (period * 2).min(probe.period);
        }
    }

    async fn keep_ready(&self) {
        let Some(probe) = &self.readiness else { return };
        sleep(probe.initial_delay).await;
        let (mut good, mut bad) = (0, 0);
        let mut period = probe.period.min(FIRST_PERIOD);
        loop {
            match self.ask(&probe.action, probe.timeout, "readiness").await {
                Ok(()) => {
                    (good, bad) = (good + 1, 0);
                    period = probe.period;
                    if good >= probe.success_threshold && !self.current().ready {
                        self.update(|s| s.ready = true);
                        self.pod.update(|s| s.reason.clear());
                    }
                }
                Err(e) => {
                    (good, bad) = (0, bad + 1);
                    let ready = self.current().ready;
                    if !ready || bad >= probe.failure_threshold {
                        self.update(|s| s.ready = false);
                        self.pod.update(|s| {
                            s.reason = format!("container {} is not ready: {e}", self.name)
                        });
                        period = (period * 2).min(probe.period);
                    }
                }
            }
            sleep(period).await;
        }
    }

    async fn until_unhealthy(&self) -> String {
        let Some(probe) = &self.liveness else {
            return std::future::pending().await;
        };
        sleep(probe.initial_delay).await;
        let mut failures = 0;
        loop {
            match self.ask(&probe.action, probe.timeout, "liveness").await {
                Ok(()) => failures = 0,
                Err(e) => {
                    failures += 1;
                    if failures >= probe.failure_threshold {
                        return format!("livenessProbe failed: {e}");
                    }
                }
            }
            sleep(probe.period).await;
        }
    }

    async fn ask(&self, action: &Action, limit: Duration, what: &str) -> Result<(), String> {
        let Action::Exec { command } = action else {
            return probe::ask(action, self.pod.plan.address, limit).await;
        };
        let spec = RunSpec {
            args: command.clone(),
            ..self.spec.clone()
        };
        let file = self.file(&format!("{what}.json"));
        let run = process::execute(&self.pod.context.program, &spec, self.current().pid, &file);
        match timeout(limit, run).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(format!("{} failed", command.join(" "))),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!(
                "{} took longer than {} s",
                command.join(" "),
                limit.as_secs()
            )),
        }
    }

    /// Ends the container: its hook, SIGTERM, and SIGKILL to all that is left after the grace.
    pub(super) async fn end(&self, grace: Duration) {
        let deadline = Instant::now() + grace;
        if let Some(hook) = &self.pre_stop {
            // The grace counts from before the hook; a failing hook stops nothing.
            let _ = self
                .ask(hook, grace.max(Duration::from_millis(100)), "pre-stop")
                .await;
        }
        let status = self.current();
        if status.pid == 0 {
            return;
        }
        self.note_namespace();
        self.signal(Signal::SIGTERM);
        while self.current().pid == status.pid && Instant::now() < deadline {
            sleep(Duration::from_millis(20)).await;
        }
        if self.current().pid == status.pid {
            self.signal(Signal::SIGKILL);
            process::signal_namespace("mnt", self.current().mount_namespace, Signal::SIGKILL);
        }
    }

    /// Sends a signal to the container's first process.
    pub(super) fn signal(&self, signal: Signal) {
        let pid = self.current().pid;
        if pid > 0 {
            // It may have ended by itself meanwhile.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }
}

/// Waits between restarts: half a second, doubled up to ten (the kubelet's ten seconds to five minutes, for a desk).
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(Duration::from_millis(500))
    }

    pub(super) fn next(&mut self) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(Duration::from_secs(10));
        now
    }
}

/// What a container gets where nobody gave another grace.
pub(super) const SIDECAR_GRACE: Duration = Duration::from_secs(2);
/// How long a postStart hook may take.
const HOOK_LIMIT: Duration = Duration::from_secs(120);
/// The first wait between probes of a container that is starting.
const FIRST_PERIOD: Duration = Duration::from_millis(100);
