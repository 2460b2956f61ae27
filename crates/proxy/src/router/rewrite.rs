//! Rewrites of path and host.

use crate::{
    access_log::format,
    http::Exchange,
    plan::route::{Action, HostRewrite, PathMatch, RouteMatch},
};

/// Rewrites the request's host and path as its route says. `envoy_headers`: tells the upstream the
/// two as they were.
pub(crate) fn request(exchange: &mut Exchange<'_>, envoy_headers: bool) {
    // Most routes rewrite nothing.
    let rewrites = exchange.route.action().is_some_and(|action| {
        action.host_rewrite != HostRewrite::None
            || action.prefix_rewrite.is_some()
            || action.regex_rewrite.is_some()
            || action.path_rewrite.is_some()
            || action.template_rewrite.is_some()
    });
    if !rewrites {
        return;
    }
    let reference = exchange.route.clone();
    let Some(route) = reference.route() else {
        return;
    };
    let Action::Route(action) = &route.action else {
        return;
    };
    // The host of a weighted cluster came with its headers; the route's has the last word.
    let host = match &action.host_rewrite {
        HostRewrite::None | HostRewrite::Auto => None,
        HostRewrite::Literal(host) => Some(host.to_string()),
        HostRewrite::Header(name) => exchange.request.get_str(name).map(str::to_owned),
        HostRewrite::PathRegex(rewrite) => {
            String::from_utf8(rewrite.rewrite(exchange.request.path_only().as_bytes())).ok()
        }
        HostRewrite::Format(template) => {
            let mut host = Vec::new();
            format::header_value(template, exchange, None, &mut host);
            // What clients send may be part of it: only what a host is made of goes on.
            let legal = |byte: &u8| byte.is_ascii_graphic() && !b"/?#@\\".contains(byte);
            String::from_utf8(host)
                .ok()
                .filter(|host| host.bytes().all(|byte| legal(&byte)))
        }
    };
    if let Some(host) = host.filter(|host| !host.is_empty()) {
        set_host(
            exchange,
            &host,
            action.append_x_forwarded_host,
            envoy_headers,
        );
    }
    let path = exchange.request.path();
    let (only, rest) = path.split_at(exchange.request.path_only().len());
    let new = if let Some(prefix) = &action.prefix_rewrite {
        matched_length(&route.matches, only)
            .and_then(|matched| only.get(matched..))
            .map(|tail| format!("{prefix}{tail}{rest}"))
    } else if let Some(rewrite) = &action.regex_rewrite {
        String::from_utf8(rewrite.rewrite(only.as_bytes()))
            .ok()
            .filter(|new| !new.is_empty())
            .map(|new| format!("{new}{rest}"))
    } else if let Some(template) = &action.path_rewrite {
        let mut new = Vec::new();
        format::header_value(template, exchange, None, &mut new);
        // It is the path alone: the query stays.
        String::from_utf8(new)
            .ok()
            .filter(|new| !new.is_empty())
            .map(|new| format!("{new}{rest}"))
    } else if let Some(rewrite) = &action.template_rewrite {
        rewrite.rewrite(only).map(|new| format!("{new}{rest}"))
    } else {
        None
    };
    if let Some(new) = new {
        let old = path.to_owned();
        // What a rewrite makes of a path must still be one: no byte of it may end the line.
        if !new.bytes().all(|byte| byte.is_ascii_graphic()) {
            return;
        }
        if envoy_headers {
            exchange.request.headers.set("x-envoy-original-path", old);
        }
        let new = if new.starts_with('/') {
            new
        } else {
            format!("/{new}")
        };
        exchange.request.set_path(&new);
    }
}

/// Replaces the host. `append`: adds the old one to `x-forwarded-host`, unless it is the last there already.
/// `envoy_headers`: tells it in `x-envoy-original-host`.
pub(crate) fn set_host(exchange: &mut Exchange<'_>, host: &str, append: bool, envoy_headers: bool) {
    let old = exchange.request.authority().to_owned();
    let headers = &mut exchange.request.headers;
    if envoy_headers && !old.is_empty() {
        headers.set("x-envoy-original-host", &old);
    }
    if append && !old.is_empty() {
        let known = headers.get("x-forwarded-host").unwrap_or_default();
        let last = known.rsplit(|byte| *byte == b',').next();
        if last != Some(old.as_bytes()) {
            crate::http::append(headers, "x-forwarded-host", old.as_bytes(), ",");
        }
    }
    exchange.request.set_authority(host);
}

/// How much of the path the route's condition covers; `None` where it matched without parameters that stand in between,
/// which no rewrite of a prefix can tell from it.
pub(crate) fn matched_length(matches: &RouteMatch, path: &str) -> Option<usize> {
    match &matches.path {
        PathMatch::Prefix(text) | PathMatch::PathSeparatedPrefix(text) | PathMatch::Path(text) => {
            let beginning = path.as_bytes().get(..text.len())?;
            let same = beginning.eq_ignore_ascii_case(text.as_bytes());
            same.then_some(text.len())
        }
        PathMatch::Regex(_) | PathMatch::Template(_) | PathMatch::Connect => Some(path.len()),
    }
}
