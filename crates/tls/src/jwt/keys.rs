//! Key sets.
//!
//! A key is used for what it is and nothing else: an RSA key for RS and PS, an EC key for the ES of its curve, an Ed25519
//! key for EdDSA, and where it names its `alg` or `use`, for that alone. Symmetric keys are left out, so that nobody can
//! sign with what is public.

use std::collections::HashMap;

use aws_lc_rs::{
    encoding::AsDer,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519,
        ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
        RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
        RSA_PSS_2048_8192_SHA512, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
    },
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Map, Value};

use super::{
    Refusal, strict,
    token::{Algorithm, Token},
};

/// Bytes of a key set at most.
pub const MAX_BYTES: usize = 1024 * 1024;
/// Keys of a set at most.
pub const MAX_KEYS: usize = 1000;
/// Keys that one token is tried with at most, where it does not say which one it is signed with.
pub const MAX_TRIES: usize = 32;
/// Shorter RSA keys (below 2048 bits) are left out.
const MIN_RSA_BYTES: usize = 256;

/// Why a document is no key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Too many bytes.
    #[error("the key set has {0} bytes, {MAX_BYTES} are allowed")]
    TooLarge(usize),
    /// Too many keys.
    #[error("the key set has {0} keys, {MAX_KEYS} are allowed")]
    TooMany(usize),
    /// No JSON object, or one in which a name stands twice.
    #[error("Jwks is an invalid JSON: {0}")]
    Json(String),
    /// No list of keys.
    #[error("Jwks does not have [keys] field, or it is not an array")]
    NoList,
    /// Keys, but none of a kind that tokens are signed with.
    #[error("Jwks doesn't have any valid public key")]
    NoKeys,
}

/// The public keys of one issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
    /// Numbers of the keys by name; those without one are under the empty name.
    by_id: HashMap<String, Vec<usize>>,
}

#[derive(Debug)]
struct Key {
    kind: Kind,
    /// Used for this one alone.
    algorithm: Option<Algorithm>,
    bytes: Box<[u8]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// PKCS #1.
    Rsa,
    /// An uncompressed point.
    P256,
    P384,
    P521,
    Ed25519,
}

impl KeySet {
    /// Reads a key set; keys of other kinds, for other uses or with mistakes are left out.
    ///
    /// A JSON object whose members are PEM certificates by name is taken, too, as Envoy takes it.
    pub fn parse(json: &[u8]) -> Result<Self, KeySetError> {
        if json.len() > MAX_BYTES {
            return Err(KeySetError::TooLarge(json.len()));
        }
        let set = strict::object(json).map_err(|error| KeySetError::Json(error.to_string()))?;
        let mut found: Vec<(String, Key)> = Vec::new();
        match set.get("keys") {
            Some(Value::Array(list)) if list.len() > MAX_KEYS => {
                return Err(KeySetError::TooMany(list.len()));
            }
            Some(Value::Array(list)) => {
                found.extend(list.iter().filter_map(|key| read(key.as_object()?)));
            }
            Some(_) => return Err(KeySetError::NoList),
            None if set.len() > MAX_KEYS => return Err(KeySetError::TooMany(set.len())),
            None => {
                found.extend(set.iter().filter_map(|(name, value)| {
                    Some((name.clone(), certificate(value.as_str()?)?))
                }));
                if found.is_empty() {
                    return Err(KeySetError::NoList);
                }
            }
        }
        if found.is_empty() {
            return Err(KeySetError::NoKeys);
        }
        let mut by_id: HashMap<String, Vec<usize>> = HashMap::new();
        let mut keys = Vec::with_capacity(found.len());
        for (id, key) in found {
            by_id.entry(id).or_default().push(keys.len());
            keys.push(key);
        }
        Ok(Self { keys, by_id })
    }

    /// How many keys it has.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether it has none; no such set is ever made.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether the token is signed with one of the keys: with the one that it names, or with one that has no name; with
    /// any, where the token names none.
    pub fn verify(&self, token: &Token) -> Result<(), Refusal> {
        let numbers = |id: &str| self.by_id.get(id).into_iter().flatten().copied();
        let fits = |number: &usize| self.keys[*number].fits(token.algorithm);
        let (mut named, mut nameless, mut all);
        let candidates: &mut dyn Iterator<Item = usize> = if token.key_id.is_empty() {
            all = (0..self.keys.len()).filter(fits);
            &mut all
        } else {
            named = numbers(&token.key_id).filter(fits);
            nameless = numbers("").filter(fits);
            &mut named.by_ref().chain(nameless.by_ref())
        };
        let mut tried = false;
        for number in candidates.take(MAX_TRIES) {
            tried = true;
            if self.keys[number].verify(token) {
                return Ok(());
            }
        }
        Err(match tried {
            true => Refusal::Signature,
            false => Refusal::NoSuchKey,
        })
    }
}

impl Key {
    fn fits(&self, algorithm: Algorithm) -> bool {
        use Algorithm as A;
        let own = self.algorithm.is_none_or(|own| own == algorithm);
        own && match self.kind {
            Kind::Rsa => matches!(
                algorithm,
                A::Rs256 | A::Rs384 | A::Rs512 | A::Ps256 | A::Ps384 | A::Ps512
            ),
            Kind::P256 => algorithm == A::Es256,
            Kind::P384 => algorithm == A::Es384,
            Kind::P521 => algorithm == A::Es512,
            Kind::Ed25519 => algorithm == A::EdDsa,
        }
    }

    fn verify(&self, token: &Token) -> bool {
        let (signed, signature) = token.signed();
        UnparsedPublicKey::new(method(token.algorithm), &self.bytes)
            .verify(signed, signature)
            .is_ok()
    }
}

fn method(algorithm: Algorithm) -> &'static dyn VerificationAlgorithm {
    match algorithm {
        Algorithm::Rs256 => &RSA_PKCS1_2048_8192_SHA256,
        Algorithm::Rs384 => &RSA_PKCS1_2048_8192_SHA384,
        Algorithm::Rs512 => &RSA_PKCS1_2048_8192_SHA512,
        Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
        Algorithm::Ps384 => &RSA_PSS_2048_8192_SHA384,
        Algorithm::Ps512 => &RSA_PSS_2048_8192_SHA512,
        Algorithm::Es256 => &ECDSA_P256_SHA256_FIXED,
        Algorithm::Es384 => &ECDSA_P384_SHA384_FIXED,
        Algorithm::Es512 => &ECDSA_P521_SHA512_FIXED,
        Algorithm::EdDsa => &ED25519,
    }
}

/// A key of the list, with its name; `None` where no token can be signed with it.
fn read(key: &Map<String, Value>) -> Option<(String, Key)> {
    let text = |name: &str| match key.get(name) {
        None => Some(""),
        Some(Value::String(text)) => Some(text.as_str()),
        Some(_) => None,
    };
    let bytes = |name: &str| {
        let text = key.get(name)?.as_str()?;
        let text = text.trim_end_matches('=');
        BASE64_URL_SAFE_NO_PAD.decode(text).ok()
    };
    if !matches!(text("use")?, "" | "sig") {
        return None;
    }
    let algorithm = match text("alg")? {
        "" => None,
        name => Some(Algorithm::of(name)?),
    };
    let point = |size: usize| {
        let mut point = vec![4];
        for part in [bytes("x")?, bytes("y")?] {
            // Some libraries cut off zeros that lead.
            point.extend(std::iter::repeat_n(0, size.checked_sub(part.len())?));
            point.extend(part);
        }
        Some(point)
    };
    let (kind, bytes) = match (text("kty")?, text("crv")?) {
        ("RSA", _) => {
            let (n, e) = (bytes("n")?, bytes("e")?);
            let (n, e) = (significant(&n), significant(&e));
            if n.len() < MIN_RSA_BYTES {
                return None;
            }
            let der = RsaPublicKeyComponents { n, e }.as_der().ok()?;
            (Kind::Rsa, der.as_ref().to_vec())
        }
        ("EC", "P-256") => (Kind::P256, point(32)?),
        ("EC", "P-384") => (Kind::P384, point(48)?),
        ("EC", "P-521") => (Kind::P521, point(66)?),
        ("OKP", "Ed25519") => (Kind::Ed25519, bytes("x")?),
        _ => return None,
    };
    let key = checked(kind, algorithm, bytes)?;
    Some((text("kid")?.to_owned(), key))
}

/// Without zeros that lead.
fn significant(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|&&byte| byte == 0).count();
    &number[zeros..]
}

/// The key in a PEM certificate.
fn certificate(pem: &str) -> Option<Key> {
    use x509_parser::public_key::PublicKey;
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).ok()?;
    let info = certificate.public_key();
    let bytes = info.subject_public_key.data.to_vec();
    let kind = match info.parsed().ok()? {
        PublicKey::RSA(_) => Kind::Rsa,
        PublicKey::EC(point) => match point.key_size() {
            256 => Kind::P256,
            384 => Kind::P384,
            _ => Kind::P521,
        },
        _ if bytes.len() == 32 => Kind::Ed25519,
        _ => return None,
    };
    checked(kind, None, bytes)
}

/// A key that the library accepts: of a size that holds, a point on its curve.
fn checked(kind: Kind, algorithm: Option<Algorithm>, bytes: Vec<u8>) -> Option<Key> {
    let any = match kind {
        Kind::Rsa => method(Algorithm::Rs256),
        Kind::P256 => method(Algorithm::Es256),
        Kind::P384 => method(Algorithm::Es384),
        Kind::P521 => method(Algorithm::Es512),
        Kind::Ed25519 => method(Algorithm::EdDsa),
    };
    ParsedPublicKey::new(any, bytes.as_slice()).ok()?;
    let key = Key {
        kind,
        algorithm,
        bytes: bytes.into(),
    };
    // A key that says it is for an algorithm that it cannot serve is no key for anything.
    algorithm.is_none_or(|own| key.fits(own)).then_some(key)
}

#[cfg(test)]
mod tests;
