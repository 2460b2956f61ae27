//! EndpointSlices for Services that have none: what Kubernetes' controller would write, from Service × Pod.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use crate::{
    Meta, Object, Snapshot, Source,
    kubernetes::{
        AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice, IntOrString, Pod,
        SERVICE_NAME_LABEL, Service, ServicePort, TargetRef,
    },
    object::labels_match,
};

/// The label that says who keeps a slice; a user who reads a dump sees that nobody wrote this one.
const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGED_BY: &str = "outrigger";

/// Adds to `snapshot` a slice for every Service with a selector that no slice names. Slices of `previous` that came out
/// the same are kept, so that they are the same object in memory.
pub(crate) fn derive(snapshot: &mut Snapshot, previous: &Snapshot) {
    let mut written: BTreeMap<(&str, &str), ()> = BTreeMap::new();
    for slice in snapshot.endpoint_slices.iter() {
        if let Some(service) = slice.meta.labels.get(SERVICE_NAME_LABEL) {
            written.insert((&slice.meta.namespace, service), ());
        }
    }
    let mut derived = Vec::new();
    for service in snapshot.services.iter() {
        let wanted = !service.spec.spec.selector.is_empty() && !service.spec.is_external_name();
        if !wanted || written.contains_key(&(&*service.meta.namespace, &*service.meta.name)) {
            continue;
        }
        let pods: Vec<&Object<Pod>> = snapshot
            .pods
            .in_namespace(&service.meta.namespace)
            .map(|p| &**p)
            .filter(|p| labels_match(&service.spec.spec.selector, &p.meta.labels))
            .filter(|p| !p.spec.is_finished() && !p.spec.addresses().is_empty())
            .collect();
        derived.extend(slices(service, &pods, snapshot));
    }
    for slice in derived {
        let kept = previous
            .endpoint_slices
            .get(&slice.meta.namespace, &slice.meta.name)
            .filter(|old| {
                old.meta == slice.meta && old.spec == slice.spec && old.source == slice.source
            })
            .cloned();
        snapshot
            .endpoint_slices
            .insert(kept.unwrap_or_else(|| Arc::new(slice)));
    }
}

/// One slice for each address family and set of port numbers: pods may give one port name different numbers.
fn slices(
    service: &Object<Service>,
    pods: &[&Object<Pod>],
    snapshot: &Snapshot,
) -> Vec<Object<EndpointSlice>> {
    type Group = (bool, Vec<(usize, u16)>);
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for pod in pods {
        let ports: Vec<(usize, u16)> = service
            .spec
            .spec
            .ports
            .iter()
            .enumerate()
            .filter_map(|(i, port)| Some((i, target(port, &pod.spec)?)))
            .collect();
        let families: Vec<bool> = families(&service.spec, &pod.spec);
        for six in families {
            let Some(address) = pod.spec.addresses().into_iter().find(|a| is_six(a) == six) else {
                continue;
            };
            groups
                .entry((six, ports.clone()))
                .or_default()
                .push(endpoint(service, pod, address, snapshot));
        }
    }
    let mut out = Vec::new();
    for (number, ((six, ports), endpoints)) in (1..).zip(groups) {
        let ports = ports
            .into_iter()
            .map(|(i, number)| {
                let port = &service.spec.spec.ports[i];
                EndpointPort {
                    name: port.name.clone(),
                    protocol: port.protocol().to_owned(),
                    port: Some(number),
                    app_protocol: port.app_protocol.clone(),
                }
            })
            .collect();
        let mut meta = Meta {
            namespace: service.meta.namespace.clone(),
            name: format!("{}-derived-{number}", service.meta.name),
            creation_timestamp: service.meta.creation_timestamp,
            ..Meta::default()
        };
        meta.labels
            .insert(SERVICE_NAME_LABEL.to_owned(), service.meta.name.clone());
        meta.labels
            .insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
        let address_type = if six {
            AddressType::IPv6
        } else {
            AddressType::IPv4
        };
        let source = Source {
            file: service.source.file.clone(),
            line: service.source.line,
        };
        out.push(Object {
            meta,
            spec: EndpointSlice {
                address_type,
                endpoints,
                ports,
            },
            source,
        });
    }
    out
}

fn endpoint(
    service: &Object<Service>,
    pod: &Object<Pod>,
    address: &str,
    snapshot: &Snapshot,
) -> Endpoint {
    let terminating = pod.meta.deletion_timestamp.is_some();
    let ready = pod.spec.is_ready();
    let zone = snapshot
        .nodes
        .get("", &pod.spec.spec.node_name)
        .and_then(|n| n.meta.labels.get("topology.kubernetes.io/zone"))
        .cloned()
        .unwrap_or_default();
    let named = pod.spec.spec.subdomain == service.meta.name && !pod.spec.spec.hostname.is_empty();
    Endpoint {
        addresses: vec![address.to_owned()],
        conditions: EndpointConditions {
            ready: Some(service.spec.spec.publish_not_ready_addresses || ready && !terminating),
            serving: Some(service.spec.spec.publish_not_ready_addresses || ready),
            terminating: Some(terminating),
        },
        hostname: if named {
            pod.spec.spec.hostname.clone()
        } else {
            String::new()
        },
        node_name: pod.spec.spec.node_name.clone(),
        zone,
        target_ref: Some(TargetRef {
            kind: "Pod".to_owned(),
            name: pod.meta.name.clone(),
            namespace: pod.meta.namespace.clone(),
        }),
    }
}

/// Which families a service serves: what it declares, else those of its own addresses, else the pod's first.
fn families(service: &Service, pod: &Pod) -> Vec<bool> {
    let declared: Vec<bool> = service
        .spec
        .ip_families
        .iter()
        .map(|f| f == "IPv6")
        .collect();
    if !declared.is_empty() {
        return declared;
    }
    let mut own: Vec<bool> = std::iter::once(&service.spec.cluster_ip)
        .chain(&service.spec.cluster_ips)
        .filter(|a| a.parse::<IpAddr>().is_ok())
        .map(|a| is_six(a))
        .collect();
    own.dedup();
    if own.is_empty() {
        pod.addresses()
            .first()
            .map(|a| is_six(a))
            .into_iter()
            .collect()
    } else {
        own
    }
}

fn is_six(address: &str) -> bool {
    address.contains(':')
}

fn target(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(n)) => Some(*n),
        Some(IntOrString::String(name)) => pod.port_named(name, port.protocol()),
    }
}
