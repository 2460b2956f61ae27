//! Traffic interception: the kernel rules that lead a pod's connections through its proxy.
//!
//! [`Config`] (flags and environment of istio-iptables) becomes, in [`program`], one ordered list of
//! [`model::Rule`]s. Back ends turn that list into text: [`restore`] for `iptables-restore`, [`state`] for the form that
//! `iptables-save` prints (used to compare what is there with what should be, in order), [`nft`] for nft. [`apply`] writes the rules,
//! table by table atomically, and takes everything back when one table fails; [`ebpf`] does the same rules with programs
//! in the kernel instead; [`selftest`] proves that the capture
//! works, [`guard`] notices when it no longer may, and [`explain`] tells where a packet ends. [`command`] is the command
//! line of istio-iptables, [`tool`] that of `outrigger intercept`.
//!
//! This room has no runtime and no threads of its own: it runs in an init container, in the pod agent and, per pod,
//! in `outrigger local`.

pub mod apply;
pub mod backend;
pub mod command;
pub mod config;
mod conntrack;
pub mod ebpf;
pub mod explain;
pub mod flags;
pub mod guard;
pub mod model;
pub mod nft;
pub mod options;
mod outsider;
pub mod program;
pub mod restore;
pub mod routes;
pub mod selftest;
pub mod state;
pub mod surroundings;
mod sysctls;
pub mod tool;

pub use config::Config;

/// What can go wrong; each message says which setting or file is meant and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A command line that cannot be read (pflag's wording).
    #[error("{0}")]
    Usage(String),
    /// A setting with a value that cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// The pod's addresses, resolvers or users could not be read.
    #[error("{what}: {why}")]
    Surroundings {
        /// File or query.
        what: String,
        /// The system's answer.
        why: String,
    },
    /// No usable iptables.
    #[error("{0}")]
    Backend(String),
    /// A command of iptables refused its input.
    #[error("{command}: {meaning}: {stderr}{hint}")]
    Command {
        /// The command line that was run.
        command: String,
        /// What its exit status means.
        meaning: String,
        /// What it printed, trimmed.
        stderr: String,
        /// What the operator can do, or nothing.
        hint: String,
    },
    /// Mode EBPF cannot be had here, or its programs cannot be reached.
    #[error("mode EBPF: {0}")]
    Ebpf(String),
    /// Other ISTIO rules are in the way.
    #[error("{0}")]
    Conflict(String),
    /// Addresses, routes or routing rules could not be set.
    #[error("{what}: {why}")]
    Route {
        /// What was to be set.
        what: String,
        /// The kernel's answer.
        why: String,
    },
    /// The self-test failed; the text says which probe and which rules are missing.
    #[error("{0}")]
    Validation(String),
    /// A file could not be read or written.
    #[error("{path}: {why}")]
    File {
        /// Its path.
        path: String,
        /// The system's answer.
        why: std::io::Error,
    },
}

impl Error {
    /// The exit status that istio-iptables ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            // Cobra's main ends with os.Exit(-1).
            Error::Usage(_) => 255,
            // What the CNI repair controller looks for.
            Error::Validation(_) => 126,
            _ => 1,
        }
    }
}
