//! `envoy.filters.http.cors`: answers preflights and marks responses, by the route's policy.

use std::sync::Arc;

use outrigger_http::{Method, ResponseHead};

use super::{Filter, Interests, Step, route_configs};
use crate::{
    http::{Exchange, LocalReply},
    plan::http_filter::{CorsPolicy, RouteFilterConfig},
    worker::Worker,
};

stats::group! {
    /// `http.<prefix>.cors.`
    struct CorsStats {
        counter origin_valid,
        counter origin_invalid,
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct CorsFilter {
    name: Arc<str>,
    stats: CorsStats,
}

/// An origin that the policy allows.
#[derive(Debug)]
pub(crate) struct CorsData {
    policy: Arc<CorsPolicy>,
    origin: Vec<u8>,
}

impl CorsFilter {
    pub(super) fn new(name: &Arc<str>, prefix: &str, worker: &Worker) -> CorsFilter {
        CorsFilter {
            name: name.clone(),
            stats: CorsStats::new(worker.stats.scope(&format!("http.{prefix}.cors."))),
        }
    }

    /// What all levels say together: each field is the most specific level's that has it.
    fn policy(&self, exchange: &Exchange<'_>) -> Option<Arc<CorsPolicy>> {
        let mut levels =
            route_configs(&exchange.route, &self.name).filter_map(|config| match config {
                RouteFilterConfig::Cors(policy) => Some(policy),
                _ => None,
            });
        let own = levels.next()?;
        Some(match levels.next() {
            None => own.clone(),
            Some(next) => {
                let both = CorsPolicy::clone(own).or(next);
                Arc::new(levels.fold(both, |policy, general| policy.or(general)))
            }
        })
    }
}

impl Filter for CorsFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let Some(policy) = self.policy(exchange) else {
            return Step::Continue;
        };
        let random = worker.random.bits();
        let (enabled, shadow) = (
            policy.enabled.hits(random),
            policy.shadow_enabled.hits(random),
        );
        if !enabled && !shadow {
            return Step::Continue;
        }
        let headers = &exchange.request.headers;
        let Some(origin) = headers.get("origin").filter(|origin| !origin.is_empty()) else {
            return Step::Continue;
        };
        // A matcher that takes `*` takes every origin.
        let allows = |origin: &[u8]| policy.allow_origin.iter().any(|m| m.matches(origin));
        let allowed = allows(b"*") || allows(origin);
        let count = if allowed {
            self.stats.origin_valid()
        } else {
            self.stats.origin_invalid()
        };
        count.inc();
        if !enabled {
            return Step::Continue;
        }
        let preflight = exchange.request.method == Method::Options
            && headers
                .get("access-control-request-method")
                .is_some_and(|asked| !asked.is_empty());
        if !preflight {
            if allowed {
                exchange.filters.cors = Some(CorsData {
                    policy,
                    origin: origin.to_vec(),
                });
            }
            return Step::Continue;
        }
        if !allowed && policy.forward_not_matching_preflights.unwrap_or(true) {
            return Step::Continue;
        }
        let mut reply = LocalReply::new(200, "", "cors_response");
        if allowed {
            reply = reply.header("access-control-allow-origin", origin);
        }
        if policy.allow_credentials == Some(true) {
            reply = reply.header("access-control-allow-credentials", "true");
        }
        // What allows everything is told as what was asked for: with credentials a browser takes `*` by its letter.
        let asked = |name: &str| headers.get(name).unwrap_or_default();
        let or_asked = |value: &str, name: &str| match value {
            "*" => asked(name).to_vec(),
            value => value.as_bytes().to_vec(),
        };
        let exposed = if allowed { &*policy.expose_headers } else { "" };
        for (name, value) in [
            (
                "access-control-allow-methods",
                or_asked(&policy.allow_methods, "access-control-request-method"),
            ),
            (
                "access-control-allow-headers",
                or_asked(&policy.allow_headers, "access-control-request-headers"),
            ),
            ("access-control-max-age", policy.max_age.as_bytes().to_vec()),
            ("access-control-expose-headers", exposed.as_bytes().to_vec()),
        ] {
            if !value.is_empty() {
                reply = reply.header(name, &value);
            }
        }
        if asked("access-control-request-private-network") == b"true"
            && policy.allow_private_network_access == Some(true)
        {
            reply = reply.header("access-control-allow-private-network", "true");
        }
        Step::Reply(reply)
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        let Some(CorsData { policy, origin }) = &exchange.filters.cors else {
            return;
        };
        response.headers.set("access-control-allow-origin", origin);
        if policy.allow_credentials == Some(true) {
            response
                .headers
                .set("access-control-allow-credentials", "true");
        }
        if !policy.expose_headers.is_empty() {
            response.headers.set(
                "access-control-expose-headers",
                policy.expose_headers.as_bytes(),
            );
        }
    }
}
