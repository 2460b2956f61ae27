//! HTTP/2 on both sides, frame by frame.

use std::{cell::Cell, rc::Rc, time::Duration};

use testkit::frames::{
    ACK, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, POST, RST_STREAM, SETTINGS,
    frame,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use super::support::{Act, Mesh, OK, Origin, TO_A, run, within};

const HTTP2: &str = "typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    explicit_http_config: {http2_protocol_options: {OPTIONS}}";

fn http2(options: &str) -> String {
    HTTP2.replace("OPTIONS", options)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// `:status: 200`.
const STATUS_200: &[u8] = &[0x88];

#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// One side of a connection, by hand.
pub(crate) struct Peer(TcpStream);

impl Peer {
    /// A client that has said its preface and settings.
    pub(crate) async fn client(mesh: &Mesh) -> Peer {
        let mut stream = mesh.connect().await;
        stream.write_all(PREFACE).await.unwrap();
        let mut peer = Peer(stream);
        peer.say(SETTINGS, 0, 0, &[]).await;
        peer
    }

    /// A server that has read the preface and sent these settings.
    pub(crate) async fn server(mut stream: TcpStream, settings: &[u8]) -> Peer {
        let mut preface = [0; 24];
        stream.read_exact(&mut preface).await.unwrap();
        assert_eq!(preface, PREFACE);
        let mut peer = Peer(stream);
        peer.say(SETTINGS, 0, 0, settings).await;
        peer
    }

    pub(crate) async fn say(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        // A peer that has gone away is seen by who reads.
        let _ = self.0.write_all(&frame(kind, flags, stream, payload)).await;
    }

    async fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        Some(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            payload,
        })
    }

    /// The next frame of one of these kinds; `None` at the end.
    pub(crate) async fn find(&mut self, kinds: &[u8]) -> Option<Frame> {
        within(async {
            loop {
                let frame = self.next().await?;
                if kinds.contains(&frame.kind) {
                    return Some(frame);
                }
            }
        })
        .await
    }

    /// Whether the stream is answered with 200 and no more.
    pub(crate) async fn is_answered(&mut self) -> bool {
        let frame = self.find(&[HEADERS, RST_STREAM, GOAWAY]).await;
        frame.is_some_and(|frame| frame.kind == HEADERS && frame.payload.starts_with(STATUS_200))
    }
}

/// Waits until a stat has this value: what a peer sees may come before it is counted.
pub(crate) async fn counted(mesh: &Mesh, name: &str, value: i64) {
    let wait = async {
        while mesh.server.store.number(name) != value {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let late = tokio::time::timeout(Duration::from_secs(20), wait)
        .await
        .is_err();
    assert!(
        !late,
        "{name} is {}, not {value}",
        mesh.server.store.number(name)
    );
}

/// An origin whose every connection one function serves.
async fn origin<F>(serve: impl Fn(usize, TcpStream) -> F + 'static) -> (u16, Rc<Cell<usize>>)
where
    F: Future<Output = ()> + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Rc::new(Cell::new(0));
    let count = connections.clone();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn_local(serve(count.get(), stream));
            count.set(count.get() + 1);
        }
    });
    (port, connections)
}

#[test]
fn streams_that_the_upstream_did_not_look_at_are_sent_again_even_posts() {
    // The first connection says GOAWAY with last stream 0, or refuses the stream.
    for refusal in [
        frame(GOAWAY, 0, 0, &[0; 8]),
        frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]),
        frame(RST_STREAM, 0, 1, &[0, 0, 0, 7]),
    ] {
        run(async move {
            let (port, _) = origin(move |_, stream| {
                let refusal = refusal.clone();
                async move {
                    let mut peer = Peer::server(stream, &[]).await;
                    while let Some(request) = peer.find(&[HEADERS]).await {
                        let body = peer.find(&[DATA]).await.unwrap();
                        assert_eq!(body.payload, b"abc");
                        if SEEN.with(|seen| seen.replace(true)) {
                            peer.say(
                                HEADERS,
                                END_HEADERS | END_STREAM,
                                request.stream,
                                STATUS_200,
                            )
                            .await;
                        } else {
                            peer.0.write_all(&refusal).await.unwrap();
                        }
                    }
                }
            })
            .await;
            SEEN.with(|seen| seen.set(false));
            let mesh = Mesh::with(TO_A, "", "", &[("a", port)], &http2("")).await;
            let answer = mesh
                .ask("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
                .await;
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
            assert_eq!(mesh.log(1).await, "POST / 200 - via_upstream 2\n");
            assert_eq!(mesh.server.store.number("cluster.a.upstream_rq_retry"), 0);
        });
    }
}

thread_local! {
    /// A request has been refused.
    static SEEN: Cell<bool> = const { Cell::new(false) };
}

#[test]
fn another_connection_is_opened_before_the_streams_of_one_are_used_up() {
    run(async {
        // 10 streams a connection, none of which is ever answered.
        let (port, connections) = origin(|_, stream| async {
            let mut peer = Peer::server(stream, &[0, 3, 0, 0, 0, 10]).await;
            while peer.next().await.is_some() {}
        })
        .await;
        let mesh = Mesh::with(TO_A, "", "", &[("a", port)], &http2("")).await;
        let mut client = Peer::client(&mesh).await;
        let mut stream = 1;
        for (streams, expected) in [(8, 1), (9, 2), (17, 2), (18, 3), (25, 3)] {
            while (stream - 1) / 2 < streams {
                client
                    .say(HEADERS, END_HEADERS | END_STREAM, stream, GET)
                    .await;
                stream += 2;
                let count = i64::from((stream - 1) / 2);
                counted(&mesh, "cluster.a.upstream_rq_active", count).await;
            }
            within(async {
                while connections.get() < expected {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
            .await;
            assert_eq!(connections.get(), expected, "at {streams} streams");
        }
    });
}

#[test]
fn a_peer_that_takes_no_streams_is_waited_for_on_one_connection() {
    run(async {
        let (port, connections) = origin(|_, stream| async {
            let mut peer = Peer::server(stream, &[0, 3, 0, 0, 0, 0]).await;
            // The first request comes before our settings are known; nobody answers it.
            while peer.next().await.is_some() {}
        })
        .await;
        let routes = "          - {match: {prefix: /}, route: {cluster: a, timeout: 0.3s}}";
        let mesh = Mesh::with(routes, "", "", &[("a", port)], &http2("")).await;
        let (first, second) = tokio::join!(mesh.get("/1"), async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            mesh.get("/2").await
        });
        assert!(first.starts_with("HTTP/1.1 504"), "{first}");
        assert!(second.starts_with("HTTP/1.1 504"), "{second}");
        assert_eq!(connections.get(), 1);
    });
}

#[test]
fn peers_that_do_not_answer_pings_are_given_up_on_both_sides() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let options =
            "http2_protocol_options: {connection_keepalive: {interval: 0.02s, timeout: 1s}}";
        let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let mut client = Peer::client(&mesh).await;
        // Who answers stays.
        for _ in 0..5 {
            let ping = client.find(&[PING]).await.unwrap();
            assert_eq!(ping.flags & ACK, 0);
            client.say(PING, ACK, 0, &ping.payload).await;
        }
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        let answer = loop {
            let frame = client.find(&[HEADERS, PING]).await.unwrap();
            if frame.kind == HEADERS {
                break frame;
            }
            client.say(PING, ACK, 0, &frame.payload).await;
        };
        assert!(answer.payload.starts_with(STATUS_200));
        // Who does not is gone.
        while client.find(&[PING]).await.is_some() {}
        counted(&mesh, "http2.keepalive_timeout", 1).await;
    });
    run(async {
        let (port, connections) = origin(|number, stream| async move {
            let mut peer = Peer::server(stream, &[]).await;
            while let Some(frame) = peer.next().await {
                if frame.kind == HEADERS && number > 0 {
                    peer.say(HEADERS, END_HEADERS | END_STREAM, frame.stream, STATUS_200)
                        .await;
                }
                if frame.kind == PING && number > 0 {
                    peer.say(PING, ACK, 0, &frame.payload).await;
                }
            }
        })
        .await;
        let options = "connection_keepalive: {interval: 0.02s, timeout: 1s}";
        let mesh = Mesh::with(TO_A, "", "", &[("a", port)], &http2(options)).await;
        // Nobody answered on a connection that had just been opened: that may be the request's fault.
        let first = mesh.get("/").await;
        assert!(first.starts_with("HTTP/1.1 503"), "{first}");
        let second = mesh.get("/").await;
        assert!(second.starts_with("HTTP/1.1 200"), "{second}");
        assert_eq!(connections.get(), 2);
        counted(&mesh, "cluster.a.http2.keepalive_timeout", 1).await;
    });
}

#[test]
fn floods_end_with_goaway_enhance_your_calm() {
    // RST_STREAM after each HEADERS; DATA without payload; PRIORITY; WINDOW_UPDATE.
    let reset = |n: u32| {
        [
            frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, GET),
            frame(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]),
        ]
        .concat()
    };
    let begin = || frame(HEADERS, END_HEADERS, 1, POST);
    let with = |begin: Vec<u8>, flood: Vec<u8>| [begin, flood.repeat(400)].concat();
    let floods: [(&str, Vec<u8>); 6] = [
        (
            "http.test.downstream_rq_too_many_premature_resets",
            (0..2000).flat_map(reset).collect(),
        ),
        (
            "http2.inbound_empty_frames_flood",
            with(begin(), frame(DATA, 0, 1, &[])),
        ),
        (
            "http2.inbound_priority_frames_flood",
            with(begin(), frame(2, 0, 1, &[0, 0, 0, 3, 1])),
        ),
        (
            "http2.inbound_window_update_frames_flood",
            with(begin(), frame(8, 0, 0, &[0, 0, 0, 1])),
        ),
        (
            "http2.outbound_control_flood",
            frame(6, 0, 0, &[0; 8]).repeat(1100),
        ),
        (
            "http2.outbound_control_flood",
            frame(4, 0, 0, &[]).repeat(1100),
        ),
    ];
    for (stat, bytes) in floods {
        run(async move {
            let origin = Origin::new(&[Act::Hang; 32]).await;
            let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
            let mut client = Peer::client(&mesh).await;
            let _ = client.0.write_all(&bytes).await;
            let mut last = None;
            while let Some(goaway) = client.find(&[GOAWAY]).await {
                last = Some(goaway);
            }
            // A close that overtakes the frame is a close, too; that it is one of ours tells the stat.
            if let Some(goaway) = last {
                assert_eq!(goaway.payload[4..8], [0, 0, 0, 11], "{stat}");
            }
            if stat.contains("premature") {
                // `h2` itself ends a connection whose resets come faster than we accept.
                counted(&mesh, "http.test.downstream_cx_http2_active", 0).await;
                let ours = mesh.server.store.number(stat);
                let codecs = mesh
                    .server
                    .store
                    .number("http.test.downstream_cx_protocol_error");
                assert!(ours + codecs > 0);
                assert!(origin.seen().len() < 600);
            } else {
                counted(&mesh, stat, 1).await;
            }
        });
    }
}

#[test]
fn a_client_that_does_not_take_the_rest_of_a_response_is_waited_for_no_longer_than_it_may() {
    run(async {
        const LONG: &str =
            "HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n0123456789012345678901234567890123456789";
        let route = "          - {match: {path: /own}, route: {cluster: a, flush_timeout: 0.2s, idle_timeout: 0s}}
          - {match: {path: /ours}, direct_response: {status: 200, body: {inline_string: \"0123456789012345678901234567890123456789\"}}}
          - {match: {prefix: /}, route: {cluster: a, idle_timeout: 0s}}";
        for (path, options) in [
            ("/", "stream_flush_timeout: 0.2s"),
            ("/ours", "stream_flush_timeout: 0.2s"),
            ("/own", "stream_flush_timeout: 3600s"),
        ] {
            let origin = Origin::new(&[Act::Say(LONG)]).await;
            let mesh = Mesh::new(route, options, "", &[("a", origin.port)]).await;
            let mut client = Peer::client(&mesh).await;
            // INITIAL_WINDOW_SIZE: 10 bytes of each stream.
            client.say(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 10]).await;
            let mut head = vec![0x82, 0x86, 0x41, 1, b'h', 0x44, path.len() as u8];
            head.extend(path.as_bytes());
            client
                .say(HEADERS, END_HEADERS | END_STREAM, 1, &head)
                .await;
            let data = client.find(&[DATA]).await.unwrap();
            assert_eq!(data.payload, b"0123456789");
            let reset = client.find(&[RST_STREAM]).await.unwrap();
            assert_eq!(reset.stream, 1, "{path}");
            counted(&mesh, "http2.tx_flush_timeout", 1).await;
            counted(&mesh, "http.test.downstream_rq_idle_timeout", 0).await;
        }
    });
}

/// A field that no table has, as a literal without Huffman code.
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let mut block = vec![0, name.len() as u8];
    block.extend(name.as_bytes());
    match value.len() {
        short @ ..127 => block.push(short as u8),
        long => {
            block.push(127);
            let mut rest = long - 127;
            while rest >= 128 {
                block.push(rest as u8 | 128);
                rest >>= 7;
            }
            block.push(rest as u8);
        }
    }
    block.extend(value);
    block
}

/// A request with one more field, in as many frames as it needs.
fn get_with(name: &str, value: &[u8]) -> Vec<u8> {
    let block = [GET, &field(name, value)].concat();
    let pieces: Vec<_> = block.chunks(16_000).collect();
    let mut bytes = Vec::new();
    for (number, piece) in pieces.iter().enumerate() {
        let (kind, first) = match number {
            0 => (HEADERS, END_STREAM),
            _ => (9, 0),
        };
        let last = if number + 1 == pieces.len() {
            END_HEADERS
        } else {
            0
        };
        bytes.extend(frame(kind, first | last, 1, piece));
    }
    bytes
}

/// What a SETTINGS frame says of an identifier.
fn said(settings: &Frame, identifier: u16) -> Option<u32> {
    let mut list = settings.payload.chunks(6);
    let found = list.find(|s| s[..2] == identifier.to_be_bytes())?;
    Some(u32::from_be_bytes([found[2], found[3], found[4], found[5]]))
}

#[test]
fn custom_settings_are_said_to_peers_on_both_sides() {
    run(async {
        let custom = "custom_settings_parameters: [{identifier: 3, value: 7}, {identifier: 4, value: 70000}, \
                      {identifier: 0x10, value: 5}, {identifier: 0x10, value: 5}, {identifier: 65535, value: 4294967295}]";
        let heard = Rc::new(Cell::new(None));
        let hear = heard.clone();
        let (port, _) = origin(move |_, stream| {
            let hear = hear.clone();
            async move {
                let mut peer = Peer::server(stream, &[]).await;
                let settings = peer.find(&[SETTINGS]).await.unwrap();
                hear.set(Some(
                    [4, 0x10, 65_535].map(|identifier| said(&settings, identifier)),
                ));
                peer.find(&[HEADERS]).await.unwrap();
                peer.say(HEADERS, END_HEADERS | END_STREAM, 1, STATUS_200)
                    .await;
                peer.find(&[GOAWAY]).await;
            }
        })
        .await;
        let options = format!("http2_protocol_options: {{{custom}}}");
        let upstream = http2(custom);
        let mesh = Mesh::with(TO_A, &options, "", &[("a", port)], &upstream).await;
        let mut client = Peer::client(&mesh).await;
        let settings = client.find(&[SETTINGS]).await.unwrap();
        let all = [3, 4, 0x10, 65_535].map(|identifier| said(&settings, identifier));
        assert_eq!(all, [Some(7), Some(70_000), Some(5), Some(u32::MAX)]);
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        assert!(client.is_answered().await);
        assert_eq!(heard.get(), Some([Some(70_000), Some(5), Some(u32::MAX)]));
        // The eighth stream at once is one too many: what was said counts.
        for stream in 0..8 {
            client.say(HEADERS, END_HEADERS, 3 + 2 * stream, POST).await;
        }
        let refused = client.find(&[RST_STREAM]).await.unwrap();
        assert_eq!(
            (refused.stream, &refused.payload[..]),
            (17, &[0, 0, 0, 7][..])
        );
    });
}

#[test]
fn strings_are_said_in_huffman_code_unless_that_is_off() {
    run(async {
        const PLAIN: &[u8] = b"a-value-that-can-be-read";
        for (options, coded) in [("", true), ("enable_huffman_encoding: false", false)] {
            let answer = Act::Say(
                "HTTP/1.1 200 OK\r\nx-name: a-value-that-can-be-read\r\nContent-Length: 2\r\n\r\nok",
            );
            let origin = Origin::new(&[answer]).await;
            let options = format!("http2_protocol_options: {{{options}}}");
            let mesh = Mesh::new(TO_A, &options, "", &[("a", origin.port)]).await;
            let mut client = Peer::client(&mesh).await;
            client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
            let head = client.find(&[HEADERS]).await.unwrap();
            let readable = head.payload.windows(PLAIN.len()).any(|at| at == PLAIN);
            assert_eq!(readable, !coded);
        }
    });
}

#[test]
fn a_field_may_be_as_long_and_have_such_bytes_as_the_options_say() {
    run(async {
        let long = vec![b'x'; 70 << 10];
        // `:status: 431` has no entry of its own, so that it begins with a literal.
        for (options, value, good) in [
            ("", &long[..], true),
            ("max_header_field_size_kb: 64", &long[..], false),
            ("max_header_field_size_kb: 100", &long[..], true),
            ("", b"\xff", true),
            ("disallow_obs_text: false", b"\xff", true),
            ("disallow_obs_text: true", b"\xff", false),
            ("disallow_obs_text: true", b"plain", true),
        ] {
            let origin = Origin::new(&[OK]).await;
            let options =
                format!("max_request_headers_kb: 200\n      http2_protocol_options: {{{options}}}");
            let mesh = Mesh::new(TO_A, &options, "", &[("a", origin.port)]).await;
            let mut client = Peer::client(&mesh).await;
            client
                .0
                .write_all(&get_with("x-long", value))
                .await
                .unwrap();
            assert_eq!(
                client.is_answered().await,
                good,
                "{options}: {}",
                value.len()
            );
            assert_eq!(origin.seen().len(), usize::from(good));
        }
    });
}

#[test]
fn a_client_may_reset_as_many_streams_as_the_options_say() {
    run(async {
        for (options, ends) in [
            ("", false),
            ("stream_reset_burst: 3, stream_reset_rate: 1", true),
        ] {
            let origin = Origin::new(&[Act::Hang; 8]).await;
            let options = format!("http2_protocol_options: {{{options}}}");
            let mesh = Mesh::new(TO_A, &options, "", &[("a", origin.port)]).await;
            let mut client = Peer::client(&mesh).await;
            for number in 0..6 {
                let stream = 2 * number + 1;
                client
                    .say(HEADERS, END_HEADERS | END_STREAM, stream, GET)
                    .await;
                client.say(RST_STREAM, 0, stream, &[0, 0, 0, 8]).await;
            }
            // What comes behind is answered, or too late.
            client.say(PING, 0, 0, &[7; 8]).await;
            let next = async |client: &mut Peer| loop {
                match client.find(&[PING, GOAWAY]).await {
                    Some(frame) if frame.kind == PING && frame.flags & ACK == 0 => {}
                    other => break other,
                }
            };
            let frame = next(&mut client).await;
            assert_eq!(frame.is_none_or(|frame| frame.kind == GOAWAY), ends);
        }
    });
}

#[test]
fn a_long_stream_may_hold_many_empty_frames() {
    run(async {
        let (port, _) = origin(|_, stream| async {
            let mut peer = Peer::server(stream, &[]).await;
            let request = peer.find(&[HEADERS]).await.unwrap();
            peer.say(HEADERS, END_HEADERS, request.stream, STATUS_200)
                .await;
            for _ in 0..300 {
                peer.say(DATA, 0, request.stream, b"x").await;
                peer.say(DATA, 0, request.stream, b"").await;
            }
            peer.say(DATA, END_STREAM, request.stream, b"!").await;
            while peer.next().await.is_some() {}
        })
        .await;
        let mesh = Mesh::with(TO_A, "", "", &[("a", port)], &http2("")).await;
        let mut client = Peer::client(&mesh).await;
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        assert!(client.is_answered().await);
        let mut body = Vec::new();
        loop {
            let data = client.find(&[DATA, RST_STREAM, GOAWAY]).await.unwrap();
            assert_eq!(data.kind, DATA);
            body.extend(data.payload);
            if data.flags & END_STREAM != 0 {
                break;
            }
        }
        assert_eq!(body.len(), 301);
    });
}

#[test]
fn a_client_that_does_not_speak_http2_is_told_so() {
    run(async {
        let mesh = Mesh::new(TO_A, "codec_type: HTTP2", "", &[("a", 1)]).await;
        let mut peer = Peer(mesh.connect().await);
        peer.0
            .write_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
            .await
            .unwrap();
        let goaway = peer.find(&[GOAWAY]).await.unwrap();
        assert_eq!(goaway.payload, [0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(peer.next().await.is_none());
    });
}

#[test]
fn an_invalid_message_ends_its_stream_or_by_default_its_connection() {
    for (option, kind) in [
        ("", GOAWAY),
        (
            "override_stream_error_on_invalid_http_message: true",
            RST_STREAM,
        ),
    ] {
        run(async move {
            let origin = Origin::new(&[OK]).await;
            let options = format!("http2_protocol_options: {{{option}}}");
            let mesh = Mesh::new(TO_A, &options, "", &[("a", origin.port)]).await;
            let mut client = Peer::client(&mesh).await;
            // `te: x` may not be.
            let head = [GET, &[0, 2, b't', b'e', 1, b'x']].concat();
            client
                .say(HEADERS, END_HEADERS | END_STREAM, 1, &head)
                .await;
            let first = client.find(&[RST_STREAM, GOAWAY]).await.unwrap();
            assert_eq!(first.kind, RST_STREAM);
            assert_eq!((first.stream, &first.payload[..]), (1, &[0, 0, 0, 1][..]));
            if kind == GOAWAY {
                let goaway = client.find(&[GOAWAY]).await.unwrap();
                assert_eq!(goaway.payload[4..8], [0, 0, 0, 1]);
                assert!(client.next().await.is_none());
            } else {
                client.say(HEADERS, END_HEADERS | END_STREAM, 3, GET).await;
                assert!(client.is_answered().await);
            }
            counted(&mesh, "http2.rx_messaging_error", 1).await;
        });
    }
}

#[test]
fn a_client_that_does_not_answer_a_goaway_opens_streams_for_the_drain_time_alone() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let options = "common_http_protocol_options: {max_requests_per_connection: 1}\n      drain_timeout: 0.05s";
        let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let mut client = Peer::client(&mesh).await;
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        // All streams may still come; the PING behind it is not answered.
        let first = client.find(&[GOAWAY]).await.unwrap();
        assert_eq!(first.payload[..4], [0x7f, 0xff, 0xff, 0xff]);
        let last = client.find(&[GOAWAY]).await.unwrap();
        assert_eq!(last.payload[..4], [0, 0, 0, 1]);
        assert!(client.find(&[GOAWAY]).await.is_none(), "it ends");
    });
}

#[test]
fn a_reply_that_nobody_takes_is_given_up() {
    run(async {
        let routes = "          - {match: {prefix: /}, direct_response: {status: 418, body: {inline_string: tea}}}";
        let mesh = Mesh::new(routes, "stream_idle_timeout: 0.05s", "", &[]).await;
        let mut client = Peer::client(&mesh).await;
        // SETTINGS_INITIAL_WINDOW_SIZE 0: no byte of a body may be sent.
        client.say(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]).await;
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        let end = client.find(&[RST_STREAM, GOAWAY]).await.unwrap();
        assert_eq!((end.kind, end.stream), (RST_STREAM, 1));
        counted(&mesh, "http.test.downstream_rq_active", 0).await;
    });
}

#[test]
fn a_stream_that_breaks_the_protocol_is_answered_with_502() {
    // The upstream says so, or its answer is none: a status that is no number.
    let invalid: &[u8] = &[0x48, 3, b'a', b'b', b'c'];
    for (frame, line) in [
        (
            (RST_STREAM, 0, &[0, 0, 0, 1][..]),
            "GET / 502 UPE upstream_reset_before_response_started{protocol_error} 1\n",
        ),
        (
            (HEADERS, END_HEADERS | END_STREAM, invalid),
            "GET / 502 UPE upstream_reset_before_response_started{protocol_error} 1\n",
        ),
        (
            (RST_STREAM, 0, &[0, 0, 0, 10][..]),
            "GET / 503 UR upstream_reset_before_response_started{remote_error_with_CONNECT_request} 1\n",
        ),
    ] {
        run(async move {
            let (port, _) = origin(move |_, stream| async move {
                let mut peer = Peer::server(stream, &[]).await;
                while let Some(request) = peer.find(&[HEADERS]).await {
                    let (kind, flags, payload) = frame;
                    peer.say(kind, flags, request.stream, payload).await;
                }
            })
            .await;
            let mesh = Mesh::with(TO_A, "", "", &[("a", port)], &http2("")).await;
            mesh.get("/").await;
            assert_eq!(mesh.log(1).await, line);
        });
    }
}

#[test]
fn the_scheme_is_the_clients() {
    run(async {
        let (port, _) = origin(|_, stream| async {
            let mut peer = Peer::server(stream, &[]).await;
            while let Some(request) = peer.find(&[HEADERS]).await {
                // Entry 7 of the static table is `:scheme: https`, 6 is that of http.
                let https = request.payload.iter().take(4).any(|&byte| byte == 0x87);
                let status = if https { 0x88 } else { 0x8d };
                let last = END_HEADERS | END_STREAM;
                peer.say(HEADERS, last, request.stream, &[status]).await;
            }
        })
        .await;
        let mesh = Mesh::with(TO_A, "", "", &[("a", port)], &http2("")).await;
        let mut client = Peer::client(&mesh).await;
        // A proxy before this one has ended TLS, but is not believed: it is no reason to call this one HTTP.
        let get = [0x82, 0x84, 0x87, 0x41, 1, b'h'];
        let last = END_HEADERS | END_STREAM;
        client.say(HEADERS, last, 1, &get).await;
        assert!(client.is_answered().await);
        // HTTP/1 says none: that of the connection.
        let answer = mesh.get("/").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    });
}
