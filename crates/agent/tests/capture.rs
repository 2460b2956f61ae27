//! What the agent tells of the capture, with the kernel's own rules and tables: log, figures, readiness.
//!
//! Each test's pod is a network namespace. Needs root, ip and iptables; what is missing fails where `CI` is set.

use std::{
    io::{self, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use intercept::{Config, apply, program, surroundings::Addresses};
use nix::sched::{CloneFlags, unshare};
use outrigger_agent::capture::Capture;

/// A network namespace: a thread that has left the others'.
struct Pod(mpsc::Sender<Box<dyn FnOnce() + Send>>);

impl Pod {
    /// With an address, and without rules.
    fn new() -> Pod {
        let (jobs, list) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            for job in list {
                job();
            }
        });
        let pod = Pod(jobs);
        pod.sh(
            "ip link set lo up; ip link add eth0 type veth peer name peer0; ip link set peer0 up; \
             ip addr add 10.9.0.5/24 dev eth0; ip link set eth0 up",
        );
        pod
    }

    fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (give, take) = mpsc::channel();
        self.0
            .send(Box::new(move || drop(give.send(f()))))
            .expect("the namespace lives");
        take.recv().expect("the job ends well")
    }

    fn sh(&self, script: &'static str) {
        let status = self.run(move || Command::new("sh").args(["-ec", script]).status());
        assert!(status.is_ok_and(|s| s.success()), "{script}");
    }

    /// The proxy is this process's user, and listens.
    fn captured(&self, flags: &'static [&'static str]) {
        self.run(move || {
            let mut args = vec!["-u", "0", "-b", "*", "-i", "*"];
            args.extend(flags);
            let args: Vec<String> = args.into_iter().map(String::from).collect();
            let mut config = Config::from_args(&args, &|_| None).expect("flags");
            let addresses = Addresses::of_this_pod().expect("an address");
            config.fill_from_pod(&addresses).expect("an address");
            config.validate().expect("they go together");
            let rules = program::rules(&config).expect("rules");
            apply::apply(&config, &rules, &mut |_| {}).expect("iptables works");
            let proxy = TcpListener::bind("0.0.0.0:15006").expect("the port is free");
            thread::spawn(move || for _ in proxy.incoming() {});
        });
    }

    fn call(&self, to: &'static str) -> io::Result<()> {
        self.run(move || {
            let to: SocketAddr = to.parse().expect("an address");
            TcpStream::connect_timeout(&to, Duration::from_secs(1)).map(drop)
        })
    }
}

/// Lines of the log, of all tests.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .expect("no writer breaks")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn of_this_process() -> &'static Lines {
        static LINES: OnceLock<Lines> = OnceLock::new();
        LINES.get_or_init(|| {
            let lines = Lines::default();
            let writer = lines.clone();
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(move || writer.clone())
                .init();
            lines
        })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("no writer breaks")).into_owned()
    }
}

fn can_run() -> bool {
    let found = Command::new("iptables-nft").arg("--version").output();
    if nix::unistd::geteuid().is_root() && found.is_ok() {
        return true;
    }
    println!("skipped: tests of the capture need root and iptables");
    assert!(std::env::var_os("CI").is_none(), "they must run in CI");
    false
}

fn within<T>(seconds: u64, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < end,
            "{what}: not within {seconds} s; the log:\n{}",
            Lines::of_this_process().text()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn figure(capture: &Capture, name: &str) -> u64 {
    let text = capture.text();
    let line = text.lines().find(|l| l.starts_with(&format!("{name} ")));
    line.and_then(|l| l.rsplit(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[test]
fn a_full_table_of_connection_tracking_is_named() {
    if !can_run() {
        return;
    }
    let log = Lines::of_this_process();
    let pod = Pod::new();
    pod.captured(&["--force-iptables-binary", "nft"]);
    let capture = pod.run(|| Capture::of([10, 9, 0, 5].into(), false).expect("a thread"));
    within(5, "the capture is proven", || {
        capture.not_ready().is_none().then_some(())
    });
    assert_eq!(figure(&capture, "istio_agent_conntrack_dropped_total"), 0);
    pod.run(testkit::conntrack::fill);
    let refused = pod
        .call("10.9.0.5:80")
        .expect_err("nothing is translated any more");
    assert_eq!(refused.kind(), io::ErrorKind::TimedOut, "{refused}");
    // Its own calls are dropped as well, so a look takes longer than otherwise.
    let dropped = within(10, "the figure", || {
        Some(figure(&capture, "istio_agent_conntrack_dropped_total")).filter(|n| *n > 0)
    });
    let entries = figure(&capture, "istio_agent_conntrack_entries");
    let most = figure(&capture, "istio_agent_conntrack_max_entries");
    assert!(entries >= most && most > 0, "{entries} of {most}");
    let line = within(5, "the log line", || {
        let text = log.text();
        let line = text
            .lines()
            .find(|l| l.contains("connection tracking has no room"))?;
        Some(line.to_owned())
    });
    for words in [
        "WARN",
        &format!("of {most} entries"),
        "packets were dropped",
        "new connections through REDIRECT fail",
        "raise net.netfilter.nf_conntrack_max on the node",
    ] {
        assert!(line.contains(words), "{words:?} is missing: {line}");
    }
    println!("  {dropped} packets dropped; {line}");
}
