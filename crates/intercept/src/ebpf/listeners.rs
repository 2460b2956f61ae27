//! Sockets of a proxy that listened before the programs came: found in /proc, and made known.

use std::{
    collections::HashSet,
    fs,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Copies of the sockets of this network namespace that listen at one of `ports`, with their port.
pub(super) fn find(ports: [u16; 2]) -> Vec<(OwnedFd, u16)> {
    let mut wanted = asked().unwrap_or_else(|_| listed());
    wanted.retain(|(_, port)| ports.contains(port));
    let mut out = Vec::new();
    let mut seen = HashSet::new();
    if wanted.is_empty() {
        return out;
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        for file in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let Ok(target) = fs::read_link(file.path()) else {
                continue;
            };
            let inode = target
                .to_str()
                .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            let Some((inode, port)) = wanted.iter().find(|(i, _)| Some(*i) == inode) else {
                continue;
            };
            let number = file.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(number), Some(pid)) = (number, Pid::from_raw(pid))
                && !seen.contains(inode)
                && let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
                && let Ok(copy) = pidfd_getfd(process, number, PidfdGetfdFlags::empty())
            {
                seen.insert(*inode);
                out.push((copy, *port));
            }
        }
    }
    out
}

/// Inode and port of what listens, over netlink: the files of /proc show every connection of the node's table as well, and
/// a pod's start waits for it.
fn asked() -> Result<Vec<(u64, u16)>, Errno> {
    const BY_FAMILY: u16 = 20; // SOCK_DIAG_BY_FAMILY
    const REQUEST_DUMP: u16 = 1 | 0x300;
    const LISTEN: u32 = 1 << 10;
    const END: u16 = libc::NLMSG_DONE as u16;
    const FAILED: u16 = libc::NLMSG_ERROR as u16;
    let (kind, none) = (SockFlag::SOCK_CLOEXEC, MsgFlags::empty());
    let protocol = SockProtocol::NetlinkSockDiag;
    let link = socket(AddressFamily::Netlink, SockType::Raw, kind, protocol)?;
    let mut out = Vec::new();
    let mut buffer = vec![0u8; 1 << 15];
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        // struct nlmsghdr, and struct inet_diag_req_v2: family, protocol, what else, states, and no socket in particular.
        let mut message = 72u32.to_ne_bytes().to_vec();
        message.extend(BY_FAMILY.to_ne_bytes());
        message.extend(REQUEST_DUMP.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
        message.extend(LISTEN.to_ne_bytes());
        message.resize(72, 0);
        sendto(link.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), none)?;
        'answers: loop {
            let length = recv(link.as_raw_fd(), &mut buffer, none)?;
            let mut rest = &buffer[..length];
            if rest.is_empty() {
                return Err(Errno::EPROTO);
            }
            while let Some(head) = rest.get(..16) {
                let size = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
                match u16::from_ne_bytes([head[4], head[5]]) {
                    END => break 'answers,
                    FAILED => return Err(Errno::EPROTO),
                    _ => {}
                }
                // struct inet_diag_msg: the port in network order, and the inode as the last.
                let body = rest.get(16..size).and_then(|b| b.first_chunk::<72>());
                let body = body.ok_or(Errno::EPROTO)?;
                let inode = u32::from_ne_bytes([body[68], body[69], body[70], body[71]]);
                out.push((inode.into(), u16::from_be_bytes([body[4], body[5]])));
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
    Ok(out)
}

/// The same from /proc, for kernels without tcp_diag.
fn listed() -> Vec<(u64, u16)> {
    let mut out = Vec::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{table}");
        let text = fs::read_to_string(path).unwrap_or_default();
        out.extend(text.lines().filter_map(listening));
    }
    out
}

/// Inode and port of a line of /proc/net/tcp, if that socket listens.
fn listening(line: &str) -> Option<(u64, u16)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.get(3) != Some(&"0A") {
        return None;
    }
    let port = u16::from_str_radix(words.get(1)?.rsplit(':').next()?, 16).ok()?;
    Some((words.get(9)?.parse().ok()?, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_show_who_listens() {
        let v4 = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let v6 = std::net::TcpListener::bind("[::]:0").unwrap();
        for socket in [v4, v6] {
            let port = socket.local_addr().unwrap().port();
            let of = |list: Vec<(u64, u16)>| list.into_iter().find(|(_, p)| *p == port);
            let found = of(listed());
            assert!(found.is_some());
            assert_eq!(of(asked().unwrap_or_else(|_| listed())), found);
        }
    }

    #[test]
    fn listening_sockets_are_told_from_others() {
        let line = "   0: 00000000:3A9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1337        0 4242 1 0";
        assert_eq!(listening(line), Some((4242, 15006)));
        assert_eq!(listening(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(listening("sl local_address rem_address"), None);
    }
}
