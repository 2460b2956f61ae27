//! Keeps the addresses of a cluster's names up to date.

use std::{rc::Weak, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{AbortHandle, spawn_local},
};

use super::{ChangeError, Server};
use crate::{
    cluster::Names,
    plan::{
        Address, Cluster, ClusterLoadAssignment,
        cluster::{Discovery, DnsOptions},
    },
    worker::Random,
};

/// A running task; dropping it ends it.
#[derive(Debug)]
pub(super) struct DnsTask {
    task: AbortHandle,
    first: watch::Receiver<bool>,
}

impl Drop for DnsTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a task needs.
pub(super) struct Wanted {
    cluster: Arc<str>,
    names: Vec<Arc<str>>,
    resolver: Names,
    options: DnsOptions,
}

impl DnsTask {
    /// What has to be resolved for a cluster; `None` where there is nothing.
    pub(super) fn wanted(plan: &Cluster) -> Result<Option<Wanted>, ChangeError> {
        let (Discovery::StrictDns {
            load_assignment,
            dns,
        }
        | Discovery::LogicalDns {
            load_assignment,
            dns,
        }) = &plan.discovery
        else {
            return Ok(None);
        };
        let names = names(load_assignment);
        if names.is_empty() {
            return Ok(None);
        }
        let resolver = Names::new(dns).map_err(|reason| ChangeError::Resolver {
            cluster: plan.name.clone(),
            reason,
        })?;
        Ok(Some(Wanted {
            cluster: plan.name.clone(),
            names,
            resolver,
            options: dns.clone(),
        }))
    }

    /// Resolves until it is dropped.
    pub(super) fn start(wanted: Wanted, server: Weak<Server>) -> Self {
        let (sender, first) = watch::channel(false);
        let task = spawn_local(async move {
            let random = Random::default();
            let mut failures = 0;
            loop {
                let mut again: Option<Duration> = None;
                let mut failed = false;
                for name in &wanted.names {
                    let answer = wanted.resolver.resolve(name).await;
                    let Some(server) = server.upgrade() else {
                        return;
                    };
                    let scope = format!("cluster.{}.", server.stat_name(&wanted.cluster));
                    server
                        .stats
                        .counter(&format!("{scope}update_attempt"))
                        .inc();
                    match answer {
                        Ok(answer) => {
                            server
                                .stats
                                .counter(&format!("{scope}update_success"))
                                .inc();
                            again =
                                Some(again.map_or(answer.again, |again| again.min(answer.again)));
                            server.resolved(&wanted.cluster, name, answer.addresses);
                        }
                        // What was known stays in use.
                        Err(error) => {
                            failed = true;
                            server
                                .stats
                                .counter(&format!("{scope}update_failure"))
                                .inc();
                            tracing::debug!(
                                cluster = &*wanted.cluster,
                                name = &**name,
                                error,
                                "cannot resolve"
                            );
                        }
                    }
                }
                sender.send_replace(true);
                failures = if failed { failures + 1 } else { 0 };
                let options = &wanted.options;
                let wait = match options.failure_refresh {
                    Some((base, cap)) if failed => {
                        let most = base.saturating_mul(1 << failures.min(16)).min(cap);
                        Duration::from_millis(random.below(most.as_millis() as u64 + 1))
                            .max(base.min(cap))
                    }
                    _ if failed => options.refresh_rate,
                    _ => again.unwrap_or(options.refresh_rate),
                };
                let jitter = random.below(options.jitter.as_millis() as u64 + 1);
                tokio::time::sleep(wait + Duration::from_millis(jitter)).await;
            }
        });
        Self {
            task: task.abort_handle(),
            first,
        }
    }

    /// Turns to true with the first answer or failure.
    pub(super) fn first_answer(&self) -> watch::Receiver<bool> {
        self.first.clone()
    }
}

fn names(assignment: &ClusterLoadAssignment) -> Vec<Arc<str>> {
    let mut names: Vec<Arc<str>> = assignment
        .endpoints()
        .filter_map(|(_, endpoint)| match &endpoint.address {
            Address::Name { host, .. } => Some(host.clone()),
            _ => None,
        })
        .collect();
    names.sort();
    names.dedup();
    names
}
