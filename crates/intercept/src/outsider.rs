//! The inbound half of `outrigger intercept verify`: a call that really comes from elsewhere.
//!
//! A pair of cards is made for the time of the test, its far end in a network namespace of its own, from which the pod
//! is called: the packet comes in by a card and meets the same rules as any client's. The near end has link-local
//! addresses, which nothing in the pod takes for its own. Needs NET_ADMIN and `ip`; without them the test is left out.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{getsockopt, sockopt},
    unistd::gettid,
};

use crate::{
    Error,
    apply::Log,
    config::{Config, split},
    ebpf, surroundings,
};

/// Calls the pod from elsewhere in every captured family; an error names the call that does not arrive.
pub(crate) fn verify(config: &Config, log: Log<'_>) -> Result<(), Error> {
    let Some(port) = port(config) else {
        log("validation: calls from elsewhere are not tested: no inbound port is captured".into());
        return Ok(());
    };
    if config.tproxy() {
        log(
            "validation: calls from elsewhere are not tested: TPROXY needs the proxy's own socket"
                .into(),
        );
        return Ok(());
    }
    let cards = match Cards::new() {
        Ok(cards) => cards,
        Err(why) => {
            log(format!(
                "validation: calls from elsewhere are not tested: {why}"
            ));
            return Ok(());
        }
    };
    let mut failures = Vec::new();
    for v6 in [false, true] {
        if v6 && !config.enable_inbound_ipv6 {
            continue;
        }
        let to = SocketAddr::new(near(v6), port);
        match cards.call(config, to) {
            Ok(at) => log(format!(
                "validation: a call from elsewhere to {to} arrives at port {at}"
            )),
            Err(why) => failures.push(format!(
                "a call from elsewhere to {to} does not arrive at port {}: {why}",
                config.inbound_capture_port
            )),
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    Err(Error::Validation(format!(
        "iptables validation failed; workload is not ready for Istio.\n  {}",
        failures.join("\n  ")
    )))
}

/// A captured inbound port.
fn port(config: &Config) -> Option<u16> {
    match config.inbound_ports_include.as_str() {
        "*" => {
            let left: Vec<&str> = split(&config.inbound_ports_exclude);
            (config.iptables_probe_port..=u16::MAX)
                .find(|p| !left.contains(&p.to_string().as_str()))
        }
        list => split(list)
            .first()
            .and_then(|p| surroundings::port(p, "tcp")),
    }
}

fn near(v6: bool) -> IpAddr {
    match v6 {
        false => [169, 254, 77, 1].into(),
        true => std::net::Ipv6Addr::new(0xfd6f, 0x7574, 0x7269, 0, 0, 0, 0, 1).into(),
    }
}

/// The pair of cards; the near end goes when dropped, and the far end with it.
struct Cards {
    jobs: mpsc::Sender<SocketAddr>,
    outcomes: mpsc::Receiver<Result<(), String>>,
}

impl Cards {
    fn new() -> Result<Cards, String> {
        let (jobs, calls) = mpsc::channel::<SocketAddr>();
        let (done, outcomes) = mpsc::channel();
        let (ready, wait) = mpsc::channel();
        let (cards, plugged) = mpsc::channel::<()>();
        thread::spawn(move || {
            let entered = unshare(CloneFlags::CLONE_NEWNET).map_err(|e| e.to_string());
            let failed = entered.is_err();
            let _ = ready.send(entered.map(|()| gettid().as_raw()));
            // The sender is dropped where the cards could not be made.
            if failed || plugged.recv().is_err() {
                return;
            }
            let up = ip(&[
                &format!("addr add 169.254.77.2/30 dev {FAR}"),
                &format!("link set {FAR} up"),
            ]);
            // A pod without IPv6 is tested without it.
            let _ = ip(&[&format!("-6 addr add fd6f:7574:7269::2/64 dev {FAR} nodad")]);
            let _ = done.send(up.and_then(|()| carrier(FAR)));
            for to in calls {
                let _ = done.send(dial(to));
            }
        });
        let thread = wait.recv().map_err(|_| "the far end broke".to_owned())??;
        let made = Cards { jobs, outcomes };
        ip(&[
            &format!("link add {NEAR} type veth peer name {FAR} netns {thread}"),
            &format!("addr add 169.254.77.1/30 dev {NEAR}"),
            &format!("link set {NEAR} up"),
        ])?;
        let _ = ip(&[&format!(
            "-6 addr add fd6f:7574:7269::1/64 dev {NEAR} nodad"
        )]);
        let broke = "the far end broke";
        cards.send(()).map_err(|_| broke)?;
        made.outcomes.recv().map_err(|_| broke)??;
        carrier(NEAR)?;
        Ok(made)
    }

    /// Calls `to` until it arrives or the time is over; gives the port where it arrived.
    fn call(&self, config: &Config, to: SocketAddr) -> Result<u16, String> {
        let capture = surroundings::port(&config.inbound_capture_port, "tcp")
            .ok_or("--inbound-capture-port is no port")?;
        // Programs lead to sockets of the pod's cgroup alone; the caller is to be none of it.
        let inside = match config.ebpf() {
            true => Some(ebpf::Inside::of(&config.ebpf_cgroup).map_err(|e| e.to_string())?),
            false => None,
        };
        // What is led to a port comes to the address of the card that it came in by.
        let listener = match TcpListener::bind(SocketAddr::new(to.ip(), capture)) {
            Ok(listener) => Some(listener),
            // The proxy runs already; nobody else takes such a call.
            Err(e) if e.kind() == ErrorKind::AddrInUse => None,
            Err(e) => return Err(format!("port {capture} cannot be listened at: {e}")),
        };
        if let Some(listener) = &listener {
            listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        }
        drop(inside);
        let end = Instant::now() + config.probe_timeout;
        let mut why = "no connection came".to_owned();
        while Instant::now() < end {
            self.jobs.send(to).map_err(|_| "the far end broke")?;
            match self.outcomes.recv() {
                Ok(Ok(())) if listener.is_none() => return Ok(capture),
                Ok(Ok(())) => {}
                Ok(Err(e)) => why = e,
                Err(_) => return Err("the far end broke".into()),
            }
            if let Some(Ok((stream, _))) = listener.as_ref().map(TcpListener::accept) {
                return match original(&stream, to) {
                    Some(found) if found == to => Ok(capture),
                    found => Err(format!("it arrives, meant for {found:?}")),
                };
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err(why)
    }
}

impl Drop for Cards {
    fn drop(&mut self) {
        // Without it there is nothing to remove.
        let _ = ip(&[&format!("link del {NEAR}")]);
    }
}

fn dial(to: SocketAddr) -> Result<(), String> {
    TcpStream::connect_timeout(&to, ATTEMPT)
        .map(drop)
        .map_err(|e| e.to_string())
}

fn original(stream: &TcpStream, meant: SocketAddr) -> Option<SocketAddr> {
    match meant {
        SocketAddr::V4(_) => {
            let a = getsockopt(stream, sockopt::OriginalDst).ok()?;
            let ip = std::net::Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
            Some(SocketAddr::new(ip.into(), u16::from_be(a.sin_port)))
        }
        SocketAddr::V6(_) => {
            let a = getsockopt(stream, sockopt::Ip6tOriginalDst).ok()?;
            let ip = std::net::Ipv6Addr::from(a.sin6_addr.s6_addr);
            Some(SocketAddr::new(ip.into(), u16::from_be(a.sin6_port)))
        }
    }
}

/// Waits until the card can send: the kernel takes its time, up to a second.
fn carrier(card: &str) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        let output = Command::new("ip")
            .args(["-o", "link", "show", "dev", card])
            .output();
        let text = output.map_err(|e| format!("ip: {e}"))?.stdout;
        if String::from_utf8_lossy(&text).contains(" state UP ") {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(format!("the card {card} does not come up"));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Runs `ip` once for each line.
fn ip(lines: &[&str]) -> Result<(), String> {
    for line in lines {
        let output = Command::new("ip")
            .args(line.split(' '))
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("ip: {e}"))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(format!("ip {line}: {}", text.trim()));
        }
    }
    Ok(())
}

/// How long one call may take.
const ATTEMPT: Duration = Duration::from_millis(500);
const NEAR: &str = "or-verify0";
const FAR: &str = "or-verify1";
