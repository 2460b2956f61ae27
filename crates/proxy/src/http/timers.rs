//! The deadlines of one request, with one timer for all of them.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Which limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expired {
    Request,
    PerTry,
    PerTryIdle,
    Stream,
    Idle,
    /// The request did not arrive in time.
    Receive,
    /// Nor did its head.
    Headers,
}

/// Deadlines; `None` is none.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    pub(super) request: Option<Instant>,
    pub(super) per_try: Option<Instant>,
    pub(super) per_try_idle: Option<Instant>,
    pub(super) stream: Option<Instant>,
    /// Until the whole request has arrived.
    pub(super) receive: Option<Instant>,
    idle: Option<Instant>,
    idle_limit: Option<Duration>,
    per_try_idle_limit: Option<Duration>,
    /// Bytes have moved since the idle limits were last set.
    touched: bool,
}

impl Deadlines {
    pub(super) fn new(
        stream: Option<Duration>,
        idle: Option<Duration>,
        receive: Option<Duration>,
        now: Instant,
    ) -> Deadlines {
        Deadlines {
            stream: stream.map(|limit| now + limit),
            idle: idle.map(|limit| now + limit),
            idle_limit: idle,
            receive: receive.map(|limit| now + limit),
            ..Deadlines::default()
        }
    }

    /// Bytes have moved. What time it is matters only to who has to wait for the next ones.
    pub(super) fn touch(&mut self) {
        self.touched = true;
    }

    /// An attempt begins.
    pub(super) fn start_per_try_idle(&mut self, limit: Option<Duration>, now: Instant) {
        self.per_try_idle_limit = limit;
        self.per_try_idle = limit.map(|limit| now + limit);
    }

    fn set_idle(&mut self) {
        self.touched = false;
        let limits = (
            self.idle_limit,
            self.per_try_idle.and(self.per_try_idle_limit),
        );
        if limits == (None, None) {
            return;
        }
        let now = Instant::now();
        self.idle = limits.0.map(|limit| now + limit);
        self.per_try_idle = limits.1.map(|limit| now + limit);
    }

    fn next(&self) -> Option<(Instant, Expired)> {
        [
            (self.request, Expired::Request),
            (self.per_try, Expired::PerTry),
            (self.per_try_idle, Expired::PerTryIdle),
            (self.stream, Expired::Stream),
            (self.idle, Expired::Idle),
            (self.receive, Expired::Receive),
        ]
        .into_iter()
        .filter_map(|(at, which)| Some((at?, which)))
        .min_by_key(|(at, _)| *at)
    }

    /// Waits for the first deadline. The timer is set again only when it is later than that: it may be one that an
    /// earlier request has left, and fire too early.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut timer: Pin<&mut Option<Sleep>>,
    ) -> Poll<Expired> {
        if self.touched {
            self.set_idle();
        }
        loop {
            let Some((at, which)) = self.next() else {
                return Poll::Pending;
            };
            if timer
                .as_ref()
                .as_pin_ref()
                .is_none_or(|timer| timer.deadline() > at)
            {
                timer.set(Some(sleep_until(at)));
            }
            let Some(sleep) = timer.as_mut().as_pin_mut() else {
                return Poll::Pending;
            };
            if sleep.poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= at {
                return Poll::Ready(which);
            }
            timer.set(None);
        }
    }
}
