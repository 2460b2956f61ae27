//! What a route tells single HTTP filters: faults and CORS.

use std::collections::BTreeMap;

use config::validate::GRPC_STATUS;
use proto::{
    Any, any,
    envoy::{
        config::core::v3::RuntimeFractionalPercent,
        extensions::filters::{
            common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier},
            http::{
                cors::v3::CorsPolicy as EnvoyCorsPolicy,
                fault::v3::{FaultAbort, HttpFault, fault_abort},
            },
        },
        r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
    },
    istio::networking::v1alpha3::{
        CorsPolicy, HttpFaultInjection, HttpRoute, Percent,
        cors_policy::UnmatchedPreflights,
        http_fault_injection::{Abort, Delay, abort::ErrorType, delay::HttpDelayType},
    },
};

use super::matching::{exact, string_matcher};

/// Name of the fault filter, in the listener and on routes.
pub const FAULT: &str = "envoy.filters.http.fault";
/// Name of the CORS filter, in the listener and on routes.
pub const CORS: &str = "envoy.filters.http.cors";

/// The per-filter settings of a rule.
pub(super) fn per_filter_config(rule: &HttpRoute) -> BTreeMap<String, Any> {
    let mut out = BTreeMap::new();
    if let Some(fault) = rule.fault.as_ref().and_then(fault) {
        out.insert(FAULT.to_owned(), any::pack(&fault));
    }
    if let Some(policy) = &rule.cors_policy {
        out.insert(CORS.to_owned(), any::pack(&cors(policy)));
    }
    out
}

/// A share of requests in millionths, cut off as Istio does (12.5 % → 125000).
pub(super) fn millionths(percent: &Percent) -> FractionalPercent {
    FractionalPercent {
        numerator: (percent.value * 10_000.0) as u32,
        denominator: DenominatorType::Million.into(),
    }
}

/// A share of requests in whole per cent.
pub(super) fn hundredths(percent: u32) -> FractionalPercent {
    FractionalPercent {
        numerator: percent,
        denominator: DenominatorType::Hundred.into(),
    }
}

fn fault(f: &HttpFaultInjection) -> Option<HttpFault> {
    let out = HttpFault {
        delay: f.delay.as_ref().and_then(delay),
        abort: f.abort.as_ref().and_then(abort),
        ..Default::default()
    };
    (out.delay.is_some() || out.abort.is_some()).then_some(out)
}

fn delay(d: &Delay) -> Option<FaultDelay> {
    let Some(HttpDelayType::FixedDelay(fixed)) = d.http_delay_type else {
        return None;
    };
    let percentage = match &d.percentage {
        Some(p) => millionths(p),
        None => hundredths(d.percent.max(0) as u32),
    };
    Some(FaultDelay {
        percentage: Some(percentage),
        fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(fixed)),
    })
}

fn abort(a: &Abort) -> Option<FaultAbort> {
    let error = match a.error_type.as_ref()? {
        ErrorType::HttpStatus(code) => fault_abort::ErrorType::HttpStatus((*code).max(0) as u32),
        ErrorType::GrpcStatus(name) => fault_abort::ErrorType::GrpcStatus(grpc_status(name)),
        ErrorType::Http2Error(_) => return None,
    };
    Some(FaultAbort {
        percentage: a.percentage.as_ref().map(millionths),
        error_type: Some(error),
        ..Default::default()
    })
}

/// The number of a gRPC status by its canonical name; a name that validation lets through is one of these.
fn grpc_status(name: &str) -> u32 {
    GRPC_STATUS.iter().position(|n| *n == name).unwrap_or(0) as u32
}

fn cors(policy: &CorsPolicy) -> EnvoyCorsPolicy {
    let origins = if policy.allow_origins.is_empty() {
        policy.allow_origin.iter().map(|o| exact(o)).collect()
    } else {
        policy
            .allow_origins
            .iter()
            .filter_map(string_matcher)
            .collect()
    };
    let ignore = policy.unmatched_preflights == UnmatchedPreflights::Ignore as i32;
    EnvoyCorsPolicy {
        allow_origin_string_match: origins,
        allow_methods: policy.allow_methods.join(","),
        allow_headers: policy.allow_headers.join(","),
        expose_headers: policy.expose_headers.join(","),
        max_age: policy
            .max_age
            .map(|d| d.seconds.to_string())
            .unwrap_or_default(),
        allow_credentials: policy.allow_credentials,
        filter_enabled: Some(RuntimeFractionalPercent {
            default_value: Some(hundredths(100)),
            ..Default::default()
        }),
        forward_not_matching_preflights: Some(!ignore),
        ..Default::default()
    }
}
