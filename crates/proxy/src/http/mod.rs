//! The HTTP connection manager: connections in, exchanges through, log lines out.
//!
//! `connection` runs a downstream connection and finds out what it speaks; `serve` takes one
//! request from head to log line: [`prepare`] → route → filters → router → [`forward`]. What is
//! known about a request on the way is its [`Exchange`].

mod bodies;
mod connection;
mod exchange;
mod failure;
mod flags;
mod forward;
mod hedge;
mod hold;
mod mirror;
mod pass;
mod prepare;
mod pump;
mod redirect;
mod reply;
mod respond;
mod route_stats;
mod serve;
mod side_call;
mod stats;
mod streams;
mod timers;
mod upstream;
mod xfcc;

use std::{cell::Cell, rc::Rc, sync::Arc};

pub(crate) use exchange::metadata_of;
pub use exchange::{CloseTypes, Exchange, Progress, RouteRef, UpstreamInfo};
pub use flags::Flags;
pub(crate) use prepare::{append, split_port};
pub use reply::LocalReply;
pub(crate) use reply::{grpc_status_of, http_status_of};
pub(crate) use side_call::{SideCallError, SideResponse, side_call};

use crate::{
    access_log::Logger,
    codec::Http2Stats,
    filter::Filters,
    listener::{Connection, ConnectionInfo},
    plan::HttpConnectionManager,
    trace::Tracer,
    worker::{Worker, drain::Drain},
};
use serde_json::Value;
use stats::ConnectionManagerStats;

/// A connection manager as one worker runs it: made with the first connection of a filter chain,
/// shared by all of them.
#[derive(Debug)]
pub struct ConnectionManager {
    /// What the configuration says.
    pub plan: Arc<HttpConnectionManager>,
    stats: ConnectionManagerStats,
    http2_stats: Rc<Http2Stats>,
    filters: Filters,
    /// Those of requests for upgrades that have filters of their own, in the order of the plan.
    upgrade_filters: Vec<(Arc<str>, Filters)>,
    logs: Vec<Logger>,
    tracer: Option<Tracer>,
    /// Large bodies may go from socket to socket.
    may_splice: bool,
    /// Clients hear why no connection to their upstream came about.
    tells_failure: bool,
}

/// Envoy's runtime switch: `false` in a static layer puts the transport's failure into the body of a reply. What it says
/// of certificates and addresses is not for every client, so it stands in logs alone by default.
const HIDE_FAILURE: &str =
    "envoy.reloadable_features.hide_transport_failure_reason_in_response_body";

/// The runtime key that keeps bodies from going through the kernel alone: `false` in a static layer.
const SPLICE: &str = "outrigger.http.splice";

/// What the exchanges of one connection share.
#[derive(Clone, Copy, Debug)]
struct Context<'a> {
    live: &'a ConnectionManager,
    worker: &'a Rc<Worker>,
    connection: &'a ConnectionInfo,
    drain: &'a Drain,
    /// A response has told the client that this connection ends.
    draining: &'a Cell<bool>,
}

impl<'a> Context<'a> {
    /// The filters that a request goes through.
    fn filters(&self, exchange: &Exchange<'_>) -> &'a Filters {
        let own = exchange.upgrade_filters.map(usize::from);
        let own = own.and_then(|index| self.live.upgrade_filters.get(index));
        own.map_or(&self.live.filters, |(_, filters)| filters)
    }
}

impl ConnectionManager {
    /// Which filters an upgrade of this type has for itself.
    fn filters_of_upgrade(&self, upgrade_type: &str) -> Option<u8> {
        let mut all = self.upgrade_filters.iter();
        let found = all.position(|(name, _)| name.eq_ignore_ascii_case(upgrade_type))?;
        u8::try_from(found).ok()
    }

    /// Brings a plan to life.
    pub fn new(plan: &Arc<HttpConnectionManager>, worker: &Rc<Worker>) -> Self {
        let scope = worker.stats.scope(&format!("http.{}.", plan.stat_prefix));
        ConnectionManager {
            plan: plan.clone(),
            stats: ConnectionManagerStats::new(scope),
            http2_stats: Rc::new(Http2Stats::new(worker.stats.scope("http2."))),
            filters: Filters::new(&plan.http_filters, &plan.stat_prefix, worker),
            upgrade_filters: plan
                .upgrades
                .iter()
                .filter(|upgrade| !upgrade.filters.is_empty())
                .map(|upgrade| {
                    let filters = Filters::new(&upgrade.filters, &plan.stat_prefix, worker);
                    (upgrade.upgrade_type.clone(), filters)
                })
                .collect(),
            logs: Logger::all(&plan.access_logs, worker),
            tracer: Tracer::new(plan.tracing.as_ref(), worker),
            may_splice: worker.bootstrap.runtime.get(SPLICE) != Some(&Value::Bool(false)),
            tells_failure: worker.bootstrap.runtime.get(HIDE_FAILURE) == Some(&Value::Bool(false)),
        }
    }

    /// Serves one connection to its end.
    pub async fn serve(self: &Rc<Self>, connection: Connection, worker: &Rc<Worker>) {
        connection::serve(self.clone(), connection, worker).await;
    }
}
