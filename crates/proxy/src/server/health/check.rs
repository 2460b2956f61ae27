//! One check of one host: HTTP, TCP or gRPC, over a connection that may be kept for the next.

use std::{io, sync::Arc};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, Response,
    body::Incoming,
    client::conn::{http1, http2},
    header::{HeaderName, HeaderValue},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::{AbortHandle, spawn_local},
};

use crate::{
    cluster::{
        Host,
        health::{CheckResult, FailureKind},
        open,
    },
    io::Stream,
    plan::{
        Address, Cluster,
        cluster::UpstreamTransport,
        header::AppendAction,
        health_check::{Checker, GrpcCheck, HealthCheck, HttpCheck, TcpCheck},
    },
    proxy_protocol::{Header, Version},
    transport::Upstreams,
};

/// Asks one host, and keeps its connection.
#[derive(Debug)]
pub(super) struct Asker {
    tls: Upstreams,
    kept: Kept,
}

/// The connection that is kept, of whichever kind.
#[derive(Debug, Default)]
struct Kept {
    tcp: Option<Stream>,
    http1: Option<Http1>,
    http2: Option<Http2>,
}

type Http1 = (http1::SendRequest<Full<Bytes>>, Driver);
type Http2 = (http2::SendRequest<Full<Bytes>>, Driver);

/// The task that moves the bytes of an HTTP connection; it ends with this.
#[derive(Debug)]
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Anything but an answer.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] hyper::http::Error),
}

impl Asker {
    /// An asker without connection; `tls` is what connections that want TLS are made with.
    pub(super) fn new(tls: Upstreams) -> Self {
        Self {
            tls,
            kept: Kept::default(),
        }
    }

    /// Gives the connection up.
    pub(super) fn reset(&mut self) {
        self.kept = Kept::default();
    }

    /// One check. Can be dropped at any time; the connection must then be given up with it.
    pub(super) async fn ask(
        &mut self,
        plan: &Cluster,
        host: &Host,
        check: &HealthCheck,
    ) -> CheckResult {
        let on = On { plan, host, check };
        let asked = match &check.checker {
            Checker::Tcp(tcp) => self.tcp(on, tcp).await,
            Checker::Http(http) => self.http(on, http).await,
            Checker::Grpc(grpc) => self.grpc(on, grpc).await,
        };
        let result = asked.unwrap_or_else(|error| {
            tracing::debug!(
                cluster = &*plan.name,
                host = %host.address,
                %error,
                "health check failed"
            );
            self.reset();
            failed(FailureKind::Network)
        });
        if !check.reuse_connection {
            self.reset();
        }
        result
    }

    async fn tcp(&mut self, on: On<'_>, check: &TcpCheck) -> Result<CheckResult, Broken> {
        let kept = self.kept.tcp.take();
        let stream = match kept.and_then(|mut stream| stream.is_quiet().then_some(stream)) {
            Some(stream) => stream,
            None => {
                let mut stream = on.open(&self.tls).await?;
                if let Some(version) = check.proxy {
                    stream.write_all(&on.proxy_header(version, &stream)).await?;
                }
                stream
            }
        };
        let stream = self.kept.tcp.insert(stream);
        stream.write_all(&check.send).await?;
        if check.receive.is_empty() {
            // A connection was the question: the next check needs a new one.
            self.reset();
            return Ok(PASSED);
        }
        let mut received = BytesMut::new();
        while !matches_in_order(&received, &check.receive) {
            if received.len() >= MAX_RECEIVED || stream.read_buf(&mut received).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
        Ok(PASSED)
    }

    async fn http(&mut self, on: On<'_>, check: &HttpCheck) -> Result<CheckResult, Broken> {
        let (authority, scheme) = (on.authority(&check.host), on.scheme());
        let http2 = self.speaks_http2(on, check).await?;
        let mut request = match http2 {
            true => Request::builder().uri(format!("{scheme}://{authority}{}", check.path)),
            false => Request::builder()
                .uri(&*check.path)
                .header("host", &*authority),
        }
        .method(&*check.method)
        .header("user-agent", "Envoy/HC")
        .header("x-forwarded-proto", scheme)
        .body(Full::new(Bytes::copy_from_slice(&check.send)))?;
        edit(
            request.headers_mut(),
            &check.headers_to_add,
            &check.headers_to_remove,
        )?;
        let response = match http2 {
            true => self.http2(on).await?.send_request(request).await?,
            false => self.http1(on).await?.send_request(request).await?,
        };
        let (head, body) = response.into_parts();
        let limit = match check.response_buffer_size {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let wanted = if check.receive.is_empty() { 0 } else { limit };
        let (body, whole) = read_up_to(body, wanted).await?;
        if !whole {
            // The rest of the body stands between this answer and the next.
            self.reset();
        }
        let status = head.status.as_u16();
        let within = |ranges: &[std::ops::RangeInclusive<u16>]| {
            ranges.iter().any(|range| range.contains(&status))
        };
        if !within(&check.expected_statuses) {
            return Ok(CheckResult::Failed {
                kind: FailureKind::Active,
                retriable: within(&check.retriable_statuses),
            });
        }
        if !matches_in_order(&body, &check.receive) {
            return Ok(failed(FailureKind::Active));
        }
        if let Some(matcher) = &check.service_name {
            let name = head.headers.get("x-envoy-upstream-healthchecked-cluster");
            if !name.is_some_and(|name| matcher.matches(name.as_bytes())) {
                return Ok(failed(FailureKind::Active));
            }
        }
        Ok(CheckResult::Passed {
            degraded: head.headers.contains_key("x-envoy-degraded"),
        })
    }

    async fn grpc(&mut self, on: On<'_>, check: &GrpcCheck) -> Result<CheckResult, Broken> {
        let (authority, scheme) = (on.authority(&check.authority), on.scheme());
        let mut message = BytesMut::new();
        let name = check.service_name.as_bytes();
        if !name.is_empty() {
            // grpc.health.v1.HealthCheckRequest: field 1, a string.
            message.put_u8(0x0a);
            prost::encoding::encode_varint(name.len() as u64, &mut message);
            message.put_slice(name);
        }
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(message.len() as u32);
        frame.put_slice(&message);
        let mut request = Request::post(format!(
            "{scheme}://{authority}/grpc.health.v1.Health/Check"
        ))
        .header("user-agent", "Envoy/HC")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(frame.freeze()))?;
        let metadata: Vec<_> = check
            .initial_metadata
            .iter()
            .map(|(name, value)| {
                let action = AppendAction::AppendIfExistsOrAdd;
                (name.clone(), value.clone(), action)
            })
            .collect();
        edit(request.headers_mut(), &metadata, &[])?;
        let response = self.http2(on).await?.send_request(request).await?;
        Ok(match is_serving(response).await? {
            true => PASSED,
            false => failed(FailureKind::Active),
        })
    }

    /// Whether a check goes out as HTTP/2; a connection is made where ALPN has to say so.
    async fn speaks_http2(&mut self, on: On<'_>, check: &HttpCheck) -> Result<bool, Broken> {
        if !check.http2_by_alpn {
            return Ok(check.http2);
        }
        let open = (
            matches!(&self.kept.http1, Some(kept) if !kept.0.is_closed()),
            matches!(&self.kept.http2, Some(kept) if !kept.0.is_closed()),
        );
        if open.0 || open.1 {
            return Ok(open.1);
        }
        self.reset();
        let stream = on.open(&self.tls).await?;
        let agreed = stream.session().and_then(|session| session.alpn.clone());
        let http2 = match agreed.as_deref() {
            Some("h2") => true,
            Some("http/1.1") => false,
            _ => check.http2,
        };
        match http2 {
            true => self.kept.http2 = Some(begin_http2(stream).await?),
            false => self.kept.http1 = Some(begin_http1(stream).await?),
        }
        Ok(http2)
    }

    async fn http1(&mut self, on: On<'_>) -> Result<&mut http1::SendRequest<Full<Bytes>>, Broken> {
        let kept = self.kept.http1.take();
        let kept = match kept.filter(|kept| !kept.0.is_closed()) {
            Some(kept) => kept,
            None => begin_http1(on.open(&self.tls).await?).await?,
        };
        let sender = &mut self.kept.http1.insert(kept).0;
        sender.ready().await?;
        Ok(sender)
    }

    async fn http2(&mut self, on: On<'_>) -> Result<&mut http2::SendRequest<Full<Bytes>>, Broken> {
        let kept = self.kept.http2.take();
        let kept = match kept.filter(|kept| !kept.0.is_closed()) {
            Some(kept) => kept,
            None => begin_http2(on.open(&self.tls).await?).await?,
        };
        let sender = &mut self.kept.http2.insert(kept).0;
        sender.ready().await?;
        Ok(sender)
    }
}

/// Whom one check asks.
#[derive(Clone, Copy)]
struct On<'a> {
    plan: &'a Cluster,
    host: &'a Host,
    check: &'a HealthCheck,
}

impl On<'_> {
    async fn open(&self, tls: &Upstreams) -> io::Result<Stream> {
        let alpn = &self.check.alpn_protocols;
        let alpn = (!alpn.is_empty()).then_some(&**alpn);
        let by_alpn = matches!(&self.check.checker, Checker::Http(http) if http.http2_by_alpn);
        let target = (&self.target(), &*self.host.hostname);
        open(self.plan, target, self.transport(), tls, alpn, by_alpn).await
    }

    /// What connections are wrapped in.
    fn transport(&self) -> &UpstreamTransport {
        match &self.check.transport_match {
            Some(metadata) => self.plan.transport_for(metadata),
            None => &self.host.transport,
        }
    }

    /// Where the host is checked.
    fn target(&self) -> Address {
        let Some(own) = &self.host.health_check else {
            return self.host.address.clone();
        };
        match (own.address.as_ref().unwrap_or(&self.host.address), own.port) {
            (Address::Socket(address), Some(port)) => {
                Address::Socket(std::net::SocketAddr::new(address.ip(), port))
            }
            (address, _) => address.clone(),
        }
    }

    /// What a check calls the host: as configured, else the host's own name for checks, else the cluster's name.
    fn authority(&self, configured: &Arc<str>) -> Arc<str> {
        let own = self.host.health_check.as_ref().map(|own| &own.hostname);
        let mut given = [Some(configured), own].into_iter().flatten();
        given
            .find(|name| !name.is_empty())
            .unwrap_or(&self.plan.name)
            .clone()
    }

    /// What comes first on a connection to a host that wants to know whose it is: it is our own.
    fn proxy_header(&self, version: Version, stream: &Stream) -> BytesMut {
        let addresses = match version {
            Version::V1 => stream.local_address().zip(self.target().socket()),
            // LOCAL.
            Version::V2 => None,
        };
        let tlvs = Vec::new();
        let header = Header {
            version,
            addresses,
            tlvs,
        };
        let mut bytes = BytesMut::new();
        header.write_to(&mut bytes);
        bytes
    }

    fn scheme(&self) -> &'static str {
        match self.transport().after_header().0 {
            UpstreamTransport::Tls(_) => "https",
            _ => "http",
        }
    }
}

/// Whether the answer says `SERVING`, with status OK at its end.
async fn is_serving(response: Response<Incoming>) -> Result<bool, Broken> {
    let (head, mut body) = response.into_parts();
    let mut data = BytesMut::new();
    let mut status = head.headers.get("grpc-status").cloned();
    while let Some(frame) = body.frame().await {
        let frame = frame?;
        match frame.into_data() {
            Ok(bytes) if data.len() + bytes.len() <= MAX_RECEIVED => data.put_slice(&bytes),
            Ok(_) => return Ok(false),
            Err(frame) => {
                let trailers = frame.into_trailers().ok();
                status = trailers
                    .and_then(|t| t.get("grpc-status").cloned())
                    .or(status);
            }
        }
    }
    let ok = status.is_some_and(|status| status.as_bytes() == b"0");
    Ok(head.status.as_u16() == 200 && ok && serving_status(data.freeze()) == Some(SERVING))
}

/// The status in a frame with a `grpc.health.v1.HealthCheckResponse`.
fn serving_status(mut frame: Bytes) -> Option<u64> {
    use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
    if frame.try_get_u8().ok()? != 0 {
        return None;
    }
    let length = frame.try_get_u32().ok()? as usize;
    if length > frame.len() {
        return None;
    }
    let mut message = frame.split_to(length);
    let mut status = 0;
    while message.has_remaining() {
        match decode_key(&mut message).ok()? {
            (1, WireType::Varint) => status = decode_varint(&mut message).ok()?,
            (tag, wire) => {
                skip_field(wire, tag, &mut message, DecodeContext::default()).ok()?;
            }
        }
    }
    Some(status)
}

async fn begin_http1(stream: Stream) -> Result<Http1, Broken> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    Ok((sender, drive(connection)))
}

async fn begin_http2(stream: Stream) -> Result<Http2, Broken> {
    let (executor, stream) = (TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = http2::handshake(executor, stream).await?;
    Ok((sender, drive(connection)))
}

fn drive<E: std::fmt::Display>(
    connection: impl Future<Output = Result<(), E>> + 'static,
) -> Driver {
    // Whoever asks sees the error, too.
    let task = spawn_local(async move { drop(connection.await) });
    Driver(task.abort_handle())
}

/// The first bytes of a body, and whether that was all; a short rest that is not wanted is read and thrown away.
async fn read_up_to(mut body: Incoming, limit: usize) -> Result<(BytesMut, bool), Broken> {
    let (mut kept, mut seen) = (BytesMut::new(), 0);
    while let Some(frame) = body.frame().await {
        let Ok(bytes) = frame?.into_data() else {
            continue;
        };
        seen += bytes.len();
        kept.put_slice(&bytes[..bytes.len().min(limit - kept.len())]);
        if seen > limit.saturating_add(MAX_RECEIVED) {
            return Ok((kept, false));
        }
    }
    Ok((kept, true))
}

/// Whether every part comes in the bytes, one after the other, with anything in between.
fn matches_in_order(mut bytes: &[u8], parts: &[Arc<[u8]>]) -> bool {
    parts
        .iter()
        .all(|part| match memchr::memmem::find(bytes, part) {
            Some(at) => {
                bytes = &bytes[at + part.len()..];
                true
            }
            None => false,
        })
}

fn edit(
    headers: &mut HeaderMap,
    add: &[(Arc<str>, Arc<str>, AppendAction)],
    remove: &[Arc<str>],
) -> Result<(), Broken> {
    for (name, value, action) in add {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(hyper::http::Error::from)?;
        let value = HeaderValue::from_str(value).map_err(hyper::http::Error::from)?;
        match (action, headers.contains_key(&name)) {
            (AppendAction::AddIfAbsent, true) | (AppendAction::OverwriteIfExists, false) => {}
            (AppendAction::AppendIfExistsOrAdd, _) => drop(headers.append(name, value)),
            _ => drop(headers.insert(name, value)),
        }
    }
    for name in remove {
        headers.remove(&**name);
    }
    Ok(())
}

fn failed(kind: FailureKind) -> CheckResult {
    CheckResult::Failed {
        kind,
        retriable: false,
    }
}

const PASSED: CheckResult = CheckResult::Passed { degraded: false };

/// `HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: u64 = 1;

/// How much of an answer is looked at where nothing else limits it.
const MAX_RECEIVED: usize = 64 << 10;
