//! Frames in (RFC 9113, 5 and 6): messages here, the others in `control`.
//!
//! A fault of a stream is answered here with RST_STREAM; a fault of the connection is the error,
//! and whoever drives the connection says GOAWAY.

use bytes::{Buf, BytesMut};

use super::{
    Reason,
    core::{Block, Core, Leaving, Role},
    fate::Fate,
    fields_in::{self, Read},
    frame::{
        self, ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, FRAME_SIZE, GOAWAY, HEAD, HEADERS,
        Head, MAX, PADDED, PING, PRIORITIZED, PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS,
        WINDOW_UPDATE, unpadded,
    },
    guard::Flooded,
    linger,
    store::How,
};
use crate::{Framing, Limits, Refusal, RequestHead};

/// A stream that the peer has opened.
pub(super) type Opened = (u32, RequestHead);

/// What a frame led to.
pub(super) type Outcome = Result<Option<Opened>, Reason>;

impl Core {
    /// Takes the next frame out of the buffer; `None` when it is not all there.
    ///
    /// # Errors
    /// The connection cannot go on.
    pub(super) fn receive(&mut self, buffer: &mut BytesMut) -> Option<Outcome> {
        let head = Head::parse(buffer.first_chunk()?);
        if head.length > FRAME_SIZE {
            return Some(Err(Reason::FRAME_SIZE_ERROR));
        }
        if buffer.len() < HEAD + head.length {
            return None;
        }
        Some(self.frame(head, buffer))
    }

    fn frame(&mut self, head: Head, buffer: &mut BytesMut) -> Outcome {
        let payload = &buffer[HEAD..HEAD + head.length];
        if !self.begun && (head.kind != SETTINGS || head.has(ACK)) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if self.block.is_some() && head.kind != CONTINUATION {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let padded = matches!(head.kind, DATA | HEADERS) && head.has(PADDED);
        let net = match payload.first() {
            Some(&padding) if padded => head.length.saturating_sub(1 + usize::from(padding)),
            _ => head.length,
        };
        self.guard.frame(head.kind, head.flags, net)?;
        let mut opened = None;
        match head.kind {
            DATA => return self.data(head, buffer).map(|()| None),
            HEADERS => opened = self.headers(head, payload)?,
            PRIORITY => self.priority(head, payload)?,
            RST_STREAM => self.peer_reset(head, payload)?,
            SETTINGS => self.settings(head, payload)?,
            PUSH_PROMISE => return Err(Reason::PROTOCOL_ERROR),
            PING => self.ping(head, payload)?,
            GOAWAY => self.goaway(head, payload)?,
            WINDOW_UPDATE => self.window_update(head, payload)?,
            CONTINUATION => opened = self.continuation(head, payload)?,
            // What nobody has defined is passed over.
            _ => {}
        }
        buffer.advance(HEAD + head.length);
        Ok(opened)
    }

    /// Whether nobody has opened this stream yet.
    pub(super) fn is_idle(&self, id: u32) -> bool {
        match (self.role, id % 2) {
            (Role::Server, 1) => id > self.last_in,
            (Role::Client, 1) => id >= self.next_out,
            _ => true,
        }
    }

    /// Resets a stream for a fault of the peer.
    ///
    /// # Errors
    /// It has made too many.
    pub(super) fn fault(&mut self, id: u32, reason: Reason) -> Result<(), Reason> {
        self.guard.fault()?;
        match self.store.find(id) {
            Some(place) => self.reset(place, reason),
            None => {
                self.facts.send_reset(reason);
                frame::put_reset(self.out.buffer(), id, reason);
                self.store.remember(id, How::Us);
            }
        }
        Ok(())
    }

    /// Whether a stream that is over may still be sent to: we have reset it, and the peer did not
    /// know. What a client does not remember it has opened all the same, however long ago.
    fn is_given_up(&self, id: u32) -> bool {
        match self.store.closed(id) {
            Some(how) => how == How::Us,
            None => self.role == Role::Client,
        }
    }

    fn data(&mut self, head: Head, buffer: &mut BytesMut) -> Result<(), Reason> {
        if head.stream == 0 || self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let (from, to) = unpadded(&head, &buffer[HEAD..HEAD + head.length])?;
        let (length, ended) = (head.length, head.has(END_STREAM));
        buffer.advance(HEAD + from);
        let data = buffer.split_to(to - from);
        buffer.advance(length - to);
        self.receive_window -= length as i64;
        if self.receive_window < 0 {
            return Err(Reason::FLOW_CONTROL_ERROR);
        }
        let open = self.store.find(head.stream);
        let Some(place) = open.filter(|&place| !self.store.get(place).received) else {
            self.release_connection(length);
            return match open.is_none() && self.is_given_up(head.stream) {
                true => Ok(()),
                false => self.fault(head.stream, Reason::STREAM_CLOSED),
            };
        };
        let stream = self.store.get(place);
        stream.receive_window -= length as i64;
        let well = stream.has_head
            && match &mut stream.length {
                None => true,
                Some(left) => {
                    let count = data.len() as u64;
                    let fits = count <= *left;
                    *left = left.saturating_sub(count);
                    fits && (!ended || *left == 0)
                }
            };
        let reason = match stream.receive_window < 0 {
            true => Some(Reason::FLOW_CONTROL_ERROR),
            false => (!well).then_some(Reason::PROTOCOL_ERROR),
        };
        if let Some(reason) = reason {
            self.release_connection(length);
            return self.fault(head.stream, reason);
        }
        let kept = if stream.unread { 0 } else { data.len() };
        if kept > 0 {
            stream.keep_data(data);
            stream.wake_reader();
        }
        if ended {
            self.received_end(place);
        }
        if length > kept {
            // Padding, and what nobody reads, is given back at once.
            self.release_connection(length - kept);
            let stream = self.store.get(place);
            if stream.open && !stream.unread {
                stream.released += (length - kept) as u32;
            } else if stream.lingers() {
                stream.released += length as u32;
                if stream.released > linger::MOST {
                    self.reset(place, Reason::NO_ERROR);
                }
            }
        }
        Ok(())
    }

    /// END_STREAM has come.
    fn received_end(&mut self, place: u32) {
        let stream = self.store.get(place);
        stream.received = true;
        stream.wake_reader();
        if matches!(stream.end, super::store::End::Sent) {
            self.close(place, How::Peer);
        }
    }

    fn headers(&mut self, head: Head, payload: &[u8]) -> Outcome {
        if head.stream == 0 || head.stream.is_multiple_of(2) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let (mut from, to) = unpadded(&head, payload)?;
        let mut circular = false;
        if head.has(PRIORITIZED) {
            let Some(priority) = payload[from..to].first_chunk::<5>() else {
                return Err(Reason::FRAME_SIZE_ERROR);
            };
            circular = frame::number(priority) & MAX == head.stream;
            from += priority.len();
        }
        let ended = head.has(END_STREAM);
        if !head.has(END_HEADERS) {
            self.block = Some(Block {
                stream: head.stream,
                ended,
                circular,
                bytes: payload[from..to].to_vec(),
                pieces: 0,
            });
            return Ok(None);
        }
        self.whole_block(head.stream, ended, circular, &payload[from..to])
    }

    fn continuation(&mut self, head: Head, payload: &[u8]) -> Outcome {
        let most = self.settings.header_list as usize + FRAME_SIZE;
        let Some(block) = &mut self.block else {
            return Err(Reason::PROTOCOL_ERROR);
        };
        if block.stream != head.stream {
            return Err(Reason::PROTOCOL_ERROR);
        }
        block.pieces += 1;
        let size = block.bytes.len() + payload.len();
        if size > most || block.pieces > PIECES + most / FRAME_SIZE {
            return Err(Reason::ENHANCE_YOUR_CALM);
        }
        block.bytes.extend_from_slice(payload);
        if !head.has(END_HEADERS) {
            return Ok(None);
        }
        match self.block.take() {
            Some(block) => {
                self.whole_block(block.stream, block.ended, block.circular, &block.bytes)
            }
            None => Ok(None),
        }
    }

    fn whole_block(&mut self, id: u32, ended: bool, circular: bool, block: &[u8]) -> Outcome {
        if let Some(place) = self.store.find(id) {
            let stream = self.store.get(place);
            if stream.received {
                self.skip(block)?;
                return self.fault(id, Reason::STREAM_CLOSED).map(|()| None);
            }
            let result = match (self.role, stream.has_head) {
                (_, true) => self.trailers(place, ended, block),
                (_, false) => self.response(place, ended, block),
            };
            if circular {
                return self.fault(id, Reason::PROTOCOL_ERROR).map(|()| None);
            }
            return result.map(|()| None);
        }
        if !self.is_idle(id) {
            self.skip(block)?;
            return match self.store.closed(id) {
                _ if self.is_given_up(id) => Ok(None),
                Some(_) => Err(Reason::STREAM_CLOSED),
                None => Err(Reason::PROTOCOL_ERROR),
            };
        }
        match self.role {
            Role::Server => self.request(id, ended, circular, block),
            Role::Client => Err(Reason::PROTOCOL_ERROR),
        }
    }

    /// A block that nobody asked for still changes the table.
    fn skip(&mut self, block: &[u8]) -> Result<(), Reason> {
        self.decoder.decode(block, (0, 0), |_| {})?;
        Ok(())
    }

    fn request(&mut self, id: u32, ended: bool, circular: bool, block: &[u8]) -> Outcome {
        self.last_in = id;
        if let Leaving::Last(last) = self.leaving
            && id > last
        {
            self.skip(block)?;
            self.store.remember(id, How::Us);
            return Ok(None);
        }
        let rules = self.rules();
        let read = fields_in::read_request(&mut self.decoder, block, rules, &mut self.cookies)?;
        if circular {
            return self.fault(id, Reason::PROTOCOL_ERROR).map(|()| None);
        }
        if self.store.open_count() >= self.settings.concurrent_streams as usize {
            return self.fault(id, Reason::REFUSED_STREAM).map(|()| None);
        }
        match read {
            Read::Good(mut head, length) => {
                if ended && length.is_some_and(|length| length > 0) {
                    return self.fault(id, Reason::PROTOCOL_ERROR).map(|()| None);
                }
                head.framing = framing(ended, length);
                let place = self.open(id);
                let stream = self.store.get(place);
                stream.has_head = true;
                stream.received = ended;
                stream.length = length;
                stream.bodiless = head.method == crate::Method::Head;
                Ok(Some((place, head)))
            }
            Read::TooLarge => {
                let place = self.open(id);
                let stream = self.store.get(place);
                stream.has_head = true;
                stream.received = ended;
                stream.unread = true;
                self.answer(place, 431);
                Ok(None)
            }
            Read::Malformed => self.fault(id, Reason::PROTOCOL_ERROR).map(|()| None),
        }
    }

    /// Opens a stream with the windows of both sides.
    pub(super) fn open(&mut self, id: u32) -> u32 {
        let place = self.store.open(id);
        let stream = self.store.get(place);
        stream.send_window = self.peer.stream_window.into();
        stream.receive_window = self.settings.stream_window.into();
        place
    }

    fn response(&mut self, place: u32, ended: bool, block: &[u8]) -> Result<(), Reason> {
        let rules = self.rules();
        let read = fields_in::read_response(&mut self.decoder, block, rules, &mut self.cookies)?;
        let stream = self.store.get(place);
        let id = stream.id;
        let (mut head, length) = match read {
            Read::Good(head, length) => (head, length),
            Read::TooLarge => return self.refuse(place, TOO_MANY),
            Read::Malformed => return self.fault(id, Reason::PROTOCOL_ERROR),
        };
        if head.is_informational() {
            if ended {
                return self.fault(id, Reason::PROTOCOL_ERROR);
            }
            stream.informational += 1;
            if stream.informational > Limits::default().informational {
                return self.refuse(place, TOO_MANY_INFORMATIONAL);
            }
        } else {
            stream.has_head = true;
            // What a tunnel says of a length means nothing (RFC 9110, 9.3.6).
            let tunnel = stream.upgrade && (200..300).contains(&head.status);
            let bodiless = !tunnel && (stream.bodiless || matches!(head.status, 204 | 304));
            stream.length = match bodiless {
                true => Some(0),
                false => length.filter(|_| !tunnel),
            };
            if ended && stream.length.is_some_and(|length| length > 0) {
                return self.fault(id, Reason::PROTOCOL_ERROR);
            }
            head.framing = framing(ended || bodiless, stream.length);
        }
        stream.heads.push_back(head);
        stream.wake_reader();
        if ended {
            self.received_end(place);
        }
        Ok(())
    }

    /// Gives a response up that is more than we take.
    fn refuse(&mut self, place: u32, refusal: Refusal) -> Result<(), Reason> {
        self.store.get(place).fate = Some(Fate::Refused(refusal));
        self.reset(place, Reason::CANCEL);
        Ok(())
    }

    fn trailers(&mut self, place: u32, ended: bool, block: &[u8]) -> Result<(), Reason> {
        let rules = self.rules();
        let read = fields_in::read_trailers(&mut self.decoder, block, rules, &mut self.cookies)?;
        let stream = self.store.get(place);
        let id = stream.id;
        let whole = stream.length.is_none_or(|left| left == 0);
        match read {
            Read::Good(trailers, _) if ended && whole => {
                if !stream.unread && !trailers.is_empty() {
                    stream.trailers = Some(trailers);
                }
                self.received_end(place);
                Ok(())
            }
            Read::TooLarge => self.fault(id, Reason::ENHANCE_YOUR_CALM),
            _ => self.fault(id, Reason::PROTOCOL_ERROR),
        }
    }
}

/// How the body of a message is delimited.
fn framing(ended: bool, length: Option<u64>) -> Framing {
    match length {
        _ if ended => Framing::None,
        Some(length) if length > 0 => Framing::Length(length),
        _ => Framing::Chunked,
    }
}

/// Frames of CONTINUATION that a block may have beyond those that its size asks for.
const PIECES: usize = 8;

const TOO_MANY_INFORMATIONAL: Refusal = Refusal {
    status: 502,
    detail: "http2.too_many_informational",
};

const TOO_MANY: Refusal = Refusal {
    status: 502,
    detail: "http2.too_many_headers",
};

impl From<Flooded> for Reason {
    fn from(_: Flooded) -> Reason {
        Reason::ENHANCE_YOUR_CALM
    }
}
