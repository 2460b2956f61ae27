//! ServiceEntry and WorkloadEntry.

use proto::istio::networking::v1alpha3::{ServiceEntry, WorkloadEntry, service_entry::Resolution};

use super::{Report, names};
use crate::Meta;

pub(super) fn check(report: &mut Report, meta: &Meta, spec: &ServiceEntry) {
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        report.error(
            "spec.endpoints",
            "cannot stand beside workloadSelector: give one of the two",
        );
    }
    if spec.hosts.is_empty() {
        report.error("spec.hosts", "a service needs at least one host");
    }
    let resolution = spec.resolution();
    for (i, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{i}]");
        if host == "*" {
            report.error(
                field,
                "\"*\" is no host: name a domain, as in *.example.com",
            );
            continue;
        }
        report.check(&field, names::wildcard_domain(host));
        if host.contains('*') && !host.starts_with("*.") && resolution != Resolution::DynamicDns {
            report.warning(
                &field,
                "a \"*\" that is only a part of a label matches nothing",
            );
        }
    }
    for (i, address) in spec.addresses.iter().enumerate() {
        let field = format!("spec.addresses[{i}]");
        report.check(&field, names::subnet(address));
        if address.contains('/') && !matches!(resolution, Resolution::None | Resolution::Static) {
            report.error(&field, "ranges are for resolution NONE and STATIC only");
        }
    }
    ports(report, spec);
    let names: Vec<&str> = spec.ports.iter().map(|p| p.name.as_str()).collect();
    match resolution {
        Resolution::None => {
            if !spec.endpoints.is_empty() {
                report.error(
                    "spec.endpoints",
                    "must be left out with resolution NONE: traffic goes where the caller aimed",
                );
            }
            if spec.workload_selector.is_some() {
                report.warning(
                    "spec.workloadSelector",
                    "has no effect with resolution NONE",
                );
            }
        }
        Resolution::Static => {
            for (i, endpoint) in spec.endpoints.iter().enumerate() {
                workload(
                    report,
                    &format!("spec.endpoints[{i}]"),
                    endpoint,
                    Some(&names),
                    false,
                );
            }
        }
        Resolution::Dns | Resolution::DnsRoundRobin => dns(report, spec, &names),
        Resolution::DynamicDns => dynamic(report, spec),
    }
    if resolution != Resolution::None && spec.hosts.len() > 1 {
        let plain = |p: &str| {
            !matches!(
                names::protocol(p),
                Some(names::Protocol::Http | names::Protocol::Tls)
            )
        };
        if let Some(i) = spec.ports.iter().position(|p| plain(&p.protocol)) {
            report.error(
                format!("spec.ports[{i}].protocol"),
                "with several hosts only HTTP and TLS tell them apart",
            );
        }
    }
    report.export_to(&meta.namespace, &spec.export_to, true);
}

fn ports(report: &mut Report, spec: &ServiceEntry) {
    for (i, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{i}]");
        let before = &spec.ports[..i];
        if before.iter().any(|p| p.name == port.name) {
            report.error(
                format!("{field}.name"),
                format!("{:?} is given twice", port.name),
            );
        }
        if before.iter().any(|p| p.number == port.number) {
            report.error(
                format!("{field}.number"),
                format!("{} is given twice", port.number),
            );
        }
        report.check(format!("{field}.name"), names::label(&port.name));
        report.port(format!("{field}.number"), port.number);
        if port.target_port != 0 {
            report.port(format!("{field}.targetPort"), port.target_port);
        }
        if !port.protocol.is_empty() && names::protocol(&port.protocol).is_none() {
            report.error(
                format!("{field}.protocol"),
                format!("{:?} is no protocol that is known", port.protocol),
            );
        }
    }
}

fn dns(report: &mut Report, spec: &ServiceEntry, ports: &[&str]) {
    if spec.endpoints.is_empty() {
        for (i, host) in spec.hosts.iter().enumerate() {
            if host.contains('*') {
                report.error(
                    format!("spec.hosts[{i}]"),
                    "a wildcard cannot be resolved: give endpoints, or resolution NONE",
                );
            }
        }
    }
    if spec.resolution() == Resolution::DnsRoundRobin && spec.endpoints.len() > 1 {
        report.error(
            "spec.endpoints",
            "DNS_ROUND_ROBIN takes one endpoint; use DNS for several",
        );
    }
    for (i, endpoint) in spec.endpoints.iter().enumerate() {
        workload(
            report,
            &format!("spec.endpoints[{i}]"),
            endpoint,
            Some(ports),
            true,
        );
    }
}

fn dynamic(report: &mut Report, spec: &ServiceEntry) {
    for (i, host) in spec.hosts.iter().enumerate() {
        if !host.starts_with('*') {
            report.error(
                format!("spec.hosts[{i}]"),
                "must be a wildcard with resolution DYNAMIC_DNS",
            );
        }
    }
    if !spec.addresses.is_empty() {
        report.error(
            "spec.addresses",
            "must be left out with resolution DYNAMIC_DNS",
        );
    }
    if !spec.endpoints.is_empty() {
        report.error(
            "spec.endpoints",
            "must be left out with resolution DYNAMIC_DNS",
        );
    }
    for (i, port) in spec.ports.iter().enumerate() {
        if !matches!(
            port.protocol.to_ascii_uppercase().as_str(),
            "HTTP" | "HTTP2" | "GRPC" | "TLS"
        ) {
            report.error(
                format!("spec.ports[{i}].protocol"),
                "must be HTTP, HTTP2, GRPC or TLS with resolution DYNAMIC_DNS",
            );
        }
    }
}

/// `ports`: names of the service's ports, for an endpoint of one. `host_names`: whether the address may be a name.
pub(super) fn workload(
    report: &mut Report,
    field: &str,
    entry: &WorkloadEntry,
    ports: Option<&[&str]>,
    host_names: bool,
) {
    if entry.address.is_empty() {
        if entry.network.is_empty() {
            report.error(format!("{field}.address"), "is missing");
        } else {
            report.warning(
                format!("{field}.address"),
                "is missing: the workload is reached through its network's gateway",
            );
        }
    } else if let Some(path) = entry.address.strip_prefix("unix://") {
        report.check(format!("{field}.address"), names::unix_path(path));
        if !entry.ports.is_empty() {
            report.error(
                format!("{field}.ports"),
                "must be left out with a unix socket",
            );
        }
        if ports.is_some_and(|p| p.len() != 1) {
            report.error(
                format!("{field}.address"),
                "a unix socket serves exactly one port of the service",
            );
        }
    } else if names::ip(&entry.address).is_err() {
        let checked = if host_names {
            names::fqdn(&entry.address)
        } else {
            Err(format!(
                "{:?} is no IP address; names need resolution DNS",
                entry.address
            ))
        };
        report.check(format!("{field}.address"), checked);
    }
    for (name, port) in &entry.ports {
        let field = format!("{field}.ports[{name:?}]");
        if ports.is_some_and(|p| !p.contains(&name.as_str())) {
            report.error(&field, "the service has no port of this name");
        }
        report.check(&field, names::label(name));
        report.port(&field, *port);
    }
    report.check(format!("{field}.labels"), names::label_map(&entry.labels));
}
