//! The table of endpoints: from the dump's load assignments, or, in the old form, from `/clusters`.

use anyhow::Context;
use serde_json::Value;

use super::{
    clusters::Name,
    dump::{Dump, field, list, text},
    table::Table,
};

/// Which endpoints are wanted; empty and 0 are all.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    pub(crate) address: String,
    pub(crate) port: u16,
    pub(crate) cluster: String,
    pub(crate) status: String,
}

impl Filter {
    fn takes(&self, address: &str, port: u64, cluster: &str, status: &str) -> bool {
        (self.address.is_empty() || self.address.eq_ignore_ascii_case(address))
            && (self.port == 0 || u64::from(self.port) == port)
            && (self.cluster.is_empty() || self.cluster.eq_ignore_ascii_case(cluster))
            && (self.status.is_empty() || self.status.eq_ignore_ascii_case(status))
    }
}

/// The load assignments that hold a wanted endpoint, with the wanted endpoints only.
pub(crate) fn select(dump: &Dump, filter: &Filter) -> anyhow::Result<Vec<Value>> {
    let lists: [(&str, &[&str]); 2] = [
        ("dynamicEndpointConfigs", &["endpointConfig"]),
        ("staticEndpointConfigs", &["endpointConfig"]),
    ];
    let full_name = "envoy.config.endpoint.v3.ClusterLoadAssignment";
    let mut all = dump.resources("EndpointsConfigDump", &lists, full_name);
    all.sort_by(|a, b| {
        let name = |v| Name::parse(text(v, "/clusterName")).order();
        name(a).cmp(&name(b))
    });
    for assignment in &mut all {
        let cluster = text(assignment, "/clusterName").to_owned();
        let Some(Value::Array(localities)) = assignment.get_mut("endpoints") else {
            continue;
        };
        for locality in localities.iter_mut() {
            if let Some(Value::Array(endpoints)) = locality.get_mut("lbEndpoints") {
                endpoints.retain(|e| {
                    let (address, port) = address(e);
                    filter.takes(&address, port, &cluster, status(e))
                });
            }
        }
        localities.retain(|l| !list(l, "/lbEndpoints").is_empty());
    }
    all.retain(|a| !list(a, "/endpoints").is_empty());
    Ok(all)
}

/// The table; `named` marks each row as an endpoint.
pub(crate) fn table(dump: &Dump, filter: &Filter, named: bool) -> anyhow::Result<String> {
    let first = if named { "NAME" } else { "ENDPOINT" };
    let mut table = Table::new(&[first, "STATUS", "LOCALITY", "CLUSTER"]);
    for assignment in select(dump, filter)? {
        let cluster = text(&assignment, "/clusterName");
        let mut rows = Vec::new();
        for locality in list(&assignment, "/endpoints") {
            for endpoint in list(locality, "/lbEndpoints") {
                rows.push((
                    address(endpoint),
                    status(endpoint),
                    describe_locality(locality),
                ));
            }
        }
        rows.sort();
        for ((address, port), status, locality) in rows {
            let shown = shown(&address, port);
            let shown = if named {
                format!("endpoint/{shown}")
            } else {
                shown
            };
            table.row(vec![shown, status.to_owned(), locality, cluster.to_owned()]);
        }
    }
    Ok(table.render(5))
}

/// Host and port; a path or an internal listener stands alone, with port 0.
fn address(endpoint: &Value) -> (String, u64) {
    let Some(address) = endpoint.pointer("/endpoint/address") else {
        return Default::default();
    };
    if let Some(socket) = address.get("socketAddress") {
        let port = socket.get("portValue").and_then(Value::as_u64).unwrap_or(0);
        return (text(socket, "/address").to_owned(), port);
    }
    if let Some(path) = address.pointer("/pipe/path").and_then(Value::as_str) {
        return (format!("unix://{path}"), 0);
    }
    let name = text(address, "/envoyInternalAddress/serverListenerName");
    let id = text(address, "/envoyInternalAddress/endpointId");
    (format!("envoy://{name}/{id}"), 0)
}

fn shown(address: &str, port: u64) -> String {
    if port == 0 && address.contains("://") {
        address.to_owned()
    } else if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
}

/// An endpoint whose health nobody told is UNKNOWN, the value that is not written.
fn status(endpoint: &Value) -> &str {
    match text(endpoint, "/healthStatus") {
        "" => "UNKNOWN",
        other => other,
    }
}

fn describe_locality(locality: &Value) -> String {
    let parts =
        ["/locality/region", "/locality/zone", "/locality/subZone"].map(|p| text(locality, p));
    let known = parts
        .iter()
        .rposition(|p| !p.is_empty())
        .map_or(0, |i| i + 1);
    parts[..known].join("/")
}

/// The entries of `/clusters?format=json` that hold a wanted endpoint.
pub(crate) fn statuses(answer: &[u8], filter: &Filter) -> anyhow::Result<Vec<Value>> {
    let value: Value =
        serde_json::from_slice(answer).context("/clusters of the proxy: not JSON")?;
    let mut out = Vec::new();
    for status in field(&value, "clusterStatuses")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let mut status = status.clone();
        let name = text(&status, "/name").to_owned();
        let key = if status.get("hostStatuses").is_some() {
            "hostStatuses"
        } else {
            "host_statuses"
        };
        let Some(Value::Array(hosts)) = status.get_mut(key) else {
            continue;
        };
        hosts.retain(|h| {
            let (address, port) = host_address(h);
            filter.takes(&address, port, &name, health(h))
        });
        if !hosts.is_empty() {
            out.push(status);
        }
    }
    Ok(out)
}

/// The table of 1.13.
pub(crate) fn legacy_table(statuses: &[Value]) -> String {
    let mut table = Table::new(&["ENDPOINT", "STATUS", "OUTLIER CHECK", "CLUSTER"]);
    let mut rows = Vec::new();
    for cluster in statuses {
        for host in field(cluster, "hostStatuses")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let failed = field(host, "healthStatus")
                .and_then(|h| field(h, "failedOutlierCheck"))
                .and_then(Value::as_bool)
                .unwrap_or(false);
            let (address, port) = host_address(host);
            let check = if failed { "FAILED" } else { "OK" };
            rows.push((
                address,
                port,
                health(host).to_owned(),
                check,
                text(cluster, "/name"),
            ));
        }
    }
    rows.sort();
    for (address, port, health, check, cluster) in rows {
        table.row(vec![
            shown(&address, port),
            health,
            check.to_owned(),
            cluster.to_owned(),
        ]);
    }
    table.render(5)
}

fn host_address(host: &Value) -> (String, u64) {
    let Some(socket) = host.get("address").and_then(|a| field(a, "socketAddress")) else {
        return (format!("unix://{}", text(host, "/address/pipe/path")), 0);
    };
    let port = field(socket, "portValue")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    (text(socket, "/address").to_owned(), port)
}

fn health(host: &Value) -> &str {
    field(host, "healthStatus")
        .and_then(|h| field(h, "edsHealthStatus"))
        .and_then(Value::as_str)
        .filter(|s| *s != "UNKNOWN")
        .unwrap_or("HEALTHY")
}
