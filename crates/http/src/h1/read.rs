//! The reading half of a connection.

use std::{
    cell::{Ref, RefCell},
    future::Future,
    io,
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{ChunkDecoder, ChunkStep, HeadScanner, Scan};
use crate::{Error, Frame, Framing, Limits, buffer};

/// What is left of the message that is being read.
#[derive(Debug)]
enum Body {
    /// Nothing: the next bytes are a head.
    Done,
    Length(u64),
    Chunked(Box<ChunkDecoder>),
    /// Everything until the peer closes.
    Close,
}

/// State of the reading half. It holds a buffer only while there are bytes in it.
#[derive(Debug)]
pub(super) struct ReadState {
    buffer: BytesMut,
    scanner: HeadScanner,
    body: Body,
    /// The peer has closed its side.
    closed: bool,
    /// The last read filled its buffer.
    large: bool,
    pub(super) limits: Limits,
}

impl ReadState {
    pub(super) fn new(buffer: BytesMut, limits: Limits) -> ReadState {
        ReadState {
            buffer,
            scanner: HeadScanner::default(),
            body: Body::Done,
            closed: false,
            large: false,
            limits,
        }
    }

    pub(super) fn start_body(&mut self, framing: Framing) {
        self.body = match framing {
            Framing::None | Framing::Length(0) => Body::Done,
            Framing::Length(length) => Body::Length(length),
            Framing::Chunked => Body::Chunked(Box::default()),
            Framing::UntilClose | Framing::Tunnel => Body::Close,
        };
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.body, Body::Done)
    }

    /// Nothing unread, and the peer still there.
    pub(super) fn is_quiet(&self) -> bool {
        self.buffer.is_empty() && !self.closed
    }

    pub(super) fn has_bytes(&self) -> bool {
        !self.buffer.is_empty()
    }

    pub(super) fn has_prefix(&self, prefix: &[u8]) -> Option<bool> {
        let length = self.buffer.len().min(prefix.len());
        match self.buffer[..length] == prefix[..length] {
            false => Some(false),
            true if length == prefix.len() => Some(true),
            true => None,
        }
    }

    pub(super) fn take_buffer(&mut self) -> BytesMut {
        std::mem::take(&mut self.buffer)
    }

    /// Reads once. `Ok(0)` is the peer's end.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        io: &RefCell<S>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Ok(0));
        }
        if self.buffer.capacity() == 0 && !self.large {
            // Most looks at a stream find nothing: then no buffer changes hands.
            let mut io = io.borrow_mut();
            let (read, buffer) = buffer::lend(|buffer| pin!(io.read_buf(buffer)).poll(cx));
            self.buffer = buffer;
            return self.filled(read, buffer::SMALL);
        }
        if self.buffer.capacity() == self.buffer.len() || self.buffer.is_empty() {
            let size = if self.large {
                buffer::LARGE
            } else {
                buffer::SMALL
            };
            if self.buffer.is_empty() && !self.buffer.try_reclaim(size) {
                self.buffer = buffer::take_read(size);
            } else {
                self.buffer.reserve(size);
            }
        }
        let room = self.buffer.capacity() - self.buffer.len();
        let read = pin!(io.borrow_mut().read_buf(&mut self.buffer)).poll(cx);
        let read = self.filled(read, room);
        self.release();
        read
    }

    /// Notes what came of a read that had so much room.
    fn filled(&mut self, read: Poll<io::Result<usize>>, room: usize) -> Poll<io::Result<usize>> {
        match &read {
            Poll::Ready(Ok(count)) => {
                self.closed = *count == 0;
                self.large = *count >= room && room >= buffer::SMALL / 2;
            }
            Poll::Ready(Err(_)) => self.closed = true,
            Poll::Pending => {}
        }
        read
    }

    /// Lends the buffer back when nothing is in it.
    pub(super) fn release(&mut self) {
        if self.buffer.is_empty() && self.buffer.capacity() > 0 {
            buffer::give_read(std::mem::take(&mut self.buffer));
        }
    }

    /// Waits for the first byte of a message; `false` when the peer closed instead.
    pub(super) fn poll_readable<S: AsyncRead + Unpin>(
        &mut self,
        io: &RefCell<S>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<bool>> {
        if self.has_bytes() {
            return Poll::Ready(Ok(true));
        }
        Poll::Ready(ready!(self.poll_fill(io, cx)).map(|count| count > 0))
    }

    /// Waits for a complete head and gives it to `parse`; `None` when the peer closed before its
    /// first byte. What begins like a usual head is first shown to `fast`.
    pub(super) fn poll_head<S: AsyncRead + Unpin, T>(
        &mut self,
        io: &RefCell<S>,
        cx: &mut Context<'_>,
        fast: impl Fn(&[u8], &Limits) -> Option<(T, usize)>,
        parse: impl FnOnce(&[u8], &Limits) -> Result<T, crate::Refusal>,
    ) -> Poll<Result<Option<T>, Error>> {
        loop {
            if self.scanner.is_new()
                && self.has_bytes()
                && let Some((head, end)) = fast(&self.buffer, &self.limits)
            {
                self.buffer.advance(end);
                self.release();
                return Poll::Ready(Ok(Some(head)));
            }
            if self.has_bytes()
                && let Scan::Complete { start, end } =
                    self.scanner.scan(&self.buffer, &self.limits)?
            {
                let head = parse(&self.buffer[start..end], &self.limits)?;
                self.buffer.advance(end);
                self.release();
                return Poll::Ready(Ok(Some(head)));
            }
            let before = self.buffer.len();
            if ready!(self.poll_fill(io, cx))? == 0 {
                return Poll::Ready(if before == 0 {
                    Ok(None)
                } else {
                    Err(Error::Closed)
                });
            }
        }
    }

    pub(super) fn poll_frame<S: AsyncRead + Unpin>(
        &mut self,
        io: &RefCell<S>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, Error>>> {
        loop {
            match &mut self.body {
                Body::Done => return Poll::Ready(None),
                Body::Length(left) if self.buffer.has_remaining() => {
                    let take = (*left).min(self.buffer.len() as u64);
                    *left -= take;
                    if *left == 0 {
                        self.body = Body::Done;
                    }
                    return Poll::Ready(Some(Ok(Frame::Data(self.take(take as usize)))));
                }
                Body::Chunked(decoder) if self.buffer.has_remaining() => {
                    match decoder.decode(&mut self.buffer, &self.limits) {
                        Ok(ChunkStep::Data(data)) => {
                            self.release();
                            return Poll::Ready(Some(Ok(Frame::Data(data))));
                        }
                        Ok(ChunkStep::End(trailers)) => {
                            self.body = Body::Done;
                            self.release();
                            let trailers = trailers.filter(|_| self.limits.trailers);
                            return Poll::Ready(trailers.map(|t| Ok(Frame::Trailers(t))));
                        }
                        Ok(ChunkStep::Partial) => {}
                        Err(refusal) => return Poll::Ready(Some(Err(refusal.into()))),
                    }
                }
                Body::Close if self.buffer.has_remaining() => {
                    let take = self.buffer.len();
                    return Poll::Ready(Some(Ok(Frame::Data(self.take(take)))));
                }
                _ => {}
            }
            match ready!(self.poll_fill(io, cx)) {
                Ok(0) if matches!(self.body, Body::Close) => {
                    self.body = Body::Done;
                    return Poll::Ready(None);
                }
                Ok(0) => return Poll::Ready(Some(Err(Error::Closed))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }

    /// Bytes of a body with a declared length that are still to come, where none of them was read.
    fn ahead(&self) -> Option<u64> {
        match self.body {
            Body::Length(left) if self.buffer.is_empty() && !self.closed => Some(left),
            _ => None,
        }
    }

    fn passed(&mut self, count: u64) {
        if let Body::Length(left) = &mut self.body {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.body = Body::Done;
            }
        }
        // The next read is one of a head: what is large does not come through here.
        self.large = false;
    }

    fn take(&mut self, count: usize) -> Bytes {
        // An emptied buffer stays until the next read, which uses it again if the data is gone.
        self.buffer.split_to(count).freeze()
    }
}

/// Reads the body of the message whose head was read last.
#[derive(Debug)]
pub struct Reader<'a, S> {
    pub(super) io: &'a RefCell<S>,
    pub(super) state: &'a mut ReadState,
}

impl<S: AsyncRead + Unpin> Reader<'_, S> {
    /// The next frame; `None` at the end of the message.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Error>>> {
        self.state.poll_frame(self.io, cx)
    }

    /// Whether the message was read to its end.
    pub fn is_end(&self) -> bool {
        self.state.is_done()
    }

    /// Resolves when the peer has gone away while we are not interested in its bytes. Bytes of a
    /// next, pipelined request are kept; with such bytes waiting it never resolves. The error is that of a peer that
    /// did not just end its stream.
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.state.has_bytes() {
            return Poll::Pending;
        }
        match self.state.poll_fill(self.io, cx) {
            Poll::Ready(Ok(0)) => Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Pending,
        }
    }

    /// How much of the body is still to come, where its length is known and no byte of it is held here. So many bytes
    /// may be taken off the stream by somebody else, who says so with [`Reader::passed`].
    pub fn ahead(&self) -> Option<u64> {
        self.state.ahead()
    }

    /// So many bytes of [`Reader::ahead`] were taken off the stream.
    pub fn passed(&mut self, count: u64) {
        self.state.passed(count);
    }

    /// The stream.
    pub fn io(&self) -> Ref<'_, S> {
        self.io.borrow()
    }

    /// Changes how the rest is delimited: after a 101, or a 2xx to CONNECT, all that follows is
    /// the tunnel's.
    pub fn start_tunnel(&mut self) {
        self.state.start_body(Framing::Tunnel);
    }
}
