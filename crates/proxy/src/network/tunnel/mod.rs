//! A TCP connection through an HTTP proxy (`tunneling_config`): it is asked for by CONNECT or POST, and its bytes go
//! as the proxy's HTTP carries them.
//!
//! Over HTTP/1.1 a tunnel has a connection of its own. After a CONNECT that is plain bytes again; the body of a POST is
//! chunked. Over HTTP/2 a tunnel is a stream, and many share a connection of the cluster's pool. Any 2xx opens a
//! tunnel, unless it comes with its own end; Envoy wants exactly 200 over HTTP/2.

mod carried;
mod request;
mod told;

use std::{future::poll_fn, rc::Rc, sync::Arc};

use outrigger_http::{
    Error, Framing, Method, RequestHead, ResponseHead,
    h1::ClientConnection,
    h2::{ClientHandle, Reader, Writer},
};
use tokio::time::timeout;

pub(super) use carried::Carried;
pub(super) use told::Told;

use super::{
    exchange,
    tcp_proxy::TcpOutcome,
    upstream::{Connected, Holder, Upstream},
};
use crate::{
    cluster::{Cluster, Host, LbContext, UpstreamError},
    codec::{http1_spelling, response_limits},
    io::Stream,
    listener::ConnectionInfo,
    plan::{
        cluster::{UpstreamProtocol, UpstreamTransport},
        network::Tunneling,
    },
    worker::Worker,
};

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
enum TunnelError {
    /// What the configuration's format gives is no authority.
    #[error("tunneling_config.hostname: {0:?} is no host with a port")]
    Hostname(String),
    #[error("tunneling_config.headers_to_add: the value of {0} has bytes that no header may have")]
    Header(String),
    #[error("the proxy answered {0} with status {1}")]
    Refused(&'static str, u16),
    #[error("the proxy's answer to {0} ends where the tunnel should begin")]
    Ended(&'static str),
    #[error("the proxy's answer: {0}")]
    Answer(#[from] Error),
}

/// Asks a host for a tunnel.
///
/// Can be dropped at any time: the tunnel is then given up.
pub(super) async fn open(
    plan: &Tunneling,
    cluster: &Cluster,
    (host, context): (&Arc<Host>, &LbContext<'_>),
    info: &ConnectionInfo,
    outcome: &mut TcpOutcome,
    worker: &Worker,
) -> Result<Connected, UpstreamError> {
    let told = Rc::new(Told::new(plan, &worker.random));
    outcome.tunnel = Some(told.clone());
    let secure = matches!(host.transport.after_header().0, UpstreamTransport::Tls(_));
    let asked = request::head(
        plan,
        &told,
        &exchange(info, Some(outcome), worker.random.bits()),
        secure,
    );
    let head = asked.map_err(|error| UpstreamError::Connect(error.to_string()))?;
    let prefers_http2 = cluster.plan.protocol == UpstreamProtocol::Downstream { http2: true };
    let by_http2 = cluster.negotiate_http2(host, context, prefers_http2);
    let opened = match by_http2.await? {
        true => over_http2(&head, &told, cluster, host, context).await?,
        false => over_http1(&head, &told, cluster, host, context).await?,
    };
    cluster.tcp_connected(host);
    Ok(opened)
}

/// A tunnel with a connection of its own.
async fn over_http1(
    head: &RequestHead,
    told: &Rc<Told>,
    cluster: &Cluster,
    host: &Arc<Host>,
    context: &LbContext<'_>,
) -> Result<Connected, UpstreamError> {
    let (stream, account, request) = cluster.tcp_untold(host, context).await?;
    let plan = &cluster.plan;
    let (session, peer) = (stream.session().cloned(), stream.peer().cloned());
    let alpn = session.as_ref().and_then(|session| session.alpn.as_deref());
    if plan.protocol == UpstreamProtocol::Alpn && alpn == Some("h2") {
        let error =
            UpstreamError::Protocol("the host changed the protocol that it chooses".to_owned());
        cluster.tcp_failed(host, &error);
        return Err(error);
    }
    let mut connection = ClientConnection::new(stream, response_limits(plan));
    connection.set_spelling(http1_spelling(&plan.http1));
    let answered = timeout(plan.connect_timeout, ask_http1(&mut connection, head, told));
    let answered = answered.await.map(|answered| {
        answered.inspect_err(|error| {
            if let TunnelError::Answer(Error::Closed | Error::Io(_)) = error {
                account.ended(true);
            }
        })
    });
    opened(answered, cluster, host)?;
    let stream = match head.method {
        Method::Connect => {
            let (mut stream, ahead) = connection.into_io();
            if !ahead.is_empty() {
                stream.put_back(ahead);
            }
            Upstream::Plain(stream)
        }
        _ => {
            let carried = Carried::http1(connection, (session, peer), told.clone());
            Upstream::Carried(Box::new(carried))
        }
    };
    Ok(Connected {
        stream,
        holder: Holder::Own(account),
        _request: request,
    })
}

async fn ask_http1(
    connection: &mut ClientConnection<Stream>,
    head: &RequestHead,
    told: &Told,
) -> Result<(), TunnelError> {
    connection.send_head(head, Framing::Chunked);
    connection.writer().flush().await?;
    let answer = loop {
        let answer = poll_fn(|cx| connection.poll_head(cx, false)).await?;
        if !answer.is_informational() {
            break answer;
        }
    };
    told.answer(&answer);
    judge(head, &answer, answer.framing.is_none())
}

/// A tunnel that is a stream of a connection.
async fn over_http2(
    head: &RequestHead,
    told: &Rc<Told>,
    cluster: &Cluster,
    host: &Arc<Host>,
    context: &LbContext<'_>,
) -> Result<Connected, UpstreamError> {
    let mut place = cluster.http2(host, context).await?;
    let request = cluster.request(host, context)?;
    let answered = timeout(
        cluster.plan.connect_timeout,
        ask_http2(place.handle(), head, told),
    );
    let (reader, writer) = opened(answered.await, cluster, host)?;
    let established = place.established();
    let carried = Carried::http2((reader, writer), place, told.clone());
    Ok(Connected {
        stream: Upstream::Carried(Box::new(carried)),
        holder: Holder::Shared(established),
        _request: request,
    })
}

async fn ask_http2(
    handle: &mut ClientHandle,
    head: &RequestHead,
    told: &Told,
) -> Result<(Reader, Writer), TunnelError> {
    let (mut responses, writer) = handle.send(head, Framing::Chunked)?.split();
    let (answer, reader) = loop {
        if let (answer, Some(reader)) = responses.read_head().await? {
            break (answer, reader);
        }
    };
    told.answer(&answer);
    judge(head, &answer, responses.is_bare())?;
    Ok((reader, writer))
}

/// Whether an answer opens the tunnel. `bare`: nothing follows it.
fn judge(head: &RequestHead, answer: &ResponseHead, bare: bool) -> Result<(), TunnelError> {
    let asked = match head.method {
        Method::Connect => "CONNECT",
        _ => "POST",
    };
    match answer.status {
        200..=299 if bare => Err(TunnelError::Ended(asked)),
        200..=299 => Ok(()),
        status => Err(TunnelError::Refused(asked, status)),
    }
}

/// What came of asking; the host is told where it is to blame.
fn opened<T>(
    answered: Result<Result<T, TunnelError>, tokio::time::error::Elapsed>,
    cluster: &Cluster,
    host: &Arc<Host>,
) -> Result<T, UpstreamError> {
    let error = match answered {
        Ok(Ok(opened)) => return Ok(opened),
        Ok(Err(error)) => UpstreamError::Connect(error.to_string()),
        Err(_) => UpstreamError::ConnectTimeout,
    };
    cluster.tcp_failed(host, &error);
    Err(error)
}
