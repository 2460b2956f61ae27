//! The store against an API server that plays a script: lists in pages, watches, bookmarks, 410, resets.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use config::{Kind, ObjectKey, Severity, Update};
use futures_util::{StreamExt, stream};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc};

use super::{Opened, Options, open};

/// What the server does with the next request for VirtualServices.
enum Answer {
    /// A page of a list: objects, the list's version, where to go on.
    List(Vec<Value>, &'static str, Option<&'static str>),
    /// A watch that says these lines and then what comes through the channel.
    Watch(Vec<Value>, Option<mpsc::Receiver<Value>>),
    /// The connection ends in the middle of a line.
    Torn,
    /// An error status.
    Fail(u16),
}

#[derive(Default)]
struct Script {
    answers: VecDeque<Answer>,
    asked: Vec<String>,
}

type Shared = Arc<Mutex<Script>>;

async fn serve(State(script): State<Shared>, request: Request) -> Response {
    let uri = request.uri().to_string();
    if !uri.contains("/virtualservices") {
        return status(404);
    }
    let next = {
        let mut script = script.lock().unwrap();
        script.asked.push(uri);
        script.answers.pop_front()
    };
    match next {
        Some(Answer::List(items, version, go_on)) => axum::Json(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualServiceList",
            "metadata": {"resourceVersion": version, "continue": go_on.unwrap_or_default()},
            "items": items,
        }))
        .into_response(),
        Some(Answer::Watch(lines, more)) => {
            let line = |v: Value| Ok::<_, std::io::Error>(Bytes::from(format!("{v}\n")));
            let first = stream::iter(lines.into_iter().map(line));
            match more {
                None => Body::from_stream(first).into_response(),
                Some(more) => {
                    let rest = stream::unfold(more, move |mut more| async move {
                        more.recv().await.map(|v| (line(v), more))
                    });
                    Body::from_stream(first.chain(rest)).into_response()
                }
            }
        }
        Some(Answer::Torn) => {
            let half = stream::iter([
                Ok(Bytes::from_static(b"{\"type\":\"MODI")),
                Err(std::io::Error::other("reset")),
            ]);
            Body::from_stream(half).into_response()
        }
        Some(Answer::Fail(code)) => status(code),
        // The script is at its end: a watch that says nothing more.
        None => {
            Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>()).into_response()
        }
    }
}

fn status(code: u16) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "reason": "Scripted", "message": "as the script says"});
    let code = StatusCode::from_u16(code).unwrap();
    (code, axum::Json(body)).into_response()
}

async fn server(answers: impl IntoIterator<Item = Answer>) -> (Client, Shared) {
    let script: Shared = Arc::default();
    script.lock().unwrap().answers.extend(answers);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(serve).with_state(script.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let config = Config::new(format!("http://{address}").parse().unwrap());
    (Client::try_from(config).unwrap(), script)
}

fn service(name: &str, version: u32, host: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "resourceVersion": version.to_string(), "generation": version,
            "managedFields": [{"manager": "kubectl"}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}},
        "spec": {"hosts": [host], "http": [{"route": [{"destination": {"host": host}}]}]},
    })
}

fn event(kind: &str, mut object: Value) -> Value {
    object["apiVersion"] = "networking.istio.io/v1".into();
    object["kind"] = "VirtualService".into();
    json!({"type": kind, "object": object})
}

fn options() -> Options {
    Options {
        kinds: vec![Kind::VirtualService],
        absent_retry: Duration::from_millis(20),
        ..Options::new("istio-system", "default")
    }
}

fn names(opened: &config::Snapshot) -> Vec<String> {
    let all = opened.virtual_services.iter();
    all.map(|o| format!("{}:{}", o.meta.name, o.spec.hosts.join(",")))
        .collect()
}

async fn next(opened: &mut Opened) -> Update {
    tokio::time::timeout(Duration::from_secs(20), opened.watch.next())
        .await
        .expect("an update")
        .expect("the store goes on")
}

#[tokio::test]
async fn pages_are_one_list_and_watches_go_on_from_it() {
    let (say, more) = mpsc::channel(8);
    let bookmark = json!({"type": "BOOKMARK", "object": {"apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService", "metadata": {"resourceVersion": "40"}}});
    let (client, script) = server([
        Answer::List(vec![service("a", 1, "a.example")], "10", Some("next-page")),
        Answer::List(vec![service("b", 2, "b.example")], "10", None),
        Answer::Watch(vec![bookmark], Some(more)),
    ])
    .await;
    let mut opened = open(client, options()).await;
    assert_eq!(names(&opened.snapshot), ["a:a.example", "b:b.example"]);
    let kept = opened.snapshot.virtual_services.get("shop", "a").unwrap();
    assert!(kept.meta.annotations.is_empty(), "{:?}", kept.meta);

    say.send(event("MODIFIED", service("a", 41, "new.example")))
        .await
        .unwrap();
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["a:new.example", "b:b.example"]);
    let key = ObjectKey::new(Kind::VirtualService, "shop", "a");
    assert_eq!(update.changed.into_iter().collect::<Vec<_>>(), [key]);

    // A new version with the same content is no change; the deletion after it is.
    let mut same = service("b", 42, "b.example");
    same["metadata"]["generation"] = 2.into();
    say.send(event("MODIFIED", same)).await.unwrap();
    say.send(event("DELETED", service("a", 43, "new.example")))
        .await
        .unwrap();
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["b:b.example"]);
    assert_eq!(update.changed.len(), 1, "{:?}", update.changed);
    let asked = script.lock().unwrap().asked.clone();
    assert!(asked[0].contains("limit=500"), "{asked:?}");
    assert!(asked[1].contains("continue=next-page"), "{asked:?}");
    assert!(asked[2].contains("resourceVersion=10"), "{asked:?}");
    assert!(asked[2].contains("allowWatchBookmarks=true"), "{asked:?}");
}

#[tokio::test]
async fn a_watch_that_is_too_old_lists_again_and_finds_what_is_gone() {
    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": 410, "reason": "Expired", "message": "too old resource version"}});
    let (client, _) = server([
        Answer::List(
            vec![service("a", 1, "a.example"), service("b", 2, "b.example")],
            "10",
            None,
        ),
        Answer::Watch(vec![gone], None),
        Answer::List(
            vec![service("b", 2, "b.example"), service("c", 30, "c.example")],
            "30",
            None,
        ),
    ])
    .await;
    let mut opened = open(client, options()).await;
    let before = opened.snapshot.clone();
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["b:b.example", "c:c.example"]);
    assert_eq!(update.changed.len(), 2, "{:?}", update.changed);
    // What did not change is the same object in memory.
    let b = |s: &config::Snapshot| s.virtual_services.get("shop", "b").cloned().unwrap();
    assert!(Arc::ptr_eq(&b(&before), &b(&update.snapshot)));
}

#[tokio::test]
async fn a_torn_watch_and_a_failing_server_lose_nothing() {
    let (client, _) = server([
        Answer::Fail(500),
        Answer::List(vec![service("a", 1, "a.example")], "10", None),
        Answer::Torn,
        Answer::Watch(vec![event("ADDED", service("b", 11, "b.example"))], None),
    ])
    .await;
    let mut opened = open(client, options()).await;
    assert_eq!(names(&opened.snapshot), ["a:a.example"]);
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["a:a.example", "b:b.example"]);
}

#[tokio::test]
async fn a_kind_that_is_not_there_is_empty_until_it_comes() {
    // Three versions are tried before the kind counts as absent.
    let absent = || Answer::Fail(404);
    let (client, _) = server([
        absent(),
        absent(),
        absent(),
        Answer::List(vec![service("a", 1, "a.example")], "10", None),
    ])
    .await;
    let mut opened = open(client, options()).await;
    assert!(names(&opened.snapshot).is_empty());
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["a:a.example"]);
}

#[tokio::test]
async fn a_broken_object_keeps_its_last_good_version_and_is_told() {
    let (say, more) = mpsc::channel(8);
    let (client, _) = server([
        Answer::List(vec![service("a", 1, "a.example")], "10", None),
        Answer::Watch(Vec::new(), Some(more)),
    ])
    .await;
    let mut opened = open(client, options()).await;
    let mut broken = service("a", 11, "a.example");
    broken["spec"]["http"][0]["timeout"] = "0.1ms".into();
    say.send(event("MODIFIED", broken)).await.unwrap();
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["a:a.example"]);
    let problem = &update.problems[0];
    assert_eq!(problem.severity, Severity::Error);
    assert_eq!(problem.field, "spec.http[0].timeout");
    let shown = problem.to_string();
    assert!(
        shown.starts_with("cluster:VirtualService/shop/a: "),
        "{shown}"
    );
    assert!(shown.contains("last good version"), "{shown}");
    say.send(event("MODIFIED", service("a", 12, "b.example")))
        .await
        .unwrap();
    let update = next(&mut opened).await;
    assert_eq!(names(&update.snapshot), ["a:b.example"]);
    assert!(update.problems.is_empty());
}
