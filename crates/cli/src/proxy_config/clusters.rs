//! The table of clusters.

use anyhow::bail;
use serde_json::Value;

use super::{
    dump::{Dump, managed_by, text},
    table::Table,
};

/// Which clusters are wanted; empty and 0 are all. Each is looked for inside the cluster's name.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    pub(crate) fqdn: String,
    pub(crate) direction: String,
    pub(crate) subset: String,
    pub(crate) port: u16,
}

/// The clusters that pass the filter, sorted.
pub(crate) fn select(dump: &Dump, filter: &Filter) -> anyhow::Result<Vec<Value>> {
    let lists: [(&str, &[&str]); 2] = [
        ("dynamicActiveClusters", &["cluster"]),
        ("staticClusters", &["cluster"]),
    ];
    let mut all = dump.resources(
        "ClustersConfigDump",
        &lists,
        "envoy.config.cluster.v3.Cluster",
    );
    if all.is_empty() {
        bail!("no clusters found");
    }
    all.sort_by(|a, b| Name::of(a).order().cmp(&Name::of(b).order()));
    let port = format!("|{}|", filter.port);
    all.retain(|c| {
        let name = text(c, "/name");
        name.contains(&filter.fqdn)
            && name.contains(&filter.direction)
            && name.contains(&filter.subset)
            && (filter.port == 0 || name.contains(&port))
    });
    Ok(all)
}

/// The table; `named` puts the whole name in front.
pub(crate) fn table(clusters: &[Value], named: bool) -> String {
    let mut heading = vec![
        "SERVICE FQDN",
        "PORT",
        "SUBSET",
        "DIRECTION",
        "TYPE",
        "DESTINATION RULE",
    ];
    if named {
        heading.insert(0, "NAME");
    }
    let mut table = Table::new(&heading);
    for cluster in clusters {
        let name = Name::of(cluster);
        let long = format!("cluster/{}", text(cluster, "/name"));
        let mut row = if named {
            vec![long.clone()]
        } else {
            Vec::new()
        };
        if name.istio {
            let subset = if name.subset.is_empty() {
                "-"
            } else {
                name.subset
            };
            row.extend(
                [name.host, &name.port.to_string(), subset, name.direction].map(str::to_owned),
            );
        } else {
            let shown = if named { long } else { name.host.to_owned() };
            row.extend([shown, "-".into(), "-".into(), "-".into()]);
        }
        row.extend([discovery_type(cluster), managed_by(cluster)]);
        table.row(row);
    }
    table.render(5)
}

/// STATIC is the default and not written; a custom type goes by its name.
fn discovery_type(cluster: &Value) -> String {
    let kind = text(cluster, "/type");
    let custom = text(cluster, "/clusterType/name");
    match (kind, custom) {
        ("", "") => "STATIC".into(),
        ("", custom) => custom.into(),
        (kind, _) => kind.into(),
    }
}

/// `DIRECTION|PORT|SUBSET|HOST`, or a name of another form.
#[derive(Debug)]
pub(crate) struct Name<'a> {
    istio: bool,
    direction: &'a str,
    port: i64,
    subset: &'a str,
    host: &'a str,
}

impl<'a> Name<'a> {
    fn of(cluster: &'a Value) -> Self {
        Self::parse(text(cluster, "/name"))
    }

    /// Takes a name apart; gateways write it with `_.` for `|`.
    pub(crate) fn parse(name: &'a str) -> Self {
        let parts: Vec<_> = if name.starts_with("outbound_.") || name.starts_with("inbound_.") {
            name.splitn(4, "_.").collect()
        } else {
            name.split('|').collect()
        };
        match parts.as_slice() {
            [direction, port, subset, host, ..] => Self {
                istio: true,
                direction,
                port: port.parse().unwrap_or(0),
                subset,
                host,
            },
            _ => Self {
                istio: false,
                direction: "",
                port: 0,
                subset: "",
                host: name,
            },
        }
    }

    /// By host, then subset, port and direction.
    pub(crate) fn order(&self) -> (&'a str, &'a str, i64, &'a str) {
        (self.host, self.subset, self.port, self.direction)
    }
}
