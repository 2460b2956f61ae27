//! The capture as the pod's agent sees it: names that are answered in the pod, and rules that are lost.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::mesh::{Mesh, eventually};

fn in_pod(mesh: &Mesh, pod: &str, script: &str) -> String {
    mesh.inside("shop", pod, script)
}

pub(crate) fn names_are_answered_in_the_pod(mesh: &Mesh) {
    for host in ["web", "web.shop", "web.shop.svc.cluster.local"] {
        let answer = mesh.call("shop/named", &[&format!("http://{host}/x")]);
        assert_eq!(answer["status"], 200, "{host}: {answer}");
    }
    let figures = in_pod(
        mesh,
        "named",
        "curl -s http://127.0.0.1:15020/stats/prometheus",
    );
    let figure = |name: &str| -> u64 {
        let line = figures.lines().find(|l| l.starts_with(&format!("{name} ")));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {figures}"))
    };
    assert!(figure("istio_agent_dns_requests_total") >= 3);
    assert_eq!(figure("istio_agent_capture_working"), 1);
    let names = in_pod(mesh, "named", "curl -s http://127.0.0.1:15020/debug/ndsz");
    assert!(names.contains("\"web.shop.svc.cluster.local\""), "{names}");
    // A name that the mesh does not know goes to the cluster's own resolver, which says that there is none.
    let answer = mesh.call("shop/named", &["http://nobody.example.invalid/"]);
    assert_ne!(answer["status"], 200, "{answer}");
    assert!(
        in_pod(
            mesh,
            "named",
            "curl -s http://127.0.0.1:15020/stats/prometheus"
        )
        .lines()
        .any(|l| l.starts_with("istio_agent_dns_upstream_requests_total ") && !l.ends_with(" 0"))
    );
}

pub(crate) fn a_lost_capture_is_told(mesh: &Mesh) {
    let ready = || {
        in_pod(
            mesh,
            "named",
            "curl -s -w '%{http_code}' http://127.0.0.1:15020/healthz/ready",
        )
    };
    assert!(ready().ends_with("200"), "{}", ready());
    let rules = in_pod(mesh, "named", "iptables-save -t nat");
    in_pod(mesh, "named", "iptables -t nat -F");
    let answer = eventually("the agent misses the rules", Duration::from_secs(5), || {
        let answer = ready();
        answer.ends_with("503").then_some(answer)
    });
    assert!(
        answer.contains("this pod's traffic is not captured"),
        "{answer}"
    );
    in_pod(
        mesh,
        "named",
        &format!("iptables-restore <<'END'\n{rules}END\n"),
    );
    eventually("the pod is ready again", Duration::from_secs(10), || {
        ready().ends_with("200").then_some(())
    });
}

/// A mesh of its own whose pods have interception mode EBPF, from its start to its end.
pub(crate) fn programs_capture_as_rules_do(_: &Mesh) {
    let _restore = testkit::bpffs::Restore::later();
    let before = kept(Path::new("/"));
    let mesh = Mesh::start("e2e/ebpf", 2);
    // Where this machine has no BPF file system the mesh has one for itself.
    let root = PathBuf::from(format!("/proc/{}/root", mesh.supervisor()));
    let own = |root: &Path| -> Vec<OsString> {
        let known = |name: &OsString| before.contains(name);
        kept(root).into_iter().filter(|name| !known(name)).collect()
    };
    let called = |from: &str| {
        let answer = mesh.call(from, &["http://web.shop/x"]);
        assert_eq!(answer["status"], 200, "{answer}");
        // By both proxies: the caller's answers for it, the other calls the app, with who called.
        assert_eq!(answer["headers"]["server"], "envoy", "{answer}");
        assert_eq!(answer["body"]["peer"], "127.0.0.6", "{answer}");
        let caller = answer["body"]["headers"]["x-forwarded-client-cert"].to_string();
        assert!(
            caller.contains("URI=spiffe://cluster.local/ns/shop/sa/default"),
            "{answer}"
        );
    };
    for from in ["shop/client", "shop/web"] {
        called(from);
    }
    // Large bodies arrive, too: in clear on both sides the proxy would rather have the kernel move them, but what the
    // app sends goes past TCP's queue.
    let web = mesh.address("shop", "web");
    let script = format!(
        "head -c 300000 /dev/zero | tr '\\0' a >b; for i in 1 2 3; do \
         curl -s --max-time 20 --data-binary @b http://{web}:8080/x | wc -c; done"
    );
    let place = tempfile::tempdir().expect("a folder");
    let out = Command::new("nsenter")
        .args(["-n", "-t", &mesh.supervisor().to_string()])
        .args(["sh", "-c", &script])
        .current_dir(&place)
        .output();
    let out = String::from_utf8(out.expect("a shell").stdout).expect("numbers");
    let counts: Vec<usize> = out.lines().filter_map(|l| l.trim().parse().ok()).collect();
    assert!(
        counts.len() == 3 && counts.iter().all(|count| *count > 300_000),
        "{out}"
    );
    // Names come from the agent: its programs see the pod's resolvers, not the node's.
    let figures = in_pod(&mesh, "client", "curl -s 127.0.0.1:15020/stats/prometheus");
    let queries = figures
        .lines()
        .find(|l| l.starts_with("istio_agent_dns_requests_total "));
    assert!(queries.is_some_and(|l| !l.ends_with(" 0")), "{figures}");
    for pod in ["client", "web"] {
        let rules = in_pod(&mesh, pod, "iptables-save; nft list ruleset");
        assert!(!rules.to_lowercase().contains("istio"), "{rules}");
    }
    assert_eq!(own(&root).len(), 2, "a set of programs for each pod");
    // The node's guard names what somebody takes away, and the pod's agent says that nothing comes any more.
    let inode = in_pod(&mesh, "client", "stat -Lc %i /proc/self/ns/net");
    let pod = root.join(KEPT).join(inode.trim());
    let set = fs::read_dir(&pod).expect("its programs").flatten().next();
    fs::remove_file(set.expect("a set").path().join("connect4")).expect("it is pinned");
    let log = mesh.state().join("pods/client.shop/guard.log");
    eventually("the guard's word", Duration::from_secs(5), || {
        let text = fs::read_to_string(&log).expect("the guard's log");
        text.contains("program deleted: connect4, which leads outbound calls")
            .then_some(())
    });
    eventually("the agent's word", Duration::from_secs(10), || {
        let answer = in_pod(
            &mesh,
            "client",
            "curl -s -w '%{http_code}' http://127.0.0.1:15020/healthz/ready",
        );
        (answer.ends_with("503") && answer.contains("this pod's traffic is not captured"))
            .then_some(())
    });
    drop(mesh);
    assert_eq!(
        own(Path::new("/")),
        Vec::<OsString>::new(),
        "programs are left"
    );
}

/// What programs keep on a machine, by network namespace.
fn kept(root: &Path) -> Vec<OsString> {
    let list = fs::read_dir(root.join(KEPT)).into_iter();
    list.flatten().flatten().map(|e| e.file_name()).collect()
}

const KEPT: &str = "sys/fs/bpf/outrigger";
