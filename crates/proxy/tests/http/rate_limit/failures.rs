//! Services that fail, clients that go away, and configurations that are wrong.

use super::*;

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
