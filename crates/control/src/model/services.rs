//! The index of services: by hostname and namespace, and by who sees them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Labels,
    service::{ExportTo, Registry, Resolution, Service, TrafficDistribution, visible},
};

/// All services, the oldest first.
#[derive(Debug, Default)]
pub struct Services {
    all: Vec<Arc<Service>>,
    by_host: BTreeMap<String, BTreeMap<String, Arc<Service>>>,
    public: Vec<Arc<Service>>,
    exported: BTreeMap<String, Vec<Arc<Service>>>,
    /// Kubernetes Services by namespace and the first pair of their selector.
    by_selector: HashMap<(String, String, String), Vec<Arc<Service>>>,
    default_export: ExportTo,
    any_node_local: bool,
}

impl Services {
    /// Indexes services. `default_export` is MeshConfig's `defaultServiceExportTo`.
    pub(super) fn new(
        mut services: Vec<Service>,
        default_export: ExportTo,
        previous: Option<&Services>,
    ) -> Self {
        services.sort_by(Service::by_age);
        resolve_aliases(&mut services);
        let mut out = Self {
            default_export,
            ..Self::default()
        };
        for service in services {
            let kept = previous
                .and_then(|p| p.get(&service.hostname, &service.namespace))
                .filter(|old| ***old == service);
            let service = kept.cloned().unwrap_or_else(|| Arc::new(service));
            if let (Registry::Kubernetes, Some((key, value))) =
                (service.registry, service.selector.first_key_value())
            {
                let key = (service.namespace.clone(), key.clone(), value.clone());
                out.by_selector
                    .entry(key)
                    .or_default()
                    .push(service.clone());
            }
            out.any_node_local |=
                service.node_local || service.traffic_distribution == TrafficDistribution::SameNode;
            let slot = out.by_host.entry(service.hostname.clone()).or_default();
            let first = slot.get(&service.namespace);
            let replaces = first.is_none_or(|first| {
                first.registry == Registry::External && service.registry == Registry::Kubernetes
            });
            if replaces {
                slot.insert(service.namespace.clone(), service.clone());
            }
            out.all.push(service.clone());
            let export = out.export_of(&service).clone();
            if export.contains("*") {
                out.public.push(service);
            } else if !export.contains("~") {
                let namespaces: BTreeSet<_> = export
                    .iter()
                    .map(|e| if e == "." { &service.namespace } else { e })
                    .collect();
                for namespace in namespaces {
                    out.exported
                        .entry(namespace.clone())
                        .or_default()
                        .push(service.clone());
                }
            }
        }
        out
    }

    /// All services.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.all.iter()
    }

    /// The service of that hostname in that namespace.
    pub fn get(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.by_host.get(hostname)?.get(namespace)
    }

    /// The services of that hostname, by namespace.
    pub fn of_host(&self, hostname: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.by_host
            .get(hostname)
            .into_iter()
            .flat_map(BTreeMap::values)
    }

    /// Those that proxies of `namespace` see: first what is exported to it by name, then what all see.
    pub fn visible_in(&self, namespace: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.exported
            .get(namespace)
            .into_iter()
            .flatten()
            .chain(&self.public)
    }

    /// Whether proxies of `namespace` see the service.
    pub fn is_visible(&self, service: &Service, namespace: &str) -> bool {
        visible(self.export_of(service), &service.namespace, namespace)
    }

    /// Whom `hostname` means in `namespace`: its own service, else Kubernetes', else the oldest that it sees.
    pub fn best(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        if let Some(own) = self.get(hostname, namespace) {
            return Some(own);
        }
        self.of_host(hostname)
            .filter(|s| self.is_visible(s, namespace))
            .min_by_key(|s| (s.registry != Registry::Kubernetes, s.created))
    }

    /// Kubernetes Services of a namespace whose selector might take a workload with these labels.
    pub(super) fn selecting<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        labels.iter().flat_map(move |(key, value)| {
            let key = (namespace.to_owned(), key.clone(), value.clone());
            self.by_selector.get(&key).into_iter().flatten()
        })
    }

    /// Whether some service is served only, or first, from the caller's node.
    pub fn any_node_local(&self) -> bool {
        self.any_node_local
    }

    fn export_of<'a>(&'a self, service: &'a Service) -> &'a ExportTo {
        if service.export_to.is_empty() {
            &self.default_export
        } else {
            &service.export_to
        }
    }
}

/// Gives every service the ExternalName services that lead to it, through any number of steps. A loop leads nowhere.
fn resolve_aliases(services: &mut [Service]) {
    let raw: BTreeMap<String, String> = services
        .iter()
        .filter(|s| s.resolution == Resolution::Alias)
        .map(|s| (s.hostname.clone(), s.external_name.clone()))
        .collect();
    if raw.is_empty() {
        return;
    }
    let mut aliases: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for service in services
        .iter()
        .filter(|s| s.resolution == Resolution::Alias)
    {
        let mut seen = BTreeSet::from([service.hostname.as_str()]);
        let mut target = service.external_name.as_str();
        let concrete = loop {
            if !seen.insert(target) {
                break None;
            }
            match raw.get(target) {
                Some(next) => target = next,
                None => break Some(target),
            }
        };
        if let Some(concrete) = concrete {
            let alias = (service.namespace.clone(), service.hostname.clone());
            aliases.entry(concrete.to_owned()).or_default().push(alias);
        }
    }
    for service in services {
        if let Some(list) = aliases.get(&service.hostname) {
            service.aliases = list.clone();
            service.aliases.sort();
        }
    }
}
