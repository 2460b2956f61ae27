//! The CNI plug-in: writes a pod's interception rules from the node, so that no pod needs NET_ADMIN.
//!
//! It stands behind the network's own plug-ins in a chain (`istio-cni` in Istio). [`command`] speaks the protocol
//! (CNI 1.0: VERSION, ADD, CHECK, DEL); [`conf`] is the network configuration; [`pod`] decides whether and how a pod is
//! captured, from its annotations; [`api`] and [`files`] fetch the pod; [`capture`] enters its namespace, and [`cgroup`]
//! finds the group that programs of mode EBPF are attached to. [`node`] is what runs on every node beside it: it puts the
//! plug-in there, and finds pods that started before it was there.

mod api;
mod capture;
mod cgroup;
pub mod command;
mod conf;
mod files;
mod node;
mod pod;

/// What can go wrong, with the code that the CNI specification gives it.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A version of the protocol that is not spoken here.
    #[error("cniVersion {0:?} is not supported: use 0.3.0, 0.3.1, 0.4.0 or 1.0.0")]
    Version(String),
    /// A field of the configuration that is not built in.
    #[error("{field}: {why}")]
    Unsupported {
        /// Its path.
        field: String,
        /// What to do instead.
        why: String,
    },
    /// A variable of the environment is missing or wrong.
    #[error("environment variable {name}: {why}")]
    Environment {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A file, socket or answer could not be read.
    #[error("{what}: {why}")]
    Io {
        /// Path or address.
        what: String,
        /// The system's word.
        why: String,
    },
    /// The configuration is no JSON.
    #[error("the network configuration cannot be read: {0}")]
    Decode(String),
    /// The configuration is JSON, and wrong.
    #[error("{field}: {why}")]
    Config {
        /// Its path.
        field: String,
        /// What is expected.
        why: String,
    },
    /// The pod is not known yet; the runtime may ask again.
    #[error("pod {pod}: {why}")]
    Pod {
        /// `NAMESPACE/NAME`.
        pod: String,
        /// Why it cannot be had.
        why: String,
    },
    /// An annotation of the pod has a value that cannot be used.
    #[error("pod {pod}: annotation {key}: invalid value {value:?}: {why}")]
    Annotation {
        /// `NAMESPACE/NAME`.
        pod: String,
        /// The annotation.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is expected.
        why: String,
    },
    /// The rules could not be written.
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
    /// CHECK: the rules are not as ADD left them.
    #[error("the pod's interception rules have changed:\n  {0}")]
    Changed(String),
}

impl CniError {
    /// The specification's code; those of the plug-in's own begin at 100.
    pub fn code(&self) -> u32 {
        match self {
            CniError::Version(_) => 1,
            CniError::Unsupported { .. } => 2,
            CniError::Environment { .. } => 4,
            CniError::Io { .. } => 5,
            CniError::Decode(_) => 6,
            CniError::Config { .. } => 7,
            CniError::Pod { .. } => 11,
            CniError::Annotation { .. } => 100,
            CniError::Intercept(_) => 101,
            CniError::Changed(_) => 102,
        }
    }
}
