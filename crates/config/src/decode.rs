//! A document of a file as typed objects.
//!
//! Istio's specs are read strictly (an unknown field is an error with its path); Kubernetes' own kinds are read for the
//! fields that matter. Kinds that a mesh has no use for are passed over, as they are in a cluster.

use std::{path::Path, sync::Arc};

use prost::{Message, Name};
use proto::json::JsonError;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    AnyObject, Kind, Meta, Object, ObjectKey, Problem, Severity, Source,
    yaml::{Document, Lines},
};

/// What a document held.
#[derive(Debug, Default)]
pub struct Decoded {
    /// Its objects (several for a `List`).
    pub objects: Vec<AnyObject>,
    /// What was wrong with the others.
    pub problems: Vec<Problem>,
}

/// Reads a document.
pub fn document(document: &Document, file: &Arc<Path>) -> Decoded {
    let mut out = Decoded::default();
    item(&document.value, &document.lines, file, &mut out);
    out
}

/// Reads one object that an API server gave; its problems have no line, `file` says where it came from.
pub fn value(value: &Value, file: &Arc<Path>) -> Decoded {
    let mut out = Decoded::default();
    item(value, &Lines::at(0), file, &mut out);
    out
}

/// An object's metadata and content on their way to its type.
pub(crate) struct Parts<'a> {
    meta: Meta,
    source: Source,
    entries: &'a Map<String, Value>,
}

/// What is wrong with an object, by the path of the field from its root.
pub(crate) struct DecodeError {
    pub(crate) field: String,
    pub(crate) message: String,
}

impl DecodeError {
    fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        DecodeError {
            field: field.into(),
            message: message.into(),
        }
    }
}

fn item(value: &Value, lines: &Lines, file: &Arc<Path>, out: &mut Decoded) {
    let problem = |severity, object, e: DecodeError| Problem {
        severity,
        file: file.clone(),
        line: lines.find(&e.field),
        object,
        field: e.field,
        message: e.message,
    };
    let Value::Object(entries) = value else {
        let e = DecodeError::new(
            "",
            "not an object: a document needs apiVersion, kind and metadata",
        );
        out.problems.push(problem(Severity::Error, None, e));
        return;
    };
    let (group, version, kind_name) = match type_of(entries) {
        Ok(found) => found,
        Err(e) => {
            out.problems.push(problem(Severity::Error, None, e));
            return;
        }
    };
    if kind_name.ends_with("List") && entries.get("items").is_some_and(Value::is_array) {
        list(entries, lines, file, out);
        return;
    }
    let Some(kind) = Kind::find(group, kind_name) else {
        if let Some((severity, message)) = unread(group, kind_name) {
            out.problems
                .push(problem(severity, None, DecodeError::new("kind", message)));
        }
        return;
    };
    let meta = match meta(kind, entries) {
        Ok(meta) => meta,
        Err(e) => {
            // The name may well be readable although something else in the metadata is not.
            let object = loose_key(kind, entries);
            out.problems.push(problem(Severity::Error, object, e));
            return;
        }
    };
    let key = ObjectKey::new(kind, &*meta.namespace, &*meta.name);
    if !kind.versions().contains(&version) {
        let known = kind.versions().join(", ");
        let message = format!(
            "{kind} has no version {version:?}; use {group}/{}",
            kind.versions()[0]
        );
        let message = if kind.versions().len() > 1 {
            format!("{message} (or one of {known})")
        } else {
            message
        };
        out.problems.push(problem(
            Severity::Error,
            Some(key),
            DecodeError::new("apiVersion", message),
        ));
        return;
    }
    let source = Source {
        file: file.clone(),
        line: lines.line,
    };
    let read = AnyObject::read(
        kind,
        Parts {
            meta,
            source,
            entries,
        },
    );
    let read = match read {
        Ok(object) => object,
        Err(e) => {
            out.problems.push(problem(Severity::Error, Some(key), e));
            return;
        }
    };
    let mut refused = false;
    for finding in crate::validate::object(&read) {
        refused |= finding.severity == Severity::Error;
        let e = DecodeError::new(finding.field, finding.message);
        out.problems
            .push(problem(finding.severity, Some(key.clone()), e));
    }
    if !refused {
        out.objects.push(read);
    }
}

fn list(entries: &Map<String, Value>, lines: &Lines, file: &Arc<Path>, out: &mut Decoded) {
    let items = entries
        .get("items")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let empty = Lines::at(lines.line);
    let all = lines.child("items").map(Lines::items).unwrap_or_default();
    for (i, value) in items.enumerate() {
        item(value, all.get(i).unwrap_or(&empty), file, out);
    }
}

fn type_of(entries: &Map<String, Value>) -> Result<(&str, &str, &str), DecodeError> {
    let text = |field: &str, example: &str| match entries.get(field) {
        Some(Value::String(s)) if !s.is_empty() => Ok(s.as_str()),
        Some(_) => Err(DecodeError::new(field, "must be a text")),
        None => Err(DecodeError::new(
            field,
            format!("{field} is missing; an object starts with e.g. {field}: {example}"),
        )),
    };
    let api_version = text("apiVersion", "networking.istio.io/v1")?;
    let kind = text("kind", "VirtualService")?;
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    Ok((group, version, kind))
}

/// What to say of a kind that is not read; nothing for the many kinds that no mesh reads.
fn unread(group: &str, kind: &str) -> Option<(Severity, String)> {
    if group.ends_with(".istio.io") && group != "install.istio.io" {
        let known: Vec<&str> = Kind::ALL
            .iter()
            .filter(|k| k.is_istio())
            .map(|k| k.name())
            .collect();
        let known = known.join(", ");
        return Some((
            Severity::Error,
            format!("unknown kind {kind:?} of {group}; known are {known}"),
        ));
    }
    let not_yet = matches!(
        (group, kind),
        ("networking.k8s.io", "Ingress" | "IngressClass")
            | ("", "Endpoints")
            | ("gateway.networking.k8s.io", _)
    );
    let multicluster = group == "multicluster.x-k8s.io";
    if not_yet || multicluster {
        let instead = match kind {
            "Endpoints" => "; write an EndpointSlice (discovery.k8s.io/v1) instead",
            "Ingress" | "IngressClass" => "; write a Gateway and a VirtualService instead",
            _ => "",
        };
        return Some((
            Severity::Warning,
            format!("{kind} has no effect here{instead}"),
        ));
    }
    None
}

fn meta(kind: Kind, entries: &Map<String, Value>) -> Result<Meta, DecodeError> {
    let value = entries
        .get("metadata")
        .ok_or_else(|| DecodeError::new("metadata", "metadata.name is missing"))?;
    let mut meta: Meta =
        serde_path_to_error::deserialize(value).map_err(|e| from_serde("metadata", &e))?;
    if meta.name.is_empty() {
        return Err(DecodeError::new("metadata.name", "is missing or empty"));
    }
    if !kind.is_namespaced() {
        meta.namespace.clear();
    } else if meta.namespace.is_empty() {
        meta.namespace = "default".to_owned();
    }
    if meta.resource_version.is_empty() {
        meta.resource_version = content_version(entries);
    }
    Ok(meta)
}

fn loose_key(kind: Kind, entries: &Map<String, Value>) -> Option<ObjectKey> {
    let meta = entries.get("metadata")?;
    let name = meta.get("name")?.as_str().filter(|n| !n.is_empty())?;
    let namespace = match meta.get("namespace").and_then(Value::as_str) {
        _ if !kind.is_namespaced() => "",
        None | Some("") => "default",
        Some(namespace) => namespace,
    };
    Some(ObjectKey::new(kind, namespace, name))
}

/// A number that changes with the content, in the place of the one that an API server would give.
fn content_version(entries: &Map<String, Value>) -> String {
    // FNV-1a: stable between runs and machines, and needs no care against collisions on purpose here.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for (name, value) in entries {
        if name != "status" {
            for byte in name.bytes().chain(value.to_string().bytes()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    hash.to_string()
}

/// Reads one of Kubernetes' kinds from the whole object.
pub(crate) fn kubernetes<T: DeserializeOwned>(parts: Parts<'_>) -> Result<Object<T>, DecodeError> {
    let Parts {
        meta,
        source,
        entries,
    } = parts;
    let spec = serde_path_to_error::deserialize(entries).map_err(|e| from_serde("", &e))?;
    Ok(Object { meta, spec, source })
}

/// Reads one of Istio's kinds from `spec`; its status is somebody's report and never read.
pub(crate) fn istio<T: Message + Name + Default>(
    parts: Parts<'_>,
) -> Result<Object<T>, DecodeError> {
    let Parts {
        meta,
        source,
        entries,
    } = parts;
    for name in entries.keys() {
        if !matches!(
            name.as_str(),
            "apiVersion" | "kind" | "metadata" | "spec" | "status"
        ) {
            let known = proto::json::descriptor(&T::full_name())
                .is_some_and(|d| d.get_field_by_json_name(name).is_some());
            let hint = if known {
                format!("; move it below spec (spec.{name})")
            } else {
                String::new()
            };
            return Err(DecodeError::new(name, format!("unknown field{hint}")));
        }
    }
    let empty = Value::Object(Map::new());
    let value = entries
        .get("spec")
        .filter(|v| !v.is_null())
        .unwrap_or(&empty);
    let value = crate::go::canonical_durations(&T::full_name(), value);
    let spec = proto::json::from_value(&value).map_err(|e| match e {
        JsonError::Field { path, message } => {
            let dot = if path.is_empty() || path.starts_with('[') {
                ""
            } else {
                "."
            };
            DecodeError::new(format!("spec{dot}{path}"), message)
        }
        JsonError::Syntax(message) => DecodeError::new("spec", message),
    })?;
    Ok(Object { meta, spec, source })
}

/// Reads one of Gateway API's kinds from `spec`; its status is our own report and that of others.
pub(crate) fn gateway_api<T: DeserializeOwned>(parts: Parts<'_>) -> Result<Object<T>, DecodeError> {
    let Parts {
        meta,
        source,
        entries,
    } = parts;
    if let Some(name) = entries.keys().find(|name| {
        !matches!(
            name.as_str(),
            "apiVersion" | "kind" | "metadata" | "spec" | "status"
        )
    }) {
        return Err(DecodeError::new(
            name,
            format!("unknown field; did you mean spec.{name}?"),
        ));
    }
    let empty = Value::Object(Map::new());
    let value = entries
        .get("spec")
        .filter(|v| !v.is_null())
        .unwrap_or(&empty);
    let spec = serde_path_to_error::deserialize(value).map_err(|e| from_serde("spec", &e))?;
    Ok(Object { meta, spec, source })
}

fn from_serde<E: std::fmt::Display>(
    prefix: &str,
    e: &serde_path_to_error::Error<E>,
) -> DecodeError {
    let path = e.path().to_string();
    let field = match (prefix, path.as_str()) {
        (_, ".") => prefix.to_owned(),
        ("", _) => path,
        _ => format!("{prefix}.{path}"),
    };
    DecodeError::new(field, e.inner().to_string())
}
