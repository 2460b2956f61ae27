//! Retries by what heads say, hosts by what they say, and heads before the last one.

use std::{sync::Arc, time::Duration};

use outrigger_proxy::{plan::Cluster, server::Change};
use proto::envoy::config;
use testkit::envoy::message;

use crate::support::{Act, Mesh, OK, Origin, TO_A, run};

const BUSY: Act = Act::Say("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");

#[test]
fn early_hints_come_before_the_response() {
    run(async {
        let hints = Act::Say(
            "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n\
             HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        );
        let origin = Origin::new(&[hints, hints]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let answer = mesh.get("/").await;
        let [early, processing, last] =
            ["HTTP/1.1 103 ", "HTTP/1.1 102 ", "HTTP/1.1 200 "].map(|line| {
                answer
                    .find(line)
                    .unwrap_or_else(|| panic!("{line} {answer}"))
            });
        assert!(early < processing && processing < last, "{answer}");
        assert!(
            answer[early..processing].contains("Link: </a>\r\n"),
            "{answer}"
        );
    });
}

#[test]
fn headers_say_what_is_tried_again() {
    run(async {
        let soon = Act::Say("HTTP/1.1 409 No\r\nX-Again: soon\r\nContent-Length: 0\r\n\r\n");
        let never = Act::Say("HTTP/1.1 409 No\r\nX-Again: never\r\nContent-Length: 0\r\n\r\n");
        let origin = Origin::new(&[soon, OK, never, BUSY, OK, BUSY]).await;
        let back_off = "retry_back_off: {base_interval: 0.001s}";
        let routes = format!(
            "          - {{match: {{path: /response}}, route: {{cluster: a, retry_policy: {{retry_on: retriable-headers, num_retries: 1, {back_off}, \
             retriable_headers: [{{name: x-again, string_match: {{exact: soon}}}}]}}}}}}\n\
             \u{20}         - {{match: {{prefix: /}}, route: {{cluster: a, retry_policy: {{retry_on: 5xx, num_retries: 1, {back_off}, \
             retriable_request_headers: [{{name: x-may, present_match: true}}]}}}}}}"
        );
        let mesh = Mesh::new(&routes, "", "", &[("a", origin.port)]).await;
        let may = "GET /may HTTP/1.1\r\nHost: h\r\nX-May: 1\r\nConnection: close\r\n\r\n";
        assert!(mesh.get("/response").await.ends_with("ok"));
        assert!(mesh.get("/response").await.starts_with("HTTP/1.1 409 "));
        assert!(mesh.ask(may).await.ends_with("ok"));
        assert!(mesh.get("/may-not").await.starts_with("HTTP/1.1 503 "));
        assert_eq!(
            mesh.log(4).await,
            "GET /response 200 - via_upstream 2\nGET /response 409 - via_upstream 1\n\
             GET /may 200 - via_upstream 2\nGET /may-not 503 - via_upstream 1\n"
        );
    });
}

#[test]
fn a_server_that_says_when_to_come_back_is_asked_no_sooner() {
    run(async {
        let later = Act::Say("HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n");
        let origin = Origin::new(&[later, OK]).await;
        let routes = "          - {match: {prefix: /}, route: {cluster: a, retry_policy: {retry_on: 5xx, num_retries: 1, \
            rate_limited_retry_back_off: {max_interval: 60s, reset_headers: [{name: retry-after, format: SECONDS}]}}}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        let begun = std::time::Instant::now();
        assert!(mesh.get("/").await.ends_with("ok"));
        assert!(begun.elapsed() >= Duration::from_secs(1));
        let number = |name: &str| mesh.server.store.number(&format!("cluster.a.{name}"));
        assert_eq!(number("upstream_rq_retry_backoff_ratelimited"), 1);
        assert_eq!(number("upstream_rq_retry_backoff_exponential"), 0);
    });
}

#[test]
fn a_cookie_leads_to_the_same_host() {
    run(async {
        let origins = [Origin::new(&[OK; 40]).await, Origin::new(&[OK; 40]).await];
        let routes = "          - {match: {prefix: /}, route: {cluster: a, hash_policy: [{cookie: {name: s, ttl: 60s, path: /p}}]}}";
        let mesh = Mesh::new(routes, "", "", &[]).await;
        let hosts = origins.each_ref().map(|origin| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}",
                origin.port
            )
        });
        let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&format!(
            "name: a\ntype: STATIC\nlb_policy: RING_HASH\nconnect_timeout: 2s\n\
             load_assignment: {{cluster_name: a, endpoints: [{{lb_endpoints: [{}]}}]}}",
            hosts.join(", ")
        )));
        let change = Change::UpsertCluster(Arc::new(plan.expect("a plan").into()));
        for done in mesh.server.apply(vec![change]) {
            done.expect("it applies");
        }
        mesh.server.settled().await;
        // Those without a cookie get one each, and go to both.
        let mut cookie = String::new();
        for _ in 0..30 {
            let answer = mesh.get("/").await;
            let line = answer.lines().find_map(|l| l.strip_prefix("set-cookie: "));
            let line = line.unwrap_or_else(|| panic!("{answer}"));
            assert!(line.ends_with("; Max-Age=60; Path=/p; HttpOnly"), "{line}");
            cookie = line.split(';').next().expect("a pair").to_owned();
        }
        let seen = || origins.each_ref().map(|origin| origin.seen().len());
        let before = seen();
        assert!(before[0] > 0 && before[1] > 0, "{before:?}");
        for _ in 0..8 {
            let ask = format!(
                "GET / HTTP/1.1\r\nHost: h\r\nCookie: a=b; {cookie}\r\nConnection: close\r\n\r\n"
            );
            let answer = mesh.ask(&ask).await;
            assert!(
                answer.ends_with("ok") && !answer.contains("set-cookie"),
                "{answer}"
            );
        }
        let after = seen();
        let more = [after[0] - before[0], after[1] - before[1]];
        assert!(more == [8, 0] || more == [0, 8], "{more:?}");
    });
}
