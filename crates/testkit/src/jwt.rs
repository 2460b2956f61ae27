//! Issuers of tokens.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING,
        ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256,
        RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512,
        RsaEncoding, RsaKeyPair,
    },
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// Somebody who signs tokens with one key.
#[derive(Debug)]
pub struct Issuer {
    algorithm: &'static str,
    key: Key,
}

#[derive(Debug)]
enum Key {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

impl Issuer {
    /// With a new key for an algorithm such as `RS256`.
    pub fn new(algorithm: &'static str) -> Self {
        let fails = "a key can be made";
        let key = match algorithm {
            "ES256" => {
                Key::Ec(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect(fails))
            }
            "ES384" => {
                Key::Ec(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).expect(fails))
            }
            "ES512" => {
                Key::Ec(EcdsaKeyPair::generate(&ECDSA_P521_SHA512_FIXED_SIGNING).expect(fails))
            }
            "EdDSA" => Key::Ed(Ed25519KeyPair::generate().expect(fails)),
            _ => Key::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).expect(fails)),
        };
        Self { algorithm, key }
    }

    /// The same key for another algorithm of its kind.
    pub fn with(mut self, algorithm: &'static str) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// A token with these claims.
    pub fn sign(&self, key_id: &str, claims: &Value) -> String {
        let mut header = json!({ "alg": self.algorithm, "typ": "JWT" });
        if !key_id.is_empty() {
            header["kid"] = key_id.into();
        }
        self.sign_as(&header.to_string(), &claims.to_string())
    }

    /// A token with any header, signed with this key.
    pub fn sign_as(&self, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = self.signature(signed.as_bytes());
        format!("{signed}.{}", encode(signature))
    }

    fn signature(&self, signed: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.key {
            Key::Ec(key) => key
                .sign(&random, signed)
                .expect("it signs")
                .as_ref()
                .to_vec(),
            Key::Ed(key) => key.sign(signed).as_ref().to_vec(),
            Key::Rsa(key) => {
                let how: &'static dyn RsaEncoding = match self.algorithm {
                    "RS384" => &RSA_PKCS1_SHA384,
                    "RS512" => &RSA_PKCS1_SHA512,
                    "PS256" => &RSA_PSS_SHA256,
                    "PS384" => &RSA_PSS_SHA384,
                    "PS512" => &RSA_PSS_SHA512,
                    _ => &RSA_PKCS1_SHA256,
                };
                let mut out = vec![0; key.public_modulus_len()];
                key.sign(how, &random, signed, &mut out).expect("it signs");
                out
            }
        }
    }

    /// The public key.
    pub fn jwk(&self, key_id: &str) -> Value {
        let mut jwk = match &self.key {
            Key::Ec(key) => {
                let point = &key.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let curve = match x.len() {
                    32 => "P-256",
                    48 => "P-384",
                    _ => "P-521",
                };
                json!({ "kty": "EC", "crv": curve, "x": encode(x), "y": encode(y) })
            }
            Key::Ed(key) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": encode(key.public_key().as_ref()) })
            }
            Key::Rsa(key) => {
                let public = key.public_key();
                let (n, e) = (public.modulus(), public.exponent());
                let (n, e) = (
                    n.big_endian_without_leading_zero(),
                    e.big_endian_without_leading_zero(),
                );
                json!({ "kty": "RSA", "n": encode(n), "e": encode(e) })
            }
        };
        if !key_id.is_empty() {
            jwk["kid"] = key_id.into();
        }
        jwk
    }

    /// A set of the public key alone.
    pub fn jwks(&self, key_id: &str) -> String {
        json!({ "keys": [self.jwk(key_id)] }).to_string()
    }
}

/// In base64url without padding.
pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}
