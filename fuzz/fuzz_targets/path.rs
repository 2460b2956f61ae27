//! Paths: the normal form is its own normal form, and has no way out of its root.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_http::path::{EscapedSlashes, Normalized, PathRules};

fuzz_target!(|path: &str| {
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) || path.contains(['?', '#']) {
        return;
    }
    let rules = PathRules {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::UnescapeAndForward,
    };
    if let Normalized::Path(once) = rules.apply(path)
        && once.starts_with('/')
    {
        assert!(!once.split('/').any(|segment| segment == ".."), "{once}");
        assert_eq!(rules.apply(&once), Normalized::Path(once.clone()));
    }
});
