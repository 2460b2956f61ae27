//! What a listener counts (`listener.ADDRESS.`), with Envoy's names.

stats::group! {
    /// Counts of one listener in one worker.
    pub(crate) struct ListenerStats {
        counter downstream_cx_destroy,
        counter downstream_cx_overflow,
        counter downstream_cx_overload_reject,
        counter downstream_cx_total,
        counter downstream_cx_transport_socket_connect_timeout,
        counter downstream_global_cx_overflow,
        counter downstream_listener_filter_error,
        counter downstream_listener_filter_remote_close,
        counter downstream_pre_cx_timeout,
        counter no_filter_chain_match,
        gauge downstream_cx_active,
        gauge downstream_pre_cx_active,
        histogram connections_accepted_per_socket_event,
        histogram downstream_cx_length_ms,
    }
}

stats::group! {
    /// The same of one worker alone (`listener.ADDRESS.worker_N.`): whether work is spread.
    pub(crate) struct WorkerStats {
        counter downstream_cx_total,
        gauge downstream_cx_active,
    }
}
