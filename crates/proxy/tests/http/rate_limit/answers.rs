//! What becomes of its answers.

use super::*;

#[test]
fn what_is_over_the_limit_is_refused_with_all_that_the_service_says() {
    run(async {
        let refusal = say(json!({
            "overall_code": "OVER_LIMIT",
            "response_headers_to_add": [
                { "key": "X-Why", "value": "greed" },
                { "key": "content-type", "value": "application/json" },
                { "key": "content-length", "value": "1" },
                { "key": "x-bad", "value": "a\r\nx-injected: 1" },
            ],
            "raw_body": "eyJ3aHkiOjF9",
            "statuses": [
                { "code": "OK", "current_limit": { "requests_per_unit": 100, "unit": "HOUR" }, "limit_remaining": 9 },
                { "code": "OVER_LIMIT", "duration_until_reset": "7.9s", "limit_remaining": 0,
                  "current_limit": { "requests_per_unit": 10, "unit": "MINUTE", "unit_multiplier": 3, "name": "per \"user\"" } },
                { "code": "OVER_LIMIT", "duration_until_reset": "3s", "limit_remaining": 0,
                  "current_limit": { "requests_per_unit": 5, "unit": "UNKNOWN" } },
                { "code": "OK" },
            ],
        }));
        let filters = filter(json!({
            "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
            "enable_retry_after_header": true,
            "response_headers_to_add": [{ "header": { "key": "x-from", "value": "%REQ(:PATH)% %RESP(x-why)%" } }],
        }));
        let (mesh, _service, origin) = start(vec![refusal], &[], &filters, &limited()).await;
        let answer = mesh.get("/p").await;
        assert_eq!(status(&answer), 429, "{answer}");
        for line in [
            "x-why: greed\r\n",
            "content-type: application/json\r\n",
            "content-length: 9\r\n",
            "x-envoy-ratelimited: true\r\n",
            "x-ratelimit-limit: 10, 100;w=3600, 10;w=180;name=\"per \\\"user\\\"\"\r\n",
            "x-ratelimit-remaining: 0\r\n",
            "x-ratelimit-reset: 7\r\n",
            "retry-after: 7\r\n",
            "x-from: /p greed\r\n",
        ] {
            assert!(answer.contains(line), "{line} {answer}");
        }
        assert!(answer.ends_with("\r\n\r\n{\"why\":1}"), "{answer}");
        assert!(!answer.contains("x-injected") && !answer.contains("content-length: 1\r\n"));
        assert!(origin.seen().is_empty());
        assert_eq!(mesh.log(1).await, "GET /p 429 RL request_rate_limited 0\n");
        let store = &mesh.server.store;
        assert_eq!(store.number("cluster.a.ratelimit.over_limit"), 1);
        assert_eq!(store.number("cluster.a.upstream_rq_429"), 1);
    });
}

#[test]
fn a_refusal_may_have_another_form() {
    run(async {
        let said = say(json!({
            "overall_code": "OVER_LIMIT",
            "response_headers_to_add": [{ "key": "retry-after", "value": "60" }],
            "statuses": [{ "code": "OVER_LIMIT", "duration_until_reset": "0s", "current_limit": { "requests_per_unit": 1, "unit": "DAY" } }],
        }));
        for (config, wanted, has, lacks) in [
            (
                json!({ "rate_limited_status": { "code": 503 }, "disable_x_envoy_ratelimited_header": true, "enable_retry_after_header": true }),
                503,
                "retry-after: 60\r\n",
                "x-envoy-ratelimited",
            ),
            // What says that nothing is wrong would not stop a client.
            (
                json!({ "rate_limited_status": { "code": 302 } }),
                429,
                "x-envoy-ratelimited: true\r\n",
                "x-ratelimit-",
            ),
            (
                json!({ "enable_retry_after_header": true, "response_headers_to_add": [{ "header": { "key": "x-a", "value": "1" } }] }),
                429,
                "retry-after: 60\r\n",
                "retry-after: 1\r\n",
            ),
        ] {
            let filters = filter(config);
            let (mesh, ..) = start(vec![said.clone()], &[], &filters, &limited()).await;
            let answer = mesh.get("/").await;
            assert_eq!(status(&answer), wanted, "{answer}");
            assert!(answer.contains(has) && !answer.contains(lacks), "{answer}");
        }
        // The least wait is a second.
        let bare =
            say(json!({ "overall_code": "OVER_LIMIT", "statuses": [{ "code": "OVER_LIMIT" }] }));
        let filters = filter(json!({ "enable_retry_after_header": true }));
        let (mesh, ..) = start(vec![bare, over()], &[], &filters, &limited()).await;
        assert!(mesh.get("/").await.contains("retry-after: 1\r\n"));
        assert!(!mesh.get("/").await.contains("retry-after"));
    });
}

#[test]
fn what_may_pass_takes_along_what_the_service_says() {
    run(async {
        let passes = |code: &str| {
            say(json!({
                "overall_code": code,
                "request_headers_to_add": [
                    { "key": "X-Plan", "value": "gold" },
                    { "key": ":path", "value": "/admin" },
                    { "key": "host", "value": "evil" },
                ],
                "response_headers_to_add": [{ "key": "x-left", "value": "3" }],
                "dynamic_metadata": { "tier": "high" },
                "raw_body": "bm8=",
            }))
        };
        let told = json!({ "request_headers_to_add": [
            { "header": { "key": "x-tier", "value": "%DYNAMIC_METADATA(envoy.filters.http.ratelimit:tier)%" } },
            { "header": { "key": "x-own", "value": "%DYNAMIC_METADATA(own:tier)% %DYNAMIC_METADATA(own:old)%" } },
        ] });
        let routes = route("/", json!({ "rate_limits": [limit("all")] }), told);
        let none = json!({ "default_value": { "numerator": 0 } });
        for (code, config, tier, count) in [
            ("OK", json!({}), "x-tier: high\r\n", "ok"),
            // It is over the limit, and that is told alone.
            (
                "OVER_LIMIT",
                json!({ "filter_enforced": none, "metadata_namespace": "own" }),
                "x-own: high kept\r\n",
                "over_limit",
            ),
        ] {
            let noted = json!({
                "@type": format!("{TYPE}.set_metadata.v3.Config"),
                "metadata": [{ "metadata_namespace": "own", "value": { "old": "kept" } }],
            });
            let filters = format!(
                "      - {{name: noted, typed_config: {noted}}}\n{}",
                filter(config)
            );
            let (mesh, _service, origin) =
                start(vec![passes(code)], &[OK], &filters, &routes).await;
            let answer = mesh
                .ask("GET /p HTTP/1.1\r\nHost: h\r\nX-Plan: free\r\nConnection: close\r\n\r\n")
                .await;
            assert!(status(&answer) == 200 && answer.ends_with("ok"), "{answer}");
            assert!(answer.contains("x-left: 3\r\n"), "{answer}");
            assert_eq!(
                answer.contains("x-envoy-ratelimited: true\r\n"),
                count == "over_limit"
            );
            let seen = origin.seen().remove(0);
            assert!(seen.starts_with("GET /p HTTP/1.1\r\nHost: h\r\n"), "{seen}");
            assert!(seen.to_lowercase().contains("x-plan: free\r\n"), "{seen}");
            assert!(
                seen.contains("x-plan: gold\r\n") && seen.contains(tier),
                "{seen}"
            );
            assert!(!seen.contains("evil") && !seen.contains("/admin"), "{seen}");
            let store = &mesh.server.store;
            assert_eq!(store.number(&format!("cluster.a.ratelimit.{count}")), 1);
            assert_eq!(
                store.number("cluster.a.upstream_rq_429"),
                i64::from(count != "ok")
            );
        }
    });
}

#[test]
fn each_descriptor_says_whether_headers_tell_of_it() {
    run(async {
        let with = |key: &str, option: &str| json!({ "actions": [{ "generic_key": { "descriptor_value": key } }], "x_ratelimit_option": option });
        let answer = || {
            say(json!({ "overall_code": "OK", "statuses": [
                { "code": "OK", "limit_remaining": 2, "current_limit": { "requests_per_unit": 10, "unit": "SECOND" }, "duration_until_reset": "1s" },
                { "code": "OK", "limit_remaining": 5, "current_limit": { "requests_per_unit": 99, "unit": "WEEK" } },
            ] }))
        };
        for (first, second, on, wanted) in [
            (
                "UNSPECIFIED",
                "UNSPECIFIED",
                "DRAFT_VERSION_03",
                Some("10, 10;w=1, 99;w=604800"),
            ),
            ("UNSPECIFIED", "OFF", "DRAFT_VERSION_03", Some("10, 10;w=1")),
            ("OFF", "UNSPECIFIED", "DRAFT_VERSION_03", None),
            ("UNSPECIFIED", "UNSPECIFIED", "OFF", None),
            ("DRAFT_VERSION_03", "UNSPECIFIED", "OFF", Some("10, 10;w=1")),
        ] {
            let limits = json!([with("one", first), with("two", second)]);
            let routes = route("/", json!({ "rate_limits": limits }), json!({}));
            let filters = filter(json!({ "enable_x_ratelimit_headers": on }));
            let (mesh, ..) = start(vec![answer()], &[OK], &filters, &routes).await;
            let answer = mesh.get("/").await;
            match wanted {
                Some(limit) => {
                    let all = format!(
                        "x-ratelimit-limit: {limit}\r\nx-ratelimit-remaining: 2\r\nx-ratelimit-reset: 1\r\n"
                    );
                    assert!(answer.contains(&all), "{first} {second} {on}: {answer}");
                }
                None => assert!(
                    !answer.contains("x-ratelimit"),
                    "{first} {second} {on}: {answer}"
                ),
            }
        }
    });
}

#[test]
fn clients_of_grpc_hear_of_it_in_their_way() {
    run(async {
        let refusal = || say(json!({ "overall_code": "OVER_LIMIT", "raw_body": "dG9vIG11Y2g=" }));
        for (exhausted, wanted) in [(false, 14), (true, 8)] {
            let filters = filter(json!({ "rate_limited_as_resource_exhausted": exhausted }));
            let (mesh, ..) = start(vec![refusal()], &[], &filters, &limited()).await;
            let answer = mesh
                .ask("POST /s.S/M HTTP/1.1\r\nHost: h\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .await;
            assert_eq!(status(&answer), 200, "{answer}");
            for line in [
                &*format!("grpc-status: {wanted}\r\n"),
                "grpc-message: too much\r\n",
                "content-type: application/grpc\r\n",
                "x-envoy-ratelimited: true\r\n",
            ] {
                assert!(answer.contains(line), "{line} {answer}");
            }
        }
    });
}
