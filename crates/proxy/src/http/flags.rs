//! Response flags: why a request ended as it did, in Envoy's short and long words.

/// A set of response flags, which keeps in which order they were set: Envoy lists them so. Each is its number plus one, the
/// first in the lowest [`WIDTH`] bits. Twelve have room; nobody sets as many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags(u64);

const WIDTH: u32 = 5;

macro_rules! flags {
    ($($(#[$meta:meta])* $name:ident = $bit:literal, $short:literal, $long:literal;)*) => {
        impl Flags {
            $($(#[$meta])* pub const $name: Flags = Flags($bit + 1);)*
        }

        const NAMES: &[(Flags, &str, &str)] = &[$((Flags::$name, $short, $long),)*];
    };
}

flags! {
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
    /// The retry limit was reached.
    UPSTREAM_RETRY_LIMIT_EXCEEDED = 15, "URX", "UpstreamRetryLimitExceeded";
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
    /// Adds flags, behind those that are set already.
    pub fn add(&mut self, flags: Flags) {
        for number in flags.numbers() {
            let at = (u64::BITS - self.0.leading_zeros()).next_multiple_of(WIDTH);
            if at + WIDTH <= u64::BITS && self.bits() & (1 << number) == 0 {
                self.0 |= (u64::from(number) + 1) << at;
            }
        }
    }

    /// Whether one of `flags` is set.
    pub fn has(self, flags: Flags) -> bool {
        self.bits() & flags.bits() != 0
    }

    /// Whether none is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// As a number, with the bits that Envoy gives them.
    pub fn bits(self) -> u32 {
        self.numbers().fold(0, |bits, number| bits | 1 << number)
    }

    /// The numbers of their bits, as they were set.
    fn numbers(self) -> impl Iterator<Item = u32> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let number = (rest & ((1 << WIDTH) - 1)).checked_sub(1)?;
            rest >>= WIDTH;
            Some(number as u32)
        })
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
        self.listed().map(|(_, short, _)| *short)
    }

    /// Their long names.
    pub fn long(self) -> impl Iterator<Item = &'static str> {
        self.listed().map(|(.., long)| *long)
    }

    fn listed(self) -> impl Iterator<Item = &'static (Flags, &'static str, &'static str)> {
        self.numbers()
            .filter_map(|number| NAMES.get(number as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_listed_as_they_were_set() {
        let mut flags = Flags::default();
        assert!(flags.is_empty() && flags.short().next().is_none());
        for (number, (flag, ..)) in NAMES.iter().enumerate() {
            assert_eq!(
                flag.bits(),
                1 << number,
                "the list is in the order of the bits"
            );
        }
        flags.add(Flags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
        flags.add(Flags::FAILED_LOCAL_HEALTH_CHECK);
        flags.add(Flags::UPSTREAM_CONNECTION_FAILURE);
        flags.add(Flags::FAILED_LOCAL_HEALTH_CHECK);
        assert_eq!(flags.short().collect::<Vec<_>>(), ["URX", "LH", "UF"]);
        let mut more = Flags::DOWNSTREAM_REMOTE_RESET;
        more.add(flags);
        assert_eq!(more.short().collect::<Vec<_>>(), ["DR", "URX", "LH", "UF"]);
        assert_eq!(more.long().next(), Some("DownstreamRemoteReset"));
        for (flag, ..) in NAMES {
            more.add(*flag);
        }
        assert_eq!(more.short().count(), 12, "the others have no room");
    }
}
