//! The pages on the monitoring port (15014): `/metrics`, `/ready`, `/version` and `/debug/…` in istiod's forms.
//!
//! `istioctl proxy-config -f` reads what `/debug/config_dump` answers, and `proxy-status` what `/debug/syncz` does.

pub(crate) mod config_dump;
mod readers;
mod registry;
mod status;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use serde::Deserialize;

pub use self::readers::Readers;
use crate::server::{Connection, Server};

/// What this program was built from.
pub(crate) const REVISION: &str = match option_env!("OUTRIGGER_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// All pages; with `readers` those below `/debug` are for them alone, and the server has to tell who connects.
pub fn router(server: Arc<Server>, readers: Option<Arc<Readers>>) -> Router {
    let mut debug = Router::new()
        .route("/debug", get(list))
        .route("/debug/list", get(list))
        .route("/debug/syncz", get(syncz))
        .route("/debug/adsz", get(connections))
        .route("/debug/connections", get(connections))
        .route("/debug/config_dump", get(config_dump))
        .route("/debug/edsz", get(edsz))
        .route("/debug/endpointz", get(endpointz))
        .route("/debug/endpointShardz", get(endpointz))
        .route("/debug/clusterz", get(clusterz))
        .route("/debug/registryz", get(registryz))
        .route("/debug/mesh", get(mesh))
        .route("/debug/authz", get(authz))
        .route("/debug/problems", get(problems));
    if let Some(readers) = readers {
        debug = debug.route_layer(middleware::from_fn_with_state(readers, readers::only));
    }
    Router::new()
        .route("/ready", get(ready))
        .route("/healthz", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .merge(debug)
        .fallback(elsewhere)
        .with_state(server)
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Options {
    #[serde(rename = "proxyID")]
    proxy_id: Option<String>,
    #[serde(default, rename = "include_eds")]
    include_eds: Option<String>,
}

/// istioctl asks for `//version`: whoever doubles a slash is sent to where it is single, as Go's servers do.
async fn elsewhere(uri: Uri) -> Response {
    let single: Vec<&str> = uri.path().split('/').filter(|p| !p.is_empty()).collect();
    if !uri.path().contains("//") {
        return StatusCode::NOT_FOUND.into_response();
    }
    let query = uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    Redirect::permanent(&format!("/{}{query}", single.join("/"))).into_response()
}

async fn ready(State(server): State<Arc<Server>>) -> Response {
    if server.is_ready() {
        StatusCode::OK.into_response()
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the configuration is not read yet\n",
        )
            .into_response()
    }
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        server.metrics.text(),
    )
        .into_response()
}

async fn version() -> Response {
    // VERSION-REVISION-STATUS, as istioctl takes it apart.
    format!("{}-{REVISION}-Clean", env!("CARGO_PKG_VERSION")).into_response()
}

async fn list() -> &'static str {
    "/debug/adsz          connected proxies and what they watch\n\
     /debug/authz         the policies of a proxy and where they were read (?proxyID=POD.NAMESPACE)\n\
     /debug/clusterz      the clusters that are followed\n\
     /debug/config_dump   what a proxy was sent (?proxyID=POD.NAMESPACE[&include_eds=true])\n\
     /debug/edsz          the endpoints that a proxy was sent (?proxyID=POD.NAMESPACE)\n\
     /debug/endpointz     all endpoints by service\n\
     /debug/mesh          MeshConfig in force\n\
     /debug/problems      what is wrong in the configuration files\n\
     /debug/registryz     all services\n\
     /debug/syncz         how far each proxy is\n"
}

async fn syncz(State(server): State<Arc<Server>>, Query(options): Query<Options>) -> Response {
    let wanted = |c: &Arc<Connection>| {
        options
            .proxy_id
            .as_ref()
            .is_none_or(|p| *p == c.node.workload)
    };
    let all: Vec<_> = server
        .connections()
        .into_iter()
        // Who only asks about others (istioctl) is no proxy.
        .filter(|c| wanted(c) && !c.types().is_empty())
        .map(|c| status::sync(&c))
        .collect();
    Json(all).into_response()
}

async fn connections(State(server): State<Arc<Server>>) -> Response {
    Json(status::clients(&server)).into_response()
}

async fn config_dump(
    State(server): State<Arc<Server>>,
    Query(options): Query<Options>,
) -> Response {
    let include_eds = options
        .include_eds
        .as_deref()
        .is_some_and(|v| v != "false" && v != "0");
    with_proxy(&server, &options, |c, version| {
        config_dump::dump(c, version, include_eds)
    })
}

async fn edsz(State(server): State<Arc<Server>>, Query(options): Query<Options>) -> Response {
    with_proxy(&server, &options, |c, version| {
        config_dump::endpoints(c, version)
    })
}

fn with_proxy(
    server: &Server,
    options: &Options,
    make: impl FnOnce(&Connection, &str) -> serde_json::Value,
) -> Response {
    let Some(proxy) = &options.proxy_id else {
        let message =
            "name the proxy: ?proxyID=POD.NAMESPACE (see /debug/syncz for those connected)\n";
        return (StatusCode::BAD_REQUEST, message).into_response();
    };
    let Some(connection) = server.connection_of(proxy) else {
        let message =
            format!("{proxy} is not connected to this control plane; it may be to another one\n");
        return (StatusCode::NOT_FOUND, message).into_response();
    };
    let version = server
        .current()
        .map(|p| p.version.clone())
        .unwrap_or_default();
    Json(make(&connection, &version)).into_response()
}

async fn endpointz(State(server): State<Arc<Server>>) -> Response {
    match server.current() {
        Some(push) => Json(registry::endpoints(&push.mesh)).into_response(),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// What `istioctl remote-clusters` lists.
async fn clusterz(State(server): State<Arc<Server>>) -> Response {
    match server.current() {
        Some(push) => Json(serde_json::json!([
            {"id": push.mesh.cluster_id(), "secretName": "", "syncStatus": "synced"}
        ]))
        .into_response(),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

async fn registryz(State(server): State<Arc<Server>>) -> Response {
    match server.current() {
        Some(push) => Json(registry::services(&push.mesh)).into_response(),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

async fn mesh(State(server): State<Arc<Server>>) -> Response {
    match server.current() {
        Some(push) => Json(proto::json::to_value(push.mesh.config())).into_response(),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

async fn authz(State(server): State<Arc<Server>>, Query(options): Query<Options>) -> Response {
    let Some(push) = server.current() else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    with_proxy(&server, &options, |connection, _| {
        status::policies(connection, &push.mesh)
    })
}

async fn problems(State(server): State<Arc<Server>>) -> Response {
    let all: Vec<_> = server.problems().iter().map(status::problem).collect();
    Json(all).into_response()
}
