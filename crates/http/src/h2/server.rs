//! A connection on which streams come in.

use std::{
    future::poll_fn,
    task::{Context, Poll, ready},
};

use ::h2::server::{Builder, Connection};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Reader, Settings, Writer, convert};
use crate::{Error, Method, RequestHead, ResponseHead};

/// One HTTP/2 connection, server side. It makes progress only while `accept` is awaited; streams
/// run in tasks of their own.
#[derive(Debug)]
pub struct ServerConnection<S> {
    connection: Connection<S, Bytes>,
    headers: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ServerConnection<S> {
    /// Exchanges prefaces and settings.
    ///
    /// # Errors
    /// The peer does not speak HTTP/2, or the connection broke.
    pub async fn handshake(io: S, settings: &Settings) -> Result<Self, Error> {
        let mut builder = Builder::new();
        builder
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_concurrent_streams(settings.concurrent_streams)
            .max_header_list_size(settings.header_list)
            // A stream of small messages is ordinary gRPC: h2 would take a hundred of them in one
            // read for an attack. This is 65,536 of them.
            .data_frame_budget(1 << 24)
            // Resets in flight and resets that we had to send are how a peer makes work for
            // free (CVE-2023-44487, CVE-2025-8671); `h2` counts them and says GOAWAY.
            .max_pending_accept_reset_streams(64)
            .max_local_error_reset_streams(Some(1024))
            .max_send_buffer_size(512 * 1024);
        if settings.extended_connect {
            builder.enable_connect_protocol();
        }
        let connection = builder.handshake(io).await?;
        Ok(ServerConnection {
            connection,
            headers: settings.headers,
        })
    }

    /// The next stream; `None` when the connection is over. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The connection broke, or the peer broke the protocol.
    pub async fn accept(&mut self) -> Result<Option<(RequestHead, Reader, Writer)>, Error> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// [`ServerConnection::accept`], to be used beside a timer.
    #[allow(clippy::type_complexity)]
    pub fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<(RequestHead, Reader, Writer)>, Error>> {
        loop {
            let Some(accepted) = ready!(self.connection.poll_accept(cx)) else {
                return Poll::Ready(Ok(None));
            };
            let (request, mut respond) = accepted?;
            if request.headers().len() > self.headers {
                let response = ResponseHead::new(431);
                let response = convert::response_out(&response, crate::Framing::None, false);
                let _ = respond.send_response(response, true);
                continue;
            }
            let head = convert::request_in(&request);
            let writer = Writer::response(respond, head.method == Method::Head);
            return Poll::Ready(Ok(Some((head, Reader::new(request.into_body()), writer))));
        }
    }

    /// Says GOAWAY: streams that run may end, new ones are refused, then the connection closes.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }

    /// Whether any stream is open.
    pub fn has_streams(&self) -> bool {
        self.connection.has_streams()
    }
}
