//! Mutual TLS as users see it: who is whom, who is refused, and what an eavesdropper on the bridge reads.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt::RcvBufForce,
    },
};
use serde_json::Value;

use crate::mesh::{Mesh, eventually};

const CLIENT: &str = "shop/client";
const OUTSIDE: &str = "outside/outside";
const CLIENT_ID: &str = "spiffe://cluster.local/ns/shop/sa/default";
const VAULT_ID: &str = "spiffe://cluster.local/ns/bank/sa/vault";

/// What a listener on the bridge keeps until it is read, in bytes.
const ROOM: usize = 16 << 20;

/// A PeerAuthentication for the namespace of the vault, taken back when dropped.
struct Policy<'a>(&'a Mesh);

impl<'a> Policy<'a> {
    fn new(mesh: &'a Mesh, spec: &str) -> Self {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: default, namespace: bank}}\nspec: {spec}\n"
        );
        let path = mesh.folder.path().join("policy.yaml");
        fs::write(&path, text).expect("write the policy");
        Self(mesh)
    }
}

impl Drop for Policy<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0.folder.path().join("policy.yaml"));
    }
}

/// A port of the vault's pod, as somebody calls it who knows no service.
fn vault(mesh: &Mesh, scheme: &str, port: u16) -> String {
    format!("{scheme}://{}:{port}", mesh.address("bank", "vault"))
}

fn is_answered(answer: &Value) -> bool {
    answer["status"] == 200 || answer["line"].is_string() || answer["grpcStatus"] == "0"
}

/// All three protocols of the vault from inside the mesh.
fn calls_from_the_mesh(mesh: &Mesh) {
    for (url, more) in [
        ("http://vault.bank/x", &[][..]),
        ("tcp://vault.bank:9000", &["-d", "hello"]),
        ("grpc://vault.bank:9090", &["-d", "hello"]),
    ] {
        let mut args = vec![url];
        args.extend(more);
        let answer = mesh.call(CLIENT, &args);
        assert!(is_answered(&answer), "{url}: {answer}");
    }
}

pub(crate) fn each_end_knows_the_other(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://vault.bank/x"]);
    assert_eq!(answer["status"], 200, "{answer}");
    let told = answer["body"]["headers"]["x-forwarded-client-cert"].to_string();
    assert!(
        told.contains(&format!("URI={CLIENT_ID}")) && told.contains(&format!("By={VAULT_ID}")),
        "{answer}"
    );
    // What a client says of itself does not count.
    let forged = format!("x-forwarded-client-cert: URI={VAULT_ID}");
    let answer = mesh.call(CLIENT, &["http://vault.bank/x", "-H", &forged]);
    let told = answer["body"]["headers"]["x-forwarded-client-cert"].to_string();
    assert!(
        told.contains(CLIENT_ID) && !told.contains(&format!("URI={VAULT_ID}")),
        "{told}"
    );
    // Without a sidecar: accepted as it is, and nobody in particular.
    let answer = mesh.call(OUTSIDE, &[&vault(mesh, "http", 8080), "-H", &forged]);
    assert_eq!(answer["status"], 200, "{answer}");
    assert!(
        answer["body"]["headers"]["x-forwarded-client-cert"].is_null(),
        "{answer}"
    );
}

pub(crate) fn strict_refuses_who_is_outside(mesh: &Mesh) {
    let policy = Policy::new(mesh, "{mtls: {mode: STRICT}}");
    let refused = |scheme: &str, port: u16| {
        let url = vault(mesh, scheme, port);
        eventually(
            &format!("{url} is refused"),
            Duration::from_secs(10),
            || {
                let answer = mesh.call(OUTSIDE, &[&url, "-d", "x", "--timeout", "3"]);
                (!is_answered(&answer)).then_some(())
            },
        );
    };
    refused("http", 8080);
    refused("tcp", 9000);
    refused("grpc", 9090);
    calls_from_the_mesh(mesh);
    drop(policy);

    // An exception for one port; it needs a selector.
    let policy = Policy::new(
        mesh,
        "{selector: {matchLabels: {app: vault}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}",
    );
    let url = vault(mesh, "http", 8080);
    eventually("the exception", Duration::from_secs(10), || {
        is_answered(&mesh.call(OUTSIDE, &[&url, "--timeout", "3"])).then_some(())
    });
    refused("tcp", 9000);
    calls_from_the_mesh(mesh);
    drop(policy);

    let policy = Policy::new(mesh, "{mtls: {mode: PERMISSIVE}}");
    let url = vault(mesh, "tcp", 9000);
    eventually("PERMISSIVE accepts", Duration::from_secs(10), || {
        is_answered(&mesh.call(OUTSIDE, &[&url, "-d", "x", "--timeout", "3"])).then_some(())
    });
    calls_from_the_mesh(mesh);
    drop(policy);
}

/// Everything that crosses the bridge, as bytes.
struct Eavesdropper {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Vec<u8>>,
}

impl Eavesdropper {
    /// Listens in the network namespace of a mesh's bridge.
    fn start(mesh: &Mesh) -> Self {
        let pid = mesh.supervisor();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (ready, is_ready)) = (stop.clone(), std::sync::mpsc::channel());
        let thread = thread::spawn(move || {
            let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).expect("its network");
            // Of this thread alone.
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("join the network");
            let socket: OwnedFd = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::EthAll,
            )
            .expect("a packet socket");
            // Pushes to all proxies pass here, too, while this thread may have to wait for its turn.
            setsockopt(&socket, RcvBufForce, &ROOM).expect("room for what is not read yet");
            ready.send(()).expect("somebody waits");
            let mut file = fs::File::from(socket);
            let (mut heard, mut frame) = (Vec::new(), vec![0; 1 << 16]);
            loop {
                // Asked before the read: what was sent before the end is there when the queue is found empty after it.
                let is_end = stopped.load(Ordering::Acquire);
                match file.read(&mut frame) {
                    Ok(length) => heard.extend_from_slice(&frame[..length]),
                    Err(_) if is_end => return heard,
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        is_ready.recv().expect("it listens");
        Self { stop, thread }
    }

    fn heard(self, text: &str) -> bool {
        self.stop.store(true, Ordering::Release);
        let heard = self.thread.join().expect("it has listened");
        heard.windows(text.len()).any(|w| w == text.as_bytes())
    }
}

pub(crate) fn nothing_is_plain_on_the_bridge(mesh: &Mesh) {
    let said = |marker: &str, from: &str, args: &[&str]| {
        let ears = Eavesdropper::start(mesh);
        let answer = mesh.call(from, args);
        (ears.heard(marker), answer)
    };
    // That it would be heard is shown by who is outside; the case before may have forbidden that until now.
    let url = format!("{}/loud-marker-0", vault(mesh, "http", 8080));
    let args = [&url, "--timeout", "3"];
    eventually(
        "a plain call is answered and heard",
        Duration::from_secs(10),
        || {
            let (is_heard, answer) = said("loud-marker-0", OUTSIDE, &args);
            (is_heard && is_answered(&answer)).then_some(())
        },
    );
    for (marker, args) in [
        ("quiet-marker-1", &["http://vault.bank/quiet-marker-1"][..]),
        (
            "quiet-marker-2",
            &["tcp://vault.bank:9000", "-d", "quiet-marker-2"],
        ),
        (
            "quiet-marker-3",
            &["grpc://vault.bank:9090", "-d", "quiet-marker-3"],
        ),
    ] {
        let (is_heard, answer) = said(marker, CLIENT, args);
        assert!(is_answered(&answer), "{args:?}: {answer}");
        assert!(!is_heard, "{args:?} is readable on the bridge");
    }
}

/// The agent tells how long its certificate is good, and nobody else can read it.
pub(crate) fn the_certificate_is_the_pods_own(mesh: &Mesh) {
    let figures = mesh.inside("bank", "vault", "curl -s http://127.0.0.1:15020/metrics");
    let left = figures
        .lines()
        .find_map(|l| l.strip_prefix("istio_agent_cert_expiry_seconds{resource_name=\"default\"} "))
        .unwrap_or_else(|| panic!("no expiry in {figures}"));
    let left: f64 = left.parse().expect("a number");
    assert!((80_000.0..=86_400.0).contains(&left), "{left}");
    // In the pod: the socket is the proxy's user's, and the token is signed for this pod.
    let socket = "/var/run/secrets/workload-spiffe-uds/socket";
    let shown = mesh.output(&[
        "local",
        "exec",
        "-n",
        "bank",
        "vault",
        "-c",
        "istio-proxy",
        "--",
        "stat",
        "-c",
        "%a %u:%g",
        socket,
    ]);
    assert_eq!(shown.trim(), "660 1337:1337");
    let token = mesh.output(&[
        "local",
        "exec",
        "-n",
        "bank",
        "vault",
        "-c",
        "istio-proxy",
        "--",
        "cat",
        "/var/run/secrets/tokens/istio-token",
    ]);
    assert_eq!(token.trim().split('.').count(), 3, "a signed token");
    let seen = mesh.run(&[
        "local",
        "exec",
        "-n",
        "bank",
        "vault",
        "-c",
        "app",
        "--",
        "cat",
        "/var/run/secrets/tokens/istio-token",
    ]);
    assert!(!seen.status.success(), "the application has no such token");
}

/// Who a caller says it is, and who vouches for that.
enum Caller {
    /// No certificate at all.
    Nobody,
    /// The mesh's authority, for this name in the common name or as a URI, ended or not.
    Certified {
        uri: Option<&'static str>,
        common_name: Option<&'static str>,
        ended: bool,
    },
    /// Itself.
    SelfSigned(&'static str),
}

impl Caller {
    /// Chain and key, PEM.
    fn identity(&self, mesh: &Mesh) -> Option<tls::identity::Identity> {
        let (uri, common_name, ended) = match self {
            Self::Nobody => return None,
            Self::Certified {
                uri,
                common_name,
                ended,
            } => (*uri, *common_name, *ended),
            Self::SelfSigned(uri) => (Some(*uri), None, false),
        };
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(name) = common_name {
            params
                .distinguished_name
                .push(rcgen::DnType::CommonName, name);
        }
        if let Some(uri) = uri {
            let uri = uri.try_into().expect("ASCII");
            params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        }
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(7200)).into();
        params.not_after = match ended {
            true => now - Duration::from_secs(3600),
            false => now + Duration::from_secs(3600),
        }
        .into();
        let key = rcgen::KeyPair::generate().expect("a key");
        let leaf = match self {
            Self::SelfSigned(_) => params.self_signed(&key),
            _ => {
                let read = |name: &str| {
                    let path = mesh.state().join("authority").join(name);
                    fs::read_to_string(path).expect("the authority's files")
                };
                let signer = rcgen::KeyPair::from_pem(&read("ca-key.pem")).expect("its key");
                let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca-cert.pem"), signer);
                params.signed_by(&key, &issuer.expect("its certificate"))
            }
        };
        let leaf = leaf.expect("signed").pem();
        let made =
            tls::identity::Identity::from_pem(leaf.as_bytes(), key.serialize_pem().as_bytes());
        Some(made.expect("they belong together"))
    }

    /// Calls the vault from a pod without a sidecar, as a sidecar would; the status of the answer.
    fn call(&self, mesh: &Mesh) -> Result<String, String> {
        let options = tls::client::ClientOptions {
            parameters: tls::parameters::Parameters::default(),
            alpn: vec![
                b"istio-http/1.1".to_vec(),
                b"istio".to_vec(),
                b"http/1.1".to_vec(),
            ],
            session_names: 0,
            clock: base::clock::Clock::system(),
        };
        let identity = self.identity(mesh);
        let config = tls::client::client(&options, identity.as_ref(), None).expect("a client");
        let pid = mesh.status()["processes"]
            .as_array()
            .expect("processes")
            .iter()
            .find(|p| p["pod"] == "outside")
            .and_then(|p| p["pid"].as_u64())
            .expect("a process");
        let to = format!("{}:8080", mesh.address("bank", "vault"));
        let call = move || -> std::io::Result<String> {
            let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))?;
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let stream = TcpStream::connect(to)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let name = tls::client::server_name("").expect("no name");
            let session = rustls::ClientConnection::new(config, name);
            let session = session.map_err(std::io::Error::other)?;
            let mut stream = rustls::StreamOwned::new(session, stream);
            stream.write_all(b"GET /x HTTP/1.1\r\nHost: vault\r\nConnection: close\r\n\r\n")?;
            let mut answer = vec![0; 12];
            stream.read_exact(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        let answer = thread::spawn(call).join().expect("no panic");
        answer.map_err(|e| e.to_string())
    }
}

pub(crate) fn forged_callers_are_refused(mesh: &Mesh) {
    let policy = Policy::new(mesh, "{mtls: {mode: STRICT}}");
    let certified = |uri, common_name, ended| Caller::Certified {
        uri,
        common_name,
        ended,
    };
    eventually("no certificate is refused", Duration::from_secs(10), || {
        Caller::Nobody.call(mesh).is_err().then_some(())
    });
    // That a good one passes shows that the others fail for what is wrong with them.
    let good = certified(Some(CLIENT_ID), None, false).call(mesh);
    assert_eq!(good.as_deref(), Ok("HTTP/1.1 200"));
    for (what, caller) in [
        ("self-signed", Caller::SelfSigned(CLIENT_ID)),
        (
            "of another trust domain",
            certified(
                Some("spiffe://other.domain/ns/shop/sa/default"),
                None,
                false,
            ),
        ),
        (
            "of a trust domain that begins like ours",
            certified(
                Some("spiffe://cluster.local.evil/ns/shop/sa/default"),
                None,
                false,
            ),
        ),
        (
            "with its name in the CN",
            certified(None, Some(CLIENT_ID), false),
        ),
        ("expired", certified(Some(CLIENT_ID), None, true)),
    ] {
        let answer = caller.call(mesh);
        assert!(
            answer.is_err(),
            "a certificate {what} is accepted: {answer:?}"
        );
    }
    drop(policy);
}
