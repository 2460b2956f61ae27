//! A tunnel whose bytes are the bodies of a request and of its response, as a stream of bytes.
//!
//! The end of either body is the end of its direction, as with a half-closed connection. A tunnel that is dropped before
//! both have ended is reset (HTTP/2), or its connection is closed in the middle of a message (HTTP/1).

use std::{
    io,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use outrigger_http::{
    Error, Frame,
    h1::ClientConnection,
    h2::{Reader, Writer},
};
use serde_json::Value;
use tls::session::Session;
use tokio::io::ReadBuf;

use super::Told;
use crate::{cluster::Http2, io::Stream};

/// The stream of a tunnel.
#[derive(Debug)]
pub(in crate::network) struct Carried {
    call: Call,
    /// What TLS agreed on with the proxy.
    session: Option<Arc<Session>>,
    /// Who the proxy is, by Istio's metadata exchange.
    peer: Option<Arc<Value>>,
    told: Rc<Told>,
    /// Of a piece of data that a reader had no room for.
    rest: Bytes,
    /// The response has ended.
    ended: bool,
    /// So many bytes has the codec of HTTP/1 taken that the system has not: their write is still under way.
    owed: usize,
}

#[derive(Debug)]
enum Call {
    H1(Box<ClientConnection<Stream>>),
    H2 {
        reader: Reader,
        writer: Writer,
        /// Behind the halves of the stream, so that it counts until they are gone.
        _place: Http2,
    },
}

impl Carried {
    /// The bodies of a POST over HTTP/1; the final head of its response was read.
    pub(super) fn http1(
        connection: ClientConnection<Stream>,
        (session, peer): (Option<Arc<Session>>, Option<Arc<Value>>),
        told: Rc<Told>,
    ) -> Self {
        Self {
            peer,
            ..Self::new(Call::H1(Box::new(connection)), session, told)
        }
    }

    /// A stream of HTTP/2.
    pub(super) fn http2((reader, writer): (Reader, Writer), place: Http2, told: Rc<Told>) -> Self {
        let session = place.session();
        let call = Call::H2 {
            reader,
            writer,
            _place: place,
        };
        Self::new(call, session, told)
    }

    fn new(call: Call, session: Option<Arc<Session>>, told: Rc<Told>) -> Self {
        Self {
            call,
            session,
            peer: None,
            told,
            rest: Bytes::new(),
            ended: false,
            owed: 0,
        }
    }

    /// What TLS agreed on with the proxy.
    pub(in crate::network) fn session(&self) -> Option<&Arc<Session>> {
        self.session.as_ref()
    }

    /// Who the proxy is.
    pub(in crate::network) fn peer(&self) -> Option<&Arc<Value>> {
        self.peer.as_ref()
    }

    /// Makes its close a reset. A stream of HTTP/2 that is dropped before its end is reset in any case.
    pub(in crate::network) fn reset_on_close(&self) {
        if let Call::H1(connection) = &self.call {
            connection.stream().reset_on_close();
        }
    }

    /// Reads bytes; none at the end.
    pub(in crate::network) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() && !self.ended {
            match ready!(self.poll_frame(cx)) {
                Some(Ok(Frame::Data(data))) => self.rest = data,
                Some(Ok(Frame::Trailers(trailers))) => {
                    self.told.trailers(&trailers);
                    self.ended = true;
                }
                None => self.ended = true,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..length]);
        self.rest.advance(length);
        Poll::Ready(Ok(()))
    }

    /// Writes bytes. Where it was not ready it has to be repeated with the same: they may be on their way.
    pub(in crate::network) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bytes).map_err(broken)
    }

    /// Ends our direction.
    pub(in crate::network) fn poll_shutdown(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_end(cx).map_err(broken)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Error>>> {
        match &mut self.call {
            Call::H1(connection) => connection.reader().poll_frame(cx),
            Call::H2 { reader, .. } => reader.poll_frame(cx),
        }
    }

    /// Takes bytes; how many, and whether they are on their way.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Error>> {
        match &mut self.call {
            Call::H1(connection) => {
                let mut writer = connection.writer();
                if self.owed == 0 {
                    ready!(writer.poll_ready(cx))?;
                    writer.send_data(Bytes::copy_from_slice(bytes))?;
                    self.owed = bytes.len();
                }
                // The write is over when the system has the bytes: nobody would come back to flush them.
                ready!(writer.poll_flush(cx))?;
                Poll::Ready(Ok(std::mem::take(&mut self.owed)))
            }
            // The connection's own task writes them.
            Call::H2 { writer, .. } => {
                ready!(writer.poll_ready(cx))?;
                writer.send_data(Bytes::copy_from_slice(bytes))?;
                Poll::Ready(Ok(bytes.len()))
            }
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match &mut self.call {
            Call::H1(connection) => {
                let mut writer = connection.writer();
                if !writer.is_end() {
                    ready!(writer.poll_ready(cx))?;
                    writer.send_end(None)?;
                }
                writer.poll_flush(cx)
            }
            Call::H2 { writer, .. } => writer.poll_end(cx),
        }
    }
}

fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::new(io::ErrorKind::ConnectionReset, error),
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use outrigger_http::{Framing, Limits, Method, RequestHead, Version};
    use tokio::io::AsyncReadExt;

    use super::*;

    /// A write that was taken leaves, though nobody writes or reads again.
    #[tokio::test]
    async fn a_write_is_over_when_all_of_it_is_on_its_way() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut connection = ClientConnection::new(Stream::from(near), Limits::default());
        let head = RequestHead::new(Version::Http11, Method::Post, "h", "/");
        connection.send_head(&head, Framing::Chunked);
        let mut tunnel = Carried::http1(connection, (None, None), Rc::default());
        let bytes = [7; 1000];
        let write = poll_fn(|cx| tunnel.poll_write(cx, &bytes));
        let read = async {
            let mut got = Vec::new();
            while !got.ends_with(b"\x07\r\n") {
                far.read_buf(&mut got).await.expect("it is open");
            }
            got
        };
        let both =
            tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(write, read) });
        let (written, got) = both.await.expect("all of it comes");
        assert_eq!(written.expect("it is open"), bytes.len());
        assert!(got.ends_with(&[b"\r\n3e8\r\n", &bytes[..], b"\r\n"].concat()));
    }
}
