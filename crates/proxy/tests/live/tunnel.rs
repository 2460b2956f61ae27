//! Tunnels through an HTTP proxy: how they are asked for, what they carry, and how they end.

use bytes::Bytes;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, DuplexStream},
    sync::mpsc,
};

use super::{
    tcp::{chain, tcp_proxy, type_url},
    *,
};

/// How a proxy is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Http1Connect,
    Http1Post,
    Http2Connect,
    Http2Post,
}
use Way::*;

const WAYS: [Way; 4] = [Http1Connect, Http1Post, Http2Connect, Http2Post];

impl Way {
    fn is_http2(self) -> bool {
        matches!(self, Http2Connect | Http2Post)
    }

    fn is_post(self) -> bool {
        matches!(self, Http1Post | Http2Post)
    }

    /// Of the cluster.
    fn cluster(self) -> String {
        match self.is_http2() {
            true => http_options("explicit_http_config: {http2_protocol_options: {}}"),
            false => http_options(
                "explicit_http_config: {http_protocol_options: {enable_trailers: true}}",
            ),
        }
    }

    /// Of `tunneling_config`.
    fn tunneling(self, more: &str) -> String {
        let post = if self.is_post() {
            ", use_post: true"
        } else {
            ""
        };
        format!(", tunneling_config: {{hostname: \"db.example:5432\"{post}{more}}}")
    }
}

fn http_options(options: &str) -> String {
    format!(
        "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{{}, {options}}}}}",
        type_url("upstreams.http.v3.HttpProtocolOptions")
    )
}

/// What a proxy says, one for each request.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// 200 and the tunnel.
    Open,
    /// A 103 before.
    Hinted,
    /// A status alone.
    Only(u16),
    Silence,
}

/// A tunnel as a proxy sees it.
#[derive(Debug)]
struct Tunnel {
    /// The request: for HTTP/1 its bytes, for HTTP/2 a line for each field.
    head: String,
    /// Of the proxy's connections.
    connection: usize,
    /// Its bytes, where it was opened.
    stream: DuplexStream,
    /// Completes with how the client's direction broke; it is silent where the direction has ended well.
    broken: mpsc::UnboundedReceiver<String>,
    /// Breaks it.
    breaks: mpsc::UnboundedSender<()>,
}

/// A proxy whose tunnels the test serves.
struct Proxy {
    port: u16,
    tunnels: mpsc::UnboundedReceiver<Tunnel>,
}

impl Proxy {
    async fn new(way: Way, answers: &'static [Answer]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let (sender, tunnels) = mpsc::unbounded_channel();
        tokio::task::spawn_local(async move {
            let mut answers = answers.iter();
            let mut connections = 0;
            // HTTP/2 has all on one connection, as long as it lasts.
            while let Ok((stream, _)) = listener.accept().await {
                connections += 1;
                let sender = sender.clone();
                match way.is_http2() {
                    true => http2(stream, connections, &mut answers, &sender).await,
                    false => {
                        let answer = *answers.next().unwrap_or(&Answer::Open);
                        tokio::task::spawn_local(http1(stream, connections, answer, sender));
                    }
                }
            }
        });
        Self { port, tunnels }
    }

    async fn next(&mut self) -> Tunnel {
        within(self.tunnels.recv()).await.expect("the proxy lives")
    }
}

async fn http1(
    stream: TcpStream,
    connection: usize,
    answer: Answer,
    sender: mpsc::UnboundedSender<Tunnel>,
) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        read.read_line(&mut head).await.expect("it is text");
    }
    let post = head.starts_with("POST");
    let opening = match post {
        true => "HTTP/1.1 200 OK\r\nX-From: proxy\r\ntransfer-encoding: chunked\r\n\r\n",
        // A length of such an answer means nothing.
        false => "HTTP/1.1 200 OK\r\nX-From: proxy\r\ncontent-length: 7\r\n\r\n",
    };
    let said = match answer {
        Answer::Open => opening.to_owned(),
        Answer::Hinted => format!("HTTP/1.1 103 Early Hints\r\nx-hint: 1\r\n\r\n{opening}"),
        Answer::Only(status) => {
            format!("HTTP/1.1 {status} So\r\nX-From: proxy\r\ncontent-length: 0\r\n\r\n")
        }
        Answer::Silence => String::new(),
    };
    write.write_all(said.as_bytes()).await.expect("it is open");
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut from_test, mut to_test) = tokio::io::split(near);
    let (tell, broken) = mpsc::unbounded_channel();
    let (breaks, mut break_it) = mpsc::unbounded_channel();
    let tunnel = Tunnel {
        head,
        connection,
        stream: far,
        broken,
        breaks,
    };
    let _ = sender.send(tunnel);
    let forth = async {
        let ended = match post {
            true => unchunk(&mut read, &mut to_test).await,
            false => tokio::io::copy(&mut read, &mut to_test).await.map(|_| ()),
        };
        match ended {
            Ok(()) => to_test.shutdown().await.expect("the test reads"),
            Err(error) => drop(tell.send(error.kind().to_string())),
        }
    };
    let back = async {
        match post {
            true => chunk(&mut from_test, &mut write).await,
            false => {
                let copied = tokio::io::copy(&mut from_test, &mut write).await;
                let _ = write.shutdown().await;
                copied.map(|_| ())
            }
        }
    };
    tokio::select! {
        _ = async { tokio::join!(forth, back) } => {}
        _ = break_it.recv() => {}
    }
}

async fn unchunk(
    read: &mut (impl AsyncBufReadExt + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
) -> std::io::Result<()> {
    loop {
        let mut line = String::new();
        if read.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let size = usize::from_str_radix(line.trim_end(), 16).expect("it is a chunk");
        let mut data = vec![0; size + 2];
        read.read_exact(&mut data).await?;
        assert_eq!(&data[size..], b"\r\n");
        if size == 0 {
            return Ok(());
        }
        write.write_all(&data[..size]).await?;
    }
}

async fn chunk(
    read: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let mut data = vec![0; 10_000];
    loop {
        let length = read.read(&mut data).await?;
        if length == 0 {
            return write.write_all(b"0\r\nx-bytes: all\r\n\r\n").await;
        }
        write
            .write_all(format!("{length:x}\r\n").as_bytes())
            .await?;
        write.write_all(&data[..length]).await?;
        write.write_all(b"\r\n").await?;
    }
}

async fn http2(
    stream: TcpStream,
    connection: usize,
    answers: &mut impl Iterator<Item = &'static Answer>,
    sender: &mpsc::UnboundedSender<Tunnel>,
) {
    // The bytes that HTTP/1 begins with would be an error here.
    let Ok(mut server) = h2::server::handshake(stream).await else {
        return;
    };
    while let Some(Ok((request, mut respond))) = server.accept().await {
        let mut head = format!(":method {}\n", request.method());
        let uri = request.uri();
        for (name, value) in [
            (":scheme", uri.scheme_str()),
            (":authority", uri.authority().map(|a| a.as_str())),
            (":path", Some(uri.path()).filter(|path| !path.is_empty())),
        ] {
            head.extend(value.map(|value| format!("{name} {value}\n")));
        }
        for (name, value) in request.headers() {
            head += &format!("{name} {}\n", value.to_str().expect("it is text"));
        }
        let answer = *answers.next().unwrap_or(&Answer::Open);
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (mut from_test, mut to_test) = tokio::io::split(near);
        let (tell, broken) = mpsc::unbounded_channel();
        let (breaks, mut break_it) = mpsc::unbounded_channel();
        let tunnel = Tunnel {
            head,
            connection,
            stream: far,
            broken,
            breaks,
        };
        let _ = sender.send(tunnel);
        let mut body = request.into_body();
        let said = http::Response::builder().header("x-from", "proxy");
        let mut writer = match answer {
            Answer::Open | Answer::Hinted => respond
                .send_response(said.body(()).expect("a head"), false)
                .expect("it is open"),
            Answer::Only(status) => {
                let head = said.status(status).body(()).expect("a head");
                respond.send_response(head, true).expect("it is open");
                continue;
            }
            Answer::Silence => {
                tokio::task::spawn_local(async move {
                    let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                    let _ = tell.send(reset.map_or_else(|e| e.to_string(), |r| format!("{r:?}")));
                });
                continue;
            }
        };
        tokio::task::spawn_local(async move {
            let forth = async {
                while let Some(data) = body.data().await {
                    match data {
                        Ok(data) => {
                            to_test.write_all(&data).await.expect("the test reads");
                            body.flow_control()
                                .release_capacity(data.len())
                                .expect("it was taken");
                        }
                        Err(error) => {
                            let reason = error.reason().expect("it was reset");
                            let _ = tell.send(format!("{reason:?}"));
                            return;
                        }
                    }
                }
                to_test.shutdown().await.expect("the test reads");
            };
            let mut data = vec![0; 10_000];
            let back = async {
                loop {
                    let length = from_test.read(&mut data).await.expect("the test writes");
                    if length == 0 {
                        let mut trailers = http::HeaderMap::new();
                        trailers.insert("x-bytes", http::HeaderValue::from_static("all"));
                        return writer.send_trailers(trailers).expect("it is open");
                    }
                    writer.reserve_capacity(length);
                    while writer.capacity() < length {
                        match std::future::poll_fn(|cx| writer.poll_capacity(cx)).await {
                            Some(Ok(_)) => {}
                            _ => return,
                        }
                    }
                    let piece = Bytes::copy_from_slice(&data[..length]);
                    writer.send_data(piece, false).expect("it is open");
                }
            };
            let broken = tokio::select! {
                _ = async { tokio::join!(forth, back) } => false,
                _ = break_it.recv() => true,
            };
            if broken {
                writer.send_reset(h2::Reason::INTERNAL_ERROR);
            }
        });
    }
}

/// One proxy that is asked one way.
async fn asked(way: Way, port: u16, tunneling: &str, more: &str) -> Rc<Server> {
    let server = server(1);
    let (name, config) = tcp_proxy("a", &format!("{}{more}", way.tunneling(tunneling)));
    apply(
        &server,
        vec![
            static_cluster("a", &[port], &way.cluster()),
            tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
        ],
    )
    .await;
    server
}

fn access_log(path: &std::path::Path, format: &str) -> String {
    format!(
        ", access_log: [{{name: f, typed_config: {{{}, path: {path:?}, log_format: {{text_format_source: {{inline_string: \"{format}\\n\"}}}}}}}}]",
        type_url("access_loggers.file.v3.FileAccessLog")
    )
}

fn bytes(seed: u32, length: u32) -> Vec<u8> {
    (0..length)
        .map(|n| (n.wrapping_mul(31 + seed) >> 3) as u8)
        .collect()
}

live! {
    async fn a_tunnel_is_asked_for_as_its_cluster_speaks() {
        let add = ", headers_to_add: [{header: {key: x-from, value: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\"}}, {header: {key: x-from, value: two}, append_action: ADD_IF_ABSENT}]";
        // Whether it is absent is asked before anything is added, as in Envoy.
        for (way, path, head) in [
            (Http1Connect, "", "CONNECT db.example:5432 HTTP/1.1\r\nhost: db.example:5432\r\nx-from: 127.0.0.1\r\nx-from: two\r\n\r\n"),
            (Http1Post, "", "POST / HTTP/1.1\r\nhost: db.example:5432\r\nx-from: 127.0.0.1\r\nx-from: two\r\ntransfer-encoding: chunked\r\n\r\n"),
            (Http1Post, ", post_path: /tunnel?to=db", "POST /tunnel?to=db HTTP/1.1\r\nhost: db.example:5432\r\nx-from: 127.0.0.1\r\nx-from: two\r\ntransfer-encoding: chunked\r\n\r\n"),
            (Http2Connect, "", ":method CONNECT\n:authority db.example:5432\nx-from 127.0.0.1\nx-from two\n"),
            (Http2Post, "", ":method POST\n:scheme http\n:authority db.example:5432\n:path /\nx-from 127.0.0.1\nx-from two\n"),
            (Http2Post, ", post_path: /tunnel?to=db", ":method POST\n:scheme http\n:authority db.example:5432\n:path /tunnel\nx-from 127.0.0.1\nx-from two\n"),
        ] {
            let mut proxy = Proxy::new(way, &[]).await;
            let server = asked(way, proxy.port, &format!("{path}{add}"), "").await;
            let mut client = connect(&server, "l").await;
            let mut tunnel = proxy.next().await;
            assert_eq!(tunnel.head, head, "{way:?}");
            // Whoever is behind the proxy may speak first.
            tunnel.stream.write_all(b"hello").await.expect("it is open");
            assert_eq!(read(&mut client, 5).await, "hello", "{way:?}");
        }
    }

    async fn a_cluster_that_may_speak_both_is_asked_by_http2() {
        for (options, http2) in [
            ("use_downstream_protocol_config: {http_protocol_options: {}, http2_protocol_options: {}}", true),
            ("use_downstream_protocol_config: {http_protocol_options: {}}", false),
            // In clear there is no ALPN.
            ("auto_config: {http_protocol_options: {}, http2_protocol_options: {}}", false),
        ] {
            let way = if http2 { Http2Connect } else { Http1Connect };
            let mut proxy = Proxy::new(way, &[]).await;
            let server = server(1);
            let (name, config) = tcp_proxy("a", &way.tunneling(""));
            apply(&server, vec![
                static_cluster("a", &[proxy.port], &http_options(options)),
                tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
            ]).await;
            let mut client = connect(&server, "l").await;
            let mut tunnel = proxy.next().await;
            tunnel.stream.write_all(b"hello").await.expect("it is open");
            assert_eq!(read(&mut client, 5).await, "hello", "{options}");
        }
    }

    async fn large_bodies_pass_and_either_side_may_end_first() {
        let (up, down) = (bytes(0, 1 << 20), bytes(1, 1 << 20));
        for way in WAYS {
            let mut proxy = Proxy::new(way, &[]).await;
            let server = asked(way, proxy.port, "", "").await;
            for client_first in [true, false] {
                let client = connect(&server, "l").await;
                let tunnel = proxy.next().await;
                let exchange = async |stream: DuplexOrTcp, out: &[u8], first: bool| {
                    let (mut read, mut write) = tokio::io::split(stream);
                    let mut got = Vec::new();
                    if first {
                        write.write_all(out).await.expect("it is open");
                        write.shutdown().await.expect("it is open");
                        read.read_to_end(&mut got).await.expect("it ends well");
                    } else {
                        read.read_to_end(&mut got).await.expect("it ends well");
                        write.write_all(out).await.expect("it is still open");
                        write.shutdown().await.expect("it is open");
                    }
                    got
                };
                let both = async {
                    tokio::join!(
                        exchange(Box::new(client), &up, client_first),
                        exchange(Box::new(tunnel.stream), &down, !client_first)
                    )
                };
                let (at_client, at_proxy) = within(both).await;
                assert!(at_client == down && at_proxy == up, "{way:?}, {client_first}");
            }
            for (name, value) in [("upstream_rq_active", 0), ("upstream_rq_total", 2)] {
                stat(&server, &format!("cluster.a.{name}"), value).await;
            }
            stat(&server, "tcp.a.downstream_cx_rx_bytes_total", 2 << 20).await;
            stat(&server, "tcp.a.downstream_cx_tx_bytes_total", 2 << 20).await;
            // Once, with what HTTP/2 puts around them.
            let once = (2 << 20)..(2 << 20) + 100_000;
            for name in ["tx", "rx"] {
                let name = format!("cluster.a.upstream_cx_{name}_bytes_total");
                let counted = async {
                    while !once.contains(&server.store.number(&name)) {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                };
                within(counted).await;
            }
        }
    }

    async fn bytes_wait_for_a_proxy_that_does_not_read() {
        let up = bytes(2, 16 << 20);
        for way in WAYS {
            let mut proxy = Proxy::new(way, &[]).await;
            let server = asked(way, proxy.port, "", "").await;
            let (mut read, mut write) = connect(&server, "l").await.into_split();
            let mut tunnel = proxy.next().await;
            let take = async {
                let waits = async {
                    while server.store.number("cluster.a.upstream_cx_tx_bytes_buffered") == 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                };
                within(waits).await;
                let mut got = vec![0; up.len()];
                tunnel.stream.read_exact(&mut got).await.expect("so many come");
                got
            };
            // The last of them come though the client says nothing more, and does not end either.
            let (sent, got) = within(async { tokio::join!(write.write_all(&up), take) }).await;
            sent.expect("it is open");
            assert!(got == up, "{way:?}");
            write.shutdown().await.expect("it is open");
            let ended = within(tunnel.stream.read_to_end(&mut Vec::new())).await;
            assert_eq!(ended.expect("it ends well"), 0, "{way:?}");
            drop(tunnel.stream);
            let mut rest = Vec::new();
            within(read.read_to_end(&mut rest)).await.expect("it ends well");
            assert_eq!(rest, b"", "{way:?}");
        }
    }

    async fn tunnels_over_http2_share_a_connection() {
        for way in [Http2Connect, Http2Post] {
            let mut proxy = Proxy::new(way, &[]).await;
            let server = asked(way, proxy.port, "", "").await;
            let mut all = Vec::new();
            for _ in 0..5 {
                let client = connect(&server, "l").await;
                let tunnel = proxy.next().await;
                assert_eq!(tunnel.connection, 1);
                all.push((client, tunnel));
            }
            for (number, (client, tunnel)) in all.iter_mut().enumerate() {
                client.write_all(&[number as u8]).await.expect("it is open");
                assert_eq!(within(tunnel.stream.read_u8()).await.expect("it comes"), number as u8);
            }
            for (name, value) in [("upstream_cx_total", 1), ("upstream_cx_http2_total", 1), ("upstream_rq_active", 5)] {
                stat(&server, &format!("cluster.a.{name}"), value).await;
            }
            drop(all);
            stat(&server, "cluster.a.upstream_rq_active", 0).await;
            // It rests in its pool.
            stat(&server, "cluster.a.upstream_cx_active", 1).await;
        }
    }

    async fn a_refused_tunnel_is_a_failed_attempt() {
        for way in WAYS {
            let dir = tempfile::tempdir().expect("a directory");
            let log = dir.path().join("log");
            const REFUSALS: &[Answer] = &[Answer::Only(403), Answer::Only(403), Answer::Only(503), Answer::Hinted];
            let mut proxy = Proxy::new(way, REFUSALS).await;
            let format = "%RESPONSE_FLAGS% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %FILTER_STATE(envoy.tcp_proxy.propagate_response_headers)% %UPSTREAM_TRANSPORT_FAILURE_REASON%";
            let more = format!(", max_connect_attempts: 2{}", access_log(&log, format));
            let server = asked(way, proxy.port, ", propagate_response_headers: true", &more).await;
            assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"", "{way:?}");
            stat(&server, "cluster.a.upstream_cx_connect_attempts_exceeded", 1).await;
            // The second attempt of the next one is good.
            let mut client = connect(&server, "l").await;
            let mut last = proxy.next().await;
            for _ in 0..3 {
                last = proxy.next().await;
            }
            last.stream.write_all(b"hello").await.expect("it is open");
            assert_eq!(read(&mut client, 5).await, "hello", "{way:?}");
            drop((client, last));
            stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
            server.shut_down();
            let lines = std::fs::read_to_string(&log).expect("it was written");
            let mut lines = lines.lines();
            let first = lines.next().expect("a line");
            assert!(first.starts_with("UF,URX 2 {\"headers\":[{\"key\":\":status\",\"value\":\"403\"},{\"key\":\"x-from\",\"value\":\"proxy\"}"), "{way:?}: {first}");
            let method = if way.is_post() { "POST" } else { "CONNECT" };
            let reason = format!("delayed_connect_error:_the_proxy_answered_{method}_with_status_403");
            assert!(first.ends_with(&reason), "{way:?}: {first}");
            let second = lines.next().expect("another");
            assert!(second.contains(" 2 {\"headers\":[{\"key\":\":status\",\"value\":\"200\"},{\"key\":\"x-from\",\"value\":\"proxy\"}"), "{way:?}: {second}");
        }
    }

    async fn an_answer_that_ends_at_once_opens_no_tunnel() {
        for way in [Http1Post, Http2Connect, Http2Post] {
            let proxy = Proxy::new(way, &[Answer::Only(200)]).await;
            let server = asked(way, proxy.port, "", "").await;
            assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"", "{way:?}");
            stat(&server, "cluster.a.upstream_cx_connect_attempts_exceeded", 1).await;
        }
    }

    async fn refusals_count_against_a_host() {
        for way in WAYS {
            let proxy = Proxy::new(way, &[Answer::Only(403); 2]).await;
            let server = server(1);
            let (name, config) = tcp_proxy("a", &way.tunneling(""));
            let outlier = "outlier_detection: {split_external_local_origin_errors: true, consecutive_local_origin_failure: 2, enforcing_consecutive_local_origin_failure: 100, max_ejection_percent: 100}";
            apply(&server, vec![
                static_cluster("a", &[proxy.port], &format!("{}\n{outlier}", way.cluster())),
                tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
            ]).await;
            for _ in 0..2 {
                assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
            }
            stat(&server, "cluster.a.outlier_detection.ejections_enforced_consecutive_local_origin_failure", 1).await;
        }
    }

    async fn a_proxy_that_says_nothing_is_given_up() {
        for way in WAYS {
            let dir = tempfile::tempdir().expect("a directory");
            let log = dir.path().join("log");
            let mut proxy = Proxy::new(way, &[Answer::Silence]).await;
            let server = server(1);
            let (name, config) = tcp_proxy("a", &format!("{}{}", way.tunneling(""), access_log(&log, "%RESPONSE_FLAGS%")));
            apply(&server, vec![
                static_cluster("a", &[proxy.port], &format!("connect_timeout: 0.1s\n{}", way.cluster())),
                tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
            ]).await;
            assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"", "{way:?}");
            let mut tunnel = proxy.next().await;
            if way.is_http2() {
                let reason = within(tunnel.broken.recv()).await;
                assert_eq!(reason.as_deref(), Some("CANCEL"));
            }
            stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
            server.shut_down();
            assert_eq!(std::fs::read_to_string(&log).expect("it was written"), "UF,URX\n");
        }
    }

    async fn a_reset_passes_both_ways() {
        for way in WAYS {
            let mut proxy = Proxy::new(way, &[]).await;
            let server = asked(way, proxy.port, "", "").await;
            let mut client = connect(&server, "l").await;
            let mut tunnel = proxy.next().await;
            client.write_all(b"x").await.expect("it is open");
            assert_eq!(within(tunnel.stream.read_u8()).await.expect("it comes"), b'x');
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("it is open");
            drop(client);
            let how = within(tunnel.broken.recv()).await.expect("it is broken");
            let expected = if way.is_http2() { "CANCEL" } else { "connection reset" };
            assert_eq!(how, expected, "{way:?}");
            if way == Http1Connect {
                // The same as without a tunnel.
                continue;
            }
            let mut client = connect(&server, "l").await;
            let tunnel = proxy.next().await;
            client.write_all(b"x").await.expect("it is open");
            tunnel.breaks.send(()).expect("the proxy lives");
            assert_eq!(rest(&mut client).await, None, "{way:?}");
        }
    }

    async fn what_is_known_of_a_tunnel_stands_in_the_log() {
        let uuid = type_url("request_id.uuid.v3.UuidRequestIdConfig");
        for way in WAYS {
            for (names, header, key) in [
                ("", "x-request-id", "tunnel_request_id"),
                (", request_id_header: X-Tunnel, request_id_metadata_key: id", "x-tunnel", "id"),
            ] {
                let dir = tempfile::tempdir().expect("a directory");
                let log = dir.path().join("log");
                let mut proxy = Proxy::new(way, &[]).await;
                let format = format!("%DYNAMIC_METADATA(envoy.filters.network.tcp_proxy:{key})% %FILTER_STATE(envoy.tcp_proxy.propagate_response_trailers)% %FILTER_STATE(envoy.tcp_proxy.propagate_response_headers)% %BYTES_RECEIVED% %BYTES_SENT% %RESPONSE_FLAGS%");
                let tunneling = format!(
                    ", propagate_response_trailers: true, request_id_extension: {{typed_config: {{{uuid}}}}}{names}, headers_to_add: [{{header: {{key: x-same, value: \"%DYNAMIC_METADATA(envoy.filters.network.tcp_proxy:{key})%\"}}}}]"
                );
                let server = asked(way, proxy.port, &tunneling, &access_log(&log, &format)).await;
                let mut ids = Vec::new();
                for _ in 0..2 {
                    let mut client = connect(&server, "l").await;
                    let mut tunnel = proxy.next().await;
                    let find = |name: &str| {
                        let mut lines = tunnel.head.lines();
                        let value = lines.find_map(|line| line.strip_prefix(name)).expect("it is there");
                        value.trim_start_matches([':', ' ']).to_owned()
                    };
                    assert_eq!(find(header), find("x-same"));
                    ids.push(find(header));
                    assert_eq!(tunnel.head.contains("x-request-id"), names.is_empty());
                    client.write_all(b"question").await.expect("it is open");
                    client.shutdown().await.expect("it is open");
                    let mut got = String::new();
                    within(tunnel.stream.read_to_string(&mut got)).await.expect("it ends well");
                    tunnel.stream.write_all(b"answer").await.expect("it is open");
                    tunnel.stream.shutdown().await.expect("it is open");
                    assert_eq!(rest(&mut client).await.as_deref(), Some(&b"answer"[..]));
                }
                assert_ne!(ids[0], ids[1]);
                stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
                server.shut_down();
                let lines = std::fs::read_to_string(&log).expect("it was written");
                let trailers = match way {
                    Http1Connect => "-",
                    _ => "{\"headers\":[{\"key\":\"x-bytes\",\"value\":\"all\"}]}",
                };
                let expected: Vec<_> = ids.iter().map(|id| format!("{id} {trailers} - 8 6 -")).collect();
                assert_eq!(lines.lines().collect::<Vec<_>>(), expected, "{way:?}");
            }
        }
    }
}

type DuplexOrTcp = Box<dyn Both>;
trait Both: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Both for T {}
