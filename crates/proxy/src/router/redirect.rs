//! Where a redirect points to.

use outrigger_http::RequestHead;

use super::rewrite::matched_length;
use crate::{
    http::split_port,
    plan::route::{Redirect, RedirectPath, RedirectScheme, RouteMatch},
};

/// The `location` of a redirect.
pub(crate) fn location(redirect: &Redirect, matches: &RouteMatch, request: &RequestHead) -> String {
    let old_scheme = if request.scheme().is_empty() {
        "http"
    } else {
        request.scheme()
    };
    let scheme = match &redirect.scheme {
        RedirectScheme::Keep => old_scheme,
        RedirectScheme::Https => "https",
        RedirectScheme::Scheme(scheme) => scheme,
    };
    let (old_host, old_port) = split_port(request.authority());
    let host = redirect
        .host
        .as_deref()
        .filter(|host| !host.is_empty())
        .unwrap_or(old_host);
    let port = match redirect.port {
        Some(port) => Some(port),
        None if redirect
            .host
            .as_deref()
            .is_some_and(|host| !host.is_empty()) =>
        {
            None
        }
        // The port that went without saying for the old scheme says nothing about the new one.
        None if scheme != old_scheme
            && old_port == Some(if old_scheme == "https" { 443 } else { 80 }) =>
        {
            None
        }
        None => old_port,
    };
    let default = if scheme == "https" { 443 } else { 80 };
    let port = port.filter(|port| redirect.port.is_none() || *port != default);
    let path = request.path();
    let (only, query) = path.split_at(request.path_only().len());
    let query = if redirect.strip_query { "" } else { query };
    let path = match &redirect.path {
        RedirectPath::Keep => format!("{only}{query}"),
        RedirectPath::Path(path) if path.contains('?') => path.to_string(),
        RedirectPath::Path(path) => format!("{path}{query}"),
        RedirectPath::Prefix(prefix) => {
            format!("{prefix}{}{query}", &only[matched_length(matches, only)..])
        }
        RedirectPath::Regex(rewrite) => {
            format!(
                "{}{query}",
                String::from_utf8_lossy(&rewrite.rewrite(only.as_bytes()))
            )
        }
    };
    match port {
        Some(port) => format!("{scheme}://{host}:{port}{path}"),
        None => format!("{scheme}://{host}{path}"),
    }
}
