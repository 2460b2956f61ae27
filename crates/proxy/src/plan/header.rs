//! Header operations of routes: what is set, appended and removed.

use std::sync::Arc;

use super::format::Template;

/// Operations on one header block, in Envoy's order: removals, then what replaces a header, then what comes beside one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderMutations {
    /// In order.
    pub add: Vec<HeaderAdd>,
    /// Lower-case names.
    pub remove: Vec<Arc<str>>,
}

impl HeaderMutations {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

/// One `HeaderValueOption`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderAdd {
    /// Lower case; `:path` and `host`/`:authority` are never here (the plan rejects them).
    pub name: Arc<str>,
    /// May hold `%OPERATORS%`.
    pub value: Template,
    /// How it meets a header that is there.
    pub action: AppendAction,
    /// Adds the header even when the value turns out empty.
    pub keep_empty_value: bool,
    /// A further value is joined with what is there by a comma ([`is_joined`]), instead of a field of its own.
    pub joined: bool,
}

/// Whether several fields of a name are one value, joined by commas: those that Envoy keeps in a place of their own.
pub(crate) fn is_joined(name: &str) -> bool {
    JOINED.binary_search(&name).is_ok()
}

/// Sorted.
const JOINED: &[&str] = &[
    "accept",
    "accept-encoding",
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "access-control-request-headers",
    "access-control-request-method",
    "age",
    "authorization",
    "cache-control",
    "cdn-loop",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "grpc-accept-encoding",
    "grpc-message",
    "grpc-status",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "last-modified",
    "location",
    "origin",
    "pragma",
    "proxy-connection",
    "proxy-status",
    "referer",
    "server",
    "te",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "x-client-trace-id",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-degraded",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-immediate-health-check-fail",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-is-timeout-retry",
    "x-envoy-max-retries",
    "x-envoy-original-host",
    "x-envoy-original-path",
    "x-envoy-original-url",
    "x-envoy-ratelimited",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-canary",
    "x-envoy-upstream-healthchecked-cluster",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-service-time",
    "x-envoy-upstream-stream-duration-ms",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-request-id",
];

/// How a new value meets a header that is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AppendAction {
    /// A further field.
    #[default]
    AppendIfExistsOrAdd,
    /// Only where there is none.
    AddIfAbsent,
    /// In place of all there are.
    OverwriteIfExistsOrAdd,
    /// In place of all there are, and only then.
    OverwriteIfExists,
}

/// `envoy.config.common.mutation_rules.v3.HeaderMutation`: unlike [`HeaderMutations`] in one order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderMutation {
    /// Takes a header off (lower case).
    Remove(Arc<str>),
    /// Adds, appends or sets one.
    Append(HeaderAdd),
    /// Takes off the headers whose names match.
    RemoveOnMatch(super::matcher::StringMatcher),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_their_order() {
        assert!(JOINED.is_sorted());
        assert!(is_joined("content-type") && is_joined("via") && is_joined("x-forwarded-for"));
        assert!(!is_joined("set-cookie") && !is_joined("cookie") && !is_joined("x-a"));
    }
}
