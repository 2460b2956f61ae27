//! Rate limits of routes.

use std::sync::Arc;

use proto::envoy::{
    config::route::v3::{self as pb, rate_limit as nested},
    extensions::rate_limit_descriptors::expr::v3 as expr,
    r#type::{metadata::v3 as types, v3::RateLimitUnit},
};

use super::common::{
    address_matcher, enumeration, header_matcher, header_name, query_matcher, typed_config,
};
use crate::plan::{
    cel,
    error::{At, Step},
    format::{Part, Template},
    rate_limit::{
        DescriptorValue, HitsAddend, Limit, LimitOverride, MOST_HITS, MetadataKey, RateLimit,
        RateLimitAction,
    },
};

/// `rate_limits` of a route or virtual host. One with a `disable_key` is a limit like the others: only runtime could
/// disable it.
pub(super) fn rate_limits(at: &At<'_>, list: &[pb::RateLimit]) -> Vec<RateLimit> {
    at.each("rate_limits", list, rate_limit)
}

/// `rate_limits` of a filter, or of what a route says about a filter: they stand for one filter, so that they have
/// neither stage nor key.
pub(super) fn own_rate_limits(at: &At<'_>, list: &[pb::RateLimit]) -> Vec<RateLimit> {
    at.each("rate_limits", list, |at, m| {
        if m.stage.is_some() {
            at.field("stage")
                .error("is for rate limits of routes and virtual hosts alone; remove it");
        }
        if !m.disable_key.is_empty() {
            at.field("disable_key")
                .error("is for rate limits of routes and virtual hosts alone; remove it");
        }
        rate_limit(at, m)
    })
}

fn rate_limit(at: At<'_>, m: &pb::RateLimit) -> Step<RateLimit> {
    use nested::XRateLimitOption as X;
    let pb::RateLimit {
        stage,
        disable_key: _,
        actions,
        limit,
        hits_addend: hits,
        apply_on_stream_done,
        x_ratelimit_option,
    } = m;
    let stage = stage.unwrap_or(0);
    if stage > 10 {
        at.field("stage").error("must be from 0 to 10");
    }
    if actions.is_empty() {
        at.field("actions").error("needs at least one action");
    }
    Ok(RateLimit {
        stage,
        actions: at.each("actions", actions, action),
        limit: at.optional("limit", limit, limit_override)?,
        hits_addend: at.optional("hits_addend", hits, hits_addend)?,
        negative_hits: hits.as_ref().is_some_and(|m| m.is_negative_hits),
        apply_on_stream_done: *apply_on_stream_done,
        ratelimit_headers: match enumeration(&at, "x_ratelimit_option", *x_ratelimit_option)? {
            X::Unspecified => None,
            X::Off => Some(false),
            X::DraftVersion03 => Some(true),
        },
    })
}

fn limit_override(at: At<'_>, m: &nested::Override) -> Step<LimitOverride> {
    use nested::r#override::OverrideSpecifier as O;
    match &m.override_specifier {
        Some(O::DynamicMetadata(m)) => {
            let at = at.field("dynamic_metadata");
            at.required("metadata_key", &m.metadata_key, metadata_key)
                .map(LimitOverride::Metadata)
        }
        Some(O::RateLimit(m)) => {
            let at = at.field("rate_limit");
            let unit = enumeration::<RateLimitUnit>(&at, "unit", m.unit)?;
            Ok(LimitOverride::Fixed(Limit {
                requests: m.requests_per_unit,
                unit: unit.as_str_name().into(),
                units: None,
            }))
        }
        None => Err(at.error("needs one of dynamic_metadata, rate_limit")),
    }
}

fn hits_addend(at: At<'_>, m: &nested::HitsAddend) -> Step<HitsAddend> {
    match (m.number, m.format.as_str()) {
        (Some(_), format) if !format.is_empty() => {
            Err(at.error("only one of number, format can be given"))
        }
        (Some(number), _) if number > MOST_HITS => Err(at
            .field("number")
            .error(format!("must be at most {MOST_HITS}"))),
        (Some(number), _) => Ok(HitsAddend::Number(number)),
        (None, "") => Err(at.error("needs one of number, format")),
        (None, format) => {
            let template = template(&at, "format", format)?;
            match &*template.parts {
                [Part::Operator(_)] => Ok(HitsAddend::Format(template)),
                _ => Err(at.field("format").error("must be one operator (`%…%`)")),
            }
        }
    }
}

fn action(at: At<'_>, m: &nested::Action) -> Step<RateLimitAction> {
    use nested::action::{ActionSpecifier as A, meta_data::Source};
    let or = |text: &str, default: &str| -> Arc<str> {
        if text.is_empty() { default } else { text }.into()
    };
    Ok(match &m.action_specifier {
        Some(A::SourceCluster(_)) => RateLimitAction::SourceCluster,
        Some(A::DestinationCluster(_)) => RateLimitAction::DestinationCluster,
        Some(A::RequestHeaders(m)) => {
            let at = at.field("request_headers");
            RateLimitAction::RequestHeader {
                header: header_name(&at, "header_name", &m.header_name)?,
                key: at.text("descriptor_key", &m.descriptor_key)?,
                skip_if_absent: m.skip_if_absent,
            }
        }
        Some(A::QueryParameters(m)) => {
            let at = at.field("query_parameters");
            RateLimitAction::QueryParameter {
                parameter: at.text("query_parameter_name", &m.query_parameter_name)?,
                key: at.text("descriptor_key", &m.descriptor_key)?,
                skip_if_absent: m.skip_if_absent,
            }
        }
        Some(A::RemoteAddress(_)) => RateLimitAction::RemoteAddress,
        Some(A::MaskedRemoteAddress(m)) => {
            let at = at.field("masked_remote_address");
            let length = |field: &str, given: Option<u32>, most: u8| {
                u8::try_from(given.unwrap_or(most.into()))
                    .ok()
                    .filter(|length| *length <= most)
                    .ok_or_else(|| at.field(field).error(format!("must be at most {most}")))
            };
            RateLimitAction::MaskedRemoteAddress {
                v4: length("v4_prefix_mask_len", m.v4_prefix_mask_len, 32)?,
                v6: length("v6_prefix_mask_len", m.v6_prefix_mask_len, 128)?,
            }
        }
        Some(A::GenericKey(m)) => {
            let at = at.field("generic_key");
            RateLimitAction::GenericKey {
                key: or(&m.descriptor_key, "generic_key"),
                value: value(&at, "descriptor_value", &m.descriptor_value)?,
                default: m.default_value.as_str().into(),
            }
        }
        Some(A::HeaderValueMatch(m)) => {
            let at = at.field("header_value_match");
            RateLimitAction::HeaderValueMatch {
                key: or(&m.descriptor_key, "header_match"),
                value: value(&at, "descriptor_value", &m.descriptor_value)?,
                default: m.default_value.as_str().into(),
                expect: m.expect_match.unwrap_or(true),
                headers: at.each("headers", &m.headers, header_matcher),
            }
        }
        Some(A::QueryParameterValueMatch(m)) => {
            let at = at.field("query_parameter_value_match");
            RateLimitAction::QueryParameterValueMatch {
                key: or(&m.descriptor_key, "query_match"),
                value: value(&at, "descriptor_value", &m.descriptor_value)?,
                default: m.default_value.as_str().into(),
                expect: m.expect_match.unwrap_or(true),
                parameters: at.each("query_parameters", &m.query_parameters, query_matcher),
            }
        }
        Some(A::DynamicMetadata(m)) => {
            let at = at.field("dynamic_metadata");
            RateLimitAction::Metadata {
                key: at.text("descriptor_key", &m.descriptor_key)?,
                at: at.required("metadata_key", &m.metadata_key, metadata_key)?,
                of_route: false,
                default: m.default_value.as_str().into(),
                skip_if_absent: false,
            }
        }
        Some(A::Metadata(m)) => {
            let at = at.field("metadata");
            RateLimitAction::Metadata {
                key: at.text("descriptor_key", &m.descriptor_key)?,
                at: at.required("metadata_key", &m.metadata_key, metadata_key)?,
                of_route: enumeration::<Source>(&at, "source", m.source)? == Source::RouteEntry,
                default: m.default_value.as_str().into(),
                skip_if_absent: m.skip_if_absent,
            }
        }
        Some(A::Extension(m)) => {
            let at = at.field("extension");
            let found = typed_config(&at, &m.typed_config, "rate limit action")?;
            let at = at.field("typed_config");
            match found.name.as_str() {
                "envoy.extensions.rate_limit_descriptors.expr.v3.Descriptor" => {
                    let m: expr::Descriptor = found.decode(&at)?;
                    expression(&at, &m)?
                }
                _ => return Err(found.unknown(&at, "rate limit action")),
            }
        }
        Some(A::RemoteAddressMatch(m)) => {
            let at = at.field("remote_address_match");
            RateLimitAction::RemoteAddressMatch {
                key: or(&m.descriptor_key, "remote_address_match"),
                value: template(&at, "descriptor_value", &m.descriptor_value)?,
                default: m.default_value.as_str().into(),
                addresses: at.required("address_matcher", &m.address_matcher, address_matcher)?,
            }
        }
        None => return Err(at.error("needs an action such as request_headers")),
    })
}

/// `rate_limit_descriptors.expr.v3.Descriptor`.
fn expression(at: &At<'_>, m: &expr::Descriptor) -> Step<RateLimitAction> {
    use expr::descriptor::ExprSpecifier as E;
    let text = match &m.expr_specifier {
        Some(E::Text(text)) => at.text("text", text)?,
        Some(E::Parsed(_)) => {
            return Err(at
                .field("parsed")
                .not_implemented("is not implemented; write text"));
        }
        None => return Err(at.error("needs text")),
    };
    let parsed = cel::parse(&text).map_err(|why| at.field("text").error(why))?;
    Ok(RateLimitAction::Expression {
        key: at.text("descriptor_key", &m.descriptor_key)?,
        expression: Box::new(parsed),
        skip_if_error: m.skip_if_error,
    })
}

/// A text that only a switch makes a format: where it is none, it stands as it is in any case.
fn value(at: &At<'_>, field: &str, text: &str) -> Step<DescriptorValue> {
    let text = at.text(field, text)?;
    let format = Template::parse(&text).ok();
    Ok(DescriptorValue {
        format: format.filter(|format| format.as_literal() != Some(&*text)),
        text,
    })
}

fn template(at: &At<'_>, field: &str, text: &str) -> Step<Template> {
    at.text(field, text)?;
    Template::parse(text).map_err(|why| at.field(field).error(why))
}

pub(super) fn metadata_key(at: At<'_>, m: &types::MetadataKey) -> Step<MetadataKey> {
    use types::metadata_key::path_segment::Segment;
    Ok(MetadataKey {
        namespace: at.text("key", &m.key)?,
        path: at.each("path", &m.path, |at, m| match &m.segment {
            Some(Segment::Key(key)) => at.text("key", key),
            Some(Segment::Index(_)) => Err(at
                .field("index")
                .not_implemented("is not implemented; write key")),
            None => Err(at.field("key").error("is required")),
        }),
    })
}
