//! Merging one message into another, as a patch of the user does.
//!
//! Fields that the patch has win; messages merge field by field, lists grow (or are replaced), maps take the patch's
//! entries. A `google.protobuf.Duration` is one value: it is replaced, never mixed of two.

use prost::{Message, Name};
use prost_types::Any;

use crate::{
    any,
    schema::{FieldDescriptor, Kind, MessageDescriptor},
    wire::{Fields, Malformed, WireValue, write_bytes, write_tag, write_varint},
};

/// What becomes of a list that both have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lists {
    /// The patch's elements come after those that are there.
    Append,
    /// The patch's elements stand alone.
    Replace,
}

/// `into` with the encoded `patch` of the same type merged in; `None` when the patch does not decode.
pub fn merge<M: Message + Name + Default>(into: &M, patch: &[u8], lists: Lists) -> Option<M> {
    let bytes = merge_encoded(&M::full_name(), &into.encode_to_vec(), patch, lists)?;
    M::decode(bytes.as_slice()).ok()
}

/// `into` with `patch` merged in; `None` when they hold different types, or one that is not known.
pub fn merge_any(into: &Any, patch: &Any) -> Option<Any> {
    let name = any::type_name(&into.type_url);
    if name != any::type_name(&patch.type_url) {
        return None;
    }
    let value = merge_encoded(name, &into.value, &patch.value, Lists::Append)?;
    Some(Any {
        type_url: into.type_url.clone(),
        value,
    })
}

/// The same for messages at hand only as bytes of the type `full_name`.
pub fn merge_encoded(full_name: &str, into: &[u8], patch: &[u8], lists: Lists) -> Option<Vec<u8>> {
    merge_message(MessageDescriptor::find(full_name)?, into, patch, lists, 0).ok()
}

/// As prost's own limit.
const MAX_DEPTH: usize = 100;

/// A field's place on the wire, or what became of it.
enum Part<'a> {
    Same(WireValue<'a>),
    Merged(Vec<u8>),
}

fn merge_message(
    descriptor: MessageDescriptor,
    into: &[u8],
    patch: &[u8],
    lists: Lists,
    depth: usize,
) -> Result<Vec<u8>, Malformed> {
    if depth > MAX_DEPTH {
        return Err(Malformed);
    }
    let mut parts = Vec::new();
    for field in Fields::new(into) {
        let (number, value) = field?;
        parts.push((number, Part::Same(value)));
    }
    let patch: Vec<_> = Fields::new(patch).collect::<Result<_, _>>()?;
    for (i, (number, value)) in patch.iter().enumerate() {
        let Some(field) = descriptor.get_field(*number) else {
            continue;
        };
        let several = field.is_list() || field.is_map();
        if several {
            let first = patch[..i].iter().all(|(other, _)| other != number);
            if field.is_list() && lists == Lists::Replace && first {
                parts.retain(|(other, _)| other != number);
            }
            parts.push((*number, Part::Same(*value)));
            continue;
        }
        // "Not set" cannot be told from the default: there is nothing to take over.
        if !field.has_presence() && value.is_default() {
            continue;
        }
        let merged = match (field.kind(), value) {
            (Kind::Message(inner), WireValue::Bytes(new))
                if inner.full_name() != "google.protobuf.Duration" =>
            {
                let old = whole(&parts, *number)?;
                old.map(|old| merge_message(inner, &old, new, lists, depth + 1))
                    .transpose()?
            }
            _ => None,
        };
        parts.retain(|(other, _)| other != number && !same_oneof(descriptor, field, *other));
        parts.push((*number, merged.map_or(Part::Same(*value), Part::Merged)));
    }
    parts.sort_by_key(|(number, _)| *number);
    Ok(encode(&parts))
}

/// The value of a message that is there already; it may lie in several pieces.
fn whole(parts: &[(u32, Part<'_>)], number: u32) -> Result<Option<Vec<u8>>, Malformed> {
    let mut whole = None;
    for (_, part) in parts.iter().filter(|(other, _)| *other == number) {
        let bytes = match part {
            Part::Same(WireValue::Bytes(bytes)) => bytes,
            Part::Merged(bytes) => bytes.as_slice(),
            Part::Same(_) => return Err(Malformed),
        };
        whole.get_or_insert_with(Vec::new).extend_from_slice(bytes);
    }
    Ok(whole)
}

fn same_oneof(descriptor: MessageDescriptor, field: FieldDescriptor, other: u32) -> bool {
    let of = |field: FieldDescriptor| field.containing_oneof().map(|(index, _)| index);
    let other = || descriptor.get_field(other).and_then(of);
    of(field).is_some_and(|oneof| other() == Some(oneof))
}

fn encode(parts: &[(u32, Part<'_>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, part) in parts {
        match part {
            Part::Merged(bytes) => write_bytes(&mut out, *number, bytes),
            Part::Same(WireValue::Bytes(bytes)) => write_bytes(&mut out, *number, bytes),
            Part::Same(WireValue::Varint(v)) => {
                write_tag(&mut out, *number, 0);
                write_varint(&mut out, *v);
            }
            Part::Same(WireValue::Fixed64(v)) => {
                write_tag(&mut out, *number, 1);
                out.extend_from_slice(&v.to_le_bytes());
            }
            Part::Same(WireValue::Fixed32(v)) => {
                write_tag(&mut out, *number, 5);
                out.extend_from_slice(&v.to_le_bytes());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envoy::config::cluster::v3::Cluster;
    use prost_types::Duration;

    #[test]
    fn a_patch_replaces_values_and_durations_and_appends_to_lists() {
        let filter = |name: &str| crate::envoy::config::cluster::v3::Filter {
            name: name.to_owned(),
            ..Default::default()
        };
        let into = Cluster {
            name: "a".to_owned(),
            connect_timeout: Some(Duration {
                seconds: 10,
                nanos: 0,
            }),
            filters: vec![filter("x")],
            ..Cluster::default()
        };
        let patch = Cluster {
            connect_timeout: Some(Duration {
                seconds: 0,
                nanos: 5,
            }),
            filters: vec![filter("y")],
            ..Cluster::default()
        };
        let out = merge(&into, &patch.encode_to_vec(), Lists::Append).unwrap();
        assert_eq!(out.name, "a");
        assert_eq!(
            out.connect_timeout,
            Some(Duration {
                seconds: 0,
                nanos: 5
            })
        );
        assert_eq!(out.filters, [filter("x"), filter("y")]);
        let out = merge(&into, &patch.encode_to_vec(), Lists::Replace).unwrap();
        assert_eq!(out.filters, [filter("y")]);
    }
}
