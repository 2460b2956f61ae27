//! An identity of ours: a certificate with its chain and key.

use std::{fmt, sync::Arc};

use rustls::{crypto::aws_lc_rs::sign::any_supported_type, sign::CertifiedKey};

use crate::{TlsError, certificate::Certificate, pem};

/// A certificate chain with its private key. The key is never shown.
#[derive(Clone)]
pub struct Identity {
    pub(crate) key: Arc<CertifiedKey>,
    leaf: Arc<Certificate>,
    /// What follows the leaf.
    chain: Arc<[Certificate]>,
}

impl Identity {
    /// Reads a PEM chain, leaf first, and a PEM key.
    ///
    /// # Errors
    /// What is wrong with either, or that they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let what = "certificate_chain";
        let ders = pem::certificates(what, chain)?;
        let mut read = ders
            .iter()
            .enumerate()
            .map(|(index, der)| {
                Certificate::read(der).map_err(|reason| TlsError::Certificate {
                    what,
                    index,
                    reason,
                })
            })
            .collect::<Result<Vec<_>, _>>()?
            .into_iter();
        let leaf = read.next().ok_or(TlsError::Missing {
            what,
            block: "CERTIFICATE",
        })?;
        let key = any_supported_type(&pem::private_key(key)?)
            .map_err(|error| TlsError::Key(error.to_string()))?;
        let key = CertifiedKey::new(ders, key);
        match key.keys_match() {
            // A kind of key that cannot tell its public half is believed.
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => return Err(TlsError::Mismatch),
            Err(error) => return Err(TlsError::Key(error.to_string())),
        }
        Ok(Self {
            key: Arc::new(key),
            leaf: Arc::new(leaf),
            chain: read.collect(),
        })
    }

    /// The certificate itself.
    pub fn leaf(&self) -> &Arc<Certificate> {
        &self.leaf
    }

    /// The certificates that follow it.
    pub fn chain(&self) -> &[Certificate] {
        &self.chain
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("leaf", &self.leaf)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let make = || rcgen::generate_simple_self_signed(vec!["a".into()]).expect("it is made");
        let (one, other) = (make(), make());
        let read = |cert: &str, key: &str| Identity::from_pem(cert.as_bytes(), key.as_bytes());
        let own = read(&one.cert.pem(), &one.signing_key.serialize_pem()).expect("they match");
        assert_eq!(&*own.leaf().dns, [Box::from("a")]);
        assert!(!format!("{own:?}").contains("PRIVATE"));
        assert_eq!(
            read(&one.cert.pem(), &other.signing_key.serialize_pem()).expect_err("not its key"),
            TlsError::Mismatch
        );
        assert_eq!(
            read("", &one.signing_key.serialize_pem()).expect_err("nothing"),
            TlsError::Missing {
                what: "certificate_chain",
                block: "CERTIFICATE"
            }
        );
        assert!(read(&one.cert.pem(), &one.cert.pem()).is_err());
    }
}
