//! RouteConfigurations of sidecars: one per HTTP port, one per sniffed address.
//!
//! The virtual hosts of a port come from its VirtualServices first, oldest first, then from its services by name. A
//! domain belongs to the first virtual host that claims it; the rest of the second one stays.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proto::{
    envoy::config::route::v3::{
        DirectResponseAction, Route, RouteAction, RouteConfiguration, VirtualHost, route,
        route_action::ClusterSpecifier,
    },
    istio::networking::v1alpha3::{
        Destination, TrafficPolicy,
        load_balancer_settings::{ConsistentHashLb, LbPolicy},
    },
};

use super::{
    Lookup, NO_TIMEOUT, Rules, Semantics, action, default_outbound, domains::Style, matching,
};
use crate::{
    listener::{Context, outbound::catch_all_cluster, settings::Class},
    model::{
        EgressListener, MESH, Origin, OutboundMode, Port, Protocol, Resolution, Resource, Routes,
        Service, host, service::UNSPECIFIED,
    },
    names::{self, DestinationService},
};

/// Largest body of a direct response.
const MAX_DIRECT_RESPONSE: u32 = 1 << 20;
/// The listener of clients that are configured to use a proxy.
const HTTP_PROXY: &str = "http_proxy";

/// The route configurations of these names. A name that means nothing gets an empty one: a listener that waits for it
/// must not wait for ever.
pub fn build(context: &Context<'_>, names: &[String]) -> Vec<Resource> {
    let mut ports: BTreeMap<u32, Hosts> = BTreeMap::new();
    names
        .iter()
        .map(|name| one(context, name, &mut ports))
        .collect()
}

fn one(context: &Context<'_>, name: &str, ports: &mut BTreeMap<u32, Hosts>) -> Resource {
    let Some(wanted) = Wanted::parse(name) else {
        return Resource::new(name, &empty(name), Vec::new());
    };
    let (mut virtual_hosts, mut from) = match wanted {
        Wanted::Sniffed { host, port } => {
            // Sniffed listeners of one port share their virtual hosts.
            let hosts = ports
                .entry(port)
                .or_insert_with(|| hosts_of(context, port, name).indexed());
            hosts.of_address(name, host)
        }
        Wanted::Port(port) => hosts_of(context, port, name).into_parts(),
        Wanted::Other => hosts_of(context, 0, name).into_parts(),
    };
    virtual_hosts.sort_by(|a, b| a.name.cmp(&b.name));
    if !matches!(wanted, Wanted::Sniffed { .. }) {
        virtual_hosts.push(catch_all(context));
        from.extend(context.proxy.scope.origin());
    }
    let config = RouteConfiguration {
        virtual_hosts,
        ..configuration(context, name)
    };
    Resource::new(name, &config, from)
}

/// A route configuration without virtual hosts.
pub fn configuration(context: &Context<'_>, name: &str) -> RouteConfiguration {
    // Where the port counts, it stands in the domains, and bodies have Envoy's own limit.
    let ignores_port = !context.env.compat.port_domains();
    RouteConfiguration {
        max_direct_response_body_size_bytes: ignores_port.then_some(MAX_DIRECT_RESPONSE),
        ignore_port_in_host_matching: ignores_port,
        ..empty(name)
    }
}

/// The answer to a name that means nothing (any more).
pub fn empty(name: &str) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        // Clusters may come later: a missing one answers 503, it does not break the listener.
        validate_clusters: Some(false),
        ..Default::default()
    }
}

/// What a route configuration's name asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted<'a> {
    /// All hosts of a port.
    Port(u32),
    /// One host of a port: the listener of its address.
    Sniffed { host: &'a str, port: u32 },
    /// All hosts of all ports: `http_proxy`, or a unix socket.
    Other,
}

impl<'a> Wanted<'a> {
    fn parse(name: &'a str) -> Option<Wanted<'a>> {
        if name == HTTP_PROXY || name.starts_with("unix://") {
            return Some(Wanted::Other);
        }
        if let Some((host, port)) = name.rsplit_once(':') {
            return Some(Wanted::Sniffed {
                host,
                port: port.parse().ok()?,
            });
        }
        name.parse().ok().map(Wanted::Port)
    }
}

/// A virtual host, and which of the lists of origins is its.
#[derive(Debug, Clone)]
struct Hosted {
    host: VirtualHost,
    from: usize,
}

/// Virtual hosts, and the objects behind them.
#[derive(Debug, Default)]
struct Hosts {
    all: Vec<Hosted>,
    from: Vec<Vec<Origin>>,
    /// Positions by domain.
    by_domain: HashMap<String, Vec<usize>>,
}

impl Hosts {
    fn into_parts(self) -> (Vec<VirtualHost>, Vec<Origin>) {
        let hosts = self.all.into_iter().map(|h| h.host).collect();
        (hosts, self.from.into_iter().flatten().collect())
    }

    fn indexed(mut self) -> Hosts {
        for (at, hosted) in self.all.iter().enumerate() {
            for domain in &hosted.host.domains {
                self.by_domain.entry(domain.clone()).or_default().push(at);
            }
        }
        self
    }

    /// The virtual hosts of an address that only one service is called by.
    fn of_address(&self, name: &str, host: &str) -> (Vec<VirtualHost>, Vec<Origin>) {
        let found: BTreeSet<usize> = [name, host]
            .iter()
            .filter_map(|domain| self.by_domain.get(*domain))
            .flatten()
            .copied()
            .collect();
        let found: Vec<&Hosted> = found.into_iter().map(|at| &self.all[at]).collect();
        let mut hosts: Vec<VirtualHost> = found.iter().map(|h| h.host.clone()).collect();
        if let [only] = hosts.as_mut_slice() {
            // The address already says whom the client means.
            only.domains = vec!["*".to_owned()];
        }
        let from = found
            .iter()
            .flat_map(|h| self.from[h.from].iter().cloned())
            .collect();
        (hosts, from)
    }
}

/// The same routes for some hosts and services on one port.
struct Group<'a> {
    port: u32,
    services: Vec<&'a Service>,
    hosts: Vec<String>,
    routes: Vec<Route>,
    from: Vec<Origin>,
}

fn hosts_of(context: &Context<'_>, port: u32, name: &str) -> Hosts {
    let Some(egress) = context.proxy.scope.egress_for_route(port, name) else {
        return Hosts::default();
    };
    let declared = egress.listener.as_ref().and_then(|l| l.port.as_ref());
    let http_proxy = declared.is_some_and(|p| Protocol::parse(&p.protocol) == Protocol::HttpProxy);
    let port = if http_proxy { 0 } else { port };
    let registry = registry(egress, port);
    let groups = groups(context, egress, registry, port);
    let mut claims = Claims::new(context, port);
    for group in &groups {
        for service in &group.services {
            claims.full_names.insert(service.hostname.clone());
            claims
                .full_names
                .insert(names::host_port(&service.hostname, group.port));
        }
    }
    let mut by_port: BTreeMap<u32, Vec<Hosted>> = BTreeMap::new();
    let mut from = Vec::new();
    for group in groups {
        let at = from.len();
        let hosted = |host| Hosted { host, from: at };
        let out = by_port.entry(group.port).or_default();
        for hostname in &group.hosts {
            let host = claims.virtual_host(&hostname.to_lowercase(), &group, None);
            out.extend(host.map(hosted));
        }
        for service in &group.services {
            let host = claims.virtual_host(&service.hostname, &group, Some(service));
            out.extend(host.map(hosted));
        }
        from.push(group.from);
    }
    let all = if port == 0 {
        join_ports(by_port)
    } else {
        by_port.remove(&port).unwrap_or_default()
    };
    Hosts {
        all,
        from,
        ..Hosts::default()
    }
}

/// The services that the configuration is about, by host in lower case, each with the ports that count.
fn registry(egress: &EgressListener, port: u32) -> BTreeMap<String, (&Service, Vec<&Port>)> {
    let mut out = BTreeMap::new();
    for service in &egress.services {
        let ports: Vec<&Port> = service
            .ports
            .iter()
            .filter(|p| port == 0 || p.number == port)
            .collect();
        if !ports.is_empty() {
            let ports = if port == 0 { ports } else { vec![ports[0]] };
            out.insert(service.hostname.to_lowercase(), (&**service, ports));
        }
    }
    out
}

type Registry<'a> = BTreeMap<String, (&'a Service, Vec<&'a Port>)>;

fn groups<'a>(
    context: &Context<'_>,
    egress: &EgressListener,
    mut registry: Registry<'a>,
    port: u32,
) -> Vec<Group<'a>> {
    let mut out = Vec::new();
    for routes in &egress.virtual_services {
        // On port 80 hosts that nobody registered are served too.
        if port == 80 || concerns(routes, &registry) {
            out.extend(groups_of_virtual_service(
                context, egress, routes, &registry, port,
            ));
        }
    }
    for group in &out {
        for service in &group.services {
            registry.remove(&service.hostname.to_lowercase());
        }
    }
    for (service, ports) in registry.into_values() {
        if service.resolution == Resolution::Alias {
            continue;
        }
        for port in ports.iter().filter(|p| p.protocol.is_http_or_sniffed()) {
            out.push(group_of_service(context, service, port));
        }
    }
    out
}

/// Whether some host of the VirtualService is that of a service here, wildcards on either side included.
fn concerns(routes: &Routes, registry: &Registry<'_>) -> bool {
    routes.spec().hosts.iter().any(|h| {
        let h = h.to_lowercase();
        registry.contains_key(&h)
            || if host::is_wildcard(&h) {
                registry.keys().any(|service| host::matches(&h, service))
            } else {
                registry
                    .keys()
                    .any(|s| host::is_wildcard(s) && host::matches(&h, s))
            }
    })
}

fn groups_of_virtual_service<'a>(
    context: &Context<'_>,
    egress: &EgressListener,
    routes: &Routes,
    registry: &Registry<'a>,
    port: u32,
) -> Vec<Group<'a>> {
    let lookup = InRegistry { context, registry };
    let translated = rules(context, routes, MESH, port, false, &lookup).routes();
    if translated.is_empty() {
        return Vec::new();
    }
    let (hosts, services) = split_hosts(egress, routes, registry);
    // Routes of Gateway API are for the callers in their own namespace, or for all callers of a service in it.
    let own = context.proxy.namespace() == routes.namespace();
    if routes.semantics == Semantics::Gateway
        && !services
            .iter()
            .any(|(s, _)| own || s.namespace == routes.namespace())
    {
        return Vec::new();
    }
    let mut by_port: BTreeMap<u32, Vec<&Service>> = BTreeMap::new();
    for (service, ports) in services {
        for port in ports.iter().filter(|p| p.protocol.is_http_or_sniffed()) {
            by_port.entry(port.number).or_default().push(service);
        }
    }
    if by_port.is_empty() && port == 80 {
        by_port.insert(80, Vec::new());
    }
    by_port
        .into_iter()
        .map(|(port, services)| Group {
            port,
            from: routes
                .from
                .iter()
                .chain(services.iter().map(|s| &s.origin))
                .cloned()
                .collect(),
            services,
            hosts: hosts.clone(),
            routes: translated.clone(),
        })
        .collect()
}

/// The hosts of a VirtualService that are no service here, and those that are. Where a wildcard covers services, each
/// goes to the VirtualService that fits it best.
fn split_hosts<'r, 'a>(
    egress: &EgressListener,
    routes: &Routes,
    registry: &'r Registry<'a>,
) -> (Vec<String>, Vec<(&'a Service, &'r [&'a Port])>) {
    let mut hosts = Vec::new();
    let mut services = Vec::new();
    let entry = |(service, ports): &'r (&'a Service, Vec<&'a Port>)| (*service, ports.as_slice());
    for hostname in routes.spec().hosts.iter().filter(|h| !host::is_wildcard(h)) {
        match registry.get(&hostname.to_lowercase()) {
            Some(found) => services.push(entry(found)),
            None => hosts.push(hostname.clone()),
        }
    }
    for hostname in routes.spec().hosts.iter().filter(|h| host::is_wildcard(h)) {
        let hostname = hostname.to_lowercase();
        if routes.semantics == Semantics::Gateway {
            hosts.push(hostname);
            continue;
        }
        let covered: Vec<_> = registry
            .iter()
            .filter(|(s, _)| host::matches(s, &hostname))
            .collect();
        let own = (routes.namespace().to_owned(), routes.name().to_owned());
        services.extend(
            covered
                .iter()
                .filter(|(s, _)| egress.best_virtual_service.get(*s) == Some(&own))
                .map(|(_, found)| entry(found)),
        );
        if covered.is_empty() {
            hosts.push(hostname);
        }
    }
    (hosts, services)
}

fn group_of_service<'a>(context: &Context<'_>, service: &'a Service, port: &Port) -> Group<'a> {
    let cluster = names::outbound_cluster(port.number, "", &service.hostname);
    let operation = format!("{}/*", names::host_port(&service.hostname, port.number));
    let env = &context.env;
    let mut route = default_outbound(&cluster, operation, env.mesh, env.compat);
    let hash = service_hash(context, service, port.number);
    let policy = hash.as_ref().and_then(action::hash_policy);
    if let Some(route::Action::Route(action)) = &mut route.action {
        action.hash_policy.extend(policy);
    }
    let rule = context
        .proxy
        .scope
        .destination_rule(true, &context.proxy.labels, &service.hostname);
    let mut from = vec![service.origin.clone()];
    if hash.is_some() {
        from.extend(rule.into_iter().flat_map(|r| r.from.iter().cloned()));
    }
    Group {
        port: port.number,
        services: vec![service],
        hosts: Vec::new(),
        routes: vec![route],
        from,
    }
}

/// Which names are taken while the virtual hosts of a configuration are put together.
struct Claims<'a> {
    context: &'a Context<'a>,
    /// The listener's port; 0 where there are several.
    port: u32,
    names: BTreeSet<String>,
    domains: BTreeSet<String>,
    /// Hosts of services in full: a short form of another host yields to them.
    full_names: BTreeSet<String>,
}

impl<'a> Claims<'a> {
    fn new(context: &'a Context<'a>, port: u32) -> Claims<'a> {
        Claims {
            context,
            port,
            names: BTreeSet::new(),
            domains: BTreeSet::new(),
            full_names: BTreeSet::new(),
        }
    }

    fn virtual_host(
        &mut self,
        hostname: &str,
        group: &Group<'_>,
        service: Option<&Service>,
    ) -> Option<VirtualHost> {
        if group.routes.is_empty() {
            return None;
        }
        let name = names::host_port(hostname, group.port);
        if !self.names.insert(name.clone()) {
            return None;
        }
        let compat = self.context.env.compat;
        let (wanted, derived) = match service {
            None if compat.port_domains() => {
                (vec![names::bracketed(hostname), name.clone()], vec![])
            }
            None => (vec![names::bracketed(hostname)], Vec::new()),
            Some(service) => self.domains_of(service, group.port),
        };
        let mut domains = Vec::with_capacity(wanted.len());
        for domain in wanted {
            let taken = self.domains.contains(&domain.to_lowercase())
                || (derived.contains(&domain) && self.full_names.contains(&domain));
            if !taken {
                self.domains.insert(domain.to_lowercase());
                domains.push(domain);
            }
        }
        if domains.is_empty() {
            return None;
        }
        Some(VirtualHost {
            name,
            domains,
            routes: group.routes.clone(),
            include_request_attempt_count: self.context.env.headers(Class::Outbound).attempt_count,
            ..Default::default()
        })
    }

    fn domains_of(&self, service: &Service, port: u32) -> (Vec<String>, Vec<String>) {
        let with_port = self.port == 0 || self.context.env.compat.port_domains();
        let style = Style {
            port: with_port.then_some(port),
            ..self.context.domain_style()
        };
        let addresses = service.addresses_for(self.context.proxy);
        let aliases = service.aliases.iter().map(|(_, alias)| alias.as_str());
        let domains = style.service(
            std::iter::once(service.hostname.as_str()).chain(aliases),
            service.is_headless(),
            addresses
                .iter()
                .map(String::as_str)
                .filter(|a| !a.is_empty() && *a != UNSPECIFIED),
        );
        (domains.all, domains.derived)
    }
}

/// Hosts of all ports in one listener: without a port in its name a domain means port 80.
fn join_ports(by_port: BTreeMap<u32, Vec<Hosted>>) -> Vec<Hosted> {
    let mut out = Vec::new();
    for (port, hosts) in by_port {
        for mut hosted in hosts {
            if port != 80 {
                hosted.host.domains.retain(|d| d.contains(':'));
            }
            if !hosted.host.domains.is_empty() {
                out.push(hosted);
            }
        }
    }
    out
}

/// Hosts that nobody registered: passed through, or refused.
fn catch_all(context: &Context<'_>) -> VirtualHost {
    let (name, action) = match context.proxy.scope.outbound_mode {
        OutboundMode::AllowAny => {
            let mut forward = RouteAction {
                cluster_specifier: Some(ClusterSpecifier::Cluster(catch_all_cluster(context))),
                timeout: Some(NO_TIMEOUT),
                append_x_forwarded_host: context.env.headers(Class::Outbound).x_forwarded_host,
                ..Default::default()
            };
            action::limit(&mut forward, NO_TIMEOUT, context.env.compat);
            ("allow_any", route::Action::Route(forward))
        }
        OutboundMode::RegistryOnly => (
            "block_all",
            route::Action::DirectResponse(DirectResponseAction {
                status: 502,
                ..Default::default()
            }),
        ),
    };
    VirtualHost {
        name: name.to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![Route {
            name: name.to_owned(),
            r#match: Some(matching::everything()),
            action: Some(action),
            ..Default::default()
        }],
        include_request_attempt_count: context.env.headers(Class::Outbound).attempt_count,
        ..Default::default()
    }
}

/// One VirtualService, to be translated for a listener of the proxy.
pub(crate) fn rules<'a>(
    context: &'a Context<'_>,
    routes: &'a Routes,
    gateway: &'a str,
    port: u32,
    tls: bool,
    lookup: &'a dyn Lookup,
) -> Rules<'a> {
    Rules {
        client: context.client(gateway, port),
        name: routes.name(),
        spec: routes.spec(),
        metadata: names::config_metadata(
            names::NETWORKING,
            "virtual-service",
            routes.namespace(),
            routes.name(),
        ),
        semantics: routes.semantics,
        tls,
        mesh: context.env.mesh,
        append_x_forwarded_host: context.env.headers(Class::Outbound).x_forwarded_host,
        lookup,
        compat: context.env.compat,
    }
}

/// Services that the listener serves, under the ports that it has.
struct InRegistry<'a> {
    context: &'a Context<'a>,
    registry: &'a Registry<'a>,
}

impl Lookup for InRegistry<'_> {
    fn service(&self, host: &str) -> Option<DestinationService> {
        let (service, ports) = self.registry.get(host)?;
        Some(DestinationService {
            only_port: match ports.as_slice() {
                [only] => Some(only.number),
                _ => None,
            },
            external_name: Some(service.external_name.clone()).filter(|n| !n.is_empty()),
        })
    }

    fn consistent_hash(&self, destination: &Destination) -> Option<ConsistentHashLb> {
        destination_hash(self.context, destination)
    }
}

/// The hash of a destination: that of the subset's port, else of the subset, else of the port, else of the rule.
pub(crate) fn destination_hash(
    context: &Context<'_>,
    destination: &Destination,
) -> Option<ConsistentHashLb> {
    let rule = context.rule(&destination.host)?;
    let port = destination.port.as_ref().map(|p| p.number);
    let subset = rule
        .subsets
        .iter()
        .find(|s| s.name == destination.subset)
        .and_then(|s| s.traffic_policy.as_ref());
    let policy = rule.traffic_policy.as_ref();
    hash_of_port(subset, port)
        .or_else(|| hash_of(subset?.load_balancer.as_ref()))
        .or_else(|| hash_of_port(policy, port))
        .or_else(|| hash_of(policy?.load_balancer.as_ref()))
        .cloned()
}

fn hash_of_port(policy: Option<&TrafficPolicy>, port: Option<u32>) -> Option<&ConsistentHashLb> {
    let own = policy?
        .port_level_settings
        .iter()
        .find(|s| port.is_some() && s.port.as_ref().map(|p| p.number) == port)?;
    hash_of(own.load_balancer.as_ref())
}

/// The hash of calls that no VirtualService speaks about.
fn service_hash(context: &Context<'_>, service: &Service, port: u32) -> Option<ConsistentHashLb> {
    let policy = context.rule(&service.hostname)?.traffic_policy.as_ref()?;
    hash_of_port(Some(policy), Some(port))
        .or_else(|| hash_of(policy.load_balancer.as_ref()))
        .cloned()
}

fn hash_of(
    lb: Option<&proto::istio::networking::v1alpha3::LoadBalancerSettings>,
) -> Option<&ConsistentHashLb> {
    match lb?.lb_policy.as_ref()? {
        LbPolicy::ConsistentHash(hash) => Some(hash),
        LbPolicy::Simple(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_what_is_wanted() {
        assert_eq!(Wanted::parse("9080"), Some(Wanted::Port(9080)));
        assert_eq!(
            Wanted::parse("a.b.svc:80"),
            Some(Wanted::Sniffed {
                host: "a.b.svc",
                port: 80
            })
        );
        assert_eq!(Wanted::parse("http_proxy"), Some(Wanted::Other));
        assert_eq!(Wanted::parse("unix:///run/x.sock"), Some(Wanted::Other));
        assert_eq!(Wanted::parse("nonsense"), None);
    }
}
