//! Redirects of the upstream that are followed here instead of by the client (`internal_redirect_policy`).

use std::sync::Arc;

use outrigger_http::{Framing, Method, ResponseHead};

use super::{Context, Exchange, forward::Forward, prepare, serve};
use crate::plan::route::InternalRedirectPolicy;

impl Forward<'_, '_, '_, '_> {
    /// Whether this response is followed; then the exchange holds the new request.
    pub(super) fn follow(&mut self, head: &ResponseHead) -> bool {
        let policy = match self.exchange.route.action() {
            Some(action) => match &action.internal_redirect {
                Some(policy) if policy.codes.contains(&head.status) => policy.clone(),
                _ => return false,
            },
            None => return false,
        };
        // What was not read to its end or not kept cannot be sent again.
        let whole = self.kept.complete && self.kept.is_whole() && !self.exchange.request.upgrade;
        let followed = whole && follow(self.cx, self.exchange, &policy, head).is_some();
        let stats = self.target.cluster.stats();
        if followed {
            stats.upstream_internal_redirect_succeeded_total().inc();
            if self.exchange.request.framing == Framing::None {
                self.kept.drop_body();
            }
        } else {
            stats.upstream_internal_redirect_failed_total().inc();
        }
        followed
    }
}

/// Turns the request into the one that the redirect asks for; `None` leaves it as it was.
fn follow(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    policy: &InternalRedirectPolicy,
    head: &ResponseHead,
) -> Option<()> {
    let stats = &cx.live.stats;
    let location = head.headers.get_str("location").and_then(Location::parse);
    let Some(location) = location else {
        stats.passthrough_internal_redirect_bad_location().inc();
        return None;
    };
    let from_https = exchange
        .request
        .headers
        .get_str("x-forwarded-proto")
        .is_some_and(|proto| proto.eq_ignore_ascii_case("https"));
    if from_https != location.https && !policy.allow_cross_scheme {
        stats.passthrough_internal_redirect_unsafe_scheme().inc();
        return None;
    }
    if exchange.redirects.len() as u32 >= policy.max_internal_redirects {
        stats
            .passthrough_internal_redirect_too_many_redirects()
            .inc();
        return None;
    }
    let (saved, route) = (exchange.request.clone(), exchange.route.clone());
    rewrite(exchange, policy, head, &location);
    let fits = prepare::path(&cx.live.plan, cx.worker, stats, exchange).is_ok()
        && is_allowed(cx, exchange, policy, from_https, location.https);
    if !fits {
        exchange.request = saved;
        exchange.route = route;
        return None;
    }
    exchange.redirects.extend(exchange.route.numbers());
    Some(())
}

fn rewrite(
    exchange: &mut Exchange<'_>,
    policy: &InternalRedirectPolicy,
    head: &ResponseHead,
    location: &Location<'_>,
) {
    let request = &mut exchange.request;
    let original = format!(
        "{}://{}{}",
        request.scheme(),
        request.authority(),
        request.path()
    );
    request
        .headers
        .set_if_absent("x-envoy-original-url", original);
    request.set_authority(location.authority);
    request.set_path(location.path);
    let scheme = if location.https { "https" } else { "http" };
    request.set_scheme(scheme);
    for name in &policy.response_headers_to_copy {
        request.headers.remove(name);
        for value in head.headers.get_all(name) {
            request.headers.append(name, value);
        }
    }
    if head.status == 303 && !matches!(request.method, Method::Get | Method::Head) {
        request.method = Method::Get;
        request.framing = Framing::None;
        for name in ["content-length", "transfer-encoding", "content-type"] {
            request.headers.remove(name);
        }
    }
}

/// Whether the new request has a route that it may take.
fn is_allowed(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    policy: &InternalRedirectPolicy,
    from_https: bool,
    to_https: bool,
) -> bool {
    let stats = &cx.live.stats;
    serve::resolve(cx, exchange);
    let name: Option<Arc<str>> = exchange
        .route
        .action()
        .and(exchange.route.route())
        .map(|route| route.name.clone());
    let Some(name) = name else {
        stats.passthrough_internal_redirect_no_route().inc();
        return false;
    };
    let used = exchange
        .route
        .numbers()
        .is_some_and(|numbers| exchange.redirects.contains(&numbers));
    let refused = policy.previous_routes && used
        || policy
            .allowed_routes
            .as_ref()
            .is_some_and(|names| !names.contains(&name))
        || policy.safe_cross_scheme && to_https && !from_https;
    if refused {
        stats.passthrough_internal_redirect_predicate().inc();
    }
    !refused
}

/// An absolute URL.
struct Location<'a> {
    https: bool,
    authority: &'a str,
    path: &'a str,
}

impl Location<'_> {
    fn parse(text: &str) -> Option<Location<'_>> {
        let (scheme, rest) = text.split_once("://")?;
        let https = scheme.eq_ignore_ascii_case("https");
        if !https && !scheme.eq_ignore_ascii_case("http") {
            return None;
        }
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let path = path.split('#').next().unwrap_or_default();
        let legal = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        // User names are no part of an authority that goes upstream.
        if authority.is_empty() || authority.contains('@') || !legal(authority) || !legal(path) {
            return None;
        }
        match path {
            "" => Some("/"),
            path if path.starts_with('/') => Some(path),
            _ => None,
        }
        .map(|path| Location {
            https,
            authority,
            path,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_urls_of_http_are_followed() {
        let parse = |text| {
            Location::parse(text).map(|l| (l.https, l.authority.to_owned(), l.path.to_owned()))
        };
        assert_eq!(
            parse("http://a:8080/b?c#d"),
            Some((false, "a:8080".into(), "/b?c".into()))
        );
        assert_eq!(parse("HTTPS://a"), Some((true, "a".into(), "/".into())));
        for bad in [
            "/b",
            "ftp://a/",
            "http://",
            "http://u@a/",
            "http://a?b",
            "http://a/\u{1}",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
