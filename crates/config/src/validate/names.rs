//! Names, labels, addresses and expressions.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use regex::Regex;

/// One label of a DNS name (RFC 1123).
pub(super) fn label(text: &str) -> Result<(), String> {
    let inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if text.len() <= 63
        && text.chars().all(inner)
        && ends(text.chars().next())
        && ends(text.chars().next_back())
    {
        Ok(())
    } else {
        Err(format!(
            "{text:?} is no DNS label: up to 63 letters, digits and \"-\", not at either end"
        ))
    }
}

/// A DNS name without wildcards.
pub(super) fn fqdn(name: &str) -> Result<(), String> {
    preconditions(name)?;
    labels(name)
}

/// A DNS name whose first label may be `*` or end or begin with it.
pub(super) fn wildcard_domain(name: &str) -> Result<(), String> {
    preconditions(name)?;
    let (first, rest) = name
        .split_once('.')
        .map_or((name, None), |(f, r)| (f, Some(r)));
    let bare = first
        .strip_prefix('*')
        .map(|r| r.strip_prefix('-').unwrap_or(r))
        .unwrap_or(first);
    if first != "*" {
        label(bare).map_err(|e| format!("{name:?} is no host: {e}"))?;
    }
    rest.map_or(Ok(()), |rest| {
        labels(rest).map_err(|e| format!("{name:?} is no host: {e}"))
    })
}

/// A host of a Gateway server or a Sidecar's egress: `NAMESPACE/HOST`; a Gateway may leave the namespace out.
pub(super) fn namespace_slash_host(text: &str, gateway: bool) -> Result<(), String> {
    let Some((namespace, host)) = text.split_once('/') else {
        return if gateway {
            qualified_host(text, true)
        } else {
            Err(format!(
                "{text:?} must be NAMESPACE/HOST, as in ./*.example.com or */*"
            ))
        };
    };
    if namespace.is_empty() || host.is_empty() {
        return Err(format!(
            "{text:?}: neither the namespace nor the host may be empty"
        ));
    }
    let bare = if gateway {
        namespace
    } else {
        namespace.trim_start_matches('~')
    };
    let any = matches!(bare, "*" | ".") || bare.is_empty() && !gateway;
    if !any {
        label(bare).map_err(|e| format!("{text:?}: {e}; or give \".\" or \"*\" as namespace"))?;
    }
    qualified_host(host, gateway)
}

fn qualified_host(host: &str, gateway: bool) -> Result<(), String> {
    if host != "*" && !host.contains('.') {
        return Err(format!(
            "{host:?} is a short name; give the whole one, as in {host}.default.svc.cluster.local"
        ));
    }
    match wildcard_domain(host) {
        Err(_) if gateway && host.parse::<IpAddr>().is_ok() => Ok(()),
        other => other,
    }
}

/// The name of a gateway in a VirtualService: `NAME` or `NAMESPACE/NAME`.
pub(super) fn gateway(name: &str) -> Result<(), String> {
    match name.split_once('/') {
        None => fqdn(name),
        Some((namespace, gateway)) => label(namespace).and_then(|()| label(gateway)),
    }
}

/// Kubernetes' labels.
pub(super) fn label_map(labels: &BTreeMap<String, String>) -> Result<(), String> {
    for (key, value) in labels {
        let name = match key.rsplit_once('/') {
            Some((prefix, name)) => {
                fqdn(prefix).map_err(|e| format!("label {key:?}: {e}"))?;
                name
            }
            None => key,
        };
        if name.is_empty() || !qualified(name) {
            return Err(format!(
                "{key:?} is no label name: up to 63 letters, digits, \"-\", \"_\" and \".\""
            ));
        }
        if !value.is_empty() && !qualified(value) {
            return Err(format!(
                "{value:?} is no label value: up to 63 letters, digits, \"-\", \"_\" and \".\""
            ));
        }
    }
    Ok(())
}

fn qualified(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text.chars().all(inner)
        && ends(text.chars().next())
        && ends(text.chars().next_back())
}

pub(super) fn ip(text: &str) -> Result<(), String> {
    text.parse::<IpAddr>()
        .map(|_| ())
        .map_err(|_| format!("{text:?} is no IP address"))
}

/// An address or a range of them.
pub(super) fn subnet(text: &str) -> Result<(), String> {
    if text.contains('/') {
        text.parse::<IpNet>()
            .map(|_| ())
            .map_err(|_| format!("{text:?} is no CIDR range, as in 10.0.0.0/8"))
    } else {
        ip(text)
    }
}

/// A unix socket's path, without `unix://`.
pub(super) fn unix_path(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("the path of the unix socket is empty".into());
    }
    // A name that begins with @ is in Linux' abstract name space.
    if path.starts_with('/') || path.starts_with('@') {
        Ok(())
    } else {
        Err(format!(
            "{path:?}: the path of a unix socket must be absolute"
        ))
    }
}

pub(super) fn regex(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("the expression is empty".into());
    }
    if text.len() > 1024 {
        return Err("the expression is longer than 1024 characters".into());
    }
    Regex::new(text).map(|_| ()).map_err(|e| {
        let e = e.to_string();
        let reason = e
            .lines()
            .last()
            .unwrap_or_default()
            .trim_start_matches("error: ")
            .to_owned();
        format!("not a regular expression (RE2's syntax): {reason}")
    })
}

/// A header's name (HTTP's token characters).
pub(super) fn header(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("a header needs a name".into());
    }
    if name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c))
    {
        Ok(())
    } else {
        Err(format!("{name:?} is no header name"))
    }
}

/// Names of protocols, whatever their case. `None` where it is none.
pub(super) fn protocol(text: &str) -> Option<Protocol> {
    Some(match text.to_ascii_lowercase().as_str() {
        "grpc" | "grpc-web" | "http" | "http2" | "http_proxy" => Protocol::Http,
        "https" | "tls" => Protocol::Tls,
        "tcp" | "mongo" | "redis" | "mysql" => Protocol::Tcp,
        "hbone" => Protocol::Tls,
        "udp" => Protocol::Udp,
        _ => return None,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Http,
    Tls,
    Tcp,
    Udp,
}

/// Whether wildcard host `a` stands for `b` (equal ones included).
pub(super) fn covers(a: &str, b: &str) -> bool {
    match a.strip_prefix('*') {
        Some(suffix) => {
            b.strip_prefix('*').unwrap_or(b).ends_with(suffix) && b.len() >= suffix.len()
        }
        None => a.eq_ignore_ascii_case(b),
    }
}

fn preconditions(name: &str) -> Result<(), String> {
    match name.len() {
        0 => Err("the host is empty".into()),
        1..=255 => Ok(()),
        _ => Err("the host is longer than 255 characters".into()),
    }
}

fn labels(name: &str) -> Result<(), String> {
    // One dot at the end makes a name absolute.
    name.strip_suffix('.')
        .unwrap_or(name)
        .split('.')
        .try_for_each(label)
}
