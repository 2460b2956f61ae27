//! The streams of a connection, in places that are used again.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    task::{Context, Waker},
};

use bytes::{Bytes, BytesMut};

use super::{fate::Fate, frame::FRAME_SIZE, outbox::Mark};
use crate::{Headers, ResponseHead};

/// One stream: what has come and was not read, what is to go and has no window yet.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) id: u32,
    /// Readers and writers that know this place.
    pub(super) handles: u8,
    /// It counts as open on the wire.
    pub(super) open: bool,
    /// Why it ended before its end.
    pub(super) fate: Option<Fate>,

    /// Heads of a response, informational ones first.
    pub(super) heads: VecDeque<ResponseHead>,
    pub(super) data: VecDeque<Bytes>,
    /// The last piece of `data` is a copy.
    copied: bool,
    pub(super) trailers: Option<Headers>,
    /// Informational heads that have come.
    pub(super) informational: usize,
    /// The head (of a response: the final one) has come.
    pub(super) has_head: bool,
    /// END_STREAM has come.
    pub(super) received: bool,
    /// Nobody will read what comes.
    pub(super) unread: bool,
    /// What is left of the length that was declared.
    pub(super) length: Option<u64>,
    /// Bytes that may still come.
    pub(super) receive_window: i64,
    /// Bytes that were read and not yet given back.
    pub(super) released: u32,
    pub(super) reader: Option<Waker>,

    /// The answer has no body, whatever it says: to a HEAD.
    pub(super) bodiless: bool,
    /// A request that makes the stream a tunnel, where the answer says so.
    pub(super) upgrade: bool,
    /// Data without a window, or without room.
    pub(super) queue: VecDeque<Bytes>,
    /// Bytes of `queue`.
    pub(super) queued: usize,
    /// What follows the data.
    pub(super) end: End,
    pub(super) send_window: i64,
    /// The last DATA frame.
    pub(super) mark: Mark,
    /// It stands in the list of those that have something to send.
    pub(super) listed: bool,
    pub(super) writer: Option<Waker>,
}

/// How our direction ends.
#[derive(Debug, Default)]
pub(super) enum End {
    /// It does not yet.
    #[default]
    Open,
    /// Behind the data.
    Data,
    /// With trailers behind the data.
    Trailers(Headers),
    /// END_STREAM was put into the outbox.
    Sent,
}

impl Stream {
    /// Keeps data until it is read. Where some waits already, small pieces are put together: each
    /// would hold the whole buffer it came in, which no window counts.
    pub(super) fn keep_data(&mut self, data: BytesMut) {
        if self.data.is_empty() || data.len() > SMALL {
            self.copied = false;
            return self.data.push_back(data.freeze());
        }
        let room = |last: &Bytes| last.len() + data.len() <= FRAME_SIZE;
        let last = match self.copied && self.data.back().is_some_and(room) {
            true => self.data.pop_back(),
            false => None,
        };
        let mut pieces = match last.map(Bytes::try_into_mut) {
            Some(Ok(last)) => last,
            Some(Err(last)) => BytesMut::from(&last[..]),
            None => BytesMut::new(),
        };
        pieces.extend_from_slice(&data);
        self.data.push_back(pieces.freeze());
        self.copied = true;
    }

    /// Remembers who reads.
    pub(super) fn wait_to_read(&mut self, cx: &Context<'_>) {
        keep(&mut self.reader, cx);
    }

    /// Remembers who writes.
    pub(super) fn wait_to_write(&mut self, cx: &Context<'_>) {
        keep(&mut self.writer, cx);
    }

    pub(super) fn wake_reader(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    pub(super) fn wake_writer(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }

    /// Whether END_STREAM went, or stands behind data that goes.
    pub(super) fn is_ended(&self) -> bool {
        !matches!(self.end, End::Open)
    }

    /// Forgets what was to go.
    pub(super) fn drop_queue(&mut self) {
        self.queue.clear();
        self.queued = 0;
    }

    /// Makes the place ready for another stream; storage is kept.
    fn clear(&mut self) {
        let mut old = std::mem::take(self);
        old.heads.clear();
        old.data.clear();
        old.queue.clear();
        let kept = |capacity| capacity <= KEPT;
        if kept(old.heads.capacity()) {
            self.heads = old.heads;
        }
        if kept(old.data.capacity()) {
            self.data = old.data;
        }
        if kept(old.queue.capacity()) {
            self.queue = old.queue;
        }
    }
}

/// Remembers a task, which is mostly the one that is remembered.
pub(super) fn keep(kept: &mut Option<Waker>, cx: &Context<'_>) {
    match kept {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => *kept = Some(cx.waker().clone()),
    }
}

/// Data that is copied rather than that it holds a buffer.
const SMALL: usize = FRAME_SIZE / 2;

/// Pieces that a place keeps storage for.
const KEPT: usize = 32;

/// All streams of a connection that are open or that somebody still holds.
#[derive(Debug, Default)]
pub(super) struct Store {
    places: Vec<Stream>,
    free: Vec<u32>,
    ids: HashMap<u32, u32, BuildHasherDefault<IdHasher>>,
    closed: Closed,
}

impl Store {
    /// Opens a stream and gives its place.
    pub(super) fn open(&mut self, id: u32) -> u32 {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.places.push(Stream::default());
                (self.places.len() - 1) as u32
            }
        };
        let stream = self.get(place);
        stream.id = id;
        stream.open = true;
        self.ids.insert(id, place);
        place
    }

    /// The stream of a place that somebody holds or that is open.
    pub(super) fn get(&mut self, place: u32) -> &mut Stream {
        &mut self.places[place as usize]
    }

    /// The place of an open stream.
    pub(super) fn find(&self, id: u32) -> Option<u32> {
        self.ids.get(&id).copied()
    }

    /// Streams that are open.
    pub(super) fn open_count(&self) -> usize {
        self.ids.len()
    }

    /// The places of all open streams.
    pub(super) fn places(&self) -> Vec<u32> {
        self.ids.values().copied().collect()
    }

    /// The stream is over on the wire.
    pub(super) fn close(&mut self, place: u32, how: How) {
        let stream = self.get(place);
        if std::mem::replace(&mut stream.open, false) {
            let id = stream.id;
            self.ids.remove(&id);
            self.closed.remember(id, how);
        }
        self.give_back(place);
    }

    /// A stream ended before it was opened.
    pub(super) fn remember(&mut self, id: u32, how: How) {
        self.closed.remember(id, how);
    }

    /// The peer has reset a stream, too, that we had reset: it does not send to it in good faith any more.
    pub(super) fn heard_reset(&mut self, id: u32) {
        self.closed.heard_reset(id);
    }

    /// How a stream that is over ended, if that is not long ago.
    pub(super) fn closed(&self, id: u32) -> Option<How> {
        self.closed.find(id)
    }

    /// Takes the place back once nobody holds it and nothing is to be sent from it.
    pub(super) fn give_back(&mut self, place: u32) {
        let stream = self.get(place);
        if stream.handles == 0 && !stream.open && !stream.listed && stream.id != 0 {
            stream.clear();
            self.free.push(place);
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// By END_STREAM or RST_STREAM of the peer.
    Peer,
    /// By our RST_STREAM, which the peer may not have seen yet.
    Us,
}

/// The streams that ended last: what comes for them may have been sent in good faith.
#[derive(Debug, Default)]
struct Closed {
    by_peer: Ring<128>,
    /// More of them: all that a peer sends within a round trip may be for streams that were reset
    /// at once, and those that end well do not drive them out.
    by_us: Ring<1024>,
}

impl Closed {
    fn remember(&mut self, id: u32, how: How) {
        match how {
            How::Peer => self.by_peer.push(id),
            How::Us => self.by_us.push(id),
        }
    }

    fn heard_reset(&mut self, id: u32) {
        if let Some(ours) = self.by_us.ids.iter_mut().find(|ours| **ours == id) {
            *ours = NOBODY;
            self.by_peer.push(id);
        }
    }

    fn find(&self, id: u32) -> Option<How> {
        if self.by_us.ids.contains(&id) {
            return Some(How::Us);
        }
        self.by_peer.ids.contains(&id).then_some(How::Peer)
    }
}

/// The identifier of no stream that ends: it is the connection's.
const NOBODY: u32 = 0;

/// The last `N` identifiers.
#[derive(Debug, Default)]
struct Ring<const N: usize> {
    ids: Vec<u32>,
    next: usize,
}

impl<const N: usize> Ring<N> {
    fn push(&mut self, id: u32) {
        match self.ids.get_mut(self.next) {
            Some(oldest) => *oldest = id,
            None => self.ids.push(id),
        }
        self.next = (self.next + 1) % N;
    }
}

/// Identifiers grow one by one; their multiples spread them well enough.
#[derive(Debug, Default, Clone, Copy)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(byte.into());
        }
    }

    fn write_u32(&mut self, id: u32) {
        let product = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
