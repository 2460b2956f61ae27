//! Custom tags: what spans and the records of log services carry beside their own.

use std::sync::Arc;

use super::{format::Template, rate_limit::MetadataKey};

/// `envoy.type.tracing.v3.CustomTag`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomTag {
    /// Its name.
    pub name: Arc<str>,
    /// Where its value comes from.
    pub source: TagSource,
}

/// Where the value of a tag comes from. One without a value is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagSource {
    /// Always this: a literal, or a variable of our environment as it was when the configuration came.
    Text(Arc<str>),
    /// A header of the request.
    RequestHeader {
        /// Its name.
        name: Arc<str>,
        /// Without such a header; may be empty.
        default: Arc<str>,
    },
    /// Metadata.
    Metadata {
        /// Whose.
        of: MetadataOf,
        /// Where in it.
        key: MetadataKey,
        /// Without such a value; may be empty.
        default: Arc<str>,
    },
    /// A text with operators.
    Format(Template),
}

/// Whose metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataOf {
    /// What filters say about the request.
    Request,
    /// The route's.
    Route,
    /// The cluster's.
    Cluster,
}
