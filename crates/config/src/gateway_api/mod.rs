//! Gateway API (`gateway.networking.k8s.io`): each kind's `spec` as a type, with the defaults that its definition in a
//! cluster would fill in, so that a file and an API server give the same object.
//!
//! Reading is strict: an unknown field or value is an error with its path. What is known and not acted upon is told by
//! [`crate::validate`]. Lengths, patterns and exclusive fields are its rules too.

mod gateway;
mod policy;
mod route;

use serde::Deserialize;

pub use gateway::{
    AllowedListeners, AllowedRoutes, CertificateMode, ClientValidation, Expression, FromNamespaces,
    Frontend, FrontendValidation, Gateway, GatewayAddress, GatewayClass, GatewayTls,
    Infrastructure, LabelSelector, Listener, ListenerNamespaces, ListenerSet, ListenerTls,
    Operator, ParametersReference, PortTls, RouteGroupKind, RouteNamespaces, TlsMode,
    ValidationMode,
};
pub use policy::{
    BackendTlsPolicy, BackendValidation, GrantFrom, GrantTo, LocalReference, PolicyTarget,
    ReferenceGrant, SubjectAltName, SubjectAltNameType, WellKnownCaCertificates,
};
pub use route::{
    BackendRef, Cors, Filter, FilterType, Fraction, GrpcMatch, GrpcMethodMatch, GrpcRoute,
    GrpcRule, HeaderFilter, HeaderMatch, HttpBackendRef, HttpMatch, HttpRoute, HttpRule, L4Rule,
    MatchType, Mirror, NameValue, ParentReference, PathMatch, PathMatchType, PathModifier,
    PathModifierType, Redirect, Retry, TcpRoute, Timeouts, TlsRoute, UrlRewrite,
};

/// The group of all kinds of Gateway API.
pub const GROUP: &str = "gateway.networking.k8s.io";

/// A reference to an object, perhaps of another namespace (certificates).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectReference {
    /// The core group where it is left out.
    #[serde(default)]
    pub group: String,
    /// `Secret` where it is left out.
    #[serde(default = "secret")]
    pub kind: String,
    /// The object's name.
    pub name: String,
    /// The referrer's own where it is left out.
    #[serde(default)]
    pub namespace: Option<String>,
}

fn secret() -> String {
    "Secret".to_owned()
}

/// A duration of Gateway API (GEP-2257) in nanoseconds: up to four of `NNNNN(h|m|s|ms)`.
pub fn duration_nanos(text: &str) -> Option<i64> {
    let mut rest = text;
    let mut total: i64 = 0;
    for _ in 0..4 {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 || digits > 5 {
            return None;
        }
        let (number, tail) = rest.split_at(digits);
        let (unit, tail) = if let Some(tail) = tail.strip_prefix("ms") {
            (1_000_000, tail)
        } else {
            let unit = match tail.bytes().next()? {
                b'h' => 3_600_000_000_000,
                b'm' => 60_000_000_000,
                b's' => 1_000_000_000,
                _ => return None,
            };
            (unit, &tail[1..])
        };
        total += number.parse::<i64>().ok()? * unit;
        if tail.is_empty() {
            return Some(total);
        }
        rest = tail;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_the_specification() {
        for (text, expected) in [
            ("10s", Some(10_000_000_000)),
            ("1h30m", Some(5_400_000_000_000)),
            ("500ms", Some(500_000_000)),
            ("1s500ms", Some(1_500_000_000)),
            ("0s", Some(0)),
            ("", None),
            ("1", None),
            ("1d", None),
            ("1.5s", None),
            ("-1s", None),
            ("100000s", None),
            ("1s1s1s1s1s", None),
        ] {
            assert_eq!(duration_nanos(text), expected, "{text}");
        }
    }
}
