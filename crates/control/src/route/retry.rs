//! Retries: the user's policy, or Istio's default where there is none.

use proto::{
    any,
    envoy::{
        config::{
            retry::previous_priorities::PreviousPrioritiesConfig,
            route::v3::{
                RetryPolicy,
                retry_policy::{
                    RetryBackOff, RetryHostPredicate, RetryPriority, retry_host_predicate,
                    retry_priority,
                },
            },
        },
        extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate,
    },
    istio::networking::v1alpha3::HttpRetry,
};

use crate::compat::Compat;

/// What a retry is tried for where the user says nothing.
const DEFAULT_RETRY_ON: &str =
    "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
/// Inbound, only what cannot have reached the application.
const DEFAULT_INBOUND_RETRY_ON: &str = "reset-before-request";
const STATUS_CODES: &str = "retriable-status-codes";
const DEFAULT_RETRIES: u32 = 2;
const HOST_SELECTION_ATTEMPTS: i64 = 5;
/// Other priorities are tried from the second retry on.
const PRIORITY_UPDATE_FREQUENCY: i32 = 2;

/// The policy of an outbound route; `None` means no retries. With a consistent hash the same host has to be tried
/// again, so hosts that failed are not skipped.
pub(super) fn outbound(
    policy: Option<&HttpRetry>,
    consistent_hash: bool,
    compat: Compat,
) -> Option<RetryPolicy> {
    let mut out = RetryPolicy {
        num_retries: Some(DEFAULT_RETRIES),
        retry_on: DEFAULT_RETRY_ON.to_owned(),
        host_selection_retry_max_attempts: HOST_SELECTION_ATTEMPTS,
        retry_host_predicate: if consistent_hash {
            Vec::new()
        } else {
            vec![previous_hosts()]
        },
        retriable_status_codes: compat.default_retriable_codes().to_vec(),
        ..Default::default()
    };
    let Some(policy) = policy else {
        return Some(out);
    };
    apply_attempts(&mut out, policy)?;
    out.per_try_timeout = policy.per_try_timeout;
    if let Some(ignore) = policy.retry_ignore_previous_hosts {
        out.retry_host_predicate = if ignore {
            vec![previous_hosts()]
        } else {
            Vec::new()
        };
    }
    if policy.retry_remote_localities == Some(true) {
        out.retry_priority = Some(RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".to_owned(),
            config_type: Some(retry_priority::ConfigType::TypedConfig(any::pack(
                &PreviousPrioritiesConfig {
                    update_frequency: PRIORITY_UPDATE_FREQUENCY,
                },
            ))),
        });
    }
    Some(out)
}

/// The policy of an inbound route (`MeshConfig.defaultInboundHttpRetryPolicy`).
pub(super) fn inbound(policy: Option<&HttpRetry>) -> Option<RetryPolicy> {
    let mut out = RetryPolicy {
        num_retries: Some(DEFAULT_RETRIES),
        retry_on: DEFAULT_INBOUND_RETRY_ON.to_owned(),
        ..Default::default()
    };
    if let Some(policy) = policy {
        apply_attempts(&mut out, policy)?;
    }
    Some(out)
}

/// What both directions take from the user: attempts, reasons, back-off.
fn apply_attempts(out: &mut RetryPolicy, policy: &HttpRetry) -> Option<()> {
    out.num_retries = Some(u32::try_from(policy.attempts).ok().filter(|n| *n > 0)?);
    if !policy.retry_on.is_empty() {
        (out.retry_on, out.retriable_status_codes) = reasons(&policy.retry_on);
    }
    out.retry_back_off = policy.backoff.map(|base| RetryBackOff {
        base_interval: Some(base),
        max_interval: None,
    });
    Some(())
}

/// Splits `5xx,503,reset` into Envoy's words and status codes. Codes need their own word to have an effect.
fn reasons(retry_on: &str) -> (String, Vec<u32>) {
    let mut words = Vec::new();
    let mut codes = Vec::new();
    for part in retry_on.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        match part.parse::<u32>() {
            Ok(code) if is_status(code) => codes.push(code),
            _ => words.push(part),
        }
    }
    if !codes.is_empty() && !words.iter().any(|w| w.contains(STATUS_CODES)) {
        words.push(STATUS_CODES);
    }
    // Istio joins the extra word with a comma even where it stands alone.
    let alone = !codes.is_empty() && words == [STATUS_CODES];
    let joined = words.join(",");
    (
        if alone && !retry_on.contains(STATUS_CODES) {
            format!(",{joined}")
        } else {
            joined
        },
        codes,
    )
}

/// Status codes that have a name; other numbers are kept as words, which Envoy then ignores.
fn is_status(code: u32) -> bool {
    matches!(
        code,
        100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431 | 451
            | 500..=508 | 510 | 511
    )
}

fn previous_hosts() -> RetryHostPredicate {
    RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_host_predicate::ConfigType::TypedConfig(any::pack(
            &PreviousHostsPredicate {},
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_among_the_reasons_become_status_codes() {
        assert_eq!(
            reasons("5xx, 503,reset"),
            ("5xx,reset,retriable-status-codes".to_owned(), vec![503])
        );
        assert_eq!(
            reasons("retriable-4xx,999"),
            ("retriable-4xx,999".to_owned(), vec![])
        );
        assert_eq!(
            reasons("retriable-status-codes,418").0,
            "retriable-status-codes"
        );
    }

    #[test]
    fn zero_attempts_means_no_retries() {
        let policy = HttpRetry {
            attempts: 0,
            ..Default::default()
        };
        assert_eq!(outbound(Some(&policy), false, Compat::Current), None);
        assert!(
            outbound(None, true, Compat::Current)
                .unwrap()
                .retry_host_predicate
                .is_empty()
        );
    }

    #[test]
    fn an_older_release_also_retries_503() {
        assert_eq!(
            outbound(None, false, Compat::V1_13)
                .unwrap()
                .retriable_status_codes,
            [503]
        );
    }
}
