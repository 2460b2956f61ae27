//! One rule of an AuthorizationPolicy as a policy of Envoy's RBAC.
//!
//! A rule says who (`from`, parts of `when`) may do what (`to`, other parts of `when`). RBAC wants the same: principals
//! and permissions, each a list of alternatives, each of them a conjunction of [`Clause`]s.
//!
//! What a TCP chain cannot see (paths, tokens, …) is inexpressible there. A rule that allows is then left out, so that
//! it allows less; of a rule that denies or audits only that clause is left out, so that it denies more.

use std::borrow::Cow;

use proto::{
    envoy::config::rbac::v3::{Permission, Policy, Principal, permission, principal, rbac::Action},
    istio::security::v1beta1::{Rule, rule},
};

use super::{
    attribute::{self, Attribute},
    trust_domain::TrustDomains,
};

/// Where a rule is enforced, and for what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Namespace of the policy: service accounts without a namespace are of this one.
    pub(crate) namespace: &'a str,
    /// On connections rather than on requests.
    pub(crate) tcp: bool,
    pub(crate) action: Action,
    pub(crate) trust_domains: &'a TrustDomains,
}

/// Something that cannot be said in the place where it is to be enforced, or at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Inexpressible {
    #[error("`{0}` is known for HTTP only")]
    HttpOnly(String),
    #[error("`{key}`: {value:?} is not {what}")]
    Value {
        key: String,
        value: String,
        what: &'static str,
    },
    #[error("`when[].key`: {0:?} is not an attribute that policies know")]
    UnknownKey(String),
}

/// The policy of a rule.
///
/// # Errors
///
/// The rule, or for an allowing rule some clause of it, cannot be expressed: the rule has to be left out.
pub(crate) fn policy(rule: &Rule, place: Place<'_>) -> Result<Policy, Inexpressible> {
    let mut who_when = Vec::new();
    let mut what_when = Vec::new();
    for when in &rule.when {
        let attribute = Attribute::of_key(&when.key)?;
        let side = if attribute.is_about_the_source() {
            &mut who_when
        } else {
            &mut what_when
        };
        side.extend(clause(attribute, &when.values, &when.not_values));
    }

    let mut principals: Vec<_> = rule.from.iter().map(|f| sources(f, &who_when)).collect();
    if principals.is_empty() {
        principals.push(who_when);
    }
    let mut permissions: Vec<_> = rule.to.iter().map(|t| operations(t, &what_when)).collect();
    if permissions.is_empty() {
        permissions.push(what_when);
    }
    Ok(Policy {
        permissions: permissions
            .iter()
            .map(|clauses| conjunction(clauses, place))
            .collect::<Result<_, _>>()?,
        principals: principals
            .iter()
            .map(|clauses| conjunction(clauses, place))
            .collect::<Result<_, _>>()?,
        ..Default::default()
    })
}

/// A policy that matches nothing: an object without rules is enforced too.
pub(crate) fn never() -> Policy {
    Policy {
        permissions: vec![Permission::not(Permission::anything())],
        principals: vec![Principal::not(Principal::anything())],
        ..Default::default()
    }
}

/// One of the values must hold, and none of the others may.
#[derive(Debug, Clone)]
struct Clause<'a> {
    attribute: Attribute<'a>,
    values: &'a [String],
    not_values: &'a [String],
}

fn clause<'a>(
    attribute: Attribute<'a>,
    values: &'a [String],
    not_values: &'a [String],
) -> Option<Clause<'a>> {
    (!values.is_empty() || !not_values.is_empty()).then_some(Clause {
        attribute,
        values,
        not_values,
    })
}

fn sources<'a>(from: &'a rule::From, when: &[Clause<'a>]) -> Vec<Clause<'a>> {
    let Some(s) = &from.source else {
        return when.to_vec();
    };
    let own = [
        clause(Attribute::Principal, &s.principals, &s.not_principals),
        clause(
            Attribute::RequestPrincipal,
            &s.request_principals,
            &s.not_request_principals,
        ),
        clause(
            Attribute::ServiceAccount,
            &s.service_accounts,
            &s.not_service_accounts,
        ),
        clause(
            Attribute::TrustDomain,
            &s.trust_domains,
            &s.not_trust_domains,
        ),
        clause(Attribute::Namespace, &s.namespaces, &s.not_namespaces),
        clause(
            Attribute::RemoteIp,
            &s.remote_ip_blocks,
            &s.not_remote_ip_blocks,
        ),
        clause(Attribute::SourceIp, &s.ip_blocks, &s.not_ip_blocks),
    ];
    own.into_iter()
        .flatten()
        .chain(when.iter().cloned())
        .collect()
}

fn operations<'a>(to: &'a rule::To, when: &[Clause<'a>]) -> Vec<Clause<'a>> {
    let Some(o) = &to.operation else {
        return when.to_vec();
    };
    let own = [
        clause(Attribute::Host, &o.hosts, &o.not_hosts),
        clause(Attribute::Method, &o.methods, &o.not_methods),
        clause(Attribute::Path, &o.paths, &o.not_paths),
        clause(Attribute::DestinationPort, &o.ports, &o.not_ports),
    ];
    own.into_iter()
        .flatten()
        .chain(when.iter().cloned())
        .collect()
}

fn conjunction<T: Term>(clauses: &[Clause<'_>], place: Place<'_>) -> Result<T, Inexpressible> {
    let mut out = Vec::new();
    for clause in clauses {
        out.extend(disjunction(&clause.attribute, clause.values, place)?);
        out.extend(disjunction(&clause.attribute, clause.not_values, place)?.map(T::not));
    }
    if out.is_empty() {
        out.push(T::anything());
    }
    Ok(T::all(out))
}

/// One of the values; `None` where none of them can be expressed.
fn disjunction<T: Term>(
    attribute: &Attribute<'_>,
    values: &[String],
    place: Place<'_>,
) -> Result<Option<T>, Inexpressible> {
    let values = match attribute {
        Attribute::Principal => Cow::Owned(place.trust_domains.principals(values)),
        Attribute::TrustDomain => Cow::Owned(place.trust_domains.expand(values)),
        _ => Cow::Borrowed(values),
    };
    if values.is_empty() {
        return Ok(None);
    }
    if attribute.takes_all_values_at_once() {
        return tolerated(T::of_values(attribute, &values, place), place);
    }
    let mut out = Vec::new();
    for value in values.iter() {
        out.extend(tolerated(T::of_value(attribute, value, place), place)?);
    }
    Ok((!out.is_empty()).then(|| T::any(out)))
}

/// Only a rule that allows must be exact.
fn tolerated<T>(
    term: Result<T, Inexpressible>,
    place: Place<'_>,
) -> Result<Option<T>, Inexpressible> {
    match term {
        Ok(term) => Ok(Some(term)),
        Err(error) if place.action == Action::Allow => Err(error),
        Err(_) => Ok(None),
    }
}

/// Principals and permissions have the same grammar in RBAC.
pub(crate) trait Term: Sized {
    fn all(terms: Vec<Self>) -> Self;
    fn any(terms: Vec<Self>) -> Self;
    fn not(term: Self) -> Self;
    fn anything() -> Self;
    /// What a single value asks for.
    fn of_value(
        attribute: &Attribute<'_>,
        value: &str,
        place: Place<'_>,
    ) -> Result<Self, Inexpressible>;
    /// What one of the values asks for, for attributes that RBAC compares with all values at once.
    fn of_values(
        attribute: &Attribute<'_>,
        values: &[String],
        place: Place<'_>,
    ) -> Result<Self, Inexpressible>;
}

impl Term for Permission {
    fn all(rules: Vec<Self>) -> Self {
        attribute::permission(permission::Rule::AndRules(permission::Set { rules }))
    }

    fn any(rules: Vec<Self>) -> Self {
        attribute::permission(permission::Rule::OrRules(permission::Set { rules }))
    }

    fn not(term: Self) -> Self {
        attribute::permission(permission::Rule::NotRule(Box::new(term)))
    }

    fn anything() -> Self {
        attribute::permission(permission::Rule::Any(true))
    }

    fn of_value(
        attribute: &Attribute<'_>,
        value: &str,
        place: Place<'_>,
    ) -> Result<Self, Inexpressible> {
        attribute
            .permission(value, place)
            .map(attribute::permission)
    }

    fn of_values(
        attribute: &Attribute<'_>,
        values: &[String],
        _: Place<'_>,
    ) -> Result<Self, Inexpressible> {
        attribute
            .permission_of_values(values)
            .map(attribute::permission)
    }
}

impl Term for Principal {
    fn all(ids: Vec<Self>) -> Self {
        attribute::principal(principal::Identifier::AndIds(principal::Set { ids }))
    }

    fn any(ids: Vec<Self>) -> Self {
        attribute::principal(principal::Identifier::OrIds(principal::Set { ids }))
    }

    fn not(term: Self) -> Self {
        attribute::principal(principal::Identifier::NotId(Box::new(term)))
    }

    fn anything() -> Self {
        attribute::principal(principal::Identifier::Any(true))
    }

    fn of_value(
        attribute: &Attribute<'_>,
        value: &str,
        place: Place<'_>,
    ) -> Result<Self, Inexpressible> {
        attribute.principal(value, place).map(attribute::principal)
    }

    fn of_values(
        attribute: &Attribute<'_>,
        values: &[String],
        place: Place<'_>,
    ) -> Result<Self, Inexpressible> {
        attribute.principal_of_values(values, place)
    }
}
