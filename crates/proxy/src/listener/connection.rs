//! An accepted connection and what is known about it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use serde_json::Value;
use tls::session::Session;

use crate::{
    filter_state::FilterState,
    io::Stream,
    plan::{FilterChain, Listener, chain_match, matcher_tree::PeerName},
    proxy_protocol::Tlv,
    worker::drain::Drain,
};

/// A connection that has found its filter chain.
#[derive(Debug)]
pub struct Connection {
    /// The bytes; what listener filters looked at comes again.
    pub stream: Stream,
    /// What is known about it; in a box, since a connection passes through many hands.
    pub info: Box<ConnectionInfo>,
    /// Tells when the listener or the chain goes away.
    pub drain: Drain,
}

/// What is known about a connection.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Unique in the process.
    pub id: u64,
    /// When it was accepted, for durations.
    pub accepted: Instant,
    /// When it was accepted, for logs.
    pub accepted_at: SystemTime,
    /// The peer of the socket; none over a unix socket.
    pub direct_remote: Option<SocketAddr>,
    /// The client: the peer, unless a PROXY header says otherwise.
    pub remote: Option<SocketAddr>,
    /// Our address: the one the client meant, where it was restored.
    pub local: Option<SocketAddr>,
    /// Whether the local address was restored from a redirect.
    pub local_restored: bool,
    /// The server name of the ClientHello, lower case.
    pub requested_server_name: Option<Arc<str>>,
    /// `raw_buffer` or `tls`; empty until listener filters have run.
    pub transport_protocol: &'static str,
    /// What the client offers in ALPN, or what the HTTP inspector found.
    pub application_protocols: Vec<Arc<str>>,
    /// The listener that took it.
    pub listener: Arc<Listener>,
    /// The chain that took it; none if the connection ended before.
    pub chain: Option<Arc<FilterChain>>,
    /// What ended the connection early, for `%RESPONSE_FLAGS%` of listener logs (`NR` …).
    pub response_flag: Option<&'static str>,
    /// What TLS agreed on, where the chain terminates it.
    pub tls: Option<Arc<Session>>,
    /// When its handshake was over.
    pub secured: Option<Instant>,
    /// What `x-forwarded-client-cert` says of it, made with the first request.
    pub xfcc: std::cell::OnceCell<Box<str>>,
    /// Who the client is, by Istio's metadata exchange.
    pub peer: Option<Arc<Value>>,
    /// Why its handshake failed, for `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub transport_failure: Option<Arc<str>>,
    /// Where connections that are made for it come from (`original_src`).
    pub source: Option<UpstreamSource>,
    /// What a PROXY header said that goes further.
    pub proxy: Option<Arc<ProxyData>>,
    /// What network filters leave for each other and for logs, by namespace.
    pub metadata: Option<Box<BTreeMap<String, Value>>>,
    /// Objects that network filters have made, for each other, for load balancing and for logs.
    pub state: FilterState,
    /// Why it ended, for `%CONNECTION_TERMINATION_DETAILS%`.
    pub termination_details: Option<Arc<str>>,
}

impl ConnectionInfo {
    /// Names of one kind of the client's certificate, joined by commas; `None` where there are none, and where the
    /// certificate leads to nobody who is trusted.
    pub fn joined_peer_names(&self, kind: PeerName) -> Option<String> {
        let session = self.tls.as_ref().filter(|session| session.peer_trusted)?;
        let peer = session.peer.as_ref()?;
        let joined = match kind {
            PeerName::Uri => peer.uris.join(","),
            PeerName::Dns => peer.dns.join(","),
            PeerName::Subject => peer.subject.to_string(),
        };
        (!joined.is_empty()).then_some(joined)
    }

    /// What the client's certificate calls it: URIs, DNS names, then its subject. `None` without TLS; nothing where the
    /// certificate leads to nobody who is trusted.
    pub fn peer_names(&self) -> Option<impl Iterator<Item = &str>> {
        let session = self.tls.as_ref()?;
        let trusted = session.peer.as_ref().filter(|_| session.peer_trusted);
        Some(trusted.into_iter().flat_map(|peer| {
            let names = peer.uris.iter().chain(&*peer.dns);
            names.map(|n| &**n).chain(std::iter::once(&*peer.subject))
        }))
    }
}

/// What is kept of a PROXY header besides the addresses.
#[derive(Debug, Default, PartialEq)]
pub struct ProxyData {
    /// TLVs for upstream PROXY headers.
    pub tlvs: Vec<Tlv>,
    /// Dynamic metadata by namespace.
    pub metadata: BTreeMap<String, Value>,
}

/// The address that a connection towards an upstream comes from, whoever it belongs to (IP_TRANSPARENT).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamSource {
    /// Port 0 lets the system choose one.
    pub address: SocketAddr,
    /// SO_MARK; 0 sets none.
    pub mark: u32,
}

impl ConnectionInfo {
    /// A connection of which only the client's address is known, for requests that are no traffic.
    pub(crate) fn imagined(listener: Arc<Listener>, remote: SocketAddr) -> Self {
        Self {
            id: 0,
            accepted: Instant::now(),
            accepted_at: SystemTime::now(),
            direct_remote: Some(remote),
            remote: Some(remote),
            local: None,
            local_restored: false,
            requested_server_name: None,
            transport_protocol: "raw_buffer",
            application_protocols: Vec::new(),
            listener,
            chain: None,
            response_flag: None,
            tls: None,
            secured: None,
            xfcc: Default::default(),
            peer: None,
            transport_failure: None,
            source: None,
            proxy: None,
            metadata: None,
            state: FilterState::default(),
            termination_details: None,
        }
    }

    /// Where an ORIGINAL_DST cluster connects to: the restored destination.
    pub fn original_dst(&self) -> Option<SocketAddr> {
        if self.local_restored {
            self.local
        } else {
            None
        }
    }

    /// What filter chains are matched by.
    pub(crate) fn to_match<'a>(&'a self, protocols: &'a [&'a str]) -> chain_match::Connection<'a> {
        chain_match::Connection {
            destination: self.local,
            source: self.remote,
            direct_source: self.direct_remote,
            server_name: self.requested_server_name.as_deref().unwrap_or_default(),
            transport_protocol: self.transport_protocol,
            application_protocols: protocols,
        }
    }
}
