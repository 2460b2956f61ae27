//! A running proxy: listeners, chains, TCP and clusters, driven by batches of changes as xDS would drive them.

use std::{rc::Rc, sync::Arc, time::Duration};

use outrigger_proxy as proxy;
use proto::envoy::config;
use proxy::{
    plan::{Bootstrap, Cluster, ClusterLoadAssignment, Listener},
    server::{Change, Server},
    worker::{Options, drain::DrainStrategy},
};
use testkit::envoy::{hosts, message};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

fn cluster(yaml: &str) -> Change {
    let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(yaml));
    Change::UpsertCluster(Arc::new(plan.expect("the test's cluster is good").into()))
}

fn listener(yaml: &str) -> Change {
    let plan = Listener::try_from(&message::<config::listener::v3::Listener>(yaml));
    Change::UpsertListener(Arc::new(plan.expect("the test's listener is good")))
}

fn endpoints(yaml: &str) -> Change {
    let plan = ClusterLoadAssignment::try_from(&message::<
        config::endpoint::v3::ClusterLoadAssignment,
    >(yaml));
    Change::Endpoints(Arc::new(plan.expect("the test's endpoints are good")))
}

/// A STATIC cluster of these ports of this machine.
fn static_cluster(name: &str, ports: &[u16], more: &str) -> Change {
    cluster(&format!(
        "name: {name}\ntype: STATIC\n{more}\nload_assignment:\n  cluster_name: {name}\n  endpoints:\n  - lb_endpoints: [{}]",
        hosts(ports)
    ))
}

/// A filter chain's `filters` that proxy TCP to a cluster.
fn tcp_to(cluster: &str) -> String {
    format!(
        "filters: [{{name: envoy.filters.network.tcp_proxy, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: {cluster}, \
         cluster: {cluster}}}}}]"
    )
}

fn tcp_listener(name: &str, port: u16, chains: &str, more: &str) -> Change {
    listener(&format!(
        "name: {name}\naddress: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}\n{more}\nfilter_chains:\n{chains}"
    ))
}

fn server(workers: usize) -> Rc<Server> {
    draining_for(Duration::from_millis(200), workers)
}

fn draining_for(drain_time: Duration, workers: usize) -> Rc<Server> {
    let bootstrap = Bootstrap::try_from(&config::bootstrap::v3::Bootstrap::default());
    let options = Options {
        concurrency: workers,
        drain_time,
        drain_strategy: DrainStrategy::Immediate,
        ..Options::default()
    };
    let bootstrap = Arc::new(bootstrap.expect("an empty bootstrap is good"));
    Server::start(bootstrap, options, stats::Store::default()).expect("threads can be started")
}

async fn apply(server: &Rc<Server>, changes: Vec<Change>) {
    for result in server.apply(changes) {
        result.expect("the change is good");
    }
    server.settled().await;
}

/// A server that sends its name to every client, then echoes.
async fn origin(name: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let _ = stream.write_all(name.as_bytes()).await;
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

async fn connect(server: &Server, listener: &str) -> TcpStream {
    let address = server.listener_address(listener).expect("it has a socket");
    TcpStream::connect(address).await.expect("it listens")
}

async fn read(stream: &mut TcpStream, length: usize) -> String {
    let mut bytes = vec![0; length];
    within(stream.read_exact(&mut bytes))
        .await
        .expect("so many bytes come");
    String::from_utf8(bytes).expect("it is text")
}

/// What comes until the end; `None` where it is a reset.
async fn rest(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    within(stream.read_to_end(&mut bytes))
        .await
        .ok()
        .map(|_| bytes)
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .expect("it happens within 10 s")
}

/// Waits until a stat has a value.
async fn stat(server: &Server, name: &str, value: i64) {
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while server.store.number(name) != value {
        let now = server.store.number(name);
        assert!(
            tokio::time::Instant::now() < end,
            "{name} is {now}, not {value}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

macro_rules! live {
    ($(async fn $name:ident() $body:block)*) => {
        $(
            #[test]
            fn $name() {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("it builds");
                LocalSet::new().block_on(&runtime, async $body);
            }
        )*
    };
}

#[path = "live/overload.rs"]
mod overload;
#[path = "live/rate_limit.rs"]
mod rate_limit;
#[path = "live/state.rs"]
mod state;
#[path = "live/tcp.rs"]
mod tcp;
#[path = "live/tunnel.rs"]
mod tunnel;

live! {
    async fn bytes_pass_both_ways_and_are_counted() {
        let port = origin("a").await;
        let server = server(2);
        let chain = format!("- {}", tcp_to("a"));
        apply(&server, vec![static_cluster("a", &[port], ""), tcp_listener("l", 0, &chain, "")]).await;
        let mut streams = Vec::new();
        for _ in 0..8 {
            let mut stream = connect(&server, "l").await;
            assert_eq!(read(&mut stream, 1).await, "a");
            stream.write_all(b"hello").await.expect("it is open");
            assert_eq!(read(&mut stream, 5).await, "hello");
            streams.push(stream);
        }
        stat(&server, "cluster.a.upstream_cx_active", 8).await;
        for mut stream in streams {
            stream.shutdown().await.expect("it is open");
            assert_eq!(rest(&mut stream).await.as_deref(), Some(&b""[..]));
        }
        stat(&server, "cluster.a.upstream_cx_active", 0).await;
        stat(&server, "tcp.a.downstream_cx_rx_bytes_total", 40).await;
        stat(&server, "tcp.a.downstream_cx_tx_bytes_total", 48).await;
        stat(&server, "listener.127.0.0.1_0.downstream_cx_total", 8).await;
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        let of = |worker| server.store.number(&format!("listener.127.0.0.1_0.worker_{worker}.downstream_cx_total"));
        assert_eq!(of(0) + of(1), 8);
        stat(&server, "listener.127.0.0.1_0.worker_0.downstream_cx_active", 0).await;
    }

    async fn hosts_are_counted_when_somebody_looks() {
        let server = server(1);
        let assign = |ports: &[u16]| endpoints(&format!("cluster_name: s\nendpoints:\n- lb_endpoints: [{}]", hosts(ports)));
        let eds = cluster("name: s\ntype: EDS\neds_cluster_config: {eds_config: {ads: {}}}");
        apply(&server, vec![eds, assign(&[1, 2, 3])]).await;
        let look = || {
            server.publish();
            ["total", "healthy", "degraded", "excluded", "change"]
                .map(|stat| server.store.number(&format!("cluster.s.membership_{stat}")))
        };
        assert_eq!(look(), [3, 3, 0, 0, 1]);
        apply(&server, vec![assign(&[1]), assign(&[1, 4])]).await;
        assert_eq!(look(), [2, 2, 0, 0, 3]);
        apply(&server, vec![assign(&[1, 4])]).await;
        assert_eq!(look(), [2, 2, 0, 0, 3]);
        apply(&server, vec![Change::RemoveCluster("s".into())]).await;
        assert_eq!(look(), [0; 5]);
    }

    async fn without_a_host_the_connection_is_closed() {
        let server = server(1);
        let chain = format!("- {}", tcp_to("none"));
        apply(&server, vec![static_cluster("none", &[], ""), tcp_listener("l", 0, &chain, "")]).await;
        assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
        stat(&server, "cluster.none.upstream_cx_none_healthy", 1).await;
    }

    async fn a_refused_connection_is_counted() {
        let unused = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = unused.local_addr().expect("it is bound").port();
        drop(unused);
        let server = server(1);
        let chain = format!("- {}", tcp_to("dead"));
        apply(&server, vec![static_cluster("dead", &[port], ""), tcp_listener("l", 0, &chain, "")]).await;
        assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
        stat(&server, "cluster.dead.upstream_cx_connect_fail", 1).await;
    }

    async fn an_endpoint_change_moves_new_connections_only() {
        let (a, b) = (origin("a").await, origin("b").await);
        let server = server(2);
        let assign = |port| endpoints(&format!("cluster_name: s\nendpoints:\n- lb_endpoints: [{}]", hosts(&[port])));
        let chain = format!("- {}", tcp_to("s"));
        apply(&server, vec![
            cluster("name: s\ntype: EDS\neds_cluster_config: {eds_config: {ads: {}}}"),
            assign(a),
            tcp_listener("l", 0, &chain, ""),
        ]).await;
        let mut old = connect(&server, "l").await;
        assert_eq!(read(&mut old, 1).await, "a");
        apply(&server, vec![assign(b)]).await;
        for _ in 0..4 {
            assert_eq!(read(&mut connect(&server, "l").await, 1).await, "b");
        }
        old.write_all(b"still").await.expect("it is open");
        assert_eq!(read(&mut old, 5).await, "still");
    }

    async fn an_update_drains_changed_chains_only() {
        let (a, b) = (origin("a").await, origin("b").await);
        let server = server(1);
        let version = |second: &str| {
            let chains = format!(
                "- name: kept\n  filter_chain_match: {{source_prefix_ranges: [{{address_prefix: 127.0.0.1, prefix_len: 32}}]}}\n  {}\n- name: other\n  {}",
                tcp_to("a"), tcp_to(second)
            );
            tcp_listener("l", 0, &chains, "")
        };
        apply(&server, vec![static_cluster("a", &[a], ""), static_cluster("b", &[b], ""), version("a")]).await;
        let address = server.listener_address("l").expect("it has a socket");
        let mut kept = connect(&server, "l").await;
        assert_eq!(read(&mut kept, 1).await, "a");
        let other = tokio::net::TcpSocket::new_v4().expect("a socket");
        other.bind("127.0.0.2:0".parse().expect("an address")).expect("loopback");
        let mut other = other.connect(address).await.expect("it listens");
        assert_eq!(read(&mut other, 1).await, "a");
        apply(&server, vec![version("b")]).await;
        assert_eq!(server.listener_address("l"), Some(address), "the socket stays");
        assert_eq!(rest(&mut other).await.unwrap_or_default(), b"", "its chain has changed");
        kept.write_all(b"kept").await.expect("it is open");
        assert_eq!(read(&mut kept, 4).await, "kept");
    }

    async fn an_ipv6_socket_takes_ipv4_clients_where_it_should() {
        let a = origin("a").await;
        let server = server(2);
        let version = |address: &str| {
            let chain = format!("- {}", tcp_to("a"));
            listener(&format!("name: l\naddress: {{socket_address: {{{address}}}}}\nfilter_chains:\n{chain}"))
        };
        let wildcard = "address: '::', port_value: 0";
        apply(&server, vec![static_cluster("a", &[a], ""), version(&format!("{wildcard}, ipv4_compat: true"))]).await;
        let port = server.listener_address("l").expect("it has a socket").port();
        for client in ["127.0.0.1", "::1"] {
            let mut stream = TcpStream::connect((client, port)).await.expect(client);
            assert_eq!(read(&mut stream, 1).await, "a", "{client}");
        }
        // Without it the same port takes IPv6 alone: the sockets are others.
        apply(&server, vec![version(wildcard)]).await;
        let port = server.listener_address("l").expect("it has a socket").port();
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
        let mut stream = TcpStream::connect(("::1", port)).await.expect("it listens");
        assert_eq!(read(&mut stream, 1).await, "a");
    }

    async fn the_version_is_told_as_a_number() {
        let with = |yaml: &str| {
            let plan = Bootstrap::try_from(&message::<config::bootstrap::v3::Bootstrap>(yaml));
            let plan = Arc::new(plan.expect("it is good"));
            Server::start(plan, Options::default(), stats::Store::default()).expect("it starts")
        };
        assert_eq!(with("stats_server_version_override: 123456").store.number("server.version"), 123_456);
        let text = with("{}").store.prometheus(&stats::Query::default());
        assert!(text.contains("envoy_server_version{} "), "{text}");
    }

    async fn what_drains_is_counted_until_its_last_connection_has_gone() {
        let a = origin("a").await;
        let server = draining_for(Duration::from_secs(600), 2);
        let version = |wait: &str, more: &str| {
            let chain = format!("- transport_socket_connect_timeout: {wait}\n  {}", tcp_to("a"));
            tcp_listener("l", 0, &chain, more)
        };
        let draining = async |listeners: i64, chains: i64| {
            let number = |what: &str| {
                server.publish();
                server.store.number(&format!("listener_manager.total_{what}_draining"))
            };
            let counts = async {
                while [number("listeners"), number("filter_chains")] != [listeners, chains] {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            within(counts).await;
        };
        apply(&server, vec![static_cluster("a", &[a], ""), version("1s", "")]).await;
        draining(0, 0).await;
        let mut first = connect(&server, "l").await;
        assert_eq!(read(&mut first, 1).await, "a");
        apply(&server, vec![version("2s", "")]).await;
        draining(0, 1).await;
        let mut second = connect(&server, "l").await;
        assert_eq!(read(&mut second, 1).await, "a");
        apply(&server, vec![version("2s", "listener_filters_timeout: 1s")]).await;
        draining(1, 1).await;
        let mut third = connect(&server, "l").await;
        assert_eq!(read(&mut third, 1).await, "a");
        apply(&server, vec![Change::RemoveListener("l".into())]).await;
        draining(2, 1).await;
        drop((first, second));
        draining(1, 0).await;
        drop(third);
        draining(0, 0).await;
    }

    async fn a_removed_listener_refuses_and_ends_its_connections() {
        let a = origin("a").await;
        let server = server(2);
        let chain = format!("- {}", tcp_to("a"));
        apply(&server, vec![static_cluster("a", &[a], ""), tcp_listener("l", 0, &chain, "")]).await;
        let address = server.listener_address("l").expect("it has a socket");
        let mut stream = connect(&server, "l").await;
        assert_eq!(read(&mut stream, 1).await, "a");
        apply(&server, vec![Change::RemoveListener("l".into())]).await;
        assert_eq!(rest(&mut stream).await.unwrap_or_default(), b"");
        let refused = within(async {
            // The sockets close in the workers' own time.
            while TcpStream::connect(address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        });
        refused.await;
    }

    async fn a_port_in_use_is_named_and_the_rest_of_the_batch_works() {
        let a = origin("a").await;
        let server = server(1);
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = taken.local_addr().expect("it is bound").port();
        let chain = format!("- {}", tcp_to("a"));
        let results = server.apply(vec![
            static_cluster("a", &[a], ""),
            tcp_listener("bad", port, &chain, ""),
            tcp_listener("good", 0, &chain, ""),
        ]);
        let error = results[1].clone().expect_err("the port is taken").to_string();
        assert!(error.contains("listener bad") && error.contains(&format!("127.0.0.1:{port}")), "{error}");
        assert!(results[0].is_ok() && results[2].is_ok());
        assert_eq!(read(&mut connect(&server, "good").await, 1).await, "a");
    }

    async fn a_second_proxy_does_not_get_half_of_the_connections() {
        let a = origin("a").await;
        let (first, second) = (server(2), server(2));
        let chain = format!("- {}", tcp_to("a"));
        apply(&first, vec![static_cluster("a", &[a], ""), tcp_listener("l", 0, &chain, "")]).await;
        let port = first.listener_address("l").expect("it has a socket").port();
        let results = second.apply(vec![tcp_listener("m", port, &chain, "")]);
        let error = results[0].clone().expect_err("the port is taken").to_string();
        assert!(error.contains("listener m") && error.contains("another process has this port"), "{error}");
        // The first may open it again, in another listener and while its workers still hold it.
        let renamed = first.apply(vec![Change::RemoveListener("l".into()), tcp_listener("n", port, &chain, "")]);
        assert!(renamed.iter().all(Result::is_ok), "{renamed:?}");
        first.settled().await;
        assert_eq!(read(&mut connect(&first, "n").await, 1).await, "a");
    }

    async fn max_connections_is_exact_across_workers() {
        let a = origin("a").await;
        let server = server(2);
        let limit = "circuit_breakers: {thresholds: [{max_connections: 3}]}";
        let chain = format!("- {}", tcp_to("a"));
        apply(&server, vec![static_cluster("a", &[a], limit), tcp_listener("l", 0, &chain, "")]).await;
        let (mut served, mut refused) = (Vec::new(), 0);
        for _ in 0..10 {
            let mut stream = connect(&server, "l").await;
            let mut byte = [0];
            match within(stream.read(&mut byte)).await {
                Ok(1) => served.push(stream),
                _ => refused += 1,
            }
        }
        assert_eq!((served.len(), refused), (3, 7));
        assert_eq!(server.store.number("cluster.a.upstream_cx_overflow"), 7);
    }

    async fn the_inspectors_find_the_chain() {
        let (tls, http, other) = (origin("tls").await, origin("http").await, origin("tcp").await);
        let server = server(1);
        let chains = format!(
            "- filter_chain_match: {{transport_protocol: tls, server_names: [a.example]}}\n  {}\n\
             - filter_chain_match: {{transport_protocol: raw_buffer, application_protocols: [http/1.1]}}\n  {}\n\
             - filter_chain_match: {{transport_protocol: raw_buffer}}\n  {}",
            tcp_to("tls"), tcp_to("http"), tcp_to("other")
        );
        let inspectors = "listener_filters_timeout: 0s\nlistener_filters:\n\
            - {name: tls, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}\n\
            - {name: http, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector}}";
        apply(&server, vec![
            static_cluster("tls", &[tls], ""), static_cluster("http", &[http], ""),
            static_cluster("other", &[other], ""), tcp_listener("l", 0, &chains, inspectors),
        ]).await;
        // A ClientHello for a.example, as small as it can be.
        let mut hello = vec![3, 3];
        hello.extend([0; 32]);
        hello.extend([0, 0, 2, 0x13, 1, 1, 0, 0, 18, 0, 0, 0, 14, 0, 12, 0, 0, 9]);
        hello.extend(b"a.example");
        let mut record = vec![22, 3, 1, 0, hello.len() as u8 + 4, 1, 0, 0, hello.len() as u8];
        record.extend(hello);
        let other_name: Vec<u8> = record.iter().map(|&byte| if byte == b'x' { b'y' } else { byte }).collect();
        for (bytes, name) in [
            (&record[..], "tls"),
            (b"GET / HTTP/1.1\r\n", "http"),
            (b"* OK ready\r\n", "tcp"),
        ] {
            let mut stream = connect(&server, "l").await;
            for part in bytes.chunks(7) {
                stream.write_all(part).await.expect("it is open");
            }
            assert_eq!(read(&mut stream, name.len()).await, name);
            assert_eq!(read(&mut stream, bytes.len()).await.as_bytes(), bytes, "nothing was lost");
        }
        let mut stream = connect(&server, "l").await;
        stream.write_all(&other_name).await.expect("it is open");
        assert_eq!(rest(&mut stream).await.unwrap_or_default(), b"", "no chain takes it");
        stat(&server, "listener.127.0.0.1_0.no_filter_chain_match", 1).await;
    }

    async fn a_server_that_speaks_first_is_not_kept_waiting() {
        let a = origin("a").await;
        let server = server(1);
        let chain = format!("- {}", tcp_to("a"));
        let inspector = |more: &str| format!(
            "{more}\nlistener_filters:\n- name: http\n  typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector}}"
        );
        let disabled = format!(
            "{}\n  filter_disabled: {{destination_port_range: {{start: 1, end: 65535}}}}",
            inspector("listener_filters_timeout: 0s")
        );
        let timed = inspector("listener_filters_timeout: 0.05s\ncontinue_on_listener_filters_timeout: true");
        let closing = inspector("listener_filters_timeout: 0.05s");
        apply(&server, vec![
            static_cluster("a", &[a], ""),
            tcp_listener("disabled", 0, &chain, &disabled),
            tcp_listener("timed", 0, &chain, &timed),
            tcp_listener("closing", 0, &chain, &closing),
        ]).await;
        assert_eq!(read(&mut connect(&server, "disabled").await, 1).await, "a");
        assert_eq!(read(&mut connect(&server, "timed").await, 1).await, "a");
        assert_eq!(rest(&mut connect(&server, "closing").await).await.unwrap_or_default(), b"");
    }

    async fn names_are_resolved_before_the_first_request() {
        let a = origin("a").await;
        let extension = |more: &str| format!(
            "cluster_type: {{name: envoy.cluster.dns, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster, dns_lookup_family: V4_ONLY{more}}}}}"
        );
        for kind in [
            "type: STRICT_DNS\ndns_lookup_family: V4_ONLY".to_owned(),
            extension(""),
            extension(", all_addresses_in_single_endpoint: true"),
        ] {
            let server = server(1);
            let chain = format!("- {}", tcp_to("d"));
            apply(&server, vec![cluster(&format!(
                "name: d\n{kind}\nload_assignment:\n  cluster_name: d\n  endpoints:\n  - lb_endpoints:\n    - endpoint: {{address: {{socket_address: {{address: localhost, port_value: {a}}}}}}}"
            ))]).await;
            server.clusters_warmed(Duration::from_secs(10)).await;
            apply(&server, vec![tcp_listener("l", 0, &chain, "")]).await;
            assert_eq!(read(&mut connect(&server, "l").await, 1).await, "a", "{kind}");
        }
    }

    async fn a_tls_cluster_refuses_and_counts() {
        let server = server(1);
        let chain = format!("- {}", tcp_to("t"));
        let tls = "transport_socket:\n  name: tls\n  typed_config: {\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, common_tls_context: {tls_certificate_sds_secret_configs: [{name: default, sds_config: {api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: none}}]}}}]}}";
        apply(&server, vec![static_cluster("t", &[9], tls), tcp_listener("l", 0, &chain, "")]).await;
        assert_eq!(rest(&mut connect(&server, "l").await).await.unwrap_or_default(), b"");
        stat(&server, "cluster.t.client_ssl_socket_factory.upstream_context_secrets_not_ready", 1).await;
    }

    async fn tcp_connections_are_logged_and_reported() {
        let a = origin("a").await;
        let server = server(1);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let log = |format: &str| format!(
            "access_log: [{{name: file, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{text_format_source: {{inline_string: \"{format}\\n\"}}}}}}}}]",
            path.display()
        );
        let chain = format!(
            "- filter_chain_match: {{source_prefix_ranges: [{{address_prefix: 127.0.0.1, prefix_len: 32}}]}}\n  filters:\n  - {{name: istio.stats, typed_config: {{\"@type\": type.googleapis.com/stats.PluginConfig}}}}\n  \
             - name: tcp\n    typed_config:\n      \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy\n      \
             stat_prefix: a\n      cluster: a\n      {}",
            log("%PROTOCOL% %REQ(:METHOD)% %BYTES_RECEIVED% %BYTES_SENT% %UPSTREAM_CLUSTER% %RESPONSE_FLAGS%")
        );
        let more = log("listener %RESPONSE_FLAGS% %BYTES_SENT%");
        apply(&server, vec![static_cluster("a", &[a], ""), tcp_listener("l", 0, &chain, &more)]).await;
        let address = server.listener_address("l").expect("it has a socket");
        let mut stream = connect(&server, "l").await;
        assert_eq!(read(&mut stream, 1).await, "a");
        stream.write_all(b"hello").await.expect("it is open");
        assert_eq!(read(&mut stream, 5).await, "hello");
        stream.shutdown().await.expect("it is open");
        rest(&mut stream).await;
        stat(&server, "listener.127.0.0.1_0.downstream_cx_active", 0).await;
        let other = tokio::net::TcpSocket::new_v4().expect("a socket");
        other.bind("127.0.0.2:0".parse().expect("an address")).expect("loopback");
        rest(&mut other.connect(address).await.expect("it listens")).await;
        stat(&server, "listener.127.0.0.1_0.no_filter_chain_match", 1).await;
        // The end of the workers writes what is still in their buffers.
        server.shut_down();
        let lines = std::fs::read_to_string(&path).expect("it was written");
        assert_eq!(lines, "- - 5 6 a -\nlistener - 6\nlistener NR 0\n");
        let metrics = server.store.prometheus(&stats::Query::default());
        for metric in ["opened_total", "closed_total"] {
            let line = metrics.lines().find(|line| line.starts_with(&format!("istio_tcp_connections_{metric}{{")));
            let line = line.unwrap_or_else(|| panic!("{metric} is missing in {metrics}"));
            assert!(line.contains("request_protocol=\"tcp\"") && line.ends_with(" 1"), "{line}");
        }
        assert!(metrics.lines().any(|line| line.starts_with("istio_tcp_received_bytes_total{") && line.ends_with(" 5")));
        assert!(metrics.lines().any(|line| line.starts_with("istio_tcp_sent_bytes_total{") && line.ends_with(" 6")));
    }

    async fn exact_balance_spreads_connections() {
        let a = origin("a").await;
        let server = server(2);
        let chain = format!("- {}", tcp_to("a"));
        let balance = "connection_balance_config: {exact_balance: {}}";
        apply(&server, vec![static_cluster("a", &[a], ""), tcp_listener("l", 0, &chain, balance)]).await;
        let mut streams = Vec::new();
        for _ in 0..20 {
            let mut stream = connect(&server, "l").await;
            assert_eq!(read(&mut stream, 1).await, "a");
            streams.push(stream);
        }
        let loads: Vec<u64> = server.shared.workers.iter()
            .map(|load| load.load(std::sync::atomic::Ordering::Relaxed)).collect();
        assert_eq!(loads, [10, 10]);
    }
}
