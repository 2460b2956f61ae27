//! Bytes from one stream to another, with half-close.
//!
//! A connection that waits holds no buffer: bytes are read into the stack and written on at once. Only what the other
//! side does not take is kept, and nothing more is read until it is gone, so a slow reader slows the writer.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::io::Stream;

/// What passes between two streams, as it goes.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Bytes from the first to the second.
    pub(crate) forth: Cell<u64>,
    /// Bytes from the second to the first.
    pub(crate) back: Cell<u64>,
    /// When bytes last passed.
    pub(crate) last: Cell<Instant>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            forth: Cell::new(0),
            back: Cell::new(0),
            last: Cell::new(Instant::now()),
        }
    }
}

/// Which side ended the exchange, where it did not end well.
#[derive(Debug)]
pub(crate) enum CopyError {
    /// Reading from or writing to the first stream failed.
    First(io::Error),
    /// Reading from or writing to the second stream failed.
    Second(io::Error),
}

impl CopyError {
    /// What the system said.
    pub(crate) fn reason(&self) -> &io::Error {
        match self {
            Self::First(error) | Self::Second(error) => error,
        }
    }
}

/// Copies both ways until both sides have ended. The end of one direction is passed on as a half-close.
///
/// Can be dropped at any time; bytes that were read and not written are lost then.
pub(crate) async fn both_ways(
    first: &mut Stream,
    second: &mut Stream,
    progress: &Progress,
) -> Result<(), CopyError> {
    let (mut forth, mut back) = (Direction::default(), Direction::default());
    poll_fn(|context| {
        let one = forth
            .poll(context, first, second, &progress.forth, &progress.last)
            .map_err(|error| error.on(CopyError::First, CopyError::Second))?;
        let other = back
            .poll(context, second, first, &progress.back, &progress.last)
            .map_err(|error| error.on(CopyError::Second, CopyError::First))?;
        if one.is_ready() && other.is_ready() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// What is under way in one direction.
#[derive(Debug, Default)]
struct Direction {
    /// Read and not taken yet, from `start` on.
    left: Vec<u8>,
    start: usize,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Stage {
    #[default]
    Open,
    /// The reader has ended, the writer has not been told.
    Ended,
    Done,
}

enum Side {
    Read(io::Error),
    Write(io::Error),
}

impl Side {
    fn on(self, read: fn(io::Error) -> CopyError, write: fn(io::Error) -> CopyError) -> CopyError {
        match self {
            Self::Read(error) => read(error),
            Self::Write(error) => write(error),
        }
    }
}

impl Direction {
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        count: &Cell<u64>,
        last: &Cell<Instant>,
    ) -> Poll<Result<(), Side>> {
        let (mut from, mut to) = (Pin::new(from), Pin::new(to));
        loop {
            if self.start < self.left.len() {
                let rest = &self.left[self.start..];
                let written = ready!(to.as_mut().poll_write(context, rest)).map_err(Side::Write)?;
                self.start += took(written, count, last)?;
                continue;
            }
            if !self.left.is_empty() {
                (self.left, self.start) = (Vec::new(), 0);
            }
            match self.stage {
                Stage::Done => return Poll::Ready(Ok(())),
                Stage::Ended => {
                    // The peer may be gone already, which is the other direction's business.
                    let _ = ready!(to.as_mut().poll_shutdown(context));
                    self.stage = Stage::Done;
                    continue;
                }
                Stage::Open => {}
            }
            let mut stack = [MaybeUninit::uninit(); READ_SIZE];
            let mut buffer = ReadBuf::uninit(&mut stack);
            ready!(from.as_mut().poll_read(context, &mut buffer)).map_err(Side::Read)?;
            let mut rest = buffer.filled();
            if rest.is_empty() {
                self.stage = Stage::Ended;
                continue;
            }
            last.set(Instant::now());
            while !rest.is_empty() {
                match to.as_mut().poll_write(context, rest).map_err(Side::Write)? {
                    Poll::Ready(written) => rest = &rest[took(written, count, last)?..],
                    Poll::Pending => {
                        self.left = rest.to_vec();
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

fn took(written: usize, count: &Cell<u64>, last: &Cell<Instant>) -> Result<usize, Side> {
    if written == 0 {
        return Err(Side::Write(io::ErrorKind::WriteZero.into()));
    }
    count.set(count.get() + written as u64);
    last.set(Instant::now());
    Ok(written)
}

/// On the stack, so its size costs nothing while a connection waits.
const READ_SIZE: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    async fn pair() -> (TcpStream, Stream) {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let far = TcpStream::connect(address).await.expect("it listens");
        let (near, _) = listener.accept().await.expect("one has connected");
        (far, near.into())
    }

    #[tokio::test]
    async fn a_half_close_passes_and_the_answer_still_comes() {
        let (mut client, mut near) = pair().await;
        let (mut server, mut far) = pair().await;
        let progress = Progress::default();
        let ask = async {
            client.write_all(b"question").await.expect("it is open");
            client.shutdown().await.expect("it is open");
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.expect("it ends well");
            assert_eq!(answer, vec![7; 1_000_000]);
        };
        let answer = async {
            let mut question = Vec::new();
            server
                .read_to_end(&mut question)
                .await
                .expect("the half-close comes through");
            assert_eq!(question, b"question");
            server
                .write_all(&vec![7; 1_000_000])
                .await
                .expect("it is read");
            server.shutdown().await.expect("it is open");
        };
        let (copied, ..) = tokio::join!(both_ways(&mut near, &mut far, &progress), ask, answer);
        copied.expect("both sides ended well");
        assert_eq!((progress.forth.get(), progress.back.get()), (8, 1_000_000));
    }

    #[tokio::test]
    async fn a_reset_is_told_apart_by_side() {
        let (client, mut near) = pair().await;
        let (_server, mut far) = pair().await;
        client.set_zero_linger().expect("it is a socket");
        drop(client);
        let progress = Progress::default();
        let error = both_ways(&mut near, &mut far, &progress)
            .await
            .expect_err("it was reset");
        assert!(matches!(error, CopyError::First(_)), "{error:?}");
    }
}
