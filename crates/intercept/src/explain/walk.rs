//! The packet's way through the hooks, in the kernel's order.
//!
//! A packet made here meets OUTPUT and POSTROUTING; if it goes to the machine itself it comes back by `lo` and meets
//! PREROUTING and INPUT, where the nat table is not asked again. A packet from elsewhere meets PREROUTING and INPUT.

use std::{
    fmt::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::{
    Packet, Ruleset, State,
    rule::{Action, Outcome, judge},
};
use crate::model::Table::{self, Filter, Mangle, Nat, Raw};

/// Where a packet ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// At a local socket; `meant` is where it was going when rules led it elsewhere.
    Local {
        /// The socket's address.
        at: SocketAddr,
        /// The original destination, where it differs.
        meant: Option<SocketAddr>,
    },
    /// At a transparent local socket: its address stays.
    Transparent {
        /// The socket's port.
        port: u16,
        /// The destination that the socket sees.
        to: SocketAddr,
    },
    /// On the wire.
    Leaves {
        /// The interface.
        by: String,
        /// Its destination.
        to: SocketAddr,
    },
    /// Nowhere.
    Dropped {
        /// Table and chain of the rule or policy.
        by: String,
    },
    /// Routed on to another machine or namespace.
    Forwarded {
        /// Its destination.
        to: SocketAddr,
    },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Local { at, meant } => {
                write!(f, "local socket {at}{}", known(at.port()))?;
                match meant {
                    Some(meant) => write!(f, "; original destination {meant}"),
                    None => Ok(()),
                }
            }
            End::Transparent { port, to } => write!(
                f,
                "transparent socket of port {port}{}; destination stays {to}",
                known(*port)
            ),
            End::Leaves { by, to } => write!(f, "leaves by {by} for {to}, untouched by the proxy"),
            End::Dropped { by } => write!(f, "dropped by {by}"),
            End::Forwarded { to } => write!(f, "forwarded to {to}: it is not this pod's"),
        }
    }
}

/// Whose a port is by Istio's convention.
fn known(port: u16) -> &'static str {
    match port {
        15001 => " (the proxy, outbound)",
        15006 => " (the proxy, inbound)",
        15053 => " (the agent, DNS)",
        _ => "",
    }
}

/// The story of one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The story, a line a rule.
    pub text: String,
    /// The chains entered, in order.
    pub chains: Vec<String>,
    /// Where it ends.
    pub end: End,
    /// How many rules could not be judged; they were taken not to match.
    pub unknown: usize,
}

/// Walks `packet` through `rules`.
pub fn walk(rules: &Ruleset, packet: &Packet) -> Trace {
    let mut w = Walk {
        rules,
        packet: packet.clone(),
        text: format!("packet: {packet}\n"),
        chains: Vec::new(),
        unknown: 0,
        meant: None,
        elsewhere: false,
        transparent: None,
    };
    let end = match packet.input {
        Some(_) => w.came_in(),
        None => w.made_here(),
    };
    let _ = writeln!(w.text, "ends: {end}");
    if w.unknown > 0 {
        let _ = writeln!(
            w.text,
            "note: {} rule(s) could not be judged and were passed over: where they would act the packet may end elsewhere",
            w.unknown
        );
    }
    Trace {
        text: w.text,
        chains: w.chains,
        end,
        unknown: w.unknown,
    }
}

struct Walk<'a> {
    rules: &'a Ruleset,
    packet: Packet,
    text: String,
    chains: Vec<String>,
    unknown: usize,
    meant: Option<SocketAddr>,
    /// A rule has sent it on to an address that may be another machine's.
    elsewhere: bool,
    transparent: Option<u16>,
}

/// What became of the packet in a chain.
enum Flow {
    /// The chain was left at its end or by RETURN.
    Back,
    /// This hook's table has decided; the next table goes on.
    Decided,
    Dropped(String),
}

/// Deeper jumps are refused by the kernel as well.
const MAX_DEPTH: usize = 16;

impl Walk<'_> {
    fn made_here(&mut self) -> End {
        if let Some(end) = self.hook("OUTPUT", &[Raw, Mangle, Nat, Filter]) {
            return end;
        }
        if let Some(end) = self.hook("POSTROUTING", &[Mangle, Nat]) {
            return end;
        }
        let output = self.packet.output.clone().unwrap_or_default();
        if output != "lo" {
            return End::Leaves {
                by: output,
                to: self.to(),
            };
        }
        self.say("comes back by lo");
        self.packet.input = self.packet.output.take();
        // The socket does not travel with the packet.
        (self.packet.uid, self.packet.gid) = (None, None);
        if let Some(end) = self.hook("PREROUTING", &[Raw, Mangle]) {
            return end;
        }
        self.arrive(&[Mangle, Filter])
    }

    fn came_in(&mut self) -> End {
        if let Some(end) = self.hook("PREROUTING", &[Raw, Mangle, Nat]) {
            return end;
        }
        let own = self.packet.is_own(self.packet.to) || self.transparent.is_some();
        // Without a list of addresses everything that comes in is taken to be for the pod, unless a rule sent it on.
        if (!self.packet.own.is_empty() || self.elsewhere) && !own {
            self.say("goes on by FORWARD and POSTROUTING, which are not walked");
            return End::Forwarded { to: self.to() };
        }
        self.arrive(&[Mangle, Filter, Nat])
    }

    fn arrive(&mut self, tables: &[Table]) -> End {
        if let Some(end) = self.hook("INPUT", tables) {
            return end;
        }
        match self.transparent {
            Some(port) => End::Transparent {
                port,
                to: self.to(),
            },
            None => End::Local {
                at: self.to(),
                meant: self.meant,
            },
        }
    }

    fn to(&self) -> SocketAddr {
        SocketAddr::new(self.packet.to, self.packet.to_port)
    }

    /// Meets the tables of one hook; an end if there is one.
    fn hook(&mut self, hook: &str, tables: &[Table]) -> Option<End> {
        self.chains.push(hook.into());
        self.say(hook);
        let mut rules = false;
        for &table in tables {
            // The nat table decides at the first packet; later ones follow the connection's entry.
            if table == Nat && self.packet.state != State::New {
                continue;
            }
            let Some(chain) = self.rules.chain(table, hook) else {
                continue;
            };
            if chain.rules.is_empty() && !chain.drops {
                continue;
            }
            rules = true;
            let mark = self.packet.mark;
            match self.chain(table, hook, 1) {
                Flow::Back if chain.drops => {
                    let by = format!("the policy of table {table}, chain {hook}");
                    return Some(End::Dropped { by });
                }
                Flow::Dropped(by) => return Some(End::Dropped { by }),
                Flow::Back | Flow::Decided => {}
            }
            if table == Mangle && hook == "OUTPUT" && self.packet.mark != mark {
                let mark = self.packet.mark;
                self.say(&format!("  the route is chosen again for mark {mark:#x}"));
            }
        }
        if !rules {
            self.say("  no rules");
        }
        None
    }

    fn chain(&mut self, table: Table, name: &str, depth: usize) -> Flow {
        let rules = self.rules;
        let Some(chain) = rules.chain(table, name) else {
            // `iptables-save` lists every chain, so it is a target of some module.
            self.unknown += 1;
            self.line(
                depth,
                &format!("what {name} does cannot be judged: there is no chain of that name"),
            );
            return Flow::Back;
        };
        if depth > MAX_DEPTH {
            self.line(depth, "jumps go too deep; left here");
            return Flow::Back;
        }
        if depth > 1 {
            self.chains.push(name.into());
        }
        self.line(depth, &format!("table {table}, chain {name}"));
        for (i, rule) in chain.rules.iter().enumerate() {
            let (outcome, action) = judge(rule, &self.packet);
            let head = format!("  {:>2}  {rule}", i + 1);
            match outcome {
                Outcome::Fails(why) => {
                    self.line(depth, &format!("{head}\n{}no: {why}", pad(depth, 8)));
                    continue;
                }
                Outcome::CannotTell(what) => {
                    self.unknown += 1;
                    let why = format!("cannot be judged: {what}");
                    self.line(depth, &format!("{head}\n{}{why}", pad(depth, 8)));
                    continue;
                }
                Outcome::Matches => {
                    self.line(depth, &format!("{head}\n{}matches", pad(depth, 8)));
                }
            }
            match self.act(table, name, action, depth) {
                Some(flow) => return flow,
                None => continue,
            }
        }
        self.line(depth, &format!("  end of {name}"));
        Flow::Back
    }

    /// Carries an action out; what it makes of the chain, or nothing where the next rule is looked at.
    fn act(&mut self, table: Table, chain: &str, action: Action, depth: usize) -> Option<Flow> {
        match action {
            Action::Continue(_) => None,
            Action::Return => Some(Flow::Back),
            Action::Accept => Some(Flow::Decided),
            Action::Drop(how) => Some(Flow::Dropped(format!(
                "{how} in table {table}, chain {chain}"
            ))),
            Action::Jump(to) => match self.chain(table, &to, depth + 1) {
                Flow::Back => None,
                flow => Some(flow),
            },
            Action::Goto(to) => Some(self.chain(table, &to, depth + 1)),
            Action::Redirect(port) => {
                let port = port.unwrap_or(self.packet.to_port);
                let to = match (&self.packet.input, self.packet.to) {
                    (Some(_), ip) => ip,
                    (None, IpAddr::V4(_)) => Ipv4Addr::LOCALHOST.into(),
                    (None, IpAddr::V6(_)) => Ipv6Addr::LOCALHOST.into(),
                };
                self.translate(SocketAddr::new(to, port), depth);
                self.elsewhere = false;
                if self.packet.output.is_some() {
                    self.packet.output = Some("lo".into());
                }
                Some(Flow::Decided)
            }
            Action::Dnat(text) => {
                let to = text.parse::<SocketAddr>().ok().or_else(|| {
                    let ip = text.parse().ok()?;
                    Some(SocketAddr::new(ip, self.packet.to_port))
                });
                let Some(to) = to else {
                    self.unknown += 1;
                    self.line(depth, &format!("      leads to one of {text}"));
                    return Some(Flow::Decided);
                };
                self.translate(to, depth);
                self.elsewhere = true;
                if let Some(output) = &mut self.packet.output {
                    let own = self.packet.own.contains(&to.ip()) || to.ip().is_loopback();
                    match (own, output.as_str()) {
                        (true, _) => *output = "lo".into(),
                        (false, "lo") => *output = "eth0".into(),
                        _ => {}
                    }
                }
                Some(Flow::Decided)
            }
            Action::Source(how) => {
                self.line(depth, &format!("      the source changes by {how}"));
                Some(Flow::Decided)
            }
            Action::Mark { value, mask } => {
                // `--set-xmark value/mask`: the mask's bits are cleared, the value's turned over.
                self.packet.mark = (self.packet.mark & !mask) ^ value;
                None
            }
            Action::SaveMark { packet, connection } => {
                let p = &mut self.packet;
                p.connection_mark = (p.connection_mark & !connection) ^ (p.mark & packet);
                None
            }
            Action::RestoreMark { packet, connection } => {
                let p = &mut self.packet;
                p.mark = (p.mark & !packet) ^ (p.connection_mark & connection);
                None
            }
            Action::ConnectionMark { value, mask } => {
                self.packet.connection_mark = (self.packet.connection_mark & !mask) ^ value;
                None
            }
            Action::Tproxy { port, mark, mask } => {
                self.packet.mark = (self.packet.mark & !mask) ^ mark;
                self.transparent = Some(port);
                self.line(
                    depth,
                    &format!("      given to the transparent socket of port {port}"),
                );
                Some(Flow::Decided)
            }
            Action::Zone(zone) => {
                self.line(depth, &format!("      tracked in zone {zone}"));
                None
            }
            Action::Untracked => {
                self.packet.state = State::Untracked;
                self.line(depth, "      not tracked: the nat table will not be asked");
                None
            }
            Action::Unknown(target) => {
                self.unknown += 1;
                self.line(depth, &format!("      what {target} does cannot be judged"));
                None
            }
        }
    }

    fn translate(&mut self, to: SocketAddr, depth: usize) {
        let before = self.to();
        if before != to {
            self.meant.get_or_insert(before);
        }
        (self.packet.to, self.packet.to_port) = (to.ip(), to.port());
        self.line(depth, &format!("      led to {to}"));
    }

    fn say(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    fn line(&mut self, depth: usize, text: &str) {
        let indented = format!("{}{text}", pad(depth, 0));
        self.say(&indented);
    }
}

fn pad(depth: usize, more: usize) -> String {
    " ".repeat(2 * depth + more)
}
