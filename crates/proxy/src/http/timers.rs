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
}

impl Deadlines {
    pub(super) fn new(
        stream: Option<Duration>,
        idle: Option<Duration>,
        receive: Option<Duration>,
    ) -> Deadlines {
        let now = Instant::now();
        Deadlines {
            stream: stream.map(|limit| now + limit),
            idle: idle.map(|limit| now + limit),
            idle_limit: idle,
            receive: receive.map(|limit| now + limit),
            ..Deadlines::default()
        }
    }

    /// Bytes have moved.
    pub(super) fn touch(&mut self) {
        if let Some(limit) = self.idle_limit {
            self.idle = Some(Instant::now() + limit);
        }
        if self.per_try_idle.is_some() {
            self.start_per_try_idle(self.per_try_idle_limit);
        }
    }

    /// An attempt begins, or bytes of it have moved.
    pub(super) fn start_per_try_idle(&mut self, limit: Option<Duration>) {
        self.per_try_idle_limit = limit;
        self.per_try_idle = limit.map(|limit| Instant::now() + limit);
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

    /// Waits for the first deadline. The timer is set again only when it is later than that.
    pub(super) fn poll(
        &self,
        cx: &mut Context<'_>,
        mut timer: Pin<&mut Option<Sleep>>,
    ) -> Poll<Expired> {
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
