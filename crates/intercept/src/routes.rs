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
            link.rule(NEW_RULE, v6, mark, table)?;
            link.route(NEW_ROUTE, v6, table)?;
        }
    }
    Ok(())
}

/// Removes routes and routing rules of TPROXY. The address stays: it captures nothing.
pub fn remove(config: &Config) -> Result<(), Error> {
    let link = Link::open()?;
    if let Some((mark, table)) = tproxy(config)? {
        for &v6 in families(config) {
            link.rule(DELETE_RULE, v6, mark, table)?;
            link.route(DELETE_ROUTE, v6, table)?;
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
        // struct nlmsghdr: length, type, flags, sequence, port.
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend((16 + body.len() as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(1u32.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(body);
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
const DELETE_ROUTE: u16 = libc::RTM_DELROUTE;
const NEW_RULE: u16 = libc::RTM_NEWRULE;
const DELETE_RULE: u16 = libc::RTM_DELRULE;
