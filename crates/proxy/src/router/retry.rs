//! Whether an attempt is repeated.

use std::{sync::Arc, time::Duration};

use outrigger_http::ResponseHead;

use crate::{
    cluster::{Host, Omit},
    http::{Exchange, http_status_of},
    plan::{
        RetryPolicy,
        matcher::HeaderMatcher,
        retry::{BackOff, ResetFormat, RetryOn},
    },
    worker::{Random, Worker},
};

/// Why an attempt gave no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No connection.
    Connect,
    /// The upstream said that it did not look at the request.
    Refused,
    /// The connection or stream broke, with the head sent and nothing of a response received.
    Reset,
    /// The attempt took too long.
    PerTryTimeout,
    /// A circuit breaker; never retried.
    Overflow,
}

/// The state of one request's retries.
#[derive(Debug)]
pub(crate) struct Retries {
    policy: Option<Arc<RetryPolicy>>,
    on: RetryOn,
    left: u32,
    /// Retries begun.
    pub(crate) made: u32,
    codes: Vec<u16>,
    header_names: Vec<HeaderMatcher>,
}

/// The answer of [`Retries`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Go on with what there is.
    No,
    /// The condition holds, but there were enough attempts (URX).
    Exhausted,
    /// Repeat it.
    Yes,
}

impl Retries {
    /// From the route's or virtual host's policy, and from headers of internal clients, which are
    /// taken off.
    pub(crate) fn new(exchange: &mut Exchange<'_>) -> Retries {
        let policy = exchange.route.get().and_then(|(virtual_host, _)| {
            let own = exchange
                .route
                .action()
                .and_then(|action| action.retry_policy.clone());
            own.or_else(|| virtual_host.retry_policy.clone())
        });
        let mut on = policy
            .as_ref()
            .map_or(RetryOn::default(), |policy| policy.retry_on);
        let mut left = policy.as_ref().map_or(1, |policy| policy.num_retries);
        let (mut codes, mut header_names) = (Vec::new(), Vec::new());
        let headers = &mut exchange.request.headers;
        // Most requests say nothing about it.
        if headers.contains_prefix("x-envoy-") {
            for name in ["x-envoy-retry-on", "x-envoy-retry-grpc-on"] {
                if let Some(list) = headers.get_str(name) {
                    on = on.union(RetryOn::parse(list));
                    headers.remove(name);
                }
            }
            if let Some(list) = headers.get_str("x-envoy-retriable-status-codes") {
                codes.extend(
                    list.split(',')
                        .filter_map(|code| code.trim().parse::<u16>().ok()),
                );
                headers.remove("x-envoy-retriable-status-codes");
            }
            if let Some(number) = headers.get_str("x-envoy-max-retries") {
                left = number.trim().parse().unwrap_or(left);
                headers.remove("x-envoy-max-retries");
            }
            if let Some(list) = headers.get_str("x-envoy-retriable-header-names") {
                header_names.extend(list.split(',').map(|name| HeaderMatcher {
                    name: name.trim().to_ascii_lowercase().into(),
                    condition: crate::plan::matcher::HeaderCondition::Present(true),
                    joined: Default::default(),
                    invert: false,
                    missing_as_empty: false,
                }));
                headers.remove("x-envoy-retriable-header-names");
            }
        }
        if let Some(policy) = &policy
            && !policy.retriable_request_headers.is_empty()
            && !policy
                .retriable_request_headers
                .iter()
                .any(|matcher| matcher.matches(exchange))
        {
            on = RetryOn::default();
        }
        Retries {
            policy,
            on,
            left,
            made: 0,
            codes,
            header_names,
        }
    }

    /// Whether any attempt may ever be repeated, so that the request's body is worth keeping.
    pub(crate) fn is_possible(&self) -> bool {
        !self.on.is_empty() && self.left > 0
    }

    /// The policy, where there is one.
    pub(crate) fn policy(&self) -> Option<&Arc<RetryPolicy>> {
        self.policy.as_ref()
    }

    /// What to do about a response.
    pub(crate) fn response(&self, response: &ResponseHead) -> Answer {
        if self.on.is_empty() {
            return Answer::No;
        }
        let holds = self.wants(response);
        self.answer(holds)
    }

    /// What to do about an attempt that took too long and goes on beside the next one.
    pub(crate) fn again(&self) -> Answer {
        self.answer(true)
    }

    /// What to do about an attempt without a response.
    pub(crate) fn failure(&self, failure: Failure) -> Answer {
        let on = |set| self.on.intersects(set);
        let reset = RetryOn::FIVE_XX
            .union(RetryOn::GATEWAY_ERROR)
            .union(RetryOn::RESET);
        let holds = match failure {
            Failure::Overflow => false,
            Failure::Connect => on(reset
                .union(RetryOn::CONNECT_FAILURE)
                .union(RetryOn::RESET_BEFORE_REQUEST)),
            Failure::Refused => on(reset.union(RetryOn::REFUSED_STREAM)),
            Failure::Reset => on(reset),
            // The server may be at work on it. Whoever names `reset` or `5xx` has said that a
            // second one does no harm; `gateway-error` alone is about answers (504 is what a
            // timeout would be).
            Failure::PerTryTimeout => on(reset),
        };
        self.answer(holds)
    }

    /// A retry is begun.
    pub(crate) fn begin(&mut self) {
        self.left -= 1;
        self.made += 1;
    }

    /// How long to wait before the retry that was just begun, and whether the upstream said so.
    pub(crate) fn pause(
        &self,
        response: Option<&ResponseHead>,
        random: &Random,
    ) -> (Duration, bool) {
        let limited = self.policy.as_ref().and_then(|policy| {
            let limited = policy.rate_limited_back_off.as_ref()?;
            let response = response?;
            limited.reset_headers.iter().find_map(|(name, form)| {
                let number: u64 = response.get_str(name)?.trim().parse().ok()?;
                let pause = match form {
                    ResetFormat::Seconds => Duration::from_secs(number),
                    ResetFormat::UnixTimestamp => Duration::from_secs(number).checked_sub(
                        std::time::SystemTime::now()
                            .duration_since(std::time::UNIX_EPOCH)
                            .unwrap_or_default(),
                    )?,
                };
                (pause <= limited.max_interval).then_some(pause)
            })
        });
        if let Some(pause) = limited {
            // A little more than asked, so that not all come back in the same moment.
            let more = Duration::from_micros(random.below(pause.as_micros() as u64 / 2 + 1));
            return (pause + more, true);
        }
        let back_off = self
            .policy
            .as_ref()
            .map_or(BackOff::default(), |policy| policy.back_off);
        let factor = (1u32 << self.made.min(20)) - 1;
        let limit = back_off.base.saturating_mul(factor).min(back_off.max);
        (
            Duration::from_micros(random.below(limit.as_micros() as u64)),
            false,
        )
    }

    fn answer(&self, holds: bool) -> Answer {
        match (holds, self.left) {
            (false, _) => Answer::No,
            (true, 0) => Answer::Exhausted,
            (true, _) => Answer::Yes,
        }
    }

    fn wants(&self, response: &ResponseHead) -> bool {
        let on = |set| self.on.intersects(set);
        let status = response.status;
        if response.headers.contains("x-envoy-ratelimited") {
            return on(RetryOn::ENVOY_RATELIMITED);
        }
        if on(RetryOn::FIVE_XX) && status >= 500
            || on(RetryOn::GATEWAY_ERROR) && matches!(status, 502..=504)
            || on(RetryOn::RETRIABLE_4XX) && status == 409
        {
            return true;
        }
        if on(RetryOn::RETRIABLE_STATUS_CODES) {
            let listed = self
                .policy
                .iter()
                .flat_map(|policy| &policy.retriable_status_codes);
            if listed.chain(&self.codes).any(|code| *code == status) {
                return true;
            }
        }
        if on(RetryOn::RETRIABLE_HEADERS) {
            let listed = self
                .policy
                .iter()
                .flat_map(|policy| &policy.retriable_headers);
            if listed
                .chain(&self.header_names)
                .any(|matcher| matcher.matches_response(&response.headers))
            {
                return true;
            }
        }
        let grpc = response
            .get_str("grpc-status")
            .and_then(|status| status.parse::<u32>().ok());
        match grpc {
            Some(1) => on(RetryOn::GRPC_CANCELLED),
            Some(4) => on(RetryOn::GRPC_DEADLINE_EXCEEDED),
            Some(8) => on(RetryOn::GRPC_RESOURCE_EXHAUSTED),
            Some(13) => on(RetryOn::GRPC_INTERNAL),
            Some(14) => on(RetryOn::GRPC_UNAVAILABLE),
            _ => false,
        }
    }
}

impl RetryPolicy {
    /// The priorities of the hosts that were tried, brought up to date after every so many attempts
    /// (`retry_priority.previous_priorities`): a bit for each.
    pub(crate) fn priorities_tried(&self, tried: &[Arc<Host>]) -> u64 {
        let Some(frequency) = self.previous_priorities_update_frequency else {
            return 0;
        };
        let known = tried.len() - tried.len() % frequency.max(1) as usize;
        tried[..known]
            .iter()
            .filter(|host| host.priority < 64)
            .fold(0, |all, host| all | 1 << host.priority)
    }
}

impl Omit for RetryPolicy {
    fn omits(&self, host: &Host) -> bool {
        let lb = host.metadata.namespace("envoy.lb");
        let has =
            |key: &str, value: &serde_json::Value| lb.and_then(|lb| lb.get(key)) == Some(value);
        self.omit_canary_hosts && has("canary", &true.into())
            || self
                .omit_host_metadata
                .as_ref()
                .and_then(serde_json::Value::as_object)
                .is_some_and(|wanted| {
                    !wanted.is_empty() && wanted.iter().all(|(key, value)| has(key, value))
                })
    }
}

/// Whether the request may be sent to a server twice without harm: by its method (RFC 9110, 9.2.2), or because its
/// client says so with a key that the server tells repetitions by.
pub(crate) fn is_repeatable(exchange: &Exchange<'_>) -> bool {
    let request = &exchange.request;
    request.method.is_idempotent()
        || ["idempotency-key", "x-idempotency-key"]
            .into_iter()
            .any(|name| request.headers.contains(name))
}

/// Whether an attempt that takes too long goes on beside the next one: by the route's policy or the virtual host's, or
/// by a header of an internal client, which is taken off.
pub(crate) fn hedges(exchange: &mut Exchange<'_>) -> bool {
    const HEADER: &str = "x-envoy-hedge-on-per-try-timeout";
    if let Some(value) = exchange.request.headers.get_str(HEADER) {
        let hedges = value == "true";
        exchange.request.headers.remove(HEADER);
        return hedges;
    }
    let own = exchange
        .route
        .action()
        .and_then(|action| action.hedge_on_per_try_timeout);
    own.or_else(|| exchange.route.get()?.0.hedge_on_per_try_timeout)
        .unwrap_or(false)
}

/// Whether the operator has said that other requests, too, are repeated where the policy asks for it although a server
/// may have seen them: the runtime key for all, or the route's metadata (docs/retries.md).
pub(crate) fn repeats_unsafe(exchange: &Exchange<'_>, worker: &Worker) -> bool {
    let yes =
        |value: &serde_json::Value| value.as_bool() == Some(true) || value.as_str() == Some("true");
    let route = exchange
        .route
        .route()
        .and_then(|route| route.metadata.namespace("outrigger"))
        .and_then(|metadata| metadata.get("retry_unsafe_requests"));
    match route {
        Some(value) => yes(value),
        None => worker
            .bootstrap
            .runtime
            .get("outrigger.retry_unsafe_requests")
            .is_some_and(yes),
    }
}

/// The status that a response stands for: the gRPC one, where it is said in the head.
pub(crate) fn effective_status(response: &ResponseHead) -> u16 {
    match response
        .get_str("grpc-status")
        .and_then(|status| status.parse::<u32>().ok())
    {
        Some(status) if response.is_grpc() => http_status_of(status),
        _ => response.status,
    }
}
