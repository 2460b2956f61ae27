//! A full table of connection tracking.
//!
//! The limit is the node's and not a test's to change, so the table of a network namespace is filled up to it. Tests of
//! `outrigger-intercept` take this file by its path.

use std::{fs, os::fd::AsRawFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};

/// Puts in as many entries as there may be, none of which the kernel would give up for a new one: in the network
/// namespace of this thread, for ten minutes.
pub fn fill() {
    let read = |name: &str| -> u32 {
        let text = fs::read_to_string(format!("/proc/sys/net/netfilter/{name}"))
            .expect("connection tracking");
        text.trim().parse().expect("a number")
    };
    let most = read("nf_conntrack_max");
    let link = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .expect("netlink");
    let send = |message: &[u8]| {
        let to = NetlinkAddr::new(0, 0);
        sendto(link.as_raw_fd(), message, &to, MsgFlags::empty()).expect("netlink takes it");
    };
    // What is there already might end and make room: a deletion that names nothing takes everything.
    send(&message(0x102, 5, &[]));
    // Only eight bytes differ from entry to entry: the client's in both directions.
    let (template, other) = (entry(0), entry(u32::MAX));
    let places: Vec<usize> = (0..template.len())
        .filter(|i| template[*i] != other[*i])
        .collect();
    let mut batch = Vec::new();
    for n in 0..=most {
        let at = batch.len();
        batch.extend(&template);
        for (place, byte) in places.iter().zip(n.to_be_bytes().iter().cycle()) {
            batch[at + place] = *byte;
        }
        if batch.len() > 30_000 || n == most {
            send(&batch);
            batch.clear();
        }
    }
    let there = read("nf_conntrack_count");
    assert!(there >= most, "{there} of {most} entries");
}

/// A message that makes one entry of UDP, assured and long-lived.
fn entry(n: u32) -> Vec<u8> {
    let attribute = |kind: u16, value: &[u8]| {
        let mut out = Vec::new();
        out.extend((4 + value.len() as u16).to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    };
    let nested = |kind: u16, parts: &[Vec<u8>]| attribute(0x8000 | kind, &parts.concat());
    let (client, server) = ([10, 200, (n >> 24) as u8, (n >> 16) as u8], [10, 201, 0, 1]);
    let (from, to) = ((n as u16).to_be_bytes(), 5000u16.to_be_bytes());
    let tuple = |kind, a: [u8; 4], b: [u8; 4], a_port: [u8; 2], b_port: [u8; 2]| {
        let ip = nested(1, &[attribute(1, &a), attribute(2, &b)]);
        let ports = [
            attribute(1, &[17]),
            attribute(2, &a_port),
            attribute(3, &b_port),
        ];
        nested(kind, &[ip, nested(2, &ports)])
    };
    // Confirmed, assured, answered.
    let status = attribute(3, &0xeu32.to_be_bytes());
    let timeout = attribute(7, &600u32.to_be_bytes());
    let body = [
        tuple(1, client, server, from, to),
        tuple(2, server, client, to, from),
        status,
        timeout,
    ]
    .concat();
    // New; request, create, exclusive.
    message(0x100, 0x601, &body)
}

/// A message of ctnetlink for IPv4.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend((20 + body.len() as u32).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]);
    out.extend([2, 0, 0, 0]);
    out.extend(body);
    out
}
