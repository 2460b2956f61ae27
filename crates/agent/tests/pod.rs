//! The agent's parts against scripted peers: bootstrap, relay, status server.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use outrigger_agent::{
    bootstrap,
    control_plane::ControlPlane,
    relay::Relay,
    settings::{Role, Settings},
    status::Status,
};
use proto::envoy::config::{bootstrap::v3::Bootstrap, core::v3::Node};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::{
    StreamExt,
    wrappers::{TcpListenerStream, UnboundedReceiverStream},
};
use xds::{
    Mode, Resource,
    client::{self, Session, Target, Want},
    server::{Event, Handler, Incoming, Phase, Responses, Service, Stream},
    type_url::{CDS, NDS},
};

fn settings(dir: &Path, admin_port: u16, prometheus_port: u16) -> Settings {
    Settings {
        role: Role::Sidecar,
        addresses: vec!["10.0.0.7".parse().unwrap()],
        pod: "web-1".into(),
        namespace: "shop".into(),
        domain: "shop.svc.cluster.local".into(),
        config_path: dir.join("proxy"),
        binary: None,
        service_cluster: "web.shop".into(),
        discovery_address: "istiod.istio-system.svc:15010".into(),
        plaintext: true,
        drain: Duration::from_secs(45),
        parent_shutdown: Duration::from_secs(60),
        termination_drain: Duration::from_secs(5),
        admin_port,
        status_port: 15020,
        ready_port: 15021,
        prometheus_port,
        concurrency: 2,
        log_level: "warning".into(),
        component_log_level: String::new(),
        proxy_config:
            json!({"proxyMetadata": {"ISTIO_META_DNS_CAPTURE": "true"}, "concurrency": 2})
                .as_object()
                .unwrap()
                .clone(),
        labels: [
            ("app", "web"),
            ("pod-template-hash", "abc"),
            ("topology.istio.io/locality", "eu/eu-1/rack"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into(),
        annotations: Default::default(),
    }
}

#[test]
fn the_bootstrap_is_written_under_both_names_and_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = bootstrap::write(&settings(dir.path(), 15000, 15090)).unwrap();
    assert_eq!(path, dir.path().join("proxy/envoy-rev.json"));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        std::fs::read_to_string(dir.path().join("proxy/envoy-rev0.json")).unwrap(),
        text
    );
    let bootstrap: Bootstrap = proto::json::from_str(&text).unwrap();
    let metadata = proto::json::to_value(&bootstrap)["node"]["metadata"].clone();
    let node = bootstrap.node.unwrap();
    assert_eq!(
        node.id,
        "sidecar~10.0.0.7~web-1.shop~shop.svc.cluster.local"
    );
    assert_eq!(node.cluster, "web.shop");
    let locality = node.locality.unwrap();
    assert_eq!(
        (locality.region.as_str(), locality.zone.as_str()),
        ("eu", "eu-1")
    );
    assert_eq!(metadata["DNS_CAPTURE"], "true");
    assert_eq!(
        metadata["LABELS"],
        json!({"app": "web", "topology.istio.io/locality": "eu/eu-1/rack"})
    );
    assert_eq!(metadata["PROXY_CONFIG"]["concurrency"], 2);
    assert_eq!(metadata["INTERCEPTION_MODE"], "REDIRECT");
    let resources = bootstrap.static_resources.unwrap();
    let listeners: Vec<_> = resources
        .listeners
        .iter()
        .map(|l| l.name.as_str())
        .collect();
    assert_eq!(listeners, ["0.0.0.0_15090", "0.0.0.0_15021"]);
}

/// Answers CDS, and slips in a type that only an agent understands.
struct Scripted {
    stop: Arc<tokio::sync::Notify>,
}

impl Handler for Scripted {
    async fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> Result<Responses, tonic::Status> {
        assert_eq!(request.metadata().get("clusterid").unwrap(), "Kubernetes");
        let stop = self.stop.clone();
        let (send, receive) = mpsc::unbounded_channel();
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            let mut stream = Stream::new(mode);
            loop {
                let request = tokio::select! {
                    r = requests.next() => r,
                    () = stop.notified() => return,
                };
                let Some(Ok(request)) = request else { return };
                let Event::Respond { type_url, .. } = stream.request(&request) else {
                    continue;
                };
                for t in [NDS, CDS] {
                    let mut private = Stream::new(mode);
                    let own = if t == NDS {
                        let mut subscribe = request.clone();
                        subscribe.type_url = NDS.into();
                        private.request(&subscribe);
                        &mut private
                    } else {
                        &mut stream
                    };
                    let set = [Arc::new(Resource::new("a", t, b"\x0a\x01a"))]
                        .into_iter()
                        .collect();
                    assert_eq!(&*type_url, CDS);
                    let response = own.update(t, &Arc::new(set), "v1", Phase::All).unwrap();
                    send.send(Ok(response)).unwrap();
                }
            }
        });
        Ok(Box::pin(UnboundedReceiverStream::new(receive)))
    }
}

#[tokio::test]
async fn the_relay_carries_both_forms_keeps_agent_types_back_and_ends_with_its_upstream() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = listener.local_addr().unwrap().to_string();
    let stop = Arc::new(tokio::sync::Notify::new());
    let control = Arc::new(Scripted { stop: stop.clone() });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(Service::new(control))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("XDS");
    std::fs::write(&socket, "stale").unwrap();
    let headers = [("ClusterID".to_owned(), "Kubernetes".to_owned())];
    let relay = Arc::new(Relay::new(
        ControlPlane::plaintext(&upstream)
            .with_headers(&headers)
            .unwrap(),
    ));
    tokio::spawn(relay.serve(&socket).unwrap());

    for mode in [Mode::Delta, Mode::Sotw] {
        let mut session = Session::new(
            mode,
            Node {
                id: "n".into(),
                ..Node::default()
            },
        );
        session.watch(CDS, Want::All);
        session.connected();
        let first = vec![session.next_request().unwrap()];
        let target = Target::Unix(socket.clone());
        let connection = client::connect(&target, mode, &[], first).await.unwrap();
        let end = match connection.responses {
            client::Incoming::Delta(mut s) => {
                let r = session.received_delta(s.message().await.unwrap().unwrap());
                assert_eq!(
                    (r.type_url.as_str(), r.resources[0].name.as_str()),
                    (CDS, "a")
                );
                stop.notify_one();
                s.message().await
            }
            .map(|_| ()),
            client::Incoming::Sotw(mut s) => {
                let r = session.received_sotw(s.message().await.unwrap().unwrap());
                assert_eq!(
                    (r.type_url.as_str(), r.resources[0].name.as_str()),
                    (CDS, "a")
                );
                stop.notify_one();
                s.message().await
            }
            .map(|_| ()),
        };
        let status = end.unwrap_err();
        assert!(
            status.message().contains("control plane closed"),
            "{status}"
        );
    }
}

#[tokio::test]
async fn an_unreachable_control_plane_is_named_to_the_proxy() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("XDS");
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let relay = Arc::new(Relay::new(ControlPlane::plaintext(&format!(
        "127.0.0.1:{port}"
    ))));
    tokio::spawn(relay.serve(&socket).unwrap());
    let error = client::connect(&Target::Unix(socket), Mode::Delta, &[], Vec::new())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("control plane 127.0.0.1:{port}")),
        "{error}"
    );
}

/// A stand-in for the proxy's admin interface: every request gets the text at hand.
async fn admin(configured: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 8192];
            let n = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..n]).into_owned();
            let body = if request.starts_with("GET /stats/prometheus") {
                "envoy_up 1\n".to_owned()
            } else if configured.load(Ordering::Relaxed) {
                "cluster_manager.cds.update_success: 1\nlistener_manager.lds.update_success: 2\n\
                 listener_manager.workers_started: 1\nserver.state: 0\n"
                    .to_owned()
            } else {
                "listener_manager.workers_started: 1\nserver.state: 2\n".to_owned()
            };
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    port
}

async fn get(port: u16, line: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn readiness_waits_for_both_types_and_says_which_is_missing() {
    let configured = Arc::new(AtomicBool::new(false));
    let dir = tempfile::tempdir().unwrap();
    let proxy = admin(configured.clone()).await;
    let settings = settings(dir.path(), proxy, proxy);
    let (status, mut orders) = Status::new(&settings).unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    tokio::spawn(status.clone().serve(port).await.unwrap());

    let answer = get(port, "GET /healthz/ready").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("configuration not received from the xDS server (CDS)"),
        "{answer}"
    );
    configured.store(true, Ordering::Relaxed);
    assert!(
        get(port, "GET /healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
    );
    let metrics = get(port, "GET /stats/prometheus").await;
    assert!(metrics.contains("envoy_up 1"), "{metrics}");
    assert!(metrics.contains("istio_agent_scrapes_total 1"), "{metrics}");
    assert!(
        get(port, "POST /quitquitquit")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert_eq!(
        orders.recv().await,
        Some(outrigger_agent::status::Order::Quit)
    );
    status.terminate();
    assert!(
        get(port, "GET /healthz/ready")
            .await
            .contains("the server is terminated")
    );
}

/// Answers with the mesh's names where they are asked for, and tells what became of it.
struct NamesPlane {
    events: mpsc::UnboundedSender<Event>,
    table: Vec<u8>,
}

impl Handler for NamesPlane {
    async fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> Result<Responses, tonic::Status> {
        let (send, receive) = mpsc::unbounded_channel();
        let (events, table) = (self.events.clone(), self.table.clone());
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            let mut stream = Stream::new(mode);
            while let Some(Ok(request)) = requests.next().await {
                let event = stream.request(&request);
                if let Event::Respond { type_url, .. } = &event
                    && &**type_url == NDS
                {
                    let set = [Arc::new(Resource::new("", NDS, &table))]
                        .into_iter()
                        .collect();
                    let response = stream.update(NDS, &Arc::new(set), "v1", Phase::All);
                    send.send(Ok(response.unwrap())).unwrap();
                }
                events.send(event).unwrap();
            }
        });
        Ok(Box::pin(UnboundedReceiverStream::new(receive)))
    }
}

#[tokio::test]
async fn the_relay_takes_the_meshs_names_and_answers_for_them() {
    use prost::Message as _;
    use proto::istio::networking::nds::v1::{NameTable, name_table::NameInfo};

    let info = NameInfo {
        ips: vec!["10.96.0.7".into()],
        registry: "Kubernetes".into(),
        shortname: "reviews".into(),
        namespace: "shop".into(),
        alt_hosts: Vec::new(),
    };
    let table = NameTable {
        table: [("reviews.shop.svc.cluster.local".to_owned(), info)].into(),
        name_info: None,
    };
    for mode in [Mode::Delta, Mode::Sotw] {
        for (table, good) in [(table.encode_to_vec(), true), (vec![0xff], false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let upstream = listener.local_addr().unwrap().to_string();
            let (events, mut seen) = mpsc::unbounded_channel();
            let plane = Arc::new(NamesPlane { events, table });
            tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(Service::new(plane))
                    .serve_with_incoming(TcpListenerStream::new(listener)),
            );
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("XDS");
            let place = outrigger_agent::dns::table::Place {
                namespace: "shop".into(),
                search: Vec::new(),
            };
            let dns = Arc::new(outrigger_agent::dns::Dns::new(place));
            let relay = Relay::new(ControlPlane::plaintext(&upstream));
            let relay = Arc::new(relay.with_names(Some(dns.clone())));
            tokio::spawn(relay.serve(&socket).unwrap());
            let mut session = Session::new(mode, Node::default());
            session.watch(CDS, Want::All);
            session.connected();
            let first = vec![session.next_request().unwrap()];
            let target = Target::Unix(socket.clone());
            let _connection = client::connect(&target, mode, &[], first).await.unwrap();
            // The proxy's request comes first, as it says who this is.
            let event = seen.recv().await.unwrap();
            assert!(matches!(event, Event::Respond { type_url, .. } if &*type_url == CDS));
            let event = seen.recv().await.unwrap();
            assert!(matches!(event, Event::Respond { type_url, .. } if &*type_url == NDS));
            match seen.recv().await.unwrap() {
                Event::Ack { type_url, .. } => assert!(good && &*type_url == NDS),
                Event::Nack { type_url, .. } => assert!(!good && &*type_url == NDS),
                other => panic!("{other:?}"),
            }
            assert_eq!(dns.ready(), good);
            let found = dns.table().and_then(|t| t.look_up("reviews", false));
            assert_eq!(found.is_some(), good);
        }
    }
}
