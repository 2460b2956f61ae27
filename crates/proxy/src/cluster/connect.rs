//! Opening a connection to a host.

use std::{
    cell::Cell,
    hash::{BuildHasher, Hash, Hasher},
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use bytes::BytesMut;
use foldhash::fast::FixedState;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpSocket,
    time::{Instant, timeout},
};

use super::{
    LbContext,
    error::UpstreamError,
    host::Host,
    pool::Acquire,
    race::race,
    shared::{HostShared, Permit},
    stats::ClusterStats,
};
use crate::{
    io::{Ended, Stream, connect_unix},
    listener::{ConnectionInfo, UpstreamSource},
    plan::{
        Address, Cluster,
        cluster::{UpstreamProtocol, UpstreamTransport},
        proxy_protocol::ProxyProtocolTransport,
    },
    proxy_protocol::{Header, Tlv},
    socket,
    transport::{self, HandshakeError, Offer, Upstreams},
};

/// An established connection with everything that has to be counted when it ends.
#[derive(Debug)]
pub struct Upstream {
    pub(crate) stream: Stream,
    pub(crate) established: Established,
    pub(crate) account: Account,
}

/// How a connection came to be, for logs.
#[derive(Debug, Clone, Copy)]
pub struct Established {
    /// Unique in the process among connections to hosts.
    pub id: u64,
    /// Our address of it: asking the system for it with each request would be one call more.
    pub local: Option<SocketAddr>,
    /// When it was begun.
    pub begun: std::time::Instant,
    /// When TCP had connected.
    pub connected: std::time::Instant,
    /// When the handshake of TLS was over.
    pub secured: Option<std::time::Instant>,
}

/// The id of the next connection.
static NEXT: AtomicU64 = AtomicU64::new(1);

impl Upstream {
    /// Counts the bytes of a connection that carries HTTP.
    pub(super) fn counted(mut self) -> Self {
        let stats = &self.account.stats;
        self.stream.count(
            stats.upstream_cx_rx_bytes_total(),
            stats.upstream_cx_tx_bytes_total(),
            stats.upstream_cx_tx_bytes_buffered(),
        );
        self
    }
}

impl AsyncRead for Upstream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// What an open connection stands for in counts and limits; dropping it closes the books.
#[derive(Debug)]
pub(crate) struct Account {
    stats: Rc<ClusterStats>,
    host: Arc<HostShared>,
    since: Instant,
    ended: Cell<Ended>,
    _permit: Permit,
}

impl Account {
    /// Age of the connection.
    pub(crate) fn age(&self) -> std::time::Duration {
        self.since.elapsed()
    }

    /// Says how the connection has ended. Where nobody does, we have closed it at rest.
    pub(crate) fn ended(&self, ended: Ended) {
        self.ended.set(ended);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.stats.upstream_cx_active().dec();
        let (stats, Ended { remote, active }) = (&self.stats, self.ended.get());
        match remote {
            true => stats.upstream_cx_destroy_remote().inc(),
            false => stats.upstream_cx_destroy_local().inc(),
        }
        if active {
            stats.upstream_cx_destroy_with_active_rq().inc();
            match remote {
                true => stats.upstream_cx_destroy_remote_with_active_rq().inc(),
                false => stats.upstream_cx_destroy_local_with_active_rq().inc(),
            }
        }
        stats.upstream_cx_destroy().inc();
        stats
            .upstream_cx_length_ms()
            .record(self.since.elapsed().as_millis() as u64);
        self.host.cx_active.fetch_sub(1, Relaxed);
    }
}

/// Connects to a host within the cluster's connect timeout. Its further addresses are tried when the first fails or is slow.
pub(crate) async fn connect(with: Acquire<'_>, permit: Permit) -> Result<Upstream, UpstreamError> {
    let Acquire {
        plan, host, stats, ..
    } = with;
    let (transport, proxy) = host.transport.after_header();
    if let UpstreamTransport::Tls(tls) = transport
        && let Err(error) = with.tls.ready(tls, with.auto_name)
    {
        stats.upstream_cx_connect_fail().inc();
        return Err(error.into());
    }
    let since = Instant::now();
    stats.upstream_cx_total().inc();
    stats.upstream_cx_active().inc();
    host.shared.cx_total.fetch_add(1, Relaxed);
    host.shared.cx_active.fetch_add(1, Relaxed);
    let account = Account {
        stats: stats.clone(),
        host: host.shared.clone(),
        since,
        ended: Cell::default(),
        _permit: permit,
    };
    let mut connected = since;
    let result = timeout(plan.connect_timeout, async {
        let mut stream = match &host.additional_addresses[..] {
            [] => one(plan, with.source, &host.address, Some(stats)).await?,
            more => {
                let all = std::iter::once(&host.address).chain(more);
                race(all, |address| one(plan, with.source, address, Some(stats))).await?
            }
        };
        connected = Instant::now();
        if let Some(proxy) = proxy {
            let mut header = BytesMut::new();
            proxy_header(proxy, with.downstream).write_to(&mut header);
            stream.write_all(&header).await?;
        }
        match transport {
            UpstreamTransport::Tls(tls) => {
                let offer = Offer {
                    alpn: with.alpn,
                    http: plan.protocol == UpstreamProtocol::Alpn,
                    hostname: &host.hostname,
                    auto_name: with.auto_name,
                };
                // In a box: the many connections in clear should not carry room for it.
                let shake = Box::pin(with.tls.connect(tls, offer, stream));
                let mut stream = shake.await.map_err(Failed::Handshake)?;
                if let Some(exchange) = &plan.metadata_exchange
                    && let Some(session) = stream.session()
                    && session.alpn.as_ref() == Some(&exchange.protocol)
                {
                    let exchanged = Box::pin(transport::exchange(&mut stream, with.tls.own()));
                    if let Some(peer) = exchanged.await? {
                        stream.set_peer(peer);
                    }
                }
                Ok(stream)
            }
            _ => Ok(stream),
        }
    })
    .await;
    match result {
        Ok(Ok(stream)) => {
            let now = Instant::now();
            stats
                .upstream_cx_connect_ms()
                .record((now - since).as_millis() as u64);
            Ok(Upstream {
                established: Established {
                    id: NEXT.fetch_add(1, Relaxed),
                    local: stream.local_address(),
                    begun: since.into_std(),
                    connected: connected.into_std(),
                    secured: stream.session().map(|_| now.into_std()),
                },
                stream,
                account,
            })
        }
        failed => {
            stats.upstream_cx_connect_fail().inc();
            host.shared.cx_connect_fail.fetch_add(1, Relaxed);
            // At the end of the time it is us who give up.
            account.ended(Ended {
                remote: failed.is_ok(),
                active: false,
            });
            match failed {
                Ok(Err(Failed::Connect(error))) => Err(UpstreamError::Connect(reason(&error))),
                Ok(Err(Failed::Handshake(error))) => Err(error.into()),
                _ => {
                    stats.upstream_cx_connect_timeout().inc();
                    Err(UpstreamError::ConnectTimeout)
                }
            }
        }
    }
}

/// Which part failed.
enum Failed {
    Connect(io::Error),
    Handshake(HandshakeError),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Connect(error)
    }
}

impl From<HandshakeError> for UpstreamError {
    fn from(error: HandshakeError) -> Self {
        match error {
            HandshakeError::NotReady(secret) => Self::NoCertificate(secret),
            error => Self::Tls(error.to_string()),
        }
    }
}

/// The PROXY header of a connection: what is known of the one it is made for. A connection of our own has no addresses.
fn proxy_header(proxy: &ProxyProtocolTransport, downstream: Option<&ConnectionInfo>) -> Header {
    let kept = downstream.and_then(|info| info.proxy.as_ref());
    let passed = kept.iter().flat_map(|kept| &kept.tlvs);
    let added = |tlv: &Tlv| proxy.added.iter().any(|added| added.kind == tlv.kind);
    Header {
        version: proxy.version,
        addresses: downstream.and_then(|info| Some((info.remote?, info.local?))),
        tlvs: passed
            .filter(|tlv| proxy.pass_through.takes(tlv.kind) && !added(tlv))
            .chain(&proxy.added)
            .cloned()
            .collect(),
    }
}

/// What makes a connection to a host unfit for other requests to it: the source address, the header it began with,
/// the protocols that were offered, or the name that was asked for.
/// 0 for an ordinary one.
pub(super) fn variant(host: &Host, context: &LbContext<'_>) -> u64 {
    let (transport, proxy) = host.transport.after_header();
    let alpn = match transport {
        UpstreamTransport::Tls(_) => context.alpn,
        _ => None,
    };
    let name = match transport {
        UpstreamTransport::Tls(_) => context.auto_name,
        _ => None,
    };
    if proxy.is_none() && context.source.is_none() && alpn.is_none() && name.is_none() {
        return 0;
    }
    let mut hasher = FixedState::default().build_hasher();
    context.source.hash(&mut hasher);
    alpn.hash(&mut hasher);
    name.hash(&mut hasher);
    if let Some(proxy) = proxy {
        let header = proxy_header(proxy, context.downstream);
        (header.addresses, header.tlvs).hash(&mut hasher);
    }
    hasher.finish().max(1)
}

/// A connection that counts nowhere, for health checks. `alpn` replaces the protocols that the host's TLS offers.
pub(crate) async fn open(
    plan: &Cluster,
    (address, hostname): (&Address, &str),
    transport: &UpstreamTransport,
    tls: &Upstreams,
    alpn: Option<&[Arc<str>]>,
    http: bool,
) -> io::Result<Stream> {
    let (transport, proxy) = transport.after_header();
    let mut stream = one(plan, None, address, None).await?;
    if let Some(proxy) = proxy {
        let mut header = BytesMut::new();
        proxy_header(proxy, None).write_to(&mut header);
        stream.write_all(&header).await?;
    }
    match transport {
        UpstreamTransport::Tls(context) => {
            let offer = Offer {
                alpn,
                http,
                hostname,
                auto_name: None,
            };
            tls.connect(context, offer, stream)
                .await
                .map_err(|error| io::Error::other(error.to_string()))
        }
        _ => Ok(stream),
    }
}

async fn one(
    plan: &Cluster,
    source: Option<UpstreamSource>,
    address: &Address,
    stats: Option<&ClusterStats>,
) -> io::Result<Stream> {
    match address {
        Address::Socket(address) => {
            let bind_failed = || {
                if let Some(stats) = stats {
                    stats.bind_errors().inc();
                }
            };
            let socket = socket::upstream(plan.bind.as_ref(), source, *address, bind_failed)?;
            if let Some(options) = &plan.tcp_keepalive {
                keep_alive(&socket, options)?;
            }
            socket.connect(*address).await.map(Stream::from)
        }
        Address::Pipe { path, .. } => connect_unix(path).await,
        Address::Name { host, .. } => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{host} is not resolved"),
        )),
    }
}

fn keep_alive(socket: &TcpSocket, options: &crate::plan::cluster::TcpKeepalive) -> io::Result<()> {
    let mut wanted = TcpKeepalive::new();
    if let Some(time) = options.time {
        wanted = wanted.with_time(time);
    }
    if let Some(interval) = options.interval {
        wanted = wanted.with_interval(interval);
    }
    if let Some(probes) = options.probes {
        wanted = wanted.with_retries(probes);
    }
    SockRef::from(socket).set_tcp_keepalive(&wanted)
}

/// The system's words for an error, without Rust's ` (os error N)`: Envoy's texts have them like that.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
