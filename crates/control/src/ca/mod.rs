//! The certificate authority: who asks is proven by a token or a certificate, and gets a certificate for the identity
//! that was proven, whatever the request says.
//!
//! [`Authority`] knows which key signs and which roots are given out; [`csr`] says what may be signed; [`token`] proves callers; [`service`] is
//! Istio's `CreateCertificate` over them. Keys live in the state folder (or the folder of a plugged-in authority) and
//! nowhere else: no log, no dump, no watched folder.

mod authority;
mod csr;
mod files;
mod holders;
pub mod service;
mod signer;
pub mod token;

use std::{io, path::PathBuf, time::Duration};

use base::spiffe::{Identity, NotAnIdentity};

pub use authority::{Authority, DEFAULT_OVERLAP, Files};
pub use csr::Csr;

/// Why no certificate was signed, or why there is nobody to sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: others may read it; make it 0600 and its folder 0700", path.display())]
    Exposed { path: PathBuf },
    #[error(
        "{}: of ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem only some are there ({missing} is missing); \
         a plugged-in authority needs all of them",
        folder.display()
    )]
    Incomplete {
        folder: PathBuf,
        missing: &'static str,
    },
    #[error("{}: {problem}", path.display())]
    Pem { path: PathBuf, problem: String },
    #[error("the certificate of the authority is not valid now (until {until}): replace it")]
    AuthorityExpired { until: String },
    #[error("certificate request: {0}")]
    Csr(String),
    #[error("certificate request: it asks for {asked}, the caller is {caller}")]
    OtherIdentity { asked: String, caller: Identity },
    #[error("a certificate for {asked:?} was asked for; {longest:?} is the longest here")]
    Lifetime { asked: Duration, longest: Duration },
    #[error(transparent)]
    Identity(#[from] NotAnIdentity),
    #[error("signing failed: {0}")]
    Sign(String),
}
