//! The wire format itself, below any type: tags, numbers, lengths.

use bytes::Bytes;

/// The values of the repeated message at a path of field numbers, in order, as parts of the whole: nothing is copied.
/// `None` where the bytes are no message.
pub fn parts(encoded: &Bytes, path: &[u32]) -> Option<Vec<Bytes>> {
    let mut found = vec![encoded.clone()];
    for number in path {
        let mut inner = Vec::new();
        for message in &found {
            for field in Fields::new(message) {
                if let (n, WireValue::Bytes(value)) = field.ok()?
                    && n == *number
                {
                    inner.push(message.slice_ref(value));
                }
            }
        }
        found = inner;
    }
    Some(found)
}

/// How a value lies on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WireValue<'a> {
    /// Type 0.
    Varint(u64),
    /// Type 1.
    Fixed64(u64),
    /// Type 2.
    Bytes(&'a [u8]),
    /// Type 5.
    Fixed32(u32),
}

impl WireValue<'_> {
    /// What proto3 does not write: zero, or nothing.
    pub(crate) fn is_default(self) -> bool {
        match self {
            Self::Varint(v) | Self::Fixed64(v) => v == 0,
            Self::Fixed32(v) => v == 0,
            Self::Bytes(bytes) => bytes.is_empty(),
        }
    }
}

/// The fields of an encoded message in their order; ends after the first error, which it yields.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a>(&'a [u8]);

/// The bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

impl<'a> Fields<'a> {
    pub(crate) fn new(encoded: &'a [u8]) -> Self {
        Self(encoded)
    }

    fn next_field(&mut self) -> Result<(u32, WireValue<'a>), Malformed> {
        let tag = read_varint(&mut self.0)
            .and_then(|tag| u32::try_from(tag).ok())
            .ok_or(Malformed)?;
        let number = tag >> 3;
        if number == 0 {
            return Err(Malformed);
        }
        let value = match tag & 7 {
            0 => WireValue::Varint(read_varint(&mut self.0).ok_or(Malformed)?),
            1 => WireValue::Fixed64(u64::from_le_bytes(take(&mut self.0).ok_or(Malformed)?)),
            2 => {
                let len = read_varint(&mut self.0).ok_or(Malformed)?;
                let len = usize::try_from(len).map_err(|_| Malformed)?;
                let (bytes, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
                self.0 = rest;
                WireValue::Bytes(bytes)
            }
            5 => WireValue::Fixed32(u32::from_le_bytes(take(&mut self.0).ok_or(Malformed)?)),
            // Groups (3, 4): no message of this crate has one.
            _ => return Err(Malformed),
        };
        Ok((number, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, WireValue<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let next = self.next_field();
        if next.is_err() {
            self.0 = &[];
        }
        Some(next)
    }
}

/// Takes a number off the front.
pub(crate) fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(first & 0x7f);
        if shift == 63 && part > 1 {
            return None;
        }
        value |= part << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Takes `N` bytes off the front.
pub(crate) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

pub(crate) fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The tag of a field with wire type 0, 1, 2 or 5.
pub(crate) fn write_tag(out: &mut Vec<u8>, number: u32, wire_type: u32) {
    write_varint(out, u64::from(number << 3 | wire_type));
}

pub(crate) fn write_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    write_tag(out, number, 2);
    write_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Begins a value of a length that is not known yet; [`close`] takes the result.
pub(crate) fn open(out: &mut Vec<u8>, number: u32) -> usize {
    write_tag(out, number, 2);
    out.push(0);
    out.len()
}

/// Ends what [`open`] began. Most values are shorter than 128 bytes, for which there is room already.
pub(crate) fn close(out: &mut Vec<u8>, begin: usize) {
    let len = out.len() - begin;
    if len < 0x80 {
        out[begin - 1] = len as u8;
        return;
    }
    let mut prefix = Vec::with_capacity(5);
    write_varint(&mut prefix, len as u64);
    out.splice(begin - 1..begin, prefix);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut out = Vec::new();
        write_tag(&mut out, 1, 0);
        write_varint(&mut out, u64::MAX);
        for len in [5, 300] {
            let begin = open(&mut out, 2);
            out.resize(begin + len, 7);
            close(&mut out, begin);
        }
        let fields: Vec<_> = Fields::new(&out).collect();
        assert_eq!(
            fields,
            [
                Ok((1, WireValue::Varint(u64::MAX))),
                Ok((2, WireValue::Bytes(&[7; 5]))),
                Ok((2, WireValue::Bytes(&[7; 300]))),
            ]
        );
    }

    #[test]
    fn parts_are_slices_of_the_whole() {
        let mut out = Vec::new();
        for text in ["a", "bc"] {
            // A message in two pieces, with an element in each.
            let begin = open(&mut out, 2);
            write_bytes(&mut out, 3, text.as_bytes());
            close(&mut out, begin);
        }
        let whole = Bytes::from(out);
        let parts = parts(&whole, &[2, 3]).unwrap();
        assert_eq!(parts, ["a", "bc"]);
        assert!(whole.as_ptr_range().contains(&parts[1].as_ptr()));
        assert_eq!(super::parts(&whole, &[2, 9]), Some(Vec::new()));
        assert_eq!(super::parts(&Bytes::from_static(&[1]), &[2]), None);
    }

    #[test]
    fn what_is_no_message_ends_in_an_error() {
        for bytes in [
            &[0x08][..],                                             // no value
            &[0x00, 0x01],                                           // number 0
            &[0x0b, 0x0c],                                           // a group
            &[0x12, 0x05, 0x01],                                     // shorter than it says
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], // more than 64 bits
            &[0x0d, 1, 2],                                           // half a number
        ] {
            assert_eq!(Fields::new(bytes).last(), Some(Err(Malformed)), "{bytes:?}");
        }
    }
}
