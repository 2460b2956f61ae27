//! Requests whose answer is complete before they are.

use std::time::Duration;

use outrigger_http::h2;

use super::{
    DATA, END_HEADERS, END_STREAM, HEADERS, PING, Peer, RST_STREAM, WINDOW_UPDATE, frame, run,
    server_with,
};

/// `POST http://h/early`, of whose body nothing has come.
async fn answered(linger: Duration, length: &[u8]) -> Peer {
    let settings = h2::Settings {
        linger,
        ..h2::Settings::default()
    };
    let (mut peer, _) = server_with(settings).await;
    let head = [
        &[0x83, 0x86, 0x04, 6][..],
        b"/early",
        &[0x41, 1, b'h'],
        length,
    ];
    peer.say(&[frame(HEADERS, END_HEADERS, 1, &head.concat())])
        .await;
    while peer.find(DATA).await.1 & END_STREAM == 0 {}
    peer
}

#[test]
fn what_was_on_its_way_when_the_answer_went_is_judged() {
    let rest = |length| frame(DATA, END_STREAM, 1, &vec![0; length]);
    let more = |count: u32| frame(WINDOW_UPDATE, 0, 1, &count.to_be_bytes());
    let cases = [
        ("too much", vec![rest(5)], 1),
        ("too little", vec![rest(3)], 1),
        (
            "trailers without an end",
            vec![frame(HEADERS, END_HEADERS, 1, &[])],
            1,
        ),
        ("a window of nothing", vec![more(0)], 1),
        ("a window of too much", vec![more(0x7fff_ffff)], 3),
        (
            "data behind a reset",
            vec![frame(RST_STREAM, 0, 1, &[0; 4]), rest(4)],
            5,
        ),
        ("data behind the end", vec![rest(4), rest(1)], 5),
    ];
    run(async {
        for (what, said, code) in cases {
            let mut peer = answered(LONG, FOUR).await;
            peer.say(&said).await;
            let (_, _, stream, reason) = peer.find(RST_STREAM).await;
            assert_eq!((stream, reason), (1, vec![0, 0, 0, code]), "{what}");
        }
    });
}

#[test]
fn a_request_that_ends_behind_its_answer_is_not_reset() {
    run(async {
        let mut peer = answered(LONG, FOUR).await;
        peer.say(&[
            frame(DATA, END_STREAM, 1, &[0; 4]),
            frame(PING, 0, 0, &[7; 8]),
        ])
        .await;
        loop {
            let (kind, ..) = peer.next().await.expect("the connection goes on");
            assert_ne!(kind, RST_STREAM);
            if kind == PING {
                break;
            }
        }
    });
}

#[test]
fn the_rest_of_a_request_is_waited_for_a_while() {
    run(async {
        let mut peer = answered(Duration::from_millis(1), FOUR).await;
        let (_, _, stream, reason) = peer.find(RST_STREAM).await;
        assert_eq!((stream, reason), (1, vec![0; 4]));
        // It was sent before that was known.
        peer.say(&[
            frame(DATA, END_STREAM, 1, &[0; 4]),
            frame(PING, 0, 0, &[7; 8]),
        ])
        .await;
        assert_eq!(peer.next().await.expect("an answer").0, PING);
    });
}

#[test]
fn no_more_than_a_window_of_a_body_is_passed_over() {
    run(async {
        let mut peer = answered(LONG, &[]).await;
        let mut said = vec![frame(DATA, 0, 1, &[0; 16_384]); 4];
        said.push(frame(PING, 0, 0, &[7; 8]));
        peer.say(&said).await;
        let (_, _, stream, reason) = peer.find(RST_STREAM).await;
        assert_eq!((stream, reason), (1, vec![0; 4]));
    });
}

const LONG: Duration = Duration::from_secs(3600);
/// `content-length: 4`
const FOUR: &[u8] = &[0x0f, 13, 1, b'4'];
