//! Network filters.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use proto::envoy::{
    config::{core::v3 as core, listener::v3 as pb},
    extensions::filters::network::{
        connection_limit::v3::ConnectionLimit as ConnectionLimitPb,
        direct_response::v3 as direct_response,
        local_ratelimit::v3::LocalRateLimit as LocalRateLimitPb, mongo_proxy::v3::MongoProxy,
        tcp_proxy::v3 as tcp,
    },
    r#type::v3::TokenBucket,
};

use super::{
    access_log::{access_log, plain_formatters, plain_log_format},
    common::{
        above_zero, data_source, duration, enumeration, extension, header_name, or_disabled,
        percent, positive,
    },
    ext_authz::network_ext_authz,
    filter_state::connection_state,
    header::header_add,
    http::{connection_manager, request_id},
    http_filter::istio_stats,
    rate_limit_service::network_rate_limit,
    rbac::network_rbac,
    route::option,
    route_action::{merged, metadata_match_of},
    socket::tlv_kind,
};
use crate::plan::{
    error::{At, Step, unsupported},
    format::Template,
    http_filter::MetadataExchange,
    matcher::Percent,
    network::{
        ConnectionHash, ConnectionLimit, LocalRateLimit, NetworkFilter, NetworkFilterConfig,
        ProxyTlvs, TcpClusters, TcpProxy, TlvMerge, TlvValue, TokenBucketPlan, TunnelRequestId,
        Tunneling,
    },
    tls::DataSource,
};

/// The network filters of a chain.
pub(super) fn filters_of(at: &At<'_>, filters: &[pb::Filter]) -> Vec<NetworkFilter> {
    let list = at.each("filters", filters, network_filter);
    // A chain without filters is legal: it closes its connections.
    if list.len() == filters.len() && !list.is_empty() {
        let at = at.field("filters");
        for (index, filter) in list.iter().enumerate() {
            let last = index + 1 == list.len();
            let terminal = filter.as_ref().is_some_and(|f| f.config.is_terminal());
            if last && !terminal {
                at.index(index)
                    .error("is the last filter and must be http_connection_manager, tcp_proxy, echo or direct_response");
            }
            if !last && terminal {
                at.index(index)
                    .error("ends the chain and must be its last filter");
            }
        }
    }
    list.into_iter().flatten().collect()
}

/// A filter; `None` where nothing is to be done.
fn network_filter(at: At<'_>, m: &pb::Filter) -> Step<Option<NetworkFilter>> {
    use pb::filter::ConfigType;
    let name = at.text("name", &m.name)?;
    let any = match &m.config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(_)) => {
            return Err(at
                .field("config_discovery")
                .not_implemented("is not implemented; write typed_config"));
        }
        None => {
            return Err(at
                .field("typed_config")
                .error("is required: the configuration of this filter with its @type"));
        }
    };
    let at = at.field("typed_config");
    let found = extension(&at, any)?;
    let config = match found.name.as_str() {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            let manager = connection_manager(at, &found.decode(&at)?)?;
            NetworkFilterConfig::HttpConnectionManager(Arc::new(manager))
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            NetworkFilterConfig::TcpProxy(Arc::new(tcp_proxy(at, &found.decode(&at)?)?))
        }
        "envoy.tcp.metadataexchange.config.MetadataExchange" => {
            NetworkFilterConfig::MetadataExchange(metadata_exchange(at, &found.decode(&at)?)?)
        }
        "stats.PluginConfig" => {
            NetworkFilterConfig::IstioStats(Arc::new(istio_stats(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.filters.network.rbac.v3.RBAC" => {
            let (prefix, rbac) = network_rbac(at, &found.decode(&at)?)?;
            NetworkFilterConfig::Rbac(prefix, Arc::new(rbac))
        }
        "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz" => {
            let plan = network_ext_authz(at, &found.decode(&at)?)?;
            NetworkFilterConfig::ExtAuthz(Arc::new(plan))
        }
        "envoy.extensions.filters.network.ratelimit.v3.RateLimit" => {
            let plan = network_rate_limit(at, &found.decode(&at)?)?;
            NetworkFilterConfig::RateLimit(Arc::new(plan))
        }
        "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit" => {
            let plan = connection_limit(at, &found.decode(&at)?)?;
            NetworkFilterConfig::ConnectionLimit(Arc::new(plan))
        }
        "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit" => {
            let plan = local_rate_limit(at, &found.decode(&at)?)?;
            NetworkFilterConfig::LocalRateLimit(Arc::new(plan))
        }
        "envoy.extensions.filters.network.set_filter_state.v3.Config" => {
            let plan = connection_state(at, &found.decode(&at)?)?;
            NetworkFilterConfig::SetFilterState(Arc::new(plan))
        }
        "envoy.extensions.filters.network.sni_cluster.v3.SniCluster" => {
            NetworkFilterConfig::SniCluster
        }
        "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy" => {
            return mongo(&at, &found.decode(&at)?).map(|()| None);
        }
        "envoy.extensions.filters.network.echo.v3.Echo" => NetworkFilterConfig::Echo,
        "envoy.extensions.filters.network.direct_response.v3.Config" => {
            let m: direct_response::Config = found.decode(&at)?;
            let bytes = match at.optional("response", &m.response, data_source)? {
                None => Bytes::new(),
                Some(DataSource::Inline(bytes)) => bytes,
                Some(_) => {
                    return Err(at
                        .field("response")
                        .not_implemented("only inline_string and inline_bytes are implemented"));
                }
            };
            NetworkFilterConfig::DirectResponse(bytes)
        }
        _ => return Err(found.unknown(&at, "network filter")),
    };
    Ok(Some(NetworkFilter { name, config }))
}

/// `MongoProxy`: control planes put it before the `tcp_proxy` of each port of that protocol. All it does with a prefix
/// alone is to count operations (docs/accepted-without-effect.md).
fn mongo(at: &At<'_>, m: &MongoProxy) -> Step<()> {
    let MongoProxy {
        stat_prefix,
        access_log,
        delay,
        emit_dynamic_metadata,
        // The commands that are counted.
        commands: _,
        // Bytes are not parsed.
        max_bson_depth: _,
    } = m;
    at.text("stat_prefix", stat_prefix)?;
    unsupported!(at, access_log, delay, emit_dynamic_metadata);
    Ok(())
}

/// `MetadataExchange`, as network filter and as filter of a cluster.
pub(super) fn metadata_exchange(
    at: At<'_>,
    m: &proto::envoy::tcp::metadataexchange::config::MetadataExchange,
) -> Step<MetadataExchange> {
    let proto::envoy::tcp::metadataexchange::config::MetadataExchange {
        protocol,
        // Asks a stream that sidecars do not have.
        enable_discovery: _,
        additional_labels,
    } = m;
    unsupported!(at, additional_labels);
    Ok(MetadataExchange {
        protocol: at.text("protocol", protocol)?,
    })
}

fn connection_limit(at: At<'_>, m: &ConnectionLimitPb) -> Step<ConnectionLimit> {
    let ConnectionLimitPb {
        stat_prefix,
        max_connections,
        delay,
        runtime_enabled,
    } = m;
    let limit = at.required(
        "max_connections",
        max_connections,
        |at, limit| match *limit {
            0 => Err(at.error("must be at least 1")),
            limit => Ok(u32::try_from(limit).unwrap_or(u32::MAX)),
        },
    );
    Ok(ConnectionLimit {
        stat_prefix: at.text("stat_prefix", stat_prefix)?,
        max_connections: limit?,
        delay: positive(&at, "delay", delay)?,
        enabled: feature_enabled(runtime_enabled),
    })
}

fn local_rate_limit(at: At<'_>, m: &LocalRateLimitPb) -> Step<LocalRateLimit> {
    let LocalRateLimitPb {
        stat_prefix,
        token_bucket,
        runtime_enabled,
        share_key,
    } = m;
    let bucket = at.required("token_bucket", token_bucket, |at, m| {
        let TokenBucket {
            max_tokens,
            tokens_per_fill,
            fill_interval,
        } = m;
        let interval = at.required("fill_interval", fill_interval, |at, m| {
            match duration(at, m)? {
                short if short < Duration::from_millis(50) => {
                    Err(at.error("must be at least 50ms"))
                }
                interval => Ok(interval),
            }
        });
        if *max_tokens == 0 {
            at.field("max_tokens").error("must be at least 1");
        }
        if *tokens_per_fill == Some(0) {
            at.field("tokens_per_fill").error("must be at least 1");
        }
        Ok(TokenBucketPlan {
            max_tokens: *max_tokens,
            tokens_per_fill: tokens_per_fill.unwrap_or(1),
            fill_interval: interval?,
        })
    });
    Ok(LocalRateLimit {
        stat_prefix: at.text("stat_prefix", stat_prefix)?,
        bucket: bucket?,
        enabled: feature_enabled(runtime_enabled),
        share_key: option(share_key),
    })
}

/// `RuntimeFeatureFlag`; the key is accepted without effect.
fn feature_enabled(m: &Option<core::RuntimeFeatureFlag>) -> bool {
    m.as_ref().and_then(|m| m.default_value).unwrap_or(true)
}

fn tunneling(at: At<'_>, m: &tcp::tcp_proxy::TunnelingConfig) -> Step<Tunneling> {
    let tcp::tcp_proxy::TunnelingConfig {
        hostname,
        use_post,
        headers_to_add,
        propagate_response_headers,
        post_path,
        propagate_response_trailers,
        request_id_extension,
        request_id_header,
        request_id_metadata_key,
        formatters,
    } = m;
    plain_formatters(&at, formatters);
    let post_path = match (use_post, &post_path[..]) {
        (false, "") => None,
        (false, _) => {
            return Err(at
                .field("post_path")
                .error("has a meaning with use_post alone; add use_post: true or remove it"));
        }
        (true, "") => Some("/".into()),
        (true, path) if path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic()) => {
            Some(path.into())
        }
        (true, _) => {
            return Err(at
                .field("post_path")
                .error("must begin with `/` and have visible ASCII characters alone"));
        }
    };
    let extension = request_id_extension.as_ref();
    let request_id = match extension.filter(|m| m.typed_config.is_some()) {
        // Without an extension there is no id, whatever it would be called.
        None => None,
        Some(m) => {
            // A tunnel is no part of a trace, so nothing is packed into its id.
            request_id(at.field("request_id_extension"), m)?;
            Some(TunnelRequestId {
                header: match &request_id_header[..] {
                    "" => "x-request-id".into(),
                    name => tunnel_id_header(&at, name)?,
                },
                metadata_key: match &request_id_metadata_key[..] {
                    "" => "tunnel_request_id".into(),
                    key => key.into(),
                },
            })
        }
    };
    let text = at.text("hostname", hostname)?;
    Ok(Tunneling {
        hostname: Template::parse(&text).map_err(|why| at.field("hostname").error(why))?,
        post_path,
        headers: at.each("headers_to_add", headers_to_add, header_add),
        propagate_headers: *propagate_response_headers,
        propagate_trailers: *propagate_response_trailers,
        request_id,
    })
}

fn tunnel_id_header(at: &At<'_>, name: &str) -> Step<Arc<str>> {
    let name = header_name(at, "request_id_header", name)?;
    if name.starts_with(':') || &*name == "host" {
        let message = format!("`{name}` says where the request goes; take another header");
        return Err(at.field("request_id_header").error(message));
    }
    Ok(name)
}

fn tcp_proxy(at: At<'_>, m: &tcp::TcpProxy) -> Step<TcpProxy> {
    use proto::envoy::r#type::v3::hash_policy::PolicySpecifier as P;
    use tcp::tcp_proxy::ClusterSpecifier as C;
    let tcp::TcpProxy {
        stat_prefix,
        on_demand,
        metadata_match,
        idle_timeout,
        // Envoy reads neither.
        downstream_idle_timeout: _,
        upstream_idle_timeout: _,
        access_log: logs,
        max_connect_attempts,
        backoff_options,
        hash_policy,
        tunneling_config,
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage,
        access_log_flush_interval,
        flush_access_log_on_connected,
        access_log_options,
        proxy_protocol_tlvs,
        upstream_connect_mode,
        max_early_data_bytes,
        cluster_specifier,
        proxy_protocol_tlv_merge_policy,
        check_drain_close,
    } = m;
    unsupported!(at, on_demand);
    let mode: tcp::UpstreamConnectMode =
        enumeration(&at, "upstream_connect_mode", *upstream_connect_mode)?;
    if mode != tcp::UpstreamConnectMode::Immediate && max_early_data_bytes.is_none() {
        at.field("max_early_data_bytes")
            .error("is required with this upstream_connect_mode");
    }
    let wanted = metadata_match_of(metadata_match);
    let cluster = match cluster_specifier {
        Some(C::Cluster(name)) => at.text("cluster", name).map(TcpClusters::Cluster),
        Some(C::WeightedClusters(m)) => {
            let at = at.field("weighted_clusters");
            let clusters = at.each("clusters", &m.clusters, |at, m| {
                let tcp::tcp_proxy::weighted_cluster::ClusterWeight {
                    name,
                    weight,
                    metadata_match,
                } = m;
                if *weight == 0 {
                    at.field("weight").error("must be at least 1");
                }
                let own = merged(&wanted, &metadata_match_of(metadata_match));
                Ok((at.text("name", name)?, *weight, own))
            });
            let total = clusters.iter().map(|(_, w, _)| u64::from(*w)).sum();
            match total {
                0 => Err(at.field("clusters").error("needs at least one cluster")),
                _ => Ok(TcpClusters::Weighted { clusters, total }),
            }
        }
        None => Err(at.error("needs one of cluster, weighted_clusters")),
    };
    let mut flush_interval = at.optional(
        "access_log_flush_interval",
        access_log_flush_interval,
        duration,
    )?;
    let mut flush_on_start = false;
    let mut flush_on_connected = *flush_access_log_on_connected;
    if let Some(options) = access_log_options {
        let at = at.field("access_log_options");
        flush_interval = at.optional(
            "access_log_flush_interval",
            &options.access_log_flush_interval,
            duration,
        )?;
        flush_on_start = options.flush_access_log_on_start;
        flush_on_connected |= options.flush_access_log_on_connected;
    }
    let mut hashes = at.each("hash_policy", hash_policy, |at, m| {
        match &m.policy_specifier {
            Some(P::SourceIp(_)) => Ok(ConnectionHash::SourceIp),
            Some(P::FilterState(m)) => {
                let key = at.field("filter_state").text("key", &m.key)?;
                Ok(ConnectionHash::FilterState(key))
            }
            None => Err(at.error("needs one of source_ip, filter_state")),
        }
    });
    if hash_policy.len() > 1 {
        at.field("hash_policy").error("can have one policy at most");
    }
    let tlvs = at.each("proxy_protocol_tlvs", proxy_protocol_tlvs, tlv);
    let merge = match enumeration(
        &at,
        "proxy_protocol_tlv_merge_policy",
        *proxy_protocol_tlv_merge_policy,
    )? {
        tcp::ProxyProtocolTlvMergePolicy::AddIfAbsent => TlvMerge::AddIfAbsent,
        tcp::ProxyProtocolTlvMergePolicy::OverwriteByTypeIfExistsOrAdd => TlvMerge::OverwriteByType,
        tcp::ProxyProtocolTlvMergePolicy::AppendIfExistsOrAdd => TlvMerge::Append,
    };
    let stat_prefix = at.text("stat_prefix", stat_prefix);
    Ok(TcpProxy {
        stat_prefix: stat_prefix?,
        cluster: cluster?,
        metadata_match: wanted,
        idle_timeout: or_disabled(
            &at,
            "idle_timeout",
            idle_timeout,
            Some(Duration::from_secs(3600)),
        )?,
        max_downstream_connection_duration: positive(
            &at,
            "max_downstream_connection_duration",
            max_downstream_connection_duration,
        )?,
        max_connect_attempts: match max_connect_attempts {
            Some(0) => return Err(at.field("max_connect_attempts").error("must be at least 1")),
            given => given.unwrap_or(1),
        },
        backoff: at.optional("backoff_options", backoff_options, |at, m| {
            let base = above_zero(&at, "base_interval", &m.base_interval)?
                .ok_or_else(|| at.field("base_interval").error("is required"))?;
            let cap = above_zero(&at, "max_interval", &m.max_interval)?.unwrap_or(base * 10);
            if cap < base {
                return Err(at
                    .field("max_interval")
                    .error("must not be shorter than base_interval"));
            }
            Ok((base, cap))
        })?,
        // The handshake is over before any network filter runs, so that mode is the immediate one.
        connects_with_data: mode == tcp::UpstreamConnectMode::OnDownstreamData,
        max_duration_jitter: at
            .optional(
                "max_downstream_connection_duration_jitter_percentage",
                max_downstream_connection_duration_jitter_percentage,
                percent,
            )?
            .unwrap_or(Percent::whole(0)),
        tunneling: at.optional("tunneling_config", tunneling_config, tunneling)?,
        hash: hashes.pop(),
        proxy_tlvs: ProxyTlvs { tlvs, merge },
        check_drain_close: check_drain_close.unwrap_or(false),
        access_logs: at.each("access_log", logs, access_log),
        access_log_flush_interval: flush_interval.filter(|d| !d.is_zero()),
        flush_access_log_on_start: flush_on_start,
        flush_access_log_on_connected: flush_on_connected,
    })
}

/// A TLV that is added to a connection's.
fn tlv(at: At<'_>, m: &core::TlvEntry) -> Step<(u8, TlvValue)> {
    let core::TlvEntry {
        r#type,
        value,
        format_string,
    } = m;
    let kind = tlv_kind(at.field("type"), *r#type)?;
    let value = match (&value[..], format_string) {
        ([], Some(format)) => {
            TlvValue::Format(plain_log_format(at.field("format_string"), format)?)
        }
        ([], None) | ([_, ..], Some(_)) => {
            return Err(at.error("needs either value or format_string"));
        }
        (bytes, None) if u16::try_from(bytes.len()).is_err() => {
            return Err(at.field("value").error("must be at most 65535 bytes"));
        }
        (bytes, None) => TlvValue::Bytes(Bytes::copy_from_slice(bytes)),
    };
    Ok((kind, value))
}
