//! A service as the mesh sees it, whatever it came from: a Kubernetes Service or one host of a ServiceEntry.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{Created, Labels, Origin, port::Port, proxy::Proxy};

/// The address of a service that has none.
pub const UNSPECIFIED: &str = "0.0.0.0";

/// Who declared the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Registry {
    Kubernetes,
    /// A ServiceEntry.
    External,
}

/// How the endpoints of a service are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// Endpoints are known here and sent by EDS.
    ClientSide,
    /// The proxy asks DNS for all addresses (`STRICT_DNS`).
    Dns,
    /// The proxy asks DNS and uses one address at a time (`LOGICAL_DNS`).
    DnsRoundRobin,
    /// The connection goes where the caller aimed (headless, ServiceEntry `NONE`).
    Passthrough,
    /// ExternalName: another name of a service, without endpoints of its own.
    Alias,
    /// ServiceEntry `DYNAMIC_DNS`: the proxy resolves the host of each request.
    DynamicDns,
}

/// Which endpoints `spec.trafficDistribution` (or its annotation) prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TrafficDistribution {
    #[default]
    Any,
    SameZone,
    SameNode,
}

/// To whom an object is visible: `*`, `.` (its own namespace), `~` (nobody) or a namespace's name.
/// Empty means: what MeshConfig says for its kind.
pub type ExportTo = BTreeSet<String>;

/// Whether an object of `namespace`, exported to `export`, is visible in `client`.
pub fn visible(export: &ExportTo, namespace: &str, client: &str) -> bool {
    export.contains("*") || (export.contains(".") && namespace == client) || export.contains(client)
}

/// One service: one hostname in one namespace (a ServiceEntry with two addresses gives two that share a hostname).
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub hostname: String,
    /// Kubernetes' name; of a ServiceEntry the hostname.
    pub name: String,
    pub namespace: String,
    pub registry: Registry,
    pub ports: Vec<Port>,
    /// First address, or [`UNSPECIFIED`]; of a ServiceEntry an address or a CIDR.
    pub default_address: String,
    /// Cluster addresses of a Kubernetes Service (empty for a ServiceEntry); a headless one has [`UNSPECIFIED`].
    pub cluster_ips: Vec<String>,
    /// Address of 240.240.0.0/16 given to a ServiceEntry host without one.
    pub auto_v4: Option<String>,
    /// Address of 2001:2::/48 given to a ServiceEntry host without one.
    pub auto_v6: Option<String>,
    /// Load balancer addresses and externalIPs.
    pub external_addresses: Vec<String>,
    pub resolution: Resolution,
    /// Outside the mesh: no mutual TLS of ours.
    pub mesh_external: bool,
    pub export_to: ExportTo,
    pub labels: Labels,
    /// Pod selector (Kubernetes) or workload selector (ServiceEntry).
    pub selector: Labels,
    /// Identities that the object itself declares (annotations, `subjectAltNames`).
    pub service_accounts: Vec<String>,
    /// Target of an ExternalName service.
    pub external_name: String,
    /// ExternalName services that lead here, as (namespace, hostname), sorted.
    pub aliases: Vec<(String, String)>,
    /// Only endpoints on the caller's node (`internalTrafficPolicy: Local`).
    pub node_local: bool,
    pub publish_not_ready: bool,
    pub traffic_distribution: TrafficDistribution,
    /// Annotated to race the addresses of a DNS name and take the first that connects.
    pub dns_race_connect: bool,
    /// Ports of a `NONE` ServiceEntry that lead to another port.
    pub passthrough_ports: BTreeMap<u32, u32>,
    /// Name of the object, where it differs from `name`.
    pub object_name: String,
    pub created: Created,
    pub origin: Origin,
}

impl Service {
    /// The port of this number.
    pub fn port(&self, number: u32) -> Option<&Port> {
        self.ports.iter().find(|p| p.number == number)
    }

    /// The port of this name.
    pub fn port_named(&self, name: &str) -> Option<&Port> {
        self.ports.iter().find(|p| p.name == name)
    }

    /// Whether it has cluster addresses of its own (a Kubernetes Service that is not headless).
    pub fn has_cluster_ip(&self) -> bool {
        self.cluster_ips.iter().any(|a| a != UNSPECIFIED)
    }

    /// A Kubernetes Service with `clusterIP: None`.
    pub fn is_headless(&self) -> bool {
        self.registry == Registry::Kubernetes && self.resolution == Resolution::Passthrough
    }

    /// The address that `proxy` calls this service by; [`UNSPECIFIED`] when there is none.
    pub fn address_for(&self, proxy: &Proxy) -> String {
        let own = by_family(&self.cluster_ips, proxy);
        if let Some(first) = own.into_iter().next() {
            return first;
        }
        if proxy.uses_auto_allocated() && self.default_address == UNSPECIFIED {
            if let Some(v4) = self.auto_v4.as_ref().filter(|_| proxy.supports_v4()) {
                return v4.clone();
            }
            if let Some(v6) = self.auto_v6.as_ref().filter(|_| proxy.supports_v6()) {
                return v6.clone();
            }
        }
        self.default_address.clone()
    }

    /// All addresses that `proxy` may call this service by, of the families that it has.
    pub fn addresses_for(&self, proxy: &Proxy) -> Vec<String> {
        let mut all = self.cluster_ips.clone();
        if all.is_empty() && proxy.uses_auto_allocated() {
            all.extend(self.auto_v4.clone());
            all.extend(self.auto_v6.clone());
        }
        let usable = by_family(&all, proxy);
        if !usable.is_empty() {
            return usable;
        }
        if self.default_address.is_empty() {
            return Vec::new();
        }
        let default = vec![self.default_address.clone()];
        if self.cluster_ips.is_empty() {
            default
        } else {
            by_family(&default, proxy)
        }
    }

    /// `host:port` pattern names in cluster statistics: `name.namespace` for Kubernetes, else the hostname.
    pub fn short_host(&self) -> String {
        match self.registry {
            Registry::Kubernetes => format!("{}.{}", self.name, self.namespace),
            Registry::External => self.hostname.clone(),
        }
    }

    /// Oldest first; equal times by name, then namespace.
    pub fn by_age(a: &Service, b: &Service) -> Ordering {
        a.created
            .cmp(&b.created)
            .then_with(|| a.name.cmp(&b.name))
            .then_with(|| a.namespace.cmp(&b.namespace))
    }
}

fn by_family(addresses: &[String], proxy: &Proxy) -> Vec<String> {
    addresses
        .iter()
        .filter(|a| match a.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => proxy.supports_v4(),
            Ok(IpAddr::V6(_)) => proxy.supports_v6(),
            Err(_) => false,
        })
        .cloned()
        .collect()
}
