//! What one group of proxies may see: services, VirtualServices and DestinationRules, cut by a Sidecar object or
//! by visibility alone. A scope is computed once and shared by all proxies that have it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use config::Object;
use proto::istio::networking::v1alpha3::{
    ConnectionPoolSettings, Destination, IstioEgressListener, Sidecar, outbound_traffic_policy,
};

use super::{
    Labels, Mesh, Origin,
    destination_rule::{self, MergedRule},
    host,
    port::Protocol,
    service::{Registry, Service},
    virtual_service::{self, MESH, Routes},
};
use crate::route::Semantics;

/// Name of a scope that no Sidecar object made.
const DEFAULT_NAME: &str = "default-sidecar";

/// What a proxy does with traffic to hosts that it does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OutboundMode {
    /// It is refused.
    RegistryOnly,
    /// It passes through.
    AllowAny,
}

/// One egress listener of a scope. A scope without a Sidecar has one, for everything.
#[derive(Debug, Clone)]
pub struct EgressListener {
    /// The listener as written; `None` in a gateway's scope.
    pub listener: Option<IstioEgressListener>,
    /// Services that it imports, of all ports or only of its own port.
    pub services: Vec<Arc<Service>>,
    /// VirtualServices that it imports.
    pub virtual_services: Vec<Arc<Routes>>,
    /// For each imported service the VirtualService, as (namespace, name), whose host fits it best.
    pub best_virtual_service: BTreeMap<String, (String, String)>,
}

impl EgressListener {
    /// The port that it is bound to; `None` for a listener of all ports.
    pub fn port(&self) -> Option<u32> {
        self.listener.as_ref()?.port.as_ref().map(|p| p.number)
    }

    /// Whether services are cut to its port.
    fn matches_port(&self) -> bool {
        matches_port(self.listener.as_ref())
    }
}

/// What a group of proxies may see.
#[derive(Debug)]
pub struct SidecarScope {
    /// Name of the Sidecar, or a fixed word.
    pub name: String,
    /// The namespace of the proxies (not that of a root Sidecar).
    pub namespace: String,
    pub sidecar: Option<Arc<Object<Sidecar>>>,
    pub egress: Vec<EgressListener>,
    /// All visible services, each hostname once, in the order of import.
    pub services: Vec<Arc<Service>>,
    by_host: BTreeMap<String, Arc<Service>>,
    rules: BTreeMap<String, Vec<MergedRule>>,
    pub outbound_mode: OutboundMode,
    /// Where unknown traffic is sent instead of to its own destination.
    pub egress_proxy: Option<Destination>,
}

impl SidecarScope {
    /// The service of this hostname, if it is visible.
    pub fn service(&self, hostname: &str) -> Option<&Arc<Service>> {
        self.by_host.get(hostname)
    }

    /// The rule that a proxy with these labels uses for a visible service.
    pub fn destination_rule(
        &self,
        outbound: bool,
        labels: &Labels,
        hostname: &str,
    ) -> Option<&MergedRule> {
        destination_rule::choose(self.rules.get(hostname)?, outbound, &self.namespace, labels)
    }

    /// Whether a Sidecar says which ports are served.
    pub fn has_ingress(&self) -> bool {
        self.sidecar
            .as_ref()
            .is_some_and(|s| !s.spec.ingress.is_empty())
    }

    /// Limits that the Sidecar sets for a served port.
    pub fn inbound_pool(&self, port: u32) -> Option<&ConnectionPoolSettings> {
        let spec = &self.sidecar.as_ref()?.spec;
        spec.ingress
            .iter()
            .filter(|i| i.port.as_ref().is_some_and(|p| p.number == port))
            .find_map(|i| i.connection_pool.as_ref())
            .or(spec.inbound_connection_pool.as_ref())
    }

    /// The egress listener that a route configuration for `port` (0: a unix socket at `bind`) belongs to: one bound to the
    /// port, else the one of all ports; the first in the Sidecar's order.
    pub fn egress_for_route(&self, port: u32, bind: &str) -> Option<&EgressListener> {
        self.egress.iter().find(|e| match (e.port(), &e.listener) {
            (None, _) | (_, None) => true,
            (Some(own), Some(listener)) => own == port && (port != 0 || listener.bind == bind),
        })
    }

    /// The Sidecar object behind the scope.
    pub fn origin(&self) -> Option<Origin> {
        self.sidecar
            .as_ref()
            .map(|s| Origin::of(config::Kind::Sidecar, s))
    }

    /// The scope of gateways in `namespace`: everything that is exported to it.
    pub(super) fn for_gateway(mesh: &Mesh, namespace: &str) -> Self {
        let mut out = Self::empty(namespace, None);
        for service in mesh.services().visible_in(namespace) {
            out.add(service);
        }
        out.select_rules(mesh);
        out.egress = vec![EgressListener {
            listener: None,
            services: Vec::new(),
            virtual_services: mesh
                .virtual_services()
                .for_gateway(namespace, MESH)
                .cloned()
                .collect(),
            best_virtual_service: BTreeMap::new(),
        }];
        out
    }

    /// The scope that `sidecar` (none: everything visible) gives to proxies of `namespace`.
    pub(super) fn for_sidecar(
        mesh: &Mesh,
        sidecar: Option<Arc<Object<Sidecar>>>,
        namespace: &str,
    ) -> Self {
        let mut out = Self::empty(namespace, sidecar);
        let all = [IstioEgressListener {
            hosts: vec!["*/*".to_owned()],
            ..IstioEgressListener::default()
        }];
        let written = out.sidecar.clone();
        let listeners = match written.as_ref().map(|s| s.spec.egress.as_slice()) {
            None | Some([]) => &all[..],
            Some(listeners) => listeners,
        };
        out.egress = listeners
            .iter()
            .map(|l| import(mesh, namespace, l))
            .collect();
        out.collect_services(mesh);
        out.select_rules(mesh);
        let policy = written
            .as_ref()
            .and_then(|s| s.spec.outbound_traffic_policy.as_ref());
        out.outbound_mode = match policy {
            Some(policy) => {
                out.egress_proxy = policy.egress_proxy.clone();
                match policy.mode() {
                    outbound_traffic_policy::Mode::RegistryOnly => OutboundMode::RegistryOnly,
                    outbound_traffic_policy::Mode::AllowAny => OutboundMode::AllowAny,
                }
            }
            None => mesh.outbound_mode(),
        };
        out
    }

    fn empty(namespace: &str, sidecar: Option<Arc<Object<Sidecar>>>) -> Self {
        Self {
            name: sidecar
                .as_ref()
                .map_or_else(|| DEFAULT_NAME.to_owned(), |s| s.meta.name.clone()),
            namespace: namespace.to_owned(),
            sidecar,
            egress: Vec::new(),
            services: Vec::new(),
            by_host: BTreeMap::new(),
            rules: BTreeMap::new(),
            outbound_mode: OutboundMode::AllowAny,
            egress_proxy: None,
        }
    }

    /// Imported services first, listener by listener; after each those that its VirtualServices lead to.
    fn collect_services(&mut self, mesh: &Mesh) {
        let egress = std::mem::take(&mut self.egress);
        for listener in &egress {
            for service in &listener.services {
                self.add(service);
            }
            for routes in &listener.virtual_services {
                for (hostname, ports) in
                    virtual_service::destinations(routes.spec(), &self.namespace)
                {
                    let Some(service) = mesh.services().best(&hostname, &self.namespace) else {
                        continue;
                    };
                    let cut = if listener.matches_port() {
                        cut_to_listener(service, listener.port().unwrap_or_default())
                    } else {
                        cut_to_ports(service, &ports)
                    };
                    if let Some(service) = cut {
                        self.add(&service);
                    }
                }
            }
        }
        self.egress = egress;
    }

    /// Adds a service; of two for one hostname Kubernetes' wins, and ServiceEntries that agree join their ports.
    fn add(&mut self, service: &Arc<Service>) {
        let Some(existing) = self.by_host.get(&service.hostname) else {
            self.by_host
                .insert(service.hostname.clone(), service.clone());
            self.services.push(service.clone());
            return;
        };
        if Arc::ptr_eq(existing, service) {
            return;
        }
        let replacement = match (existing.registry, service.registry) {
            (Registry::Kubernetes, Registry::External) => return,
            (Registry::External, Registry::Kubernetes) => service.clone(),
            _ if existing.ports == service.ports || !can_merge(existing, service) => return,
            _ => {
                let mut merged = (**existing).clone();
                for port in &service.ports {
                    if merged.port(port.number).is_none() {
                        merged.ports.push(port.clone());
                    }
                }
                Arc::new(merged)
            }
        };
        if let Some(slot) = self
            .services
            .iter_mut()
            .find(|s| s.hostname == service.hostname)
        {
            *slot = replacement.clone();
        }
        self.by_host.insert(service.hostname.clone(), replacement);
    }

    fn select_rules(&mut self, mesh: &Mesh) {
        for service in &self.services {
            let rules = mesh.destination_rules().for_service(
                &self.namespace,
                &service.hostname,
                &service.namespace,
            );
            if !rules.is_empty() {
                self.rules.insert(service.hostname.clone(), rules);
            }
        }
    }
}

/// The hosts that a listener imports from one namespace (or from all, under `*`).
#[derive(Debug, Default)]
struct Imports {
    hosts: Vec<String>,
    excluded: Vec<String>,
}

impl Imports {
    fn excludes(&self, hostname: &str) -> bool {
        self.excluded.iter().any(|e| host::subset_of(hostname, e))
    }

    fn has_service(&self, hostname: &str) -> bool {
        self.hosts.iter().any(|h| host::subset_of(hostname, h))
    }

    fn has_virtual_service_host(&self, hostname: &str, semantics: Semantics) -> bool {
        self.hosts.iter().any(|h| match semantics {
            // As for services: a route for more than what is imported is not taken.
            Semantics::Gateway => host::subset_of(hostname, h),
            Semantics::Istio | Semantics::Ingress => host::matches(hostname, h),
        })
    }
}

fn import(mesh: &Mesh, namespace: &str, listener: &IstioEgressListener) -> EgressListener {
    let mut imports: BTreeMap<String, Imports> = BTreeMap::new();
    for pattern in &listener.hosts {
        // Validation has refused anything that is not NAMESPACE/HOST.
        let Some((from, hostname)) = pattern.split_once('/') else {
            continue;
        };
        let (from, excluded) = match from.strip_prefix('~') {
            Some("") => ("*", true),
            Some(rest) => (rest, true),
            None => (from, false),
        };
        let from = if from == "." { namespace } else { from };
        let entry = imports.entry(from.to_owned()).or_default();
        let list = if excluded {
            &mut entry.excluded
        } else {
            &mut entry.hosts
        };
        list.push(hostname.to_owned());
    }
    let nothing = Imports::default();
    let everywhere = imports.get("*").unwrap_or(&nothing);

    let mut virtual_services: Vec<Arc<Routes>> = Vec::new();
    let mut seen = BTreeSet::new();
    for routes in mesh.virtual_services().for_gateway(namespace, MESH) {
        let own = imports.get(routes.namespace()).unwrap_or(&nothing);
        let wanted = routes.spec().hosts.iter().any(|h| {
            (own.has_virtual_service_host(h, routes.semantics)
                || everywhere.has_virtual_service_host(h, routes.semantics))
                && !own.excludes(h)
                && !everywhere.excludes(h)
        });
        if wanted && seen.insert((routes.namespace().to_owned(), routes.name().to_owned())) {
            virtual_services.push(routes.clone());
        }
    }

    let port = matches_port(Some(listener)).then(|| listener.port.as_ref().map_or(0, |p| p.number));
    let mut services: Vec<Arc<Service>> = Vec::new();
    for service in mesh.services().visible_in(namespace) {
        let own = imports.get(&service.namespace).unwrap_or(&nothing);
        if own.excludes(&service.hostname) || everywhere.excludes(&service.hostname) {
            continue;
        }
        let found = [own, everywhere].into_iter().find_map(|imports| {
            if !imports.has_service(&service.hostname) {
                return None;
            }
            let cut = match port {
                Some(port) => cut_to_listener(service, port)?,
                None => service.clone(),
            };
            Some(cut_aliases(cut, imports))
        });
        services.extend(found);
    }
    // One namespace for each hostname: the proxy's own, else Kubernetes' service, else the first.
    let mut chosen: BTreeMap<String, (String, bool)> = BTreeMap::new();
    for service in &services {
        let kubernetes = service.registry == Registry::Kubernetes;
        let candidate = (service.namespace.clone(), kubernetes);
        match chosen.get(&service.hostname) {
            None => {
                chosen.insert(service.hostname.clone(), candidate);
            }
            Some((from, is_kubernetes)) => {
                let own = service.namespace == namespace;
                let better = !is_kubernetes && kubernetes && (own || from != namespace);
                if own || better {
                    chosen.insert(service.hostname.clone(), candidate);
                }
            }
        }
    }
    services.retain(|s| {
        chosen
            .get(&s.hostname)
            .is_some_and(|(from, _)| *from == s.namespace)
    });
    let best_virtual_service = best_virtual_services(&virtual_services, &services);
    EgressListener {
        listener: Some(listener.clone()),
        services,
        virtual_services,
        best_virtual_service,
    }
}

fn best_virtual_services(
    virtual_services: &[Arc<Routes>],
    services: &[Arc<Service>],
) -> BTreeMap<String, (String, String)> {
    let mut exact = BTreeMap::new();
    let mut wildcard = BTreeMap::new();
    for routes in virtual_services {
        for hostname in &routes.spec().hosts {
            let map = if host::is_wildcard(hostname) {
                &mut wildcard
            } else {
                &mut exact
            };
            map.entry(hostname.clone())
                .or_insert_with(|| (routes.namespace().to_owned(), routes.name().to_owned()));
        }
    }
    services
        .iter()
        .filter_map(|s| {
            let (_, found) = host::most_specific(&s.hostname, &exact, &wildcard)?;
            Some((s.hostname.clone(), found.clone()))
        })
        .collect()
}

fn matches_port(listener: Option<&IstioEgressListener>) -> bool {
    listener
        .and_then(|l| l.port.as_ref())
        .is_some_and(|p| p.number != 0 && Protocol::parse(&p.protocol) != Protocol::HttpProxy)
}

fn cut_to_listener(service: &Arc<Service>, port: u32) -> Option<Arc<Service>> {
    let found = service.port(port)?;
    if service.ports.len() == 1 {
        return Some(service.clone());
    }
    let mut cut = (**service).clone();
    cut.ports = vec![found.clone()];
    Some(Arc::new(cut))
}

fn cut_to_ports(service: &Arc<Service>, ports: &BTreeSet<u32>) -> Option<Arc<Service>> {
    if ports.is_empty() || ports.contains(&0) {
        return Some(service.clone());
    }
    let found: Vec<_> = service
        .ports
        .iter()
        .filter(|p| ports.contains(&p.number))
        .cloned()
        .collect();
    match found.len() {
        0 => None,
        n if n == service.ports.len() => Some(service.clone()),
        _ => {
            let mut cut = (**service).clone();
            cut.ports = found;
            Some(Arc::new(cut))
        }
    }
}

fn cut_aliases(service: Arc<Service>, imports: &Imports) -> Arc<Service> {
    if service
        .aliases
        .iter()
        .all(|(_, alias)| imports.has_service(alias))
    {
        return service;
    }
    let mut cut = (*service).clone();
    cut.aliases.retain(|(_, alias)| imports.has_service(alias));
    Arc::new(cut)
}

fn can_merge(a: &Service, b: &Service) -> bool {
    a.namespace == b.namespace
        && a.resolution == b.resolution
        && a.registry == b.registry
        && a.labels == b.labels
        && a.selector == b.selector
        && a.export_to == b.export_to
}
