//! `virtualOutbound`: where outgoing connections are redirected to, and what becomes of those that no listener knows.

use proto::envoy::config::{
    core::v3::TrafficDirection,
    listener::v3::{FilterChain, FilterChainMatch, Listener},
};

use super::{
    Built, Context, chain::address, env::Interception, outbound::catch_all_filters,
    settings::Class, tcp,
};
use crate::names;

/// Name of the listener.
pub const VIRTUAL_OUTBOUND: &str = "virtualOutbound";

/// The listener; none where connections are not redirected.
pub fn build(context: &Context<'_>) -> Option<Built> {
    let env = &context.env;
    if env.interception == Interception::None {
        return None;
    }
    let mut own_port = context.tcp_stats(Class::Outbound);
    own_port.push(tcp::to_cluster(
        env,
        Class::Outbound,
        names::BLACK_HOLE,
        false,
    ));
    let listener = Listener {
        name: VIRTUAL_OUTBOUND.to_owned(),
        address: Some(address(env.families.wildcard(), env.outbound_port())),
        transparent: (env.interception == Interception::Tproxy).then_some(true),
        use_original_dst: Some(true),
        filter_chains: vec![
            // A connection to the listener's own port would come back to it for ever.
            FilterChain {
                filter_chain_match: Some(FilterChainMatch {
                    destination_port: Some(env.outbound_port()),
                    ..Default::default()
                }),
                filters: own_port,
                name: "virtualOutbound-blackhole".to_owned(),
                ..Default::default()
            },
            FilterChain {
                filters: catch_all_filters(context),
                name: "virtualOutbound-catchall-tcp".to_owned(),
                ..Default::default()
            },
        ],
        traffic_direction: TrafficDirection::Outbound.into(),
        max_connections_to_accept_per_socket_event: env.compat.max_connections_per_event(),
        access_log: env.reports(Class::Outbound).logs.listener.clone(),
        ..Default::default()
    };
    Some(Built {
        listener,
        from: Vec::new(),
        of_pod: None,
    })
}
