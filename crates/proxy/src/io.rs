//! One type for every byte stream that the proxy reads and writes, down and up.
//!
//! Bytes that were read to find out what a connection speaks are put back and come again at the next read, so whoever
//! takes the stream over does not know that somebody looked.

use std::{
    cell::Cell,
    fmt,
    io::{self, IoSlice},
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf, Bytes};
use serde_json::Value;
use stats::{Counter, Gauge, Part, Tally};
use tls::session::Session;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsStream;

use crate::socket;

/// A connected byte stream.
pub struct Stream {
    inner: Inner,
    /// Read already and put back.
    ahead: Bytes,
    /// In a box: most streams of TCP are counted by whoever copies them.
    meter: Option<Box<Meter>>,
    /// splice(2) finds nothing on it, whatever comes.
    copies: Cell<bool>,
}

/// Who has ended a connection, and whether there was something on it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ended {
    /// The peer; else we.
    pub(crate) remote: bool,
    /// Something was under way that could not be finished.
    pub(crate) active: bool,
}

/// Counts the bytes of a stream.
#[derive(Debug)]
struct Meter {
    read: Tally,
    written: Tally,
    /// What a writer has and the kernel does not take.
    waiting: Part,
}

/// What carries the bytes.
enum Inner {
    Tcp(TcpStream),
    Unix(UnixStream),
    Memory(DuplexStream),
    /// In a box, so that those without pay nothing for it.
    Tls(Box<Tls>),
}

struct Tls {
    stream: TlsStream<Stream>,
    session: Arc<Session>,
    /// Who the peer is, by Istio's metadata exchange.
    peer: Option<Arc<Value>>,
}

macro_rules! each {
    ($inner:expr, $stream:ident => $body:expr) => {
        match $inner {
            Inner::Tcp($stream) => $body,
            Inner::Unix($stream) => $body,
            Inner::Memory($stream) => $body,
            Inner::Tls(tls) => {
                let $stream = &mut tls.stream;
                $body
            }
        }
    };
}

impl Stream {
    /// Puts bytes back: the next reads give them first.
    pub fn put_back(&mut self, bytes: Bytes) {
        self.ahead = if self.ahead.is_empty() {
            bytes
        } else {
            [bytes, std::mem::take(&mut self.ahead)].concat().into()
        };
    }

    /// Counts the bytes that are read and written from now on, those that were put back among them, and in `waiting` those
    /// that have to wait since the peer takes no more.
    pub(crate) fn count(&mut self, read: &Counter, written: &Counter, waiting: &Gauge) {
        read.add(self.ahead.len() as u64);
        self.meter = Some(Box::new(Meter {
            read: read.tally(),
            written: written.tally(),
            waiting: waiting.part(),
        }));
    }

    /// Counts bytes that were taken off the stream behind its back.
    pub(crate) fn count_read(&self, count: usize) {
        if let Some(meter) = &self.meter {
            meter.read.add(count as u64);
        }
    }

    /// The same for bytes that were put on it.
    pub(crate) fn count_written(&self, count: usize) {
        if let Some(meter) = &self.meter {
            meter.written.add(count as u64);
        }
    }

    /// Counts what came of a write of so many bytes.
    fn written(&self, outcome: &Poll<io::Result<usize>>, all: impl FnOnce() -> usize) {
        let Some(meter) = &self.meter else { return };
        match outcome {
            Poll::Ready(Ok(count)) => {
                meter.written.add(*count as u64);
                meter.waiting.set(0);
            }
            Poll::Ready(Err(_)) => meter.waiting.set(0),
            Poll::Pending => meter.waiting.set(all() as i64),
        }
    }

    /// Whether bytes that were put back have not been read again.
    pub fn has_ahead(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Whether a stream at rest can be used again: the peer has neither closed it nor sent anything unasked.
    ///
    /// Costs a system call only where the event loop has seen something happen on the stream. What TLS itself sends
    /// to a stream at rest (session tickets, new keys) is taken in and is not something unasked.
    pub fn is_quiet(&mut self) -> bool {
        if !self.ahead.is_empty() {
            return false;
        }
        let mut byte = [0];
        let read = match &self.inner {
            Inner::Tcp(stream) => stream.try_read(&mut byte),
            Inner::Unix(stream) => stream.try_read(&mut byte),
            Inner::Memory(_) => return true,
            Inner::Tls(_) => self.try_read(&mut byte),
        };
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// [`Stream::is_quiet`] by the kernel's word: one system call, whatever the event loop has seen.
    pub fn is_quiet_in_kernel(&self) -> bool {
        let Some(descriptor) = self.descriptor() else {
            return true;
        };
        let mut byte = [MaybeUninit::uninit()];
        let peeked = socket2::SockRef::from(&descriptor).peek(&mut byte);
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// How long ago the peer's last segment came (TCP), in steps of the kernel's clock.
    pub fn since_last_segment(&self) -> Option<Duration> {
        socket::since_last_segment(self.descriptor()?).ok()
    }

    /// Completes when the peer has closed or sent something: for streams at rest.
    pub async fn readable(&self) {
        // An error is something that happened, too; the next read tells it.
        let _ = match &self.inner {
            Inner::Tcp(stream) => stream.readable().await,
            Inner::Unix(stream) => stream.readable().await,
            Inner::Memory(_) => std::future::pending().await,
            Inner::Tls(tls) => return Box::pin(tls.stream.get_ref().0.readable()).await,
        };
    }

    /// A stream within TLS whose handshake is over.
    pub(crate) fn with_tls(stream: TlsStream<Stream>, session: Session) -> Self {
        Self {
            inner: Inner::Tls(Box::new(Tls {
                stream,
                session: Arc::new(session),
                peer: None,
            })),
            ahead: Bytes::new(),
            meter: None,
            copies: Cell::new(false),
        }
    }

    /// What TLS agreed on; `None` in clear.
    pub fn session(&self) -> Option<&Arc<Session>> {
        match &self.inner {
            Inner::Tls(tls) => Some(&tls.session),
            _ => None,
        }
    }

    /// Who the peer is, by Istio's metadata exchange, which takes TLS.
    pub(crate) fn peer(&self) -> Option<&Arc<Value>> {
        match &self.inner {
            Inner::Tls(tls) => tls.peer.as_ref(),
            _ => None,
        }
    }

    /// Keeps who the peer is.
    pub(crate) fn set_peer(&mut self, peer: Value) {
        if let Inner::Tls(tls) = &mut self.inner {
            tls.peer = Some(Arc::new(peer));
        }
    }

    /// Our address of the connection.
    pub fn local_address(&self) -> Option<SocketAddr> {
        match &self.inner {
            Inner::Tcp(stream) => stream.local_addr().ok(),
            Inner::Tls(tls) => tls.stream.get_ref().0.local_address(),
            Inner::Unix(_) | Inner::Memory(_) => None,
        }
    }

    /// The TCP stream itself, where the bytes are not wrapped in TLS.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.inner {
            Inner::Tcp(stream) => Some(stream),
            _ => None,
        }
    }

    /// The TCP stream that carries exactly the bytes that are read and written here: nothing wraps it, and no byte was
    /// put back.
    pub fn plain_tcp(&self) -> Option<&TcpStream> {
        match &self.inner {
            Inner::Tcp(stream) if self.ahead.is_empty() => Some(stream),
            _ => None,
        }
    }

    /// The same, where splice(2) has not been found to be of no use.
    pub(crate) fn spliceable(&self) -> Option<&TcpStream> {
        self.plain_tcp().filter(|_| !self.copies.get())
    }

    /// splice(2) is of no use here, for as long as the connection lives.
    pub(crate) fn never_splice(&self) {
        self.copies.set(true);
    }

    /// The descriptor, for socket options.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.inner {
            Inner::Tcp(stream) => Some(stream.as_fd()),
            Inner::Unix(stream) => Some(stream.as_fd()),
            Inner::Memory(_) => None,
            Inner::Tls(tls) => tls.stream.get_ref().0.descriptor(),
        }
    }

    /// Makes the close of this stream a reset: the peer learns that the bytes it got are not all.
    pub fn reset_on_close(&self) {
        match &self.inner {
            Inner::Tcp(stream) => {
                // If the option is refused the peer sees an ordinary close.
                let _ = socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO));
            }
            Inner::Tls(tls) => tls.stream.get_ref().0.reset_on_close(),
            Inner::Unix(_) | Inner::Memory(_) => {}
        }
    }

    /// Tries to read without waiting; `WouldBlock` where nothing is there.
    pub fn try_read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut buffer = ReadBuf::new(buffer);
        match Pin::new(self).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer) {
            Poll::Ready(done) => done.map(|()| buffer.filled().len()),
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self {
            inner: Inner::Tcp(stream),
            ahead: Bytes::new(),
            meter: None,
            copies: Cell::new(false),
        }
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self {
            inner: Inner::Unix(stream),
            ahead: Bytes::new(),
            meter: None,
            copies: Cell::new(false),
        }
    }
}

impl From<DuplexStream> for Stream {
    /// For tests and for listeners that have no socket.
    fn from(stream: DuplexStream) -> Self {
        Self {
            inner: Inner::Memory(stream),
            ahead: Bytes::new(),
            meter: None,
            copies: Cell::new(false),
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Stream");
        match &self.inner {
            Inner::Tcp(stream) => out.field("inner", stream),
            Inner::Unix(stream) => out.field("inner", stream),
            Inner::Memory(stream) => out.field("inner", stream),
            Inner::Tls(tls) => out.field("inner", &tls.session),
        };
        out.field("ahead", &self.ahead.len()).finish()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let length = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead[..length]);
            self.ahead.advance(length);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        let read = match &mut self.inner {
            Inner::Tcp(stream) => socket::poll_read(stream, context, buffer),
            Inner::Tls(tls) => tls.poll_read(context, buffer),
            inner => each!(inner, stream => Pin::new(stream).poll_read(context, buffer)),
        };
        if read.is_ready() {
            self.count_read(buffer.filled().len() - before);
        }
        read
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = match &mut self.inner {
            Inner::Tcp(stream) => socket::poll_write(stream, context, buffer),
            inner => each!(inner, stream => Pin::new(stream).poll_write(context, buffer)),
        };
        self.written(&written, || buffer.len());
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.inner, stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.inner, stream => Pin::new(stream).poll_shutdown(context))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = match &mut self.inner {
            Inner::Tcp(stream) => socket::poll_write_vectored(stream, context, buffers),
            inner => {
                each!(inner, stream => Pin::new(stream).poll_write_vectored(context, buffers))
            }
        };
        self.written(&written, || buffers.iter().map(|buffer| buffer.len()).sum());
        written
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            Inner::Tcp(stream) => stream.is_write_vectored(),
            Inner::Unix(stream) => stream.is_write_vectored(),
            Inner::Memory(stream) => stream.is_write_vectored(),
            Inner::Tls(tls) => tls.stream.is_write_vectored(),
        }
    }
}

impl Tls {
    fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.stream.get_ref().1.wants_write() {
            // What a writer handed over and the kernel did not take goes out while its task waits for bytes: nobody
            // has to flush a stream that they only read from. Errors come back with the next write.
            let _ = Pin::new(&mut self.stream).poll_flush(context);
        }
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            // An end without close_notify is an end, as for Envoy: many clients never say goodbye.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Poll::Ready(Ok(()))
            }
            read => read,
        }
    }
}

/// Connects to a socket in the file system.
pub(crate) async fn connect_unix(path: &Path) -> io::Result<Stream> {
    UnixStream::connect(path).await.map(Stream::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn what_was_put_back_comes_first() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut stream = Stream::from(near);
        far.write_all(b"hello world").await.expect("there is room");
        let mut head = [0; 5];
        stream.read_exact(&mut head).await.expect("it was sent");
        stream.put_back(Bytes::copy_from_slice(&head[3..]));
        stream.put_back(Bytes::copy_from_slice(&head[..3]));
        let mut all = [0; 11];
        stream.read_exact(&mut all).await.expect("it was sent");
        assert_eq!(&all, b"hello world");
    }

    #[tokio::test]
    async fn a_closed_stream_is_not_quiet() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let near = TcpStream::connect(address).await.expect("it listens");
        let (far, _) = listener.accept().await.expect("one has connected");
        let mut stream = Stream::from(near);
        assert!(stream.is_quiet());
        drop(far);
        stream.readable().await;
        assert!(!stream.is_quiet());
    }
}
