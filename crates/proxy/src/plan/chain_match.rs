//! Which filter chain takes a connection: Envoy's order of conditions, without backtracking.
//!
//! The conditions are looked at one after the other: destination port, destination address (longest prefix), SNI
//! (exact, then the longest wildcard), transport protocol, application protocol (the client's order), direct source,
//! source type, source address, source port. At each step only the chains of the most specific value that fits go on.
//! When a later step leaves none, no earlier step is reconsidered: the default chain takes the connection, or nobody.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use super::listener::{FilterChain, FilterChainMatch, Listener, SourceType};

/// What is known of a connection when its chain is chosen.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The address the client meant (restored where it was redirected); none over a pipe.
    pub destination: Option<SocketAddr>,
    /// The client, after any PROXY header; none over a pipe.
    pub source: Option<SocketAddr>,
    /// The peer of the socket.
    pub direct_source: Option<SocketAddr>,
    /// SNI, empty when there is none.
    pub server_name: &'a str,
    /// `tls` or `raw_buffer`, as the listener filters left it.
    pub transport_protocol: &'a str,
    /// ALPN in the client's order, or what the HTTP inspector found.
    pub application_protocols: &'a [&'a str],
}

/// Chains by destination port, so that a listener with many ports (15006) looks at few.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ChainTable {
    /// Sorted by port; `None` (any port) comes first.
    by_port: Vec<(Option<u16>, Vec<u32>)>,
}

impl ChainTable {
    /// Sorts chains. The error names two chains (by index) that some connection would fit equally well.
    pub(crate) fn new(chains: &[Arc<FilterChain>]) -> Result<Self, (usize, usize)> {
        let mut by_port: Vec<(Option<u16>, Vec<u32>)> = Vec::new();
        for (index, chain) in chains.iter().enumerate() {
            let conditions = &chain.filter_chain_match;
            let port = conditions.destination_port;
            let list = match by_port.binary_search_by(|(p, _)| p.cmp(&port)) {
                Ok(at) => &mut by_port[at].1,
                Err(at) => {
                    by_port.insert(at, (port, Vec::new()));
                    &mut by_port[at].1
                }
            };
            for other in list.iter() {
                if overlap(conditions, &chains[*other as usize].filter_chain_match) {
                    return Err((*other as usize, index));
                }
            }
            list.push(index as u32);
        }
        Ok(Self { by_port })
    }

    fn of_port(&self, port: Option<u16>) -> Option<&[u32]> {
        let at = self.by_port.binary_search_by(|(p, _)| p.cmp(&port)).ok()?;
        Some(&self.by_port[at].1)
    }
}

impl Listener {
    /// The chain that takes a connection: one of the list, the default one, or none (the connection is closed).
    pub fn find_chain(&self, connection: &Connection<'_>) -> Option<&Arc<FilterChain>> {
        self.find_listed(connection)
            .or(self.default_filter_chain.as_ref())
    }

    fn find_listed(&self, connection: &Connection<'_>) -> Option<&Arc<FilterChain>> {
        let port = connection.destination.map(|d| d.port());
        // A port that some chain names is served by its chains alone.
        let list = match port.and_then(|p| self.chain_table.of_port(Some(p))) {
            Some(list) => list,
            None => self.chain_table.of_port(None)?,
        };
        let conditions = |i: &u32| &self.filter_chains[*i as usize].filter_chain_match;
        let found = sieve(list, conditions, connection)?;
        Some(&self.filter_chains[found as usize])
    }
}

fn sieve<'a>(
    list: &[u32],
    of: impl Fn(&u32) -> &'a FilterChainMatch,
    connection: &Connection<'_>,
) -> Option<u32> {
    let mut left: Vec<u32> = list.to_vec();
    by_prefix(&mut left, &of, connection.destination, |m| &m.prefix_ranges);
    by_server_name(&mut left, &of, connection.server_name);
    by_text(
        &mut left,
        &of,
        |m, wanted| match wanted {
            Some(text) => m.transport_protocol.as_deref() == Some(text),
            None => m.transport_protocol.is_none(),
        },
        &[connection.transport_protocol],
    );
    by_text(
        &mut left,
        &of,
        |m, wanted| match wanted {
            Some(text) => m.application_protocols.iter().any(|p| **p == *text),
            None => m.application_protocols.is_empty(),
        },
        connection.application_protocols,
    );
    by_prefix(&mut left, &of, connection.direct_source, |m| {
        &m.direct_source_prefix_ranges
    });
    by_source_type(&mut left, &of, connection);
    by_prefix(&mut left, &of, connection.source, |m| {
        &m.source_prefix_ranges
    });
    by_source_port(&mut left, &of, connection.source.map(|s| s.port()));
    left.first().copied()
}

/// Keeps the chains of the longest prefix that holds the address; an empty list is the prefix of length 0.
fn by_prefix<'a>(
    left: &mut Vec<u32>,
    of: &impl Fn(&u32) -> &'a FilterChainMatch,
    address: Option<SocketAddr>,
    ranges: impl Fn(&FilterChainMatch) -> &[IpNet],
) {
    let ip = address.map(|a| a.ip().to_canonical());
    let best = |m: &FilterChainMatch| {
        let ranges = ranges(m);
        if ranges.is_empty() {
            return Some(0);
        }
        ranges
            .iter()
            .filter(|n| ip.is_some_and(|ip| n.contains(&ip)))
            .map(IpNet::prefix_len)
            .max()
    };
    let Some(longest) = left.iter().filter_map(|i| best(of(i))).max() else {
        left.clear();
        return;
    };
    left.retain(|i| {
        let ranges = ranges(of(i));
        (ranges.is_empty() && longest == 0)
            || ranges
                .iter()
                .any(|n| n.prefix_len() == longest && ip.is_some_and(|ip| n.contains(&ip)))
    });
}

/// Keeps the chains of the exact name, else of the longest wildcard, else those without names.
fn by_server_name<'a>(
    left: &mut Vec<u32>,
    of: &impl Fn(&u32) -> &'a FilterChainMatch,
    server_name: &str,
) {
    if left.iter().all(|i| of(i).server_names.is_empty()) {
        return;
    }
    let name: Cow<'_, str> = match server_name.bytes().any(|b| b.is_ascii_uppercase()) {
        true => server_name.to_ascii_lowercase().into(),
        false => server_name.into(),
    };
    let names =
        |i: &u32, wanted: &dyn Fn(&str) -> bool| of(i).server_names.iter().any(|have| wanted(have));
    if !name.is_empty() {
        let exact = |have: &str| have == name;
        if left.iter().any(|i| names(i, &exact)) {
            return left.retain(|i| names(i, &exact));
        }
        let mut rest: &str = &name;
        // `*.b.c` takes `a.b.c` and `x.a.b.c`, not `b.c`.
        while let Some(dot) = rest.get(1..).and_then(|r| r.find('.')) {
            rest = &rest[dot + 1..];
            let wildcard = |have: &str| have.strip_prefix('*') == Some(rest);
            if left.iter().any(|i| names(i, &wildcard)) {
                return left.retain(|i| names(i, &wildcard));
            }
        }
    }
    left.retain(|i| of(i).server_names.is_empty());
}

/// Keeps the chains that name the first of the texts that any chain names, else those that name none.
fn by_text<'a>(
    left: &mut Vec<u32>,
    of: &impl Fn(&u32) -> &'a FilterChainMatch,
    names: impl Fn(&FilterChainMatch, Option<&str>) -> bool,
    texts: &[&str],
) {
    let wanted = texts
        .iter()
        .filter(|t| !t.is_empty())
        .find(|t| left.iter().any(|i| names(of(i), Some(t))))
        .copied();
    left.retain(|i| names(of(i), wanted));
}

fn by_source_type<'a>(
    left: &mut Vec<u32>,
    of: &impl Fn(&u32) -> &'a FilterChainMatch,
    connection: &Connection<'_>,
) {
    if left.iter().all(|i| of(i).source_type == SourceType::Any) {
        return;
    }
    let local = match (connection.source, connection.destination) {
        (Some(source), Some(destination)) => {
            source.ip() == destination.ip() || is_loopback(source.ip())
        }
        // Both ends of a pipe are on this host.
        _ => true,
    };
    let wanted = if local {
        SourceType::SameIpOrLoopback
    } else {
        SourceType::External
    };
    let kept = if left.iter().any(|i| of(i).source_type == wanted) {
        wanted
    } else {
        SourceType::Any
    };
    left.retain(|i| of(i).source_type == kept);
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

fn by_source_port<'a>(
    left: &mut Vec<u32>,
    of: &impl Fn(&u32) -> &'a FilterChainMatch,
    port: Option<u16>,
) {
    let named = |i: &u32| port.is_some_and(|p| of(i).source_ports.contains(&p));
    match left.iter().any(named) {
        true => left.retain(named),
        false => left.retain(|i| of(i).source_ports.is_empty()),
    }
}

/// Whether two chains of the same port share a value at every step.
fn overlap(a: &FilterChainMatch, b: &FilterChainMatch) -> bool {
    fn share<T: PartialEq>(a: &[T], b: &[T]) -> bool {
        (a.is_empty() && b.is_empty()) || a.iter().any(|x| b.contains(x))
    }
    fn prefixes(a: &[IpNet], b: &[IpNet]) -> bool {
        let any = |list: &[IpNet]| list.is_empty() || list.iter().any(|n| n.prefix_len() == 0);
        (any(a) && any(b)) || a.iter().any(|x| b.iter().any(|y| x.trunc() == y.trunc()))
    }
    a.transport_protocol == b.transport_protocol
        && a.source_type == b.source_type
        && share(&a.application_protocols, &b.application_protocols)
        && share(&a.server_names, &b.server_names)
        && share(&a.source_ports, &b.source_ports)
        && prefixes(&a.prefix_ranges, &b.prefix_ranges)
        && prefixes(
            &a.direct_source_prefix_ranges,
            &b.direct_source_prefix_ranges,
        )
        && prefixes(&a.source_prefix_ranges, &b.source_prefix_ranges)
}
