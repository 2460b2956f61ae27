//! Spans as Zipkin takes them: JSON of version 2.

use std::{net::IpAddr, time::SystemTime};

use serde_json::{Map, Value, json};

use super::{Kind, Span};

/// A list of spans of one service. `wide`: traces that begin here have 128 bits.
pub(super) fn report(spans: &[Span], wide: bool, service: &str) -> Vec<u8> {
    let list = spans.iter().map(|span| one(span, wide, service));
    Value::Array(list.collect()).to_string().into_bytes()
}

fn one(span: &Span, wide: bool, service: &str) -> Value {
    let since = span.start.duration_since(SystemTime::UNIX_EPOCH);
    let mut endpoint = json!({ "serviceName": service });
    if let Some(local) = span.local {
        match local.ip() {
            IpAddr::V4(ip) => endpoint["ipv4"] = ip.to_string().into(),
            IpAddr::V6(ip) => endpoint["ipv6"] = ip.to_string().into(),
        }
        endpoint["port"] = local.port().into();
    }
    let tags = span.tags.iter();
    let tags: Map<_, _> = tags
        .map(|(name, value)| (name.clone(), value.as_str().into()))
        .collect();
    let mut out = json!({
        "traceId": match span.trace >> 64 == 0 && !wide {
            true => format!("{:016x}", span.trace),
            false => format!("{:032x}", span.trace),
        },
        "id": format!("{:016x}", span.id),
        "name": span.name,
        "kind": match span.kind {
            Kind::Client => "CLIENT",
            Kind::Server => "SERVER",
        },
        "timestamp": since.unwrap_or_default().as_micros() as u64,
        // Zipkin counts from 1 (0 means that it is not known).
        "duration": (span.lasted.as_micros() as u64).max(1),
        "localEndpoint": endpoint,
        "tags": tags,
    });
    if let Some(parent) = span.parent {
        out["parentId"] = format!("{parent:016x}").into();
    }
    if span.shared {
        out["shared"] = true.into();
    }
    out
}
