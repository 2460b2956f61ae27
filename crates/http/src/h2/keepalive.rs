//! PINGs that find out whether the peer still lives (`connection_keepalive`).

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use ::h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep_until};

use super::guard::Facts;

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
    pings: PingPong,
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
    pub(super) fn new(options: KeepAlive, pings: PingPong, facts: &Rc<Facts>, seed: u64) -> Pinger {
        let mut pinger = Pinger {
            options,
            pings,
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
    fn look_for_streams(&mut self) {
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
            self.send();
        }
    }

    /// Ready when the peer is dead.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.look_for_streams();
        loop {
            if self.waits.is_some() {
                match self.pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.waits = None;
                        self.rest();
                        continue;
                    }
                    // The connection is over, which its driver sees by itself.
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => {}
                }
            } else if self.options.interval.is_none() {
                return Poll::Pending;
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            match self.waits {
                None => self.send(),
                Some(seen) if seen == self.facts.received.get() => return Poll::Ready(()),
                // Something came, if not the answer: a busy peer is no dead one.
                Some(_) => self.wait(),
            }
        }
    }

    fn send(&mut self) {
        if self.pings.send_ping(Ping::opaque()).is_ok() {
            self.wait();
        } else {
            self.rest();
        }
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
