//! The head of the request that asks for a tunnel.

use outrigger_http::{Method, RequestHead, Version};

use super::{Told, TunnelError};
use crate::{access_log::format::header_value, http::Exchange, plan::network::Tunneling, router};

/// The request for a tunnel. `secure`: the proxy is reached by TLS.
pub(super) fn head(
    plan: &Tunneling,
    told: &Told,
    exchange: &Exchange<'_>,
    secure: bool,
) -> Result<RequestHead, TunnelError> {
    let mut hostname = Vec::new();
    header_value(&plan.hostname, exchange, None, &mut hostname);
    let hostname = String::from_utf8_lossy(&hostname);
    if hostname.is_empty() || !hostname.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(TunnelError::Hostname(hostname.into_owned()));
    }
    let (method, path) = match &plan.post_path {
        Some(path) => (Method::Post, &**path),
        None => (Method::Connect, ""),
    };
    let mut head = RequestHead::new(Version::Http11, method, &hostname, path);
    // Data begins once the proxy agrees, and what it says of a length means nothing.
    head.upgrade = head.method == Method::Connect;
    head.set_scheme(if secure { "https" } else { "http" });
    if let (Some(plan), Some(id)) = (&plan.request_id, told.request_id()) {
        head.headers.set(&plan.header, id);
    }
    let added = router::headers::values(&plan.headers, exchange, None, &head.headers);
    let illegal = |byte: &u8| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f;
    if let Some((add, _)) = added.iter().find(|(_, value)| value.iter().any(illegal)) {
        return Err(TunnelError::Header(add.name.to_string()));
    }
    router::headers::put(added, &mut head.headers, router::headers::Side::Request);
    Ok(head)
}
