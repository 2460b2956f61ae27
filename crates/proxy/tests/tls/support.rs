//! Authorities and certificates, proxies with TLS contexts, and peers.

use std::{net::SocketAddr, path::Path, rc::Rc, sync::Arc, time::Duration};

use base::clock::Clock;
use outrigger_proxy as proxy;
use proto::envoy::config;
use proxy::{
    plan::{Bootstrap, Cluster, Listener},
    server::{Change, Server},
    worker::{Options, drain::DrainStrategy},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use testkit::envoy::message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// An authority that issues for one day, from an hour ago.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key in PEM.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("keys can be made");
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).expect("it can be signed"),
        }
    }

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for these names; those with `://` are URIs.
    pub(crate) fn issue(&self, names: &[&str]) -> Leaf {
        self.issue_until(names, 24)
    }

    /// A certificate that ends in so many hours.
    pub(crate) fn issue_until(&self, names: &[&str], hours: i64) -> Leaf {
        let mut params = CertificateParams::default();
        for name in names {
            params.subject_alt_names.push(match name.contains("://") {
                true => SanType::URI((*name).try_into().expect("ASCII")),
                false => SanType::DnsName((*name).try_into().expect("ASCII")),
            });
        }
        params
            .distinguished_name
            .push(DnType::CommonName, names.first().copied().unwrap_or("none"));
        let now = std::time::SystemTime::now();
        let hour = Duration::from_secs(3600);
        params.not_before = (now - hour * 48).into();
        params.not_after = match hours {
            0.. => (now + hour * hours as u32).into(),
            _ => (now - hour * -hours as u32).into(),
        };
        let key = KeyPair::generate().expect("keys can be made");
        let made = params
            .signed_by(&key, &self.issuer)
            .expect("it can be signed");
        Leaf {
            chain: made.pem(),
            key: key.serialize_pem(),
        }
    }
}

/// A block of YAML as one line of JSON.
pub(crate) fn inline(text: &str) -> String {
    format!("{{inline_string: {}}}", serde_json::Value::from(text))
}

/// `tls_certificates` of a context.
pub(crate) fn certificate(leaf: &Leaf) -> String {
    format!(
        "tls_certificates: [{{certificate_chain: {}, private_key: {}}}]",
        inline(&leaf.chain),
        inline(&leaf.key)
    )
}

/// A `DownstreamTlsContext` as a transport socket.
pub(crate) fn downstream(common: &str, more: &str) -> String {
    format!(
        "transport_socket: {{name: tls, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
         common_tls_context: {{{common}}}{more}}}}}"
    )
}

/// An `UpstreamTlsContext` as a transport socket.
pub(crate) fn upstream(common: &str, more: &str) -> String {
    format!(
        "transport_socket: {{name: tls, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, \
         common_tls_context: {{{common}}}{more}}}}}"
    )
}

pub(crate) fn cluster(name: &str, port: u16, more: &str) -> Change {
    let yaml = format!(
        "name: {name}\ntype: STATIC\nconnect_timeout: 5s\n{more}\nload_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [\
         {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"
    );
    let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&yaml));
    Change::UpsertCluster(Arc::new(
        plan.unwrap_or_else(|e| panic!("{e}\n{yaml}")).into(),
    ))
}

/// A listener, whole.
pub(crate) fn listener_of(yaml: &str) -> Change {
    let plan = Listener::try_from(&message::<config::listener::v3::Listener>(yaml));
    Change::UpsertListener(Arc::new(plan.unwrap_or_else(|e| panic!("{e}\n{yaml}"))))
}

/// A listener; `chains` are items of a YAML list.
pub(crate) fn listener(name: &str, chains: &str, more: &str) -> Change {
    let yaml = format!(
        "name: {name}\naddress: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}\nstat_prefix: {name}\n{more}\nfilter_chains:\n{chains}"
    );
    let plan = Listener::try_from(&message::<config::listener::v3::Listener>(&yaml));
    Change::UpsertListener(Arc::new(plan.unwrap_or_else(|e| panic!("{e}\n{yaml}"))))
}

/// `filters` that proxy HTTP to a cluster.
pub(crate) fn http_to(cluster: &str, more: &str) -> String {
    format!(
        "filters: [{{name: hcm, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
         stat_prefix: {cluster}, {more} route_config: {{name: r, virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: {cluster}}}}}]}}]}}, \
         http_filters: [{{name: router, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]"
    )
}

/// `filters` that proxy TCP to a cluster.
pub(crate) fn tcp_to(cluster: &str) -> String {
    format!(
        "filters: [{{name: tcp, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, \
         stat_prefix: {cluster}, cluster: {cluster}}}}}]"
    )
}

pub(crate) const INSPECTOR: &str = "listener_filters: [{name: tls, typed_config: {\"@type\": \
     type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}]";

/// How long connections have when their chain changes, where it does not matter.
pub(crate) const DRAIN: Duration = Duration::from_millis(200);

/// A running proxy with one worker.
pub(crate) async fn proxy(changes: Vec<Change>) -> Rc<Server> {
    proxy_with(Clock::system(), DRAIN, changes).await
}

/// A running proxy by whose clock certificates are judged, and whose connections have so long when their chain changes.
pub(crate) async fn proxy_with(
    clock: Clock,
    drain_time: Duration,
    changes: Vec<Change>,
) -> Rc<Server> {
    // Tests ask replies why there was no connection.
    let bootstrap: config::bootstrap::v3::Bootstrap = message(
        "layered_runtime: {layers: [{name: s, static_layer: {\
         envoy.reloadable_features.hide_transport_failure_reason_in_response_body: false}}]}",
    );
    let bootstrap = Bootstrap::try_from(&bootstrap).expect("a bootstrap with a layer is good");
    let settings = Options {
        concurrency: 1,
        drain_time,
        drain_strategy: DrainStrategy::Immediate,
        file_flush_interval: Duration::from_millis(1),
        clock,
        ..Options::default()
    };
    let server = Server::start(Arc::new(bootstrap), settings, stats::Store::default())
        .expect("threads can be started");
    apply(&server, changes).await;
    server
}

pub(crate) async fn apply(server: &Rc<Server>, changes: Vec<Change>) {
    for result in server.apply(changes) {
        result.expect("the change is good");
    }
    server.settled().await;
}

pub(crate) fn address(server: &Server, listener: &str) -> SocketAddr {
    server.listener_address(listener).expect("it has a socket")
}

/// An HTTP/1 origin that answers each request with its head as body.
pub(crate) async fn origin() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let mut got = Vec::new();
                let mut buffer = [0; 4096];
                loop {
                    while let Some(end) = find(&got, b"\r\n\r\n") {
                        let head: Vec<u8> = got.drain(..end + 4).collect();
                        let answer =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", head.len());
                        let answer = [answer.as_bytes(), &head].concat();
                        if stream.write_all(&answer).await.is_err() {
                            return;
                        }
                    }
                    match stream.read(&mut buffer).await {
                        Ok(0) | Err(_) => return,
                        Ok(read) => got.extend_from_slice(&buffer[..read]),
                    }
                }
            });
        }
    });
    port
}

/// A server that sends back what it gets.
pub(crate) async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    port
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// Sends a `GET` in clear and gives all that comes back.
pub(crate) async fn get(address: SocketAddr, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    exchange(&mut stream, headers).await
}

/// Sends a `GET` on a stream and gives all that comes back.
pub(crate) async fn exchange(
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    headers: &str,
) -> String {
    let request = format!("GET / HTTP/1.1\r\nHost: h\r\n{headers}Connection: close\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .expect("it is open");
    let mut answer = Vec::new();
    let _ = within(stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .expect("it happens within 10 s")
}

/// Waits until a stat has a value.
pub(crate) async fn stat(server: &Server, name: &str, value: i64) {
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

/// Puts a file into its place in one step, as who renews certificates does.
pub(crate) fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("it can be written");
    std::fs::rename(&new, path).expect("it can be renamed");
}

/// A rustls client that trusts an authority.
pub(crate) fn client(
    trust: &Authority,
    leaf: Option<&Leaf>,
    alpn: &[&str],
) -> rustls::ClientConfig {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(trust.pem().as_bytes()).expect("it is PEM"))
        .expect("it is a certificate");
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .expect("they go together")
    .with_root_certificates(roots);
    let mut config = match leaf {
        None => builder.with_no_client_auth(),
        Some(leaf) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(leaf.chain.as_bytes()).expect("PEM")],
                PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).expect("PEM"),
            )
            .expect("they match"),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

/// A handshake of a rustls client.
pub(crate) async fn handshake(
    config: &rustls::ClientConfig,
    address: SocketAddr,
    name: &str,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = name.to_owned().try_into().expect("a good name");
    tokio_rustls::TlsConnector::from(Arc::new(config.clone()))
        .connect(name, stream)
        .await
}
