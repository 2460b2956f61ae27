//! How long a request may last, whatever moves on it.

use crate::support::{Act, Mesh, OK, Origin, TO_A, run};

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
