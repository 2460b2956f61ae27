//! The writing half of a connection.
//!
//! Writes are collected and leave in as few system calls as there are reasons to wait: a head and
//! a small body go out together, large data goes out by reference with what surrounds it.

use std::{
    cell::{Ref, RefCell},
    future::poll_fn,
    io::{self, IoSlice, Write},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use super::parse::content_length;
use crate::{
    Error, Framing, Headers, Limits, Method, RequestHead, ResponseHead, Version, buffer,
    head::reason, headers::Name,
};

/// State of the writing half.
#[derive(Debug)]
pub(super) struct WriteState {
    /// Collected bytes; those before `sent` have left.
    buffer: Vec<u8>,
    sent: usize,
    /// Data that was too large to copy; it goes behind `buffer`.
    tail: Bytes,
    /// Ends the chunk whose data is `tail`.
    suffix: &'static [u8],
    framing: Framing,
    /// The message was ended.
    ended: bool,
    /// The connection ends with this message.
    pub(super) closing: bool,
    /// Bytes of body data written for the current message.
    written: u64,
    pub(super) spelling: Spelling,
    /// Trailers are written, and not dropped.
    trailers: bool,
}

/// How heads are written; what the peer wrote is kept otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spelling {
    /// Names of headers as `Proper-Case` (`header_key_format.proper_case_words`).
    pub proper_case: bool,
    /// Targets of requests with scheme and host (`send_fully_qualified_url`).
    pub absolute_url: bool,
}

impl WriteState {
    pub(super) fn new(limits: &Limits) -> WriteState {
        WriteState {
            buffer: Vec::new(),
            sent: 0,
            tail: Bytes::new(),
            suffix: b"",
            framing: Framing::None,
            ended: true,
            closing: false,
            written: 0,
            spelling: Spelling::default(),
            trailers: limits.trailers,
        }
    }

    pub(super) fn set_limits(&mut self, limits: &Limits) {
        self.trailers = limits.trailers;
    }

    pub(super) fn is_done(&self) -> bool {
        self.ended && !self.has_pending()
    }

    fn has_pending(&self) -> bool {
        self.buffer.len() > self.sent || !self.tail.is_empty() || !self.suffix.is_empty()
    }

    fn out(&mut self) -> &mut Vec<u8> {
        if self.buffer.capacity() == 0 {
            self.buffer = buffer::take_write();
        }
        &mut self.buffer
    }

    pub(super) fn start(&mut self, framing: Framing) {
        self.framing = framing;
        self.ended = false;
        self.written = 0;
    }

    pub(super) fn request(&mut self, head: &RequestHead, framing: Framing) {
        let spelling = self.spelling;
        let out = self.out();
        out.extend_from_slice(head.method.as_str().as_bytes());
        out.push(b' ');
        if spelling.absolute_url && head.path().starts_with('/') {
            out.extend_from_slice(head.scheme().as_bytes());
            out.extend_from_slice(b"://");
            out.extend_from_slice(head.authority().as_bytes());
        }
        match head.path_bytes() {
            b"" => out.extend_from_slice(head.authority_bytes()),
            path => out.extend_from_slice(path),
        }
        out.extend_from_slice(b" HTTP/1.1\r\n");
        let fields = out.len();
        // Nothing is written before the peer agrees: were it told of a body (Envoy says that it is chunked), a server that
        // wants all of it before it answers would wait for good.
        let announced = match framing {
            Framing::Chunked if head.upgrade => Framing::Tunnel,
            framing => framing,
        };
        lines(out, &head.headers, announced);
        // A method that may have content says that there is none (RFC 9110, 8.6): some servers answer 411 otherwise.
        if framing == Framing::None
            && !head.upgrade
            && !matches!(
                head.method,
                Method::Get | Method::Head | Method::Delete | Method::Trace | Method::Connect
            )
            && head.headers.get("content-length").map(content_length) != Some(Ok(0))
        {
            out.extend_from_slice(b"content-length: 0\r\n");
        }
        if head.upgrade && head.headers.contains("upgrade") {
            out.extend_from_slice(b"connection: upgrade\r\n");
        }
        spelling.apply(&mut out[fields..]);
        out.extend_from_slice(b"\r\n");
        // Data of a tunnel starts only when the peer has agreed to it.
        self.start(if head.upgrade {
            Framing::Tunnel
        } else {
            framing
        });
    }

    pub(super) fn response(&mut self, head: &ResponseHead, framing: Framing, client: Client) {
        let mut framing = framing;
        if client.version == Version::Http10 && framing == Framing::Chunked {
            framing = Framing::UntilClose;
        }
        if framing == Framing::UntilClose || !head.keep_alive || !client.keep_alive {
            self.closing = true;
        }
        let (closing, spelling) = (self.closing, self.spelling);
        let out = self.out();
        match &head.reason {
            None => status_line(out, head.status),
            Some(phrase) => {
                let phrase = phrase.chars().filter(|letter| !letter.is_control());
                let _ = write!(out, "HTTP/1.1 {} ", head.status);
                phrase.for_each(|letter| drop(write!(out, "{letter}")));
                out.extend_from_slice(b"\r\n");
            }
        }
        let fields = out.len();
        match framing {
            // What a HEAD would have got is told by the fields that the upstream sent.
            Framing::None if client.is_head || matches!(head.status, 204 | 304) => {
                head.headers.write_lines(out, |name, _| {
                    head.status == 204 && name.is("content-length")
                });
            }
            _ => lines(out, &head.headers, framing),
        }
        if framing == Framing::None
            && !client.is_head
            && !matches!(head.status, 100..=199 | 204 | 304)
            && !head.headers.contains("content-length")
        {
            out.extend_from_slice(b"content-length: 0\r\n");
        }
        if head.status == 101 {
            out.extend_from_slice(b"connection: upgrade\r\n");
        } else if framing == Framing::Tunnel {
        } else if closing {
            out.extend_from_slice(b"connection: close\r\n");
        } else if client.version == Version::Http10 {
            out.extend_from_slice(b"connection: keep-alive\r\n");
        }
        spelling.apply(&mut out[fields..]);
        out.extend_from_slice(b"\r\n");
        self.start(framing);
    }

    pub(super) fn informational(&mut self, status: u16, headers: &Headers) {
        let spelling = self.spelling;
        let out = self.out();
        status_line(out, status);
        let fields = out.len();
        headers.write_lines(out, |_, _| false);
        spelling.apply(&mut out[fields..]);
        out.extend_from_slice(b"\r\n");
    }

    fn data(&mut self, data: Bytes) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        self.written += data.len() as u64;
        let chunked = match self.framing {
            Framing::Length(length) if self.written > length => return Err(Error::Length),
            Framing::None => return Err(Error::Length),
            Framing::Chunked => true,
            _ => false,
        };
        debug_assert!(
            self.tail.is_empty() && self.suffix.is_empty(),
            "poll_ready comes first"
        );
        let out = self.out();
        if chunked {
            let _ = write!(out, "{:x}\r\n", data.len());
        }
        if data.len() <= COPIED && out.len() + data.len() <= COLLECTED {
            out.extend_from_slice(&data);
            if chunked {
                out.extend_from_slice(b"\r\n");
            }
        } else {
            self.tail = data;
            self.suffix = if chunked { b"\r\n" } else { b"" };
        }
        Ok(())
    }

    fn end(&mut self, trailers: Option<&Headers>) -> Result<(), Error> {
        if self.ended {
            return Ok(());
        }
        match self.framing {
            Framing::Length(length) if length != self.written => return Err(Error::Length),
            Framing::Chunked => {
                let mut last = Vec::new();
                let trailers = trailers.filter(|_| self.trailers);
                let spelling = self.spelling;
                let behind_tail = !self.tail.is_empty() || !self.suffix.is_empty();
                let out = if behind_tail { &mut last } else { self.out() };
                out.extend_from_slice(b"0\r\n");
                if let Some(trailers) = trailers {
                    let fields = out.len();
                    trailers.write_lines(out, |_, _| false);
                    spelling.apply(&mut out[fields..]);
                }
                out.extend_from_slice(b"\r\n");
                if behind_tail && trailers.is_none_or(Headers::is_empty) {
                    self.suffix = b"\r\n0\r\n\r\n";
                } else if behind_tail {
                    // Rare: trailers behind data that is still waiting. Copy, once.
                    let tail = std::mem::take(&mut self.tail);
                    let suffix = std::mem::take(&mut self.suffix);
                    let out = self.out();
                    out.extend_from_slice(&tail);
                    out.extend_from_slice(suffix);
                    out.extend_from_slice(&last);
                }
            }
            _ => {}
        }
        self.ended = true;
        Ok(())
    }

    /// Room for another piece of data.
    fn poll_ready<S: AsyncWrite + Unpin>(
        &mut self,
        io: &RefCell<S>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Error>> {
        if self.tail.is_empty()
            && self.suffix.is_empty()
            && self.buffer.len() - self.sent < COLLECTED
        {
            return Poll::Ready(Ok(()));
        }
        self.poll_flush(io, cx)
    }

    pub(super) fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        io: &RefCell<S>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Error>> {
        if !self.has_pending() {
            return Poll::Ready(Ok(()));
        }
        let mut io = io.borrow_mut();
        while self.has_pending() {
            let head = &self.buffer[self.sent..];
            let count = if self.tail.is_empty() && self.suffix.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, head))?
            } else {
                let slices = [
                    IoSlice::new(head),
                    IoSlice::new(&self.tail),
                    IoSlice::new(self.suffix),
                ];
                let first = usize::from(head.is_empty());
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[first..]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
            self.advance(count);
        }
        buffer::give_write(std::mem::take(&mut self.buffer));
        self.sent = 0;
        ready!(Pin::new(&mut *io).poll_flush(cx))?;
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut count: usize) {
        let head = (self.buffer.len() - self.sent).min(count);
        self.sent += head;
        count -= head;
        let tail = self.tail.len().min(count);
        self.tail.advance(tail);
        count -= tail;
        self.suffix = &self.suffix[count..];
        if self.sent == self.buffer.len() {
            self.buffer.clear();
            self.sent = 0;
        }
    }
}

impl Spelling {
    /// Spells the names of written lines: each letter that begins a word is a capital, the others small, as Envoy's
    /// `proper_case_words` makes them of its lower-case names.
    fn apply(self, lines: &mut [u8]) {
        if !self.proper_case {
            return;
        }
        for line in lines.split_mut(|&byte| byte == b'\n') {
            let mut begins = true;
            for byte in line.iter_mut().take_while(|byte| **byte != b':') {
                match begins {
                    true => byte.make_ascii_uppercase(),
                    false => byte.make_ascii_lowercase(),
                }
                begins = !byte.is_ascii_alphanumeric();
            }
        }
    }
}

/// What the client of a response can take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client {
    pub(super) version: Version,
    pub(super) keep_alive: bool,
    pub(super) is_head: bool,
}

fn status_line(out: &mut Vec<u8>, status: u16) {
    if status == 200 {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    } else {
        let _ = write!(out, "HTTP/1.1 {status} {}\r\n", reason(status));
    }
}

/// The fields and what delimits the body. Exactly one of them says the length.
fn lines(out: &mut Vec<u8>, headers: &Headers, framing: Framing) {
    match framing {
        Framing::Length(length) => {
            let mut told = false;
            headers.write_lines(out, |name, value| {
                let is_length = name.is("content-length");
                let keep = is_length && !told && content_length(value) == Ok(length);
                told |= keep;
                is_length && !keep || connection_field(name)
            });
            if !told {
                let _ = write!(out, "content-length: {length}\r\n");
            }
        }
        Framing::None => headers.write_lines(out, |name, value| {
            connection_field(name) || name.is("content-length") && content_length(value) != Ok(0)
        }),
        Framing::Chunked | Framing::UntilClose | Framing::Tunnel => {
            headers.write_lines(out, |name, _| {
                connection_field(name) || name.is("content-length")
            });
            if framing == Framing::Chunked {
                out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            }
        }
    }
}

/// Fields that this codec alone writes; a filter or a route cannot.
#[inline(always)]
fn connection_field(name: Name<'_>) -> bool {
    name.is("connection") || name.is("transfer-encoding")
}

/// Writes the body of the message whose head was written last.
#[derive(Debug)]
pub struct Writer<'a, S> {
    pub(super) io: &'a RefCell<S>,
    pub(super) state: &'a mut WriteState,
    pub(super) client: Client,
}

impl<S: AsyncWrite + Unpin> Writer<'_, S> {
    /// Writes a response's head. The codec says how the body is delimited, from `framing`; with
    /// [`Framing::UntilClose`], or for a client that cannot go on, it also ends the connection.
    pub fn send_response(&mut self, head: &ResponseHead, framing: Framing) {
        self.state.response(head, framing, self.client);
    }

    /// Writes a 1xx response. HTTP/1.0 has none, so nothing is written there.
    pub fn send_informational(&mut self, status: u16, headers: &Headers) {
        if self.client.version != Version::Http10 {
            self.state.informational(status, headers);
        }
    }

    /// Writes a request's head.
    pub fn send_request(&mut self, head: &RequestHead, framing: Framing) {
        self.state.request(head, framing);
    }

    /// Waits for room for one more piece of data. Nothing is written while there is room.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.state.poll_ready(self.io, cx)
    }

    /// Takes a piece of the body; only after [`Writer::poll_ready`].
    ///
    /// # Errors
    /// [`Error::Length`] when the declared length is exceeded.
    pub fn send_data(&mut self, data: Bytes) -> Result<(), Error> {
        self.state.data(data)
    }

    /// Ends the message.
    ///
    /// # Errors
    /// [`Error::Length`] when less than the declared length was written.
    pub fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), Error> {
        self.state.end(trailers)
    }

    /// Hands everything to the system.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.state.poll_flush(self.io, cx)
    }

    /// [`Writer::poll_flush`] as a future.
    pub async fn flush(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// How much data of a body with a declared length may be put on the stream by somebody else, who says so with
    /// [`Writer::passed`]; `None` where there is no such body, or something of ours stands before it.
    pub fn room(&self) -> Option<u64> {
        match self.state.framing {
            Framing::Length(length) if !self.state.ended && !self.state.has_pending() => {
                Some(length - self.state.written)
            }
            _ => None,
        }
    }

    /// So many bytes of data were put on the stream.
    pub fn passed(&mut self, count: u64) {
        self.state.written += count;
    }

    /// The stream.
    pub fn io(&self) -> Ref<'_, S> {
        self.io.borrow()
    }

    /// Makes this message the last of the connection; before its head is written this is said in
    /// the head.
    pub fn close_after(&mut self) {
        self.state.closing = true;
    }

    /// Closes our direction, once everything is written (the end of a tunnel's half).
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        ready!(self.state.poll_flush(self.io, cx))?;
        ready!(Pin::new(&mut *self.io.borrow_mut()).poll_shutdown(cx))?;
        if self.state.framing == Framing::Tunnel {
            // This is how a tunnel's half ends; any other message would be cut off.
            self.state.ended = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Whether the message was written to its end.
    pub fn is_end(&self) -> bool {
        self.state.ended
    }
}

/// Data up to this size is copied behind what is collected.
const COPIED: usize = 16 * 1024;
/// More than this is not collected.
const COLLECTED: usize = 64 * 1024;
