//! Sockets of upstream connections, socket options that no crate we use offers, and the bytes of every TCP connection.
//!
//! This module needs unsafe code: it calls `setsockopt` itself, and reads into memory that nothing was written to.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, SockRef};
use tokio::{
    io::{Interest, ReadBuf},
    net::{TcpSocket, TcpStream},
};

use crate::{
    listener::UpstreamSource,
    plan::{
        cluster::BindConfig,
        socket::{SocketOption, SocketState},
    },
};

/// A socket for a connection to `address`, bound to its source: the given one, else the configuration's. `bind_failed` is
/// called where the source cannot be had.
pub(crate) fn upstream(
    bind: Option<&BindConfig>,
    source: Option<UpstreamSource>,
    address: SocketAddr,
    bind_failed: impl FnOnce(),
) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_nodelay(true)?;
    let options = SockRef::from(&socket);
    if let Some(bind) = bind {
        set_all(
            &options,
            &bind.socket_options,
            SocketState::Prebind,
            address,
        )?;
    }
    // A source of the other family cannot be used, which is how Envoy has it as well.
    let source = source.filter(|source| source.address.is_ipv4() == address.is_ipv4());
    if let Some(source) = source {
        if source.mark != 0 {
            options.set_mark(source.mark)?;
        }
        match address {
            SocketAddr::V4(_) => options.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => set_ip_transparent_v6(socket.as_fd())?,
        }
    }
    let configured = || bind.and_then(|bind| bind.source_for(address));
    if let Some(from) = source.map(|source| source.address).or_else(configured) {
        if bind.is_some_and(|bind| bind.freebind) {
            match from {
                SocketAddr::V4(_) => options.set_freebind_v4(true)?,
                SocketAddr::V6(_) => options.set_freebind_v6(true)?,
            }
        }
        if from.port() == 0 {
            // The port is chosen at connect, by the whole four-tuple: else 28,000 connections would be the end.
            bind_address_no_port(socket.as_fd())?;
        } else {
            // Two connections to different hosts may come from the same address and port.
            socket.set_reuseaddr(true)?;
        }
        socket.bind(from).inspect_err(|_| bind_failed())?;
    }
    if let Some(bind) = bind {
        set_all(&options, &bind.socket_options, SocketState::Bound, address)?;
    }
    Ok(socket)
}

/// Sets those of the configured options whose moment has come.
pub(crate) fn set_all(
    socket: &SockRef<'_>,
    options: &[SocketOption],
    state: SocketState,
    address: SocketAddr,
) -> io::Result<()> {
    let domain = Domain::for_address(address);
    for option in options {
        if option.state == state && option.applies_to(domain) {
            set(socket.as_fd(), option.level, option.name, &option.bytes()).map_err(|error| {
                let (level, name) = (option.level, option.name);
                io::Error::new(
                    error.kind(),
                    format!("socket option (level {level}, name {name}): {error}"),
                )
            })?;
        }
    }
    Ok(())
}

/// IP_BIND_ADDRESS_NO_PORT (ip(7)): binding to port 0 keeps only the address; the port is chosen at connect, by the whole
/// four-tuple. Works for IPv6 sockets as well.
fn bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// IPV6_TRANSPARENT (ip(7), for IPv6): accepts connections to, and makes them from, addresses that are not ours.
pub(crate) fn set_ip_transparent_v6(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT, 1)
}

/// TCP_FASTOPEN (tcp(7)): how many connections may carry data in their SYN and not be accepted yet.
pub(crate) fn set_fast_open(socket: BorrowedFd<'_>, queue: u32) -> io::Result<()> {
    let queue = queue.min(libc::c_int::MAX as u32) as libc::c_int;
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, queue)
}

fn set_int(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// Reads as tokio's stream does, with the system call made here: libc's can be cancelled in threads that others may
/// cancel, and says so before and after each with an exclusive write to memory.
pub(crate) fn poll_read(
    stream: &TcpStream,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let room = buffer.remaining();
    let read = poll_some(stream, context, Interest::READABLE, room, || {
        // SAFETY: nothing is taken out of what was initialized.
        let unfilled = unsafe { buffer.unfilled_mut() };
        let (_, read) = rustix::net::recv(stream, unfilled, RecvFlags::empty())?;
        // SAFETY: the kernel has written so many bytes to its beginning.
        unsafe { buffer.assume_init(read) };
        buffer.advance(read);
        Ok(read)
    });
    read.map_ok(drop)
}

/// Writes as tokio's stream does; see [`poll_read`].
pub(crate) fn poll_write(
    stream: &TcpStream,
    context: &mut Context<'_>,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    poll_some(stream, context, Interest::WRITABLE, bytes.len(), || {
        Ok(rustix::net::send(stream, bytes, SendFlags::NOSIGNAL)?)
    })
}

/// Writes several pieces at once; see [`poll_read`].
pub(crate) fn poll_write_vectored(
    stream: &TcpStream,
    context: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    // The kernel takes no more than 1024 pieces, so having written less than all says nothing.
    poll_some(stream, context, Interest::WRITABLE, 0, || {
        Ok(rustix::io::writev(stream, pieces)?)
    })
}

/// Moves bytes by `call`, once the stream is ready for it. Where fewer than `most` are moved the kernel has no more, or
/// takes no more.
fn poll_some(
    stream: &TcpStream,
    context: &mut Context<'_>,
    interest: Interest,
    most: usize,
    mut call: impl FnMut() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        match interest.is_readable() {
            true => ready!(stream.poll_read_ready(context))?,
            false => ready!(stream.poll_write_ready(context))?,
        }
        let mut some = None;
        let moved = stream.try_io(interest, || {
            let moved = call()?;
            if 0 < moved && moved < most {
                // There was no more, or no room for more: the event loop is asked before the kernel is asked again.
                some = Some(moved);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(moved)
        });
        match (some, moved) {
            (Some(moved), _) => return Poll::Ready(Ok(moved)),
            (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            (None, moved) => return Poll::Ready(moved),
        }
    }
}

/// How long ago the last segment of the peer came (`tcpi_last_ack_recv` of TCP_INFO, tcp(7)): each carries an
/// acknowledgement, the one that closes too.
pub(crate) fn since_last_segment(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    // SAFETY: `tcp_info` is plain numbers, for which all zeroes are values.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the length of the borrow, and the kernel writes no more than `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(Duration::from_millis(info.tcpi_last_ack_recv.into())),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open for the length of the borrow, and the pointer and the length describe `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
