//! Message → canonical JSON.

use base64::{Engine, prelude::BASE64_STANDARD};
use prost_reflect::{DynamicMessage, Kind, MapKey, ReflectMessage, Value as Field};
use serde_json::{Map, Number, Value};

use super::descriptor;
use crate::any::type_name;

pub(super) fn message(m: &DynamicMessage) -> Value {
    let name = m.descriptor();
    let name = name.full_name();
    if name == "google.protobuf.Any" {
        let text = |n| match m.get_field_by_number(n).as_deref() {
            Some(Field::String(s)) => s.clone(),
            _ => String::new(),
        };
        let bytes = match m.get_field_by_number(2).as_deref() {
            Some(Field::Bytes(b)) => b.clone(),
            _ => Default::default(),
        };
        return any(&text(1), &bytes);
    }
    if let Some(rest) = name.strip_prefix("google.protobuf.")
        && !rest.ends_with("Options")
    {
        // The other well-known types have forms of their own and hold no `Any`. One outside its range (a
        // timestamp beyond year 9999) has no canonical form; its fields are shown instead.
        if let Ok(value) = serde_json::to_value(m) {
            return whole_numbers(value);
        }
    }
    let mut out = Map::new();
    for (field, value) in m.fields() {
        out.insert(field.json_name().to_owned(), one(value, &field.kind()));
    }
    Value::Object(out)
}

pub(super) fn any(type_url: &str, bytes: &[u8]) -> Value {
    let mut out = Map::new();
    if !type_url.is_empty() {
        out.insert("@type".into(), type_url.into());
    }
    let decoded = descriptor(type_name(type_url))
        .and_then(|d| DynamicMessage::decode(d, bytes).ok())
        .map(|m| (is_well_known(m.descriptor().full_name()), message(&m)));
    match decoded {
        Some((false, Value::Object(fields))) => out.extend(fields),
        Some((_, value)) => _ = out.insert("value".into(), value),
        None if bytes.is_empty() => {}
        None => _ = out.insert("value".into(), BASE64_STANDARD.encode(bytes).into()),
    }
    Value::Object(out)
}

/// Whether the type has a JSON form of its own, which inside an `Any` stands under `value`.
pub(super) fn is_well_known(full_name: &str) -> bool {
    full_name.strip_prefix("google.protobuf.").is_some_and(|n| {
        n.ends_with("Value")
            || matches!(
                n,
                "Any" | "Duration" | "Empty" | "FieldMask" | "Struct" | "Timestamp"
            )
    })
}

fn one(value: &Field, kind: &Kind) -> Value {
    match value {
        Field::Bool(v) => (*v).into(),
        Field::Bytes(v) => BASE64_STANDARD.encode(v).into(),
        Field::EnumNumber(n) => match kind {
            Kind::Enum(e) if e.full_name() == "google.protobuf.NullValue" => Value::Null,
            Kind::Enum(e) => e
                .get_value(*n)
                .map_or_else(|| (*n).into(), |v| v.name().to_owned().into()),
            _ => (*n).into(),
        },
        // Written as the shortest text that reads back as the same f32, as protobuf's own writers do.
        Field::F32(v) => match v.to_string().parse() {
            Ok(wide) if v.is_finite() => float(wide),
            _ => float(f64::from(*v)),
        },
        Field::F64(v) => float(*v),
        Field::I32(v) => (*v).into(),
        Field::I64(v) => v.to_string().into(),
        Field::List(items) => items.iter().map(|v| one(v, kind)).collect(),
        Field::Map(entries) => {
            let kind = match kind {
                Kind::Message(entry) => entry.map_entry_value_field().kind(),
                other => other.clone(),
            };
            let mut sorted: Vec<_> = entries.iter().map(|(k, v)| (key(k), v)).collect();
            sorted.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(
                sorted
                    .into_iter()
                    .map(|(k, v)| (k, one(v, &kind)))
                    .collect(),
            )
        }
        Field::Message(m) => message(m),
        Field::String(v) => v.as_str().into(),
        Field::U32(v) => (*v).into(),
        Field::U64(v) => v.to_string().into(),
    }
}

fn float(v: f64) -> Value {
    if v.is_nan() {
        return "NaN".into();
    }
    if v.is_infinite() {
        return if v > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    // `80` rather than `80.0`: the form that Go and C++ write.
    if v.fract() == 0.0 && v.abs() < 1e15 {
        return (v as i64).into();
    }
    Number::from_f64(v).map_or(Value::Null, Value::Number)
}

/// The numbers of a `Struct` are doubles; whole ones are written without a fraction.
fn whole_numbers(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(whole_numbers).collect(),
        Value::Number(n) => n
            .as_f64()
            .filter(|_| n.is_f64())
            .map_or(Value::Number(n), float),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(k, v)| (k, whole_numbers(v)))
            .collect(),
        other => other,
    }
}

fn key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(v) => v.to_string(),
        MapKey::I32(v) => v.to_string(),
        MapKey::I64(v) => v.to_string(),
        MapKey::String(v) => v.clone(),
        MapKey::U32(v) => v.to_string(),
        MapKey::U64(v) => v.to_string(),
    }
}
