//! `envoy.filters.http.ratelimit` as clients, origins and rate limit services see it.

mod answers;
mod descriptors;
mod failures;

use std::time::Duration;

use outrigger_proxy::plan::Listener;
use proto::envoy::{
    config::listener::v3 as pb,
    service::ratelimit::v3::{RateLimitRequest, RateLimitResponse},
};
use serde_json::{Value, json};
use testkit::rate_limit::{Act as Judge, Service};
use tokio::io::AsyncWriteExt;

use crate::support::{Act, Mesh, OK, Origin, run, within};

const TYPE: &str = "type.googleapis.com/envoy.extensions.filters.http";

/// The filter `limit`, with these fields beside those that it needs.
fn filter(more: Value) -> String {
    named("limit", more)
}

fn named(name: &str, more: Value) -> String {
    let mut config = json!({
        "@type": format!("{TYPE}.ratelimit.v3.RateLimit"),
        "domain": "shop",
        "timeout": "10s",
        "rate_limit_service": {
            "grpc_service": { "envoy_grpc": { "cluster_name": "limits-h2" } },
            "transport_api_version": "V3",
        },
    });
    let fields = config.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("one").clone());
    fields.retain(|_, value| !value.is_null());
    format!("      - {{name: {name}, typed_config: {config}}}")
}

/// A route for a prefix with these members of its action, and these of its own.
fn route(prefix: &str, action: Value, more: Value) -> String {
    let mut all = json!({ "cluster": "a" });
    let fields = all.as_object_mut().expect("an object");
    fields.extend(action.as_object().expect("one").clone());
    fields.retain(|_, value| !value.is_null());
    let mut route = json!({ "match": { "prefix": prefix }, "route": all });
    let fields = route.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("one").clone());
    format!("          - {route}\n")
}

/// Every request is one of `key`.
fn limit(key: &str) -> Value {
    json!({ "actions": [{ "generic_key": { "descriptor_value": key } }] })
}

/// A route of all requests with one limit.
fn limited() -> String {
    route("/", json!({ "rate_limits": [limit("all")] }), json!({}))
}

fn per_route(config: Value) -> Value {
    let mut config = config;
    config["@type"] = format!("{TYPE}.ratelimit.v3.RateLimitPerRoute").into();
    json!({ "typed_per_filter_config": { "limit": config } })
}

fn say(answer: Value) -> Judge {
    let answer: RateLimitResponse = proto::json::from_value(&answer).expect("canonical JSON");
    Judge::Say(Box::new(answer))
}

fn fine() -> Judge {
    say(json!({ "overall_code": "OK" }))
}

fn over() -> Judge {
    say(json!({ "overall_code": "OVER_LIMIT" }))
}

fn status(answer: &str) -> u16 {
    answer[9..12].parse().expect("a status")
}

/// The descriptors of a question as `key=value` with `,` between entries.
fn descriptors(asked: &RateLimitRequest) -> Vec<String> {
    let one = |entries: &[_]| {
        let each = entries.iter().map(
            |e: &proto::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::Entry| {
                format!("{}={}", e.key, e.value)
            },
        );
        each.collect::<Vec<_>>().join(",")
    };
    asked.descriptors.iter().map(|d| one(&d.entries)).collect()
}

async fn asked(service: &Service, times: usize) -> Vec<RateLimitRequest> {
    within(async {
        while service.seen().len() < times {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    service.seen()
}

/// A proxy in front of an origin, with a service of this script.
async fn start(
    script: Vec<Judge>,
    origin: &[Act],
    filters: &str,
    routes: &str,
) -> (Mesh, Service, Origin) {
    let (service, address) = Service::start(script).await;
    let origin = Origin::new(origin).await;
    let clusters = [("a", origin.port), ("limits-h2", address.port())];
    let mesh = Mesh::new(routes, "", filters, &clusters).await;
    (mesh, service, origin)
}
