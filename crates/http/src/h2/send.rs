//! Frames out: heads as they are written, data as the windows allow.

use bytes::Bytes;

use super::{
    Reason,
    core::{Core, Role},
    fate::Fate,
    fields_out::{self, Length},
    frame::{self, CONTINUATION, END_HEADERS, END_STREAM, FRAME_SIZE, HEAD, HEADERS, Head},
    hpack::Encoder,
    store::{End, How},
};
use crate::Headers;

/// Bytes in the outbox above which streams keep their data to themselves.
const FULL: usize = 128 * 1024;

/// Bytes of one stream that wait for a window or for room.
pub(super) const STREAM_QUEUE: usize = 64 * 1024;

impl Core {
    /// Puts a header block into the outbox.
    pub(super) fn put_block(
        &mut self,
        place: u32,
        ended: bool,
        write: impl FnOnce(&mut Encoder, &mut Vec<u8>),
    ) {
        self.facts.send_headers();
        let id = self.store.get(place).id;
        let out = self.out.buffer();
        let start = out.len();
        let mut head = Head {
            length: 0,
            kind: HEADERS,
            flags: if ended { END_STREAM } else { 0 },
            stream: id,
        };
        head.put(out);
        write(&mut self.encoder, out);
        let length = out.len() - start - HEAD;
        let rest = (length > FRAME_SIZE).then(|| out.split_off(start + HEAD + FRAME_SIZE));
        head.length = length.min(FRAME_SIZE);
        if rest.is_none() {
            head.flags |= END_HEADERS;
        }
        out[start..start + HEAD].copy_from_slice(&head.bytes());
        let rest = rest.unwrap_or_default();
        let mut pieces = rest.chunks(FRAME_SIZE).peekable();
        while let Some(piece) = pieces.next() {
            let flags = if pieces.peek().is_none() {
                END_HEADERS
            } else {
                0
            };
            let head = Head {
                length: piece.len(),
                kind: CONTINUATION,
                flags,
                stream: id,
            };
            head.put(out);
            out.extend_from_slice(piece);
        }
        if ended {
            self.sent_end(place);
        }
        self.wake();
    }

    /// Takes data of a stream whose direction is open.
    pub(super) fn send_data(&mut self, place: u32, mut data: Bytes) {
        if self.store.get(place).queue.is_empty() {
            self.put_data(place, &mut data, false);
        }
        if data.is_empty() {
            return;
        }
        let stream = self.store.get(place);
        stream.queued += data.len();
        stream.queue.push_back(data);
        self.list(place);
    }

    /// Ends our direction behind the data that waits.
    pub(super) fn send_end(&mut self, place: u32, trailers: Option<&Headers>) {
        let stream = self.store.get(place);
        if !stream.queue.is_empty() {
            stream.end = match trailers {
                Some(trailers) => End::Trailers(trailers.clone()),
                None => End::Data,
            };
            return;
        }
        match trailers {
            Some(trailers) => self.put_block(place, true, |encoder, out| {
                fields_out::write_trailers(encoder, trailers, out);
            }),
            None => self.put_end(place),
        }
    }

    /// END_STREAM on the last frame of the stream if that has not left, else on an empty one.
    fn put_end(&mut self, place: u32) {
        let stream = self.store.get(place);
        if !self.out.end(stream.mark) {
            self.facts.send_data();
            self.out.data(stream.id, Bytes::new(), true);
        }
        self.wake();
        self.sent_end(place);
    }

    /// Puts frames of one piece of data into the outbox, as far as windows and room allow.
    fn put_data(&mut self, place: u32, data: &mut Bytes, ends: bool) {
        let stream = self.store.get(place);
        while !data.is_empty() && self.out.len() < FULL {
            let window = stream.send_window.min(self.send_window).max(0) as usize;
            let count = data.len().min(window).min(FRAME_SIZE);
            if count == 0 {
                break;
            }
            let piece = data.split_to(count);
            stream.send_window -= count as i64;
            self.send_window -= count as i64;
            self.facts.send_data();
            let ended = ends && data.is_empty();
            stream.mark = self.out.data(stream.id, piece, ended);
        }
        if !self.out.is_empty() {
            self.wake();
        }
    }

    /// The stream has something to send.
    pub(super) fn list(&mut self, place: u32) {
        let stream = self.store.get(place);
        if !std::mem::replace(&mut stream.listed, true) {
            self.listed.push_back(place);
        }
    }

    /// Puts data that waits into the outbox, a piece of each stream in turn.
    pub(super) fn fill(&mut self) {
        // Whoever has no window comes back when it has one.
        while self.out.len() < FULL
            && self.send_window > 0
            && let Some(place) = self.listed.pop_front()
        {
            let stream = self.store.get(place);
            stream.listed = false;
            let Some(mut data) = stream.queue.pop_front() else {
                continue;
            };
            let before = data.len();
            let ends = stream.queue.is_empty() && matches!(stream.end, End::Data);
            self.put_data(place, &mut data, ends);
            let stream = self.store.get(place);
            stream.queued -= before - data.len();
            if stream.queued < STREAM_QUEUE {
                stream.wake_writer();
            }
            if !data.is_empty() {
                stream.queue.push_front(data);
            }
            if !stream.queue.is_empty() {
                if stream.send_window > 0 {
                    self.list(place);
                }
                continue;
            }
            match std::mem::take(&mut stream.end) {
                End::Open => {}
                End::Trailers(trailers) => self.put_block(place, true, |encoder, out| {
                    fields_out::write_trailers(encoder, &trailers, out);
                }),
                End::Data | End::Sent => self.sent_end(place),
            }
        }
    }

    /// END_STREAM of ours is in the outbox.
    fn sent_end(&mut self, place: u32) {
        let stream = self.store.get(place);
        stream.end = End::Sent;
        stream.wake_writer();
        if stream.received {
            self.close(place, How::Peer);
        } else if stream.handles == 0 {
            self.abandon(place);
        }
    }

    /// Resets a stream because we want to.
    pub(super) fn reset(&mut self, place: u32, reason: Reason) {
        let stream = self.store.get(place);
        if !stream.open {
            return;
        }
        self.facts.send_reset(reason);
        frame::put_reset(self.out.buffer(), stream.id, reason);
        self.wake();
        self.break_off(place, Fate::Reset(reason), How::Us);
    }

    /// Nobody holds the stream any more.
    pub(super) fn abandon(&mut self, place: u32) {
        let stream = self.store.get(place);
        let unread: usize = stream.data.drain(..).map(|data| data.len()).sum();
        stream.unread = true;
        if !stream.open {
            self.store.give_back(place);
        } else if !stream.is_ended() {
            self.reset(place, Reason::CANCEL);
        } else if matches!(stream.end, End::Sent) {
            match self.role {
                // The answer is complete; the rest of the request need not come.
                Role::Server => self.linger(place),
                Role::Client => self.reset(place, Reason::CANCEL),
            }
        }
        self.release_connection(unread);
    }

    /// Somebody has read so much of a stream: the peer may send as much again.
    pub(super) fn release(&mut self, place: u32, count: usize) {
        let limit = self.settings.stream_window;
        let stream = self.store.get(place);
        stream.released = stream.released.saturating_add(count as u32);
        if stream.open && !stream.received && stream.released >= limit / 2 {
            let released = std::mem::take(&mut stream.released);
            stream.receive_window += i64::from(released);
            frame::put_window_update(self.out.buffer(), stream.id, released);
            self.wake();
        }
        self.release_connection(count);
    }

    /// The same for the connection's window.
    pub(super) fn release_connection(&mut self, count: usize) {
        self.released = self.released.saturating_add(count as u32);
        if self.released >= self.settings.connection_window / 2 && self.ending.is_none() {
            let released = std::mem::take(&mut self.released);
            self.receive_window += i64::from(released);
            frame::put_window_update(self.out.buffer(), 0, released);
            self.wake();
        }
    }

    /// Answers a request that is not handed on, and takes no more of it.
    pub(super) fn answer(&mut self, place: u32, status: u16) {
        let head = crate::ResponseHead::new(status);
        self.put_block(place, true, |encoder, out| {
            fields_out::write_response(encoder, &head, Length::AsIs, out);
        });
    }
}
