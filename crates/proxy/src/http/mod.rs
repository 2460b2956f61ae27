//! HTTP connections. (The seam to `listener/` and `network/`; the connection manager follows.)

use std::{rc::Rc, sync::Arc};

use crate::{listener::Connection, plan, worker::Worker};

/// An HTTP connection manager as one worker runs it: made with the first connection of a filter chain, shared by all of
/// them.
#[derive(Debug)]
pub struct ConnectionManager {
    /// What the configuration says.
    pub plan: Arc<plan::HttpConnectionManager>,
}

impl ConnectionManager {
    /// Brings a plan to life.
    pub fn new(plan: &Arc<plan::HttpConnectionManager>, _worker: &Rc<Worker>) -> Self {
        Self { plan: plan.clone() }
    }

    /// Serves one connection to its end.
    pub async fn serve(self: &Rc<Self>, connection: Connection, _worker: &Rc<Worker>) {
        drop(connection);
    }
}
