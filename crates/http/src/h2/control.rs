//! Frames in that are about streams and connections, not about messages (RFC 9113, 6.3 to 6.9).

use super::{
    Reason,
    core::{Core, LEAVING_PING, Role},
    fate::Fate,
    frame::{self, ACK, FRAME_SIZE, FRAME_SIZE_LIMIT, Head, MAX},
    store::How,
};

impl Core {
    pub(super) fn priority(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if head.stream == 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let reason = match payload.len() {
            5 if frame::number(payload) & MAX == head.stream => Reason::PROTOCOL_ERROR,
            5 => return Ok(()),
            _ => Reason::FRAME_SIZE_ERROR,
        };
        match self.is_idle(head.stream) {
            // There is nothing to reset.
            true => Err(reason),
            false => self.fault(head.stream, reason),
        }
    }

    pub(super) fn peer_reset(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if payload.len() != 4 {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        if head.stream == 0 || self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let Some(place) = self.store.find(head.stream) else {
            self.store.heard_reset(head.stream);
            return Ok(());
        };
        let fate = match Reason::from(frame::number(payload)) {
            Reason::REFUSED_STREAM => Fate::Unprocessed,
            reason => Fate::Reset(reason),
        };
        self.break_off(place, fate, How::Peer);
        Ok(())
    }

    pub(super) fn settings(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if head.stream != 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if head.has(ACK) {
            if !payload.is_empty() {
                return Err(Reason::FRAME_SIZE_ERROR);
            }
            self.decoder.allow(self.settings.header_table as usize);
            return Ok(());
        }
        let (settings, rest) = payload.as_chunks::<6>();
        if !rest.is_empty() {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        let (mut streams, mut window) = (None, None);
        for &[a, b, w, x, y, z] in settings {
            let value = u32::from_be_bytes([w, x, y, z]);
            match u16::from_be_bytes([a, b]) {
                frame::HEADER_TABLE_SIZE => self.encoder.set_limit(value as usize),
                frame::ENABLE_PUSH => {
                    let most = u32::from(self.role == Role::Server);
                    if value > most {
                        return Err(Reason::PROTOCOL_ERROR);
                    }
                }
                frame::MAX_CONCURRENT_STREAMS => streams = Some(value),
                frame::INITIAL_WINDOW_SIZE if value > MAX => {
                    return Err(Reason::FLOW_CONTROL_ERROR);
                }
                // The last one counts: to go through all streams for each would cost us more than the peer.
                frame::INITIAL_WINDOW_SIZE => window = Some(value),
                // A frame holds up all other streams: ours are of the smallest size, whatever may be.
                frame::MAX_FRAME_SIZE
                    if !(FRAME_SIZE as u32..=FRAME_SIZE_LIMIT).contains(&value) =>
                {
                    return Err(Reason::PROTOCOL_ERROR);
                }
                frame::ENABLE_CONNECT_PROTOCOL => {
                    if value > 1 || (value == 0 && self.peer.extended_connect) {
                        return Err(Reason::PROTOCOL_ERROR);
                    }
                    self.peer.extended_connect = value == 1;
                }
                _ => {}
            }
        }
        if let Some(window) = window {
            self.stream_windows(window)?;
        }
        if self.role == Role::Client {
            match streams {
                Some(streams) => self.peer.concurrent_streams = streams,
                None if !self.begun => self.peer.concurrent_streams = u32::MAX,
                None => {}
            }
            self.wake_openers();
        }
        self.begun = true;
        frame::put_settings_ack(self.out.buffer());
        Ok(())
    }

    /// The peer changes what streams may be sent before it has taken any.
    fn stream_windows(&mut self, size: u32) -> Result<(), Reason> {
        let change = i64::from(size) - i64::from(self.peer.stream_window);
        self.peer.stream_window = size;
        for place in self.store.places() {
            let stream = self.store.get(place);
            stream.send_window += change;
            if stream.send_window > i64::from(MAX) {
                return Err(Reason::FLOW_CONTROL_ERROR);
            }
            if stream.send_window > 0 && !stream.queue.is_empty() {
                self.list(place);
            }
        }
        Ok(())
    }

    pub(super) fn ping(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if head.stream != 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let payload: [u8; 8] = payload.try_into().map_err(|_| Reason::FRAME_SIZE_ERROR)?;
        if !head.has(ACK) {
            frame::put_ping(self.out.buffer(), ACK, payload);
        } else if payload == LEAVING_PING {
            self.leave();
        } else {
            self.answered = true;
        }
        Ok(())
    }

    pub(super) fn goaway(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if head.stream != 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if payload.len() < 8 {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        let last = frame::number(payload) & MAX;
        if self.left.is_some_and(|before| last > before) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        self.left = Some(last);
        if self.role == Role::Client {
            for place in self.store.places() {
                if self.store.get(place).id > last {
                    self.break_off(place, Fate::Unprocessed, How::Peer);
                }
            }
        }
        self.wake_openers();
        Ok(())
    }

    pub(super) fn window_update(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if payload.len() != 4 {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        let more = i64::from(frame::number(payload) & MAX);
        if head.stream == 0 {
            if more == 0 {
                return Err(Reason::PROTOCOL_ERROR);
            }
            self.send_window += more;
            return match self.send_window > i64::from(MAX) {
                true => Err(Reason::FLOW_CONTROL_ERROR),
                false => Ok(()),
            };
        }
        if self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let Some(place) = self.store.find(head.stream) else {
            return Ok(());
        };
        let stream = self.store.get(place);
        stream.send_window += more;
        if more == 0 {
            return self.fault(head.stream, Reason::PROTOCOL_ERROR);
        }
        if stream.send_window > i64::from(MAX) {
            return self.fault(head.stream, Reason::FLOW_CONTROL_ERROR);
        }
        if stream.send_window > 0 && !stream.queue.is_empty() {
            self.list(place);
        }
        Ok(())
    }
}
