//! Patches of clusters.

use prost::Message;
use proto::{
    envoy::config::{
        cluster::v3::Cluster,
        core::v3::{TransportSocket, transport_socket::ConfigType},
    },
    istio::networking::v1alpha3::envoy_filter::{ApplyTo, PatchContext, patch::Operation},
    merge::merge_any,
};

use super::{Patch, note};
use crate::{
    model::{Mesh, Proxy, Resource},
    names,
};

/// Patches clusters of one context, and adds those that patches bring.
pub(crate) fn clusters(
    mesh: &Mesh,
    proxy: &Proxy,
    context: PatchContext,
    resources: Vec<Resource>,
) -> Vec<Resource> {
    let Some(patches) = super::patches(mesh, proxy) else {
        return resources;
    };
    let patches: Vec<_> = patches
        .of(ApplyTo::Cluster)
        .filter(|p| p.is_for(context))
        .cloned()
        .collect();
    if patches.is_empty() {
        return resources;
    }
    let mut out: Vec<Resource> = resources
        .into_iter()
        .filter_map(|r| patch(proxy, &patches, r))
        .collect();
    for patch in patches.iter().filter(|p| p.operation == Operation::Add) {
        // What is added in any context is added once.
        if context == PatchContext::SidecarInbound && !patch.names_context() {
            continue;
        }
        if let Some(added) = patch.value::<Cluster>() {
            out.push(Resource::new(
                added.name.clone(),
                &added,
                vec![patch.origin.clone()],
            ));
        }
    }
    out
}

fn patch(proxy: &Proxy, patches: &[std::sync::Arc<Patch>], resource: Resource) -> Option<Resource> {
    let matching: Vec<_> = patches
        .iter()
        .filter(|p| matches(p, &resource.name, proxy))
        .collect();
    if matching.is_empty() {
        return Some(resource);
    }
    let mut from = resource.from.clone();
    let mut cluster = Cluster::decode(resource.value.clone()).ok()?;
    for patch in matching {
        if patch.operation == Operation::Remove {
            return None;
        }
        if !patch.merges() {
            continue;
        }
        let socket = patch.value::<Cluster>().and_then(|c| c.transport_socket);
        match socket {
            Some(socket) => merge_socket(&mut cluster, socket),
            None => patch.merge_into(&mut cluster),
        }
        note(&mut from, &patch.origin);
    }
    Some(Resource::new(resource.name, &cluster, from))
}

/// A transport socket merges with the one of the same name; a cluster with other sockets keeps them.
fn merge_socket(cluster: &mut Cluster, socket: TransportSocket) {
    let target = if cluster.transport_socket_matches.is_empty() {
        cluster
            .transport_socket
            .as_mut()
            .filter(|s| s.name == socket.name)
    } else {
        let own = cluster.transport_socket_matches.iter_mut();
        let found = own
            .filter_map(|m| m.transport_socket.as_mut())
            .find(|s| s.name == socket.name);
        if found.is_none() {
            return;
        }
        found
    };
    let Some(target) = target else {
        cluster.transport_socket = Some(socket);
        return;
    };
    if let (Some(ConfigType::TypedConfig(into)), Some(ConfigType::TypedConfig(patch))) =
        (&mut target.config_type, &socket.config_type)
        && let Some(merged) = merge_any(into, patch)
    {
        *into = merged;
    }
}

fn matches(patch: &Patch, name: &str, proxy: &Proxy) -> bool {
    let Some(wanted) = patch.cluster() else {
        return true;
    };
    if !wanted.name.is_empty() {
        return wanted.name == name;
    }
    let parsed = names::parse_cluster(name);
    let (direction, port, subset, host) =
        parsed.map_or(("", 0, "", ""), |c| (c.direction, c.port, c.subset, c.host));
    let service_fits = |service: &str| {
        if direction == "inbound" {
            let mut served = proxy
                .service_targets
                .iter()
                .filter(|t| t.target_port == port)
                .peekable();
            if served.peek().is_some() {
                return served.any(|t| t.service.hostname == service);
            }
        }
        host == service
    };
    (wanted.subset.is_empty() || wanted.subset == subset)
        && (wanted.service.is_empty() || service_fits(&wanted.service))
        && (wanted.port_number == 0 || wanted.port_number == port)
}
