//! `outrigger proxy-config`: what a proxy is configured with, as `istioctl proxy-config` prints it.
//!
//! The configuration comes from a dump: a file (`-f`), or the admin interface of a pod's proxy. Tables are those of
//! istioctl, byte for byte, since scripts read them; JSON and YAML are the resources themselves.

mod bootstrap;
mod clusters;
pub(crate) mod dump;
mod endpoints;
mod listeners;
mod matching;
mod routes;
pub(crate) mod table;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;

use self::dump::Dump;
use crate::pod;

/// Show what a proxy is configured with.
#[derive(Debug, Parser)]
#[command(name = "outrigger proxy-config", bin_name = "outrigger proxy-config")]
pub(crate) struct ProxyConfig {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Everything.
    #[command(visible_alias = "a")]
    All {
        #[command(flatten)]
        common: Common,
    },
    /// The configuration that the proxy started with.
    #[command(visible_alias = "b")]
    Bootstrap {
        #[command(flatten)]
        common: Common,
    },
    /// Clusters: groups of endpoints that requests are sent to.
    #[command(visible_aliases = ["clusters", "c"])]
    Cluster {
        #[command(flatten)]
        common: Common,
        /// Only clusters whose name holds this host.
        #[arg(long, default_value = "")]
        fqdn: String,
        /// Only clusters of this direction: inbound or outbound.
        #[arg(long, default_value = "")]
        direction: String,
        /// Only clusters of this subset.
        #[arg(long, default_value = "")]
        subset: String,
        /// Only clusters of this port.
        #[arg(long, default_value_t = 0)]
        port: u16,
    },
    /// Endpoints: the addresses behind clusters.
    #[command(visible_aliases = ["endpoints", "ep"])]
    Endpoint {
        #[command(flatten)]
        common: Common,
        /// Only this address.
        #[arg(long, default_value = "")]
        address: String,
        /// Only this port.
        #[arg(long, default_value_t = 0)]
        port: u16,
        /// Only endpoints of this cluster.
        #[arg(long, default_value = "")]
        cluster: String,
        /// Only endpoints of this status: healthy, unhealthy …
        #[arg(long, default_value = "")]
        status: String,
    },
    /// Listeners: where connections are taken, and what becomes of them.
    #[command(visible_aliases = ["listeners", "l"])]
    Listener {
        #[command(flatten)]
        common: Common,
        /// Only listeners of this address.
        #[arg(long, default_value = "")]
        address: String,
        /// Only listeners of this port.
        #[arg(long, default_value_t = 0)]
        port: u16,
        /// Only listeners of this type: HTTP, TCP, HTTP+TCP or UNKNOWN.
        #[arg(long = "type", default_value = "")]
        kind: String,
        /// One row for each filter chain; `--verbose=false` gives one for each listener.
        #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
        verbose: bool,
    },
    /// Where a call would end: listener, filter chain, virtual host, route, cluster, or the error.
    Match(matching::Match),
    /// Routes: which request goes to which cluster.
    #[command(visible_aliases = ["routes", "r"])]
    Route {
        #[command(flatten)]
        common: Common,
        /// Only the route configuration of this name.
        #[arg(long, default_value = "")]
        name: String,
        /// One row for each route; `--verbose=false` gives one for each route configuration.
        #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
        verbose: bool,
    },
}

/// Flags of every subcommand.
#[derive(Debug, Args)]
struct Common {
    /// POD, POD.NAMESPACE, deploy/NAME[.NAMESPACE]; not needed with -f.
    pod: Option<String>,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// How to print it.
    #[arg(short, long, default_value = "short")]
    output: Output,
    /// Read this config dump instead of asking a pod; - is standard input.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Headings of an older release: 1.13.
    #[arg(long, default_value = "")]
    compat: String,
    /// Port of the proxy's admin interface.
    #[arg(long, default_value_t = 15000)]
    proxy_admin_port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    #[value(alias = "table")]
    Short,
    Yaml,
}

/// Runs the command line; `args[0]` is the command's own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(ProxyConfig::try_parse_from(args), run)
}

fn run(command: ProxyConfig) -> anyhow::Result<()> {
    match command.what {
        What::All { common } => {
            let dump = common.dump()?;
            match common.output {
                Output::Short => all(&dump),
                output => print_value(&dump.raw(), output),
            }
        }
        What::Bootstrap { common } => {
            let dump = common.dump()?;
            match common.output {
                // istioctl prints JSON here where nothing is asked for; `short` is the versions.
                Output::Short if common.asked_short() => print!("{}", bootstrap::versions(&dump)),
                Output::Yaml => print_value(&bootstrap::resource(&dump)?, Output::Yaml),
                _ => print_value(&bootstrap::resource(&dump)?, Output::Json),
            }
        }
        What::Cluster {
            common,
            fqdn,
            direction,
            subset,
            port,
        } => {
            let filter = clusters::Filter {
                fqdn,
                direction,
                subset,
                port,
            };
            let clusters = clusters::select(&common.dump()?, &filter)?;
            common.print(clusters::table(&clusters, false), clusters);
        }
        What::Endpoint {
            common,
            address,
            port,
            cluster,
            status,
        } => {
            let filter = endpoints::Filter {
                address,
                port,
                cluster,
                status,
            };
            if common.compat == "1.13" {
                let text = common.admin("/clusters?format=json")?;
                return print_legacy_endpoints(&text, &filter, common.output);
            }
            let dump = common.dump()?;
            match common.output {
                Output::Short => print!("{}", endpoints::table(&dump, &filter, false)?),
                output => print_value(&endpoints::select(&dump, &filter)?.into(), output),
            }
        }
        What::Listener {
            common,
            address,
            port,
            kind,
            verbose,
        } => {
            let filter = listeners::Filter {
                address,
                port,
                kind,
            };
            let listeners = listeners::select(&common.dump()?, &filter)?;
            let old = common.compat == "1.13";
            common.print(listeners::table(&listeners, verbose, old, false), listeners);
        }
        What::Match(arguments) => matching::run(arguments)?,
        What::Route {
            common,
            name,
            verbose,
        } => {
            let routes = routes::select(&common.dump()?, &name)?;
            common.print(routes::table(&routes, verbose, false), routes);
        }
    }
    Ok(())
}

impl Common {
    fn dump(&self) -> anyhow::Result<Dump> {
        if !matches!(self.compat.as_str(), "" | "1.13") {
            anyhow::bail!("--compat {:?}: only 1.13 is known", self.compat);
        }
        match &self.file {
            Some(path) => Dump::read(path),
            None => Dump::parse(
                &self.admin("/config_dump?include_eds=true")?,
                "config dump of the pod",
            ),
        }
    }

    fn admin(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let Some(pod) = &self.pod else {
            anyhow::bail!(
                "name a pod (POD, POD.NAMESPACE or deploy/NAME), or give a config dump with -f"
            );
        };
        pod::admin(pod, self.namespace.as_deref(), self.proxy_admin_port, path)
    }

    fn print(&self, table: String, resources: Vec<Value>) {
        match self.output {
            Output::Short => print!("{table}"),
            output => print_value(&resources.into(), output),
        }
    }

    /// Whether `-o short` was typed rather than left out.
    fn asked_short(&self) -> bool {
        std::env::args().any(|a| a == "short" || a == "-oshort" || a == "--output=short")
    }
}

/// All tables, each row marked with its kind.
fn all(dump: &Dump) {
    print!("{}", bootstrap::versions(dump));
    println!();
    if let Ok(clusters) = clusters::select(dump, &clusters::Filter::default()) {
        println!("{}", clusters::table(&clusters, true));
    }
    if let Ok(listeners) = listeners::select(dump, &listeners::Filter::default()) {
        println!("{}", listeners::table(&listeners, true, false, true));
    }
    if let Ok(routes) = routes::select(dump, "") {
        println!("{}", routes::table(&routes, true, true));
    }
    println!("No active or warming secrets found.\n");
    if let Ok(table) = endpoints::table(dump, &endpoints::Filter::default(), true) {
        print!("{table}");
    }
}

fn print_legacy_endpoints(
    text: &[u8],
    filter: &endpoints::Filter,
    output: Output,
) -> anyhow::Result<()> {
    let statuses = endpoints::statuses(text, filter)?;
    match output {
        Output::Short => print!("{}", endpoints::legacy_table(&statuses)),
        output => print_value(&statuses.into(), output),
    }
    Ok(())
}

fn print_value(value: &Value, output: Output) {
    match output {
        Output::Yaml => print!("{}", proto::json::value_to_yaml(value)),
        _ => println!("{}", dump::indented(value)),
    }
}
