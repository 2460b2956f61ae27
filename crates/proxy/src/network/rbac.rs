//! `envoy.filters.network.rbac`: lets connections in or refuses them, by policy.
//!
//! A connection is judged as it begins: everything that its policies can ask about is known by then, and nothing has
//! gone to the upstream.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    filter::rbac::{RbacStats, details},
    listener::ConnectionInfo,
    plan::{
        rbac::{Action, Rbac, Subject},
        route_match::RequestView,
    },
    worker::Worker,
};

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

    /// Lets a connection in, or says why not.
    pub(super) fn judge(&self, connection: &ConnectionInfo) -> Result<(), Cow<'static, str>> {
        if let Some(rules) = &self.plan.shadow_rules {
            self.stats.count_shadow(rules.decide(connection));
        }
        let Some(rules) = &self.plan.rules else {
            return Ok(());
        };
        if rules.action == Action::Log {
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

    fn destination(&self) -> Option<SocketAddr> {
        self.local
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
