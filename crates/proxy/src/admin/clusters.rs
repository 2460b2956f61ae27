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
};

use super::{Admin, Answer, Params};
use crate::{
    cluster::{ClusterEntry, Host},
    plan::{
        Address,
        cluster::{Discovery, Thresholds},
        endpoint::HealthStatus,
    },
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
            Answer::json(&proto::json::to_value(&Clusters { cluster_statuses }))
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
    match &entry.plan.discovery {
        Discovery::Eds { service_name, .. } => service_name,
        _ => "",
    }
}

fn text(admin: &Admin, entry: &ClusterEntry, out: &mut String) -> std::fmt::Result {
    let plan = &entry.plan;
    let name = &plan.name;
    writeln!(out, "{name}::observability_name::{}", plan.stat_name())?;
    if plan.outlier_detection.is_some() {
        for figure in ["success_rate_average", "success_rate_ejection_threshold"] {
            writeln!(out, "{name}::outlier::{figure}::-1")?;
            writeln!(out, "{name}::outlier::local_origin_{figure}::-1")?;
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
    for host in entry.hosts.hosts() {
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
        writeln!(out, "{at}::success_rate::-1")?;
        writeln!(out, "{at}::local_origin_success_rate::-1")?;
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

fn health_flags(host: &Host) -> String {
    let mut flags = String::new();
    if host.shared.ejected.load(Relaxed) {
        flags.push_str("/failed_outlier_check");
    }
    flags.push_str(match host.health {
        HealthStatus::Unknown | HealthStatus::Healthy => "",
        HealthStatus::Unhealthy | HealthStatus::Timeout => "/failed_eds_health",
        HealthStatus::Draining => "/eds_status_draining",
        HealthStatus::Degraded => "/degraded_eds_health",
    });
    if flags.is_empty() {
        "healthy".to_owned()
    } else {
        flags
    }
}

fn canary(host: &Host) -> bool {
    let value = host.metadata.lookup("envoy.lb", &["canary"]);
    value.and_then(serde_json::Value::as_bool).unwrap_or(false)
}

fn status(admin: &Admin, entry: &ClusterEntry) -> ClusterStatus {
    let plan = &entry.plan;
    let thresholds = [
        (
            core::RoutingPriority::Default,
            &plan.circuit_breakers.default,
        ),
        (core::RoutingPriority::High, &plan.circuit_breakers.high),
    ];
    ClusterStatus {
        name: plan.name.to_string(),
        added_via_api: added_via_api(admin, &plan.name),
        host_statuses: entry
            .hosts
            .hosts()
            .iter()
            .map(|host| host_status(host))
            .collect(),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: thresholds
                .into_iter()
                .map(|(p, t)| thresholds_message(p, t))
                .collect(),
            ..CircuitBreakers::default()
        }),
        observability_name: plan.stat_name().to_string(),
        eds_service_name: eds_service_name(entry).to_owned(),
        ..ClusterStatus::default()
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
    HostStatus {
        address: Some(address_message(&host.address)),
        stats: figures(host).into_iter().map(metric).collect(),
        health_status: Some(HostHealthStatus {
            failed_outlier_check: host.shared.ejected.load(Relaxed),
            eds_health_status: status as i32,
            ..HostHealthStatus::default()
        }),
        weight: host.weight,
        hostname: host.hostname.to_string(),
        priority: host.priority,
        locality: Some(core::Locality {
            region: host.locality.region.clone(),
            zone: host.locality.zone.clone(),
            sub_zone: host.locality.sub_zone.clone(),
        }),
        ..HostStatus::default()
    }
}

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
