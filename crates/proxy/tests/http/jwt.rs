//! `envoy.filters.http.jwt_authn` as clients and origins see it.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::jwt::{Issuer, encode};

use crate::support::{Act, Mesh, NOW, OK, Origin, TO_A, run};

const KIND: &str =
    "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";

fn filter(config: &Value) -> String {
    let mut config = config.clone();
    config["@type"] = KIND.into();
    format!("      - {{name: envoy.filters.http.jwt_authn, typed_config: {config}}}")
}

/// What istiod makes of the RequestAuthentications of so many issuers.
fn requirement(count: usize) -> Value {
    let name = |n: usize| json!({ "provider_name": format!("origins-{n}") });
    let or_none =
        |n| json!({ "requires_any": { "requirements": [name(n), { "allow_missing": {} }] } });
    match count {
        1 => or_none(0),
        _ => {
            let mut any: Vec<Value> = (0..count).map(name).collect();
            let all: Vec<Value> = (0..count).map(or_none).collect();
            any.push(json!({ "requires_all": { "requirements": all } }));
            json!({ "requires_any": { "requirements": any } })
        }
    }
}

fn istiod(providers: &[Value]) -> Value {
    let named: serde_json::Map<String, Value> = providers
        .iter()
        .enumerate()
        .map(|(n, p)| (format!("origins-{n}"), p.clone()))
        .collect();
    json!({
        "providers": named,
        "rules": [{ "match": { "prefix": "/" }, "requires": requirement(providers.len()) }],
        "bypass_cors_preflight": true,
    })
}

fn provider(issuer: &Issuer, name: &str) -> Value {
    json!({ "issuer": name, "local_jwks": { "inline_string": issuer.jwks("k") }, "payload_in_metadata": "payload" })
}

fn claims(issuer: &str) -> Value {
    json!({ "iss": issuer, "sub": "me", "exp": NOW + 600, "iat": NOW })
}

async fn ask(mesh: &Mesh, path: &str, headers: &str) -> String {
    mesh.ask(&format!(
        "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{headers}\r\n"
    ))
    .await
}

async fn bearer(mesh: &Mesh, token: &str) -> String {
    ask(mesh, "/", &format!("Authorization: Bearer {token}\r\n")).await
}

fn status(answer: &str) -> u16 {
    answer[9..12].parse().expect("a status")
}

#[test]
fn a_token_that_is_there_must_be_good_and_its_claims_go_where_they_are_wanted() {
    run(async {
        let issuer = Issuer::new("ES256");
        let mut provider = provider(&issuer, "i");
        provider["claim_to_headers"] = json!([
            { "header_name": "x-sub", "claim_name": "sub" },
            { "header_name": "x-level", "claim_name": "a.level" },
            { "header_name": "x-groups", "claim_name": "groups" },
        ]);
        provider["forward_payload_header"] = "x-payload".into();
        let origin = Origin::new(&[OK; 4]).await;
        let mesh = Mesh::new(
            TO_A,
            "",
            &filter(&istiod(&[provider])),
            &[("a", origin.port)],
        )
        .await;

        // Without a token what it would have brought is taken off.
        let answer = ask(
            &mesh,
            "/",
            "X-Sub: root\r\nX-Payload: forged\r\nx-sub: admin\r\n",
        )
        .await;
        assert_eq!(status(&answer), 200, "{answer}");
        assert!(
            !origin.seen()[0].to_lowercase().contains("x-sub"),
            "{:?}",
            origin.seen()
        );
        assert!(!origin.seen()[0].to_lowercase().contains("x-payload"));

        let mut claims = claims("i");
        claims["a"] = json!({ "level": 3 });
        claims["groups"] = json!(["x", "y~?"]);
        let token = issuer.sign("k", &claims);
        for _ in 0..2 {
            assert_eq!(status(&bearer(&mesh, &token).await), 200);
            let seen = origin.seen().pop().expect("it came");
            assert!(
                seen.contains("x-sub: me\r\n") && seen.contains("x-level: 3\r\n"),
                "{seen}"
            );
            // The usual alphabet of base64, not that of URLs, and its last group is full.
            assert!(seen.contains("x-groups: WyJ4IiwieX4/Il0=\r\n"), "{seen}");
            assert!(seen.contains(&format!("x-payload: {}\r\n", encode(claims.to_string()))));
            assert!(!seen.to_lowercase().contains("authorization"), "{seen}");
        }
        let answer = ask(&mesh, &format!("/p?a=1&access_token={token}&b"), "").await;
        assert_eq!(status(&answer), 200);
        assert!(
            origin.seen()[3].starts_with("GET /p?a=1&b HTTP/1.1\r\n"),
            "{:?}",
            origin.seen()
        );

        let store = &mesh.server.store;
        assert_eq!(store.number("http.test.jwt_authn.allowed"), 4);
        assert_eq!(store.number("http.test.jwt_authn.jwt_cache_hit"), 2);

        let bad = token[..token.len() - 8].to_owned() + "AAAAAAAA";
        let answer = bearer(&mesh, &bad).await;
        assert!(
            answer.starts_with("HTTP/1.1 401 Unauthorized\r\n"),
            "{answer}"
        );
        assert!(
            answer.ends_with("\r\n\r\nJwt verification fails"),
            "{answer}"
        );
        assert!(
            answer.contains(
                "www-authenticate: Bearer realm=\"http://h/\", error=\"invalid_token\"\r\n"
            )
        );
        assert!(
            mesh.log(5)
                .await
                .ends_with("GET / 401 - jwt_authn_access_denied{Jwt_verification_fails} 0\n")
        );
        assert_eq!(store.number("http.test.jwt_authn.denied"), 1);
        // A second token that is bad is not hidden by one that is good.
        let good = format!("Authorization: Bearer {token}\r\n");
        let two = ask(&mesh, &format!("/?access_token={bad}"), &good).await;
        assert_eq!(status(&two), 401);
        let two = format!("Authorization: Bearer {token}\r\nAuthorization: Bearer {bad}\r\n");
        assert_eq!(status(&ask(&mesh, "/", &two).await), 401);
    });
}

#[test]
fn time_audience_and_issuer_count_and_the_clock_may_step() {
    run(async {
        let issuer = Issuer::new("RS256");
        let mut provider = provider(&issuer, "i");
        provider["audiences"] = json!(["https://me/"]);
        let origin = Origin::new(&[OK; 8]).await;
        let mesh = Mesh::new(
            TO_A,
            "",
            &filter(&istiod(&[provider])),
            &[("a", origin.port)],
        )
        .await;
        let sign = |more: Value| {
            let mut claims = claims("i");
            claims["aud"] = json!(["other", "me"]);
            claims
                .as_object_mut()
                .expect("an object")
                .extend(more.as_object().expect("one").clone());
            issuer.sign("k", &claims)
        };
        for (claims, status_wanted, text) in [
            (json!({}), 200, "ok"),
            (json!({ "aud": "http://me" }), 200, "ok"),
            (
                json!({ "aud": "you" }),
                403,
                "Audiences in Jwt are not allowed",
            ),
            (
                json!({ "aud": [] }),
                403,
                "Audiences in Jwt are not allowed",
            ),
            (json!({ "exp": NOW - 61 }), 401, "Jwt is expired"),
            (json!({ "exp": NOW - 59 }), 200, "ok"),
            (json!({ "nbf": NOW + 61 }), 401, "Jwt not yet valid"),
            (json!({ "iss": "j" }), 401, "Jwt issuer is not configured"),
        ] {
            let answer = bearer(&mesh, &sign(claims.clone())).await;
            assert_eq!(status(&answer), status_wanted, "{claims} {answer}");
            assert!(answer.ends_with(text), "{claims} {answer}");
        }
        // What was good an hour ago, and known to be, is not any more; nor is it an hour before.
        let token = sign(json!({ "nbf": NOW - 60 }));
        assert_eq!(status(&bearer(&mesh, &token).await), 200);
        for (step, text) in [(3600_i64, "Jwt is expired"), (-3600, "Jwt not yet valid")] {
            let now = NOW.checked_add_signed(step).expect("no overflow");
            mesh.clock.set(UNIX_EPOCH + Duration::from_secs(now));
            let answer = bearer(&mesh, &token).await;
            assert!(status(&answer) == 401 && answer.ends_with(text), "{answer}");
        }
        mesh.clock.set(UNIX_EPOCH + Duration::from_secs(NOW));
        assert_eq!(status(&bearer(&mesh, &token).await), 200);
    });
}

#[test]
fn attacks_on_tokens_are_refused() {
    run(async {
        let (issuer, stranger) = (Issuer::new("RS256"), Issuer::new("RS256"));
        let origin = Origin::new(&[]).await;
        let options = "max_request_headers_kb: 8192";
        let filter = filter(&istiod(&[provider(&issuer, "i")]));
        let mesh = Mesh::new(TO_A, options, &filter, &[("a", origin.port)]).await;
        let body = claims("i").to_string();
        let head = |text: &str| issuer.sign_as(text, &body);
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        for (token, text) in [
            (
                format!("{}.{}.", encode(r#"{"alg":"none"}"#), encode(&body)),
                "3 sections",
            ),
            (
                head(r#"{"alg":"none","kid":"k"}"#),
                "[alg] is not supported",
            ),
            (
                head(r#"{"alg":"HS256","kid":"k"}"#),
                "[alg] is not supported",
            ),
            (
                head(r#"{"alg":"RS256","alg":"none","kid":"k"}"#),
                "invalid JSON",
            ),
            (
                head(r#"{"alg":"RS256","kid":"../../../etc/passwd"}"#),
                "match kid or alg from Jwt",
            ),
            (
                head(r#"{"alg":"RS256","kid":{"a":1}}"#),
                "[kid] field is not a string",
            ),
            (
                head(r#"{"alg":"ES256","kid":"k"}"#),
                "match kid or alg from Jwt",
            ),
            (
                head(r#"{"alg":"RS256","kid":"k","crit":["exp"]}"#),
                "[crit] is not supported",
            ),
            (
                stranger.sign_as(
                    &format!(r#"{{"alg":"RS256","kid":"k","jwk":{}}}"#, stranger.jwk("k")),
                    &body,
                ),
                "Jwt verification fails",
            ),
            (
                issuer.sign_as(r#"{"alg":"RS256","kid":"k"}"#, r#"{"iss":"i","iss":"j"}"#),
                "payload is an invalid JSON",
            ),
            (
                issuer.sign_as(r#"{"alg":"RS256","kid":"k"}"#, &deep),
                "payload is an invalid JSON",
            ),
            ("x".repeat(1 << 20), "Jwt is too large"),
            (
                format!(
                    "{}.{}.AA",
                    encode(r#"{"alg":"RS256"}"#),
                    "e30".repeat(400_000)
                ),
                "Jwt is too large",
            ),
            ("..".to_owned(), "3 sections"),
        ] {
            let answer = bearer(&mesh, &token).await;
            let shown = &token[..token.len().min(60)];
            assert!(
                status(&answer) == 401 && answer.ends_with(text),
                "{shown}: {answer}"
            );
        }
        assert!(origin.seen().is_empty());
    });
}

#[test]
fn keys_that_are_none_let_nobody_in() {
    run(async {
        let issuer = Issuer::new("ES256");
        let many: Vec<Value> = (0..10_000).map(|_| json!({ "kty": "RSA" })).collect();
        let many = json!({ "keys": many }).to_string();
        for keys in ["", "<html>", "{}", r#"{"keys":[]}"#, many.as_str()] {
            let mut provider = provider(&issuer, "i");
            provider["local_jwks"]["inline_string"] = keys.into();
            let origin = Origin::new(&[OK]).await;
            let filter = filter(&istiod(&[provider]));
            let mesh = Mesh::new(TO_A, "", &filter, &[("a", origin.port)]).await;
            let answer = bearer(&mesh, &issuer.sign("k", &claims("i"))).await;
            assert_eq!(status(&answer), 401, "{answer}");
            assert!(
                answer.ends_with("Jwks doesn't have any valid public key"),
                "{answer}"
            );
            assert_eq!(
                status(&mesh.get("/").await),
                200,
                "a request without a token"
            );
        }
    });
}

#[test]
fn tokens_of_several_issuers_at_several_places() {
    run(async {
        let [one, two] = [Issuer::new("ES256"), Issuer::new("EdDSA")];
        let first = provider(&one, "one");
        let mut second = provider(&two, "two");
        second["from_headers"] = json!([{ "name": "X-Token", "value_prefix": "T " }]);
        second["from_params"] = json!(["t"]);
        second["from_cookies"] = json!(["c"]);
        second["forward"] = true.into();
        let origin = Origin::new(&[OK; 8]).await;
        let filter = filter(&istiod(&[first, second]));
        let mesh = Mesh::new(TO_A, "", &filter, &[("a", origin.port)]).await;
        let (a, b) = (one.sign("", &claims("one")), two.sign("", &claims("two")));
        for (path, headers, wanted) in [
            ("/".to_owned(), String::new(), 200),
            (
                "/".to_owned(),
                format!("Authorization: Bearer {a}\r\n"),
                200,
            ),
            ("/".to_owned(), format!("X-Token: T {b}\r\n"), 200),
            (format!("/?t={b}"), String::new(), 200),
            ("/".to_owned(), format!("Cookie: x=1; c={b}\r\n"), 200),
            (
                "/".to_owned(),
                format!("Authorization: Bearer {a}\r\nX-Token: T {b}\r\n"),
                200,
            ),
            // At the other's place.
            (
                "/".to_owned(),
                format!("Authorization: Bearer {b}\r\n"),
                401,
            ),
            ("/".to_owned(), format!("X-Token: T {a}\r\n"), 401),
        ] {
            let answer = ask(&mesh, &path, &headers).await;
            assert_eq!(status(&answer), wanted, "{path} {headers} {answer}");
        }
        assert!(origin.seen()[2].contains("X-Token: T "), "it is forwarded");
        // Preflights carry no token, whatever they say.
        let preflight = "OPTIONS / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nOrigin: http://o\r\n\
            Access-Control-Request-Method: GET\r\nX-Token: T x\r\n\r\n";
        assert_eq!(status(&mesh.ask(preflight).await), 200);
        let store = &mesh.server.store;
        assert_eq!(
            store.number("http.test.jwt_authn.cors_preflight_bypassed"),
            1
        );
    });
}

#[test]
fn policies_read_claims_and_the_route_may_follow_them() {
    run(async {
        let issuer = Issuer::new("ES256");
        let mut provider = provider(&issuer, "i");
        provider["clear_route_cache"] = true.into();
        provider["normalize_payload_in_metadata"] = json!({ "space_delimited_claims": ["scope"] });
        let claim = |path: &[&str], value: Value| {
            let path: Vec<Value> = std::iter::once(&"payload")
                .chain(path)
                .map(|k| json!({ "key": k }))
                .collect();
            json!({ "metadata": { "filter": "envoy.filters.http.jwt_authn", "path": path, "value": value } })
        };
        let one_of = |text: &str| json!({ "list_match": { "one_of": { "string_match": { "exact": text } } } });
        let is = |text: &str| json!({ "string_match": { "exact": text } });
        let rules = json!({ "action": "ALLOW", "policies": {
            "nested": { "permissions": [{ "any": true }], "principals": [claim(&["a", "b"], is("c"))] },
            "list": { "permissions": [{ "any": true }], "principals": [claim(&["groups"], one_of("admins"))] },
            "scope": { "permissions": [{ "any": true }], "principals": [claim(&["scope"], one_of("write"))] },
        } });
        let filters = format!(
            "{}\n      - {{name: rbac, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {rules}}}}}",
            filter(&istiod(&[provider]))
        );
        let routes = "          - {match: {prefix: /, dynamic_metadata: [{filter: envoy.filters.http.jwt_authn, path: [{key: payload}, {key: sub}], value: {string_match: {exact: other}}}]}, route: {cluster: b}}
          - {match: {prefix: /}, route: {cluster: a}}";
        let (a, b) = (Origin::new(&[OK; 3]).await, Origin::new(&[OK]).await);
        let mesh = Mesh::new(routes, "", &filters, &[("a", a.port), ("b", b.port)]).await;
        for (more, wanted) in [
            (json!({}), 403),
            (json!({ "a": { "b": "c" } }), 200),
            (json!({ "a": { "b": ["c"] } }), 403),
            (json!({ "a.b": "c" }), 403),
            (json!({ "groups": ["users", "admins"] }), 200),
            (json!({ "groups": "admins" }), 403),
            (json!({ "scope": "read write" }), 200),
            (json!({ "scope": "readwrite" }), 403),
            (json!({ "groups": ["admins"], "sub": "other" }), 200),
        ] {
            let mut claims = claims("i");
            claims
                .as_object_mut()
                .expect("an object")
                .extend(more.as_object().expect("one").clone());
            let answer = bearer(&mesh, &issuer.sign("k", &claims)).await;
            assert_eq!(status(&answer), wanted, "{more} {answer}");
        }
        assert_eq!((a.seen().len(), b.seen().len()), (3, 1));
    });
}

fn served(keys: &str) -> &'static str {
    Box::leak(
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{keys}",
            keys.len()
        )
        .into_boxed_str(),
    )
}

fn remote(more: Value) -> Value {
    let mut remote = json!({ "http_uri": { "uri": "https://issuer:8443/keys?a", "cluster": "issuer", "timeout": "2s" } });
    remote
        .as_object_mut()
        .expect("an object")
        .extend(more.as_object().expect("one").clone());
    json!({ "issuer": "i", "remote_jwks": remote })
}

#[test]
fn keys_are_fetched_once_and_again_when_they_are_old() {
    run(async {
        let [old, new] = [Issuer::new("ES256"), Issuer::new("ES256")];
        let later = Act::SayLater(served(&old.jwks("k")), Duration::from_millis(50));
        let issuer = Origin::new(&[later, Act::Say(served(&new.jwks("k")))]).await;
        let origin = Origin::new(&[OK; 8]).await;
        let filter = filter(&istiod(&[remote(json!({ "cache_duration": "4s" }))]));
        let clusters = [("a", origin.port), ("issuer", issuer.port)];
        let mesh = Mesh::new(TO_A, "", &filter, &clusters).await;
        let token = old.sign("k", &claims("i"));
        // Rubbish makes nobody ask, nor do tokens that are over.
        let mut over = claims("i");
        over["exp"] = 1.into();
        assert_eq!(status(&bearer(&mesh, "a.b.c").await), 401);
        assert_eq!(status(&bearer(&mesh, &old.sign("k", &over)).await), 401);
        assert_eq!(status(&mesh.get("/").await), 200);
        assert!(issuer.seen().is_empty());
        let (a, b) = tokio::join!(bearer(&mesh, &token), bearer(&mesh, &token));
        assert_eq!((status(&a), status(&b)), (200, 200), "{a} {b}");
        assert_eq!(issuer.seen().len(), 1);
        assert!(
            issuer.seen()[0].starts_with("GET /keys?a HTTP/1.1\r\nhost: issuer:8443\r\n"),
            "{:?}",
            issuer.seen()
        );
        assert_eq!(
            mesh.server
                .store
                .number("http.test.jwt_authn.jwks_fetch_success"),
            1
        );
        // The issuer has changed its key: the token is remembered no longer than the key that it was signed with.
        tokio::time::sleep(Duration::from_millis(4100)).await;
        let answer = bearer(&mesh, &token).await;
        assert!(answer.ends_with("Jwt verification fails"), "{answer}");
        assert_eq!(
            status(&bearer(&mesh, &new.sign("k", &claims("i"))).await),
            200
        );
        assert_eq!(issuer.seen().len(), 2);
    });
}

#[test]
fn keys_that_cannot_be_fetched_let_nobody_in() {
    run(async {
        let key = Issuer::new("ES256");
        let huge: &'static str = Box::leak(
            format!(
                "HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n{}",
                " ".repeat(2_000_000)
            )
            .into_boxed_str(),
        );
        for act in [
            Act::Close,
            Act::Say("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"),
            Act::Say(
                "HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
            ),
            Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"),
            Act::SayAndClose(huge),
        ] {
            let issuer = Origin::new(&[act, Act::Say(served(&key.jwks("k")))]).await;
            let origin = Origin::new(&[OK; 4]).await;
            let filter = filter(&istiod(&[remote(json!({}))]));
            let clusters = [("a", origin.port), ("issuer", issuer.port)];
            let mesh = Mesh::new(TO_A, "", &filter, &clusters).await;
            let token = key.sign("k", &claims("i"));
            let answer = bearer(&mesh, &token).await;
            assert!(
                status(&answer) == 401 && answer.ends_with("Jwks remote fetch is failed"),
                "{answer}"
            );
            // The issuer is left alone for a moment, then asked again.
            assert_eq!(status(&bearer(&mesh, &token).await), 401);
            assert_eq!(issuer.seen().len(), 1);
            tokio::time::sleep(Duration::from_millis(1050)).await;
            assert_eq!(status(&bearer(&mesh, &token).await), 200);
            assert_eq!(
                mesh.server
                    .store
                    .number("http.test.jwt_authn.jwks_fetch_failed"),
                1
            );
        }
    });
}
