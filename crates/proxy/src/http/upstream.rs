//! One attempt's stream to an upstream, whichever protocol it speaks.

use std::{
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use outrigger_http::{Error, Frame, Framing, Headers, RequestHead, ResponseHead, Version, h1, h2};

use tls::session::Session;
use tokio::io::AsyncWriteExt;

use super::prepare::split_port;
use crate::{
    cluster::{
        self, Cluster, Established, Host, Http1, Http2, LbContext, RequestGuard, UpstreamAccount,
        UpstreamError,
    },
    io::Stream,
    plan::Cluster as Plan,
    proxy_protocol::{self, Header},
    transport::AutoName,
};

/// A request on its way to a host. Dropped before its end, the connection (HTTP/1) or the stream
/// (HTTP/2) is given up.
#[derive(Debug)]
pub(super) struct Upstream {
    call: Call,
    /// Counts the request as under way.
    guard: RequestGuard,
    pub(super) established: Established,
    pub(super) reused: bool,
}

#[derive(Debug)]
enum Call {
    H1(Http1),
    H2(Box<H2Call>),
    /// A CONNECT that ends here: the payload alone goes to the host.
    Tcp(Box<TcpCall>),
}

#[derive(Debug)]
struct TcpCall {
    connection: h1::ClientConnection<Stream>,
    /// Counts the connection as open.
    _account: UpstreamAccount,
}

#[derive(Debug)]
struct H2Call {
    place: Http2,
    stream: Option<(h2::ResponseReader, h2::Writer)>,
    body: Option<h2::Reader>,
}

/// The server name that a request chooses (`auto_sni`): what a header says, else the host without its port.
pub(super) fn auto_name<'r>(plan: &Plan, request: &'r RequestHead) -> Option<AutoName<'r>> {
    let auto = plan.auto_sni.as_ref()?;
    let header = auto.header.as_deref();
    let name = header
        .and_then(|header| request.headers.get_str(header))
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| request.authority());
    let (name, _) = split_port(name);
    let bare = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    Some(AutoName {
        name: bare.unwrap_or(name),
        checked: auto.validate,
    })
}

impl Upstream {
    /// A connection to the host, pooled or new.
    pub(super) async fn acquire(
        cluster: &Cluster,
        host: &Arc<Host>,
        context: &LbContext<'_>,
        downstream: Version,
    ) -> Result<Upstream, UpstreamError> {
        // The limit of requests counts from here: one that waits for a connection is `pending`.
        let asked = downstream == Version::Http2;
        if cluster.negotiate_http2(host, context, asked).await? {
            let place = cluster.http2(host, context).await?;
            let guard = cluster.request(host, context)?;
            let (established, reused) = (place.established(), place.is_reused());
            let call = Call::H2(Box::new(H2Call {
                place,
                stream: None,
                body: None,
            }));
            return Ok(Upstream {
                call,
                guard,
                established,
                reused,
            });
        }
        let mut http1 = cluster.http1(host, context).await?;
        let guard = cluster.request(host, context)?;
        let (established, reused) = (http1.established(), http1.is_reused());
        Ok(Upstream {
            call: Call::H1(http1),
            guard,
            established,
            reused,
        })
    }

    /// A connection of its own to the host, for the payload of a CONNECT that ends here.
    pub(super) async fn connect(
        cluster: &Cluster,
        host: &Arc<Host>,
        context: &LbContext<'_>,
        proxy: Option<proxy_protocol::Version>,
    ) -> Result<Upstream, UpstreamError> {
        let (mut stream, account, guard) = cluster.tcp(host, context).await?;
        let stats = cluster.stats();
        stream.count(
            stats.upstream_cx_rx_bytes_total(),
            stats.upstream_cx_tx_bytes_total(),
            stats.upstream_cx_tx_bytes_buffered(),
        );
        if let Some(version) = proxy {
            let client = context.downstream;
            let header = Header {
                version,
                addresses: client.and_then(|info| Some((info.remote?, info.local?))),
                tlvs: Vec::new(),
            };
            let mut bytes = BytesMut::new();
            header.write_to(&mut bytes);
            let written = stream.write_all(&bytes).await;
            written.map_err(|error| UpstreamError::Connect(error.to_string()))?;
        }
        let established = account.established();
        Ok(Upstream {
            call: Call::Tcp(Box::new(TcpCall {
                connection: h1::ClientConnection::tunnel(stream),
                _account: account,
            })),
            guard,
            established,
            reused: false,
        })
    }

    /// What TLS agreed on.
    pub(super) fn session(&mut self) -> Option<Arc<Session>> {
        match &mut self.call {
            Call::H1(http1) => http1.session(),
            Call::H2(call) => call.place.session(),
            Call::Tcp(call) => call.connection.io().session().cloned(),
        }
    }

    /// The version of HTTP spoken; `None` where it is none.
    pub(super) fn version(&self) -> Option<Version> {
        match self.call {
            Call::H1(_) => Some(Version::Http11),
            Call::H2(_) => Some(Version::Http2),
            Call::Tcp(_) => None,
        }
    }

    /// Writes the head; it leaves with the first flush.
    pub(super) fn send_head(&mut self, head: &RequestHead, framing: Framing) -> Result<(), Error> {
        match &mut self.call {
            Call::H1(http1) => http1.connection.send_head(head, framing),
            Call::H2(call) => {
                call.stream = Some(call.place.handle().send(head, framing)?.split());
            }
            Call::Tcp(_) => {}
        }
        Ok(())
    }

    /// The next head of the response.
    pub(super) fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        upgrade: bool,
    ) -> Poll<Result<ResponseHead, Error>> {
        match &mut self.call {
            Call::H1(http1) => {
                let head = ready!(http1.connection.poll_head(cx, upgrade));
                let head = head.inspect_err(|error| http1.broken(error))?;
                if !head.keep_alive && head.status != 101 {
                    self.guard.told_close();
                }
                if let Some(timeout) = head.keep_alive_timeout {
                    http1.told_timeout(timeout);
                }
                Poll::Ready(Ok(head))
            }
            Call::H2(call) => {
                let Some((reader, _)) = &mut call.stream else {
                    return Poll::Ready(Err(Error::Closed));
                };
                let (mut head, body) = ready!(reader.poll_head(cx))?;
                if body.is_some() {
                    call.body = body;
                }
                if head.framing == Framing::Tunnel {
                    // The answer to an extended CONNECT, as HTTP/1 says it.
                    head.status = if upgrade { 101 } else { head.status };
                }
                Poll::Ready(Ok(head))
            }
            // Being connected is the answer.
            Call::Tcp(_) => {
                let mut head = ResponseHead::new(200);
                head.framing = Framing::Tunnel;
                Poll::Ready(Ok(head))
            }
        }
    }

    /// The next frame of the response.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, Error>>> {
        match &mut self.call {
            Call::H1(http1) => {
                let frame = http1.connection.reader().poll_frame(cx);
                if let Poll::Ready(Some(Err(error))) = &frame {
                    http1.broken(error);
                }
                frame
            }
            Call::H2(call) => match &mut call.body {
                Some(body) => body.poll_frame(cx),
                None => Poll::Ready(None),
            },
            Call::Tcp(call) => call.connection.reader().poll_frame(cx),
        }
    }

    /// The response's body, where its bytes may go around us ([`super::pass`]).
    pub(super) fn http1(&mut self) -> Option<h1::Reader<'_, cluster::Upstream>> {
        match &mut self.call {
            Call::H1(http1) => Some(http1.connection.reader()),
            _ => None,
        }
    }

    /// Room for another piece of the request.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match &mut self.call {
            Call::H1(http1) => http1.connection.writer().poll_ready(cx),
            Call::H2(call) => call.writer()?.poll_ready(cx),
            Call::Tcp(call) => call.connection.writer().poll_ready(cx),
        }
    }

    /// A piece of the request; only after `poll_ready`.
    pub(super) fn send_data(&mut self, data: Bytes) -> Result<(), Error> {
        match &mut self.call {
            Call::H1(http1) => http1.connection.writer().send_data(data),
            Call::H2(call) => call.writer()?.send_data(data),
            Call::Tcp(call) => call.connection.writer().send_data(data),
        }
    }

    /// The end of the request.
    pub(super) fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), Error> {
        match &mut self.call {
            Call::H1(http1) => http1.connection.writer().send_end(trailers),
            Call::H2(call) => call.writer()?.send_end(trailers),
            Call::Tcp(call) => call.connection.writer().send_end(trailers),
        }
    }

    /// Hands what was written to the system.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match &mut self.call {
            Call::H1(http1) => http1.connection.writer().poll_flush(cx),
            Call::H2(call) => call.writer()?.poll_flush(cx),
            Call::Tcp(call) => call.connection.writer().poll_flush(cx),
        }
    }

    /// Ends our direction of a tunnel.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match &mut self.call {
            Call::H1(http1) => http1.connection.writer().poll_shutdown(cx),
            Call::H2(call) => call.writer()?.poll_end(cx),
            Call::Tcp(call) => call.connection.writer().poll_shutdown(cx),
        }
    }

    /// Whether a byte of a response has come.
    pub(super) fn has_response_bytes(&self) -> bool {
        match &self.call {
            Call::H1(http1) => http1.connection.has_response_bytes(),
            Call::H2(call) => call.body.is_some(),
            Call::Tcp(_) => true,
        }
    }

    /// After the exchange: an HTTP/1 connection that is clean goes back to its pool.
    pub(super) fn release(self) {
        if let Call::H1(http1) = self.call {
            http1.release();
        }
    }

    /// Gives a stream up in the middle, so that the upstream stops working on it.
    pub(super) fn cancel(mut self) {
        if let Call::H2(call) = &mut self.call
            && let Some((_, writer)) = &mut call.stream
        {
            writer.reset(h2::Reason::CANCEL);
        }
    }
}

impl H2Call {
    fn writer(&mut self) -> Result<&mut h2::Writer, Error> {
        self.stream
            .as_mut()
            .map(|(_, writer)| writer)
            .ok_or(Error::Closed)
    }
}
