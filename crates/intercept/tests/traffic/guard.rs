//! The guard, `explain` and `verify` against the kernel's live rules.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    matrix::{MODES, Mode, Pod},
    net::Namespace,
};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("explain_native_nft", explains_native_nft),
    (
        "guard_reports_and_repairs_every_change",
        reports_and_repairs,
    ),
    ("explain_reads_the_kernels_rules", explains),
    ("a_held_lock_is_waited_for", waits),
    ("verify_names_what_is_missing", verifies),
    ("a_killed_tool_leaves_what_the_next_run_repairs", killed),
];

pub(crate) struct Watched {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Watched {
    pub(crate) fn start(pod: &Namespace, flags: &'static [&'static str]) -> Watched {
        let mut child = pod.run(move || {
            Command::new(std::env::current_exe().expect("a path"))
                .args(["intercept", "guard"])
                .args(flags)
                .stdout(Stdio::piped())
                .spawn()
                .expect("it starts")
        });
        let out = child.stdout.take().expect("a pipe");
        let (give, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = give.send(line);
            }
        });
        let watched = Watched { child, lines };
        watched.says("guarding");
        watched
    }

    /// Waits for a line that holds `text`; five seconds are the promise.
    pub(crate) fn says(&self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(5);
        let mut seen = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("nothing with {text:?} within five seconds; seen {seen:?}"),
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn mode(name: &str) -> &'static Mode {
    MODES.iter().find(|m| m.name == name).expect("a mode")
}

fn reports_and_repairs() {
    for (name, program) in [
        ("iptables_nft", "iptables-nft"),
        ("iptables_legacy", "iptables-legacy"),
    ] {
        let net = Pod::new(mode(name));
        net.apply(mode(name), "");
        let good = net.pod.sh(&format!("{program}-save -t nat | grep ^-A"));
        let watched = Watched::start(&net.pod, &[]);
        net.pod.sh(&format!(
            "{program} -t nat -I OUTPUT 1 -d 10.1.1.1 -j ACCEPT"
        ));
        watched.says(&format!(
            "rule inserted: {program}, table nat, chain OUTPUT, rule 1: -d 10.1.1.1/32 -j ACCEPT"
        ));
        net.pod.sh(&format!("{program} -t nat -D ISTIO_REDIRECT 1"));
        watched.says("rule deleted: ");
        drop(watched);
        // The start of this one is the state with a foreign rule and without the redirection: taken back first.
        net.pod.sh(&format!(
            "{program} -t nat -D OUTPUT 1; {program} -t nat -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001"
        ));
        let watched = Watched::start(&net.pod, &["--repair"]);
        net.pod.sh(&format!(
            "{program} -t nat -D ISTIO_OUTPUT 3; {program} -t nat -A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN"
        ));
        watched.says("rule reordered: ");
        watched.says("repaired");
        assert_eq!(
            net.pod.sh(&format!("{program}-save -t nat | grep ^-A")),
            good
        );
        net.pod.sh(&format!("{program} -t nat -F"));
        watched.says("repaired");
        assert_eq!(
            net.pod.sh(&format!("{program}-save -t nat | grep ^-A")),
            good
        );
    }
    let net = Pod::new(mode("nft"));
    net.apply(mode("nft"), "");
    let good = net.pod.sh("nft -s list ruleset");
    let watched = Watched::start(&net.pod, &["--repair"]);
    net.pod
        .sh("nft insert rule inet istio-proxy-nat output ip daddr 10.1.1.1 accept");
    watched
        .says("rule inserted: nft, inet istio-proxy-nat output, rule 2: ip daddr 10.1.1.1 accept");
    watched.says("repaired");
    assert_eq!(net.pod.sh("nft -s list ruleset"), good);
}

fn explains() {
    let net = Pod::new(mode("iptables_legacy"));
    net.apply(mode("iptables_legacy"), "");
    let out = net
        .pod
        .sh("$RUN intercept explain --uid 1000 --from 10.9.0.5 --to 10.96.7.7:9080");
    assert!(out.ends_with("ends: local socket 127.0.0.1:15001 (the proxy, outbound); original destination 10.96.7.7:9080\n"), "{out}");
    let out = net.pod.sh(
        "iptables-legacy-save >/tmp/.rules.$$; $RUN intercept explain --rules /tmp/.rules.$$ --in-interface eth0 \
         --from 10.9.0.1 --to 10.9.0.5:15021; rm /tmp/.rules.$$",
    );
    assert!(
        out.ends_with("ends: local socket 10.9.0.5:15021\n"),
        "{out}"
    );
    let out = net.pod.sh(
        "$RUN intercept explain --uid 1337 --from 10.9.0.5 --to 10.9.0.5:80 -- -u 1337 -i '*' -b '*' --rules-version 1.13",
    );
    assert!(
        out.contains("local socket 127.0.0.1:15006 (the proxy, inbound)"),
        "{out}"
    );
    let (out, ok) = net.pod.try_sh("$RUN intercept explain --to 10.9.0.5:80");
    assert!(!ok && out.contains("--from is needed"), "{out}");
    let native = Pod::new(mode("nft"));
    native.apply(mode("nft"), "");
    let (out, ok) = native
        .pod
        .try_sh("$RUN intercept explain --from 10.9.0.5 --to 10.9.0.1:80");
    assert!(
        ok && out.contains("ends: local socket 127.0.0.1:15001 (the proxy, outbound)"),
        "{out}"
    );
    net.pod.sh("iptables-nft -t nat -A OUTPUT -j RETURN");
    let (out, ok) = net
        .pod
        .try_sh("$RUN intercept explain --from 10.9.0.5 --to 10.9.0.1:80");
    assert!(
        !ok && out.contains("both iptables-nft and iptables-legacy"),
        "{out}"
    );
}

/// Another program holds the lock of the legacy programs for a second.
fn waits() {
    let net = Pod::new(mode("iptables_legacy"));
    let out = net.pod.sh(&format!(
        "touch /run/xtables.lock; flock /run/xtables.lock sleep 1 & sleep 0.2; \
         $RUN istio-iptables {} --force-iptables-binary legacy >/dev/null && wait && iptables-legacy-save -t nat",
        crate::matrix::FLAGS
    ));
    assert!(out.contains("-A ISTIO_OUTPUT -j ISTIO_REDIRECT"), "{out}");
}

/// The walk through nft's own rules ends where that through the same rules of iptables does.
fn explains_native_nft() {
    let mode = |name: &str| {
        MODES
            .iter()
            .find(|m| m.name == name)
            .expect("a mode of that name")
    };
    let ends = |name: &str| -> Vec<String> {
        let net = Pod::new(mode(name));
        net.apply(mode(name), "");
        let calls = [
            "--uid 1000 --from 10.9.0.5 --to 10.96.7.7:9080",
            "--uid 1337 --from 10.9.0.5 --to 10.9.0.5:80",
            "--uid 1337 --from 10.9.0.5 --to 10.96.7.7:9080",
            "--uid 1000 --from 10.9.0.5 --to 10.9.0.1:53",
            "--uid 1000 --from 2001:db8:9::5 --to [2001:db8:51::9]:9080",
            "--in-interface eth0 --from 10.9.0.1 --to 10.9.0.5:80",
            "--in-interface eth0 --from 10.9.0.1 --to 10.9.0.5:15020",
        ];
        let end = |call: &&str| {
            let story = net.pod.sh(&format!("$RUN intercept explain {call}"));
            story.lines().last().unwrap_or_default().to_owned()
        };
        calls.iter().map(end).collect()
    };
    let found = ends("nft");
    assert_eq!(found, ends("iptables_nft"));
    assert!(found[0].contains("15001"), "{found:?}");
}

fn verifies() {
    let net = Pod {
        pod: Namespace::new(),
        outside: Namespace::new(),
        cgroup: None,
    };
    net.pod.sh(&format!(
        "ip link set lo up; ip link add eth0 type veth peer name eth0 netns {}; ip link set eth0 up\n\
         ip addr add 10.9.0.5/24 dev eth0; ip route add default dev eth0",
        net.outside.thread
    ));
    net.outside
        .sh("ip link set eth0 up; ip addr add 10.9.0.1/24 dev eth0");
    let flags = "-u 1337 -i '*' -b '*' --probe-timeout 500ms";
    let (out, ok) = net
        .pod
        .try_sh(&format!("$RUN intercept verify {flags}; test $? = 126"));
    assert!(ok && out.contains("does not arrive at port 15006"), "{out}");
    net.pod.sh(&format!("$RUN istio-iptables {flags}"));
    let out = net.pod.sh(&format!("$RUN intercept verify {flags}"));
    assert!(
        out.contains("the proxy's call to its own pod to 127.0.0.6:15002 arrives"),
        "{out}"
    );
    assert!(
        out.contains("the app's call to the outside to 192.0.2.1:15002 arrives"),
        "{out}"
    );
    assert!(
        out.contains("a call from elsewhere to 169.254.77.1:15002 arrives at port 15006"),
        "{out}"
    );
    net.pod
        .sh("iptables -t nat -D PREROUTING -p tcp -j ISTIO_INBOUND");
    // The calls from inside still arrive: only the one from elsewhere shows it.
    let (out, ok) = net
        .pod
        .try_sh(&format!("$RUN intercept verify {flags}; test $? = 126"));
    assert!(
        ok && out.contains("a call from elsewhere to 169.254.77.1:15002 does not arrive"),
        "{out}"
    );
    let cards = net.pod.sh("ip link");
    assert!(!cards.contains("or-verify"), "{cards}");
}

/// Killed at any moment: what is there is nothing, all, or what --reconcile makes whole.
fn killed() {
    for name in [
        "iptables_nft",
        "iptables_legacy",
        "nft",
        "tproxy",
        "tproxy_notrack",
    ] {
        let mode = mode(name);
        let net = Pod::new(mode);
        for milliseconds in [0, 5, 10, 15, 20, 30, 40, 60] {
            net.pod.sh(&format!(
                "$RUN istio-iptables {} {} --reconcile >/dev/null 2>&1 & p=$!; sleep 0.{milliseconds:03}; \
                 kill -9 $p; wait $p; true",
                crate::matrix::FLAGS, mode.flags
            ));
            net.apply(mode, "--reconcile");
            let app = crate::net::Caller::of((1000, 1000));
            let to = "10.96.7.7:9080".parse().expect("an address");
            let answer = net.pod.call(app, to);
            assert!(answer.starts_with("outbound "), "{name}: {answer}");
            // A clean-up that is killed is ended by the next one.
            net.pod.sh(&format!(
                "$RUN istio-iptables {} {} --cleanup-only >/dev/null 2>&1 & p=$!; sleep 0.{milliseconds:03}; \
                 kill -9 $p; wait $p; true",
                crate::matrix::FLAGS, mode.flags
            ));
            net.apply(mode, "--cleanup-only");
            let left = net.pod.sh(
                "iptables-nft-save; ip6tables-nft-save; nft list tables | grep -v ip; ip rule; ip -6 rule; \
                 ip route show table 133; cat /proc/sys/net/ipv4/tcp_fwmark_accept | sed s/1/ISTIO/",
            );
            let ours = ["ISTIO", "istio", "133", "-A "].map(|w| left.contains(w));
            assert_eq!(ours, [false; 4], "{name}: {left}");
        }
    }
}
