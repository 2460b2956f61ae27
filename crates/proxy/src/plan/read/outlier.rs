//! Outlier detection.

use std::time::Duration;

use proto::envoy::config::cluster::v3 as pb;

use super::common::{above_zero, duration};
use crate::plan::{
    cluster::{FailurePercentage, OutlierDetection, SuccessRate},
    error::{At, Step, unsupported},
};

/// `OutlierDetection`.
pub(super) fn outlier_detection(at: At<'_>, m: &pb::OutlierDetection) -> Step<OutlierDetection> {
    let pb::OutlierDetection {
        consecutive_5xx,
        interval,
        base_ejection_time,
        max_ejection_percent,
        enforcing_consecutive_5xx,
        enforcing_success_rate,
        success_rate_minimum_hosts,
        success_rate_request_volume,
        success_rate_stdev_factor,
        consecutive_gateway_failure,
        enforcing_consecutive_gateway_failure,
        split_external_local_origin_errors,
        consecutive_local_origin_failure,
        enforcing_consecutive_local_origin_failure,
        enforcing_local_origin_success_rate,
        failure_percentage_threshold,
        enforcing_failure_percentage,
        enforcing_failure_percentage_local_origin,
        failure_percentage_minimum_hosts,
        failure_percentage_request_volume,
        max_ejection_time,
        max_ejection_time_jitter,
        successful_active_health_check_uneject_host,
        monitors,
        always_eject_one_host,
        detect_degraded_hosts,
    } = m;
    unsupported!(at, monitors);
    let share = |field: &str, given: &Option<u32>, default: u32| {
        let value = given.unwrap_or(default);
        if value > 100 {
            at.field(field).error("must be at most 100");
        }
        value
    };
    let base = above_zero(&at, "base_ejection_time", base_ejection_time)?
        .unwrap_or(Duration::from_secs(30));
    let longest = above_zero(&at, "max_ejection_time", max_ejection_time)?
        .unwrap_or(Duration::from_secs(300).max(base));
    if longest < base {
        at.field("max_ejection_time")
            .error("must not be shorter than base_ejection_time");
    }
    Ok(OutlierDetection {
        consecutive_5xx: consecutive_5xx.unwrap_or(5),
        enforcing_consecutive_5xx: share(
            "enforcing_consecutive_5xx",
            enforcing_consecutive_5xx,
            100,
        ),
        consecutive_gateway_failure: consecutive_gateway_failure.unwrap_or(5),
        enforcing_consecutive_gateway_failure: share(
            "enforcing_consecutive_gateway_failure",
            enforcing_consecutive_gateway_failure,
            0,
        ),
        consecutive_local_origin_failure: consecutive_local_origin_failure.unwrap_or(5),
        enforcing_consecutive_local_origin_failure: share(
            "enforcing_consecutive_local_origin_failure",
            enforcing_consecutive_local_origin_failure,
            100,
        ),
        split_external_local_origin_errors: *split_external_local_origin_errors,
        interval: above_zero(&at, "interval", interval)?.unwrap_or(Duration::from_secs(10)),
        base_ejection_time: base,
        max_ejection_time: longest,
        max_ejection_time_jitter: at
            .optional(
                "max_ejection_time_jitter",
                max_ejection_time_jitter,
                duration,
            )?
            .unwrap_or_default(),
        max_ejection_percent: share("max_ejection_percent", max_ejection_percent, 10),
        detect_degraded_hosts: detect_degraded_hosts.unwrap_or(false),
        always_eject_one_host: always_eject_one_host.unwrap_or(false),
        uneject_on_health_check: successful_active_health_check_uneject_host.unwrap_or(true),
        success_rate: SuccessRate {
            enforcing: share("enforcing_success_rate", enforcing_success_rate, 100),
            enforcing_local_origin: share(
                "enforcing_local_origin_success_rate",
                enforcing_local_origin_success_rate,
                100,
            ),
            minimum_hosts: success_rate_minimum_hosts.unwrap_or(5),
            request_volume: success_rate_request_volume.unwrap_or(100),
            stdev_factor: success_rate_stdev_factor.unwrap_or(1900),
        },
        failure_percentage: FailurePercentage {
            threshold: share(
                "failure_percentage_threshold",
                failure_percentage_threshold,
                85,
            ),
            enforcing: share(
                "enforcing_failure_percentage",
                enforcing_failure_percentage,
                0,
            ),
            enforcing_local_origin: share(
                "enforcing_failure_percentage_local_origin",
                enforcing_failure_percentage_local_origin,
                0,
            ),
            minimum_hosts: failure_percentage_minimum_hosts.unwrap_or(5),
            request_volume: failure_percentage_request_volume.unwrap_or(50),
        },
    })
}
