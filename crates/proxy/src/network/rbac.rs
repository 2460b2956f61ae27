//! `envoy.filters.network.rbac`: lets connections in or refuses them, by policy.
//!
//! A connection is judged as it begins: everything that its policies can ask about is known by then, and nothing has
//! gone to the upstream.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;

use crate::{
    filter::rbac::{RbacStats, details, note},
    listener::ConnectionInfo,
    plan::{
        matcher_tree::PeerName,
        rbac::{Rbac, Subject},
        route_match::RequestView,
    },
    worker::Worker,
};

/// Namespace of the metadata, and name of the filter.
const NAMESPACE: &str = "envoy.filters.network.rbac";

/// The filter of one chain.
#[derive(Debug)]
pub(super) struct NetworkRbac {
    plan: Arc<Rbac>,
    stats: RbacStats,
}

impl NetworkRbac {
    pub(super) fn new(prefix: &str, plan: &Arc<Rbac>, worker: &Worker) -> Self {
        Self {
            plan: plan.clone(),
            stats: RbacStats::new(prefix, plan, worker),
        }
    }

    /// How long a refused connection is kept before it is closed.
    pub(super) fn delay(&self) -> Option<Duration> {
        self.plan.delay_deny
    }

    /// Lets a connection in, or says why not.
    pub(super) fn judge(&self, connection: &mut ConnectionInfo) -> Result<(), Cow<'static, str>> {
        if let Some(rules) = &self.plan.shadow_rules {
            let decision = rules.decide(connection);
            self.stats.count_shadow(decision);
            // `ext_authz` and logs read it.
            let prefix = &self.plan.shadow_stat_prefix;
            let metadata = connection.metadata.get_or_insert_default();
            note(metadata, NAMESPACE, prefix, "shadow", decision);
        }
        let Some(rules) = &self.plan.rules else {
            return Ok(());
        };
        if rules.only_logs() {
            return Ok(());
        }
        let decision = rules.decide(connection);
        self.stats.count_enforced(decision);
        if decision.allowed {
            Ok(())
        } else {
            Err(details(decision))
        }
    }
}

/// A connection has nothing of a request.
impl RequestView for ConnectionInfo {
    fn header(&self, _: &str) -> Option<Cow<'_, [u8]>> {
        None
    }

    fn host(&self) -> &[u8] {
        b""
    }

    fn path(&self) -> &[u8] {
        b""
    }

    fn dynamic_metadata(&self, namespace: &str) -> Option<&Value> {
        let own = self.metadata.as_ref().and_then(|all| all.get(namespace));
        own.or_else(|| self.proxy.as_ref()?.metadata.get(namespace))
    }

    fn filter_state(&self, key: &str) -> Option<&Value> {
        self.state.get(key)
    }

    fn destination(&self) -> Option<SocketAddr> {
        self.local
    }

    fn peer_names(&self, kind: PeerName) -> Option<String> {
        self.joined_peer_names(kind)
    }

    fn source(&self) -> Option<SocketAddr> {
        self.remote
    }

    fn server_name(&self) -> Option<&str> {
        self.requested_server_name.as_deref()
    }
}

impl Subject for ConnectionInfo {
    fn direct_remote(&self) -> Option<IpAddr> {
        self.direct_remote.map(|a| a.ip())
    }

    fn remote(&self) -> Option<IpAddr> {
        self.remote.map(|a| a.ip())
    }

    fn names(&self) -> Option<impl Iterator<Item = &str>> {
        self.peer_names()
    }
}
