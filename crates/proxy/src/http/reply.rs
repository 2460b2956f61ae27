//! Replies of our own: Envoy's texts, statuses and details, and their gRPC form.

use std::borrow::Cow;

use bytes::Bytes;
use outrigger_http::{Framing, Headers, Method, ResponseHead};

use super::{Exchange, Flags, respond};
use crate::{
    access_log::Lines,
    plan::{access_log::LogFormat, local_reply::LocalReplyConfig, route::BodyFormat},
    router::headers,
};

/// A response that the proxy makes itself.
#[derive(Debug, Clone)]
pub struct LocalReply {
    /// HTTP status.
    pub status: u16,
    /// Text of the body; for gRPC it becomes `grpc-message`.
    pub body: Bytes,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: Cow<'static, str>,
    /// Flags that it sets.
    pub flags: Flags,
    /// gRPC status, where it is not the one that goes with the HTTP status.
    pub grpc_status: Option<u32>,
    /// Further headers.
    pub headers: Headers,
    /// Whether an HTTP/1 connection ends with it: what was refused may have been about the message's length.
    pub closes: bool,
}

impl LocalReply {
    /// A reply with a text.
    pub fn new(status: u16, body: &'static str, details: impl Into<Cow<'static, str>>) -> Self {
        LocalReply {
            status,
            body: Bytes::from_static(body.as_bytes()),
            details: details.into(),
            flags: Flags::default(),
            grpc_status: None,
            headers: Headers::new(),
            closes: false,
        }
    }

    /// With a flag.
    pub fn flag(mut self, flags: Flags) -> Self {
        self.flags.add(flags);
        self
    }

    /// The last of its connection, where that is HTTP/1.
    pub fn closing(mut self) -> Self {
        self.closes = true;
        self
    }

    /// With another body.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// With a header.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.append(name, value);
        self
    }

    /// With a body that a format makes of the text, which it knows as `%LOCAL_REPLY_BODY%`.
    pub(crate) fn formatted(mut self, format: &BodyFormat, exchange: &mut Exchange<'_>) -> Self {
        exchange.local_reply = Cow::Owned(String::from_utf8_lossy(&self.body).into_owned());
        // The format knows the reply as the response.
        exchange.response = Some(ResponseHead::new(self.status));
        self.fill(format, exchange);
        exchange.response = None;
        self
    }

    /// Changes the reply as the connection manager's configuration says.
    fn rewrite(&mut self, exchange: &mut Exchange<'_>, config: &LocalReplyConfig) {
        if config.mappers.is_empty() && config.body_format.is_none() {
            return;
        }
        // Filters and formats know the reply as the response.
        exchange.response = Some(ResponseHead::new(self.status));
        let mapper = config
            .mappers
            .iter()
            .find(|mapper| crate::access_log::passes(&mapper.filter, exchange, exchange.random));
        if let Some(mapper) = mapper {
            headers::add(&mapper.headers_to_add, exchange, &mut self.headers);
            if let Some(status) = mapper.status {
                self.status = status;
                exchange.response = Some(ResponseHead::new(status));
            }
            if let Some(body) = &mapper.body {
                self.body = body.clone();
                exchange.local_reply = Cow::Owned(String::from_utf8_lossy(body).into_owned());
            }
        }
        let format = mapper.and_then(|mapper| mapper.body_format.as_ref());
        if let Some(format) = format.or(config.body_format.as_ref()) {
            self.fill(format, exchange);
        }
        exchange.response = None;
    }

    /// Makes the body by a format.
    fn fill(&mut self, format: &BodyFormat, exchange: &mut Exchange<'_>) {
        let mut body = Vec::new();
        crate::access_log::write(&format.format, exchange, Lines::Any, &mut body);
        exchange.local_reply = Cow::Owned(String::from_utf8_lossy(&body).into_owned());
        self.body = body.into();
        let kind = match (&format.content_type, &format.format) {
            (Some(kind), _) => kind,
            (None, LogFormat::Json { .. }) => "application/json",
            (None, LogFormat::Text { .. }) => "text/plain",
        };
        self.headers.set("content-type", kind);
    }

    /// [`LocalReply::render`] with the changes that the route makes. In Envoy they come first: the usual type is for a
    /// reply that has none then, and a gRPC client hears of its own in any case.
    pub(crate) fn render_routed(
        self,
        exchange: &mut Exchange<'_>,
        config: &LocalReplyConfig,
    ) -> (ResponseHead, Bytes) {
        let own = self.headers.contains("content-type")
            || config.body_format.is_some()
            || !config.mappers.is_empty();
        let (mut head, body) = self.render(exchange, config);
        let kind = match exchange.request.is_grpc() {
            true => Some("application/grpc"),
            false if own || !head.headers.contains("content-type") => None,
            false => Some("text/plain"),
        };
        if kind.is_some() {
            head.headers.remove("content-type");
        }
        respond::tell_attempts(exchange, &mut head);
        headers::response(exchange, &mut head.headers);
        match kind {
            Some("application/grpc") => head.headers.set("content-type", "application/grpc"),
            Some(kind) => {
                head.headers.set_if_absent("content-type", kind);
            }
            None => {}
        }
        (head, body)
    }

    /// The head and body to send for this request. A gRPC client gets 200 with the status in the
    /// head (a "trailers-only" response), as it could not read anything else.
    pub fn render(
        mut self,
        exchange: &mut Exchange<'_>,
        config: &LocalReplyConfig,
    ) -> (ResponseHead, Bytes) {
        exchange.flags.add(self.flags);
        exchange.details = std::mem::take(&mut self.details);
        if !self.body.is_empty() {
            exchange.local_reply = Cow::Owned(String::from_utf8_lossy(&self.body).into_owned());
        }
        self.rewrite(exchange, config);
        let mut head = ResponseHead::new(self.status);
        head.headers = self.headers;
        let grpc = exchange.request.is_grpc();
        if grpc {
            head.status = 200;
            let status = self
                .grpc_status
                .unwrap_or_else(|| grpc_status_of(self.status));
            let json = head.headers.get("content-type") == Some(b"application/json");
            head.headers.set("content-type", "application/grpc");
            head.headers
                .set("grpc-status", itoa::Buffer::new().format(status));
            // The line's end behind a JSON object would be part of a header.
            let text = match self.body.strip_suffix(b"\n") {
                Some(object) if json => object,
                _ => &self.body,
            };
            if !text.is_empty() {
                head.headers.set("grpc-message", percent_encode(text));
            }
            head.framing = Framing::None;
            return (head, Bytes::new());
        }
        if self.body.is_empty() {
            head.framing = Framing::None;
            return (head, Bytes::new());
        }
        head.headers.set(
            "content-length",
            itoa::Buffer::new().format(self.body.len()),
        );
        head.headers.set_if_absent("content-type", "text/plain");
        if exchange.request.method == Method::Head {
            head.framing = Framing::None;
            return (head, Bytes::new());
        }
        head.framing = Framing::Length(self.body.len() as u64);
        (head, self.body)
    }
}

/// The gRPC status that stands for an HTTP status (Envoy's table).
pub(crate) fn grpc_status_of(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// The HTTP status that stands for a gRPC status, for outlier detection and retries.
pub(crate) fn http_status_of(grpc: u32) -> u16 {
    match grpc {
        0 => 200,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        1 => 499,
        _ => 500,
    }
}

/// `grpc-message` is percent-encoded outside of printable ASCII.
fn percent_encode(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    for &byte in text {
        if (0x20..0x7f).contains(&byte) && byte != b'%' {
            out.push(byte);
        } else {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    out
}
