//! Everything that listeners need to know about one proxy, worked out once before any of them is built.

use std::collections::BTreeMap;

use proto::{
    Duration,
    envoy::{
        config::{accesslog::v3::AccessLog, core::v3::CidrRange, listener::v3::Filter},
        extensions::filters::network::http_connection_manager::v3::{
            HttpFilter, http_connection_manager::Tracing,
        },
    },
    istio::mesh::v1alpha1::{MeshConfig, ProxyConfig, proxy_config::ConnectionSettings},
};

use super::{
    access_log::AccessLogs,
    settings::{self, Class, ProxyHeaders},
    tls::CertificateFiles,
};
use crate::{compat::Compat, security::Enforcement};

/// How connections come to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interception {
    /// Redirected by the kernel; the original destination is asked for.
    Redirect,
    /// Redirected without a change of addresses.
    Tproxy,
    /// Not at all: listeners bind their own ports.
    None,
}

/// The address families of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpFamilies {
    V4,
    V6,
    Dual,
}

impl IpFamilies {
    /// The families of a pod's addresses.
    pub fn of<'a>(addresses: impl IntoIterator<Item = &'a str>) -> IpFamilies {
        let (mut v4, mut v6) = (false, false);
        for address in addresses {
            match address.parse::<std::net::IpAddr>() {
                Ok(ip) if ip.is_ipv4() => v4 = true,
                Ok(_) => v6 = true,
                Err(_) => {}
            }
        }
        match (v4, v6) {
            (true, true) => IpFamilies::Dual,
            (false, true) => IpFamilies::V6,
            _ => IpFamilies::V4,
        }
    }

    /// "Any address", of the first family.
    pub fn wildcard(self) -> &'static str {
        self.wildcards()[0]
    }

    /// "Any address", of each family. Only outbound listeners take the second one: the others would have to be told
    /// to (`ISTIO_DUAL_STACK`), which is off by default.
    pub fn wildcards(self) -> &'static [&'static str] {
        match self {
            IpFamilies::V4 => &["0.0.0.0"],
            IpFamilies::V6 => &["::"],
            IpFamilies::Dual => &["0.0.0.0", "::"],
        }
    }

    /// The loopback address, of each family.
    pub fn localhosts(self) -> &'static [&'static str] {
        match self {
            IpFamilies::V4 => &["127.0.0.1"],
            IpFamilies::V6 => &["::1"],
            IpFamilies::Dual => &["127.0.0.1", "::1"],
        }
    }
}

/// Ports of the bootstrap's own listeners, which no other wildcard listener may take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReservedPorts(pub Vec<u32>);

/// What one side of the proxy reports.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reports {
    pub logs: AccessLogs,
    pub tracing: Option<Tracing>,
    /// Whether the trace decision is packed into the request id.
    pub request_id_for_sampling: bool,
    pub http_stats: Vec<HttpFilter>,
    pub tcp_stats: Vec<Filter>,
}

/// One proxy, as its listeners see it.
#[derive(Debug, Clone)]
pub struct Env<'a> {
    pub mesh: &'a MeshConfig,
    pub proxy_config: &'a ProxyConfig,
    pub labels: &'a BTreeMap<String, String>,
    pub namespace: &'a str,
    pub is_gateway: bool,
    pub families: IpFamilies,
    pub interception: Interception,
    pub http10: bool,
    pub idle_timeout: Option<Duration>,
    /// May not bind ports below 1024.
    pub unprivileged: bool,
    pub reserved: ReservedPorts,
    pub exact_balance: bool,
    pub certificates: CertificateFiles,
    /// The proxy has Istio's own filters; a plain Envoy would reject a listener that names them.
    pub istio_filters: bool,
    /// `(inbound, outbound, gateway)`.
    pub reports: [Reports; 3],
    /// What the policies of the workload ask for, in inbound chains and at gateways.
    pub enforcement: Enforcement,
    pub headers: [ProxyHeaders; 3],
    pub connection_settings: Option<ConnectionSettings>,
    /// The mesh's networks (MeshNetworks), in order of address.
    pub internal_networks: Vec<CidrRange>,
    pub compat: Compat,
}

impl Env<'_> {
    /// What `class` reports.
    pub fn reports(&self, class: Class) -> &Reports {
        &self.reports[index(class)]
    }

    /// What policies ask for in chains of `class`: nobody judges what a workload sends.
    pub fn enforcement(&self, class: Class) -> Option<&Enforcement> {
        (class != Class::Outbound).then_some(&self.enforcement)
    }

    /// The headers of `class`.
    pub fn headers(&self, class: Class) -> &ProxyHeaders {
        &self.headers[index(class)]
    }

    /// The logs of connections of `class`.
    pub fn tcp_logs(&self, class: Class) -> Vec<AccessLog> {
        self.reports(class).logs.tcp.clone()
    }

    /// ALPN names of plain HTTP.
    pub fn plain_http_alpn(&self) -> Vec<String> {
        ["http/1.1", "h2c"].map(str::to_owned).to_vec()
    }

    /// Whether a port may be bound by a listener of ours. `bind` is empty where the user gave none.
    pub fn can_bind(&self, really: bool, bind: &str, port: u32, is_http: bool) -> bool {
        if really && self.unprivileged && (1..1024).contains(&port) {
            return false;
        }
        let wildcard = if bind.is_empty() {
            is_http
        } else {
            bind == self.families.wildcard()
        };
        !(wildcard && self.is_reserved(port))
    }

    fn is_reserved(&self, port: u32) -> bool {
        self.reserved.0.contains(&port)
            || port == self.outbound_port()
            || port == self.inbound_port()
    }

    /// The port that outgoing connections are redirected to.
    pub fn outbound_port(&self) -> u32 {
        self.mesh.proxy_listen_port.max(0) as u32
    }

    /// The port that incoming connections are redirected to.
    pub fn inbound_port(&self) -> u32 {
        self.mesh.proxy_inbound_listen_port.max(0) as u32
    }
}

/// The three sides in the order of the arrays in [`Env`].
pub const CLASSES: [Class; 3] = [Class::Inbound, Class::Outbound, Class::Gateway];

/// The headers of every side.
pub fn headers(config: &ProxyConfig) -> [ProxyHeaders; 3] {
    CLASSES.map(|class| ProxyHeaders::new(config, class))
}

/// The connection settings of a proxy: its own, else the mesh's.
pub fn connection_settings(
    own: &ProxyConfig,
    mesh: &MeshConfig,
    is_gateway: bool,
) -> Option<ConnectionSettings> {
    settings::connection_settings(own, is_gateway).or_else(|| {
        mesh.default_config
            .as_ref()
            .and_then(|c| settings::connection_settings(c, is_gateway))
    })
}

fn index(class: Class) -> usize {
    match class {
        Class::Inbound => 0,
        Class::Outbound => 1,
        Class::Gateway => 2,
    }
}
