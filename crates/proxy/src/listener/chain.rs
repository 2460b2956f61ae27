//! A filter chain as one worker runs it.

use std::{cell::OnceCell, rc::Rc, sync::Arc, time::Duration};

use crate::{
    network::{NetworkChain, TcpOutcome},
    plan::{FilterChain, listener::DownstreamTransport},
    worker::{
        Worker,
        drain::{DrainStrategy, Drainer},
    },
};

use super::{connection::Connection, stats::ListenerStats};

/// A chain with its connections' drain; its filters come to life with its first connection.
#[derive(Debug)]
pub(crate) struct LiveChain {
    pub(crate) plan: Arc<FilterChain>,
    pub(crate) drainer: Drainer,
    network: OnceCell<NetworkChain>,
}

impl LiveChain {
    pub(crate) fn new(plan: Arc<FilterChain>) -> Self {
        Self {
            plan,
            drainer: Drainer::default(),
            network: OnceCell::new(),
        }
    }

    /// Serves a connection to its end.
    pub(crate) async fn serve(
        &self,
        connection: Connection,
        stats: &ListenerStats,
        worker: &Rc<Worker>,
    ) -> Option<TcpOutcome> {
        if let DownstreamTransport::Tls(_) = self.plan.transport_socket {
            stats
                .scope()
                .counter("server_ssl_socket_factory.downstream_context_secrets_not_ready")
                .inc();
            return None;
        }
        let network = self
            .network
            .get_or_init(|| NetworkChain::new(&self.plan.filters, worker));
        network.serve(connection, worker).await
    }

    /// Drains: connections learn of it now and are closed after the drain time.
    pub(crate) fn retire(self: Rc<Self>, over: Duration, strategy: DrainStrategy) {
        self.drainer.begin(over, strategy);
        tokio::task::spawn_local(async move {
            tokio::select! {
                () = self.drainer.released() => {}
                () = tokio::time::sleep(over) => self.drainer.close(),
            }
        });
    }
}
