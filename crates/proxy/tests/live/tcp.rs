//! TCP filters: what passes, who is let in, and what PROXY headers say at both ends.

use super::*;

pub(super) fn type_url(name: &str) -> String {
    format!("\"@type\": type.googleapis.com/envoy.extensions.{name}")
}

/// A chain of network filters with their configurations.
pub(super) fn chain(filters: &[(&str, &str)]) -> String {
    let filter = |(name, config): &(&str, &str)| {
        format!(
            "{{name: {name}, typed_config: {{{}{config}}}}}",
            type_url(&format!("filters.network.{name}"))
        )
    };
    let filters: Vec<_> = filters.iter().map(filter).collect();
    format!("- filters: [{}]", filters.join(", "))
}

pub(super) fn tcp_proxy(cluster: &str, more: &str) -> (&'static str, String) {
    let config = format!(", stat_prefix: {cluster}, cluster: {cluster}{more}");
    ("tcp_proxy.v3.TcpProxy", config)
}

/// The listener filter that reads PROXY headers.
fn proxy_filter(more: &str) -> String {
    format!(
        "listener_filters: [{{name: p, typed_config: {{{}{more}}}}}]",
        type_url("filters.listener.proxy_protocol.v3.ProxyProtocol")
    )
}

/// A transport socket that writes PROXY headers.
fn proxy_transport(config: &str) -> String {
    format!(
        "transport_socket: {{name: p, typed_config: {{{}, config: {{{config}}}, transport_socket: {{name: raw, typed_config: {{{}}}}}}}}}",
        type_url("transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport"),
        type_url("transport_sockets.raw_buffer.v3.RawBuffer"),
    )
}

/// A server that tells the first `length` bytes of its next client.
async fn first_bytes(length: usize) -> (u16, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    let task = tokio::task::spawn_local(async move {
        let (mut stream, _) = listener.accept().await.expect("one comes");
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).await.expect("so many come");
        bytes
    });
    (port, task)
}

/// A ClientHello that names a server.
fn client_hello(server_name: &str) -> Vec<u8> {
    let sized = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
    let name = sized(&[&[0], &sized(server_name.as_bytes())[..]].concat());
    let extensions = sized(&[&[0, 0], &sized(&name)[..]].concat());
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend(extensions);
    let message = [&[1, 0], &sized(&body)[..]].concat();
    [&[22, 3, 1], &sized(&message)[..]].concat()
}

live! {
    async fn the_server_name_names_the_cluster() {
        let hello = client_hello("outbound_.80_._.b.ns");
        let (port, told) = first_bytes(hello.len()).await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        let inspector = format!("listener_filters: [{{name: t, typed_config: {{{}}}}}]", type_url("filters.listener.tls_inspector.v3.TlsInspector"));
        apply(&server, vec![
            static_cluster("a", &[], ""),
            static_cluster("outbound_.80_._.b.ns", &[port], ""),
            tcp_listener("l", 0, &chain(&[("sni_cluster.v3.SniCluster", ""), (name, &config)]), &inspector),
        ]).await;
        let mut stream = connect(&server, "l").await;
        stream.write_all(&hello).await.expect("it is open");
        assert_eq!(within(told).await.expect("it ends well"), hello);
        // Of a name without a cluster there is nothing to connect to.
        let mut stream = connect(&server, "l").await;
        stream.write_all(&client_hello("nobody")).await.expect("it is open");
        assert_eq!(rest(&mut stream).await.unwrap_or_default(), b"");
        stat(&server, "tcp.a.downstream_cx_no_route", 1).await;
    }

    async fn bytes_that_nobody_takes_are_counted_while_they_wait() {
        let waits = async |server: &Server, name: &str| {
            within(async {
                while server.store.number(name) <= 0 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
            .await;
        };
        // By copies and by splice(2).
        for splice in [false, true] {
            let bootstrap = format!("layered_runtime: {{layers: [{{name: s, static_layer: {{outrigger.tcp_proxy.splice: {splice}}}}}]}}");
            let plan = Bootstrap::try_from(&message::<config::bootstrap::v3::Bootstrap>(&bootstrap));
            let server = Server::start(Arc::new(plan.expect("it is good")), Options::default(), stats::Store::default());
            let server = server.expect("it starts");
            let sink = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
            let port = sink.local_addr().expect("it is bound").port();
            let (name, config) = tcp_proxy("a", "");
            apply(&server, vec![static_cluster("a", &[port], ""), tcp_listener("l", 0, &chain(&[(name, &config)]), "")]).await;
            for to_upstream in [true, false] {
                let mut client = connect(&server, "l").await;
                let (mut upstream, _) = within(sink.accept()).await.expect("it comes");
                let (from, gauge) = match to_upstream {
                    true => (&mut client, "cluster.a.upstream_cx_tx_bytes_buffered"),
                    false => (&mut upstream, "tcp.a.downstream_cx_tx_bytes_buffered"),
                };
                tokio::select! {
                    () = async { while from.write_all(&[b'x'; 0x10000]).await.is_ok() {} } => panic!("it is open"),
                    () = waits(&server, gauge) => {}
                }
                drop((client, upstream));
                stat(&server, gauge, 0).await;
            }
            // Each was closed with bytes under way.
            stat(&server, "cluster.a.upstream_cx_destroy_with_active_rq", 2).await;
        }
    }

    async fn a_proxy_header_goes_in_and_out() {
        let text = b"PROXY TCP4 192.0.2.7 198.51.100.2 40000 443\r\nhello";
        let (port, told) = first_bytes(text.len()).await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        apply(&server, vec![
            static_cluster("a", &[port], &proxy_transport("version: V1")),
            tcp_listener("l", 0, &chain(&[(name, &config)]), &proxy_filter("")),
        ]).await;
        let mut stream = connect(&server, "l").await;
        // Byte by byte, since a header may come in pieces.
        for byte in text {
            stream.write_all(&[*byte]).await.expect("it is open");
            stream.flush().await.expect("it is open");
        }
        let told = within(told).await.expect("it ends well");
        assert_eq!(String::from_utf8_lossy(&told), String::from_utf8_lossy(text));
        stat(&server, "proxy_proto.versions.v1.found", 1).await;
    }

    async fn tlvs_pass_as_far_as_both_ends_let_them() {
        let head = |tlvs: &[u8]| {
            let body = [&[192, 0, 2, 7, 198, 51, 100, 2, 0x9c, 0x40, 1, 0xbb], tlvs].concat();
            let length = (body.len() as u16).to_be_bytes();
            [b"\r\n\r\n\0\r\nQUIT\n\x21\x11", &length[..], &body].concat()
        };
        let sent = head(b"\xe0\0\x03one\xe1\0\x03two\xe2\0\x05three");
        let expected = head(b"\xe1\0\x03two\xe3\0\x04four");
        let (port, told) = first_bytes(expected.len()).await;
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let server = server(1);
        let file = format!(
            ", access_log: [{{name: f, typed_config: {{{}, path: {:?}, log_format: {{text_format_source: {{inline_string: \"%DYNAMIC_METADATA(ns:key)% %DOWNSTREAM_REMOTE_ADDRESS% %ACCESS_LOG_TYPE%\\n\"}}}}}}}}]",
            type_url("access_loggers.file.v3.FileAccessLog"), log
        );
        let (name, config) = tcp_proxy("a", &file);
        let transport = proxy_transport(
            "version: V2, pass_through_tlvs: {match_type: INCLUDE, tlv_type: [0xe1, 0xe2]}, added_tlvs: [{type: 0xe3, value: Zm91cg==}]",
        );
        let filter = proxy_filter(
            ", pass_through_tlvs: {match_type: INCLUDE, tlv_type: [0xe0, 0xe1]}, stat_prefix: p, \
             rules: [{tlv_type: 0xe2, on_tlv_present: {metadata_namespace: ns, key: key}}]",
        );
        apply(&server, vec![
            static_cluster("a", &[port], &transport),
            tcp_listener("l", 0, &chain(&[(name, &config)]), &filter),
        ]).await;
        let mut stream = connect(&server, "l").await;
        stream.write_all(&sent).await.expect("it is open");
        assert_eq!(within(told).await.expect("it ends well"), expected);
        stat(&server, "proxy_proto.p.versions.v2.found", 1).await;
        drop(stream);
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        server.shut_down();
        let line = std::fs::read_to_string(&log).expect("it was written");
        assert_eq!(line, "three 192.0.2.7:40000 TcpConnectionEnd\n");
    }

    async fn who_lies_or_says_nothing_is_refused() {
        let port = origin("a").await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        let chain = chain(&[(name, &config)]);
        let more = |more: &str| proxy_filter(more);
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            tcp_listener("strict", 0, &chain, &more(", disallowed_versions: [V2]")),
            tcp_listener("lenient", 0, &chain, &more(", allow_requests_without_proxy_protocol: true, stat_prefix: lenient")),
        ]).await;
        for refused in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PROXY TCP4 nobody\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"] {
            let mut stream = connect(&server, "strict").await;
            stream.write_all(refused).await.expect("it is open");
            assert_eq!(rest(&mut stream).await.unwrap_or_default(), b"");
        }
        for (name, count) in [("not_found_disallowed", 1), ("versions.v1.error", 1), ("versions.v2.disallowed", 1)] {
            stat(&server, &format!("proxy_proto.{name}"), count).await;
        }
        let mut stream = connect(&server, "lenient").await;
        stream.write_all(b"hello").await.expect("it is open");
        assert_eq!(read(&mut stream, 6).await, "ahello");
        stat(&server, "proxy_proto.lenient.not_found_allowed", 1).await;
    }

    async fn a_connection_limit_holds_over_all_workers() {
        let port = origin("a").await;
        let server = server(2);
        let (name, config) = tcp_proxy("a", "");
        let limit = ("connection_limit.v3.ConnectionLimit", ", stat_prefix: c, max_connections: 2");
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            tcp_listener("l", 0, &chain(&[limit, (name, &config)]), ""),
        ]).await;
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut stream = connect(&server, "l").await;
            assert_eq!(read(&mut stream, 1).await, "a");
            open.push(stream);
        }
        for _ in 0..6 {
            assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
        }
        stat(&server, "connection_limit.c.limited_connections", 6).await;
        stat(&server, "connection_limit.c.active_connections", 2).await;
        open.pop();
        stat(&server, "connection_limit.c.active_connections", 1).await;
        assert_eq!(read(&mut connect(&server, "l").await, 1).await, "a");
    }

    async fn a_rate_limit_lets_no_more_in_than_it_has_tokens() {
        let server = server(2);
        let limit = (
            "local_ratelimit.v3.LocalRateLimit",
            ", stat_prefix: r, token_bucket: {max_tokens: 3, fill_interval: 3600s}",
        );
        let answer = ("direct_response.v3.Config", ", response: {inline_string: hello}");
        apply(&server, vec![tcp_listener("l", 0, &chain(&[limit, answer]), "")]).await;
        let mut answered = 0;
        for _ in 0..8 {
            answered += usize::from(rest(&mut connect(&server, "l").await).await.unwrap_or_default() == b"hello");
        }
        assert_eq!(answered, 3);
        stat(&server, "local_rate_limit.r.rate_limited", 5).await;
    }

    async fn policies_let_connections_in_or_not() {
        let name = "rbac.v3.RBAC";
        let rules = |network: &str| format!(
            ", stat_prefix: tcp., rules: {{policies: {{p: {{permissions: [{{any: true}}], \
             principals: [{{direct_remote_ip: {{address_prefix: {network}, prefix_len: 8}}}}]}}}}}}"
        );
        for (network, admitted) in [("127.0.0.0", true), ("10.0.0.0", false)] {
            let server = server(1);
            let chains = chain(&[(name, &rules(network)), ("echo.v3.Echo", "")]);
            apply(&server, vec![tcp_listener("l", 0, &chains, "")]).await;
            let mut stream = TcpStream::connect(server.listener_address("l").unwrap()).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.write_all(b"hello").await;
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut answer).await;
            assert_eq!(answer, if admitted { &b"hello"[..] } else { b"" });
            let count = if admitted { "tcp.rbac.allowed" } else { "tcp.rbac.denied" };
            assert_eq!(server.store.number(count), 1, "{count}");
        }
    }

    async fn an_echo_gives_back() {
        let server = server(1);
        apply(&server, vec![tcp_listener("l", 0, &chain(&[("echo.v3.Echo", "")]), "")]).await;
        let mut stream = connect(&server, "l").await;
        stream.write_all(b"hello").await.expect("it is open");
        assert_eq!(read(&mut stream, 5).await, "hello");
    }

    async fn a_connection_lasts_no_longer_than_it_may() {
        let port = origin("a").await;
        let server = server(1);
        let (name, old) = tcp_proxy("a", ", max_downstream_connection_duration: 0.1s, max_downstream_connection_duration_jitter_percentage: {value: 50}");
        let (_, idle) = tcp_proxy("a", ", idle_timeout: 0.1s");
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            tcp_listener("old", 0, &chain(&[(name, &old)]), ""),
            tcp_listener("idle", 0, &chain(&[(name, &idle)]), ""),
        ]).await;
        for (listener, count) in [("old", "max_downstream_connection_duration"), ("idle", "idle_timeout")] {
            assert_eq!(rest(&mut connect(&server, listener).await).await.unwrap_or_default(), b"a");
            stat(&server, &format!("tcp.a.{count}"), 1).await;
        }
    }

    async fn only_hosts_with_the_wanted_metadata_are_chosen() {
        let (one, two) = (origin("1").await, origin("2").await);
        let host = |port: u16, version: &str| format!(
            "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}, metadata: {{filter_metadata: {{envoy.lb: {{version: {version}}}}}}}}}"
        );
        let server = server(1);
        let wanted = "metadata_match: {filter_metadata: {envoy.lb: {version: v2}}}";
        let (name, plain) = tcp_proxy("a", &format!(", {wanted}"));
        let weighted = format!(", stat_prefix: a, weighted_clusters: {{clusters: [{{name: a, weight: 1, {wanted}}}]}}");
        apply(&server, vec![
            cluster(&format!(
                "name: a\ntype: STATIC\nlb_subset_config: {{subset_selectors: [{{keys: [version]}}]}}\nload_assignment: {{cluster_name: a, endpoints: [{{lb_endpoints: [{}, {}]}}]}}",
                host(one, "v1"), host(two, "v2")
            )),
            tcp_listener("plain", 0, &chain(&[(name, &plain)]), ""),
            tcp_listener("weighted", 0, &chain(&[(name, &weighted)]), ""),
        ]).await;
        for listener in ["plain", "weighted"] {
            for _ in 0..4 {
                assert_eq!(read(&mut connect(&server, listener).await, 1).await, "2");
            }
        }
    }

    async fn connections_are_shared_by_weight_and_stay_with_their_host_by_hash() {
        let (one, two, three) = (origin("1").await, origin("2").await, origin("3").await);
        let server = server(1);
        let shares = ", stat_prefix: w, weighted_clusters: {clusters: [{name: a, weight: 3}, {name: b, weight: 1}]}";
        let (name, by_client) = tcp_proxy("ring", ", hash_policy: [{source_ip: {}}]");
        apply(&server, vec![
            static_cluster("a", &[one], ""),
            static_cluster("b", &[two], ""),
            static_cluster("ring", &[one, two, three], "lb_policy: RING_HASH"),
            tcp_listener("weighted", 0, &chain(&[(name, shares)]), ""),
            tcp_listener("hashed", 0, &chain(&[(name, &by_client)]), ""),
        ]).await;
        let mut to_a = 0;
        for _ in 0..400 {
            to_a += u32::from(read(&mut connect(&server, "weighted").await, 1).await == "1");
        }
        // 300 are expected; so far off is one in millions.
        assert!((250..350).contains(&to_a), "{to_a} of 400");
        let address = server.listener_address("hashed").expect("it has a socket");
        let mut seen = std::collections::BTreeSet::new();
        for client in 1..=20 {
            let mut hosts = std::collections::BTreeSet::new();
            for _ in 0..3 {
                let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
                socket.bind(format!("127.0.0.{client}:0").parse().expect("an address")).expect("loopback");
                let mut stream = socket.connect(address).await.expect("it listens");
                hosts.insert(read(&mut stream, 1).await);
            }
            assert_eq!(hosts.len(), 1, "client {client} went to {hosts:?}");
            seen.extend(hosts);
        }
        assert!(seen.len() > 1, "clients are spread: {seen:?}");
    }

    async fn another_host_is_tried_when_one_refuses() {
        let unused = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let dead = unused.local_addr().expect("it is bound").port();
        drop(unused);
        let port = origin("a").await;
        let server = server(1);
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let (name, config) = tcp_proxy("a", &format!(
            ", max_connect_attempts: 2, backoff_options: {{base_interval: 0.001s}}, access_log: [{{name: f, typed_config: {{{}, path: {log:?}, log_format: {{text_format_source: {{inline_string: \"%UPSTREAM_HOSTS_ATTEMPTED%\\n\"}}}}}}}}]",
            type_url("access_loggers.file.v3.FileAccessLog")
        ));
        apply(&server, vec![
            static_cluster("a", &[dead, port], "lb_policy: ROUND_ROBIN"),
            static_cluster("dead", &[dead], ""),
            tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
        ]).await;
        for _ in 0..4 {
            assert_eq!(read(&mut connect(&server, "l").await, 1).await, "a");
        }
        stat(&server, "cluster.a.upstream_cx_connect_attempts_exceeded", 0).await;
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        server.shut_down();
        let lines = std::fs::read_to_string(&log).expect("it was written");
        let (alone, both) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{dead},127.0.0.1:{port}"));
        assert!(lines.lines().count() == 4 && lines.lines().all(|line| line == alone || line == both), "{lines}");
        assert!(lines.contains(&both), "{lines}");
    }

    async fn a_proxy_adds_tlvs_as_its_policy_says() {
        let head = |tlvs: &[u8]| {
            let body = [&[192, 0, 2, 7, 198, 51, 100, 2, 0x9c, 0x40, 1, 0xbb], tlvs].concat();
            let length = (body.len() as u16).to_be_bytes();
            [b"\r\n\r\n\0\r\nQUIT\n\x21\x11", &length[..], &body].concat()
        };
        let (one, two) = (&b"\xe1\0\x03one"[..], &b"\xe2\0\x03two"[..]);
        // What the proxy has for itself: another value of the second type, and the client's address.
        let own = [&b"\xe2\0\x04four"[..], b"\xe3\0\x09192.0.2.7"].concat();
        let tlvs = "proxy_protocol_tlvs: [{type: 0xe2, value: Zm91cg==}, {type: 0xe3, format_string: {text_format_source: {inline_string: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\"}}}]";
        for (policy, sent, expected) in [
            ("ADD_IF_ABSENT", head(&[one, two].concat()), head(&[one, two].concat())),
            // A header without TLVs is one.
            ("ADD_IF_ABSENT", head(b""), head(b"")),
            ("OVERWRITE_BY_TYPE_IF_EXISTS_OR_ADD", head(&[one, two].concat()), head(&[&own[..], one].concat())),
            ("APPEND_IF_EXISTS_OR_ADD", head(&[one, two].concat()), head(&[one, two, &own].concat())),
        ] {
            let (port, told) = first_bytes(expected.len()).await;
            let server = server(1);
            let (name, config) = tcp_proxy("a", &format!(", {tlvs}, proxy_protocol_tlv_merge_policy: {policy}"));
            apply(&server, vec![
                static_cluster("a", &[port], &proxy_transport("version: V2, pass_through_tlvs: {}")),
                tcp_listener("l", 0, &chain(&[(name, &config)]), &proxy_filter(", pass_through_tlvs: {}")),
            ]).await;
            let mut stream = connect(&server, "l").await;
            stream.write_all(&sent).await.expect("it is open");
            assert_eq!(within(told).await.expect("it ends well"), expected, "{policy}");
        }
        // Without a header of the client's they are all there is.
        let (port, told) = first_bytes(28 + 7 + 12).await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", &format!(", {tlvs}"));
        apply(&server, vec![
            static_cluster("a", &[port], &proxy_transport("version: V2, pass_through_tlvs: {}")),
            tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
        ]).await;
        let _stream = connect(&server, "l").await;
        let told = within(told).await.expect("it ends well");
        assert_eq!(&told[28..], b"\xe2\0\x04four\xe3\0\x09127.0.0.1");
    }

    async fn a_connection_that_bytes_pass_on_ends_when_its_listener_drains() {
        let port = origin("a").await;
        let server = draining_for(Duration::from_secs(3600), 1);
        let (name, ends) = tcp_proxy("a", ", check_drain_close: true");
        let (_, stays) = tcp_proxy("b", "");
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            static_cluster("b", &[port], ""),
            tcp_listener("ends", 0, &chain(&[(name, &ends)]), ""),
            tcp_listener("stays", 0, &chain(&[(name, &stays)]), ""),
        ]).await;
        let mut streams = Vec::new();
        for listener in ["ends", "stays"] {
            let mut stream = connect(&server, listener).await;
            stream.write_all(b"x").await.expect("it is open");
            assert_eq!(read(&mut stream, 2).await, "ax");
            streams.push(stream);
        }
        apply(&server, vec![Change::RemoveListener("ends".into()), Change::RemoveListener("stays".into())]).await;
        let (mut stays, mut ends) = (streams.remove(1), streams.remove(0));
        // One byte goes to the upstream, or comes back, and that was the last.
        ends.write_all(b"y").await.expect("it is open");
        assert!(rest(&mut ends).await.is_none_or(|rest| b"y".starts_with(&rest)));
        stat(&server, "tcp.a.downstream_cx_drain_close", 1).await;
        stays.write_all(b"y").await.expect("it is open");
        assert_eq!(read(&mut stays, 1).await, "y");
        assert_eq!(server.store.number("tcp.b.downstream_cx_drain_close"), 0);
    }

    async fn connections_count_like_requests_of_their_cluster() {
        let port = origin("a").await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        let (_, full) = tcp_proxy("full", "");
        apply(&server, vec![
            // The limit of requests is not for connections.
            static_cluster("a", &[port], "circuit_breakers: {thresholds: [{max_requests: 1}]}"),
            static_cluster("full", &[port], "circuit_breakers: {thresholds: [{max_pending_requests: 0}]}"),
            tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
            tcp_listener("full", 0, &chain(&[(name, &full)]), ""),
        ]).await;
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut stream = connect(&server, "l").await;
            assert_eq!(read(&mut stream, 1).await, "a");
            open.push(stream);
        }
        for (stat_name, count) in [("total", 2), ("active", 2), ("pending_total", 2), ("pending_active", 0)] {
            stat(&server, &format!("cluster.a.upstream_rq_{stat_name}"), count).await;
        }
        open.pop();
        stat(&server, "cluster.a.upstream_rq_active", 1).await;
        assert_eq!(rest(&mut connect(&server, "full").await).await.unwrap_or_default(), b"");
        stat(&server, "cluster.full.upstream_rq_pending_overflow", 1).await;
        stat(&server, "cluster.full.upstream_cx_total", 0).await;
    }

    async fn a_tunnel_is_asked_for() {
        let request = b"CONNECT db.example:5432 HTTP/1.1\r\nhost: db.example:5432\r\nx-from: 127.0.0.1\r\n\r\n";
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        tokio::task::spawn_local(async move {
            for answer in ["HTTP/1.1 200 OK\r\n\r\nserver first", "HTTP/1.1 407 No\r\n\r\n"] {
                let (mut stream, _) = listener.accept().await.expect("one comes");
                let mut got = vec![0; request.len()];
                stream.read_exact(&mut got).await.expect("so many come");
                assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(request));
                stream.write_all(answer.as_bytes()).await.expect("it is open");
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            }
        });
        let server = server(1);
        let (name, config) = tcp_proxy(
            "a",
            ", tunneling_config: {hostname: \"db.example:5432\", formatters: [{name: m, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.formatter.metadata.v3.Metadata}}], headers_to_add: [{header: {key: x-from, value: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\"}}]}",
        );
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            tcp_listener("l", 0, &chain(&[(name, &config)]), ""),
        ]).await;
        assert_eq!(read(&mut connect(&server, "l").await, 12).await, "server first");
        assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
        stat(&server, "cluster.a.upstream_cx_connect_attempts_exceeded", 1).await;
    }

    async fn lines_are_written_on_connect_at_intervals_and_at_the_end() {
        let port = origin("a").await;
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let server = server(1);
        let (name, config) = tcp_proxy("a", &format!(
            ", access_log_options: {{flush_access_log_on_start: true, flush_access_log_on_connected: true, access_log_flush_interval: 0.02s}}, access_log: [{{name: f, typed_config: {{{}, path: {:?}, log_format: {{text_format_source: {{inline_string: \"%ACCESS_LOG_TYPE% %BYTES_SENT% %DOWNSTREAM_DETECTED_CLOSE_TYPE%\\n\"}}}}}}}}]",
            type_url("access_loggers.file.v3.FileAccessLog"), log
        ));
        apply(&server, vec![static_cluster("a", &[port], ""), tcp_listener("l", 0, &chain(&[(name, &config)]), "")]).await;
        let mut stream = connect(&server, "l").await;
        assert_eq!(read(&mut stream, 1).await, "a");
        tokio::time::sleep(Duration::from_millis(200)).await;
        stream.write_all(b"hello").await.expect("it is open");
        assert_eq!(read(&mut stream, 5).await, "hello");
        drop(stream);
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        server.shut_down();
        let lines = std::fs::read_to_string(&log).expect("it was written");
        let lines: Vec<_> = lines.lines().collect();
        assert_eq!(lines[..2], ["TcpConnectionStart 0 Normal", "TcpUpstreamConnected 0 Normal"]);
        assert!(lines.contains(&"TcpPeriodic 1 Normal"), "{lines:?}");
        assert_eq!(lines.last(), Some(&"TcpConnectionEnd 6 Normal"));
    }

    async fn a_log_tells_how_the_connections_ended() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.expect("one comes");
            stream.read_u8().await.expect("a byte comes");
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("it is open");
            drop(stream);
            // The next one is silent.
            let (_stream, _) = listener.accept().await.expect("another comes");
            std::future::pending::<()>().await;
        });
        let server = server(1);
        let (name, config) = tcp_proxy("a", &format!(
            ", idle_timeout: 0.2s, access_log: [{{name: f, typed_config: {{{}, path: {log:?}, log_format: {{text_format_source: {{inline_string: \"%DOWNSTREAM_DETECTED_CLOSE_TYPE% %DOWNSTREAM_LOCAL_CLOSE_REASON% %UPSTREAM_DETECTED_CLOSE_TYPE% %UPSTREAM_LOCAL_CLOSE_REASON% %COMMON_DURATION(US_CX_BEG:US_CX_END:us)% %DOWNSTREAM_HANDSHAKE_DURATION%\\n\"}}}}}}}}]",
            type_url("access_loggers.file.v3.FileAccessLog")
        ));
        apply(&server, vec![static_cluster("a", &[port], ""), tcp_listener("l", 0, &chain(&[(name, &config)]), "")]).await;
        let mut stream = connect(&server, "l").await;
        stream.write_all(b"x").await.expect("it is open");
        assert!(rest(&mut stream).await.is_none(), "the reset is passed on");
        let mut stream = connect(&server, "l").await;
        assert_eq!(rest(&mut stream).await.as_deref(), Some(&b""[..]));
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        server.shut_down();
        let lines = std::fs::read_to_string(&log).expect("it was written");
        let words: Vec<Vec<&str>> = lines.lines().map(|line| line.split(' ').collect()).collect();
        assert_eq!(words[0][..4], ["LocalReset", "-", "RemoteReset", "-"]);
        assert_eq!(words[1][..4], ["Normal", "tcp_session_idle_timeout", "Normal", "tcp_session_idle_timeout"]);
        for line in words {
            assert!(line[4].parse::<u64>().is_ok(), "{lines}");
            assert_eq!(line[5], "-");
        }
    }

    async fn connections_of_a_listener_with_keepalive_are_probed() {
        let port = origin("a").await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        let chain = chain(&[(name, &config)]);
        apply(&server, vec![
            static_cluster("a", &[port], ""),
            tcp_listener("l", 0, &chain, "tcp_keepalive: {keepalive_time: 60, keepalive_probes: 3}"),
            tcp_listener("off", 0, &chain, "tcp_keepalive: {keepalive_time: 0}"),
        ]).await;
        for (listener, timer) in [("l", "02"), ("off", "00")] {
            let mut stream = connect(&server, listener).await;
            assert_eq!(read(&mut stream, 1).await, "a");
            let (own, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
            let ends = format!(":{:04X} 0100007F:{:04X} 01 ", peer.port(), own.port());
            // What was written is acknowledged at some time; the timer is that of keep-alive from then on.
            let mut shown = String::new();
            for _ in 0..500 {
                let table = std::fs::read_to_string("/proc/net/tcp").expect("it can be read");
                let line = table.lines().find(|line| line.contains(&ends)).expect("it is open");
                shown = line.split_whitespace().nth(5).unwrap_or_default()[..2].to_owned();
                if shown == timer {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(shown, timer, "{listener}");
        }
    }

    async fn a_socket_option_that_the_system_refuses_is_named() {
        let port = origin("a").await;
        let server = server(1);
        let (name, config) = tcp_proxy("a", "");
        let chain = chain(&[(name, &config)]);
        let options = |level: i32| format!("socket_options: [{{level: {level}, name: 9999, int_value: 1, state: STATE_PREBIND}}]");
        let refused = server.apply(vec![tcp_listener("l", 0, &chain, &options(6))]).remove(0);
        let error = refused.expect_err("there is no such option").to_string();
        assert!(error.contains("level 6, name 9999"), "{error}");
        apply(&server, vec![
            static_cluster("a", &[port], &format!("upstream_bind_config: {{{}}}", options(6))),
            tcp_listener("l", 0, &chain, "socket_options: [{level: 6, name: 1, int_value: 1, state: STATE_LISTENING}]"),
        ]).await;
        assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
        stat(&server, "cluster.a.upstream_cx_connect_fail", 1).await;
    }
}

live! {
    async fn a_service_lets_connections_in_or_not() {
        use testkit::authorization::{Act, Service};
        let say = |code: i32| {
            let answer = proto::json::from_value(&serde_json::json!({ "status": { "code": code } }));
            Act::Say(Box::new(answer.expect("canonical JSON")))
        };
        let (service, address) = Service::start(vec![say(0), say(7), Act::Fail(14)]).await;
        let rbac = ", stat_prefix: tcp., shadow_rules_stat_prefix: istio_ext_authz_, shadow_rules: {action: DENY, policies: {istio-ext-authz-p-x: {permissions: [{any: true}], principals: [{direct_remote_ip: {address_prefix: 127.0.0.0, prefix_len: 8}}]}}}";
        let matcher = |value: &str| format!(", filter_enabled_metadata: {{filter: envoy.filters.network.rbac, path: [{{key: istio_ext_authz_shadow_effective_policy_id}}], value: {{string_match: {{prefix: {value}}}}}}}");
        let authz = |more: &str| format!(", stat_prefix: tcp, transport_api_version: V3, grpc_service: {{envoy_grpc: {{cluster_name: authz}}}}{more}");
        let h2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";
        let chains = |matched: &str| chain(&[
            ("rbac.v3.RBAC", rbac),
            ("ext_authz.v3.ExtAuthz", &authz(&matcher(matched))),
            ("echo.v3.Echo", ""),
        ]);
        let server = server(1);
        apply(&server, vec![
            static_cluster("authz", &[address.port()], h2),
            tcp_listener("asked", 0, &chains("istio-ext-authz-p"), ""),
            tcp_listener("free", 0, &chains("istio-ext-authz-q"), ""),
        ]).await;
        let said = async |listener: &str| {
            let mut stream = connect(&server, listener).await;
            let mut answer = Vec::new();
            // A refused connection may be gone already.
            let _ = stream.write_all(b"hello").await;
            let _ = stream.shutdown().await;
            let _ = within(stream.read_to_end(&mut answer)).await;
            answer
        };
        assert_eq!(said("free").await, b"hello");
        assert!(service.seen().is_empty());
        for (wanted, count) in [(&b"hello"[..], "ok"), (b"", "denied"), (b"", "error")] {
            assert_eq!(said("asked").await, wanted, "{count}");
            stat(&server, &format!("ext_authz.tcp.{count}"), 1).await;
        }
        let asked = service.seen().remove(0).attributes.expect("attributes");
        assert!(asked.request.is_none() && asked.source.expect("a source").address.is_some());
    }
}
