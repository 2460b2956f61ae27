//! What a service is told of a request.

use std::collections::BTreeMap;

use bytes::Bytes;
use outrigger_http::{Framing, Method, RequestHead};
use serde_json::Value;

use super::{
    super::{Answer, Pending, Step, route_configs},
    Decision, ExtAuthzFilter, Verdict, http_service,
};
use crate::{
    grpc::authorization::{About, AboutRequest, Question},
    http::Exchange,
    plan::{
        Bootstrap,
        ext_authz::{BodySettings, Service},
        http_filter::RouteFilterConfig,
        matcher::StringMatcher,
    },
    worker::Worker,
};

/// As much of a body as the service is told, and whether that is all.
pub(super) type Body = (BodySettings, Bytes, bool);

impl ExtAuthzFilter {
    /// Asks the service.
    pub(super) fn ask(&self, exchange: &Exchange<'_>, body: Option<Body>, worker: &Worker) -> Step {
        let plan = self.plan.clone();
        let weak = worker.weak();
        let pending: Pending = match &self.plan.service {
            Service::Http(_) => {
                let question = http_service::question(exchange, &plan, body);
                Box::pin(async move {
                    // A worker that has ended waits for nothing.
                    let (Service::Http(call), Some(worker)) = (&plan.service, weak.upgrade())
                    else {
                        return Answer::Ready;
                    };
                    let asked = http_service::ask(&worker, call, question).await;
                    let verdict = asked.unwrap_or_else(|error| undecided(&call.cluster, &error));
                    Answer::Authorization(Box::new(verdict))
                })
            }
            Service::Grpc(_) => {
                let about = self.about(exchange, worker);
                let request = self.about_request(exchange, body);
                let question = Question::new(exchange.connection, about, Some(request));
                Box::pin(async move {
                    let (Service::Grpc(call), Some(worker)) = (&plan.service, weak.upgrade())
                    else {
                        return Answer::Ready;
                    };
                    let asked = question.ask(&worker, call).await;
                    let verdict = asked.unwrap_or_else(|error| undecided(&call.cluster, &error));
                    Answer::Authorization(Box::new(verdict))
                })
            }
        };
        Step::Ask(pending)
    }

    fn about(&self, exchange: &Exchange<'_>, worker: &Worker) -> About {
        let plan = &self.plan;
        let mut extensions = BTreeMap::new();
        for config in route_configs(&exchange.route, &self.name) {
            if let RouteFilterConfig::ExtAuthz(settings) = config {
                for (key, value) in &settings.context_extensions {
                    // The most specific level came first.
                    let known = extensions.entry(key.clone());
                    known.or_insert_with(|| value.clone());
                }
            }
        }
        let route = exchange.route.route();
        let of_route = |name: &str| route.and_then(|route| route.metadata.lookup(name, &[""; 0]));
        let dynamic = plan.metadata_context_namespaces.iter();
        let routes = plan.route_metadata_context_namespaces.iter();
        About {
            certificate: plan.include_peer_certificate,
            tls_session: plan.include_tls_session,
            service: exchange
                .request
                .get_str("x-envoy-downstream-service-cluster")
                .unwrap_or_default()
                .to_owned(),
            labels: labels(plan.labels_key.as_deref(), &worker.bootstrap),
            extensions,
            metadata: dynamic
                .filter_map(|name| {
                    let value = exchange.dynamic_metadata.get(&**name)?;
                    Some((name.to_string(), value.clone()))
                })
                .collect(),
            route_metadata: routes
                .filter_map(|name| Some((name.to_string(), of_route(name)?.clone())))
                .collect(),
        }
    }

    fn about_request(&self, exchange: &Exchange<'_>, body: Option<Body>) -> AboutRequest {
        let request = &exchange.request;
        let mut headers = Vec::with_capacity(request.headers.len() + 5);
        let mut add = |name: &str, value: &[u8]| {
            if self.tells(name) {
                headers.push((name.to_ascii_lowercase(), value.to_vec()));
            }
        };
        add(":authority", request.authority().as_bytes());
        add(":path", request.path().as_bytes());
        add(":method", request.method.as_str().as_bytes());
        add(":scheme", request.scheme().as_bytes());
        for (name, value) in request.headers.iter() {
            if !name.starts_with(':') && !name.eq_ignore_ascii_case("host") {
                add(name, value);
            }
        }
        let (raw_body, bytes) = match body {
            None => (false, Bytes::new()),
            Some((settings, bytes, complete)) => {
                let partial = if complete { "false" } else { "true" };
                headers.push(("x-envoy-auth-partial-body".to_owned(), partial.into()));
                (settings.pack_as_bytes, bytes)
            }
        };
        AboutRequest {
            id: exchange.random.to_string(),
            time: exchange.progress.start_time,
            method: request.method.as_str().to_owned(),
            path: request.path().to_owned(),
            host: request.authority().to_owned(),
            scheme: request.scheme().to_owned(),
            protocol: request.version.as_str(),
            size: match request.framing {
                Framing::Length(length) => length as i64,
                Framing::None => 0,
                _ => -1,
            },
            headers,
            raw_headers: self.plan.encode_raw_headers,
            body: bytes,
            raw_body,
        }
    }

    /// Whether the service is told a header.
    fn tells(&self, name: &str) -> bool {
        let plan = &self.plan;
        let allowed = plan.allowed_headers.as_ref();
        allowed.is_none_or(|list| any(list, name)) && !any(&plan.disallowed_headers, name)
    }
}

/// The service could not be asked.
fn undecided(cluster: &str, error: &dyn std::fmt::Display) -> Verdict {
    tracing::debug!(cluster, %error, "an authorization service could not be asked");
    Verdict {
        decision: Decision::NONE,
        ..Verdict::default()
    }
}

/// Whether one of them matches a name.
pub(super) fn any(list: &[StringMatcher], name: &str) -> bool {
    list.iter().any(|matcher| matcher.matches(name.as_bytes()))
}

/// Labels of this workload: the texts in a member of the node's metadata.
pub(crate) fn labels(key: Option<&str>, bootstrap: &Bootstrap) -> BTreeMap<String, String> {
    let found = key.and_then(|key| bootstrap.node.metadata.get(key));
    let members = found.and_then(Value::as_object).into_iter().flatten();
    members
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

/// Whether a body comes that a service could see: an upgrade's is none.
pub(super) fn has_body(exchange: &Exchange<'_>) -> bool {
    let request = &exchange.request;
    !request.upgrade
        && request.method != Method::Connect
        && !matches!(request.framing, Framing::None | Framing::Length(0))
}

/// Sets and removes query parameters.
pub(super) fn change_query(request: &mut RequestHead, set: &[(String, String)], remove: &[String]) {
    if set.is_empty() && remove.is_empty() {
        return;
    }
    let path = request.path();
    let (bare, query) = path.split_once('?').unwrap_or((path, ""));
    let stays = |pair: &&str| {
        let name = pair.split('=').next().unwrap_or_default();
        let named = |other: &String| other == name;
        !pair.is_empty() && !remove.iter().any(named) && !set.iter().any(|(key, _)| named(key))
    };
    let mut pairs: Vec<String> = query.split('&').filter(stays).map(str::to_owned).collect();
    let set = set.iter().filter(|(key, _)| !remove.contains(key));
    pairs.extend(set.map(|(key, value)| format!("{key}={value}")));
    let path = match pairs.is_empty() {
        true => bare.to_owned(),
        false => format!("{bare}?{}", pairs.join("&")),
    };
    request.set_path(&path);
}
