//! `envoy.filters.http.jwt_authn`: tokens that are there must be good, and some have to be.
//!
//! What a request needs is decided in one go ([`verify`]); before that, keys that are missing are fetched
//! ([`keys`]). The client learns what is wrong with its token and nothing of the configuration.

mod extract;
mod keys;
mod verify;

use std::{collections::VecDeque, rc::Rc, sync::Arc};

use foldhash::HashMap;
use outrigger_http::Method;
use tls::jwt::{Refusal, Token};

use super::{Answer, Filter, Interests, Step};
use crate::{
    http::{Exchange, LocalReply},
    plan::{
        http_filter::RouteFilterConfig,
        jwt_authn::{JwtAuthn, JwtProvider, Requirement},
    },
    worker::Worker,
};
use keys::Keys;

stats::group! {
    /// `http.<prefix>.jwt_authn.<stat_prefix>`
    pub(super) struct JwtStats {
        counter allowed,
        counter cors_preflight_bypassed,
        counter denied,
        counter jwks_fetch_success,
        counter jwks_fetch_failed,
        counter jwt_cache_hit,
        counter jwt_cache_miss,
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct JwtAuthnFilter {
    plan: Arc<JwtAuthn>,
    providers: Vec<Provider>,
    stats: Rc<JwtStats>,
}

/// A provider as one worker knows it.
#[derive(Debug)]
struct Provider {
    plan: Arc<JwtProvider>,
    keys: Keys,
    cache: std::cell::RefCell<TokenCache>,
}

/// Tokens whose signature was good, by their text. Only such get in, so nobody fills it who cannot sign.
#[derive(Debug, Default)]
struct TokenCache {
    tokens: HashMap<Box<str>, Rc<Token>>,
    /// In the order in which they came; the first goes when there is no room.
    order: VecDeque<Box<str>>,
    /// Which keys they were judged by.
    generation: u64,
}

impl TokenCache {
    fn find(&self, text: &str, generation: u64) -> Option<Rc<Token>> {
        let known = self.generation == generation;
        self.tokens.get(text).filter(|_| known).cloned()
    }

    fn insert(&mut self, text: &str, token: &Rc<Token>, plan: &JwtProvider, generation: u64) {
        if self.generation != generation {
            // Keys may have been withdrawn.
            *self = Self {
                generation,
                ..Self::default()
            };
        }
        if text.len() > plan.cache_max_token || self.tokens.contains_key(text) {
            return;
        }
        while self.tokens.len() >= plan.cache_size
            && let Some(oldest) = self.order.pop_front()
        {
            self.tokens.remove(&oldest);
        }
        self.order.push_back(text.into());
        self.tokens.insert(text.into(), token.clone());
    }
}

impl JwtAuthnFilter {
    pub(super) fn new(plan: Arc<JwtAuthn>, prefix: &str, worker: &Worker) -> Self {
        let scope = format!("http.{prefix}.jwt_authn.{}", plan.stat_prefix);
        let stats = Rc::new(JwtStats::new(worker.stats.scope(&scope)));
        let provider = |plan: &Arc<JwtProvider>| Provider {
            plan: plan.clone(),
            keys: Keys::new(plan),
            cache: Default::default(),
        };
        Self {
            providers: plan.providers.iter().map(provider).collect(),
            plan,
            stats,
        }
    }

    /// What this request needs.
    fn needed(
        &self,
        exchange: &Exchange<'_>,
        config: Option<&RouteFilterConfig>,
    ) -> Result<Option<&Requirement>, LocalReply> {
        if let Some(RouteFilterConfig::JwtRequirement(name)) = config {
            let mut map = self.plan.requirement_map.iter();
            let found = map.find(|(key, _)| key == name);
            return match found {
                Some((_, requirement)) => Ok(Some(requirement)),
                None => Err(self.unknown(name)),
            };
        }
        let path = exchange.request.path_only().as_bytes();
        let mut rules = self.plan.rules.iter();
        let rule = rules.find(|(matches, _)| matches.fits(path, exchange, exchange.random));
        Ok(rule.and_then(|(_, needed)| needed.as_ref()))
    }

    /// The route names a requirement that is not there.
    fn unknown(&self, name: &str) -> LocalReply {
        self.stats.denied().inc();
        let why = format!("Wrong requirement_name: {name}. It should be one of requirement_map");
        let details = format!("jwt_authn_access_denied{{{}}}", why.replace(' ', "_"));
        let reply = LocalReply::new(403, "", details);
        match self.plan.strip_failure_response {
            true => reply,
            false => reply.body(format!("Failed JWT authentication: {why}")),
        }
    }

    /// Decides, once all keys are there that can be had.
    fn decide(&self, exchange: &mut Exchange<'_>, needed: &Requirement, worker: &Worker) -> Step {
        let uri = original_uri(exchange);
        match self.verify(exchange, needed, worker) {
            Ok(()) => {
                self.stats.allowed().inc();
                Step::Continue
            }
            Err(refusal) => Step::Reply(self.refuse(refusal, uri)),
        }
    }

    fn refuse(&self, refusal: Refusal, uri: String) -> LocalReply {
        self.stats.denied().inc();
        let status = match refusal {
            Refusal::WrongAudience => 403,
            _ => 401,
        };
        let text = refusal.to_string();
        let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
        let reply = LocalReply::new(status, "", details);
        if self.plan.strip_failure_response {
            return reply;
        }
        let error = match refusal {
            Refusal::Missing => "",
            _ => ", error=\"invalid_token\"",
        };
        reply
            .body(text)
            .header("www-authenticate", format!("Bearer realm=\"{uri}\"{error}"))
    }
}

impl Filter for JwtAuthnFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        if self.plan.bypass_cors_preflight && is_preflight(exchange) {
            self.stats.cors_preflight_bypassed().inc();
            self.stats.allowed().inc();
            return Step::Continue;
        }
        // What this filter writes, nobody else may have written.
        for provider in &self.plan.providers {
            let headers = &mut exchange.request.headers;
            if let Some(name) = &provider.forward_payload_header {
                headers.remove(name);
            }
            for (name, _) in &provider.claim_to_headers {
                headers.remove(name);
            }
        }
        let needed = match self.needed(exchange, config) {
            Ok(Some(needed)) => needed,
            Ok(None) => {
                self.stats.allowed().inc();
                return Step::Continue;
            }
            Err(reply) => return Step::Reply(reply),
        };
        match self.missing_keys(exchange, needed, worker) {
            Some(fetched) => Step::Ask(fetched),
            None => self.decide(exchange, needed, worker),
        }
    }

    fn answered(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
        _: Answer,
    ) -> Step {
        match self.needed(exchange, config) {
            Ok(Some(needed)) => self.decide(exchange, needed, worker),
            Ok(None) => Step::Continue,
            Err(reply) => Step::Reply(reply),
        }
    }
}

/// What browsers ask before a request from another origin.
fn is_preflight(exchange: &Exchange<'_>) -> bool {
    let some = |name| {
        let value = exchange.request.headers.get(name);
        value.is_some_and(|value| !value.is_empty())
    };
    exchange.request.method == Method::Options
        && some("origin")
        && some("access-control-request-method")
}

/// What the client asked for, for its realm; cut off after 256 bytes of path, as in Envoy.
fn original_uri(exchange: &Exchange<'_>) -> String {
    let request = &exchange.request;
    let path = request
        .headers
        .get_str("x-envoy-original-path")
        .unwrap_or_else(|| request.path());
    let mut end = path.len().min(256);
    while !path.is_char_boundary(end) {
        end -= 1;
    }
    // A quotation mark would end the realm.
    let path = path[..end].replace(['"', '\\'], "");
    let authority = request.authority().replace(['"', '\\'], "");
    format!("{}://{authority}{path}", request.scheme())
}
