//! The server over a folder of YAML, as a proxy on a delta stream sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use config::Folder;
use outrigger_control::{
    debug,
    model::Settings,
    push::Timing,
    server::{Ads, Server},
    translate::Istio,
};
use proto::{
    Struct, Value,
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest},
    },
    google::rpc::Status,
    prost_types::value::Kind,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use xds::{
    Mode,
    client::{Connection, Incoming, Outgoing, Target, connect},
    type_url::{CDS, EDS, LDS, RDS},
};

const TIMING: Timing = Timing {
    quiet: Duration::from_millis(20),
    longest: Duration::from_secs(1),
};

struct Mesh {
    dir: TempDir,
    grpc: SocketAddr,
    pages: SocketAddr,
    server: Arc<Server>,
}

impl Mesh {
    async fn start(files: &[(&str, String)]) -> Mesh {
        let dir = TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let server = Server::new(Box::new(Istio), Settings::default());
        let folder = Folder::open(dir.path()).unwrap();
        assert!(folder.problems().is_empty(), "{:?}", folder.problems());
        server.load(folder.snapshot().clone(), folder.problems().clone());
        tokio::spawn(server.clone().follow(folder.watch().unwrap(), TIMING));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc = listener.local_addr().unwrap();
        let service = xds::server::Service::new(Arc::new(Ads::open(server.clone())));
        let serving = tonic::transport::server::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serving);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pages = listener.local_addr().unwrap();
        tokio::spawn(axum::serve(listener, debug::router(server.clone(), None)).into_future());
        Mesh {
            dir,
            grpc,
            pages,
            server,
        }
    }

    /// Replaces a file at once, as a careful editor does.
    fn write(&self, name: &str, text: &str) {
        let temporary = self.dir.path().join("next");
        fs::write(&temporary, text).unwrap();
        fs::rename(&temporary, self.dir.path().join(name)).unwrap();
    }

    async fn page(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(self.pages).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    async fn json(&self, path: &str) -> serde_json::Value {
        let text = self.page(path).await;
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{text}");
        serde_json::from_str(body).unwrap()
    }
}

/// A proxy that answers nothing by itself.
struct Proxy {
    connection: Connection,
    held: BTreeMap<String, BTreeSet<String>>,
}

impl Proxy {
    async fn connect(mesh: &Mesh, pod: &str, ip: &str) -> Proxy {
        Self::connect_with(mesh, pod, ip, BTreeMap::new()).await
    }

    /// `held`: names and versions that it has from an earlier stream.
    async fn connect_with(
        mesh: &Mesh,
        pod: &str,
        ip: &str,
        held: BTreeMap<String, String>,
    ) -> Proxy {
        let first = DeltaDiscoveryRequest {
            node: Some(node(pod, ip)),
            type_url: CDS.into(),
            initial_resource_versions: held,
            ..Default::default()
        };
        let target = Target::Tcp(mesh.grpc.to_string());
        let connection = connect(&target, Mode::Delta, &[], vec![Outgoing::Delta(first)])
            .await
            .unwrap();
        Proxy {
            connection,
            held: BTreeMap::new(),
        }
    }

    fn send(&self, request: DeltaDiscoveryRequest) {
        self.connection
            .requests
            .send(Outgoing::Delta(request))
            .unwrap();
    }

    fn subscribe(&self, type_url: &str, names: &[&str]) {
        let names = names.iter().map(|n| (*n).to_owned()).collect();
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.into(),
            resource_names_subscribe: names,
            ..Default::default()
        });
    }

    fn ack(&self, response: &DeltaDiscoveryResponse) {
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        self.send(DeltaDiscoveryRequest {
            type_url,
            response_nonce,
            ..Default::default()
        });
    }

    fn nack(&self, response: &DeltaDiscoveryResponse, message: &str) {
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        let error_detail = Some(Status {
            message: message.to_owned(),
            ..Status::default()
        });
        self.send(DeltaDiscoveryRequest {
            type_url,
            response_nonce,
            error_detail,
            ..Default::default()
        });
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let Incoming::Delta(stream) = &mut self.connection.responses else {
            panic!("a delta stream")
        };
        let next = tokio::time::timeout(Duration::from_secs(20), stream.message()).await;
        let response = next
            .expect("an answer in time")
            .unwrap()
            .expect("an open stream");
        let held = self.held.entry(response.type_url.clone()).or_default();
        held.extend(response.resources.iter().map(|r| r.name.clone()));
        for gone in &response.removed_resources {
            held.remove(gone);
        }
        response
    }

    /// Asks for everything as a sidecar does, acknowledging all of it.
    async fn warm_up(&mut self, clusters: &[&str], routes: &[&str]) {
        let cds = self.next().await;
        self.ack(&cds);
        self.subscribe(EDS, clusters);
        let eds = self.next().await;
        self.ack(&eds);
        self.subscribe(LDS, &[]);
        let lds = self.next().await;
        self.ack(&lds);
        self.subscribe(RDS, routes);
        let rds = self.next().await;
        self.ack(&rds);
        assert_eq!(
            [&*cds.type_url, &eds.type_url, &lds.type_url, &rds.type_url],
            [CDS, EDS, LDS, RDS]
        );
    }

    fn holds(&self, type_url: &str, name: &str) -> bool {
        self.held.get(type_url).is_some_and(|h| h.contains(name))
    }
}

fn node(pod: &str, ip: &str) -> Node {
    let text = |t: &str| Value {
        kind: Some(Kind::StringValue(t.to_owned())),
    };
    let fields = [
        ("NAMESPACE", "default"),
        ("CLUSTER_ID", "Kubernetes"),
        ("ISTIO_VERSION", "1.30.0"),
        ("INSTANCE_IPS", ip),
    ];
    Node {
        id: format!("sidecar~{ip}~{pod}.default~default.svc.cluster.local"),
        metadata: Some(Struct {
            fields: fields
                .iter()
                .map(|(k, v)| ((*k).to_owned(), text(v)))
                .collect(),
        }),
        ..Node::default()
    }
}

fn service(name: &str, number: u8) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{clusterIP: 10.96.0.{number}, ports: [{{name: http, port: 8080}}]}}\n"
    )
}

fn slice(name: &str, address: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n- {{addresses: [{address}], conditions: {{ready: true}}}}\n"
    )
}

fn route(host: &str, seconds: u32) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {host}, namespace: default}}\nspec:\n  hosts: [{host}]\n  http:\n  - timeout: {seconds}s\n    route:\n    - destination: {{host: {host}}}\n"
    )
}

fn cluster(name: &str) -> String {
    format!("outbound|8080||{name}.default.svc.cluster.local")
}

async fn two_services() -> Mesh {
    Mesh::start(&[
        ("a.yaml", service("a", 1)),
        ("b.yaml", service("b", 2)),
        ("ea.yaml", slice("a", "10.1.0.1")),
        ("eb.yaml", slice("b", "10.1.0.2")),
        ("ra.yaml", route("a", 1)),
    ])
    .await
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

#[tokio::test]
async fn only_what_a_change_touches_is_sent() {
    let mesh = two_services().await;
    let mut proxy = Proxy::connect(&mesh, "p", "10.9.0.1").await;
    proxy
        .warm_up(&[&cluster("a"), &cluster("b")], &["8080"])
        .await;
    assert!(proxy.holds(CDS, &cluster("a")) && proxy.holds(CDS, "PassthroughCluster"));
    assert!(proxy.holds(LDS, "virtualOutbound") && proxy.holds(LDS, "virtualInbound"));
    assert!(proxy.holds(RDS, "8080"));

    // A route: the one route configuration, nothing else.
    mesh.write("ra.yaml", &route("a", 2));
    let got = proxy.next().await;
    assert_eq!((got.type_url.as_str(), names(&got)), (RDS, vec!["8080"]));
    proxy.ack(&got);

    // An endpoint: its one assignment.
    mesh.write("eb.yaml", &slice("b", "10.1.0.9"));
    let got = proxy.next().await;
    assert_eq!(
        (got.type_url.as_str(), names(&got)),
        (EDS, vec![&*cluster("b")])
    );
    proxy.ack(&got);

    // What means the same sends nothing: the next thing that arrives is the change after it.
    mesh.write("ra.yaml", &format!("# a comment\n{}", route("a", 2)));
    mesh.write("ea.yaml", &slice("a", "10.1.0.7"));
    let got = proxy.next().await;
    assert_eq!(
        (got.type_url.as_str(), names(&got)),
        (EDS, vec![&*cluster("a")])
    );
}

#[tokio::test]
async fn what_is_new_comes_in_order_and_what_is_gone_goes_last() {
    let mesh = two_services().await;
    let mut proxy = Proxy::connect(&mesh, "p", "10.9.0.1").await;
    proxy
        .warm_up(&[&cluster("a"), &cluster("b")], &["8080"])
        .await;

    // b goes, c comes.
    mesh.write("b.yaml", &service("c", 3));
    let cds = proxy.next().await;
    assert_eq!(
        (cds.type_url.as_str(), names(&cds)),
        (CDS, vec![&*cluster("c")])
    );
    assert!(
        cds.removed_resources.is_empty(),
        "the routes that the proxy has still lead to b"
    );
    let mut order = vec![];
    loop {
        let got = proxy.next().await;
        assert!(got.removed_resources.is_empty(), "{got:?}");
        order.push(got.type_url.clone());
        if got.type_url == RDS {
            proxy.ack(&got);
            break;
        }
        proxy.ack(&got);
    }
    assert!(
        order.windows(2).all(|w| (w[0] == LDS) <= (w[1] == RDS)),
        "{order:?}"
    );
    // The last answer that is outstanding lets b go.
    proxy.ack(&cds);
    let got = proxy.next().await;
    assert_eq!(
        (got.type_url.as_str(), got.removed_resources.clone()),
        (CDS, vec![cluster("b")])
    );
    assert!(got.resources.is_empty());
    assert!(!proxy.holds(CDS, &cluster("b")));
}

#[tokio::test]
async fn a_proxy_that_does_not_answer_does_not_keep_removals_for_ever() {
    let mesh = two_services().await;
    let mut proxy = Proxy::connect(&mesh, "p", "10.9.0.1").await;
    proxy
        .warm_up(&[&cluster("a"), &cluster("b")], &["8080"])
        .await;
    mesh.write("b.yaml", &service("c", 3));
    let start = Instant::now();
    while !proxy.next().await.removed_resources.contains(&cluster("b")) {}
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn a_rejection_is_reported_with_object_file_and_line() {
    let mesh = two_services().await;
    let mut proxy = Proxy::connect(&mesh, "p", "10.9.0.1").await;
    let cds = proxy.next().await;
    proxy.nack(&cds, &format!("{}: load_assignment: wrong", cluster("b")));
    // The answer to a later request shows that the rejection has been taken in.
    proxy.subscribe(LDS, &[]);
    proxy.next().await;
    let sync = mesh.json("/debug/syncz").await;
    let state = &sync[0]["resources"][CDS];
    let error = state["lastError"].as_str().unwrap();
    assert!(error.contains("load_assignment: wrong"), "{error}");
    assert!(
        error.contains("Service default/b") && error.contains("b.yaml:1"),
        "{error}"
    );
    assert_eq!(
        state["lastErrorDetail"]["resources"][0]["from"][0]["line"],
        1
    );
    assert_eq!(sync[0]["proxy"], "p.default");
    assert_eq!(sync[0]["cluster_sent"], cds.nonce);
    assert_eq!(sync[0]["cluster_acked"], serde_json::Value::Null);
    assert!(
        mesh.page("/metrics")
            .await
            .contains("pilot_total_xds_rejects{type=\"cds\"} 1")
    );
}

#[tokio::test]
async fn pages_show_what_a_proxy_was_sent() {
    let mesh = two_services().await;
    let mut proxy = Proxy::connect(&mesh, "p", "10.9.0.1").await;
    proxy
        .warm_up(&[&cluster("a"), &cluster("b")], &["8080"])
        .await;
    let dump = mesh
        .json("/debug/config_dump?proxyID=p.default&include_eds=true")
        .await;
    let sections: BTreeMap<&str, &serde_json::Value> = dump["configs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| (s["@type"].as_str().unwrap().rsplit('.').next().unwrap(), s))
        .collect();
    let clusters = sections["ClustersConfigDump"]["dynamicActiveClusters"]
        .as_array()
        .unwrap();
    assert!(
        clusters
            .iter()
            .any(|c| c["cluster"]["name"] == cluster("a"))
    );
    assert_eq!(
        sections["EndpointsConfigDump"]["dynamicEndpointConfigs"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let listeners = sections["ListenersConfigDump"]["dynamicListeners"]
        .as_array()
        .unwrap();
    assert!(
        listeners
            .iter()
            .any(|l| l["activeState"]["listener"]["name"] == "virtualOutbound")
    );
    assert_eq!(
        sections["RoutesConfigDump"]["dynamicRouteConfigs"][0]["routeConfig"]["name"],
        "8080"
    );
    assert!(
        mesh.page("/debug/config_dump?proxyID=q.default")
            .await
            .starts_with("HTTP/1.1 404")
    );
    assert!(
        mesh.page("/debug/config_dump")
            .await
            .starts_with("HTTP/1.1 400")
    );
    assert!(mesh.page("/ready").await.starts_with("HTTP/1.1 200"));
    // As istioctl asks for it, and as it takes it apart: VERSION-REVISION-STATUS.
    let page = mesh.page("//version").await;
    assert!(page.contains("\r\nlocation: /version\r\n"), "{page}");
    let page = mesh.page("/version").await;
    let (_, version) = page.split_once("\r\n\r\n").unwrap();
    assert!(
        version.starts_with(concat!(env!("CARGO_PKG_VERSION"), "-")),
        "{page}"
    );
    assert!(version.ends_with("-Clean"), "{page}");
    assert!(mesh.page("/nowhere").await.starts_with("HTTP/1.1 404"));
    let clusters = mesh.json("/debug/clusterz").await;
    assert_eq!(clusters[0]["id"], "Kubernetes");

    let services = mesh.json("/debug/registryz").await;
    assert_eq!(services.as_array().unwrap().len(), 2);
    assert!(mesh.page("/debug/endpointz").await.contains("10.1.0.1"));
    mesh.write(
        "ra.yaml",
        &route("a", 1).replace("timeout: 1s", "timeout: soon"),
    );
    let problems = loop {
        let problems = mesh.json("/debug/problems").await;
        if problems.as_array().is_some_and(|p| !p.is_empty()) {
            break problems;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(problems[0]["field"], "spec.http[0].timeout");
    assert_eq!(problems[0]["object"], "VirtualService default/a");
}

#[tokio::test]
async fn a_stream_without_a_node_is_refused() {
    let mesh = two_services().await;
    let first = DeltaDiscoveryRequest {
        type_url: CDS.into(),
        ..Default::default()
    };
    let target = Target::Tcp(mesh.grpc.to_string());
    let mut connection = connect(&target, Mode::Delta, &[], vec![Outgoing::Delta(first)])
        .await
        .unwrap();
    let Incoming::Delta(stream) = &mut connection.responses else {
        panic!("a delta stream")
    };
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("node"), "{status}");
}

#[tokio::test]
async fn proxies_of_one_view_share_every_byte() {
    let mesh = two_services().await;
    let names = [cluster("a"), cluster("b")];
    let mut proxies = Vec::new();
    for i in 1..=3 {
        let mut proxy = Proxy::connect(&mesh, &format!("p{i}"), &format!("10.9.0.{i}")).await;
        proxy.warm_up(&[&names[0], &names[1]], &["8080"]).await;
        proxies.push(proxy);
    }
    let connections = mesh.server.connections();
    assert_eq!(connections.len(), 3);
    let [first, others @ ..] = &connections[..] else {
        panic!("three streams")
    };
    for other in others {
        for type_url in [EDS, RDS] {
            let (a, b) = (first.sent(type_url).unwrap(), other.sent(type_url).unwrap());
            assert!(Arc::ptr_eq(&a, &b), "{type_url}: one set for all");
        }
        for (type_url, name) in [(CDS, names[0].as_str()), (LDS, "virtualOutbound")] {
            let (a, b) = (first.sent(type_url).unwrap(), other.sent(type_url).unwrap());
            assert!(
                Arc::ptr_eq(a.find(name).unwrap(), b.find(name).unwrap()),
                "{name}: one copy for all"
            );
        }
    }
}

#[tokio::test]
async fn a_proxy_that_comes_back_is_sent_only_what_it_does_not_hold() {
    let mesh = two_services().await;
    let mut proxy = Proxy::connect(&mesh, "p", "10.9.0.1").await;
    let cds = proxy.next().await;
    let held: std::collections::BTreeMap<String, String> = cds
        .resources
        .iter()
        .map(|r| (r.name.clone(), r.version.clone()))
        .collect();
    drop(proxy);
    // Another control plane over the same objects: versions are hashes of the content.
    let other = two_services().await;
    let mut proxy = Proxy::connect_with(&other, "p", "10.9.0.1", held).await;
    let cds = proxy.next().await;
    assert_eq!((cds.type_url.as_str(), names(&cds)), (CDS, vec![]));
}

#[tokio::test]
async fn the_state_of_the_world_is_spoken_too() {
    let mesh = two_services().await;
    let request = |type_url: &str, names: &[&str]| DiscoveryRequest {
        node: Some(node("p", "10.9.0.1")),
        type_url: type_url.into(),
        resource_names: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    };
    let target = Target::Tcp(mesh.grpc.to_string());
    let first = vec![Outgoing::Sotw(request(CDS, &[]))];
    let mut connection = connect(&target, Mode::Sotw, &[], first).await.unwrap();
    let Incoming::Sotw(stream) = &mut connection.responses else {
        panic!("a state-of-the-world stream")
    };
    let cds = stream.message().await.unwrap().unwrap();
    assert_eq!(cds.type_url, CDS);
    let whole = cds.resources.len();
    assert!(whole >= 4, "{whole}");
    let ack = DiscoveryRequest {
        response_nonce: cds.nonce,
        version_info: cds.version_info,
        ..request(CDS, &[])
    };
    connection.requests.send(Outgoing::Sotw(ack)).unwrap();
    connection
        .requests
        .send(Outgoing::Sotw(request(EDS, &[&cluster("a")])))
        .unwrap();
    let eds = stream.message().await.unwrap().unwrap();
    assert_eq!((eds.type_url.as_str(), eds.resources.len()), (EDS, 1));
    // A new service: clusters are sent whole in this form.
    mesh.write("c.yaml", &service("c", 3));
    let cds = stream.message().await.unwrap().unwrap();
    assert_eq!(
        (cds.type_url.as_str(), cds.resources.len()),
        (CDS, whole + 1)
    );
}
