//! A small HTTP/1.1 server and client: whole bodies in, whole bodies out.

use std::{
    cell::RefCell, convert::Infallible, fmt, future::Future, io, net::SocketAddr, rc::Rc,
    time::Duration,
};

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

/// A service that is asked again and again. Its connections are kept: one for each request would use up the pod's ports
/// after 28,232 of them within a minute (the kernel keeps the address of a closed connection for so long).
pub(super) struct Peer {
    pub(super) host: String,
    port: u16,
    idle: RefCell<Vec<Connection>>,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl Peer {
    pub(super) fn new(host: String, port: u16) -> Self {
        Self {
            host,
            port,
            idle: RefCell::default(),
        }
    }

    /// One GET.
    pub(super) async fn get(
        &self,
        path: &str,
        headers: &HeaderMap,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), String> {
        let mut request = Request::get(path)
            .header(header::HOST, format!("{}:{}", self.host, self.port))
            .body(Full::new(Bytes::new()))
            .map_err(|e| e.to_string())?;
        request.headers_mut().extend(headers.clone());
        tokio::time::timeout(limit, self.exchange(request))
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }

    async fn exchange(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), String> {
        loop {
            let kept = self.idle.borrow_mut().pop();
            let was_kept = kept.is_some();
            let mut connection = match kept {
                Some(connection) => connection,
                None => Connection::open(&self.host, self.port).await?,
            };
            let response = match connection.sender.try_send_request(request).await {
                Ok(response) => response,
                Err(mut failure) => match failure.take_message() {
                    // The connection was closed while it was kept: nothing was sent on it.
                    Some(unsent) if was_kept => {
                        request = unsent;
                        continue;
                    }
                    _ => return Err(failure.into_error().to_string()),
                },
            };
            let status = response.status();
            let body = response.into_body().collect().await;
            let body = body.map_err(|e| e.to_string())?.to_bytes();
            // Whether it can be used again the connection knows a moment later.
            if connection.sender.ready().await.is_ok() {
                self.idle.borrow_mut().push(connection);
            }
            return Ok((status, body));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_is_asked_on_one_connection_until_that_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let clients = Rc::new(RefCell::new(Vec::new()));
        let seen = clients.clone();
        let local = tokio::task::LocalSet::new();
        local.spawn_local(serve(listener, move |incoming: Incoming| {
            seen.borrow_mut().push(incoming.peer);
            let mut reply = text(StatusCode::OK, incoming.request.uri().path().to_owned());
            if incoming.request.uri().path() == "/last" {
                let close = header::HeaderValue::from_static("close");
                reply.headers_mut().insert(header::CONNECTION, close);
            }
            std::future::ready(reply)
        }));
        let asked = async {
            let peer = Peer::new("127.0.0.1".to_owned(), port);
            for path in ["/a", "/b", "/last", "/c", "/d"] {
                let headers = HeaderMap::new();
                let answer = peer.get(path, &headers, Duration::from_secs(10));
                let (status, body) = answer.await.expect("an answer");
                assert_eq!((status, &*body), (StatusCode::OK, path.as_bytes()));
            }
        };
        local.run_until(asked).await;
        let clients = clients.borrow();
        let same = |a: usize, b: usize| clients[a] == clients[b];
        assert!(
            same(0, 1) && same(1, 2) && !same(2, 3) && same(3, 4),
            "{clients:?}"
        );
    }
}
