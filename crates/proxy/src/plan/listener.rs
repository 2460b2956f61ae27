//! Listeners: where connections come in, what looks at their first bytes, and which chain takes them.

use std::{net::SocketAddr, ops::Range, sync::Arc, time::Duration};

use ipnet::IpNet;

use super::{
    access_log::AccessLog, address::Address, chain_match::ChainTable, metadata::Metadata,
    network::NetworkFilter, proxy_protocol::ProxyProtocolFilter, socket::SocketOption,
    tls::DownstreamTls,
};

/// One listener (`envoy.config.listener.v3.Listener`). Its name is its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Unique name.
    pub name: Arc<str>,
    /// The address it stands for; it owns a socket only with [`Listener::bind_to_port`].
    pub address: Address,
    /// Further addresses of the same listener (dual stack, more VIPs).
    pub additional_addresses: Vec<Address>,
    /// Those of its IPv6 addresses that take IPv4 clients, too (`ipv4_compat`).
    pub dual_stack: Vec<Address>,
    /// Replaces the address in `listener.<address>.` stats.
    pub stat_prefix: Option<Arc<str>>,
    /// Whether it opens sockets itself; else connections reach it by hand-off only. Default true.
    pub bind_to_port: bool,
    /// Whether accepted connections are handed to the listener of their original destination.
    pub use_original_dst: bool,
    /// IP_TRANSPARENT on the listening sockets (TPROXY).
    pub transparent: bool,
    /// IP_FREEBIND on the listening sockets.
    pub freebind: bool,
    /// SO_REUSEPORT with a socket per worker. Default true.
    pub reuse_port: bool,
    /// Length of the kernel's accept queue; the system's maximum when absent.
    pub tcp_backlog: Option<u32>,
    /// TCP_FASTOPEN: length of its queue; off when absent.
    pub tcp_fast_open: Option<u32>,
    /// Set on the listening sockets.
    pub socket_options: Arc<[SocketOption]>,
    /// How many connections to accept per readiness event; no limit when absent.
    pub max_connections_per_event: Option<u32>,
    /// `connection_balance_config.exact_balance`: accepted sockets go to the least loaded worker.
    pub exact_balance: bool,
    /// Filters over the first bytes, in order. With `use_original_dst` the first is `original_dst`.
    pub listener_filters: Vec<ListenerFilter>,
    /// How long listener filters may take; `None` waits for ever (configured as 0s). Envoy's default is 15 s.
    pub listener_filters_timeout: Option<Duration>,
    /// Whether a connection goes on after that timeout instead of being closed.
    pub continue_on_listener_filters_timeout: bool,
    /// The chains in the order of the message (order does not matter to matching).
    pub filter_chains: Vec<Arc<FilterChain>>,
    /// Takes what no chain takes; without it such a connection is closed.
    pub default_filter_chain: Option<Arc<FilterChain>>,
    /// The chains sorted for matching; see [`Listener::find_chain`].
    pub(crate) chain_table: ChainTable,
    /// Soft limit of buffered bytes per direction. Default 1 MiB.
    pub per_connection_buffer_limit: u32,
    /// What the listener is for, in the eyes of whoever made it.
    pub traffic_direction: TrafficDirection,
    /// `drain_type: MODIFY_ONLY`: health check failures do not drain it.
    pub drain_modify_only: bool,
    /// Logs of connections that end before a chain is found, and of every connection otherwise.
    pub access_logs: Vec<AccessLog>,
    /// Its connections do not count towards the process's limit.
    pub ignore_global_connection_limit: bool,
    /// Overload does not refuse its connections.
    pub bypass_overload_manager: bool,
    /// Free structures.
    pub metadata: Metadata,
}

impl Listener {
    /// The one address that its connections can have at this end, if it is known before they come: then the kernel need
    /// not be asked for each.
    pub(crate) fn only_destination(&self) -> Option<SocketAddr> {
        let address = self.address.socket()?;
        let fixed = !address.ip().is_unspecified() && address.port() != 0;
        (fixed && self.additional_addresses.is_empty() && !self.transparent).then_some(address)
    }
}

/// `envoy.config.core.v3.TrafficDirection`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum TrafficDirection {
    /// Not said.
    #[default]
    Unspecified,
    /// Towards the application.
    Inbound,
    /// From the application.
    Outbound,
}

/// One filter over the first bytes of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerFilter {
    /// As configured, e.g. `envoy.filters.listener.tls_inspector`.
    pub name: Arc<str>,
    /// What it does.
    pub kind: ListenerFilterKind,
    /// Connections that it leaves alone.
    pub disabled: Option<ChainPredicate>,
}

/// The listener filters that exist here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenerFilterKind {
    /// Restores the address the client meant (SO_ORIGINAL_DST).
    OriginalDst,
    /// Finds out transport protocol (`tls` or `raw_buffer`), SNI and ALPN from a ClientHello.
    TlsInspector {
        /// First size of the peek buffer in bytes, where configured.
        initial_read_buffer_size: Option<u32>,
    },
    /// Finds out `http/1.0`, `http/1.1` or `h2c` on plaintext connections.
    HttpInspector,
    /// Makes connections towards upstreams come from the client's address.
    OriginalSrc {
        /// With the client's port as well, in place of one that the system chooses.
        bind_port: bool,
        /// SO_MARK of those connections; 0 sets none.
        mark: u32,
    },
    /// Reads a PROXY header: whom the connection was made for.
    ProxyProtocol(Arc<ProxyProtocolFilter>),
}

/// `ListenerFilterChainMatchPredicate`: says from the destination port whether a listener filter is switched off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChainPredicate {
    /// Every connection.
    Any,
    /// Destination port in the half-open range.
    DestinationPort(Range<u32>),
    /// Not the inner one.
    Not(Box<ChainPredicate>),
    /// All of them.
    And(Vec<ChainPredicate>),
    /// One of them.
    Or(Vec<ChainPredicate>),
}

impl ChainPredicate {
    /// Whether it holds for a connection to this (restored) destination port; a pipe has none.
    pub fn matches(&self, destination_port: Option<u16>) -> bool {
        match self {
            Self::Any => true,
            Self::DestinationPort(range) => {
                destination_port.is_some_and(|p| range.contains(&u32::from(p)))
            }
            Self::Not(inner) => !inner.matches(destination_port),
            Self::And(all) => all.iter().all(|p| p.matches(destination_port)),
            Self::Or(any) => any.iter().any(|p| p.matches(destination_port)),
        }
    }
}

/// One filter chain. Two chains that are equal as plans keep their connections over an update of the listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterChain {
    /// Name; empty when none is configured.
    pub name: Arc<str>,
    /// Which connections it takes.
    pub filter_chain_match: FilterChainMatch,
    /// Network filters in order; the last one is terminal (HTTP connection manager or tcp_proxy). Empty: close.
    pub filters: Vec<NetworkFilter>,
    /// What the bytes are wrapped in.
    pub transport_socket: DownstreamTransport,
    /// How long a handshake may take; `None` for ever.
    pub transport_socket_connect_timeout: Option<Duration>,
    /// Free structures.
    pub metadata: Metadata,
}

/// What the bytes of an accepted connection are wrapped in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownstreamTransport {
    /// Nothing.
    RawBuffer,
    /// TLS.
    Tls(Arc<DownstreamTls>),
}

/// The conditions of one chain; an empty list or `None` means "any". See [`super::chain_match`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct FilterChainMatch {
    /// Destination port (restored).
    pub destination_port: Option<u16>,
    /// Destination address.
    pub prefix_ranges: Vec<IpNet>,
    /// SNI, lower case; `*.x` matches any sub-domain.
    pub server_names: Vec<Arc<str>>,
    /// `raw_buffer` or `tls`.
    pub transport_protocol: Option<Arc<str>>,
    /// ALPN, or what the HTTP inspector found.
    pub application_protocols: Vec<Arc<str>>,
    /// The peer of the socket, before any PROXY header.
    pub direct_source_prefix_ranges: Vec<IpNet>,
    /// Where the client is.
    pub source_type: SourceType,
    /// Source address.
    pub source_prefix_ranges: Vec<IpNet>,
    /// Source port.
    pub source_ports: Vec<u16>,
}

/// `FilterChainMatch.ConnectionSourceType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum SourceType {
    /// Any source.
    #[default]
    Any,
    /// From this host: loopback, or source and destination address are the same.
    SameIpOrLoopback,
    /// From elsewhere.
    External,
}
