//! What workers report about hosts, and what outlier detection makes of it: changes, stats, the event log.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};
use tokio::task::spawn_local;

use super::Server;
use crate::{
    access_log::Sink,
    cluster::{
        HostSet, Report,
        outlier::{Ejection, Event, EventKind},
    },
    plan::access_log::LogSink,
};

impl Server {
    /// Starts what ends the detectors' intervals, for the life of the server.
    pub(super) fn watch_outliers(self: &Rc<Self>) {
        let weak = Rc::downgrade(self);
        let changed = self.outliers_changed.clone();
        spawn_local(async move {
            loop {
                let next = match weak.upgrade() {
                    Some(server) => server.clusters.borrow().next_tick(),
                    None => return,
                };
                let due = async {
                    match next {
                        Some(at) => tokio::time::sleep_until(at.into()).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = due => {}
                    () = changed.notified() => continue,
                }
                let Some(server) = weak.upgrade() else { return };
                let results = server.clusters.borrow_mut().tick(Instant::now());
                for (cluster, changes, events) in results {
                    server.broadcast(changes);
                    server.tell_outliers(&cluster, &events);
                }
                drop(server);
                // Thousands of clusters, each with its own moment, are looked at together.
                tokio::time::sleep(PAUSE).await;
            }
        });
    }

    /// Takes in what a worker tells.
    pub(super) fn reported(self: &Rc<Self>, report: Report) {
        match report {
            Report::Failing {
                cluster,
                host,
                reason,
            } => {
                let now = Instant::now();
                let (changes, events) = self
                    .clusters
                    .borrow_mut()
                    .failing(&cluster, host, reason, now);
                self.broadcast(changes);
                self.tell_outliers(&cluster, &events);
            }
            Report::Degraded { cluster, host } => {
                let now = Instant::now();
                let (changes, events) = self.clusters.borrow_mut().degraded(&cluster, host, now);
                self.broadcast(changes);
                self.tell_outliers(&cluster, &events);
            }
            Report::HashTable {
                cluster,
                size,
                entries_per_host: (least, most),
            } => self.tell_table(&cluster, size, least, most),
            Report::ImmediateFail { cluster, host } => self.immediate_fail(&cluster, host),
        }
    }

    fn tell_table(&self, cluster: &str, size: u64, least: u64, most: u64) {
        let Some(entry) = self.cluster(cluster) else {
            return;
        };
        let gauge = |name: &str, value: u64| {
            let name = format!("cluster.{}.{name}", entry.plan.stat_name());
            self.stats.gauge(&name).set(value as i64);
        };
        if let crate::plan::lb::LbPolicy::RingHash { .. } = entry.plan.plan().lb_policy {
            gauge("ring_hash_lb.size", size);
            gauge("ring_hash_lb.min_hashes_per_host", least);
            gauge("ring_hash_lb.max_hashes_per_host", most);
        } else {
            gauge("maglev_lb.min_entries_per_host", least);
            gauge("maglev_lb.max_entries_per_host", most);
        }
    }

    /// Counts and logs what happened to hosts.
    pub(super) fn tell_outliers(&self, cluster: &Arc<str>, events: &[Event]) {
        let Some(entry) = self.cluster(cluster).filter(|_| !events.is_empty()) else {
            return;
        };
        let scope = self.stats.scope(&format!(
            "cluster.{}.outlier_detection.",
            entry.plan.stat_name()
        ));
        let count = |name: &str| scope.counter(name).inc();
        for event in events {
            match event.kind {
                EventKind::Detected(reason) => {
                    count(&format!("ejections_detected_{}", reason.stat()));
                    // Names of old, which dashboards still have.
                    match reason {
                        Ejection::Consecutive5xx => count("ejections_consecutive_5xx"),
                        Ejection::SuccessRate | Ejection::SuccessRateLocalOrigin => {
                            count("ejections_success_rate");
                        }
                        _ => {}
                    }
                }
                EventKind::Ejected(reason, enforced) => {
                    if matches!(reason, Ejection::Consecutive5xx | Ejection::SuccessRate) {
                        count("ejections_total");
                    }
                    if enforced {
                        count("ejections_enforced_total");
                        count(&format!("ejections_enforced_{}", reason.stat()));
                    }
                }
                EventKind::Overflow => count("ejections_overflow"),
                EventKind::Unejected | EventKind::Degraded | EventKind::Undegraded => {}
            }
            if let Some(line) = log_line(cluster, event)
                && let Some(path) = &self.bootstrap.outlier_event_log
            {
                let target = LogSink::File(path.clone());
                let sink = Sink::open(&target, self.options.file_flush_interval);
                sink.write(|out| out.extend_from_slice(format!("{line}\n").as_bytes()));
            }
        }
        let aside = ejected(entry.hosts());
        scope.gauge("ejections_active").set(aside as i64);
    }
}

/// Between two looks at all clusters.
const PAUSE: Duration = Duration::from_millis(20);

fn ejected(hosts: &HostSet) -> usize {
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    let all = hosts.hosts().iter();
    all.filter(|host| host.shared.ejected.load(relaxed)).count()
}

/// An event as Envoy logs it (`envoy.data.cluster.v3.OutlierDetectionEvent`); `None` for what is only counted.
fn log_line(cluster: &str, event: &Event) -> Option<Value> {
    let whole = |rate: f64| rate.max(0.0) as u32;
    let (host, average, threshold) = event.rates;
    let mut line = json!({
        "timestamp": timestamp(),
        "cluster_name": cluster,
        "upstream_url": event.host.address.to_string(),
        "num_ejections": event.ejections,
        "enforced": false,
        "action": "EJECT",
        "type": "CONSECUTIVE_5XX",
    });
    if let Some(since) = event.since_last {
        // A wrapped 64-bit number is a text in JSON.
        line["secs_since_last_action"] = since.as_secs().to_string().into();
    }
    match event.kind {
        EventKind::Ejected(reason, enforced) => {
            line["type"] = kind(reason).into();
            line["enforced"] = enforced.into();
            let (name, detail) = match reason {
                Ejection::SuccessRate | Ejection::SuccessRateLocalOrigin => (
                    "eject_success_rate_event",
                    json!({
                        "host_success_rate": whole(host),
                        "cluster_average_success_rate": whole(average),
                        "cluster_success_rate_ejection_threshold": whole(threshold),
                    }),
                ),
                Ejection::FailurePercentage | Ejection::FailurePercentageLocalOrigin => (
                    "eject_failure_percentage_event",
                    json!({ "host_success_rate": whole(host) }),
                ),
                _ => ("eject_consecutive_event", json!({})),
            };
            line[name] = detail;
        }
        EventKind::Unejected => line["action"] = "UNEJECT".into(),
        EventKind::Degraded => {
            line["type"] = "DEGRADED".into();
            line["enforced"] = true.into();
        }
        EventKind::Undegraded => {
            line["type"] = "DEGRADED".into();
            line["action"] = "UNEJECT".into();
        }
        EventKind::Detected(_) | EventKind::Overflow => return None,
    }
    Some(line)
}

fn kind(reason: Ejection) -> &'static str {
    match reason {
        Ejection::Consecutive5xx => "CONSECUTIVE_5XX",
        Ejection::ConsecutiveGatewayFailure => "CONSECUTIVE_GATEWAY_FAILURE",
        Ejection::SuccessRate => "SUCCESS_RATE",
        Ejection::ConsecutiveLocalOriginFailure => "CONSECUTIVE_LOCAL_ORIGIN_FAILURE",
        Ejection::SuccessRateLocalOrigin => "SUCCESS_RATE_LOCAL_ORIGIN",
        Ejection::FailurePercentage => "FAILURE_PERCENTAGE",
        Ejection::FailurePercentageLocalOrigin => "FAILURE_PERCENTAGE_LOCAL_ORIGIN",
    }
}

/// Now, as protobuf's JSON writes times.
pub(super) fn timestamp() -> String {
    jiff::Timestamp::try_from(SystemTime::now())
        .map(|now| format!("{now:.3}"))
        .unwrap_or_default()
}
