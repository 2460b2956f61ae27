//! A connection on which requests come in.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Reader, Spelling, Writer, fast, parse_request,
    read::ReadState,
    write::{Client, WriteState},
};
use crate::{Error, Limits, Method, RequestHead, Version};

/// One HTTP/1 connection, server side. Pipelined requests wait in its buffer; between requests it
/// holds none.
#[derive(Debug)]
pub struct ServerConnection<S> {
    io: RefCell<S>,
    read: ReadState,
    write: WriteState,
    client: Client,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ServerConnection<S> {
    /// Wraps a stream; `read` are bytes that were read from it already.
    pub fn new(io: S, read: BytesMut, limits: Limits) -> Self {
        ServerConnection {
            io: RefCell::new(io),
            write: WriteState::new(&limits),
            read: ReadState::new(read, limits),
            client: Client {
                version: Version::Http11,
                keep_alive: true,
                is_head: false,
            },
        }
    }

    /// Says how heads of responses are written.
    pub fn set_spelling(&mut self, spelling: Spelling) {
        self.write.spelling = spelling;
    }

    /// Waits, without a buffer, for the first byte of a request; `false` when the client closed.
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    /// The system's, when the connection broke.
    pub async fn readable(&mut self) -> io::Result<bool> {
        poll_fn(|cx| self.read.poll_readable(&self.io, cx)).await
    }

    /// Reads the next head; `None` when the client closed instead. The body follows by
    /// [`ServerConnection::split`]. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] says what to answer before closing.
    pub async fn read_head(&mut self) -> Result<Option<RequestHead>, Error> {
        let head = poll_fn(|cx| {
            self.read
                .poll_head(&self.io, cx, fast::request, parse_request)
        });
        let head = match head.await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(None),
            Err(error) => {
                // The answer to what we could not parse is the last one.
                self.client.is_head = false;
                self.client.keep_alive = false;
                return Err(error);
            }
        };
        self.read.start_body(head.framing);
        self.client = Client {
            version: head.version,
            keep_alive: head.keep_alive,
            is_head: head.method == Method::Head,
        };
        Ok(Some(head))
    }

    /// The two halves: the request's body, and the response.
    pub fn split(&mut self) -> (Reader<'_, S>, Writer<'_, S>) {
        (
            Reader {
                io: &self.io,
                state: &mut self.read,
            },
            Writer {
                io: &self.io,
                state: &mut self.write,
                client: self.client,
            },
        )
    }

    /// Whether both messages are complete and the connection may carry another request.
    pub fn is_reusable(&self) -> bool {
        self.client.keep_alive && !self.write.closing && self.read.is_done() && self.write.is_done()
    }

    /// Whether the response was written to its end and has left.
    pub fn is_complete(&self) -> bool {
        self.write.is_done()
    }

    /// Whether the unread bytes begin with `prefix`; `None` while there are too few to tell.
    pub fn has_prefix(&self, prefix: &[u8]) -> Option<bool> {
        self.read.has_prefix(prefix)
    }

    /// Reads more bytes without looking at them; `false` at the client's end.
    pub fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.read.poll_fill(&self.io, cx).map_ok(|count| count > 0)
    }

    /// Sends what is left, then our end. What the client still sends is read and thrown away for
    /// a little (at most `linger` bytes), so that the system does not answer it with a reset that
    /// would destroy the response on its way.
    ///
    /// # Errors
    /// The connection's; there is nothing to do about it.
    pub async fn close(&mut self, linger: usize) -> Result<(), Error> {
        poll_fn(|cx| self.write.poll_flush(&self.io, cx)).await?;
        poll_fn(|cx| Pin::new(&mut *self.io.borrow_mut()).poll_shutdown(cx)).await?;
        let mut left = linger;
        while left > 0 {
            drop(self.read.take_buffer());
            match poll_fn(|cx| self.read.poll_fill(&self.io, cx)).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        Ok(())
    }

    /// The stream, for what is not HTTP.
    pub fn io(&mut self) -> &mut S {
        self.io.get_mut()
    }

    /// Takes the connection apart: the stream, and bytes that were read but not used.
    pub fn into_parts(mut self) -> (S, BytesMut) {
        let rest = self.read.take_buffer();
        (self.io.into_inner(), rest)
    }
}
