use super::*;
use crate::plan::{cluster::Discovery, network::NetworkFilterConfig};

fn load_text(text: &str) -> Result<Loaded, BootstrapError> {
    load(&Sources {
        yaml: Some(text.to_owned()),
        ..Sources::default()
    })
}

fn mistakes(text: &str) -> Vec<String> {
    match load_text(text).expect_err("must be rejected") {
        BootstrapError::Content { errors, .. } => {
            errors.0.iter().map(ToString::to_string).collect()
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_static_example_is_planned() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/static.yaml");
    let sources = Sources {
        path: Some(path.into()),
        ..Sources::default()
    };
    let bootstrap = load(&sources).expect("the example is right").bootstrap;
    let (listener, _) = &bootstrap.static_listeners[0];
    assert_eq!(listener.address.to_string(), "0.0.0.0:8080");
    let filter = &listener.filter_chains[0].filters[0].config;
    assert!(matches!(
        filter,
        NetworkFilterConfig::HttpConnectionManager(_)
    ));
    let names: Vec<_> = bootstrap
        .static_clusters
        .iter()
        .map(|(c, _)| &*c.name)
        .collect();
    assert_eq!(names, ["service1_cluster", "service2_cluster"]);
    let cluster = bootstrap.static_clusters[0].0.plan();
    assert!(matches!(cluster.discovery, Discovery::StrictDns { .. }));
    assert_eq!(cluster.connect_timeout.as_millis(), 250);
}

/// The form that articles print: each mistake once, with its field and with what to write instead.
#[test]
fn the_old_form_gets_one_error_per_mistake() {
    let wrong = mistakes(
        r#"
static_resources:
  listeners:
  - name: listener_0
    address:
      socket_address: { address: 0.0.0.0, port_value: 8080 }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        config:
          route_config:
            name: local_route
            virtual_hosts:
            - name: backend
              domains: ["*"]
              routes:
              - match: { prefix: "/service1" }
                route: { cluster: service1_cluster }
          http_filters:
          - name: envoy.filters.http.router
  clusters:
  - name: service1_cluster
    connect_timeout: 0.25s
    type: STRICT_DNS
    lb_policy: ROUND_ROBIN
    load_assignment:
      cluster_name: service_cluster
      endpoints:
      - lb_endpoints:
        - endpoint:
            address:
              socket_address: { address: service1.example.com, port_value: 80 }
"#,
    );
    let filter = "static_resources.listeners[0].filter_chains[0].filters[0]";
    assert_eq!(wrong.len(), 3, "{wrong:#?}");
    assert!(
        wrong[0].starts_with(&format!("{filter}.config: is the v2 form")),
        "{wrong:#?}"
    );
    assert!(wrong[0].contains("v3.HttpConnectionManager"));
    assert!(wrong[1].starts_with(&format!("{filter}.typed_config.stat_prefix: is required")));
    assert!(wrong[2].starts_with(&format!(
        "{filter}.typed_config.http_filters[0].typed_config: is required"
    )));
    assert!(
        wrong[2].contains("type.googleapis.com/envoy.extensions.filters.http.router.v3.Router")
    );
}

#[test]
fn all_mistakes_of_a_text_are_told_at_once() {
    let wrong = mistakes(
        "{ nodes: {}, admin: { address: { socketAddress: { address: 127.0.0.1, portValue: many } } }, \
         static_resources: { clusters: [{ name: a, conect_timeout: 1s }, { name: a }, \
         { name: b, hosts: [{ socket_address: { address: 10.0.0.1, port_value: 1 } }], lb_policy: RANDOM }] } }",
    );
    let paths: Vec<_> = wrong
        .iter()
        .map(|w| w.split(": ").next().unwrap_or_default())
        .collect();
    for path in [
        "nodes",
        "admin.address.socketAddress.portValue",
        "static_resources.clusters[0].conect_timeout",
        "static_resources.clusters[1].name",
        "static_resources.clusters[2].hosts",
    ] {
        assert!(paths.contains(&path), "{path} is not in {wrong:#?}");
    }
    assert_eq!(paths.len(), 5, "{wrong:#?}");
}

/// As Envoy takes them: enums in any case, one value for a list of one, listeners without a name.
#[test]
fn what_envoy_takes_besides_the_canonical_form_is_taken() {
    let listener = |port: u16| {
        format!(
            "{{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}, filter_chains: {{ filters: \
             {{ name: a, typed_config: {{ \"@type\": \
             type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: s, cluster: a }} }} }} }}"
        )
    };
    let sources = Sources {
        yaml: Some(format!(
            "{{ static_resources: {{ listeners: [{}, {}], clusters: {{ name: a, type: strict_dns, lb_policy: random, \
             wait_for_warm_on_init: \"true\" }} }} }}",
            listener(1),
            listener(2),
        )),
        ..Sources::default()
    };
    let bootstrap = load(&sources).expect("Envoy takes it").bootstrap;
    let names: Vec<_> = bootstrap
        .static_listeners
        .iter()
        .map(|(l, _)| uuid::Uuid::parse_str(&l.name).expect("a random name"))
        .collect();
    assert_ne!(names[0], names[1]);
    let cluster = bootstrap.static_clusters[0].0.plan();
    assert!(matches!(cluster.discovery, Discovery::StrictDns { .. }));
}

#[test]
fn an_extension_of_unknown_type_is_one_mistake() {
    let wrong = mistakes(
        "{ static_resources: { listeners: [{ address: { socket_address: { address: 127.0.0.1, port_value: 1 } }, \
         filter_chains: [{ filters: [{ name: a, typed_config: { \"@type\": type.googleapis.com/a.B } }] }] }] } }",
    );
    assert_eq!(wrong.len(), 1, "{wrong:#?}");
    assert!(
        wrong[0].ends_with("typed_config.@type: unknown type \"type.googleapis.com/a.B\""),
        "{wrong:#?}"
    );
}

#[test]
fn unknown_fields_can_be_let_through() {
    let sources = Sources {
        yaml: Some("{ nodes: {}, node: { id: a } }".to_owned()),
        allow_unknown_fields: true,
        service_node: "other".to_owned(),
        service_cluster: "mine".to_owned(),
        ..Sources::default()
    };
    let loaded = load(&sources).expect("only a warning");
    assert_eq!(
        (&*loaded.bootstrap.node.id, &*loaded.bootstrap.node.cluster),
        ("a", "mine")
    );
    assert!(
        loaded.warnings[0].starts_with("--config-yaml: nodes: unknown field"),
        "{:?}",
        loaded.warnings
    );
}

#[test]
fn the_text_is_merged_over_the_file() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(
        file.path(),
        "node: { id: a, cluster: c }\nstatic_resources: { clusters: [{ name: first }] }",
    )
    .expect("written");
    let sources = Sources {
        path: Some(file.path().to_owned()),
        yaml: Some(
            "node: { id: b }\nstatic_resources: { clusters: [{ name: second }] }".to_owned(),
        ),
        ..Sources::default()
    };
    let bootstrap = load(&sources).expect("legal").bootstrap;
    assert_eq!((&*bootstrap.node.id, &*bootstrap.node.cluster), ("b", "c"));
    assert_eq!(bootstrap.static_clusters.len(), 2);
}

#[test]
fn what_is_no_yaml_is_told_with_its_line() {
    let error = load_text("a:\n  - b\n c: d")
        .expect_err("not YAML")
        .to_string();
    assert!(
        error.starts_with("--config-yaml: ") && error.contains("line 3"),
        "{error}"
    );
    assert!(matches!(
        load(&Sources::default()),
        Err(BootstrapError::Missing)
    ));
}
