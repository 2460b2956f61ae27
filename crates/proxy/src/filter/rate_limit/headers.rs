//! Headers that tell a client of its limits.

use outrigger_http::Headers;

use super::{super::ext_authz::is_legal, LimitStatus};

/// The fields that a head can hold and that do not change what it is about; others are left out.
pub(super) fn legal(list: Vec<(String, Vec<u8>)>) -> Headers {
    let mut headers = Headers::new();
    for (name, value) in list {
        match is_legal(&name, &value) {
            true => headers.append(&name, value),
            false => tracing::debug!(name, "a rate limit service's header is left out"),
        }
    }
    headers
}

/// `x-ratelimit-limit`, `-remaining` and `-reset` (draft-polli-ratelimit-headers-03) of the limit that is nearest,
/// where the client is told of that one. `told` says it of each descriptor, and `default` of those that do not.
pub(super) fn describe(
    statuses: &[LimitStatus],
    told: &[Option<bool>],
    default: bool,
    headers: &mut Headers,
) {
    let tells = |index: usize| told.get(index).copied().flatten().unwrap_or(default);
    let limited = statuses.iter().enumerate();
    let limited = limited.filter_map(|(i, status)| Some((i, status, status.limit.as_ref()?)));
    let nearest = limited
        .clone()
        .min_by_key(|(_, status, _)| status.remaining);
    let Some((index, nearest, (requests, ..))) = nearest else {
        return;
    };
    if !tells(index) {
        return;
    }
    let mut limit = requests.to_string();
    for (index, _, (requests, window, name)) in limited {
        if *window == 0 || !tells(index) {
            continue;
        }
        limit.push_str(&format!(", {requests};w={window}"));
        if !name.is_empty() {
            let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
            limit.push_str(&format!(";name=\"{quoted}\""));
        }
    }
    if !is_legal("x-ratelimit-limit", limit.as_bytes()) {
        tracing::debug!(limit, "a rate limit's name is none that a header can hold");
        return;
    }
    headers.append("x-ratelimit-limit", limit);
    headers.append("x-ratelimit-remaining", nearest.remaining.to_string());
    headers.append("x-ratelimit-reset", nearest.reset.to_string());
}

/// Whole seconds until all limits that are reached begin anew.
pub(super) fn retry_after(statuses: &[LimitStatus]) -> Option<u64> {
    let over = statuses.iter().filter(|status| status.over);
    over.map(|status| status.reset.max(1)).max()
}
