//! Whether the tokens of a request are what it needs, and what is made of them.

use std::rc::Rc;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Value};
use tls::jwt::{Refusal, Token, token::plain};

use super::{
    super::Pending,
    JwtAuthnFilter, Provider, extract,
    extract::Found,
    keys::{self, Known},
};
use crate::{http::Exchange, plan::jwt_authn::Requirement, worker::Worker};

/// Namespace of the metadata, and name of the filter.
const NAMESPACE: &str = "envoy.filters.http.jwt_authn";

/// What verified tokens leave in the metadata.
type Notes = Map<String, Value>;

impl JwtAuthnFilter {
    /// Whether the request has what it needs. Tokens are taken off and claims written as they are verified.
    pub(super) fn verify(
        &self,
        exchange: &mut Exchange<'_>,
        needed: &Requirement,
        worker: &Worker,
    ) -> Result<(), Refusal> {
        let mut notes = Notes::new();
        let judged = self.judge(exchange, needed, &mut notes, worker);
        if !notes.is_empty() && judged.is_ok() {
            // A copy of the claims for each request: metadata is changed by whoever comes later.
            exchange
                .dynamic_metadata
                .insert(NAMESPACE.to_owned(), Value::Object(notes));
        }
        judged
    }

    /// Starts what has to be fetched for the tokens that are there; `None` where nothing is missing.
    pub(super) fn missing_keys(
        &self,
        exchange: &Exchange<'_>,
        needed: &Requirement,
        worker: &Worker,
    ) -> Option<Pending> {
        let mut asked = Vec::new();
        self.asked(needed, &mut asked);
        let now = worker.options.clock.seconds();
        let mut waits = Vec::new();
        for provider in asked {
            let provider = &self.providers[provider];
            if !provider.keys.is_due() {
                continue;
            }
            let plan = &provider.plan;
            let found = extract::tokens(&exchange.request, std::iter::once(&**plan));
            // Only for tokens that the keys could make good: nobody makes us ask by sending rubbish.
            let hopeful = |found: &Found<'_>| {
                Token::parse(&found.text).is_ok_and(|token| {
                    found.allows(token.issuer()) && provider.accepts(&token, None, now).is_ok()
                })
            };
            if found.iter().any(hopeful) {
                waits.push(provider.keys.fetch(worker, &self.stats));
            }
        }
        (!waits.is_empty()).then(|| keys::all(waits))
    }

    /// The providers that a requirement speaks of.
    fn asked(&self, needed: &Requirement, out: &mut Vec<usize>) {
        match needed {
            Requirement::Provider { provider, .. } => out.push(*provider),
            Requirement::Any(list) | Requirement::All(list) => {
                list.iter().for_each(|one| self.asked(one, out));
            }
            Requirement::AllowMissing(list) | Requirement::AllowMissingOrFailed(list) => {
                out.extend(list);
            }
        }
        out.sort_unstable();
        out.dedup();
    }

    fn judge(
        &self,
        exchange: &mut Exchange<'_>,
        needed: &Requirement,
        notes: &mut Notes,
        worker: &Worker,
    ) -> Result<(), Refusal> {
        match needed {
            Requirement::Provider {
                provider,
                audiences,
            } => {
                let provider = &self.providers[*provider];
                let plan = &*provider.plan;
                let found = extract::tokens(&exchange.request, std::iter::once(plan));
                if found.is_empty() {
                    return Err(Refusal::Missing);
                }
                // A second token that is bad could be the one that the upstream believes.
                found.iter().rev().try_for_each(|found| {
                    let audiences = audiences.as_deref();
                    self.token(exchange, found, provider, audiences, notes, worker)
                })
            }
            Requirement::Any(list) => {
                let mut worst = Refusal::Missing;
                for one in list {
                    match self.judge(exchange, one, notes, worker) {
                        Ok(()) => return Ok(()),
                        // What is wrong with a token tells more than that there is none for somebody else.
                        Err(refusal) => {
                            let tells_more =
                                !matches!(refusal, Refusal::Missing | Refusal::UnknownIssuer);
                            if tells_more || worst == Refusal::Missing {
                                worst = refusal;
                            }
                        }
                    }
                }
                Err(worst)
            }
            Requirement::All(list) => list
                .iter()
                .try_for_each(|one| self.judge(exchange, one, notes, worker)),
            Requirement::AllowMissing(list) => self.those(exchange, list, notes, worker),
            Requirement::AllowMissingOrFailed(list) => {
                // Whatever is wrong, the request passes; what was good is noted.
                let _ = self.those(exchange, list, notes, worker);
                Ok(())
            }
        }
    }

    /// All tokens at the places of these providers, each judged by the one that issued it. The first refusal is told
    /// once all were looked at.
    fn those(
        &self,
        exchange: &mut Exchange<'_>,
        list: &[usize],
        notes: &mut Notes,
        worker: &Worker,
    ) -> Result<(), Refusal> {
        let plans = list.iter().map(|&index| &*self.providers[index].plan);
        let found = extract::tokens(&exchange.request, plans);
        let mut judged = Ok(());
        for found in found.iter().rev() {
            let one = match Token::parse(&found.text) {
                Err(refusal) => Err(refusal),
                Ok(token) if !found.allows(token.issuer()) => Err(Refusal::UnknownIssuer),
                Ok(token) => {
                    let of = |issuer: &str| {
                        let mut all = list.iter().map(|&index| &self.providers[index]);
                        all.find(|provider| *provider.plan.issuer == *issuer)
                    };
                    match of(token.issuer()).or_else(|| of("")) {
                        Some(provider) => {
                            self.token(exchange, found, provider, None, notes, worker)
                        }
                        None => Err(Refusal::UnknownIssuer),
                    }
                }
            };
            judged = judged.and(one);
        }
        judged
    }

    /// One token of one provider.
    fn token(
        &self,
        exchange: &mut Exchange<'_>,
        found: &Found<'_>,
        provider: &Provider,
        audiences: Option<&[Box<str>]>,
        notes: &mut Notes,
        worker: &Worker,
    ) -> Result<(), Refusal> {
        let keys = provider.keys.known();
        let generation = keys.generation();
        let cached = provider.cache.borrow().find(&found.text, generation);
        let token = match &cached {
            Some(token) => {
                self.stats.jwt_cache_hit().inc();
                token.clone()
            }
            None => {
                self.stats.jwt_cache_miss().inc();
                Rc::new(Token::parse(&found.text)?)
            }
        };
        if !found.allows(token.issuer()) {
            return Err(Refusal::UnknownIssuer);
        }
        let now = worker.options.clock.seconds();
        provider.accepts(&token, audiences, now)?;
        if cached.is_none() {
            match &keys {
                Known::Keys(set, _) => set.verify(&token)?,
                Known::None => return Err(Refusal::NoKeys),
                Known::NotFetched => return Err(Refusal::Fetch),
            }
            let mut cache = provider.cache.borrow_mut();
            cache.insert(&found.text, &token, &provider.plan, generation);
        }
        provider.used(exchange, &token, found, notes);
        Ok(())
    }
}

impl Provider {
    /// Everything about a token but its signature.
    fn accepts(
        &self,
        token: &Token,
        audiences: Option<&[Box<str>]>,
        now: u64,
    ) -> Result<(), Refusal> {
        let plan = &self.plan;
        if let Some(subjects) = &plan.subjects
            && !subjects.matches(token.subject().as_bytes())
        {
            return Err(Refusal::Signature);
        }
        if plan.require_expiration && token.expires().is_none() {
            return Err(Refusal::Signature);
        }
        if let Some(longest) = plan.max_lifetime {
            let lifetime = token.lifetime(now);
            if lifetime.is_none_or(|lifetime| lifetime > longest.as_secs()) {
                return Err(Refusal::Signature);
            }
        }
        token.check_time(now, plan.clock_skew)?;
        let allowed = audiences.unwrap_or(&plan.audiences);
        let meant = |own: &str| allowed.iter().any(|one| same_audience(one, own));
        if !allowed.is_empty() && !token.audiences().any(meant) {
            return Err(Refusal::WrongAudience);
        }
        Ok(())
    }

    /// A token that is good: its claims go where they are wanted.
    fn used(
        &self,
        exchange: &mut Exchange<'_>,
        token: &Token,
        found: &Found<'_>,
        notes: &mut Notes,
    ) {
        let plan = &self.plan;
        let headers = &mut exchange.request.headers;
        if let Some(name) = &plan.forward_payload_header {
            let mut payload = token.payload().to_owned();
            if plan.pad_forward_payload_header {
                while !payload.len().is_multiple_of(4) {
                    payload.push('=');
                }
            }
            headers.append(name, payload);
        }
        for (name, claim) in &plan.claim_to_headers {
            if let Some(value) = token.claim(claim).and_then(header_value) {
                headers.append(name, value);
            }
        }
        if !plan.forward {
            extract::remove(&mut exchange.request, found.location);
        }
        if !plan.header_in_metadata.is_empty() {
            let header = Value::Object(token.header.clone());
            notes.insert(plan.header_in_metadata.to_string(), header);
        }
        if !plan.payload_in_metadata.is_empty() {
            let mut claims = token.claims.clone();
            for name in &plan.space_delimited_claims {
                if let Some(value) = claims.get_mut(&**name)
                    && let Some(text) = value.as_str()
                {
                    *value = text.split_ascii_whitespace().map(Value::from).collect();
                }
            }
            notes.insert(plan.payload_in_metadata.to_string(), Value::Object(claims));
        }
        exchange.clear_route |= plan.clear_route_cache;
    }
}

/// A claim as a header carries it: what is no plain value goes as base64 of its JSON, and what no header may hold not
/// at all.
fn header_value(value: &Value) -> Option<String> {
    let text = match value {
        // Not the alphabet of tokens: Envoy has the usual one here, and fills up the last group.
        Value::Array(_) | Value::Object(_) => BASE64_STANDARD.encode(value.to_string()),
        plain_one => plain(plain_one)?.into_owned(),
    };
    let legal = text
        .bytes()
        .all(|byte| byte >= b' ' && byte != 0x7f || byte == b'\t');
    (legal && !text.is_empty()).then_some(text)
}

/// Audiences are the same with another scheme of HTTP and with or without a slash at the end, as in Envoy.
fn same_audience(one: &str, other: &str) -> bool {
    fn bare(text: &str) -> &str {
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        let text = rest.unwrap_or(text);
        text.strip_suffix('/').unwrap_or(text)
    }
    bare(one) == bare(other)
}
