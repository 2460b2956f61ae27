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
    /// To this machine; without a port that of the packet stays.
    Redirect(Option<u16>),
    Dnat(String),
    /// SNAT, MASQUERADE and what else ends the chain and changes the source alone.
    Source(String),
    Mark {
        value: u32,
        mask: u32,
    },
    /// The mark becomes the connection's, by these bits of either.
    SaveMark {
        packet: u32,
        connection: u32,
    },
    RestoreMark {
        packet: u32,
        connection: u32,
    },
    ConnectionMark {
        value: u32,
        mask: u32,
    },
    Tproxy {
        port: u16,
        mark: u32,
        mask: u32,
    },
    Zone(String),
    /// Connection tracking passes it by.
    Untracked,
    /// A target whose effect on the packet is not known here.
    Unknown(String),
}

/// Judges `rule` (without `-A CHAIN`).
pub(super) fn judge(rule: &str, packet: &Packet) -> (Outcome, Action) {
    let words = words(rule);
    let (conditions, target) = words.split_at(target_at(&words));
    (outcome(conditions, packet), action(target))
}

/// Where the target begins; free text before it may look like one.
fn target_at(words: &[String]) -> usize {
    let mut at = 0;
    while let Some(word) = words.get(at) {
        match word.as_str() {
            "-j" | "-g" | "--jump" | "--goto" => return at,
            "--comment" | "--string" | "--hex-string" => at += 2,
            _ => at += 1,
        }
    }
    words.len()
}

/// Every condition must hold: one that fails decides, whatever the others are; one that cannot be judged leaves the
/// rule open.
fn outcome(words: &[String], packet: &Packet) -> Outcome {
    let mut open: Option<String> = None;
    let mut module = "";
    let mut rest = words;
    while let Some((word, after)) = rest.split_first() {
        let (negated, word, after) = match (word.as_str(), after.split_first()) {
            ("!", Some((word, after))) => (true, word.as_str(), after),
            (word, _) => (false, word, after),
        };
        let values = after.iter().take_while(|w| is_value(w)).count();
        let value = after.first().map(String::as_str).unwrap_or_default();
        // Free text is no condition, and may begin like one.
        rest = match word {
            "--comment" => after.get(1..).unwrap_or_default(),
            _ => &after[values..],
        };
        let known = match word {
            "-m" | "--match" => {
                module = value;
                if !MODULES.contains(&module) {
                    open.get_or_insert_with(|| format!("-m {module}"));
                }
                continue;
            }
            "--comment" => continue,
            // With them a group holds of which the packet's owner is a further member.
            "--gid-owner" if words.iter().any(|w| w == "--suppl-groups") => None,
            "--suppl-groups" => continue,
            "-s" | "-d" | "-i" | "-o" | "-p" => condition(word, module, value, packet),
            _ if !module.is_empty() && !MODULES.contains(&module) => None,
            "--tcp-flags" => flags(&after[..values], packet),
            _ => condition(word, module, value, packet),
        };
        let shown = after[..values].join(" ");
        match known {
            None => {
                let text = format!("{word} {shown}").trim_end().to_owned();
                match &open {
                    // The option says more than its module.
                    Some(before) if *before != format!("-m {module}") => {}
                    _ => open = Some(text),
                }
            }
            Some((holds, what)) if holds == negated => {
                let verb = if holds { "is" } else { "is not" };
                return Outcome::Fails(format!("{what} {verb} {shown}").trim_end().to_owned());
            }
            Some(_) => {}
        }
    }
    open.map_or(Outcome::Matches, Outcome::CannotTell)
}

/// Whether a word belongs to the option before it.
fn is_value(word: &str) -> bool {
    word != "!" && !word.starts_with('-')
}

/// Modules whose options are understood, or which have none that decide.
const MODULES: [&str; 12] = [
    "addrtype",
    "comment",
    "connmark",
    "conntrack",
    "icmp",
    "icmp6",
    "mark",
    "multiport",
    "owner",
    "state",
    "tcp",
    "udp",
];

/// `--tcp-flags MASK SET`: what opens a connection has SYN alone; of later packets nobody knows.
fn flags(values: &[String], packet: &Packet) -> Option<(bool, String)> {
    let [mask, set] = values else { return None };
    if packet.protocol != "tcp" || packet.state == State::Established {
        return None;
    }
    let asked = mask.split(',').any(|f| matches!(f, "SYN" | "ALL"));
    let wanted = if asked { "SYN" } else { "NONE" };
    Some((set == wanted, "its only flag, SYN,".into()))
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
            matches!(value, "all" | "0") || protocol(value) == protocol(&packet.protocol),
            format!("protocol {}", packet.protocol),
        ),
        "--syn" => (
            packet.protocol == "tcp" && packet.state != State::Established,
            "what opens a connection".into(),
        ),
        "--socket-exists" => (packet.uid.is_some(), "a packet with a socket".into()),
        "--ports" => {
            let to = in_ports(value, Some(packet.to_port), &packet.protocol)?;
            let from = in_ports(value, packet.from_port, &packet.protocol)?;
            if !to && packet.from_port.is_none() {
                return None;
            }
            (
                to || from,
                format!("port {} or {}", port(packet.from_port), packet.to_port),
            )
        }
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
                State::Untracked => ("UNTRACKED", "untracked"),
            };
            let holds = value.split(',').any(|s| s == state);
            // What translation has made of the connection is not a state of the packet.
            if !holds && value.split(',').any(|s| matches!(s, "SNAT" | "DNAT")) {
                return None;
            }
            (holds, format!("state {shown}"))
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
    if matches!(verb.as_str(), "-g" | "--goto") {
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
        "REDIRECT" => match option("--to-ports").or(option("--to-port")) {
            None => Some(Action::Redirect(None)),
            // One of several is anybody's guess.
            Some(range) if range.contains('-') => None,
            text => port(text).map(|port| Action::Redirect(Some(port))),
        },
        "DNAT" => option("--to-destination").map(|to| Action::Dnat(to.into())),
        "SNAT" | "MASQUERADE" => Some(Action::Source(name.clone())),
        "MARK" => option("--set-xmark")
            .or(option("--set-mark"))
            .and_then(masked)
            .map(|(value, mask)| Action::Mark { value, mask }),
        "CONNMARK" => {
            let bits = |name: &str| match (option(name), option("--mask")) {
                (Some(text), _) | (None, Some(text)) => masked(text).map(|(bits, _)| bits),
                (None, None) => Some(u32::MAX),
            };
            let has = |name: &str| options.iter().any(|o| o == name);
            match (bits("--nfmask"), bits("--ctmask")) {
                (Some(packet), Some(connection)) if has("--save-mark") => {
                    Some(Action::SaveMark { packet, connection })
                }
                (Some(packet), Some(connection)) if has("--restore-mark") => {
                    Some(Action::RestoreMark { packet, connection })
                }
                _ => option("--set-xmark")
                    .or(option("--set-mark"))
                    .and_then(masked)
                    .map(|(value, mask)| Action::ConnectionMark { value, mask }),
            }
        }
        "TPROXY" => port(option("--on-port")).map(|port| {
            let (mark, mask) = option("--tproxy-mark").and_then(masked).unwrap_or((0, 0));
            Action::Tproxy { port, mark, mask }
        }),
        "NOTRACK" => Some(Action::Untracked),
        "CT" if options.iter().any(|o| o == "--notrack") => Some(Action::Untracked),
        "CT" => option("--zone").map(|zone| Action::Zone(zone.into())),
        // They leave address, port, mark and way as they are.
        "LOG" | "NFLOG" | "ULOG" | "TRACE" | "AUDIT" | "TOS" | "DSCP" | "ECN" | "TTL" | "HL"
        | "TCPMSS" | "TCPOPTSTRIP" | "CHECKSUM" | "CLASSIFY" | "SECMARK" | "CONNSECMARK"
        | "SET" | "TEE" | "LED" | "IDLETIMER" | "RATEEST" => Some(Action::Continue(name.clone())),
        _ if options.is_empty() => Some(Action::Jump(name.clone())),
        _ => None,
    };
    known.unwrap_or_else(|| Action::Unknown(target[1..].join(" ")))
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
