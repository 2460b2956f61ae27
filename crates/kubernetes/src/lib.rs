//! A Kubernetes cluster as seen from the control plane and the installer: its objects as a store, and what is written
//! back to it.
//!
//! [`connect`] finds the API server. [`store`] keeps all objects that matter in step with it and feeds the same
//! [`config::Watch`] as a folder does. [`lease`] elects the one replica that writes; [`status`] (reports below `status`),
//! [`trust`] (the root certificate in every namespace) and [`webhook`] (the authority of our webhooks) are what it
//! writes, with what the other replicas hear from proxies ([`rejections`]). [`review`] asks who a token is of, [`secret`] shares the authority's key among replicas, and [`apply`] is what
//! the installer does.

pub mod apply;
mod connect;
pub mod crd;
pub mod gateway_status;
pub mod lease;
pub mod look;
pub mod rejections;
pub mod resource;
pub mod review;
pub mod secret;
pub mod status;
pub mod store;
#[cfg(test)]
mod testing;
pub mod trust;
pub mod webhook;

pub use connect::{Access, connect};
pub use kube::Client;

/// What can go wrong between us and the API server.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {path}: {why}")]
    Kubeconfig {
        /// The file, or where it was looked for.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// There is no service account in this pod.
    #[error(
        "not in a pod of a cluster ({0}): give --kubeconfig FILE, or --config DIR for a folder of YAML"
    )]
    NotInCluster(String),
    /// The client could not be made.
    #[error("API server: {0}")]
    Client(String),
    /// A request failed.
    #[error("{what}: {source}")]
    Request {
        /// What was asked for.
        what: String,
        /// The API server's answer, or why there was none.
        source: Box<kube::Error>,
    },
    /// An object of ours or of the cluster is not what it should be.
    #[error("{what}: {why}")]
    Object {
        /// Which object.
        what: String,
        /// What is wrong.
        why: String,
    },
}

impl ClusterError {
    /// A failed request.
    pub(crate) fn request(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        move |source| ClusterError::Request {
            what: what.into(),
            source: Box::new(source),
        }
    }

    /// The HTTP status of the API server's answer, if it gave one.
    pub fn code(&self) -> Option<u16> {
        match self {
            ClusterError::Request { source, .. } => code(source),
            _ => None,
        }
    }
}

/// The HTTP status of the API server's answer, if it gave one.
pub(crate) fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// The name under which we own fields of objects (server-side apply).
pub const FIELD_MANAGER: &str = "outrigger";

/// The name of something that each revision has for itself: a Service, a lease, a ConfigMap.
pub fn of_revision(name: &str, revision: &str) -> String {
    match revision {
        "" | "default" => name.to_owned(),
        revision => format!("{name}-{revision}"),
    }
}
