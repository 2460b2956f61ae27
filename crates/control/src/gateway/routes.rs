//! Route configurations of gateways: VirtualServices of the same host are joined, oldest first.

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    envoy::config::route::v3::{
        Route, RouteConfiguration, VirtualHost, virtual_host::TlsRequirementType,
    },
    istio::networking::v1alpha3::{Destination, load_balancer_settings::ConsistentHashLb},
};

use super::merge::{MergedGateway, MergedServer};
use crate::{
    listener::{Context, destination_service, settings::Class},
    model::{Origin, Resource, Routes, host},
    names::{self, DestinationService},
    route::{
        Lookup, is_catch_all,
        outbound::{configuration, destination_hash, empty, rules},
    },
};

/// The route configurations of these names.
pub fn build(context: &Context<'_>, names: &[String]) -> Vec<Resource> {
    let gateway = MergedGateway::new(context.mesh, context.proxy);
    names
        .iter()
        .map(|name| {
            let servers = gateway
                .as_ref()
                .and_then(|g| Some((g, g.by_route.get(name)?)));
            match servers {
                Some((gateway, servers)) => {
                    let servers: Vec<_> = servers.iter().map(|i| &gateway.servers[*i]).collect();
                    let (config, from) = one(context, name, &servers);
                    Resource::new(name, &config, from)
                }
                // The Gateway is gone; its listener goes next.
                None => Resource::new(name, &empty(name), Vec::new()),
            }
        })
        .collect()
}

/// A host that the configuration serves.
#[derive(Default)]
struct Entry {
    /// Which lists of routes it has, in order: hosts with the same ones share a virtual host.
    parts: Vec<usize>,
    require_tls: bool,
    /// Port of the server that made it.
    port: u32,
}

fn one(
    context: &Context<'_>,
    name: &str,
    servers: &[&MergedServer],
) -> (RouteConfiguration, Vec<Origin>) {
    let mut from: Vec<Origin> = Vec::new();
    let mut parts: Vec<Vec<Route>> = Vec::new();
    // The part of each (gateway, VirtualService): built once, for the port of the first server that needs it.
    let mut known: BTreeMap<(String, String, String), Option<usize>> = BTreeMap::new();
    let mut hosts: BTreeMap<String, Entry> = BTreeMap::new();
    for server in servers {
        from.extend(server.origins().iter().cloned());
        let visible = context
            .mesh
            .virtual_services()
            .for_gateway(context.proxy.namespace(), &server.gateway);
        for routes in visible {
            let shared = shared_hosts(server, routes);
            if shared.is_empty() {
                continue;
            }
            let key = (
                server.gateway.clone(),
                routes.namespace().to_owned(),
                routes.name().to_owned(),
            );
            let part = *known.entry(key).or_insert_with(|| {
                let translated = translate(context, server, routes);
                if translated.is_empty() {
                    return None;
                }
                from.extend(routes.from.iter().cloned());
                parts.push(translated);
                Some(parts.len() - 1)
            });
            let Some(part) = part else { continue };
            for hostname in shared {
                let entry = hosts
                    .entry(hostname.to_lowercase())
                    .or_insert_with(|| Entry {
                        port: server.port,
                        ..Entry::default()
                    });
                entry.parts.push(part);
                entry.require_tls |= server.redirects();
            }
        }
        if server.redirects() {
            for hostname in &server.server.hosts {
                let entry = hosts
                    .entry(hostname.to_lowercase())
                    .or_insert_with(|| Entry {
                        port: server.port,
                        ..Entry::default()
                    });
                entry.require_tls = true;
            }
        }
    }
    let mut virtual_hosts = if hosts.is_empty() {
        let port = servers.first().map_or(0, |s| s.port);
        vec![VirtualHost {
            name: names::host_port("blackhole", port),
            domains: vec!["*".to_owned()],
            ..Default::default()
        }]
    } else {
        join(context, hosts, &parts)
    };
    virtual_hosts.sort_by(|a, b| a.name.cmp(&b.name));
    (
        RouteConfiguration {
            virtual_hosts,
            ..configuration(context, name)
        },
        from,
    )
}

/// One virtual host for all hosts with the same routes, named after the most specific.
fn join(
    context: &Context<'_>,
    hosts: BTreeMap<String, Entry>,
    parts: &[Vec<Route>],
) -> Vec<VirtualHost> {
    let mut sorted: Vec<(String, Entry)> = hosts.into_iter().collect();
    sorted.sort_by(|a, b| host::by_specificity(&a.0, &b.0));
    let mut known: BTreeMap<Vec<usize>, (usize, bool)> = BTreeMap::new();
    let mut out: Vec<VirtualHost> = Vec::new();
    for (hostname, entry) in sorted {
        if let Some((at, require_tls)) = known.get(&entry.parts)
            && *require_tls == entry.require_tls
        {
            let domains = domains_of(context, &hostname, entry.port);
            out[*at].domains.extend(domains);
            continue;
        }
        known.insert(entry.parts.clone(), (out.len(), entry.require_tls));
        let all = entry.parts.iter().flat_map(|p| parts[*p].iter().cloned());
        // What matches everything goes last, whichever VirtualService it is from.
        let (last, first): (Vec<Route>, Vec<Route>) =
            all.partition(|r| r.r#match.as_ref().is_some_and(is_catch_all));
        out.push(VirtualHost {
            name: names::host_port(&hostname, entry.port),
            domains: domains_of(context, &hostname, entry.port),
            routes: first.into_iter().chain(last).collect(),
            include_request_attempt_count: context.env.headers(Class::Gateway).attempt_count,
            require_tls: if entry.require_tls {
                TlsRequirementType::All.into()
            } else {
                TlsRequirementType::None.into()
            },
            ..Default::default()
        });
    }
    out
}

fn domains_of(context: &Context<'_>, hostname: &str, port: u32) -> Vec<String> {
    let mut out = vec![hostname.to_owned()];
    if context.env.compat.port_domains() && hostname != "*" {
        out.push(names::host_port(hostname, port));
    }
    out
}

fn translate(context: &Context<'_>, server: &MergedServer, routes: &Routes) -> Vec<Route> {
    let lookup = OfGateway {
        context,
        namespace: routes.namespace(),
    };
    let tls = server.server.tls.is_some();
    rules(context, routes, &server.gateway, server.port, tls, &lookup).routes()
}

/// Hosts that both the server and the VirtualService mean: of two that overlap the narrower one.
fn shared_hosts(server: &MergedServer, routes: &Routes) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for own in &server.server.hosts {
        let own = match own.split_once('/') {
            Some((namespace, _)) if namespace != routes.namespace() && namespace != "*" => continue,
            Some((_, name)) => name,
            None => own,
        };
        for wanted in &routes.spec().hosts {
            let both = if host::subset_of(own, wanted) {
                own
            } else if host::subset_of(wanted, own) {
                wanted
            } else {
                continue;
            };
            if seen.insert(both.to_owned()) {
                out.push(both.to_owned());
            }
        }
    }
    out
}

/// Services as a gateway sees them for one VirtualService: those of its namespace first.
struct OfGateway<'a> {
    context: &'a Context<'a>,
    namespace: &'a str,
}

impl Lookup for OfGateway<'_> {
    fn service(&self, hostname: &str) -> Option<DestinationService> {
        let services = self.context.mesh.services();
        let client = self.context.proxy.namespace();
        services
            .get(hostname, self.namespace)
            .filter(|s| services.is_visible(s, client))
            .or_else(|| self.context.proxy.scope.service(hostname))
            .map(|s| destination_service(s))
    }

    fn consistent_hash(&self, destination: &Destination) -> Option<ConsistentHashLb> {
        destination_hash(self.context, destination)
    }
}
