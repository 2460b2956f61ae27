//! The hash that consistent load balancing goes by.

use std::hash::Hasher;

use twox_hash::XxHash64;

use crate::{
    http::Exchange,
    plan::{
        matcher::{cookie, query_parameter},
        route::{HashPolicy, HashSource},
    },
};

/// The hash of a request; `None` where no policy gives one. Hashes are put together as Envoy does,
/// so that the same request meets the same host through either proxy.
pub(crate) fn of(policies: &[HashPolicy], exchange: &Exchange<'_>) -> Option<u64> {
    let mut hash = None::<u64>;
    for policy in policies {
        if let Some(new) = one(&policy.source, exchange) {
            hash = Some(hash.map_or(0, |hash| hash.rotate_left(1)) ^ new);
            if policy.terminal {
                break;
            }
        }
    }
    hash
}

fn one(source: &HashSource, exchange: &Exchange<'_>) -> Option<u64> {
    let request = &exchange.request;
    match source {
        HashSource::Header { name, rewrite } => {
            let mut values: Vec<Vec<u8>> = match name.starts_with(':') {
                true => vec![request.get(name)?.to_vec()],
                false => request.headers.get_all(name).map(<[u8]>::to_vec).collect(),
            };
            if values.is_empty() {
                return None;
            }
            if let Some(rewrite) = rewrite {
                values
                    .iter_mut()
                    .for_each(|value| *value = rewrite.rewrite(value));
            }
            // The order of several fields must not matter.
            values.sort();
            let mut hasher = XxHash64::with_seed(0);
            values.iter().for_each(|value| hasher.write(value));
            Some(hasher.finish())
        }
        HashSource::Cookie { name, .. } => {
            cookie(request.headers.get("cookie")?, name.as_bytes()).map(xxh64)
        }
        HashSource::SourceIp => Some(xxh64(exchange.client?.to_string().as_bytes())),
        HashSource::QueryParameter(name) => {
            query_parameter(request.path().as_bytes(), name.as_bytes()).map(xxh64)
        }
        HashSource::FilterState(key) => Some(match exchange.hashable_state(key)? {
            serde_json::Value::String(text) => xxh64(text.as_bytes()),
            other => xxh64(other.to_string().as_bytes()),
        }),
    }
}

fn xxh64(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// A cookie that a policy with a lifetime asks us to make: the `set-cookie` value and its hash.
pub(crate) fn new_cookie(
    policies: &[HashPolicy],
    exchange: &Exchange<'_>,
    random: u64,
) -> Option<(String, u64)> {
    policies.iter().find_map(|policy| {
        let HashSource::Cookie {
            name,
            ttl: Some(ttl),
            path,
            attributes,
        } = &policy.source
        else {
            return None;
        };
        if one(&policy.source, exchange).is_some() {
            return None;
        }
        let value = format!("{random:016x}");
        let mut text = format!("{name}=\"{value}\"");
        if !ttl.is_zero() {
            text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
        }
        if !path.is_empty() {
            text.push_str(&format!("; Path={path}"));
        }
        for (name, value) in attributes {
            text.push_str("; ");
            text.push_str(name);
            if !value.is_empty() {
                text.push('=');
                text.push_str(value);
            }
        }
        text.push_str("; HttpOnly");
        Some((text, xxh64(value.as_bytes())))
    })
}
