//! Addresses, routes and routing rules that go with the rules, set over netlink: no `ip` program is needed.
//!
//! `::6` on lo is the IPv6 twin of 127.0.0.6, which IPv4 has by nature. TPROXY needs packets with its mark to be
//! delivered locally whatever their destination. Everything is idempotent: what is there already is left.

use std::{
    io::IoSlice,
    net::Ipv6Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv,
        sendmsg, socket,
    },
};

use crate::{Error, config::Config};

/// Sets what `config` needs.
pub fn add(config: &Config) -> Result<(), Error> {
    let link = Link::open()?;
    if config.enable_inbound_ipv6 {
        link.passthrough_address(NEW_ADDRESS)?;
    }
    if let Some((mark, table)) = tproxy(config)? {
        for &v6 in families(config) {
            // Not every kernel refuses a rule that is there.
            if !link.marked_rules(v6)?.contains(&(mark, table)) {
                link.rule(NEW_RULE, v6, mark, table)?;
            }
            link.route(NEW_ROUTE, v6, table)?;
        }
    }
    Ok(())
}

/// Sets what `config` needs, and takes away what belongs to rules that it has replaced: those had `marks`.
pub fn replace(config: &Config, marks: &[u32]) -> Result<(), Error> {
    add(config)?;
    clear(config, marks, tproxy(config)?)
}

/// Removes routes and routing rules of TPROXY: those of rules with `marks`, and those that the flags name. The address
/// stays: it captures nothing.
pub fn remove(config: &Config, marks: &[u32]) -> Result<(), Error> {
    clear(config, marks, None)
}

/// Removes routing rules of TPROXY and their routes in both families, but `kept`. A mark of our rules is ours whatever
/// table it leads to; without such rules (a run that was killed) only the very pair of the flags is.
fn clear(config: &Config, marks: &[u32], kept: Option<(u32, u32)>) -> Result<(), Error> {
    let link = Link::open()?;
    let flags = (
        config.inbound_tproxy_mark.parse().ok(),
        config.inbound_tproxy_route_table.parse().ok(),
    );
    for v6 in [false, true] {
        let kept = kept.filter(|_| families(config).contains(&v6));
        let mut ours = link.marked_rules(v6)?;
        ours.retain(|(mark, table)| {
            let ours = marks.contains(mark) || flags == (Some(*mark), Some(*table));
            ours && kept != Some((*mark, *table))
        });
        for (mark, table) in link.leading_to_lo(v6, ours)? {
            link.rule(DELETE_RULE, v6, mark, table)?;
            if kept.is_none_or(|(_, other)| other != table) {
                link.route(DELETE_ROUTE, v6, table)?;
            }
        }
    }
    Ok(())
}

/// Refuses a mark or a table that cannot be set.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    tproxy(config).map(drop)
}

fn families(config: &Config) -> &'static [bool] {
    if config.enable_inbound_ipv6 {
        &[false, true]
    } else {
        &[false]
    }
}

/// Mark and table, if inbound traffic is steered by TPROXY.
fn tproxy(config: &Config) -> Result<Option<(u32, u32)>, Error> {
    if !config.tproxy() || config.inbound_ports_include.is_empty() {
        return Ok(None);
    }
    // Decimal alone, as in Istio, though iptables would take 0x10 for the mark.
    let number = |flag: &str, name: &str, text: &str| {
        text.parse::<u32>().map_err(|_| {
            Error::Invalid(format!(
                "failed to parse {name}: strconv.Atoi: parsing {text:?}: invalid syntax; {flag} takes a decimal number"
            ))
        })
    };
    Ok(Some((
        number(
            "--istio-inbound-tproxy-mark",
            "InboundTProxyMark",
            &config.inbound_tproxy_mark,
        )?,
        number(
            "--istio-inbound-tproxy-route-table",
            "InboundTProxyRouteTable",
            &config.inbound_tproxy_route_table,
        )?,
    )))
}

/// Gets the head of a rule or route, and its attributes: kind and value.
type Take<'a> = &'a mut dyn FnMut(&[u8; 12], &[(u16, &[u8])]);

/// A conversation with the kernel's routing.
struct Link {
    socket: OwnedFd,
    lo: u32,
}

impl Link {
    fn open() -> Result<Link, Error> {
        let fail = |e: Errno| Error::Route {
            what: "netlink".into(),
            why: e.to_string(),
        };
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
        .map_err(fail)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(fail)?;
        let lo = if_nametoindex("lo").map_err(fail)?;
        Ok(Link { socket, lo })
    }

    fn passthrough_address(&self, kind: u16) -> Result<(), Error> {
        let address = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).octets();
        // struct ifaddrmsg: family, prefix length, flags, scope (host), interface.
        let mut body = vec![AF_INET6, 128, 0, 254];
        body.extend(self.lo.to_ne_bytes());
        attribute(&mut body, 1, &address); // IFA_ADDRESS
        attribute(&mut body, 2, &address); // IFA_LOCAL
        self.ask(kind, &body, "address ::6/128 on lo")
    }

    fn rule(&self, kind: u16, v6: bool, mark: u32, table: u32) -> Result<(), Error> {
        // struct fib_rule_hdr: family, lengths, tos, table, reserved, action FR_ACT_TO_TBL, flags.
        let mut body = vec![family(v6), 0, 0, 0, short(table), 0, 0, 1, 0, 0, 0, 0];
        attribute(&mut body, 10, &mark.to_ne_bytes()); // FRA_FWMARK
        attribute(&mut body, 15, &table.to_ne_bytes()); // FRA_TABLE
        self.ask(kind, &body, &format!("rule fwmark {mark} lookup {table}"))
    }

    fn route(&self, kind: u16, v6: bool, table: u32) -> Result<(), Error> {
        // struct rtmsg: family, lengths, tos, table, protocol boot, scope host, type local, flags.
        let mut body = vec![family(v6), 0, 0, 0, short(table), 3, 254, 2, 0, 0, 0, 0];
        attribute(&mut body, 15, &table.to_ne_bytes()); // RTA_TABLE
        attribute(&mut body, 4, &self.lo.to_ne_bytes()); // RTA_OIF
        self.ask(
            kind,
            &body,
            &format!("local default route in table {table}"),
        )
    }

    /// The rules that look a table up for a mark and ask nothing else: mark and table.
    fn marked_rules(&self, v6: bool) -> Result<Vec<(u32, u32)>, Error> {
        const INVERTED: u8 = 2;
        let mut out = Vec::new();
        // struct fib_rule_hdr
        let body = [family(v6), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        self.dump(GET_RULE, &body, "routing rules", &mut |head, attributes| {
            let (mut mark, mut mask, mut table) = (None, u32::MAX, u32::from(head[4]));
            let mut plain = head[1] == 0 && head[2] == 0 && head[7] == 1 && head[8] & INVERTED == 0;
            for (kind, value) in attributes {
                match kind {
                    10 => mark = number(value),
                    16 => mask = number(value).unwrap_or(mask),
                    15 => table = number(value).unwrap_or(table),
                    // An interface, as it comes in and goes out.
                    3 | 17 => plain = false,
                    _ => {}
                }
            }
            if let Some(mark) = mark
                && plain
                && mask == u32::MAX
            {
                out.push((mark, table));
            }
        })?;
        Ok(out)
    }

    /// Those of `rules` whose table holds our route: everything is local, by `lo`.
    fn leading_to_lo(&self, v6: bool, rules: Vec<(u32, u32)>) -> Result<Vec<(u32, u32)>, Error> {
        if rules.is_empty() {
            return Ok(rules);
        }
        let mut tables = Vec::new();
        // struct rtmsg
        let body = [family(v6), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        self.dump(GET_ROUTE, &body, "routes", &mut |head, attributes| {
            let (mut table, mut by) = (u32::from(head[4]), None);
            for (kind, value) in attributes {
                match kind {
                    15 => table = number(value).unwrap_or(table),
                    4 => by = number(value),
                    _ => {}
                }
            }
            if head[1] == 0 && head[7] == 2 && by == Some(self.lo) {
                tables.push(table);
            }
        })?;
        let ours = rules.into_iter().filter(|(_, t)| tables.contains(t));
        Ok(ours.collect())
    }

    /// Asks for all of a kind; `take` gets the twelve bytes of each one's head, and its attributes.
    fn dump(&self, kind: u16, body: &[u8; 12], what: &str, take: Take<'_>) -> Result<(), Error> {
        const DUMP: u16 = 1 | 0x300;
        const END: u16 = libc::NLMSG_DONE as u16;
        const FAILED: u16 = libc::NLMSG_ERROR as u16;
        let fail = |why: String| Error::Route {
            what: what.into(),
            why,
        };
        let io = |e: Errno| fail(e.to_string());
        let to = NetlinkAddr::new(0, 0);
        let fd = self.socket.as_raw_fd();
        let message = message(kind, DUMP, body);
        let none = MsgFlags::empty();
        sendmsg(fd, &[IoSlice::new(&message)], &[], none, Some(&to)).map_err(io)?;
        let mut buffer = vec![0u8; 1 << 16];
        loop {
            let length = recv(fd, &mut buffer, none).map_err(io)?;
            let mut rest = &buffer[..length];
            while let Some(size) = number(rest).map(|n| n as usize)
                && (16..=rest.len()).contains(&size)
            {
                match u16::from_ne_bytes([rest[4], rest[5]]) {
                    END => return Ok(()),
                    FAILED => {
                        let code = rest.get(16..).and_then(number).unwrap_or_default() as i32;
                        return Err(io(Errno::from_raw(code.wrapping_neg())));
                    }
                    _ => {}
                }
                let head = rest.get(16..28).and_then(|h| h.try_into().ok());
                if let Some(head) = head {
                    take(head, &attributes(&rest[28..size.max(28)]));
                }
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            }
            if length == 0 {
                return Ok(());
            }
        }
    }

    /// Sends one request and reads its acknowledgement; what exists, or is gone already, counts as done.
    fn ask(&self, kind: u16, body: &[u8], what: &str) -> Result<(), Error> {
        const REQUEST_ACK: u16 = 1 | 4;
        const CREATE_EXCLUSIVE: u16 = 0x400 | 0x200;
        let new = matches!(kind, NEW_ADDRESS | NEW_ROUTE | NEW_RULE);
        let flags = if new {
            REQUEST_ACK | CREATE_EXCLUSIVE
        } else {
            REQUEST_ACK
        };
        let message = message(kind, flags, body);
        let fail = |why: String| Error::Route {
            what: what.into(),
            why,
        };
        let io = |e: Errno| fail(e.to_string());
        let to = NetlinkAddr::new(0, 0);
        let fd = self.socket.as_raw_fd();
        sendmsg(
            fd,
            &[IoSlice::new(&message)],
            &[],
            MsgFlags::empty(),
            Some(&to),
        )
        .map_err(io)?;
        let mut answer = [0u8; 4096];
        let n = recv(fd, &mut answer, MsgFlags::empty()).map_err(io)?;
        let error = answer[..n]
            .get(16..20)
            .and_then(|b| b.try_into().ok())
            .map(i32::from_ne_bytes)
            .ok_or_else(|| fail("the kernel's answer is too short".into()))?;
        match Errno::from_raw(-error) {
            _ if error == 0 => Ok(()),
            Errno::EEXIST if new => Ok(()),
            Errno::ENOENT | Errno::ESRCH if !new => Ok(()),
            errno => Err(fail(errno.to_string())),
        }
    }
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    // struct nlmsghdr: length, type, flags, sequence, port.
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend((16 + body.len() as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(1u32.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend(body);
    message
}

/// Kind and value of each attribute; stops at what is none.
fn attributes(mut rest: &[u8]) -> Vec<(u16, &[u8])> {
    let mut out = Vec::new();
    while let Some(head) = rest.get(..4) {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let Some(value) = rest.get(4..length) else {
            break;
        };
        out.push((u16::from_ne_bytes([head[2], head[3]]), value));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

fn number(bytes: &[u8]) -> Option<u32> {
    let bytes = bytes.get(..4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// Appends one attribute, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn family(v6: bool) -> u8 {
    if v6 { AF_INET6 } else { AF_INET }
}

/// The table as the header holds it; larger ones stand in the attribute alone.
fn short(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(0)
}

const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;
const NEW_ADDRESS: u16 = libc::RTM_NEWADDR;
const NEW_ROUTE: u16 = libc::RTM_NEWROUTE;
const GET_ROUTE: u16 = libc::RTM_GETROUTE;
const DELETE_ROUTE: u16 = libc::RTM_DELROUTE;
const NEW_RULE: u16 = libc::RTM_NEWRULE;
const GET_RULE: u16 = libc::RTM_GETRULE;
const DELETE_RULE: u16 = libc::RTM_DELRULE;
