//! One token, taken apart.

use std::borrow::Cow;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::{Refusal, strict};

/// Bytes of a token at most. What headers may hold is usually less; this limit holds where that one was raised.
pub const MAX_TOKEN: usize = 64 * 1024;

/// How a token is signed. There is no `none` and no HMAC: what is not here cannot be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    Rs384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// RSASSA-PSS with SHA-384.
    Ps384,
    /// RSASSA-PSS with SHA-512.
    Ps512,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// ECDSA on P-521 with SHA-512.
    Es512,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// By its name in `alg`; letters count as they are.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// A token whose form is right. Whether it is genuine, [`super::KeySet::verify`] tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// How it says that it is signed.
    pub algorithm: Algorithm,
    /// Name of the key; empty for none.
    pub key_id: String,
    /// All of its header.
    pub header: Map<String, Value>,
    /// All of its claims.
    pub claims: Map<String, Value>,
    /// The first two parts: what is signed.
    signed: String,
    signature: Vec<u8>,
    expires: Option<u64>,
    not_before: Option<u64>,
    issued_at: Option<u64>,
}

impl Token {
    /// Takes a token apart.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        if text.len() > MAX_TOKEN {
            return Err(Refusal::TooLarge);
        }
        let mut parts = text.split('.');
        let (Some(head), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Refusal::Format);
        };
        if head.is_empty() || payload.is_empty() || signature.is_empty() {
            return Err(Refusal::Format);
        }
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part);
        let header = decode(head).map_err(|_| Refusal::HeaderBase64)?;
        let header = strict::object(&header).map_err(|_| Refusal::HeaderJson)?;
        let Some(Value::String(name)) = header.get("alg") else {
            return Err(Refusal::Algorithm);
        };
        let algorithm = Algorithm::of(name).ok_or(Refusal::UnsupportedAlgorithm)?;
        if header.contains_key("crit") {
            return Err(Refusal::Critical);
        }
        let key_id = text_of(&header, "kid", Refusal::KeyId)?.unwrap_or_default();
        let key_id = key_id.to_owned();
        let claims = decode(payload).map_err(|_| Refusal::PayloadBase64)?;
        let claims = strict::object(&claims).map_err(|_| Refusal::PayloadJson)?;
        text_of(&claims, "iss", Refusal::Issuer)?;
        text_of(&claims, "sub", Refusal::Subject)?;
        let issued_at = time_of(&claims, "iat", Refusal::IssuedAt, Refusal::IssuedAtRange)?;
        let not_before = time_of(&claims, "nbf", Refusal::NotBefore, Refusal::NotBeforeRange)?;
        let expires = time_of(&claims, "exp", Refusal::Expiry, Refusal::ExpiryRange)?;
        text_of(&claims, "jti", Refusal::Id)?;
        match claims.get("aud") {
            None | Some(Value::String(_)) => {}
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {}
            Some(_) => return Err(Refusal::Audience),
        }
        let signature = decode(signature).map_err(|_| Refusal::SignatureBase64)?;
        Ok(Self {
            algorithm,
            key_id,
            signed: text[..head.len() + 1 + payload.len()].to_owned(),
            header,
            claims,
            signature,
            expires,
            not_before,
            issued_at,
        })
    }

    /// `iss`; empty where there is none.
    pub fn issuer(&self) -> &str {
        self.text("iss")
    }

    /// `sub`; empty where there is none.
    pub fn subject(&self) -> &str {
        self.text("sub")
    }

    /// `aud`: one or more, or none.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        let (one, list) = match self.claims.get("aud") {
            Some(Value::String(one)) => (Some(one.as_str()), None),
            Some(Value::Array(list)) => (None, Some(list)),
            _ => (None, None),
        };
        let list = list.into_iter().flatten();
        one.into_iter().chain(list.filter_map(Value::as_str))
    }

    /// `exp`, in seconds since the epoch.
    pub fn expires(&self) -> Option<u64> {
        self.expires
    }

    /// How long it is good for in all: from `iat`, else `nbf`, else `now`, to `exp`.
    pub fn lifetime(&self, now: u64) -> Option<u64> {
        let from = self.issued_at.or(self.not_before).unwrap_or(now);
        Some(self.expires?.saturating_sub(from))
    }

    /// Whether `now`, in seconds since the epoch, lies in its time, give or take `skew` seconds.
    pub fn check_time(&self, now: u64, skew: u64) -> Result<(), Refusal> {
        if self
            .not_before
            .is_some_and(|t| now.saturating_add(skew) < t)
        {
            return Err(Refusal::NotYetValid);
        }
        if self.expires.is_some_and(|t| now > t.saturating_add(skew)) {
            return Err(Refusal::Expired);
        }
        Ok(())
    }

    /// The claims as they came, in base64url.
    pub fn payload(&self) -> &str {
        self.signed
            .split_once('.')
            .map_or("", |(_, payload)| payload)
    }

    /// A claim by its path: `a.b` is `b` in `a`, or else the claim of that whole name.
    pub fn claim(&self, path: &str) -> Option<&Value> {
        if let Some(value) = self.claims.get(path) {
            return Some(value);
        }
        let mut parts = path.split('.');
        let mut value = self.claims.get(parts.next()?)?;
        for part in parts {
            value = value.as_object()?.get(part)?;
        }
        Some(value)
    }

    pub(super) fn signed(&self) -> (&[u8], &[u8]) {
        (self.signed.as_bytes(), &self.signature)
    }

    fn text(&self, name: &str) -> &str {
        let value = self.claims.get(name).and_then(Value::as_str);
        value.unwrap_or_default()
    }
}

/// A string, or nothing.
fn text_of<'v>(
    from: &'v Map<String, Value>,
    name: &str,
    wrong: Refusal,
) -> Result<Option<&'v str>, Refusal> {
    match from.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(wrong),
    }
}

/// Seconds since the epoch; a part of a second is cut off.
fn time_of(
    from: &Map<String, Value>,
    name: &str,
    wrong: Refusal,
    range: Refusal,
) -> Result<Option<u64>, Refusal> {
    let number = match from.get(name) {
        None => return Ok(None),
        Some(Value::Number(number)) => number,
        Some(_) => return Err(wrong),
    };
    if let Some(whole) = number.as_u64() {
        return Ok(Some(whole));
    }
    match number.as_f64() {
        Some(part) if (0.0..9.2e18).contains(&part) => Ok(Some(part as u64)),
        _ => Err(range),
    }
}

/// A claim as a header carries it: a text, a number, a truth value; `None` for everything else.
pub fn plain(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) => Some(text.as_str().into()),
        Value::Bool(yes) => Some(if *yes { "true" } else { "false" }.into()),
        Value::Number(number) => Some(match (number.as_u64(), number.as_f64()) {
            (Some(whole), _) => whole.to_string().into(),
            (None, Some(part)) if part >= 0.0 && part.fract() == 0.0 && part < 1.8e19 => {
                (part as u64).to_string().into()
            }
            (None, Some(part)) => format!("{part:.6}").into(),
            (None, None) => return None,
        }),
        _ => None,
    }
}
