//! Endpoints that say when they are too old to be true (`endpoint_stale_after`).

use std::{rc::Rc, sync::Arc};

use tokio::task::spawn_local;

use super::Server;
use crate::plan::ClusterLoadAssignment;

impl Server {
    /// Takes the endpoints away when they get too old, where they say so.
    pub(super) fn forget_when_stale(self: &Rc<Self>, assignment: &Arc<ClusterLoadAssignment>) {
        let Some(after) = assignment.endpoint_stale_after else {
            return;
        };
        let count = |server: &Server, name: &str| {
            for cluster in server
                .clusters
                .borrow()
                .of_service(&assignment.cluster_name)
            {
                let name = format!("cluster.{}.{name}", server.stat_name(&cluster));
                server.stats.counter(&name).inc();
            }
        };
        count(self, "assignment_timeout_received");
        let (weak, assignment) = (Rc::downgrade(self), assignment.clone());
        spawn_local(async move {
            tokio::time::sleep(after).await;
            let Some(server) = weak.upgrade() else { return };
            let changes = server.clusters.borrow_mut().stale(&assignment);
            if changes.is_empty() {
                return;
            }
            for cluster in server
                .clusters
                .borrow()
                .of_service(&assignment.cluster_name)
            {
                let name = server.stat_name(&cluster);
                let name = format!("cluster.{name}.assignment_stale");
                server.stats.counter(&name).inc();
            }
            server.broadcast(changes);
            server.sync_checks_of(&assignment.cluster_name);
        });
    }

    pub(super) fn sync_checks_of(self: &Rc<Self>, service: &str) {
        let clusters = self.clusters.borrow().of_service(service);
        clusters
            .iter()
            .for_each(|cluster| self.sync_checks(cluster));
    }
}
