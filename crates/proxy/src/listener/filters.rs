//! Listener filters: what the first bytes and the kernel tell about a connection.
//!
//! Bytes are read into a buffer and put back before the chain gets the stream. A filter that is switched off for the
//! connection's port is passed over, which is what lets protocols in which the server speaks first through.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use crate::{
    io::Stream,
    plan::listener::{ListenerFilter, ListenerFilterKind},
};

use super::{
    connection::{ConnectionInfo, UpstreamSource},
    http_inspector, proxy_protocol,
};

stats::group! {
    /// What the inspectors count, for the whole process.
    pub(crate) struct TlsInspectorStats {
        counter client_hello_too_large,
        counter connection_closed,
        counter tls_found,
        counter tls_not_found,
        counter alpn_found,
        counter alpn_not_found,
        counter sni_found,
        counter sni_not_found,
    }
}

stats::group! {
    /// What the inspectors count, for the whole process.
    pub(crate) struct HttpInspectorStats {
        counter http10_found,
        counter http11_found,
        counter http2_found,
        counter http_not_found,
        counter read_error,
    }
}

/// Why a connection ends among the listener filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FilterEnd {
    /// The client closed it.
    RemoteClose,
    /// A filter refused it.
    Refused,
}

/// Runs the filters in order. Whatever happens, the caller has to put `peeked` back before the stream goes on.
///
/// Can be dropped at any time (the timeout does): what was read is in `peeked`.
pub(crate) async fn run(
    filters: &[ListenerFilter],
    stream: &mut Stream,
    info: &mut ConnectionInfo,
    peeked: &mut BytesMut,
    stats: &stats::Stats,
) -> Result<(), FilterEnd> {
    for filter in filters {
        let port = info.local.map(|local| local.port());
        if filter
            .disabled
            .as_ref()
            .is_some_and(|disabled| disabled.matches(port))
        {
            continue;
        }
        match &filter.kind {
            ListenerFilterKind::OriginalDst => restore_original_dst(stream, info),
            ListenerFilterKind::TlsInspector { .. } => {
                inspect_tls(stream, info, peeked, stats).await?
            }
            ListenerFilterKind::HttpInspector => inspect_http(stream, info, peeked, stats).await?,
            ListenerFilterKind::OriginalSrc { bind_port, mark } => {
                info.source = info.remote.map(|client| UpstreamSource {
                    address: match bind_port {
                        true => client,
                        false => SocketAddr::new(client.ip(), 0),
                    },
                    mark: *mark,
                });
            }
            ListenerFilterKind::ProxyProtocol(plan) => {
                proxy_protocol::read(plan, stream, info, peeked, stats).await?;
            }
        }
    }
    if info.transport_protocol.is_empty() {
        info.transport_protocol = "raw_buffer";
    }
    Ok(())
}

/// Puts what was peeked back.
pub(crate) fn put_back(stream: &mut Stream, peeked: BytesMut) {
    if !peeked.is_empty() {
        // A copy of the right size: the peek buffer is larger than what most clients send first.
        stream.put_back(Bytes::copy_from_slice(&peeked));
    }
}

/// Asks the kernel for the destination before the redirect (SO_ORIGINAL_DST). A connection that was not redirected keeps
/// its address. With TPROXY the local address is the original one already.
pub(crate) fn restore_original_dst(stream: &Stream, info: &mut ConnectionInfo) {
    if info.local_restored {
        return;
    }
    let (Some(stream), Some(local)) = (stream.as_tcp(), info.local) else {
        return;
    };
    let socket = socket2::SockRef::from(stream);
    let original = match local {
        // A v4 client of a v6 socket is asked for as v4.
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_none() => socket.original_dst_v6(),
        _ => socket.original_dst_v4(),
    };
    match original.ok().and_then(|address| address.as_socket()) {
        Some(original) => {
            info.local_restored = true;
            info.local = Some(original);
        }
        // Steered here by TPROXY: no translation, so the kernel knows none, and the local address is what the client
        // meant.
        None if info.listener.transparent => info.local_restored = true,
        None => {}
    }
}

async fn inspect_tls(
    stream: &mut Stream,
    info: &mut ConnectionInfo,
    peeked: &mut BytesMut,
    stats: &stats::Stats,
) -> Result<(), FilterEnd> {
    use tls::client_hello::{Peek, peek};
    let stats = TlsInspectorStats::new(stats.scope("tls_inspector."));
    loop {
        match peek(peeked) {
            Peek::More => more(stream, peeked).await.inspect_err(|_| {
                stats.connection_closed().inc();
            })?,
            Peek::NotTls => {
                stats.tls_not_found().inc();
                return Ok(());
            }
            Peek::TooLong => {
                stats.client_hello_too_large().inc();
                return Err(FilterEnd::Refused);
            }
            Peek::Hello(hello) => {
                stats.tls_found().inc();
                info.transport_protocol = "tls";
                match &hello.server_name {
                    Some(_) => stats.sni_found().inc(),
                    None => stats.sni_not_found().inc(),
                }
                if hello.application_protocols.is_empty() {
                    stats.alpn_not_found().inc();
                } else {
                    stats.alpn_found().inc();
                }
                info.requested_server_name = hello.server_name.map(Into::into);
                info.application_protocols = hello
                    .application_protocols
                    .into_iter()
                    .map(Into::into)
                    .collect();
                return Ok(());
            }
        }
    }
}

async fn inspect_http(
    stream: &mut Stream,
    info: &mut ConnectionInfo,
    peeked: &mut BytesMut,
    stats: &stats::Stats,
) -> Result<(), FilterEnd> {
    use http_inspector::Peek;
    if info.transport_protocol == "tls" {
        return Ok(());
    }
    let stats = HttpInspectorStats::new(stats.scope("http_inspector."));
    loop {
        let found = http_inspector::peek(peeked);
        match found {
            Peek::More => {
                more(stream, peeked)
                    .await
                    .inspect_err(|_| stats.read_error().inc())?;
                continue;
            }
            Peek::NotHttp => stats.http_not_found().inc(),
            Peek::Http10 => stats.http10_found().inc(),
            Peek::Http11 => stats.http11_found().inc(),
            Peek::Http2 => stats.http2_found().inc(),
        }
        info.application_protocols
            .extend(found.protocol().map(Into::into));
        return Ok(());
    }
}

pub(super) async fn more(stream: &mut Stream, peeked: &mut BytesMut) -> Result<(), FilterEnd> {
    peeked.reserve(READ_SIZE);
    match stream.read_buf(peeked).await {
        Ok(0) | Err(_) => Err(FilterEnd::RemoteClose),
        Ok(_) => Ok(()),
    }
}

const READ_SIZE: usize = 1024;
