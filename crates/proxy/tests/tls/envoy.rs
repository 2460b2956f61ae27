//! A real Envoy as the peer of both of our sides, where one is at hand (`./x bench` installs it).

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tokio::{net::TcpStream, task::LocalSet};

use crate::{CLIENT, SERVER, mutual, support::*};

/// Ends with its owner.
pub(crate) struct Envoy {
    process: Child,
    _folder: tempfile::TempDir,
}

impl Envoy {
    /// Starts one, and waits until it listens.
    pub(crate) async fn start(binary: &Path, config: &str, port: u16) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("envoy.yaml");
        std::fs::write(&path, config).expect("it can be written");
        let process = Command::new(binary)
            .arg("-c")
            .arg(&path)
            .args([
                "--use-dynamic-base-id",
                "--concurrency",
                "1",
                "-l",
                "critical",
            ])
            .stdout(Stdio::null())
            .spawn()
            .expect("it can be started");
        let envoy = Self {
            process,
            _folder: folder,
        };
        let end = tokio::time::Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(tokio::time::Instant::now() < end, "Envoy listens");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        envoy
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn binary() -> Option<PathBuf> {
    let default = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../target/bench-envoy/envoy/_bin/envoy"
    );
    let path = std::env::var_os("OUTRIGGER_ENVOY").map_or_else(|| default.into(), PathBuf::from);
    if path.is_file() {
        return Some(path);
    }
    println!("skipped: no Envoy at {}", path.display());
    None
}

/// A port that was free a moment ago: Envoy has to be told one. It is none that the system gives to others meanwhile.
pub(crate) fn free_port() -> u16 {
    /// Below `net.ipv4.ip_local_port_range`.
    const PORTS: std::ops::Range<u32> = 10_000..32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let of_process = std::process::id().wrapping_mul(97);
    loop {
        let next = of_process.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + next % (PORTS.end - PORTS.start);
        let port = u16::try_from(port).expect("a port");
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

const DETAILS: &str = "forward_client_cert_details: SANITIZE_SET, set_current_client_cert_details: {subject: true, uri: true, dns: true, cert: true, chain: true},";

fn http2(common: &str, indent: &str) -> String {
    format!(
        "{common}\n{indent}typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {{http2_protocol_options: {{}}}}}}}}"
    )
}

#[test]
fn envoy_and_we_understand_each_other() {
    let Some(binary) = binary() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let ca = Authority::new("root");
        let server = ca.issue(&[SERVER, "b.example"]);
        let client = ca.issue(&[CLIENT, "a.example", "*.example"]);
        let app = origin().await;
        let inbound = downstream(
            &format!("alpn_protocols: [h2, http/1.1], {}", mutual(&server, &ca, &[CLIENT])),
            ", require_client_certificate: true",
        );
        let offer = |alpn: &str| {
            let common = format!("alpn_protocols: [{alpn}], {}", mutual(&client, &ca, &[SERVER]));
            upstream(&common, ", sni: outbound_.80_._.b.default.svc.cluster.local")
        };

        // Ours first, since its ports are chosen by the system; then Envoy, then our side that needs Envoy's port.
        let back = proxy(vec![
            cluster("app", app, ""),
            listener("in", &format!("- {{{}, {inbound}}}", http_to("app", DETAILS)), ""),
        ])
        .await;
        let ours = address(&back, "in").port();
        let [theirs, one, two] = [free_port(), free_port(), free_port()];
        let socket = |port: u16| {
            format!("address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}")
        };
        let static_cluster = |name: &str, port: u16, more: &str| {
            format!(
                "  - name: {name}\n    connect_timeout: 5s\n    load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{{}}}}}]}}]}}\n    {more}\n",
                socket(port)
            )
        };
        let config = format!(
            "static_resources:\n  listeners:\n  - {{name: in, {}, filter_chains: [{{{}, {inbound}}}]}}\n  - {{name: one, {}, filter_chains: [{{{}}}]}}\n  - {{name: two, {}, filter_chains: [{{{}}}]}}\n  clusters:\n{}{}{}",
            socket(theirs),
            http_to("app", DETAILS),
            socket(one),
            http_to("h1", ""),
            socket(two),
            http_to("h2", ""),
            static_cluster("app", app, ""),
            static_cluster("h1", ours, &offer("http/1.1")),
            static_cluster("h2", ours, &http2(&offer("h2"), "    ")),
        );
        let _envoy = Envoy::start(&binary, &config, theirs).await;
        let front = proxy(vec![
            cluster("h1", theirs, &offer("http/1.1")),
            cluster("h2", theirs, &http2(&offer("h2"), "")),
            listener("one", &format!("- {{{}}}", http_to("h1", "")), ""),
            listener("two", &format!("- {{{}}}", http_to("h2", "")), ""),
        ])
        .await;
        let xfcc = |answer: &str| {
            let line = answer
                .lines()
                .find(|line| line.starts_with("x-forwarded-client-cert: "));
            line.unwrap_or_else(|| panic!("no header in {answer}"))
                .to_owned()
        };
        let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let mut told = Vec::new();
        for at in [
            address(&front, "one"),
            address(&front, "two"),
            local(one),
            local(two),
        ] {
            let answer = get(at, "").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{at}: {answer}");
            told.push(xfcc(&answer));
        }
        // Envoy told of our client, and we of Envoy's, with the same certificates: the same words.
        assert!(told.iter().all(|line| *line == told[0]), "{told:#?}");
        stat(&front, "cluster.h2.upstream_cx_http2_total", 1).await;
        stat(&back, "listener.in.ssl.handshake", 2).await;
        stat(&back, "listener.in.ssl.versions.TLSv1.2", 2).await;
    });
}
