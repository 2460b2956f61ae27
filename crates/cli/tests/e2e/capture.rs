//! The capture as the pod's agent sees it: names that are answered in the pod, and rules that are lost.

use std::time::Duration;

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
