//! The workload's certificate: asked for over TLS, given out over the unix socket, replaced in time, and what happens
//! when that cannot be.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use base::{clock::Clock, spiffe::Identity};
use outrigger_agent::{
    control_plane::{ControlPlane, Secure},
    identity::{Mounted, Options, Source, Workload, rotation::Policy},
    sds::{Place, Sds},
};
use proto::{
    any,
    envoy::{
        config::core::v3::data_source::Specifier,
        extensions::transport_sockets::tls::v3::{Secret, secret::Type},
        service::{
            discovery::v3::{DiscoveryRequest, DiscoveryResponse},
            secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
        },
    },
    istio::v1::auth::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyPair, SanType,
};
use tls::{identity::Identity as Pair, request::KeyKind, trust::Trust};
use tokio::{
    net::{TcpListener, UnixStream},
    sync::mpsc,
};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};

const NAME: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DAY: Duration = Duration::from_secs(24 * 3600);
const HOUR: Duration = Duration::from_secs(3600);
/// Long enough for any machine; nothing waits that long.
const PATIENCE: Duration = Duration::from_secs(20);

type Root = CertifiedIssuer<'static, KeyPair>;

fn root(name: &str) -> Root {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// An authority as the control plane runs it.
struct Authority {
    root: Mutex<Arc<Root>>,
    /// What is given out beside the certificate.
    roots: Mutex<String>,
    tokens: Mutex<Vec<Option<String>>>,
    asked: Mutex<Vec<i64>>,
    down: AtomicBool,
    clock: Clock,
    address: String,
}

struct Shared(Arc<Authority>);

#[tonic::async_trait]
impl IstioCertificateService for Shared {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let own = &self.0;
        let token = request.metadata().get("authorization");
        let token = token.map(|t| t.to_str().unwrap().to_owned());
        own.tokens.lock().unwrap().push(token);
        if own.down.load(Ordering::Relaxed) {
            return Err(Status::unavailable("no signing today"));
        }
        let asked = request.into_inner();
        own.asked.lock().unwrap().push(asked.validity_duration);
        let csr = CertificateSigningRequestParams::from_pem(&asked.csr).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = csr.params.subject_alt_names.clone();
        let now = own.clock.now();
        params.not_before = (now - Duration::from_secs(120)).into();
        params.not_after = (now + Duration::from_secs(asked.validity_duration as u64)).into();
        let root = own.root.lock().unwrap().clone();
        let leaf = params.signed_by(&csr.public_key, &root).unwrap();
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: vec![leaf.pem(), own.roots.lock().unwrap().clone()],
        }))
    }
}

impl Authority {
    async fn start(clock: Clock) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let root = Arc::new(root("one"));
        let authority = Arc::new(Self {
            roots: Mutex::new(root.pem()),
            root: Mutex::new(root.clone()),
            tokens: Mutex::default(),
            asked: Mutex::default(),
            down: AtomicBool::new(false),
            clock,
            address: listener.local_addr().unwrap().to_string(),
        });
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["istiod.istio-system.svc".into()]).unwrap();
        params.not_before = (SystemTime::now() - 400 * DAY).into();
        params.not_after = (SystemTime::now() + 400 * DAY).into();
        let own = params.signed_by(&key, &root).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.der().clone()], key)
        .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let (send, receive) = mpsc::channel(8);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, send) = (acceptor.clone(), send.clone());
                tokio::spawn(async move {
                    if let Ok(mut stream) = acceptor.accept(stream).await {
                        let (mut near, far) = tokio::io::duplex(1 << 16);
                        let _ = send.send(Ok::<_, std::io::Error>(far)).await;
                        let _ = tokio::io::copy_bidirectional(&mut stream, &mut near).await;
                    }
                });
            }
        });
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(IstioCertificateServiceServer::new(Shared(
                    authority.clone(),
                )))
                .serve_with_incoming(ReceiverStream::new(receive)),
        );
        authority
    }
}

/// A pod's files, and its agent's secret service.
struct Pod {
    dir: tempfile::TempDir,
    clock: Clock,
    workload: Arc<Workload>,
    _tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Pod {
    fn options(dir: &Path, authority: &Authority) -> Options {
        fs::write(
            dir.join("root-cert.pem"),
            authority.root.lock().unwrap().pem(),
        )
        .unwrap();
        fs::write(dir.join("token"), "first\n").unwrap();
        let clock = authority.clock.clone();
        let secure = Secure {
            roots: dir.join("root-cert.pem"),
            server_name: Some("istiod.istio-system.svc".into()),
            token: dir.join("token"),
            certificate: None,
            clock: clock.clone(),
        };
        Options {
            source: Source::Authority {
                control_plane: Box::new(ControlPlane::secure(&authority.address, secure)),
                identity: NAME.parse::<Identity>().unwrap(),
            },
            key: KeyKind::EcdsaP256,
            policy: Policy {
                ratio: 0.5,
                jitter: 0.01,
            },
            lifetime: DAY,
            output: None,
            roots: dir.join("root-cert.pem"),
            socket: dir.join("socket"),
            foreign_socket: false,
            files_socket: dir.join("files-socket"),
            eager: true,
            clock,
        }
    }

    fn start(dir: tempfile::TempDir, options: Options) -> Self {
        let clock = options.clock.clone();
        let socket = options.socket.clone();
        let workload = Workload::new(options);
        let server = Sds::new(workload.clone()).serve(&socket).unwrap();
        let tasks = vec![
            tokio::spawn(async move { server.await.unwrap() }),
            tokio::spawn(workload.clone().run()),
        ];
        Self {
            dir,
            clock,
            workload,
            _tasks: tasks,
        }
    }

    async fn with(authority: &Authority) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Self::options(dir.path(), authority);
        Self::start(dir, options)
    }

    async fn ask(&self, name: &str) -> Answers {
        ask(&self.dir.path().join("socket"), name).await
    }

    fn step(&self, to: SystemTime) {
        self.clock.set(to);
    }
}

/// One stream, as a proxy has one for each secret.
struct Answers {
    name: String,
    requests: mpsc::UnboundedSender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
}

async fn ask(socket: &Path, name: &str) -> Answers {
    let socket: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move {
            let stream = UnixStream::connect(socket).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let channel = tonic::transport::Endpoint::from_static("http://sds")
        .connect_with_connector(connector)
        .await
        .unwrap();
    let (requests, receive) = mpsc::unbounded_channel();
    requests
        .send(DiscoveryRequest {
            resource_names: vec![name.to_owned()],
            ..DiscoveryRequest::default()
        })
        .unwrap();
    let mut client = SecretDiscoveryServiceClient::new(channel);
    let responses = client
        .stream_secrets(UnboundedReceiverStream::new(receive))
        .await
        .unwrap()
        .into_inner();
    Answers {
        name: name.to_owned(),
        requests,
        responses,
    }
}

impl Answers {
    /// The next secret: its texts, certificate before key.
    async fn next(&mut self) -> Result<Vec<String>, Status> {
        let message = tokio::time::timeout(PATIENCE, self.responses.message()).await;
        let response = message.expect("a secret in time")?.expect("no end");
        self.requests
            .send(DiscoveryRequest {
                resource_names: vec![self.name.clone()],
                version_info: response.version_info.clone(),
                response_nonce: response.nonce.clone(),
                ..DiscoveryRequest::default()
            })
            .map_err(|_| Status::aborted("gone"))
            .ok();
        let secret: Secret = any::unpack(&response.resources[0]).unwrap();
        let text = |source: Option<proto::envoy::config::core::v3::DataSource>| {
            let Some(Specifier::InlineBytes(bytes)) = source.and_then(|s| s.specifier) else {
                panic!("inline");
            };
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        Ok(match secret.r#type.unwrap() {
            Type::TlsCertificate(c) => vec![text(c.certificate_chain), text(c.private_key)],
            Type::ValidationContext(c) => vec![text(c.trusted_ca)],
            _ => panic!("another kind"),
        })
    }

    async fn pair(&mut self) -> Pair {
        let texts = self.next().await.unwrap();
        Pair::from_pem(texts[0].as_bytes(), texts[1].as_bytes()).unwrap()
    }
}

async fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !ready() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_certificate_comes_and_is_replaced_at_half_its_life() {
    let start = SystemTime::now();
    let authority = Authority::start(Clock::manual(start)).await;
    let pod = Pod::with(&authority).await;
    let (mut own, mut roots) = (pod.ask("default").await, pod.ask("ROOTCA").await);
    let first = own.pair().await;
    assert_eq!(&*first.leaf().uris, [Box::from(NAME)]);
    let trusted = roots.next().await.unwrap();
    assert_eq!(
        Trust::from_pem(trusted[0].as_bytes()).unwrap().ders().len(),
        1
    );
    assert_eq!(*authority.asked.lock().unwrap(), [24 * 3600]);
    assert_eq!(
        *authority.tokens.lock().unwrap(),
        [Some("Bearer first".to_owned())]
    );
    assert_eq!(pod.workload.not_ready(), None);
    let mode = fs::metadata(pod.dir.path().join("socket")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o660);

    // The token is read anew: the kubelet has replaced it.
    fs::write(pod.dir.path().join("token"), "second").unwrap();
    // An hour ahead is no reason; half a day is.
    pod.step(start + HOUR);
    pod.step(start + DAY / 2 + HOUR);
    let second = own.pair().await;
    assert_ne!(second.leaf().serial, first.leaf().serial);
    assert_ne!(
        second.leaf().spki_sha256,
        first.leaf().spki_sha256,
        "a key of its own"
    );
    assert_eq!(
        authority.tokens.lock().unwrap().last().unwrap().as_deref(),
        Some("Bearer second")
    );
    // The clock is set back by an hour: the certificate may not have begun for others.
    pod.step(start + DAY / 2);
    let third = own.pair().await;
    assert_ne!(third.leaf().serial, second.leaf().serial);
    let figures = pod.workload.text();
    assert!(
        figures.contains("istio_agent_num_outgoing_requests{request_type=\"csr\"} 3"),
        "{figures}"
    );
    assert!(
        figures.contains("istio_agent_cert_expiry_seconds{resource_name=\"default\"} 863"),
        "{figures}"
    );
}

#[tokio::test]
async fn an_authority_that_is_down_is_told_of_and_waited_for() {
    let start = SystemTime::now();
    let authority = Authority::start(Clock::manual(start)).await;
    authority.down.store(true, Ordering::Relaxed);
    let pod = Pod::with(&authority).await;
    until("the refusal", || {
        pod.workload
            .not_ready()
            .is_some_and(|why| why.contains("no signing today"))
    })
    .await;
    let why = pod.workload.not_ready().unwrap();
    assert!(
        why.contains(&format!("no certificate for {NAME} yet")) && why.contains(&authority.address),
        "{why}"
    );
    authority.down.store(false, Ordering::Relaxed);
    let mut own = pod.ask("default").await;
    let first = own.pair().await;

    authority.down.store(true, Ordering::Relaxed);
    pod.step(start + DAY - HOUR);
    until("a renewal that fails", || !pod.workload.detail().is_empty()).await;
    let detail = pod.workload.detail();
    assert!(
        detail.contains("good for another 3") && detail.contains("no signing today"),
        "{detail}"
    );
    assert_eq!(pod.workload.not_ready(), None, "it is still good");
    // Two hours on it is not.
    pod.step(start + DAY + HOUR);
    let why = pod.workload.not_ready().unwrap();
    assert!(why.contains("expired 360"), "{why}");
    assert!(pod.workload.text().contains("} -360"));
    authority.down.store(false, Ordering::Relaxed);
    let second = own.pair().await;
    assert_ne!(first.leaf().serial, second.leaf().serial);
    until("ready again", || pod.workload.not_ready().is_none()).await;
}

#[tokio::test]
async fn a_certificate_that_is_over_when_it_comes_is_none() {
    let authority = Authority::start(Clock::manual(SystemTime::now())).await;
    let dir = tempfile::tempdir().unwrap();
    let mut options = Pod::options(dir.path(), &authority);
    // This node's clock is two days ahead of the authority's.
    options.clock = Clock::manual(SystemTime::now() + 2 * DAY);
    let pod = Pod::start(dir, options);
    until("the refusal", || {
        let why = pod.workload.not_ready().unwrap_or_default();
        why.contains("compare the clocks")
    })
    .await;
}

#[tokio::test]
async fn new_roots_are_given_out_at_once_and_a_dropped_one_costs_the_certificate() {
    let authority = Authority::start(Clock::manual(SystemTime::now())).await;
    let pod = Pod::with(&authority).await;
    let (mut own, mut roots) = (pod.ask("default").await, pod.ask("ROOTCA").await);
    let first = own.pair().await;
    let one = roots.next().await.unwrap()[0].clone();

    // The overlap: both are mounted, and nobody signs with the new one yet.
    let next = Arc::new(root("two"));
    let both = format!("{}{}", authority.root.lock().unwrap().pem(), next.pem());
    let file = pod.dir.path().join("root-cert.pem");
    fs::write(&file, &both).unwrap();
    let overlapped = roots.next().await.unwrap()[0].clone();
    assert_eq!(
        Trust::from_pem(overlapped.as_bytes()).unwrap().ders().len(),
        2
    );
    assert!(overlapped.contains(one.trim()));
    // A bundle that is none changes nothing.
    fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n").unwrap();
    until("the bad bundle", || {
        pod.workload.text().contains("file_secret_failures_total 1")
    })
    .await;
    fs::write(&file, &both).unwrap();

    // The new one signs, and is all that the authority answers with; then the old one goes from the mount as well.
    *authority.root.lock().unwrap() = next.clone();
    *authority.roots.lock().unwrap() = next.pem();
    let half = pod.clock.now() + DAY / 2 + HOUR;
    pod.step(half);
    let second = own.pair().await;
    assert_ne!(second.leaf().issuer, first.leaf().issuer);
    fs::write(&file, next.pem()).unwrap();
    let left = roots.next().await.unwrap()[0].clone();
    assert_eq!(Trust::from_pem(left.as_bytes()).unwrap().ders().len(), 1);
}

#[tokio::test]
async fn nobody_but_the_authority_gets_the_token() {
    let authority = Authority::start(Clock::manual(SystemTime::now())).await;
    let refused = async |change: fn(&Path, &mut Secure)| {
        let dir = tempfile::tempdir().unwrap();
        let mut options = Pod::options(dir.path(), &authority);
        let mut secure = Secure {
            roots: dir.path().join("root-cert.pem"),
            server_name: Some("istiod.istio-system.svc".into()),
            token: dir.path().join("token"),
            certificate: None,
            clock: options.clock.clone(),
        };
        change(dir.path(), &mut secure);
        options.source = Source::Authority {
            control_plane: Box::new(ControlPlane::secure(&authority.address, secure)),
            identity: NAME.parse().unwrap(),
        };
        let pod = Pod::start(dir, options);
        let mut why = String::new();
        until("a refusal", || {
            why = pod.workload.not_ready().unwrap_or_default();
            !why.contains("just asked")
        })
        .await;
        why
    };
    // Another root, another name, a token that is not there, and an expired server.
    let why = refused(|dir, _| fs::write(dir.join("root-cert.pem"), root("x").pem()).unwrap());
    let why = why.await;
    assert!(
        why.contains("UnknownIssuer") || why.contains("issuer"),
        "{why}"
    );
    let why = refused(|_, secure| secure.server_name = Some("evil.example".into())).await;
    assert!(why.contains("evil.example"), "{why}");
    let why = refused(|dir, _| fs::remove_file(dir.join("token")).unwrap()).await;
    assert!(why.contains("service account token"), "{why}");
    let why = refused(|_, secure| {
        secure.clock = Clock::manual(SystemTime::now() + 500 * DAY);
    });
    let why = why.await;
    assert!(why.to_lowercase().contains("expired"), "{why}");
    assert!(authority.tokens.lock().unwrap().is_empty());
    // Without TLS no token is ever sent.
    let plain = ControlPlane::plaintext("127.0.0.1:15010")
        .metadata()
        .unwrap();
    assert!(plain.get("authorization").is_none());
}

#[tokio::test]
async fn files_are_served_if_they_are_certificates_and_again_when_they_change() {
    let authority = Authority::start(Clock::manual(SystemTime::now())).await;
    let pod = Pod::with(&authority).await;
    let make = || rcgen::generate_simple_self_signed(vec!["a".into()]).unwrap();
    let at = |name: &str| pod.dir.path().join(name);
    let write = || {
        let made = make();
        fs::write(at("key.pem"), made.signing_key.serialize_pem()).unwrap();
        fs::write(at("cert.pem"), made.cert.pem()).unwrap();
        made.cert.pem()
    };
    let first = write();
    let name = format!(
        "file-cert:{}~{}",
        at("cert.pem").display(),
        at("key.pem").display()
    );
    let mut answers = pod.ask(&name).await;
    assert_eq!(answers.next().await.unwrap()[0], first);
    let second = write();
    assert_eq!(answers.next().await.unwrap()[0], second);
    let mut answers = pod
        .ask(&format!("file-root:{}", at("cert.pem").display()))
        .await;
    assert_eq!(answers.next().await.unwrap()[0], second);
    // Anything else than certificates stays where it is, and what nobody knows is refused.
    let mut answers = pod
        .ask(&format!("file-root:{}", at("token").display()))
        .await;
    let none = tokio::time::timeout(Duration::from_millis(1200), answers.responses.message());
    assert!(none.await.is_err(), "the token is no certificate");
    for unknown in ["other", "file-cert:/etc/passwd", "kubernetes://x"] {
        let refused = pod.ask(unknown).await.next().await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::NotFound, "{unknown}");
    }
}

#[tokio::test]
async fn mounted_certificates_are_served_followed_and_written_out() {
    let authority = Authority::start(Clock::manual(SystemTime::now())).await;
    let dir = tempfile::tempdir().unwrap();
    let mut options = Pod::options(dir.path(), &authority);
    let at = |name: &str| dir.path().join(name);
    let issuer = root("mounted");
    let write = || {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(NAME.try_into().unwrap())];
        let leaf = params.signed_by(&key, &issuer).unwrap();
        fs::write(at("ca.pem"), issuer.pem()).unwrap();
        fs::write(at("tls.key"), key.serialize_pem()).unwrap();
        fs::write(at("tls.crt"), leaf.pem()).unwrap();
        leaf.pem()
    };
    let first = write();
    let out = at("out");
    options.output = Some(out.clone());
    options.source = Source::Files(Mounted {
        chain: at("tls.crt"),
        key: at("tls.key"),
        roots: at("ca.pem"),
    });
    let second = {
        let socket = options.socket.clone();
        let workload = Workload::new(options);
        let server = Sds::new(workload.clone()).serve(&socket).unwrap();
        tokio::spawn(server);
        tokio::spawn(workload.run());
        let mut own = ask(&socket, "default").await;
        assert_eq!(own.next().await.unwrap()[0], first);
        let second = write();
        let mut seen = own.next().await.unwrap()[0].clone();
        while seen != second {
            seen = own.next().await.unwrap()[0].clone();
        }
        second
    };
    let path = out.join("cert-chain.pem");
    until("the files", || {
        fs::read_to_string(&path).is_ok_and(|t| t == second)
    })
    .await;
    let mode = |name: &str| fs::metadata(out.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("key.pem"), mode("root-cert.pem")), (0o600, 0o644));
}

#[tokio::test]
async fn a_socket_of_another_is_left_alone() {
    let authority = Authority::start(Clock::manual(SystemTime::now())).await;
    let dir = tempfile::tempdir().unwrap();
    let mut options = Pod::options(dir.path(), &authority);
    // A file that a former agent left behind is nobody's.
    fs::write(&options.socket, "stale").unwrap();
    assert!(matches!(Place::find(&options).unwrap(), Place::Own(_)));
    options.foreign_socket = true;
    let error = Place::find(&options).unwrap_err().to_string();
    assert!(error.contains("WORKLOAD_IDENTITY_SOCKET_FILE"), "{error}");
    fs::remove_file(&options.socket).unwrap();
    let _spire = tokio::net::UnixListener::bind(&options.socket).unwrap();
    let Place::Beside(path) = Place::find(&options).unwrap() else {
        panic!("another serves it");
    };
    tokio::spawn(Sds::files().serve(&path).unwrap());
    let refused = ask(&path, "default").await.next().await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound);
}
