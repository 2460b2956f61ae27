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
    /// An attempt lasted longer than its cluster allows.
    UpstreamStream,
    Idle,
    /// The client does not take the rest of the response.
    Flush,
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
    /// Of the attempt that goes on.
    pub(super) upstream_stream: Option<Instant>,
    /// Until the whole request has arrived.
    pub(super) receive: Option<Instant>,
    idle: Option<Instant>,
    idle_limit: Option<Duration>,
    /// The idle limit is that of what is left to be taken.
    flushing: bool,
    per_try_idle_limit: Option<Duration>,
    /// Bytes have moved since the idle limits were last set.
    touched: bool,
    /// When the next line of a stream that goes on is due, and how long after the last (`access_log_flush_interval`).
    log: Option<(Instant, Duration)>,
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

    /// All of the response is there, and waits for the client. Later calls change nothing.
    pub(super) fn flush(&mut self, limit: Option<Duration>) {
        if !std::mem::replace(&mut self.flushing, true) {
            (self.touched, self.idle_limit) = (false, limit);
            self.idle = limit.map(|limit| Instant::now() + limit);
        }
    }

    /// Bytes have moved. What time it is matters only to who has to wait for the next ones.
    pub(super) fn touch(&mut self) {
        self.touched = true;
    }

    /// Says how often a stream that goes on is logged.
    pub(super) fn log_each(&mut self, interval: Duration, now: Instant) {
        self.log = Some((now + interval, interval));
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

    /// What is due next; `None` in the second place is a line of the log.
    fn next(&self) -> Option<(Instant, Option<Expired>)> {
        let mut first = None;
        // Asked for each request: written so that it becomes a few comparisons.
        let mut look = |at: Option<Instant>, which| {
            if let Some(at) = at
                && first.is_none_or(|(first, _)| at < first)
            {
                first = Some((at, which));
            }
        };
        look(self.request, Some(Expired::Request));
        look(self.per_try, Some(Expired::PerTry));
        look(self.per_try_idle, Some(Expired::PerTryIdle));
        look(self.stream, Some(Expired::Stream));
        look(self.upstream_stream, Some(Expired::UpstreamStream));
        let idle = match self.flushing {
            true => Expired::Flush,
            false => Expired::Idle,
        };
        look(self.idle, Some(idle));
        look(self.receive, Some(Expired::Receive));
        look(self.log.map(|(at, _)| at), None);
        first
    }

    /// Waits for the first deadline, and calls `log` each time a line is due until then. The timer is set again only when it is later than that: it may be one that an
    /// earlier request has left, and fire too early.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut timer: Pin<&mut Option<Sleep>>,
        mut log: impl FnMut(),
    ) -> Poll<Expired> {
        // What is still to be taken has a limit as a whole.
        if self.touched && !self.flushing {
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
            let now = Instant::now();
            timer.set(None);
            if now < at {
                continue;
            }
            match which {
                Some(expired) => return Poll::Ready(expired),
                None => {
                    self.log = self.log.map(|(_, interval)| (now + interval, interval));
                    log();
                }
            }
        }
    }
}
