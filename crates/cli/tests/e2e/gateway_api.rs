//! Gateway API on the wire: through a gateway, and between sidecars.

use serde_json::json;

use crate::mesh::Mesh;

const OUTSIDE: &str = "outside/outside";

pub(crate) fn http_routes_of_a_gateway(mesh: &Mesh) {
    let ask = |path: &str, more: &[&str]| {
        let url = format!("http://api.istio-system{path}");
        let args: Vec<&str> = [url.as_str()].iter().chain(more).copied().collect();
        mesh.call(OUTSIDE, &args)
    };
    let answer = ask("/shop/x", &[]);
    assert_eq!(
        (&answer["status"], &answer["body"]["pod"]),
        (&json!(200), &json!("web-v1")),
        "{answer}"
    );
    let answer = ask("/shop/x", &["-H", "version: 2"]);
    assert_eq!(
        (&answer["body"]["pod"], &answer["body"]["path"]),
        (&json!("web-v2"), &json!("/x")),
        "{answer}"
    );
    // A prefix ends where a segment does.
    let answer = ask("/shopping", &["-H", "version: 2"]);
    assert_eq!(answer["body"]["pod"], "web-v1", "{answer}");
    let answer = ask("/old", &[]);
    assert_eq!(answer["status"], 302, "{answer}");
    // What may not be reached, and what does not exist.
    assert_eq!(ask("/foreign", &[])["status"], 500);
    assert_eq!(ask("/gone", &[])["status"], 500);
}

pub(crate) fn grpc_and_tcp_routes_of_a_gateway(mesh: &Mesh) {
    let answer = mesh.call(OUTSIDE, &["grpc://api.istio-system:9090", "-d", "hello"]);
    assert_eq!(
        (&answer["grpcStatus"], &answer["replies"][0]["text"]),
        (&json!("0"), &json!("hello")),
        "{answer}"
    );
    let answer = mesh.call(OUTSIDE, &["tcp://api.istio-system:9000", "-d", "hello"]);
    let line = answer["line"].as_str().unwrap_or_default();
    assert!(
        line.starts_with("web-v1") && line.ends_with("hello"),
        "{answer}"
    );
}

pub(crate) fn routes_of_a_service(mesh: &Mesh) {
    let answer = mesh.call("shop/client", &["http://one.shop/"]);
    assert_eq!(answer["body"]["pod"], "web-v1", "{answer}");
    let answer = mesh.call("shop/client", &["http://one.shop/", "-H", "to: two"]);
    assert_eq!(answer["body"]["pod"], "web-v2", "{answer}");
}
