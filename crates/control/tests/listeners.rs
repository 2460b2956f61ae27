//! Listeners, routes and gateways beyond what the captures show: conflicts, older names, other modes, origins.

use std::{path::Path, sync::Arc};

use config::{Severity, Snapshot};
use outrigger_control::{
    compat::Compat,
    listener,
    model::{Mesh, Node, Proxy, Resource, Settings},
    route,
};
use proto::envoy::config::core::v3::Node as EnvoyNode;
use serde_json::{Value, json};

const PODS: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {containers: [{name: web, image: web, ports: [{containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
";

fn mesh_with(text: &str, compat: Compat) -> Mesh {
    let all = format!("{PODS}{text}");
    let (snapshot, problems) = Snapshot::from_texts([(Path::new("shop.yaml"), all.as_str())]);
    let errors: Vec<_> = problems
        .iter()
        .filter(|p| p.severity == Severity::Error)
        .collect();
    assert!(errors.is_empty(), "{}", errors[0]);
    let settings = Settings {
        compat,
        ..Settings::default()
    };
    Mesh::new(Arc::new(snapshot), settings, None)
}

fn mesh(text: &str) -> Mesh {
    mesh_with(text, Compat::Current)
}

/// A proxy of namespace shop; `metadata` is added to that of every proxy.
fn proxy(mesh: &Mesh, kind: &str, ip: &str, metadata: &Value) -> Proxy {
    let mut all = json!({"NAMESPACE": "shop", "CLUSTER_ID": "Kubernetes", "INSTANCE_IPS": ip});
    for (key, value) in metadata.as_object().unwrap() {
        all[key] = value.clone();
    }
    let node: EnvoyNode = proto::json::from_value(&json!({
        "id": format!("{kind}~{ip}~x.shop~shop.svc.cluster.local"), "metadata": all,
    }))
    .unwrap();
    Proxy::new(mesh, Arc::new(Node::parse(&node).unwrap()))
}

fn sidecar(mesh: &Mesh) -> Proxy {
    proxy(
        mesh,
        "sidecar",
        "10.1.0.1",
        &json!({"LABELS": {"app": "web"}}),
    )
}

fn gateway(mesh: &Mesh) -> Proxy {
    proxy(
        mesh,
        "router",
        "10.1.9.9",
        &json!({"LABELS": {"istio": "gw"}}),
    )
}

fn find(all: &[Resource], name: &str) -> Value {
    let names: Vec<_> = all.iter().map(|r| &r.name).collect();
    let found = all
        .iter()
        .find(|r| r.name == name)
        .unwrap_or_else(|| panic!("{name} not in {names:?}"));
    proto::json::any_to_value(&found.any())
}

fn listener_of(mesh: &Mesh, proxy: &Proxy, name: &str) -> Value {
    find(&listener::build(mesh, proxy), name)
}

fn routes_of(mesh: &Mesh, proxy: &Proxy, name: &str) -> Value {
    find(&route::build(mesh, proxy, &[name.to_owned()]), name)
}

fn names(all: &[Resource]) -> Vec<&str> {
    all.iter().map(|r| r.name.as_str()).collect()
}

/// The clusters that the chains of a listener lead to by `tcp_proxy`, in order; `http` for HTTP chains.
fn targets(listener: &Value) -> Vec<String> {
    let target = |chain: &Value| {
        let last = chain["filters"].as_array().unwrap().last().unwrap()["typedConfig"].clone();
        let cluster = last["cluster"].as_str().map(str::to_owned);
        cluster.unwrap_or_else(|| {
            if last["httpFilters"].is_array() {
                "http"
            } else {
                "?"
            }
            .to_owned()
        })
    };
    let chains = listener["filterChains"].as_array().unwrap().iter();
    chains
        .chain(listener.get("defaultFilterChain"))
        .map(target)
        .collect()
}

#[test]
fn older_names_on_request() {
    let mesh = mesh_with("", Compat::V1_13);
    let proxy = sidecar(&mesh);
    let inbound = listener_of(&mesh, &proxy, "virtualInbound");
    let chains = inbound["filterChains"].as_array().unwrap();
    assert_eq!(
        chains.len(),
        8,
        "the rows of `proxy-config listeners --port 15006`"
    );
    assert_eq!(
        chains[1]["filterChainMatch"]["prefixRanges"],
        json!([{"addressPrefix": "0.0.0.0", "prefixLen": 0}])
    );
    assert_eq!(
        targets(&inbound)[3..6],
        ["InboundPassthroughClusterIpv4"; 3]
    );
    assert_eq!(inbound.get("maxConnectionsToAcceptPerSocketEvent"), None);

    let routes = routes_of(&mesh, &proxy, "80");
    let web = &routes["virtualHosts"][0];
    assert_eq!(
        web["domains"],
        json!([
            "web.shop.svc.cluster.local",
            "web.shop.svc.cluster.local:80",
            "web",
            "web:80",
            "web.shop.svc",
            "web.shop.svc:80",
            "web.shop",
            "web.shop:80",
            "10.96.0.1",
            "10.96.0.1:80"
        ])
    );
    assert_eq!(
        web["routes"][0]["route"]["retryPolicy"]["retriableStatusCodes"],
        json!([503])
    );
    assert_eq!(routes.get("ignorePortInHostMatching"), None);
}

#[test]
fn one_address_and_port_is_shared_by_bytes_and_http() {
    let mesh = mesh(
        r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: a, namespace: shop}
spec: {hosts: [a.com], addresses: [192.0.2.1], ports: [{number: 7000, name: tcp, protocol: TCP}], resolution: DNS}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: b, namespace: shop}
spec: {hosts: [b.com], addresses: [192.0.2.1], ports: [{number: 7000, name: x}], resolution: DNS}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: c, namespace: shop}
spec: {hosts: [c.com], addresses: [192.0.2.1], ports: [{number: 7000, name: mongo, protocol: MONGO}], resolution: DNS}
",
    );
    let shared = listener_of(&mesh, &sidecar(&mesh), "192.0.2.1_7000");
    // The older service keeps the bytes, HTTP of the second is told apart, the third (its server speaks first) stays out.
    assert_eq!(targets(&shared), ["http", "outbound|7000||a.com"]);
    assert_eq!(shared["listenerFilters"].as_array().unwrap().len(), 1);
}

#[test]
fn an_http_port_and_an_opaque_one_share_the_wildcard() {
    let mesh = mesh(
        r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: tls, namespace: shop}
spec: {hosts: [tls.com, '*.wild.com'], ports: [{number: 80, name: tls, protocol: TLS}], resolution: NONE}
",
    );
    let listener = listener_of(&mesh, &sidecar(&mesh), "0.0.0.0_80");
    let mut all = targets(&listener);
    all.sort();
    assert_eq!(
        all,
        [
            "PassthroughCluster",
            "http",
            "outbound|80||*.wild.com",
            "outbound|80||tls.com"
        ]
    );
    let inspectors: Vec<_> = listener["listenerFilters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        inspectors,
        [
            "envoy.filters.listener.tls_inspector",
            "envoy.filters.listener.http_inspector"
        ]
    );
}

#[test]
fn a_pod_has_no_listener_for_itself_and_shares_all_others() {
    let headless = r"
apiVersion: v1
kind: Pod
metadata: {name: db-1, namespace: shop, labels: {app: db}}
spec: {containers: [{name: db, image: db}]}
status: {phase: Running, podIP: 10.1.0.2, podIPs: [{ip: 10.1.0.2}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db-2, namespace: shop, labels: {app: db}}
spec: {containers: [{name: db, image: db}]}
status: {phase: Running, podIP: 10.1.0.3, podIPs: [{ip: 10.1.0.3}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: tcp, port: 5432}]}
";
    let mesh = mesh(headless);
    let labels =
        |name: &str| json!({"LABELS": {"app": "db", "service.istio.io/canonical-name": name}});
    let one = proxy(&mesh, "sidecar", "10.1.0.2", &labels("one"));
    let two = proxy(&mesh, "sidecar", "10.1.0.3", &labels("two"));
    assert_eq!(one.view_key(&mesh), two.view_key(&mesh));
    let shared = |p: &Proxy| {
        listener::outbound(&mesh, p)
            .into_iter()
            .map(|s| s.resource)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        shared(&one),
        shared(&two),
        "proxies of one view share these to the byte"
    );
    let all = listener::build(&mesh, &one);
    assert!(!names(&all).contains(&"10.1.0.2_5432"));
    assert!(names(&all).contains(&"10.1.0.3_5432"));
    assert!(
        names(&listener::own(&mesh, &one)).contains(&"0.0.0.0_80"),
        "its spans carry the workload's name"
    );
}

#[test]
fn without_interception_listeners_bind_the_loopback_address() {
    let mesh = mesh("");
    let proxy = proxy(
        &mesh,
        "sidecar",
        "10.1.0.1",
        &json!({"INTERCEPTION_MODE": "NONE", "LABELS": {"app": "web"}}),
    );
    let all = listener::build(&mesh, &proxy);
    assert_eq!(names(&all), ["127.0.0.1_80"]);
    let web = find(&all, "127.0.0.1_80");
    assert_eq!(web.get("bindToPort"), None);
    assert_eq!(
        web["filterChains"][0].get("filterChainMatch"),
        None,
        "nobody else uses the port"
    );
}

#[test]
fn a_plain_envoy_gets_none_of_istios_filters() {
    let mesh = mesh("");
    let proxy = proxy(
        &mesh,
        "sidecar",
        "10.1.0.1",
        &json!({"ISTIO_FILTERS": "false", "LABELS": {"app": "web"}}),
    );
    for resource in listener::build(&mesh, &proxy) {
        let text = proto::json::any_to_value(&resource.any()).to_string();
        for name in ["istio.metadata_exchange", "istio.alpn\"", "istio.stats"] {
            assert!(!text.contains(name), "{}: {name}", resource.name);
        }
    }
}

#[test]
fn resources_know_where_they_come_from() {
    let mesh = mesh(
        r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec: {hosts: [web], http: [{route: [{destination: {host: web}}]}]}
",
    );
    let proxy = sidecar(&mesh);
    let routes = route::build(&mesh, &proxy, &["80".to_owned()]);
    let from: Vec<_> = routes[0].from.iter().map(ToString::to_string).collect();
    assert!(
        from.contains(&"VirtualService shop/web (shop.yaml:18)".to_owned()),
        "{from:?}"
    );
    let listeners = listener::build(&mesh, &proxy);
    let web = listeners.iter().find(|l| l.name == "0.0.0.0_80").unwrap();
    assert_eq!(web.from[0].to_string(), "Service shop/web (shop.yaml:12)");
}

#[test]
fn an_unknown_route_name_is_answered_with_nothing_in_it() {
    let mesh = mesh("");
    let routes = routes_of(&mesh, &sidecar(&mesh), "nonsense");
    assert_eq!(routes["name"], "nonsense");
    assert_eq!(routes.get("virtualHosts"), None);
    let unknown_port = routes_of(&mesh, &sidecar(&mesh), "4711");
    assert_eq!(unknown_port["virtualHosts"][0]["name"], "allow_any");
    let gone = routes_of(&mesh, &gateway(&mesh), "http.8080");
    assert_eq!(gone.get("virtualHosts"), None);
}

const GATEWAY: &str = r"
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gw, namespace: shop}
spec:
  selector: {istio: gw}
  servers:
  - {port: {number: 9443, name: tls, protocol: TLS}, hosts: [pass.com], tls: {mode: PASSTHROUGH}}
  - {port: {number: 9443, name: term, protocol: TLS}, hosts: [term.com], tls: {mode: ISTIO_MUTUAL}}
  - {port: {number: 9444, name: named, protocol: HTTPS}, name: mine, hosts: [n.com], tls: {mode: SIMPLE, credentialName: c}}
  - {port: {number: 9443, name: twice, protocol: HTTPS}, hosts: [pass.com], tls: {mode: SIMPLE, credentialName: c}}
  - {port: {number: 7000, name: tcp, protocol: TCP}, hosts: ['*']}
  - {port: {number: 8080, name: http, protocol: HTTP}, hosts: ['a.com', 'other/b.com']}
  - {port: {number: 8080, name: clash, protocol: TCP}, hosts: ['*']}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: l4, namespace: shop}
spec:
  hosts: [pass.com, term.com]
  gateways: [gw]
  tls: [{match: [{port: 9443, sniHosts: [pass.com]}], route: [{destination: {host: web, port: {number: 80}}}]}]
  tcp:
  - {match: [{port: 9443}], route: [{destination: {host: web, port: {number: 80}}}]}
  - {match: [{port: 7000}], route: [{destination: {host: web, port: {number: 80}}, weight: 1}, {destination: {host: other, port: {number: 81}}, weight: 3}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: first, namespace: shop}
spec: {hosts: [a.com, b.com], gateways: [gw], http: [{name: all, route: [{destination: {host: web}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: second, namespace: shop}
spec: {hosts: [a.com], gateways: [gw], http: [{name: some, match: [{uri: {prefix: /x}}], route: [{destination: {host: web}}]}]}
";

/// Each of a tenant's weights is legal; their sum would make proxies refuse all routes of the port.
#[test]
fn weights_of_a_route_stay_within_what_a_proxy_takes() {
    let most = i32::MAX;
    let split = |weights: [i32; 3]| {
        let mut gateway = GATEWAY.replace(
            "{name: all, route: [{destination: {host: web}}]}",
            &format!(
                "{{name: all, route: [{{destination: {{host: web}}, weight: {}}}, {{destination: {{host: other, port: {{number: 81}}}}, weight: {}}}, \
                 {{destination: {{host: away.com}}, weight: {}}}]}}",
                weights[0], weights[1], weights[2]
            ),
        );
        gateway = gateway.replace("weight: 3}", &format!("weight: {most}}}, {{destination: {{host: web}}, weight: {most}}}, {{destination: {{host: web}}, weight: {most}}}"));
        let mesh = mesh(&gateway);
        let proxy = self::gateway(&mesh);
        let routes = routes_of(&mesh, &proxy, "http.8080");
        let hosts = routes["virtualHosts"].as_array().unwrap();
        let of = |route: &Value| route["route"]["weightedClusters"]["clusters"].clone();
        let all = hosts.iter().flat_map(|h| h["routes"].as_array().unwrap());
        let clusters = all.map(of).find(|c| !c.is_null()).unwrap();
        let tcp = listener_of(&mesh, &proxy, "0.0.0.0_7000");
        let tcp =
            &tcp["filterChains"][0]["filters"][0]["typedConfig"]["weightedClusters"]["clusters"];
        [clusters, tcp.clone()].map(|list| {
            let of = |c: &Value| c["weight"].as_u64().unwrap();
            list.as_array()
                .unwrap()
                .iter()
                .map(of)
                .collect::<Vec<u64>>()
        })
    };
    let [http, tcp] = split([most, most, most]);
    for weights in [&http, &tcp] {
        assert!(
            weights.iter().sum::<u64>() <= u64::from(u32::MAX),
            "{weights:?}"
        );
    }
    assert!(http.iter().all(|w| *w == http[0]));
    // Who has next to nothing still has something.
    assert_eq!(tcp[0], 1);
    assert_eq!(split([80, 20, 1])[0], [80, 20, 1]);
}

#[test]
fn a_gateway_serves_tls_and_tcp_by_sni_and_port() {
    let mesh = mesh(GATEWAY);
    let proxy = gateway(&mesh);
    assert_eq!(
        names(&listener::build(&mesh, &proxy)),
        [
            "0.0.0.0_7000",
            "0.0.0.0_8080",
            "0.0.0.0_9443",
            "0.0.0.0_9444"
        ]
    );
    let tls = listener_of(&mesh, &proxy, "0.0.0.0_9443");
    let chains = tls["filterChains"].as_array().unwrap();
    let names: Vec<_> = chains
        .iter()
        .map(|c| c["filterChainMatch"]["serverNames"][0].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["pass.com", "term.com"],
        "the second server for pass.com is left out"
    );
    assert_eq!(chains[0].get("transportSocket"), None);
    let mutual = &chains[1]["transportSocket"]["typedConfig"];
    assert_eq!(mutual["requireClientCertificate"], true);
    assert_eq!(
        mutual["commonTlsContext"]["alpnProtocols"][0],
        "istio-peer-exchange"
    );
    assert_eq!(chains[1]["filters"][0]["name"], "istio.metadata_exchange");

    let tcp = listener_of(&mesh, &proxy, "0.0.0.0_7000");
    assert_eq!(
        tcp["filterChains"][0]["filters"][0]["typedConfig"]["weightedClusters"]["clusters"],
        json!([
            {"name": "outbound|80||web.shop.svc.cluster.local", "weight": 1},
            {"name": "outbound|81||other.shop.svc.cluster.local", "weight": 3}
        ])
    );
}

#[test]
fn a_rules_tunnel_is_asked_for_by_its_method() {
    let text = |policy: &str, subset: &str, route: &str| {
        format!(
            r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: db, namespace: shop}}
spec: {{hosts: [db.example], addresses: [10.97.0.1], ports: [{{number: 5432, name: tcp, protocol: TCP}}], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}]}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: db, namespace: shop}}
spec: {{host: db.example, trafficPolicy: {{{policy}}}, subsets: [{{name: s, labels: {{a: b}}{subset}}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: db, namespace: shop}}
spec: {{hosts: [db.example], tcp: [{{route: [{{destination: {{host: db.example{route}}}}}]}}]}}
"
        )
    };
    let tunneling = |text: &str| {
        let mesh = mesh(text);
        let listener = listener_of(&mesh, &sidecar(&mesh), "10.97.0.1_5432");
        let chains = listener["filterChains"].as_array().unwrap();
        let last = chains[0]["filters"].as_array().unwrap().last().unwrap();
        last["typedConfig"]["tunnelingConfig"].clone()
    };
    let tunnel = |protocol: &str| {
        format!("tunnel: {{{protocol}targetHost: proxied.example, targetPort: 5433}}")
    };
    let (post, connect) = (tunnel("protocol: POST, "), tunnel("protocol: CONNECT, "));
    let own = format!(", trafficPolicy: {{{connect}}}");
    let asked = json!({"hostname": "proxied.example:5433"});
    let posted = json!({"hostname": "proxied.example:5433", "usePost": true});
    for (policy, subset, route, expected) in [
        (&*post, "", "", &posted),
        (&*connect, "", "", &asked),
        (&*tunnel(""), "", "", &asked),
        // A subset has its own, or none.
        (&*post, &*own, ", subset: s", &asked),
        (&*post, "", ", subset: s", &Value::Null),
        (&*post, &*own, "", &posted),
    ] {
        assert_eq!(&tunneling(&text(policy, subset, route)), expected);
    }
}

#[test]
fn a_gateways_server_names_its_statistics() {
    let mesh = mesh(GATEWAY);
    let listener = listener_of(&mesh, &gateway(&mesh), "0.0.0.0_9444");
    let http = &listener["filterChains"][0]["filters"][0]["typedConfig"];
    assert_eq!(http["statPrefix"], "mine");
    assert_eq!(http["rds"]["routeConfigName"], "https.9444.named.gw.shop");
}

#[test]
fn a_pod_of_both_families_listens_in_both_for_what_it_calls() {
    let mesh = mesh("");
    let both = json!({"INSTANCE_IPS": "10.1.0.1,2001:db8::1", "LABELS": {"app": "web"}});
    let proxy = proxy(&mesh, "sidecar", "10.1.0.1", &both);
    let web = listener_of(&mesh, &proxy, "0.0.0.0_80");
    assert_eq!(
        web["additionalAddresses"],
        json!([{"address": {"socketAddress": {"address": "::", "portValue": 80}}}])
    );
    assert_eq!(
        listener_of(&mesh, &proxy, "virtualInbound").get("additionalAddresses"),
        None
    );
}

#[test]
fn a_gateways_virtual_services_of_one_host_are_joined() {
    let mesh = mesh(GATEWAY);
    let routes = routes_of(&mesh, &gateway(&mesh), "http.8080");
    let hosts = routes["virtualHosts"].as_array().unwrap();
    assert_eq!(
        hosts.len(),
        1,
        "b.com is only for VirtualServices of namespace other"
    );
    assert_eq!(hosts[0]["domains"], json!(["a.com"]));
    let order: Vec<_> = hosts[0]["routes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    assert_eq!(order, ["some", "all"], "what matches everything goes last");
}

#[test]
fn an_auto_passthrough_gateway_leads_by_the_cluster_in_the_sni() {
    let mesh = mesh(
        r"
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: east-west, namespace: shop}
spec:
  selector: {istio: gw}
  servers: [{port: {number: 15443, name: tls, protocol: TLS}, hosts: ['*.local'], tls: {mode: AUTO_PASSTHROUGH}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec: {host: web, subsets: [{name: v1, labels: {version: v1}}]}
",
    );
    let listener = listener_of(&mesh, &gateway(&mesh), "0.0.0.0_15443");
    let wanted = [
        "outbound_.80_._.web.shop.svc.cluster.local",
        "outbound_.80_.v1_.web.shop.svc.cluster.local",
    ];
    assert_eq!(targets(&listener), wanted);
    for (chain, name) in listener["filterChains"]
        .as_array()
        .unwrap()
        .iter()
        .zip(wanted)
    {
        assert_eq!(chain["filterChainMatch"]["serverNames"], json!([name]));
        assert_eq!(
            chain["filterChainMatch"]["applicationProtocols"]
                .as_array()
                .unwrap()
                .len(),
            5
        );
    }
}

#[test]
fn traces_of_a_gateway_go_where_telemetry_says() {
    let mesh = mesh(&format!(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    extensionProviders:
    - {{name: zip, zipkin: {{service: web.shop.svc.cluster.local, port: 80}}}}
    - {{name: gone, zipkin: {{service: nobody.com, port: 80}}}}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: all, namespace: istio-system}}
spec: {{tracing: [{{providers: [{{name: gone}}]}}]}}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: gw, namespace: shop}}
spec: {{selector: {{matchLabels: {{istio: gw}}}}, tracing: [{{providers: [{{name: zip}}], randomSamplingPercentage: 25}}]}}
---
{GATEWAY}"#
    ));
    let http = |proxy: &Proxy, name: &str| {
        let listener = listener_of(&mesh, proxy, name);
        listener["filterChains"][0]["filters"][0]["typedConfig"].clone()
    };
    let tracing = http(&gateway(&mesh), "0.0.0.0_8080")["tracing"].clone();
    assert_eq!(tracing["randomSampling"]["value"], 25.0);
    assert_eq!(tracing["spawnUpstreamSpan"], true);
    let collector = &tracing["provider"]["typedConfig"]["collectorService"]["httpUri"];
    assert_eq!(
        collector["cluster"],
        "outbound|80||web.shop.svc.cluster.local"
    );
    assert_eq!(
        collector["uri"],
        "http://web.shop.svc.cluster.local/api/v2/spans"
    );
    assert_eq!(
        http(&sidecar(&mesh), "0.0.0.0_80").get("tracing"),
        None,
        "a provider that is not there"
    );
}
