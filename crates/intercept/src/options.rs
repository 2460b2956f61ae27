//! Every flag of istio-iptables, and the variables of the environment that stand for them.

use crate::{
    config::Environment,
    flags::{self, Flag, Kind, Values},
};

/// Values of the environment; one that cannot be read leaves the default, as with istio-iptables.
pub fn from_environment(env: Environment<'_>) -> Values {
    let mut values = Values::new();
    let mut take = |flag: &Flag, name: &str| {
        if let Some(value) = env(name)
            && flags::check(flag.kind, &value).is_ok()
        {
            values.insert(flag.long, value);
        }
    };
    for flag in FLAGS {
        // The one flag without a variable: Kubernetes sets ENVOY_PORT for a service of that name.
        if flag.long != "envoy-port" && !flag.help.is_empty() {
            take(flag, &flag.long.to_uppercase().replace('-', "_"));
        }
        for (long, variable) in MORE_ENVIRONMENT {
            if *long == flag.long {
                take(flag, variable);
            }
        }
    }
    values
}

const MORE_ENVIRONMENT: &[(&str, &str)] = &[
    ("redirect-dns", "ISTIO_META_DNS_CAPTURE"),
    ("drop-invalid", "INVALID_DROP"),
    ("dual-stack", "ISTIO_DUAL_STACK"),
];

const fn text(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag {
        long,
        short,
        kind: Kind::Text,
        help,
    }
}

const fn switch(long: &'static str, short: Option<char>, help: &'static str) -> Flag {
    Flag {
        long,
        short,
        kind: Kind::Switch,
        help,
    }
}

/// Every flag. Those without help are taken without effect: log flags, and flags that istio-iptables had once.
pub const FLAGS: &[Flag] = &[
    text(
        "envoy-port",
        Some('p'),
        "port that outbound connections are led to (15001)",
    ),
    text(
        "inbound-capture-port",
        Some('z'),
        "port that inbound connections are led to (15006)",
    ),
    text(
        "inbound-tunnel-port",
        Some('e'),
        "port of the tunnel, never captured (15008)",
    ),
    text(
        "proxy-uid",
        Some('u'),
        "users whose traffic is the proxy's own, comma-separated ($ENVOY_USER, else 1337)",
    ),
    text(
        "proxy-gid",
        Some('g'),
        "groups whose traffic is the proxy's own, comma-separated (as --proxy-uid)",
    ),
    text(
        "istio-inbound-interception-mode",
        Some('m'),
        "REDIRECT, TPROXY or EBPF",
    ),
    text(
        "istio-inbound-ports",
        Some('b'),
        "inbound ports to capture: empty none, * all, or a list",
    ),
    text(
        "istio-local-exclude-ports",
        Some('d'),
        "inbound ports to leave alone when all are captured",
    ),
    text(
        "istio-exclude-interfaces",
        Some('c'),
        "interfaces to leave alone",
    ),
    text(
        "istio-service-cidr",
        Some('i'),
        "destinations to capture: empty none, * all, or ranges",
    ),
    text(
        "istio-service-exclude-cidr",
        Some('x'),
        "destinations to leave alone: ranges",
    ),
    text(
        "istio-outbound-ports",
        Some('q'),
        "outbound ports to capture whatever the destination",
    ),
    text(
        "istio-local-outbound-ports-exclude",
        Some('o'),
        "outbound ports to leave alone",
    ),
    text(
        "kube-virt-interfaces",
        Some('k'),
        "interfaces of virtual machines: what comes in there counts as outbound",
    ),
    text(
        "istio-inbound-tproxy-mark",
        Some('t'),
        "firewall mark of TPROXY (1337)",
    ),
    text(
        "istio-inbound-tproxy-route-table",
        Some('r'),
        "routing table of TPROXY (133)",
    ),
    switch("dry-run", Some('n'), "print, apply nothing"),
    Flag {
        long: "iptables-probe-port",
        short: None,
        kind: Kind::U16,
        help: "port that the self-test connects to (15002)",
    },
    Flag {
        long: "probe-timeout",
        short: None,
        kind: Kind::Duration,
        help: "how long the self-test may take (5s)",
    },
    switch("skip-rule-apply", None, "apply nothing"),
    switch(
        "run-validation",
        None,
        "prove that the capture works; exit status 126 if it does not",
    ),
    switch(
        "redirect-dns",
        None,
        "capture DNS queries to the servers of /etc/resolv.conf ($ISTIO_META_DNS_CAPTURE)",
    ),
    switch(
        "capture-all-dns",
        None,
        "with --redirect-dns: capture every DNS query",
    ),
    switch(
        "drop-invalid",
        None,
        "drop packets that connection tracking calls invalid ($INVALID_DROP)",
    ),
    switch(
        "dual-stack",
        None,
        "capture IPv6 when any address is IPv6 ($ISTIO_DUAL_STACK)",
    ),
    text(
        "network-namespace",
        None,
        "path of the network namespace to work in",
    ),
    switch(
        "cni-mode",
        None,
        "run from the host's file system, with a lock of the pod's own",
    ),
    switch("reconcile", None, "replace ISTIO rules that differ"),
    switch("cleanup-only", None, "remove all ISTIO rules, apply none"),
    switch(
        "force-apply",
        None,
        "write the rules even if they are in place",
    ),
    switch("native-nftables", None, "use nft instead of iptables"),
    text(
        "force-iptables-binary",
        None,
        "legacy or nft, instead of finding out",
    ),
    text(
        "rules-version",
        None,
        "write the rules of an older Istio: 1.3, 1.5, 1.13 (current)",
    ),
    switch(
        "tproxy-notrack",
        None,
        "TPROXY: keep inbound connections out of connection tracking, whose table may be full",
    ),
    text(
        "mode",
        None,
        "the same as --istio-inbound-interception-mode",
    ),
    text(
        "ebpf-cgroup",
        None,
        "EBPF: the pod's folder in cgroup2 (the one of this process)",
    ),
    text(
        "ebpf-sockmap",
        None,
        "EBPF: pass bytes from socket to socket: off, pod (app and proxy), proxies[=NAME] (of one node) or node[=NAME] (both)",
    ),
    text(
        "ebpf-without",
        None,
        "EBPF: programs not to use (steer, connect4 ...); what needs them is left to iptables",
    ),
    switch(
        "ebpf-fallback",
        None,
        "EBPF: leave to iptables what this kernel's programs cannot do",
    ),
    // Gone from istio-iptables, still in manifests.
    switch("restore-format", Some('f'), ""),
    switch("iptables-trace-logging", None, ""),
    text("output-paths", None, ""),
    // Log flags of every Istio program.
    switch("log_as_json", None, ""),
    text("log_caller", None, ""),
    text("log_output_level", None, ""),
    text("log_rotate", None, ""),
    text("log_rotate_max_age", None, ""),
    text("log_rotate_max_backups", None, ""),
    text("log_rotate_max_size", None, ""),
    text("log_stacktrace_level", None, ""),
    text("log_target", None, ""),
    text("vklog", None, ""),
];
