//! Which services a proxy's workload serves, and at which of its ports.

use std::{collections::BTreeSet, sync::Arc};

use config::labels_match;

use super::{
    Labels, Mesh, Protocol,
    node::Node,
    port::{Port, TargetPort},
    proxy::ServiceTarget,
    service::Registry,
    workload::Workload,
};

/// The service ports that a workload serves: of Kubernetes Services those whose selector takes it (or, where none
/// does, those whose slices name its address), and of ServiceEntries those that list it. Oldest service first.
pub(super) fn of(
    mesh: &Mesh,
    node: &Node,
    pod: Option<&Arc<Workload>>,
    labels: &Labels,
) -> Vec<ServiceTarget> {
    let mut out: Vec<ServiceTarget> = Vec::new();
    // A machine outside of Kubernetes is described by its WorkloadEntry.
    let entry = || {
        let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        let mut entries = mesh.workloads().entries_in(&node.namespace);
        entries.find(|e| e.addresses.iter().any(|a| addresses.contains(a)))
    };
    let workload = pod.or_else(entry);
    let workload_labels = workload.map_or(labels, |w| &w.labels);
    let namespace = pod.map_or(&node.namespace, |p| &p.namespace);
    for service in mesh.services().selecting(namespace, workload_labels) {
        if !labels_match(&service.selector, workload_labels) {
            continue;
        }
        // One target for each port of the workload and protocol: the first of the service's ports.
        let mut seen = BTreeSet::new();
        for port in &service.ports {
            let Some(target) = target_port(port, node, workload) else {
                continue;
            };
            if seen.insert((target, port.protocol)) {
                out.push(ServiceTarget {
                    service: service.clone(),
                    port: port.clone(),
                    target_port: target,
                });
            }
        }
    }
    let by_selector = !out.is_empty();
    for address in &node.addresses {
        for (service, number, target_port) in mesh.endpoint_index().at(&address.to_string()) {
            let wanted = service.namespace == *namespace
                && (service.registry == Registry::External || !by_selector);
            let Some(port) = service.port(*number).filter(|_| wanted) else {
                continue;
            };
            let target = ServiceTarget {
                service: service.clone(),
                port: port.clone(),
                target_port: *target_port,
            };
            if !out.contains(&target) {
                out.push(target);
            }
        }
    }
    out.sort_by(|a, b| {
        let age = a.service.created.cmp(&b.service.created);
        age.then_with(|| a.service.hostname.cmp(&b.service.hostname))
    });
    out
}

/// The number that a service's port leads to in the workload: where a WorkloadEntry says, else where the service says;
/// names are looked up in the pod (or in what only the proxy's metadata describes).
fn target_port(port: &Port, node: &Node, workload: Option<&Arc<Workload>>) -> Option<u32> {
    if let Some(number) = workload.and_then(|w| w.ports.get(&port.name)) {
        return Some(*number);
    }
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            let transport = if port.protocol == Protocol::Udp {
                "UDP"
            } else {
                "TCP"
            };
            if let Some(pod) = workload.and_then(|w| w.pod.as_ref()) {
                return pod.spec.port_named(name, transport).map(u32::from);
            }
            node.pod_ports
                .iter()
                .find(|p| p.name == *name)
                .map(|p| p.container_port)
        }
    }
}
