//! `envoy.filters.http.local_ratelimit`: token buckets of this process.

use std::{collections::HashMap, sync::Arc};

use outrigger_http::{Headers, ResponseHead};

use super::{
    Filter, Interests, Step,
    limited::{Limited, limits},
};
use crate::{
    http::{Exchange, Flags, LocalReply},
    plan::{
        filter_config::{LocalRateLimit, TokenBucket},
        http_filter::RouteFilterConfig,
    },
    router::headers,
    worker::Worker,
};

stats::group! {
    /// `<stat_prefix>.http_local_rate_limit.`
    struct LocalRateLimitStats {
        counter enabled,
        counter enforced,
        counter ok,
        counter rate_limited,
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct LocalRateLimitFilter {
    config: Arc<LocalRateLimit>,
}

/// What the bucket of a request held, for its x-ratelimit headers.
#[derive(Debug)]
pub(crate) struct RateLimitState {
    limit: u32,
    remaining: u32,
    reset: u64,
}

impl LocalRateLimitFilter {
    pub(super) fn new(config: Arc<LocalRateLimit>) -> Self {
        Self { config }
    }
}

impl Filter for LocalRateLimitFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let config = match config {
            Some(RouteFilterConfig::LocalRateLimit(config)) => config.clone(),
            _ => self.config.clone(),
        };
        let Some(default) = &config.bucket else {
            return Step::Continue;
        };
        if !config.enabled.hits(worker.random.bits()) {
            return Step::Continue;
        }
        let prefix = format!("{}.http_local_rate_limit.", config.stat_prefix);
        let stats = LocalRateLimitStats::new(worker.stats.scope(&prefix));
        stats.enabled().inc();
        let used = match take(&config, default, exchange, worker) {
            Ok(used) => {
                stats.ok().inc();
                tell(&config, &used, exchange);
                return Step::Continue;
            }
            Err(used) => used,
        };
        stats.rate_limited().inc();
        tell(&config, &used, exchange);
        if !config.enforced.hits(worker.random.bits()) {
            headers::add_to_request(&config.request_headers, exchange);
            return Step::Continue;
        }
        stats.enforced().inc();
        let mut reply = LocalReply::new(config.status, "local_rate_limited", "local_rate_limited")
            .flag(Flags::RATE_LIMITED);
        let mut added = Headers::new();
        headers::add(&config.response_headers, exchange, &mut added);
        if config.retry_after && config.status == 429 && !added.contains("retry-after") {
            added.set("retry-after", used.bucket.reset().max(1).to_string());
        }
        for (name, value) in added.iter() {
            reply = reply.header(name, value);
        }
        if config.resource_exhausted {
            reply.grpc_status = Some(8);
        }
        Step::Reply(reply)
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        let Some(state) = &exchange.filters.rate_limit else {
            return;
        };
        for (name, value) in [
            ("x-ratelimit-limit", u64::from(state.limit)),
            ("x-ratelimit-remaining", state.remaining.into()),
            ("x-ratelimit-reset", state.reset),
        ] {
            response
                .headers
                .set(name, itoa::Buffer::new().format(value));
        }
    }
}

/// Keeps what the response tells about the bucket.
fn tell(config: &LocalRateLimit, used: &Used<'_>, exchange: &mut Exchange<'_>) {
    if used.ratelimit_headers.unwrap_or(config.ratelimit_headers) {
        let bucket = used.bucket;
        exchange.filters.rate_limit = Some(RateLimitState {
            limit: bucket.max,
            remaining: bucket.remaining(),
            reset: bucket.reset(),
        });
    }
}

/// The bucket that decided about a request.
struct Used<'b> {
    bucket: &'b TokenBucket,
    /// Whether headers tell of it; `None` as the filter says.
    ratelimit_headers: Option<bool>,
}

/// Takes the tokens of every bucket that the request belongs to; gives the bucket that decided.
fn take<'b>(
    config: &'b LocalRateLimit,
    default: &'b TokenBucket,
    exchange: &Exchange<'_>,
    worker: &Worker,
) -> Result<Used<'b>, Used<'b>> {
    let mut used = None;
    if !config.descriptors.is_empty() {
        let route = &exchange.route;
        let limits = limits(
            &config.rate_limits,
            config.stage,
            config.virtual_host,
            route,
        );
        let context = Limited {
            exchange,
            route,
            worker,
        };
        let asked = context.descriptors(limits, false);
        let own: HashMap<&[(Arc<str>, String)], &TokenBucket> = config
            .descriptors
            .iter()
            .map(|(descriptor, bucket)| (&*descriptor.entries, bucket))
            .collect();
        for descriptor in &asked {
            if let Some(bucket) = own.get(&*descriptor.entries) {
                let this = Used {
                    bucket,
                    ratelimit_headers: descriptor.ratelimit_headers,
                };
                let hits = descriptor.hits_addend.unwrap_or(1);
                if descriptor.negative_hits {
                    bucket.give_back(hits);
                } else if !bucket.take(hits) {
                    return Err(this);
                }
                used = Some(this);
            }
        }
    }
    let or_default = |used: Option<Used<'b>>| {
        used.unwrap_or(Used {
            bucket: default,
            ratelimit_headers: None,
        })
    };
    if used.is_some() && !config.always_consume_default {
        return Ok(or_default(used));
    }
    match default.take(1) {
        true => Ok(or_default(used)),
        false => Err(or_default(None)),
    }
}
