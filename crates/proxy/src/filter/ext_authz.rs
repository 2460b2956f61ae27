//! `envoy.filters.http.ext_authz`: asks a service whether a request may pass, and does what it says.
//!
//! Over gRPC the question is `CheckRequest`; over HTTP it is the request itself, without most of its headers. What the
//! service answers is a [`Verdict`]; its header names and values are checked like those of any stranger.

mod http_service;
mod question;

pub(crate) use question::labels;

use std::sync::Arc;

use bytes::Bytes;
use outrigger_http::{Headers, ResponseHead};
use serde_json::Value;

use super::{Answer, Filter, Interests, Step};
use crate::{
    cluster::Cluster,
    http::{Exchange, Flags, LocalReply},
    plan::{
        ext_authz::{BodySettings, ExtAuthz},
        header::AppendAction,
        http_filter::RouteFilterConfig,
    },
    router,
    worker::Worker,
};

/// Namespace of the metadata, and name of the filter.
const NAMESPACE: &str = "envoy.filters.http.ext_authz";

stats::group! {
    /// `http.<prefix>.ext_authz.<stat_prefix>.`
    struct ExtAuthzStats {
        counter ok,
        counter denied,
        counter error,
        counter invalid,
        counter disabled,
        counter failure_mode_allowed,
    }
}

/// What a service has decided.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) decision: Decision,
    /// Changes of the request's headers.
    pub(crate) request: Vec<Mutation>,
    /// Headers that it loses.
    pub(crate) remove: Vec<String>,
    /// Changes of the response's headers.
    pub(crate) response: Vec<Mutation>,
    pub(crate) query_set: Vec<(String, String)>,
    pub(crate) query_remove: Vec<String>,
    /// For later filters and logs.
    pub(crate) metadata: Option<Value>,
}

/// Whether a request may pass.
#[derive(Debug, Default)]
pub(crate) enum Decision {
    #[default]
    Pass,
    /// With this answer.
    Deny {
        status: u16,
        headers: Vec<Mutation>,
        body: Bytes,
    },
    /// There is no decision.
    Error {
        status: Option<u16>,
        headers: Vec<Mutation>,
        body: Bytes,
    },
}

impl Decision {
    /// Nothing was decided, and the service said nothing about what to answer.
    pub(crate) const NONE: Self = Self::Error {
        status: None,
        headers: Vec::new(),
        body: Bytes::new(),
    };
}

/// A change of one header.
#[derive(Debug)]
pub(crate) struct Mutation {
    /// Lower case.
    pub(crate) name: String,
    pub(crate) value: Vec<u8>,
    pub(crate) action: AppendAction,
}

impl Mutation {
    fn is_legal(&self) -> bool {
        is_legal(&self.name, &self.value)
    }

    fn apply(&self, headers: &mut Headers) {
        let there = headers.contains(&self.name);
        match self.action {
            AppendAction::AppendIfExistsOrAdd => headers.append(&self.name, &self.value),
            AppendAction::AddIfAbsent if there => {}
            AppendAction::OverwriteIfExists if !there => {}
            _ => headers.set(&self.name, &self.value),
        }
    }
}

/// Whether a header can stand in a head, and does not change what the head is about. The name is in lower case.
pub(super) fn is_legal(name: &str, value: &[u8]) -> bool {
    let of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let of_value = |&byte: &u8| byte >= b' ' && byte != 0x7f || byte == b'\t';
    !name.is_empty()
        && name.bytes().all(of_name)
        && value.iter().all(of_value)
        && !FRAMING.contains(&name)
}

/// Headers that say where a message ends and where it goes.
const FRAMING: [&str; 5] = [
    "content-length",
    "transfer-encoding",
    "connection",
    "upgrade",
    "host",
];

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct ExtAuthzFilter {
    name: Arc<str>,
    plan: Arc<ExtAuthz>,
    stats: ExtAuthzStats,
}

impl ExtAuthzFilter {
    pub(super) fn new(name: Arc<str>, plan: Arc<ExtAuthz>, prefix: &str, worker: &Worker) -> Self {
        let own = match &*plan.stat_prefix {
            "" => String::new(),
            name => format!("{name}."),
        };
        let scope = format!("http.{prefix}.ext_authz.{own}");
        Self {
            name,
            plan,
            stats: ExtAuthzStats::new(worker.stats.scope(&scope)),
        }
    }

    /// Whether the service is asked about this request.
    fn asks(&self, exchange: &Exchange<'_>, worker: &Worker) -> bool {
        if !self.plan.enabled.hits(worker.random.bits()) {
            return false;
        }
        self.plan.enabled_metadata.as_ref().is_none_or(|matcher| {
            let root = exchange.dynamic_metadata.get(&*matcher.filter);
            let value = root.and_then(|root| {
                matcher
                    .path
                    .iter()
                    .try_fold(root, |value, key| value.get(&**key))
            });
            matcher.matches(value)
        })
    }

    fn body(&self, config: Option<&RouteFilterConfig>) -> Option<BodySettings> {
        match config {
            Some(RouteFilterConfig::ExtAuthz(own)) if own.disable_request_body_buffering => None,
            Some(RouteFilterConfig::ExtAuthz(own)) => {
                own.with_request_body.or(self.plan.with_request_body)
            }
            _ => self.plan.with_request_body,
        }
    }

    /// What is counted for the cluster that the route leads to, too.
    fn count_cluster(
        &self,
        exchange: &Exchange<'_>,
        what: &str,
        status: Option<u16>,
        worker: &Worker,
    ) {
        let Some(cluster) = cluster(exchange, worker) else {
            return;
        };
        let scope = cluster.stats().scope();
        scope.counter(&format!("ext_authz.{what}")).inc();
        if let Some(status) = status.filter(|_| self.plan.charge_cluster_response_stats) {
            cluster.count_response(status, true);
        }
    }

    /// The service could not be asked, or did not know.
    fn undecided(
        &self,
        exchange: &mut Exchange<'_>,
        reply: (Option<u16>, Vec<Mutation>, Bytes),
        worker: &Worker,
    ) -> Step {
        self.stats.error().inc();
        self.count_cluster(exchange, "error", None, worker);
        if self.plan.failure_mode_allow {
            self.stats.failure_mode_allowed().inc();
            self.count_cluster(exchange, "failure_mode_allowed", None, worker);
            if self.plan.failure_mode_allow_header_add {
                let headers = &mut exchange.request.headers;
                headers.set("x-envoy-auth-failure-mode-allowed", "true");
            }
            return Step::Continue;
        }
        let (status, headers, body) = reply;
        let status = status.unwrap_or(self.plan.status_on_error);
        self.answer(status, headers, body, "ext_authz_error")
    }

    /// A refusal with what the service says of it.
    fn answer(
        &self,
        status: u16,
        headers: Vec<Mutation>,
        mut body: Bytes,
        why: &'static str,
    ) -> Step {
        if !headers.iter().all(Mutation::is_legal) {
            return self.invalid();
        }
        match self.plan.max_denied_response_body_bytes as usize {
            0 => {}
            most => body.truncate(most),
        }
        let mut reply = LocalReply::new(status, "", why)
            .flag(Flags::UNAUTHORIZED_EXTERNAL)
            .body(body);
        // The first of a name stands in place of what we would say, more of them beside it (`set-cookie`).
        headers.iter().for_each(|m| match m.action {
            AppendAction::OverwriteIfExistsOrAdd => reply.headers.append(&m.name, &m.value),
            _ => m.apply(&mut reply.headers),
        });
        Step::Reply(reply)
    }

    /// The service wants what no head may hold.
    fn invalid(&self) -> Step {
        self.stats.invalid().inc();
        let reply = LocalReply::new(500, "", "ext_authz_invalid");
        Step::Reply(reply.flag(Flags::UNAUTHORIZED_EXTERNAL))
    }

    fn pass(&self, exchange: &mut Exchange<'_>, verdict: Verdict, worker: &Worker) -> Step {
        let all = verdict.request.iter().chain(&verdict.response);
        let query = |text: &str| {
            text.bytes()
                .all(|b| b.is_ascii_graphic() && !b"#&".contains(&b))
        };
        let mut queries = verdict.query_set.iter();
        if !all.into_iter().all(Mutation::is_legal)
            || !queries.all(|(key, value)| query(key) && query(value))
        {
            return self.invalid();
        }
        let changes = !verdict.request.is_empty()
            || !verdict.remove.is_empty()
            || !verdict.query_set.is_empty()
            || !verdict.query_remove.is_empty();
        exchange.clear_route |= changes && self.plan.clear_route_cache;
        let headers = &mut exchange.request.headers;
        verdict.request.iter().for_each(|m| m.apply(headers));
        for name in &verdict.remove {
            let framing = FRAMING.iter().any(|own| name.eq_ignore_ascii_case(own));
            if !name.starts_with(':') && !framing {
                headers.remove(name);
            }
        }
        question::change_query(
            &mut exchange.request,
            &verdict.query_set,
            &verdict.query_remove,
        );
        if !verdict.response.is_empty() {
            exchange.filters.authorized = Some(verdict.response);
        }
        self.stats.ok().inc();
        self.count_cluster(exchange, "ok", None, worker);
        Step::Continue
    }
}

impl Filter for ExtAuthzFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        // Where it leads nowhere nobody needs to be asked.
        if exchange.route.route().is_none() {
            return Step::Continue;
        }
        if !self.asks(exchange, worker) {
            self.stats.disabled().inc();
            return match self.plan.deny_at_disable {
                false => Step::Continue,
                true => self.answer(
                    self.plan.status_on_error,
                    Vec::new(),
                    Bytes::new(),
                    "ext_authz_error",
                ),
            };
        }
        match self.body(config) {
            Some(body) if question::has_body(exchange) => Step::Body {
                limit: body.max_request_bytes,
                partial: body.allow_partial_message,
            },
            _ => self.ask(exchange, None, worker),
        }
    }

    fn buffered(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
        body: Bytes,
        complete: bool,
    ) -> Step {
        let settings = self.body(config);
        self.ask(
            exchange,
            settings.map(|settings| (settings, body, complete)),
            worker,
        )
    }

    fn answered(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        worker: &Worker,
        answer: Answer,
    ) -> Step {
        let Answer::Authorization(verdict) = answer else {
            return self.undecided(exchange, (None, Vec::new(), Bytes::new()), worker);
        };
        let mut verdict = *verdict;
        if let Some(noted) = verdict.metadata.take()
            && self.plan.dynamic_metadata
        {
            exchange
                .dynamic_metadata
                .insert(NAMESPACE.to_owned(), noted);
        }
        match std::mem::take(&mut verdict.decision) {
            Decision::Pass => self.pass(exchange, verdict, worker),
            Decision::Deny {
                status,
                headers,
                body,
            } => {
                self.stats.denied().inc();
                self.count_cluster(exchange, "denied", Some(status), worker);
                self.answer(status, headers, body, "ext_authz_denied")
            }
            Decision::Error {
                status,
                headers,
                body,
            } => self.undecided(exchange, (status, headers, body), worker),
        }
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        for mutation in exchange.filters.authorized.iter().flatten() {
            mutation.apply(&mut response.headers);
        }
    }
}

/// The cluster that the route names, where it names one.
fn cluster(exchange: &Exchange<'_>, worker: &Worker) -> Option<std::rc::Rc<Cluster>> {
    let name = router::route_cluster(&exchange.route, &exchange.request)?;
    worker.clusters.find(name)
}
