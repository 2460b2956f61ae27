//! `envoy.filters.network.tcp_proxy`: bytes to a host of a cluster and back.

use std::{borrow::Cow, cell::Cell, pin::pin, rc::Rc, sync::Arc, time::Duration};

use base::backoff::Backoff;
use bytes::Bytes;
use serde_json::Value;
use smallvec::SmallVec;
use tls::session::Session;
use tokio::{
    io::AsyncReadExt,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    copy::{Copied, CopyError, Progress, both_ways},
    exchange, log_connection, make_state, proxy_tlvs,
    tunnel::{self, Told},
    upstream::{Connected, Holder, Upstream},
};
use crate::{
    access_log::Logger,
    cluster::{Cluster, Established, Host, LbContext, LocalPlan, UpstreamError, shared_hash},
    filter::{IstioTcpStats, TcpReport},
    filter_state,
    http::CloseTypes,
    io::Stream,
    listener::{Connection, ConnectionInfo, LiveChain},
    plan::{
        self, FilterChain,
        filter_state::{ObjectKind, StateValue},
        network::{ConnectionHash, NetworkFilterConfig, TcpClusters, Tunneling},
        route::MetadataMatch,
    },
    transport::AutoName,
    worker::{Worker, drain::Drain},
};

stats::group! {
    /// `tcp.PREFIX.`
    struct TcpStats {
        counter downstream_cx_drain_close,
        counter downstream_cx_no_route,
        counter downstream_cx_rx_bytes_total,
        counter downstream_cx_total,
        counter downstream_cx_tx_bytes_total,
        counter downstream_flow_control_paused_reading_total,
        counter downstream_flow_control_resumed_reading_total,
        counter early_data_received_count_total,
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
    /// Objects of filter state that the client's first bytes make.
    on_data: Vec<StateValue>,
    may_splice: bool,
}

/// Why a connection ended.
enum End {
    /// A peer or the configuration ended it.
    Natural,
    TooOld,
    /// The client has said nothing for too long.
    Idle,
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
                let answer = chain.network(worker).judge(&mut again, true, worker).await;
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
    /// Its name, where it is not the cluster's: there is none, or the named one is an aggregate.
    pub named: Option<Arc<str>>,
    /// The cluster that was chosen.
    pub cluster: Option<LocalPlan>,
    /// The host that was chosen.
    pub host: Option<Arc<Host>>,
    /// Connections tried.
    pub attempts: u32,
    /// Their hosts.
    pub(crate) tried: SmallVec<[Arc<Host>; 2]>,
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
    /// What is known of the tunnel that the last attempt asked for.
    pub(super) tunnel: Option<Rc<Told>>,
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
        on_data: Vec<StateValue>,
        worker: &Rc<Worker>,
    ) -> Self {
        let stats = TcpStats::new(worker.stats.scope(&format!("tcp.{}.", plan.stat_prefix)));
        Self {
            plan: plan.clone(),
            stats,
            istio,
            logs: Logger::all(&plan.access_logs, worker),
            sni_cluster,
            on_data,
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
        let target = self.target(&info, worker);
        let idle_limit = info.state.idle_timeout().or(self.plan.idle_timeout);
        let mut over = pin!(async {
            match limit {
                Some(limit) => sleep(limit).await,
                None => std::future::pending().await,
            }
        });
        let mut end = None;
        if self.plan.connects_with_data {
            // In a box: the many that connect at once should not carry room for it.
            end = Box::pin(async {
                tokio::select! {
                    early = first_words(&mut stream, &progress, idle_limit) => early,
                    () = over.as_mut() => Some(End::TooOld),
                    end = drained(&drain, &info, worker) => Some(end),
                }
            })
            .await;
            if end.is_none() {
                self.stats.early_data_received_count_total().inc();
                make_state(&self.on_data, &mut info, worker);
            }
        }
        if end.is_none() {
            let work = self.proxy(
                (&mut stream, &info, &drain),
                target,
                &progress,
                &reported,
                &mut outcome,
                worker,
            );
            end = Some(tokio::select! {
                () = work => End::Natural,
                () = over => End::TooOld,
                end = drained(&drain, &info, worker) => end,
            });
        }
        match end {
            None | Some(End::Natural) => {}
            Some(End::Idle) => {
                self.stats.idle_timeout().inc();
                outcome.closed.downstream = Some("Normal");
                outcome.closed.downstream_why = Some("tcp_session_idle_timeout");
            }
            Some(End::TooOld) => {
                self.stats.max_downstream_connection_duration().inc();
                outcome.response_flags.push("DT");
                outcome.closed.downstream_why = Some("max_connection_duration_reached");
            }
            Some(End::Denied(why, flag)) => {
                info.termination_details = Some(why.into());
                info.response_flag = flag.or(info.response_flag);
            }
        }
        if !self.plan.connects_with_data && progress.forth.get() > 0 {
            make_state(&self.on_data, &mut info, worker);
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

    /// The cluster that a connection goes to, and what its hosts' metadata must hold.
    fn target(&self, info: &ConnectionInfo, worker: &Worker) -> (Arc<str>, &MetadataMatch) {
        let sni = info.requested_server_name.as_ref();
        if let Some(sni) = sni.filter(|_| self.sni_cluster) {
            return (sni.clone(), &self.plan.metadata_match);
        }
        if let TcpClusters::Cluster(_) = &self.plan.cluster
            && let Some(named) = info.state.well_known(ObjectKind::TcpCluster)
        {
            let named = named.as_str().unwrap_or_default();
            return (named.into(), &self.plan.metadata_match);
        }
        let (name, wanted) = self.plan.target(worker.random.bits());
        (name.clone(), wanted)
    }

    async fn proxy(
        &self,
        (stream, info, drain): (&mut Stream, &ConnectionInfo, &Drain),
        (name, wanted): (Arc<str>, &MetadataMatch),
        progress: &Progress,
        reported: &Reported,
        outcome: &mut TcpOutcome,
        worker: &Rc<Worker>,
    ) {
        let Some(cluster) = worker.clusters.find(&name) else {
            outcome.named = Some(name);
            self.stats.downstream_cx_no_route().inc();
            outcome.response_flags.push("NC");
            return;
        };
        outcome.named = (name != cluster.plan.name).then_some(name);
        outcome.cluster = Some(cluster.plan.clone());
        let connected = self.connect(&cluster, wanted, info, outcome, worker).await;
        let Connected {
            stream: mut upstream,
            holder,
            _request,
        } = match connected {
            Ok(connected) => connected,
            Err(error) => {
                outcome.response_flags.push(error.response_flag());
                let reason = error.transport_failure_reason();
                outcome.upstream_failure = (!reason.is_empty()).then_some(reason);
                return;
            }
        };
        let established = holder.established();
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
                let mut info = Cow::Borrowed(info);
                if !self.on_data.is_empty() && so_far.bytes_received > 0 {
                    make_state(&self.on_data, info.to_mut(), worker);
                }
                log_connection(&self.logs, &info, Some(&so_far), "TcpPeriodic", worker);
            }
        };
        let reports = async {
            tokio::join!(metrics, lines);
            std::future::pending::<()>().await
        };
        let stops = || {
            self.plan.check_drain_close && drain.has_moved() && drain.should_close(&worker.random)
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
                ended = both_ways(&mut *stream, &mut upstream, progress, self.may_splice, stops) => {
                    // Where both have ended the upstream has said so itself.
                    ended.inspect(|how| holder.ended(*how == Copied::Whole))
                }
                () = failed => Ok(Copied::Whole),
            }
        };
        let ended: Option<Result<Copied, CopyError>> = tokio::select! {
            ended = copied => Some(ended),
            () = idle(progress, info.state.idle_timeout().or(self.plan.idle_timeout)) => None,
            () = reports => None,
        };
        let stats = cluster.stats();
        if let Holder::Own(_) = &holder {
            stats.upstream_cx_tx_bytes_total().add(progress.forth.get());
            stats.upstream_cx_rx_bytes_total().add(progress.back.get());
        }
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
            Some(Ok(how)) => {
                if how == Copied::Stopped {
                    self.stats.downstream_cx_drain_close().inc();
                }
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
                holder.ended(true);
                stream.reset_on_close();
            }
        }
    }

    /// The tunnel that the configuration wants for a connection.
    fn tunneling(&self, info: &ConnectionInfo) -> Option<&Tunneling> {
        let disabled = info.state.well_known(ObjectKind::DisableTunneling);
        let plan = self.plan.tunneling.as_ref();
        plan.filter(|_| disabled != Some(&Value::Bool(true)))
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
        worker: &Worker,
    ) -> Result<Connected, UpstreamError> {
        let hash = match &self.plan.hash {
            Some(ConnectionHash::SourceIp) => info
                .remote
                .map(|remote| shared_hash(remote.ip().to_string().as_bytes())),
            Some(ConnectionHash::FilterState(key)) => {
                let object = info.state.hashable(key).and_then(Value::as_str);
                object.map(|text| shared_hash(text.as_bytes()))
            }
            None => None,
        };
        let named = |kind| info.state.well_known(kind).and_then(Value::as_str);
        let protocols = info.state.well_known(ObjectKind::ApplicationProtocols);
        let protocols = protocols.and_then(filter_state::protocols);
        let told = proxy_tlvs::with(&self.plan.proxy_tlvs, info);
        let context = LbContext {
            hash,
            original_dst: match named(ObjectKind::OriginalDst) {
                Some(address) => address.parse().ok(),
                None => info.original_dst(),
            },
            alpn: protocols.as_deref(),
            auto_name: named(ObjectKind::UpstreamServerName).map(|name| AutoName {
                name,
                checked: false,
            }),
            downstream_connection: info.id,
            downstream: Some(told.as_deref().unwrap_or(info)),
            source: info.source,
            metadata_match: wanted.as_deref(),
            ..LbContext::default()
        };
        let mut backoff = self.plan.backoff.map(|(base, cap)| Backoff::new(base, cap));
        loop {
            let host = cluster.choose(&context)?;
            outcome.host = Some(host.clone());
            outcome.tried.push(host.clone());
            outcome.attempts += 1;
            let connected = match self.tunneling(info) {
                None => {
                    let connected = cluster.tcp(&host, &context).await;
                    connected.map(|(stream, account, request)| Connected {
                        stream: Upstream::Plain(stream),
                        holder: Holder::Own(account),
                        _request: request,
                    })
                }
                Some(plan) => {
                    let with = (&host, &context);
                    let opened = tunnel::open(plan, cluster, with, info, outcome, worker);
                    // Apart, since it is large, rare, and would be part of every connection.
                    Box::pin(opened).await
                }
            };
            let error = match connected {
                Ok(connected) => return Ok(connected),
                // A limit of our own: another host would not help.
                Err(error @ UpstreamError::Overflow(_)) => return Err(error),
                Err(error) => error,
            };
            if outcome.attempts >= self.plan.max_connect_attempts {
                cluster
                    .stats()
                    .upstream_cx_connect_attempts_exceeded()
                    .inc();
                // The flags are listed as they are set: here the last failure comes first.
                outcome
                    .response_flags
                    .extend([error.response_flag(), "URX"]);
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

/// Waits for what the client says first, and gives it back to the stream. `None` once it is there.
async fn first_words(
    stream: &mut Stream,
    progress: &Progress,
    idle_limit: Option<Duration>,
) -> Option<End> {
    let mut buffer = [0; FIRST_WORDS];
    tokio::select! {
        read = stream.read(&mut buffer) => match read {
            // Nothing can come any more.
            Ok(0) | Err(_) => Some(End::Natural),
            Ok(read) => {
                stream.put_back(Bytes::copy_from_slice(&buffer[..read]));
                None
            }
        },
        () = idle(progress, idle_limit) => Some(End::Idle),
    }
}

/// What is read of a client's first words; the rest waits in the socket.
const FIRST_WORDS: usize = 4096;

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
