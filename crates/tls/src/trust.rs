//! Certificates that others are believed by, and lists of those that are not any more.

use std::sync::Arc;

use rustls_pki_types::{CertificateDer, TrustAnchor};
use webpki::{CertRevocationList, OwnedCertRevocationList, anchor_from_trusted_cert};

use crate::{TlsError, certificate::Certificate, pem};

/// Trusted certificates.
#[derive(Debug, Clone)]
pub struct Trust {
    pub(crate) anchors: Arc<[TrustAnchor<'static>]>,
    pub(crate) certificates: Arc<[CertificateDer<'static>]>,
}

impl Trust {
    /// Reads a PEM bundle.
    ///
    /// # Errors
    /// What is wrong with it: one certificate that cannot be read spoils the whole.
    pub fn from_pem(bundle: &[u8]) -> Result<Self, TlsError> {
        let what = "trusted_ca";
        let certificates = pem::certificates(what, bundle)?;
        let anchors = certificates
            .iter()
            .enumerate()
            .map(|(index, der)| {
                anchor_from_trusted_cert(der)
                    .map(|anchor| anchor.to_owned())
                    .map_err(|error| TlsError::Certificate {
                        what,
                        index,
                        reason: error.to_string(),
                    })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            anchors,
            certificates: certificates.into(),
        })
    }

    /// What the trusted certificates say, for `/certs`.
    pub fn certificates(&self) -> impl Iterator<Item = Certificate> {
        self.certificates
            .iter()
            .filter_map(|der| Certificate::read(der).ok())
    }

    /// The certificates as they came.
    pub fn ders(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }
}

/// Reads revocation lists in PEM.
///
/// # Errors
/// What is wrong with one of them.
pub fn revocation_lists(text: &[u8]) -> Result<Vec<CertRevocationList<'static>>, TlsError> {
    pem::revocation_lists(text)?
        .iter()
        .enumerate()
        .map(|(index, der)| {
            OwnedCertRevocationList::from_der(der)
                .map(CertRevocationList::from)
                .map_err(|error| TlsError::RevocationList {
                    index,
                    reason: error.to_string(),
                })
        })
        .collect()
}
