//! Addresses as configuration names them: sockets, names still to be resolved, and unix sockets.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

/// Where to listen, to connect to, or to connect from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// An IP address with its port; port 0 means "any" where one is bound.
    Socket(SocketAddr),
    /// A host name that must be resolved (STRICT_DNS, LOGICAL_DNS), with its port.
    Name {
        /// As written.
        host: Arc<str>,
        /// TCP port.
        port: u16,
    },
    /// A unix domain socket; a leading `@` means the abstract namespace.
    Pipe {
        /// Path in the file system.
        path: PathBuf,
        /// Permission bits for a socket that is listened on; 0 leaves the process's default.
        mode: u32,
    },
}

impl Address {
    /// The socket address, where there is nothing to resolve.
    pub fn socket(&self) -> Option<SocketAddr> {
        match self {
            Self::Socket(address) => Some(*address),
            _ => None,
        }
    }

    /// The IP address, where there is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.socket().map(|a| a.ip())
    }

    /// The port; none for a pipe.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Socket(address) => Some(address.port()),
            Self::Name { port, .. } => Some(*port),
            Self::Pipe { .. } => None,
        }
    }
}

/// As Envoy prints it in stats, admin answers and logs: `10.0.0.1:80`, `[::1]:80`, `name:80`, `/path`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
            Self::Pipe { path, .. } => path.display().fmt(f),
        }
    }
}
