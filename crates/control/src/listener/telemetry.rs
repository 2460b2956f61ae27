//! What a proxy reports about its traffic: access logs, traces, statistics. MeshConfig says what by default, Telemetry
//! objects override it for the mesh, a namespace or a workload.

use proto::istio::mesh::v1alpha1::ProxyConfig;

use super::{
    access_log::AccessLogs,
    env::{CLASSES, Reports},
    tracing::{self, Workload},
};
use crate::model::{Mesh, Proxy};

/// The reports of every side.
pub(super) fn reports(mesh: &Mesh, proxy: &Proxy, config: &ProxyConfig) -> [Reports; 3] {
    let workload = Workload {
        labels: &proxy.labels,
        namespace: proxy.node.meta("NAMESPACE").unwrap_or_default(),
        mesh_id: proxy.node.meta("MESH_ID").unwrap_or_default(),
        cluster_id: proxy.node.meta("CLUSTER_ID").unwrap_or_default(),
    };
    CLASSES.map(|_| Reports {
        logs: AccessLogs::from_mesh(mesh.config()),
        tracing: tracing::of_mesh(mesh.config(), config, &workload),
        request_id_for_sampling: true,
        http_stats: Vec::new(),
        tcp_stats: Vec::new(),
    })
}
