//! Ending connections whose bytes go from socket to socket, before their map goes: without it what one end has sent
//! and the other has not read yet would be lost in silence, so a reset is the honest end.

use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::store::Tuple;
use crate::Error;

/// Ends the sockets of this network namespace that have these views; one that has gone by itself is as good.
pub(super) fn destroy(tuples: &[Tuple]) -> Result<(), Error> {
    let fail = |why: nix::Error| Error::Surroundings {
        what: "ending accelerated connections (SOCK_DESTROY)".into(),
        why: why.to_string(),
    };
    let link = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )
    .map_err(fail)?;
    for tuple in tuples {
        let message = request(tuple);
        sendto(
            link.as_raw_fd(),
            &message,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )
        .map_err(fail)?;
        let mut answer = [0u8; 4096];
        recv(link.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(fail)?;
    }
    Ok(())
}

/// `nlmsghdr` and `inet_diag_req_v2`.
fn request(tuple: &Tuple) -> Vec<u8> {
    let v4 = tuple[8..20] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    let family = if v4 { libc::AF_INET } else { libc::AF_INET6 } as u8;
    let mut out = Vec::with_capacity(72);
    out.extend(72u32.to_ne_bytes());
    out.extend(SOCK_DESTROY.to_ne_bytes());
    out.extend(REQUEST_ACK.to_ne_bytes());
    out.extend([0; 8]);
    out.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    // Any state.
    out.extend(u32::MAX.to_ne_bytes());
    let port = |at: usize| u16::from_ne_bytes([tuple[at], tuple[at + 1]]).to_be_bytes();
    out.extend(port(40));
    out.extend(port(42));
    for at in [8, 24] {
        let address = &tuple[at..at + 16];
        match v4 {
            true => {
                out.extend(&address[12..]);
                out.extend([0; 12]);
            }
            false => out.extend(address),
        }
    }
    // Any interface, any cookie.
    out.extend([0; 4]);
    out.extend([0xff; 8]);
    out
}

const SOCK_DESTROY: u16 = 21;
const REQUEST_ACK: u16 = 1 | 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_connection_in_network_order() {
        let mut tuple = [0; 48];
        tuple[18..24].copy_from_slice(&[0xff, 0xff, 10, 9, 0, 5]);
        tuple[34..40].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
        tuple[40..42].copy_from_slice(&40_000u16.to_ne_bytes());
        tuple[42..44].copy_from_slice(&15_001u16.to_ne_bytes());
        let request = request(&tuple);
        assert_eq!(request.len(), 72);
        assert_eq!(request[16], libc::AF_INET as u8);
        assert_eq!(request[24..28], [0x9c, 0x40, 0x3a, 0x99]);
        assert_eq!(
            (&request[28..32], &request[44..48]),
            (&[10, 9, 0, 5][..], &[127, 0, 0, 1][..])
        );
    }
}
