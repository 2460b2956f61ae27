//! Connects while rules come, change and go.
//!
//! Every one must complete within five seconds, answered by the proxy, or by its target while nothing is captured;
//! and what user 1337 sends never comes back to the outbound port.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    matrix::{Mode, Pod},
    net::Caller,
};

/// Connects of the whole test; `OUTRIGGER_LONG` asks for all of them.
fn total() -> usize {
    match std::env::var_os("OUTRIGGER_LONG") {
        Some(_) => 10_000,
        None => 2_000,
    }
}

const CALLERS: usize = 4;

/// Every kind of change happens this often at least, however fast the connects are.
const ROUNDS: usize = 4;

/// The clean-up has begun; before it every call is captured.
const CLEANING: usize = 1;

/// The clean-up has ended; no call is captured any more.
const CLEAN: usize = 2;

pub(crate) fn run(mode: &Mode) {
    let net = Pod::new(mode);
    net.apply(mode, "");
    let left = Arc::new(AtomicUsize::new(total()));
    let step = Arc::new(AtomicUsize::new(0));
    let changed = Arc::new(AtomicBool::new(false));
    let made = Arc::new(AtomicUsize::new(0));
    let problems = Arc::new(Mutex::new(Vec::new()));
    let callers: Vec<_> = (0..CALLERS)
        .map(|n| {
            let (left, step, problems) = (left.clone(), step.clone(), problems.clone());
            let (changed, made) = (changed.clone(), made.clone());
            // A thread of the pod's namespace for each caller.
            net.pod.run(move || {
                thread::spawn(move || {
                    let app = n != 0;
                    let id = if app { 1000 } else { 1337 };
                    while left
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |l| l.checked_sub(1))
                        .is_ok()
                        || !changed.load(Ordering::Relaxed)
                    {
                        made.fetch_add(1, Ordering::Relaxed);
                        let caller = Caller::of((id, id));
                        let first = step.load(Ordering::SeqCst);
                        let begun = Instant::now();
                        let to = "10.96.7.7:9080".parse().expect("an address");
                        let answer = caller.tcp(to);
                        let took = begun.elapsed();
                        let who = answer.split(' ').next().unwrap_or_default();
                        let last = step.load(Ordering::SeqCst);
                        let good = match (app, who) {
                            (true, "outbound") => {
                                first < CLEAN && answer.contains(" 10.96.7.7:9080 ")
                            }
                            (true, "outside") => last >= CLEANING,
                            (false, "outside") => true,
                            _ => false,
                        };
                        if !good || took > Duration::from_secs(5) {
                            let mut list = problems.lock().expect("no caller breaks");
                            list.push(format!(
                                "user {id}, state {first} to {last}, after {took:?}: {answer}"
                            ));
                        }
                    }
                })
            })
        })
        .collect();
    let mut rounds = 0;
    while rounds < ROUNDS || left.load(Ordering::Relaxed) > 0 {
        for flags in ["--force-apply", "-q 7 --reconcile", "--reconcile"] {
            net.apply(mode, flags);
        }
        rounds += 1;
    }
    step.store(CLEANING, Ordering::SeqCst);
    net.apply(mode, "--cleanup-only");
    step.store(CLEAN, Ordering::SeqCst);
    changed.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.join().expect("no caller breaks");
    }
    let problems = problems.lock().expect("no caller breaks");
    let made = made.load(Ordering::Relaxed);
    assert!(
        problems.is_empty(),
        "{}: {} of {made} in {rounds} rounds, first:\n  {}",
        mode.name,
        problems.len(),
        problems[..problems.len().min(5)].join("\n  ")
    );
    println!(
        "  {}: {made} connects, {rounds} rounds of changes",
        mode.name
    );
}
