//! Every condition that policies have, with requests that meet it and requests that do not.

use serde_json::{Value, json};

use super::{Ask, TYPES, Who, ask};

/// A condition, and requests with whether they meet it.
pub(super) struct Condition {
    pub(super) permission: Option<Value>,
    pub(super) principal: Option<Value>,
    pub(super) asks: Vec<(Ask, bool)>,
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

pub(super) fn header(name: &str, matcher: Value) -> Value {
    json!({ "header": { "name": name, "string_match": matcher } })
}

pub(super) fn path(matcher: Value) -> Value {
    json!({ "url_path": { "path": matcher } })
}

fn template(text: &str) -> Value {
    json!({ "uri_template": { "name": "t", "typed_config": {
        "@type": format!("{TYPES}.path.match.uri_template.v3.UriTemplateMatchConfig"), "path_template": text,
    } } })
}

pub(super) fn range(address: &str, length: u32) -> Value {
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

pub(super) fn name(matcher: Value) -> Value {
    json!({ "authenticated": { "principal_name": matcher } })
}

pub(super) fn conditions(port: u16) -> Vec<Condition> {
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
