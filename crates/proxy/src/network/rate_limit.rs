//! `envoy.filters.network.ratelimit`: asks a rate limit service whether there may be another connection.
//!
//! It is asked as the connection begins, once: a chain that replaces another does not count its connections again.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    access_log::{self, Lines},
    grpc::rate_limit::Question,
    listener::ConnectionInfo,
    plan::{rate_limit::Descriptor, rate_limit_service::NetworkRateLimit as Plan},
    worker::Worker,
};

/// Namespace of the metadata, and name of the filter.
const NAMESPACE: &str = "envoy.filters.network.ratelimit";

stats::group! {
    /// `ratelimit.<stat_prefix>.`
    struct NetworkRateLimitStats {
        counter total,
        counter ok,
        counter over_limit,
        counter error,
        counter failure_mode_allowed,
        counter cx_closed,
        gauge active,
    }
}

/// The filter of one chain.
#[derive(Debug)]
pub(super) struct NetworkRateLimit {
    plan: Arc<Plan>,
    stats: NetworkRateLimitStats,
}

impl NetworkRateLimit {
    pub(super) fn new(plan: &Arc<Plan>, worker: &Worker) -> Self {
        let scope = format!("ratelimit.{}.", plan.stat_prefix);
        Self {
            plan: plan.clone(),
            stats: NetworkRateLimitStats::new(worker.stats.scope(&scope)),
        }
    }

    /// Lets a connection in, or says why not.
    pub(super) async fn judge(
        &self,
        connection: &mut ConnectionInfo,
        worker: &Worker,
    ) -> Result<(), &'static str> {
        let plan = &self.plan;
        let question = Question::new(&plan.domain, self.descriptors(connection, worker), 0);
        self.stats.total().inc();
        self.stats.active().inc();
        let asked = question.ask(worker, &plan.service).await;
        self.stats.active().dec();
        let verdict = match asked {
            Ok(verdict) => verdict,
            Err(error) => {
                let cluster = &*plan.service.cluster;
                tracing::debug!(cluster, %error, "a rate limit service could not be asked");
                self.stats.error().inc();
                if !plan.failure_deny {
                    self.stats.failure_mode_allowed().inc();
                    return Ok(());
                }
                self.stats.cx_closed().inc();
                return Err("ratelimit_error_failure_mode_connection_close");
            }
        };
        if let Some(Value::Object(noted)) = verdict.metadata {
            let metadata = connection.metadata.get_or_insert_default();
            let known = metadata.entry(NAMESPACE.to_owned());
            let known = known.or_insert_with(|| Value::Object(Default::default()));
            if let Value::Object(known) = known {
                known.extend(noted);
            }
        }
        if verdict.over {
            self.stats.over_limit().inc();
            self.stats.cx_closed().inc();
            return Err("ratelimit_close_over_limit");
        }
        self.stats.ok().inc();
        Ok(())
    }

    fn descriptors(&self, connection: &ConnectionInfo, worker: &Worker) -> Vec<Descriptor> {
        let exchange = super::exchange(connection, None, worker.random.bits());
        let each = self.plan.descriptors.iter();
        each.map(|plan| Descriptor {
            entries: plan
                .entries
                .iter()
                .map(|(key, value)| {
                    let mut text = Vec::new();
                    access_log::write(value, &exchange, Lines::Any, &mut text);
                    (key.clone(), String::from_utf8_lossy(&text).into_owned())
                })
                .collect(),
            limit: plan.limit.clone(),
            hits_addend: plan.hits_addend,
            negative_hits: plan.negative_hits,
            ratelimit_headers: None,
        })
        .collect()
    }
}
