//! `?mask=`: a protobuf field mask on a dump.

use std::collections::BTreeMap;

use serde_json::Value;

use super::config_dump::camel_case;

/// Which fields stay. A mask goes through lists to their elements and keeps what an `Any` is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mask(BTreeMap<String, Mask>);

impl Mask {
    /// Comma-separated paths, `listener.name,version_info`; names in either case.
    pub(super) fn parse(text: &str) -> Self {
        let mut root = Self::default();
        for path in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let mut mask = &mut root;
            for part in path.split('.') {
                mask = mask.0.entry(camel_case(part)).or_default();
            }
        }
        root
    }

    /// What is left of a value.
    pub(super) fn apply(&self, value: Value) -> Value {
        if self.0.is_empty() {
            return value;
        }
        match value {
            Value::Array(list) => list.into_iter().map(|v| self.apply(v)).collect(),
            Value::Object(members) => Value::Object(
                members
                    .into_iter()
                    .filter_map(|(key, value)| match self.0.get(&key) {
                        Some(inner) => Some((key, inner.apply(value))),
                        None if key == "@type" => Some((key, value)),
                        None => None,
                    })
                    .collect(),
            ),
            other => other,
        }
    }

    /// A whole dump, or nothing when the mask names none of its fields.
    pub(super) fn apply_top(&self, dump: Value) -> Option<Value> {
        let known = |key: &String| {
            let name = dump["@type"].as_str().map(proto::any::type_name);
            name.and_then(proto::json::descriptor)
                .is_some_and(|d| d.get_field_by_json_name(key).is_some())
        };
        self.0.keys().any(known).then(|| self.apply(dump.clone()))
    }
}
