//! Configuration of the HTTP filters that change heads and metadata, limit rates, pin sessions and buffer bodies.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    header::{HeaderAdd, HeaderMutation},
    matcher::Fraction,
    rate_limit::{Descriptor, RateLimit},
    route::RegexRewrite,
};
use crate::lua::Script;

/// `envoy.extensions.filters.http.header_mutation.v3.HeaderMutation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderMutationFilter {
    /// The filter's own.
    pub mutations: Arc<Mutations>,
    /// Routes' mutations: false applies route, virtual host, configuration (the last wins).
    pub most_specific_wins: bool,
}

/// `Mutations`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mutations {
    /// Of the request.
    pub request: Vec<HeaderMutation>,
    /// Of its query.
    pub query: Vec<QueryMutation>,
    /// Of the response.
    pub response: Vec<HeaderMutation>,
    /// Of its trailers.
    pub response_trailers: Vec<HeaderMutation>,
}

/// `KeyValueMutation` of a query; keys and values as they stand in a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueryMutation {
    /// Takes a parameter out.
    Remove(Arc<str>),
    /// Adds or sets one.
    Append {
        /// Name.
        key: Arc<str>,
        /// Value.
        value: Arc<str>,
        /// How it meets one that is there.
        action: super::header::AppendAction,
    },
}

/// `envoy.extensions.filters.http.header_to_metadata.v3.Config`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderToMetadata {
    /// For the request.
    pub request: Vec<HeaderRule>,
    /// For the response.
    pub response: Vec<HeaderRule>,
}

/// One rule of [`HeaderToMetadata`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderRule {
    /// What is looked at.
    pub source: RuleSource,
    /// What is written where there is a value.
    pub on_present: Option<MetadataEntry>,
    /// What is written where there is none.
    pub on_missing: Option<MetadataEntry>,
    /// Takes the header off.
    pub remove: bool,
}

/// What a rule looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleSource {
    /// A header (lower case).
    Header(Arc<str>),
    /// A cookie.
    Cookie(Arc<str>),
}

/// What a rule writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataEntry {
    /// Namespace; by default the filter's name.
    pub namespace: Arc<str>,
    /// Key in it.
    pub key: Arc<str>,
    /// In place of what was found; empty takes that.
    pub value: Arc<str>,
    /// Changes what was found.
    pub rewrite: Option<RegexRewrite>,
    /// Type of the value.
    pub number: bool,
    /// What was found is Base64.
    pub base64: bool,
}

/// One entry of `envoy.extensions.filters.http.set_metadata.v3.Config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetMetadata {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Joined with what is there where that may be overwritten.
    pub value: Value,
    /// What is there is joined with it; else it stays alone.
    pub allow_overwrite: bool,
}

/// `envoy.extensions.filters.http.lua.v3.Lua`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lua {
    /// The script where a route names no other.
    pub default: Option<Arc<Script>>,
    /// Scripts that routes may name.
    pub named: BTreeMap<Arc<str>, Arc<Script>>,
    /// A part of the names of its stats.
    pub stat_prefix: Arc<str>,
    /// Changes of request headers choose the route anew. Default true.
    pub clear_route_cache: bool,
    /// What `filterContext()` gives where the route says nothing.
    pub context: Option<Arc<Value>>,
}

/// `envoy.extensions.filters.http.lua.v3.LuaPerRoute`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuaPerRoute {
    /// Which script runs.
    pub script: RouteScript,
    /// What `filterContext()` gives.
    pub context: Option<Arc<Value>>,
}

/// Which script runs on a route's streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteScript {
    /// The filter's default.
    Default,
    /// One of the filter's; none where it has no such.
    Named(Arc<str>),
    /// The route's own.
    Own(Arc<Script>),
}

/// `envoy.extensions.filters.http.stateful_session.v3.StatefulSession`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatefulSession {
    /// How the client keeps its host.
    pub state: SessionState,
    /// No other host will do.
    pub strict: bool,
    /// In `http.<prefix>.stateful_session.<this>.` of stats; without it there are none.
    pub stat_prefix: Option<Arc<str>>,
    /// The answer where the host is not there and no other will do. Default 503.
    pub status_without_host: u16,
}

/// How a client keeps its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionState {
    /// In a cookie.
    Cookie {
        /// Name.
        name: Arc<str>,
        /// Life; zero makes a session cookie.
        ttl: Duration,
        /// Path attribute; the cookie counts below it only.
        path: Arc<str>,
        /// Further attributes.
        attributes: Vec<(Arc<str>, Arc<str>)>,
    },
    /// In a header (lower case).
    Header(Arc<str>),
}

/// `envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalRateLimit {
    /// `<stat_prefix>.http_local_rate_limit.` of its stats.
    pub stat_prefix: Arc<str>,
    /// Status of its replies. Default 429.
    pub status: u16,
    /// For all requests; none where the filter does nothing by itself.
    pub bucket: Option<TokenBucket>,
    /// Share of requests that are counted. Default none.
    pub enabled: Fraction,
    /// Share of those over the limit that are refused. Default none.
    pub enforced: Fraction,
    /// For requests over the limit that are not refused.
    pub request_headers: Vec<HeaderAdd>,
    /// For replies.
    pub response_headers: Vec<HeaderAdd>,
    /// Buckets of their own for requests with these descriptors.
    pub descriptors: Vec<(Descriptor, TokenBucket)>,
    /// Which rate limits of routes make descriptors.
    pub stage: u32,
    /// In place of the route's rate limits.
    pub rate_limits: Vec<RateLimit>,
    /// Tells limit, remaining and reset in x-ratelimit headers.
    pub ratelimit_headers: bool,
    /// Tells whoever is refused with 429 when to come again.
    pub retry_after: bool,
    /// How the virtual host's rate limits count.
    pub virtual_host: VirtualHostLimits,
    /// The common bucket is used even where a descriptor's is. Default true.
    pub always_consume_default: bool,
    /// gRPC clients get RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub resource_exhausted: bool,
}

/// `VhRateLimitsOptions`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VirtualHostLimits {
    /// Where the route has none.
    #[default]
    Override,
    /// Always.
    Include,
    /// Never.
    Ignore,
}

/// `envoy.type.v3.TokenBucket`, full at first. Its tokens are the one thing of a plan that changes: all workers draw
/// from one bucket, and a plan that is replaced by an equal one keeps it.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Most tokens there can be.
    pub max: u32,
    /// Tokens that come in a second.
    rate: f64,
    /// Seconds since [`TokenBucket::start`] at which the bucket would have been empty, as bits of an `f64`.
    empty_at: Arc<AtomicU64>,
    start: Instant,
}

impl PartialEq for TokenBucket {
    fn eq(&self, other: &Self) -> bool {
        (self.max, self.rate.to_bits()) == (other.max, other.rate.to_bits())
    }
}

impl Eq for TokenBucket {}

impl TokenBucket {
    /// `per_fill` tokens come in each `interval`, evenly.
    pub fn new(max: u32, per_fill: u32, interval: Duration) -> Self {
        let rate = f64::from(per_fill) / interval.as_secs_f64();
        Self {
            max,
            rate,
            empty_at: Arc::new(AtomicU64::new((-f64::from(max) / rate).to_bits())),
            start: Instant::now(),
        }
    }

    /// Takes so many tokens, if there are as many.
    pub fn take(&self, tokens: u64) -> bool {
        self.take_at(self.start.elapsed().as_secs_f64(), tokens)
    }

    fn take_at(&self, now: f64, tokens: u64) -> bool {
        let full = now - f64::from(self.max) / self.rate;
        let tokens = tokens as f64;
        let taken = self.empty_at.fetch_update(Relaxed, Relaxed, |bits| {
            let empty_at = f64::from_bits(bits).max(full);
            let enough = (now - empty_at) * self.rate >= tokens - 1e-9;
            enough.then(|| (empty_at + tokens / self.rate).to_bits())
        });
        taken.is_ok()
    }

    /// Gives tokens back, as far as there is room for them.
    pub fn give_back(&self, tokens: u64) {
        self.give_back_at(self.start.elapsed().as_secs_f64(), tokens);
    }

    fn give_back_at(&self, now: f64, tokens: u64) {
        let full = now - f64::from(self.max) / self.rate;
        let more = tokens as f64 / self.rate;
        let given = |bits| Some((f64::from_bits(bits) - more).max(full).to_bits());
        // It never declines.
        let _ = self.empty_at.fetch_update(Relaxed, Relaxed, given);
    }

    /// Whole tokens that are left.
    pub fn remaining(&self) -> u32 {
        let now = self.start.elapsed().as_secs_f64();
        let tokens = (now - f64::from_bits(self.empty_at.load(Relaxed))) * self.rate;
        tokens.clamp(0.0, f64::from(self.max)) as u32
    }

    /// Whole seconds until there is a token.
    pub fn reset(&self) -> u64 {
        let now = self.start.elapsed().as_secs_f64();
        let missing = 1.0 - (now - f64::from_bits(self.empty_at.load(Relaxed))) * self.rate;
        (missing / self.rate).max(0.0).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_tokens_and_fills_evenly() {
        let bucket = TokenBucket::new(2, 1, Duration::from_secs(1));
        let take = |now| bucket.take_at(now, 1);
        assert!(take(0.0) && take(0.0));
        assert!(!take(0.5));
        assert!(take(1.0));
        assert!(!take(1.9));
        // Idle time fills it up to its maximum, not beyond.
        assert!(take(100.0) && take(100.0));
        assert!(!take(100.0));
    }

    #[test]
    fn tokens_are_taken_and_given_back_by_number() {
        let bucket = TokenBucket::new(5, 1, Duration::from_secs(3600));
        assert!(!bucket.take_at(0.0, 6));
        assert!(bucket.take_at(0.0, 4));
        assert!(!bucket.take_at(0.0, 2));
        assert!(bucket.take_at(0.0, 0));
        bucket.give_back_at(0.0, 1);
        assert!(bucket.take_at(0.0, 2));
        // No more than it holds.
        bucket.give_back_at(0.0, 1_000_000_000);
        assert!(bucket.take_at(0.0, 5) && !bucket.take_at(0.0, 1));
    }
}
