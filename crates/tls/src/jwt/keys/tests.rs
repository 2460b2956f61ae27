use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use testkit::jwt::{Issuer, encode};

use super::*;

fn claims() -> Value {
    json!({ "iss": "i", "sub": "s", "aud": ["a", "b"], "exp": 2_000, "nbf": 1_000, "groups": ["x"], "n": { "m": [1, "y"] } })
}

fn judge(set: &str, token: &str) -> Result<(), Refusal> {
    KeySet::parse(set.as_bytes())
        .expect("a key set")
        .verify(&Token::parse(token)?)
}

#[test]
fn each_algorithm_is_verified_with_a_key_of_its_kind_alone() {
    let all = [
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
    ];
    let issuers: Vec<Issuer> = all.iter().map(|name| Issuer::new(name)).collect();
    for (name, issuer) in all.iter().zip(&issuers) {
        let token = issuer.sign("k", &claims());
        assert_eq!(judge(&issuer.jwks("k"), &token), Ok(()), "{name}");
        for (other, key) in all.iter().zip(&issuers) {
            let judged = judge(&key.jwks("k"), &token);
            assert_eq!(
                judged.is_ok(),
                name == other,
                "{name} token, {other} key: {judged:?}"
            );
        }
        // A changed byte anywhere in the claims.
        let forged = token.replacen(
            &encode(claims().to_string()),
            &encode(claims().to_string().replace("\"s\"", "\"t\"")),
            1,
        );
        assert_eq!(
            judge(&issuer.jwks("k"), &forged),
            Err(Refusal::Signature),
            "{name}"
        );
    }
}

#[test]
fn nobody_signs_with_nothing_or_with_what_is_public() {
    let issuer = Issuer::new("RS256");
    let set = issuer.jwks("k");
    for algorithm in [
        "none", "None", "NONE", "nOnE", "HS256", "HS384", "HS512", "", "RS1", "rs256", "ES256K",
    ] {
        let header = json!({ "alg": algorithm, "kid": "k" }).to_string();
        let token = issuer.sign_as(&header, &claims().to_string());
        assert_eq!(
            judge(&set, &token),
            Err(Refusal::UnsupportedAlgorithm),
            "{algorithm}"
        );
    }
    let unsigned = format!(
        "{}.{}.",
        encode(r#"{"alg":"none"}"#),
        encode(claims().to_string())
    );
    assert_eq!(judge(&set, &unsigned), Err(Refusal::Format));
    // HMAC with the public key as its secret: the key set may even offer it.
    let set =
        json!({ "keys": [{ "kty": "oct", "k": encode("secret"), "alg": "HS256", "kid": "k" }] });
    assert_eq!(
        KeySet::parse(set.to_string().as_bytes()).map(|set| set.len()),
        Err(KeySetError::NoKeys)
    );
    // The algorithm of another kind of key.
    let header = json!({ "alg": "ES256", "kid": "k" }).to_string();
    let token = issuer.sign_as(&header, &claims().to_string());
    assert_eq!(judge(&issuer.jwks("k"), &token), Err(Refusal::NoSuchKey));
    // The key is for one algorithm, and the token names another that it could serve.
    let mut key = issuer.jwk("k");
    key["alg"] = "RS256".into();
    let set = json!({ "keys": [key] }).to_string();
    let token = issuer.with("PS256").sign("k", &claims());
    assert_eq!(judge(&set, &token), Err(Refusal::NoSuchKey));
    // What is critical is not understood; a key in the token is not believed.
    let other = Issuer::new("ES256");
    for (header, refusal) in [
        (
            json!({ "alg": "ES256", "crit": ["b64"], "b64": false }),
            Refusal::Critical,
        ),
        (
            json!({ "alg": "ES256", "jwk": other.jwk(""), "jku": "http://evil/jwks" }),
            Refusal::Signature,
        ),
    ] {
        let token = other.sign_as(&header.to_string(), &claims().to_string());
        assert_eq!(judge(&Issuer::new("ES256").jwks(""), &token), Err(refusal));
    }
}

#[test]
fn the_key_that_a_token_names_is_the_one_that_counts() {
    let [one, two] = [Issuer::new("ES256"), Issuer::new("ES256")];
    let set = json!({ "keys": [one.jwk("1"), two.jwk("2")] }).to_string();
    assert_eq!(judge(&set, &one.sign("1", &claims())), Ok(()));
    assert_eq!(judge(&set, &two.sign("", &claims())), Ok(()));
    assert_eq!(
        judge(&set, &one.sign("2", &claims())),
        Err(Refusal::Signature)
    );
    for name in [
        "3",
        "../../1",
        "/dev/null",
        "1\0",
        "1' or '1'='1",
        " 1",
        "http://evil/1",
    ] {
        assert_eq!(
            judge(&set, &one.sign(name, &claims())),
            Err(Refusal::NoSuchKey),
            "{name:?}"
        );
    }
    for header in [
        r#"{"alg":"ES256","kid":1}"#,
        r#"{"alg":"ES256","kid":["1"]}"#,
        r#"{"alg":"ES256","kid":null}"#,
    ] {
        let token = one.sign_as(header, &claims().to_string());
        assert_eq!(judge(&set, &token), Err(Refusal::KeyId), "{header}");
    }
    // Keys without a name serve every token.
    let set = json!({ "keys": [one.jwk(""), two.jwk("2")] }).to_string();
    assert_eq!(judge(&set, &one.sign("whatever", &claims())), Ok(()));
}

#[test]
fn a_large_key_set_costs_no_more_than_its_limits() {
    let issuer = Issuer::new("ES256");
    let many = |count: usize, name: &dyn Fn(usize) -> String| {
        let keys: Vec<Value> = (0..count).map(|n| issuer.jwk(&name(n))).collect();
        json!({ "keys": keys }).to_string()
    };
    let set = many(10_000, &|n| n.to_string());
    assert!(matches!(
        KeySet::parse(set.as_bytes()),
        Err(KeySetError::TooLarge(_) | KeySetError::TooMany(10_000))
    ));
    let short = json!({ "keys": vec![json!({}); 10_000] }).to_string();
    assert_eq!(
        KeySet::parse(short.as_bytes()).err(),
        Some(KeySetError::TooMany(10_000))
    );
    let huge = format!("{{\"keys\": [], \"x\": \"{}\"}}", "x".repeat(100 << 20));
    assert!(matches!(
        KeySet::parse(huge.as_bytes()),
        Err(KeySetError::TooLarge(_))
    ));
    // A token that names no key is tried with a few of them, not with a thousand.
    let set = many(999, &|n| n.to_string());
    let mut list: Value = serde_json::from_str(&set).expect("JSON");
    let signer = Issuer::new("ES256");
    list["keys"]
        .as_array_mut()
        .expect("a list")
        .push(signer.jwk("last"));
    let set = KeySet::parse(list.to_string().as_bytes()).expect("1000 keys");
    assert_eq!(set.len(), 1000);
    let token = |id: &str| Token::parse(&signer.sign(id, &claims())).expect("well formed");
    assert_eq!(set.verify(&token("last")), Ok(()));
    assert_eq!(set.verify(&token("")), Err(Refusal::Signature));
}

#[test]
fn what_is_no_key_is_left_out_and_what_is_no_set_is_refused() {
    let issuer = Issuer::new("RS256");
    let mut for_encryption = issuer.jwk("e");
    for_encryption["use"] = "enc".into();
    let mut short = issuer.jwk("s");
    short["n"] = encode([0xc1; 128]).into();
    let mut off_curve = Issuer::new("ES256").jwk("o");
    off_curve["y"] = encode([7; 32]).into();
    let set = json!({ "keys": [1, {}, { "kty": "RSA" }, { "kty": "EC", "crv": "P-256" }, for_encryption, short, off_curve, issuer.jwk("k")] });
    let set = KeySet::parse(set.to_string().as_bytes()).expect("one is good");
    assert_eq!(set.len(), 1);
    for (text, wrong) in [
        ("{}", KeySetError::NoList),
        (r#"{"keys": {}}"#, KeySetError::NoList),
        (r#"{"keys": []}"#, KeySetError::NoKeys),
        (r#"{"keys": [{}]}"#, KeySetError::NoKeys),
    ] {
        assert_eq!(KeySet::parse(text.as_bytes()).err(), Some(wrong), "{text}");
    }
    for text in ["", "<html>", "[]", "null", r#"{"keys": [], "keys": []}"#] {
        assert!(
            matches!(KeySet::parse(text.as_bytes()), Err(KeySetError::Json(_))),
            "{text}"
        );
    }
}

#[test]
fn a_malformed_token_is_refused_with_what_is_wrong() {
    let issuer = Issuer::new("ES256");
    let head = encode(r#"{"alg":"ES256"}"#);
    let body = encode("{}");
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let mut cases = vec![
        (String::new(), Refusal::Format),
        ("a.b".to_owned(), Refusal::Format),
        ("a.b.c.d".to_owned(), Refusal::Format),
        ("..".to_owned(), Refusal::Format),
        (format!("{head}.{body}."), Refusal::Format),
        (format!("!.{body}.x"), Refusal::HeaderBase64),
        (format!("{head}=.{body}.AA"), Refusal::HeaderBase64),
        (format!("{}.{body}.AA", encode("[]")), Refusal::HeaderJson),
        (
            format!("{}.{body}.AA", encode(r#"{"alg":"ES256","alg":"none"}"#)),
            Refusal::HeaderJson,
        ),
        (
            format!("{}.{body}.AA", encode(r#"{"typ":"JWT"}"#)),
            Refusal::Algorithm,
        ),
        (
            format!("{}.{body}.AA", encode(r#"{"alg":["ES256"]}"#)),
            Refusal::Algorithm,
        ),
        (format!("{head}.%.AA"), Refusal::PayloadBase64),
        (
            format!("{head}.{}.AA", encode("null")),
            Refusal::PayloadJson,
        ),
        (
            format!("{head}.{}.AA", encode(r#"{"sub":"a","sub":"b"}"#)),
            Refusal::PayloadJson,
        ),
        (
            format!("{head}.{}.AA", encode(r#"{"a":{"b":1,"b":2}}"#)),
            Refusal::PayloadJson,
        ),
        (format!("{head}.{body}.A A"), Refusal::SignatureBase64),
        ("x".repeat(1 << 20), Refusal::TooLarge),
    ];
    let deep_token = format!("{head}.{}.AA", encode(&deep));
    assert_eq!(Token::parse(&deep_token), Err(Refusal::TooLarge));
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    cases.push((format!("{head}.{}.AA", encode(&deep)), Refusal::PayloadJson));
    for (claims, refusal) in [
        (r#"{"iss":1}"#, Refusal::Issuer),
        (r#"{"sub":{}}"#, Refusal::Subject),
        (r#"{"iat":"1"}"#, Refusal::IssuedAt),
        (r#"{"iat":-1}"#, Refusal::IssuedAtRange),
        (r#"{"nbf":true}"#, Refusal::NotBefore),
        (r#"{"exp":"never"}"#, Refusal::Expiry),
        (r#"{"exp":null}"#, Refusal::Expiry),
        (r#"{"exp":1e300}"#, Refusal::ExpiryRange),
        (r#"{"jti":1}"#, Refusal::Id),
        (r#"{"aud":[1]}"#, Refusal::Audience),
    ] {
        cases.push((issuer.sign_as(r#"{"alg":"ES256"}"#, claims), refusal));
    }
    for (text, refusal) in cases {
        let shown = &text[..text.len().min(80)];
        assert_eq!(Token::parse(&text), Err(refusal), "{shown}");
    }
}

#[test]
fn claims_and_times_are_told() {
    let token = Token::parse(&Issuer::new("EdDSA").sign("", &claims())).expect("well formed");
    assert_eq!((token.issuer(), token.subject()), ("i", "s"));
    assert_eq!(token.audiences().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(token.claim("n.m"), Some(&json!([1, "y"])));
    assert_eq!(token.check_time(939, 60), Err(Refusal::NotYetValid));
    assert_eq!(token.check_time(940, 60), Ok(()));
    assert_eq!(token.check_time(2_060, 60), Ok(()));
    assert_eq!(token.check_time(2_061, 60), Err(Refusal::Expired));
    let payload = BASE64_URL_SAFE_NO_PAD
        .decode(token.payload())
        .expect("base64");
    assert_eq!(
        serde_json::from_slice::<Value>(&payload).expect("JSON"),
        claims()
    );
}
