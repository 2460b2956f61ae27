//! The values of custom tags.

use serde_json::Value;

use super::fill;
use crate::{
    http::Exchange,
    plan::tag::{CustomTag, MetadataOf, TagSource},
};

/// A tag's value; `None` where there is none.
pub(crate) fn value(tag: &CustomTag, exchange: &Exchange<'_>) -> Option<String> {
    let or = |default: &str| (!default.is_empty()).then(|| default.to_owned());
    match &tag.source {
        TagSource::Text(text) => or(text),
        TagSource::RequestHeader { name, default } => match exchange.request.get(name) {
            Some(value) => Some(String::from_utf8_lossy(value).into_owned()),
            None => or(default),
        },
        TagSource::Metadata { of, key, default } => {
            let found = match of {
                MetadataOf::Request => {
                    let root = exchange.dynamic_metadata.get(&*key.namespace);
                    root.and_then(|root| {
                        key.path
                            .iter()
                            .try_fold(root, |value, key| value.get(&**key))
                    })
                }
                MetadataOf::Route => {
                    let route = exchange.route.route();
                    route.and_then(|route| route.metadata.lookup(&key.namespace, &key.path))
                }
                MetadataOf::Cluster => {
                    let cluster = exchange.upstream.cluster.as_ref();
                    cluster.and_then(|cluster| cluster.metadata.lookup(&key.namespace, &key.path))
                }
            };
            match found {
                Some(Value::String(text)) => Some(text.clone()),
                Some(Value::Null) | None => or(default),
                Some(other) => Some(other.to_string()),
            }
        }
        TagSource::Format(template) => {
            let mut text = Vec::new();
            fill(template, exchange, &mut text);
            Some(String::from_utf8_lossy(&text).into_owned())
        }
    }
}
