//! The Huffman code of header strings (RFC 7541, 5.2 and appendix B).
//!
//! The code is canonical: codes of one length follow each other in the order of their symbols, and
//! the shorter ones come first. So the lengths say everything; the tables are made from them when
//! this is compiled.

/// A string that is no Huffman code: it holds EOS, or its padding is not the beginning of EOS.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Invalid;

/// How many bytes the text takes as Huffman code.
pub(super) fn encoded_len(text: &[u8]) -> usize {
    let bits: usize = text
        .iter()
        .map(|&byte| usize::from(LENGTHS[usize::from(byte)]))
        .sum();
    bits.div_ceil(8)
}

/// Adds the code of the text.
pub(super) fn encode(text: &[u8], out: &mut Vec<u8>) {
    // At most 7 bits wait when the next code, of at most 30 bits, comes.
    let (mut window, mut count) = (0u64, 0u32);
    for &byte in text {
        let length = u32::from(LENGTHS[usize::from(byte)]);
        window = window << length | u64::from(CODES[usize::from(byte)]);
        count += length;
        while count >= 8 {
            count -= 8;
            out.push((window >> count) as u8);
        }
    }
    if count > 0 {
        // The rest is filled with the first bits of EOS, which are ones.
        let fill = 8 - count;
        out.push((window << fill) as u8 | ((1u16 << fill) - 1) as u8);
    }
}

/// Adds the text of a code.
///
/// # Errors
/// [`Invalid`].
pub(super) fn decode(code: &[u8], out: &mut Vec<u8>) -> Result<(), Invalid> {
    out.reserve(code.len() * 8 / 5 + 1);
    // The next bits stand at the top; behind `count` of them are zeros.
    let (mut window, mut count, mut rest) = (0u64, 0u32, code);
    loop {
        while count <= 56
            && let Some((&byte, behind)) = rest.split_first()
        {
            window |= u64::from(byte) << (56 - count);
            count += 8;
            rest = behind;
        }
        if count < 8 && window == !(u64::MAX >> count) {
            // Less than a byte of ones, or nothing: the end.
            return Ok(());
        }
        let (symbol, length) = FAST[(window >> 56) as usize];
        let (symbol, length) = match length {
            0 => long(window)?,
            _ => (symbol, u32::from(length)),
        };
        if length > count {
            return Err(Invalid);
        }
        out.push(symbol);
        window <<= length;
        count -= length;
    }
}

/// The symbol of a code of more than eight bits at the top of the window.
#[cold]
fn long(window: u64) -> Result<(u8, u32), Invalid> {
    let bits = (window >> (64 - LONGEST)) as u32;
    for (length, group) in GROUPS.iter().enumerate().skip(9) {
        let offset = (bits >> (LONGEST - length)).wrapping_sub(group.first);
        if bits < group.end {
            let symbol = SYMBOLS[group.at as usize + offset as usize];
            return match u8::try_from(symbol) {
                Ok(symbol) => Ok((symbol, length as u32)),
                Err(_) => Err(Invalid),
            };
        }
    }
    Err(Invalid)
}

/// The codes of one length.
#[derive(Clone, Copy)]
struct Group {
    /// The first code.
    first: u32,
    /// One past the last code, filled up with zeros to the longest length.
    end: u32,
    /// Where its symbols begin.
    at: u16,
}

const LONGEST: usize = 30;
/// 256 bytes and EOS.
const COUNT: usize = 257;

const CODES: [u32; COUNT] = TABLES.0;
static GROUPS: [Group; LONGEST + 1] = TABLES.1;
static SYMBOLS: [u16; COUNT] = TABLES.2;
/// Symbol and length for what the next eight bits are; length 0 where they are not enough.
static FAST: [(u8, u8); 256] = fast();

const TABLES: ([u32; COUNT], [Group; LONGEST + 1], [u16; COUNT]) = {
    let mut codes = [0; COUNT];
    let mut groups = [Group {
        first: 0,
        end: 0,
        at: 0,
    }; LONGEST + 1];
    let mut symbols = [0; COUNT];
    let (mut code, mut at, mut length) = (0u32, 0, 1);
    while length <= LONGEST {
        code <<= 1;
        groups[length].first = code;
        groups[length].at = at as u16;
        let mut symbol = 0;
        while symbol < COUNT {
            if LENGTHS[symbol] as usize == length {
                codes[symbol] = code;
                symbols[at] = symbol as u16;
                code += 1;
                at += 1;
            }
            symbol += 1;
        }
        groups[length].end = code << (LONGEST - length);
        length += 1;
    }
    (codes, groups, symbols)
};

const fn fast() -> [(u8, u8); 256] {
    let mut table = [(0, 0); 256];
    let mut symbol = 0;
    while symbol < 256 {
        let length = LENGTHS[symbol];
        if length <= 8 {
            let free = 8 - length;
            let first = CODES[symbol] << free;
            let mut at = 0;
            while at < 1 << free {
                table[(first + at) as usize] = (symbol as u8, length);
                at += 1;
            }
        }
        symbol += 1;
    }
    table
}

/// The bits of each byte's code, and of EOS (RFC 7541, appendix B).
#[rustfmt::skip]
const LENGTHS: [u8; COUNT] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21,
    23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
            .collect()
    }

    #[test]
    fn the_examples_of_the_rfc() {
        for (text, code) in [
            ("www.example.com", "f1e3 c2e5 f23a 6ba0 ab90 f4ff"),
            ("no-cache", "a8eb 1064 9cbf"),
            ("custom-key", "25a8 49e9 5ba9 7d7f"),
            ("custom-value", "25a8 49e9 5bb8 e8b4 bf"),
            ("302", "6402"),
            ("private", "aec3 771a 4b"),
            ("Mon, 21 Oct 2013 20:13:21 GMT", "d07a be94 1054 d444 a820 0595 040b 8166 e082 a62d 1bff"),
            ("https://www.example.com", "9d29 ad17 1863 c78f 0b97 c8e9 ae82 ae43 d3"),
            ("307", "640e ff"),
            (
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
                "94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0
                 03ed 4ee5 b106 3d50 07",
            ),
        ] {
            let mut out = Vec::new();
            encode(text.as_bytes(), &mut out);
            assert_eq!(out, hex(code), "{text}");
            assert_eq!(encoded_len(text.as_bytes()), out.len(), "{text}");
            let mut back = Vec::new();
            assert_eq!(decode(&out, &mut back), Ok(()));
            assert_eq!(back, text.as_bytes());
        }
    }

    #[test]
    fn every_byte_comes_back_beside_every_other() {
        for first in 0..=255u8 {
            let text: Vec<u8> = (0..=255u8).flat_map(|second| [first, second]).collect();
            let (mut code, mut back) = (Vec::new(), Vec::new());
            encode(&text, &mut code);
            assert_eq!(decode(&code, &mut back), Ok(()));
            assert_eq!(back, text);
        }
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for code in [
            // A byte of padding; padding of zeros; EOS; EOS behind a letter.
            &[0xff][..],
            &[0x1f, 0xff],
            &[0x18],
            &[0x00],
            &[0xff, 0xff, 0xff, 0xff],
            &[0x1f, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(decode(code, &mut Vec::new()), Err(Invalid), "{code:x?}");
        }
        assert_eq!(decode(&[0x1f], &mut Vec::new()), Ok(()));
        assert_eq!(decode(&[], &mut Vec::new()), Ok(()));
    }
}
