//! Heads as they nearly always look, parsed in one pass over bytes that may hold less or more than a head.
//!
//! What is read here, [`super::parse`] would read alike, which a test compares on heads of all kinds. Whatever is out of the
//! ordinary is left to it, and so is every refusal: here `None` says that somebody else has to look.

use super::parse::{Connection, check_host, finish_request, finish_response};
use crate::{
    Limits, Method, RequestHead, ResponseHead, Version,
    headers::{Headers, Key, Span},
};

/// The head of a request at the beginning of `bytes`, and where it ends.
pub(super) fn request(bytes: &[u8], limits: &Limits) -> Option<(RequestHead, usize)> {
    let (method, path_at) = method(bytes)?;
    if *bytes.get(path_at)? != b'/' {
        return None;
    }
    let path = path_at..path_at + run_of(&bytes[path_at..], TARGET)?;
    let fields_at = after(bytes, path.end, b" HTTP/1.1\r\n")?;
    let mut head = RequestHead::new(Version::Http11, method, "", "");
    let mut connection = Connection::new(Version::Http11);
    let mut hosts = 0;
    let end = fields(bytes, fields_at, limits, |field, value| {
        if between_hops(&field, value, &mut connection)? {
            return Some(());
        }
        match field.key {
            EXPECT if field.is(b"expect") => return None,
            HOST if field.is(b"host") => {
                hosts += 1;
                check_host(value).ok().filter(|()| hosts == 1)?;
            }
            _ => {}
        }
        field.enter(&mut head.headers);
        Some(())
    })?;
    head.headers.place(&bytes[..end]);
    head.place_path(Span::new(path.start, path.end));
    finish_request(&mut head, &connection, limits).ok()?;
    Some((head, end))
}

/// The head of a response to a request of `method` at the beginning of `bytes`, and where it ends.
pub(super) fn response(
    bytes: &[u8],
    method: &Method,
    limits: &Limits,
) -> Option<(ResponseHead, usize)> {
    let at = after(bytes, 0, b"HTTP/1.1 ")?;
    let &[
        hundreds @ b'1'..=b'9',
        tens @ b'0'..=b'9',
        ones @ b'0'..=b'9',
        b' ',
    ] = bytes.get(at..)?.first_chunk()?
    else {
        return None;
    };
    let digit = |byte: u8| u16::from(byte - b'0');
    let reason = at + 4;
    let line = reason + printable(&bytes[reason..]);
    let fields_at = after(bytes, line, b"\r\n")?;
    let mut head = ResponseHead::new(digit(hundreds) * 100 + digit(tens) * 10 + digit(ones));
    let mut connection = Connection::new(Version::Http11);
    let end = fields(bytes, fields_at, limits, |field, value| {
        if !between_hops(&field, value, &mut connection)? {
            field.enter(&mut head.headers);
        }
        Some(())
    })?;
    head.headers.place(&bytes[..end]);
    finish_response(&mut head, &connection, method, limits).ok()?;
    Some((head, end))
}

/// Looks at a field for what concerns this connection; `true` where it concerns nobody else.
#[inline(always)]
fn between_hops(field: &Found<'_>, value: &[u8], connection: &mut Connection) -> Option<bool> {
    match field.key {
        CONNECTION if field.is(b"connection") => connection.connection(value),
        KEEP_ALIVE if field.is(b"keep-alive") => connection.keep_alive(value),
        PROXY_CONNECTION if field.is(b"proxy-connection") => {}
        TRANSFER_ENCODING if field.is(b"transfer-encoding") => connection.coding(value).ok()?,
        TE if field.is(b"te") => return None,
        CONTENT_LENGTH if field.is(b"content-length") => {
            connection.length(value).ok()?;
            return Some(false);
        }
        _ => return Some(false),
    }
    Some(true)
}

/// A field that was found.
struct Found<'b> {
    key: Key,
    bytes: &'b [u8],
    name: Span,
    value: Span,
    line: bool,
}

impl Found<'_> {
    fn is(&self, name: &[u8]) -> bool {
        self.bytes.eq_ignore_ascii_case(name)
    }

    fn enter(&self, headers: &mut Headers) {
        headers.push_placed(self.key, self.name, self.value, self.line);
    }
}

/// Goes through the fields that begin at `at`; tells where the head ends.
#[inline(always)]
fn fields<'b>(
    bytes: &'b [u8],
    mut at: usize,
    limits: &Limits,
    mut take: impl FnMut(Found<'b>, &'b [u8]) -> Option<()>,
) -> Option<usize> {
    for _ in 0..=limits.headers {
        let rest = bytes.get(at..)?;
        if let Some(b"\r\n") = rest.first_chunk() {
            return Some(at + 2).filter(|&end| end <= limits.head_bytes);
        }
        let colon = colon(rest)?;
        let name = &rest[..colon];
        let all = name
            .iter()
            .fold(NAME, |all, &byte| all & CLASSES[usize::from(byte)]);
        if all == 0 || name.is_empty() {
            return None;
        }
        let line = rest.get(colon + 1) == Some(&b' ');
        let begin = colon + 1 + usize::from(line);
        let value = rest.get(begin..)?;
        let value = &value[..printable(value)];
        let end = begin + value.len();
        // Blanks around a value are not of it; more than the usual one is not looked for here.
        if value.first() == Some(&b' ') || value.last() == Some(&b' ') {
            return None;
        }
        after(rest, end, b"\r\n")?;
        let found = Found {
            key: Key::of(name),
            bytes: name,
            name: Span::new(at, at + colon),
            value: Span::new(at + begin, at + end),
            line,
        };
        take(found, value)?;
        at += end + 2;
    }
    None
}

/// The method, and where the target begins.
fn method(bytes: &[u8]) -> Option<(Method, usize)> {
    Some(match bytes.first_chunk::<4>()? {
        b"GET " => (Method::Get, 4),
        b"PUT " => (Method::Put, 4),
        b"POST" => (Method::Post, after(bytes, 4, b" ")?),
        b"HEAD" => (Method::Head, after(bytes, 4, b" ")?),
        b"DELE" => (Method::Delete, after(bytes, 4, b"TE ")?),
        b"PATC" => (Method::Patch, after(bytes, 4, b"H ")?),
        _ => return None,
    })
}

/// Where `expected` ends, if it stands at `at`.
fn after(bytes: &[u8], at: usize, expected: &[u8]) -> Option<usize> {
    let end = at + expected.len();
    (bytes.get(at..end)? == expected).then_some(end)
}

/// Where the first colon is, eight bytes at a time.
#[inline(always)]
fn colon(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(eight) = bytes[at..].first_chunk() {
        let colon = u64::from_le_bytes(*eight) ^ (EACH * 0x3a);
        // As in `printable`.
        let colon = colon.wrapping_sub(EACH) & !colon & HIGH;
        if colon != 0 {
            return Some(at + colon.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    let rest = bytes[at..].iter().position(|&byte| byte == b':');
    rest.map(|rest| at + rest)
}

/// How many bytes of a class come first; `None` where nothing comes after them.
#[inline(always)]
fn run_of(bytes: &[u8], class: u8) -> Option<usize> {
    bytes
        .iter()
        .position(|&byte| CLASSES[usize::from(byte)] & class == 0)
}

/// How many bytes come before the first control character, eight at a time.
#[inline(always)]
fn printable(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(eight) = bytes[at..].first_chunk() {
        let eight = u64::from_le_bytes(*eight);
        // A borrow makes only bytes behind the first one that is meant seem to be meant.
        let below = eight.wrapping_sub(EACH * 0x20) & !eight;
        let delete = eight ^ (EACH * 0x7f);
        let delete = delete.wrapping_sub(EACH) & !delete;
        let control = (below | delete) & HIGH;
        if control != 0 {
            return at + control.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let control = |&byte: &u8| byte < b' ' || byte == 0x7f;
    let rest = bytes[at..].iter().position(control);
    rest.map_or(bytes.len(), |rest| at + rest)
}

const EACH: u64 = u64::from_ne_bytes([1; 8]);
const HIGH: u64 = EACH << 7;

/// What each byte may be part of.
static CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let is = byte as u8;
        if is.is_ascii_alphanumeric() || matches!(is, b'-' | b'_' | b'.') {
            classes[byte] = NAME | TARGET;
        } else if matches!(
            is,
            b'/' | b'~'
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
                | b':'
                | b'@'
                | b'%'
        ) || is == b'?'
        {
            classes[byte] = TARGET;
        }
        byte += 1;
    }
    classes
};
const NAME: u8 = 1;
const TARGET: u8 = 2;

const CONNECTION: Key = Key::of(b"connection");
const CONTENT_LENGTH: Key = Key::of(b"content-length");
const EXPECT: Key = Key::of(b"expect");
const HOST: Key = Key::of(b"host");
const KEEP_ALIVE: Key = Key::of(b"keep-alive");
const PROXY_CONNECTION: Key = Key::of(b"proxy-connection");
const TE: Key = Key::of(b"te");
const TRANSFER_ENCODING: Key = Key::of(b"transfer-encoding");

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;
    use crate::h1::{HeadScanner, Scan, parse_request, parse_response};

    /// Where both look, both see the same; tells whether the quick one did.
    fn agree<T: Debug>(
        bytes: &[u8],
        fast: Option<(T, usize)>,
        slow: impl FnOnce(&[u8]) -> Result<T, crate::Refusal>,
    ) -> bool {
        let Some((head, length)) = fast else {
            return false;
        };
        let shown = String::from_utf8_lossy(bytes);
        let scan = HeadScanner::default().scan(bytes, &Limits::default());
        let whole = Scan::Complete {
            start: 0,
            end: length,
        };
        assert_eq!(scan, Ok(whole), "{shown}");
        let slow = slow(&bytes[..length]).unwrap_or_else(|refusal| panic!("{refusal:?}: {shown}"));
        assert_eq!(format!("{head:?}"), format!("{slow:?}"), "{shown}");
        true
    }

    fn request_agrees(bytes: &[u8]) -> bool {
        let limits = Limits::default();
        agree(bytes, request(bytes, &limits), |head| {
            parse_request(head, &limits)
        })
    }

    fn response_agrees(bytes: &[u8]) -> bool {
        let limits = Limits::default();
        agree(bytes, response(bytes, &Method::Get, &limits), |head| {
            parse_response(head, &Method::Get, &limits)
        })
    }

    const REQUESTS: [&str; 6] = [
        "GET / HTTP/1.1\r\nHost: a:80\r\n\r\n",
        "GET /a/b%20c?d=e&f=%C3%BC HTTP/1.1\r\nhost:a\r\nAccept: */*\r\nX-Empty:\r\nX-Blank: \r\n\r\nrest",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nUser-Agent: caf\u{e9} 1.0 (x; y)\r\n\r\n{}",
        "PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close, x-gone\r\nX-Gone: 1\r\n\r\n",
        "DELETE /x HTTP/1.1\r\nHost: a\r\nProxy-Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n\r\n",
        "PATCH /x HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ];
    const RESPONSES: [&str; 4] = [
        "HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc",
        "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=7\r\n\r\n",
        "HTTP/1.1 503 \r\nset-cookie: a=b; Path=/\r\nset-cookie: c=d\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ];

    #[test]
    fn usual_heads_are_taken_and_read_as_ever() {
        for head in REQUESTS {
            assert!(request_agrees(head.as_bytes()), "{head}");
        }
        for head in RESPONSES {
            assert!(response_agrees(head.as_bytes()), "{head}");
        }
    }

    #[test]
    fn what_is_not_whole_or_not_usual_is_left_alone() {
        for head in REQUESTS {
            let end = head.find("\r\n\r\n").expect("it has an end");
            for at in 0..end + 4 {
                assert!(!request_agrees(&head.as_bytes()[..at]), "{at} of {head}");
            }
        }
        for head in [
            "GET / HTTP/1.0\r\n\r\n",
            "GET http://a/ HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
            "GET / HTTP/1.1\r\nX : a\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n",
            "GET / HTTP/1.1\nX: a\n\n",
            "GET / HTTP/1.1\r\nX: \u{1}\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
            "get / HTTP/1.1\r\n\r\n",
        ] {
            assert!(!request_agrees(head.as_bytes()), "{head}");
        }
        let mut many = String::from("GET / HTTP/1.1\r\n");
        (0..101).for_each(|_| many.push_str("x: y\r\n"));
        many.push_str("\r\n");
        assert!(!request_agrees(many.as_bytes()));
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(60 * 1024));
        assert!(!request_agrees(long.as_bytes()));
    }

    #[test]
    fn changed_heads_are_read_alike() {
        // A generator of Knuth's; what it draws does not matter, only that there is much of it.
        let mut state = 7_u64;
        let mut draw = move |below: usize| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        const BYTES: &[u8] = b"\r\n \t:\0\x7f\x80\xff/?#[]\"<a0-,";
        let mut taken = 0;
        for round in 0..40_000 {
            let requests = round % 2 == 0;
            let heads: &[&str] = if requests { &REQUESTS } else { &RESPONSES };
            let mut head = heads[draw(heads.len())].as_bytes().to_vec();
            for _ in 0..=draw(2) {
                let at = draw(head.len());
                match draw(3) {
                    0 => head[at] = BYTES[draw(BYTES.len())],
                    1 => head.insert(at, BYTES[draw(BYTES.len())]),
                    _ => drop(head.remove(at)),
                }
            }
            taken += usize::from(match requests {
                true => request_agrees(&head),
                false => response_agrees(&head),
            });
        }
        assert!(taken > 4_000, "{taken}");
    }
}
