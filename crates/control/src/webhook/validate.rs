//! `/validate`: whether an object is one that proxies can be given.

use std::{path::Path, sync::Arc};

use config::{Kind, Problem, Severity, Snapshot, decode};
use serde_json::Value;

use super::review::{Review, Verdict};
use crate::{security, unserved};

/// The answer to a request.
pub(super) fn answer(body: &[u8]) -> Value {
    let review = match Review::read(body) {
        Ok(review) => review,
        Err(refused) => return refused,
    };
    let verdict = match &review.object {
        Some(object) => judge(object, &review.namespace),
        None => Verdict::allowed(),
    };
    review.answer(verdict)
}

fn judge(object: &Value, namespace: &str) -> Verdict {
    let mut object = object.clone();
    let kind = object["kind"].as_str().unwrap_or_default();
    let group = object["apiVersion"].as_str().unwrap_or_default();
    let group = group.split_once('/').map_or("", |(group, _)| group);
    // What else a configuration sends here is none of our business.
    if Kind::find(group, kind).is_none() {
        return Verdict::allowed();
    }
    // The name of an object with generateName comes after admission.
    if object["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .is_empty()
    {
        object["metadata"]["name"] = object["metadata"]["generateName"].clone();
    }
    if object["metadata"]["namespace"].is_null() && !namespace.is_empty() {
        object["metadata"]["namespace"] = namespace.into();
    }
    let file: Arc<Path> = Path::new("admission").into();
    let decoded = decode::value(&object, &file);
    let (errors, mut warnings): (Vec<_>, Vec<_>) = decoded
        .problems
        .into_iter()
        .partition(|p| p.severity == Severity::Error);
    if !errors.is_empty() {
        let all: Vec<String> = errors.iter().map(shown).collect();
        return Verdict::Denied(format!("configuration is invalid: {}", all.join("; ")));
    }
    // What is known of the object alone: others that it refers to may come later.
    let (snapshot, _) = Snapshot::of_cluster(decoded.objects, &Snapshot::empty());
    warnings.extend(unserved::problems(&snapshot));
    warnings.extend(security::problems(&snapshot, None));
    Verdict::Allowed {
        patch: Vec::new(),
        warnings: warnings.iter().map(shown).collect(),
    }
}

fn shown(p: &Problem) -> String {
    match p.field.as_str() {
        "" => p.message.clone(),
        field => format!("{field}: {}", p.message),
    }
}
