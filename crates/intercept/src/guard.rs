//! The guard: tells when the rules of a network namespace change after they were found good, and undoes it when told to.
//!
//! What is there at the start is the baseline: whatever wrote it, every rule that is inserted, deleted or moved in the
//! nat, mangle and raw tables of iptables, or in our tables of nft, is reported by table, chain and text; of programs of
//! mode EBPF each that is detached or replaced, and each rule that they walk. Reading rules needs NET_ADMIN in the
//! namespace, and seeing programs the rights of the node. A look costs one netlink message while nothing changed in
//! nftables; legacy tables have no such counter and are read each time, where there are any, and so are programs.

use std::{thread, time::Duration};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::{
    Error,
    backend::{self, Backend},
    ebpf::Watch,
    flags::{self, Flag, Kind},
    model::{Family, Table},
    nft, state,
};

/// Time between two looks: a change is reported well within five seconds.
pub const PERIOD: Duration = Duration::from_secs(2);

/// A change since the start.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// `rule` or `program`.
    pub subject: &'static str,
    /// `inserted`, `deleted` or `reordered`; of programs also `detached`, `replaced` or `changed`.
    pub kind: &'static str,
    /// Which rule of which chain, or which program, for people.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.subject, self.kind, self.what)
    }
}

/// One program's view of one family.
#[derive(Debug)]
struct View {
    family: Family,
    suffix: &'static str,
    baseline: String,
}

/// The guard of the namespace that the calling thread is in.
#[derive(Debug)]
pub struct Guard {
    views: Vec<View>,
    native: Option<String>,
    programs: Option<Watch>,
    netlink: OwnedFd,
    generation: Option<u32>,
    /// What was found of rules when they were last read.
    rules: Vec<Finding>,
    last: Vec<Finding>,
}

impl Guard {
    /// Takes what is there for good. Fails where the rules cannot be read (NET_ADMIN is missing), or where nothing is
    /// captured.
    pub fn start() -> Result<Guard, Error> {
        let fail = |why: nix::Error| Error::Surroundings {
            what: "netfilter".into(),
            why: why.to_string(),
        };
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )
        .map_err(fail)?;
        let generation = generation(&netlink);
        let mut views = Vec::new();
        for family in [Family::V4, Family::V6] {
            for suffix in ["nft", "legacy"] {
                if let Ok(baseline) = Backend::saved(family, suffix) {
                    views.push(View {
                        family,
                        suffix,
                        baseline,
                    });
                }
            }
        }
        let native = nft::listing()?;
        let programs = Watch::start()?;
        let captured = programs.is_some()
            || native.is_some()
            || views.iter().any(|v| v.baseline.contains("\n:ISTIO_"));
        if !captured {
            return Err(Error::Conflict(
                "no ISTIO rules are here to guard: run istio-iptables first; if it ran, reading needs NET_ADMIN"
                    .into(),
            ));
        }
        Ok(Guard {
            views,
            native,
            programs,
            netlink,
            generation,
            rules: Vec::new(),
            last: Vec::new(),
        })
    }

    /// What differs from the start now.
    pub fn look(&mut self) -> Result<&[Finding], Error> {
        self.look_at_rules()?;
        self.last = self.rules.clone();
        self.last.extend(self.programs.iter().flat_map(Watch::look));
        Ok(&self.last)
    }

    fn look_at_rules(&mut self) -> Result<(), Error> {
        let now = generation(&self.netlink);
        let nft_changed = now.is_none() || now != self.generation;
        let legacy = self.views.iter().any(|v| v.suffix == "legacy" && !idle(v));
        if !nft_changed && !legacy {
            return Ok(());
        }
        let mut found = Vec::new();
        for view in &self.views {
            if view.suffix == "legacy" && idle(view) {
                continue;
            }
            let text = Backend::saved(view.family, view.suffix)?;
            found.extend(differences(&view.baseline, &text, &view.name()));
        }
        if let Some(baseline) = &self.native {
            let text = nft::listing()?.unwrap_or_default();
            found.extend(nft_differences(baseline, &text));
        }
        self.generation = now;
        self.rules = found;
        Ok(())
    }

    /// Writes back what was there at the start, each table that differs in one transaction.
    pub fn repair(&mut self) -> Result<(), Error> {
        for view in &self.views {
            let text = Backend::saved(view.family, view.suffix)?;
            let mut back = String::new();
            for table in GUARDED {
                let section = state::section(&view.baseline, table);
                if chains(&section) != chains(&state::section(&text, table)) {
                    back.push_str(&section);
                }
            }
            if !back.is_empty() {
                Backend::named(view.family, view.suffix)?.restore(&back, true)?;
            }
        }
        if let Some(baseline) = &self.native
            && nft::listing()?.as_ref() != Some(baseline)
        {
            nft::restore(baseline)?;
        }
        if let Some(programs) = &mut self.programs
            && !programs.look().is_empty()
        {
            programs.repair()?;
        }
        self.generation = None;
        Ok(())
    }
}

impl View {
    fn name(&self) -> String {
        let family = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        format!("{family}-{}", self.suffix)
    }
}

/// Legacy tables that were not there and still are not: asking for them would make them.
fn idle(view: &View) -> bool {
    !view.baseline.contains("\n-A ") && !backend::legacy_tables(view.family)
}

/// The tables that can lead a packet elsewhere before or instead of us.
const GUARDED: [Table; 3] = [Table::Mangle, Table::Nat, Table::Raw];

type Chains = Vec<(String, Vec<String>)>;

/// Chains of one table in the form of iptables-save, counters left out.
fn chains(section: &str) -> Chains {
    let mut out: Chains = Vec::new();
    for line in section.lines() {
        if let Some(head) = line.strip_prefix(':') {
            let name = head.split(' ').next().unwrap_or_default();
            out.push((name.into(), Vec::new()));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let (name, rule) = rule.split_once(' ').unwrap_or((rule, ""));
            if let Some((_, rules)) = out.iter_mut().find(|(n, _)| n == name) {
                rules.push(rule.into());
            }
        }
    }
    out.sort();
    out
}

fn differences(baseline: &str, now: &str, program: &str) -> Vec<Finding> {
    let mut out = Vec::new();
    for table in GUARDED {
        let before = chains(&state::section(baseline, table));
        let after = chains(&state::section(now, table));
        let place = |chain: &str| format!("{program}, table {table}, chain {chain}");
        compare(&before, &after, place, &mut out);
    }
    out
}

/// The chains of a listing of nft, by table and name.
fn nft_chains(listing: &str) -> Chains {
    let (mut table, mut out) = (String::new(), Chains::new());
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {").into();
        } else if let Some(name) = line.strip_prefix("chain ") {
            out.push((
                format!("{table} {}", name.trim_end_matches(" {")),
                Vec::new(),
            ));
        } else if line != "}"
            && !line.is_empty()
            && let Some((_, rules)) = out.last_mut()
        {
            rules.push(line.into());
        }
    }
    out.sort();
    out
}

fn nft_differences(baseline: &str, now: &str) -> Vec<Finding> {
    let mut out = Vec::new();
    let place = |chain: &str| format!("nft, {chain}");
    compare(&nft_chains(baseline), &nft_chains(now), place, &mut out);
    out
}

fn compare(
    before: &Chains,
    after: &Chains,
    place: impl Fn(&str) -> String,
    out: &mut Vec<Finding>,
) {
    let none = Vec::new();
    let rules = |chains: &'_ Chains, name: &str| -> Option<Vec<String>> {
        let found = chains.iter().find(|(n, _)| n == name);
        found.map(|(_, rules)| rules.clone())
    };
    let mut names: Vec<&String> = before.iter().chain(after).map(|(n, _)| n).collect();
    names.sort();
    names.dedup();
    for name in names {
        let (b, a) = (rules(before, name), rules(after, name));
        let place = place(name);
        // A built-in chain that was never used is not listed and is the same as an empty one.
        if b == a
            || b.as_ref().unwrap_or(&none) == a.as_ref().unwrap_or(&none)
                && !name.contains("ISTIO_")
        {
            continue;
        }
        let gone = a.is_none();
        let (b, a) = (b.unwrap_or_default(), a.unwrap_or_default());
        if gone {
            let what = format!("{place}: the whole chain");
            out.push(Finding {
                subject: "rule",
                kind: "deleted",
                what,
            });
            continue;
        }
        let had = out.len();
        for (i, rule) in only_in(&a, &b) {
            let what = format!("{place}, rule {}: {rule}", i + 1);
            out.push(Finding {
                subject: "rule",
                kind: "inserted",
                what,
            });
        }
        for (i, rule) in only_in(&b, &a) {
            let what = format!("{place}, rule {}: {rule}", i + 1);
            out.push(Finding {
                subject: "rule",
                kind: "deleted",
                what,
            });
        }
        if out.len() == had {
            let at = a.iter().zip(&b).position(|(a, b)| a != b).unwrap_or(0);
            let rule = a.get(at).cloned().unwrap_or_default();
            let what = format!("{place}, from rule {}: {rule}", at + 1);
            out.push(Finding {
                subject: "rule",
                kind: "reordered",
                what,
            });
        }
    }
}

/// Those of `list` that `other` does not have as often, with their places.
fn only_in<'a>(list: &'a [String], other: &[String]) -> Vec<(usize, &'a String)> {
    let mut left: Vec<&String> = other.iter().collect();
    list.iter()
        .enumerate()
        .filter(|(_, rule)| match left.iter().position(|l| l == rule) {
            Some(at) => {
                left.swap_remove(at);
                false
            }
            None => true,
        })
        .collect()
}

/// The number of nftables' generation, which each transaction raises; none where it cannot be asked for.
fn generation(netlink: &OwnedFd) -> Option<u32> {
    const GET_GENERATION: u16 = (10 << 8) | 16; // NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
    let mut message = Vec::with_capacity(20);
    message.extend(20u32.to_ne_bytes());
    message.extend(GET_GENERATION.to_ne_bytes());
    message.extend(1u16.to_ne_bytes()); // NLM_F_REQUEST
    message.extend([0; 8]);
    message.extend([0; 4]); // struct nfgenmsg: unspecified family, version 0, resource 0
    sendto(
        netlink.as_raw_fd(),
        &message,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )
    .ok()?;
    let mut answer = [0u8; 512];
    let n = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty()).ok()?;
    let answer = answer.get(..n)?;
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    // NFT_MSG_NEWGEN; its first attribute is NFTA_GEN_ID, a number in network order.
    if kind != (10 << 8) | 15 || answer.get(22..24)? != 1u16.to_ne_bytes() {
        return None;
    }
    Some(u32::from_be_bytes(answer.get(24..28)?.try_into().ok()?))
}

const FLAGS: &[Flag] = &[
    Flag {
        long: "repair",
        short: None,
        kind: Kind::Switch,
        help: "write back what was there at the start",
    },
    Flag {
        long: "network-namespace",
        short: None,
        kind: Kind::Text,
        help: "path of the network namespace to guard (this one)",
    },
    Flag {
        long: "help",
        short: Some('h'),
        kind: Kind::Switch,
        help: "print this",
    },
];

/// `outrigger intercept guard`: runs until it is ended or the rules cannot be read any more.
pub fn command(args: &[String]) -> Result<(), Error> {
    let values = flags::parse(FLAGS, args)?;
    let on = |name| {
        values
            .get(name)
            .is_some_and(|v: &String| flags::switch(v) == Ok(true))
    };
    if on("help") {
        println!("Usage: outrigger intercept guard [flags]\n\nFlags:");
        for flag in FLAGS {
            println!("  --{:<20}{}", flag.long, flag.help);
        }
        return Ok(());
    }
    if let Some(path) = values.get("network-namespace").filter(|p| !p.is_empty()) {
        crate::command::enter(path)?;
    }
    let mut guard = Guard::start()?;
    println!("info\tguarding the rules of this network namespace");
    let mut known = Vec::new();
    loop {
        thread::sleep(PERIOD);
        let found = guard.look()?.to_vec();
        for finding in found.iter().filter(|f| !known.contains(*f)) {
            println!("warning\t{finding}");
        }
        if found.is_empty() && !known.is_empty() {
            println!("info\teverything is again as it was");
        }
        if !found.is_empty() && on("repair") {
            guard.repair()?;
            println!("info\trepaired: what was there at the start is there again");
            known = Vec::new();
        } else {
            known = found;
        }
    }
}
