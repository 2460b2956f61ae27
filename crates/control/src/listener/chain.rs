//! Filter chains in the making: what they match, what they do, and when two of them collide.

use ipnet::IpNet;
use proto::{
    Duration,
    envoy::{
        config::{
            core::v3::{
                Address, CidrRange, Metadata, Pipe, SocketAddress, address, socket_address,
            },
            listener::v3::{Filter, FilterChain, FilterChainMatch},
        },
        extensions::transport_sockets::tls::v3::DownstreamTlsContext,
    },
};

use super::{
    env::Env,
    hcm::{Http, Routes},
    settings::Class,
    tls,
};

/// Name of the chain that takes what no other chain of an outbound listener matches.
pub const PASSTHROUGH_CHAIN: &str = "PassthroughFilterChain";
/// Bytes are not TLS.
pub const RAW_BUFFER: &str = "raw_buffer";
/// Bytes are TLS.
pub const TLS: &str = "tls";
/// A TLS handshake has to be over after this time.
const HANDSHAKE_TIMEOUT: Duration = Duration {
    seconds: 15,
    nanos: 0,
};

/// What happens on a chain's connections.
#[derive(Debug, Clone)]
pub enum Traffic {
    /// HTTP, by routes of this name.
    Http {
        routes: String,
        grpc_web: bool,
        http_proxy: bool,
        /// First part of the names of its statistics, where it is not the listener's name.
        stat_prefix: Option<String>,
    },
    /// Anything, through these filters.
    Network(Vec<Filter>),
}

/// A filter chain before its listener is finished.
#[derive(Debug, Clone)]
pub struct Chain {
    pub server_names: Vec<String>,
    pub destinations: Vec<String>,
    pub application_protocols: Vec<String>,
    pub transport_protocol: &'static str,
    pub metadata: Option<Metadata>,
    pub tls: Option<Box<DownstreamTlsContext>>,
    pub traffic: Traffic,
}

impl Chain {
    /// A chain that takes every connection.
    pub fn of(traffic: Traffic) -> Chain {
        Chain {
            server_names: Vec::new(),
            destinations: Vec::new(),
            application_protocols: Vec::new(),
            transport_protocol: "",
            metadata: None,
            tls: None,
            traffic,
        }
    }

    /// Whether the chain takes every connection.
    pub fn is_match_all(&self) -> bool {
        (self.server_names.is_empty() || self.server_names.iter().any(|n| n == "*"))
            && self.application_protocols.is_empty()
            && self.transport_protocol.is_empty()
            && self.destinations.is_empty()
    }

    /// Whether Envoy would refuse both chains in one listener, or never choose the second.
    pub fn collides_with(&self, other: &Chain) -> bool {
        self.transport_protocol == other.transport_protocol
            && self.application_protocols == other.application_protocols
            && names(&self.server_names) == names(&other.server_names)
            && networks(&self.destinations) == networks(&other.destinations)
    }

    /// Whether the listener has to look for a TLS hello to choose this chain.
    pub fn needs_tls_inspector(&self) -> bool {
        let offers_alpn = self
            .tls
            .as_ref()
            .and_then(|t| t.common_tls_context.as_ref())
            .is_some_and(|c| !c.alpn_protocols.is_empty());
        !self.server_names.is_empty() || offers_alpn
    }

    /// What Envoy matches; `None` for every connection.
    pub fn chain_match(&self) -> Option<FilterChainMatch> {
        if self.is_match_all() {
            return None;
        }
        let mut server_names = self.server_names.clone();
        server_names.sort();
        if server_names.iter().any(|n| n == "*") {
            server_names.clear();
        }
        let mut destinations = self.destinations.clone();
        destinations.sort();
        Some(FilterChainMatch {
            server_names,
            prefix_ranges: destinations.iter().filter_map(|d| cidr(d)).collect(),
            application_protocols: self.application_protocols.clone(),
            transport_protocol: self.transport_protocol.to_owned(),
            ..Default::default()
        })
    }

    /// The chain itself, in a listener of this name and port.
    pub fn build(self, env: &Env<'_>, class: Class, listener: &str) -> FilterChain {
        let filter_chain_match = self.chain_match();
        let filters = match self.traffic {
            Traffic::Network(filters) => filters,
            Traffic::Http {
                routes,
                grpc_web,
                http_proxy,
                stat_prefix,
            } => {
                let end = env.compat.stat_prefix_end();
                let stat_prefix =
                    stat_prefix.unwrap_or_else(|| format!("outbound_{listener}{end}"));
                let http = Http {
                    grpc_web,
                    http_proxy,
                    ..Http::new(class, Routes::Named(routes), stat_prefix)
                };
                vec![http.filter(env)]
            }
        };
        FilterChain {
            filter_chain_match,
            filters,
            metadata: self.metadata,
            transport_socket: self.tls.as_deref().map(tls::socket),
            transport_socket_connect_timeout: Some(HANDSHAKE_TIMEOUT),
            ..Default::default()
        }
    }
}

/// An address or network as a range to match; `None` for what matches everything, or nothing.
pub fn cidr(text: &str) -> Option<CidrRange> {
    range(text).filter(|r| r.address_prefix != "0.0.0.0")
}

/// An address or network as a range. Bits behind the mask stay as the user wrote them: Envoy masks them.
pub fn range(text: &str) -> Option<CidrRange> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u32>().ok()?)),
        None => (text, None),
    };
    let ip: std::net::IpAddr = address.parse().ok()?;
    let bits = if ip.is_ipv4() { 32 } else { 128 };
    Some(CidrRange {
        address_prefix: ip.to_string(),
        prefix_len: Some(length.unwrap_or(bits)),
    })
}

/// The address of a listener; `unix://PATH` is a socket in the file system.
pub fn address(bind: &str, port: u32) -> Address {
    let address = match bind.strip_prefix("unix://") {
        Some(path) => address::Address::Pipe(Pipe {
            path: path.to_owned(),
            ..Default::default()
        }),
        None => address::Address::SocketAddress(SocketAddress {
            address: bind.to_owned(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(port)),
            ..Default::default()
        }),
    };
    Address {
        address: Some(address),
    }
}

fn names(names: &[String]) -> std::collections::BTreeSet<&str> {
    names
        .iter()
        .map(String::as_str)
        .filter(|n| *n != "*")
        .collect()
}

fn networks(texts: &[String]) -> std::collections::BTreeSet<IpNet> {
    let parse = |text: &String| -> Option<IpNet> {
        let net = match text.parse::<IpNet>() {
            Ok(net) => net,
            Err(_) => IpNet::from(text.parse::<std::net::IpAddr>().ok()?),
        };
        (net.addr() != std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)).then(|| net.trunc())
    };
    texts.iter().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(names: &[&str], destinations: &[&str]) -> Chain {
        Chain {
            server_names: names.iter().map(|n| (*n).to_owned()).collect(),
            destinations: destinations.iter().map(|n| (*n).to_owned()).collect(),
            ..Chain::of(Traffic::Network(Vec::new()))
        }
    }

    #[test]
    fn chains_collide_by_what_they_match_not_by_how_it_is_written() {
        assert!(chain(&["a", "b"], &[]).collides_with(&chain(&["b", "a"], &[])));
        assert!(!chain(&["a"], &[]).collides_with(&chain(&["a", "b"], &[])));
        assert!(chain(&[], &["10.0.0.1"]).collides_with(&chain(&[], &["10.0.0.1/32"])));
        assert!(chain(&[], &["10.0.0.9/8"]).collides_with(&chain(&[], &["10.0.0.0/8"])));
        assert!(chain(&["*"], &[]).collides_with(&chain(&[], &[])));
    }

    #[test]
    fn a_wildcard_name_matches_everything() {
        assert!(chain(&["*"], &[]).is_match_all());
        assert_eq!(chain(&["*"], &[]).chain_match(), None);
        let of_networks = chain(&["*"], &["10.0.0.0/8"]).chain_match().unwrap();
        assert!(of_networks.server_names.is_empty());
        assert_eq!(of_networks.prefix_ranges[0].prefix_len, Some(8));
    }
}
