//! Finds the conformance data.
//!
//! Its users take this file in by its path: the crates at the bottom cannot depend on testkit, which depends on them.

use std::{env, path::PathBuf};

/// The part of the conformance data that has this path below `$OUTRIGGER_CONFORMANCE` (`../shared/conformance` beside the
/// repository where that is not set). `None`, and a line in the log, where it is missing; with `CI` set it must be there.
pub(crate) fn conformance(part: &str) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/conformance");
    let root = env::var_os("OUTRIGGER_CONFORMANCE").map_or_else(|| default.into(), PathBuf::from);
    let path = root.join(part);
    if path.exists() {
        return Some(path);
    }
    let missing = path.display();
    assert!(
        env::var_os("CI").is_none(),
        "no conformance data: {missing} is missing"
    );
    println!("skipped: no conformance data ({missing} is missing)");
    None
}
