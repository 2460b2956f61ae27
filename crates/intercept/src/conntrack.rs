//! Connection tracking's entries for what our rules translated, read and deleted over ctnetlink.
//!
//! They matter when rules go: an entry translates only while the kernel tracks connections, which it does only while a
//! rule asks for it. A connection in flight would be cut in the middle, and an entry that is left over would lead a
//! later connection from the same port to a proxy that is not asked for any more.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};

use crate::{Error, config::Config, surroundings};

/// One translated connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    v6: bool,
    /// The attribute of its original direction, as the kernel wrote it: what names it in a deletion.
    original: Vec<u8>,
    zone: Option<Vec<u8>>,
    /// Whether packets are still to come: a TCP connection that is not in its last wait.
    pub(crate) alive: bool,
}

/// The entries that lead to the proxy's ports or the agent's, though they were meant for others.
pub(crate) fn translated(config: &Config) -> Result<Vec<Entry>, Error> {
    let tcp: Vec<u16> = [&config.proxy_port, &config.inbound_capture_port]
        .into_iter()
        .filter_map(|p| surroundings::port(p, "tcp"))
        .chain([DNS_PORT])
        .collect();
    let link = open()?;
    let mut out = Vec::new();
    for v6 in [false, true] {
        dump(&link, v6, &mut |message| {
            let Some(entry) = Seen::read(message) else {
                return;
            };
            let ours = match entry.protocol {
                TCP => tcp.contains(&entry.answered_by),
                UDP => entry.answered_by == DNS_PORT,
                _ => false,
            };
            if ours && entry.answered_by != entry.meant {
                out.push(Entry {
                    v6,
                    original: entry.original.to_vec(),
                    zone: entry.zone.map(<[u8]>::to_vec),
                    alive: entry.protocol == TCP && entry.state.is_some_and(|s| s < TIME_WAIT),
                });
            }
        })?;
    }
    Ok(out)
}

/// Waits until no translated connection has packets to come, but not for ever; gives how many are left.
///
/// Twice in a row there must be none: the kernel lists an entry only after the first packet has passed its last hook,
/// so one that was already beyond the rules is missing in the first list.
pub(crate) fn drain(config: &Config) -> Result<usize, Error> {
    let end = Instant::now() + DRAIN;
    let mut before = usize::MAX;
    loop {
        let left = translated(config)?.iter().filter(|e| e.alive).count();
        if left == 0 && before == 0 || Instant::now() >= end {
            return Ok(left);
        }
        before = left;
        thread::sleep(Duration::from_millis(20));
    }
}

/// Deletes what [`translated`] finds.
pub(crate) fn forget(config: &Config) -> Result<(), Error> {
    let entries = translated(config)?;
    let link = open()?;
    for entry in entries {
        let mut message = request(DELETE, REQUEST_ACK, entry.v6);
        message.extend(&entry.original);
        message.extend(entry.zone.iter().flatten());
        finish(&mut message);
        send(&link, &message)?;
        let mut answer = [0u8; 4096];
        // One that has gone by itself meanwhile is as well.
        recv(link.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(fail)?;
    }
    Ok(())
}

fn open() -> Result<OwnedFd, Error> {
    socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .map_err(fail)
}

fn fail(why: Errno) -> Error {
    Error::Surroundings {
        what: "connection tracking".into(),
        why: why.to_string(),
    }
}

fn request(kind: u16, flags: u16, v6: bool) -> Vec<u8> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    let mut message = vec![0; 4];
    message.extend((CTNETLINK << 8 | kind).to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    // struct nfgenmsg: family, version, resource.
    message.extend([family, 0, 0, 0]);
    message
}

/// Writes the length into the header.
fn finish(message: &mut [u8]) {
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
}

fn send(link: &OwnedFd, message: &[u8]) -> Result<(), Error> {
    let to = NetlinkAddr::new(0, 0);
    sendto(link.as_raw_fd(), message, &to, MsgFlags::empty())
        .map(drop)
        .map_err(fail)
}

/// Asks for all entries of a family; `take` gets the attributes of each.
fn dump(link: &OwnedFd, v6: bool, take: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
    const DUMP: u16 = 0x300;
    let mut message = request(GET, 1 | DUMP, v6);
    finish(&mut message);
    send(link, &message)?;
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        let length = recv(link.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(fail)?;
        let mut rest = &buffer[..length];
        while let Some(size) = number(rest, 0).filter(|s| (16..=rest.len()).contains(s)) {
            match rest.get(4..6).map(|k| u16::from_ne_bytes([k[0], k[1]])) {
                Some(DONE) => return Ok(()),
                Some(ERROR) => {
                    let code = number(rest, 16).map_or(0, |n| -(n as u32 as i32));
                    return Err(fail(Errno::from_raw(code)));
                }
                _ => take(rest.get(20..size).unwrap_or_default()),
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        if length == 0 {
            return Ok(());
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?) as usize)
}

/// What matters of an entry.
struct Seen<'a> {
    original: &'a [u8],
    zone: Option<&'a [u8]>,
    protocol: u8,
    /// The port that was called.
    meant: u16,
    /// The port that answers.
    answered_by: u16,
    state: Option<u8>,
}

impl<'a> Seen<'a> {
    fn read(message: &'a [u8]) -> Option<Seen<'a>> {
        let (mut original, mut reply, mut zone, mut state) = (None, None, None, None);
        for (kind, whole, value) in attributes(message) {
            match kind {
                1 => original = Some((whole, value)),
                2 => reply = Some(value),
                4 => state = find(find(value, 1)?, 1).and_then(|s| s.first().copied()),
                18 => zone = Some(whole),
                _ => {}
            }
        }
        let (whole, value) = original?;
        let (protocol, meant) = protocol_and_port(value, 3)?;
        let (_, answered_by) = protocol_and_port(reply?, 2)?;
        Some(Seen {
            original: whole,
            zone,
            protocol,
            meant,
            answered_by,
            state,
        })
    }
}

/// From a tuple: its protocol, and the port of that attribute (2 source, 3 destination).
fn protocol_and_port(tuple: &[u8], port: u16) -> Option<(u8, u16)> {
    let protocol = find(tuple, 2)?;
    let number = *find(protocol, 1)?.first()?;
    let port = find(protocol, port)?;
    Some((number, u16::from_be_bytes([*port.first()?, *port.get(1)?])))
}

fn find(attributes_of: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(attributes_of)
        .find(|(kind, ..)| *kind == wanted)
        .map(|(.., value)| value)
}

/// Kind, whole attribute with padding, and value of each; stops at what is no attribute.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let head = rest.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let value = rest.get(4..length)?;
        let whole = &rest[..length.next_multiple_of(4).min(rest.len())];
        rest = &rest[whole.len()..];
        Some((kind, whole, value))
    })
}

/// How long a clean-up waits for connections that are under way.
const DRAIN: Duration = Duration::from_secs(5);
/// The agent's DNS.
const DNS_PORT: u16 = 15053;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// The kernel's number of that state; those before it carry data.
const TIME_WAIT: u8 = 7;
const CTNETLINK: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const REQUEST_ACK: u16 = 1 | 4;
const ERROR: u16 = 2;
const DONE: u16 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut out = (4 + value.len() as u16).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    #[test]
    fn an_entry_tells_what_was_meant_and_who_answers() {
        let tuple = |kind, from: u16, to: u16| {
            let ports = [
                attribute(1, &[TCP]),
                attribute(2, &from.to_be_bytes()),
                attribute(3, &to.to_be_bytes()),
            ];
            attribute(kind, &attribute(0x8000 | 2, &ports.concat()))
        };
        let state = attribute(4, &attribute(1, &attribute(1, &[3])));
        let message = [tuple(1, 40000, 9080), tuple(2, 15001, 40000), state].concat();
        let seen = Seen::read(&message).unwrap();
        assert_eq!((seen.meant, seen.answered_by), (9080, 15001));
        assert_eq!((seen.protocol, seen.state), (TCP, Some(3)));
        assert_eq!(seen.original, tuple(1, 40000, 9080));
        // Rubbish is no entry.
        for cut in 0..message.len() - 8 {
            let _ = Seen::read(&message[..cut]);
        }
        assert!(Seen::read(&[0xff; 40]).is_none());
    }
}
