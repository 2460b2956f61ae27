//! Messages into plans: the one place where configuration is checked.
//!
//! Each conversion takes its message apart field by field, without `..`: a field that a newer API brings does not
//! compile until it was decided whether it is planned, rejected (`unsupported!`) or accepted without effect (bound to
//! `_`, and listed in docs/accepted-without-effect.md).

// Deprecated fields are read too: Envoy still takes them.
#![allow(deprecated)]

mod access_log;
mod bootstrap;
mod client_cert;
mod cluster;
mod common;
mod dump;
mod endpoint;
mod ext_authz;
mod filter_config;
mod filter_state;
mod header;
mod health_check;
mod http;
mod http2_settings;
mod http_filter;
mod jwt_authn;
mod lb;
mod listener;
mod log_service;
mod lua;
mod matcher_tree;
mod network;
mod outlier;
mod overload;
mod rate_limit;
mod rate_limit_service;
mod rbac;
mod retry;
mod route;
mod route_action;
mod route_match;
mod scoped_route;
mod socket;
mod tag;
mod tls;
mod tracing;
mod upstream_http;

pub(crate) use common::json;
use prost::Message;
use proto::envoy::{
    config::{
        bootstrap::v3 as bootstrap_pb, cluster::v3 as cluster_pb, core::v3 as core_pb,
        endpoint::v3 as endpoint_pb, listener::v3 as listener_pb, route::v3 as route_pb,
    },
    extensions::transport_sockets::tls::v3 as tls_pb,
};

use super::{
    Bootstrap, Cluster, ClusterLoadAssignment, HeaderMatcher, Listener, PlanErrors,
    RouteConfiguration, error::collect, tls::Secret,
};

pub(super) use route::planned_again as virtual_host;

/// The plan of a cluster that was planned without an error before.
pub(super) fn cluster(encoded: &[u8]) -> Cluster {
    let message = cluster_pb::Cluster::decode(encoded).ok();
    let planned = message.and_then(|m| Cluster::try_from(&m).ok());
    planned.expect("a plan depends on its message alone, and there was one")
}

impl TryFrom<&listener_pb::Listener> for Listener {
    type Error = PlanErrors;

    fn try_from(m: &listener_pb::Listener) -> Result<Self, PlanErrors> {
        collect(|at| listener::listener(at, m))
    }
}

impl Listener {
    /// A listener without an address of its own and with every default, for requests that are no traffic.
    pub(crate) fn imagined() -> Result<Self, PlanErrors> {
        let socket = core_pb::SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(core_pb::socket_address::PortSpecifier::PortValue(0)),
            ..Default::default()
        };
        let address = core_pb::Address {
            address: Some(core_pb::address::Address::SocketAddress(socket)),
        };
        let m = listener_pb::Listener {
            name: "imagined".into(),
            address: Some(address),
            default_filter_chain: Some(listener_pb::FilterChain::default()),
            ..Default::default()
        };
        Self::try_from(&m)
    }
}

impl TryFrom<&route_pb::HeaderMatcher> for HeaderMatcher {
    type Error = PlanErrors;

    fn try_from(m: &route_pb::HeaderMatcher) -> Result<Self, PlanErrors> {
        collect(|at| common::header_matcher(at, m))
    }
}

impl TryFrom<&route_pb::RouteConfiguration> for RouteConfiguration {
    type Error = PlanErrors;

    fn try_from(m: &route_pb::RouteConfiguration) -> Result<Self, PlanErrors> {
        collect(|at| route::route_configuration(at, m))
    }
}

impl TryFrom<&cluster_pb::Cluster> for Cluster {
    type Error = PlanErrors;

    fn try_from(m: &cluster_pb::Cluster) -> Result<Self, PlanErrors> {
        collect(|at| cluster::cluster(at, m))
    }
}

impl TryFrom<&endpoint_pb::ClusterLoadAssignment> for ClusterLoadAssignment {
    type Error = PlanErrors;

    fn try_from(m: &endpoint_pb::ClusterLoadAssignment) -> Result<Self, PlanErrors> {
        collect(|at| endpoint::load_assignment(at, m, false))
    }
}

impl TryFrom<&tls_pb::Secret> for Secret {
    type Error = PlanErrors;

    fn try_from(m: &tls_pb::Secret) -> Result<Self, PlanErrors> {
        collect(|at| tls::secret(at, m))
    }
}

impl TryFrom<&bootstrap_pb::Bootstrap> for Bootstrap {
    type Error = PlanErrors;

    fn try_from(m: &bootstrap_pb::Bootstrap) -> Result<Self, PlanErrors> {
        collect(|at| bootstrap::bootstrap(at, m))
    }
}

#[cfg(test)]
pub(crate) mod tests;

/// The plan of an HTTP RBAC filter alone, for the tests of its decisions.
#[cfg(test)]
pub(super) fn rbac_for_tests(
    message: &proto::envoy::extensions::filters::http::rbac::v3::Rbac,
) -> Result<super::rbac::Rbac, super::PlanErrors> {
    super::error::collect(|at| rbac::http_rbac(at, message))
}
