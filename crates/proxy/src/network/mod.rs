//! Network filters: what is done with the bytes of a connection that has found its chain.
//!
//! A chain ends in one terminal filter: the HTTP connection manager (`http/`) or [`tcp_proxy`]. Before it come filters
//! that watch or extend the connection: Istio's metadata exchange, which does nothing without its ALPN, and Istio's
//! TCP metrics.

mod copy;
mod tcp_proxy;

use std::rc::Rc;

use crate::{
    access_log::Logger,
    filter::IstioTcpStats,
    http::{self, Exchange, Flags},
    listener::{Connection, ConnectionInfo},
    plan::{NetworkFilter, network::NetworkFilterConfig},
    worker::Worker,
};
pub use tcp_proxy::TcpOutcome;
use tcp_proxy::TcpProxy;

/// The network filters of a chain as one worker runs them.
#[derive(Debug)]
pub(crate) struct NetworkChain {
    terminal: Terminal,
}

#[derive(Debug)]
enum Terminal {
    Http(Rc<http::ConnectionManager>),
    Tcp(Box<TcpProxy>),
    /// No terminal filter: Envoy closes such a connection at once.
    Close,
}

impl NetworkChain {
    pub(crate) fn new(filters: &[NetworkFilter], worker: &Rc<Worker>) -> Self {
        let mut istio_stats = None;
        let mut terminal = Terminal::Close;
        for filter in filters {
            match &filter.config {
                NetworkFilterConfig::HttpConnectionManager(plan) => {
                    terminal = Terminal::Http(Rc::new(http::ConnectionManager::new(plan, worker)));
                }
                NetworkFilterConfig::TcpProxy(plan) => {
                    terminal =
                        Terminal::Tcp(Box::new(TcpProxy::new(plan, istio_stats.take(), worker)));
                }
                NetworkFilterConfig::IstioStats(plan) => {
                    istio_stats = Some(IstioTcpStats::new(plan.clone(), worker));
                }
                // The exchange happens only where ALPN chose `istio-peer-exchange`, which takes TLS.
                NetworkFilterConfig::MetadataExchange(_) => {}
            }
        }
        Self { terminal }
    }

    /// Serves a connection to its end; for TCP with what the listener's log says about it.
    pub(crate) async fn serve(
        &self,
        connection: Connection,
        worker: &Rc<Worker>,
    ) -> Option<TcpOutcome> {
        match &self.terminal {
            Terminal::Http(manager) => {
                manager.serve(connection, worker).await;
                None
            }
            Terminal::Tcp(proxy) => Some(proxy.serve(connection, worker).await),
            Terminal::Close => None,
        }
    }
}

/// Writes access log lines for a connection as a whole (TCP, or one that ended before its chain).
pub(crate) fn log_connection(
    logs: &[Logger],
    info: &ConnectionInfo,
    tcp: Option<&TcpOutcome>,
    worker: &Worker,
) {
    if logs.is_empty() {
        return;
    }
    let random = worker.random.bits();
    let exchange = exchange(info, tcp, random);
    logs.iter().for_each(|log| log.log(&exchange, random));
}

/// A connection in the form that logs and metrics take.
fn exchange<'c>(info: &'c ConnectionInfo, tcp: Option<&TcpOutcome>, random: u64) -> Exchange<'c> {
    let mut exchange = Exchange::of_connection(info, random);
    if let Some(tcp) = tcp {
        exchange.upstream.cluster_name = tcp.cluster_name.clone();
        exchange.upstream.cluster = tcp.cluster.clone();
        exchange.upstream.host = tcp.host.clone();
        exchange.upstream.local = tcp.upstream_local;
        exchange.upstream.failure = tcp.upstream_failure.clone().unwrap_or_default();
        exchange.progress.received = tcp.bytes_received;
        exchange.progress.sent = tcp.bytes_sent;
        for flag in tcp
            .response_flags
            .iter()
            .filter_map(|flag| Flags::from_short(flag))
        {
            exchange.flags.add(flag);
        }
    }
    exchange.progress.end = Some(std::time::Instant::now());
    exchange
}
