//! Names to addresses, on the main thread, for STRICT_DNS and LOGICAL_DNS.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
};

use crate::plan::{
    Address,
    cluster::{DnsLookupFamily, DnsOptions},
};

/// Resolves the names of one cluster.
pub(crate) struct Names {
    resolver: TokioResolver,
    refresh: Duration,
    respect_ttl: bool,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// In the server's order.
    pub(crate) addresses: Vec<IpAddr>,
    /// When to ask again.
    pub(crate) again: Duration,
}

impl Names {
    /// A resolver with the cluster's options. The error is the resolver's own text.
    pub(crate) fn new(options: &DnsOptions) -> Result<Self, String> {
        let mut builder = if options.resolvers.is_empty() {
            TokioResolver::builder_tokio().map_err(|error| error.to_string())?
        } else {
            let servers = options
                .resolvers
                .iter()
                .filter_map(Address::socket)
                .map(|address| {
                    let mut tcp = ConnectionConfig::tcp();
                    tcp.port = address.port();
                    let mut udp = ConnectionConfig::udp();
                    udp.port = address.port();
                    let both = if options.use_tcp {
                        vec![tcp]
                    } else {
                        vec![udp, tcp]
                    };
                    NameServerConfig::new(address.ip(), true, both)
                })
                .collect();
            TokioResolver::builder_with_config(
                ResolverConfig::from_parts(None, Vec::new(), servers),
                TokioRuntimeProvider::default(),
            )
        };
        let with = builder.options_mut();
        with.ip_strategy = match options.family {
            DnsLookupFamily::Auto => LookupIpStrategy::Ipv6thenIpv4,
            DnsLookupFamily::V4Only => LookupIpStrategy::Ipv4Only,
            DnsLookupFamily::V6Only => LookupIpStrategy::Ipv6Only,
            DnsLookupFamily::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
            DnsLookupFamily::All => LookupIpStrategy::Ipv4AndIpv6,
        };
        // The cluster has its own idea of when to ask again.
        with.cache_size = 0;
        with.use_hosts_file = ResolveHosts::Always;
        if options.search_domains {
            // Names of services have four dots and are still to be searched (Kubernetes' own `ndots:5`).
            with.ndots = with.ndots.max(5);
        }
        let resolver = builder.build().map_err(|error| error.to_string())?;
        Ok(Self {
            resolver,
            refresh: options.refresh_rate,
            respect_ttl: options.respect_ttl,
        })
    }

    /// Asks for a name. A name that does not exist has no address, which is an answer; the error is a failure to ask.
    pub(crate) async fn resolve(&self, name: &str) -> Result<Answer, String> {
        match self.resolver.lookup_ip(name).await {
            Ok(found) => {
                let ttl = found
                    .valid_until()
                    .saturating_duration_since(Instant::now());
                let again = if self.respect_ttl {
                    ttl.max(MIN_REFRESH)
                } else {
                    self.refresh
                };
                Ok(Answer {
                    addresses: found.iter().collect(),
                    again,
                })
            }
            Err(error) if error.is_no_records_found() || error.is_nx_domain() => Ok(Answer {
                addresses: Vec::new(),
                again: self.refresh,
            }),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// However short a TTL is.
const MIN_REFRESH: Duration = Duration::from_secs(1);
