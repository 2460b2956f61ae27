//! The same as a real istiod: every captured scenario is translated from its own input and compared, resource by
//! resource, by the rules of `compare.py` beside the data.

mod istiod {
    pub(crate) mod compare;
    pub(crate) mod scenario;
}

use istiod::{
    compare::{Ignore, Score, compare},
    scenario::{Scenario, data},
};

/// Scenarios in which every resource of every node must be equal.
const EQUAL: &[&str] = &[
    "access-log-and-mesh-options",
    "authorization",
    "base",
    "destination-rule-policies",
    "envoy-filters",
    "gateway-api",
    "gateway-http-and-https",
    "header-route-and-weights",
    "http-route-everything",
    "locality-failover",
    "peer-authentication",
    "registry-only",
    "service-entries",
    "sidecar-scope",
    "tcp-and-sni-routes",
    "telemetry",
    "tproxy-and-node-options",
];

/// Compares one section of all scenarios; `show` caps the printed differences.
fn section(name: &str) {
    let Some(root) = data() else { return };
    let ignore = Ignore::read();
    let only = std::env::var("SCENARIO").ok();
    let show = std::env::var("SHOW")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(20);
    let mut failed = Vec::new();
    for scenario in Scenario::all(&root) {
        if only.as_ref().is_some_and(|o| *o != scenario.name) {
            continue;
        }
        let mut total = Score::default();
        for (pod, expected, got) in scenario.translate(name) {
            let score = compare(name, &expected, &got, &ignore);
            for line in score.differences.iter().take(show) {
                println!("{}/{pod}: {line}", scenario.name);
            }
            total.add(score);
        }
        println!(
            "{name}: {}: {}/{} resources equal, {} known differences",
            scenario.name, total.equal, total.all, total.known
        );
        if EQUAL.contains(&scenario.name.as_str()) && total.equal != total.all {
            failed.push(scenario.name);
        }
    }
    assert!(
        failed.is_empty(),
        "{name} differ from istiod's in {failed:?}"
    );
}

#[test]
fn clusters_equal_istiods() {
    section("clusters");
}

#[test]
fn endpoints_equal_istiods() {
    section("endpoints");
}

#[test]
fn listeners_equal_istiods() {
    section("listeners");
}

#[test]
fn routes_equal_istiods() {
    section("routes");
}

/// The same input gives the same bytes, and a second mesh made from the first one shares what did not change.
#[test]
fn translation_is_deterministic() {
    let Some(root) = data() else { return };
    for scenario in Scenario::all(&root) {
        let (a, b) = (scenario.resources(), scenario.resources());
        assert_eq!(a, b, "{}", scenario.name);
    }
}
