//! `/clusters`: limits and hosts of every cluster.

use std::{fmt::Write, sync::atomic::Ordering::Relaxed};

use proto::envoy::{
    admin::v3::{
        ClusterStatus, Clusters, HostHealthStatus, HostStatus, SimpleMetric, simple_metric,
    },
    config::{
        cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds as ThresholdsMessage},
        core::v3::{
            self as core, Address as AddressMessage, Pipe, SocketAddress, address,
            socket_address::PortSpecifier,
        },
    },
    r#type::v3 as types,
};

use super::{Admin, Answer, Params};
use crate::{
    cluster::{ClusterEntry, Host, Rates, shared::HealthFlag},
    plan::{Address, cluster::Thresholds, endpoint::HealthStatus},
};

pub(super) fn clusters(admin: &Admin, params: &Params) -> Answer {
    match params.get("format") {
        Some("json") => {
            let cluster_statuses = admin
                .server
                .clusters()
                .iter()
                .map(|entry| status(admin, entry))
                .collect();
            Answer::message(&Clusters { cluster_statuses })
        }
        None | Some("" | "text") => {
            let mut out = String::new();
            for entry in admin.server.clusters() {
                // Writing to a String does not fail.
                let _ = text(admin, &entry, &mut out);
            }
            Answer::text(out)
        }
        Some(_) => Answer::text("usage: /clusters?format=(json|text)\n").status(400),
    }
}

/// Whether discovery brought it (and not the bootstrap).
fn added_via_api(admin: &Admin, name: &str) -> bool {
    admin
        .truth
        .borrow()
        .clusters
        .entries
        .get(name)
        .is_some_and(|e| !e.fixed)
}

fn eds_service_name(entry: &ClusterEntry) -> &str {
    entry.plan.eds().map_or("", |(service, _)| service)
}

fn text(admin: &Admin, entry: &ClusterEntry, out: &mut String) -> std::fmt::Result {
    let (plan, hosts) = entry.look();
    let name = &plan.name;
    writeln!(out, "{name}::observability_name::{}", plan.stat_name())?;
    if plan.outlier_detection.is_some() {
        let rates = admin.server.success_rates(name);
        for (which, prefix) in ["", "local_origin_"].into_iter().enumerate() {
            let rates = rates.map_or(NO_RATES, |rates| rates[which]);
            let at = format!("{name}::outlier::{prefix}success_rate");
            writeln!(out, "{at}_average::{}", rates.average)?;
            writeln!(out, "{at}_ejection_threshold::{}", rates.threshold)?;
        }
    }
    for (priority, limits) in [
        ("default", &plan.circuit_breakers.default),
        ("high", &plan.circuit_breakers.high),
    ] {
        for (limit, value) in [
            ("max_connections", limits.max_connections),
            ("max_pending_requests", limits.max_pending_requests),
            ("max_requests", limits.max_requests),
            ("max_retries", limits.max_retries),
        ] {
            writeln!(out, "{name}::{priority}_priority::{limit}::{value}")?;
        }
    }
    writeln!(out, "{name}::added_via_api::{}", added_via_api(admin, name))?;
    let service = eds_service_name(entry);
    if !service.is_empty() {
        writeln!(out, "{name}::eds_service_name::{service}")?;
    }
    for host in hosts.hosts() {
        let at = format!("{name}::{}", host.address);
        for (figure, _, value) in figures(host) {
            writeln!(out, "{at}::{figure}::{value}")?;
        }
        writeln!(out, "{at}::hostname::{}", host.hostname)?;
        writeln!(out, "{at}::health_flags::{}", health_flags(host))?;
        writeln!(out, "{at}::weight::{}", host.weight)?;
        writeln!(out, "{at}::region::{}", host.locality.region)?;
        writeln!(out, "{at}::zone::{}", host.locality.zone)?;
        writeln!(out, "{at}::sub_zone::{}", host.locality.sub_zone)?;
        writeln!(out, "{at}::canary::{}", canary(host))?;
        writeln!(out, "{at}::priority::{}", host.priority)?;
        let [own, local] = [0, 1].map(|which| host.shared.success_rate(which));
        writeln!(out, "{at}::success_rate::{own}")?;
        writeln!(out, "{at}::local_origin_success_rate::{local}")?;
    }
    Ok(())
}

/// Envoy's names, kinds and values, sorted by name.
fn figures(host: &Host) -> [(&'static str, simple_metric::Type, u64); 8] {
    use simple_metric::Type::{Counter, Gauge};
    let shared = &host.shared;
    [
        ("cx_active", Gauge, shared.cx_active.load(Relaxed)),
        (
            "cx_connect_fail",
            Counter,
            shared.cx_connect_fail.load(Relaxed),
        ),
        ("cx_total", Counter, shared.cx_total.load(Relaxed)),
        ("rq_active", Gauge, shared.rq_active.load(Relaxed)),
        ("rq_error", Counter, shared.rq_error.load(Relaxed)),
        ("rq_success", Counter, shared.rq_success.load(Relaxed)),
        ("rq_timeout", Counter, shared.rq_timeout.load(Relaxed)),
        ("rq_total", Counter, shared.rq_total.load(Relaxed)),
    ]
}

/// Envoy's words, in its order.
fn health_flags(host: &Host) -> String {
    let flag = |flag| host.shared.flag(flag);
    let health = |status| host.health == status;
    let failed = health(HealthStatus::Unhealthy) || health(HealthStatus::Timeout);
    let flags: String = [
        (flag(HealthFlag::FailedActiveHc), "/failed_active_hc"),
        (host.shared.ejected.load(Relaxed), "/failed_outlier_check"),
        (failed, "/failed_eds_health"),
        (flag(HealthFlag::DegradedActiveHc), "/degraded_active_hc"),
        (health(HealthStatus::Degraded), "/degraded_eds_health"),
        (
            flag(HealthFlag::PendingDynamicRemoval),
            "/pending_dynamic_removal",
        ),
        (flag(HealthFlag::PendingActiveHc), "/pending_active_hc"),
        (
            flag(HealthFlag::ExcludedViaImmediateHcFail),
            "/excluded_via_immediate_hc_fail",
        ),
        (flag(HealthFlag::ActiveHcTimeout), "/active_hc_timeout"),
        (health(HealthStatus::Draining), "/eds_status_draining"),
        (
            flag(HealthFlag::DegradedOutlierDetection),
            "/degraded_outlier_detection",
        ),
    ]
    .into_iter()
    .filter_map(|(set, word)| set.then_some(word))
    .collect();
    match flags.is_empty() {
        true => "healthy".to_owned(),
        false => flags,
    }
}

fn canary(host: &Host) -> bool {
    let value = host.metadata.lookup("envoy.lb", &["canary"]);
    value.and_then(serde_json::Value::as_bool).unwrap_or(false)
}

fn status(admin: &Admin, entry: &ClusterEntry) -> ClusterStatus {
    let (plan, hosts) = entry.look();
    let thresholds = [
        (
            core::RoutingPriority::Default,
            &plan.circuit_breakers.default,
        ),
        (core::RoutingPriority::High, &plan.circuit_breakers.high),
    ];
    let threshold = |which: usize| {
        let rates = admin.server.success_rates(&plan.name)?;
        percent(rates[which].threshold)
    };
    ClusterStatus {
        success_rate_ejection_threshold: threshold(0),
        local_origin_success_rate_ejection_threshold: threshold(1),
        name: plan.name.to_string(),
        added_via_api: added_via_api(admin, &plan.name),
        host_statuses: hosts.hosts().iter().map(|host| host_status(host)).collect(),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: thresholds
                .into_iter()
                .map(|(p, t)| thresholds_message(p, t))
                .collect(),
            ..CircuitBreakers::default()
        }),
        observability_name: plan.stat_name().to_string(),
        eds_service_name: eds_service_name(entry).to_owned(),
    }
}

fn thresholds_message(priority: core::RoutingPriority, t: &Thresholds) -> ThresholdsMessage {
    ThresholdsMessage {
        priority: priority as i32,
        max_connections: Some(t.max_connections),
        max_pending_requests: Some(t.max_pending_requests),
        max_requests: Some(t.max_requests),
        max_retries: Some(t.max_retries),
        ..ThresholdsMessage::default()
    }
}

fn host_status(host: &Host) -> HostStatus {
    let status = match host.health {
        // Envoy shows what is not said as healthy.
        HealthStatus::Unknown | HealthStatus::Healthy => core::HealthStatus::Healthy,
        HealthStatus::Unhealthy => core::HealthStatus::Unhealthy,
        HealthStatus::Draining => core::HealthStatus::Draining,
        HealthStatus::Timeout => core::HealthStatus::Timeout,
        HealthStatus::Degraded => core::HealthStatus::Degraded,
    };
    let metric = |(name, kind, value): (&str, simple_metric::Type, u64)| SimpleMetric {
        r#type: kind as i32,
        value,
        name: name.to_owned(),
    };
    let flag = |flag| host.shared.flag(flag);
    HostStatus {
        address: Some(address_message(&host.address)),
        stats: figures(host).into_iter().map(metric).collect(),
        health_status: Some(HostHealthStatus {
            failed_active_health_check: flag(HealthFlag::FailedActiveHc),
            failed_outlier_check: host.shared.ejected.load(Relaxed),
            failed_active_degraded_check: flag(HealthFlag::DegradedActiveHc),
            pending_dynamic_removal: flag(HealthFlag::PendingDynamicRemoval),
            pending_active_hc: flag(HealthFlag::PendingActiveHc),
            excluded_via_immediate_hc_fail: flag(HealthFlag::ExcludedViaImmediateHcFail),
            active_hc_timeout: flag(HealthFlag::ActiveHcTimeout),
            eds_health_status: status as i32,
            failed_degraded_outlier_detection: flag(HealthFlag::DegradedOutlierDetection),
        }),
        weight: host.weight,
        hostname: host.hostname.to_string(),
        priority: host.priority,
        locality: Some(core::Locality {
            region: host.locality.region.clone(),
            zone: host.locality.zone.clone(),
            sub_zone: host.locality.sub_zone.clone(),
        }),
        success_rate: percent(host.shared.success_rate(0)),
        local_origin_success_rate: percent(host.shared.success_rate(1)),
    }
}

/// A rate, where there is one.
fn percent(rate: f64) -> Option<types::Percent> {
    (rate >= 0.0).then_some(types::Percent { value: rate })
}

/// Where there is no outlier detection any more.
const NO_RATES: Rates = Rates {
    average: -1.0,
    threshold: -1.0,
};

/// An address as a message.
pub(super) fn address_message(address: &Address) -> AddressMessage {
    let socket = |address: String, port: u16| {
        address::Address::SocketAddress(SocketAddress {
            address,
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..SocketAddress::default()
        })
    };
    AddressMessage {
        address: Some(match address {
            Address::Socket(a) => socket(a.ip().to_string(), a.port()),
            Address::Name { host, port } => socket(host.to_string(), *port),
            Address::Pipe { path, mode } => address::Address::Pipe(Pipe {
                path: path.display().to_string(),
                mode: *mode,
            }),
        }),
    }
}
