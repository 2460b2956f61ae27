//! `envoy.filters.network.ext_authz`: asks a service whether a connection may come in.
//!
//! It is asked as the connection begins, before anything goes to the upstream; Envoy asks at the first bytes of the
//! client, when a server that speaks first has already spoken.

use std::sync::Arc;

use crate::{
    filter::ext_authz::{Decision, labels},
    grpc::authorization::{About, Question},
    listener::ConnectionInfo,
    plan::{ext_authz::NetworkExtAuthz as Plan, route_match::RequestView},
    worker::Worker,
};

stats::group! {
    /// `ext_authz.<stat_prefix>.`
    struct NetworkExtAuthzStats {
        counter total,
        counter ok,
        counter denied,
        counter error,
        counter disabled,
        counter failure_mode_allowed,
        counter cx_closed,
        gauge active,
    }
}

/// The filter of one chain.
#[derive(Debug)]
pub(super) struct NetworkExtAuthz {
    plan: Arc<Plan>,
    stats: NetworkExtAuthzStats,
}

impl NetworkExtAuthz {
    pub(super) fn new(plan: &Arc<Plan>, worker: &Worker) -> Self {
        let scope = format!("ext_authz.{}.", plan.stat_prefix);
        Self {
            plan: plan.clone(),
            stats: NetworkExtAuthzStats::new(worker.stats.scope(&scope)),
        }
    }

    /// Lets a connection in, or says why not.
    pub(super) async fn judge(
        &self,
        connection: &ConnectionInfo,
        worker: &Worker,
    ) -> Result<(), &'static str> {
        let plan = &self.plan;
        if let Some(matcher) = &plan.enabled_metadata {
            let root = connection.dynamic_metadata(&matcher.filter);
            let value = root.and_then(|root| {
                let mut path = matcher.path.iter();
                path.try_fold(root, |value, key| value.get(&**key))
            });
            if !matcher.matches(value) {
                self.stats.disabled().inc();
                return Ok(());
            }
        }
        let told = plan.metadata_context_namespaces.iter();
        let about = About {
            certificate: plan.include_peer_certificate,
            tls_session: plan.include_tls_session,
            labels: labels(plan.labels_key.as_deref(), &worker.bootstrap),
            metadata: told
                .filter_map(|name| {
                    let value = connection.dynamic_metadata(name)?;
                    Some((name.to_string(), value.clone()))
                })
                .collect(),
            ..About::default()
        };
        let question = Question::new(connection, about, None);
        self.stats.total().inc();
        self.stats.active().inc();
        let asked = question.ask(worker, &plan.service).await;
        self.stats.active().dec();
        let decision = match asked {
            Ok(verdict) => verdict.decision,
            Err(error) => {
                let cluster = &*plan.service.cluster;
                tracing::debug!(cluster, %error, "an authorization service could not be asked");
                Decision::NONE
            }
        };
        match decision {
            Decision::Pass => {
                self.stats.ok().inc();
                Ok(())
            }
            Decision::Deny { .. } => {
                self.stats.denied().inc();
                self.stats.cx_closed().inc();
                Err("ext_authz_denied")
            }
            Decision::Error { .. } => {
                self.stats.error().inc();
                if plan.failure_mode_allow {
                    self.stats.failure_mode_allowed().inc();
                    return Ok(());
                }
                self.stats.cx_closed().inc();
                Err("ext_authz_error")
            }
        }
    }
}
