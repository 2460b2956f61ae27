//! Service addresses: each is rewritten to one of its ready pods by the node's kernel, as kube-proxy does it.
//!
//! The whole table is replaced in one transaction at each change; established connections keep their pod.

use std::{fmt::Write as _, net::Ipv4Addr};

use crate::{
    error::Result,
    node::network::{POD_RANGE, feed},
};

/// One port of one service address, and the pods behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VirtualPort {
    /// `namespace/service:port`, for whoever lists the rules.
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub(crate) protocol: String,
    pub(crate) endpoints: Vec<(Ipv4Addr, u16)>,
}

/// The node's nat table for these services, in iptables-restore's form.
pub(crate) fn nat_table(ports: &[VirtualPort]) -> String {
    let mut out =
        String::from("*nat\n:SERVICES - [0:0]\n-A PREROUTING -j SERVICES\n-A OUTPUT -j SERVICES\n");
    for p in ports {
        let count = p.endpoints.len();
        for (i, (address, port)) in p.endpoints.iter().enumerate() {
            let _ = write!(
                out,
                "-A SERVICES -d {}/32 -p {proto} -m {proto} --dport {} -m comment --comment \"{}\"",
                p.address,
                p.port,
                p.name,
                proto = p.protocol,
            );
            // Of n pods the first takes 1/n, the second 1/(n-1) of what is left, the last all of the rest.
            if i + 1 < count {
                let share = 1.0 / (count - i) as f64;
                let _ = write!(out, " -m statistic --mode random --probability {share:.11}");
            }
            let _ = writeln!(out, " -j DNAT --to-destination {address}:{port}");
        }
    }
    // A pod that reaches itself through a service address would drop an answer from its own address.
    let mut pods: Vec<_> = ports
        .iter()
        .flat_map(|p| p.endpoints.iter().map(|e| e.0))
        .collect();
    pods.sort_unstable();
    pods.dedup();
    for pod in pods
        .into_iter()
        .filter(|p| p.octets()[..2] == POD_RANGE.octets()[..2])
    {
        let _ = writeln!(out, "-A POSTROUTING -s {pod}/32 -d {pod}/32 -j MASQUERADE");
    }
    out.push_str("COMMIT\n");
    out
}

/// Puts the table in force in the namespace of this process.
pub(crate) fn apply(ports: &[VirtualPort]) -> Result<()> {
    feed("iptables-restore", &["-w", "5"], &nat_table(ports))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pod_gets_its_share_and_may_call_itself() {
        let ip = |n| Ipv4Addr::new(10, 244, 0, n);
        let table = nat_table(&[VirtualPort {
            name: "default/reviews:http".into(),
            address: Ipv4Addr::new(10, 96, 0, 20),
            port: 9080,
            protocol: "tcp".into(),
            endpoints: vec![(ip(5), 80), (ip(6), 80), (ip(7), 80)],
        }]);
        let rules: Vec<_> = table.lines().filter(|l| l.contains("DNAT")).collect();
        assert_eq!(rules.len(), 3);
        assert!(
            rules[0].contains("--probability 0.33333333333"),
            "{}",
            rules[0]
        );
        assert!(
            rules[1].contains("--probability 0.50000000000"),
            "{}",
            rules[1]
        );
        assert!(
            !rules[2].contains("statistic") && rules[2].ends_with("10.244.0.7:80"),
            "{}",
            rules[2]
        );
        assert!(table.contains("-s 10.244.0.6/32 -d 10.244.0.6/32 -j MASQUERADE"));
    }

    #[test]
    fn a_service_without_ready_pods_has_no_rule() {
        let table = nat_table(&[VirtualPort {
            name: "a/b:c".into(),
            address: Ipv4Addr::new(10, 96, 0, 20),
            port: 80,
            protocol: "tcp".into(),
            endpoints: vec![],
        }]);
        assert!(!table.contains("DNAT"));
    }
}
