//! The certificate authority and port 15012, over real TLS and gRPC: who gets a certificate, for what, and who does not.

mod authority;
mod port;
mod questions;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base::{clock::Clock, spiffe::Identity};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use outrigger_control::{
    ca::{
        Authority, Csr, Files,
        service::{Authenticator, Certificates},
        token::{KeyFile, TokenReviewer},
    },
    model::Settings,
    server::{Ads, Server, secure},
    translate::Istio,
};
use proto::{
    envoy::{
        admin::v3::ClustersConfigDump,
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, DiscoveryRequest, DiscoveryResponse,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
            },
            status::v3 as csds,
        },
    },
    istio::v1::auth::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
        istio_certificate_service_server::IstioCertificateServiceServer,
    },
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::{Value, json};
use tls::request::{KeyKind, KeyRequest};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Request, Status, transport::Channel};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn authority(dir: &Path, clock: Clock) -> Authority {
    let files = Files {
        state: dir.join("state"),
        plugged: dir.join("none"),
    };
    Authority::open(&files, "cluster.local", clock).expect("an authority")
}

/// A request for these names, and its key.
fn request(names: &[&str], is_ca: bool) -> (String, KeyPair) {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    params.subject_alt_names = names
        .iter()
        .map(|n| SanType::URI((*n).try_into().expect("uri")))
        .collect();
    if is_ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    let csr = params.serialize_request(&key).expect("csr");
    (csr.pem().expect("pem"), key)
}

fn web() -> Identity {
    WEB.parse().expect("identity")
}

/// Signs tokens and publishes the public key.
struct Issuer {
    key: KeyPair,
}

impl Issuer {
    fn new(dir: &Path) -> Self {
        let key = KeyPair::generate().expect("key");
        let point = key.public_key_raw();
        let text = |bytes: &[u8]| {
            use base64::Engine;
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
        };
        let jwks = json!({"keys": [
            {"kty": "EC", "crv": "P-256", "kid": "k", "x": text(&point[1..33]), "y": text(&point[33..])},
            // A shared secret among the keys must never prove anything.
            {"kty": "oct", "kid": "s", "k": text(b"secret")},
        ]});
        fs::write(dir.join("keys.json"), jwks.to_string()).expect("write");
        Self { key }
    }

    fn token(&self, change: impl FnOnce(&mut Value)) -> String {
        let now = Clock::system().seconds();
        let mut claims = json!({
            "iss": "outrigger", "sub": "system:serviceaccount:shop:web", "aud": ["istio-ca"],
            "iat": now, "exp": now + 600,
            "kubernetes.io": {"namespace": "shop", "pod": {"name": "web-0"}},
        });
        change(&mut claims);
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("k".to_owned());
        let key = EncodingKey::from_ec_der(&self.key.serialize_der());
        jsonwebtoken::encode(&header, &claims, &key).expect("token")
    }
}

const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, containers: [{name: app}]}
status: {phase: Running, podIP: 127.0.0.1, podIPs: [{ip: 127.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: away-0, namespace: shop, labels: {app: away}}
spec: {serviceAccountName: web, containers: [{name: app}]}
status: {phase: Running, podIP: 10.9.9.9, podIPs: [{ip: 10.9.9.9}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gateway-0, namespace: shop, labels: {istio: entry}}
spec: {serviceAccountName: entry, containers: [{name: app}]}
status: {phase: Running, podIP: 127.0.0.1, podIPs: [{ip: 127.0.0.1}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: entry, namespace: shop}
spec:
  selector: {istio: entry}
  servers:
  - port: {number: 443, name: https, protocol: HTTPS}
    hosts: ['*']
    tls: {mode: MUTUAL, credentialName: site}
";

/// What the Gateway names, what nobody names, and what is no certificate.
fn credentials() -> String {
    let site = rcgen::generate_simple_self_signed(vec!["site".into()]).expect("made");
    let secret = |name: &str, namespace: &str, key: &str| {
        let data = json!({"tls.crt": site.cert.pem(), "tls.key": key, "ca.crt": site.cert.pem()});
        json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": name, "namespace": namespace}, "stringData": data})
        .to_string()
    };
    let key = site.signing_key.serialize_pem();
    [
        secret("site", "shop", &key),
        secret("other", "shop", &key),
        secret("site", "bank", &key),
    ]
    .join("\n---\n")
}

/// A control plane's secure port.
struct Secured {
    address: std::net::SocketAddr,
    roots: String,
    issuer: Issuer,
    server: Arc<Server>,
    _dir: tempfile::TempDir,
}

impl Secured {
    async fn start() -> Self {
        Self::with(Clock::system()).await
    }

    /// With a clock of its own.
    async fn with(clock: Clock) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let issuer = Issuer::new(dir.path());
        let authority = Arc::new(authority(dir.path(), clock.clone()));
        let settings = Settings {
            replica: "replica-0".to_owned(),
            ..Settings::default()
        };
        let server = Server::new(Box::new(Istio), settings);
        let (snapshot, problems) = config::Snapshot::from_texts([
            (Path::new("a.yaml"), OBJECTS),
            (Path::new("b.yaml"), &credentials()),
        ]);
        server.load(Arc::new(snapshot), Arc::new(problems));
        let keys = KeyFile::open(&dir.path().join("keys.json"), clock.clone()).expect("keys");
        let authenticator = Authenticator {
            tokens: Some(Arc::new(keys)),
            trust_domain: "cluster.local".to_owned(),
            server: server.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let names = secure::names("istio-system", "default");
        let tls = secure::keep(authority.clone(), names, clock.clone()).expect("tls");
        let ads = Ads::authenticated(server.clone(), authenticator.clone());
        let roots = authority.roots();
        let certificates = Certificates::new(authority, authenticator, server.clone(), clock);
        let serving = tonic::transport::Server::builder()
            .add_service(xds::server::Service::new(Arc::new(ads)))
            .add_service(IstioCertificateServiceServer::new(certificates))
            .serve_with_incoming(secure::incoming(listener, tls));
        tokio::spawn(serving);
        Self {
            address,
            roots: roots.to_string(),
            issuer,
            server,
            _dir: dir,
        }
    }

    fn token_of(&self, pod: &str, account: &str) -> String {
        self.issuer.token(|c| {
            c["kubernetes.io"]["pod"]["name"] = json!(pod);
            c["sub"] = json!(format!("system:serviceaccount:shop:{account}"));
        })
    }

    /// A channel with or without a certificate of the client.
    async fn channel(&self, client: Option<(&[String], &KeyPair)>) -> Result<Channel, String> {
        let mut roots = RootCertStore::empty();
        for der in CertificateDer::pem_slice_iter(self.roots.as_bytes()) {
            roots.add(der.expect("pem")).expect("root");
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let mut config = match client {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = chain
                    .iter()
                    .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).expect("pem"))
                    .collect();
                let key = PrivateKeyDer::try_from(key.serialize_der()).expect("key");
                builder.with_client_auth_cert(chain, key).expect("client")
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (config, address) = (Arc::new(config), self.address);
        let connector = tower::service_fn(move |_| {
            let connector = tokio_rustls::TlsConnector::from(config.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from("istiod.istio-system.svc").expect("name");
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        tonic::transport::Endpoint::from_static("https://istiod.istio-system.svc")
            .connect_with_connector(connector)
            .await
            .map_err(|e| e.to_string())
    }

    async fn certificate(
        channel: Channel,
        token: Option<&str>,
        csr: String,
    ) -> Result<Vec<String>, Status> {
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            ..Default::default()
        });
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().expect("ascii");
            request.metadata_mut().insert("authorization", value);
        }
        let mut client = IstioCertificateServiceClient::new(channel);
        Ok(client
            .create_certificate(request)
            .await?
            .into_inner()
            .cert_chain)
    }
}
