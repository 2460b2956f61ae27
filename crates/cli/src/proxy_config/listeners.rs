//! The table of listeners: address, port, what a filter chain matches and where it leads.

use std::cmp::Reverse;

use anyhow::bail;
use serde_json::Value;

use super::{
    dump::{Dump, list, text},
    table::Table,
};

/// Which listeners are wanted; empty and 0 are all.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    pub(crate) address: String,
    pub(crate) port: u16,
    pub(crate) kind: String,
}

/// The listeners that pass the filter, in the order of the dump.
pub(crate) fn select(dump: &Dump, filter: &Filter) -> anyhow::Result<Vec<Value>> {
    let lists: [(&str, &[&str]); 2] = [
        ("dynamicListeners", &["activeState", "listener"]),
        ("staticListeners", &["listener"]),
    ];
    let all = dump.resources(
        "ListenersConfigDump",
        &lists,
        "envoy.config.listener.v3.Listener",
    );
    if all.is_empty() {
        bail!("no listeners found");
    }
    let wanted = |l: &Value| {
        (filter.address.is_empty() || filter.address.eq_ignore_ascii_case(address(l)))
            && (filter.port == 0 || port(l) == u64::from(filter.port))
            && (filter.kind.is_empty() || filter.kind.eq_ignore_ascii_case(kind(l)))
    };
    Ok(all.into_iter().filter(wanted).collect())
}

/// The table. `old` gives the heading of 1.13; `named` marks each row with the listener's name.
pub(crate) fn table(listeners: &[Value], verbose: bool, old: bool, named: bool) -> String {
    let mut sorted: Vec<&Value> = listeners.iter().collect();
    sorted.sort_by_key(|l| (port(l), address(l), kind(l)));
    let first = if old { "ADDRESS" } else { "ADDRESSES" };
    let mut heading = vec![first, "PORT"];
    heading.extend(if verbose {
        vec!["MATCH", "DESTINATION"]
    } else {
        vec!["TYPE"]
    });
    if named {
        heading.insert(0, "NAME");
    }
    let mut table = Table::new(&heading);
    for listener in sorted {
        let name = format!("listener/{}", text(listener, "/name"));
        let start = |rest: &[String]| {
            let mut row = if named {
                vec![name.clone()]
            } else {
                Vec::new()
            };
            row.extend([addresses(listener), port(listener).to_string()]);
            row.extend_from_slice(rest);
            row
        };
        if !verbose {
            table.row(start(&[kind(listener).to_owned()]));
            continue;
        }
        let mut rows: Vec<_> = chains(listener)
            .map(|chain| [describe_match(chain), destination(chain)])
            .collect();
        rows.sort_by(|a, b| Reverse(&a[1]).cmp(&Reverse(&b[1])));
        for row in rows {
            table.row(start(&row));
        }
    }
    table.render(1)
}

fn address(listener: &Value) -> &str {
    text(listener, "/address/socketAddress/address")
}

fn addresses(listener: &Value) -> String {
    let more = list(listener, "/additionalAddresses");
    let more = more
        .iter()
        .map(|a| text(a, "/address/socketAddress/address"));
    std::iter::once(address(listener))
        .chain(more)
        .collect::<Vec<_>>()
        .join(",")
}

fn port(listener: &Value) -> u64 {
    listener
        .pointer("/address/socketAddress/portValue")
        .and_then(Value::as_u64)
        .unwrap_or(0)
}

fn chains(listener: &Value) -> impl Iterator<Item = &Value> {
    list(listener, "/filterChains")
        .iter()
        .chain(listener.get("defaultFilterChain"))
}

const HTTP: &str = "envoy.filters.network.http_connection_manager";
const TCP: &str = "envoy.filters.network.tcp_proxy";

/// HTTP, TCP, HTTP+TCP or UNKNOWN; a chain that only drops connections counts as neither.
fn kind(listener: &Value) -> &'static str {
    let filters = || chains(listener).flat_map(|c| list(c, "/filters"));
    let http = filters().any(|f| text(f, "/name") == HTTP);
    let tcp = filters().any(|f| text(f, "/name") == TCP && !is_black_hole(f));
    match (http, tcp) {
        (true, true) => "HTTP+TCP",
        (true, false) => "HTTP",
        (false, true) => "TCP",
        (false, false) => "UNKNOWN",
    }
}

fn is_black_hole(filter: &Value) -> bool {
    filter
        .get("typedConfig")
        .is_some_and(|c| c.to_string().contains("BlackHoleCluster"))
}

fn describe_match(chain: &Value) -> String {
    let texts = |pointer: &str| -> Vec<&str> {
        list(chain, pointer)
            .iter()
            .filter_map(Value::as_str)
            .collect()
    };
    let mut parts = Vec::new();
    let names = texts("/filterChainMatch/serverNames");
    if !names.is_empty() {
        parts.push(format!("SNI: {}", names.join(",")));
    }
    let transport = text(chain, "/filterChainMatch/transportProtocol");
    if !transport.is_empty() {
        parts.push(format!("Trans: {transport}"));
    }
    let protocols = texts("/filterChainMatch/applicationProtocols");
    if !protocols.is_empty() {
        let alias = ALIASES.iter().find(|(_, list)| *list == protocols);
        let shown = alias.map_or_else(|| protocols.join(","), |(alias, _)| (*alias).to_owned());
        parts.push(format!("App: {shown}"));
    }
    let port = chain
        .pointer("/filterChainMatch/destinationPort")
        .and_then(Value::as_u64);
    let port = port.map(|p| format!(":{p}")).unwrap_or_default();
    let ranges: Vec<_> = list(chain, "/filterChainMatch/prefixRanges")
        .iter()
        .map(|range| {
            let length = range.get("prefixLen").and_then(Value::as_u64).unwrap_or(0);
            format!("{}/{length}", text(range, "/addressPrefix"))
        })
        .collect();
    if !ranges.is_empty() {
        parts.push(format!("Addr: {}{port}", ranges.join(",")));
    } else if !port.is_empty() {
        parts.push(format!("Addr: *{port}"));
    }
    if parts.is_empty() {
        "ALL".to_owned()
    } else {
        parts.join("; ")
    }
}

/// Lists of ALPN that have a name of their own.
const ALIASES: [(&str, &[&str]); 4] = [
    ("HTTP", &["http/1.0", "http/1.1", "h2c"]),
    (
        "HTTP TLS",
        &[
            "http/1.0",
            "http/1.1",
            "h2c",
            "istio-http/1.0",
            "istio-http/1.1",
            "istio-h2",
        ],
    ),
    (
        "Istio HTTP Plain",
        &["istio", "istio-http/1.0", "istio-http/1.1", "istio-h2"],
    ),
    ("TCP TLS", &["istio-peer-exchange", "istio"]),
];

fn destination(chain: &Value) -> String {
    for filter in list(chain, "/filters") {
        match text(filter, "/name") {
            HTTP => {
                if let Some(routes) = filter.pointer("/typedConfig/routeConfig") {
                    return inline_routes(routes);
                }
                let name = text(filter, "/typedConfig/rds/routeConfigName");
                return if name.is_empty() {
                    "HTTP".into()
                } else {
                    format!("Route: {name}")
                };
            }
            TCP if !is_black_hole(filter) => {
                return cluster(text(filter, "/typedConfig/cluster"));
            }
            _ => {}
        }
    }
    "Non-HTTP/Non-TCP".into()
}

/// Istio's own clusters tell what they are by their bare name.
fn cluster(name: &str) -> String {
    if name.contains("Cluster") {
        name.to_owned()
    } else {
        format!("Cluster: {name}")
    }
}

fn inline_routes(routes: &Value) -> String {
    let hosts = list(routes, "/virtualHosts");
    if let [host] = hosts
        && list(host, "/domains") == ["*"]
        && let [route] = list(host, "/routes")
        && text(route, "/match/prefix") == "/"
        && let Some(name) = route.pointer("/route/cluster").and_then(Value::as_str)
    {
        return cluster(name);
    }
    let described: Vec<_> = hosts
        .iter()
        .map(|host| {
            let matches: Vec<_> = list(host, "/routes")
                .iter()
                .map(|r| inline_match(&r["match"]))
                .collect();
            let matches = matches.join(", ");
            let domains: Vec<_> = list(host, "/domains")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            if domains == ["*"] {
                matches
            } else {
                format!("{} {matches}", domains.join("/"))
            }
        })
        .collect();
    format!("Inline Route: {}", described.join("; "))
}

fn inline_match(value: &Value) -> String {
    let mut parts = Vec::new();
    if let Some(prefix) = value.get("prefix").and_then(Value::as_str) {
        parts.push(format!("{prefix}*"));
    }
    if let Some(path) = value.get("path").and_then(Value::as_str) {
        parts.push(path.to_owned());
    }
    if let Some(regex) = value.pointer("/safeRegex/regex").and_then(Value::as_str) {
        parts.push(format!("regex {regex}"));
    }
    parts.join(" ")
}
