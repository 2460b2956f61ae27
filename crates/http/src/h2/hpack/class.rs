//! What a field is to us, found out once for each entry of a table.

/// The fields that HTTP/2 itself, or the proxy's head, gives a meaning to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::h2) enum Class {
    /// Any other.
    Field,
    Method,
    Scheme,
    Authority,
    Path,
    Protocol,
    Status,
    Host,
    Cookie,
    ContentLength,
    /// `te: trailers`; any other value may not be.
    Te,
    Expect,
    /// What may be neither in a request nor in a response.
    Malformed,
}

impl Class {
    /// Of a field as it was received (RFC 9113, 8.2).
    pub(super) fn of(name: &[u8], value: &[u8]) -> Class {
        let class = match name {
            [b':', ..] => match name {
                b":method" => Class::Method,
                b":scheme" => Class::Scheme,
                b":authority" => Class::Authority,
                b":path" => Class::Path,
                b":protocol" => Class::Protocol,
                b":status" => Class::Status,
                _ => return Class::Malformed,
            },
            b"te" if value == b"trailers" => Class::Te,
            b"host" => Class::Host,
            b"cookie" => Class::Cookie,
            b"expect" => Class::Expect,
            b"content-length" => Class::ContentLength,
            b"te" | b"upgrade" | b"connection" | b"keep-alive" | b"proxy-connection"
            | b"transfer-encoding" | b"" => return Class::Malformed,
            _ if name.iter().all(|&byte| NAME[usize::from(byte)]) => Class::Field,
            _ => return Class::Malformed,
        };
        if is_value(value) {
            class
        } else {
            Class::Malformed
        }
    }

    /// Pseudo-fields stand before all others.
    pub(in crate::h2) fn is_pseudo(self) -> bool {
        matches!(
            self,
            Class::Method
                | Class::Scheme
                | Class::Authority
                | Class::Path
                | Class::Protocol
                | Class::Status
        )
    }
}

/// Whether a field's value holds no control character but tabs. All of it at once and without an
/// early end: many bytes are looked at together.
pub(in crate::h2) fn is_value(value: &[u8]) -> bool {
    !value.iter().fold(false, |any, &byte| {
        any | ((byte < b' ') & (byte != b'\t')) | (byte == 0x7f)
    })
}

/// Writes a name in small letters; `false` where it is no token.
pub(in crate::h2) fn lower(name: &[u8], out: &mut [u8]) -> bool {
    let mut valid = !name.is_empty();
    for (byte, out) in name.iter().zip(out) {
        *out = byte.to_ascii_lowercase();
        valid &= NAME[usize::from(*out)];
    }
    valid
}

/// The characters of a token (RFC 9110, 5.6.2) but capitals.
static NAME: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = matches!(
            byte as u8,
            b'a'..=b'z' | b'0'..=b'9' | b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.'
                | b'^' | b'_' | b'`' | b'|' | b'~'
        );
        byte += 1;
    }
    table
};
