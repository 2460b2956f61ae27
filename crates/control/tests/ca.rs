//! The certificate authority and port 15012, over real TLS and gRPC: who gets a certificate, for what, and who does not.

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

#[test]
fn keys_are_made_once_and_for_nobody_else() {
    let dir = tempfile::tempdir().expect("dir");
    let first = authority(dir.path(), Clock::system()).roots();
    let mode = |name: &str| {
        let meta = fs::metadata(dir.path().join(name)).expect(name);
        meta.permissions().mode() & 0o777
    };
    assert_eq!((mode("state"), mode("state/ca-key.pem")), (0o700, 0o600));
    assert_eq!(authority(dir.path(), Clock::system()).roots(), first);

    let key = dir.path().join("state/ca-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("chmod");
    let files = Files {
        state: dir.path().join("state"),
        plugged: dir.path().join("none"),
    };
    let error = Authority::open(&files, "cluster.local", Clock::system()).expect_err("exposed");
    assert!(error.to_string().contains("make it 0600"), "{error}");
}

#[test]
fn half_a_plugged_authority_is_none() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join("ca-cert.pem"), "x").expect("write");
    let files = Files {
        state: dir.path().join("state"),
        plugged: dir.path().to_owned(),
    };
    let error = Authority::open(&files, "cluster.local", Clock::system()).expect_err("half");
    assert!(
        error.to_string().contains("ca-key.pem is missing"),
        "{error}"
    );
    assert!(!dir.path().join("state").exists());
}

#[test]
fn a_certificate_is_for_the_caller_and_no_longer_than_asked() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = authority(dir.path(), Clock::system());
    let (csr, _) = request(&[WEB], false);
    let csr = Csr::read(&csr, &web()).expect("a good request");
    let chain = authority
        .sign(&web(), None, &csr, Duration::from_secs(3600))
        .expect("signed");
    assert_eq!(chain.len(), 2);
    assert_eq!(*chain[1], *authority.roots());
    let der = CertificateDer::from_pem_slice(chain[0].as_bytes()).expect("pem");
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).expect("x509");
    let names = leaf.subject_alternative_name().expect("san").expect("san");
    assert_eq!(
        format!("{:?}", names.value.general_names),
        format!("[URI({WEB:?})]")
    );
    assert!(
        names.critical,
        "without a subject the name must be understood"
    );
    assert!(!leaf.is_ca());
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 3600 + 120);
    let error = authority.sign(&web(), None, &csr, Duration::from_secs(91 * 24 * 3600));
    assert!(error.is_err());
}

#[test]
fn requests_for_more_than_the_caller_is_are_refused() {
    let refused = |csr: &str| Csr::read(csr, &web()).expect_err("refused").to_string();
    let (other, _) = request(&["spiffe://cluster.local/ns/shop/sa/admin"], false);
    assert!(refused(&other).contains("sa/admin"), "{}", refused(&other));
    let (two, _) = request(&[WEB, "spiffe://cluster.local/ns/shop/sa/admin"], false);
    assert!(refused(&two).contains("sa/admin"));
    let (ca, _) = request(&[WEB], true);
    assert!(refused(&ca).contains("CA certificate"), "{}", refused(&ca));
    let large = format!("{}{}", request(&[], false).0, " ".repeat(10 << 20));
    assert!(refused(&large).contains("at most"));
    assert!(
        refused("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
            .contains("PKCS#10")
    );
    // A key that the sender does not hold: the signature does not fit.
    let (good, _) = request(&[WEB], false);
    let at = good.len() - 60;
    let flipped = if &good[at..=at] == "A" { "B" } else { "A" };
    let forged = format!("{}{flipped}{}", &good[..at], &good[at + 1..]);
    assert!(Csr::read(&forged, &web()).is_err());
}

/// An RSA key of 1024 bits, with the signature that belongs to it.
const WEAK: &str = "\
-----BEGIN CERTIFICATE REQUEST-----
MIIBSzCBtQIBADAMMQowCAYDVQQKDAF4MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCB
iQKBgQDufsNSCv6SiNB2QZICzjlpH0aHnh1wGfm1nW8MT9OJvnkxUrtps4Uh9m1A
t06odmXVM4XL+pswF9v/OaVWHd8YKI5IR5IyVUGK4hipiNECkxPhei2GvnUkZnzU
Rv2NThYGlSl1w+8QFNFSof5AgLVFzlsAiCnqSAmKjDsaGiuGywIDAQABoAAwDQYJ
KoZIhvcNAQELBQADgYEADcHiTia//OGMjErNSIwhEjYBJ0Je4SnLMCb7T6ELMRjW
IiCy8JTG8Iqm2QSaHQooN/9vSbnPbQCrBHbRo0Ll3zq+rjCbWcJ7+wvTrvDXyUPM
E4FsEpNt983wdwj7laWhXooReWcLSuThGT1SFkzjg/nGxVl3VOTaYaUWYO6PI1I=
-----END CERTIFICATE REQUEST-----
";

#[test]
fn every_kind_of_key_is_signed_but_weak_ones() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = authority(dir.path(), Clock::system());
    for kind in [
        KeyKind::EcdsaP256,
        KeyKind::EcdsaP384,
        KeyKind::Rsa2048,
        KeyKind::Ed25519,
    ] {
        let made = KeyRequest::new(kind, WEB).expect("a request");
        let csr = Csr::read(&made.csr, &web()).expect("a good key");
        let chain = authority.sign(&web(), None, &csr, Duration::ZERO);
        let chain = chain.expect("signed");
        // They belong together: a proxy can use it.
        tls::identity::Identity::from_pem(chain[0].as_bytes(), made.key.as_bytes())
            .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
    }
    let why = Csr::read(WEAK, &web()).expect_err("too short").to_string();
    assert!(why.contains("an RSA key of 1024 bits"), "{why}");
}

#[test]
fn an_expired_authority_signs_nothing_and_says_so() {
    let dir = tempfile::tempdir().expect("dir");
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone());
    let csr = Csr::read(&request(&[], false).0, &web()).expect("csr");
    clock.set(start + Duration::from_secs(3651 * 24 * 3600));
    let error = authority
        .sign(&web(), None, &csr, Duration::ZERO)
        .expect_err("expired");
    assert!(error.to_string().contains("not valid now"), "{error}");
}

/// What a root is called by.
fn issuer_of(pem: &str) -> Vec<u8> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("pem");
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).expect("x509");
    // Roots of one trust domain have one name: their keys tell them apart.
    let id = leaf
        .iter_extensions()
        .find_map(|e| match e.parsed_extension() {
            x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(id) => {
                id.key_identifier.as_ref().map(|id| id.0.to_vec())
            }
            _ => None,
        });
    id.expect("an authority key identifier")
}

fn count(roots: &str) -> usize {
    roots.matches("BEGIN CERTIFICATE").count()
}

#[test]
fn one_root_follows_another_and_both_are_trusted_while_either_is_needed() {
    let dir = tempfile::tempdir().expect("dir");
    let state = dir.path().join("state");
    let hour = Duration::from_secs(3600);
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let open = || authority(dir.path(), clock.clone()).with_overlap(hour);
    let csr = Csr::read(&request(&[WEB], false).0, &web()).expect("csr");
    let sign = |authority: &Authority| {
        let chain = authority
            .sign(&web(), None, &csr, 2 * hour)
            .expect("signed");
        assert_eq!(
            *chain[1],
            *authority.roots(),
            "the answer has the roots of the moment"
        );
        issuer_of(&chain[0])
    };
    let first = open();
    let (old, signed_by_old) = (first.roots(), sign(&first));
    first.turn().expect("nothing to do");
    assert_eq!(first.roots(), old);

    // Introduced: given out, and not signed with; also for a control plane that starts anew.
    fs::write(state.join("rotate"), "").expect("wish");
    first.turn().expect("introduced");
    assert!(!state.join("rotate").exists());
    for authority in [&first, &open()] {
        authority.turn().expect("waits");
        assert_eq!(count(&authority.roots()), 2);
        assert!(authority.roots().contains(&*old));
        assert_eq!(sign(authority), signed_by_old);
    }
    let given_out = fs::read_to_string(state.join("root-cert.pem")).expect("roots");
    assert_eq!(given_out, *first.roots());

    // A clock that is set back delays it, and one that is set forth does not skip a step.
    clock.set(start - hour);
    first.turn().expect("waits");
    assert_eq!(sign(&first), signed_by_old);
    clock.set(start + hour);
    first.turn().expect("switched");
    let second = open();
    for authority in [&first, &second] {
        assert_ne!(sign(authority), signed_by_old);
        assert_eq!(count(&authority.roots()), 2);
    }
    assert!(
        !state.join("ca-key.pem").exists(),
        "the key that signs no more"
    );
    let mode = |name: &str| {
        let meta = fs::metadata(state.join(name)).expect(name);
        meta.permissions().mode() & 0o777
    };
    assert_eq!(
        (mode("ca-2-key.pem"), mode("authority.json")),
        (0o600, 0o600)
    );

    // Dropped when the last certificate of the old one has ended.
    clock.set(start + 3 * hour - Duration::from_secs(2));
    second.turn().expect("waits");
    assert_eq!(count(&second.roots()), 2);
    clock.set(start + 3 * hour);
    second.turn().expect("dropped");
    assert_eq!(count(&second.roots()), 1);
    assert!(!second.roots().contains(&*old));
    assert_eq!(open().roots(), second.roots());
}

#[test]
fn a_new_root_does_not_sign_before_everybody_has_it() {
    let dir = tempfile::tempdir().expect("dir");
    let seconds = Duration::from_secs;
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone()).with_overlap(seconds(60));
    let csr = Csr::read(&request(&[WEB], false).0, &web()).expect("csr");
    let sign = |address: u8| {
        let from = Some([10, 0, 0, address].into());
        let chain = authority.sign(&web(), from, &csr, seconds(3600));
        issuer_of(&chain.expect("signed")[0])
    };
    let old = sign(1);
    assert_eq!(sign(2), old);
    fs::write(dir.path().join("state/rotate"), "").expect("wish");
    authority.turn().expect("introduced");
    // The overlap is over, and the second pod with this identity has not come back for its next certificate.
    assert_eq!(sign(1), old);
    clock.set(start + seconds(1800));
    authority.turn().expect("waits");
    assert_eq!(sign(1), old);
    assert_eq!(sign(2), old);
    authority.turn().expect("switched");
    assert_ne!(sign(1), old);
}

#[test]
fn a_root_is_replaced_before_it_ends() {
    let dir = tempfile::tempdir().expect("dir");
    let start = SystemTime::now();
    let clock = Clock::manual(start);
    let authority = authority(dir.path(), clock.clone());
    let day = Duration::from_secs(24 * 3600);
    clock.set(start + 2900 * day);
    authority.turn().expect("nothing to do");
    assert_eq!(count(&authority.roots()), 1);
    clock.set(start + 2925 * day);
    authority.turn().expect("introduced");
    assert_eq!(count(&authority.roots()), 2);
}

#[test]
fn a_plugged_authority_is_read_anew_where_its_old_root_is_still_trusted() {
    let dir = tempfile::tempdir().expect("dir");
    let make = || {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (
            params.self_signed(&key).expect("root").pem(),
            key.serialize_pem(),
        )
    };
    let put = |(root, key): &(String, String), roots: &str| {
        fs::write(dir.path().join("ca-key.pem"), key).expect("write");
        fs::write(dir.path().join("ca-cert.pem"), root).expect("write");
        fs::write(dir.path().join("cert-chain.pem"), "").expect("write");
        fs::write(dir.path().join("root-cert.pem"), roots).expect("write");
    };
    let (one, two) = (make(), make());
    put(&one, &one.0);
    let files = Files {
        state: dir.path().join("state"),
        plugged: dir.path().to_owned(),
    };
    let authority = Authority::open(&files, "cluster.local", Clock::system()).expect("plugged");
    let csr = Csr::read(&request(&[], false).0, &web()).expect("csr");
    let signed = || {
        let chain = authority
            .sign(&web(), None, &csr, Duration::ZERO)
            .expect("signed");
        issuer_of(&chain[0])
    };
    let first = signed();
    put(&two, &two.0);
    authority.turn().expect("refused with a word in the log");
    assert_eq!(*authority.roots(), *one.0);
    assert_eq!(signed(), first);
    put(&two, &format!("{}{}", one.0, two.0));
    authority.turn().expect("read");
    assert_eq!(count(&authority.roots()), 2);
    assert_ne!(signed(), first);
}

/// A key as `openssl ecparam -genkey` writes it, made for this test.
const SEC1: &str = "\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIBeGAUixNgtVK0/lsXV0fLyqdbVL+/zFZOy2himsVaQIoAoGCCqGSM49
AwEHoUQDQgAEEhle/SwoglLYo2VlF1glFKMjdAOXgV/pmjadAsKsiezSpmZJ1Z8f
gy7/L6a7VPxeYFJNjK5lSeUUn+djnYye1g==
-----END EC PRIVATE KEY-----
";

#[test]
fn a_plugged_key_may_be_written_in_each_of_its_forms() {
    let rsa = KeyRequest::new(KeyKind::Rsa2048, WEB).expect("a key").key;
    let pkcs8 = PrivateKeyDer::from_pem_slice(rsa.as_bytes()).expect("pem");
    // In PKCS#8 an RSA key is the last thing, and as it stands in PKCS#1: a sequence of more than 255 bytes.
    let der = pkcs8.secret_der();
    let begins = |at: &usize| der[*at..].starts_with(&[0x30, 0x82]) && *at > 0;
    let at = (0..der.len()).find(begins).expect("a key");
    let pkcs1 = pem("RSA PRIVATE KEY", &der[at..]);
    for text in [&*rsa, &*pkcs1, SEC1] {
        let dir = tempfile::tempdir().expect("dir");
        let key = KeyPair::from_pem(text).expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("root").pem();
        for (name, text) in [
            ("ca-key.pem", text),
            ("ca-cert.pem", &*root),
            ("cert-chain.pem", ""),
            ("root-cert.pem", &*root),
        ] {
            fs::write(dir.path().join(name), text).expect("write");
        }
        let files = Files {
            state: dir.path().join("state"),
            plugged: dir.path().to_owned(),
        };
        let authority = Authority::open(&files, "cluster.local", Clock::system());
        let csr = Csr::read(&request(&[], false).0, &web()).expect("csr");
        let chain = authority
            .unwrap_or_else(|e| panic!("{}: {e}", text.lines().next().unwrap_or_default()))
            .sign(&web(), None, &csr, Duration::ZERO)
            .expect("signed");
        let trust = tls::trust::Trust::from_pem(root.as_bytes()).expect("roots");
        let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).expect("pem");
        let validation = tls::verify::Validation {
            trust: Some(Arc::new(trust)),
            ..Default::default()
        };
        let now = rustls_pki_types::UnixTime::now();
        let judged = validation.judge(&leaf, &[], tls::verify::Role::Client, None, now);
        assert!(judged.is_ok(), "{:?}", judged.err());
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = (0..text.len())
        .step_by(64)
        .map(|at| &text[at..text.len().min(at + 64)])
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
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

#[tokio::test]
async fn tokens_prove_what_they_say_and_nothing_else() {
    let dir = tempfile::tempdir().expect("dir");
    let issuer = Issuer::new(dir.path());
    let clock = Clock::manual(SystemTime::now());
    let reviewer = KeyFile::open(&dir.path().join("keys.json"), clock.clone()).expect("keys");
    let review = async |token: &str| reviewer.review(token).await.map_err(|e| e.to_string());

    let good = issuer.token(|_| ());
    let reviewed = review(&good).await.expect("good");
    assert_eq!(reviewed.identity("cluster.local").expect("identity"), web());
    assert_eq!(reviewed.pod.as_deref(), Some("web-0"));

    let wrong = |what: &str, got: Result<_, String>| {
        let error = got.err().unwrap_or_else(|| panic!("{what} is accepted"));
        assert!(error.contains(what), "{error}");
    };
    let now = clock.seconds();
    wrong(
        "expired",
        review(&issuer.token(|c| c["exp"] = json!(now - 31))).await,
    );
    wrong(
        "not valid for",
        review(&issuer.token(|c| c["nbf"] = json!(now + 60))).await,
    );
    wrong(
        "meant for",
        review(&issuer.token(|c| c["aud"] = json!("vault"))).await,
    );
    wrong(
        "no service account",
        review(&issuer.token(|c| c["sub"] = json!("admin"))).await,
    );
    wrong("at most", review(&"x".repeat(1 << 20)).await);
    wrong("not a signed token", review("a.b.c").await);
    let parts: Vec<&str> = good.split('.').collect();
    let other = issuer.token(|c| c["sub"] = json!("system:serviceaccount:shop:admin"));
    let mixed = format!("{}.{}", other.rsplit_once('.').expect("dot").0, parts[2]);
    wrong("signature", review(&mixed).await);
    // Signed with a "secret" that everybody can read, and not signed at all.
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some("s".to_owned());
    let claims =
        json!({"sub": "system:serviceaccount:shop:web", "aud": "istio-ca", "exp": now + 600});
    let shared = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(b"secret"));
    wrong("not accepted", review(&shared.expect("token")).await);
    let none = format!("eyJhbGciOiJub25lIn0.{}.", parts[1]);
    assert!(review(&none).await.is_err());

    // An hour on, the same token is worth nothing; an hour back, it was not yet made, which is no reason to refuse it.
    clock.set(SystemTime::now() + Duration::from_secs(3600));
    wrong("expired", review(&good).await);
    clock.set(SystemTime::now() - Duration::from_secs(3600));
    assert!(review(&good).await.is_ok());
}

/// Two pods of one namespace; only the gateway's is here, on this machine.
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

#[tokio::test]
async fn a_token_buys_a_certificate_and_the_certificate_the_next_one() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let (csr, key) = request(&[WEB], false);
    let token = secured.issuer.token(|_| ());
    let chain = Secured::certificate(channel.clone(), Some(&token), csr.clone())
        .await
        .expect("signed");

    let nobody = Secured::certificate(channel.clone(), None, csr.clone()).await;
    assert_eq!(nobody.expect_err("no token").code(), Code::Unauthenticated);
    let admin = secured.issuer.token(|c| {
        c["sub"] = json!("system:serviceaccount:shop:admin");
        c["kubernetes.io"] = Value::Null;
    });
    let stolen = Secured::certificate(channel, Some(&admin), csr.clone()).await;
    assert_eq!(stolen.expect_err("other").code(), Code::PermissionDenied);

    let known = secured
        .channel(Some((&chain[..1], &key)))
        .await
        .expect("mTLS");
    let renewed = Secured::certificate(known, None, csr)
        .await
        .expect("renewed");
    assert_ne!(renewed[0], chain[0]);
}

#[tokio::test]
async fn a_certificate_is_worth_something_while_it_is_good() {
    let (start, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let clock = Clock::manual(start);
    let secured = Secured::with(clock.clone()).await;
    let channel = secured.channel(None).await.expect("connected");
    let (csr, key) = request(&[WEB], false);
    let token = secured.issuer.token(|_| ());
    let chain = Secured::certificate(channel, Some(&token), csr).await;
    let chain = chain.expect("signed");
    let shown = async || {
        let channel = secured.channel(Some((&chain[..1], &key))).await?;
        Secured::certificate(channel, None, request(&[], false).0)
            .await
            .map_err(|status| status.to_string())
    };
    for (now, good) in [
        (start, true),
        (start + 23 * hour, true),
        (start + 25 * hour, false),
        (start - hour, false),
        (start + hour, true),
    ] {
        clock.set(now);
        let answer = shown().await;
        assert_eq!(answer.is_ok(), good, "{now:?}: {:?}", answer.err());
    }
}

#[tokio::test]
async fn a_certificate_that_signed_itself_is_shown_the_door() {
    let secured = Secured::start().await;
    let (_, key) = request(&[], false);
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(WEB.try_into().expect("uri"))];
    let own = params.self_signed(&key).expect("signed").pem();
    let outcome = match secured.channel(Some((&[own], &key))).await {
        Err(error) => error,
        Ok(channel) => Secured::certificate(channel, None, request(&[], false).0)
            .await
            .expect_err("refused")
            .to_string(),
    };
    assert!(!outcome.is_empty());
}

#[tokio::test]
async fn a_proxy_gets_the_configuration_of_its_own_workload_only() {
    let secured = Secured::start().await;
    let open = async |namespace: &str, account: &str| {
        let channel = secured.channel(None).await.expect("connected");
        let node = proto::json::from_value(&json!({
            "id": format!("sidecar~10.0.0.1~web-0.{namespace}~{namespace}.svc.cluster.local"),
            "metadata": {"NAMESPACE": namespace, "SERVICE_ACCOUNT": account, "CLUSTER_ID": "Kubernetes"},
        }))
        .expect("node");
        let first = DeltaDiscoveryRequest {
            node: Some(node),
            type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
            ..Default::default()
        };
        let requests =
            tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
        let mut request = Request::new(requests);
        let token = format!("Bearer {}", secured.issuer.token(|_| ()));
        request
            .metadata_mut()
            .insert("authorization", token.parse().expect("ascii"));
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let mut answers = client
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        answers.message().await
    };
    assert!(open("shop", "web").await.expect("its own").is_some());
    for (namespace, account) in [("bank", "web"), ("shop", "admin")] {
        let refused = open(namespace, account).await.expect_err("another's");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
}

/// As istioctl asks: one question on a stream of its own, with a token and a node that is no proxy's.
async fn question(
    secured: &Secured,
    account: (&str, &str),
    type_url: &str,
    names: &[&str],
) -> Result<DiscoveryResponse, Status> {
    let (namespace, account) = account;
    let token = secured.issuer.token(|c| {
        c["kubernetes.io"] = json!({"namespace": namespace});
        c["sub"] = json!(format!("system:serviceaccount:{namespace}:{account}"));
    });
    let node = proto::json::from_value(&json!({
        "id": "sidecar~10.0.0.9~test-1.default~default.svc.cluster.local",
        "metadata": {"NAMESPACE": namespace, "SERVICE_ACCOUNT": account, "GENERATOR": "event"},
    }))
    .expect("node");
    let first = DiscoveryRequest {
        node: Some(node),
        type_url: type_url.to_owned(),
        resource_names: names.iter().map(|n| (*n).to_owned()).collect(),
        response_nonce: "2026-11-22 05:00:00".to_owned(),
        ..Default::default()
    };
    let requests =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut request = Request::new(requests);
    let token = format!("Bearer {token}").parse().expect("ascii");
    request.metadata_mut().insert("authorization", token);
    let channel = secured.channel(None).await.expect("connected");
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut answers = client
        .stream_aggregated_resources(request)
        .await?
        .into_inner();
    Ok(answers.message().await?.expect("an answer"))
}

#[tokio::test]
async fn istioctl_learns_how_far_proxies_are_and_what_they_were_sent() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let node = proto::json::from_value(&json!({
        "id": "sidecar~127.0.0.1~web-0.shop~shop.svc.cluster.local",
        "metadata": {"NAMESPACE": "shop", "SERVICE_ACCOUNT": "web", "CLUSTER_ID": "Kubernetes",
            "ISTIO_VERSION": "1.30.1", "PROXY_CONFIG": {}},
    }))
    .expect("node");
    let cds = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    let first = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: cds.to_owned(),
        ..Default::default()
    };
    let requests =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut request = Request::new(requests);
    let token = format!("Bearer {}", secured.token_of("web-0", "web"));
    request
        .metadata_mut()
        .insert("authorization", token.parse().expect("ascii"));
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut proxy = client
        .delta_aggregated_resources(request)
        .await
        .expect("a stream")
        .into_inner();
    let sent = proxy.message().await.expect("sent").expect("clusters");

    let admin = ("istio-system", "default");
    let syncz = question(&secured, admin, "istio.io/debug/syncz", &[])
        .await
        .expect("syncz");
    let identifier = syncz.control_plane.expect("who answers").identifier;
    let identifier: Value = serde_json::from_str(&identifier).expect("JSON");
    assert_eq!(identifier["ID"], "replica-0");
    assert_eq!(identifier["Info"]["version"], env!("CARGO_PKG_VERSION"));
    // The one who asks is none of them.
    let [one] = &syncz.resources[..] else {
        panic!("{:?}", syncz.resources);
    };
    let one: csds::ClientConfig = proto::any::unpack(one).expect("a ClientConfig");
    let node = one.node.expect("node");
    assert_eq!(node.id, "web-0.shop");
    let node = proto::json::to_value(&node);
    assert_eq!(
        node["metadata"],
        json!({"CLUSTER_ID": "Kubernetes", "ISTIO_VERSION": "1.30.1", "NAMESPACE": "shop"})
    );
    let [state] = &one.generic_xds_configs[..] else {
        panic!("{:?}", one.generic_xds_configs);
    };
    assert_eq!(state.type_url, cds);
    assert_eq!(
        state.config_status(),
        csds::ConfigStatus::Stale,
        "not answered"
    );
    assert!(state.last_updated.is_some());

    let dump = "istio.io/debug/config_dump";
    let dumped = question(&secured, admin, dump, &["web-0.shop"])
        .await
        .expect("dump");
    let clusters: ClustersConfigDump = dumped
        .resources
        .iter()
        .find_map(|r| proto::any::unpack(r).ok())
        .expect("clusters");
    assert_eq!(clusters.dynamic_active_clusters.len(), sent.resources.len());
    // Another replica may have it: istioctl goes on by this text.
    let gone = question(&secured, admin, dump, &["gone-0.shop"])
        .await
        .expect("no error");
    assert!(
        gone.resources[0]
            .value
            .starts_with(b"Proxy not connected to this Pilot instance.")
    );
    let page = question(&secured, admin, "istio.io/debug", &["registryz"])
        .await
        .expect("page");
    serde_json::from_slice::<Value>(&page.resources[0].value).expect("JSON");

    // A workload learns of its own namespace alone.
    let syncz = "istio.io/debug/syncz";
    let count = async |account| {
        let answer = question(&secured, account, syncz, &[]).await;
        answer.expect("syncz").resources.len()
    };
    assert_eq!(count(("shop", "web")).await, 1);
    assert_eq!(count(("bank", "web")).await, 0);
    let refused = question(&secured, ("shop", "web"), "istio.io/debug", &["registryz"]).await;
    assert_eq!(refused.expect_err("all").code(), Code::PermissionDenied);
    let own = "edsz?proxyID=web-0.shop";
    question(&secured, ("shop", "web"), "istio.io/debug", &[own])
        .await
        .expect("its own");
    let refused = question(&secured, ("bank", "web"), "istio.io/debug", &[own]).await;
    assert_eq!(
        refused.expect_err("another's").code(),
        Code::PermissionDenied
    );
}

#[tokio::test]
async fn a_token_is_worth_nothing_away_from_its_pod() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let ask = async |pod: &str, account: &str| {
        let token = secured.issuer.token(|c| {
            c["kubernetes.io"]["pod"]["name"] = json!(pod);
            c["sub"] = json!(format!("system:serviceaccount:shop:{account}"));
        });
        let (csr, _) = request(&[], false);
        Secured::certificate(channel.clone(), Some(&token), csr).await
    };
    ask("web-0", "web").await.expect("from its pod");
    // Of a pod that is elsewhere, that is gone, and with an account that is not the pod's.
    for (pod, account) in [("away-0", "web"), ("gone-0", "web"), ("web-0", "entry")] {
        let refused = ask(pod, account).await.expect_err("another's");
        assert_eq!(refused.code(), Code::Unauthenticated, "{pod} {account}");
        assert_eq!(
            refused.message(),
            "authentication failure",
            "no more is told"
        );
    }
    // More than a request can be is not even read.
    let token = secured.issuer.token(|_| ());
    let large = Secured::certificate(channel, Some(&token), "x".repeat(10 << 20)).await;
    let large = large.expect_err("10 MB");
    assert!(
        matches!(
            large.code(),
            Code::OutOfRange | Code::ResourceExhausted | Code::InvalidArgument
        ),
        "{large}"
    );
}

#[tokio::test]
async fn the_plain_port_signs_nothing_and_gives_no_secrets() {
    let secured = Secured::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let ads = Ads::open(secured.server.clone());
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(xds::server::Service::new(Arc::new(ads)))
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
    );
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
        .expect("uri")
        .connect()
        .await
        .expect("connected");
    // What somebody has read on the wire, sent again here.
    let token = secured.issuer.token(|_| ());
    let refused = Secured::certificate(channel.clone(), Some(&token), request(&[], false).0).await;
    assert_eq!(refused.expect_err("not here").code(), Code::Unimplemented);
    let gateway = secured.token_of("gateway-0", "entry");
    let found = secrets(
        channel,
        Some(&gateway),
        "gateway-0",
        "entry",
        &["kubernetes://site"],
    );
    assert_eq!(found.await.expect("an answer"), [""; 0]);
}

#[tokio::test]
async fn a_gateway_gets_the_secrets_that_are_named_for_it() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let all = [
        "kubernetes://site",
        "kubernetes://site-cacert",
        "kubernetes-gateway://shop/site",
        "kubernetes://other",
        "kubernetes://gone",
        "kubernetes-gateway://bank/site",
        "kubernetes://../bank/site",
    ];
    let gateway = secured.token_of("gateway-0", "entry");
    let found = secrets(channel.clone(), Some(&gateway), "gateway-0", "entry", &all).await;
    let mut found = found.expect("an answer");
    found.sort();
    assert_eq!(
        found,
        [
            "kubernetes-gateway://shop/site",
            "kubernetes://site",
            "kubernetes://site-cacert"
        ]
    );
    // A workload beside it, which says that it has the gateway's labels, gets none.
    let web = secured.token_of("web-0", "web");
    let found = secrets(channel, Some(&web), "web-0", "web", &all).await;
    assert_eq!(found.expect("an answer"), [""; 0]);
}

/// Asks for secrets as a gateway would; the names of those that come.
async fn secrets(
    channel: Channel,
    token: Option<&str>,
    pod: &str,
    account: &str,
    names: &[&str],
) -> Result<Vec<String>, Status> {
    let node = proto::json::from_value(&json!({
        "id": format!("router~127.0.0.1~{pod}.shop~shop.svc.cluster.local"),
        "metadata": {"NAMESPACE": "shop", "SERVICE_ACCOUNT": account, "CLUSTER_ID": "Kubernetes",
            "LABELS": {"istio": "entry"}},
    }))
    .expect("node");
    let first = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: xds::type_url::SDS.to_owned(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    };
    let requests =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut request = Request::new(requests);
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().expect("ascii");
        request.metadata_mut().insert("authorization", value);
    }
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut answers = client
        .delta_aggregated_resources(request)
        .await?
        .into_inner();
    let answer = answers.message().await?.expect("an answer");
    assert_eq!(answer.type_url, xds::type_url::SDS);
    Ok(answer.resources.into_iter().map(|r| r.name).collect())
}
