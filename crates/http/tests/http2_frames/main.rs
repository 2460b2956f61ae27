//! HTTP/2 with a peer that says every frame by hand.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use outrigger_http::{
    Error, Frame, Framing, Headers, Method, RequestHead, ResponseHead, Version, h2,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf},
    task::spawn_local,
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// `GET http://h/` and `POST http://h/`.
const GET: &[u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'h'];
const POST: &[u8] = &[0x83, 0x86, 0x84, 0x41, 1, b'h'];

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// `(kind, flags, stream, payload)`.
type Seen = (u8, u8, u32, Vec<u8>);

struct Peer(DuplexStream);

impl Peer {
    async fn say(&mut self, frames: &[Vec<u8>]) {
        self.0.write_all(&frames.concat()).await.unwrap();
    }

    async fn next(&mut self) -> Option<Seen> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some((head[3], head[4], stream, payload))
    }

    /// The next frame of a kind.
    async fn find(&mut self, kind: u8) -> Seen {
        loop {
            let seen = self.next().await.expect("the connection goes on");
            if seen.0 == kind {
                return seen;
            }
        }
    }
}

/// Counts the writes below a connection.
struct Counted(DuplexStream, Rc<Cell<usize>>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, to)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.1.set(self.1.get() + 1);
        Pin::new(&mut self.0).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A server that answers every request with its body's length, once it has all of it.
async fn server_with(settings: h2::Settings) -> (Peer, Rc<Cell<usize>>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let writes = Rc::new(Cell::new(0));
    let io = Counted(far, writes.clone());
    spawn_local(async move {
        let mut server = h2::ServerConnection::handshake(io, &settings)
            .await
            .unwrap();
        while let Ok(Some((head, mut reader, mut writer))) = server.accept().await {
            if head.path() == "/drain" {
                server.drain();
            }
            spawn_local(async move {
                let mut length = 0;
                while let Some(frame) = poll_fn(|cx| reader.poll_frame(cx)).await {
                    match frame {
                        Ok(Frame::Data(data)) => length += data.len(),
                        Ok(Frame::Trailers(_)) => {}
                        Err(_) => return,
                    }
                }
                let mut response = ResponseHead::new(200);
                response.headers.append("x-length", length.to_string());
                let _ = writer.send_response(&response, Framing::Chunked);
                let _ = writer.send_data(Bytes::from(vec![b'x'; 1000]));
                let _ = writer.send_end(None);
            });
        }
    });
    let mut peer = Peer(near);
    peer.0.write_all(h2::PREFACE).await.unwrap();
    peer.say(&[frame(SETTINGS, 0, 0, &[])]).await;
    (peer, writes)
}

async fn server() -> (Peer, Rc<Cell<usize>>) {
    server_with(h2::Settings::default()).await
}

/// A client, its driver running, and the server by hand.
async fn client() -> (h2::ClientHandle, Peer) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (handle, driver) = h2::connect(near, &h2::Settings::default()).await.unwrap();
    spawn_local(driver);
    let mut peer = Peer(far);
    let mut preface = [0; 24];
    peer.0.read_exact(&mut preface).await.unwrap();
    assert_eq!(preface, h2::PREFACE);
    peer.say(&[frame(SETTINGS, 0, 0, &[])]).await;
    (handle, peer)
}

fn get(path: &str) -> RequestHead {
    RequestHead::new(Version::Http11, Method::Get, "host", path)
}

#[test]
fn what_all_streams_say_in_one_turn_leaves_in_one_write() {
    run(async {
        let (mut peer, writes) = server().await;
        peer.find(SETTINGS).await;
        let frames: Vec<_> = (0..50)
            .map(|n| frame(HEADERS, END_HEADERS | END_STREAM, n * 2 + 1, GET))
            .collect();
        let before = writes.get();
        peer.say(&frames).await;
        for n in 0..50 {
            assert_eq!(peer.find(HEADERS).await.2, n * 2 + 1);
            // The end goes with the data.
            let (_, flags, stream, payload) = peer.next().await.unwrap();
            assert_eq!(
                (flags, stream, payload.len()),
                (END_STREAM, n * 2 + 1, 1000)
            );
        }
        // One may hold nothing but the answer to SETTINGS.
        assert!(writes.get() - before <= 2, "{}", writes.get() - before);
    });
}

#[test]
fn data_waits_for_windows_and_goes_on_with_them() {
    run(async {
        let (mut peer, _) = server().await;
        // 300 bytes for each stream.
        peer.say(&[
            frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 1, 44]),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, GET),
        ])
        .await;
        let (_, flags, _, payload) = peer.find(DATA).await;
        assert_eq!((flags, payload.len()), (0, 300));
        peer.say(&[frame(PING, 0, 0, &[7; 8])]).await;
        assert_eq!(
            peer.next().await.unwrap().0,
            PING,
            "nothing goes without a window"
        );
        peer.say(&[frame(WINDOW_UPDATE, 0, 1, &[0, 0, 1, 0])]).await;
        assert_eq!(peer.find(DATA).await.3.len(), 256);
        // A change of the first window counts for streams that are open, too.
        peer.say(&[frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])])
            .await;
        let (_, flags, _, payload) = peer.find(DATA).await;
        assert_eq!((flags, payload.len()), (END_STREAM, 1000 - 300 - 256));
    });
}

#[test]
fn a_writer_is_held_up_by_a_peer_that_does_not_read() {
    run(async {
        let (mut client, mut peer) = client().await;
        let (_response, mut writer) = client.send(&get("/"), Framing::Chunked).unwrap().split();
        let mut taken = 0;
        let piece = Bytes::from(vec![0; 10_000]);
        while poll_fn(|cx| Poll::Ready(writer.poll_ready(cx).is_ready())).await {
            writer.send_data(piece.clone()).unwrap();
            taken += piece.len();
            tokio::task::yield_now().await;
        }
        assert!((65_535..65_535 + 2 * 65_536).contains(&taken), "{taken}");
        let more = (1u32 << 20).to_be_bytes();
        peer.say(&[
            frame(WINDOW_UPDATE, 0, 0, &more),
            frame(WINDOW_UPDATE, 0, 1, &more),
        ])
        .await;
        poll_fn(|cx| writer.poll_ready(cx)).await.unwrap();
        writer
            .send_end(Some(&[("x-end", "1")].into_iter().collect::<Headers>()))
            .unwrap();
        let mut got = 0;
        loop {
            let (kind, flags, _, payload) = peer.next().await.unwrap();
            match kind {
                DATA => got += payload.len(),
                HEADERS if flags & END_STREAM != 0 => break,
                _ => {}
            }
        }
        assert_eq!(got, taken);
    });
}

#[test]
fn windows_are_given_back_as_bodies_are_read() {
    run(async {
        let settings = h2::Settings {
            stream_window: 65_535,
            connection_window: 65_535,
            ..h2::Settings::default()
        };
        let (mut peer, _) = server_with(settings).await;
        peer.say(&[frame(HEADERS, END_HEADERS, 1, POST)]).await;
        for _ in 0..20 {
            peer.say(&[
                frame(DATA, 0, 1, &[0; 16_384]),
                frame(DATA, 0, 1, &[0; 16_384]),
            ])
            .await;
            let mut given = [0, 0];
            while given[0] == 0 || given[1] == 0 {
                let (_, _, stream, payload) = peer.find(WINDOW_UPDATE).await;
                let more = u32::from_be_bytes(payload[..].try_into().unwrap());
                given[stream as usize] += more;
            }
        }
        peer.say(&[frame(DATA, END_STREAM, 1, b"")]).await;
        peer.find(HEADERS).await;
        // More than the window is an error.
        peer.say(&[frame(HEADERS, END_HEADERS, 3, POST)]).await;
        let all = vec![frame(DATA, 0, 3, &[0; 16_384]); 6].concat();
        peer.say(&[all]).await;
        let (kind, _, _, payload) = loop {
            let seen = peer.next().await.unwrap();
            if matches!(seen.0, RST_STREAM | GOAWAY) {
                break seen;
            }
        };
        assert_eq!(
            payload[if kind == GOAWAY { 4 } else { 0 }..][..4],
            [0, 0, 0, 3]
        );
    });
}

#[test]
fn a_connection_drains_in_two_steps() {
    run(async {
        let (mut peer, _) = server().await;
        let drain = [&[0x82, 0x86, 0x41, 1, b'h', 0x44, 6][..], b"/drain"].concat();
        peer.say(&[
            frame(HEADERS, END_HEADERS, 1, POST),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &drain),
        ])
        .await;
        let goaway = peer.find(GOAWAY).await;
        assert_eq!(goaway.3, [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        let ping = peer.find(PING).await;
        // What was on its way is still taken.
        peer.say(&[
            frame(HEADERS, END_HEADERS | END_STREAM, 5, GET),
            frame(PING, ACK, 0, &ping.3),
            frame(HEADERS, END_HEADERS | END_STREAM, 7, GET),
        ])
        .await;
        let goaway = peer.find(GOAWAY).await;
        assert_eq!(goaway.3, [0, 0, 0, 5, 0, 0, 0, 0]);
        assert_eq!(peer.find(HEADERS).await.2, 5);
        peer.say(&[frame(DATA, END_STREAM, 1, b"x")]).await;
        assert_eq!(peer.find(HEADERS).await.2, 1);
        assert_eq!(peer.find(DATA).await.2, 1);
        assert!(peer.next().await.is_none(), "then it is over");
    });
}

#[test]
fn faults_of_a_stream_reset_it_and_faults_of_the_connection_end_it() {
    let long = [
        &[0x82, 0x86, 0x84, 0x41, 1, b'h'][..],
        &[0x40, 1, b'a', 1, b'b', 0x80 | 62],
    ]
    .concat();
    let headers = |id, block: &[u8]| frame(HEADERS, END_HEADERS | END_STREAM, id, block);
    let with = |name: &[u8], value: &[u8]| {
        [
            GET,
            &[0, name.len() as u8],
            name,
            &[value.len() as u8],
            value,
        ]
        .concat()
    };
    let cases: Vec<(Vec<u8>, Option<u32>)> = vec![
        (headers(1, &with(b"te", b"gzip")), None),
        (headers(1, &with(b"X", b"a")), None),
        (headers(1, &with(b":path", b"/")), None),
        (headers(1, &with(b"host", b"other")), None),
        (headers(1, &with(b"connection", b"close")), None),
        (headers(1, &with(b"content-length", b"1")), None),
        (headers(1, &[0x82, 0x84, 0x41, 1, b'h']), None),
        (headers(2, GET), Some(1)),
        (headers(1, &[0x80]), Some(9)),
        (headers(1, &[GET, &[0xff, 0xff]].concat()), Some(9)),
        (frame(DATA, 0, 1, b"x"), Some(1)),
        (frame(RST_STREAM, 0, 1, &[0; 4]), Some(1)),
        (frame(PING, 0, 0, &[0; 7]), Some(6)),
        (frame(SETTINGS, 0, 0, &[0; 7]), Some(6)),
        (frame(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0]), Some(3)),
        (frame(5, 0, 1, &[0; 8]), Some(1)),
        (frame(CONTINUATION, END_HEADERS, 1, GET), Some(1)),
        (
            [frame(HEADERS, 0, 1, GET), frame(PING, 0, 0, &[0; 8])].concat(),
            Some(1),
        ),
        ([0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1].to_vec(), Some(6)),
        (
            frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]),
            Some(3),
        ),
    ];
    for (bytes, goaway) in cases {
        run(async move {
            let (mut peer, _) = server().await;
            peer.say(std::slice::from_ref(&bytes)).await;
            match goaway {
                Some(code) => {
                    let (_, _, _, payload) = peer.find(GOAWAY).await;
                    assert_eq!(payload[4..], code.to_be_bytes(), "{bytes:x?}");
                    assert!(peer.next().await.is_none());
                }
                None => {
                    let (_, _, stream, payload) = peer.find(RST_STREAM).await;
                    assert_eq!((stream, &payload[..]), (1, &[0, 0, 0, 1][..]), "{bytes:x?}");
                    // The connection goes on, with the same table.
                    peer.say(&[frame(HEADERS, END_HEADERS | END_STREAM, 3, GET)])
                        .await;
                    assert_eq!(peer.find(HEADERS).await.2, 3);
                }
            }
        });
    }
    run(async move {
        let (mut peer, _) = server().await;
        // In pieces, with a field out of the table that the same block has filled.
        peer.say(&[
            frame(HEADERS, END_STREAM, 1, &long[..3]),
            frame(CONTINUATION, 0, 1, &long[3..8]),
            frame(CONTINUATION, END_HEADERS, 1, &long[8..]),
        ])
        .await;
        assert_eq!(peer.find(HEADERS).await.2, 1);
    });
}

#[test]
fn more_fields_than_we_take_are_answered_with_431() {
    run(async {
        let (mut peer, _) = server().await;
        let block = [GET, &[0, 1, b'a', 1, b'b'].repeat(101)].concat();
        peer.say(&[frame(HEADERS, END_HEADERS, 1, &block)]).await;
        let (_, flags, _, payload) = peer.find(HEADERS).await;
        // `:status` of the fixed table, and 431.
        assert_eq!((flags & END_STREAM, payload[0] & 0x0f), (END_STREAM, 8));
        let (_, _, stream, payload) = peer.find(RST_STREAM).await;
        assert_eq!((stream, &payload[..]), (1, &[0; 4][..]));
        // What comes for it is passed over.
        peer.say(&[
            frame(DATA, END_STREAM, 1, b"late"),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, GET),
        ])
        .await;
        assert_eq!(peer.next().await.unwrap().2, 3);
    });
}

#[test]
fn streams_above_the_last_that_a_server_takes_were_not_processed() {
    run(async {
        let (mut client, mut peer) = client().await;
        let mut streams: Vec<_> = (0..3)
            .map(|_| client.send(&get("/"), Framing::None).unwrap().split())
            .collect();
        peer.find(HEADERS).await;
        peer.say(&[
            frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]),
            frame(RST_STREAM, 0, 1, &[0, 0, 0, 11]),
        ])
        .await;
        let mut errors = Vec::new();
        for (response, _) in &mut streams {
            errors.push(response.read_head().await.unwrap_err());
        }
        assert!(matches!(
            errors[0],
            Error::Reset(h2::Reason::ENHANCE_YOUR_CALM)
        ));
        assert!(errors[1].is_unprocessed() && errors[2].is_unprocessed());
        assert!(client.ready().await.is_err());
        assert!(
            client
                .send(&get("/"), Framing::None)
                .unwrap_err()
                .is_unprocessed()
        );
    });
}

#[test]
fn a_client_waits_for_a_free_stream() {
    run(async {
        let (mut client, mut peer) = client().await;
        peer.say(&[frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 1])])
            .await;
        while peer.find(SETTINGS).await.1 != ACK {}
        assert_eq!(client.max_streams(), 1);
        let (mut response, _writer) = client.send(&get("/"), Framing::None).unwrap().split();
        let mut other = client.clone();
        assert!(poll_fn(|cx| Poll::Ready(other.poll_ready(cx).is_pending())).await);
        let waits = spawn_local(async move { other.ready().await });
        peer.say(&[
            frame(HEADERS, END_HEADERS, 1, &[0x88, 0x5c, 1, b'3']),
            frame(DATA, END_STREAM, 1, b"abc"),
        ])
        .await;
        let (head, reader) = response.read_head().await.unwrap();
        assert_eq!((head.status, head.framing), (200, Framing::Length(3)));
        waits.await.unwrap().unwrap();
        let mut reader = reader.unwrap();
        let frame = poll_fn(|cx| reader.poll_frame(cx)).await;
        assert!(matches!(frame, Some(Ok(Frame::Data(data))) if data == "abc"));
        assert!(poll_fn(|cx| reader.poll_frame(cx)).await.is_none());
    });
}

#[test]
fn a_connection_without_handles_ends_behind_its_last_stream() {
    run(async {
        let (mut client, mut peer) = client().await;
        let (mut response, writer) = client.send(&get("/"), Framing::None).unwrap().split();
        drop(client);
        peer.find(HEADERS).await;
        peer.say(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88])])
            .await;
        assert_eq!(response.read_head().await.unwrap().0.status, 200);
        drop((response, writer));
        assert_eq!(peer.find(GOAWAY).await.3, [0; 8]);
        assert!(peer.next().await.is_none());
    });
}

#[test]
fn who_is_gone_before_the_end_resets_the_stream() {
    run(async {
        let (mut client, mut peer) = client().await;
        let stream = client.send(&get("/"), Framing::Chunked).unwrap();
        peer.find(HEADERS).await;
        drop(stream);
        let (_, _, stream, payload) = peer.find(RST_STREAM).await;
        assert_eq!((stream, &payload[..]), (1, &[0, 0, 0, 8][..]));
    });
}

#[test]
fn answers_to_streams_that_were_given_up_long_ago_are_passed_over() {
    run(async {
        let (mut client, mut peer) = client().await;
        while peer.find(SETTINGS).await.1 != ACK {}
        // As when an upstream stalls and all requests time out at once.
        let streams: Vec<_> = (0..300)
            .map(|_| client.send(&get("/"), Framing::None).unwrap())
            .collect();
        drop(streams);
        let (mut response, _writer) = client.send(&get("/"), Framing::None).unwrap().split();
        for stream in [1, 299, 599] {
            peer.say(&[
                frame(HEADERS, END_HEADERS, stream, &[0x88]),
                frame(DATA, 0, stream, b"late"),
                frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x00\x01a\x01b"),
            ])
            .await;
        }
        peer.say(&[frame(HEADERS, END_HEADERS | END_STREAM, 601, &[0x88])])
            .await;
        assert_eq!(response.read_head().await.unwrap().0.status, 200);
    });
}

#[test]
fn streams_that_end_well_do_not_make_us_forget_one_that_we_have_reset() {
    run(async {
        let (mut peer, _) = server().await;
        let block = [GET, &[0, 1, b'a', 1, b'b'].repeat(101)].concat();
        peer.say(&[frame(HEADERS, END_HEADERS, 1, &block)]).await;
        assert_eq!(peer.find(RST_STREAM).await.2, 1);
        peer.say(&[frame(WINDOW_UPDATE, 0, 0, &[0, 16, 0, 0])])
            .await;
        for n in 1..=200 {
            peer.say(&[frame(HEADERS, END_HEADERS | END_STREAM, n * 2 + 1, GET)])
                .await;
            assert_eq!(peer.find(DATA).await.1, END_STREAM);
        }
        peer.say(&[
            frame(DATA, 0, 1, b"late"),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x00\x01a\x01b"),
            frame(HEADERS, END_HEADERS | END_STREAM, 1001, GET),
        ])
        .await;
        let (kind, _, stream, _) = peer.next().await.unwrap();
        assert_eq!((kind, stream), (HEADERS, 1001));
    });
}

#[test]
fn all_of_a_stream_behind_goaway_is_passed_over() {
    run(async {
        let (mut peer, _) = server().await;
        let drain = [&[0x82, 0x86, 0x41, 1, b'h', 0x44, 6][..], b"/drain"].concat();
        peer.say(&[
            frame(HEADERS, END_HEADERS, 1, POST),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &drain),
        ])
        .await;
        let ping = peer.find(PING).await;
        peer.say(&[
            frame(PING, ACK, 0, &ping.3),
            frame(HEADERS, END_HEADERS, 5, POST),
            frame(HEADERS, END_HEADERS | END_STREAM, 5, b"\x00\x01a\x01b"),
            frame(HEADERS, END_HEADERS, 7, POST),
            frame(DATA, END_STREAM, 7, b"x"),
        ])
        .await;
        assert_eq!(peer.find(GOAWAY).await.3, [0, 0, 0, 3, 0, 0, 0, 0]);
        peer.say(&[frame(DATA, END_STREAM, 1, b"x")]).await;
        let (kind, _, stream, _) = loop {
            let seen = peer.next().await.unwrap();
            if seen.2 != 3 {
                break seen;
            }
        };
        assert_eq!((kind, stream), (HEADERS, 1));
    });
}

#[test]
fn a_server_that_closes_first_hears_the_client_out() {
    run(async {
        let (mut peer, _) = server().await;
        let drain = [&[0x82, 0x86, 0x41, 1, b'h', 0x44, 6][..], b"/drain"].concat();
        peer.say(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, &drain)])
            .await;
        let ping = peer.find(PING).await;
        peer.say(&[frame(PING, ACK, 0, &ping.3)]).await;
        while peer.next().await.is_some() {}
        // Bytes for a socket that is closed would make the system take back what has not arrived.
        for _ in 0..10 {
            peer.say(&[frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0])]).await;
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn an_answer_that_has_no_body_may_not_bring_one() {
    for (method, block) in [
        (Method::Head, &[0x88, 0x5c, 1, b'4'][..]),
        (Method::Get, &[0x89]),
        (Method::Get, &[0x8b, 0x5c, 1, b'4']),
    ] {
        run(async move {
            let (mut client, mut peer) = client().await;
            let head = RequestHead::new(Version::Http11, method, "host", "/");
            let (mut response, _writer) = client.send(&head, Framing::None).unwrap().split();
            peer.say(&[
                frame(HEADERS, END_HEADERS, 1, block),
                frame(DATA, END_STREAM, 1, b"some"),
            ])
            .await;
            let (head, mut reader) = response.read_head().await.unwrap();
            // Though the stream goes on: in HTTP/1 the end of a body would be taken for an answer.
            assert_eq!(head.framing, Framing::None);
            let reader = reader.as_mut().unwrap();
            let frame = poll_fn(|cx| reader.poll_frame(cx)).await;
            assert!(matches!(frame, Some(Err(_))), "{frame:?}");
            assert_eq!(peer.find(RST_STREAM).await.3, [0, 0, 0, 1]);
        });
    }
}

#[test]
fn small_pieces_that_nobody_reads_yet_are_put_together() {
    run(async {
        let (mut client, mut peer) = client().await;
        let (mut response, _writer) = client.send(&get("/"), Framing::None).unwrap().split();
        peer.say(&[frame(HEADERS, END_HEADERS, 1, &[0x88])]).await;
        let (_, mut reader) = response.read_head().await.unwrap();
        let mut sent = Vec::new();
        for n in 0..2000u32 {
            let piece = vec![n as u8; 1 + n as usize % 7];
            peer.say(&[frame(DATA, 0, 1, &piece)]).await;
            sent.extend(piece);
        }
        peer.say(&[frame(DATA, END_STREAM, 1, b""), frame(PING, 0, 0, &[7; 8])])
            .await;
        while peer.find(PING).await.1 != ACK {}
        let reader = reader.as_mut().unwrap();
        let (mut pieces, mut got) = (0, Vec::new());
        while let Some(frame) = poll_fn(|cx| reader.poll_frame(cx)).await {
            let Ok(Frame::Data(data)) = frame else {
                panic!("{frame:?}");
            };
            pieces += 1;
            got.extend_from_slice(&data);
        }
        assert!(got == sent);
        assert!(pieces < 20, "{pieces}");
    });
}

#[test]
fn a_message_is_flushed_when_the_windows_have_let_it_go() {
    run(async {
        let (mut client, mut peer) = client().await;
        let (_response, mut writer) = client.send(&get("/"), Framing::Chunked).unwrap().split();
        writer.send_data(Bytes::from(vec![0; 100_000])).unwrap();
        writer.send_end(None).unwrap();
        for _ in 0..10 {
            tokio::task::yield_now().await;
            assert!(poll_fn(|cx| Poll::Ready(writer.poll_flush(cx).is_pending())).await);
            assert!(poll_fn(|cx| Poll::Ready(writer.poll_end(cx).is_pending())).await);
        }
        let more = 100_000u32.to_be_bytes();
        peer.say(&[
            frame(WINDOW_UPDATE, 0, 0, &more),
            frame(WINDOW_UPDATE, 0, 1, &more),
        ])
        .await;
        poll_fn(|cx| writer.poll_flush(cx)).await.unwrap();
    });
}

#[test]
fn a_client_that_has_much_to_ask_still_listens() {
    run(async {
        let (mut client, mut peer) = client().await;
        while peer.find(SETTINGS).await.1 != ACK {}
        let streams: Vec<_> = (0..800)
            .map(|n| {
                let mut head = get("/");
                let pad = "{".repeat(2000) + &n.to_string();
                head.headers.append("x-pad", pad);
                client.send(&head, Framing::None).unwrap()
            })
            .collect();
        tokio::task::yield_now().await;
        // A server that answers before it reads on: one of the two has to give way.
        let answers = [
            frame(HEADERS, END_HEADERS, 1, &[0x88]),
            frame(DATA, 0, 1, &[0; 16_384]).repeat(100),
        ];
        let said = tokio::time::timeout(Duration::from_secs(5), peer.say(&answers));
        said.await.unwrap();
        drop(streams);
    });
}

#[test]
fn a_tunnel_says_no_protocol_and_has_no_length() {
    run(async {
        let mut blocks = Vec::new();
        for upgrade in [true, false] {
            let (mut client, mut peer) = client().await;
            let mut head = RequestHead::new(Version::Http11, Method::Connect, "host:443", "");
            head.upgrade = true;
            if upgrade {
                head.headers.append("upgrade", "h2c");
            }
            let (mut response, _writer) = client.send(&head, Framing::Tunnel).unwrap().split();
            blocks.push(peer.find(HEADERS).await.3);
            peer.say(&[
                frame(HEADERS, END_HEADERS, 1, &[0x88, 0x5c, 1, b'0']),
                frame(DATA, 0, 1, b"some"),
            ])
            .await;
            let (head, reader) = response.read_head().await.unwrap();
            assert_eq!(head.framing, Framing::Tunnel);
            let mut reader = reader.unwrap();
            let frame = poll_fn(|cx| reader.poll_frame(cx)).await;
            assert!(matches!(frame, Some(Ok(Frame::Data(data))) if data == "some"));
        }
        assert_eq!(blocks[0], blocks[1]);
    });
}

/// Frames of every kind in any order, on few streams, with payloads that are often nearly right.
fn nonsense(random: &mut u64) -> Vec<u8> {
    let mut next = |below: u64| {
        *random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (*random >> 33) % below
    };
    let stream = next(8) as u32;
    let (kind, flags) = (next(11) as u8, next(64) as u8);
    let payload: Vec<u8> = match next(6) {
        0 => GET.to_vec(),
        1 => vec![0x88],
        2 => (next(1 << 32) as u32).to_be_bytes().to_vec(),
        3 => [vec![next(9) as u8], vec![0; next(20) as usize]].concat(),
        4 => (0..next(40)).map(|_| next(256) as u8).collect(),
        _ => [0, 3 + next(3) as u8, 0, 0, next(256) as u8, next(256) as u8].to_vec(),
    };
    match next(5) {
        // A good request or response, so that there is something to break.
        0 => frame(
            HEADERS,
            END_HEADERS | next(2) as u8,
            stream | 1,
            if next(2) == 0 { POST } else { &[0x88] },
        ),
        1 => frame(
            DATA,
            next(2) as u8,
            stream | 1,
            &vec![b'x'; next(3000) as usize],
        ),
        _ => frame(kind, flags, stream, &payload),
    }
}

#[test]
fn nonsense_ends_streams_or_the_connection_and_nothing_else() {
    // A task that panics does so alone: it is noticed here.
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Relaxed);
        hook(info);
    }));
    let mut random = 7;
    for _ in 0..400 {
        let mut says: Vec<u8> = (0..30).flat_map(|_| nonsense(&mut random)).collect();
        let cut = random as usize % 5;
        says.truncate(says.len() - cut.min(says.len()));
        run(async move {
            let (mut peer, _) = server().await;
            let _ = peer.0.write_all(&says).await;
            let _ = peer.0.shutdown().await;
            let mut rest = Vec::new();
            let _ = peer.0.read_to_end(&mut rest).await;

            let (mut client, mut peer) = client().await;
            let mut streams: Vec<_> = (0..4)
                .map(|_| client.send(&get("/"), Framing::Chunked).unwrap().split())
                .collect();
            let _ = peer.0.write_all(&says).await;
            let _ = peer.0.shutdown().await;
            for (response, writer) in &mut streams {
                let _ = writer.send_data(Bytes::from_static(b"some"));
                while let Ok((_, reader)) = response.read_head().await {
                    let Some(mut reader) = reader else { continue };
                    while let Some(Ok(_)) = poll_fn(|cx| reader.poll_frame(cx)).await {}
                    break;
                }
                let _ = writer.send_end(None);
            }
        });
    }
    assert_eq!(PANICS.load(Relaxed), 0);
}
