//! Names and defaults of an older Istio release, on request (`control --compat 1.13`).

use std::{fmt, str::FromStr};

/// Which release's names and defaults are given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compat {
    /// Today's.
    #[default]
    Current,
    /// Istio 1.13's: two inbound passthrough clusters, 503 retried, no inbound retries, no accept limit.
    V1_13,
}

/// The release is not one that we can imitate.
#[derive(Debug, thiserror::Error)]
#[error(
    "unknown release {0:?} to be compatible with: give 1.13, or leave the flag out for today's names"
)]
pub struct UnknownRelease(String);

impl FromStr for Compat {
    type Err = UnknownRelease;

    fn from_str(text: &str) -> Result<Compat, UnknownRelease> {
        match text {
            "" | "current" => Ok(Compat::Current),
            "1.13" => Ok(Compat::V1_13),
            other => Err(UnknownRelease(other.to_owned())),
        }
    }
}

impl fmt::Display for Compat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compat::Current => "current",
            Compat::V1_13 => "1.13",
        })
    }
}

impl Compat {
    /// Status codes that are retried unless the user says otherwise.
    pub fn default_retriable_codes(self) -> &'static [u32] {
        match self {
            Compat::Current => &[],
            Compat::V1_13 => &[503],
        }
    }

    /// Whether inbound routes retry requests that cannot have reached the application.
    pub fn retries_inbound(self) -> bool {
        self == Compat::Current
    }

    /// Whether mirrored requests keep their host as it is, rather than with `-shadow` appended.
    pub fn disable_shadow_host_suffix(self) -> bool {
        self == Compat::Current
    }

    /// The cluster of inbound connections to ports that no service names.
    pub fn inbound_passthrough_cluster(self) -> &'static str {
        match self {
            Compat::Current => "InboundPassthroughCluster",
            Compat::V1_13 => "InboundPassthroughClusterIpv4",
        }
    }

    /// How many connections a listener takes per wake-up; `None` is Envoy's default, all.
    pub fn max_connections_per_event(self) -> Option<u32> {
        match self {
            Compat::Current => Some(1),
            Compat::V1_13 => None,
        }
    }

    /// What ends the first part of the names of an HTTP listener's statistics.
    pub fn stat_prefix_end(self) -> &'static str {
        match self {
            Compat::Current => ";",
            Compat::V1_13 => "",
        }
    }

    /// Networks that the inbound chains for all ports say they match.
    pub fn inbound_passthrough_networks(self) -> &'static [&'static str] {
        match self {
            Compat::Current => &[],
            Compat::V1_13 => &["0.0.0.0/0"],
        }
    }

    /// Whether a caller's grpc-timeout is limited by the newer of the two fields for it.
    pub fn limits_streams(self) -> bool {
        self == Compat::V1_13
    }

    /// Whether hosts are also served under their absolute name with a trailing dot.
    pub fn absolute_domains(self) -> bool {
        self == Compat::Current
    }

    /// Whether virtual hosts list `host:port` beside `host`, rather than ignoring the port.
    pub fn port_domains(self) -> bool {
        self == Compat::V1_13
    }
}
