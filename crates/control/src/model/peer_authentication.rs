//! PeerAuthentication: the mutual-TLS mode of the mesh, of a namespace, of a workload and of its ports.

use std::{collections::BTreeMap, sync::Arc};

use config::{Object, labels_match};
use proto::istio::security::v1beta1::{
    PeerAuthentication,
    peer_authentication::{MutualTls, mutual_tls::Mode},
};

use super::Labels;

/// What a server does with connections to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MtlsMode {
    Disable,
    Permissive,
    Strict,
}

/// The mode of one workload: its own, and that of the ports that differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadMtls {
    pub mode: MtlsMode,
    /// By the port of the workload (not of the service).
    pub ports: BTreeMap<u32, MtlsMode>,
}

impl WorkloadMtls {
    /// The mode of a port of the workload.
    pub fn port(&self, port: u32) -> MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

/// All PeerAuthentications, oldest first in each namespace.
#[derive(Debug, Clone, Default)]
pub struct PeerAuthentications {
    root: String,
    by_namespace: BTreeMap<String, Vec<Arc<Object<PeerAuthentication>>>>,
    namespace_mode: BTreeMap<String, MtlsMode>,
    mesh_mode: Option<MtlsMode>,
}

impl PeerAuthentications {
    /// Indexes the objects. Of several without a selector in one namespace the oldest counts.
    pub fn new(mut objects: Vec<Arc<Object<PeerAuthentication>>>, root: &str) -> Self {
        objects.sort_by(|a, b| a.by_age(b));
        let mut out = Self {
            root: root.to_owned(),
            ..Self::default()
        };
        let mut found: BTreeMap<String, Option<MtlsMode>> = BTreeMap::new();
        for object in objects {
            let namespace = &object.meta.namespace;
            if selector(&object).is_empty() {
                if found.contains_key(namespace) {
                    tracing::warn!(
                        "PeerAuthentication {namespace}/{} ({}) is ignored: an older one without selector \
                         already covers the namespace; give it a selector or delete one of them",
                        object.meta.name,
                        object.source
                    );
                    continue;
                }
                found.insert(namespace.clone(), mode(object.spec.mtls.as_ref()));
            }
            out.by_namespace
                .entry(namespace.clone())
                .or_default()
                .push(object);
        }
        if let Some(mesh) = found.remove(root) {
            out.mesh_mode = Some(mesh.unwrap_or(MtlsMode::Permissive));
        }
        let inherited = out.mesh_mode.unwrap_or(MtlsMode::Permissive);
        out.namespace_mode = found
            .into_iter()
            .map(|(ns, mode)| (ns, mode.unwrap_or(inherited)))
            .collect();
        out
    }

    /// The mode of a namespace as a client sees it: its own, else the mesh's, else permissive.
    pub fn namespace(&self, namespace: &str) -> MtlsMode {
        self.namespace_mode
            .get(namespace)
            .copied()
            .or(self.mesh_mode)
            .unwrap_or(MtlsMode::Permissive)
    }

    /// The objects that apply to a workload, those of its namespace before the root's.
    pub fn for_workload(
        &self,
        namespace: &str,
        labels: &Labels,
    ) -> Vec<&Arc<Object<PeerAuthentication>>> {
        let mut namespaces = vec![namespace];
        if namespace != self.root {
            namespaces.push(&self.root);
        }
        namespaces
            .into_iter()
            .filter_map(|ns| self.by_namespace.get(ns))
            .flatten()
            .filter(|o| labels_match(selector(o), labels))
            .collect()
    }

    /// What a workload does: workload over namespace over mesh; the ports of the workload's object over all.
    pub fn workload(&self, namespace: &str, labels: &Labels) -> WorkloadMtls {
        let objects = self.for_workload(namespace, labels);
        // Each list is oldest first, so the first of its level is the one that counts.
        let first = |level: &dyn Fn(&Object<PeerAuthentication>) -> bool| {
            objects.iter().find(|o| level(o)).map(|o| &o.spec)
        };
        let mesh = first(&|o| selector(o).is_empty() && o.meta.namespace == self.root);
        let space = first(&|o| selector(o).is_empty() && o.meta.namespace != self.root);
        let own = first(&|o| !selector(o).is_empty() && o.meta.namespace != self.root);
        let mode_of = |spec: Option<&PeerAuthentication>| mode(spec?.mtls.as_ref());
        let effective = mode_of(own)
            .or_else(|| mode_of(space))
            .or_else(|| mode_of(mesh))
            .unwrap_or(MtlsMode::Permissive);
        let ports = own
            .map(|spec| {
                spec.port_level_mtls
                    .iter()
                    .map(|(port, mtls)| (*port, mode(Some(mtls)).unwrap_or(effective)))
                    .collect()
            })
            .unwrap_or_default();
        WorkloadMtls {
            mode: effective,
            ports,
        }
    }

    /// Every label that some selector asks for.
    pub(super) fn label_keys(&self) -> impl Iterator<Item = &String> {
        self.by_namespace
            .values()
            .flatten()
            .flat_map(|o| selector(o).keys())
    }
}

fn selector(object: &Object<PeerAuthentication>) -> &Labels {
    static NONE: Labels = Labels::new();
    object
        .spec
        .selector
        .as_ref()
        .map_or(&NONE, |s| &s.match_labels)
}

fn mode(mtls: Option<&MutualTls>) -> Option<MtlsMode> {
    match mtls?.mode() {
        Mode::Unset => None,
        Mode::Disable => Some(MtlsMode::Disable),
        Mode::Permissive => Some(MtlsMode::Permissive),
        Mode::Strict => Some(MtlsMode::Strict),
    }
}
