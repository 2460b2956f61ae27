//! What becomes of a request that nobody sends: the router's own steps on a request that a test describes.
//!
//! The steps are those of live traffic: the same matching, the same rewriting of the head. What a live proxy takes from
//! its surroundings is part of the description: the random number, the runtime key that is on, and metadata.

use std::{borrow::Cow, collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use outrigger_http::{Headers, Method, RequestHead, Version};
use serde_json::Value;

use super::{draw, headers, https_redirect, redirect, rewrite, route_cluster};
use crate::{
    http::{Exchange, LocalReply, RouteRef},
    listener::ConnectionInfo,
    plan::{
        Listener, Metadata, RouteConfiguration,
        matcher::RuntimeFraction,
        route::{Action, Redirect, RedirectPath, RedirectScheme, RequireTls, VirtualHost},
        route_match::{RequestView, RouteOutcome},
    },
};

/// A request as a test describes it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// `:authority`.
    pub authority: String,
    /// `:path`, with its query.
    pub path: String,
    /// `:method`.
    pub method: String,
    /// Decides about shares of requests and among weighted clusters.
    pub random: u64,
    /// `x-forwarded-proto` is https instead of http.
    pub ssl: bool,
    /// `x-envoy-internal` is set.
    pub internal: bool,
    /// The only runtime key that is on: a route with another key takes no request.
    pub runtime: String,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// Headers of the upstream's response.
    pub response_headers: Vec<(String, String)>,
    /// Dynamic metadata by namespace.
    pub metadata: BTreeMap<String, Value>,
}

/// A route by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Index in [`RouteConfiguration::virtual_hosts`].
    pub virtual_host: u32,
    /// Index in [`VirtualHost::routes`].
    pub route: u32,
    /// Index of the entry of weighted clusters.
    pub weighted: Option<usize>,
}

/// What became of it. Texts are empty where there is no such thing.
#[derive(Debug)]
pub struct Outcome {
    /// Name of the virtual host, for requests that are neither redirected nor answered by the route.
    pub virtual_host: String,
    /// Name of the virtual cluster, for requests that are forwarded.
    pub virtual_cluster: String,
    /// The cluster that the request goes to.
    pub cluster: String,
    /// The path that the upstream gets.
    pub path: String,
    /// The host that the upstream gets.
    pub host: String,
    /// Where a redirect points to; for a direct response the request's own URL.
    pub redirect: String,
    /// Status of a redirect or direct response; 0 for requests that are forwarded.
    pub code: u16,
    /// The route's timeout, for requests that are forwarded; `None` is no limit.
    pub timeout: Option<Duration>,
    /// The route's metadata.
    pub metadata: Metadata,
    /// The request's headers as the upstream gets them.
    pub request: RequestHead,
    /// The response's headers as the client gets them; `:status` where the reply is our own.
    pub response: Headers,
    /// The route that took it.
    pub place: Option<Place>,
    /// How it came to that, line by line.
    pub explanation: Vec<String>,
}

/// Takes a request through the router.
///
/// # Errors
/// The description is not a request.
pub fn check(routes: &Arc<RouteConfiguration>, request: &Request) -> Result<Outcome, String> {
    let listener = Listener::imagined().map_err(|e| e.to_string())?;
    let client = SocketAddr::from(([127, 0, 0, 1], 0));
    let connection = ConnectionInfo::imagined(Arc::new(listener), client);
    let mut exchange = Exchange::new(&connection, head(request)?, request.random);
    exchange.internal = request.internal;
    exchange.dynamic_metadata.clone_from(&request.metadata);
    let explanation = {
        let view = View {
            exchange: &exchange,
            runtime: &request.runtime,
        };
        let explanation = explain(routes, &view, request.random);
        let route = RouteRef::find(routes.clone(), &view, request.random);
        exchange.route = route;
        explanation
    };
    let mut response = Headers::new();
    for (name, value) in &request.response_headers {
        response.append(name, value);
    }
    let reference = exchange.route.clone();
    let mut outcome = Outcome {
        virtual_host: String::new(),
        virtual_cluster: String::new(),
        cluster: String::new(),
        path: String::new(),
        host: String::new(),
        redirect: String::new(),
        code: 0,
        timeout: None,
        metadata: reference
            .route()
            .map(|route| route.metadata.clone())
            .unwrap_or_default(),
        request: exchange.request.clone(),
        response: Headers::new(),
        place: None,
        explanation,
    };
    let reply = match reference.get() {
        None if reference.tls_redirect => {
            outcome.redirect = https_redirect(&exchange.request);
            Some(Reply::to(301, &outcome.redirect))
        }
        None => None,
        Some((virtual_host, route)) => match &route.action {
            Action::Route(action) => {
                draw(&mut exchange, || request.random);
                let cluster = route_cluster(&exchange.route, &exchange.request);
                outcome.cluster = cluster.unwrap_or_default().to_owned();
                outcome.timeout = action.timeout;
                headers::request(&mut exchange);
                rewrite::request(&mut exchange, true);
                outcome.forwarded(virtual_host, &exchange);
                headers::response(&exchange, &mut response);
                None
            }
            Action::Redirect(to) => {
                outcome.redirect = redirect::location(to, &route.matches, &exchange);
                redirect::rewrite(&mut exchange, true);
                Some(Reply::to(to.status, &outcome.redirect))
            }
            Action::DirectResponse(direct) => {
                outcome.redirect = redirect::location(&STAYS, &route.matches, &exchange);
                let reply = LocalReply::new(direct.status, "", "").body(direct.body.clone());
                let reply = match &direct.body_format {
                    Some(format) => reply.formatted(format, &mut exchange),
                    None => reply,
                };
                Some(Reply::of(reply))
            }
            // A filter answers; the route has its part in it like one that forwards.
            Action::NonForwarding => {
                headers::request(&mut exchange);
                outcome.forwarded(virtual_host, &exchange);
                headers::response(&exchange, &mut response);
                None
            }
        },
    };
    if let Some(reply) = reply {
        outcome.code = reply.status;
        for (name, value) in reply.headers.iter() {
            response.append(name, value);
        }
        let mut status = itoa::Buffer::new();
        response.set(":status", status.format(outcome.code));
        // A virtual host that wants TLS has no route for its redirect.
        if reference.route().is_some() {
            headers::response(&exchange, &mut response);
        }
    }
    outcome.place = exchange.route.numbers().map(|(virtual_host, route)| Place {
        virtual_host,
        route,
        weighted: exchange.route.weighted,
    });
    outcome.request = exchange.request.clone();
    outcome.response = response;
    Ok(outcome)
}

impl Outcome {
    /// Of a request that has its changes. Its virtual cluster is found by them, as Envoy's tool does it; live traffic is
    /// counted in that of the request as it came.
    fn forwarded(&mut self, virtual_host: &VirtualHost, exchange: &Exchange<'_>) {
        self.virtual_host = virtual_host.name.to_string();
        let name = virtual_host.virtual_cluster(exchange).unwrap_or_default();
        name.clone_into(&mut self.virtual_cluster);
        exchange.request.path().clone_into(&mut self.path);
        exchange.request.authority().clone_into(&mut self.host);
    }
}

/// A reply of our own, before the route's operations: Envoy's tool applies them to the finished reply, so that they find
/// its type and length; live traffic has them before those. It makes no gRPC form of a reply either.
struct Reply {
    status: u16,
    headers: Headers,
}

impl Reply {
    /// A redirect.
    fn to(status: u16, location: &str) -> Self {
        let mut headers = Headers::new();
        headers.set("location", location);
        Reply { status, headers }
    }

    /// A direct response.
    fn of(reply: LocalReply) -> Self {
        let mut headers = reply.headers;
        if !reply.body.is_empty() {
            let mut length = itoa::Buffer::new();
            headers.set("content-length", length.format(reply.body.len()));
            headers.set_if_absent("content-type", "text/plain");
        }
        Reply {
            status: reply.status,
            headers,
        }
    }
}

/// A direct response redirects nowhere: its URL is the request's.
const STAYS: Redirect = Redirect {
    host: None,
    port: None,
    scheme: RedirectScheme::Keep,
    path: RedirectPath::Keep,
    status: 200,
    strip_query: false,
};

fn head(request: &Request) -> Result<RequestHead, String> {
    let legal = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    if !legal(&request.path) || !legal(&request.authority) {
        return Err("path and authority must be printable ASCII without spaces".into());
    }
    let method = Method::from_token(&request.method);
    let mut head = RequestHead::new(Version::Http11, method, &request.authority, &request.path);
    let scheme = if request.ssl { "https" } else { "http" };
    head.set_scheme(scheme);
    head.headers.set("x-forwarded-proto", scheme);
    if request.internal {
        head.headers.set("x-envoy-internal", "true");
    }
    for (name, value) in &request.headers {
        match name.as_str() {
            ":authority" => head.set_authority(value),
            ":path" => head.set_path(value),
            ":scheme" => head.set_scheme(value),
            ":method" => head.method = Method::from_token(value),
            name => head.headers.append(name, value),
        }
    }
    Ok(head)
}

/// Which virtual host and route take the request, and what the routes before it wanted.
fn explain(routes: &RouteConfiguration, view: &View<'_, '_>, random: u64) -> Vec<String> {
    let mut lines = Vec::new();
    let outcome = routes.find(view, random);
    let (virtual_host, taken) = match outcome {
        RouteOutcome::NoVirtualHost => {
            lines.push(format!(
                "no virtual host has the domain `{}`",
                String::from_utf8_lossy(view.host())
            ));
            return lines;
        }
        RouteOutcome::TlsRedirect(host) => {
            let requirement = match host.require_tls {
                RequireTls::ExternalOnly => "EXTERNAL_ONLY",
                _ => "ALL",
            };
            lines.push(format!(
                "virtual host `{}`: require_tls is {requirement}",
                host.name
            ));
            return lines;
        }
        RouteOutcome::NoRoute(host) => (host, None),
        RouteOutcome::Found(found) => (found.virtual_host, Some(found.route_index as usize)),
    };
    lines.push(format!("virtual host `{}`", virtual_host.name));
    let path = routes.path_of(view);
    let range = match &virtual_host.matcher {
        None => 0..virtual_host.routes.len(),
        Some(matcher) => match matcher.find(view) {
            Some(&(from, to)) => from as usize..to as usize,
            None => {
                lines.push("its matcher finds no action".to_owned());
                return lines;
            }
        },
    };
    for index in range {
        let route = &virtual_host.routes[index];
        let name = match &*route.name {
            "" => String::new(),
            name => format!(" `{name}`"),
        };
        let verdict = match route.matches.misfit(&path, view, random) {
            Some(misfit) => format!("{misfit} does not match"),
            None => "matches".to_owned(),
        };
        lines.push(format!("routes[{index}]{name}: {verdict}"));
        if Some(index) == taken {
            return lines;
        }
    }
    lines.push("no route matches".to_owned());
    lines
}

/// The request as matching reads it, with the runtime of the test.
struct View<'e, 'c> {
    exchange: &'e Exchange<'c>,
    runtime: &'e str,
}

impl RequestView for View<'_, '_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.exchange.header(name)
    }

    fn any_field(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> Option<bool> {
        self.exchange.any_field(name, fits)
    }

    fn host(&self) -> &[u8] {
        self.exchange.host()
    }

    fn path(&self) -> &[u8] {
        RequestView::path(self.exchange)
    }

    fn is_connect(&self) -> bool {
        self.exchange.is_connect()
    }

    fn dynamic_metadata(&self, namespace: &str) -> Option<&Value> {
        RequestView::dynamic_metadata(self.exchange, namespace)
    }

    fn source(&self) -> Option<SocketAddr> {
        self.exchange.source()
    }

    fn is_in(&self, fraction: &RuntimeFraction, random: u64) -> bool {
        !self.runtime.is_empty() && *fraction.key == *self.runtime && fraction.default.hits(random)
    }
}
