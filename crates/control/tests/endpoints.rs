//! Which endpoints a client is sent, how it prefers them, and how it speaks to them.

mod support;

use serde_json::{Value, json};
use support::*;

const A: &str = "outbound|80||a.one.svc.cluster.local";

fn client(mesh: &outrigger_control::model::Mesh) -> outrigger_control::model::Proxy {
    sidecar(mesh, "client", "one", "10.9.9.9", json!({"app": "client"}))
}

/// Service a with pods in eu-1 (10.0.0.1), eu-2 (10.0.0.2) and us-1 (10.0.0.3).
fn spread() -> String {
    nodes()
        + &service("a", "one", "10.0.0.1")
        + &pod("a", "one", "10.0.0.2", "v2", "node-b", true)
        + &pod("a", "one", "10.0.0.3", "v3", "node-c", true)
}

fn rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: r, namespace: one}}\nspec: {{host: a, trafficPolicy: {policy}}}\n---\n"
    )
}

fn priorities(yaml: &str) -> Vec<(String, u64)> {
    let mesh = mesh(yaml);
    addresses(&endpoints_of(&mesh, &client(&mesh), A))
}

fn ranked(list: &[(&str, u64)]) -> Vec<(String, u64)> {
    list.iter().map(|(a, p)| ((*a).to_owned(), *p)).collect()
}

#[test]
fn nearer_places_come_first_once_bad_endpoints_are_found_out() {
    let flat = ranked(&[("10.0.0.1", 0), ("10.0.0.2", 0), ("10.0.0.3", 0)]);
    assert_eq!(priorities(&spread()), flat);
    let near = ranked(&[("10.0.0.1", 0), ("10.0.0.2", 1), ("10.0.0.3", 2)]);
    assert_eq!(
        priorities(&(spread() + &rule("{outlierDetection: {}}"))),
        near
    );
    let off = "{outlierDetection: {}, loadBalancer: {localityLbSetting: {enabled: false}}}";
    assert_eq!(priorities(&(spread() + &rule(off))), flat);
}

#[test]
fn failover_names_the_next_region_and_labels_name_the_next_endpoints() {
    let other = "{outlierDetection: {}, loadBalancer: {localityLbSetting: {failover: [{from: eu, to: asia}]}}}";
    let far = ranked(&[("10.0.0.1", 0), ("10.0.0.2", 1), ("10.0.0.3", 2)]);
    assert_eq!(priorities(&(spread() + &rule(other))), far);
    let labels = "{outlierDetection: {}, loadBalancer: {localityLbSetting: {failoverPriority: ['version=v3', 'topology.kubernetes.io/region']}}}";
    // The label first: v3 shares it (though not the region), the others share nothing.
    let by_label = ranked(&[("10.0.0.1", 1), ("10.0.0.2", 1), ("10.0.0.3", 0)]);
    assert_eq!(priorities(&(spread() + &rule(labels))), by_label);
}

#[test]
fn shares_by_place_leave_unnamed_places_out() {
    let policy = "{loadBalancer: {localityLbSetting: {distribute: [{from: 'eu/*', to: {'eu/eu-1/*': 80, 'us/*': 20}}]}}}";
    let mesh = mesh(&(spread() + &rule(policy)));
    let got = endpoints_of(&mesh, &client(&mesh), A);
    assert_eq!(addresses(&got), ranked(&[("10.0.0.1", 0), ("10.0.0.3", 0)]));
    let weights: Vec<_> = got["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["loadBalancingWeight"].clone())
        .collect();
    assert_eq!(weights, [json!(80), json!(1), json!(20)]);
    let cluster = cluster_of(&mesh, &client(&mesh), A);
    assert_eq!(
        cluster["commonLbConfig"]["localityWeightedLbConfig"],
        json!({})
    );
}

#[test]
fn traffic_distribution_prefers_the_zone_and_the_node() {
    let of = |value: &str| {
        spread().replace(
            "  clusterIP: 10.96.0.1\n",
            &format!("  clusterIP: 10.96.0.1\n  trafficDistribution: {value}\n"),
        )
    };
    assert_eq!(
        priorities(&of("PreferSameZone")),
        ranked(&[("10.0.0.1", 0), ("10.0.0.2", 1), ("10.0.0.3", 2)])
    );
    let local = spread().replace(
        "  clusterIP: 10.96.0.1\n",
        "  clusterIP: 10.96.0.1\n  internalTrafficPolicy: Local\n",
    );
    assert_eq!(priorities(&local), ranked(&[("10.0.0.1", 0)]));
}

#[test]
fn unready_endpoints_are_sent_as_such_unless_a_minimum_of_health_is_asked_for() {
    let yaml =
        service("a", "one", "10.0.0.1") + &pod("a", "one", "10.0.0.2", "v2", "node-a", false);
    let mesh_ = mesh(&yaml);
    let got = endpoints_of(&mesh_, &client(&mesh_), A);
    let states: Vec<_> = got["endpoints"][0]["lbEndpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["healthStatus"].clone())
        .collect();
    assert_eq!(states, [json!("HEALTHY"), json!("UNHEALTHY")]);
    let strict = yaml + &rule("{outlierDetection: {minHealthPercent: 50}}");
    assert_eq!(priorities(&strict), ranked(&[("10.0.0.1", 0)]));
}

#[test]
fn a_slices_conditions_decide() {
    let slice = "apiVersion: v1
kind: Service
metadata: {name: a, namespace: one}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, namespace: one, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.0.0.1], conditions: {ready: true}}
- {addresses: [10.0.0.2], conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [10.0.0.3], conditions: {ready: false, serving: false, terminating: false}}
- {addresses: [10.0.0.4], conditions: {ready: true}, targetRef: {kind: Pod, name: unknown, namespace: one}}
";
    assert_eq!(
        priorities(slice),
        ranked(&[("10.0.0.1", 0), ("10.0.0.3", 0)])
    );
    let sticky = slice.replacen(
        "{name: a, namespace: one}",
        "{name: a, namespace: one, labels: {istio.io/persistent-session: cookie}}",
        1,
    );
    assert_eq!(priorities(&sticky).len(), 3);
}

/// What the API server takes, and no proxy would: one such resource must not keep its neighbours from changing.
#[test]
fn what_a_slice_holds_that_is_no_endpoint_spoils_nothing() {
    let yaml = "apiVersion: v1
kind: Service
metadata: {name: a, namespace: one}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, namespace: one, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: other, port: 1}]
endpoints:
- {addresses: [10.0.0.1]}
- {addresses: [nowhere, 10.0.0.999, '', '10.0.0.2']}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-2, namespace: one, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http}]
endpoints: [{addresses: [10.0.0.3]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-3, namespace: one, labels: {kubernetes.io/service-name: a}}
addressType: FQDN
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [a.example.com]}]
";
    assert_eq!(
        priorities(yaml),
        ranked(&[("10.0.0.1", 0), ("10.0.0.2", 0)])
    );
}

#[test]
fn weights_of_many_entries_stay_within_what_a_proxy_takes() {
    let entry = |name: &str, ip: &str, place: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: one}}\n\
             spec: {{address: {ip}, labels: {{app: a}}, locality: {place}, weight: 4294967295}}\n---\n"
        )
    };
    let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: one}\n\
                spec: {clusterIP: 10.96.0.1, selector: {app: a}, ports: [{name: http, port: 80}]}\n---\n"
        .to_owned()
        + &entry("e1", "10.50.0.1", "eu/eu-1")
        + &entry("e2", "10.50.0.2", "eu/eu-1")
        + &entry("e3", "10.50.0.3", "us/us-1");
    let mesh = mesh(&yaml);
    let got = endpoints_of(&mesh, &client(&mesh), A);
    let places = got["endpoints"].as_array().unwrap();
    let weights = |list: &[Value]| -> Vec<u64> {
        let of = |v: &Value| v["loadBalancingWeight"].as_u64().unwrap();
        list.iter().map(of).collect()
    };
    let fits = |list: &[Value]| weights(list).iter().sum::<u64>() <= u64::from(u32::MAX);
    assert_eq!(places.len(), 2);
    assert!(fits(places), "{places:?}");
    for place in places {
        let own = place["lbEndpoints"].as_array().unwrap();
        assert!(fits(own), "{own:?}");
        let all = weights(own);
        assert!(all.iter().all(|w| *w == all[0]), "{all:?}");
    }
}

#[test]
fn pods_whose_nodes_have_only_not_reported_count_where_no_other_is_left() {
    // What the node controller makes of a pod: `Ready` alone becomes False.
    let pod = |name: &str, containers: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: one}}\nspec: {{containers: [{{name: app}}]{more}}}\nstatus: {{phase: Running, conditions: [{{type: Ready, status: 'False'}}, {{type: ContainersReady, status: '{containers}'}}, {{type: shut, status: 'False'}}]}}\n---\n"
        )
    };
    let slice = |first_is_ready: bool| {
        format!(
            "apiVersion: v1
kind: Service
metadata: {{name: a, namespace: one}}
spec: {{clusterIP: 10.96.0.1, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: a-1, namespace: one, labels: {{kubernetes.io/service-name: a}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints:
- {{addresses: [10.0.0.1], conditions: {{ready: {first_is_ready}, serving: {first_is_ready}, terminating: false}}, targetRef: {{kind: Pod, name: unheard, namespace: one}}}}
- {{addresses: [10.0.0.2], conditions: {{ready: false, serving: false, terminating: false}}, targetRef: {{kind: Pod, name: broken, namespace: one}}}}
- {{addresses: [10.0.0.3], conditions: {{ready: false, serving: false, terminating: false}}, targetRef: {{kind: Pod, name: gated, namespace: one}}}}
- {{addresses: [10.0.0.4], conditions: {{ready: false, serving: true, terminating: true}}, targetRef: {{kind: Pod, name: leaving, namespace: one}}}}
- {{addresses: [10.0.0.5], conditions: {{ready: false, serving: false, terminating: false}}, targetRef: {{kind: Pod, name: other, namespace: one}}}}
---
"
        ) + &pod("unheard", "True", "")
            + &pod("broken", "False", "")
            + &pod("gated", "True", ", readinessGates: [{conditionType: shut}]")
            + &pod("leaving", "True", "")
            + &pod("other", "True", "")
    };
    let healthy = |yaml: &str| -> Vec<String> {
        let mesh = mesh(yaml);
        let got = endpoints_of(&mesh, &client(&mesh), A);
        let all = got["endpoints"].as_array().unwrap().iter();
        let all = all.flat_map(|p| p["lbEndpoints"].as_array().unwrap());
        all.filter(|e| e["healthStatus"] == "HEALTHY")
            .map(|e| {
                let address = &e["endpoint"]["address"]["socketAddress"]["address"];
                address.as_str().unwrap().to_owned()
            })
            .collect()
    };
    assert_eq!(healthy(&slice(false)), ["10.0.0.1", "10.0.0.5"]);
    // One that is known to be ready is enough.
    assert_eq!(healthy(&slice(true)), ["10.0.0.1"]);
}

fn peer_authentication(namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )
}

/// Whether cluster and endpoint are set up for mutual TLS.
fn mtls(yaml: &str) -> (bool, bool) {
    let mesh = mesh(yaml);
    let cluster = cluster_of(&mesh, &client(&mesh), A);
    let endpoint = endpoints_of(&mesh, &client(&mesh), A);
    let meta = &endpoint["endpoints"][0]["lbEndpoints"][0]["metadata"]["filterMetadata"];
    (
        cluster["transportSocketMatches"].is_array() || cluster["transportSocket"].is_object(),
        meta["envoy.transport_socket_match"]["tlsMode"] == "istio",
    )
}

#[test]
fn mutual_tls_follows_what_servers_take() {
    let base = service("a", "one", "10.0.0.1");
    assert_eq!(mtls(&base), (true, true));
    assert_eq!(
        mtls(&(base.clone() + &peer_authentication("one", "{mtls: {mode: DISABLE}}"))),
        (false, false)
    );
    // A workload's own policy is known for each endpoint only.
    let own = peer_authentication(
        "one",
        "{selector: {matchLabels: {app: a}}, mtls: {mode: DISABLE}}",
    );
    assert_eq!(mtls(&(base.clone() + &own)), (true, false));
    let port = peer_authentication(
        "one",
        "{selector: {matchLabels: {app: a}}, portLevelMtls: {'8080': {mode: DISABLE}}}",
    );
    assert_eq!(mtls(&(base.clone() + &port)), (true, false));
    assert_eq!(
        mtls(&(base.clone() + &rule("{tls: {mode: DISABLE}}"))),
        (false, false)
    );
    assert_eq!(
        mtls(&(mesh_config("enableAutoMtls: false") + &base)),
        (false, true)
    );
    let explicit =
        mesh_config("enableAutoMtls: false") + &base + &rule("{tls: {mode: ISTIO_MUTUAL}}");
    assert_eq!(mtls(&explicit), (true, true));
}

#[test]
fn a_rules_own_tls_names_its_files_and_checks_the_host() {
    let yaml = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: one}
spec: {hosts: [api.example.com], location: MESH_EXTERNAL, resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: r, namespace: one}
spec: {host: api.example.com, trafficPolicy: {tls: {mode: MUTUAL, clientCertificate: /c/crt, privateKey: /c/key, caCertificates: /c/ca}}}
";
    let mesh = mesh(yaml);
    let cluster = cluster_of(&mesh, &client(&mesh), "outbound|80||api.example.com");
    let tls = &cluster["transportSocket"]["typedConfig"]["commonTlsContext"];
    assert_eq!(
        tls["tlsCertificateSdsSecretConfigs"][0]["name"],
        "file-cert:/c/crt~/c/key"
    );
    assert_eq!(
        tls["combinedValidationContext"]["validationContextSdsSecretConfig"]["name"],
        "file-root:/c/ca"
    );
    let options = &cluster["typedExtensionProtocolOptions"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
    assert_eq!(
        options["upstreamHttpProtocolOptions"],
        json!({"autoSni": true, "autoSanValidation": true})
    );
    assert_eq!(
        cluster["metadata"]["filterMetadata"]["istio"]["alpn_override"],
        "false"
    );
}

#[test]
fn a_dns_entry_holds_its_endpoints_and_is_left_out_without_any() {
    let entry = |more: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e, namespace: one}}\nspec: {{hosts: [x.example.com], resolution: DNS, ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}], {more}}}\n"
        )
    };
    let at = |yaml: &str| {
        let mesh = mesh(yaml);
        cluster_of(&mesh, &client(&mesh), "outbound|80||x.example.com")
    };
    let own = at(&entry("location: MESH_EXTERNAL"));
    let address = &own["loadAssignment"]["endpoints"][0]["lbEndpoints"][0]["endpoint"]["address"]["socketAddress"];
    assert_eq!(
        *address,
        json!({"address": "x.example.com", "portValue": 8080})
    );
    let listed = at(&entry(
        "endpoints: [{address: a.example.com}, {address: b.example.com, ports: {http: 81}}]",
    ));
    let list = listed["loadAssignment"]["endpoints"][0]["lbEndpoints"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(list.len(), 2);
    assert_eq!(
        list[1]["endpoint"]["address"]["socketAddress"]["portValue"],
        81
    );
    assert_eq!(
        at(&entry("workloadSelector: {labels: {app: none}}")),
        Value::Null
    );
}

#[test]
fn an_entry_selects_pods_and_workload_entries_and_a_service_selects_workload_entries() {
    let yaml = service("a", "one", "10.0.0.1")
        + "apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: one}
spec: {address: 10.50.0.1, labels: {app: a, version: v9}, serviceAccount: vm, weight: 3}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: one}
spec: {hosts: [e.mesh], location: MESH_INTERNAL, resolution: STATIC, workloadSelector: {labels: {app: a}}, ports: [{number: 9, name: tcp, protocol: TCP, targetPort: 8080}]}
";
    let mesh = mesh(&yaml);
    let got = endpoints_of(&mesh, &client(&mesh), "outbound|9||e.mesh");
    let mut list = addresses(&got);
    list.sort();
    assert_eq!(list, ranked(&[("10.0.0.1", 0), ("10.50.0.1", 0)]));
    assert_eq!(addresses(&endpoints_of(&mesh, &client(&mesh), A)).len(), 2);
    let cluster = cluster_of(&mesh, &client(&mesh), "outbound|9||e.mesh");
    let names = &cluster["transportSocketMatches"][0]["transportSocket"]["typedConfig"]["commonTlsContext"]
        ["combinedValidationContext"]["defaultValidationContext"]["matchSubjectAltNames"];
    let names: Vec<_> = names
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n["exact"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "spiffe://cluster.local/ns/one/sa/a",
            "spiffe://cluster.local/ns/one/sa/vm"
        ]
    );
}

#[test]
fn an_entry_takes_over_no_service_of_another_namespace() {
    let entry = |namespace: &str| {
        format!(
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: grab, namespace: {namespace}, creationTimestamp: \"2020-01-01T00:00:00Z\"}}
spec: {{hosts: [a.one.svc.cluster.local], resolution: STATIC, location: MESH_INTERNAL, endpoints: [{{address: 10.66.0.1}}], ports: [{{number: 80, name: http, protocol: HTTP}}]}}
---
"
        )
    };
    // Before and after the service's namespace by name.
    let yaml = entry("evil") + &service("a", "one", "10.0.0.1") + &entry("worse");
    let mesh = mesh(&yaml);
    for namespace in ["one", "two", "zoo"] {
        let client = sidecar(
            &mesh,
            "client",
            namespace,
            "10.9.9.9",
            json!({"app": "client"}),
        );
        let got = addresses(&endpoints_of(&mesh, &client, A));
        assert_eq!(got, ranked(&[("10.0.0.1", 0)]), "{namespace}");
    }
    // Its own namespace has what it asked for.
    let own = sidecar(
        &mesh,
        "client",
        "evil",
        "10.9.9.9",
        json!({"app": "client"}),
    );
    let got = addresses(&endpoints_of(&mesh, &own, A));
    assert_eq!(got, ranked(&[("10.66.0.1", 0)]));
}

#[test]
fn unknown_names_get_an_empty_assignment() {
    let mesh = mesh(&service("a", "one", "10.0.0.1"));
    for name in [
        "outbound|81||a.one.svc.cluster.local",
        "outbound|80||b.one.svc.cluster.local",
        "nonsense",
    ] {
        assert_eq!(
            addresses(&endpoints_of(&mesh, &client(&mesh), name)),
            [],
            "{name}"
        );
    }
}

#[test]
fn inbound_clusters_follow_named_ports_and_the_inbound_policy() {
    let yaml = service("a", "one", "10.0.0.1").replace("targetPort: 8080", "targetPort: web");
    let at = |yaml: &str, name: &str| {
        let mesh = mesh(yaml);
        let own = sidecar(&mesh, "a-v1", "one", "10.0.0.1", json!({"app": "a"}));
        cluster_of(&mesh, &own, name)
    };
    assert_eq!(at(&yaml, "inbound|8080||")["type"], "ORIGINAL_DST");
    let local = mesh_config("inboundTrafficPolicy: {mode: LOCALHOST}") + &yaml;
    let cluster = at(&local, "inbound|8080||");
    assert_eq!(cluster["type"], "STATIC");
    assert_eq!(
        cluster["loadAssignment"]["endpoints"][0]["lbEndpoints"][0]["endpoint"]["address"]["socketAddress"],
        json!({"address": "127.0.0.1", "portValue": 8080})
    );
    assert_eq!(cluster["upstreamBindConfig"], Value::Null);
}

#[test]
fn a_gateway_that_passes_tls_on_has_clusters_by_sni() {
    let yaml = service("a", "one", "10.0.0.1")
        + "apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g, namespace: istio-system}
spec: {selector: {istio: eastwest}, servers: [{port: {number: 15443, name: tls, protocol: TLS}, hosts: ['*.local'], tls: {mode: AUTO_PASSTHROUGH}}]}
";
    let mesh = mesh(&yaml);
    let name = "outbound_.80_._.a.one.svc.cluster.local";
    let at = |labels: Value| {
        let gateway = proxy(
            &mesh,
            "router",
            "gw",
            "istio-system",
            "10.9.9.8",
            labels,
            json!({}),
        );
        cluster_of(&mesh, &gateway, name)
    };
    let cluster = at(json!({"istio": "eastwest"}));
    assert_eq!(cluster["edsClusterConfig"]["serviceName"], name);
    assert_eq!(cluster["transportSocketMatches"], Value::Null);
    assert_eq!(at(json!({"istio": "other"})), Value::Null);
}

#[test]
fn a_machine_serves_where_its_workload_entry_says() {
    let yaml = service("a", "one", "10.0.0.1")
        + "apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: one}
spec: {address: 10.50.0.1, labels: {app: a}, ports: {http: 9999}, serviceAccount: vm}
";
    let mesh = mesh(&yaml);
    let machine = sidecar(&mesh, "vm", "one", "10.50.0.1", json!({}));
    assert_eq!(
        cluster_of(&mesh, &machine, "inbound|9999||")["type"],
        "ORIGINAL_DST"
    );
    assert_eq!(cluster_of(&mesh, &machine, "inbound|8080||"), Value::Null);
}
