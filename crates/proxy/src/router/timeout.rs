//! How long a request may take, from its route and its headers.

use std::time::Duration;

use outrigger_http::Headers;

use crate::{
    http::Exchange,
    plan::{HttpConnectionManager, RetryPolicy, http_filter::RouterFilter},
};

/// Limits of one request; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// From the end of the request to the end of the response, retries included.
    pub(crate) request: Option<Duration>,
    /// Each attempt.
    pub(crate) per_try: Option<Duration>,
    /// Each attempt, without a byte of the response.
    pub(crate) per_try_idle: Option<Duration>,
    /// From the head to the end of everything.
    pub(crate) stream: Option<Duration>,
    /// Without a byte in either direction.
    pub(crate) idle: Option<Duration>,
    /// `max_grpc_timeout` counts for this request: `grpc-timeout` says what is expected.
    tell_grpc: bool,
}

impl Timeouts {
    /// The limits of this request; takes the headers that say them off it.
    pub(crate) fn new(
        plan: &HttpConnectionManager,
        exchange: &mut Exchange<'_>,
        retry: Option<&RetryPolicy>,
        router: &RouterFilter,
    ) -> Timeouts {
        let grpc = exchange.request.is_grpc();
        let asked = exchange
            .request
            .headers
            .get_str("grpc-timeout")
            .and_then(grpc_timeout);
        let action = exchange.route.action();
        // A route that limits the stream limits the request by that alone.
        let newer = action.is_some_and(|action| action.max_stream_duration.is_some());
        let mut request = action.filter(|_| !newer).and_then(|action| action.timeout);
        let mut tell_grpc = false;
        if let Some(action) = action
            && grpc
            && !newer
            && let Some(cap) = action.max_grpc_timeout
        {
            tell_grpc = true;
            // 0 is no limit here.
            let asked = asked.filter(|asked| !asked.is_zero()).map(|asked| {
                let offset = action.grpc_timeout_offset.unwrap_or_default();
                if asked > offset {
                    asked - offset
                } else {
                    asked
                }
            });
            request = match (asked, cap) {
                (Some(asked), Some(cap)) => Some(asked.min(cap)),
                (asked, cap) => asked.or(cap),
            };
        }
        let limits = action
            .and_then(|action| action.max_stream_duration)
            .unwrap_or_default();
        let mut stream = limits
            .max_stream_duration
            .unwrap_or(plan.common.max_stream_duration);
        if let Some(cap) = limits.grpc_timeout_header_max
            && let Some(asked) = asked.filter(|_| grpc)
        {
            let offset = limits.grpc_timeout_header_offset.unwrap_or_default();
            let capped = cap.map_or(asked, |cap| asked.min(cap));
            stream = Some(capped.saturating_sub(offset));
        }
        if newer
            && grpc
            && let Some(stream) = stream
        {
            set_grpc_timeout(&mut exchange.request.headers, stream);
        }
        let idle = action
            .and_then(|action| action.idle_timeout)
            .unwrap_or(plan.stream_idle_timeout);
        let mut per_try = retry.and_then(|retry| retry.per_try_timeout);
        let headers = &mut exchange.request.headers;
        // The proxy before this one has taken its own waiting into account.
        let expected = router
            .respect_expected_rq_timeout
            .then(|| millis(headers, EXPECTED))
            .flatten();
        if let Some(expected) = expected {
            request = expected;
            headers.remove("x-envoy-upstream-rq-timeout-ms");
        }
        if headers.contains_prefix("x-envoy-upstream-rq-") {
            if let Some(asked) = take_millis(headers, "x-envoy-upstream-rq-timeout-ms") {
                request = asked;
            }
            if let Some(asked) = take_millis(headers, "x-envoy-upstream-rq-per-try-timeout-ms") {
                per_try = asked;
            }
        }
        // An attempt that may take as long as all of them is not limited by itself.
        let per_try = per_try.filter(|per_try| request.is_none_or(|request| *per_try < request));
        let per_try_idle = retry.and_then(|retry| retry.per_try_idle_timeout);
        Timeouts {
            request,
            per_try,
            per_try_idle,
            stream,
            idle,
            tell_grpc,
        }
    }

    /// Tells the upstream how long it is waited for, so that it can give up in time.
    pub(crate) fn tell_grpc(&self, headers: &mut Headers, expected: u64) {
        if self.tell_grpc {
            set_grpc_timeout(headers, Duration::from_millis(expected));
        }
    }

    /// What the upstream is told (`x-envoy-expected-rq-timeout-ms`) when so much time has passed; at least 1, as 0 would
    /// be no limit.
    pub(crate) fn expected(&self, passed: Duration) -> Option<u64> {
        let limit = self.per_try.or(self.request)?;
        let left = self.request.map(|request| request.saturating_sub(passed));
        let expected = left.map_or(limit, |left| limit.min(left));
        Some((expected.as_millis() as u64).max(1))
    }
}

const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms";

/// A header with milliseconds; 0 is no limit.
fn millis(headers: &Headers, name: &str) -> Option<Option<Duration>> {
    let millis = headers.get_str(name)?.trim().parse::<u64>().ok();
    millis.map(|millis| (millis > 0).then(|| Duration::from_millis(millis)))
}

/// The same, taken off.
fn take_millis(headers: &mut Headers, name: &str) -> Option<Option<Duration>> {
    let found = millis(headers, name);
    headers.remove(name);
    found
}

/// Writes `grpc-timeout`: milliseconds, or the first greater unit of which eight digits suffice.
fn set_grpc_timeout(headers: &mut Headers, timeout: Duration) {
    // Rounded up: 0 would be no time at all.
    let mut time = timeout.as_nanos().div_ceil(1_000_000);
    let mut unit = 'm';
    for (next, factor) in [('S', 1000), ('M', 60), ('H', 60)] {
        if time > 99_999_999 {
            (time, unit) = (time / factor, next);
        }
    }
    let time = time.min(99_999_999);
    headers.set("grpc-timeout", format!("{time}{unit}"));
}

/// `1H`, `2M`, `3S`, `4m`, `5u`, `6n`: at most eight digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_as_the_protocol_writes_them() {
        assert_eq!(grpc_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(
            grpc_timeout("99999999m"),
            Some(Duration::from_millis(99_999_999))
        );
        for bad in ["", "S", "123456789S", "1x", "-1S", "1.5S"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }
}
