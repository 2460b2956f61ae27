//! `outrigger intercept ebpf`: what the programs of this network namespace do, with counters.

use super::{
    store::{self, Hits, Policy},
    sys,
};
use crate::Error;

/// Programs, rules with the packets that met them, and counters.
pub fn text() -> Result<String, Error> {
    let (_, inode) = store::netns()?;
    let sets = store::sets(inode);
    let Some(set) = sets.iter().find(|s| s.complete()) else {
        return Ok("No eBPF programs capture here.\n".into());
    };
    let mut out = String::from("Programs:\n");
    for (name, link) in set.links() {
        let to = match (
            sys::field(&link, "cgroup_id"),
            sys::field(&link, "netns_ino"),
        ) {
            (Some(0), _) | (_, Some(0)) => "nothing: it was detached".into(),
            (Some(id), _) => format!("cgroup {id}"),
            (_, Some(id)) => format!("network namespace {id}"),
            _ => "something unknown".into(),
        };
        let program = sys::field(&link, "prog_id").unwrap_or_default();
        out.push_str(&format!("  {name:<13} {to}, program {program}\n"));
    }
    let (policy, hits) = set.read()?;
    out.push_str(&rules(&policy, Some(&hits)));
    out.push_str("Counters:\n");
    for (value, what) in set.counters()?.iter().zip(COUNTERS) {
        out.push_str(&format!("  {value:>8} {what}\n"));
    }
    Ok(out)
}

/// The rules by list; `hits` are shown before each.
pub(super) fn rules(policy: &Policy, hits: Option<&Hits>) -> String {
    let mut out = String::new();
    for (list, name) in ["outbound", "inbound"].iter().enumerate() {
        for (v6, family) in ["IPv4", "IPv6"].iter().enumerate() {
            let records = &policy.lists[list][v6];
            if !records.is_empty() {
                out.push_str(&format!("Rules, {name} {family}:\n"));
            }
            for (n, record) in records.iter().enumerate() {
                let packets = hits.and_then(|h| h[list][v6].get(n));
                let packets = packets.map(|p| format!("{p:>8} ")).unwrap_or_default();
                out.push_str(&format!("  {:>3} {packets}{record}\n", record.number));
            }
        }
    }
    out
}

/// How the policy `there` differs from the one that is wanted, a sentence each.
pub(super) fn differences(there: &Policy, wanted: &Policy) -> Vec<String> {
    if there == wanted {
        return Vec::new();
    }
    let mut out = Vec::new();
    let names = [
        "outbound IPv4",
        "outbound IPv6",
        "inbound IPv4",
        "inbound IPv6",
    ];
    let lists = there
        .lists
        .iter()
        .flatten()
        .zip(wanted.lists.iter().flatten());
    for (name, (found, should)) in names.iter().zip(lists) {
        for record in should.iter().filter(|r| !found.contains(r)) {
            out.push(format!("{name} lacks: {record}"));
        }
        for record in found.iter().filter(|r| !should.contains(r)) {
            out.push(format!("{name} should not have: {record}"));
        }
        if found != should && out.is_empty() {
            out.push(format!("{name} has the right rules in another order"));
        }
    }
    if there.lists == wanted.lists {
        out.push("ports, addresses or --ebpf-sockmap are others".into());
    }
    out
}

const COUNTERS: [&str; 4] = [
    "directions of connections whose bytes go from socket to socket",
    "directions that could have, and go through TCP",
    "inbound calls refused because no proxy listens",
    "connections whose destination could not be kept",
];
