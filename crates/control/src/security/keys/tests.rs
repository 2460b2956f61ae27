use std::time::{Duration, UNIX_EPOCH};

use config::Source;
use testkit::jwt::Issuer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

fn snapshot(url: &str) -> Arc<Snapshot> {
    let rule = JwtRule {
        issuer: "i".to_owned(),
        jwks_uri: url.to_owned(),
        ..Default::default()
    };
    of_rule(rule)
}

fn of_rule(rule: JwtRule) -> Arc<Snapshot> {
    let mut snapshot = Snapshot::empty();
    let object = Object {
        meta: config::Meta {
            name: "a".to_owned(),
            namespace: "n".to_owned(),
            ..Default::default()
        },
        spec: RequestAuthentication {
            jwt_rules: vec![rule],
            ..Default::default()
        },
        source: Source {
            file: Arc::from(std::path::Path::new("auth.yaml")),
            line: 7,
        },
    };
    snapshot.request_authentications.insert(Arc::new(object));
    Arc::new(snapshot)
}

fn keys_of(snapshot: &Snapshot) -> String {
    let object = snapshot
        .request_authentications
        .get("n", "a")
        .expect("it is there");
    object.spec.jwt_rules[0].jwks.clone()
}

fn open() -> (Arc<KeySets>, Clock) {
    let clock = Clock::manual(UNIX_EPOCH + Duration::from_secs(1_000_000));
    let fetcher = Fetcher {
        blocked: Vec::new(),
        ..Fetcher::from_env()
    };
    (Arc::new(KeySets::new(clock.clone(), fetcher)), clock)
}

/// A server that gives these answers, each on a connection of its own, and its URL.
async fn server(answers: Vec<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.expect("one comes");
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream
                .write_all(answer.replace("PORT", &port.to_string()).as_bytes())
                .await;
        }
    });
    format!("http://127.0.0.1:{port}/keys")
}

fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn step(clock: &Clock, seconds: u64) {
    clock.set(clock.now() + Duration::from_secs(seconds));
}

const LONG: Duration = Duration::from_secs(20);

#[tokio::test]
async fn keys_are_fetched_kept_and_renewed() {
    let [one, two] = [
        Issuer::new("ES256").jwks("1"),
        Issuer::new("ES256").jwks("2"),
    ];
    let bad = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n".to_owned();
    let url = server(vec![ok(&one), bad.clone(), ok("{}"), ok(&two)]).await;
    let (sets, clock) = open();
    let raw = snapshot(&url);
    assert_eq!(
        keys_of(&sets.fill(raw.clone())),
        "",
        "nothing before the first answer"
    );
    let rule = raw
        .request_authentications
        .get("n", "a")
        .expect("it is there")
        .spec
        .jwt_rules[0]
        .clone();
    assert!(sets.state(&rule).is_err());
    sets.settle(LONG).await;
    let filled = sets.fill(raw.clone());
    assert_eq!(keys_of(&filled), one);
    assert_eq!(sets.state(&rule), Ok(None));
    // What has not changed is the same in memory, so that no proxy is troubled.
    let again = sets.fill(raw.clone());
    assert!(
        again
            .request_authentications
            .same(&filled.request_authentications)
    );
    // Not before their time.
    step(&clock, 19 * 60);
    assert!(sets.due().is_empty());
    // A failure changes nothing but what is told about it.
    step(&clock, 2 * 60);
    for told in ["500", "[keys]"] {
        sets.settle(LONG).await;
        assert_eq!(keys_of(&sets.fill(raw.clone())), one);
        let state = sets.state(&rule);
        assert!(
            matches!(&state, Ok(Some(why)) if why.contains(told)),
            "{told} {state:?}"
        );
        assert!(sets.due().is_empty(), "not at once");
        step(&clock, 2);
    }
    sets.settle(LONG).await;
    assert_eq!(keys_of(&sets.fill(raw)), two);
    assert_eq!(sets.state(&rule), Ok(None));
    // A clock that steps back an hour does not keep old keys for an hour longer.
    clock.set(clock.now() - Duration::from_secs(3600));
    assert_eq!(sets.due().len(), 1);
}

#[tokio::test]
async fn an_issuer_publishes_where_its_keys_are() {
    let keys = Issuer::new("RS256").jwks("1");
    // The port is as long as its word is not, so this answer ends with its connection.
    let found =
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"jwks_uri\":\"http://127.0.0.1:PORT/k\"}";
    let url = server(vec![found.to_owned(), ok(&keys)]).await;
    let (sets, _) = open();
    let raw = of_rule(JwtRule {
        issuer: url.replace("/keys", "/"),
        ..Default::default()
    });
    sets.fill(raw.clone());
    sets.settle(LONG).await;
    let rule = &raw
        .request_authentications
        .get("n", "a")
        .expect("it is there")
        .spec
        .jwt_rules[0];
    assert_eq!(
        keys_of(&sets.fill(raw.clone())),
        keys,
        "{:?}",
        sets.state(rule)
    );
}

#[tokio::test]
async fn what_is_no_key_set_is_refused_and_says_why() {
    let huge = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n{}",
        "x".repeat(2 << 20)
    );
    let many: Vec<String> = (0..10_000).map(|_| "{}".to_owned()).collect();
    for (answer, told) in [
        (
            "HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
                .to_owned(),
            "redirects are not followed",
        ),
        (ok("<html>"), "invalid JSON"),
        (ok(r#"{"keys":[]}"#), "any valid public key"),
        (
            ok(&format!("{{\"keys\":[{}]}}", many.join(","))),
            "10000 keys",
        ),
        (huge, "more than"),
        ("rubbish".to_owned(), "http://127.0.0.1"),
    ] {
        let url = server(vec![answer]).await;
        let (sets, _) = open();
        let raw = snapshot(&url);
        sets.fill(raw.clone());
        sets.settle(LONG).await;
        assert_eq!(keys_of(&sets.fill(raw.clone())), "");
        let rule = &raw
            .request_authentications
            .get("n", "a")
            .expect("it is there")
            .spec
            .jwt_rules[0];
        let state = sets.state(rule).expect_err("no keys");
        assert!(state.contains(told), "{told}: {state}");
    }
}

#[tokio::test]
async fn this_machine_and_its_link_are_not_asked() {
    let url = server(vec![ok(&Issuer::new("ES256").jwks("1"))]).await;
    let clock = Clock::system();
    let fetcher = Fetcher {
        blocked: fetch::BLOCKED
            .split(',')
            .map(|net| net.parse().expect("a range"))
            .collect(),
        ..Fetcher::from_env()
    };
    let port = url.rsplit(':').next().expect("a port").to_owned();
    for url in [
        url.clone(),
        format!("http://localhost:{port}"),
        format!("http://[::ffff:127.0.0.1]:{port}"),
        "http://169.254.169.254/latest/meta-data".to_owned(),
        format!("http://0.0.0.0:{port}"),
    ] {
        let sets = Arc::new(KeySets::new(clock.clone(), fetcher.clone()));
        let raw = snapshot(&url);
        sets.fill(raw.clone());
        sets.settle(LONG).await;
        let rule = &raw
            .request_authentications
            .get("n", "a")
            .expect("it is there")
            .spec
            .jwt_rules[0];
        let state = sets.state(rule).expect_err("no keys");
        assert!(state.contains("may not be asked"), "{url}: {state}");
    }
    for url in ["file:///etc/passwd", "gopher://x/", "http://"] {
        let sets = Arc::new(KeySets::new(clock.clone(), fetcher.clone()));
        sets.fill(snapshot(url));
        sets.settle(LONG).await;
        let raw = snapshot(url);
        let rule = &raw
            .request_authentications
            .get("n", "a")
            .expect("it is there")
            .spec
            .jwt_rules[0];
        assert!(
            sets.state(rule)
                .expect_err("no keys")
                .contains("no http or https URL"),
            "{url}"
        );
    }
}
