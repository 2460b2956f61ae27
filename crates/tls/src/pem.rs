//! Reading PEM, with limits.

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use crate::TlsError;

/// Certificates of a chain or a bundle, in their order.
pub(crate) fn certificates(
    what: &'static str,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    limited(what, text)?;
    let found = collect(what, CertificateDer::pem_slice_iter(text))?;
    if found.is_empty() {
        return Err(TlsError::Missing {
            what,
            block: "CERTIFICATE",
        });
    }
    Ok(found)
}

/// The first private key: PKCS#8, PKCS#1 or SEC1.
pub(crate) fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    let what = "private key";
    limited(what, text)?;
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Missing {
            what,
            block: "PRIVATE KEY (an encrypted key must be decrypted first)",
        },
        error => TlsError::Pem {
            what,
            reason: error.to_string(),
        },
    })
}

/// Revocation lists.
pub(crate) fn revocation_lists(
    text: &[u8],
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let what = "crl";
    limited(what, text)?;
    let found = collect(what, CertificateRevocationListDer::pem_slice_iter(text))?;
    if found.is_empty() {
        return Err(TlsError::Missing {
            what,
            block: "X509 CRL",
        });
    }
    Ok(found)
}

fn collect<T>(
    what: &'static str,
    items: impl Iterator<Item = Result<T, pem::Error>>,
) -> Result<Vec<T>, TlsError> {
    items
        .collect::<Result<_, _>>()
        .map_err(|error| TlsError::Pem {
            what,
            reason: error.to_string(),
        })
}

fn limited(what: &'static str, text: &[u8]) -> Result<(), TlsError> {
    if text.len() > MAX_BYTES {
        return Err(TlsError::TooLarge {
            what,
            limit: format!("{} MiB", MAX_BYTES >> 20),
        });
    }
    Ok(())
}

/// A bundle of every public authority is a quarter of a MiB; revocation lists can be larger.
const MAX_BYTES: usize = 32 << 20;
