//! How connections end: by their age, by drain, and with clients that do not let go; and what comes at a body's end.

use std::time::Duration;

use testkit::frames::{ACK, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, RST_STREAM};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    http2::{Peer, counted},
    support::{Act, Mesh, OK, Origin, TO_A, run, within},
};

const DIRECT: &str =
    "          - {match: {prefix: /}, direct_response: {status: 200, body: {inline_string: ok}}}";
const LATE: &str = "http.test.downstream_cx_delayed_close_timeout";
const OLD: &str = "http.test.downstream_cx_max_duration_reached";

/// The usual type is for a reply that has none after the route's changes, as in Envoy.
#[test]
fn a_route_may_say_of_what_type_its_own_answer_is() {
    run(async {
        let routes = "          - match: {path: /json}
            direct_response: {status: 200, body: {inline_string: '{}'}}
            response_headers_to_add: [{header: {key: Content-Type, value: application/json}}]
          - match: {path: /set}
            direct_response: {status: 200, body: {inline_string: '{}'}}
            response_headers_to_add: [{header: {key: content-type, value: a/b}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]
          - match: {path: /gone}
            direct_response: {status: 200, body: {inline_string: '{}'}}
            response_headers_to_remove: [content-type]
          - match: {prefix: /}
            direct_response: {status: 200, body: {inline_string: '{}'}}";
        let mesh = Mesh::new(routes, "", "", &[]).await;
        for (path, grpc, kind) in [
            ("/json", "", "application/json"),
            ("/set", "", "a/b"),
            ("/gone", "", "text/plain"),
            ("/", "", "text/plain"),
            (
                "/json",
                "Content-Type: application/grpc\r\n",
                "application/grpc",
            ),
        ] {
            let answer = mesh
                .ask(&format!(
                    "GET {path} HTTP/1.1\r\nHost: h\r\n{grpc}Connection: close\r\n\r\n"
                ))
                .await
                .to_lowercase();
            assert_eq!(
                answer.matches("content-type:").count(),
                1,
                "{path}: {answer}"
            );
            assert!(
                answer.contains(&format!("content-type: {kind}\r\n")),
                "{path}: {answer}"
            );
        }
    });
}

#[test]
fn a_client_that_does_not_close_is_waited_for_until_the_delayed_close_is_over() {
    run(async {
        // What is left of the request's body is read, so that no reset takes the answer away.
        let post = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nabc";
        let mesh = Mesh::new(DIRECT, "delayed_close_timeout: 2s", "", &[]).await;
        let mut client = mesh.connect().await;
        client.write_all(post).await.expect("it is open");
        let mut answer = Vec::new();
        let read = within(client.read_to_end(&mut answer)).await;
        read.expect("a clean end of our side");
        let answer = String::from_utf8(answer).expect("text");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"));
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        assert_eq!(mesh.server.store.number(LATE), 0);
        assert_eq!(
            mesh.server.store.number("http.test.downstream_cx_active"),
            1
        );
        client.write_all(b"more").await.expect("it is read");
        counted(&mesh, LATE, 1).await;
        counted(&mesh, "http.test.downstream_cx_active", 0).await;
        within(async { while client.write_all(b"more").await.is_ok() {} }).await;
        // One that closes ends the wait, and with 0 there is none.
        for timeout in ["60s", "0s"] {
            let options = format!("delayed_close_timeout: {timeout}");
            let mesh = Mesh::new(DIRECT, &options, "", &[]).await;
            let mut client = mesh.connect().await;
            client.write_all(post).await.expect("it is open");
            let mut answer = [0; 15];
            client.read_exact(&mut answer).await.expect("an answer");
            assert_eq!(&answer, b"HTTP/1.1 200 OK");
            if timeout == "60s" {
                drop(client);
            }
            counted(&mesh, "http.test.downstream_cx_destroy", 1).await;
            assert_eq!(mesh.server.store.number(LATE), 0);
        }
    });
}

#[test]
fn old_connections_end_with_their_next_response_or_at_rest() {
    let options = |age: &str, drain: &str| {
        format!(
            "common_http_protocol_options: {{max_connection_duration: {age}}}\n      drain_timeout: {drain}"
        )
    };
    run(async {
        let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        let mesh = Mesh::new(DIRECT, &options("1s", "60s"), "", &[]).await;
        let mut client = mesh.connect().await;
        let mut answers = String::new();
        for wait in [0, 1100] {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            client.write_all(get).await.expect("it is open");
            assert!(!answers.contains("connection: close"), "{answers}");
            if wait == 0 {
                while !answers.ends_with("\r\n\r\nok") {
                    answers.push(within(client.read_u8()).await.expect("an answer").into());
                }
            }
        }
        let read = within(client.read_to_string(&mut answers)).await;
        read.expect("a clean end");
        assert!(answers.contains("connection: close\r\n"), "{answers}");
        assert!(answers.ends_with("\r\n\r\nok"), "{answers}");
        counted(&mesh, OLD, 1).await;
        // At rest, and where nothing was ever said.
        for age in ["1s", "0.1s"] {
            let mesh = Mesh::new(DIRECT, &options(age, "0.1s"), "", &[]).await;
            let mut client = mesh.connect().await;
            if age == "1s" {
                client.write_all(get).await.expect("it is open");
            }
            let mut answer = String::new();
            let read = within(client.read_to_string(&mut answer)).await;
            read.expect("a clean end");
            assert_eq!(answer.ends_with("\r\n\r\nok"), age == "1s", "{answer}");
            counted(&mesh, OLD, 1).await;
        }
        let mesh = Mesh::new(DIRECT, &options("0.1s", "0.1s"), "", &[]).await;
        let mut client = Peer::client(&mesh).await;
        assert!(client.find(&[GOAWAY]).await.is_some());
        counted(&mesh, OLD, 1).await;
    });
}

#[test]
fn a_listener_that_drains_says_goaway_and_finishes_its_streams() {
    run(async {
        let later = Act::SayLater(
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            Duration::from_millis(200),
        );
        let origin = Origin::new(&[later, OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let mut client = Peer::client(&mesh).await;
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        counted(&mesh, "cluster.a.upstream_rq_active", 1).await;
        mesh.server.drain_listeners(false, true, true);
        let first = client.find(&[GOAWAY]).await.expect("a first one");
        assert_eq!(first.payload[..8], [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        let ping = client.find(&[PING]).await.expect("a question");
        // A stream that was on its way is taken, too.
        client.say(HEADERS, END_HEADERS | END_STREAM, 3, GET).await;
        client.say(PING, ACK, 0, &ping.payload).await;
        let mut last = None;
        let mut answered = Vec::new();
        while let Some(frame) = client.find(&[GOAWAY, HEADERS, RST_STREAM]).await {
            match frame.kind {
                GOAWAY => last = Some(frame.payload[..8].to_vec()),
                HEADERS => answered.push((frame.stream, frame.payload[0])),
                _ => panic!("{frame:?}"),
            }
        }
        assert_eq!(last, Some(vec![0, 0, 0, 3, 0, 0, 0, 0]));
        answered.sort_unstable();
        assert_eq!(answered, [(1, 0x88), (3, 0x88)]);
        let drained = "http.test.downstream_cx_drain_close";
        assert!(mesh.server.store.number(drained) >= 1);
    });
}

#[test]
fn trailers_pass_over_http1_where_both_sides_allow_it() {
    const TRAILED: Act = Act::Say(
        "HTTP/1.1 200 OK\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n",
    );
    run(async {
        let options = |on: bool| format!("http_protocol_options: {{enable_trailers: {on}}}");
        for (down, up) in [(true, true), (true, false), (false, true), (false, false)] {
            let origin = Origin::new(&[TRAILED]).await;
            let cluster = format!(
                "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\
                 \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
                 explicit_http_config: {{{}}}}}}}",
                options(up)
            );
            let clusters = [("a", origin.port)];
            let mesh = Mesh::with(TO_A, &options(down), "", &clusters, &cluster).await;
            let post = "POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                1\r\na\r\n0\r\nx-check: 1\r\n\r\n";
            let answer = mesh.ask(post).await;
            assert!(answer.contains("\r\n2\r\nok\r\n0\r\n"), "{answer}");
            let both = down && up;
            let trailed = answer.to_lowercase().ends_with("\r\n0\r\nx-sum: 7\r\n\r\n");
            assert_eq!(trailed, both, "{down} {up}: {answer}");
            let seen = origin.seen().concat();
            let trailed = seen.to_lowercase().ends_with("\r\n0\r\nx-check: 1\r\n\r\n");
            assert_eq!(trailed, both, "{down} {up}: {seen}");
        }
    });
}
