//! Injection: a pod in, the pod with its proxy out. A pure function; nothing here reads a file or a cluster.
//!
//! [`pod()`] does it for one pod, [`object()`] for every workload kind that has a pod in it (kube-inject, and the local
//! mesh), [`decide`] says whether a pod is to be injected at all. In the order of the work: [`annotations`] are checked,
//! the [`template`]s that the pod asks for become partial pods, [`strategic`] merges them in, the user's own
//! `istio-proxy` container is laid over the result, then [`prometheus`], [`probes`] and the order of containers follow.
//! [`schema`] knows how Kubernetes prints its types, because parts of a pod travel as JSON text in annotations and
//! environment variables. Behaviour and names are Istio's.

pub mod annotations;
pub mod command;
pub mod compat;
pub mod decide;
mod pod;
pub mod probes;
pub mod prometheus;
pub mod proxy_config;
pub mod quantity;
pub mod schema;
pub mod strategic;
pub mod template;
pub mod values;
pub mod workload;
pub mod yaml;

use std::collections::BTreeMap;

use proto::istio::mesh::v1alpha1::MeshConfig;

pub use pod::{inject as pod, owner};
pub use values::Values;
pub use workload::object;

/// What can go wrong. The text is what a user of kube-inject sees.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Annotations whose values cannot be used, all of them.
    #[error("failed to run injection template: {} occurred:\n{}", count(.0.len()), bullets(.0))]
    Annotations(Vec<String>),
    /// A template that does not exist.
    #[error("failed to run injection template: requested template {name:?} not found; have {have}")]
    UnknownTemplate {
        /// What was asked for.
        name: String,
        /// What there is.
        have: String,
    },
    /// A value of the pod, the values or the mesh that cannot be used.
    #[error("{path}: {why}")]
    Invalid {
        /// Where it stands.
        path: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// Metrics that cannot be scraped.
    #[error("failed to process pod: {0}")]
    Prometheus(String),
    /// Text that is not YAML.
    #[error("{file}:{line}: {why}")]
    Syntax {
        /// The file, or `-`.
        file: String,
        /// Its line, from 1.
        line: u32,
        /// What is wrong.
        why: String,
    },
}

fn count(n: usize) -> String {
    match n {
        1 => "1 error".into(),
        n => format!("{n} errors"),
    }
}

fn bullets(errors: &[String]) -> String {
    errors.iter().map(|e| format!("\t* {e}\n")).collect()
}

/// What an install decides for all its pods.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The values of the install.
    pub values: Values,
    /// The mesh's configuration, defaults included (see `config::mesh::merge`).
    pub mesh: MeshConfig,
    /// The revision that injects; empty is `default`.
    pub revision: String,
    /// Whether proxies are native sidecars unless the pod says otherwise.
    pub native_sidecars: bool,
    /// Templates of a pod that names none.
    pub default_templates: Vec<String>,
    /// Whether pods that say nothing are injected.
    pub inject_by_default: bool,
    /// The proxy's user.
    pub proxy_uid: i64,
    /// The proxy's group.
    pub proxy_gid: i64,
    /// Variables set from outside the pod (the webhook's path): they win over the template's.
    pub proxy_env: BTreeMap<String, String>,
    /// Annotations that every injected pod gets.
    pub annotations: BTreeMap<String, String>,
    /// Fields of ProxyConfig that win over the pod's own annotation (see [`proxy_config`]).
    pub proxy_config: Option<serde_json::Value>,
    /// `COMPLIANCE_POLICY` of the control plane, or empty.
    pub compliance_policy: String,
}

impl Settings {
    /// The settings of an install with these values and this mesh.
    pub fn new(values: Values, mesh: MeshConfig) -> Settings {
        let templates = values.texts("sidecarInjectorWebhook.defaultTemplates");
        Settings {
            default_templates: match templates.is_empty() {
                true => vec!["sidecar".into()],
                false => templates,
            },
            values,
            mesh,
            revision: String::new(),
            native_sidecars: false,
            inject_by_default: true,
            proxy_uid: 1337,
            proxy_gid: 1337,
            proxy_env: BTreeMap::new(),
            annotations: BTreeMap::new(),
            proxy_config: None,
            compliance_policy: String::new(),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings::new(Values::default(), config::mesh::defaults())
    }
}

/// The workload that a pod belongs to, as the proxy reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `apps/v1`, say.
    pub api_version: String,
    /// `Deployment`, say.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its namespace; empty if its text names none.
    pub namespace: String,
}
