//! The table of policy decisions: every condition that policies have, as ALLOW and as DENY, as it stands and turned
//! round, asked over the wire of our proxy and, where one is at hand, of a real Envoy with the same configuration.

mod conditions;
mod gateway;
mod network;
mod spellings;

use std::{collections::BTreeMap, net::SocketAddr};

use conditions::{Condition, conditions, path};
use serde_json::{Value, json};
use spellings::{SPELLINGS, STRICTER};
use testkit::jwt::Issuer;
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::LocalSet,
};

use crate::{
    envoy::{self, Envoy},
    support::*,
};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// In clear.
    Plain,
    /// Over TLS without a certificate.
    Nobody,
    /// With the certificate of `ns/a/sa/client`.
    A,
    /// With the certificate of `ns/b.c/sa/web`, in another trust domain.
    B,
}

/// One request.
#[derive(Debug, Clone)]
struct Ask {
    who: Who,
    method: &'static str,
    path: &'static str,
    host: &'static str,
    headers: String,
    /// Last part of the client's address in 127.0.0.0/8.
    from: u8,
    server_name: &'static str,
    claims: Option<Value>,
}

fn ask(path: &'static str) -> Ask {
    Ask {
        who: Who::Plain,
        method: "GET",
        path,
        host: "shop.example",
        headers: String::new(),
        from: 1,
        server_name: "shop.example",
        claims: None,
    }
}

impl Ask {
    fn by(self, who: Who) -> Self {
        Self { who, ..self }
    }

    fn method(self, method: &'static str) -> Self {
        Self { method, ..self }
    }

    fn host(self, host: &'static str) -> Self {
        Self { host, ..self }
    }

    fn header(mut self, line: &str) -> Self {
        self.headers += &format!("{line}\r\n");
        self
    }

    fn from(self, from: u8) -> Self {
        Self { from, ..self }
    }

    fn server_name(self, server_name: &'static str) -> Self {
        Self {
            server_name,
            who: Who::Nobody,
            ..self
        }
    }

    fn claims(self, claims: Value) -> Self {
        Self {
            claims: Some(claims),
            ..self
        }
    }
}

/// ALLOW or DENY; `not` turns what is given round.
fn rules(condition: &Condition, action: &str, not: bool) -> Value {
    let permission = match &condition.permission {
        Some(p) if not && condition.principal.is_none() => json!({ "not_rule": p }),
        Some(p) => p.clone(),
        None => json!({ "any": true }),
    };
    let principal = match &condition.principal {
        Some(p) if not && condition.permission.is_none() => json!({ "not_id": p }),
        Some(p) => p.clone(),
        None => json!({ "any": true }),
    };
    json!({ "action": action, "policies": { "p": { "permissions": [permission], "principals": [principal] } } })
}

/// A decision that is asked for: the route's number, the request, the status of the answer.
type Row = (usize, Ask, u16);

/// Routes with policies of their own, chosen by a header, and what is to be asked of each.
fn table(port: u16) -> (Vec<Value>, Vec<Row>) {
    let (mut routes, mut rows) = (Vec::new(), Vec::new());
    let mut add = |filters: Value, asks: Vec<(Ask, bool)>| {
        let number = routes.len();
        routes.push(json!({
            "match": { "prefix": "/", "headers": [{ "name": "x-row", "string_match": { "exact": number.to_string() } }] },
            "route": { "cluster": "app" },
            "typed_per_filter_config": filters,
        }));
        let status = |passes| if passes { 200 } else { 403 };
        rows.extend(
            asks.into_iter()
                .map(|(ask, passes)| (number, ask, status(passes))),
        );
    };
    let per_route = |rules: Value| json!({ "@type": format!("{TYPES}.filters.http.rbac.v3.RBACPerRoute"), "rbac": { "rules": rules } });
    for condition in conditions(port) {
        let whole = condition.permission.is_some() && condition.principal.is_some();
        for (action, not) in [
            ("ALLOW", false),
            ("ALLOW", true),
            ("DENY", false),
            ("DENY", true),
        ] {
            if whole && not {
                continue;
            }
            let asks = condition.asks.iter().map(|(ask, met)| {
                let matches = *met != not;
                (ask.clone(), matches == (action == "ALLOW"))
            });
            let asks = asks.collect();
            add(
                json!({ "rbac-allow": per_route(rules(&condition, action, not)) }),
                asks,
            );
        }
    }
    // In the order of the chain: CUSTOM, DENY, ALLOW. Each refuses or not.
    let on = |name: &str| Condition {
        permission: None,
        principal: Some(json!({ "header": { "name": name, "present_match": true } })),
        asks: Vec::new(),
    };
    let custom = json!({ "@type": format!("{TYPES}.filters.http.ext_authz.v3.ExtAuthzPerRoute"), "check_settings": {} });
    let mut asks = Vec::new();
    for bits in 0..8_u8 {
        let [refused, denied, allowed] = [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
        let mut one = ask("/");
        for (name, set) in [
            ("x-refuse", refused),
            ("x-deny", denied),
            ("x-allow", allowed),
        ] {
            if set {
                one = one.header(&format!("{name}: 1"));
            }
        }
        asks.push((one, !refused && !denied && allowed));
    }
    add(
        json!({
            "ext_authz": custom,
            "rbac-deny": per_route(rules(&on("x-deny"), "DENY", false)),
            "rbac-allow": per_route(rules(&on("x-allow"), "ALLOW", false)),
        }),
        asks,
    );
    // The matcher form: the first branch that fits decides, and where none does nobody passes.
    let branch = |input: &str, field: &str, matcher: Value, action: &str| {
        let mut input = json!({ "@type": format!("type.googleapis.com/{input}") });
        if !field.is_empty() {
            input["header_name"] = field.into();
        }
        json!({
            "predicate": { "single_predicate": { "input": { "name": "i", "typed_config": input }, "value_match": matcher } },
            "on_match": { "action": { "name": "a", "typed_config": {
                "@type": "type.googleapis.com/envoy.config.rbac.v3.Action", "name": "p", "action": action,
            } } },
        })
    };
    let header_input = "envoy.type.matcher.v3.HttpRequestHeaderMatchInput";
    let uri_input = "envoy.extensions.matching.common_inputs.ssl.v3.UriSanInput";
    let name_input = "envoy.extensions.matching.common_inputs.network.v3.ServerNameInput";
    let tree = json!({ "matcher_list": { "matchers": [
        branch(header_input, "x-team", json!({ "exact": "blue" }), "ALLOW"),
        branch(uri_input, "", json!({ "prefix": "spiffe://other.local/" }), "DENY"),
        branch(uri_input, "", json!({ "contains": "/ns/a/" }), "ALLOW"),
        branch(name_input, "", json!({ "suffix": ".test" }), "ALLOW"),
    ] } });
    add(
        json!({ "rbac-allow": { "@type": format!("{TYPES}.filters.http.rbac.v3.RBACPerRoute"), "rbac": { "matcher": tree } } }),
        vec![
            (ask("/").header("x-team: blue"), true),
            (ask("/").header("x-team: red"), false),
            (ask("/"), false),
            (ask("/").by(Who::A), true),
            (ask("/").by(Who::B), false),
            (ask("/").by(Who::B).header("x-team: blue"), true),
            (ask("/").server_name("a.test"), true),
            (ask("/").server_name("a.example"), false),
        ],
    );
    let admin = Condition {
        permission: Some(path(json!({ "prefix": "/admin" }))),
        principal: None,
        asks: Vec::new(),
    };
    add(
        json!({ "rbac-deny": per_route(rules(&admin, "DENY", false)) }),
        Vec::new(),
    );
    // Nobody is allowed where an ALLOW policy matches nobody.
    let nobody = json!({ "action": "ALLOW", "policies": { "none": { "permissions": [{ "not_rule": { "any": true } }], "principals": [{ "not_id": { "any": true } }] } } });
    add(
        json!({ "rbac-allow": per_route(nobody) }),
        vec![(ask("/"), false), (ask("/").by(Who::A), false)],
    );
    let spelled = routes.len() - 2;
    rows.extend(
        SPELLINGS
            .iter()
            .map(|(path, status)| (spelled, ask(path), *status)),
    );
    (routes, rows)
}

/// `filters` of both listeners.
fn manager(routes: &[Value], keys: &str) -> String {
    let filter = |name: &str, kind: &str, config: Value| {
        let mut config = config;
        config["@type"] = format!("{TYPES}.filters.http.{kind}").into();
        json!({ "name": name, "typed_config": config })
    };
    let off = |name: &str, kind: &str, config: Value| {
        let mut filter = filter(name, kind, config);
        filter["disabled"] = true.into();
        filter
    };
    let jwt = json!({
        "providers": { "i": { "issuer": "i", "local_jwks": { "inline_string": keys }, "payload_in_metadata": "payload",
            "normalize_payload_in_metadata": { "space_delimited_claims": ["scope"] } } },
        "rules": [{ "match": { "prefix": "/" }, "requires": { "requires_any": { "requirements": [{ "provider_name": "i" }, { "allow_missing": {} }] } } }],
    });
    let authz = json!({
        "transport_api_version": "V3",
        "http_service": { "server_uri": { "uri": "http://authz", "cluster": "authz", "timeout": "5s" } },
        "allowed_headers": { "patterns": [{ "exact": "x-refuse" }] },
    });
    let manager = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "in",
        "normalize_path": true,
        "merge_slashes": true,
        "use_remote_address": false,
        "xff_num_trusted_hops": 0,
        "forward_client_cert_details": "SANITIZE",
        "route_config": { "name": "r", "virtual_hosts": [{ "name": "v", "domains": ["*"], "routes": routes }] },
        "http_filters": [
            off("ext_authz", "ext_authz.v3.ExtAuthz", authz),
            filter("jwt", "jwt_authn.v3.JwtAuthentication", jwt),
            filter("rbac-deny", "rbac.v3.RBAC", json!({})),
            filter("rbac-allow", "rbac.v3.RBAC", json!({})),
            filter("router", "router.v3.Router", json!({})),
        ],
    });
    format!("filters: [{{name: hcm, typed_config: {manager}}}]")
}

struct Clients {
    ca: Authority,
    a: Leaf,
    b: Leaf,
    issuer: Issuer,
}

impl Clients {
    fn new() -> Self {
        let ca = Authority::new("root");
        Self {
            a: ca.issue(&["spiffe://cluster.local/ns/a/sa/client"]),
            b: ca.issue(&["spiffe://other.local/ns/b.c/sa/web"]),
            issuer: Issuer::new("ES256"),
            ca,
        }
    }

    /// The transport socket of a server that asks for certificates, and takes clients without.
    fn server(&self) -> String {
        let names = [
            "spiffe://cluster.local/ns/b/sa/server",
            "shop.example",
            "other.example",
            "a.example",
            "a.test",
        ];
        let own = certificate(&self.ca.issue(&names));
        let trusted = inline(&self.ca.pem());
        downstream(
            &format!("{own}, validation_context: {{trusted_ca: {trusted}}}"),
            ", require_client_certificate: false",
        )
    }
}

/// Sends a request; gives the status, and the path that arrived where it did.
async fn send(clients: &Clients, plain: u16, tls: u16, row: usize, ask: &Ask) -> (u16, String) {
    let mut head = format!(
        "{} {} HTTP/1.1\r\nHost: {}\r\nx-row: {row}\r\nConnection: close\r\n{}",
        ask.method, ask.path, ask.host, ask.headers
    );
    if let Some(claims) = &ask.claims {
        let mut claims = claims.clone();
        claims["iss"] = "i".into();
        head += &format!(
            "Authorization: Bearer {}\r\n",
            clients.issuer.sign("k", &claims)
        );
    }
    head += "\r\n";
    let port = if ask.who == Who::Plain { plain } else { tls };
    let mut stream = open(clients, port, ask, "http/1.1").await;
    read(&talk(&mut stream, &head).await)
}

/// What a request goes over.
trait Duplex: tokio::io::AsyncRead + AsyncWrite + Unpin {}

impl<T: tokio::io::AsyncRead + AsyncWrite + Unpin> Duplex for T {}

/// Connects as the request says, and offers a protocol.
async fn open(clients: &Clients, port: u16, ask: &Ask, alpn: &str) -> Box<dyn Duplex> {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind(SocketAddr::from(([127, 0, 0, ask.from], 0)))
        .expect("an address of this machine");
    let stream = socket
        .connect(SocketAddr::from(([127, 0, 0, 1], port)))
        .await
        .expect("it listens");
    let leaf = match ask.who {
        Who::Plain => return Box::new(stream),
        Who::Nobody => None,
        Who::A => Some(&clients.a),
        Who::B => Some(&clients.b),
    };
    let config = std::sync::Arc::new(client(&clients.ca, leaf, &[alpn]));
    let name = ask.server_name.try_into().expect("a name");
    let stream = tokio_rustls::TlsConnector::from(config)
        .connect(name, stream)
        .await;
    Box::new(stream.expect("a handshake"))
}

/// Sends a request and reads one answer, as long as it says it is: Envoy takes its time to close.
async fn talk(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), head: &str) -> String {
    stream.write_all(head.as_bytes()).await.expect("it is open");
    let mut got = Vec::new();
    within(async {
        loop {
            let text = String::from_utf8_lossy(&got);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let mut lines = head.lines();
                let length =
                    lines.find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                if body.len() >= length.unwrap_or(0_usize) {
                    return text.into_owned();
                }
            }
            match stream.read_buf(&mut got).await {
                Ok(0) | Err(_) => return String::from_utf8_lossy(&got).into_owned(),
                Ok(_) => {}
            }
        }
    })
    .await
}

fn read(answer: &str) -> (u16, String) {
    let status = answer
        .get(9..12)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let path = body.split(' ').nth(1).filter(|_| status == 200);
    (status, path.unwrap_or_default().to_owned())
}

/// An authorization service: refuses what says so.
async fn authz() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let mut got = Vec::new();
                while stream.read_buf(&mut got).await.is_ok_and(|read| read > 0) {
                    if !got.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let text = String::from_utf8_lossy(&got).to_lowercase();
                    let status = if text.contains("x-refuse:") {
                        "403 Forbidden"
                    } else {
                        "200 OK"
                    };
                    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                    got.clear();
                }
            });
        }
    });
    port
}

#[test]
fn decisions_are_as_they_should_be_and_as_envoys() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let clients = Clients::new();
        let keys = clients.issuer.jwks("k");
        let (app, authz) = (origin().await, authz().await);
        let context = clients.server();
        // Ports are asked about, so they are chosen first.
        let run = async |plain: u16, tls: u16| {
            let (_, rows) = table(plain);
            let mut answers = Vec::new();
            for (row, ask, _) in &rows {
                answers.push(send(&clients, plain, tls, *row, ask).await);
            }
            (rows, answers)
        };
        let socket = |port: u16| format!("address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}");
        let listeners = |plain: u16, tls: u16| {
            let manager = manager(&table(plain).0, &keys);
            [
                format!("{{name: plain, {}, filter_chains: [{{{manager}}}]}}", socket(plain)),
                format!("{{name: tls, {}, {INSPECTOR}, filter_chains: [{{{manager}, {context}}}]}}", socket(tls)),
            ]
        };
        let (plain, tls) = (envoy::free_port(), envoy::free_port());
        let mut changes = vec![cluster("app", app, ""), cluster("authz", authz, "")];
        changes.extend(listeners(plain, tls).iter().map(|yaml| listener_of(yaml)));
        let ours = proxy(changes).await;
        let (rows, answers) = run(plain, tls).await;
        assert!(rows.len() >= 150, "{} decisions", rows.len());
        println!("{} decisions", rows.len());
        let mut wrong = Vec::new();
        for ((row, ask, wanted), (status, path)) in rows.iter().zip(&answers) {
            if status != wanted {
                wrong.push(format!("row {row}: {status} ({path}), not {wanted}: {ask:?}"));
            }
        }
        assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
        drop(ours);

        let Some(binary) = envoy::binary() else { return };
        let (plain, tls) = (envoy::free_port(), envoy::free_port());
        let [one, two] = listeners(plain, tls);
        let of = |name: &str, port: u16| format!("  - {{name: {name}, connect_timeout: 5s, load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{{}}}}}]}}]}}}}\n", socket(port));
        let config = format!("static_resources:\n  listeners:\n  - {one}\n  - {two}\n  clusters:\n{}{}", of("app", app), of("authz", authz));
        let _envoy = Envoy::start(&binary, &config, plain).await;
        let (_, theirs) = run(plain, tls).await;
        let mut differ: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for (((row, ask, _), ours), theirs) in rows.iter().zip(&answers).zip(&theirs) {
            // We write escapes in upper case, as RFC 3986 has it, and Envoy leaves them.
            let same_path = ours.1.eq_ignore_ascii_case(&theirs.1);
            let stricter = ours.0 >= 400 && STRICTER.contains(&ask.path);
            if !stricter && (ours.0 != theirs.0 || !same_path) {
                differ.entry(*row).or_default().push(format!("{ask:?}: ours {ours:?}, Envoy's {theirs:?}"));
            }
        }
        assert!(differ.is_empty(), "{differ:#?}");
        println!("equal to Envoy's");
        drop(TcpStream::connect(("127.0.0.1", plain)).await);
    });
}
