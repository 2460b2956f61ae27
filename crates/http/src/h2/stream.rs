//! The two halves of a stream.

use std::task::{Context, Poll, ready};

use ::h2::{Reason, RecvStream, SendStream, server::SendResponse};
use bytes::Bytes;

use super::convert::{fields_in, fields_out, response_out};
use crate::{Error, Frame, Framing, Headers, ResponseHead};

/// Reads the body of a stream.
#[derive(Debug)]
pub struct Reader {
    stream: RecvStream,
    data_done: bool,
    done: bool,
}

impl Reader {
    pub(super) fn new(stream: RecvStream) -> Reader {
        let done = stream.is_end_stream();
        Reader {
            stream,
            data_done: done,
            done,
        }
    }

    /// The next frame; `None` at the end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Error>>> {
        while !self.data_done {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    // Whoever pulls a frame has room for it; the peer may send as much again.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::Data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.data_done = true,
            }
        }
        if self.done {
            return Poll::Ready(None);
        }
        self.done = true;
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(Some(map)) => {
                let mut trailers = Headers::new();
                fields_in(&map, &mut trailers);
                Poll::Ready(Some(Ok(Frame::Trailers(trailers))))
            }
            Ok(None) => Poll::Ready(None),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }

    /// Whether the end was reached.
    pub fn is_end(&self) -> bool {
        self.done || self.stream.is_end_stream()
    }
}

/// Writes one message on a stream.
#[derive(Debug)]
pub struct Writer {
    state: State,
    /// Data that waits for a window, or for the end so that both leave in one frame.
    pending: Bytes,
    is_head: bool,
}

#[derive(Debug)]
enum State {
    Response(SendResponse<Bytes>),
    Body(SendStream<Bytes>),
    /// Ended; the handle is kept so that a reset can be seen and sent.
    Ended(Option<SendStream<Bytes>>),
}

impl Writer {
    pub(super) fn response(respond: SendResponse<Bytes>, is_head: bool) -> Writer {
        Writer {
            state: State::Response(respond),
            pending: Bytes::new(),
            is_head,
        }
    }

    pub(super) fn body(stream: SendStream<Bytes>, ended: bool) -> Writer {
        let state = if ended {
            State::Ended(Some(stream))
        } else {
            State::Body(stream)
        };
        Writer {
            state,
            pending: Bytes::new(),
            is_head: false,
        }
    }

    /// Writes the response's head; with [`Framing::None`] it also ends the stream.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_response(&mut self, head: &ResponseHead, framing: Framing) -> Result<(), Error> {
        let State::Response(respond) = &mut self.state else {
            return Err(Error::Length);
        };
        let ended = framing.is_none() || self.is_head;
        let stream = respond.send_response(response_out(head, framing, self.is_head), ended)?;
        self.state = if ended {
            State::Ended(Some(stream))
        } else {
            State::Body(stream)
        };
        Ok(())
    }

    /// Writes a 1xx response.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_informational(&mut self, status: u16, headers: &Headers) -> Result<(), Error> {
        let State::Response(respond) = &mut self.state else {
            return Err(Error::Length);
        };
        let mut response = http::Response::new(());
        *response.status_mut() =
            http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::CONTINUE);
        *response.headers_mut() = fields_out(headers);
        Ok(respond.send_informational(response)?)
    }

    /// Room for another piece of data: the one before has left.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_flush(cx)
    }

    /// Takes a piece of data.
    ///
    /// # Errors
    /// The stream is gone or was ended.
    pub fn send_data(&mut self, data: Bytes) -> Result<(), Error> {
        let State::Body(stream) = &mut self.state else {
            return Err(Error::Length);
        };
        debug_assert!(self.pending.is_empty(), "poll_ready comes first");
        stream.reserve_capacity(data.len());
        self.pending = data;
        Ok(())
    }

    /// Ends the message. Data that waits goes with it; `h2` holds it until there is a window.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn send_end(&mut self, trailers: Option<&Headers>) -> Result<(), Error> {
        let State::Body(stream) = &mut self.state else {
            return Ok(());
        };
        let data = std::mem::take(&mut self.pending);
        let trailers = trailers.filter(|trailers| !trailers.is_empty());
        match trailers {
            None => stream.send_data(data, true)?,
            Some(trailers) => {
                if !data.is_empty() {
                    stream.send_data(data, false)?;
                }
                stream.send_trailers(fields_out(trailers))?;
            }
        }
        if let State::Body(stream) = std::mem::replace(&mut self.state, State::Ended(None)) {
            self.state = State::Ended(Some(stream));
        }
        Ok(())
    }

    /// Sends what the windows allow. The connection's driver does the writing.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let State::Body(stream) = &mut self.state else {
            return Poll::Ready(Ok(()));
        };
        while !self.pending.is_empty() {
            let mut window = stream.capacity();
            if window == 0 {
                window = match ready!(stream.poll_capacity(cx)) {
                    Some(window) => window?,
                    None => {
                        return Poll::Ready(Err(match stream.poll_reset(cx) {
                            Poll::Ready(Ok(reason)) => Error::Reset(reason),
                            Poll::Ready(Err(error)) => error.into(),
                            Poll::Pending => Error::Closed,
                        }));
                    }
                };
            }
            let count = window.min(self.pending.len());
            if count > 0 {
                stream.send_data(self.pending.split_to(count), false)?;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ends our direction.
    pub fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        ready!(self.poll_flush(cx))?;
        Poll::Ready(self.send_end(None))
    }

    /// Whether the message was ended.
    pub fn is_end(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }

    /// Resets the stream.
    pub fn reset(&mut self, reason: Reason) {
        match &mut self.state {
            State::Response(respond) => respond.send_reset(reason),
            State::Body(stream) | State::Ended(Some(stream)) => stream.send_reset(reason),
            State::Ended(None) => {}
        }
    }

    /// Resolves when the peer has reset the stream or the connection is gone.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let reset = match &mut self.state {
            State::Response(respond) => respond.poll_reset(cx),
            State::Body(stream) => stream.poll_reset(cx),
            State::Ended(_) => return Poll::Pending,
        };
        match ready!(reset) {
            Ok(Reason::REFUSED_STREAM) => Poll::Ready(Error::Unprocessed),
            Ok(reason) => Poll::Ready(Error::Reset(reason)),
            Err(error) => Poll::Ready(error.into()),
        }
    }
}
