//! `envoy.filters.network.ratelimit` as clients and rate limit services see it.

use super::{
    tcp::{chain, tcp_proxy, type_url},
    *,
};

/// Of a cluster that speaks gRPC.
const H2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";

live! {
    async fn a_rate_limit_service_counts_connections() {
        use testkit::rate_limit::{Act, Service};
        let say = |code: &str| {
            let answer = proto::json::from_value(&serde_json::json!({ "overall_code": code, "dynamic_metadata": { "tier": code } }));
            Act::Say(Box::new(answer.expect("canonical JSON")))
        };
        let script = vec![say("OK"), say("OVER_LIMIT"), Act::Fail(14), Act::Fail(14), Act::Hang];
        let (service, address) = Service::start(script).await;
        let logs = tempfile::tempdir().expect("a folder");
        let log = logs.path().join("log");
        let logged = format!(
            ", access_log: [{{name: f, typed_config: {{{}, path: {log:?}, log_format: {{text_format_source: {{inline_string: \"%DYNAMIC_METADATA(envoy.filters.network.ratelimit:tier)% %CONNECTION_TERMINATION_DETAILS%\\n\"}}}}}}}}]",
            type_url("access_loggers.file.v3.FileAccessLog")
        );
        let limit = |more: &str| format!(
            ", stat_prefix: {more}, rate_limit_service: {{transport_api_version: V3, grpc_service: {{envoy_grpc: {{cluster_name: limits}}}}}}, domain: d, descriptors: [\
             {{entries: [{{key: ip, value: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%'}}, {{key: sni, value: 'is %REQUESTED_SERVER_NAME%'}}], \
             limit: {{requests_per_unit: 3, unit: MINUTE, unit_multiplier: 5}}, hits_addend: 2, is_negative_hits: true}}, {{entries: [{{key: all}}]}}]"
        );
        let port = origin("a").await;
        let (name, config) = tcp_proxy("a", &logged);
        let chains = |config_of_limit: &str| chain(&[
            ("ratelimit.v3.RateLimit", config_of_limit),
            (name, &config),
        ]);
        let server = server(1);
        apply(&server, vec![
            static_cluster("limits", &[address.port()], H2),
            static_cluster("a", &[port], ""),
            tcp_listener("open", 0, &chains(&limit("open, timeout: 10s")), ""),
            tcp_listener("strict", 0, &chains(&limit("strict, timeout: 10s, failure_mode_deny: true")), ""),
            // By default it is waited for 20 ms.
            tcp_listener("short", 0, &chains(&limit("short, failure_mode_deny: true")), ""),
        ]).await;
        for (listener, wanted, counts) in [
            ("open", "a", &["open.ok"][..]),
            ("open", "", &["open.over_limit", "open.cx_closed"]),
            ("open", "a", &["open.error", "open.failure_mode_allowed"]),
            ("strict", "", &["strict.error", "strict.cx_closed"]),
            ("short", "", &["short.error", "short.cx_closed"]),
        ] {
            let mut stream = connect(&server, listener).await;
            // A refused connection may be gone already.
            let _ = stream.shutdown().await;
            let said = rest(&mut stream).await.unwrap_or_default();
            assert_eq!(said, wanted.as_bytes(), "{listener} {counts:?}");
            for count in counts {
                stat(&server, &format!("ratelimit.{count}"), 1).await;
            }
        }
        stat(&server, "ratelimit.open.total", 3).await;
        stat(&server, "ratelimit.open.active", 0).await;
        let asked = service.seen().remove(0);
        assert_eq!((&*asked.domain, asked.descriptors.len()), ("d", 2));
        let first = &asked.descriptors[0];
        let entries: Vec<_> = first.entries.iter().map(|e| (&*e.key, &*e.value)).collect();
        assert_eq!(entries, [("ip", "127.0.0.1"), ("sni", "is -")]);
        let limit = first.limit.expect("a limit");
        assert_eq!((limit.requests_per_unit, limit.unit().as_str_name(), limit.unit_multiplier), (3, "MINUTE", Some(5)));
        assert_eq!((first.hits_addend, first.is_negative_hits), (Some(2), true));
        assert_eq!(asked.descriptors[1].entries[0].value, "");
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        server.shut_down();
        let lines = std::fs::read_to_string(&log).expect("it was written");
        assert_eq!(
            lines,
            "OK -\nOVER_LIMIT ratelimit_close_over_limit\n- -\n- ratelimit_error_failure_mode_connection_close\n- ratelimit_error_failure_mode_connection_close\n"
        );
    }
    async fn a_chain_that_follows_counts_no_connection_again() {
        use testkit::{authorization, rate_limit};
        let fine = |value| proto::json::from_value(&value).expect("canonical JSON");
        let once = fine(serde_json::json!({ "overall_code": "OK" }));
        let (limits, limits_at) = rate_limit::Service::start(vec![rate_limit::Act::Say(Box::new(once))]).await;
        let pass = proto::json::from_value(&serde_json::json!({ "status": { "code": 0 } })).expect("canonical JSON");
        let (authz, authz_at) = authorization::Service::start(vec![authorization::Act::Say(Box::new(pass))]).await;
        let limit = ("ratelimit.v3.RateLimit", ", stat_prefix: p, timeout: 10s, failure_mode_deny: true, rate_limit_service: {grpc_service: {envoy_grpc: {cluster_name: limits}}}, domain: d, descriptors: [{entries: [{key: k, value: v}]}]");
        let ask = ("ext_authz.v3.ExtAuthz", ", stat_prefix: tcp, grpc_service: {timeout: 10s, envoy_grpc: {cluster_name: authz}}");
        let port = origin("a").await;
        let (name, config) = tcp_proxy("a", "");
        let server = server(1);
        apply(&server, vec![
            static_cluster("limits", &[limits_at.port()], H2),
            static_cluster("authz", &[authz_at.port()], H2),
            static_cluster("a", &[port], ""),
            tcp_listener("l", 0, &chain(&[limit, (name, &config)]), ""),
        ]).await;
        let mut stream = connect(&server, "l").await;
        assert_eq!(read(&mut stream, 1).await, "a");
        apply(&server, vec![tcp_listener("l", 0, &chain(&[limit, ask, (name, &config)]), "")]).await;
        within(async {
            while authz.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }).await;
        assert_eq!(limits.seen().len(), 1);
    }
}

#[test]
fn a_rate_limit_of_connections_names_what_is_wrong() {
    let wrong = |limit: &str| {
        let chain = chain(&[("ratelimit.v3.RateLimit", limit), ("echo.v3.Echo", "")]);
        let yaml = format!(
            "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}, filter_chains: [{}]}}",
            chain
                .trim_start_matches("- ")
                .replacen("filters:", "{filters:", 1)
                + "}"
        );
        let message =
            testkit::envoy::message::<proto::envoy::config::listener::v3::Listener>(&yaml);
        outrigger_proxy::plan::Listener::try_from(&message)
            .expect_err("must be refused")
            .to_string()
    };
    let service = ", rate_limit_service: {grpc_service: {envoy_grpc: {cluster_name: c}}}";
    let one = ", descriptors: [{entries: [{key: k, value: v}]}]";
    for (limit, field) in [
        (
            format!("{service}, domain: d{one}"),
            "stat_prefix: is required",
        ),
        (
            format!("{service}, stat_prefix: p{one}"),
            "domain: is required",
        ),
        (
            format!("{service}, stat_prefix: p, domain: d"),
            "descriptors: needs",
        ),
        (
            format!(", stat_prefix: p, domain: d{one}"),
            "rate_limit_service: is required",
        ),
        (
            format!("{service}, stat_prefix: p, domain: d, descriptors: [{{}}]"),
            "descriptors[0].entries: needs",
        ),
        (
            format!(
                "{service}, stat_prefix: p, domain: d, descriptors: [{{entries: [{{value: v}}]}}]"
            ),
            "entries[0].key: is required",
        ),
        (
            format!(
                "{service}, stat_prefix: p, domain: d, descriptors: [{{entries: [{{key: k, value: '%NO%'}}]}}]"
            ),
            "entries[0].value: ",
        ),
        (
            format!(
                "{service}, stat_prefix: p, domain: d, descriptors: [{{entries: [{{key: k, value: v}}], hits_addend: 1000000001}}]"
            ),
            "hits_addend: must be",
        ),
    ] {
        let error = wrong(&limit);
        let full = format!(
            "filter_chains[0].filters[0].typed_config.{}",
            if field.starts_with("entries") || field.starts_with("hits") {
                format!("descriptors[0].{field}")
            } else {
                field.to_owned()
            }
        );
        assert!(error.contains(&full), "{full}: {error}");
    }
}
