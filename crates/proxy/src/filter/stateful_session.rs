//! `envoy.filters.http.stateful_session`: a client stays with the host that served it first.
//!
//! The address of the host travels in a cookie or header of the client, in Envoy's form. It is no secret and is not
//! believed: only a host of the route's cluster is ever chosen by it.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use outrigger_http::ResponseHead;
use prost::Message;

use super::{Filter, Interests, Step};
use crate::{
    http::{Exchange, Flags},
    plan::{
        filter_config::{SessionState, StatefulSession},
        http_filter::RouteFilterConfig,
        matcher::cookie,
    },
    worker::Worker,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct StatefulSessionFilter {
    config: Option<Arc<StatefulSession>>,
    stats: Option<SessionStats>,
}

stats::group! {
    /// `http.<prefix>.stateful_session.<stat_prefix>.`
    struct SessionStats {
        counter failed_closed,
        counter failed_open,
        counter no_session,
        counter routed,
    }
}

impl StatefulSessionFilter {
    pub(super) fn new(config: Option<Arc<StatefulSession>>, prefix: &str, worker: &Worker) -> Self {
        let own = config.as_ref().and_then(|own| own.stat_prefix.as_ref());
        let stats = own.map(|own| {
            let scope = format!("http.{prefix}.stateful_session.{own}.");
            SessionStats::new(worker.stats.scope(&scope))
        });
        Self { config, stats }
    }

    /// Counts what has become of a session. Those of a route have no stats, in Envoy too.
    fn count(&self, exchange: &Exchange<'_>) {
        let (Some(stats), Some(session)) = (&self.stats, &exchange.filters.session) else {
            return;
        };
        let own = self.config.as_ref();
        if !own.is_some_and(|own| Arc::ptr_eq(own, &session.config)) {
            return;
        }
        match (&session.address, &exchange.upstream.host) {
            (None, Some(_)) => stats.no_session().inc(),
            (Some(wanted), Some(host)) if host.address.to_string() == **wanted => {
                stats.routed().inc();
            }
            (Some(_), Some(_)) if !session.config.strict => stats.failed_open().inc(),
            (Some(_), None)
                if session.config.strict && exchange.flags.has(Flags::NO_HEALTHY_UPSTREAM) =>
            {
                stats.failed_closed().inc();
            }
            _ => {}
        }
    }
}

/// The session of a request.
#[derive(Debug)]
pub(crate) struct Session {
    config: Arc<StatefulSession>,
    /// The host that the client named.
    address: Option<Box<str>>,
}

impl Session {
    /// The answer where the host that the client named is not there and no other will do.
    pub(crate) fn status_without_host(&self) -> u16 {
        self.config.status_without_host
    }
}

/// `envoy.Cookie`: what the cookie holds.
#[derive(Clone, PartialEq, Message)]
struct CookieValue {
    #[prost(string, tag = "1")]
    address: String,
    /// Seconds of the clock.
    #[prost(int64, tag = "2")]
    expires: i64,
}

impl Filter for StatefulSessionFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        let config = match config {
            Some(RouteFilterConfig::StatefulSession(config)) => Some(config),
            _ => self.config.as_ref(),
        };
        let Some(config) = config.cloned() else {
            return Step::Continue;
        };
        if !counts(&config.state, exchange.request.path_only()) {
            return Step::Continue;
        }
        let address = address(&config.state, exchange);
        if let Some(address) = &address {
            exchange.override_host = Some((address.clone(), config.strict));
        }
        exchange.filters.session = Some(Session { config, address });
        Step::Continue
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        self.count(exchange);
        let (Some(session), Some(host)) = (&exchange.filters.session, &exchange.upstream.host)
        else {
            return;
        };
        let now = host.address.to_string();
        if session.address.as_deref() == Some(&*now) {
            return;
        }
        match &session.config.state {
            SessionState::Header(name) => {
                response.headers.set(name, BASE64_STANDARD.encode(now));
            }
            SessionState::Cookie {
                name,
                ttl,
                path,
                attributes,
            } => {
                let expires = match ttl.is_zero() {
                    true => 0,
                    false => seconds() + ttl.as_secs() as i64,
                };
                let value = CookieValue {
                    address: now,
                    expires,
                };
                let mut text = format!(
                    "{name}=\"{}\"",
                    BASE64_STANDARD.encode(value.encode_to_vec())
                );
                if !ttl.is_zero() {
                    text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                }
                if !path.is_empty() {
                    text.push_str(&format!("; Path={path}"));
                }
                for (name, value) in attributes {
                    text.push_str("; ");
                    text.push_str(name);
                    if !value.is_empty() {
                        text.push('=');
                        text.push_str(value);
                    }
                }
                text.push_str("; HttpOnly");
                response.headers.append("set-cookie", text);
            }
        }
    }
}

/// Whether the session is one of this path: a cookie's path counts at segments.
fn counts(state: &SessionState, path: &str) -> bool {
    match state {
        SessionState::Header(_) => true,
        SessionState::Cookie { path: below, .. } => {
            let below = below.strip_suffix('/').unwrap_or(below);
            path.strip_prefix(below)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    }
}

/// The host that the client names.
fn address(state: &SessionState, exchange: &Exchange<'_>) -> Option<Box<str>> {
    let headers = &exchange.request.headers;
    let address = match state {
        SessionState::Header(name) => {
            String::from_utf8(BASE64_STANDARD.decode(headers.get(name)?).ok()?).ok()?
        }
        SessionState::Cookie { name, .. } => {
            let value = headers
                .get_all("cookie")
                .find_map(|cookies| cookie(cookies, name.as_bytes()))?;
            let value = CookieValue::decode(&*BASE64_STANDARD.decode(value).ok()?).ok()?;
            if value.expires != 0 && value.expires < seconds() {
                return None;
            }
            value.address
        }
    };
    (!address.is_empty()).then(|| address.into())
}

fn seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}
