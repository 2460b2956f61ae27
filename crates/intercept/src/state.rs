//! What the kernel holds: the output of `iptables-save`, and the form in which it prints our rules.
//!
//! Rules are compared as ordered lists, chain by chain. Rules of others do not count: chains whose name does not begin
//! with ISTIO_ are ignored, and in the built-in chains only rules that lead to ours, or that we would write, matter.

use std::{collections::BTreeMap, net::IpAddr};

use base::cidr::Cidr;

use crate::{
    model::{Family, Match, Position, Rule, Sense, Table, Target, ours},
    surroundings,
};

/// The rules of one table by chain, in order, without `-A CHAIN`.
pub type Chains = BTreeMap<String, Vec<String>>;

/// The tables of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables(pub BTreeMap<Table, Chains>);

impl Tables {
    /// Reads the output of `iptables-save`; tables that we never write are left out.
    pub fn parse(save: &str) -> Tables {
        let mut tables = BTreeMap::<Table, Chains>::new();
        let mut table = None;
        for line in save.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::named(name.trim());
            } else if let Some(table) = table {
                let chains = tables.entry(table).or_default();
                if let Some(name) = line.strip_prefix(':') {
                    let name = name.split(' ').next().unwrap_or_default();
                    chains.entry(name.into()).or_default();
                } else if let Some(rule) = line.strip_prefix("-A ") {
                    let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
                    chains.entry(chain.into()).or_default().push(normal(rule));
                }
            }
        }
        Tables(tables)
    }

    /// What the kernel should hold once `rules` are written.
    pub fn expected(rules: &[Rule], family: Family) -> Tables {
        let mut tables = BTreeMap::<Table, Chains>::new();
        for rule in rules.iter().filter(|r| r.family == family) {
            let chains = tables.entry(rule.table).or_default();
            if let Target::Jump(chain) = rule.target {
                chains.entry(chain.into()).or_default();
            }
            let chain = chains.entry(rule.chain.into()).or_default();
            match rule.position {
                Position::End => chain.push(saved(rule)),
                Position::At(n) => chain.insert((n - 1).min(chain.len()), saved(rule)),
            }
        }
        Tables(tables)
    }

    /// Whether anything of ours is there.
    pub fn has_ours(&self) -> bool {
        self.0.values().any(|chains| {
            chains
                .iter()
                .any(|(name, rules)| ours(name) || rules.iter().any(|r| leads_to_ours(r)))
        })
    }

    /// Whether rules of ours keep connections out of connection tracking.
    pub fn untracks(&self) -> bool {
        let raw = self.0.get(&Table::Raw);
        raw.is_some_and(|chains| chains.contains_key("ISTIO_NOTRACK"))
    }

    /// The firewall marks that TPROXY rules of ours set.
    pub fn tproxy_marks(&self) -> Vec<u32> {
        let chain = self
            .0
            .get(&Table::Mangle)
            .and_then(|c| c.get("ISTIO_TPROXY"));
        let rules = chain.into_iter().flatten();
        rules
            .filter_map(|rule| {
                let (_, mark) = rule.split_once("--tproxy-mark 0x")?;
                let digits = mark.split(|c: char| !c.is_ascii_hexdigit()).next()?;
                u32::from_str_radix(digits, 16).ok()
            })
            .collect()
    }

    /// How what is there differs from what should be, a sentence each; empty when nothing does.
    pub fn differences(&self, expected: &Tables) -> Vec<String> {
        let none = Chains::new();
        let mut out = Vec::new();
        for table in Table::ALL {
            let there = self.0.get(&table).unwrap_or(&none);
            let should = expected.0.get(&table).unwrap_or(&none);
            for (name, rules) in should {
                let found = match there.get(name) {
                    Some(found) if ours(name) => found.clone(),
                    Some(found) => own(found, rules).cloned().collect(),
                    None if ours(name) => {
                        out.push(format!("table {table}: chain {name} is missing"));
                        continue;
                    }
                    None => Vec::new(),
                };
                compare(table, name, &found, rules, &mut out);
            }
            for (name, rules) in there {
                if should.contains_key(name) {
                    continue;
                }
                if ours(name) {
                    out.push(format!("table {table}: chain {name} should not be there"));
                }
                for rule in rules.iter().filter(|r| leads_to_ours(r)) {
                    out.push(format!("table {table}: {name} should not have: {rule}"));
                }
            }
        }
        out
    }

    /// The lines for `iptables-restore` that remove from one table what is ours and what we would write.
    pub fn removals(&self, table: Table, expected: &Tables) -> Vec<String> {
        let none = Vec::new();
        let Some(chains) = self.0.get(&table) else {
            return none;
        };
        let mesh = chains.keys().any(|name| ours(name));
        let mut out = Vec::new();
        for (name, rules) in chains.iter().filter(|(name, _)| !ours(name)) {
            let should = expected.0.get(&table).and_then(|c| c.get(name));
            for rule in rules {
                let written = should.is_some_and(|s| s.contains(rule));
                if leads_to_ours(rule) || written || mesh && companion(table, rule) {
                    out.push(format!("-D {name} {rule}"));
                }
            }
        }
        let names: Vec<&String> = chains.keys().filter(|name| ours(name)).collect();
        out.extend(names.iter().map(|name| format!("-F {name}")));
        out.extend(names.iter().map(|name| format!("-X {name}")));
        out
    }
}

/// The section of one table in the output of `iptables-save`, ready to be restored; an empty table if it has none.
pub fn section(save: &str, table: Table) -> String {
    let head = format!("*{table}");
    let mut out = String::new();
    for line in save.lines() {
        if line == head || !out.is_empty() {
            out.push_str(line);
            out.push('\n');
            if line == "COMMIT" {
                return out;
            }
        }
    }
    format!("{head}\nCOMMIT\n")
}

/// Those of `rules` that are ours in a built-in chain.
fn own<'a>(rules: &'a [String], expected: &'a [String]) -> impl Iterator<Item = &'a String> {
    rules
        .iter()
        .filter(move |r| leads_to_ours(r) || expected.contains(r))
}

/// How the rules of one chain differ, a sentence each.
pub(crate) fn compare(
    table: Table,
    chain: &str,
    found: &[String],
    should: &[String],
    out: &mut Vec<String>,
) {
    if found == should {
        return;
    }
    let before = out.len();
    for rule in should.iter().filter(|r| !found.contains(r)) {
        out.push(format!("table {table}: {chain} lacks: {rule}"));
    }
    for rule in found.iter().filter(|r| !should.contains(r)) {
        out.push(format!("table {table}: {chain} should not have: {rule}"));
    }
    if out.len() == before {
        let why = if found.len() == should.len() {
            "another order"
        } else {
            "repetitions"
        };
        out.push(format!(
            "table {table}: {chain} has the right rules with {why}"
        ));
    }
}

fn leads_to_ours(rule: &str) -> bool {
    rule.split_once("-j ")
        .is_some_and(|(_, target)| ours(target))
}

/// Rules that Istio writes into built-in chains and that lead nowhere: exempt interfaces, and the marks of TPROXY.
/// Only where ISTIO chains stand in the same table are they taken for ours.
fn companion(table: Table, rule: &str) -> bool {
    let words: Vec<&str> = rule.split(' ').collect();
    match words[..] {
        ["-i" | "-o", _, "-j", "RETURN"] => true,
        _ if table != Table::Mangle => false,
        [
            "-p",
            "tcp",
            "-m",
            "mark",
            "--mark",
            _,
            "-j",
            "CONNMARK",
            "--save-mark",
            ..,
        ] => true,
        [
            "-p",
            "tcp",
            "-m",
            "connmark",
            "--mark",
            _,
            "-j",
            "CONNMARK",
            "--restore-mark",
            ..,
        ] => true,
        [
            "-o",
            "lo",
            "-p",
            "tcp",
            "-m",
            "mark",
            "--mark",
            _,
            "-j",
            "RETURN",
        ] => true,
        [
            "!",
            "-d",
            _,
            "-o",
            "lo",
            "-p",
            "tcp",
            "-m",
            "owner",
            _,
            _,
            "-j",
            "MARK",
            ..,
        ] => true,
        _ => false,
    }
}

/// A rule as `iptables-save` prints it.
fn saved(rule: &Rule) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut add = |sense: Sense, parts: &[&str]| {
        if sense == Sense::Not {
            words.push("!".into());
        }
        words.extend(parts.iter().map(|p| p.to_string()));
    };
    for m in &rule.matches {
        if let Match::Source(cidr) = m
            && cidr.bits > 0
        {
            add(Sense::Is, &["-s", &cidr.masked().to_string()]);
        }
    }
    for m in &rule.matches {
        if let Match::Destination(sense, cidr) = m
            && (cidr.bits > 0 || *sense == Sense::Not)
        {
            add(*sense, &["-d", &cidr.masked().to_string()]);
        }
    }
    for m in &rule.matches {
        if let Match::In(name) = m {
            add(Sense::Is, &["-i", name]);
        }
    }
    for m in &rule.matches {
        if let Match::Out(name) = m {
            add(Sense::Is, &["-o", name]);
        }
    }
    let protocol = rule.matches.iter().find_map(|m| match m {
        Match::Protocol(p) => Some(*p),
        _ => None,
    });
    if let Some(p) = protocol {
        add(Sense::Is, &["-p", p]);
    }
    let protocol = protocol.unwrap_or("tcp");
    for m in &rule.matches {
        match m {
            Match::Port(Sense::Is, port) => {
                add(
                    Sense::Is,
                    &["-m", protocol, "--dport", &ports(port, protocol)],
                );
            }
            Match::Port(Sense::Not, port) => {
                add(
                    Sense::Is,
                    &["-m", protocol, "!", "--dport", &ports(port, protocol)],
                );
            }
            Match::SourcePort(port) => {
                add(
                    Sense::Is,
                    &["-m", protocol, "--sport", &ports(port, protocol)],
                );
            }
            Match::NotPorts(list) => {
                let list: Vec<String> = list.iter().map(|p| ports(p, protocol)).collect();
                add(
                    Sense::Is,
                    &["-m", "multiport", "!", "--dports", &list.join(",")],
                );
            }
            Match::Uid(sense, id) => {
                let id = match id.parse::<u32>() {
                    Ok(_) => id.clone(),
                    Err(_) => surroundings::user_id(id).unwrap_or_else(|| id.clone()),
                };
                owner(&mut add, *sense, "--uid-owner", &id);
            }
            Match::Gid(sense, id) => {
                let id = surroundings::group_id(id).unwrap_or_else(|| id.clone());
                owner(&mut add, *sense, "--gid-owner", &id);
            }
            Match::Mark(Sense::Is, mark) => add(Sense::Is, &["-m", "mark", "--mark", &hex(mark)]),
            Match::Mark(Sense::Not, mark) => {
                add(Sense::Is, &["-m", "mark", "!", "--mark", &hex(mark)]);
            }
            Match::ConnMark(mark) => add(Sense::Is, &["-m", "connmark", "--mark", &hex(mark)]),
            Match::Opens(sense) => {
                // A port before it stands in the same module.
                if !rule.matches.iter().any(|m| matches!(m, Match::Port(..))) {
                    add(Sense::Is, &["-m", protocol]);
                }
                add(*sense, &["--tcp-flags", "FIN,SYN,RST,ACK", "SYN"]);
            }
            Match::Transparent => add(Sense::Is, &["-m", "socket", "--transparent"]),
            Match::State(states) => {
                add(
                    Sense::Is,
                    &["-m", "conntrack", "--ctstate", &states.join(",")],
                );
            }
            _ => {}
        }
    }
    let any = match rule.family {
        Family::V4 => "0.0.0.0",
        Family::V6 => "::",
    };
    let masks = ["--nfmask", "0xffffffff", "--ctmask", "0xffffffff"];
    match &rule.target {
        Target::Return => add(Sense::Is, &["-j", "RETURN"]),
        Target::Accept => add(Sense::Is, &["-j", "ACCEPT"]),
        Target::Drop => add(Sense::Is, &["-j", "DROP"]),
        Target::Jump(chain) => add(Sense::Is, &["-j", chain]),
        Target::Redirect(port) | Target::RedirectOne(port) => {
            add(Sense::Is, &["-j", "REDIRECT", "--to-ports", port]);
        }
        Target::SetMark(mark) => {
            add(
                Sense::Is,
                &[
                    "-j",
                    "MARK",
                    "--set-xmark",
                    &format!("{}/0xffffffff", hex(mark)),
                ],
            );
        }
        Target::SaveMark => {
            add(Sense::Is, &["-j", "CONNMARK", "--save-mark"]);
            add(Sense::Is, &masks);
        }
        Target::RestoreMark => {
            add(Sense::Is, &["-j", "CONNMARK", "--restore-mark"]);
            add(Sense::Is, &masks);
        }
        Target::Tproxy { mark, port } => {
            let mark = format!("{}/0xffffffff", hex(mark));
            add(
                Sense::Is,
                &["-j", "TPROXY", "--on-port", port, "--on-ip", any],
            );
            add(Sense::Is, &["--tproxy-mark", &mark]);
        }
        Target::NoTrack => add(Sense::Is, &["-j", "CT", "--notrack"]),
        Target::Zone(zone) => add(Sense::Is, &["-j", "CT", "--zone", &zone.to_string()]),
    }
    words.join(" ")
}

fn owner(add: &mut impl FnMut(Sense, &[&str]), sense: Sense, option: &str, id: &str) {
    add(Sense::Is, &["-m", "owner"]);
    add(sense, &[option, id]);
}

/// A port or a range of ports, names resolved.
fn ports(text: &str, protocol: &str) -> String {
    text.split(':')
        .map(|p| match surroundings::port(p, protocol) {
            Some(port) => port.to_string(),
            None => p.to_string(),
        })
        .collect::<Vec<_>>()
        .join(":")
}

fn hex(mark: &str) -> String {
    let value = match mark.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => mark.parse().ok(),
    };
    value.map_or_else(|| mark.to_string(), |v| format!("{v:#x}"))
}

/// A line of `iptables-save` with its addresses in our spelling: versions differ in how they write IPv6.
fn normal(rule: &str) -> String {
    let mut address = false;
    rule.split_whitespace()
        .map(|word| {
            let is_address = std::mem::replace(&mut address, matches!(word, "-s" | "-d"));
            if !is_address {
                return word.to_string();
            }
            match (Cidr::parse(word), word.parse::<IpAddr>()) {
                (Ok(cidr), _) => cidr.masked().to_string(),
                (_, Ok(ip)) => Cidr::host(ip).to_string(),
                _ => word.to_string(),
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests;
