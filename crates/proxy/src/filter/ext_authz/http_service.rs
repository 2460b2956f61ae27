//! A service over HTTP: it sees the request's method, path and host, and answers 200 or not.

use bytes::Bytes;
use outrigger_http::{Headers, RequestHead, Version};
use serde_json::{Map, Value};

use super::{
    Decision, Mutation, Verdict,
    question::{Body, any},
};
use crate::{
    http::{Exchange, SideCallError, SideResponse, side_call},
    plan::{
        ext_authz::{ExtAuthz, HttpCall, Service},
        header::AppendAction,
    },
    worker::Worker,
};

/// The request that asks, and its body.
pub(super) fn question(
    exchange: &Exchange<'_>,
    plan: &ExtAuthz,
    body: Option<Body>,
) -> (RequestHead, Bytes) {
    let (prefix, add) = match &plan.service {
        Service::Http(call) => (&*call.path_prefix, &*call.headers_to_add),
        Service::Grpc(_) => ("", &[][..]),
    };
    let request = &exchange.request;
    let path = format!("{prefix}{}", request.path());
    let method = request.method.clone();
    let mut head = RequestHead::new(Version::Http11, method, request.authority(), &path);
    let allowed = plan.allowed_headers.as_deref().unwrap_or_default();
    for (name, value) in request.headers.iter() {
        let told = name.eq_ignore_ascii_case("authorization") || any(allowed, name);
        if told && !is_own(name) && !any(&plan.disallowed_headers, name) {
            head.headers.append(&name.to_ascii_lowercase(), value);
        }
    }
    for (name, value) in add {
        head.headers.set(name, value.as_bytes());
    }
    let body = body.map(|(_, bytes, complete)| {
        let partial = if complete { "false" } else { "true" };
        head.headers.set("x-envoy-auth-partial-body", partial);
        bytes
    });
    let body = body.unwrap_or_default();
    let length = itoa::Buffer::new().format(body.len()).to_owned();
    head.headers.set("content-length", length);
    (head, body)
}

/// Headers of the connection, of the framing, or written anew.
fn is_own(name: &str) -> bool {
    const OWN: [&str; 10] = [
        "host",
        "connection",
        "content-length",
        "transfer-encoding",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "upgrade",
        "expect",
    ];
    name.starts_with(':') || OWN.iter().any(|own| name.eq_ignore_ascii_case(own))
}

/// Asks.
pub(super) async fn ask(
    worker: &Worker,
    call: &HttpCall,
    question: (RequestHead, Bytes),
) -> Result<Verdict, SideCallError> {
    let answer = side_call(
        worker,
        &call.cluster,
        question,
        false,
        MAX_ANSWER,
        call.timeout,
    );
    Ok(verdict(call, answer.await?))
}

fn verdict(call: &HttpCall, answer: SideResponse) -> Verdict {
    let headers = &answer.head.headers;
    let picked = |fits: &dyn Fn(&str) -> bool, action: AppendAction| -> Vec<Mutation> {
        let each = headers.iter();
        each.filter(|(name, _)| !is_own(name) && fits(name))
            .map(|(name, value)| Mutation {
                name: name.to_ascii_lowercase(),
                value: value.to_vec(),
                action,
            })
            .collect()
    };
    let append = AppendAction::AppendIfExistsOrAdd;
    let set = AppendAction::OverwriteIfExistsOrAdd;
    let mut out = Verdict {
        metadata: metadata(call, headers),
        ..Verdict::default()
    };
    match answer.head.status {
        200 => {
            let mut request = picked(&|name| any(&call.upstream, name), set);
            // A second field of a name stands beside the first.
            for index in 1..request.len() {
                let (before, rest) = request.split_at_mut(index);
                if before.iter().any(|m| m.name == rest[0].name) {
                    rest[0].action = append;
                }
            }
            request.extend(picked(&|name| any(&call.upstream_append, name), append));
            out.request = request;
            out.response = picked(&|name| any(&call.client_on_success, name), append);
            let gone = headers.get_all("x-envoy-auth-headers-to-remove");
            out.remove = gone
                .filter_map(|list| std::str::from_utf8(list).ok())
                .flat_map(|list| list.split(','))
                .map(|name| name.trim().to_ascii_lowercase())
                .filter(|name| !name.is_empty())
                .collect();
        }
        // The service does not know; that is no decision.
        500.. => out.decision = Decision::NONE,
        status => {
            let always = |name: &str| {
                name.eq_ignore_ascii_case("www-authenticate")
                    || name.eq_ignore_ascii_case("location")
            };
            let shown = |name: &str| {
                let list = call.client.as_ref();
                list.is_none_or(|list| any(list, name) || always(name))
            };
            out.decision = Decision::Deny {
                // What is no final status says no less.
                status: if status < 200 { 403 } else { status },
                headers: picked(&shown, set),
                body: answer.body.clone(),
            };
        }
    }
    out
}

fn metadata(call: &HttpCall, headers: &Headers) -> Option<Value> {
    let picked = headers.iter().filter(|(name, _)| any(&call.metadata, name));
    let found: Map<String, Value> = picked
        .map(|(name, value)| {
            let text = String::from_utf8_lossy(value).into_owned();
            (name.to_ascii_lowercase(), Value::String(text))
        })
        .collect();
    (!found.is_empty()).then_some(Value::Object(found))
}

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 4 << 20;
