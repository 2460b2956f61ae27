//! The two transports.

use std::{
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::{LocalSet, spawn_local},
    time::timeout,
};
use tracing::{error, warn};

use super::{Dns, Options, cannot_listen, upstream::Upstream, wire};
use crate::AgentError;

/// Both transports of one address.
pub(super) struct Sockets {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
}

/// Binds every address; IPv6 is left out where the pod has none.
pub(super) fn bind(
    addresses: &[SocketAddr],
) -> Result<(Vec<Sockets>, Vec<SocketAddr>), AgentError> {
    let (mut out, mut bound) = (Vec::new(), Vec::new());
    for at in addresses {
        match both(*at) {
            Ok(sockets) => {
                bound.extend(sockets.udp.local_addr());
                out.push(sockets);
            }
            Err(e) if at.is_ipv6() && e.kind() == io::ErrorKind::AddrNotAvailable => {}
            Err(e) => return Err(cannot_listen(at)(e)),
        }
    }
    Ok((out, bound))
}

/// Both transports on one port.
fn both(at: SocketAddr) -> io::Result<Sockets> {
    // Ports that the system chose and that are taken for UDP; held, so that it chooses others.
    let mut unfit = Vec::new();
    let (tcp, udp) = loop {
        let tcp = std::net::TcpListener::bind(at)?;
        match std::net::UdpSocket::bind(tcp.local_addr()?) {
            Ok(udp) => break (tcp, udp),
            Err(e)
                if at.port() == 0
                    && e.kind() == io::ErrorKind::AddrInUse
                    && unfit.len() < CHOICES =>
            {
                unfit.push(tcp);
            }
            Err(e) => return Err(e),
        }
    };
    tcp.set_nonblocking(true)?;
    udp.set_nonblocking(true)?;
    widen(&udp);
    Ok(Sockets { udp, tcp })
}

/// Makes room for bursts; the system may give less.
pub(super) fn widen(socket: &std::net::UdpSocket) {
    use nix::sys::socket::{setsockopt, sockopt};
    let _ = setsockopt(socket, sockopt::RcvBuf, &(4 << 20));
}

/// Serves until the process ends.
pub(super) fn run(sockets: Vec<Sockets>, dns: Arc<Dns>, options: Options) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime needs only an epoll instance");
    let upstream = Rc::new(Upstream::new(&options, dns.clone()));
    let waiting = Arc::new(Semaphore::new(WAITING));
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let mut tasks = Vec::new();
        for Sockets { udp, tcp } in sockets {
            let shared = (dns.clone(), upstream.clone(), waiting.clone());
            tasks.push(spawn_local(over_udp(udp, shared.clone())));
            tasks.push(spawn_local(over_tcp(tcp, shared)));
        }
        for task in tasks {
            if let Ok(Err(e)) = task.await {
                error!("DNS: {e}");
            }
        }
    });
}

type Shared = (Arc<Dns>, Rc<Upstream>, Arc<Semaphore>);

async fn over_udp(socket: std::net::UdpSocket, shared: Shared) -> io::Result<()> {
    let socket = Rc::new(UdpSocket::from_std(socket)?);
    let (dns, upstream, waiting) = shared;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // An error belongs to an earlier answer that could not be delivered.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let query = &buffer[..length];
        dns.figures.requests.fetch_add(1, Ordering::Relaxed);
        let limit = match wire::reply(dns.table().as_deref(), query, false) {
            wire::Reply::Nothing => continue,
            wire::Reply::Answer(answer) => {
                // A client that has gone needs none.
                let _ = socket.send_to(&answer, client).await;
                continue;
            }
            wire::Reply::Forward { limit } => limit,
        };
        let Ok(permit) = waiting.clone().try_acquire_owned() else {
            let _ = socket
                .send_to(&wire::error(query, ResponseCode::ServFail), client)
                .await;
            continue;
        };
        let query: Rc<[u8]> = query.into();
        let (socket, upstream) = (socket.clone(), upstream.clone());
        spawn_local(async move {
            let answer = match upstream.ask(query.clone(), false).await {
                Some(answer) => wire::relay(answer, &query, limit),
                None => wire::error(&query, ResponseCode::ServFail),
            };
            let _ = socket.send_to(&answer, client).await;
            drop(permit);
        });
    }
}

async fn over_tcp(listener: std::net::TcpListener, shared: Shared) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = connections.clone().acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // No descriptor is free: better in a moment.
                warn!("DNS over TCP: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let shared = shared.clone();
        spawn_local(async move {
            // A client that breaks off is its own business.
            let _ = connection(stream, &shared).await;
            drop(permit);
        });
    }
}

async fn connection(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let (dns, upstream, _) = shared;
    loop {
        let length = timeout(SILENCE, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(length)];
        timeout(SILENCE, stream.read_exact(&mut query)).await??;
        dns.figures.requests.fetch_add(1, Ordering::Relaxed);
        let answer = match wire::reply(dns.table().as_deref(), &query, true) {
            wire::Reply::Nothing => return Ok(()),
            wire::Reply::Answer(answer) => answer,
            wire::Reply::Forward { limit } => {
                let query: Rc<[u8]> = query.into();
                match upstream.ask(query.clone(), true).await {
                    Some(answer) => wire::relay(answer, &query, limit),
                    None => wire::error(&query, ResponseCode::ServFail),
                }
            }
        };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let packet = [&length.to_be_bytes()[..], &answer].concat();
        timeout(SILENCE, stream.write_all(&packet)).await??;
    }
}

/// Queries that may wait for resolvers at once; about a kilobyte each.
const WAITING: usize = 1 << 15;
/// Ports that are tried where the system chooses one for both transports.
const CHOICES: usize = 16;
/// Connections at once.
const CONNECTIONS: usize = 256;
/// How long a connection may be silent (RFC 7766 speaks of seconds).
const SILENCE: Duration = Duration::from_secs(10);
