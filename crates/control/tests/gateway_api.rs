//! Gateway API: which requests reach which backend through which listener, and what is said of each object.

mod support;

use std::sync::Arc;

use config::ObjectKey;
use outrigger_control::{
    gateway_api::{deploy, status},
    listener,
    model::{Mesh, Node, Proxy, Settings},
    push::Change,
    route, secret,
};
use proto::envoy::config::core::v3::Node as EnvoyNode;
use serde_json::{Value, json};

const GATEWAY_POD: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: infra}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: shop}}
---
apiVersion: v1
kind: Namespace
metadata: {name: other}
---
apiVersion: v1
kind: Service
metadata: {name: gw-istio, namespace: infra}
spec:
  clusterIP: 10.96.9.9
  selector: {gateway.networking.k8s.io/gateway-name: gw}
  ports: [{name: http, port: 80, targetPort: 80}, {name: https, port: 443, targetPort: 443}, {name: tcp, port: 9000, targetPort: 9000}]
---
apiVersion: v1
kind: Pod
metadata: {name: gw-istio-1, namespace: infra, labels: {gateway.networking.k8s.io/gateway-name: gw}}
spec: {serviceAccountName: gw-istio, containers: [{name: istio-proxy}]}
status: {phase: Running, podIP: 10.1.9.9, conditions: [{type: Ready, status: 'True'}]}
---
";

fn gateway(listeners: &str) -> String {
    format!(
        "{GATEWAY_POD}apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: gw, namespace: infra, generation: 3}}\nspec:\n  gatewayClassName: istio\n  listeners: {listeners}\n---\n"
    )
}

fn http_route(name: &str, namespace: &str, spec: &str) -> String {
    object("HTTPRoute", name, namespace, spec)
}

fn object(kind: &str, name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )
}

fn backends() -> String {
    ["a", "b"]
        .iter()
        .enumerate()
        .map(|(i, name)| support::service(name, "shop", &format!("10.1.0.{}", i + 1)))
        .collect::<String>()
        + &support::service("far", "other", "10.1.0.7")
}

fn router(mesh: &Mesh) -> Proxy {
    let node = json!({
        "id": "router~10.1.9.9~gw-istio-1.infra~infra.svc.cluster.local",
        "metadata": {"NAMESPACE": "infra", "SERVICE_ACCOUNT": "gw-istio", "ISTIO_VERSION": "1.30.0",
            "LABELS": {"gateway.networking.k8s.io/gateway-name": "gw"}, "INSTANCE_IPS": "10.1.9.9"},
    });
    let node: EnvoyNode = proto::json::from_value(&node).unwrap();
    Proxy::new(mesh, Arc::new(Node::parse(&node).unwrap()))
}

/// Host, match and action of every route of a route configuration: `HOST MATCH -> ACTION`.
fn routes(mesh: &Mesh, name: &str) -> Vec<String> {
    let made = route::build(mesh, &router(mesh), &[name.to_owned()]);
    let config = proto::json::any_to_value(&made[0].any());
    let mut out = Vec::new();
    for host in config["virtualHosts"].as_array().into_iter().flatten() {
        let domain = host["domains"][0].as_str().unwrap();
        for route in host["routes"].as_array().into_iter().flatten() {
            out.push(format!(
                "{domain} {} -> {}",
                shown_match(&route["match"]),
                shown_action(route)
            ));
        }
    }
    out
}

fn shown_match(m: &Value) -> String {
    let mut out = ["path", "pathSeparatedPrefix", "prefix"]
        .iter()
        .find_map(|k| Some(format!("{k}={}", m[*k].as_str()?)))
        .or_else(|| Some(format!("regex={}", m["safeRegex"]["regex"].as_str()?)))
        .unwrap();
    for header in m["headers"].as_array().into_iter().flatten() {
        out += &format!(" {}", header["name"].as_str().unwrap());
    }
    for query in m["queryParameters"].as_array().into_iter().flatten() {
        out += &format!(" ?{}", query["name"].as_str().unwrap());
    }
    out
}

fn shown_action(route: &Value) -> String {
    if let Some(status) = route["directResponse"]["status"].as_u64() {
        return format!("{status}");
    }
    if route["redirect"].is_object() {
        return format!(
            "redirect {}",
            route["redirect"]["responseCode"].as_str().unwrap_or("301")
        );
    }
    let action = &route["route"];
    match action["cluster"].as_str() {
        Some(cluster) => cluster.to_owned(),
        None => action["weightedClusters"]["clusters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| format!("{}={}", c["name"].as_str().unwrap(), c["weight"]))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

/// `TYPE=STATUS/REASON` of conditions.
fn conditions(status: &Value) -> Vec<String> {
    let all = status["conditions"].as_array().into_iter().flatten();
    all.map(|c| {
        let text = |f: &str| c[f].as_str().unwrap_or_default().to_owned();
        format!("{}={}/{}", text("type"), text("status"), text("reason"))
    })
    .collect()
}

fn said(mesh: &Mesh, kind: config::Kind, namespace: &str, name: &str) -> Value {
    status::all(mesh)
        .remove(&ObjectKey::new(kind, namespace, name))
        .unwrap_or_default()
}

const OPEN: &str =
    "[{name: http, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}]";
const TO_A: &str = "backendRefs: [{name: a, port: 80}]";

#[test]
fn the_most_specific_match_wins_whichever_route_it_is_of() {
    let yaml = gateway(OPEN)
        + &backends()
        + &http_route(
            "one",
            "shop",
            &format!(
                "{{parentRefs: [{{name: gw, namespace: infra}}], hostnames: [x.example], rules: [\
            {{matches: [{{path: {{value: /a}}}}, {{path: {{value: /a}}, method: GET}}], {TO_A}}},\
            {{{TO_A}}},\
            {{matches: [{{path: {{value: /a}}, queryParams: [{{name: q, value: \"1\"}}]}}], {TO_A}}},\
            {{matches: [{{path: {{type: RegularExpression, value: /a.*}}}}], {TO_A}}}]}}"
            ),
        )
        + &http_route(
            "two",
            "shop",
            "{parentRefs: [{name: gw, namespace: infra}], hostnames: [x.example], rules: [\
            {matches: [{path: {type: Exact, value: /a}}, {path: {value: /a/long}}, {path: {value: /a}, headers: [{name: h, value: v}]}], backendRefs: [{name: b, port: 80}]}]}",
        );
    let mesh = support::mesh(&yaml);
    let (a, b) = (
        "outbound|80||a.shop.svc.cluster.local",
        "outbound|80||b.shop.svc.cluster.local",
    );
    assert_eq!(
        routes(&mesh, "http.80"),
        [
            format!("x.example path=/a -> {b}"),
            format!("x.example pathSeparatedPrefix=/a/long -> {b}"),
            format!("x.example pathSeparatedPrefix=/a :method -> {a}"),
            format!("x.example pathSeparatedPrefix=/a h -> {b}"),
            format!("x.example pathSeparatedPrefix=/a ?q -> {a}"),
            format!("x.example pathSeparatedPrefix=/a -> {a}"),
            // Prefixes go before regexes, as with istiod: what `/` takes never gets to one.
            format!("x.example prefix=/ -> {a}"),
        ]
    );
}

#[test]
fn hosts_are_those_of_both_and_of_the_best_listener() {
    let listeners = "[{name: all, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}},\
        {name: wild, port: 80, protocol: HTTP, hostname: \"*.example.com\", allowedRoutes: {namespaces: {from: All}}},\
        {name: one, port: 80, protocol: HTTP, hostname: very.specific.com, allowedRoutes: {namespaces: {from: All}}}]";
    let yaml = gateway(listeners)
        + &backends()
        + &http_route(
            "r",
            "shop",
            &format!(
                "{{parentRefs: [{{name: gw, namespace: infra, sectionName: wild}}], hostnames: [\"*.com\", a.example.com, b.example.org], rules: [{{{TO_A}}}]}}"
            ),
        )
        + &http_route(
            "s",
            "shop",
            &format!(
                "{{parentRefs: [{{name: gw, namespace: infra, sectionName: all}}], hostnames: [very.specific.com, c.example.com, free.org], rules: [{{{TO_A}}}]}}"
            ),
        );
    let mesh = support::mesh(&yaml);
    let hosts: Vec<String> = routes(&mesh, "http.80")
        .iter()
        .map(|r| r.split(' ').next().unwrap().to_owned())
        .collect();
    // One virtual host for each host: of `*.com` only what the listener has; nothing of what other listeners have.
    assert_eq!(hosts, ["*.example.com", "a.example.com", "free.org"]);
    let parents = said(&mesh, config::Kind::HttpRoute, "shop", "r");
    assert_eq!(
        conditions(&parents["parents"][0]),
        ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs"]
    );
}

#[test]
fn listeners_say_which_routes_may_attach() {
    let listeners = "[{name: same, port: 80, protocol: HTTP, hostname: same.example},\
        {name: chosen, port: 80, protocol: HTTP, hostname: chosen.example, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: shop}}}}},\
        {name: grpc, port: 80, protocol: HTTP, hostname: grpc.example, allowedRoutes: {namespaces: {from: All}, kinds: [{kind: GRPCRoute}]}}]";
    let parent = "parentRefs: [{name: gw, namespace: infra}]";
    let to = |section: &str| {
        format!("parentRefs: [{{name: gw, namespace: infra, sectionName: {section}}}]")
    };
    let yaml = gateway(listeners)
        + &backends()
        + &http_route(
            "same",
            "shop",
            &format!("{{{}, rules: [{{{TO_A}}}]}}", to("same")),
        )
        + &http_route(
            "chosen",
            "shop",
            &format!("{{{}, rules: [{{{TO_A}}}]}}", to("chosen")),
        )
        + &http_route(
            "outsider",
            "other",
            &format!("{{{}, rules: [{{}}]}}", to("chosen")),
        )
        + &http_route(
            "kind",
            "shop",
            &format!("{{{}, rules: [{{{TO_A}}}]}}", to("grpc")),
        )
        + &http_route(
            "nowhere",
            "shop",
            &format!("{{{}, rules: [{{{TO_A}}}]}}", to("missing")),
        )
        + &http_route(
            "host",
            "shop",
            &format!("{{{parent}, hostnames: [no.example], rules: [{{{TO_A}}}]}}"),
        );
    let mesh = support::mesh(&yaml);
    let accepted = |namespace: &str, name: &str| {
        let all = said(&mesh, config::Kind::HttpRoute, namespace, name);
        assert_eq!(
            all["parents"][0]["controllerName"],
            "istio.io/gateway-controller"
        );
        conditions(&all["parents"][0])[0].clone()
    };
    assert_eq!(
        accepted("shop", "same"),
        "Accepted=False/NotAllowedByListeners"
    );
    assert_eq!(accepted("shop", "chosen"), "Accepted=True/Accepted");
    assert_eq!(
        accepted("other", "outsider"),
        "Accepted=False/NotAllowedByListeners"
    );
    assert_eq!(
        accepted("shop", "kind"),
        "Accepted=False/NotAllowedByListeners"
    );
    assert_eq!(
        accepted("shop", "nowhere"),
        "Accepted=False/NoMatchingParent"
    );
    assert_eq!(
        accepted("shop", "host"),
        "Accepted=False/NoMatchingListenerHostname"
    );
    assert_eq!(routes(&mesh, "http.80").len(), 1);

    let gateway = said(&mesh, config::Kind::KubernetesGateway, "infra", "gw");
    let attached: Vec<u64> = gateway["listeners"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l["attachedRoutes"].as_u64().unwrap())
        .collect();
    assert_eq!(attached, [0, 1, 0]);
    assert_eq!(
        gateway["listeners"][2]["supportedKinds"],
        json!([{"group": "gateway.networking.k8s.io", "kind": "GRPCRoute"}])
    );
}

#[test]
fn what_may_not_be_reached_answers_500_and_is_said() {
    let rule = |to: &str| {
        format!(
            "{{parentRefs: [{{name: gw, namespace: infra}}], hostnames: [h.example], rules: [{{backendRefs: {to}}}]}}"
        )
    };
    let resolved = |to: &str, more: &str| {
        let yaml = gateway(OPEN) + &backends() + &http_route("r", "shop", &rule(to)) + more;
        let mesh = support::mesh(&yaml);
        let all = said(&mesh, config::Kind::HttpRoute, "shop", "r");
        let resolved = conditions(&all["parents"][0])[1].clone();
        (routes(&mesh, "http.80")[0].clone(), resolved)
    };
    let grant = |name: &str| {
        object(
            "ReferenceGrant",
            "g",
            "other",
            &format!(
                "{{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}}], to: [{{group: \"\", kind: Service, name: {name}}}]}}"
            ),
        )
    };
    let far = "outbound|80||far.other.svc.cluster.local";
    for (to, more, action, reason) in [
        (
            "[{name: far, namespace: other, port: 80}]",
            String::new(),
            "UnknownService",
            "False/RefNotPermitted",
        ),
        (
            "[{name: far, namespace: other, port: 80}]",
            grant("near"),
            "UnknownService",
            "False/RefNotPermitted",
        ),
        (
            "[{name: far, namespace: other, port: 80}]",
            grant("far"),
            far,
            "True/ResolvedRefs",
        ),
        (
            "[{name: gone, port: 80}]",
            String::new(),
            "outbound|80||gone.shop.svc.cluster.local",
            "False/BackendNotFound",
        ),
        (
            "[{kind: Bucket, group: cloud.example, name: x}]",
            String::new(),
            "UnknownService",
            "False/InvalidKind",
        ),
        (
            "[{name: a, port: 80, weight: 0}]",
            String::new(),
            "500",
            "True/ResolvedRefs",
        ),
        ("[]", String::new(), "500", "True/ResolvedRefs"),
        (
            "[{name: a, port: 80, weight: 0}, {name: b, port: 80, weight: 5}]",
            String::new(),
            "outbound|80||b.shop.svc.cluster.local",
            "True/ResolvedRefs",
        ),
        (
            "[{name: a, port: 80, weight: 3}, {name: gone, port: 80}]",
            String::new(),
            "outbound|80||a.shop.svc.cluster.local=3 outbound|80||gone.shop.svc.cluster.local=1",
            "False/BackendNotFound",
        ),
    ] {
        assert_eq!(
            resolved(to, &more),
            (
                format!("h.example prefix=/ -> {action}"),
                format!("ResolvedRefs={reason}")
            ),
            "{to} {more}"
        );
    }
}

#[test]
fn filters_become_what_envoy_does() {
    let filters = "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: b}], remove: [x-c]}},\
        {type: URLRewrite, urlRewrite: {hostname: new.example, path: {type: ReplaceFullPath, replaceFullPath: /full}}},\
        {type: RequestMirror, requestMirror: {backendRef: {name: b, port: 80}, percent: 20}},\
        {type: CORS, cors: {allowOrigins: [\"https://*.example.com\"], allowMethods: [GET], maxAge: 30}}]";
    let yaml = gateway(OPEN)
        + &backends()
        + &http_route(
            "r",
            "shop",
            &format!(
                "{{parentRefs: [{{name: gw, namespace: infra}}], rules: [\
            {{filters: {filters}, {TO_A}, timeouts: {{request: 5s, backendRequest: 2s}}, retry: {{attempts: 4, codes: [503], backoff: 100ms}}}}]}}"
            ),
        );
    let mesh = support::mesh(&yaml);
    let made = route::build(&mesh, &router(&mesh), &["http.80".to_owned()]);
    let config = proto::json::any_to_value(&made[0].any());
    let route = &config["virtualHosts"][0]["routes"][0];
    assert_eq!(config["virtualHosts"][0]["domains"], json!(["*"]));
    assert_eq!(
        route["requestHeadersToAdd"][0]["header"],
        json!({"key": "x-a", "value": "b"})
    );
    assert_eq!(route["requestHeadersToRemove"], json!(["x-c"]));
    let action = &route["route"];
    assert_eq!(action["regexRewrite"]["pattern"]["regex"], "/.*");
    assert_eq!(action["regexRewrite"]["substitution"], "/full");
    assert_eq!(action["hostRewriteLiteral"], "new.example");
    assert_eq!(action["timeout"], "5s");
    assert_eq!(
        action["clusterNotFoundResponseCode"],
        "INTERNAL_SERVER_ERROR"
    );
    assert_eq!(action["retryPolicy"]["numRetries"], 4);
    assert_eq!(action["retryPolicy"]["perTryTimeout"], "2s");
    assert_eq!(action["retryPolicy"]["retriableStatusCodes"], json!([503]));
    assert_eq!(
        action["requestMirrorPolicies"][0]["runtimeFraction"]["defaultValue"]["numerator"],
        200_000
    );
    let cors = &route["typedPerFilterConfig"]["envoy.filters.http.cors"];
    assert_eq!(
        cors["allowOriginStringMatch"][0]["safeRegex"]["regex"],
        r"^https://.*\.example\.com$"
    );
    assert_eq!(cors["maxAge"], "30");
}

#[test]
fn a_mesh_route_is_for_the_callers_of_its_service() {
    let producer = http_route(
        "producer",
        "shop",
        "{parentRefs: [{group: \"\", kind: Service, name: a}], rules: [{backendRefs: [{name: b, port: 80}]}]}",
    );
    let consumer = http_route(
        "consumer",
        "other",
        "{parentRefs: [{group: \"\", kind: Service, name: a, namespace: shop}], rules: [{backendRefs: [{name: far, port: 80}]}]}",
    );
    let stranger = http_route(
        "stranger",
        "infra",
        "{parentRefs: [{group: \"\", kind: Service, name: b, namespace: shop}], rules: [{backendRefs: [{name: a, namespace: shop, port: 80}]}]}",
    );
    let mesh =
        support::mesh(&(GATEWAY_POD.to_owned() + &backends() + &producer + &consumer + &stranger));
    let cluster = |namespace: &str, app: &str, ip: &str, host: &str| {
        let node = json!({
            "id": format!("sidecar~{ip}~{app}-v1.{namespace}~{namespace}.svc.cluster.local"),
            "metadata": {"NAMESPACE": namespace, "ISTIO_VERSION": "1.30.0", "LABELS": {"app": app}, "INSTANCE_IPS": ip},
        });
        let node: EnvoyNode = proto::json::from_value(&node).unwrap();
        let proxy = Proxy::new(&mesh, Arc::new(Node::parse(&node).unwrap()));
        let made = route::build(&mesh, &proxy, &["80".to_owned()]);
        let config = proto::json::any_to_value(&made[0].any());
        let hosts = config["virtualHosts"].as_array().unwrap();
        let found = hosts
            .iter()
            .find(|h| h["name"] == format!("{host}.shop.svc.cluster.local:80"));
        found.unwrap()["routes"][0]["route"]["cluster"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    // The owner's route is for everybody, a route elsewhere for callers from there alone, and it goes before.
    assert_eq!(
        cluster("shop", "b", "10.1.0.2", "a"),
        "outbound|80||b.shop.svc.cluster.local"
    );
    assert_eq!(
        cluster("other", "far", "10.1.0.7", "a"),
        "outbound|80||far.other.svc.cluster.local"
    );
    assert_eq!(
        cluster("other", "far", "10.1.0.7", "b"),
        "outbound|80||b.shop.svc.cluster.local"
    );
    let parents = said(&mesh, config::Kind::HttpRoute, "other", "consumer");
    assert_eq!(
        parents["parents"][0]["parentRef"],
        json!({"group": "", "kind": "Service", "name": "a", "namespace": "shop"})
    );
    assert_eq!(
        conditions(&parents["parents"][0])[0],
        "Accepted=True/Accepted"
    );
}

#[test]
fn tls_and_tcp_routes_become_chains() {
    let listeners = "[{name: tls, port: 443, protocol: TLS, hostname: \"*.example.com\", tls: {mode: Passthrough}, allowedRoutes: {namespaces: {from: All}}},\
        {name: tcp, port: 9000, protocol: TCP, allowedRoutes: {namespaces: {from: All}}}]";
    let yaml = gateway(listeners)
        + &backends()
        + &object(
            "TLSRoute",
            "t",
            "shop",
            "{parentRefs: [{name: gw, namespace: infra}], hostnames: [\"*.com\"], rules: [{backendRefs: [{name: a, port: 80}]}]}",
        )
        + &object(
            "TCPRoute",
            "c",
            "shop",
            "{parentRefs: [{name: gw, namespace: infra, port: 9000}], rules: [{backendRefs: [{name: a, port: 80, weight: 2}, {name: b, port: 80}]}]}",
        );
    let mesh = support::mesh(&yaml);
    let made = listener::build(&mesh, &router(&mesh));
    let shown: Vec<(String, Value)> = made
        .iter()
        .map(|r| (r.name.clone(), proto::json::any_to_value(&r.any())))
        .collect();
    let of = |name: &str| &shown.iter().find(|(n, _)| n == name).unwrap().1;
    let tls = &of("0.0.0.0_443")["filterChains"];
    assert_eq!(tls.as_array().unwrap().len(), 1);
    assert_eq!(
        tls[0]["filterChainMatch"]["serverNames"],
        json!(["*.example.com"])
    );
    assert!(
        tls[0]["filters"]
            .to_string()
            .contains("outbound|80||a.shop.svc.cluster.local")
    );
    let tcp = of("0.0.0.0_9000")["filterChains"][0]["filters"].to_string();
    assert!(tcp.contains("\"weight\":2"), "{tcp}");
    assert!(made.iter().all(|r| !r.from.is_empty()));
}

#[test]
fn gateways_say_what_is_wrong_with_their_listeners() {
    let listeners = "[{name: a, port: 80, protocol: HTTP}, {name: b, port: 80, protocol: TCP},\
        {name: c, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: gone}]}},\
        {name: d, port: 444, protocol: SCTP}]";
    let mesh = support::mesh(&gateway(listeners));
    let said = said(&mesh, config::Kind::KubernetesGateway, "infra", "gw");
    let of = |i: usize| conditions(&said["listeners"][i]);
    assert_eq!(
        of(0),
        [
            "Accepted=True/Accepted",
            "Conflicted=False/NoConflicts",
            "Programmed=True/Programmed",
            "ResolvedRefs=True/ResolvedRefs"
        ]
    );
    assert_eq!(
        of(1),
        [
            "Accepted=False/ProtocolConflict",
            "Conflicted=True/ProtocolConflict",
            "Programmed=False/ProtocolConflict"
        ]
    );
    assert_eq!(
        of(2)[2..],
        [
            "Programmed=False/Invalid",
            "ResolvedRefs=False/InvalidCertificateRef"
        ]
    );
    assert_eq!(of(3)[0], "Accepted=False/UnsupportedProtocol");
    assert_eq!(
        conditions(&said),
        [
            "Accepted=True/ListenersNotValid",
            "Programmed=True/Programmed",
            "ResolvedRefs=True/ResolvedRefs"
        ]
    );
    assert_eq!(said["conditions"][0]["observedGeneration"], 3);
    assert_eq!(
        said["addresses"],
        json!([{"type": "Hostname", "value": "gw-istio.infra.svc.cluster.local"}])
    );
    // Only what is valid is served.
    let made = listener::build(&mesh, &router(&mesh));
    let names: Vec<&str> = made.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["0.0.0.0_80"]);
    // The same for whoever reads the log.
    let problems = mesh.gateway_api().problems(mesh.snapshot());
    let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert!(
        shown
            .iter()
            .any(|p| p.contains("Gateway infra/gw: spec.listeners[1]: Listener has a conflict")),
        "{shown:#?}"
    );
}

#[test]
fn a_gateway_without_pods_is_told() {
    let yaml = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gw, namespace: infra}\nspec:\n  gatewayClassName: istio\n  addresses: [{type: Hostname, value: missing}]\n  listeners: [{name: a, port: 80, protocol: HTTP}]\n";
    let mesh = support::mesh(yaml);
    let said = said(&mesh, config::Kind::KubernetesGateway, "infra", "gw");
    assert_eq!(conditions(&said)[1], "Programmed=False/AddressNotUsable");
    let message = said["conditions"][1]["message"].as_str().unwrap();
    assert!(
        message.contains("hostname \"missing.infra.svc.cluster.local\" not found"),
        "{message}"
    );
}

#[test]
fn another_class_is_left_alone() {
    let yaml = "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {name: cloud}\nspec: {controllerName: example.com/cloud}\n---\n\
        apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gw, namespace: infra}\nspec: {gatewayClassName: cloud, listeners: [{name: a, port: 80, protocol: HTTP}]}\n---\n\
        apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: infra}\nspec: {parentRefs: [{name: gw}]}\n";
    let mesh = support::mesh(yaml);
    assert!(mesh.gateways().is_empty());
    let all = status::all(&mesh);
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(all.values().next().unwrap(), &json!({"parents": []}));
}

#[test]
fn certificates_of_other_namespaces_need_a_grant() {
    let key = rcgen::generate_simple_self_signed(vec!["x.example".to_owned()]).unwrap();
    let secret = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: cert, namespace: other}}\ntype: kubernetes.io/tls\nstringData: {}\n---\n",
        json!({"tls.crt": key.cert.pem(), "tls.key": key.signing_key.serialize_pem()})
    );
    let listeners = "[{name: s, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert, namespace: other}]}}]";
    let grant = object(
        "ReferenceGrant",
        "g",
        "other",
        "{from: [{group: gateway.networking.k8s.io, kind: Gateway, namespace: infra}], to: [{group: \"\", kind: Secret}]}",
    );
    let caller = base::spiffe::Identity::new("cluster.local", "infra", "gw-istio").unwrap();
    let name = "kubernetes-gateway://other/cert";
    for (more, reason, given) in [
        ("", "False/RefNotPermitted", 0),
        (grant.as_str(), "True/ResolvedRefs", 1),
    ] {
        let mesh = support::mesh(&(gateway(listeners) + &secret + more));
        let said = said(&mesh, config::Kind::KubernetesGateway, "infra", "gw");
        assert_eq!(
            conditions(&said["listeners"][0])[3],
            format!("ResolvedRefs={reason}")
        );
        assert_eq!(secret::build(&mesh, &caller, &[name]).len(), given);
        // Never to somebody whose Gateway it is not.
        let stranger = base::spiffe::Identity::new("cluster.local", "infra", "default").unwrap();
        assert_eq!(secret::build(&mesh, &stranger, &[name]).len(), 0);
        if given == 1 {
            let made = listener::build(&mesh, &router(&mesh));
            let listener = proto::json::any_to_value(&made[0].any());
            assert!(listener.to_string().contains(name));
        }
    }
}

#[test]
fn a_backend_tls_policy_becomes_tls_towards_the_backend() {
    let authority = rcgen::generate_simple_self_signed(vec!["ca".to_owned()]).unwrap();
    let map = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: ca, namespace: shop}}\ndata: {}\n---\n",
        json!({"ca.crt": authority.cert.pem()})
    );
    let policy = |name: &str, target: &str| {
        object(
            "BackendTLSPolicy",
            name,
            "shop",
            &format!(
                "{{targetRefs: [{{group: \"\", kind: Service, name: {target}}}], validation: {{hostname: b.example, caCertificateRefs: [{{group: \"\", kind: ConfigMap, name: ca}}]}}}}"
            ),
        )
    };
    let mesh = support::mesh(
        &(gateway(OPEN)
            + &backends()
            + &map
            + &policy("p", "b")
            + &policy("q", "b")
            + &policy("z", "nobody")
            + &http_route(
                "r",
                "shop",
                "{parentRefs: [{name: gw, namespace: infra}], rules: [{backendRefs: [{name: b, port: 80}]}]}",
            )),
    );
    let proxy = router(&mesh);
    let clusters = outrigger_control::cluster::build(&mesh, &proxy);
    let cluster = clusters
        .iter()
        .find(|c| c.name == "outbound|80||b.shop.svc.cluster.local")
        .unwrap();
    let shown = proto::json::any_to_value(&cluster.any()).to_string();
    assert!(shown.contains("\"sni\":\"b.example\""), "{shown}");
    assert!(shown.contains("configmap://shop/ca-cacert"), "{shown}");
    let anybody = base::spiffe::Identity::new("cluster.local", "other", "x").unwrap();
    assert_eq!(
        secret::build(&mesh, &anybody, &["configmap://shop/ca-cacert"]).len(),
        1
    );

    let of = |name: &str| said(&mesh, config::Kind::BackendTlsPolicy, "shop", name);
    assert_eq!(
        conditions(&of("p")["ancestors"][0])[0],
        "Accepted=True/Accepted"
    );
    assert_eq!(of("p")["ancestors"][1]["ancestorRef"]["name"], "gw");
    assert_eq!(
        conditions(&of("q")["ancestors"][0])[0],
        "Accepted=False/Conflicted"
    );
    assert_eq!(
        conditions(&of("z")["ancestors"][0])[0],
        "Accepted=False/TargetNotFound"
    );
}

#[test]
fn what_did_not_change_is_shared_with_the_mesh_before() {
    let yaml = gateway(OPEN)
        + &backends()
        + &http_route(
            "r",
            "shop",
            &format!("{{parentRefs: [{{name: gw, namespace: infra}}], rules: [{{{TO_A}}}]}}"),
        );
    let first = support::mesh(&yaml);
    // A Service more: everything is looked at again, and comes out the same.
    let more = yaml.clone() + &support::service("c", "shop", "10.1.0.9");
    let second = Mesh::new(support::snapshot(&more), Settings::default(), Some(&first));
    assert!(Arc::ptr_eq(
        &first.gateway_api().translated,
        &second.gateway_api().translated
    ));
    assert!(Arc::ptr_eq(
        &first.gateway_api().reports,
        &second.gateway_api().reports
    ));
}

#[test]
fn an_edit_of_a_route_changes_what_is_made_of_it_alone() {
    let route = |backend: &str| {
        let spec = format!(
            "{{parentRefs: [{{name: gw, namespace: infra}}], hostnames: [x.example], rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]}}"
        );
        gateway(OPEN) + &backends() + &http_route("r", "shop", &spec)
    };
    let first = support::mesh(&route("a"));
    let second = Mesh::new(
        support::snapshot(&route("b")),
        Settings::default(),
        Some(&first),
    );
    let edited = ObjectKey::new(config::Kind::HttpRoute, "shop", "r");
    let change = Change::between([edited.clone()].into(), &first, &second);
    let made = "infra~gw~istio-autogenerated-k8s-gateway~http~x.example";
    let made = ObjectKey::new(config::Kind::VirtualService, "shop", made);
    assert_eq!(change.keys, [made, edited].into());
    assert!(!change.full && !change.listener_rules);
}

#[test]
fn a_managed_gateway_is_run_by_what_istiod_would_make() {
    let yaml = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gw, namespace: infra, uid: \"77\", labels: {ours: \"yes\"}, annotations: {gateway.istio.io/service-account: acc, note: x}}\nspec:\n  gatewayClassName: istio\n  listeners: [{name: http.a, port: 80, protocol: HTTP}, {name: http-a, port: 81, protocol: HTTP}, {name: again, port: 80, protocol: HTTP, hostname: b.example}]\n";
    let mesh = support::mesh(yaml);
    let settings = inject::Settings::new(inject::Values::default(), mesh.config().clone());
    let all = deploy::all(&mesh, &settings);
    assert_eq!(all[0].gateway, "infra/gw");
    let objects = all[0].objects.as_ref().unwrap();
    let named: Vec<(&Value, &Value)> = objects
        .iter()
        .map(|o| (&o["kind"], &o["metadata"]["name"]))
        .collect();
    assert_eq!(
        named,
        [
            (&json!("ServiceAccount"), &json!("acc")),
            (&json!("Deployment"), &json!("gw-istio")),
            (&json!("Service"), &json!("gw-istio")),
        ]
    );
    for object in objects {
        let meta = &object["metadata"];
        assert_eq!(meta["ownerReferences"][0]["uid"], "77");
        assert_eq!(meta["labels"]["ours"], "yes");
        assert_eq!(
            meta["labels"]["gateway.networking.k8s.io/gateway-name"],
            "gw"
        );
        assert_eq!(meta["annotations"], json!({"note": "x"}));
    }
    let ports: Vec<String> = objects[2]["spec"]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| format!("{}={}", p["name"].as_str().unwrap(), p["port"]))
        .collect();
    assert_eq!(ports, ["status-port=15021", "http-a=80", "http-a-81=81"]);
    assert_eq!(objects[2]["spec"]["type"], "LoadBalancer");
    let template = &objects[1]["spec"]["template"];
    assert_eq!(
        template["metadata"]["labels"]["sidecar.istio.io/inject"],
        "false"
    );
    assert_eq!(
        template["metadata"]["labels"]["gateway.istio.io/managed"],
        "istio.io-gateway-controller"
    );
    assert_eq!(
        template["metadata"]["annotations"]["istio.io/rev"],
        "default"
    );
    let spec = &template["spec"];
    assert_eq!(spec["serviceAccountName"], "acc");
    let proxy = &spec["containers"][0];
    assert_eq!(proxy["name"], "istio-proxy");
    assert_eq!([&proxy["args"][0], &proxy["args"][1]], ["proxy", "router"]);
    assert_eq!(proxy["securityContext"]["runAsNonRoot"], true);
    let env = proxy["env"].as_array().unwrap();
    let of = |name: &str| env.iter().find(|e| e["name"] == name).unwrap()["value"].clone();
    assert_eq!(of("ISTIO_META_WORKLOAD_NAME"), "gw-istio");
    assert_eq!(
        of("ISTIO_META_OWNER"),
        "kubernetes://apis/apps/v1/namespaces/infra/deployments/gw-istio"
    );
    // Another revision's Gateway, one with pods of its own, and one of a newer controller are left alone.
    for (from, to) in [
        ("labels: {ours: \"yes\"}", "labels: {istio.io/rev: canary}"),
        (
            "gatewayClassName: istio\n",
            "gatewayClassName: istio\n  addresses: [{type: Hostname, value: x}]\n",
        ),
        ("note: x", "gateway.istio.io/controller-version: \"6\""),
    ] {
        let mesh = support::mesh(&yaml.replace(from, to));
        assert_eq!(deploy::all(&mesh, &settings), []);
    }
}
