//! splice(2): bytes from one socket to another without a visit to this process.
//!
//! The kernel wants a pipe in between. Pipes are kept per worker and lent to a direction only while bytes are on their way,
//! so their number follows the streams that move at one moment.

use std::{
    cell::{Cell, RefCell},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    task::{Context, Poll, ready},
};

use rustix::{
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
};
use tokio::{io::Interest, net::TcpStream};

/// A pipe, lent until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pipe: Option<Pipe>,
    filled: usize,
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

thread_local! {
    static LENT: Cell<usize> = const { Cell::new(0) };
    static SPARE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

impl Lease {
    /// An empty pipe: one that was used before, else a new one.
    ///
    /// # Errors
    /// No descriptor is left, or so many are lent that other uses might find none; copying needs no pipe.
    pub(crate) fn take() -> io::Result<Self> {
        if LENT.get() >= MAX_LENT {
            return Err(io::Error::other("too many pipes are lent"));
        }
        let spare = SPARE.with(|spare| spare.borrow_mut().pop());
        let pipe = match spare {
            Some(pipe) => pipe,
            None => Pipe::open()?,
        };
        LENT.set(LENT.get() + 1);
        Ok(Self {
            pipe: Some(pipe),
            filled: 0,
        })
    }

    /// Bytes in it.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// Takes at most so many bytes from a socket into the empty pipe; 0 is the end of the stream.
    ///
    /// # Errors
    /// [`is_unsupported`] also where bytes wait for `recv` alone, as on sockets of a sockmap, to which they are handed
    /// past TCP's own queue: splice(2) finds nothing there, or an end too early.
    pub(crate) fn poll_fill(
        &mut self,
        context: &mut Context<'_>,
        from: &TcpStream,
        most: usize,
    ) -> Poll<io::Result<usize>> {
        let Some(pipe) = &self.pipe else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(from.poll_read_ready(context))?;
            let fill = || splice(from, None, &pipe.write, None, most, FLAGS);
            let read = from.try_io(Interest::READABLE, || match fill() {
                // A call more, but only where the next thing to do is to wait.
                Ok(0) | Err(Errno::AGAIN) if is_behind(from) => match fill() {
                    // They came in between.
                    Ok(read) if read > 0 => Ok(read),
                    _ => Err(Errno::INVAL.into()),
                },
                other => Ok(other?),
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
    pub(crate) fn poll_drain(
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
        let _ = LENT.try_with(|lent| lent.set(lent.get() - 1));
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

/// Whether `recv` has bytes.
fn is_behind(from: &TcpStream) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    socket2::SockRef::from(from)
        .peek(&mut byte)
        .is_ok_and(|count| count > 0)
}

/// Whether the kernel cannot splice these two at all (a socket with a protocol on top that lacks it).
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS))
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// Room for the pages of what a socket's receive buffer usually holds at once.
pub(crate) const PIPE_SIZE: usize = 256 * 1024;

/// Pipes that a worker lends at most: each takes two descriptors, and memory of the kernel.
const MAX_LENT: usize = 2048;

/// Pipes that a worker keeps for the next streams.
const MAX_SPARE: usize = 32;
