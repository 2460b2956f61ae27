//! Bytes of a complete head → the head, with everything that RFC 9112 forbids refused.

use std::{mem::MaybeUninit, time::Duration};

use crate::{Framing, Headers, Limits, Method, Refusal, RequestHead, ResponseHead, Version};

/// Parses the head of a request; `bytes` ends with the empty line.
///
/// # Errors
/// A [`Refusal`]: the status to answer before the connection is closed.
pub fn parse_request(bytes: &[u8], limits: &Limits) -> Result<RequestHead, Refusal> {
    with_fields(limits, |fields| {
        let mut parsed = httparse::Request::new(&mut []);
        match httparse::ParserConfig::default()
            .parse_request_with_uninit_headers(&mut parsed, bytes, fields)
            .map_err(|error| request_refusal(error, bytes))?
        {
            httparse::Status::Complete(length) if length == bytes.len() => {}
            _ => return Err(Refusal::CODEC),
        }
        let version = match parsed.version {
            Some(0) => Version::Http10,
            Some(1) => Version::Http11,
            _ => return Err(Refusal::CODEC),
        };
        if has_control(bytes) {
            return Err(Refusal::CODEC);
        }
        let method = Method::from_token(parsed.method.unwrap_or_default());
        if let Method::Other(token) = &method
            && !limits.http1.custom_methods
            && !REGISTERED.contains(&&**token)
        {
            return Err(Refusal::CODEC);
        }
        let target = target(&method, parsed.path.unwrap_or_default(), limits)?;
        let mut head = RequestHead::new(version, method, "", target.path);
        let mut connection = Connection::new(version);
        let mut hosts = 0;
        for field in parsed.headers.iter() {
            if connection.take(field.name.as_bytes(), field.value, &mut head.headers)? {
                continue;
            }
            if field.name.eq_ignore_ascii_case("host") {
                hosts += 1;
                check_host(field.value)?;
                // The target's authority wins over the field (RFC 9112, 3.2.2).
                let value = target.authority.map_or(field.value, str::as_bytes);
                head.headers.push_parsed(field.name.as_bytes(), value);
                continue;
            }
            if field.name.eq_ignore_ascii_case("expect") {
                if !field.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Refusal {
                        status: 417,
                        detail: "http1.unknown_expectation",
                    });
                }
                head.expects_continue = version == Version::Http11;
            }
            head.headers.push_parsed(field.name.as_bytes(), field.value);
        }
        match (hosts, target.authority) {
            (0, Some(authority)) => head.headers.prepend("host", authority),
            (0 | 1, _) => {}
            _ => return Err(Refusal::bad("http1.multiple_host_headers")),
        }
        if let Some(scheme) = target.scheme {
            head.set_scheme(scheme);
        }
        finish_request(&mut head, &connection, limits)?;
        Ok(head)
    })
}

/// What the fields of a request say together.
pub(super) fn finish_request(
    head: &mut RequestHead,
    connection: &Connection,
    limits: &Limits,
) -> Result<(), Refusal> {
    connection.finish(&mut head.headers);
    head.keep_alive = connection.keep_alive;
    head.framing = match connection.framing(limits, &mut head.headers)? {
        Some(framing) => framing,
        None => Framing::None,
    };
    if head.method == Method::Connect {
        // What follows belongs to the tunnel, and only once there is one.
        if head.framing != Framing::None {
            return Err(Refusal::bad("http1.body_disallowed"));
        }
        head.upgrade = true;
    } else if connection.upgrade && head.version == Version::Http11 {
        head.upgrade = head.headers.contains("upgrade");
    }
    if !head.upgrade {
        head.headers.remove("upgrade");
    }
    Ok(())
}

/// Parses the head of a response to a request of `method`; `bytes` ends with the empty line.
///
/// # Errors
/// A [`Refusal`]; towards the client it is a 502.
pub fn parse_response(
    bytes: &[u8],
    method: &Method,
    limits: &Limits,
) -> Result<ResponseHead, Refusal> {
    with_fields(limits, |fields| {
        let mut parsed = httparse::Response::new(&mut []);
        match httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut parsed, bytes, fields)
            .map_err(refusal)?
        {
            httparse::Status::Complete(length) if length == bytes.len() => {}
            _ => return Err(Refusal::CODEC),
        }
        let version = match parsed.version {
            Some(0) => Version::Http10,
            _ => Version::Http11,
        };
        let mut head = ResponseHead::new(parsed.code.unwrap_or_default());
        if head.status < 100 || has_control(bytes) {
            return Err(Refusal::CODEC);
        }
        head.version = version;
        let mut connection = Connection::new(version);
        for field in parsed.headers.iter() {
            let name = field.name.as_bytes();
            if !connection.take(name, field.value, &mut head.headers)? {
                head.headers.push_parsed(name, field.value);
            }
        }
        finish_response(&mut head, &connection, method, limits)?;
        Ok(head)
    })
}

/// What the fields of a response say together.
pub(super) fn finish_response(
    head: &mut ResponseHead,
    connection: &Connection,
    method: &Method,
    limits: &Limits,
) -> Result<(), Refusal> {
    connection.finish(&mut head.headers);
    head.keep_alive = connection.keep_alive;
    head.keep_alive_timeout = connection.timeout;
    let declared = connection.framing(limits, &mut head.headers)?;
    head.framing = match head.status {
        101 => Framing::Tunnel,
        100..=199 | 204 | 304 => Framing::None,
        200..=299 if *method == Method::Connect => Framing::Tunnel,
        _ if *method == Method::Head => Framing::None,
        _ => declared.unwrap_or(Framing::UntilClose),
    };
    if head.framing == Framing::UntilClose {
        head.keep_alive = false;
    }
    if head.status != 101 {
        head.headers.remove("upgrade");
    }
    Ok(())
}

/// Parses a trailer section, its empty line included, and keeps what may be a trailer.
pub(super) fn parse_trailers(bytes: &[u8], limits: &Limits) -> Result<Headers, Refusal> {
    let mut fields = vec![httparse::EMPTY_HEADER; limits.headers];
    match httparse::parse_headers(bytes, &mut fields).map_err(refusal)? {
        httparse::Status::Complete((length, fields)) if length == bytes.len() => {
            let mut headers = Headers::new();
            for field in fields {
                if !NEVER_TRAILERS
                    .iter()
                    .any(|name| field.name.eq_ignore_ascii_case(name))
                {
                    headers.push_parsed(field.name.as_bytes(), field.value);
                }
            }
            Ok(headers)
        }
        _ => Err(Refusal::CODEC),
    }
}

/// `timeout=N`, in seconds, as some servers say it (RFC 2068, 19.7.1).
fn keep_alive_timeout(value: &[u8]) -> Option<Duration> {
    let value = std::str::from_utf8(value).ok()?;
    let seconds = value
        .split(',')
        .find_map(|part| part.trim().strip_prefix("timeout="))?;
    let seconds: u32 = seconds.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.into()))
}

/// Whether a head that was parsed holds a control character other than tabs and the ends of lines, which can only be in a
/// value. All of it at once and without an early end: many bytes are looked at together.
fn has_control(head: &[u8]) -> bool {
    let control = |byte: u8| {
        (byte < b' ') & (byte != b'\t') & (byte != b'\r') & (byte != b'\n') | (byte == 0x7f)
    };
    head.iter().fold(false, |any, &byte| any | control(byte))
}

/// What the fields of one connection said.
pub(super) struct Connection {
    version: Version,
    keep_alive: bool,
    timeout: Option<Duration>,
    upgrade: bool,
    lengths: usize,
    length: u64,
    codings: usize,
    nominated: bool,
    nominations: smallvec::SmallVec<[Box<str>; 2]>,
}

impl Connection {
    pub(super) fn new(version: Version) -> Connection {
        Connection {
            version,
            keep_alive: version == Version::Http11,
            timeout: None,
            upgrade: false,
            lengths: 0,
            length: 0,
            codings: 0,
            nominated: false,
            nominations: smallvec::SmallVec::new(),
        }
    }

    /// Looks at one field; `true` means that it must not enter the block.
    fn take(&mut self, name: &[u8], value: &[u8], headers: &mut Headers) -> Result<bool, Refusal> {
        match name.len() {
            2 if name.eq_ignore_ascii_case(b"te") => {
                // The one coding that a proxy hands on (RFC 9110, 10.1.4); gRPC needs it.
                if has_token(value, "trailers") {
                    headers.push_parsed(name, b"trailers");
                }
                Ok(true)
            }
            10 if name.eq_ignore_ascii_case(b"connection") => {
                self.connection(value);
                Ok(true)
            }
            10 if name.eq_ignore_ascii_case(b"keep-alive") => {
                self.keep_alive(value);
                Ok(true)
            }
            16 if name.eq_ignore_ascii_case(b"proxy-connection") => Ok(true),
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                self.length(value)?;
                Ok(false)
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                self.coding(value)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// `content-length`.
    pub(super) fn length(&mut self, value: &[u8]) -> Result<(), Refusal> {
        self.lengths += 1;
        self.length = content_length(value)?;
        Ok(())
    }

    /// `transfer-encoding`.
    pub(super) fn coding(&mut self, value: &[u8]) -> Result<(), Refusal> {
        self.codings += 1;
        if self.codings > 1 || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Refusal {
                status: 501,
                detail: "http1.invalid_transfer_encoding",
            });
        }
        Ok(())
    }

    /// `keep-alive`.
    pub(super) fn keep_alive(&mut self, value: &[u8]) {
        self.timeout = keep_alive_timeout(value);
    }

    /// `connection`.
    pub(super) fn connection(&mut self, value: &[u8]) {
        if value.eq_ignore_ascii_case(b"keep-alive") {
            self.keep_alive = true;
            return;
        }
        for token in value.split(|&byte| byte == b',') {
            let token = token.trim_ascii();
            if token.eq_ignore_ascii_case(b"close") {
                self.keep_alive = false;
            } else if token.eq_ignore_ascii_case(b"keep-alive") {
                self.keep_alive = true;
            } else if token.eq_ignore_ascii_case(b"upgrade") {
                self.upgrade = true;
            } else if !token.is_empty() && !PROTECTED.iter().any(|n| token.eq_ignore_ascii_case(n))
            {
                self.nominated = true;
                self.nominations.push(String::from_utf8_lossy(token).into());
            }
        }
    }

    /// Removes what `Connection` nominated.
    fn finish(&self, headers: &mut Headers) {
        if self.nominated {
            for name in &self.nominations {
                headers.remove(name);
            }
        }
    }

    /// The framing that was declared.
    fn framing(&self, limits: &Limits, headers: &mut Headers) -> Result<Option<Framing>, Refusal> {
        match (self.codings, self.lengths) {
            (0, 0) => Ok(None),
            (0, 1) if self.length == 0 => Ok(Some(Framing::None)),
            (0, 1) => Ok(Some(Framing::Length(self.length))),
            (0, _) => Err(Refusal::bad("http1.multiple_content_length")),
            (1, 0) if self.version == Version::Http11 => Ok(Some(Framing::Chunked)),
            (1, 0) => Err(Refusal::bad("http1.transfer_encoding_not_allowed")),
            (1, 1) if limits.http1.chunked_length && self.version == Version::Http11 => {
                headers.remove("content-length");
                Ok(Some(Framing::Chunked))
            }
            _ => Err(Refusal::bad("http1.content_length_and_chunked_not_allowed")),
        }
    }
}

struct Target<'a> {
    path: &'a str,
    authority: Option<&'a str>,
    scheme: Option<&'a str>,
}

/// The four forms of RFC 9112, 3.2.
fn target<'a>(method: &Method, target: &'a str, limits: &Limits) -> Result<Target<'a>, Refusal> {
    const INVALID: Refusal = Refusal::bad("http1.invalid_url");
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(INVALID);
    }
    if *method == Method::Connect {
        check_host(target.as_bytes())?;
        let port = target
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse::<u16>().ok());
        return match port {
            Some(_) => Ok(Target {
                path: "",
                authority: Some(target),
                scheme: None,
            }),
            None => Err(INVALID),
        };
    }
    if target.starts_with('/') || (target == "*" && *method == Method::Options) {
        return Ok(Target {
            path: target,
            authority: None,
            scheme: None,
        });
    }
    if !limits.http1.absolute_url {
        return Ok(Target {
            path: target,
            authority: None,
            scheme: None,
        });
    }
    let (scheme, rest) = match target.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => ("http", rest),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => ("https", rest),
        _ => return Err(INVALID),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if authority.is_empty() || check_host(authority.as_bytes()).is_err() {
        return Err(INVALID);
    }
    let path = match path.chars().next() {
        Some('/') => path,
        // A query without a path has no spelling that every server agrees on.
        Some(_) => return Err(INVALID),
        None => "/",
    };
    Ok(Target {
        path,
        authority: Some(authority),
        scheme: Some(scheme),
    })
}

/// A host with an optional port (RFC 3986 section 3.2): no userinfo, path, space or zone; brackets around an IPv6
/// address alone, and digits in a port.
pub(crate) fn check_host(host: &[u8]) -> Result<(), Refusal> {
    const INVALID: Refusal = Refusal::bad("http1.invalid_host");
    // Nearly all are of this kind.
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    let name = host.iter().position(|byte| !plain(byte));
    let port = name.map_or(&host[..0], |end| &host[end..]);
    if let [] | [b':', ..] = port
        && port.iter().skip(1).all(u8::is_ascii_digit)
    {
        return Ok(());
    }
    let valid = |byte: &u8| {
        byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b','
                    | b';'
                    | b'='
                    | b'%'
            )
            || *byte >= 0x80
    };
    let text = std::str::from_utf8(host).map_err(|_| INVALID)?;
    let (name_is_valid, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((address, port))) => (address.parse::<std::net::Ipv6Addr>().is_ok(), port),
        Some(None) => (false, ""),
        None => {
            let (name, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            (name.bytes().all(|byte| valid(&byte)), port)
        }
    };
    let port_is_valid = match port.strip_prefix(':') {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_digit()),
        None => port.is_empty(),
    };
    if name_is_valid && port_is_valid {
        Ok(())
    } else {
        Err(INVALID)
    }
}

/// Digits only, one spelling for each number: `010` and `+1` mean different things to different
/// servers.
pub(crate) fn content_length(value: &[u8]) -> Result<u64, Refusal> {
    const INVALID: Refusal = Refusal::bad("http1.invalid_content_length");
    if value.is_empty() || value.len() > 19 || (value.len() > 1 && value[0] == b'0') {
        return Err(INVALID);
    }
    value.iter().try_fold(0u64, |length, byte| match byte {
        b'0'..=b'9' => Ok(length * 10 + u64::from(byte - b'0')),
        _ => Err(INVALID),
    })
}

fn has_token(value: &[u8], token: &str) -> bool {
    value
        .split(|&byte| byte == b',')
        .any(|element| element.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// Storage for `limits.headers` fields: on the stack for the usual limit.
fn with_fields<'b, T>(
    limits: &Limits,
    parse: impl FnOnce(&mut [MaybeUninit<httparse::Header<'b>>]) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    if limits.headers <= 100 {
        let mut fields = [const { MaybeUninit::uninit() }; 100];
        return parse(&mut fields[..limits.headers]);
    }
    let mut fields: Vec<_> = (0..limits.headers).map(|_| MaybeUninit::uninit()).collect();
    parse(&mut fields)
}

fn refusal(error: httparse::Error) -> Refusal {
    match error {
        httparse::Error::TooManyHeaders => Refusal::TOO_MANY,
        _ => Refusal::CODEC,
    }
}

/// A version of HTTP that is not spoken here says so; a target with a space in it is no version.
fn request_refusal(error: httparse::Error, bytes: &[u8]) -> Refusal {
    let line = bytes.trim_ascii_start().split(|byte| *byte == b'\n').next();
    let version = line.and_then(|line| line.splitn(3, |byte| *byte == b' ').nth(2));
    let is_other = version.is_some_and(|version| version.starts_with(b"HTTP/"));
    match error {
        httparse::Error::Version if is_other => Refusal {
            status: 505,
            detail: "http1.codec_error",
        },
        error => refusal(error),
    }
}

/// Methods that Envoy's parser takes unasked, beside those that [`Method`] names, and SSDP's under its real name.
const REGISTERED: [&str; 27] = [
    "ACL",
    "BIND",
    "CHECKOUT",
    "COPY",
    "LINK",
    "LOCK",
    "M-SEARCH",
    "MERGE",
    "MKACTIVITY",
    "MKCALENDAR",
    "MKCOL",
    "MOVE",
    "MSEARCH",
    "NOTIFY",
    "PROPFIND",
    "PROPPATCH",
    "PURGE",
    "QUERY",
    "REBIND",
    "REPORT",
    "SEARCH",
    "SOURCE",
    "SUBSCRIBE",
    "UNBIND",
    "UNLINK",
    "UNLOCK",
    "UNSUBSCRIBE",
];

/// Fields that mean something to every hop; nominating them in `Connection` is how an attacker
/// would take them away.
const PROTECTED: [&[u8]; 12] = [
    b"host",
    b"content-length",
    b"transfer-encoding",
    b"te",
    b"authorization",
    b"cookie",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-forwarded-client-cert",
    b"x-request-id",
    b"via",
];

/// Fields that would change the message they come after (RFC 9110, 6.5.1).
const NEVER_TRAILERS: [&str; 15] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "te",
    "trailer",
    "upgrade",
    "authorization",
    "proxy-authorization",
    "cookie",
    "set-cookie",
    "content-encoding",
    "content-type",
    "content-range",
    "expect",
];

#[cfg(test)]
mod tests {
    use super::check_host;

    #[test]
    fn a_host_is_a_name_or_an_address_and_perhaps_a_port() {
        for host in [
            "a",
            "a.b:80",
            "a:",
            "[::1]",
            "[fe80::1]:8080",
            "a,b",
            "192.0.2.1:1",
            "bücher.test",
        ] {
            assert!(check_host(host.as_bytes()).is_ok(), "{host}");
        }
        for host in [
            "a:b",
            "a:80:90",
            "[::1",
            "::1",
            "[::1]x",
            "[a]",
            "[fe80::1%eth0]",
            "a b",
            "a/b",
            "u@a",
            "a\0",
            "a]",
            "a:+1",
        ] {
            assert!(check_host(host.as_bytes()).is_err(), "{host}");
        }
        assert!(check_host(b"a\xff").is_err());
    }
}
