//! The listeners of outgoing connections: one for each address and port that some service is called by.
//!
//! Services are taken in order of age. HTTP services of one port share a wildcard listener and are told apart by
//! `Host`; others listen on their own address. Where two want the same address and port, their chains are merged if
//! that is possible, else the first keeps the port.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use proto::envoy::config::{
    core::v3::TrafficDirection,
    listener::v3::{
        AdditionalAddress, FilterChain, FilterChainMatch, Listener,
        listener::ConnectionBalanceConfig,
        listener::connection_balance_config::{BalanceType, ExactBalance},
    },
};
use proto::istio::networking::v1alpha3::CaptureMode;

use super::{
    Built, Context, Part,
    chain::{Chain, PASSTHROUGH_CHAIN, RAW_BUFFER, Traffic, address},
    env::Interception,
    filters,
    settings::Class,
    tcp,
};
use crate::{
    model::{
        EgressListener, Origin, OutboundMode, Port, Protocol, Registry, Resolution, Service,
        TargetPort, service::UNSPECIFIED,
    },
    names,
    route::NO_TIMEOUT,
};

/// A listener before it is finished.
#[derive(Debug)]
struct Entry {
    bind: Vec<String>,
    really_bound: bool,
    port: u32,
    protocol: Protocol,
    /// Declared by a Sidecar with this port: services of other egress listeners stay out.
    locked: bool,
    chains: Vec<Chain>,
    from: Vec<Origin>,
    of_pod: bool,
}

/// Address and port: what a listener is known by.
type Key = (String, u32);

/// What one port of a service asks for.
#[derive(Debug)]
struct Claim<'a> {
    service: &'a Service,
    port: Cow<'a, Port>,
    treatment: Treatment,
    bind: Vec<String>,
    /// Networks that the chains are for, where the address does not tell.
    destinations: Vec<String>,
    really_bound: bool,
    /// The address is that of one pod of a headless service.
    of_pod: bool,
}

impl Claim<'_> {
    fn key(&self) -> Key {
        let primary = self.bind.first().cloned().unwrap_or_default();
        (primary, self.port.number)
    }
}

/// How a listener treats a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    Http,
    Tcp,
    /// HTTP is told from the bytes.
    Sniffed,
}

type Entries = BTreeMap<Key, Entry>;

/// A part of the outbound listeners, the virtual one aside.
pub fn build(context: &Context<'_>, part: Part) -> Vec<Built> {
    let egress = &context.proxy.scope.egress;
    let claims: Vec<Vec<Claim<'_>>> = egress.iter().map(|e| claims(context, e)).collect();
    // A listener belongs to one part with all that is in it; only the wanted ones are worked out.
    let mut own: BTreeMap<Key, bool> = BTreeMap::new();
    for claim in claims.iter().flatten() {
        *own.entry(claim.key()).or_default() |= is_own(context, claim);
    }
    let mut entries = Entries::new();
    for (egress, claims) in egress.iter().zip(claims) {
        if egress.port().is_none() {
            entries.values_mut().for_each(|e| e.locked = true);
        }
        for claim in claims {
            let key = claim.key();
            if own.get(&key) == Some(&(part == Part::Own)) {
                add(context, egress, claim, key, &mut entries);
            }
        }
    }
    entries
        .into_values()
        .map(|entry| finish(context, entry))
        .collect()
}

/// Whether the claim's listener is not the same for all proxies of a view: spans of HTTP requests carry the name of
/// the workload.
fn is_own(context: &Context<'_>, claim: &Claim<'_>) -> bool {
    let tracing = &context.env.reports(Class::Outbound).tracing;
    let named = tracing.as_ref().is_some_and(|t| !t.custom_tags.is_empty());
    named && claim.treatment != Treatment::Tcp
}

/// The listener of clients that are told to use a proxy (`proxyHttpPort`).
pub fn http_proxy(context: &Context<'_>) -> Option<Built> {
    let own = context.proxy.node.number("HTTP_PROXY_PORT");
    let port = own.unwrap_or(context.env.mesh.proxy_http_port.max(0) as u32);
    if port == 0 {
        return None;
    }
    let chain = Chain::of(Traffic::Http {
        routes: "http_proxy".to_owned(),
        grpc_web: false,
        http_proxy: true,
        stat_prefix: None,
    });
    let entry = Entry {
        bind: owned(context.env.families.localhosts()),
        really_bound: true,
        port,
        protocol: Protocol::HttpProxy,
        locked: false,
        chains: vec![chain],
        from: Vec::new(),
        of_pod: false,
    };
    Some(finish(context, entry))
}

/// Filters of what no service is known for: through, refused, or to the egress proxy.
pub fn catch_all_filters(context: &Context<'_>) -> Vec<proto::envoy::config::listener::v3::Filter> {
    let cluster = catch_all_cluster(context);
    let mut out = context.tcp_stats(Class::Outbound);
    out.push(tcp::to_cluster(
        &context.env,
        Class::Outbound,
        &cluster,
        true,
    ));
    out
}

/// Where traffic to unknown hosts goes.
pub fn catch_all_cluster(context: &Context<'_>) -> String {
    let scope = &context.proxy.scope;
    match (scope.outbound_mode, &scope.egress_proxy) {
        (OutboundMode::RegistryOnly, _) => names::BLACK_HOLE.to_owned(),
        (OutboundMode::AllowAny, Some(to)) => names::destination_cluster(to, None, 0),
        (OutboundMode::AllowAny, None) => names::PASSTHROUGH.to_owned(),
    }
}

/// What the services of an egress listener ask for, in their order.
fn claims<'a>(context: &Context<'_>, egress: &'a EgressListener) -> Vec<Claim<'a>> {
    let env = &context.env;
    let declared = egress.listener.as_ref();
    let bind = declared.map_or("", |l| l.bind.as_str());
    let really_bound = env.interception == Interception::None
        || declared.is_some_and(|l| {
            l.capture_mode() == CaptureMode::None || l.bind.starts_with("unix://")
        });
    let bind: Vec<String> = match bind {
        "" if really_bound => owned(env.families.localhosts()),
        "" => Vec::new(),
        bind => vec![bind.to_owned()],
    };
    let primary = bind.first().cloned().unwrap_or_default();
    let may =
        |port: &Port| env.can_bind(really_bound, &primary, port.number, port.protocol.is_http());
    let claim = |service: &'a Service, port: Cow<'a, Port>, bind: Vec<String>, of_pod: bool| {
        let treatment = treatment(port.protocol)?;
        let (bind, destinations) = placement(context, service, treatment, bind);
        (service.resolution != Resolution::Alias).then_some(Claim {
            service,
            port,
            treatment,
            bind,
            destinations,
            really_bound,
            of_pod,
        })
    };
    let mut out = Vec::new();
    if let Some(port) = declared.and_then(|l| l.port.as_ref()) {
        let port = Port {
            name: port.name.clone(),
            number: port.number,
            protocol: Protocol::parse(&port.protocol),
            target: TargetPort::Number(port.number),
        };
        if may(&port) {
            let all = egress.services.iter();
            out.extend(all.filter_map(|s| claim(s, Cow::Owned(port.clone()), bind.clone(), false)));
        }
        return out;
    }
    for service in &egress.services {
        for port in service.ports.iter().filter(|p| may(p)) {
            match pods(context, service, port, &bind) {
                None => out.extend(claim(service, Cow::Borrowed(port), bind.clone(), false)),
                Some(pods) => out.extend(
                    pods.into_iter()
                        .filter_map(|pod| claim(service, Cow::Borrowed(port), vec![pod], true)),
                ),
            }
        }
    }
    out
}

/// The addresses of the pods of a headless service, which has nothing else that it could be called by. `None` for
/// other services.
fn pods(
    context: &Context<'_>,
    service: &Service,
    port: &Port,
    bind: &[String],
) -> Option<Vec<String>> {
    let per_pod = bind.is_empty()
        && service.resolution == Resolution::Passthrough
        && service.address_for(context.proxy) == UNSPECIFIED
        && (port.protocol.is_tcp() || port.protocol.is_unsupported());
    if !per_pod {
        return None;
    }
    let endpoints = context.mesh.endpoints(service, port.number);
    if endpoints.is_empty() && service.registry == Registry::External && service.selector.is_empty()
    {
        return None;
    }
    let addresses = endpoints.iter().map(|e| &e.address);
    Some(
        addresses
            .filter(|a| a.parse::<IpAddr>().is_ok())
            .cloned()
            .collect(),
    )
}

/// `None` for what is not listened to (UDP).
fn treatment(protocol: Protocol) -> Option<Treatment> {
    if protocol.is_http() {
        Some(Treatment::Http)
    } else if protocol.is_tcp() {
        Some(Treatment::Tcp)
    } else if protocol.is_unsupported() {
        Some(Treatment::Sniffed)
    } else {
        None
    }
}

/// Puts a service's port into the listener of its address: a new one, or beside what is already there.
fn add(
    context: &Context<'_>,
    egress: &EgressListener,
    wish: Claim<'_>,
    key: Key,
    entries: &mut Entries,
) {
    let treatment = wish.treatment;
    let wildcard = context.env.families.wildcard();
    let primary = key.0.clone();
    let current = entries.get(&key);
    if current.is_some_and(|e| e.locked) {
        return;
    }
    let tcp = || {
        tcp::Outbound {
            service: wish.service,
            port: &wish.port,
            bind: primary.clone(),
            destinations: wish.destinations.clone(),
            virtual_services: &egress.virtual_services,
        }
        .chains(context)
    };
    let is_http_proxy = wish.port.protocol == Protocol::HttpProxy;
    let sniffed = treatment == Treatment::Sniffed;
    let http = |to_match: bool| http_chain(context, &wish, &primary, sniffed, to_match);

    let mut protocol = wish.port.protocol;
    let (chains, mut from) = match (treatment, current) {
        _ if is_http_proxy => (vec![http(false)], Vec::new()),
        // HTTP shares the listener: its routes tell the services apart.
        (Treatment::Http, Some(e)) if !e.protocol.is_tcp() => {
            if let Some(entry) = entries.get_mut(&key) {
                entry.from.push(wish.service.origin.clone());
            }
            return;
        }
        (Treatment::Http, _) => {
            let shared = primary == wildcard;
            if shared {
                // Strangers may use the port too, so only what looks like HTTP is taken.
                protocol = Protocol::Unsupported;
            }
            (vec![http(shared)], Vec::new())
        }
        (Treatment::Tcp, _) => tcp(),
        // HTTP is sniffed there already: only the rest is missing.
        (Treatment::Sniffed, Some(e)) if e.protocol.is_unsupported() => tcp(),
        (Treatment::Sniffed, _) => {
            let (mut chains, from) = tcp();
            chains.push(http(true));
            (chains, from)
        }
    };
    from.insert(0, wish.service.origin.clone());

    let Some(entry) = entries.get_mut(&key) else {
        let entry = Entry {
            bind: wish.bind,
            really_bound: wish.really_bound,
            port: wish.port.number,
            protocol,
            locked: false,
            chains,
            from,
            of_pod: wish.of_pod,
        };
        entries.insert(key, entry);
        return;
    };
    if server_first_conflict(wish.port.protocol, entry.protocol) {
        tracing::warn!(
            "{} port {} gets no listener at {}:{}: {} is already served there, and the server speaks first in one of them; \
             give one of the services another port or address",
            wish.service.origin,
            wish.port.number,
            primary,
            entry.port,
            entry.protocol.name()
        );
        return;
    }
    if sniffed && entry.protocol.is_http() {
        entry.chains = chains;
        entry.from.extend(from);
        entry.protocol = protocol;
        return;
    }
    let becomes_sniffed = match treatment {
        Treatment::Http => true,
        Treatment::Tcp => entry.protocol.is_http(),
        Treatment::Sniffed => entry.protocol.is_tcp(),
    };
    merge(entry, chains, from);
    if becomes_sniffed {
        entry.protocol = Protocol::Unsupported;
    }
}

/// The addresses that a port is listened to on, and the networks that its chains then have to match.
fn placement(
    context: &Context<'_>,
    service: &Service,
    treatment: Treatment,
    bind: Vec<String>,
) -> (Vec<String>, Vec<String>) {
    let families = context.env.families;
    let wildcards = || owned(families.wildcards());
    if !bind.is_empty() {
        return (bind, Vec::new());
    }
    if treatment == Treatment::Http {
        return (wildcards(), Vec::new());
    }
    let mut addresses = vec![service.address_for(context.proxy)];
    addresses.extend(service.addresses_for(context.proxy).into_iter().skip(1));
    if addresses[0] == UNSPECIFIED && service.registry == Registry::External {
        addresses = wildcards();
    }
    if addresses[0].contains('/') {
        (wildcards(), addresses)
    } else {
        (addresses, Vec::new())
    }
}

fn owned(addresses: &[&str]) -> Vec<String> {
    addresses.iter().map(|a| (*a).to_owned()).collect()
}

fn http_chain(
    context: &Context<'_>,
    wish: &Claim<'_>,
    bind: &str,
    sniffed: bool,
    to_match: bool,
) -> Chain {
    let number = wish.port.number;
    let routes = if number == 0 {
        // A unix socket has no port to be named after.
        bind.to_owned()
    } else if sniffed && bind != context.env.families.wildcard() {
        format!("{}:{number}", wish.service.hostname)
    } else {
        number.to_string()
    };
    let mut chain = Chain::of(Traffic::Http {
        routes,
        grpc_web: wish.port.protocol == Protocol::GrpcWeb,
        http_proxy: false,
        stat_prefix: None,
    });
    if to_match {
        chain.application_protocols = context.env.plain_http_alpn();
        chain.transport_protocol = RAW_BUFFER;
    }
    chain
}

/// A protocol in which the server speaks first cannot be told from the client's bytes.
fn server_first_conflict(new: Protocol, old: Protocol) -> bool {
    let server_first = |p| matches!(p, Protocol::Mongo | Protocol::MySql);
    new != old && (server_first(new) || server_first(old))
}

/// Adds the chains that collide with none there is; the older service keeps the rest.
fn merge(entry: &mut Entry, chains: Vec<Chain>, from: Vec<Origin>) {
    for chain in chains {
        if entry.chains.iter().any(|c| c.collides_with(&chain)) {
            tracing::debug!(
                "{:?}:{}: a chain is dropped: an older service has its match",
                entry.bind,
                entry.port
            );
        } else {
            entry.chains.push(chain);
        }
    }
    entry.from.extend(from);
}

fn finish(context: &Context<'_>, entry: Entry) -> Built {
    let env = &context.env;
    let primary = entry.bind.first().cloned().unwrap_or_default();
    let name = format!("{primary}_{}", entry.port);
    let mut out = Listener {
        address: Some(address(&primary, entry.port)),
        additional_addresses: entry
            .bind
            .iter()
            .skip(1)
            .map(|b| AdditionalAddress {
                address: Some(address(b, entry.port)),
                ..Default::default()
            })
            .collect(),
        traffic_direction: TrafficDirection::Outbound.into(),
        continue_on_listener_filters_timeout: true,
        connection_balance_config: exact_balance(env.exact_balance),
        listener_filters_timeout: Some(NO_TIMEOUT),
        ..Default::default()
    };
    if entry.really_bound {
        out.max_connections_to_accept_per_socket_event = env.compat.max_connections_per_event();
    } else {
        out.bind_to_port = Some(false);
    }
    if entry.chains.iter().any(Chain::needs_tls_inspector) {
        out.listener_filters.push(filters::tls_inspector());
    }
    if entry
        .chains
        .iter()
        .any(|c| !c.application_protocols.is_empty())
    {
        out.listener_filters.push(filters::http_inspector());
        out.listener_filters_timeout = context.detection_timeout();
    }
    for chain in entry.chains {
        let everything = chain.is_match_all();
        let built = chain.build(env, Class::Outbound, &name);
        if everything {
            out.default_filter_chain = Some(built);
        } else {
            out.filter_chains.push(built);
        }
    }
    if out.filter_chains.is_empty() {
        out.filter_chains.extend(out.default_filter_chain.take());
    } else if out.default_filter_chain.is_none() {
        out.default_filter_chain = Some(FilterChain {
            filter_chain_match: Some(FilterChainMatch::default()),
            filters: catch_all_filters(context),
            name: PASSTHROUGH_CHAIN.to_owned(),
            ..Default::default()
        });
    }
    out.name = name;
    Built {
        listener: out,
        from: entry.from,
        of_pod: entry.of_pod.then_some(primary),
    }
}

/// Connections are spread evenly over the workers, at a price.
pub fn exact_balance(on: bool) -> Option<ConnectionBalanceConfig> {
    on.then_some(ConnectionBalanceConfig {
        balance_type: Some(BalanceType::ExactBalance(ExactBalance {})),
    })
}
