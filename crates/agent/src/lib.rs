//! The pod agent: prepares the proxy's bootstrap, relays its xDS, tells whether the pod is ready, merges metrics,
//! and runs the proxy as its child (`pilot-agent` in Istio).
//!
//! The way through: [`command`] reads flags; [`settings`] settles what holds; [`bootstrap`] writes the file;
//! [`identity`] keeps the workload's certificate good and [`sds`] gives it out; [`relay`], [`dns`] and [`status`] serve;
//! [`capture`] watches the rules; [`supervise`] runs the proxy until one of its ends. [`control_plane`] is the way to
//! the other end of the first two.

pub mod bootstrap;
pub mod capture;
pub mod command;
pub mod control_plane;
pub mod dns;
pub mod flags;
mod http_client;
pub mod identity;
mod metrics;
mod probes;
pub mod relay;
mod request;
pub mod sds;
pub mod settings;
pub mod status;
mod supervise;

use std::{io, path::PathBuf};

/// Why the agent cannot do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A source of configuration is wrong; the text names it, the field, and what would be right.
    #[error("{0}")]
    Config(String),
    /// A flag or argument is wrong.
    #[error("{0}")]
    Flag(String),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Socket address or path.
        address: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// The proxy cannot be started.
    #[error("cannot start the proxy {path}: {source}")]
    Start {
        /// The program.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}
