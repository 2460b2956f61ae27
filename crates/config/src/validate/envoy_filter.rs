//! EnvoyFilter.

use prost::{Message, Name};
use proto::{
    Struct,
    envoy::{
        config::{
            bootstrap::v3::Bootstrap,
            cluster::v3::Cluster,
            core::v3::TypedExtensionConfig,
            listener::v3::{Filter, FilterChain, Listener, ListenerFilter},
            route::v3::{Route, RouteConfiguration, VirtualHost},
        },
        extensions::filters::network::http_connection_manager::v3::HttpFilter,
    },
    istio::networking::v1alpha3::{
        EnvoyFilter,
        envoy_filter::{
            ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, PatchContext,
            envoy_config_object_match::ObjectTypes, listener_match::FilterMatch, patch::Operation,
        },
    },
    json::JsonError,
};
use regex::Regex;
use serde_json::Value;

use super::Report;

pub(super) fn check(report: &mut Report, spec: &EnvoyFilter) {
    report.warning(
        "spec.configPatches",
        "changes what the proxy is given, in a form that may be another one in any later version: prefer other kinds \
         where they can say it, and look at these after each upgrade",
    );
    if let Some(selector) = &spec.workload_selector {
        report.alpha_selector(&selector.labels);
    }
    for (i, patch) in spec.config_patches.iter().enumerate() {
        let field = format!("spec.configPatches[{i}]");
        let context = patch.r#match.as_ref().map(EnvoyConfigObjectMatch::context);
        // Waypoints are not looked at, here as in Istio.
        if context != Some(PatchContext::Waypoint) {
            one(report, &field, patch);
        }
    }
}

fn one(report: &mut Report, field: &str, written: &EnvoyConfigObjectPatch) {
    let apply_to = written.apply_to();
    let Some(message) = message(apply_to) else {
        return report.error(
            format!("{field}.applyTo"),
            "is missing: say what is patched, for example HTTP_FILTER",
        );
    };
    let Some(patch) = &written.patch else {
        return report.error(
            format!("{field}.patch"),
            "is missing: give operation and value",
        );
    };
    if patch.operation() == Operation::Invalid {
        return report.error(
            format!("{field}.patch.operation"),
            "is missing: give ADD, MERGE, REMOVE, REPLACE, INSERT_BEFORE, INSERT_AFTER or INSERT_FIRST",
        );
    }
    if patch.operation() != Operation::Remove && patch.value.is_none() {
        return report.error(
            format!("{field}.patch.value"),
            "is missing: only REMOVE needs none",
        );
    }
    if let Some(asked) = &written.r#match
        && !matches(report, &format!("{field}.match"), apply_to, asked)
    {
        return;
    }
    if let Some(value) = &patch.value {
        let value = value_of(value);
        let field = format!("{field}.patch.value");
        match proto::json::value_to_encoded(&message, &value) {
            Ok(_) => {}
            // A newer proxy may know it.
            Err(JsonError::Field { path, message }) if message.starts_with("unknown field") => {
                report.warning(inside(&field, &path), message);
            }
            Err(JsonError::Field { path, message }) => report.error(inside(&field, &path), message),
            Err(error) => report.error(&field, error.to_string()),
        }
        if let Some(name) = name_alone(apply_to, &value) {
            report.warning(
                field,
                format!("{name:?} is chosen by its name: give typed_config"),
            );
        }
    }
}

/// The full name of what is patched; `None` where nothing is named.
fn message(apply_to: ApplyTo) -> Option<String> {
    Some(match apply_to {
        ApplyTo::Invalid => return None,
        ApplyTo::Listener => Listener::full_name(),
        ApplyTo::FilterChain => FilterChain::full_name(),
        ApplyTo::NetworkFilter => Filter::full_name(),
        ApplyTo::HttpFilter => HttpFilter::full_name(),
        ApplyTo::RouteConfiguration => RouteConfiguration::full_name(),
        ApplyTo::VirtualHost => VirtualHost::full_name(),
        ApplyTo::HttpRoute => Route::full_name(),
        ApplyTo::Cluster => Cluster::full_name(),
        ApplyTo::ExtensionConfig => TypedExtensionConfig::full_name(),
        ApplyTo::Bootstrap => Bootstrap::full_name(),
        ApplyTo::ListenerFilter => ListenerFilter::full_name(),
    })
}

/// Whether the match can be meant for what is patched.
fn matches(
    report: &mut Report,
    field: &str,
    apply_to: ApplyTo,
    asked: &EnvoyConfigObjectMatch,
) -> bool {
    if let Some(proxy) = &asked.proxy {
        let version = &proxy.proxy_version;
        let field = format!("{field}.proxy.proxyVersion");
        if version.len() > LONGEST_VERSION {
            let message = format!("has more than {LONGEST_VERSION} characters and is ignored");
            report.warning(field, message);
        } else if let Err(error) = Regex::new(version) {
            report.error(field, format!("is no regular expression: {error}"));
            return false;
        }
    }
    let Some(object) = &asked.object_types else {
        return true;
    };
    let (fits, wanted) = match apply_to {
        ApplyTo::Listener | ApplyTo::FilterChain | ApplyTo::NetworkFilter | ApplyTo::HttpFilter => {
            (matches!(object, ObjectTypes::Listener(_)), "listener")
        }
        ApplyTo::RouteConfiguration | ApplyTo::VirtualHost | ApplyTo::HttpRoute => (
            matches!(object, ObjectTypes::RouteConfiguration(_)),
            "routeConfiguration",
        ),
        ApplyTo::Cluster => (matches!(object, ObjectTypes::Cluster(_)), "cluster"),
        _ => return true,
    };
    if !fits {
        let applied = apply_to.as_str_name();
        report.error(
            field,
            format!("{applied} is matched by {wanted}, not by another object"),
        );
        return wanted != "listener";
    }
    let chain = match object {
        ObjectTypes::Listener(listener) => listener.filter_chain.as_ref(),
        _ => None,
    };
    match chain.and_then(|chain| chain.filter.as_ref()) {
        Some(filter) => names_filter(report, &format!("{field}.listener"), apply_to, filter),
        None => true,
    }
}

fn names_filter(report: &mut Report, field: &str, apply_to: ApplyTo, filter: &FilterMatch) -> bool {
    let field = format!("{field}.filterChain.filter");
    if matches!(apply_to, ApplyTo::Listener | ApplyTo::FilterChain) {
        let applied = apply_to.as_str_name();
        report.warning(&field, format!("has no effect where {applied} is patched"));
    }
    if filter.name.is_empty() {
        report.error(format!("{field}.name"), "is missing");
        return false;
    }
    let sub = filter.sub_filter.as_ref().map(|sub| &*sub.name);
    if let Some(sub) = sub {
        let field = format!("{field}.subFilter");
        if apply_to != ApplyTo::HttpFilter {
            report.error(field, "is only for applyTo HTTP_FILTER");
            return false;
        }
        if !HTTP_CONNECTION_MANAGERS.contains(&&*filter.name) {
            let manager = HTTP_CONNECTION_MANAGERS[0];
            report.error(field, format!("is only in the filter {manager}"));
            return false;
        }
        if sub.is_empty() {
            report.error(format!("{field}.name"), "is missing");
            return false;
        }
    }
    for (field, name) in [
        (format!("{field}.name"), Some(&*filter.name)),
        (format!("{field}.subFilter.name"), sub),
    ] {
        if let Some((_, now)) = name.and_then(|name| OLD_NAMES.iter().find(|(old, _)| *old == name))
        {
            report.warning(field, format!("is an old name: write {now}"));
        }
    }
    true
}

/// The name of a filter that is given without its configuration, which Envoy looks up by the name alone.
fn name_alone(apply_to: ApplyTo, value: &Value) -> Option<&str> {
    let named = matches!(
        apply_to,
        ApplyTo::HttpFilter
            | ApplyTo::NetworkFilter
            | ApplyTo::ListenerFilter
            | ApplyTo::ExtensionConfig
    );
    let configured = [
        "typed_config",
        "typedConfig",
        "config_discovery",
        "configDiscovery",
    ]
    .iter()
    .any(|field| value.get(field).is_some());
    let name = value.get("name").and_then(Value::as_str);
    name.filter(|_| named && !configured)
}

fn value_of(value: &Struct) -> Value {
    proto::json::encoded_to_value("google.protobuf.Struct", &value.encode_to_vec())
        .unwrap_or_default()
}

/// A path below a field.
fn inside(field: &str, path: &str) -> String {
    match path {
        "" => field.to_owned(),
        path => format!("{field}.{path}"),
    }
}

/// Longer patterns for versions are ignored.
const LONGEST_VERSION: usize = 1024;

const HTTP_CONNECTION_MANAGERS: [&str; 2] = [
    "envoy.filters.network.http_connection_manager",
    "envoy.http_connection_manager",
];

/// Names that filters had before, and what they are called now.
const OLD_NAMES: [(&str, &str); 27] = [
    ("envoy.buffer", "envoy.filters.http.buffer"),
    (
        "envoy.client_ssl_auth",
        "envoy.filters.network.client_ssl_auth",
    ),
    ("envoy.cors", "envoy.filters.http.cors"),
    ("envoy.csrf", "envoy.filters.http.csrf"),
    ("envoy.ext_authz", "envoy.filters.http.ext_authz"),
    ("envoy.fault", "envoy.filters.http.fault"),
    (
        "envoy.grpc_http1_bridge",
        "envoy.filters.http.grpc_http1_bridge",
    ),
    (
        "envoy.grpc_json_transcoder",
        "envoy.filters.http.grpc_json_transcoder",
    ),
    ("envoy.grpc_web", "envoy.filters.http.grpc_web"),
    ("envoy.gzip", "envoy.filters.http.gzip"),
    ("envoy.health_check", "envoy.filters.http.health_check"),
    (
        "envoy.http_connection_manager",
        "envoy.filters.network.http_connection_manager",
    ),
    ("envoy.http_dynamo_filter", "envoy.filters.http.dynamo"),
    ("envoy.ip_tagging", "envoy.filters.http.ip_tagging"),
    (
        "envoy.listener.http_inspector",
        "envoy.filters.listener.http_inspector",
    ),
    (
        "envoy.listener.original_dst",
        "envoy.filters.listener.original_dst",
    ),
    (
        "envoy.listener.original_src",
        "envoy.filters.listener.original_src",
    ),
    (
        "envoy.listener.proxy_protocol",
        "envoy.filters.listener.proxy_protocol",
    ),
    (
        "envoy.listener.tls_inspector",
        "envoy.filters.listener.tls_inspector",
    ),
    ("envoy.lua", "envoy.filters.http.lua"),
    ("envoy.mongo_proxy", "envoy.filters.network.mongo_proxy"),
    ("envoy.rate_limit", "envoy.filters.http.ratelimit"),
    ("envoy.ratelimit", "envoy.filters.network.ratelimit"),
    ("envoy.redis_proxy", "envoy.filters.network.redis_proxy"),
    ("envoy.router", "envoy.filters.http.router"),
    ("envoy.squash", "envoy.filters.http.squash"),
    ("envoy.tcp_proxy", "envoy.filters.network.tcp_proxy"),
];
