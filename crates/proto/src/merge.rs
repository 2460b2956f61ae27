//! Merging one message into another, as a patch of the user does.
//!
//! Fields that the patch has win; messages merge field by field, lists grow (or are replaced), maps take the patch's
//! entries. A `google.protobuf.Duration` is one value: it is replaced, never mixed of two.

use prost::{Message, Name};
use prost_reflect::{DynamicMessage, ReflectMessage, Value};
use prost_types::Any;

use crate::{any, json};

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
    let descriptor = json::descriptor(full_name)?;
    let mut into = DynamicMessage::decode(descriptor.clone(), into).ok()?;
    let patch = DynamicMessage::decode(descriptor, patch).ok()?;
    merge_message(&mut into, &patch, lists);
    Some(into.encode_to_vec())
}

fn merge_message(into: &mut DynamicMessage, patch: &DynamicMessage, lists: Lists) {
    for (field, value) in patch.fields() {
        match value {
            Value::List(list) => {
                if lists == Lists::Replace {
                    into.clear_field(&field);
                }
                if let Value::List(all) = into.get_field_mut(&field) {
                    all.extend(list.iter().cloned());
                }
            }
            Value::Map(map) => {
                if let Value::Map(all) = into.get_field_mut(&field) {
                    all.extend(map.iter().map(|(k, v)| (k.clone(), v.clone())));
                }
            }
            Value::Message(message)
                if into.has_field(&field)
                    && message.descriptor().full_name() != "google.protobuf.Duration" =>
            {
                if let Value::Message(inner) = into.get_field_mut(&field) {
                    merge_message(inner, message, lists);
                }
            }
            value => into.set_field(&field, value.clone()),
        }
    }
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
