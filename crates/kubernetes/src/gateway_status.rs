//! Status of Gateway API's objects: ours beside that of other controllers.
//!
//! Lists of parents and ancestors belong to several controllers and are written as a whole, so each status is read,
//! ours is put into it, and it is written back for the version that was read. A condition keeps its time as long as it
//! says the same.

use std::collections::BTreeMap;

use config::ObjectKey;
use jiff::Timestamp;
use kube::{
    Client,
    api::{Patch, PatchParams},
};
use serde_json::{Map, Value, json};
use tracing::{debug, warn};

use crate::{FIELD_MANAGER, code, resource};

/// What is to stand below `status` of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// Which object: one of the same name that came after it starts with nothing.
    pub uid: String,
    /// `conditions` without times; of `parents` and `ancestors` those whose `controllerName` is ours.
    pub status: Value,
}

/// Writes statuses, each once.
#[derive(Debug, Default)]
pub struct StatusWriter {
    /// What was wanted when the status was last brought to it.
    written: BTreeMap<ObjectKey, Wanted>,
    /// The version of a kind that the cluster has, by kind.
    versions: BTreeMap<config::Kind, usize>,
}

impl StatusWriter {
    /// Brings the statuses of these objects to what is wanted; `ours` are the names of our controllers. What could not be
    /// written is tried again with the next call; whether there is none of that.
    pub async fn write(
        &mut self,
        client: &Client,
        wanted: &BTreeMap<ObjectKey, Wanted>,
        ours: &[&str],
    ) -> bool {
        self.written.retain(|key, _| wanted.contains_key(key));
        let mut all = true;
        for (key, wanted) in wanted {
            if self.written.get(key) == Some(wanted) {
                continue;
            }
            if self.bring(client, key, wanted, ours).await {
                self.written.insert(key.clone(), wanted.clone());
            } else {
                all = false;
            }
        }
        all
    }

    /// Whether there is nothing left to do.
    async fn bring(
        &mut self,
        client: &Client,
        key: &ObjectKey,
        wanted: &Wanted,
        ours: &[&str],
    ) -> bool {
        let all = key.kind.versions();
        let at = self.versions.entry(key.kind).or_default();
        let version = all.get(*at).copied().unwrap_or("v1");
        let resource = resource::of_kind(key.kind, version);
        let api = resource::within(client, &resource, &key.namespace);
        let current = match api.get_opt(&key.name).await {
            Ok(Some(current)) => current,
            // Gone, or the cluster has the kind in another version.
            Ok(None) => {
                *at = (*at + 1) % all.len().max(1);
                return *at == 0;
            }
            Err(e) => {
                debug!("{key}: its status cannot be read: {e}");
                return code(&e) == Some(404);
            }
        };
        // Another object of the name: what is wanted of it is on its way.
        if !wanted.uid.is_empty() && current.metadata.uid.as_ref() != Some(&wanted.uid) {
            return true;
        }
        let old = current.data.get("status").unwrap_or(&Value::Null);
        let new = merged(old, &wanted.status, ours, Timestamp::now());
        if same(old, &new) {
            return true;
        }
        let body = json!({
            "metadata": {"resourceVersion": current.metadata.resource_version},
            "status": new,
        });
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let written = api
            .patch_status(&key.name, &params, &Patch::Merge(&body))
            .await;
        match written {
            Ok(_) => true,
            Err(e) if code(&e) == Some(404) => true,
            // Somebody else was faster: read again.
            Err(e) if code(&e) == Some(409) => false,
            Err(e) if code(&e).is_some() => {
                warn!("{key}: its status cannot be written: {e}");
                true
            }
            Err(e) => {
                debug!("{key}: its status cannot be written: {e}");
                false
            }
        }
    }
}

/// What stands there, with what is ours as wanted.
fn merged(old: &Value, wanted: &Value, ours: &[&str], now: Timestamp) -> Value {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let mut out = old.as_object().cloned().unwrap_or_default();
    for (name, wanted) in wanted.as_object().into_iter().flatten() {
        let old = old.get(name).unwrap_or(&Value::Null);
        let new = match name.as_str() {
            "conditions" => conditions(old, wanted, &now),
            "listeners" => listed(old, wanted, &["name"], &now),
            "parents" => others(old, ours)
                .chain(items(&listed(
                    old,
                    wanted,
                    &["parentRef", "controllerName"],
                    &now,
                )))
                .collect(),
            "ancestors" => others(old, ours)
                .chain(items(&listed(
                    old,
                    wanted,
                    &["ancestorRef", "controllerName"],
                    &now,
                )))
                .collect(),
            _ => wanted.clone(),
        };
        out.insert(name.clone(), new);
    }
    Value::Object(out)
}

/// An empty list says as much as none.
fn same(old: &Value, new: &Value) -> bool {
    let told = |v: &Value| -> Map<String, Value> {
        let all = v.as_object().cloned().unwrap_or_default();
        all.into_iter()
            .filter(|(_, v)| v.as_array().is_none_or(|a| !a.is_empty()))
            .collect()
    };
    told(old) == told(new)
}

fn items(list: &Value) -> Vec<Value> {
    list.as_array().cloned().unwrap_or_default()
}

fn others<'a>(old: &'a Value, ours: &'a [&str]) -> impl Iterator<Item = Value> + 'a {
    items(old).into_iter().filter(|item| {
        let by = item["controllerName"].as_str().unwrap_or_default();
        !ours.contains(&by)
    })
}

/// The wanted elements, each with the times of the old one that has the same `keys`.
fn listed(old: &Value, wanted: &Value, keys: &[&str], now: &str) -> Value {
    let old = items(old);
    items(wanted)
        .into_iter()
        .map(|mut new| {
            let before = old.iter().find(|o| keys.iter().all(|k| o[*k] == new[*k]));
            let before = before.map_or(&Value::Null, |b| &b["conditions"]);
            new["conditions"] = conditions(before, &new["conditions"], now);
            new
        })
        .collect()
}

/// The wanted conditions; those of other types, which somebody else may have put there, stay.
fn conditions(old: &Value, wanted: &Value, now: &str) -> Value {
    let (old, mut wanted) = (items(old), items(wanted));
    for new in &mut wanted {
        let before = old.iter().find(|o| o["type"] == new["type"]);
        let since = before
            .filter(|o| o["status"] == new["status"])
            .and_then(|o| o["lastTransitionTime"].as_str());
        new["lastTransitionTime"] = since.unwrap_or(now).into();
    }
    let foreign = old
        .into_iter()
        .filter(|o| !wanted.iter().any(|w| w["type"] == o["type"]))
        // What the API server puts in until a controller comes along.
        .filter(|o| o["reason"] != "Pending");
    let mut out: Vec<Value> = foreign.collect();
    out.extend(wanted);
    out.into()
}

#[cfg(test)]
mod tests;
