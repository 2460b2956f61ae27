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

/// Which message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Request,
    Response,
}

/// Applies the operations on the request that is in `exchange`, and gives it the host of the weighted cluster, which the
/// operations of the other levels see.
pub(crate) fn request(exchange: &mut Exchange<'_>) {
    let mut any = false;
    each(&exchange.route, Side::Request, |_| any = true);
    let host = weighted(&exchange.route).and_then(|entry| entry.host_rewrite.clone());
    if !any && host.is_none() {
        return;
    }
    let route = exchange.route.clone();
    let own = weighted(&route).map(|entry| &entry.headers.request);
    if let Some(mutations) = own {
        request_level(mutations, exchange);
    }
    if let Some(host) = host.filter(|host| !host.is_empty()) {
        exchange.request.set_authority(&host);
    }
    each(&route, Side::Request, |mutations| {
        if !own.is_some_and(|own| std::ptr::eq(own, mutations)) {
            request_level(mutations, exchange);
        }
    });
}

fn request_level(mutations: &HeaderMutations, exchange: &mut Exchange<'_>) {
    remove(mutations, &mut exchange.request.headers);
    let headers = &exchange.request.headers;
    let added = values(&mutations.add, exchange, None, headers);
    put(added, &mut exchange.request.headers, Side::Request);
}

/// Applies the operations on a response.
pub(crate) fn response(exchange: &Exchange<'_>, headers: &mut Headers) {
    each(&exchange.route, Side::Response, |mutations| {
        remove(mutations, headers);
        add(&mutations.add, exchange, headers);
    });
}

/// Adds headers to those of a reply.
pub(crate) fn add(adds: &[HeaderAdd], exchange: &Exchange<'_>, headers: &mut Headers) {
    let added = values(adds, exchange, Some(headers), headers);
    put(added, headers, Side::Response);
}

/// Adds headers to the request.
pub(crate) fn add_to_request(adds: &[HeaderAdd], exchange: &mut Exchange<'_>) {
    let added = values(adds, exchange, None, &exchange.request.headers);
    put(added, &mut exchange.request.headers, Side::Request);
}

/// The levels in their order: the weighted cluster always first; then route, virtual host, configuration, so that the
/// last has the last word; these the other way round where the configuration says so.
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
        levels[1..].reverse();
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
        mutate_one(
            mutation,
            value,
            &mut exchange.request.headers,
            Side::Request,
        );
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
        mutate_one(mutation, value, headers, Side::Request);
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
        mutate_one(mutation, value, headers, Side::Response);
    }
}

fn mutate_one(mutation: &HeaderMutation, value: Vec<u8>, headers: &mut Headers, side: Side) {
    match mutation {
        HeaderMutation::Remove(name) => {
            headers.remove(name);
        }
        HeaderMutation::Append(add) => add_one(add, value, headers, side),
        HeaderMutation::RemoveOnMatch(matcher) => headers.retain(|name, _| {
            name == "host" || !matcher.matches(name.to_ascii_lowercase().as_bytes())
        }),
    }
}

/// Adds one header, whose value was worked out.
fn add_one(add: &HeaderAdd, value: Vec<u8>, headers: &mut Headers, side: Side) {
    if value.is_empty() && !add.keep_empty_value {
        return;
    }
    match add.action {
        AppendAction::AppendIfExistsOrAdd => append(add, &value, headers, side),
        AppendAction::AddIfAbsent => headers.set_if_absent(&add.name, value),
        AppendAction::OverwriteIfExistsOrAdd => headers.set(&add.name, value),
        AppendAction::OverwriteIfExists => {
            if headers.contains(&add.name) {
                headers.set(&add.name, value);
            }
        }
    }
}

fn append(add: &HeaderAdd, value: &[u8], headers: &mut Headers, side: Side) {
    let joined = match side {
        Side::Request => add.joined.request,
        Side::Response => add.joined.response,
    };
    match joined {
        true => crate::http::append(headers, &add.name, value, ","),
        false => headers.append(&add.name, value),
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

/// The headers of a level that are to be added: values and conditions know the message as the removals left it, none of
/// them what another adds.
pub(crate) fn values<'m>(
    adds: &'m [HeaderAdd],
    exchange: &Exchange<'_>,
    response: Option<&Headers>,
    headers: &Headers,
) -> Vec<(&'m HeaderAdd, Vec<u8>)> {
    let wanted = adds.iter().filter(|add| match add.action {
        AppendAction::AddIfAbsent => !headers.contains(&add.name),
        AppendAction::OverwriteIfExists => headers.contains(&add.name),
        AppendAction::AppendIfExistsOrAdd | AppendAction::OverwriteIfExistsOrAdd => true,
    });
    wanted
        .map(|add| (add, value(add, exchange, response)))
        .filter(|(add, value)| !value.is_empty() || add.keep_empty_value)
        .collect()
}

/// Removals come first.
fn remove(mutations: &HeaderMutations, headers: &mut Headers) {
    for name in &mutations.remove {
        headers.remove(name);
    }
}

/// First those that replace what is there, then those that come beside it.
pub(crate) fn put(added: Vec<(&HeaderAdd, Vec<u8>)>, headers: &mut Headers, side: Side) {
    let replaces = |add: &HeaderAdd| {
        matches!(
            add.action,
            AppendAction::OverwriteIfExistsOrAdd | AppendAction::OverwriteIfExists
        )
    };
    for (add, value) in added.iter().filter(|(add, _)| replaces(add)) {
        headers.set(&add.name, value);
    }
    for (add, value) in added.iter().filter(|(add, _)| !replaces(add)) {
        append(add, value, headers, side);
    }
}
