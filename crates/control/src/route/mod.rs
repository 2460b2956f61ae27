//! Routes: VirtualServices and services become RouteConfigurations.
//!
//! [`Rules`] translates one VirtualService for one listener; [`outbound`] puts the virtual hosts of a sidecar together,
//! and `gateway::routes` those of a gateway. [`domains`] knows under which names a client may call a service.

mod action;
pub mod domains;
mod matching;
pub mod outbound;
mod per_filter;
mod retry;

use proto::{
    envoy::config::{
        core::v3::Metadata,
        route::v3::{
            Decorator, Route, RouteAction,
            route::{self, Action},
            route_action::ClusterSpecifier,
            route_match::PathSpecifier,
        },
    },
    istio::{
        mesh::v1alpha1::MeshConfig,
        networking::v1alpha3::{
            Destination, HttpMatchRequest, HttpRoute, VirtualService,
            load_balancer_settings::ConsistentHashLb,
        },
    },
};

pub use self::{
    action::{NO_TIMEOUT, hash_policy},
    matching::{Client, exact, is_catch_all, prefix},
    per_filter::{CORS, FAULT},
};
use crate::{
    compat::Compat,
    envoy_filter,
    listener::Context,
    model::{Mesh, Proxy, Resource},
    names,
};

/// Whose rules a VirtualService follows where the sources of routes differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Semantics {
    /// Istio's own VirtualService.
    Istio,
    /// Made from a Gateway API route: prefixes end at path segments, a missing backend answers 500.
    Gateway,
    /// Made from a Kubernetes Ingress: prefixes end at path segments.
    Ingress,
}

/// The route configurations of these names for a proxy.
pub fn build(mesh: &Mesh, proxy: &Proxy, names: &[String]) -> Vec<Resource> {
    let context = Context::new(mesh, proxy);
    let out = if proxy.is_router() {
        crate::gateway::routes::build(&context, names)
    } else {
        outbound::build(&context, names)
    };
    envoy_filter::routes(mesh, proxy, out)
}

/// What routes ask about services.
pub trait Lookup {
    /// The service behind a destination's host, if the client knows it.
    fn service(&self, host: &str) -> Option<names::DestinationService>;
    /// The consistent hash that destination rules ask for.
    fn consistent_hash(&self, destination: &Destination) -> Option<ConsistentHashLb>;
}

/// One VirtualService, to be translated for one listener of one kind of client.
#[allow(missing_debug_implementations)]
pub struct Rules<'a> {
    /// Who calls.
    pub client: Client<'a>,
    /// Name of the VirtualService.
    pub name: &'a str,
    /// What the user wrote.
    pub spec: &'a VirtualService,
    /// Where the routes come from, as `metadata.filterMetadata.istio`.
    pub metadata: Metadata,
    pub semantics: Semantics,
    /// The listener terminates TLS: redirects keep `https`.
    pub tls: bool,
    pub mesh: &'a MeshConfig,
    /// `ProxyConfig.proxyHeaders.xForwardedHost`.
    pub append_x_forwarded_host: bool,
    pub lookup: &'a dyn Lookup,
    pub compat: Compat,
}

impl Rules<'_> {
    /// The routes, in order of evaluation. What stands behind a match of everything is left out: it cannot be reached.
    pub fn routes(&self) -> Vec<Route> {
        let mut out = Vec::new();
        for rule in &self.spec.http {
            if rule.r#match.is_empty() {
                out.push(self.route(rule, None));
                break;
            }
            for m in rule.r#match.iter().filter(|m| self.client.can_match(m)) {
                let route = self.route(rule, Some(m));
                let last = route.r#match.as_ref().is_some_and(is_catch_all);
                out.push(route);
                if last {
                    return out;
                }
            }
        }
        out
    }

    fn route(&self, rule: &HttpRoute, m: Option<&HttpMatchRequest>) -> Route {
        let match_name = m.map(|m| m.name.as_str()).filter(|n| !n.is_empty());
        let operations = action::HeaderOperations::new(rule.headers.as_ref());
        let mut out = Route {
            name: match match_name {
                Some(name) => format!("{}.{name}", rule.name),
                None => rule.name.clone(),
            },
            r#match: Some(matching::route_match(m, self.semantics)),
            metadata: Some(self.metadata.clone()),
            stat_prefix: m.map(|m| m.stat_prefix.clone()).unwrap_or_default(),
            request_headers_to_add: operations.request_add,
            request_headers_to_remove: operations.request_remove,
            response_headers_to_add: operations.response_add,
            response_headers_to_remove: operations.response_remove,
            ..Default::default()
        };
        if let Some(redirect) = &rule.redirect {
            out.action = action::redirect(redirect, self);
        } else if let Some(response) = &rule.direct_response {
            out.action = Some(action::direct_response(response));
        } else {
            action::forward(&mut out, rule, self, operations.authority);
        }
        out.decorator = Some(Decorator {
            operation: self.operation(&out),
            ..Default::default()
        });
        out.typed_per_filter_config = per_filter::per_filter_config(rule);
        out
    }

    /// The name of a request's span: `host:port/path*`.
    fn operation(&self, route: &Route) -> String {
        let path = match route
            .r#match
            .as_ref()
            .and_then(|m| m.path_specifier.as_ref())
        {
            Some(PathSpecifier::Prefix(p)) => format!("{p}*"),
            Some(PathSpecifier::Path(p)) => p.clone(),
            Some(PathSpecifier::SafeRegex(r)) => r.regex.clone(),
            _ => "/*".to_owned(),
        };
        let cluster = match &route.action {
            Some(Action::Route(RouteAction {
                cluster_specifier: Some(ClusterSpecifier::Cluster(cluster)),
                ..
            })) => names::parse_cluster(cluster),
            _ => None,
        };
        match cluster {
            Some(c) => format!("{}:{}{path}", c.host, c.port),
            None => format!("{}:{}{path}", self.name, self.client.port),
        }
    }
}

/// The route of a service that no VirtualService speaks about.
pub fn default_outbound(
    cluster: &str,
    operation: String,
    mesh: &MeshConfig,
    compat: Compat,
) -> Route {
    let mut action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: Some(NO_TIMEOUT),
        retry_policy: retry::outbound(mesh.default_http_retry_policy.as_ref(), false, compat),
        ..Default::default()
    };
    action::limit(&mut action, NO_TIMEOUT, compat);
    default_route(operation, action)
}

/// The one route of an inbound port. gRPC is not retried: its clients do that themselves.
pub fn default_inbound(cluster: &str, operation: String, is_grpc: bool, compat: Compat) -> Route {
    default_route(
        operation,
        RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
            timeout: Some(NO_TIMEOUT),
            max_stream_duration: Some(action::unlimited_stream()),
            retry_policy: if is_grpc || !compat.retries_inbound() {
                None
            } else {
                retry::inbound(None)
            },
            ..Default::default()
        },
    )
}

fn default_route(operation: String, action: RouteAction) -> Route {
    Route {
        name: "default".to_owned(),
        r#match: Some(matching::everything()),
        decorator: Some(Decorator {
            operation,
            ..Default::default()
        }),
        action: Some(route::Action::Route(action)),
        ..Default::default()
    }
}
