//! Header operations of routes, on both heads.

use outrigger_http::Headers;

use crate::{
    access_log::format,
    http::Exchange,
    plan::{
        header::{AppendAction, HeaderAdd, HeaderMutation, HeaderMutations},
        route::{Action, ClusterSpecifier, ClusterWeight, HeaderOperations},
    },
};

/// Which side's operations.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Request,
    Response,
}

/// Applies the operations on the request that is in `exchange`.
pub(crate) fn request(exchange: &mut Exchange<'_>) {
    let mut any = false;
    each(&exchange.route, Side::Request, |_| any = true);
    if !any {
        return;
    }
    let route = exchange.route.clone();
    each(&route, Side::Request, |mutations| {
        let added = values(mutations, exchange, None);
        apply(mutations, added, &mut exchange.request.headers);
    });
}

/// Applies the operations on a response.
pub(crate) fn response(exchange: &Exchange<'_>, headers: &mut Headers) {
    each(&exchange.route, Side::Response, |mutations| {
        let added = values(mutations, exchange, Some(headers));
        apply(mutations, added, headers);
    });
}

/// The levels in their order: weighted cluster, route, virtual host, configuration, so that the
/// last has the last word; the other way round where the configuration says so.
fn each(route: &crate::http::RouteRef, side: Side, mut apply: impl FnMut(&HeaderMutations)) {
    let weighted = weighted(route).map(|entry| &entry.headers);
    let (virtual_host, at) = match route.get() {
        Some((virtual_host, route)) => (Some(&virtual_host.headers), Some(&route.headers)),
        None => (None, None),
    };
    let configuration = route.configuration().map(|routes| &routes.headers);
    let mut levels: [Option<&HeaderOperations>; 4] = [weighted, at, virtual_host, configuration];
    if route
        .configuration()
        .is_some_and(|routes| routes.most_specific_header_mutations_wins)
    {
        levels.reverse();
    }
    for operations in levels.into_iter().flatten() {
        let mutations = match side {
            Side::Request => &operations.request,
            Side::Response => &operations.response,
        };
        if !mutations.is_empty() {
            apply(mutations);
        }
    }
}

/// The entry of the weighted cluster that was drawn.
pub(crate) fn weighted(route: &crate::http::RouteRef) -> Option<&ClusterWeight> {
    match &route.route()?.action {
        Action::Route(action) => match &action.cluster {
            ClusterSpecifier::Weighted(clusters) => clusters.clusters.get(route.weighted?),
            _ => None,
        },
        _ => None,
    }
}

/// Applies single mutations, in their order, to the request.
pub(crate) fn mutate_request(mutations: &[HeaderMutation], exchange: &mut Exchange<'_>) {
    for mutation in mutations {
        let value = match mutation {
            HeaderMutation::Append(add) => value(add, exchange, None),
            _ => Vec::new(),
        };
        mutate_one(mutation, value, &mut exchange.request.headers);
    }
}

/// Applies single mutations to a copy of the request.
pub(crate) fn mutate_copy(
    mutations: &[HeaderMutation],
    exchange: &Exchange<'_>,
    headers: &mut Headers,
) {
    for mutation in mutations {
        let value = match mutation {
            HeaderMutation::Append(add) => value(add, exchange, None),
            _ => Vec::new(),
        };
        mutate_one(mutation, value, headers);
    }
}

/// Applies single mutations to the fields of a response or of trailers.
pub(crate) fn mutate_response(
    mutations: &[HeaderMutation],
    exchange: &Exchange<'_>,
    headers: &mut Headers,
) {
    for mutation in mutations {
        let value = match mutation {
            HeaderMutation::Append(add) => value(add, exchange, Some(headers)),
            _ => Vec::new(),
        };
        mutate_one(mutation, value, headers);
    }
}

fn mutate_one(mutation: &HeaderMutation, value: Vec<u8>, headers: &mut Headers) {
    match mutation {
        HeaderMutation::Remove(name) => {
            headers.remove(name);
        }
        HeaderMutation::Append(add) => add_one(add, value, headers),
        HeaderMutation::RemoveOnMatch(matcher) => headers.retain(|name, _| {
            name == "host" || !matcher.matches(name.to_ascii_lowercase().as_bytes())
        }),
    }
}

/// Adds one header, whose value was worked out.
pub(crate) fn add_one(add: &HeaderAdd, value: Vec<u8>, headers: &mut Headers) {
    if value.is_empty() && !add.keep_empty_value {
        return;
    }
    match add.action {
        AppendAction::AppendIfExistsOrAdd => headers.append(&add.name, value),
        AppendAction::AddIfAbsent => headers.set_if_absent(&add.name, value),
        AppendAction::OverwriteIfExistsOrAdd => headers.set(&add.name, value),
        AppendAction::OverwriteIfExists => {
            if headers.contains(&add.name) {
                headers.set(&add.name, value);
            }
        }
    }
}

/// The value of one header to add.
pub(crate) fn value(
    add: &HeaderAdd,
    exchange: &Exchange<'_>,
    response: Option<&Headers>,
) -> Vec<u8> {
    let mut value = Vec::new();
    format::header_value(&add.value, exchange, response, &mut value);
    value
}

fn values(
    mutations: &HeaderMutations,
    exchange: &Exchange<'_>,
    response: Option<&Headers>,
) -> Vec<Vec<u8>> {
    mutations
        .add
        .iter()
        .map(|add| value(add, exchange, response))
        .collect()
}

fn apply(mutations: &HeaderMutations, values: Vec<Vec<u8>>, headers: &mut Headers) {
    for (add, value) in mutations.add.iter().zip(values) {
        add_one(add, value, headers);
    }
    for name in &mutations.remove {
        headers.remove(name);
    }
}
