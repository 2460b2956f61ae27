//! `envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit`.

use proto::envoy::{
    config::core::v3::HeaderValue,
    extensions::common::ratelimit::v3::{RateLimitDescriptor, rate_limit_descriptor as nested},
    service::ratelimit::v3::{
        RateLimitRequest, RateLimitResponse,
        rate_limit_response::{Code, DescriptorStatus, rate_limit::Unit},
    },
    r#type::v3::RateLimitUnit,
};

use super::{GrpcError, unary};
use crate::{
    filter::rate_limit::{LimitStatus, Verdict},
    plan::{
        ext_authz::GrpcCall,
        rate_limit::{Descriptor, Limit},
        read::json,
    },
    worker::Worker,
};

/// The question. Made before anything waits: it outlives what it is about.
#[derive(Debug)]
pub(crate) struct Question(RateLimitRequest);

impl Question {
    /// About all of the descriptors together. `hits` is what those count that do not say it themselves; 0 is one hit.
    pub(crate) fn new(domain: &str, descriptors: Vec<Descriptor>, hits: u32) -> Self {
        Self(RateLimitRequest {
            domain: domain.to_owned(),
            descriptors: descriptors.into_iter().map(descriptor).collect(),
            hits_addend: hits,
        })
    }

    /// Asks.
    pub(crate) async fn ask(
        self,
        worker: &Worker,
        service: &GrpcCall,
    ) -> Result<Verdict, GrpcError> {
        let path = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
        unary(worker, service, path, &self.0).await.map(verdict)
    }
}

fn descriptor(asked: Descriptor) -> RateLimitDescriptor {
    let entries = asked.entries.into_iter();
    RateLimitDescriptor {
        entries: entries
            .map(|(key, value)| nested::Entry {
                key: key.to_string(),
                value,
            })
            .collect(),
        limit: asked.limit.as_ref().and_then(limit),
        hits_addend: asked.hits_addend,
        is_negative_hits: asked.negative_hits,
    }
}

/// One with a unit that there is none of is left out, as in Envoy.
fn limit(limit: &Limit) -> Option<nested::RateLimitOverride> {
    let unit = RateLimitUnit::from_str_name(&limit.unit)?;
    Some(nested::RateLimitOverride {
        requests_per_unit: limit.requests,
        unit: unit.into(),
        unit_multiplier: limit.units,
    })
}

fn verdict(answer: RateLimitResponse) -> Verdict {
    let RateLimitResponse {
        overall_code,
        statuses,
        response_headers_to_add,
        request_headers_to_add,
        raw_body,
        dynamic_metadata,
        // Envoy takes no account of it either.
        quota: _,
    } = answer;
    Verdict {
        over: overall_code == i32::from(Code::OverLimit),
        statuses: statuses.into_iter().map(status).collect(),
        response: headers(response_headers_to_add),
        request: headers(request_headers_to_add),
        body: raw_body.into(),
        metadata: dynamic_metadata.as_ref().map(json),
    }
}

fn headers(list: Vec<HeaderValue>) -> Vec<(String, Vec<u8>)> {
    let one = |m: HeaderValue| {
        let value = match m.raw_value.is_empty() {
            true => m.value.into_bytes(),
            false => m.raw_value,
        };
        (m.key.to_ascii_lowercase(), value)
    };
    list.into_iter().map(one).collect()
}

fn status(m: DescriptorStatus) -> LimitStatus {
    let reset = m.duration_until_reset.map_or(0, |reset| reset.seconds);
    let current = m.current_limit;
    LimitStatus {
        over: m.code == i32::from(Code::OverLimit),
        remaining: m.limit_remaining,
        reset: u64::try_from(reset).unwrap_or(0),
        limit: current.map(|limit| {
            let unit = match Unit::try_from(limit.unit).unwrap_or(Unit::Unknown) {
                Unit::Unknown => 0,
                Unit::Second => 1,
                Unit::Minute => 60,
                Unit::Hour => 60 * 60,
                Unit::Day => 24 * 60 * 60,
                Unit::Week => 7 * 24 * 60 * 60,
                Unit::Month => 30 * 24 * 60 * 60,
                Unit::Year => 365 * 24 * 60 * 60,
            };
            let window = unit * u64::from(limit.unit_multiplier.unwrap_or(1));
            (limit.requests_per_unit, window, limit.name)
        }),
    }
}
