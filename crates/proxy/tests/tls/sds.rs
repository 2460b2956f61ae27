//! Secrets from an SDS server on a unix socket, as an agent serves them.

use std::{
    collections::BTreeMap,
    path::Path,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use outrigger_proxy as proxy;
use prost::Message;
use proto::{
    Any,
    envoy::{
        config::bootstrap::v3::Bootstrap as BootstrapMessage,
        extensions::transport_sockets::tls::v3::Secret,
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            },
            secret::v3::secret_discovery_service_server::{
                SecretDiscoveryService, SecretDiscoveryServiceServer,
            },
        },
    },
};
use proxy::{
    discovery::Discovery,
    plan::Bootstrap,
    server::{Server, State},
    worker::Options,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::{mpsc, watch},
    task::LocalSet,
};
use tokio_stream::{
    Stream,
    wrappers::{UnboundedReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{CLIENT, SERVER, support::*};

const TYPE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

type Secrets = BTreeMap<String, Secret>;
type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves the secrets of the moment, and notes what is refused.
struct Script {
    secrets: watch::Receiver<Secrets>,
    refused: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl SecretDiscoveryService for Script {
    type DeltaSecretsStream = Sent<DeltaDiscoveryResponse>;
    type StreamSecretsStream = Sent<DiscoveryResponse>;

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("as Istio's agent"))
    }

    async fn fetch_secrets(
        &self,
        _: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("as Istio's agent"))
    }

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let mut requests = request.into_inner();
        let (mut secrets, refused) = (self.secrets.clone(), self.refused.clone());
        let (send, receive) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let Ok(Some(first)) = requests.message().await else {
                return;
            };
            secrets.mark_changed();
            let mut version = 0;
            let mut last = Vec::new();
            loop {
                tokio::select! {
                    changed = secrets.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let now = secrets.borrow_and_update().clone();
                        let resources: Vec<Any> = first
                            .resource_names
                            .iter()
                            .filter_map(|name| now.get(name))
                            .map(|secret| Any {
                                type_url: TYPE.to_owned(),
                                value: secret.encode_to_vec(),
                            })
                            .collect();
                        if resources == last {
                            continue;
                        }
                        last.clone_from(&resources);
                        version += 1;
                        let response = DiscoveryResponse {
                            version_info: version.to_string(),
                            nonce: version.to_string(),
                            type_url: TYPE.to_owned(),
                            resources,
                            ..DiscoveryResponse::default()
                        };
                        if send.send(Ok(response)).is_err() {
                            return;
                        }
                    }
                    request = requests.message() => match request {
                        Ok(Some(request)) => {
                            if let Some(error) = request.error_detail {
                                refused.lock().expect("not poisoned").push(error.message);
                            }
                        }
                        _ => return,
                    },
                }
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            receive,
        ))))
    }
}

fn own(leaf: &Leaf) -> Secret {
    let yaml = format!(
        "name: default\ntls_certificate: {{certificate_chain: {}, private_key: {}}}",
        inline(&leaf.chain),
        inline(&leaf.key)
    );
    proto::json::from_yaml(&yaml).expect("legal YAML")
}

fn roots(pem: &str) -> Secret {
    let yaml = format!(
        "name: ROOTCA\nvalidation_context: {{trusted_ca: {}}}",
        inline(pem)
    );
    proto::json::from_yaml(&yaml).expect("legal YAML")
}

/// A proxy whose listener needs both secrets, from a socket.
fn start(socket: &Path, app: u16) -> (Rc<Server>, tokio::task::JoinHandle<()>) {
    let source = "initial_fetch_timeout: 0s, api_config_source: {api_type: GRPC, transport_api_version: V3, \
                  grpc_services: [{envoy_grpc: {cluster_name: sds-grpc}}]}";
    start_with(|_| source.to_owned(), socket, app)
}

/// A proxy whose listener needs both secrets, each from the source that `source` says for its name.
fn start_with(
    source: impl Fn(&str) -> String,
    socket: &Path,
    app: u16,
) -> (Rc<Server>, tokio::task::JoinHandle<()>) {
    let sds = |name: &str| format!("{{name: {name}, sds_config: {{{}}}}}", source(name));
    let context = format!(
        "tls_certificate_sds_secret_configs: [{}], combined_validation_context: {{default_validation_context: {{match_typed_subject_alt_names: \
         [{{san_type: URI, matcher: {{prefix: 'spiffe://cluster.local/'}}}}]}}, validation_context_sds_secret_config: {}}}",
        sds("default"),
        sds("ROOTCA")
    );
    let yaml = format!(
        "node: {{id: n, cluster: c}}
static_resources:
  clusters:
  - {{name: sds-grpc, load_assignment: {{cluster_name: sds-grpc, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: '{}'}}}}}}}}]}}]}}}}
  - {{name: app, type: STATIC, load_assignment: {{cluster_name: app, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {app}}}}}}}}}]}}]}}}}
  listeners:
  - name: in
    stat_prefix: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains: [{{{}, {}}}]
",
        socket.display(),
        tcp_to("app"),
        downstream(&context, ", require_client_certificate: true")
    );
    let message: BootstrapMessage = proto::json::from_yaml(&yaml).expect("legal YAML");
    let bootstrap = Arc::new(Bootstrap::try_from(&message).expect("a bootstrap"));
    let server =
        Server::start(bootstrap, Options::default(), stats::Store::default()).expect("workers");
    let mut discovery = Discovery::new(server.clone());
    let task = tokio::task::spawn_local(async move {
        discovery.begin().await.expect("the static part");
        discovery.run().await;
    });
    (server, task)
}

#[test]
fn secrets_of_a_server_come_and_change_under_load() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("socket");
        let (set, secrets) = watch::channel(Secrets::new());
        let refused = Arc::new(Mutex::new(Vec::new()));
        let script = Script {
            secrets,
            refused: refused.clone(),
        };
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("a socket"));
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(SecretDiscoveryServiceServer::new(script))
                .serve_with_incoming(incoming),
        );
        let ca = Authority::new("root");
        let put = |secret: Secret| {
            set.send_modify(|held| {
                held.insert(secret.name.clone(), secret);
            });
        };

        // A listener that lacks a secret is not there yet.
        let (server, running) = start(&socket, echo().await);
        put(own(&ca.issue(&[SERVER, "first"])));
        stat(&server, "sds.default.update_success", 1).await;
        assert!(server.listener_address("in").is_none());
        assert_ne!(server.state(), State::Live);
        put(roots(&ca.pem()));
        within(server.reached(State::Live)).await;
        let at = address(&server, "in");
        let leaf = ca.issue(&[CLIENT]);
        let mut old = handshake(&client(&ca, Some(&leaf), &[]), at, "first")
            .await
            .expect("it is let in");
        echoes(&mut old).await;

        // New certificates while connections are made all the time.
        for round in 0..5 {
            let before = server.store.number("sds.default.update_success");
            put(own(&ca.issue(&[SERVER, "first", "next"])));
            for _ in 0..10 {
                let mut stream = handshake(&client(&ca, Some(&leaf), &[]), at, "first")
                    .await
                    .unwrap_or_else(|error| panic!("round {round}: {error}"));
                echoes(&mut stream).await;
            }
            stat(&server, "sds.default.update_success", before + 1).await;
        }
        handshake(&client(&ca, Some(&leaf), &[]), at, "next")
            .await
            .expect("the new certificate is in use");
        echoes(&mut old).await;

        // What cannot be used is refused by name and reason; what was there stays.
        let mut broken = own(&ca.issue(&[SERVER]));
        broken.clone_from(&own(&Leaf {
            chain: ca.issue(&[SERVER]).chain,
            key: leaf.key.clone(),
        }));
        put(broken);
        stat(&server, "sds.default.update_rejected", 1).await;
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while refused.lock().expect("not poisoned").is_empty() {
            assert!(tokio::time::Instant::now() < end, "it is answered");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let said = refused.lock().expect("not poisoned").join("\n");
        assert!(
            said.contains("default") && said.contains("does not belong"),
            "{said}"
        );
        assert!(!said.contains("PRIVATE"), "{said}");
        handshake(&client(&ca, Some(&leaf), &[]), at, "next")
            .await
            .expect("the last good one is in use");

        // Another root: who was let in stays, who comes with the old one is refused.
        let other = Authority::new("other");
        put(roots(&other.pem()));
        stat(&server, "sds.ROOTCA.update_success", 2).await;
        if let Ok(mut stream) = handshake(&client(&ca, Some(&leaf), &[]), at, "next").await {
            assert!(!try_echo(&mut stream).await);
        }
        stat(&server, "listener.in.ssl.fail_verify_error", 1).await;
        let mut new = handshake(&client(&ca, Some(&other.issue(&[CLIENT])), &[]), at, "next")
            .await
            .expect("the new root is trusted");
        echoes(&mut new).await;
        echoes(&mut old).await;
        running.abort();
    });
}

#[test]
fn a_server_that_does_not_exist_keeps_nobody_waiting() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let (server, running) = start(Path::new("/nowhere/socket"), echo().await);
        within(server.reached(State::Live)).await;
        let ca = Authority::new("root");
        let at = address(&server, "in");
        assert!(handshake(&client(&ca, None, &[]), at, "h").await.is_err());
        let name = "listener.in.server_ssl_socket_factory.downstream_context_secrets_not_ready";
        stat(&server, name, 1).await;
        running.abort();
    });
}

#[test]
fn secrets_of_a_file_come_and_change_and_what_is_no_secret_leaves_the_last() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(format!("{name}.yaml"));
        // Another file takes its place, as the kubelet and careful tools do it.
        let put = |name: &str, text: &str| {
            let next = path("next");
            std::fs::write(&next, text).expect("it is written");
            std::fs::rename(&next, path(name)).expect("it is moved");
        };
        let answer = |secret: &Secret| {
            let mut secret = proto::json::to_value(secret);
            secret["@type"] = TYPE.into();
            serde_json::json!({"resources": [secret]}).to_string()
        };
        let ca = Authority::new("root");
        put("ROOTCA", &answer(&roots(&ca.pem())));
        let source = |name: &str| {
            let path = path(name);
            format!(
                "initial_fetch_timeout: 0s, path_config_source: {{path: '{}'}}",
                path.display()
            )
        };
        let (server, running) = start_with(source, Path::new("/nowhere/socket"), echo().await);
        stat(&server, "sds.ROOTCA.update_success", 1).await;
        assert_ne!(server.state(), State::Live, "one of them is missing");
        put("default", &answer(&own(&ca.issue(&[SERVER, "first"]))));
        within(server.reached(State::Live)).await;
        let at = address(&server, "in");
        let leaf = ca.issue(&[CLIENT]);
        let mut old = handshake(&client(&ca, Some(&leaf), &[]), at, "first")
            .await
            .expect("it is let in");
        echoes(&mut old).await;

        put("default", &answer(&own(&ca.issue(&[SERVER, "next"]))));
        stat(&server, "sds.default.update_success", 2).await;
        handshake(&client(&ca, Some(&leaf), &[]), at, "next")
            .await
            .expect("the new certificate is in use");

        put("default", "resources: [{no: secret}]");
        put("ROOTCA", &answer(&roots(&Authority::new("other").pem())));
        stat(&server, "sds.ROOTCA.update_success", 2).await;
        assert_eq!(server.store.number("sds.default.update_success"), 2);
        put("ROOTCA", &answer(&roots(&ca.pem())));
        stat(&server, "sds.ROOTCA.update_success", 3).await;
        handshake(&client(&ca, Some(&leaf), &[]), at, "next")
            .await
            .expect("the last good certificate is in use");
        echoes(&mut old).await;
        running.abort();
    });
}

#[test]
fn a_listener_waits_for_the_secret_that_its_log_prints() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let folder = tempfile::tempdir().expect("a folder");
        let (secret, log) = (folder.path().join("secret"), folder.path().join("log"));
        let put = |text: &str| {
            let next = folder.path().join("next");
            let answer = serde_json::json!({"resources": [
                {"@type": TYPE, "name": "bearer", "generic_secret": {"secret": {"inline_string": text}}}
            ]});
            std::fs::write(&next, answer.to_string()).expect("it is written");
            std::fs::rename(&next, &secret).expect("it is moved");
        };
        let access = format!(
            "access_log: [{{name: f, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
             path: {log:?}, log_format: {{text_format_source: {{inline_string: \"%SECRET(token)% %SECRET(own)%\\n\"}}, formatters: [{{name: s, typed_config: {{\
             \"@type\": type.googleapis.com/envoy.extensions.formatter.generic_secret.v3.GenericSecret, secret_configs: {{own: {{name: static}}, \
             token: {{name: bearer, sds_config: {{initial_fetch_timeout: 0s, path_config_source: {{path: {secret:?}}}}}}}}}}}}}]}}}}}}],"
        );
        let yaml = format!(
            "node: {{id: n, cluster: c}}
static_resources:
  secrets: [{{name: static, generic_secret: {{secret: {{inline_string: fixed}}}}}}]
  clusters:
  - {{name: app, type: STATIC, load_assignment: {{cluster_name: app, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]}}]}}}}
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains: [{{{}}}]
",
            origin().await,
            http_to("app", &access)
        );
        let message: BootstrapMessage = proto::json::from_yaml(&yaml).expect("legal YAML");
        let bootstrap = Arc::new(Bootstrap::try_from(&message).expect("a bootstrap"));
        let options = Options {
            file_flush_interval: Duration::from_millis(1),
            ..Options::default()
        };
        let server = Server::start(bootstrap, options, stats::Store::default()).expect("workers");
        let mut discovery = Discovery::new(server.clone());
        let running = tokio::task::spawn_local(async move {
            discovery.begin().await.expect("the static part");
            discovery.run().await;
        });
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        assert!(server.listener_address("in").is_none(), "its secret is missing");
        put("one");
        within(server.reached(State::Live)).await;
        let at = address(&server, "in");
        let mut lines = 0;
        let mut line = async || {
            assert!(get(at, "").await.starts_with("HTTP/1.1 200"));
            lines += 1;
            within(async {
                loop {
                    let text = std::fs::read_to_string(&log).unwrap_or_default();
                    if text.lines().count() == lines {
                        return text.lines().last().map(str::to_owned);
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
            .await
        };
        assert_eq!(line().await.as_deref(), Some("one fixed"));
        put("two");
        stat(&server, "sds.bearer.update_success", 2).await;
        assert_eq!(line().await.as_deref(), Some("two fixed"));
        running.abort();
    });
}

type Tls = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

async fn try_echo(stream: &mut Tls) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"echo").await.is_ok()
        && within(stream.read_exact(&mut back)).await.is_ok()
        && &back == b"echo"
}

async fn echoes(stream: &mut Tls) {
    assert!(try_echo(stream).await, "the connection is served");
}
