//! Gateways, their listeners, and what runs them.

use super::*;

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
