//! Network filters: what is done with the bytes of a connection that has found its chain.
//!
//! A chain ends in one terminal filter: the HTTP connection manager (`http/`), [`tcp_proxy`], or one of the two that
//! answer by themselves. Before it come filters that let a connection in or not ([`gate`]), and filters that watch or
//! extend it: Istio's metadata exchange, which does nothing without its ALPN, and Istio's TCP metrics.

mod copy;
mod ext_authz;
mod gate;
mod proxy_tlvs;
mod rate_limit;
mod rbac;
mod tcp_proxy;
mod tunnel;
mod upstream;

use std::{borrow::Cow, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    access_log::Logger,
    filter::{DOWNSTREAM_PEER, IstioTcpStats, UPSTREAM_PEER},
    filter_state,
    http::{self, Exchange, Flags},
    listener::{Connection, ConnectionInfo},
    plan::{
        NetworkFilter,
        filter_state::{ConnectionState, StateValue},
        network::NetworkFilterConfig,
    },
    transport,
    worker::Worker,
};
use ext_authz::NetworkExtAuthz;
use gate::Gate;
pub use gate::SharedLimits;
use rate_limit::NetworkRateLimit;
use rbac::NetworkRbac;
pub use tcp_proxy::TcpOutcome;
use tcp_proxy::TcpProxy;

/// The network filters of a chain as one worker runs them.
#[derive(Debug)]
pub(crate) struct NetworkChain {
    judges: Vec<Judge>,
    gates: Vec<Gate>,
    /// The ALPN under which workloads tell each other who they are.
    metadata_exchange: Option<Arc<str>>,
    /// Objects of filter state that the client's first bytes make, where no TCP proxy makes them in time. A request is
    /// such bytes, so they are made before it.
    on_data: Vec<StateValue>,
    terminal: Terminal,
}

/// Who says whether a connection may come in; asked in order.
#[derive(Debug)]
enum Judge {
    Rbac(NetworkRbac),
    Service(NetworkExtAuthz),
    /// Counts a connection when it begins, and never again.
    RateLimit(NetworkRateLimit),
    /// Says nothing, and leaves objects for those that follow.
    State(Arc<ConnectionState>),
}

#[derive(Debug)]
enum Terminal {
    Http(Rc<http::ConnectionManager>),
    Tcp(Box<TcpProxy>),
    /// Gives back what it gets.
    Echo,
    /// Says the same to everybody.
    DirectResponse(Bytes),
    /// No terminal filter: Envoy closes such a connection at once.
    Close,
}

impl NetworkChain {
    pub(crate) fn new(filters: &[NetworkFilter], worker: &Rc<Worker>) -> Self {
        let mut istio_stats = None;
        let mut sni_cluster = false;
        let mut metadata_exchange = None;
        let mut judges = Vec::new();
        let mut gates = Vec::new();
        let mut on_data = Vec::new();
        let mut terminal = Terminal::Close;
        for filter in filters {
            match &filter.config {
                NetworkFilterConfig::HttpConnectionManager(plan) => {
                    terminal = Terminal::Http(Rc::new(http::ConnectionManager::new(plan, worker)));
                }
                NetworkFilterConfig::TcpProxy(plan) => {
                    let proxy = TcpProxy::new(
                        plan,
                        istio_stats.take(),
                        sni_cluster,
                        on_data.drain(..).flatten().collect(),
                        worker,
                    );
                    terminal = Terminal::Tcp(Box::new(proxy));
                }
                NetworkFilterConfig::IstioStats(plan) => {
                    istio_stats = Some(IstioTcpStats::new(plan.clone(), worker));
                }
                NetworkFilterConfig::Rbac(prefix, plan) => {
                    judges.push(Judge::Rbac(NetworkRbac::new(prefix, plan, worker)));
                }
                NetworkFilterConfig::ExtAuthz(plan) => {
                    judges.push(Judge::Service(NetworkExtAuthz::new(plan, worker)));
                }
                NetworkFilterConfig::RateLimit(plan) => {
                    judges.push(Judge::RateLimit(NetworkRateLimit::new(plan, worker)));
                }
                NetworkFilterConfig::ConnectionLimit(plan) => {
                    gates.push(Gate::connection_limit(plan, worker));
                }
                NetworkFilterConfig::LocalRateLimit(plan) => {
                    gates.push(Gate::local_rate_limit(plan, worker));
                }
                NetworkFilterConfig::SetFilterState(plan) => {
                    on_data.push(plan.on_data.clone());
                    judges.push(Judge::State(plan.clone()));
                }
                NetworkFilterConfig::SniCluster => sni_cluster = true,
                NetworkFilterConfig::Echo => terminal = Terminal::Echo,
                NetworkFilterConfig::DirectResponse(bytes) => {
                    terminal = Terminal::DirectResponse(bytes.clone());
                }
                NetworkFilterConfig::MetadataExchange(plan) => {
                    metadata_exchange = Some(plan.protocol.clone());
                }
            }
        }
        Self {
            judges,
            gates,
            metadata_exchange,
            on_data: on_data.concat(),
            terminal,
        }
    }

    /// Serves a connection to its end; for TCP with what the listener's log says about it.
    pub(crate) async fn serve(
        &self,
        mut connection: Connection,
        worker: &Rc<Worker>,
    ) -> Option<TcpOutcome> {
        if let Err(refusal) = self.judge(&mut connection.info, false, worker).await {
            connection.info.termination_details = Some(refusal.why.into());
            if let Some(delay) = refusal.delay {
                // Nothing is read meanwhile: the client waits, and does not come back at once.
                let _ = tokio::time::timeout(delay, connection.drain.closed()).await;
            }
            return self.refuse(connection, worker);
        }
        let mut entered = Vec::new();
        for gate in &self.gates {
            match gate.enter() {
                Ok(guard) => entered.push(guard),
                Err(refusal) => {
                    refusal.wait().await;
                    return None;
                }
            }
        }
        if let Some(protocol) = &self.metadata_exchange
            && connection
                .info
                .tls
                .as_ref()
                .is_some_and(|session| session.alpn.as_ref() == Some(protocol))
        {
            let own = &worker.shared.peer_metadata;
            // In a box, since few connections do it and all would carry room for it.
            let exchanged = Box::pin(transport::exchange(&mut connection.stream, own)).await;
            match exchanged {
                Ok(peer) => connection.info.peer = peer.map(Arc::new),
                // The client is gone.
                Err(_) => return None,
            }
        }
        make_state(&self.on_data, &mut connection.info, worker);
        match &self.terminal {
            Terminal::Http(manager) => {
                // In a box: TCP connections should not carry room for it.
                Box::pin(manager.serve(connection, worker)).await;
                None
            }
            Terminal::Tcp(proxy) => Some(proxy.serve(connection, worker).await),
            Terminal::Echo => {
                echo(connection).await;
                None
            }
            Terminal::DirectResponse(bytes) => {
                direct_response(connection, bytes).await;
                None
            }
            Terminal::Close => None,
        }
    }
}

/// Why a connection may not come in.
pub(crate) struct Refusal {
    /// For `%CONNECTION_TERMINATION_DETAILS%`.
    pub(crate) why: Cow<'static, str>,
    /// How long it is kept before it is closed.
    delay: Option<Duration>,
}

impl NetworkChain {
    /// Lets a connection in, or not; what the judges leave for each other and for logs stands in `info`. `again`: it
    /// has been let in before, by another chain.
    pub(crate) async fn judge(
        &self,
        info: &mut ConnectionInfo,
        again: bool,
        worker: &Worker,
    ) -> Result<(), Refusal> {
        for judge in &self.judges {
            match judge {
                Judge::Rbac(rbac) => rbac.judge(info).map_err(|why| Refusal {
                    why,
                    delay: rbac.delay(),
                })?,
                Judge::State(plan) => make_state(&plan.on_begin, info, worker),
                // In a box, since few connections are asked about and all would carry room for it.
                Judge::Service(service) => {
                    let judged = Box::pin(service.judge(info, worker)).await;
                    if let Err(why) = judged {
                        info.response_flag = Some("UAEX");
                        let why = Cow::Borrowed(why);
                        return Err(Refusal { why, delay: None });
                    }
                }
                Judge::RateLimit(_) if again => {}
                Judge::RateLimit(limit) => {
                    let judged = Box::pin(limit.judge(info, worker)).await;
                    judged.map_err(|why| Refusal {
                        why: Cow::Borrowed(why),
                        delay: None,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// What serves requests, where the chain ends in a connection manager.
    pub(crate) fn http(&self) -> Option<&Rc<http::ConnectionManager>> {
        match &self.terminal {
            Terminal::Http(manager) => Some(manager),
            _ => None,
        }
    }

    /// Closes a connection that may not come in, and logs it.
    fn refuse(&self, connection: Connection, worker: &Rc<Worker>) -> Option<TcpOutcome> {
        match &self.terminal {
            Terminal::Tcp(proxy) => Some(proxy.refuse(connection, worker)),
            _ => None,
        }
    }
}

/// Makes a connection's objects of filter state, one after the other: a later one may be made of an earlier one.
fn make_state(values: &[StateValue], info: &mut ConnectionInfo, worker: &Worker) {
    for value in values {
        let text = filter_state::text(value, &exchange(info, None, worker.random.bits()));
        info.state.make(value, text);
    }
}

async fn echo(mut connection: Connection) {
    let drain = connection.drain.clone();
    let work = async {
        let mut buffer = [0; 4096];
        loop {
            match connection.stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    if connection.stream.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = drain.closed() => {}
    }
}

async fn direct_response(mut connection: Connection, bytes: &Bytes) {
    let drain = connection.drain.clone();
    let work = async {
        // A client that is gone misses the answer, which is its own affair.
        if connection.stream.write_all(bytes).await.is_ok() {
            let _ = connection.stream.shutdown().await;
        }
    };
    tokio::select! {
        () = work => {}
        () = drain.closed() => {}
    }
}

/// Writes access log lines for a connection as a whole (TCP, or one that ended before its chain). `log_type` is what
/// `%ACCESS_LOG_TYPE%` says.
pub(crate) fn log_connection(
    logs: &[Logger],
    info: &ConnectionInfo,
    tcp: Option<&TcpOutcome>,
    log_type: &'static str,
    worker: &Worker,
) {
    if logs.is_empty() {
        return;
    }
    let random = worker.random.bits();
    let mut exchange = exchange(info, tcp, random);
    exchange.log_type = log_type;
    logs.iter().for_each(|log| log.log(&exchange, random));
}

/// A connection in the form that logs and metrics take.
fn exchange<'c>(info: &'c ConnectionInfo, tcp: Option<&TcpOutcome>, random: u64) -> Exchange<'c> {
    let mut exchange = Exchange::of_connection(info, random);
    if let Some(peer) = &info.peer {
        exchange.set_state(DOWNSTREAM_PEER.into(), Value::clone(peer));
    }
    if let Some(tcp) = tcp {
        exchange.upstream.named = tcp.named.clone();
        exchange.upstream.cluster = tcp.cluster.clone();
        exchange.upstream.host = tcp.host.clone();
        exchange.upstream.tried = tcp.tried.clone();
        exchange.upstream.local = tcp.upstream_local;
        exchange.upstream.established = tcp.established;
        exchange.upstream.connections = tcp.connections.clone();
        exchange.upstream.pool_ready = tcp.pool_ready;
        exchange.upstream.closed = tcp.closed;
        exchange.upstream.tls = tcp.upstream_tls.clone();
        if let Some(peer) = &tcp.upstream_peer {
            exchange.set_state(UPSTREAM_PEER.into(), Value::clone(peer));
        }
        if let Some(told) = &tcp.tunnel {
            told.show(&mut exchange);
        }
        exchange.upstream.attempts = tcp.attempts;
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
