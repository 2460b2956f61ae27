//! What istioctl asks on ADS: how far the proxies are (`istio.io/debug/syncz`), what one was sent
//! (`istio.io/debug/config_dump`), and the debug pages (`istio.io/debug`, with the page as the resource's name).
//!
//! As istiod has it: only who proved its identity is answered, and who is not of the root namespace learns of its own
//! namespace alone. Each answer names the replica.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{body::Body, http::Request as Ask};
use prost::Message;
use proto::{
    Any, any,
    envoy::{
        admin::v3::UpdateFailureState,
        config::core::v3::{ControlPlane, Node},
        service::status::v3::{ClientConfig, ConfigStatus, client_config::GenericXdsConfig},
    },
    prost_types::Timestamp,
};
use serde_json::{Value, json};
use tonic::Status;
use tower::ServiceExt;
use xds::{
    Resource,
    server::{Names, Request, Response},
};

use super::{Connection, Server, connection::TypeState};
use crate::debug;

const PAGES: &str = "istio.io/debug";
const SYNCZ: &str = "istio.io/debug/syncz";
const CONFIG_DUMP: &str = "istio.io/debug/config_dump";
/// What a nonce of ours begins with; istioctl acknowledges, which is no new question.
const NONCE: &str = "debug-";
/// A page larger than this is not put into a message.
const LARGEST_PAGE: usize = 256 << 20;
/// Pages that who is not of the root namespace may ask for, about a proxy of its own.
const OF_ONE_PROXY: [&str; 2] = ["config_dump", "edsz"];
/// istioctl looks for this text, and asks the next replica.
const ELSEWHERE: &str =
    "Proxy not connected to this Pilot instance. It may be connected to another instance.";

/// Whether a request is about the control plane and not for configuration.
pub(super) fn is_question(type_url: &str) -> bool {
    matches!(type_url, PAGES | SYNCZ | CONFIG_DUMP)
}

/// The answer; none to an acknowledgement.
///
/// # Errors
/// Who asks may not, or the question is none. The stream ends with it.
pub(super) async fn answer(
    server: &Arc<Server>,
    connection: &Connection,
    request: &Request,
) -> Result<Option<Response>, Status> {
    if request.nonce.starts_with(NONCE) {
        return Ok(None);
    }
    let Some(caller) = &connection.caller else {
        return Err(Status::unauthenticated(
            "authentication required: ask on the secure port",
        ));
    };
    let push = server
        .current()
        .ok_or_else(|| Status::unavailable("the configuration is not read yet; try again"))?;
    let all = caller.namespace() == push.mesh.root_namespace();
    let seen = |c: &Connection| all || c.node.namespace == caller.namespace();
    let names = match &request.names {
        Names::Sotw(names) => names,
        Names::Delta { subscribe, .. } => subscribe,
    };
    let resources = match request.type_url.as_str() {
        SYNCZ => server
            .connections()
            .iter()
            .filter(|c| seen(c) && c.node.proxy_config.is_some())
            .map(|c| resource(c.node.workload.clone(), &any::pack(&state(c))))
            .collect(),
        CONFIG_DUMP => {
            let proxy = only(names)?;
            match server.connection_of(proxy).filter(|c| seen(c)) {
                Some(c) => dump(&c, &push.version)?,
                None => vec![page(CONFIG_DUMP, proxy, ELSEWHERE.as_bytes())],
            }
        }
        _ => {
            let wanted = only(names)?;
            if !all {
                own_page(server, wanted, seen)?;
            }
            vec![page(PAGES, wanted, &fetch(server, wanted).await?)]
        }
    };
    static ANSWERS: AtomicU64 = AtomicU64::new(1);
    let nonce = format!("{NONCE}{}", ANSWERS.fetch_add(1, Ordering::Relaxed));
    let identifier = identifier(&push.mesh.settings().replica);
    Ok(Some(Response::answer(
        connection.mode,
        &request.type_url,
        &push.version,
        nonce,
        &ControlPlane { identifier }.encode_to_vec(),
        &resources,
    )))
}

/// Who we are, in istiod's words.
fn identifier(replica: &str) -> String {
    json!({
        "Component": "outrigger",
        "ID": replica,
        "Info": {
            "version": env!("CARGO_PKG_VERSION"),
            "revision": debug::REVISION,
            "golang_version": "",
            "status": "Clean",
            "tag": env!("CARGO_PKG_VERSION"),
        },
    })
    .to_string()
}

fn only(names: &[String]) -> Result<&str, Status> {
    match names {
        [one] => Ok(one),
        _ => Err(Status::invalid_argument(
            "exactly one debug request is required",
        )),
    }
}

/// How far a proxy is.
fn state(connection: &Connection) -> ClientConfig {
    let text = |value: &str| proto::Value {
        kind: Some(proto::prost_types::value::Kind::StringValue(
            value.to_owned(),
        )),
    };
    let node = &connection.node;
    let metadata = [
        ("CLUSTER_ID", node.cluster_id()),
        ("ISTIO_VERSION", &connection.istio_version()),
        ("NAMESPACE", &node.namespace),
    ];
    ClientConfig {
        node: Some(Node {
            // POD.NAMESPACE, as istiod has it, and not the whole id.
            id: node.workload.clone(),
            metadata: Some(proto::Struct {
                fields: metadata
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), text(value)))
                    .collect(),
            }),
            ..Node::default()
        }),
        generic_xds_configs: connection
            .types()
            .into_iter()
            .map(|(type_url, state)| generic(&type_url, &state))
            .collect(),
        ..ClientConfig::default()
    }
}

fn generic(type_url: &str, state: &TypeState) -> GenericXdsConfig {
    let sent_at = state.sent_at.map(Timestamp::from);
    let status = match state {
        TypeState {
            rejected: Some(_), ..
        } => ConfigStatus::Error,
        TypeState { sent, .. } if sent.is_empty() => ConfigStatus::NotSent,
        TypeState { sent, acked, .. } if sent == acked => ConfigStatus::Synced,
        _ => ConfigStatus::Stale,
    };
    GenericXdsConfig {
        type_url: type_url.to_owned(),
        config_status: status as i32,
        last_updated: sent_at,
        error_state: state.rejected.as_ref().map(|why| UpdateFailureState {
            last_update_attempt: sent_at,
            details: why.to_string(),
            ..UpdateFailureState::default()
        }),
        ..GenericXdsConfig::default()
    }
}

/// The sections of `/debug/config_dump`, each a resource of its own.
fn dump(connection: &Connection, version: &str) -> Result<Vec<Arc<Resource>>, Status> {
    let whole = debug::config_dump::dump(connection, version, false);
    let sections = whole["configs"].as_array().into_iter().flatten();
    sections
        .map(|section| {
            let mut fields = section.clone();
            let type_url = fields
                .as_object_mut()
                .and_then(|f| f.remove("@type"))
                .and_then(|t| t.as_str().map(str::to_owned))
                .unwrap_or_default();
            let value = encoded(&type_url, &fields)?;
            Ok(resource(type_url.clone(), &Any { type_url, value }))
        })
        .collect()
}

fn encoded(type_url: &str, fields: &Value) -> Result<Vec<u8>, Status> {
    proto::json::value_to_encoded(any::type_name(type_url), fields)
        .map_err(|e| Status::internal(format!("{type_url}: {e}")))
}

/// Whether a page is about a proxy that may be seen.
fn own_page(
    server: &Server,
    wanted: &str,
    seen: impl Fn(&Connection) -> bool,
) -> Result<(), Status> {
    let (name, query) = wanted.split_once('?').unwrap_or((wanted, ""));
    let proxy = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("proxyID="));
    let own = proxy
        .and_then(|p| server.connection_of(p))
        .is_some_and(|c| seen(&c));
    match OF_ONE_PROXY.contains(&name) && own {
        true => Ok(()),
        false => Err(Status::permission_denied(format!(
            "{name:?} is only for the control plane's namespace, or for a proxy of your own: {}?proxyID=POD.NAMESPACE",
            OF_ONE_PROXY.join(", ")
        ))),
    }
}

async fn fetch(server: &Arc<Server>, wanted: &str) -> Result<Vec<u8>, Status> {
    let ask = Ask::get(format!("/debug/{wanted}"))
        .body(Body::empty())
        .map_err(|e| Status::invalid_argument(format!("{wanted:?}: {e}")))?;
    let answered = debug::router(server.clone(), None)
        .oneshot(ask)
        .await
        .map_err(|e| Status::internal(e.to_string()))?;
    if answered.status() == axum::http::StatusCode::NOT_FOUND && wanted.contains("proxyID=") {
        return Ok(ELSEWHERE.into());
    }
    let body = axum::body::to_bytes(answered.into_body(), LARGEST_PAGE).await;
    body.map(Vec::from)
        .map_err(|e| Status::resource_exhausted(format!("{wanted}: {e}")))
}

fn page(type_url: &str, name: &str, body: &[u8]) -> Arc<Resource> {
    Arc::new(Resource::new(name, type_url, body))
}

fn resource(name: String, body: &Any) -> Arc<Resource> {
    Arc::new(Resource::new(name, &body.type_url, &body.value))
}
