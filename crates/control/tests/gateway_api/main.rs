//! Gateway API: which requests reach which backend through which listener, and what is said of each object.

mod changes;
mod gateways;
mod routes;
#[path = "../support/mod.rs"]
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
