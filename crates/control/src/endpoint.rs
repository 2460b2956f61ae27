//! EDS: the endpoints of a cluster, by place, with weights, health, and the failover that a proxy at another place
//! has.

mod failover;
mod locality;

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    Struct, Value,
    envoy::config::{
        core::v3::{
            Address, HealthStatus, Metadata, Pipe, SocketAddress, address,
            socket_address::PortSpecifier,
        },
        endpoint::v3::{
            ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints,
            lb_endpoint::HostIdentifier,
        },
    },
    istio::networking::v1alpha3::{TrafficPolicy, client_tls_settings::TlSmode},
    prost_types::value::Kind,
};

pub(crate) use failover::{LbSetting, lb_setting};

use crate::{
    model::{
        Endpoint, Health, Labels, MergedRule, Mesh, MtlsMode, Origin, Protocol, Proxy, Registry,
        Resource, Service, destination_rule::subset_policy, endpoint::canonical_service,
        kubernetes::keeps_sessions, proxy::locality_from_text, service::TrafficDistribution,
    },
    names, weights,
};

/// Label of a workload that is to get no new sessions.
const DRAINING_LABEL: &str = "istio.io/draining";

/// The assignments for the named clusters, each name once, in the order asked. A name that means nothing gets an
/// empty assignment: the proxy waits for every name that it asked for.
pub fn build<'a>(
    mesh: &Mesh,
    proxy: &Proxy,
    names: impl IntoIterator<Item = &'a str>,
) -> Vec<Resource> {
    names
        .into_iter()
        .map(|name| assignment(mesh, proxy, name))
        .collect()
}

/// The assignment for one cluster.
pub fn assignment(mesh: &Mesh, proxy: &Proxy, name: &str) -> Resource {
    let empty = ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        ..ClusterLoadAssignment::default()
    };
    let Some(asked) = Asked::parse(name) else {
        return Resource::new(name, &empty, Vec::new());
    };
    let Some(service) = proxy.scope.service(asked.host) else {
        return Resource::new(name, &empty, Vec::new());
    };
    let mut from = vec![service.origin.clone()];
    let Some(source) = Source::new(mesh, proxy, service, asked) else {
        return Resource::new(name, &empty, from);
    };
    from.extend(source.origins());
    // What DNS resolves stands in the cluster itself.
    if source.is_dns() {
        return Resource::new(name, &empty, from);
    }
    let places = source.places();
    let assignment = source.assign(
        name,
        places,
        source.setting().as_ref(),
        source.finds_outliers(),
    );
    Resource::new(name, &assignment, from)
}

/// A cluster's name taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub host: &'a str,
    pub port: u32,
    pub subset: &'a str,
    /// Only endpoints with Istio's mutual TLS (the clusters of gateways that pass TLS on by SNI).
    pub mesh_tls_only: bool,
}

impl<'a> Asked<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        if let Some(rest) = name.strip_prefix("outbound_.") {
            let mut parts = rest.splitn(3, "_.");
            let (port, subset, host) = (parts.next()?, parts.next()?, parts.next()?);
            return Some(Self {
                host,
                port: port.parse().ok()?,
                subset,
                mesh_tls_only: true,
            });
        }
        let parsed = names::parse_cluster(name).filter(|c| c.direction == "outbound")?;
        Some(Self {
            host: parsed.host,
            port: parsed.port,
            subset: parsed.subset,
            mesh_tls_only: false,
        })
    }
}

/// Everything that the endpoints of one cluster depend on.
pub(crate) struct Source<'a> {
    mesh: &'a Mesh,
    proxy: &'a Proxy,
    service: &'a Service,
    asked: Asked<'a>,
    rule: Option<&'a MergedRule>,
    policy: Option<TrafficPolicy>,
    /// Labels that the subset asks for.
    labels: Labels,
    /// Mutual TLS as the rule says it; `None` where it says nothing.
    rule_tls: Option<TlSmode>,
    send_unhealthy: bool,
}

/// The endpoints of one place, and what they were made from.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub lb: LocalityLbEndpoints,
    pub labels: Vec<std::sync::Arc<Labels>>,
}

impl<'a> Source<'a> {
    /// `None` where the service has no such port.
    pub(crate) fn new(
        mesh: &'a Mesh,
        proxy: &'a Proxy,
        service: &'a Service,
        asked: Asked<'a>,
    ) -> Option<Self> {
        service.port(asked.port)?;
        let rule = proxy
            .scope
            .destination_rule(true, &proxy.labels, &service.hostname);
        let spec = rule.map(|r| &r.rule.spec);
        let subset = spec.and_then(|r| r.subsets.iter().find(|s| s.name == asked.subset));
        let policy = subset_policy(
            spec.and_then(|r| r.traffic_policy.as_ref()),
            subset.and_then(|s| s.traffic_policy.as_ref()),
            asked.port,
        );
        let tls_of = |policy: Option<&TrafficPolicy>| tls_mode(policy?, asked.port);
        let whole = || tls_of(spec.and_then(|r| r.traffic_policy.as_ref()));
        let rule_tls = match (asked.subset, subset) {
            ("", _) => whole(),
            (_, Some(subset)) => tls_of(subset.traffic_policy.as_ref()).or_else(whole),
            (_, None) => None,
        };
        let min_health = policy
            .as_ref()
            .and_then(|p| p.outlier_detection.as_ref())
            .map_or(0, |o| o.min_health_percent);
        let send_unhealthy =
            service.traffic_distribution != TrafficDistribution::Any || min_health <= 0;
        let labels = if asked.subset.is_empty() {
            Labels::new()
        } else {
            subset.map(|s| s.labels.clone()).unwrap_or_default()
        };
        Some(Self {
            mesh,
            proxy,
            service,
            asked,
            rule,
            policy,
            labels,
            rule_tls,
            send_unhealthy,
        })
    }

    /// The rules that had a say.
    pub(crate) fn origins(&self) -> Vec<Origin> {
        self.rule.map(|r| r.from.clone()).unwrap_or_default()
    }

    fn is_dns(&self) -> bool {
        use crate::model::Resolution::{Dns, DnsRoundRobin};
        matches!(self.service.resolution, Dns | DnsRoundRobin)
    }

    /// How load is spread over places, as rule, service and mesh say together.
    pub(crate) fn setting(&self) -> Option<LbSetting> {
        let lb = self.policy.as_ref().and_then(|p| p.load_balancer.as_ref());
        lb_setting(self.mesh.config(), lb, self.service)
    }

    /// The endpoints by place, sorted by its name; each place with the sum of its weights.
    pub(crate) fn places(&self) -> Vec<Place> {
        let mut places: BTreeMap<&str, Place> = BTreeMap::new();
        for endpoint in self.mesh.endpoints(self.service, self.asked.port) {
            if !self.wants(endpoint) {
                continue;
            }
            let mtls = self.mtls(endpoint);
            if self.asked.mesh_tls_only && !mtls {
                continue;
            }
            let place = places.entry(&endpoint.locality).or_insert_with(|| Place {
                lb: LocalityLbEndpoints {
                    locality: Some(locality_from_text(&endpoint.locality)),
                    load_balancing_weight: Some(0),
                    ..LocalityLbEndpoints::default()
                },
                labels: Vec::new(),
            });
            place.lb.lb_endpoints.push(self.lb_endpoint(endpoint, mtls));
            place.lb.load_balancing_weight = place
                .lb
                .load_balancing_weight
                .map(|w| w.saturating_add(endpoint.weight()));
            place.labels.push(endpoint.labels.clone());
        }
        places.into_values().collect()
    }

    /// Whether the rule takes bad endpoints out of use.
    fn finds_outliers(&self) -> bool {
        self.policy
            .as_ref()
            .is_some_and(|p| p.outlier_detection.is_some())
    }

    /// The assignment, with weights and priorities for a proxy at its place. `outliers`: bad endpoints are found out.
    pub(crate) fn assign(
        &self,
        name: &str,
        places: Vec<Place>,
        setting: Option<&LbSetting>,
        outliers: bool,
    ) -> ClusterLoadAssignment {
        let mut endpoints = match setting {
            Some(setting) => failover::apply(setting, places, self.proxy, outliers),
            None => places.into_iter().map(|p| p.lb).collect(),
        };
        for place in &mut endpoints {
            weights::fit(&mut place.lb_endpoints, |e| {
                e.load_balancing_weight.as_mut()
            });
        }
        let priorities: BTreeSet<u32> = endpoints.iter().map(|p| p.priority).collect();
        for priority in priorities {
            weights::fit(&mut endpoints, |place| {
                let weight = place.load_balancing_weight.as_mut();
                weight.filter(|_| place.priority == priority)
            });
        }
        ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints,
            ..ClusterLoadAssignment::default()
        }
    }

    fn wants(&self, endpoint: &Endpoint) -> bool {
        if self.service.node_local
            && Some(endpoint.node_name.as_str()) != self.proxy.node.meta("NODE_NAME")
        {
            return false;
        }
        let health_fits = match health_of(endpoint) {
            Health::Unknown | Health::Healthy => true,
            Health::Unhealthy => self.send_unhealthy,
            Health::Draining => keeps_sessions(&self.service.labels),
            Health::Terminating => false,
        };
        // EDS carries addresses only; a name can be resolved by a DNS cluster alone.
        let usable = self.is_dns()
            || endpoint.port == 0
            || endpoint.address.parse::<std::net::IpAddr>().is_ok();
        health_fits && usable && config::labels_match(&self.labels, &endpoint.labels)
    }

    /// Whether the proxy is to use mutual TLS to the endpoint.
    fn mtls(&self, endpoint: &Endpoint) -> bool {
        if let Some(mode) = self.rule_tls {
            return mode == TlSmode::IstioMutual;
        }
        endpoint.is_mesh_tls()
            && self
                .mesh
                .peer_authentications()
                .workload(&endpoint.namespace, &endpoint.labels)
                .port(endpoint.port)
                != MtlsMode::Disable
    }

    fn lb_endpoint(&self, endpoint: &Endpoint, mtls: bool) -> LbEndpoint {
        let mut metadata = Metadata::default();
        if mtls && !endpoint.tls_mode.is_empty() && endpoint.tls_mode != "disabled" {
            metadata.filter_metadata.insert(
                "envoy.transport_socket_match".to_owned(),
                text_struct("tlsMode", &endpoint.tls_mode),
            );
        }
        let (name, revision) = canonical_service(&endpoint.labels, &endpoint.workload_name);
        let revision = if revision == "latest" { "" } else { revision };
        let workload = format!(
            "{};{};{name};{revision};{}",
            endpoint.workload_name,
            endpoint.namespace,
            self.mesh.cluster_id()
        );
        metadata
            .filter_metadata
            .insert("istio".to_owned(), text_struct("workload", &workload));
        let health = match health_of(endpoint) {
            Health::Unknown => HealthStatus::Unknown,
            Health::Healthy => HealthStatus::Healthy,
            Health::Unhealthy => HealthStatus::Unhealthy,
            Health::Draining => HealthStatus::Draining,
            Health::Terminating => HealthStatus::Timeout,
        };
        LbEndpoint {
            health_status: health.into(),
            load_balancing_weight: Some(endpoint.weight()),
            metadata: Some(metadata),
            host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
                address: Some(address(&endpoint.address, endpoint.port)),
                ..EnvoyEndpoint::default()
            })),
        }
    }
}

/// The clusters of a proxy that ask for endpoints by EDS: every port and subset of its services.
pub fn cluster_names(proxy: &Proxy) -> Vec<String> {
    use crate::model::Resolution;
    let mut out = Vec::new();
    for service in &proxy.scope.services {
        let eds = match service.resolution {
            Resolution::ClientSide => true,
            Resolution::Passthrough => {
                proxy.is_router() && service.registry == Registry::Kubernetes
            }
            _ => false,
        };
        if !eds {
            continue;
        }
        let rule = proxy
            .scope
            .destination_rule(true, &proxy.labels, &service.hostname);
        let subsets = rule
            .into_iter()
            .flat_map(|r| &r.rule.spec.subsets)
            .map(|s| s.name.as_str());
        for port in service.ports.iter().filter(|p| p.protocol != Protocol::Udp) {
            for subset in std::iter::once("").chain(subsets.clone()) {
                out.push(names::outbound_cluster(
                    port.number,
                    subset,
                    &service.hostname,
                ));
            }
        }
    }
    out
}

/// An address and port as Envoy writes it; port 0 means that the text is the path of a unix socket.
pub(crate) fn address(text: &str, port: u32) -> Address {
    let pipe = text.starts_with('/') || text.starts_with('@') || text.starts_with("unix://");
    let address = if pipe {
        let path = text.strip_prefix("unix://").unwrap_or(text).to_owned();
        address::Address::Pipe(Pipe {
            path,
            ..Pipe::default()
        })
    } else {
        address::Address::SocketAddress(SocketAddress {
            address: text.to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(port)),
            ..SocketAddress::default()
        })
    };
    Address {
        address: Some(address),
    }
}

/// A struct of one text.
pub(crate) fn text_struct(key: &str, text: &str) -> Struct {
    let value = Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    Struct {
        fields: BTreeMap::from([(key.to_owned(), value)]),
    }
}

/// A workload that is labelled as draining counts as such whatever its readiness.
fn health_of(endpoint: &Endpoint) -> Health {
    let labelled = endpoint
        .labels
        .get(DRAINING_LABEL)
        .is_some_and(|v| !v.is_empty());
    if labelled {
        Health::Draining
    } else {
        endpoint.health
    }
}

/// The TLS mode that a policy sets for a port: the port's own, else the policy's.
fn tls_mode(policy: &TrafficPolicy, port: u32) -> Option<TlSmode> {
    let own = policy
        .port_level_settings
        .iter()
        .filter(|p| p.port.as_ref().is_some_and(|n| n.number == port))
        .find_map(|p| p.tls.as_ref());
    own.or(policy.tls.as_ref()).map(|t| t.mode())
}
