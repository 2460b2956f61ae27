//! Address ranges as Go's netip.ParsePrefix reads them, with its messages.
//!
//! The messages are part of the contract: they are what a refused pod shows, and what users search for. The standard
//! library's parser says only that an address is invalid.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A range as the user wrote it (the kernel masks it, we do not).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// The address, host bits included.
    pub addr: IpAddr,
    /// The length of the prefix.
    pub bits: u8,
}

impl Cidr {
    /// Reads `text`; the error is Go's.
    pub fn parse(text: &str) -> Result<Cidr, String> {
        let fail = |why: String| format!("netip.ParsePrefix({text:?}): {why}");
        let (addr, bits) = text.rsplit_once('/').ok_or_else(|| fail("no '/'".into()))?;
        let zone = addr.contains('%');
        let ip = parse_addr(addr).map_err(fail)?;
        if zone {
            return Err(fail("IPv6 zones cannot be present in a prefix".into()));
        }
        let bad = || fail(format!("bad bits after slash: {bits:?}"));
        let digits = !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit());
        if !digits || bits.len() > 1 && bits.starts_with('0') {
            return Err(bad());
        }
        let max = if ip.is_ipv4() { 32 } else { 128 };
        match bits.parse::<u64>() {
            Ok(n) if n <= max => Ok(Cidr {
                addr: ip,
                bits: n as u8,
            }),
            Ok(_) => Err(fail("prefix length out of range".into())),
            Err(_) => Err(bad()),
        }
    }

    /// The single address `addr`.
    pub fn host(addr: IpAddr) -> Cidr {
        Cidr {
            addr,
            bits: if addr.is_ipv4() { 32 } else { 128 },
        }
    }

    /// The range with its host bits cleared, as the kernel keeps it.
    pub fn masked(&self) -> Cidr {
        let addr = match self.addr {
            IpAddr::V4(a) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(a) & mask))
            }
            IpAddr::V6(a) => {
                let mask = u128::MAX
                    .checked_shl(128 - u32::from(self.bits))
                    .unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(a) & mask))
            }
        };
        Cidr {
            addr,
            bits: self.bits,
        }
    }

    /// Whether `addr` lies in the range.
    pub fn contains(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.addr.is_ipv4()
            && Cidr {
                addr,
                bits: self.bits,
            }
            .masked()
                == self.masked()
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.addr, self.bits)
    }
}

fn addr_error(text: &str, why: &str, at: Option<&str>) -> String {
    let at = at.map(|a| format!(" (at {a:?})")).unwrap_or_default();
    format!("ParseAddr({text:?}): {why}{at}")
}

fn parse_addr(text: &str) -> Result<IpAddr, String> {
    match text.find(['.', ':', '%']).map(|i| text.as_bytes()[i]) {
        Some(b'.') => parse_v4(text, text).map(|f| IpAddr::V4(f.into())),
        Some(b':') => parse_v6(text).map(IpAddr::V6),
        Some(_) => Err(addr_error(text, "missing IPv6 address", None)),
        None => Err(addr_error(text, "unable to parse IP", None)),
    }
}

/// The four fields of `part`, which is `whole` or its tail.
fn parse_v4(whole: &str, part: &str) -> Result<[u8; 4], String> {
    let fail = |why, at| Err(addr_error(whole, why, at));
    let bytes = part.as_bytes();
    let (mut fields, mut pos, mut value, mut digits) = ([0u8; 4], 0, 0u32, 0);
    for (i, &b) in bytes.iter().enumerate() {
        match b {
            b'0'..=b'9' => {
                if digits == 1 && value == 0 {
                    return fail("IPv4 field has octet with leading zero", None);
                }
                value = value * 10 + u32::from(b - b'0');
                digits += 1;
                if value > 255 {
                    return fail("IPv4 field has value >255", None);
                }
            }
            b'.' => {
                if i == 0 || i == bytes.len() - 1 || bytes[i - 1] == b'.' {
                    let at = Some(&part[i..]);
                    return fail("IPv4 field must have at least one digit", at);
                }
                if pos == 3 {
                    return fail("IPv4 address too long", None);
                }
                fields[pos] = value as u8;
                (pos, value, digits) = (pos + 1, 0, 0);
            }
            _ => return fail("unexpected character", part.get(i..)),
        }
    }
    if pos < 3 {
        return fail("IPv4 address too short", None);
    }
    fields[3] = value as u8;
    Ok(fields)
}

fn parse_v6(whole: &str) -> Result<Ipv6Addr, String> {
    let fail = |why: &str, at: Option<&str>| Err(addr_error(whole, why, at));
    let mut s = whole;
    if let Some((addr, zone)) = whole.split_once('%') {
        if zone.is_empty() {
            return fail("zone must be a non-empty string", None);
        }
        s = addr;
    }
    let mut ip = [0u8; 16];
    let mut ellipsis = None;
    if let Some(rest) = s.strip_prefix("::") {
        ellipsis = Some(0);
        s = rest;
        if s.is_empty() {
            return Ok(ip.into());
        }
    }
    let mut i = 0;
    while i < 16 {
        let end = s.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(s.len());
        if end > 4 {
            return fail("each group must have 4 or less digits", Some(s));
        }
        if end == 0 {
            let why = "each colon-separated field must have at least one digit";
            return fail(why, Some(s));
        }
        if s[end..].starts_with('.') {
            if ellipsis.is_none() && i != 12 {
                let why = "embedded IPv4 address must replace the final 2 fields of the address";
                return fail(why, Some(s));
            }
            if i + 4 > 16 {
                let why = "too many hex fields to fit an embedded IPv4 at the end of the address";
                return fail(why, Some(s));
            }
            ip[i..i + 4].copy_from_slice(&parse_v4(whole, s)?);
            s = "";
            i += 4;
            break;
        }
        let group = u16::from_str_radix(&s[..end], 16).unwrap_or_default();
        ip[i..i + 2].copy_from_slice(&group.to_be_bytes());
        i += 2;
        s = &s[end..];
        if s.is_empty() {
            break;
        }
        match s.strip_prefix(':') {
            None => return fail("unexpected character, want colon", Some(s)),
            Some("") => return fail("colon must be followed by more characters", Some(s)),
            Some(rest) => s = rest,
        }
        if let Some(rest) = s.strip_prefix(':') {
            if ellipsis.is_some() {
                return fail("multiple :: in address", Some(s));
            }
            ellipsis = Some(i);
            s = rest;
            if s.is_empty() {
                break;
            }
        }
    }
    if !s.is_empty() {
        return fail("trailing garbage after address", Some(s));
    }
    match ellipsis {
        None if i < 16 => return fail("address string too short", None),
        Some(_) if i == 16 => {
            return fail("the :: must expand to at least one field of zeros", None);
        }
        Some(e) => {
            ip.copy_within(e..i, 16 - (i - e));
            ip[e..16 - (i - e)].fill(0);
        }
        None => {}
    }
    Ok(ip.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_written_and_masked_as_the_kernel_does() {
        for (text, masked) in [
            ("127.0.0.1/8", "127.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.9.0.5/32", "10.9.0.5/32"),
            ("2001:db8::5/32", "2001:db8::/32"),
            ("::/0", "::/0"),
            ("::ffff:1.2.3.4/128", "::ffff:1.2.3.4/128"),
            ("1:2:3:4:5:6:7:8/64", "1:2:3:4::/64"),
        ] {
            let cidr = Cidr::parse(text).unwrap();
            assert_eq!(cidr.to_string(), text);
            assert_eq!(cidr.masked().to_string(), masked);
        }
        let net = Cidr::parse("127.0.0.1/8").unwrap();
        assert!(net.contains("127.0.0.6".parse().unwrap()));
        assert!(!net.contains("128.0.0.6".parse().unwrap()));
    }

    #[test]
    fn mistakes_are_named_in_the_words_of_go() {
        for (text, error) in [
            ("10.0.0.0", r#"netip.ParsePrefix("10.0.0.0"): no '/'"#),
            (
                "10.0.0.300/8",
                r#"netip.ParsePrefix("10.0.0.300/8"): ParseAddr("10.0.0.300"): IPv4 field has value >255"#,
            ),
            (
                "10.0.0.0/33",
                r#"netip.ParsePrefix("10.0.0.0/33"): prefix length out of range"#,
            ),
            (
                "10.0.0.0/+8",
                r#"netip.ParsePrefix("10.0.0.0/+8"): bad bits after slash: "+8""#,
            ),
            (
                "x/8",
                r#"netip.ParsePrefix("x/8"): ParseAddr("x"): unable to parse IP"#,
            ),
            (
                "1..2.3/8",
                r#"netip.ParsePrefix("1..2.3/8"): ParseAddr("1..2.3"): IPv4 field must have at least one digit (at ".2.3")"#,
            ),
            (
                "1:2/8",
                r#"netip.ParsePrefix("1:2/8"): ParseAddr("1:2"): address string too short"#,
            ),
        ] {
            assert_eq!(Cidr::parse(text), Err(error.to_string()));
        }
    }
}
