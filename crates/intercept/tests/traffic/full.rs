//! A full table of connection tracking: what translates or tracks drops new connections, and the kernel counts them;
//! eBPF, which does neither, keeps serving.
//!
//! The limit is the node's and not this test's to change, so the table of the pod's namespace is filled up to it.

use std::fs;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};
use std::os::fd::AsRawFd;

use crate::{
    matrix::{Mode, Pod},
    net::Caller,
};

pub(crate) fn run(mode: &Mode) {
    let net = Pod::new(mode);
    net.apply(mode, "");
    let app = Caller::of((1000, 1000));
    let call = || {
        net.pod
            .call(app, "10.96.7.7:9080".parse().expect("an address"))
    };
    let inbound = || {
        net.outside
            .call(app, "10.9.0.5:80".parse().expect("an address"))
    };
    assert!(call().starts_with("outbound ") && inbound().starts_with("inbound "));
    let before = net.pod.run(dropped);
    net.pod.run(fill);
    let (call, inbound) = (call(), inbound());
    let after = net.pod.run(dropped);
    if mode.entries == 0 {
        assert!(call.starts_with("outbound 10.96.7.7:9080 "), "{call}");
        assert!(inbound.starts_with("inbound 10.9.0.5:80 "), "{inbound}");
        assert_eq!(before, after);
        return;
    }
    // Nobody answers a packet that is dropped.
    assert!(call.contains("timed out"), "{call}");
    assert!(inbound.contains("timed out"), "{inbound}");
    assert!(
        after > before,
        "the kernel counted no drop: {before}, {after}"
    );
}

/// Packets that found no room: the column `drop`, summed over the cores.
fn dropped() -> u64 {
    let text =
        fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack").expect("connection tracking");
    let mut lines = text.lines().map(|l| l.split_whitespace());
    let at = lines
        .next()
        .and_then(|mut l| l.position(|w| w == "drop"))
        .expect("a column");
    lines
        .filter_map(|mut l| u64::from_str_radix(l.nth(at)?, 16).ok())
        .sum()
}

/// Puts in as many entries as there may be, none of which the kernel would give up for a new one.
fn fill() {
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
