//! `MeshConfig.discoverySelectors`: the namespaces whose objects the mesh takes in.

use std::collections::BTreeSet;

use config::{Snapshot, labels_match};
use proto::istio::mesh::v1alpha1::LabelSelector;

use super::Labels;

/// The namespaces that are taken in; all of them where nothing is selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Discovered(Option<BTreeSet<String>>);

impl Discovered {
    /// Reads the selectors. The root namespace is always in; one without an object counts as one without labels.
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let selectors = &snapshot.mesh.discovery_selectors;
        if selectors.is_empty() {
            return Self(None);
        }
        let mut out = BTreeSet::from([snapshot.mesh.root_namespace.clone()]);
        for namespace in snapshot.namespaces.iter() {
            if selectors.iter().any(|s| selects(s, &namespace.meta.labels)) {
                out.insert(namespace.meta.name.clone());
            }
        }
        Self(Some(out))
    }

    /// Whether objects of this namespace count.
    pub(super) fn has(&self, namespace: &str) -> bool {
        self.0.as_ref().is_none_or(|set| set.contains(namespace))
    }
}

/// Kubernetes' label selector: all pairs and all expressions.
fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    labels_match(&selector.match_labels, labels)
        && selector.match_expressions.iter().all(|e| {
            let value = labels.get(&e.key);
            match e.operator.as_str() {
                "In" => value.is_some_and(|v| e.values.contains(v)),
                "NotIn" => value.is_none_or(|v| !e.values.contains(v)),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}
