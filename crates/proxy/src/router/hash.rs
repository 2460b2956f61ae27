//! The hash that consistent load balancing goes by.

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
    walk(policies, exchange, |_| None)
}

/// The same, with the cookies that the client lacks and is given: it goes where they will lead it back to.
pub(crate) fn with_new_cookies(policies: &[HashPolicy], exchange: &Exchange<'_>) -> Option<u64> {
    walk(policies, exchange, |_| {
        Some(xxh64(new_value(exchange).as_bytes()))
    })
}

/// `missing`: the hash of a cookie that the client lacks and may be given.
fn walk(
    policies: &[HashPolicy],
    exchange: &Exchange<'_>,
    mut missing: impl FnMut(&HashSource) -> Option<u64>,
) -> Option<u64> {
    let mut hash = None::<u64>;
    for policy in policies {
        let new = one(&policy.source, exchange).or_else(|| match &policy.source {
            HashSource::Cookie { ttl: Some(_), .. } => missing(&policy.source),
            _ => None,
        });
        if let Some(new) = new {
            hash = Some(hash.map_or(0, |hash| hash.rotate_left(1)) ^ new);
        }
        // Whichever policy gave it.
        if policy.terminal && hash.is_some() {
            break;
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
            // The order of several fields must not matter. Each is the seed of the next.
            values.sort();
            let hash = |seed, value: &Vec<u8>| XxHash64::oneshot(seed, value);
            Some(values.iter().fold(0, hash))
        }
        HashSource::Cookie { name, .. } => {
            let mut fields = request.headers.get_all("cookie");
            let value = fields.find_map(|field| cookie(field, name.as_bytes()));
            value.filter(|value| !value.is_empty()).map(xxh64)
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

/// Tells the `set-cookie` values of the cookies that the client is given.
pub(crate) fn new_cookies(
    policies: &[HashPolicy],
    exchange: &Exchange<'_>,
    mut tell: impl FnMut(String),
) {
    walk(policies, exchange, |source| {
        let HashSource::Cookie {
            name,
            ttl: Some(ttl),
            path,
            attributes,
        } = source
        else {
            return None;
        };
        let value = new_value(exchange);
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
        tell(text);
        Some(xxh64(value.as_bytes()))
    });
}

/// The value of new cookies: the same for all requests of a connection, so that those that race get the same ones.
fn new_value(exchange: &Exchange<'_>) -> String {
    let value = match (exchange.connection.remote, exchange.connection.local) {
        (Some(remote), Some(local)) => xxh64(format!("{remote}{local}").as_bytes()),
        _ => exchange.random,
    };
    format!("{value:016x}")
}
