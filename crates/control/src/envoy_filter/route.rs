//! Patches of route configurations, their virtual hosts and routes.

use std::collections::BTreeSet;

use prost::Message;
use proto::{
    envoy::config::route::v3::{Route, RouteConfiguration, VirtualHost, route::Action},
    istio::networking::v1alpha3::envoy_filter::{
        ApplyTo, PatchContext,
        patch::Operation,
        route_configuration_match::{RouteMatch, route_match},
    },
};

use super::{Patch, Patches, note, outbound_context, place};
use crate::{
    model::{Mesh, Origin, Proxy, Resource},
    names,
};

/// Patches what is sent by RDS.
pub(crate) fn routes(mesh: &Mesh, proxy: &Proxy, resources: Vec<Resource>) -> Vec<Resource> {
    let Some(patches) = super::patches(mesh, proxy) else {
        return resources;
    };
    let context = outbound_context(proxy);
    resources
        .into_iter()
        .map(|resource| {
            let Ok(mut routes) = RouteConfiguration::decode(resource.value.clone()) else {
                return resource;
            };
            let mut from = resource.from.clone();
            if apply(&patches, proxy, context, &mut routes, &mut from) {
                Resource::new(resource.name, &routes, from)
            } else {
                resource
            }
        })
        .collect()
}

/// Patches one configuration; whether anything was changed.
pub(super) fn apply(
    patches: &Patches,
    proxy: &Proxy,
    context: PatchContext,
    routes: &mut RouteConfiguration,
    from: &mut Vec<Origin>,
) -> bool {
    let all = |apply_to| {
        let name = routes.name.clone();
        patches
            .of(apply_to)
            .filter(|p| p.is_for(context) && configuration_matches(p, context, &name, proxy))
            .cloned()
            .collect::<Vec<_>>()
    };
    let whole = all(ApplyTo::RouteConfiguration);
    let hosts = all(ApplyTo::VirtualHost);
    let inner = all(ApplyTo::HttpRoute);
    let mut changed = false;
    for patch in whole.iter().filter(|p| p.merges()) {
        patch.merge_into(routes);
        note(from, &patch.origin);
        changed = true;
    }
    let mut removed = BTreeSet::new();
    for (i, host) in routes.virtual_hosts.iter_mut().enumerate() {
        let mut gone = false;
        for patch in &hosts {
            if !host_matches(patch, host) {
                continue;
            }
            match patch.operation {
                Operation::Remove => gone = true,
                Operation::Replace => match patch.value() {
                    Some(value) => *host = value,
                    None => continue,
                },
                _ if patch.merges() => patch.merge_into(host),
                _ => continue,
            }
            note(from, &patch.origin);
            changed = true;
            if gone {
                break;
            }
        }
        if gone {
            removed.insert(i);
            continue;
        }
        for patch in inner
            .iter()
            .filter(|p| host_matches(p, host))
            .collect::<Vec<_>>()
        {
            if patch_routes(patch, &mut host.routes) {
                note(from, &patch.origin);
                changed = true;
            }
        }
    }
    let mut index = 0;
    routes.virtual_hosts.retain(|_| {
        index += 1;
        !removed.contains(&(index - 1))
    });
    for patch in hosts.iter().filter(|p| p.operation == Operation::Add) {
        if let Some(host) = patch.value() {
            routes.virtual_hosts.push(host);
            note(from, &patch.origin);
            changed = true;
        }
    }
    changed
}

fn patch_routes(patch: &Patch, routes: &mut Vec<Route>) -> bool {
    let wanted = patch
        .routes()
        .and_then(|m| m.vhost.as_ref())
        .and_then(|v| v.route.as_ref());
    let fits = |route: &Route| wanted.is_none_or(|w| route_matches(w, route));
    match patch.operation {
        Operation::Remove => {
            let before = routes.len();
            routes.retain(|r| !fits(r));
            routes.len() != before
        }
        Operation::Merge | Operation::MergeAndReplaceList => {
            let mut any = false;
            for route in routes.iter_mut().filter(|r| fits(r)) {
                patch.merge_into(route);
                any = true;
            }
            any
        }
        operation => {
            let Some(value) = patch.value::<Route>() else {
                return false;
            };
            match (operation, wanted) {
                (Operation::Add, _) | (Operation::InsertAfter, None) => routes.push(value),
                (Operation::InsertBefore | Operation::InsertFirst, None) => routes.insert(0, value),
                (
                    Operation::InsertAfter | Operation::InsertBefore | Operation::InsertFirst,
                    Some(_),
                ) => {
                    return place(routes, value, operation, fits);
                }
                _ => return false,
            }
            true
        }
    }
}

fn configuration_matches(patch: &Patch, context: PatchContext, name: &str, proxy: &Proxy) -> bool {
    let Some(wanted) = patch.routes() else {
        return true;
    };
    if !wanted.name.is_empty() && wanted.name != name {
        return false;
    }
    if context != PatchContext::Gateway {
        let port =
            || names::parse_cluster(name).map_or_else(|| name.parse().unwrap_or(0), |c| c.port);
        return wanted.port_number == 0 || wanted.port_number == port();
    }
    // `http.PORT[.BIND]` or `https.PORT.PORTNAME.GATEWAY.NAMESPACE`.
    let parts: Vec<&str> = name.split('.').collect();
    let port: u32 = parts.get(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    let (port_name, gateway) = match parts[..] {
        ["https", _, port_name, gateway, namespace, ..] => {
            (port_name, format!("{namespace}/{gateway}"))
        }
        _ => ("", String::new()),
    };
    let port_fits = || {
        let mut served = proxy
            .service_targets
            .iter()
            .filter(|t| t.target_port == port)
            .peekable();
        match served.peek() {
            Some(_) => served.any(|t| t.port.number == wanted.port_number),
            None => port == wanted.port_number,
        }
    };
    (wanted.port_name.is_empty() || wanted.port_name == port_name)
        && (wanted.gateway.is_empty() || wanted.gateway == gateway)
        && (wanted.port_number == 0 || port_fits())
}

fn host_matches(patch: &Patch, host: &VirtualHost) -> bool {
    let Some(wanted) = patch.routes().and_then(|m| m.vhost.as_ref()) else {
        return true;
    };
    (wanted.name.is_empty() || wanted.name == host.name)
        && (wanted.domain_name.is_empty() || host.domains.contains(&wanted.domain_name))
}

fn route_matches(wanted: &RouteMatch, route: &Route) -> bool {
    if !wanted.name.is_empty() && wanted.name != route.name {
        return false;
    }
    let action = wanted.action();
    match (action, &route.action) {
        (route_match::Action::Any, _) => true,
        (_, Some(Action::Route(_))) => action == route_match::Action::Route,
        (_, Some(Action::Redirect(_))) => action == route_match::Action::Redirect,
        (_, Some(Action::DirectResponse(_))) => action == route_match::Action::DirectResponse,
        _ => true,
    }
}
