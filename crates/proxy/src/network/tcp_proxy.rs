//! `envoy.filters.network.tcp_proxy`: bytes to a host of a cluster and back.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until};

use super::{
    copy::{CopyError, Progress, both_ways},
    exchange, log_connection,
};
use crate::{
    access_log::Logger,
    cluster::{Cluster, Host, LbContext, UpstreamAccount, UpstreamError, shared_hash},
    filter::{IstioTcpStats, TcpReport},
    io::Stream,
    listener::{Connection, ConnectionInfo},
    plan,
    worker::Worker,
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
        counter early_data_received_count_total,
        counter idle_timeout,
        counter max_downstream_connection_duration,
        counter upstream_flush_total,
        gauge downstream_cx_rx_bytes_buffered,
        gauge downstream_cx_tx_bytes_buffered,
        gauge upstream_flush_active,
    }
}

/// A TCP proxy as one worker runs it.
#[derive(Debug)]
pub(crate) struct TcpProxy {
    plan: Arc<plan::TcpProxy>,
    stats: TcpStats,
    istio: Option<IstioTcpStats>,
    logs: Vec<Logger>,
}

/// How a proxied connection went, for logs and metrics.
#[derive(Debug, Default)]
pub struct TcpOutcome {
    /// The cluster that was chosen, whether it exists or not.
    pub cluster_name: Option<Arc<str>>,
    /// The cluster.
    pub cluster: Option<Arc<plan::Cluster>>,
    /// The host that was chosen.
    pub host: Option<Arc<Host>>,
    /// Our address of the upstream connection.
    pub upstream_local: Option<std::net::SocketAddr>,
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
        worker: &Rc<Worker>,
    ) -> Self {
        let stats = TcpStats::new(worker.stats.scope(&format!("tcp.{}.", plan.stat_prefix)));
        Self {
            plan: plan.clone(),
            stats,
            istio,
            logs: Logger::all(&plan.access_logs, worker),
        }
    }

    /// Proxies a connection to its end.
    pub(super) async fn serve(
        &self,
        mut connection: Connection,
        worker: &Rc<Worker>,
    ) -> TcpOutcome {
        self.stats.downstream_cx_total().inc();
        let mut outcome = TcpOutcome::default();
        let limit = self.plan.max_downstream_connection_duration;
        let drain = connection.drain.clone();
        let progress = Progress::default();
        let reported = Reported::default();
        {
            let work = self.proxy(&mut connection, &progress, &reported, &mut outcome, worker);
            let over = async {
                match limit {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = work => {}
                () = drain.closed() => {}
                () = over => {
                    self.stats.max_downstream_connection_duration().inc();
                }
            }
        }
        outcome.bytes_received = progress.forth.get();
        outcome.bytes_sent = progress.back.get();
        outcome.duration = connection.info.accepted.elapsed();
        self.stats
            .downstream_cx_rx_bytes_total()
            .add(outcome.bytes_received);
        self.stats
            .downstream_cx_tx_bytes_total()
            .add(outcome.bytes_sent);
        let Connection { stream, info, .. } = connection;
        drop(stream);
        log_connection(&self.logs, &info, Some(&outcome), worker);
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
        connection: &mut Connection,
        progress: &Progress,
        reported: &Reported,
        outcome: &mut TcpOutcome,
        worker: &Rc<Worker>,
    ) {
        let name = self.plan.cluster.pick(worker.random.bits());
        outcome.cluster_name = Some(name.clone());
        let Some(cluster) = worker.clusters.find(name) else {
            self.stats.downstream_cx_no_route().inc();
            outcome.response_flags.push("NC");
            return;
        };
        outcome.cluster = Some(cluster.plan.clone());
        let connected = self.connect(&cluster, &connection.info, outcome).await;
        let (mut upstream, _account) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                outcome.response_flags.push(error.response_flag());
                let reason = error.transport_failure_reason();
                outcome.upstream_failure = (!reason.is_empty()).then_some(reason);
                return;
            }
        };
        outcome.upstream_local = upstream
            .as_tcp()
            .and_then(|stream| stream.local_addr().ok());
        if self.plan.flush_access_log_on_connected {
            log_connection(&self.logs, &connection.info, Some(outcome), worker);
        }
        let Connection { stream, info, .. } = &mut *connection;
        let reports = async {
            let Some(istio) = &self.istio else {
                return std::future::pending().await;
            };
            loop {
                self.report(info, outcome, progress, reported, false, worker);
                sleep(istio.interval()).await;
            }
        };
        let ended: Option<Result<(), CopyError>> = tokio::select! {
            ended = both_ways(stream, &mut upstream, progress) => Some(ended),
            () = idle(progress, self.plan.idle_timeout) => None,
            () = reports => None,
        };
        let stats = cluster.stats();
        stats.upstream_cx_tx_bytes_total().add(progress.forth.get());
        stats.upstream_cx_rx_bytes_total().add(progress.back.get());
        match ended {
            None => self.stats.idle_timeout().inc(),
            Some(Ok(())) => {}
            // A reset on one side is passed on as a reset, so that the other does not take what it got for all.
            Some(Err(error @ CopyError::First(_))) => {
                tracing::debug!(reason = %error.reason(), "the client broke the connection");
                outcome.response_flags.push("DC");
                upstream.reset_on_close();
            }
            Some(Err(error @ CopyError::Second(_))) => {
                tracing::debug!(reason = %error.reason(), "the upstream broke the connection");
                outcome.response_flags.push("UC");
                connection.stream.reset_on_close();
            }
        }
    }

    async fn connect(
        &self,
        cluster: &Cluster,
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
            ..LbContext::default()
        };
        let mut result = Err(UpstreamError::NoHealthyHost);
        for _ in 0..self.plan.max_connect_attempts.max(1) {
            let host = cluster.choose(&context)?;
            outcome.host = Some(host.clone());
            result = cluster.tcp(&host, &context).await;
            if result.is_ok() {
                return result;
            }
        }
        if self.plan.max_connect_attempts > 1 {
            cluster
                .stats()
                .upstream_cx_connect_attempts_exceeded()
                .inc();
        }
        result
    }
}

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
