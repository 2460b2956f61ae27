//! Tokens and key sets: no bytes make their readers panic, and what was accepted keeps to what it says.
#![no_main]

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use libfuzzer_sys::fuzz_target;
use outrigger_tls::jwt::{KeySet, Token, keys::MAX_KEYS, token::plain};

fuzz_target!(|input: (&[u8], &[u8], &[u8], u64)| {
    let (header, claims, set, now) = input;
    // As they come, and as parts that are encoded rightly, which random bytes seldom are.
    let raw = String::from_utf8_lossy(header);
    let encoded = [header, claims, set].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part));
    let keys = KeySet::parse(set).ok();
    if let Some(keys) = &keys {
        assert!((1..=MAX_KEYS).contains(&keys.len()));
    }
    let encoded = encoded.join(".");
    for text in [&*raw, encoded.as_str()] {
        let Ok(token) = Token::parse(text) else {
            continue;
        };
        assert_eq!(token, Token::parse(text).expect("it was good before"));
        assert!(text.contains(token.payload()));
        let _ = (token.check_time(now, 60), token.lifetime(now));
        assert_eq!(
            token
                .claims
                .get("iss")
                .and_then(|v| v.as_str())
                .unwrap_or_default(),
            token.issuer()
        );
        for (name, value) in &token.claims {
            let _ = plain(value);
            assert!(token.claim(name).is_some());
        }
        if let Some(keys) = &keys {
            let _ = keys.verify(&token);
        }
    }
});
