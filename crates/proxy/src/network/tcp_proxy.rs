//! `envoy.filters.network.tcp_proxy`: bytes to a host of a cluster and back.

use std::{borrow::Cow, cell::Cell, rc::Rc, sync::Arc, time::Duration};

use base::backoff::Backoff;
use serde_json::Value;
use smallvec::SmallVec;
use tls::session::Session;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    copy::{CopyError, Progress, both_ways},
    exchange, log_connection, tunnel,
};
use crate::{
    access_log::Logger,
    cluster::{Cluster, Established, Host, LbContext, UpstreamAccount, UpstreamError, shared_hash},
    filter::{IstioTcpStats, TcpReport},
    http::CloseTypes,
    io::Stream,
    listener::{Connection, ConnectionInfo, LiveChain},
    plan::{self, FilterChain, network::NetworkFilterConfig, route::MetadataMatch},
    worker::{Worker, drain::Drain},
};

stats::group! {
    /// `tcp.PREFIX.`
    struct TcpStats {
        counter downstream_cx_no_route,
        counter downstream_cx_rx_bytes_total,
        counter downstream_cx_total,
        counter downstream_cx_tx_bytes_total,
        counter downstream_flow_control_paused_reading_total,
        counter downstream_flow_control_resumed_reading_total,
        counter idle_timeout,
        counter max_downstream_connection_duration,
        gauge downstream_cx_tx_bytes_buffered,
    }
}

/// A TCP proxy as one worker runs it.
#[derive(Debug)]
pub(crate) struct TcpProxy {
    plan: Arc<plan::TcpProxy>,
    stats: TcpStats,
    istio: Option<IstioTcpStats>,
    logs: Vec<Logger>,
    /// The SNI names the cluster.
    sni_cluster: bool,
    may_splice: bool,
}

/// Why a connection ended.
enum End {
    /// A peer or the configuration ended it.
    Natural,
    TooOld,
    /// By a policy that was not there when it began; with the response flag.
    Denied(Cow<'static, str>, Option<&'static str>),
}

/// Completes when the connection has to close since its chain drains, or since a newer one would not let it in.
async fn drained(drain: &Drain, info: &ConnectionInfo, worker: &Rc<Worker>) -> End {
    drain.begin().await;
    // In a box, since connections that nothing drains should not carry room for it.
    Box::pin(async {
        let mut judged = None;
        loop {
            if let Some(why) = worker.listeners.denies(info) {
                return End::Denied(why, None);
            }
            let newest = worker.listeners.newest_chain(info);
            if let Some(chain) = newest.filter(|chain| asks_anew(chain, judged.as_ref(), info)) {
                let mut again = info.clone();
                let answer = chain.network(worker).judge(&mut again, worker).await;
                if let Err(refusal) = answer {
                    return End::Denied(refusal.why, again.response_flag);
                }
                judged = Some(chain);
            }
            // A still newer version may deny it.
            if timeout(DENIED_INTERVAL, drain.closed()).await.is_ok() {
                return End::Natural;
            }
        }
    })
    .await
}

/// Whether a chain asks services about its connections, and otherwise than the one before, which let this one in.
fn asks_anew(chain: &Rc<LiveChain>, before: Option<&Rc<LiveChain>>, info: &ConnectionInfo) -> bool {
    fn judges(chain: &FilterChain) -> impl Iterator<Item = &NetworkFilterConfig> {
        let all = chain.filters.iter().map(|filter| &filter.config);
        // Their policies say whom the services are asked about.
        all.filter(|f| {
            matches!(
                f,
                NetworkFilterConfig::Rbac(..) | NetworkFilterConfig::ExtAuthz(_)
            )
        })
    }
    if before.is_some_and(|before| Rc::ptr_eq(before, chain)) {
        return false;
    }
    let before = before.map_or(info.chain.as_deref(), |before| Some(&before.plan));
    judges(&chain.plan).any(|f| matches!(f, NetworkFilterConfig::ExtAuthz(_)))
        && !before.is_some_and(|before| judges(before).eq(judges(&chain.plan)))
}

const DENIED_INTERVAL: Duration = Duration::from_secs(1);

/// How a proxied connection went, for logs and metrics.
#[derive(Clone, Debug, Default)]
pub struct TcpOutcome {
    /// The cluster that was chosen, whether it exists or not.
    pub cluster_name: Option<Arc<str>>,
    /// The cluster.
    pub cluster: Option<Arc<plan::Cluster>>,
    /// The host that was chosen.
    pub host: Option<Arc<Host>>,
    /// Connections tried.
    pub attempts: u32,
    /// Our address of the upstream connection.
    pub upstream_local: Option<std::net::SocketAddr>,
    /// How the upstream connection came to be.
    pub established: Option<Established>,
    /// The connections of all attempts.
    pub connections: SmallVec<[u64; 2]>,
    /// How long the upstream connection was waited for.
    pub pool_ready: Option<Duration>,
    /// How the connections ended.
    pub closed: CloseTypes,
    /// What TLS agreed on with it.
    pub upstream_tls: Option<Arc<Session>>,
    /// Who it is, by Istio's metadata exchange.
    pub upstream_peer: Option<Arc<Value>>,
    /// From the client.
    pub bytes_received: u64,
    /// To the client.
    pub bytes_sent: u64,
    /// Envoy's response flags, in their short form.
    pub response_flags: Vec<&'static str>,
    /// Why the transport failed.
    pub upstream_failure: Option<String>,
    /// How long it lasted.
    pub duration: Duration,
}

/// What Istio's metrics were told already.
#[derive(Debug, Default)]
struct Reported {
    opened: Cell<bool>,
    received: Cell<u64>,
    sent: Cell<u64>,
}

impl TcpProxy {
    pub(super) fn new(
        plan: &Arc<plan::TcpProxy>,
        istio: Option<IstioTcpStats>,
        sni_cluster: bool,
        worker: &Rc<Worker>,
    ) -> Self {
        let stats = TcpStats::new(worker.stats.scope(&format!("tcp.{}.", plan.stat_prefix)));
        Self {
            plan: plan.clone(),
            stats,
            istio,
            logs: Logger::all(&plan.access_logs, worker),
            sni_cluster,
            may_splice: worker.bootstrap.runtime.get(SPLICE) != Some(&Value::Bool(false)),
        }
    }

    /// Proxies a connection to its end.
    pub(super) async fn serve(&self, connection: Connection, worker: &Rc<Worker>) -> TcpOutcome {
        self.stats.downstream_cx_total().inc();
        let mut outcome = TcpOutcome::default();
        let limit = self.longest(worker);
        let Connection {
            mut stream,
            mut info,
            drain,
        } = connection;
        if self.plan.flush_access_log_on_start {
            log_connection(&self.logs, &info, None, "TcpConnectionStart", worker);
        }
        let progress = Progress::default();
        let waiting = self.stats.downstream_cx_tx_bytes_buffered().part();
        // It is new, so there is none yet.
        let _ = progress.waiting[1].set(waiting);
        let reported = Reported::default();
        {
            let work = self.proxy(
                (&mut stream, &info),
                &progress,
                &reported,
                &mut outcome,
                worker,
            );
            let over = async {
                match limit {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            let end = tokio::select! {
                () = work => End::Natural,
                () = over => End::TooOld,
                end = drained(&drain, &info, worker) => end,
            };
            match end {
                End::Natural => {}
                End::TooOld => {
                    self.stats.max_downstream_connection_duration().inc();
                    outcome.response_flags.push("DT");
                    outcome.closed.downstream_why = Some("max_connection_duration_reached");
                }
                End::Denied(why, flag) => {
                    info.termination_details = Some(why.into());
                    info.response_flag = flag.or(info.response_flag);
                }
            }
        }
        outcome.bytes_received = progress.forth.get();
        outcome.bytes_sent = progress.back.get();
        outcome.duration = info.accepted.elapsed();
        self.stats
            .downstream_cx_rx_bytes_total()
            .add(outcome.bytes_received);
        self.stats
            .downstream_cx_tx_bytes_total()
            .add(outcome.bytes_sent);
        self.stats
            .downstream_flow_control_paused_reading_total()
            .add(progress.paused.get());
        self.stats
            .downstream_flow_control_resumed_reading_total()
            .add(progress.resumed.get());
        drop(stream);
        log_connection(
            &self.logs,
            &info,
            Some(&outcome),
            "TcpConnectionEnd",
            worker,
        );
        self.report(&info, &outcome, &progress, &reported, true, worker);
        outcome
    }

    /// Closes a connection that a filter before refused: it is logged and reported as any other.
    pub(super) fn refuse(&self, connection: Connection, worker: &Worker) -> TcpOutcome {
        self.stats.downstream_cx_total().inc();
        let Connection { stream, info, .. } = connection;
        drop(stream);
        let outcome = TcpOutcome {
            duration: info.accepted.elapsed(),
            ..TcpOutcome::default()
        };
        log_connection(
            &self.logs,
            &info,
            Some(&outcome),
            "TcpConnectionEnd",
            worker,
        );
        let (progress, reported) = (Progress::default(), Reported::default());
        self.report(&info, &outcome, &progress, &reported, true, worker);
        outcome
    }

    /// Tells Istio's metrics what has happened since the last time.
    fn report(
        &self,
        info: &ConnectionInfo,
        outcome: &TcpOutcome,
        progress: &Progress,
        reported: &Reported,
        closed: bool,
        worker: &Worker,
    ) {
        let Some(istio) = &self.istio else { return };
        let (received, sent) = (progress.forth.get(), progress.back.get());
        let report = TcpReport {
            opened: !reported.opened.replace(true),
            closed,
            received: received - reported.received.replace(received),
            sent: sent - reported.sent.replace(sent),
        };
        istio.report(&exchange(info, Some(outcome), 0), report, worker);
    }

    async fn proxy(
        &self,
        (stream, info): (&mut Stream, &ConnectionInfo),
        progress: &Progress,
        reported: &Reported,
        outcome: &mut TcpOutcome,
        worker: &Rc<Worker>,
    ) {
        let sni = info.requested_server_name.as_ref();
        let (name, wanted) = match sni.filter(|_| self.sni_cluster) {
            Some(sni) => (sni.clone(), &self.plan.metadata_match),
            None => {
                let (name, wanted) = self.plan.target(worker.random.bits());
                (name.clone(), wanted)
            }
        };
        outcome.cluster_name = Some(name.clone());
        let Some(cluster) = worker.clusters.find(&name) else {
            self.stats.downstream_cx_no_route().inc();
            outcome.response_flags.push("NC");
            return;
        };
        outcome.cluster = Some(cluster.plan.clone());
        let connected = self.connect(&cluster, wanted, info, outcome).await;
        let (mut upstream, account) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                outcome.response_flags.push(error.response_flag());
                let reason = error.transport_failure_reason();
                outcome.upstream_failure = (!reason.is_empty()).then_some(reason);
                return;
            }
        };
        let established = account.established();
        outcome.upstream_local = established.local;
        outcome.established = Some(established);
        outcome.connections.push(established.id);
        let ready = established.secured.unwrap_or(established.connected);
        outcome.pool_ready = Some(ready.saturating_duration_since(established.begun));
        let waiting = cluster.stats().upstream_cx_tx_bytes_buffered().part();
        // There was no upstream before.
        let _ = progress.waiting[0].set(waiting);
        outcome.upstream_tls = upstream.session().cloned();
        outcome.upstream_peer = upstream.peer().cloned();
        if self.plan.flush_access_log_on_connected {
            let kind = "TcpUpstreamConnected";
            log_connection(&self.logs, info, Some(outcome), kind, worker);
        }
        let metrics = async {
            let Some(istio) = &self.istio else { return };
            loop {
                self.report(info, outcome, progress, reported, false, worker);
                sleep(istio.interval()).await;
            }
        };
        let lines = async {
            let interval = self.plan.access_log_flush_interval;
            let Some(interval) = interval.filter(|_| !self.logs.is_empty()) else {
                return;
            };
            loop {
                sleep(interval).await;
                let so_far = TcpOutcome {
                    bytes_received: progress.forth.get(),
                    bytes_sent: progress.back.get(),
                    ..outcome.clone()
                };
                log_connection(&self.logs, info, Some(&so_far), "TcpPeriodic", worker);
            }
        };
        let reports = async {
            tokio::join!(metrics, lines);
            std::future::pending::<()>().await
        };
        let host = outcome.host.clone();
        let copied = async {
            let failed = async {
                match &host {
                    Some(host) => cluster.host_failed(host).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = both_ways(&mut *stream, &mut upstream, progress, self.may_splice) => {
                    // Both have ended, so the upstream has said so itself.
                    ended.inspect(|()| account.ended(true))
                }
                () = failed => Ok(()),
            }
        };
        let ended: Option<Result<(), CopyError>> = tokio::select! {
            ended = copied => Some(ended),
            () = idle(progress, self.plan.idle_timeout) => None,
            () = reports => None,
        };
        let stats = cluster.stats();
        stats.upstream_cx_tx_bytes_total().add(progress.forth.get());
        stats.upstream_cx_rx_bytes_total().add(progress.back.get());
        match ended {
            None => {
                self.stats.idle_timeout().inc();
                outcome.closed = CloseTypes {
                    downstream: Some("Normal"),
                    downstream_why: Some("tcp_session_idle_timeout"),
                    upstream: Some("Normal"),
                    upstream_why: Some("tcp_session_idle_timeout"),
                };
            }
            Some(Ok(())) => {
                outcome.closed.downstream = Some("Normal");
                outcome.closed.upstream = Some("Normal");
            }
            // A reset on one side is passed on as a reset, so that the other does not take what it got for all.
            Some(Err(error @ CopyError::First(_))) => {
                tracing::debug!(reason = %error.reason(), "the client broke the connection");
                outcome.response_flags.push("DC");
                outcome.closed = CloseTypes {
                    downstream: Some("RemoteReset"),
                    upstream: Some("LocalReset"),
                    ..CloseTypes::default()
                };
                upstream.reset_on_close();
            }
            Some(Err(error @ CopyError::Second(_))) => {
                tracing::debug!(reason = %error.reason(), "the upstream broke the connection");
                outcome.response_flags.push("UC");
                outcome.closed = CloseTypes {
                    downstream: Some("LocalReset"),
                    upstream: Some("RemoteReset"),
                    ..CloseTypes::default()
                };
                account.ended(true);
                stream.reset_on_close();
            }
        }
    }

    /// Asks the upstream for a tunnel, where the configuration wants one.
    async fn tunnel(
        &self,
        stream: &mut Stream,
        cluster: &Cluster,
        info: &ConnectionInfo,
        outcome: &TcpOutcome,
    ) -> Result<(), UpstreamError> {
        let Some(plan) = &self.plan.tunneling else {
            return Ok(());
        };
        let exchange = exchange(info, Some(outcome), 0);
        let asked = tunnel::establish(plan, stream, &exchange);
        match timeout(cluster.plan.connect_timeout, asked).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(UpstreamError::Connect(error.to_string())),
            Err(_) => Err(UpstreamError::ConnectTimeout),
        }
    }

    /// How long a connection may last; drawn anew for each, so that they do not end together.
    fn longest(&self, worker: &Worker) -> Option<Duration> {
        let limit = self.plan.max_downstream_connection_duration?;
        Some(worker.random.jittered(limit, self.plan.max_duration_jitter))
    }

    async fn connect(
        &self,
        cluster: &Cluster,
        wanted: &MetadataMatch,
        info: &ConnectionInfo,
        outcome: &mut TcpOutcome,
    ) -> Result<(Stream, UpstreamAccount), UpstreamError> {
        let hash = match (self.plan.hash_source_ip, info.remote) {
            (true, Some(remote)) => Some(shared_hash(remote.ip().to_string().as_bytes())),
            _ => None,
        };
        let context = LbContext {
            hash,
            original_dst: info.original_dst(),
            downstream_connection: info.id,
            downstream: Some(info),
            source: info.source,
            metadata_match: wanted.as_deref(),
            ..LbContext::default()
        };
        let mut backoff = self.plan.backoff.map(|(base, cap)| Backoff::new(base, cap));
        loop {
            let host = cluster.choose(&context)?;
            outcome.host = Some(host.clone());
            outcome.attempts += 1;
            let error = match cluster.tcp(&host, &context).await {
                Ok((stream, account)) if self.plan.tunneling.is_none() => {
                    return Ok((stream, account));
                }
                Ok((mut stream, account)) => {
                    // Apart, since it is large, rare, and would be part of every connection.
                    let tunnel = Box::pin(self.tunnel(&mut stream, cluster, info, outcome));
                    match tunnel.await {
                        Ok(()) => return Ok((stream, account)),
                        Err(error) => error,
                    }
                }
                // A limit of our own: another host would not help.
                Err(error @ UpstreamError::Overflow(_)) => return Err(error),
                Err(error) => error,
            };
            if outcome.attempts >= self.plan.max_connect_attempts {
                cluster
                    .stats()
                    .upstream_cx_connect_attempts_exceeded()
                    .inc();
                outcome.response_flags.push("URX");
                return Err(error);
            }
            if let Some(backoff) = &mut backoff {
                sleep(backoff.next_wait()).await;
            }
        }
    }
}

/// The runtime key that keeps bytes from going through the kernel alone: `false` in a static layer.
const SPLICE: &str = "outrigger.tcp_proxy.splice";

/// Completes when nothing has passed for the timeout.
async fn idle(progress: &Progress, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    loop {
        let end = progress.last.get() + limit;
        if Instant::now() >= end {
            return;
        }
        sleep_until(end).await;
    }
}
