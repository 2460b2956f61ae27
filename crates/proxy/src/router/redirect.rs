//! Where a redirect points to.

use std::borrow::Cow;

use outrigger_http::RequestHead;

use super::rewrite::matched_length;
use crate::{
    access_log::format,
    http::{Exchange, split_port},
    plan::route::{Action, Redirect, RedirectPath, RedirectScheme, RouteMatch},
};

/// The `location` of a redirect.
pub(crate) fn location(
    redirect: &Redirect,
    matches: &RouteMatch,
    exchange: &Exchange<'_>,
) -> String {
    let request = &exchange.request;
    let old_scheme = match request.scheme() {
        "" => "http",
        scheme => scheme,
    };
    let scheme = match &redirect.scheme {
        RedirectScheme::Keep => old_scheme,
        RedirectScheme::Https => "https",
        RedirectScheme::Scheme(scheme) => scheme,
    };
    let host = match redirect.host.as_deref() {
        Some(host) => host,
        None => old_host(redirect, scheme, request),
    };
    let path = path(redirect, matches, exchange);
    let slash = if path.starts_with('/') { "" } else { "/" };
    match redirect.port {
        // As configured: one that goes without saying, too.
        Some(port) => format!("{scheme}://{host}:{port}{slash}{path}"),
        None => format!("{scheme}://{host}{slash}{path}"),
    }
}

/// The request's host: without its port where the redirect has one, or where the port was the one of a scheme that the
/// redirect leaves.
fn old_host<'r>(redirect: &Redirect, scheme: &str, request: &'r RequestHead) -> &'r str {
    let authority = request.authority();
    let (host, port) = split_port(authority);
    // The scheme of the connection, which may be another than that of the URL.
    let proto = request.headers.get_str("x-forwarded-proto");
    let proto = proto.unwrap_or(request.scheme());
    let left = scheme != proto
        && match proto {
            "https" => port == Some(443),
            "http" => port == Some(80),
            _ => false,
        };
    match redirect.port.is_some() || left {
        true => host,
        false => authority,
    }
}

/// Gives the request the path of its redirect, where that is made of the old one, as Envoy does before it replies: logs
/// and the operations on the reply's headers see the new one. `envoy_headers`: keeps the old one in
/// `x-envoy-original-path`.
pub(crate) fn rewrite(exchange: &mut Exchange<'_>, envoy_headers: bool) {
    let new = exchange
        .route
        .route()
        .and_then(|route| match &route.action {
            Action::Redirect(redirect) => made_of_old(redirect, &route.matches, exchange),
            _ => None,
        });
    let Some(new) = new else {
        return;
    };
    // What a rewrite makes of a path must still be one.
    if !new.bytes().all(|byte| byte.is_ascii_graphic()) {
        return;
    }
    if envoy_headers {
        let old = exchange.request.path().to_owned();
        exchange.request.headers.set("x-envoy-original-path", old);
    }
    exchange.request.set_path(&new);
}

/// The path that a redirect makes of the request's, with its query.
fn made_of_old(
    redirect: &Redirect,
    matches: &RouteMatch,
    exchange: &Exchange<'_>,
) -> Option<String> {
    let old = exchange.request.path();
    let (only, query) = old.split_at(exchange.request.path_only().len());
    match &redirect.path {
        RedirectPath::Prefix(prefix) => {
            let rest = old.get(matched_length(matches, only)?..)?;
            Some(format!("{prefix}{rest}"))
        }
        // A path of which nothing is left stays as it is.
        RedirectPath::Regex(rewrite) => match rewrite.rewrite(only.as_bytes()) {
            new if new.is_empty() => None,
            new => Some(format!("{}{query}", String::from_utf8_lossy(&new))),
        },
        RedirectPath::Keep | RedirectPath::Path(_) | RedirectPath::Format(_) => None,
    }
}

fn path<'r>(
    redirect: &'r Redirect,
    matches: &RouteMatch,
    exchange: &'r Exchange<'_>,
) -> Cow<'r, str> {
    let request = &exchange.request;
    let old = request.path();
    let query = &old[request.path_only().len()..];
    let path: Cow<'_, str> = match &redirect.path {
        // Its query takes the place of the request's, and stays.
        RedirectPath::Path(path) if path.contains('?') => return Cow::Borrowed(path),
        RedirectPath::Path(path) => format!("{path}{query}").into(),
        RedirectPath::Keep => old.into(),
        RedirectPath::Prefix(_) | RedirectPath::Regex(_) => {
            made_of_old(redirect, matches, exchange).map_or(old.into(), Cow::from)
        }
        RedirectPath::Format(template) => {
            let mut new = Vec::new();
            format::header_value(template, exchange, None, &mut new);
            match new.is_empty() {
                true => old.into(),
                false => format!("{}{query}", String::from_utf8_lossy(&new)).into(),
            }
        }
    };
    match path.find('?') {
        Some(query) if redirect.strip_query => path[..query].to_owned().into(),
        _ => path,
    }
}
