//! Types with a JSON form of their own: times, masks, free structures and wrapped scalars.

use prost::Message;
use prost_types::{Duration, FieldMask, ListValue, Struct, Timestamp, Value as Free, value};
use serde_json::Value;

use super::write::{float, scalar};
use crate::{
    schema::{Kind, MessageDescriptor},
    wire::{Fields, Malformed, WireValue},
};

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

/// The one field of a wrapper (`google.protobuf.UInt32Value`).
pub(super) fn wrapped(descriptor: MessageDescriptor) -> Option<Kind> {
    let name = descriptor.full_name().strip_prefix("google.protobuf.")?;
    (name.ends_with("Value") && !matches!(name, "Value" | "ListValue" | "EnumValue"))
        .then(|| descriptor.get_field(1))
        .flatten()
        .map(|field| field.kind())
}

/// The value in its own form; `None` for other types, and for a value that has none (a mask that is not in snake_case).
pub(super) fn write(
    descriptor: MessageDescriptor,
    encoded: &[u8],
    depth: usize,
) -> Result<Option<Value>, Malformed> {
    let Some(name) = descriptor.full_name().strip_prefix("google.protobuf.") else {
        return Ok(None);
    };
    if let Some(kind) = wrapped(descriptor) {
        return wrapper(kind, encoded).map(Some);
    }
    Ok(match name {
        "Duration" => Some(decode::<Duration>(encoded)?)
            .filter(in_range)
            .map(|duration| duration.to_string().into()),
        "Timestamp" => Some(decode::<Timestamp>(encoded)?)
            // Years 1 to 9999.
            .filter(|t| (-62_135_596_800..=253_402_300_799).contains(&t.seconds))
            .map(|time| time.to_string().into()),
        "FieldMask" => mask_text(&decode::<FieldMask>(encoded)?).map(Value::from),
        "Struct" => Some(object(decode(encoded)?, depth)?),
        "ListValue" => Some(list(decode(encoded)?, depth)?),
        "Value" => Some(free(decode(encoded)?, depth)?),
        _ => None,
    })
}

fn decode<M: Message + Default>(encoded: &[u8]) -> Result<M, Malformed> {
    M::decode(encoded).map_err(|_| Malformed)
}

fn wrapper(kind: Kind, encoded: &[u8]) -> Result<Value, Malformed> {
    let mut last = match kind {
        Kind::String | Kind::Bytes => WireValue::Bytes(&[]),
        Kind::Double => WireValue::Fixed64(0),
        Kind::Float => WireValue::Fixed32(0),
        _ => WireValue::Varint(0),
    };
    for field in Fields::new(encoded) {
        let (number, value) = field?;
        if number == 1 {
            last = value;
        }
    }
    scalar(kind, last)
}

fn object(object: Struct, depth: usize) -> Result<Value, Malformed> {
    let members = object.fields.into_iter();
    members
        .map(|(k, v)| Ok((k, free(v, depth)?)))
        .collect::<Result<_, _>>()
        .map(Value::Object)
}

fn list(list: ListValue, depth: usize) -> Result<Value, Malformed> {
    list.values
        .into_iter()
        .map(|v| free(v, depth))
        .collect::<Result<_, _>>()
        .map(Value::Array)
}

fn free(value: Free, depth: usize) -> Result<Value, Malformed> {
    if depth > 200 {
        return Err(Malformed);
    }
    Ok(match value.kind {
        None | Some(value::Kind::NullValue(_)) => Value::Null,
        Some(value::Kind::NumberValue(v)) => float(v),
        Some(value::Kind::StringValue(v)) => v.into(),
        Some(value::Kind::BoolValue(v)) => v.into(),
        Some(value::Kind::StructValue(v)) => object(v, depth + 1)?,
        Some(value::Kind::ListValue(v)) => list(v, depth + 1)?,
    })
}

/// A duration as JSON writes it: seconds with `s`, within about ten thousand years.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let duration: Duration = text
        .parse()
        .map_err(|_| format!("{text:?} is not like \"1.5s\""))?;
    if in_range(&duration) {
        Ok(duration)
    } else {
        Err(format!("{text} is out of range"))
    }
}

/// A time as RFC 3339 writes it.
pub(super) fn timestamp(text: &str) -> Result<Timestamp, String> {
    let why = || format!("{text:?} is not like \"2006-01-02T15:04:05Z\"");
    // The parser takes less than a whole time; RFC 3339 does not.
    let complete = text.len() >= "2006-01-02T15:04:05Z".len() && text.as_bytes()[10] == b'T';
    let time = text.parse().ok().filter(|_| complete);
    time.ok_or_else(why)
}

/// A mask: paths in lowerCamelCase with commas between them.
pub(super) fn mask(text: &str) -> Result<Vec<String>, String> {
    let paths = text.split(',').filter(|path| !path.is_empty());
    paths
        .map(|path| {
            if path.contains('_') {
                return Err(format!("{path:?} is not in lowerCamelCase"));
            }
            let mut out = String::with_capacity(path.len());
            for c in path.chars() {
                if c.is_ascii_uppercase() {
                    out.push('_');
                }
                out.push(c.to_ascii_lowercase());
            }
            Ok(out)
        })
        .collect()
}

fn mask_text(mask: &FieldMask) -> Option<String> {
    let mut out = String::new();
    for path in &mask.paths {
        if !out.is_empty() {
            out.push(',');
        }
        let mut upper = false;
        for c in path.chars() {
            match c {
                c if c.is_ascii_uppercase() || upper && !c.is_ascii_lowercase() => return None,
                '_' => upper = true,
                c => out.push(if std::mem::take(&mut upper) {
                    c.to_ascii_uppercase()
                } else {
                    c
                }),
            }
        }
    }
    Some(out)
}

fn in_range(duration: &Duration) -> bool {
    duration.seconds.unsigned_abs() <= 315_576_000_000
        && duration.nanos.unsigned_abs() < 1_000_000_000
}
