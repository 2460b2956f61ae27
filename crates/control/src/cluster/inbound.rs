//! Clusters for the ports that the proxy's own workload serves.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use proto::{
    Duration,
    envoy::config::{
        cluster::v3::cluster::{DiscoveryType, LbPolicy},
        core::v3::ExtraSourceAddress,
        endpoint::v3::{
            ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
            lb_endpoint::HostIdentifier,
        },
    },
    istio::{
        mesh::v1alpha1::mesh_config::inbound_traffic_policy,
        networking::v1alpha3::{IstioIngressListener, Sidecar, envoy_filter::PatchContext},
    },
};

use config::Object;

use super::{
    INBOUND_PASSTHROUGH,
    draft::{Draft, source_address},
    outbound::{passthrough, stat_name},
    policy,
};
use crate::{
    compat::Compat,
    endpoint::address,
    envoy_filter,
    model::{
        Created, Interception, Labels, Mesh, Origin, Port, Protocol, Proxy, Registry, Resolution,
        Resource, Service, ServiceTarget, TargetPort, destination_rule,
        service::{TrafficDistribution, UNSPECIFIED},
    },
    names,
};

/// Hosts of an original destination are never forgotten: they are this pod itself.
const NEVER: Duration = Duration {
    seconds: 9_223_372_035,
    nanos: 0,
};

/// Clusters for the served ports (none for a gateway), then the one for all other ports.
pub fn inbound(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    if proxy.is_router() {
        return Vec::new();
    }
    let mut out = Vec::new();
    match proxy
        .scope
        .sidecar
        .as_ref()
        .filter(|s| !s.spec.ingress.is_empty())
    {
        Some(sidecar) => {
            for listener in &sidecar.spec.ingress {
                out.extend(of_ingress(mesh, proxy, sidecar, listener));
            }
        }
        None if proxy.node.interception == Interception::None => {}
        None => {
            let mut by_port: BTreeMap<u32, Vec<&ServiceTarget>> = BTreeMap::new();
            for target in &proxy.service_targets {
                by_port.entry(target.target_port).or_default().push(target);
            }
            let local = binds_localhost(mesh).then(|| localhost(proxy));
            for (port, targets) in by_port {
                out.push(cluster(mesh, proxy, port, local, &targets, Vec::new()));
            }
        }
    }
    out.extend(passthroughs(mesh, proxy));
    envoy_filter::clusters(mesh, proxy, PatchContext::SidecarInbound, out)
}

fn passthroughs(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    let make = |name: &str, v4: bool| {
        let mut draft = passthrough(mesh, proxy, name);
        draft.bind_to(proxy);
        if let Some(source) = draft
            .cluster
            .upstream_bind_config
            .as_mut()
            .and_then(|b| b.source_address.as_mut())
        {
            source.address = if v4 { "127.0.0.6" } else { "::6" }.to_owned();
        }
        if mesh.settings().compat == Compat::Current
            && proxy.supports_v4()
            && proxy.supports_v6()
            && let Some(bind) = draft.cluster.upstream_bind_config.as_mut()
        {
            bind.extra_source_addresses = vec![ExtraSourceAddress {
                address: Some(source_address("::6")),
                ..ExtraSourceAddress::default()
            }];
        }
        draft.finish(Vec::new())
    };
    match mesh.settings().compat {
        Compat::Current => vec![make(INBOUND_PASSTHROUGH, proxy.supports_v4())],
        Compat::V1_13 => vec![
            make("InboundPassthroughClusterIpv4", true),
            make("InboundPassthroughClusterIpv6", false),
        ],
    }
}

/// The cluster of one port of the workload. `local`: the address to connect to, where it is not the one that was
/// called. The first of `targets` says what the port speaks.
fn cluster(
    mesh: &Mesh,
    proxy: &Proxy,
    number: u32,
    local: Option<&str>,
    targets: &[&ServiceTarget],
    mut from: Vec<Origin>,
) -> Resource {
    let first = targets[0];
    let name = names::inbound_cluster(number);
    let kind = if local.is_some() {
        DiscoveryType::Static
    } else {
        DiscoveryType::OriginalDst
    };
    let mut draft = Draft::new(&name, kind);
    if let Some(local) = local {
        draft.cluster.load_assignment = Some(one_endpoint(&name, local, first.target_port));
    } else {
        draft.cluster.cleanup_interval = Some(NEVER);
    }
    draft.set_protocol(mesh, proxy, &first.port);
    if !first.service.mesh_external {
        // Those that lead here from the same port number; one name for each host.
        let mut hosts = Vec::new();
        let mut services: Vec<&Service> = Vec::new();
        for target in targets
            .iter()
            .filter(|t| t.port.number == first.port.number)
        {
            if !hosts.contains(&&target.service.hostname) {
                hosts.push(&target.service.hostname);
                services.push(&target.service);
            }
        }
        draft.set_services(services);
    }
    let config = mesh.config();
    if !config.inbound_cluster_stat_name.is_empty() {
        draft.cluster.alt_stat_name = stat_name(
            &config.inbound_cluster_stat_name,
            &first.service,
            "",
            &first.port,
            number,
        );
    }
    from.extend(targets.iter().map(|t| t.service.origin.clone()));
    // The rule's limits hold on both sides.
    let rule = proxy
        .scope
        .destination_rule(false, &proxy.labels, &first.service.hostname);
    let mut own = None;
    if let Some(rule) = rule
        && let Some(whole) = &rule.rule.spec.traffic_policy
    {
        let (found, _) = destination_rule::port_policy(Some(whole), first.port.number);
        own = found.map(std::borrow::Cow::into_owned);
        if !first.service.mesh_external {
            draft.set_rule(rule);
        }
        from.extend(rule.from.iter().cloned());
    }
    let mut policy = policy::with_mesh_defaults(config, own);
    if let Some(pool) = proxy.scope.inbound_pool(number) {
        policy.get_or_insert_default().connection_pool = Some(*pool);
        from.extend(proxy.scope.origin());
    }
    let pool = policy.as_ref().and_then(|p| p.connection_pool.as_ref());
    let budget = policy.as_ref().and_then(|p| p.retry_budget.as_ref());
    policy::connection_pool(&mut draft, config, pool, budget);
    if draft.is(DiscoveryType::OriginalDst) {
        draft.set_lb(LbPolicy::ClusterProvided);
    }
    if !matches!(local, Some("127.0.0.1" | "::1")) {
        draft.bind_to(proxy);
    }
    let mut seen: Vec<Origin> = Vec::new();
    from.retain(|o| {
        !seen.contains(o) && {
            seen.push(o.clone());
            true
        }
    });
    draft.finish(from)
}

/// The cluster of an ingress listener; `None` where its endpoint cannot be read (validation has said so).
fn of_ingress(
    mesh: &Mesh,
    proxy: &Proxy,
    sidecar: &Arc<Object<Sidecar>>,
    listener: &IstioIngressListener,
) -> Option<Resource> {
    let port = listener.port.as_ref()?;
    let endpoint = listener.default_endpoint.as_str();
    let (local, target_port) = if endpoint.is_empty() {
        (None, 0)
    } else if endpoint.starts_with("unix://") {
        (Some(endpoint.to_owned()), 0)
    } else {
        let (host, port) = endpoint.rsplit_once(':')?;
        (
            local_address(proxy, host.trim_matches(['[', ']'])),
            port.parse().ok()?,
        )
    };
    let origin = Origin::of(config::Kind::Sidecar, sidecar);
    let served = proxy
        .service_targets
        .iter()
        .find(|t| t.target_port == port.number);
    let service = served.map_or_else(
        || {
            Arc::new(unnamed(
                &sidecar.meta.name,
                proxy.namespace(),
                origin.clone(),
            ))
        },
        |t| t.service.clone(),
    );
    let target = ServiceTarget {
        service,
        port: Port {
            name: port.name.clone(),
            number: port.number,
            protocol: Protocol::parse(&port.protocol),
            target: TargetPort::Number(port.number),
        },
        target_port,
    };
    Some(cluster(
        mesh,
        proxy,
        port.number,
        local.as_deref(),
        &[&target],
        vec![origin],
    ))
}

/// What stands for the service of an ingress port that no service names.
fn unnamed(name: &str, namespace: &str, origin: Origin) -> Service {
    Service {
        hostname: format!("{name}.{namespace}"),
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        registry: Registry::External,
        ports: Vec::new(),
        default_address: UNSPECIFIED.to_owned(),
        cluster_ips: Vec::new(),
        auto_v4: None,
        auto_v6: None,
        external_addresses: Vec::new(),
        resolution: Resolution::ClientSide,
        mesh_external: true,
        export_to: Default::default(),
        labels: Labels::new(),
        selector: Labels::new(),
        service_accounts: Vec::new(),
        external_name: String::new(),
        aliases: Vec::new(),
        node_local: false,
        publish_not_ready: false,
        traffic_distribution: TrafficDistribution::Any,
        dns_race_connect: false,
        passthrough_ports: BTreeMap::new(),
        object_name: name.to_owned(),
        created: Created::default(),
        origin,
    }
}

/// The address that an endpoint's host means: `0.0.0.0` and `::` the pod's own, the loopback that of a family that it has.
fn local_address(proxy: &Proxy, host: &str) -> Option<String> {
    let own = |v4: bool| {
        proxy
            .node
            .addresses
            .iter()
            .find(|a| a.is_ipv4() == v4)
            .map(IpAddr::to_string)
    };
    match host {
        "0.0.0.0" => Some(own(true).unwrap_or_else(|| "127.0.0.1".to_owned())),
        "::" => Some(own(false).unwrap_or_else(|| "::1".to_owned())),
        "127.0.0.1" | "::1" => Some(localhost(proxy).to_owned()),
        _ => None,
    }
}

fn localhost(proxy: &Proxy) -> &'static str {
    if proxy.supports_v4() {
        "127.0.0.1"
    } else {
        "::1"
    }
}

fn binds_localhost(mesh: &Mesh) -> bool {
    let policy = mesh.config().inbound_traffic_policy.as_ref();
    policy.is_some_and(|p| p.mode() == inbound_traffic_policy::Mode::Localhost)
}

fn one_endpoint(name: &str, host: &str, port: u32) -> ClusterLoadAssignment {
    let endpoint = LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(address(host, port)),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    };
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: vec![endpoint],
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}
