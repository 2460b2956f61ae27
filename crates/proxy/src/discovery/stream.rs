//! The ADS stream: connects, feeds [`Truth`], answers, follows what is asked for, and comes back when it breaks.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use prost::Message;
use proto::envoy::config::{bootstrap::v3::Bootstrap as BootstrapMessage, core::v3::Node};
use xds::{
    Mode,
    client::{ConnectError, Incoming, Outgoing, Received, Session, Target, Want, connect},
    type_url::{CDS, EDS, LDS, RDS, short},
};

use super::{Apply, Phase, Truth};
use crate::{
    plan::{
        Address, Bootstrap,
        bootstrap::Ads,
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
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the ADS stream broke: {0}")]
    Broken(#[from] Box<tonic::Status>),
    #[error("ads_config goes to cluster `{0}`, which has no address to connect to")]
    NoAddress(String),
    #[error(
        "ads_config goes to cluster `{0}` with TLS, which this version does not speak; use a plaintext address"
    )]
    Tls(String),
}

impl Discovery {
    /// Nothing is in force yet.
    pub fn new(server: Rc<Server>) -> Self {
        let bootstrap = &server.bootstrap;
        let delta = bootstrap.ads.as_ref().is_none_or(|a| a.delta);
        let mode = if delta { Mode::Delta } else { Mode::Sotw };
        let session = Session::new(mode, node(bootstrap));
        let truth = Rc::new(RefCell::new(Truth::new(bootstrap, Instant::now())));
        Self {
            server,
            truth,
            session,
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
            // Nothing to connect to: only what times out by itself is left to do.
            while let Some(deadline) = self.deadline() {
                tokio::time::sleep_until(deadline).await;
                self.tick();
            }
            return;
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
        while let Some(deadline) = self.deadline().filter(|d| *d < end) {
            tokio::time::sleep_until(deadline).await;
            self.tick();
        }
        tokio::time::sleep_until(end).await;
    }

    /// One stream, from its opening to its end.
    async fn stream(
        &mut self,
        ads: &Ads,
        connected: &stats::Gauge,
        backoff: &mut base::backoff::Backoff,
    ) -> Result<(), StreamError> {
        let target = target(&self.server.bootstrap, ads)?;
        self.session.connected();
        let first: Vec<Outgoing> = std::iter::from_fn(|| self.session.next_request()).collect();
        let headers: Vec<(String, String)> = ads
            .initial_metadata
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        let mut connection = connect(&target, self.session.mode(), &headers, first).await?;
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
            // Both futures may be dropped: a message that is not complete stays in the stream.
            tokio::select! {
                received = next(&mut connection.responses, &mut self.session) => match received? {
                    Some(received) => {
                        backoff.reset();
                        self.received(&received);
                    }
                    None => return Ok(()),
                },
                () = timer => self.tick(),
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
        let errors = self.with_truth(|truth, apply| truth.receive(received, Instant::now(), apply));
        let rejected = !errors.is_empty() || received.malformed.is_some();
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
        for (name, why) in &errors {
            tracing::warn!("{} {name} refused: {why}", short(&received.type_url));
        }
        self.session.answer(received, &errors);
        self.follow();
    }

    /// Brings subscriptions, gauges and the state of the process in line with the truth.
    fn follow(&mut self) {
        let (eds, rds, unused, phase, clusters, listeners) = {
            let mut truth = self.truth.borrow_mut();
            (
                truth.eds_names(),
                truth.rds_names(),
                truth.drop_unused_routes(),
                truth.phase(),
                truth.clusters.warming(),
                truth.listeners.warming(),
            )
        };
        if !unused.is_empty() {
            self.server.apply(unused);
        }
        for failure in self.truth.borrow_mut().take_failures() {
            let kind = short(failure.type_url);
            tracing::error!("{kind} {}: {}", failure.name, failure.details);
        }
        if self.server.bootstrap.ads.is_some() {
            self.session.watch(EDS, Want::Names(eds));
            // Listeners are asked for when their clusters are there.
            if phase >= Phase::Listeners && self.server.bootstrap.lds.is_some() {
                self.session.watch(LDS, Want::All);
            }
            self.session.watch(RDS, Want::Names(rds));
        }
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

async fn next(
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
    if node.user_agent_name.is_empty() {
        node.user_agent_name = "outrigger".to_owned();
    }
    node
}

/// Where the ADS cluster is.
fn target(bootstrap: &Bootstrap, ads: &Ads) -> Result<Target, StreamError> {
    let nowhere = || StreamError::NoAddress(ads.cluster.to_string());
    let (cluster, _) = bootstrap
        .static_clusters
        .iter()
        .find(|(c, _)| c.name == ads.cluster)
        .ok_or_else(nowhere)?;
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
        return Err(StreamError::Tls(ads.cluster.to_string()));
    }
    Ok(match &endpoint.address {
        Address::Pipe { path, .. } => Target::Unix(path.clone()),
        address => Target::Tcp(address.to_string()),
    })
}
