//! Where a packet ends: a walk through rules in the form that `iptables-save` prints, told rule by rule.
//!
//! [`Ruleset`] holds the rules (of the kernel, of a file, or ours); [`rule`] judges one rule against a [`Packet`];
//! [`walk`] takes the packet through the hooks in the kernel's order. The first packet of a connection is what counts:
//! the nat table decides for it alone, and later packets follow. [`command`] is the command line.

pub mod command;
mod native;
mod rule;
mod walk;

use std::{collections::BTreeMap, fmt, net::IpAddr};

pub use walk::{End, Trace, walk};

use crate::{
    Error,
    model::{Family, Rule, Table},
    state::Tables,
};

/// What connection tracking says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It opens a connection.
    New,
    /// It belongs to a known connection.
    Established,
    /// It belongs to none and cannot open one.
    Invalid,
    /// A rule keeps it from being tracked.
    Untracked,
}

/// The packet whose way is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// `tcp`, `udp` or another name of /etc/protocols.
    pub protocol: String,
    /// Where it comes from.
    pub from: IpAddr,
    /// Source port; none is one that no rule names.
    pub from_port: Option<u16>,
    /// Where it goes.
    pub to: IpAddr,
    /// Destination port.
    pub to_port: u16,
    /// The interface that it came in by; none for a packet made here.
    pub input: Option<String>,
    /// The interface that it leaves by; none for a packet from elsewhere.
    pub output: Option<String>,
    /// User of the sending socket, if it is of this machine.
    pub uid: Option<u32>,
    /// Group of the sending socket.
    pub gid: Option<u32>,
    /// Firewall mark.
    pub mark: u32,
    /// Mark of its connection.
    pub connection_mark: u32,
    /// What connection tracking says.
    pub state: State,
    /// The pod's own addresses besides loopback, for rules that ask whether an address is local.
    pub own: Vec<IpAddr>,
}

impl Packet {
    /// The family whose rules it meets.
    pub fn family(&self) -> Family {
        if self.to.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.own.contains(&address)
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        write!(f, "{} {}", self.protocol, host(self.from))?;
        if let Some(port) = self.from_port {
            write!(f, ":{port}")?;
        }
        write!(f, " -> {}:{}", host(self.to), self.to_port)?;
        match (&self.input, &self.output) {
            (Some(name), _) => write!(f, ", in by {name}"),
            (None, Some(name)) => {
                write!(f, ", out by {name}")?;
                match (self.uid, self.gid) {
                    (Some(uid), Some(gid)) => write!(f, ", of user {uid} and group {gid}"),
                    (Some(uid), None) => write!(f, ", of user {uid}"),
                    _ => write!(f, ", of no user"),
                }
            }
            _ => Ok(()),
        }?;
        if self.mark != 0 {
            write!(f, ", mark {:#x}", self.mark)?;
        }
        match self.state {
            State::New => Ok(()),
            State::Established => write!(f, ", of an established connection"),
            State::Invalid => write!(f, ", of no valid connection"),
            State::Untracked => write!(f, ", of a connection that is not tracked"),
        }
    }
}

/// One chain: what happens at its end, and its rules without `-A CHAIN`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Whether what reaches the end of a built-in chain is dropped.
    pub drops: bool,
    /// In order.
    pub rules: Vec<String>,
}

/// The rules of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    tables: BTreeMap<Table, BTreeMap<String, Chain>>,
}

impl Ruleset {
    /// Reads the output of `iptables-save`. Errors name the line. The security table, which decides about labels
    /// only, is passed over.
    pub fn parse(save: &str) -> Result<Ruleset, Error> {
        let mut set = Ruleset::default();
        // None before the first table, Some(None) in one that is passed over.
        let mut table: Option<Option<Table>> = None;
        for (i, line) in save.lines().enumerate() {
            let bad = |why: &str| Error::Invalid(format!("rules, line {}: {why}: {line:?}", i + 1));
            let line = line.trim_end();
            // `iptables-save -c` puts counters before each rule.
            let rule = match line.strip_prefix('[') {
                Some(rest) => rest.split_once("] ").map(|(_, r)| r).unwrap_or(line),
                None => line,
            };
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line.strip_prefix('*') {
                table = match (name.trim(), Table::named(name.trim())) {
                    (_, Some(t)) => {
                        set.tables.entry(t).or_default();
                        Some(Some(t))
                    }
                    ("security", None) => Some(None),
                    _ => return Err(bad("no table of iptables")),
                };
                continue;
            }
            if line == "COMMIT" {
                table = None;
                continue;
            }
            let Some(table) = table else {
                return Err(bad(
                    "stands in no table; the form of iptables-save is expected",
                ));
            };
            let Some(table) = table else { continue };
            let chains = set.tables.entry(table).or_default();
            if let Some(head) = line.strip_prefix(':') {
                let mut words = head.split(' ');
                let name = words.next().unwrap_or_default();
                let chain = chains.entry(name.into()).or_default();
                chain.drops = words.next() == Some("DROP");
            } else if let Some(rest) = rule.strip_prefix("-A ") {
                let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
                let chain = chains.entry(name.into()).or_default();
                chain.rules.push(text.into());
            } else {
                return Err(bad("neither a chain nor a rule"));
            }
        }
        Ok(set)
    }

    /// What the kernel holds once `rules` are written.
    pub fn ours(rules: &[Rule], family: Family) -> Ruleset {
        let mut set = Ruleset::default();
        for (table, chains) in Tables::expected(rules, family).0 {
            let chains = chains.into_iter().map(|(name, rules)| {
                let drops = false;
                (name, Chain { drops, rules })
            });
            set.tables.insert(table, chains.collect());
        }
        set
    }

    /// Whether there is no rule at all.
    pub fn is_empty(&self) -> bool {
        let mut chains = self.tables.values().flat_map(BTreeMap::values);
        chains.all(|c| c.rules.is_empty() && !c.drops)
    }

    fn chain(&self, table: Table, name: &str) -> Option<&Chain> {
        self.tables.get(&table)?.get(name)
    }
}

#[cfg(test)]
mod tests;
