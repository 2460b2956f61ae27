//! JSON → message, strictly, with the path of whatever is wrong.

use std::collections::HashMap;

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE},
};
use prost::Message;
use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage,
    Value as Field,
};
use serde_json::Value;

use super::{JsonError, descriptor, write::is_well_known};
use crate::any::type_name;

/// Deeper nesting than any real configuration has; keeps hostile input from exhausting the stack.
const MAX_DEPTH: usize = 100;

/// Where the reader stands.
#[derive(Default)]
pub(super) struct Path {
    segments: Vec<Segment>,
    /// The values were written without the message's type in view: a text field takes `true` and `7` as texts.
    untyped: bool,
}

enum Segment {
    Index(usize),
    Key(String),
    Name(String),
}

impl Path {
    /// For the values of a `google.protobuf.Struct`.
    pub(super) fn untyped() -> Self {
        Self {
            untyped: true,
            ..Self::default()
        }
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, JsonError> {
        let mut path = String::new();
        for segment in &self.segments {
            match segment {
                Segment::Index(i) => path.push_str(&format!("[{i}]")),
                Segment::Key(k) => path.push_str(&format!("[{k:?}]")),
                Segment::Name(n) if path.is_empty() => path.push_str(n),
                Segment::Name(n) => path.push_str(&format!(".{n}")),
            }
        }
        Err(JsonError::Field {
            path,
            message: message.into(),
        })
    }

    fn within<T>(
        &mut self,
        segment: Segment,
        read: impl FnOnce(&mut Self) -> Result<T, JsonError>,
    ) -> Result<T, JsonError> {
        self.segments.push(segment);
        if self.segments.len() > MAX_DEPTH {
            return self.error(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        let out = read(self)?;
        self.segments.pop();
        Ok(out)
    }
}

pub(super) fn message(
    desc: &MessageDescriptor,
    value: &Value,
    path: &mut Path,
) -> Result<DynamicMessage, JsonError> {
    if desc.full_name() == "google.protobuf.Any" {
        return any(desc, value, path);
    }
    // Not canonical, but configurations of Envoy have `timeout: {seconds: 30}`, which its own reader takes.
    let by_field = value.is_object() && is_plain_well_known(desc.full_name());
    if is_well_known(desc.full_name()) && !by_field {
        return DynamicMessage::deserialize(desc.clone(), value)
            .or_else(|e| path.error(format!("not a {}: {e}", desc.full_name())));
    }
    let mut out = DynamicMessage::new(desc.clone());
    let Value::Object(entries) = value else {
        return path.error(format!(
            "expected an object ({}), got {}",
            desc.full_name(),
            kind_of(value)
        ));
    };
    fill(&mut out, entries.iter(), path)?;
    Ok(out)
}

/// Well-known types whose canonical form is no object, so that an object can only mean their fields.
fn is_plain_well_known(full_name: &str) -> bool {
    let Some(name) = full_name.strip_prefix("google.protobuf.") else {
        return false;
    };
    matches!(
        name,
        "Duration"
            | "Timestamp"
            | "BoolValue"
            | "BytesValue"
            | "DoubleValue"
            | "FloatValue"
            | "Int32Value"
            | "Int64Value"
            | "StringValue"
            | "UInt32Value"
            | "UInt64Value"
    )
}

fn any(
    desc: &MessageDescriptor,
    value: &Value,
    path: &mut Path,
) -> Result<DynamicMessage, JsonError> {
    let Value::Object(entries) = value else {
        return path.error(format!(
            "expected an object with \"@type\", got {}",
            kind_of(value)
        ));
    };
    let mut out = DynamicMessage::new(desc.clone());
    if entries.is_empty() {
        return Ok(out);
    }
    let Some(Value::String(url)) = entries.get("@type") else {
        return path.error("\"@type\" is missing: name the type, e.g. type.googleapis.com/envoy.…");
    };
    let Some(inner_desc) = descriptor(type_name(url)) else {
        return path.within(Segment::Name("@type".into()), |p| {
            p.error(format!("unknown type {url:?}"))
        });
    };
    let inner = if is_well_known(inner_desc.full_name()) {
        let inner = entries.get("value").unwrap_or(&Value::Null);
        path.within(Segment::Name("value".into()), |p| {
            message(&inner_desc, inner, p)
        })?
    } else {
        let mut inner = DynamicMessage::new(inner_desc);
        fill(
            &mut inner,
            entries.iter().filter(|(k, _)| *k != "@type"),
            path,
        )?;
        inner
    };
    out.set_field_by_number(1, Field::String(url.clone()));
    out.set_field_by_number(2, Field::Bytes(inner.encode_to_vec().into()));
    Ok(out)
}

fn fill<'a>(
    out: &mut DynamicMessage,
    entries: impl Iterator<Item = (&'a String, &'a Value)>,
    path: &mut Path,
) -> Result<(), JsonError> {
    let desc = out.descriptor();
    for (name, value) in entries {
        path.within(Segment::Name(name.clone()), |path| {
            let Some(field) =
                desc.get_field_by_json_name(name).or_else(|| desc.get_field_by_name(name))
            else {
                return path.error(unknown_field(&desc, name));
            };
            // `null` is "not set", except for the type whose value it is.
            let takes_null = matches!(field.kind(), Kind::Message(m) if m.full_name() == "google.protobuf.Value");
            if value.is_null() && !takes_null {
                return Ok(());
            }
            if out.has_field(&field) {
                return path.error("the same field is given twice (once in each spelling)");
            }
            if let Some(oneof) = field.containing_oneof()
                && let Some(other) = oneof.fields().find(|f| out.has_field(f))
            {
                return path.error(format!(
                    "only one of {} may be set, and {} is",
                    oneof.name(),
                    other.json_name()
                ));
            }
            let value = read_field(&field, value, path)?;
            out.set_field(&field, value);
            Ok(())
        })?;
    }
    Ok(())
}

fn read_field(field: &FieldDescriptor, value: &Value, path: &mut Path) -> Result<Field, JsonError> {
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else {
            return path.error("a map without an entry type");
        };
        let Value::Object(entries) = value else {
            return path.error(format!("expected an object, got {}", kind_of(value)));
        };
        let (key_kind, value_kind) = (
            entry.map_entry_key_field().kind(),
            entry.map_entry_value_field().kind(),
        );
        let mut out = HashMap::with_capacity(entries.len());
        for (k, v) in entries {
            path.within(Segment::Key(k.clone()), |path| {
                out.insert(map_key(&key_kind, k, path)?, one(&value_kind, v, path)?);
                Ok(())
            })?;
        }
        return Ok(Field::Map(out));
    }
    if field.is_list() {
        let Value::Array(items) = value else {
            return path.error(format!("expected a list, got {}", kind_of(value)));
        };
        let kind = field.kind();
        return items
            .iter()
            .enumerate()
            .map(|(i, v)| path.within(Segment::Index(i), |path| one(&kind, v, path)))
            .collect::<Result<_, _>>()
            .map(Field::List);
    }
    one(&field.kind(), value, path)
}

fn one(kind: &Kind, value: &Value, path: &mut Path) -> Result<Field, JsonError> {
    Ok(match kind {
        Kind::Bool => match value {
            Value::Bool(v) => Field::Bool(*v),
            // Plain words of YAML 1.1, which the YAML reader leaves as text; the same list as in Envoy's.
            Value::String(v) if BOOLEANS.0.contains(&v.as_str()) => Field::Bool(true),
            Value::String(v) if BOOLEANS.1.contains(&v.as_str()) => Field::Bool(false),
            other => return path.error(format!("expected true or false, got {}", kind_of(other))),
        },
        Kind::Bytes => match value {
            Value::String(s) => match BASE64_STANDARD
                .decode(s)
                .or_else(|_| BASE64_URL_SAFE.decode(s))
            {
                Ok(bytes) => Field::Bytes(bytes.into()),
                Err(e) => return path.error(format!("not base64: {e}")),
            },
            other => return path.error(format!("expected base64 text, got {}", kind_of(other))),
        },
        Kind::Double => Field::F64(float(value, path)?),
        Kind::Float => Field::F32(float(value, path)? as f32),
        Kind::Enum(e) => match value {
            Value::String(s) => match e.get_value_by_name(s) {
                Some(v) => Field::EnumNumber(v.number()),
                None => {
                    let names: Vec<_> = e.values().map(|v| v.name().to_owned()).collect();
                    return path.error(format!("unknown value {s:?}; one of {}", names.join(", ")));
                }
            },
            Value::Null => Field::EnumNumber(0),
            other => Field::EnumNumber(integer(other, path)?),
        },
        Kind::Fixed32 | Kind::Uint32 => Field::U32(integer(value, path)?),
        Kind::Fixed64 | Kind::Uint64 => Field::U64(integer(value, path)?),
        Kind::Int32 | Kind::Sfixed32 | Kind::Sint32 => Field::I32(integer(value, path)?),
        Kind::Int64 | Kind::Sfixed64 | Kind::Sint64 => Field::I64(integer(value, path)?),
        Kind::Message(desc) => Field::Message(message(desc, value, path)?),
        Kind::String => match value {
            Value::String(s) => Field::String(s.clone()),
            Value::Bool(_) | Value::Number(_) if path.untyped => Field::String(value.to_string()),
            other => return path.error(format!("expected text, got {}", kind_of(other))),
        },
    })
}

fn integer<T: TryFrom<i128>>(value: &Value, path: &Path) -> Result<T, JsonError> {
    let wide = match value {
        Value::Number(n) => n
            .as_i64()
            .map(i128::from)
            .or_else(|| n.as_u64().map(i128::from))
            .or_else(|| n.as_f64().filter(|f| f.fract() == 0.0).map(|f| f as i128)),
        Value::String(s) => s.parse().ok(),
        _ => None,
    };
    match wide.map(T::try_from) {
        Some(Ok(v)) => Ok(v),
        Some(Err(_)) => path.error(format!("{value} is out of range")),
        None => path.error(format!("expected a whole number, got {}", kind_of(value))),
    }
}

fn float(value: &Value, path: &Path) -> Result<f64, JsonError> {
    let v = match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => match s.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            other => other.parse().ok(),
        },
        _ => None,
    };
    match v {
        Some(v) => Ok(v),
        None => path.error(format!("expected a number, got {}", kind_of(value))),
    }
}

fn map_key(kind: &Kind, text: &str, path: &Path) -> Result<MapKey, JsonError> {
    let value = Value::String(text.to_owned());
    Ok(match kind {
        Kind::Bool => match text {
            "true" => MapKey::Bool(true),
            "false" => MapKey::Bool(false),
            _ => return path.error("expected true or false as key"),
        },
        Kind::Fixed32 | Kind::Uint32 => MapKey::U32(integer(&value, path)?),
        Kind::Fixed64 | Kind::Uint64 => MapKey::U64(integer(&value, path)?),
        Kind::Int32 | Kind::Sfixed32 | Kind::Sint32 => MapKey::I32(integer(&value, path)?),
        Kind::Int64 | Kind::Sfixed64 | Kind::Sint64 => MapKey::I64(integer(&value, path)?),
        _ => MapKey::String(text.to_owned()),
    })
}

fn unknown_field(desc: &MessageDescriptor, name: &str) -> String {
    let mut names: Vec<_> = desc.fields().map(|f| f.json_name().to_owned()).collect();
    names.sort_unstable();
    let near = names
        .iter()
        .find(|n| n.eq_ignore_ascii_case(&name.replace(['_', '-'], "")));
    match near {
        Some(near) => format!(
            "unknown field in {}; did you mean {near}?",
            desc.full_name()
        ),
        None => format!(
            "unknown field in {}; it has {}",
            desc.full_name(),
            names.join(", ")
        ),
    }
}

fn kind_of(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Bool(v) => v.to_string(),
        Value::Null => "null".into(),
        Value::Number(n) => n.to_string(),
        Value::Object(_) => "an object".into(),
        Value::String(s) => format!("{s:?}"),
    }
}

/// Words for true and for false.
const BOOLEANS: ([&str; 8], [&str; 8]) = (
    ["y", "Y", "yes", "Yes", "YES", "on", "On", "ON"],
    ["n", "N", "no", "No", "NO", "off", "Off", "OFF"],
);
