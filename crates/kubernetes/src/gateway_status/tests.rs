//! Against an API server that keeps objects in memory.

use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::get,
};
use config::Kind;
use kube::Config;
use tokio::net::TcpListener;

use super::*;

/// One HTTPRoute, and how often it was written.
type Stored = Arc<Mutex<(Value, u64)>>;

async fn read(State(stored): State<Stored>, Path(name): Path<String>) -> (StatusCode, Json<Value>) {
    let stored = stored.lock().unwrap();
    if stored.0["metadata"]["name"] == name.as_str() {
        (StatusCode::OK, Json(stored.0.clone()))
    } else {
        let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound", "message": "no"});
        (StatusCode::NOT_FOUND, Json(body))
    }
}

async fn write(
    State(stored): State<Stored>,
    Json(patch): Json<Value>,
) -> (StatusCode, Json<Value>) {
    let mut stored = stored.lock().unwrap();
    if patch["metadata"]["resourceVersion"] != stored.0["metadata"]["resourceVersion"] {
        let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 409, "reason": "Conflict", "message": "no"});
        return (StatusCode::CONFLICT, Json(body));
    }
    stored.1 += 1;
    let version = (10 + stored.1).to_string();
    stored.0["status"] = patch["status"].clone();
    stored.0["metadata"]["resourceVersion"] = version.into();
    (StatusCode::OK, Json(stored.0.clone()))
}

async fn server(status: Value) -> (Client, Stored) {
    let object = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": "r", "namespace": "shop", "uid": "1", "resourceVersion": "10", "generation": 2},
        "spec": {}, "status": status,
    });
    let stored: Stored = Arc::new(Mutex::new((object, 0)));
    let at = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/httproutes/{name}";
    let router = Router::new()
        .route(at, get(read))
        .route(&format!("{at}/status"), axum::routing::patch(write))
        .with_state(stored.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let config = Config::new(format!("http://{address}").parse().unwrap());
    (Client::try_from(config).unwrap(), stored)
}

fn wanted(uid: &str, status: Value) -> Wanted {
    Wanted {
        uid: uid.to_owned(),
        status,
    }
}

fn parent(name: &str, controller: &str, holds: &str) -> Value {
    json!({
        "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": name},
        "controllerName": controller,
        "conditions": [{"type": "Accepted", "status": holds, "reason": "Accepted", "message": "", "observedGeneration": 2}],
    })
}

fn with_time(mut parent: Value, time: &str) -> Value {
    parent["conditions"][0]["lastTransitionTime"] = time.into();
    parent
}

#[tokio::test]
async fn ours_is_put_beside_what_others_said_and_written_once() {
    let old = "2020-01-01T00:00:00Z";
    let theirs = with_time(parent("theirs", "example.com/other", "True"), old);
    let stale = with_time(parent("stale", "ours", "True"), old);
    let kept = with_time(parent("gw", "ours", "True"), old);
    let turned = with_time(parent("turned", "ours", "False"), old);
    let status = json!({"parents": [theirs, stale, kept, turned]});
    let (client, stored) = server(status).await;
    let key = ObjectKey::new(Kind::HttpRoute, "shop", "r");
    let status =
        json!({"parents": [parent("gw", "ours", "True"), parent("turned", "ours", "True")]});
    let all = BTreeMap::from([(key.clone(), wanted("1", status))]);

    let mut writer = StatusWriter::default();
    writer.write(&client, &all, &["ours"]).await;
    writer.write(&client, &all, &["ours"]).await;
    {
        let stored = stored.lock().unwrap();
        assert_eq!(stored.1, 1);
        let parents = stored.0["status"]["parents"].as_array().unwrap();
        let names: Vec<&str> = parents
            .iter()
            .map(|p| p["parentRef"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["theirs", "gw", "turned"]);
        assert_eq!(parents[0], theirs);
        assert_eq!(parents[1], kept);
        let since = &parents[2]["conditions"][0]["lastTransitionTime"];
        assert!(since.as_str().unwrap() > "2025", "{since}");
    }

    // A second replica finds everything said.
    let mut other = StatusWriter::default();
    other.write(&client, &all, &["ours"]).await;
    assert_eq!(stored.lock().unwrap().1, 1);

    // A route that names us no more: what we said goes, what others said stays.
    let nothing = BTreeMap::from([(key, wanted("1", json!({"parents": []})))]);
    writer.write(&client, &nothing, &["ours"]).await;
    let stored = stored.lock().unwrap();
    assert_eq!(stored.0["status"]["parents"], json!([theirs]));
}

#[tokio::test]
async fn an_object_that_came_after_one_of_its_name_gets_its_own_status() {
    let (client, stored) = server(json!({})).await;
    let key = ObjectKey::new(Kind::HttpRoute, "shop", "r");
    let said = json!({"parents": [parent("gw", "ours", "True")]});
    let of = |uid: &str| BTreeMap::from([(key.clone(), wanted(uid, said.clone()))]);
    let mut writer = StatusWriter::default();
    writer.write(&client, &of("1"), &["ours"]).await;
    {
        let mut stored = stored.lock().unwrap();
        stored.0["metadata"]["uid"] = "2".into();
        stored.0["status"] = json!({});
    }
    // What is still wanted of the old one is no word about the new one.
    writer.write(&client, &of("1"), &["ours"]).await;
    StatusWriter::default()
        .write(&client, &of("1"), &["ours"])
        .await;
    assert_eq!(stored.lock().unwrap().0["status"], json!({}));
    writer.write(&client, &of("2"), &["ours"]).await;
    let stored = stored.lock().unwrap();
    assert_eq!(stored.0["status"]["parents"][0]["parentRef"]["name"], "gw");
}

#[test]
fn what_the_api_server_put_in_for_the_meantime_goes() {
    let old = json!({"conditions": [
        {"type": "Accepted", "status": "Unknown", "reason": "Pending", "lastTransitionTime": "1970-01-01T00:00:00Z"},
        {"type": "Ready", "status": "Unknown", "reason": "Pending", "lastTransitionTime": "1970-01-01T00:00:00Z"},
    ]});
    let wanted =
        json!({"conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted"}]});
    let new = merged(&old, &wanted, &[], Timestamp::UNIX_EPOCH);
    let types: Vec<&Value> = new["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| &c["type"])
        .collect();
    assert_eq!(types, ["Accepted"]);
}
