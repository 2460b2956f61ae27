//! Canonical JSON → the same with the names of the `.proto` files, as Envoy's admin endpoint writes them.

use serde_json::{Map, Value};

use super::well_known::is_well_known;
use crate::{
    any::type_name,
    schema::{Kind, MessageDescriptor},
};

/// The value with the fields' own names (`port_value`). What is no field keeps its name: keys of maps and of structs,
/// and whatever a message that this program does not know has.
pub(super) fn proto_names(descriptor: MessageDescriptor, value: Value) -> Value {
    let Value::Object(members) = value else {
        return value;
    };
    if descriptor.full_name() == "google.protobuf.Any" {
        let url = members.get("@type").and_then(Value::as_str);
        let packed = url.and_then(|url| MessageDescriptor::find(type_name(url)));
        return match packed {
            // One that has a form of its own stands in `value`.
            Some(packed) if !is_well_known(packed.full_name()) => fields(packed, members),
            _ => Value::Object(members),
        };
    }
    if is_well_known(descriptor.full_name()) {
        return Value::Object(members);
    }
    fields(descriptor, members)
}

fn fields(descriptor: MessageDescriptor, members: Map<String, Value>) -> Value {
    let renamed = members.into_iter().map(|(name, value)| {
        let Some(field) = descriptor.get_field_by_json_name(&name) else {
            return (name, value);
        };
        let value = match (field.kind(), value) {
            (Kind::Message(entry), Value::Object(entries)) if field.is_map() => {
                match entry.map_entry_value_field().kind() {
                    Kind::Message(inner) => {
                        let entry = |(key, value)| (key, proto_names(inner, value));
                        Value::Object(entries.into_iter().map(entry).collect())
                    }
                    _ => Value::Object(entries),
                }
            }
            // A list that is one value is a `ListValue`, whose elements have no fields.
            (Kind::Message(inner), Value::Array(items)) if field.is_list() => items
                .into_iter()
                .map(|item| proto_names(inner, item))
                .collect(),
            (Kind::Message(inner), value) => proto_names(inner, value),
            (_, value) => value,
        };
        (field.name().to_owned(), value)
    });
    Value::Object(renamed.collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_of_messages_are_renamed_and_nothing_else() {
        let dump = json!({"configs": [{
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
            "versionInfo": "someThing",
            "staticClusters": [{"lastUpdated": "2026-01-01T00:00:00Z", "cluster": {
                "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
                "connectTimeout": "1s",
                "metadata": {"filterMetadata": {"someName": {"aKey": {"bKey": 1}}}},
                "typedExtensionProtocolOptions": {"aName": {"@type": "type.googleapis.com/none.Such", "cKey": 1}},
            }}],
        }]});
        let descriptor = MessageDescriptor::find("envoy.admin.v3.ConfigDump").expect("it is there");
        let expected = json!({"configs": [{
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
            "version_info": "someThing",
            "static_clusters": [{"last_updated": "2026-01-01T00:00:00Z", "cluster": {
                "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
                "connect_timeout": "1s",
                "metadata": {"filter_metadata": {"someName": {"aKey": {"bKey": 1}}}},
                "typed_extension_protocol_options": {"aName": {"@type": "type.googleapis.com/none.Such", "cKey": 1}},
            }}],
        }]});
        assert_eq!(proto_names(descriptor, dump), expected);
    }
}
