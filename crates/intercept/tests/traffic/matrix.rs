//! The table of calls and modes.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    process::Command,
};

use crate::net::{Caller, Cgroup, Namespace};

/// A way to capture: one column.
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    /// Flags of istio-iptables beside [`FLAGS`].
    pub(crate) flags: &'static str,
    /// Whether the proxy's inbound socket is transparent.
    pub(crate) transparent: bool,
    /// Entries of connection tracking that an inbound connection makes.
    pub(crate) entries: usize,
    /// Whether they are of address translation.
    pub(crate) inbound_nat: bool,
    /// Whether the pod has a cgroup of its own, which programs are attached to.
    pub(crate) cgroup: bool,
    /// User and group of the proxy.
    pub(crate) proxy: (u32, u32),
    /// Lists ISTIO_OUTPUT with counters; gives packets by rule.
    pub(crate) counters: fn(&Namespace) -> Vec<u64>,
    /// Deletes the n-th rule of ISTIO_OUTPUT, from 1; by how many places those behind it move up.
    pub(crate) delete: fn(&Namespace, usize) -> usize,
}

pub(crate) const MODES: &[Mode] = &[
    Mode {
        name: "iptables_nft",
        flags: "-m REDIRECT --force-iptables-binary nft",
        transparent: false,
        entries: 1,
        inbound_nat: true,
        cgroup: false,
        proxy: (1337, 1337),
        counters: |pod| iptables_counters(pod, "iptables-nft"),
        delete: |pod, n| iptables_delete(pod, "iptables-nft", n),
    },
    Mode {
        name: "iptables_legacy",
        flags: "-m REDIRECT --force-iptables-binary legacy",
        transparent: false,
        entries: 1,
        inbound_nat: true,
        cgroup: false,
        proxy: (1337, 1337),
        counters: |pod| iptables_counters(pod, "iptables-legacy"),
        delete: |pod, n| iptables_delete(pod, "iptables-legacy", n),
    },
    Mode {
        name: "nft",
        flags: "-m REDIRECT --native-nftables",
        transparent: false,
        entries: 1,
        inbound_nat: true,
        cgroup: false,
        proxy: (1337, 1337),
        counters: nft_counters,
        delete: nft_delete,
    },
    Mode {
        name: "tproxy",
        flags: "-m TPROXY",
        transparent: true,
        entries: 1,
        inbound_nat: false,
        cgroup: false,
        // NET_ADMIN needs root; the group tells the proxy.
        proxy: (0, 1337),
        counters: |pod| iptables_counters(pod, "iptables-nft"),
        delete: |pod, n| iptables_delete(pod, "iptables-nft", n),
    },
    Mode {
        name: "tproxy_notrack",
        flags: "-m TPROXY --tproxy-notrack",
        transparent: true,
        entries: 0,
        inbound_nat: false,
        cgroup: false,
        proxy: (0, 1337),
        counters: |pod| iptables_counters(pod, "iptables-nft"),
        delete: |pod, n| iptables_delete(pod, "iptables-nft", n),
    },
    Mode {
        name: "ebpf",
        flags: "-m EBPF",
        ..EBPF
    },
    Mode {
        name: "ebpf_sockmap",
        flags: "-m EBPF --ebpf-sockmap pod",
        ..EBPF
    },
];

const EBPF: Mode = Mode {
    name: "",
    flags: "",
    transparent: false,
    entries: 0,
    inbound_nat: false,
    cgroup: true,
    proxy: (1337, 1337),
    counters: ebpf_counters,
    delete: ebpf_delete,
};

/// What every mode is asked for.
pub(crate) const FLAGS: &str = "-p 15001 -z 15006 -u 1337 -i '*' -x 198.51.100.0/24,2001:db8:51::/48 -b '*' \
     -d 15090,15021,15020 -o 8444 --dual-stack --redirect-dns --capture-all-dns";

/// Who calls.
#[derive(Clone, Copy)]
enum Who {
    /// The app in the pod.
    App,
    /// The proxy in the pod.
    Proxy,
    /// User 1337 in the pod, whatever the proxy runs as.
    User,
    /// User 1000 of the proxy's group.
    Group,
    /// The proxy, from the address that it calls the app from.
    Passthrough,
    /// Somebody outside.
    Outside,
}
use Who::*;

/// The cells of one row: a call and who answers it, the same in every mode.
struct Call {
    what: &'static str,
    from: Who,
    to: &'static str,
    answers: &'static str,
}

const fn call(what: &'static str, from: Who, to: &'static str, answers: &'static str) -> Call {
    Call {
        what,
        from,
        to,
        answers,
    }
}

/// The proxy's ports are named `outbound` and `inbound`; `app`, `agent` and `outside` are the others.
const CALLS: &[Call] = &[
    call("outbound by service", App, "10.96.7.7:9080", "outbound"),
    call("outbound by pod IP", App, "10.9.0.1:9080", "outbound"),
    call("to localhost", App, "127.0.0.1:80", "app"),
    call("to self by service", App, "10.96.5.5:80", "outbound"),
    call(
        "to self by service, second half",
        Proxy,
        "10.9.0.5:80",
        "inbound",
    ),
    call("to self by pod IP", App, "10.9.0.5:80", "app"),
    call("the proxy to the app", Passthrough, "10.9.0.5:80", "app"),
    call("the proxy to localhost", Proxy, "127.0.0.1:80", "app"),
    call("user 1337 outbound", User, "10.96.7.7:9080", "outside"),
    call("user 1337 to self", User, "10.9.0.5:80", "inbound"),
    call("group 1337 outbound", Group, "10.96.7.7:9080", "outside"),
    call(
        "group 1337 to self, DNS port",
        Group,
        "10.9.0.5:53",
        "inbound",
    ),
    call("DNS over TCP to localhost", App, "127.0.0.1:53", "agent"),
    call("excluded port", App, "10.96.7.7:8444", "outside"),
    call("excluded range", App, "198.51.100.9:9080", "outside"),
    call("inbound app port", Outside, "10.9.0.5:80", "inbound"),
    call("inbound unknown port", Outside, "10.9.0.5:4321", "inbound"),
    call("inbound 15020", Outside, "10.9.0.5:15020", "app"),
    call("inbound 15021", Outside, "10.9.0.5:15021", "app"),
    call("inbound 15090", Outside, "10.9.0.5:15090", "app"),
    call("DNS over TCP", App, "10.9.0.1:53", "agent"),
    call("the agent's DNS over TCP", Proxy, "10.9.0.1:53", "outside"),
    call(
        "IPv6 outbound by service",
        App,
        "[2001:db8:96::7]:9080",
        "outbound",
    ),
    call("IPv6 to localhost", App, "[::1]:80", "app"),
    call(
        "IPv6 second half to self",
        Proxy,
        "[2001:db8:9::5]:80",
        "inbound",
    ),
    call("IPv6 to self by pod IP", App, "[2001:db8:9::5]:80", "app"),
    call(
        "IPv6 the proxy to the app",
        Passthrough,
        "[2001:db8:9::5]:80",
        "app",
    ),
    call(
        "IPv6 user 1337 outbound",
        User,
        "[2001:db8:96::7]:9080",
        "outside",
    ),
    call(
        "IPv6 excluded range",
        App,
        "[2001:db8:51::9]:9080",
        "outside",
    ),
    call(
        "IPv6 inbound app port",
        Outside,
        "[2001:db8:9::5]:80",
        "inbound",
    ),
    call(
        "IPv6 inbound 15021",
        Outside,
        "[2001:db8:9::5]:15021",
        "app",
    ),
];

/// The same for datagrams.
const DATAGRAMS: &[Call] = &[
    call("UDP untouched", App, "10.96.7.7:9999", "outside"),
    call("UDP to localhost", App, "127.0.0.1:9999", "app"),
    call("DNS", App, "10.9.0.1:53", "agent"),
    call("the agent's DNS", User, "10.9.0.1:53", "outside"),
    call("inbound UDP", Outside, "10.9.0.5:9999", "app"),
    call(
        "IPv6 UDP untouched",
        App,
        "[2001:db8:96::7]:9999",
        "outside",
    ),
    call("IPv6 DNS", App, "[2001:db8:9::1]:53", "agent"),
    call(
        "IPv6 the agent's DNS",
        User,
        "[2001:db8:9::1]:53",
        "outside",
    ),
];

/// The nine rules of ISTIO_OUTPUT, and where the listing with [`FLAGS`] has them (from 1): the excluded port's two
/// come first, the jump for DNS stands before the eighth, and the excluded range before the ninth.
const NINE: [usize; 9] = [3, 4, 5, 6, 7, 8, 9, 11, 13];

pub(crate) struct Pod {
    pub(crate) pod: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) cgroup: Option<Cgroup>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        if self.cgroup.is_some() {
            // Programs outlive what they were made for.
            self.pod.last(|| {
                let run = env::current_exe().expect("a path");
                let args = ["istio-iptables", "--cleanup-only"];
                Command::new(run).args(args).output()
            });
        }
    }
}

impl Pod {
    /// A pod without rules: its peers, its card, and the world outside.
    pub(crate) fn new(mode: &Mode) -> Pod {
        let (pod, outside) = (Namespace::new(), Namespace::new());
        let cgroup = mode.cgroup.then(|| Cgroup::around(&pod));
        let loose = "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done\n";
        pod.sh(&format!(
            "set -e\nip link set lo up\n\
             ip link add eth0 type veth peer name eth0 netns {}\n\
             ip addr add 10.9.0.5/24 dev eth0\nip -6 addr add 2001:db8:9::5/64 dev eth0 nodad\nip link set eth0 up\n\
             ip route add default via 10.9.0.1\n{loose}",
            outside.thread
        ));
        outside.sh(&format!(
            "set -e\nip link set lo up\nip addr add 10.9.0.1/24 dev eth0\n\
             ip -6 addr add 2001:db8:9::1/64 dev eth0 nodad\nip link set eth0 up\n\
             for a in 10.96.7.7 10.96.5.5 198.51.100.9; do ip addr add $a/32 dev lo; done\n\
             for a in 2001:db8:96::7 2001:db8:51::9; do ip -6 addr add $a/128 dev lo nodad; done\n{loose}"
        ));
        pod.sh("ip -6 route add default via 2001:db8:9::1");
        Pod::wait_for_link(&pod, &outside);
        for any in ["0.0.0.0", "[::]"] {
            let at = |port: u16| format!("{any}:{port}").parse().expect("an address");
            pod.peer("outbound", at(15001), mode.transparent);
            pod.peer("inbound", at(15006), mode.transparent);
            for port in [80, 15020, 15021, 15090] {
                pod.peer("app", at(port), false);
            }
            for port in [53, 80, 8444, 9080] {
                outside.peer("outside", at(port), false);
            }
            let local = if any == "[::]" { "[::1]" } else { "127.0.0.1" };
            let agent = format!("{local}:15053").parse().expect("an address");
            pod.peer("agent", agent, false);
            // Answers are told by their owner: they belong to the zone of the app's queries.
            pod.udp_peer("agent", Caller::of(mode.proxy), agent);
        }
        for at in ["10.9.0.5:9999", "127.0.0.1:9999"] {
            pod.udp_peer("app", Caller::ROOT, at.parse().expect("an address"));
        }
        // Datagrams are answered from the address that they were sent to.
        for at in [
            "10.9.0.1:53",
            "10.96.7.7:9999",
            "[2001:db8:9::1]:53",
            "[2001:db8:96::7]:9999",
        ] {
            outside.udp_peer("outside", Caller::ROOT, at.parse().expect("an address"));
        }
        Pod {
            pod,
            outside,
            cgroup,
        }
    }

    /// Carriers come up on their own time: the first packet over the card tells.
    fn wait_for_link(pod: &Namespace, outside: &Namespace) {
        for at in ["10.9.0.1:7777", "[2001:db8:9::1]:7777"] {
            let at = at.parse().expect("an address");
            outside.udp_peer("up", Caller::ROOT, at);
            assert_eq!(pod.ask(Caller::ROOT, at), "up");
        }
    }

    pub(crate) fn apply(&self, mode: &Mode, more: &str) {
        self.pod.sh(&format!(
            "$RUN istio-iptables {FLAGS} {} {more}",
            mode.flags
        ));
    }

    fn caller(mode: &Mode, from: Who, to: SocketAddr) -> Caller {
        let passthrough: IpAddr = match to {
            SocketAddr::V4(_) => [127, 0, 0, 6].into(),
            SocketAddr::V6(_) => "::6".parse().expect("an address"),
        };
        let caller = Caller::of(match from {
            App | Outside => (1000, 1000),
            Proxy | Passthrough => mode.proxy,
            User => (1337, 1337),
            Group => (1000, 1337),
        });
        let bind = matches!(from, Passthrough).then_some(passthrough);
        Caller { bind, ..caller }
    }

    fn place(&self, from: Who) -> &Namespace {
        match from {
            Outside => &self.outside,
            _ => &self.pod,
        }
    }
}

/// Runs all cells of one column.
pub(crate) fn run(mode: &Mode) {
    let net = Pod::new(mode);
    net.apply(mode, "");
    let mut problems = Vec::new();
    for c in CALLS {
        let to: SocketAddr = c.to.parse().expect("an address");
        let found = net.place(c.from).call(Pod::caller(mode, c.from, to), to);
        let mut words = found.split(' ');
        let who = words.next().unwrap_or_default();
        if who != c.answers {
            problems.push(format!("{}: expected {}, found {found}", c.what, c.answers));
        } else if matches!(who, "outbound" | "inbound") && words.next() != Some(c.to) {
            problems.push(format!("{}: another original destination: {found}", c.what));
        } else if matches!(c.from, Outside) && found.split(' ').nth(2) != Some(outside_of(to)) {
            problems.push(format!("{}: the client's address is lost: {found}", c.what));
        }
    }
    for c in DATAGRAMS {
        let to: SocketAddr = c.to.parse().expect("an address");
        let found = net.place(c.from).ask(Pod::caller(mode, c.from, to), to);
        if found != c.answers {
            problems.push(format!("{}: expected {}, found {found}", c.what, c.answers));
        }
    }
    let mut hits: Vec<u64> = (mode.counters)(&net.pod);
    // The third rule takes what the sixth would: with the third gone, the sixth must do its work.
    let moved = (mode.delete)(&net.pod, NINE[2]);
    let to: SocketAddr = "10.9.0.5:80".parse().expect("an address");
    let found = net.pod.call(Pod::caller(mode, App, to), to);
    if !found.starts_with("app ") {
        problems.push(format!(
            "to self by pod IP, by the sixth rule: found {found}"
        ));
    }
    let after = (mode.counters)(&net.pod);
    hits[NINE[5] - 1] += after[NINE[5] - 1 - moved];
    for (n, at) in NINE.iter().enumerate() {
        // What the nat table is not asked for meets no rule of it.
        let untracked = n == 0 && mode.name == "tproxy_notrack";
        if !untracked && hits.get(at - 1).is_none_or(|packets| *packets == 0) {
            problems.push(format!(
                "rule {} of ISTIO_OUTPUT is never met: {hits:?}",
                n + 1
            ));
        }
    }
    problems.extend(same_port(&net, mode));
    if let Some(problem) = translated(&net, mode) {
        problems.push(problem);
    }
    assert!(
        problems.is_empty(),
        "{}:\n  {}",
        mode.name,
        problems.join("\n  ")
    );
}

fn outside_of(to: SocketAddr) -> &'static str {
    match to {
        SocketAddr::V4(_) => "10.9.0.1",
        SocketAddr::V6(_) => "2001:db8:9::1",
    }
}

/// App and agent ask the same server from the same port: connection tracking must not take one for the other.
fn same_port(net: &Pod, mode: &Mode) -> Option<String> {
    let to: SocketAddr = "10.9.0.1:53".parse().expect("an address");
    let port = net.pod.free_udp_port();
    for round in 0..3 {
        for (who, from, answers) in [("app", App, "agent"), ("agent", User, "outside")] {
            let found = net.pod.ask_from(Pod::caller(mode, from, to), port, to);
            if found != answers {
                return Some(format!(
                    "DNS from one port, round {round}: the {who} got {found}, expected {answers}"
                ));
            }
        }
    }
    None
}

/// A connection makes as many entries of connection tracking as the mode says, translated or not: one that comes in, and
/// one that goes out, which every mode but eBPF translates.
fn translated(net: &Pod, mode: &Mode) -> Option<String> {
    if !net.pod.try_sh("command -v conntrack").1 {
        return None;
    }
    let outbound = usize::from(!mode.cgroup);
    for (from, to, port, entries, nat) in [
        (
            Outside,
            "10.9.0.5:4321",
            4321,
            mode.entries,
            mode.inbound_nat,
        ),
        (App, "10.96.7.7:9080", 9080, outbound, outbound > 0),
    ] {
        net.pod.sh("conntrack -F 2>/dev/null");
        let to: SocketAddr = to.parse().expect("an address");
        net.place(from).call(Pod::caller(mode, from, to), to);
        let list = net.pod.sh("conntrack -L -p tcp 2>/dev/null");
        let (called, answers) = (format!("dport={port} "), format!("sport={port} "));
        let found: Vec<&str> = list.lines().filter(|l| l.contains(&called)).collect();
        // A translated entry is answered by another port than was called.
        let translated = found.iter().any(|l| !l.contains(&answers));
        if found.len() != entries || translated != nat {
            return Some(format!(
                "a connection to {to}: expected entries: {entries}, translated: {nat}; found {found:?}"
            ));
        }
    }
    None
}

fn iptables_counters(pod: &Namespace, program: &str) -> Vec<u64> {
    let list = pod.sh(&format!("{program} -t nat -L ISTIO_OUTPUT -v -n -x"));
    let packets = |line: &str| line.split_whitespace().next()?.parse().ok();
    list.lines().skip(2).filter_map(packets).collect()
}

fn iptables_delete(pod: &Namespace, program: &str, n: usize) -> usize {
    pod.sh(&format!("{program} -t nat -D ISTIO_OUTPUT {n}"));
    1
}

/// Records of one rule are added up.
fn ebpf_counters(pod: &Namespace) -> Vec<u64> {
    let mut out: Vec<u64> = Vec::new();
    for (number, packets) in ebpf_records(pod) {
        out.resize(out.len().max(number), 0);
        out[number - 1] += packets;
    }
    out
}

/// The records of the outbound rules for IPv4: number of the rule and packets.
fn ebpf_records(pod: &Namespace) -> Vec<(usize, u64)> {
    let text = pod.sh("$RUN intercept ebpf");
    text.lines()
        .skip_while(|l| *l != "Rules, outbound IPv4:")
        .skip(1)
        .map_while(|line| {
            let mut words = line.strip_prefix("  ")?.split_whitespace();
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        })
        .collect()
}

/// Nothing can be taken out of the list, so the record gets a condition that nothing meets.
pub(crate) fn ebpf_delete(pod: &Namespace, n: usize) -> usize {
    use aya::maps::{Array, Map, MapData};
    let at = ebpf_records(pod)
        .iter()
        .position(|(number, _)| *number == n);
    let set = pod.sh("ls -d /sys/fs/bpf/outrigger/$(stat -Lc %i /proc/self/ns/net)/*");
    let map = |name| MapData::from_pin(format!("{}/map_{name}", set.trim())).expect("it is pinned");
    let generation: Array<_, u32> = Map::Array(map("generation")).try_into().expect("an array");
    let settings: Array<_, [u8; 72]> = Map::Array(map("settings")).try_into().expect("an array");
    let mut rules: Array<_, [u8; 88]> = Map::Array(map("rules")).try_into().expect("an array");
    let now = generation.get(&0, 0).expect("a number");
    let first = settings.get(&now, 0).expect("settings")[..4]
        .try_into()
        .expect("four bytes");
    let index = u32::from_ne_bytes(first) + at.expect("the rule") as u32;
    let mut record = rules.get(&index, 0).expect("a record");
    // A protocol, and one that nobody speaks.
    record[0] = 8;
    record[84] = 255;
    rules.set(index, record, 0).expect("a record");
    0
}

/// Rules with an address stand once for each family in the one chain: their counters are added up, so that the places
/// are those of iptables.
fn nft_counters(pod: &Namespace) -> Vec<u64> {
    let list = pod.sh("nft list chain inet istio-proxy-nat istio-output");
    let mut out: Vec<u64> = Vec::new();
    for line in list.lines() {
        let mut words = line.split_whitespace();
        let Some(packets) = words.find(|w| *w == "packets").and(words.next()) else {
            continue;
        };
        let packets = packets.parse().expect("a number");
        match (line.contains("ip6 "), out.last_mut()) {
            (true, Some(twin)) => *twin += packets,
            _ => out.push(packets),
        }
    }
    out
}

fn nft_delete(pod: &Namespace, n: usize) -> usize {
    let list = pod.sh("nft -a list chain inet istio-proxy-nat istio-output");
    let mut rules = list
        .lines()
        .filter(|l| l.contains(" counter ") && !l.contains("ip6 "));
    let rule = rules.nth(n - 1).expect("a rule");
    let handle = rule.rsplit(' ').next().expect("a handle");
    pod.sh(&format!(
        "nft delete rule inet istio-proxy-nat istio-output handle {handle}"
    ));
    1
}
