//! The rules of iptables in the form that the eBPF programs walk.
//!
//! Each rule of ISTIO_OUTPUT and ISTIO_INBOUND becomes one or more records, in order, with the same conditions; what it
//! jumps to is put in its place. So both ways to capture decide alike, whatever the flags. The layout is that of
//! `bpf/shared.h`.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use base::cidr::Cidr;

use crate::{
    Error,
    model::{Family, Match, Rule, Sense, Table, Target},
    surroundings::{self, group_id, user_id},
};

/// Bytes of `struct rule`.
pub(super) const RULE: usize = 88;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    conditions: u32,
    negated: u32,
    destination: [u8; 16],
    mask: [u8; 16],
    source: [u8; 16],
    uid: [u32; 2],
    gid: [u32; 2],
    ports: [[u16; 2]; 2],
    to: u16,
    skip: u16,
    protocol: u8,
    action: u8,
    proxy: bool,
    /// The place of its rule in ISTIO_OUTPUT or ISTIO_INBOUND, from 1.
    pub(super) number: u8,
}

impl Record {
    /// Whether it leads datagrams elsewhere.
    pub(super) fn redirects_udp(&self) -> bool {
        self.action == REDIRECT && (self.conditions & PROTOCOL == 0 || self.protocol == UDP)
    }
}

/// The records by list (outbound, inbound) and family (IPv4, IPv6).
pub(super) type Lists = [[Vec<Record>; 2]; 2];

/// Translates the nat rules. Connection tracking's zones (raw) have nothing to keep apart here.
pub(super) fn compile(rules: &[Rule]) -> Result<Lists, Error> {
    let mut lists = Lists::default();
    for (list, start, chain) in [
        (0, "OUTPUT", "ISTIO_OUTPUT"),
        (1, "PREROUTING", "ISTIO_INBOUND"),
    ] {
        for family in [Family::V4, Family::V6] {
            let of = |name: &str| -> Vec<&Rule> {
                rules
                    .iter()
                    .filter(|r| r.table == Table::Nat && r.family == family && r.chain == name)
                    .collect()
            };
            let mut jumped = false;
            for rule in of(start) {
                jumped |= rule.target == Target::Jump(chain);
                if rule.target != Target::Jump(chain) {
                    return Err(cannot(rule));
                }
            }
            if !jumped {
                continue;
            }
            let out = &mut lists[list][family as usize];
            for (n, rule) in of(chain).into_iter().enumerate() {
                let number = u8::try_from(n + 1).unwrap_or(u8::MAX);
                match rule.target {
                    Target::Jump(inner) => {
                        for then in of(inner) {
                            let matches = [&rule.matches[..], &then.matches[..]].concat();
                            push(out, rule, &matches, &then.target, number)?;
                        }
                    }
                    _ => push(out, rule, &rule.matches, &rule.target, number)?,
                }
            }
        }
    }
    Ok(lists)
}

fn cannot(rule: &Rule) -> Error {
    Error::Invalid(format!(
        "a rule of {} cannot be done in mode EBPF: {:?} -> {:?}",
        rule.chain, rule.matches, rule.target
    ))
}

fn push(
    out: &mut Vec<Record>,
    rule: &Rule,
    matches: &[Match],
    target: &Target,
    number: u8,
) -> Result<(), Error> {
    let mut record = Record::new(number);
    match target {
        Target::Return | Target::Accept => record.action = LEAVE,
        Target::Redirect(port) | Target::RedirectOne(port) => {
            record.action = REDIRECT;
            record.to = surroundings::port(port, "tcp").ok_or_else(|| {
                Error::Invalid(format!("invalid port {port:?}: a number is needed"))
            })?;
        }
        _ => return Err(cannot(rule)),
    }
    // None of several groups: each of them passes over the rule.
    let mut groups = Vec::new();
    let mut tried_ports = false;
    for m in matches {
        match m {
            Match::Destination(sense, cidr) => {
                record.condition(DESTINATION, *sense);
                (record.destination, record.mask) = range(cidr);
            }
            Match::Source(cidr) => {
                record.condition(SOURCE, Sense::Is);
                record.source = mapped(cidr.addr);
            }
            Match::Out(name) if name == "lo" => record.condition(LOCAL, Sense::Is),
            Match::Protocol(name) => {
                let protocol = if *name == "tcp" { TCP } else { UDP };
                if record.conditions & PROTOCOL != 0 && record.protocol != protocol {
                    // Both cannot hold.
                    return Ok(());
                }
                record.condition(PROTOCOL, Sense::Is);
                record.protocol = protocol;
            }
            Match::Port(..) | Match::NotPorts(_) if tried_ports => return Err(cannot(rule)),
            Match::Port(sense, text) => {
                tried_ports = true;
                record.condition(PORT, *sense);
                record.ports[0] = ports(text)?;
            }
            Match::NotPorts(list) if list.len() <= 2 => {
                tried_ports = true;
                record.condition(PORT, Sense::Not);
                for (slot, text) in record.ports.iter_mut().zip(list) {
                    *slot = ports(text)?;
                }
            }
            Match::Uid(sense, text) => {
                record.condition(UID, *sense);
                record.uid = ids(text, user_id)?;
                record.proxy |= *sense == Sense::Is;
            }
            Match::Gid(Sense::Is, text) => {
                record.condition(GID, Sense::Is);
                record.gid = ids(text, group_id)?;
                record.proxy = true;
            }
            Match::Gid(Sense::Not, text) => groups.push(ids(text, group_id)?),
            _ => return Err(cannot(rule)),
        }
    }
    if let [one] = groups[..]
        && record.conditions & GID == 0
    {
        record.condition(GID, Sense::Not);
        record.gid = one;
        groups.clear();
    }
    let several = groups.len();
    for (n, gid) in groups.into_iter().enumerate() {
        let mut pass = Record::new(number);
        pass.action = SKIP;
        pass.skip = (several - n) as u16;
        pass.condition(GID, Sense::Is);
        pass.gid = gid;
        out.push(pass);
    }
    // What the proxy sends from its own address for the app is the proxy's too.
    record.proxy |= record.conditions & SOURCE != 0;
    record.proxy &= record.action == LEAVE;
    out.push(record);
    Ok(())
}

fn ports(text: &str) -> Result<[u16; 2], Error> {
    let one = |text: &str| {
        surroundings::port(text, "tcp").ok_or_else(|| {
            Error::Invalid(format!(
                "invalid port {text:?}: a number, a range a:b or a name of /etc/services is needed"
            ))
        })
    };
    Ok(match text.split_once(':') {
        Some((first, last)) => [one(first)?, one(last)?],
        None => [one(text)?; 2],
    })
}

fn ids(text: &str, named: fn(&str) -> Option<String>) -> Result<[u32; 2], Error> {
    let one = |text: &str| -> Result<u32, Error> {
        text.parse()
            .ok()
            .or_else(|| named(text)?.parse().ok())
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "invalid user or group {text:?}: not a number, and not known here"
                ))
            })
    };
    Ok(match text.split_once('-') {
        Some((first, last)) if first.bytes().all(|b| b.is_ascii_digit()) => {
            [one(first)?, one(last)?]
        }
        _ => [one(text)?; 2],
    })
}

fn range(cidr: &Cidr) -> ([u8; 16], [u8; 16]) {
    let bits = match cidr.addr {
        IpAddr::V4(_) => u32::from(cidr.bits) + 96,
        IpAddr::V6(_) => u32::from(cidr.bits),
    };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    let address = u128::from_be_bytes(mapped(cidr.addr)) & mask;
    (address.to_be_bytes(), mask.to_be_bytes())
}

/// An address as the programs have it.
pub(super) fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

impl Record {
    fn new(number: u8) -> Record {
        Record {
            conditions: 0,
            negated: 0,
            destination: [0; 16],
            mask: [0; 16],
            source: [0; 16],
            uid: [0; 2],
            gid: [0; 2],
            // No port is in these.
            ports: [[1, 0]; 2],
            to: 0,
            skip: 0,
            protocol: 0,
            action: LEAVE,
            proxy: false,
            number,
        }
    }

    fn condition(&mut self, condition: u32, sense: Sense) {
        self.conditions |= condition;
        if sense == Sense::Not {
            self.negated |= condition;
        }
    }

    /// As `struct rule`.
    pub(super) fn bytes(&self) -> [u8; RULE] {
        let mut out = Vec::with_capacity(RULE);
        out.extend(self.conditions.to_ne_bytes());
        out.extend(self.negated.to_ne_bytes());
        out.extend([self.destination, self.mask, self.source].concat());
        for id in self.uid.iter().chain(&self.gid) {
            out.extend(id.to_ne_bytes());
        }
        for port in self.ports.iter().flatten().chain([&self.to, &self.skip]) {
            out.extend(port.to_ne_bytes());
        }
        out.extend([self.protocol, self.action, self.proxy.into(), self.number]);
        out.try_into()
            .expect("the fields add up to the size of the record")
    }

    /// From `struct rule`.
    pub(super) fn read(bytes: &[u8; RULE]) -> Record {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let address =
            |at: usize| -> [u8; 16] { bytes[at..at + 16].try_into().expect("sixteen bytes") };
        Record {
            conditions: word(0),
            negated: word(4),
            destination: address(8),
            mask: address(24),
            source: address(40),
            uid: [word(56), word(60)],
            gid: [word(64), word(68)],
            ports: [[half(72), half(74)], [half(76), half(78)]],
            to: half(80),
            skip: half(82),
            protocol: bytes[84],
            action: bytes[85],
            proxy: bytes[86] != 0,
            number: bytes[87],
        }
    }
}

/// In the words of iptables, as far as they go.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |condition: u32| {
            if self.negated & condition != 0 {
                "! "
            } else {
                ""
            }
        };
        let has = |condition: u32| self.conditions & condition != 0;
        let address = |a: [u8; 16]| Ipv6Addr::from(a).to_canonical();
        if has(SOURCE) {
            write!(f, "-s {} ", address(self.source))?;
        }
        if has(DESTINATION) {
            let bits = u128::from_be_bytes(self.mask).leading_ones();
            let at = address(self.destination);
            let bits = if at.is_ipv4() {
                bits.saturating_sub(96)
            } else {
                bits
            };
            write!(f, "{}-d {at}/{bits} ", not(DESTINATION))?;
        }
        if has(LOCAL) {
            write!(f, "{}-o lo ", not(LOCAL))?;
        }
        if has(PROTOCOL) {
            write!(
                f,
                "-p {} ",
                if self.protocol == TCP { "tcp" } else { "udp" }
            )?;
        }
        if has(PORT) {
            let list: Vec<String> = self
                .ports
                .iter()
                .filter(|p| p[0] <= p[1])
                .map(|p| span(p[0], p[1], ':'))
                .collect();
            write!(f, "{}--dport {} ", not(PORT), list.join(","))?;
        }
        if has(UID) {
            write!(
                f,
                "{}--uid-owner {} ",
                not(UID),
                span(self.uid[0], self.uid[1], '-')
            )?;
        }
        if has(GID) {
            write!(
                f,
                "{}--gid-owner {} ",
                not(GID),
                span(self.gid[0], self.gid[1], '-')
            )?;
        }
        match self.action {
            REDIRECT => write!(f, "-j REDIRECT --to-ports {}", self.to),
            SKIP => write!(f, "pass over {}", self.skip),
            _ => write!(f, "-j RETURN"),
        }
    }
}

fn span<T: PartialEq + fmt::Display>(first: T, last: T, dash: char) -> String {
    match first == last {
        true => first.to_string(),
        false => format!("{first}{dash}{last}"),
    }
}

const DESTINATION: u32 = 1;
const SOURCE: u32 = 1 << 1;
const LOCAL: u32 = 1 << 2;
const PROTOCOL: u32 = 1 << 3;
const PORT: u32 = 1 << 4;
const UID: u32 = 1 << 5;
const GID: u32 = 1 << 6;
const LEAVE: u8 = 0;
const REDIRECT: u8 = 1;
const SKIP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, program};

    fn compiled(change: impl FnOnce(&mut Config)) -> Lists {
        let mut config = Config {
            proxy_uid: "1337".into(),
            proxy_gid: "1337".into(),
            inbound_interception_mode: "EBPF".into(),
            outbound_ip_ranges_include: "*".into(),
            inbound_ports_include: "*".into(),
            ..Config::default()
        };
        change(&mut config);
        compile(&program::rules(&config).unwrap()).unwrap()
    }

    fn text(list: &[Record]) -> Vec<String> {
        list.iter().map(|r| format!("{} {r}", r.number)).collect()
    }

    #[test]
    fn the_nine_rules_keep_their_order_and_words() {
        let lists = compiled(|c| {
            c.redirect_dns = true;
            c.capture_all_dns = true;
            c.inbound_ports_exclude = "15090,15020".into();
        });
        let expected = [
            "1 -s 127.0.0.6 -o lo -j RETURN",
            "2 ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 53,15008 --uid-owner 1337 -j REDIRECT --to-ports 15006",
            "3 -o lo -p tcp ! --dport 53 ! --uid-owner 1337 -j RETURN",
            "4 --uid-owner 1337 -j RETURN",
            "5 ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 15008 --gid-owner 1337 -j REDIRECT --to-ports 15006",
            "6 -o lo -p tcp ! --dport 53 ! --gid-owner 1337 -j RETURN",
            "7 --gid-owner 1337 -j RETURN",
            "8 -p tcp --dport 53 -j REDIRECT --to-ports 15053",
            "8 -p udp --dport 53 -j REDIRECT --to-ports 15053",
            "9 -d 127.0.0.1/32 -j RETURN",
            "10 -p tcp -j REDIRECT --to-ports 15001",
        ];
        assert_eq!(text(&lists[0][0]), expected);
        let inbound = [
            "1 -p tcp --dport 15008 -j RETURN",
            "2 -p tcp --dport 15090 -j RETURN",
            "3 -p tcp --dport 15020 -j RETURN",
            "4 -p tcp -j REDIRECT --to-ports 15006",
        ];
        assert_eq!(text(&lists[1][0]), inbound);
        assert!(lists[0][1].is_empty() && lists[1][1].is_empty());
    }

    #[test]
    fn owner_groups_and_ranges_become_records() {
        let lists = compiled(|c| {
            c.owner_groups_include = "5,6,7".into();
            c.outbound_ip_ranges_include = "10.0.0.0/8".into();
            c.outbound_ip_ranges_exclude = "10.1.2.3/16".into();
            c.outbound_ports_include = "1000:2000".into();
        });
        let tail = text(&lists[0][0][7..]);
        let expected = [
            "8 --gid-owner 5 pass over 3",
            "8 --gid-owner 6 pass over 2",
            "8 --gid-owner 7 pass over 1",
            "8 -j RETURN",
            "9 -d 127.0.0.1/32 -j RETURN",
            "10 -d 10.1.0.0/16 -j RETURN",
            "11 -p tcp --dport 1000:2000 -j REDIRECT --to-ports 15001",
            "12 -d 10.0.0.0/8 -p tcp -j REDIRECT --to-ports 15001",
        ];
        assert_eq!(tail, expected);
    }

    #[test]
    fn records_come_back_as_they_were_written() {
        let lists = compiled(|c| {
            c.enable_inbound_ipv6 = true;
            c.outbound_ip_ranges_exclude = "2001:db8::/32".into();
            c.owner_groups_include = "5,6".into();
        });
        for record in lists.iter().flatten().flatten() {
            assert_eq!(Record::read(&record.bytes()), *record);
        }
    }

    #[test]
    fn what_a_number_is_needed_for_says_so() {
        let rules = |c: Config| {
            compile(&program::rules(&c).unwrap())
                .unwrap_err()
                .to_string()
        };
        let bad = |change: fn(&mut Config)| {
            let mut config = Config {
                proxy_uid: "1337".into(),
                proxy_gid: "1337".into(),
                ..Config::default()
            };
            change(&mut config);
            rules(config)
        };
        assert!(bad(|c| c.outbound_ports_exclude = "x!".into()).contains("\"x!\""));
        assert!(bad(|c| c.proxy_gid = "no-such-group".into()).contains("no-such-group"));
        assert!(bad(|c| c.exclude_interfaces = "eth9".into()).contains("mode EBPF"));
    }
}
