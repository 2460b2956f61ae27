//! Response flags: why a request ended as it did, in Envoy's short and long words.

/// A set of response flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags(u32);

macro_rules! flags {
    ($($(#[$meta:meta])* $name:ident = $bit:literal, $short:literal, $long:literal;)*) => {
        impl Flags {
            $($(#[$meta])* pub const $name: Flags = Flags(1 << $bit);)*
        }

        const NAMES: &[(Flags, &str, &str)] = &[$((Flags::$name, $short, $long),)*];
    };
}

flags! {
    // First, since Envoy lists flags as they were set, and this one before why the last attempt failed.
    /// The retry limit was reached.
    UPSTREAM_RETRY_LIMIT_EXCEEDED = 15, "URX", "UpstreamRetryLimitExceeded";
    /// The local service failed its health check.
    FAILED_LOCAL_HEALTH_CHECK = 0, "LH", "FailedLocalHealthCheck";
    /// No healthy host in the cluster.
    NO_HEALTHY_UPSTREAM = 1, "UH", "NoHealthyUpstream";
    /// The upstream did not answer in time.
    UPSTREAM_REQUEST_TIMEOUT = 2, "UT", "UpstreamRequestTimeout";
    /// The proxy reset the stream.
    LOCAL_RESET = 3, "LR", "LocalReset";
    /// The upstream reset the stream.
    UPSTREAM_REMOTE_RESET = 4, "UR", "UpstreamRemoteReset";
    /// No connection to the upstream.
    UPSTREAM_CONNECTION_FAILURE = 5, "UF", "UpstreamConnectionFailure";
    /// The upstream closed the connection.
    UPSTREAM_CONNECTION_TERMINATION = 6, "UC", "UpstreamConnectionTermination";
    /// A circuit breaker.
    UPSTREAM_OVERFLOW = 7, "UO", "UpstreamOverflow";
    /// No route.
    NO_ROUTE_FOUND = 8, "NR", "NoRouteFound";
    /// Delayed by a fault.
    DELAY_INJECTED = 9, "DI", "DelayInjected";
    /// Aborted by a fault.
    FAULT_INJECTED = 10, "FI", "FaultInjected";
    /// Rate limited.
    RATE_LIMITED = 11, "RL", "RateLimited";
    /// Denied by an external authorization.
    UNAUTHORIZED_EXTERNAL = 12, "UAEX", "UnauthorizedExternalService";
    /// The rate limit service failed.
    RATELIMIT_SERVICE_ERROR = 13, "RLSE", "RateLimitServiceError";
    /// The client went away.
    DOWNSTREAM_CONNECTION_TERMINATION = 14, "DC", "DownstreamConnectionTermination";
    /// Nothing happened for too long.
    STREAM_IDLE_TIMEOUT = 16, "SI", "StreamIdleTimeout";
    /// An x-envoy header with a bad value.
    INVALID_ENVOY_HEADERS = 17, "IH", "InvalidEnvoyRequestHeaders";
    /// The client broke the protocol.
    DOWNSTREAM_PROTOCOL_ERROR = 18, "DPE", "DownstreamProtocolError";
    /// The stream lived too long.
    UPSTREAM_MAX_STREAM_DURATION = 19, "UMSDR", "UpstreamMaxStreamDurationReached";
    /// Answered from a cache.
    RESPONSE_FROM_CACHE = 20, "RFCF", "ResponseFromCacheFilter";
    /// A filter's configuration is missing.
    NO_FILTER_CONFIG = 21, "NFCF", "NoFilterConfigFound";
    /// The stream or connection lived too long.
    DURATION_TIMEOUT = 22, "DT", "DurationTimeout";
    /// The upstream broke the protocol.
    UPSTREAM_PROTOCOL_ERROR = 23, "UPE", "UpstreamProtocolError";
    /// The cluster does not exist.
    NO_CLUSTER_FOUND = 24, "NC", "NoClusterFound";
    /// The overload manager.
    OVERLOAD_MANAGER = 25, "OM", "OverloadManagerTerminated";
    /// A name did not resolve.
    DNS_RESOLUTION_FAILED = 26, "DF", "DnsResolutionFailed";
    /// Refused because the process is overloaded.
    DROP_OVERLOAD = 27, "DO", "DropOverload";
    /// The client reset the stream (HTTP/2).
    DOWNSTREAM_REMOTE_RESET = 28, "DR", "DownstreamRemoteReset";
}

impl Flags {
    /// Adds flags.
    pub fn add(&mut self, flags: Flags) {
        self.0 |= flags.0;
    }

    /// Whether one of `flags` is set.
    pub fn has(self, flags: Flags) -> bool {
        self.0 & flags.0 != 0
    }

    /// Whether none is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// As a number, with the bits that Envoy gives them.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The flag with this short name.
    pub fn from_short(short: &str) -> Option<Flags> {
        NAMES
            .iter()
            .find(|(_, name, _)| *name == short)
            .map(|(flag, ..)| *flag)
    }

    /// Their short names.
    pub fn short(self) -> impl Iterator<Item = &'static str> {
        NAMES
            .iter()
            .filter(move |(flag, ..)| self.has(*flag))
            .map(|(_, short, _)| *short)
    }

    /// Their long names.
    pub fn long(self) -> impl Iterator<Item = &'static str> {
        NAMES
            .iter()
            .filter(move |(flag, ..)| self.has(*flag))
            .map(|(.., long)| *long)
    }
}
