//! The agent's name server (`DNS_PROXY_ADDR`, 127.0.0.1:15053): the rules lead the app's queries here.
//!
//! Names of the mesh are answered from the control plane's name table ([`table`]), without a query leaving the pod;
//! everything else is asked of the pod's own resolvers ([`upstream`]), whose answers pass as they are. [`wire`] reads
//! queries and writes answers, [`serve`] is the two transports.
//!
//! It runs on a thread of its own, so that a large configuration that the relay reads keeps no query waiting.

mod serve;
pub mod table;
mod upstream;
pub mod wire;

use std::{
    env, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::RwLock;
use tracing::{info, warn};

use crate::{AgentError, settings::Settings};
use table::{Place, Table};

/// What of the surroundings matters for names.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; both transports.
    pub listen: Vec<SocketAddr>,
    /// The pod's own resolvers, in order.
    pub servers: Vec<SocketAddr>,
    /// The proxy's namespace and the resolvers' search domains.
    pub place: Place,
    /// How long the resolvers may take all together (`DNS_FORWARD_TIMEOUT`, 5 s).
    pub timeout: Duration,
    /// Whether all resolvers are asked at once (`DNS_FORWARD_PARALLEL`).
    pub parallel: bool,
}

impl Options {
    /// From the environment and /etc/resolv.conf.
    pub fn read(settings: &Settings) -> Result<Options, AgentError> {
        let bad = |name: &str, value: &str, what: &str| {
            AgentError::Config(format!(
                "environment variable {name}: {value:?} is not {what}"
            ))
        };
        let address = env::var("DNS_PROXY_ADDR").unwrap_or_else(|_| "localhost:15053".into());
        let listen = match address.strip_prefix("localhost:") {
            Some(port) => {
                let port = port
                    .parse()
                    .map_err(|_| bad("DNS_PROXY_ADDR", &address, "HOST:PORT"))?;
                vec![
                    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
                    SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port),
                ]
            }
            None => vec![
                address
                    .parse()
                    .map_err(|_| bad("DNS_PROXY_ADDR", &address, "IP:PORT or localhost:PORT"))?,
            ],
        };
        let timeout = match env::var("DNS_FORWARD_TIMEOUT") {
            Ok(text) => crate::settings::duration(&text)
                .filter(|d| !d.is_zero())
                .ok_or_else(|| bad("DNS_FORWARD_TIMEOUT", &text, "a duration such as 5s"))?,
            Err(_) => Duration::from_secs(5),
        };
        let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_else(|e| {
            warn!("{RESOLV_CONF}: {e}; names outside the mesh cannot be resolved");
            String::new()
        });
        let (servers, search) = resolv_conf(&text);
        Ok(Options {
            // A resolver that is this server itself would be asked for ever.
            servers: servers
                .into_iter()
                .map(|ip| SocketAddr::new(ip, 53))
                .filter(|s| !listen.contains(s))
                .collect(),
            listen,
            place: Place {
                namespace: settings.namespace.clone(),
                search,
            },
            timeout,
            parallel: env::var("DNS_FORWARD_PARALLEL").is_ok_and(|v| v == "true"),
        })
    }
}

/// Name servers and search domains; as in resolv.conf(5) the last of `search` and `domain` counts.
fn resolv_conf(text: &str) -> (Vec<IpAddr>, Vec<String>) {
    let (mut servers, mut search) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let ip = words.next().and_then(|w| w.split('%').next());
                servers.extend(ip.and_then(|ip| ip.parse::<IpAddr>().ok()));
            }
            Some("search" | "domain") => search = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    (servers, search)
}

/// Figures of the name server, as pilot-agent names them.
#[derive(Debug, Default)]
pub struct Figures {
    /// Queries that came.
    pub requests: AtomicU64,
    /// Queries that were sent on to a resolver.
    pub upstream_requests: AtomicU64,
    /// Queries that no resolver answered in time.
    pub upstream_failures: AtomicU64,
    /// How long resolvers took: how many answers within each of [`BUCKETS`], and beyond.
    pub upstream_times: [AtomicU64; 7],
    /// Sum of those times in microseconds.
    pub upstream_micros: AtomicU64,
}

/// Upper bounds in seconds.
const BUCKETS: [f64; 6] = [0.001, 0.005, 0.01, 0.1, 1.0, 5.0];

impl Figures {
    fn took(&self, time: Duration) {
        let at = BUCKETS
            .iter()
            .position(|b| time.as_secs_f64() <= *b)
            .unwrap_or(BUCKETS.len());
        self.upstream_times[at].fetch_add(1, Ordering::Relaxed);
        self.upstream_micros
            .fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// In Prometheus' text form.
    pub fn text(&self) -> String {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let mut out = String::new();
        for (name, value) in [
            ("dns_requests_total", &self.requests),
            ("dns_upstream_requests_total", &self.upstream_requests),
            ("dns_upstream_failures_total", &self.upstream_failures),
        ] {
            out.push_str(&format!(
                "# TYPE istio_agent_{name} counter\nistio_agent_{name} {}\n",
                read(value)
            ));
        }
        let name = "istio_agent_dns_upstream_request_duration_seconds";
        out.push_str(&format!("# TYPE {name} histogram\n"));
        let mut sum = 0;
        for (i, count) in self.upstream_times.iter().enumerate() {
            sum += read(count);
            let le = BUCKETS.get(i).map_or("+Inf".into(), f64::to_string);
            out.push_str(&format!("{name}_bucket{{le=\"{le}\"}} {sum}\n"));
        }
        let seconds = read(&self.upstream_micros) as f64 / 1e6;
        out.push_str(&format!("{name}_sum {seconds}\n{name}_count {sum}\n"));
        out
    }
}

/// The name server as the rest of the agent sees it.
#[derive(Debug)]
pub struct Dns {
    place: Place,
    table: RwLock<Option<Arc<Table>>>,
    /// Where it listens.
    pub addresses: Vec<SocketAddr>,
    /// Figures for the scrape.
    pub figures: Figures,
}

impl Dns {
    /// Binds and serves on a thread of its own until the process ends.
    pub fn start(options: Options) -> Result<Arc<Dns>, AgentError> {
        let (sockets, addresses) = serve::bind(&options.listen)?;
        let dns = Arc::new(Dns {
            addresses,
            ..Dns::new(options.place.clone())
        });
        let shown: Vec<String> = options.servers.iter().map(ToString::to_string).collect();
        info!(
            "DNS: listening at {:?}, resolvers {}",
            dns.addresses,
            shown.join(", ")
        );
        let served = dns.clone();
        std::thread::Builder::new()
            .name("dns".into())
            .spawn(move || serve::run(sockets, served, options))
            .map_err(|source| AgentError::Listen {
                address: "DNS".into(),
                source,
            })?;
        Ok(dns)
    }

    /// Without a table yet.
    pub fn new(place: Place) -> Dns {
        Dns {
            place,
            table: RwLock::new(None),
            addresses: Vec::new(),
            figures: Figures::default(),
        }
    }

    /// Takes the control plane's table.
    pub fn update(&self, names: &proto::istio::networking::nds::v1::NameTable) {
        let table = Table::build(names, &self.place);
        info!("DNS: {} names", table.len());
        *self.table.write() = Some(Arc::new(table));
    }

    /// Whether a table has come: before that, queries get SERVFAIL.
    pub fn ready(&self) -> bool {
        self.table.read().is_some()
    }

    /// The table of this moment.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.table.read().clone()
    }
}

fn cannot_listen(address: impl std::fmt::Display) -> impl FnOnce(io::Error) -> AgentError {
    let address = format!("{address} (DNS)");
    move |source| AgentError::Listen { address, source }
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_search_line_counts() {
        let (servers, search) = resolv_conf(
            "# x\nsearch a b\nnameserver 10.96.0.10\nnameserver fe80::1%eth0\nnameserver bad\n\
             domain c\noptions ndots:5\n",
        );
        assert_eq!(servers.len(), 2);
        assert_eq!(search, ["c"]);
    }

    #[test]
    fn figures_are_cumulative() {
        let figures = Figures::default();
        figures.took(Duration::from_millis(3));
        figures.took(Duration::from_secs(9));
        let text = figures.text();
        assert!(text.contains("seconds_bucket{le=\"0.001\"} 0\n"), "{text}");
        assert!(text.contains("seconds_bucket{le=\"5\"} 1\n"), "{text}");
        assert!(text.contains("seconds_bucket{le=\"+Inf\"} 2\n"), "{text}");
        assert!(text.contains("seconds_sum 9.003\n"), "{text}");
    }
}
