//! The pages as the API server and as strangers call them.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes},
    http::{Request, Response, StatusCode},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use config::Snapshot;
use http_body_util::BodyExt;
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tower::ServiceExt;

use super::{HELD, Injector, LARGEST, router};
use crate::{model::Settings, server::Server, translate::Istio};

const MAP: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: istio-sidecar-injector, namespace: istio-system}
data:
  values: |
    global: {hub: example.test/mesh, tag: v7, proxy: {image: outrigger-proxy}}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {nodeInfo: {kubeletVersion: v1.36.3}}
";

fn page() -> axum::Router {
    let server = Server::new(Box::new(Istio), Settings::default());
    let (snapshot, problems) = Snapshot::from_texts([(std::path::Path::new("m.yaml"), MAP)]);
    assert!(problems.is_empty(), "{problems:?}");
    server.load(Arc::new(snapshot), Arc::default());
    router(server, Injector::new("istio-system", "default"))
}

async fn send(path: &str, kind: &str, body: impl Into<Body>) -> Response<Body> {
    let request = Request::post(path)
        .header("content-type", kind)
        .body(body.into())
        .unwrap();
    page().oneshot(request).await.unwrap()
}

async fn ask(path: &str, object: Value) -> Value {
    let review = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {"uid": "u-1", "namespace": "shop", "object": object},
    });
    let answer = send(path, "application/json", review.to_string()).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    let answer: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(answer["apiVersion"], "admission.k8s.io/v1");
    answer["response"].clone()
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "web-5d-", "labels": {"app": "web", "pod-template-hash": "5d"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d", "controller": true}]},
        "spec": {"containers": [{"name": "web", "image": "web:1"}]},
    })
}

#[tokio::test]
async fn a_pod_gets_its_proxy_as_a_patch() {
    let answer = ask("/inject/cluster/east/net/n--slash--1", pod()).await;
    assert_eq!(answer["allowed"], true, "{answer}");
    assert_eq!(answer["uid"], "u-1");
    assert_eq!(answer["patchType"], "JSONPatch");
    let patch = BASE64_STANDARD
        .decode(answer["patch"].as_str().unwrap())
        .unwrap();
    let patch: Vec<Value> = serde_json::from_slice(&patch).unwrap();
    let at = |path: &str| {
        let found = patch.iter().find(|p| p["path"] == path);
        found.map(|p| p["value"].clone()).unwrap_or_default()
    };
    // The kubelets are new enough for a native sidecar.
    let init = at("/spec/initContainers");
    let proxy = init
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["name"] == "istio-proxy");
    let proxy = proxy.unwrap();
    assert_eq!(proxy["image"], "example.test/mesh/outrigger-proxy:v7");
    assert_eq!(proxy["restartPolicy"], "Always");
    let env = proxy["env"].as_array().unwrap();
    let var = |name: &str| {
        env.iter()
            .find(|e| e["name"] == name)
            .map(|e| e["value"].clone())
    };
    assert_eq!(var("ISTIO_META_CLUSTER_ID"), Some("east".into()));
    assert_eq!(var("ISTIO_META_NETWORK"), Some("n/1".into()));
    assert_eq!(var("ISTIO_META_WORKLOAD_NAME"), Some("web".into()));
    // Where the pod lives is the API server's to say.
    assert!(
        patch.iter().all(|p| p["path"] != "/metadata/namespace"),
        "{patch:?}"
    );
}

#[tokio::test]
async fn a_pod_that_says_no_passes_and_one_with_a_mistake_does_not() {
    let mut no = pod();
    no["metadata"]["labels"]["sidecar.istio.io/inject"] = "false".into();
    let answer = ask("/inject", no).await;
    assert_eq!(
        (answer["allowed"].clone(), answer.get("patch")),
        (true.into(), None)
    );
    let mut wrong = pod();
    wrong["metadata"]["annotations"] =
        json!({"traffic.sidecar.istio.io/excludeOutboundPorts": "http"});
    let answer = ask("/inject", wrong).await;
    assert_eq!(answer["allowed"], false);
    let why = answer["status"]["message"].as_str().unwrap();
    assert!(why.contains("excludeOutboundPorts"), "{why}");
}

#[tokio::test]
async fn an_object_is_judged_with_the_path_of_its_field() {
    let service = |timeout: &str| {
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"hosts": ["web"], "http": [{"timeout": timeout, "route": [{"destination": {"host": "web"}}]}]},
        })
    };
    assert_eq!(ask("/validate", service("1s")).await["allowed"], true);
    let answer = ask("/validate", service("0.1ms")).await;
    assert_eq!(answer["allowed"], false);
    let why = answer["status"]["message"].as_str().unwrap();
    assert!(
        why.starts_with("configuration is invalid: spec.http[0].timeout: "),
        "{why}"
    );
    // What is legal and has no effect passes with a word.
    let plugin = json!({
        "apiVersion": "extensions.istio.io/v1alpha1", "kind": "WasmPlugin",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": {"url": "oci://example/p"},
    });
    let answer = ask("/validate", plugin).await;
    assert_eq!(answer["allowed"], true);
    assert!(
        answer["warnings"][0]
            .as_str()
            .unwrap()
            .contains("no effect"),
        "{answer}"
    );
    // Deletions hold no object, other kinds are none of ours.
    assert_eq!(ask("/validate", Value::Null).await["allowed"], true);
    assert_eq!(ask("/validate", pod()).await["allowed"], true);
}

#[tokio::test]
async fn strangers_get_an_error_and_cost_little() {
    let status = |r: Response<Body>| r.status().as_u16();
    for path in ["/inject", "/validate"] {
        assert_eq!(status(send(path, "application/json", "").await), 400);
        assert_eq!(status(send(path, "text/plain", "{}").await), 415);
        let with_charset = "application/json; charset=utf-8";
        assert_eq!(status(send(path, with_charset, "{}").await), 415);
        let large = vec![b' '; LARGEST + 1];
        assert_eq!(status(send(path, "application/json", large).await), 413);
        for body in ["{", "[]", "{}", &"[".repeat(100_000)] {
            let answer = send(path, "application/json", body.to_owned()).await;
            assert_eq!(answer.status(), 200);
            let bytes = answer.into_body().collect().await.unwrap().to_bytes();
            let answer: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(answer["response"]["allowed"], false, "{answer}");
        }
    }
    let get = Request::get("/inject").body(Body::empty()).unwrap();
    assert_eq!(page().oneshot(get).await.unwrap().status(), 405);
}

/// A body that says something and then nothing more; what it said was read when it is counted.
struct Unfinished {
    first: Option<Bytes>,
    read: Arc<AtomicUsize>,
}

impl hyper::body::Body for Unfinished {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        self.read.fetch_add(1, Ordering::SeqCst);
        Poll::Pending
    }
}

/// Sends to pages that others send to, too.
async fn send_to(pages: axum::Router, body: impl Into<Body>) -> u16 {
    let request = Request::post("/validate")
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap();
    pages.oneshot(request).await.unwrap().status().as_u16()
}

/// So many senders of so many bytes that do not come to an end; all of it has been read.
async fn endless(pages: &axum::Router, senders: usize, bytes: usize) -> Vec<JoinHandle<u16>> {
    let read = Arc::new(AtomicUsize::new(0));
    let one = || Unfinished {
        first: Some(vec![b' '; bytes].into()),
        read: read.clone(),
    };
    let sent = (0..senders).map(|_| tokio::spawn(send_to(pages.clone(), Body::new(one()))));
    let sent = sent.collect();
    while read.load(Ordering::SeqCst) < senders {
        tokio::task::yield_now().await;
    }
    sent
}

#[tokio::test]
async fn slow_senders_delay_nobody_and_are_cut_off() {
    let pages = page();
    let slow = endless(&pages, 1000, 100).await;
    assert_eq!(send_to(pages.clone(), "{}").await, 200);
    // Nobody had to go for that.
    assert!(slow.iter().all(|sender| !sender.is_finished()));
    for sender in slow {
        assert_eq!(sender.await.unwrap(), 408);
    }
}

#[tokio::test]
async fn what_is_held_at_once_is_bounded_and_let_go() {
    let pages = page();
    let places = HELD * 1024 / LARGEST;
    let large = endless(&pages, places, LARGEST).await;
    // There is no place for one more.
    assert_eq!(send_to(pages.clone(), vec![b' '; LARGEST]).await, 503);
    assert!(large.iter().all(|sender| !sender.is_finished()));
    for sender in large {
        sender.abort();
        assert!(sender.await.unwrap_err().is_cancelled());
    }
    assert_eq!(send_to(pages.clone(), vec![b' '; LARGEST]).await, 200);
}
