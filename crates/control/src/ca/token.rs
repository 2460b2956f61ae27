//! Service account tokens: who the caller is.
//!
//! The API server of a cluster reviews its tokens itself; on one machine the keys of whoever signs them are read from a
//! file (`--tokenKeys`, a JWKS).

use std::{
    fs,
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    time::SystemTime,
};

use base::{clock::Clock, spiffe::Identity};
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, Jwk, JwkSet},
};
use parking_lot::Mutex;
use serde::Deserialize;

/// Who a token of a proxy is meant for.
pub const AUDIENCE: &str = "istio-ca";
/// Larger than any token that Kubernetes makes.
const MAX_BYTES: usize = 16 * 1024;
/// More keys than any issuer has at a time.
const MAX_KEYS: usize = 100;
/// Clocks may differ by this many seconds.
const SKEW: u64 = 30;

/// Whom a token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reviewed {
    /// Namespace of the service account.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod that the token is bound to.
    pub pod: Option<String>,
}

/// Why a token proves nothing. The caller learns only that.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("a token of {0} bytes; at most {MAX_BYTES} are read")]
    Size(usize),
    #[error("not a signed token: {0}")]
    Form(String),
    #[error("signed with {0:?}, which is not accepted")]
    Algorithm(Algorithm),
    #[error("no key {0:?} among those of the issuer")]
    Key(String),
    #[error("the signature is wrong")]
    Signature,
    #[error("expired {0} s ago")]
    Expired(u64),
    #[error("not valid for another {0} s")]
    NotYet(u64),
    #[error("meant for {0:?}, not for {AUDIENCE}")]
    Audience(Vec<String>),
    #[error("the subject {0:?} is no service account")]
    Subject(String),
    #[error("{0}")]
    Cluster(String),
    #[error("--tokenKeys {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("--tokenKeys {}: {problem}", path.display())]
    Keys { path: PathBuf, problem: String },
}

/// The answer of a review.
pub type Review<'a> = Pin<Box<dyn Future<Output = Result<Reviewed, TokenError>> + Send + 'a>>;

/// Proves tokens.
pub trait TokenReviewer: Send + Sync + 'static {
    /// Whom the token speaks for.
    fn review<'a>(&'a self, token: &'a str) -> Review<'a>;

    /// Whether it looks itself whether the pod of a token is there, as an API server does.
    fn knows_pods(&self) -> bool {
        true
    }
}

impl Reviewed {
    /// The identity under the mesh's trust domain.
    pub fn identity(&self, trust_domain: &str) -> Result<Identity, base::spiffe::NotAnIdentity> {
        Identity::new(trust_domain, &self.namespace, &self.service_account)
    }
}

/// Reviews tokens with keys from a file, which is read again when it has changed.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    clock: Clock,
    keys: Mutex<(Option<SystemTime>, JwkSet)>,
}

impl KeyFile {
    /// Reads the file for the first time.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, TokenError> {
        let out = Self {
            path: path.to_owned(),
            clock,
            keys: Mutex::new((None, JwkSet { keys: Vec::new() })),
        };
        out.refresh()?;
        Ok(out)
    }

    fn refresh(&self) -> Result<(), TokenError> {
        let file = |source| TokenError::File {
            path: self.path.clone(),
            source,
        };
        let changed = fs::metadata(&self.path)
            .and_then(|m| m.modified())
            .map_err(file)?;
        let mut keys = self.keys.lock();
        if keys.0 == Some(changed) {
            return Ok(());
        }
        let wrong = |problem: String| TokenError::Keys {
            path: self.path.clone(),
            problem,
        };
        let text = fs::read_to_string(&self.path).map_err(file)?;
        let set: JwkSet =
            serde_json::from_str(&text).map_err(|e| wrong(format!("no JWKS: {e}")))?;
        if set.keys.len() > MAX_KEYS {
            return Err(wrong(format!(
                "{} keys; at most {MAX_KEYS} are read",
                set.keys.len()
            )));
        }
        *keys = (Some(changed), set);
        Ok(())
    }

    fn check(&self, token: &str) -> Result<Reviewed, TokenError> {
        if token.len() > MAX_BYTES {
            return Err(TokenError::Size(token.len()));
        }
        // A file that cannot be read now leaves the keys that were read.
        if let Err(error) = self.refresh() {
            tracing::warn!("{error}");
        }
        let header = decode_header(token).map_err(|e| TokenError::Form(e.to_string()))?;
        if !accepted(header.alg) {
            return Err(TokenError::Algorithm(header.alg));
        }
        let kid = header.kid.unwrap_or_default();
        let keys = self.keys.lock();
        let key = find(&keys.1, &kid, header.alg).ok_or(TokenError::Key(kid))?;
        let key = DecodingKey::from_jwk(key).map_err(|e| TokenError::Form(e.to_string()))?;
        let claims = claims(token, &key, header.alg)?;
        drop(keys);
        self.judge(claims)
    }

    fn judge(&self, claims: Claims) -> Result<Reviewed, TokenError> {
        let now = self.clock.seconds();
        if claims.exp.saturating_add(SKEW) < now {
            return Err(TokenError::Expired(now - claims.exp));
        }
        let begins = claims.nbf.unwrap_or(0);
        if begins > now + SKEW {
            return Err(TokenError::NotYet(begins - now));
        }
        let audiences = match claims.aud {
            Audiences::One(one) => vec![one],
            Audiences::Many(many) => many,
        };
        if !audiences.iter().any(|a| a == AUDIENCE) {
            return Err(TokenError::Audience(audiences));
        }
        let account = claims.sub.strip_prefix("system:serviceaccount:");
        let Some((namespace, service_account)) = account.and_then(|a| a.split_once(':')) else {
            return Err(TokenError::Subject(claims.sub));
        };
        Ok(Reviewed {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            pod: claims.kubernetes.and_then(|k| k.pod).map(|p| p.name),
        })
    }
}

impl TokenReviewer for KeyFile {
    fn review<'a>(&'a self, token: &'a str) -> Review<'a> {
        Box::pin(async move { self.check(token) })
    }

    fn knows_pods(&self) -> bool {
        false
    }
}

/// Only signatures by a private key: a shared secret would let every verifier sign.
fn accepted(algorithm: Algorithm) -> bool {
    use Algorithm as A;
    matches!(
        algorithm,
        A::RS256
            | A::RS384
            | A::RS512
            | A::PS256
            | A::PS384
            | A::PS512
            | A::ES256
            | A::ES384
            | A::EdDSA
    )
}

/// The key of this id, if it is one for the algorithm.
fn find<'k>(keys: &'k JwkSet, kid: &str, algorithm: Algorithm) -> Option<&'k Jwk> {
    use Algorithm as A;
    keys.keys.iter().find(|key| {
        let fits = match &key.algorithm {
            AlgorithmParameters::RSA(_) => matches!(
                algorithm,
                A::RS256 | A::RS384 | A::RS512 | A::PS256 | A::PS384 | A::PS512
            ),
            AlgorithmParameters::EllipticCurve(_) => matches!(algorithm, A::ES256 | A::ES384),
            AlgorithmParameters::OctetKeyPair(_) => algorithm == A::EdDSA,
            AlgorithmParameters::OctetKey(_) => false,
            _ => false,
        };
        fits && key.common.key_id.as_deref().unwrap_or_default() == kid
    })
}

fn claims(token: &str, key: &DecodingKey, algorithm: Algorithm) -> Result<Claims, TokenError> {
    let mut validation = Validation::new(algorithm);
    // Times and audience are judged by our clock and with words of our own.
    validation.validate_exp = false;
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    decode::<Claims>(token, key, &validation)
        .map(|data| data.claims)
        .map_err(|e| match e.kind() {
            ErrorKind::InvalidSignature => TokenError::Signature,
            _ => TokenError::Form(e.to_string()),
        })
}

#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    aud: Audiences,
    exp: u64,
    nbf: Option<u64>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Kubernetes>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct Kubernetes {
    pod: Option<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}
