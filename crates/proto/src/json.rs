//! Canonical protobuf JSON (and YAML) for every message of this crate, `google.protobuf.Any` included.
//!
//! Reading is strict: an unknown field, a wrong type or an unknown `@type` is an error that carries the path of
//! the field (`static_resources.clusters[0].connect_timeout`). Writing never fails: an `Any` of a type that this
//! program does not know is shown as `{"@type": …, "value": base64}`, so that a dump is never lost.

mod names;
mod path;
mod read;
mod scalar;
mod well_known;
mod write;

use prost::{Message, Name};
use serde_json::Value;
use serde_saphyr::budget::BudgetBreach;

use read::Dialect;

pub use crate::schema::MessageDescriptor;

/// Why a JSON or YAML text is not the message it was read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// A value inside the message is wrong; `path` leads to it from the message's root.
    #[error("{}{message}", if path.is_empty() { String::new() } else { format!("{path}: ") })]
    Field {
        /// Field path with the names as written, e.g. `clusters[0].typedConfig.foo`.
        path: String,
        /// What is wrong, and what is allowed.
        message: String,
    },
    /// The text is not JSON or YAML at all; the message carries line and column.
    #[error("{0}")]
    Syntax(String),
}

/// The message as canonical JSON: lowerCamelCase names, defaults left out, 64-bit integers as strings.
pub fn to_value<M: Message + Name>(message: &M) -> Value {
    encoded_to_value(&M::full_name(), &message.encode_to_vec())
        .expect("a message that was just encoded decodes as itself")
}

/// Like [`to_value`] for a message at hand only as bytes; `None` when the type is unknown or the bytes are not one.
pub fn encoded_to_value(full_name: &str, bytes: &[u8]) -> Option<Value> {
    write::message(descriptor(full_name)?, bytes, 0).ok()
}

/// Canonical JSON of a message of this type with the names of the `.proto` files: `port_value` for `portValue`, as Envoy's
/// admin endpoint writes. Keys of maps and structs stay, and so does all of a type that is not known.
pub fn with_proto_names(full_name: &str, value: Value) -> Value {
    match descriptor(full_name) {
        Some(descriptor) => names::proto_names(descriptor, value),
        None => value,
    }
}

/// An `Any` as JSON: `@type` beside the message's own fields, or base64 where the type is unknown.
pub fn any_to_value(any: &prost_types::Any) -> Value {
    write::any(&any.type_url, &any.value, 0)
}

/// Reads a message from a JSON value; unknown fields are errors.
pub fn from_value<M: Message + Name + Default>(value: &Value) -> Result<M, JsonError> {
    decode(&value_to_encoded(&M::full_name(), value)?)
}

/// Reads any message of this crate by its full name, and gives its wire form.
pub fn value_to_encoded(full_name: &str, value: &Value) -> Result<Vec<u8>, JsonError> {
    read::read(known(full_name)?, value, Dialect::Canonical)
}

/// [`from_value`] for what was written for Envoy, whose reader takes more than the canonical form: `round_robin` for
/// `ROUND_ROBIN`, `"true"` for `true`, and `a` for `[a]`.
pub fn from_envoy_value<M: Message + Name + Default>(value: &Value) -> Result<M, JsonError> {
    decode(&read::read(known(&M::full_name())?, value, Dialect::Envoy)?)
}

/// [`from_yaml`] for what was written for Envoy; see [`from_envoy_value`].
pub fn from_envoy_yaml<M: Message + Name + Default>(text: &str) -> Result<M, JsonError> {
    from_envoy_value(&yaml_to_value(text)?)
}

/// [`value_to_encoded`] for the values of a `TypedStruct`, which know no types: where the message has a text, `true` and
/// `7` are texts that YAML took for something else.
pub fn struct_to_encoded(full_name: &str, value: &Value) -> Result<Vec<u8>, JsonError> {
    read::read(known(full_name)?, value, Dialect::Untyped)
}

/// The wire form of a message that was written for Envoy (see [`from_envoy_value`]), from YAML text of up to `nodes` nodes, as
/// [`yaml_of_size`] counts them. JSON is read several times faster than other YAML, without a tree in between.
pub fn text_to_encoded(full_name: &str, text: &str, nodes: usize) -> Result<Vec<u8>, JsonError> {
    let descriptor = known(full_name)?;
    // What is no JSON after all may be a flow mapping of YAML.
    if is_json(text) {
        let mut from = serde_json::Deserializer::from_str(text);
        match read::read(descriptor, &mut from, Dialect::Envoy) {
            Ok(encoded) if from.end().is_ok() => return Ok(encoded),
            Err(error @ JsonError::Field { .. }) => return Err(error),
            _ => {}
        }
    }
    read::read(descriptor, &yaml_of_size(text, nodes)?, Dialect::Envoy)
}

/// Reads a message from JSON text.
pub fn from_str<M: Message + Name + Default>(text: &str) -> Result<M, JsonError> {
    from_value(&serde_json::from_str(text).map_err(|e| JsonError::Syntax(e.to_string()))?)
}

/// Reads a message from YAML text (JSON is YAML too).
pub fn from_yaml<M: Message + Name + Default>(text: &str) -> Result<M, JsonError> {
    from_value(&yaml_to_value(text)?)
}

/// The message as YAML text, with the names and defaults of [`to_value`].
pub fn to_yaml<M: Message + Name>(message: &M) -> String {
    value_to_yaml(&to_value(message))
}

/// One YAML document as a JSON value, of at most [`NODES`] nodes; the error carries line and column.
///
/// Only `true` and `false` are booleans here. Words that YAML 1.1 takes for booleans (`y`, `no`, `on`) stay text, so that
/// `id: n` is a name; a field of type bool still takes them, as Envoy's reader does.
pub fn yaml_to_value(text: &str) -> Result<Value, JsonError> {
    yaml_of_size(text, NODES)
}

/// [`yaml_to_value`] for a text that may have up to `nodes` nodes (scalars, sequences and mappings): a bootstrap of ten
/// thousand clusters has half a million. What is expensive for its size, aliases and depth, has the same limits in any case.
pub fn yaml_of_size(text: &str, nodes: usize) -> Result<Value, JsonError> {
    if text.len() / BYTES_PER_NODE > nodes {
        return Err(too_large(nodes));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: nodes.saturating_mul(2),
            max_nodes: nodes,
            max_total_scalar_bytes: nodes.saturating_mul(BYTES_PER_NODE),
        },
        strict_booleans: true,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| match e.without_snippet() {
        serde_saphyr::Error::Budget {
            breach:
                BudgetBreach::Nodes { .. }
                | BudgetBreach::Events { .. }
                | BudgetBreach::ScalarBytes { .. },
            ..
        } => too_large(nodes),
        _ => JsonError::Syntax(e.to_string()),
    })
}

fn too_large(nodes: usize) -> JsonError {
    JsonError::Syntax(format!(
        "more than {nodes} values (or {BYTES_PER_NODE} bytes for each of them) in one text"
    ))
}

/// Nodes of a text that a user writes: Kubernetes takes none that is as large.
pub const NODES: usize = 250_000;
/// Bytes that a node may have on average. Long strings are scripts and certificates.
const BYTES_PER_NODE: usize = 64;

/// A JSON value as YAML text.
pub fn value_to_yaml(value: &Value) -> String {
    serde_saphyr::to_string(value).expect("every JSON value is YAML")
}

/// The descriptor of a message of this crate.
pub fn descriptor(full_name: &str) -> Option<MessageDescriptor> {
    MessageDescriptor::find(full_name)
}

fn known(full_name: &str) -> Result<MessageDescriptor, JsonError> {
    descriptor(full_name).ok_or_else(|| JsonError::Field {
        path: String::new(),
        message: format!("unknown message type {full_name}"),
    })
}

fn decode<M: Message + Name + Default>(encoded: &[u8]) -> Result<M, JsonError> {
    M::decode(encoded).map_err(|e| JsonError::Field {
        path: String::new(),
        message: format!("not a {}: {e}", M::full_name()),
    })
}

/// Whether a text is an object as JSON writes it. A flow mapping of YAML looks the same up to its first key's quote.
fn is_json(text: &str) -> bool {
    let inside = text.trim_start().strip_prefix('{').map(str::trim_start);
    inside.is_some_and(|inside| inside.starts_with(['"', '}']))
}

#[cfg(test)]
mod tests;
