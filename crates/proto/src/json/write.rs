//! Message → canonical JSON, straight from the wire.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Number, Value};

use super::well_known::{self, is_well_known};
use crate::{
    any::type_name,
    schema::{FieldDescriptor, Kind, MessageDescriptor},
    wire::{Fields, Malformed, WireValue, read_varint, take},
};

/// As prost's own limit.
const MAX_DEPTH: usize = 100;

/// An encoded message as JSON.
pub(super) fn message(
    descriptor: MessageDescriptor,
    encoded: &[u8],
    depth: usize,
) -> Result<Value, Malformed> {
    if depth > MAX_DEPTH {
        return Err(Malformed);
    }
    if descriptor.full_name() == "google.protobuf.Any" {
        let (url, value) = any_parts(encoded)?;
        return Ok(any(url, value, depth));
    }
    if let Some(value) = well_known::write(descriptor, encoded, depth)? {
        return Ok(value);
    }
    let mut out = Map::new();
    for (field, values) in by_field(descriptor, encoded)? {
        if let Some(value) = field_value(field, &values, depth)? {
            out.insert(field.json_name().to_owned(), value);
        }
    }
    Ok(Value::Object(out))
}

/// An `Any` of these parts as JSON.
pub(super) fn any(type_url: &str, encoded: &[u8], depth: usize) -> Value {
    let mut out = Map::new();
    if !type_url.is_empty() {
        out.insert("@type".into(), type_url.into());
    }
    let descriptor = MessageDescriptor::find(type_name(type_url));
    let decoded = descriptor.and_then(|d| Some((d, message(d, encoded, depth + 1).ok()?)));
    match decoded {
        Some((d, Value::Object(fields))) if !is_well_known(d.full_name()) => out.extend(fields),
        Some((_, value)) => _ = out.insert("value".into(), value),
        None if encoded.is_empty() => {}
        None => _ = out.insert("value".into(), BASE64_STANDARD.encode(encoded).into()),
    }
    Value::Object(out)
}

/// Everything that the wire has of each known field that is set: the last value of a scalar, all of the others.
fn by_field(
    descriptor: MessageDescriptor,
    encoded: &[u8],
) -> Result<Vec<(FieldDescriptor, Vec<WireValue<'_>>)>, Malformed> {
    let mut found: Vec<(FieldDescriptor, Vec<WireValue<'_>>)> = Vec::new();
    for field in Fields::new(encoded) {
        let (number, value) = field?;
        let Some(field) = descriptor.get_field(number) else {
            continue;
        };
        // Of a oneof the last one counts.
        if let Some((oneof, _)) = field.containing_oneof() {
            found.retain(|(other, _)| {
                *other == field || other.containing_oneof().is_none_or(|(o, _)| o != oneof)
            });
        }
        // What comes again mostly does so at once: elements of a list.
        match found.iter_mut().rev().find(|(other, _)| *other == field) {
            Some((_, values)) => values.push(value),
            None => found.push((field, vec![value])),
        }
    }
    Ok(found)
}

fn field_value(
    field: FieldDescriptor,
    values: &[WireValue<'_>],
    depth: usize,
) -> Result<Option<Value>, Malformed> {
    if field.is_map() {
        return map(field, values, depth).map(Some);
    }
    let kind = field.kind();
    if field.is_list() {
        let mut items = Vec::with_capacity(values.len());
        for value in values {
            match (value, kind) {
                (WireValue::Bytes(bytes), Kind::Message(m)) => {
                    items.push(message(m, bytes, depth + 1)?);
                }
                (WireValue::Bytes(bytes), kind) if !matches!(kind, Kind::String | Kind::Bytes) => {
                    unpack(kind, bytes, &mut items)?;
                }
                (value, kind) => items.push(scalar(kind, *value)?),
            }
        }
        return Ok((!items.is_empty()).then_some(Value::Array(items)));
    }
    let last = *values.last().expect("a field was found with a value");
    if let Kind::Message(m) = kind {
        // One value in several pieces is their concatenation.
        let mut whole = Vec::new();
        let bytes = match values {
            [WireValue::Bytes(only)] => *only,
            pieces => {
                for piece in pieces {
                    let WireValue::Bytes(piece) = piece else {
                        return Err(Malformed);
                    };
                    whole.extend_from_slice(piece);
                }
                &whole
            }
        };
        return message(m, bytes, depth + 1).map(Some);
    }
    let value = scalar(kind, last)?;
    Ok((field.has_presence() || !last.is_default()).then_some(value))
}

fn map(field: FieldDescriptor, values: &[WireValue<'_>], depth: usize) -> Result<Value, Malformed> {
    let Kind::Message(entry) = field.kind() else {
        return Err(Malformed);
    };
    let (key_kind, value_kind) = (
        entry.map_entry_key_field().kind(),
        entry.map_entry_value_field().kind(),
    );
    let mut out = Map::new();
    for value in values {
        let WireValue::Bytes(encoded) = value else {
            return Err(Malformed);
        };
        let (mut key, mut value) = (default(key_kind), None);
        for part in Fields::new(encoded) {
            match part? {
                (1, part) => key = scalar(key_kind, part)?,
                (2, WireValue::Bytes(bytes)) if value_kind.as_message().is_some() => {
                    value = value_kind
                        .as_message()
                        .map(|m| message(*m, bytes, depth + 1))
                        .transpose()?;
                }
                (2, part) => value = Some(scalar(value_kind, part)?),
                _ => {}
            }
        }
        let value = match (value, value_kind) {
            (Some(value), _) => value,
            (None, Kind::Message(m)) => message(m, &[], depth + 1)?,
            (None, kind) => default(kind),
        };
        let key = match key {
            Value::String(key) => key,
            key => key.to_string(),
        };
        out.insert(key, value);
    }
    Ok(Value::Object(out))
}

/// The numbers of a packed list.
fn unpack(kind: Kind, mut bytes: &[u8], items: &mut Vec<Value>) -> Result<(), Malformed> {
    while !bytes.is_empty() {
        let value = match kind {
            Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => {
                take(&mut bytes).map(|b| WireValue::Fixed64(u64::from_le_bytes(b)))
            }
            Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => {
                take(&mut bytes).map(|b| WireValue::Fixed32(u32::from_le_bytes(b)))
            }
            _ => read_varint(&mut bytes).map(WireValue::Varint),
        };
        items.push(scalar(kind, value.ok_or(Malformed)?)?);
    }
    Ok(())
}

fn default(kind: Kind) -> Value {
    let zero = match kind {
        Kind::String | Kind::Bytes => WireValue::Bytes(&[]),
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => WireValue::Fixed64(0),
        Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => WireValue::Fixed32(0),
        _ => WireValue::Varint(0),
    };
    scalar(kind, zero).unwrap_or_default()
}

/// Anything but a message as JSON.
pub(super) fn scalar(kind: Kind, value: WireValue<'_>) -> Result<Value, Malformed> {
    Ok(match (kind, value) {
        (Kind::Bool, WireValue::Varint(v)) => (v != 0).into(),
        (Kind::Bytes, WireValue::Bytes(v)) => BASE64_STANDARD.encode(v).into(),
        (Kind::String, WireValue::Bytes(v)) => {
            std::str::from_utf8(v).map_err(|_| Malformed)?.into()
        }
        (Kind::Enum(e), WireValue::Varint(v)) => {
            let number = v as i32;
            if e.full_name() == "google.protobuf.NullValue" {
                return Ok(Value::Null);
            }
            let name = e.values().find(|(_, n)| *n == number).map(|(name, _)| name);
            name.map_or_else(|| number.into(), Into::into)
        }
        (Kind::Int32, WireValue::Varint(v)) => (v as i32).into(),
        (Kind::Uint32, WireValue::Varint(v)) => (v as u32).into(),
        (Kind::Sint32, WireValue::Varint(v)) => ((v as u32 >> 1) as i32 ^ -(v as i32 & 1)).into(),
        // JSON's numbers are doubles elsewhere: 64 bits go as text.
        (Kind::Int64, WireValue::Varint(v)) => (v as i64).to_string().into(),
        (Kind::Uint64, WireValue::Varint(v)) => v.to_string().into(),
        (Kind::Sint64, WireValue::Varint(v)) => {
            ((v >> 1) as i64 ^ -(v as i64 & 1)).to_string().into()
        }
        (Kind::Fixed32, WireValue::Fixed32(v)) => v.into(),
        (Kind::Sfixed32, WireValue::Fixed32(v)) => (v as i32).into(),
        (Kind::Fixed64, WireValue::Fixed64(v)) => v.to_string().into(),
        (Kind::Sfixed64, WireValue::Fixed64(v)) => (v as i64).to_string().into(),
        (Kind::Double, WireValue::Fixed64(v)) => float(f64::from_bits(v)),
        (Kind::Float, WireValue::Fixed32(v)) => float32(f32::from_bits(v)),
        _ => return Err(Malformed),
    })
}

/// Written as the shortest text that reads back as the same f32, as protobuf's own writers do.
fn float32(v: f32) -> Value {
    match v.to_string().parse() {
        Ok(wide) if v.is_finite() => float(wide),
        _ => float(f64::from(v)),
    }
}

pub(super) fn float(v: f64) -> Value {
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

fn any_parts(encoded: &[u8]) -> Result<(&str, &[u8]), Malformed> {
    let (mut url, mut value) = ("", &[][..]);
    for field in Fields::new(encoded) {
        match field? {
            (1, WireValue::Bytes(bytes)) => {
                url = std::str::from_utf8(bytes).map_err(|_| Malformed)?;
            }
            (2, WireValue::Bytes(bytes)) => value = bytes,
            _ => {}
        }
    }
    Ok((url, value))
}
