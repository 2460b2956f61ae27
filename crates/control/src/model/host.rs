//! Host names as Istio's objects use them: exact (`a.b.c`) or with one leading wildcard (`*.b.c`, `*`).

use std::{cmp::Ordering, collections::BTreeMap, net::IpAddr};

/// Whether the name begins with the wildcard.
pub fn is_wildcard(host: &str) -> bool {
    host.starts_with('*')
}

/// Whether the two names can mean the same host: equal, or one wildcard covers (or overlaps) the other.
pub fn matches(a: &str, b: &str) -> bool {
    match (is_wildcard(a), is_wildcard(b)) {
        (true, true) if a.len() < b.len() => b[1..].ends_with(&a[1..]),
        (true, true) => a[1..].ends_with(&b[1..]),
        (true, false) => b.ends_with(&a[1..]),
        (false, true) => a.ends_with(&b[1..]),
        (false, false) => a == b,
    }
}

/// Whether every host that `inner` means is also meant by `outer`.
pub fn subset_of(inner: &str, outer: &str) -> bool {
    match (is_wildcard(inner), is_wildcard(outer)) {
        (true, true) => inner.len() >= outer.len() && inner[1..].ends_with(&outer[1..]),
        (true, false) => false,
        (false, true) => inner.ends_with(&outer[1..]),
        (false, false) => inner == outer,
    }
}

/// Order from the most specific name to the least: exact before wildcard, longer before shorter, then by text.
pub fn by_specificity(a: &str, b: &str) -> Ordering {
    is_wildcard(a)
        .cmp(&is_wildcard(b))
        .then(b.len().cmp(&a.len()))
        .then_with(|| a.cmp(b))
}

/// The entry for `host`: the exact one, else the longest wildcard that covers it.
pub fn most_specific<'a, V>(
    host: &str,
    exact: &'a BTreeMap<String, V>,
    wildcard: &'a BTreeMap<String, V>,
) -> Option<(&'a str, &'a V)> {
    let same = if is_wildcard(host) { wildcard } else { exact };
    if let Some((key, value)) = same.get_key_value(host) {
        return Some((key, value));
    }
    if wildcard.is_empty() {
        return None;
    }
    let needle = host.strip_prefix('*').unwrap_or(host);
    wildcard
        .iter()
        .filter(|(key, _)| needle.ends_with(&key[1..]))
        .min_by(|a, b| by_specificity(a.0, b.0))
        .map(|(key, value)| (key.as_str(), value))
}

/// The full name of a host that an object of `namespace` names: a name without a dot is a Kubernetes service of
/// that namespace; everything else (dotted, `*`, an address) stands for itself.
pub fn fqdn(host: &str, namespace: &str, domain: &str) -> String {
    if host.is_empty() || host == "*" || host.contains('.') || host.parse::<IpAddr>().is_ok() {
        return host.to_owned();
    }
    let mut out = host.to_owned();
    if !namespace.is_empty() {
        out = out + "." + namespace;
    }
    if !domain.is_empty() {
        out = out + ".svc." + domain;
    }
    out
}

/// `NAMESPACE/NAME` of a gateway that an object of `namespace` names as `name`, `./name`, `ns/name` or
/// (as long ago) `name.ns.svc.domain`.
pub fn gateway_name(gateway: &str, namespace: &str) -> String {
    if let Some((ns, name)) = gateway.split_once('/') {
        let ns = if ns == "." { namespace } else { ns };
        return format!("{ns}/{name}");
    }
    match gateway.split_once('.') {
        None => format!("{namespace}/{gateway}"),
        Some((name, rest)) => {
            let ns = rest.split_once('.').map_or(rest, |(ns, _)| ns);
            format!("{ns}/{name}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_and_contain() {
        assert!(matches("*.a.com", "x.a.com"));
        assert!(matches("*.a.com", "*.com"));
        assert!(!matches("a.com", "b.com"));
        assert!(subset_of("*.a.com", "*.com"));
        assert!(!subset_of("*.com", "*.a.com"));
        assert!(!subset_of("*.com", "a.com"));
        assert!(subset_of("*", "*"));
    }

    #[test]
    fn the_longest_wildcard_wins() {
        let exact = BTreeMap::from([("a.b.c".to_owned(), 1)]);
        let wild = BTreeMap::from([
            ("*".to_owned(), 4),
            ("*.c".to_owned(), 3),
            ("*.b.c".to_owned(), 2),
        ]);
        assert_eq!(most_specific("a.b.c", &exact, &wild), Some(("a.b.c", &1)));
        assert_eq!(most_specific("x.b.c", &exact, &wild), Some(("*.b.c", &2)));
        assert_eq!(most_specific("x.d", &exact, &wild), Some(("*", &4)));
        assert_eq!(most_specific("*.b.c", &exact, &wild), Some(("*.b.c", &2)));
    }

    #[test]
    fn short_names_get_namespace_and_domain() {
        assert_eq!(
            fqdn("reviews", "bookinfo", "cluster.local"),
            "reviews.bookinfo.svc.cluster.local"
        );
        assert_eq!(
            fqdn("reviews.bookinfo", "x", "cluster.local"),
            "reviews.bookinfo"
        );
        assert_eq!(fqdn("*", "x", "cluster.local"), "*");
        assert_eq!(gateway_name("web", "bookinfo"), "bookinfo/web");
        assert_eq!(gateway_name("./web", "bookinfo"), "bookinfo/web");
        assert_eq!(
            gateway_name("web.ns.svc.cluster.local", "bookinfo"),
            "ns/web"
        );
    }
}
