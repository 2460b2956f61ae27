//! Workloads: pods and WorkloadEntries, with the identity and the place that their endpoints carry.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use config::{
    Object, Snapshot,
    kubernetes::{Node as KubernetesNode, Pod},
};
use proto::istio::networking::v1alpha3::WorkloadEntry;

use super::{
    Labels,
    endpoint::{
        Endpoint, Health, TLS_MODE_ISTIO, TLS_MODE_LABEL, augment_labels, locality_from_labels,
    },
    node::Node,
};

/// A workload from which endpoints are made.
#[derive(Debug, Clone)]
pub struct Workload {
    pub name: String,
    pub namespace: String,
    /// As written.
    pub labels: Labels,
    /// With those of its place.
    pub augmented: Arc<Labels>,
    pub addresses: Vec<String>,
    /// `region/zone/subzone`.
    pub locality: String,
    pub node: String,
    pub network: String,
    /// SPIFFE identity, or empty.
    pub identity: String,
    pub tls_mode: String,
    /// Name of the Deployment (or other controller) behind it.
    pub workload_name: String,
    pub hostname: String,
    pub subdomain: String,
    pub weight: u32,
    /// Ports by name, where it serves them elsewhere than a service says.
    pub ports: BTreeMap<String, u32>,
    /// The pod, where it is one.
    pub pod: Option<Arc<Object<Pod>>>,
}

impl Workload {
    /// An endpoint of this workload.
    pub fn endpoint(
        &self,
        address: &str,
        port: u32,
        name: &str,
        service_port: u32,
        health: Health,
    ) -> Endpoint {
        Endpoint {
            address: address.to_owned(),
            port,
            port_name: name.to_owned(),
            service_port,
            labels: self.augmented.clone(),
            service_account: self.identity.clone(),
            locality: self.locality.clone(),
            weight: self.weight,
            health,
            tls_mode: self.tls_mode.clone(),
            network: self.network.clone(),
            namespace: self.namespace.clone(),
            workload_name: self.workload_name.clone(),
            node_name: self.node.clone(),
            hostname: self.hostname.clone(),
            subdomain: self.subdomain.clone(),
        }
    }

    /// What an address stands for behind which no workload is known.
    pub(super) fn unknown(cluster: &str) -> Self {
        Self {
            name: String::new(),
            namespace: String::new(),
            labels: Labels::new(),
            augmented: Arc::new(augment_labels(&Labels::new(), cluster, "", "", "")),
            addresses: Vec::new(),
            locality: String::new(),
            node: String::new(),
            network: String::new(),
            identity: String::new(),
            tls_mode: "disabled".to_owned(),
            workload_name: String::new(),
            hostname: String::new(),
            subdomain: String::new(),
            weight: 0,
            ports: BTreeMap::new(),
            pod: None,
        }
    }

    /// The workload that a WorkloadEntry (or an endpoint written inside a ServiceEntry) describes.
    pub(super) fn from_entry(
        entry: &WorkloadEntry,
        name: &str,
        namespace: &str,
        object_labels: &Labels,
        annotations: &Labels,
        place: &Place<'_>,
    ) -> Self {
        let mut labels = entry.labels.clone();
        labels.extend(object_labels.clone());
        let locality = match entry.locality.as_str() {
            "" => locality_from_labels(&labels).unwrap_or_default(),
            locality => locality.to_owned(),
        };
        let tls_mode = match labels.get(TLS_MODE_LABEL) {
            Some(mode) => mode.clone(),
            None if !entry.service_account.is_empty() => TLS_MODE_ISTIO.to_owned(),
            None => "disabled".to_owned(),
        };
        let workload_name = annotations
            .get("istio.io/autoRegistrationGroup")
            .or_else(|| object_labels.get("service.istio.io/workload-name"))
            .map_or(name, String::as_str);
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            augmented: Arc::new(augment_labels(
                &labels,
                place.cluster,
                &locality,
                "",
                &entry.network,
            )),
            labels,
            addresses: vec![entry.address.clone()],
            locality,
            node: String::new(),
            network: entry.network.clone(),
            identity: match entry.service_account.as_str() {
                "" => String::new(),
                account => spiffe(place.trust_domain, namespace, account),
            },
            tls_mode,
            workload_name: workload_name.to_owned(),
            hostname: String::new(),
            subdomain: String::new(),
            weight: entry.weight,
            ports: entry.ports.clone(),
            pod: None,
        }
    }
}

/// What workloads take from the mesh around them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub cluster: &'a str,
    pub trust_domain: &'a str,
}

/// `spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
pub fn spiffe(trust_domain: &str, namespace: &str, account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
}

/// All workloads by name and address.
#[derive(Debug, Default)]
pub struct Workloads {
    pods: BTreeMap<(String, String), Arc<Workload>>,
    by_address: HashMap<String, Arc<Workload>>,
    /// WorkloadEntries by namespace, by name.
    entries: BTreeMap<String, Vec<Arc<Workload>>>,
}

impl Workloads {
    pub(super) fn new(snapshot: &Snapshot, place: &Place<'_>) -> Self {
        let mut out = Self::default();
        for pod in snapshot.pods.iter() {
            let node = snapshot.nodes.get("", &pod.spec.spec.node_name);
            let workload = Arc::new(from_pod(pod, node.map(|n| &**n), place));
            if !pod.spec.is_finished() {
                for address in &workload.addresses {
                    // Pods on the host's network share its address: it means none of them.
                    if !pod.spec.spec.host_network {
                        out.by_address.insert(address.clone(), workload.clone());
                    }
                }
            }
            out.pods.insert(
                (pod.meta.namespace.clone(), pod.meta.name.clone()),
                workload,
            );
        }
        for entry in snapshot.workload_entries.iter() {
            let meta = &entry.meta;
            let workload = Workload::from_entry(
                &entry.spec,
                &meta.name,
                &meta.namespace,
                &meta.labels,
                &meta.annotations,
                place,
            );
            out.entries
                .entry(meta.namespace.clone())
                .or_default()
                .push(Arc::new(workload));
        }
        out
    }

    /// The pod of that name.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.pods.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// The pod that has the address.
    pub fn by_address(&self, address: &str) -> Option<&Arc<Workload>> {
        self.by_address.get(address)
    }

    /// The pod that a proxy runs in: by the name in its id, else by its address.
    pub fn pod_of(&self, node: &Node) -> Option<&Arc<Workload>> {
        let named = node
            .workload
            .rsplit_once('.')
            .and_then(|(pod, ns)| self.pod(ns, pod));
        named.or_else(|| self.by_address(&node.addresses.first()?.to_string()))
    }

    /// Pods of a namespace, by name.
    pub fn pods_in(&self, namespace: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let from = (namespace.to_owned(), String::new());
        self.pods
            .range(from..)
            .take_while(move |(key, _)| key.0 == namespace)
            .map(|(_, w)| w)
    }

    /// WorkloadEntries of a namespace, by name.
    pub fn entries_in(&self, namespace: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.entries.get(namespace).into_iter().flatten()
    }
}

fn from_pod(
    pod: &Arc<Object<Pod>>,
    node: Option<&Object<KubernetesNode>>,
    place: &Place<'_>,
) -> Workload {
    let meta = &pod.meta;
    let spec = &pod.spec.spec;
    let locality = locality_from_labels(&meta.labels).unwrap_or_else(|| {
        node.map(|n| node_locality(&n.meta.labels))
            .unwrap_or_default()
    });
    let network = meta
        .labels
        .get("topology.istio.io/network")
        .cloned()
        .unwrap_or_default();
    let subdomain = spec.subdomain.clone();
    let hostname = match (subdomain.as_str(), spec.hostname.as_str()) {
        ("", _) => String::new(),
        (_, "") => meta.name.clone(),
        (_, hostname) => hostname.to_owned(),
    };
    Workload {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        augmented: Arc::new(augment_labels(
            &meta.labels,
            place.cluster,
            &locality,
            &spec.node_name,
            &network,
        )),
        labels: meta.labels.clone(),
        addresses: pod
            .spec
            .addresses()
            .into_iter()
            .map(str::to_owned)
            .collect(),
        locality,
        node: spec.node_name.clone(),
        network,
        identity: spiffe(
            place.trust_domain,
            &meta.namespace,
            pod.spec.service_account(),
        ),
        tls_mode: match meta.labels.get(TLS_MODE_LABEL) {
            Some(mode) => mode.clone(),
            None => "disabled".to_owned(),
        },
        workload_name: workload_name(pod),
        hostname,
        subdomain,
        weight: 0,
        ports: BTreeMap::new(),
        pod: Some(pod.clone()),
    }
}

fn node_locality(labels: &Labels) -> String {
    let get = |keys: [&str; 2]| {
        keys.iter()
            .find_map(|k| labels.get(*k))
            .map_or("", String::as_str)
    };
    let region = get([
        "topology.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/region",
    ]);
    let zone = get([
        "topology.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/zone",
    ]);
    let subzone = get(["topology.istio.io/subzone", "topology.istio.io/subzone"]);
    if region.is_empty() && zone.is_empty() && subzone.is_empty() {
        return String::new();
    }
    format!("{region}/{zone}/{subzone}")
}

/// The controller's name, a ReplicaSet's without the hash of its template, a Job's without its time.
fn workload_name(pod: &Object<Pod>) -> String {
    let meta = &pod.meta;
    if let Some(name) = meta.labels.get("service.istio.io/workload-name") {
        return name.clone();
    }
    let Some(owner) = meta.owner_references.iter().find(|o| o.controller) else {
        return meta.name.clone();
    };
    match owner.kind.as_str() {
        "ReplicaSet" => ["pod-template-hash", "rollouts-pod-template-hash"]
            .iter()
            .filter_map(|label| meta.labels.get(*label).filter(|h| !h.is_empty()))
            .find_map(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'))
            .unwrap_or(&owner.name)
            .to_owned(),
        "ReplicationController" => meta
            .labels
            .get("deploymentconfig")
            .unwrap_or(&owner.name)
            .clone(),
        // A CronJob's Jobs end with their time in minutes.
        "Job" => match owner.name.rsplit_once('-') {
            Some((name, time)) if time.len() >= 8 && time.bytes().all(|c| c.is_ascii_digit()) => {
                name.to_owned()
            }
            _ => owner.name.clone(),
        },
        _ => owner.name.clone(),
    }
}

/// Whether the text is an IP address.
pub(super) fn is_ip(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}
