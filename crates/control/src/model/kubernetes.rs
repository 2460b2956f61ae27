//! Kubernetes Services and their EndpointSlices as services and endpoints of the mesh.

use std::{collections::BTreeMap, sync::Arc};

use config::{
    Kind, Object,
    kubernetes::{
        AddressType, Endpoint as SliceEndpoint, EndpointSlice, IntOrString, Service as CoreService,
    },
    labels_match,
};

use super::{
    Created, Labels, Origin,
    endpoint::{Endpoint, Health},
    port::{Port, Protocol, TargetPort},
    service::{Registry, Resolution, Service, TrafficDistribution, UNSPECIFIED},
    workload::{Workload, Workloads, is_ip, spiffe},
};

/// Label that asks for cookie or header based sessions, which keep draining endpoints.
const SESSION_LABELS: [&str; 2] = [
    "istio.io/persistent-session",
    "istio.io/persistent-session-header",
];

/// Whether draining endpoints stay known to callers.
pub fn keeps_sessions(labels: &Labels) -> bool {
    SESSION_LABELS
        .iter()
        .any(|l| labels.get(*l).is_some_and(|v| !v.is_empty()))
}

/// `NAME.NAMESPACE.svc.DOMAIN`.
pub fn hostname(name: &str, namespace: &str, domain: &str) -> String {
    format!("{name}.{namespace}.svc.{domain}")
}

/// A Service as a service of the mesh.
pub(super) fn service(
    object: &Arc<Object<CoreService>>,
    namespace_annotations: Option<&Labels>,
    domain: &str,
    trust_domain: &str,
) -> Service {
    let (meta, spec) = (&object.meta, &object.spec.spec);
    let external = object.spec.is_external_name() && !spec.external_name.is_empty();
    let mut cluster_ips = vec![UNSPECIFIED.to_owned()];
    let mut resolution = if external {
        Resolution::Alias
    } else {
        Resolution::ClientSide
    };
    if object.spec.is_headless() {
        resolution = Resolution::Passthrough;
    } else if !spec.cluster_ip.is_empty() {
        cluster_ips = if spec.cluster_ips.len() > 1 {
            spec.cluster_ips.clone()
        } else {
            vec![spec.cluster_ip.clone()]
        };
    }
    let annotation = |key: &str| meta.annotations.get(key).filter(|v| !v.is_empty());
    let commas = |key: &str| {
        annotation(key)
            .into_iter()
            .flat_map(|v| v.split(','))
            .map(str::to_owned)
    };
    let service_accounts = commas("alpha.istio.io/canonical-serviceaccounts")
        .chain(
            commas("alpha.istio.io/kubernetes-serviceaccounts")
                .map(|account| spiffe(trust_domain, &meta.namespace, &account)),
        )
        .collect();
    let mut external_addresses = Vec::new();
    if spec.kind == "LoadBalancer" {
        external_addresses.extend(object.spec.status.ingress().iter().filter_map(|i| {
            [&i.ip, &i.hostname]
                .into_iter()
                .find(|a| !a.is_empty())
                .cloned()
        }));
    }
    external_addresses.extend(spec.external_ips.iter().cloned());
    Service {
        hostname: hostname(&meta.name, &meta.namespace, domain),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        registry: Registry::Kubernetes,
        ports: spec
            .ports
            .iter()
            .map(|p| Port {
                name: p.name.clone(),
                number: p.port.into(),
                protocol: Protocol::of_kubernetes(
                    p.port.into(),
                    &p.name,
                    p.protocol(),
                    p.app_protocol.as_deref(),
                ),
                target: match &p.target_port {
                    Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
                    Some(IntOrString::Int(number)) if *number != 0 => {
                        TargetPort::Number((*number).into())
                    }
                    _ => TargetPort::Number(p.port.into()),
                },
            })
            .collect(),
        default_address: cluster_ips[0].clone(),
        cluster_ips,
        auto_v4: None,
        auto_v6: None,
        external_addresses,
        resolution,
        mesh_external: external,
        export_to: commas("networking.istio.io/exportTo")
            .map(|ns| ns.trim().to_owned())
            .collect(),
        labels: meta.labels.clone(),
        selector: spec.selector.clone(),
        service_accounts,
        external_name: if external {
            spec.external_name.clone()
        } else {
            String::new()
        },
        aliases: Vec::new(),
        node_local: spec.internal_traffic_policy == "Local",
        publish_not_ready: spec.publish_not_ready_addresses,
        traffic_distribution: traffic_distribution(
            &spec.traffic_distribution,
            &meta.annotations,
            namespace_annotations,
        ),
        dns_race_connect: false,
        passthrough_ports: BTreeMap::new(),
        object_name: meta.name.clone(),
        created: Created(meta.creation_timestamp.unwrap_or(0)),
        origin: Origin::of(Kind::Service, object),
    }
}

/// `spec.trafficDistribution`, else the annotation of the object, else that of its namespace.
pub(super) fn traffic_distribution(
    spec: &str,
    annotations: &Labels,
    namespace: Option<&Labels>,
) -> TrafficDistribution {
    const ANNOTATION: &str = "networking.istio.io/traffic-distribution";
    let read = |text: &str| match text.to_ascii_lowercase().as_str() {
        "preferclose" | "prefersamezone" => Some(TrafficDistribution::SameZone),
        "prefersamenode" => Some(TrafficDistribution::SameNode),
        _ => None,
    };
    if let Some(found) = read(spec) {
        return found;
    }
    [Some(annotations), namespace]
        .into_iter()
        .flatten()
        .find_map(|a| a.get(ANNOTATION).filter(|v| !v.is_empty()))
        .and_then(|v| read(v))
        .unwrap_or_default()
}

/// The endpoints of a Service: its slices', then WorkloadEntries that its selector takes.
///
/// Where none is ready, those count whose nodes have only not reported: after an outage of the API server that may be all
/// pods of the cluster, which are as well as ever.
pub(super) fn endpoints(
    service: &Service,
    slices: &[Arc<Object<EndpointSlice>>],
    workloads: &Workloads,
    unknown: &Workload,
) -> Vec<Endpoint> {
    let mut out = Vec::new();
    let mut all = slices.iter().flat_map(|s| &s.spec.endpoints);
    let any_ready = all.any(|e| e.conditions.ready.unwrap_or(true));
    for slice in slices {
        if slice.spec.address_type == AddressType::Fqdn {
            continue;
        }
        for endpoint in &slice.spec.endpoints {
            let reported = health(service, endpoint);
            for address in &endpoint.addresses {
                let target = endpoint.target_ref.as_ref().filter(|t| t.kind == "Pod");
                let workload = match target {
                    Some(target) => {
                        let namespace = match target.namespace.as_str() {
                            "" => &service.namespace,
                            namespace => namespace,
                        };
                        match workloads.pod(namespace, &target.name) {
                            Some(pod) => &**pod,
                            // Without the pod its identity is unknown: callers would refuse it.
                            None => continue,
                        }
                    }
                    None => workloads.by_address(address).map_or(unknown, |w| w),
                };
                let unheard = || workload.pod.as_ref().is_some_and(|p| p.spec.was_able());
                let health = match reported {
                    Health::Unhealthy if !any_ready && unheard() => Health::Healthy,
                    reported => reported,
                };
                for port in &slice.spec.ports {
                    // Without a number it is no port; an address with port 0 is a socket's path elsewhere.
                    let (Some(of_service), Some(number)) =
                        (service.port_named(&port.name), port.port)
                    else {
                        continue;
                    };
                    out.push(workload.endpoint(
                        address,
                        u32::from(number),
                        &port.name,
                        of_service.number,
                        health,
                    ));
                }
            }
        }
    }
    if !service.selector.is_empty() {
        for entry in workloads.entries_in(&service.namespace) {
            let Some(address) = entry.addresses.first().filter(|a| is_ip(a)) else {
                continue;
            };
            if !labels_match(&service.selector, &entry.labels) {
                continue;
            }
            for port in &service.ports {
                let own = entry.ports.get(&port.name).copied();
                let number = own.unwrap_or(match &port.target {
                    TargetPort::Number(number) => *number,
                    TargetPort::Name(name) => entry.ports.get(name).copied().unwrap_or(port.number),
                });
                out.push(entry.endpoint(address, number, &port.name, port.number, Health::Unknown));
            }
        }
    }
    out
}

fn health(service: &Service, endpoint: &SliceEndpoint) -> Health {
    let conditions = &endpoint.conditions;
    if conditions.ready.unwrap_or(true) {
        return Health::Healthy;
    }
    let terminating = conditions.terminating.unwrap_or(true);
    if terminating && keeps_sessions(&service.labels) && conditions.serving.unwrap_or(true) {
        return Health::Draining;
    }
    if terminating {
        Health::Terminating
    } else {
        Health::Unhealthy
    }
}
