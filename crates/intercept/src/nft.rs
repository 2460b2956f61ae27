//! The same rules for nft: one `inet` table a kind, all of them in one transaction.
//!
//! Names and spelling are those of istio-nftables. Each run replaces its tables as a whole, so that a second run changes
//! nothing and nobody ever sees half of them; tables that are not needed (any more) are gone afterwards.

mod listing;

use std::{
    io::Write,
    process::{Command, Stdio},
};

use crate::{
    Error,
    apply::{self, Log},
    config::{Config, split},
    model::{Match, Position, Rule, Sense, Table, Target, ours},
    routes,
};

pub use listing::verify;

/// The tables that we own.
const TABLES: [(Table, &str); 3] = [
    (Table::Nat, "istio-proxy-nat"),
    (Table::Mangle, "istio-proxy-mangle"),
    (Table::Raw, "istio-proxy-raw"),
];

/// Writes `rules`, or removes ours if that is asked for, and sets what goes with them.
pub fn apply(config: &Config, rules: &[Rule], log: Log<'_>) -> Result<(), Error> {
    let text = match config.cleanup_only {
        true => text(&[]),
        false => {
            check(config)?;
            text(rules)
        }
    };
    log(format!("Running nft with the following input:\n{text}"));
    if config.dry_run {
        return Ok(());
    }
    let marks = marks(&listing()?.unwrap_or_default());
    if config.cleanup_only {
        apply::release(config, log, detach);
    }
    run(&["-f", "-"], &text)?;
    if config.cleanup_only {
        apply::forget(config, log);
        return routes::remove(config, &marks);
    }
    routes::replace(config, &marks)?;
    log(format!(
        "Final nftables state:\n{}",
        run(&["-s", "list", "ruleset"], "")?
    ));
    Ok(())
}

/// The firewall marks that the TPROXY rules of a listing set.
fn marks(listing: &str) -> Vec<u32> {
    let rules = listing.lines().filter(|l| l.contains(" tproxy "));
    rules
        .filter_map(|rule| {
            let (_, mark) = rule.split_once(" meta mark set 0x")?;
            let digits = mark.split(|c: char| !c.is_ascii_hexdigit()).next()?;
            u32::from_str_radix(digits, 16).ok()
        })
        .collect()
}

/// Refuses what only iptables can say. Istio's program fails at it as well, in the middle of nft's grammar.
fn check(config: &Config) -> Result<(), Error> {
    let refuse = |flag: &str, value: &str, instead: &str| {
        Err(Error::Invalid(format!(
            "invalid value {value:?} for {flag} with --native-nftables: {instead}"
        )))
    };
    for (flag, list) in [
        ("--istio-inbound-ports", &config.inbound_ports_include),
        ("--istio-local-exclude-ports", &config.inbound_ports_exclude),
        ("--istio-outbound-ports", &config.outbound_ports_include),
        (
            "--istio-local-outbound-ports-exclude",
            &config.outbound_ports_exclude,
        ),
    ] {
        // What is not used is not read: excluded ports count only beside `*`.
        let unused = flag == "--istio-local-exclude-ports" && config.inbound_ports_include != "*";
        if let Some(range) = split(list).iter().find(|p| p.contains(':') && !unused) {
            return refuse(flag, range, "nft takes a range as 1000-2000");
        }
    }
    for (flag, list) in [
        ("--istio-exclude-interfaces", &config.exclude_interfaces),
        ("--kube-virt-interfaces", &config.kube_virt_interfaces),
    ] {
        if let Some(name) = split(list).iter().find(|n| !is_interface(n)) {
            let instead = "nft takes letters, digits, _, -, . and /, and * at the end for any rest";
            return refuse(flag, name, instead);
        }
    }
    let v6_alone = config.dns_servers_v4.is_empty() && !config.dns_servers_v6.is_empty();
    if config.redirect_dns && !config.capture_all_dns && v6_alone && !config.enable_inbound_ipv6 {
        return Err(Error::Invalid(
            "--redirect-dns: every server of /etc/resolv.conf is an IPv6 address, and IPv6 is not captured; use \
             --dual-stack, --capture-all-dns or iptables"
                .into(),
        ));
    }
    Ok(())
}

/// What nft reads as the name of an interface without quotes; a quoted `+` would be a plain letter to it.
fn is_interface(name: &str) -> bool {
    let name = name.strip_suffix('*').unwrap_or(name);
    let first = |c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '.');
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
    name.starts_with(first) && name.chars().all(rest)
}

/// Empties the built-in chains of our tables; whether there were any.
fn detach() -> Result<bool, Error> {
    let mut text = String::new();
    let mut table = String::new();
    for line in listing()?.unwrap_or_default().lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {").into();
        } else if let Some(chain) = line.strip_prefix("chain ") {
            let chain = chain.trim_end_matches(" {");
            if matches!(chain, "prerouting" | "output") {
                text.push_str(&format!("flush chain {table} {chain}\n"));
            }
        }
    }
    if text.is_empty() {
        return Ok(false);
    }
    run(&["-f", "-"], &text).map(|_| true)
}

/// The input of `nft -f`.
pub fn text(rules: &[Rule]) -> String {
    let mut out = String::new();
    for (table, name) in TABLES {
        let chains = chains(rules, table);
        // Adding what is there changes nothing, so both forms work whether it is or not.
        out.push_str(&format!("add table inet {name}\n"));
        if chains.is_empty() {
            out.push_str(&format!("delete table inet {name}\n"));
            continue;
        }
        out.push_str(&format!("flush table inet {name}\n"));
        for (chain, _) in &chains {
            let hook = hook(table, chain)
                .map(|h| format!(" {{ {h} }}"))
                .unwrap_or_default();
            out.push_str(&format!("add chain inet {name} {}{hook}\n", own(chain)));
        }
        for (chain, rules) in &chains {
            for rule in rules {
                out.push_str(&format!(
                    "add rule inet {name} {} {}\n",
                    own(chain),
                    line(rule)
                ));
            }
        }
    }
    out
}

/// The chains of a table with their rules in final order: built-in ones first, then ours by their first rule. One
/// table holds both families, so a rule that both have alike stands once.
fn chains(rules: &[Rule], table: Table) -> Vec<(&'static str, Vec<&Rule>)> {
    let of_table: Vec<&Rule> = rules.iter().filter(|r| r.table == table).collect();
    let mut out: Vec<(&'static str, Vec<&Rule>)> = Vec::new();
    for (i, rule) in of_table.iter().enumerate() {
        let alike = |other: &&&Rule| {
            other.family != rule.family
                && (other.chain, other.position) == (rule.chain, rule.position)
                && other.matches == rule.matches
                && other.target == rule.target
        };
        if of_table[..i]
            .iter()
            .find(alike)
            .is_some_and(|o| o.family < rule.family)
        {
            continue;
        }
        let at = match out.iter().position(|(chain, _)| *chain == rule.chain) {
            Some(at) => at,
            None => {
                out.push((rule.chain, Vec::new()));
                out.len() - 1
            }
        };
        let chain = &mut out[at].1;
        match rule.position {
            Position::End => chain.push(rule),
            Position::At(n) => chain.insert((n - 1).min(chain.len()), rule),
        }
    }
    for rule in of_table {
        if let Target::Jump(chain) = rule.target
            && out.iter().all(|(name, _)| *name != chain)
        {
            out.push((chain, Vec::new()));
        }
    }
    out.sort_by_key(|(chain, _)| match *chain {
        "PREROUTING" => 0,
        "OUTPUT" => 1,
        _ => 2,
    });
    out
}

fn hook(table: Table, chain: &str) -> Option<&'static str> {
    Some(match (table, chain) {
        (_, chain) if ours(chain) => return None,
        (Table::Nat, "PREROUTING") => "type nat hook prerouting priority -100;",
        (Table::Nat, _) => "type nat hook output priority -100;",
        (Table::Mangle, "PREROUTING") => "type filter hook prerouting priority -150;",
        // A mark set here must be able to choose another route.
        (Table::Mangle, _) => "type route hook output priority -150;",
        (_, "PREROUTING") => "type filter hook prerouting priority -300;",
        _ => "type filter hook output priority -300;",
    })
}

/// `ISTIO_IN_REDIRECT` is `istio-in-redirect` here.
fn own(chain: &str) -> String {
    chain.to_lowercase().replace('_', "-")
}

fn line(rule: &Rule) -> String {
    let mut words: Vec<String> = Vec::new();
    let not = |sense: &Sense| if *sense == Sense::Not { "!= " } else { "" };
    let protocol = rule.matches.iter().find_map(|m| match m {
        Match::Protocol(p) => Some(*p),
        _ => None,
    });
    let protocol_word = protocol.unwrap_or("tcp");
    let has_port = rule.matches.iter().any(|m| {
        matches!(
            m,
            Match::Port(..) | Match::NotPorts(_) | Match::SourcePort(_)
        )
    });
    let version = |cidr: &base::cidr::Cidr| if cidr.addr.is_ipv4() { "ip" } else { "ip6" };
    for m in &rule.matches {
        match m {
            Match::In(name) => words.push(format!("iifname {name:?}")),
            Match::Out(name) => words.push(format!("oifname {name:?}")),
            _ => {}
        }
    }
    let state = rule.matches.iter().find_map(|m| match m {
        Match::State(states) => Some(*states),
        _ => None,
    });
    // istio-nftables drops invalid packets of TCP only.
    if !has_port && let Some(p) = protocol.or(state.map(|_| "tcp")) {
        words.push(format!("meta l4proto {p}"));
    }
    if let Some(states) = state {
        words.push(format!("ct state {}", states.join(",").to_lowercase()));
    }
    let mut addresses = Vec::new();
    let mut ports = Vec::new();
    for m in &rule.matches {
        match m {
            Match::Source(c) => addresses.push(format!("{} saddr {c}", version(c))),
            Match::Destination(s, c) => {
                addresses.push(format!("{} daddr {}{c}", version(c), not(s)));
            }
            Match::Port(s, p) => ports.push(format!("{protocol_word} dport {}{p}", not(s))),
            Match::SourcePort(p) => ports.push(format!("{protocol_word} sport {p}")),
            Match::NotPorts(list) => {
                ports.push(format!(
                    "{protocol_word} dport != {{ {} }}",
                    list.join(", ")
                ));
            }
            _ => {}
        }
    }
    let (first, second) = if rule.table == Table::Raw {
        (ports, addresses)
    } else {
        (addresses, ports)
    };
    words.extend(first);
    words.extend(second);
    for m in &rule.matches {
        match m {
            Match::Uid(s, id) => words.push(format!("meta skuid {}{id}", not(s))),
            Match::Gid(s, id) => words.push(format!("meta skgid {}{id}", not(s))),
            Match::Mark(s, mark) => words.push(format!("meta mark {}{mark}", not(s))),
            Match::ConnMark(mark) => words.push(format!("ct mark {mark}")),
            _ => {}
        }
    }
    words.push(target(rule));
    words.join(" ")
}

fn target(rule: &Rule) -> String {
    match &rule.target {
        Target::Return => "counter return".into(),
        Target::Accept => "counter accept".into(),
        Target::Drop => "counter drop".into(),
        Target::Jump(chain) => format!("counter jump {}", own(chain)),
        Target::Redirect(port) | Target::RedirectOne(port) => {
            format!("counter redirect to :{port}")
        }
        Target::SetMark(mark) => format!("counter meta mark set {mark}"),
        Target::SaveMark => "counter ct mark set mark".into(),
        Target::RestoreMark => "counter meta mark set ct mark".into(),
        Target::Tproxy { mark, port } => {
            let version = match rule.family {
                crate::model::Family::V4 => "ip",
                crate::model::Family::V6 => "ip6",
            };
            format!("tproxy {version} to :{port} meta mark set {mark} counter accept")
        }
        Target::Zone(zone) => format!("counter ct zone set {zone}"),
        Target::NoTrack => "counter notrack".into(),
    }
}

/// Our tables as nft lists them, without counters; none where there is none of them, or no nft.
pub fn listing() -> Result<Option<String>, Error> {
    // One that is missing is an error of the listing, so what there is is asked for first.
    let Ok(tables) = run(&["list", "tables"], "") else {
        return Ok(None);
    };
    let mut out = String::new();
    for (_, name) in TABLES {
        if tables.lines().any(|l| l == format!("table inet {name}")) {
            out.push_str(&run(&["-s", "list", "table", "inet", name], "")?);
        }
    }
    Ok((!out.is_empty()).then_some(out))
}

/// Replaces our tables by `listing`, in one transaction.
pub fn restore(listing: &str) -> Result<(), Error> {
    let mut text = String::new();
    for (_, name) in TABLES {
        text.push_str(&format!(
            "add table inet {name}\ndelete table inet {name}\n"
        ));
    }
    text.push_str(listing);
    run(&["-f", "-"], &text).map(drop)
}

fn run(args: &[&str], input: &str) -> Result<String, Error> {
    let missing = |e: std::io::Error| {
        Error::Backend(format!(
            "nft: {e}; install nftables in this image, or leave --native-nftables out"
        ))
    };
    let mut child = Command::new("nft")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early closes the pipe; its status tells why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(missing)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Command {
        command: format!("nft {}", args.join(" ")),
        meaning: format!("exit status {}", output.status.code().unwrap_or(-1)),
        stderr: String::from_utf8_lossy(&output.stderr).trim().into(),
        hint: String::new(),
    })
}
