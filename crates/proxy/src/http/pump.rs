//! Moving the request's body upstream, from the client or from what was kept of it.

use std::task::{Context as TaskContext, Poll, ready};

use bytes::Bytes;
use outrigger_http::{BodyReader, Error, Frame, Headers};

use super::{Exchange, upstream::Upstream};
use crate::{filter::Filters, io::Stream, worker::moment};

/// What was read of a request's body, kept as long as an attempt may be repeated or copied.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) pieces: Vec<Bytes>,
    pub(super) trailers: Option<Headers>,
    /// All of the request was read.
    pub(super) complete: bool,
    keep: bool,
    size: u64,
    limit: u64,
}

/// Why moving stopped.
#[derive(Debug)]
pub(super) enum PumpError {
    /// The client's fault, or its end.
    Downstream(Error),
    /// The upstream's.
    Upstream(Error),
}

/// One attempt's progress.
#[derive(Debug, Default)]
pub(super) struct Pump {
    position: usize,
    ended: bool,
    /// Nothing is read from the client: an upgrade that was not agreed to yet.
    pub(super) hold: bool,
    /// The upstream takes no more; the response may still come.
    pub(super) dead: bool,
    pub(super) tunnel: bool,
}

impl Kept {
    pub(super) fn new(keep: bool, limit: u64) -> Kept {
        Kept {
            pieces: Vec::new(),
            trailers: None,
            complete: false,
            keep,
            size: 0,
            limit,
        }
    }

    /// Bytes of body that were read.
    pub(super) fn size(&self) -> usize {
        self.size as usize
    }

    /// The first bytes of the body.
    pub(super) fn first(&self, most: usize) -> Bytes {
        if let [only] = &*self.pieces {
            return only.slice(..only.len().min(most));
        }
        let mut out = Vec::with_capacity(self.size().min(most));
        for piece in &self.pieces {
            let room = most - out.len();
            out.extend_from_slice(&piece[..piece.len().min(room)]);
        }
        out.into()
    }

    /// What is still to be read is kept up to this size of the whole.
    pub(super) fn limit_to(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Whether the request can be sent again.
    pub(super) fn is_whole(&self) -> bool {
        self.keep || self.size == 0
    }

    /// Forgets the body: there will be no other attempt.
    pub(super) fn stop(&mut self) {
        self.keep = false;
        self.pieces.clear();
    }

    /// A filter has put another body in the place of what was read.
    pub(super) fn replace(&mut self, body: Bytes) {
        self.size = body.len() as u64;
        self.keep = true;
        self.limit = self.limit.max(self.size);
        self.pieces = match body.is_empty() {
            true => Vec::new(),
            false => vec![body],
        };
    }

    /// The request goes on without its body.
    pub(super) fn drop_body(&mut self) {
        self.pieces.clear();
        self.trailers = None;
    }

    /// Keeps a piece of the body.
    pub(super) fn add(&mut self, data: &Bytes) {
        self.size += data.len() as u64;
        if self.keep && self.size > self.limit {
            self.stop();
        }
        if self.keep {
            self.pieces.push(data.clone());
        }
    }
}

impl Pump {
    pub(super) fn new(hold: bool) -> Pump {
        Pump {
            hold,
            ..Pump::default()
        }
    }

    /// Of an attempt whose whole request went up.
    pub(super) fn finished() -> Pump {
        Pump {
            ended: true,
            ..Pump::default()
        }
    }

    /// Whether everything that was kept went up.
    pub(super) fn is_caught_up(&self, kept: &Kept) -> bool {
        self.position >= kept.pieces.len()
    }

    /// Whether all of the request went up.
    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// Moves what can be moved. Ready when the request is up and flushed, or held.
    pub(super) fn poll(
        &mut self,
        cx: &mut TaskContext<'_>,
        reader: &mut BodyReader<'_, Stream>,
        upstream: &mut Upstream,
        kept: &mut Kept,
        exchange: &mut Exchange<'_>,
        filters: &Filters,
    ) -> Poll<Result<(), PumpError>> {
        if self.dead {
            return Poll::Ready(Ok(()));
        }
        loop {
            if self.hold || self.ended {
                return upstream.poll_flush(cx).map_err(PumpError::Upstream);
            }
            ready!(upstream.poll_ready(cx)).map_err(PumpError::Upstream)?;
            if let Some(piece) = kept.pieces.get(self.position) {
                self.position += 1;
                upstream
                    .send_data(piece.clone())
                    .map_err(PumpError::Upstream)?;
                continue;
            }
            let mut now = None;
            if !kept.complete {
                let mut added = None;
                let progress = &exchange.progress;
                // Without a body all of it was here with its head.
                let here = (reader.is_end() && exchange.upstream.attempts == 1)
                    .then_some((progress.start, progress.upstream_first_sent));
                match reader.poll_frame(cx) {
                    Poll::Pending => {
                        ready!(upstream.poll_flush(cx)).map_err(PumpError::Upstream)?;
                        return Poll::Pending;
                    }
                    Poll::Ready(Some(Err(error))) => {
                        return Poll::Ready(Err(PumpError::Downstream(error)));
                    }
                    Poll::Ready(Some(Ok(Frame::Data(mut data)))) => {
                        exchange.progress.received += data.len() as u64;
                        filters
                            .request_data(exchange, &mut data)
                            .map_err(|refusal| PumpError::Downstream(refusal.into()))?;
                        if data.is_empty() {
                            continue;
                        }
                        kept.add(&data);
                        self.position = kept.pieces.len();
                        upstream.send_data(data).map_err(PumpError::Upstream)?;
                        continue;
                    }
                    Poll::Ready(Some(Ok(Frame::Trailers(mut trailers)))) => {
                        if !self.tunnel && filters.take_bodies() {
                            added = filters.request_end(exchange, Some(&mut trailers));
                        }
                        kept.trailers = Some(trailers);
                        kept.complete = true;
                    }
                    Poll::Ready(None) => {
                        if !self.tunnel && filters.take_bodies() {
                            added = filters.request_end(exchange, None);
                        }
                        kept.complete = true;
                    }
                }
                match here {
                    Some((received, sent)) => {
                        exchange.progress.request_received = Some(received);
                        now = sent;
                    }
                    None => {
                        now = Some(moment::now());
                        exchange.progress.request_received = now;
                    }
                }
                if let Some(added) = added {
                    kept.add(&added);
                    self.position = kept.pieces.len();
                    upstream.send_data(added).map_err(PumpError::Upstream)?;
                }
            }
            if self.tunnel {
                ready!(upstream.poll_shutdown(cx)).map_err(PumpError::Upstream)?;
                self.ended = true;
                continue;
            }
            upstream
                .send_end(kept.trailers.as_ref())
                .map_err(PumpError::Upstream)?;
            self.ended = true;
            exchange.progress.upstream_last_sent = now.or_else(|| Some(moment::now()));
        }
    }

    /// The upgrade was agreed to: everything goes through from here on.
    pub(super) fn start_tunnel(&mut self, kept: &mut Kept) {
        self.hold = false;
        self.tunnel = true;
        self.ended = false;
        kept.complete = false;
        kept.stop();
    }
}
