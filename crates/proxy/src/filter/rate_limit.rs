//! `envoy.filters.http.ratelimit`: asks a rate limit service whether a request is over a limit.
//!
//! The rate limits of its route make descriptors of the request; a request that has none is not asked about. What the
//! service answers is a [`Verdict`]; its headers are checked like those of any stranger.

mod headers;

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use outrigger_http::{Headers, ResponseHead};
use serde_json::Value;

use super::{
    Answer, Filter, Interests, Pending, Step,
    limited::{Limited, limits},
};
use crate::{
    cluster::Cluster,
    grpc::rate_limit::Question,
    http::{Exchange, Flags, LocalReply, RouteRef},
    plan::{
        filter_state::ObjectKind,
        http_filter::RouteFilterConfig,
        rate_limit::{Descriptor, RateLimit},
        rate_limit_service::{RateLimitFilter as Plan, RateLimitRoute},
    },
    router,
    worker::Worker,
};

/// What a service has decided.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// One of the limits is reached.
    pub(crate) over: bool,
    /// What there is to say of each descriptor, in their order.
    pub(crate) statuses: Vec<LimitStatus>,
    /// For the response; lower case.
    pub(crate) response: Vec<(String, Vec<u8>)>,
    /// For the request; lower case.
    pub(crate) request: Vec<(String, Vec<u8>)>,
    /// Of a refusal.
    pub(crate) body: Bytes,
    /// For later filters and logs.
    pub(crate) metadata: Option<Value>,
}

/// What the service says of a descriptor.
#[derive(Debug)]
pub(crate) struct LimitStatus {
    /// Its limit is reached.
    pub(crate) over: bool,
    /// Requests that are left in this window.
    pub(crate) remaining: u32,
    /// Whole seconds until the next.
    pub(crate) reset: u64,
    /// Requests, seconds of the window (0: not known), and name.
    pub(crate) limit: Option<(u32, u64, String)>,
}

/// What filters of this kind remember of a request, each under its position.
#[derive(Debug, Default)]
pub(crate) struct RateLimits {
    /// A question is open: whether headers tell of each descriptor.
    asked: Vec<(usize, Vec<Option<bool>>)>,
    /// For the response.
    response: Vec<(String, Vec<u8>)>,
    /// There are rate limits to ask for at the request's end, by this route.
    at_end: Vec<(usize, RouteRef)>,
}

impl RateLimits {
    /// What is left to do at the request's end.
    pub(super) fn due(self) -> Option<Self> {
        let at_end = self.at_end;
        (!at_end.is_empty()).then(|| Self {
            at_end,
            ..Self::default()
        })
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct RateLimitFilter {
    /// Routes know it by this.
    name: Arc<str>,
    position: usize,
    plan: Arc<Plan>,
    names: Names,
}

/// Names of its stats, in those of the route's cluster.
#[derive(Debug)]
struct Names {
    ok: String,
    error: String,
    over_limit: String,
    failure_mode_allowed: String,
}

impl Names {
    fn new(prefix: &str) -> Self {
        let name = |what: &str| match prefix {
            "" => format!("ratelimit.{what}"),
            prefix => format!("ratelimit.{prefix}.{what}"),
        };
        Self {
            ok: name("ok"),
            error: name("error"),
            over_limit: name("over_limit"),
            failure_mode_allowed: name("failure_mode_allowed"),
        }
    }
}

impl RateLimitFilter {
    pub(super) fn new(name: Arc<str>, position: usize, plan: Arc<Plan>) -> Self {
        let names = Names::new(&plan.stat_prefix);
        Self {
            name,
            position,
            plan,
            names,
        }
    }

    /// The descriptors that it asks for now, or at the request's end.
    fn descriptors(
        &self,
        exchange: &Exchange<'_>,
        route: &RouteRef,
        config: Option<&RateLimitRoute>,
        at_end: bool,
        worker: &Worker,
    ) -> Vec<Descriptor> {
        let limited = Limited {
            exchange,
            route,
            worker,
        };
        limited.descriptors(self.limits(route, config), at_end)
    }

    fn limits<'l>(
        &'l self,
        route: &'l RouteRef,
        config: Option<&'l RateLimitRoute>,
    ) -> impl Iterator<Item = &'l RateLimit> {
        let own = match config {
            Some(config) if !config.rate_limits.is_empty() => &*config.rate_limits,
            _ => &*self.plan.rate_limits,
        };
        let virtual_host = config.map(|config| config.virtual_host);
        limits(
            own,
            self.plan.stage,
            virtual_host.unwrap_or_default(),
            route,
        )
    }

    fn question(
        &self,
        exchange: &Exchange<'_>,
        config: Option<&RateLimitRoute>,
        descriptors: Vec<Descriptor>,
    ) -> Question {
        let domain = config.and_then(|config| config.domain.as_deref());
        let hits = exchange
            .well_known(ObjectKind::HitsAddend)
            .and_then(|hits| u32::try_from(hits.as_u64()?).ok());
        Question::new(
            domain.unwrap_or(&self.plan.domain),
            descriptors,
            hits.unwrap_or(0),
        )
    }

    /// Asks; the answer is none where the service could not be asked.
    fn ask(&self, question: Question, worker: &Worker) -> Pending {
        let plan = self.plan.clone();
        let weak = worker.weak();
        Box::pin(async move {
            // A worker that has ended waits for nothing.
            let Some(worker) = weak.upgrade() else {
                return Answer::RateLimit(None);
            };
            let asked = question.ask(&worker, &plan.service).await;
            let verdict = asked.inspect_err(|error| {
                let cluster = &*plan.service.cluster;
                tracing::debug!(cluster, %error, "a rate limit service could not be asked");
            });
            Answer::RateLimit(verdict.ok().map(Box::new))
        })
    }

    /// Keeps in mind what is to be asked at the request's end.
    fn remember_end(&self, exchange: &mut Exchange<'_>, config: Option<&RateLimitRoute>) {
        let mut limits = self.limits(&exchange.route, config);
        if limits.any(|limit| limit.apply_on_stream_done) {
            drop(limits);
            let route = exchange.route.clone();
            let kept = exchange.filters.rate_limits.get_or_insert_default();
            kept.at_end.push((self.position, route));
        }
    }

    /// The service could not be asked, or did not answer.
    fn failed(&self, exchange: &Exchange<'_>, worker: &Worker) -> Step {
        self.count(exchange, &self.names.error, worker);
        if !self.plan.failure_deny.hits(worker.random.bits()) {
            self.count(exchange, &self.names.failure_mode_allowed, worker);
            return Step::Continue;
        }
        let reply = LocalReply::new(self.plan.status_on_error, "", "rate_limiter_error");
        Step::Reply(reply.flag(Flags::RATELIMIT_SERVICE_ERROR))
    }

    /// A request over the limit.
    fn refuse(&self, exchange: &Exchange<'_>, verdict: &Verdict, added: Headers) -> LocalReply {
        let mut added = added;
        router::headers::add(&self.plan.response_headers, exchange, &mut added);
        if self.plan.retry_after
            && self.plan.status == 429
            && let Some(seconds) = headers::retry_after(&verdict.statuses)
        {
            added.set_if_absent("retry-after", seconds.to_string());
        }
        let mut reply = LocalReply::new(self.plan.status, "", "request_rate_limited")
            .flag(Flags::RATE_LIMITED)
            .body(verdict.body.clone());
        reply.headers = added;
        if self.plan.resource_exhausted {
            reply.grpc_status = Some(RESOURCE_EXHAUSTED);
        }
        reply
    }

    fn count(&self, exchange: &Exchange<'_>, name: &str, worker: &Worker) {
        if let Some(cluster) = cluster(exchange, worker) {
            cluster.stats().scope().counter(name).inc();
        }
    }
}

impl Filter for RateLimitFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
            .and(Interests::RESPONSE)
            .and(Interests::COMPLETE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        if !self.plan.enabled.hits(worker.random.bits())
            || !self.plan.requests.has(exchange.internal)
            // Where it leads nowhere nothing needs to be limited.
            || cluster(exchange, worker).is_none()
        {
            return Step::Continue;
        }
        let config = per_route(config);
        let descriptors = self.descriptors(exchange, &exchange.route, config, false, worker);
        if descriptors.is_empty() {
            self.remember_end(exchange, config);
            return Step::Continue;
        }
        let told: Vec<_> = descriptors.iter().map(|d| d.ratelimit_headers).collect();
        let question = self.question(exchange, config, descriptors);
        let kept = exchange.filters.rate_limits.get_or_insert_default();
        kept.asked.push((self.position, told));
        Step::Ask(self.ask(question, worker))
    }

    fn answered(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
        answer: Answer,
    ) -> Step {
        self.remember_end(exchange, per_route(config));
        let kept = exchange.filters.rate_limits.get_or_insert_default();
        let mut asked = kept.asked.extract_if(.., |(own, _)| *own == self.position);
        let told = asked.next().map(|(_, told)| told).unwrap_or_default();
        drop(asked);
        let Answer::RateLimit(Some(verdict)) = answer else {
            return self.failed(exchange, worker);
        };
        let mut verdict = *verdict;
        if let Some(noted) = verdict.metadata.take() {
            merge(exchange, &self.plan.metadata_namespace, noted);
        }
        let mut added = headers::legal(std::mem::take(&mut verdict.response));
        if verdict.over {
            self.count(exchange, &self.names.over_limit, worker);
            if let Some(cluster) = cluster(exchange, worker) {
                cluster.count_response(self.plan.status, true);
            }
            if self.plan.ratelimited_header {
                added.set("x-envoy-ratelimited", "true");
            }
        } else {
            self.count(exchange, &self.names.ok, worker);
        }
        let default = self.plan.ratelimit_headers;
        headers::describe(&verdict.statuses, &told, default, &mut added);
        if verdict.over && self.plan.enforced.hits(worker.random.bits()) {
            return Step::Reply(self.refuse(exchange, &verdict, added));
        }
        let request = headers::legal(std::mem::take(&mut verdict.request));
        for (name, value) in request.iter() {
            exchange.request.headers.append(name, value);
        }
        let kept = exchange.filters.rate_limits.get_or_insert_default();
        let added = added.iter();
        kept.response
            .extend(added.map(|(name, value)| (name.to_owned(), value.to_vec())));
        Step::Continue
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        if let Some(kept) = &mut exchange.filters.rate_limits {
            // The first of several filters adds what all of them have.
            for (name, value) in kept.response.drain(..) {
                response.headers.append(&name, value);
            }
        }
    }

    fn complete(&self, exchange: &mut Exchange<'_>, worker: &Worker) {
        let Some(kept) = &mut exchange.filters.rate_limits else {
            return;
        };
        let at_end: Vec<_> = kept
            .at_end
            .extract_if(.., |(own, _)| *own == self.position)
            .collect();
        for (_, route) in at_end {
            let config = super::route_config(&route, &self.name);
            let config = per_route(config);
            let descriptors = self.descriptors(exchange, &route, config, true, worker);
            if descriptors.is_empty() {
                continue;
            }
            let question = self.question(exchange, config, descriptors);
            let asked = self.ask(question, worker);
            // Nobody waits for the answer.
            tokio::task::spawn_local(async move { drop(asked.await) });
        }
    }
}

/// What the route says.
fn per_route(config: Option<&RouteFilterConfig>) -> Option<&RateLimitRoute> {
    match config {
        Some(RouteFilterConfig::RateLimit(config)) => Some(config),
        _ => None,
    }
}

/// The cluster that the request's route leads to, where there is one.
fn cluster(exchange: &Exchange<'_>, worker: &Worker) -> Option<Rc<Cluster>> {
    let name = router::route_cluster(&exchange.route, &exchange.request)?;
    worker.clusters.find(name)
}

/// Joins metadata with what a namespace has.
fn merge(exchange: &mut Exchange<'_>, namespace: &str, noted: Value) {
    match (exchange.dynamic_metadata.get_mut(namespace), noted) {
        (Some(Value::Object(known)), Value::Object(more)) => known.extend(more),
        (_, noted) => {
            exchange
                .dynamic_metadata
                .insert(namespace.to_owned(), noted);
        }
    }
}

/// gRPC status.
const RESOURCE_EXHAUSTED: u32 = 8;
