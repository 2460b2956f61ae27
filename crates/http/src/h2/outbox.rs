//! What is to be written: frames of all streams, one behind the other, until the connection's turn
//! comes. Then all of it leaves in one system call.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use super::frame::{DATA, END_STREAM, HEAD, Head};
use crate::buffer;

/// Bytes that wait to be written.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Heads of frames, and payloads that are better copied.
    buffer: Vec<u8>,
    /// How much of `buffer` has left.
    sent: usize,
    /// Payloads that go before the byte of `buffer` with this number.
    large: VecDeque<(usize, Bytes)>,
    /// Bytes of `large`.
    large_size: usize,
    /// Changes whenever something was written.
    epoch: u64,
}

/// Where the head of a DATA frame lies, as long as nothing was written.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mark {
    epoch: u64,
    at: u32,
}

impl Outbox {
    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.buffer.len() - self.sent + self.large_size
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where frames are put.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        if self.buffer.capacity() == 0 {
            self.buffer = buffer::take_write();
        }
        &mut self.buffer
    }

    /// Puts a DATA frame in.
    pub(super) fn data(&mut self, stream: u32, data: Bytes, ended: bool) -> Mark {
        let head = Head {
            length: data.len(),
            kind: DATA,
            flags: if ended { END_STREAM } else { 0 },
            stream,
        };
        let buffer = self.buffer();
        let at = buffer.len() as u32;
        head.put(buffer);
        if data.len() <= COPIED {
            buffer.extend_from_slice(&data);
        } else {
            let at = buffer.len();
            self.large_size += data.len();
            self.large.push_back((at, data));
        }
        Mark {
            // Zero is no epoch.
            epoch: self.epoch + 1,
            at,
        }
    }

    /// Makes a frame that has not left the last of its stream.
    pub(super) fn end(&mut self, mark: Mark) -> bool {
        if mark.epoch != self.epoch + 1 {
            return false;
        }
        match self.buffer.get_mut(mark.at as usize + FLAGS) {
            Some(flags) => *flags |= END_STREAM,
            None => return false,
        }
        true
    }

    /// Writes until nothing is left.
    pub(super) fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let written = if self.large.is_empty() {
                Pin::new(&mut *io).poll_write(cx, &self.buffer[self.sent..])
            } else if io.is_write_vectored() {
                self.poll_write_parts(io, cx)
            } else {
                let part = match self.large.front() {
                    Some((at, data)) if *at == self.sent => &data[..],
                    Some((at, _)) => &self.buffer[self.sent..*at],
                    None => &self.buffer[self.sent..],
                };
                Pin::new(&mut *io).poll_write(cx, part)
            };
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.advance(count),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write_parts<S: AsyncWrite + Unpin>(
        &self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut parts = [IoSlice::new(&[]); PARTS];
        let (mut count, mut from) = (0, self.sent);
        for (at, data) in &self.large {
            if count + 2 > PARTS {
                break;
            }
            if *at > from {
                parts[count] = IoSlice::new(&self.buffer[from..*at]);
                count += 1;
            }
            parts[count] = IoSlice::new(data);
            count += 1;
            from = *at;
        }
        if count < PARTS && self.large.back().is_some_and(|(at, _)| *at == from) {
            parts[count] = IoSlice::new(&self.buffer[from..]);
            count += 1;
        }
        Pin::new(io).poll_write_vectored(cx, &parts[..count])
    }

    fn advance(&mut self, mut count: usize) {
        self.epoch += 1;
        while count > 0 {
            let until = self.large.front().map_or(self.buffer.len(), |(at, _)| *at);
            let part = count.min(until - self.sent);
            self.sent += part;
            count -= part;
            let Some((_, data)) = self.large.front_mut().filter(|_| count > 0) else {
                break;
            };
            let part = count.min(data.len());
            data.advance(part);
            self.large_size -= part;
            count -= part;
            if data.is_empty() {
                self.large.pop_front();
            }
        }
        if self.is_empty() {
            self.sent = 0;
            // An idle connection holds nothing.
            buffer::give_write(std::mem::take(&mut self.buffer));
        } else if self.sent >= SPENT {
            // With a peer that is always a little behind it is never empty.
            self.buffer.drain(..self.sent);
            for (at, _) in &mut self.large {
                *at -= self.sent;
            }
            self.sent = 0;
        }
    }
}

/// Where the flags of a frame's head stand.
const FLAGS: usize = 4;

/// Data up to this size is copied: cheaper than one more part of a write, and what it came in is
/// free at once.
const COPIED: usize = 2048;

/// Bytes that have left before the buffer is moved up.
const SPENT: usize = 64 * 1024;

/// Parts of one write; the system takes 1,024.
const PARTS: usize = 64;

const _: () = assert!(FLAGS < HEAD);

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn frames_leave_in_their_order_however_little_is_taken() {
        for pipe in [1, 3, 1000, 1 << 20] {
            let (mut near, mut far) = tokio::io::duplex(pipe);
            let (mut out, mut expected) = (Outbox::default(), Vec::new());
            let mut last = Mark::default();
            for n in 0..100u32 {
                let data = Bytes::from(vec![n as u8; (n as usize * 733) % 5000]);
                last = out.data(n * 2 + 1, data.clone(), false);
                let head = Head {
                    length: data.len(),
                    kind: DATA,
                    flags: if n == 99 { END_STREAM } else { 0 },
                    stream: n * 2 + 1,
                };
                head.put(&mut expected);
                expected.extend_from_slice(&data);
            }
            assert!(out.end(last));
            assert_eq!(out.len(), expected.len());
            let mut got = vec![0; expected.len()];
            let write = std::future::poll_fn(|cx| out.poll_write(&mut near, cx));
            let (written, read) = tokio::join!(write, far.read_exact(&mut got));
            written.unwrap();
            read.unwrap();
            assert!(got == expected, "pipe {pipe}");
            assert!(out.is_empty() && !out.end(last));
        }
    }
    #[tokio::test]
    async fn what_has_left_takes_no_room_even_if_something_always_waits() {
        let (mut near, mut far) = tokio::io::duplex(10_000);
        let (mut out, mut expected, mut got) = (Outbox::default(), Vec::new(), Vec::new());
        for n in 0..2000u32 {
            let data = Bytes::from(vec![n as u8; if n % 50 == 0 { 3000 } else { 1500 }]);
            out.data(1, data.clone(), false);
            let head = Head {
                length: data.len(),
                kind: DATA,
                flags: 0,
                stream: 1,
            };
            head.put(&mut expected);
            expected.extend_from_slice(&data);
            if n > 10 {
                let write = std::future::poll_fn(|cx| Poll::Ready(out.poll_write(&mut near, cx)));
                assert!(write.await.is_pending());
                let mut piece = [0; 1509];
                far.read_exact(&mut piece).await.unwrap();
                got.extend_from_slice(&piece);
            }
        }
        assert!(
            out.buffer.capacity() < 512 * 1024,
            "{}",
            out.buffer.capacity()
        );
        let mut rest = vec![0; expected.len() - got.len()];
        let write = std::future::poll_fn(|cx| out.poll_write(&mut near, cx));
        let (written, read) = tokio::join!(write, far.read_exact(&mut rest));
        written.unwrap();
        read.unwrap();
        got.extend(rest);
        assert!(got == expected);
    }
}
