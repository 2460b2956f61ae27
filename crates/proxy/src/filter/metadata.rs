//! `envoy.filters.http.header_to_metadata` and `envoy.filters.http.set_metadata`: values for routes and logs to read.

use std::{borrow::Cow, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use outrigger_http::{Headers, ResponseHead};
use serde_json::Value;

use super::{Filter, Interests, Step};
use crate::{
    http::Exchange,
    plan::{
        filter_config::{HeaderRule, HeaderToMetadata, MetadataEntry, RuleSource, SetMetadata},
        http_filter::RouteFilterConfig,
        matcher::cookie,
    },
    worker::Worker,
};

/// `envoy.filters.http.header_to_metadata` of one connection manager.
#[derive(Debug)]
pub(super) struct HeaderToMetadataFilter(pub(super) Arc<HeaderToMetadata>);

/// `envoy.filters.http.set_metadata` of one connection manager.
#[derive(Debug)]
pub(super) struct SetMetadataFilter(pub(super) Arc<[SetMetadata]>);

impl Filter for HeaderToMetadataFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        let config = match config {
            Some(RouteFilterConfig::HeaderToMetadata(config)) => config.clone(),
            _ => self.0.clone(),
        };
        for rule in &config.request {
            let mut headers = std::mem::take(&mut exchange.request.headers);
            apply(rule, &mut headers, exchange);
            exchange.request.headers = headers;
        }
        exchange.filters.header_to_metadata = Some(config);
        Step::Continue
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        let config = exchange.filters.header_to_metadata.clone();
        for rule in config.iter().flat_map(|config| &config.response) {
            apply(rule, &mut response.headers, exchange);
        }
    }
}

impl Filter for SetMetadataFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        let entries = match config {
            Some(RouteFilterConfig::SetMetadata(entries)) => entries,
            _ => &self.0,
        };
        for entry in entries.iter() {
            match exchange.dynamic_metadata.get_mut(&*entry.namespace) {
                Some(known) if entry.allow_overwrite => merge(known, &entry.value),
                Some(_) => {}
                None => {
                    exchange
                        .dynamic_metadata
                        .insert(entry.namespace.to_string(), entry.value.clone());
                }
            }
        }
        Step::Continue
    }
}

/// Objects are joined, lists appended to, everything else replaced.
fn merge(known: &mut Value, new: &Value) {
    match (known, new) {
        (Value::Object(known), Value::Object(new)) => {
            for (key, value) in new {
                match known.get_mut(key) {
                    Some(known) => merge(known, value),
                    None => {
                        known.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(known), Value::Array(new)) => known.extend(new.iter().cloned()),
        (known, new) => *known = new.clone(),
    }
}

fn apply(rule: &HeaderRule, headers: &mut Headers, exchange: &mut Exchange<'_>) {
    let found: Option<Vec<u8>> = match &rule.source {
        RuleSource::Header(name) => headers.joined(name).map(Cow::into_owned),
        RuleSource::Cookie(name) => headers
            .get("cookie")
            .and_then(|cookies| cookie(cookies, name.as_bytes()))
            .map(<[u8]>::to_vec),
    };
    let written = match (&found, &rule.on_present, &rule.on_missing) {
        (Some(value), Some(entry), _) => value_of(entry, value).map(|value| (entry, value)),
        (None, _, Some(entry)) => value_of(entry, b"").map(|value| (entry, value)),
        _ => None,
    };
    if let Some((entry, value)) = written {
        let namespace = exchange
            .dynamic_metadata
            .entry(entry.namespace.to_string())
            .or_insert_with(|| Value::Object(Default::default()));
        if let Value::Object(members) = namespace {
            members.insert(entry.key.to_string(), value);
        }
    }
    if rule.remove
        && found.is_some()
        && let RuleSource::Header(name) = &rule.source
    {
        headers.remove(name);
    }
}

/// The value to write; `None` where there is none of the wanted form.
fn value_of(entry: &MetadataEntry, found: &[u8]) -> Option<Value> {
    let mut value = match entry.value.is_empty() {
        true => found.to_vec(),
        false => entry.value.as_bytes().to_vec(),
    };
    if let Some(rewrite) = &entry.rewrite {
        value = rewrite.rewrite(found);
    }
    if entry.base64 {
        value = BASE64_STANDARD.decode(value).ok()?;
    }
    if value.is_empty() || value.len() > MAX_VALUE {
        return None;
    }
    let text = String::from_utf8(value).ok()?;
    match entry.number {
        true => serde_json::Number::from_f64(text.trim().parse().ok()?).map(Value::Number),
        false => Some(Value::String(text)),
    }
}

/// Bytes of a value, as in Envoy.
const MAX_VALUE: usize = 8 * 1024;
