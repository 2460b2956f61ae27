//! Peers that are slow, silent or out of turn: HTTP/1 as bytes on the wire.

use std::{cell::Cell, rc::Rc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use super::support::{Act, Mesh, OK, Origin, TO_A, run, within};

/// Reads until the bytes end so.
async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut got = Vec::new();
    while !got.ends_with(end.as_bytes()) {
        let read = within(stream.read_buf(&mut got)).await.unwrap();
        assert_ne!(read, 0, "{}", String::from_utf8_lossy(&got));
    }
    String::from_utf8(got).unwrap()
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut got = Vec::new();
    let _ = within(stream.read_to_end(&mut got)).await;
    String::from_utf8_lossy(&got).into_owned()
}

async fn happens(what: impl Fn() -> bool) {
    within(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

const CONNECT: &str = "          - {match: {connect_matcher: {}}, route: {cluster: a, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}}";

#[test]
fn a_connect_that_ends_here_carries_raw_bytes_to_the_host() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mesh = Mesh::new(CONNECT, "", "", &[("a", port), ("none", 1)]).await;
        let mut client = mesh.connect().await;
        // What comes before the answer is held, and goes to the host after it.
        client
            .write_all(b"CONNECT some.where:443 HTTP/1.1\r\nHost: some.where:443\r\n\r\nearly ")
            .await
            .unwrap();
        let (mut host, _) = within(listener.accept()).await.unwrap();
        let answer = until(&mut client, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let head = answer.to_lowercase();
        assert!(!head.contains("content-length") && !head.contains("transfer-encoding"));
        client.write_all(b"late").await.unwrap();
        assert_eq!(until(&mut host, "late").await, "early late");
        host.write_all(b"HTTP/1.1 is only bytes here")
            .await
            .unwrap();
        until(&mut client, "only bytes here").await;
        // Half-close passes both ways.
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut host).await, "");
        host.write_all(b"the end").await.unwrap();
        drop(host);
        assert_eq!(rest(&mut client).await, "the end");
        let log = mesh.log(1).await;
        assert!(log.starts_with("CONNECT - 200 - via_upstream 1"), "{log}");
        happens(|| mesh.server.store.number("cluster.a.upstream_cx_active") == 0).await;
    });
}

#[test]
fn the_end_of_a_tunnel_does_not_overtake_its_bytes() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mesh = Mesh::new(CONNECT, "", "", &[("a", port)]).await;
        let mut client = mesh.connect().await;
        client
            .write_all(b"CONNECT some.where:443 HTTP/1.1\r\nHost: some.where:443\r\n\r\n")
            .await
            .unwrap();
        let (mut host, _) = within(listener.accept()).await.unwrap();
        until(&mut client, "\r\n\r\n").await;
        // What fits in buffers on the way, which a reset would drop.
        let sent = vec![7; 200_000];
        host.write_all(&sent).await.unwrap();
        drop(host);
        happens(|| mesh.server.store.number("cluster.a.upstream_cx_active") == 0).await;
        let mut got = Vec::new();
        within(client.read_to_end(&mut got)).await.unwrap();
        assert!(got == sent, "{}", got.len());
    });
}

#[test]
fn a_connect_that_ends_here_can_begin_with_a_proxy_header_and_be_logged_as_it_begins() {
    run(async {
        for version in ["V1", "V2"] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let routes = CONNECT.replace(
                "connect_config: {}",
                &format!("connect_config: {{proxy_protocol_config: {{version: {version}}}}}"),
            );
            let options =
                "access_log_options: {flush_log_on_tunnel_successfully_established: true}";
            let mesh = Mesh::new(&routes, options, "", &[("a", port)]).await;
            let mut client = mesh.connect().await;
            let connect = b"CONNECT some.where:443 HTTP/1.1\r\nHost: some.where:443\r\n\r\nearly";
            client.write_all(connect).await.unwrap();
            let (mut host, _) = within(listener.accept()).await.unwrap();
            let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let mut expected = match version {
                "V1" => format!(
                    "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n",
                    from.port(),
                    to.port()
                )
                .into_bytes(),
                _ => [
                    &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01"[..],
                    &from.port().to_be_bytes(),
                    &to.port().to_be_bytes(),
                ]
                .concat(),
            };
            expected.extend(b"early");
            let mut seen = vec![0; expected.len()];
            within(host.read_exact(&mut seen)).await.unwrap();
            assert_eq!(seen, expected, "{version}");
            // The tunnel is open still.
            let log = mesh.log(1).await;
            assert!(log.starts_with("CONNECT - 200 - via_upstream 1"), "{log}");
            drop(client);
            mesh.log(2).await;
        }
    });
}

#[test]
fn a_connect_to_a_dead_host_or_without_leave_is_refused() {
    run(async {
        let mesh = Mesh::new(CONNECT, "", "", &[("a", 1)]).await;
        let connect = "CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n";
        let answer = mesh.ask(&format!("{connect}early")).await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        // What was meant for the tunnel is not taken for a request.
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        let origin = Origin::new(&[]).await;
        let other = "          - {match: {connect_matcher: {}}, route: {cluster: a}}";
        let mesh = Mesh::new(other, "", "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask(&format!("{connect}GET / HTTP/1.1\r\nHost: h\r\n\r\n"))
            .await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(origin.seen().is_empty());
    });
}

#[test]
fn websocket_frames_before_the_101_are_held() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let options = "upgrade_configs: [{upgrade_type: websocket}]";
        let mesh = Mesh::new(TO_A, options, "", &[("a", port)]).await;
        let mut client = mesh.connect().await;
        client
            .write_all(
                b"GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly",
            )
            .await
            .unwrap();
        let (mut host, _) = within(listener.accept()).await.unwrap();
        let request = until(&mut host, "\r\n\r\n").await;
        assert!(request.starts_with("GET /ws "));
        let nothing = tokio::time::timeout(Duration::from_millis(50), host.read_u8()).await;
        assert!(
            nothing.is_err(),
            "the frame went up before the server agreed"
        );
        host.write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        )
        .await
        .unwrap();
        assert_eq!(until(&mut host, "early").await, "early");
    });
}

#[test]
fn expectations_are_met_refused_or_left_to_the_upstream() {
    run(async {
        // Without a body: one 100, one answer, and the next request is the next request.
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask(
                "GET /1 HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n\
                 GET /2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
            )
            .await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK\r\n").count(), 2, "{answer}");
        assert_eq!(origin.seen().len(), 2);
        assert!(!origin.seen()[0].to_lowercase().contains("\r\nexpect:"));
        // Of what is unknown nothing goes up, and the connection ends.
        let answer = mesh
            .ask(
                "POST / HTTP/1.1\r\nHost: h\r\nExpect: 200-ok\r\nContent-Length: 3\r\n\r\nabc\
                 GET /3 HTTP/1.1\r\nHost: h\r\n\r\n",
            )
            .await;
        assert!(answer.starts_with("HTTP/1.1 417 "), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert_eq!(origin.seen().len(), 2);
    });
}

#[test]
fn an_upstream_that_answers_without_the_body_it_was_offered_is_not_used_again() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mesh = Mesh::new(TO_A, "proxy_100_continue: true", "", &[("a", port)]).await;
        let mut client = mesh.connect().await;
        client
            .write_all(
                b"POST /1 HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 30\r\n\r\n",
            )
            .await
            .unwrap();
        let (mut first, _) = within(listener.accept()).await.unwrap();
        let request = until(&mut first, "\r\n\r\n").await;
        assert!(request.to_lowercase().contains("expect: 100-continue\r\n"));
        first
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
            .await
            .unwrap();
        let answer = until(&mut client, "no").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        // Neither connection is in a state in which another message could be told from a body.
        assert_eq!(rest(&mut first).await, "");
        let _ = client
            .write_all(b"GET /2 HTTP/1.1\r\nHost: h\r\n\r\n")
            .await;
        assert_eq!(rest(&mut client).await, "");
        // A 100 that does come is handed on, and then the body.
        let mut client = mesh.connect().await;
        client
            .write_all(
                b"POST /3 HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
            )
            .await
            .unwrap();
        let (mut second, _) = within(listener.accept()).await.unwrap();
        until(&mut second, "\r\n\r\n").await;
        second
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
            .await
            .unwrap();
        until(&mut client, "HTTP/1.1 100 Continue\r\n\r\n").await;
        client.write_all(b"abc").await.unwrap();
        until(&mut second, "abc").await;
        second
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            .await
            .unwrap();
        until(&mut client, "ok").await;
    });
}

#[test]
fn floods_and_oversized_heads_of_an_upstream_become_502_and_end_its_connection() {
    run(async {
        let flood = "HTTP/1.1 102 Processing\r\n\r\n".repeat(1000);
        let large = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(70 * 1024));
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(101));
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(200 * 1024));
        for bad in [flood, large, many, endless] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
            let closed = Rc::new(Cell::new(false));
            let seen = closed.clone();
            let start = bad[..40].to_owned();
            spawn_local(async move {
                let (mut host, _) = listener.accept().await.unwrap();
                until(&mut host, "\r\n\r\n").await;
                let _ = host.write_all(bad.as_bytes()).await;
                let _ = host.read_to_end(&mut Vec::new()).await;
                seen.set(true);
            });
            let answer = mesh.get("/").await;
            let last = answer.rsplit("HTTP/1.1 ").next().unwrap();
            assert!(last.starts_with("502 "), "{start:?} gave {last}");
            happens(|| closed.get()).await;
            assert!(mesh.log(1).await.contains(" 502 UPE "));
        }
    });
}

#[test]
fn bodies_behind_responses_that_have_none_never_reach_the_next_client() {
    run(async {
        for status in ["204 No Content", "304 Not Modified"] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
            let accepted = Rc::new(Cell::new(0));
            let count = accepted.clone();
            spawn_local(async move {
                while let Ok((mut host, _)) = listener.accept().await {
                    let first = count.replace(count.get() + 1) == 0;
                    spawn_local(async move {
                        until(&mut host, "\r\n\r\n").await;
                        let answer = if first {
                            format!(
                                "HTTP/1.1 {status}\r\nContent-Length: 4\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
                            )
                        } else {
                            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood".to_owned()
                        };
                        let _ = host.write_all(answer.as_bytes()).await;
                        let _ = host.read_to_end(&mut Vec::new()).await;
                    });
                }
            });
            let answer = mesh
                .ask(
                    "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n\
                     GET /2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
                )
                .await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {}", &status[..3])),
                "{answer}"
            );
            assert!(
                answer.ends_with("good") && !answer.contains("evil"),
                "{answer}"
            );
            assert_eq!(accepted.get(), 2);
        }
    });
}

#[test]
fn a_response_that_comes_byte_by_byte_is_whole_or_too_late() {
    run(async {
        let drip = async |answer: &'static str, pause: Duration, route: &str| {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let mesh = Mesh::new(route, "", "", &[("a", port)]).await;
            let cut = Rc::new(Cell::new(false));
            let seen = cut.clone();
            spawn_local(async move {
                let (mut host, _) = listener.accept().await.unwrap();
                host.set_nodelay(true).unwrap();
                until(&mut host, "\r\n\r\n").await;
                for byte in answer.bytes() {
                    if host.write_u8(byte).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(pause).await;
                }
                let _ = host.read_to_end(&mut Vec::new()).await;
                seen.set(true);
            });
            (mesh.get("/").await, mesh, cut)
        };
        let whole = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let (answer, ..) = drip(whole, Duration::from_millis(1), TO_A).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("ok"));
        let route = "          - {match: {prefix: /}, route: {cluster: a, timeout: 0.1s}}";
        let (answer, mesh, cut) = drip(whole, Duration::from_millis(30), route).await;
        assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
        assert!(!answer.contains("200 OK"));
        happens(|| cut.get()).await;
        assert!(mesh.log(1).await.contains(" 504 UT response_timeout "));
    });
}

#[test]
fn slow_heads_and_slow_bodies_end() {
    run(async {
        for (options, details, stat) in [
            (
                "request_headers_timeout: 0.1s",
                "- request_header_timeout",
                "header_timeout",
            ),
            (
                "request_timeout: 0.1s",
                "- request_overall_timeout",
                "timeout",
            ),
            (
                "stream_idle_timeout: 0.1s",
                "SI stream_idle_timeout",
                "idle_timeout",
            ),
        ] {
            let mesh = Mesh::new(TO_A, options, "", &[("a", 1)]).await;
            let mut client = mesh.connect().await;
            let drip = async {
                for byte in b"GET / HTTP/1.1\r\nHost: h\r\nX: "
                    .iter()
                    .chain(std::iter::repeat(&b'x'))
                {
                    if client.write_u8(*byte).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            // The writer notices the end only by an error; the log tells it sooner.
            let log = async { mesh.log(1).await };
            tokio::pin!(drip, log);
            let log = tokio::select! { () = &mut drip => log.await, log = &mut log => log };
            assert!(log.contains(&format!(" 408 {details} ")), "{log}");
            let stat = format!("http.test.downstream_rq_{stat}");
            assert_eq!(mesh.server.store.number(&stat), 1);
            assert_eq!(
                mesh.server
                    .store
                    .number("http.test.downstream_cx_protocol_error"),
                0
            );
        }
        let origin = Origin::new(&[OK, OK]).await;
        for (options, details) in [
            ("request_timeout: 0.1s", "- request_overall_timeout"),
            ("stream_idle_timeout: 0.1s", "SI stream_idle_timeout"),
        ] {
            let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
            let mut client = mesh.connect().await;
            client
                .write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nabc")
                .await
                .unwrap();
            let answer = rest(&mut client).await;
            assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
            assert!(answer.contains("connection: close\r\n"), "{answer}");
            assert!(mesh.log(1).await.contains(&format!(" 408 {details} ")));
        }
        assert!(origin.seen().is_empty());
    });
}

/// Rests and requests share a timer: the limit of a request that is over must not put off the end of the rest behind it.
#[test]
fn a_connection_that_rests_after_its_requests_ends_in_time() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let route = "          - {match: {prefix: /}, route: {cluster: a, timeout: 60s}}";
        let options = "common_http_protocol_options: {idle_timeout: 0.2s}";
        let mesh = Mesh::new(route, options, "", &[("a", origin.port)]).await;
        let mut client = mesh.connect().await;
        let twice = "GET / HTTP/1.1\r\nHost: h\r\n\r\n".repeat(2);
        client.write_all(twice.as_bytes()).await.unwrap();
        let answers = rest(&mut client).await;
        assert_eq!(answers.matches("HTTP/1.1 200 OK\r\n").count(), 2);
        let stat = "http.test.downstream_cx_idle_timeout";
        happens(|| mesh.server.store.number(stat) == 1).await;
    });
}

#[test]
fn a_reader_that_does_not_read_holds_up_the_writer_and_is_let_go() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let options = "stream_idle_timeout: 0.5s";
        let mesh = Mesh::new(TO_A, options, "", &[("a", port)]).await;
        let (written, over) = (Rc::new(Cell::new(0_u64)), Rc::new(Cell::new(false)));
        let (count, seen) = (written.clone(), over.clone());
        spawn_local(async move {
            let (mut host, _) = listener.accept().await.unwrap();
            until(&mut host, "\r\n\r\n").await;
            let _ = host
                .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n").as_bytes())
                .await;
            let piece = vec![b'x'; 64 * 1024];
            while count.get() < LARGE {
                match host.write(&piece).await {
                    Ok(written) => count.set(count.get() + written as u64),
                    Err(_) => break,
                }
            }
            seen.set(true);
        });
        let mut client = mesh.connect().await;
        client
            .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            .await
            .unwrap();
        // The upstream is cut off because of the client, with most of its answer unsent.
        happens(|| over.get()).await;
        assert!(written.get() < LARGE / 4, "{} were taken", written.get());
        let log = mesh.log(1).await;
        assert!(log.contains(" 200 SI stream_idle_timeout "), "{log}");
        drop(client);
        happens(|| mesh.server.store.number("http.test.downstream_cx_active") == 0).await;
    });
}

/// What the system itself holds for four sockets is far less.
const LARGE: u64 = 100 * 1024 * 1024;

#[test]
fn replies_to_clients_that_are_gone_harm_nobody() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let routes = "          - {match: {path: /ok}, route: {cluster: a}}
          - {match: {prefix: /}, route: {cluster: full}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port), ("full", 1)]).await;
        for pipelined in [1, 20] {
            for _ in 0..50 {
                let mut client = mesh.connect().await;
                let request = "GET /x HTTP/1.1\r\nHost: h\r\n\r\n".repeat(pipelined);
                client.write_all(request.as_bytes()).await.unwrap();
                // A reset, not an end.
                client.set_zero_linger().unwrap();
                drop(client);
            }
        }
        assert!(mesh.get("/ok").await.ends_with("ok"));
        happens(|| {
            let store = &mesh.server.store;
            store.number("http.test.downstream_rq_active") == 0
                && store.number("http.test.downstream_cx_active") == 0
        })
        .await;
    });
}

#[test]
fn a_hedged_request_takes_the_first_good_answer() {
    // The first attempt hangs for longer than one may; the second answers.
    const HEDGED: &str = "          - {match: {prefix: /}, route: {cluster: a, timeout: 10s, \
        hedge_policy: {hedge_on_per_try_timeout: true}, \
        retry_policy: {retry_on: 5xx, num_retries: 1, per_try_timeout: 0.1s, retry_back_off: {base_interval: 0.001s}}}}";
    run(async {
        let origin = Origin::new(&[Act::Hang, OK]).await;
        let mesh = Mesh::new(HEDGED, "", "", &[("a", origin.port)]).await;
        let answer = mesh.get("/").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(mesh.log(1).await, "GET / 200 - via_upstream 2\n");
    });
    // The second attempt hangs, too, and no third is allowed: the first answers late and wins.
    run(async {
        let late = Act::SayLater(
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate",
            Duration::from_millis(400),
        );
        let origin = Origin::new(&[late, Act::Hang]).await;
        let mesh = Mesh::new(HEDGED, "", "", &[("a", origin.port)]).await;
        let answer = mesh.get("/").await;
        assert!(answer.ends_with("late"), "{answer}");
        assert_eq!(origin.seen().len(), 2);
    });
    // A POST is not sent twice; its only attempt is waited for.
    run(async {
        let late = Act::SayLater(
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate",
            Duration::from_millis(400),
        );
        let origin = Origin::new(&[late, OK]).await;
        let mesh = Mesh::new(HEDGED, "", "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")
            .await;
        assert!(answer.ends_with("late"), "{answer}");
        assert_eq!(origin.seen().len(), 1);
        assert_eq!(
            mesh.server
                .store
                .number("cluster.a.upstream_rq_retry_unsafe"),
            1
        );
    });
}

#[test]
fn a_retry_asked_for_by_policy_is_withheld_where_a_server_may_be_at_work() {
    let policy = "retry_policy: {retry_on: 'reset,retriable-status-codes', retriable_status_codes: [503], \
        num_retries: 1, retry_back_off: {base_interval: 0.001s}}";
    let post = |key: &str| {
        format!(
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n{key}Connection: close\r\n\r\nx"
        )
    };
    let bad = Act::Say("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
    for (first, key, metadata, status, arrivals) in [
        // Nobody knows how far it came.
        (Act::Close, "", "", 503, 1),
        // The server has answered, and the policy says what that means.
        (bad, "", "", 200, 2),
        // The server tells repetitions itself.
        (Act::Close, "Idempotency-Key: 7\r\n", "", 200, 2),
        // The operator has switched the rule off.
        (
            Act::Close,
            "",
            "metadata: {filter_metadata: {outrigger: {retry_unsafe_requests: true}}}",
            200,
            2,
        ),
    ] {
        let routes = format!(
            "          - {{match: {{prefix: /}}, route: {{cluster: a, {policy}}}, {metadata}}}"
        );
        run(async move {
            let origin = Origin::new(&[first, OK]).await;
            let mesh = Mesh::new(&routes, "", "", &[("a", origin.port)]).await;
            let answer = mesh.ask(&post(key)).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{answer}"
            );
            assert_eq!(origin.seen().len(), arrivals);
        });
    }
}
