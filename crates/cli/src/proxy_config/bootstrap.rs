//! The bootstrap of a proxy, and the versions that it tells.

use anyhow::Context;
use serde_json::Value;

use super::dump::{Dump, text};

/// The bootstrap message in a dump's form.
pub(crate) fn resource(dump: &Dump) -> anyhow::Result<Value> {
    let bootstrap = dump.bootstrap().context("the dump has no bootstrap")?;
    Ok(serde_json::json!({"bootstrap": bootstrap}))
}

/// One line for each version that is known; Envoy's is always there.
pub(crate) fn versions(dump: &Dump) -> String {
    let bootstrap = dump.bootstrap().unwrap_or(Value::Null);
    let mut out = String::new();
    for (title, pointer) in [
        ("Istio Version:", "/node/metadata/ISTIO_VERSION"),
        ("Istio Proxy Version:", "/node/metadata/ISTIO_PROXY_SHA"),
    ] {
        let value = text(&bootstrap, pointer);
        if !value.is_empty() {
            out.push_str(&format!("{title} {value}\n"));
        }
    }
    let number = |part: &str| {
        let pointer = format!("/node/userAgentBuildVersion/version/{part}");
        bootstrap
            .pointer(&pointer)
            .and_then(Value::as_u64)
            .unwrap_or(0)
    };
    let version = [
        number("majorNumber"),
        number("minorNumber"),
        number("patch"),
    ];
    let version = version.map(|v| v.to_string()).join(".");
    out.push_str(&format!("Envoy Version: {version}\n"));
    out
}
