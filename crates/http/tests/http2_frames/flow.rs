//! What goes in which write, windows, and pieces of bodies.

use std::{future::poll_fn, task::Poll, time::Duration};

use bytes::Bytes;
use outrigger_http::{Frame, Framing, Headers, h2};

use super::{
    ACK, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, POST, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, client, frame, get, run, server, server_with,
};

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
