//! The same at a gateway that stands behind other proxies: the client is who the trusted ones of them say it is.

use serde_json::{Value, json};
use tokio::task::LocalSet;

use super::{Clients, TYPES, ask, conditions::range, open, read, rules, talk};
use crate::{
    decisions::conditions::Condition,
    envoy::{self, Envoy},
    support::{cluster, http_to, listener_of, origin, proxy},
};

/// How many proxies are trusted, what they have forwarded, and whether the client is of 203.0.113.0/24 then.
const ASKS: &[(usize, &[&str], bool)] = &[
    (0, &[], false),
    (0, &["203.0.113.9"], false),
    (1, &[], false),
    (1, &["203.0.113.9"], true),
    // What stands further left is the client's own word.
    (1, &["203.0.113.9, 198.51.100.1"], false),
    (1, &["198.51.100.1, 203.0.113.9"], true),
    // Two fields are one list.
    (1, &["203.0.113.9", "198.51.100.1"], false),
    (1, &["198.51.100.1", "203.0.113.9"], true),
    (1, &["203.0.113.9, nobody"], false),
    (2, &["203.0.113.9, 198.51.100.1"], true),
    (2, &["203.0.113.9, 198.51.100.1, 198.51.100.2"], false),
    (2, &["198.51.100.2, 203.0.113.9, 198.51.100.1"], true),
    // One who is to be there is not: nobody is believed.
    (2, &["203.0.113.9"], false),
];

fn listener(port: u16, hops: usize, principal: &Value) -> String {
    let condition = Condition {
        permission: None,
        principal: Some(principal.clone()),
        asks: Vec::new(),
    };
    let rbac = json!({ "name": "rbac", "typed_config": {
        "@type": format!("{TYPES}.filters.http.rbac.v3.RBAC"), "rules": rules(&condition, "ALLOW", false) } });
    let trust = format!("use_remote_address: true, xff_num_trusted_hops: {hops},");
    let filters = http_to("app", &trust);
    let filters = filters.replace("http_filters: [", &format!("http_filters: [{rbac}, "));
    format!(
        "{{name: l{port}, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}, \
         filter_chains: [{{{filters}}}]}}"
    )
}

#[test]
fn a_gateway_believes_the_proxies_before_it_that_it_trusts() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let (clients, app) = (Clients::new(), origin().await);
        // The client's address, and the one of the connection, which no header changes.
        let named = json!({ "remote_ip": range("203.0.113.0", 24) });
        let near = json!({ "direct_remote_ip": range("127.0.0.1", 32) });
        let places = || {
            let places = (0..3).flat_map(|hops| [(hops, &named), (hops, &near)]);
            places.map(|(hops, principal)| (envoy::free_port(), hops, principal))
        };
        let wrong = async |places: &[(u16, usize, &Value)]| {
            let mut wrong = Vec::new();
            for (port, hops, principal) in places {
                for (trusted, forwarded, is_of_it) in ASKS.iter().filter(|(n, ..)| n == hops) {
                    let wanted = *is_of_it || *principal == &near;
                    let lines = forwarded.iter().map(|v| format!("x-forwarded-for: {v}\r\n"));
                    let lines: String = lines.collect();
                    let head = format!("GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{lines}\r\n");
                    let mut stream = open(&clients, *port, &ask("/"), "").await;
                    let (status, _) = read(&talk(&mut stream, &head).await);
                    if status != if wanted { 200 } else { 403 } {
                        wrong.push(format!("{status}: {trusted} {forwarded:?} {principal}"));
                    }
                }
            }
            wrong
        };
        let all = |places: &[(u16, usize, &Value)]| -> Vec<String> {
            let each = places.iter();
            each.map(|(port, hops, principal)| listener(*port, *hops, principal))
                .collect()
        };
        let ours: Vec<_> = places().collect();
        let mut changes = vec![cluster("app", app, "")];
        changes.extend(all(&ours).iter().map(|yaml| listener_of(yaml)));
        let running = proxy(changes).await;
        let refused = wrong(&ours).await;
        assert!(refused.is_empty(), "{}", refused.join("\n"));
        drop(running);

        let Some(binary) = envoy::binary() else {
            return;
        };
        let theirs: Vec<_> = places().collect();
        let listeners: String = all(&theirs).iter().map(|l| format!("  - {l}\n")).collect();
        let config = format!(
            "static_resources:\n  listeners:\n{listeners}  clusters:\n  - {{name: app, connect_timeout: 5s, load_assignment: \
             {{cluster_name: app, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, \
             port_value: {app}}}}}}}}}]}}]}}}}\n"
        );
        let _envoy = Envoy::start(&binary, &config, theirs[0].0).await;
        let refused = wrong(&theirs).await;
        assert!(refused.is_empty(), "Envoy: {}", refused.join("\n"));
        println!("equal to Envoy's");
    });
}
