//! What a request must look like: `HTTPMatchRequest` → `RouteMatch`.
//!
//! Conditions about the client itself (source labels, namespace, gateways, port) are decided here, in the control
//! plane, and never reach the wire; everything about the request does.

use std::collections::BTreeMap;

use proto::{
    envoy::{
        config::route::v3::{
            HeaderMatcher, QueryParameterMatcher, RouteMatch, header_matcher::HeaderMatchSpecifier,
            query_parameter_matcher::QueryParameterMatchSpecifier, route_match::PathSpecifier,
        },
        r#type::matcher::v3::{
            ListMatcher, MetadataMatcher, OrMatcher, RegexMatcher, StringMatcher, ValueMatcher,
            list_matcher,
            metadata_matcher::{self, path_segment},
            string_matcher::MatchPattern,
            value_matcher,
        },
    },
    istio::networking::v1alpha3::{HttpMatchRequest, StringMatch, string_match::MatchType},
};

use super::Semantics;

/// Header names of this form match a claim of the request's validated token, not a header.
const CLAIM_PREFIX: &str = "@request.auth.claims";

/// The client on whose behalf routes are built, as far as matches ask about it.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// Labels of the workload.
    pub labels: &'a BTreeMap<String, String>,
    /// Namespace of the workload.
    pub namespace: &'a str,
    /// `mesh` for a sidecar, else the one gateway (`namespace/name`) that routes are built for.
    pub gateway: &'a str,
    /// Port of the listener, as the user wrote it.
    pub port: u32,
}

impl Client<'_> {
    /// Whether this client is meant by the conditions that L4 and HTTP matches share.
    pub fn is_source(
        &self,
        gateways: &[String],
        labels: &BTreeMap<String, String>,
        namespace: &str,
    ) -> bool {
        if !gateways.is_empty() {
            return gateways.iter().any(|g| g == self.gateway);
        }
        self.has_labels(labels) && (namespace.is_empty() || namespace == self.namespace)
    }

    /// Whether the workload carries all of `labels`.
    pub fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.iter().all(|(k, v)| self.labels.get(k) == Some(v))
    }

    /// Whether an HTTP match can apply to this client at all.
    pub fn can_match(&self, m: &HttpMatchRequest) -> bool {
        (m.port == 0 || m.port == self.port)
            && self.is_source(&m.gateways, &m.source_labels, &m.source_namespace)
    }

    /// Whether the client's part of a TCP or TLS match applies. There, unlike for HTTP, gateways do not replace the
    /// conditions on labels and namespace.
    pub fn can_match_l4(
        &self,
        port: u32,
        gateways: &[String],
        labels: &BTreeMap<String, String>,
        namespace: &str,
    ) -> bool {
        (port == 0 || port == self.port)
            && (gateways.is_empty() || gateways.iter().any(|g| g == self.gateway))
            && self.has_labels(labels)
            && (namespace.is_empty() || namespace == self.namespace)
    }
}

/// A match of every request.
pub(super) fn everything() -> RouteMatch {
    RouteMatch {
        path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
        ..Default::default()
    }
}

/// The request side of a match; `None` matches everything.
pub(super) fn route_match(m: Option<&HttpMatchRequest>, semantics: Semantics) -> RouteMatch {
    let mut out = everything();
    let Some(m) = m else { return out };
    for (name, value) in &m.headers {
        match claim_matcher(name, value) {
            Some(matcher) => out.dynamic_metadata.push(matcher),
            None => out.headers.push(header(name, value)),
        }
    }
    for (name, value) in &m.without_headers {
        match claim_matcher(name, value) {
            Some(matcher) => out.dynamic_metadata.push(MetadataMatcher {
                invert: true,
                ..matcher
            }),
            None => out.headers.push(HeaderMatcher {
                invert_match: true,
                // "Not this value" also holds where the header is missing.
                treat_missing_header_as_empty: !is_presence(value),
                ..header(name, value)
            }),
        }
    }
    out.headers.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(path) = m.uri.as_ref().and_then(|uri| path(uri, semantics)) {
        out.path_specifier = Some(path);
    }
    out.case_sensitive = Some(!m.ignore_uri_case);
    // Pseudo headers follow in this order, after the sorted ones.
    for (name, value) in [
        (":method", &m.method),
        (":authority", &m.authority),
        (":scheme", &m.scheme),
    ] {
        if let Some(value) = value {
            out.headers.push(header(name, value));
        }
    }
    out.query_parameters = m
        .query_params
        .iter()
        .map(|(name, value)| query(name, value))
        .collect();
    out
}

/// Whether nothing passes this match: routes behind it can never be reached.
pub fn is_catch_all(m: &RouteMatch) -> bool {
    let any_path = match &m.path_specifier {
        Some(PathSpecifier::Prefix(p) | PathSpecifier::PathSeparatedPrefix(p)) => p == "/",
        Some(PathSpecifier::SafeRegex(r)) => r.regex == ".*",
        _ => false,
    };
    any_path
        && m.headers.is_empty()
        && m.query_parameters.is_empty()
        && m.dynamic_metadata.is_empty()
}

/// `StringMatch` in Envoy's words; `None` where the user gave no value, which matches presence.
pub(super) fn string_matcher(m: &StringMatch) -> Option<StringMatcher> {
    let pattern = match m.match_type.as_ref()? {
        MatchType::Exact(v) => MatchPattern::Exact(v.clone()),
        MatchType::Prefix(v) => MatchPattern::Prefix(v.clone()),
        MatchType::Regex(v) => MatchPattern::SafeRegex(regex(v)),
    };
    Some(StringMatcher {
        match_pattern: Some(pattern),
        ..Default::default()
    })
}

/// A matcher of equal strings.
pub fn exact(value: &str) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(MatchPattern::Exact(value.to_owned())),
        ..Default::default()
    }
}

/// A matcher of strings that begin so.
pub fn prefix(value: &str) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(MatchPattern::Prefix(value.to_owned())),
        ..Default::default()
    }
}

/// RE2 with Envoy's default engine.
pub(super) fn regex(pattern: &str) -> RegexMatcher {
    RegexMatcher {
        regex: pattern.to_owned(),
        ..Default::default()
    }
}

fn path(uri: &StringMatch, semantics: Semantics) -> Option<PathSpecifier> {
    Some(match uri.match_type.as_ref()? {
        MatchType::Exact(v) => PathSpecifier::Path(v.clone()),
        MatchType::Prefix(v) if semantics != Semantics::Istio && v != "/" => {
            PathSpecifier::PathSeparatedPrefix(v.strip_suffix('/').unwrap_or(v).to_owned())
        }
        MatchType::Prefix(v) => PathSpecifier::Prefix(v.clone()),
        MatchType::Regex(v) => PathSpecifier::SafeRegex(regex(v)),
    })
}

fn header(name: &str, value: &StringMatch) -> HeaderMatcher {
    let specifier = if is_presence(value) {
        Some(HeaderMatchSpecifier::PresentMatch(true))
    } else {
        string_matcher(value).map(HeaderMatchSpecifier::StringMatch)
    };
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: specifier,
        ..Default::default()
    }
}

fn query(name: &str, value: &StringMatch) -> QueryParameterMatcher {
    let specifier = if is_presence(value) {
        Some(QueryParameterMatchSpecifier::PresentMatch(true))
    } else {
        string_matcher(value).map(QueryParameterMatchSpecifier::StringMatch)
    };
    QueryParameterMatcher {
        name: name.to_owned(),
        query_parameter_match_specifier: specifier,
    }
}

/// No value, or the regex `*`, which is none: the field only has to be there.
fn is_presence(value: &StringMatch) -> bool {
    match &value.match_type {
        None => true,
        Some(MatchType::Regex(r)) => r == "*",
        Some(_) => false,
    }
}

/// `@request.auth.claims.a.b` or `@request.auth.claims[a.b][c]`: the path of the claim.
fn claim_path(name: &str) -> Option<Vec<&str>> {
    let rest = strip_prefix_ignoring_case(name, CLAIM_PREFIX)?;
    if let Some(dotted) = rest.strip_prefix('.') {
        let parts: Vec<&str> = dotted.split('.').collect();
        return (!parts.iter().any(|p| p.is_empty())).then_some(parts);
    }
    let inner = rest.strip_prefix('[')?.strip_suffix(']')?;
    let parts: Vec<&str> = inner.split("][").collect();
    (!parts.iter().any(|p| p.is_empty())).then_some(parts)
}

fn strip_prefix_ignoring_case<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let head = text.get(..prefix.len())?;
    head.eq_ignore_ascii_case(prefix)
        .then(|| &text[prefix.len()..])
}

/// A claim matches as a string or as a member of a list of strings.
fn claim_matcher(name: &str, value: &StringMatch) -> Option<MetadataMatcher> {
    let claim = claim_path(name)?;
    let segment = |key: &str| metadata_matcher::PathSegment {
        segment: Some(path_segment::Segment::Key(key.to_owned())),
    };
    let string = string_matcher(value).map(|m| ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::StringMatch(m)),
    });
    let member = ListMatcher {
        match_pattern: string
            .clone()
            .map(|m| list_matcher::MatchPattern::OneOf(Box::new(m))),
    };
    let list = ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::ListMatch(Box::new(member))),
    };
    let either = value_matcher::MatchPattern::OrMatch(OrMatcher {
        value_matchers: std::iter::once(list).chain(string).collect(),
    });
    Some(MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".to_owned(),
        path: std::iter::once("payload")
            .chain(claim)
            .map(segment)
            .collect(),
        value: Some(ValueMatcher {
            match_pattern: Some(either),
        }),
        invert: false,
    })
}
