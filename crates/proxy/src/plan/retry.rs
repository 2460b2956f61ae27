//! Retry policies: when an attempt is repeated, how often and where.

use std::{sync::Arc, time::Duration};

use super::matcher::HeaderMatcher;

/// `envoy.config.route.v3.RetryPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Conditions.
    pub retry_on: RetryOn,
    /// Repetitions after the first attempt. Default 1.
    pub num_retries: u32,
    /// Limit of one attempt; `None` takes the route's timeout.
    pub per_try_timeout: Option<Duration>,
    /// An attempt without bytes for this long is given up.
    pub per_try_idle_timeout: Option<Duration>,
    /// Avoids hosts that were tried (`envoy.retry_host_predicates.previous_hosts`).
    pub avoid_previous_hosts: bool,
    /// Avoids canary hosts (`envoy.retry_host_predicates.omit_canary_hosts`).
    pub omit_canary_hosts: bool,
    /// Avoids hosts whose `envoy.lb` metadata holds all of this (`envoy.retry_host_predicates.omit_host_metadata`).
    pub omit_host_metadata: Option<serde_json::Value>,
    /// How often another host is picked before one is taken as it comes. Default 1.
    pub host_selection_max_attempts: u32,
    /// `retry_priority.previous_priorities`: moves on to other priorities after this many attempts.
    pub previous_priorities_update_frequency: Option<u32>,
    /// For `retriable-status-codes`.
    pub retriable_status_codes: Vec<u16>,
    /// For `retriable-headers`: response headers.
    pub retriable_headers: Vec<HeaderMatcher>,
    /// Only requests with one of these headers are repeated; empty: all.
    pub retriable_request_headers: Vec<HeaderMatcher>,
    /// Pause between attempts.
    pub back_off: BackOff,
    /// Pause that the upstream asks for.
    pub rate_limited_back_off: Option<RateLimitedBackOff>,
}

/// Pause before attempt N: uniform in [0, min((2^N − 1) × base, max)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackOff {
    /// Default 25 ms.
    pub base: Duration,
    /// Default 10 × base.
    pub max: Duration,
}

impl Default for BackOff {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(25),
            max: Duration::from_millis(250),
        }
    }
}

/// Pause that the upstream asks for by a response header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateLimitedBackOff {
    /// Headers in order of preference, with their form.
    pub reset_headers: Vec<(Arc<str>, ResetFormat)>,
    /// A longer pause is not obeyed. Default 300 s.
    pub max_interval: Duration,
}

/// Form of a reset header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetFormat {
    /// Seconds from now.
    Seconds,
    /// Seconds since 1970.
    UnixTimestamp,
}

/// A set of retry conditions (`retry_on`, `x-envoy-retry-on`, `x-envoy-retry-grpc-on`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct RetryOn(u32);

impl RetryOn {
    /// Any 5xx, or no response at all.
    pub const FIVE_XX: Self = Self(1);
    /// 502, 503, 504.
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    /// The upstream did not answer.
    pub const RESET: Self = Self(1 << 2);
    /// Reset before the request was sent.
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 3);
    /// No connection.
    pub const CONNECT_FAILURE: Self = Self(1 << 4);
    /// x-envoy-ratelimited in the response.
    pub const ENVOY_RATELIMITED: Self = Self(1 << 5);
    /// 409.
    pub const RETRIABLE_4XX: Self = Self(1 << 6);
    /// RST_STREAM REFUSED_STREAM.
    pub const REFUSED_STREAM: Self = Self(1 << 7);
    /// A listed status code.
    pub const RETRIABLE_STATUS_CODES: Self = Self(1 << 8);
    /// A listed response header.
    pub const RETRIABLE_HEADERS: Self = Self(1 << 9);
    /// HTTP/3 after the handshake; accepted, never happens.
    pub const HTTP3_POST_CONNECT_FAILURE: Self = Self(1 << 10);
    /// grpc-status 1.
    pub const GRPC_CANCELLED: Self = Self(1 << 11);
    /// grpc-status 4.
    pub const GRPC_DEADLINE_EXCEEDED: Self = Self(1 << 12);
    /// grpc-status 8.
    pub const GRPC_RESOURCE_EXHAUSTED: Self = Self(1 << 13);
    /// grpc-status 14.
    pub const GRPC_UNAVAILABLE: Self = Self(1 << 14);
    /// grpc-status 13.
    pub const GRPC_INTERNAL: Self = Self(1 << 15);

    /// From a comma-separated list. Words that Envoy does not know either have no effect, as there.
    pub fn parse(list: &str) -> Self {
        let mut set = 0;
        for word in list.split(',').map(str::trim) {
            if let Some((_, bit)) = WORDS.iter().find(|(name, _)| *name == word) {
                set |= bit.0;
            }
        }
        Self(set)
    }

    /// Whether every word of the list is one, of conditions or of gRPC's.
    pub fn knows(list: &str, grpc: bool) -> bool {
        list.split(',').map(str::trim).all(|word| {
            let found = WORDS.iter().find(|(name, _)| *name == word);
            found.is_some_and(|(_, bit)| GRPC.contains(*bit) == grpc)
        })
    }

    /// Whether all of `other` are in it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether one of `other` is in it.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both together.
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The conditions that are statuses of gRPC.
const GRPC: RetryOn = RetryOn(
    RetryOn::GRPC_CANCELLED.0
        | RetryOn::GRPC_DEADLINE_EXCEEDED.0
        | RetryOn::GRPC_RESOURCE_EXHAUSTED.0
        | RetryOn::GRPC_UNAVAILABLE.0
        | RetryOn::GRPC_INTERNAL.0,
);

const WORDS: [(&str, RetryOn); 16] = [
    ("5xx", RetryOn::FIVE_XX),
    ("gateway-error", RetryOn::GATEWAY_ERROR),
    ("reset", RetryOn::RESET),
    ("reset-before-request", RetryOn::RESET_BEFORE_REQUEST),
    ("connect-failure", RetryOn::CONNECT_FAILURE),
    ("envoy-ratelimited", RetryOn::ENVOY_RATELIMITED),
    ("retriable-4xx", RetryOn::RETRIABLE_4XX),
    ("refused-stream", RetryOn::REFUSED_STREAM),
    ("retriable-status-codes", RetryOn::RETRIABLE_STATUS_CODES),
    ("retriable-headers", RetryOn::RETRIABLE_HEADERS),
    (
        "http3-post-connect-failure",
        RetryOn::HTTP3_POST_CONNECT_FAILURE,
    ),
    ("cancelled", RetryOn::GRPC_CANCELLED),
    ("deadline-exceeded", RetryOn::GRPC_DEADLINE_EXCEEDED),
    ("resource-exhausted", RetryOn::GRPC_RESOURCE_EXHAUSTED),
    ("unavailable", RetryOn::GRPC_UNAVAILABLE),
    ("internal", RetryOn::GRPC_INTERNAL),
];
