//! Signed tokens (JWT, RFC 7519, as JWS in compact form) and the key sets that they are judged by (JWKS, RFC 7517).
//!
//! Nothing here asks the network or the clock, and nothing that a token says is believed before its signature is good:
//! [`token`] takes a token apart, [`keys`] reads a key set and checks signatures. The words of a [`Refusal`] are
//! Envoy's, since clients and dashboards know them.

pub mod keys;
mod strict;
pub mod token;

pub use keys::{KeySet, KeySetError};
pub use strict::object;
pub use token::Token;

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// There is none.
    #[error("Jwt is missing")]
    Missing,
    /// `nbf` lies ahead.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// `exp` is over.
    #[error("Jwt is expired")]
    Expired,
    /// Not three parts.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Format,
    /// Larger than [`token::MAX_TOKEN`].
    #[error("Jwt is too large")]
    TooLarge,
    /// The header's base64.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBase64,
    /// The header's JSON.
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    /// The header names no algorithm.
    #[error("Jwt header [alg] field is required and must be a string")]
    Algorithm,
    /// The header names an algorithm that is no signature by a private key: `none` and HMAC among them.
    #[error("Jwt header [alg] is not supported")]
    UnsupportedAlgorithm,
    /// `crit` names what has to be understood, and nothing of it is (RFC 7515, 4.1.11).
    #[error("Jwt header [crit] is not supported")]
    Critical,
    /// `kid` is no string.
    #[error("Jwt header [kid] field is not a string")]
    KeyId,
    /// The payload's base64.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBase64,
    /// The payload's JSON.
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    /// `iss`.
    #[error("Jwt payload [iss] field is not a string")]
    Issuer,
    /// `sub`.
    #[error("Jwt payload [sub] field is not a string")]
    Subject,
    /// `iat`.
    #[error("Jwt payload [iat] field is not an integer")]
    IssuedAt,
    /// `iat`.
    #[error("Jwt payload [iat] field is not a positive 64 bit integer")]
    IssuedAtRange,
    /// `nbf`.
    #[error("Jwt payload [nbf] field is not an integer")]
    NotBefore,
    /// `nbf`.
    #[error("Jwt payload [nbf] field is not a positive 64 bit integer")]
    NotBeforeRange,
    /// `exp`.
    #[error("Jwt payload [exp] field is not an integer")]
    Expiry,
    /// `exp`.
    #[error("Jwt payload [exp] field is not a positive 64 bit integer")]
    ExpiryRange,
    /// `jti`.
    #[error("Jwt payload [jti] field is not a string")]
    Id,
    /// `aud`.
    #[error("Jwt payload [aud] field is not a string or string list")]
    Audience,
    /// The signature's base64.
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBase64,
    /// Nobody here trusts its issuer.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// It is meant for somebody else.
    #[error("Audiences in Jwt are not allowed")]
    WrongAudience,
    /// The signature is not one by these keys.
    #[error("Jwt verification fails")]
    Signature,
    /// The key set has nothing in it.
    #[error("Jwks doesn't have any valid public key")]
    NoKeys,
    /// No key of this name for this algorithm.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoSuchKey,
    /// The keys could not be fetched.
    #[error("Jwks remote fetch is failed")]
    Fetch,
}
