//! All Gateways of one router as one: which servers share a port, and which have to give way.
//!
//! Gateways are taken oldest first. Plain HTTP servers of a port share a listener and a route configuration; servers
//! with TLS share a listener and are told apart by SNI. What does not fit to what is there is left out with a warning.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use proto::istio::networking::v1alpha3::{Server, server_tls_settings::TlSmode};

use crate::model::{BoundGateway, Mesh, Origin, Protocol, Proxy, gateway::Binding};

/// Label of a service whose ports are not translated for Gateways.
const NO_TRANSLATION: &str = "experimental.istio.io/disable-gateway-port-translation";

/// A server of some Gateway.
#[derive(Debug, Clone)]
pub struct MergedServer {
    /// With hosts as `NAMESPACE/HOST` or `HOST`.
    pub server: Server,
    /// The port as the user wrote it.
    pub port: u32,
    pub protocol: Protocol,
    /// `NAMESPACE/NAME`.
    pub gateway: String,
    pub bound: Arc<BoundGateway>,
    /// Of an HTTPS server its own route configuration.
    pub route_name: String,
    /// SNI that leads here; empty for plaintext.
    pub sni_hosts: Vec<String>,
}

impl MergedServer {
    /// TLS goes through as it is.
    pub fn is_passthrough(&self) -> bool {
        self.tls_mode()
            .is_some_and(|m| matches!(m, TlSmode::Passthrough | TlSmode::AutoPassthrough))
    }

    /// The mode of its TLS, where it has any.
    pub fn tls_mode(&self) -> Option<TlSmode> {
        self.server.tls.as_ref().map(|t| t.mode())
    }

    /// HTTP inside TLS that ends here.
    pub fn is_https(&self) -> bool {
        self.server.tls.is_some() && self.protocol == Protocol::Https && !self.is_passthrough()
    }

    /// Whether plaintext requests are sent to `https`.
    pub fn redirects(&self) -> bool {
        self.server.tls.as_ref().is_some_and(|t| t.https_redirect)
    }

    /// Where it comes from: first what it is about.
    pub fn origins(&self) -> &[Origin] {
        &self.bound.from
    }

    /// What it is about.
    pub fn origin(&self) -> &Origin {
        &self.bound.from[0]
    }

    /// A server with TLS of its own, as far as ports are shared: `httpsRedirect` on HTTP is none.
    fn is_tls(&self) -> bool {
        self.server.tls.is_some() && !self.protocol.is_http()
    }

    fn is_http(&self) -> bool {
        self.protocol.is_http() || (self.protocol == Protocol::Https && !self.is_passthrough())
    }
}

/// A port that the router listens on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerPort {
    /// The port of the pod.
    pub number: u32,
    /// The protocol as written by the first server.
    pub protocol: String,
    pub bind: String,
}

/// The servers of one port.
#[derive(Debug, Default, Clone)]
pub struct Servers {
    /// Indices into [`MergedGateway::servers`].
    pub all: Vec<usize>,
    /// Route configuration of plaintext HTTP.
    pub route_name: String,
}

/// All Gateways of a router.
#[derive(Debug, Default)]
pub struct MergedGateway {
    pub servers: Vec<MergedServer>,
    /// In order of appearance.
    pub ports: Vec<(ServerPort, Servers)>,
    /// Servers by route configuration.
    pub by_route: BTreeMap<String, Vec<usize>>,
}

impl MergedGateway {
    /// Merges the Gateways that select the router; `None` if there are none.
    pub fn new(mesh: &Mesh, proxy: &Proxy) -> Option<MergedGateway> {
        let mut gateways = mesh.gateways_of(proxy).peekable();
        gateways.peek()?;
        let mut building = Building::default();
        for gateway in gateways {
            for server in &gateway.object.spec.servers {
                building.add(gateway, server, proxy);
            }
        }
        Some(building.out)
    }
}

#[derive(Debug, Default)]
struct Building {
    out: MergedGateway,
    ports: BTreeSet<u32>,
    /// The first plaintext server's port, by number.
    plain: BTreeMap<u32, ServerPort>,
    /// Binds of servers with TLS, by number.
    tls_binds: BTreeMap<u32, BTreeSet<String>>,
    /// Hosts of servers with TLS and their binds, by number.
    tls_hosts: HashMap<u32, BTreeMap<String, String>>,
}

impl Building {
    fn add(&mut self, gateway: &Arc<BoundGateway>, server: &Server, proxy: &Proxy) {
        let Some(port) = &server.port else {
            warn(gateway, "a server without port");
            return;
        };
        let meta = &gateway.object.meta;
        let server = with_namespaces(server, &meta.namespace);
        let protocol = Protocol::parse(&port.protocol);
        for number in pod_ports(port.number, gateway, proxy) {
            let mut merged = MergedServer {
                server: server.clone(),
                port: port.number,
                protocol,
                gateway: format!("{}/{}", meta.namespace, meta.name),
                bound: gateway.clone(),
                route_name: String::new(),
                sni_hosts: Vec::new(),
            };
            merged.route_name = route_name(&merged, number);
            if server.tls.is_some() {
                let known = self.tls_hosts.entry(number).or_default();
                if server
                    .hosts
                    .iter()
                    .any(|h| known.get(h) == Some(&server.bind))
                {
                    warn(
                        gateway,
                        &format!(
                            "server {:?}: an older one has one of its hosts on port {number}",
                            port.name
                        ),
                    );
                    continue;
                }
                known.extend(
                    server
                        .hosts
                        .iter()
                        .map(|h| (h.clone(), server.bind.clone())),
                );
                merged.sni_hosts = sni_hosts(&server);
            }
            let server_port = ServerPort {
                number,
                protocol: port.protocol.clone(),
                bind: server.bind.clone(),
            };
            self.place(merged, server_port);
        }
    }

    fn place(&mut self, server: MergedServer, port: ServerPort) {
        if self.ports.insert(port.number) {
            if !server.is_tls() {
                self.plain.insert(port.number, port.clone());
            }
            self.new_port(server, port);
        } else if let Some(current) = self.plain.get(&port.number).cloned() {
            self.beside_plain(server, port, current);
        } else if !server.is_tls() {
            self.plain.insert(port.number, port.clone());
            self.new_port(server, port);
        } else {
            self.beside_tls(server, port);
        }
    }

    fn beside_plain(&mut self, server: MergedServer, port: ServerPort, current: ServerPort) {
        let object = server.bound.clone();
        if current.bind == port.bind {
            let old = Protocol::parse(&current.protocol);
            let fits = server.protocol.is_http() && (old.is_http() || old == server.protocol);
            if !fits || server.route_name.is_empty() {
                warn(
                    &object,
                    &format!("port {} is already {}", port.number, current.protocol),
                );
                return;
            }
            self.join(server, &current);
        } else if self.index_of(&port).is_some() {
            let route_name = server.route_name.clone();
            self.join(server, &port);
            if let Some(at) = self.index_of(&port) {
                self.out.ports[at].1.route_name = route_name;
            }
        } else {
            if !server.is_tls() {
                self.plain.insert(port.number, port.clone());
            }
            self.new_port(server, port);
        }
    }

    fn beside_tls(&mut self, server: MergedServer, port: ServerPort) {
        if server.is_http() {
            if server.route_name.is_empty() {
                warn(
                    &server.bound,
                    &format!("port {}: no route configuration fits", port.number),
                );
                return;
            }
            if self.out.by_route.contains_key(&server.route_name) {
                warn(
                    &server.bound,
                    &format!(
                        "port {}: the port's name is taken by an older server; HTTPS servers need names of their own",
                        port.number
                    ),
                );
                return;
            }
        }
        self.tls_binds
            .entry(port.number)
            .or_default()
            .insert(port.bind.clone());
        if self.index_of(&port).is_some() {
            let route_name = server.is_http().then(|| server.route_name.clone());
            let index = self.push(server);
            if let Some(at) = self.index_of(&port) {
                self.out.ports[at].1.all.push(index);
            }
            if let Some(name) = route_name {
                self.out.by_route.insert(name, vec![index]);
            }
        } else {
            let keep = server.is_http();
            let name = server.route_name.clone();
            let index = self.push(server);
            self.out.ports.push((
                port,
                Servers {
                    all: vec![index],
                    route_name: String::new(),
                },
            ));
            if keep {
                self.out.by_route.insert(name, vec![index]);
            }
        }
    }

    fn new_port(&mut self, server: MergedServer, port: ServerPort) {
        let (http, route_name) = (server.is_http(), server.route_name.clone());
        let index = self.push(server);
        if http {
            self.out.by_route.insert(route_name.clone(), vec![index]);
        }
        let servers = Servers {
            all: vec![index],
            route_name,
        };
        match self.index_of(&port) {
            Some(at) => self.out.ports[at].1 = servers,
            None => self.out.ports.push((port, servers)),
        }
    }

    fn join(&mut self, server: MergedServer, port: &ServerPort) {
        let route_name = server.route_name.clone();
        let index = self.push(server);
        if let Some(at) = self.index_of(port) {
            self.out.ports[at].1.all.push(index);
        }
        self.out.by_route.entry(route_name).or_default().push(index);
    }

    fn push(&mut self, server: MergedServer) -> usize {
        self.out.servers.push(server);
        self.out.servers.len() - 1
    }

    fn index_of(&self, port: &ServerPort) -> Option<usize> {
        self.out.ports.iter().position(|(p, _)| p == port)
    }
}

/// The ports of the pod that a Gateway's port means: that of the router's service, else the same. A Gateway of services
/// means theirs alone.
fn pod_ports(number: u32, gateway: &BoundGateway, proxy: &Proxy) -> Vec<u32> {
    if let Binding::Service(services) = &gateway.binding {
        let targets: BTreeSet<u32> = proxy
            .service_targets
            .iter()
            .filter(|t| t.port.number == number)
            .filter(|t| services.has(&t.service.hostname, &t.service.namespace))
            .map(|t| t.target_port)
            .collect();
        return targets.into_iter().collect();
    }
    let target = proxy
        .service_targets
        .iter()
        .filter(|t| !t.service.labels.contains_key(NO_TRANSLATION))
        .find(|t| t.port.number == number);
    vec![target.map_or(number, |t| t.target_port)]
}

/// `./host` and `*/host` written out.
fn with_namespaces(server: &Server, namespace: &str) -> Server {
    let mut out = server.clone();
    if server.hosts.iter().any(|h| h == "*/*") {
        out.hosts = vec!["*".to_owned()];
        return out;
    }
    for host in &mut out.hosts {
        *host = match host.split_once('/') {
            Some((".", name)) => format!("{namespace}/{name}"),
            Some(("*", name)) => name.to_owned(),
            _ => continue,
        };
    }
    out
}

fn sni_hosts(server: &Server) -> Vec<String> {
    let hosts: BTreeSet<&str> = server
        .hosts
        .iter()
        .map(|h| h.split_once('/').map_or(h.as_str(), |(_, name)| name))
        .collect();
    hosts.into_iter().map(str::to_owned).collect()
}

fn route_name(server: &MergedServer, number: u32) -> String {
    let Some(port) = &server.server.port else {
        return String::new();
    };
    let bind = match server.server.bind.as_str() {
        "" => String::new(),
        bind => format!(".{bind}"),
    };
    if server.protocol.is_http() {
        format!("http.{number}{bind}")
    } else if server.protocol == Protocol::Https && !server.is_passthrough() {
        let meta = &server.bound.object.meta;
        format!(
            "https.{}.{}.{}.{}{bind}",
            port.number, port.name, meta.name, meta.namespace
        )
    } else {
        String::new()
    }
}

fn warn(gateway: &BoundGateway, what: &str) {
    tracing::warn!("{}: left out: {what}", gateway.from[0]);
}
