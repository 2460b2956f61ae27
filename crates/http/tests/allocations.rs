//! A warm connection allocates nothing: the promise that the hot path is built on.
//!
//! `unsafe` because a global allocator is; it hands everything to the system's.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::BytesMut;
use outrigger_http::{Frame, Framing, Limits, ResponseHead, h1, h2};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A client that sends one request whenever it was read empty, and takes every answer.
struct Client {
    request: &'static [u8],
    at: usize,
    rest: bool,
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.at == self.request.len() {
            // As a socket: after each request there is nothing for a while.
            self.at = 0;
            self.rest = true;
        }
        if std::mem::take(&mut self.rest) {
            return Poll::Pending;
        }
        let piece = &self.request[self.at..];
        let length = piece.len().min(buffer.remaining());
        buffer.put_slice(&piece[..length]);
        self.at += length;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Polls until it is ready; our client is never really busy.
fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(done) = future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            return done;
        }
    }
}

#[test]
fn a_warm_connection_serves_requests_without_allocating() {
    let request = b"POST /path?query HTTP/1.1\r\nHost: example.com\r\nUser-Agent: x\r\n\
        Content-Length: 5\r\nX-Forwarded-For: 10.0.0.1\r\n\r\nhello";
    let client = Client {
        request,
        at: 0,
        rest: false,
    };
    let mut connection = h1::ServerConnection::new(client, BytesMut::new(), Limits::default());
    let mut exchange = || {
        let head = run(connection.read_head()).unwrap().unwrap();
        let (mut reader, mut writer) = connection.split();
        let mut response = ResponseHead::new(200);
        response.headers.append("content-length", "5");
        response.headers.append("x-path", head.path());
        writer.send_response(&response, Framing::Length(5));
        while let Some(frame) = run(std::future::poll_fn(|cx| reader.poll_frame(cx))) {
            if let Frame::Data(data) = frame.unwrap() {
                writer.send_data(data).unwrap();
            }
        }
        writer.send_end(None).unwrap();
        run(writer.flush()).unwrap();
        assert!(connection.is_reusable());
    };
    (0..10).for_each(|_| exchange());
    let before = COUNT.get();
    (0..100).for_each(|_| exchange());
    assert_eq!(COUNT.get() - before, 0, "allocations in 100 requests");
}

/// The same over HTTP/2: a stream with a message whenever it was read empty.
struct Http2Client {
    ahead: Vec<u8>,
    stream: u32,
    rest: bool,
}

impl Http2Client {
    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let ahead = &mut self.ahead;
        ahead.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
        ahead.extend_from_slice(&[kind, flags]);
        ahead.extend_from_slice(&stream.to_be_bytes());
        ahead.extend_from_slice(payload);
    }
}

impl AsyncRead for Http2Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.ahead.is_empty() {
            self.rest = !self.rest;
            if self.rest {
                return Poll::Pending;
            }
            let stream = self.stream;
            self.stream += 2;
            // POST http://h/, a new field and one that enters the table; then the message.
            let block = b"\x83\x86\x84\x41\x01h\x00\x01x\x03abc\x40\x01y\x02de";
            self.frame(1, 4, stream, block);
            self.frame(0, 1, stream, b"hello");
        }
        let length = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..length]);
        self.ahead.drain(..length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Http2Client {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn a_warm_http2_connection_serves_streams_without_allocating() {
    let mut client = Http2Client {
        ahead: h2::PREFACE.to_vec(),
        stream: 1,
        rest: false,
    };
    client.frame(4, 0, 0, &[]);
    let settings = h2::Settings::default();
    let mut connection = run(h2::ServerConnection::handshake(client, &settings)).unwrap();
    let mut exchange = || {
        let (head, mut reader, mut writer) = run(connection.accept()).unwrap().unwrap();
        let mut response = ResponseHead::new(200);
        response.headers.append("content-length", "5");
        response.headers.append("x-path", head.path());
        writer.send_response(&response, Framing::Length(5)).unwrap();
        // Whoever drives the connection reads what follows the head.
        let mut cx = Context::from_waker(Waker::noop());
        assert!(connection.poll_accept(&mut cx).is_pending());
        while let Some(frame) = run(std::future::poll_fn(|cx| reader.poll_frame(cx))) {
            if let Frame::Data(data) = frame.unwrap() {
                writer.send_data(data).unwrap();
            }
        }
        writer.send_end(None).unwrap();
    };
    // Until the tables and the list of streams that ended are as large as they get.
    (0..300).for_each(|_| exchange());
    let before = COUNT.get();
    (0..100).for_each(|_| exchange());
    // A read buffer that is full while data in it is still to be read gives way to another.
    let count = COUNT.get() - before;
    assert!(count <= 2, "{count} allocations in 100 streams");
}
