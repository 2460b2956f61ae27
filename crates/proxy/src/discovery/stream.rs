//! The ADS stream: connects, feeds [`Truth`], answers, follows what is asked for, and comes back when it breaks.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use prost::Message;
use proto::envoy::{
    config::{
        bootstrap::v3::Bootstrap as BootstrapMessage,
        core::v3::{BuildVersion, Node, node::UserAgentVersionType},
    },
    r#type::v3::SemanticVersion,
};
use xds::{
    Mode,
    client::{ConnectError, Incoming, Outgoing, Received, Session, Target, Want, connect, shown},
    type_url::{CDS, EDS, LDS, RDS, SDS, short},
};

use super::{
    Apply, Phase, Truth,
    secrets::{Delivery, SecretSources},
};
use crate::{
    plan::{
        Address, Bootstrap,
        bootstrap::{Ads, ConfigSourceKind},
        cluster::{Discovery as ClusterDiscovery, UpstreamTransport},
    },
    server::{Server, State},
};

/// Waiting times between attempts: an answer within a second of the control plane's return.
const BACK_OFF_BASE: Duration = Duration::from_millis(100);
const BACK_OFF_CAP: Duration = Duration::from_secs(1);
/// How long the first answers of name servers are waited for, at most.
const FIRST_RESOLUTION: Duration = Duration::from_secs(5);

/// The way from a control plane to the server. Lives on the main thread.
#[derive(Debug)]
pub struct Discovery {
    server: Rc<Server>,
    truth: Rc<RefCell<Truth>>,
    session: Session,
    secrets: SecretSources,
    /// Secrets were asked for on the aggregated stream.
    asked_secrets: bool,
    node: Node,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the ADS stream broke: {0}")]
    Broken(#[from] Box<tonic::Status>),
    #[error("cluster `{0}` has no address to connect to")]
    NoAddress(String),
    #[error(
        "cluster `{0}` has TLS, which this version does not speak to control planes; use a plaintext address"
    )]
    Tls(String),
}

impl Discovery {
    /// Nothing is in force yet.
    pub fn new(server: Rc<Server>) -> Self {
        let bootstrap = &server.bootstrap;
        let delta = bootstrap.ads.as_ref().is_none_or(|a| a.delta);
        let mode = if delta { Mode::Delta } else { Mode::Sotw };
        let node = node(bootstrap);
        let session = Session::new(mode, node.clone());
        let truth = Rc::new(RefCell::new(Truth::new(bootstrap, Instant::now())));
        Self {
            server,
            truth,
            session,
            secrets: SecretSources::default(),
            asked_secrets: false,
            node,
        }
    }

    /// What is in force, for the admin endpoint.
    pub fn truth(&self) -> Rc<RefCell<Truth>> {
        self.truth.clone()
    }

    /// Puts the static part in force: clusters, their names resolved, then listeners.
    ///
    /// # Errors
    /// What of it cannot be: the process should not start then.
    pub async fn begin(&mut self) -> Result<(), String> {
        self.with_truth(|truth, apply| truth.begin_clusters(Instant::now(), apply));
        self.server.clusters_warmed(FIRST_RESOLUTION).await;
        self.with_truth(|truth, apply| truth.begin_listeners(Instant::now(), apply));
        let failures = self.truth.borrow_mut().take_failures();
        if !failures.is_empty() {
            let lines: Vec<String> = failures.into_iter().map(|f| f.details).collect();
            return Err(lines.join("\n"));
        }
        self.server.settled().await;
        if self.server.bootstrap.cds.is_some() {
            self.session.watch(CDS, Want::All);
        }
        self.follow();
        Ok(())
    }

    /// Follows the control plane for the life of the process.
    pub async fn run(mut self) {
        let Some(ads) = self.server.bootstrap.ads.clone() else {
            // Nothing to connect to: only secrets and what times out by itself are left.
            loop {
                self.pass(Duration::from_secs(3600)).await;
            }
        };
        let mut backoff = base::backoff::Backoff::new(BACK_OFF_BASE, BACK_OFF_CAP);
        let connected = self.server.stats.gauge("control_plane.connected_state");
        loop {
            match self.stream(&ads, &connected, &mut backoff).await {
                Ok(()) => {
                    tracing::info!("the control plane closed the ADS stream")
                }
                Err(error) => tracing::warn!("{error}"),
            }
            connected.set(0);
            self.session.disconnected();
            for kind in ["cluster_manager.cds", "listener_manager.lds"] {
                self.server
                    .stats
                    .counter(&format!("{kind}.update_failure"))
                    .inc();
            }
            let wait = backoff.next_wait();
            self.pass(wait).await;
        }
    }

    fn with_truth<R>(&self, run: impl FnOnce(&mut Truth, &mut Apply<'_>) -> R) -> R {
        let server = self.server.clone();
        let mut truth = self.truth.borrow_mut();
        run(&mut truth, &mut |changes| server.apply(changes))
    }

    fn deadline(&self) -> Option<tokio::time::Instant> {
        self.truth
            .borrow()
            .next_deadline()
            .map(tokio::time::Instant::from_std)
    }

    fn tick(&mut self) {
        self.with_truth(|truth, apply| truth.tick(Instant::now(), apply));
        self.follow();
    }

    /// Waits, with an eye on deadlines.
    async fn pass(&mut self, wait: Duration) {
        let end = tokio::time::Instant::now() + wait;
        loop {
            let deadline = self.deadline().filter(|d| *d < end);
            // Both futures may be dropped: a delivery stays in its queue.
            tokio::select! {
                () = tokio::time::sleep_until(deadline.unwrap_or(end)) => match deadline {
                    Some(_) => self.tick(),
                    None => return,
                },
                delivery = self.secrets.next() => self.delivered(delivery),
            }
        }
    }

    /// Secrets from a stream of their own or from a file.
    fn delivered(&mut self, delivery: Delivery) {
        let (kind, received, verdict) = match delivery {
            Delivery::Secrets {
                kind,
                received,
                verdict,
            } => (kind, received, verdict),
            Delivery::Nobody { kind, name } => {
                self.with_truth(|truth, apply| {
                    truth.nobody_has(&kind, &name, Instant::now(), apply);
                });
                return self.follow();
            }
        };
        let errors = self
            .with_truth(|truth, apply| truth.receive_own(&received, &kind, Instant::now(), apply));
        self.tell_secrets(&received, &errors);
        // Whoever asked may be gone: nobody needs the secret any more.
        let _ = verdict.send(errors);
        self.follow();
    }

    /// Logs and counts what became of secrets, each as `sds.NAME.`.
    fn tell_secrets(&self, received: &Received, errors: &[(String, String)]) {
        for resource in &received.resources {
            let why = errors.iter().find(|(name, _)| *name == resource.name);
            let result = match why {
                Some((_, why)) => {
                    tracing::warn!("secret {} refused: {why}", resource.name);
                    "update_rejected"
                }
                None => {
                    tracing::info!("secret {} is in use", resource.name);
                    "update_success"
                }
            };
            let scope = self.server.stats.scope(&format!("sds.{}.", resource.name));
            scope.counter("update_attempt").inc();
            scope.counter(result).inc();
        }
    }

    /// One stream, from its opening to its end.
    async fn stream(
        &mut self,
        ads: &Ads,
        connected: &stats::Gauge,
        backoff: &mut base::backoff::Backoff,
    ) -> Result<(), StreamError> {
        let target = target(&self.truth.borrow(), &ads.cluster)?;
        self.session.connected();
        let first: Vec<Outgoing> = std::iter::from_fn(|| self.session.next_request()).collect();
        let headers: Vec<(String, String)> = ads
            .initial_metadata
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        let mode = self.session.mode();
        let mut opening = std::pin::pin!(connect(&target, mode, &headers, first));
        let mut connection = loop {
            tokio::select! {
                opened = &mut opening => break opened?,
                delivery = self.secrets.next() => self.delivered(delivery),
            }
        };
        connected.set(1);
        tracing::info!("ADS stream to {target:?} is open");
        loop {
            while let Some(request) = self.session.next_request() {
                if connection.requests.send(request).is_err() {
                    return Ok(());
                }
            }
            let deadline = self.deadline();
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            // Each may be dropped: a message that is not complete stays in the stream, a delivery in its queue.
            tokio::select! {
                received = next(&mut connection.responses, &mut self.session) => match received? {
                    Some(received) => {
                        backoff.reset();
                        self.received(&received);
                    }
                    None => return Ok(()),
                },
                () = timer => self.tick(),
                delivery = self.secrets.next() => self.delivered(delivery),
            }
        }
    }

    fn received(&mut self, received: &Received) {
        let stats = &self.server.stats;
        let prefix = match received.type_url.as_str() {
            CDS => Some("cluster_manager.cds"),
            LDS => Some("listener_manager.lds"),
            _ => None,
        };
        let now = Instant::now();
        let errors = if received.type_url == EDS {
            // How long it takes to reach the last worker is counted.
            let server = self.server.clone();
            let mut apply = |changes| server.apply_since(changes, now);
            self.truth.borrow_mut().receive(received, now, &mut apply)
        } else {
            self.with_truth(|truth, apply| truth.receive(received, now, apply))
        };
        let rejected =
            !errors.is_empty() || !received.refused.is_empty() || received.malformed.is_some();
        if let Some(prefix) = prefix {
            stats.counter(&format!("{prefix}.update_attempt")).inc();
            let result = if rejected {
                "update_rejected"
            } else {
                "update_success"
            };
            stats.counter(&format!("{prefix}.{result}")).inc();
            if !rejected {
                stats
                    .text(&format!("{prefix}.version_text"))
                    .set(&received.version);
            }
        }
        if let Some(why) = &received.malformed {
            tracing::warn!("{} refused: {why}", short(&received.type_url));
        }
        if received.type_url == SDS {
            self.tell_secrets(received, &errors);
        }
        for (name, why) in received.refused.iter().chain(&errors) {
            let (kind, name) = (short(&received.type_url), shown(name));
            tracing::warn!("{kind} {name} refused: {why}");
        }
        self.session.answer(received, &errors);
        self.follow();
    }

    /// Brings subscriptions, gauges and the state of the process in line with the truth.
    fn follow(&mut self) {
        // A change of endpoints or routes changes no names, and there may be thousands.
        let (names, secrets, unused, phase, (clusters, listeners)) = {
            let mut truth = self.truth.borrow_mut();
            let mut unused = truth.drop_unused_secrets();
            let names = truth.take_names_changed().then(|| {
                unused.extend(truth.drop_unused_routes());
                (truth.eds_names(), truth.rds_names())
            });
            let secrets = truth.sds_names().clone();
            (names, secrets, unused, truth.phase(), truth.warming())
        };
        if !unused.is_empty() {
            self.server.apply(unused);
        }
        let ads_secrets = secrets
            .iter()
            .filter(|s| {
                s.source
                    .as_ref()
                    .is_some_and(|s| s.kind == ConfigSourceKind::Ads)
            })
            .map(|s| s.name.to_string())
            .collect::<std::collections::BTreeSet<_>>();
        for failure in self.truth.borrow_mut().take_failures() {
            let kind = short(failure.type_url);
            tracing::error!("{kind} {}: {}", failure.name, failure.details);
        }
        if self.server.bootstrap.ads.is_some() {
            let (eds, rds) = match names {
                Some((eds, rds)) => (Some(eds), Some(rds)),
                None => (None, None),
            };
            if let Some(eds) = eds {
                self.session.watch(EDS, Want::Names(eds));
            }
            // Listeners are asked for when their clusters are there.
            if phase >= Phase::Listeners && self.server.bootstrap.lds.is_some() {
                self.session.watch(LDS, Want::All);
            }
            if let Some(rds) = rds {
                self.session.watch(RDS, Want::Names(rds));
            }
            // A type that was never wanted is not spoken of.
            if !ads_secrets.is_empty() || self.asked_secrets {
                self.asked_secrets = true;
                self.session.watch(SDS, Want::Names(ads_secrets));
            }
        }
        let place =
            |cluster: &str| target(&self.truth.borrow(), cluster).map_err(|e| e.to_string());
        self.secrets.follow(&secrets, &self.node, place);
        let gauge = |name: &str, n: usize| self.server.stats.gauge(name).set(n as i64);
        gauge("cluster_manager.warming_clusters", clusters);
        gauge("listener_manager.total_listeners_warming", listeners);
        match (phase, self.server.state()) {
            (Phase::Listeners, State::PreInitializing) => {
                self.server.set_state(State::Initializing)
            }
            (Phase::Live, State::PreInitializing | State::Initializing) => {
                self.server.set_state(State::Live);
            }
            _ => {}
        }
    }
}

pub(super) async fn next(
    incoming: &mut Incoming,
    session: &mut Session,
) -> Result<Option<Received>, StreamError> {
    let broken = |status| StreamError::Broken(Box::new(status));
    Ok(match incoming {
        Incoming::Delta(stream) => stream
            .message()
            .await
            .map_err(broken)?
            .map(|r| session.received_delta(r)),
        Incoming::Sotw(stream) => stream
            .message()
            .await
            .map_err(broken)?
            .map(|r| session.received_sotw(r)),
    })
}

/// The node as the bootstrap says it, with our name and version.
fn node(bootstrap: &Bootstrap) -> Node {
    let message = BootstrapMessage::decode(&*bootstrap.encoded).unwrap_or_default();
    let mut node = message.node.unwrap_or_default();
    complete(&mut node);
    node
}

/// Puts in our name and version where the bootstrap says none, as Envoy puts its own.
pub(crate) fn complete(node: &mut Node) {
    if node.user_agent_name.is_empty() {
        node.user_agent_name = "outrigger".to_owned();
    }
    let number = |text: &str| text.parse().unwrap_or(0);
    node.user_agent_version_type.get_or_insert_with(|| {
        UserAgentVersionType::UserAgentBuildVersion(BuildVersion {
            version: Some(SemanticVersion {
                major_number: number(env!("CARGO_PKG_VERSION_MAJOR")),
                minor_number: number(env!("CARGO_PKG_VERSION_MINOR")),
                patch: number(env!("CARGO_PKG_VERSION_PATCH")),
            }),
            metadata: None,
        })
    });
}

/// Where a cluster is that configuration comes from.
fn target(truth: &Truth, name: &str) -> Result<Target, StreamError> {
    let nowhere = || StreamError::NoAddress(name.to_owned());
    let entry = truth.clusters.entries.get(name).ok_or_else(nowhere)?;
    let version = entry.active.as_ref().or(entry.warming.as_deref());
    let cluster = version.ok_or_else(nowhere)?.plan.look();
    let assignment = match &cluster.discovery {
        ClusterDiscovery::Static(a)
        | ClusterDiscovery::StrictDns {
            load_assignment: a, ..
        }
        | ClusterDiscovery::LogicalDns {
            load_assignment: a, ..
        } => a,
        _ => return Err(nowhere()),
    };
    let (_, endpoint) = assignment.endpoints().next().ok_or_else(nowhere)?;
    if *cluster.transport_for(&endpoint.metadata) != UpstreamTransport::RawBuffer {
        return Err(StreamError::Tls(name.to_owned()));
    }
    Ok(match &endpoint.address {
        Address::Pipe { path, .. } => Target::Unix(path.clone()),
        address => Target::Tcp(address.to_string()),
    })
}
