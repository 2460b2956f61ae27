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
                answer.starts_with("HTTP/1.1 504 ")
                    && answer.ends_with("\r\n\r\ndownstream duration timeout"),
                "{answer}"
            );
        }
        let half = mesh.get("/half").await;
        assert!(half.ends_with("\r\n\r\nab"), "{half}");
        assert_eq!(
            mesh.log(3).await,
            "GET /route 504 - max_duration_timeout 1\n\
             GET /all 504 - max_duration_timeout 1\n\
             GET /half 200 - max_duration_timeout 1\n"
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

#[test]
fn grpc_says_how_long_it_takes_and_is_told_how_long_it_may() {
    run(async {
        let none: Act = Act::Say("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        let origin = Origin::new(&[none, OK, OK, OK, OK, Act::Hang, Act::Hang]).await;
        let routes = "          - {match: {prefix: /old}, route: {cluster: a, timeout: 900s, max_grpc_timeout: 400s, grpc_timeout_offset: 1s}}
          - {match: {prefix: /new}, route: {cluster: a, timeout: 900s, max_stream_duration: {grpc_timeout_header_max: 500s, grpc_timeout_header_offset: 1s}}}
          - {match: {prefix: /slow}, route: {cluster: a, timeout: 0.1s}}
          - {match: {prefix: /late}, route: {cluster: a, max_stream_duration: {max_stream_duration: 0.1s}}}
          - {match: {prefix: /any}, route: {cluster: a}}";
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lines");
        let log = format!(
            "{{name: own, filter: {{grpc_status_filter: {{statuses: [OK], exclude: true}}}}, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
             path: {}, log_format: {{text_format_source: {{inline_string: '%REQ(:PATH)% %GRPC_STATUS%\n\n'}}}}}}}}",
            path.display()
        );
        let mesh = Mesh::with_log(routes, "", &log, &[("a", origin.port)]).await;
        let ask = async |path: &str, kind: &str, timeout: &str| {
            let request = format!(
                "POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: {kind}\r\ngrpc-timeout: {timeout}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            let answer = mesh.ask(&request).await;
            (answer, origin.seen().pop().unwrap_or_default())
        };
        let grpc = "application/grpc";
        let told = |seen: &str| {
            let line = seen.lines().find(|line| line.starts_with("grpc-timeout: "));
            let value = line.and_then(|line| line.strip_prefix("grpc-timeout: "));
            let value = value.and_then(|value| value.strip_suffix('m')).expect(seen);
            value.parse::<u64>().expect("milliseconds")
        };
        ask("/any", grpc, "1H").await;
        // What time has passed is taken off.
        for asked in ["1H", "0m"] {
            let (_, seen) = ask("/old", grpc, asked).await;
            assert!((300_000..=400_000).contains(&told(&seen)), "{seen}");
        }
        let (_, seen) = ask("/new", grpc, "1H").await;
        assert_eq!(told(&seen), 499_000, "{seen}");
        assert!(!seen.contains("x-envoy-expected-rq-timeout-ms"), "{seen}");
        let (_, seen) = ask("/old", "application/json", "1H").await;
        assert!(seen.contains("grpc-timeout: 1H\r\n"), "{seen}");
        let (slow, _) = ask("/slow", grpc, "1H").await;
        assert!(slow.contains("grpc-status: 14\r\n"), "{slow}");
        let (late, _) = ask("/late", grpc, "1H").await;
        assert!(late.contains("grpc-status: 4\r\n"), "{late}");
        assert!(
            late.contains("grpc-message: downstream duration timeout\r\n"),
            "{late}"
        );
        // It is a type of its own.
        let (other, _) = ask("/none", "Application/gRPC", "1H").await;
        assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
        let lines = within(async {
            loop {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                if text.lines().count() >= 8 {
                    return text;
                }
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        })
        .await;
        assert_eq!(
            lines,
            "/any Unimplemented\n/old Unknown\n/old Unknown\n/new Unknown\n/old -\n/slow Unavailable\n\
             /late DeadlineExceeded\n/none -\n"
        );
    });
}
