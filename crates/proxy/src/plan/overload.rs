//! The overload manager: what is measured, and what is given up when it is too much.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::matcher::Finite;

/// `envoy.config.overload.v3.OverloadManager`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverloadManager {
    /// How often the monitors look. Default 1 s.
    pub refresh_interval: Duration,
    /// What is measured.
    pub monitors: Vec<Monitor>,
    /// What is done, each at most once.
    pub actions: Vec<(Action, Vec<Trigger>)>,
    /// Where load is refused, each at most once.
    pub points: Vec<(ShedPoint, Vec<Trigger>)>,
}

/// Something that is measured, as a share of what there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    /// `overload.<name>.` of its stats; triggers name it.
    pub name: Arc<str>,
    /// What it measures.
    pub kind: MonitorKind,
}

/// What a monitor measures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MonitorKind {
    /// Resident memory of the process, of so many bytes.
    FixedHeap(u64),
    /// Memory of the process's cgroup, of so many bytes or of the cgroup's limit, whichever is less.
    CgroupMemory(Option<u64>),
    /// A number from 0 to 1 in a file.
    Injected(PathBuf),
}

/// When an action or a point applies, from one monitor's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trigger {
    /// Index into [`OverloadManager::monitors`].
    pub monitor: usize,
    /// From which value on, and how much.
    pub kind: TriggerKind,
}

/// The form of a trigger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TriggerKind {
    /// Fully, from this value on.
    Threshold(Finite),
    /// Begins at the first value and grows evenly until the second.
    Scaled(Finite, Finite),
}

impl TriggerKind {
    /// How much applies at a value: 0 to 1.
    pub fn level(&self, value: f64) -> f64 {
        match self {
            Self::Threshold(from) if value >= from.get() => 1.0,
            Self::Threshold(_) => 0.0,
            Self::Scaled(from, to) => {
                ((value - from.get()) / (to.get() - from.get())).clamp(0.0, 1.0)
            }
        }
    }
}

macro_rules! named {
    ($(#[$meta:meta])* $type:ident { $($(#[$about:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $type {
            $($(#[$about])* $variant,)*
        }

        impl $type {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Envoy's name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

named! {
    /// What is done under overload.
    Action {
        /// New requests are answered with 503.
        StopAcceptingRequests = "envoy.overload_actions.stop_accepting_requests",
        /// Responses close their HTTP/1 connection.
        DisableHttpKeepalive = "envoy.overload_actions.disable_http_keepalive",
        /// Connections wait in the kernel.
        StopAcceptingConnections = "envoy.overload_actions.stop_accepting_connections",
        /// Connections are accepted and closed.
        RejectIncomingConnections = "envoy.overload_actions.reject_incoming_connections",
        /// Free memory goes back to the system.
        ShrinkHeap = "envoy.overload_actions.shrink_heap",
    }
}

named! {
    /// Where load can be refused.
    ShedPoint {
        /// A connection is closed as soon as it is accepted.
        TcpListenerAccept = "envoy.load_shed_points.tcp_listener_accept",
        /// A connection is closed when its first bytes should be read as HTTP.
        HcmOnDataCreatingCodec = "envoy.load_shed_points.hcm_ondata_creating_codec",
        /// A request is answered with 503 once its head is read.
        HttpDecodeHeaders = "envoy.load_shed_points.http_connection_manager_decode_headers",
        /// An HTTP/1 request is answered with 503 and its connection closed.
        Http1AbortDispatch = "envoy.load_shed_points.http1_server_abort_dispatch",
        /// An HTTP/2 connection takes no more requests.
        Http2GoAway = "envoy.load_shed_points.http2_server_go_away_on_dispatch",
        /// An HTTP/2 connection is closed.
        Http2GoAwayAndClose = "envoy.load_shed_points.http2_server_go_away_and_close_on_dispatch",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scaled_trigger_grows_evenly() {
        let finite = |value| Finite::new(value).expect("it is finite");
        let scaled = TriggerKind::Scaled(finite(0.5), finite(0.9));
        for (value, level) in [(0.4, 0.0), (0.5, 0.0), (0.7, 0.5), (0.9, 1.0), (2.0, 1.0)] {
            assert!((scaled.level(value) - level).abs() < 1e-9, "{value}");
        }
        let threshold = TriggerKind::Threshold(finite(0.8));
        assert_eq!([threshold.level(0.79), threshold.level(0.8)], [0.0, 1.0]);
    }
}
