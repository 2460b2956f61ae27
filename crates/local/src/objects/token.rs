//! Service account tokens, as an API server signs them for pods (TokenRequest).
//!
//! The key lives in this process alone: a mesh that starts anew has another, and no token of an older one is worth
//! anything. Whoever reviews tokens gets the public half as a JWKS.

use std::time::Duration;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use base::clock::Clock;
use serde_json::{Value, json};

use super::text;
use crate::error::{Error, Result};

/// The longest life of a token, whatever a pod asks for.
const LONGEST: Duration = Duration::from_secs(3600);
/// Kubernetes signs none that lives shorter.
const SHORTEST: Duration = Duration::from_secs(600);
/// Who signs, as the tokens of a cluster say it.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// The audience where a pod names none: the API server itself.
const API_SERVER: &str = "https://kubernetes.default.svc";

/// Signs tokens.
pub(crate) struct Issuer {
    key: EcdsaKeyPair,
    id: String,
    random: SystemRandom,
    clock: Clock,
}

/// Without the key.
impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Issuer {
    /// With a key of its own.
    pub(crate) fn new(clock: Clock) -> Result<Self> {
        let fail = |_| Error::Usage("no key for service account tokens can be made".to_owned());
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(fail)?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, point(&key));
        Ok(Self {
            id: base64url(&digest.as_ref()[..12]),
            key,
            random: SystemRandom::new(),
            clock,
        })
    }

    /// The public key, for who reviews tokens (RFC 7517).
    pub(crate) fn jwks(&self) -> String {
        // An uncompressed point: a byte that says so, then both coordinates.
        let (x, y) = point(&self.key)[1..].split_at(32);
        json!({"keys": [{
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.id,
            "x": base64url(x), "y": base64url(y),
        }]})
        .to_string()
    }

    /// How long a token lives that is to live for `seconds`.
    pub(crate) fn life(seconds: Option<u64>) -> Duration {
        seconds.map_or(LONGEST, |s| Duration::from_secs(s).clamp(SHORTEST, LONGEST))
    }

    /// A token for a pod's service account, bound to the pod.
    pub(crate) fn sign(&self, pod: &Value, audience: &str, seconds: Option<u64>) -> Result<String> {
        let namespace = text(pod, &["metadata", "namespace"]);
        let account = match text(pod, &["spec", "serviceAccountName"]) {
            "" => "default",
            name => name,
        };
        let audience = if audience.is_empty() {
            API_SERVER
        } else {
            audience
        };
        let now = self.clock.seconds();
        let claims = json!({
            "iss": ISSUER,
            "aud": [audience],
            "iat": now,
            "nbf": now,
            "exp": now + Self::life(seconds).as_secs(),
            "sub": format!("system:serviceaccount:{namespace}:{account}"),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": account},
                "pod": {"name": text(pod, &["metadata", "name"]), "uid": text(pod, &["metadata", "uid"])},
            },
        });
        let header = json!({"alg": "ES256", "kid": self.id, "typ": "JWT"});
        let signed = format!(
            "{}.{}",
            base64url(header.to_string().as_bytes()),
            base64url(claims.to_string().as_bytes())
        );
        let signature = self
            .key
            .sign(&self.random, signed.as_bytes())
            .map_err(|_| Error::Usage("a service account token cannot be signed".to_owned()))?;
        Ok(format!("{signed}.{}", base64url(signature.as_ref())))
    }
}

fn point(key: &EcdsaKeyPair) -> &[u8] {
    key.public_key().as_ref()
}

fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut group = [0; 3];
        group[..chunk.len()].copy_from_slice(chunk);
        let n = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        for i in 0..=chunk.len() {
            out.push(char::from(ALPHABET[(n >> (18 - 6 * i)) as usize & 63]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn part(token: &str, index: usize) -> Value {
        let text = token.split('.').nth(index).unwrap();
        let mut bits = 0u32;
        let mut count = 0;
        let mut bytes = Vec::new();
        for c in text.bytes() {
            let value = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'-' => 62,
                _ => 63,
            };
            bits = bits << 6 | u32::from(value);
            count += 6;
            if count >= 8 {
                count -= 8;
                bytes.push((bits >> count) as u8);
            }
        }
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn a_token_is_for_one_pod_and_an_hour() {
        let clock = Clock::manual(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let issuer = Issuer::new(clock).unwrap();
        let pod = json!({"metadata": {"name": "web-0", "namespace": "shop", "uid": "u"},
            "spec": {"serviceAccountName": "web"}});
        let token = issuer.sign(&pod, "istio-ca", Some(43200)).unwrap();
        let (header, claims) = (part(&token, 0), part(&token, 1));
        let keys: Value = serde_json::from_str(&issuer.jwks()).unwrap();
        assert_eq!(header["kid"], keys["keys"][0]["kid"]);
        assert_eq!(header["alg"], "ES256");
        assert_eq!(claims["sub"], "system:serviceaccount:shop:web");
        assert_eq!(claims["aud"], json!(["istio-ca"]));
        assert_eq!(claims["exp"], 1_800_003_600);
        assert_eq!(claims["kubernetes.io"]["pod"]["name"], "web-0");
        assert_eq!(token.split('.').nth(2).unwrap().len(), 86);
        assert!(!keys.to_string().contains("\"d\""), "the public half alone");
        assert_eq!(Issuer::life(Some(1)), Duration::from_secs(600));
    }
}
