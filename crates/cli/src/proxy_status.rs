//! `outrigger proxy-status`: how far each proxy is with the configuration, and what is wrong.
//!
//! The table is istioctl's, with a column for each type. Below it stand the rejections, with the objects behind the
//! rejected resources and their file and line, and the mistakes in the configuration files.

use std::{
    ffi::OsString,
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use serde_json::Value;

use crate::{
    pod,
    proxy_config::{dump, table::Table},
};

/// Show how far each proxy is with its configuration.
#[derive(Debug, Parser)]
#[command(name = "outrigger proxy-status", bin_name = "outrigger proxy-status")]
pub(crate) struct ProxyStatus {
    /// Only this proxy: POD or POD.NAMESPACE.
    pod: Option<String>,
    /// Only proxies of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// How to print it.
    #[arg(short, long, default_value = "table")]
    output: Output,
    /// Monitoring address of the control plane, HOST:15014; the local mesh's where it is left out.
    #[arg(long)]
    xds_address: Option<String>,
    /// Wait until every proxy is synced, up to this many seconds (30 where no number is given).
    #[arg(long, num_args = 0..=1, default_missing_value = "30")]
    wait: Option<u64>,
    /// Columns of an older release: 1.13.
    #[arg(long, default_value = "")]
    compat: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    #[value(alias = "short")]
    Table,
    Yaml,
}

/// Runs the command line; `args[0]` is the command's own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(ProxyStatus::try_parse_from(args), run)
}

fn run(command: ProxyStatus) -> anyhow::Result<()> {
    if !matches!(command.compat.as_str(), "" | "1.13") {
        bail!("--compat {:?}: only 1.13 is known", command.compat);
    }
    let end = Instant::now() + Duration::from_secs(command.wait.unwrap_or(0));
    let proxies = loop {
        let proxies = command.proxies()?;
        let synced = !proxies.is_empty() && proxies.iter().all(is_synced);
        if synced || Instant::now() >= end {
            if command.wait.is_some() && !synced {
                print(&command, &proxies)?;
                bail!("not every proxy is synced");
            }
            break proxies;
        }
        sleep(Duration::from_millis(100));
    };
    print(&command, &proxies)
}

impl ProxyStatus {
    fn proxies(&self) -> anyhow::Result<Vec<Value>> {
        let answer = pod::control_plane(self.xds_address.as_deref(), "/debug/syncz")?;
        let all: Vec<Value> =
            serde_json::from_slice(&answer).context("/debug/syncz of the control plane")?;
        let mut wanted: Vec<Value> = all.into_iter().filter(|p| self.wants(p)).collect();
        wanted.sort_by_key(|p| dump::text(p, "/proxy").to_owned());
        if let Some(pod) = &self.pod
            && wanted.is_empty()
        {
            bail!(
                "no proxy {pod:?} is connected to the control plane: `outrigger proxy-status` lists those that are"
            );
        }
        Ok(wanted)
    }

    fn wants(&self, proxy: &Value) -> bool {
        let name = dump::text(proxy, "/proxy");
        let (pod, namespace) = name.split_once('.').unwrap_or((name, ""));
        self.pod.as_ref().is_none_or(|p| p == name || p == pod)
            && self.namespace.as_ref().is_none_or(|n| n == namespace)
    }
}

fn print(command: &ProxyStatus, proxies: &[Value]) -> anyhow::Result<()> {
    match command.output {
        Output::Json => println!("{}", dump::indented(&proxies.into())),
        Output::Yaml => print!("{}", proto::json::value_to_yaml(&proxies.into())),
        Output::Table => {
            print!("{}", table(proxies, command.compat == "1.13"));
            for line in proxies.iter().flat_map(rejections) {
                println!("\n{line}");
            }
            let answer = pod::control_plane(command.xds_address.as_deref(), "/debug/problems")?;
            let problems: Vec<Value> =
                serde_json::from_slice(&answer).context("/debug/problems of the control plane")?;
            for problem in &problems {
                println!("\n{}", describe_problem(problem));
            }
        }
    }
    Ok(())
}

/// Types with a column, by their short name.
const TYPES: [(&str, &str); 5] = [
    ("CDS", xds::type_url::CDS),
    ("LDS", xds::type_url::LDS),
    ("EDS", xds::type_url::EDS),
    ("RDS", xds::type_url::RDS),
    ("ECDS", xds::type_url::ECDS),
];

fn table(proxies: &[Value], old: bool) -> String {
    let types = TYPES.iter().map(|(name, _)| *name);
    let mut heading = vec!["NAME", "CLUSTER"];
    if old {
        heading.extend(types);
        heading.extend(["ISTIOD", "VERSION"]);
    } else {
        heading.extend(["ISTIOD", "VERSION"]);
        heading.extend(types);
    }
    let mut table = Table::new(&heading);
    for proxy in proxies {
        let own = |key: &str| dump::text(proxy, key).to_owned();
        let states = TYPES.iter().map(|(_, url)| state(proxy, url).to_owned());
        let istiod = match dump::text(proxy, "/istiod") {
            "" => "istiod".to_owned(),
            name => name.to_owned(),
        };
        let last = [istiod, own("/istio_version")];
        let mut row = vec![own("/proxy"), own("/cluster_id")];
        if old {
            row.extend(states);
            row.extend(last);
        } else {
            row.extend(last);
            row.extend(states);
        }
        table.row(row);
    }
    table.render(5)
}

fn state<'a>(proxy: &'a Value, type_url: &str) -> &'a str {
    let one = &proxy["resources"][type_url];
    let (sent, acked) = (dump::text(one, "/sent"), dump::text(one, "/acked"));
    if one.get("lastError").is_some() {
        "ERROR"
    } else if sent.is_empty() {
        "NOT SENT"
    } else if sent == acked {
        "SYNCED"
    } else {
        "STALE"
    }
}

/// Every type that the proxy asked for is there, and accepted.
fn is_synced(proxy: &Value) -> bool {
    let asked = TYPES
        .iter()
        .filter(|(_, url)| proxy["resources"].get(*url).is_some());
    let mut states = asked.map(|(_, url)| state(proxy, url)).peekable();
    states.peek().is_some()
        && states.all(|s| matches!(s, "NOT SENT" | "SYNCED"))
        && state(proxy, TYPES[0].1) == "SYNCED"
        && state(proxy, TYPES[1].1) == "SYNCED"
}

fn rejections(proxy: &Value) -> Vec<String> {
    let mut out = Vec::new();
    for (name, url) in TYPES {
        let detail = &proxy["resources"][url]["lastErrorDetail"];
        if detail.is_null() {
            continue;
        }
        let mut text = format!(
            "{}: {name} rejected: {}",
            dump::text(proxy, "/proxy"),
            dump::text(detail, "/message")
        );
        for resource in dump::list(detail, "/resources") {
            for from in dump::list(resource, "/from") {
                text.push_str(&format!(
                    "\n  {} comes from {} {}/{} ({}:{})",
                    dump::text(resource, "/name"),
                    dump::text(from, "/kind"),
                    dump::text(from, "/namespace"),
                    dump::text(from, "/name"),
                    dump::text(from, "/file"),
                    from["line"],
                ));
            }
        }
        out.push(text);
    }
    out
}

fn describe_problem(problem: &Value) -> String {
    let mut out = format!(
        "{}: {}:{}: ",
        dump::text(problem, "/severity"),
        dump::text(problem, "/file"),
        problem["line"]
    );
    let object = dump::text(problem, "/object");
    if !object.is_empty() {
        out.push_str(&format!("{object}: "));
    }
    let field = dump::text(problem, "/field");
    if !field.is_empty() {
        out.push_str(&format!("{field}: "));
    }
    out + dump::text(problem, "/message")
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use xds::type_url::{CDS, EDS, LDS};

    use super::*;

    fn proxy(cds: Value) -> Value {
        json!({"proxy": "web.shop", "cluster_id": "Kubernetes", "istio_version": "1.30.0", "resources": {
            CDS: cds, LDS: {"sent": "2", "acked": "2"}, EDS: {"sent": "3"}}})
    }

    #[test]
    fn states_follow_what_was_sent_and_accepted() {
        let one = proxy(json!({"sent": "1", "acked": "1"}));
        assert_eq!(
            table(std::slice::from_ref(&one), true),
            "NAME         CLUSTER        CDS        LDS        EDS       RDS          ECDS         ISTIOD     VERSION\n\
             web.shop     Kubernetes     SYNCED     SYNCED     STALE     NOT SENT     NOT SENT     istiod     1.30.0\n"
        );
        assert!(!is_synced(&one), "EDS is stale");
    }

    #[test]
    fn a_rejection_names_object_file_and_line() {
        let one = proxy(
            json!({"sent": "1", "acked": "0", "lastError": "x", "lastErrorDetail": {
            "message": "c: connect_timeout: negative",
            "resources": [{"name": "c", "from": [{"kind": "DestinationRule", "namespace": "shop", "name": "web",
                "file": "dr.yaml", "line": 7}]}]}}),
        );
        assert_eq!(state(&one, CDS), "ERROR");
        assert_eq!(
            rejections(&one),
            [
                "web.shop: CDS rejected: c: connect_timeout: negative\n  c comes from DestinationRule shop/web (dr.yaml:7)"
            ]
        );
    }
}
