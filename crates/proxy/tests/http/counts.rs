//! What is counted of connections: who ended them, what they were for, and what waits in them.

use testkit::frames::{END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use crate::{
    http2::{Peer, counted},
    support::{Act, Mesh, OK, Origin, TO_A, request, run, within},
};

const DIRECT: &str = "          - {match: {prefix: /}, direct_response: {status: 200}}";

#[test]
fn who_ended_an_upstream_connection_and_whether_in_the_middle() {
    const HALF: Act = Act::SayAndClose("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab");
    const NONSENSE: Act = Act::Say("HTTP/1.1 many\r\n\r\n");
    const LAST: Act =
        Act::Say("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok");
    const LATER: Act = Act::SayAndClose("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    run(async {
        for (act, remote, active, reset, told) in [
            (HALF, true, true, 1, 0),
            (Act::Close, true, true, 0, 0),
            (NONSENSE, false, true, 0, 0),
            (LAST, false, false, 0, 1),
            (LATER, true, false, 0, 0),
        ] {
            let origin = Origin::new(&[act]).await;
            let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
            mesh.get("/").await;
            counted(&mesh, "cluster.a.upstream_cx_destroy", 1).await;
            let (remote, active) = (i64::from(remote), i64::from(active));
            for (name, value) in [
                ("remote", remote),
                ("local", 1 - remote),
                ("with_active_rq", active),
                ("remote_with_active_rq", remote * active),
                ("local_with_active_rq", (1 - remote) * active),
            ] {
                let name = format!("cluster.a.upstream_cx_destroy_{name}");
                assert_eq!(mesh.server.store.number(&name), value, "{name}");
            }
            counted(&mesh, "http.test.downstream_rq_tx_reset", reset).await;
            counted(&mesh, "cluster.a.upstream_cx_close_notify", told).await;
        }
    });
}

#[test]
fn an_http2_upstream_that_breaks_off_is_counted_by_what_it_left_unanswered() {
    const TO_H2: &str = "          - {match: {prefix: /}, route: {cluster: a-h2}}";
    run(async {
        for (answers, status, active) in [(false, "503", 1), (true, "200", 0)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let port = listener.local_addr().expect("it is bound").port();
            let mesh = Mesh::new(TO_H2, "", "", &[("a-h2", port)]).await;
            let server = async {
                let (stream, _) = listener.accept().await.expect("it comes");
                let mut peer = Peer::server(stream, &[]).await;
                let head = peer.find(&[HEADERS]).await.expect("a request");
                if answers {
                    let (flags, ok) = (END_HEADERS | END_STREAM, &[0x88]);
                    peer.say(HEADERS, flags, head.stream, ok).await;
                    counted(&mesh, "cluster.a-h2.upstream_rq_active", 0).await;
                    peer.say(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]).await;
                    // A close with something unread would be a reset, which overtakes it.
                    counted(&mesh, "cluster.a-h2.upstream_cx_close_notify", 1).await;
                }
            };
            let (answer, ()) = tokio::join!(mesh.get("/"), server);
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{answer}"
            );
            counted(&mesh, "cluster.a-h2.upstream_cx_destroy", 1).await;
            let told = i64::from(answers);
            counted(&mesh, "cluster.a-h2.upstream_cx_close_notify", told).await;
            for (name, value) in [
                ("remote", 1),
                ("local", 0),
                ("with_active_rq", active),
                ("remote_with_active_rq", active),
            ] {
                let name = format!("cluster.a-h2.upstream_cx_destroy_{name}");
                assert_eq!(mesh.server.store.number(&name), value, "{name}");
            }
        }
    });
}

#[test]
fn who_ended_a_downstream_connection_and_whether_in_the_middle() {
    run(async {
        let ended = async |mesh: &Mesh, remote: i64, active: i64| {
            counted(mesh, "http.test.downstream_cx_destroy", 1).await;
            for (name, value) in [
                ("remote", remote),
                ("local", 1 - remote),
                ("active_rq", active),
                ("remote_active_rq", remote * active),
                ("local_active_rq", (1 - remote) * active),
            ] {
                let name = format!("http.test.downstream_cx_destroy_{name}");
                assert_eq!(mesh.server.store.number(&name), value, "{name}");
            }
        };
        let mesh = Mesh::new(DIRECT, "", "", &[]).await;
        mesh.get("/").await;
        ended(&mesh, 0, 0).await;
        let mesh = Mesh::new(DIRECT, "", "", &[]).await;
        let mut client = mesh.connect().await;
        let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        client.write_all(get).await.expect("it is open");
        client.read_u8().await.expect("an answer");
        drop(client);
        ended(&mesh, 1, 0).await;
        for http2 in [false, true] {
            let origin = Origin::new(&[Act::Hang]).await;
            let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
            if http2 {
                let mut client = Peer::client(&mesh).await;
                client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
                counted(&mesh, "cluster.a.upstream_rq_active", 1).await;
            } else {
                let mut client = mesh.connect().await;
                client.write_all(get).await.expect("it is open");
                counted(&mesh, "cluster.a.upstream_rq_active", 1).await;
            }
            ended(&mesh, 1, 1).await;
        }
        // A request counts from its first byte.
        let mesh = Mesh::new(DIRECT, "", "", &[]).await;
        let mut client = mesh.connect().await;
        client.write_all(b"GET / HT").await.expect("it is open");
        drop(client);
        ended(&mesh, 1, 1).await;
    });
}

#[test]
fn a_connection_that_cannot_be_made_is_counted_by_its_reason() {
    run(async {
        let mesh = Mesh::new(TO_A, "", "", &[("a", 1)]).await;
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 503 "));
        let number = |mesh: &Mesh, name: &str| {
            let name = format!("cluster.a.{name}");
            mesh.server.store.number(&name)
        };
        assert_eq!(number(&mesh, "upstream_rq_pending_failure_eject"), 1);
        assert_eq!(number(&mesh, "upstream_cx_destroy_remote"), 1);
        assert_eq!(number(&mesh, "bind_errors"), 0);
        // An address that this machine does not have.
        let bind = "upstream_bind_config: {source_address: {address: 192.0.2.1, port_value: 0}}";
        let mesh = Mesh::with(TO_A, "", "", &[("a", 1)], bind).await;
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 503 "));
        assert_eq!(number(&mesh, "upstream_rq_pending_failure_eject"), 1);
        assert_eq!(number(&mesh, "bind_errors"), 1);
    });
}

/// An origin that answers without end once it has read a head, and reads nothing more.
async fn endless() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("it is bound").port();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                if request(&mut stream).await.is_none() {
                    return;
                }
                let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                let mut sent = stream.write_all(head).await;
                let chunk = [b"10000\r\n", &[b'x'; 0x10000][..], b"\r\n"].concat();
                while sent.is_ok() {
                    sent = stream.write_all(&chunk).await;
                }
            });
        }
    });
    port
}

#[test]
fn bytes_that_nobody_takes_are_counted_while_they_wait() {
    run(async {
        let waits = async |mesh: &Mesh, name: &str| {
            within(async {
                while mesh.server.store.number(name) <= 0 {
                    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
                }
            })
            .await;
        };
        let mesh = Mesh::new(TO_A, "", "", &[("a", endless().await)]).await;
        let mut client = mesh.connect().await;
        let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        client.write_all(get).await.expect("it is open");
        let to_client = "http.test.downstream_cx_tx_bytes_buffered";
        waits(&mesh, to_client).await;
        drop(client);
        counted(&mesh, to_client, 0).await;
        // An upstream that does not read.
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
        let mut client = mesh.connect().await;
        let sends = spawn_local(async move { send_for_ever(&mut client).await });
        let (upstream, _) = within(listener.accept()).await.expect("it comes");
        let to_upstream = "cluster.a.upstream_cx_tx_bytes_buffered";
        waits(&mesh, to_upstream).await;
        drop(upstream);
        counted(&mesh, to_upstream, 0).await;
        sends.abort();
    });
}

async fn send_for_ever(client: &mut TcpStream) {
    let head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n";
    let mut sent = client.write_all(head).await;
    while sent.is_ok() {
        sent = client.write_all(&[b'x'; 0x10000]).await;
    }
}

#[test]
fn connections_of_one_wake_up_are_counted() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        assert!(mesh.get("/").await.ends_with("ok"));
        let text = mesh.server.store.prometheus(&stats::Query::default());
        let name = "envoy_listener_connections_accepted_per_socket_event_count";
        assert!(text.contains(name), "{text}");
    });
}

#[test]
fn responses_count_once_whoever_made_them() {
    run(async {
        let busy = Act::Say("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
        let moved =
            Act::Say("HTTP/1.1 302 Found\r\nLocation: http://h/\r\nContent-Length: 0\r\n\r\n");
        let origin = Origin::new(&[busy, OK, busy, Act::Hang, moved, OK]).await;
        let routes = "          - {match: {path: /again}, route: {cluster: a, retry_policy: {retry_on: 5xx, num_retries: 1, retry_back_off: {base_interval: 0.001s}}}}
          - {match: {path: /slow}, route: {cluster: a, timeout: 0.1s}}
          - {match: {path: /moved}, route: {cluster: a, internal_redirect_policy: {}}}
          - {match: {path: /dead}, route: {cluster: dead}}
          - {match: {prefix: /}, route: {cluster: a}}";
        let clusters = [("a", origin.port), ("dead", 1)];
        let mesh = Mesh::new(routes, "", "", &clusters).await;
        for (path, status) in [
            ("/again", 200),
            ("/", 503),
            ("/slow", 504),
            ("/moved", 200),
            ("/dead", 503),
        ] {
            let answer = mesh.get(path).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path}: {answer}"
            );
        }
        let number = |name: &str| mesh.server.store.number(&format!("cluster.{name}"));
        for (name, count) in [
            ("a.upstream_rq_completed", 4),
            ("a.upstream_rq_2xx", 2),
            ("a.upstream_rq_200", 2),
            ("a.upstream_rq_3xx", 0),
            ("a.upstream_rq_5xx", 2),
            ("a.upstream_rq_503", 1),
            ("a.upstream_rq_504", 1),
            ("a.retry.upstream_rq_completed", 1),
            ("a.retry.upstream_rq_5xx", 1),
            ("a.retry.upstream_rq_503", 1),
            ("a.external.upstream_rq_completed", 4),
            ("a.external.upstream_rq_2xx", 2),
            ("a.external.upstream_rq_504", 1),
            ("dead.upstream_rq_completed", 1),
            ("dead.upstream_rq_503", 1),
            ("dead.external.upstream_rq_5xx", 1),
        ] {
            assert_eq!(number(name), count, "{name}");
        }
    });
}
