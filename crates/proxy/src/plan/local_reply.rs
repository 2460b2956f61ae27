//! Replies of our own as the configuration wants them.

use std::sync::Arc;

use bytes::Bytes;

use super::{access_log::AccessLogFilter, header::HeaderAdd, route::BodyFormat};

/// `LocalReplyConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalReplyConfig {
    /// The first whose filter passes changes the reply.
    pub mappers: Vec<ResponseMapper>,
    /// Makes every body, where the mapper has no format of its own.
    pub body_format: Option<Arc<BodyFormat>>,
}

/// `ResponseMapper`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseMapper {
    /// Which replies it is about.
    pub filter: AccessLogFilter,
    /// New status.
    pub status: Option<u16>,
    /// New text.
    pub body: Option<Bytes>,
    /// Makes the body.
    pub body_format: Option<Arc<BodyFormat>>,
    /// Further headers.
    pub headers_to_add: Vec<HeaderAdd>,
}
