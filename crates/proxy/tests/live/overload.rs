//! Overload: what is given up while a number in a file says that it is too much, and limits of connections.

use std::path::Path;

use super::*;

/// A server with an overload manager whose one resource is what `file` says.
fn loaded(file: &Path, what: &str, more: &str) -> Rc<Server> {
    std::fs::write(file, "0").expect("it can be written");
    with(&format!(
        "overload_manager:\n  refresh_interval: 0.01s\n  resource_monitors: [{{name: file, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig, filename: {file:?}}}}}]\n  \
         {what}\n{more}"
    ))
}

fn with(bootstrap: &str) -> Rc<Server> {
    let plan = Bootstrap::try_from(&message::<config::bootstrap::v3::Bootstrap>(bootstrap));
    let options = Options {
        concurrency: 2,
        drain_time: Duration::from_millis(200),
        ..Options::default()
    };
    let plan = Arc::new(plan.expect("the test's bootstrap is good"));
    Server::start(plan, options, stats::Store::default()).expect("threads can be started")
}

fn action(name: &str) -> String {
    format!(
        "actions: [{{name: envoy.overload_actions.{name}, triggers: [{{name: file, threshold: {{value: 0.9}}}}]}}]"
    )
}

fn point(name: &str) -> String {
    format!(
        "loadshed_points: [{{name: envoy.load_shed_points.{name}, triggers: [{{name: file, scaled: {{scaling_threshold: 0.5, saturation_threshold: 0.9}}}}]}}]"
    )
}

/// Says `ok` to every request.
fn http(more: &str) -> Change {
    let filters = "- filters: [{name: h, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
         stat_prefix: h, route_config: {virtual_hosts: [{name: v, domains: [\"*\"], routes: [{match: {prefix: /}, direct_response: {status: 200, body: {inline_string: ok}}}]}]}, \
         http_filters: [{name: r, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}}]";
    tcp_listener("l", 0, filters, more)
}

/// Everything that comes in answer to one request on a new connection.
async fn ask(server: &Server, more: &str) -> String {
    let mut stream = connect(server, "l").await;
    let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{more}\r\n");
    // A connection that is refused may be gone before the request is out.
    let _ = stream.write_all(request.as_bytes()).await;
    String::from_utf8(rest(&mut stream).await.unwrap_or_default()).expect("it is text")
}

/// The head of the answer to a request on a connection that is kept.
async fn head(stream: &mut TcpStream) -> String {
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .expect("it is open");
    let mut text = String::new();
    while !text.ends_with("ok") {
        let byte = within(stream.read_u8()).await.expect("an answer comes");
        text.push(byte.into());
    }
    text
}

const CLOSE: &str = "connection: close\r\n";

live! {
    async fn requests_are_refused_while_it_is_too_much() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("load");
        let server = loaded(&file, &action("stop_accepting_requests"), "");
        apply(&server, vec![http("")]).await;
        let active = "overload.envoy.overload_actions.stop_accepting_requests.active";
        assert!(ask(&server, CLOSE).await.starts_with("HTTP/1.1 200 "));
        for (load, state, status) in [("0.95", 1, "503"), ("0.2", 0, "200")] {
            std::fs::write(&file, load).expect("it can be written");
            stat(&server, active, state).await;
            let answer = ask(&server, CLOSE).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            assert_eq!(answer.ends_with("envoy overloaded"), state == 1, "{answer}");
        }
        stat(&server, "overload.file.pressure", 20).await;
        stat(&server, "http.h.downstream_rq_overload_close", 1).await;
    }

    async fn connections_wait_in_the_kernel_until_there_is_room() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("load");
        let server = loaded(&file, &action("stop_accepting_connections"), "");
        apply(&server, vec![http("")]).await;
        let active = "overload.envoy.overload_actions.stop_accepting_connections.active";
        std::fs::write(&file, "1").expect("it can be written");
        stat(&server, active, 1).await;
        let waiting = ask(&server, CLOSE);
        let mut waiting = std::pin::pin!(waiting);
        let early = tokio::time::timeout(Duration::from_millis(100), &mut waiting).await;
        assert!(early.is_err(), "{early:?}");
        std::fs::write(&file, "0").expect("it can be written");
        assert!(waiting.await.starts_with("HTTP/1.1 200 "));
    }

    async fn connections_are_closed_or_shed_as_soon_as_they_come() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("load");
        for (what, name) in [
            (action("reject_incoming_connections"), "overload_actions.reject_incoming_connections"),
            (point("tcp_listener_accept"), "load_shed_points.tcp_listener_accept"),
        ] {
            let server = loaded(&file, &what, "");
            apply(&server, vec![http("")]).await;
            std::fs::write(&file, "1").expect("it can be written");
            stat(&server, &format!("overload.envoy.{name}.scale_percent"), 100).await;
            assert_eq!(ask(&server, CLOSE).await, "");
            stat(&server, "listener.127.0.0.1_0.downstream_cx_overload_reject", 1).await;
        }
    }

    async fn http_is_shed_before_and_after_its_head() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("load");
        for (name, answer) in [
            ("http_connection_manager_decode_headers", "HTTP/1.1 503 "),
            ("http1_server_abort_dispatch", "HTTP/1.1 503 "),
            ("hcm_ondata_creating_codec", ""),
        ] {
            let server = loaded(&file, &point(name), "");
            apply(&server, vec![http("")]).await;
            std::fs::write(&file, "1").expect("it can be written");
            stat(&server, &format!("overload.envoy.load_shed_points.{name}.scale_percent"), 100).await;
            let got = ask(&server, CLOSE).await;
            assert!(got.starts_with(answer) && got.is_empty() == answer.is_empty(), "{name}: {got}");
            stat(&server, &format!("overload.envoy.load_shed_points.{name}.shed_load_count"), 1).await;
        }
    }

    async fn keep_alive_ends_under_overload_and_when_the_health_check_fails() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("load");
        let server = loaded(&file, &action("disable_http_keepalive"), "");
        apply(&server, vec![http("")]).await;
        let mut stream = connect(&server, "l").await;
        assert!(!head(&mut stream).await.contains("connection: close"));
        std::fs::write(&file, "1").expect("it can be written");
        stat(&server, "overload.envoy.overload_actions.disable_http_keepalive.active", 1).await;
        assert!(head(&mut stream).await.contains("connection: close"));
        stat(&server, "http.h.downstream_cx_overload_disable_keepalive", 1).await;
        for (drain_type, closes) in [("DEFAULT", true), ("MODIFY_ONLY", false)] {
            let server = with("{}");
            apply(&server, vec![http(&format!("drain_type: {drain_type}"))]).await;
            let mut stream = connect(&server, "l").await;
            server.fail_health_check(true);
            assert_eq!(head(&mut stream).await.contains("connection: close"), closes, "{drain_type}");
        }
    }

    async fn a_graceful_drain_closes_the_sockets_unless_told_to_stay() {
        for (stay, accepts) in [(true, true), (false, false)] {
            let server = with("{}");
            apply(&server, vec![http("")]).await;
            let address = server.listener_address("l").expect("it has a socket");
            server.drain_listeners(false, true, stay);
            server.settled().await;
            assert!(ask(&server, CLOSE).await.starts_with("HTTP/1.1 200 "), "it serves while it drains");
            tokio::time::sleep(Duration::from_millis(400)).await;
            server.settled().await;
            assert_eq!(TcpStream::connect(address).await.is_ok(), accepts, "stay: {stay}");
        }
    }

    async fn a_heap_beyond_its_limit_sheds_requests() {
        for (limit, status) in [(1, "503"), (1_u64 << 60, "200")] {
            let server = with(&format!(
                "overload_manager:\n  refresh_interval: 0.01s\n  resource_monitors: [{{name: heap, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig, max_heap_size_bytes: {limit}}}}}]\n  \
                 loadshed_points: [{{name: envoy.load_shed_points.http_connection_manager_decode_headers, triggers: [{{name: heap, threshold: {{value: 0.9}}}}]}}]"
            ));
            apply(&server, vec![http("")]).await;
            let shed = i64::from(status == "503");
            let percent = "overload.envoy.load_shed_points.http_connection_manager_decode_headers.scale_percent";
            stat(&server, percent, 100 * shed).await;
            let answer = ask(&server, CLOSE).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            assert_eq!(server.store.number("http.h.downstream_rq_overload_close"), shed);
            assert_eq!(server.store.number("overload.heap.pressure") >= 90, shed == 1);
        }
    }

    async fn the_process_has_no_more_connections_than_it_may() {
        let server = with(
            "overload_manager: {resource_monitors: [{name: envoy.resource_monitors.global_downstream_max_connections, typed_config: \
             {\"@type\": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig, \
             max_active_downstream_connections: 2}}]}",
        );
        apply(&server, vec![http("")]).await;
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut stream = connect(&server, "l").await;
            head(&mut stream).await;
            open.push(stream);
        }
        assert_eq!(ask(&server, CLOSE).await, "");
        stat(&server, "listener.127.0.0.1_0.downstream_global_cx_overflow", 1).await;
        open.pop();
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 1).await;
        assert!(ask(&server, CLOSE).await.starts_with("HTTP/1.1 200 "));
        // A listener that does not count is served all the same, and leaves the others their room.
        apply(&server, vec![http("ignore_global_conn_limit: true")]).await;
        for _ in 0..3 {
            let mut stream = connect(&server, "l").await;
            head(&mut stream).await;
            open.push(stream);
        }
    }

    async fn a_cluster_under_maintenance_takes_no_requests() {
        let a = origin("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        let server = with(
            "layered_runtime: {layers: [{name: s, static_layer: {upstream.maintenance_mode.closed: 100, upstream: {maintenance_mode: {open: 0}}}}]}",
        );
        let route = |path: &str, cluster: &str| format!("{{match: {{path: {path}}}, route: {{cluster: {cluster}}}}}");
        let filters = format!(
            "- filters: [{{name: h, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
             stat_prefix: h, route_config: {{virtual_hosts: [{{name: v, domains: [\"*\"], routes: [{}, {}]}}]}}, \
             http_filters: [{{name: r, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]",
            route("/open", "open"), route("/closed", "closed"),
        );
        apply(&server, vec![
            static_cluster("open", &[a], ""),
            static_cluster("closed", &[a], ""),
            tcp_listener("l", 0, &filters, ""),
        ]).await;
        for (name, status) in [("open", "200"), ("closed", "503")] {
            let mut stream = connect(&server, "l").await;
            let get = format!("GET /{name} HTTP/1.1\r\nhost: a\r\n{CLOSE}\r\n");
            stream.write_all(get.as_bytes()).await.expect("it is open");
            let answer = rest(&mut stream).await.unwrap_or_default();
            let answer = String::from_utf8(answer).expect("text");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            let closed = i64::from(status == "503");
            assert_eq!(answer.ends_with("\r\n\r\nmaintenance mode"), closed == 1, "{answer}");
            assert_eq!(answer.contains("x-envoy-overloaded: true\r\n"), closed == 1, "{answer}");
            let number = |what: &str| server.store.number(&format!("cluster.{name}.{what}"));
            assert_eq!(number("upstream_rq_maintenance_mode"), closed);
            assert_eq!(number("upstream_rq_503"), closed);
            assert_eq!(number("upstream_cx_total"), 1 - closed);
        }
    }

    async fn a_listener_has_no_more_connections_than_it_may() {
        let server = with("layered_runtime: {layers: [{name: s, static_layer: {envoy.resource_limits.listener.l.connection_limit: 3}}]}");
        apply(&server, vec![http("max_connections_to_accept_per_socket_event: 1")]).await;
        let mut open = Vec::new();
        for _ in 0..3 {
            let mut stream = connect(&server, "l").await;
            head(&mut stream).await;
            open.push(stream);
        }
        assert_eq!(ask(&server, CLOSE).await, "");
        stat(&server, "listener.127.0.0.1_0.downstream_cx_overflow", 1).await;
        // A new version of the listener goes on counting.
        apply(&server, vec![http("max_connections_to_accept_per_socket_event: 2")]).await;
        assert_eq!(ask(&server, CLOSE).await, "");
        open.pop();
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 2).await;
        assert!(ask(&server, CLOSE).await.starts_with("HTTP/1.1 200 "));
    }
}

#[test]
fn mistakes_of_an_overload_manager_are_named() {
    for (bootstrap, path) in [
        (
            "overload_manager: {actions: [{name: envoy.overload_actions.nap, triggers: [{name: a, threshold: {value: 1}}]}]}",
            "overload_manager.actions[0].name",
        ),
        (
            "overload_manager: {actions: [{name: envoy.overload_actions.shrink_heap, triggers: [{name: a, threshold: {value: 1}}]}]}",
            "overload_manager.actions[0].triggers[0].name",
        ),
        (
            "overload_manager: {buffer_factory_config: {minimum_account_to_track_power_of_two: 20}}",
            "overload_manager.buffer_factory_config",
        ),
        (
            "overload_manager: {resource_monitors: [{name: a, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig}}]}",
            "overload_manager.resource_monitors[0].typed_config.max_heap_size_bytes",
        ),
        (
            "overload_manager: {resource_monitors: [{name: a, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.resource_monitors.cpu_utilization.v3.CpuUtilizationConfig}}]}",
            "overload_manager.resource_monitors[0].typed_config",
        ),
    ] {
        let found = Bootstrap::try_from(&message::<config::bootstrap::v3::Bootstrap>(bootstrap));
        let errors = found.expect_err(bootstrap).to_string();
        assert!(errors.contains(path), "{path}: {errors}");
    }
}
