//! Candidates over one API server. How long something took is read from the lease: one clock, and no matter how busy the
//! machine is.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};

use super::*;
use crate::testing::{self, Shared};

const PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/mesh/leases/one";
/// Tries follow each other closely; what runs out does so within a test.
const TIMING: Timing = Timing {
    lease: Duration::from_secs(1),
    give_up: Duration::from_millis(600),
    retry: Duration::from_millis(20),
};
/// Nobody's lease ends by itself while a test runs.
const LONG: Timing = Timing {
    lease: Duration::from_secs(600),
    give_up: Duration::from_secs(500),
    retry: Duration::from_millis(20),
};
const PATIENCE: Duration = Duration::from_secs(20);

/// A candidate whose work counts itself.
struct Candidate {
    /// How often it began to lead, and how many of its works run now.
    begun: Arc<AtomicUsize>,
    working: Arc<AtomicUsize>,
    stop: watch::Sender<()>,
    runs: tokio::task::JoinHandle<()>,
}

struct Working(Arc<AtomicUsize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Candidate {
    fn start(client: &Client, name: &str, timing: Timing) -> Self {
        let (stop, stopped) = watch::channel(());
        let election = Election::new(client, "mesh", "one", name, timing);
        let (begun, working) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let (counted, held) = (begun.clone(), working.clone());
        let work = move || {
            counted.fetch_add(1, Ordering::SeqCst);
            held.fetch_add(1, Ordering::SeqCst);
            let working = Working(held.clone());
            async move {
                let _working = working;
                std::future::pending::<()>().await;
            }
        };
        let runs = tokio::spawn(election.run(stopped, work));
        Candidate {
            begun,
            working,
            stop,
            runs,
        }
    }

    fn leads(&self) -> bool {
        self.working.load(Ordering::SeqCst) == 1
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let came = tokio::time::timeout(PATIENCE, wait).await;
    assert!(came.is_ok(), "{what}");
}

fn spec(stored: &Shared) -> Value {
    let stored = stored.lock().unwrap();
    stored.get(PATH).map_or(Value::Null, |l| l["spec"].clone())
}

fn time(stored: &Shared, field: &str) -> Timestamp {
    spec(stored)[field].as_str().unwrap().parse().unwrap()
}

fn held_by(holder: &str, seconds: u32) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": seconds, "leaseTransitions": 3,
            "acquireTime": "2020-01-01T00:00:00.000000Z", "renewTime": "2020-01-01T00:00:00.000000Z"},
    })
}

#[tokio::test]
async fn the_first_makes_the_lease_and_renews_it() {
    let (client, stored) = testing::server().await;
    let one = Candidate::start(&client, "a", LONG);
    until("nobody leads", || one.leads()).await;
    let made = spec(&stored);
    assert_eq!(made["holderIdentity"], "a");
    assert_eq!(made["leaseDurationSeconds"], 600);
    until("it is not renewed", || {
        spec(&stored)["renewTime"] != made["renewTime"]
    })
    .await;
    let renewed = spec(&stored);
    assert_eq!(renewed["acquireTime"], made["acquireTime"]);
    assert_eq!(renewed["leaseTransitions"], made["leaseTransitions"]);
    assert_eq!(one.begun.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn of_many_that_begin_together_one_leads() {
    let (client, stored) = testing::server().await;
    let names = ["a", "b", "c", "d", "e"];
    let all = names.map(|n| Candidate::start(&client, n, LONG));
    until("nobody leads", || all.iter().any(Candidate::leads)).await;
    // Each has tried, and been refused, several times.
    let holder = spec(&stored)["holderIdentity"].clone();
    let first = spec(&stored)["renewTime"].clone();
    until("it is not renewed", || spec(&stored)["renewTime"] != first).await;
    assert_eq!(all.iter().filter(|c| c.leads()).count(), 1);
    let leader = names.iter().zip(&all).find(|(_, c)| c.leads()).unwrap();
    assert_eq!(holder, *leader.0);
}

#[tokio::test]
async fn who_does_not_renew_any_more_is_followed_by_another() {
    let (client, stored) = testing::server().await;
    let first = Candidate::start(&client, "a", TIMING);
    until("nobody leads", || first.leads()).await;
    let second = Candidate::start(&client, "b", TIMING);
    // As a process that is killed.
    first.runs.abort();
    let _ = first.runs.await;
    let renewed = time(&stored, "renewTime");
    until("nobody takes over", || second.leads()).await;
    let held = time(&stored, "acquireTime").duration_since(renewed);
    assert!(held.unsigned_abs() >= TIMING.lease, "{held:?}");
    assert_eq!(spec(&stored)["holderIdentity"], "b");
    assert_eq!(spec(&stored)["leaseTransitions"], 2);
}

#[tokio::test]
async fn clocks_are_not_compared() {
    let (client, stored) = testing::server().await;
    // Its time is years ago: by the clock of whoever looks it ended long ago. It was only just seen, though.
    stored.lock().unwrap().put(PATH, held_by("elsewhere", 2));
    let begun = Instant::now();
    let one = Candidate::start(&client, "a", TIMING);
    until("an end is not seen", || one.leads()).await;
    assert!(
        begun.elapsed() >= Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(spec(&stored)["leaseTransitions"], 4);
}

#[tokio::test]
async fn a_holder_that_renews_keeps_it_whatever_its_clock_says() {
    let (client, stored) = testing::server().await;
    stored.lock().unwrap().put(PATH, held_by("elsewhere", 3));
    let one = Candidate::start(&client, "a", TIMING);
    let begun = Instant::now();
    let mut renewed = 0;
    while begun.elapsed() < Duration::from_secs(4) {
        renewed += 1;
        let mut lease = held_by("elsewhere", 3);
        lease["spec"]["renewTime"] = format!("2020-01-01T00:00:00.{renewed:06}Z").into();
        stored.lock().unwrap().put(PATH, lease);
        tokio::time::sleep(TIMING.retry).await;
    }
    assert!(!one.leads());
    assert_eq!(one.begun.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_lease_that_somebody_else_took_is_lost_and_can_be_won_again() {
    let (client, stored) = testing::server().await;
    let one = Candidate::start(&client, "a", LONG);
    until("nobody leads", || one.leads()).await;
    stored.lock().unwrap().put(PATH, held_by("elsewhere", 1));
    until("it still leads", || !one.leads()).await;
    assert_eq!(spec(&stored)["holderIdentity"], "elsewhere");
    until("it does not lead again", || one.leads()).await;
    assert_eq!(one.begun.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn who_cannot_renew_stops_before_another_may_begin() {
    let (client, stored) = testing::server().await;
    // For the others it holds for ten minutes more.
    let timing = Timing {
        give_up: TIMING.give_up,
        ..LONG
    };
    let one = Candidate::start(&client, "a", timing);
    until("nobody leads", || one.leads()).await;
    stored.lock().unwrap().refuses = Some(503);
    until("it leads without a lease", || !one.leads()).await;
    let held = Timestamp::now().duration_since(time(&stored, "renewTime"));
    assert!(held.unsigned_abs() >= timing.give_up, "{held:?}");
    stored.lock().unwrap().refuses = None;
    until("it does not lead again", || one.leads()).await;
}

#[tokio::test]
async fn a_few_failures_are_no_loss() {
    let (client, stored) = testing::server().await;
    let one = Candidate::start(&client, "a", LONG);
    until("nobody leads", || one.leads()).await;
    stored.lock().unwrap().refuses = Some(500);
    let refused = || stored.lock().unwrap().refused;
    until("it is not tried again", || refused() > 3).await;
    stored.lock().unwrap().refuses = None;
    let last = spec(&stored)["renewTime"].clone();
    until("it is not renewed", || spec(&stored)["renewTime"] != last).await;
    assert_eq!(one.begun.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn at_its_end_the_leader_gives_the_lease_back() {
    let (client, stored) = testing::server().await;
    let first = Candidate::start(&client, "a", LONG);
    until("nobody leads", || first.leads()).await;
    let second = Candidate::start(&client, "b", LONG);
    drop(first.stop);
    first.runs.await.unwrap();
    assert_eq!(first.working.load(Ordering::SeqCst), 0);
    // Without it the lease would have held for ten minutes.
    until("nobody takes over", || second.leads()).await;
    assert_eq!(spec(&stored)["holderIdentity"], "b");
}

#[tokio::test]
async fn who_does_not_lead_gives_nothing_back() {
    let (client, stored) = testing::server().await;
    stored.lock().unwrap().put(PATH, held_by("elsewhere", 600));
    let one = Candidate::start(&client, "a", LONG);
    drop(one.stop);
    one.runs.await.unwrap();
    assert_eq!(spec(&stored), held_by("elsewhere", 600)["spec"]);
}
