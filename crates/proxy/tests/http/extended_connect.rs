//! WebSocket over HTTP/2 (extended CONNECT, RFC 8441), with a client and servers of another make.

use std::{cell::RefCell, rc::Rc};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::ResponseFuture, ext::Protocol};
use http::{Method, Request, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use super::support::{Act, Mesh, OK, Origin, TO_A, run, within};

/// What the listener says where all of it is allowed.
const ALLOWED: &str = "http2_protocol_options: {allow_connect: true}
      upgrade_configs: [{upgrade_type: websocket}]";

const TO_S: &str = "          - {match: {prefix: /}, route: {cluster: s-h2}}";

/// Both ways of an open socket.
struct Socket {
    to: SendStream<Bytes>,
    from: RecvStream,
}

impl Socket {
    fn say(&mut self, text: &'static str) {
        self.to
            .send_data(Bytes::from_static(text.as_bytes()), false)
            .unwrap();
    }

    fn end(&mut self) {
        self.to.send_data(Bytes::new(), true).unwrap();
    }

    /// As many bytes as this has are this.
    async fn hears(&mut self, text: &str) {
        let mut got = Vec::new();
        while got.len() < text.len() {
            let data = within(self.from.data()).await.expect("it goes on").unwrap();
            let _ = self.from.flow_control().release_capacity(data.len());
            got.extend_from_slice(&data);
        }
        assert_eq!(String::from_utf8_lossy(&got), text);
    }

    /// Nothing comes but the end.
    async fn hears_the_end(&mut self) {
        while let Some(data) = within(self.from.data()).await {
            assert_eq!(data.unwrap(), "");
        }
    }
}

/// What a client is told of, and its question for a socket at `/chat`.
async fn asks(mesh: &Mesh) -> (bool, ResponseFuture, SendStream<Bytes>) {
    let stream = mesh.connect().await;
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    // How a connection ends says nothing of its streams.
    spawn_local(async move { drop(connection.await) });
    // An ordinary question first: by its answer our settings have come.
    let mut client = client.ready().await.unwrap();
    let ordinary = Request::get("http://h/first").body(()).unwrap();
    let (answer, _) = client.send_request(ordinary, true).unwrap();
    assert_eq!(within(answer).await.unwrap().status(), 200);
    let announced = client.is_extended_connect_protocol_enabled();
    let mut client = client.ready().await.unwrap();
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("http://h/chat?x=1")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-protocol", "talk")
        .extension(Protocol::from_static("websocket"))
        .body(())
        .unwrap();
    let (answer, to) = client.send_request(request, false).unwrap();
    (announced, answer, to)
}

/// The answer to a socket, which has to be there.
async fn opened(answer: ResponseFuture, to: SendStream<Bytes>) -> (Response<()>, Socket) {
    let answer = within(answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    // Those of HTTP/1 have no place in HTTP/2.
    for name in ["connection", "upgrade", "transfer-encoding"] {
        assert!(!answer.headers().contains_key(name), "{answer:?}");
    }
    let (head, from) = answer.into_parts();
    (Response::from_parts(head, ()), Socket { to, from })
}

/// Up to the end of a head.
async fn head(stream: &mut TcpStream) -> String {
    let mut got = Vec::new();
    while !got.ends_with(b"\r\n\r\n") {
        got.push(within(stream.read_u8()).await.unwrap());
    }
    String::from_utf8(got).unwrap()
}

async fn read(stream: &mut TcpStream, text: &str) {
    let mut got = vec![0; text.len()];
    within(stream.read_exact(&mut got)).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&got), text);
}

#[test]
fn a_socket_over_http2_is_an_upgrade_for_a_server_of_http1() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mesh = Mesh::new(TO_A, ALLOWED, "", &[("a", port)]).await;
        let (asked, mut host) = tokio::join!(asks(&mesh), async {
            let (mut host, _) = within(listener.accept()).await.unwrap();
            head(&mut host).await;
            let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
            host.write_all(ok).await.unwrap();
            host
        });
        let (announced, answer, to) = asked;
        assert!(announced);
        let request = head(&mut host).await.to_lowercase();
        assert!(
            request.starts_with("get /chat?x=1 http/1.1\r\n"),
            "{request}"
        );
        for line in [
            "host: h",
            "upgrade: websocket",
            "connection: upgrade",
            "sec-websocket-version: 13",
            "sec-websocket-protocol: talk",
        ] {
            assert!(request.contains(&format!("\r\n{line}\r\n")), "{request}");
        }
        // A body of HTTP/1 would be taken for frames.
        for name in ["transfer-encoding", "content-length", ":protocol"] {
            assert!(!request.contains(&format!("\r\n{name}:")), "{request}");
        }
        let agreed = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                       Connection: Upgrade\r\nSec-WebSocket-Protocol: talk\r\n\r\nhello";
        host.write_all(agreed).await.unwrap();
        let (answer, mut socket) = opened(answer, to).await;
        assert_eq!(answer.headers()["sec-websocket-protocol"], "talk");
        socket.hears("hello").await;
        socket.say("one");
        read(&mut host, "one").await;
        host.write_all(b"two").await.unwrap();
        socket.hears("two").await;
        // Each side ends for itself.
        socket.end();
        assert_eq!(within(host.read(&mut [0])).await.unwrap(), 0);
        host.write_all(b"last").await.unwrap();
        drop(host);
        socket.hears("last").await;
        socket.hears_the_end().await;
        let log = mesh.log(2).await;
        assert!(log.contains("/chat?x=1 101 - via_upstream 1\n"), "{log}");
    });
}

/// A server of HTTP/2 that takes sockets, or refuses them with a status; what it was asked.
async fn server(refuses: Option<u16>) -> (u16, Rc<RefCell<Vec<Request<()>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let kept = seen.clone();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let seen = kept.clone();
            spawn_local(async move {
                let mut server = h2::server::Builder::new();
                server.enable_connect_protocol();
                let mut server = server.handshake::<_, Bytes>(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = server.accept().await {
                    let (head, from) = request.into_parts();
                    let socket = head.method == Method::CONNECT;
                    seen.borrow_mut().push(Request::from_parts(head, ()));
                    let status = refuses.filter(|_| socket).unwrap_or(200);
                    let answer = Response::builder().status(status).body(()).unwrap();
                    let goes_on = socket && refuses.is_none();
                    let to = respond.send_response(answer, !goes_on).unwrap();
                    if goes_on {
                        spawn_local(echo(Socket { to, from }));
                    }
                }
            });
        }
    });
    (port, seen)
}

/// Says hello, then what it hears until that ends, then goodbye.
async fn echo(mut socket: Socket) {
    socket.say("hello");
    while let Some(data) = socket.from.data().await {
        let data = data.unwrap();
        let _ = socket.from.flow_control().release_capacity(data.len());
        socket.to.send_data(data, false).unwrap();
    }
    socket.say("goodbye");
    socket.end();
}

#[test]
fn a_socket_over_http2_stays_one_for_a_server_of_http2() {
    run(async {
        let (port, seen) = server(None).await;
        let mesh = Mesh::new(TO_S, ALLOWED, "", &[("s-h2", port)]).await;
        let (announced, answer, to) = asks(&mesh).await;
        assert!(announced);
        let (_, mut socket) = opened(answer, to).await;
        let request = seen.borrow_mut().remove(1);
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(
            request.extensions().get(),
            Some(&Protocol::from_static("websocket"))
        );
        assert_eq!(request.uri(), "http://h/chat?x=1");
        assert_eq!(request.headers()["sec-websocket-version"], "13");
        for name in ["connection", "upgrade", "content-length"] {
            assert!(!request.headers().contains_key(name), "{request:?}");
        }
        socket.hears("hello").await;
        for text in ["one", "two"] {
            socket.say(text);
            socket.hears(text).await;
        }
        socket.end();
        socket.hears("goodbye").await;
        socket.hears_the_end().await;
    });
}

#[test]
fn a_socket_that_the_server_refuses_is_refused() {
    run(async {
        // A server of HTTP/2, then one of HTTP/1.
        let (port, seen) = server(Some(404)).await;
        let mesh = Mesh::new(TO_S, ALLOWED, "", &[("s-h2", port)]).await;
        let (_, answer, _to) = asks(&mesh).await;
        let answer = within(answer).await.unwrap();
        assert_eq!(answer.status(), 404);
        assert_eq!(seen.borrow().len(), 2);
        let no = Act::Say("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno");
        let origin = Origin::new(&[OK, no]).await;
        let mesh = Mesh::new(TO_A, ALLOWED, "", &[("a", origin.port)]).await;
        let (_, answer, to) = asks(&mesh).await;
        let answer = within(answer).await.unwrap();
        assert_eq!(answer.status(), 404);
        let from = answer.into_body();
        let mut socket = Socket { to, from };
        socket.hears("no").await;
        socket.hears_the_end().await;
    });
}

#[test]
fn a_socket_over_http2_needs_leave_of_the_listener_and_of_the_upgrades() {
    const OWN: &str = "          - {match: {path: /chat}, route: {cluster: a, upgrade_configs: [{upgrade_type: websocket, enabled: false}]}}
          - {match: {prefix: /}, route: {cluster: a}}";
    run(async {
        // No listener takes it by itself: it is not announced, and the stream that asks is malformed.
        let origin = Origin::new(&[OK]).await;
        let options = "upgrade_configs: [{upgrade_type: websocket}]";
        let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let (announced, answer, _to) = asks(&mesh).await;
        assert!(!announced);
        let error = within(answer).await.unwrap_err();
        assert_eq!(error.reason(), Some(h2::Reason::PROTOCOL_ERROR), "{error}");
        assert!(error.is_reset(), "{error}");
        assert_eq!(origin.seen().len(), 1);
        // Nobody lets upgrades through; others are let through; the route does not let it through.
        let allow = "http2_protocol_options: {allow_connect: true}";
        let other = format!("{allow}\n      upgrade_configs: [{{upgrade_type: other}}]");
        for (routes, options) in [(TO_A, allow), (TO_A, &other), (OWN, ALLOWED)] {
            let origin = Origin::new(&[OK]).await;
            let mesh = Mesh::new(routes, options, "", &[("a", origin.port)]).await;
            let (announced, answer, _to) = asks(&mesh).await;
            assert!(announced);
            assert_eq!(within(answer).await.unwrap().status(), 403);
            assert_eq!(origin.seen().len(), 1);
            let log = mesh.log(2).await;
            assert!(log.contains("/chat?x=1 403 - upgrade_failed "), "{log}");
        }
    });
}
