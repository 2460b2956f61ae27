//! The same of TCP: policies on connections, before anything is read from them.

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::LocalSet,
};

use super::{
    Ask, Clients, TYPES, Who, ask,
    conditions::{Condition, header, name, range},
    open, rules,
};
use crate::{
    envoy::{self, Envoy},
    support::{INSPECTOR, cluster, echo, listener_of, proxy, tcp_to, within},
};

/// What can be said of a connection to `port`, and connections with whether it is so.
fn conditions(port: u16) -> Vec<Condition> {
    let by = |who: Who| ask("").by(who);
    let may = |permission: Value, asks: Vec<(Ask, bool)>| Condition {
        permission: Some(permission),
        principal: None,
        asks,
    };
    let who = |principal: Value, asks: Vec<(Ask, bool)>| Condition {
        permission: None,
        principal: Some(principal),
        asks,
    };
    let everybody = |met: bool| vec![(by(Who::A), met), (by(Who::Nobody), met)];
    let address = |met: bool| vec![(by(Who::A).from(2), met), (by(Who::A).from(3), !met)];
    vec![
        who(
            name(json!({ "exact": "spiffe://cluster.local/ns/a/sa/client" })),
            vec![
                (by(Who::A), true),
                (by(Who::B), false),
                (by(Who::Nobody), false),
            ],
        ),
        who(
            name(json!({ "safe_regex": { "regex": ".*/ns/b[.]c/.*" } })),
            vec![(by(Who::A), false), (by(Who::B), true)],
        ),
        // Whoever TLS lets in, with a certificate or not.
        who(
            json!({ "authenticated": {} }),
            vec![
                (by(Who::A), true),
                (by(Who::B), true),
                (by(Who::Nobody), true),
            ],
        ),
        who(
            json!({ "direct_remote_ip": range("127.0.0.2", 32) }),
            address(true),
        ),
        who(
            json!({ "remote_ip": range("127.0.0.2", 32) }),
            address(true),
        ),
        who(
            json!({ "not_id": { "source_ip": range("127.0.0.2", 32) } }),
            address(false),
        ),
        may(
            json!({ "requested_server_name": { "exact": "shop.example" } }),
            vec![
                (ask("").server_name("shop.example"), true),
                (ask("").server_name("other.example"), false),
            ],
        ),
        may(
            json!({ "requested_server_name": { "suffix": ".test" } }),
            vec![
                (ask("").server_name("a.test"), true),
                (ask("").server_name("a.example"), false),
            ],
        ),
        may(json!({ "destination_port": port }), everybody(true)),
        may(
            json!({ "destination_port": port.wrapping_add(1) }),
            everybody(false),
        ),
        may(
            json!({ "destination_port_range": { "start": port, "end": u32::from(port) + 1 } }),
            everybody(true),
        ),
        may(
            json!({ "destination_ip": range("127.0.0.0", 8) }),
            everybody(true),
        ),
        may(
            json!({ "destination_ip": range("10.0.0.0", 8) }),
            everybody(false),
        ),
        Condition {
            permission: Some(json!({ "and_rules": { "rules": [
                { "destination_port": port }, { "requested_server_name": { "exact": "shop.example" } },
            ] } })),
            principal: Some(json!({ "or_ids": { "ids": [
                name(json!({ "prefix": "spiffe://other.local/" })), { "direct_remote_ip": range("127.0.0.2", 32) },
            ] } })),
            asks: vec![
                (by(Who::B), true),
                (by(Who::A), false),
                (by(Who::A).from(2), true),
                (ask("").server_name("a.test").from(2), false),
            ],
        },
    ]
}

/// A filter chain, the protocol that it is chosen by, its rules, and what is to be asked of it.
struct Row {
    protocol: String,
    chain: String,
    rules: Value,
    asks: Vec<(Ask, bool)>,
}

fn table(port: u16, context: &str) -> Vec<Row> {
    let mut out = Vec::new();
    for condition in conditions(port) {
        let whole = condition.permission.is_some() && condition.principal.is_some();
        for (action, not) in [
            ("ALLOW", false),
            ("ALLOW", true),
            ("DENY", false),
            ("DENY", true),
        ] {
            if not && whole {
                continue;
            }
            let rules = rules(&condition, action, not);
            let rbac = json!({ "@type": format!("{TYPES}.filters.network.rbac.v3.RBAC"), "stat_prefix": "tcp",
                "rules": rules });
            let filters = tcp_to("app").replace(
                "filters: [",
                &format!("filters: [{{name: rbac, typed_config: {rbac}}}, "),
            );
            let protocol = format!("row{}", out.len());
            let chosen = format!("filter_chain_match: {{application_protocols: [{protocol}]}}");
            let asks = condition.asks.iter().map(|(ask, met)| {
                let matches = *met != not;
                (ask.clone(), matches == (action == "ALLOW"))
            });
            out.push(Row {
                chain: format!("{{name: {protocol}, {chosen}, {filters}, {context}}}"),
                protocol,
                rules,
                asks: asks.collect(),
            });
        }
    }
    out
}

/// The listener of a table.
fn listener(port: u16, table: &[Row]) -> String {
    let chains: Vec<_> = table.iter().map(|row| &*row.chain).collect();
    format!(
        "{{name: tcp, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}, {INSPECTOR}, \
         filter_chains: [{}]}}",
        chains.join(", ")
    )
}

/// Whether something said comes back.
async fn is_let_in(clients: &Clients, port: u16, ask: &Ask, protocol: &str) -> bool {
    let mut stream = open(clients, port, ask, protocol).await;
    let mut byte = [0];
    within(async {
        let _ = stream.write_all(b"x").await;
        stream.read(&mut byte).await.is_ok_and(|read| read == 1)
    })
    .await
}

#[test]
fn rules_on_headers_are_refused_as_envoy_refuses_them() {
    let rule = header(":method", json!({ "exact": "GET" }));
    let rbac = json!({ "@type": format!("{TYPES}.filters.network.rbac.v3.RBAC"), "stat_prefix": "tcp",
        "rules": { "action": "DENY", "policies": { "p": {
            "permissions": [{ "and_rules": { "rules": [{ "not_rule": rule }] } }], "principals": [{ "any": true }],
        } } } });
    let yaml = format!(
        "{{name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: 1}}}}, \
         filter_chains: [{{filters: [{{name: rbac, typed_config: {rbac}}}]}}]}}"
    );
    let refused = std::panic::catch_unwind(|| listener_of(&yaml)).expect_err("it is refused");
    let why = refused.downcast_ref::<String>().expect("a reason");
    assert!(
        why.contains("rules.policies") && why.contains("`header` is for requests"),
        "{why}"
    );
}

#[test]
fn decisions_on_connections_are_as_they_should_be_and_as_envoys() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let clients = Clients::new();
        let (app, context) = (echo().await, clients.server());
        let wrong = async |port: u16, table: &[Row]| {
            let mut wrong = Vec::new();
            for row in table {
                for (ask, wanted) in &row.asks {
                    if is_let_in(&clients, port, ask, &row.protocol).await != *wanted {
                        wrong.push(format!("not {wanted}: {ask:?} of {}", row.rules));
                    }
                }
            }
            wrong
        };
        let port = envoy::free_port();
        let ours = table(port, &context);
        let count: usize = ours.iter().map(|row| row.asks.len()).sum();
        println!("{count} decisions");
        let running = proxy(vec![
            cluster("app", app, ""),
            listener_of(&listener(port, &ours)),
        ])
        .await;
        let refused = wrong(port, &ours).await;
        assert!(refused.is_empty(), "{}", refused.join("\n"));
        drop(running);

        let Some(binary) = envoy::binary() else {
            return;
        };
        let port = envoy::free_port();
        let theirs = table(port, &context);
        let config = format!(
            "static_resources:\n  listeners:\n  - {}\n  clusters:\n  - {{name: app, connect_timeout: 5s, load_assignment: \
             {{cluster_name: app, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, \
             port_value: {app}}}}}}}}}]}}]}}}}\n",
            listener(port, &theirs)
        );
        let _envoy = Envoy::start(&binary, &config, port).await;
        let refused = wrong(port, &theirs).await;
        assert!(refused.is_empty(), "Envoy: {}", refused.join("\n"));
        println!("equal to Envoy's");
    });
}
