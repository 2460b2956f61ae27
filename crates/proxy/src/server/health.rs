//! Active health checks: a task for each host asks, and the truth about the host follows.

mod check;

use std::{
    collections::{BTreeMap, HashMap},
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    sync::watch,
    task::{AbortHandle, spawn_local},
};

use super::{Server, outlier::timestamp};
use crate::{
    access_log::Sink,
    cluster::{
        ClusterEntry, Host,
        health::{CheckResult, FailureKind, Session, Transition, Verdict, interval},
        shared::HealthFlag,
    },
    plan::{
        access_log::LogSink,
        health_check::{Checker, HealthCheck},
    },
    transport::Upstreams,
    worker::Random,
};
use check::Asker;

/// The checks of all clusters.
#[derive(Debug, Default)]
pub(super) struct Checks(BTreeMap<Arc<str>, ClusterChecks>);

/// The checks of one cluster.
#[derive(Debug)]
struct ClusterChecks {
    check: Arc<HealthCheck>,
    /// By the host's id.
    tasks: HashMap<u64, Task>,
}

/// The checks of one host; dropping it ends them.
#[derive(Debug)]
struct Task {
    handle: AbortHandle,
    first: watch::Receiver<bool>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

impl Checks {
    /// Each turns to true with the first result of a host.
    pub(super) fn first_results(&self) -> Vec<watch::Receiver<bool>> {
        let tasks = self.0.values().flat_map(|checks| checks.tasks.values());
        tasks.map(|task| task.first.clone()).collect()
    }
}

impl Server {
    /// Starts checks of hosts that have none and ends those of hosts that are gone.
    pub(super) fn sync_checks(self: &Rc<Self>, cluster: &str) {
        let mut all = self.checks.borrow_mut();
        let entry = self.cluster(cluster);
        let wanted = entry
            .as_ref()
            .and_then(|entry| Some((entry, entry.plan.made()?.health_check.clone()?)));
        let Some((entry, check)) = wanted else {
            all.0.remove(cluster);
            return;
        };
        let checks = all.0.entry(entry.plan.name.clone()).or_insert_with(|| {
            let check = check.clone();
            let tasks = HashMap::new();
            ClusterChecks { check, tasks }
        });
        if checks.check != check {
            checks.check = check.clone();
            checks.tasks.clear();
        }
        let hosts = || entry.hosts().hosts().iter().filter(|host| is_checked(host));
        checks
            .tasks
            .retain(|id, _| hosts().any(|host| host.shared.id == *id));
        for host in hosts() {
            checks
                .tasks
                .entry(host.shared.id)
                .or_insert_with(|| self.start_check(entry, host.shared.id, &check));
        }
        drop(all);
        self.count_checked(entry);
    }

    fn start_check(
        self: &Rc<Self>,
        entry: &ClusterEntry,
        id: u64,
        check: &Arc<HealthCheck>,
    ) -> Task {
        let scope = format!("cluster.{}.", entry.plan.stat_name());
        let tls = Upstreams::new(self.shared.clone(), &self.stats.scope(&scope));
        start(Rc::downgrade(self), tls, entry, id, check)
    }

    /// A check has ended. Gives the time until the next one.
    fn checked(
        self: &Rc<Self>,
        entry: &ClusterEntry,
        host: &Host,
        check: &HealthCheck,
        session: &mut Session,
        result: CheckResult,
        random: &Random,
    ) -> Duration {
        let cluster = &entry.plan.name;
        let verdict = session.apply(&host.shared, check, result);
        let scope = self.check_scope(entry);
        match result {
            CheckResult::Passed { .. } => scope.counter("success").inc(),
            CheckResult::Failed { kind, .. } => {
                scope.counter("failure").inc();
                match kind {
                    FailureKind::Network | FailureKind::NetworkTimeout => {
                        scope.counter("network_failure").inc();
                    }
                    FailureKind::Passive => scope.counter("passive_failure").inc(),
                    FailureKind::Active => {}
                }
            }
        }
        self.log_check(entry, host, check, result, &verdict);
        if verdict.visible {
            let failed = match verdict.turned {
                Some(false) => &[host.shared.id][..],
                _ => &[],
            };
            let changes = self.clusters.borrow_mut().health_changed(cluster, failed);
            self.broadcast(changes);
        }
        let passed = matches!(result, CheckResult::Passed { .. });
        if passed && !host.shared.flag(HealthFlag::FailedActiveHc) {
            let unejected =
                self.clusters
                    .borrow_mut()
                    .uneject(cluster, host.shared.id, Instant::now());
            self.broadcast(unejected.0);
            self.tell_outliers(cluster, &unejected.1);
        }
        if verdict.visible {
            // A host that discovery names no longer is gone now, and its checks with it.
            self.sync_checks(cluster);
        }
        let hosts = entry.hosts().hosts();
        let traffic = hosts.iter().any(|h| h.shared.cx_total.load(Relaxed) > 0);
        interval(check, passed, verdict.transition, traffic, random)
    }

    /// A host has told in a response that it wants no traffic.
    pub(super) fn immediate_fail(self: &Rc<Self>, cluster: &str, id: u64) {
        let Some(entry) = self.cluster(cluster) else {
            return;
        };
        let found = entry
            .hosts()
            .hosts()
            .iter()
            .find(|host| host.shared.id == id);
        let check = entry
            .plan
            .made()
            .and_then(|plan| plan.health_check.as_ref());
        let (Some(host), Some(check)) = (found, check) else {
            return;
        };
        let shared = &host.shared;
        shared.set_flag(HealthFlag::ExcludedViaImmediateHcFail, true);
        if !shared.set_flag(HealthFlag::FailedActiveHc, true) {
            return;
        }
        let scope = self.check_scope(&entry);
        scope.counter("failure").inc();
        scope.counter("passive_failure").inc();
        let kind = FailureKind::Passive;
        let verdict = Verdict {
            transition: Transition::Changed,
            first: false,
            turned: Some(false),
            degraded: None,
            visible: true,
        };
        let result = CheckResult::Failed {
            kind,
            retriable: false,
        };
        self.log_check(&entry, host, check, result, &verdict);
        let changes = self.clusters.borrow_mut().health_changed(cluster, &[id]);
        self.broadcast(changes);
        self.sync_checks(cluster);
    }

    fn check_scope(&self, entry: &ClusterEntry) -> stats::Scope {
        let plan = entry.plan.made();
        let name = plan.and_then(|plan| plan.health_check.as_ref()?.name.as_ref());
        let name = name.map_or_else(String::new, |name| format!("health_check.name.{name}."));
        self.stats.scope(&format!(
            "cluster.{}.{name}health_check.",
            entry.plan.stat_name()
        ))
    }

    fn count_checked(&self, entry: &ClusterEntry) {
        let count = |wanted: &dyn Fn(&Host) -> bool| {
            let hosts = entry.hosts().hosts().iter();
            hosts.filter(|host| wanted(host)).count() as i64
        };
        let failed = |host: &Host| host.shared.flag(HealthFlag::FailedActiveHc);
        let scope = self.check_scope(entry);
        scope.gauge("healthy").set(count(&|host| !failed(host)));
        scope.gauge("degraded").set(count(&|host| {
            host.shared.flag(HealthFlag::DegradedActiveHc)
        }));
    }

    /// Writes what has changed as Envoy does (`envoy.data.core.v3.HealthCheckEvent`).
    fn log_check(
        &self,
        entry: &ClusterEntry,
        host: &Host,
        check: &HealthCheck,
        result: CheckResult,
        verdict: &Verdict,
    ) {
        if check.event_logs.is_empty() {
            return;
        }
        let failure = match result {
            CheckResult::Failed { kind, .. } => match kind {
                FailureKind::Active => "ACTIVE",
                FailureKind::Passive => "PASSIVE",
                FailureKind::Network => "NETWORK",
                FailureKind::NetworkTimeout => "NETWORK_TIMEOUT",
            },
            CheckResult::Passed { .. } => "",
        };
        let first = verdict.first;
        let mut events = Vec::new();
        match verdict.turned {
            Some(true) => events.push(("add_healthy_event", json!({ "first_check": first }))),
            Some(false) => {
                events.push(("eject_unhealthy_event", json!({ "failure_type": failure })));
            }
            None => {}
        }
        match verdict.degraded {
            Some(true) => events.push(("degraded_healthy_host", json!({}))),
            Some(false) => events.push(("no_longer_degraded_host", json!({}))),
            None => {}
        }
        let passed = failure.is_empty();
        if !passed && (check.always_log_failures || first) {
            events.push((
                "health_check_failure_event",
                json!({ "failure_type": failure, "first_check": first }),
            ));
        }
        if passed && check.always_log_success {
            events.push(("successful_health_check_event", json!({})));
        }
        for (name, detail) in events {
            let mut line = json!({
                "health_checker_type": match check.checker {
                    Checker::Http(_) => "HTTP",
                    Checker::Tcp(_) => "TCP",
                    Checker::Grpc(_) => "GRPC",
                },
                "host": address(host),
                "cluster_name": *entry.plan.name,
                "timestamp": timestamp(),
                "locality": {
                    "region": host.locality.region,
                    "zone": host.locality.zone,
                    "sub_zone": host.locality.sub_zone,
                },
            });
            line[name] = detail;
            for path in &check.event_logs {
                let target = LogSink::File(path.clone());
                let sink = Sink::open(&target, self.options.file_flush_interval);
                sink.write(|out| out.extend_from_slice(format!("{line}\n").as_bytes()));
            }
        }
    }
}

/// The checks of one host, for as long as the task lives.
fn start(
    server: Weak<Server>,
    tls: Upstreams,
    entry: &ClusterEntry,
    id: u64,
    check: &Arc<HealthCheck>,
) -> Task {
    let (sender, first) = watch::channel(false);
    let (cluster, check) = (entry.plan.name.clone(), check.clone());
    let task = spawn_local(async move {
        let random = Random::default();
        let mut asker = Asker::new(tls);
        let mut session = Session::default();
        let jitter = check.initial_jitter.as_millis() as u64;
        let mut wait = Duration::from_millis(random.below(jitter));
        loop {
            tokio::time::sleep(wait).await;
            // Everything may have changed in the meantime.
            let Some(entry) = server.upgrade().and_then(|server| {
                let entry = server.cluster(&cluster)?;
                server.check_scope(&entry).counter("attempt").inc();
                Some(entry)
            }) else {
                return;
            };
            let hosts = entry.hosts().hosts().iter();
            let Some(host) = hosts.clone().find(|host| host.shared.id == id) else {
                return;
            };
            let asked = asker.ask(entry.plan.plan(), host, &check);
            let result = match tokio::time::timeout(check.timeout, asked).await {
                Ok(result) => result,
                Err(_) => {
                    asker.reset();
                    CheckResult::Failed {
                        kind: FailureKind::NetworkTimeout,
                        retriable: false,
                    }
                }
            };
            let Some(server) = server.upgrade() else {
                return;
            };
            wait = server.checked(&entry, host, &check, &mut session, result, &random);
            sender.send_replace(true);
        }
    });
    Task {
        handle: task.abort_handle(),
        first,
    }
}

fn is_checked(host: &Host) -> bool {
    host.health_check.as_ref().is_none_or(|own| !own.disabled)
}

fn address(host: &Host) -> serde_json::Value {
    match host.address.socket() {
        Some(socket) => json!({
            "socket_address": {
                "protocol": "TCP",
                "address": socket.ip().to_string(),
                "port_value": socket.port(),
            },
        }),
        None => json!({ "pipe": { "path": host.address.to_string() } }),
    }
}
