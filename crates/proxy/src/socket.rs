//! Socket options that no crate we use offers.
//!
//! This module needs unsafe code: it calls `setsockopt` itself.
#![allow(unsafe_code)]

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

/// IP_BIND_ADDRESS_NO_PORT (ip(7)): binding to port 0 keeps only the address; the port is chosen at connect, by the whole
/// four-tuple. Works for IPv6 sockets as well.
pub(crate) fn bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// IPV6_TRANSPARENT (ip(7), for IPv6): accepts connections to addresses that are not ours.
pub(crate) fn set_ip_transparent_v6(socket: &socket2::Socket) -> io::Result<()> {
    set(
        socket.as_fd(),
        libc::IPPROTO_IPV6,
        libc::IPV6_TRANSPARENT,
        1,
    )
}

fn set(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the borrow, and the pointer and the size describe `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
