//! `envoy.filters.http.ratelimit` as clients, origins and rate limit services see it.

use std::time::Duration;

use outrigger_proxy::plan::Listener;
use proto::envoy::{
    config::listener::v3 as pb,
    service::ratelimit::v3::{RateLimitRequest, RateLimitResponse},
};
use serde_json::{Value, json};
use testkit::rate_limit::{Act as Judge, Service};
use tokio::io::AsyncWriteExt;

use crate::support::{Act, Mesh, OK, Origin, run, within};

const TYPE: &str = "type.googleapis.com/envoy.extensions.filters.http";

/// The filter `limit`, with these fields beside those that it needs.
fn filter(more: Value) -> String {
    named("limit", more)
}

fn named(name: &str, more: Value) -> String {
    let mut config = json!({
        "@type": format!("{TYPE}.ratelimit.v3.RateLimit"),
        "domain": "shop",
        "timeout": "10s",
        "rate_limit_service": {
            "grpc_service": { "envoy_grpc": { "cluster_name": "limits-h2" } },
            "transport_api_version": "V3",
        },
    });
    let fields = config.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("one").clone());
    fields.retain(|_, value| !value.is_null());
    format!("      - {{name: {name}, typed_config: {config}}}")
}

/// A route for a prefix with these members of its action, and these of its own.
fn route(prefix: &str, action: Value, more: Value) -> String {
    let mut all = json!({ "cluster": "a" });
    let fields = all.as_object_mut().expect("an object");
    fields.extend(action.as_object().expect("one").clone());
    fields.retain(|_, value| !value.is_null());
    let mut route = json!({ "match": { "prefix": prefix }, "route": all });
    let fields = route.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("one").clone());
    format!("          - {route}\n")
}

/// Every request is one of `key`.
fn limit(key: &str) -> Value {
    json!({ "actions": [{ "generic_key": { "descriptor_value": key } }] })
}

/// A route of all requests with one limit.
fn limited() -> String {
    route("/", json!({ "rate_limits": [limit("all")] }), json!({}))
}

fn per_route(config: Value) -> Value {
    let mut config = config;
    config["@type"] = format!("{TYPE}.ratelimit.v3.RateLimitPerRoute").into();
    json!({ "typed_per_filter_config": { "limit": config } })
}

fn say(answer: Value) -> Judge {
    let answer: RateLimitResponse = proto::json::from_value(&answer).expect("canonical JSON");
    Judge::Say(Box::new(answer))
}

fn fine() -> Judge {
    say(json!({ "overall_code": "OK" }))
}

fn over() -> Judge {
    say(json!({ "overall_code": "OVER_LIMIT" }))
}

fn status(answer: &str) -> u16 {
    answer[9..12].parse().expect("a status")
}

/// The descriptors of a question as `key=value` with `,` between entries.
fn descriptors(asked: &RateLimitRequest) -> Vec<String> {
    let one = |entries: &[_]| {
        let each = entries.iter().map(
            |e: &proto::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::Entry| {
                format!("{}={}", e.key, e.value)
            },
        );
        each.collect::<Vec<_>>().join(",")
    };
    asked.descriptors.iter().map(|d| one(&d.entries)).collect()
}

async fn asked(service: &Service, times: usize) -> Vec<RateLimitRequest> {
    within(async {
        while service.seen().len() < times {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    service.seen()
}

/// A proxy in front of an origin, with a service of this script.
async fn start(
    script: Vec<Judge>,
    origin: &[Act],
    filters: &str,
    routes: &str,
) -> (Mesh, Service, Origin) {
    let (service, address) = Service::start(script).await;
    let origin = Origin::new(origin).await;
    let clusters = [("a", origin.port), ("limits-h2", address.port())];
    let mesh = Mesh::new(routes, "", filters, &clusters).await;
    (mesh, service, origin)
}

#[test]
fn the_service_is_asked_by_the_descriptors_of_the_route() {
    run(async {
        let limits = json!([
            { "actions": [
                { "request_headers": { "header_name": "x-user", "descriptor_key": "user" } },
                { "request_headers": { "header_name": ":path", "descriptor_key": "PATH" } },
                { "remote_address": {} },
                { "destination_cluster": {} },
            ] },
            { "actions": [{ "request_headers": { "header_name": "x-none", "descriptor_key": "none" } }] },
            { "stage": 1, "actions": [{ "generic_key": { "descriptor_value": "later" } }] },
            { "actions": [{ "generic_key": { "descriptor_value": "fixed" } }],
              "limit": { "rate_limit": { "requests_per_unit": 7, "unit": "HOUR" } } },
            { "actions": [{ "generic_key": { "descriptor_value": "noted" } }],
              "limit": { "dynamic_metadata": { "metadata_key": { "key": "own", "path": [{ "key": "good" }] } } } },
            { "actions": [{ "generic_key": { "descriptor_value": "wrong" } }],
              "limit": { "dynamic_metadata": { "metadata_key": { "key": "own", "path": [{ "key": "bad" }] } } } },
            { "actions": [{ "generic_key": { "descriptor_value": "many" } }], "hits_addend": { "number": 5 } },
            { "actions": [{ "generic_key": { "descriptor_value": "said" } }],
              "hits_addend": { "format": "%REQ(x-cost)%", "is_negative_hits": true } },
            { "actions": [{ "generic_key": { "descriptor_value": "unsaid" } }],
              "hits_addend": { "format": "%REQ(x-none)%" } },
            { "actions": [{ "request_headers": { "header_name": "x-none", "descriptor_key": "none", "skip_if_absent": true } }] },
        ]);
        let weighted = json!({ "clusters": [{ "name": "a", "weight": 1 }] });
        let routes = route(
            "/",
            json!({ "cluster": null, "weighted_clusters": weighted, "rate_limits": limits }),
            json!({}),
        );
        let noted = json!({
            "@type": format!("{TYPE}.set_metadata.v3.Config"),
            "metadata": [{ "metadata_namespace": "own", "value": {
                "good": { "requests_per_unit": 42, "unit": "MINUTE" },
                "bad": { "requests_per_unit": 42, "unit": "FORTNIGHT" },
            } }],
        });
        let state = json!({
            "@type": format!("{TYPE}.set_filter_state.v3.Config"),
            "on_request_headers": [{
                "object_key": "envoy.ratelimit.hits_addend",
                "format_string": { "text_format_source": { "inline_string": "%REQ(x-all)%" } },
            }],
        });
        let filters = format!(
            "      - {{name: noted, typed_config: {noted}}}\n      - {{name: state, typed_config: {state}}}\n{}",
            filter(json!({}))
        );
        let (mesh, service, origin) = start(vec![fine()], &[OK], &filters, &routes).await;
        let request = "GET /p?q=1 HTTP/1.1\r\nHost: h\r\nX-User: bob\r\nX-Cost: 2.9\r\nX-All: 3\r\nConnection: close\r\n\r\n";
        assert_eq!(status(&mesh.ask(request).await), 200);
        assert_eq!(origin.seen().len(), 1);
        let asked = service.seen().remove(0);
        assert_eq!((&*asked.domain, asked.hits_addend), ("shop", 3));
        let entries = descriptors(&asked);
        let wanted = [
            "user=bob,PATH=/p?q=1,remote_address=127.0.0.1,destination_cluster=a",
            "generic_key=fixed",
            "generic_key=noted",
            "generic_key=wrong",
            "generic_key=many",
            "generic_key=said",
            "",
        ];
        assert_eq!(entries, wanted);
        let limits: Vec<_> = asked
            .descriptors
            .iter()
            .map(|d| {
                d.limit
                    .map(|l| (l.requests_per_unit, l.unit().as_str_name()))
            })
            .collect();
        let none = None;
        let noted = Some((42, "MINUTE"));
        assert_eq!(
            limits,
            [none, Some((7, "HOUR")), noted, none, none, none, none]
        );
        let hits: Vec<_> = asked
            .descriptors
            .iter()
            .map(|d| (d.hits_addend, d.is_negative_hits))
            .collect();
        let plain = (None, false);
        assert_eq!(
            hits,
            [
                plain,
                plain,
                plain,
                plain,
                (Some(5), false),
                (Some(2), true),
                plain
            ]
        );
        let store = &mesh.server.store;
        assert_eq!(store.number("cluster.a.ratelimit.ok"), 1);
        assert_eq!(store.number("cluster.limits-h2.upstream_rq_200"), 1);
    });
}

#[test]
fn values_of_descriptors_are_formats_where_the_switch_says_so() {
    run(async {
        let value = |value: &str| {
            let filled = json!({ "descriptor_value": value, "default_value": "none" });
            let matched = |name: &str, matchers: Value| {
                let mut action = filled.clone();
                action[name] = matchers;
                action
            };
            let headers = json!([{ "name": "host", "present_match": true }]);
            let query = json!([{ "name": "q", "string_match": { "exact": "1" } }]);
            let ranges = json!({ "ranges": [{ "address_prefix": "127.0.0.0", "prefix_len": 8 }] });
            let actions = [
                json!({ "generic_key": filled }),
                json!({ "header_value_match": matched("headers", headers) }),
                json!({ "query_parameter_value_match": matched("query_parameters", query) }),
                // This one came later, and is a format in any case.
                json!({ "remote_address_match": matched("address_matcher", ranges) }),
            ];
            let actions = if value == "100%" {
                &actions[..3]
            } else {
                &actions
            };
            json!({ "actions": actions })
        };
        let limits = json!([
            value("%REQ(x-user)%"),
            value("a%%b"),
            value("%REQ(x-none)%"),
            value("100%")
        ]);
        let routes = route("/", json!({ "rate_limits": limits }), json!({}));
        let entries = |own: &str, last: &str| {
            let last = match last {
                "" => String::new(),
                last => format!(",remote_address_match={last}"),
            };
            format!("generic_key={own},header_match={own},query_match={own}{last}")
        };
        for (switch, wanted) in [
            (
                "false",
                [
                    entries("%REQ(x-user)%", "bob"),
                    entries("a%%b", "a%b"),
                    entries("%REQ(x-none)%", "none"),
                    entries("100%", ""),
                ],
            ),
            (
                "true",
                [
                    entries("bob", "bob"),
                    entries("a%b", "a%b"),
                    entries("none", "none"),
                    entries("100%", ""),
                ],
            ),
        ] {
            let (service, address) = Service::start(vec![over()]).await;
            let runtime = format!(
                "envoy.reloadable_features.enable_formatter_for_ratelimit_action_descriptor_value: {switch}"
            );
            let clusters = [("a", 1), ("limits-h2", address.port())];
            let filters = filter(json!({}));
            let mesh = Mesh::with_runtime(&routes, &filters, &runtime, &clusters).await;
            let answer = mesh
                .ask("GET /?q=1 HTTP/1.1\r\nHost: h\r\nX-User: bob\r\nConnection: close\r\n\r\n")
                .await;
            assert_eq!(status(&answer), 429, "{answer}");
            assert_eq!(descriptors(&service.seen()[0]), wanted, "{switch}");
        }
    });
}

#[test]
fn a_request_without_descriptors_is_not_asked_about() {
    run(async {
        let header = json!({ "actions": [{ "request_headers": { "header_name": "x-none", "descriptor_key": "k" } }] });
        let routes = route("/one", json!({ "rate_limits": [header] }), json!({}))
            + &route("/", json!({}), json!({}));
        let (mesh, service, _origin) = start(vec![], &[OK; 2], &filter(json!({})), &routes).await;
        for path in ["/one", "/two"] {
            assert_eq!(status(&mesh.get(path).await), 200, "{path}");
        }
        assert!(service.seen().is_empty());
    });
}

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
fn a_service_that_fails_lets_pass_unless_it_may_not() {
    run(async {
        let all = json!({ "default_value": { "numerator": 100 } });
        let none = json!({ "default_value": { "numerator": 0 } });
        let nobody = json!({
            "grpc_service": { "envoy_grpc": { "cluster_name": "nobody" } },
        });
        for (config, script, wanted) in [
            (json!({}), Judge::Fail(14), 200),
            (json!({ "rate_limit_service": nobody }), fine(), 200),
            (json!({ "timeout": "0.1s" }), Judge::Hang, 200),
            (json!({ "failure_mode_deny": true }), Judge::Fail(8), 500),
            (
                json!({ "failure_mode_deny": true, "status_on_error": { "code": 503 } }),
                Judge::Fail(8),
                503,
            ),
            (
                json!({ "failure_mode_deny": true, "failure_mode_deny_percent": none }),
                Judge::Fail(2),
                200,
            ),
            (
                json!({ "failure_mode_deny_percent": all, "timeout": "0.1s" }),
                Judge::Hang,
                500,
            ),
            (
                json!({ "failure_mode_deny": true, "rate_limit_service": nobody }),
                fine(),
                500,
            ),
        ] {
            let text = config.to_string();
            let (mesh, _service, origin) =
                start(vec![script], &[OK], &filter(config), &limited()).await;
            let answer = mesh.get("/").await;
            assert_eq!(status(&answer), wanted, "{text}: {answer}");
            let store = &mesh.server.store;
            assert_eq!(store.number("cluster.a.ratelimit.error"), 1, "{text}");
            let passed = wanted == 200;
            assert_eq!(
                store.number("cluster.a.ratelimit.failure_mode_allowed"),
                i64::from(passed)
            );
            assert_eq!(origin.seen().len(), usize::from(passed));
            assert!(!answer.contains("x-envoy-ratelimited"), "{answer}");
            if !passed {
                let line = format!("GET / {wanted} RLSE rate_limiter_error 0\n");
                assert_eq!(mesh.log(1).await, line, "{text}");
            }
        }
    });
}

#[test]
fn answers_that_are_none_count_as_failures() {
    run(async {
        // It is no HTTP/2 at all, or takes the connection and says nothing: the default is to wait 20 ms.
        for act in [
            Act::SayAndClose("HTTP/1.1 200 OK\r\n\r\n"),
            Act::Close,
            Act::Hang,
        ] {
            let (origin, limits) = (Origin::new(&[OK]).await, Origin::new(&[act]).await);
            let clusters = [("a", origin.port), ("limits-h2", limits.port)];
            let filters = filter(json!({ "timeout": null, "failure_mode_deny": true }));
            let mesh = Mesh::new(&limited(), "", &filters, &clusters).await;
            assert_eq!(status(&mesh.get("/").await), 500);
            assert_eq!(mesh.log(1).await, "GET / 500 RLSE rate_limiter_error 0\n");
            assert!(origin.seen().is_empty());
        }
    });
}

#[test]
fn a_client_that_goes_away_takes_its_question_along() {
    run(async {
        let at_end = json!({ "actions": [{ "generic_key": { "descriptor_value": "end" } }], "apply_on_stream_done": true });
        let routes = route(
            "/",
            json!({ "rate_limits": [limit("all"), at_end] }),
            json!({}),
        );
        let script = vec![Judge::Hang, fine(), fine()];
        let filters = filter(json!({ "timeout": "0s" }));
        let (mesh, service, origin) = start(script, &[OK], &filters, &routes).await;
        let mut stream = mesh.connect().await;
        let request = b"GET /1 HTTP/1.1\r\nHost: h\r\n\r\n";
        stream.write_all(request).await.expect("it is open");
        asked(&service, 1).await;
        drop(stream);
        let log = mesh.log(1).await;
        assert!(log.starts_with("GET /1 0 DC "), "{log}");
        assert_eq!(status(&mesh.get("/2").await), 200);
        assert_eq!(origin.seen().len(), 1);
        // Nothing was asked at the end of the request that had no answer.
        let asked: Vec<_> = asked(&service, 3)
            .await
            .iter()
            .flat_map(descriptors)
            .collect();
        assert_eq!(
            asked,
            ["generic_key=all", "generic_key=all", "generic_key=end"]
        );
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

#[test]
fn routes_and_filters_say_which_limits_count() {
    let vh = |option: &str| per_route(json!({ "vh_rate_limits": option }));
    let own = per_route(json!({ "rate_limits": [limit("own")], "domain": "other" }));
    let limits = |list: &[&str]| -> Value {
        let each = list.iter().map(|key| limit(key));
        json!({ "rate_limits": each.collect::<Vec<_>>() })
    };
    let included = json!({ "rate_limits": [limit("r")], "include_vh_rate_limits": true });
    let routes = [
        route("/bare", json!({}), json!({})),
        route("/override", limits(&["r"]), json!({})),
        route("/include", limits(&["r"]), vh("INCLUDE")),
        route("/ignore", json!({}), vh("IGNORE")),
        route("/forced", included, vh("IGNORE")),
        route("/own", limits(&["r"]), own),
        route(
            "/off",
            limits(&["r"]),
            json!({ "typed_per_filter_config": { "limit": {
            "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": true,
        } } }),
        ),
    ]
    .concat();
    // The rate limits of the virtual host stand behind its routes.
    let routes = format!("{routes}          rate_limits: [{}]", limit("vh"));
    run(async {
        for (config, cases) in [
            (
                json!({}),
                [
                    ("/bare", "shop: generic_key=vh"),
                    ("/override", "shop: generic_key=r"),
                    ("/include", "shop: generic_key=r generic_key=vh"),
                    ("/ignore", ""),
                    ("/forced", "shop: generic_key=r generic_key=vh"),
                    ("/own", "other: generic_key=own"),
                    ("/off", ""),
                ],
            ),
            (
                // The filter's own have no stage.
                json!({ "rate_limits": [limit("filter")], "stage": 2 }),
                [
                    ("/bare", "shop: generic_key=filter"),
                    ("/override", "shop: generic_key=filter"),
                    ("/include", "shop: generic_key=filter"),
                    ("/ignore", "shop: generic_key=filter"),
                    ("/forced", "shop: generic_key=filter"),
                    ("/own", "other: generic_key=own"),
                    ("/off", ""),
                ],
            ),
        ] {
            let script = vec![fine(); 7];
            let (mesh, service, _origin) = start(script, &[OK; 7], &filter(config), &routes).await;
            for (path, wanted) in cases {
                let before = service.seen().len();
                assert_eq!(status(&mesh.get(path).await), 200, "{path}");
                let told = service.seen().split_off(before);
                let told: Vec<_> = told
                    .iter()
                    .map(|asked| format!("{}: {}", asked.domain, descriptors(asked).join(" ")))
                    .collect();
                assert_eq!(told.join("; "), wanted, "{path}");
            }
        }
    });
}

#[test]
fn an_entry_of_weighted_clusters_says_it_too() {
    run(async {
        let config = per_route(json!({ "domain": "canary" }));
        let weighted = json!({ "clusters": [{ "name": "a", "weight": 1, "typed_per_filter_config": config["typed_per_filter_config"] }] });
        let action =
            json!({ "cluster": null, "weighted_clusters": weighted, "rate_limits": [limit("r")] });
        let routes = route("/", action, json!({}));
        let (mesh, service, _origin) = start(vec![over()], &[], &filter(json!({})), &routes).await;
        assert_eq!(status(&mesh.get("/").await), 429);
        assert_eq!(service.seen().remove(0).domain, "canary");
        let store = &mesh.server.store;
        assert_eq!(store.number("cluster.a.ratelimit.over_limit"), 1);
    });
}

#[test]
fn only_requests_of_a_kind_and_a_share_are_asked_about() {
    run(async {
        let none = json!({ "default_value": { "numerator": 0 } });
        // Whoever calls from this machine is internal where its own address says so.
        let options = "use_remote_address: true\n      internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}";
        for (config, options, wanted) in [
            (json!({ "request_type": "internal" }), options, 429),
            (json!({ "request_type": "external" }), options, 200),
            (json!({ "request_type": "both" }), options, 429),
            (json!({ "request_type": "internal" }), "", 200),
            (json!({ "request_type": "external" }), "", 429),
            (json!({ "filter_enabled": none }), "", 200),
        ] {
            let text = config.to_string();
            let (_service, address) = Service::start(vec![over()]).await;
            let origin = Origin::new(&[OK]).await;
            let clusters = [("a", origin.port), ("limits-h2", address.port())];
            let mesh = Mesh::new(&limited(), options, &filter(config), &clusters).await;
            let answer = mesh.get("/").await;
            assert_eq!(status(&answer), wanted, "{text} {options}: {answer}");
        }
    });
}

#[test]
fn limits_of_the_end_are_asked_for_when_the_request_is_over() {
    run(async {
        let at_end = |key: &str| {
            json!({
                "actions": [{ "generic_key": { "descriptor_value": key } }],
                "apply_on_stream_done": true,
                "hits_addend": { "format": "%RESP(x-cost)%" },
            })
        };
        let redirects = json!({ "max_internal_redirects": 1, "redirect_response_codes": [302] });
        let from =
            json!({ "rate_limits": [at_end("from")], "internal_redirect_policy": redirects });
        let own = per_route(json!({ "rate_limits": [limit("now"), at_end("own")] }));
        let routes = route("/from", from, json!({})) + &route("/", json!({}), own);
        let origin = [
            Act::Say("HTTP/1.1 200 OK\r\nX-Cost: 17\r\nContent-Length: 0\r\n\r\n"),
            Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
            Act::Say("HTTP/1.1 302 Found\r\nLocation: http://h/to\r\nContent-Length: 0\r\n\r\n"),
            Act::Say("HTTP/1.1 200 OK\r\nX-Cost: 4\r\nContent-Length: 0\r\n\r\n"),
        ];
        // What is said at the end is too late for anybody.
        let script = vec![fine(), over(), fine(), fine(), over(), over()];
        let (mesh, service, _origin) = start(script, &origin, &filter(json!({})), &routes).await;
        let told = |asked: &RateLimitRequest| {
            let hits: Vec<_> = asked.descriptors.iter().map(|d| d.hits_addend).collect();
            (descriptors(asked).join(" "), hits)
        };
        assert_eq!(status(&mesh.get("/").await), 200);
        let all: Vec<_> = asked(&service, 2).await.iter().map(told).collect();
        assert_eq!(
            all,
            [
                ("generic_key=now".to_owned(), vec![None]),
                ("generic_key=own".to_owned(), vec![Some(17)])
            ]
        );
        // Without a cost there is nothing to count.
        assert_eq!(status(&mesh.get("/").await), 200);
        // A redirect that is followed here leads through both routes.
        assert_eq!(status(&mesh.get("/from").await), 200);
        let all: Vec<_> = asked(&service, 6).await.iter().skip(2).map(told).collect();
        let mut end = all[2..].to_vec();
        end.sort();
        assert_eq!(all[0].0, "generic_key=now");
        assert_eq!(all[1].0, "generic_key=now");
        assert_eq!(
            end,
            [
                ("generic_key=from".to_owned(), vec![Some(4)]),
                ("generic_key=own".to_owned(), vec![Some(4)])
            ]
        );
    });
}

#[test]
fn several_filters_of_a_chain_ask_for_themselves() {
    run(async {
        let limits = json!([limit("zero"), { "stage": 1, "actions": [{ "generic_key": { "descriptor_value": "one" } }] }]);
        let routes = route("/", json!({ "rate_limits": limits }), json!({}));
        let first = named("limit", json!({ "stat_prefix": "first" }));
        let second = named(
            "second",
            json!({ "stat_prefix": "second", "stage": 1, "domain": "d2" }),
        );
        let tell = |value: &str| {
            say(
                json!({ "overall_code": "OK", "response_headers_to_add": [{ "key": "x-l", "value": value }] }),
            )
        };
        let script = vec![tell("1"), tell("2"), tell("1"), over()];
        let filters = format!("{first}\n{second}");
        let (mesh, service, _origin) = start(script, &[OK], &filters, &routes).await;
        let answer = mesh.get("/").await;
        assert!(
            answer.contains("x-l: 1\r\n") && answer.contains("x-l: 2\r\n"),
            "{answer}"
        );
        assert_eq!(answer.matches("x-l: ").count(), 2, "{answer}");
        let answer = mesh.get("/").await;
        assert_eq!(status(&answer), 429);
        assert_eq!(answer.matches("x-l: 1\r\n").count(), 1, "{answer}");
        let told: Vec<_> = service.seen().iter().map(|a| a.domain.clone()).collect();
        assert_eq!(told, ["shop", "d2", "shop", "d2"]);
        let store = &mesh.server.store;
        for (name, count) in [
            ("first.ok", 2),
            ("second.ok", 1),
            ("second.over_limit", 1),
            ("ok", 0),
        ] {
            let full = format!("cluster.a.ratelimit.{name}");
            assert_eq!(store.number(&full), count, "{name}");
        }
    });
}

#[test]
fn what_is_wrong_is_named_by_its_field() {
    const FILTER: &str = "filter_chains[0].filters[0].typed_config.http_filters[0].typed_config.";
    let service = |more: Value| json!({ "rate_limit_service": more });
    let grpc = json!({ "envoy_grpc": { "cluster_name": "c" } });
    let google = json!({ "google_grpc": { "target_uri": "t", "stat_prefix": "s" } });
    let own = |more: Value| {
        let mut limit = limit("k");
        limit
            .as_object_mut()
            .expect("an object")
            .extend(more.as_object().expect("one").clone());
        json!({ "rate_limits": [limit] })
    };
    let many: Vec<Value> = (0..11)
        .map(|n| json!({ "header": { "key": format!("x-{n}"), "value": "v" } }))
        .collect();
    for (config, field) in [
        (json!({ "domain": null }), "domain: is required"),
        (json!({ "stage": 11 }), "stage: must be"),
        (
            json!({ "request_type": "all" }),
            "request_type: must be one of",
        ),
        (service(Value::Null), "rate_limit_service: is required"),
        (
            service(json!({})),
            "rate_limit_service.grpc_service: is required",
        ),
        (
            service(json!({ "grpc_service": {} })),
            "rate_limit_service.grpc_service: needs envoy_grpc",
        ),
        (
            service(json!({ "grpc_service": google })),
            "rate_limit_service.grpc_service.google_grpc: is not implemented",
        ),
        (
            service(json!({ "grpc_service": grpc, "transport_api_version": "V2" })),
            "rate_limit_service.transport_api_version: must be V3",
        ),
        (
            json!({ "rate_limited_status": { "code": 299 } }),
            "rate_limited_status.code: must be",
        ),
        (
            json!({ "rate_limited_status": {} }),
            "rate_limited_status.code: must be",
        ),
        (
            json!({ "status_on_error": { "code": 101 } }),
            "status_on_error.code: must be",
        ),
        (
            json!({ "status_on_error": { "code": 100 } }),
            "status_on_error.code: must be",
        ),
        (
            json!({ "enable_x_ratelimit_headers": 7 }),
            "enable_x_ratelimit_headers: 7 is not",
        ),
        (
            json!({ "response_headers_to_add": many }),
            "response_headers_to_add: must not have more than 10",
        ),
        (own(json!({ "stage": 1 })), "rate_limits[0].stage: is for"),
        (
            own(json!({ "disable_key": "k" })),
            "rate_limits[0].disable_key: is for",
        ),
        (
            own(json!({ "hits_addend": {} })),
            "rate_limits[0].hits_addend: needs one of",
        ),
        (
            own(json!({ "hits_addend": { "number": 1_000_000_001_u64 } })),
            "rate_limits[0].hits_addend.number: must be at most",
        ),
        (
            own(json!({ "hits_addend": { "format": "1%REQ(x)%" } })),
            "rate_limits[0].hits_addend.format: must be one operator",
        ),
        (
            own(json!({ "limit": {} })),
            "rate_limits[0].limit: needs one of",
        ),
        (
            own(json!({ "x_ratelimit_option": 9 })),
            "rate_limits[0].x_ratelimit_option: 9 is not",
        ),
    ] {
        let error = refused(&filter(config), "{prefix: /}");
        assert!(
            error.contains(&format!("{FILTER}{field}")),
            "{field}: {error}"
        );
    }
    let route = format!(
        "{{prefix: /}}, typed_per_filter_config: {{limit: {{\"@type\": {TYPE}.ratelimit.v3.RateLimitPerRoute, override_option: IGNORE_POLICY}}}}"
    );
    let error = refused(&filter(json!({})), &route);
    assert!(
        error.contains("typed_per_filter_config[\"limit\"].override_option: is not implemented"),
        "{error}"
    );
}

/// Why a listener with this filter and this match of a route is refused.
fn refused(filter: &str, matches: &str) -> String {
    let filter = filter.trim_start().trim_start_matches("- ");
    let yaml = format!(
        "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}, filter_chains: [{{filters: [{{name: hcm, typed_config: {{\
         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: s, \
         route_config: {{name: r, virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {matches}, direct_response: {{status: 200}}}}]}}]}}, \
         http_filters: [{filter}, {{name: router, typed_config: {{\"@type\": {TYPE}.router.v3.Router}}}}]}}}}]}}]}}"
    );
    let message = testkit::envoy::message::<pb::Listener>(&yaml);
    match Listener::try_from(&message) {
        Ok(_) => String::new(),
        Err(errors) => errors.to_string(),
    }
}
