//! An API server that keeps objects in memory, as far as what writes here needs one: versions and conflicts, watches of
//! one object, and whose manager a key of `data` is.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::broadcast};

/// The server's objects and what was asked of it.
pub(crate) struct Stored {
    /// By their paths.
    objects: BTreeMap<String, Value>,
    version: u64,
    /// Which manager applied which key of `data` of an object.
    owned: BTreeMap<(String, String), BTreeSet<String>>,
    /// Each object that is written.
    changes: broadcast::Sender<(String, Value)>,
    /// Methods and managers of what was written, in order.
    pub(crate) writes: Vec<(Method, String)>,
    /// Every request is answered with this status.
    pub(crate) refuses: Option<u16>,
    /// How often it was.
    pub(crate) refused: usize,
}

pub(crate) type Shared = Arc<Mutex<Stored>>;

/// A new server without objects.
pub(crate) async fn server() -> (Client, Shared) {
    let stored: Shared = Arc::new(Mutex::new(Stored {
        objects: BTreeMap::new(),
        version: 0,
        owned: BTreeMap::new(),
        changes: broadcast::channel(256).0,
        writes: Vec::new(),
        refuses: None,
        refused: 0,
    }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(serve).with_state(stored.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let config = Config::new(format!("http://{address}").parse().unwrap());
    (Client::try_from(config).unwrap(), stored)
}

impl Stored {
    /// An object by its path.
    pub(crate) fn get(&self, path: &str) -> Option<&Value> {
        self.objects.get(path)
    }

    /// Puts an object in, or writes over it.
    pub(crate) fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        object["metadata"]["name"] = path.rsplit('/').next().unwrap().into();
        self.objects.insert(path.to_owned(), object.clone());
        let _ = self.changes.send((path.to_owned(), object.clone()));
        object
    }

    /// The objects of a kind in all namespaces, one a page; a kind of which there are none is not known.
    fn list(&self, path: &str, query: &str) -> Response {
        let Some((version, plural)) = path.rsplit_once('/') else {
            return status(404);
        };
        let (from, of) = (format!("{version}/namespaces/"), format!("/{plural}/"));
        let all = self.objects.iter();
        let mut found = all.filter(|(p, _)| p.starts_with(&from) && p.contains(&of));
        let at = parameter(query, "continue").map_or(0, |at| at.parse().unwrap());
        let Some((_, object)) = found.nth(at) else {
            return status(404);
        };
        let go_on = found.next().map(|_| (at + 1).to_string());
        Json(json!({"apiVersion": "v1", "kind": "List", "metadata": {"continue": go_on}, "items": [object]}))
            .into_response()
    }

    fn write(
        &mut self,
        method: &Method,
        path: &str,
        query: &str,
        kind: &str,
        body: Value,
    ) -> Result<Value, u16> {
        let name = body["metadata"]["name"].as_str().unwrap_or_default();
        let manager = parameter(query, "fieldManager").unwrap_or_default();
        match *method {
            Method::POST => {
                let path = format!("{path}/{name}");
                if self.objects.contains_key(&path) {
                    return Err(409);
                }
                Ok(self.put(&path, body))
            }
            Method::PUT => {
                let old = self.objects.get(path).ok_or(404_u16)?;
                if old["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] {
                    return Err(409);
                }
                Ok(self.put(path, body))
            }
            Method::PATCH if path.ends_with("/status") => {
                let path = path.trim_end_matches("/status");
                let mut object = self.objects.get(path).ok_or(404_u16)?.clone();
                object["status"] = body["status"].clone();
                object["metadata"]["managedFields"] =
                    json!([{"manager": manager, "operation": "Apply", "subresource": "status"}]);
                Ok(self.put(path, object))
            }
            Method::PATCH => {
                // As with a right that does not allow to create.
                let mut object = self.objects.get(path).ok_or(403_u16)?.clone();
                let data = |v: &Value| v["data"].as_object().cloned().unwrap_or_default();
                let (mut all, new) = (data(&object), data(&body));
                if kind.contains("apply") {
                    let now: BTreeSet<String> = new.keys().cloned().collect();
                    let owner = (path.to_owned(), manager);
                    let before = self.owned.insert(owner, now.clone()).unwrap_or_default();
                    all.retain(|key, _| !before.contains(key) || now.contains(key));
                }
                for (key, value) in new {
                    match value {
                        Value::Null => _ = all.remove(&key),
                        value => _ = all.insert(key, value),
                    }
                }
                object["data"] = all.into();
                Ok(self.put(path, object))
            }
            _ => Err(405),
        }
    }
}

async fn serve(State(stored): State<Shared>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let mut stored = stored.lock().unwrap();
    if let Some(code) = stored.refuses {
        stored.refused += 1;
        return status(code);
    }
    if head.method != Method::GET {
        let kind = head.headers.get("content-type");
        let kind = kind.map_or("", |k| k.to_str().unwrap());
        let manager = parameter(&query, "fieldManager").unwrap_or_default();
        stored.writes.push((head.method.clone(), manager));
        let body = serde_json::from_slice(&body).unwrap();
        return match stored.write(&head.method, &path, &query, kind, body) {
            Ok(object) => Json(object).into_response(),
            Err(code) => status(code),
        };
    }
    if let Some(object) = stored.get(&path) {
        return Json(object).into_response();
    }
    // Only single objects are watched: `metadata.name=NAME`.
    let Some(selector) = parameter(&query, "fieldSelector") else {
        return stored.list(&path, &query);
    };
    let one = format!("{path}/{}", selector.rsplit("%3D").next().unwrap());
    if parameter(&query, "watch").is_some() {
        let changes = stored.changes.subscribe();
        let lines = stream::unfold((changes, one), |(mut changes, one)| async move {
            loop {
                let (path, object) = changes.recv().await.ok()?;
                if path == one {
                    let line = json!({"type": "MODIFIED", "object": object});
                    let line = Ok::<_, std::io::Error>(Bytes::from(format!("{line}\n")));
                    return Some((line, (changes, one)));
                }
            }
        });
        return Body::from_stream(lines).into_response();
    }
    let items: Vec<&Value> = stored.get(&one).into_iter().collect();
    let version = stored.version.to_string();
    Json(json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version}, "items": items}))
        .into_response()
}

fn parameter(query: &str, name: &str) -> Option<String> {
    let all = query.split('&').filter_map(|p| p.split_once('='));
    let mut found = all.filter(|(n, _)| *n == name).map(|(_, v)| v.to_owned());
    found.next()
}

fn status(code: u16) -> Response {
    let reason = if code == 404 { "NotFound" } else { "Other" };
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "reason": reason, "message": "no"});
    (StatusCode::from_u16(code).unwrap(), Json(body)).into_response()
}
