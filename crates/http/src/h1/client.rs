//! A connection on which we send requests.

use std::{
    cell::{Ref, RefCell},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Reader, Spelling, Writer, fast, parse_response,
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
            write: WriteState::new(&limits),
            read: ReadState::new(BytesMut::new(), limits),
            requests: 0,
            method: Method::Get,
            informational: 0,
            keep_alive: true,
            answered: true,
        }
    }

    /// Changes what the next response may be.
    pub fn set_limits(&mut self, limits: Limits) {
        self.write.set_limits(&limits);
        self.read.limits = limits;
    }

    /// Says how heads of requests are written.
    pub fn set_spelling(&mut self, spelling: Spelling) {
        self.write.spelling = spelling;
    }

    /// Lends the buffers back until the next request.
    pub fn rest(&mut self) {
        self.read.release();
    }

    /// A stream without HTTP: everything written and read is a tunnel's.
    pub fn tunnel(io: S) -> Self {
        let mut connection = Self::new(io, Limits::default());
        connection.read.start_body(Framing::Tunnel);
        connection.write.start(Framing::Tunnel);
        connection.keep_alive = false;
        connection
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

    /// Reads the next head; informational ones come first, one at a time. `upgrade` tells whether
    /// the request asked for a 101.
    ///
    /// # Errors
    /// [`Error::Closed`] when the peer closed before or within the head; [`Error::Refused`] for a
    /// response that may not be handed on, a flood of 1xx and an unasked 101 among them.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        upgrade: bool,
    ) -> Poll<Result<ResponseHead, Error>> {
        let method = &self.method;
        let parse = |bytes: &[u8], limits: &Limits| parse_response(bytes, method, limits);
        let fast = |bytes: &[u8], limits: &Limits| fast::response(bytes, method, limits);
        let head = ready!(self.read.poll_head(&self.io, cx, fast, parse))?.ok_or(Error::Closed)?;
        if head.is_informational() {
            self.informational += 1;
            if self.informational > self.read.limits.informational {
                return Poll::Ready(Err(TOO_MANY_INFORMATIONAL.into()));
            }
            return Poll::Ready(Ok(head));
        }
        if head.status == 101 && !upgrade {
            return Poll::Ready(Err(UNEXPECTED_UPGRADE.into()));
        }
        self.keep_alive = head.keep_alive && head.framing != Framing::Tunnel;
        self.answered = true;
        self.read.start_body(head.framing);
        Poll::Ready(Ok(head))
    }

    /// The response's body, once the final head was read.
    pub fn reader(&mut self) -> Reader<'_, S> {
        Reader {
            io: &self.io,
            state: &mut self.read,
        }
    }

    /// The rest of the request.
    pub fn writer(&mut self) -> Writer<'_, S> {
        let client = Client {
            version: Version::Http11,
            keep_alive: true,
            is_head: false,
        };
        Writer {
            io: &self.io,
            state: &mut self.write,
            client,
        }
    }

    /// Whether any byte of a response has come.
    pub fn has_response_bytes(&self) -> bool {
        self.answered || self.informational > 0 || self.read.has_bytes()
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

    /// The stream, to look at.
    pub fn stream(&self) -> Ref<'_, S> {
        self.io.borrow()
    }

    /// The stream, and what was read of it and not taken: for what is no HTTP any more. What was to be written has to
    /// be flushed before.
    pub fn into_io(mut self) -> (S, Bytes) {
        let ahead = self.read.take_buffer().freeze();
        (self.io.into_inner(), ahead)
    }
}

const TOO_MANY_INFORMATIONAL: Refusal = Refusal {
    status: 502,
    detail: "http1.too_many_informational",
};
const UNEXPECTED_UPGRADE: Refusal = Refusal {
    status: 502,
    detail: "http1.unexpected_upgrade",
};
