use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn guard(io: DuplexStream, server: bool) -> (Guard<DuplexStream>, Rc<Facts>) {
    let facts = Rc::new(Facts::default());
    let guard = Guard::new(io, &facts, FloodLimits::default(), server, true);
    (guard, facts)
}

/// Reads all with buffers of one size.
async fn read(guard: &mut Guard<DuplexStream>, size: usize) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; size]);
    loop {
        match guard.read(&mut buffer).await.unwrap() {
            0 => return all,
            count => all.extend_from_slice(&buffer[..count]),
        }
    }
}

#[tokio::test]
async fn frames_pass_unchanged_however_they_are_cut() {
    let mut sent = PREFACE.to_vec();
    for n in 0..40u8 {
        sent.extend(frame(
            HEADERS,
            5,
            u32::from(n) * 2 + 1,
            &vec![n; usize::from(n) * 7],
        ));
        sent.extend(frame(RST_STREAM, 0, u32::from(n) * 2 + 1, &[0, 0, 0, 8]));
    }
    for (pipe, size) in [(1, 1), (3, 7), (9, 9), (10, 64), (64, 5), (4096, 16384)] {
        let (near, mut far) = tokio::io::duplex(pipe);
        let (mut guard, facts) = guard(near, true);
        let bytes = sent.clone();
        let writer = async move { far.write_all(&bytes).await.unwrap() };
        let (got, ()) = tokio::join!(read(&mut guard, size), writer);
        assert!(got == sent, "pipe {pipe}, buffer {size}");
        assert_eq!(facts.resets_received.get(), 40);
        assert_eq!(facts.received.get(), sent.len() as u64);
        assert_eq!(facts.flood(), None);
        assert!(facts.received_at.get().is_some());
    }
}

#[tokio::test]
async fn empty_data_frames_of_a_long_life_are_not_an_attack_but_two_in_a_row_are() {
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let (mut guard, facts) = guard(near, false);
    let mut sent = Vec::new();
    for _ in 0..300 {
        sent.extend(frame(DATA, 0, 1, b"x"));
        sent.extend(frame(DATA, 0, 1, b""));
    }
    far.write_all(&sent).await.unwrap();
    let mut got = vec![0; sent.len()];
    guard.read_exact(&mut got).await.unwrap();
    assert_eq!(facts.flood(), None);
    let empty = |bytes: &[u8]| bytes.chunks(19).filter(|pair| pair[13] == DATA).count();
    assert_eq!(
        (empty(&sent), empty(&got)),
        (300, 64),
        "h2 itself ends at 100"
    );
    far.write_all(&[frame(DATA, 0, 1, b""), frame(DATA, 0, 3, b"")].concat())
        .await
        .unwrap();
    let _ = guard.read(&mut got).await.unwrap();
    assert_eq!(facts.flood(), Some(Flood::Empty));
}

#[tokio::test]
async fn budgets_grow_with_streams_and_with_data_sent() {
    for (kind, payload, within, flood) in [
        (PRIORITY, &[0, 0, 0, 0, 1][..], 100 * 2, Flood::Priority),
        (
            WINDOW_UPDATE,
            &[0, 0, 0, 1],
            5 + 2 * (1 + 10),
            Flood::WindowUpdate,
        ),
        (PING, &[0; 8], 1000, Flood::Control),
        (SETTINGS, &[0, 3, 0, 0, 0, 9], 1000, Flood::Control),
    ] {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let (mut guard, facts) = guard(near, true);
        guard.write_all(&frame(DATA, 0, 1, b"some")).await.unwrap();
        let mut sent = PREFACE.to_vec();
        sent.extend(frame(HEADERS, 5, 1, b"x"));
        for _ in 0..within {
            sent.extend(frame(kind, 0, 1, payload));
        }
        far.write_all(&sent).await.unwrap();
        let mut got = vec![0; sent.len()];
        guard.read_exact(&mut got).await.unwrap();
        assert_eq!(facts.flood(), None, "{flood:?}");
        far.write_all(&frame(kind, 0, 1, payload)).await.unwrap();
        let _ = guard.read(&mut got).await.unwrap();
        assert_eq!(facts.flood(), Some(flood));
        assert!(
            std::future::poll_fn(|cx| {
                Poll::Ready(Pin::new(&mut guard).poll_read(cx, &mut ReadBuf::new(&mut [0; 8])))
            })
            .await
            .is_pending(),
            "nothing more is read"
        );
    }
}

#[tokio::test]
async fn what_goes_out_is_counted_however_it_is_cut() {
    for size in [1, 2, 5, 9, 13, 1000] {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let (mut guard, facts) = guard(near, false);
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame(HEADERS, 4, 1, b"head"));
        bytes.extend(frame(RST_STREAM, 0, 1, &[0, 0, 0, 1]));
        bytes.extend(frame(DATA, 0, 3, &[3; 100]));
        bytes.extend(frame(RST_STREAM, 0, 3, &[0, 0, 0, 8]));
        bytes.extend(frame(GOAWAY, 0, 0, &[0; 8]));
        for part in bytes.chunks(size) {
            guard.write_all(part).await.unwrap();
        }
        let mut got = vec![0; bytes.len()];
        far.read_exact(&mut got).await.unwrap();
        assert!(got == bytes);
        assert_eq!(
            (facts.resets_sent.get(), facts.protocol_errors_sent.get()),
            (2, 1)
        );
        assert_eq!((facts.goaways_sent.get(), facts.data_sent.get()), (1, 1));
    }
}
