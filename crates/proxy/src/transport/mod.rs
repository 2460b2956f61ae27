//! TLS on connections of both sides: contexts come to life, secrets reach the workers, handshakes are made and counted.
//!
//! The main thread reads certificates, keys and authorities ([`Keeper`]): from the configuration, from files, from SDS. It
//! puts them into [`Secrets`], which all threads share. A worker builds what a listener's chain ([`Downstream`]) or
//! a cluster ([`Upstreams`]) needs at the first handshake, and again when one of its secrets has changed: new
//! handshakes use the new ones, connections that are open go on as they are.

mod context;
mod downstream;
mod keeper;
mod material;
mod metadata_exchange;
mod stats;
mod store;
mod upstream;

pub(crate) use downstream::Downstream;
pub(crate) use keeper::{Keeper, Owner, of_cluster, of_listener, secrets_of_listener, stamp};
pub(crate) use material::{Material, Source};
pub(crate) use metadata_exchange::{exchange, own};
pub(crate) use store::{Secrets, print};
pub use upstream::AutoName;
pub(crate) use upstream::{Offer, Upstreams};

/// Why a handshake did not lead to a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// A secret has not come yet.
    #[error("TLS_error: Secret is not supplied by SDS: `{0}`")]
    NotReady(String),
    /// The secrets are there, and nothing can be made of them.
    #[error("TLS_error: {0}")]
    Context(String),
    /// The peers did not agree.
    #[error("{}", .0.reason)]
    Failed(tls::session::Failure),
    /// The connection broke.
    #[error("{0}")]
    Io(String),
    /// It took too long.
    #[error("TLS_error: the handshake took too long")]
    Timeout,
}

impl From<std::io::Error> for HandshakeError {
    fn from(error: std::io::Error) -> Self {
        match tls::session::Failure::of(&error) {
            Some(failure) => Self::Failed(failure),
            None => Self::Io(error.to_string()),
        }
    }
}
