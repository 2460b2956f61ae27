//! Response bodies that are worth moving around the proxy, and the counts of bytes.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use crate::support::{Mesh, TO_A, request, run, within};

/// Bytes of which no part looks like another.
fn body(length: usize) -> Vec<u8> {
    (0u64..)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .take(length)
        .collect()
}

const LENGTH: usize = 1_500_000;

/// An origin that answers every request with a body of [`LENGTH`], in pieces of this size; of the first answer it sends
/// no more than this, and then it closes, or waits for more than a client has patience.
async fn origin(piece: usize, first: usize, closes: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    spawn_local(async move {
        let mut most = first;
        while let Ok((mut stream, _)) = listener.accept().await {
            while request(&mut stream).await.is_some() {
                let whole = answer();
                let part = &whole[..most.min(whole.len())];
                for piece in part.chunks(piece) {
                    if stream.write_all(piece).await.is_err() {
                        break;
                    }
                }
                if std::mem::replace(&mut most, usize::MAX) < whole.len() {
                    if !closes {
                        spawn_local(async move {
                            std::future::pending::<()>().await;
                            drop(stream);
                        });
                    }
                    break;
                }
            }
        }
    });
    port
}

fn answer() -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n");
    [head.into_bytes(), body(LENGTH)].concat()
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";

/// One response: its head, and its body as far as it comes.
async fn response(stream: &mut TcpStream, read: usize) -> (usize, Vec<u8>) {
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; read]);
    let mut end = None;
    while end.is_none_or(|end: usize| bytes.len() < end + LENGTH) {
        match within(stream.read(&mut buffer)).await {
            Ok(count) if count > 0 => bytes.extend_from_slice(&buffer[..count]),
            _ => break,
        }
        let found = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        end = end.or(found.map(|at| at + 4));
        // The proxy has its turn, and finds a client that takes little.
        tokio::task::yield_now().await;
    }
    let end = end.expect("a head");
    (bytes.len(), bytes.split_off(end))
}

#[test]
fn large_bodies_come_whole_and_every_byte_is_counted() {
    run(async {
        for (piece, read) in [(LENGTH * 2, 1 << 20), (40_000, 9_000), (1_500, 70_000)] {
            let port = origin(piece, usize::MAX, true).await;
            let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
            let mut client = mesh.connect().await;
            let mut taken = 0;
            for _ in 0..2 {
                client.write_all(GET).await.expect("it is there");
                let (count, got) = response(&mut client, read).await;
                assert!(got == body(LENGTH), "{piece} {read} {}", got.len());
                taken += count as i64;
            }
            assert_eq!(mesh.log(2).await, "GET / 200 - via_upstream 1\n".repeat(2));
            let number = |name: &str| mesh.server.store.number(name);
            assert_eq!(number("cluster.a.upstream_cx_total"), 1);
            let sent = 2 * answer().len() as i64;
            assert_eq!(number("cluster.a.upstream_cx_rx_bytes_total"), sent);
            assert_eq!(number("http.test.downstream_cx_tx_bytes_total"), taken);
            let asked = 2 * GET.len() as i64;
            assert_eq!(number("http.test.downstream_cx_rx_bytes_total"), asked);
            assert!(number("cluster.a.upstream_cx_tx_bytes_total") > asked);
        }
    });
}

#[test]
fn a_body_that_breaks_off_is_not_taken_for_whole() {
    run(async {
        let port = origin(64 << 10, 700_000, true).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
        let mut client = mesh.connect().await;
        client.write_all(GET).await.expect("it is there");
        let (_, got) = response(&mut client, 1 << 20).await;
        assert!(got.len() < LENGTH && body(LENGTH).starts_with(&got));
        assert_eq!(
            mesh.log(1).await,
            "GET / 200 UC upstream_reset_after_response_started{connection_termination} 1\n"
        );
        // The next request gets a connection that works.
        let mut client = mesh.connect().await;
        client.write_all(GET).await.expect("it is there");
        assert!(response(&mut client, 1 << 20).await.1 == body(LENGTH));
    });
}

#[test]
fn a_client_that_leaves_within_a_large_body_takes_the_upstream_connection_along() {
    run(async {
        let port = origin(64 << 10, 700_000, false).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
        let mut client = mesh.connect().await;
        client.write_all(GET).await.expect("it is there");
        let mut some = vec![0; 100_000];
        within(client.read_exact(&mut some)).await.expect("bytes");
        drop(client);
        let log = mesh.log(1).await;
        assert!(log.starts_with("GET / 200 DC "), "{log}");
        let mut client = mesh.connect().await;
        client.write_all(GET).await.expect("it is there");
        assert!(response(&mut client, 1 << 20).await.1 == body(LENGTH));
        assert_eq!(mesh.server.store.number("cluster.a.upstream_cx_total"), 2);
    });
}
