//! Large response bodies from one socket to the other without a visit here: HTTP/1 in clear on both sides, a declared
//! length, and nobody who looks at the bytes. What stands behind the head in the first read is sent with it as always; the
//! rest goes through a pipe of the kernel ([`crate::splice`]), which saves copying it twice.

use std::{
    io,
    task::{Context, Poll, ready},
};

use outrigger_http::{BodyWriter, Error, h1};

use crate::{
    cluster,
    io::Stream,
    splice::{self, Lease, PIPE_SIZE},
};

/// A rest that is smaller is copied: a pipe costs a call more.
const WORTH: u64 = 16 * 1024;

/// Bytes under way at once: a slow client must not make the kernel hold more for it than we would.
const MOST: usize = PIPE_SIZE / 2;

/// The state of one body.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// While something is in it, and while more may come at once.
    pipe: Option<Lease>,
    begun: bool,
    /// The kernel cannot, or has no pipe.
    never: bool,
}

/// What happened.
#[derive(Debug)]
pub(super) enum Passed {
    /// So many bytes have come.
    Some(usize),
    /// Nothing can be passed (any more): frames are read as always.
    Done,
    /// The upstream's end or fault.
    Upstream(Error),
    /// The client's.
    Downstream(Error),
}

impl Pass {
    /// Moves bytes; pending where one side has none or takes none.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut h1::Reader<'_, cluster::Upstream>,
        writer: &mut BodyWriter<'_, Stream>,
    ) -> Poll<Passed> {
        let BodyWriter::H1(writer) = writer else {
            return Poll::Ready(Passed::Done);
        };
        if self.never {
            return Poll::Ready(Passed::Done);
        }
        if let Err(error) = ready!(self.poll_drain(cx, writer)) {
            return Poll::Ready(Passed::Downstream(error));
        }
        let left = match reader.ahead() {
            Some(left) if self.begun || left >= WORTH => left,
            _ => return Poll::Ready(Passed::Done),
        };
        if reader.io().stream.spliceable().is_none() || writer.io().plain_tcp().is_none() {
            self.never = true;
            return Poll::Ready(Passed::Done);
        }
        if let Err(error) = ready!(writer.poll_flush(cx)) {
            return Poll::Ready(Passed::Downstream(error));
        }
        // Where the lengths differ, reading frames tells it.
        if writer.room().is_none_or(|room| room < left) {
            return Poll::Ready(Passed::Done);
        }
        self.poll_fill(cx, reader, left)
    }

    /// Empties the pipe.
    fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut h1::Writer<'_, Stream>,
    ) -> Poll<Result<(), Error>> {
        while let Some(pipe) = &mut self.pipe
            && pipe.filled() > 0
        {
            let written = {
                let io = writer.io();
                let Some(to) = io.plain_tcp() else {
                    return Poll::Ready(Err(Error::Closed));
                };
                let written = ready!(pipe.poll_drain(cx, to))?;
                io.count_written(written);
                written
            };
            writer.passed(written as u64);
            if written == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut h1::Reader<'_, cluster::Upstream>,
        left: u64,
    ) -> Poll<Passed> {
        let pipe = match &mut self.pipe {
            Some(pipe) => pipe,
            none => match Lease::take() {
                Ok(pipe) => none.insert(pipe),
                // Out of descriptors: the other way needs none.
                Err(error) => {
                    tracing::debug!(%error, "no pipe for splice");
                    self.never = true;
                    return Poll::Ready(Passed::Done);
                }
            },
        };
        let read = {
            let io = reader.io();
            let Some(from) = io.stream.spliceable() else {
                return Poll::Ready(Passed::Done);
            };
            let most = MOST.min(usize::try_from(left).unwrap_or(MOST));
            match pipe.poll_fill(cx, from, most) {
                Poll::Pending => {
                    // A body that waits holds no pipe.
                    self.pipe = None;
                    return Poll::Pending;
                }
                Poll::Ready(Ok(read)) => {
                    io.stream.count_read(read);
                    read
                }
                Poll::Ready(Err(error)) if splice::is_unsupported(&error) => {
                    io.stream.never_splice();
                    self.pipe = None;
                    self.never = true;
                    return Poll::Ready(Passed::Done);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Passed::Upstream(error.into())),
            }
        };
        if read == 0 {
            return Poll::Ready(Passed::Upstream(Error::Closed));
        }
        self.begun = true;
        reader.passed(read as u64);
        Poll::Ready(Passed::Some(read))
    }
}
