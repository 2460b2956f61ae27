//! One rule of interception, independent of the program that writes it into the kernel.
//!
//! The vocabulary is that of iptables, as the rules are Istio's; [`crate::restore`] and [`crate::state`] render it.

use std::fmt;

use base::cidr::Cidr;

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// iptables.
    V4,
    /// ip6tables.
    V6,
}

/// A table, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// filter
    Filter,
    /// mangle
    Mangle,
    /// nat
    Nat,
    /// raw
    Raw,
}

impl Table {
    /// All of them, in order.
    pub const ALL: [Table; 4] = [Table::Filter, Table::Mangle, Table::Nat, Table::Raw];

    /// The table of that name.
    pub fn named(name: &str) -> Option<Table> {
        Table::ALL.into_iter().find(|t| t.to_string() == name)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Table::Filter => "filter",
            Table::Mangle => "mangle",
            Table::Nat => "nat",
            Table::Raw => "raw",
        })
    }
}

/// Where in its chain a rule goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// At the end (`-A`).
    End,
    /// As the n-th, from 1 (`-I chain n`).
    At(usize),
}

/// `!` before a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sense {
    /// The match must hold.
    Is,
    /// The match must not hold.
    Not,
}

/// A condition. Text values are the user's own (names included): iptables resolves them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// Came in on that interface.
    In(String),
    /// Goes out on that interface.
    Out(String),
    /// Source address.
    Source(Cidr),
    /// Destination address.
    Destination(Sense, Cidr),
    /// `tcp` or `udp`.
    Protocol(&'static str),
    /// Destination port.
    Port(Sense, String),
    /// None of these destination ports.
    NotPorts(Vec<String>),
    /// Source port.
    SourcePort(String),
    /// User of the sending socket.
    Uid(Sense, String),
    /// Group of the sending socket.
    Gid(Sense, String),
    /// Firewall mark.
    Mark(Sense, String),
    /// Mark of the connection.
    ConnMark(String),
    /// Opens a connection: SYN alone of SYN, ACK, FIN and RST.
    Opens(Sense),
    /// Belongs to a transparent socket.
    Transparent,
    /// State of the connection.
    State(&'static [&'static str]),
}

/// What happens to a packet that matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Leave the chain.
    Return,
    /// Let through.
    Accept,
    /// Drop.
    Drop,
    /// Go on in another chain.
    Jump(&'static str),
    /// Lead to a local port.
    Redirect(String),
    /// The same, spelt `--to-port`: Istio writes its UDP rules so.
    RedirectOne(String),
    /// Set the firewall mark.
    SetMark(String),
    /// Copy the packet's mark to the connection.
    SaveMark,
    /// Copy the connection's mark to the packet.
    RestoreMark,
    /// Hand to a transparent local socket.
    Tproxy {
        /// Mark set on the packet.
        mark: String,
        /// Port of the socket.
        port: String,
    },
    /// Track in that zone.
    Zone(u16),
    /// Do not track.
    NoTrack,
}

/// A rule of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its family.
    pub family: Family,
    /// Its table.
    pub table: Table,
    /// Its chain.
    pub chain: &'static str,
    /// Where in the chain.
    pub position: Position,
    /// Conditions, in the order in which Istio writes them.
    pub matches: Vec<Match>,
    /// What happens.
    pub target: Target,
}

/// Whether a chain is one of ours.
pub fn ours(chain: &str) -> bool {
    chain.starts_with("ISTIO_")
}
