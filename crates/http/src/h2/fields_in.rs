//! Header blocks → heads and trailers, straight into the arena of a head.

use super::{
    Reason,
    hpack::{Broken, Class, Decoder, Field},
};
use crate::{
    Headers, Method, RequestHead, ResponseHead, Version,
    h1::{check_host, content_length},
};

/// What a block turned out to be.
#[derive(Debug)]
pub(super) enum Read<T> {
    /// A good one, and the length that it declares for the body.
    Good(T, Option<u64>),
    /// More bytes or fields than we take.
    TooLarge,
    /// What RFC 9113, 8 forbids.
    Malformed,
}

/// What we take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Bytes of all fields, 32 for each included.
    pub(super) list: usize,
    /// Bytes of one field.
    pub(super) field: usize,
    /// Values may have bytes beyond ASCII.
    pub(super) obs_text: bool,
    /// Fields.
    pub(super) count: usize,
    /// Whether `:protocol` may be said.
    pub(super) extended_connect: bool,
}

/// Reads the head of a request; `cookies` is storage that is used again and again.
///
/// # Errors
/// The block breaks the connection.
pub(super) fn read_request(
    decoder: &mut Decoder,
    block: &[u8],
    rules: Rules,
    cookies: &mut Vec<u8>,
) -> Result<Read<RequestHead>, Broken> {
    let mut head = RequestHead::new(Version::Http2, Method::Get, "", "");
    let (mut has_method, mut has_scheme, mut has_path) = (false, false, false);
    let mut protocol = None::<Box<str>>;
    let mut common = Common::new(&rules, cookies);
    let whole = decoder.decode(block, (rules.list, rules.field), |field| {
        if common.take(&field, &mut head.headers) {
            return;
        }
        let text = std::str::from_utf8(field.value).unwrap_or("");
        let once = |seen: &mut bool| std::mem::replace(seen, true);
        let twice = match field.class {
            Class::Method => {
                common.malformed |= !is_token(text);
                head.method = Method::from_token(text);
                once(&mut has_method)
            }
            Class::Scheme => {
                common.malformed |= !is_scheme(text);
                match text {
                    "http" | "https" => head.set_scheme(text),
                    _ => head.set_scheme(&text.to_ascii_lowercase()),
                }
                once(&mut has_scheme)
            }
            Class::Path => {
                let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
                common.malformed |= text.is_empty() || !visible;
                head.set_path(text);
                once(&mut has_path)
            }
            Class::Authority => {
                // An empty one says nothing; so does a missing one.
                common.malformed |= !field.value.is_empty() && check_host(field.value).is_err();
                if !field.value.is_empty() {
                    head.headers.push_parsed(b"host", field.value);
                }
                once(&mut common.has_authority)
            }
            Class::Protocol => {
                common.malformed |= !is_token(text);
                protocol.replace(text.into()).is_some()
            }
            _ => true,
        };
        common.malformed |= twice;
    })?;
    let path = head.path();
    let rooted = path.starts_with('/') || (path == "*" && head.method == Method::Options);
    let well = match (&head.method, &protocol) {
        (Method::Connect, None) => !has_scheme && !has_path && !head.authority().is_empty(),
        (Method::Connect, Some(_)) => {
            rules.extended_connect && has_scheme && rooted && !head.authority().is_empty()
        }
        (_, protocol) => protocol.is_none() && has_method && has_scheme && rooted,
    };
    if common.too_many || !whole {
        cookies.clear();
        return Ok(Read::TooLarge);
    }
    if common.malformed || !well {
        cookies.clear();
        return Ok(Read::Malformed);
    }
    let length = common.length;
    head.expects_continue = common.expects_continue;
    common.finish(&mut head.headers);
    if let Some(protocol) = protocol {
        // As HTTP/1 says it (RFC 8441, 5): what follows need not know which of the two it was.
        head.method = Method::Get;
        head.headers.append("upgrade", &*protocol);
        head.upgrade = true;
    }
    head.upgrade |= head.method == Method::Connect;
    Ok(Read::Good(head, length))
}

/// Reads the head of a response.
///
/// # Errors
/// The block breaks the connection.
pub(super) fn read_response(
    decoder: &mut Decoder,
    block: &[u8],
    rules: Rules,
    cookies: &mut Vec<u8>,
) -> Result<Read<ResponseHead>, Broken> {
    let mut head = ResponseHead::new(0);
    head.version = Version::Http2;
    let mut common = Common::new(&rules, cookies);
    let whole = decoder.decode(block, (rules.list, rules.field), |field| {
        if common.take(&field, &mut head.headers) {
            return;
        }
        let status = match (field.class, field.value) {
            (Class::Status, &[a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9']) => {
                u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
            }
            _ => 0,
        };
        common.malformed |= head.status != 0 || status == 0;
        head.status = status;
    })?;
    if common.too_many || !whole {
        cookies.clear();
        return Ok(Read::TooLarge);
    }
    // 101 is not there in HTTP/2 (RFC 9113, 8.6).
    if common.malformed || matches!(head.status, 0 | 101) {
        cookies.clear();
        return Ok(Read::Malformed);
    }
    let length = common.length;
    common.finish(&mut head.headers);
    Ok(Read::Good(head, length))
}

/// Reads trailers.
///
/// # Errors
/// The block breaks the connection.
pub(super) fn read_trailers(
    decoder: &mut Decoder,
    block: &[u8],
    rules: Rules,
    cookies: &mut Vec<u8>,
) -> Result<Read<Headers>, Broken> {
    let mut trailers = Headers::new();
    let mut common = Common::new(&rules, cookies);
    let whole = decoder.decode(block, (rules.list, rules.field), |field| {
        if !common.take(&field, &mut trailers) {
            common.malformed = true;
        }
    })?;
    if common.too_many || !whole {
        cookies.clear();
        return Ok(Read::TooLarge);
    }
    if common.malformed {
        cookies.clear();
        return Ok(Read::Malformed);
    }
    common.finish(&mut trailers);
    Ok(Read::Good(trailers, None))
}

/// What is the same for all blocks.
struct Common<'c> {
    limit: usize,
    obs_text: bool,
    count: usize,
    malformed: bool,
    too_many: bool,
    /// A field that is none of the pseudo-fields has come.
    begun: bool,
    has_authority: bool,
    has_host: bool,
    expects_continue: bool,
    length: Option<u64>,
    has_cookie: bool,
    has_secret_cookie: bool,
    cookies: &'c mut Vec<u8>,
}

impl<'c> Common<'c> {
    fn new(rules: &Rules, cookies: &'c mut Vec<u8>) -> Common<'c> {
        Common {
            limit: rules.count,
            obs_text: rules.obs_text,
            count: 0,
            malformed: false,
            too_many: false,
            begun: false,
            has_authority: false,
            has_host: false,
            expects_continue: false,
            length: None,
            has_cookie: false,
            has_secret_cookie: false,
            cookies,
        }
    }

    /// Takes a field unless it is a pseudo-field in its place.
    fn take(&mut self, field: &Field<'_>, headers: &mut Headers) -> bool {
        if field.class.is_pseudo() {
            self.malformed |= self.begun;
            return false;
        }
        self.begun = true;
        self.count += 1;
        if self.count > self.limit {
            self.too_many = true;
            return true;
        }
        let value = field.value.trim_ascii();
        self.malformed |= !self.obs_text && !value.is_ascii();
        match field.class {
            Class::Malformed => {
                self.malformed = true;
                return true;
            }
            Class::Cookie => {
                // Crumbs are put together (RFC 9113, 8.2.3).
                if std::mem::replace(&mut self.has_cookie, true) {
                    self.cookies.extend_from_slice(b"; ");
                }
                self.cookies.extend_from_slice(value);
                self.has_secret_cookie |= field.secret;
                return true;
            }
            Class::Host => {
                self.malformed |= check_host(value).is_err();
                if self.has_authority || self.has_host {
                    // Two that differ would let somebody behind us choose the other one.
                    let same = headers
                        .get("host")
                        .is_some_and(|host| host.eq_ignore_ascii_case(value));
                    self.malformed |= !same;
                    return true;
                }
                self.has_host = true;
            }
            Class::ContentLength => match content_length(value) {
                Ok(length) if self.length.is_none() => self.length = Some(length),
                _ => self.malformed = true,
            },
            Class::Expect => {
                self.expects_continue = value.eq_ignore_ascii_case(b"100-continue");
            }
            _ => {}
        }
        headers.push_parsed(field.name, value);
        if field.secret {
            headers.mark_last_secret();
        }
        true
    }

    fn finish(self, headers: &mut Headers) {
        if self.has_cookie {
            headers.push_parsed(b"cookie", self.cookies);
            if self.has_secret_cookie {
                headers.mark_last_secret();
            }
        }
        self.cookies.clear();
    }
}

pub(super) fn is_token(text: &str) -> bool {
    let valid = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
    };
    !text.is_empty() && text.bytes().all(valid)
}

fn is_scheme(text: &str) -> bool {
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    text.starts_with(|first: char| first.is_ascii_alphabetic()) && text.bytes().all(valid)
}

impl From<Broken> for Reason {
    fn from(_: Broken) -> Reason {
        Reason::COMPRESSION_ERROR
    }
}
