//! What can be wrong with certificates, keys and lists.

/// Why a piece of configuration cannot be used. Says what is wrong, never what is in a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or a block that is cut off.
    #[error("{what} is not PEM: {reason}")]
    Pem {
        /// Which part.
        what: &'static str,
        /// What the reader said.
        reason: String,
    },
    /// PEM without the block that is needed.
    #[error("{what} holds no {block} block")]
    Missing {
        /// Which part.
        what: &'static str,
        /// `CERTIFICATE`, `PRIVATE KEY`, …
        block: &'static str,
    },
    /// More than the limit.
    #[error("{what} is larger than {limit}")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// The limit, with its unit.
        limit: String,
    },
    /// A certificate that is not X.509.
    #[error("certificate {index} of {what} cannot be read: {reason}")]
    Certificate {
        /// Which part.
        what: &'static str,
        /// From 0.
        index: usize,
        /// What the reader said.
        reason: String,
    },
    /// A key of a kind that is not supported (RSA of 2048 to 8192 bits, ECDSA P-256, P-384 and P-521, Ed25519).
    #[error("private key cannot be used: {0}")]
    Key(String),
    /// The key is not the certificate's.
    #[error("the private key does not belong to the certificate")]
    Mismatch,
    /// A revocation list that cannot be read.
    #[error("revocation list {index} cannot be read: {reason}")]
    RevocationList {
        /// From 0.
        index: usize,
        /// What the reader said.
        reason: String,
    },
    /// No version, suite or group is left, or they do not go together.
    #[error("{0}")]
    Parameters(String),
}
