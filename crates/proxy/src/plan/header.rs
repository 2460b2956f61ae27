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
    /// Where a further value is joined with what is there, instead of a field of its own.
    pub joined: Joined,
}

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

/// In which messages several fields of a name are one value, joined by commas: there Envoy keeps it in a place of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Joined {
    /// In requests.
    pub request: bool,
    /// In responses.
    pub response: bool,
}

impl Joined {
    /// Of a name in lower case.
    pub fn of(name: &str) -> Self {
        Self {
            request: REQUEST.binary_search(&name).is_ok(),
            response: RESPONSE.binary_search(&name).is_ok(),
        }
    }
}

/// Sorted.
const REQUEST: &[&str] = &[
    "accept",
    "accept-encoding",
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "cache-control",
    "cdn-loop",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "grpc-accept-encoding",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "origin",
    "pragma",
    "proxy-connection",
    "proxy-status",
    "referer",
    "te",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "via",
    "x-client-trace-id",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-external-address",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-is-timeout-retry",
    "x-envoy-max-retries",
    "x-envoy-original-host",
    "x-envoy-original-path",
    "x-envoy-original-url",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-stream-duration-ms",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-request-id",
];

/// Sorted.
const RESPONSE: &[&str] = &[
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "age",
    "cache-control",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "date",
    "etag",
    "expires",
    "grpc-message",
    "grpc-status",
    "keep-alive",
    "last-modified",
    "location",
    "proxy-connection",
    "proxy-status",
    "server",
    "transfer-encoding",
    "upgrade",
    "vary",
    "via",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-degraded",
    "x-envoy-immediate-health-check-fail",
    "x-envoy-ratelimited",
    "x-envoy-upstream-canary",
    "x-envoy-upstream-healthchecked-cluster",
    "x-envoy-upstream-service-time",
    "x-request-id",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_their_order() {
        assert!(REQUEST.is_sorted() && RESPONSE.is_sorted());
        for (name, request, response) in [
            ("content-type", true, true),
            ("x-forwarded-for", true, false),
            ("vary", false, true),
            ("set-cookie", false, false),
            ("cookie", false, false),
        ] {
            assert_eq!(Joined::of(name), Joined { request, response }, "{name}");
        }
    }
}
