//! Clusters.

use std::{sync::Arc, time::Duration};

use proto::envoy::{
    config::{
        cluster::v3::{self as pb, cluster as nested},
        core::v3 as core,
    },
    extensions::{
        clusters::{aggregate::v3 as aggregate, common::dns::v3 as common_dns, dns::v3 as dns_pb},
        network::dns_resolver::cares::v3::CaresDnsResolverConfig,
    },
};

use super::{
    common::{
        Extension, above_zero, address, ads_source, duration, enumeration, extension, json,
        metadata, percent, positive, typed_config,
    },
    endpoint::load_assignment,
    health_check::health_check,
    lb::load_balancing,
    network::metadata_exchange,
    outlier::outlier_detection,
    route::option,
    socket::{bind_config, proxy_protocol_transport},
    tls::upstream_tls,
    upstream_http::{Legacy, protocol_options},
};
use crate::plan::{
    bootstrap::ConfigSource,
    cluster::{
        CircuitBreakers, Cluster, Discovery, DnsLookupFamily, DnsOptions, RetryBudget,
        TcpKeepalive, Thresholds, TransportMatch, UpstreamTransport,
    },
    endpoint::ClusterLoadAssignment,
    error::{At, Step, unsupported},
    http_filter::MetadataExchange,
    matcher::Percent,
};

/// How often names are looked up again, unless the cluster says otherwise (Envoy's default).
const DNS_REFRESH_RATE: Duration = Duration::from_secs(5);

/// `Cluster`.
pub(super) fn cluster(at: At<'_>, m: &pb::Cluster) -> Step<Cluster> {
    let pb::Cluster {
        transport_socket_matches,
        transport_socket_matcher,
        name,
        alt_stat_name,
        eds_cluster_config,
        connect_timeout,
        per_connection_buffer_limit_bytes,
        // Read in lb.rs.
        lb_policy: _,
        load_assignment: assignment,
        health_checks: checks,
        max_requests_per_connection,
        circuit_breakers: breakers,
        upstream_http_protocol_options,
        common_http_protocol_options,
        http_protocol_options,
        http2_protocol_options,
        typed_extension_protocol_options,
        dns_refresh_rate,
        dns_jitter,
        dns_failure_refresh_rate,
        respect_dns_ttl,
        dns_lookup_family,
        dns_resolvers,
        use_tcp_for_dns_lookups,
        dns_resolution_config,
        typed_dns_resolver_config,
        // Whoever refers to a cluster waits for its first addresses and checks in any case.
        wait_for_warm_on_init: _,
        outlier_detection: outlier,
        cleanup_interval,
        upstream_bind_config,
        lb_subset_config: _,
        common_lb_config: _,
        transport_socket,
        metadata: free,
        protocol_selection,
        upstream_connection_options,
        close_connections_on_host_health_failure,
        ignore_health_on_host_removal,
        filters,
        load_balancing_policy: _,
        lrs_server: _,
        lrs_report_endpoint_metrics: _,
        track_timeout_budgets: _,
        upstream_config,
        track_cluster_stats: _,
        preconnect_policy,
        connection_pool_per_downstream_connection,
        cluster_discovery_type,
        lb_config: _,
        stats_matcher,
        per_connection_buffer_high_watermark_timeout,
        queuing_policies,
    } = m;
    unsupported!(
        at,
        transport_socket_matcher,
        dns_resolution_config,
        upstream_config,
        preconnect_policy,
        stats_matcher,
        per_connection_buffer_high_watermark_timeout,
        queuing_policies,
    );
    let name = at.text("name", name);
    let dns = DnsOptions {
        refresh_rate: above_zero(&at, "dns_refresh_rate", dns_refresh_rate)?
            .unwrap_or(DNS_REFRESH_RATE),
        jitter: at
            .optional("dns_jitter", dns_jitter, duration)?
            .unwrap_or_default(),
        failure_refresh: at.optional(
            "dns_failure_refresh_rate",
            dns_failure_refresh_rate,
            refresh,
        )?,
        respect_ttl: *respect_dns_ttl,
        family: match enumeration(&at, "dns_lookup_family", *dns_lookup_family)? {
            nested::DnsLookupFamily::Auto => DnsLookupFamily::Auto,
            nested::DnsLookupFamily::V4Only => DnsLookupFamily::V4Only,
            nested::DnsLookupFamily::V6Only => DnsLookupFamily::V6Only,
            nested::DnsLookupFamily::V4Preferred => DnsLookupFamily::V4Preferred,
            nested::DnsLookupFamily::All => DnsLookupFamily::All,
        },
        resolvers: at.each("dns_resolvers", dns_resolvers, |at, m| {
            address(at, m, false)
        }),
        use_tcp: *use_tcp_for_dns_lookups,
        search_domains: true,
    };
    let dns = dns_resolver(&at, dns, typed_dns_resolver_config);
    let discovery = dns.and_then(|dns| {
        discovery(
            &at,
            m,
            cluster_discovery_type,
            eds_cluster_config,
            assignment,
            dns,
            cleanup_interval,
        )
    });
    let provided = matches!(
        discovery,
        Ok(Discovery::OriginalDst { .. } | Discovery::Aggregate(_))
    );
    let lb = load_balancing(&at, m, provided);
    let mut checks = at.each("health_checks", checks, health_check);
    if checks.len() > 1 {
        at.field("health_checks")
            .not_implemented("several checks of a host are not implemented; write one");
    }
    let legacy = Legacy {
        upstream: upstream_http_protocol_options,
        common: common_http_protocol_options,
        http1: http_protocol_options,
        http2: http2_protocol_options,
        selection: *protocol_selection,
    };
    let protocol = protocol_options(&at, typed_extension_protocol_options, legacy);
    let transport = at.optional("transport_socket", transport_socket, upstream_transport);
    let matches = at.each(
        "transport_socket_matches",
        transport_socket_matches,
        |at, m| {
            let nested::TransportSocketMatch {
                name,
                r#match,
                transport_socket,
            } = m;
            let criteria = r#match.iter().flat_map(|m| match json(m) {
                serde_json::Value::Object(members) => members,
                _ => serde_json::Map::new(),
            });
            let mut criteria: Vec<_> = criteria.map(|(k, v)| (Arc::from(k), v)).collect();
            criteria.sort_by(|a: &(Arc<str>, _), b| a.0.cmp(&b.0));
            Ok(TransportMatch {
                name: at.text("name", name)?,
                criteria,
                transport_socket: at.required(
                    "transport_socket",
                    transport_socket,
                    upstream_transport,
                )?,
            })
        },
    );
    let mut exchange = None;
    at.each("filters", filters, |at, m| {
        exchange = Some(cluster_filter(at, m)?);
        Ok(())
    });
    let bind = at.optional("upstream_bind_config", upstream_bind_config, bind_config);
    let outlier = at.optional("outlier_detection", outlier, outlier_detection);
    let keepalive = at.optional(
        "upstream_connection_options",
        upstream_connection_options,
        |at, m| {
            let pb::UpstreamConnectionOptions {
                tcp_keepalive,
                // Only a name in a debug log.
                set_local_interface_name_on_upstream_connections: _,
                happy_eyeballs_config: _,
            } = m;
            Ok(tcp_keepalive.as_ref().map(|m| keepalive(at, m)))
        },
    );
    let breakers = at.optional("circuit_breakers", breakers, circuit_breakers);
    let lb = lb?;
    let mut protocol = protocol?;
    if protocol.http.max_requests_per_connection.is_none() {
        protocol.http.max_requests_per_connection = max_requests_per_connection.filter(|n| *n > 0);
    }
    Ok(Cluster {
        name: name?,
        alt_stat_name: option(alt_stat_name),
        discovery: discovery?,
        connect_timeout: above_zero(&at, "connect_timeout", connect_timeout)?
            .unwrap_or(Duration::from_secs(5)),
        lb_policy: lb.policy,
        lb: lb.common,
        subsets: lb.subsets,
        override_sources: lb.override_sources,
        circuit_breakers: breakers?.unwrap_or_else(default_breakers),
        protocol: protocol.protocol,
        http: protocol.http,
        http1: protocol.http1,
        http2: protocol.http2,
        auto_sni: protocol.auto_sni,
        health_check: checks.pop(),
        outlier_detection: outlier?,
        transport_socket: transport?.unwrap_or(UpstreamTransport::RawBuffer),
        transport_socket_matches: matches,
        bind: bind?,
        tcp_keepalive: keepalive?.flatten(),
        metadata_exchange: exchange,
        per_connection_buffer_limit: per_connection_buffer_limit_bytes.unwrap_or(1 << 20),
        close_connections_on_host_health_failure: *close_connections_on_host_health_failure,
        ignore_health_on_host_removal: *ignore_health_on_host_removal,
        connection_pool_per_downstream_connection: *connection_pool_per_downstream_connection,
        metadata: metadata(free),
    })
}

#[allow(clippy::too_many_arguments)] // Fields of one message, taken apart above.
fn discovery(
    at: &At<'_>,
    m: &pb::Cluster,
    kind: &Option<nested::ClusterDiscoveryType>,
    eds: &Option<nested::EdsClusterConfig>,
    assignment: &Option<proto::envoy::config::endpoint::v3::ClusterLoadAssignment>,
    dns: DnsOptions,
    cleanup_interval: &Option<proto::Duration>,
) -> Step<Discovery> {
    use nested::{ClusterDiscoveryType as T, DiscoveryType as D};
    let (kind, dns) = match kind {
        None => (D::Static, dns),
        Some(T::Type(kind)) => (enumeration(at, "type", *kind)?, dns),
        Some(T::ClusterType(m)) => {
            let at = at.field("cluster_type");
            let found = typed_config(&at, &m.typed_config, "cluster type")?;
            let at = at.field("typed_config");
            match found.name.as_str() {
                "envoy.extensions.clusters.dns.v3.DnsCluster" => {
                    dns_cluster(at, &found.decode(&at)?)?
                }
                _ => return cluster_type(at, &found),
            }
        }
    };
    // A STATIC cluster without endpoints is legal (BlackHoleCluster).
    let endpoints = |names: bool| -> Step<Arc<ClusterLoadAssignment>> {
        let planned = at.optional("load_assignment", assignment, |at, m| {
            load_assignment(at, m, names)
        })?;
        Ok(Arc::new(planned.unwrap_or_else(|| ClusterLoadAssignment {
            cluster_name: m.name.as_str().into(),
            localities: Vec::new(),
            overprovisioning_factor: 140,
            weighted_priority_health: false,
            endpoint_stale_after: None,
            drop_overloads: Vec::new(),
        })))
    };
    if kind == D::Eds && assignment.is_some() {
        at.field("load_assignment")
            .error("cannot be given for type EDS");
    }
    if kind != D::Eds && eds.is_some() {
        at.field("eds_cluster_config")
            .error("can only be given for type EDS");
    }
    match kind {
        D::Static => Ok(Discovery::Static(endpoints(false)?)),
        D::StrictDns => Ok(Discovery::StrictDns {
            load_assignment: endpoints(true)?,
            dns,
        }),
        D::LogicalDns => {
            let load_assignment = endpoints(true)?;
            if load_assignment.endpoints().count() != 1 {
                return Err(at
                    .field("load_assignment")
                    .error("needs exactly one endpoint for type LOGICAL_DNS"));
            }
            Ok(Discovery::LogicalDns {
                load_assignment,
                dns,
            })
        }
        D::Eds => {
            let Some(eds) = eds else {
                return Err(at
                    .field("eds_cluster_config")
                    .error("is required for type EDS"));
            };
            let at = at.field("eds_cluster_config");
            let service_name = match eds.service_name.as_str() {
                "" => m.name.as_str(),
                name => name,
            };
            let source: ConfigSource = at.required("eds_config", &eds.eds_config, ads_source)?;
            Ok(Discovery::Eds {
                service_name: service_name.into(),
                source,
            })
        }
        D::OriginalDst => {
            if assignment.is_some() {
                return Err(at
                    .field("load_assignment")
                    .error("cannot be given for type ORIGINAL_DST"));
            }
            let interval = above_zero(at, "cleanup_interval", cleanup_interval)?;
            let mut planned = Discovery::OriginalDst {
                port_override: None,
                http_header: None,
                cleanup_interval: interval.unwrap_or(Duration::from_secs(5)),
            };
            if let (
                Some(nested::LbConfig::OriginalDstLbConfig(m)),
                Discovery::OriginalDst {
                    port_override,
                    http_header,
                    ..
                },
            ) = (&m.lb_config, &mut planned)
            {
                let at = at.field("original_dst_lb_config");
                let metadata_key = &m.metadata_key;
                unsupported!(at, metadata_key);
                if m.use_http_header {
                    let name = option(&m.http_header_name);
                    let name = name.unwrap_or_else(|| "x-envoy-original-dst-host".into());
                    *http_header = Some(name.to_ascii_lowercase().into());
                }
                *port_override = at.optional(
                    "upstream_port_override",
                    &m.upstream_port_override,
                    |at, p| u16::try_from(*p).map_err(|_| at.error("must be at most 65535")),
                )?;
            }
            Ok(planned)
        }
    }
}

/// `DnsCluster`, the newer form of STRICT_DNS and LOGICAL_DNS: its options count, not those of the cluster.
fn dns_cluster(at: At<'_>, m: &dns_pb::DnsCluster) -> Step<(nested::DiscoveryType, DnsOptions)> {
    use common_dns::DnsLookupFamily as F;
    let dns_pb::DnsCluster {
        dns_refresh_rate,
        dns_failure_refresh_rate,
        respect_dns_ttl,
        dns_jitter,
        typed_dns_resolver_config,
        dns_lookup_family,
        all_addresses_in_single_endpoint,
        dns_min_refresh_rate,
    } = m;
    unsupported!(at, dns_min_refresh_rate);
    let failure = dns_failure_refresh_rate
        .as_ref()
        .map(|m| nested::RefreshRate {
            base_interval: m.base_interval,
            max_interval: m.max_interval,
        });
    let dns = DnsOptions {
        refresh_rate: above_zero(&at, "dns_refresh_rate", dns_refresh_rate)?
            .unwrap_or(DNS_REFRESH_RATE),
        jitter: at
            .optional("dns_jitter", dns_jitter, duration)?
            .unwrap_or_default(),
        failure_refresh: at.optional("dns_failure_refresh_rate", &failure, refresh)?,
        respect_ttl: *respect_dns_ttl,
        family: match enumeration(&at, "dns_lookup_family", *dns_lookup_family)? {
            F::Unspecified | F::Auto => DnsLookupFamily::Auto,
            F::V4Only => DnsLookupFamily::V4Only,
            F::V6Only => DnsLookupFamily::V6Only,
            F::V4Preferred => DnsLookupFamily::V4Preferred,
            F::All => DnsLookupFamily::All,
        },
        resolvers: Vec::new(),
        use_tcp: false,
        search_domains: true,
    };
    let kind = match all_addresses_in_single_endpoint {
        true => nested::DiscoveryType::LogicalDns,
        false => nested::DiscoveryType::StrictDns,
    };
    Ok((kind, dns_resolver(&at, dns, typed_dns_resolver_config)?))
}

/// `CustomClusterType`, its configuration.
fn cluster_type(at: At<'_>, found: &Extension<'_>) -> Step<Discovery> {
    match found.name.as_str() {
        "envoy.extensions.clusters.aggregate.v3.ClusterConfig" => {
            let m: aggregate::ClusterConfig = found.decode(&at)?;
            if m.clusters.is_empty() {
                return Err(at.field("clusters").error("needs at least one cluster"));
            }
            let name = |at: At<'_>, name: &String| match name.as_str() {
                "" => Err(at.error("must not be empty")),
                name => Ok(Arc::from(name)),
            };
            Ok(Discovery::Aggregate(at.each("clusters", &m.clusters, name)))
        }
        _ => Err(found.unknown(&at, "cluster type")),
    }
}

fn refresh(at: At<'_>, m: &nested::RefreshRate) -> Step<(Duration, Duration)> {
    let Some(base) = above_zero(&at, "base_interval", &m.base_interval)? else {
        return Err(at.field("base_interval").error("is required"));
    };
    Ok((
        base,
        above_zero(&at, "max_interval", &m.max_interval)?.unwrap_or(base * 10),
    ))
}

/// Options of the named resolvers that mean something to ours; the choice of a resolver itself is without effect.
fn dns_resolver(
    at: &At<'_>,
    mut dns: DnsOptions,
    m: &Option<core::TypedExtensionConfig>,
) -> Step<DnsOptions> {
    let Some(m) = m else { return Ok(dns) };
    let at = at.field("typed_dns_resolver_config");
    let found = typed_config(&at, &m.typed_config, "resolver")?;
    let at = at.field("typed_config");
    match found.name.as_str() {
        "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig" => {
            let m: CaresDnsResolverConfig = found.decode(&at)?;
            let given = at.each("resolvers", &m.resolvers, |at, m| address(at, m, false));
            if !given.is_empty() {
                dns.resolvers = given;
            }
            if let Some(options) = m.dns_resolver_options {
                dns.use_tcp |= options.use_tcp_for_dns_lookups;
                dns.search_domains = !options.no_default_search_domain;
            }
            Ok(dns)
        }
        "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig" => {
            Ok(dns)
        }
        _ => Err(found.unknown(&at, "DNS resolver")),
    }
}

fn default_breakers() -> CircuitBreakers {
    CircuitBreakers {
        default: Thresholds::default(),
        high: Thresholds::default(),
        per_host_max_connections: None,
    }
}

fn circuit_breakers(at: At<'_>, m: &pb::CircuitBreakers) -> Step<CircuitBreakers> {
    let mut planned = default_breakers();
    let list = at.each("thresholds", &m.thresholds, |at, m| {
        let priority: core::RoutingPriority = enumeration(&at, "priority", m.priority)?;
        let usual = Thresholds::default();
        let budget = at.optional("retry_budget", &m.retry_budget, |at, m| {
            Ok(RetryBudget {
                interval: positive(&at, "budget_interval", &m.budget_interval)?,
                budget: at
                    .optional("budget_percent", &m.budget_percent, percent)?
                    .unwrap_or(Percent::whole(20)),
                min_retry_concurrency: m.min_retry_concurrency.unwrap_or(3),
            })
        })?;
        let thresholds = Thresholds {
            max_connections: m.max_connections.unwrap_or(usual.max_connections),
            max_pending_requests: m.max_pending_requests.unwrap_or(usual.max_pending_requests),
            max_requests: m.max_requests.unwrap_or(usual.max_requests),
            max_retries: m.max_retries.unwrap_or(usual.max_retries),
            retry_budget: budget,
            track_remaining: m.track_remaining,
            max_connection_pools: m.max_connection_pools,
        };
        Ok((priority, thresholds))
    });
    // Of two for one priority the first counts, as in Envoy.
    for (priority, thresholds) in list.into_iter().rev() {
        match priority {
            core::RoutingPriority::Default => planned.default = thresholds,
            core::RoutingPriority::High => planned.high = thresholds,
        }
    }
    planned.per_host_max_connections = m
        .per_host_thresholds
        .first()
        .and_then(|t| t.max_connections);
    Ok(planned)
}

pub(super) fn upstream_transport(at: At<'_>, m: &core::TransportSocket) -> Step<UpstreamTransport> {
    let Some(core::transport_socket::ConfigType::TypedConfig(any)) = &m.config_type else {
        // By name alone raw_buffer was legal once.
        return match m.name.as_str() {
            "envoy.transport_sockets.raw_buffer" => Ok(UpstreamTransport::RawBuffer),
            _ => Err(at
                .field("typed_config")
                .error("is required: the configuration of this transport socket with its @type")),
        };
    };
    let at = at.field("typed_config");
    let found = extension(&at, any)?;
    match found.name.as_str() {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => {
            Ok(UpstreamTransport::RawBuffer)
        }
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            let tls = upstream_tls(at, &found.decode(&at)?)?;
            Ok(UpstreamTransport::Tls(Arc::new(tls)))
        }
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
            let proxy = proxy_protocol_transport(at, &found.decode(&at)?)?;
            Ok(UpstreamTransport::ProxyProtocol(Arc::new(proxy)))
        }
        _ => Err(found.unknown(&at, "transport socket")),
    }
}

fn keepalive(_: At<'_>, m: &core::TcpKeepalive) -> TcpKeepalive {
    let seconds = |n: Option<u32>| n.filter(|n| *n > 0).map(|n| Duration::from_secs(n.into()));
    TcpKeepalive {
        probes: m.keepalive_probes.filter(|n| *n > 0),
        time: seconds(m.keepalive_time),
        interval: seconds(m.keepalive_interval),
    }
}

fn cluster_filter(at: At<'_>, m: &pb::Filter) -> Step<MetadataExchange> {
    let pb::Filter {
        name: _,
        typed_config: any,
        config_discovery,
    } = m;
    unsupported!(at, config_discovery);
    let found = typed_config(&at, any, "filter")?;
    let at = at.field("typed_config");
    match found.name.as_str() {
        "envoy.tcp.metadataexchange.config.MetadataExchange" => {
            metadata_exchange(at, &found.decode(&at)?)
        }
        _ => Err(found.unknown(&at, "upstream network filter")),
    }
}
