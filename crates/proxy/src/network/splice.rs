//! splice(2): bytes from one socket to another without a visit to this process.
//!
//! The kernel wants a pipe in between. Pipes are kept per worker and lent to a direction only while bytes are on their way,
//! so their number follows the streams that move at one moment.

use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    task::{Context, Poll, ready},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::{io::Interest, net::TcpStream};

/// A pipe, lent until it is dropped.
#[derive(Debug)]
pub(super) struct Lease {
    pipe: Option<Pipe>,
    filled: usize,
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

thread_local! {
    static SPARE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

impl Lease {
    /// An empty pipe: one that was used before, else a new one.
    pub(super) fn take() -> io::Result<Self> {
        let spare = SPARE.with(|spare| spare.borrow_mut().pop());
        let pipe = match spare {
            Some(pipe) => pipe,
            None => Pipe::open()?,
        };
        Ok(Self {
            pipe: Some(pipe),
            filled: 0,
        })
    }

    /// Bytes in it.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Takes bytes from a socket into the empty pipe; 0 is the end of the stream.
    pub(super) fn poll_fill(
        &mut self,
        context: &mut Context<'_>,
        from: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        let Some(pipe) = &self.pipe else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(from.poll_read_ready(context))?;
            let read = from.try_io(Interest::READABLE, || {
                Ok(splice(from, None, &pipe.write, None, PIPE_SIZE, FLAGS)?)
            });
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(read) => {
                    self.filled = read;
                    return Poll::Ready(Ok(read));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Gives bytes from the pipe to a socket.
    pub(super) fn poll_drain(
        &mut self,
        context: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        let Some(pipe) = &self.pipe else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(to.poll_write_ready(context))?;
            let written = to.try_io(Interest::WRITABLE, || {
                Ok(splice(&pipe.read, None, to, None, self.filled, FLAGS)?)
            });
            match written {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(written) => {
                    self.filled -= written;
                    return Poll::Ready(Ok(written));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A pipe with something in it would give a stranger's bytes to the next stream.
        if self.filled == 0
            && let Some(pipe) = self.pipe.take()
        {
            // At the end of the thread there is no place to keep it.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < MAX_SPARE {
                    spare.push(pipe);
                }
            });
        }
    }
}

impl Pipe {
    fn open() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Users without privileges have a budget of pipe pages; past it the pipe stays as it is, and works.
        let _ = fcntl_setpipe_size(&write, PIPE_SIZE);
        Ok(Self { read, write })
    }
}

/// Whether the kernel cannot splice these two at all (a socket with a protocol on top that lacks it).
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS))
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// Room for the pages of what a socket's receive buffer usually holds at once.
const PIPE_SIZE: usize = 256 * 1024;

/// Pipes that a worker keeps for the next streams.
const MAX_SPARE: usize = 32;
