//! Where a head ends, found without looking at a byte twice.

use memchr::memchr;

use crate::{Limits, Refusal};

/// The answer of [`HeadScanner::scan`].
#[derive(Debug, PartialEq, Eq)]
pub enum Scan {
    /// The head is `bytes[start..end]`; before it were empty lines that RFC 9112, 2.2 says to skip.
    Complete {
        /// The first byte of the start line.
        start: usize,
        /// One past the empty line.
        end: usize,
    },
    /// More bytes are needed.
    Partial,
}

/// Remembers how far a growing buffer was looked at.
#[derive(Debug, Default)]
pub struct HeadScanner {
    start: usize,
    line: usize,
    at: usize,
}

impl HeadScanner {
    /// Whether it has not looked at any byte.
    pub(super) fn is_new(&self) -> bool {
        self.at == 0
    }

    /// Looks at the bytes that are new since the last call with the same, grown, buffer.
    ///
    /// # Errors
    /// A line that does not end with CRLF, or a head larger than `limits.head_bytes`.
    pub fn scan(&mut self, bytes: &[u8], limits: &Limits) -> Result<Scan, Refusal> {
        while let Some(found) = memchr(b'\n', &bytes[self.at..]) {
            let end = self.at + found;
            if end == self.line || bytes[end - 1] != b'\r' {
                return Err(Refusal::CODEC);
            }
            let empty = end - self.line == 1;
            self.at = end + 1;
            if empty && self.line == self.start {
                // An empty line before the start line: a client's habit after a body.
                if self.start >= MAX_LEADING_LINES * 2 {
                    return Err(Refusal::CODEC);
                }
                self.start = self.at;
            } else if empty {
                let start = self.start;
                *self = HeadScanner::default();
                return Ok(Scan::Complete {
                    start,
                    end: end + 1,
                })
                .and_then(|scan| {
                    if end + 1 - start > limits.head_bytes {
                        return Err(Refusal::TOO_LARGE);
                    }
                    Ok(scan)
                });
            }
            self.line = self.at;
        }
        self.at = bytes.len();
        if bytes.len() - self.start > limits.head_bytes {
            return Err(Refusal::TOO_LARGE);
        }
        Ok(Scan::Partial)
    }
}

const MAX_LEADING_LINES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_end_whatever_the_pieces() {
        let head = b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nrest";
        let mut scanner = HeadScanner::default();
        for end in 0..head.len() - 4 {
            assert_eq!(
                scanner.scan(&head[..end], &Limits::default()),
                Ok(Scan::Partial),
                "{end}"
            );
        }
        assert_eq!(
            scanner.scan(head, &Limits::default()),
            Ok(Scan::Complete {
                start: 2,
                end: head.len() - 4
            })
        );
    }

    #[test]
    fn refuses_bare_line_feeds_and_large_heads() {
        let scan = |bytes: &[u8]| HeadScanner::default().scan(bytes, &Limits::default());
        assert_eq!(scan(b"GET / HTTP/1.1\nHost"), Err(Refusal::CODEC));
        assert_eq!(scan(b"\n"), Err(Refusal::CODEC));
        assert_eq!(scan(&[b'a'; 61_441]), Err(Refusal::TOO_LARGE));
        assert_eq!(scan(&b"\r\n".repeat(20)), Err(Refusal::CODEC));
    }
}
