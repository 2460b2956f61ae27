//! `envoy.filters.http.cors`: answers preflights and marks responses, by the route's policy.

use std::sync::Arc;

use outrigger_http::{Method, ResponseHead};

use super::{Filter, Interests, Step};
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
    stats: CorsStats,
}

/// An origin that the policy allows.
#[derive(Debug)]
pub(crate) struct CorsData {
    policy: Arc<CorsPolicy>,
    origin: Vec<u8>,
}

impl CorsFilter {
    pub(super) fn new(prefix: &str, worker: &Worker) -> CorsFilter {
        CorsFilter {
            stats: CorsStats::new(worker.stats.scope(&format!("http.{prefix}.cors."))),
        }
    }
}

impl Filter for CorsFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let Some(RouteFilterConfig::Cors(policy)) = config else {
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
        let allowed = policy
            .allow_origin
            .iter()
            .any(|matcher| origin == b"*" || matcher.matches(origin));
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
            && headers.contains("access-control-request-method");
        if !allowed {
            return match preflight && !policy.forward_not_matching_preflights {
                true => Step::Reply(LocalReply::new(200, "", "cors_response")),
                false => Step::Continue,
            };
        }
        if !preflight {
            exchange.filters.cors = Some(CorsData {
                policy: policy.clone(),
                origin: origin.to_vec(),
            });
            return Step::Continue;
        }
        let mut reply =
            LocalReply::new(200, "", "cors_response").header("access-control-allow-origin", origin);
        let on = |name: &str| headers.get(name).is_some_and(|value| value == b"true");
        let private = on("access-control-request-private-network");
        if policy.allow_credentials {
            reply = reply.header("access-control-allow-credentials", "true");
        }
        for (name, value) in [
            ("access-control-allow-methods", &policy.allow_methods),
            ("access-control-allow-headers", &policy.allow_headers),
            ("access-control-max-age", &policy.max_age),
        ] {
            if !value.is_empty() {
                reply = reply.header(name, value.as_bytes());
            }
        }
        if private && policy.allow_private_network_access {
            reply = reply.header("access-control-allow-private-network", "true");
        }
        Step::Reply(reply)
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        let Some(CorsData { policy, origin }) = &exchange.filters.cors else {
            return;
        };
        response.headers.set("access-control-allow-origin", origin);
        if policy.allow_credentials {
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
