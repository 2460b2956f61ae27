//! One rule against one packet: does it match, and if not, why not.

use std::net::IpAddr;

use base::cidr::Cidr;

use super::{Packet, State};
use crate::surroundings;

/// What a rule says of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Every condition holds.
    Matches,
    /// One does not; the text says which.
    Fails(String),
    /// It has a condition that cannot be judged from a packet's description.
    CannotTell(String),
}

/// What a rule does with a packet that matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing: it only counts, logs or tags.
    Continue(String),
    Return,
    Accept,
    Drop(String),
    Jump(String),
    /// As a jump, but what returns from there returns from here.
    Goto(String),
    Redirect(u16),
    Dnat(String),
    /// SNAT, MASQUERADE and what else ends the chain and changes the source alone.
    Source(String),
    Mark {
        value: u32,
        mask: u32,
    },
    SaveMark,
    RestoreMark,
    Tproxy {
        port: u16,
        mark: u32,
        mask: u32,
    },
    Zone(String),
}

/// Judges `rule` (without `-A CHAIN`).
pub(super) fn judge(rule: &str, packet: &Packet) -> (Outcome, Action) {
    let words = words(rule);
    let at = words.iter().position(|w| matches!(w.as_str(), "-j" | "-g"));
    let (conditions, target) = words.split_at(at.unwrap_or(words.len()));
    (outcome(conditions, packet), action(target))
}

fn outcome(words: &[String], packet: &Packet) -> Outcome {
    let mut words = words.iter().map(String::as_str);
    let mut module = "";
    let mut not = false;
    while let Some(word) = words.next() {
        if word == "!" {
            not = true;
            continue;
        }
        let negated = std::mem::take(&mut not);
        if matches!(word, "-m" | "--match") {
            module = words.next().unwrap_or_default();
            continue;
        }
        if word == "--comment" {
            words.next();
            continue;
        }
        if word == "--syn" {
            let opens = packet.protocol == "tcp" && packet.state == State::New;
            if opens == negated {
                return Outcome::Fails(format!(
                    "it opens {}",
                    if opens { "a connection" } else { "none" }
                ));
            }
            continue;
        }
        let value = words.next().unwrap_or_default();
        let Some((holds, what)) = condition(word, module, value, packet) else {
            return Outcome::CannotTell(format!("{word} {value}"));
        };
        if holds == negated {
            let verb = if holds { "is" } else { "is not" };
            return Outcome::Fails(format!("{what} {verb} {value}"));
        }
    }
    Outcome::Matches
}

/// Whether one condition holds, and what it is about; none if that cannot be told.
fn condition(word: &str, module: &str, value: &str, packet: &Packet) -> Option<(bool, String)> {
    let interface = |name: &Option<String>| match (name, value.strip_suffix('+')) {
        (Some(name), Some(prefix)) => name.starts_with(prefix),
        (Some(name), None) => name == value,
        (None, _) => value == "+",
    };
    let shown = |name: &Option<String>| name.clone().unwrap_or_else(|| "none".into());
    let port = |port: Option<u16>| port.map_or("unknown".into(), |p| p.to_string());
    Some(match word {
        "-s" | "--source" | "--src" => (
            in_ranges(value, packet.from)?,
            format!("source {}", packet.from),
        ),
        "-d" | "--destination" | "--dst" => (
            in_ranges(value, packet.to)?,
            format!("destination {}", packet.to),
        ),
        "-i" | "--in-interface" => (
            interface(&packet.input),
            format!("in-interface {}", shown(&packet.input)),
        ),
        "-o" | "--out-interface" => (
            interface(&packet.output),
            format!("out-interface {}", shown(&packet.output)),
        ),
        "-p" | "--protocol" | "--proto" => (
            value == "all" || protocol(value) == protocol(&packet.protocol),
            format!("protocol {}", packet.protocol),
        ),
        "--dport" | "--dports" | "--destination-port" | "--destination-ports" => (
            in_ports(value, Some(packet.to_port), &packet.protocol)?,
            format!("destination port {}", packet.to_port),
        ),
        "--sport" | "--sports" | "--source-port" | "--source-ports" => (
            in_ports(value, packet.from_port, &packet.protocol)?,
            format!("source port {}", port(packet.from_port)),
        ),
        // A packet without a socket has no owner: the plain form fails, the negated one holds.
        "--uid-owner" => (
            packet
                .uid
                .is_some_and(|u| in_ids(value, u, surroundings::user_id)),
            packet.uid.map_or("no user".into(), |u| format!("user {u}")),
        ),
        "--gid-owner" => (
            packet
                .gid
                .is_some_and(|g| in_ids(value, g, surroundings::group_id)),
            packet
                .gid
                .map_or("no group".into(), |g| format!("group {g}")),
        ),
        "--mark" => {
            let (wanted, mask) = masked(value)?;
            let (mark, what) = match module {
                "connmark" => (packet.connection_mark, "the connection's mark"),
                _ => (packet.mark, "mark"),
            };
            (mark & mask == wanted, format!("{what} {mark:#x}"))
        }
        "--ctstate" | "--state" => {
            let (state, shown) = match packet.state {
                State::New => ("NEW", "new"),
                State::Established => ("ESTABLISHED", "established"),
                State::Invalid => ("INVALID", "invalid"),
            };
            (
                value.split(',').any(|s| s == state),
                format!("state {shown}"),
            )
        }
        "--dst-type" | "--src-type" if value == "LOCAL" => {
            let (address, what) = match word {
                "--dst-type" => (packet.to, "destination"),
                _ => (packet.from, "source"),
            };
            (packet.is_own(address), format!("{what} {address}"))
        }
        _ => return None,
    })
}

fn in_ranges(list: &str, address: IpAddr) -> Option<bool> {
    let mut found = false;
    for text in list.split(',') {
        let range = match text.parse::<IpAddr>() {
            Ok(ip) => Cidr::host(ip),
            Err(_) => Cidr::parse(text).ok()?,
        };
        found |= range.contains(address);
    }
    Some(found)
}

/// `80`, `http`, `8000:8100`, and lists of them.
fn in_ports(list: &str, port: Option<u16>, protocol: &str) -> Option<bool> {
    let mut found = false;
    for text in list.split(',') {
        let (low, high) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str, open: u16| match text {
            "" => Some(open),
            text => surroundings::port(text, protocol),
        };
        let range = number(low, 0)?..=number(high, u16::MAX)?;
        found |= port.is_some_and(|p| range.contains(&p));
    }
    Some(found)
}

/// `1337`, `1000-2000` or a name.
fn in_ids(text: &str, id: u32, named: fn(&str) -> Option<String>) -> bool {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    match (low.parse(), high.parse()) {
        (Ok(low), Ok(high)) => (low..=high).contains(&id),
        _ => named(text).is_some_and(|found| found == id.to_string()),
    }
}

fn protocol(name: &str) -> &str {
    match name {
        "6" => "tcp",
        "17" => "udp",
        "1" => "icmp",
        "58" | "icmpv6" => "ipv6-icmp",
        name => name,
    }
}

/// `0x539`, `0x539/0xffffffff` or decimal.
fn masked(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    match text.split_once('/') {
        Some((value, mask)) => Some((number(value)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    }
}

fn action(target: &[String]) -> Action {
    let [verb, name, options @ ..] = target else {
        return Action::Continue("no target".into());
    };
    if verb == "-g" {
        return Action::Goto(name.clone());
    }
    let option = |name: &str| {
        let at = options.iter().position(|w| w == name)?;
        options.get(at + 1).map(String::as_str)
    };
    let port = |text: Option<&str>| text?.split('-').next()?.parse::<u16>().ok();
    let known = match name.as_str() {
        "RETURN" => Some(Action::Return),
        "ACCEPT" => Some(Action::Accept),
        "DROP" | "REJECT" => Some(Action::Drop(name.clone())),
        "REDIRECT" => port(option("--to-ports").or(option("--to-port"))).map(Action::Redirect),
        "DNAT" => option("--to-destination").map(|to| Action::Dnat(to.into())),
        "SNAT" | "MASQUERADE" | "NETMAP" => Some(Action::Source(name.clone())),
        "MARK" => option("--set-xmark")
            .or(option("--set-mark"))
            .and_then(masked)
            .map(|(value, mask)| Action::Mark { value, mask }),
        "CONNMARK" if options.iter().any(|o| o == "--save-mark") => Some(Action::SaveMark),
        "CONNMARK" if options.iter().any(|o| o == "--restore-mark") => Some(Action::RestoreMark),
        "TPROXY" => port(option("--on-port")).map(|port| {
            let (mark, mask) = option("--tproxy-mark").and_then(masked).unwrap_or((0, 0));
            Action::Tproxy { port, mark, mask }
        }),
        "CT" => option("--zone").map(|zone| Action::Zone(zone.into())),
        "LOG" | "NFLOG" | "TRACE" | "AUDIT" | "TOS" | "DSCP" | "TTL" | "HL" | "TCPMSS"
        | "CHECKSUM" | "CLASSIFY" | "SECMARK" | "CONNSECMARK" => None,
        _ if options.is_empty() => Some(Action::Jump(name.clone())),
        _ => None,
    };
    known.unwrap_or_else(|| Action::Continue(name.clone()))
}

/// Words as `iptables-save` quotes them: `"` around those with blanks, `\` before `"` and `\`.
fn words(rule: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut begun) = (false, false);
    let mut chars = rule.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                begun = true;
            }
            '\\' if quoted => word.extend(chars.next()),
            c if c.is_whitespace() && !quoted => {
                if begun {
                    out.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        out.push(word);
    }
    out
}
