//! Clusters for the services that a proxy sees: one for each port, and one for each subset of each port.

use proto::{
    Duration, Value, any,
    envoy::{
        config::{
            cluster::v3::cluster::{
                DiscoveryType, DnsLookupFamily, LbConfig, LbPolicy, OriginalDstLbConfig,
            },
            core::v3::{HealthStatus, HealthStatusSet, TypedExtensionConfig},
            endpoint::v3::ClusterLoadAssignment,
        },
        extensions::network::dns_resolver::cares::v3::CaresDnsResolverConfig,
    },
    istio::networking::v1alpha3::{Subset, TrafficPolicy},
    prost_types::value::Kind,
};

use super::{
    draft::{Draft, passthrough_http, text},
    policy, tls,
};
use crate::{
    endpoint::{Asked, Source},
    envoy_filter,
    model::{
        MergedRule, Mesh, Origin, Port, Protocol, Proxy, Resolution, Resource, Service,
        destination_rule, kubernetes::keeps_sessions,
    },
    names::{self, BLACK_HOLE, PASSTHROUGH},
};

/// How much a DNS refresh may be early or late.
const DNS_JITTER: Duration = Duration {
    seconds: 0,
    nanos: 100_000_000,
};
/// After so many questions over one UDP port the resolver takes another.
const MAX_UDP_QUERIES: u32 = 100;

/// The clusters of services, then those for traffic to nowhere in particular.
pub fn outbound(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    let mut out = Vec::new();
    for service in &proxy.scope.services {
        of_service(mesh, proxy, service, false, &mut out);
    }
    out.push(black_hole(mesh));
    if proxy.is_router() {
        if passes_tls_on(mesh, proxy) {
            for service in proxy.scope.services.iter().filter(|s| !s.mesh_external) {
                of_service(mesh, proxy, service, true, &mut out);
            }
        }
    } else {
        out.push(passthrough(mesh, proxy, PASSTHROUGH).finish(Vec::new()));
    }
    envoy_filter::clusters(mesh, proxy, envoy_filter::outbound_context(proxy), out)
}

/// What all clusters of one port have in common.
struct Group<'a> {
    mesh: &'a Mesh,
    proxy: &'a Proxy,
    service: &'a Service,
    port: &'a Port,
    rule: Option<&'a MergedRule>,
    accounts: &'a [String],
    /// Clusters of a gateway that passes TLS on by SNI: named so, and without TLS of their own.
    by_sni: bool,
    from: Vec<Origin>,
}

fn of_service(
    mesh: &Mesh,
    proxy: &Proxy,
    service: &Service,
    by_sni: bool,
    out: &mut Vec<Resource>,
) {
    match service.resolution {
        Resolution::Alias => return,
        Resolution::DynamicDns => {
            tracing::warn!(
                "{}: resolution DYNAMIC_DNS is not supported yet; no cluster is made",
                service.origin
            );
            return;
        }
        _ => {}
    }
    let rule = proxy
        .scope
        .destination_rule(true, &proxy.labels, &service.hostname);
    let accounts = mesh.service_accounts(service);
    let mut from = vec![service.origin.clone()];
    from.extend(rule.into_iter().flat_map(|r| r.from.iter().cloned()));
    for port in service.ports.iter().filter(|p| p.protocol != Protocol::Udp) {
        let group = Group {
            mesh,
            proxy,
            service,
            port,
            rule,
            accounts: &accounts,
            by_sni,
            from: from.clone(),
        };
        let spec = rule.map(|r| &r.rule.spec);
        let whole = spec.and_then(|r| r.traffic_policy.as_ref());
        let (own, _) = destination_rule::port_policy(whole, port.number);
        let own = policy::with_mesh_defaults(mesh.config(), own.map(std::borrow::Cow::into_owned));
        let Some(cluster) = group.cluster(None, own.as_ref()) else {
            continue;
        };
        out.push(cluster);
        for subset in spec.into_iter().flat_map(|r| &r.subsets) {
            let policy = destination_rule::subset_policy(
                own.as_ref(),
                subset.traffic_policy.as_ref(),
                port.number,
            );
            out.extend(group.cluster(Some(subset), policy.as_ref()));
        }
    }
}

impl Group<'_> {
    fn name(&self, subset: &str) -> String {
        let (number, host) = (self.port.number, &self.service.hostname);
        if self.by_sni {
            names::sni_cluster(number, subset, host)
        } else {
            names::outbound_cluster(number, subset, host)
        }
    }

    /// The cluster of the port, or of one of its subsets. `None` where it would have no endpoint that it needs.
    fn cluster(&self, subset: Option<&Subset>, rule: Option<&TrafficPolicy>) -> Option<Resource> {
        let subset_name = subset.map_or("", |s| s.name.as_str());
        let name = self.name(subset_name);
        let own_passthrough =
            subset.is_some_and(|s| policy::is_passthrough(s.traffic_policy.as_ref()));
        let kind = if own_passthrough {
            DiscoveryType::OriginalDst
        } else {
            self.discovery()
        };
        let mut draft = Draft::new(&name, kind);
        let asked = Asked {
            host: &self.service.hostname,
            port: self.port.number,
            subset: subset_name,
            mesh_tls_only: false,
        };
        let mut source = None;
        match kind {
            DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
                self.set_dns(&mut draft);
                let found = Source::new(self.mesh, self.proxy, self.service, asked)?;
                let places = found.places();
                if places.is_empty() {
                    tracing::debug!(
                        "{}: cluster {name} has no endpoint and is left out",
                        self.service.origin
                    );
                    return None;
                }
                draft.cluster.load_assignment = Some(ClusterLoadAssignment {
                    cluster_name: name.clone(),
                    endpoints: places.iter().map(|p| p.lb.clone()).collect(),
                    ..ClusterLoadAssignment::default()
                });
                source = Some((found, places));
            }
            DiscoveryType::OriginalDst => {
                if let Some(port) = self.service.passthrough_ports.get(&self.port.number) {
                    draft.cluster.lb_config =
                        Some(LbConfig::OriginalDstLbConfig(OriginalDstLbConfig {
                            upstream_port_override: Some(*port),
                            ..OriginalDstLbConfig::default()
                        }));
                }
            }
            _ => {}
        }
        draft.set_protocol(self.mesh, self.proxy, self.port);
        draft.set_services([self.service]);
        self.set_stat_name(&mut draft, subset_name);
        if subset.is_none() && keeps_sessions(&self.service.labels) {
            draft
                .cluster
                .common_lb_config
                .get_or_insert_default()
                .override_host_status = Some(HealthStatusSet {
                statuses: [
                    HealthStatus::Healthy,
                    HealthStatus::Draining,
                    HealthStatus::Unknown,
                    HealthStatus::Degraded,
                ]
                .map(i32::from)
                .to_vec(),
            });
        }
        self.apply(&mut draft, subset, rule, source);
        if draft.is(DiscoveryType::Eds) {
            draft.use_eds();
        }
        draft.add_metadata_exchange(self.proxy);
        if self.service.mesh_external && subset.is_none() {
            draft.istio_metadata().insert(
                "external".to_owned(),
                Value {
                    kind: Some(Kind::BoolValue(true)),
                },
            );
        }
        if let Some(found) = self.rule {
            draft.set_rule(found);
            if subset.is_some() {
                draft
                    .istio_metadata()
                    .insert("subset".to_owned(), text(subset_name));
            }
            tls::mark_own_alpn(&mut draft, rule.and_then(|p| p.tls.as_ref()));
        }
        Some(draft.finish(self.from.clone()))
    }

    fn apply(
        &self,
        draft: &mut Draft,
        subset: Option<&Subset>,
        rule: Option<&TrafficPolicy>,
        source: Option<(Source<'_>, Vec<crate::endpoint::Place>)>,
    ) {
        let mesh = self.mesh.config();
        let pool = rule.and_then(|p| p.connection_pool.as_ref());
        policy::upgrade(draft, mesh, self.port, pool);
        policy::connection_pool(
            draft,
            mesh,
            pool,
            rule.and_then(|p| p.retry_budget.as_ref()),
        );
        policy::outliers(
            draft,
            self.service,
            rule.and_then(|p| p.outlier_detection.as_ref()),
        );
        let setting = policy::load_balancer(
            draft,
            mesh,
            self.service,
            rule.and_then(|p| p.load_balancer.as_ref()),
        );
        if let (Some((source, places)), true) = (source, draft.cluster.load_assignment.is_some()) {
            let name = draft.cluster.name.clone();
            draft.cluster.load_assignment = {
                let outliers = draft.cluster.outlier_detection.is_some();
                Some(source.assign(&name, places, setting.as_ref(), outliers))
            };
        }
        if !self.by_sni {
            // Whether callers are passed on is looked up in the block as written, before ports and subsets merge.
            let written = match subset {
                Some(subset) => subset.traffic_policy.as_ref(),
                None => self.rule.and_then(|r| r.rule.spec.traffic_policy.as_ref()),
            };
            let sni = names::sni_cluster(
                self.port.number,
                subset.map_or("", |s| &s.name),
                &self.service.hostname,
            );
            let peer = tls::Peer {
                service: self.service,
                protocol: self.port.protocol,
                accounts: self.accounts,
                sni: &sni,
                server: self.mesh.server_mtls(
                    self.service,
                    self.port.number,
                    policy::is_passthrough(written),
                ),
                selected: self.rule.is_some_and(|r| r.selector().is_some()),
            };
            tls::apply(
                draft,
                self.mesh,
                self.proxy,
                rule.and_then(|p| p.tls.as_ref()),
                peer,
            );
            tls::proxy_protocol(draft, rule.and_then(|p| p.proxy_protocol.as_ref()));
        }
        if draft.is(DiscoveryType::OriginalDst) {
            draft.set_lb(LbPolicy::ClusterProvided);
        }
    }

    fn discovery(&self) -> DiscoveryType {
        match self.service.resolution {
            Resolution::Dns if self.service.dns_race_connect => DiscoveryType::LogicalDns,
            Resolution::Dns => DiscoveryType::StrictDns,
            Resolution::DnsRoundRobin => DiscoveryType::LogicalDns,
            Resolution::Passthrough if !self.proxy.is_router() => DiscoveryType::OriginalDst,
            _ => DiscoveryType::Eds,
        }
    }

    #[allow(deprecated)] // The fields that Istio writes, and that old proxies know.
    fn set_dns(&self, draft: &mut Draft) {
        let cluster = &mut draft.cluster;
        let family = if self.service.dns_race_connect {
            DnsLookupFamily::All
        } else if self.proxy.supports_v4() {
            DnsLookupFamily::V4Only
        } else {
            DnsLookupFamily::V6Only
        };
        cluster.dns_lookup_family = family.into();
        cluster.typed_dns_resolver_config = Some(TypedExtensionConfig {
            name: "envoy.network.dns_resolver.cares".to_owned(),
            typed_config: Some(any::pack(&CaresDnsResolverConfig {
                udp_max_queries: Some(MAX_UDP_QUERIES),
                ..CaresDnsResolverConfig::default()
            })),
        });
        cluster.dns_jitter = Some(DNS_JITTER);
        cluster.dns_refresh_rate = self.mesh.config().dns_refresh_rate;
        cluster.respect_dns_ttl = true;
    }

    fn set_stat_name(&self, draft: &mut Draft, subset: &str) {
        let pattern = &self.mesh.config().outbound_cluster_stat_name;
        if !pattern.is_empty() {
            draft.cluster.alt_stat_name = stat_name(pattern, self.service, subset, self.port, 0);
        }
    }
}

/// A cluster's name in statistics by MeshConfig's pattern.
pub(super) fn stat_name(
    pattern: &str,
    service: &Service,
    subset: &str,
    port: &Port,
    target: u32,
) -> String {
    let name = match service.registry {
        crate::model::Registry::Kubernetes => &service.name,
        crate::model::Registry::External => &service.hostname,
    };
    let mut out = pattern
        .replace("%SERVICE%", &service.short_host())
        .replace("%SERVICE_NAME%", name)
        .replace("%SERVICE_FQDN%", &service.hostname)
        .replace("%SUBSET_NAME%", subset)
        .replace("%TARGET_PORT%", &target.to_string())
        .replace("%SERVICE_PORT%", &port.number.to_string())
        .replace("%SERVICE_PORT_NAME%", &port.name);
    out.push(';');
    out
}

/// The cluster that passes everything on to where it was going.
pub(super) fn passthrough(mesh: &Mesh, proxy: &Proxy, name: &str) -> Draft {
    let mut draft = Draft::new(name, DiscoveryType::OriginalDst);
    draft.cluster.alt_stat_name = format!("{PASSTHROUGH};");
    draft.cluster.common_lb_config = None;
    draft.set_lb(LbPolicy::ClusterProvided);
    draft.http = Some(passthrough_http(mesh, proxy));
    let config = mesh.config();
    let defaults = config
        .default_traffic_policy
        .as_ref()
        .and_then(|p| p.connection_pool.as_ref());
    // The five idle minutes stay: the mesh's limits come without their HTTP options here.
    let http = draft.http.clone();
    policy::connection_pool(&mut draft, config, defaults, None);
    draft.http = http;
    if name == PASSTHROUGH {
        draft.add_metadata_exchange(proxy);
    }
    draft
}

fn black_hole(mesh: &Mesh) -> Resource {
    let mut draft = Draft::new(BLACK_HOLE, DiscoveryType::Static);
    draft.cluster.common_lb_config = None;
    draft.cluster.connect_timeout = mesh.config().connect_timeout;
    draft.finish(Vec::new())
}

/// Whether some Gateway of the proxy hands TLS on by the cluster that its SNI names.
fn passes_tls_on(mesh: &Mesh, proxy: &Proxy) -> bool {
    use proto::istio::networking::v1alpha3::server_tls_settings::TlSmode;
    mesh.gateways_of(proxy)
        .flat_map(|g| &g.object.spec.servers)
        .any(|s| {
            s.tls
                .as_ref()
                .is_some_and(|t| t.mode() == TlSmode::AutoPassthrough)
        })
}
