//! One kind: list and watch, as events for the state.

use std::{pin::pin, time::Duration};

use config::Kind;
use futures_util::StreamExt;
use kube::{
    Api, Client,
    core::DynamicObject,
    runtime::{
        utils::Backoff,
        watcher::{self, DefaultBackoff, Event},
    },
};
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::Options;
use crate::{code, rejections, resource};

/// Something happened to the objects of a kind.
#[derive(Debug)]
pub(super) struct Followed {
    pub(super) kind: Kind,
    pub(super) what: What,
}

/// What happened.
#[derive(Debug)]
pub(super) enum What {
    /// A list begins: what it does not name is gone when it ends.
    Listing,
    /// An object of the list.
    Listed(Box<Value>),
    /// The list is complete.
    Complete,
    /// An object is new or different.
    Changed(Box<Value>),
    /// An object is gone.
    Gone {
        /// Its namespace, or empty.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// Follows a kind until nobody listens.
pub(super) async fn run(
    client: Client,
    kind: Kind,
    options: Options,
    send: mpsc::Sender<Followed>,
) {
    // Versions of a kind mean the same; which of them a cluster has depends on its age.
    let mut versions = kind.versions().iter().cycle();
    let mut version = *versions.next().unwrap_or(&"v1");
    let mut tried = 1;
    loop {
        let ended = follow(&client, kind, version, &options, &send).await;
        match ended {
            Ended::Deaf => return,
            Ended::Absent if tried < kind.versions().len() => {
                tried += 1;
                version = versions.next().unwrap_or(&version);
            }
            Ended::Absent => {
                debug!("the cluster has no {kind} of {:?}", kind.group());
                for what in [What::Listing, What::Complete] {
                    if send.send(Followed { kind, what }).await.is_err() {
                        return;
                    }
                }
                tokio::time::sleep(options.absent_retry).await;
                tried = 1;
                version = versions.next().unwrap_or(&version);
            }
        }
    }
}

enum Ended {
    /// The cluster does not have the kind in this version.
    Absent,
    /// Nobody listens any more.
    Deaf,
}

async fn follow(
    client: &Client,
    kind: Kind,
    version: &str,
    options: &Options,
    send: &mpsc::Sender<Followed>,
) -> Ended {
    let found = resource::of_kind(kind, version);
    let api: Api<DynamicObject> = resource::all(client, &found);
    let mut config = watcher::Config::default().page_size(PAGE);
    match kind {
        Kind::Secret => config = config.fields(SECRET_FIELDS),
        Kind::ConfigMap => config = config.fields(CONFIG_MAP_FIELDS),
        _ => {}
    }
    let root = &options.root_namespace;
    let mut stream = pin!(watcher::watcher(api, config));
    let mut backoff = DefaultBackoff::default();
    let mut failing = false;
    while let Some(next) = stream.next().await {
        let event = match next {
            Ok(event) => event,
            Err(watcher::Error::InitialListFailed(e)) if code(&e) == Some(404) => {
                return Ended::Absent;
            }
            Err(e) => {
                // The cause is below: the outer text alone says only what was tried.
                let text = full(&e);
                if is_expired(&e) {
                    info!("{kind}: listed again, because the watch was too far behind ({text})");
                } else if failing {
                    debug!("{kind}: {text}");
                } else {
                    warn!("{kind}: {text}; trying again");
                }
                failing = true;
                let wait = backoff.next().unwrap_or(Duration::from_secs(30));
                tokio::time::sleep(wait).await;
                continue;
            }
        };
        if failing {
            info!("{kind}: in step with the API server again");
            failing = false;
        }
        backoff.reset();
        let what = match event {
            Event::Init => What::Listing,
            Event::InitApply(mut object) => {
                if !is_read(&mut object, kind, root) {
                    continue;
                }
                What::Listed(trimmed(object, kind, version))
            }
            Event::InitDone => What::Complete,
            Event::Apply(mut object) => {
                if is_read(&mut object, kind, root) {
                    What::Changed(trimmed(object, kind, version))
                } else {
                    gone(object)
                }
            }
            Event::Delete(object) => gone(object),
        };
        if send.send(Followed { kind, what }).await.is_err() {
            return Ended::Deaf;
        }
    }
    Ended::Deaf
}

fn gone(object: DynamicObject) -> What {
    What::Gone {
        namespace: object.metadata.namespace.unwrap_or_default(),
        name: object.metadata.name.unwrap_or_default(),
    }
}

/// Whether an object is read at all. What replicas tell each other is no configuration. Of a ConfigMap outside the root namespace only authorities of backends are, and
/// nothing else of it is kept. Of a Secret nothing is kept but certificates and authorities; one without any still counts
/// as there, so that who names it is told what it lacks.
fn is_read(object: &mut DynamicObject, kind: Kind, root: &str) -> bool {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let keys: &[&str] = match kind {
        Kind::Secret => &CERTIFICATES,
        Kind::ConfigMap if rejections::is_board(name) => return false,
        Kind::ConfigMap if object.metadata.namespace.as_deref() != Some(root) => &AUTHORITIES,
        _ => return true,
    };
    let mut some = false;
    if let Some(data) = object.data.get_mut("data").and_then(Value::as_object_mut) {
        data.retain(|key, _| keys.contains(&key.as_str()));
        some = !data.is_empty();
    }
    if let Some(rest) = object.data.as_object_mut() {
        rest.remove("binaryData");
    }
    some || kind == Kind::Secret
}

/// The object as a file would hold it, without what nobody reads and everybody has.
fn trimmed(mut object: DynamicObject, kind: Kind, version: &str) -> Box<Value> {
    object.metadata.managed_fields = None;
    if let Some(annotations) = &mut object.metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
    let mut value = serde_json::to_value(object).unwrap_or_default();
    // Items of a list do not say what they are.
    let api_version = match kind.group() {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    };
    value["apiVersion"] = api_version.into();
    value["kind"] = kind.name().into();
    Box::new(value)
}

fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchStartFailed(e) | watcher::Error::WatchFailed(e) => {
            code(e) == Some(410)
        }
        _ => false,
    }
}

fn full(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !out.contains(&text) {
            out = format!("{out}: {text}");
        }
        source = cause.source();
    }
    out
}

const PAGE: u32 = 500;
/// Keys of a ConfigMap under which authorities are looked for.
const AUTHORITIES: [&str; 2] = ["ca.crt", "cacert"];
/// Keys of a Secret that a gateway can use.
const CERTIFICATES: [&str; 8] = [
    "tls.crt", "tls.key", "cert", "key", "ca.crt", "cacert", "crl", "ca.crl",
];
/// Our own roots stand in every namespace and say nothing new.
const CONFIG_MAP_FIELDS: &str = "metadata.name!=istio-ca-root-cert";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Large or confidential Secrets that are no certificate of a gateway stay at the API server.
const SECRET_FIELDS: &str = "type!=helm.sh/release.v1,type!=kubernetes.io/service-account-token,\
    type!=kubernetes.io/dockercfg,type!=kubernetes.io/dockerconfigjson,type!=bootstrap.kubernetes.io/token,\
    type!=kubernetes.io/basic-auth,type!=kubernetes.io/ssh-auth,type!=istio.io/ca-root";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(kind: Kind, namespace: &str, data: Value) -> Option<Value> {
        let object = json!({
            "apiVersion": "v1", "kind": kind.name(),
            "metadata": {"name": "m", "namespace": namespace}, "data": data,
        });
        let mut object: DynamicObject = serde_json::from_value(object).unwrap();
        is_read(&mut object, kind, "istio-system").then(|| object.data["data"].clone())
    }

    #[test]
    fn of_foreign_config_maps_only_authorities_are_kept() {
        let read = |namespace, data| read(Kind::ConfigMap, namespace, data);
        assert_eq!(
            read("istio-system", json!({"mesh": "x"})),
            Some(json!({"mesh": "x"}))
        );
        assert_eq!(read("shop", json!({"settings": "x"})), None);
        assert_eq!(
            read("shop", json!({"settings": "x", "ca.crt": "y"})),
            Some(json!({"ca.crt": "y"}))
        );
    }

    #[test]
    fn of_secrets_only_what_a_gateway_can_use_is_kept() {
        let read = |namespace, data| read(Kind::Secret, namespace, data);
        assert_eq!(
            read("istio-system", json!({"password": "eA=="})),
            Some(json!({}))
        );
        assert_eq!(
            read(
                "shop",
                json!({"tls.crt": "eA==", "tls.key": "eQ==", "password": "eg=="})
            ),
            Some(json!({"tls.crt": "eA==", "tls.key": "eQ=="}))
        );
    }
}
