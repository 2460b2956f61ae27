//! Listeners: where connections come in, and what happens to them.
//!
//! [`Context`] holds what is the same for all listeners of a proxy ([`env::Env`] are its settings). A sidecar gets
//! the listeners of [`outbound`], [`virtual_outbound`] and [`inbound`]; a gateway those of `gateway::listeners`.

pub mod access_log;
pub mod chain;
pub mod env;
pub mod filters;
pub mod hcm;
pub mod inbound;
pub mod outbound;
pub mod settings;
pub mod tcp;
mod telemetry;
pub mod tls;
pub mod tracing;
pub mod virtual_outbound;

use config::{Kind, ObjectKey};
use ipnet::IpNet;
use proto::{
    Duration,
    envoy::config::{
        core::v3::CidrRange,
        listener::v3::{Filter, Listener},
    },
    istio::{
        mesh::v1alpha1::{ProxyConfig, network::network_endpoints::Ne},
        networking::v1alpha3::DestinationRule,
    },
};

use self::{
    env::{Env, Interception, IpFamilies, ReservedPorts},
    settings::Class,
    tls::CertificateFiles,
};
use crate::{
    envoy_filter,
    model::{self, Mesh, Origin, Proxy, Registry, Resource, Service},
    names::DestinationService,
    route::{Client, NO_TIMEOUT, domains::Style},
};

/// All listeners of a proxy, outbound ones first.
pub fn build(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    let own_address = proxy.node.addresses.first().map(ToString::to_string);
    let mut out: Vec<Resource> = outbound(mesh, proxy)
        .into_iter()
        .filter(|s| s.of_pod.is_none() || s.of_pod != own_address)
        .map(|s| s.resource)
        .collect();
    out.extend(own(mesh, proxy));
    out
}

/// The outbound listeners of a sidecar that all proxies with the same [`Proxy::view_key`] have, the pod aside that one
/// leads to. A gateway has none.
pub fn outbound(mesh: &Mesh, proxy: &Proxy) -> Vec<Shared> {
    if proxy.is_router() {
        return Vec::new();
    }
    let context = Context::new(mesh, proxy);
    let mut out = outbound::build(&context, Part::Shared);
    out.extend(virtual_outbound::build(&context));
    let of_pods: Vec<_> = out.iter().map(|b| b.of_pod.clone()).collect();
    let patch = |resource| envoy_filter::listeners(mesh, proxy, vec![resource]).pop();
    let added = envoy_filter::added_listeners(mesh, proxy, false);
    let added = added.into_iter().map(|resource| Shared {
        resource,
        of_pod: None,
    });
    resources(&context, out)
        .into_iter()
        .zip(of_pods)
        .filter_map(|(resource, of_pod)| {
            Some(Shared {
                resource: patch(resource)?,
                of_pod,
            })
        })
        .chain(added)
        .collect()
}

/// The other listeners: of a sidecar what its workload serves, and the outbound listeners that name the workload in its
/// traces; of a gateway all. They change with the labels, addresses and service ports of the workload, and with the
/// same objects as the shared ones (see [`depends_on`]).
pub fn own(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    let context = Context::new(mesh, proxy);
    if proxy.is_router() {
        let mut out = crate::gateway::listeners::build(&context);
        out = envoy_filter::listeners(mesh, proxy, out);
        out.extend(envoy_filter::added_listeners(mesh, proxy, false));
        return out;
    }
    let own_address = proxy.node.addresses.first().map(ToString::to_string);
    let mut out = outbound::build(&context, Part::Own);
    out.retain(|b| b.of_pod.is_none() || b.of_pod != own_address);
    out.extend(outbound::http_proxy(&context));
    out.extend(inbound::build(&context));
    let mut out = envoy_filter::listeners(mesh, proxy, resources(&context, out));
    out.extend(envoy_filter::added_listeners(mesh, proxy, true));
    out
}

/// A listener that many proxies share.
#[derive(Debug, Clone)]
pub struct Shared {
    pub resource: Resource,
    /// The address of the one pod that it leads to (headless services): that pod does not get it.
    pub of_pod: Option<String>,
}

/// Whether some listener is made from this VirtualService or DestinationRule, beside naming routes or clusters: only
/// rules for TCP and TLS are. Other kinds of objects are not asked about and count as used.
pub fn depends_on(mesh: &Mesh, key: &ObjectKey) -> bool {
    let snapshot = mesh.snapshot();
    match key.kind {
        Kind::VirtualService => {
            let own = snapshot.virtual_services.get(&key.namespace, &key.name);
            let derived = || {
                let derived = &mesh.gateway_api().translated;
                derived.virtual_service(&key.namespace, &key.name)
            };
            own.map(|o| &**o)
                .or_else(derived)
                .is_some_and(|o| !o.spec.tcp.is_empty() || !o.spec.tls.is_empty())
        }
        Kind::DestinationRule => snapshot
            .destination_rules
            .get(&key.namespace, &key.name)
            .is_some_and(|o| tcp::is_shaped_by(&o.spec)),
        _ => true,
    }
}

/// A listener and the objects that it was made from.
#[derive(Debug)]
pub struct Built {
    pub listener: Listener,
    pub from: Vec<Origin>,
    /// The address of the one pod that it leads to.
    pub of_pod: Option<String>,
}

/// Which outbound listeners are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Those that do not know whose they are.
    Shared,
    /// The others.
    Own,
}

fn resources(context: &Context<'_>, built: Vec<Built>) -> Vec<Resource> {
    // What is made from nothing else is made by the Sidecar, where there is one.
    let scope = context.proxy.scope.origin();
    built
        .into_iter()
        .map(|built| {
            let Built {
                listener, mut from, ..
            } = built;
            from.extend(scope.iter().cloned());
            Resource::new(listener.name.clone(), &listener, from)
        })
        .collect()
}

/// What all listeners of one proxy have in common.
#[derive(Debug)]
pub struct Context<'a> {
    pub mesh: &'a Mesh,
    pub proxy: &'a Proxy,
    pub env: Env<'a>,
}

impl<'a> Context<'a> {
    /// Works out the settings of a proxy.
    pub fn new(mesh: &'a Mesh, proxy: &'a Proxy) -> Context<'a> {
        Context {
            mesh,
            proxy,
            env: env_of(mesh, proxy),
        }
    }

    /// The client that rules of VirtualServices look at.
    pub fn client<'c>(&'c self, gateway: &'c str, port: u32) -> Client<'c> {
        Client {
            labels: &self.proxy.labels,
            namespace: self.proxy.namespace(),
            gateway,
            port,
        }
    }

    /// The rule of the proxy for calls of a host.
    pub fn rule(&self, hostname: &str) -> Option<&DestinationRule> {
        let rule = self
            .proxy
            .scope
            .destination_rule(true, &self.proxy.labels, hostname)?;
        Some(&rule.rule.spec)
    }

    /// What a visible service says about destinations that name it.
    pub fn destination_service(&self, hostname: &str) -> Option<DestinationService> {
        self.proxy
            .scope
            .service(hostname)
            .map(|s| destination_service(s))
    }

    /// How the proxy's clients may write a service's name.
    pub fn domain_style(&self) -> Style<'_> {
        Style {
            client_domain: &self.proxy.node.domain,
            port: None,
            absolute: self.env.compat.absolute_domains(),
        }
    }

    /// The statistics filters of TCP chains.
    pub fn tcp_stats(&self, class: Class) -> Vec<Filter> {
        if self.env.istio_filters {
            self.env.reports(class).tcp_stats.clone()
        } else {
            Vec::new()
        }
    }

    /// How long a listener waits for a client's first bytes; 0 is for ever.
    pub fn detection_timeout(&self) -> Option<Duration> {
        Some(
            self.env
                .mesh
                .protocol_detection_timeout
                .unwrap_or(NO_TIMEOUT),
        )
    }

    /// `MeshConfig.outboundClusterStatName` filled in; `None` where it is unset.
    pub fn stat_prefix(
        &self,
        service: Option<&Service>,
        host: &str,
        subset: &str,
        port: u32,
        port_name: &str,
    ) -> Option<String> {
        let pattern = &self.env.mesh.outbound_cluster_stat_name;
        let kubernetes = service
            .filter(|s| s.registry == Registry::Kubernetes)
            .map(|s| (s.name.clone(), s.namespace.clone()));
        fill(pattern, kubernetes.as_ref(), host, subset, port, port_name)
            .map(|s| s.replace("%TARGET_PORT%", "0"))
    }

    /// `MeshConfig.inboundClusterStatName` filled in; `None` where it is unset.
    pub fn inbound_stat_prefix(
        &self,
        kubernetes: Option<&(String, String)>,
        host: &str,
        port: u32,
        port_name: &str,
    ) -> Option<String> {
        fill(
            &self.env.mesh.inbound_cluster_stat_name,
            kubernetes,
            host,
            "",
            port,
            port_name,
        )
    }
}

/// What a service says about destinations that name it.
pub fn destination_service(service: &Service) -> DestinationService {
    DestinationService {
        only_port: match service.ports.as_slice() {
            [only] => Some(only.number),
            _ => None,
        },
        external_name: Some(service.external_name.clone()).filter(|n| !n.is_empty()),
    }
}

fn fill(
    pattern: &str,
    kubernetes: Option<&(String, String)>,
    host: &str,
    subset: &str,
    port: u32,
    port_name: &str,
) -> Option<String> {
    if pattern.is_empty() {
        return None;
    }
    let (short, name) = match kubernetes {
        Some((name, namespace)) => (format!("{name}.{namespace}"), name.clone()),
        None => (host.to_owned(), host.to_owned()),
    };
    let filled = pattern
        .replace("%SERVICE%", &short)
        .replace("%SERVICE_NAME%", &name)
        .replace("%SERVICE_FQDN%", host)
        .replace("%SUBSET_NAME%", subset)
        .replace("%SERVICE_PORT%", &port.to_string())
        .replace("%SERVICE_PORT_NAME%", port_name);
    Some(filled)
}

fn env_of<'a>(mesh: &'a Mesh, proxy: &'a Proxy) -> Env<'a> {
    static DEFAULT: std::sync::LazyLock<ProxyConfig> =
        std::sync::LazyLock::new(ProxyConfig::default);
    let node = &proxy.node;
    let config = mesh.config();
    // A node that sends its own ProxyConfig had the mesh's merged into it at injection.
    let proxy_config = node
        .proxy_config
        .as_ref()
        .or(config.default_config.as_ref())
        .unwrap_or(&DEFAULT);
    let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
    let text = |key: &str| node.meta(key).unwrap_or_default().to_owned();
    let is_gateway = proxy.is_router();
    Env {
        mesh: config,
        proxy_config,
        labels: &proxy.labels,
        namespace: proxy.namespace(),
        is_gateway,
        families: IpFamilies::of(addresses.iter().map(String::as_str)),
        interception: match node.interception {
            model::Interception::Redirect => Interception::Redirect,
            model::Interception::Tproxy => Interception::Tproxy,
            model::Interception::None => Interception::None,
        },
        http10: node.meta("HTTP10") == Some("1"),
        idle_timeout: node.meta("IDLE_TIMEOUT").and_then(go_duration),
        unprivileged: node.flag("UNPRIVILEGED_POD"),
        reserved: ReservedPorts(
            [
                "ENVOY_STATUS_PORT",
                "ENVOY_PROMETHEUS_PORT",
                "ENVOY_SECURE_METRICS_PORT",
                "ENVOY_SECURE_MERGED_METRICS_PORT",
            ]
            .iter()
            .filter_map(|key| node.number(key))
            .filter(|port| *port > 0)
            .collect(),
        ),
        exact_balance: node.flag("OUTBOUND_LISTENER_EXACT_BALANCE"),
        certificates: CertificateFiles {
            certificate_chain: text("TLS_SERVER_CERT_CHAIN"),
            private_key: text("TLS_SERVER_KEY"),
            root: text("TLS_SERVER_ROOT_CERT"),
        },
        istio_filters: node.has_istio_filters(),
        reports: telemetry::reports(mesh, proxy, proxy_config),
        enforcement: mesh.policies().of_proxy(mesh, proxy),
        headers: env::headers(proxy_config),
        connection_settings: env::connection_settings(proxy_config, config, is_gateway),
        internal_networks: internal_networks(mesh),
        compat: mesh.settings().compat,
    }
}

fn internal_networks(mesh: &Mesh) -> Vec<CidrRange> {
    let networks = mesh.snapshot().networks.networks.values();
    let mut out: Vec<IpNet> = networks
        .flat_map(|n| &n.endpoints)
        .filter_map(|e| match e.ne.as_ref()? {
            Ne::FromCidr(text) => text.parse().ok(),
            Ne::FromRegistry(_) => None,
        })
        .collect();
    out.sort();
    out.iter()
        .filter_map(|net| chain::range(&net.to_string()))
        .collect()
}

/// Go's form of a duration: `1h30m`, `1.5s`, `300ms`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * seconds;
        rest = tail;
    }
    let nanos = (total.fract() * 1e9).round() as i32;
    (!text.is_empty()).then_some(Duration {
        seconds: total as i64,
        nanos,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_go_s() {
        assert_eq!(
            go_duration("1m30s"),
            Some(Duration {
                seconds: 90,
                nanos: 0
            })
        );
        assert_eq!(
            go_duration("1.5s"),
            Some(Duration {
                seconds: 1,
                nanos: 500_000_000
            })
        );
        assert_eq!(go_duration("5"), None);
        assert_eq!(go_duration(""), None);
    }
}
