//! Requests whose answer was complete before they were.
//!
//! The client is to be told that the rest need not come (RST_STREAM with NO_ERROR; RFC 9113, 8.1). That is not said at
//! once: what it had sent before it saw the answer is still on its way, and its faults are to be judged as on any other
//! stream; after our reset they could only be passed over. Mostly the rest is there within the next few frames, and
//! nothing has to be said at all.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    Reason,
    core::Core,
    store::{End, Stream},
};

/// How long the rest of a request may take to come, if nothing else is said: a round trip over a continent.
pub(super) const LONGEST: Duration = Duration::from_millis(100);

/// Bytes of it that are passed over: as much as a client sends before it hears of any window.
pub(super) const MOST: u32 = 65_535;

/// The streams that linger, in the order of their ends; some are over meanwhile.
#[derive(Debug, Default)]
pub(super) struct Lingering(VecDeque<(u32, Instant)>);

impl Stream {
    /// The answer has gone, and nobody wants the rest of the request.
    pub(super) fn lingers(&self) -> bool {
        self.open && self.handles == 0 && !self.received && matches!(self.end, End::Sent)
    }
}

impl Core {
    /// Waits a little for the rest of a request that was answered.
    pub(super) fn linger(&mut self, place: u32) {
        let id = self.store.get(place).id;
        let until = Instant::now() + self.settings.linger;
        self.lingering.0.push_back((id, until));
        self.wake();
    }

    /// When to look next; streams that have lingered long enough are reset.
    fn expire(&mut self) -> Option<Instant> {
        loop {
            let &(id, until) = self.lingering.0.front()?;
            if let Some(place) = self.store.find(id) {
                if Instant::now() < until {
                    return Some(until);
                }
                self.reset(place, Reason::NO_ERROR);
            }
            self.lingering.0.pop_front();
        }
    }
}

/// The clock of a connection for the streams that linger.
#[derive(Debug, Default)]
pub(super) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Resets streams whose time is over; ready when that has put something into the outbox.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, core: &mut Core) -> Poll<()> {
        let before = core.out.len();
        while let Some(until) = core.expire() {
            let timer = match &mut self.0 {
                Some(timer) => {
                    if timer.deadline() != until {
                        timer.as_mut().reset(until);
                    }
                    timer
                }
                none => none.insert(Box::pin(sleep_until(until))),
            };
            if timer.as_mut().poll(cx).is_pending() {
                break;
            }
        }
        match core.out.len() > before {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}
