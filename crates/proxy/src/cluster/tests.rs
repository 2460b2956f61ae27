//! Choosing hosts, keeping them over changes, and pools against real sockets.

mod lb;

use std::{collections::BTreeMap, time::Instant};

use outrigger_http::{Framing, Method, RequestHead, Version};
use prost::Message;
use proto::envoy::config;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::{LocalSet, spawn_local},
};

use super::{registry::Registry, *};
use crate::{
    plan::{ClusterLoadAssignment, LazyCluster},
    worker::WorkerChange,
};

pub(super) fn plan(yaml: &str) -> Arc<LazyCluster> {
    let message: config::cluster::v3::Cluster =
        proto::json::from_yaml(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    let plan = Plan::try_from(&message).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    Arc::new(LazyCluster::later(plan, message.encode_to_vec().into()))
}

/// A host `10.0.0.1:PORT` in no cluster.
pub(super) fn host(port: u16) -> Arc<Host> {
    Arc::new(Host {
        shared: Arc::new(HostShared::new()),
        address: Address::Socket(([10, 0, 0, 1], port).into()),
        additional_addresses: Vec::new(),
        hostname: "".into(),
        locality: Arc::default(),
        priority: 0,
        weight: 1,
        health: HealthStatus::Healthy,
        metadata: Default::default(),
        transport: crate::plan::cluster::UpstreamTransport::RawBuffer,
        health_check: None,
    })
}

fn eds(more: &str) -> Arc<LazyCluster> {
    plan(&format!(
        "name: c\ntype: EDS\neds_cluster_config: {{eds_config: {{ads: {{}}}}}}\n{more}"
    ))
}

fn assignment(endpoints: &str) -> Arc<ClusterLoadAssignment> {
    let yaml = format!("cluster_name: c\nendpoints:\n{endpoints}");
    let message: config::endpoint::v3::ClusterLoadAssignment =
        proto::json::from_yaml(&yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    Arc::new(ClusterLoadAssignment::try_from(&message).expect("the test's endpoints are good"))
}

/// One group of endpoints `10.0.0.N`, each with more fields.
fn group(header: &str, hosts: &[(u16, &str)]) -> String {
    let host = |(number, more): &(u16, &str)| {
        format!(
            "  - {{endpoint: {{address: {{socket_address: {{address: 10.0.0.{number}, port_value: 80}}}}}}{more}}}\n"
        )
    };
    format!(
        "- {header}\n  lb_endpoints:\n{}",
        hosts.iter().map(host).collect::<String>()
    )
}

pub(super) struct Bench {
    registry: Registry,
    pub(super) clusters: Clusters,
    reports: mpsc::UnboundedReceiver<Report>,
    store: ::stats::Store,
}

impl Bench {
    pub(super) fn new(plan: Arc<LazyCluster>) -> Self {
        let store = ::stats::Store::default();
        let (sender, reports) = mpsc::unbounded_channel();
        let clusters = Clusters::new(
            store.stats(),
            Rc::new(Random::seeded(1)),
            sender,
            Arc::default(),
        );
        let mut bench = Self {
            registry: Registry::default(),
            clusters,
            reports,
            store,
        };
        let changes = bench.registry.upsert(plan, Instant::now());
        bench.tell(changes);
        bench
    }

    fn tell(&self, changes: Vec<WorkerChange>) {
        for change in changes {
            match change {
                WorkerChange::Cluster(entry) => self.clusters.upsert(entry),
                WorkerChange::Hosts(entry) => self.clusters.set_hosts(entry),
                WorkerChange::HostsFailed(entry, failed) => {
                    self.clusters.hosts_failed(&entry.plan.name, &failed);
                    self.clusters.set_hosts(entry);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn assign(&mut self, endpoints: &str) {
        let changes = self.registry.assign(assignment(endpoints));
        self.tell(changes);
    }

    fn cluster(&self) -> Rc<Cluster> {
        self.clusters.find("c").expect("it is there")
    }

    /// How often each host is chosen, by the last part of its address.
    fn spread(&self, count: u32, context: &LbContext<'_>) -> BTreeMap<u8, u32> {
        let cluster = self.cluster();
        let mut chosen = BTreeMap::new();
        for _ in 0..count {
            if let Ok(host) = cluster.choose(context) {
                *chosen.entry(number(&host)).or_default() += 1;
            }
        }
        chosen
    }
}

fn number(host: &Host) -> u8 {
    match host.address.ip() {
        Some(std::net::IpAddr::V4(ip)) => ip.octets()[3],
        other => panic!("{other:?}"),
    }
}

const ANY: LbContext<'static> = LbContext {
    metadata_match: None,
    override_host: None,
    hash: None,
    original_dst: None,
    avoid: &[],
    avoid_priorities: 0,
    omit: None,
    avoid_attempts: 0,
    priority: Priority::Default,
    downstream_connection: 0,
    preferred: (&[], 0),
    downstream: None,
    source: None,
    alpn: None,
    auto_name: None,
    fresh: false,
};

/// What ten thousand clusters cost depends on this.
#[test]
fn a_cluster_that_nobody_asks_for_is_its_encoding() {
    let mut bench = Bench::new(eds("lb_policy: ROUND_ROBIN"));
    let entry = |bench: &Bench| bench.registry.find("c").expect("it is there").clone();
    let rests = |bench: &Bench| entry(bench).plan.made().is_none();
    let members = |bench: &mut Bench| -> Vec<_> {
        let all = bench.registry.memberships();
        all.iter()
            .map(|m| (m.hosts.total, m.hosts.healthy, m.changes))
            .collect()
    };
    assert_eq!(members(&mut bench), [(0, 0, 0)]);
    bench.assign(&group("priority: 0", &[(1, ", health_status: UNHEALTHY")]));
    assert_eq!(members(&mut bench), [(1, 0, 1)]);
    bench.assign(&group("priority: 0", &[(1, "")]));
    assert_eq!(members(&mut bench), [(1, 1, 0)], "no host came or went");
    // A look shows the hosts and leaves the cluster at rest.
    let (plan, hosts) = entry(&bench).look();
    assert_eq!((&*plan.name, hosts.hosts().len()), ("c", 1));
    assert!(rests(&bench));
    assert_eq!(bench.spread(1, &ANY), BTreeMap::from([(1, 1)]));
    assert!(!rests(&bench));
    // Whoever uses it keeps the facts of its hosts over a change.
    let id = |bench: &Bench| bench.cluster().hosts().hosts()[0].shared.id;
    let before = id(&bench);
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    assert_eq!(id(&bench), before);
    assert_eq!(members(&mut bench), [(2, 2, 1)]);
}

/// So does it of a mesh's clusters, which have TLS.
#[test]
fn a_cluster_at_rest_says_what_its_tls_needs() {
    let plan = plan(
        "name: c\ntype: EDS\neds_cluster_config: {eds_config: {ads: {}}}\ntransport_socket: {name: t, typed_config: \
         {'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, common_tls_context: \
         {tls_certificate_sds_secret_configs: [{name: default, sds_config: {ads: {}}}]}}}",
    );
    assert!(plan.made().is_none());
    let names: Vec<_> = plan.secrets().map(|s| &*s.name).collect();
    assert_eq!(names, ["default"]);
    assert_eq!(plan.needs().len(), 1);
}

#[test]
fn round_robin_is_even_and_follows_weights() {
    let mut bench = Bench::new(eds("lb_policy: ROUND_ROBIN"));
    bench.assign(&group("priority: 0", &[(1, ""), (2, ""), (3, "")]));
    assert_eq!(
        bench.spread(300, &ANY),
        BTreeMap::from([(1, 100), (2, 100), (3, 100)])
    );
    bench.assign(&group(
        "priority: 0",
        &[(1, ", load_balancing_weight: 3"), (2, "")],
    ));
    let spread = bench.spread(400, &ANY);
    assert!((299..=301).contains(&spread[&1]), "{spread:?}");
}

#[test]
fn least_request_prefers_the_idle() {
    let mut bench = Bench::new(eds("lb_policy: LEAST_REQUEST"));
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    let cluster = bench.cluster();
    let busy = cluster.hosts().hosts()[0].clone();
    let held: Vec<_> = (0..5)
        .map(|_| cluster.request(&busy, &ANY).expect("no limit"))
        .collect();
    let spread = bench.spread(1000, &ANY);
    // The busy one is taken only when both draws fall on it.
    assert!((150..350).contains(&spread[&1]), "{spread:?}");
    drop(held);
    assert!((400..600).contains(&bench.spread(1000, &ANY)[&1]));
}

#[test]
fn least_request_follows_weights() {
    let mut bench = Bench::new(eds("lb_policy: LEAST_REQUEST"));
    bench.assign(&group(
        "priority: 0",
        &[(1, ", load_balancing_weight: 4"), (2, "")],
    ));
    let spread = bench.spread(1000, &ANY);
    assert!((780..820).contains(&spread[&1]), "{spread:?}");
}

#[test]
fn only_healthy_hosts_are_chosen_and_panic_only_where_allowed() {
    let down = [
        (1, ", health_status: UNHEALTHY"),
        (2, ", health_status: DRAINING"),
        (3, ""),
    ];
    let none = [
        (1, ", health_status: UNHEALTHY"),
        (2, ", health_status: DRAINING"),
    ];
    let no_panic = "common_lb_config: {healthy_panic_threshold: {value: 0}}";
    let mut bench = Bench::new(eds(no_panic));
    bench.assign(&group("priority: 0", &down));
    assert_eq!(bench.spread(30, &ANY), BTreeMap::from([(3, 30)]));
    bench.assign(&group("priority: 0", &none));
    assert_eq!(
        bench.cluster().choose(&ANY).err(),
        Some(UpstreamError::NoHealthyHost)
    );
    // Envoy's default: under 50 % all hosts are used.
    let mut bench = Bench::new(eds(""));
    bench.assign(&group("priority: 0", &down));
    assert_eq!(bench.spread(30, &ANY).len(), 3);
}

#[test]
fn the_next_priority_takes_what_the_first_cannot() {
    let mut bench = Bench::new(eds(
        "common_lb_config: {healthy_panic_threshold: {value: 0}}",
    ));
    let second = group("priority: 1", &[(9, "")]);
    let mut first: Vec<(u16, &str)> = vec![(1, ""), (2, "")];
    bench.assign(&(group("priority: 0", &first) + &second));
    assert_eq!(bench.spread(100, &ANY).get(&9), None);
    // One of two: 50 % times 140 % is 70 %.
    first[0].1 = ", health_status: UNHEALTHY";
    bench.assign(&(group("priority: 0", &first) + &second));
    let spread = bench.spread(1000, &ANY);
    assert!(
        (250..350).contains(&spread[&9]) && !spread.contains_key(&1),
        "{spread:?}"
    );
    first[1].1 = ", health_status: UNHEALTHY";
    bench.assign(&(group("priority: 0", &first) + &second));
    assert_eq!(bench.spread(100, &ANY), BTreeMap::from([(9, 100)]));
}

#[test]
fn localities_share_by_weight() {
    let mut bench = Bench::new(eds("common_lb_config: {locality_weighted_lb_config: {}}"));
    let near = "locality: {zone: a}\n  load_balancing_weight: 80";
    let far = "locality: {zone: b}\n  load_balancing_weight: 20";
    bench.assign(&(group(near, &[(1, ""), (2, "")]) + &group(far, &[(3, "")])));
    let spread = bench.spread(2000, &ANY);
    // Within five standard deviations of 400.
    assert!((311..489).contains(&spread[&3]), "{spread:?}");
}

#[test]
fn hashes_stay_with_their_host() {
    for policy in ["RING_HASH", "MAGLEV"] {
        let mut bench = Bench::new(eds(&format!("lb_policy: {policy}")));
        let hosts: Vec<(u16, &str)> = (1..=5).map(|number| (number, "")).collect();
        bench.assign(&group("priority: 0", &hosts));
        let choose = |bench: &Bench| -> Vec<u8> {
            (0..2000u64)
                .map(|key| {
                    let hash = Some(shared_hash(&key.to_le_bytes()));
                    let context = LbContext { hash, ..ANY };
                    number(&bench.cluster().choose(&context).expect("it has hosts"))
                })
                .collect()
        };
        let before = choose(&bench);
        assert_eq!(before, choose(&bench), "{policy}");
        for host in 1..=5 {
            let share = before.iter().filter(|&&chosen| chosen == host).count();
            assert!(
                (250..550).contains(&share),
                "{policy}: host {host} has {share}"
            );
        }
        // Without one host most keys of the others stay: a ring of a minimum size gives its points to the rest.
        bench.assign(&group("priority: 0", &hosts[..4]));
        let after = choose(&bench);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(old, new)| **old != 5 && old != new)
            .count();
        assert!(moved < 300, "{policy}: {moved} moved");
    }
}

#[test]
fn a_host_keeps_its_identity_while_its_address_stays() {
    let mut bench = Bench::new(eds(""));
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    let before = bench.cluster().hosts().hosts()[0].shared.id;
    bench.assign(&group(
        "priority: 0",
        &[(3, ""), (1, ", load_balancing_weight: 7")],
    ));
    let set = bench.cluster().hosts();
    assert_eq!(
        (set.hosts()[1].shared.id, set.hosts()[1].weight),
        (before, 7)
    );
    // A new version of the cluster keeps the endpoints that EDS gave to the old one.
    let plan = eds("connect_timeout: 3s");
    let changes = bench.registry.upsert(plan, Instant::now());
    bench.tell(changes);
    assert_eq!(bench.cluster().hosts().hosts()[1].shared.id, before);
}

#[test]
fn tried_hosts_are_avoided_while_others_are_left() {
    let mut bench = Bench::new(eds("lb_policy: ROUND_ROBIN"));
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    let tried = [bench.cluster().hosts().hosts()[0].clone()];
    let context = LbContext {
        avoid: &tried,
        avoid_attempts: 3,
        ..ANY
    };
    assert_eq!(bench.spread(50, &context), BTreeMap::from([(2, 50)]));
    bench.assign(&group("priority: 0", &[(1, "")]));
    assert_eq!(
        bench.spread(5, &context),
        BTreeMap::from([(1, 5)]),
        "better that one than none"
    );
}

#[test]
fn errors_in_a_row_put_a_host_aside_within_the_limit() {
    let outlier =
        "outlier_detection: {consecutive_5xx: 3, max_ejection_percent: 50, base_ejection_time: 5s}";
    let mut bench = Bench::new(eds(&format!("{outlier}\nlb_policy: ROUND_ROBIN")));
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    let cluster = bench.cluster();
    let hosts = cluster.hosts().hosts().to_vec();
    for status in [500, 500, 200, 500, 503] {
        cluster.report(&hosts[0], Outcome::Status(status));
    }
    assert!(bench.reports.try_recv().is_err(), "never three in a row");
    for host in &hosts {
        cluster.report(host, Outcome::Status(500));
        cluster.report(host, Outcome::Timeout);
        cluster.report(host, Outcome::Reset);
    }
    let (now, mut ejected) = (Instant::now(), Vec::new());
    while let Ok(Report::Failing {
        cluster,
        host,
        reason,
    }) = bench.reports.try_recv()
    {
        let (changes, _) = bench.registry.failing(&cluster, host, reason, now);
        if !changes.is_empty() {
            bench.tell(changes);
            ejected.push(host);
        }
    }
    assert_eq!(ejected, [hosts[0].shared.id], "half of two is one");
    assert_eq!(bench.spread(10, &ANY), BTreeMap::from([(2, 10)]));
    // The end of the interval that follows the end of its time.
    let later = now + Duration::from_secs(10);
    assert_eq!(bench.registry.next_tick().map(|at| at <= later), Some(true));
    for (_, changes, _) in bench.registry.tick(later) {
        bench.tell(changes);
    }
    assert_eq!(bench.spread(10, &ANY).len(), 2);
}

#[test]
fn retries_have_a_limit_or_a_budget() {
    let bench = Bench::new(eds("circuit_breakers: {thresholds: [{max_retries: 2}]}"));
    let cluster = bench.cluster();
    let held: Vec<_> = (0..5)
        .filter_map(|_| cluster.retry(Priority::Default))
        .collect();
    assert_eq!(held.len(), 2);
    assert_eq!(
        bench.store.number("cluster.c.upstream_rq_retry_overflow"),
        3
    );
    let budget = "circuit_breakers: {thresholds: [{max_retries: 0, retry_budget: {budget_percent: {value: 20}, min_retry_concurrency: 3}}]}";
    let bench = Bench::new(eds(budget));
    let cluster = bench.cluster();
    assert_eq!(
        (0..9)
            .filter_map(|_| cluster.retry(Priority::Default))
            .collect::<Vec<_>>()
            .len(),
        3
    );
}

/// A server that answers each line with its own connection's number, and closes after `lines` lines.
async fn origin(lines: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    spawn_local(async move {
        let mut number = 0u8;
        while let Ok((mut stream, _)) = listener.accept().await {
            number += 1;
            spawn_local(async move {
                let mut byte = [0];
                for _ in 0..lines {
                    if stream.read_exact(&mut byte).await.is_err() {
                        return;
                    }
                    let _ = stream.write_all(&[number]).await;
                }
            });
        }
    });
    port
}

fn static_plan(port: u16, more: &str) -> Arc<LazyCluster> {
    plan(&format!(
        "name: c\ntype: STATIC\n{more}\nload_assignment: {{cluster_name: c, endpoints: [{{lb_endpoints: [{{endpoint: \
         {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"
    ))
}

async fn ask(connection: &mut Http1) -> u8 {
    let upstream = connection.connection.io();
    upstream.write_all(b"?").await.expect("it is open");
    let mut answer = [0];
    upstream.read_exact(&mut answer).await.expect("it answers");
    answer[0]
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("it builds");
    LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(10), future)
            .await
            .expect("it ends within 10 s")
    })
}

#[test]
fn a_connection_is_used_again_until_it_has_served_its_number() {
    block_on(async {
        let port = origin(100).await;
        let limit = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
            {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
            explicit_http_config: {http_protocol_options: {}}, common_http_protocol_options: {max_requests_per_connection: 3}}}";
        let bench = Bench::new(static_plan(port, limit));
        let cluster = bench.cluster();
        let host = cluster.choose(&ANY).expect("it has a host");
        let mut answers = Vec::new();
        for _ in 0..5 {
            let mut connection = cluster.http1(&host, &ANY).await.expect("it connects");
            answers.push((ask(&mut connection).await, connection.is_reused()));
            connection.release();
        }
        assert_eq!(
            answers,
            [(1, false), (1, true), (1, true), (2, false), (2, true)]
        );
        assert_eq!(bench.store.number("cluster.c.upstream_cx_total"), 2);
        assert_eq!(bench.store.number("cluster.c.upstream_cx_max_requests"), 1);
        assert_eq!(bench.store.number("cluster.c.upstream_cx_active"), 1);
        // One that is dropped within an exchange is never seen again.
        drop(cluster.http1(&host, &ANY).await.expect("it is there"));
        assert_eq!(bench.store.number("cluster.c.upstream_cx_active"), 0);
    });
}

#[test]
fn a_connection_that_its_peer_closed_is_not_handed_out() {
    block_on(async {
        let port = origin(1).await;
        let bench = Bench::new(static_plan(port, ""));
        let cluster = bench.cluster();
        let host = cluster.choose(&ANY).expect("it has a host");
        let mut connection = cluster.http1(&host, &ANY).await.expect("it connects");
        assert_eq!(ask(&mut connection).await, 1);
        connection.release();
        while bench.store.number("cluster.c.upstream_cx_active") == 1 {
            // The origin closes after its answer; the sweep sees it once the kernel has told us.
            tokio::time::sleep(Duration::from_millis(1)).await;
            bench.clusters.sweep();
        }
        let mut connection = cluster.http1(&host, &ANY).await.expect("it connects");
        assert!(!connection.is_reused());
        assert_eq!(ask(&mut connection).await, 2);
    });
}

#[test]
fn who_finds_no_room_waits_for_the_next_connection() {
    block_on(async {
        let port = origin(100).await;
        let limit =
            "circuit_breakers: {thresholds: [{max_connections: 1, max_pending_requests: 1}]}";
        let bench = Bench::new(static_plan(port, limit));
        let cluster = bench.cluster();
        let host = cluster.choose(&ANY).expect("it has a host");
        let first = cluster.http1(&host, &ANY).await.expect("it connects");
        let waiting = spawn_local({
            let (cluster, host) = (cluster.clone(), host.clone());
            async move {
                cluster
                    .http1(&host, &ANY)
                    .await
                    .expect("it gets the first one's")
                    .is_reused()
            }
        });
        tokio::task::yield_now().await;
        assert_eq!(
            bench.store.number("cluster.c.upstream_rq_pending_active"),
            1
        );
        let overflow = cluster.http1(&host, &ANY).await.err();
        assert_eq!(
            overflow,
            Some(UpstreamError::Overflow("max_pending_requests"))
        );
        first.release();
        assert!(waiting.await.expect("it ends well"));
        assert_eq!(bench.store.number("cluster.c.upstream_cx_total"), 1);
        assert_eq!(
            bench.store.number("cluster.c.upstream_rq_pending_active"),
            0
        );
    });
}

#[test]
fn http2_requests_share_a_connection_up_to_its_limit() {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                spawn_local(async move {
                    let mut server = h2::server::handshake(stream)
                        .await
                        .expect("it speaks HTTP/2");
                    while let Some(Ok((_, mut respond))) = server.accept().await {
                        let answer = ::http::Response::new(());
                        let _ = respond.send_response(answer, true);
                    }
                });
            }
        });
        let two = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
            {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
            explicit_http_config: {http2_protocol_options: {max_concurrent_streams: 2}}}}";
        let bench = Bench::new(static_plan(port, two));
        let cluster = bench.cluster();
        assert!(cluster.speaks_http2(false));
        let host = cluster.choose(&ANY).expect("it has a host");
        // All at once: the second waits for the first one's connection, the third needs another.
        let (one, two, three) = tokio::join!(
            cluster.http2(&host, &ANY),
            cluster.http2(&host, &ANY),
            cluster.http2(&host, &ANY)
        );
        let mut places = [one, two, three].map(|place| place.expect("it connects"));
        assert_eq!(bench.store.number("cluster.c.upstream_cx_http2_total"), 2);
        for place in &mut places {
            let head = RequestHead::new(Version::Http11, Method::Get, "c", "/");
            let stream = place.handle().send(&head, Framing::None);
            let (mut response, _) = stream.expect("it is open").split();
            let (answer, _) = response.read_head().await.expect("it answers");
            assert_eq!(answer.status, 200);
        }
        drop(places);
        let again = cluster.http2(&host, &ANY).await.expect("it is there");
        assert!(again.is_reused());
        assert_eq!(bench.store.number("cluster.c.upstream_cx_total"), 2);
    });
}

#[test]
fn a_retry_can_leave_the_priority_that_was_tried() {
    let mut bench = Bench::new(eds("lb_policy: ROUND_ROBIN"));
    let groups = [
        group("priority: 0", &[(1, "")]),
        group("priority: 1", &[(2, "")]),
    ];
    bench.assign(&groups.concat());
    let cluster = bench.cluster();
    let chosen = |avoid_priorities| {
        let context = LbContext {
            avoid_priorities,
            ..ANY
        };
        cluster.choose(&context).expect("there is a host").priority
    };
    assert_eq!(chosen(0), 0);
    assert_eq!(chosen(0b01), 1);
    assert_eq!(chosen(0b10), 0);
    // Where all were tried, all are as good as before.
    assert_eq!(chosen(0b11), 0);
}
