//! Scalars, and messages whose JSON is one, onto the wire.

use std::fmt;

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE},
};
use serde::de::Error;

use super::{
    JsonError,
    read::{Dialect, Reader, What},
    well_known,
};
use crate::{
    schema::{EnumDescriptor, Kind, MessageDescriptor},
    wire::{write_bytes, write_tag, write_varint},
};

/// A value that is neither object nor list.
#[derive(Clone, Copy)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(&'a str),
}

impl Reader {
    /// A scalar with its tag, or without where there is no number.
    pub(super) fn put<E: Error>(
        &mut self,
        kind: Kind,
        number: Option<u32>,
        keep: bool,
        value: Scalar<'_>,
    ) -> Result<(), E> {
        let (wire_type, bits) = match kind {
            Kind::String | Kind::Bytes => {
                let (decoded, plain);
                let bytes = match (kind, value) {
                    (Kind::String, Scalar::Text(text)) => text.as_bytes(),
                    (Kind::String, Scalar::Bool(_) | Scalar::Integer(_) | Scalar::Float(_))
                        if self.dialect == Dialect::Untyped =>
                    {
                        plain = value.to_string();
                        plain.as_bytes()
                    }
                    (Kind::Bytes, Scalar::Text(text)) => {
                        let read = BASE64_STANDARD
                            .decode(text)
                            .or_else(|_| BASE64_URL_SAFE.decode(text));
                        decoded = read.map_err(|e| self.fail(format!("not base64: {e}")))?;
                        &decoded
                    }
                    _ => {
                        let wanted = expected(kind);
                        return Err(self.fail(format!("expected {wanted}, got {value}")));
                    }
                };
                if keep || !bytes.is_empty() {
                    // Text is never packed: it always has a number.
                    write_bytes(&mut self.out, number.unwrap_or_default(), bytes);
                }
                return Ok(());
            }
            Kind::Bool => match value {
                Scalar::Bool(v) => (0, u64::from(v)),
                // Plain words of YAML 1.1, which the YAML reader leaves as text; the same list as in Envoy's.
                Scalar::Text(word) if BOOLEANS.0.contains(&word) => (0, 1),
                Scalar::Text(word) if BOOLEANS.1.contains(&word) => (0, 0),
                Scalar::Text(word) if self.dialect >= Dialect::Envoy => match quoted_bool(word) {
                    Some(v) => (0, u64::from(v)),
                    None => return Err(self.fail(format!("expected true or false, got {value}"))),
                },
                _ => return Err(self.fail(format!("expected true or false, got {value}"))),
            },
            Kind::Double => (1, self.float(value)?.to_bits()),
            Kind::Float => (5, u64::from((self.float(value)? as f32).to_bits())),
            Kind::Enum(kind) => match value {
                Scalar::Text(text) => match self.value_of(kind, text) {
                    Some(number) => (0, i64::from(number) as u64),
                    None => {
                        let names: Vec<_> = kind.values().map(|(name, _)| name).collect();
                        let names = names.join(", ");
                        return Err(self.fail(format!("unknown value {text:?}; one of {names}")));
                    }
                },
                Scalar::Null => (0, 0),
                value => (0, i64::from(self.integer::<i32, E>(value)?) as u64),
            },
            Kind::Uint32 => (0, u64::from(self.integer::<u32, E>(value)?)),
            Kind::Uint64 => (0, self.integer::<u64, E>(value)?),
            Kind::Int32 => (0, i64::from(self.integer::<i32, E>(value)?) as u64),
            Kind::Int64 => (0, self.integer::<i64, E>(value)? as u64),
            Kind::Sint32 => {
                let v = self.integer::<i32, E>(value)?;
                (0, u64::from((v << 1 ^ v >> 31) as u32))
            }
            Kind::Sint64 => {
                let v = self.integer::<i64, E>(value)?;
                (0, (v << 1 ^ v >> 63) as u64)
            }
            Kind::Fixed32 => (5, u64::from(self.integer::<u32, E>(value)?)),
            Kind::Sfixed32 => (5, u64::from(self.integer::<i32, E>(value)? as u32)),
            Kind::Fixed64 => (1, self.integer::<u64, E>(value)?),
            Kind::Sfixed64 => (1, self.integer::<i64, E>(value)? as u64),
            Kind::Message(_) => return Err(self.fail(format!("expected an object, got {value}"))),
        };
        if !keep && bits == 0 {
            return Ok(());
        }
        if let Some(number) = number {
            write_tag(&mut self.out, number, wire_type);
        }
        match wire_type {
            0 => write_varint(&mut self.out, bits),
            1 => self.out.extend_from_slice(&bits.to_le_bytes()),
            _ => self.out.extend_from_slice(&(bits as u32).to_le_bytes()),
        }
        Ok(())
    }

    fn value_of(&self, kind: EnumDescriptor, text: &str) -> Option<i32> {
        let any_case = self.dialect >= Dialect::Envoy;
        let named = |name: &str| name == text || any_case && name.eq_ignore_ascii_case(text);
        kind.values()
            .find(|(name, _)| named(name))
            .map(|(_, number)| number)
    }

    fn integer<T: TryFrom<i128>, E: Error>(&mut self, value: Scalar<'_>) -> Result<T, E> {
        let wide = match value {
            Scalar::Integer(v) => Some(v),
            Scalar::Float(v) if v.fract() == 0.0 => Some(v as i128),
            Scalar::Text(text) => text.parse().ok(),
            _ => None,
        };
        match wide.map(T::try_from) {
            Some(Ok(v)) => Ok(v),
            Some(Err(_)) => Err(self.fail(format!("{value} is out of range"))),
            None => Err(self.fail(format!("expected a whole number, got {value}"))),
        }
    }

    fn float<E: Error>(&mut self, value: Scalar<'_>) -> Result<f64, E> {
        let v = match value {
            Scalar::Integer(v) => Some(v as f64),
            Scalar::Float(v) => Some(v),
            Scalar::Text("NaN") => Some(f64::NAN),
            Scalar::Text("Infinity") => Some(f64::INFINITY),
            Scalar::Text("-Infinity") => Some(f64::NEG_INFINITY),
            Scalar::Text(text) => text.parse().ok(),
            _ => None,
        };
        v.ok_or_else(|| self.fail(format!("expected a number, got {value}")))
    }

    /// A message whose JSON is a scalar.
    pub(super) fn well_known<E: Error>(
        &mut self,
        descriptor: MessageDescriptor,
        value: Scalar<'_>,
    ) -> Result<(), E> {
        let name = descriptor.full_name();
        let parsed = match (name, value) {
            ("google.protobuf.Duration", Scalar::Text(text)) => {
                well_known::duration(text).map(|d| self.time(d.seconds, d.nanos))
            }
            ("google.protobuf.Timestamp", Scalar::Text(text)) => {
                well_known::timestamp(text).map(|t| self.time(t.seconds, t.nanos))
            }
            ("google.protobuf.FieldMask", Scalar::Text(text)) => {
                well_known::mask(text).map(|paths| {
                    paths
                        .iter()
                        .for_each(|path| write_bytes(&mut self.out, 1, path.as_bytes()));
                })
            }
            ("google.protobuf.Value", value) => {
                self.free_scalar(value);
                Ok(())
            }
            _ => match well_known::wrapped(descriptor) {
                Some(kind) => {
                    return match self.put::<E>(kind, Some(1), false, value) {
                        Ok(()) => Ok(()),
                        Err(error) => {
                            self.prefix_error(&format!("not a {name}: "));
                            Err(error)
                        }
                    };
                }
                None => {
                    let what = What::Content(descriptor);
                    return Err(self.wrong(what, &value.to_string()));
                }
            },
        };
        parsed.map_err(|why| self.fail(format!("not a {name}: {why}")))
    }

    fn prefix_error(&mut self, prefix: &str) {
        if let Some(JsonError::Field { message, .. }) = &mut self.error {
            message.insert_str(0, prefix);
        }
    }

    fn time(&mut self, seconds: i64, nanos: i32) {
        for (number, value) in [(1, seconds), (2, i64::from(nanos))] {
            if value != 0 {
                write_tag(&mut self.out, number, 0);
                write_varint(&mut self.out, value as u64);
            }
        }
    }

    /// A `google.protobuf.Value` that is no list and no object.
    pub(super) fn free_scalar(&mut self, value: Scalar<'_>) {
        let out = &mut self.out;
        match value {
            Scalar::Null => out.extend([1 << 3, 0]),
            Scalar::Bool(v) => out.extend([4 << 3, u8::from(v)]),
            Scalar::Text(text) => write_bytes(out, 3, text.as_bytes()),
            Scalar::Integer(_) | Scalar::Float(_) => {
                let v = if let Scalar::Integer(v) = value {
                    v as f64
                } else {
                    value.as_float()
                };
                write_tag(out, 2, 1);
                out.extend_from_slice(&v.to_le_bytes());
            }
        }
    }
}

impl Scalar<'_> {
    fn as_float(self) -> f64 {
        match self {
            Self::Float(v) => v,
            _ => 0.0,
        }
    }
}

/// As JSON.
impl fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(v) => v.fmt(f),
            Self::Integer(v) => v.fmt(f),
            Self::Float(v) => serde_json::Value::from(*v).fmt(f),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// What a value of this kind looks like in JSON, for errors.
pub(super) fn expected(kind: Kind) -> String {
    match kind {
        Kind::Bool => "true or false".into(),
        Kind::Bytes => "base64 text".into(),
        Kind::String => "text".into(),
        Kind::Double | Kind::Float => "a number".into(),
        Kind::Enum(kind) => format!("a value of {}", kind.full_name()),
        Kind::Message(descriptor) => format!("an object ({})", descriptor.full_name()),
        _ => "a whole number".into(),
    }
}

/// A boolean that is written as text.
fn quoted_bool(word: &str) -> Option<bool> {
    let is = |words: [&str; 5]| words.iter().any(|w| w.eq_ignore_ascii_case(word));
    if is(["true", "t", "yes", "y", "1"]) {
        return Some(true);
    }
    is(["false", "f", "no", "n", "0"]).then_some(false)
}

/// Words for true and for false.
const BOOLEANS: ([&str; 8], [&str; 8]) = (
    ["y", "Y", "yes", "Yes", "YES", "on", "On", "ON"],
    ["n", "N", "no", "No", "NO", "off", "Off", "OFF"],
);
