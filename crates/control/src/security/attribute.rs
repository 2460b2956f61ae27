//! What a policy can ask about a request or connection, and how RBAC asks it.

use proto::{
    any,
    envoy::{
        config::{
            core::v3::{CidrRange, TypedExtensionConfig},
            rbac::v3::{
                Permission, Principal,
                permission::Rule,
                principal::{Authenticated, Identifier},
            },
        },
        extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
        r#type::matcher::v3::{MetadataMatcher, PathMatcher, StringMatcher, path_matcher},
    },
};

use super::{
    jwt,
    matchers::{self, quote},
    rule::{Inexpressible, Place, Term},
};
use crate::listener::chain;

const SPIFFE: &str = "spiffe://";
const AUTHORITY: &str = ":authority";
const METHOD: &str = ":method";
/// Before the name of a filter in a `when` key: the metadata of any filter can be asked for.
const ANY_FILTER: &str = "experimental.envoy.filters.";
const REQUEST_HEADER: &str = "request.headers";
const REQUEST_CLAIM: &str = "request.auth.claims";

/// An attribute of a request or connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Attribute<'a> {
    DestinationIp,
    DestinationPort,
    ServerName,
    Host,
    Method,
    Path,
    /// Metadata of a filter: the whole key.
    Metadata(&'a str),
    SourceIp,
    RemoteIp,
    Namespace,
    ServiceAccount,
    TrustDomain,
    Principal,
    RequestPrincipal,
    RequestAudiences,
    RequestPresenter,
    /// The part of the key behind `request.headers`.
    Header(&'a str),
    /// The part of the key behind `request.auth.claims`.
    Claim(&'a str),
}

impl<'a> Attribute<'a> {
    /// The attribute of a condition (`when[].key`).
    pub(crate) fn of_key(key: &'a str) -> Result<Self, Inexpressible> {
        Ok(match key {
            "destination.ip" => Self::DestinationIp,
            "destination.port" => Self::DestinationPort,
            "connection.sni" => Self::ServerName,
            "source.ip" => Self::SourceIp,
            "remote.ip" => Self::RemoteIp,
            "source.namespace" => Self::Namespace,
            "source.serviceAccount" => Self::ServiceAccount,
            "source.trustDomain" => Self::TrustDomain,
            "source.principal" => Self::Principal,
            "request.auth.principal" => Self::RequestPrincipal,
            "request.auth.audiences" => Self::RequestAudiences,
            "request.auth.presenter" => Self::RequestPresenter,
            _ => {
                if key.starts_with(ANY_FILTER) {
                    Self::Metadata(key)
                } else if let Some(rest) = key.strip_prefix(REQUEST_HEADER) {
                    Self::Header(rest)
                } else if let Some(rest) = key.strip_prefix(REQUEST_CLAIM) {
                    Self::Claim(rest)
                } else {
                    return Err(Inexpressible::UnknownKey(key.to_owned()));
                }
            }
        })
    }

    /// Whether it says who asks (a principal), not what is asked for (a permission).
    pub(crate) fn is_about_the_source(&self) -> bool {
        !matches!(
            self,
            Self::DestinationIp
                | Self::DestinationPort
                | Self::ServerName
                | Self::Host
                | Self::Method
                | Self::Path
                | Self::Metadata(_)
        )
    }

    pub(super) fn takes_all_values_at_once(&self) -> bool {
        matches!(
            self,
            Self::Metadata(_)
                | Self::RequestPrincipal
                | Self::RequestAudiences
                | Self::RequestPresenter
                | Self::Claim(_)
        )
    }

    pub(super) fn permission(&self, value: &str, place: Place<'_>) -> Result<Rule, Inexpressible> {
        Ok(match self {
            Self::DestinationIp => Rule::DestinationIp(range("destination.ip", value)?),
            Self::DestinationPort => Rule::DestinationPort(port(value)?),
            Self::ServerName => Rule::RequestedServerName(matchers::string(value)),
            Self::Host => {
                http_only("hosts", place)?;
                Rule::Header(matchers::header(AUTHORITY, value, true))
            }
            Self::Method => {
                http_only("methods", place)?;
                Rule::Header(matchers::header(METHOD, value, false))
            }
            Self::Path => {
                http_only("paths", place)?;
                path(value)
            }
            other => unreachable!("{other:?} is no permission of one value"),
        })
    }

    // The newer `sourced_metadata` can say no more of a request, and older proxies do not know it.
    #[allow(deprecated)]
    pub(super) fn permission_of_values(&self, values: &[String]) -> Result<Rule, Inexpressible> {
        let Self::Metadata(key) = self else {
            unreachable!("{self:?} is no permission of many values");
        };
        let inner = key.strip_prefix("experimental.").unwrap_or(key);
        let inner = inner.strip_suffix(']').unwrap_or(inner);
        let (filter, name) = inner.split_once('[').ok_or_else(|| Inexpressible::Value {
            key: "when[].key".to_owned(),
            value: (*key).to_owned(),
            what: "of the form experimental.envoy.filters.NAME[KEY]",
        })?;
        let values = values
            .iter()
            .map(|value| {
                let listed = value.strip_prefix('[').and_then(|v| v.strip_suffix(']'));
                match listed {
                    Some(_) => {
                        let element = value.trim_matches(['[', ']']);
                        matchers::list_value(matchers::string_value(matchers::string(element)))
                    }
                    None => matchers::string_value(matchers::string(value)),
                }
            })
            .collect();
        Ok(Rule::Metadata(matchers::metadata(
            filter,
            &[name],
            matchers::any_value(values),
        )))
    }

    pub(super) fn principal(
        &self,
        value: &str,
        place: Place<'_>,
    ) -> Result<Identifier, Inexpressible> {
        Ok(match self {
            Self::SourceIp => Identifier::DirectRemoteIp(range("source.ip", value)?),
            Self::RemoteIp => Identifier::RemoteIp(range("remote.ip", value)?),
            Self::Namespace => {
                let parts: Vec<String> = value.split('*').map(quote).collect();
                authenticated(matchers::regex(format!(".*/ns/{}/.*", parts.join(".*"))))
            }
            Self::ServiceAccount => {
                let (namespace, account) =
                    value.split_once('/').unwrap_or((place.namespace, value));
                // Other pairs may stand between the namespace and the account and behind it.
                authenticated(matchers::regex(format!(
                    "spiffe://.+/ns/{}/(.+/|)sa/{}(/.+)?",
                    quote(namespace),
                    quote(account)
                )))
            }
            Self::TrustDomain => authenticated(trust_domain(value)),
            Self::Principal => authenticated(matchers::with_prefix(value, SPIFFE)),
            Self::Header(rest) => {
                http_only(REQUEST_HEADER, place)?;
                let name = rest.strip_prefix('[').and_then(|r| r.strip_suffix(']'));
                let name = name.ok_or_else(|| in_brackets(REQUEST_HEADER, rest))?;
                Identifier::Header(matchers::header(name, value, false))
            }
            other => unreachable!("{other:?} is no principal of one value"),
        })
    }

    pub(super) fn principal_of_values(
        &self,
        values: &[String],
        place: Place<'_>,
    ) -> Result<Principal, Inexpressible> {
        let listed = |path: &[&str], key: &str| {
            http_only(key, place)?;
            let one = matchers::any_value(
                values
                    .iter()
                    .map(|v| matchers::string_value(matchers::string(v)))
                    .collect(),
            );
            // A claim may be one string or a list of them.
            let value = matchers::any_value(vec![matchers::list_value(one.clone()), one]);
            Ok(of_metadata(jwt::claim(path, value)))
        };
        match self {
            Self::RequestPrincipal => {
                http_only("request.auth.principal", place)?;
                let mut alternatives: Vec<_> =
                    values.iter().map(|v| issuer_and_subject(v)).collect();
                Ok(if alternatives.len() == 1 {
                    alternatives.remove(0)
                } else {
                    Principal::any(alternatives)
                })
            }
            Self::RequestAudiences => listed(&["aud"], "request.auth.audiences"),
            Self::RequestPresenter => listed(&["azp"], "request.auth.presenter"),
            Self::Claim(rest) => listed(&claim_path(rest)?, REQUEST_CLAIM),
            other => unreachable!("{other:?} is no principal of many values"),
        }
    }
}

/// A permission of one rule.
pub(super) fn permission(rule: Rule) -> Permission {
    Permission { rule: Some(rule) }
}

/// A principal of one kind of identity.
pub(super) fn principal(identifier: Identifier) -> Principal {
    Principal {
        identifier: Some(identifier),
    }
}

// The newer `sourced_metadata` can say no more of a request, and older proxies do not know it.
#[allow(deprecated)]
fn of_metadata(matcher: MetadataMatcher) -> Principal {
    principal(Identifier::Metadata(matcher))
}

fn authenticated(name: StringMatcher) -> Identifier {
    Identifier::Authenticated(Authenticated {
        principal_name: Some(name),
    })
}

/// A path; `{*}` stands for one segment and `{**}` for any number of them.
fn path(value: &str) -> Rule {
    if value.contains("{*}") || value.contains("{**}") {
        let config = UriTemplateMatchConfig {
            path_template: value.replace("{**}", "**").replace("{*}", "*"),
        };
        return Rule::UriTemplate(TypedExtensionConfig {
            name: "uri-template".to_owned(),
            typed_config: Some(any::pack(&config)),
        });
    }
    Rule::UrlPath(PathMatcher {
        rule: Some(path_matcher::Rule::Path(matchers::string(value))),
    })
}

fn trust_domain(value: &str) -> StringMatcher {
    match value.split_once('*') {
        _ if value == "*" => matchers::prefix(SPIFFE),
        None => matchers::prefix(&format!("{SPIFFE}{value}/")),
        Some((start, end)) => {
            matchers::regex(format!("{SPIFFE}{}[^/]*{}/.*", quote(start), quote(end)))
        }
    }
}

/// `ISSUER/SUBJECT`. An issuer may be a URL, so the last slash separates; a star stands at one end or for all.
fn issuer_and_subject(value: &str) -> Principal {
    let anything = || matchers::regex(".+".to_owned());
    let split = value.rsplit_once('/');
    let (issuer, subject) = match (split, value.strip_prefix('*'), value.strip_suffix('*')) {
        _ if value == "*" => (anything(), anything()),
        (Some(("*", subject)), Some(_), _) => (anything(), matchers::exact(subject)),
        (Some((issuer, subject)), Some(_), _) => {
            let issuer = issuer.strip_prefix('*').unwrap_or(issuer);
            (matchers::suffix(issuer), matchers::exact(subject))
        }
        (None, Some(end), _) => (anything(), matchers::suffix(end)),
        (Some((issuer, "*")), None, Some(_)) => (matchers::exact(issuer), anything()),
        (Some((issuer, subject)), None, Some(_)) => {
            let subject = subject.strip_suffix('*').unwrap_or(subject);
            (matchers::exact(issuer), matchers::prefix(subject))
        }
        (None, None, Some(start)) => (matchers::prefix(start), anything()),
        (Some((issuer, subject)), None, None) => {
            (matchers::exact(issuer), matchers::exact(subject))
        }
        (None, None, None) => (matchers::exact(value), matchers::exact("")),
    };
    let claim =
        |name: &str, matcher| of_metadata(jwt::claim(&[name], matchers::string_value(matcher)));
    Principal::all(vec![claim("iss", issuer), claim("sub", subject)])
}

/// The names in `[a][b]`; where the brackets do not pair up, all between the first and the last is one name.
fn claim_path(rest: &str) -> Result<Vec<&str>, Inexpressible> {
    let whole = rest
        .strip_prefix('[')
        .and_then(|r| r.strip_suffix(']'))
        .ok_or_else(|| in_brackets(REQUEST_CLAIM, rest))?;
    let names: Vec<&str> = whole.split("][").collect();
    let nested = names.iter().all(|name| !name.contains(['[', ']']));
    Ok(if nested { names } else { vec![whole] })
}

fn in_brackets(attribute: &str, rest: &str) -> Inexpressible {
    Inexpressible::Value {
        key: attribute.to_owned(),
        value: rest.to_owned(),
        what: "a name in square brackets",
    }
}

fn http_only(key: &str, place: Place<'_>) -> Result<(), Inexpressible> {
    if place.tcp {
        return Err(Inexpressible::HttpOnly(key.to_owned()));
    }
    Ok(())
}

fn range(key: &str, value: &str) -> Result<CidrRange, Inexpressible> {
    chain::range(value).ok_or_else(|| Inexpressible::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        what: "an address or a network in CIDR form",
    })
}

fn port(value: &str) -> Result<u32, Inexpressible> {
    value
        .parse::<u16>()
        .map(u32::from)
        .map_err(|_| Inexpressible::Value {
            key: "destination.port".to_owned(),
            value: value.to_owned(),
            what: "a port (0 to 65535)",
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_nested_by_brackets() {
        assert_eq!(claim_path("[groups]"), Ok(vec!["groups"]));
        assert_eq!(claim_path("[a][b][c]"), Ok(vec!["a", "b", "c"]));
        assert_eq!(claim_path("[a[b]]"), Ok(vec!["a[b]"]));
        assert!(claim_path("groups").is_err());
    }

    #[test]
    fn a_star_in_a_request_principal_stands_for_an_end() {
        let text = |value: &str| format!("{:?}", issuer_and_subject(value));
        assert!(text("*").matches(".+").count() == 2);
        assert!(text("*/sub").contains("Exact(\"sub\")"));
        assert!(text("https://issuer/x/*").contains("Exact(\"https://issuer/x\")"));
        assert!(text("*@example.com/me").contains("Suffix(\"@example.com\")"));
        assert!(text("iss/pre*").contains("Prefix(\"pre\")"));
        assert!(text("*sub").contains("Suffix(\"sub\")"));
    }
}
