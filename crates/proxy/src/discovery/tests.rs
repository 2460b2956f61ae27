use std::time::{Duration, Instant};

use prost::{Message, Name};
use proto::{
    Any,
    envoy::{
        config::{
            bootstrap::v3::Bootstrap as BootstrapMessage,
            cluster::v3::Cluster,
            endpoint::v3::{ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints},
            listener::v3::Listener,
            route::v3::RouteConfiguration,
        },
        extensions::transport_sockets::tls::v3::Secret,
    },
};
use xds::{
    client::{Received, ReceivedResource},
    type_url::{CDS, EDS, LDS, RDS, SDS},
};

use super::*;
use crate::{
    plan::Bootstrap,
    server::{Change, ChangeError},
};

/// A truth and what it told the server, one line a change.
struct Fixture {
    truth: Truth,
    log: Vec<String>,
    now: Instant,
    /// Listeners whose sockets cannot be opened.
    taken: Vec<&'static str>,
}

fn bootstrap(yaml: &str) -> Bootstrap {
    let message: BootstrapMessage = proto::json::from_yaml(yaml).expect("legal YAML");
    Bootstrap::try_from(&message).expect("a bootstrap")
}

const ADS: &str = r#"
dynamic_resources:
  ads_config: { api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: xds } }] }
  cds_config: { ads: {}, initial_fetch_timeout: 0s, resource_api_version: V3 }
  lds_config: { ads: {}, initial_fetch_timeout: 0s, resource_api_version: V3 }
static_resources:
  clusters:
  - { name: xds, load_assignment: { cluster_name: xds, endpoints: [{ lb_endpoints: [{ endpoint: { address: { pipe: { path: ./XDS } } } }] }] } }
"#;

impl Fixture {
    fn new(yaml: &str) -> Self {
        let now = Instant::now();
        let mut fixture = Self {
            truth: Truth::new(&bootstrap(yaml), now),
            log: Vec::new(),
            now,
            taken: Vec::new(),
        };
        fixture.with(|truth, now, apply| {
            truth.begin_clusters(now, apply);
            truth.begin_listeners(now, apply);
        });
        fixture
    }

    fn with<R>(&mut self, run: impl FnOnce(&mut Truth, Instant, &mut Apply<'_>) -> R) -> R {
        let (log, taken) = (&mut self.log, &self.taken);
        let mut apply = |changes: Vec<Change>| {
            let one = |change: Change| {
                let (word, name) = match &change {
                    Change::UpsertCluster(c) => ("cluster", c.name.clone()),
                    Change::RemoveCluster(n) => ("-cluster", n.clone()),
                    Change::Endpoints(e) => ("endpoints", e.cluster_name.clone()),
                    Change::RemoveEndpoints(n) => ("-endpoints", n.clone()),
                    Change::UpsertListener(l) => ("listener", l.name.clone()),
                    Change::RemoveListener(n) => ("-listener", n.clone()),
                    Change::UpsertRoutes(r) => ("routes", r.name.clone()),
                    Change::RemoveRoutes(n) => ("-routes", n.clone()),
                    Change::Secret(n, _) => ("secret", n.name.clone()),
                    Change::RemoveSecret(n) => ("-secret", n.name.clone()),
                };
                log.push(format!("{word} {name}"));
                if taken.contains(&&*name) {
                    return Err(ChangeError::Bind {
                        listener: name,
                        address: "0.0.0.0:80".to_owned(),
                        reason: "address in use".to_owned(),
                    });
                }
                Ok(())
            };
            changes.into_iter().map(one).collect()
        };
        run(&mut self.truth, self.now, &mut apply)
    }

    /// Receives a response; gives what was told to the server and the errors of the answer.
    fn receive(&mut self, received: Received) -> (Vec<String>, Vec<String>) {
        let errors = self.with(|truth, now, apply| truth.receive(&received, now, apply));
        let errors = errors
            .into_iter()
            .map(|(name, why)| format!("{name}: {why}"))
            .collect();
        (std::mem::take(&mut self.log), errors)
    }

    fn told(&mut self, received: Received) -> Vec<String> {
        let (log, errors) = self.receive(received);
        assert!(errors.is_empty(), "{errors:?}");
        log
    }
}

fn response(type_url: &str, resources: Vec<ReceivedResource>, removed: &[&str]) -> Received {
    Received {
        type_url: type_url.to_owned(),
        version: "1".to_owned(),
        nonce: "n".to_owned(),
        resources,
        removed: removed.iter().map(|n| (*n).to_owned()).collect(),
        refused: Vec::new(),
        malformed: None,
    }
}

fn resource<M: Message + Name + Default>(name: &str, yaml: &str) -> ReceivedResource {
    let message: M = proto::json::from_yaml(yaml).expect("legal YAML");
    let resource = Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    };
    ReceivedResource {
        name: name.to_owned(),
        version: "1".to_owned(),
        resource,
    }
}

fn eds_cluster(name: &str, timeout: &str) -> ReceivedResource {
    resource::<Cluster>(
        name,
        &format!(
            "{{ name: {name}, type: EDS, connect_timeout: {timeout}, eds_cluster_config: {{ eds_config: {{ ads: {{}}, initial_fetch_timeout: 0s }} }} }}"
        ),
    )
}

fn endpoints(name: &str, port: u16) -> ReceivedResource {
    resource::<ClusterLoadAssignment>(
        name,
        &format!(
            "{{ cluster_name: {name}, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 10.0.0.1, port_value: {port} }} }} }} }}] }}] }}"
        ),
    )
}

fn rds_listener(name: &str, routes: &str, stat_prefix: &str, timeout: &str) -> ReceivedResource {
    resource::<Listener>(
        name,
        &format!(
            r#"
name: {name}
address: {{ socket_address: {{ address: 0.0.0.0, port_value: 80 }} }}
filter_chains:
- filters:
  - name: h
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: {stat_prefix}
      rds: {{ route_config_name: "{routes}", config_source: {{ ads: {{}}, initial_fetch_timeout: {timeout} }} }}
      http_filters: [{{ name: r, typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }} }}]
"#
        ),
    )
}

fn route_config(name: &str, cluster: &str, more: &str) -> ReceivedResource {
    resource::<RouteConfiguration>(
        name,
        &format!(
            "{{ name: \"{name}\", virtual_hosts: [{{ name: v, domains: ['*'], routes: [{{ match: {{ prefix: / }}, route: {{ cluster: {cluster} }} }}] }}]{more} }}"
        ),
    )
}

#[test]
fn a_cluster_is_seen_when_its_endpoints_were_answered() {
    let mut f = Fixture::new(ADS);
    assert_eq!(std::mem::take(&mut f.log), ["cluster xds"]);
    assert_eq!(
        f.told(response(CDS, vec![eds_cluster("a", "1s")], &[])),
        Vec::<String>::new()
    );
    assert_eq!(f.truth.eds_names().into_iter().collect::<Vec<_>>(), ["a"]);
    assert_eq!(
        (f.truth.clusters.warming(), f.truth.phase()),
        (1, Phase::Clusters)
    );
    assert_eq!(
        f.told(response(EDS, vec![endpoints("a", 80)], &[])),
        ["endpoints a", "cluster a"]
    );
    assert_eq!(f.truth.phase(), Phase::Listeners);
    // Endpoints that are held count for the next version of the cluster, and equal ones are no change.
    assert_eq!(
        f.told(response(CDS, vec![eds_cluster("a", "2s")], &[])),
        ["cluster a"]
    );
    assert_eq!(
        f.told(response(CDS, vec![eds_cluster("a", "2s")], &[])),
        Vec::<String>::new()
    );
    assert_eq!(
        f.told(response(EDS, vec![endpoints("a", 80)], &[])),
        Vec::<String>::new()
    );
    assert_eq!(
        f.told(response(EDS, vec![endpoints("a", 81)], &[])),
        ["endpoints a"]
    );
    // Gone, and nothing is asked for it any more.
    assert_eq!(
        f.told(response(CDS, vec![], &["a"])),
        ["-cluster a", "-endpoints a"]
    );
    assert!(f.truth.eds_names().is_empty() && f.truth.endpoints.entries.is_empty());
}

#[test]
fn an_answer_without_endpoints_ends_the_wait() {
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![eds_cluster("a", "1s")], &[]));
    assert_eq!(f.told(response(EDS, vec![], &["a"])), ["cluster a"]);
}

#[test]
fn a_listener_is_seen_when_its_routes_are_there_and_the_former_serves_until_then() {
    let mut f = Fixture::new(ADS);
    f.log.clear();
    f.told(response(CDS, vec![], &[]));
    assert_eq!(
        f.told(response(LDS, vec![rds_listener("l", "80", "s", "0s")], &[])),
        Vec::<String>::new()
    );
    assert_eq!(f.truth.rds_names().into_iter().collect::<Vec<_>>(), ["80"]);
    assert_eq!(
        f.told(response(RDS, vec![route_config("80", "c", "")], &[])),
        ["routes 80", "listener l"]
    );
    assert_eq!(f.truth.phase(), Phase::Live);
    // Another name: both are asked for while the new version warms.
    assert_eq!(
        f.told(response(LDS, vec![rds_listener("l", "81", "s", "0s")], &[])),
        Vec::<String>::new()
    );
    assert_eq!(f.truth.rds_names().len(), 2);
    assert!(f.truth.drop_unused_routes().is_empty());
    assert_eq!(
        f.told(response(RDS, vec![route_config("81", "c", "")], &[])),
        ["routes 81", "listener l"]
    );
    assert!(
        matches!(&f.truth.drop_unused_routes()[..], [Change::RemoveRoutes(name)] if &**name == "80")
    );
}

#[test]
fn a_refused_answer_ends_the_wait() {
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![eds_cluster("a", "1s")], &[]));
    let bad = resource::<ClusterLoadAssignment>(
        "a",
        "{ cluster_name: a, endpoints: [{ priority: 200 }] }",
    );
    let (told, errors) = f.receive(response(EDS, vec![bad], &[]));
    assert_eq!((told, errors.len()), (vec!["cluster a".to_owned()], 1));
    f.told(response(LDS, vec![rds_listener("l", "80", "s", "0s")], &[]));
    let bad = route_config("80", "none", ", validate_clusters: true");
    let (told, errors) = f.receive(response(RDS, vec![bad], &[]));
    assert_eq!((told, errors.len()), (vec!["listener l".to_owned()], 1));
    assert_eq!(f.truth.phase(), Phase::Live);
    // What comes later is in force at once.
    assert_eq!(
        f.told(response(RDS, vec![route_config("80", "a", "")], &[])),
        ["routes 80"]
    );
}

#[test]
fn a_wait_with_a_limit_ends_by_itself() {
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![], &[]));
    f.told(response(LDS, vec![rds_listener("l", "80", "s", "3s")], &[]));
    f.log.clear();
    let deadline = f.truth.next_deadline().expect("a limit");
    assert_eq!(deadline, f.now + Duration::from_secs(3));
    f.with(|truth, now, apply| truth.tick(now + Duration::from_secs(2), apply));
    assert!(f.log.is_empty());
    f.with(|truth, _, apply| truth.tick(deadline, apply));
    assert_eq!(f.log, ["listener l"]);
    assert_eq!(f.truth.next_deadline(), None);
}

#[test]
fn what_is_wrong_is_refused_by_itself_and_keeps_its_former_version() {
    let mut f = Fixture::new(ADS);
    f.log.clear();
    let good = || resource::<Cluster>("a", "{ name: a }");
    let bad = || resource::<Cluster>("b", "{ name: b, preconnect_policy: {} }");
    let (log, errors) = f.receive(response(CDS, vec![bad(), good()], &[]));
    assert_eq!(log, ["cluster a"]);
    assert_eq!(
        errors,
        ["b: preconnect_policy: is not implemented; remove it"]
    );
    let error = f.truth.clusters.entries["b"]
        .error
        .as_ref()
        .expect("kept for the dump");
    assert_eq!(
        error.details,
        "preconnect_policy: is not implemented; remove it"
    );
    assert_eq!(f.truth.clusters.version, "");
    // Mended; then wrong again: the good version stays in force.
    assert_eq!(
        f.told(response(
            CDS,
            vec![resource::<Cluster>("b", "{ name: b }")],
            &[]
        )),
        ["cluster b"]
    );
    assert!(f.truth.clusters.entries["b"].error.is_none());
    assert_eq!(
        f.receive(response(CDS, vec![bad()], &[])).0,
        Vec::<String>::new()
    );
    assert!(f.truth.clusters.entries["b"].active.is_some());
    // A static cluster is never replaced.
    assert_eq!(
        f.told(response(
            CDS,
            vec![resource::<Cluster>("xds", "{ name: xds }")],
            &["xds"]
        )),
        Vec::<String>::new()
    );
    assert!(f.truth.clusters.entries["xds"].fixed);
}

/// Each is one mistake among sound neighbours; the path of its field is told, and the neighbours are in force.
#[test]
fn one_mistake_costs_one_resource() {
    let tls = "transport_socket: { name: t, typed_config: { \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, common_tls_context: { tls_params: { tls_minimum_protocol_version: 77 } } } }";
    let foreign = "transport_socket: { name: t, typed_config: { \"@type\": type.googleapis.com/google.protobuf.Struct, value: {} } }";
    let place = |endpoint: &str, more: &str| {
        format!("{{ lb_endpoints: [{{ endpoint: {endpoint} }}]{more} }}")
    };
    let at = |address: &str| {
        format!("address: {{ socket_address: {{ address: '{address}', port_value: 80 }} }}")
    };
    let fine = format!("{{ {} }}", at("10.0.0.1"));
    let heavy = |weight: u32| format!("{{ load_balancing_weight: {weight}, endpoint: {fine} }}");
    let clusters = [
        (
            tls.to_string(),
            "transport_socket.typed_config.common_tls_context.tls_params.tls_minimum_protocol_version",
        ),
        (foreign.to_owned(), "transport_socket.typed_config"),
        ("type: EDS".to_owned(), "eds_cluster_config"),
        ("type: 77".to_owned(), "type"),
        ("lb_policy: 77".to_owned(), "lb_policy"),
    ];
    for (wrong, path) in clusters {
        let mut f = Fixture::new(ADS);
        f.log.clear();
        let bad = resource::<Cluster>("b", &format!("{{ name: b, {wrong} }}"));
        let good = |name: &str| resource::<Cluster>(name, &format!("{{ name: {name} }}"));
        let (log, errors) = f.receive(response(CDS, vec![good("a"), bad, good("c")], &[]));
        assert_eq!(log, ["cluster a", "cluster c"], "{wrong}");
        assert_eq!(errors.len(), 1);
        assert!(errors[0].starts_with(&format!("b: {path}: ")), "{errors:?}");
    }
    let assignments = [
        (
            place(&fine, ", load_balancing_weight: 0"),
            "endpoints[0].load_balancing_weight",
        ),
        (place(&fine, ", priority: 1"), "endpoints"),
        (
            place("{}", ""),
            "endpoints[0].lb_endpoints[0].endpoint.address",
        ),
        (
            place(
                &format!(
                    "{{ {}, additional_addresses: [{{ {} }}] }}",
                    at("10.0.0.1"),
                    at("nowhere")
                ),
                "",
            ),
            "endpoints[0].lb_endpoints[0].endpoint.additional_addresses[0].address.socket_address.address",
        ),
        (
            format!("{{ lb_endpoints: [{{ load_balancing_weight: 0, endpoint: {fine} }}] }}"),
            "endpoints[0].lb_endpoints[0].load_balancing_weight",
        ),
        (
            format!("{{ lb_endpoints: [{}, {}] }}", heavy(u32::MAX), heavy(1)),
            "endpoints[0].lb_endpoints",
        ),
        (
            format!(
                "{}, {}",
                place(
                    &fine,
                    ", locality: { zone: x }, load_balancing_weight: 4294967295"
                ),
                place(&fine, ", load_balancing_weight: 1")
            ),
            "endpoints",
        ),
        (
            "{ lb_endpoints: [{ endpoint_name: x }] }".to_owned(),
            "endpoints[0].lb_endpoints[0].endpoint_name",
        ),
    ];
    for (wrong, path) in assignments {
        let mut f = Fixture::new(ADS);
        f.told(response(
            CDS,
            vec![eds_cluster("a", "1s"), eds_cluster("b", "1s")],
            &[],
        ));
        f.told(response(
            EDS,
            vec![endpoints("a", 80), endpoints("b", 80)],
            &[],
        ));
        let bad = resource::<ClusterLoadAssignment>(
            "b",
            &format!("{{ cluster_name: b, endpoints: [{wrong}] }}"),
        );
        let (log, errors) = f.receive(response(EDS, vec![bad, endpoints("a", 81)], &[]));
        assert_eq!(log, ["endpoints a"], "{wrong}");
        assert_eq!(errors.len(), 1);
        assert!(errors[0].starts_with(&format!("b: {path}: ")), "{errors:?}");
        // Those that it had are still in use.
        assert!(f.truth.endpoints.entries["b"].active.is_some());
    }
}

#[test]
fn a_million_endpoints_with_a_mistake_each_are_told_in_few_words() {
    let endpoint = LbEndpoint {
        load_balancing_weight: Some(0),
        ..LbEndpoint::default()
    };
    let assignment = ClusterLoadAssignment {
        cluster_name: "a".to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: vec![endpoint; 1_000_000],
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    };
    let bad = ReceivedResource {
        name: "a".to_owned(),
        version: "1".to_owned(),
        resource: Any {
            type_url: ClusterLoadAssignment::type_url(),
            value: assignment.encode_to_vec(),
        },
    };
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![eds_cluster("a", "1s")], &[]));
    let (_, errors) = f.receive(response(EDS, vec![bad], &[]));
    assert!(errors[0].len() < 20_000, "{}", errors[0].len());
    assert!(errors[0].ends_with("and more mistakes of this kind or others"));
}

#[test]
fn nobody_waits_for_what_the_protocol_refuses() {
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![eds_cluster("a", "1s")], &[]));
    let mut twice = response(EDS, vec![], &[]);
    twice.refused = vec![("a".to_owned(), "twice".to_owned())];
    assert_eq!(f.told(twice), ["cluster a"]);
    assert_eq!(f.truth.endpoints.version, "");
}

#[test]
fn a_socket_that_cannot_be_opened_is_told_in_the_answer_or_later() {
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![], &[]));
    f.taken = vec!["l", "m"];
    let plain = "{ name: m, address: { socket_address: { address: 0.0.0.0, port_value: 80 } }, filter_chains: [{}] }";
    let resources = vec![
        rds_listener("l", "80", "s", "0s"),
        resource::<Listener>("m", plain),
    ];
    let (_, errors) = f.receive(response(LDS, resources, &[]));
    assert_eq!(
        errors,
        ["m: listener m: cannot listen on 0.0.0.0:80: address in use"]
    );
    // The other one had to wait for its routes: its failure belongs to no answer.
    let (_, errors) = f.receive(response(RDS, vec![route_config("80", "c", "")], &[]));
    assert!(errors.is_empty());
    let failures = f.truth.take_failures();
    assert_eq!(
        (
            failures.len(),
            failures[0].type_url,
            failures[0].name.as_str()
        ),
        (1, LDS, "l")
    );
}

#[test]
fn routes_to_clusters_that_do_not_exist_are_refused_where_that_is_asked_for() {
    let mut f = Fixture::new(ADS);
    f.told(response(CDS, vec![], &[]));
    f.told(response(LDS, vec![rds_listener("l", "80", "s", "0s")], &[]));
    let strict = route_config("80", "nobody", ", validate_clusters: true");
    let (told, errors) = f.receive(response(RDS, vec![strict], &[]));
    assert_eq!(told, ["listener l"]);
    assert_eq!(
        errors,
        [
            "80: virtual_hosts[0].routes[0].route.cluster: there is no cluster `nobody` (validate_clusters is on)"
        ]
    );
    assert_eq!(
        f.told(response(RDS, vec![route_config("80", "nobody", "")], &[])),
        ["routes 80"]
    );
}

#[test]
fn without_a_control_plane_the_static_part_is_all() {
    let f = Fixture::new(
        "static_resources: { clusters: [{ name: c }], listeners: [{ name: l, address: { socket_address: { address: 127.0.0.1, port_value: 0 } }, filter_chains: [{}] }] }",
    );
    assert_eq!(f.log, ["cluster c", "listener l"]);
    assert_eq!(
        (f.truth.phase(), f.truth.next_deadline()),
        (Phase::Live, None)
    );
}

fn tls_listener(secret: &str) -> ReceivedResource {
    resource::<Listener>(
        "l",
        &format!(
            r#"
name: l
address: {{ socket_address: {{ address: 0.0.0.0, port_value: 443 }} }}
filter_chains:
- transport_socket:
    name: tls
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
      common_tls_context:
        tls_certificate_sds_secret_configs:
        - {{ name: "{secret}", sds_config: {{ ads: {{}}, initial_fetch_timeout: 0s, resource_api_version: V3 }} }}
  filters:
  - {{ name: tcp, typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: s, cluster: c }} }}
"#
        ),
    )
}

fn secret(name: &str, chain: &str) -> ReceivedResource {
    resource::<Secret>(
        name,
        &format!(
            "{{ name: \"{name}\", tls_certificate: {{ certificate_chain: {{ inline_string: \"{chain}\" }}, private_key: {{ inline_string: key }} }} }}"
        ),
    )
}

#[test]
fn secrets_of_the_control_plane_are_asked_for_by_name_and_waited_for() {
    let mut f = Fixture::new(ADS);
    f.log.clear();
    f.told(response(CDS, vec![], &[]));
    let credential = "kubernetes://bookinfo";
    assert_eq!(
        f.told(response(LDS, vec![tls_listener(credential)], &[])),
        Vec::<String>::new()
    );
    let names: Vec<_> = f
        .truth
        .needed_secrets()
        .into_iter()
        .map(|s| s.name)
        .collect();
    assert_eq!(names, [credential.into()]);
    // Nobody has asked for this one.
    assert_eq!(
        f.told(response(SDS, vec![secret("kubernetes://other", "a")], &[])),
        Vec::<String>::new()
    );
    assert_eq!(
        f.told(response(SDS, vec![secret(credential, "a")], &[])),
        ["secret kubernetes://bookinfo", "listener l"]
    );
    assert_eq!(f.truth.phase(), Phase::Live);
    assert_eq!(
        f.told(response(SDS, vec![secret(credential, "b")], &[])),
        ["secret kubernetes://bookinfo"]
    );
    // A listener without it: nothing is asked for any more, and the secret is dropped.
    f.told(response(LDS, vec![], &["l"]));
    assert!(f.truth.needed_secrets().is_empty());
    assert!(
        matches!(&f.truth.drop_unused_secrets()[..], [Change::RemoveSecret(s)] if &*s.name == credential)
    );
}
