//! ServiceEntries as services and endpoints of the mesh: a service for each host and address.

use std::{collections::BTreeMap, sync::Arc};

use config::{Kind, Object, labels_match};
use ipnet::IpNet;
use proto::istio::networking::v1alpha3::{
    ServiceEntry, ServicePort,
    service_entry::{Location, Resolution as EntryResolution},
};

use super::{
    Created, Labels, Origin,
    endpoint::{Endpoint, Health},
    host,
    kubernetes::traffic_distribution,
    port::{Port, Protocol, TargetPort},
    service::{Registry, Resolution, Service, UNSPECIFIED},
    workload::{Place, Workload, Workloads, is_ip},
};

/// Label by which a ServiceEntry asks for, or refuses, an address of its own.
const AUTO_ALLOCATE_LABEL: &str = "networking.istio.io/enable-autoallocate-ip";

/// The services of a ServiceEntry. Two addresses of one host give two services of one hostname.
pub(super) fn services(
    object: &Arc<Object<ServiceEntry>>,
    namespace_annotations: Option<&Labels>,
    allocator: &mut Allocator,
) -> Vec<Service> {
    let (meta, spec) = (&object.meta, &object.spec);
    let resolution = match spec.resolution() {
        EntryResolution::None => Resolution::Passthrough,
        EntryResolution::Static => Resolution::ClientSide,
        EntryResolution::Dns => Resolution::Dns,
        EntryResolution::DnsRoundRobin => Resolution::DnsRoundRobin,
        EntryResolution::DynamicDns => Resolution::DynamicDns,
    };
    let ports: Vec<_> = spec.ports.iter().map(port).collect();
    let passthrough_ports: BTreeMap<u32, u32> = spec
        .ports
        .iter()
        .filter(|p| resolution == Resolution::Passthrough && p.target_port != 0)
        .map(|p| (p.number, p.target_port))
        .collect();
    let addresses: Vec<String> = spec.addresses.iter().filter_map(|a| address(a)).collect();
    let allocate = spec.addresses.is_empty()
        && resolution != Resolution::Passthrough
        && meta
            .labels
            .get(AUTO_ALLOCATE_LABEL)
            .is_none_or(|v| !v.eq_ignore_ascii_case("false"));
    let mut out = Vec::new();
    for hostname in &spec.hosts {
        let auto = (allocate && !host::is_wildcard(hostname))
            .then(|| allocator.next())
            .flatten();
        let unspecified = [UNSPECIFIED.to_owned()];
        let list = if spec.addresses.is_empty() {
            &unspecified[..]
        } else {
            &addresses[..]
        };
        for default_address in list {
            out.push(Service {
                hostname: hostname.clone(),
                name: hostname.clone(),
                namespace: meta.namespace.clone(),
                registry: Registry::External,
                ports: ports.clone(),
                default_address: default_address.clone(),
                cluster_ips: Vec::new(),
                auto_v4: auto.as_ref().map(|(v4, _)| v4.clone()),
                auto_v6: auto.as_ref().map(|(_, v6)| v6.clone()),
                external_addresses: Vec::new(),
                resolution,
                mesh_external: spec.location() == Location::MeshExternal,
                export_to: spec.export_to.iter().cloned().collect(),
                labels: meta.labels.clone(),
                selector: spec
                    .workload_selector
                    .as_ref()
                    .map(|s| s.labels.clone())
                    .unwrap_or_default(),
                service_accounts: spec.subject_alt_names.clone(),
                external_name: String::new(),
                aliases: Vec::new(),
                node_local: false,
                publish_not_ready: false,
                traffic_distribution: traffic_distribution(
                    "",
                    &meta.annotations,
                    namespace_annotations,
                ),
                dns_race_connect: meta
                    .annotations
                    .get("ambient.istio.io/connect-strategy")
                    .or_else(|| {
                        meta.annotations
                            .get("networking.istio.io/dns-connect-strategy")
                    })
                    .is_some_and(|s| s.eq_ignore_ascii_case("RACE_FIRST_TCP_CONNECT")),
                passthrough_ports: passthrough_ports.clone(),
                object_name: meta.name.clone(),
                created: Created(meta.creation_timestamp.unwrap_or(0)),
                origin: Origin::of(Kind::ServiceEntry, object),
            });
        }
    }
    out
}

/// The endpoints that a ServiceEntry gives to one of its services.
pub(super) fn endpoints(
    object: &Object<ServiceEntry>,
    service: &Service,
    workloads: &Workloads,
    place: &Place<'_>,
) -> Vec<Endpoint> {
    let (meta, spec) = (&object.meta, &object.spec);
    let dns = matches!(
        service.resolution,
        Resolution::Dns | Resolution::DnsRoundRobin
    );
    let mut out = Vec::new();
    if let Some(selector) = &spec.workload_selector {
        let namespace = &meta.namespace;
        for pod in workloads.pods_in(namespace) {
            if labels_match(&selector.labels, &pod.labels) && !pod.addresses.is_empty() {
                add(&mut out, pod, &spec.ports, Health::Healthy);
            }
        }
        for entry in workloads.entries_in(namespace) {
            let usable = dns || entry.addresses.first().is_some_and(|a| is_ip(a));
            if usable && labels_match(&selector.labels, &entry.labels) {
                add(&mut out, entry, &spec.ports, Health::Unknown);
            }
        }
    } else if spec.endpoints.is_empty() && dns {
        // The host itself is what DNS is asked for.
        let mut workload = Workload::unknown(place.cluster);
        workload.augmented = Arc::default();
        workload.namespace = meta.namespace.clone();
        workload.workload_name = meta.name.clone();
        workload.addresses = vec![service.hostname.clone()];
        add(&mut out, &workload, &spec.ports, Health::Unknown);
    } else {
        for (i, endpoint) in spec.endpoints.iter().enumerate() {
            let name = format!("{}-{i}", meta.name);
            let none = Labels::new();
            let workload =
                Workload::from_entry(endpoint, &name, &meta.namespace, &none, &none, place);
            add(&mut out, &workload, &spec.ports, Health::Unknown);
        }
    }
    out
}

fn add(out: &mut Vec<Endpoint>, workload: &Workload, ports: &[ServicePort], health: Health) {
    let Some(address) = workload.addresses.first() else {
        return;
    };
    for port in ports {
        let socket = address.strip_prefix("unix://");
        let number = match workload.ports.get(&port.name) {
            _ if socket.is_some() => 0,
            Some(own) if *own > 0 => *own,
            _ if port.target_port > 0 => port.target_port,
            _ => port.number,
        };
        out.push(workload.endpoint(
            socket.unwrap_or(address),
            number,
            &port.name,
            port.number,
            health,
        ));
    }
}

fn port(port: &ServicePort) -> Port {
    let target = if port.target_port > 0 {
        port.target_port
    } else {
        port.number
    };
    Port {
        name: port.name.clone(),
        number: port.number,
        protocol: Protocol::parse(&port.protocol),
        target: TargetPort::Number(target),
    }
}

/// An address, or a CIDR (one that holds a single address is that address); `None` for anything else.
fn address(text: &str) -> Option<String> {
    if is_ip(text) {
        return Some(text.to_owned());
    }
    let net: IpNet = text.parse().ok()?;
    let single = net.prefix_len() == net.max_prefix_len();
    Some(if single {
        net.addr().to_string()
    } else {
        text.to_owned()
    })
}

/// Gives addresses of 240.240.0.0/16 and 2001:2::/48 to hosts that have none: in the order of asking, so that the
/// same objects get the same addresses.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    given: u32,
}

impl Allocator {
    /// The next pair; `None` when all 65,534 are taken.
    fn next(&mut self) -> Option<(String, String)> {
        let n = self.given + 1;
        if n >= 0xffff {
            return None;
        }
        self.given = n;
        Some((
            format!("240.240.{}.{}", n >> 8, n & 0xff),
            format!("2001:2::{n:x}"),
        ))
    }
}
