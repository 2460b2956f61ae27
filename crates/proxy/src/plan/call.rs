//! Where a call ends: the plan's own matching, strung together, from the listener to the cluster.
//!
//! The live proxy takes the same steps with the same functions ([`Listener::find_chain`],
//! [`RouteConfiguration::find`]). What only two live peers decide is decided here by what they would present: a client
//! with a mesh certificate is served by a chain with the mesh's certificate (SDS `default`) alone, and one without by
//! another.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use serde_json::{Map, Value, json};

use super::{
    Address, FilterChain, Listener, RouteConfiguration,
    chain_match::Connection,
    http::RouteSource,
    listener::{DownstreamTransport, ListenerFilterKind, TrafficDirection},
    network::{NetworkFilterConfig, TcpClusters},
    route::{Action, ClusterSpecifier, WeightedTarget},
    route_match::{RequestView, RouteOutcome},
    scoped_route::Scope,
    tls::CertificateSource,
};

/// How a call reaches the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The application's connection, redirected to 15001.
    Outbound,
    /// A connection to the pod, redirected to 15006.
    Inbound,
    /// Straight to a port that the proxy listens on.
    Gateway,
}

/// What is spoken inside the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/2.
    Http2,
    /// Anything else.
    Tcp,
}

/// What the connection is wrapped in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// Nothing.
    Plaintext,
    /// TLS without a client certificate.
    Tls,
    /// TLS with the mesh's certificate.
    Mtls,
}

/// A call to be explained.
#[derive(Debug, Clone)]
pub struct Call {
    /// How it reaches the proxy.
    pub mode: Mode,
    /// The address that the client means.
    pub destination: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// What it is wrapped in.
    pub security: Security,
    /// Server name of the ClientHello; empty for none.
    pub sni: String,
    /// Protocols of the ClientHello, in order.
    pub alpn: Vec<String>,
    /// Host header.
    pub host: String,
    /// Path with its query.
    pub path: String,
    /// Further headers; `:method` replaces GET.
    pub headers: Vec<(String, String)>,
}

/// A proxy's configuration, as a dump shows it.
#[derive(Debug, Default)]
pub struct Configuration {
    /// Listeners in force.
    pub listeners: Vec<Listener>,
    /// Route configurations by name.
    pub routes: BTreeMap<String, RouteConfiguration>,
    /// What of it this version does not implement and the explanation leaves out.
    pub left_out: Vec<String>,
}

/// Where a call ends. Absent steps were not reached, or have no name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct End {
    /// The listener that takes it.
    pub listener: Option<String>,
    /// The chain of that listener.
    pub filter_chain: Option<String>,
    /// The route configuration, where it came by name.
    pub route_config: Option<String>,
    /// The virtual host of the request's domain.
    pub virtual_host: Option<String>,
    /// The route of the request.
    pub route: Option<String>,
    /// The one cluster it goes to.
    pub cluster: Option<String>,
    /// The clusters among which a random number chooses, with their weights.
    pub weighted_clusters: Vec<(String, u32)>,
    /// The answer that the proxy gives itself.
    pub reply: Option<String>,
    /// Why it goes no further.
    pub error: Option<String>,
}

impl End {
    /// The steps that were reached, by the names of [`End`]'s JSON form.
    pub fn to_json(&self) -> Value {
        let mut out = Map::new();
        for (key, value) in self.steps() {
            out.insert(key.to_owned(), value.into());
        }
        if !self.weighted_clusters.is_empty() {
            let entry = |(name, weight): &(String, u32)| json!({ "name": name, "weight": weight });
            out.insert(
                "weightedClusters".to_owned(),
                self.weighted_clusters.iter().map(entry).collect(),
            );
        }
        Value::Object(out)
    }

    /// Name and value of each step, in order.
    pub fn steps(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("listener", &self.listener),
            ("filterChain", &self.filter_chain),
            ("routeConfig", &self.route_config),
            ("virtualHost", &self.virtual_host),
            ("route", &self.route),
            ("cluster", &self.cluster),
            ("reply", &self.reply),
            ("error", &self.error),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_deref()?)))
    }

    fn error(mut self, why: &str) -> Self {
        self.error = Some(why.to_owned());
        self
    }
}

impl Configuration {
    /// Where a call ends.
    pub fn end_of(&self, call: &Call) -> End {
        let mut end = End::default();
        let Some(listener) = self.listener_of(call) else {
            return end.error("no listener matched");
        };
        end.listener = Some(listener.name.to_string());
        let Some(chain) = chain_of(listener, call) else {
            return end.error("no filter chains matched");
        };
        end.filter_chain = named(&chain.name);
        if let DownstreamTransport::Tls(_) = chain.transport_socket {
            if call.security == Security::Plaintext {
                return end.error("invalid TLS");
            }
            if mesh_certificate(chain) != (call.security == Security::Mtls) {
                return end.error("invalid mTLS");
            }
        }
        match chain.filters.last().map(|f| &f.config) {
            Some(NetworkFilterConfig::HttpConnectionManager(manager)) => {
                let encrypted = call.security != Security::Plaintext
                    && chain.transport_socket == DownstreamTransport::RawBuffer;
                if encrypted || call.protocol == Protocol::Tcp {
                    return end.error("protocol error");
                }
                let name = match &manager.routes {
                    RouteSource::Inline(routes) => return request(routes, call, end),
                    RouteSource::Rds { name, .. } => name,
                    RouteSource::Scoped { routes, .. } => match routes.find(&Head(call)) {
                        Some(Scope::Inline(routes)) => return request(routes, call, end),
                        Some(Scope::Named(name)) => name,
                        None => return end.error("no scope matched"),
                    },
                };
                end.route_config = Some(name.to_string());
                match self.routes.get(&**name) {
                    Some(routes) => request(routes, call, end),
                    None => end.error("no route configuration of this name"),
                }
            }
            Some(NetworkFilterConfig::TcpProxy(proxy)) => {
                match &proxy.cluster {
                    TcpClusters::Cluster(name) => end.cluster = Some(name.to_string()),
                    TcpClusters::Weighted { clusters, .. } => {
                        end.weighted_clusters = clusters
                            .iter()
                            .map(|(name, weight, _)| (name.to_string(), *weight))
                            .collect();
                    }
                }
                end
            }
            Some(NetworkFilterConfig::Echo | NetworkFilterConfig::DirectResponse(_)) => {
                end.error("the filter chain answers its connections itself")
            }
            _ => end.error("the filter chain closes its connections"),
        }
    }

    /// The listener that a connection comes to: by exact address, by port on every address, else the one that
    /// catches what was redirected.
    fn listener_of(&self, call: &Call) -> Option<&Listener> {
        if call.mode == Mode::Inbound {
            return self
                .listeners
                .iter()
                .find(|l| &*l.name == VIRTUAL_INBOUND)
                .or_else(|| {
                    let inbound = |l: &&Listener| l.traffic_direction == TrafficDirection::Inbound;
                    self.listeners
                        .iter()
                        .filter(inbound)
                        .find(|l| l.address.port() == Some(INBOUND_PORT))
                });
        }
        let any = match call.destination.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::from([0u16; 8]),
        };
        let wildcard = SocketAddr::new(any, call.destination.port());
        let at = |wanted: SocketAddr| {
            self.listeners.iter().find(|l| {
                let mut own = std::iter::once(&l.address).chain(&l.additional_addresses);
                own.any(|a| *a == Address::Socket(wanted))
            })
        };
        at(call.destination).or_else(|| at(wildcard)).or_else(|| {
            let redirected = call.mode == Mode::Outbound;
            self.listeners
                .iter()
                .find(|l| redirected && l.use_original_dst)
        })
    }
}

const VIRTUAL_INBOUND: &str = "virtualInbound";
const INBOUND_PORT: u16 = 15006;

/// Runs the listener filters and looks for the chain.
fn chain_of<'a>(listener: &'a Listener, call: &Call) -> Option<&'a FilterChain> {
    let port = call.destination.port();
    let runs = |kind: fn(&ListenerFilterKind) -> bool| {
        listener.listener_filters.iter().any(|filter| {
            kind(&filter.kind)
                && !filter
                    .disabled
                    .as_ref()
                    .is_some_and(|p| p.matches(Some(port)))
        })
    };
    let encrypted = call.security != Security::Plaintext;
    let mut transport = "raw_buffer";
    let mut server_name = "";
    let mut protocols: Vec<&str> = Vec::new();
    if encrypted && runs(|k| matches!(k, ListenerFilterKind::TlsInspector { .. })) {
        transport = "tls";
        server_name = &call.sni;
        protocols = call.alpn.iter().map(String::as_str).collect();
    }
    if !encrypted && runs(|k| matches!(k, ListenerFilterKind::HttpInspector)) {
        match call.protocol {
            Protocol::Http => protocols.push("http/1.1"),
            Protocol::Http2 => protocols.push("h2c"),
            Protocol::Tcp => {}
        }
    }
    let source = Some(SocketAddr::from((CLIENT, 40_000)));
    let connection = Connection {
        destination: Some(call.destination),
        source,
        direct_source: source,
        server_name,
        transport_protocol: transport,
        application_protocols: &protocols,
    };
    listener.find_chain(&connection).map(|chain| &**chain)
}

/// A client from elsewhere: an address of the documentation range.
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Whether a chain presents the mesh's certificate.
fn mesh_certificate(chain: &FilterChain) -> bool {
    let DownstreamTransport::Tls(tls) = &chain.transport_socket else {
        return false;
    };
    let is_mesh =
        |c: &CertificateSource| matches!(c, CertificateSource::Sds(s) if &*s.name == "default");
    tls.common.certificates.iter().any(is_mesh)
}

fn named(name: &str) -> Option<String> {
    (!name.is_empty()).then(|| name.to_owned())
}

/// Goes on with the request inside the connection.
fn request(routes: &RouteConfiguration, call: &Call, mut end: End) -> End {
    let found = match routes.find(&Head(call), 0) {
        RouteOutcome::Found(found) => found,
        RouteOutcome::TlsRedirect(host) => {
            end.virtual_host = named(&host.name);
            return end.error("tls required, sending 301");
        }
        RouteOutcome::NoRoute(host) => {
            end.virtual_host = named(&host.name);
            return end.error("no route matched");
        }
        RouteOutcome::NoVirtualHost => return end.error("no virtual host matched"),
    };
    end.virtual_host = named(&found.virtual_host.name);
    end.route = named(&found.route.name);
    match &found.route.action {
        Action::Route(action) => match &action.cluster {
            ClusterSpecifier::Cluster(name) => end.cluster = Some(name.to_string()),
            ClusterSpecifier::Header(header) => {
                end.cluster = Head(call)
                    .header(header)
                    .map(|value| String::from_utf8_lossy(&value).into_owned());
            }
            ClusterSpecifier::Weighted(weighted) => {
                let entries = weighted.clusters.iter().map(|entry| {
                    let name = match &entry.name {
                        WeightedTarget::Cluster(name) | WeightedTarget::Header(name) => name,
                    };
                    (name.to_string(), entry.weight)
                });
                end.weighted_clusters = entries.collect();
            }
        },
        Action::Redirect(redirect) => end.reply = Some(format!("redirect {}", redirect.status)),
        Action::DirectResponse(response) => {
            end.reply = Some(format!("direct response {}", response.status));
        }
        Action::NonForwarding => end.reply = Some("non-forwarding: 404".to_owned()),
    }
    end
}

/// A call's request, as matching reads it.
struct Head<'a>(&'a Call);

impl RequestView for Head<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let call = self.0;
        let mut values = call
            .headers
            .iter()
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.as_str());
        if let Some(first) = values.next() {
            let joined = values.fold(Cow::Borrowed(first), |all, next| {
                format!("{all},{next}").into()
            });
            return Some(match joined {
                Cow::Borrowed(text) => text.as_bytes().into(),
                Cow::Owned(text) => text.into_bytes().into(),
            });
        }
        let own = match name {
            ":method" => "GET",
            ":path" => &call.path,
            ":authority" | "host" => &call.host,
            ":scheme" | "x-forwarded-proto" if call.security == Security::Plaintext => "http",
            ":scheme" | "x-forwarded-proto" => "https",
            _ => return None,
        };
        Some(own.as_bytes().into())
    }

    fn host(&self) -> &[u8] {
        self.0.host.as_bytes()
    }

    fn path(&self) -> &[u8] {
        self.0.path.as_bytes()
    }

    fn client_certificate(&self) -> Option<(bool, bool)> {
        match self.0.security {
            Security::Plaintext => None,
            Security::Tls => Some((false, false)),
            Security::Mtls => Some((true, true)),
        }
    }
}

#[cfg(test)]
mod tests;
