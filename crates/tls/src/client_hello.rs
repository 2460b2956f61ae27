//! The first bytes of a connection: is it TLS, and what does the client ask for?
//!
//! Sans-io: give it what has arrived so far. It says "not TLS" at the first byte that cannot be TLS, so a protocol in
//! which the client speaks in clear never waits for it. Nothing is decrypted and no state is kept.

/// What the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peek {
    /// Could still become a ClientHello: look again when there is more.
    More,
    /// Something else.
    NotTls,
    /// A ClientHello that is longer than the limit.
    TooLong,
    /// A whole ClientHello.
    Hello(ClientHello),
}

/// What a client offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The server name (SNI) in lower case, where there is one that is a host name.
    pub server_name: Option<String>,
    /// The application protocols (ALPN) in the client's order; entries that are not UTF-8 are left out, since no chain
    /// can name them.
    pub application_protocols: Vec<String>,
    /// Whether the client offers TLS 1.3.
    pub tls13: bool,
}

/// The longest ClientHello that is taken, in bytes of handshake: Envoy's default.
pub const MAX_CLIENT_HELLO: usize = 16 * 1024;

/// Looks at the first bytes of a connection.
pub fn peek(bytes: &[u8]) -> Peek {
    let mut rest = bytes;
    // The handshake message may be cut into several records (RFC 8446, 5.1); the common case borrows.
    let mut joined = Vec::new();
    loop {
        match rest {
            [] => return More,
            [CONTENT_HANDSHAKE, ..] => {}
            _ => return Peek::NotTls,
        }
        // TLS 1.0 to 1.3 all write major version 3 here.
        if rest.get(1).is_some_and(|&major| major != 3) {
            return Peek::NotTls;
        }
        let Some((header, payload)) = rest.split_at_checked(5) else {
            return More;
        };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if length == 0 || length > MAX_RECORD {
            return Peek::NotTls;
        }
        let arrived = &payload[..payload.len().min(length)];
        let whole_record = arrived.len() == length;
        let message: &[u8] = if joined.is_empty() {
            arrived
        } else {
            joined.extend_from_slice(arrived);
            &joined
        };
        match handshake(message) {
            Handshake::More if !whole_record => return More,
            Handshake::More => {
                if joined.is_empty() {
                    joined = arrived.to_vec();
                }
                rest = &payload[length..];
            }
            Handshake::Done(peek) => return peek,
        }
    }
}

use Peek::More;

const CONTENT_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const MAX_RECORD: usize = 16 * 1024 + 256;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;

enum Handshake {
    More,
    Done(Peek),
}

fn handshake(message: &[u8]) -> Handshake {
    if message.first().is_some_and(|&kind| kind != CLIENT_HELLO) {
        return Handshake::Done(Peek::NotTls);
    }
    let Some((header, body)) = message.split_at_checked(4) else {
        return Handshake::More;
    };
    let length = u32::from_be_bytes([0, header[1], header[2], header[3]]) as usize;
    if length > MAX_CLIENT_HELLO {
        return Handshake::Done(Peek::TooLong);
    }
    match body.get(..length) {
        None => Handshake::More,
        Some(body) => Handshake::Done(hello(body).map_or(Peek::NotTls, Peek::Hello)),
    }
}

/// A reader that gives up with `None` where the bytes end early.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)
            .map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self) -> Option<&'a [u8]> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    fn vector16(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }
}

fn hello(body: &[u8]) -> Option<ClientHello> {
    let mut reader = Reader(body);
    let mut hello = ClientHello::default();
    // Version, random, session, cipher suites, compression methods.
    reader.take(2 + 32)?;
    reader.vector8()?;
    reader.vector16()?;
    reader.vector8()?;
    if reader.0.is_empty() {
        return Some(hello); // TLS 1.2 may come without extensions.
    }
    let mut extensions = Reader(reader.vector16()?);
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let mut data = Reader(extensions.vector16()?);
        match kind {
            SERVER_NAME => {
                let mut names = Reader(data.vector16()?);
                while !names.0.is_empty() {
                    let (kind, name) = (names.u8()?, names.vector16()?);
                    if kind == 0 && hello.server_name.is_none() {
                        hello.server_name =
                            std::str::from_utf8(name).ok().map(str::to_ascii_lowercase);
                    }
                }
            }
            ALPN => {
                let mut protocols = Reader(data.vector16()?);
                while !protocols.0.is_empty() {
                    if let Ok(protocol) = std::str::from_utf8(protocols.vector8()?) {
                        hello.application_protocols.push(protocol.to_owned());
                    }
                }
            }
            SUPPORTED_VERSIONS => {
                let versions = data.vector8()?;
                hello.tls13 = versions.chunks_exact(2).any(|version| version == [3, 4]);
            }
            _ => {}
        }
    }
    Some(hello)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello with these extensions, as one handshake message.
    fn message(server_name: &str, protocols: &[&str]) -> Vec<u8> {
        let mut extensions = Vec::new();
        let mut extension = |kind: u16, data: &[u8]| {
            extensions.extend(kind.to_be_bytes());
            extensions.extend((data.len() as u16).to_be_bytes());
            extensions.extend(data);
        };
        let mut name = vec![0];
        name.extend((server_name.len() as u16).to_be_bytes());
        name.extend(server_name.bytes());
        let mut list = (name.len() as u16).to_be_bytes().to_vec();
        list.extend(name);
        extension(SERVER_NAME, &list);
        let mut entries = Vec::new();
        for protocol in protocols {
            entries.push(protocol.len() as u8);
            entries.extend(protocol.bytes());
        }
        let mut list = (entries.len() as u16).to_be_bytes().to_vec();
        list.extend(entries);
        extension(ALPN, &list);
        extension(SUPPORTED_VERSIONS, &[2, 3, 4]);
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![CLIENT_HELLO, 0];
        message.extend((body.len() as u16).to_be_bytes());
        message.extend(body);
        message
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in message.chunks(size) {
            bytes.extend([CONTENT_HANDSHAKE, 3, 1]);
            bytes.extend((part.len() as u16).to_be_bytes());
            bytes.extend(part);
        }
        bytes
    }

    #[test]
    fn a_hello_is_read_however_it_is_cut() {
        let message = message("Reviews.Example.COM", &["h2", "http/1.1"]);
        for size in [1, 3, 4, 50, 1000] {
            let bytes = records(&message, size);
            for end in 0..bytes.len() {
                assert_eq!(
                    peek(&bytes[..end]),
                    Peek::More,
                    "records of {size}, {end} bytes"
                );
            }
            let Peek::Hello(hello) = peek(&bytes) else {
                panic!("records of {size}")
            };
            assert_eq!(hello.server_name.as_deref(), Some("reviews.example.com"));
            assert_eq!(hello.application_protocols, ["h2", "http/1.1"]);
            assert!(hello.tls13);
        }
    }

    #[test]
    fn other_protocols_are_known_at_their_first_bytes() {
        for bytes in [
            &b"G"[..],
            b"SSH-2.0",
            b"\x00",
            b"\x16\x02",
            b"\x16\x03\x01\x00\x00",
        ] {
            assert_eq!(peek(bytes), Peek::NotTls, "{bytes:?}");
        }
        let mut other = records(&message("a", &[]), 1000);
        other[5] = 2;
        assert_eq!(peek(&other), Peek::NotTls);
    }

    #[test]
    fn a_hello_that_lies_about_its_length_is_refused() {
        assert_eq!(peek(&[22, 3, 1, 1, 0, 1, 0, 0x40, 1]), Peek::TooLong);
        let mut short = message("a.b", &["h2"]);
        let last = short.len() - 1;
        short.truncate(last);
        short[3] -= 1;
        assert_eq!(peek(&records(&short, 1000)), Peek::NotTls);
    }

    #[test]
    fn no_bytes_at_all_make_it_panic() {
        let good = records(&message("a.example", &["h2", "istio"]), 40);
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = peek(&bytes);
            }
        }
    }
}
