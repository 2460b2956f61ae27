//! What the newest version of its listener says of a connection that is open.
//!
//! A changed chain drains: its connections go on for a while, which in Envoy is also by the old policies. A policy says
//! who may talk, so here the newest one counts at once. Requests go by the newest connection manager as a whole, so that
//! tokens are read and services asked as its policies expect it; connections that carry no requests are judged anew, and
//! end where they would not be let in.

use std::{borrow::Cow, rc::Rc, sync::Arc};

use super::{ConnectionInfo, Listeners, LiveChain, LiveListener};
use crate::{
    filter::rbac::details,
    http::ConnectionManager,
    plan::{
        FilterChain,
        listener::DownstreamTransport,
        network::NetworkFilterConfig,
        rbac::{Engine, Rbac},
    },
    worker::Worker,
};

/// A connection in clear that would have to be mutual TLS now.
const NOT_SECURE: &str = "mutual_tls_required";

impl Listeners {
    /// Why a connection would not be let in any more. `None` where it would, where only a service knows that
    /// ([`Listeners::newest_chain`] can ask it), and where nothing takes it any more: then it drains.
    pub(crate) fn denies(&self, info: &ConnectionInfo) -> Option<Cow<'static, str>> {
        let listener = self.find(&info.listener.name)?.current();
        let Some(chain) = find_chain(&listener, info) else {
            return needs_mutual_tls(&listener, info).then_some(NOT_SECURE.into());
        };
        let mut filters = chain.filters.iter();
        filters.find_map(|filter| match &filter.config {
            NetworkFilterConfig::Rbac(_, plan) => enforced(plan)
                .map(|rules| rules.decide(info))
                .filter(|decision| !decision.allowed)
                .map(details),
            _ => None,
        })
    }

    /// The chain that a connection would find if it began now.
    pub(crate) fn newest_chain(&self, info: &ConnectionInfo) -> Option<Rc<LiveChain>> {
        let listener = self.find(&info.listener.name)?.current();
        let plan = find_chain(&listener, info)?;
        listener.chains.get(&(Arc::as_ptr(plan) as usize)).cloned()
    }

    /// What would serve the requests of a connection if it began now; `None` where nothing does.
    pub(crate) fn newest_manager(
        &self,
        info: &ConnectionInfo,
        worker: &Rc<Worker>,
    ) -> Option<Rc<ConnectionManager>> {
        self.newest_chain(info)?.network(worker).http().cloned()
    }
}

fn find_chain<'l>(
    listener: &'l LiveListener,
    info: &ConnectionInfo,
) -> Option<&'l Arc<FilterChain>> {
    let protocols: Vec<&str> = info.application_protocols.iter().map(|p| &**p).collect();
    listener.plan.find_chain(&info.to_match(&protocols))
}

/// Whether only clients with a certificate are taken where this one, in clear, is not.
fn needs_mutual_tls(listener: &LiveListener, info: &ConnectionInfo) -> bool {
    let mut secure = info.to_match(&["istio"]);
    secure.transport_protocol = "tls";
    let chain = listener.plan.find_chain(&secure);
    info.tls.is_none()
        && chain.is_some_and(|chain| match &chain.transport_socket {
            DownstreamTransport::Tls(plan) => plan.require_client_certificate,
            DownstreamTransport::RawBuffer => false,
        })
}

/// The rules of a filter that are more than words in a log.
fn enforced(plan: &Rbac) -> Option<&Engine> {
    plan.rules.as_ref().filter(|rules| !rules.only_logs())
}
