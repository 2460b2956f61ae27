//! Connects while rules come, change and go, out of the pod and into it.
//!
//! Every one must complete within five seconds, answered by the proxy, or by its target while nothing is captured;
//! and what user 1337 sends never comes back to the outbound port.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    matrix::{Mode, Pod},
    net::{Caller, Namespace},
};

/// Connects in each direction; `OUTRIGGER_LONG` asks for all of them.
fn total() -> usize {
    match std::env::var_os("OUTRIGGER_LONG") {
        Some(_) => 10_000,
        None => 1_000,
    }
}

/// Every kind of change happens this often at least, however fast the connects are.
const ROUNDS: usize = 4;

/// The clean-up has begun; before it every call is captured.
const CLEANING: usize = 1;

/// The clean-up has ended; no call is captured any more.
const CLEAN: usize = 2;

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The app, out of the pod.
    App,
    /// The proxy, out of the pod.
    Proxy,
    /// Somebody outside, into the pod.
    Client,
}

impl Kind {
    fn caller(self) -> Caller {
        let id = if self == Kind::Proxy { 1337 } else { 1000 };
        Caller::of((id, id))
    }

    fn to(self) -> &'static str {
        match self {
            Kind::App | Kind::Proxy => "10.96.7.7:9080",
            Kind::Client => "10.9.0.5:80",
        }
    }

    /// Whether `answer` is right for a call that began and ended in these steps.
    fn expects(self, answer: &str, first: usize, last: usize) -> bool {
        let who = answer.split(' ').next().unwrap_or_default();
        let kept = answer.contains(&format!(" {} ", self.to()));
        match (self, who) {
            (Kind::App, "outbound") | (Kind::Client, "inbound") => first < CLEAN && kept,
            (Kind::App, "outside") | (Kind::Client, "app") => last >= CLEANING,
            (Kind::Proxy, "outside") => true,
            _ => false,
        }
    }
}

/// What callers and the one who changes the rules tell each other.
#[derive(Default)]
struct Shared {
    /// Connects still to be made, out and in.
    left: [AtomicUsize; 2],
    made: [AtomicUsize; 2],
    step: AtomicUsize,
    changed: AtomicBool,
    problems: Mutex<Vec<String>>,
}

impl Shared {
    /// Calls until all is done.
    fn call(&self, kind: Kind) {
        let direction = usize::from(kind == Kind::Client);
        let one_more = || {
            self.left[direction]
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |l| l.checked_sub(1))
                .is_ok()
        };
        while one_more() || !self.changed.load(Ordering::Relaxed) {
            self.made[direction].fetch_add(1, Ordering::Relaxed);
            let first = self.step.load(Ordering::SeqCst);
            let begun = Instant::now();
            let answer = kind.caller().tcp(kind.to().parse().expect("an address"));
            let took = begun.elapsed();
            let last = self.step.load(Ordering::SeqCst);
            if !kind.expects(&answer, first, last) || took > Duration::from_secs(5) {
                let mut list = self.problems.lock().expect("no caller breaks");
                list.push(format!(
                    "{kind:?}, state {first} to {last}, after {took:?}: {answer}"
                ));
            }
        }
    }

    /// A thread of that namespace.
    fn start(self: &Arc<Self>, at: &Namespace, kind: Kind) -> JoinHandle<()> {
        let shared = self.clone();
        at.run(move || thread::spawn(move || shared.call(kind)))
    }
}

pub(crate) fn run(mode: &Mode) {
    let net = Pod::new(mode);
    net.apply(mode, "");
    let shared = Arc::new(Shared::default());
    for left in &shared.left {
        left.store(total(), Ordering::Relaxed);
    }
    let mut callers = vec![shared.start(&net.pod, Kind::Proxy)];
    for _ in 0..2 {
        callers.push(shared.start(&net.pod, Kind::App));
        callers.push(shared.start(&net.outside, Kind::Client));
    }
    let mut rounds = 0;
    while rounds < ROUNDS || shared.left.iter().any(|l| l.load(Ordering::Relaxed) > 0) {
        for flags in ["--force-apply", "-q 7 --reconcile", "--reconcile"] {
            net.apply(mode, flags);
        }
        rounds += 1;
    }
    shared.step.store(CLEANING, Ordering::SeqCst);
    net.apply(mode, "--cleanup-only");
    shared.step.store(CLEAN, Ordering::SeqCst);
    shared.changed.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.join().expect("no caller breaks");
    }
    let problems = shared.problems.lock().expect("no caller breaks");
    let made = shared.made.each_ref().map(|n| n.load(Ordering::Relaxed));
    assert!(
        problems.is_empty(),
        "{}: {} of {made:?} in {rounds} rounds, first:\n  {}",
        mode.name,
        problems.len(),
        problems[..problems.len().min(5)].join("\n  ")
    );
    println!(
        "  {}: {} connects out, {} in, {rounds} rounds of changes",
        mode.name, made[0], made[1]
    );
}
