//! Rules as the input of `iptables-restore`, in Istio's own spelling.

use crate::model::{Family, Match, Position, Rule, Sense, Table, Target, ours};

/// The input of one family: tables in order, only those that have rules; nothing when there are none.
pub fn text(rules: &[Rule], family: Family) -> String {
    Table::ALL
        .iter()
        .filter_map(|&table| table_text(rules, family, table, &[]))
        .collect()
}

/// The input for one table, or nothing if it has neither rules nor preparations. `before` are lines that make room
/// (deletions of what is there); they are committed together with the rules.
pub fn table_text(
    rules: &[Rule],
    family: Family,
    table: Table,
    before: &[String],
) -> Option<String> {
    let rules: Vec<&Rule> = rules
        .iter()
        .filter(|r| r.family == family && r.table == table)
        .collect();
    if rules.is_empty() && before.is_empty() {
        return None;
    }
    let mut out = format!("* {table}\n");
    for line in before {
        out.push_str(line);
        out.push('\n');
    }
    for chain in chains(&rules) {
        out.push_str(&format!("-N {chain}\n"));
    }
    for rule in &rules {
        out.push_str(&line(rule));
        out.push('\n');
    }
    out.push_str("COMMIT\n");
    Some(out)
}

/// The chains that must exist: those with rules in order of their first, then those only jumped to.
pub fn chains<'a>(rules: &[&'a Rule]) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    let jumps = rules.iter().filter_map(|r| match r.target {
        Target::Jump(chain) => Some(chain),
        _ => None,
    });
    for chain in rules.iter().map(|r| r.chain).chain(jumps) {
        if ours(chain) && !names.contains(&chain) {
            names.push(chain);
        }
    }
    names
}

/// One rule as a line.
pub fn line(rule: &Rule) -> String {
    let mut words = match rule.position {
        Position::End => vec!["-A".to_string(), rule.chain.into()],
        Position::At(n) => vec!["-I".to_string(), rule.chain.into(), n.to_string()],
    };
    for m in &rule.matches {
        words.extend(condition(m));
    }
    words.extend(target(&rule.target));
    words.join(" ")
}

fn condition(m: &Match) -> Vec<String> {
    let (sense, words): (Sense, Vec<String>) = match m {
        Match::In(name) => (Sense::Is, vec!["-i".into(), name.clone()]),
        Match::Out(name) => (Sense::Is, vec!["-o".into(), name.clone()]),
        Match::Source(cidr) => (Sense::Is, vec!["-s".into(), cidr.to_string()]),
        Match::Destination(s, cidr) => (*s, vec!["-d".into(), cidr.to_string()]),
        Match::Protocol(p) => (Sense::Is, vec!["-p".into(), p.to_string()]),
        Match::Port(s, port) => (*s, vec!["--dport".into(), port.clone()]),
        Match::SourcePort(port) => (Sense::Is, vec!["--sport".into(), port.clone()]),
        Match::NotPorts(ports) => {
            let list = ports.join(",");
            let words = ["-m", "multiport", "!", "--dports", &list];
            (Sense::Is, words.map(String::from).to_vec())
        }
        Match::Uid(s, id) => return module("owner", *s, "--uid-owner", id),
        Match::Gid(s, id) => return module("owner", *s, "--gid-owner", id),
        Match::Mark(s, mark) => return module("mark", *s, "--mark", mark),
        Match::ConnMark(mark) => return module("connmark", Sense::Is, "--mark", mark),
        Match::Opens(s) => (*s, vec!["--syn".into()]),
        Match::Transparent => {
            let words = ["-m", "socket", "--transparent"];
            (Sense::Is, words.map(String::from).to_vec())
        }
        Match::State(states) => {
            return module("conntrack", Sense::Is, "--ctstate", &states.join(","));
        }
    };
    match sense {
        Sense::Is => words,
        Sense::Not => [vec!["!".to_string()], words].concat(),
    }
}

fn module(name: &str, sense: Sense, option: &str, value: &str) -> Vec<String> {
    let mut words = vec!["-m".to_string(), name.into()];
    if sense == Sense::Not {
        words.push("!".into());
    }
    words.extend([option.into(), value.into()]);
    words
}

fn target(target: &Target) -> Vec<String> {
    let words: Vec<&str> = match target {
        Target::Return => vec!["RETURN"],
        Target::Accept => vec!["ACCEPT"],
        Target::Drop => vec!["DROP"],
        Target::Jump(chain) => vec![chain],
        Target::Redirect(port) => vec!["REDIRECT", "--to-ports", port],
        Target::RedirectOne(port) => vec!["REDIRECT", "--to-port", port],
        Target::SetMark(mark) => vec!["MARK", "--set-mark", mark],
        Target::SaveMark => vec!["CONNMARK", "--save-mark"],
        Target::RestoreMark => vec!["CONNMARK", "--restore-mark"],
        Target::Tproxy { mark, port } => {
            let mark = format!("{mark}/0xffffffff");
            let words = ["-j", "TPROXY", "--tproxy-mark", &mark, "--on-port", port];
            return words.map(String::from).to_vec();
        }
        Target::NoTrack => vec!["CT", "--notrack"],
        Target::Zone(zone) => {
            return ["-j", "CT", "--zone", &zone.to_string()]
                .map(String::from)
                .to_vec();
        }
    };
    ["-j"].iter().chain(&words).map(|w| w.to_string()).collect()
}
