//! Active health checks: what a host is asked, how often, and when the answer counts.

use std::{ops::RangeInclusive, path::PathBuf, sync::Arc, time::Duration};

use super::{
    Metadata,
    header::AppendAction,
    matcher::{HeaderMatcher, Percent, StringMatcher},
};
use crate::proxy_protocol::Version;

/// `envoy.config.core.v3.HealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked.
    pub checker: Checker,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Between two checks of a host.
    pub interval: Duration,
    /// Before the first check, at random up to this. Default 0.
    pub initial_jitter: Duration,
    /// Added to each interval, at random up to this. Default 0.
    pub interval_jitter: Duration,
    /// Added to each interval, at random up to this percentage of it. Default 0.
    pub interval_jitter_percent: u32,
    /// Failures that make a healthy host unhealthy; an answer that is plainly wrong does so at once.
    pub unhealthy_threshold: u32,
    /// Successes that make an unhealthy host healthy; the very first check needs one.
    pub healthy_threshold: u32,
    /// A connection serves several checks. Default true.
    pub reuse_connection: bool,
    /// While the cluster has had no connection. Default 60 s.
    pub no_traffic_interval: Duration,
    /// The same, for healthy hosts. Default as above.
    pub no_traffic_healthy_interval: Duration,
    /// For unhealthy hosts. Default `interval`.
    pub unhealthy_interval: Duration,
    /// After a failure that has not made the host unhealthy yet. Default `unhealthy_interval`.
    pub unhealthy_edge_interval: Duration,
    /// After a success that has not made the host healthy yet. Default `interval`.
    pub healthy_edge_interval: Duration,
    /// In stats `health_check.name.<name>.health_check.` in place of `health_check.`.
    pub name: Option<Arc<str>>,
    /// The transport is the one that an endpoint with this metadata has, in place of the host's own.
    pub transport_match: Option<Metadata>,
    /// Offered in TLS in place of what the cluster's transport says; empty: as it says.
    pub alpn_protocols: Vec<Arc<str>>,
    /// Files that events are appended to.
    pub event_logs: Vec<PathBuf>,
    /// Every failed check is an event.
    pub always_log_failures: bool,
    /// Every passed check is an event.
    pub always_log_success: bool,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checker {
    /// A request and the status of its response.
    Http(Box<HttpCheck>),
    /// Bytes there and back, or only a connection.
    Tcp(TcpCheck),
    /// `grpc.health.v1.Health/Check`.
    Grpc(GrpcCheck),
}

/// `HttpHealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCheck {
    /// Host header; empty: the endpoint's name for checks, else the cluster's name.
    pub host: Arc<str>,
    /// Path with query.
    pub path: Arc<str>,
    /// Upper case. Default GET.
    pub method: Arc<str>,
    /// Body of the request.
    pub send: Arc<[u8]>,
    /// What the body of the response must have, in this order; empty: nothing.
    pub receive: Vec<Arc<[u8]>>,
    /// How much of the body is looked at; 0 is all. Default 1024.
    pub response_buffer_size: u64,
    /// Added to the request: name, value, and what becomes of such a header that is there.
    pub headers_to_add: Vec<(Arc<str>, Arc<str>, AppendAction)>,
    /// Taken off the request.
    pub headers_to_remove: Vec<Arc<str>>,
    /// Statuses that mean healthy. Default 200.
    pub expected_statuses: Vec<RangeInclusive<u16>>,
    /// Statuses that count like a failed connection.
    pub retriable_statuses: Vec<RangeInclusive<u16>>,
    /// HTTP/2 with prior knowledge in place of HTTP/1.1.
    pub http2: bool,
    /// HTTP/2 or HTTP/1.1 as ALPN has agreed on; as above where it has agreed on neither.
    pub http2_by_alpn: bool,
    /// `x-envoy-upstream-healthchecked-cluster` of the response must be this.
    pub service_name: Option<StringMatcher>,
}

/// `TcpHealthCheck`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TcpCheck {
    /// Sent first; empty: a connection is enough.
    pub send: Arc<[u8]>,
    /// What must come back, in this order, with anything in between.
    pub receive: Vec<Arc<[u8]>>,
    /// A PROXY header of this version comes first on each connection.
    pub proxy: Option<Version>,
}

/// `GrpcHealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcCheck {
    /// Service to ask for; empty: the server.
    pub service_name: Arc<str>,
    /// `:authority`; empty: the endpoint's name for checks, else the cluster's name.
    pub authority: Arc<str>,
    /// Metadata of the call.
    pub initial_metadata: Vec<(Arc<str>, Arc<str>)>,
}

/// `envoy.extensions.filters.http.health_check.v3.HealthCheck`: answers the checks that others make of this proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheckFilter {
    /// Checks go on to the upstream, which answers them.
    pub pass_through: bool,
    /// How long an upstream's answer serves for further checks; only with `pass_through`.
    pub cache_time: Option<Duration>,
    /// Clusters of which a share of hosts must be healthy for a good answer.
    pub min_healthy: Vec<(Arc<str>, Percent)>,
    /// Which requests are checks: all of these must fit.
    pub headers: Vec<HeaderMatcher>,
}
