//! One HTTP/1.1 request on a connection of its own: for probes, scrapes and the proxy's admin interface.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpSocket, time::timeout};

/// Where and how to connect.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dial {
    pub(crate) to: SocketAddr,
    /// Source address, for probes that must pass the interception rules like passed-through traffic does.
    pub(crate) from: Option<IpAddr>,
    /// For the whole exchange.
    pub(crate) timeout: Duration,
    /// A longer body is an error.
    pub(crate) max_body: usize,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("cannot connect to {0}: {1}")]
    Connect(SocketAddr, io::Error),
    #[error("{0}: {1}")]
    Exchange(SocketAddr, String),
    #[error("{0}: no answer within {1:?}")]
    Timeout(SocketAddr, Duration),
}

/// Sends the request and reads the whole answer. `Host` and `Connection` are added where they are missing.
pub(crate) async fn send(
    dial: Dial,
    request: Request<Bytes>,
) -> Result<Response<Bytes>, HttpError> {
    timeout(dial.timeout, exchange(dial, request))
        .await
        .unwrap_or(Err(HttpError::Timeout(dial.to, dial.timeout)))
}

/// Opens a TCP connection and nothing more.
pub(crate) async fn connect(dial: Dial) -> Result<tokio::net::TcpStream, HttpError> {
    let socket = match dial.to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let failed = |e| HttpError::Connect(dial.to, e);
    let socket = socket.map_err(failed)?;
    if let Some(from) = dial.from {
        socket.bind(SocketAddr::new(from, 0)).map_err(failed)?;
    }
    timeout(dial.timeout, socket.connect(dial.to))
        .await
        .map_err(|_| HttpError::Timeout(dial.to, dial.timeout))?
        .map_err(failed)
}

async fn exchange(dial: Dial, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let stream = connect(dial).await?;
    let failed = |e: &dyn std::fmt::Display| HttpError::Exchange(dial.to, e.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .title_case_headers(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(&e))?;
    let host = dial.to.to_string();
    let headers = request.headers_mut();
    if !headers.contains_key(header::HOST) {
        let host = header::HeaderValue::from_str(&host).map_err(|e| failed(&e))?;
        headers.insert(header::HOST, host);
    }
    headers.insert(
        header::CONNECTION,
        header::HeaderValue::from_static("close"),
    );
    let exchange = async {
        let response = sender
            .send_request(request.map(Full::new))
            .await
            .map_err(|e| failed(&e))?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, dial.max_body)
            .collect()
            .await
            .map_err(|e| failed(&e))?;
        Ok(Response::from_parts(parts, body.to_bytes()))
    };
    // The connection is driven here and dropped with the exchange: no task outlives the request.
    let mut connection = std::pin::pin!(connection);
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        end = &mut connection => match end {
            Err(e) => Err(failed(&e)),
            Ok(()) => exchange.await,
        },
    }
}
