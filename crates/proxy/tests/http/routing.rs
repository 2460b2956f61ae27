//! Filters, replies and redirects that routes ask for, as clients and origins see them.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};

use super::support::{Act, Mesh, OK, Origin, TO_A, run, within};

const TYPE: &str = "\"@type\": type.googleapis.com/envoy.extensions";

#[test]
fn header_mutations_of_filter_and_route_come_in_their_order() {
    run(async {
        let origin = Origin::new(&[Act::Say(
            "HTTP/1.1 200 OK\r\nX-Secret: 1\r\nContent-Length: 2\r\n\r\nok",
        )])
        .await;
        let routes = format!(
            "          - match: {{prefix: /}}
            route: {{cluster: a}}
            typed_per_filter_config:
              mutate: {{{TYPE}.filters.http.header_mutation.v3.HeaderMutationPerRoute, mutations: {{request_mutations: [{{append: {{header: {{key: x-who, value: route}}}}}}]}}}}"
        );
        let filters = format!(
            "      - name: mutate
        typed_config:
          {TYPE}.filters.http.header_mutation.v3.HeaderMutation
          mutations:
            request_mutations: [{{append: {{header: {{key: x-who, value: filter}}}}}}, {{append: {{header: {{key: x-how, value: '%CEL(request.method)%'}}}}}}, {{remove_on_match: {{key_matcher: {{prefix: x-drop}}}}}}]
            formatters: [{{name: cel, typed_config: {{{TYPE}.formatter.cel.v3.Cel}}}}]
            query_parameter_mutations: [{{append: {{record: {{key: v, value: \"2\"}}}}}}, {{remove: w}}]
            response_mutations: [{{remove: x-secret}}, {{append: {{header: {{key: x-new, value: \"%RESPONSE_CODE%\"}}}}}}]"
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let answer = mesh
            .ask("GET /p?w=1 HTTP/1.1\r\nHost: h\r\nX-Drop-Me: 1\r\nConnection: close\r\n\r\n")
            .await;
        let seen = &origin.seen()[0];
        assert!(seen.starts_with("GET /p?v=2 HTTP/1.1\r\n"), "{seen}");
        let told = "x-who: filter\r\nx-how: GET\r\nx-who: route\r\n";
        assert!(seen.contains(told), "{seen}");
        assert!(!seen.to_lowercase().contains("x-drop"), "{seen}");
        assert!(!answer.to_lowercase().contains("x-secret"), "{answer}");
        assert!(answer.contains("x-new: "), "{answer}");
    });
}

#[test]
fn a_request_may_count_more_or_less_at_a_local_rate_limit() {
    run(async {
        let origin = Origin::new(&[OK; 9]).await;
        let limit =
            |more: &str| format!("actions: [{{generic_key: {{descriptor_value: v}}}}], {more}");
        let route = |path: &str, limits: &str| {
            format!(
                "          - {{match: {{prefix: {path}}}, route: {{cluster: a, rate_limits: [{{{limits}}}]}}}}\n"
            )
        };
        let routes = [
            route(
                "/cost",
                &limit(
                    "hits_addend: {format: '%REQ(x-cost)%'}, x_ratelimit_option: DRAFT_VERSION_03",
                ),
            ),
            route(
                "/back",
                &limit("hits_addend: {number: 2, is_negative_hits: true}"),
            ),
            route("/quiet", &limit("x_ratelimit_option: 'OFF'")),
        ]
        .concat();
        let filters = format!(
            "      - name: limit
        typed_config: {{{TYPE}.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: limit, \
             token_bucket: {{max_tokens: 99, fill_interval: 3600s}}, \
             filter_enabled: {{default_value: {{numerator: 100}}}}, filter_enforced: {{default_value: {{numerator: 100}}}}, \
             descriptors: [{{entries: [{{key: generic_key, value: v}}], token_bucket: {{max_tokens: 5, fill_interval: 360000s}}}}]}}"
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        for (path, cost, status, left) in [
            ("/cost", "4", 200, Some(1)),
            ("/cost", "2", 429, Some(1)),
            ("/back", "", 200, None),
            ("/cost", "2", 200, Some(1)),
            ("/quiet", "", 200, None),
            ("/quiet", "", 429, None),
            // What is no number counts nothing.
            ("/cost", "much", 200, None),
        ] {
            let answer = mesh
                .ask(&format!(
                    "GET {path} HTTP/1.1\r\nHost: h\r\nX-Cost: {cost}\r\nConnection: close\r\n\r\n"
                ))
                .await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path} {cost}: {answer}"
            );
            match left {
                Some(left) => {
                    let told = format!("x-ratelimit-limit: 5\r\nx-ratelimit-remaining: {left}\r\n");
                    assert!(answer.contains(&told), "{path} {cost}: {answer}");
                }
                None => assert!(!answer.contains("x-ratelimit"), "{path} {cost}: {answer}"),
            }
        }
    });
}

#[test]
fn a_local_rate_limit_refuses_what_is_over_it() {
    run(async {
        let origin = Origin::new(&[OK; 5]).await;
        let limit = |tokens: u32, more: &str| {
            format!(
                "{TYPE}.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: limit, \
                 token_bucket: {{max_tokens: {tokens}, fill_interval: 3600s}}, \
                 filter_enabled: {{default_value: {{numerator: 100}}}}, \
                 filter_enforced: {{default_value: {{numerator: 100}}}}, {more}"
            )
        };
        let routes = format!(
            "          - match: {{prefix: /own}}
            route: {{cluster: a, rate_limits: [{{actions: [{{request_headers: {{header_name: x-user, descriptor_key: user}}}}]}}]}}
            typed_per_filter_config:
              limit: {{{}}}
          - match: {{prefix: /net}}
            route:
              cluster: a
              rate_limits:
              - actions:
                - {{remote_address_match: {{descriptor_value: \"%REQ(x-none)%\", default_value: here, address_matcher: {{ranges: [{{address_prefix: 127.0.0.0, prefix_len: 8}}]}}}}}}
              - actions:
                - {{remote_address_match: {{descriptor_value: elsewhere, address_matcher: {{ranges: [{{address_prefix: 127.0.0.0, prefix_len: 8}}], invert_match: true}}}}}}
              - actions:
                - {{generic_key: {{descriptor_value: 100%, default_value: stood in}}}}
            typed_per_filter_config:
              limit: {{{}}}
{TO_A}",
            limit(
                9,
                "descriptors: [{entries: [{key: user, value: greedy}], token_bucket: {max_tokens: 1, fill_interval: 3600s}}]"
            ),
            limit(
                9,
                "enable_retry_after_header: true, descriptors: [\
                 {entries: [{key: remote_address_match, value: here}], token_bucket: {max_tokens: 3, fill_interval: 3600s}}, \
                 {entries: [{key: remote_address_match, value: elsewhere}], token_bucket: {max_tokens: 1, fill_interval: 3600s}}, \
                 {entries: [{key: generic_key, value: 100%}], token_bucket: {max_tokens: 2, fill_interval: 3600s}}]"
            )
        );
        let filters = format!(
            "      - name: limit\n        typed_config: {{{}}}",
            limit(
                1,
                "enable_x_ratelimit_headers: DRAFT_VERSION_03, response_headers_to_add: [{header: {key: x-why, value: limit}}]"
            )
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let first = mesh.get("/").await;
        assert!(first.starts_with("HTTP/1.1 200"), "{first}");
        assert!(first.contains("x-ratelimit-limit: 1\r\nx-ratelimit-remaining: 0\r\n"));
        let second = mesh.get("/").await;
        assert!(second.starts_with("HTTP/1.1 429"), "{second}");
        assert!(second.contains("x-why: limit\r\n") && second.ends_with("local_rate_limited"));
        let own = |user: &str| {
            format!("GET /own HTTP/1.1\r\nHost: h\r\nX-User: {user}\r\nConnection: close\r\n\r\n")
        };
        for (user, status) in [("greedy", "200"), ("greedy", "429"), ("modest", "200")] {
            let answer = mesh.ask(&own(user)).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{user}: {answer}"
            );
        }
        for _ in 0..2 {
            assert!(mesh.get("/net").await.starts_with("HTTP/1.1 200"));
        }
        let refused = mesh.get("/net").await;
        assert!(refused.starts_with("HTTP/1.1 429"), "{refused}");
        let (_, wait) = refused.split_once("retry-after: ").expect("it says when");
        let wait = wait.lines().next().and_then(|wait| wait.parse().ok());
        assert!(
            wait.is_some_and(|wait| (1700..=3600).contains(&wait)),
            "{refused}"
        );
        let log = mesh.log(8).await;
        assert!(log.contains("429 RL local_rate_limited"), "{log}");
    });
}

#[test]
fn metadata_of_headers_and_of_the_configuration_is_there_for_others() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let routes = "          - match: {prefix: /}
            route: {cluster: a}
            request_headers_to_add:
            - {header: {key: x-meta, value: \"%DYNAMIC_METADATA(ns:user)%/%DYNAMIC_METADATA(ns:none)%/%DYNAMIC_METADATA(set:a)%\"}}";
        let filters = format!(
            "      - name: h2m
        typed_config:
          {TYPE}.filters.http.header_to_metadata.v3.Config
          request_rules:
          - {{header: x-user, remove: true, on_header_present: {{metadata_namespace: ns, key: user, regex_value_rewrite: {{pattern: {{regex: \"^u-(.*)$\"}}, substitution: \"\\\\1\"}}}}}}
          - {{cookie: none, on_header_missing: {{metadata_namespace: ns, key: none, value: missing}}}}
      - name: set
        typed_config: {{{TYPE}.filters.http.set_metadata.v3.Config, metadata: [{{metadata_namespace: set, value: {{a: b}}}}]}}"
        );
        let mesh = Mesh::new(routes, "", &filters, &[("a", origin.port)]).await;
        mesh.ask("GET / HTTP/1.1\r\nHost: h\r\nX-User: u-7\r\nConnection: close\r\n\r\n")
            .await;
        let seen = &origin.seen()[0];
        assert!(seen.contains("x-meta: 7/missing/b\r\n"), "{seen}");
        assert!(!seen.to_lowercase().contains("x-user"), "{seen}");
    });
}

#[test]
fn a_session_names_its_host_in_a_cookie_and_a_header() {
    run(async {
        let origin = Origin::new(&[OK, OK, OK]).await;
        let session = |state: &str| {
            format!(
                "{TYPE}.filters.http.stateful_session.v3.StatefulSession, session_state: {{name: s, typed_config: {{{TYPE}.http.stateful_session.{state}}}}}"
            )
        };
        let routes = format!(
            "          - match: {{prefix: /header}}
            route: {{cluster: a}}
            typed_per_filter_config:
              session: {{{TYPE}.filters.http.stateful_session.v3.StatefulSessionPerRoute, stateful_session: {{session_state: {{name: s, typed_config: {{{TYPE}.http.stateful_session.header.v3.HeaderBasedSessionState, name: x-host}}}}}}}}
{TO_A}"
        );
        let filters = format!(
            "      - name: session\n        typed_config: {{{}}}",
            session("cookie.v3.CookieBasedSessionState, cookie: {name: sticky, path: /, ttl: 60s}")
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let first = mesh.get("/").await;
        let cookie = first
            .lines()
            .find_map(|line| line.strip_prefix("set-cookie: "))
            .expect("a cookie")
            .to_owned();
        assert!(
            cookie.starts_with("sticky=\"") && cookie.contains("; Max-Age=60; Path=/; HttpOnly")
        );
        let pair = cookie.split(';').next().expect("a pair");
        // A client that names the host it has got keeps it and is told nothing new.
        let again = mesh
            .ask(&format!(
                "GET / HTTP/1.1\r\nHost: h\r\nCookie: {pair}\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert!(
            again.starts_with("HTTP/1.1 200") && !again.contains("set-cookie"),
            "{again}"
        );
        let header = mesh.get("/header").await;
        assert!(header.contains("x-host: "), "{header}");
    });
}

#[test]
fn what_becomes_of_sessions_is_counted_and_a_host_that_is_not_there_has_a_status_of_its_own() {
    run(async {
        let named = |address: &str| format!("x-host: {}\r\n", BASE64_STANDARD.encode(address));
        for (strict, status, counted) in [(true, 410, "failed_closed"), (false, 200, "failed_open")]
        {
            let origin = Origin::new(&[OK; 8]).await;
            let filters = format!(
                "      - name: session\n        typed_config: {{{TYPE}.filters.http.stateful_session.v3.StatefulSession, strict: {strict}, stat_prefix: own, \
                 status_on_strict_destination_not_found: 410, \
                 session_state: {{name: s, typed_config: {{{TYPE}.http.stateful_session.header.v3.HeaderBasedSessionState, name: x-host}}}}}}"
            );
            let mesh = Mesh::new(TO_A, "", &filters, &[("a", origin.port)]).await;
            let ask = async |header: String| {
                let request =
                    format!("GET / HTTP/1.1\r\nHost: h\r\n{header}Connection: close\r\n\r\n");
                mesh.ask(&request).await
            };
            let stats = || {
                ["no_session", "routed", counted].map(|name| {
                    let name = format!("http.test.stateful_session.own.{name}");
                    mesh.server.store.number(&name)
                })
            };
            let answer = ask(String::new()).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            assert_eq!(stats(), [1, 0, 0]);
            let here = format!("127.0.0.1:{}", origin.port);
            let answer = ask(named(&here)).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            assert_eq!(stats(), [1, 1, 0]);
            let answer = ask(named("192.0.2.1:80")).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{answer}"
            );
            assert_eq!(stats(), [1, 1, 1]);
        }
    });
}

#[test]
fn a_buffered_request_arrives_whole_or_not_at_all() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let filters = format!(
            "      - name: buffer\n        typed_config: {{{TYPE}.filters.http.buffer.v3.Buffer, max_request_bytes: 8}}"
        );
        let mesh = Mesh::new(TO_A, "", &filters, &[("a", origin.port)]).await;
        let answer = mesh
            .ask("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            .await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let seen = origin.seen();
        assert!(
            seen[0].to_lowercase().contains("content-length: 5\r\n"),
            "{}",
            seen[0]
        );
        assert!(seen[0].ends_with("\r\n\r\nabcde"), "{}", seen[0]);
        let answer = mesh
            .ask("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nConnection: close\r\n\r\nabcdefghi")
            .await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        assert_eq!(origin.seen().len(), 1);
    });
}

#[test]
fn redirects_of_the_upstream_are_followed_where_the_route_says_so() {
    run(async {
        let moved = Act::Say(
            "HTTP/1.1 302 Found\r\nLocation: http://other/new?x\r\nX-Copy: 1\r\nContent-Length: 0\r\n\r\n",
        );
        let see_other = Act::Say(
            "HTTP/1.1 303 See Other\r\nLocation: http://other/get\r\nContent-Length: 0\r\n\r\n",
        );
        let relative = Act::Say("HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n");
        let a = Origin::new(&[moved, see_other, moved, relative]).await;
        let b = Origin::new(&[OK, OK, moved]).await;
        let routes = "          - match: {prefix: /new}
            route: {cluster: b, internal_redirect_policy: {}}
          - match: {prefix: /get}
            route: {cluster: b}
          - match: {prefix: /}
            route:
              cluster: a
              internal_redirect_policy: {redirect_response_codes: [302, 303], response_headers_to_copy: [x-copy]}";
        let mesh = Mesh::new(routes, "", "", &[("a", a.port), ("b", b.port)]).await;
        let post = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
        assert!(mesh.ask(post).await.starts_with("HTTP/1.1 200"));
        let seen = b.seen();
        assert!(
            seen[0].starts_with("POST /new?x HTTP/1.1\r\n"),
            "{}",
            seen[0]
        );
        assert!(seen[0].to_lowercase().contains("host: other\r\n") && seen[0].ends_with("hi"));
        assert!(
            seen[0].contains("x-envoy-original-url: http://h/\r\n"),
            "{}",
            seen[0]
        );
        assert!(
            seen[0].to_lowercase().contains("x-copy: 1\r\n"),
            "{}",
            seen[0]
        );
        assert!(mesh.ask(post).await.starts_with("HTTP/1.1 200"));
        let seen = b.seen();
        assert!(seen[1].starts_with("GET /get HTTP/1.1\r\n"), "{}", seen[1]);
        assert!(
            !seen[1].to_lowercase().contains("content-length"),
            "{}",
            seen[1]
        );
        // One redirect a request; the next one is the client's affair, and so is one without a whole URL.
        let twice = mesh.ask(post).await;
        assert!(
            twice.starts_with("HTTP/1.1 302") && twice.contains("http://other/new?x"),
            "{twice}"
        );
        let relative = mesh.get("/").await;
        assert!(relative.starts_with("HTTP/1.1 302"), "{relative}");
    });
}

#[test]
fn replies_look_as_the_configuration_says() {
    run(async {
        let options = "local_reply_config:
        mappers:
        - filter: {status_code_filter: {comparison: {op: EQ, value: {default_value: 404, runtime_key: none}}}}
          status_code: 410
          body: {inline_string: gone}
          headers_to_add: [{header: {key: x-mapped, value: \"%REQ(:path)%\"}}]
          body_format_override: {text_format_source: {inline_string: \"<%LOCAL_REPLY_BODY%>\"}, content_type: text/html}
        body_format: {json_format: {code: \"%RESPONSE_CODE%\", text: \"%LOCAL_REPLY_BODY%\"}}";
        let routes = "          - {match: {prefix: /no}, direct_response: {status: 403, body: {inline_string: nope}}}";
        let mesh = Mesh::new(routes, options, "", &[]).await;
        let answer = mesh.get("/missing").await;
        assert!(answer.starts_with("HTTP/1.1 410"), "{answer}");
        assert!(
            answer.contains("content-type: text/html\r\n") && answer.ends_with("\r\n\r\n<gone>")
        );
        assert!(answer.contains("x-mapped: /missing\r\n"), "{answer}");
        let answer = mesh.get("/no").await;
        assert!(
            answer.contains("content-type: application/json\r\n"),
            "{answer}"
        );
        assert!(
            answer.ends_with("{\"code\":403,\"text\":\"nope\"}\n"),
            "{answer}"
        );
    });
}

#[test]
fn log_lines_know_their_moment_their_virtual_cluster_and_what_was_tried() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let other = tempfile::tempdir().expect("a folder");
        let path = other.path().join("lines");
        let options = "flush_access_log_on_new_request: true";
        let log = format!(
            "{{name: typed, filter: {{log_type_filter: {{types: [DownstreamEnd, DownstreamStart]}}}}, typed_config: {{{TYPE}.access_loggers.file.v3.FileAccessLog, \
             path: {}, log_format: {{json_format: {{type: \"%ACCESS_LOG_TYPE%\", code: \"%RESPONSE_CODE%\", hosts: \"%UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT%\", \
             same: \"%REQUEST_HEADER(X-NONE?HOST)% %RESPONSE_HEADER(:STATUS)% %RESPONSE_TRAILER(X-NONE)%\", net: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(8)%\", \
             either: '%COALESCE({{\"operators\": [\"REQUESTED_SERVER_NAME\", {{\"command\": \"REQ\", \"param\": \"x-none\"}}, {{\"command\": \"REQ\", \"param\": \":authority\", \"max_length\": 1}}]}})%', \
             neither: '%COALESCE({{\"operators\": [\"UPSTREAM_TLS_VERSION\"]}})%', host: \"%REQUESTED_SERVER_NAME(SNI_FIRST)%\", typed: \"%TYPED_CEL(response.code)%\", told: \"%CEL(response.code)%\", \
             ready: \"%UPSTREAM_CONNECTION_POOL_READY_DURATION%\", own: \"%CUSTOM_FLAGS%\", \
             query: \"%QUERY_PARAMS(DECODED)%\", cluster: \"%VIRTUAL_CLUSTER_NAME%\", took: \"%COMMON_DURATION(DS_RX_BEG:DS_TX_BEG:us)%\", \
             nested: {{list: [\"%PROTOCOL%\", 7, true]}}}}}}}}}}",
            path.display()
        );
        let routes = "          - match: {prefix: /}
            stat_prefix: all
            route: {cluster: a}
          virtual_clusters: [{name: things, headers: [{name: \":path\", string_match: {prefix: /things}}]}]";
        let mesh = Mesh::with_log(routes, options, &log, &[("a", origin.port)]).await;
        assert!(mesh.get("/things?a=%20b").await.starts_with("HTTP/1.1 200"));
        let text = within(async {
            loop {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                if text.lines().count() >= 2 {
                    return text;
                }
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        })
        .await;
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines[0]["type"], "DownstreamStart");
        assert_eq!(lines[0]["code"], 0);
        assert_eq!(lines[0]["hosts"], serde_json::Value::Null);
        assert_eq!(lines[1]["type"], "DownstreamEnd");
        assert_eq!(lines[1]["code"], 200);
        assert_eq!(lines[1]["hosts"], "127.0.0.1");
        assert_eq!(lines[1]["query"], "a= b");
        for (member, value) in [
            ("same", "h 200 -".into()),
            ("net", "127.0.0.0/8".into()),
            ("either", "h".into()),
            ("neither", serde_json::Value::Null),
            ("host", "h".into()),
            ("typed", 200.into()),
            ("told", "200".into()),
            ("own", "".into()),
        ] {
            assert_eq!(lines[1][member], value, "{member}: {text}");
        }
        assert!(lines[1]["ready"].as_u64().is_some(), "{text}");
        assert_eq!(lines[1]["cluster"], "things");
        assert!(lines[1]["took"].as_u64().is_some(), "{text}");
        assert_eq!(
            lines[1]["nested"]["list"],
            serde_json::json!(["HTTP/1.1", 7, true])
        );
        mesh.server.publish();
        let number = |name: &str| mesh.server.store.number(name);
        assert_eq!(number("vhost.v.vcluster.things.upstream_rq_200"), 1);
        assert_eq!(number("vhost.v.route.all.upstream_rq_2xx"), 1);
    });
}

#[test]
fn scopes_choose_the_routes_by_a_header() {
    // The support's routes stand in `route_config`, so that this listener is only read.
    let yaml = "name: x
scope_key_builder: {fragments: [{header_value_extractor: {name: x-tenant, element_separator: \",\", index: 1}}]}
scoped_route_configurations_list:
  scoped_route_configurations:
  - {name: a, key: {fragments: [{string_key: blue}]}, route_configuration: {name: a, virtual_hosts: []}}
  - {name: b, key: {fragments: [{string_key: blue}]}, route_configuration_name: b}";
    let manager = format!(
        "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}, filter_chains: [{{filters: [{{name: h, typed_config: \
         {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: s, \
         scoped_routes: {}, http_filters: [{{name: r, typed_config: {{{TYPE}.filters.http.router.v3.Router}}}}]}}}}]}}]}}",
        serde_json::to_string(&proto::json::yaml_to_value(yaml).expect("YAML")).expect("JSON")
    );
    let message: proto::envoy::config::listener::v3::Listener =
        proto::json::from_yaml(&manager).expect("a listener");
    let error = outrigger_proxy::plan::Listener::try_from(&message).expect_err("two of a key");
    assert!(
        error
            .to_string()
            .contains("scoped_route_configurations[1].key: is the key of another scope"),
        "{error}"
    );
}

#[test]
fn log_lines_are_written_where_an_expression_holds() {
    run(async {
        let cases = [
            ("response.code >= 400", true),
            ("response.code == 200 || response.code < 300", false),
            (
                "request.url_path == '/p' && request.path.endsWith('?q=1')",
                true,
            ),
            (
                "request.headers['x-a'] == 'one' && request.headers['X-A'].size() == 3",
                true,
            ),
            ("'x-b' in request.headers", false),
            (
                "!('x-b' in request.headers) && !has(request.headers.x_b)",
                true,
            ),
            ("request.headers['x-b'] == ''", false),
            (
                "request.headers['x-b'] == '' || response.code_details == 'direct_response'",
                true,
            ),
            ("request.method in ['GET', \"HEAD\"]", true),
            ("request.useragent.matches('^c.*l$')", true),
            ("request.useragent.startsWith('curl/')", false),
            ("connection.mtls", false),
            (
                "!connection.mtls && request.duration < duration('1h')",
                true,
            ),
            ("has(xds.cluster_name)", false),
            (
                "xds.route_name == 'direct' && request.protocol == 'HTTP/1.1'",
                true,
            ),
            (
                "int(request.headers['x-n']) > 41 && string(response.code) == '404'",
                true,
            ),
            ("response.flags != 0", false),
            ("metadata['none']['key'] == 'v'", false),
            (
                "(response.code == 404 ? request.query : request.host) == 'q=1'",
                true,
            ),
            // What is neither true nor false lets nothing through.
            ("request.path", false),
            ("request.path > 1", false),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = |index: usize| folder.path().join(index.to_string());
        let logs: Vec<_> = cases
            .iter()
            .enumerate()
            .map(|(index, (expression, _))| {
                format!(
                    "name: n{index}
        filter: {{extension_filter: {{name: cel, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter, expression: {}}}}}}}
        typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{text_format_source: {{inline_string: 'x'}}}}}}",
                    serde_json::Value::from(*expression),
                    path(index).display()
                )
            })
            .collect();
        let routes =
            "          - {name: direct, match: {prefix: /}, direct_response: {status: 404}}";
        let mesh = Mesh::with_log(routes, "", &logs.join("\n      - "), &[]).await;
        mesh.ask("GET /p?q=1 HTTP/1.1\r\nHost: h\r\nX-A: one\r\nX-N: 42\r\nUser-Agent: curl\r\nConnection: close\r\n\r\n")
            .await;
        for (index, (expression, holds)) in cases.iter().enumerate() {
            let line = || std::fs::read_to_string(path(index)).unwrap_or_default();
            if *holds {
                within(async {
                    while line().is_empty() {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                })
                .await;
            }
            assert_eq!(line().is_empty(), !holds, "{expression}");
        }
    });
}

#[test]
fn early_mutations_come_before_all_that_reads_heads() {
    run(async {
        let origin = Origin::new(&[OK; 2]).await;
        let options = format!(
            "early_header_mutation_extensions:
      - name: envoy.http.early_header_mutation.header_mutation
        typed_config:
          {TYPE}.http.early_header_mutation.header_mutation.v3.HeaderMutation
          mutations:
          - {{append: {{header: {{key: x-tenant, value: '%REQ(x-old)%'}}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}}}}
          - {{remove: x-old}}
      - name: second
        typed_config:
          {TYPE}.http.early_header_mutation.header_mutation.v3.HeaderMutation
          mutations: [{{append: {{header: {{key: x-request-id, value: mine}}, append_action: ADD_IF_ABSENT}}}}]"
        );
        // The route goes by what was changed.
        let routes = "          - {match: {prefix: /, headers: [{name: x-tenant, string_match: {exact: blue}}, {name: x-old, present_match: false}]}, route: {cluster: a}}";
        let mesh = Mesh::new(routes, &options, "", &[("a", origin.port)]).await;
        let ask = "GET / HTTP/1.1\r\nHost: h\r\nX-Old: blue\r\nX-Tenant: red\r\nConnection: close\r\n\r\n";
        assert!(mesh.ask(ask).await.starts_with("HTTP/1.1 200 "));
        let seen = origin.seen()[0].to_lowercase();
        assert!(seen.contains("x-tenant: blue\r\n"), "{seen}");
        assert!(!seen.contains("x-old"), "{seen}");
        assert!(seen.contains("x-request-id: mine\r\n"), "{seen}");
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 404 "));
    });
}

#[test]
fn a_rate_limit_may_go_by_an_expression() {
    run(async {
        let origin = Origin::new(&[OK; 8]).await;
        let expression = |text: &str, skip: bool| {
            format!(
                "{{extension: {{name: envoy.rate_limit_descriptors.expr, typed_config: {{{TYPE}.rate_limit_descriptors.expr.v3.Descriptor, \
                 descriptor_key: tier, skip_if_error: {skip}, text: \"{text}\"}}}}}}"
            )
        };
        let tier = expression(
            "request.headers['x-tier'] == 'free' ? 'low' : request.method",
            false,
        );
        let none = expression("request.headers['x-none']", false);
        let skipped = expression("request.headers['x-none']", true);
        let routes = format!(
            "          - match: {{prefix: /}}
            route:
              cluster: a
              rate_limits:
              - actions: [{tier}]
              - actions: [{{generic_key: {{descriptor_value: never}}}}, {none}]
              - actions: [{{generic_key: {{descriptor_value: always}}}}, {skipped}]"
        );
        let bucket =
            |tokens: u32| format!("token_bucket: {{max_tokens: {tokens}, fill_interval: 3600s}}");
        let filters = format!(
            "      - name: limit
        typed_config: {{{TYPE}.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: limit, {}, \
             filter_enabled: {{default_value: {{numerator: 100}}}}, filter_enforced: {{default_value: {{numerator: 100}}}}, \
             descriptors: [{{entries: [{{key: tier, value: low}}], {}}}, {{entries: [{{key: tier, value: PUT}}], {}}}, \
             {{entries: [{{key: generic_key, value: never}}], {}}}, {{entries: [{{key: generic_key, value: always}}], {}}}]}}",
            bucket(99), bucket(1), bucket(2), bucket(1), bucket(5)
        );
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let ask = |method: &str, tier: &str| {
            format!(
                "{method} / HTTP/1.1\r\nHost: h\r\nX-Tier: {tier}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        };
        for (method, tier, status) in [
            ("GET", "free", 200),
            ("GET", "free", 429),
            ("PUT", "paid", 200),
            ("PUT", "paid", 200),
            ("PUT", "paid", 429),
            ("GET", "paid", 200),
            ("GET", "paid", 200),
            // What is counted for everybody is spent.
            ("GET", "paid", 429),
        ] {
            let answer = mesh.ask(&ask(method, tier)).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{method} {tier}: {answer}"
            );
        }
    });
}
