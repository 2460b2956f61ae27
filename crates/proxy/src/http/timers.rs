//! The deadlines of one request, with one timer for all of them.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, RawWakerVTable, ready},
    time::Duration,
};

use tokio::{
    task::coop,
    time::{Instant, Sleep, sleep_until},
};

/// A timer for one deadline after another, of requests that follow one another as well.
///
/// It is set again only when it is later than what is waited for, so that most requests find it set, and it is asked
/// again only when it has fired or somebody else asks: each asking enters a waker, which is dear.
#[derive(Debug, Default)]
pub(super) struct Timer {
    sleep: Option<Pin<Box<Sleep>>>,
    /// It has not fired since it was set.
    set: bool,
    /// Whom it wakes. It holds on to that waker, so that no other comes to lie at the same place.
    wakes: Option<(*const (), &'static RawWakerVTable)>,
}

impl Timer {
    /// Completes at `at`, or before: an earlier request may have left it set for less.
    pub(super) fn poll(&mut self, at: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| {
            self.set = true;
            Box::pin(sleep_until(at))
        });
        if !self.set || sleep.deadline() > at {
            sleep.as_mut().reset(at);
            (self.set, self.wakes) = (true, None);
        }
        let waker = (cx.waker().data(), cx.waker().vtable());
        let is_known = |(data, table): (_, &'static RawWakerVTable)| {
            data == waker.0 && std::ptr::eq(table, waker.1)
        };
        if self.wakes.is_some_and(is_known) && !sleep.is_elapsed() {
            return Poll::Pending;
        }
        // A task that has done enough for one turn is sent away without being entered.
        self.wakes = coop::has_budget_remaining().then_some(waker);
        ready!(sleep.as_mut().poll(cx));
        (self.set, self.wakes) = (false, None);
        Poll::Ready(())
    }
}

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

    /// Waits for the first deadline, and calls `log` each time a line is due until then.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        timer: &mut Timer,
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
            ready!(timer.poll(at, cx));
            let now = Instant::now();
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

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::SeqCst},
        },
        task::{Wake, Waker},
    };

    use super::*;

    #[derive(Default)]
    struct Bell(AtomicBool);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.store(true, SeqCst);
        }
    }

    fn bell() -> (Arc<Bell>, Waker) {
        let bell = Arc::new(Bell::default());
        (bell.clone(), bell.into())
    }

    async fn rung(bell: &Bell) {
        while !bell.0.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn who_asks_last_is_woken() {
        let (mut timer, at) = (Timer::default(), Instant::now() + Duration::from_millis(20));
        let ((first, one), (second, two)) = (bell(), bell());
        for waker in [&one, &one, &two, &two] {
            let asked = timer.poll(at, &mut Context::from_waker(waker));
            assert!(asked.is_pending());
        }
        rung(&second).await;
        assert!(!first.0.load(SeqCst));
        assert!(timer.poll(at, &mut Context::from_waker(&two)).is_ready());
    }

    #[tokio::test]
    async fn an_earlier_deadline_sets_it_anew_and_a_later_one_does_not() {
        let now = Instant::now();
        let (near, far) = (
            now + Duration::from_millis(20),
            now + Duration::from_secs(600),
        );
        let (mut timer, (bell, waker)) = (Timer::default(), bell());
        for at in [far, near, far] {
            let asked = timer.poll(at, &mut Context::from_waker(&waker));
            assert!(asked.is_pending());
        }
        rung(&bell).await;
        assert!(timer.poll(far, &mut Context::from_waker(&waker)).is_ready());
        // It has fired: now it waits for the later one.
        assert!(
            timer
                .poll(far, &mut Context::from_waker(&waker))
                .is_pending()
        );
    }

    #[tokio::test]
    async fn a_task_without_budget_is_entered_by_its_next_turn() {
        let (mut timer, at) = (Timer::default(), Instant::now() + Duration::from_millis(20));
        let task = async {
            let mut spent = false;
            std::future::poll_fn(|cx| {
                if !std::mem::replace(&mut spent, true) {
                    // All that a task may do in one turn.
                    while coop::has_budget_remaining() {
                        let _ = std::pin::pin!(coop::consume_budget()).poll(cx);
                    }
                }
                timer.poll(at, cx)
            })
            .await;
        };
        tokio::time::timeout(Duration::from_secs(10), task)
            .await
            .expect("the timer wakes it");
    }
}
