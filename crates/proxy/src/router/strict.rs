//! The router's `strict_check_headers`: what a client says to the router must be readable.

use crate::{
    http::{Exchange, Flags, LocalReply},
    plan::retry::RetryOn,
};

/// Refuses a request in which one of `names` has a value that the router would otherwise pass over.
pub(crate) fn check(
    names: &[std::sync::Arc<str>],
    exchange: &Exchange<'_>,
) -> Result<(), LocalReply> {
    for name in names {
        let Some(value) = exchange.request.headers.get(name) else {
            continue;
        };
        let valid = std::str::from_utf8(value).is_ok_and(|value| match &**name {
            "x-envoy-retry-on" => RetryOn::knows(value, false),
            "x-envoy-retry-grpc-on" => RetryOn::knows(value, true),
            _ => value.parse::<u32>().is_ok(),
        });
        if !valid {
            let value = String::from_utf8_lossy(value);
            let body = format!("invalid header '{name}' with value '{value}'");
            let details = format!("request_headers_failed_strict_check{{{name}}}");
            return Err(LocalReply::new(400, "", details)
                .body(body)
                .flag(Flags::INVALID_ENVOY_HEADERS));
        }
    }
    Ok(())
}
