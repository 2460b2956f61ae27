//! `envoy.filters.http.ext_authz` as clients, origins and authorization services see it.

use std::time::Duration;

use proto::envoy::service::auth::v3::CheckResponse;
use serde_json::{Value, json};
use testkit::authorization::{Act as Check, Service};
use tokio::io::AsyncWriteExt;

use crate::support::{Act, Mesh, OK, Origin, TO_A, run, within};

fn typed(name: &str, config: &Value) -> String {
    let mut config = config.clone();
    config["@type"] = format!("type.googleapis.com/envoy.extensions.filters.http.{name}").into();
    format!(
        "      - {{name: {}, typed_config: {config}}}",
        name.split('.').next().expect("a name")
    )
}

fn filter(config: Value) -> String {
    let mut all = json!({ "stat_prefix": "s" });
    all.as_object_mut()
        .expect("an object")
        .extend(config.as_object().expect("one").clone());
    typed("ext_authz.v3.ExtAuthz", &all)
}

fn http(more: Value) -> Value {
    let mut service =
        json!({ "server_uri": { "uri": "http://authz", "cluster": "authz", "timeout": "1s" } });
    service
        .as_object_mut()
        .expect("an object")
        .extend(more.as_object().expect("one").clone());
    json!({ "http_service": service })
}

fn grpc() -> Value {
    json!({ "grpc_service": { "envoy_grpc": { "cluster_name": "authz-h2", "authority": "authz.ns" }, "timeout": "1s" } })
}

fn list(names: &[&str]) -> Value {
    let patterns: Vec<Value> = names.iter().map(|name| json!({ "exact": name })).collect();
    json!({ "patterns": patterns })
}

fn say(answer: Value) -> Check {
    let answer: CheckResponse = proto::json::from_value(&answer).expect("canonical JSON");
    Check::Say(Box::new(answer))
}

fn with(mut config: Value, more: Value) -> Value {
    config
        .as_object_mut()
        .expect("an object")
        .extend(more.as_object().expect("one").clone());
    config
}

fn status(answer: &str) -> u16 {
    answer[9..12].parse().expect("a status")
}

const PASS: Act = Act::Say(
    "HTTP/1.1 200 OK\r\nx-user: bob\r\nx-team: t\r\nx-secret: s\r\nset-cookie: a=1\r\nx-envoy-auth-headers-to-remove: x-gone, X-Also\r\ncontent-length: 0\r\n\r\n",
);

#[test]
fn a_server_that_says_200_lets_pass_and_changes_what_it_may() {
    run(async {
        let (origin, authz) = (Origin::new(&[OK]).await, Origin::new(&[PASS]).await);
        let config = http(json!({
            "path_prefix": "/check",
            "authorization_request": { "headers_to_add": [{ "key": "x-mesh", "value": "yes" }] },
            "authorization_response": {
                "allowed_upstream_headers": list(&["x-user"]),
                "allowed_upstream_headers_to_append": list(&["x-team"]),
                "allowed_client_headers_on_success": list(&["set-cookie"]),
                "dynamic_metadata_from_headers": list(&["x-secret"]),
            },
        }));
        let config = with(config, json!({ "allowed_headers": list(&["x-told"]) }));
        let clusters = [("a", origin.port), ("authz", authz.port)];
        let mesh = Mesh::new(TO_A, "", &filter(config), &clusters).await;
        let answer = mesh
            .ask("POST /p?q=1 HTTP/1.1\r\nHost: h\r\nAuthorization: me\r\nX-Told: 1\r\nX-Not: 2\r\nX-Mesh: forged\r\nX-User: admin\r\nx-user: root\r\nX-Team: mine\r\nX-Gone: 1\r\nX-Also: 1\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
            .await;
        assert!(
            status(&answer) == 200 && answer.contains("set-cookie: a=1\r\n"),
            "{answer}"
        );
        let asked = authz.seen().pop().expect("it was asked");
        assert!(
            asked.starts_with("POST /check/p?q=1 HTTP/1.1\r\nhost: h\r\n"),
            "{asked}"
        );
        assert!(asked.contains("authorization: me\r\n") && asked.contains("x-told: 1\r\n"));
        assert!(
            !asked.contains("x-not") && asked.ends_with("\r\n\r\n"),
            "{asked}"
        );
        assert!(
            asked.contains("x-mesh: yes\r\n") && !asked.contains("forged"),
            "{asked}"
        );
        let seen = origin.seen().pop().expect("it came").to_lowercase();
        assert!(
            seen.contains("x-user: bob\r\n") && !seen.contains("admin") && !seen.contains("root"),
            "{seen}"
        );
        assert!(
            seen.contains("x-team: mine\r\n") && seen.contains("x-team: t\r\n"),
            "{seen}"
        );
        for gone in ["x-gone", "x-also", "x-secret", "set-cookie"] {
            assert!(!seen.contains(gone), "{gone} {seen}");
        }
        assert!(seen.ends_with("\r\n\r\nhi"));
        let store = &mesh.server.store;
        assert_eq!(store.number("http.test.ext_authz.s.ok"), 1);
        assert_eq!(store.number("cluster.a.ext_authz.ok"), 1);
        assert_eq!(store.number("cluster.authz.upstream_rq_200"), 1);
    });
}

#[test]
fn a_refusal_reaches_the_client_as_the_server_says_it() {
    run(async {
        let no = Act::Say(
            "HTTP/1.1 302 Found\r\nlocation: http://login/\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nx-inner: 1\r\ncontent-type: text/html\r\ncontent-length: 5\r\n\r\nlogin",
        );
        for (client, inner) in [(Value::Null, true), (list(&["set-cookie"]), false)] {
            let (origin, authz) = (Origin::new(&[]).await, Origin::new(&[no]).await);
            let config =
                http(json!({ "authorization_response": { "allowed_client_headers": client } }));
            let clusters = [("a", origin.port), ("authz", authz.port)];
            let mesh = Mesh::new(TO_A, "", &filter(config), &clusters).await;
            let answer = mesh.get("/").await;
            assert!(
                status(&answer) == 302 && answer.ends_with("\r\n\r\nlogin"),
                "{answer}"
            );
            assert!(answer.contains("location: http://login/\r\n"), "{answer}");
            assert!(
                answer.contains("set-cookie: a=1\r\n") && answer.contains("set-cookie: b=2\r\n")
            );
            assert_eq!(answer.contains("x-inner"), inner, "{answer}");
            assert_eq!(mesh.log(1).await, "GET / 302 UAEX ext_authz_denied 0\n");
            assert!(origin.seen().is_empty());
            let store = &mesh.server.store;
            assert_eq!(store.number("http.test.ext_authz.s.denied"), 1);
            assert_eq!(store.number("cluster.a.ext_authz.denied"), 1);
            assert_eq!(store.number("cluster.a.upstream_rq_302"), 1);
        }
    });
}

#[test]
fn who_cannot_be_asked_decides_as_configured() {
    run(async {
        let huge: &'static str = Box::leak(
            format!(
                "HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n{}",
                "x".repeat(5 << 20)
            )
            .into_boxed_str(),
        );
        let cases = [
            Some(Act::Say(
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\n\r\nbad",
            )),
            Some(Act::Close),
            Some(Act::SayAndClose(
                "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
            )),
            Some(Act::SayAndClose("garbage\r\n\r\n")),
            Some(Act::SayAndClose(huge)),
            Some(Act::Hang),
            None,
        ];
        for act in cases {
            for allow in [false, true] {
                let origin = Origin::new(&[OK]).await;
                let authz = Origin::new(act.as_slice()).await;
                let config = http(
                    json!({ "server_uri": { "uri": "http://authz", "cluster": "authz", "timeout": "0.5s" } }),
                );
                let config = with(
                    config,
                    json!({
                        "failure_mode_allow": allow,
                        "failure_mode_allow_header_add": true,
                        "status_on_error": { "code": 503 },
                    }),
                );
                let port = if act.is_none() { 1 } else { authz.port };
                let clusters = [("a", origin.port), ("authz", port)];
                let mesh = Mesh::new(TO_A, "", &filter(config), &clusters).await;
                let answer = mesh.get("/").await;
                let store = &mesh.server.store;
                assert_eq!(store.number("http.test.ext_authz.s.error"), 1);
                if allow {
                    assert_eq!(status(&answer), 200, "{answer}");
                    assert!(
                        origin.seen()[0].contains("x-envoy-auth-failure-mode-allowed: true\r\n")
                    );
                    assert_eq!(
                        store.number("http.test.ext_authz.s.failure_mode_allowed"),
                        1
                    );
                } else {
                    assert_eq!(status(&answer), 503, "{answer}");
                    assert!(origin.seen().is_empty());
                    assert_eq!(mesh.log(1).await, "GET / 503 UAEX ext_authz_error 0\n");
                }
            }
        }
    });
}

#[test]
fn a_client_that_goes_away_takes_its_question_along() {
    run(async {
        let (origin, authz) = (
            Origin::new(&[OK]).await,
            Origin::new(&[Act::Hang, PASS]).await,
        );
        let config = http(
            json!({ "server_uri": { "uri": "http://authz", "cluster": "authz", "timeout": "60s" } }),
        );
        let clusters = [("a", origin.port), ("authz", authz.port)];
        let mesh = Mesh::new(TO_A, "", &filter(config), &clusters).await;
        let mut stream = mesh.connect().await;
        stream
            .write_all(b"GET /1 HTTP/1.1\r\nHost: h\r\n\r\n")
            .await
            .expect("it is open");
        within(async {
            while authz.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
        drop(stream);
        assert!(
            mesh.log(1).await.starts_with("GET /1 0 DC "),
            "{}",
            mesh.log(1).await
        );
        assert_eq!(status(&mesh.get("/2").await), 200);
        assert_eq!(origin.seen().len(), 1);
    });
}

#[test]
fn the_body_is_shown_up_to_its_limit() {
    run(async {
        let post = |body: &str| {
            format!(
                "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
        };
        let long = "0123456789".repeat(10_000);
        for (partial, body, wanted, shown) in [
            (false, "12345678", 200, Some(("12345678", "false"))),
            (false, "123456789", 413, None),
            (true, "123456789", 200, Some(("12345678", "true"))),
            (true, &*long, 200, Some(("01234567", "true"))),
            (true, "", 200, Some(("", ""))),
        ] {
            let (origin, authz) = (Origin::new(&[OK]).await, Origin::new(&[PASS]).await);
            let config = with(
                http(json!({})),
                json!({ "with_request_body": { "max_request_bytes": 8, "allow_partial_message": partial } }),
            );
            let clusters = [("a", origin.port), ("authz", authz.port)];
            let mesh = Mesh::new(TO_A, "", &filter(config), &clusters).await;
            let answer = mesh.ask(&post(body)).await;
            assert_eq!(status(&answer), wanted, "{answer}");
            let asked = authz.seen().pop();
            match shown {
                None => assert!(asked.is_none() && origin.seen().is_empty()),
                Some((text, mark)) => {
                    let asked = asked.expect("it was asked");
                    assert!(asked.ends_with(&format!("\r\n\r\n{text}")), "{asked}");
                    let mark = format!("x-envoy-auth-partial-body: {mark}\r\n");
                    assert_eq!(asked.contains(&mark), !text.is_empty(), "{asked}");
                    assert!(
                        origin.seen()[0].ends_with(&format!("\r\n\r\n{body}")),
                        "all of it arrives"
                    );
                }
            }
        }
        // Of unknown length.
        let (origin, authz) = (Origin::new(&[OK]).await, Origin::new(&[PASS]).await);
        let config = with(
            http(json!({})),
            json!({ "with_request_body": { "max_request_bytes": 4, "allow_partial_message": true } }),
        );
        let clusters = [("a", origin.port), ("authz", authz.port)];
        let mesh = Mesh::new(TO_A, "", &filter(config), &clusters).await;
        let answer = mesh
            .ask("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")
            .await;
        assert_eq!(status(&answer), 200, "{answer}");
        assert!(
            authz.seen()[0].ends_with("\r\n\r\nabcd"),
            "{:?}",
            authz.seen()
        );
        let seen = origin.seen()[0].to_lowercase();
        assert!(
            seen.contains("transfer-encoding: chunked") && seen.contains("defg"),
            "{seen}"
        );
    });
}

#[test]
fn a_grpc_service_is_told_all_and_may_change_all_but_the_framing() {
    run(async {
        let header = |key: &str, value: &str| json!({ "header": { "key": key, "value": value } });
        let script = vec![
            say(json!({
                "ok_response": {
                    "headers": [header("X-User", "bob"), { "header": { "key": "x-more", "value": "2" }, "append": true }],
                    "headers_to_remove": ["x-gone", "host", ":path"],
                    "response_headers_to_add": [header("x-said", "so")],
                    "query_parameters_to_set": [{ "key": "q", "value": "2" }],
                    "query_parameters_to_remove": ["secret"],
                },
                "dynamic_metadata": { "who": "bob" },
            })),
            say(
                json!({ "status": { "code": 7 }, "denied_response": { "status": { "code": 402 }, "headers": [header("x-why", "money")], "body": "pay" } }),
            ),
            say(json!({ "status": { "code": 7 } })),
            say(
                json!({ "status": { "code": 13 }, "error_response": { "status": { "code": 500 }, "body": "broken" } }),
            ),
            Check::Fail(14),
            say(json!({ "ok_response": { "headers": [header("x-bad", "a\r\nx-injected: 1")] } })),
            say(json!({ "ok_response": { "headers": [header("transfer-encoding", "chunked")] } })),
            say(json!({ "ok_response": { "headers": [header(":path", "/admin")] } })),
        ];
        let (service, address) = Service::start(script).await;
        let origin = Origin::new(&[OK]).await;
        let config = with(
            grpc(),
            json!({
                "with_request_body": { "max_request_bytes": 100 },
                "metadata_context_namespaces": ["seen"],
            }),
        );
        let filters = format!(
            "{}\n{}",
            typed(
                "set_metadata.v3.Config",
                &json!({ "metadata": [{ "metadata_namespace": "seen", "value": { "a": [1, "b"] } }] })
            ),
            filter(config)
        );
        let clusters = [("a", origin.port), ("authz-h2", address.port())];
        let routes = "          - {match: {prefix: /}, route: {cluster: a}, typed_per_filter_config: {ext_authz: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute, check_settings: {context_extensions: {route: r}}}}}";
        let mesh = Mesh::new(routes, "", &filters, &clusters).await;
        let mut stream = mesh.connect().await;
        let request = b"POST /p?secret=1&q=1&z HTTP/1.1\r\nHost: h\r\nX-User: admin\r\nX-More: 1\r\nX-Gone: 1\r\nX-Twice: a\r\nX-Twice: b\r\nX-Odd: \xff\xfe!\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
        stream.write_all(request).await.expect("it is open");
        let mut answer = String::new();
        within(tokio::io::AsyncReadExt::read_to_string(
            &mut stream,
            &mut answer,
        ))
        .await
        .expect("an answer");
        assert!(
            status(&answer) == 200 && answer.contains("x-said: so\r\n"),
            "{answer}"
        );
        let asked = service.seen().remove(0).attributes.expect("attributes");
        assert_eq!(
            asked.context_extensions.get("route").map(String::as_str),
            Some("r")
        );
        let told = asked.request.expect("a request").http.expect("of HTTP");
        assert_eq!(
            (&*told.method, &*told.path, &*told.host, &*told.protocol),
            ("POST", "/p?secret=1&q=1&z", "h", "HTTP/1.1")
        );
        assert_eq!((told.size, &*told.body, &*told.scheme), (2, "hi", "http"));
        let value = |name: &str| told.headers.get(name).map(String::as_str);
        assert_eq!(value("x-twice"), Some("a,b"));
        assert_eq!(
            value("x-odd"),
            Some("!!!"),
            "what is no text is shown as such"
        );
        assert_eq!(
            (value(":path"), value(":authority")),
            (Some("/p?secret=1&q=1&z"), Some("h"))
        );
        assert_eq!(value("x-envoy-auth-partial-body"), Some("false"));
        assert!(
            asked
                .metadata_context
                .expect("metadata")
                .filter_metadata
                .contains_key("seen")
        );
        assert!(asked.source.expect("a source").address.is_some() && asked.destination.is_some());
        let seen = String::from_utf8_lossy(origin.seen()[0].as_bytes()).to_lowercase();
        assert!(
            seen.starts_with("post /p?z&q=2 http/1.1\r\nhost: h\r\n"),
            "{seen}"
        );
        assert!(
            seen.contains("x-user: bob\r\n") && !seen.contains("admin") && !seen.contains("x-gone"),
            "{seen}"
        );
        assert!(
            seen.contains("x-more: 1\r\n") && seen.contains("x-more: 2\r\n"),
            "{seen}"
        );

        for (wanted, end) in [
            (402, "pay"),
            (403, "\r\n\r\n"),
            (500, "broken"),
            (403, "\r\n\r\n"),
            (500, "\r\n\r\n"),
            (500, "\r\n\r\n"),
            (500, "\r\n\r\n"),
        ] {
            let answer = mesh.get("/").await;
            assert!(
                status(&answer) == wanted && answer.ends_with(end),
                "{wanted} {end}: {answer}"
            );
        }
        assert_eq!(origin.seen().len(), 1);
        let store = &mesh.server.store;
        for (name, count) in [("ok", 1), ("denied", 2), ("error", 2), ("invalid", 3)] {
            assert_eq!(
                store.number(&format!("http.test.ext_authz.s.{name}")),
                count,
                "{name}"
            );
        }
        let log = mesh.log(8).await;
        assert!(
            log.contains("GET / 402 UAEX ext_authz_denied 0\n")
                && log.contains("GET / 500 UAEX ext_authz_invalid 0\n"),
            "{log}"
        );
    });
}

#[test]
fn a_slow_grpc_service_is_not_waited_for() {
    run(async {
        // It takes connections and never says a word: a server that heeds `grpc-timeout` might answer first.
        let service = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = service.local_addr().expect("an address");
        let mut config = grpc();
        config["grpc_service"]["timeout"] = "0.1s".into();
        let mesh = Mesh::new(
            TO_A,
            "",
            &filter(config),
            &[("a", 1), ("authz-h2", address.port())],
        )
        .await;
        assert_eq!(status(&mesh.get("/").await), 403);
        assert_eq!(mesh.log(1).await, "GET / 403 UAEX ext_authz_error 0\n");
        assert_eq!(
            mesh.server
                .store
                .number("cluster.authz-h2.upstream_rq_timeout"),
            1
        );
    });
}

#[test]
fn only_what_a_custom_policy_matches_is_asked_about() {
    run(async {
        let rules = json!({ "action": "DENY", "policies": { "istio-ext-authz-p-ns[n]-policy[c]-rule[0]": {
            "permissions": [{ "url_path": { "path": { "prefix": "/asked" } } }], "principals": [{ "any": true }],
        } } });
        let rbac = typed(
            "rbac.v3.RBAC",
            &json!({ "shadow_rules": rules, "shadow_rules_stat_prefix": "istio_ext_authz_" }),
        );
        let config = with(
            http(json!({})),
            json!({ "filter_enabled_metadata": {
            "filter": "envoy.filters.http.rbac",
            "path": [{ "key": "istio_ext_authz_shadow_effective_policy_id" }],
            "value": { "string_match": { "prefix": "istio-ext-authz-p" } },
        } }),
        );
        let no = Act::Say("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n");
        let (origin, authz) = (Origin::new(&[OK, OK]).await, Origin::new(&[no, PASS]).await);
        // As real configurations have it: the filter's namespace is its full name.
        let filters = format!("{rbac}\n{}", filter(config));
        let off = "typed_per_filter_config: {ext_authz: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute, disabled: true}}";
        let routes = format!(
            "          - {{match: {{prefix: /asked/not}}, route: {{cluster: a}}, {off}}}\n{TO_A}"
        );
        let clusters = [("a", origin.port), ("authz", authz.port)];
        let mesh = Mesh::new(&routes, "", &filters, &clusters).await;
        for (path, wanted) in [("/free", 200), ("/asked", 401), ("/asked/not", 200)] {
            assert_eq!(status(&mesh.get(path).await), wanted, "{path}");
        }
        assert_eq!(authz.seen().len(), 1);
        let store = &mesh.server.store;
        assert_eq!(store.number("http.test.ext_authz.s.disabled"), 1);
        assert_eq!(
            store.number("http.test.rbac.istio_ext_authz_shadow_denied"),
            2
        );
    });
}
