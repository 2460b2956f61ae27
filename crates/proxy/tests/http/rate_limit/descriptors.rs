//! What the service is asked, and when.

use super::*;

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
