//! Reports below `status`: what became of an object, where its writer looks.

use std::collections::{BTreeMap, BTreeSet};

use config::{Kind, ObjectKey};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::{
    Client,
    api::{ListParams, Patch, PatchParams},
    core::DynamicObject,
};
use serde_json::{Value, json};
use tracing::{debug, warn};

use crate::{FIELD_MANAGER, code, resource};

/// What is said of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Which object: one of the same name that came after it starts with nothing.
    pub uid: String,
    /// `metadata.generation` that this is about.
    pub generation: i64,
    /// What is wrong: fields, analysis, rejections by proxies. Sorted.
    pub messages: BTreeSet<Message>,
}

/// One message of a report.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Message {
    /// Whether the object is not in force because of it.
    pub is_error: bool,
    /// Path of the field, or empty.
    pub field: String,
    /// What is wrong, and what to do.
    pub text: String,
}

/// Writes reports, each once.
#[derive(Debug)]
pub struct Reporter {
    /// Each revision is a field manager of its own: it takes back its own reports alone.
    manager: String,
    written: BTreeMap<ObjectKey, Report>,
}

impl Reporter {
    /// The reporter of a revision.
    pub fn new(revision: &str) -> Self {
        Reporter {
            manager: crate::of_revision(FIELD_MANAGER, revision),
            written: BTreeMap::new(),
        }
    }

    /// Counts as written what another leader of the revision reported, so that it is taken back when nothing is said of
    /// the object any more: that may have come while nobody led. Whether all of it was read.
    pub async fn take_over(&mut self, client: &Client) -> bool {
        for kind in Kind::ALL.iter().copied().filter(|k| is_reported(*k)) {
            let version = version(kind);
            let api = resource::all(client, &resource::of_kind(kind, version));
            let mut page = ListParams::default().limit(PAGE);
            loop {
                let list = match api.list(&page).await {
                    Ok(list) => list,
                    // The cluster does not have the kind.
                    Err(e) if code(&e) == Some(404) => break,
                    Err(e) => {
                        debug!("{kind}: reports cannot be read: {e}");
                        return false;
                    }
                };
                for object in list.items {
                    self.take_over_one(kind, &object);
                }
                match list.metadata.continue_.filter(|c| !c.is_empty()) {
                    Some(next) => page = page.continue_token(&next),
                    None => break,
                }
            }
        }
        true
    }

    fn take_over_one(&mut self, kind: Kind, object: &DynamicObject) {
        let meta = &object.metadata;
        let managers = meta.managed_fields.iter().flatten();
        let is_ours = |m: &ManagedFieldsEntry| {
            m.manager.as_ref() == Some(&self.manager) && m.subresource.as_deref() == Some("status")
        };
        let status = &object.data["status"];
        let messages = status["validationMessages"].as_array();
        if !managers.clone().any(is_ours) || messages.is_none_or(Vec::is_empty) {
            return;
        }
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let key = ObjectKey::new(kind, text(&meta.namespace), text(&meta.name));
        let report = Report {
            uid: text(&meta.uid),
            generation: meta.generation.unwrap_or(0),
            // Whatever it said: it differs from what is to be said.
            messages: BTreeSet::from([Message {
                is_error: true,
                field: String::new(),
                text: "reported by another leader".to_owned(),
            }]),
        };
        self.written.entry(key).or_insert(report);
    }

    /// Brings the statuses of these objects to these reports; an object that has no report any more gets one without
    /// messages. What could not be written is tried again with the next call.
    pub async fn write(&mut self, client: &Client, reports: &BTreeMap<ObjectKey, Report>) {
        let cleared: Vec<ObjectKey> = self
            .written
            .iter()
            .filter(|(key, old)| !reports.contains_key(key) && !old.messages.is_empty())
            .map(|(key, _)| key.clone())
            .collect();
        for key in cleared {
            let report = Report {
                messages: BTreeSet::new(),
                ..self.written[&key].clone()
            };
            if self.patch(client, &key, &report).await {
                self.written.remove(&key);
            }
        }
        for (key, report) in reports {
            if self.written.get(key) != Some(report) && self.patch(client, key, report).await {
                self.written.insert(key.clone(), report.clone());
            }
        }
    }

    async fn patch(&self, client: &Client, key: &ObjectKey, report: &Report) -> bool {
        let version = version(key.kind);
        let api = resource::within(
            client,
            &resource::of_kind(key.kind, version),
            &key.namespace,
        );
        let body = json!({
            "apiVersion": format!("{}/{version}", key.kind.group()),
            "kind": key.kind.name(),
            "metadata": {"name": key.name, "namespace": key.namespace},
            "status": status(report, Timestamp::now()),
        });
        let params = PatchParams::apply(&self.manager).force();
        match api
            .patch_status(&key.name, &params, &Patch::Apply(&body))
            .await
        {
            Ok(_) => true,
            // It is gone: there is nothing to say any more.
            Err(e) if code(&e) == Some(404) => true,
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

/// The status of Istio's kinds (`istio.meta.v1alpha1.IstioStatus`).
fn status(report: &Report, now: Timestamp) -> Value {
    let refused = report.messages.iter().any(|m| m.is_error);
    let messages: Vec<Value> = report
        .messages
        .iter()
        .map(|m| {
            let level = if m.is_error { "ERROR" } else { "WARNING" };
            json!({
                "level": level,
                "type": {"name": if m.is_error { "SchemaValidationError" } else { "SchemaWarning" }, "code": if m.is_error { "IST0106" } else { "IST0133" }},
                "documentationUrl": "",
                "message": text(m),
            })
        })
        .collect();
    let message = report
        .messages
        .iter()
        .map(text)
        .collect::<Vec<_>>()
        .join("; ");
    json!({
        "observedGeneration": report.generation.to_string(),
        "conditions": [{
            "type": "Accepted",
            "status": if refused { "False" } else { "True" },
            "reason": if refused { "Invalid" } else { "Accepted" },
            "message": message,
            "observedGeneration": report.generation.to_string(),
            "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        }],
        "validationMessages": messages,
    })
}

fn version(kind: Kind) -> &'static str {
    kind.versions().first().copied().unwrap_or("v1")
}

fn text(m: &Message) -> String {
    match m.field.as_str() {
        "" => m.text.clone(),
        field => format!("{field}: {}", m.text),
    }
}

/// Whether statuses of this kind are ours to write.
pub fn is_reported(kind: Kind) -> bool {
    kind.is_istio()
}

const PAGE: u32 = 500;

#[cfg(test)]
mod tests;
