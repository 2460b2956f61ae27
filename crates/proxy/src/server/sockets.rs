//! Listening sockets: opened on the main thread, one for each worker.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::AsFd,
        unix::{fs::PermissionsExt, net::UnixListener},
    },
    path::Path,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::ChangeError;
use crate::{
    listener::ListenSocket,
    plan::{Address, Listener, socket::SocketState},
    socket::{set_all, set_fast_open},
};

/// The sockets of one listener.
#[derive(Debug)]
pub(super) struct Sockets {
    /// For each address, one socket per worker, or one for all where the port is not shared.
    bound: Vec<BoundSocket>,
}

/// The sockets of one address.
#[derive(Debug)]
pub(super) enum BoundSocket {
    Tcp {
        address: SocketAddr,
        sockets: Vec<TcpListener>,
    },
    Unix {
        address: Address,
        socket: UnixListener,
    },
}

impl Sockets {
    /// Opens the sockets of a listener; `None` where it owns none. `own` are ports that this process has, or has had a
    /// moment ago in a worker.
    pub(super) fn open(
        plan: &Listener,
        workers: usize,
        own: &BTreeSet<u16>,
    ) -> Result<Option<Self>, ChangeError> {
        if !plan.bind_to_port {
            return Ok(None);
        }
        let mut bound = Vec::new();
        for address in plan_addresses(plan) {
            let opened = match address {
                Address::Socket(address) => {
                    open_tcp(plan, *address, workers, own.contains(&address.port()))
                }
                Address::Pipe { path, mode } => {
                    open_unix(path, *mode).map(|socket| BoundSocket::Unix {
                        address: address.clone(),
                        socket,
                    })
                }
                Address::Name { .. } => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a listener needs an address, not a name",
                )),
            };
            bound.push(opened.map_err(|error| ChangeError::Bind {
                listener: plan.name.clone(),
                address: address.to_string(),
                reason: error.to_string(),
            })?);
        }
        Ok(Some(Self { bound }))
    }

    /// The addresses that the sockets really have.
    pub(super) fn addresses(&self) -> Vec<Address> {
        let address = |bound: &BoundSocket| match bound {
            BoundSocket::Tcp { address, .. } => Address::Socket(*address),
            BoundSocket::Unix { address, .. } => address.clone(),
        };
        self.bound.iter().map(address).collect()
    }

    /// Copies of the descriptors for a worker.
    pub(super) fn for_worker(&self, index: usize) -> io::Result<Vec<ListenSocket>> {
        let socket = |bound: &BoundSocket| match bound {
            BoundSocket::Tcp { sockets, .. } => sockets[index.min(sockets.len() - 1)]
                .try_clone()
                .map(ListenSocket::Tcp),
            BoundSocket::Unix { socket, .. } => socket.try_clone().map(ListenSocket::Unix),
        };
        self.bound.iter().map(socket).collect()
    }
}

/// Every address of a listener.
pub(super) fn plan_addresses(plan: &Listener) -> impl Iterator<Item = &Address> {
    std::iter::once(&plan.address).chain(&plan.additional_addresses)
}

/// Whether a new version can go on with the sockets of the old one.
pub(super) fn same_sockets(old: &Listener, new: &Listener) -> bool {
    plan_addresses(old).eq(plan_addresses(new))
        && old.dual_stack == new.dual_stack
        && old.bind_to_port == new.bind_to_port
        && old.reuse_port == new.reuse_port
        && old.transparent == new.transparent
        && old.freebind == new.freebind
        && old.tcp_backlog == new.tcp_backlog
        && old.tcp_fast_open == new.tcp_fast_open
        && old.socket_options == new.socket_options
}

/// `shared`: the port is ours already.
///
/// The first socket of a port is bound without SO_REUSEPORT and gets the option afterwards. A second proxy with the same
/// port would else be let in by the kernel, and each of the two would get a part of the connections. Envoy notices by the
/// domain socket of its `--base-id`, which says nothing about the port.
fn open_tcp(
    plan: &Listener,
    mut address: SocketAddr,
    workers: usize,
    shared: bool,
) -> io::Result<BoundSocket> {
    let v6_alone = !plan.dual_stack.contains(&Address::Socket(address));
    let count = if plan.reuse_port { workers } else { 1 };
    let mut sockets: Vec<TcpListener> = Vec::new();
    for _ in 0..count {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        let first = sockets.is_empty() && !shared;
        socket.set_reuse_port(plan.reuse_port && !first)?;
        socket.set_nonblocking(true)?;
        // Accepted sockets inherit it.
        socket.set_tcp_nodelay(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(v6_alone)?;
        }
        if plan.freebind || plan.transparent {
            match address {
                SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
                SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
            }
        }
        if plan.transparent {
            match address {
                SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
                SocketAddr::V6(_) => crate::socket::set_ip_transparent_v6(socket.as_fd())?,
            }
        }
        let configured = |state| {
            let socket = SockRef::from(&socket);
            set_all(&socket, &plan.socket_options, state, address)
        };
        configured(SocketState::Prebind)?;
        socket
            .bind(&address.into())
            .map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => io::Error::new(
                    error.kind(),
                    format!("{error}: another process has this port"),
                ),
                _ => error,
            })?;
        socket.set_reuse_port(plan.reuse_port)?;
        configured(SocketState::Bound)?;
        if let Some(queue) = plan.tcp_fast_open {
            set_fast_open(socket.as_fd(), queue)?;
        }
        socket.listen(
            plan.tcp_backlog
                .map_or(DEFAULT_BACKLOG, |n| n.min(i32::MAX as u32) as i32),
        )?;
        configured(SocketState::Listening)?;
        let socket: TcpListener = socket.into();
        // With port 0 the first socket chooses for all.
        address = socket.local_addr()?;
        sockets.push(socket);
    }
    Ok(BoundSocket::Tcp { address, sockets })
}

fn open_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let abstract_name = path.to_str().and_then(|path| path.strip_prefix('@'));
    let socket = match abstract_name {
        Some(name) => {
            use std::os::linux::net::SocketAddrExt;
            UnixListener::bind_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?
        }
        None => {
            // What a former process left behind; if somebody still listened there, nobody could reach it any more,
            // which is what Envoy does as well.
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let socket = UnixListener::bind(path)?;
            if mode != 0 {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
            }
            socket
        }
    };
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The limit of downstream connections: as configured, else half of what the process may open (each connection has one
/// up and one down). Raises the soft limit of descriptors to the hard one on the way.
pub(super) fn connection_limit(configured: Option<u64>) -> u32 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit = raised,
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
    let files = limit.current.unwrap_or(u64::from(u32::MAX));
    let own = files.saturating_sub(RESERVED_FILES) / 2;
    configured.unwrap_or(own).clamp(1, u64::from(u32::MAX)) as u32
}

/// Files that are not connections: logs, listening sockets, xDS, admin.
const RESERVED_FILES: u64 = 256;

/// The kernel cuts it to `net.core.somaxconn`.
const DEFAULT_BACKLOG: i32 = i32::MAX;
