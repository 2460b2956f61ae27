//! Retry policies.

use std::time::Duration;

use proto::envoy::{
    config::route::v3::{self as pb, retry_policy as nested},
    extensions::retry::{
        host::omit_host_metadata::v3::OmitHostMetadataConfig,
        priority::previous_priorities::v3::PreviousPrioritiesConfig,
    },
};

use super::common::{
    above_zero, enumeration, extension, header_matcher, header_name, metadata, positive,
};
use crate::plan::{
    error::{At, Step},
    retry::{BackOff, RateLimitedBackOff, ResetFormat, RetryOn, RetryPolicy},
};

/// `RetryPolicy`.
pub(super) fn retry_policy(at: At<'_>, m: &pb::RetryPolicy) -> Step<RetryPolicy> {
    let pb::RetryPolicy {
        retry_on,
        num_retries,
        per_try_timeout,
        per_try_idle_timeout,
        retry_priority,
        retry_host_predicate,
        retry_options_predicates,
        host_selection_retry_max_attempts,
        retriable_status_codes,
        retry_back_off,
        rate_limited_retry_back_off,
        retriable_headers,
        retriable_request_headers,
        // No cluster specifier that could answer anew is accepted.
        refresh_cluster_on_retry: _,
    } = m;
    at.each(
        "retry_options_predicates",
        retry_options_predicates,
        |at, m| {
            // Envoy brings none of its own.
            Err::<(), _>(at.not_implemented(format!(
                "there is no retry options predicate here; remove `{}`",
                m.name
            )))
        },
    );
    let mut avoid_previous_hosts = false;
    let mut omit_canary_hosts = false;
    let mut omit_host_metadata = None;
    at.each("retry_host_predicate", retry_host_predicate, |at, m| {
        let typed = at.field("typed_config");
        let config = match &m.config_type {
            Some(nested::retry_host_predicate::ConfigType::TypedConfig(any)) => {
                Some(extension(&typed, any)?)
            }
            None => None,
        };
        let kind = config.as_ref().map_or(&m.name, |config| &config.name);
        match kind.as_str() {
            "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            | "envoy.retry_host_predicates.previous_hosts" => avoid_previous_hosts = true,
            "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate"
            | "envoy.retry_host_predicates.omit_canary_hosts" => omit_canary_hosts = true,
            "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig" => {
                let config: OmitHostMetadataConfig = match &config {
                    Some(config) => config.decode(&typed)?,
                    None => return Err(typed.error("is required")),
                };
                let wanted = metadata(&config.metadata_match);
                // Without keys it omits nobody, as in Envoy.
                omit_host_metadata = wanted.namespace("envoy.lb").cloned();
            }
            other => {
                return Err(at.not_implemented(format!(
                    "retry host predicate {other} is not implemented; remove it"
                )));
            }
        }
        Ok(())
    });
    let priorities = at.optional("retry_priority", retry_priority, |at, m| {
        let Some(nested::retry_priority::ConfigType::TypedConfig(any)) = &m.config_type else {
            return Err(at.field("typed_config").error("is required"));
        };
        let at = at.field("typed_config");
        let extension = extension(&at, any)?;
        if extension.name
            != "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
        {
            return Err(extension.unknown(&at, "retry priority"));
        }
        let config: PreviousPrioritiesConfig = extension.decode(&at)?;
        u32::try_from(config.update_frequency)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| at.field("update_frequency").error("must be at least 1"))
    })?;
    let codes = at.each(
        "retriable_status_codes",
        retriable_status_codes,
        |at, code| {
            u16::try_from(*code).map_err(|_| at.error(format!("{code} is not an HTTP status")))
        },
    );
    Ok(RetryPolicy {
        retry_on: RetryOn::parse(retry_on),
        num_retries: num_retries.unwrap_or(1),
        per_try_timeout: positive(&at, "per_try_timeout", per_try_timeout)?,
        per_try_idle_timeout: positive(&at, "per_try_idle_timeout", per_try_idle_timeout)?,
        avoid_previous_hosts,
        omit_canary_hosts,
        omit_host_metadata,
        host_selection_max_attempts: match host_selection_retry_max_attempts {
            0 => 1,
            n => u32::try_from(*n).map_err(|_| {
                at.field("host_selection_retry_max_attempts")
                    .error("must not be negative")
            })?,
        },
        previous_priorities_update_frequency: priorities,
        retriable_status_codes: codes,
        retriable_headers: at.each("retriable_headers", retriable_headers, header_matcher),
        retriable_request_headers: at.each(
            "retriable_request_headers",
            retriable_request_headers,
            header_matcher,
        ),
        back_off: at
            .optional("retry_back_off", retry_back_off, back_off)?
            .unwrap_or_default(),
        rate_limited_back_off: at.optional(
            "rate_limited_retry_back_off",
            rate_limited_retry_back_off,
            rate_limited,
        )?,
    })
}

/// `HedgePolicy`: whether it hedges on a timeout of one attempt. Envoy does nothing with the rest, either.
pub(super) fn hedge(at: At<'_>, m: &pb::HedgePolicy) -> Step<bool> {
    let pb::HedgePolicy {
        initial_requests,
        additional_request_chance: _,
        hedge_on_per_try_timeout,
    } = m;
    if *initial_requests == Some(0) {
        at.field("initial_requests").error("must be at least 1");
    }
    Ok(*hedge_on_per_try_timeout)
}

fn back_off(at: At<'_>, m: &nested::RetryBackOff) -> Step<BackOff> {
    let Some(base) = above_zero(&at, "base_interval", &m.base_interval)? else {
        return Err(at.field("base_interval").error("is required"));
    };
    // Envoy takes nothing under a millisecond.
    let base = base.max(Duration::from_millis(1));
    let max = above_zero(&at, "max_interval", &m.max_interval)?.unwrap_or(base * 10);
    if max < base {
        return Err(at
            .field("max_interval")
            .error("must not be shorter than base_interval"));
    }
    Ok(BackOff { base, max })
}

fn rate_limited(at: At<'_>, m: &nested::RateLimitedRetryBackOff) -> Step<RateLimitedBackOff> {
    let headers = at.each("reset_headers", &m.reset_headers, |at, m| {
        let format = match enumeration(&at, "format", m.format)? {
            nested::ResetHeaderFormat::Seconds => ResetFormat::Seconds,
            nested::ResetHeaderFormat::UnixTimestamp => ResetFormat::UnixTimestamp,
        };
        Ok((header_name(&at, "name", &m.name)?, format))
    });
    if headers.is_empty() {
        return Err(at.field("reset_headers").error("needs at least one header"));
    }
    let max = above_zero(&at, "max_interval", &m.max_interval)?;
    Ok(RateLimitedBackOff {
        reset_headers: headers,
        max_interval: max.unwrap_or(Duration::from_secs(300)),
    })
}
