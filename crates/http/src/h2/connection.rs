//! The bytes of one connection: read as many frames as come at once, and write what all streams
//! have to say in one go when their turns are over.

use std::{
    cell::RefCell,
    future::Future,
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::{
    core::{Core, Role},
    fate::Fate,
    frame::{FRAME_SIZE, HEAD},
    receive::Opened,
};
use crate::{Error, buffer};

/// A connection and what drives it.
#[derive(Debug)]
pub(super) struct Connection<S> {
    io: S,
    pub(super) core: Rc<RefCell<Core>>,
    buffer: BytesMut,
    /// The last read filled its buffer.
    large: bool,
    /// Bytes and streams since the last time that other tasks had their turn.
    turn: (usize, usize),
}

/// What happened on a connection.
#[derive(Debug)]
pub(super) enum Event {
    /// The peer has opened a stream.
    Opened(Opened),
    /// The connection is over.
    Over(Result<(), Error>),
}

/// Where reading stopped.
enum Stop {
    /// Nothing more has come.
    Empty,
    /// The peer does not take what it made us say.
    Full,
    /// Others have their turn first.
    Yield,
    /// The connection ends.
    End,
}

/// Bytes read in one turn.
const TURN_BYTES: usize = 512 * 1024;
/// Streams opened in one turn: before more come, the tasks of these look whether they were taken back.
const TURN_STREAMS: usize = 64;
/// Bytes to be written above which nothing more is read.
const UNREAD: usize = 256 * 1024;
/// The same for a client. Most of its bytes are requests, which nobody made it say; a server that waits until its answers
/// are taken, and a client that waits until its requests are, would wait for ever.
const UNREAD_ANSWERS: usize = 8 * 1024 * 1024;
/// A read with less room than this is not worth its call.
const ROOM: usize = 2048;

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn new(io: S, core: Core) -> Connection<S> {
        Connection {
            io,
            core: Rc::new(RefCell::new(core)),
            buffer: BytesMut::new(),
            large: false,
            turn: (0, 0),
        }
    }

    /// Reads and writes; ready with what whoever drives the connection has to know.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let core = self.core.clone();
        let mut core = core.borrow_mut();
        core.drive(cx);
        loop {
            let stop = match core.ending {
                Some(_) => Stop::End,
                None => match self.read(&mut core, cx) {
                    Ok(opened) => return Poll::Ready(Event::Opened(opened)),
                    Err(stop) => stop,
                },
            };
            let written = self.write(&mut core, cx);
            if let Poll::Ready(Err(error)) = &written {
                core.lose(Fate::Io(error.kind()));
            }
            if let Some(result) = core.ending {
                if written.is_pending() {
                    return self.rest(&mut core);
                }
                if matches!(written, Poll::Ready(Ok(()))) && !matches!(result, Err(Fate::Io(_))) {
                    // The peer reads the end behind what we have said last.
                    let _ = ready!(Pin::new(&mut self.io).poll_shutdown(cx));
                    if core.role == Role::Server {
                        ready!(self.hear_out(cx));
                    }
                }
                return Poll::Ready(Event::Over(result.map_err(Error::from)));
            }
            if core.is_done() {
                core.finish_well();
                continue;
            }
            if written.is_ready() && matches!(stop, Stop::Full) {
                continue;
            }
            if matches!(stop, Stop::Yield) {
                cx.waker().wake_by_ref();
            }
            return self.rest(&mut core);
        }
    }

    /// Passes over what still comes, until the peer closes, too; whoever drives the connection does
    /// not wait for that forever. Bytes that come for a socket that is closed would make the system
    /// throw away what the peer has not got yet.
    fn hear_out(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.buffer.clear();
            match ready!(self.fill(cx)) {
                Ok(count) if count > 0 => self.turn.0 += count,
                _ => return Poll::Ready(()),
            }
            if self.turn.0 >= TURN_BYTES {
                self.turn = (0, 0);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    fn rest(&mut self, core: &mut Core) -> Poll<Event> {
        core.rest();
        self.turn = (0, 0);
        if self.buffer.is_empty()
            && self.buffer.capacity() > 0
            && self.buffer.try_reclaim(buffer::SMALL)
        {
            // An idle connection holds nothing; data that is being read is soon given back.
            buffer::give_read(std::mem::take(&mut self.buffer));
        }
        Poll::Pending
    }

    /// Takes frames until a stream is opened.
    fn read(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<Opened, Stop> {
        loop {
            if self.turn.0 >= TURN_BYTES || self.turn.1 >= TURN_STREAMS {
                return Err(Stop::Yield);
            }
            while let Some(outcome) = core.receive(&mut self.buffer) {
                match outcome {
                    Ok(None) => {}
                    Ok(Some(opened)) => {
                        self.turn.1 += 1;
                        return Ok(opened);
                    }
                    Err(reason) => {
                        // A flood is counted as such; it is no fault that wants another word.
                        let result = match core.facts.flood() {
                            Some(_) => Ok(()),
                            None => Err(Fate::Reset(reason)),
                        };
                        core.end(reason, result);
                        return Err(Stop::End);
                    }
                }
            }
            if core.ending.is_some() {
                return Err(Stop::End);
            }
            let most = match core.role {
                Role::Server => UNREAD,
                Role::Client => UNREAD_ANSWERS,
            };
            if core.out.len() > most {
                return Err(Stop::Full);
            }
            match self.fill(cx) {
                Poll::Pending => return Err(Stop::Empty),
                Poll::Ready(Ok(0)) => {
                    core.end_of_input();
                    return Err(Stop::End);
                }
                Poll::Ready(Ok(count)) => {
                    self.turn.0 += count;
                    let stamped = core.settings.keep_alive.is_some();
                    core.facts.receive(count, stamped);
                }
                Poll::Ready(Err(error)) => {
                    core.lose(Fate::Io(error.kind()));
                    return Err(Stop::End);
                }
            }
        }
    }

    /// Reads once.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let wanted = match self.buffer.first_chunk::<3>() {
            Some(&[a, b, c]) => HEAD + u32::from_be_bytes([0, a, b, c]) as usize,
            None => HEAD,
        };
        let missing = wanted
            .min(HEAD + FRAME_SIZE)
            .saturating_sub(self.buffer.len());
        let room = self.buffer.capacity() - self.buffer.len();
        if room < missing.max(ROOM) {
            let size = if self.large {
                buffer::LARGE
            } else {
                buffer::SMALL
            };
            if self.buffer.is_empty() && !self.buffer.try_reclaim(size) {
                self.buffer = buffer::take_read(size);
            } else {
                self.buffer.reserve(size.max(missing));
            }
        }
        let room = self.buffer.capacity() - self.buffer.len();
        let read = pin!(self.io.read_buf(&mut self.buffer));
        let count = ready!(Future::poll(read, cx))?;
        self.large = count == room;
        Poll::Ready(Ok(count))
    }

    /// Writes all that there is.
    fn write(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if core.ending.is_none() {
                core.fill();
            }
            if core.out.is_empty() {
                break;
            }
            ready!(core.out.poll_write(&mut self.io, cx))?;
        }
        // What TLS holds back goes, too.
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

impl<S> Drop for Connection<S> {
    /// Streams whose connection nobody drives any more are over.
    fn drop(&mut self) {
        if let Ok(mut core) = self.core.try_borrow_mut() {
            core.lose(Fate::Closed);
        }
    }
}
