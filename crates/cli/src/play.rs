//! For tests: an API server that keeps what is put into it, in as far as commands ask: lists, single objects, server-side
//! apply (without owners of fields), deletion, the version.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Bytes, to_bytes},
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Runtime};

type Objects = Arc<Mutex<BTreeMap<String, Value>>>;

/// The server, and a kubeconfig that leads to it.
pub(crate) struct Cluster {
    objects: Objects,
    runtime: Runtime,
    kubeconfig: tempfile::NamedTempFile,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let objects = Objects::default();
        let router = Router::new().fallback(serve).with_state(objects.clone());
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move { axum::serve(listener, router).await });
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "it", "user": {}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        });
        std::fs::write(kubeconfig.path(), text.to_string()).unwrap();
        Cluster {
            objects,
            runtime,
            kubeconfig,
        }
    }

    pub(crate) fn kubeconfig(&self) -> &str {
        self.kubeconfig.path().to_str().unwrap()
    }

    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Puts an object below the path of its list.
    pub(crate) fn put(&self, list: &str, object: Value) {
        let path = format!("{list}/{}", object["metadata"]["name"].as_str().unwrap());
        self.objects.lock().unwrap().insert(path, object);
    }

    /// The object at a path.
    pub(crate) fn at(&self, path: &str) -> Option<Value> {
        self.objects.lock().unwrap().get(path).cloned()
    }

    /// How many objects there are.
    pub(crate) fn len(&self) -> usize {
        self.objects.lock().unwrap().len()
    }
}

async fn serve(State(objects): State<Objects>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
    if path == "/version" {
        let version = json!({"major": "1", "minor": "36", "gitVersion": "v1.36.3"});
        return axum::Json(version).into_response();
    }
    let mut objects = objects.lock().unwrap();
    match method {
        Method::GET => match objects.get(&path) {
            Some(object) => axum::Json(object.clone()).into_response(),
            None if is_list(&path) => axum::Json(list(&objects, &path)).into_response(),
            None => missing(),
        },
        Method::PATCH => {
            let mut object = read(&body);
            ready(&mut object, objects.len());
            objects.insert(path, object.clone());
            axum::Json(object).into_response()
        }
        Method::POST if path.ends_with("/selfsubjectaccessreviews") => {
            let mut review = read(&body);
            review["status"] = json!({"allowed": true});
            axum::Json(review).into_response()
        }
        Method::DELETE => match objects.remove(&path) {
            Some(object) => axum::Json(object).into_response(),
            None => missing(),
        },
        _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
    }
}

fn read(body: &Bytes) -> Value {
    serde_json::from_slice(body).unwrap()
}

/// What controllers would do.
fn ready(object: &mut Value, version: usize) {
    object["metadata"]["resourceVersion"] = version.to_string().into();
    if object["kind"] == "Deployment" {
        let replicas = object["spec"]["replicas"].clone();
        object["status"] =
            json!({"updatedReplicas": replicas, "readyReplicas": replicas, "replicas": replicas});
    }
    if object["kind"] == "CustomResourceDefinition" {
        object["status"] = json!({"conditions": [{"type": "Established", "status": "True"}]});
    }
}

/// A path ends in a plural or in a name behind one: `/api/v1[/namespaces/N]/P[/NAME]`, `/apis/G/V[/namespaces/N]/P[/NAME]`.
fn is_list(path: &str) -> bool {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let rest = match parts.first() {
        Some(&"api") => &parts[2..],
        _ => parts.get(3..).unwrap_or_default(),
    };
    rest.len() == 1 || (rest.len() == 3 && rest[0] == "namespaces")
}

/// All objects of a plural, in whatever namespace.
fn list(objects: &BTreeMap<String, Value>, path: &str) -> Value {
    let (base, plural) = path.rsplit_once('/').unwrap();
    let of = |p: &str| {
        let (parent, _) = p.rsplit_once('/').unwrap();
        parent == path || (parent.starts_with(base) && parent.ends_with(&format!("/{plural}")))
    };
    let items: Vec<&Value> = objects
        .iter()
        .filter(|(p, _)| of(p))
        .map(|(_, o)| o)
        .collect();
    json!({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items})
}

fn missing() -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound", "message": "not found"});
    (StatusCode::NOT_FOUND, axum::Json(status)).into_response()
}
