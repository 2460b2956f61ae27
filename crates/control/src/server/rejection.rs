//! A NACK, and the objects of the user that it is about.

use std::{fmt, time::SystemTime};

use xds::server::Stream;

use super::connection::{is_named, is_whole};
use crate::{
    model::{Origin, Proxy, Resource},
    push::Scope,
};

/// A response that a proxy rejected.
#[derive(Debug, Clone)]
pub struct Rejection {
    /// The response's nonce.
    pub nonce: String,
    /// The proxy's reason.
    pub message: String,
    /// The resources that the reason names, and the objects that they were made from.
    pub resources: Vec<(String, Vec<Origin>)>,
    /// When it came.
    pub at: SystemTime,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for (name, from) in &self.resources {
            write!(f, "; {name} is made from ")?;
            match from.as_slice() {
                [] => f.write_str("defaults only")?,
                [first, rest @ ..] => {
                    write!(f, "{first}")?;
                    for origin in rest {
                        write!(f, ", {origin}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Finds what the message names. Rejections are rare: the resources are made once more rather than remembering the
/// origin of each for every proxy.
pub(super) fn of(
    scope: Scope<'_>,
    proxy: &Proxy,
    type_url: &str,
    stream: &Stream,
    nonce: String,
    message: String,
) -> Rejection {
    let mesh = &scope.push.mesh;
    let made = if is_whole(type_url, &proxy.node) {
        let mut all = scope.translate.own(type_url, mesh, proxy);
        let shared = scope.translate.shared(type_url, mesh, proxy);
        all.extend(shared.into_iter().map(|s| s.resource));
        all
    } else if is_named(type_url, &proxy.node) {
        let names: Vec<&str> = stream
            .names(type_url)
            .map(|n| &**n)
            .filter(|n| names(&message, n))
            .collect();
        scope.translate.named(type_url, mesh, proxy, &names)
    } else {
        Vec::new()
    };
    let resources = made
        .into_iter()
        .filter(|r| names(&message, &r.name))
        .map(|Resource { name, from, .. }| (name, from))
        .collect();
    Rejection {
        nonce,
        message,
        resources,
        at: SystemTime::now(),
    }
}

/// Whether `message` names `name`, and not merely a longer name that contains it.
fn names(message: &str, name: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '|' | '.' | '/');
    message.match_indices(name).any(|(at, _)| {
        let before = message[..at].chars().next_back();
        let mut after = message[at + name.len()..].chars();
        let next = after.next();
        // A full stop that ends a sentence is no part of a name.
        let ends = match next {
            Some('.') => after.next().is_none_or(char::is_whitespace),
            next => next.is_none_or(|c| !part(c)),
        };
        before.is_none_or(|c| !part(c)) && ends
    })
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn a_name_is_found_whole_only() {
        assert!(names(
            "Error adding/updating cluster(s) outbound|80||a.b: no endpoints",
            "outbound|80||a.b"
        ));
        assert!(!names("cluster outbound|80||a.bc: x", "outbound|80||a.b"));
        assert!(!names("cluster outbound|80||a.b.c: x", "outbound|80||a.b"));
        assert!(names("wrong: 0.0.0.0_80.", "0.0.0.0_80"));
        assert!(!names("0.0.0.0_8080: x", "0.0.0.0_80"));
        assert!(!names("port 18080: x", "8080"));
    }
}
