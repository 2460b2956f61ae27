//! Boards of two and three replicas over one API server.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use config::Kind;
use http::Method;
use serde_json::Value;

use super::*;
use crate::testing::{self, Shared};

const PATH: &str = "/api/v1/namespaces/mesh/configmaps/istiod-rejections";
/// A replica that lives renews within a tenth of the time after which it is taken for gone.
const TIMING: Timing = Timing {
    look: Duration::from_millis(10),
    renew: Duration::from_millis(150),
    stale: Duration::from_millis(1500),
};

/// A replica and what the test makes of it.
struct Replica {
    hears: Arc<Mutex<Rejections>>,
    leads: Arc<AtomicBool>,
    others: watch::Receiver<Rejections>,
    stop: watch::Sender<()>,
    runs: tokio::task::JoinHandle<()>,
}

impl Replica {
    fn start(client: &Client, name: &str, leads: bool) -> Self {
        let (stop, stopped) = watch::channel(());
        let (send, others) = watch::channel(Rejections::new());
        let hears: Arc<Mutex<Rejections>> = Arc::default();
        let leads = Arc::new(AtomicBool::new(leads));
        let board = Board::new(client, "mesh", "default", name, TIMING);
        let (heard, leading) = (hears.clone(), leads.clone());
        let role = move || match leading.load(Ordering::Relaxed) {
            true => Role::Leads,
            false => Role::Tells(heard.lock().unwrap().clone()),
        };
        let runs = tokio::spawn(async move { board.run(stopped, role, &send).await });
        Replica {
            hears,
            leads,
            others,
            stop,
            runs,
        }
    }

    fn hear(&self, all: &[(&str, &str)]) {
        *self.hears.lock().unwrap() = rejections(all);
    }

    /// Waits until the others say this.
    async fn told(&mut self, all: &[(&str, &str)]) {
        let wanted = rejections(all);
        let wait = self.others.wait_for(|o| *o == wanted);
        let came = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        let said = self.others.borrow();
        assert!(came, "{wanted:?} is not told, but {said:?}");
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

fn rejections(all: &[(&str, &str)]) -> Rejections {
    let one = |(name, why): &(&str, &str)| {
        let key = ObjectKey::new(Kind::EnvoyFilter, "shop", *name);
        (key, (*why).to_owned())
    };
    all.iter().map(one).collect()
}

async fn installed() -> (Client, Shared) {
    let (client, stored) = testing::server().await;
    stored.lock().unwrap().put(PATH, json!({}));
    (client, stored)
}

fn data(stored: &Shared) -> Value {
    stored.lock().unwrap().get(PATH).unwrap()["data"].clone()
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

#[tokio::test]
async fn the_leader_is_told_and_told_that_it_is_over() {
    let (client, stored) = installed().await;
    let mut leader = Replica::start(&client, "a", true);
    let follower = Replica::start(&client, "b", false);
    let third = Replica::start(&client, "c", false);
    follower.hear(&[("one", "no such filter")]);
    leader.told(&[("one", "no such filter")]).await;
    third.hear(&[("one", "no such filter"), ("two", "worse")]);
    let both = [("one", "no such filter"), ("two", "worse")];
    leader.told(&both).await;
    follower.hear(&[]);
    until("an entry without rejections stays", || {
        data(&stored)["b"].is_null()
    })
    .await;
    leader.told(&both).await;
    third.hear(&[]);
    leader.told(&[]).await;
    assert_eq!(data(&stored), json!({}));
    // Each wrote as itself, and nobody needed to create anything.
    let writes = &stored.lock().unwrap().writes;
    let managers: BTreeSet<&str> = writes.iter().map(|(_, m)| m.as_str()).collect();
    assert_eq!(managers, BTreeSet::from(["outrigger-b", "outrigger-c"]));
    assert!(writes.iter().all(|(m, _)| m == Method::PATCH));
}

#[tokio::test]
async fn a_replica_that_is_gone_says_nothing_any_more_but_one_that_lives_does() {
    let (client, stored) = installed().await;
    let mut leader = Replica::start(&client, "a", true);
    let (killed, alive) = (
        Replica::start(&client, "b", false),
        Replica::start(&client, "c", false),
    );
    killed.hear(&[("one", "of b")]);
    alive.hear(&[("two", "of c")]);
    leader.told(&[("one", "of b"), ("two", "of c")]).await;
    killed.runs.abort();
    leader.told(&[("two", "of c")]).await;
    until("what it left behind is not taken out", || {
        data(&stored)["b"].is_null()
    })
    .await;
    until("what lives goes as well", || data(&stored)["c"].is_string()).await;
}

#[tokio::test]
async fn a_replica_that_ends_takes_its_entry_out() {
    let (client, stored) = installed().await;
    let mut leader = Replica::start(&client, "a", true);
    let follower = Replica::start(&client, "b", false);
    follower.hear(&[("one", "no")]);
    leader.told(&[("one", "no")]).await;
    drop(follower.stop);
    follower.runs.await.unwrap();
    assert_eq!(data(&stored), json!({}));
    leader.told(&[]).await;
}

#[tokio::test]
async fn who_begins_to_lead_stops_telling_and_who_ends_begins() {
    let (client, stored) = installed().await;
    let mut first = Replica::start(&client, "a", true);
    let mut second = Replica::start(&client, "b", false);
    first.hear(&[("one", "of a")]);
    second.hear(&[("two", "of b")]);
    first.told(&[("two", "of b")]).await;
    first.leads.store(false, Ordering::Relaxed);
    second.leads.store(true, Ordering::Relaxed);
    second.told(&[("one", "of a")]).await;
    first.told(&[]).await;
    assert!(data(&stored)["b"].is_null());
}

#[tokio::test]
async fn it_is_written_when_it_changes_and_to_be_renewed_only() {
    let (client, stored) = installed().await;
    let timing = Timing {
        renew: Duration::from_secs(600),
        ..TIMING
    };
    let (_stop, stopped) = watch::channel(());
    let (send, _others) = watch::channel(Rejections::new());
    let looks = Arc::new(Mutex::new(0));
    let counted = looks.clone();
    let board = Board::new(&client, "mesh", "default", "b", timing);
    tokio::spawn(async move {
        let role = || {
            *counted.lock().unwrap() += 1;
            Role::Tells(rejections(&[("one", "no")]))
        };
        board.run(stopped, role, &send).await;
    });
    until("nothing is looked at", || *looks.lock().unwrap() > 20).await;
    // One that the watch had not brought back yet may have been written twice.
    assert!(stored.lock().unwrap().writes.len() <= 2);
}

#[tokio::test]
async fn an_api_server_that_refuses_is_asked_until_it_takes_it() {
    let (client, stored) = installed().await;
    let mut leader = Replica::start(&client, "a", true);
    let follower = Replica::start(&client, "b", false);
    follower.hear(&[("one", "no")]);
    leader.told(&[("one", "no")]).await;
    stored.lock().unwrap().refuses = Some(503);
    follower.hear(&[("one", "no"), ("two", "neither")]);
    let refused = || stored.lock().unwrap().refused;
    until("nothing is tried again", || refused() > 3).await;
    stored.lock().unwrap().refuses = None;
    leader.told(&[("one", "no"), ("two", "neither")]).await;
}

#[tokio::test]
async fn what_somebody_else_wrote_there_says_nothing_and_goes() {
    let (client, stored) = installed().await;
    let long = format!("{{\"renewed\": \"{}\"", "x".repeat(LARGEST_ENTRY));
    let data_of = json!({
        "long": long,
        "none": "no JSON",
        "other": r#"{"renewed": "", "rejections": [{"kind": "Secret", "namespace": "shop", "name": "s", "message": "m"}]}"#,
    });
    stored.lock().unwrap().put(PATH, json!({"data": data_of}));
    let mut leader = Replica::start(&client, "a", true);
    let follower = Replica::start(&client, "b", false);
    follower.hear(&[("one", "no")]);
    leader.told(&[("one", "no")]).await;
    until("it stays", || {
        data(&stored).as_object().is_some_and(|d| d.len() == 1)
    })
    .await;
}

#[test]
fn an_entry_is_bounded() {
    let reason = "é".repeat(5000);
    let names: Vec<String> = (0..500).map(|i| format!("filter-{i:03}")).collect();
    let all: Vec<(&str, &str)> = names
        .iter()
        .map(|n| (n.as_str(), reason.as_str()))
        .collect();
    let (said, kept) = written(&rejections(&all));
    let text = serde_json::to_string(&said).unwrap();
    assert!(text.len() <= LARGEST_ENTRY, "{}", text.len());
    assert_eq!(said.more + said.rejections.len(), 500);
    assert!(said.rejections.len() >= 20);
    assert_eq!(kept.len(), said.rejections.len());
    assert!(
        said.rejections
            .iter()
            .all(|r| r.message.len() == LONGEST_MESSAGE)
    );
}

#[test]
fn boards_are_no_configuration() {
    assert!(is_board("istiod-rejections"));
    assert!(is_board("istiod-rejections-canary"));
    assert!(!is_board("istiod-rejectionsx"));
    assert!(!is_board("istio"));
}
