//! A filter chain as one worker runs it.

use std::{cell::OnceCell, rc::Rc, sync::Arc, time::Duration};

use crate::{
    network::{NetworkChain, TcpOutcome},
    plan::{FilterChain, listener::DownstreamTransport},
    transport::Downstream,
    worker::{
        Worker,
        drain::{DrainStrategy, Drainer},
    },
};

use super::{connection::Connection, draining::Draining, stats::ListenerStats};

/// A chain with its connections' drain; its filters come to life with its first connection.
#[derive(Debug)]
pub(crate) struct LiveChain {
    pub(crate) plan: Arc<FilterChain>,
    pub(crate) drainer: Drainer,
    tls: OnceCell<Option<Downstream>>,
    network: OnceCell<NetworkChain>,
}

impl LiveChain {
    pub(crate) fn new(plan: Arc<FilterChain>) -> Self {
        Self {
            plan,
            drainer: Drainer::default(),
            tls: OnceCell::new(),
            network: OnceCell::new(),
        }
    }

    /// What terminates TLS, where the chain does.
    pub(crate) fn tls(&self, stats: &ListenerStats, worker: &Worker) -> Option<&Downstream> {
        let tls = self.tls.get_or_init(|| match &self.plan.transport_socket {
            DownstreamTransport::Tls(plan) => Some(Downstream::new(
                plan.clone(),
                worker.shared.secrets.clone(),
                stats.scope(),
            )),
            DownstreamTransport::RawBuffer => None,
        });
        tls.as_ref()
    }

    /// Serves a connection to its end.
    pub(crate) async fn serve(
        &self,
        connection: Connection,
        worker: &Rc<Worker>,
    ) -> Option<TcpOutcome> {
        self.network(worker).serve(connection, worker).await
    }

    /// Its filters.
    pub(crate) fn network(&self, worker: &Rc<Worker>) -> &NetworkChain {
        self.network
            .get_or_init(|| NetworkChain::new(&self.plan.filters, worker))
    }

    /// Drains: connections learn of it now and are closed after the drain time. `counted` is held as long.
    pub(crate) fn retire(
        self: Rc<Self>,
        over: Duration,
        strategy: DrainStrategy,
        counted: Rc<Draining>,
    ) {
        self.drainer.begin(over, strategy);
        tokio::task::spawn_local(async move {
            let _counted = counted;
            tokio::select! {
                () = self.drainer.released() => {}
                () = tokio::time::sleep(over) => self.drainer.close(),
            }
        });
    }
}
