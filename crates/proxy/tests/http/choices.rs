//! Which host, which protocol and how often: retries, hashes, subsets, rate limits, as routes and clusters ask for them.

use std::sync::Arc;

use outrigger_proxy::{plan::Cluster, server::Change};
use proto::envoy::config;
use testkit::{
    envoy::message,
    frames::{END_HEADERS, END_STREAM, GET, HEADERS},
};
use tokio::{io::AsyncReadExt, net::TcpListener};

use super::{
    http2::Peer,
    support::{Act, Mesh, OK, Origin, run, within},
};

const BUSY: Act = Act::Say("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");

/// An endpoint, with further fields of it.
fn endpoint(origin: &Origin, more: &str) -> String {
    format!(
        "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}{more}}}",
        origin.port
    )
}

/// A mesh whose routes lead to cluster `b` with these localities (items of `endpoints`).
async fn mesh_of(routes: &str, cluster: &str, localities: &[String]) -> Mesh {
    let mesh = Mesh::new(routes, "", "", &[]).await;
    let yaml = format!(
        "name: b\ntype: STATIC\nconnect_timeout: 2s\n{cluster}\nload_assignment: {{cluster_name: b, endpoints: [{}]}}",
        localities.join(", ")
    );
    let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&yaml));
    let change = Change::UpsertCluster(Arc::new(plan.unwrap().into()));
    for result in mesh.server.apply(vec![change]) {
        result.unwrap();
    }
    mesh.server.settled().await;
    mesh
}

/// One locality with these endpoints.
fn locality(endpoints: &[String]) -> String {
    format!("{{lb_endpoints: [{}]}}", endpoints.join(", "))
}

const RETRY: &str = "type.googleapis.com/envoy.extensions.retry";

#[test]
fn retries_go_where_the_predicates_let_them() {
    let previous = format!(
        "{{name: p, typed_config: {{\"@type\": {RETRY}.host.previous_hosts.v3.PreviousHostsPredicate}}}}"
    );
    let canary = format!(
        "{{name: p, typed_config: {{\"@type\": {RETRY}.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate}}}}"
    );
    let metadata = format!(
        "{{name: p, typed_config: {{\"@type\": {RETRY}.host.omit_host_metadata.v3.OmitHostMetadataConfig, \
         metadata_match: {{filter_metadata: {{envoy.lb: {{stage: dark}}}}}}}}}}"
    );
    run(async {
        for (predicate, of_bad, retries) in [
            (&previous, "", 1),
            (
                &canary,
                ", metadata: {filter_metadata: {envoy.lb: {canary: true}}}",
                4,
            ),
            (
                &metadata,
                ", metadata: {filter_metadata: {envoy.lb: {stage: dark}}}",
                4,
            ),
        ] {
            let routes = format!(
                "          - match: {{prefix: /}}\n            route: {{cluster: b, retry_policy: {{retry_on: 5xx, num_retries: {retries}, \
                 retry_back_off: {{base_interval: 0.001s}}, host_selection_retry_max_attempts: 30, retry_host_predicate: [{predicate}]}}}}"
            );
            let (bad, good) = (Origin::new(&[BUSY; 40]).await, Origin::new(&[OK; 20]).await);
            let hosts = [endpoint(&bad, of_bad), endpoint(&good, "")];
            let mesh = mesh_of(&routes, "lb_policy: RANDOM", &[locality(&hosts)]).await;
            for _ in 0..20 {
                let answer = mesh.get("/").await;
                assert!(answer.starts_with("HTTP/1.1 200 "), "{predicate}: {answer}");
            }
            // Only first attempts met the one that is left out.
            assert_eq!(good.seen().len(), 20, "{predicate}");
            assert!(bad.seen().len() <= 20, "{predicate}: {}", bad.seen().len());
        }
    });
}

#[test]
fn a_host_that_refuses_connections_is_avoided_like_one_that_answers_badly() {
    run(async {
        let routes = format!(
            "          - match: {{prefix: /}}\n            route: {{cluster: b, retry_policy: {{retry_on: connect-failure, num_retries: 1, \
             retry_back_off: {{base_interval: 0.001s}}, host_selection_retry_max_attempts: 30, retry_host_predicate: [\
             {{name: p, typed_config: {{\"@type\": {RETRY}.host.previous_hosts.v3.PreviousHostsPredicate}}}}]}}}}"
        );
        // Bound, so that nobody else gets the port, and deaf.
        let deaf = tokio::net::TcpSocket::new_v4().unwrap();
        deaf.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let refusing = format!(
            "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}",
            deaf.local_addr().unwrap().port()
        );
        let good = Origin::new(&[OK; 20]).await;
        let hosts = [refusing, endpoint(&good, "")];
        let mesh = mesh_of(&routes, "lb_policy: RANDOM", &[locality(&hosts)]).await;
        for _ in 0..20 {
            let answer = mesh.get("/").await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
    });
}

#[test]
fn retries_leave_the_priorities_that_were_tried() {
    let policy = format!(
        "retry_priority: {{name: p, typed_config: {{\"@type\": {RETRY}.priority.previous_priorities.v3.PreviousPrioritiesConfig, update_frequency: 1}}}},"
    );
    run(async {
        for (policy, status) in [(&*policy, "200"), ("", "503")] {
            let routes = format!(
                "          - match: {{prefix: /}}\n            route: {{cluster: b, retry_policy: {{retry_on: 5xx, {policy} num_retries: 1, \
                 retry_back_off: {{base_interval: 0.001s}}}}}}"
            );
            let (first, second) = (Origin::new(&[BUSY; 4]).await, Origin::new(&[OK]).await);
            let priorities = [
                locality(&[endpoint(&first, "")]),
                format!("{{priority: 1, lb_endpoints: [{}]}}", endpoint(&second, "")),
            ];
            let mesh = mesh_of(&routes, "", &priorities).await;
            let answer = mesh.get("/").await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{policy}: {answer}"
            );
        }
    });
}

#[test]
fn an_attempt_that_says_nothing_for_too_long_is_tried_again() {
    run(async {
        let routes = "          - match: {prefix: /}
            route: {cluster: a, retry_policy: {retry_on: 5xx, num_retries: 1, per_try_idle_timeout: 0.1s, retry_back_off: {base_interval: 0.001s}}}";
        let origin = Origin::new(&[Act::Hang, OK]).await;
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        let answer = mesh.get("/").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(origin.seen().len(), 2);
        assert!(mesh.log(1).await.ends_with(" via_upstream 2\n"));
    });
}

#[test]
fn a_grpc_client_s_timeout_counts_up_to_the_route_s() {
    run(async {
        for limit in [
            "max_stream_duration: {grpc_timeout_header_max: 0.1s}",
            "max_grpc_timeout: 0.1s",
        ] {
            let routes = format!(
                "          - match: {{prefix: /}}\n            route: {{cluster: a, {limit}}}"
            );
            let origin = Origin::new(&[Act::Hang]).await;
            let mesh = Mesh::new(&routes, "", "", &[("a", origin.port)]).await;
            let request = "POST / HTTP/1.1\r\nHost: h\r\nContent-Type: application/grpc\r\ngrpc-timeout: 1H\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            // An hour is what the client asks for.
            let answer = within(mesh.ask(request)).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{limit}: {answer}");
            let status = answer.split_once("grpc-status: ").expect("it has one").1;
            assert!(!status.starts_with('0'), "{limit}: {answer}");
        }
    });
}

#[test]
fn what_a_hash_is_made_of_chooses_the_host() {
    run(async {
        for (policy, spread) in [
            ("{query_parameter: {name: q}}", true),
            ("{connection_properties: {source_ip: true}}", false),
            (
                "{header: {header_name: x-none}}, {query_parameter: {name: q}}",
                true,
            ),
            (
                "{query_parameter: {name: q}, terminal: true}, {header: {header_name: \":path\"}}",
                true,
            ),
        ] {
            let routes = format!(
                "          - match: {{prefix: /}}\n            route: {{cluster: b, hash_policy: [{policy}]}}"
            );
            let (one, two) = (Origin::new(&[OK; 60]).await, Origin::new(&[OK; 60]).await);
            let hosts = [endpoint(&one, ""), endpoint(&two, "")];
            let mesh = mesh_of(&routes, "lb_policy: RING_HASH", &[locality(&hosts)]).await;
            let mut used = [0, 0];
            for number in 0..16 {
                let before = [one.seen().len(), two.seen().len()];
                for path in ["/first", "/second"] {
                    let answer = mesh.get(&format!("{path}?q={number}")).await;
                    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                }
                let came = [one.seen().len() - before[0], two.seen().len() - before[1]];
                assert!(came == [2, 0] || came == [0, 2], "{policy}: {came:?}");
                used = [used[0] + came[0], used[1] + came[1]];
            }
            assert_eq!(
                used.iter().all(|&used| used > 0),
                spread,
                "{policy}: {used:?}"
            );
        }
    });
}

#[test]
fn a_route_chooses_a_subset_by_its_metadata() {
    run(async {
        let routes = "          - match: {prefix: /two}
            route: {cluster: b, metadata_match: {filter_metadata: {envoy.lb: {stage: two}}}}
          - match: {prefix: /none}
            route: {cluster: b, metadata_match: {filter_metadata: {envoy.lb: {stage: three}}}}
          - match: {prefix: /}
            route:
              weighted_clusters:
                clusters: [{name: b, weight: 1, metadata_match: {filter_metadata: {envoy.lb: {stage: one}}}}]";
        let (one, two) = (Origin::new(&[OK; 9]).await, Origin::new(&[OK; 9]).await);
        let stage = |name: &str| {
            format!(", metadata: {{filter_metadata: {{envoy.lb: {{stage: {name}}}}}}}")
        };
        let hosts = [endpoint(&one, &stage("one")), endpoint(&two, &stage("two"))];
        let subsets =
            "lb_subset_config: {fallback_policy: NO_FALLBACK, subset_selectors: [{keys: [stage]}]}";
        let mesh = mesh_of(routes, subsets, &[locality(&hosts)]).await;
        for path in ["/", "/", "/", "/two", "/two"] {
            let answer = mesh.get(path).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        }
        assert_eq!((one.seen().len(), two.seen().len()), (3, 2));
        let answer = mesh.get("/none").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    });
}

/// The entry's operations come first, and its host is nothing that a route rewrote.
#[test]
fn a_weighted_entry_changes_the_head_before_its_route_does() {
    run(async {
        let routes = "          - match: {prefix: /entry}
            request_headers_to_add: [{header: {key: x-host, value: '%REQ(:authority)%'}}, {header: {key: x-who, value: route}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]
            request_headers_to_remove: [x-envoy-expected-rq-timeout-ms]
            route:
              weighted_clusters:
                clusters: [{name: a, weight: 1, host_rewrite_literal: entry.test, request_headers_to_add: [{header: {key: x-who, value: entry}}]}]
          - match: {prefix: /}
            route:
              host_rewrite_literal: route.test
              weighted_clusters: {clusters: [{name: a, weight: 1, host_rewrite_literal: entry.test}]}";
        let origin = Origin::new(&[OK; 2]).await;
        let mesh = Mesh::new(routes, "", "", &[("a", origin.port)]).await;
        for path in ["/entry", "/"] {
            let answer = mesh.get(path).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        }
        let seen = origin.seen();
        assert!(
            seen[0].contains("Host: entry.test\r\n")
                && seen[0].contains("x-host: entry.test\r\n")
                && seen[0].contains("x-who: route\r\n"),
            "{}",
            seen[0]
        );
        for gone in ["x-envoy-original-host", "x-envoy-expected", "x-who: entry"] {
            assert!(!seen[0].contains(gone), "{gone}: {}", seen[0]);
        }
        assert!(
            seen[1].contains("Host: route.test\r\n")
                && seen[1].contains("x-envoy-original-host: entry.test\r\n"),
            "{}",
            seen[1]
        );
    });
}

#[test]
fn filters_of_the_request_go_by_the_weighted_entry_that_was_drawn() {
    run(async {
        const FAULT: &str =
            "\"@type\": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault";
        let aborts = |status: u16| {
            format!(
                "{{fault: {{{FAULT}, abort: {{http_status: {status}, percentage: {{numerator: 100}}}}}}}}"
            )
        };
        let routes = format!(
            "          - match: {{prefix: /}}
            typed_per_filter_config: {}
            route:
              weighted_clusters:
                clusters: [{{name: a, weight: 1, typed_per_filter_config: {}}}, {{name: a, weight: 0, typed_per_filter_config: {}}}]",
            aborts(411),
            aborts(412),
            aborts(413),
        );
        let filters = format!("      - {{name: fault, typed_config: {{{FAULT}}}}}");
        let mesh = Mesh::new(&routes, "", &filters, &[("a", 1)]).await;
        let answer = mesh.get("/").await;
        assert!(answer.starts_with("HTTP/1.1 412 "), "{answer}");
    });
}

#[test]
fn an_upstream_is_spoken_to_as_the_client_speaks() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let cluster = "typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    use_downstream_protocol_config: {http_protocol_options: {}, http2_protocol_options: {}}";
        let to_a = super::support::TO_A;
        let mesh = Mesh::with(to_a, "", "", &[("a", port)], cluster).await;
        let first_bytes = async {
            let (mut stream, _) = within(listener.accept()).await.unwrap();
            let mut bytes = [0; 14];
            within(stream.read_exact(&mut bytes)).await.unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        tokio::select! {
            answer = mesh.get("/") => panic!("{answer}"),
            bytes = first_bytes => assert_eq!(bytes, "GET / HTTP/1.1"),
        }
        let mut client = Peer::client(&mesh).await;
        client.say(HEADERS, END_HEADERS | END_STREAM, 1, GET).await;
        let (mut stream, _) = within(listener.accept()).await.unwrap();
        let mut bytes = [0; 14];
        within(stream.read_exact(&mut bytes)).await.unwrap();
        assert_eq!(&bytes, b"PRI * HTTP/2.0");
    });
}

#[test]
fn each_action_of_a_rate_limit_makes_its_entry() {
    const PER_ROUTE: &str = "\"@type\": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: limit, \
        filter_enabled: {default_value: {numerator: 100}}, filter_enforced: {default_value: {numerator: 100}}, \
        token_bucket: {max_tokens: 9, fill_interval: 3600s}";
    let cases = [
        ("destination_cluster: {}", "destination_cluster", "a"),
        (
            "query_parameters: {query_parameter_name: q, descriptor_key: k}",
            "k",
            "1",
        ),
        ("remote_address: {}", "remote_address", "127.0.0.1"),
        (
            "masked_remote_address: {v4_prefix_mask_len: 8}",
            "masked_remote_address",
            "127.0.0.0/8",
        ),
        (
            "generic_key: {descriptor_value: v, descriptor_key: own}",
            "own",
            "v",
        ),
        (
            "header_value_match: {descriptor_value: has, headers: [{name: host, present_match: true}]}",
            "header_match",
            "has",
        ),
        (
            "header_value_match: {descriptor_value: lacks, expect_match: false, headers: [{name: x-none, present_match: true}]}",
            "header_match",
            "lacks",
        ),
        (
            "query_parameter_value_match: {descriptor_value: one, query_parameters: [{name: q, string_match: {exact: \"1\"}}]}",
            "query_match",
            "one",
        ),
        (
            "metadata: {descriptor_key: m, source: ROUTE_ENTRY, metadata_key: {key: own, path: [{key: place}]}}",
            "m",
            "here",
        ),
        (
            "dynamic_metadata: {descriptor_key: d, metadata_key: {key: own, path: [{key: place}]}, default_value: nowhere}",
            "d",
            "nowhere",
        ),
    ];
    run(async {
        let routes: Vec<String> = cases
            .iter()
            .enumerate()
            .map(|(index, (action, key, value))| {
                format!(
                    "          - match: {{path: /{index}}}
            metadata: {{filter_metadata: {{own: {{place: here}}}}}}
            route: {{cluster: a, rate_limits: [{{actions: [{{{action}}}]}}]}}
            typed_per_filter_config:
              limit: {{{PER_ROUTE}, descriptors: [{{entries: [{{key: {key}, value: \"{value}\"}}], token_bucket: {{max_tokens: 1, fill_interval: 3600s}}}}]}}"
                )
            })
            .collect();
        let filters = format!("      - name: limit\n        typed_config: {{{PER_ROUTE}}}");
        let origin = Origin::new(&[OK; 20]).await;
        let mesh = Mesh::new(&routes.join("\n"), "", &filters, &[("a", origin.port)]).await;
        for (index, (action, ..)) in cases.iter().enumerate() {
            for status in ["200", "429"] {
                let answer = mesh.get(&format!("/{index}?q=1")).await;
                assert!(
                    answer.starts_with(&format!("HTTP/1.1 {status} ")),
                    "{action}: {answer}"
                );
            }
        }
    });
}

#[test]
fn redirects_that_the_predicates_refuse_are_the_client_s() {
    const REDIRECTS: &str = "type.googleapis.com/envoy.extensions.internal_redirect";
    const AWAY: Act =
        Act::Say("HTTP/1.1 302 Found\r\nLocation: http://h/to\r\nContent-Length: 0\r\n\r\n");
    let route = |predicate: &str| {
        format!(
            "          - match: {{path: /from}}
            name: from
            route: {{cluster: a, internal_redirect_policy: {{max_internal_redirects: 3, redirect_response_codes: [302], predicates: [{predicate}]}}}}
          - match: {{path: /to}}
            name: to
            route: {{cluster: a, internal_redirect_policy: {{max_internal_redirects: 3, redirect_response_codes: [302], predicates: [{predicate}]}}}}"
        )
    };
    let allowed = |name: &str| {
        format!(
            "{{name: p, typed_config: {{\"@type\": {REDIRECTS}.allow_listed_routes.v3.AllowListedRoutesConfig, allowed_route_names: [{name}]}}}}"
        )
    };
    let previous = format!(
        "{{name: p, typed_config: {{\"@type\": {REDIRECTS}.previous_routes.v3.PreviousRoutesConfig}}}}"
    );
    run(async {
        for (predicate, acts, status, requests) in [
            (allowed("to"), &[AWAY, OK][..], "200", 2),
            (allowed("from"), &[AWAY, OK], "302", 1),
            // To itself the second time.
            (previous, &[AWAY, AWAY, OK], "302", 2),
        ] {
            let origin = Origin::new(acts).await;
            let mesh = Mesh::new(&route(&predicate), "", "", &[("a", origin.port)]).await;
            let answer = mesh.get("/from").await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{predicate}: {answer}"
            );
            assert_eq!(origin.seen().len(), requests, "{predicate}");
        }
    });
}
