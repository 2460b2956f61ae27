//! `virtualInbound`: what is accepted from the mesh, port by port, with and without mutual TLS.

use std::collections::BTreeMap;

use proto::{
    envoy::{
        config::{
            core::v3::{CidrRange, Metadata, TrafficDirection},
            listener::v3::{
                Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter,
                ListenerFilterChainMatchPredicate,
                listener_filter_chain_match_predicate::{MatchSet, Rule},
            },
            route::v3::{RouteConfiguration, VirtualHost},
        },
        extensions::transport_sockets::tls::v3::DownstreamTlsContext,
        r#type::v3::Int32Range,
    },
    istio::networking::v1alpha3::CaptureMode,
};

use super::{
    Built, Context,
    chain::{RAW_BUFFER, TLS, address, range},
    env::Interception,
    filters,
    hcm::{Http, Routes},
    outbound::exact_balance,
    settings::Class,
    tcp, tls,
};
use crate::{
    model::{MtlsMode, Origin, Protocol, Registry},
    names, route,
};

/// Name of the listener, and of the chains that take bytes for any port.
pub const VIRTUAL_INBOUND: &str = "virtualInbound";
const CATCH_ALL_HTTP: &str = "virtualInbound-catchall-http";
const BLACK_HOLE: &str = "virtualInbound-blackhole";

/// ALPN of HTTP inside mutual TLS.
const MUTUAL_HTTP: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// ALPN of bytes inside mutual TLS.
const MUTUAL_TCP: &[&str] = &["istio-peer-exchange", "istio"];
/// ALPN of anything inside mutual TLS.
pub const MUTUAL_ANY: &[&str] = &[
    "istio",
    "istio-peer-exchange",
    "istio-http/1.0",
    "istio-http/1.1",
    "istio-h2",
];
const PLAIN_HTTP: &[&str] = &["http/1.1", "h2c"];

/// One way in which a port can be called.
struct Way {
    alpn: &'static [&'static str],
    transport: &'static str,
    http: bool,
    /// Mutual TLS ends here.
    terminates: bool,
}

const fn way(
    alpn: &'static [&'static str],
    transport: &'static str,
    http: bool,
    terminates: bool,
) -> Way {
    Way {
        alpn,
        transport,
        http,
        terminates,
    }
}

/// The ways that a mode opens for a protocol.
fn ways(mode: MtlsMode, protocol: Protocol) -> &'static [Way] {
    const ANY: &[&str] = &[];
    match (mode, kind(protocol)) {
        (MtlsMode::Permissive, Kind::Http) => {
            const {
                &[
                    way(MUTUAL_ANY, TLS, true, true),
                    way(ANY, RAW_BUFFER, true, false),
                ]
            }
        }
        (MtlsMode::Permissive, Kind::Tcp) => {
            const {
                &[
                    way(MUTUAL_ANY, TLS, false, true),
                    way(ANY, TLS, false, false),
                    way(ANY, RAW_BUFFER, false, false),
                ]
            }
        }
        (MtlsMode::Permissive, Kind::Sniffed) => {
            const {
                &[
                    way(MUTUAL_HTTP, TLS, true, true),
                    way(PLAIN_HTTP, RAW_BUFFER, true, false),
                    way(MUTUAL_TCP, TLS, false, true),
                    way(ANY, RAW_BUFFER, false, false),
                    way(ANY, TLS, false, false),
                ]
            }
        }
        (MtlsMode::Strict, Kind::Http) => const { &[way(ANY, TLS, true, true)] },
        (MtlsMode::Strict, Kind::Tcp) => const { &[way(ANY, TLS, false, true)] },
        (MtlsMode::Strict, Kind::Sniffed) => {
            const {
                &[
                    way(MUTUAL_HTTP, TLS, true, true),
                    way(ANY, TLS, false, true),
                ]
            }
        }
        (MtlsMode::Disable, Kind::Http) => const { &[way(ANY, RAW_BUFFER, true, false)] },
        (MtlsMode::Disable, Kind::Tcp) => const { &[way(ANY, RAW_BUFFER, false, false)] },
        (MtlsMode::Disable, Kind::Sniffed) => {
            const {
                &[
                    way(PLAIN_HTTP, RAW_BUFFER, true, false),
                    way(ANY, RAW_BUFFER, false, false),
                ]
            }
        }
    }
}

enum Kind {
    Http,
    Tcp,
    Sniffed,
}

/// Everything that is neither HTTP nor of unknown protocol is bytes here.
fn kind(protocol: Protocol) -> Kind {
    if protocol.is_http() {
        Kind::Http
    } else if protocol.is_unsupported() {
        Kind::Sniffed
    } else {
        Kind::Tcp
    }
}

/// One port that is served.
#[derive(Debug, Clone)]
struct Served {
    /// The port of the workload; 0 for all ports that nobody names.
    target_port: u32,
    /// The port that callers name.
    port: u32,
    port_name: String,
    protocol: Protocol,
    /// Whom callers mean: the service's host, or `SIDECAR.NAMESPACE`.
    hostname: String,
    /// `(name, namespace)` of a Kubernetes service, for statistics.
    kubernetes: Option<(String, String)>,
    cluster: String,
    bind: String,
    really_bound: bool,
    metadata: Option<Metadata>,
    from: Vec<Origin>,
}

impl Served {
    fn is_catch_all(&self) -> bool {
        self.port == 0
    }

    fn chain_name(&self, http: bool) -> String {
        match (self.is_catch_all(), http) {
            (true, true) => CATCH_ALL_HTTP.to_owned(),
            (true, false) => VIRTUAL_INBOUND.to_owned(),
            _ => format!("{}_{}", self.bind, self.target_port),
        }
    }
}

/// The virtual listener (where connections are redirected to it), then those that are really bound.
pub fn build(context: &Context<'_>) -> Vec<Built> {
    let mut virtual_chains = Vec::new();
    let mut virtual_from = context.env.enforcement.from.clone();
    let mut bound = Vec::new();
    let contexts = tls::inbound_mutual(context.env.mesh, &context.env.certificates);
    for served in served_ports(context) {
        let mode = context.proxy.mtls.port(served.target_port);
        let chains = chains(context, &served, mode, &contexts);
        if served.really_bound {
            let name = served.chain_name(false);
            let listener = listener(
                context,
                &name,
                &served.bind,
                served.target_port,
                true,
                chains,
            );
            bound.push(Built {
                listener,
                from: served.from,
                of_pod: None,
            });
        } else {
            virtual_chains.extend(chains);
            virtual_from.extend(served.from);
        }
    }
    if context.env.interception != Interception::None {
        let mut all = vec![black_hole(context)];
        for (port, mode) in catch_all_ports(context) {
            all.extend(chains(context, &catch_all(context, port), mode, &contexts));
        }
        all.extend(virtual_chains);
        let wildcard = context.env.families.wildcard();
        let port = context.env.inbound_port();
        let listener = listener(context, VIRTUAL_INBOUND, wildcard, port, false, all);
        bound.insert(
            0,
            Built {
                listener,
                from: virtual_from,
                of_pod: None,
            },
        );
    }
    bound
}

/// What callers may reach, by port of the workload. A Sidecar's ingress replaces what services say.
fn served_ports(context: &Context<'_>) -> Vec<Served> {
    let mut out: BTreeMap<u32, Served> = BTreeMap::new();
    if context.proxy.scope.has_ingress() {
        for served in ingress_ports(context) {
            out.entry(served.target_port).or_insert(served);
        }
    } else if context.env.interception != Interception::None {
        for served in service_ports(context) {
            // The older service keeps the port.
            out.entry(served.target_port).or_insert(served);
        }
    }
    out.into_values().collect()
}

fn service_ports<'a>(context: &'a Context<'_>) -> impl Iterator<Item = Served> + 'a {
    let bind = context.env.families.wildcard();
    let targets = context.proxy.service_targets.iter();
    targets
        .filter(move |t| {
            context
                .env
                .can_bind(false, bind, t.target_port, t.port.protocol.is_http())
        })
        .map(move |t| Served {
            target_port: t.target_port,
            port: t.port.number,
            port_name: t.port.name.clone(),
            protocol: t.port.protocol,
            hostname: t.service.hostname.clone(),
            kubernetes: (t.service.registry == Registry::Kubernetes)
                .then(|| (t.service.name.clone(), t.service.namespace.clone())),
            cluster: names::inbound_cluster(t.target_port),
            bind: bind.to_owned(),
            really_bound: false,
            metadata: None,
            from: vec![t.service.origin.clone()],
        })
}

fn ingress_ports(context: &Context<'_>) -> Vec<Served> {
    let scope = &context.proxy.scope;
    let Some(sidecar) = &scope.sidecar else {
        return Vec::new();
    };
    let not_captured = context.env.interception == Interception::None;
    let own_address = context
        .proxy
        .node
        .addresses
        .first()
        .map(ToString::to_string);
    let mut out = Vec::new();
    for ingress in &sidecar.spec.ingress {
        let Some(port) = &ingress.port else { continue };
        let protocol = Protocol::parse(&port.protocol);
        let really_bound = match ingress.capture_mode() {
            CaptureMode::Default => not_captured,
            mode => mode == CaptureMode::None,
        };
        if !context
            .env
            .can_bind(really_bound, &ingress.bind, port.number, protocol.is_http())
        {
            tracing::warn!(
                "Sidecar {}/{}: ingress port {} is left out: the proxy itself uses it or may not bind it",
                sidecar.meta.namespace,
                sidecar.meta.name,
                port.number
            );
            continue;
        }
        let bind = match ingress.bind.as_str() {
            "" => own_address
                .clone()
                .unwrap_or_else(|| context.env.families.wildcard().to_owned()),
            bind => bind.to_owned(),
        };
        out.push(Served {
            target_port: port.number,
            port: port.number,
            port_name: port.name.clone(),
            protocol,
            hostname: format!("{}.{}", scope.name, scope.namespace),
            kubernetes: None,
            cluster: names::inbound_cluster(port.number),
            bind,
            really_bound,
            metadata: Some(names::config_metadata(
                names::NETWORKING,
                "sidecar",
                &scope.namespace,
                &scope.name,
            )),
            from: scope.origin().into_iter().collect(),
        });
    }
    out
}

/// Ports that no service names: all of them at once, and each that has a mode of its own.
fn catch_all_ports(context: &Context<'_>) -> Vec<(u32, MtlsMode)> {
    let mtls = &context.proxy.mtls;
    let named = |port: u32| {
        if context.proxy.scope.has_ingress() {
            let sidecar = context.proxy.scope.sidecar.as_ref();
            let ingress = sidecar.into_iter().flat_map(|s| &s.spec.ingress);
            ingress
                .filter_map(|i| i.port.as_ref())
                .any(|p| p.number == port)
        } else {
            context
                .proxy
                .service_targets
                .iter()
                .any(|t| t.target_port == port)
        }
    };
    let special = mtls
        .ports
        .iter()
        .map(|(port, mode)| (*port, *mode))
        .filter(|(p, _)| !named(*p));
    std::iter::once((0, mtls.mode)).chain(special).collect()
}

fn catch_all(context: &Context<'_>, target_port: u32) -> Served {
    Served {
        target_port,
        port: 0,
        port_name: VIRTUAL_INBOUND.to_owned(),
        protocol: Protocol::Unsupported,
        hostname: String::new(),
        kubernetes: None,
        cluster: context.env.compat.inbound_passthrough_cluster().to_owned(),
        bind: String::new(),
        really_bound: false,
        metadata: None,
        from: Vec::new(),
    }
}

fn chains(
    context: &Context<'_>,
    served: &Served,
    mode: MtlsMode,
    (for_http, for_tcp): &(DownstreamTlsContext, DownstreamTlsContext),
) -> Vec<FilterChain> {
    let networks: Vec<CidrRange> = if served.is_catch_all() {
        let networks = context.env.compat.inbound_passthrough_networks();
        networks.iter().filter_map(|n| range(n)).collect()
    } else {
        Vec::new()
    };
    let chain = |way: &Way| FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            destination_port: Some(served.target_port).filter(|p| *p > 0),
            prefix_ranges: networks.clone(),
            transport_protocol: way.transport.to_owned(),
            application_protocols: way.alpn.iter().map(|a| (*a).to_owned()).collect(),
            ..Default::default()
        }),
        filters: if way.http {
            http_filters(context, served)
        } else {
            tcp_filters(context, served)
        },
        transport_socket: way
            .terminates
            .then(|| tls::socket(if way.http { for_http } else { for_tcp })),
        metadata: served.metadata.clone(),
        name: served.chain_name(way.http),
        ..Default::default()
    };
    ways(mode, served.protocol).iter().map(chain).collect()
}

fn http_filters(context: &Context<'_>, served: &Served) -> Vec<Filter> {
    let env = &context.env;
    let operation = format!("{}/*", names::host_port(&served.hostname, served.port));
    let routes = RouteConfiguration {
        name: served.cluster.clone(),
        virtual_hosts: vec![VirtualHost {
            name: format!("inbound|http|{}", served.port),
            domains: vec!["*".to_owned()],
            routes: vec![route::default_inbound(
                &served.cluster,
                operation,
                served.protocol.is_grpc(),
                env.compat,
            )],
            ..Default::default()
        }],
        validate_clusters: Some(false),
        ..Default::default()
    };
    let stat_prefix = if served.is_catch_all() {
        served.cluster.clone()
    } else {
        format!("inbound_{}", served.chain_name(true))
    };
    let stat_prefix = stat_prefix + env.compat.stat_prefix_end();
    let http = Http {
        grpc_web: served.protocol == Protocol::GrpcWeb,
        http2: served.protocol.is_http2(),
        ..Http::new(
            Class::Inbound,
            Routes::Inline(Box::new(routes)),
            stat_prefix,
        )
    };
    let mut out = metadata_exchange(context);
    out.push(http.filter(env));
    out
}

fn tcp_filters(context: &Context<'_>, served: &Served) -> Vec<Filter> {
    let env = &context.env;
    let stat_prefix = context
        .inbound_stat_prefix(
            served.kubernetes.as_ref(),
            &served.hostname,
            served.port,
            &served.port_name,
        )
        .unwrap_or_else(|| served.cluster.clone());
    tcp::Target {
        class: Class::Inbound,
        protocol: served.protocol,
        exchange: true,
        judged: true,
        rule: None,
    }
    .single(env, &served.cluster, &stat_prefix, "", false)
}

fn metadata_exchange(context: &Context<'_>) -> Vec<Filter> {
    if context.env.istio_filters {
        vec![filters::tcp_metadata_exchange()]
    } else {
        Vec::new()
    }
}

/// A connection to the listener's own port would come back to it for ever.
fn black_hole(context: &Context<'_>) -> FilterChain {
    let mut filters = metadata_exchange(context);
    filters.extend(context.tcp_stats(Class::Inbound));
    filters.push(tcp::to_cluster(
        &context.env,
        Class::Inbound,
        names::BLACK_HOLE,
        false,
    ));
    FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            destination_port: Some(context.env.inbound_port()),
            ..Default::default()
        }),
        filters,
        name: BLACK_HOLE.to_owned(),
        ..Default::default()
    }
}

fn listener(
    context: &Context<'_>,
    name: &str,
    bind: &str,
    port: u32,
    really_bound: bool,
    filter_chains: Vec<FilterChain>,
) -> Listener {
    let env = &context.env;
    let tproxy = !really_bound && env.interception == Interception::Tproxy;
    Listener {
        name: name.to_owned(),
        address: Some(address(bind, port)),
        traffic_direction: TrafficDirection::Inbound.into(),
        continue_on_listener_filters_timeout: true,
        max_connections_to_accept_per_socket_event: env.compat.max_connections_per_event(),
        connection_balance_config: exact_balance(
            context.proxy.node.flag("INBOUND_LISTENER_EXACT_BALANCE"),
        ),
        transparent: tproxy.then_some(true),
        access_log: env.reports(Class::Inbound).logs.listener.clone(),
        listener_filters: listener_filters(&filter_chains, really_bound, tproxy),
        listener_filters_timeout: context.detection_timeout(),
        filter_chains,
        ..Default::default()
    }
}

/// Who looks at a connection before a chain is chosen. An inspector waits for the client's first bytes, so it is left
/// out for ports where nothing depends on them: there the server may be the one to speak first.
fn listener_filters(
    chains: &[FilterChain],
    really_bound: bool,
    tproxy: bool,
) -> Vec<ListenerFilter> {
    let mut out = Vec::new();
    if !really_bound {
        out.push(filters::original_dst());
    }
    if tproxy {
        out.push(filters::original_src());
    }
    // By port (0: all others), whether TLS and HTTP have to be told apart.
    let mut needs: BTreeMap<u32, (bool, bool)> = BTreeMap::new();
    for m in chains.iter().filter_map(|c| c.filter_chain_match.as_ref()) {
        let (tls, http) = needs.entry(m.destination_port.unwrap_or(0)).or_default();
        *tls |= m.transport_protocol == TLS;
        *http |= m
            .application_protocols
            .iter()
            .any(|p| PLAIN_HTTP.contains(&p.as_str()));
    }
    if needs.values().any(|(tls, _)| *tls) {
        let by_default = needs.get(&0).is_some_and(|(tls, _)| *tls);
        let others = needs
            .iter()
            .filter(|(p, (tls, _))| **p != 0 && *tls != by_default);
        let ports: Vec<u32> = others.map(|(p, _)| *p).collect();
        let disabled = port_predicate(&ports);
        out.push(ListenerFilter {
            // Either not on these ports, or on no others.
            filter_disabled: if by_default {
                disabled
            } else {
                disabled.map(not)
            },
            ..filters::tls_inspector()
        });
    }
    if needs.values().any(|(_, http)| *http) {
        let without: Vec<u32> = needs
            .iter()
            .filter(|(_, (_, http))| !http)
            .map(|(p, _)| *p)
            .collect();
        out.push(ListenerFilter {
            filter_disabled: port_predicate(&without),
            ..filters::http_inspector()
        });
    }
    out
}

fn port_predicate(ports: &[u32]) -> Option<ListenerFilterChainMatchPredicate> {
    let range = |port: &u32| ListenerFilterChainMatchPredicate {
        rule: Some(Rule::DestinationPortRange(Int32Range {
            start: *port as i32,
            end: *port as i32 + 1,
        })),
    };
    match ports {
        [] => None,
        [one] => Some(range(one)),
        more => Some(ListenerFilterChainMatchPredicate {
            rule: Some(Rule::OrMatch(MatchSet {
                rules: more.iter().map(range).collect(),
            })),
        }),
    }
}

fn not(predicate: ListenerFilterChainMatchPredicate) -> ListenerFilterChainMatchPredicate {
    ListenerFilterChainMatchPredicate {
        rule: Some(Rule::NotMatch(Box::new(predicate))),
    }
}
