//! Which requests are logged.

use crate::{
    http::{Exchange, Flags},
    plan::access_log::AccessLogFilter,
};

/// Whether the filter lets the request through.
pub(crate) fn passes(filter: &AccessLogFilter, exchange: &Exchange<'_>, random: u64) -> bool {
    match filter {
        AccessLogFilter::StatusCode(comparison) => comparison.holds(exchange.status().into()),
        AccessLogFilter::Duration(comparison) => {
            comparison.holds(exchange.duration().as_millis() as u64)
        }
        AccessLogFilter::NotHealthCheck => exchange.filters.health_check.is_none(),
        AccessLogFilter::Traceable => exchange.traced,
        AccessLogFilter::Fraction {
            fraction,
            use_independent_randomness,
        } => {
            let id = exchange
                .request
                .headers
                .get_str("x-request-id")
                .filter(|_| !use_independent_randomness);
            // The same request is logged at each hop or at none.
            let number = id
                .and_then(|id| u64::from_str_radix(id.get(..8)?, 16).ok())
                .unwrap_or(random);
            fraction.hits(number)
        }
        AccessLogFilter::And(filters) => filters.iter().all(|f| passes(f, exchange, random)),
        AccessLogFilter::Or(filters) => filters.iter().any(|f| passes(f, exchange, random)),
        AccessLogFilter::Expression(expression) => super::cel::holds(expression, exchange),
        AccessLogFilter::Header(matcher) => matcher.matches(exchange),
        AccessLogFilter::ResponseFlags(flags) if flags.is_empty() => !exchange.flags.is_empty(),
        AccessLogFilter::ResponseFlags(flags) => flags
            .iter()
            .any(|flag| Flags::from_short(flag).is_some_and(|flag| exchange.flags.has(flag))),
        AccessLogFilter::GrpcStatus { statuses, exclude } => {
            // Of what was never answered nothing is known: UNKNOWN.
            let status = super::grpc_status::of(exchange).unwrap_or(2);
            let listed = statuses.iter().any(|s| u32::from(*s) == status);
            listed != *exclude
        }
        AccessLogFilter::LogType { types, exclude } => {
            types.contains(&exchange.log_type) != *exclude
        }
        AccessLogFilter::Metadata {
            matcher,
            match_if_key_not_found,
        } => {
            let value = matcher.path.iter().try_fold(
                exchange.dynamic_metadata.get(&*matcher.filter),
                |value, key| value.map(|value| value.get(&**key)),
            );
            match value.flatten() {
                Some(value) => matcher.matches(Some(value)),
                None => *match_if_key_not_found,
            }
        }
    }
}
