//! A connection on which we open streams.

use std::{
    future::{Future, poll_fn},
    hash::{BuildHasher, RandomState},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use ::h2::client::{Builder, ResponseFuture, SendRequest};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Facts, Reader, SEND_BUFFER, SMALL_DATA_BUDGET, Settings, Writer, convert, guard::Guard,
    keepalive::Pinger,
};
use crate::{Error, Framing, Limits, Refusal, RequestHead, ResponseHead};

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
    let facts = Rc::new(Facts::default());
    let stamped = settings.keep_alive.is_some();
    let guard = Guard::new(io, &facts, settings.floods, false, stamped);
    let (send, mut connection) = Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_header_list_size(settings.header_list)
        .header_table_size(settings.header_table)
        .enable_push(false)
        .data_frame_budget(SMALL_DATA_BUDGET)
        .max_local_error_reset_streams(Some(settings.floods.max_outbound_control_frames as usize))
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(guard)
        .await?;
    let mut pinger = settings.keep_alive.and_then(|options| {
        let seed = RandomState::new().hash_one(0);
        Some(Pinger::new(options, connection.ping_pong()?, &facts, seed))
    });
    let handle = ClientHandle {
        send,
        facts: facts.clone(),
        headers: settings.headers,
    };
    let driver = async move {
        poll_fn(|cx| {
            if let Some(pinger) = &mut pinger
                && pinger.poll(cx).is_ready()
            {
                return Poll::Ready(Err(Error::Unresponsive));
            }
            if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(ended.map_err(Error::from));
            }
            match facts.flood() {
                Some(_) => Poll::Ready(Err(FLOOD.into())),
                None => Poll::Pending,
            }
        })
        .await
    };
    Ok((handle, driver))
}

const FLOOD: Refusal = Refusal {
    status: 502,
    detail: "http2.inbound_flood",
};

const TOO_MANY_INFORMATIONAL: Refusal = Refusal {
    status: 502,
    detail: "http2.too_many_informational",
};

const TOO_MANY: Refusal = Refusal {
    status: 502,
    detail: "http2.too_many_headers",
};

/// Opens streams on one connection; clones share it.
#[derive(Debug, Clone)]
pub struct ClientHandle {
    send: SendRequest<Bytes>,
    facts: Rc<Facts>,
    headers: usize,
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

    /// Whether the peer takes extended CONNECT (RFC 8441).
    pub fn takes_extended_connect(&self) -> bool {
        self.send.is_extended_connect_protocol_enabled()
    }

    /// What has passed on the connection.
    pub fn facts(&self) -> &Rc<Facts> {
        &self.facts
    }

    /// Opens a stream; only after [`ClientHandle::poll_ready`].
    ///
    /// # Errors
    /// The head cannot be said in HTTP/2; or the connection is over, so that nothing was sent.
    pub fn send(&mut self, head: &RequestHead, framing: Framing) -> Result<ClientStream, Error> {
        let ended = framing.is_none() && !head.upgrade;
        let request = convert::request_out(head, framing)?;
        let (response, stream) =
            self.send.send_request(request, ended).map_err(|error| {
                match error.is_go_away() || error.is_io() {
                    true => Error::Unprocessed,
                    false => error.into(),
                }
            })?;
        self.facts.opened.set(self.facts.opened.get() + 1);
        Ok(ClientStream {
            headers: self.headers,
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
    headers: usize,
}

impl ClientStream {
    /// The reading and the writing half.
    pub fn split(self) -> (ResponseReader, Writer) {
        (
            ResponseReader {
                response: self.response,
                upgrade: self.upgrade,
                headers: self.headers,
                informational: 0,
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
    headers: usize,
    informational: usize,
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
            self.informational += 1;
            if self.informational > Limits::default().informational {
                return Poll::Ready(Err(TOO_MANY_INFORMATIONAL.into()));
            }
            return Poll::Ready(Ok((convert::response_in(&informational?, None), None)));
        }
        let response = ready!(Pin::new(&mut self.response).poll(cx))?;
        if response.headers().len() > self.headers {
            return Poll::Ready(Err(TOO_MANY.into()));
        }
        let mut head = convert::response_in(&response, Some(response.body()));
        if self.upgrade && (200..300).contains(&head.status) {
            head.framing = Framing::Tunnel;
        }
        Poll::Ready(Ok((head, Some(Reader::new(response.into_body())))))
    }
}
