//! What the agent tells of the capture, with the kernel's own rules and tables: log, figures, readiness.
//!
//! Each test's pod is a network namespace. Needs root, ip and iptables; what is missing fails where `CI` is set.

use std::{
    fs,
    io::{self, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use intercept::{Config, apply, ebpf, program, surroundings::Addresses};
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
    fn captured(&self, flags: &[&str]) {
        let mut args = vec!["-u", "0", "-b", "*", "-i", "*"];
        args.extend(flags);
        let args: Vec<String> = args.into_iter().map(String::from).collect();
        self.run(move || {
            let mut config = Config::from_args(&args, &|_| None).expect("flags");
            let addresses = Addresses::of_this_pod().expect("an address");
            config.fill_from_pod(&addresses).expect("an address");
            config.validate().expect("they go together");
            let rules = program::rules(&config).expect("rules");
            let made = match config.ebpf() {
                true => ebpf::apply(&config, &rules, &mut |_| {}),
                false => apply::apply(&config, &rules, &mut |_| {}),
            };
            made.expect("they can be put in force");
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
    let Err(why) = testkit::needs::root_and("capture", &["iptables-nft"]) else {
        return true;
    };
    println!("skipped: {why}");
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
    let _alone = alone();
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

/// A rule of somebody else is told beside readiness; one that is gone takes it away.
#[test]
fn a_changed_rule_is_in_log_figures_and_readiness() {
    if !can_run() {
        return;
    }
    let _alone = alone();
    let log = Lines::of_this_process();
    let pod = Pod::new();
    pod.captured(&["--force-iptables-binary", "nft"]);
    let capture = proven(&pod, false);
    pod.sh("iptables-nft -t nat -I OUTPUT 1 -d 10.44.44.44 -j ACCEPT");
    let strange =
        "rule inserted: iptables-nft, table nat, chain OUTPUT, rule 1: -d 10.44.44.44/32 -j ACCEPT";
    within(5, "the figure", || changed(&capture, 1));
    assert_eq!(capture.detail(), format!("{strange}\n"));
    assert!(log.text().contains(strange));
    assert_eq!(capture.not_ready(), None);
    pod.sh("iptables-nft -t nat -D OUTPUT 1; iptables-nft -t nat -F ISTIO_REDIRECT");
    let why = within(5, "not ready", || capture.not_ready());
    assert!(
        why.starts_with("the interception has changed: rule deleted: "),
        "{why}"
    );
    assert!(why.contains("chain ISTIO_REDIRECT"), "{why}");
    assert_eq!(figure(&capture, "istio_agent_capture_working"), 0);
    pod.sh("iptables-nft -t nat -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001");
    within(5, "ready again", || {
        capture.not_ready().is_none().then_some(())
    });
    within(5, "the figure", || changed(&capture, 0));
    assert!(figure(&capture, "istio_agent_capture_rule_changes_total") >= 2);
}

/// The same with programs, in a pod's cgroup; told to, the agent puts them back.
#[test]
fn a_program_that_is_gone_is_in_log_figures_and_readiness() {
    if !can_run() {
        return;
    }
    if !ebpf::built() {
        println!("skipped: mode EBPF needs clang at the time of the build");
        assert!(std::env::var_os("CI").is_none(), "it must run in CI");
        return;
    }
    let _alone = alone();
    let _restore = testkit::bpffs::Restore::later();
    let log = Lines::of_this_process();
    for repair in [false, true] {
        let pod = Pod::new();
        let group = Cgroup::around(&pod);
        pod.captured(&[
            "-m",
            "EBPF",
            "--ebpf-cgroup",
            &group.0.display().to_string(),
        ]);
        let capture = proven(&pod, repair);
        let link = pod.run(|| {
            let inode = fs::metadata("/proc/thread-self/ns/net")
                .expect("it is there")
                .ino();
            let sets = Path::new("/sys/fs/bpf/outrigger").join(inode.to_string());
            let mut sets = fs::read_dir(sets).expect("programs").flatten();
            sets.next().expect("a set").path().join("connect4")
        });
        // Without its pin a link is gone, and with it the program.
        fs::remove_file(&link).expect("it is pinned");
        let gone = "program deleted: connect4, which leads outbound calls to the proxy";
        if repair {
            within(5, "the repair", || {
                Some(figure(&capture, "istio_agent_capture_repairs_total")).filter(|n| *n > 0)
            });
            assert!(link.exists());
            within(5, "ready again", || {
                capture.not_ready().is_none().then_some(())
            });
        } else {
            within(5, "the figure", || changed(&capture, 1));
            assert!(capture.detail().starts_with(gone), "{}", capture.detail());
            assert!(capture.not_ready().is_some());
            assert_eq!(figure(&capture, "istio_agent_capture_working"), 0);
        }
        assert!(log.text().contains(gone));
        pod.run(|| ebpf::remove(&mut |_| {}).expect("they go"));
    }
}

/// Starts the watch; what is there then is what later looks are compared with.
fn proven(pod: &Pod, repair: bool) -> Arc<Capture> {
    let log = Lines::of_this_process();
    let guarded = || log.text().matches("capture: rules are guarded").count();
    let before = guarded();
    let capture = pod.run(move || Capture::of([10, 9, 0, 5].into(), repair).expect("a thread"));
    within(5, "the capture is proven", || {
        (capture.not_ready().is_none() && guarded() > before).then_some(())
    });
    capture
}

/// All tests write one log: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn changed(capture: &Capture, rules: u64) -> Option<()> {
    (figure(capture, "istio_agent_capture_rules_changed") == rules).then_some(())
}

/// A cgroup of the pod's own, which its thread and those that it starts are in.
struct Cgroup(PathBuf);

impl Cgroup {
    fn around(pod: &Pod) -> Cgroup {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let mount = ebpf::cgroup_mount().expect("cgroup2");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = mount.join(format!(
            "outrigger-agent-test-{}-{number}",
            std::process::id()
        ));
        fs::create_dir(&path).expect("a cgroup");
        fs::write(path.join("cgroup.type"), "threaded").expect("a threaded cgroup");
        let threads = path.join("cgroup.threads");
        pod.run(move || fs::write(threads, "0").expect("a thread moves"));
        Cgroup(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The threads of the pod have no end of their own: they go where they came from.
        let up = self.0.with_file_name("cgroup.threads");
        for thread in fs::read_to_string(self.0.join("cgroup.threads"))
            .unwrap_or_default()
            .lines()
        {
            let _ = fs::write(&up, thread);
        }
        let _ = fs::remove_dir(&self.0);
    }
}
