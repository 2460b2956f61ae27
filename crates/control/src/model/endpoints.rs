//! The index of endpoints: by service and port, and by address. A service whose inputs did not change keeps its
//! endpoints in memory, so that one changed slice costs one service.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, OnceLock},
};

use config::{
    Object, Snapshot,
    kubernetes::{EndpointSlice, SERVICE_NAME_LABEL},
};

use super::{
    endpoint::Endpoint,
    kubernetes,
    service::{Registry, Resolution, Service},
    service_entry,
    services::Services,
    workload::{Place, Workload, Workloads},
};

/// The endpoints of all services of one hostname in one namespace.
#[derive(Debug, Default, PartialEq)]
pub struct ServiceEndpoints {
    by_port: BTreeMap<u32, Vec<Endpoint>>,
    accounts: BTreeSet<String>,
}

impl ServiceEndpoints {
    /// The endpoints behind a port.
    pub fn port(&self, port: u32) -> &[Endpoint] {
        self.by_port.get(&port).map_or(&[], Vec::as_slice)
    }

    /// All endpoints, by port.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Endpoint)> {
        self.by_port
            .iter()
            .flat_map(|(port, list)| list.iter().map(|e| (*port, e)))
    }

    /// The identities behind the service; sorted.
    pub fn accounts(&self) -> &BTreeSet<String> {
        &self.accounts
    }
}

type Slices = Vec<Arc<Object<EndpointSlice>>>;

/// What a service's endpoints were made from, and they.
#[derive(Debug)]
struct Entry {
    services: Vec<Arc<Service>>,
    slices: Slices,
    endpoints: Arc<ServiceEndpoints>,
}

impl Entry {
    fn made_from(&self, services: &[Arc<Service>], slices: &Slices) -> bool {
        let same = |a: &[Arc<Service>]| {
            a.len() == self.services.len()
                && a.iter().zip(&self.services).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        same(services)
            && slices.len() == self.slices.len()
            && slices
                .iter()
                .zip(&self.slices)
                .all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// An endpoint's place in the index: its service, the service's port, and the port of the workload.
pub(super) type Served = (Arc<Service>, u32, u32);

/// All endpoints.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// By hostname, then namespace.
    by_service: HashMap<String, BTreeMap<String, Entry>>,
    by_address: OnceLock<HashMap<String, Vec<Served>>>,
}

impl Endpoints {
    /// Indexes endpoints; `previous` lends what was made from the same workloads.
    pub(super) fn new(
        snapshot: &Snapshot,
        services: &Services,
        workloads: &Workloads,
        place: &Place<'_>,
        previous: Option<&Endpoints>,
        same_workloads: bool,
    ) -> Self {
        let unknown = Workload::unknown(place.cluster);
        let mut slices: HashMap<(String, String), Slices> = HashMap::new();
        for slice in snapshot.endpoint_slices.iter() {
            if let Some(name) = slice.meta.labels.get(SERVICE_NAME_LABEL) {
                let key = (slice.meta.namespace.clone(), name.clone());
                slices.entry(key).or_default().push(slice.clone());
            }
        }
        let mut groups: BTreeMap<(&str, &str), Vec<Arc<Service>>> = BTreeMap::new();
        for service in services.iter() {
            groups
                .entry((&service.hostname, &service.namespace))
                .or_default()
                .push(service.clone());
        }
        let mut out = Self::default();
        for ((hostname, namespace), group) in groups {
            let of_kubernetes = group.iter().find(|s| s.registry == Registry::Kubernetes);
            let slices = of_kubernetes
                .and_then(|s| slices.remove(&(s.namespace.clone(), s.name.clone())))
                .unwrap_or_default();
            let old = previous.and_then(|p| p.by_service.get(hostname)?.get(namespace));
            let endpoints = match old {
                Some(old) if same_workloads && old.made_from(&group, &slices) => {
                    old.endpoints.clone()
                }
                _ => {
                    let made = build(&group, &slices, snapshot, workloads, &unknown, place);
                    match old {
                        Some(old) if *old.endpoints == made => old.endpoints.clone(),
                        _ => Arc::new(made),
                    }
                }
            };
            out.by_service
                .entry(hostname.to_owned())
                .or_default()
                .insert(
                    namespace.to_owned(),
                    Entry {
                        services: group,
                        slices,
                        endpoints,
                    },
                );
        }
        out
    }

    /// The endpoints of a hostname in a namespace.
    pub fn get(&self, hostname: &str, namespace: &str) -> Option<&Arc<ServiceEndpoints>> {
        Some(&self.by_service.get(hostname)?.get(namespace)?.endpoints)
    }

    /// Who is served at an address, made when first asked for.
    pub(super) fn at(&self, address: &str) -> &[Served] {
        let index = self.by_address.get_or_init(|| {
            let mut out: HashMap<String, Vec<Served>> = HashMap::new();
            for entry in self.by_service.values().flat_map(BTreeMap::values) {
                for (port, endpoint) in entry.endpoints.iter() {
                    for service in &entry.services {
                        let list = out.entry(endpoint.address.clone()).or_default();
                        let one = (service.clone(), port, endpoint.port);
                        if service.port(port).is_some() && !list.contains(&one) {
                            list.push(one);
                        }
                    }
                }
            }
            out
        });
        index.get(address).map_or(&[], Vec::as_slice)
    }

    /// The services, as (hostname, namespace), whose endpoints differ from those of an older index.
    pub(super) fn changed_since(&self, older: &Self) -> BTreeSet<(String, String)> {
        let mut out = BTreeSet::new();
        for (a, b) in [(self, older), (older, self)] {
            for (hostname, by_namespace) in &a.by_service {
                for (namespace, entry) in by_namespace {
                    let same = b
                        .get(hostname, namespace)
                        .is_some_and(|o| Arc::ptr_eq(o, &entry.endpoints));
                    if !same {
                        out.insert((hostname.clone(), namespace.clone()));
                    }
                }
            }
        }
        out
    }
}

fn build(
    group: &[Arc<Service>],
    slices: &Slices,
    snapshot: &Snapshot,
    workloads: &Workloads,
    unknown: &Workload,
    place: &Place<'_>,
) -> ServiceEndpoints {
    let mut out = ServiceEndpoints::default();
    for service in group {
        let list = match service.registry {
            Registry::Kubernetes => kubernetes::endpoints(service, slices, workloads, unknown),
            Registry::External => {
                match snapshot
                    .service_entries
                    .get(&service.namespace, &service.object_name)
                {
                    Some(object) => service_entry::endpoints(object, service, workloads, place),
                    None => continue,
                }
            }
        };
        for endpoint in list {
            let port = out.by_port.entry(endpoint.service_port).or_default();
            // LOGICAL_DNS takes one host only.
            if service.resolution == Resolution::DnsRoundRobin && !port.is_empty() {
                continue;
            }
            if !endpoint.service_account.is_empty() {
                out.accounts.insert(endpoint.service_account.clone());
            }
            port.push(endpoint);
        }
    }
    out
}
