//! What `Http1ProtocolOptions`, the connection manager and the router let a user choose about heads.

use crate::support::{Act, Mesh, OK, Origin, TO_A, run};

const ASK: &str = "GET /p HTTP/1.1\r\nHost: h\r\nConnection: close\r\n";

fn ask(fields: &str) -> String {
    format!("{ASK}{fields}\r\n")
}

#[test]
fn methods_that_nobody_has_registered_are_refused_unless_they_are_allowed() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let strict = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let method = |name: &str| ask("").replacen("GET", name, 1);
        let refused = strict.ask(&method("BREW")).await;
        assert!(
            refused.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{refused}"
        );
        assert!(strict.log(1).await.contains(" 400 DPE http1.codec_error "));
        let taken = strict.ask(&method("PROPFIND")).await;
        assert!(taken.starts_with("HTTP/1.1 200 OK\r\n"), "{taken}");
        let options = "http_protocol_options: {allow_custom_methods: true}";
        let free = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let taken = free.ask(&method("BREW")).await;
        assert!(taken.starts_with("HTTP/1.1 200 OK\r\n"), "{taken}");
        assert!(origin.seen()[1].starts_with("BREW /p HTTP/1.1\r\n"));
    });
}

#[test]
fn a_length_beside_chunks_is_dropped_where_that_is_allowed() {
    run(async {
        let both = "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n";
        let origin = Origin::new(&[OK]).await;
        let strict = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let refused = strict.ask(&ask(both)).await;
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
        let options = "http_protocol_options: {allow_chunked_length: true}";
        let lenient = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let taken = lenient.ask(&ask(both)).await;
        assert!(taken.starts_with("HTTP/1.1 200 OK\r\n"), "{taken}");
        let seen = origin.seen().remove(0);
        assert!(
            seen.contains("transfer-encoding: chunked\r\n")
                && !seen.to_lowercase().contains("content-length")
                && seen.ends_with("3\r\nabc\r\n0\r\n\r\n"),
            "{seen}"
        );
    });
}

#[test]
fn an_absolute_target_is_a_path_that_no_route_has_where_it_is_not_allowed() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let absolute = ask("").replacen("/p", "http://other/p", 1);
        let usual = Mesh::new(TO_A, "", "", &[("a", origin.port)]).await;
        let taken = usual.ask(&absolute).await;
        assert!(taken.starts_with("HTTP/1.1 200 OK\r\n"), "{taken}");
        assert!(origin.seen()[0].starts_with("GET /p HTTP/1.1\r\nHost: other\r\n"));
        let options = "http_protocol_options: {allow_absolute_url: false}";
        let strict = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        let refused = strict.ask(&absolute).await;
        assert!(refused.starts_with("HTTP/1.1 404 "), "{refused}");
        assert_eq!(
            strict
                .server
                .store
                .number("http.test.downstream_rq_non_relative_path"),
            1
        );
    });
}

#[test]
fn heads_are_spelled_as_each_side_wants() {
    run(async {
        let answer = Act::Say("HTTP/1.1 200 OK\r\nx-some-HEADER: v\r\ncontent-length: 0\r\n\r\n");
        let origin = Origin::new(&[answer]).await;
        let proper = "http_protocol_options: {header_key_format: {proper_case_words: {}}}";
        let upstream = "http_protocol_options: {send_fully_qualified_url: true, header_key_format: {proper_case_words: {}}}";
        let mesh = Mesh::with(TO_A, proper, "", &[("a", origin.port)], upstream).await;
        let answer = mesh.ask(&ask("x-odd_name-CASE: 1\r\n")).await;
        assert!(
            answer.contains("\r\nX-Some-Header: v\r\n")
                && answer.contains("\r\nConnection: close\r\n"),
            "{answer}"
        );
        let seen = origin.seen().remove(0);
        assert!(
            seen.starts_with("GET http://h/p HTTP/1.1\r\nHost: h\r\nX-Odd_Name-Case: 1\r\n")
                && seen.contains("\r\nX-Request-Id: "),
            "{seen}"
        );
    });
}

#[test]
fn the_proxy_names_itself_where_it_is_asked_to() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(TO_A, "add_user_agent: true", "", &[("a", origin.port)]).await;
        mesh.ask(&ask("")).await;
        mesh.ask(&ask("User-Agent: mine\r\n")).await;
        let seen = origin.seen();
        assert!(
            seen[0].contains("x-envoy-downstream-service-cluster: "),
            "{seen:?}"
        );
        assert!(seen[1].contains("\r\nUser-Agent: mine\r\n"), "{seen:?}");
    });
}

#[test]
fn what_a_client_says_to_the_router_is_checked_where_that_is_asked_for() {
    run(async {
        let origin = Origin::new(&[OK, OK]).await;
        let internal = "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}\n      use_remote_address: true";
        let router =
            "strict_check_headers: [x-envoy-retry-on, x-envoy-retry-grpc-on, x-envoy-max-retries]";
        let mesh = Mesh::with_router(TO_A, internal, router, &[("a", origin.port)]).await;
        for (field, value) in [
            ("x-envoy-max-retries", "many"),
            ("x-envoy-retry-on", "5xx,always"),
            ("x-envoy-retry-grpc-on", "5xx"),
        ] {
            let answer = mesh.ask(&ask(&format!("{field}: {value}\r\n"))).await;
            let text = format!("invalid header '{field}' with value '{value}'");
            assert!(
                answer.starts_with("HTTP/1.1 400 ") && answer.ends_with(&text),
                "{answer}"
            );
        }
        assert!(
            mesh.log(3)
                .await
                .contains(" 400 IH request_headers_failed_strict_check{x-envoy-max-retries} ")
        );
        let good = "x-envoy-max-retries: 3\r\nx-envoy-retry-on: 5xx, reset\r\nx-envoy-retry-grpc-on: internal\r\n";
        let answer = mesh.ask(&ask(good)).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    });
}

#[test]
fn the_time_that_the_proxy_before_expects_is_kept_where_that_is_asked_for() {
    run(async {
        let origin = Origin::new(&[Act::Hang, OK]).await;
        let internal = "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}\n      use_remote_address: true";
        let router = "respect_expected_rq_timeout: true";
        let mesh = Mesh::with_router(TO_A, internal, router, &[("a", origin.port)]).await;
        let fields =
            "x-envoy-expected-rq-timeout-ms: 50\r\nx-envoy-upstream-rq-timeout-ms: 60000\r\n";
        let answer = mesh.ask(&ask(fields)).await;
        assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
        assert!(mesh.log(1).await.contains(" 504 UT "));
    });
}

#[test]
fn a_request_that_goes_on_is_logged_again_and_again_where_that_is_asked_for() {
    run(async {
        let slow = Act::SayLater(
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            std::time::Duration::from_millis(500),
        );
        let origin = Origin::new(&[slow]).await;
        let options = "access_log_options: {access_log_flush_interval: 0.02s}";
        let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
        mesh.get("/slow").await;
        let mut log = String::new();
        while !log.contains("via_upstream") {
            log = mesh.log(log.lines().count() + 1).await;
        }
        let lines: Vec<_> = log.lines().collect();
        let (last, before) = lines.split_last().unwrap();
        assert_eq!(*last, "GET /slow 200 - via_upstream 1");
        // The status is not known yet.
        assert!(
            !before.is_empty() && before.iter().all(|line| *line == "GET /slow 0 - - 1"),
            "{log}"
        );
    });
}

#[test]
fn a_policy_ignores_path_parameters_where_the_routes_do() {
    run(async {
        let rbac = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
        let template = "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";
        let filters = format!(
            "      - name: rbac
        typed_config:
          \"@type\": {rbac}
          rules:
            action: DENY
            policies:
              exact: {{permissions: [{{url_path: {{path: {{exact: /admin}}}}}}], principals: [{{any: true}}]}}
              below: {{permissions: [{{url_path: {{path: {{prefix: /pre/x}}}}}}], principals: [{{any: true}}]}}
              like: {{permissions: [{{uri_template: {{name: t, typed_config: {{\"@type\": {template}, path_template: '/t/{{a}}/z'}}}}}}], principals: [{{any: true}}]}}"
        );
        let routes = "          - {match: {prefix: /}, direct_response: {status: 200}}";
        let ignoring = format!("{routes}\n        ignore_path_parameters_in_path_matching: true");
        let heeding = Mesh::new(routes, "", &filters, &[]).await;
        let ignoring = Mesh::new(&ignoring, "", &filters, &[]).await;
        for (path, ignored, heeded) in [
            ("/admin", 403, 403),
            ("/admin;a=b", 403, 200),
            ("/admin;a;b?c", 403, 200),
            ("/admin;a/", 200, 200),
            ("/pre;b/x", 403, 200),
            ("/t/1/z;q", 403, 200),
            ("/t;/1/z", 403, 200),
        ] {
            for (mesh, status) in [(&ignoring, ignored), (&heeding, heeded)] {
                let answer = mesh.get(path).await;
                assert!(
                    answer.starts_with(&format!("HTTP/1.1 {status} ")),
                    "{path} {status}: {answer}"
                );
            }
        }
    });
}
