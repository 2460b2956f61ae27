//! PINGs that find out whether the peer still lives (`connection_keepalive`).

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::{core::Core, frame, guard::Facts};

/// When PINGs are sent; none where both intervals are absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive {
    /// From an answer to the next PING.
    pub interval: Option<Duration>,
    /// Percent of the interval that is added at random (15).
    pub interval_jitter: u32,
    /// A peer that sends nothing for this long after a PING is dead.
    pub timeout: Duration,
    /// A PING goes before a new stream when nothing has come for this long.
    pub connection_idle_interval: Option<Duration>,
}

/// The PINGs of one connection.
#[derive(Debug)]
pub(super) struct Pinger {
    options: KeepAlive,
    facts: Rc<Facts>,
    /// Until the next PING, or until the answer has to be there.
    timer: Pin<Box<Sleep>>,
    /// Bytes received when the PING went, or when the answer was last seen to be near.
    waits: Option<u64>,
    /// Streams that had been opened when we last looked.
    opened: u64,
    random: u64,
}

impl Pinger {
    pub(super) fn new(options: KeepAlive, facts: &Rc<Facts>, seed: u64) -> Pinger {
        let mut pinger = Pinger {
            options,
            facts: facts.clone(),
            timer: Box::pin(sleep_until(Instant::now())),
            waits: None,
            opened: 0,
            random: seed | 1,
        };
        pinger.rest();
        pinger
    }

    /// A stream that begins after a silence takes a PING along.
    fn look_for_streams(&mut self, core: &mut Core) {
        let opened = self.facts.opened.get();
        if opened == self.opened {
            return;
        }
        self.opened = opened;
        let idle = self.options.connection_idle_interval;
        if self.waits.is_none()
            && let (Some(limit), Some(last)) = (idle, self.facts.received_at.get())
            && last.elapsed() > limit
        {
            self.send(core);
        }
    }

    /// Ready when the peer is dead.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, core: &mut Core) -> Poll<()> {
        self.look_for_streams(core);
        loop {
            if self.waits.is_some() {
                if std::mem::take(&mut core.answered) {
                    self.waits = None;
                    self.rest();
                    continue;
                }
            } else if self.options.interval.is_none() {
                return Poll::Pending;
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            match self.waits {
                None => self.send(core),
                Some(seen) if seen == self.facts.received.get() => return Poll::Ready(()),
                // Something came, if not the answer: a busy peer is no dead one.
                Some(_) => self.wait(),
            }
        }
    }

    fn send(&mut self, core: &mut Core) {
        core.answered = false;
        frame::put_ping(core.out.buffer(), 0, PAYLOAD);
        self.wait();
    }

    fn wait(&mut self) {
        self.waits = Some(self.facts.received.get());
        self.timer
            .as_mut()
            .reset(Instant::now() + self.options.timeout);
    }

    fn rest(&mut self) {
        let Some(interval) = self.options.interval else {
            return;
        };
        // xorshift64: enough to keep connections that began together apart.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let part = (self.random % 1000) as u32;
        let jitter = interval.mul_f64(f64::from(self.options.interval_jitter * part) / 100_000.0);
        self.timer
            .as_mut()
            .reset(Instant::now() + interval + jitter);
    }
}

/// What our PINGs carry; one is on its way at a time.
const PAYLOAD: [u8; 8] = *b"outrigge";
