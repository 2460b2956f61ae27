//! Limits of a cluster: connections of a host, retries as a share, and how much is left.

use std::time::Duration;

use crate::{
    http2::counted,
    support::{Act, Mesh, OK, Origin, TO_A, run},
};

#[test]
fn a_host_has_no_more_connections_than_it_may() {
    run(async {
        const LATER: Act = Act::SayLater(
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            Duration::from_millis(50),
        );
        for (limit, connections) in [(1, 1), (2, 2)] {
            let origin = Origin::new(&[LATER; 2]).await;
            let breaker = format!(
                "circuit_breakers: {{per_host_thresholds: [{{max_connections: {limit}}}]}}"
            );
            let mesh = Mesh::with(TO_A, "", "", &[("a", origin.port)], &breaker).await;
            let (one, two) = tokio::join!(mesh.get("/1"), mesh.get("/2"));
            assert!(one.ends_with("ok") && two.ends_with("ok"), "{one}{two}");
            let number = |name: &str| mesh.server.store.number(&format!("cluster.a.{name}"));
            assert_eq!(number("upstream_cx_total"), connections);
            assert_eq!(number("upstream_cx_overflow"), 2 - connections);
        }
    });
}

#[test]
fn retries_are_a_share_of_the_requests_under_way() {
    const BUSY: Act = Act::Say("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
    const RETRIES: &str = "          - {match: {prefix: /}, route: {cluster: a, retry_policy: {retry_on: 5xx, num_retries: 1, \
        retry_back_off: {base_interval: 0.001s}}}}";
    run(async {
        // Of one request under way half a retry is none, and all of it is one.
        for (percent, status, overflow) in [(50, "503", 1), (100, "200", 0)] {
            let origin = Origin::new(&[BUSY, OK]).await;
            let breaker = format!(
                "circuit_breakers: {{thresholds: [{{max_retries: 100, retry_budget: {{budget_percent: {{value: {percent}}}, \
                 min_retry_concurrency: 0}}}}]}}"
            );
            let mesh = Mesh::with(RETRIES, "", "", &[("a", origin.port)], &breaker).await;
            let answer = mesh.get("/").await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{percent}: {answer}"
            );
            counted(&mesh, "cluster.a.upstream_rq_retry_overflow", overflow).await;
        }
    });
}

#[test]
fn what_is_left_of_the_limits_is_told_where_it_is_asked_for() {
    run(async {
        for tracked in [true, false] {
            let origin = Origin::new(&[Act::Hang]).await;
            let breaker = format!(
                "circuit_breakers: {{thresholds: [{{max_connections: 5, max_requests: 7, max_pending_requests: 9, \
                 max_retries: 2, track_remaining: {tracked}}}]}}"
            );
            let mesh = Mesh::with(TO_A, "", "", &[("a", origin.port)], &breaker).await;
            let waiting = mesh.get("/");
            let told = async {
                counted(&mesh, "cluster.a.upstream_rq_active", 1).await;
                mesh.server.publish();
                ["cx", "rq", "pending", "retries"].map(|what| {
                    let name = format!("cluster.a.circuit_breakers.default.remaining_{what}");
                    mesh.server.store.number(&name)
                })
            };
            tokio::select! {
                answer = waiting => panic!("{answer}"),
                told = told => assert_eq!(told, if tracked { [4, 6, 9, 2] } else { [0; 4] }),
            }
        }
    });
}
