//! The table of routes: one row for each route of each virtual host.

use std::collections::BTreeSet;

use anyhow::bail;
use serde_json::Value;

use super::{
    dump::{Dump, list, managed_by, text},
    table::Table,
};

/// The route configurations of that name, or all for an empty one.
pub(crate) fn select(dump: &Dump, name: &str) -> anyhow::Result<Vec<Value>> {
    let lists: [(&str, &[&str]); 2] = [
        ("dynamicRouteConfigs", &["routeConfig"]),
        ("staticRouteConfigs", &["routeConfig"]),
    ];
    let full_name = "envoy.config.route.v3.RouteConfiguration";
    let mut all = dump.resources("RoutesConfigDump", &lists, full_name);
    if all.is_empty() {
        bail!("no routes found");
    }
    by_number(&mut all);
    all.retain(|r| name.is_empty() || text(r, "/name") == name);
    Ok(all)
}

/// istioctl sorts route configurations whose names are numbers, and leaves others where they are; since its order
/// is none (a name is neither before nor after a number), the way of sorting shows: insertion.
fn by_number(routes: &mut [Value]) {
    let number = |route: &Value| text(route, "/name").parse::<i64>().ok();
    for i in 1..routes.len() {
        let mut j = i;
        while j > 0 {
            match (number(&routes[j]), number(&routes[j - 1])) {
                (Some(this), Some(before)) if this < before => routes.swap(j, j - 1),
                _ => break,
            }
            j -= 1;
        }
    }
}

/// The table; `named` marks each row as a route.
pub(crate) fn table(routes: &[Value], verbose: bool, named: bool) -> String {
    if !verbose {
        let mut table = Table::new(&["NAME", "VIRTUAL HOSTS"]);
        for route in routes {
            let hosts = list(route, "/virtualHosts").len().to_string();
            table.row(vec![text(route, "/name").to_owned(), hosts]);
        }
        return table.render(5);
    }
    let mut table = Table::new(&["NAME", "VHOST NAME", "DOMAINS", "MATCH", "VIRTUAL SERVICE"]);
    for config in routes {
        let name = text(config, "/name");
        let name = if named {
            format!("route/{name}")
        } else {
            name.to_owned()
        };
        for host in list(config, "/virtualHosts") {
            let mut row = |matched: String, object: String| {
                table.row(vec![
                    name.clone(),
                    text(host, "/name").to_owned(),
                    domains(host),
                    matched,
                    object,
                ]);
            };
            let routes = list(host, "/routes");
            for route in routes
                .iter()
                .filter(|r| text(r, "/route/cluster") != "PassthroughCluster")
            {
                row(describe_match(&route["match"]), managed_by(route));
            }
            if routes.is_empty() {
                row("/*".into(), "404".into());
            }
        }
    }
    table.render(5)
}

/// Up to two of the domains, without ports, and without those that are another one written longer.
fn domains(host: &Value) -> String {
    let all: Vec<&str> = list(host, "/domains")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    if let [only] = all.as_slice() {
        return (*only).to_owned();
    }
    let without_port: Vec<&str> = all
        .into_iter()
        .filter(|d| !d.contains(':') || d.ends_with(']'))
        .collect();
    let known: BTreeSet<&str> = without_port.iter().copied().collect();
    let shown: Vec<&str> = without_port
        .into_iter()
        .filter(|d| {
            !["svc.cluster.local", "svc"].iter().any(|tail| {
                let short = d.strip_suffix(tail).and_then(|d| d.strip_suffix('.'));
                short.is_some_and(|s| known.contains(s))
            })
        })
        .collect();
    match shown.as_slice() {
        [a, b, rest @ ..] if !rest.is_empty() => format!("{a}, {b} + {} more...", rest.len()),
        all => all.join(", "),
    }
}

fn describe_match(value: &Value) -> String {
    let mut parts = Vec::new();
    if let Some(prefix) = value.get("prefix").and_then(Value::as_str) {
        parts.push(format!("{prefix}*"));
    }
    if let Some(prefix) = value.get("pathSeparatedPrefix").and_then(Value::as_str) {
        parts.push(format!("PathPrefix:{prefix}"));
    }
    if let Some(path) = value.get("path").and_then(Value::as_str) {
        parts.push(path.to_owned());
    }
    if let Some(regex) = value.pointer("/safeRegex/regex").and_then(Value::as_str) {
        parts.push(format!("regex {regex}"));
    }
    parts.join(" ")
}
