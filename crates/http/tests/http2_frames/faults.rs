//! What a peer may not say, what is passed over, and nonsense.

use std::{
    future::poll_fn,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use bytes::Bytes;
use outrigger_http::{Framing, Method, RequestHead, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, POST, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, client, frame, get, run, server,
};

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
