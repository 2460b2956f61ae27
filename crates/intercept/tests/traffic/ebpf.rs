//! What only the mode EBPF has: programs that come, go and are found again, and bytes that pass by the TCP stack.

use std::{
    ffi::CString,
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    guard::Watched,
    matrix::{self, FLAGS, MODES, Mode, Pod},
    net::{Caller, Namespace},
};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("ebpf_leaves_nothing", leaves_nothing),
    ("ebpf_leaves_datagrams_alone", leaves_datagrams_alone),
    ("ebpf_survives_kill", survives_kill),
    ("ebpf_changes_places_with_iptables", changes_places),
    ("ebpf_falls_back", falls_back),
    ("ebpf_refuses_without_a_proxy", refuses_without_a_proxy),
    ("ebpf_sees_mapped_addresses", sees_mapped_addresses),
    ("ebpf_says_what_it_cannot", says_what_it_cannot),
    ("ebpf_bytes_in_order", bytes_in_order),
    ("ebpf_cuts_what_stays_open", cuts_what_stays_open),
    ("ebpf_between_sidecars", between_sidecars),
    ("ebpf_is_validated_from_the_node", validated_from_the_node),
    ("ebpf_guard_reports_and_repairs", guard_reports_and_repairs),
];

const APP: Caller = Caller {
    uid: 1000,
    gid: 1000,
    bind: None,
    mark: None,
};

const PATIENCE: Duration = Duration::from_secs(10);

fn mode(name: &str) -> &'static Mode {
    MODES
        .iter()
        .find(|m| m.name == name)
        .expect("a mode of that name")
}

fn call(net: &Pod, to: &str) -> String {
    net.pod.call(APP, to.parse().expect("an address"))
}

fn from_outside(net: &Pod, to: &str) -> String {
    net.outside.call(APP, to.parse().expect("an address"))
}

/// The pinned sets of the pod.
fn sets(net: &Pod) -> Vec<PathBuf> {
    let inode = net.pod.run(|| {
        fs::metadata("/proc/thread-self/ns/net")
            .expect("a namespace")
            .ino()
    });
    let found = fs::read_dir(format!("/sys/fs/bpf/outrigger/{inode}"));
    found
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect()
}

fn leaves_nothing() {
    let mode = mode("ebpf");
    let net = Pod::new(mode);
    net.apply(mode, "");
    assert_eq!(sets(&net).len(), 1);
    let again = net
        .pod
        .sh(&format!("$RUN istio-iptables {FLAGS} {}", mode.flags));
    assert!(again.contains("already in place"), "{again}");
    let other = net
        .pod
        .try_sh(&format!("$RUN istio-iptables {FLAGS} {} -q 7", mode.flags));
    assert!(
        !other.1 && other.0.contains("outbound IPv4 lacks: -p tcp --dport 7"),
        "{}",
        other.0
    );
    // A second run makes whole what somebody has taken from it, and does not take it for a part that is iptables'.
    let link = sets(&net).remove(0).join("connect4");
    detach(&link);
    fs::remove_file(&link).expect("it is pinned");
    assert!(call(&net, "10.96.7.7:9080").starts_with("outside "));
    net.apply(mode, "");
    assert!(call(&net, "10.96.7.7:9080").starts_with("outbound "));
    assert!(!net.pod.sh("iptables-nft-save").contains("ISTIO_"));
    net.apply(mode, "--cleanup-only");
    assert!(sets(&net).is_empty());
    assert!(call(&net, "10.96.7.7:9080").starts_with("outside "));
    assert!(from_outside(&net, "10.9.0.5:80").starts_with("app "));
    net.apply(mode, "--cleanup-only");
}

/// Programs for datagrams are there where DNS is captured, and only there.
fn leaves_datagrams_alone() {
    let mode = mode("ebpf");
    let net = Pod::new(mode);
    let datagrams = || {
        let set = sets(&net).remove(0);
        ["sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6"].map(|name| set.join(name).exists())
    };
    let run = |more: &str| {
        net.pod.sh(&format!(
            "$RUN istio-iptables -p 15001 -z 15006 -u 1337 -i '*' -b '*' {} {more}",
            mode.flags
        ))
    };
    run("");
    assert_eq!(datagrams(), [false; 4]);
    assert!(call(&net, "10.96.7.7:9080").starts_with("outbound "));
    assert!(run("").contains("already in place"));
    net.apply(mode, "--reconcile");
    assert_eq!(datagrams(), [true; 4]);
    assert!(call(&net, "10.9.0.1:53").starts_with("agent"));
    run("--reconcile");
    assert_eq!(datagrams(), [false; 4]);
    assert!(!call(&net, "10.9.0.1:53").starts_with("agent"));
    net.apply(mode, "--cleanup-only");
    assert!(sets(&net).is_empty());
}

/// Wherever a run is killed, the next one makes it whole.
fn survives_kill() {
    let mode = mode("ebpf");
    let net = Pod::new(mode);
    for step in 0..24 {
        let flags = if step % 3 == 2 {
            "--cleanup-only"
        } else {
            "-q 7 --reconcile"
        };
        let script = format!(
            "exec $RUN istio-iptables {FLAGS} {} {flags} >/dev/null 2>&1",
            mode.flags
        );
        net.pod.run(move || {
            let mut child = Command::new("sh")
                .args(["-c", &script])
                .env("RUN", std::env::current_exe().expect("a path"))
                .stdout(Stdio::null())
                .spawn()
                .expect("sh runs");
            thread::sleep(Duration::from_millis(5 * step));
            child.kill().expect("it is ours");
            child.wait().expect("it ends");
        });
        net.apply(mode, "--reconcile");
        assert_eq!(sets(&net).len(), 1, "after {step} steps");
        let answer = call(&net, "10.96.7.7:9080");
        assert!(
            answer.starts_with("outbound 10.96.7.7:9080 "),
            "{step}: {answer}"
        );
        let answer = from_outside(&net, "10.9.0.5:80");
        assert!(
            answer.starts_with("inbound 10.9.0.5:80 10.9.0.1"),
            "{step}: {answer}"
        );
    }
}

fn changes_places() {
    let (ebpf, iptables) = (mode("ebpf"), mode("iptables_nft"));
    let net = Pod::new(ebpf);
    net.apply(iptables, "");
    let (out, ok) = net
        .pod
        .try_sh(&format!("$RUN istio-iptables {FLAGS} {}", ebpf.flags));
    assert!(!ok && out.contains("--reconcile takes them away"), "{out}");
    net.apply(ebpf, "--reconcile");
    assert!(!net.pod.sh("iptables-nft-save").contains("ISTIO_"));
    assert!(call(&net, "10.96.7.7:9080").starts_with("outbound 10.96.7.7:9080 "));
    let (out, ok) = net
        .pod
        .try_sh(&format!("$RUN istio-iptables {FLAGS} {}", iptables.flags));
    assert!(!ok && out.contains("eBPF programs capture here"), "{out}");
    net.apply(iptables, "--reconcile");
    assert!(sets(&net).is_empty());
    assert!(call(&net, "10.96.7.7:9080").starts_with("outbound 10.96.7.7:9080 "));
}

/// A part that the programs do not do is done by iptables, and the other part as before.
fn falls_back() {
    let mode = mode("ebpf");
    for (without, chain, absent) in [
        (
            "steer",
            "-A PREROUTING -p tcp -j ISTIO_INBOUND",
            "-A OUTPUT -j ISTIO_OUTPUT",
        ),
        (
            "connect4",
            "-A OUTPUT -j ISTIO_OUTPUT",
            "-A PREROUTING -p tcp -j ISTIO_INBOUND",
        ),
    ] {
        let net = Pod::new(mode);
        let out = net.pod.sh(&format!(
            "$RUN istio-iptables {FLAGS} {} --ebpf-without {without}",
            mode.flags
        ));
        assert!(
            out.contains(&format!("warning: --ebpf-without names {without}")),
            "{out}"
        );
        let again = net.pod.sh(&format!(
            "$RUN istio-iptables {FLAGS} {} --ebpf-without {without}",
            mode.flags
        ));
        assert!(again.contains("already in place"), "{again}");
        let nat = net.pod.sh("iptables-nft-save -t nat");
        assert!(
            nat.contains(chain) && !nat.contains(absent),
            "{without}: {nat}"
        );
        for (to, answer) in [
            ("10.96.7.7:9080", "outbound 10.96.7.7:9080"),
            ("10.9.0.1:53", "agent"),
        ] {
            let found = call(&net, to);
            assert!(found.starts_with(answer), "{without}: {found}");
        }
        let found = from_outside(&net, "10.9.0.5:80");
        assert!(
            found.starts_with("inbound 10.9.0.5:80 10.9.0.1"),
            "{without}: {found}"
        );
        net.apply(mode, "--cleanup-only");
        assert!(!net.pod.sh("iptables-nft-save").contains("ISTIO_"));
    }
}

/// The app is not reached past its proxy while that does not listen; one that comes later is found.
fn refuses_without_a_proxy() {
    let mode = mode("ebpf");
    let net = Pod::new(mode);
    net.apply(mode, "-z 15996 -p 15991");
    let answer = from_outside(&net, "10.9.0.5:80");
    assert!(answer.contains("refused"), "{answer}");
    assert!(call(&net, "10.96.7.7:9080").contains("refused"));
    let report = net.pod.sh("$RUN intercept ebpf");
    assert!(
        report.contains("1 inbound calls refused because no proxy listens"),
        "{report}"
    );
    net.pod.peer(
        "late-in",
        "0.0.0.0:15996".parse().expect("an address"),
        false,
    );
    net.pod.peer(
        "late-out",
        "0.0.0.0:15991".parse().expect("an address"),
        false,
    );
    let answer = from_outside(&net, "10.9.0.5:80");
    assert!(
        answer.starts_with("late-in 10.9.0.5:80 10.9.0.1"),
        "{answer}"
    );
    let answer = call(&net, "10.96.7.7:9080");
    assert!(
        answer.starts_with("late-out 10.96.7.7:9080 10.9.0.5"),
        "{answer}"
    );
}

/// IPv4 on an IPv6 socket, as Java has it; and the app sees whom it called.
fn sees_mapped_addresses() {
    let mode = mode("ebpf");
    let net = Pod::new(mode);
    net.apply(mode, "");
    for (to, shown) in [
        ("[::ffff:10.96.7.7]:9080", "10.96.7.7:9080"),
        ("[2001:db8:96::7]:9080", "[2001:db8:96::7]:9080"),
        ("10.96.7.7:9080", "10.96.7.7:9080"),
    ] {
        let (answer, peer, own) = net.pod.run(move || {
            let to: SocketAddr = to.parse().expect("an address");
            let mut stream = TcpStream::connect(to).expect("it is captured");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("an answer");
            (
                text,
                stream.peer_addr(),
                stream.local_addr().expect("it is connected"),
            )
        });
        assert!(
            answer.starts_with(&format!("outbound {shown} ")),
            "{to}: {answer}"
        );
        assert_eq!(
            peer.expect("it is connected"),
            to.parse().expect("an address")
        );
        let pod = ["10.9.0.5", "2001:db8:9::5"];
        assert!(
            pod.contains(&own.ip().to_canonical().to_string().as_str()),
            "{own}"
        );
    }
}

fn says_what_it_cannot() {
    let net = Pod::new(mode("ebpf"));
    for (flags, says) in [
        (
            "-m EBPF -c eth1",
            "--istio-exclude-interfaces does not go with",
        ),
        ("-m EBPF -k tap0", "--kube-virt-interfaces does not go with"),
        (
            "-m EBPF --drop-invalid",
            "--drop-invalid does not go with --istio-inbound-interception-mode=EBPF: leave one of them out",
        ),
        (
            "-m EBPF --rules-version 1.5",
            "--rules-version does not go with",
        ),
        (
            "-m EBPF --ebpf-cgroup /tmp",
            "it is not below the cgroup2 mount",
        ),
        (
            "-m EBPF --ebpf-sockmap all",
            "use off, pod, proxies or node",
        ),
        ("-m EBPF --ebpf-without x", "the programs are tell, follow"),
        ("-m EBPF -u 1337 -g no-such-group", "\"no-such-group\""),
    ] {
        let (out, ok) = net.pod.try_sh(&format!("$RUN istio-iptables {flags}"));
        assert!(!ok && out.contains(says), "{flags}: {out}");
        assert!(sets(&net).is_empty());
    }
    let mount = outrigger_intercept::ebpf::cgroup_mount().expect("cgroup2");
    let (out, ok) = net.pod.try_sh(&format!(
        "$RUN istio-iptables -m EBPF --ebpf-cgroup {}",
        mount.display()
    ));
    assert!(
        !ok && out.contains("would act on every process of the machine"),
        "{out}"
    );
}

/// Echoes what comes until the caller has said everything.
fn echo(pod: &Namespace, at: &str) {
    let at: SocketAddr = at.parse().expect("an address");
    let listener = pod.run(move || TcpListener::bind(at).expect("the address is free"));
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut buffer = vec![0; 40_000];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    // A slow reader now and then: what was sent must wait, not get lost.
                    if n % 7 == 0 {
                        thread::sleep(Duration::from_millis(1));
                    }
                    stream.write_all(&buffer[..n]).expect("the caller reads");
                }
            });
        }
    });
}

/// Bytes that depend on their place.
fn pattern(at: usize, length: usize) -> Vec<u8> {
    (at..at + length).map(|i| (i / 251 + i) as u8).collect()
}

/// Sends in pieces of many sizes, reads at the same time, closes one direction first.
fn talk(from: &Namespace, to: &str, total: usize) {
    let to: SocketAddr = to.parse().expect("an address");
    from.run(move || {
        let mut stream = TcpStream::connect(to).expect("it is captured");
        let mut writer = stream.try_clone().expect("a copy");
        let sending = thread::spawn(move || {
            let (mut at, mut size) = (0, 1);
            while at < total {
                let length = size.min(total - at);
                writer
                    .write_all(&pattern(at, length))
                    .expect("the peer reads");
                at += length;
                size = size * 3 % 65_521 + 1;
            }
            writer.shutdown(Shutdown::Write).expect("it is open");
        });
        stream.set_read_timeout(Some(PATIENCE)).expect("an option");
        let (mut at, mut buffer) = (0, vec![0; 30_000]);
        let begun = Instant::now();
        loop {
            // The kernel lets a blocking reader of a socket map go with EAGAIN when it is woken for another reason.
            let n = match stream.read(&mut buffer) {
                Err(e) if e.kind() == ErrorKind::WouldBlock && begun.elapsed() < PATIENCE => {
                    continue;
                }
                outcome => outcome.expect("an answer"),
            };
            if n == 0 {
                break;
            }
            assert!(
                buffer[..n] == pattern(at, n),
                "other bytes behind byte {at}"
            );
            at += n;
        }
        assert_eq!(at, total, "the end came too early");
        sending.join().expect("everything is sent");
    });
}

/// Directions of connections whose bytes went from socket to socket.
fn direct(net: &Pod) -> u64 {
    let report = net.pod.sh("$RUN intercept ebpf");
    let line = report
        .lines()
        .find(|l| l.contains("directions of connections"));
    let number = line.and_then(|l| l.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).expect("a counter")
}

fn bytes_in_order() {
    let mode = mode("ebpf_sockmap");
    let net = Pod::new(mode);
    net.apply(mode, "-p 15991");
    echo(&net.pod, "0.0.0.0:15991");
    for total in [1, 128, 70_000, 20_000_000] {
        talk(&net.pod, "10.96.7.7:9080", total);
    }
    for _ in 0..200 {
        talk(&net.pod, "10.96.7.7:9080", 3_000);
    }
    let direct = direct(&net);
    assert!(
        direct >= 204,
        "only {direct} of 408 directions went directly"
    );
}

/// With the programs gone, what was sent and not read would be lost: the connection is ended instead.
fn cuts_what_stays_open() {
    let mode = mode("ebpf_sockmap");
    let net = Pod::new(mode);
    net.apply(mode, "-p 15991");
    echo(&net.pod, "0.0.0.0:15991");
    let mut stream = net.pod.run(|| {
        let mut stream = TcpStream::connect("10.96.7.7:9080").expect("it is captured");
        stream.write_all(b"x").expect("it is open");
        let mut answer = [0];
        stream.read_exact(&mut answer).expect("an answer");
        stream
    });
    let out = net.pod.sh(&format!(
        "$RUN istio-iptables {FLAGS} {} --cleanup-only",
        mode.flags
    ));
    assert!(
        out.contains("accelerated connections are still open and are cut"),
        "{out}"
    );
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("an option");
    assert!(stream.read(&mut [0]).is_err());
    assert!(sets(&net).is_empty());
}

/// Two pods of one node: bytes of one proxy go straight to the other's, and only there.
fn between_sidecars() {
    let name = format!("test-{}", std::process::id());
    let mode = mode("ebpf_sockmap");
    let flags =
        format!("-m EBPF --ebpf-sockmap proxies={name} -u 1337 -i '*' -b '*' -p 15991 -z 15996");
    let net = Pod::new(mode);
    let _group = crate::net::Cgroup::around(&net.outside);
    for pod in [&net.pod, &net.outside] {
        pod.sh(&format!("$RUN istio-iptables {flags}"));
        echo(pod, "0.0.0.0:15996");
    }
    let before = direct(&net);
    let caller = net.pod.clone();
    caller.run(|| {
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(1337));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(1337));
    });
    for total in [1, 128, 70_000, 2_000_000] {
        talk(&caller, "10.9.0.1:9080", total);
    }
    caller.run(|| {
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(0));
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(0));
    });
    // Both pods count: the maps are shared, the counters are each one's own.
    let report = net.outside.sh("$RUN intercept ebpf");
    let there: u64 = report
        .lines()
        .find(|l| l.contains("directions of connections"))
        .and_then(|l| l.split_whitespace().next()?.parse().ok())
        .expect("a counter");
    assert!(direct(&net) - before + there >= 4, "{report}");
    for pod in [&net.pod, &net.outside] {
        pod.sh(&format!("$RUN istio-iptables {flags} --cleanup-only"));
    }
    let shared = PathBuf::from("/sys/fs/bpf/outrigger/shared").join(name);
    assert!(
        !shared.exists(),
        "the last pod takes the shared maps with it"
    );
}

/// The self-test of a program that is outside of the pod's cgroup, as on a node.
fn validated_from_the_node() {
    let net = Pod::new(mode("iptables_nft"));
    let mount = outrigger_intercept::ebpf::cgroup_mount().expect("cgroup2");
    let group = mount.join(format!("outrigger-test-node-{}", std::process::id()));
    fs::create_dir(&group).expect("a cgroup");
    let flags = format!(
        "{FLAGS} -m EBPF --ebpf-cgroup {} -p 15991 -z 15996",
        group.display()
    );
    let out = net
        .pod
        .try_sh(&format!("$RUN istio-iptables {flags} --run-validation"));
    let verified = net.pod.try_sh(&format!("$RUN intercept verify {flags}"));
    // A proxy that runs already takes the calls of the test.
    let at = |port: u16| format!("0.0.0.0:{port}").parse().expect("an address");
    net.pod.peer("inbound", at(15996), false);
    net.pod.peer("outbound", at(15991), false);
    let beside = net.pod.try_sh(&format!(
        "$RUN istio-iptables {flags} --cleanup-only; $RUN istio-iptables {flags} && $RUN intercept verify {flags}"
    ));
    let gone = net.pod.try_sh(&format!(
        "cat {}/cgroup.procs; ls -d {0}/*/; $RUN istio-iptables {flags} --cleanup-only; rmdir {0}; \
         $RUN intercept verify {flags}; test $? = 126",
        group.display()
    ));
    let _ = fs::remove_dir(&group);
    for line in [
        "the proxy's call to its own pod to 127.0.0.6:15002 arrives at port 15996",
        "the app's call to the outside to 192.0.2.1:15002 arrives at port 15991",
        "the app's call to the outside to [2001:db8:ffff::1]:15002 arrives at port 15991",
        "the capture works",
    ] {
        assert!(out.1 && out.0.contains(line), "{line}: {}", out.0);
    }
    for (out, ok) in [&verified, &beside] {
        let line = "a call from elsewhere to 169.254.77.1:15002 arrives at port 15996";
        assert!(*ok && out.contains(line), "{out}");
        let line = "the app's call to the outside to 192.0.2.1:15002 arrives at port 15991";
        assert!(out.contains(line), "{out}");
    }
    // Nobody is left there.
    assert!(!group.exists(), "{}", gone.0);
}

/// What somebody takes away from programs is told within five seconds, and put back when told so.
fn guard_reports_and_repairs() {
    let mode = mode("ebpf_sockmap");
    let net = Pod::new(mode);
    net.apply(mode, "");
    let set = sets(&net).remove(0);
    let captured = |net: &Pod| {
        let answer = call(net, "10.96.7.7:9080");
        assert!(answer.starts_with("outbound 10.96.7.7:9080 "), "{answer}");
        let answer = from_outside(net, "10.9.0.5:80");
        assert!(answer.starts_with("inbound 10.9.0.5:80 "), "{answer}");
    };
    let watched = Watched::start(&net.pod, &[]);
    detach(&set.join("connect4"));
    let line = watched.says("program detached: connect4, which leads outbound calls to the proxy");
    assert!(line.contains("it is not attached to cgroup "), "{line}");
    assert!(call(&net, "10.96.7.7:9080").starts_with("outside "));
    // A run for another pod sweeps what belongs to pods that are gone; this one is not.
    let neighbour = Pod::new(mode);
    neighbour.apply(mode, "");
    assert!(set.join("steer").exists());
    drop((watched, neighbour));
    net.apply(mode, "--reconcile");
    captured(&net);

    let set = sets(&net).remove(0);
    let watched = Watched::start(&net.pod, &["--repair"]);
    for name in ["connect4", "steer", "tell"] {
        detach(&set.join(name));
        watched.says(&format!("program detached: {name}"));
        watched.says("repaired");
        captured(&net);
    }
    let other = Pod::new(mode);
    other.apply(mode, "");
    replace(&set.join("connect4"), &sets(&other)[0].join("connect4"));
    watched.says("program replaced: connect4");
    watched.says("repaired");
    captured(&net);
    matrix::ebpf_delete(&net.pod, 13);
    watched.says("program changed: rules of the programs: outbound IPv4 lacks: ");
    watched.says("repaired");
    captured(&net);
    let set_there = || fs::read_dir(&set).expect("it is there").count();
    let all = set_there();
    for file in ["connect4", "map_rules", "complete"] {
        fs::remove_file(set.join(file)).expect("it is there");
    }
    watched.says("program deleted: ");
    watched.says("repaired");
    captured(&net);
    assert_eq!(set_there(), all);
    fs::remove_dir_all(&set).expect("it is there");
    watched.says("program deleted: maps: ");
    watched.says("repaired");
    captured(&net);
    assert_eq!(set_there(), all);
    drop(watched);
    net.apply(mode, "--cleanup-only");
    assert!(sets(&net).is_empty());
    assert!(call(&net, "10.96.7.7:9080").starts_with("outside "));
}

/// As `bpftool link detach pinned PATH`.
fn detach(path: &Path) {
    const LINK_DETACH: i64 = 34;
    let link = pinned(path);
    bpf(LINK_DETACH, [number(&link), 0, 0, 0]);
}

/// Puts the program of the second link in place of that of the first.
fn replace(path: &Path, other: &Path) {
    const PROG_GET_FD_BY_ID: i64 = 13;
    const LINK_UPDATE: i64 = 29;
    let (link, other) = (pinned(path), pinned(other));
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", other.as_raw_fd()));
    let info = info.expect("it is open");
    let id = info.lines().find_map(|l| l.strip_prefix("prog_id:"));
    let id: u32 = id.and_then(|id| id.trim().parse().ok()).expect("a number");
    let program = bpf(PROG_GET_FD_BY_ID, [id, 0, 0, 0]);
    bpf(LINK_UPDATE, [number(&link), program as u32, 0, 0]);
    drop(owned(program));
}

fn pinned(path: &Path) -> OwnedFd {
    const OBJ_GET: i64 = 7;
    let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path");
    let at = path.as_ptr() as u64;
    owned(bpf(OBJ_GET, [at as u32, (at >> 32) as u32, 0, 0]))
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd() as u32
}

/// A command whose attributes are four numbers; it must succeed.
#[allow(unsafe_code)]
fn bpf(command: i64, attributes: [u32; 4]) -> i32 {
    #[repr(C, align(8))]
    struct Attributes([u32; 4]);
    let attributes = Attributes(attributes);
    // SAFETY: the attributes and what they point to outlive the call, and their size is given.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, 16) };
    assert!(
        rc >= 0,
        "bpf {command}: {}",
        std::io::Error::last_os_error()
    );
    rc as i32
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us; nobody else has it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}
