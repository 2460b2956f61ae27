//! Hosts that are put aside for how they answer, or for not being there.

use super::*;

async fn closed_port() -> u16 {
    let gone = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    gone.local_addr().expect("it is bound").port()
}

#[test]
fn failures_on_this_side_are_counted_apart_where_they_should_be() {
    block_on(async {
        let good = Origin::default();
        good.other.replace(OK.to_owned());
        for split in [true, false] {
            let ports = [closed_port().await, good.start().await];
            let cluster = format!(
                "outlier_detection: {{split_external_local_origin_errors: {split}, consecutive_local_origin_failure: 2, \
                 consecutive_5xx: 4, consecutive_gateway_failure: 1000, enforcing_success_rate: 0, base_ejection_time: 100s, max_ejection_percent: 50}}"
            );
            let mesh = Mesh::new("{}", &cluster, &ports).await;
            let enforced =
                |what: &str| mesh.stat(&format!("outlier_detection.ejections_enforced_{what}"));
            while enforced("total") == 0 {
                mesh.get().await;
                mesh.server.settled().await;
            }
            let (local, bad) = (
                enforced("consecutive_local_origin_failure"),
                enforced("consecutive_5xx"),
            );
            assert_eq!((local, bad), if split { (1, 0) } else { (0, 1) });
            let failed = mesh.stat("upstream_cx_connect_fail");
            assert!(failed >= if split { 2 } else { 4 }, "{failed}");
            mesh.server.settled().await;
            for _ in 0..6 {
                assert_eq!(mesh.get().await.0, 200);
            }
        }
    });
}

#[test]
fn gateway_failures_in_a_row_put_a_host_aside_and_other_errors_do_not() {
    block_on(async {
        let cluster = "outlier_detection: {consecutive_gateway_failure: 3, enforcing_consecutive_gateway_failure: 100, \
            consecutive_5xx: 1000, enforcing_success_rate: 0, base_ejection_time: 100s, max_ejection_percent: 100}\n\
            common_lb_config: {healthy_panic_threshold: {value: 0}}";
        let origin = Origin::default();
        let mesh = Mesh::new("{}", cluster, &[origin.start().await]).await;
        let ask = async |status: &str| {
            let answer = format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n");
            origin.other.replace(answer);
            let found = mesh.get().await.0;
            mesh.server.settled().await;
            found.to_string()
        };
        // An error of another kind ends the row.
        for status in ["502", "503", "500", "504", "502", "500", "500", "500"] {
            assert_eq!(ask(status).await, status);
        }
        let ejections = "outlier_detection.ejections_enforced_consecutive_gateway_failure";
        assert_eq!(mesh.stat(ejections), 0);
        for status in ["502", "503", "504"] {
            assert_eq!(ask(status).await, status);
        }
        mesh.stat_is(ejections, |n| n == 1).await;
        assert_eq!(mesh.get().await, (503, "no healthy upstream".to_owned()));
    });
}

#[test]
fn a_host_whose_answer_says_so_is_used_last_for_a_while() {
    block_on(async {
        let cluster = "outlier_detection: {detect_degraded_hosts: true, base_ejection_time: 0.3s, interval: 0.010s}\n\
            health_checks: [{timeout: 2s, interval: 0.010s, no_traffic_interval: 0.010s, unhealthy_threshold: 1, \
            healthy_threshold: 1, tcp_health_check: {}}]";
        let answer = |status: u32, more: &str, body: &str| {
            format!("HTTP/1.1 {status} OK\r\n{more}content-length: 3\r\n\r\n{body}")
        };
        let says = "x-envoy-degraded: true\r\n";
        let (one, two) = (Origin::default(), Origin::default());
        two.other.replace(answer(200, "", "two"));
        // An answer that is no good one says nothing of the kind.
        one.other.replace(answer(404, says, "one"));
        // Three of four are enough for all requests.
        let others = [two.start().await, two.start().await, two.start().await];
        let ports = [one.start().await, others[0], others[1], others[2]];
        let mesh = Mesh::new("{}", cluster, &ports).await;
        let found = async || {
            let (_, body) = mesh.get().await;
            mesh.server.settled().await;
            body
        };
        while found().await != "one" {}
        assert_eq!(mesh.degraded(), 0);
        one.other.replace(answer(200, says, "one"));
        while mesh.degraded() == 0 {
            found().await;
        }
        let begun = std::time::Instant::now();
        one.other.replace(answer(200, "", "one"));
        while mesh.degraded() == 1 {
            let body = found().await;
            let still = begun.elapsed() < Duration::from_millis(250);
            assert!(body == "two" || !still, "it is used last");
        }
        // Its checks have passed all the while, and have not ended it.
        assert!(begun.elapsed() >= Duration::from_millis(200));
        while found().await != "one" {}
        // Where there is no other it serves.
        let alone = Mesh::new("{}", cluster, &ports[..1]).await;
        one.other.replace(answer(200, says, "one"));
        for _ in 0..3 {
            assert_eq!(alone.get().await.0, 200);
        }
        until(|| alone.degraded() == 1).await;
        alone.server.settled().await;
        assert_eq!(alone.get().await.0, 200);
    });
}

#[test]
fn hosts_that_refuse_connections_are_unhealthy() {
    block_on(async {
        let gone = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = gone.local_addr().expect("it is bound").port();
        drop(gone);
        let cluster =
            format!("health_checks: [{{{FAST}, unhealthy_threshold: 1, tcp_health_check: {{}}}}]");
        let mesh = Mesh::new("{}", &cluster, &[port]).await;
        assert_eq!(mesh.stat("health_check.healthy"), 0);
        assert!(mesh.stat("health_check.network_failure") >= 1);
    });
}

#[test]
fn a_host_with_errors_in_a_row_goes_and_comes_back() {
    block_on(async {
        let (bad, good) = (Origin::default(), Origin::default());
        bad.other.replace(UNAVAILABLE.to_owned());
        good.other.replace(OK.to_owned());
        let ports = [bad.start().await, good.start().await];
        let log = tempfile::tempdir().expect("a folder");
        let path = log.path().join("ejections");
        let bootstrap = format!(
            "cluster_manager: {{outlier_detection: {{event_log_path: {}}}}}",
            path.display()
        );
        let cluster = "outlier_detection: {consecutive_5xx: 2, max_ejection_percent: 50, interval: 0.010s, \
            base_ejection_time: 0.100s}\ncommon_lb_config: {healthy_panic_threshold: {value: 0}}";
        let mesh = Mesh::new(&bootstrap, cluster, &ports).await;
        while mesh.stat("outlier_detection.ejections_enforced_consecutive_5xx") == 0 {
            mesh.get().await;
        }
        mesh.server.settled().await;
        bad.other.replace(OK.to_owned());
        until(|| lines(&path).len() == 2).await;
        let events = lines(&path);
        let told = |event: &serde_json::Value, name: &str| event[name].clone();
        assert_eq!(told(&events[0], "type"), "CONSECUTIVE_5XX");
        assert_eq!(
            (told(&events[0], "action"), told(&events[1], "action")),
            ("EJECT".into(), "UNEJECT".into())
        );
        assert_eq!(events[0]["enforced"], true);
        assert_eq!(events[0]["upstream_url"], format!("127.0.0.1:{}", ports[0]));
        assert_eq!(events[0]["num_ejections"], 1);
        mesh.stat_is("outlier_detection.ejections_active", |n| n == 0)
            .await;
        for (name, want) in [
            ("ejections_enforced_total", 1),
            ("ejections_detected_consecutive_5xx", 1),
            ("ejections_total", 1),
            ("ejections_overflow", 0),
        ] {
            assert_eq!(
                mesh.stat(&format!("outlier_detection.{name}")),
                want,
                "{name}"
            );
        }
    });
}
