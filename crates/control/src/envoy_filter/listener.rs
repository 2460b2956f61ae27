//! Patches of listeners: themselves, their listener filters, chains, network filters and HTTP filters.

use std::sync::Arc;

use prost::Message;
use proto::{
    any,
    envoy::{
        config::{
            core::v3::{
                TrafficDirection, address::Address, socket_address::PortSpecifier, transport_socket,
            },
            listener::v3::{
                Filter, FilterChain, Listener, ListenerFilter, filter, listener_filter,
            },
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter,
        },
    },
    istio::networking::v1alpha3::envoy_filter::{
        ApplyTo, PatchContext,
        listener_match::{FilterChainMatch, FilterMatch},
        patch::Operation,
    },
    merge::merge_any,
};

use super::{Patch, Patches, note, outbound_context, place, route};
use crate::model::{Mesh, Origin, Proxy, Resource};

const HCM: &str = "envoy.filters.network.http_connection_manager";
const VIRTUAL: [&str; 2] = ["virtualInbound", "virtualOutbound"];

/// Patches listeners; one that a patch removes is left out.
pub(crate) fn listeners(mesh: &Mesh, proxy: &Proxy, resources: Vec<Resource>) -> Vec<Resource> {
    let Some(patches) = super::patches(mesh, proxy) else {
        return resources;
    };
    resources
        .into_iter()
        .filter_map(|r| patch_listener(&patches, proxy, r))
        .collect()
}

/// The listeners that patches bring: for a gateway all, for a sidecar the inbound or the outbound ones.
pub(crate) fn added_listeners(mesh: &Mesh, proxy: &Proxy, inbound: bool) -> Vec<Resource> {
    let Some(patches) = super::patches(mesh, proxy) else {
        return Vec::new();
    };
    let context = if inbound {
        PatchContext::SidecarInbound
    } else {
        outbound_context(proxy)
    };
    patches
        .of(ApplyTo::Listener)
        .filter(|p| p.operation == Operation::Add && p.is_for(context))
        .filter(|p| !inbound || p.names_context())
        .filter_map(|p| {
            let listener: Listener = p.value()?;
            Some(Resource::new(
                listener.name.clone(),
                &listener,
                vec![p.origin.clone()],
            ))
        })
        .collect()
}

/// A listener being patched.
struct Work<'a> {
    patches: &'a Patches,
    proxy: &'a Proxy,
    context: PatchContext,
    name: String,
    port: Option<u32>,
    from: Vec<Origin>,
    changed: bool,
}

fn patch_listener(patches: &Patches, proxy: &Proxy, resource: Resource) -> Option<Resource> {
    let Ok(mut listener) = Listener::decode(resource.value.clone()) else {
        return Some(resource);
    };
    let inbound = listener.traffic_direction() == TrafficDirection::Inbound;
    let context = match outbound_context(proxy) {
        PatchContext::SidecarOutbound if inbound => PatchContext::SidecarInbound,
        other => other,
    };
    let mut work = Work {
        patches,
        proxy,
        context,
        name: listener.name.clone(),
        port: port_of(&listener),
        from: resource.from.clone(),
        changed: false,
    };
    for patch in work.all(ApplyTo::Listener) {
        if patch.operation == Operation::Remove {
            return None;
        }
        if patch.merges() {
            patch.merge_into(&mut listener);
            work.note(&patch);
        }
    }
    work.listener_filters(&mut listener.listener_filters);
    let had_default = listener.default_filter_chain.is_some();
    for chain in listener
        .filter_chains
        .iter_mut()
        .chain(&mut listener.default_filter_chain)
    {
        if !chain.filters.is_empty() {
            work.chain(chain);
        }
    }
    for patch in work.all(ApplyTo::FilterChain) {
        if patch.operation == Operation::Add
            && let Some(chain) = patch.value()
        {
            listener.filter_chains.push(chain);
            work.note(&patch);
        }
    }
    if work.changed {
        listener.filter_chains.retain(|c| !c.filters.is_empty());
        if had_default
            && listener
                .default_filter_chain
                .as_ref()
                .is_some_and(|c| c.filters.is_empty())
        {
            listener.default_filter_chain = None;
        }
        return Some(Resource::new(resource.name, &listener, work.from));
    }
    Some(resource)
}

impl Work<'_> {
    /// Patches of a kind that are for this listener.
    fn all(&self, apply_to: ApplyTo) -> Vec<Arc<Patch>> {
        self.patches
            .of(apply_to)
            .filter(|p| p.is_for(self.context) && self.matches(p, apply_to))
            .cloned()
            .collect()
    }

    fn matches(&self, patch: &Patch, apply_to: ApplyTo) -> bool {
        let Some(wanted) = patch.listener() else {
            return true;
        };
        if !wanted.name.is_empty() && wanted.name != self.name {
            return false;
        }
        // The ports of the virtual listeners are those of their chains.
        if apply_to != ApplyTo::Listener && self.is_virtual() {
            return true;
        }
        wanted.port_number == 0 || self.port == Some(wanted.port_number)
    }

    fn is_virtual(&self) -> bool {
        VIRTUAL.contains(&self.name.as_str())
    }

    fn note(&mut self, patch: &Patch) {
        note(&mut self.from, &patch.origin);
        self.changed = true;
    }

    fn chain_matches(&self, patch: &Patch, chain: &FilterChain) -> bool {
        let Some(wanted) = patch.listener() else {
            return true;
        };
        let rule = chain.filter_chain_match.as_ref();
        let port = rule.and_then(|m| m.destination_port);
        if self.is_virtual() && wanted.port_number > 0 && port != Some(wanted.port_number) {
            return false;
        }
        let Some(wanted) = &wanted.filter_chain else {
            return true;
        };
        let FilterChainMatch {
            name,
            sni,
            transport_protocol,
            application_protocols,
            destination_port,
            ..
        } = wanted;
        let has = |test: &dyn Fn(&proto::envoy::config::listener::v3::FilterChainMatch) -> bool| {
            rule.is_some_and(test)
        };
        (name.is_empty() || *name == chain.name)
            && (sni.is_empty() || has(&|m| m.server_names.contains(sni)))
            && (transport_protocol.is_empty()
                || has(&|m| m.transport_protocol == *transport_protocol))
            && (application_protocols.is_empty()
                || has(&|m| {
                    application_protocols
                        .split(',')
                        .all(|p| m.application_protocols.iter().any(|a| a == p))
                }))
            && (*destination_port == 0 || port == Some(*destination_port))
    }

    fn listener_filters(&mut self, list: &mut Vec<ListenerFilter>) {
        for patch in self.all(ApplyTo::ListenerFilter) {
            let wanted = patch
                .listener()
                .map(|m| m.listener_filter.as_str())
                .filter(|n| !n.is_empty());
            let changed = edit(
                list,
                &patch,
                wanted,
                |f| &f.name,
                |filter| {
                    let Some(value) = patch.value::<ListenerFilter>() else {
                        return false;
                    };
                    if let (
                        Some(listener_filter::ConfigType::TypedConfig(into)),
                        Some(listener_filter::ConfigType::TypedConfig(from)),
                    ) = (&mut filter.config_type, &value.config_type)
                        && let Some(merged) = merge_any(into, from)
                    {
                        *into = merged;
                        return true;
                    }
                    false
                },
            );
            if changed {
                self.note(&patch);
            }
        }
    }

    fn chain(&mut self, chain: &mut FilterChain) {
        for patch in self.all(ApplyTo::FilterChain) {
            if !self.chain_matches(&patch, chain) {
                continue;
            }
            if patch.operation == Operation::Remove {
                chain.filters.clear();
                self.note(&patch);
                return;
            }
            if patch.merges() {
                if !merge_chain_socket(chain, &patch) {
                    patch.merge_into(chain);
                }
                self.note(&patch);
            }
        }
        self.network_filters(chain);
    }

    fn network_filters(&mut self, chain: &mut FilterChain) {
        for patch in self.all(ApplyTo::NetworkFilter) {
            // Merging comes after everything else, on the final list.
            if patch.merges() || !self.chain_matches(&patch, chain) {
                continue;
            }
            let wanted = filter_wanted(&patch).map(|f| f.name.as_str());
            if edit(&mut chain.filters, &patch, wanted, |f| &f.name, |_| false) {
                self.note(&patch);
            }
        }
        let mut filters = std::mem::take(&mut chain.filters);
        for filter in &mut filters {
            for patch in self.all(ApplyTo::NetworkFilter) {
                let fits = filter_wanted(&patch).is_none_or(|w| w.name == filter.name);
                if patch.operation == Operation::Merge
                    && fits
                    && self.chain_matches(&patch, chain)
                    && merge_filter(filter, &patch)
                {
                    self.note(&patch);
                }
            }
            if filter.name == HCM {
                self.connection_manager(chain, filter);
            }
        }
        chain.filters = filters;
    }

    fn connection_manager(&mut self, chain: &FilterChain, filter: &mut Filter) {
        let Some(filter::ConfigType::TypedConfig(config)) = &mut filter.config_type else {
            return;
        };
        let Ok(mut hcm) = any::unpack::<HttpConnectionManager>(config) else {
            return;
        };
        let before = self.changed;
        self.changed = false;
        if let Some(RouteSpecifier::RouteConfig(routes)) = &mut hcm.route_specifier {
            self.changed |= route::apply(
                self.patches,
                self.proxy,
                self.context,
                routes,
                &mut self.from,
            );
        }
        let patches: Vec<_> = self
            .all(ApplyTo::HttpFilter)
            .into_iter()
            .filter(|p| {
                self.chain_matches(p, chain)
                    && filter_wanted(p).is_none_or(|w| w.name == filter.name)
            })
            .collect();
        let wanted = |patch: &Patch| {
            filter_wanted(patch)
                .and_then(|f| f.sub_filter.as_ref())
                .map(|s| s.name.clone())
        };
        for patch in patches.iter().filter(|p| !p.merges()) {
            if edit(
                &mut hcm.http_filters,
                patch,
                wanted(patch).as_deref(),
                |f| &f.name,
                |_| false,
            ) {
                self.note(patch);
            }
        }
        for http in &mut hcm.http_filters {
            for patch in patches.iter().filter(|p| p.operation == Operation::Merge) {
                if wanted(patch).is_none_or(|name| name == http.name)
                    && merge_http_filter(http, patch)
                {
                    self.note(patch);
                }
            }
        }
        if self.changed {
            *config = any::pack(&hcm);
        }
        self.changed |= before;
    }
}

/// Adds, inserts, replaces, removes or merges in a list of named things. `wanted`: the name that is asked for.
fn edit<T: Message + Default>(
    list: &mut Vec<T>,
    patch: &Patch,
    wanted: Option<&str>,
    name: impl Fn(&T) -> &String,
    mut merge: impl FnMut(&mut T) -> bool,
) -> bool {
    let operation = patch.operation;
    match (operation, wanted) {
        (Operation::Remove, Some(wanted)) => {
            let before = list.len();
            list.retain(|e| name(e) != wanted);
            return before != list.len();
        }
        (Operation::Merge, Some(wanted)) => {
            let mut any = false;
            for element in list.iter_mut() {
                if name(element) == wanted {
                    any |= merge(element);
                }
            }
            return any;
        }
        (
            Operation::Remove
            | Operation::Merge
            | Operation::Replace
            | Operation::MergeAndReplaceList,
            None,
        ) => {
            return false;
        }
        _ => {}
    }
    let Some(value) = patch.value::<T>() else {
        return false;
    };
    match (operation, wanted) {
        (Operation::Add, _) | (Operation::InsertAfter, None) => list.push(value),
        (Operation::InsertFirst, _) | (Operation::InsertBefore, None) => list.insert(0, value),
        (Operation::InsertAfter | Operation::InsertBefore | Operation::Replace, Some(wanted)) => {
            return place(list, value, operation, |e| name(e) == wanted);
        }
        _ => return false,
    }
    true
}

fn filter_wanted(patch: &Patch) -> Option<&FilterMatch> {
    patch.listener()?.filter_chain.as_ref()?.filter.as_ref()
}

fn merge_filter(filter: &mut Filter, patch: &Patch) -> bool {
    let Some(value) = patch.value::<Filter>() else {
        return false;
    };
    let Some(filter::ConfigType::TypedConfig(into)) = &mut filter.config_type else {
        return false;
    };
    if let Some(filter::ConfigType::TypedConfig(from)) = &value.config_type
        && let Some(merged) = merge_any(into, from)
    {
        *into = merged;
    }
    if !value.name.is_empty() {
        filter.name = value.name;
    }
    true
}

fn merge_http_filter(filter: &mut HttpFilter, patch: &Patch) -> bool {
    let Some(value) = patch.value::<HttpFilter>() else {
        return false;
    };
    let Some(http_filter::ConfigType::TypedConfig(into)) = &mut filter.config_type else {
        return false;
    };
    if let Some(http_filter::ConfigType::TypedConfig(from)) = &value.config_type
        && let Some(merged) = merge_any(into, from)
    {
        *into = merged;
    }
    if !value.name.is_empty() {
        filter.name = value.name;
    }
    true
}

/// Merges the patch's transport socket with the chain's of the same name; whether the patch was about that.
fn merge_chain_socket(chain: &mut FilterChain, patch: &Patch) -> bool {
    let value = patch
        .value::<FilterChain>()
        .and_then(|c| c.transport_socket);
    let (Some(socket), Some(own)) = (value, &mut chain.transport_socket) else {
        return false;
    };
    if socket.name != own.name {
        return false;
    }
    if let (
        Some(transport_socket::ConfigType::TypedConfig(into)),
        Some(transport_socket::ConfigType::TypedConfig(from)),
    ) = (&mut own.config_type, &socket.config_type)
        && let Some(merged) = merge_any(into, from)
    {
        *into = merged;
    }
    true
}

fn port_of(listener: &Listener) -> Option<u32> {
    match listener.address.as_ref()?.address.as_ref()? {
        Address::SocketAddress(socket) => match socket.port_specifier.as_ref()? {
            PortSpecifier::PortValue(port) => Some(*port),
            PortSpecifier::NamedPort(_) => None,
        },
        _ => None,
    }
}
