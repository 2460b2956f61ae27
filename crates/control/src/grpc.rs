//! What a proxyless gRPC application gets (`GENERATOR: grpc` in its node): it asks by name for the listener of its
//! target, and from there for one route configuration, its clusters and their endpoints.
//!
//! The resources are the proxies' own, cut down to what gRPC understands (gRFC A27, A28, A31, A32, A36): no Istio
//! filters, no sniffing, hosts with their ports. A server asks for `xds.istio.io/grpc/lds/inbound/IP:PORT`.

use prost::Message;
use proto::{
    any,
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster, circuit_breakers::Thresholds, cluster::LbPolicy,
            },
            core::v3::{
                Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress,
                TransportSocket, address, config_source::ConfigSourceSpecifier,
                socket_address::PortSpecifier, transport_socket,
            },
            listener::v3::{ApiListener, Filter, FilterChain, Listener, filter},
            route::v3::{
                NonForwardingAction, Route, RouteConfiguration, RouteMatch, VirtualHost,
                route::Action, route_match::PathSpecifier,
            },
        },
        extensions::{
            filters::{
                http::{fault::v3::HttpFault, router::v3::Router},
                network::http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter, Rds,
                    http_connection_manager::RouteSpecifier, http_filter,
                },
            },
            transport_sockets::tls::v3::{
                CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext,
                DownstreamTlsContext, UpstreamTlsContext,
                common_tls_context::ValidationContextType,
            },
        },
    },
};

use crate::{
    cluster, endpoint,
    model::{Mesh, MtlsMode, Node, Proxy, Resource, Service},
    names, route,
};

/// What a server's listener name begins with.
const INBOUND: &str = "xds.istio.io/grpc/lds/inbound/";
/// The certificate provider that the agent's gRPC bootstrap defines.
const PROVIDER: &str = "default";

/// Whether the node is a gRPC application rather than a proxy.
pub fn is_grpc(node: &Node) -> bool {
    node.meta("GENERATOR") == Some("grpc")
}

/// The listeners of these names; a name that no service has is left out, which tells the client that there is none.
pub fn listeners(mesh: &Mesh, proxy: &Proxy, wanted: &[&str]) -> Vec<Resource> {
    wanted
        .iter()
        .filter_map(|name| match name.strip_prefix(INBOUND) {
            Some(address) => server_listener(proxy, name, address),
            None => client_listener(mesh, proxy, name),
        })
        .collect()
}

/// The clusters of these names.
pub fn clusters(mesh: &Mesh, proxy: &Proxy, wanted: &[&str]) -> Vec<Resource> {
    cluster::outbound(mesh, proxy)
        .into_iter()
        .filter(|r| wanted.contains(&r.name.as_str()))
        .map(|r| {
            let full = Cluster::decode(r.value.as_ref()).expect("it was encoded as a cluster");
            Resource::new(r.name, &reduced(full), r.from)
        })
        .collect()
}

/// The route configurations of these names (`outbound|PORT||HOST`).
pub fn routes(mesh: &Mesh, proxy: &Proxy, wanted: &[&str]) -> Vec<Resource> {
    wanted
        .iter()
        .filter_map(|name| routes_of(mesh, proxy, name))
        .collect()
}

/// The endpoints of these clusters: the same as a proxy's.
pub fn endpoints(mesh: &Mesh, proxy: &Proxy, wanted: &[&str]) -> Vec<Resource> {
    endpoint::build(mesh, proxy, wanted.iter().copied())
}

fn client_listener(mesh: &Mesh, proxy: &Proxy, name: &str) -> Option<Resource> {
    let (host, port) = match name.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse::<u32>().ok()?)),
        None => (name, None),
    };
    let service = find(mesh, proxy, host)?;
    let port = match port {
        Some(port) => service.port(port)?.number,
        // Without a port the service must leave no choice.
        None => match service.ports.as_slice() {
            [only] => only.number,
            _ => return None,
        },
    };
    let manager = HttpConnectionManager {
        http_filters: vec![
            http_filter("envoy.filters.http.fault", any::pack(&HttpFault::default())),
            http_filter("envoy.filters.http.router", any::pack(&Router::default())),
        ],
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: Some(ads()),
            route_config_name: names::outbound_cluster(port, "", &service.hostname),
        })),
        ..HttpConnectionManager::default()
    };
    let listener = Listener {
        name: name.to_owned(),
        api_listener: Some(ApiListener {
            api_listener: Some(any::pack(&manager)),
        }),
        ..Listener::default()
    };
    Some(Resource::new(name, &listener, vec![service.origin.clone()]))
}

/// The service that a gRPC target means: a full name, or one short by the client's own domain.
fn find<'a>(mesh: &Mesh, proxy: &'a Proxy, host: &str) -> Option<&'a Service> {
    let domain = mesh.domain();
    [
        host.to_owned(),
        format!("{host}.{}.svc.{domain}", proxy.namespace()),
        format!("{host}.svc.{domain}"),
        format!("{host}.{domain}"),
    ]
    .iter()
    .find_map(|name| proxy.scope.service(name))
    .map(AsRef::as_ref)
}

fn server_listener(proxy: &Proxy, name: &str, address: &str) -> Option<Resource> {
    let (ip, port) = address.rsplit_once(':')?;
    let port: u32 = port.parse().ok()?;
    let mutual = match proxy.mtls.port(port) {
        MtlsMode::Strict => true,
        MtlsMode::Permissive => proxy
            .labels
            .get("security.istio.io/tlsMode")
            .is_some_and(|m| m == "istio"),
        _ => false,
    };
    let manager = HttpConnectionManager {
        http_filters: vec![http_filter(
            "envoy.filters.http.router",
            any::pack(&Router::default()),
        )],
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration {
            name: "inbound".into(),
            virtual_hosts: vec![VirtualHost {
                name: "inbound".into(),
                domains: vec!["*".into()],
                routes: vec![Route {
                    r#match: Some(RouteMatch {
                        path_specifier: Some(PathSpecifier::Prefix("/".into())),
                        ..RouteMatch::default()
                    }),
                    action: Some(Action::NonForwardingAction(NonForwardingAction {})),
                    ..Route::default()
                }],
                ..VirtualHost::default()
            }],
            ..RouteConfiguration::default()
        })),
        ..HttpConnectionManager::default()
    };
    let listener = Listener {
        name: name.to_owned(),
        address: Some(Address {
            address: Some(address::Address::SocketAddress(SocketAddress {
                address: ip.trim_matches(['[', ']']).to_owned(),
                port_specifier: Some(PortSpecifier::PortValue(port)),
                ..SocketAddress::default()
            })),
        }),
        filter_chains: vec![FilterChain {
            name: if mutual {
                "inbound-mtls"
            } else {
                "inbound-plaintext"
            }
            .into(),
            transport_socket: mutual.then(|| {
                tls(any::pack(&DownstreamTlsContext {
                    common_tls_context: Some(provided()),
                    require_client_certificate: Some(true),
                    ..DownstreamTlsContext::default()
                }))
            }),
            filters: vec![Filter {
                name: "envoy.filters.network.http_connection_manager".into(),
                config_type: Some(filter::ConfigType::TypedConfig(any::pack(&manager))),
            }],
            ..FilterChain::default()
        }],
        ..Listener::default()
    };
    Some(Resource::new(name, &listener, Vec::new()))
}

fn reduced(full: Cluster) -> Cluster {
    // gRPC knows these; LEAST_REQUEST only behind a switch, so that what is a default for proxies must not become a
    // rejection there.
    let lb_policy = match full.lb_policy() {
        LbPolicy::RingHash => LbPolicy::RingHash,
        _ => LbPolicy::RoundRobin,
    };
    let max_requests = full
        .circuit_breakers
        .iter()
        .flat_map(|b| &b.thresholds)
        .filter(|t| t.priority == 0)
        .find_map(|t| t.max_requests);
    // Only what a rule asks for: the automatic choice needs a match by endpoint, which gRPC has not.
    let explicit = full.transport_socket.is_some() && full.transport_socket_matches.is_empty();
    Cluster {
        name: full.name,
        cluster_discovery_type: full.cluster_discovery_type,
        eds_cluster_config: full.eds_cluster_config,
        load_assignment: full.load_assignment,
        lb_policy: lb_policy as i32,
        lb_config: full.lb_config.filter(|_| lb_policy == LbPolicy::RingHash),
        outlier_detection: full.outlier_detection,
        circuit_breakers: max_requests.map(|max| CircuitBreakers {
            thresholds: vec![Thresholds {
                max_requests: Some(max),
                ..Thresholds::default()
            }],
            ..CircuitBreakers::default()
        }),
        transport_socket: explicit.then(|| {
            tls(any::pack(&UpstreamTlsContext {
                common_tls_context: Some(provided()),
                ..UpstreamTlsContext::default()
            }))
        }),
        ..Cluster::default()
    }
}

fn routes_of(mesh: &Mesh, proxy: &Proxy, name: &str) -> Option<Resource> {
    let parts = names::parse_cluster(name).filter(|p| p.direction == "outbound")?;
    let of_port = route::build(mesh, proxy, &[parts.port.to_string()])
        .into_iter()
        .next()?;
    let full = RouteConfiguration::decode(of_port.value.as_ref())
        .expect("it was encoded as a route configuration");
    let mut virtual_hosts = full.virtual_hosts;
    virtual_hosts.retain(|v| v.domains.iter().any(|d| d == parts.host));
    for host in &mut virtual_hosts {
        // gRPC compares the whole authority, port included.
        let with_port: Vec<_> = host
            .domains
            .iter()
            .map(|d| format!("{d}:{}", parts.port))
            .collect();
        host.domains.extend(with_port);
        for route in &mut host.routes {
            route.decorator = None;
            route.metadata = None;
        }
    }
    let config = RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts,
        ..RouteConfiguration::default()
    };
    Some(Resource::new(name, &config, of_port.from))
}

fn http_filter(name: &str, config: proto::Any) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}

fn ads() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3 as i32,
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    }
}

fn tls(config: proto::Any) -> TransportSocket {
    TransportSocket {
        name: "envoy.transport_sockets.tls".into(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(config)),
    }
}

/// Certificates by the names under which the agent's bootstrap provides them.
fn provided() -> CommonTlsContext {
    let instance = |name: &str| CertificateProviderPluginInstance {
        instance_name: PROVIDER.into(),
        certificate_name: name.into(),
    };
    CommonTlsContext {
        tls_certificate_provider_instance: Some(instance("default")),
        validation_context_type: Some(ValidationContextType::ValidationContext(
            CertificateValidationContext {
                ca_certificate_provider_instance: Some(instance("ROOTCA")),
                ..CertificateValidationContext::default()
            },
        )),
        ..CommonTlsContext::default()
    }
}
