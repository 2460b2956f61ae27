//! Our webhook configurations: the API server must trust the authority that signs our serving certificate, now and after
//! each rotation. Whoever takes that away (a reinstall, another tool) finds it put back.

use std::{fmt::Debug, pin::pin, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::StreamExt;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::{FIELD_MANAGER, code};

/// Which configurations are ours.
#[derive(Debug, Clone)]
pub struct Ours {
    /// Of all that carry this label selector …
    pub selector: String,
    /// … those entries that call this service: namespace …
    pub namespace: String,
    /// … and name.
    pub service: String,
}

/// Keeps both kinds of configurations right, for ever.
pub async fn run(client: Client, ours: Ours, roots: watch::Receiver<Arc<str>>) {
    tokio::join!(
        keep::<MutatingWebhookConfiguration>(&client, &ours, roots.clone()),
        keep::<ValidatingWebhookConfiguration>(&client, &ours, roots),
    );
}

/// What the two kinds have in common.
trait Configuration:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static
{
    /// The name and the call of each entry.
    fn calls(&self) -> Vec<(&str, &WebhookClientConfig)>;
}

impl Configuration for MutatingWebhookConfiguration {
    fn calls(&self) -> Vec<(&str, &WebhookClientConfig)> {
        let all = self.webhooks.iter().flatten();
        all.map(|w| (w.name.as_str(), &w.client_config)).collect()
    }
}

impl Configuration for ValidatingWebhookConfiguration {
    fn calls(&self) -> Vec<(&str, &WebhookClientConfig)> {
        let all = self.webhooks.iter().flatten();
        all.map(|w| (w.name.as_str(), &w.client_config)).collect()
    }
}

async fn keep<K: Configuration>(
    client: &Client,
    ours: &Ours,
    mut roots: watch::Receiver<Arc<str>>,
) {
    let api: Api<K> = Api::all(client.clone());
    let config = watcher::Config::default().labels(&ours.selector);
    let mut stream = pin!(watcher(api.clone(), config).default_backoff());
    let mut known: Vec<K> = Vec::new();
    loop {
        tokio::select! {
            event = stream.next() => match event {
                Some(Ok(Event::Init)) => known.clear(),
                Some(Ok(Event::InitApply(o) | Event::Apply(o))) => {
                    known.retain(|k| k.name_any() != o.name_any());
                    known.push(o);
                }
                Some(Ok(Event::Delete(o))) => known.retain(|k| k.name_any() != o.name_any()),
                Some(Ok(Event::InitDone)) => {}
                Some(Err(e)) => debug!("{}: {e}", K::kind(&())),
                None => return,
            },
            changed = roots.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN) => {}
        }
        let bundle = roots.borrow_and_update().clone();
        for found in &known {
            mend(&api, found, ours, &bundle).await;
        }
    }
}

async fn mend<K: Configuration>(api: &Api<K>, found: &K, ours: &Ours, bundle: &str) {
    let wrong: Vec<&str> = found
        .calls()
        .into_iter()
        .filter(|(_, call)| {
            let service = call.service.as_ref();
            let ours =
                service.is_some_and(|s| s.namespace == ours.namespace && s.name == ours.service);
            let bytes = call.ca_bundle.as_ref().map(|b| b.0.as_slice());
            ours && bytes != Some(bundle.as_bytes())
        })
        .map(|(name, _)| name)
        .collect();
    if wrong.is_empty() {
        return;
    }
    let encoded = BASE64_STANDARD.encode(bundle);
    let webhooks: Vec<_> = wrong
        .iter()
        .map(|name| json!({"name": name, "clientConfig": {"caBundle": encoded}}))
        .collect();
    let kind = K::kind(&());
    let name = found.name_any();
    // Entries are merged by their names: what stands in others stays.
    let patch = Patch::Strategic(json!({"webhooks": webhooks}));
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    match api.patch(&name, &params, &patch).await {
        Ok(_) => info!("{kind} {name}: caBundle written ({} entries)", wrong.len()),
        Err(e) if code(&e) == Some(404) => {}
        Err(e) => warn!("{kind} {name}: caBundle cannot be written: {e}"),
    }
}

const AGAIN: Duration = Duration::from_secs(30);
