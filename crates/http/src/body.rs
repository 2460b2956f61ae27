//! Bodies: frames, how they are delimited, and one reader and one writer for both protocols.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{Error, Headers, ResponseHead, h1, h2};

/// A piece of a message behind its head.
#[derive(Debug)]
pub enum Frame {
    /// Data, never empty.
    Data(Bytes),
    /// The trailers; nothing follows.
    Trailers(Headers),
}

/// How the end of a body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// Exactly so many bytes.
    Length(u64),
    /// The protocol marks the end: chunked, or END_STREAM.
    Chunked,
    /// The end of the connection is the end of the body.
    UntilClose,
    /// No HTTP any more: after a 101, or a 2xx to CONNECT.
    Tunnel,
}

impl Framing {
    /// Whether nothing follows the head.
    pub fn is_none(self) -> bool {
        matches!(self, Framing::None | Framing::Length(0))
    }
}

/// Reads the body of one message.
#[derive(Debug)]
pub enum BodyReader<'a, S> {
    /// HTTP/1.
    H1(h1::Reader<'a, S>),
    /// HTTP/2.
    H2(h2::Reader),
    /// Nothing.
    Empty,
}

impl<S: AsyncRead + Unpin> BodyReader<'_, S> {
    /// The next frame; `None` at the end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Error>>> {
        match self {
            BodyReader::H1(reader) => reader.poll_frame(cx),
            BodyReader::H2(reader) => reader.poll_frame(cx),
            BodyReader::Empty => Poll::Ready(None),
        }
    }

    /// [`BodyReader::poll_frame`] as a future.
    pub async fn frame(&mut self) -> Option<Result<Frame, Error>> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Whether the end was reached.
    pub fn is_end(&self) -> bool {
        match self {
            BodyReader::H1(reader) => reader.is_end(),
            BodyReader::H2(reader) => reader.is_end(),
            BodyReader::Empty => true,
        }
    }

    /// Everything that follows belongs to a tunnel.
    pub fn start_tunnel(&mut self) {
        if let BodyReader::H1(reader) = self {
            reader.start_tunnel();
        }
    }

    /// Resolves when an HTTP/1 peer has gone away after its message; never for HTTP/2, where the
    /// writer is told.
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            BodyReader::H1(reader) if reader.is_end() => reader.poll_closed(cx),
            _ => Poll::Pending,
        }
    }
}

/// Writes the body of one message.
#[derive(Debug)]
pub enum BodyWriter<'a, S> {
    /// HTTP/1.
    H1(h1::Writer<'a, S>),
    /// HTTP/2.
    H2(h2::Writer),
}

impl<S: AsyncWrite + Unpin> BodyWriter<'_, S> {
    /// Writes a response's head; it leaves with what follows, or with a flush.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_response(&mut self, head: &ResponseHead, framing: Framing) -> Result<(), Error> {
        match self {
            BodyWriter::H1(writer) => {
                writer.send_response(head, framing);
                Ok(())
            }
            BodyWriter::H2(writer) => writer.send_response(head, framing),
        }
    }

    /// Writes a 1xx response.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_informational(&mut self, status: u16, headers: &Headers) -> Result<(), Error> {
        match self {
            BodyWriter::H1(writer) => {
                writer.send_informational(status, headers);
                Ok(())
            }
            BodyWriter::H2(writer) => writer.send_informational(status, headers),
        }
    }

    /// Makes the message the last one of an HTTP/1 connection.
    pub fn close_after(&mut self) {
        if let BodyWriter::H1(writer) = self {
            writer.close_after();
        }
    }

    /// Ends an HTTP/2 stream with an error; HTTP/1 has no such thing but closing.
    pub fn reset(&mut self, reason: h2::Reason) {
        match self {
            BodyWriter::H1(writer) => writer.close_after(),
            BodyWriter::H2(writer) => writer.reset(reason),
        }
    }

    /// Waits for room for one more piece of data.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match self {
            BodyWriter::H1(writer) => writer.poll_ready(cx),
            BodyWriter::H2(writer) => writer.poll_ready(cx),
        }
    }

    /// Takes a piece of data; only after `poll_ready`.
    ///
    /// # Errors
    /// The message is not what its head declared, or the stream is gone.
    pub fn send_data(&mut self, data: Bytes) -> Result<(), Error> {
        match self {
            BodyWriter::H1(writer) => writer.send_data(data),
            BodyWriter::H2(writer) => writer.send_data(data),
        }
    }

    /// Ends the message; only after `poll_ready`.
    ///
    /// # Errors
    /// The message is shorter than its head declared, or the stream is gone.
    pub fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), Error> {
        match self {
            BodyWriter::H1(writer) => writer.send_end(trailers),
            BodyWriter::H2(writer) => writer.send_end(trailers),
        }
    }

    /// Hands what was collected to the system.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match self {
            BodyWriter::H1(writer) => writer.poll_flush(cx),
            BodyWriter::H2(writer) => writer.poll_flush(cx),
        }
    }

    /// [`BodyWriter::poll_flush`] as a future.
    pub async fn flush(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Ends our direction of a tunnel.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match self {
            BodyWriter::H1(writer) => writer.poll_shutdown(cx),
            BodyWriter::H2(writer) => writer.poll_end(cx),
        }
    }

    /// Whether the message was ended.
    pub fn is_end(&self) -> bool {
        match self {
            BodyWriter::H1(writer) => writer.is_end(),
            BodyWriter::H2(writer) => writer.is_end(),
        }
    }

    /// Resolves when the peer reset the stream; never for HTTP/1, where the reader is told.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        match self {
            BodyWriter::H1(_) => Poll::Pending,
            BodyWriter::H2(writer) => writer.poll_reset(cx),
        }
    }
}
