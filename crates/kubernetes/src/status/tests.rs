//! Reports of one leader and of the next.

use super::*;
use crate::testing::{self, Shared};

fn path(name: &str) -> String {
    format!(
        "/apis/networking.istio.io/{}/namespaces/shop/envoyfilters/{name}",
        version(Kind::EnvoyFilter)
    )
}

async fn server() -> (Client, Shared) {
    let (client, stored) = testing::server().await;
    for name in ["one", "two", "three"] {
        let object = json!({"metadata": {"namespace": "shop", "uid": name, "generation": 2}});
        stored.lock().unwrap().put(&path(name), object);
    }
    (client, stored)
}

fn reports(all: &[(&str, &str)]) -> BTreeMap<ObjectKey, Report> {
    let one = |(name, text): &(&str, &str)| {
        let message = Message {
            is_error: true,
            field: String::new(),
            text: (*text).to_owned(),
        };
        let report = Report {
            uid: (*name).to_owned(),
            generation: 2,
            messages: BTreeSet::from([message]),
        };
        (ObjectKey::new(Kind::EnvoyFilter, "shop", *name), report)
    };
    all.iter().map(one).collect()
}

/// Whether it is accepted, and what is said of it.
fn said(stored: &Shared, name: &str) -> (String, String) {
    let stored = stored.lock().unwrap();
    let condition = &stored.get(&path(name)).unwrap()["status"]["conditions"][0];
    let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    (text("status"), text("message"))
}

#[tokio::test]
async fn the_next_leader_takes_back_what_nobody_says_any_more() {
    let (client, stored) = server().await;
    let mut first = Reporter::new("default");
    let all = [
        ("one", "mended since"),
        ("two", "wrong"),
        ("three", "wrong"),
    ];
    first.write(&client, &reports(&all)).await;
    // Another revision says it of an object of its own.
    let mut canary = Reporter::new("canary");
    canary
        .write(&client, &reports(&[("three", "only there")]))
        .await;

    let mut next = Reporter::new("default");
    let still = reports(&[("two", "wrong")]);
    next.write(&client, &still).await;
    assert_eq!(said(&stored, "one").0, "False");
    assert!(next.take_over(&client).await);
    next.write(&client, &still).await;
    assert_eq!(said(&stored, "one"), ("True".into(), String::new()));
    assert_eq!(said(&stored, "two"), ("False".into(), "wrong".into()));
    assert_eq!(
        said(&stored, "three"),
        ("False".into(), "only there".into())
    );
}

#[tokio::test]
async fn what_cannot_be_read_is_read_later() {
    let (client, stored) = server().await;
    let mut first = Reporter::new("default");
    first
        .write(&client, &reports(&[("one", "mended since")]))
        .await;
    let mut next = Reporter::new("default");
    stored.lock().unwrap().refuses = Some(500);
    assert!(!next.take_over(&client).await);
    stored.lock().unwrap().refuses = None;
    assert!(next.take_over(&client).await);
    next.write(&client, &BTreeMap::new()).await;
    assert_eq!(said(&stored, "one").0, "True");
}
