//! The table of policy decisions: every condition that policies have, as ALLOW and as DENY, as it stands and turned
//! round, asked over the wire of our proxy and, where one is at hand, of a real Envoy with the same configuration.

use std::{collections::BTreeMap, net::SocketAddr};

use serde_json::{Value, json};
use testkit::jwt::Issuer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
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

/// A condition, and requests with whether they meet it.
struct Condition {
    permission: Option<Value>,
    principal: Option<Value>,
    asks: Vec<(Ask, bool)>,
}

fn may(permission: Value, asks: Vec<(Ask, bool)>) -> Condition {
    Condition {
        permission: Some(permission),
        principal: None,
        asks,
    }
}

fn who(principal: Value, asks: Vec<(Ask, bool)>) -> Condition {
    Condition {
        permission: None,
        principal: Some(principal),
        asks,
    }
}

fn header(name: &str, matcher: Value) -> Value {
    json!({ "header": { "name": name, "string_match": matcher } })
}

fn path(matcher: Value) -> Value {
    json!({ "url_path": { "path": matcher } })
}

fn template(text: &str) -> Value {
    json!({ "uri_template": { "name": "t", "typed_config": {
        "@type": format!("{TYPES}.path.match.uri_template.v3.UriTemplateMatchConfig"), "path_template": text,
    } } })
}

fn range(address: &str, length: u32) -> Value {
    json!({ "address_prefix": address, "prefix_len": length })
}

fn claim(path: &[&str], value: Value) -> Value {
    let path: Vec<Value> = ["payload"]
        .iter()
        .chain(path)
        .map(|key| json!({ "key": key }))
        .collect();
    json!({ "metadata": { "filter": "envoy.filters.http.jwt_authn", "path": path, "value": value } })
}

fn name(matcher: Value) -> Value {
    json!({ "authenticated": { "principal_name": matcher } })
}

fn conditions(port: u16) -> Vec<Condition> {
    let regex = |text: &str| json!({ "safe_regex": { "regex": text } });
    let one_of =
        |text: &str| json!({ "list_match": { "one_of": { "string_match": { "exact": text } } } });
    let is = |text: &str| json!({ "string_match": { "exact": text } });
    vec![
        may(
            header(":method", json!({ "exact": "POST" })),
            vec![
                (ask("/"), false),
                (ask("/").method("POST"), true),
                (ask("/").method("PUT"), false),
            ],
        ),
        may(
            header(":method", regex("GET|HEAD")),
            vec![
                (ask("/"), true),
                (ask("/").method("DELETE"), false),
                (ask("/").method("OPTIONS"), false),
            ],
        ),
        may(
            path(json!({ "exact": "/admin" })),
            vec![
                (ask("/admin"), true),
                (ask("/admin?x=1"), true),
                (ask("/admin/"), false),
                (ask("/Admin"), false),
                (ask("/a/../admin"), true),
                (ask("/%61dmin"), true),
                (ask("//admin"), true),
                (ask("/admin%2f"), false),
            ],
        ),
        may(
            path(json!({ "prefix": "/admin" })),
            vec![
                (ask("/admin/x"), true),
                (ask("/administrator"), true),
                (ask("/x/admin"), false),
                (ask("/x/%2e%2e/admin"), true),
                (ask("/./admin"), true),
                (ask("/ADMIN"), false),
                (ask("/admin;a=b"), true),
            ],
        ),
        may(
            path(json!({ "suffix": ".txt" })),
            vec![
                (ask("/a.txt"), true),
                (ask("/a.txt?b"), true),
                (ask("/a?b.txt"), false),
            ],
        ),
        may(
            path(json!({ "contains": "/x/" })),
            vec![(ask("/a/x/b"), true), (ask("/a/xb"), false)],
        ),
        may(
            path(regex("/v[0-9]+/items")),
            vec![
                (ask("/v1/items"), true),
                (ask("/v12/items?a"), true),
                (ask("/v1/items/1"), false),
                (ask("/vx/items"), false),
            ],
        ),
        may(
            path(json!({ "exact": "/Mixed", "ignore_case": true })),
            vec![(ask("/mIXED"), true), (ask("/mixedx"), false)],
        ),
        may(
            template("/shop/*/items"),
            vec![
                (ask("/shop/1/items"), true),
                (ask("/shop/1/2/items"), false),
                (ask("/shop//items"), false),
            ],
        ),
        may(
            template("/shop/**"),
            vec![
                (ask("/shop/1/items"), true),
                (ask("/shop/1"), true),
                (ask("/shopping"), false),
            ],
        ),
        may(
            header(":authority", json!({ "exact": "shop.example" })),
            vec![
                (ask("/"), true),
                (ask("/").host("shop.example:8080"), false),
                (ask("/").host("other.example"), false),
            ],
        ),
        may(
            header(
                ":authority",
                json!({ "suffix": ".example", "ignore_case": true }),
            ),
            vec![
                (ask("/").host("A.EXAMPLE"), true),
                (ask("/").host("example"), false),
            ],
        ),
        may(
            json!({ "destination_port": port }),
            vec![(ask("/"), true), (ask("/").by(Who::Nobody), false)],
        ),
        may(
            json!({ "destination_port_range": { "start": port, "end": u32::from(port) + 1 } }),
            vec![(ask("/"), true), (ask("/").by(Who::A), false)],
        ),
        may(
            json!({ "destination_ip": range("127.0.0.1", 32) }),
            vec![(ask("/"), true)],
        ),
        may(
            json!({ "destination_ip": range("10.0.0.0", 8) }),
            vec![(ask("/"), false)],
        ),
        may(
            json!({ "requested_server_name": { "exact": "shop.example" } }),
            vec![
                (ask("/").server_name("shop.example"), true),
                (ask("/").server_name("other.example"), false),
                (ask("/"), false),
            ],
        ),
        may(
            json!({ "requested_server_name": { "suffix": ".example" } }),
            vec![
                (ask("/").server_name("a.example"), true),
                (ask("/").server_name("a.test"), false),
            ],
        ),
        may(
            json!({ "and_rules": { "rules": [header(":method", json!({ "exact": "GET" })), path(json!({ "prefix": "/a" }))] } }),
            vec![
                (ask("/a"), true),
                (ask("/b"), false),
                (ask("/a").method("POST"), false),
            ],
        ),
        may(
            json!({ "or_rules": { "rules": [header(":method", json!({ "exact": "POST" })), path(json!({ "prefix": "/a" }))] } }),
            vec![
                (ask("/a"), true),
                (ask("/b"), false),
                (ask("/b").method("POST"), true),
            ],
        ),
        who(
            json!({ "header": { "name": "x-user", "string_match": { "exact": "bob" } } }),
            vec![
                (ask("/").header("X-User: bob"), true),
                (ask("/").header("x-user: Bob"), false),
                (ask("/"), false),
                // A second field hides nothing.
                (ask("/").header("x-user: bob").header("x-user: eve"), true),
                (ask("/").header("x-user: eve").header("x-user: bob"), true),
                (ask("/").header("x-user: eve, bob"), false),
            ],
        ),
        who(
            json!({ "header": { "name": "x-user", "string_match": { "exact": "eve" }, "invert_match": true } }),
            vec![
                (ask("/").header("x-user: bob"), true),
                (ask("/").header("x-user: eve"), false),
                (ask("/").header("x-user: bob").header("x-user: eve"), false),
            ],
        ),
        who(
            json!({ "header": { "name": "x-user", "present_match": true } }),
            vec![
                (ask("/").header("x-user:"), true),
                (ask("/").header("x-users: a"), false),
            ],
        ),
        who(
            json!({ "header": { "name": "x-user", "string_match": { "prefix": "b" } } }),
            vec![
                (ask("/").header("x-user: bob"), true),
                (ask("/").header("x-user: abb"), false),
            ],
        ),
        who(
            name(json!({ "exact": "spiffe://cluster.local/ns/a/sa/client" })),
            vec![
                (ask("/").by(Who::A), true),
                (ask("/").by(Who::B), false),
                (ask("/").by(Who::Nobody), false),
                (ask("/"), false),
                // What a header says of a certificate is no certificate.
                (
                    ask("/").header(
                        "x-forwarded-client-cert: By=x;URI=spiffe://cluster.local/ns/a/sa/client",
                    ),
                    false,
                ),
                (
                    ask("/").by(Who::Nobody).header(
                        "X-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/a/sa/client",
                    ),
                    false,
                ),
            ],
        ),
        who(
            name(regex(".*/ns/b\\.c/.*")),
            vec![
                (ask("/").by(Who::B), true),
                (ask("/").by(Who::A), false),
                (ask("/"), false),
            ],
        ),
        who(
            name(json!({ "prefix": "spiffe://cluster.local/" })),
            vec![(ask("/").by(Who::A), true), (ask("/").by(Who::B), false)],
        ),
        who(
            name(json!({ "suffix": "/sa/web" })),
            vec![(ask("/").by(Who::B), true), (ask("/").by(Who::A), false)],
        ),
        who(
            json!({ "authenticated": {} }),
            vec![(ask("/").by(Who::A), true), (ask("/"), false)],
        ),
        who(
            json!({ "direct_remote_ip": range("127.0.0.2", 32) }),
            vec![
                (ask("/").from(2), true),
                (ask("/").from(3), false),
                (ask("/").from(3).header("x-forwarded-for: 127.0.0.2"), false),
            ],
        ),
        who(
            json!({ "direct_remote_ip": range("127.0.0.0", 30) }),
            vec![(ask("/").from(3), true), (ask("/").from(4), false)],
        ),
        who(
            json!({ "remote_ip": range("203.0.113.0", 24) }),
            vec![
                (ask("/"), false),
                (ask("/").header("x-forwarded-for: 203.0.113.9"), true),
                // One hop is trusted: what stands further left is the client's own word.
                (
                    ask("/").header("x-forwarded-for: 203.0.113.9, 198.51.100.1"),
                    false,
                ),
                (
                    ask("/").header("x-forwarded-for: 198.51.100.1, 203.0.113.9"),
                    true,
                ),
            ],
        ),
        who(
            claim(&["sub"], is("bob")),
            vec![
                (ask("/").claims(json!({ "sub": "bob" })), true),
                (ask("/").claims(json!({ "sub": "eve" })), false),
                (ask("/"), false),
            ],
        ),
        who(
            claim(&["a", "b"], is("c")),
            vec![
                (ask("/").claims(json!({ "a": { "b": "c" } })), true),
                (ask("/").claims(json!({ "a": { "b": "d" } })), false),
                (ask("/").claims(json!({ "a.b": "c" })), false),
                (ask("/").claims(json!({ "a": "c" })), false),
            ],
        ),
        who(
            claim(&["groups"], one_of("admins")),
            vec![
                (
                    ask("/").claims(json!({ "groups": ["users", "admins"] })),
                    true,
                ),
                (ask("/").claims(json!({ "groups": [] })), false),
                (ask("/").claims(json!({ "groups": "admins" })), false),
            ],
        ),
        who(
            claim(&["scope"], one_of("write")),
            vec![
                (ask("/").claims(json!({ "scope": "read write" })), true),
                (ask("/").claims(json!({ "scope": "writes" })), false),
            ],
        ),
        who(
            json!({ "and_ids": { "ids": [name(json!({ "suffix": "/sa/client" })), json!({ "direct_remote_ip": range("127.0.0.1", 32) })] } }),
            vec![
                (ask("/").by(Who::A), true),
                (ask("/").by(Who::A).from(2), false),
                (ask("/").by(Who::B), false),
            ],
        ),
        who(
            json!({ "or_ids": { "ids": [name(json!({ "suffix": "/sa/client" })), json!({ "direct_remote_ip": range("127.0.0.2", 32) })] } }),
            vec![
                (ask("/").by(Who::A), true),
                (ask("/").from(2), true),
                (ask("/"), false),
            ],
        ),
        // What istiod makes of a whole rule: from, to and when.
        Condition {
            permission: Some(json!({ "and_rules": { "rules": [
                { "or_rules": { "rules": [header(":method", json!({ "exact": "GET" }))] } },
                { "or_rules": { "rules": [path(json!({ "prefix": "/api" })), path(json!({ "exact": "/" }))] } },
            ] } })),
            principal: Some(json!({ "and_ids": { "ids": [
                { "or_ids": { "ids": [name(json!({ "exact": "spiffe://cluster.local/ns/a/sa/client" })), name(regex(".*/ns/b\\.c/.*"))] } },
                { "or_ids": { "ids": [claim(&["sub"], is("bob"))] } },
            ] } })),
            asks: vec![
                (
                    ask("/api/1").by(Who::A).claims(json!({ "sub": "bob" })),
                    true,
                ),
                (ask("/").by(Who::B).claims(json!({ "sub": "bob" })), true),
                (
                    ask("/api/1").by(Who::A).claims(json!({ "sub": "eve" })),
                    false,
                ),
                (ask("/api/1").by(Who::A), false),
                (ask("/api/1").claims(json!({ "sub": "bob" })), false),
                (ask("/ap").by(Who::A).claims(json!({ "sub": "bob" })), false),
                (
                    ask("/api")
                        .method("POST")
                        .by(Who::A)
                        .claims(json!({ "sub": "bob" })),
                    false,
                ),
            ],
        },
    ]
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

/// Spellings that Envoy lets by or mends where we refuse: above the root, no escapes, encoded dots before a semicolon.
const STRICTER: &[&str] = &[
    "/..",
    "/../admin",
    "/%zz/admin",
    "/..;/admin",
    "/x/%2e%2e;/admin",
];

/// Ways to spell a path that a policy is about (`/admin` and below is denied), with the answer to each.
const SPELLINGS: &[(&str, u16)] = &[
    ("/admin", 403),
    ("/admin/", 403),
    ("/admin?x", 403),
    ("//admin", 403),
    ("///admin//x", 403),
    ("/./admin", 403),
    ("/x/../admin", 403),
    ("/x/%2e%2e/admin", 403),
    ("/x/%2E%2e/admin", 403),
    ("/x/.%2e/admin", 403),
    ("/%61dmin", 403),
    ("/%61%64%6d%69%6e", 403),
    ("/admin;a=b", 403),
    ("/admin%20", 403),
    ("/admin%2fx", 403),
    ("/admin%5cx", 403),
    ("/admin\\x", 403),
    ("/x\\..\\admin", 403),
    ("/\\admin", 403),
    ("/admin%00", 400),
    ("/x/%00/../admin", 400),
    ("/..", 400),
    ("/../admin", 400),
    ("/%zz/admin", 400),
    ("/..;/admin", 400),
    ("/x/..;/admin", 403),
    ("/x/..;a=b/admin", 403),
    ("/x/%2e%2e;/admin", 403),
    // These are other paths, and reach the origin as such.
    ("/ADMIN", 200),
    ("/adm%2569n", 200),
    ("/%252e%252e/admin", 200),
    ("/x%2f..%2fadmin", 200),
    ("/x;/../y", 200),
    ("/x;/y..;z/admin", 200),
];

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
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind(SocketAddr::from(([127, 0, 0, ask.from], 0)))
        .expect("an address of this machine");
    let port = if ask.who == Who::Plain { plain } else { tls };
    let mut stream = socket
        .connect(SocketAddr::from(([127, 0, 0, 1], port)))
        .await
        .expect("it listens");
    let leaf = match ask.who {
        Who::Plain => {
            let answer = talk(&mut stream, &head).await;
            return read(&answer);
        }
        Who::Nobody => None,
        Who::A => Some(&clients.a),
        Who::B => Some(&clients.b),
    };
    let config = std::sync::Arc::new(client(&clients.ca, leaf, &["http/1.1"]));
    let name = ask.server_name.try_into().expect("a name");
    let stream = tokio_rustls::TlsConnector::from(config)
        .connect(name, stream)
        .await;
    read(&talk(&mut stream.expect("a handshake"), &head).await)
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
        let ca = Authority::new("root");
        let server = ca.issue(&["spiffe://cluster.local/ns/b/sa/server", "shop.example", "other.example", "a.example", "a.test"]);
        let clients = Clients {
            a: ca.issue(&["spiffe://cluster.local/ns/a/sa/client"]),
            b: ca.issue(&["spiffe://other.local/ns/b.c/sa/web"]),
            issuer: Issuer::new("ES256"),
            ca,
        };
        let keys = clients.issuer.jwks("k");
        let (app, authz) = (origin().await, authz().await);
        let context = downstream(
            &format!("{}, validation_context: {{trusted_ca: {}}}", certificate(&server), inline(&clients.ca.pem())),
            ", require_client_certificate: false",
        );
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
