//! Filter state of connections: who makes it, and what goes by it.

use super::{
    tcp::{chain, tcp_proxy, type_url},
    *,
};

const SET: &str = "set_filter_state.v3.Config";

/// A value of `set_filter_state`.
fn value(key: &str, factory: &str, text: &str) -> String {
    format!(
        "{{object_key: {key}, factory_key: \"{factory}\", format_string: {{text_format_source: {{inline_string: {text:?}}}}}}}"
    )
}

/// The filter, with values that are made as the connection begins.
fn begins(values: &[(&str, &str)]) -> String {
    let values: Vec<_> = values.iter().map(|(k, text)| value(k, "", text)).collect();
    format!(", on_new_connection: [{}]", values.join(", "))
}

/// A transport socket that trusts everybody.
fn tls() -> String {
    format!(
        "transport_socket: {{name: tls, typed_config: {{{}}}}}",
        type_url("transport_sockets.tls.v3.UpstreamTlsContext")
    )
}

live! {
    async fn connections_stay_with_their_host_by_an_object_of_their_state() {
        let ports = [origin("1").await, origin("2").await, origin("3").await];
        let server = server(1);
        let (name, config) = tcp_proxy("ring", ", hash_policy: [{filter_state: {key: who}}]");
        let chain = |factory: &str, text: &str| chain(&[
            (SET, &format!(", on_downstream_tls_handshake: [{}]", value("who", factory, text))),
            (name, &config),
        ]);
        apply(&server, vec![
            static_cluster("ring", &ports, "lb_policy: RING_HASH"),
            tcp_listener("hashed", 0, &chain("envoy.hashable_string", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"), ""),
            // Such an object gives no hash.
            tcp_listener("text", 0, &chain("envoy.string", "always the same"), ""),
        ]).await;
        let hosts = async |listener: &str| {
            let mut hosts = std::collections::BTreeSet::new();
            for _ in 0..40 {
                hosts.insert(read(&mut connect(&server, listener).await, 1).await);
            }
            hosts.len()
        };
        assert_eq!(hosts("hashed").await, 1);
        assert_eq!(hosts("text").await, 3);
    }

    async fn well_known_objects_change_what_becomes_of_a_connection() {
        let (one, two) = (origin("1").await, origin("2").await);
        let server = server(1);
        let (name, plain) = tcp_proxy("a", "");
        let (_, tunnel) = tcp_proxy("a", ", tunneling_config: {hostname: \"x:1\"}");
        let (_, original) = tcp_proxy("original", "");
        let listener = |listener: &str, values: &[(&str, &str)], config: &str| {
            tcp_listener(listener, 0, &chain(&[(SET, &begins(values)), (name, config)]), "")
        };
        apply(&server, vec![
            static_cluster("a", &[one], ""),
            static_cluster("b", &[two], ""),
            cluster("name: original\ntype: ORIGINAL_DST\nlb_policy: CLUSTER_PROVIDED"),
            listener("cluster", &[("envoy.tcp_proxy.cluster", "b")], &plain),
            listener("nowhere", &[("envoy.tcp_proxy.cluster", "c")], &plain),
            listener("idle", &[("envoy.tcp_proxy.per_connection_idle_timeout_ms", "100")], &plain),
            listener("wrong", &[("envoy.tcp_proxy.disable_tunneling", "perhaps"), ("envoy.tcp_proxy.per_connection_idle_timeout_ms", "soon")], &plain),
            listener("direct", &[("envoy.tcp_proxy.disable_tunneling", "true")], &tunnel),
            listener("original", &[("envoy.network.transport_socket.original_dst_address", &format!("127.0.0.1:{two}"))], &original),
        ]).await;
        for (listener, host) in [("cluster", "2"), ("direct", "1"), ("original", "2"), ("wrong", "1")] {
            assert_eq!(read(&mut connect(&server, listener).await, 1).await, host, "{listener}");
        }
        assert_eq!(rest(&mut connect(&server, "nowhere").await).await.unwrap_or_default(), b"");
        stat(&server, "tcp.a.downstream_cx_no_route", 1).await;
        assert_eq!(rest(&mut connect(&server, "idle").await).await.as_deref(), Some(&b"1"[..]));
        stat(&server, "tcp.a.idle_timeout", 1).await;
    }

    async fn objects_name_what_tls_asks_a_host_for() {
        let sink = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = sink.local_addr().expect("it is bound").port();
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        let values = begins(&[
            ("envoy.network.upstream_server_name", "named.example"),
            ("envoy.network.application_protocols", "some/1,other/2"),
        ]);
        apply(&server, vec![
            static_cluster("a", &[port], &tls()),
            tcp_listener("l", 0, &chain(&[(SET, &values), (name, &config)]), ""),
        ]).await;
        let _client = connect(&server, "l").await;
        let (mut stream, _) = within(sink.accept()).await.expect("it comes");
        let mut hello = vec![0; 5];
        within(stream.read_exact(&mut hello)).await.expect("a record comes");
        hello.resize(u16::from_be_bytes([hello[3], hello[4]]).into(), 0);
        within(stream.read_exact(&mut hello)).await.expect("all of it comes");
        for wanted in [&b"\0\x0dnamed.example"[..], b"\x06some/1\x07other/2"] {
            assert!(hello.windows(wanted.len()).any(|at| at == wanted), "{wanted:?}");
        }
    }

    async fn the_upstream_waits_for_the_clients_first_bytes_where_it_should() {
        let port = origin("a").await;
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let server = server(1);
        let log_to = format!(
            ", access_log: [{{name: f, typed_config: {{{}, path: {log:?}, log_format: {{text_format_source: {{inline_string: \"%FILTER_STATE(made:PLAIN)%\\n\"}}}}}}}}]",
            type_url("access_loggers.file.v3.FileAccessLog")
        );
        let data = format!(", on_downstream_data: [{}]", value("made", "envoy.string", "from %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"));
        let (name, waits) = tcp_proxy("a", &format!(", idle_timeout: 0.2s, upstream_connect_mode: ON_DOWNSTREAM_DATA, max_early_data_bytes: 1024{log_to}"));
        let (_, at_once) = tcp_proxy("a", &log_to);
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            tcp_listener("waits", 0, &chain(&[(SET, &data), (name, &waits)]), ""),
            tcp_listener("at_once", 0, &chain(&[(SET, &data), (name, &at_once)]), ""),
        ]).await;
        // Who says nothing gets nothing, and the upstream hears nothing.
        assert_eq!(rest(&mut connect(&server, "waits").await).await.as_deref(), Some(&b""[..]));
        stat(&server, "tcp.a.idle_timeout", 1).await;
        let mut over = connect(&server, "waits").await;
        over.shutdown().await.expect("it is open");
        assert_eq!(rest(&mut over).await.as_deref(), Some(&b""[..]));
        stat(&server, "cluster.a.upstream_cx_total", 0).await;
        let mut stream = connect(&server, "waits").await;
        stream.write_all(b"hello").await.expect("it is open");
        assert_eq!(read(&mut stream, 6).await, "ahello");
        stat(&server, "tcp.a.early_data_received_count_total", 1).await;
        drop(stream);
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        // Where it does not wait, the object is made all the same.
        assert_eq!(read(&mut connect(&server, "at_once").await, 1).await, "a");
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        let mut stream = connect(&server, "at_once").await;
        stream.write_all(b"x").await.expect("it is open");
        assert_eq!(read(&mut stream, 2).await, "ax");
        drop(stream);
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        server.shut_down();
        let lines = std::fs::read_to_string(&log).expect("it was written");
        assert_eq!(lines, "-\n-\nfrom 127.0.0.1\n-\nfrom 127.0.0.1\n");
    }
}
