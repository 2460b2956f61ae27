//! A header block → its fields.

use super::{Class, OVERHEAD, fixed, huffman, table::Table};

/// A field of a block.
#[derive(Debug, Clone, Copy)]
pub(in crate::h2) struct Field<'a> {
    pub(in crate::h2) class: Class,
    pub(in crate::h2) name: &'a [u8],
    pub(in crate::h2) value: &'a [u8],
    /// Whoever said it forbids every table on the way (RFC 7541, 6.2.3).
    pub(in crate::h2) secret: bool,
}

/// A block that cannot be read; from here on the two tables are not the same, and the connection
/// cannot go on (COMPRESSION_ERROR).
#[derive(Debug, PartialEq, Eq)]
pub(in crate::h2) struct Broken;

/// The reading side of a connection.
#[derive(Debug)]
pub(in crate::h2) struct Decoder {
    table: Table,
    /// The largest size that we let the peer choose.
    allowed: usize,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Decoder {
    pub(in crate::h2) fn new() -> Decoder {
        Decoder {
            table: Table::new(super::DEFAULT_TABLE),
            allowed: super::DEFAULT_TABLE,
            name: Vec::new(),
            value: Vec::new(),
        }
    }

    /// How large a table the peer may choose.
    pub(in crate::h2) fn allow(&mut self, size: usize) {
        self.allowed = size;
    }

    /// Reads a whole block and hands on its fields as long as their sizes add up to `limit` at
    /// most and no field is longer than `longest`. Gives whether that was so; the table is kept
    /// right in any case.
    ///
    /// # Errors
    /// [`Broken`].
    pub(in crate::h2) fn decode(
        &mut self,
        mut block: &[u8],
        (limit, longest): (usize, usize),
        mut field: impl FnMut(Field<'_>),
    ) -> Result<bool, Broken> {
        let mut size = 0usize;
        let mut begun = false;
        while let Some(&first) = block.first() {
            let found = match first {
                0x80.. => {
                    let index = number(&mut block, 7)?;
                    self.indexed(index)?
                }
                0x40.. => self.literal(&mut block, 6, true, false)?,
                0x20.. => {
                    // A change of the table's size stands at the beginning (RFC 7541, 4.2).
                    let size = number(&mut block, 5)?;
                    if begun || size > self.allowed {
                        return Err(Broken);
                    }
                    self.table.set_limit(size);
                    continue;
                }
                _ => self.literal(&mut block, 4, false, first & 0x10 != 0)?,
            };
            begun = true;
            let length = found.name.len() + found.value.len();
            size = match length > longest {
                true => usize::MAX,
                false => size.saturating_add(length + OVERHEAD),
            };
            if size <= limit {
                field(found);
            }
        }
        Ok(size <= limit)
    }

    fn indexed(&self, index: usize) -> Result<Field<'_>, Broken> {
        if let Some(entry) = fixed::get(index) {
            return Ok(Field {
                class: entry.class,
                name: entry.name.as_bytes(),
                value: entry.value.as_bytes(),
                secret: false,
            });
        }
        let index = index.checked_sub(fixed::COUNT + 1).ok_or(Broken)?;
        let row = self.table.get(index).ok_or(Broken)?;
        Ok(Field {
            class: row.class,
            name: row.name,
            value: row.value,
            secret: false,
        })
    }

    fn literal(
        &mut self,
        block: &mut &[u8],
        bits: u32,
        index: bool,
        secret: bool,
    ) -> Result<Field<'_>, Broken> {
        let name = number(block, bits)?;
        self.name.clear();
        self.value.clear();
        if name == 0 {
            text(block, &mut self.name)?;
        } else {
            let mut name_of = std::mem::take(&mut self.name);
            let known = self
                .indexed(name)
                .map(|known| name_of.extend_from_slice(known.name));
            self.name = name_of;
            known?;
        }
        text(block, &mut self.value)?;
        let class = Class::of(&self.name, &self.value);
        if index {
            self.table.insert(&self.name, &self.value, class, 0);
        }
        Ok(Field {
            class,
            name: &self.name,
            value: &self.value,
            secret,
        })
    }
}

/// An integer with a prefix of so many bits (RFC 7541, 5.1).
fn number(block: &mut &[u8], bits: u32) -> Result<usize, Broken> {
    let (&first, mut rest) = block.split_first().ok_or(Broken)?;
    let mask = (1usize << bits) - 1;
    let mut value = usize::from(first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (&byte, behind) = rest.split_first().ok_or(Broken)?;
            rest = behind;
            // Four bytes are 256 MiB: more than any table or string of ours.
            if shift > 21 {
                return Err(Broken);
            }
            value += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *block = rest;
    Ok(value)
}

/// A string (RFC 7541, 5.2).
fn text(block: &mut &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
    let coded = block.first().ok_or(Broken)? & 0x80 != 0;
    let length = number(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(Broken)?;
    *block = rest;
    if coded {
        huffman::decode(text, out).map_err(|_| Broken)
    } else {
        out.extend_from_slice(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
            .collect()
    }

    fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<String, Broken> {
        let mut lines = String::new();
        decoder.decode(block, (usize::MAX, usize::MAX), |field| {
            lines += std::str::from_utf8(field.name).unwrap();
            lines += "=";
            lines += std::str::from_utf8(field.value).unwrap();
            lines += "\n";
        })?;
        Ok(lines)
    }

    const REQUESTS: [&str; 3] = [
        ":method=GET\n:scheme=http\n:path=/\n:authority=www.example.com\n",
        ":method=GET\n:scheme=http\n:path=/\n:authority=www.example.com\ncache-control=no-cache\n",
        ":method=GET\n:scheme=https\n:path=/index.html\n:authority=www.example.com\n\
         custom-key=custom-value\n",
    ];

    #[test]
    fn the_requests_of_the_rfc() {
        // C.3 and C.4: without and with Huffman code.
        for blocks in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut decoder = Decoder::new();
            for (block, request) in blocks.iter().zip(REQUESTS) {
                assert_eq!(decode(&mut decoder, &hex(block)).unwrap(), request);
            }
        }
    }

    #[test]
    fn the_responses_of_the_rfc_with_a_table_of_256_bytes() {
        // C.6.
        let mut decoder = Decoder::new();
        decoder.table.set_limit(256);
        let first =
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6
                     2d1b ff6e 919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3";
        let date = "date=Mon, 21 Oct 2013 20:13:21 GMT\n";
        let location = "location=https://www.example.com\n";
        assert_eq!(
            decode(&mut decoder, &hex(first)).unwrap(),
            format!(":status=302\ncache-control=private\n{date}{location}")
        );
        assert_eq!(
            decode(&mut decoder, &hex("4883 640e ffc1 c0bf")).unwrap(),
            format!(":status=307\ncache-control=private\n{date}{location}")
        );
        let third =
            "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab
                     77ad 94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f
                     9587 3160 65c0 03ed 4ee5 b106 3d50 07";
        assert_eq!(
            decode(&mut decoder, &hex(third)).unwrap(),
            format!(
                ":status=200\ncache-control=private\ndate=Mon, 21 Oct 2013 20:13:22 GMT\n{location}\
                 content-encoding=gzip\n\
                 set-cookie=foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1\n"
            )
        );
    }

    #[test]
    fn what_cannot_be_read_breaks_the_connection() {
        for block in [
            // Index 0, and one behind the tables; a name behind them.
            &[0x80][..],
            &[0xbe],
            &[0x7f, 0x10, 1, b'x'],
            // A table larger than allowed, and a change behind a field.
            &[0x3f, 0xe2, 0x1f],
            &[0x82, 0x20],
            // Strings and numbers that do not end, and a number without bound.
            &[0x40, 5, b'a'],
            &[0x40, 1, b'a'],
            &[0xff],
            &[0xff, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01],
            // EOS.
            &[0x40, 0x84, 0xff, 0xff, 0xff, 0xff, 0],
        ] {
            let broken = decode(&mut Decoder::new(), block);
            assert_eq!(broken, Err(Broken), "{block:x?}");
        }
        assert_eq!(
            decode(&mut Decoder::new(), &[0x3f, 0xe1, 0x1f]),
            Ok(String::new())
        );
    }

    #[test]
    fn fields_beyond_the_limit_are_not_handed_on_and_leave_the_table_right() {
        let mut decoder = Decoder::new();
        let mut seen = 0;
        let block = [
            b"\x40\x01a\x02bb".as_slice(),
            &[0xbe; 100],
            b"\x40\x01c\x01d",
        ]
        .concat();
        assert_eq!(
            decoder.decode(&block, (70, usize::MAX), |_| seen += 1),
            Ok(false)
        );
        assert_eq!(seen, 2);
        assert_eq!(decode(&mut decoder, &[0xbe, 0xbf]).unwrap(), "c=d\na=bb\n");
    }
}
