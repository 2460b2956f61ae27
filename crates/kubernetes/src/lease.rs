//! Leader election on a Lease: of several replicas one does what must be done once.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::code;

/// Who writes roots into namespaces: one replica of all revisions.
pub const NAMESPACES: &str = "istio-namespace-controller-election";
/// Who writes reports below `status`: one replica of each revision.
pub const STATUS: &str = "istio-status-leader";
/// Who deploys managed Gateways: one replica of each revision.
pub const GATEWAYS: &str = "istio-gateway-deployment";

/// A candidate for a lease.
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    timing: Timing,
    /// The record that was last seen, and when it was first seen like this: clocks of replicas are not compared.
    seen: Option<(LeaseSpec, Instant)>,
}

/// How long a lease holds.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Without a renewal for this long others take over.
    pub lease: Duration,
    /// Without a successful renewal for this long the leader stops: before others may start.
    pub give_up: Duration,
    /// Between two tries.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            lease: Duration::from_secs(15),
            give_up: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election")
            .field("name", &self.name)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Election {
    /// A candidate `identity` (a pod's name) for the lease `namespace/name`.
    pub fn new(
        client: &Client,
        namespace: &str,
        name: &str,
        identity: &str,
        timing: Timing,
    ) -> Self {
        Election {
            api: Api::namespaced(client.clone(), namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            timing,
            seen: None,
        }
    }

    /// Does `work` whenever this replica leads, and stops it when it no longer does, until `stop` changes; then the
    /// lease is given back, so that another replica need not wait for its end.
    pub async fn run<W: Future<Output = ()>>(
        mut self,
        mut stop: watch::Receiver<()>,
        work: impl Fn() -> W,
    ) {
        loop {
            tokio::select! {
                () = self.win() => {}
                _ = stop.changed() => return,
            }
            info!("{} leads ({})", self.identity, self.name);
            tokio::select! {
                () = self.lose() => warn!("{} leads no longer ({})", self.identity, self.name),
                () = work() => {}
                _ = stop.changed() => {
                    self.release().await;
                    return;
                }
            }
        }
    }

    async fn win(&mut self) {
        loop {
            match self.attempt().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(e) => debug!("lease {}: {e}", self.name),
            }
            tokio::time::sleep(self.timing.retry).await;
        }
    }

    async fn lose(&mut self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(self.timing.retry).await;
            let left = self.timing.give_up.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(e)) => debug!("lease {}: {e}", self.name),
                Err(_) => {}
            }
            if renewed.elapsed() >= self.timing.give_up {
                return;
            }
        }
    }

    /// One try to take or keep the lease; whether it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let Some(mut lease) = self.api.get_opt(&self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.record(None, now)),
            };
            return match self.api.create(&PostParams::default(), &lease).await {
                Ok(_) => Ok(true),
                Err(e) if code(&e) == Some(409) => Ok(false),
                Err(e) => Err(e),
            };
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if self.seen.as_ref().is_none_or(|(old, _)| *old != spec) {
            self.seen = Some((spec.clone(), Instant::now()));
        }
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let length = spec
            .lease_duration_seconds
            .and_then(|s| u64::try_from(s).ok());
        let length = length.map_or(self.timing.lease, Duration::from_secs);
        let ended = self
            .seen
            .as_ref()
            .is_some_and(|(_, since)| since.elapsed() >= length);
        if holder != self.identity && !holder.is_empty() && !ended {
            return Ok(false);
        }
        lease.spec = Some(self.record(Some(spec), now));
        // The resource version that was read goes along: of two that try at once one is refused.
        match self
            .api
            .replace(&self.name, &PostParams::default(), &lease)
            .await
        {
            Ok(_) => Ok(true),
            Err(e) if code(&e) == Some(409) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn record(&self, old: Option<LeaseSpec>, now: MicroTime) -> LeaseSpec {
        let old = old.unwrap_or_default();
        let ours = old.holder_identity.as_deref() == Some(&self.identity);
        let changes = old.lease_transitions.unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.timing.lease.as_secs()).ok(),
            acquire_time: if ours {
                old.acquire_time
            } else {
                Some(now.clone())
            },
            renew_time: Some(now),
            lease_transitions: Some(if ours {
                changes
            } else {
                changes.saturating_add(1)
            }),
            ..LeaseSpec::default()
        }
    }

    async fn release(&self) {
        let Ok(Some(mut lease)) = self.api.get_opt(&self.name).await else {
            return;
        };
        let Some(spec) = &mut lease.spec else { return };
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return;
        }
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        let replaced = self
            .api
            .replace(&self.name, &PostParams::default(), &lease)
            .await;
        if let Err(e) = replaced {
            debug!("lease {}: cannot be given back: {e}", self.name);
        }
    }
}

#[cfg(test)]
mod tests;
