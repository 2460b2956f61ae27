//! Records that leave in batches: for services of access logs and collectors of spans.
//!
//! A request never waits for a service: its record is put by, and goes with others when they are many or the oldest has
//! waited long enough. A service that is slow or gone loses records, which are counted. When a worker ends, what still
//! waits goes at once.

use std::{
    cell::{Cell, RefCell},
    fmt,
    pin::Pin,
    rc::{Rc, Weak},
    time::Duration,
};

use stats::Counter;
use tokio::sync::Notify;

use crate::worker::{Worker, WorkerRef};

/// Sends a batch; tells whether it was taken.
type Send<R> = dyn Fn(Rc<Worker>, Vec<R>) -> Pin<Box<dyn Future<Output = bool>>>;

/// The records of one worker for one service.
pub(crate) struct Batches<R> {
    records: RefCell<Vec<R>>,
    /// Bytes that wait.
    size: Cell<usize>,
    /// A flush is on its way.
    scheduled: Cell<bool>,
    /// Batches that are being sent.
    sending: Cell<usize>,
    limits: Limits,
    send: Box<Send<R>>,
    worker: WorkerRef,
    /// Tells [`Reports`] of each batch that is done.
    done: Rc<Notify>,
    written: Counter,
    dropped: Counter,
}

/// All that keeps records back on a worker.
#[derive(Default)]
pub(crate) struct Reports {
    all: RefCell<Vec<Weak<dyn Kept>>>,
    /// A batch was taken or is lost.
    done: Rc<Notify>,
}

/// Records that are kept back.
trait Kept {
    /// Sends them, as far as the service keeps up; tells whether anything is still unanswered.
    fn hurry(self: Rc<Self>) -> bool;
}

/// When a batch goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// The longest that a record waits.
    pub(crate) interval: Duration,
    /// Bytes that wait at most.
    pub(crate) size: usize,
    /// Records that wait at most.
    pub(crate) count: usize,
}

impl Limits {
    /// Of a log, which is bounded by bytes alone.
    pub(crate) fn of_log(interval: Duration, size: usize) -> Self {
        Self {
            interval,
            size,
            count: usize::MAX,
        }
    }
}

impl<R: 'static> Batches<R> {
    /// No records yet. What becomes of them is counted below `scope`, which ends with a dot: under the first name those
    /// that were taken, under the second those that are lost.
    pub(crate) fn new<F>(
        worker: &Worker,
        limits: Limits,
        scope: &str,
        [written, dropped]: [&str; 2],
        send: impl Fn(Rc<Worker>, Vec<R>) -> F + 'static,
    ) -> Rc<Self>
    where
        F: Future<Output = bool> + 'static,
    {
        let scope = worker.stats.scope(scope);
        let batches = Rc::new(Self {
            records: RefCell::default(),
            size: Cell::new(0),
            scheduled: Cell::new(false),
            sending: Cell::new(0),
            limits,
            send: Box::new(move |worker, records| Box::pin(send(worker, records))),
            worker: worker.weak(),
            done: worker.reports.done.clone(),
            written: scope.counter(written),
            dropped: scope.counter(dropped),
        });
        let kept: Rc<dyn Kept> = batches.clone();
        worker.reports.add(&kept);
        batches
    }

    /// Puts a record of so many bytes by.
    pub(crate) fn add(self: &Rc<Self>, record: R, size: usize) {
        let mut records = self.records.borrow_mut();
        records.push(record);
        self.size.set(self.size.get() + size);
        let full = self.size.get() >= self.limits.size || records.len() >= self.limits.count;
        drop(records);
        if full {
            return self.flush();
        }
        if !self.scheduled.replace(true) {
            let batches = self.clone();
            tokio::task::spawn_local(async move {
                tokio::time::sleep(batches.limits.interval).await;
                batches.scheduled.set(false);
                batches.flush();
            });
        }
    }

    /// Sends what there is.
    fn flush(self: &Rc<Self>) {
        let records = std::mem::take(&mut *self.records.borrow_mut());
        self.size.set(0);
        let count = records.len() as u64;
        if count == 0 {
            return;
        }
        let Some(worker) = self.worker.upgrade() else {
            return;
        };
        if self.sending.get() >= SENDING {
            return self.dropped.add(count);
        }
        self.sending.set(self.sending.get() + 1);
        let batches = self.clone();
        tokio::task::spawn_local(async move {
            match (batches.send)(worker, records).await {
                true => batches.written.add(count),
                false => batches.dropped.add(count),
            }
            batches.sending.set(batches.sending.get() - 1);
            batches.done.notify_one();
        });
    }
}

impl<R: 'static> Kept for Batches<R> {
    fn hurry(self: Rc<Self>) -> bool {
        if self.sending.get() < SENDING {
            self.flush();
        }
        self.sending.get() > 0
    }
}

impl Reports {
    /// Whether nothing keeps records back.
    pub(crate) fn is_empty(&self) -> bool {
        self.all
            .borrow()
            .iter()
            .all(|kept| kept.strong_count() == 0)
    }

    /// Sends all records without waiting for more; completes when each is taken or lost. Can be dropped at any time.
    pub(crate) async fn settle(&self) {
        loop {
            let all: Vec<_> = self.all.borrow().iter().filter_map(Weak::upgrade).collect();
            let unanswered = all.into_iter().filter(|kept| kept.clone().hurry()).count();
            if unanswered == 0 {
                return;
            }
            self.done.notified().await;
        }
    }

    fn add(&self, kept: &Rc<dyn Kept>) {
        let mut all = self.all.borrow_mut();
        // Those of listeners that are gone.
        all.retain(|kept| kept.strong_count() > 0);
        all.push(Rc::downgrade(kept));
    }
}

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reports").finish_non_exhaustive()
    }
}

impl<R> fmt::Debug for Batches<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batches")
            .field("size", &self.size.get())
            .field("sending", &self.sending.get())
            .finish_non_exhaustive()
    }
}

/// How logs call their counters.
pub(crate) const LOGS: [&str; 2] = ["logs_written", "logs_dropped"];

/// Batches that a service may leave unanswered: with its timeout, the bound of what waits for it.
const SENDING: usize = 8;
