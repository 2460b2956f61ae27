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

/// A mesh whose cluster `a` has two hosts on a ring.
async fn ring(routes: &str, origins: &[Origin; 2]) -> Mesh {
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
    mesh
}

#[test]
fn a_cookie_leads_to_the_same_host() {
    run(async {
        let origins = [Origin::new(&[OK; 40]).await, Origin::new(&[OK; 40]).await];
        let routes = "          - {match: {prefix: /}, route: {cluster: a, hash_policy: [{cookie: {name: s, ttl: 60s, path: /p}}]}}";
        let mesh = ring(routes, &origins).await;
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

#[test]
fn one_of_several_fields_is_enough_for_a_matcher() {
    run(async {
        let routes = "          - {match: {prefix: /is, headers: [{name: x, string_match: {exact: b}}]}, direct_response: {status: 201}}
          - {match: {prefix: /not, headers: [{name: x, string_match: {exact: b}, invert_match: true}]}, direct_response: {status: 202}}
          - {match: {prefix: /range, headers: [{name: x, range_match: {start: 1, end: 5}}]}, direct_response: {status: 203}}
          - {match: {prefix: /comma, headers: [{name: x, string_match: {contains: ','}}]}, direct_response: {status: 204}}
          - {match: {prefix: /}, direct_response: {status: 299}}";
        let mesh = Mesh::new(routes, "", "", &[]).await;
        for (path, fields, status) in [
            ("/is", &["a", "b"][..], 201),
            ("/is", &["b", "a"], 201),
            ("/is", &["a,b"], 299),
            ("/not", &["a", "b"], 299),
            ("/not", &["a", "c"], 202),
            ("/range", &["9", "4"], 203),
            ("/range", &["9", "5"], 299),
            ("/comma", &["a", "b"], 299),
            ("/comma", &["a,b", "c"], 204),
        ] {
            let fields: String = fields.iter().map(|f| format!("x: {f}\r\n")).collect();
            let answer = mesh
                .ask(&format!(
                    "GET {path} HTTP/1.1\r\nHost: h\r\n{fields}Connection: close\r\n\r\n"
                ))
                .await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path} {fields}: {answer}"
            );
        }
    });
}

/// Those that Envoy keeps in a place of their own, as it finds them and as it adds to them.
#[test]
fn several_fields_of_some_names_are_one_value() {
    run(async {
        let origin = Origin::new(&[Act::Say(
            "HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n",
        )])
        .await;
        let routes = "          - {match: {prefix: /is, headers: [{name: via, string_match: {exact: 'a,b'}}]}, direct_response: {status: 201}}
          - match: {prefix: /add}
            request_headers_to_add: [{header: {key: via, value: c}}, {header: {key: x-a, value: c}}]
            response_headers_to_add: [{header: {key: content-type, value: c/d}}, {header: {key: x-a, value: c}}]
            route: {cluster: a, hash_policy: [{cookie: {name: s, ttl: 60s}}]}
          - {match: {prefix: /}, direct_response: {status: 299}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        let ask = async |path: &str, fields: &str| {
            mesh.ask(&format!(
                "GET {path} HTTP/1.1\r\nHost: h\r\n{fields}Connection: close\r\n\r\n"
            ))
            .await
        };
        let two = ask("/is", "Via: a\r\nVia: b\r\n").await;
        assert!(two.starts_with("HTTP/1.1 201 "), "{two}");
        let one = ask("/is", "Via: a\r\n").await;
        assert!(one.starts_with("HTTP/1.1 299 "), "{one}");
        let added = ask("/add", "Via: a\r\nX-A: b\r\n").await.to_lowercase();
        assert!(
            added.contains("content-type: a/b,c/d\r\n")
                && added.contains("x-a: 1\r\n")
                && added.contains("x-a: c\r\n"),
            "{added}"
        );
        // No cookie is given where nothing goes by the hash.
        assert!(!added.contains("set-cookie"), "{added}");
        let seen = origin.seen()[0].to_lowercase();
        assert!(
            seen.contains("via: a,c\r\n")
                && seen.contains("x-a: b\r\n")
                && seen.contains("x-a: c\r\n"),
            "{seen}"
        );
    });
}

#[test]
fn heads_tell_status_and_attempts_of_what_came_and_of_what_did_not() {
    run(async {
        let origin = Origin::new(&[Act::Say("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")]).await;
        let added = "response_headers_to_add: [{header: {key: x-code, value: '%RESPONSE_CODE%'}}]";
        let routes = format!(
            "          - {{match: {{prefix: /dead}}, route: {{cluster: dead, retry_policy: {{retry_on: connect-failure, num_retries: 2, \
             retry_back_off: {{base_interval: 0.001s}}}}}}, {added}}}
          - {{match: {{prefix: /}}, route: {{cluster: a}}, {added}}}
          include_attempt_count_in_response: true"
        );
        let mesh = Mesh::new(&routes, "", "", &[("a", origin.port), ("dead", 1)]).await;
        let found = mesh.get("/").await;
        assert!(
            found.contains("x-code: 404\r\n") && found.contains("x-envoy-attempt-count: 1\r\n"),
            "{found}"
        );
        // A reply of ours has no status yet where the route adds its fields, as in Envoy.
        let dead = mesh.get("/dead").await;
        assert!(
            dead.contains("x-code: 0\r\n") && dead.contains("x-envoy-attempt-count: 3\r\n"),
            "{dead}"
        );
    });
}

#[test]
fn a_retry_is_told_how_much_time_is_left() {
    run(async {
        let origin = Origin::new(&[Act::Hang, OK]).await;
        let routes = "          - {match: {prefix: /}, route: {cluster: a, timeout: 10s, retry_policy: {retry_on: 5xx, per_try_timeout: 0.1s, \
             retry_back_off: {base_interval: 0.001s}}}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 200 OK\r\n"));
        for seen in origin.seen() {
            // All that is left is more than one attempt may take.
            assert!(
                seen.contains("x-envoy-expected-rq-timeout-ms: 100\r\n"),
                "{seen}"
            );
        }
        let later = Act::SayLater(
            "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
            Duration::from_millis(100),
        );
        let origin = Origin::new(&[later, OK]).await;
        let routes = "          - {match: {prefix: /}, route: {cluster: a, timeout: 10s, retry_policy: {retry_on: 5xx, \
             retry_back_off: {base_interval: 0.001s}}}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 200 OK\r\n"));
        let told: Vec<u32> = origin
            .seen()
            .iter()
            .map(|seen| {
                let (_, rest) = seen.split_once("x-envoy-expected-rq-timeout-ms: ").unwrap();
                rest.split_once('\r').unwrap().0.parse().unwrap()
            })
            .collect();
        assert!(
            told[0] == 10_000 && (1..=9_900).contains(&told[1]),
            "{told:?}"
        );
    });
}

#[test]
fn a_body_that_ends_with_its_connection_does_not_end_the_clients() {
    run(async {
        let bare = Act::SayAndClose("HTTP/1.1 200 OK\r\n\r\nall of it");
        let origin = Origin::new(&[bare, OK, bare]).await;
        let mesh = Mesh::new(
            TO_A,
            "http_protocol_options: {accept_http_10: true}",
            "",
            &[("a", origin.port)],
        )
        .await;
        let both = mesh
            .ask("GET /1 HTTP/1.1\r\nHost: h\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .await;
        let (first, second) = both.split_once("\r\n0\r\n\r\n").expect(&both);
        assert!(
            first.contains("transfer-encoding: chunked\r\n")
                && first.ends_with("\r\n\r\n9\r\nall of it")
                && second.ends_with("ok"),
            "{both}"
        );
        // An old client knows no chunks.
        let old = mesh.ask("GET /3 HTTP/1.0\r\nHost: h\r\n\r\n").await;
        assert!(
            !old.contains("chunked") && old.ends_with("\r\n\r\nall of it"),
            "{old}"
        );
    });
}

#[test]
fn policies_give_one_hash_of_the_request_as_it_goes_on() {
    run(async {
        let origins = [Origin::new(&[OK; 99]).await, Origin::new(&[OK; 99]).await];
        let routes = "          - match: {prefix: /cookie}
            route: {cluster: a, hash_policy: [{header: {header_name: x-a}}, {cookie: {name: s, ttl: 60s}}]}
          - match: {prefix: /added}
            request_headers_to_add: [{header: {key: x-added, value: '%REQ(x-a)%'}}]
            route: {cluster: a, hash_policy: [{header: {header_name: x-added}}]}
          - match: {prefix: /terminal}
            route: {cluster: a, hash_policy: [{header: {header_name: x-b}}, {header: {header_name: x-c}, terminal: true}, {header: {header_name: x-a}}]}";
        let mesh = ring(routes, &origins).await;
        let ask = async |path: &str, headers: &str| {
            let before = origins[0].seen().len();
            let answer = mesh
                .ask(&format!(
                    "GET {path} HTTP/1.1\r\nHost: h\r\n{headers}Connection: close\r\n\r\n"
                ))
                .await;
            assert!(answer.ends_with("ok"), "{answer}");
            let cookie = answer.lines().find_map(|l| l.strip_prefix("set-cookie: "));
            let cookie = cookie.and_then(|line| line.split(';').next());
            let pair = cookie.unwrap_or_default().to_owned();
            (origins[0].seen().len() > before, pair)
        };
        let (mut by_added, mut by_terminal) = (Vec::new(), Vec::new());
        for number in 0..12 {
            let a = format!("X-A: {number}\r\n");
            // The cookie that is given counts as soon as it is.
            let (first, cookie) = ask("/cookie", &a).await;
            let (again, _) = ask("/cookie", &format!("{a}Cookie: {cookie}\r\n")).await;
            assert_eq!(first, again, "{number}");
            // A cookie may stand in any of several fields.
            let (split, given) = ask(
                "/cookie",
                &format!("{a}Cookie: b=c\r\nCookie: {cookie}\r\n"),
            )
            .await;
            assert_eq!((split, &*given), (first, ""), "{number}");
            let (one, two) = (ask("/added", &a).await.0, ask("/added", &a).await.0);
            assert_eq!(one, two, "{number}");
            by_added.push(one);
            // It ends the list though the hash came before it.
            by_terminal.push(ask("/terminal", &format!("{a}X-B: 1\r\n")).await.0);
        }
        assert!(by_added.contains(&true) && by_added.contains(&false));
        assert!(by_terminal.iter().all(|&host| host == by_terminal[0]));
    });
}

#[test]
fn methods_that_may_have_content_say_that_there_is_none() {
    run(async {
        let origin = Origin::new(&[OK; 6]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        for (head, told) in [
            ("POST / HTTP/1.1", 1),
            ("PUT / HTTP/1.1\r\nContent-Length: 0", 1),
            ("OPTIONS / HTTP/1.1", 1),
            ("DELETE / HTTP/1.1", 0),
            ("GET / HTTP/1.1", 0),
            ("HEAD / HTTP/1.1", 0),
        ] {
            let request = format!("{head}\r\nHost: h\r\nConnection: close\r\n\r\n");
            mesh.ask(&request).await;
            let seen = origin.seen().pop().expect("it was passed on");
            let lengths = seen
                .to_ascii_lowercase()
                .matches("content-length: 0\r\n")
                .count();
            assert_eq!(lengths, told, "{seen}");
        }
    });
}
