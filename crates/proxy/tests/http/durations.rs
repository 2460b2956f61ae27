//! How long a request may last, whatever moves on it, and how long a connection is kept.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Act, Mesh, OK, Origin, TO_A, run, within};

/// A response that never comes to its end.
const HALF: Act = Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab");

#[test]
fn a_cluster_limits_each_attempt() {
    run(async {
        let origin = Origin::new(&[Act::Hang, HALF, Act::Hang, OK]).await;
        let limit = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\
            \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
            explicit_http_config: {http_protocol_options: {}}, common_http_protocol_options: {max_stream_duration: 0.3s}}}";
        let routes = format!(
            "          - {{match: {{path: /again}}, route: {{cluster: a, retry_policy: {{retry_on: reset, num_retries: 1}}}}}}\n{TO_A}"
        );
        let mesh = Mesh::with(&routes, "", "", &[("a", origin.port)], limit).await;
        let answer = mesh.get("/none").await;
        assert!(
            answer.starts_with("HTTP/1.1 504 Gateway Timeout\r\n")
                && answer.ends_with("\r\n\r\nupstream max stream duration reached"),
            "{answer}"
        );
        let half = mesh.get("/half").await;
        assert!(half.ends_with("\r\n\r\nab"), "{half}");
        let again = mesh.get("/again").await;
        assert!(again.starts_with("HTTP/1.1 200 OK\r\n"), "{again}");
        assert_eq!(
            mesh.log(3).await,
            "GET /none 504 UMSDR upstream_max_stream_duration_reached 1\n\
             GET /half 200 UMSDR upstream_max_stream_duration_reached 1\n\
             GET /again 200 - via_upstream 2\n"
        );
        let number = |name: &str| mesh.server.store.number(&format!("cluster.a.{name}"));
        assert_eq!(number("upstream_rq_max_duration_reached"), 3);
        assert_eq!(number("upstream_rq_timeout"), 0);
    });
}

#[test]
fn routes_and_connection_managers_limit_all_attempts_together() {
    run(async {
        let origin = Origin::new(&[Act::Hang, Act::Hang, HALF]).await;
        let routes = format!(
            "          - {{match: {{path: /route}}, route: {{cluster: a, max_stream_duration: {{max_stream_duration: 0.2s}}}}}}\n{TO_A}"
        );
        let options = "common_http_protocol_options: {max_stream_duration: 0.4s}";
        let mesh = Mesh::new(&routes, options, "", &[("a", origin.port)]).await;
        for path in ["/route", "/all"] {
            let answer = mesh.get(path).await;
            assert!(
                answer.starts_with("HTTP/1.1 504 ") && answer.ends_with("\r\n\r\nstream timeout"),
                "{answer}"
            );
        }
        let half = mesh.get("/half").await;
        assert!(half.ends_with("\r\n\r\nab"), "{half}");
        assert_eq!(
            mesh.log(3).await,
            "GET /route 504 DT max_duration_timeout 1\n\
             GET /all 504 DT max_duration_timeout 1\n\
             GET /half 200 DT max_duration_timeout 1\n"
        );
        let reached = "http.test.downstream_rq_max_duration_reached";
        assert_eq!(mesh.server.store.number(reached), 3);
    });
}

/// A request on a connection that is kept, and its answer.
async fn ask(client: &mut TcpStream) -> String {
    let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
    client.write_all(get).await.expect("it is there");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nok") {
        let read = within(client.read_buf(&mut answer)).await;
        assert_ne!(read.expect("bytes"), 0, "{answer:?}");
    }
    String::from_utf8(answer).expect("text")
}

#[test]
fn responses_of_a_listener_that_drains_are_the_last_of_their_connections() {
    run(async {
        for (inbound_only, last) in [(false, true), (true, false)] {
            let origin = Origin::new(&[OK; 4]).await;
            let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
            let mut client = mesh.connect().await;
            assert!(!ask(&mut client).await.contains("connection: close"));
            mesh.server.drain_listeners(inbound_only, true, true);
            mesh.server.settled().await;
            let answer = ask(&mut client).await;
            assert_eq!(answer.contains("connection: close\r\n"), last, "{answer}");
            if last {
                let end = within(client.read(&mut [0])).await;
                assert_eq!(end.expect("a clean end"), 0);
                let drained = "http.test.downstream_cx_drain_close";
                assert_eq!(mesh.server.store.number(drained), 1);
            } else {
                // It is no inbound listener.
                assert!(!ask(&mut client).await.contains("connection: close"));
            }
            // With `stay` it takes new connections all the same.
            assert!(mesh.get("/").await.ends_with("ok"));
        }
    });
}
