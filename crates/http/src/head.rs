//! Heads of messages, the same for HTTP/1 and HTTP/2.
//!
//! `Host` and `:authority` are one thing here: the field `host` of the block, in the place where
//! the peer sent it. Fields that belong to one connection (`Connection`, `Transfer-Encoding`,
//! `Keep-Alive`, `Proxy-Connection`, and what `Connection` nominates) never enter the block; what
//! they said is in `framing`, `keep_alive` and `upgrade`.

use std::{fmt, time::Duration};

use crate::{Framing, Headers, headers::Span};

/// The protocol a message came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
}

impl Version {
    /// As access logs print it.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
            Version::Http2 => "HTTP/2",
        }
    }
}

/// A request method; the ones without a variant are kept as they came.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum Method {
    #[default]
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    Options,
    Trace,
    Patch,
    Other(Box<str>),
}

impl Method {
    /// Methods are case-sensitive (RFC 9110, 9.1).
    pub fn from_token(token: &str) -> Method {
        match token {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "POST" => Method::Post,
            "PUT" => Method::Put,
            "DELETE" => Method::Delete,
            "CONNECT" => Method::Connect,
            "OPTIONS" => Method::Options,
            "TRACE" => Method::Trace,
            "PATCH" => Method::Patch,
            other => Method::Other(other.into()),
        }
    }

    /// The token on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            Method::Get => "GET",
            Method::Head => "HEAD",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Delete => "DELETE",
            Method::Connect => "CONNECT",
            Method::Options => "OPTIONS",
            Method::Trace => "TRACE",
            Method::Patch => "PATCH",
            Method::Other(token) => token,
        }
    }

    /// Safe methods change nothing on the server (RFC 9110, 9.2.1).
    pub fn is_safe(&self) -> bool {
        matches!(
            self,
            Method::Get | Method::Head | Method::Options | Method::Trace
        )
    }

    /// Idempotent methods may be sent twice (RFC 9110, 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        self.is_safe() || matches!(self, Method::Put | Method::Delete)
    }
}

/// The head of a request.
pub struct RequestHead {
    /// The protocol it came by.
    pub version: Version,
    /// The method.
    pub method: Method,
    /// The fields, `host` among them.
    pub headers: Headers,
    /// How the body is delimited.
    pub framing: Framing,
    /// Whether the client wants to keep the connection.
    pub keep_alive: bool,
    /// The client asks to change the protocol: `Connection: upgrade` with an `upgrade` field that
    /// is still in `headers`, or an extended CONNECT.
    pub upgrade: bool,
    /// `Expect: 100-continue`.
    pub expects_continue: bool,
    path: Span,
    scheme: Span,
}

impl RequestHead {
    /// A request without fields; the caller adds them.
    pub fn new(version: Version, method: Method, authority: &str, path: &str) -> RequestHead {
        let mut headers = Headers::new();
        let path = headers.add(path.as_bytes());
        if !authority.is_empty() {
            headers.append("host", authority);
        }
        RequestHead {
            version,
            method,
            headers,
            framing: Framing::None,
            keep_alive: true,
            upgrade: false,
            expects_continue: false,
            path,
            scheme: Span::default(),
        }
    }

    /// The path with its query (`:path`); empty for CONNECT.
    pub fn path(&self) -> &str {
        self.headers.str(self.path)
    }

    /// [`RequestHead::path`] as bytes, which costs less.
    pub fn path_bytes(&self) -> &[u8] {
        self.headers.bytes(self.path)
    }

    /// Says where in the arena path and query lie.
    pub(crate) fn place_path(&mut self, path: Span) {
        self.path = path;
    }

    /// Replaces path and query.
    pub fn set_path(&mut self, path: &str) {
        self.path = self.headers.add(path.as_bytes());
    }

    /// The path without query and fragment.
    pub fn path_only(&self) -> &str {
        let path = self.path();
        &path[..path.find(['?', '#']).unwrap_or(path.len())]
    }

    /// The host asked for, with its port if one was given.
    pub fn authority(&self) -> &str {
        self.headers.get_str("host").unwrap_or("")
    }

    /// [`RequestHead::authority`] as bytes, which costs less.
    pub fn authority_bytes(&self) -> &[u8] {
        self.headers.get("host").unwrap_or(b"")
    }

    /// Replaces the host in its place.
    pub fn set_authority(&mut self, authority: &str) {
        if self.headers.contains("host") {
            self.headers.set("host", authority);
        } else {
            self.headers.prepend("host", authority);
        }
    }

    /// `http`, `https`, or empty when nobody said.
    pub fn scheme(&self) -> &str {
        self.headers.str(self.scheme)
    }

    /// Says which scheme the request has.
    pub fn set_scheme(&mut self, scheme: &str) {
        self.scheme = self.headers.add(scheme.as_bytes());
    }

    /// A field or a pseudo-field (`:path`, `:method`, `:authority`, `:scheme`).
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let text = match name.as_bytes().first() {
            Some(b':') => match name {
                ":path" => self.path(),
                ":method" => self.method.as_str(),
                ":authority" => self.authority(),
                ":scheme" => self.scheme(),
                _ => return None,
            },
            _ => return self.headers.get(name),
        };
        (!text.is_empty()).then_some(text.as_bytes())
    }

    /// [`RequestHead::get`] as text.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Whether the content type is gRPC's.
    pub fn is_grpc(&self) -> bool {
        is_grpc(&self.headers)
    }
}

impl Clone for RequestHead {
    fn clone(&self) -> Self {
        RequestHead {
            version: self.version,
            method: self.method.clone(),
            headers: self.headers.clone(),
            framing: self.framing,
            keep_alive: self.keep_alive,
            upgrade: self.upgrade,
            expects_continue: self.expects_continue,
            path: self.path,
            scheme: self.scheme,
        }
    }
}

impl fmt::Debug for RequestHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHead")
            .field("method", &self.method.as_str())
            .field("path", &self.path())
            .field("version", &self.version)
            .field("headers", &self.headers)
            .field("framing", &self.framing)
            .field("keep_alive", &self.keep_alive)
            .field("upgrade", &self.upgrade)
            .finish_non_exhaustive()
    }
}

/// The head of a response.
#[derive(Debug, Clone)]
pub struct ResponseHead {
    /// The protocol it came by.
    pub version: Version,
    /// 100–999.
    pub status: u16,
    /// The fields.
    pub headers: Headers,
    /// How the body is delimited.
    pub framing: Framing,
    /// Whether the sender keeps the connection.
    pub keep_alive: bool,
    /// For how long it keeps it when nothing happens (`Keep-Alive: timeout`), where it says so.
    pub keep_alive_timeout: Option<Duration>,
    /// The phrase behind the status in HTTP/1, where it is not the one that goes with it. No control characters.
    pub reason: Option<Box<str>>,
}

impl ResponseHead {
    /// A response without fields and body.
    pub fn new(status: u16) -> ResponseHead {
        ResponseHead {
            version: Version::Http11,
            status,
            headers: Headers::new(),
            framing: Framing::None,
            keep_alive: true,
            keep_alive_timeout: None,
            reason: None,
        }
    }

    /// 1xx other than 101: more heads follow.
    pub fn is_informational(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }

    /// A field, or `:status`, as text.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.headers.get_str(name)
    }

    /// Whether the content type is gRPC's.
    pub fn is_grpc(&self) -> bool {
        is_grpc(&self.headers)
    }
}

fn is_grpc(headers: &Headers) -> bool {
    let Some(value) = headers.get("content-type") else {
        return false;
    };
    // As Envoy: letter by letter, and without parameters.
    value
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+')))
}

/// The phrase that goes with a status.
pub fn reason(status: u16) -> &'static str {
    match status {
        // Envoy writes its own phrase for this one; the crate's registry has another.
        302 => "Found",
        _ => http::StatusCode::from_u16(status)
            .ok()
            .and_then(|status| status.canonical_reason())
            .unwrap_or("Unknown"),
    }
}
