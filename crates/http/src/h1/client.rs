//! A connection on which we send requests.

use std::{
    cell::RefCell,
    task::{Context, Poll, Waker},
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Reader, Writer, parse_response,
    read::ReadState,
    write::{Client, WriteState},
};
use crate::{Error, Framing, Limits, Method, Refusal, RequestHead, ResponseHead, Version};

/// One HTTP/1 connection, client side: one request at a time.
#[derive(Debug)]
pub struct ClientConnection<S> {
    io: RefCell<S>,
    read: ReadState,
    write: WriteState,
    /// Requests that were started on it.
    requests: u64,
    method: Method,
    informational: usize,
    keep_alive: bool,
    answered: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientConnection<S> {
    /// Wraps a connected stream.
    pub fn new(io: S, limits: Limits) -> Self {
        ClientConnection {
            io: RefCell::new(io),
            read: ReadState::new(BytesMut::new(), limits),
            write: WriteState::new(),
            requests: 0,
            method: Method::Get,
            informational: 0,
            keep_alive: true,
            answered: true,
        }
    }

    /// Writes the head of a request into the buffer; the body follows by
    /// [`ClientConnection::split`], whose writer's `flush` sends it.
    pub fn send_head(&mut self, head: &RequestHead, framing: Framing) {
        self.requests += 1;
        self.method = head.method.clone();
        self.informational = 0;
        self.keep_alive = true;
        self.answered = false;
        self.write.request(head, framing);
    }

    /// The two halves: the response, and the rest of the request.
    pub fn split(&mut self) -> (ResponseReader<'_, S>, Writer<'_, S>) {
        let client = Client {
            version: Version::Http11,
            keep_alive: true,
            is_head: false,
        };
        (
            ResponseReader {
                reader: Reader {
                    io: &self.io,
                    state: &mut self.read,
                },
                method: &self.method,
                informational: &mut self.informational,
                keep_alive: &mut self.keep_alive,
                answered: &mut self.answered,
            },
            Writer {
                io: &self.io,
                state: &mut self.write,
                client,
            },
        )
    }

    /// Requests that were started on this connection.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// After an exchange: whether another request may be sent. Bytes behind the response make the
    /// connection unusable; the next response could not be trusted.
    pub fn is_reusable(&self) -> bool {
        self.keep_alive
            && self.answered
            && !self.write.closing
            && self.read.is_done()
            && self.read.is_quiet()
            && self.write.is_done()
    }

    /// Whether an idle connection is still good, as far as the reactor knows: no end and no byte
    /// has arrived. Makes no system call while nothing was reported.
    pub fn is_open(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.read.is_quiet() && self.read.poll_fill(&self.io, &mut cx).is_pending()
    }

    /// Resolves when an idle connection is no longer good: closed, or spoken to out of turn.
    pub fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.read.is_quiet() {
            true => self.read.poll_fill(&self.io, cx).map(|_| ()),
            false => Poll::Ready(()),
        }
    }

    /// The stream, for what is not HTTP.
    pub fn io(&mut self) -> &mut S {
        self.io.get_mut()
    }
}

/// Reads the response: its heads, then its body.
#[derive(Debug)]
pub struct ResponseReader<'a, S> {
    /// The body, once the final head was read.
    pub reader: Reader<'a, S>,
    method: &'a Method,
    informational: &'a mut usize,
    keep_alive: &'a mut bool,
    answered: &'a mut bool,
}

impl<'a, S: AsyncRead + Unpin> ResponseReader<'a, S> {
    /// Reads the next head; informational ones come first, one at a time. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    /// [`Error::Closed`] when the peer closed before or within the head; [`Error::Refused`] for a
    /// response that may not be handed on, a flood of 1xx and an unasked 101 among them.
    pub async fn read_head(&mut self, upgrade: bool) -> Result<ResponseHead, Error> {
        let method = self.method;
        let Reader { io, state } = &mut self.reader;
        let head = state
            .read_head(*io, |bytes, limits| parse_response(bytes, method, limits))
            .await?
            .ok_or(Error::Closed)?;
        if head.is_informational() {
            *self.informational += 1;
            if *self.informational > state.limits.informational {
                return Err(Refusal {
                    status: 502,
                    detail: "http1.too_many_informational",
                }
                .into());
            }
            return Ok(head);
        }
        if head.status == 101 && !upgrade {
            return Err(Refusal {
                status: 502,
                detail: "http1.unexpected_upgrade",
            }
            .into());
        }
        *self.keep_alive = head.keep_alive && head.framing != Framing::Tunnel;
        *self.answered = true;
        state.start_body(head.framing);
        Ok(head)
    }

    /// The reader of the body alone.
    pub fn into_body(self) -> Reader<'a, S> {
        self.reader
    }
}
