//! A key of our own and the request to have it certified (PKCS#10).

use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
    PKCS_ED25519, PKCS_RSA_SHA256, RsaKeySize, SanType, string::Ia5String,
};

use crate::TlsError;

/// Kinds of keys that are made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyKind {
    /// ECDSA over P-256.
    #[default]
    EcdsaP256,
    /// ECDSA over P-384.
    EcdsaP384,
    /// RSA of 2048 bits.
    Rsa2048,
    /// RSA of 3072 bits.
    Rsa3072,
    /// RSA of 4096 bits.
    Rsa4096,
    /// Ed25519. Peers on BoringSSL (Envoy) do not take it.
    Ed25519,
}

/// A fresh key with a request for it.
pub struct KeyRequest {
    /// PKCS#10 in PEM.
    pub csr: String,
    /// PKCS#8 in PEM.
    pub key: String,
}

/// Without the key.
impl std::fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyRequest")
            .field("csr", &self.csr)
            .finish_non_exhaustive()
    }
}

impl KeyRequest {
    /// Makes a key and asks for a certificate with this one URI name and no subject, as workloads have it.
    ///
    /// # Errors
    /// No key of this kind can be made, or the name is not ASCII.
    pub fn new(kind: KeyKind, uri: &str) -> Result<Self, TlsError> {
        let fail = |error: rcgen::Error| TlsError::Key(error.to_string());
        let rsa = |size| KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, size);
        let key = match kind {
            KeyKind::EcdsaP256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
            KeyKind::EcdsaP384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
            KeyKind::Ed25519 => KeyPair::generate_for(&PKCS_ED25519),
            KeyKind::Rsa2048 => rsa(RsaKeySize::_2048),
            KeyKind::Rsa3072 => rsa(RsaKeySize::_3072),
            KeyKind::Rsa4096 => rsa(RsaKeySize::_4096),
        }
        .map_err(fail)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri).map_err(fail)?)];
        let csr = params.serialize_request(&key).map_err(fail)?;
        Ok(Self {
            csr: csr.pem().map_err(fail)?,
            key: key.serialize_pem(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_key_asks_for_its_certificate() {
        let name = "spiffe://cluster.local/ns/shop/sa/web";
        for kind in [
            KeyKind::EcdsaP256,
            KeyKind::EcdsaP384,
            KeyKind::Rsa2048,
            KeyKind::Ed25519,
        ] {
            let made = KeyRequest::new(kind, name).expect("made");
            let read = rcgen::CertificateSigningRequestParams::from_pem(&made.csr).expect("a CSR");
            let names = &read.params.subject_alt_names;
            assert!(
                matches!(names.as_slice(), [SanType::URI(uri)] if uri.as_str() == name),
                "{kind:?}: {names:?}"
            );
            assert!(made.key.contains("PRIVATE KEY"), "{kind:?}");
            assert!(!format!("{made:?}").contains("PRIVATE"));
        }
    }
}
