//! Objects of filter state that the configuration makes: `set_filter_state`, for connections and for requests.

use std::sync::Arc;

use super::access_log::LogFormat;

/// `envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateValue {
    /// What the object is found by.
    pub key: Arc<str>,
    /// What is made of the text.
    pub kind: ObjectKind,
    /// The text.
    pub format: LogFormat,
    /// No later value takes its place.
    pub read_only: bool,
    /// An empty text makes no object.
    pub skip_if_empty: bool,
}

/// `envoy.extensions.filters.network.set_filter_state.v3.Config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionState {
    /// Made as the connection begins: on a new connection, then after the handshake of TLS, which is over by then.
    pub on_begin: Vec<StateValue>,
    /// Made with the client's first bytes.
    pub on_data: Vec<StateValue>,
}

/// `envoy.extensions.filters.http.set_filter_state.v3.Config`, of the connection manager and of routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestState {
    /// Made of the request's head.
    pub on_request: Vec<StateValue>,
    /// The route is chosen anew then.
    pub clear_route_cache: bool,
}

/// The kinds of objects: each is made by a factory of its name, and those that something here acts by are found under the
/// same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    /// Made by a filter of its own accord.
    Own,
    /// `envoy.string`: a text, which gives no hash.
    Text,
    /// `envoy.hashable_string`, Istio's `istio.hashable_string`: a text that hash policies go by.
    HashableText,
    /// `envoy.tcp_proxy.cluster`: where the TCP proxy goes instead of its one cluster.
    TcpCluster,
    /// `envoy.tcp_proxy.per_connection_idle_timeout_ms`: instead of the TCP proxy's `idle_timeout`.
    TcpIdleTimeout,
    /// `envoy.tcp_proxy.disable_tunneling`: `true` takes no account of `tunneling_config`.
    DisableTunneling,
    /// `envoy.network.upstream_server_name`: the server name that TLS asks a host for.
    UpstreamServerName,
    /// `envoy.network.application_protocols`: what TLS offers to a host, with commas between.
    ApplicationProtocols,
    /// `envoy.network.transport_socket.original_dst_address`: where an ORIGINAL_DST cluster connects to.
    OriginalDst,
    /// `envoy.ratelimit.hits_addend`: what a request counts at a rate limit service.
    HitsAddend,
}

impl ObjectKind {
    /// What a factory makes.
    pub fn made_by(factory: &str) -> Option<Self> {
        Some(match factory {
            "envoy.string" => Self::Text,
            "envoy.hashable_string" | "istio.hashable_string" => Self::HashableText,
            name => return WELL_KNOWN.iter().find(|(_, n)| *n == name).map(|(k, _)| *k),
        })
    }

    /// The key that an object of this kind is looked for under, where anything looks for it.
    pub fn well_known(self) -> Option<&'static str> {
        WELL_KNOWN.iter().find(|(k, _)| *k == self).map(|(_, n)| *n)
    }
}

const WELL_KNOWN: [(ObjectKind, &str); 7] = [
    (ObjectKind::TcpCluster, "envoy.tcp_proxy.cluster"),
    (
        ObjectKind::TcpIdleTimeout,
        "envoy.tcp_proxy.per_connection_idle_timeout_ms",
    ),
    (
        ObjectKind::DisableTunneling,
        "envoy.tcp_proxy.disable_tunneling",
    ),
    (
        ObjectKind::UpstreamServerName,
        "envoy.network.upstream_server_name",
    ),
    (
        ObjectKind::ApplicationProtocols,
        "envoy.network.application_protocols",
    ),
    (
        ObjectKind::OriginalDst,
        "envoy.network.transport_socket.original_dst_address",
    ),
    (ObjectKind::HitsAddend, "envoy.ratelimit.hits_addend"),
];
