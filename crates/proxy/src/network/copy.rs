//! Bytes from one stream to another, with half-close.
//!
//! A connection that waits holds no buffer: bytes are read into the stack and written on at once. Only what the other
//! side does not take is kept, and nothing more is read until it is gone, so a slow reader slows the writer. Where bytes
//! stream between two plain TCP connections they go through a pipe of the kernel instead ([`super::splice`]).

use std::{
    cell::{Cell, OnceCell},
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use stats::Part;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use crate::{
    io::Stream,
    splice::{self, Lease, PIPE_SIZE},
};

/// What bytes are copied from and to.
pub(crate) trait End: AsyncRead + AsyncWrite + Unpin {
    /// The TCP stream that carries exactly the bytes that are read and written here, where there is one.
    fn plain_tcp(&self) -> Option<&TcpStream>;
}

impl End for Stream {
    fn plain_tcp(&self) -> Option<&TcpStream> {
        self.plain_tcp()
    }
}

/// What passes between two streams, as it goes.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Bytes from the first to the second.
    pub(crate) forth: Cell<u64>,
    /// Bytes from the second to the first.
    pub(crate) back: Cell<u64>,
    /// When bytes last passed.
    pub(crate) last: Cell<Instant>,
    /// How often the first stream was not read any more because the second took no more, and was read again.
    pub(crate) paused: Cell<u64>,
    pub(crate) resumed: Cell<u64>,
    /// Where bytes count that the second stream does not take, and those that the first does not.
    pub(crate) waiting: [OnceCell<Part>; 2],
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            forth: Cell::new(0),
            back: Cell::new(0),
            last: Cell::new(Instant::now()),
            paused: Cell::new(0),
            resumed: Cell::new(0),
            waiting: Default::default(),
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

/// How the exchange ended well.
#[derive(Debug, PartialEq)]
pub(crate) enum Copied {
    /// Both sides have ended.
    Whole,
    /// We were asked to stop, between two pieces.
    Stopped,
}

/// Copies both ways until both sides have ended, or `stops` says so after bytes have passed. The end of one direction is passed on as a half-close. `may_splice`
/// lets bytes that stream go through the kernel alone.
///
/// Can be dropped at any time; bytes that were read and not written are lost then.
pub(crate) async fn both_ways(
    first: &mut impl End,
    second: &mut impl End,
    progress: &Progress,
    may_splice: bool,
    stops: impl Fn() -> bool,
) -> Result<Copied, CopyError> {
    let mode = if may_splice {
        Mode::Watch { large: 0 }
    } else {
        Mode::Copy
    };
    let (mut forth, mut back) = (Direction::new(mode), Direction::new(mode));
    poll_fn(|context| {
        let had = (progress.forth.get(), progress.back.get());
        let was_paused = forth.is_paused();
        let one = forth
            .poll(context, first, second, &progress.forth)
            .map_err(|error| error.on(CopyError::First, CopyError::Second))?;
        let other = back
            .poll(context, second, first, &progress.back)
            .map_err(|error| error.on(CopyError::Second, CopyError::First))?;
        let moved = had != (progress.forth.get(), progress.back.get());
        if moved {
            progress.last.set(Instant::now());
        }
        for (part, direction) in progress.waiting.iter().zip([&forth, &back]) {
            if let Some(part) = part.get() {
                part.set(direction.waiting() as i64);
            }
        }
        match (was_paused, forth.is_paused()) {
            (false, true) => progress.paused.set(progress.paused.get() + 1),
            (true, false) => progress.resumed.set(progress.resumed.get() + 1),
            _ => {}
        }
        if one.is_ready() && other.is_ready() {
            Poll::Ready(Ok(Copied::Whole))
        } else if moved && !forth.is_paused() && !back.is_paused() && stops() {
            Poll::Ready(Ok(Copied::Stopped))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// What is under way in one direction.
#[derive(Debug)]
struct Direction {
    /// Read and not taken yet, from `start` on.
    left: Vec<u8>,
    start: usize,
    stage: Stage,
    mode: Mode,
    /// While something is in it, and while more may come at once.
    pipe: Option<Lease>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Open,
    /// The reader has ended, the writer has not been told.
    Ended,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// Through this process, always.
    Copy,
    /// Through this process until it streams: so many large reads in a row.
    Watch { large: u8 },
    /// Through a pipe until it stops streaming: so many small reads in a row.
    Splice { small: u8 },
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
    fn new(mode: Mode) -> Self {
        Self {
            left: Vec::new(),
            start: 0,
            stage: Stage::Open,
            mode,
            pipe: None,
        }
    }

    /// Whether bytes wait that the writer does not take.
    fn is_paused(&self) -> bool {
        self.waiting() > 0
    }

    /// How many bytes the writer has not taken yet.
    fn waiting(&self) -> usize {
        let piped = self.pipe.as_ref().map_or(0, |pipe| pipe.filled());
        self.left.len() - self.start + piped
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut impl End,
        to: &mut impl End,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Side>> {
        loop {
            ready!(self.poll_left(context, to, count))?;
            match self.stage {
                Stage::Done => return Poll::Ready(Ok(())),
                Stage::Ended => {
                    // The peer may be gone already, which is the other direction's business.
                    let _ = ready!(Pin::new(&mut *to).poll_shutdown(context));
                    self.stage = Stage::Done;
                    continue;
                }
                Stage::Open => {}
            }
            if matches!(self.mode, Mode::Splice { .. }) {
                match (from.plain_tcp(), to.plain_tcp()) {
                    (Some(from), Some(to)) => {
                        ready!(self.poll_splice(context, from, to, count))?;
                        continue;
                    }
                    _ => self.mode = Mode::Copy,
                }
            }
            ready!(self.poll_copy(context, from, to, count))?;
        }
    }

    /// Writes what is left of the last read.
    fn poll_left(
        &mut self,
        context: &mut Context<'_>,
        to: &mut impl End,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Side>> {
        while self.start < self.left.len() {
            let rest = &self.left[self.start..];
            let written = Pin::new(&mut *to).poll_write(context, rest);
            self.start += took(ready!(written).map_err(Side::Write)?, count)?;
        }
        if !self.left.is_empty() {
            (self.left, self.start) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }

    /// One read, and the writes that it leads to.
    fn poll_copy(
        &mut self,
        context: &mut Context<'_>,
        from: &mut impl End,
        to: &mut impl End,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Side>> {
        let mut stack = [MaybeUninit::uninit(); READ_SIZE];
        let mut buffer = ReadBuf::uninit(&mut stack);
        ready!(Pin::new(from).poll_read(context, &mut buffer)).map_err(Side::Read)?;
        let mut rest = buffer.filled();
        if rest.is_empty() {
            self.stage = Stage::Ended;
            return Poll::Ready(Ok(()));
        }
        if let Mode::Watch { large } = self.mode {
            self.mode = match large {
                _ if rest.len() < STREAMS => Mode::Watch { large: 0 },
                LARGE_READS.. => Mode::Splice { small: 0 },
                large => Mode::Watch { large: large + 1 },
            };
        }
        while !rest.is_empty() {
            match Pin::new(&mut *to)
                .poll_write(context, rest)
                .map_err(Side::Write)?
            {
                Poll::Ready(written) => rest = &rest[took(written, count)?..],
                Poll::Pending => {
                    self.left = rest.to_vec();
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Moves bytes until one side has none or takes none, or until the direction has ended.
    fn poll_splice(
        &mut self,
        context: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Side>> {
        loop {
            let Some(pipe) = &mut self.pipe else {
                match Lease::take() {
                    Ok(pipe) => self.pipe = Some(pipe),
                    // Out of descriptors: the other way needs none.
                    Err(error) => {
                        tracing::debug!(%error, "no pipe for splice");
                        self.mode = Mode::Copy;
                        return Poll::Ready(Ok(()));
                    }
                }
                continue;
            };
            if pipe.filled() > 0 {
                let written = ready!(pipe.poll_drain(context, to)).map_err(Side::Write)?;
                took(written, count)?;
                continue;
            }
            match pipe.poll_fill(context, from, PIPE_SIZE) {
                Poll::Pending => {
                    // A connection that waits holds no pipe.
                    self.pipe = None;
                    return Poll::Pending;
                }
                Poll::Ready(Ok(0)) => {
                    self.pipe = None;
                    self.stage = Stage::Ended;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(read)) => {
                    let Mode::Splice { small } = &mut self.mode else {
                        continue;
                    };
                    *small = if read < STREAMS {
                        small.saturating_add(1)
                    } else {
                        0
                    };
                    if *small > SMALL_READS {
                        // For small pieces two copies are cheaper than two more calls.
                        let filled = ready!(self.finish_splice(context, to, count));
                        return Poll::Ready(filled);
                    }
                }
                Poll::Ready(Err(error)) if splice::is_unsupported(&error) => {
                    self.pipe = None;
                    self.mode = Mode::Copy;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Side::Read(error))),
            }
        }
    }

    /// Empties the pipe and goes back to copying. Where the writer takes no more, the pipe is emptied by the next poll.
    fn finish_splice(
        &mut self,
        context: &mut Context<'_>,
        to: &TcpStream,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Side>> {
        while let Some(pipe) = &mut self.pipe
            && pipe.filled() > 0
        {
            took(
                ready!(pipe.poll_drain(context, to)).map_err(Side::Write)?,
                count,
            )?;
        }
        self.pipe = None;
        self.mode = Mode::Watch { large: 0 };
        Poll::Ready(Ok(()))
    }
}

fn took(written: usize, count: &Cell<u64>) -> Result<usize, Side> {
    if written == 0 {
        return Err(Side::Write(io::ErrorKind::WriteZero.into()));
    }
    count.set(count.get() + written as u64);
    Ok(written)
}

/// On the stack, so its size costs nothing while a connection waits.
const READ_SIZE: usize = 64 * 1024;

/// A read of so many bytes belongs to a stream, not to a dialogue.
const STREAMS: usize = 16 * 1024;
/// So many reads like that, and one more, begin to splice; so many smaller ones, and one more, end it.
const LARGE_READS: u8 = 2;
const SMALL_READS: u8 = 8;

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
        let (copied, ..) = tokio::join!(
            both_ways(&mut near, &mut far, &progress, true, || false),
            ask,
            answer
        );
        copied.expect("both sides ended well");
        assert_eq!((progress.forth.get(), progress.back.get()), (8, 1_000_000));
    }

    /// Both ways at once, so much that the directions go over to splicing, with a reader that pauses.
    #[tokio::test]
    async fn streams_pass_whole_with_and_without_splice() {
        for may_splice in [true, false] {
            let (client, mut near) = pair().await;
            let (server, mut far) = pair().await;
            let progress = Progress::default();
            let data: Vec<u8> = (0..8_000_000u32)
                .map(|n| (n.wrapping_mul(31) >> 3) as u8)
                .collect();
            let both = async |stream: TcpStream, pause: bool| {
                let (mut read, mut write) = stream.into_split();
                let send = async {
                    write.write_all(&data).await.expect("it is open");
                    write.shutdown().await.expect("it is open");
                };
                let receive = async {
                    let mut got = Vec::new();
                    let mut piece = vec![0; 100_000];
                    loop {
                        let read = read.read(&mut piece).await.expect("it ends well");
                        if read == 0 {
                            return got;
                        }
                        got.extend_from_slice(&piece[..read]);
                        if pause {
                            tokio::task::yield_now().await;
                        }
                    }
                };
                let ((), got) = tokio::join!(send, receive);
                assert!(got == data, "the bytes are the same");
            };
            let copy = both_ways(&mut near, &mut far, &progress, may_splice, || false);
            let (copied, ..) = tokio::join!(copy, both(client, true), both(server, false));
            copied.expect("both sides ended well");
            let length = data.len() as u64;
            assert_eq!(
                (progress.forth.get(), progress.back.get()),
                (length, length)
            );
        }
    }

    /// Bytes that stand in the pipe when the dialogue begins again are not lost.
    #[tokio::test]
    async fn a_stream_becomes_a_dialogue_again() {
        let (mut client, mut near) = pair().await;
        let (mut server, mut far) = pair().await;
        let progress = Progress::default();
        let talk = async {
            let bulk = vec![1; 1_000_000];
            let mut got = vec![0; bulk.len()];
            let (sent, read) = tokio::join!(client.write_all(&bulk), server.read_exact(&mut got));
            sent.and(read.map(|_| ())).expect("it is open");
            for round in 0..50u8 {
                client.write_all(&[round; 100]).await.expect("it is open");
                let mut got = [0; 100];
                server.read_exact(&mut got).await.expect("it comes");
                assert_eq!(got, [round; 100]);
                server.write_all(&[round]).await.expect("it is open");
                assert_eq!(client.read_u8().await.expect("it comes"), round);
            }
            drop((client, server));
        };
        let (copied, ()) = tokio::join!(
            both_ways(&mut near, &mut far, &progress, true, || false),
            talk
        );
        copied.expect("both sides ended well");
        assert_eq!((progress.forth.get(), progress.back.get()), (1_005_000, 50));
    }

    #[tokio::test]
    async fn a_reset_is_told_apart_by_side() {
        let (client, mut near) = pair().await;
        let (_server, mut far) = pair().await;
        client.set_zero_linger().expect("it is a socket");
        drop(client);
        let progress = Progress::default();
        let error = both_ways(&mut near, &mut far, &progress, true, || false)
            .await
            .expect_err("it was reset");
        assert!(matches!(error, CopyError::First(_)), "{error:?}");
    }
}
