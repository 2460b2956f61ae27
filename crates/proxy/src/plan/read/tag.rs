//! Custom tags.

use proto::envoy::r#type::{
    metadata::v3::metadata_kind::Kind,
    tracing::v3::{self as pb, custom_tag},
};

use super::common::enumeration;
use super::rate_limit::metadata_key;
use crate::plan::{
    error::{At, Step},
    format::Template,
    tag::{CustomTag, MetadataOf, TagSource},
};

/// `CustomTag`.
pub(super) fn custom_tag(at: At<'_>, m: &pb::CustomTag) -> Step<CustomTag> {
    use custom_tag::Type as T;
    let name = at.text("tag", &m.tag)?;
    // Both are texts, as all values are here.
    use custom_tag::ValueType as V;
    if !matches!(
        enumeration(&at, "value_type", m.value_type)?,
        V::Unspecified | V::String
    ) {
        return Err(at
            .field("value_type")
            .not_implemented("is not implemented; write STRING"));
    }
    let source = match &m.r#type {
        Some(T::Literal(m)) => TagSource::Text(at.field("literal").text("value", &m.value)?),
        Some(T::Environment(m)) => {
            let variable = at.field("environment").text("name", &m.name)?;
            let value = std::env::var(&*variable)
                .ok()
                .filter(|value| !value.is_empty());
            TagSource::Text(value.unwrap_or_else(|| m.default_value.clone()).into())
        }
        Some(T::RequestHeader(m)) => TagSource::RequestHeader {
            name: at.field("request_header").text("name", &m.name)?,
            default: m.default_value.as_str().into(),
        },
        Some(T::Metadata(m)) => {
            let at = at.field("metadata");
            TagSource::Metadata {
                of: match m.kind.as_ref().and_then(|kind| kind.kind.as_ref()) {
                    Some(Kind::Request(_)) | None => MetadataOf::Request,
                    Some(Kind::Route(_)) => MetadataOf::Route,
                    Some(Kind::Cluster(_)) => MetadataOf::Cluster,
                    Some(Kind::Host(_)) => {
                        return Err(at.field("kind").not_implemented(
                            "host is not implemented; write request, route or cluster",
                        ));
                    }
                },
                key: at.required("metadata_key", &m.metadata_key, metadata_key)?,
                default: m.default_value.as_str().into(),
            }
        }
        Some(T::Value(text)) => {
            TagSource::Format(Template::parse(text).map_err(|why| at.field("value").error(why))?)
        }
        None => {
            return Err(
                at.error("needs one of literal, environment, request_header, metadata, value")
            );
        }
    };
    Ok(CustomTag { name, source })
}
