//! The table of kinds: each stands here once, and everything that must know all of them is generated from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use proto::istio::{
    extensions::v1alpha1::{TrafficExtension, WasmPlugin},
    mesh::v1alpha1::{MeshConfig, MeshNetworks},
    networking::{
        v1alpha3::{
            DestinationRule, EnvoyFilter, Gateway, ServiceEntry, Sidecar, VirtualService,
            WorkloadEntry, WorkloadGroup,
        },
        v1beta1::ProxyConfig,
    },
    security::v1beta1::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication},
    telemetry::v1alpha1::Telemetry,
};

use crate::{
    Meta, Object, ObjectKey, Source,
    decode::{self, DecodeError, Parts},
    gateway_api::{
        BackendTlsPolicy, Gateway as KubernetesGateway, GatewayClass, GrpcRoute, HttpRoute,
        ListenerSet, ReferenceGrant, TcpRoute, TlsRoute,
    },
    kubernetes::{ConfigMap, EndpointSlice, Namespace, Node, Pod, Secret, Service, ServiceAccount},
};

macro_rules! kinds {
    ($($variant:ident $field:ident $type:ident $group:literal $kind:literal $versions:tt $scope:ident $reader:ident;)*) => {
        /// The kinds that are read.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind {
            $(#[doc = concat!("`", $kind, "` of group `", $group, "`.")] $variant,)*
        }

        impl Kind {
            /// All kinds, in the order in which they are declared.
            pub const ALL: &'static [Kind] = &[$(Kind::$variant,)*];

            /// `kind` in a file.
            pub fn name(self) -> &'static str {
                match self { $(Kind::$variant => $kind,)* }
            }

            /// The API group; empty for the core group.
            pub fn group(self) -> &'static str {
                match self { $(Kind::$variant => $group,)* }
            }

            /// The versions of the group that are taken; all mean the same.
            pub fn versions(self) -> &'static [&'static str] {
                match self { $(Kind::$variant => &$versions,)* }
            }

            /// Whether objects of this kind live in namespaces.
            pub fn is_namespaced(self) -> bool {
                match self { $(Kind::$variant => matches!(Scope::$scope, Scope::Namespaced),)* }
            }
        }

        /// An object of any kind.
        #[derive(Debug, Clone)]
        pub enum AnyObject {
            $(#[doc = concat!("A ", $kind, ".")] $variant(Arc<Object<$type>>),)*
        }

        impl AnyObject {
            /// Its name among all objects.
            pub fn key(&self) -> ObjectKey {
                match self {
                    $(AnyObject::$variant(o) => ObjectKey::new(Kind::$variant, &*o.meta.namespace, &*o.meta.name),)*
                }
            }

            /// Its kind.
            pub fn kind(&self) -> Kind {
                match self { $(AnyObject::$variant(_) => Kind::$variant,)* }
            }

            /// Its metadata.
            pub fn meta(&self) -> &Meta {
                match self { $(AnyObject::$variant(o) => &o.meta,)* }
            }

            /// Where it was read.
            pub fn source(&self) -> &Source {
                match self { $(AnyObject::$variant(o) => &o.source,)* }
            }

            /// Whether both say the same, wherever they stand.
            pub fn same_content(&self, other: &Self) -> bool {
                match (self, other) {
                    $((AnyObject::$variant(a), AnyObject::$variant(b)) => {
                        Arc::ptr_eq(a, b) || (a.meta == b.meta && a.spec == b.spec)
                    })*
                    _ => false,
                }
            }

            /// Whether both are one object in memory.
            pub(crate) fn ptr_eq(&self, other: &Self) -> bool {
                match (self, other) {
                    $((AnyObject::$variant(a), AnyObject::$variant(b)) => Arc::ptr_eq(a, b),)*
                    _ => false,
                }
            }

            pub(crate) fn read(kind: Kind, parts: Parts<'_>) -> Result<AnyObject, DecodeError> {
                match kind {
                    $(Kind::$variant => decode::$reader::<$type>(parts).map(|o| AnyObject::$variant(Arc::new(o))),)*
                }
            }
        }

        /// All objects at one moment, never changed: a change makes a new snapshot that shares what stayed.
        #[derive(Debug, Clone)]
        pub struct Snapshot {
            $(#[doc = concat!("Objects of kind ", $kind, ".")] pub $field: Table<$type>,)*
            /// MeshConfig with Istio's defaults under what the ConfigMap says.
            pub mesh: Arc<MeshConfig>,
            /// MeshNetworks of the same ConfigMap.
            pub networks: Arc<MeshNetworks>,
            /// That ConfigMap: namespace and name.
            pub mesh_map: Arc<(String, String)>,
        }

        impl Snapshot {
            /// No objects, MeshConfig of the defaults.
            pub fn empty() -> Self {
                Snapshot {
                    $($field: Table::default(),)*
                    mesh: Arc::new(crate::mesh::defaults()),
                    networks: Arc::default(),
                    mesh_map: Arc::new((
                        crate::DEFAULT_ROOT_NAMESPACE.to_owned(),
                        crate::MESH_CONFIG_MAP.to_owned(),
                    )),
                }
            }

            /// No objects; MeshConfig of what follows is in this ConfigMap.
            pub fn with_mesh_in(namespace: &str, name: &str) -> Self {
                Snapshot {
                    mesh_map: Arc::new((namespace.to_owned(), name.to_owned())),
                    ..Snapshot::empty()
                }
            }

            /// Puts an object in, over one of the same name.
            pub(crate) fn insert(&mut self, object: AnyObject) {
                match object { $(AnyObject::$variant(o) => self.$field.insert(o),)* }
            }

            /// Takes over each table of `previous` that holds the very same objects.
            pub(crate) fn share(&mut self, previous: &Snapshot) {
                $(self.$field.share(&previous.$field);)*
            }

            /// The object of that name.
            pub fn get(&self, key: &ObjectKey) -> Option<AnyObject> {
                match key.kind {
                    $(Kind::$variant => {
                        self.$field.get(&key.namespace, &key.name).cloned().map(AnyObject::$variant)
                    })*
                }
            }

            /// How many objects there are of a kind.
            pub fn count(&self, kind: Kind) -> usize {
                match kind { $(Kind::$variant => self.$field.len(),)* }
            }

            /// The names of the objects that differ between the two, including those that only one has. Whether an
            /// object has moved within its file makes no difference.
            pub fn changed_since(&self, older: &Snapshot) -> BTreeSet<ObjectKey> {
                let mut out = BTreeSet::new();
                $(self.$field.diff(&older.$field, |namespace, name| {
                    out.insert(ObjectKey::new(Kind::$variant, namespace, name));
                });)*
                out
            }
        }
    };
}

enum Scope {
    Cluster,
    Namespaced,
}

kinds! {
    Namespace namespaces Namespace "" "Namespace" ["v1"] Cluster kubernetes;
    Node nodes Node "" "Node" ["v1"] Cluster kubernetes;
    Service services Service "" "Service" ["v1"] Namespaced kubernetes;
    Pod pods Pod "" "Pod" ["v1"] Namespaced kubernetes;
    EndpointSlice endpoint_slices EndpointSlice "discovery.k8s.io" "EndpointSlice" ["v1"] Namespaced kubernetes;
    ServiceAccount service_accounts ServiceAccount "" "ServiceAccount" ["v1"] Namespaced kubernetes;
    ConfigMap config_maps ConfigMap "" "ConfigMap" ["v1"] Namespaced kubernetes;
    Secret secrets Secret "" "Secret" ["v1"] Namespaced kubernetes;
    ServiceEntry service_entries ServiceEntry "networking.istio.io" "ServiceEntry" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    WorkloadEntry workload_entries WorkloadEntry "networking.istio.io" "WorkloadEntry" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    WorkloadGroup workload_groups WorkloadGroup "networking.istio.io" "WorkloadGroup" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    VirtualService virtual_services VirtualService "networking.istio.io" "VirtualService" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    DestinationRule destination_rules DestinationRule "networking.istio.io" "DestinationRule" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    Gateway gateways Gateway "networking.istio.io" "Gateway" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    Sidecar sidecars Sidecar "networking.istio.io" "Sidecar" ["v1", "v1beta1", "v1alpha3"] Namespaced istio;
    EnvoyFilter envoy_filters EnvoyFilter "networking.istio.io" "EnvoyFilter" ["v1alpha3"] Namespaced istio;
    ProxyConfig proxy_configs ProxyConfig "networking.istio.io" "ProxyConfig" ["v1beta1"] Namespaced istio;
    PeerAuthentication peer_authentications PeerAuthentication "security.istio.io" "PeerAuthentication" ["v1", "v1beta1"] Namespaced istio;
    RequestAuthentication request_authentications RequestAuthentication "security.istio.io" "RequestAuthentication" ["v1", "v1beta1"] Namespaced istio;
    AuthorizationPolicy authorization_policies AuthorizationPolicy "security.istio.io" "AuthorizationPolicy" ["v1", "v1beta1"] Namespaced istio;
    Telemetry telemetries Telemetry "telemetry.istio.io" "Telemetry" ["v1", "v1alpha1"] Namespaced istio;
    WasmPlugin wasm_plugins WasmPlugin "extensions.istio.io" "WasmPlugin" ["v1alpha1"] Namespaced istio;
    TrafficExtension traffic_extensions TrafficExtension "extensions.istio.io" "TrafficExtension" ["v1alpha1"] Namespaced istio;
    GatewayClass gateway_classes GatewayClass "gateway.networking.k8s.io" "GatewayClass" ["v1", "v1beta1"] Cluster gateway_api;
    KubernetesGateway kubernetes_gateways KubernetesGateway "gateway.networking.k8s.io" "Gateway" ["v1", "v1beta1"] Namespaced gateway_api;
    ListenerSet listener_sets ListenerSet "gateway.networking.k8s.io" "ListenerSet" ["v1"] Namespaced gateway_api;
    HttpRoute http_routes HttpRoute "gateway.networking.k8s.io" "HTTPRoute" ["v1", "v1beta1"] Namespaced gateway_api;
    GrpcRoute grpc_routes GrpcRoute "gateway.networking.k8s.io" "GRPCRoute" ["v1"] Namespaced gateway_api;
    TlsRoute tls_routes TlsRoute "gateway.networking.k8s.io" "TLSRoute" ["v1", "v1alpha3", "v1alpha2"] Namespaced gateway_api;
    TcpRoute tcp_routes TcpRoute "gateway.networking.k8s.io" "TCPRoute" ["v1", "v1alpha2"] Namespaced gateway_api;
    ReferenceGrant reference_grants ReferenceGrant "gateway.networking.k8s.io" "ReferenceGrant" ["v1", "v1beta1"] Namespaced gateway_api;
    BackendTlsPolicy backend_tls_policies BackendTlsPolicy "gateway.networking.k8s.io" "BackendTLSPolicy" ["v1", "v1alpha3"] Namespaced gateway_api;
}

impl Kind {
    /// The kind of that group and name.
    pub fn find(group: &str, kind: &str) -> Option<Kind> {
        Kind::ALL
            .iter()
            .copied()
            .find(|k| k.group() == group && k.name() == kind)
    }

    /// Whether it is one of Gateway API's kinds.
    pub fn is_gateway_api(self) -> bool {
        self.group() == crate::gateway_api::GROUP
    }

    /// Whether it is one of Istio's own kinds.
    pub fn is_istio(self) -> bool {
        self.group().ends_with(".istio.io")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The objects of one kind, by namespace and name; sorted.
pub struct Table<T>(Arc<BTreeMap<String, ByName<T>>>);

type ByName<T> = BTreeMap<String, Arc<Object<T>>>;

impl<T> Table<T> {
    /// The object of that name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<&Arc<Object<T>>> {
        self.0.get(namespace)?.get(name)
    }

    /// All objects, by namespace, then name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Object<T>>> {
        self.0.values().flat_map(BTreeMap::values)
    }

    /// The objects of a namespace, by name.
    pub fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<Object<T>>> {
        self.0.get(namespace).into_iter().flat_map(BTreeMap::values)
    }

    /// All objects in Istio's order of precedence (see [`Object::by_age`]).
    pub fn by_age(&self) -> Vec<&Arc<Object<T>>> {
        let mut all: Vec<_> = self.iter().collect();
        all.sort_by(|a, b| a.by_age(b));
        all
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether both are one table in memory: a cheap sign that nothing of this kind changed.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Adds an object, or puts it in the place of the one of its name.
    pub fn insert(&mut self, object: Arc<Object<T>>) {
        Arc::make_mut(&mut self.0)
            .entry(object.meta.namespace.clone())
            .or_default()
            .insert(object.meta.name.clone(), object);
    }

    fn share(&mut self, previous: &Self) {
        let same = self.len() == previous.len()
            && self
                .iter()
                .zip(previous.iter())
                .all(|(a, b)| Arc::ptr_eq(a, b));
        if same {
            self.0 = previous.0.clone();
        }
    }

    fn diff(&self, older: &Self, mut changed: impl FnMut(&str, &str))
    where
        T: PartialEq,
    {
        if self.same(older) {
            return;
        }
        for o in self.iter() {
            let same = older
                .get(&o.meta.namespace, &o.meta.name)
                .is_some_and(|b| Arc::ptr_eq(o, b) || (o.meta == b.meta && o.spec == b.spec));
            if !same {
                changed(&o.meta.namespace, &o.meta.name);
            }
        }
        for o in older.iter() {
            if self.get(&o.meta.namespace, &o.meta.name).is_none() {
                changed(&o.meta.namespace, &o.meta.name);
            }
        }
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Table(self.0.clone())
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table(Arc::default())
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({})", self.len())
    }
}
