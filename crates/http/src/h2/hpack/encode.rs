//! Fields → a header block.
//!
//! What repeats is put into the table; what differs from message to message would only drive out
//! what repeats. So a field is put in when it is written for the second time, which needs no list
//! of names: a request's identifier never gets there, the name of a service does at once.

use super::{Class, DEFAULT_TABLE, OVERHEAD, fixed, huffman, table::Table};

/// The writing side of a connection.
#[derive(Debug)]
pub(in crate::h2) struct Encoder {
    table: Table,
    /// The smallest and the last size chosen since the last block.
    resize: Option<(usize, usize)>,
    /// Where a field of some hash was put; looked at, not trusted.
    fields: Box<[Slot; BUCKETS]>,
    /// The same for names.
    names: Box<[Slot; BUCKETS]>,
    /// Hashes of fields that were written once.
    seen: Box<[u32; BUCKETS]>,
    huffman: bool,
}

/// The number of an entry and one, so that zero is none.
type Slot = u32;

/// Entries of a table of 4,096 bytes are at most 128.
const BUCKETS: usize = 256;

impl Encoder {
    /// `huffman`: strings are coded where that makes them shorter.
    pub(in crate::h2) fn new(huffman: bool) -> Encoder {
        Encoder {
            huffman,
            table: Table::new(DEFAULT_TABLE),
            resize: None,
            fields: Box::new([0; BUCKETS]),
            names: Box::new([0; BUCKETS]),
            seen: Box::new([0; BUCKETS]),
        }
    }

    /// The peer takes a table of this size; we use no more than both sides begin with.
    pub(in crate::h2) fn set_limit(&mut self, size: usize) {
        let size = size.min(DEFAULT_TABLE);
        let (smallest, last) = self
            .resize
            .unwrap_or((self.table.limit(), self.table.limit()));
        if size != last {
            self.resize = Some((smallest.min(size), size));
        }
    }

    /// Begins a block.
    pub(in crate::h2) fn begin(&mut self, out: &mut Vec<u8>) {
        let Some((smallest, last)) = self.resize.take() else {
            return;
        };
        // Both are said where the size went down and up again (RFC 7541, 4.2).
        if smallest < last {
            self.table.set_limit(smallest);
            number(out, smallest, 5, 0x20);
        }
        self.table.set_limit(last);
        number(out, last, 5, 0x20);
    }

    /// Writes a field whose name and value are what HTTP/2 takes.
    pub(in crate::h2) fn field(&mut self, name: &[u8], value: &[u8], out: &mut Vec<u8>) {
        self.field_of(name, value, false, out);
    }

    /// The same for a field that may have been forbidden to every table on the way.
    pub(in crate::h2) fn field_of(
        &mut self,
        name: &[u8],
        value: &[u8],
        secret: bool,
        out: &mut Vec<u8>,
    ) {
        let name_hash = hash(0, name);
        let hash = hash(name_hash, value);
        let bucket = hash as usize % BUCKETS;
        // What repeats is mostly found here; names that begin with a colon mostly in the table that both sides know.
        let own = |encoder: &Self| {
            encoder.find(encoder.fields[bucket], |row_hash, row_name, row_value| {
                row_hash == hash && row_name == name && row_value == value
            })
        };
        let pseudo = name.first() == Some(&b':');
        if !pseudo
            && !secret
            && let Some(at) = own(self)
        {
            return number(out, at, 7, 0x80);
        }
        let known = match fixed::find(name, value) {
            Some(fixed::Found::Field(index)) if secret => Some(usize::from(index)),
            Some(fixed::Found::Field(index)) => return number(out, index.into(), 7, 0x80),
            Some(fixed::Found::Name(index)) => Some(usize::from(index)),
            None => None,
        };
        if secret || is_secret(name, value) {
            // Never put into a table by anybody on the way (RFC 7541, 7.1.3).
            return literal(out, known, name, value, (4, 0x10), self.huffman);
        }
        if pseudo && let Some(at) = own(self) {
            return number(out, at, 7, 0x80);
        }
        let name_bucket = name_hash as usize % BUCKETS;
        let known =
            known.or_else(|| self.find(self.names[name_bucket], |_, row_name, _| row_name == name));
        let again = std::mem::replace(&mut self.seen[bucket], hash) == hash;
        let fits = (name.len() + value.len() + OVERHEAD) * 2 <= self.table.limit();
        if !again || !fits {
            return literal(out, known, name, value, (4, 0), self.huffman);
        }
        literal(out, known, name, value, (6, 0x40), self.huffman);
        if let Some(number) = self.table.insert(name, value, Class::Field, hash) {
            self.fields[bucket] = number.wrapping_add(1);
            self.names[name_bucket] = number.wrapping_add(1);
        }
    }

    /// The index of the entry in a slot, if it is still there and is the one that was looked for.
    fn find(&self, slot: Slot, is: impl Fn(u32, &[u8], &[u8]) -> bool) -> Option<usize> {
        let number = slot.checked_sub(1)?;
        let (row, index) = self.table.numbered(number)?;
        is(row.hash, row.name, row.value).then_some(fixed::COUNT + 1 + index)
    }
}

/// What nobody should be able to guess by looking at the sizes of what is sent.
fn is_secret(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"authorization" | b"proxy-authorization" => true,
        // A long cookie cannot be guessed piece by piece, since it is found as a whole or not.
        b"cookie" | b"set-cookie" => value.len() < 20,
        _ => false,
    }
}

fn literal(
    out: &mut Vec<u8>,
    known: Option<usize>,
    name: &[u8],
    value: &[u8],
    (bits, first): (u32, u8),
    huffman: bool,
) {
    number(out, known.unwrap_or(0), bits, first);
    if known.is_none() {
        text(out, name, huffman);
    }
    text(out, value, huffman);
}

/// An integer with a prefix of so many bits (RFC 7541, 5.1).
fn number(out: &mut Vec<u8>, value: usize, bits: u32, first: u8) {
    let mask = (1usize << bits) - 1;
    if value < mask {
        out.push(first | value as u8);
        return;
    }
    out.push(first | mask as u8);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// A string, as Huffman code where that may be and is shorter (RFC 7541, 5.2).
fn text(out: &mut Vec<u8>, text: &[u8], huffman: bool) {
    let coded = match huffman {
        true => huffman::encoded_len(text),
        false => text.len(),
    };
    if coded < text.len() {
        number(out, coded, 7, 0x80);
        huffman::encode(text, out);
    } else {
        number(out, text.len(), 7, 0);
        out.extend_from_slice(text);
    }
}

/// A hash that is good enough to spread names and values over buckets; what is found is compared.
fn hash(seed: u32, text: &[u8]) -> u32 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = u64::from(seed) ^ (text.len() as u64).wrapping_mul(FACTOR);
    let (words, rest) = text.as_chunks::<8>();
    for word in words {
        hash = (hash.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR);
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    hash = (hash.rotate_left(23) ^ u64::from_le_bytes(last)).wrapping_mul(FACTOR);
    (hash >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::{super::Decoder, *};

    fn block(encoder: &mut Encoder, fields: &[(&str, &str)]) -> Vec<u8> {
        let mut out = Vec::new();
        encoder.begin(&mut out);
        for (name, value) in fields {
            encoder.field(name.as_bytes(), value.as_bytes(), &mut out);
        }
        out
    }

    fn read(decoder: &mut Decoder, block: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        decoder
            .decode(block, (usize::MAX, usize::MAX), |field| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                fields.push((text(field.name), text(field.value)));
            })
            .unwrap();
        fields
    }

    #[test]
    fn what_repeats_becomes_a_byte_and_what_differs_never_enters_the_table() {
        let (mut encoder, mut decoder) = (Encoder::new(true), Decoder::new());
        for n in 0..300 {
            let id = format!("{:032x}", n * 7919);
            let fields = [
                (":method", "POST"),
                (":path", "/helloworld.Greeter/SayHello"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                ("x-request-id", &*id),
            ];
            let block = block(&mut encoder, &fields);
            let read = read(&mut decoder, &block);
            let same = read
                .iter()
                .zip(fields)
                .all(|((name, value), field)| (&**name, &**value) == field);
            assert!(same && read.len() == fields.len(), "{read:?}");
            if n > 1 {
                assert!(block.len() < 4 + 40, "{}", block.len());
            }
        }
    }

    #[test]
    fn secrets_are_marked_and_stay_out_of_the_table() {
        let mut encoder = Encoder::new(true);
        for _ in 0..3 {
            let block = block(&mut encoder, &[("authorization", "Z"), ("cookie", "Z")]);
            assert_eq!(block, [0x1f, 8, 1, b'Z', 0x1f, 17, 1, b'Z']);
        }
    }

    #[test]
    fn a_smaller_table_is_said_and_kept() {
        let (mut encoder, mut decoder) = (Encoder::new(true), Decoder::new());
        let fields = [("x-a", "some value"), ("x-b", "some other")];
        for _ in 0..3 {
            let block = block(&mut encoder, &fields);
            read(&mut decoder, &block);
        }
        encoder.set_limit(0);
        encoder.set_limit(100);
        let changed = block(&mut encoder, &fields);
        assert_eq!(changed[..3], [0x20, 0x3f, 100 - 31]);
        assert_eq!(read(&mut decoder, &changed).len(), 2);
        for _ in 0..4 {
            let block = block(&mut encoder, &fields);
            assert_eq!(read(&mut decoder, &block).len(), 2);
        }
    }

    #[test]
    fn any_mix_of_fields_comes_back() {
        let (mut encoder, mut decoder) = (Encoder::new(true), Decoder::new());
        let mut random = 1u64;
        for round in 0..2000 {
            let mut fields = Vec::new();
            for _ in 0..8 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                let name = format!("x-{}", random >> 61);
                let value = "v".repeat((random >> 40) as usize % 40) + &(random >> 59).to_string();
                fields.push((name, value));
            }
            if round % 97 == 0 {
                let size = (random >> 33) as usize % 5000;
                encoder.set_limit(size);
            }
            let borrowed: Vec<_> = fields.iter().map(|(n, v)| (&**n, &**v)).collect();
            let block = block(&mut encoder, &borrowed);
            assert_eq!(read(&mut decoder, &block), fields);
        }
    }
}
