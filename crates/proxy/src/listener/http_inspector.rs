//! Is the client speaking HTTP in clear, and which?
//!
//! Sans-io. "Not HTTP" is said at the first byte that no HTTP request can have, so that most other protocols do not wait.

/// What the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peek {
    /// Could still become a request: look again when there is more.
    More,
    /// Something else.
    NotHttp,
    /// HTTP/1.0, by its request line.
    Http10,
    /// HTTP/1.1, by its request line.
    Http11,
    /// HTTP/2, by its preface.
    Http2,
}

impl Peek {
    /// The name that filter chains use (`application_protocols`).
    pub(super) fn protocol(self) -> Option<&'static str> {
        match self {
            Self::Http10 => Some("http/1.0"),
            Self::Http11 => Some("http/1.1"),
            Self::Http2 => Some("h2c"),
            Self::More | Self::NotHttp => None,
        }
    }
}

/// How much of a request line is looked at before it counts as something else: Envoy's limit.
pub(super) const MAX_REQUEST_LINE: usize = 64 * 1024;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The methods that Envoy's inspector knows: what IANA lists and the common parsers take.
const METHODS: &[&str] = &[
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "HEAD",
    "OPTIONS",
    "PATCH",
    "CONNECT",
    "TRACE",
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
    "NOTIFY",
    "PROPFIND",
    "PROPPATCH",
    "PURGE",
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

/// Looks at the first bytes of a connection.
pub(super) fn peek(bytes: &[u8]) -> Peek {
    if bytes.starts_with(PREFACE) {
        return Peek::Http2;
    }
    if PREFACE.starts_with(bytes) {
        return Peek::More;
    }
    // A client may send empty lines first (RFC 9112, 2.2).
    let skipped = bytes
        .iter()
        .take_while(|byte| matches!(byte, b'\r' | b'\n'))
        .count();
    let bytes = &bytes[skipped..];
    let Some(space) = memchr::memchr(b' ', bytes) else {
        let possible = METHODS
            .iter()
            .any(|method| method.as_bytes().starts_with(bytes));
        return if possible { Peek::More } else { Peek::NotHttp };
    };
    if !METHODS
        .iter()
        .any(|method| method.as_bytes() == &bytes[..space])
    {
        return Peek::NotHttp;
    }
    let rest = &bytes[space + 1..];
    let Some(end) = memchr::memchr(b'\n', rest) else {
        let possible =
            rest.len() < MAX_REQUEST_LINE && rest.iter().all(|&byte| byte >= b' ' || byte == b'\r');
        return if possible { Peek::More } else { Peek::NotHttp };
    };
    let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
    match line.rsplit(|&byte| byte == b' ').next() {
        Some(b"HTTP/1.1") if line.len() > 9 => Peek::Http11,
        Some(b"HTTP/1.0") if line.len() > 9 => Peek::Http10,
        _ => Peek::NotHttp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_known_by_their_first_line() {
        for (bytes, found) in [
            (&b"GET / HTTP/1.1\r\n"[..], Peek::Http11),
            (b"\r\nPOST /a b HTTP/1.0\r\nHost: a", Peek::Http10),
            (PREFACE, Peek::Http2),
            (b"GET / HTTP/3.0\r\n", Peek::NotHttp),
            (b"GET HTTP/1.1\r\n", Peek::NotHttp),
            (b"GETS / HTTP/1.1\r\n", Peek::NotHttp),
            (b"\x16\x03\x01", Peek::NotHttp),
            (b"SSH-2.0-x\r\n", Peek::NotHttp),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Peek::NotHttp),
        ] {
            assert_eq!(peek(bytes), found, "{:?}", String::from_utf8_lossy(bytes));
            if found.protocol().is_some() {
                let line = bytes
                    .iter()
                    .rposition(|&byte| byte == b'\n')
                    .expect("it has a line");
                for end in 0..line.min(bytes.len()) {
                    assert!(
                        matches!(peek(&bytes[..end]), Peek::More | Peek::Http10),
                        "{end}"
                    );
                }
            }
        }
    }
}
