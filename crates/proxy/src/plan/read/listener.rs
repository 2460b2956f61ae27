//! Listeners, filter chains and listener filters.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use proto::envoy::{
    config::{core::v3 as core, listener::v3 as pb},
    extensions::filters::listener::{
        original_src::v3::OriginalSrc, tls_inspector::v3::TlsInspector,
    },
};

use super::{
    access_log::access_log,
    common::{
        address, cidr, enumeration, extension, metadata, or_disabled, positive, typed_config,
    },
    network::filters_of,
    route::option,
    socket::{keepalive_options, proxy_protocol_filter, socket_options},
    tls::downstream_tls,
};
use crate::plan::{
    Address,
    chain_match::ChainTable,
    error::{At, Step, unsupported},
    listener::{
        ChainPredicate, DownstreamTransport, FilterChain, FilterChainMatch, Listener,
        ListenerFilter, ListenerFilterKind, SourceType, TrafficDirection,
    },
};

const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";

/// `Listener`.
pub(super) fn listener(at: At<'_>, m: &pb::Listener) -> Step<Listener> {
    let pb::Listener {
        name,
        address: bound,
        additional_addresses,
        stat_prefix,
        filter_chains,
        fcds_config,
        filter_chain_matcher,
        use_original_dst,
        default_filter_chain,
        per_connection_buffer_limit_bytes,
        metadata: free,
        deprecated_v1,
        drain_type,
        listener_filters,
        listener_filters_timeout,
        continue_on_listener_filters_timeout,
        transparent,
        freebind,
        socket_options: options,
        tcp_fast_open_queue_length,
        traffic_direction,
        udp_listener_config,
        api_listener,
        connection_balance_config,
        // Deprecated; enable_reuse_port counts.
        reuse_port: _,
        enable_reuse_port,
        access_log: logs,
        tcp_backlog_size,
        max_connections_to_accept_per_socket_event,
        bind_to_port,
        enable_mptcp,
        ignore_global_conn_limit,
        bypass_overload_manager,
        listener_specifier,
        stats_matcher,
        per_connection_buffer_high_watermark_timeout,
        tcp_keepalive,
    } = m;
    unsupported!(
        at,
        fcds_config,
        filter_chain_matcher,
        udp_listener_config,
        api_listener,
        enable_mptcp,
        listener_specifier,
        stats_matcher,
        per_connection_buffer_high_watermark_timeout,
    );
    let mut dual_stack = Vec::new();
    let mut address_at = |at: At<'_>, m: &core::Address| {
        let found = address(at, m, false)?;
        if let (Some(core::address::Address::SocketAddress(m)), Address::Socket(SocketAddr::V6(_))) =
            (&m.address, &found)
            && m.ipv4_compat
        {
            dual_stack.push(found.clone());
        }
        Ok(found)
    };
    let bound = at.required("address", bound, &mut address_at);
    let additional = at.each("additional_addresses", additional_addresses, |at, m| {
        let pb::AdditionalAddress {
            address,
            socket_options,
            tcp_keepalive,
        } = m;
        unsupported!(at, socket_options, tcp_keepalive);
        at.required("address", address, &mut address_at)
    });
    let use_original_dst = use_original_dst.unwrap_or(false);
    let mut filters = at.each("listener_filters", listener_filters, listener_filter);
    // Envoy adds the filter itself where the flag asks for it.
    if use_original_dst
        && !filters
            .iter()
            .any(|f| f.kind == ListenerFilterKind::OriginalDst)
    {
        let kind = ListenerFilterKind::OriginalDst;
        filters.insert(
            0,
            ListenerFilter {
                name: ORIGINAL_DST.into(),
                kind,
                disabled: None,
            },
        );
    }
    if filter_chains.is_empty() && default_filter_chain.is_none() {
        at.field("filter_chains")
            .error("needs at least one filter chain, or default_filter_chain");
    }
    let chains: Vec<Arc<FilterChain>> = at.each("filter_chains", filter_chains, |at, m| {
        filter_chain(at, m).map(Arc::new)
    });
    let default_chain = at.optional("default_filter_chain", default_filter_chain, filter_chain);
    let chain_table = match ChainTable::new(&chains) {
        Ok(table) => table,
        Err((first, second)) if chains.len() == filter_chains.len() => {
            let at = at.field("filter_chains");
            at.index(second).field("filter_chain_match").error(format!(
                "takes the same connections as filter_chains[{first}] ({:?})",
                chains[first].name
            ));
            ChainTable::default()
        }
        // A chain was left out as wrong; indices would mislead.
        Err(_) => ChainTable::default(),
    };
    let timeout = or_disabled(
        &at,
        "listener_filters_timeout",
        listener_filters_timeout,
        Some(Duration::from_secs(15)),
    );
    let direction = match enumeration(&at, "traffic_direction", *traffic_direction)? {
        core::TrafficDirection::Unspecified => TrafficDirection::Unspecified,
        core::TrafficDirection::Inbound => TrafficDirection::Inbound,
        core::TrafficDirection::Outbound => TrafficDirection::Outbound,
    };
    let exact_balance = at.optional(
        "connection_balance_config",
        connection_balance_config,
        |at, m| {
            use pb::listener::connection_balance_config::BalanceType as B;
            match &m.balance_type {
                Some(B::ExactBalance(_)) => Ok(true),
                _ => Err(at.error("only exact_balance is implemented")),
            }
        },
    )?;
    let default_chain = default_chain?;
    Ok(Listener {
        name: at.text("name", name)?,
        address: bound?,
        additional_addresses: additional,
        dual_stack,
        stat_prefix: option(stat_prefix),
        bind_to_port: bind_to_port
            .or(deprecated_v1.as_ref().and_then(|m| m.bind_to_port))
            .unwrap_or(true),
        use_original_dst,
        transparent: transparent.unwrap_or(false),
        freebind: freebind.unwrap_or(false),
        reuse_port: enable_reuse_port.unwrap_or(true),
        tcp_backlog: *tcp_backlog_size,
        tcp_fast_open: *tcp_fast_open_queue_length,
        socket_options: tcp_keepalive
            .iter()
            .flat_map(keepalive_options)
            .chain(
                socket_options(&at, "socket_options", options)
                    .iter()
                    .cloned(),
            )
            .collect(),
        max_connections_per_event: *max_connections_to_accept_per_socket_event,
        exact_balance: exact_balance.unwrap_or(false),
        listener_filters: filters,
        listener_filters_timeout: timeout?,
        continue_on_listener_filters_timeout: *continue_on_listener_filters_timeout,
        filter_chains: chains,
        default_filter_chain: default_chain.map(Arc::new),
        chain_table,
        per_connection_buffer_limit: per_connection_buffer_limit_bytes.unwrap_or(1 << 20),
        traffic_direction: direction,
        drain_modify_only: *drain_type == pb::listener::DrainType::ModifyOnly as i32,
        access_logs: at.each("access_log", logs, access_log),
        ignore_global_connection_limit: *ignore_global_conn_limit,
        bypass_overload_manager: *bypass_overload_manager,
        metadata: metadata(free),
    })
}

fn listener_filter(at: At<'_>, m: &pb::ListenerFilter) -> Step<ListenerFilter> {
    use pb::listener_filter::ConfigType;
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
    let config_at = at.field("typed_config");
    let found = extension(&config_at, any)?;
    let kind = match found.name.as_str() {
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst" => {
            ListenerFilterKind::OriginalDst
        }
        "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector" => {
            ListenerFilterKind::HttpInspector
        }
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => {
            let TlsInspector {
                enable_ja3_fingerprinting,
                enable_ja4_fingerprinting,
                initial_read_buffer_size,
                close_connection_on_client_hello_parsing_errors,
                max_client_hello_size: _,
            } = &found.decode(&config_at)?;
            unsupported!(
                config_at,
                enable_ja3_fingerprinting,
                enable_ja4_fingerprinting,
                close_connection_on_client_hello_parsing_errors,
            );
            ListenerFilterKind::TlsInspector {
                initial_read_buffer_size: *initial_read_buffer_size,
            }
        }
        "envoy.extensions.filters.listener.original_src.v3.OriginalSrc" => {
            let OriginalSrc { bind_port, mark } = found.decode(&config_at)?;
            ListenerFilterKind::OriginalSrc { bind_port, mark }
        }
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol" => {
            let filter = proxy_protocol_filter(config_at, &found.decode(&config_at)?)?;
            ListenerFilterKind::ProxyProtocol(Arc::new(filter))
        }
        _ => return Err(found.unknown(&config_at, "listener filter")),
    };
    let disabled = at.optional("filter_disabled", &m.filter_disabled, predicate)?;
    Ok(ListenerFilter {
        name,
        kind,
        disabled,
    })
}

fn predicate(at: At<'_>, m: &pb::ListenerFilterChainMatchPredicate) -> Step<ChainPredicate> {
    use pb::listener_filter_chain_match_predicate::Rule;
    let rules = |field: &str, m: &pb::listener_filter_chain_match_predicate::MatchSet| {
        let at = at.field(field);
        if m.rules.len() < 2 {
            at.field("rules").error("needs at least two rules");
        }
        at.each("rules", &m.rules, predicate)
    };
    match &m.rule {
        Some(Rule::AnyMatch(true)) => Ok(ChainPredicate::Any),
        Some(Rule::AnyMatch(false)) => Err(at.field("any_match").error("must be true")),
        Some(Rule::NotMatch(inner)) => Ok(ChainPredicate::Not(Box::new(predicate(
            at.field("not_match"),
            inner,
        )?))),
        Some(Rule::AndMatch(set)) => Ok(ChainPredicate::And(rules("and_match", set))),
        Some(Rule::OrMatch(set)) => Ok(ChainPredicate::Or(rules("or_match", set))),
        Some(Rule::DestinationPortRange(range)) => {
            match (u32::try_from(range.start), u32::try_from(range.end)) {
                (Ok(start), Ok(end)) if start < end => {
                    Ok(ChainPredicate::DestinationPort(start..end))
                }
                _ => Err(at
                    .field("destination_port_range")
                    .error("must have start below end")),
            }
        }
        None => Err(at.error(
            "needs one of or_match, and_match, not_match, any_match, destination_port_range",
        )),
    }
}

fn filter_chain(at: At<'_>, m: &pb::FilterChain) -> Step<FilterChain> {
    let pb::FilterChain {
        filter_chain_match,
        filters,
        use_proxy_proto,
        metadata: free,
        transport_socket,
        transport_socket_connect_timeout,
        name,
    } = m;
    unsupported!(at, use_proxy_proto);
    let conditions = at.optional("filter_chain_match", filter_chain_match, chain_match);
    let filters = filters_of(&at, filters);
    let transport = at.optional("transport_socket", transport_socket, |at, m| {
        let any = m
            .config_type
            .as_ref()
            .map(|core::transport_socket::ConfigType::TypedConfig(a)| a);
        let any = any.cloned();
        let found = typed_config(&at, &any, "transport socket")?;
        let at = at.field("typed_config");
        match found.name.as_str() {
            "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => {
                Ok(DownstreamTransport::RawBuffer)
            }
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext" => {
                let tls = downstream_tls(at, &found.decode(&at)?)?;
                Ok(DownstreamTransport::Tls(Arc::new(tls)))
            }
            _ => Err(found.unknown(&at, "transport socket")),
        }
    })?;
    Ok(FilterChain {
        name: name.as_str().into(),
        filter_chain_match: conditions?.unwrap_or_default(),
        filters,
        transport_socket: transport.unwrap_or(DownstreamTransport::RawBuffer),
        transport_socket_connect_timeout: positive(
            &at,
            "transport_socket_connect_timeout",
            transport_socket_connect_timeout,
        )?,
        metadata: metadata(free),
    })
}

fn chain_match(at: At<'_>, m: &pb::FilterChainMatch) -> Step<FilterChainMatch> {
    use pb::filter_chain_match::ConnectionSourceType as S;
    let pb::FilterChainMatch {
        destination_port,
        prefix_ranges,
        address_suffix,
        suffix_len,
        direct_source_prefix_ranges,
        source_type,
        source_prefix_ranges,
        source_ports,
        server_names,
        transport_protocol,
        application_protocols,
    } = m;
    unsupported!(at, address_suffix, suffix_len);
    let port = |at: At<'_>, port: &u32| {
        u16::try_from(*port)
            .ok()
            .filter(|p| *p > 0)
            .ok_or_else(|| at.error("must be from 1 to 65535"))
    };
    Ok(FilterChainMatch {
        destination_port: at.optional("destination_port", destination_port, port)?,
        prefix_ranges: at.each("prefix_ranges", prefix_ranges, cidr),
        server_names: at.each("server_names", server_names, |at, name| {
            let fixed = name.strip_prefix("*.").unwrap_or(name);
            if fixed.is_empty() || fixed.contains('*') {
                return Err(at.error(format!("`{name}`: a star can only stand for whole labels at the front, as in *.example.com")));
            }
            Ok(Arc::from(name.to_ascii_lowercase()))
        }),
        transport_protocol: option(transport_protocol),
        application_protocols: application_protocols.iter().map(|s| s.as_str().into()).collect(),
        direct_source_prefix_ranges: at.each(
            "direct_source_prefix_ranges",
            direct_source_prefix_ranges,
            cidr,
        ),
        source_type: match enumeration(&at, "source_type", *source_type)? {
            S::Any => SourceType::Any,
            S::SameIpOrLoopback => SourceType::SameIpOrLoopback,
            S::External => SourceType::External,
        },
        source_prefix_ranges: at.each("source_prefix_ranges", source_prefix_ranges, cidr),
        source_ports: at.each("source_ports", source_ports, port),
    })
}
