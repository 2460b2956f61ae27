//! A connection on which we open streams.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};

use ::h2::client::{Builder, ResponseFuture, SendRequest};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Reader, Settings, Writer, convert};
use crate::{Error, Framing, RequestHead, ResponseHead};

/// Exchanges settings with prior knowledge. The future that is returned drives the connection and
/// ends with it; whoever connects spawns it.
///
/// # Errors
/// The peer does not speak HTTP/2, or the connection broke.
pub async fn connect<S>(
    io: S,
    settings: &Settings,
) -> Result<
    (
        ClientHandle,
        impl Future<Output = Result<(), Error>> + use<S>,
    ),
    Error,
>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (send, connection) = Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_header_list_size(settings.header_list)
        .enable_push(false)
        // A stream of small messages is ordinary gRPC: h2 would take a hundred of them in one
        // read for an attack. This is 65,536 of them.
        .data_frame_budget(1 << 24)
        .max_send_buffer_size(512 * 1024)
        .handshake(io)
        .await?;
    Ok((ClientHandle { send }, async move { Ok(connection.await?) }))
}

/// Opens streams on one connection; clones share it.
#[derive(Debug, Clone)]
pub struct ClientHandle {
    send: SendRequest<Bytes>,
}

impl From<SendRequest<Bytes>> for ClientHandle {
    fn from(send: SendRequest<Bytes>) -> ClientHandle {
        ClientHandle { send }
    }
}

impl ClientHandle {
    /// Resolves when the peer would take another stream; an error when the connection is over or
    /// being drained.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(ready!(self.send.poll_ready(cx))?))
    }

    /// [`ClientHandle::poll_ready`] as a future.
    ///
    /// # Errors
    /// The connection takes no more streams.
    pub async fn ready(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.poll_ready(cx)).await
    }

    /// Streams that the peer lets us have open.
    pub fn max_streams(&self) -> usize {
        self.send.current_max_send_streams()
    }

    /// Opens a stream; only after [`ClientHandle::poll_ready`].
    ///
    /// # Errors
    /// The head cannot be said in HTTP/2, or the connection is over.
    pub fn send(&mut self, head: &RequestHead, framing: Framing) -> Result<ClientStream, Error> {
        let ended = framing.is_none() && !head.upgrade;
        let request = convert::request_out(head, framing)?;
        let (response, stream) = self.send.send_request(request, ended)?;
        Ok(ClientStream {
            response,
            writer: Writer::body(stream, ended),
            upgrade: head.upgrade,
        })
    }
}

/// One stream: the request's body to write, the response to read.
#[derive(Debug)]
pub struct ClientStream {
    response: ResponseFuture,
    /// The request's body.
    pub writer: Writer,
    upgrade: bool,
}

impl ClientStream {
    /// The reading and the writing half.
    pub fn split(self) -> (ResponseReader, Writer) {
        (
            ResponseReader {
                response: self.response,
                upgrade: self.upgrade,
            },
            self.writer,
        )
    }
}

/// Reads the response's heads.
#[derive(Debug)]
pub struct ResponseReader {
    response: ResponseFuture,
    upgrade: bool,
}

impl ResponseReader {
    /// The next head; informational ones come first, without a body.
    ///
    /// # Errors
    /// The stream was reset, or the connection broke.
    pub async fn read_head(&mut self) -> Result<(ResponseHead, Option<Reader>), Error> {
        poll_fn(|cx| self.poll_head(cx)).await
    }

    /// [`ResponseReader::read_head`], to be used beside other things.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(ResponseHead, Option<Reader>), Error>> {
        if let Poll::Ready(Some(informational)) = self.response.poll_informational(cx) {
            return Poll::Ready(Ok((convert::response_in(&informational?, None), None)));
        }
        let response = ready!(Pin::new(&mut self.response).poll(cx))?;
        let mut head = convert::response_in(&response, Some(response.body()));
        if self.upgrade && (200..300).contains(&head.status) {
            head.framing = Framing::Tunnel;
        }
        Poll::Ready(Ok((head, Some(Reader::new(response.into_body())))))
    }
}
