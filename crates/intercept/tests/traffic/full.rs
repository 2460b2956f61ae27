//! A full table of connection tracking: what translates or tracks drops new connections, and the kernel counts them;
//! eBPF, which does neither, keeps serving.

use std::fs;

use crate::{
    conntrack::fill,
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
    if mode.transparent {
        second_half(&net, mode, true);
    }
    let before = net.pod.run(dropped);
    net.pod.run(fill);
    let (call, inbound) = (call(), inbound());
    let after = net.pod.run(dropped);
    if mode.transparent {
        second_half(&net, mode, mode.entries == 0);
    }
    if mode.entries == 0 {
        assert!(
            inbound.starts_with("inbound 10.9.0.5:80 10.9.0.1"),
            "{inbound}"
        );
    }
    if mode.cgroup {
        assert!(call.starts_with("outbound 10.96.7.7:9080 "), "{call}");
        assert_eq!(before, after);
        return;
    }
    // Nobody answers a packet that is dropped. What the app calls is translated in every mode but eBPF.
    assert!(call.contains("timed out"), "{call}");
    if mode.entries > 0 {
        assert!(inbound.contains("timed out"), "{inbound}");
    }
    assert!(
        after > before,
        "the kernel counted no drop: {before}, {after}"
    );
}

/// The proxy's calls to the app on behalf of a client: from the client's address, with TPROXY's mark. The app's answers
/// must come back by `lo`.
fn second_half(net: &Pod, mode: &Mode, served: bool) {
    for (client, to) in [
        ("10.9.0.1", "10.9.0.5:80"),
        ("2001:db8:9::1", "[2001:db8:9::5]:80"),
    ] {
        let proxy = Caller::of(mode.proxy).for_client(client.parse().expect("an address"), 1337);
        let found = net.pod.call(proxy, to.parse().expect("an address"));
        match served {
            true => assert_eq!(found, format!("app {to} {client}")),
            false => assert!(found.contains("timed out"), "{found}"),
        }
    }
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
