//! From settings to rules: the ordered list that makes up Istio's interception.
//!
//! The order is part of the contract: it is what `iptables -t nat -L` shows in every text about Istio. Known oddities
//! are kept because the kernel's state would differ otherwise: the RETURNs of virtual machines' interfaces end up
//! behind their REDIRECTs, chains exist that nothing jumps to, and in TPROXY mode the tunnel's port is exempt in nat only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use base::cidr::Cidr;

use crate::{
    Error,
    config::{ANSWER_MARK, Config, split},
    model::{
        Family::{self, V4, V6},
        Match::{self, *},
        Position, Rule,
        Sense::{Is, Not},
        Table::{self, Mangle, Nat, Raw},
        Target,
    },
};

const PREROUTING: &str = "PREROUTING";
const OUTPUT: &str = "OUTPUT";
const INBOUND: &str = "ISTIO_INBOUND";
const IN_REDIRECT: &str = "ISTIO_IN_REDIRECT";
const ISTIO_OUTPUT: &str = "ISTIO_OUTPUT";
const OUTPUT_DNS: &str = "ISTIO_OUTPUT_DNS";
const REDIRECT: &str = "ISTIO_REDIRECT";
const DIVERT: &str = "ISTIO_DIVERT";
const TPROXY: &str = "ISTIO_TPROXY";
const DROP: &str = "ISTIO_DROP";
// Ours, for --tproxy-notrack.
const INPUT: &str = "INPUT";
const ISTIO_INPUT: &str = "ISTIO_INPUT";
const NOTRACK: &str = "ISTIO_NOTRACK";
const OUTPUT_NOTRACK: &str = "ISTIO_OUTPUT_NOTRACK";

/// The port on which the agent answers DNS.
const DNS_PORT: &str = "15053";

/// Whose rules are written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Era {
    /// Istio 1.1 to 1.3: what the proxy sends to its own pod goes to the outbound side.
    V1_3,
    /// 1.4 to 1.6.
    V1_5,
    /// 1.13 to 1.17.
    V1_13,
    /// Today's.
    Current,
}

/// What `-i` or `-x` asks for.
enum Ranges {
    All,
    These(Vec<Cidr>),
}

/// The rules for `config`, in the order in which they are written; IPv6 rules only if it is captured.
pub fn rules(config: &Config) -> Result<Vec<Rule>, Error> {
    let exclude = match ranges(&config.outbound_ip_ranges_exclude)? {
        Ranges::All => {
            return Err(Error::Invalid(
                "invalid value for OUTBOUND_IP_RANGES_EXCLUDE".into(),
            ));
        }
        Ranges::These(list) => list,
    };
    let include = ranges(&config.outbound_ip_ranges_include)?;
    let mut p = Program {
        config,
        rules: Vec::new(),
        uids: split(&config.proxy_uid),
        gids: split(&config.proxy_gid),
        v4_loopback: config.loopback()?,
        era: match config.rules_version.as_str() {
            "1.3" => Era::V1_3,
            "1.5" => Era::V1_5,
            "1.13" => Era::V1_13,
            _ => Era::Current,
        },
        dns: config.redirect_dns
            && (config.capture_all_dns
                || !config.dns_servers_v4.is_empty()
                || !config.dns_servers_v6.is_empty()),
    };
    p.excluded_interfaces();
    p.virtual_machines();
    p.invalid();
    p.redirects();
    p.inbound();
    p.outbound_head();
    p.owners(&include);
    p.owner_groups();
    p.dns();
    p.each(
        Nat,
        ISTIO_OUTPUT,
        |p, f| vec![Destination(Is, p.loopback(f))],
        Target::Return,
    );
    p.destinations(&exclude, &include);
    p.tproxy_marks();
    p.untracked();
    Ok(p.rules)
}

fn ranges(list: &str) -> Result<Ranges, Error> {
    // Only the whole text `*` is the wildcard.
    if list == "*" {
        return Ok(Ranges::All);
    }
    // Unlike ports, ranges are read with the spaces around them, and refused for them.
    list.split(',')
        .filter(|c| !c.is_empty())
        .map(|c| Cidr::parse(c).map_err(Error::Invalid))
        .collect::<Result<_, _>>()
        .map(Ranges::These)
}

struct Program<'a> {
    config: &'a Config,
    rules: Vec<Rule>,
    uids: Vec<&'a str>,
    gids: Vec<&'a str>,
    v4_loopback: Cidr,
    era: Era,
    dns: bool,
}

impl Program<'_> {
    fn families(&self) -> &'static [Family] {
        if self.config.enable_inbound_ipv6 {
            &[V4, V6]
        } else {
            &[V4]
        }
    }

    fn push(
        &mut self,
        family: Family,
        table: Table,
        chain: &'static str,
        position: Position,
        matches: Vec<Match>,
        target: Target,
    ) {
        if family == V4 || self.config.enable_inbound_ipv6 {
            self.rules.push(Rule {
                family,
                table,
                chain,
                position,
                matches,
                target,
            });
        }
    }

    fn one(
        &mut self,
        family: Family,
        table: Table,
        chain: &'static str,
        matches: Vec<Match>,
        target: Target,
    ) {
        self.push(family, table, chain, Position::End, matches, target);
    }

    /// The same rule in every family.
    fn both(&mut self, table: Table, chain: &'static str, matches: Vec<Match>, target: Target) {
        self.each(table, chain, |_, _| matches.clone(), target);
    }

    /// The rule in every family, with conditions that depend on it.
    fn each(
        &mut self,
        table: Table,
        chain: &'static str,
        matches: impl Fn(&Self, Family) -> Vec<Match>,
        target: Target,
    ) {
        for &family in self.families() {
            let matches = matches(self, family);
            self.one(family, table, chain, matches, target.clone());
        }
    }

    fn insert(
        &mut self,
        table: Table,
        chain: &'static str,
        at: usize,
        matches: impl Fn(&Self, Family) -> Vec<Match>,
        target: Target,
    ) {
        for &family in self.families() {
            let matches = matches(self, family);
            self.push(
                family,
                table,
                chain,
                Position::At(at),
                matches,
                target.clone(),
            );
        }
    }

    fn loopback(&self, family: Family) -> Cidr {
        match family {
            V4 => self.v4_loopback.clone(),
            V6 => Cidr::host(Ipv6Addr::LOCALHOST.into()),
        }
    }

    /// The source address that the proxy binds to when it dials the app.
    fn passthrough(&self, family: Family) -> Cidr {
        Cidr::host(match family {
            V4 => IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)),
            V6 => IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6)),
        })
    }

    fn excluded_interfaces(&mut self) {
        let mut tables = vec![Nat];
        if self.config.tproxy() {
            tables.push(Mangle);
        }
        for table in tables {
            for name in split(&self.config.exclude_interfaces) {
                self.both(table, PREROUTING, vec![In(name.into())], Target::Return);
                self.both(table, OUTPUT, vec![Out(name.into())], Target::Return);
            }
        }
    }

    fn virtual_machines(&mut self) {
        for name in split(&self.config.kube_virt_interfaces) {
            self.insert(
                Nat,
                PREROUTING,
                1,
                |_, _| vec![In(name.into())],
                Target::Return,
            );
        }
    }

    fn invalid(&mut self) {
        if self.config.drop_invalid {
            self.both(
                Mangle,
                PREROUTING,
                vec![State(&["INVALID"])],
                Target::Jump(DROP),
            );
            self.both(Mangle, DROP, vec![], Target::Drop);
        }
    }

    fn redirects(&mut self) {
        let c = self.config;
        if self.era >= Era::V1_13 {
            let tunnel = vec![tcp(), Port(Is, c.inbound_tunnel_port.clone())];
            self.both(Nat, INBOUND, tunnel, Target::Return);
        }
        let outbound = Target::Redirect(c.proxy_port.clone());
        self.both(Nat, REDIRECT, vec![tcp()], outbound);
        // 1.5 led listed ports to the outbound side.
        let inbound = match self.era == Era::V1_5 && c.inbound_ports_include != "*" {
            true => Target::Redirect(c.proxy_port.clone()),
            false => Target::Redirect(c.inbound_capture_port.clone()),
        };
        self.both(Nat, IN_REDIRECT, vec![tcp()], inbound);
    }

    fn inbound(&mut self) {
        let c = self.config;
        if c.inbound_ports_include.is_empty() {
            return;
        }
        let tproxy = c.tproxy();
        let table = if tproxy { Mangle } else { Nat };
        if tproxy {
            let mark = c.inbound_tproxy_mark.clone();
            self.both(Mangle, DIVERT, vec![], Target::SetMark(mark.clone()));
            self.both(Mangle, DIVERT, vec![], Target::Accept);
            let port = c.inbound_capture_port.clone();
            let target = Target::Tproxy { mark, port };
            let elsewhere = |p: &Self, f| vec![Destination(Not, p.loopback(f)), tcp()];
            self.each(Mangle, TPROXY, elsewhere, target);
        }
        self.both(table, PREROUTING, vec![tcp()], Target::Jump(INBOUND));
        let known = State(&["RELATED", "ESTABLISHED"]);
        if c.inbound_ports_include == "*" {
            if self.era <= Era::V1_5 {
                self.both(
                    table,
                    INBOUND,
                    vec![tcp(), Port(Is, "22".into())],
                    Target::Return,
                );
            }
            for port in split(&c.inbound_ports_exclude) {
                self.both(
                    table,
                    INBOUND,
                    vec![tcp(), Port(Is, port.into())],
                    Target::Return,
                );
            }
            if tproxy {
                self.both(Mangle, INBOUND, vec![tcp(), known], Target::Jump(DIVERT));
                self.both(Mangle, INBOUND, vec![tcp()], Target::Jump(TPROXY));
            } else {
                self.both(Nat, INBOUND, vec![tcp()], Target::Jump(IN_REDIRECT));
            }
            return;
        }
        for port in split(&c.inbound_ports_include) {
            let this = vec![tcp(), Port(Is, port.into())];
            if tproxy {
                let known = [&this[..], std::slice::from_ref(&known)].concat();
                self.both(Mangle, INBOUND, known, Target::Jump(DIVERT));
                self.both(Mangle, INBOUND, this, Target::Jump(TPROXY));
            } else {
                self.both(Nat, INBOUND, this, Target::Jump(IN_REDIRECT));
            }
        }
    }

    fn outbound_head(&mut self) {
        let old = self.era < Era::Current;
        let jump = if old { vec![tcp()] } else { vec![] };
        self.both(Nat, OUTPUT, jump, Target::Jump(ISTIO_OUTPUT));
        let protocols: &[&'static str] = if old { &["tcp"] } else { &["tcp", "udp"] };
        for port in split(&self.config.outbound_ports_exclude) {
            for protocol in protocols {
                let matches = vec![Protocol(protocol), Port(Is, port.into())];
                self.both(Nat, ISTIO_OUTPUT, matches, Target::Return);
            }
        }
        let lo = || Out("lo".into());
        if self.era == Era::V1_3 {
            let own_pod = |p: &Self, f| vec![lo(), Destination(Not, p.loopback(f))];
            self.each(Nat, ISTIO_OUTPUT, own_pod, Target::Jump(REDIRECT));
            return;
        }
        let passthrough = |p: &Self, f| vec![lo(), Source(p.passthrough(f))];
        self.each(Nat, ISTIO_OUTPUT, passthrough, Target::Return);
    }

    /// What the proxy itself sends: calls to its own pod pass through the inbound side, everything else is left alone;
    /// what the app sends to itself is left alone as well, unless the user asked for a loopback range.
    fn owners(&mut self, include: &Ranges) {
        let loopback_wanted = match include {
            Ranges::All => false,
            Ranges::These(list) => list.iter().any(|c| c.addr.is_loopback()),
        };
        let users = self.uids.iter().map(|u| (u.to_string(), true));
        let groups = self.gids.iter().map(|g| (g.to_string(), false));
        let owners: Vec<(String, bool)> = users.chain(groups).collect();
        for (id, user) in owners {
            let owner = |sense| {
                if user {
                    Uid(sense, id.clone())
                } else {
                    Gid(sense, id.clone())
                }
            };
            if self.era == Era::V1_3 {
                self.both(Nat, ISTIO_OUTPUT, vec![owner(Is)], Target::Return);
                continue;
            }
            let tunnel = self.config.inbound_tunnel_port.clone();
            // The group's rule never has the multiport form.
            let port = if self.dns && user {
                NotPorts(vec!["53".into(), tunnel])
            } else {
                Port(Not, tunnel)
            };
            let own_pod = |p: &Self, f| {
                let mut matches = vec![Out("lo".into()), Destination(Not, p.loopback(f))];
                if p.era == Era::Current {
                    matches.extend([tcp(), port.clone()]);
                }
                matches.push(owner(Is));
                matches
            };
            self.each(Nat, ISTIO_OUTPUT, own_pod, Target::Jump(IN_REDIRECT));
            if !loopback_wanted {
                let mut matches = vec![Out("lo".into())];
                if self.dns {
                    matches.extend([tcp(), Port(Not, "53".into())]);
                }
                matches.push(owner(Not));
                self.both(Nat, ISTIO_OUTPUT, matches, Target::Return);
            }
            self.both(Nat, ISTIO_OUTPUT, vec![owner(Is)], Target::Return);
        }
    }

    fn owner_groups(&mut self) {
        let c = self.config;
        if c.owner_groups_include == "*" {
            for group in split(&c.owner_groups_exclude) {
                self.both(
                    Nat,
                    ISTIO_OUTPUT,
                    vec![Gid(Is, group.into())],
                    Target::Return,
                );
            }
            return;
        }
        // None included leaves a rule without a condition: nothing is captured.
        let others = split(&c.owner_groups_include)
            .into_iter()
            .map(|g| Gid(Not, g.into()))
            .collect();
        self.both(Nat, ISTIO_OUTPUT, others, Target::Return);
    }

    /// Queries to the resolvers go to the agent. The zones keep apart what the app asks the agent and what the agent
    /// asks the resolver: both may use the same client port.
    fn dns(&mut self) {
        if !self.dns {
            return;
        }
        let all = self.config.capture_all_dns;
        let servers: Vec<(Family, Cidr)> = [
            (V4, &self.config.dns_servers_v4),
            (V6, &self.config.dns_servers_v6),
        ]
        .into_iter()
        .flat_map(|(f, list)| list.iter().map(move |s| (f, Cidr::host(*s))))
        .collect();
        let has = |family| all || servers.iter().any(|(f, _)| *f == family);
        self.both(Raw, OUTPUT, vec![], Target::Jump(OUTPUT_DNS));
        for family in [V4, V6] {
            if has(family) {
                self.one(family, Nat, ISTIO_OUTPUT, vec![], Target::Jump(OUTPUT_DNS));
            }
        }
        for protocol in ["tcp", "udp"] {
            let target = match protocol {
                "tcp" => Target::Redirect(DNS_PORT.into()),
                _ => Target::RedirectOne(DNS_PORT.into()),
            };
            let query = vec![Protocol(protocol), Port(Is, "53".into())];
            if all {
                self.both(Nat, OUTPUT_DNS, query, target);
                continue;
            }
            for (family, server) in &servers {
                let mut matches = query.clone();
                matches.push(Destination(Is, server.clone()));
                self.one(*family, Nat, OUTPUT_DNS, matches, target.clone());
            }
        }
        let udp = || Protocol("udp");
        let owners: Vec<Match> = self
            .uids
            .iter()
            .map(|u| Uid(Is, u.to_string()))
            .chain(self.gids.iter().map(|g| Gid(Is, g.to_string())))
            .collect();
        for owner in owners {
            let query = vec![udp(), Port(Is, "53".into()), owner.clone()];
            self.both(Raw, OUTPUT_DNS, query, Target::Zone(1));
            let answer = vec![udp(), SourcePort(DNS_PORT.into()), owner];
            self.both(Raw, OUTPUT_DNS, answer, Target::Zone(2));
        }
        if all {
            self.both(Raw, PREROUTING, vec![], Target::Jump(INBOUND));
            self.both(
                Raw,
                OUTPUT_DNS,
                vec![udp(), Port(Is, "53".into())],
                Target::Zone(2),
            );
            self.both(
                Raw,
                INBOUND,
                vec![udp(), SourcePort("53".into())],
                Target::Zone(1),
            );
            return;
        }
        for family in [V4, V6] {
            if has(family) {
                self.one(family, Raw, PREROUTING, vec![], Target::Jump(INBOUND));
            }
            for (_, server) in servers.iter().filter(|(f, _)| *f == family) {
                let query = vec![
                    udp(),
                    Port(Is, "53".into()),
                    Destination(Is, server.clone()),
                ];
                self.one(family, Raw, OUTPUT_DNS, query, Target::Zone(2));
                let answer = vec![udp(), SourcePort("53".into()), Source(server.clone())];
                self.one(family, Raw, INBOUND, answer, Target::Zone(1));
            }
        }
    }

    fn destinations(&mut self, exclude: &[Cidr], include: &Ranges) {
        // IPv4 first: nft has both families in one chain.
        let (v4, v6): (Vec<_>, Vec<_>) = exclude.iter().partition(|c| c.addr.is_ipv4());
        for range in v4.into_iter().chain(v6) {
            let matches = vec![Destination(Is, range.clone())];
            self.one(family(range), Nat, ISTIO_OUTPUT, matches, Target::Return);
        }
        for port in split(&self.config.outbound_ports_include) {
            let matches = vec![tcp(), Port(Is, port.into())];
            self.both(Nat, ISTIO_OUTPUT, matches, Target::Jump(REDIRECT));
        }
        let machines = split(&self.config.kube_virt_interfaces);
        let target = Target::Jump(REDIRECT);
        match include {
            Ranges::All => {
                self.both(Nat, ISTIO_OUTPUT, vec![], target.clone());
                for name in machines {
                    self.insert(
                        Nat,
                        PREROUTING,
                        1,
                        |_, _| vec![In(name.into())],
                        target.clone(),
                    );
                }
            }
            Ranges::These(list) => {
                let (v4, v6): (Vec<_>, Vec<_>) = list.iter().partition(|c| c.addr.is_ipv4());
                for range in v4.into_iter().chain(v6) {
                    let family = family(range);
                    let there = Destination(Is, range.clone());
                    for name in &machines {
                        let matches = vec![In(name.to_string()), there.clone()];
                        let first = Position::At(1);
                        self.push(family, Nat, PREROUTING, first, matches, target.clone());
                    }
                    self.one(family, Nat, ISTIO_OUTPUT, vec![there], target.clone());
                }
                if self.era < Era::Current && !list.is_empty() {
                    self.both(Nat, ISTIO_OUTPUT, vec![], Target::Return);
                }
            }
        }
    }

    /// TPROXY: connections of the proxy on behalf of a client keep the mark, so that answers come back to it; calls of
    /// the proxy to its own pod get a mark of their own, so that they pass through the inbound side.
    fn tproxy_marks(&mut self) {
        if !self.config.tproxy() {
            return;
        }
        let mark = self.config.inbound_tproxy_mark.clone();
        // Istio's own constant beside the configurable mark.
        let outbound = "1338".to_string();
        let lo = || Out("lo".into());
        let marked = vec![tcp(), Mark(Is, mark.clone())];
        self.both(Mangle, PREROUTING, marked, Target::SaveMark);
        let marked = vec![tcp(), lo(), Mark(Is, mark.clone())];
        self.both(Mangle, OUTPUT, marked, Target::Return);
        let owners: Vec<Match> = self
            .uids
            .iter()
            .map(|u| Uid(Is, u.to_string()))
            .chain(self.gids.iter().map(|g| Gid(Is, g.to_string())))
            .collect();
        for owner in owners {
            let own_pod =
                |p: &Self, f| vec![Destination(Not, p.loopback(f)), tcp(), lo(), owner.clone()];
            self.each(Mangle, OUTPUT, own_pod, Target::SetMark(outbound.clone()));
        }
        let known = vec![tcp(), ConnMark(mark.clone())];
        self.both(Mangle, OUTPUT, known, Target::RestoreMark);
        let marked = |_: &Self, _| vec![tcp(), Mark(Is, mark.clone())];
        self.insert(Mangle, INBOUND, 1, marked, Target::Return);
        let passthrough = |p: &Self, f| vec![tcp(), Source(p.passthrough(f)), In("lo".into())];
        self.insert(Mangle, INBOUND, 2, passthrough, Target::Return);
        let local = |_: &Self, _| vec![tcp(), In("lo".into()), Mark(Not, outbound.clone())];
        self.insert(Mangle, INBOUND, 3, local, Target::Return);
    }
}

impl Program<'_> {
    /// TPROXY beside connection tracking: neither what comes in is tracked, nor the proxy's calls to the app, nor the
    /// answers of either.
    ///
    /// Istio keeps the proxy's mark in the connection's entry, so that the app's answers find back. Here sockets keep it
    /// (see [`crate::sysctls`]): what the app accepts has the mark of the packet that opened it. So has what the proxy
    /// accepts, and TPROXY's mark would lead its answers to `lo` as well: it becomes another one before the socket is made.
    fn untracked(&mut self) {
        let c = self.config;
        if !c.tproxy_notrack {
            return;
        }
        let (lo_in, lo_out) = (In("lo".into()), Out("lo".into()));
        let mark = |mark: &str| vec![tcp(), Mark(Is, mark.into())];
        let excluded = split(&c.exclude_interfaces);
        self.both(Raw, PREROUTING, vec![tcp()], Target::Jump(NOTRACK));
        // What comes by `lo` was judged when it left.
        self.both(Raw, NOTRACK, vec![lo_in.clone()], Target::Return);
        for name in &excluded {
            let card = vec![In(name.to_string())];
            self.both(Raw, NOTRACK, card, Target::Return);
        }
        let all = c.inbound_ports_include == "*";
        let excluded_ports: Vec<&str> = match all {
            true => split(&c.inbound_ports_exclude),
            false => Vec::new(),
        };
        for port in &excluded_ports {
            let this = vec![tcp(), Port(Is, port.to_string())];
            self.both(Raw, NOTRACK, this, Target::NoTrack);
        }
        let captured = match all {
            true => vec![vec![tcp()]],
            false => split(&c.inbound_ports_include)
                .into_iter()
                .map(|port| vec![tcp(), Port(Is, port.into())])
                .collect(),
        };
        // Answers to what the pod calls stay tracked: their sockets are not transparent.
        for captured in captured {
            let opens = [&captured[..], &[Opens(Is)]].concat();
            self.both(Raw, NOTRACK, opens, Target::NoTrack);
            let later = [&captured[..], &[Opens(Not), Transparent]].concat();
            self.both(Raw, NOTRACK, later, Target::NoTrack);
        }
        self.both(Raw, OUTPUT, vec![tcp()], Target::Jump(OUTPUT_NOTRACK));
        for kept in [&c.inbound_tproxy_mark, ANSWER_MARK] {
            self.both(Raw, OUTPUT_NOTRACK, mark(kept), Target::NoTrack);
        }
        // The agent asks the app for its health from there. The self-test calls that address as the proxy and is translated.
        let out = lo_out.clone();
        let asks = |p: &Self, f| vec![out.clone(), Source(p.passthrough(f)), tcp()];
        self.each(Raw, OUTPUT_NOTRACK, asks, Target::NoTrack);
        let out = lo_out.clone();
        let answers = |p: &Self, f| {
            let mut matches = vec![out.clone(), Destination(Is, p.passthrough(f)), tcp()];
            matches.extend(p.uids.iter().map(|u| Uid(Not, u.to_string())));
            matches.extend(p.gids.iter().map(|g| Gid(Not, g.to_string())));
            matches
        };
        self.each(Raw, OUTPUT_NOTRACK, answers, Target::NoTrack);
        self.both(Raw, OUTPUT_NOTRACK, vec![lo_out], Target::Return);
        for name in &excluded {
            let card = vec![Out(name.to_string())];
            self.both(Raw, OUTPUT_NOTRACK, card, Target::Return);
        }
        for port in &excluded_ports {
            let this = vec![tcp(), SourcePort(port.to_string())];
            self.both(Raw, OUTPUT_NOTRACK, this, Target::NoTrack);
        }
        // The app's answers there have the mark of the proxy's own calls, which what comes by `lo` is captured for.
        let answers = |p: &Self, f| vec![tcp(), Destination(Is, p.passthrough(f)), lo_in.clone()];
        self.insert(Mangle, INBOUND, 3, answers, Target::Return);
        self.both(
            Mangle,
            INPUT,
            mark(&c.inbound_tproxy_mark),
            Target::Jump(ISTIO_INPUT),
        );
        self.both(Mangle, ISTIO_INPUT, vec![lo_in], Target::Return);
        self.both(
            Mangle,
            ISTIO_INPUT,
            vec![],
            Target::SetMark(ANSWER_MARK.into()),
        );
    }
}

fn tcp() -> Match {
    Protocol("tcp")
}

fn family(range: &Cidr) -> Family {
    if range.addr.is_ipv4() { V4 } else { V6 }
}
