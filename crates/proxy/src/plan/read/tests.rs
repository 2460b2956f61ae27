#[path = "../../../../testkit/src/conformance.rs"]
mod finder;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use prost::{Message, Name};
use proto::envoy::config::{
    bootstrap::v3 as bootstrap_pb, cluster::v3 as cluster_pb, endpoint::v3 as endpoint_pb,
    listener::v3 as listener_pb, route::v3 as route_pb,
};
use serde_json::Value;

use crate::plan::{
    Bootstrap, Cluster, ClusterLoadAssignment, Listener, PlanErrors, RouteConfiguration,
    bootstrap::StatsMatcher,
    cluster::{Discovery, UpstreamTransport},
    lb::LbPolicy,
    listener::{ChainPredicate, ListenerFilterKind},
    network::{NetworkFilterConfig, TcpClusters},
    route::{Action, ClusterSpecifier, PathMatch},
};

/// Extensions of later versions, with the word that names them in a rejection.
const LATER: &[&str] = &[
    "envoy.extensions.filters.http.wasm.v3.Wasm",
    "envoy.extensions.filters.network.wasm.v3.Wasm",
];

/// Whether a mistake names an extension of a later version.
pub(crate) fn is_later(text: &str) -> bool {
    LATER.iter().any(|l| text.contains(l))
}

pub(crate) fn conformance() -> Option<PathBuf> {
    finder::conformance("")
}

pub(crate) fn answers(root: &Path) -> Vec<(String, Value)> {
    let mut list = Vec::new();
    for scenario in std::fs::read_dir(root.join("istiod-xds"))
        .expect("readable")
        .flatten()
    {
        if !scenario.path().is_dir() {
            continue;
        }
        for file in std::fs::read_dir(scenario.path())
            .expect("readable")
            .flatten()
        {
            let name = file.file_name().into_string().expect("UTF-8");
            if !name.ends_with(".json") || name.ends_with(".node.json") {
                continue;
            }
            let text = std::fs::read_to_string(file.path()).expect("readable");
            let label = format!("{}/{name}", scenario.file_name().display());
            list.push((label, serde_json::from_str(&text).expect("JSON")));
        }
    }
    list.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(!list.is_empty());
    list
}

fn plan<'a, M, P>(resource: &Value) -> Result<P, PlanErrors>
where
    M: Message + Name + Default + 'a,
    P: for<'m> TryFrom<&'m M, Error = PlanErrors>,
{
    let mut resource = resource.clone();
    resource.as_object_mut().expect("an object").remove("@type");
    let message: M = proto::json::from_value(&resource).expect("canonical JSON");
    P::try_from(&message)
}

/// Everything a real istiod sends becomes a plan, or is rejected by name and path as a later version's.
#[test]
fn every_answer_of_istiod_becomes_a_plan() {
    let Some(root) = conformance() else { return };
    let mut planned = 0;
    let mut rejected: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (label, answer) in answers(&root) {
        let lists = answer.as_object().expect("lists by type");
        for (kind, resources) in lists {
            for resource in resources.as_array().expect("a list") {
                let errors = match kind.as_str() {
                    "clusters" => plan::<cluster_pb::Cluster, Cluster>(resource).err(),
                    "endpoints" => {
                        plan::<endpoint_pb::ClusterLoadAssignment, ClusterLoadAssignment>(resource)
                            .err()
                    }
                    "listeners" => plan::<listener_pb::Listener, Listener>(resource).err(),
                    "routes" => {
                        plan::<route_pb::RouteConfiguration, RouteConfiguration>(resource).err()
                    }
                    // Extension discovery: nothing subscribes to it, because its users are rejected.
                    "extensions" => continue,
                    other => panic!("{label}: unknown list {other}"),
                };
                let Some(errors) = errors else {
                    planned += 1;
                    continue;
                };
                let name = resource
                    .get("name")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                for error in errors.0 {
                    match LATER
                        .iter()
                        .find(|l| error.message.contains(*l) || error.path.contains(*l))
                    {
                        Some(later) => *rejected.entry((*later).to_owned()).or_default() += 1,
                        None => wrong.push(format!("{label} {kind} {name}: {error}")),
                    }
                }
            }
        }
    }
    println!("{planned} resources planned; rejected as later versions':");
    for (name, count) in &rejected {
        println!("  {count:4} × {name}");
    }
    wrong.dedup();
    assert!(
        wrong.is_empty(),
        "{} mistakes:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(40)].join("\n")
    );
}

fn listener(yaml: &str) -> Result<Listener, PlanErrors> {
    Listener::try_from(&proto::json::from_yaml::<listener_pb::Listener>(yaml).expect("legal YAML"))
}

fn cluster(yaml: &str) -> Result<Cluster, PlanErrors> {
    Cluster::try_from(&proto::json::from_yaml::<cluster_pb::Cluster>(yaml).expect("legal YAML"))
}

fn routes(yaml: &str) -> Result<RouteConfiguration, PlanErrors> {
    let message = proto::json::from_yaml::<route_pb::RouteConfiguration>(yaml).expect("legal YAML");
    RouteConfiguration::try_from(&message)
}

fn mistakes<T: std::fmt::Debug>(result: Result<T, PlanErrors>) -> Vec<String> {
    result
        .expect_err("must be rejected")
        .0
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn a_mistake_is_named_by_its_path() {
    let wrong = mistakes(listener(
        r#"
name: l
address: { socket_address: { address: 0.0.0.0, port_value: 80 } }
filter_chains:
- filters:
  - name: envoy.filters.network.http_connection_manager
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: x
      route_config:
        virtual_hosts:
        - { name: a, domains: [a], routes: [] }
        - name: b
          domains: [b, A]
          routes:
          - match: { safe_regex: { regex: "a**" } }
            route: { cluster: c, retry_policy_typed_config: { "@type": type.googleapis.com/google.protobuf.Empty } }
      http_filters:
      - name: x
        typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm }
"#,
    ));
    let config = "filter_chains[0].filters[0].typed_config";
    let host = format!("{config}.route_config.virtual_hosts[1]");
    let expected = [
        format!("{host}.routes[0].match.safe_regex.regex: `a**`"),
        format!("{host}.routes[0].route.retry_policy_typed_config: is not implemented"),
        format!("{host}.domains[1]: `A` is a domain of another"),
        format!(
            "{config}.http_filters[0].typed_config: HTTP filter envoy.extensions.filters.http.wasm.v3.Wasm"
        ),
    ];
    assert_eq!(wrong.len(), expected.len(), "{wrong:#?}");
    for (wrong, expected) in wrong.iter().zip(&expected) {
        assert!(wrong.starts_with(expected), "{wrong} is not {expected}");
    }
}

#[test]
fn extensions_that_nobody_brings_are_refused_by_their_names() {
    let wrong = mistakes(routes(
        r#"
name: r
route_specifiers: [{ name: one }]
virtual_hosts:
- name: v
  domains: ['*']
  hedge_policy: { initial_requests: 3, additional_request_chance: { numerator: 5 } }
  route_specifiers: [{ name: two }]
  routes:
  - match: { prefix: / }
    route: { cluster: c, retry_policy: { retry_options_predicates: [{ name: other }] } }
"#,
    ));
    let expected = [
        "route_specifiers[0]: there is no route specifier here: code cannot be loaded; remove `one`",
        "virtual_hosts[0].route_specifiers[0]: there is no route specifier here: code cannot be loaded; remove `two`",
        "virtual_hosts[0].routes[0].route.retry_policy.retry_options_predicates[0]: there is no retry options predicate here; remove `other`",
    ];
    assert_eq!(wrong, expected);
}

#[test]
fn a_domain_belongs_to_one_virtual_host() {
    let wrong = mistakes(routes(
        "name: r\nvirtual_hosts: [{name: a, domains: [x.com, '*']}, {name: b, domains: [X.com]}, {name: a, domains: ['*']}]",
    ));
    assert_eq!(
        wrong,
        [
            "virtual_hosts[1].domains[0]: `X.com` is a domain of another virtual host already",
            "virtual_hosts[2].name: `a` is also the name of virtual_hosts[0]",
            "virtual_hosts[2].domains[0]: `*` is a domain of another virtual host already",
        ]
    );
}

#[test]
fn two_chains_for_the_same_connections_reject_the_listener() {
    let chain = |m: &str| format!("{{ filter_chain_match: {m}, filters: [] }}");
    let yaml = |chains: &[String]| {
        format!(
            "name: l\naddress: {{ socket_address: {{ address: 0.0.0.0, port_value: 1 }} }}\nfilter_chains: [{}]",
            chains.join(", ")
        )
    };
    let same = yaml(&[
        chain("{ destination_port: 80, application_protocols: [a, b] }"),
        chain("{ destination_port: 80, application_protocols: [b] }"),
    ]);
    let wrong = mistakes(listener(&same));
    assert!(
        wrong[0].starts_with("filter_chains[1].filter_chain_match: "),
        "{wrong:?}"
    );
    let different = yaml(&[
        chain("{ destination_port: 80, application_protocols: [a] }"),
        chain("{ destination_port: 80, application_protocols: [b] }"),
        chain("{ destination_port: 80 }"),
        chain("{ application_protocols: [a] }"),
    ]);
    assert_eq!(listener(&different).expect("legal").filter_chains.len(), 4);
}

#[test]
fn defaults_are_those_of_envoy() {
    let planned = listener(
        r#"
name: l
use_original_dst: true
bind_to_port: false
address: { socket_address: { address: "::", port_value: 80 } }
listener_filters:
- name: envoy.filters.listener.http_inspector
  typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector }
  filter_disabled: { not_match: { destination_port_range: { start: 80, end: 81 } } }
filter_chains:
- filters:
  - name: t
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
      stat_prefix: t
      weighted_clusters: { clusters: [{ name: a, weight: 1 }, { name: b, weight: 3 }] }
"#,
    )
    .expect("legal");
    assert!(!planned.bind_to_port);
    assert_eq!(
        planned.listener_filters[0].kind,
        ListenerFilterKind::OriginalDst
    );
    assert_eq!(
        planned.listener_filters_timeout.map(|d| d.as_secs()),
        Some(15)
    );
    let disabled = planned.listener_filters[1]
        .disabled
        .as_ref()
        .expect("given");
    assert!(matches!(disabled, ChainPredicate::Not(_)));
    assert!(!disabled.matches(Some(80)) && disabled.matches(Some(81)) && disabled.matches(None));
    let NetworkFilterConfig::TcpProxy(tcp) = &planned.filter_chains[0].filters[0].config else {
        panic!("not a tcp_proxy");
    };
    assert_eq!(tcp.idle_timeout.map(|d| d.as_secs()), Some(3600));
    let TcpClusters::Weighted { total, .. } = &tcp.cluster else {
        panic!("not weighted")
    };
    assert_eq!(*total, 4);
    let share = (0..400).filter(|n| &**tcp.target(*n).0 == "b").count();
    assert_eq!(share, 300);
}

#[test]
fn what_only_counts_operations_of_mongodb_is_no_filter_of_the_chain() {
    let with = |more: &str| {
        listener(&format!(
            "{{ name: l, address: {{ socket_address: {{ address: 0.0.0.0, port_value: 27017 }} }}, filter_chains: [{{ filters: [
               {{ name: mongo, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy, stat_prefix: m{more} }} }},
               {{ name: tcp, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: c }} }} ] }}] }}",
        ))
    };
    let planned = with("").expect("as each control plane sends it");
    let [only] = &planned.filter_chains[0].filters[..] else {
        panic!("{:?}", planned.filter_chains[0].filters);
    };
    assert!(matches!(only.config, NetworkFilterConfig::TcpProxy(_)));
    assert_eq!(
        mistakes(with(", access_log: /tmp/x, emit_dynamic_metadata: true")),
        [
            "filter_chains[0].filters[0].typed_config.access_log: is not implemented; remove it",
            "filter_chains[0].filters[0].typed_config.emit_dynamic_metadata: is not implemented; remove it",
        ]
    );
}

#[test]
fn a_tunnel_that_could_not_be_asked_for_is_refused() {
    let with = |more: &str| {
        listener(&format!(
            "{{ name: l, address: {{ socket_address: {{ address: 0.0.0.0, port_value: 1 }} }}, filter_chains: [{{ filters: [
               {{ name: tcp, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: c,
                  tunneling_config: {{ hostname: 'h:1'{more} }} }} }} ] }}] }}",
        ))
    };
    let planned = with(", request_id_header: ':path', request_id_metadata_key: k");
    let planned = planned.expect("without an extension there is no id to be named");
    let NetworkFilterConfig::TcpProxy(tcp) = &planned.filter_chains[0].filters[0].config else {
        panic!("not a tcp_proxy");
    };
    let tunneling = tcp.tunneling.as_ref().expect("it is given");
    assert_eq!(
        (&tunneling.post_path, &tunneling.request_id),
        (&None, &None)
    );
    let extension = |name: &str| {
        format!(
            "request_id_extension: {{ typed_config: {{ '@type': type.googleapis.com/envoy.extensions.{name} }} }}"
        )
    };
    let uuid = extension("request_id.uuid.v3.UuidRequestIdConfig");
    for (more, path, why) in [
        (
            ", post_path: /x",
            "post_path",
            "has a meaning with use_post alone",
        ),
        (
            ", use_post: true, post_path: x",
            "post_path",
            "must begin with `/`",
        ),
        (
            ", use_post: true, post_path: '/x y'",
            "post_path",
            "must begin with `/`",
        ),
        (
            &format!(", {uuid}, request_id_header: ':path'"),
            "request_id_header",
            "`:path` says where the request goes",
        ),
        (
            &format!(", {uuid}, request_id_header: 'x y'"),
            "request_id_header",
            "`x y` is not a header name",
        ),
        (
            &format!(", {}", extension("filters.http.router.v3.Router")),
            "request_id_extension.typed_config",
            "request id extension",
        ),
    ] {
        let wrong = mistakes(with(more)).remove(0);
        let at = format!("filter_chains[0].filters[0].typed_config.tunneling_config.{path}");
        assert!(wrong.starts_with(&at) && wrong.contains(why), "{wrong}");
    }
}

#[test]
fn a_cluster_of_old_fields_is_planned() {
    let planned = cluster(
        "{ name: c, type: STRICT_DNS, connect_timeout: 0.25s, lb_policy: ROUND_ROBIN, http2_protocol_options: {},
           load_assignment: { cluster_name: c, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: service1, port_value: 80 } } } }] }] } }",
    )
    .expect("legal");
    assert_eq!(planned.connect_timeout.as_millis(), 250);
    assert_eq!(
        planned.protocol,
        crate::plan::cluster::UpstreamProtocol::Http2
    );
    assert_eq!(planned.lb_policy, LbPolicy::RoundRobin(None));
    let Discovery::StrictDns {
        load_assignment, ..
    } = &planned.discovery
    else {
        panic!("not DNS")
    };
    let (_, endpoint) = load_assignment.endpoints().next().expect("one");
    assert_eq!(endpoint.address.to_string(), "service1:80");
}

#[test]
fn what_is_wrong_is_named_by_the_field_that_was_written() {
    let wrong = cluster(
        "{ name: c, load_balancing_policy: { policies: [{ typed_extension_config: { name: p, typed_config: { \
           \"@type\": type.googleapis.com/envoy.extensions.load_balancing_policies.cluster_provided.v3.ClusterProvided } } }] } }",
    );
    assert_eq!(
        mistakes(wrong),
        [
            "load_balancing_policy: can only be CLUSTER_PROVIDED for types ORIGINAL_DST and aggregate"
        ]
    );
    let wrong = routes(
        "{ name: r, virtual_hosts: [{ name: v, domains: ['*'], routes: [{ match: { prefix: / }, \
           route: { inline_cluster_specifier_plugin: { extension: { name: p } } } }] }] }",
    );
    assert_eq!(
        mistakes(wrong),
        [
            "virtual_hosts[0].routes[0].route.inline_cluster_specifier_plugin: is not implemented; write cluster"
        ]
    );
}

#[test]
fn routes_that_envoy_does_not_take_are_rejected() {
    let wrong = routes(
        "{ name: r, virtual_hosts: [{ name: v, domains: ['*'], virtual_clusters: [{ name: c }], routes: [{ match: { prefix: / }, \
           request_headers_to_add: [{ header: { key: a, value: b }, append: true, append_action: ADD_IF_ABSENT }], \
           route: { weighted_clusters: { clusters: [{ name: a, weight: 1 }, { name: b }] } } }] }] }",
    );
    assert_eq!(
        mistakes(wrong),
        [
            "virtual_hosts[0].routes[0].route.weighted_clusters.clusters[1].weight: is required",
            "virtual_hosts[0].routes[0].request_headers_to_add[0].append: cannot be given together with append_action",
            "virtual_hosts[0].virtual_clusters[0].headers: needs at least one condition"
        ]
    );
    let wrong = routes(
        "{ name: r, virtual_hosts: [{ name: v, domains: ['*'], routes: [ \
           { match: { path_match_policy: { name: m, typed_config: { \"@type\": \
             type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig, path_template: /a } } }, \
             route: { cluster: c, prefix_rewrite: /b } }, \
           { match: { path_separated_prefix: a }, route: { cluster: c } } ] }] }",
    );
    assert_eq!(
        mistakes(wrong),
        [
            "virtual_hosts[0].routes[0].route.prefix_rewrite: cannot be given where a template matches; use path_rewrite_policy",
            "virtual_hosts[0].routes[1].match.path_separated_prefix: `a` must have two characters at least, not end with a slash, and hold no query"
        ]
    );
}

#[test]
fn custom_settings_of_http2_may_not_say_what_has_a_field() {
    let with = |options: &str| {
        cluster(&format!(
            "{{ name: c, http2_protocol_options: {{ {options} }} }}"
        ))
    };
    for (options, wrong) in [
        (
            "custom_settings_parameters: [{ value: 1 }]",
            "[0].identifier: is required",
        ),
        (
            "custom_settings_parameters: [{ identifier: 9 }]",
            "[0].value: is required",
        ),
        (
            "custom_settings_parameters: [{ identifier: 65536, value: 1 }]",
            "[0].identifier: must be at most 65535",
        ),
        (
            "custom_settings_parameters: [{ identifier: 9, value: 1 }, { identifier: 9, value: 2 }]",
            ": says two values of 9",
        ),
        (
            "hpack_table_size: 1, custom_settings_parameters: [{ identifier: 1, value: 1 }]",
            "[0]: is hpack_table_size, which is given as well",
        ),
        (
            "custom_settings_parameters: [{ identifier: 2, value: 1 }]",
            "[0].value: must be 0: nothing is pushed",
        ),
        (
            "custom_settings_parameters: [{ identifier: 4, value: 2147483648 }]",
            "[0].value: must be at most 2147483647",
        ),
        (
            "custom_settings_parameters: [{ identifier: 5, value: 20000 }]",
            "[0]: MAX_FRAME_SIZE (5) is not implemented; remove it",
        ),
        (
            "custom_settings_parameters: [{ identifier: 6, value: 1 }]",
            "[0]: MAX_HEADER_LIST_SIZE (6) is not implemented; write max_request_headers_kb",
        ),
        (
            "custom_settings_parameters: [{ identifier: 8, value: 1 }]",
            "[0]: ENABLE_CONNECT_PROTOCOL (8) can only be given as allow_connect",
        ),
    ] {
        let found = mistakes(with(options));
        assert_eq!(found.len(), 1, "{found:?}");
        let end = format!("http2_protocol_options.custom_settings_parameters{wrong}");
        assert!(found[0].ends_with(&end), "{found:?}");
    }
    with("custom_settings_parameters: [{ identifier: 2, value: 0 }]").expect("that is said anyway");
}

/// It is known by its type, whatever it is called.
#[test]
fn upstream_filters_may_be_the_codec_alone() {
    let with = |filter: &str| {
        cluster(&format!(
            "{{ name: c, typed_extension_protocol_options: {{ envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{ \
               \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
               explicit_http_config: {{ http2_protocol_options: {{}} }}, http_filters: [{{ name: envoy.filters.http.upstream_codec, \
               typed_config: {{ \"@type\": type.googleapis.com/envoy.extensions.filters.http.{filter} }} }}] }} }} }}"
        ))
    };
    with("upstream_codec.v3.UpstreamCodec").expect("legal");
    assert_eq!(
        mistakes(with("buffer.v3.Buffer, max_request_bytes: 5")),
        [
            "typed_extension_protocol_options[\"envoy.extensions.upstreams.http.v3.HttpProtocolOptions\"].http_filters[0]: \
             upstream HTTP filters are not implemented; remove it"
        ]
    );
}

/// The options of the newer form are its own; those of the cluster do not count.
#[test]
fn a_cluster_of_the_dns_extension_is_planned() {
    let with = |options: &str| {
        cluster(&format!(
            "{{ name: c, dns_refresh_rate: 1s, load_assignment: {{ cluster_name: c, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ \
               address: {{ socket_address: {{ address: a, port_value: 1 }} }} }} }}] }}] }}, cluster_type: {{ name: envoy.cluster.dns, \
               typed_config: {{ \"@type\": type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster{options} }} }} }}"
        ))
    };
    let Discovery::StrictDns { dns, .. } = with("").expect("legal").discovery else {
        panic!("not strict DNS")
    };
    assert_eq!(dns.refresh_rate.as_secs(), 5);
    assert_eq!(dns.family, crate::plan::cluster::DnsLookupFamily::Auto);
    let options = ", all_addresses_in_single_endpoint: true, dns_refresh_rate: 2s, respect_dns_ttl: true, dns_lookup_family: ALL, \
        dns_jitter: 3s, dns_failure_refresh_rate: { base_interval: 4s }";
    let Discovery::LogicalDns { dns, .. } = with(options).expect("legal").discovery else {
        panic!("not logical DNS")
    };
    assert_eq!((dns.refresh_rate.as_secs(), dns.jitter.as_secs()), (2, 3));
    assert!(dns.respect_ttl);
    assert_eq!(dns.family, crate::plan::cluster::DnsLookupFamily::All);
    let failure = dns
        .failure_refresh
        .map(|(base, most)| (base.as_secs(), most.as_secs()));
    assert_eq!(failure, Some((4, 40)));
    assert_eq!(
        mistakes(with(", dns_min_refresh_rate: 1s")),
        ["cluster_type.typed_config.dns_min_refresh_rate: is not implemented; remove it"]
    );
}

#[test]
fn an_eds_cluster_needs_its_source_and_no_endpoints() {
    assert_eq!(
        mistakes(cluster("{ name: c, type: EDS }")),
        ["eds_cluster_config: is required for type EDS"]
    );
    assert_eq!(
        mistakes(cluster("{ name: c, type: ORIGINAL_DST }")),
        ["lb_policy: must be CLUSTER_PROVIDED for this cluster type"]
    );
    let wrong = mistakes(cluster(
        "{ name: c, load_assignment: { cluster_name: c, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: x, port_value: 80 } } } }] }] } }",
    ));
    assert_eq!(
        wrong,
        [
            "load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address: `x` is not an IP address"
        ]
    );
}

#[test]
fn the_transport_is_chosen_by_endpoint_metadata() {
    let planned = cluster(
        r#"
name: c
transport_socket_matches:
- name: tlsMode-istio
  match: { tlsMode: istio }
  transport_socket:
    name: t
    typed_config: { "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: x }
- name: tlsMode-disabled
  match: {}
  transport_socket:
    name: r
    typed_config: { "@type": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer }
load_assignment:
  cluster_name: c
  endpoints:
  - lb_endpoints:
    - endpoint: { address: { socket_address: { address: 10.0.0.1, port_value: 80 } } }
      metadata: { filter_metadata: { envoy.transport_socket_match: { tlsMode: istio } } }
    - endpoint: { address: { socket_address: { address: 10.0.0.2, port_value: 80 } } }
"#,
    )
    .expect("legal");
    let Discovery::Static(endpoints) = &planned.discovery else {
        panic!("not static")
    };
    let chosen: Vec<_> = endpoints
        .endpoints()
        .map(|(_, e)| planned.transport_for(&e.metadata))
        .collect();
    assert!(matches!(chosen[0], UpstreamTransport::Tls(tls) if &*tls.sni == "x"));
    assert_eq!(chosen[1], &UpstreamTransport::RawBuffer);
}

#[test]
fn ciphers_that_rustls_lacks_are_dropped_while_one_remains() {
    let with = |suites: &str| {
        cluster(&format!(
            r#"{{ name: c, transport_socket: {{ name: t, typed_config: {{ "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext,
               common_tls_context: {{ tls_params: {{ cipher_suites: [{suites}] }} }} }} }} }}"#
        ))
    };
    let planned = with("AES128-GCM-SHA256, ECDHE-RSA-AES128-GCM-SHA256").expect("one remains");
    let UpstreamTransport::Tls(tls) = &planned.transport_socket else {
        panic!("not TLS")
    };
    assert_eq!(tls.common.cipher_suites.len(), 1);
    let wrong = mistakes(with("AES128-GCM-SHA256"));
    assert!(
        wrong[0].starts_with(
            "transport_socket.typed_config.common_tls_context.tls_params.cipher_suites: none of"
        ),
        "{wrong:?}"
    );
}

#[test]
fn of_many_virtual_hosts_each_is_planned_again_at_its_first_request() {
    let hosts = |last: &str| {
        let mut yaml = String::from("name: r\nvirtual_hosts:\n");
        for i in 0..150 {
            let cluster = if i == 149 { last } else { "c" };
            yaml += &format!(
                "- {{name: h{i}, domains: [h{i}.example], routes: [{{match: {{prefix: /}}, route: {{cluster: {cluster}}}}}]}}\n"
            );
        }
        routes(&yaml)
    };
    let config = hosts("last").expect("good");
    assert_eq!(config.virtual_hosts.len(), 150);
    assert_eq!(&*config.virtual_hosts[149].routes[0].name, "");
    assert!(format!("{:?}", config.virtual_hosts[149].routes[0].action).contains("last"));
    assert_eq!(Ok(&config), hosts("last").as_ref());
    assert_ne!(Ok(&config), hosts("other").as_ref());
    // What is wrong is found at once, wherever it is.
    let errors = hosts("''").expect_err("a route without a cluster");
    assert!(
        errors.to_string().contains("virtual_hosts[149]"),
        "{errors}"
    );
}

#[test]
fn routes_keep_their_order_and_their_timeouts() {
    let planned = routes(
        r#"
name: r
virtual_hosts:
- name: v
  domains: ["*"]
  routes:
  - { match: { path_separated_prefix: /a }, route: { cluster: a, timeout: 0s, max_grpc_timeout: 0s } }
  - { match: { prefix: / }, route: { weighted_clusters: { clusters: [{ name: b, weight: 20 }, { name: c, weight: 80 }] } } }
"#,
    )
    .expect("legal");
    let routes = &planned.virtual_hosts[0].routes;
    assert_eq!(
        routes[0].matches.path,
        PathMatch::PathSeparatedPrefix("/a".into())
    );
    let Action::Route(first) = &routes[0].action else {
        panic!("not a route")
    };
    assert_eq!((first.timeout, first.max_grpc_timeout), (None, Some(None)));
    let Action::Route(second) = &routes[1].action else {
        panic!("not a route")
    };
    assert_eq!(second.timeout.map(|d| d.as_secs()), Some(15));
    assert!(matches!(&second.cluster, ClusterSpecifier::Weighted(w) if w.total == 100));
}

#[test]
fn a_bootstrap_tells_all_its_mistakes() {
    let yaml = r#"
admin: { address: { socket_address: { address: nowhere, port_value: 1 } } }
dynamic_resources:
  lds_config: { ads: {} }
  ads_config: { api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: xds } }] }
stats_config: { stats_matcher: { inclusion_list: { patterns: [{ prefix: cluster. }] } } }
layered_runtime: { layers: [{ name: a, static_layer: { a: { b: 1 }, "c.d": true } }, { name: admin, admin_layer: {} }] }
"#;
    let message: bootstrap_pb::Bootstrap = proto::json::from_yaml(yaml).expect("legal YAML");
    let wrong = mistakes(Bootstrap::try_from(&message));
    assert_eq!(
        wrong,
        [
            "admin.address.socket_address.address: `nowhere` is not an IP address",
            "dynamic_resources.ads_config: goes to cluster `xds`, which is not among static_resources.clusters",
        ]
    );
    let right = yaml.replace("nowhere", "127.0.0.1").replace("dynamic_resources:", 
        "static_resources: { clusters: [{ name: xds, load_assignment: { cluster_name: xds, endpoints: [{ lb_endpoints: [{ endpoint: { address: { pipe: { path: ./XDS } } } }] }] } }] }\ndynamic_resources:");
    let message: bootstrap_pb::Bootstrap = proto::json::from_yaml(&right).expect("legal YAML");
    let planned = Bootstrap::try_from(&message).expect("legal");
    assert!(planned.ads.as_ref().is_some_and(|a| a.delta));
    assert_eq!(planned.runtime.keys().collect::<Vec<_>>(), ["a.b", "c.d"]);
    assert!(matches!(&planned.stats.matcher, StatsMatcher::Include(_)));
    assert!(planned.stats.matcher.admits("cluster.x") && !planned.stats.matcher.admits("http.x"));
}
