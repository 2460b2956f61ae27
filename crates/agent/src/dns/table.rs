//! The names that are answered here, expanded as Istio's agent expands them.
//!
//! A Kubernetes service is known by its whole name and the shorter ones that its namespace allows. Each name is also
//! known with the first search domain behind it, as an alias: a resolver that tries search domains first gets its
//! answer at the first try, and no query leaves the pod. Names are kept in lower case without the last dot.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicUsize, Ordering},
};

use proto::istio::networking::nds::v1::NameTable;

/// Where the asking pod is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its namespace: short names are those of services there.
    pub namespace: String,
    /// Search domains of its resolv.conf.
    pub search: Vec<String>,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Addresses {
        v4: Vec<Ipv4Addr>,
        v6: Vec<Ipv6Addr>,
    },
    /// Another name of the table.
    Alias(String),
}

/// The answer for a name of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The name that the addresses belong to, where the asked one is an alias.
    pub alias: Option<String>,
    /// Addresses of the family that was asked for; none where the name has none.
    pub addresses: Vec<IpAddr>,
}

/// All names.
#[derive(Debug, Default)]
pub struct Table {
    names: HashMap<String, Entry>,
    turn: AtomicUsize,
}

impl Table {
    /// Expands the control plane's table for a pod.
    pub fn build(table: &NameTable, place: &Place) -> Table {
        let mut names: HashMap<String, Entry> = HashMap::new();
        let mut aliases = Vec::new();
        for (host, info) in &table.table {
            let (mut v4, mut v6) = (Vec::new(), Vec::new());
            for ip in &info.ips {
                // What is no address cannot be an answer.
                match ip.parse() {
                    Ok(IpAddr::V4(ip)) => v4.push(ip),
                    Ok(IpAddr::V6(ip)) => v6.push(ip),
                    Err(_) => {}
                }
            }
            if v4.is_empty() && v6.is_empty() {
                continue;
            }
            let host = host.trim_end_matches('.').to_lowercase();
            let mut known = vec![host.clone()];
            if info.registry == "Kubernetes" && !info.shortname.is_empty() {
                known = kubernetes_names(&host, &info.shortname, &info.namespace, place);
            }
            known.extend(
                info.alt_hosts
                    .iter()
                    .map(|h| h.trim_end_matches('.').to_lowercase()),
            );
            for name in known {
                if let Some(search) = place.search.first() {
                    let expanded =
                        format!("{name}.{}", search.trim_end_matches('.').to_lowercase());
                    aliases.push((expanded, name.clone()));
                }
                let (v4, v6) = (v4.clone(), v6.clone());
                names.insert(name, Entry::Addresses { v4, v6 });
            }
        }
        for (expanded, name) in aliases {
            names.entry(expanded).or_insert(Entry::Alias(name));
        }
        Table {
            names,
            turn: AtomicUsize::new(0),
        }
    }

    /// How many names there are, aliases included.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Looks a name up (lower case, no last dot); none if it is not of the mesh. A wildcard stands for every name
    /// below it that has no entry of its own, the longest first.
    pub fn look_up(&self, name: &str, v6: bool) -> Option<Found> {
        let mut entry = self.names.get(name);
        let mut rest = name;
        while entry.is_none() {
            let (_, parent) = rest.split_once('.')?;
            entry = self.names.get(&format!("*.{parent}"));
            rest = parent;
        }
        let (alias, target) = match entry? {
            Entry::Alias(target) => {
                let alias = match target.strip_prefix('*') {
                    // The alias of a wildcard: the part before stays what was asked for.
                    Some(suffix) => {
                        let head = &name[..name.len() - rest.len()];
                        format!("{}{suffix}", head.trim_end_matches('.'))
                    }
                    None => target.clone(),
                };
                (Some(alias), self.names.get(target)?)
            }
            entry => (None, entry),
        };
        let Entry::Addresses { v4, v6: six } = target else {
            return None;
        };
        let mut addresses: Vec<IpAddr> = match v6 {
            false => v4.iter().copied().map(IpAddr::from).collect(),
            true => six.iter().copied().map(IpAddr::from).collect(),
        };
        if addresses.len() > 1 {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let first = turn % addresses.len();
            addresses.rotate_left(first);
        }
        Some(Found { alias, addresses })
    }

    /// All names with their addresses or what they stand for, sorted, for people.
    pub fn dump(&self) -> serde_json::Value {
        let names = self.names.iter().map(|(name, entry)| {
            let value = match entry {
                Entry::Addresses { v4, v6 } => serde_json::json!({
                    "ips": v4.iter().map(|a| a.to_string())
                        .chain(v6.iter().map(|a| a.to_string())).collect::<Vec<_>>(),
                }),
                Entry::Alias(target) => serde_json::json!({ "alias": target }),
            };
            (name.clone(), value)
        });
        names.collect::<serde_json::Map<_, _>>().into()
    }
}

/// `reviews`, `reviews.shop`, `reviews.shop.svc` and the whole name; the first in the service's own namespace only.
fn kubernetes_names(host: &str, short: &str, namespace: &str, place: &Place) -> Vec<String> {
    let (short, namespace) = (short.to_lowercase(), namespace.to_lowercase());
    let mut out = vec![
        host.to_owned(),
        format!("{short}.{namespace}"),
        format!("{short}.{namespace}.svc"),
    ];
    if namespace == place.namespace {
        out.push(short);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::istio::networking::nds::v1::name_table::NameInfo;

    fn table() -> Table {
        let info = |ips: &[&str], short: &str, namespace: &str| NameInfo {
            ips: ips.iter().map(|i| i.to_string()).collect(),
            registry: if short.is_empty() {
                "External"
            } else {
                "Kubernetes"
            }
            .into(),
            shortname: short.into(),
            namespace: namespace.into(),
            alt_hosts: Vec::new(),
        };
        let names = NameTable {
            table: [
                (
                    "Reviews.shop.svc.cluster.local",
                    info(&["10.96.0.7"], "reviews", "shop"),
                ),
                (
                    "db.data.svc.cluster.local",
                    info(&["10.96.0.8", "fd00::8"], "db", "data"),
                ),
                ("*.example.com", info(&["240.240.0.1"], "", "")),
                ("a.example.com", info(&["240.240.0.2", "bad"], "", "")),
                ("none.example.org", info(&["bad"], "", "")),
            ]
            .map(|(k, v)| (k.to_owned(), v))
            .into(),
            name_info: None,
        };
        let place = Place {
            namespace: "shop".into(),
            search: vec!["shop.svc.cluster.local".into(), "svc.cluster.local".into()],
        };
        Table::build(&names, &place)
    }

    fn found(name: &str, v6: bool) -> Option<(Option<String>, Vec<String>)> {
        let found = table().look_up(name, v6)?;
        let addresses = found.addresses.iter().map(ToString::to_string).collect();
        Some((found.alias, addresses))
    }

    fn plain(ips: &[&str]) -> Option<(Option<String>, Vec<String>)> {
        Some((None, ips.iter().map(|i| i.to_string()).collect()))
    }

    #[test]
    fn a_service_has_the_names_that_its_namespace_allows() {
        for name in [
            "reviews",
            "reviews.shop",
            "reviews.shop.svc",
            "reviews.shop.svc.cluster.local",
        ] {
            assert_eq!(found(name, false), plain(&["10.96.0.7"]), "{name}");
        }
        assert_eq!(
            found("db.data.svc.cluster.local", true),
            plain(&["fd00::8"])
        );
        // Another namespace's short name is not ours to answer, and a missing family is an empty answer.
        assert_eq!(found("db", false), None);
        assert_eq!(found("reviews", true), plain(&[]));
        assert_eq!(found("none.example.org", false), None);
    }

    #[test]
    fn the_first_search_domain_makes_an_alias() {
        let alias = |name: &str, ip: &str| Some((Some(name.to_owned()), vec![ip.to_owned()]));
        assert_eq!(
            found("a.example.com.shop.svc.cluster.local", false),
            alias("a.example.com", "240.240.0.2")
        );
        assert_eq!(
            found("x.y.example.com.shop.svc.cluster.local", false),
            alias("x.y.example.com", "240.240.0.1")
        );
        assert_eq!(found("a.example.com.svc.cluster.local", false), None);
    }

    #[test]
    fn the_longest_wildcard_and_exact_names_first() {
        assert_eq!(found("b.example.com", false), plain(&["240.240.0.1"]));
        assert_eq!(found("a.example.com", false), plain(&["240.240.0.2"]));
        assert_eq!(found("example.com", false), None);
    }
}
