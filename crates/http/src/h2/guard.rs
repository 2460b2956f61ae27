//! What a peer may cost us beyond what `h2` counts: Envoy's flood budgets, on the frames that pass.
//!
//! [`Guard`] wraps the byte stream below `h2` and looks at the nine bytes in front of each frame, in both directions.
//! A budget that is used up does not break the stream: it is noted in [`Facts`], nothing more is read, and whoever
//! drives the connection says GOAWAY.

use std::{
    cell::Cell,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::PREFACE;

/// Envoy's budgets (`Http2ProtocolOptions`), with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloodLimits {
    /// Frames of HEADERS, CONTINUATION and DATA in a row without payload and without END_STREAM (1).
    pub max_consecutive_inbound_frames_with_empty_payload: u32,
    /// PRIORITY frames for each stream that was opened (100).
    pub max_inbound_priority_frames_per_stream: u32,
    /// WINDOW_UPDATE frames for each DATA frame sent (10).
    pub max_inbound_window_update_frames_per_data_frame_sent: u32,
    /// Frames that a peer makes us send: resets for its own faults, and answers to PING and SETTINGS within a second
    /// (1000).
    pub max_outbound_control_frames: u32,
}

impl Default for FloodLimits {
    fn default() -> Self {
        FloodLimits {
            max_consecutive_inbound_frames_with_empty_payload: 1,
            max_inbound_priority_frames_per_stream: 100,
            max_inbound_window_update_frames_per_data_frame_sent: 10,
            max_outbound_control_frames: 1000,
        }
    }
}

/// A budget that a peer used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// Frames without payload.
    Empty,
    /// PRIORITY frames.
    Priority,
    /// WINDOW_UPDATE frames.
    WindowUpdate,
    /// PING and SETTINGS frames, each of which wants an answer.
    Control,
}

/// What has passed on one connection; counts only grow.
#[derive(Debug, Default)]
pub struct Facts {
    /// Bytes read: that it changes is the sign of a peer that lives.
    pub received: Cell<u64>,
    /// When bytes came last; kept where keep-alive asks for it.
    pub(super) received_at: Cell<Option<Instant>>,
    /// Streams that we opened.
    pub(super) opened: Cell<u64>,
    /// RST_STREAM from the peer.
    pub resets_received: Cell<u64>,
    /// RST_STREAM to the peer.
    pub resets_sent: Cell<u64>,
    /// Of these the ones that say PROTOCOL_ERROR: a message that may not be.
    pub protocol_errors_sent: Cell<u64>,
    /// GOAWAY from the peer.
    pub goaways_received: Cell<u64>,
    /// GOAWAY to the peer.
    pub goaways_sent: Cell<u64>,
    /// HEADERS both ways; trailers cannot be told from heads here.
    headers: Cell<u64>,
    data_sent: Cell<u64>,
    priorities: Cell<u64>,
    window_updates: Cell<u64>,
    empty_in_a_row: Cell<u32>,
    /// PING and SETTINGS since a moment, which is looked at again when the budget is used up.
    wanting_answer: Cell<u32>,
    wanting_since: Cell<Option<Instant>>,
    /// DATA frames without payload that were handed on.
    empty_data: Cell<u32>,
    flood: Cell<Option<Flood>>,
}

impl Facts {
    /// The budget that the peer has used up.
    pub fn flood(&self) -> Option<Flood> {
        self.flood.get()
    }
}

/// The byte stream below `h2`.
#[derive(Debug)]
pub(super) struct Guard<S> {
    io: S,
    facts: Rc<Facts>,
    limits: FloodLimits,
    stamped: bool,
    /// Bytes until the next frame comes in.
    skip_in: usize,
    /// The beginning of a frame's head whose rest has not come; `h2` gets it with the rest.
    held: [u8; HEAD],
    held_length: usize,
    /// How much of a held head was handed on; it was looked at when it was complete.
    shown: usize,
    /// Bytes until the next frame goes out.
    skip_out: usize,
    /// The head of the frame that goes out, and of a reset its code.
    out: [u8; HEAD + 4],
    out_length: usize,
}

/// Length, type, flags, stream (RFC 9113, 4.1).
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// No type that anybody has defined; a receiver passes over it (RFC 9113, 5.5).
const UNKNOWN: u8 = 0xfb;

/// ACK of PING and SETTINGS.
const ACK: u8 = 1;

/// The time in which `max_outbound_control_frames` answers may be asked for. Envoy counts the answers that wait to be
/// written; `h2` writes each before it reads on, so the rate is what a flood can be told by.
const ANSWERS_PER: Duration = Duration::from_secs(1);

/// END_STREAM of DATA and HEADERS; END_HEADERS of CONTINUATION is another bit.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `h2` takes the hundredth empty DATA frame of a connection's whole life for an attack, however long that life is.
/// A stream may send one now and then; behind this many they are passed over unseen, and only our budget holds.
const EMPTY_DATA_HANDED_ON: u32 = 64;

impl<S> Guard<S> {
    /// Wraps a stream whose peer (`server`: we serve) has said nothing yet.
    pub(super) fn new(
        io: S,
        facts: &Rc<Facts>,
        limits: FloodLimits,
        server: bool,
        stamped: bool,
    ) -> Self {
        let (skip_in, skip_out) = if server {
            (PREFACE.len(), 0)
        } else {
            (0, PREFACE.len())
        };
        Guard {
            io,
            facts: facts.clone(),
            limits,
            stamped,
            skip_in,
            held: [0; HEAD],
            held_length: 0,
            shown: 0,
            skip_out,
            out: [0; HEAD + 4],
            out_length: 0,
        }
    }

    fn received(&self, count: usize) {
        let facts = &self.facts;
        facts.received.set(facts.received.get() + count as u64);
        if self.stamped {
            facts.received_at.set(Some(Instant::now()));
        }
    }

    /// Looks at what has come in. Gives how many of the bytes `h2` may see now: all but a head that is not complete.
    fn incoming(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            if self.skip_in > 0 {
                let part = self.skip_in.min(bytes.len() - at);
                self.skip_in -= part;
                at += part;
                continue;
            }
            let Some(head) = bytes[at..].first_chunk_mut::<HEAD>() else {
                let rest = &bytes[at..];
                self.held[..rest.len()].copy_from_slice(rest);
                self.held_length = rest.len();
                return at;
            };
            self.head_in(head);
            at += HEAD;
        }
        bytes.len()
    }

    fn head_in(&mut self, head: &mut [u8; HEAD]) {
        let length = payload(head);
        if self.frame_in(head[3], head[4], length) {
            head[3] = UNKNOWN;
        }
        self.skip_in = length;
    }

    /// Counts a frame; `true` where `h2` should not know of it.
    fn frame_in(&mut self, kind: u8, flags: u8, length: usize) -> bool {
        let facts = &self.facts;
        let limits = &self.limits;
        let add = |cell: &Cell<u64>| {
            cell.set(cell.get() + 1);
            cell.get()
        };
        let mut unseen = false;
        match kind {
            DATA | HEADERS | CONTINUATION => {
                if kind == HEADERS {
                    add(&facts.headers);
                }
                let last = if kind == CONTINUATION {
                    END_HEADERS
                } else {
                    END_STREAM
                };
                if length > 0 || flags & last != 0 {
                    facts.empty_in_a_row.set(0);
                    return false;
                }
                facts.empty_in_a_row.set(facts.empty_in_a_row.get() + 1);
                if facts.empty_in_a_row.get()
                    > limits.max_consecutive_inbound_frames_with_empty_payload
                {
                    facts.flood.set(Some(Flood::Empty));
                }
                if kind == DATA {
                    unseen = facts.empty_data.get() >= EMPTY_DATA_HANDED_ON;
                    facts
                        .empty_data
                        .set(facts.empty_data.get().saturating_add(1));
                }
            }
            PRIORITY => {
                let limit = u64::from(limits.max_inbound_priority_frames_per_stream)
                    * (1 + facts.headers.get());
                if add(&facts.priorities) > limit {
                    facts.flood.set(Some(Flood::Priority));
                }
            }
            WINDOW_UPDATE => {
                // Envoy's sum: five for the connection, two for each stream, and the budget for each DATA frame.
                let limit = 5 + 2
                    * (facts.headers.get()
                        + u64::from(limits.max_inbound_window_update_frames_per_data_frame_sent)
                            * facts.data_sent.get());
                if add(&facts.window_updates) > limit {
                    facts.flood.set(Some(Flood::WindowUpdate));
                }
            }
            RST_STREAM => {
                add(&facts.resets_received);
            }
            PING | SETTINGS if flags & ACK == 0 => {
                let count = facts.wanting_answer.get() + 1;
                facts.wanting_answer.set(count);
                if count > limits.max_outbound_control_frames {
                    let now = Instant::now();
                    let since = facts.wanting_since.replace(Some(now));
                    if since.is_none_or(|since| now - since < ANSWERS_PER) {
                        facts.flood.set(Some(Flood::Control));
                    }
                    facts.wanting_answer.set(1);
                } else if count == 1 {
                    facts.wanting_since.set(Some(Instant::now()));
                }
            }
            GOAWAY => {
                add(&facts.goaways_received);
            }
            _ => {}
        }
        unseen
    }

    /// Looks at what has gone out.
    fn outgoing(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.skip_out > 0 {
                let part = self.skip_out.min(bytes.len());
                self.skip_out -= part;
                bytes = &bytes[part..];
                continue;
            }
            // A reset is read with its code, whose four bytes are all of its payload.
            let want = if self.out_length > 3 && self.out[3] == RST_STREAM {
                HEAD + 4
            } else {
                HEAD
            };
            let part = (want - self.out_length).min(bytes.len());
            self.out[self.out_length..self.out_length + part].copy_from_slice(&bytes[..part]);
            self.out_length += part;
            bytes = &bytes[part..];
            if self.out_length == HEAD && self.out[3] != RST_STREAM || self.out_length == HEAD + 4 {
                self.frame_out();
            }
        }
    }

    fn frame_out(&mut self) {
        let facts = &self.facts;
        let add = |cell: &Cell<u64>| cell.set(cell.get() + 1);
        let head = &self.out;
        let length = payload(head);
        match head[3] {
            DATA => add(&facts.data_sent),
            // Streams that we open count like those of the peer.
            HEADERS => add(&facts.headers),
            RST_STREAM => {
                add(&facts.resets_sent);
                if head[HEAD..] == [0, 0, 0, 1] {
                    add(&facts.protocol_errors_sent);
                }
            }
            GOAWAY => add(&facts.goaways_sent),
            _ => {}
        }
        self.skip_out = length.saturating_sub(self.out_length - HEAD);
        self.out_length = 0;
    }
}

/// The length of a frame's payload.
fn payload(head: &[u8]) -> usize {
    usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])
}

impl<S: AsyncRead + Unpin> AsyncRead for Guard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.facts.flood.get().is_some() {
                // The driver looks at the facts whenever `h2` waits, and ends the connection.
                return Poll::Pending;
            }
            if this.shown < this.held_length && this.held_length == HEAD {
                let part = (HEAD - this.shown).min(buffer.remaining());
                buffer.put_slice(&this.held[this.shown..this.shown + part]);
                this.shown += part;
                if this.shown == HEAD {
                    (this.held_length, this.shown) = (0, 0);
                }
                return Poll::Ready(Ok(()));
            }
            if this.held_length > 0 && buffer.remaining() <= HEAD {
                // No room to put the pieces of a head together: they are here.
                let mut rest = ReadBuf::new(&mut this.held[this.held_length..]);
                ready!(Pin::new(&mut this.io).poll_read(cx, &mut rest))?;
                let count = rest.filled().len();
                if count == 0 {
                    return Poll::Ready(Ok(()));
                }
                this.received(count);
                this.held_length += count;
                if this.held_length == HEAD {
                    let mut head = this.held;
                    this.head_in(&mut head);
                    this.held = head;
                }
                continue;
            }
            let start = buffer.filled().len();
            buffer.put_slice(&this.held[..this.held_length]);
            let before = buffer.filled().len();
            match Pin::new(&mut this.io).poll_read(cx, buffer) {
                Poll::Ready(Ok(())) => {}
                other => {
                    buffer.set_filled(start);
                    return other;
                }
            }
            let count = buffer.filled().len() - before;
            this.held_length = 0;
            if count == 0 {
                return Poll::Ready(Ok(()));
            }
            this.received(count);
            let shown = this.incoming(&mut buffer.filled_mut()[start..]);
            buffer.set_filled(start + shown);
            if shown > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.outgoing(&bytes[..count.min(bytes.len())]);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, parts))?;
        let mut left = count;
        for part in parts {
            let seen = left.min(part.len());
            self.outgoing(&part[..seen]);
            left -= seen;
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
