//! One address behind a service's port.

use std::sync::Arc;

use super::Labels;

/// `tlsMode` of a workload whose sidecar takes Istio's mutual TLS.
pub const TLS_MODE_ISTIO: &str = "istio";
/// Label that says it.
pub const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";

/// Whether an endpoint may get requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Health {
    /// Nothing is known (ServiceEntry endpoints).
    #[default]
    Unknown,
    Healthy,
    /// Not ready.
    Unhealthy,
    /// Going away, existing sessions stay.
    Draining,
    /// Going away; never sent.
    Terminating,
}

/// One address behind one port of a service.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// IP address, host name (DNS services) or the path of a unix socket (then `port` is 0).
    pub address: String,
    pub port: u32,
    /// Name of the service's port that this endpoint serves.
    pub port_name: String,
    /// Number of that port.
    pub service_port: u32,
    /// Labels of the workload, with those of its place added (region, zone, subzone, cluster, node).
    pub labels: Arc<Labels>,
    /// SPIFFE identity, empty when unknown.
    pub service_account: String,
    /// `region/zone/subzone`, empty when unknown.
    pub locality: String,
    /// 0 means 1.
    pub weight: u32,
    pub health: Health,
    /// [`TLS_MODE_ISTIO`] or `disabled`.
    pub tls_mode: String,
    pub network: String,
    pub namespace: String,
    pub workload_name: String,
    pub node_name: String,
    /// `spec.hostname` of a pod with a subdomain, for names of single pods.
    pub hostname: String,
    pub subdomain: String,
}

impl Endpoint {
    /// Weight with its default applied.
    pub fn weight(&self) -> u32 {
        self.weight.max(1)
    }

    /// Whether the workload takes Istio's mutual TLS.
    pub fn is_mesh_tls(&self) -> bool {
        self.tls_mode == TLS_MODE_ISTIO
    }
}

/// `region/zone/subzone` taken apart; missing parts are empty.
pub fn split_locality(locality: &str) -> (&str, &str, &str) {
    let mut parts = locality.split('/');
    let mut next = || parts.next().unwrap_or_default();
    (next(), next(), next())
}

/// The locality that a label `topology.istio.io/locality` or `istio-locality` says; dots stand for slashes there.
pub fn locality_from_labels(labels: &Labels) -> Option<String> {
    let value = labels
        .get("topology.istio.io/locality")
        .filter(|v| !v.is_empty())
        .or_else(|| labels.get("istio-locality"))
        .filter(|v| !v.is_empty())?;
    Some(if value.contains('/') {
        value.clone()
    } else {
        value.replace('.', "/")
    })
}

/// Labels of a workload with those of its place added.
pub fn augment_labels(
    labels: &Labels,
    cluster: &str,
    locality: &str,
    node: &str,
    network: &str,
) -> Labels {
    let mut out = labels.clone();
    let (region, zone, subzone) = split_locality(locality);
    for (key, value) in [
        ("topology.kubernetes.io/region", region),
        ("topology.kubernetes.io/zone", zone),
        ("topology.istio.io/subzone", subzone),
        ("topology.istio.io/cluster", cluster),
        ("kubernetes.io/hostname", node),
    ] {
        if !value.is_empty() {
            out.insert(key.to_owned(), value.to_owned());
        }
    }
    if !network.is_empty() {
        out.entry("topology.istio.io/network".to_owned())
            .or_insert_with(|| network.to_owned());
    }
    out
}

/// Canonical service name and revision of a workload.
pub fn canonical_service<'a>(labels: &'a Labels, workload: &'a str) -> (&'a str, &'a str) {
    let first = |keys: &[&str]| keys.iter().find_map(|k| labels.get(*k)).map(String::as_str);
    let name = first(&[
        "service.istio.io/canonical-name",
        "app.kubernetes.io/name",
        "app",
    ])
    .unwrap_or(workload);
    let revision = first(&[
        "service.istio.io/canonical-revision",
        "app.kubernetes.io/version",
        "version",
    ])
    .unwrap_or("latest");
    (name, revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_names_fall_back() {
        let labels = Labels::from([
            ("app".to_owned(), "a".to_owned()),
            ("version".to_owned(), "v2".to_owned()),
        ]);
        assert_eq!(canonical_service(&labels, "w"), ("a", "v2"));
        assert_eq!(canonical_service(&Labels::new(), "w"), ("w", "latest"));
    }

    #[test]
    fn places_become_labels() {
        let out = augment_labels(&Labels::new(), "Kubernetes", "eu/eu-1", "node-a", "");
        assert_eq!(out["topology.kubernetes.io/region"], "eu");
        assert_eq!(out["topology.kubernetes.io/zone"], "eu-1");
        assert!(!out.contains_key("topology.istio.io/subzone"));
        let dotted = Labels::from([("istio-locality".to_owned(), "eu.eu-1.a".to_owned())]);
        assert_eq!(locality_from_labels(&dotted).as_deref(), Some("eu/eu-1/a"));
    }
}
