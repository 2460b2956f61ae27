//! Mutual TLS as users see it: who is whom, who is refused, and what an eavesdropper on the bridge reads.

use std::{
    fs,
    io::Read,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket},
};
use serde_json::Value;

use crate::mesh::{Mesh, eventually};

const CLIENT: &str = "shop/client";
const OUTSIDE: &str = "outside/outside";
const CLIENT_ID: &str = "spiffe://cluster.local/ns/shop/sa/default";
const VAULT_ID: &str = "spiffe://cluster.local/ns/bank/sa/vault";

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
            ready.send(()).expect("somebody waits");
            let mut file = fs::File::from(socket);
            let (mut heard, mut frame) = (Vec::new(), vec![0; 1 << 16]);
            loop {
                match file.read(&mut frame) {
                    Ok(length) => heard.extend_from_slice(&frame[..length]),
                    // What was sent before the end is there already: the queue is empty.
                    Err(_) if stopped.load(Ordering::Acquire) => return heard,
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
        assert!(is_answered(&answer), "{args:?}: {answer}");
        ears.heard(marker)
    };
    // That it would be heard is shown by who is outside.
    let url = format!("{}/loud-marker-0", vault(mesh, "http", 8080));
    assert!(
        said("loud-marker-0", OUTSIDE, &[&url]),
        "nothing is heard at all"
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
        assert!(
            !said(marker, CLIENT, args),
            "{args:?} is readable on the bridge"
        );
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
