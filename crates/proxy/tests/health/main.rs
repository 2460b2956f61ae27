//! Active health checks and outlier detection from the wire to the choice of hosts.

mod outliers;

use std::{cell::RefCell, path::Path, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use outrigger_proxy as proxy;
use proto::envoy::config;
use proxy::{
    plan::{Bootstrap, Cluster, Listener},
    server::{Change, Server},
    worker::Options,
};
use testkit::envoy::{hosts, message};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{LocalSet, spawn_local},
};

/// A proxy whose one listener sends everything to cluster `c`.
struct Mesh {
    server: Rc<Server>,
}

impl Mesh {
    async fn new(bootstrap: &str, cluster: &str, ports: &[u16]) -> Mesh {
        Self::with_filter(bootstrap, cluster, ports, "").await
    }

    async fn with_filter(bootstrap: &str, cluster: &str, ports: &[u16], filter: &str) -> Mesh {
        let filter = match filter {
            "" => String::new(),
            filter => format!("- {filter}"),
        };
        let listener = "name: l
address: {socket_address: {address: 127.0.0.1, port_value: 0}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: test
      route_config: {virtual_hosts: [{name: v, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: c}}]}]}
      http_filters:
      FILTER
      - name: router
        typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"
        .replace("FILTER", &filter);
        let cluster = format!(
            "name: c\ntype: STATIC\n{cluster}\nload_assignment: {{cluster_name: c, endpoints: [{{lb_endpoints: [{}]}}]}}",
            hosts(ports)
        );
        let bootstrap = message::<config::bootstrap::v3::Bootstrap>(bootstrap);
        let bootstrap = Bootstrap::try_from(&bootstrap).expect("the bootstrap is good");
        let settings = Options {
            file_flush_interval: Duration::from_millis(1),
            ..Options::default()
        };
        let server = Server::start(Arc::new(bootstrap), settings, stats::Store::default())
            .expect("it starts");
        let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&cluster));
        let plan = plan.unwrap_or_else(|error| panic!("{error}\n{cluster}"));
        let listener = Listener::try_from(&message::<config::listener::v3::Listener>(&listener));
        let changes = vec![
            Change::UpsertCluster(Arc::new(plan.into())),
            Change::UpsertListener(Arc::new(listener.expect("the listener is good"))),
        ];
        for result in server.apply(changes) {
            result.expect("it can be applied");
        }
        server.clusters_warmed(Duration::from_secs(10)).await;
        server.settled().await;
        Mesh { server }
    }

    /// The status of a `GET`, and the body.
    async fn get(&self) -> (u16, String) {
        let (head, body) = self.ask("/").await;
        let status = head.get(9..12).and_then(|status| status.parse().ok());
        (status.expect("it has a status"), body)
    }

    /// Head and body of the answer to a `GET`.
    async fn ask(&self, path: &str) -> (String, String) {
        self.ask_with(path, "").await
    }

    async fn ask_with(&self, path: &str, headers: &str) -> (String, String) {
        let address = self.server.listener_address("l").expect("it listens");
        let mut stream = TcpStream::connect(address).await.expect("it accepts");
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: h\r\n{headers}Connection: close\r\n\r\n");
        stream
            .write_all(request.as_bytes())
            .await
            .expect("it reads");
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        within(read).await.expect("it answers");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        (format!("{head}\r\n"), body.to_owned())
    }

    fn stat(&self, name: &str) -> i64 {
        self.server.store.number(&format!("cluster.c.{name}"))
    }

    /// How many hosts are used last.
    fn degraded(&self) -> usize {
        let cluster = self.server.cluster("c").expect("it is there");
        cluster.hosts().degraded()
    }

    /// Waits until a stat has reached a value, and until workers know what led to it.
    async fn stat_is(&self, name: &str, wanted: impl Fn(i64) -> bool) {
        until(|| wanted(self.stat(name))).await;
        self.server.settled().await;
    }
}

async fn until(mut what: impl FnMut() -> bool) {
    within(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it happens within 20 s")
}

fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, future);
}

/// An origin that answers `/check` with one text and everything else with another; both can be changed.
#[derive(Clone, Default)]
struct Origin {
    check: Rc<RefCell<String>>,
    other: Rc<RefCell<String>>,
    seen: Rc<RefCell<String>>,
    connections: Rc<RefCell<usize>>,
}

impl Origin {
    async fn start(&self) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let origin = self.clone();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                *origin.connections.borrow_mut() += 1;
                spawn_local(origin.clone().serve(stream));
            }
        });
        port
    }

    async fn serve(self, mut stream: TcpStream) {
        let mut data = Vec::new();
        while stream.read_buf(&mut data).await.is_ok_and(|n| n > 0) {
            while let Some(end) = data.windows(4).position(|window| window == b"\r\n\r\n") {
                let head: Vec<u8> = data.drain(..end + 4).collect();
                let head = String::from_utf8_lossy(&head).into_owned();
                let answer = if head.contains(" /check") {
                    *self.seen.borrow_mut() = head;
                    self.check.borrow().clone()
                } else {
                    self.other.borrow().clone()
                };
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    }
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const UNAVAILABLE: &str = "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n";

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("each line is JSON"))
        .collect()
}

const FAST: &str =
    "timeout: 2s, interval: 0.002s, no_traffic_interval: 0.002s, healthy_threshold: 2";

#[test]
fn a_host_serves_while_its_http_check_passes() {
    block_on(async {
        let origin = Origin::default();
        origin.check.replace(UNAVAILABLE.to_owned());
        origin.other.replace(OK.to_owned());
        let port = origin.start().await;
        let log = tempfile::tempdir().expect("a folder");
        let path = log.path().join("events");
        let cluster = format!(
            "common_lb_config: {{healthy_panic_threshold: {{value: 0}}}}\n\
             health_checks: [{{{FAST}, unhealthy_threshold: 3, event_log_path: {}, http_health_check: {{path: /check, \
             request_headers_to_add: [{{header: {{key: x-probe, value: 'yes'}}}}]}}}}]",
            path.display()
        );
        let mesh = Mesh::new("{}", &cluster, &[port]).await;
        assert_eq!(mesh.get().await, (503, "no healthy upstream".to_owned()));
        origin.check.replace(OK.to_owned());
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        assert_eq!(mesh.get().await, (200, "ok".to_owned()));
        let seen = origin.seen.borrow().to_ascii_lowercase();
        for part in [
            "get /check http/1.1",
            "host: c\r",
            "user-agent: envoy/hc\r",
            "x-probe: yes\r",
        ] {
            assert!(seen.contains(part), "{part}: {seen}");
        }
        // A wrong status needs no second.
        origin.check.replace(UNAVAILABLE.to_owned());
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        assert_eq!(mesh.get().await.0, 503);
        assert!(mesh.stat("health_check.attempt") >= mesh.stat("health_check.success"));
        assert_eq!(mesh.stat("health_check.network_failure"), 0);
        // One connection carried all the checks, another the request.
        assert_eq!(*origin.connections.borrow(), 2);
        let has = |events: &[serde_json::Value], name: &str| {
            events.iter().any(|event| !event[name].is_null())
        };
        until(|| has(&lines(&path), "eject_unhealthy_event")).await;
        let events = lines(&path);
        assert_eq!(events[0]["health_check_failure_event"]["first_check"], true);
        assert!(has(&events, "add_healthy_event"));
        assert_eq!(events[0]["health_checker_type"], "HTTP");
        assert_eq!(events[0]["host"]["socket_address"]["port_value"], port);
    });
}

#[test]
fn bodies_names_and_degraded_hosts() {
    block_on(async {
        let answer = |headers: &str, body: &str| {
            format!(
                "HTTP/1.1 200 OK\r\n{headers}content-length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        let origin = Origin::default();
        origin.other.replace(OK.to_owned());
        let port = origin.start().await;
        // "up" and then "well".
        let cluster = format!(
            "common_lb_config: {{healthy_panic_threshold: {{value: 0}}}}\n\
             health_checks: [{{{FAST}, unhealthy_threshold: 1, http_health_check: {{path: /check, host: name, \
             receive: [{{text: '7570'}}, {{text: '77656c6c'}}], service_name_matcher: {{prefix: svc}}}}}}]"
        );
        let named = "x-envoy-upstream-healthchecked-cluster: svc-1\r\n";
        origin.check.replace(answer(named, "well up"));
        let mesh = Mesh::new("{}", &cluster, &[port]).await;
        assert_eq!(mesh.get().await.0, 503, "the wrong order");
        origin.check.replace(answer(named, "it is up and well"));
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        assert_eq!(mesh.get().await.0, 200);
        assert!(origin.seen.borrow().contains("host: name\r"));
        origin.check.replace(answer("", "up well"));
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        let degraded = format!("{named}x-envoy-degraded: true\r\n");
        origin.check.replace(answer(&degraded, "up well"));
        mesh.stat_is("health_check.degraded", |n| n == 1).await;
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        assert_eq!(mesh.get().await.0, 200, "better than none");
    });
}

#[test]
fn a_host_can_say_itself_that_it_wants_no_traffic() {
    block_on(async {
        let origin = Origin::default();
        origin.check.replace(OK.to_owned());
        let leaving = "HTTP/1.1 200 OK\r\nx-envoy-immediate-health-check-fail: true\r\ncontent-length: 0\r\n\r\n";
        origin.other.replace(leaving.to_owned());
        let port = origin.start().await;
        // The next check comes late: what the host says must suffice.
        let cluster = "common_lb_config: {healthy_panic_threshold: {value: 0}}\n\
            health_checks: [{timeout: 2s, interval: 600s, no_traffic_interval: 600s, unhealthy_threshold: 1, \
            healthy_threshold: 1, http_health_check: {path: /check}}]";
        let mesh = Mesh::new("{}", cluster, &[port]).await;
        assert_eq!(mesh.get().await.0, 200);
        mesh.stat_is("health_check.passive_failure", |n| n == 1)
            .await;
        assert_eq!(mesh.get().await.0, 503);
    });
}

#[test]
fn a_tcp_check_sends_and_expects() {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let answer = Rc::new(RefCell::new("PONG"));
        let shared = answer.clone();
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answer = shared.clone();
                spawn_local(async move {
                    let mut ping = [0; 4];
                    while stream.read_exact(&mut ping).await.is_ok() {
                        assert_eq!(&ping, b"PING");
                        let answer = *answer.borrow();
                        // In two pieces, with something before.
                        let _ = stream.write_all(b"...").await;
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                });
            }
        });
        let cluster = "health_checks: [{timeout: 0.500s, interval: 0.002s, no_traffic_interval: 0.002s, \
            unhealthy_threshold: 2, healthy_threshold: 1, \
            tcp_health_check: {send: {text: '50494e47'}, receive: [{text: '504f4e47'}]}}]";
        let mesh = Mesh::new("{}", cluster, &[port]).await;
        assert_eq!(mesh.stat("health_check.healthy"), 1);
        answer.replace("WHAT");
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        assert!(mesh.stat("health_check.network_failure") >= 2);
        answer.replace("PONG");
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
    });
}

#[test]
fn a_check_has_a_transport_stats_and_headers_of_its_own() {
    block_on(async {
        let tls = "\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
        let raw = "\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";
        let add = |name: &str, action: &str| {
            format!("{{header: {{key: {name}, value: ours}}, append_action: {action}}}")
        };
        let cluster = format!(
            "transport_socket: {{name: tls, typed_config: {{{tls}}}}}\n\
             transport_socket_matches: [{{name: plain, match: {{for: checks}}, transport_socket: {{name: raw, typed_config: {{{raw}}}}}}}]\n\
             health_checks: [{{{FAST}, unhealthy_threshold: 3, name: mine, transport_socket_match_criteria: {{for: checks}}, \
             http_health_check: {{path: /check, request_headers_to_add: [{}, {}, {}, {}]}}}}]",
            add("user-agent", "ADD_IF_ABSENT"),
            add("x-absent", "OVERWRITE_IF_EXISTS"),
            add("x-added", "ADD_IF_ABSENT"),
            add("x-forwarded-proto", "OVERWRITE_IF_EXISTS"),
        );
        let origin = Origin::default();
        origin.check.replace(OK.to_owned());
        let mesh = Mesh::new("{}", &cluster, &[origin.start().await]).await;
        let own = "health_check.name.mine.health_check";
        mesh.stat_is(&format!("{own}.healthy"), |n| n == 1).await;
        assert!(mesh.stat(&format!("{own}.success")) > 0);
        assert_eq!(mesh.stat("health_check.attempt"), 0);
        let seen = origin.seen.borrow().to_ascii_lowercase();
        for part in [
            "user-agent: envoy/hc\r",
            "x-added: ours\r",
            "x-forwarded-proto: ours\r",
        ] {
            assert!(seen.contains(part), "{part}: {seen}");
        }
        assert!(!seen.contains("x-absent"), "{seen}");
    });
}

#[test]
fn a_tcp_check_begins_with_a_proxy_header_where_it_should() {
    block_on(async {
        for version in ["V1", "V2"] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let port = listener.local_addr().expect("it is bound").port();
            spawn_local(async move {
                while let Ok((mut stream, peer)) = listener.accept().await {
                    let header = match version {
                        "V1" => {
                            format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {port}\r\n", peer.port())
                                .into_bytes()
                        }
                        // LOCAL.
                        _ => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec(),
                    };
                    spawn_local(async move {
                        let mut first = vec![0; header.len()];
                        stream.read_exact(&mut first).await.expect("it comes");
                        assert_eq!(first, header);
                        // Once for each connection, which then serves all checks.
                        let mut ping = [0; 4];
                        while stream.read_exact(&mut ping).await.is_ok() {
                            assert_eq!(&ping, b"PING");
                            let _ = stream.write_all(b"PONG").await;
                        }
                    });
                }
            });
            let cluster = format!(
                "health_checks: [{{{FAST}, unhealthy_threshold: 1, tcp_health_check: {{send: {{text: '50494e47'}}, \
                 receive: [{{text: '504f4e47'}}], proxy_protocol_config: {{version: {version}}}}}}}]"
            );
            let mesh = Mesh::new("{}", &cluster, &[port]).await;
            mesh.stat_is("health_check.success", |n| n >= 5).await;
            assert_eq!(mesh.stat("health_check.healthy"), 1);
            assert_eq!(mesh.stat("health_check.failure"), 0);
        }
    });
}

#[test]
fn a_grpc_check_asks_for_a_service() {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let status = Rc::new(RefCell::new(1u8));
        let shared = status.clone();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let status = shared.clone();
                spawn_local(async move {
                    let mut server = h2::server::handshake(stream)
                        .await
                        .expect("it speaks HTTP/2");
                    while let Some(Ok((request, mut respond))) = server.accept().await {
                        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                        assert_eq!(request.uri().host(), Some("authority"));
                        let status = *status.borrow();
                        spawn_local(async move {
                            let mut body = request.into_body();
                            let asked = body.data().await.expect("a message").expect("it comes");
                            assert_eq!(&asked[..], b"\0\0\0\0\x05\x0a\x03svc");
                            let head = http::Response::builder()
                                .header("content-type", "application/grpc");
                            let mut stream = respond
                                .send_response(head.body(()).expect("a head"), false)
                                .expect("it is open");
                            let frame = Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 8, status]);
                            stream.send_data(frame, false).expect("it is open");
                            let mut trailers = http::HeaderMap::new();
                            trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                            stream.send_trailers(trailers).expect("it is open");
                        });
                    }
                });
            }
        });
        let cluster = format!(
            "health_checks: [{{{FAST}, unhealthy_threshold: 3, grpc_health_check: \
             {{service_name: svc, authority: authority}}}}]"
        );
        let mesh = Mesh::new("{}", &cluster, &[port]).await;
        assert_eq!(mesh.stat("health_check.healthy"), 1);
        // NOT_SERVING.
        status.replace(2);
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        status.replace(1);
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        assert_eq!(mesh.stat("health_check.network_failure"), 0);
    });
}

#[test]
fn a_check_expects_the_statuses_that_are_named() {
    block_on(async {
        let origin = Origin::default();
        let says = |status: &str| {
            let answer = format!("HTTP/1.1 {status} Is\r\ncontent-length: 0\r\n\r\n");
            origin.check.replace(answer)
        };
        says("204");
        let port = origin.start().await;
        let cluster = format!(
            "health_checks: [{{{FAST}, unhealthy_threshold: 3, http_health_check: {{path: /check, expected_statuses: \
             [{{start: 200, end: 201}}, {{start: 429, end: 431}}], retriable_statuses: [{{start: 500, end: 501}}]}}}}]"
        );
        let mesh = Mesh::new("{}", &cluster, &[port]).await;
        assert_eq!(mesh.stat("health_check.healthy"), 0);
        for (status, healthy) in [
            ("200", 1),
            ("431", 0),
            ("430", 1),
            ("201", 0),
            ("429", 1),
            ("500", 0),
        ] {
            says(status);
            mesh.stat_is("health_check.healthy", |n| n == healthy).await;
        }
        // A status that may be a matter of the moment takes as many failures as no answer does.
        says("200");
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        let before = mesh.stat("health_check.failure");
        says("500");
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        assert!(mesh.stat("health_check.failure") >= before + 3);
    });
}

#[test]
fn a_check_speaks_http2_where_it_should() {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let status = Rc::new(RefCell::new(200));
        let shared = status.clone();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let status = shared.clone();
                spawn_local(async move {
                    let mut server = h2::server::handshake(stream)
                        .await
                        .expect("it speaks HTTP/2");
                    while let Some(Ok((request, mut respond))) = server.accept().await {
                        assert_eq!(request.uri().path(), "/check");
                        let head = http::Response::builder().status(*status.borrow());
                        respond
                            .send_response(head.body(()).expect("a head"), true)
                            .expect("it is open");
                    }
                });
            }
        });
        let cluster = format!(
            "health_checks: [{{{FAST}, unhealthy_threshold: 3, http_health_check: {{path: /check, codec_client_type: HTTP2}}}}]"
        );
        let mesh = Mesh::new("{}", &cluster, &[port]).await;
        assert_eq!(mesh.stat("health_check.healthy"), 1);
        status.replace(503);
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        status.replace(200);
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        assert_eq!(mesh.stat("health_check.network_failure"), 0);
    });
}

/// A port where nobody listens.
const FILTER: &str = "{name: hc, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck";

#[test]
fn the_filter_answers_checks_of_this_proxy() {
    block_on(async {
        let origin = Origin::default();
        origin.check.replace(OK.to_owned());
        origin.other.replace(OK.to_owned());
        let port = origin.start().await;
        let filter = format!(
            "{FILTER}, pass_through_mode: false, cluster_min_healthy_percentages: {{c: {{value: 50}}}}, \
             headers: [{{name: ':path', string_match: {{exact: /check}}}}]}}}}"
        );
        let cluster = format!(
            "health_checks: [{{{FAST}, unhealthy_threshold: 1, http_health_check: {{path: /check}}}}]"
        );
        let bootstrap = "node: {id: n, cluster: us}";
        let mesh = Mesh::with_filter(bootstrap, &cluster, &[port], &filter).await;
        let (head, _) = mesh.ask("/check").await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(
            head.contains("x-envoy-upstream-healthchecked-cluster: us\r\n"),
            "{head}"
        );
        assert!(!mesh.ask("/").await.0.contains("healthchecked-cluster"));
        origin.check.replace(UNAVAILABLE.to_owned());
        mesh.stat_is("health_check.healthy", |n| n == 0).await;
        assert!(mesh.ask("/check").await.0.starts_with("HTTP/1.1 503"));
        origin.check.replace(OK.to_owned());
        mesh.stat_is("health_check.healthy", |n| n == 1).await;
        mesh.server.fail_health_check(true);
        assert!(mesh.ask("/check").await.0.starts_with("HTTP/1.1 503"));
        let (head, body) = mesh.ask("/").await;
        assert!(
            head.contains("x-envoy-immediate-health-check-fail: true\r\n"),
            "{head}"
        );
        assert_eq!(body, "ok");
    });
}

#[test]
fn the_filter_passes_checks_on_and_remembers_the_answer() {
    block_on(async {
        let origin = Origin::default();
        origin.check.replace(OK.to_owned());
        let port = origin.start().await;
        let filter = format!(
            "{FILTER}, pass_through_mode: true, cache_time: 600s, \
             headers: [{{name: ':path', string_match: {{exact: /check}}}}]}}}}"
        );
        let mesh = Mesh::with_filter("{}", "", &[port], &filter).await;
        assert_eq!(mesh.ask("/check").await.1, "ok");
        origin.check.replace(UNAVAILABLE.to_owned());
        let (head, body) = mesh.ask("/check").await;
        assert!(
            head.starts_with("HTTP/1.1 200") && body.is_empty(),
            "{head}"
        );
    });
}

#[test]
fn a_header_names_the_original_destination() {
    block_on(async {
        let origin = Origin::default();
        origin.other.replace(OK.to_owned());
        let port = origin.start().await;
        let mesh = Mesh::new("{}", "", &[port]).await;
        let cluster = "name: c\ntype: ORIGINAL_DST\nlb_policy: CLUSTER_PROVIDED\n\
            original_dst_lb_config: {use_http_header: true}";
        let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(cluster));
        let change = Change::UpsertCluster(Arc::new(plan.expect("it is good").into()));
        for result in mesh.server.apply(vec![change]) {
            result.expect("it can be applied");
        }
        mesh.server.settled().await;
        let named = format!("x-envoy-original-dst-host: 127.0.0.1:{port}\r\n");
        assert_eq!(mesh.ask_with("/", &named).await.1, "ok");
        let (head, _) = mesh
            .ask_with("/", "x-envoy-original-dst-host: nowhere\r\n")
            .await;
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        assert!(mesh.stat("original_dst_host_invalid") >= 1);
    });
}

#[test]
fn requests_are_dropped_to_relieve_a_cluster() {
    block_on(async {
        let origin = Origin::default();
        let port = origin.start().await;
        let endpoints = format!(
            "{{cluster_name: c, policy: {{drop_overloads: [{{category: x, drop_percentage: {{numerator: 100}}}}]}}, endpoints: \
             [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"
        );
        let mesh = Mesh::new("{}", "", &[port]).await;
        let cluster = format!("name: c\ntype: STATIC\nload_assignment: {endpoints}");
        let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&cluster));
        for result in mesh.server.apply(vec![Change::UpsertCluster(Arc::new(
            plan.expect("good").into(),
        ))]) {
            result.expect("it can be applied");
        }
        mesh.server.settled().await;
        let (head, body) = mesh.ask("/").await;
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        assert!(head.contains("x-envoy-drop-overload: true\r\n"), "{head}");
        assert_eq!(body, "drop overload");
        assert_eq!(mesh.stat("upstream_rq_drop_overload"), 1);
    });
}
