//! What users rely on, each as they would try it.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    load,
    mesh::{Mesh, eventually},
};

type Case = (&'static str, fn(&Mesh));

/// Every case, in an order in which the later ones may disturb more.
pub(crate) const CASES: &[Case] = &[
    ("every_pod_has_its_place", every_pod_has_its_place),
    ("the_app_sees_its_sidecar", the_app_sees_its_sidecar),
    (
        "behind_tproxy_the_app_sees_the_client",
        behind_tproxy_the_app_sees_the_client,
    ),
    ("capture_is_counted", capture_is_counted),
    (
        "names_are_answered_in_the_pod",
        crate::capture::names_are_answered_in_the_pod,
    ),
    (
        "a_lost_capture_is_told",
        crate::capture::a_lost_capture_is_told,
    ),
    (
        "programs_capture_as_rules_do",
        crate::capture::programs_capture_as_rules_do,
    ),
    (
        "each_end_knows_the_other",
        crate::mtls::each_end_knows_the_other,
    ),
    (
        "strict_refuses_who_is_outside",
        crate::mtls::strict_refuses_who_is_outside,
    ),
    (
        "forged_callers_are_refused",
        crate::mtls::forged_callers_are_refused,
    ),
    (
        "nothing_is_plain_on_the_bridge",
        crate::mtls::nothing_is_plain_on_the_bridge,
    ),
    (
        "the_certificate_is_the_pods_own",
        crate::mtls::the_certificate_is_the_pods_own,
    ),
    (
        "refusals_explain_themselves",
        crate::policy::refusals_explain_themselves,
    ),
    ("tokens_are_asked_for", crate::policy::tokens_are_asked_for),
    (
        "custom_policies_ask_their_provider",
        crate::policy::custom_policies_ask_their_provider,
    ),
    (
        "aliases_of_the_trust_domain_change_while_it_runs",
        crate::policy::aliases_of_the_trust_domain_change_while_it_runs,
    ),
    ("one_request_id_in_both_logs", one_request_id_in_both_logs),
    ("a_pod_calls_its_own_service", a_pod_calls_its_own_service),
    ("route_by_header", route_by_header),
    ("route_by_source_label", route_by_source_label),
    ("weights", weights),
    ("subset", subset),
    ("retry", retry),
    ("timeout", timeout),
    ("fault_delay", fault_delay),
    ("fault_abort", fault_abort),
    ("rewrite", rewrite),
    ("redirect", redirect),
    ("allow_any_and_registry_only", allow_any_and_registry_only),
    ("a_host_that_is_a_pod_address", a_host_that_is_a_pod_address),
    ("service_entry", service_entry),
    ("tcp_service", tcp_service),
    ("headless_service", headless_service),
    ("grpc_unary_and_streaming", grpc_unary_and_streaming),
    (
        "http_routes_of_a_gateway",
        crate::gateway_api::http_routes_of_a_gateway,
    ),
    (
        "grpc_and_tcp_routes_of_a_gateway",
        crate::gateway_api::grpc_and_tcp_routes_of_a_gateway,
    ),
    (
        "routes_of_a_service",
        crate::gateway_api::routes_of_a_service,
    ),
    (
        "pods_without_a_sidecar_take_part",
        pods_without_a_sidecar_take_part,
    ),
    (
        "an_unready_endpoint_gets_nothing",
        an_unready_endpoint_gets_nothing,
    ),
    ("edits_lose_no_request", edits_lose_no_request),
    (
        "edits_under_load_lose_no_request",
        load::edits_under_load_lose_no_request,
    ),
    (
        "a_bad_file_keeps_the_last_good_state",
        a_bad_file_keeps_the_last_good_state,
    ),
    ("a_crashed_app_comes_back", a_crashed_app_comes_back),
    (
        "traffic_outlives_the_control_plane",
        traffic_outlives_the_control_plane,
    ),
    (
        "a_killed_control_plane_loses_no_request",
        load::a_killed_control_plane_loses_no_request,
    ),
];

const CLIENT: &str = "shop/client";

fn ok(answer: &Value) -> &Value {
    assert_eq!(answer["status"], 200, "{answer}");
    &answer["body"]
}

/// How many of the calls of a summary a pod answered.
fn share(summary: &Value, pod: &str) -> u64 {
    summary["pods"][pod].as_u64().unwrap_or(0)
}

fn every_pod_has_its_place(mesh: &Mesh) {
    let status = mesh.status();
    let processes = status["processes"].as_array().expect("processes");
    let of = |pod: &str, container: &str| -> Vec<&Value> {
        let fits =
            |p: &&Value| p["namespace"] == "shop" && p["pod"] == pod && p["container"] == container;
        processes.iter().filter(fits).collect()
    };
    let (proxies, apps) = (of("client", "istio-proxy"), of("client", "app"));
    assert_eq!(proxies.len(), 2, "agent and proxy: {proxies:?}");
    assert!(proxies.iter().all(|p| p["uid"] == 1337), "{proxies:?}");
    assert!(
        !apps.is_empty() && apps.iter().all(|p| p["uid"] != 1337 && p["uid"] != 0),
        "{apps:?}"
    );
    assert_eq!(proxies[0]["networkNamespace"], apps[0]["networkNamespace"]);
    assert_ne!(
        apps[0]["networkNamespace"],
        of("web-v1", "app")[0]["networkNamespace"]
    );
    // Nothing of it is in the machine's own namespace.
    let links = Command::new("ip")
        .args(["-o", "link"])
        .output()
        .expect("ip");
    let links = String::from_utf8_lossy(&links.stdout).into_owned();
    assert!(!links.contains("pods0"), "{links}");
}

fn the_app_sees_its_sidecar(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://web.shop/x"]);
    assert_eq!(ok(&answer)["peer"], "127.0.0.6", "{answer}");
    assert_eq!(answer["headers"]["server"], "envoy", "{answer}");
}

fn behind_tproxy_the_app_sees_the_client(mesh: &Mesh) {
    let pod = mesh.address("shop", "steered");
    let urls = [
        "http://steered.shop/x".to_owned(),
        format!("http://{pod}:8080/x"),
    ];
    // With a sidecar, which calls on from its own pod's address, and without one.
    for (namespace, name) in [("shop", "client"), ("outside", "outside")] {
        let client = mesh.address(namespace, name);
        for url in &urls {
            let answer = mesh.call(&format!("{namespace}/{name}"), &[url]);
            assert_eq!(ok(&answer)["peer"], *client, "{url}: {answer}");
        }
    }
    let answer = mesh.call("shop/steered", &["http://steered.shop/x"]);
    assert_eq!(answer["headers"]["server"], "envoy", "{answer}");
    ok(&answer);
    // And it calls others as any pod does.
    let answer = mesh.call("shop/steered", &["http://web.shop/x"]);
    assert_eq!(ok(&answer)["peer"], "127.0.0.6", "{answer}");
}

fn capture_is_counted(mesh: &Mesh) {
    ok(&mesh.call(CLIENT, &["http://web.shop/x"]));
    let status = mesh.status();
    let processes = status["processes"].as_array().expect("processes");
    let packets = |pod: &str, chain: &str| -> u64 {
        let process = processes
            .iter()
            .find(|p| p["pod"] == pod && p["namespace"] == "shop")
            .expect("a process");
        let pid = process["pid"].to_string();
        let rules = Command::new("nsenter")
            .args([
                "-n", "--target", &pid, "iptables", "-t", "nat", "-L", chain, "-v", "-x", "-n",
            ])
            .output()
            .expect("nsenter");
        let text = String::from_utf8_lossy(&rules.stdout).into_owned();
        let rule = text
            .lines()
            .find(|l| l.contains("REDIRECT") && !l.starts_with("Chain"))
            .unwrap_or_else(|| panic!("no {chain} in {pod}: {text}"));
        rule.split_whitespace()
            .next()
            .and_then(|n| n.parse().ok())
            .expect("a counter")
    };
    assert!(
        packets("client", "ISTIO_REDIRECT") > 0,
        "nothing was sent to 15001"
    );
    assert!(
        packets("web-v1", "ISTIO_IN_REDIRECT") + packets("web-v2", "ISTIO_IN_REDIRECT") > 0,
        "nothing came to 15006"
    );
}

fn one_request_id_in_both_logs(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://subset.shop/logged"]);
    let id = ok(&answer)["headers"]["x-request-id"]
        .as_str()
        .expect("a request id")
        .to_owned();
    eventually(
        "both access logs hold the request id",
        Duration::from_secs(15),
        || {
            let sent = mesh.log("shop", "client", "istio-proxy");
            let got = mesh.log("shop", "web-v2", "istio-proxy");
            let sent = sent
                .lines()
                .any(|l| l.contains(&id) && l.contains("outbound|"));
            let got = got
                .lines()
                .any(|l| l.contains(&id) && l.contains("inbound|8080||"));
            (sent && got).then_some(())
        },
    );
}

fn a_pod_calls_its_own_service(mesh: &Mesh) {
    let answer = mesh.call("shop/self", &["http://self.shop/me"]);
    assert_eq!(ok(&answer)["pod"], "self", "{answer}");
    assert_eq!(answer["body"]["peer"], "127.0.0.6", "{answer}");
}

fn route_by_header(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://by-header.shop/", "-H", "end-user: jason"]);
    assert_eq!(ok(&answer)["pod"], "web-v2");
    let answer = mesh.call(
        CLIENT,
        &["http://by-header.shop/", "-H", "end-user: jasons"],
    );
    assert_eq!(ok(&answer)["pod"], "web-v1");
}

fn route_by_source_label(mesh: &Mesh) {
    assert_eq!(
        ok(&mesh.call(CLIENT, &["http://by-source.shop/"]))["pod"],
        "web-v1"
    );
    assert_eq!(
        ok(&mesh.call("shop/other-client", &["http://by-source.shop/"]))["pod"],
        "web-v2"
    );
}

fn weights(mesh: &Mesh) {
    let summary = mesh.call(
        CLIENT,
        &[
            "-n",
            "2000",
            "--concurrency",
            "4",
            "--summary",
            "http://weighted.shop/",
        ],
    );
    assert_eq!(summary["statuses"], json!({"200": 2000}), "{summary}");
    // 20 % of 2,000 within five standard deviations.
    let second = share(&summary, "web-v2");
    assert!((311..=489).contains(&second), "{summary}");
}

fn subset(mesh: &Mesh) {
    let summary = mesh.call(CLIENT, &["-n", "50", "--summary", "http://subset.shop/"]);
    assert_eq!(share(&summary, "web-v2"), 50, "{summary}");
}

fn retry(mesh: &Mesh) {
    // Fails twice for each key, then succeeds.
    let answer = mesh.call(CLIENT, &["http://retried.shop/flaky/2/retried"]);
    ok(&answer);
    let answer = mesh.call(CLIENT, &["http://retried.shop/flaky/4/too-often"]);
    assert_eq!(answer["status"], 503, "{answer}");
}

fn timeout(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://timed.shop/delay/4000"]);
    assert_eq!(answer["status"], 504, "{answer}");
    assert!(
        answer["milliseconds"]
            .as_u64()
            .is_some_and(|m| (450..3000).contains(&m)),
        "{answer}"
    );
    ok(&mesh.call(CLIENT, &["http://timed.shop/delay/1"]));
}

fn fault_delay(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://delayed.shop/"]);
    ok(&answer);
    assert!(
        answer["milliseconds"].as_u64().is_some_and(|m| m >= 990),
        "{answer}"
    );
}

fn fault_abort(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://aborted.shop/"]);
    assert_eq!(answer["status"], 418, "{answer}");
}

fn rewrite(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://rewritten.shop/old/page?q=1"]);
    assert_eq!(ok(&answer)["path"], "/new/page?q=1", "{answer}");
    assert_eq!(
        answer["body"]["headers"]["x-envoy-original-path"], "/old/page?q=1",
        "{answer}"
    );
}

fn redirect(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://redirected.shop/somewhere"]);
    assert_eq!(answer["status"], 302, "{answer}");
    assert_eq!(
        answer["headers"]["location"], "http://web.shop/elsewhere",
        "{answer}"
    );
}

fn allow_any_and_registry_only(mesh: &Mesh) {
    // A port that no service of the mesh has, in a pod that the mesh does not know by that address.
    let url = format!("http://{}:8080/", mesh.address("outside", "outside"));
    assert_eq!(ok(&mesh.call(CLIENT, &[&url]))["pod"], "outside");
    let answer = mesh.call("strict/client", &[&url]);
    assert!(
        answer["status"] == 502 || answer["error"].is_string(),
        "{answer}"
    );
    // What the registry knows stays reachable.
    ok(&mesh.call("strict/client", &["http://web.shop/"]));
}

fn a_host_that_is_a_pod_address(mesh: &Mesh) {
    let address = mesh.address("shop", "web-v1");
    let answer = mesh.call(CLIENT, &[&format!("http://{address}:8080/direct")]);
    assert_eq!(ok(&answer)["pod"], "web-v1", "{answer}");
}

fn service_entry(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["http://api.example.com/outside"]);
    assert_eq!(ok(&answer)["pod"], "outside", "{answer}");
    assert_eq!(
        answer["body"]["headers"]["host"], "api.example.com",
        "{answer}"
    );
}

fn tcp_service(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["tcp://web.shop:9000", "-d", "hello"]);
    let line = answer["line"].as_str().unwrap_or_default();
    assert!(
        line.starts_with("web-v") && line.ends_with(" 127.0.0.6 hello"),
        "{answer}"
    );
}

fn headless_service(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["tcp://db.shop:9000", "-d", "hello"]);
    let line = answer["line"].as_str().unwrap_or_default();
    assert!(
        line.starts_with("web-v") && line.ends_with(" 127.0.0.6 hello"),
        "{answer}"
    );
}

fn grpc_unary_and_streaming(mesh: &Mesh) {
    let answer = mesh.call(CLIENT, &["grpc://web.shop:9090", "-d", "hello"]);
    assert_eq!(
        (&answer["grpcStatus"], &answer["replies"][0]["text"]),
        (&json!("0"), &json!("hello")),
        "{answer}"
    );
    assert_eq!(answer["replies"][0]["peer"], "127.0.0.6", "{answer}");
    let answer = mesh.call(
        CLIENT,
        &["grpc://web.shop:9090", "-d", "hello", "--stream", "500"],
    );
    let numbers = answer["replies"].as_array().expect("replies");
    assert_eq!(
        (&answer["grpcStatus"], numbers.len()),
        (&json!("0"), 500),
        "{}",
        answer["grpcMessage"]
    );
    assert_eq!(numbers[499]["number"], 500);
}

fn pods_without_a_sidecar_take_part(mesh: &Mesh) {
    let answer = mesh.call("outside/outside", &["http://web.shop/plain"]);
    assert_eq!(ok(&answer)["peer"], "127.0.0.6", "{answer}");
    let answer = mesh.call(CLIENT, &["http://outside.outside/plain"]);
    assert_eq!(ok(&answer)["pod"], "outside", "{answer}");
}

fn an_unready_endpoint_gets_nothing(mesh: &Mesh) {
    let ask = || {
        mesh.call(
            CLIENT,
            &["-n", "40", "--close", "--summary", "http://half.shop/"],
        )
    };
    let summary = ask();
    assert_eq!(
        (
            share(&summary, "half-ready"),
            share(&summary, "half-unready")
        ),
        (40, 0),
        "{summary}"
    );
    mesh.output(&[
        "local",
        "exec",
        "-n",
        "shop",
        "half-unready",
        "--",
        "touch",
        "/tmp/ready",
    ]);
    eventually(
        "the pod that became ready gets requests",
        Duration::from_secs(15),
        || (share(&ask(), "half-unready") > 0).then_some(()),
    );
}

fn a_bad_file_keeps_the_last_good_state(mesh: &Mesh) {
    let path = mesh.folder.path().join("rules.yaml");
    let good = fs::read_to_string(&path).expect("the rules");
    fs::write(&path, format!("{good}---\nkind: [\n")).expect("write the rules");
    let problem = eventually("the mistake is reported", Duration::from_secs(10), || {
        let status = mesh.status();
        let problems = status["problems"].as_array()?;
        problems
            .iter()
            .filter_map(|p| p.as_str())
            .find(|p| p.contains("rules.yaml:"))
            .map(str::to_owned)
    });
    let line = good.lines().count() + 2;
    assert!(
        problem.contains(&format!("rules.yaml:{line}"))
            || problem.contains(&format!("rules.yaml:{}", line + 1)),
        "{problem}"
    );
    assert_eq!(
        ok(&mesh.call(CLIENT, &["http://subset.shop/"]))["pod"],
        "web-v2"
    );
    fs::write(&path, &good).expect("write the rules");
    eventually("the mistake is forgotten", Duration::from_secs(10), || {
        mesh.status()["problems"]
            .as_array()
            .is_some_and(Vec::is_empty)
            .then_some(())
    });
}

fn edits_lose_no_request(mesh: &Mesh) {
    let path = mesh.folder.path().join("rules.yaml");
    let good = fs::read_to_string(&path).expect("the rules");
    let other =
        good.replacen("weight: 80", "weight: 50", 1)
            .replacen("weight: 20", "weight: 50", 1);
    assert_ne!(good, other);
    let (edited, calls) = std::thread::scope(|scope| {
        let editor = scope.spawn(|| {
            for i in 0..500 {
                let next = path.with_extension("next");
                fs::write(&next, if i % 2 == 0 { &other } else { &good }).expect("write the rules");
                fs::rename(&next, &path).expect("replace the rules");
                // Now and then an endpoint comes or goes as well.
                if i % 50 == 0 {
                    let change = if i % 100 == 0 {
                        "rm -f /tmp/ready"
                    } else {
                        "touch /tmp/ready"
                    };
                    mesh.output(&[
                        "local",
                        "exec",
                        "-n",
                        "shop",
                        "half-unready",
                        "--",
                        "sh",
                        "-c",
                        change,
                    ]);
                }
                // Fast enough to overlap with pushes, slow enough that many of them happen.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut calls = 0;
        while !editor.is_finished() {
            for url in ["http://weighted.shop/", "http://half.shop/"] {
                let summary = mesh.call(
                    CLIENT,
                    &["-n", "200", "--concurrency", "4", "--summary", url],
                );
                assert_eq!(summary["statuses"], json!({"200": 200}), "{url}: {summary}");
                calls += 200;
            }
        }
        (editor.join().is_ok(), calls)
    });
    fs::write(&path, &good).expect("write the rules");
    assert!(edited && calls >= 800, "only {calls} calls were made");
    println!("  {calls} calls during 500 edits");
}

pub(crate) fn pid_of(mesh: &Mesh, namespace: &str, pod: &str, container: &str) -> u64 {
    let status = mesh.status();
    let pods = status["pods"].as_array().expect("pods");
    let pod = pods
        .iter()
        .find(|p| p["name"] == pod && p["namespace"] == namespace)
        .expect("the pod");
    let containers = pod["containers"].as_array().expect("containers");
    containers
        .iter()
        .find(|c| c["name"] == container)
        .and_then(|c| c["pid"].as_u64())
        .unwrap_or(0)
}

pub(crate) fn kill(pid: u64) {
    let done = Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .expect("kill");
    assert!(done.success(), "process {pid} could not be killed");
}

fn a_crashed_app_comes_back(mesh: &Mesh) {
    let before = pid_of(mesh, "shop", "self", "app");
    kill(before);
    eventually("the app runs again", Duration::from_secs(20), || {
        let now = pid_of(mesh, "shop", "self", "app");
        (now != 0 && now != before).then_some(())
    });
    eventually("it serves again", Duration::from_secs(20), || {
        let answer = mesh.call(CLIENT, &["http://self.shop/"]);
        (answer["status"] == 200).then_some(())
    });
}

fn traffic_outlives_the_control_plane(mesh: &Mesh) {
    let before = pid_of(mesh, "istio-system", "istiod", "discovery");
    kill(before);
    let summary = mesh.call(
        CLIENT,
        &["-n", "100", "--close", "--summary", "http://subset.shop/"],
    );
    assert_eq!(summary["statuses"], json!({"200": 100}), "{summary}");
    let ready = || {
        let status = mesh.status();
        let pods = status["pods"].as_array().expect("pods");
        pods.iter()
            .any(|p| p["name"] == "istiod" && p["ready"] == true)
    };
    eventually("the control plane is back", Duration::from_secs(20), || {
        let now = pid_of(mesh, "istio-system", "istiod", "discovery");
        (now != 0 && now != before && ready()).then_some(())
    });
    let back = Instant::now();
    // An edit reaches the proxies again.
    let path = mesh.folder.path().join("rules.yaml");
    let good = fs::read_to_string(&path).expect("the rules");
    let edited = good.replacen("httpStatus: 418", "httpStatus: 429", 1);
    assert_ne!(good, edited);
    fs::write(&path, edited).expect("write the rules");
    eventually("an edit takes effect", Duration::from_secs(10), || {
        (mesh.call(CLIENT, &["http://aborted.shop/"])["status"] == 429).then_some(())
    });
    println!(
        "  edits take effect {:.1} s after the control plane is ready again",
        back.elapsed().as_secs_f32()
    );
    fs::write(&path, good).expect("write the rules");
}
