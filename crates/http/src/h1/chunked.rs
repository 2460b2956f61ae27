//! The chunked coding, sans-io (RFC 9112, 7.1).

use bytes::{Buf, Bytes, BytesMut};
use memchr::memchr;

use super::parse::parse_trailers;
use crate::{Headers, Limits, Refusal};

/// What the decoder found.
#[derive(Debug)]
pub enum ChunkStep {
    /// A part of a chunk's data.
    Data(Bytes),
    /// More bytes are needed.
    Partial,
    /// The body is over; the trailers, if there were any.
    End(Option<Headers>),
}

/// Decodes one body. Bytes behind the body stay in the buffer.
#[derive(Debug)]
pub struct ChunkDecoder {
    state: State,
    /// Bytes of chunk lines that their data did not excuse.
    overhead: usize,
}

#[derive(Debug)]
enum State {
    Size,
    Data(u64),
    DataEnd,
    Trailers { scanned: usize },
    Done,
    Refused(Refusal),
}

impl ChunkDecoder {
    /// Ready for the first chunk.
    pub fn new() -> ChunkDecoder {
        ChunkDecoder {
            state: State::Size,
            overhead: 0,
        }
    }

    /// Whether the last chunk and the trailers were seen.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Takes what it can from the front of `buffer`. What is refused stays refused: whoever asks again must not hear of
    /// an end that the bytes behind the mistake may look like.
    ///
    /// # Errors
    /// A [`Refusal`] for every line that is not `1*HEXDIG [extensions] CRLF`, data without CRLF
    /// behind it, bad trailers, or too many bytes of chunk lines.
    pub fn decode(&mut self, buffer: &mut BytesMut, limits: &Limits) -> Result<ChunkStep, Refusal> {
        self.step(buffer, limits)
            .inspect_err(|refusal| self.state = State::Refused(*refusal))
    }

    fn step(&mut self, buffer: &mut BytesMut, limits: &Limits) -> Result<ChunkStep, Refusal> {
        loop {
            match self.state {
                State::Size => {
                    let Some(line) = line(buffer, MAX_LINE)? else {
                        return Ok(ChunkStep::Partial);
                    };
                    let size = chunk_size(&buffer[..line])?;
                    buffer.advance(line + 2);
                    // Sixteen bytes a chunk and twice its data are free, the rest adds up:
                    // extensions of tiny chunks are how a small body becomes endless work.
                    let excused = usize::try_from(size)
                        .unwrap_or(usize::MAX)
                        .saturating_mul(2)
                        .saturating_add(16);
                    self.overhead = (self.overhead + line + 2).saturating_sub(excused);
                    if self.overhead > limits.chunk_overhead {
                        return Err(Refusal {
                            status: 413,
                            detail: "http1.chunk_overhead",
                        });
                    }
                    self.state = match size {
                        0 => State::Trailers { scanned: 0 },
                        size => State::Data(size),
                    };
                }
                State::Data(_) if buffer.is_empty() => return Ok(ChunkStep::Partial),
                State::Data(left) => {
                    let take = left.min(buffer.len() as u64);
                    self.state = match left - take {
                        0 => State::DataEnd,
                        left => State::Data(left),
                    };
                    return Ok(ChunkStep::Data(buffer.split_to(take as usize).freeze()));
                }
                State::DataEnd => match buffer.get(..2) {
                    Some(b"\r\n") => {
                        buffer.advance(2);
                        self.state = State::Size;
                    }
                    None if buffer.first().is_none_or(|&byte| byte == b'\r') => {
                        return Ok(ChunkStep::Partial);
                    }
                    _ => return Err(Refusal::CODEC),
                },
                State::Trailers { scanned } => return self.trailers(buffer, scanned, limits),
                State::Done => return Ok(ChunkStep::End(None)),
                State::Refused(refusal) => return Err(refusal),
            }
        }
    }

    fn trailers(
        &mut self,
        buffer: &mut BytesMut,
        mut start: usize,
        limits: &Limits,
    ) -> Result<ChunkStep, Refusal> {
        while let Some(length) = line(&buffer[start..], limits.head_bytes)? {
            if length == 0 {
                let section = buffer.split_to(start + 2);
                self.state = State::Done;
                if start == 0 {
                    return Ok(ChunkStep::End(None));
                }
                let trailers = parse_trailers(&section, limits)?;
                return Ok(ChunkStep::End((!trailers.is_empty()).then_some(trailers)));
            }
            start += length + 2;
            if start > limits.head_bytes {
                return Err(Refusal::TOO_LARGE);
            }
        }
        self.state = State::Trailers { scanned: start };
        Ok(ChunkStep::Partial)
    }
}

impl Default for ChunkDecoder {
    fn default() -> Self {
        ChunkDecoder::new()
    }
}

/// The length of the first line without its CRLF; `None` while it is incomplete.
fn line(bytes: &[u8], limit: usize) -> Result<Option<usize>, Refusal> {
    let end = memchr(b'\r', bytes);
    let text = &bytes[..end.unwrap_or(bytes.len())];
    if memchr(b'\n', text).is_some() {
        return Err(Refusal::CODEC);
    }
    if text.len() > limit {
        return Err(Refusal {
            status: 413,
            detail: "http1.chunk_overhead",
        });
    }
    match end.and_then(|end| bytes.get(end + 1)) {
        None => Ok(None),
        Some(b'\n') => Ok(Some(text.len())),
        Some(_) => Err(Refusal::CODEC),
    }
}

/// `1*16HEXDIG [ BWS ";" extension ]`.
fn chunk_size(line: &[u8]) -> Result<u64, Refusal> {
    let digits = line
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    if digits == 0 || digits > 16 {
        return Err(Refusal::CODEC);
    }
    let rest = &line[digits..];
    let extension = rest.trim_ascii_start();
    let known = rest.is_empty() || extension.first() == Some(&b';');
    if !known
        || extension
            .iter()
            .any(|&byte| byte < b' ' && byte != b'\t' || byte == 0x7f)
    {
        return Err(Refusal::CODEC);
    }
    let size = line[..digits].iter().fold(0u64, |size, &digit| {
        size << 4 | u64::from((digit as char).to_digit(16).unwrap_or(0))
    });
    // A size near the end of the range is an attack on somebody's arithmetic.
    if size > i64::MAX as u64 {
        Err(Refusal::CODEC)
    } else {
        Ok(size)
    }
}

const MAX_LINE: usize = 4 * 1024;
