//! The HTTP filters that change heads and metadata, limit rates, pin sessions and buffer bodies.

use std::{sync::Arc, time::Duration};

use proto::envoy::{
    config::{common::mutation_rules::v3 as rules, core::v3 as core},
    extensions::{
        common::ratelimit::v3 as ratelimit,
        filters::http::{
            buffer::v3::Buffer, header_mutation::v3 as mutation,
            header_to_metadata::v3 as to_metadata, local_ratelimit::v3 as local,
            set_metadata::v3 as set, stateful_session::v3 as session,
        },
        http::stateful_session::{
            cookie::v3::CookieBasedSessionState, header::v3::HeaderBasedSessionState,
        },
    },
    r#type::v3 as types,
};

use super::{
    access_log::plain_formatters,
    common::{
        above_zero, duration, enumeration, header_name, json, regex_rewrite, runtime_fraction,
        typed_config,
    },
    header::{header_adds, header_mutations},
    rate_limit::own_rate_limits,
    route::option,
};
use crate::plan::{
    error::{At, Step, unsupported},
    filter_config::{
        HeaderMutationFilter, HeaderRule, HeaderToMetadata, LocalRateLimit, MetadataEntry,
        Mutations, QueryMutation, RuleSource, SessionState, SetMetadata, StatefulSession,
        TokenBucket, VirtualHostLimits,
    },
    header::AppendAction,
    matcher::Fraction,
    rate_limit::Descriptor,
};

/// `HeaderMutation`.
pub(super) fn header_mutation(
    at: At<'_>,
    m: &mutation::HeaderMutation,
) -> Step<HeaderMutationFilter> {
    Ok(HeaderMutationFilter {
        mutations: Arc::new(
            at.optional("mutations", &m.mutations, mutations)?
                .unwrap_or_default(),
        ),
        most_specific_wins: m.most_specific_header_mutations_wins,
    })
}

/// `Mutations`.
pub(super) fn mutations(at: At<'_>, m: &mutation::Mutations) -> Step<Mutations> {
    let mutation::Mutations {
        request_mutations,
        query_parameter_mutations,
        response_mutations,
        response_trailers_mutations,
        request_trailers_mutations,
        formatters,
    } = m;
    unsupported!(at, request_trailers_mutations);
    plain_formatters(&at, formatters);
    let list = |field: &str, list: &[rules::HeaderMutation]| header_mutations(&at, field, list);
    Ok(Mutations {
        request: list("request_mutations", request_mutations),
        query: at.each(
            "query_parameter_mutations",
            query_parameter_mutations,
            query_mutation,
        ),
        response: list("response_mutations", response_mutations),
        response_trailers: list("response_trailers_mutations", response_trailers_mutations),
    })
}

fn query_mutation(at: At<'_>, m: &core::KeyValueMutation) -> Step<QueryMutation> {
    use core::key_value_append::KeyValueAppendAction as A;
    let Some(append) = &m.append else {
        return Ok(QueryMutation::Remove(at.text("remove", &m.remove)?));
    };
    if !m.remove.is_empty() {
        return Err(at.error("only one of append, remove can be given"));
    }
    let at = at.field("append");
    let (key, value) = match (&append.record, &append.entry) {
        (Some(record), _) => {
            use proto::prost_types::value::Kind;
            let at = at.field("record");
            match record.value.as_ref().and_then(|v| v.kind.as_ref()) {
                Some(Kind::StringValue(text)) => (&record.key, text.clone()),
                _ => return Err(at.field("value").error("must be a text")),
            }
        }
        (None, Some(entry)) => {
            let value = String::from_utf8(entry.value.clone())
                .map_err(|_| at.field("entry").error("must be UTF-8"))?;
            (&entry.key, value)
        }
        (None, None) => return Err(at.error("needs record")),
    };
    let legal = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"&#".contains(&byte))
    };
    if !legal(key) || !legal(&value) {
        return Err(at.error("key and value must be as they stand in a URL"));
    }
    Ok(QueryMutation::Append {
        key: at.text("key", key)?,
        value: value.into(),
        action: match enumeration(&at, "action", append.action)? {
            A::AppendIfExistsOrAdd => AppendAction::AppendIfExistsOrAdd,
            A::AddIfAbsent => AppendAction::AddIfAbsent,
            A::OverwriteIfExistsOrAdd => AppendAction::OverwriteIfExistsOrAdd,
            A::OverwriteIfExists => AppendAction::OverwriteIfExists,
        },
    })
}

/// `header_to_metadata.v3.Config`.
pub(super) fn header_to_metadata(at: At<'_>, m: &to_metadata::Config) -> Step<HeaderToMetadata> {
    let to_metadata::Config {
        request_rules,
        response_rules,
        stat_prefix,
    } = m;
    unsupported!(at, stat_prefix);
    Ok(HeaderToMetadata {
        request: at.each("request_rules", request_rules, rule),
        response: at.each("response_rules", response_rules, rule),
    })
}

fn rule(at: At<'_>, m: &to_metadata::config::Rule) -> Step<HeaderRule> {
    let source = match (m.header.as_str(), m.cookie.as_str()) {
        ("", "") => return Err(at.error("needs one of header, cookie")),
        (name, "") => RuleSource::Header(header_name(&at, "header", name)?),
        ("", name) => RuleSource::Cookie(name.into()),
        _ => return Err(at.error("only one of header, cookie can be given")),
    };
    if m.on_header_present.is_none() && m.on_header_missing.is_none() {
        return Err(at.error("needs one of on_header_present, on_header_missing"));
    }
    let missing = at.optional("on_header_missing", &m.on_header_missing, entry)?;
    if missing.as_ref().is_some_and(|entry| entry.value.is_empty()) {
        at.field("on_header_missing")
            .field("value")
            .error("is required and must not be empty");
    }
    Ok(HeaderRule {
        source,
        on_present: at.optional("on_header_present", &m.on_header_present, entry)?,
        on_missing: missing,
        remove: m.remove,
    })
}

fn entry(at: At<'_>, m: &to_metadata::config::KeyValuePair) -> Step<MetadataEntry> {
    use to_metadata::config::{ValueEncode, ValueType};
    let number = match enumeration(&at, "type", m.r#type)? {
        ValueType::String => false,
        ValueType::Number => true,
        ValueType::ProtobufValue => {
            return Err(at
                .field("type")
                .not_implemented("PROTOBUF_VALUE is not implemented; write STRING or NUMBER"));
        }
    };
    Ok(MetadataEntry {
        namespace: match m.metadata_namespace.as_str() {
            "" => "envoy.filters.http.header_to_metadata".into(),
            name => name.into(),
        },
        key: at.text("key", &m.key)?,
        value: m.value.as_str().into(),
        rewrite: at.optional("regex_value_rewrite", &m.regex_value_rewrite, regex_rewrite)?,
        number,
        base64: enumeration::<ValueEncode>(&at, "encode", m.encode)? == ValueEncode::Base64,
    })
}

/// `set_metadata.v3.Config`.
pub(super) fn set_metadata(at: At<'_>, m: &set::Config) -> Step<Vec<SetMetadata>> {
    let mut list = at.each("metadata", &m.metadata, |at, m| {
        let set::Metadata {
            metadata_namespace,
            allow_overwrite,
            value,
            typed_value,
        } = m;
        unsupported!(at, typed_value);
        Ok(SetMetadata {
            namespace: at.text("metadata_namespace", metadata_namespace)?,
            value: at.required("value", value, |_, m| Ok(json(m)))?,
            allow_overwrite: *allow_overwrite,
        })
    });
    if let Some(value) = &m.value {
        // The deprecated form always joins.
        list.push(SetMetadata {
            namespace: at.text("metadata_namespace", &m.metadata_namespace)?,
            value: json(value),
            allow_overwrite: true,
        });
    }
    Ok(list)
}

/// `StatefulSession`; without a state the filter only waits for what routes say.
pub(super) fn stateful_session(
    at: At<'_>,
    m: &session::StatefulSession,
) -> Step<Option<StatefulSession>> {
    let session::StatefulSession {
        session_state,
        strict,
        stat_prefix,
        status_on_strict_destination_not_found,
    } = m;
    let status = match *status_on_strict_destination_not_found {
        0 => 503,
        given => match u16::try_from(given) {
            Ok(status @ 200..=599) => status,
            _ => {
                return Err(at
                    .field("status_on_strict_destination_not_found")
                    .error("must be a status from 200 to 599"));
            }
        },
    };
    let state = at.optional("session_state", session_state, |at, m| {
        let found = typed_config(&at, &m.typed_config, "session state")?;
        let at = at.field("typed_config");
        match found.name.as_str() {
            "envoy.extensions.http.stateful_session.cookie.v3.CookieBasedSessionState" => {
                let m: CookieBasedSessionState = found.decode(&at)?;
                at.required("cookie", &m.cookie, |at, m| {
                    Ok(SessionState::Cookie {
                        name: at.text("name", &m.name)?,
                        ttl: at.optional("ttl", &m.ttl, duration)?.unwrap_or_default(),
                        path: m.path.as_str().into(),
                        attributes: m
                            .attributes
                            .iter()
                            .map(|a| (a.name.as_str().into(), a.value.as_str().into()))
                            .collect(),
                    })
                })
            }
            "envoy.extensions.http.stateful_session.header.v3.HeaderBasedSessionState" => {
                let m: HeaderBasedSessionState = found.decode(&at)?;
                Ok(SessionState::Header(header_name(&at, "name", &m.name)?))
            }
            _ => Err(found.unknown(&at, "session state")),
        }
    })?;
    Ok(state.map(|state| StatefulSession {
        state,
        strict: *strict,
        stat_prefix: option(stat_prefix),
        status_without_host: status,
    }))
}

/// `Buffer`: bytes of a request at most.
pub(super) fn buffer(at: At<'_>, m: &Buffer) -> Step<u32> {
    match m.max_request_bytes {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(at.field("max_request_bytes").error("must be at least 1")),
    }
}

/// `LocalRateLimit`.
pub(super) fn local_rate_limit(at: At<'_>, m: &local::LocalRateLimit) -> Step<LocalRateLimit> {
    let local::LocalRateLimit {
        stat_prefix,
        status,
        token_bucket,
        filter_enabled,
        filter_enforced,
        request_headers_to_add_when_not_enforced,
        response_headers_to_add,
        descriptors,
        stage,
        local_rate_limit_per_downstream_connection,
        local_cluster_rate_limit,
        enable_x_ratelimit_headers,
        vh_rate_limits,
        always_consume_default_token_bucket,
        rate_limited_as_resource_exhausted,
        rate_limits: limits,
        max_dynamic_descriptors: _,
        enable_retry_after_header,
    } = m;
    unsupported!(
        at,
        local_rate_limit_per_downstream_connection,
        local_cluster_rate_limit,
    );
    use ratelimit::{VhRateLimitsOptions as V, XRateLimitHeadersRfcVersion as X};
    for (index, m) in limits.iter().enumerate() {
        if m.limit.is_some() {
            let at = at.field("rate_limits");
            at.index(index)
                .field("limit")
                .error("is for a rate limit service; remove it");
        }
    }
    let bucket = at.optional("token_bucket", token_bucket, token_bucket_of)?;
    if bucket.is_none() && filter_enabled.is_some() {
        return Err(at.field("token_bucket").error("is required"));
    }
    let status = status.as_ref().map_or(429, |m| m.code);
    Ok(LocalRateLimit {
        stat_prefix: at.text("stat_prefix", stat_prefix)?,
        // What says that nothing is wrong would not stop a client.
        status: u16::try_from(status)
            .ok()
            .filter(|status| (400..600).contains(status))
            .unwrap_or(429),
        bucket,
        enabled: at
            .optional("filter_enabled", filter_enabled, runtime_fraction)?
            .unwrap_or(Fraction::NONE),
        enforced: at
            .optional("filter_enforced", filter_enforced, runtime_fraction)?
            .unwrap_or(Fraction::NONE),
        request_headers: header_adds(
            &at,
            "request_headers_to_add_when_not_enforced",
            request_headers_to_add_when_not_enforced,
        ),
        response_headers: header_adds(&at, "response_headers_to_add", response_headers_to_add),
        descriptors: at.each("descriptors", descriptors, |at, m| {
            let shadow_mode = &m.shadow_mode;
            unsupported!(at, shadow_mode);
            let entries = at.each("entries", &m.entries, |at, m| {
                if m.value.is_empty() {
                    return Err(at.field("value").not_implemented(
                        "a descriptor for any value is not implemented; write a value",
                    ));
                }
                Ok((at.text("key", &m.key)?, m.value.clone()))
            });
            let descriptor = Descriptor {
                entries,
                ..Descriptor::default()
            };
            Ok((
                descriptor,
                at.required("token_bucket", &m.token_bucket, token_bucket_of)?,
            ))
        }),
        stage: *stage,
        rate_limits: own_rate_limits(&at, limits),
        ratelimit_headers: enumeration::<X>(
            &at,
            "enable_x_ratelimit_headers",
            *enable_x_ratelimit_headers,
        )? == X::DraftVersion03,
        retry_after: *enable_retry_after_header,
        virtual_host: match enumeration(&at, "vh_rate_limits", *vh_rate_limits)? {
            V::Override => VirtualHostLimits::Override,
            V::Include => VirtualHostLimits::Include,
            V::Ignore => VirtualHostLimits::Ignore,
        },
        always_consume_default: always_consume_default_token_bucket.unwrap_or(true),
        resource_exhausted: *rate_limited_as_resource_exhausted,
    })
}

fn token_bucket_of(at: At<'_>, m: &types::TokenBucket) -> Step<TokenBucket> {
    let Some(interval) = above_zero(&at, "fill_interval", &m.fill_interval)? else {
        return Err(at.field("fill_interval").error("is required"));
    };
    if interval < Duration::from_millis(50) {
        at.field("fill_interval").error("must be at least 0.050s");
    }
    let per_fill = m.tokens_per_fill.unwrap_or(1);
    if m.max_tokens == 0 || per_fill == 0 {
        return Err(at.error("max_tokens and tokens_per_fill must be at least 1"));
    }
    Ok(TokenBucket::new(m.max_tokens, per_fill, interval))
}
