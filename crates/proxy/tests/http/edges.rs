//! What a connection manager makes of a request before it is routed, and of its own replies: as a real Envoy does.

use crate::support::{Act, Mesh, OK, Origin, TO_A, run};

/// What an origin was sent, with names in small letters.
async fn sent(options: &str, head: &str) -> String {
    let origin = Origin::new(&[OK]).await;
    let mesh = Mesh::new(TO_A, options, "", &[("a", origin.port)]).await;
    let answer = mesh.ask(&format!("{head}Connection: close\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    origin.seen().remove(0)
}

const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n";

#[test]
fn what_a_trusted_peer_says_of_the_connection_stays() {
    run(async {
        let said = format!("{GET}x-forwarded-proto: ws\r\nx-forwarded-port: 99\r\n");
        let ports = "append_x_forwarded_port: true";
        let seen = sent(ports, &said).await;
        assert!(seen.contains("x-forwarded-proto: ws\r\n"), "{seen}");
        assert!(seen.contains("x-forwarded-port: 99\r\n"), "{seen}");
        // A peer that is the client itself is not believed.
        let seen = sent(&format!("{ports}\n      use_remote_address: true"), &said).await;
        assert!(seen.contains("x-forwarded-proto: http\r\n"), "{seen}");
        assert!(
            seen.contains("x-forwarded-port: ") && !seen.contains("x-forwarded-port: 99\r\n"),
            "{seen}"
        );
        let overwrite = "scheme_header_transformation: {scheme_to_overwrite: https}";
        let seen = sent(overwrite, &said).await;
        assert!(seen.contains("x-forwarded-proto: https\r\n"), "{seen}");
    });
}

#[test]
fn a_host_that_keeps_its_port_keeps_it_as_it_is_spelt() {
    run(async {
        let host = |host: &str| GET.replace(": h", &format!(": {host}"));
        let dot = "strip_trailing_host_dot: true";
        let any = "strip_any_host_port: true";
        let matching = "strip_matching_host_port: true";
        for (options, asked, kept) in [
            (dot, "h.:0080", "h:0080"),
            (dot, "h.:", "h:"),
            (dot, "h.", "h"),
            (any, "h:99999", "h"),
            (any, "[::1]:80", "[::1]"),
            (any, "[::1]", "[::1]"),
            (matching, "h:0080", "h:0080"),
        ] {
            let seen = sent(options, &host(asked)).await;
            assert!(
                seen.contains(&format!("Host: {kept}\r\n")),
                "{asked} {seen}"
            );
        }
    });
}

#[test]
fn a_forced_trace_tells_an_internal_client_the_id() {
    run(async {
        let internal =
            "internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}";
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(TO_A, internal, "", &[("a", origin.port)]).await;
        let ask = |from: &str| {
            format!(
                "{GET}x-forwarded-for: {from}\r\nx-envoy-force-trace: 1\r\nx-request-id: me\r\nConnection: close\r\n\r\n"
            )
        };
        let told = mesh.ask(&ask("10.0.0.1")).await;
        assert!(told.contains("x-request-id: me\r\n"), "{told}");
        let outside = mesh.ask(&ask("11.0.0.1")).await;
        assert!(!outside.contains("x-request-id"), "{outside}");
    });
}

#[test]
fn paths_are_spelt_in_one_way_and_grpc_is_not_redirected() {
    run(async {
        let options =
            "normalize_path: true\n      path_with_escaped_slashes_action: UNESCAPE_AND_REDIRECT";
        let seen = sent(options, "GET /a|{b} HTTP/1.1\r\nHost: h\r\n").await;
        assert!(seen.starts_with("GET /a%7C%7Bb%7D HTTP/1.1\r\n"), "{seen}");
        let mesh = Mesh::new(TO_A, options, "", &[]).await;
        let ask = |kind: &str| {
            format!(
                "GET /a%2fb HTTP/1.1\r\nHost: h\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
            )
        };
        let moved = mesh.ask(&ask("text/plain")).await;
        assert!(moved.starts_with("HTTP/1.1 307 "), "{moved}");
        let refused = mesh.ask(&ask("application/grpc")).await;
        assert!(
            refused.contains("grpc-status: 13\r\n") && !refused.contains("location: "),
            "{refused}"
        );
    });
}

#[test]
fn a_request_without_the_body_that_its_method_has_says_so() {
    run(async {
        for method in ["POST", "PUT", "PATCH", "OPTIONS", "PROPFIND"] {
            let seen = sent("", &GET.replace("GET", method)).await;
            assert!(seen.contains("\r\ncontent-length: 0\r\n"), "{seen}");
        }
        for method in ["GET", "DELETE", "TRACE"] {
            let seen = sent("", &GET.replace("GET", method)).await;
            assert!(!seen.to_lowercase().contains("content-length"), "{seen}");
        }
        // Once is enough.
        let seen = sent("", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n").await;
        assert_eq!(seen.to_lowercase().matches("content-length").count(), 1);
    });
}

#[test]
fn a_query_says_what_its_question_is_written_in() {
    run(async {
        let typed = "QUERY / HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 0\r\n";
        let seen = sent("", typed).await;
        assert!(seen.starts_with("QUERY / HTTP/1.1\r\n"), "{seen}");
        let mesh = Mesh::new(TO_A, "", "", &[]).await;
        let untyped = mesh
            .ask("QUERY / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .await;
        assert!(untyped.starts_with("HTTP/1.1 400 "), "{untyped}");
        assert_eq!(
            mesh.log(1).await,
            "QUERY / 400 - query_missing_content_type 0\n"
        );
    });
}

#[test]
fn underscores_that_are_refused_break_the_protocol() {
    run(async {
        let options =
            "common_http_protocol_options: {headers_with_underscores_action: REJECT_REQUEST}";
        let mesh = Mesh::new(TO_A, options, "", &[]).await;
        let refused = mesh.ask(&format!("{GET}a_b: 1\r\n\r\n")).await;
        assert!(refused.ends_with("\r\n\r\nBad Request"), "{refused}");
        assert_eq!(
            mesh.log(1).await,
            "GET / 400 DPE http1.unexpected_underscore 0\n"
        );
    });
}

#[test]
fn a_format_knows_a_reply_without_a_body_as_an_empty_text() {
    run(async {
        let format = "local_reply_config: {body_format: {text_format_source: {inline_string: '[%LOCAL_REPLY_BODY%|%UPSTREAM_CLUSTER%]'}}}";
        let routes = "          - {match: {path: /none}, route: {cluster: none}}";
        let mesh = Mesh::new(routes, format, "", &[]).await;
        let unknown = mesh.get("/none").await;
        assert!(unknown.ends_with("\r\n\r\n[|-]"), "{unknown}");
        let json = "local_reply_config: {body_format: {json_format: {text: '%LOCAL_REPLY_BODY%'}}}";
        let mesh = Mesh::new(routes, json, "", &[]).await;
        let unknown = mesh.get("/none").await;
        assert!(unknown.ends_with("\r\n\r\n{\"text\":\"\"}\n"), "{unknown}");
        let grpc = mesh
            .ask(&format!(
                "{GET}Content-Type: application/grpc\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert!(grpc.contains("grpc-message: {\"text\":\"\"}\r\n"), "{grpc}");
    });
}

#[test]
fn why_a_connection_failed_is_for_the_logs_unless_a_switch_tells_the_client() {
    run(async {
        const DEAD: &str = "          - {match: {prefix: /}, route: {cluster: dead}}";
        const WORDS: &str = "reset reason: remote connection failure";
        let mesh = Mesh::new(DEAD, "", "", &[("dead", 1)]).await;
        let hidden = mesh.get("/").await;
        assert!(hidden.ends_with(WORDS), "{hidden}");
        assert!(mesh.log(1).await.contains("Connection_refused"));
        let switch =
            "envoy.reloadable_features.hide_transport_failure_reason_in_response_body: false";
        let mesh = Mesh::with_runtime(DEAD, "", switch, &[("dead", 1)]).await;
        let told = mesh.get("/").await;
        let why = "transport failure reason: delayed connect error: Connection refused";
        assert!(told.ends_with(&format!("{WORDS}, {why}")), "{told}");
    });
}

/// A filter's configuration.
fn typed(name: &str, more: &str) -> String {
    format!("{{\"@type\": type.googleapis.com/envoy.extensions.filters.http.{name}{more}}}")
}

#[test]
fn a_reply_of_a_filter_knows_its_route_s_cluster_and_its_status() {
    run(async {
        let fault = typed(
            "fault.v3.HTTPFault",
            ", abort: {grpc_status: 5, percentage: {numerator: 100}}",
        );
        let mutate = typed(
            "header_mutation.v3.HeaderMutation",
            ", mutations: {response_mutations: [{append: {header: {key: x-status, value: '%RESPONSE_CODE%'}}}]}",
        );
        let filters = format!(
            "      - {{name: mutate, typed_config: {mutate}}}\n      - {{name: fault, typed_config: {fault}}}"
        );
        let format = "local_reply_config: {body_format: {text_format_source: {inline_string: '[%LOCAL_REPLY_BODY%|%UPSTREAM_CLUSTER%]'}}}";
        let routes = format!(
            "          - {{match: {{path: /tea}}, direct_response: {{status: 418}}}}\n{TO_A}"
        );
        let mesh = Mesh::new(&routes, format, &filters, &[("a", 1)]).await;
        // Who knows no gRPC status gets no other.
        let plain = mesh.get("/").await;
        assert!(plain.starts_with("HTTP/1.1 200 OK\r\n"), "{plain}");
        assert!(plain.contains("x-status: 200\r\n"), "{plain}");
        assert!(plain.ends_with("\r\n\r\n[fault filter abort|a]"), "{plain}");
        let grpc = mesh
            .ask(&format!(
                "{GET}Content-Type: application/grpc\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert!(grpc.contains("grpc-status: 5\r\n"), "{grpc}");
        let filters = filters.replace("numerator: 100", "numerator: 0");
        let mesh = Mesh::new(&routes, "", &filters, &[]).await;
        let tea = mesh.get("/tea").await;
        assert!(tea.contains("x-status: 418\r\n"), "{tea}");
    });
}

#[test]
fn what_a_cors_policy_does_not_say_a_more_general_one_does() {
    run(async {
        let policy = |more: &str| format!("cors: {}", typed("cors.v3.CorsPolicy", more));
        let general = policy(
            ", allow_origin_string_match: [{exact: 'http://a'}], allow_methods: PUT, max_age: '9', allow_credentials: true",
        );
        let own = policy(", allow_methods: GET, expose_headers: x-e");
        let filters = format!(
            "      - {{name: cors, typed_config: {}}}",
            typed("cors.v3.Cors", "")
        );
        let routes = format!(
            "          - {{match: {{prefix: /}}, route: {{cluster: a}}, typed_per_filter_config: {{{own}}}}}\n\
             \u{20}         typed_per_filter_config: {{{general}}}"
        );
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let ask = |method: &str, more: &str| {
            format!(
                "{method} / HTTP/1.1\r\nHost: h\r\nOrigin: http://a\r\n{more}Connection: close\r\n\r\n"
            )
        };
        let preflight = ask("OPTIONS", "Access-Control-Request-Method: GET\r\n");
        let answer = mesh.ask(&preflight).await;
        for line in ["origin: http://a", "methods: GET", "credentials: true"] {
            assert!(
                answer.contains(&format!("access-control-allow-{line}\r\n")),
                "{answer}"
            );
        }
        assert!(answer.contains("access-control-max-age: 9\r\n"), "{answer}");
        assert!(origin.seen().is_empty());
        let answer = mesh.ask(&ask("GET", "")).await;
        assert!(
            answer.contains("access-control-expose-headers: x-e\r\n"),
            "{answer}"
        );
        assert!(
            answer.contains("access-control-allow-origin: http://a\r\n"),
            "{answer}"
        );
        // Who asks for no method asks for no leave.
        mesh.ask(&ask("OPTIONS", "Access-Control-Request-Method:\r\n"))
            .await;
        assert!(origin.seen()[1].starts_with("OPTIONS / HTTP/1.1\r\n"));
    });
}

#[test]
fn operators_say_what_envoy_s_say() {
    run(async {
        let add = [
            ("details", "%RESPONSE_CODE_DETAILS%"),
            ("query", "%QUERY_PARAM(q)%"),
            ("environment", "%ENVIRONMENT(NOT_SET_ANYWHERE)%"),
            ("host", "%UPSTREAM_HOST_NAME_WITHOUT_PORT%"),
            ("virtual", "<%VIRTUAL_CLUSTER_NAME%>"),
            ("grpc", "<%GRPC_STATUS_NUMBER%>"),
            ("flags", "%RESPONSE_FLAGS%<%CUSTOM_FLAGS%>"),
        ];
        let add =
            add.map(|(name, value)| format!("{{header: {{key: x-{name}, value: '{value}'}}}}"));
        let routes = format!(
            "          - {{match: {{prefix: /}}, route: {{cluster: a}}, response_headers_to_add: [{}]}}\n\
             \u{20}         virtual_clusters: [{{name: vc, headers: [{{name: ':path', string_match: {{prefix: /v}}}}]}}]",
            add.join(", ")
        );
        let busy = Act::Say("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
        let origin = Origin::new(&[OK, OK, busy]).await;
        let mesh = Mesh::new(&routes, "", "", &[("a", origin.port)]).await;
        let answer = mesh.get("/v?q=a%20b%2Bc").await;
        for line in [
            "details: via_upstream",
            "query: a b+c",
            "environment: -",
            "host: 127.0.0.1",
            "virtual: <vc>",
            "grpc: <>",
            "flags: -<>",
        ] {
            assert!(answer.contains(&format!("x-{line}\r\n")), "{line} {answer}");
        }
        let grpc = format!("{GET}Content-Type: application/grpc\r\nConnection: close\r\n\r\n");
        // An answer without a status has the one that stands for its HTTP status.
        let answer = mesh.ask(&grpc).await;
        assert!(answer.contains("x-grpc: <2>\r\n"), "{answer}");
        assert!(answer.contains("x-virtual: <>\r\n"), "{answer}");
        let answer = mesh.ask(&grpc).await;
        assert!(answer.contains("x-grpc: <14>\r\n"), "{answer}");
    });
}
