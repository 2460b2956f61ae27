//! What a peer may cost us: Envoy's flood budgets, on the frames that pass, and counts of them.
//!
//! Each frame that comes in is shown to the [`Guard`] before anything is done with it; a budget that is used up is noted
//! in [`Facts`], and the connection ends with GOAWAY.

use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use super::{
    Reason,
    frame::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PRIORITY,
        RST_STREAM, SETTINGS, WINDOW_UPDATE,
    },
};

/// Envoy's budgets (`Http2ProtocolOptions`), with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloodLimits {
    /// Frames of HEADERS, CONTINUATION and DATA in a row without payload and without END_STREAM (1).
    pub max_consecutive_inbound_frames_with_empty_payload: u32,
    /// PRIORITY frames for each stream that was opened (100).
    pub max_inbound_priority_frames_per_stream: u32,
    /// WINDOW_UPDATE frames for each DATA frame sent (10).
    pub max_inbound_window_update_frames_per_data_frame_sent: u32,
    /// Frames that a peer makes us send (1000): answers to PING and SETTINGS within a second; and resets for its own
    /// faults, of which 33 a second are forgiven.
    pub max_outbound_control_frames: u32,
    /// Streams that a client may reset at once (1000).
    pub stream_reset_burst: u64,
    /// Resets in a second that are forgiven (33).
    pub stream_reset_rate: u64,
}

impl Default for FloodLimits {
    fn default() -> Self {
        FloodLimits {
            max_consecutive_inbound_frames_with_empty_payload: 1,
            max_inbound_priority_frames_per_stream: 100,
            max_inbound_window_update_frames_per_data_frame_sent: 10,
            max_outbound_control_frames: 1000,
            stream_reset_burst: 1000,
            stream_reset_rate: 33,
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
    /// Streams that were opened only to be reset.
    Reset,
    /// PING and SETTINGS frames, each of which wants an answer; or faults, each of which wants a reset.
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
    /// Resets for faults of the peer since a moment, from which on some are forgiven when the budget is used up.
    faults: Cell<u64>,
    faults_since: Cell<Option<Instant>>,
    /// The same for streams that a client has reset.
    resets: Cell<u64>,
    resets_since: Cell<Option<Instant>>,
    flood: Cell<Option<Flood>>,
}

impl Facts {
    /// The budget that the peer has used up.
    pub fn flood(&self) -> Option<Flood> {
        self.flood.get()
    }
}

impl Facts {
    /// Bytes have come.
    pub(super) fn receive(&self, count: usize, stamped: bool) {
        self.received.set(self.received.get() + count as u64);
        if stamped {
            self.received_at.set(Some(Instant::now()));
        }
    }

    /// A head goes out; streams that we open count like those of the peer.
    pub(super) fn send_headers(&self) {
        add(&self.headers);
    }

    pub(super) fn send_data(&self) {
        add(&self.data_sent);
    }

    pub(super) fn send_reset(&self, reason: Reason) {
        add(&self.resets_sent);
        if reason == Reason::PROTOCOL_ERROR {
            add(&self.protocol_errors_sent);
        }
    }

    pub(super) fn send_goaway(&self) {
        add(&self.goaways_sent);
    }
}

/// Holds a peer to its budgets.
#[derive(Debug)]
pub(super) struct Guard {
    facts: Rc<Facts>,
    limits: FloodLimits,
    /// The peer is a client, whose resets cost us work.
    of_client: bool,
}

/// A budget is used up.
#[derive(Debug)]
pub(super) struct Flooded;

/// Faults that are forgiven in a second: the rate that nghttp2, and so Envoy, allows a peer beyond its budget. A connection
/// of days may see a few.
const FORGIVEN_PER_SECOND: u64 = 33;

/// The time in which `max_outbound_control_frames` answers may be asked for. Envoy counts the answers that wait to be
/// written; we write them before we read on, so the rate is what a flood can be told by.
const ANSWERS_PER: Duration = Duration::from_secs(1);

impl Guard {
    pub(super) fn new(facts: &Rc<Facts>, limits: FloodLimits, of_client: bool) -> Guard {
        Guard {
            facts: facts.clone(),
            limits,
            of_client,
        }
    }

    /// Counts a frame that came in; `length` is that of its payload without padding.
    ///
    /// # Errors
    /// A budget is used up.
    pub(super) fn frame(&self, kind: u8, flags: u8, length: usize) -> Result<(), Flooded> {
        let facts = &self.facts;
        let limits = &self.limits;
        let flood = match kind {
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
                    return Ok(());
                }
                facts.empty_in_a_row.set(facts.empty_in_a_row.get() + 1);
                let limit = limits.max_consecutive_inbound_frames_with_empty_payload;
                (facts.empty_in_a_row.get() > limit).then_some(Flood::Empty)
            }
            PRIORITY => {
                let limit = u64::from(limits.max_inbound_priority_frames_per_stream)
                    * (1 + facts.headers.get());
                (add(&facts.priorities) > limit).then_some(Flood::Priority)
            }
            WINDOW_UPDATE => {
                // Envoy's sum: five for the connection, two for each stream, and the budget for each DATA frame.
                let limit = 5 + 2
                    * (facts.headers.get()
                        + u64::from(limits.max_inbound_window_update_frames_per_data_frame_sent)
                            * facts.data_sent.get());
                (add(&facts.window_updates) > limit).then_some(Flood::WindowUpdate)
            }
            PING | SETTINGS if flags & ACK == 0 => self.wants_answer(),
            RST_STREAM => {
                add(&facts.resets_received);
                let (burst, rate) = (limits.stream_reset_burst, limits.stream_reset_rate);
                let within =
                    !self.of_client || within(&facts.resets, &facts.resets_since, burst, rate);
                (!within).then_some(Flood::Reset)
            }
            GOAWAY => {
                add(&facts.goaways_received);
                None
            }
            _ => None,
        };
        match flood {
            None => Ok(()),
            Some(flood) => {
                facts.flood.set(Some(flood));
                Err(Flooded)
            }
        }
    }

    /// Counts a fault of the peer's that is answered with a reset.
    ///
    /// # Errors
    /// The budget is used up.
    pub(super) fn fault(&self) -> Result<(), Flooded> {
        let facts = &self.facts;
        let budget = u64::from(self.limits.max_outbound_control_frames);
        if within(
            &facts.faults,
            &facts.faults_since,
            budget,
            FORGIVEN_PER_SECOND,
        ) {
            return Ok(());
        }
        facts.flood.set(Some(Flood::Control));
        Err(Flooded)
    }

    fn wants_answer(&self) -> Option<Flood> {
        let facts = &self.facts;
        let count = facts.wanting_answer.get() + 1;
        facts.wanting_answer.set(count);
        if count == 1 {
            facts.wanting_since.set(Some(Instant::now()));
        }
        if count <= self.limits.max_outbound_control_frames {
            return None;
        }
        let now = Instant::now();
        let since = facts.wanting_since.replace(Some(now));
        facts.wanting_answer.set(1);
        since
            .is_none_or(|since| now - since < ANSWERS_PER)
            .then_some(Flood::Control)
    }
}

/// Counts one more, and says whether the budget holds it; so many a second are forgiven, which is looked at when the budget
/// is used up.
fn within(count: &Cell<u64>, since: &Cell<Option<Instant>>, budget: u64, rate: u64) -> bool {
    if since.get().is_none() {
        since.set(Some(Instant::now()));
    }
    if add(count) <= budget {
        return true;
    }
    let now = Instant::now();
    let passed = now.saturating_duration_since(since.replace(Some(now)).unwrap_or(now));
    let forgiven = (passed.as_millis() as u64).saturating_mul(rate) / 1000;
    count.set(count.get().saturating_sub(forgiven));
    count.get() <= budget
}

fn add(cell: &Cell<u64>) -> u64 {
    cell.set(cell.get() + 1);
    cell.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> (Guard, Rc<Facts>) {
        let facts = Rc::new(Facts::default());
        (Guard::new(&facts, FloodLimits::default(), true), facts)
    }

    #[test]
    fn empty_frames_of_a_long_life_are_not_an_attack_but_two_in_a_row_are() {
        let (guard, facts) = guard();
        for _ in 0..300 {
            guard.frame(DATA, 0, 1).unwrap();
            guard.frame(DATA, 0, 0).unwrap();
            guard.frame(DATA, END_STREAM, 0).unwrap();
        }
        guard.frame(DATA, 0, 0).unwrap();
        assert!(guard.frame(CONTINUATION, 0, 0).is_err());
        assert_eq!(facts.flood(), Some(Flood::Empty));
    }

    #[test]
    fn budgets_grow_with_streams_and_with_data_sent() {
        for (kind, within, flood) in [
            (PRIORITY, 100 * 2, Flood::Priority),
            (WINDOW_UPDATE, 5 + 2 * (1 + 10), Flood::WindowUpdate),
            (PING, 1000, Flood::Control),
            (SETTINGS, 1000, Flood::Control),
        ] {
            let (guard, facts) = guard();
            facts.send_data();
            guard.frame(HEADERS, END_STREAM, 1).unwrap();
            for _ in 0..within {
                guard.frame(kind, 0, 4).unwrap();
            }
            assert_eq!(facts.flood(), None, "{flood:?}");
            assert!(guard.frame(kind, 0, 4).is_err());
            assert_eq!(facts.flood(), Some(flood));
        }
    }

    #[test]
    fn faults_are_forgiven_in_time_but_not_many_at_once() {
        let (guard, facts) = guard();
        let second = Duration::from_secs(1);
        for _ in 0..1000 {
            guard.fault().unwrap();
        }
        // A second later, 33 more; but not one beyond.
        facts.faults_since.set(Instant::now().checked_sub(second));
        for _ in 0..33 {
            guard.fault().unwrap();
        }
        assert_eq!(facts.flood(), None);
        facts.faults_since.set(Some(Instant::now() + second / 2));
        assert!(guard.fault().is_err());
        assert_eq!(facts.flood(), Some(Flood::Control));
    }

    #[test]
    fn a_client_may_reset_streams_but_not_all_the_time() {
        let (guard, facts) = guard();
        for _ in 0..1000 {
            guard.frame(RST_STREAM, 0, 4).unwrap();
        }
        let second = Duration::from_secs(1);
        facts.resets_since.set(Instant::now().checked_sub(second));
        for _ in 0..33 {
            guard.frame(RST_STREAM, 0, 4).unwrap();
        }
        facts.resets_since.set(Some(Instant::now() + second / 2));
        assert!(guard.frame(RST_STREAM, 0, 4).is_err());
        assert_eq!(facts.flood(), Some(Flood::Reset));
        // A server resets what it was asked for.
        let server = Guard::new(&Rc::default(), FloodLimits::default(), false);
        for _ in 0..3000 {
            server.frame(RST_STREAM, 0, 4).unwrap();
        }
    }

    #[test]
    fn what_passes_is_counted() {
        let (guard, facts) = guard();
        for reason in [Reason::PROTOCOL_ERROR, Reason::CANCEL] {
            facts.send_reset(reason);
        }
        guard.frame(RST_STREAM, 0, 4).unwrap();
        guard.frame(GOAWAY, 0, 8).unwrap();
        // Answers want no answer.
        for _ in 0..2000 {
            guard.frame(PING, ACK, 8).unwrap();
        }
        facts.receive(7, true);
        assert_eq!(
            (facts.resets_sent.get(), facts.protocol_errors_sent.get()),
            (2, 1)
        );
        assert_eq!(
            (facts.resets_received.get(), facts.goaways_received.get()),
            (1, 1)
        );
        assert_eq!(facts.received.get(), 7);
        assert!(facts.received_at.get().is_some());
    }
}
