//! The PROXY protocol, versions 1 and 2 (HAProxy's `proxy-protocol.txt`): who a connection was made for.
//!
//! Sans-io: [`parse`] looks at the first bytes of a connection, [`Header::write_to`] makes them. Parsing is strict, since
//! whoever may speak the protocol names any client that it likes: one wrong byte and the connection ends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::{BufMut, Bytes, BytesMut};

/// Version of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// One type-length-value of a version 2 header.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tlv {
    /// Its type (`PP2_TYPE_*`).
    pub kind: u8,
    /// Its value, at most 65,535 bytes.
    pub value: Bytes,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which version it was or will be written in.
    pub version: Version,
    /// Client and the address that it connected to; none for `UNKNOWN`, `LOCAL` and families without IP addresses, where the
    /// connection's own addresses stay.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// Version 2 only, in order, without padding and checksum.
    pub tlvs: Vec<Tlv>,
}

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Could still become a header: look again when there is more.
    More,
    /// Something else.
    Absent,
    /// A header and its length in bytes.
    Header(Header, usize),
}

/// Why bytes that begin like a header are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PROXY protocol version {}: {reason}", if *version == Version::V1 { 1 } else { 2 })]
pub struct Malformed {
    /// The version that the bytes begin like.
    pub version: Version,
    /// What is wrong.
    pub reason: &'static str,
}

/// Looks at the first bytes of a connection.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Malformed> {
    if bytes.starts_with(SIGNATURE_V2) {
        return parse_v2(bytes).map_err(|reason| Malformed {
            version: Version::V2,
            reason,
        });
    }
    if bytes.starts_with(SIGNATURE_V1) {
        return parse_v1(bytes).map_err(|reason| Malformed {
            version: Version::V1,
            reason,
        });
    }
    if SIGNATURE_V2.starts_with(bytes) || SIGNATURE_V1.starts_with(bytes) {
        return Ok(Parsed::More);
    }
    Ok(Parsed::Absent)
}

fn parse_v1(bytes: &[u8]) -> Result<Parsed, &'static str> {
    let Some(end) = memchr::memchr(b'\n', &bytes[..bytes.len().min(MAX_LINE)]) else {
        return if bytes.len() < MAX_LINE {
            Ok(Parsed::More)
        } else {
            Err("the line is longer than 107 bytes")
        };
    };
    let line = bytes[SIGNATURE_V1.len()..end]
        .strip_suffix(b"\r")
        .ok_or("the line does not end in CR LF")?;
    let line = std::str::from_utf8(line).map_err(|_| "the line is not ASCII")?;
    let header = |addresses| {
        let header = Header {
            version: Version::V1,
            addresses,
            tlvs: Vec::new(),
        };
        Parsed::Header(header, end + 1)
    };
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Ok(header(None));
    }
    let mut fields = line.split(' ');
    let mut next = || fields.next().ok_or("it has too few fields");
    let (family, source, destination) = (next()?, next()?, next()?);
    let (source_port, destination_port) = (port(next()?)?, port(next()?)?);
    if fields.next().is_some() {
        return Err("it has too many fields");
    }
    let address = |text: &str| -> Result<IpAddr, &'static str> {
        match family {
            "TCP4" => text.parse::<Ipv4Addr>().map(IpAddr::from),
            "TCP6" => text.parse::<Ipv6Addr>().map(IpAddr::from),
            _ => return Err("the family is none of TCP4, TCP6, UNKNOWN"),
        }
        .map_err(|_| "an address does not belong to the family")
    };
    let addresses = (
        SocketAddr::new(address(source)?, source_port),
        SocketAddr::new(address(destination)?, destination_port),
    );
    unicast(addresses.0.ip())?;
    Ok(header(Some(addresses)))
}

/// Decimal, without sign or leading zeros.
fn port(text: &str) -> Result<u16, &'static str> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return Err("a port is not a number");
    }
    text.parse().map_err(|_| "a port is not from 0 to 65535")
}

fn parse_v2(bytes: &[u8]) -> Result<Parsed, &'static str> {
    let Some(fixed) = bytes.get(SIGNATURE_V2.len()..FIXED_V2) else {
        return match bytes.get(SIGNATURE_V2.len()) {
            Some(first) if first >> 4 != 2 => Err("the version is not 2"),
            _ => Ok(Parsed::More),
        };
    };
    if fixed[0] >> 4 != 2 {
        return Err("the version is not 2");
    }
    let local = match fixed[0] & 0xf {
        0 => true,
        1 => false,
        _ => return Err("the command is neither LOCAL nor PROXY"),
    };
    let (family, transport) = (fixed[1] >> 4, fixed[1] & 0xf);
    if family > 3 || transport > 2 {
        return Err("the address family or the transport is unknown");
    }
    let length = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    let addresses_length = match family {
        1 => 12,
        2 => 36,
        3 => 216,
        _ => 0,
    };
    // A LOCAL header's family means nothing, and so may its length.
    if !local && length < addresses_length {
        return Err("it is too short for its addresses");
    }
    let Some(body) = bytes.get(FIXED_V2..FIXED_V2 + length) else {
        return Ok(Parsed::More);
    };
    let whole = &bytes[..FIXED_V2 + length];
    let mut header = Header {
        version: Version::V2,
        addresses: None,
        tlvs: Vec::new(),
    };
    if !local {
        let (addresses, tlvs) = body.split_at(addresses_length);
        header.addresses = read_addresses(family, addresses);
        if let Some((source, _)) = header.addresses {
            unicast(source.ip())?;
        }
        header.tlvs = read_tlvs(tlvs, whole)?;
    }
    Ok(Parsed::Header(header, whole.len()))
}

fn read_addresses(family: u8, bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    match family {
        1 => {
            let ip = |at: usize| {
                <[u8; 4]>::try_from(&bytes[at..at + 4])
                    .ok()
                    .map(IpAddr::from)
            };
            Some((
                SocketAddr::new(ip(0)?, port(8)),
                SocketAddr::new(ip(4)?, port(10)),
            ))
        }
        2 => {
            let ip = |at: usize| {
                <[u8; 16]>::try_from(&bytes[at..at + 16])
                    .ok()
                    .map(IpAddr::from)
            };
            Some((
                SocketAddr::new(ip(0)?, port(32)),
                SocketAddr::new(ip(16)?, port(34)),
            ))
        }
        // Unix sockets have names that mean nothing here.
        _ => None,
    }
}

fn read_tlvs(mut bytes: &[u8], whole: &[u8]) -> Result<Vec<Tlv>, &'static str> {
    let mut tlvs = Vec::new();
    while let Some((&kind, rest)) = bytes.split_first() {
        let (length, rest) = rest.split_at_checked(2).ok_or("a TLV is cut off")?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        let (value, rest) = rest.split_at_checked(length).ok_or("a TLV is cut off")?;
        match kind {
            TYPE_NOOP => {}
            TYPE_CRC32C => {
                let at = whole.len() - rest.len() - value.len();
                if value.len() != 4 || crc32c(whole, at) != value {
                    return Err("the checksum is wrong");
                }
            }
            kind => tlvs.push(Tlv {
                kind,
                value: Bytes::copy_from_slice(value),
            }),
        }
        bytes = rest;
    }
    Ok(tlvs)
}

/// A client has one address; anything else would let a header pass by rules about addresses.
fn unicast(ip: IpAddr) -> Result<(), &'static str> {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Err("the source is not a unicast address");
    }
    Ok(())
}

/// CRC-32C of a header whose checksum, four bytes from `at` on, counts as zeros.
fn crc32c(whole: &[u8], at: usize) -> [u8; 4] {
    let mut crc = u32::MAX;
    for (index, byte) in whole.iter().enumerate() {
        let byte = if (at..at + 4).contains(&index) {
            0
        } else {
            *byte
        };
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).to_be_bytes()
}

impl Header {
    /// Appends the header as it goes over the wire. Without addresses it is `UNKNOWN`, `LOCAL` or of no family; TLVs that do not fit a
    /// header's 65,535 bytes any more are left out.
    pub fn write_to(&self, out: &mut BytesMut) {
        match self.version {
            Version::V1 => self.write_v1(out),
            Version::V2 => self.write_v2(out),
        }
    }

    fn write_v1(&self, out: &mut BytesMut) {
        let line = match self.addresses.map(same_family) {
            None => "PROXY UNKNOWN\r\n".to_owned(),
            Some((source, destination)) => format!(
                "PROXY TCP{} {} {} {} {}\r\n",
                if source.is_ipv4() { 4 } else { 6 },
                source.ip(),
                destination.ip(),
                source.port(),
                destination.port()
            ),
        };
        out.extend_from_slice(line.as_bytes());
    }

    fn write_v2(&self, out: &mut BytesMut) {
        out.extend_from_slice(SIGNATURE_V2);
        let addresses = self.addresses.map(same_family);
        let (command, family) = match addresses {
            None if self.tlvs.is_empty() => (0x20, 0x00),
            // What a LOCAL header says besides is nothing.
            None => (0x21, 0x00),
            Some((source, _)) if source.is_ipv4() => (0x21, 0x11),
            Some(_) => (0x21, 0x21),
        };
        out.put_slice(&[command, family]);
        let length_at = out.len();
        out.put_u16(0);
        if let Some((source, destination)) = addresses {
            for address in [source, destination] {
                match address.ip() {
                    IpAddr::V4(ip) => out.put_slice(&ip.octets()),
                    IpAddr::V6(ip) => out.put_slice(&ip.octets()),
                }
            }
            out.put_u16(source.port());
            out.put_u16(destination.port());
        }
        for tlv in &self.tlvs {
            let length = out.len() - length_at - 2;
            let Ok(size) = u16::try_from(tlv.value.len()) else {
                continue;
            };
            if length + 3 + usize::from(size) > usize::from(u16::MAX) {
                continue;
            }
            out.put_u8(tlv.kind);
            out.put_u16(size);
            out.put_slice(&tlv.value);
        }
        let length = (out.len() - length_at - 2) as u16;
        out[length_at..length_at + 2].copy_from_slice(&length.to_be_bytes());
    }
}

/// Both addresses in one family: a header has one for both.
fn same_family((source, destination): (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
    if source.is_ipv4() == destination.is_ipv4() {
        return (source, destination);
    }
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    (mapped(source), mapped(destination))
}

const SIGNATURE_V1: &[u8] = b"PROXY ";
const SIGNATURE_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
const FIXED_V2: usize = 16;
/// Longest line of version 1, its CR LF included.
const MAX_LINE: usize = 107;
const TYPE_CRC32C: u8 = 0x03;
const TYPE_NOOP: u8 = 0x04;

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(source: &str, destination: &str) -> Option<(SocketAddr, SocketAddr)> {
        let parse = |text: &str| text.parse().expect("a socket address");
        Some((parse(source), parse(destination)))
    }

    fn header(bytes: &[u8]) -> (Header, usize) {
        match parse(bytes) {
            Ok(Parsed::Header(header, length)) => (header, length),
            other => panic!("{other:?}"),
        }
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u16).to_be_bytes();
        [SIGNATURE_V2, &[command, family], &length, body].concat()
    }

    #[test]
    fn lines_of_version_1_are_read() {
        let line = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\nGET /";
        let (found, length) = header(line);
        assert_eq!(
            found.addresses,
            addresses("192.0.2.1:56324", "198.51.100.2:443")
        );
        assert_eq!(&line[length..], b"GET /");
        let (found, _) = header(b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n");
        assert_eq!(
            found.addresses,
            addresses("[2001:db8::1]:1", "[2001:db8::2]:2")
        );
        for line in ["PROXY UNKNOWN\r\n", "PROXY UNKNOWN ffff::1 x y z\r\n"] {
            let (found, length) = header(line.as_bytes());
            assert_eq!((found.addresses, length), (None, line.len()));
        }
    }

    #[test]
    fn wrong_lines_of_version_1_are_refused() {
        for (line, reason) in [
            ("PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\n", "CR LF"),
            ("PROXY TCP4 192.0.2.1 198.51.100.2 56324\r\n", "few"),
            ("PROXY TCP4 192.0.2.1 198.51.100.2 1 2 3\r\n", "many"),
            ("PROXY TCP4 192.0.2.1  198.51.100.2 1 2\r\n", "number"),
            ("PROXY TCP4 ::1 ::2 1 2\r\n", "family"),
            ("PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", "family"),
            ("PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", "none of"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", "65535"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 -1 2\r\n", "number"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", "number"),
            ("PROXY TCP4 0.0.0.0 192.0.2.2 1 2\r\n", "unicast"),
            ("PROXY TCP4 224.0.0.1 192.0.2.2 1 2\r\n", "unicast"),
        ] {
            let error = parse(line.as_bytes()).expect_err(line);
            assert!(error.reason.contains(reason), "{line}: {error}");
        }
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        assert!(parse(long.as_bytes()).is_err());
    }

    #[test]
    fn headers_of_version_2_are_read() {
        let body = [
            192, 0, 2, 1, 198, 51, 100, 2, 0, 80, 1, 187, 0xea, 0, 3, b'v', b'p', b'c', 4, 0, 2, 0,
            0,
        ];
        let mut bytes = v2(0x21, 0x11, &body);
        let length = bytes.len();
        bytes.extend_from_slice(b"rest");
        let (found, taken) = header(&bytes);
        assert_eq!(taken, length);
        assert_eq!(
            found.addresses,
            addresses("192.0.2.1:80", "198.51.100.2:443")
        );
        let vpc = Tlv {
            kind: 0xea,
            value: Bytes::from_static(b"vpc"),
        };
        assert_eq!(found.tlvs, [vpc], "padding is no TLV");
        assert_eq!(header(&v2(0x20, 0, b"")).0.addresses, None);
        assert_eq!(header(&v2(0x20, 0x11, b"short")).0.addresses, None);
        assert_eq!(header(&v2(0x21, 0x31, &[0; 216])).0.addresses, None);
        assert_eq!(header(&v2(0x21, 0, &[])).0.addresses, None);
    }

    #[test]
    fn wrong_headers_of_version_2_are_refused() {
        let ip = [192, 0, 2, 1, 198, 51, 100, 2, 0, 80, 1, 187];
        let with = |more: &[u8]| v2(0x21, 0x11, &[&ip, more].concat());
        for bytes in [
            v2(0x11, 0x11, &ip),
            v2(0x22, 0x11, &ip),
            v2(0x21, 0x41, &ip),
            v2(0x21, 0x13, &ip),
            v2(0x21, 0x11, &ip[..11]),
            v2(0x21, 0x21, &ip),
            with(&[1]),
            with(&[1, 0]),
            with(&[1, 0, 2, 0]),
            with(&[TYPE_CRC32C, 0, 4, 1, 2, 3, 4]),
        ] {
            parse(&bytes).expect_err(&format!("{bytes:?}"));
        }
    }

    #[test]
    fn a_right_checksum_is_taken() {
        let ip = [192, 0, 2, 1, 198, 51, 100, 2, 0, 80, 1, 187];
        let mut bytes = v2(
            0x21,
            0x11,
            &[&ip[..], &[TYPE_CRC32C, 0, 4, 0, 0, 0, 0]].concat(),
        );
        let at = bytes.len() - 4;
        let sum = crc32c(&bytes, at);
        bytes[at..].copy_from_slice(&sum);
        assert!(header(&bytes).0.tlvs.is_empty());
        // The check value of CRC-32C that everybody gives.
        assert_eq!(crc32c(b"123456789", 100), 0xe306_9283_u32.to_be_bytes());
    }

    #[test]
    fn what_is_cut_off_waits_and_what_is_something_else_is_told_at_once() {
        let line = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n".to_vec();
        let ip = [192, 0, 2, 1, 198, 51, 100, 2, 0, 80, 1, 187];
        for whole in [line, v2(0x21, 0x11, &ip)] {
            for end in 0..whole.len() {
                assert_eq!(parse(&whole[..end]), Ok(Parsed::More), "{end}");
            }
        }
        for other in [
            &b"GET / HTTP/1.1"[..],
            b"PRI * HTTP",
            b"\r\nx",
            b"\x16\x03\x01",
            b"PROXYX",
        ] {
            assert_eq!(parse(other), Ok(Parsed::Absent));
        }
    }

    proptest::proptest! {
        /// Bytes that begin like a header of version 2, with any rest.
        #[test]
        fn no_bytes_are_read_as_more_than_they_say(
            command in 0x1f..0x23u8,
            family in 0..0x33u8,
            length in 0..300u16,
            body in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
        ) {
            let bytes = [SIGNATURE_V2, &[command, family], &length.to_be_bytes(), &body].concat();
            if let Ok(Parsed::Header(header, taken)) = parse(&bytes) {
                assert_eq!(taken, FIXED_V2 + usize::from(length));
                let mut out = BytesMut::new();
                header.write_to(&mut out);
                let (again, _) = self::header(&out);
                assert_eq!((again.addresses, again.tlvs), (header.addresses, header.tlvs));
            }
        }

        #[test]
        fn lines_are_safe(line in "PROXY (TCP4|TCP6|UNKNOWN)[ 0-9a-f.:]{0,100}\r?\n?") {
            if let Ok(Parsed::Header(_, taken)) = parse(line.as_bytes()) {
                assert!(line.as_bytes()[..taken].ends_with(b"\r\n"));
            }
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let tlvs = vec![Tlv {
            kind: 2,
            value: Bytes::from_static(b"example.com"),
        }];
        for addresses in [
            addresses("192.0.2.1:1", "198.51.100.2:2"),
            addresses("[2001:db8::1]:1", "[2001:db8::2]:2"),
            None,
        ] {
            for version in [Version::V1, Version::V2] {
                let with_tlvs = version == Version::V2;
                let tlvs = if with_tlvs { tlvs.clone() } else { Vec::new() };
                let written = Header {
                    version,
                    addresses,
                    tlvs,
                };
                let mut out = BytesMut::new();
                written.write_to(&mut out);
                assert_eq!(header(&out), (written, out.len()));
            }
        }
        let mixed = Header {
            version: Version::V1,
            addresses: addresses("192.0.2.1:1", "[2001:db8::2]:2"),
            tlvs: Vec::new(),
        };
        let mut out = BytesMut::new();
        mixed.write_to(&mut out);
        assert_eq!(&out[..], b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n");
    }
}
