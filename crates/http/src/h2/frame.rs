//! Frames: nine bytes of head, and the payloads that are the same each time (RFC 9113, 4 and 6).

use super::Reason;

/// Bytes of a frame's head: length, type, flags, stream.
pub(super) const HEAD: usize = 9;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

/// Of SETTINGS and PING.
pub(super) const ACK: u8 = 0x1;
/// Of DATA and HEADERS.
pub(super) const END_STREAM: u8 = 0x1;
/// Of HEADERS and CONTINUATION.
pub(super) const END_HEADERS: u8 = 0x4;
/// Of DATA and HEADERS.
pub(super) const PADDED: u8 = 0x8;
/// Of HEADERS.
pub(super) const PRIORITIZED: u8 = 0x20;

pub(super) const HEADER_TABLE_SIZE: u16 = 1;
pub(super) const ENABLE_PUSH: u16 = 2;
pub(super) const MAX_CONCURRENT_STREAMS: u16 = 3;
pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;
pub(super) const MAX_FRAME_SIZE: u16 = 5;
pub(super) const MAX_HEADER_LIST_SIZE: u16 = 6;
pub(super) const ENABLE_CONNECT_PROTOCOL: u16 = 8;

/// Bytes of payload that each side takes until it says otherwise; we never do.
pub(super) const FRAME_SIZE: usize = 16_384;
/// The largest frame size that may be said.
pub(super) const FRAME_SIZE_LIMIT: u32 = (1 << 24) - 1;
/// The largest stream identifier, and the largest window.
pub(super) const MAX: u32 = (1 << 31) - 1;

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) length: usize,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl Head {
    pub(super) fn parse(bytes: &[u8; HEAD]) -> Head {
        let &[a, b, c, kind, flags, w, x, y, z] = bytes;
        Head {
            length: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
            // The first bit has no meaning.
            stream: u32::from_be_bytes([w, x, y, z]) & MAX,
        }
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// As it is sent.
    pub(super) fn bytes(self) -> [u8; HEAD] {
        let [_, a, b, c] = (self.length as u32).to_be_bytes();
        let [w, x, y, z] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, w, x, y, z]
    }

    /// Writes the head of a frame whose payload follows.
    pub(super) fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes());
    }
}

/// Where the payload proper of a padded frame lies.
///
/// # Errors
/// More padding than payload: a fault of the connection.
pub(super) fn unpadded(head: &Head, payload: &[u8]) -> Result<(usize, usize), Reason> {
    if !head.has(PADDED) {
        return Ok((0, payload.len()));
    }
    match payload.split_first() {
        Some((&padding, rest)) if usize::from(padding) <= rest.len() => {
            Ok((1, payload.len() - usize::from(padding)))
        }
        Some(_) => Err(Reason::PROTOCOL_ERROR),
        None => Err(Reason::FRAME_SIZE_ERROR),
    }
}

/// Four bytes as a number; the caller has looked at the length.
pub(super) fn number(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let head = Head {
        length: payload.len(),
        kind,
        flags,
        stream,
    };
    head.put(out);
    out.extend_from_slice(payload);
}

pub(super) fn put_reset(out: &mut Vec<u8>, stream: u32, reason: Reason) {
    put(out, RST_STREAM, 0, stream, &u32::from(reason).to_be_bytes());
}

pub(super) fn put_window_update(out: &mut Vec<u8>, stream: u32, increment: u32) {
    put(out, WINDOW_UPDATE, 0, stream, &increment.to_be_bytes());
}

pub(super) fn put_ping(out: &mut Vec<u8>, flags: u8, payload: [u8; 8]) {
    put(out, PING, flags, 0, &payload);
}

pub(super) fn put_settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    let head = Head {
        length: settings.len() * 6,
        kind: SETTINGS,
        flags: 0,
        stream: 0,
    };
    head.put(out);
    for (name, value) in settings {
        out.extend_from_slice(&name.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

pub(super) fn put_settings_ack(out: &mut Vec<u8>) {
    put(out, SETTINGS, ACK, 0, &[]);
}

pub(super) fn put_goaway(out: &mut Vec<u8>, last: u32, reason: Reason) {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&last.to_be_bytes());
    payload[4..].copy_from_slice(&u32::from(reason).to_be_bytes());
    put(out, GOAWAY, 0, 0, &payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_as_it_was_written() {
        let head = Head {
            length: 0x012345,
            kind: HEADERS,
            flags: END_HEADERS | PADDED,
            stream: 0x7fff_fffd,
        };
        let mut out = Vec::new();
        head.put(&mut out);
        assert_eq!(out, [1, 0x23, 0x45, 1, 0xc, 0x7f, 0xff, 0xff, 0xfd]);
        out[5] |= 0x80;
        assert_eq!(Head::parse(out.first_chunk().unwrap()), head);
    }

    #[test]
    fn padding_may_fill_a_frame_but_not_more() {
        let head = |length| Head {
            length,
            kind: DATA,
            flags: PADDED,
            stream: 1,
        };
        assert_eq!(unpadded(&head(4), &[2, b'a', 0, 0]), Ok((1, 2)));
        assert_eq!(unpadded(&head(3), &[2, 0, 0]), Ok((1, 1)));
        assert_eq!(unpadded(&head(3), &[3, 0, 0]), Err(Reason::PROTOCOL_ERROR));
        assert_eq!(unpadded(&head(0), &[]), Err(Reason::FRAME_SIZE_ERROR));
    }
}
