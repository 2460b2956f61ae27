//! Why there is no upstream connection.

/// Why a request or a connection got no upstream. The response flag is Envoy's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    /// The cluster has no host that may be used (UH).
    #[error("no healthy upstream")]
    NoHealthyHost,
    /// The cluster has no such host as the session wants, and no other will do (UH).
    #[error("the host of the session is not there")]
    NoSuchHost,
    /// The cluster is to be relieved of a share of its requests (DO).
    #[error("drop overload")]
    DropOverload,
    /// The runtime says that the cluster is under maintenance (UO).
    #[error("maintenance mode")]
    MaintenanceMode,
    /// A limit of the cluster's circuit breakers is reached (UO).
    #[error("circuit breaker: {0} reached; raise it in the cluster's connection pool settings")]
    Overflow(&'static str),
    /// The host refused or could not be reached (UF).
    #[error("connect: {0}")]
    Connect(String),
    /// The host did not answer within the connect timeout (UF).
    #[error("connect timeout")]
    ConnectTimeout,
    /// The host wants TLS, for which there is no certificate yet (UF).
    #[error("TLS_error: Secret is not supplied by SDS: `{0}`")]
    NoCertificate(String),
    /// The host and we did not agree on TLS (UF).
    #[error("{0}")]
    Tls(String),
    /// An HTTP/2 connection broke before it could take the request (UF).
    #[error("protocol: {0}")]
    Protocol(String),
}

impl UpstreamError {
    /// Envoy's response flag.
    pub fn response_flag(&self) -> &'static str {
        match self {
            Self::NoHealthyHost | Self::NoSuchHost => "UH",
            Self::DropOverload => "DO",
            Self::MaintenanceMode | Self::Overflow(_) => "UO",
            Self::Connect(_)
            | Self::ConnectTimeout
            | Self::NoCertificate(_)
            | Self::Tls(_)
            | Self::Protocol(_) => "UF",
        }
    }

    /// Envoy's `%UPSTREAM_TRANSPORT_FAILURE_REASON%`; empty where the transport did not fail.
    pub fn transport_failure_reason(&self) -> String {
        match self {
            Self::NoHealthyHost
            | Self::NoSuchHost
            | Self::DropOverload
            | Self::MaintenanceMode
            | Self::Overflow(_)
            | Self::ConnectTimeout => String::new(),
            Self::Connect(reason) => format!("delayed connect error: {reason}"),
            Self::NoCertificate(_) | Self::Tls(_) | Self::Protocol(_) => self.to_string(),
        }
    }

    /// Whether the failure says something about the host.
    pub fn is_host_failure(&self) -> bool {
        matches!(
            self,
            Self::Connect(_) | Self::ConnectTimeout | Self::Tls(_) | Self::Protocol(_)
        )
    }
}
