//! Certificates that live ten seconds, a root that is replaced, and an authority that goes away: what traffic notices
//! of it. Needs what the end-to-end tests need. A minute, unless `SOAK_SECONDS` asks for more (`./x test soak`).

mod cut_off;
#[allow(dead_code)]
#[path = "../e2e/mesh.rs"]
mod mesh;
#[path = "../e2e/wrk.rs"]
mod wrk;

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh::{Mesh, eventually};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use wrk::{Wrk, signal};

/// Life of a certificate in this mesh.
const LIFE: Duration = Duration::from_secs(10);
/// A new root is given out for 20 s before it signs; its predecessor goes when the last certificate has ended.
const ROTATION: Duration = Duration::from_secs(40);

/// How long a busy machine may need for what comes by itself.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn certificates_come_and_go_and_traffic_does_not_notice() {
    in_a_mesh("rotation/mesh", 6, |mesh| {
        replaced_under_traffic(mesh);
        without_the_authority(mesh);
    });
}

#[test]
fn a_root_waits_for_those_who_are_cut_off() {
    in_a_mesh("rotation/cut-off", 4, cut_off::half_of_the_fleet);
}

/// Runs a test in the mesh of a folder that has so many pods.
fn in_a_mesh(folder: &str, pods: usize, test: impl FnOnce(&Mesh)) {
    // One after the other: each counts seconds.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(reason) = mesh::cannot_run() {
        println!("skipped: {reason}");
        assert!(env::var_os("CI").is_none(), "{reason}");
        return;
    }
    let mesh = Mesh::start(folder, pods);
    let test = std::panic::AssertUnwindSafe(|| test(&mesh));
    if let Err(failure) = std::panic::catch_unwind(test) {
        mesh.explain();
        std::panic::resume_unwind(failure);
    }
}

/// Leaves every five seconds, the root in the middle: no request fails, no connection drops.
fn replaced_under_traffic(mesh: &Mesh) {
    let seconds = env::var("SOAK_SECONDS").ok().and_then(|s| s.parse().ok());
    let whole = Duration::from_secs(seconds.unwrap_or(60)).max(ROTATION + LIFE);
    let gateway = gateway(mesh);
    eventually("the gateway serves", PATIENCE, || {
        (status_of(&gateway) == "200").then_some(())
    });
    let first = certificate_of(mesh, "echo");
    let old_root = roots(mesh);

    let begun = Instant::now();
    let wrk = Wrk::start(&gateway, "/api/v1/products/0", 4);
    let lasting = [Lasting::tcp(mesh), Lasting::http2(mesh)];
    let rest = whole - ROTATION;
    thread::sleep(rest / 2);
    fs::write(mesh.state().join("authority/rotate"), "").expect("ask for another root");
    eventually("both roots are trusted", PATIENCE, || {
        (roots(mesh).len() == 2).then_some(())
    });
    eventually("the old root is dropped", ROTATION + PATIENCE, || {
        let now = roots(mesh);
        (now.len() == 1 && now != old_root).then_some(())
    });
    thread::sleep(whole.saturating_sub(begun.elapsed()));
    let requests = wrk.stop();
    let [tcp, http2] = lasting.map(Lasting::stop);
    let renewals = figure(
        mesh,
        "echo",
        "istio_agent_num_outgoing_requests{request_type=\"csr\"}",
    );
    println!(
        "  {:.0} s: {requests} requests, {tcp} lines on one TCP connection, {http2} calls on one HTTP/2 connection; \
         {renewals} certificates for one pod",
        begun.elapsed().as_secs_f32()
    );
    assert!(requests > 100 && tcp > 100 && http2 > 100);
    // About every five seconds; at the least one before the other ends.
    let expected = begun.elapsed().as_secs_f64() / LIFE.as_secs_f64();
    assert!(renewals >= expected, "{renewals} of {expected}");
    assert_ne!(certificate_of(mesh, "echo"), first);
    // A new connection is good under the new root, too.
    assert_eq!(hello(mesh, "echo"), Some(()));
}

/// The authority is away for three lives but a second: certificates serve until they end, then every new connection is
/// refused with a reason, and afterwards all comes right by itself.
fn without_the_authority(mesh: &Mesh) {
    let pid = process(mesh, "istio-system", "istiod", "discovery");
    let left = || {
        let name = "istio_agent_cert_expiry_seconds{resource_name=\"default\"}";
        ["client", "echo"].map(|pod| figure(mesh, pod, name))
    };
    let (stopped, good_until) = eventually("both have just come", PATIENCE, || {
        let asked = Instant::now();
        let [one, other] = left();
        let good = Duration::from_secs_f64(one.min(other).max(0.0));
        (good > LIFE / 2).then(|| (Stopped::new(pid), asked + good))
    });
    let begun = Instant::now();
    while Instant::now() < good_until {
        let answer = hello(mesh, "echo");
        // Seconds are what certificates are good to.
        if Instant::now() + Duration::from_secs(1) < good_until {
            assert_eq!(
                answer,
                Some(()),
                "the certificates are good for another while"
            );
        }
    }
    eventually("expired certificates are refused", PATIENCE, || {
        hello(mesh, "echo").is_none().then_some(())
    });
    // Each pod's at a time of its own.
    says_that_it_expired(mesh, "echo");
    let failed = "istio_agent_num_failed_outgoing_requests{request_type=\"csr\"}";
    assert!(figure(mesh, "echo", failed) > 0.0);
    let [_, of_echo] = left();
    assert!(of_echo <= 0.0, "{of_echo}");
    eventually("a proxy says why", PATIENCE, || {
        let _ = hello(mesh, "echo");
        let logs = ["client", "echo"].map(|pod| mesh.log("shop", pod, "istio-proxy"));
        let mut lines = logs.iter().flat_map(|log| log.lines());
        lines
            .any(|l| !l.contains("\tagent\t") && l.to_ascii_lowercase().contains("expired"))
            .then_some(())
    });
    thread::sleep((3 * LIFE - Duration::from_secs(1)).saturating_sub(begun.elapsed()));
    drop(stopped);
    let back = Instant::now();
    eventually("it comes right by itself", PATIENCE, || hello(mesh, "echo"));
    eventually("and is ready", PATIENCE, || {
        let all = mesh.status();
        let pods = all["pods"].as_array().expect("pods").clone();
        pods.iter().all(|p| p["ready"] == true).then_some(())
    });
    println!("  recovered after {:.1} s", back.elapsed().as_secs_f32());
}

/// Waits until a pod is not ready any more, since its certificate has ended.
fn says_that_it_expired(mesh: &Mesh, pod: &str) {
    let why = format!("the certificate of spiffe://cluster.local/ns/shop/sa/{pod} expired");
    eventually("the pod says so", PATIENCE, || {
        let ready = "curl -s -w '%{http_code}' http://127.0.0.1:15020/healthz/ready";
        let said = mesh.inside("shop", pod, ready);
        (said.contains(&why) && said.ends_with("503")).then_some(())
    });
}

/// The address of a service of echoes: a call to the pod itself would go past the mesh, in plain text.
fn echo(mesh: &Mesh, name: &str, port: u16) -> String {
    let path = format!("config/completed/service.shop.{name}.yaml");
    let path = mesh.state().join(path);
    let text = fs::read_to_string(path).expect("the service");
    let line = text
        .lines()
        .find_map(|l| l.trim().strip_prefix("clusterIP:"));
    let address = line.expect("its address").trim().trim_matches('"');
    format!("{address}:{port}")
}

/// The roots that are given out, PEM each.
fn roots(mesh: &Mesh) -> Vec<String> {
    let text = fs::read_to_string(mesh.state().join("authority/root-cert.pem"));
    let text = text.unwrap_or_default();
    let all = text.split_inclusive("-----END CERTIFICATE-----");
    all.map(str::to_owned)
        .filter(|c| !c.trim().is_empty())
        .collect()
}

fn gateway(mesh: &Mesh) -> String {
    let status = mesh.status();
    let forwards = status["forwards"].as_array().expect("forwards");
    let found = forwards
        .iter()
        .find(|f| f["service"] == "istio-ingressgateway");
    let host = &found.expect("a way in")["host"];
    host.as_str().expect("an address").to_owned()
}

fn status_of(gateway: &str) -> String {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(gateway)?;
        let head = "GET /api/v1/products/0 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.split(' ').nth(1).unwrap_or_default().to_owned())
    };
    ask().unwrap_or_default()
}

fn figure(mesh: &Mesh, pod: &str, name: &str) -> f64 {
    let text = mesh.inside("shop", pod, "curl -s http://127.0.0.1:15020/metrics");
    let line = text.lines().find_map(|l| l.strip_prefix(name));
    let value = line.unwrap_or_else(|| panic!("no {name} in {text}"));
    value.trim().parse().expect("a number")
}

/// The certificate that a pod's proxy uses now.
fn certificate_of(mesh: &Mesh, pod: &str) -> Value {
    let text = mesh.inside("shop", pod, "curl -s http://127.0.0.1:15000/certs");
    let certs: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let all = certs["certificates"].as_array().expect("certificates");
    let chains = all.iter().flat_map(|c| [&c["cert_chain"], &c["certChain"]]);
    let own = chains.into_iter().find_map(|chain| chain.get(0));
    own.unwrap_or_else(|| panic!("no certificate of its own: {certs}"))
        .clone()
}

/// A process of a container.
fn process(mesh: &Mesh, namespace: &str, pod: &str, container: &str) -> u64 {
    let status = mesh.status();
    let all = status["processes"].as_array().expect("processes");
    let fits =
        |p: &&Value| p["namespace"] == namespace && p["pod"] == pod && p["container"] == container;
    let found = all.iter().find(fits).expect("a process");
    found["pid"].as_u64().expect("its number")
}

/// A process that is not let run, until dropped.
struct Stopped(u64);

impl Stopped {
    fn new(pid: u64) -> Self {
        signal("-STOP", pid);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal("-CONT", self.0);
    }
}

/// Joins the network of the client's pod with this thread: what it sends is captured like an application's.
fn join(pid: u64) {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).expect("a network");
    setns(namespace, CloneFlags::CLONE_NEWNET).expect("join it");
}

/// One connection that is used all the time.
struct Lasting {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

const PAUSE: Duration = Duration::from_millis(50);

impl Lasting {
    fn start(mesh: &Mesh, port: u16, run: fn(String, &AtomicBool) -> u64) -> Self {
        let pid = process(mesh, "shop", "client", "app");
        let to = echo(mesh, "echo", port);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            join(pid);
            run(to, &stopped)
        });
        Self { stop, thread }
    }

    fn tcp(mesh: &Mesh) -> Self {
        Self::start(mesh, 9000, |to, stop| {
            let mut stream = TcpStream::connect(&to).expect("connect");
            let mut lines = BufReader::new(stream.try_clone().expect("a second handle"));
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let said = format!("line-{count}\n");
                stream
                    .write_all(said.as_bytes())
                    .expect("the connection lasts");
                let mut line = String::new();
                lines.read_line(&mut line).expect("the connection lasts");
                assert!(line.ends_with(&said), "{line:?}");
                count += 1;
                thread::sleep(PAUSE);
            }
            count
        })
    }

    fn http2(mesh: &Mesh) -> Self {
        Self::start(mesh, 9090, |to, stop| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let stream = tokio::net::TcpStream::connect(&to).await.expect("connect");
                let (client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
                tokio::spawn(async move { connection.await.expect("the connection lasts") });
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    let request =
                        http::Request::post(format!("http://{to}/outrigger.echo.v1.Echo/Say"))
                            .header("content-type", "application/grpc")
                            .header("te", "trailers")
                            .body(())
                            .expect("a request");
                    let mut client = client.clone().ready().await.expect("the connection lasts");
                    let (answer, mut body) = client.send_request(request, false).expect("sent");
                    // An empty message.
                    body.send_data(Bytes::from_static(&[0; 5]), true)
                        .expect("sent");
                    let answer = answer.await.expect("an answer");
                    assert_eq!(answer.status(), 200);
                    let mut body = answer.into_body();
                    while let Some(data) = body.data().await {
                        let length = data.expect("data").len();
                        body.flow_control().release_capacity(length).expect("room");
                    }
                    let trailers = body.trailers().await.expect("the stream ends well");
                    assert_eq!(trailers.expect("trailers")["grpc-status"], "0");
                    count += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                count
            })
        })
    }

    /// How often it was used; panics where it broke.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the connection has lasted")
    }
}

/// One line over a connection of its own, from the client to an echo: `None` where it is refused.
fn hello(mesh: &Mesh, name: &str) -> Option<()> {
    let pid = process(mesh, "shop", "client", "app");
    let to = echo(mesh, name, 9000);
    let ask = move || -> Option<()> {
        join(pid);
        let mut stream = TcpStream::connect(&to).ok()?;
        stream.set_read_timeout(Some(LIFE)).ok()?;
        stream.write_all(b"hello\n").ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        line.ends_with("hello\n").then_some(())
    };
    thread::spawn(ask).join().expect("no panic")
}
