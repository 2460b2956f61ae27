//! Where lines go: a buffer per worker and file, and one thread per file that writes.
//!
//! A worker never waits for a disk or a pipe. When the reader of a pipe is slower than the lines
//! come, lines are dropped once the queue is full, and counted.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    rc::Rc,
    sync::{
        LazyLock, Mutex,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use crate::plan::access_log::LogSink;

/// The lines of one worker for one file.
#[derive(Debug)]
pub(crate) struct Sink {
    buffer: RefCell<Vec<u8>>,
    writer: SyncSender<Job>,
    /// A flush is on its way.
    scheduled: Cell<bool>,
    interval: Duration,
}

impl Sink {
    /// The sink of this thread for a file.
    pub(crate) fn open(target: &LogSink, interval: Duration) -> Rc<Sink> {
        SINKS.with(|sinks| {
            sinks
                .borrow_mut()
                .entry(target.clone())
                .or_insert_with(|| {
                    Rc::new(Sink {
                        buffer: RefCell::default(),
                        writer: writer(target),
                        scheduled: Cell::new(false),
                        interval,
                    })
                })
                .clone()
        })
    }

    /// Adds a line; it leaves when the buffer is full or the flush interval is over.
    pub(crate) fn write(self: &Rc<Self>, line: impl FnOnce(&mut Vec<u8>)) {
        let full = {
            let mut buffer = self.buffer.borrow_mut();
            line(&mut buffer);
            buffer.len() >= FULL
        };
        if full {
            return self.flush();
        }
        if !self.scheduled.replace(true) {
            let sink = self.clone();
            tokio::task::spawn_local(async move {
                tokio::time::sleep(sink.interval).await;
                sink.scheduled.set(false);
                sink.flush();
            });
        }
    }

    /// Hands the lines to the writer.
    pub(crate) fn flush(&self) {
        let lines = std::mem::take(&mut *self.buffer.borrow_mut());
        if lines.is_empty() {
            return;
        }
        if let Err(TrySendError::Full(Job::Lines(lost))) = self.writer.try_send(Job::Lines(lines)) {
            tracing::warn!(
                bytes = lost.len(),
                "access log lines dropped: their reader is too slow"
            );
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.flush();
    }
}

/// The writer thread of a file; one in the process.
fn writer(target: &LogSink) -> SyncSender<Job> {
    let mut writers = WRITERS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(writer) = writers.get(target) {
        return writer.clone();
    }
    let (sender, receiver) = sync_channel::<Job>(QUEUE);
    let to = target.clone();
    let spawned = std::thread::Builder::new().name("access-log".to_owned()).spawn(move || {
        let mut out = Out::open(&to);
        for job in receiver {
            let lines = match job {
                Job::Lines(lines) => lines,
                Job::Reopen => {
                    out = Out::open(&to);
                    continue;
                }
                Job::Settle(done) => {
                    // Who asked may have given up.
                    let _ = done.try_send(());
                    continue;
                }
            };
            if let Err(error) = out.write(&lines) {
                tracing::warn!(?to, %error, "cannot write the access log; trying to open it again");
                out = Out::open(&to);
            }
        }
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for the access log; its lines are lost");
    }
    writers.insert(target.clone(), sender.clone());
    sender
}

/// What a writer is asked to do.
enum Job {
    /// Write these.
    Lines(Vec<u8>),
    /// Open the file anew: who rotates logs has moved it away.
    Reopen,
    /// Say when everything before is written.
    Settle(SyncSender<()>),
}

/// Opens every file anew, behind the lines that were handed over before (SIGUSR1, `/reopen_logs`).
pub(crate) fn reopen() {
    let writers = WRITERS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    for (target, writer) in writers.iter() {
        if writer.try_send(Job::Reopen).is_err() {
            tracing::warn!(?target, "too many lines wait: the log is not opened anew");
        }
    }
}

/// Waits, for a moment at most, until the writers have written what they were given: for the end of the process, when the
/// workers are gone.
pub(crate) fn settle() {
    let writers = WRITERS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    for writer in writers.values() {
        let (done, written) = sync_channel(1);
        if writer.try_send(Job::Settle(done)).is_ok() {
            // A reader that does not read must not keep the process from ending.
            let _ = written.recv_timeout(Duration::from_secs(2));
        }
    }
}

enum Out {
    Stdout,
    Stderr,
    File(io::Result<File>),
}

impl Out {
    fn open(target: &LogSink) -> Out {
        match target {
            LogSink::Stdout => Out::Stdout,
            LogSink::Stderr => Out::Stderr,
            LogSink::File(path) => {
                Out::File(OpenOptions::new().append(true).create(true).open(path))
            }
        }
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Out::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(lines)?;
                out.flush()
            }
            Out::Stderr => io::stderr().lock().write_all(lines),
            Out::File(Ok(file)) => file.write_all(lines),
            Out::File(Err(error)) => Err(error.kind().into()),
        }
    }
}

const FULL: usize = 64 * 1024;
/// Buffers that may wait for a file: 64 MiB at most.
const QUEUE: usize = 1024;

static WRITERS: LazyLock<Mutex<HashMap<LogSink, SyncSender<Job>>>> = LazyLock::new(Mutex::default);

thread_local! {
    static SINKS: RefCell<HashMap<LogSink, Rc<Sink>>> = RefCell::default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_that_was_moved_away_is_opened_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, moved) = (folder.path().join("log"), folder.path().join("log.1"));
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let sink = Sink::open(&LogSink::File(path.clone()), Duration::from_secs(60));
                let write = |line: &'static str| {
                    sink.write(|out| out.extend_from_slice(line.as_bytes()));
                    sink.flush();
                };
                write("before\n");
                settle();
                std::fs::rename(&path, &moved).expect("it is there");
                write("still there\n");
                reopen();
                write("after\n");
                settle();
            })
            .await;
        let read = |path| std::fs::read_to_string(path).expect("it is there");
        assert_eq!(read(&moved), "before\nstill there\n");
        assert_eq!(read(&path), "after\n");
    }
}
