//! Heads and trailers → header blocks, straight from the arena of a head into the frame.

use super::{
    fields_in::is_token,
    hpack::{Encoder, is_value, lower},
};
use crate::{Error, Framing, Headers, Method, Refusal, RequestHead, ResponseHead, headers::Name};

/// Whether a request can be said in HTTP/2.
///
/// # Errors
/// What it lacks.
pub(super) fn check_request(head: &RequestHead) -> Result<(), Error> {
    const INVALID: Refusal = Refusal {
        status: 400,
        detail: "http2.invalid_request",
    };
    let path = head.path();
    let visible = path.bytes().all(|byte| byte > b' ' && byte != 0x7f);
    let rooted = path.starts_with('/') || path == "*";
    let host = head.authority();
    let well = is_token(head.method.as_str())
        && !host.is_empty()
        && host.bytes().all(|byte| byte > b' ' && byte != 0x7f)
        && (head.method == Method::Connect || (visible && rooted));
    if well { Ok(()) } else { Err(INVALID.into()) }
}

/// Writes the block of a request that was checked.
pub(super) fn write_request(
    encoder: &mut Encoder,
    head: &RequestHead,
    framing: Framing,
    out: &mut Vec<u8>,
) {
    encoder.begin(out);
    // A CONNECT of HTTP/1 names no protocol, whatever it upgrades to.
    let extended = head.upgrade && head.method != Method::Connect;
    let upgrade = head.headers.get("upgrade").filter(|_| extended);
    let method = match upgrade {
        Some(_) => "CONNECT",
        None => head.method.as_str(),
    };
    encoder.field(b":method", method.as_bytes(), out);
    if head.method != Method::Connect {
        let scheme = match head.scheme() {
            "https" => "https",
            _ => "http",
        };
        encoder.field(b":scheme", scheme.as_bytes(), out);
    }
    encoder.field(b":authority", head.authority().as_bytes(), out);
    if head.method != Method::Connect {
        encoder.field(b":path", head.path().as_bytes(), out);
    }
    if let Some(protocol) = upgrade {
        encoder.field(b":protocol", protocol, out);
    }
    write_fields(encoder, &head.headers, Length::of(framing), out);
}

/// Writes the block of a response.
pub(super) fn write_response(
    encoder: &mut Encoder,
    head: &ResponseHead,
    length: Length,
    out: &mut Vec<u8>,
) {
    // The answer to an extended CONNECT (RFC 8441, 5.1).
    let status = if head.status == 101 { 200 } else { head.status };
    write_status(encoder, status, out);
    write_fields(encoder, &head.headers, length, out);
}

/// Writes the block of a 1xx response.
pub(super) fn write_informational(
    encoder: &mut Encoder,
    status: u16,
    headers: &Headers,
    out: &mut Vec<u8>,
) {
    write_status(encoder, status, out);
    write_fields(encoder, headers, Length::AsIs, out);
}

fn write_status(encoder: &mut Encoder, status: u16, out: &mut Vec<u8>) {
    encoder.begin(out);
    let status = match status {
        100..=999 => status,
        _ => 502,
    };
    let digits = [status / 100, status / 10 % 10, status % 10].map(|digit| b'0' + digit as u8);
    encoder.field(b":status", &digits, out);
}

/// Writes the block of trailers.
pub(super) fn write_trailers(encoder: &mut Encoder, trailers: &Headers, out: &mut Vec<u8>) {
    encoder.begin(out);
    write_fields(encoder, trailers, Length::AsIs, out);
}

/// What becomes of `content-length`: one that is not the body's would make the message malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    /// It stays.
    AsIs,
    /// It is this.
    Is(u64),
    /// It goes.
    Gone,
}

impl Length {
    pub(super) fn of(framing: Framing) -> Length {
        match framing {
            Framing::None => Length::AsIs,
            Framing::Length(length) => Length::Is(length),
            _ => Length::Gone,
        }
    }
}

/// Writes fields; what HTTP/2 does not know is left out.
fn write_fields(encoder: &mut Encoder, headers: &Headers, length: Length, out: &mut Vec<u8>) {
    let mut scratch = [0; SCRATCH];
    let mut long = Vec::new();
    for (name, value, secret) in headers.iter_with_secrecy() {
        if is_connections(name) || length != Length::AsIs && name.is("content-length") {
            continue;
        }
        let name = name.text;
        let room = match scratch.get_mut(..name.len()) {
            Some(room) => room,
            None => {
                long.resize(name.len(), 0);
                &mut long[..]
            }
        };
        // Both are valid in HTTP/1 as we parse it; a filter's mistake is left out, not sent.
        if !lower(name, room) || !is_value(value) {
            continue;
        }
        encoder.field_of(room, value, secret, out);
    }
    if let Length::Is(length) = length {
        let mut text = [0; 20];
        encoder.field(b"content-length", decimal(length, &mut text), out);
    }
}

/// Longer names are lowered in a buffer of their own.
const SCRATCH: usize = 64;

/// Whether a field belongs to one connection, or is said in another way.
fn is_connections(name: Name<'_>) -> bool {
    name.is("host")
        || name.is("connection")
        || name.is("keep-alive")
        || name.is("proxy-connection")
        || name.is("transfer-encoding")
        || name.is("upgrade")
        || name.is("http2-settings")
}

fn decimal(mut number: u64, text: &mut [u8; 20]) -> &[u8] {
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &text[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            fields_in::{Read, Rules, read_request},
            hpack::Decoder,
        },
        *,
    };

    #[test]
    fn what_no_table_may_hold_is_passed_on_as_such() {
        // `GET http://h/` with x-key: k and cookie: …, both as literals that are never indexed, and x-other: o.
        let mut block = vec![0x82, 0x86, 0x84, 0x41, 1, b'h'];
        block.extend(b"\x10\x05x-key\x01k");
        block.extend(b"\x1f\x11\x1ba-cookie-of-some-length=abc");
        block.extend(b"\x00\x07x-other\x01o");
        let rules = Rules {
            list: 4096,
            field: usize::MAX,
            obs_text: true,
            count: 10,
            extended_connect: false,
        };
        let mut cookies = Vec::new();
        let read = read_request(&mut Decoder::new(), &block, rules, &mut cookies).unwrap();
        let Read::Good(head, _) = read else {
            panic!("it is good: {read:?}");
        };
        let (mut encoder, mut decoder) = (Encoder::new(true), Decoder::new());
        for _ in 0..3 {
            let mut out = Vec::new();
            write_request(&mut encoder, &head, Framing::None, &mut out);
            let mut secrets = Vec::new();
            decoder
                .decode(&out, (4096, usize::MAX), |field| {
                    if field.secret {
                        secrets.push(String::from_utf8_lossy(field.name).into_owned());
                    }
                })
                .unwrap();
            assert_eq!(secrets, ["x-key", "cookie"]);
            // Once more, for a message that was copied.
            assert_eq!(
                head.headers
                    .clone()
                    .iter_with_secrecy()
                    .filter(|f| f.2)
                    .count(),
                2
            );
        }
    }
}
