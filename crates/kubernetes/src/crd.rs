//! CustomResourceDefinitions of Istio's kinds, generated from the messages that this program reads them into: what the
//! API server lets through is what we know, field by field (structural schemas).

mod limits;
mod rules;
mod shown;

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
    let shown = shown::of(kind);
    let columns: Vec<Value> = shown
        .columns
        .iter()
        .map(|(name, path, description)| {
            let shown_as = if *name == "Age" { "date" } else { "string" };
            json!({"name": name, "type": shown_as, "jsonPath": path, "description": description})
        })
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
    let mut names = kind.versions().to_vec();
    names.sort_unstable();
    let stored = if kind == Kind::Telemetry {
        "v1alpha1"
    } else {
        names[0]
    };
    let versions: Vec<Value> = names
        .iter()
        .map(|version| {
            json!({
                "name": version,
                "served": true,
                // What Istio stores, so that either can take a cluster over from the other.
                "storage": *version == stored,
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
        let schema = property(message.full_name(), &field, depth);
        if let Some(alias) = rules::alias(message.full_name(), field.json_name()) {
            properties.insert(alias.to_owned(), schema.clone());
        }
        properties.insert(field.json_name().to_owned(), schema);
    }
    let mut out = json!({"type": "object"});
    if !properties.is_empty() {
        out["properties"] = properties.into();
    }
    let required = rules::required(message.full_name());
    if !required.is_empty() {
        out["required"] = required.into();
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
    if let Value::Object(schema) = &mut out {
        rules::between_fields(message.full_name(), schema);
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

fn property(message: &str, field: &FieldDescriptor, depth: usize) -> Value {
    let name = field.json_name();
    let element = |mut schema: Value| {
        if let Value::Object(schema) = &mut schema {
            rules::of_field(message, &format!("{name}[]"), schema);
        }
        schema
    };
    let mut out = if field.is_map() {
        let FieldKind::Message(entry) = field.kind() else {
            return any_object();
        };
        let value = entry.map_entry_value_field();
        json!({"type": "object", "additionalProperties": element(single(&value, depth))})
    } else if field.is_list() {
        json!({"type": "array", "items": element(single(field, depth))})
    } else {
        single(field, depth)
    };
    if let Value::Object(schema) = &mut out {
        if matches!(field.kind(), FieldKind::Message(m) if m.full_name() == "google.protobuf.Duration")
        {
            rules::of_duration(message, name, schema);
        }
        rules::of_field(message, name, schema);
    }
    out
}

fn single(field: &FieldDescriptor, depth: usize) -> Value {
    match field.kind() {
        FieldKind::Bool => json!({"type": "boolean"}),
        FieldKind::String => json!({"type": "string"}),
        FieldKind::Bytes => json!({"type": "string", "format": "byte"}),
        FieldKind::Double => json!({"type": "number", "format": "double"}),
        FieldKind::Float => json!({"type": "number", "format": "float"}),
        FieldKind::Int32 | FieldKind::Sint32 | FieldKind::Sfixed32 => {
            json!({"type": "integer", "format": "int32"})
        }
        FieldKind::Uint32 | FieldKind::Fixed32 => {
            json!({"type": "integer", "minimum": 0, "maximum": u32::MAX})
        }
        // Texts in protobuf's own JSON, numbers where people write them, and in Istio's definitions.
        FieldKind::Int64 | FieldKind::Sint64 | FieldKind::Sfixed64 => {
            json!({"type": "integer", "format": "int64"})
        }
        FieldKind::Uint64 | FieldKind::Fixed64 => json!({"type": "integer", "minimum": 0}),
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
        "DoubleValue" => json!({"type": "number", "format": "double", "nullable": true}),
        "FloatValue" => json!({"type": "number", "format": "float", "nullable": true}),
        "Int32Value" => json!({"type": "integer", "format": "int32", "nullable": true}),
        "UInt32Value" => {
            json!({"type": "integer", "minimum": 0, "maximum": u32::MAX, "nullable": true})
        }
        "Int64Value" => json!({"type": "integer", "format": "int64", "nullable": true}),
        "UInt64Value" => json!({"type": "integer", "minimum": 0, "nullable": true}),
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
        assert_eq!(http["timeout"]["type"], "string");
        let weight = &http["route"]["items"]["properties"]["weight"];
        assert_eq!(weight["type"], "integer");
        let uri = &http["match"]["items"]["properties"]["uri"];
        assert_eq!(uri["oneOf"][1], json!({"required": ["exact"]}));
        // Limits of fields, rules between them, names that users write, and what a duration must be.
        assert_eq!(vs["spec"]["versions"][2]["name"], "v1beta1");
        assert!(http["mirror_percent"].is_object() && http["mirrorPercent"].is_object());
        assert_eq!(http["directResponse"]["required"], json!(["status"]));
        assert_eq!(
            http["timeout"]["x-kubernetes-validations"][0]["rule"],
            "duration(self) >= duration('1ms')"
        );
        let group = find("workloadgroups.networking.istio.io");
        let template = &group["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
            ["properties"]["template"];
        let rules = template["x-kubernetes-validations"].as_array().unwrap();
        assert_eq!(rules.len(), 1, "a template needs no address: {rules:?}");
        let dr = find("destinationrules.networking.istio.io").to_string();
        assert!(dr.contains(r#""maximum":599,"minimum":100"#), "{dr}");
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

    #[test]
    fn every_limit_is_of_a_field_that_exists() {
        let fields = |message: &str| -> Vec<&'static str> {
            let found = proto::json::descriptor(&format!("istio.{message}"));
            let found = found.unwrap_or_else(|| panic!("no message {message}"));
            found.fields().map(|field| field.json_name()).collect()
        };
        for (message, field, _) in limits::FIELDS {
            let field = field.trim_end_matches("[]");
            assert!(fields(message).contains(&field), "{message}.{field}");
        }
        for (message, names) in limits::REQUIRED {
            assert!(
                names.iter().all(|name| fields(message).contains(name)),
                "{message}: {names:?}"
            );
        }
        for (message, _) in limits::BETWEEN {
            fields(message);
        }
    }
}
