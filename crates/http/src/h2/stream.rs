//! The two halves of a stream, as its task holds them.

use std::{
    cell::{RefCell, RefMut},
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{
    Reason,
    core::Core,
    fields_out::{self, Length},
    send::STREAM_QUEUE,
    store::End,
};
use crate::{Error, Frame, Framing, Headers, ResponseHead};

/// Keeps the place of a stream.
#[derive(Debug)]
pub(super) struct Handle {
    core: Rc<RefCell<Core>>,
    place: u32,
}

impl Handle {
    pub(super) fn new(core: &Rc<RefCell<Core>>, held: &mut Core, place: u32) -> Handle {
        held.store.get(place).handles += 1;
        Handle {
            core: core.clone(),
            place,
        }
    }

    pub(super) fn core(&self) -> RefMut<'_, Core> {
        self.core.borrow_mut()
    }

    pub(super) fn place(&self) -> u32 {
        self.place
    }

    /// One more on the same stream.
    pub(super) fn again(&self) -> Handle {
        self.core().store.get(self.place).handles += 1;
        Handle {
            core: self.core.clone(),
            place: self.place,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut core = self.core.borrow_mut();
        let stream = core.store.get(self.place);
        stream.handles -= 1;
        if stream.handles == 0 {
            core.abandon(self.place);
        }
    }
}

/// Reads the body of a stream.
#[derive(Debug)]
pub struct Reader {
    handle: Handle,
}

impl Reader {
    pub(super) fn new(handle: Handle) -> Reader {
        Reader { handle }
    }

    /// The next frame; `None` at the end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Error>>> {
        let place = self.handle.place;
        let mut core = self.handle.core();
        let stream = core.store.get(place);
        if let Some(data) = stream.data.pop_front() {
            // Whoever pulls a frame has room for it; the peer may send as much again.
            core.release(place, data.len());
            return Poll::Ready(Some(Ok(Frame::Data(data))));
        }
        if let Some(trailers) = stream.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::Trailers(trailers))));
        }
        if stream.received {
            return Poll::Ready(None);
        }
        match stream.fate {
            Some(fate) => Poll::Ready(Some(Err(fate.into()))),
            None => {
                stream.wait_to_read(cx);
                Poll::Pending
            }
        }
    }

    /// Whether the end was reached.
    pub fn is_end(&self) -> bool {
        let mut core = self.handle.core();
        let stream = core.store.get(self.handle.place);
        stream.received && stream.data.is_empty() && stream.trailers.is_none()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let place = self.handle.place;
        let mut core = self.handle.core();
        let stream = core.store.get(place);
        stream.unread = true;
        let unread: usize = stream.data.drain(..).map(|data| data.len()).sum();
        stream.trailers = None;
        core.release_connection(unread);
    }
}

/// Writes one message on a stream.
#[derive(Debug)]
pub struct Writer {
    handle: Handle,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The head comes first.
    Head,
    Body,
    Ended,
}

impl Writer {
    /// Of a response.
    pub(super) fn response(handle: Handle) -> Writer {
        Writer {
            handle,
            state: State::Head,
        }
    }

    /// Of a request whose head was sent.
    pub(super) fn body(handle: Handle, ended: bool) -> Writer {
        let state = if ended { State::Ended } else { State::Body };
        Writer { handle, state }
    }

    /// Writes the response's head; with [`Framing::None`] it also ends the stream.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_response(&mut self, head: &ResponseHead, framing: Framing) -> Result<(), Error> {
        let mut core = self.begin(State::Head)?;
        let bodiless = core.store.get(self.handle.place).bodiless;
        let ended = framing.is_none() || bodiless;
        let length = match bodiless {
            // What a GET would have got may be told.
            true => Length::AsIs,
            false => Length::of(framing),
        };
        core.put_block(self.handle.place, ended, |encoder, out| {
            fields_out::write_response(encoder, head, length, out);
        });
        drop(core);
        self.state = if ended { State::Ended } else { State::Body };
        Ok(())
    }

    /// Writes a 1xx response.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_informational(&mut self, status: u16, headers: &Headers) -> Result<(), Error> {
        let mut core = self.begin(State::Head)?;
        core.put_block(self.handle.place, false, |encoder, out| {
            fields_out::write_informational(encoder, status, headers, out);
        });
        Ok(())
    }

    /// Room for another piece of data.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.state != State::Body {
            return Poll::Ready(Ok(()));
        }
        let mut core = self.handle.core();
        let stream = core.store.get(self.handle.place);
        if let Some(fate) = stream.fate {
            return Poll::Ready(Err(fate.into()));
        }
        if stream.queued < STREAM_QUEUE {
            return Poll::Ready(Ok(()));
        }
        stream.wait_to_write(cx);
        Poll::Pending
    }

    /// Takes a piece of data.
    ///
    /// # Errors
    /// The stream is gone or was ended.
    pub fn send_data(&mut self, data: Bytes) -> Result<(), Error> {
        self.begin(State::Body)?.send_data(self.handle.place, data);
        Ok(())
    }

    /// Ends the message behind the data that waits.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), Error> {
        if self.state != State::Body {
            return Ok(());
        }
        let trailers = trailers.filter(|trailers| !trailers.is_empty());
        self.begin(State::Body)?
            .send_end(self.handle.place, trailers);
        self.state = State::Ended;
        Ok(())
    }

    /// Resolves when there is room, and behind the end when the peer's windows have let all of the
    /// message go: until then somebody has to look at the clock. The connection's driver does the
    /// writing.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.state != State::Ended {
            return self.poll_ready(cx);
        }
        let mut core = self.handle.core();
        let stream = core.store.get(self.handle.place);
        match (&stream.end, stream.fate) {
            (End::Sent, _) => Poll::Ready(Ok(())),
            (_, Some(fate)) => Poll::Ready(Err(fate.into())),
            (_, None) => {
                stream.wait_to_write(cx);
                Poll::Pending
            }
        }
    }

    /// Ends our direction and flushes it.
    pub fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.send_end(None)?;
        self.poll_flush(cx)
    }

    /// Whether the message was ended.
    pub fn is_end(&self) -> bool {
        self.state == State::Ended
    }

    /// Resets the stream.
    pub fn reset(&mut self, reason: Reason) {
        self.handle.core().reset(self.handle.place, reason);
    }

    /// Resolves when the peer has reset the stream or the connection is gone.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        if self.state == State::Ended {
            return Poll::Pending;
        }
        let mut core = self.handle.core();
        let stream = core.store.get(self.handle.place);
        match stream.fate {
            Some(fate) => Poll::Ready(fate.into()),
            None => {
                stream.wait_to_write(cx);
                Poll::Pending
            }
        }
    }

    /// The connection, to write on a stream that is in this state.
    fn begin(&self, state: State) -> Result<RefMut<'_, Core>, Error> {
        if self.state != state {
            return Err(Error::Length);
        }
        let mut core = self.handle.core();
        match core.store.get(self.handle.place).fate {
            Some(fate) => Err(fate.into()),
            None => Ok(core),
        }
    }
}
