//! Accepting connections and bringing them to their chain.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::pin,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use bytes::BytesMut;
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    sync::watch,
    task::{AbortHandle, spawn_local},
    time::timeout,
};

use super::{
    LiveListener, Slot,
    connection::{Connection, ConnectionInfo},
    filters::{self, FilterEnd},
};
use crate::{
    access_log::Logger,
    cluster::shared::Permit,
    filter_state::FilterState,
    io::Stream,
    network::log_connection,
    plan::{
        listener::ListenerFilterKind,
        overload::{Action, ShedPoint},
    },
    transport::HandshakeError,
    worker::{Worker, moment},
};

/// A listening socket on its way to a worker.
#[derive(Debug)]
pub(crate) enum ListenSocket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// Accepts on a socket until it is aborted or the listener is gone.
pub(super) fn spawn(socket: ListenSocket, slot: Weak<Slot>, worker: Rc<Worker>) -> AbortHandle {
    spawn_local(async move {
        let result = match socket {
            ListenSocket::Tcp(socket) => match TcpListener::from_std(socket) {
                Ok(socket) => accept_tcp(socket, slot, worker).await,
                Err(error) => Err(error),
            },
            ListenSocket::Unix(socket) => match UnixListener::from_std(socket) {
                Ok(socket) => accept_unix(socket, slot, worker).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = result {
            tracing::error!(%error, "a listening socket cannot be used any more");
        }
    })
    .abort_handle()
}

async fn accept_tcp(socket: TcpListener, slot: Weak<Slot>, worker: Rc<Worker>) -> io::Result<()> {
    let mut pace = Pace::new(&worker);
    loop {
        let accepted = pace.next(&slot, |cx| socket.poll_accept(cx)).await;
        let Some(slot) = slot.upgrade() else {
            return Ok(());
        };
        let listener = slot.current();
        match accepted {
            Ok((stream, peer)) => {
                let stream = if listener.plan.exact_balance {
                    worker.hand_over(&listener.plan.name, stream, peer)
                } else {
                    Some(stream)
                };
                if let Some(stream) = stream {
                    accepted_tcp(stream, peer, listener.clone(), &worker);
                }
            }
            Err(error) => pause_after(&error, &listener).await?,
        }
        pace.rest(listener).await;
    }
}

async fn accept_unix(socket: UnixListener, slot: Weak<Slot>, worker: Rc<Worker>) -> io::Result<()> {
    let mut pace = Pace::new(&worker);
    loop {
        let accepted = pace.next(&slot, |cx| socket.poll_accept(cx)).await;
        let Some(slot) = slot.upgrade() else {
            return Ok(());
        };
        let listener = slot.current();
        match accepted {
            Ok((stream, _)) => begin(stream.into(), None, None, listener.clone(), &worker),
            Err(error) => pause_after(&error, &listener).await?,
        }
        pace.rest(listener).await;
    }
}

/// How fast a listener accepts: not at all under overload that says so, and so many connections at once.
struct Pace {
    /// Only where the configuration has such an action.
    accepting: Option<watch::Receiver<bool>>,
    /// Accepted since nothing was waiting.
    at_once: u32,
}

impl Pace {
    fn new(worker: &Worker) -> Self {
        let may_stop = worker.bootstrap.overload.as_ref().is_some_and(|plan| {
            let stops = |(action, _): &(Action, _)| *action == Action::StopAcceptingConnections;
            plan.actions.iter().any(stops)
        });
        Self {
            accepting: may_stop.then(|| worker.shared.overload.accepting()),
            at_once: 0,
        }
    }

    /// The next connection.
    async fn next<T>(
        &mut self,
        slot: &Weak<Slot>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        let at_once = &mut self.at_once;
        let accept = poll_fn(|cx| {
            let accepted = poll(cx);
            if accepted.is_ready() {
                *at_once += 1;
            } else if *at_once > 0 {
                if let Some(slot) = slot.upgrade() {
                    told(&slot.current(), *at_once);
                }
                *at_once = 0;
            }
            accepted
        });
        let Some(accepting) = &mut self.accepting else {
            return accept.await;
        };
        let mut accept = pin!(accept);
        loop {
            // The sender lives as long as the process.
            let _ = accepting.wait_for(|accepting| *accepting).await;
            tokio::select! {
                biased;
                _ = accepting.wait_for(|accepting| !*accepting) => {}
                accepted = &mut accept => return accepted,
            }
        }
    }

    /// Lets the connections have a turn once the listener has accepted as many at once as it should.
    async fn rest(&mut self, listener: Rc<LiveListener>) {
        let limit = listener.plan.max_connections_per_event;
        if limit.is_some_and(|limit| self.at_once >= limit) {
            told(&listener, self.at_once);
            drop(listener);
            self.at_once = 0;
            tokio::task::yield_now().await;
        }
    }
}

/// Counts how many connections one wake-up of the listening socket has brought.
fn told(listener: &LiveListener, at_once: u32) {
    let stats = &listener.stats;
    stats
        .connections_accepted_per_socket_event()
        .record(at_once.into());
}

/// A connection that another worker accepted for this one.
pub(crate) fn handed_over(
    name: &str,
    stream: std::net::TcpStream,
    peer: SocketAddr,
    worker: &Rc<Worker>,
) {
    // The listener may have gone while the connection was on its way: it is closed as if it had come later.
    if let Some(slot) = worker.listeners.find(name)
        && let Ok(stream) = TcpStream::from_std(stream)
    {
        accepted_tcp(stream, peer, slot.current(), worker);
    }
}

fn accepted_tcp(
    stream: TcpStream,
    peer: SocketAddr,
    listener: Rc<LiveListener>,
    worker: &Rc<Worker>,
) {
    // TCP_NODELAY comes from the listening socket.
    let local = match listener.plan.only_destination() {
        Some(address) => Some(address),
        None => stream.local_addr().ok().map(unmapped),
    };
    begin(stream.into(), Some(unmapped(peer)), local, listener, worker);
}

fn begin(
    stream: Stream,
    remote: Option<SocketAddr>,
    local: Option<SocketAddr>,
    listener: Rc<LiveListener>,
    worker: &Rc<Worker>,
) {
    let Some(open) = Open::new(&listener, worker) else {
        return;
    };
    let info = Box::new(ConnectionInfo {
        id: worker.shared.next_connection.fetch_add(1, Relaxed),
        accepted: Instant::now(),
        accepted_at: SystemTime::now(),
        direct_remote: remote,
        remote,
        local,
        local_restored: false,
        requested_server_name: None,
        transport_protocol: "",
        application_protocols: Vec::new(),
        listener: listener.plan.clone(),
        chain: None,
        response_flag: None,
        tls: None,
        secured: None,
        xfcc: Default::default(),
        peer: None,
        transport_failure: None,
        source: None,
        proxy: None,
        metadata: None,
        state: FilterState::default(),
        termination_details: None,
    });
    let worker = worker.clone();
    spawn_local(async move {
        let _open = open;
        let mut serving = pin!(serve(stream, info, listener, &worker));
        poll_fn(|cx| moment::turn(|| serving.as_mut().poll(cx))).await;
    });
}

/// The whole life of a connection on its worker.
async fn serve(
    mut stream: Stream,
    mut info: Box<ConnectionInfo>,
    mut listener: Rc<LiveListener>,
    worker: &Rc<Worker>,
) {
    let mut handed_over_from = None;
    let chain = loop {
        if !inspect(&mut stream, &mut info, &listener, worker).await {
            return ended_early(&listener.logs, &info, worker);
        }
        // One hand-off at most, and only where the address was really restored.
        if listener.plan.use_original_dst
            && handed_over_from.is_none()
            && info.local_restored
            && let Some(target) = info
                .local
                .and_then(|local| worker.listeners.for_destination(local))
            && !Rc::ptr_eq(&target, &listener)
        {
            info.listener = target.plan.clone();
            info.transport_protocol = "";
            handed_over_from = Some(Open::count(&target));
            listener = target;
            continue;
        }
        let protocols: Vec<&str> = info
            .application_protocols
            .iter()
            .map(|name| &**name)
            .collect();
        let found = listener.plan.find_chain(&info.to_match(&protocols));
        match found.and_then(|plan| listener.chains.get(&(Arc::as_ptr(plan) as usize))) {
            Some(chain) => break chain.clone(),
            None => {
                listener.stats.no_filter_chain_match().inc();
                info.response_flag = Some("NR");
                return ended_early(&listener.logs, &info, worker);
            }
        }
    };
    info.chain = Some(chain.plan.clone());
    let drain = chain.drainer.drain();
    let (stats, logs) = (listener.stats.clone(), listener.logs.clone());
    // The listener may change while the connection lives; only its chain, its counts and its logs are kept.
    drop(listener);
    if let Some(tls) = chain.tls(&stats, worker) {
        let limit = chain.plan.transport_socket_connect_timeout;
        // In a box: connections in clear should not carry room for it.
        let shake = Box::pin(tls.accept(stream, limit));
        let shaken = tokio::select! {
            shaken = shake => shaken,
            () = drain.over(FIRST_WORDS) => return ended_early(&logs, &info, worker),
        };
        match shaken {
            Ok(encrypted) => {
                info.tls = encrypted.session().cloned();
                info.secured = Some(Instant::now());
                stream = encrypted;
            }
            Err(error) => {
                if error == HandshakeError::Timeout {
                    stats.downstream_cx_transport_socket_connect_timeout().inc();
                }
                tls.tell(&error, info.remote);
                info.transport_failure = Some(error.to_string().into());
                return ended_early(&logs, &info, worker);
            }
        }
    }
    let logged = (!logs.is_empty()).then(|| info.clone());
    let connection = Connection {
        stream,
        info,
        drain,
    };
    let outcome = chain.serve(connection, worker).await;
    if let Some(info) = logged {
        log_connection(&logs, &info, outcome.as_ref(), LISTENER_LOG, worker);
    }
}

/// Runs the listener filters within their time; says whether the connection goes on.
async fn inspect(
    stream: &mut Stream,
    info: &mut ConnectionInfo,
    listener: &LiveListener,
    worker: &Rc<Worker>,
) -> bool {
    let plan = &listener.plan;
    let restores = plan
        .listener_filters
        .iter()
        .any(|filter| filter.kind == ListenerFilterKind::OriginalDst);
    if plan.use_original_dst && !restores {
        // Envoy adds the filter by itself then.
        filters::restore_original_dst(stream, info);
    }
    if plan.listener_filters.is_empty() {
        info.transport_protocol = "raw_buffer";
        return true;
    }
    let mut peeked = BytesMut::new();
    listener.stats.downstream_pre_cx_active().inc();
    let run = filters::run(
        &plan.listener_filters,
        stream,
        info,
        &mut peeked,
        &worker.stats,
    );
    let run = async {
        match plan.listener_filters_timeout {
            None => Some(run.await),
            Some(limit) => timeout(limit, run).await.ok(),
        }
    };
    let ending = worker.listeners.ending();
    let result = tokio::select! {
        biased;
        result = run => Some(result),
        () = ending.over(FIRST_WORDS) => None,
    };
    listener.stats.downstream_pre_cx_active().dec();
    filters::put_back(stream, peeked);
    let Some(result) = result else { return false };
    match result {
        Some(Ok(())) => true,
        Some(Err(FilterEnd::RemoteClose)) => {
            listener
                .stats
                .downstream_listener_filter_remote_close()
                .inc();
            false
        }
        Some(Err(FilterEnd::Refused)) => {
            listener.stats.downstream_listener_filter_error().inc();
            false
        }
        None => {
            listener.stats.downstream_pre_cx_timeout().inc();
            if info.transport_protocol.is_empty() {
                info.transport_protocol = "raw_buffer";
            }
            plan.continue_on_listener_filters_timeout
        }
    }
}

/// A connection that ended before its chain is logged by the listener alone.
fn ended_early(logs: &[Logger], info: &ConnectionInfo, worker: &Worker) {
    log_connection(logs, info, None, LISTENER_LOG, worker);
}

/// Counts a connection while it lives.
#[derive(Debug)]
struct Open {
    listener: Rc<LiveListener>,
    worker: Rc<Worker>,
    since: Instant,
    counted: bool,
    _own: Option<Permit>,
}

impl Open {
    /// `None` where the listener or the process has as many connections as it may, or is overloaded; counts why.
    fn new(listener: &Rc<LiveListener>, worker: &Rc<Worker>) -> Option<Self> {
        let (plan, stats, shared) = (&listener.plan, &listener.stats, &worker.shared);
        if !plan.bypass_overload_manager
            && (shared
                .overload
                .applies(Action::RejectIncomingConnections, &worker.random)
                || shared.overload.sheds(ShedPoint::TcpListenerAccept, worker))
        {
            stats.downstream_cx_overload_reject().inc();
            return None;
        }
        let own = match &listener.limit {
            None => None,
            Some((limit, open)) => match Permit::acquire(open, *limit) {
                None => {
                    stats.downstream_cx_overflow().inc();
                    return None;
                }
                permit => permit,
            },
        };
        let counted = !plan.ignore_global_connection_limit;
        let tally = &shared.downstream_connections;
        if counted && !tally.acquire(shared.max_downstream_connections) {
            stats.downstream_global_cx_overflow().inc();
            return None;
        }
        shared.workers[worker.index].fetch_add(1, Relaxed);
        opened(listener);
        Some(Self {
            listener: listener.clone(),
            worker: worker.clone(),
            since: Instant::now(),
            counted,
            _own: own,
        })
    }

    /// A connection that was handed over counts for its second listener as well.
    fn count(listener: &Rc<LiveListener>) -> Handed {
        opened(listener);
        Handed {
            listener: listener.clone(),
            since: Instant::now(),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.counted {
            self.worker.shared.downstream_connections.release();
        }
        self.worker.shared.workers[self.worker.index].fetch_sub(1, Relaxed);
        closed(&self.listener, self.since);
    }
}

/// A connection that came from another listener.
struct Handed {
    listener: Rc<LiveListener>,
    since: Instant,
}

impl Drop for Handed {
    fn drop(&mut self) {
        closed(&self.listener, self.since);
    }
}

fn opened(listener: &LiveListener) {
    listener.stats.downstream_cx_total().inc();
    listener.stats.downstream_cx_active().inc();
    listener.own_stats.downstream_cx_total().inc();
    listener.own_stats.downstream_cx_active().inc();
}

fn closed(listener: &LiveListener, since: Instant) {
    listener.own_stats.downstream_cx_active().dec();
    listener.stats.downstream_cx_active().dec();
    listener.stats.downstream_cx_destroy().inc();
    listener
        .stats
        .downstream_cx_length_ms()
        .record(since.elapsed().as_millis() as u64);
}

/// After a failed accept: waits where descriptors or memory ran out, so that what is open can go on and end.
async fn pause_after(error: &io::Error, listener: &LiveListener) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
            listener.stats.downstream_cx_overload_reject().inc();
            tracing::warn!(listener = &*listener.plan.name, %error, "cannot accept connections for now");
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(())
        }
        // The listening socket itself is broken.
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK) => Err(io::Error::from_raw_os_error(
            error.raw_os_error().unwrap_or(libc::EBADF),
        )),
        // The connection went away before it was accepted (accept(2) passes on its network errors).
        _ => Ok(()),
    }
}

/// How long a client that has said too little to know its chain is waited for when the process ends: as long as a
/// connection manager waits by default.
const FIRST_WORDS: Duration = Duration::from_secs(5);

/// What `%ACCESS_LOG_TYPE%` says in a listener's log.
const LISTENER_LOG: &str = "NotSet";

/// A v4 client of a v6 socket is a v4 client.
fn unmapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}
