//! Signatures over data that somebody hands in, with a public key that comes as DER.

use aws_lc_rs::signature::{self as algorithms, UnparsedPublicKey, VerificationAlgorithm};

/// Why a signature is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// No algorithm goes by that name here.
    #[error("{0} is not supported.")]
    Hash(String),
    /// It is not that of the key's owner over this data, or the key is none.
    #[error("Failed to verify digest.")]
    Wrong,
}

/// Checks a signature (RSA with PKCS #1 v1.5 padding, or ECDSA in ASN.1) by a hash (`SHA1`, `SHA256`, `SHA384`,
/// `SHA512`, whatever their case) and a `SubjectPublicKeyInfo`.
///
/// # Errors
/// See [`SignatureError`].
pub fn verify(hash: &str, key: &[u8], signature: &[u8], data: &[u8]) -> Result<(), SignatureError> {
    use algorithms::{
        ECDSA_P256_SHA1_ASN1, ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1,
        ECDSA_P256_SHA512_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P384_SHA384_ASN1,
        ECDSA_P384_SHA512_ASN1, ECDSA_P521_SHA1_ASN1, ECDSA_P521_SHA256_ASN1,
        ECDSA_P521_SHA384_ASN1, ECDSA_P521_SHA512_ASN1,
        RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, RSA_PKCS1_2048_8192_SHA256,
        RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    };
    let fitting: [&'static dyn VerificationAlgorithm; 4] = match hash.to_ascii_lowercase().as_str()
    {
        "sha1" => [
            &RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY,
            &ECDSA_P256_SHA1_ASN1,
            &ECDSA_P521_SHA1_ASN1,
            &ECDSA_P521_SHA1_ASN1,
        ],
        "sha256" => [
            &RSA_PKCS1_2048_8192_SHA256,
            &ECDSA_P256_SHA256_ASN1,
            &ECDSA_P384_SHA256_ASN1,
            &ECDSA_P521_SHA256_ASN1,
        ],
        "sha384" => [
            &RSA_PKCS1_2048_8192_SHA384,
            &ECDSA_P256_SHA384_ASN1,
            &ECDSA_P384_SHA384_ASN1,
            &ECDSA_P521_SHA384_ASN1,
        ],
        "sha512" => [
            &RSA_PKCS1_2048_8192_SHA512,
            &ECDSA_P256_SHA512_ASN1,
            &ECDSA_P384_SHA512_ASN1,
            &ECDSA_P521_SHA512_ASN1,
        ],
        _ => return Err(SignatureError::Hash(hash.to_owned())),
    };
    // A key of another kind, or on another curve, is none to an algorithm.
    let verified = |algorithm: &'static dyn VerificationAlgorithm| {
        UnparsedPublicKey::new(algorithm, key)
            .verify(data, signature)
            .is_ok()
    };
    match fitting.into_iter().any(verified) {
        true => Ok(()),
        false => Err(SignatureError::Wrong),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, PublicKeyData,
        SigningKey,
    };

    use super::*;

    #[test]
    fn signatures_of_rsa_and_curves_are_verified() {
        for (algorithm, hash) in [
            (&PKCS_ECDSA_P256_SHA256, "SHA256"),
            (&PKCS_ECDSA_P384_SHA384, "sha384"),
            (&PKCS_RSA_SHA256, "Sha256"),
        ] {
            let pair = KeyPair::generate_for(algorithm).unwrap();
            let (key, signature) = (pair.subject_public_key_info(), pair.sign(b"data").unwrap());
            assert_eq!(verify(hash, &key, &signature, b"data"), Ok(()), "{hash}");
            for (hash, key, signature, data) in [
                (hash, &key[..], &signature[..], &b"date"[..]),
                (hash, &key, &signature[1..], b"data"),
                (hash, &key[1..], &signature, b"data"),
                ("sha512", &key, &signature, b"data"),
                (hash, b"", b"", b""),
            ] {
                let wrong = verify(hash, key, signature, data);
                assert_eq!(wrong, Err(SignatureError::Wrong));
            }
        }
        let unknown = verify("md5", b"", b"", b"").unwrap_err();
        assert_eq!(unknown.to_string(), "md5 is not supported.");
    }
}
