//! What can go wrong here, told so that the user knows what to do.

use std::{io, path::PathBuf};

/// An error of the local mesh.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or a file failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path or the name concerned.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A document of the user's folder cannot be used.
    #[error("{}:{line}: {message}", file.display())]
    Document {
        /// The file.
        file: PathBuf,
        /// The line on which the document, or the offending part of it, starts.
        line: usize,
        /// What is wrong and what to write instead.
        message: String,
    },
    /// A pod cannot be started as written.
    #[error("pod {pod}: {message}")]
    Pod {
        /// `name.namespace`.
        pod: String,
        /// What is wrong and what to write instead.
        message: String,
    },
    /// A program that this one calls (`ip`, `iptables-restore`) failed.
    #[error("{program} failed ({status}): {stderr}")]
    Program {
        /// Its name and arguments.
        program: String,
        /// How it ended.
        status: String,
        /// What it printed.
        stderr: String,
    },
    /// The user asked for something that is not there.
    #[error("{0}")]
    Usage(String),
}

/// The result type of this room.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds what was being done to an `io::Error` (or to nix's and rustix's, which turn into one).
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::Io {
            what: what(),
            source: e.into(),
        })
    }
}
