//! A connected proxy against one state of the mesh: its workload, the services that it serves and what it sees.

use std::{
    hash::{BuildHasher, Hash, Hasher},
    sync::Arc,
};

use foldhash::fast::FixedState;
use proto::envoy::config::core::v3::Locality;

use super::{
    Labels, Mesh,
    endpoint::{augment_labels, locality_from_labels, split_locality},
    node::{Node, NodeKind},
    peer_authentication::WorkloadMtls,
    port::Port,
    service::Service,
    sidecar::SidecarScope,
    targets,
};

/// A port of the proxy's workload that serves a service's port.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceTarget {
    pub service: Arc<Service>,
    /// The service's port.
    pub port: Port,
    /// The port of the workload.
    pub target_port: u32,
}

/// One proxy as seen by translation. Made anew (cheaply) for each state of the mesh.
#[derive(Debug, Clone)]
pub struct Proxy {
    pub node: Arc<Node>,
    /// Labels of its workload, with those of its place added.
    pub labels: Labels,
    pub locality: Locality,
    /// The service ports that it serves: oldest service first, then by hostname.
    pub service_targets: Vec<ServiceTarget>,
    pub scope: Arc<SidecarScope>,
    /// Mutual TLS that its workload asks of callers.
    pub mtls: WorkloadMtls,
}

impl Proxy {
    /// Places a node in the mesh.
    pub fn new(mesh: &Mesh, node: Arc<Node>) -> Self {
        let pod = mesh.workloads().pod_of(&node);
        let mut labels = node.static_labels.clone();
        match pod {
            Some(pod) => {
                labels.extend(augment_labels(
                    &pod.labels,
                    mesh.cluster_id(),
                    &pod.locality,
                    &pod.node,
                    &pod.network,
                ));
            }
            None => labels.extend(node.labels.clone()),
        }
        let locality = locality_of(&labels)
            .or_else(|| node.locality.clone())
            .unwrap_or_default();
        let place = locality_text(&locality);
        let node_name = node.meta("NODE_NAME").unwrap_or_default();
        let network = node.meta("NETWORK").unwrap_or_default();
        let labels = augment_labels(&labels, node.cluster_id(), &place, node_name, network);
        let service_targets = targets::of(mesh, &node, pod, &labels);
        let scope = mesh.scope(&node, &labels);
        let mtls = mesh
            .peer_authentications()
            .workload(&node.namespace, &labels);
        Self {
            node,
            labels,
            locality,
            service_targets,
            scope,
            mtls,
        }
    }

    /// Whether it is a gateway.
    pub fn is_router(&self) -> bool {
        self.node.kind == NodeKind::Router
    }

    /// The namespace whose configuration it gets.
    pub fn namespace(&self) -> &str {
        &self.node.namespace
    }

    /// Whether one of its addresses is IPv4.
    pub fn supports_v4(&self) -> bool {
        self.node.supports_v4()
    }

    /// Whether one of its addresses is IPv6.
    pub fn supports_v6(&self) -> bool {
        self.node.supports_v6()
    }

    /// Whether its agent answers DNS, so that invented addresses lead to it.
    pub fn uses_auto_allocated(&self) -> bool {
        self.node.flag("DNS_CAPTURE")
    }

    /// `region/zone/subzone`, without empty parts at the end.
    pub fn locality_text(&self) -> String {
        locality_text(&self.locality)
    }

    /// Proxies with the same key get the same outbound clusters, endpoints, outbound listeners and routes (their
    /// own addresses and the services that they serve aside).
    pub fn view_key(&self, mesh: &Mesh) -> u64 {
        let mut hasher = FixedState::default().build_hasher();
        self.node.kind.hash(&mut hasher);
        self.node.namespace.hash(&mut hasher);
        self.node.domain.hash(&mut hasher);
        self.node.version.hash(&mut hasher);
        (self.supports_v4(), self.supports_v6()).hash(&mut hasher);
        // A Sidecar of the root namespace may have the name of one of the proxy's own.
        let sidecar = self.scope.sidecar.as_ref();
        sidecar
            .map(|s| (&s.meta.namespace, &s.meta.name))
            .hash(&mut hasher);
        self.locality_text().hash(&mut hasher);
        if self.is_router() {
            // The ports of its listeners, and the Gateways that are its at all, depend on its services.
            for target in &self.service_targets {
                (&target.service.hostname, &target.service.namespace).hash(&mut hasher);
                (target.port.number, target.target_port).hash(&mut hasher);
            }
        }
        for key in mesh.label_keys() {
            self.labels.get(key).hash(&mut hasher);
        }
        self.labels
            .get("topology.istio.io/network")
            .hash(&mut hasher);
        if mesh.services().any_node_local() {
            self.node.meta("NODE_NAME").hash(&mut hasher);
            self.labels.get("kubernetes.io/hostname").hash(&mut hasher);
        }
        for (key, value) in self.node.metadata.as_object().into_iter().flatten() {
            let own = PER_PROXY.contains(&key.as_str());
            if !own || mesh.envoy_filters().asks_for_metadata(key) {
                key.hash(&mut hasher);
                value.to_string().hash(&mut hasher);
            }
        }
        hasher.finish()
    }

    /// Proxies with the same key get the same inbound clusters and listeners, their own addresses aside.
    pub fn inbound_key(&self, mesh: &Mesh) -> u64 {
        let mut hasher = FixedState::default().build_hasher();
        self.view_key(mesh).hash(&mut hasher);
        self.labels.hash(&mut hasher);
        self.node.addresses.hash(&mut hasher);
        for target in &self.service_targets {
            (&target.service.hostname, &target.service.namespace).hash(&mut hasher);
            (target.port.number, target.target_port).hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// Metadata that names the proxy itself and changes nothing that it shares with others (unless an EnvoyFilter asks).
const PER_PROXY: &[&str] = &[
    "ANNOTATIONS",
    "APP_CONTAINERS",
    "AUTO_REGISTER_GROUP",
    "INSTANCE_IPS",
    "LABELS",
    "NAME",
    "NODE_NAME",
    "OWNER",
    "PLATFORM_METADATA",
    "POD_PORTS",
    "SERVICE_ACCOUNT",
    "STATIC_LABELS",
    "WORKLOAD_ENTRY",
    "WORKLOAD_NAME",
];

/// Envoy's form of `region/zone/subzone`.
pub fn locality_from_text(text: &str) -> Locality {
    let (region, zone, sub_zone) = split_locality(text);
    Locality {
        region: region.to_owned(),
        zone: zone.to_owned(),
        sub_zone: sub_zone.to_owned(),
    }
}

fn locality_of(labels: &Labels) -> Option<Locality> {
    let get = |key: &str| labels.get(key);
    let parts = [
        get("topology.kubernetes.io/region"),
        get("topology.kubernetes.io/zone"),
        get("topology.istio.io/subzone"),
    ];
    if parts.iter().all(Option::is_none) {
        return locality_from_labels(labels).map(|text| locality_from_text(&text));
    }
    let [region, zone, sub_zone] = parts.map(|p| p.cloned().unwrap_or_default());
    Some(Locality {
        region,
        zone,
        sub_zone,
    })
}

fn locality_text(locality: &Locality) -> String {
    let mut out = locality.region.clone();
    for part in [&locality.zone, &locality.sub_zone] {
        if part.is_empty() {
            break;
        }
        out.push('/');
        out.push_str(part);
    }
    out
}
