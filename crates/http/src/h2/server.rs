//! A connection on which streams come in.

use std::{
    future::poll_fn,
    hash::{BuildHasher, RandomState},
    rc::Rc,
    task::{Context, Poll, ready},
};

use ::h2::{
    Reason,
    server::{Builder, Connection},
};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Facts, Reader, SEND_BUFFER, SMALL_DATA_BUDGET, Settings, Writer, convert, guard::Guard,
    keepalive::Pinger,
};
use crate::{Error, Method, RequestHead, ResponseHead};

/// One HTTP/2 connection, server side. It makes progress only while `accept` is awaited; streams
/// run in tasks of their own.
#[derive(Debug)]
pub struct ServerConnection<S> {
    connection: Connection<Guard<S>, Bytes>,
    headers: usize,
    facts: Rc<Facts>,
    pinger: Option<Pinger>,
    ending: bool,
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
            .header_table_size(settings.header_table)
            .data_frame_budget(SMALL_DATA_BUDGET)
            // Resets in flight and resets that we had to send are how a peer makes work for
            // free (CVE-2023-44487, CVE-2025-8671); `h2` counts them and says GOAWAY.
            .max_pending_accept_reset_streams(64)
            .max_local_error_reset_streams(Some(
                settings.floods.max_outbound_control_frames as usize,
            ))
            .max_send_buffer_size(SEND_BUFFER);
        if settings.extended_connect {
            builder.enable_connect_protocol();
        }
        let facts = Rc::new(Facts::default());
        let stamped = settings.keep_alive.is_some();
        let guard = Guard::new(io, &facts, settings.floods, true, stamped);
        let mut connection = builder.handshake(guard).await?;
        let pinger = settings.keep_alive.and_then(|options| {
            let seed = RandomState::new().hash_one(0);
            Some(Pinger::new(options, connection.ping_pong()?, &facts, seed))
        });
        Ok(ServerConnection {
            connection,
            headers: settings.headers,
            facts,
            pinger,
            ending: false,
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
            if let Some(pinger) = &mut self.pinger
                && pinger.poll(cx).is_ready()
            {
                return Poll::Ready(Err(Error::Unresponsive));
            }
            let accepted = self.connection.poll_accept(cx);
            if accepted.is_pending() && self.facts.flood().is_some() && !self.ending {
                self.end(Reason::ENHANCE_YOUR_CALM);
                continue;
            }
            let Some(accepted) = ready!(accepted) else {
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

    /// What has passed.
    pub fn facts(&self) -> &Rc<Facts> {
        &self.facts
    }

    /// Says GOAWAY for a reason: all streams end, and the connection with them as soon as the
    /// peer was told. Go on to accept until that is so.
    pub fn end(&mut self, reason: Reason) {
        self.ending = true;
        self.connection.abrupt_shutdown(reason);
    }

    /// Whether [`ServerConnection::end`] was called or a flood made it end.
    pub fn is_ending(&self) -> bool {
        self.ending
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
