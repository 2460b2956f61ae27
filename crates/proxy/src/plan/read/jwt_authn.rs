//! `envoy.filters.http.jwt_authn`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use proto::envoy::{config::core::v3 as core, extensions::filters::http::jwt_authn::v3 as pb};

use super::{
    common::{above_zero, data_source, duration, header_name, string_matcher},
    route_match::route_match,
};
use crate::plan::{
    error::{At, Step, unsupported},
    http_filter::RouteFilterConfig,
    jwt_authn::{InlineKeys, JwtAuthn, JwtProvider, KeySource, Location, RemoteKeys, Requirement},
    tls::DataSource,
};

/// `JwtAuthentication`.
pub(super) fn jwt_authn(at: At<'_>, m: &pb::JwtAuthentication) -> Step<JwtAuthn> {
    let pb::JwtAuthentication {
        providers,
        rules,
        filter_state_rules,
        bypass_cors_preflight,
        requirement_map,
        strip_failure_response,
        stat_prefix,
    } = m;
    unsupported!(at, filter_state_rules);
    let names: Names = providers
        .keys()
        .zip(0..)
        .map(|(n, i)| (n.as_str(), i))
        .collect();
    let providers: Step<Vec<_>> = {
        let at = at.field("providers");
        let each = providers.iter();
        each.map(|(name, m)| Ok(Arc::new(provider(at.key(name), name, m)?)))
            .collect()
    };
    let requirement_map: Step<Vec<_>> = {
        let at = at.field("requirement_map");
        let each = requirement_map.iter();
        each.map(|(name, m)| {
            let found = requirement(at.key(name), m, &names)?;
            Ok((name.as_str().into(), found))
        })
        .collect()
    };
    let (providers, requirement_map) = (providers?, requirement_map?);
    // All or none: a rule that is missing would let requests pass that another one was to catch.
    let at_rules = at.field("rules");
    let each = rules.iter().enumerate();
    let rules: Step<Vec<_>> = each
        .map(|(index, m)| rule(at_rules.index(index), m, &names, &requirement_map))
        .collect();
    Ok(JwtAuthn {
        providers,
        rules: rules?,
        requirement_map,
        bypass_cors_preflight: *bypass_cors_preflight,
        strip_failure_response: *strip_failure_response,
        stat_prefix: stat_prefix.as_str().into(),
    })
}

/// `PerRouteConfig`.
pub(super) fn per_route(at: At<'_>, m: &pb::PerRouteConfig) -> Step<RouteFilterConfig> {
    use pb::per_route_config::RequirementSpecifier as R;
    match &m.requirement_specifier {
        Some(R::Disabled(true)) => Ok(RouteFilterConfig::Disabled),
        Some(R::Disabled(false)) => Err(at.field("disabled").error("must be true")),
        Some(R::RequirementName(name)) => Ok(RouteFilterConfig::JwtRequirement(
            at.text("requirement_name", name)?,
        )),
        None => Err(at.error("needs one of disabled: true, requirement_name")),
    }
}

type Names<'n> = BTreeMap<&'n str, usize>;

fn rule(
    at: At<'_>,
    m: &pb::RequirementRule,
    names: &Names<'_>,
    map: &[(Arc<str>, Requirement)],
) -> Step<(crate::plan::route::RouteMatch, Option<Requirement>)> {
    use pb::requirement_rule::RequirementType as R;
    let matches = at.required("match", &m.r#match, route_match)?;
    let needed = match &m.requirement_type {
        None => None,
        Some(R::Requires(m)) if m.requires_type.is_none() => None,
        Some(R::Requires(m)) => Some(requirement(at.field("requires"), m, names)?),
        Some(R::RequirementName(name)) => {
            let found = map.iter().find(|(key, _)| **key == **name);
            let found = found.ok_or_else(|| {
                at.field("requirement_name")
                    .error(format!("`{name}` is not in requirement_map"))
            })?;
            Some(found.1.clone())
        }
    };
    Ok((matches, needed))
}

fn requirement(at: At<'_>, m: &pb::JwtRequirement, names: &Names<'_>) -> Step<Requirement> {
    inner(at, m, names, &[], 0)
}

/// `beside`: the providers that stand beside it in a list of alternatives.
fn inner(
    at: At<'_>,
    m: &pb::JwtRequirement,
    names: &Names<'_>,
    beside: &[usize],
    depth: usize,
) -> Step<Requirement> {
    use pb::jwt_requirement::RequiresType as R;
    if depth > MAX_DEPTH {
        return Err(at.error(format!("is nested deeper than {MAX_DEPTH}")));
    }
    let named = |field: &str, name: &str| {
        let found = names.get(name).copied();
        found.ok_or_else(|| {
            at.field(field)
                .error(format!("`{name}` is not in providers"))
        })
    };
    // A requirement that stands alone speaks of everybody.
    let spoken_of = || match beside {
        [] => (0..names.len()).collect(),
        some => some.to_vec(),
    };
    Ok(match &m.requires_type {
        Some(R::ProviderName(name)) => Requirement::Provider {
            provider: named("provider_name", name)?,
            audiences: None,
        },
        Some(R::ProviderAndAudiences(m)) => Requirement::Provider {
            provider: named("provider_and_audiences", &m.provider_name)?,
            audiences: (!m.audiences.is_empty()).then(|| texts(&m.audiences)),
        },
        Some(R::RequiresAny(list)) => {
            let beside: Vec<usize> = list
                .requirements
                .iter()
                .filter_map(|m| match &m.requires_type {
                    Some(R::ProviderName(name)) => names.get(name.as_str()),
                    Some(R::ProviderAndAudiences(m)) => names.get(m.provider_name.as_str()),
                    _ => None,
                })
                .copied()
                .collect();
            let at = at.field("requires_any");
            let at = at.field("requirements");
            Requirement::Any(several(&at, &list.requirements, names, &beside, depth)?)
        }
        Some(R::RequiresAll(list)) => {
            let at = at.field("requires_all");
            let at = at.field("requirements");
            Requirement::All(several(&at, &list.requirements, names, &[], depth)?)
        }
        Some(R::ExtractOnlyWithoutValidation(_)) => {
            return Err(at.field("extract_only_without_validation").not_implemented(
                "claims of tokens that nobody checked are not taken; write provider_name",
            ));
        }
        Some(R::AllowMissing(())) => Requirement::AllowMissing(spoken_of()),
        Some(R::AllowMissingOrFailed(())) => Requirement::AllowMissingOrFailed(spoken_of()),
        None => Requirement::All(Vec::new()),
    })
}

fn several(
    at: &At<'_>,
    list: &[pb::JwtRequirement],
    names: &Names<'_>,
    beside: &[usize],
    depth: usize,
) -> Step<Vec<Requirement>> {
    if list.len() < 2 {
        return Err(at.error("needs two or more"));
    }
    let each = list.iter().enumerate();
    let found: Step<Vec<_>> = each
        .map(|(index, m)| inner(at.index(index), m, names, beside, depth + 1))
        .collect();
    let mut found = found?;
    // What lets everything pass is asked last: a token that is there and valid is used.
    found.sort_by_key(|r| match r {
        Requirement::AllowMissing(_) => 1,
        Requirement::AllowMissingOrFailed(_) => 2,
        _ => 0,
    });
    Ok(found)
}

#[allow(deprecated)]
fn provider(at: At<'_>, name: &str, m: &pb::JwtProvider) -> Step<JwtProvider> {
    use pb::jwt_provider::JwksSourceSpecifier as K;
    let pb::JwtProvider {
        issuer,
        audiences,
        subjects,
        require_expiration,
        max_lifetime,
        forward,
        from_headers,
        from_params,
        from_cookies,
        forward_payload_header,
        pad_forward_payload_header,
        payload_in_metadata,
        normalize_payload_in_metadata,
        header_in_metadata,
        failed_status_in_metadata,
        clock_skew_seconds,
        jwt_cache_config,
        claim_to_headers,
        clear_route_cache,
        jwks_source_specifier,
    } = m;
    unsupported!(at, failed_status_in_metadata);
    let mut locations = at.each("from_headers", from_headers, |at, m| {
        Ok(Location::Header {
            name: header_name(&at, "name", &m.name)?,
            prefix: m.value_prefix.as_str().into(),
        })
    });
    locations.extend(
        from_params
            .iter()
            .map(|p| Location::Param(p.as_str().into())),
    );
    locations.extend(
        from_cookies
            .iter()
            .map(|c| Location::Cookie(c.as_str().into())),
    );
    if from_headers.is_empty() && from_params.is_empty() && from_cookies.is_empty() {
        locations = vec![
            Location::Header {
                name: "authorization".into(),
                prefix: "Bearer ".into(),
            },
            Location::Param("access_token".into()),
        ];
    }
    let cache = jwt_cache_config.as_ref();
    let or = |number: u32, default: usize| match number {
        0 => default,
        number => number as usize,
    };
    let keys = match jwks_source_specifier {
        Some(K::LocalJwks(m)) => local(at.field("local_jwks"), name, m)?,
        Some(K::RemoteJwks(m)) => KeySource::Remote(remote(at.field("remote_jwks"), m)?),
        None => return Err(at.error("needs one of local_jwks, remote_jwks")),
    };
    Ok(JwtProvider {
        name: name.into(),
        issuer: issuer.as_str().into(),
        audiences: texts(audiences),
        subjects: at.optional("subjects", subjects, string_matcher)?,
        require_expiration: *require_expiration,
        max_lifetime: at.optional("max_lifetime", max_lifetime, duration)?,
        forward: *forward,
        locations,
        forward_payload_header: match forward_payload_header.as_str() {
            "" => None,
            name => Some(header_name(&at, "forward_payload_header", name)?),
        },
        pad_forward_payload_header: *pad_forward_payload_header,
        payload_in_metadata: payload_in_metadata.as_str().into(),
        space_delimited_claims: normalize_payload_in_metadata
            .as_ref()
            .map_or_else(Vec::new, |m| texts(&m.space_delimited_claims)),
        header_in_metadata: header_in_metadata.as_str().into(),
        clock_skew: match clock_skew_seconds {
            0 => DEFAULT_SKEW,
            seconds => u64::from(*seconds),
        },
        cache_size: or(cache.map_or(0, |m| m.jwt_cache_size), 100).min(MAX_CACHE),
        cache_max_token: or(cache.map_or(0, |m| m.jwt_max_token_size), 4096),
        claim_to_headers: at.each("claim_to_headers", claim_to_headers, |at, m| {
            let claim_path = &m.claim_path;
            unsupported!(at, claim_path);
            Ok((
                header_name(&at, "header_name", &m.header_name)?,
                at.text("claim_name", &m.claim_name)?,
            ))
        }),
        clear_route_cache: *clear_route_cache,
        keys,
    })
}

fn local(at: At<'_>, provider: &str, m: &core::DataSource) -> Step<KeySource> {
    Ok(match data_source(at, m)? {
        DataSource::Inline(text) => {
            let keys = InlineKeys::new(Bytes::clone(&text)).unwrap_or_else(|error| {
                tracing::warn!(provider, %error, "every token of this provider is refused: local_jwks");
                InlineKeys::none(text)
            });
            KeySource::Inline(keys)
        }
        DataSource::File(path) => KeySource::File(path),
        DataSource::Environment(_) => {
            return Err(at
                .field("environment_variable")
                .not_implemented("is not implemented; write inline_string or filename"));
        }
    })
}

fn remote(at: At<'_>, m: &pb::RemoteJwks) -> Step<RemoteKeys> {
    let pb::RemoteJwks {
        http_uri: uri,
        cache_duration,
        async_fetch,
        retry_policy,
    } = m;
    let uri = at.required("http_uri", uri, http_uri)?;
    let ahead = at.optional("async_fetch", async_fetch, |at, m| {
        let again = above_zero(&at, "failed_refetch_duration", &m.failed_refetch_duration)?;
        Ok(again.unwrap_or(Duration::from_secs(1)))
    })?;
    let (mut retries, mut backoff) = (0, (Duration::from_secs(1), Duration::from_secs(10)));
    if let Some(policy) = retry_policy {
        let at = at.field("retry_policy");
        let core::RetryPolicy {
            retry_back_off,
            num_retries,
            retry_on,
            retry_priority,
            retry_host_predicate,
            host_selection_retry_max_attempts,
        } = policy;
        unsupported!(
            at,
            retry_on,
            retry_priority,
            retry_host_predicate,
            host_selection_retry_max_attempts,
        );
        retries = num_retries.unwrap_or(1);
        if let Some(m) = retry_back_off {
            let at = at.field("retry_back_off");
            let base = above_zero(&at, "base_interval", &m.base_interval)?;
            let base = base.ok_or_else(|| at.field("base_interval").error("is required"))?;
            let most = above_zero(&at, "max_interval", &m.max_interval)?;
            backoff = (base, most.unwrap_or(base * 10));
        }
    }
    Ok(RemoteKeys {
        cluster: uri.cluster,
        authority: uri.authority,
        path: uri.path,
        timeout: uri.timeout,
        cache_duration: above_zero(&at, "cache_duration", cache_duration)?
            .unwrap_or(Duration::from_secs(600)),
        ahead,
        retries,
        backoff,
    })
}

/// A server and what is asked of it.
pub(super) struct HttpUri {
    pub(super) cluster: Arc<str>,
    /// `host[:port]` of the URI.
    pub(super) authority: Box<str>,
    /// The rest of it.
    pub(super) path: Box<str>,
    pub(super) timeout: Duration,
}

/// `HttpUri`.
pub(super) fn http_uri(at: At<'_>, m: &core::HttpUri) -> Step<HttpUri> {
    let core::http_uri::HttpUpstreamType::Cluster(cluster) = m
        .http_upstream_type
        .as_ref()
        .ok_or_else(|| at.field("cluster").error("is required"))?;
    // What stands before `://` is the cluster's business.
    let rest = m.uri.split_once("://").map_or(&*m.uri, |(_, rest)| rest);
    let (authority, path) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, "/"),
    };
    if authority.is_empty() || !rest.bytes().all(|byte| byte.is_ascii_graphic()) {
        let wrong = format!("`{}` is not an http or https URI", m.uri);
        return Err(at.field("uri").error(wrong));
    }
    Ok(HttpUri {
        cluster: at.text("cluster", cluster)?,
        authority: authority.into(),
        path: path.into(),
        timeout: at.required("timeout", &m.timeout, duration)?,
    })
}

fn texts(list: &[String]) -> Vec<Box<str>> {
    list.iter().map(|text| text.as_str().into()).collect()
}

const DEFAULT_SKEW: u64 = 60;
/// Tokens that a provider remembers at most, whatever the configuration says.
const MAX_CACHE: usize = 10_000;
/// Requirements within requirements.
const MAX_DEPTH: usize = 16;
