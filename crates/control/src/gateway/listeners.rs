//! Listeners of gateways: one per port, one chain per TLS server.

use std::collections::BTreeMap;

use proto::{
    envoy::config::{core::v3::TrafficDirection, listener::v3::Listener},
    istio::networking::v1alpha3::server_tls_settings::TlSmode,
};

use super::merge::{MergedGateway, MergedServer, ServerPort, Servers};
use crate::{
    listener::{
        Context,
        chain::{Chain, Traffic, address},
        filters,
        inbound::MUTUAL_ANY,
        outbound::exact_balance,
        settings::Class,
        tcp::Target,
        tls,
    },
    model::{Port, Protocol, Resource, Routes, TargetPort, host},
    names,
    route::Semantics,
};

/// The listeners of a router.
pub fn build(context: &Context<'_>) -> Vec<Resource> {
    let Some(gateway) = MergedGateway::new(context.mesh, context.proxy) else {
        return Vec::new();
    };
    let mut by_name: BTreeMap<String, (ServerPort, Vec<Chain>, Vec<usize>)> = BTreeMap::new();
    // SNI hosts of passed-through TLS that are taken, by port: `host -> bind`.
    let mut taken: BTreeMap<u32, BTreeMap<String, String>> = BTreeMap::new();
    for (port, servers) in &gateway.ports {
        if context.env.unprivileged && port.number < 1024 {
            tracing::warn!(
                "gateway {}: port {} needs privileges that it has not",
                context.proxy.node.id,
                port.number
            );
            continue;
        }
        let bind = bind_of(context, port);
        let chains = chains(context, &gateway, port, servers, &mut taken);
        let entry = by_name
            .entry(format!("{bind}_{}", port.number))
            .or_insert_with(|| (port.clone(), Vec::new(), Vec::new()));
        entry.1.extend(chains);
        entry.2.extend(&servers.all);
    }
    by_name
        .into_iter()
        .filter(|(name, (_, chains, _))| {
            if chains.is_empty() {
                tracing::warn!(
                    "gateway {}: listener {name} has nothing to serve and is left out",
                    context.proxy.node.id
                );
            }
            !chains.is_empty()
        })
        .map(|(name, (port, chains, servers))| {
            let from = servers
                .iter()
                .flat_map(|i| gateway.servers[*i].origins().iter().cloned())
                .collect();
            Resource::new(name.clone(), &listener(context, name, &port, chains), from)
        })
        .collect()
}

fn bind_of(context: &Context<'_>, port: &ServerPort) -> String {
    match port.bind.as_str() {
        "" => context.env.families.wildcard().to_owned(),
        bind => bind.to_owned(),
    }
}

fn listener(
    context: &Context<'_>,
    name: String,
    port: &ServerPort,
    chains: Vec<Chain>,
) -> Listener {
    let env = &context.env;
    let mut listener_filters = Vec::new();
    if env
        .proxy_config
        .gateway_topology
        .as_ref()
        .is_some_and(|t| t.proxy_protocol.is_some())
    {
        listener_filters.push(filters::proxy_protocol());
    }
    if chains.iter().any(Chain::needs_tls_inspector) {
        listener_filters.push(filters::tls_inspector());
    }
    let buffer = env
        .connection_settings
        .as_ref()
        .and_then(|s| s.listener_per_connection_buffer_limit_bytes)
        .and_then(|n| u32::try_from(n).ok());
    Listener {
        address: Some(address(&bind_of(context, port), port.number)),
        traffic_direction: TrafficDirection::Outbound.into(),
        listener_filters,
        filter_chains: chains
            .into_iter()
            .map(|c| c.build(env, Class::Gateway, &name))
            .collect(),
        max_connections_to_accept_per_socket_event: env.compat.max_connections_per_event(),
        connection_balance_config: exact_balance(env.exact_balance),
        per_connection_buffer_limit_bytes: buffer,
        access_log: env.reports(Class::Gateway).logs.listener.clone(),
        name,
        ..Default::default()
    }
}

fn chains(
    context: &Context<'_>,
    gateway: &MergedGateway,
    port: &ServerPort,
    servers: &Servers,
    taken: &mut BTreeMap<u32, BTreeMap<String, String>>,
) -> Vec<Chain> {
    let protocol = Protocol::parse(&port.protocol);
    if protocol.is_http() {
        return vec![Chain::of(Traffic::Http {
            routes: servers.route_name.clone(),
            grpc_web: protocol == Protocol::GrpcWeb,
            http_proxy: false,
            stat_prefix: None,
        })];
    }
    let mut out = Vec::new();
    for server in servers.all.iter().map(|i| &gateway.servers[*i]) {
        if server.is_https() {
            out.push(https_chain(context, server));
        } else if server.is_passthrough() {
            out.extend(passthrough_chains(context, server, port.number, taken));
        } else {
            out.extend(tcp_chain(context, server));
        }
    }
    out
}

fn https_chain(context: &Context<'_>, server: &MergedServer) -> Chain {
    Chain {
        server_names: server.sni_hosts.clone(),
        tls: terminated(context, server).map(Box::new),
        ..Chain::of(Traffic::Http {
            routes: server.route_name.clone(),
            grpc_web: false,
            http_proxy: false,
            // A server's name is the user's own choice of what its statistics are called.
            stat_prefix: Some(server.server.name.clone()).filter(|n| !n.is_empty()),
        })
    }
}

fn terminated(
    context: &Context<'_>,
    server: &MergedServer,
) -> Option<proto::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext> {
    let settings = server.server.tls.as_ref()?;
    let is_tcp = !server.protocol.is_http() && server.protocol != Protocol::Https;
    Some(tls::server(
        settings,
        is_tcp,
        context.env.mesh,
        &context.env.certificates,
    ))
}

/// Bytes, with TLS taken off where the server has any: to the first rule that a VirtualService has for them.
fn tcp_chain(context: &Context<'_>, server: &MergedServer) -> Option<Chain> {
    let port = port_of(server);
    let exchange = server.tls_mode() == Some(TlSmode::IstioMutual);
    for routes in bound(context, server) {
        let rule = routes.spec().tcp.iter().find(|tcp| {
            !tcp.route.is_empty()
                && (tcp.r#match.is_empty()
                    || tcp
                        .r#match
                        .iter()
                        .any(|m| applies(server, m.port, &m.gateways)))
        });
        // A TLSRoute names its backends by SNI also where TLS ends before them.
        let by_sni = || {
            let of_route = routes.semantics == Semantics::Gateway;
            let mut all = routes.spec().tls.iter().filter(|_| of_route);
            all.find(|tls| {
                let mut matches = tls.r#match.iter();
                matches.any(|m| applies(server, m.port, &m.gateways))
            })
        };
        let route = rule
            .map(|r| &r.route)
            .or_else(|| by_sni().map(|r| &r.route));
        if let Some(route) = route {
            let filters = context.routed(route, &port, &routes.object, Class::Gateway, exchange);
            return Some(Chain {
                server_names: server.sni_hosts.clone(),
                tls: terminated(context, server).map(Box::new),
                ..Chain::of(Traffic::Network(filters))
            });
        }
    }
    tracing::warn!(
        "{}: port {} has no VirtualService with a tcp rule for its hosts; it serves nothing",
        server.origin(),
        port.number
    );
    None
}

/// TLS as it is, by SNI: as VirtualServices say, or (AUTO_PASSTHROUGH) straight to the service in the name.
fn passthrough_chains(
    context: &Context<'_>,
    server: &MergedServer,
    number: u32,
    taken: &mut BTreeMap<u32, BTreeMap<String, String>>,
) -> Vec<Chain> {
    if server.tls_mode() == Some(TlSmode::AutoPassthrough) {
        return auto_passthrough_chains(context, server);
    }
    let port = port_of(server);
    let mut out = Vec::new();
    for routes in bound(context, server) {
        for rule in routes.spec().tls.iter().filter(|t| !t.route.is_empty()) {
            for m in rule
                .r#match
                .iter()
                .filter(|m| applies(server, m.port, &m.gateways))
            {
                let known = taken.entry(number).or_default();
                let bind = &server.server.bind;
                if m.sni_hosts.iter().any(|h| known.get(h) == Some(bind)) {
                    tracing::warn!(
                        "{}: an SNI host of a tls rule is already taken on port {number}; the match is left out",
                        routes.from[0]
                    );
                    continue;
                }
                known.extend(m.sni_hosts.iter().map(|h| (h.clone(), bind.clone())));
                let filters =
                    context.routed(&rule.route, &port, &routes.object, Class::Gateway, false);
                out.push(Chain {
                    server_names: m.sni_hosts.clone(),
                    ..Chain::of(Traffic::Network(filters))
                });
            }
        }
    }
    out
}

fn auto_passthrough_chains(context: &Context<'_>, server: &MergedServer) -> Vec<Chain> {
    let mut out = Vec::new();
    for service in context
        .proxy
        .scope
        .services
        .iter()
        .filter(|s| !s.mesh_external)
    {
        if !server
            .sni_hosts
            .iter()
            .any(|h| host::subset_of(&service.hostname, h))
        {
            continue;
        }
        let rule = context.rule(&service.hostname);
        let subsets = rule
            .into_iter()
            .flat_map(|r| r.subsets.iter().map(|s| s.name.as_str()));
        let subsets: Vec<&str> = std::iter::once("").chain(subsets).collect();
        for port in service.ports.iter().filter(|p| p.protocol != Protocol::Udp) {
            for subset in &subsets {
                let cluster = names::sni_cluster(port.number, subset, &service.hostname);
                let stat_prefix = context
                    .stat_prefix(
                        Some(service),
                        &service.hostname,
                        subset,
                        port.number,
                        &port.name,
                    )
                    .unwrap_or_else(|| cluster.clone());
                let target = Target {
                    class: Class::Gateway,
                    protocol: port.protocol,
                    exchange: false,
                    // The caller is judged where its TLS ends.
                    judged: false,
                    rule,
                };
                let filters = target.single(&context.env, &cluster, &stat_prefix, subset, false);
                out.push(Chain {
                    server_names: vec![cluster],
                    application_protocols: MUTUAL_ANY.iter().map(|a| (*a).to_owned()).collect(),
                    ..Chain::of(Traffic::Network(filters))
                });
            }
        }
    }
    out
}

/// The VirtualServices that are bound to the server's Gateway and speak about one of its hosts.
fn bound<'a>(
    context: &'a Context<'_>,
    server: &'a MergedServer,
) -> impl Iterator<Item = &'a std::sync::Arc<Routes>> {
    let all = context
        .mesh
        .virtual_services()
        .for_gateway(context.proxy.namespace(), &server.gateway);
    all.filter(|routes| {
        routes.spec().hosts.iter().any(|wanted| {
            server.server.hosts.iter().any(|own| {
                let own = match own.split_once('/') {
                    Some((namespace, _)) if namespace != routes.namespace() => return false,
                    Some((_, name)) => name,
                    None => own,
                };
                host::matches(own, wanted)
            })
        })
    })
}

fn applies(server: &MergedServer, port: u32, gateways: &[String]) -> bool {
    (port == 0 || port == server.port)
        && (gateways.is_empty() || gateways.contains(&server.gateway))
}

fn port_of(server: &MergedServer) -> Port {
    Port {
        name: server
            .server
            .port
            .as_ref()
            .map(|p| p.name.clone())
            .unwrap_or_default(),
        number: server.port,
        protocol: server.protocol,
        target: TargetPort::Number(server.port),
    }
}
