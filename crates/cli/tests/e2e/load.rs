//! What must hold while requests come in as fast as they can.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    cases::{kill, pid_of},
    mesh::{Mesh, eventually},
    wrk::Wrk,
};

/// The address on this machine that leads to a port of a service.
fn forward(mesh: &Mesh, service: &str, port: u64) -> String {
    let status = mesh.status();
    let forwards = status["forwards"].as_array().expect("forwards");
    let found = forwards
        .iter()
        .find(|f| f["service"] == service && f["port"] == port);
    let found = found.unwrap_or_else(|| panic!("no way to {service}:{port}: {forwards:?}"));
    found["host"].as_str().expect("an address").to_owned()
}

/// How many proxies the control plane knows, and whether each of them has all that is there for it.
fn synced(mesh: &Mesh) -> Option<(usize, bool)> {
    let output = mesh.run(&["proxy-status", "--wait", "0", "-o", "json"]);
    let proxies: Vec<Value> = serde_json::from_slice(&output.stdout).ok()?;
    Some((proxies.len(), output.status.success()))
}

/// How many pods run a proxy.
fn sidecars(mesh: &Mesh) -> usize {
    let status = mesh.status();
    let pods = status["pods"].as_array().expect("pods");
    let has_proxy = |pod: &&Value| {
        let containers = pod["containers"].as_array().expect("containers");
        containers.iter().any(|c| c["name"] == "istio-proxy")
    };
    pods.iter().filter(has_proxy).count()
}

fn serves(gateway: &str, path: &str) {
    eventually("the gateway serves", Duration::from_secs(20), || {
        let mut stream = TcpStream::connect(gateway).ok()?;
        stream
            .write_all(
                format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes(),
            )
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200 ").then_some(())
    });
}

pub(crate) fn edits_under_load_lose_no_request(mesh: &Mesh) {
    let gateway = forward(mesh, "istio-ingressgateway", 80);
    serves(&gateway, "/");
    serves(&gateway, "/half");
    let path = mesh.folder.path().join("gateway.yaml");
    let good = fs::read_to_string(&path).expect("the gateway");
    let (routes, endpoints) = (
        Wrk::start(&gateway, "/x", 8),
        Wrk::start(&gateway, "/half/x", 8),
    );
    for edit in 0..EDITS {
        // A different split each time, and at each tenth edit an endpoint that comes or goes.
        let share = edit % 50 + 1;
        let next = good
            .replacen("weight: 90", &format!("weight: {}", 100 - share), 1)
            .replacen("weight: 10", &format!("weight: {share}"), 1);
        let hidden = path.with_file_name(".gateway.next");
        fs::write(&hidden, next).expect("write the routes");
        fs::rename(&hidden, &path).expect("replace the routes");
        if edit % 10 == 0 {
            let change = match edit % 20 {
                0 => "touch /tmp/ready",
                _ => "rm -f /tmp/ready",
            };
            let half = [
                "local",
                "exec",
                "-n",
                "shop",
                "half-unready",
                "--",
                "sh",
                "-c",
                change,
            ];
            mesh.output(&half);
        }
        // Slow enough that most edits become pushes of their own.
        sleep(Duration::from_millis(30));
    }
    let requests = (routes.stop(), endpoints.stop());
    fs::write(&path, &good).expect("write the routes");
    assert!(requests.0 > 100 && requests.1 > 100, "{requests:?}");
    mesh.output(&["proxy-status", "--wait", "10"]);
    println!(
        "  {} requests by changing routes and {} to changing endpoints during {EDITS} edits",
        requests.0, requests.1
    );
}

const EDITS: u32 = 500;

pub(crate) fn a_killed_control_plane_loses_no_request(mesh: &Mesh) {
    // Every sidecar, not only those that are connected just now: the case before may have cut them off.
    let proxies = sidecars(mesh);
    let all_synced = || (synced(mesh)? == (proxies, true)).then_some(());
    eventually(
        "all proxies are synced",
        Duration::from_secs(30),
        all_synced,
    );
    let gateway = forward(mesh, "istio-ingressgateway", 80);
    let control = forward(mesh, "istiod", 15014);
    serves(&gateway, "/");
    let wrk = Wrk::start(&gateway, "/x", 8);
    sleep(Duration::from_millis(500));
    kill(pid_of(mesh, "istio-system", "istiod", "discovery"));
    let ready = || -> Option<()> {
        let mut stream = TcpStream::connect(&control).ok()?;
        stream
            .write_all(b"GET /ready HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200 ").then_some(())
    };
    let begun = Instant::now();
    while ready().is_none() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "istiod is not back"
        );
        sleep(Duration::from_millis(5));
    }
    let back = Instant::now();
    eventually(
        "all proxies are synced again",
        Duration::from_secs(30),
        all_synced,
    );
    let took = back.elapsed();
    let requests = wrk.stop();
    println!(
        "  {requests} requests; all {proxies} proxies synced {:.2} s after /ready",
        took.as_secs_f32()
    );
    assert!(took <= Duration::from_secs(2), "it took {took:?}");
}
