//! What an API server and its controllers do with a folder of YAML.
//!
//! [`document`] reads the folder; [`workload`] turns Deployments and their like into pods; [`service`] completes
//! Services and finds their pods; [`admission`] says which pods get a sidecar and adds it; [`world`] puts all that
//! together, and [`publish`] writes it where the control plane watches. [`token`] signs the pods' service account tokens.

pub(crate) mod admission;
pub(crate) mod builtin;
pub(crate) mod document;
pub(crate) mod publish;
pub(crate) mod service;
pub(crate) mod token;
pub(crate) mod workload;
pub(crate) mod world;

use serde_json::Value;

/// Namespace and name.
pub(crate) type Key = (String, String);

/// The text at a path of keys, empty where there is none.
pub(crate) fn text<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).as_str().unwrap_or("")
}

/// The value at a path of keys, null where there is none.
pub(crate) fn at<'a>(value: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(value, |v, key| &v[*key])
}

/// The elements of a list, none where it is not one.
pub(crate) fn list<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).as_array().map_or(&[], Vec::as_slice)
}

/// Namespace (`default` where none is given) and name of an object.
pub(crate) fn key(object: &Value) -> Key {
    let namespace = match text(object, &["metadata", "namespace"]) {
        "" => "default",
        n => n,
    };
    (
        namespace.to_owned(),
        text(object, &["metadata", "name"]).to_owned(),
    )
}

/// The value at a path, where objects are made on the way.
pub(crate) fn at_mut<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Value {
    path.iter().fold(value, |v, key| {
        if !v.is_object() {
            *v = Value::Object(serde_json::Map::new());
        }
        &mut v[*key]
    })
}

/// Sets a value where there is none yet.
pub(crate) fn default_at(value: &mut Value, path: &[&str], default: impl Into<Value>) {
    let place = at_mut(value, path);
    if place.is_null() {
        *place = default.into();
    }
}

/// Whether labels satisfy a plain selector (`key: value` pairs); an empty selector selects nothing.
pub(crate) fn selects(selector: &Value, labels: &Value) -> bool {
    selector
        .as_object()
        .is_some_and(|s| !s.is_empty() && s.iter().all(|(k, v)| labels.get(k) == Some(v)))
}
