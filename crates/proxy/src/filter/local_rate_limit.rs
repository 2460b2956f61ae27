//! `envoy.filters.http.local_ratelimit`: token buckets of this process.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use outrigger_http::{Headers, ResponseHead};

use super::{Filter, Interests, Step};
use crate::{
    access_log::{self, format},
    http::{Exchange, Flags, LocalReply},
    plan::{
        Metadata,
        cel::Expr,
        filter_config::{LocalRateLimit, TokenBucket, VirtualHostLimits},
        format::Template,
        http_filter::RouteFilterConfig,
        rate_limit::{Descriptor, RateLimit, RateLimitContext},
        route::{Action, ClusterSpecifier},
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
        let bucket = match take(&config, default, exchange, worker) {
            Ok(bucket) => {
                stats.ok().inc();
                tell(&config, bucket, exchange);
                return Step::Continue;
            }
            Err(bucket) => bucket,
        };
        stats.rate_limited().inc();
        tell(&config, bucket, exchange);
        if !config.enforced.hits(worker.random.bits()) {
            for add in &config.request_headers {
                let value = headers::value(add, exchange, None);
                headers::add_one(add, value, &mut exchange.request.headers);
            }
            return Step::Continue;
        }
        stats.enforced().inc();
        let mut reply = LocalReply::new(config.status, "local_rate_limited", "local_rate_limited")
            .flag(Flags::RATE_LIMITED);
        let mut added = Headers::new();
        for add in &config.response_headers {
            let value = headers::value(add, exchange, Some(&added));
            headers::add_one(add, value, &mut added);
        }
        if config.retry_after && config.status == 429 && !added.contains("retry-after") {
            added.set("retry-after", bucket.reset().max(1).to_string());
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
fn tell(config: &LocalRateLimit, bucket: &TokenBucket, exchange: &mut Exchange<'_>) {
    if config.ratelimit_headers {
        exchange.filters.rate_limit = Some(RateLimitState {
            limit: bucket.max,
            remaining: bucket.remaining(),
            reset: bucket.reset(),
        });
    }
}

/// Takes a token of every bucket that the request belongs to; gives the bucket that decided.
fn take<'b>(
    config: &'b LocalRateLimit,
    default: &'b TokenBucket,
    exchange: &Exchange<'_>,
    worker: &Worker,
) -> Result<&'b TokenBucket, &'b TokenBucket> {
    let mut used = None;
    if !config.descriptors.is_empty() {
        let context = Limited { exchange, worker };
        let asked = descriptors(
            &config.rate_limits,
            config.stage,
            config.virtual_host,
            &context,
        );
        let own: HashMap<&[(Arc<str>, String)], &TokenBucket> = config
            .descriptors
            .iter()
            .map(|(descriptor, bucket)| (&*descriptor.entries, bucket))
            .collect();
        for descriptor in &asked {
            if let Some(bucket) = own.get(&*descriptor.entries) {
                if !bucket.take() {
                    return Err(bucket);
                }
                used = Some(*bucket);
            }
        }
    }
    if used.is_some() && !config.always_consume_default {
        return Ok(used.unwrap_or(default));
    }
    match default.take() {
        true => Ok(used.unwrap_or(default)),
        false => Err(default),
    }
}

/// The descriptors of a request, by the filter's rate limits or else by its route's.
fn descriptors(
    own: &[RateLimit],
    stage: u32,
    virtual_host: VirtualHostLimits,
    context: &Limited<'_, '_>,
) -> Vec<Descriptor> {
    let exchange = context.exchange;
    let describe = |limits: &[RateLimit]| -> Vec<Descriptor> {
        limits
            .iter()
            .filter(|limit| limit.stage == stage && !limit.apply_on_stream_done)
            .filter_map(|limit| limit.descriptor(exchange, context))
            .collect()
    };
    if !own.is_empty() {
        return describe(own);
    }
    let Some((host, route)) = exchange.route.get() else {
        return Vec::new();
    };
    let (of_route, include) = match &route.action {
        Action::Route(action) => (&*action.rate_limits, action.include_vh_rate_limits),
        _ => (&[][..], false),
    };
    let with_host = include
        || match virtual_host {
            VirtualHostLimits::Override => of_route.is_empty(),
            VirtualHostLimits::Include => true,
            VirtualHostLimits::Ignore => false,
        };
    let mut all = describe(of_route);
    if with_host {
        all.extend(describe(&host.rate_limits));
    }
    all
}

/// A request whose rate is limited.
struct Limited<'e, 'c> {
    exchange: &'e Exchange<'c>,
    worker: &'e Worker,
}

impl RateLimitContext for Limited<'_, '_> {
    fn service_cluster(&self) -> &str {
        &self.worker.bootstrap.node.cluster
    }

    fn route_cluster(&self) -> Option<&str> {
        match &self.exchange.route.action()?.cluster {
            ClusterSpecifier::Cluster(name) => Some(name),
            ClusterSpecifier::Header(name) => self.exchange.request.get_str(name),
            ClusterSpecifier::Weighted(_) => None,
        }
    }

    fn client(&self) -> Option<IpAddr> {
        self.exchange.client
    }

    fn route_metadata(&self) -> Option<&Metadata> {
        Some(&self.exchange.route.route()?.metadata)
    }

    fn format(&self, template: &Template) -> String {
        let mut out = Vec::new();
        format::header_value(template, self.exchange, None, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    fn expression(&self, expression: &Expr) -> Option<String> {
        access_log::expression(expression, self.exchange)
    }
}
