//! Policies that change while connections are open: the newest one counts at once, for what was let in before as well.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use base::clock::Clock;
use outrigger_proxy::server::{Change, Server};
use serde_json::{Value, json};
use testkit::{
    authorization::{Act, Service},
    jwt::Issuer,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::LocalSet,
};

use crate::support::*;

const FILTERS: &str = "type.googleapis.com/envoy.extensions.filters";
const HTTP2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
     {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
     explicit_http_config: {http2_protocol_options: {}}}}";

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, test);
}

/// A proxy whose drain alone would end nothing within a test.
async fn patient(changes: Vec<Change>) -> Rc<Server> {
    proxy_with(Clock::system(), Duration::from_secs(600), changes).await
}

fn filter(kind: &str, config: &Value) -> String {
    let mut config = config.clone();
    config["@type"] = format!("{FILTERS}.{kind}").into();
    json!({ "name": kind, "typed_config": config }).to_string()
}

/// A rule set whose one policy is about callers of this kind.
fn rules(action: &str, principal: &Value) -> Value {
    json!({ "rules": { "action": action, "policies": { "p": {
        "permissions": [{ "any": true }], "principals": [principal],
    } } } })
}

fn everybody(action: &str) -> Value {
    rules(action, &json!({ "any": true }))
}

/// A listener of HTTP whose chain has these filters before the router.
fn http(filters: &[String]) -> Change {
    let filters: String = filters.iter().map(|filter| format!("{filter}, ")).collect();
    let chain = http_to("app", "").replace("http_filters: [", &format!("http_filters: [{filters}"));
    listener("http", &format!("- {{{chain}}}"), "")
}

/// A listener of TCP whose chain has these filters before the proxy.
fn tcp(filters: &[String]) -> Change {
    let filters: String = filters.iter().map(|filter| format!("{filter}, ")).collect();
    let chain = tcp_to("echo").replace("filters: [", &format!("filters: [{filters}"));
    listener("tcp", &format!("- {{{chain}}}"), "")
}

async fn connect(server: &Server, listener: &str) -> TcpStream {
    let address: SocketAddr = address(server, listener);
    TcpStream::connect(address).await.expect("it listens")
}

/// One request on a connection that is kept; the answer in lower case, or nothing.
async fn ask(stream: &mut TcpStream, headers: &str) -> String {
    let head = format!("GET / HTTP/1.1\r\nHost: h\r\n{headers}\r\n");
    let _ = stream.write_all(head.as_bytes()).await;
    let mut got = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&got).to_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let mut lines = head.lines();
            let length = lines.find_map(|l| l.strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0_usize) {
                return text;
            }
        }
        if !matches!(within(stream.read_buf(&mut got)).await, Ok(1..)) {
            return text;
        }
    }
}

/// Whether a byte comes back.
async fn echoes(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let _ = stream.write_all(b"x").await;
    matches!(within(stream.read(&mut byte)).await, Ok(1))
}

/// Until it is closed.
async fn ends(stream: &mut TcpStream) {
    within(async {
        while echoes(stream).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[test]
fn a_changed_policy_ends_the_connections_that_it_finds_open() {
    run(async {
        let rbac = |kind: &str, action: &str| [filter(kind, &everybody(action))];
        let server = patient(vec![
            cluster("echo", echo().await, ""),
            cluster("app", origin().await, ""),
            tcp(&rbac("network.rbac.v3.RBAC", "ALLOW").map(with_prefix)),
            http(&rbac("http.rbac.v3.RBAC", "ALLOW")),
        ])
        .await;
        let mut long = connect(&server, "tcp").await;
        assert!(echoes(&mut long).await, "it is let in");
        let mut kept = connect(&server, "http").await;
        let answer = ask(&mut kept, "").await;
        assert!(
            answer.starts_with("http/1.1 200") && !answer.contains("connection: close"),
            "{answer}"
        );
        let denied = vec![
            tcp(&rbac("network.rbac.v3.RBAC", "DENY").map(with_prefix)),
            http(&rbac("http.rbac.v3.RBAC", "DENY")),
        ];
        apply(&server, denied).await;
        // What comes anew is refused at once.
        assert!(!echoes(&mut connect(&server, "tcp").await).await);
        let fresh = get(address(&server, "http"), "").await;
        assert!(fresh.starts_with("HTTP/1.1 403"), "{fresh}");
        // What is open is denied as well: the next request, and the bytes of a connection.
        let answer = ask(&mut kept, "").await;
        assert!(
            answer.starts_with("http/1.1 403") && answer.contains("connection: close"),
            "{answer}"
        );
        assert!(!echoes(&mut long).await);
    });
}

/// Network filters name their statistics.
fn with_prefix(filter: String) -> String {
    let mut filter: Value = serde_json::from_str(&filter).expect("JSON");
    filter["typed_config"]["stat_prefix"] = "p".into();
    filter.to_string()
}

#[test]
fn tokens_are_read_before_a_changed_policy_asks_for_them() {
    run(async {
        let issuer = Issuer::new("ES256");
        let tokens = filter(
            "http.jwt_authn.v3.JwtAuthentication",
            &json!({
                "providers": { "i": { "issuer": "i", "local_jwks": { "inline_string": issuer.jwks("k") },
                    "payload_in_metadata": "payload" } },
                "rules": [{ "match": { "prefix": "/" }, "requires": { "requires_any": { "requirements": [
                    { "provider_name": "i" }, { "allow_missing": {} } ] } } }],
            }),
        );
        let group = |name: &str| {
            let claim = json!({ "metadata": { "filter": "envoy.filters.http.jwt_authn",
                "path": [{ "key": "payload" }, { "key": "sub" }], "value": { "string_match": { "exact": name } } } });
            filter("http.rbac.v3.RBAC", &rules("ALLOW", &claim))
        };
        let server = patient(vec![cluster("app", origin().await, ""), http(&[])]).await;
        let bearer = |sub: &str| {
            let token = issuer.sign("k", &json!({ "iss": "i", "sub": sub }));
            format!("Authorization: Bearer {token}\r\n")
        };
        let mut open = Vec::new();
        for _ in 0..4 {
            let mut stream = connect(&server, "http").await;
            let answer = ask(&mut stream, "").await;
            assert!(answer.starts_with("http/1.1 200"), "{answer}");
            open.push(stream);
        }
        // Tokens are asked for from now on, with a policy that reads them.
        apply(&server, vec![http(&[tokens.clone(), group("bob")])]).await;
        for (headers, status) in [
            (bearer("bob"), 200),
            (bearer("eve"), 403),
            (String::new(), 403),
        ] {
            let answer = ask(&mut open.remove(0), &headers).await;
            assert!(
                answer.starts_with(&format!("http/1.1 {status}")),
                "{answer}"
            );
        }
        let forged = Issuer::new("ES256").sign("k", &json!({ "iss": "i", "sub": "bob" }));
        let forged = format!("Authorization: Bearer {forged}\r\n");
        let answer = ask(&mut open.remove(0), &forged).await;
        assert!(answer.starts_with("http/1.1 401"), "{answer}");

        // Only the policy changes: what a good token is good for is found by the next request.
        let (mut bob, mut eve) = (
            connect(&server, "http").await,
            connect(&server, "http").await,
        );
        assert!(
            ask(&mut bob, &bearer("bob"))
                .await
                .starts_with("http/1.1 200")
        );
        // Its refusal leaves the connection open: nothing drains.
        assert!(
            ask(&mut eve, &bearer("eve"))
                .await
                .starts_with("http/1.1 403")
        );
        apply(&server, vec![http(&[tokens, group("eve")])]).await;
        assert!(
            ask(&mut bob, &bearer("bob"))
                .await
                .starts_with("http/1.1 403")
        );
        assert!(
            ask(&mut eve, &bearer("eve"))
                .await
                .starts_with("http/1.1 200")
        );
    });
}

#[test]
fn a_service_that_decides_from_now_on_is_asked_about_what_is_open() {
    run(async {
        let no = json!({ "status": { "code": 7 }, "deniedResponse": {} });
        let say = |answer: Value| {
            let answer = proto::json::from_value(&answer).expect("canonical JSON");
            Act::Say(Box::new(answer))
        };
        let yes = || say(json!({ "status": {} }));
        let (service, at) = Service::start(vec![yes(), say(no)]).await;
        let ask_it = |more: &str| {
            let config = json!({ "stat_prefix": more, "transport_api_version": "V3",
                "grpc_service": { "envoy_grpc": { "cluster_name": "authz" }, "timeout": "5s" } });
            filter("network.ext_authz.v3.ExtAuthz", &config)
        };
        let (judge, at_http) = Service::start(vec![say(
            json!({ "status": { "code": 7 }, "deniedResponse": {} }),
        )])
        .await;
        let of_requests = filter(
            "http.ext_authz.v3.ExtAuthz",
            &json!({ "transport_api_version": "V3",
                "grpc_service": { "envoy_grpc": { "cluster_name": "authz-http" }, "timeout": "5s" } }),
        );
        let server = patient(vec![
            cluster("echo", echo().await, ""),
            cluster("app", origin().await, ""),
            cluster("authz", at.port(), HTTP2),
            cluster("authz-http", at_http.port(), HTTP2),
            tcp(&[]),
            http(&[]),
        ])
        .await;
        let (mut long, mut kept) = (
            connect(&server, "tcp").await,
            connect(&server, "http").await,
        );
        assert!(echoes(&mut long).await);
        assert!(ask(&mut kept, "").await.starts_with("http/1.1 200"));
        apply(&server, vec![tcp(&[ask_it("one")]), http(&[of_requests])]).await;
        // The first answer lets it go on; another question brings the second, which does not.
        within(async {
            while service.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert!(echoes(&mut long).await);
        assert!(ask(&mut kept, "").await.starts_with("http/1.1 403"));
        assert_eq!(judge.seen().len(), 1);
        apply(&server, vec![tcp(&[ask_it("two")])]).await;
        ends(&mut long).await;
        assert_eq!(service.seen().len(), 2, "asked once for each change");
    });
}

#[test]
fn what_is_open_in_clear_ends_where_mutual_tls_is_asked_for() {
    run(async {
        let ca = Authority::new("root");
        let own = certificate(&ca.issue(&["spiffe://cluster.local/ns/b/sa/server"]));
        let trusted = inline(&ca.pem());
        let tls = downstream(
            &format!("{own}, validation_context: {{trusted_ca: {trusted}}}"),
            ", require_client_certificate: true",
        );
        let permissive = |name: &str, filters: &str| {
            let chains = format!(
                "- {{filter_chain_match: {{transport_protocol: tls}}, {filters}, {tls}}}\n\
                 - {{filter_chain_match: {{transport_protocol: raw_buffer}}, {filters}}}"
            );
            listener(name, &chains, INSPECTOR)
        };
        let strict = |name: &str, filters: &str| {
            let chain =
                format!("- {{filter_chain_match: {{transport_protocol: tls}}, {filters}, {tls}}}");
            listener(name, &chain, INSPECTOR)
        };
        let server = patient(vec![
            cluster("echo", echo().await, ""),
            cluster("app", origin().await, ""),
            permissive("tcp", &tcp_to("echo")),
            permissive("http", &http_to("app", "")),
        ])
        .await;
        let (mut long, mut kept) = (
            connect(&server, "tcp").await,
            connect(&server, "http").await,
        );
        assert!(echoes(&mut long).await);
        assert!(ask(&mut kept, "").await.starts_with("http/1.1 200"));
        let changes = vec![
            strict("tcp", &tcp_to("echo")),
            strict("http", &http_to("app", "")),
        ];
        apply(&server, changes).await;
        ends(&mut long).await;
        let answer = ask(&mut kept, "").await;
        assert!(
            answer.starts_with("http/1.1 403") && answer.contains("connection: close"),
            "{answer}"
        );
    });
}

/// An origin that agrees to every upgrade, and then gives back what it gets.
async fn upgrading() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
                let _ = stream.write_all(answer).await;
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

#[test]
fn an_upgraded_connection_ends_with_the_drain() {
    run(async {
        let upgrades = "upgrade_configs: [{upgrade_type: websocket}],";
        let of = |filters: &str| {
            let chain = http_to("app", upgrades)
                .replace("http_filters: [", &format!("http_filters: [{filters}"));
            listener("http", &format!("- {{{chain}}}"), "")
        };
        let server = proxy(vec![cluster("app", upgrading().await, ""), of("")]).await;
        let mut socket = connect(&server, "http").await;
        let head = "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        socket.write_all(head.as_bytes()).await.expect("it is open");
        let mut got = Vec::new();
        while !got.ends_with(b"\r\n\r\n") {
            let read = within(socket.read_buf(&mut got)).await;
            assert!(read.is_ok_and(|read| read > 0), "{got:?}");
        }
        assert!(got.starts_with(b"HTTP/1.1 101"), "{got:?}");
        assert!(echoes(&mut socket).await);
        stat(&server, "http.app.downstream_rq_active", 1).await;
        let deny = filter("http.rbac.v3.RBAC", &everybody("DENY"));
        apply(&server, vec![of(&format!("{deny}, "))]).await;
        // Nothing is said on it: the end comes by itself.
        let mut byte = [0];
        assert!(!matches!(within(socket.read(&mut byte)).await, Ok(1..)));
        stat(&server, "http.app.downstream_rq_active", 0).await;
        stat(&server, "http.app.downstream_cx_active", 0).await;
    });
}

#[test]
fn a_refused_connection_is_kept_waiting_where_that_is_wanted() {
    run(async {
        let mut slow = everybody("DENY");
        slow["stat_prefix"] = "p.".into();
        slow["delay_deny"] = "0.3s".into();
        // What it could find later is what it finds first.
        slow["enforcement_type"] = "CONTINUOUS".into();
        let server = patient(vec![
            cluster("echo", echo().await, ""),
            tcp(&[filter("network.rbac.v3.RBAC", &slow)]),
        ])
        .await;
        let begun = std::time::Instant::now();
        assert!(!echoes(&mut connect(&server, "tcp").await).await);
        assert!(
            begun.elapsed() >= Duration::from_millis(300),
            "{:?}",
            begun.elapsed()
        );
        stat(&server, "p.rbac.denied", 1).await;
    });
}
