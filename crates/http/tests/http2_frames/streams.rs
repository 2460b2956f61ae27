//! How streams and connections begin, wait and end.

use std::{future::poll_fn, task::Poll};

use outrigger_http::{Error, Frame, Framing, Method, RequestHead, Version, h2};
use tokio::task::spawn_local;

use super::{
    ACK, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, POST, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, client, frame, get, run, server,
};

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
