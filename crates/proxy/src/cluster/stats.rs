//! What a cluster counts (`cluster.NAME.`), with Envoy's names.

use super::shared::{BreakerShared, Tally};
use crate::plan::cluster::Thresholds;

stats::group! {
    /// Counts of one cluster in one worker; each exists from its first use.
    pub struct ClusterStats {
        counter bind_errors,
        counter lb_healthy_panic,
        counter lb_local_cluster_not_ok,
        counter lb_recalculate_zone_structures,
        counter lb_subsets_created,
        counter lb_subsets_fallback,
        counter lb_subsets_fallback_panic,
        counter lb_subsets_removed,
        counter lb_subsets_selected,
        counter lb_zone_cluster_too_small,
        counter lb_zone_no_capacity_left,
        counter lb_zone_routing_all_directly,
        counter lb_zone_routing_cross_zone,
        counter lb_zone_routing_sampled,
        counter original_dst_host_invalid,
        counter retry_or_shadow_abandoned,
        counter upstream_cx_close_notify,
        counter upstream_cx_connect_attempts_exceeded,
        counter upstream_cx_connect_fail,
        counter upstream_cx_connect_timeout,
        counter upstream_cx_destroy,
        counter upstream_cx_destroy_local,
        counter upstream_cx_destroy_local_with_active_rq,
        counter upstream_cx_destroy_remote,
        counter upstream_cx_destroy_remote_with_active_rq,
        counter upstream_cx_destroy_with_active_rq,
        counter upstream_cx_http1_total,
        counter upstream_cx_http2_total,
        counter upstream_cx_idle_timeout,
        counter upstream_cx_max_duration_reached,
        counter upstream_cx_max_requests,
        counter upstream_cx_none_healthy,
        counter upstream_cx_overflow,
        counter upstream_cx_pool_overflow,
        counter upstream_cx_protocol_error,
        counter upstream_cx_rx_bytes_total,
        counter upstream_cx_total,
        counter upstream_cx_tx_bytes_total,
        counter upstream_internal_redirect_failed_total,
        counter upstream_internal_redirect_succeeded_total,
        counter upstream_rq_cancelled,
        counter upstream_rq_completed,
        counter upstream_rq_drop_overload,
        counter upstream_rq_maintenance_mode,
        counter upstream_rq_max_duration_reached,
        counter upstream_rq_pending_failure_eject,
        counter upstream_rq_pending_overflow,
        counter upstream_rq_pending_total,
        counter upstream_rq_per_try_idle_timeout,
        counter upstream_rq_per_try_timeout,
        counter upstream_rq_retry,
        counter upstream_rq_retry_backoff_exponential,
        counter upstream_rq_retry_backoff_ratelimited,
        counter upstream_rq_retry_limit_exceeded,
        counter upstream_rq_retry_overflow,
        counter upstream_rq_retry_success,
        counter upstream_rq_retry_unsafe,
        counter upstream_rq_rx_reset,
        counter upstream_rq_timeout,
        counter upstream_rq_total,
        counter upstream_rq_tx_reset,
        counter upstream_rq_1xx,
        counter upstream_rq_2xx,
        counter upstream_rq_3xx,
        counter upstream_rq_4xx,
        counter upstream_rq_5xx,
        gauge lb_subsets_active,
        gauge lb_subsets_single_host_per_subset_duplicate,
        gauge upstream_cx_active,
        gauge upstream_cx_tx_bytes_buffered,
        gauge upstream_rq_active,
        gauge upstream_rq_pending_active,
        histogram upstream_cx_connect_ms,
        histogram upstream_cx_length_ms,
        histogram upstream_rq_time,
    }
}

stats::group! {
    /// How near a cluster is to its limits (`cluster.NAME.circuit_breakers.PRIORITY.`). The counts are shared by all
    /// workers, so the main thread alone tells them, when it is asked.
    pub struct BreakerStats {
        gauge cx_open,
        gauge cx_pool_open,
        gauge remaining_cx,
        gauge remaining_cx_pools,
        gauge remaining_pending,
        gauge remaining_retries,
        gauge remaining_rq,
        gauge rq_open,
        gauge rq_pending_open,
        gauge rq_retry_open,
    }
}

impl BreakerStats {
    /// Tells what stands now.
    pub(super) fn publish(&self, limits: &Thresholds, shared: &BreakerShared) {
        let left = |tally: &Tally, limit: u32| limit.saturating_sub(tally.count());
        let connections = left(&shared.connections, limits.max_connections);
        let pending = left(&shared.pending, limits.max_pending_requests);
        let requests = left(&shared.requests, limits.max_requests);
        let retries = left(&shared.retries, shared.retries_allowed(limits));
        let pools = limits
            .max_connection_pools
            .map(|limit| left(&shared.pools, limit));
        let open = |left: u32| i64::from(left == 0);
        self.cx_open().set(open(connections));
        self.rq_pending_open().set(open(pending));
        self.rq_open().set(open(requests));
        self.rq_retry_open().set(open(retries));
        self.cx_pool_open().set(pools.map_or(0, open));
        if limits.track_remaining {
            self.remaining_cx().set(connections.into());
            self.remaining_pending().set(pending.into());
            self.remaining_rq().set(requests.into());
            self.remaining_retries().set(retries.into());
            if let Some(pools) = pools {
                self.remaining_cx_pools().set(pools.into());
            }
        }
    }
}

impl ClusterStats {
    /// Counts a response by the class of its status.
    pub(super) fn response(&self, status: u16) {
        self.upstream_rq_completed().inc();
        match status / 100 {
            1 => self.upstream_rq_1xx().inc(),
            2 => self.upstream_rq_2xx().inc(),
            3 => self.upstream_rq_3xx().inc(),
            4 => self.upstream_rq_4xx().inc(),
            5 => self.upstream_rq_5xx().inc(),
            _ => {}
        }
    }
}
