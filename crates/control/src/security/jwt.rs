//! RequestAuthentication as Envoy's `jwt_authn`: a token that is there must be valid; whether one must be there is for
//! AuthorizationPolicy to say.

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    any,
    envoy::{
        config::{
            core::v3::{DataSource, data_source},
            route::v3::{RouteMatch, route_match::PathSpecifier},
        },
        extensions::filters::{
            http::jwt_authn::v3::{
                JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement,
                JwtRequirementAndList, JwtRequirementOrList, RequirementRule,
                jwt_provider::{JwksSourceSpecifier, NormalizePayload},
                jwt_requirement::RequiresType,
                requirement_rule::RequirementType,
            },
            network::http_connection_manager::v3::HttpFilter,
        },
        r#type::matcher::v3::{MetadataMatcher, ValueMatcher},
    },
    istio::security::v1beta1::JwtRule,
};

use super::matchers;
use crate::listener::filters;

/// Name of the filter, and of the metadata that it leaves behind.
pub(crate) const JWT_AUTHN: &str = "envoy.filters.http.jwt_authn";
/// Key of the metadata under which the claims of the token are found.
const PAYLOAD: &str = "payload";
/// Claims that list their values in one string, beside those that a rule names.
const SPACE_DELIMITED: [&str; 2] = ["permission", "scope"];

/// A key set with one key whose private half was thrown away at birth: no token is valid under it.
const NOBODY: &str = include_str!("nobody.jwks.json");

/// The filter of all rules that apply to a workload; `None` without any.
///
/// A gateway chooses its routes again once the claims are known (`clear_route_cache`).
pub(crate) fn filter(mut rules: Vec<&JwtRule>, clear_route_cache: bool) -> Option<HttpFilter> {
    if rules.is_empty() {
        return None;
    }
    rules.sort_by(|a, b| a.issuer.cmp(&b.issuer));
    let providers: BTreeMap<String, JwtProvider> = rules
        .iter()
        .enumerate()
        .map(|(index, rule)| (name(index), provider(rule, clear_route_cache)))
        .collect();
    let config = JwtAuthentication {
        rules: vec![RequirementRule {
            r#match: Some(RouteMatch {
                path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
                ..Default::default()
            }),
            requirement_type: Some(RequirementType::Requires(requirement(rules.len()))),
        }],
        providers,
        bypass_cors_preflight: true,
        ..Default::default()
    };
    Some(filters::http(JWT_AUTHN, any::pack(&config)))
}

/// A claim of the request's token.
pub(crate) fn claim(path: &[&str], value: ValueMatcher) -> MetadataMatcher {
    let path: Vec<&str> = std::iter::once(PAYLOAD)
        .chain(path.iter().copied())
        .collect();
    matchers::metadata(JWT_AUTHN, &path, value)
}

fn name(index: usize) -> String {
    format!("origins-{index}")
}

/// With one issuer: its token or none. With more, a token of any of them; else whatever tokens are there must all be
/// valid, each at its place.
fn requirement(issuers: usize) -> JwtRequirement {
    let of = |index| requires(RequiresType::ProviderName(name(index)));
    let or_none = |index| any_of(vec![of(index), requires(RequiresType::AllowMissing(()))]);
    if issuers == 1 {
        return or_none(0);
    }
    let each_or_none = JwtRequirementAndList {
        requirements: (0..issuers).map(or_none).collect(),
    };
    any_of(
        (0..issuers)
            .map(of)
            .chain([requires(RequiresType::RequiresAll(each_or_none))])
            .collect(),
    )
}

fn any_of(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    requires(RequiresType::RequiresAny(JwtRequirementOrList {
        requirements,
    }))
}

fn requires(requires: RequiresType) -> JwtRequirement {
    JwtRequirement {
        requires_type: Some(requires),
    }
}

fn provider(rule: &JwtRule, clear_route_cache: bool) -> JwtProvider {
    JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward_original_token,
        forward_payload_header: rule.output_payload_to_header.clone(),
        payload_in_metadata: PAYLOAD.to_owned(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: space_delimited(&rule.space_delimited_claims),
        }),
        clear_route_cache,
        claim_to_headers: rule
            .output_claim_to_headers
            .iter()
            .map(|c| JwtClaimToHeader {
                header_name: c.header.clone(),
                claim_name: c.claim.clone(),
                ..Default::default()
            })
            .collect(),
        from_headers: rule
            .from_headers
            .iter()
            .map(|h| JwtHeader {
                name: h.name.clone(),
                value_prefix: h.prefix.clone(),
            })
            .collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        jwks_source_specifier: Some(JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(data_source::Specifier::InlineString(key_set(rule))),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// The keys of the issuer that stand in the rule; without any, a key that nobody can sign with, so that tokens are
/// refused rather than believed.
fn key_set(rule: &JwtRule) -> String {
    if rule.jwks.is_empty() {
        NOBODY.to_owned()
    } else {
        rule.jwks.clone()
    }
}

fn space_delimited(own: &[String]) -> Vec<String> {
    let all: BTreeSet<&str> = own
        .iter()
        .map(String::as_str)
        .chain(SPACE_DELIMITED)
        .collect();
    all.into_iter().map(str::to_owned).collect()
}
