//! Opening a connection to a host.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::TcpSocket,
    time::{Instant, timeout},
};

use super::{
    error::UpstreamError,
    host::Host,
    shared::{HostShared, Permit},
    stats::ClusterStats,
};
use crate::{
    io::{Stream, connect_unix},
    plan::{
        Address, Cluster,
        cluster::{BindConfig, UpstreamTransport},
    },
    socket,
};

/// An established connection with everything that has to be counted when it ends.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) stream: Stream,
    pub(crate) account: Account,
}

/// What an open connection stands for in counts and limits; dropping it closes the books.
#[derive(Debug)]
pub(crate) struct Account {
    stats: Rc<ClusterStats>,
    host: Arc<HostShared>,
    since: Instant,
    _permit: Permit,
}

impl Account {
    /// Age of the connection.
    pub(crate) fn age(&self) -> std::time::Duration {
        self.since.elapsed()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.stats.upstream_cx_active().dec();
        self.stats.upstream_cx_destroy().inc();
        self.stats
            .upstream_cx_length_ms()
            .record(self.since.elapsed().as_millis() as u64);
        self.host.cx_active.fetch_sub(1, Relaxed);
    }
}

/// Connects to a host within the cluster's connect timeout. Its further addresses are tried when the first fails.
pub(crate) async fn connect(
    plan: &Cluster,
    host: &Host,
    stats: &Rc<ClusterStats>,
    permit: Permit,
) -> Result<Upstream, UpstreamError> {
    if let UpstreamTransport::Tls(_) = host.transport {
        stats
            .scope()
            .counter("client_ssl_socket_factory.upstream_context_secrets_not_ready")
            .inc();
        stats.upstream_cx_connect_fail().inc();
        return Err(UpstreamError::NoCertificate);
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
        _permit: permit,
    };
    let result = timeout(plan.connect_timeout, async {
        let mut result = one(plan, &host.address).await;
        for address in &host.additional_addresses {
            if result.is_ok() {
                break;
            }
            result = one(plan, address).await;
        }
        result
    })
    .await;
    match result {
        Ok(Ok(stream)) => {
            stats
                .upstream_cx_connect_ms()
                .record(since.elapsed().as_millis() as u64);
            Ok(Upstream { stream, account })
        }
        failed => {
            stats.upstream_cx_connect_fail().inc();
            host.shared.cx_connect_fail.fetch_add(1, Relaxed);
            match failed {
                Ok(Err(error)) => Err(UpstreamError::Connect(reason(&error))),
                _ => {
                    stats.upstream_cx_connect_timeout().inc();
                    Err(UpstreamError::ConnectTimeout)
                }
            }
        }
    }
}

async fn one(plan: &Cluster, address: &Address) -> io::Result<Stream> {
    match address {
        Address::Socket(address) => {
            tcp(plan.bind.as_ref(), plan.tcp_keepalive.as_ref(), *address).await
        }
        Address::Pipe { path, .. } => connect_unix(path).await,
        Address::Name { host, .. } => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{host} is not resolved"),
        )),
    }
}

async fn tcp(
    bind: Option<&BindConfig>,
    keepalive: Option<&crate::plan::cluster::TcpKeepalive>,
    address: SocketAddr,
) -> io::Result<Stream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_nodelay(true)?;
    if let Some((bind, source)) = bind.and_then(|bind| Some((bind, bind.source_for(address)?))) {
        let options = SockRef::from(&socket);
        if bind.freebind {
            match source {
                SocketAddr::V4(_) => options.set_freebind_v4(true)?,
                SocketAddr::V6(_) => options.set_freebind_v6(true)?,
            }
        }
        if source.port() == 0 {
            // The port is chosen at connect, by the whole four-tuple: else 28,000 connections would be the end.
            socket::bind_address_no_port(socket.as_fd())?;
        }
        socket.bind(source)?;
    }
    if let Some(options) = keepalive {
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
        SockRef::from(&socket).set_tcp_keepalive(&wanted)?;
    }
    socket.connect(address).await.map(Stream::from)
}

/// The system's words for an error, without Rust's ` (os error N)`: Envoy's texts have them like that.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
