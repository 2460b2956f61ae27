//! A small HTTP/1.1 server and client: whole bodies in, whole bodies out.

use std::{convert::Infallible, future::Future, io, net::SocketAddr, rc::Rc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

/// A request with its body, and where it came from.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) request: Request<Bytes>,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
}

pub(super) type Reply = Response<Full<Bytes>>;

/// Serves until the listener fails; requests of a connection one after the other.
pub(super) async fn serve<H, F>(listener: TcpListener, handler: H) -> io::Result<()>
where
    H: Fn(Incoming) -> F + 'static,
    F: Future<Output = Reply> + 'static,
{
    let handler = Rc::new(handler);
    loop {
        let (stream, peer) = listener.accept().await?;
        let local = stream.local_addr()?;
        let _ = stream.set_nodelay(true);
        let handler = handler.clone();
        tokio::task::spawn_local(async move {
            let service =
                hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let handler = handler.clone();
                    async move {
                        let (parts, body) = request.into_parts();
                        let reply = match body.collect().await {
                            Ok(body) => {
                                let request = Request::from_parts(parts, body.to_bytes());
                                handler(Incoming {
                                    request,
                                    peer,
                                    local,
                                })
                                .await
                            }
                            Err(e) => text(
                                StatusCode::BAD_REQUEST,
                                format!("the body did not arrive: {e}\n"),
                            ),
                        };
                        Ok::<_, Infallible>(reply)
                    }
                });
            // A client that breaks off is its own business.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// Listens on every address of the pod, IPv6 included where there is any.
pub(super) async fn listen(port: u16) -> Result<TcpListener, String> {
    match TcpListener::bind(("::", port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .map_err(|e| format!("listen on port {port}: {e}")),
    }
}

pub(super) fn json(status: StatusCode, value: &Value) -> Reply {
    with_type(status, "application/json", format!("{value}"))
}

pub(super) fn text(status: StatusCode, body: String) -> Reply {
    with_type(status, "text/plain; charset=utf-8", body)
}

pub(super) fn with_type(status: StatusCode, kind: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    reply
}

/// A connection of the client, for one request after the other.
pub(super) struct Connection {
    sender: hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    pub(super) local: SocketAddr,
}

impl Connection {
    pub(super) async fn open(host: &str, port: u16) -> Result<Self, String> {
        let stream = TcpStream::connect((host, port))
            .await
            .map_err(|e| format!("connect to {host}:{port}: {e}"))?;
        let _ = stream.set_nodelay(true);
        let local = stream.local_addr().map_err(|e| e.to_string())?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| e.to_string())?;
        tokio::task::spawn_local(async move {
            // The request that it breaks reports the error.
            let _ = connection.await;
        });
        Ok(Self { sender, local })
    }

    pub(super) fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>, String> {
        self.sender.ready().await.map_err(|e| e.to_string())?;
        let (parts, body) = self
            .sender
            .send_request(request)
            .await
            .map_err(|e| e.to_string())?
            .into_parts();
        let body = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
        Ok(Response::from_parts(parts, body))
    }
}

/// One GET on a connection of its own.
pub(super) async fn get(
    host: &str,
    port: u16,
    path: &str,
    headers: &HeaderMap,
    limit: Duration,
) -> Result<(StatusCode, Bytes), String> {
    let work = async {
        let mut connection = Connection::open(host, port).await?;
        let mut request = Request::get(path)
            .header(header::HOST, format!("{host}:{port}"))
            .body(Full::new(Bytes::new()))
            .map_err(|e| e.to_string())?;
        request.headers_mut().extend(headers.clone());
        let response = connection.send(request).await?;
        Ok((response.status(), response.into_body()))
    };
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
}
