//! The mesh at one moment: everything that translation reads, indexed and immutable. A new state shares with the old
//! one whatever did not change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use config::{Object, Snapshot, Table, labels_match};
use parking_lot::Mutex;
use proto::istio::{
    mesh::v1alpha1::{MeshConfig, mesh_config},
    networking::v1alpha3::Sidecar,
};

use super::{
    Labels, Proxy,
    destination_rule::DestinationRules,
    discovery::Discovered,
    endpoint::Endpoint,
    endpoints::{Endpoints, ServiceEndpoints},
    gateway::BoundGateway,
    kubernetes,
    node::{Node, NodeKind},
    peer_authentication::{MtlsMode, PeerAuthentications},
    service::{ExportTo, Resolution, Service},
    service_entry,
    services::Services,
    sidecar::{OutboundMode, SidecarScope},
    virtual_service::VirtualServices,
    workload::{Place, Workloads},
};
use crate::{
    compat::Compat,
    envoy_filter::EnvoyFilters,
    gateway_api::{GatewayApi, Inputs},
    security::Policies,
};

/// What the control plane itself is, beside the objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Last part of Kubernetes' names.
    pub domain: String,
    /// Name of the Kubernetes cluster, as proxies say it in `CLUSTER_ID`.
    pub cluster_id: String,
    /// Which release's names are given out.
    pub compat: Compat,
    /// Name of this replica, as `istioctl proxy-status` shows it.
    pub replica: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            domain: "cluster.local".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            compat: Compat::Current,
            replica: String::new(),
        }
    }
}

/// The mesh at one moment (Istio's PushContext).
#[derive(Debug)]
pub struct Mesh {
    snapshot: Arc<Snapshot>,
    discovered: Discovered,
    settings: Arc<Settings>,
    services: Arc<Services>,
    workloads: Arc<Workloads>,
    endpoints: Arc<Endpoints>,
    virtual_services: Arc<VirtualServices>,
    destination_rules: Arc<DestinationRules>,
    peer_authentications: Arc<PeerAuthentications>,
    policies: Arc<Policies>,
    gateways: Arc<Vec<Arc<BoundGateway>>>,
    gateway_api: GatewayApi,
    envoy_filters: Arc<EnvoyFilters>,
    sidecars: Arc<Sidecars>,
    label_keys: Arc<BTreeSet<String>>,
    scopes: Arc<Scopes>,
}

/// Sidecars by namespace, those with a selector first, each part oldest first.
type Sidecars = BTreeMap<String, Vec<Arc<Object<Sidecar>>>>;

/// (gateway?, namespace of the proxies, namespace and name of the Sidecar).
type ScopeKey = (bool, String, Option<(String, String)>);

#[derive(Debug, Default)]
struct Scopes(Mutex<HashMap<ScopeKey, Arc<SidecarScope>>>);

impl Mesh {
    /// Indexes `snapshot`; parts whose inputs are those of `previous` are taken from it.
    pub fn new(snapshot: Arc<Snapshot>, settings: Settings, previous: Option<&Mesh>) -> Self {
        let new = &*snapshot;
        let previous = previous.filter(|p| *p.settings == settings);
        let config_same = previous.is_some_and(|p| {
            Arc::ptr_eq(&p.snapshot.mesh, &new.mesh) || p.snapshot.mesh == new.mesh
        });
        let discovered = Discovered::new(new);
        let previous = previous.filter(|p| config_same && p.discovered == discovered);
        macro_rules! same {
            ($($table:ident),*) => { previous.filter(|p| true $(&& p.snapshot.$table.same(&new.$table))*) };
        }
        let config = &new.mesh;
        let root = &config.root_namespace;
        let place = Place {
            cluster: &settings.cluster_id,
            trust_domain: &config.trust_domain,
        };

        let services = match same!(services, service_entries, namespaces) {
            Some(p) => p.services.clone(),
            None => Arc::new(index_services(
                new,
                &settings,
                &discovered,
                previous.map(|p| &*p.services),
            )),
        };
        let workloads = match same!(pods, nodes, workload_entries) {
            Some(p) => p.workloads.clone(),
            None => Arc::new(Workloads::new(new, &place)),
        };
        let endpoints = match same!(
            services,
            service_entries,
            namespaces,
            pods,
            nodes,
            workload_entries,
            endpoint_slices
        ) {
            Some(p) => p.endpoints.clone(),
            None => Arc::new(Endpoints::new(
                new,
                &services,
                &workloads,
                &place,
                previous.map(|p| &*p.endpoints),
                previous.is_some_and(|p| Arc::ptr_eq(&p.workloads, &workloads)),
            )),
        };
        let gateway_api = match same!(
            gateway_classes,
            kubernetes_gateways,
            listener_sets,
            http_routes,
            grpc_routes,
            tls_routes,
            tcp_routes,
            reference_grants,
            backend_tls_policies,
            services,
            service_entries,
            namespaces,
            secrets,
            config_maps
        ) {
            Some(p) => p.gateway_api.clone(),
            None => GatewayApi::new(
                &Inputs {
                    snapshot: new,
                    domain: &settings.domain,
                    takes: &|namespace| discovered.has(namespace),
                },
                previous.map(|p| &p.gateway_api),
            ),
        };
        let derived = &gateway_api.translated;
        let derived_same =
            previous.is_some_and(|p| Arc::ptr_eq(&p.gateway_api.translated, derived));
        let virtual_services = match same!(virtual_services).filter(|_| derived_same) {
            Some(p) => p.virtual_services.clone(),
            None => Arc::new(VirtualServices::new(
                taken(&new.virtual_services, &discovered),
                &derived.virtual_services,
                &settings.domain,
                &export_default(&config.default_virtual_service_export_to),
            )),
        };
        let destination_rules = match same!(destination_rules).filter(|_| derived_same) {
            Some(p) => p.destination_rules.clone(),
            None => Arc::new(DestinationRules::new(
                taken(&new.destination_rules, &discovered),
                &derived.destination_rules,
                root,
                &settings.domain,
                &export_default(&config.default_destination_rule_export_to),
            )),
        };
        let peer_authentications = match same!(peer_authentications) {
            Some(p) => p.peer_authentications.clone(),
            None => Arc::new(PeerAuthentications::new(
                taken(&new.peer_authentications, &discovered),
                root,
            )),
        };
        let policies = match same!(authorization_policies, request_authentications) {
            Some(p) => p.policies.clone(),
            None => Arc::new(Policies::new(
                taken(&new.authorization_policies, &discovered),
                taken(&new.request_authentications, &discovered),
                root,
            )),
        };
        let gateways = match same!(gateways).filter(|_| derived_same) {
            Some(p) => p.gateways.clone(),
            None => {
                let own = taken(&new.gateways, &discovered).into_iter();
                let derived = derived.gateways.iter().map(|g| BoundGateway {
                    object: g.derived.object.clone(),
                    from: g.derived.from.clone(),
                    binding: g.binding.clone(),
                });
                let mut all: Vec<_> = own
                    .map(BoundGateway::selecting)
                    .chain(derived)
                    .map(Arc::new)
                    .collect();
                all.sort_by(|a, b| a.object.by_age(&b.object));
                Arc::new(all)
            }
        };
        let envoy_filters = match same!(envoy_filters) {
            Some(p) => p.envoy_filters.clone(),
            None => Arc::new(EnvoyFilters::new(
                taken(&new.envoy_filters, &discovered),
                root,
            )),
        };
        let sidecars = match same!(sidecars) {
            Some(p) => p.sidecars.clone(),
            None => Arc::new(index_sidecars(taken(&new.sidecars, &discovered))),
        };
        let scopes = match previous {
            Some(p)
                if Arc::ptr_eq(&p.services, &services)
                    && Arc::ptr_eq(&p.virtual_services, &virtual_services)
                    && Arc::ptr_eq(&p.destination_rules, &destination_rules)
                    && Arc::ptr_eq(&p.sidecars, &sidecars) =>
            {
                p.scopes.clone()
            }
            _ => Arc::default(),
        };
        let label_keys = label_keys(
            new,
            &virtual_services,
            &destination_rules,
            &peer_authentications,
        );
        Self {
            discovered,
            settings: Arc::new(settings),
            services,
            workloads,
            endpoints,
            virtual_services,
            destination_rules,
            peer_authentications,
            policies,
            gateways,
            gateway_api,
            envoy_filters,
            sidecars,
            label_keys: Arc::new(label_keys),
            scopes,
            snapshot,
        }
    }

    /// The objects as written.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// MeshConfig with its defaults.
    pub fn config(&self) -> &MeshConfig {
        &self.snapshot.mesh
    }

    /// What the control plane itself is.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Last part of Kubernetes' names: `cluster.local`.
    pub fn domain(&self) -> &str {
        &self.settings.domain
    }

    /// Name of the Kubernetes cluster.
    pub fn cluster_id(&self) -> &str {
        &self.settings.cluster_id
    }

    /// The namespace whose objects are for the whole mesh.
    pub fn root_namespace(&self) -> &str {
        &self.snapshot.mesh.root_namespace
    }

    /// All services.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// All workloads.
    pub fn workloads(&self) -> &Workloads {
        &self.workloads
    }

    /// All VirtualServices.
    pub fn virtual_services(&self) -> &VirtualServices {
        &self.virtual_services
    }

    /// All DestinationRules.
    pub fn destination_rules(&self) -> &DestinationRules {
        &self.destination_rules
    }

    /// All AuthorizationPolicies and RequestAuthentications.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// All PeerAuthentications.
    pub fn peer_authentications(&self) -> &PeerAuthentications {
        &self.peer_authentications
    }

    /// All Gateways, those made of Gateway API's listeners among them, the oldest first.
    pub fn gateways(&self) -> &[Arc<BoundGateway>] {
        &self.gateways
    }

    /// What Gateway API's objects mean, and what is said of them.
    pub fn gateway_api(&self) -> &GatewayApi {
        &self.gateway_api
    }

    /// All EnvoyFilters.
    pub(crate) fn envoy_filters(&self) -> &EnvoyFilters {
        &self.envoy_filters
    }

    /// The Gateways of a gateway proxy, the oldest first.
    pub fn gateways_of(&self, proxy: &Proxy) -> impl Iterator<Item = &Arc<BoundGateway>> {
        self.gateways.iter().filter(move |g| g.is_of(proxy))
    }

    /// Labels of proxies that some object looks at: proxies that differ only in others are treated alike.
    pub fn label_keys(&self) -> &BTreeSet<String> {
        &self.label_keys
    }

    /// The endpoints behind a port of a service.
    pub fn endpoints(&self, service: &Service, port: u32) -> &[Endpoint] {
        self.service_endpoints(service)
            .map_or(&[], |e| e.port(port))
    }

    /// All endpoints of a service (and of those that share hostname and namespace with it), by port.
    pub fn all_endpoints(&self, service: &Service) -> impl Iterator<Item = (u32, &Endpoint)> {
        self.service_endpoints(service)
            .into_iter()
            .flat_map(|e| e.iter())
    }

    /// The identities of a service's workloads and those that its object declares, in all trust domains; sorted.
    pub fn service_accounts(&self, service: &Service) -> Vec<String> {
        let mut out: BTreeSet<String> = service.service_accounts.iter().cloned().collect();
        out.extend(
            self.service_endpoints(service)
                .into_iter()
                .flat_map(|e| e.accounts().iter().cloned()),
        );
        let aliases = &self.config().trust_domain_aliases;
        if !aliases.is_empty() {
            let expanded: Vec<String> = out
                .iter()
                .filter_map(|account| account.strip_prefix("spiffe://")?.split_once('/'))
                .flat_map(|(_, path)| aliases.iter().map(move |d| format!("spiffe://{d}/{path}")))
                .collect();
            out.extend(expanded);
        }
        out.into_iter().collect()
    }

    /// The services, as (hostname, namespace), whose endpoints differ from those of an older state.
    pub fn endpoint_changes(&self, older: &Mesh) -> BTreeSet<(String, String)> {
        if Arc::ptr_eq(&self.endpoints, &older.endpoints) {
            return BTreeSet::new();
        }
        self.endpoints.changed_since(&older.endpoints)
    }

    /// Whether clusters too (not only endpoints) depend on what changed in the endpoints of a service: who its
    /// workloads are, or, where clusters hold endpoints or follow whether all have sidecars, anything.
    pub fn endpoint_change_needs_clusters(&self, older: &Mesh, key: &(String, String)) -> bool {
        let in_clusters = self.services.get(&key.0, &key.1).is_some_and(|s| {
            matches!(
                s.resolution,
                Resolution::Dns | Resolution::DnsRoundRobin | Resolution::Passthrough
            )
        });
        let accounts = |mesh: &Mesh| {
            let found = mesh.endpoints.get(&key.0, &key.1);
            found.map(|e| e.accounts().clone())
        };
        in_clusters || accounts(self) != accounts(older)
    }

    /// MeshConfig's mode for traffic to unknown hosts.
    pub fn outbound_mode(&self) -> OutboundMode {
        use mesh_config::outbound_traffic_policy::Mode;
        match self
            .config()
            .outbound_traffic_policy
            .as_ref()
            .map(|p| p.mode())
        {
            Some(Mode::RegistryOnly) => OutboundMode::RegistryOnly,
            _ => OutboundMode::AllowAny,
        }
    }

    /// What callers may expect of the servers of a service; `None` where it is outside the mesh. Servers reached at
    /// the address that the caller chose count as plaintext unless every one of them has a sidecar.
    pub fn server_mtls(&self, service: &Service, port: u32, passthrough: bool) -> Option<MtlsMode> {
        if service.mesh_external {
            return None;
        }
        if service.resolution == Resolution::Passthrough || passthrough {
            let endpoints = self.endpoints(service, port);
            if endpoints.is_empty() || endpoints.iter().any(|e| e.tls_mode == "disabled") {
                return Some(MtlsMode::Disable);
            }
        }
        Some(self.peer_authentications.namespace(&service.namespace))
    }

    /// The scope of a proxy: for a sidecar the oldest Sidecar of its namespace that selects it, else the one without
    /// selector, else the root namespace's, else everything; a gateway sees everything.
    pub fn scope(&self, node: &Node, labels: &Labels) -> Arc<SidecarScope> {
        let namespace = &node.namespace;
        let gateway = node.kind == NodeKind::Router;
        let sidecar = if gateway {
            None
        } else {
            self.sidecar_for(namespace, labels)
        };
        let name = sidecar.map(|s| (s.meta.namespace.clone(), s.meta.name.clone()));
        let key = (gateway, namespace.clone(), name);
        if let Some(found) = self.scopes.0.lock().get(&key) {
            return found.clone();
        }
        // Built outside the lock: two proxies that build the same scope at once get equal ones.
        let built = Arc::new(if gateway {
            SidecarScope::for_gateway(self, namespace)
        } else {
            SidecarScope::for_sidecar(self, sidecar.cloned(), namespace)
        });
        self.scopes.0.lock().entry(key).or_insert(built).clone()
    }

    fn sidecar_for(&self, namespace: &str, labels: &Labels) -> Option<&Arc<Object<Sidecar>>> {
        let selector =
            |s: &Object<Sidecar>| s.spec.workload_selector.as_ref().map(|s| s.labels.clone());
        let own = self.sidecars.get(namespace).into_iter().flatten();
        let own = own
            .into_iter()
            .find(|s| selector(s).is_none_or(|sel| labels_match(&sel, labels)));
        own.or_else(|| {
            let root = self
                .sidecars
                .get(self.root_namespace())
                .into_iter()
                .flatten();
            root.into_iter().find(|s| selector(s).is_none())
        })
    }

    /// The index of endpoints.
    pub(super) fn endpoint_index(&self) -> &Endpoints {
        &self.endpoints
    }

    fn service_endpoints(&self, service: &Service) -> Option<&Arc<ServiceEndpoints>> {
        self.endpoints.get(&service.hostname, &service.namespace)
    }
}

fn export_default(listed: &[String]) -> ExportTo {
    match listed {
        [] => BTreeSet::from(["*".to_owned()]),
        listed => listed.iter().cloned().collect(),
    }
}

fn index_services(
    snapshot: &Snapshot,
    settings: &Settings,
    discovered: &Discovered,
    previous: Option<&Services>,
) -> Services {
    let annotations = |namespace: &str| {
        snapshot
            .namespaces
            .get("", namespace)
            .map(|n| &n.meta.annotations)
    };
    let mut all = Vec::new();
    for object in &taken(&snapshot.services, discovered) {
        all.push(kubernetes::service(
            object,
            annotations(&object.meta.namespace),
            &settings.domain,
            &snapshot.mesh.trust_domain,
        ));
    }
    let mut allocator = service_entry::Allocator::default();
    for object in &taken(&snapshot.service_entries, discovered) {
        all.extend(service_entry::services(
            object,
            annotations(&object.meta.namespace),
            &mut allocator,
        ));
    }
    Services::new(
        all,
        export_default(&snapshot.mesh.default_service_export_to),
        previous,
    )
}

fn index_sidecars(mut all: Vec<Arc<Object<Sidecar>>>) -> Sidecars {
    let mut out = Sidecars::new();
    all.sort_by(|a, b| a.by_age(b));
    let (with, without): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|s| s.spec.workload_selector.is_some());
    for sidecar in with.into_iter().chain(without) {
        out.entry(sidecar.meta.namespace.clone())
            .or_default()
            .push(sidecar);
    }
    out
}

/// The objects of a kind in the namespaces that the mesh takes in.
fn taken<T>(table: &Table<T>, discovered: &Discovered) -> Vec<Arc<Object<T>>> {
    table
        .iter()
        .filter(|o| discovered.has(&o.meta.namespace))
        .cloned()
        .collect()
}

/// Every label key that decides what a proxy gets.
fn label_keys(
    snapshot: &Snapshot,
    virtual_services: &VirtualServices,
    destination_rules: &DestinationRules,
    peer_authentications: &PeerAuthentications,
) -> BTreeSet<String> {
    let mut out: BTreeSet<String> = virtual_services
        .label_keys()
        .chain(destination_rules.label_keys())
        .chain(peer_authentications.label_keys())
        .cloned()
        .collect();
    let mut add = |selector: Option<&Labels>| {
        out.extend(selector.into_iter().flat_map(|s| s.keys().cloned()))
    };
    for o in snapshot.gateways.iter() {
        add(Some(&o.spec.selector));
    }
    for o in snapshot.envoy_filters.iter() {
        add(o.spec.workload_selector.as_ref().map(|s| &s.labels));
    }
    for o in snapshot.telemetries.iter() {
        add(o.spec.selector.as_ref().map(|s| &s.match_labels));
    }
    for o in snapshot.authorization_policies.iter() {
        add(o.spec.selector.as_ref().map(|s| &s.match_labels));
    }
    for o in snapshot.request_authentications.iter() {
        add(o.spec.selector.as_ref().map(|s| &s.match_labels));
    }
    for o in snapshot.wasm_plugins.iter() {
        add(o.spec.selector.as_ref().map(|s| &s.match_labels));
    }
    let locality = snapshot
        .mesh
        .locality_lb_setting
        .iter()
        .flat_map(|l| &l.failover_priority);
    let zones = snapshot
        .mesh
        .zone_aware_lb_setting
        .iter()
        .flat_map(|z| &z.failover_priority);
    for label in locality.chain(zones) {
        let key = label.split_once('=').map_or(label.as_str(), |(key, _)| key);
        out.insert(key.to_owned());
    }
    out
}
