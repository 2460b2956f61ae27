//! Routes, clusters and endpoints that change a thousand times while requests go through them.

use std::{cell::Cell, rc::Rc, sync::Arc};

use outrigger_proxy as proxy;
use proto::envoy::config;
use proxy::{
    plan::{Cluster, ClusterLoadAssignment, Listener, RouteConfiguration},
    server::Change,
};
use testkit::envoy::{hosts, message};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::{JoinSet, spawn_local},
};

use super::support::{Mesh, TO_A, request, run};

const CLIENTS: usize = 16;
const EDITS: usize = 1000;

/// An origin that answers every request with its name.
async fn origin(name: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{name}");
                while request(&mut stream).await.is_some() {
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

fn listener() -> Change {
    let plan = Listener::try_from(&message::<config::listener::v3::Listener>(
        "name: m
address: {socket_address: {address: 127.0.0.1, port_value: 0}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: edits
      rds: {route_config_name: r, config_source: {ads: {}}}
      http_filters:
      - name: router
        typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
",
    ));
    Change::UpsertListener(Arc::new(plan.unwrap()))
}

fn routes(edit: usize) -> Change {
    let (first, second) = if edit.is_multiple_of(2) {
        ("s", "t")
    } else {
        ("t", "s")
    };
    let plan =
        RouteConfiguration::try_from(&message::<config::route::v3::RouteConfiguration>(&format!(
            "name: r
virtual_hosts:
- name: v
  domains: ['*']
  routes:
  - {{match: {{prefix: /{}}}, route: {{cluster: {second}}}}}
  - {{match: {{prefix: /}}, route: {{cluster: {first}, timeout: {}s}}}}",
            edit % 5,
            10 + edit % 3
        )));
    Change::UpsertRoutes(Arc::new(plan.unwrap()))
}

fn cluster(name: &str, edit: usize) -> Change {
    let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&format!(
        "name: {name}\ntype: EDS\neds_cluster_config: {{eds_config: {{ads: {{}}}}}}\nconnect_timeout: {}s\n",
        5 + edit % 7
    )));
    Change::UpsertCluster(Arc::new(plan.unwrap().into()))
}

fn endpoints(name: &str, ports: &[u16]) -> Change {
    let plan = ClusterLoadAssignment::try_from(&message::<
        config::endpoint::v3::ClusterLoadAssignment,
    >(&format!(
        "cluster_name: {name}\nendpoints: [{{lb_endpoints: [{}]}}]",
        hosts(ports)
    )));
    Change::Endpoints(Arc::new(plan.unwrap()))
}

#[test]
fn a_thousand_edits_under_load_fail_no_request() {
    run(async {
        let (a, b) = (origin("a").await, origin("b").await);
        let mesh = Mesh::new(TO_A, "", "", &[("a", a)]).await;
        let first = vec![
            cluster("s", 0),
            cluster("t", 0),
            endpoints("s", &[a]),
            endpoints("t", &[a, b]),
            routes(0),
            listener(),
        ];
        for result in mesh.server.apply(first) {
            result.unwrap();
        }
        mesh.server.settled().await;
        let address = mesh.server.listener_address("m").unwrap();

        let over = Rc::new(Cell::new(false));
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let over = over.clone();
            clients.spawn_local(async move {
                let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
                let (mut count, mut bytes) = (0, Vec::new());
                while !over.get() {
                    // Requests that may not be repeated, too: an edit is no reason to lose one.
                    let (method, body) = match (number + count) % 2 {
                        0 => ("GET", "\r\n"),
                        _ => ("POST", "Content-Length: 1\r\n\r\nx"),
                    };
                    let head = format!("{method} /{} HTTP/1.1\r\nHost: h\r\n{body}", count % 7);
                    stream.write_all(head.as_bytes()).await.unwrap();
                    bytes.clear();
                    while !bytes.windows(4).any(|four| four == b"\r\n\r\n")
                        || !matches!(bytes.last(), Some(b'a' | b'b'))
                    {
                        let read = stream.read_buf(&mut bytes).await.unwrap();
                        let text = String::from_utf8_lossy(&bytes);
                        assert!(read > 0, "closed after {count} requests: {text}");
                        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
                    }
                    count += 1;
                }
                count
            });
        }
        for edit in 0..EDITS {
            let name = if edit % 3 == 0 { "s" } else { "t" };
            let change = match edit % 4 {
                0 => routes(edit / 4),
                1 => cluster(name, edit),
                2 => endpoints(name, [&[a][..], &[b], &[a, b]][edit / 4 % 3]),
                // A cluster that goes and comes back between two versions of the routes is the control plane's make before
                // break: here one that nobody asks for.
                _ if edit / 4 % 2 == 0 => cluster("u", edit),
                _ => Change::RemoveCluster("u".into()),
            };
            for result in mesh.server.apply(vec![change]) {
                result.unwrap();
            }
            mesh.server.settled().await;
            tokio::task::yield_now().await;
        }
        over.set(true);
        let mut requests = 0;
        while let Some(count) = clients.join_next().await {
            requests += count.unwrap();
        }
        assert!(requests > EDITS, "there was load: {requests} requests");
        for name in ["downstream_rq_4xx", "downstream_rq_5xx"] {
            assert_eq!(
                mesh.server.store.number(&format!("http.edits.{name}")),
                0,
                "{name}"
            );
        }
    });
}
