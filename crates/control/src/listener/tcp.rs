//! Network filters and chains of traffic that is not HTTP: by VirtualService where one speaks of it, else straight to
//! the service.

use config::Object;
use proto::{
    any,
    envoy::{
        config::listener::v3::Filter,
        extensions::filters::network::{
            mongo_proxy::v3::MongoProxy,
            tcp_proxy::v3::{
                TcpProxy,
                tcp_proxy::{ClusterSpecifier, TunnelingConfig, WeightedCluster, weighted_cluster},
            },
        },
        r#type::v3::{HashPolicy, hash_policy},
    },
    istio::networking::v1alpha3::{
        DestinationRule, RouteDestination, TrafficPolicy,
        load_balancer_settings::{LbPolicy, consistent_hash_lb::HashKey},
    },
};

use super::{
    Context,
    chain::{Chain, Traffic},
    env::Env,
    filters,
    settings::Class,
};
use crate::{
    model::{Port, Protocol, Resolution, Routes, Service, host},
    names,
    route::Client,
    weights,
};

/// Name of the filter.
pub const TCP_PROXY: &str = "envoy.filters.network.tcp_proxy";

/// A `tcp_proxy` to one cluster, under the cluster's name.
pub fn to_cluster(env: &Env<'_>, class: Class, cluster: &str, logged: bool) -> Filter {
    let config = TcpProxy {
        stat_prefix: cluster.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        idle_timeout: if logged { env.idle_timeout } else { None },
        access_log: if logged {
            env.tcp_logs(class)
        } else {
            Vec::new()
        },
        ..Default::default()
    };
    filters::network(TCP_PROXY, any::pack(&config))
}

/// Where a chain of TCP traffic ends.
#[derive(Debug)]
pub struct Target<'a> {
    /// Whether it can only be reached by a proxy of the listener's own side.
    pub class: Class,
    /// The protocol of the listener's port.
    pub protocol: Protocol,
    /// Whether peers exchange metadata first (mutual TLS terminated at a gateway).
    pub exchange: bool,
    /// Whether the policies of the proxy's workload judge what comes here.
    pub judged: bool,
    /// The rule of the destination's service.
    pub rule: Option<&'a DestinationRule>,
}

impl Target<'_> {
    /// Filters that lead to one cluster. `tunnels` is off where the SNI alone decides.
    pub fn single(
        &self,
        env: &Env<'_>,
        cluster: &str,
        stat_prefix: &str,
        subset: &str,
        tunnels: bool,
    ) -> Vec<Filter> {
        let mut config = self.tcp_proxy(env, stat_prefix, subset);
        config.cluster_specifier = Some(ClusterSpecifier::Cluster(cluster.to_owned()));
        if tunnels {
            config.tunneling_config = tunnel(self.rule, subset);
        }
        self.stack(env, stat_prefix, &config)
    }

    /// Filters that share connections out among clusters.
    pub fn weighted(
        &self,
        env: &Env<'_>,
        mut clusters: Vec<(String, u32)>,
        stat_prefix: &str,
    ) -> Vec<Filter> {
        weights::fit(&mut clusters, |(_, weight)| Some(weight));
        let mut config = self.tcp_proxy(env, stat_prefix, "");
        config.tunneling_config = tunnel(self.rule, "");
        config.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters: clusters
                .into_iter()
                .map(|(name, weight)| weighted_cluster::ClusterWeight {
                    name,
                    weight,
                    ..Default::default()
                })
                .collect(),
        }));
        self.stack(env, stat_prefix, &config)
    }

    fn tcp_proxy(&self, env: &Env<'_>, stat_prefix: &str, subset: &str) -> TcpProxy {
        let settings = self
            .rule
            .and_then(|r| r.traffic_policy.as_ref())
            .and_then(|p| p.connection_pool.as_ref())
            .and_then(|p| p.tcp.as_ref());
        TcpProxy {
            stat_prefix: stat_prefix.to_owned(),
            idle_timeout: settings.and_then(|t| t.idle_timeout).or(env.idle_timeout),
            max_downstream_connection_duration: settings.and_then(|t| t.max_connection_duration),
            hash_policy: hash_policy(self.rule, subset),
            access_log: env.tcp_logs(self.class),
            ..Default::default()
        }
    }

    fn stack(&self, env: &Env<'_>, stat_prefix: &str, config: &TcpProxy) -> Vec<Filter> {
        let mut out = Vec::new();
        if self.exchange && env.istio_filters {
            out.push(filters::tcp_metadata_exchange());
        }
        if self.judged
            && let Some(enforcement) = env.enforcement(self.class)
        {
            out.extend(enforcement.tcp.iter().cloned());
        }
        if env.istio_filters {
            out.extend(env.reports(self.class).tcp_stats.iter().cloned());
        }
        if self.protocol == Protocol::Mongo {
            out.push(mongo(stat_prefix));
        }
        out.push(filters::network(TCP_PROXY, any::pack(config)));
        out
    }
}

/// Counts MongoDB's operations in front of the `tcp_proxy`.
pub fn mongo(stat_prefix: &str) -> Filter {
    let config = MongoProxy {
        stat_prefix: stat_prefix.to_owned(),
        ..Default::default()
    };
    filters::network("envoy.filters.network.mongo_proxy", any::pack(&config))
}

/// What an outbound TCP listener is built for.
#[derive(Debug, Clone)]
pub struct Outbound<'a> {
    pub service: &'a Service,
    pub port: &'a Port,
    /// The address that the listener is bound to.
    pub bind: String,
    /// Networks that the chains are for, where the listener's own address does not tell.
    pub destinations: Vec<String>,
    pub virtual_services: &'a [std::sync::Arc<Routes>],
}

impl Outbound<'_> {
    /// The chains, and the VirtualServices that had a say.
    pub fn chains(&self, context: &Context<'_>) -> (Vec<Chain>, Vec<crate::model::Origin>) {
        let routes: Vec<&Routes> = self
            .virtual_services
            .iter()
            .map(|r| &**r)
            .filter(|r| {
                r.spec()
                    .hosts
                    .iter()
                    .any(|h| host::matches(h, &self.service.hostname))
            })
            .collect();
        let mut from = Vec::new();
        let chains = if self.port.protocol.is_tls() {
            self.tls_chains(context, &routes, &mut from)
        } else {
            self.tcp_chains(context, &routes, &mut from)
        };
        (chains, from)
    }

    fn client<'c>(&self, context: &'c Context<'_>) -> Client<'c> {
        context.client(crate::model::MESH, self.port.number)
    }

    fn tls_chains(
        &self,
        context: &Context<'_>,
        routes: &[&Routes],
        from: &mut Vec<crate::model::Origin>,
    ) -> Vec<Chain> {
        let client = self.client(context);
        let mut out = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        // A match with subnets sets those of the following ones too, as in Istio.
        let mut destinations = self.destinations.clone();
        for r in routes {
            for tls in r.spec().tls.iter().filter(|t| !t.route.is_empty()) {
                for m in &tls.r#match {
                    if !client.can_match_l4(
                        m.port,
                        &m.gateways,
                        &m.source_labels,
                        &m.source_namespace,
                    ) {
                        continue;
                    }
                    if !m.destination_subnets.is_empty() && self.port.number > 0 {
                        destinations = m.destination_subnets.clone();
                    }
                    if !seen.insert((m.sni_hosts.clone(), m.destination_subnets.clone())) {
                        continue;
                    }
                    from.extend(r.from.iter().cloned());
                    let filters =
                        context.routed(&tls.route, self.port, &r.object, Class::Outbound, false);
                    out.push(Chain {
                        server_names: m.sni_hosts.clone(),
                        destinations: destinations.clone(),
                        metadata: Some(names::config_metadata(
                            names::NETWORKING,
                            "virtual-service",
                            r.namespace(),
                            r.name(),
                        )),
                        ..Chain::of(Traffic::Network(filters))
                    });
                }
            }
        }
        if out.is_empty() {
            out.push(Chain {
                server_names: self.own_server_names(context, &destinations),
                destinations,
                ..Chain::of(Traffic::Network(self.to_service(context)))
            });
        }
        out
    }

    fn tcp_chains(
        &self,
        context: &Context<'_>,
        routes: &[&Routes],
        from: &mut Vec<crate::model::Origin>,
    ) -> Vec<Chain> {
        let client = self.client(context);
        let mut out = Vec::new();
        for r in routes {
            for tcp in r.spec().tcp.iter().filter(|t| !t.route.is_empty()) {
                let matching: Vec<_> = tcp
                    .r#match
                    .iter()
                    .filter(|m| {
                        client.can_match_l4(
                            m.port,
                            &m.gateways,
                            &m.source_labels,
                            &m.source_namespace,
                        )
                    })
                    .collect();
                if !tcp.r#match.is_empty() && matching.is_empty() {
                    continue;
                }
                from.extend(r.from.iter().cloned());
                let filters =
                    context.routed(&tcp.route, self.port, &r.object, Class::Outbound, false);
                let everything = tcp.r#match.is_empty()
                    || self.port.number == 0
                    || matching.iter().any(|m| m.destination_subnets.is_empty());
                if everything {
                    // Subnets of matches in front of the one for everything are lost with it.
                    out.push(Chain {
                        destinations: self.destinations.clone(),
                        metadata: Some(names::config_metadata(
                            names::NETWORKING,
                            "virtual-service",
                            r.namespace(),
                            r.name(),
                        )),
                        ..Chain::of(Traffic::Network(filters))
                    });
                    return out;
                }
                let mut subnets: Vec<String> = matching
                    .iter()
                    .flat_map(|m| m.destination_subnets.iter().cloned())
                    .collect();
                subnets.sort();
                let mut own = self.destinations.clone();
                own.sort();
                let same = subnets == own;
                out.push(Chain {
                    destinations: subnets,
                    ..Chain::of(Traffic::Network(filters))
                });
                if same {
                    return out;
                }
            }
        }
        out.push(Chain {
            destinations: self.destinations.clone(),
            ..Chain::of(Traffic::Network(self.to_service(context)))
        });
        out
    }

    /// Straight to the service.
    fn to_service(&self, context: &Context<'_>) -> Vec<Filter> {
        let port = match self.service.ports.as_slice() {
            [only] => only.number,
            _ => self.port.number,
        };
        let cluster = names::outbound_cluster(port, "", &self.service.hostname);
        let stat_prefix = context
            .stat_prefix(Some(self.service), &self.service.hostname, "", port, "")
            .unwrap_or_else(|| cluster.clone());
        Target {
            class: Class::Outbound,
            protocol: self.port.protocol,
            exchange: false,
            judged: false,
            rule: context.rule(&self.service.hostname),
        }
        .single(&context.env, &cluster, &stat_prefix, "", true)
    }

    /// SNI is asked for only where the address alone does not lead to the service.
    fn own_server_names(&self, context: &Context<'_>, destinations: &[String]) -> Vec<String> {
        let wildcard = context.env.families.wildcard();
        let mut address = self.service.address_for(context.proxy);
        if address.contains('/') {
            address.clear();
        }
        if address == crate::model::service::UNSPECIFIED && wildcard == "::" {
            address = wildcard.to_owned();
        }
        let ambiguous = !destinations.is_empty()
            || address.is_empty()
            || (address == wildcard && self.bind == wildcard)
            || (host::is_wildcard(&self.service.hostname)
                && self.service.resolution == Resolution::DynamicDns);
        if !ambiguous {
            return Vec::new();
        }
        let style = context.domain_style();
        let aliases = self
            .service
            .aliases
            .iter()
            .flat_map(|(_, alias)| std::iter::once(alias.clone()).chain(style.derived(alias)));
        std::iter::once(self.service.hostname.clone())
            .chain(aliases)
            .collect()
    }
}

impl Context<'_> {
    /// Filters for the destinations of a TCP or TLS rule of a VirtualService.
    pub(crate) fn routed<T>(
        &self,
        to: &[RouteDestination],
        port: &Port,
        object: &Object<T>,
        class: Class,
        exchange: bool,
    ) -> Vec<Filter> {
        let first = to
            .first()
            .and_then(|d| d.destination.clone())
            .unwrap_or_default();
        let service = self.proxy.scope.service(&first.host);
        let target = Target {
            class,
            protocol: port.protocol,
            exchange,
            judged: true,
            rule: service.and_then(|s| self.rule(&s.hostname)),
        };
        let cluster = |d: &proto::istio::networking::v1alpha3::Destination| {
            let service = self.destination_service(&d.host);
            names::destination_cluster(d, service.as_ref(), port.number)
        };
        if let [_] = to {
            let name = cluster(&first);
            let stat_prefix = service
                .and_then(|s| {
                    self.stat_prefix(Some(s), &first.host, &first.subset, port.number, &port.name)
                })
                .unwrap_or_else(|| name.clone());
            return target.single(&self.env, &name, &stat_prefix, &first.subset, true);
        }
        let weighted = to
            .iter()
            .filter(|d| d.weight > 0)
            .filter_map(|d| Some((cluster(d.destination.as_ref()?), d.weight as u32)))
            .collect();
        let stat_prefix = format!("{}.{}", object.meta.name, object.meta.namespace);
        target.weighted(&self.env, weighted, &stat_prefix)
    }
}

/// Whether a rule says anything that a listener, not a cluster, does.
pub(super) fn is_shaped_by(rule: &DestinationRule) -> bool {
    let policies = rule.traffic_policy.iter().chain(
        rule.subsets
            .iter()
            .filter_map(|s| s.traffic_policy.as_ref()),
    );
    policies.into_iter().any(|p| {
        let tcp = p.connection_pool.as_ref().and_then(|c| c.tcp.as_ref());
        p.tunnel.is_some()
            || tcp.is_some_and(|t| t.idle_timeout.is_some() || t.max_connection_duration.is_some())
            || p.load_balancer.as_ref().is_some_and(|lb| {
                matches!(&lb.lb_policy, Some(LbPolicy::ConsistentHash(hash))
                    if matches!(hash.hash_key, Some(HashKey::UseSourceIp(_))))
            })
    })
    // Subsets are chains of their own at gateways that pass mutual TLS through.
    || !rule.subsets.is_empty()
}

fn tunnel(rule: Option<&DestinationRule>, subset: &str) -> Option<TunnelingConfig> {
    let settings = policy_of(rule, subset)?.tunnel.as_ref()?;
    Some(TunnelingConfig {
        hostname: names::host_port(&settings.target_host, settings.target_port),
        use_post: settings.protocol == "POST",
        ..Default::default()
    })
}

/// The policy of a subset alone, or of the whole rule where no subset is meant.
fn policy_of<'a>(rule: Option<&'a DestinationRule>, subset: &str) -> Option<&'a TrafficPolicy> {
    let rule = rule?;
    if subset.is_empty() {
        return rule.traffic_policy.as_ref();
    }
    rule.subsets
        .iter()
        .find(|s| s.name == subset)?
        .traffic_policy
        .as_ref()
}

/// Connections are spread by source address where the rule (or the subset's own balancer) hashes by it.
fn hash_policy(rule: Option<&DestinationRule>, subset: &str) -> Vec<HashPolicy> {
    let by_source = |policy: Option<&TrafficPolicy>| {
        let lb = policy?.load_balancer.as_ref()?;
        Some(match &lb.lb_policy {
            Some(LbPolicy::ConsistentHash(hash)) => {
                matches!(hash.hash_key, Some(HashKey::UseSourceIp(true)))
            }
            _ => false,
        })
    };
    let whole = by_source(rule.and_then(|r| r.traffic_policy.as_ref()));
    let own = if subset.is_empty() {
        None
    } else {
        by_source(policy_of(rule, subset))
    };
    if own.or(whole) != Some(true) {
        return Vec::new();
    }
    vec![HashPolicy {
        policy_specifier: Some(hash_policy::PolicySpecifier::SourceIp(
            hash_policy::SourceIp {},
        )),
    }]
}
