//! What becomes of routes and of the policies of their backends.

use super::*;

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
