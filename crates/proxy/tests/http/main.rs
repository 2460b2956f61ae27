//! HTTP through a running proxy: scripted clients and origins, bytes on both sides.

mod cases;
mod choices;
mod counts;
mod durations;
mod edges;
mod edits;
mod ends;
mod ext_authz;
mod extended_connect;
mod grpc;
mod heads;
mod http2;
mod jwt;
mod large;
mod limits;
mod logs;
mod lua;
mod options;
mod rate_limit;
mod reports;
mod routing;
mod state;
mod support;

use std::time::Duration;

use support::{Act, Mesh, OK, Origin, TO_A, run, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn requests_of_one_connection_share_an_upstream_connection_and_keep_their_spelling() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask(
                "GET /1?x=%20y HTTP/1.1\r\nHost: h:1\r\nX-Odd-CASE: 1\r\n\r\n\
                 POST /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
            )
            .await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK\r\n").count(), 2, "{answer}");
        assert_eq!(answer.matches("server: envoy\r\n").count(), 2);
        assert!(answer.contains("connection: close\r\n") && answer.ends_with("\r\n\r\nok"));
        let seen = origin.seen();
        assert!(seen[0].starts_with("GET /1?x=%20y HTTP/1.1\r\nHost: h:1\r\nX-Odd-CASE: 1\r\n"));
        assert!(
            seen[0].contains("x-request-id: ") && seen[0].contains("x-forwarded-proto: http\r\n")
        );
        assert!(seen[0].contains("x-envoy-attempt-count: 1\r\n"));
        assert!(
            seen[1].ends_with("\r\n\r\nabc") && !seen[1].to_lowercase().contains("connection:")
        );
        assert_eq!(mesh.server.store.number("cluster.a.upstream_cx_total"), 1);
        assert_eq!(
            mesh.log(2).await,
            "GET /1?x=%20y 200 - via_upstream 1\nPOST /2 200 - via_upstream 1\n"
        );
        assert_eq!(mesh.server.store.number("http.test.downstream_rq_2xx"), 2);
        assert_eq!(mesh.server.store.number("http.test.downstream_rq_total"), 2);
    });
}

#[test]
fn bodies_of_unknown_length_pass_both_ways_and_old_clients_get_theirs_unchunked() {
    run(async {
        let chunks = Act::Say(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n1\r\n!\r\n0\r\n\r\n",
        );
        let origin = Origin::new(&[
            chunks,
            chunks,
            Act::SayAndClose("HTTP/1.1 200 OK\r\n\r\nto the end"),
        ])
        .await;
        let options = "http_protocol_options: {accept_http_10: true}";
        let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask("POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
            .await;
        assert!(
            answer.contains("transfer-encoding: chunked\r\n"),
            "{answer}"
        );
        assert!(
            answer.contains("2\r\nok\r\n") && answer.ends_with("0\r\n\r\n"),
            "{answer}"
        );
        assert!(origin.seen()[0].ends_with("3\r\nabc\r\n0\r\n\r\n"));
        let old = mesh.ask("GET / HTTP/1.0\r\nHost: h\r\n\r\n").await;
        assert!(
            old.ends_with("\r\n\r\nok!") && !old.contains("transfer-encoding"),
            "{old}"
        );
        let rest = mesh.get("/").await;
        assert!(rest.contains("to the end"), "{rest}");
    });
}

#[test]
fn what_the_proxy_answers_itself_is_envoys() {
    run(async {
        let routes = "          - {match: {path: /none}, route: {cluster: none}}
          - {match: {path: /dead}, route: {cluster: dead}}
          - {match: {path: /direct}, direct_response: {status: 418, body: {inline_string: tea}}}
          - match: {prefix: /old}
            redirect: {host_redirect: new, prefix_rewrite: /new, response_code: FOUND}
            response_headers_to_add: [{header: {key: x-path, value: '%REQ(:path)% was %REQ(x-envoy-original-path)%'}}]";
        let mesh = Mesh::new(routes, "", "", &[("dead", 1)]).await;
        let get = async |path| mesh.get(path).await;
        assert!(
            get("/none")
                .await
                .starts_with("HTTP/1.1 503 Service Unavailable\r\n")
        );
        let dead = get("/dead").await;
        assert!(
            dead.ends_with(
                "upstream connect error or disconnect/reset before headers. reset reason: remote \
                 connection failure"
            ),
            "{dead}"
        );
        assert!(
            get("/nothing")
                .await
                .starts_with("HTTP/1.1 404 Not Found\r\n")
        );
        assert!(get("/direct").await.ends_with("\r\n\r\ntea"));
        let moved = get("/old/x?y").await;
        assert!(
            moved.contains("location: http://new/new/x?y\r\n")
                && moved.contains("x-path: /new/x?y was /old/x?y\r\n"),
            "{moved}"
        );
        let grpc = mesh
            .ask("POST /dead HTTP/1.1\r\nHost: h\r\nContent-Type: application/grpc\r\nConnection: close\r\n\r\n")
            .await;
        assert!(grpc.starts_with("HTTP/1.1 200 OK\r\n") && grpc.contains("grpc-status: 14\r\n"));
        let old = mesh.ask("GET / HTTP/1.0\r\nHost: h\r\n\r\n").await;
        assert!(
            old.starts_with("HTTP/1.1 426 Upgrade Required\r\n")
                && old.ends_with("\r\n\r\nUpgrade Required"),
            "{old}"
        );
        let coded = mesh
            .ask("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n")
            .await;
        assert!(
            coded.starts_with("HTTP/1.1 501 Not Implemented\r\n")
                && coded.ends_with("\r\n\r\nNot Implemented"),
            "{coded}"
        );
        let server = mesh
            .ask("OPTIONS * HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .await;
        assert!(server.starts_with("HTTP/1.1 404 Not Found\r\n"), "{server}");
        let hostless = mesh
            .ask("GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            .await;
        assert!(
            hostless.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{hostless}"
        );
        let garbage = mesh.ask("GARBAGE\r\n\r\n").await;
        assert!(
            garbage.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{garbage}"
        );
        assert!(garbage.contains("connection: close\r\n"));
        let log = mesh.log(11).await;
        for line in [
            "- - 400 DPE http1.codec_error 0",
            "- - 501 DPE http1.invalid_transfer_encoding 0",
            "OPTIONS * 404 - absolute_path_rejected 0",
            "GET /none 503 NC cluster_not_found 0",
            "GET /dead 503 UF upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused} 1",
            "GET /nothing 404 NR route_not_found 0",
            "GET /direct 418 - direct_response 0",
            "GET / 426 DPE low_version 0",
            "GET / 400 - missing_host_header 0",
        ] {
            assert!(log.lines().any(|logged| logged == line), "{line}\n{log}");
        }
    });
}

#[test]
fn attempts_are_repeated_as_the_policy_says() {
    run(async {
        let bad = Act::Say("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nbad");
        let origin = Origin::new(&[bad, Act::Close, OK, bad, bad, bad]).await;
        let routes = "          - {match: {prefix: /}, route: {cluster: a, retry_policy: {retry_on: '5xx', num_retries: 2, retry_back_off: {base_interval: 0.001s}}}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask("PUT /1 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
            .await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("ok"),
            "{answer}"
        );
        let seen = origin.seen();
        assert_eq!(seen.len(), 3);
        assert!(seen[2].ends_with("abc") && seen[2].contains("x-envoy-attempt-count: 3\r\n"));
        let answer = mesh.get("/2").await;
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.ends_with("bad"),
            "{answer}"
        );
        assert_eq!(origin.seen().len(), 6);
        assert_eq!(
            mesh.log(2).await,
            "PUT /1 200 - via_upstream 3\nGET /2 503 URX via_upstream 3\n"
        );
        assert_eq!(mesh.server.store.number("cluster.a.upstream_rq_retry"), 4);
        assert_eq!(
            mesh.server
                .store
                .number("cluster.a.upstream_rq_retry_success"),
            1
        );
        assert_eq!(
            mesh.server
                .store
                .number("cluster.a.upstream_rq_retry_limit_exceeded"),
            1
        );
    });
}

#[test]
fn a_post_is_never_sent_twice_unasked_and_a_get_survives_a_closed_connection() {
    run(async {
        // The origin answers one request on each connection, then closes at the next.
        let origin = Origin::new(&[OK, Act::Close, OK, OK, Act::Close, OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        assert!(mesh.get("/1").await.ends_with("ok"));
        assert!(
            mesh.get("/2").await.ends_with("ok"),
            "asked again on a new connection"
        );
        assert_eq!(origin.seen().len(), 3);
        assert!(mesh.get("/3").await.ends_with("ok"));
        let answer = mesh
            .ask("POST /4 HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")
            .await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("connection termination"));
        assert_eq!(
            origin
                .seen()
                .iter()
                .filter(|request| request.starts_with("POST"))
                .count(),
            1
        );
        assert!(mesh.log(4).await.contains("POST /4 503 UC "));
    });
}

#[test]
fn limits_of_time_end_requests() {
    run(async {
        let origin = Origin::new(&[Act::Hang, Act::Hang, Act::Hang]).await;
        let routes = "          - {match: {path: /1}, route: {cluster: a, timeout: 0.3s}}
          - {match: {path: /2}, route: {cluster: a, timeout: 5s, retry_policy: {retry_on: '5xx', num_retries: 1, per_try_timeout: 0.3s, retry_back_off: {base_interval: 0.001s}}}}";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        let answer = mesh.get("/1").await;
        assert!(
            answer.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"),
            "{answer}"
        );
        assert!(answer.ends_with("upstream request timeout"));
        let told = "x-envoy-expected-rq-timeout-ms: 300\r\n";
        assert!(origin.seen()[0].contains(told));
        assert!(mesh.get("/2").await.starts_with("HTTP/1.1 504 "));
        assert_eq!(
            mesh.log(2).await,
            "GET /1 504 UT response_timeout 1\nGET /2 504 URX,UT upstream_per_try_timeout 2\n"
        );
    });
}

#[test]
fn responses_that_may_not_be_handed_on_become_502() {
    run(async {
        // Case 27.
        let bad = [
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
            "HTTP/9.9 200 OK\r\n\r\n",
        ];
        let acts: Vec<Act> = bad.iter().map(|answer| Act::Say(answer)).collect();
        let origin = Origin::new(&acts).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        for answer in bad {
            let got = mesh.get("/").await;
            assert!(
                got.starts_with("HTTP/1.1 502 Bad Gateway\r\n"),
                "{answer:?} gave {got}"
            );
        }
        assert!(mesh.log(5).await.lines().all(|line| line.contains(" UPE ")));
    });
}

#[test]
fn a_response_that_ends_too_soon_is_seen_to_be_incomplete() {
    run(async {
        let origin = Origin::new(&[Act::SayAndClose(
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        )])
        .await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let mut stream = mesh.connect().await;
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            .await
            .unwrap();
        let mut got = Vec::new();
        // An error or an end: in either case fewer bytes than announced.
        let _ = within(stream.read_to_end(&mut got)).await;
        assert!(!String::from_utf8_lossy(&got).contains("halfh"));
        assert!(
            mesh.log(1)
                .await
                .starts_with("GET / 200 UC upstream_reset_after_response_started{")
        );
    });
}

#[test]
fn an_upgrade_goes_through_filters_of_its_own() {
    run(async {
        let adds = |name: &str, both: &str| {
            format!(
                "{{name: m, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation, mutations: {{\
                 request_mutations: [{{append: {{header: {{key: x-through, value: {name}}}}}}}], response_mutations: [{{append: {{header: {{key: x-back, value: {name}}}}}}}]}}}}}}{both}"
            )
        };
        let router = "{name: r, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router, suppress_envoy_headers: true}}";
        let options = format!(
            "upgrade_configs: [{{upgrade_type: websocket, filters: [{}{router}]}}, {{upgrade_type: other}}]",
            adds("own", ", ")
        );
        let filters = format!("      - {}", adds("usual", ""));
        let agrees = Act::SayAndClose(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nhi",
        );
        let origin = Origin::new(&[agrees, agrees, OK, OK]).await;
        let mesh = Mesh::new(TO_A, &options, &filters, &[("a", origin.port)]).await;
        let wants = |upgrade: &str| {
            format!(
                "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
            )
        };
        // In whatever case; another upgrade and a plain request have the usual filters, and so has the
        // answer to an upgrade that nobody lets through.
        for (number, (request, name, status)) in [
            (wants("WebSocket"), "own", "101"),
            (wants("other"), "usual", "101"),
            (
                "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".to_owned(),
                "usual",
                "200",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let answer = mesh.ask(&request).await.to_lowercase();
            assert!(
                answer.starts_with(&format!("http/1.1 {status} ")),
                "{answer}"
            );
            assert!(answer.contains(&format!("x-back: {name}\r\n")), "{answer}");
            // Its router is its own, too.
            assert_eq!(
                answer.contains("x-envoy-upstream-service-time"),
                name == "usual"
            );
            let seen = origin.seen()[number].to_lowercase();
            assert!(seen.contains(&format!("x-through: {name}\r\n")), "{seen}");
        }
    });
}

#[test]
fn upgrades_become_tunnels_only_when_both_agree() {
    run(async {
        let origin = Origin::new(&[
            Act::Say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhi"),
            OK,
            OK,
        ])
        .await;
        let options = "upgrade_configs: [{upgrade_type: websocket}]";
        let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let upgrade =
            "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        let mut stream = mesh.connect().await;
        stream.write_all(upgrade.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        while !got.ends_with(b"\r\n\r\nhi") {
            assert_ne!(within(stream.read_buf(&mut got)).await.unwrap(), 0);
        }
        assert!(got.starts_with(b"HTTP/1.1 101 Switching Protocols\r\n"));
        assert!(
            origin.seen()[0]
                .to_lowercase()
                .contains("\r\nupgrade: websocket\r\n")
        );
        // The origin reads this as its next request: the tunnel passes it unchanged.
        stream.write_all(b"frame\r\n\r\n").await.unwrap();
        let mut echo = Vec::new();
        while !echo.ends_with(b"ok") {
            assert_ne!(within(stream.read_buf(&mut echo)).await.unwrap(), 0);
        }
        assert_eq!(origin.seen()[1], "frame\r\n\r\n");
        drop(stream);
        // Case 21: the upstream does not agree, so what follows is a request of its own.
        let answer = mesh
            .ask(&format!(
                "{upgrade}GET /second HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            !origin
                .seen()
                .iter()
                .any(|request| request.contains("/ws") && request.contains("/second"))
        );
        let other = mesh
            .ask(
                "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, close\r\nUpgrade: other\r\n\r\n",
            )
            .await;
        assert!(other.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{other}");
    });
}

#[test]
fn routes_change_heads_and_paths() {
    run(async {
        let origin = Origin::new(&[Act::Say(
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Gone: 1\r\nX-Anew: old\r\n\r\n",
        )])
        .await;
        let routes = "          - match: {prefix: /a/}
            route: {cluster: a, prefix_rewrite: /b/, host_rewrite_literal: new.host, append_x_forwarded_host: true}
            request_headers_to_add:
            - {header: {key: x-from, value: '%REQ(X-IN)%%REQ(X-OUT)%-%PROTOCOL%'}}
            - {header: {key: x-anew, value: new}}
            request_headers_to_remove: [x-out, x-anew]
            response_headers_to_add:
            - {header: {key: x-code, value: '%RESPONSE_CODE%'}}
            - {header: {key: x-route, value: r}}
            - {header: {key: x-anew, value: new}}
            response_headers_to_remove: [x-gone, x-anew]";
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        let answer = mesh
            .ask("GET /a/c?d HTTP/1.1\r\nHost: old\r\nX-In: 7\r\nX-Out: 8\r\nX-Anew: old\r\nConnection: close\r\n\r\n")
            .await;
        assert!(
            answer.contains("x-route: r\r\n") && !answer.contains("X-Gone"),
            "{answer}"
        );
        // Removals come first: what has the same name can be added anew.
        assert!(
            answer.contains("x-anew: new\r\n") && !answer.contains("old"),
            "{answer}"
        );
        let seen = &origin.seen()[0];
        assert!(
            seen.starts_with("GET /b/c?d HTTP/1.1\r\nHost: new.host\r\n"),
            "{seen}"
        );
        assert!(
            seen.contains("x-from: 7-HTTP/1.1\r\n") && !seen.contains("X-Out"),
            "{seen}"
        );
        assert!(
            seen.contains("x-anew: new\r\n") && !seen.contains("X-Anew"),
            "{seen}"
        );
        assert!(seen.contains("x-envoy-original-path: /a/c?d\r\n"));
        assert!(seen.contains("x-envoy-original-host: old\r\n"));
        assert!(seen.contains("x-forwarded-host: old\r\n"));
    });
}

#[test]
fn faults_delay_and_abort() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let fault = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault";
        let filters = format!("      - {{name: fault, typed_config: {{\"@type\": {fault}}}}}");
        let routes = format!(
            "          - match: {{path: /abort}}
            route: {{cluster: a}}
            typed_per_filter_config: {{fault: {{\"@type\": {fault}, abort: {{http_status: 555, percentage: {{numerator: 100}}}}}}}}
          - match: {{path: /own}}
            route: {{cluster: a}}
            typed_per_filter_config: {{fault: {{\"@type\": {fault}, abort: {{http_status: 500, percentage: {{numerator: 100}}, response_body: own words}}}}}}
          - match: {{path: /delay}}
            route: {{cluster: a}}
            typed_per_filter_config: {{fault: {{\"@type\": {fault}, delay: {{fixed_delay: 0.05s, percentage: {{numerator: 100}}}}}}}}"
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let answer = mesh.get("/abort").await;
        assert!(answer.starts_with("HTTP/1.1 555 ") && answer.ends_with("fault filter abort"));
        let begun = std::time::Instant::now();
        assert!(mesh.get("/delay").await.ends_with("ok"));
        assert!(begun.elapsed() >= Duration::from_millis(50));
        assert_eq!(
            mesh.log(2).await,
            "GET /abort 555 FI fault_filter_abort 0\nGET /delay 200 DI via_upstream 1\n"
        );
        assert_eq!(
            mesh.server.store.number("http.test.fault.aborts_injected"),
            1
        );
        assert_eq!(
            mesh.server.store.number("http.test.fault.delays_injected"),
            1
        );
        assert!(mesh.get("/own").await.ends_with("\r\n\r\nown words"));
    });
}

#[test]
fn a_request_without_permission_is_refused_and_the_log_says_by_whom() {
    run(async {
        let origin = Origin::new(&[OK, OK, OK]).await;
        let rbac = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
        let get = "permissions: [{header: {name: ':method', string_match: {exact: GET}}}], principals: [{any: true}]";
        let admin =
            "permissions: [{url_path: {path: {prefix: /admin}}}], principals: [{any: true}]";
        let filters = format!(
            "      - name: deny
        typed_config: {{\"@type\": {rbac}, rules: {{action: DENY, policies: {{\"ns[a]-policy[no admin]-rule[0]\": {{{admin}}}}}}}}}
      - name: allow
        typed_config: {{\"@type\": {rbac}, rules: {{policies: {{reads: {{{get}}}}}}}, shadow_rules: {{policies: {{}}}}, shadow_rules_stat_prefix: dry_}}"
        );
        let routes = format!(
            "          - match: {{path: /free}}
            route: {{cluster: a}}
            typed_per_filter_config: {{allow: {{\"@type\": {rbac}PerRoute}}}}
{TO_A}"
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        assert!(mesh.get("/").await.ends_with("ok"));
        let refused = mesh.get("/admin?x").await;
        assert!(
            refused.starts_with("HTTP/1.1 403 ")
                && refused.ends_with("\r\n\r\nRBAC: access denied"),
            "{refused}"
        );
        let put = |path| {
            format!(
                "PUT {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
        };
        assert!(mesh.ask(&put("/")).await.starts_with("HTTP/1.1 403 "));
        assert!(mesh.ask(&put("/free")).await.ends_with("ok"));
        assert_eq!(
            mesh.log(4).await,
            "GET / 200 - via_upstream 1\n\
             GET /admin?x 403 - rbac_access_denied_matched_policy[ns[a]-policy[no_admin]-rule[0]] 0\n\
             PUT / 403 - rbac_access_denied_matched_policy[none] 0\n\
             PUT /free 200 - via_upstream 1\n"
        );
        let count = |name: &str| mesh.server.store.number(&format!("http.test.rbac.{name}"));
        assert_eq!((count("allowed"), count("denied")), (4, 2));
        assert_eq!(count("dry_shadow_denied"), 2);
    });
}

#[test]
fn a_client_that_goes_away_ends_its_request() {
    run(async {
        let origin = Origin::new(&[Act::Hang, OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let mut stream = mesh.connect().await;
        stream
            .write_all(b"GET /1 HTTP/1.1\r\nHost: h\r\n\r\n")
            .await
            .unwrap();
        within(async {
            while origin.seen().is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        drop(stream);
        assert_eq!(
            mesh.log(1).await,
            "GET /1 0 DC downstream_remote_disconnect 1\n"
        );
        // Case 25: nobody gets the answer that was meant for it.
        assert!(mesh.get("/2").await.ends_with("ok"));
        assert_eq!(mesh.server.store.number("cluster.a.upstream_cx_total"), 2);
    });
}

#[test]
fn upgrades_that_a_server_may_ignore_are_ignored() {
    run(async {
        // Case 23.
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        for offer in ["h2c", "TLS/1.2"] {
            let answer = mesh
                .ask(&format!(
                    "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings, close\r\n\
                     Upgrade: {offer}\r\nHTTP2-Settings: AAA\r\n\r\n"
                ))
                .await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        }
        for seen in origin.seen() {
            let seen = seen.to_lowercase();
            assert!(
                !seen.contains("upgrade") && !seen.contains("http2-settings"),
                "{seen}"
            );
        }
    });
}

#[test]
fn a_reply_to_half_a_request_does_not_make_the_other_half_a_request() {
    run(async {
        // Case 26: the body would be a request of its own, past every rule.
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(
            "          - {match: {path: /ok}, route: {cluster: a}}",
            "",
            "",
            &[("a", origin.port)],
        )
        .await;
        let smuggled = "GET /ok HTTP/1.1\r\nHost: h\r\n\r\n";
        let mut stream = mesh.connect().await;
        let head = format!(
            "POST /denied HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n",
            smuggled.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            assert_ne!(within(stream.read_buf(&mut answer)).await.unwrap(), 0);
        }
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        let _ = stream.write_all(smuggled.as_bytes()).await;
        let mut rest = Vec::new();
        let _ = within(stream.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
        assert!(origin.seen().is_empty());
        // A body that is here already is no reason to close.
        let whole = mesh
            .ask(
                "POST /denied HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc\
                 GET /ok HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
            )
            .await;
        assert!(
            whole.starts_with("HTTP/1.1 404 ") && whole.ends_with("ok"),
            "{whole}"
        );
    });
}

#[test]
fn copies_go_to_mirrors_and_change_nothing() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let shadow = Origin::new(&[Act::Say("HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")]).await;
        let routes = "          - {match: {prefix: /}, route: {cluster: a, request_mirror_policies: [{cluster: s, runtime_fraction: {default_value: {numerator: 100}}}]}}";
        let clusters = [("a", origin.port), ("s", shadow.port)];
        let mesh = Mesh::new(routes, "", "", &clusters).await;
        let answer = mesh
            .ask("POST /x HTTP/1.1\r\nHost: h:8\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
            .await;
        assert!(answer.ends_with("ok"), "{answer}");
        within(async {
            while shadow.seen().is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let copy = &shadow.seen()[0];
        assert!(
            copy.starts_with("POST /x HTTP/1.1\r\nHost: h-shadow:8\r\n"),
            "{copy}"
        );
        assert!(copy.ends_with("abc"));
    });
}

#[test]
fn preflights_are_answered_for_origins_that_are_allowed() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let cors = "type.googleapis.com/envoy.extensions.filters.http.cors.v3";
        let filters = format!("      - {{name: cors, typed_config: {{\"@type\": {cors}.Cors}}}}");
        let routes = format!(
            "          - match: {{prefix: /}}
            route: {{cluster: a}}
            typed_per_filter_config: {{cors: {{\"@type\": {cors}.CorsPolicy, allow_origin_string_match: [{{exact: 'http://good'}}], allow_methods: 'GET,POST', expose_headers: x-e}}}}"
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let ask = async |method: &str, from: &str, more: &str| {
            mesh.ask(&format!(
                "{method} / HTTP/1.1\r\nHost: h\r\nOrigin: {from}\r\n{more}Connection: close\r\n\r\n"
            ))
            .await
        };
        let preflight = "Access-Control-Request-Method: POST\r\n";
        let answer = ask("OPTIONS", "http://good", preflight).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("access-control-allow-methods: GET,POST\r\n"));
        assert!(
            answer.contains("access-control-expose-headers: x-e\r\n"),
            "{answer}"
        );
        assert!(origin.seen().is_empty());
        let answer = ask("GET", "http://good", "").await;
        assert!(
            answer.contains("access-control-allow-origin: http://good\r\n"),
            "{answer}"
        );
        assert!(answer.contains("access-control-expose-headers: x-e\r\n"));
        let answer = ask("GET", "http://bad", "").await;
        assert!(!answer.contains("access-control-allow-origin") && answer.ends_with("ok"));
    });
}

#[test]
fn a_star_allows_every_origin_and_is_told_as_what_was_asked_for() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let cors = "type.googleapis.com/envoy.extensions.filters.http.cors.v3";
        let filters = format!("      - {{name: cors, typed_config: {{\"@type\": {cors}.Cors}}}}");
        let routes = format!(
            "          - match: {{prefix: /}}
            route: {{cluster: a}}
            typed_per_filter_config: {{cors: {{\"@type\": {cors}.CorsPolicy, allow_origin_string_match: [{{exact: '*'}}], allow_methods: '*', allow_headers: '*'}}}}"
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let answer = mesh
            .ask(
                "OPTIONS / HTTP/1.1\r\nHost: h\r\nOrigin: http://any\r\nAccess-Control-Request-Method: PUT\r\n\
                 Access-Control-Request-Headers: x-a, x-b\r\nConnection: close\r\n\r\n",
            )
            .await;
        for line in [
            "access-control-allow-origin: http://any\r\n",
            "access-control-allow-methods: PUT\r\n",
            "access-control-allow-headers: x-a, x-b\r\n",
        ] {
            assert!(answer.contains(line), "{answer}");
        }
        assert!(origin.seen().is_empty());
    });
}
