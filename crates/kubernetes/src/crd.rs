//! CustomResourceDefinitions of Istio's kinds, generated from the messages that this program reads them into: what the
//! API server lets through is what we know, field by field (structural schemas).

mod rules;

use std::collections::BTreeMap;

use config::Kind;
use proto::{
    json::MessageDescriptor,
    schema::{EnumDescriptor, FieldDescriptor, Kind as FieldKind},
};
use serde_json::{Map, Value, json};

use crate::resource::plural;

/// The definitions of all of Istio's kinds, in the order of [`Kind::ALL`].
pub fn all() -> Vec<Value> {
    let istio = Kind::ALL.iter().copied().filter(|k| k.is_istio());
    istio.map(definition).collect()
}

/// The definition of a kind.
fn definition(kind: Kind) -> Value {
    let message = message(kind);
    let plural = plural(kind);
    let spec = proto::json::descriptor(&message)
        .map_or_else(any_object, |descriptor| object(&descriptor, 0));
    let shown = rules::shown(kind);
    let columns: Vec<Value> = shown
        .columns
        .iter()
        .map(|(name, path, description)| {
            json!({"name": name, "type": "string", "jsonPath": path, "description": description})
        })
        .chain([json!({
            "name": "Age",
            "type": "date",
            "jsonPath": ".metadata.creationTimestamp",
            "description": "Time since the object was made.",
        })])
        .collect();
    let mut spec = spec;
    spec["description"] = shown.about.into();
    let mut schema = json!({
        "type": "object",
        "properties": {
            "spec": spec,
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        },
    });
    if shown.needs_spec {
        schema["required"] = json!(["spec"]);
    }
    let versions: Vec<Value> = kind
        .versions()
        .iter()
        .enumerate()
        .map(|(i, version)| {
            json!({
                "name": version,
                "served": true,
                "storage": i == 0,
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": schema},
                "subresources": {"status": {}},
            })
        })
        .collect();
    let group = kind.group();
    let first = group.split('.').next().unwrap_or_default();
    let mut names = json!({
        "kind": kind.name(),
        "listKind": format!("{}List", kind.name()),
        "plural": plural,
        "singular": kind.name().to_lowercase(),
        "categories": ["istio-io", format!("{first}-istio-io")],
    });
    if !shown.short.is_empty() {
        names["shortNames"] = json!([shown.short]);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{group}"),
            "labels": {"app": "istio-pilot", "chart": "istio", "heritage": "outrigger", "release": "istio"},
            // Deleting a definition deletes every object of it: an uninstall asks first.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {"group": group, "names": names, "scope": "Namespaced", "versions": versions},
    })
}

/// The full name of the message that a kind's `spec` is.
fn message(kind: Kind) -> String {
    let package = match (kind.group(), kind) {
        (_, Kind::ProxyConfig) => "istio.networking.v1beta1",
        ("networking.istio.io", _) => "istio.networking.v1alpha3",
        ("security.istio.io", _) => "istio.security.v1beta1",
        ("telemetry.istio.io", _) => "istio.telemetry.v1alpha1",
        _ => "istio.extensions.v1alpha1",
    };
    format!("{package}.{}", kind.name())
}

fn object(message: &MessageDescriptor, depth: usize) -> Value {
    if let Some(known) = well_known(message.full_name()) {
        return known;
    }
    if depth > DEEPEST {
        return any_object();
    }
    let mut properties = Map::new();
    for field in message.fields() {
        properties.insert(field.json_name().to_owned(), property(&field, depth));
    }
    let mut out = json!({"type": "object"});
    if !properties.is_empty() {
        out["properties"] = properties.into();
    }
    let mut groups: BTreeMap<u32, Vec<&'static str>> = BTreeMap::new();
    for field in message.fields() {
        if let Some((group, _)) = field.containing_oneof() {
            groups.entry(group).or_default().push(field.json_name());
        }
    }
    // A group of one says only that its field may be left out.
    let choices: Vec<Value> = groups
        .into_values()
        .filter(|names| names.len() > 1)
        .map(one_of)
        .collect();
    match choices.len() {
        0 => {}
        1 => out["oneOf"] = choices[0].clone(),
        _ => {
            let all: Vec<Value> = choices.into_iter().map(|c| json!({"oneOf": c})).collect();
            out["allOf"] = all.into();
        }
    }
    if let Some(validations) = rules::of(message.full_name()) {
        out["x-kubernetes-validations"] = validations;
    }
    out
}

/// None or one of these fields.
fn one_of(names: Vec<&'static str>) -> Value {
    let each: Vec<Value> = names.iter().map(|n| json!({"required": [n]})).collect();
    let mut out = vec![json!({"not": {"anyOf": each}})];
    out.extend(each);
    out.into()
}

fn property(field: &FieldDescriptor, depth: usize) -> Value {
    if field.is_map() {
        let FieldKind::Message(entry) = field.kind() else {
            return any_object();
        };
        let value = entry.map_entry_value_field();
        return json!({"type": "object", "additionalProperties": single(&value, depth)});
    }
    let one = single(field, depth);
    if field.is_list() {
        return json!({"type": "array", "items": one});
    }
    one
}

fn single(field: &FieldDescriptor, depth: usize) -> Value {
    match field.kind() {
        FieldKind::Bool => json!({"type": "boolean"}),
        FieldKind::String => json!({"type": "string"}),
        FieldKind::Bytes => json!({"type": "string", "format": "byte"}),
        FieldKind::Double | FieldKind::Float => json!({"type": "number"}),
        FieldKind::Int32 | FieldKind::Sint32 | FieldKind::Sfixed32 => {
            json!({"type": "integer", "format": "int32"})
        }
        FieldKind::Uint32 | FieldKind::Fixed32 => {
            json!({"type": "integer", "minimum": 0, "maximum": u32::MAX})
        }
        // Numbers of 64 bits are texts in protobuf's JSON, and numbers where people write them.
        FieldKind::Int64
        | FieldKind::Sint64
        | FieldKind::Sfixed64
        | FieldKind::Uint64
        | FieldKind::Fixed64 => json!({"x-kubernetes-int-or-string": true}),
        FieldKind::Enum(e) => json!({"type": "string", "enum": values(&e)}),
        FieldKind::Message(m) => object(&m, depth + 1),
    }
}

fn values(e: &EnumDescriptor) -> Vec<&'static str> {
    e.values().map(|(name, _)| name).collect()
}

/// Messages that JSON writes in a form of their own.
fn well_known(name: &str) -> Option<Value> {
    Some(match name.strip_prefix("google.protobuf.")? {
        "Duration" => json!({"type": "string"}),
        "Timestamp" => json!({"type": "string", "format": "date-time"}),
        "BoolValue" => json!({"type": "boolean", "nullable": true}),
        "StringValue" => json!({"type": "string", "nullable": true}),
        "BytesValue" => json!({"type": "string", "format": "byte", "nullable": true}),
        "DoubleValue" | "FloatValue" => json!({"type": "number", "nullable": true}),
        "Int32Value" => json!({"type": "integer", "format": "int32", "nullable": true}),
        "UInt32Value" => {
            json!({"type": "integer", "minimum": 0, "maximum": u32::MAX, "nullable": true})
        }
        "Int64Value" | "UInt64Value" => {
            json!({"x-kubernetes-int-or-string": true, "nullable": true})
        }
        "Struct" | "Any" => any_object(),
        "Empty" => json!({"type": "object"}),
        "Value" => json!({"x-kubernetes-preserve-unknown-fields": true}),
        "ListValue" => {
            json!({"type": "array", "items": {"x-kubernetes-preserve-unknown-fields": true}})
        }
        _ => return None,
    })
}

fn any_object() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// Deeper than any message of Istio's; one that holds itself ends here.
const DEEPEST: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_fields() {
        let all = all();
        assert_eq!(all.len(), 15);
        let find = |name: &str| all.iter().find(|d| d["metadata"]["name"] == name).unwrap();
        let vs = find("virtualservices.networking.istio.io");
        let schema = &vs["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let http = &schema["properties"]["spec"]["properties"]["http"]["items"]["properties"];
        assert_eq!(http["timeout"], json!({"type": "string"}));
        let weight = &http["route"]["items"]["properties"]["weight"];
        assert_eq!(weight["type"], "integer");
        let uri = &http["match"]["items"]["properties"]["uri"];
        assert_eq!(uri["oneOf"][1], json!({"required": ["exact"]}));
        for d in &all {
            let spec = &d["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
            assert!(
                spec["properties"]
                    .as_object()
                    .is_some_and(|p| !p.is_empty()),
                "{d}"
            );
        }
    }
}
