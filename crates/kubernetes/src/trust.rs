//! The roots of the mesh in every namespace: a ConfigMap that pods mount to know their control plane by.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api, Client, ResourceExt,
    api::{PartialObjectMeta, Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::{FIELD_MANAGER, code};

/// The ConfigMap's name.
pub const CONFIG_MAP: &str = "istio-ca-root-cert";
/// Its one key.
pub const KEY: &str = "root-cert.pem";
/// Namespaces without pods of users.
const LEFT_OUT: [&str; 3] = ["kube-public", "kube-node-lease", "local-path-storage"];

/// Keeps the ConfigMap right in every namespace, for ever; made again when somebody removes or changes it.
pub async fn run(client: Client, mut roots: watch::Receiver<Arc<str>>) {
    let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(client.clone());
    let maps: Api<ConfigMap> = Api::all(client.clone());
    let ours = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut namespaces = pin!(watcher(namespaces, watcher::Config::default()).default_backoff());
    let mut maps = pin!(watcher(maps, ours).default_backoff());
    let mut known = Known::default();
    loop {
        tokio::select! {
            event = namespaces.next() => match event {
                Some(Ok(event)) => known.namespace(event),
                Some(Err(e)) => debug!("namespaces: {e}"),
                None => return,
            },
            event = maps.next() => match event {
                Some(Ok(event)) => known.map(event),
                Some(Err(e)) => debug!("{CONFIG_MAP}: {e}"),
                None => return,
            },
            changed = roots.changed() => if changed.is_err() { return },
            // A write that failed is tried again.
            () = tokio::time::sleep(AGAIN) => {}
        }
        if known.complete() {
            let roots = roots.borrow_and_update().clone();
            for namespace in known.wrong(&roots) {
                write(&client, &namespace, &roots).await;
            }
        }
    }
}

async fn write(client: &Client, namespace: &str, roots: &str) {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "namespace": namespace, "labels": {"istio.io/config": "true"}},
        "data": {KEY: roots},
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match api.patch(CONFIG_MAP, &params, &Patch::Apply(&map)).await {
        Ok(_) => info!("{namespace}: the mesh's roots were written to ConfigMap {CONFIG_MAP}"),
        // A namespace that is going away takes nothing new.
        Err(e) if matches!(code(&e), Some(403 | 404 | 409)) => debug!("{namespace}: {e}"),
        Err(e) => warn!("{namespace}: ConfigMap {CONFIG_MAP} cannot be written: {e}"),
    }
}

#[derive(Debug, Default)]
struct Known {
    namespaces: BTreeSet<String>,
    maps: BTreeMap<String, String>,
    listed: (bool, bool),
    new_namespaces: BTreeSet<String>,
    new_maps: BTreeMap<String, String>,
}

impl Known {
    fn namespace<K: ResourceExt>(&mut self, event: Event<K>) {
        let going = |o: &K| o.meta().deletion_timestamp.is_some();
        match event {
            Event::Init => self.new_namespaces.clear(),
            Event::InitApply(o) if going(&o) => {}
            Event::InitApply(o) => {
                self.new_namespaces.insert(o.name_any());
            }
            Event::InitDone => {
                self.namespaces = std::mem::take(&mut self.new_namespaces);
                self.listed.0 = true;
            }
            Event::Apply(o) if !going(&o) => {
                self.namespaces.insert(o.name_any());
            }
            Event::Apply(o) | Event::Delete(o) => {
                self.namespaces.remove(&o.name_any());
            }
        }
    }

    fn map(&mut self, event: Event<ConfigMap>) {
        let content = |o: ConfigMap| {
            let namespace = o.namespace().unwrap_or_default();
            let text = o.data.and_then(|mut d| d.remove(KEY));
            (namespace, text.unwrap_or_default())
        };
        match event {
            Event::Init => self.new_maps.clear(),
            Event::InitApply(o) => self.new_maps.extend([content(o)]),
            Event::InitDone => {
                self.maps = std::mem::take(&mut self.new_maps);
                self.listed.1 = true;
            }
            Event::Apply(o) => self.maps.extend([content(o)]),
            Event::Delete(o) => {
                self.maps.remove(&content(o).0);
            }
        }
    }

    fn complete(&self) -> bool {
        self.listed == (true, true)
    }

    fn wrong(&self, roots: &str) -> Vec<String> {
        let wanted = |n: &&String| {
            !LEFT_OUT.contains(&n.as_str()) && self.maps.get(*n).is_none_or(|text| text != roots)
        };
        self.namespaces.iter().filter(wanted).cloned().collect()
    }
}

const AGAIN: Duration = Duration::from_secs(30);
