//! The proof that the capture works: connections that must arrive at the proxy's ports do, with the destination that
//! the caller meant.
//!
//! For every captured family two calls are made. The proxy's own call to its pod (users and groups of `-u`, `-g`) must
//! come back in at the inbound port; an app's call to the outside must arrive at the outbound port. The second needs
//! the right to act as another user; where that, or a route, is missing, it is left out and said so. Inbound calls
//! from other pods cannot be made from inside; their rules are compared instead, where reading them is allowed.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt,
            listen, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
    unistd::{Gid, Uid, setfsgid, setfsuid},
};

use base::cidr::Cidr;

use crate::{
    Error, apply,
    config::{Config, split},
    ebpf,
    model::Rule,
    nft,
    surroundings::{self, Addresses},
};

/// One call and where it must arrive.
#[derive(Clone, Debug)]
struct Probe {
    what: &'static str,
    /// User and group of the caller; none is the caller's own.
    owner: Option<(u32, u32)>,
    from: Option<IpAddr>,
    to: SocketAddr,
    /// The proxy's port where it must arrive.
    port: u16,
}

/// Runs the self-test; `rules` are those that should be in place.
pub fn run(
    config: &Config,
    addresses: &Addresses,
    rules: &[Rule],
    log: apply::Log<'_>,
) -> Result<(), Error> {
    let mut failures = Vec::new();
    // Programs see the sockets of the pod's cgroup alone, and this may be called from the node.
    let inside = match config.ebpf() {
        true => Some(ebpf::Inside::of(&config.ebpf_cgroup)?),
        false => None,
    };
    for v6 in [false, true] {
        if addresses.of_family(v6).is_none() || v6 && !config.enable_inbound_ipv6 {
            continue;
        }
        for probe in probes(config, addresses, v6)? {
            match call(config, &probe) {
                Ok(()) => log(format!(
                    "validation: {} to {} arrives at port {}",
                    probe.what, probe.to, probe.port
                )),
                Err(Outcome::NotPossible(why)) => {
                    log(format!("validation: {} is not tested: {why}", probe.what));
                }
                Err(Outcome::Failed(why)) => failures.push(format!(
                    "{} to {} does not arrive at port {}: {why}",
                    probe.what, probe.to, probe.port
                )),
            }
        }
    }
    drop(inside);
    // Rules written by someone else (the CNI plug-in) may differ and work; ours must be there to the letter.
    let missing = match config.ebpf() {
        true => ebpf::verify(config, rules),
        false if config.native_nftables => nft::verify(rules),
        false => apply::verify(config, rules),
    };
    if let Ok(missing) = missing
        && (!config.skip_rule_apply || !failures.is_empty())
    {
        failures.extend(missing);
    }
    if failures.is_empty() {
        log("validation: the capture works".into());
        return Ok(());
    }
    Err(Error::Validation(format!(
        "iptables validation failed; workload is not ready for Istio.\n  {}\n\
         With the CNI plug-in this happens to a pod that starts before its node is ready: with \
         cni.repair.deletePods=true such a pod is deleted and made anew, else delete it by hand.",
        failures.join("\n  ")
    )))
}

fn probes(config: &Config, addresses: &Addresses, v6: bool) -> Result<Vec<Probe>, Error> {
    let port = |flag: &str, text: &str| {
        surroundings::port(text, "tcp").ok_or_else(|| {
            Error::Invalid(format!(
                "invalid value {text:?} for {flag}: a port is needed"
            ))
        })
    };
    let inbound = port("--inbound-capture-port", &config.inbound_capture_port)?;
    let outbound = port("--envoy-port", &config.proxy_port)?;
    let (loopback, passthrough): (IpAddr, IpAddr) = if v6 {
        (
            Ipv6Addr::LOCALHOST.into(),
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
        )
    } else {
        (
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::new(127, 0, 0, 6).into(),
        )
    };
    // A wide loopback range exempts 127.0.0.6, so the pod's own address is called.
    let own = match addresses.of_family(v6) {
        Some(pod) if !v6 && config.passthrough_is_loopback() => pod,
        _ => passthrough,
    };
    let first = |list: &str| split(list).first().and_then(|id| id.parse::<u32>().ok());
    let proxy = first(&config.proxy_uid).zip(first(&config.proxy_gid));
    let mut probes = vec![Probe {
        what: "the proxy's call to its own pod",
        owner: proxy,
        from: Some(loopback),
        to: SocketAddr::new(own, config.iptables_probe_port),
        port: inbound,
    }];
    if let Some(to) = outside(config, v6) {
        probes.push(Probe {
            what: "the app's call to the outside",
            owner: app(config),
            from: None,
            to,
            port: outbound,
        });
    }
    Ok(probes)
}

/// A destination that must be captured, if any is.
fn outside(config: &Config, v6: bool) -> Option<SocketAddr> {
    let ranges = |list: &str| -> Vec<Cidr> {
        split(list)
            .into_iter()
            .filter_map(|c| Cidr::parse(c).ok())
            .collect()
    };
    let include = &config.outbound_ip_ranges_include;
    // Addresses for documentation: nobody is there, and the packet is not meant to leave the pod.
    let documentation: IpAddr = if v6 {
        Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1).into()
    } else {
        Ipv4Addr::new(192, 0, 2, 1).into()
    };
    let included_port = split(&config.outbound_ports_include)
        .first()
        .and_then(|p| surroundings::port(p, "tcp"));
    let candidates: Vec<IpAddr> = match include.as_str() {
        "*" => vec![documentation],
        _ => ranges(include)
            .into_iter()
            .map(|c| c.masked().addr)
            .collect(),
    };
    let excluded = ranges(&config.outbound_ip_ranges_exclude);
    let free = |a: &IpAddr| {
        a.is_ipv6() == v6
            && !a.is_loopback()
            && !a.is_unspecified()
            && !excluded.iter().any(|c| c.contains(*a))
    };
    let skipped: Vec<&str> = split(&config.outbound_ports_exclude);
    match (candidates.into_iter().find(|a| free(a)), included_port) {
        (Some(address), _) => (config.iptables_probe_port..=u16::MAX)
            .find(|p| !skipped.contains(&p.to_string().as_str()))
            .map(|port| SocketAddr::new(address, port)),
        (None, Some(port)) if free(&documentation) => Some(SocketAddr::new(documentation, port)),
        _ => None,
    }
}

/// A user and a group that are captured: not the proxy's, and among the groups asked for.
fn app(config: &Config) -> Option<(u32, u32)> {
    let ids = |list: &str| -> Vec<u32> {
        split(list)
            .into_iter()
            .filter_map(|g| surroundings::group_id(g)?.parse().ok())
            .collect()
    };
    let (uids, mut not) = (ids(&config.proxy_uid), ids(&config.proxy_gid));
    let uid = (1..=65534u32).rev().find(|id| !uids.contains(id))?;
    if config.owner_groups_include != "*" {
        let gid = ids(&config.owner_groups_include)
            .into_iter()
            .find(|g| !not.contains(g))?;
        return Some((uid, gid));
    }
    not.extend(ids(&config.owner_groups_exclude));
    Some((uid, (1..=65534u32).rev().find(|id| !not.contains(id))?))
}

enum Outcome {
    NotPossible(String),
    Failed(String),
}

/// Makes one call until it arrives or the time is over.
fn call(config: &Config, probe: &Probe) -> Result<(), Outcome> {
    let listener = match listen_at(probe) {
        Ok(listener) => listener,
        // The proxy runs already. Nobody else takes such a call: that it is taken shows where it went.
        Err(Errno::EADDRINUSE) => {
            let (probe, deadline) = (probe.clone(), Instant::now() + config.probe_timeout);
            let caller = thread::spawn(move || dial(&probe, deadline));
            let broke = |_| Err(Outcome::Failed("the caller broke".into()));
            return caller.join().unwrap_or_else(broke);
        }
        Err(e) => {
            let why = format!("port {} cannot be listened at: {e}", probe.port);
            return Err(Outcome::NotPossible(why));
        }
    };
    let deadline = Instant::now() + config.probe_timeout;
    // The socket's owner is what the rules look at: a thread of its own takes on the user's identity.
    let caller = {
        let probe = probe.clone();
        thread::spawn(move || dial(&probe, deadline))
    };
    let mut arrived = Err(Outcome::Failed("no connection came".into()));
    while arrived.is_err() && Instant::now() < deadline && !caller.is_finished() {
        arrived = accepted(&listener, probe.to).unwrap_or(arrived);
        if arrived.is_err() {
            thread::sleep(Duration::from_millis(5));
        }
    }
    if arrived.is_err() {
        // The caller may have been let in between the last look and its end.
        arrived = accepted(&listener, probe.to).unwrap_or(arrived);
    }
    drop(listener);
    let dialled = caller
        .join()
        .unwrap_or_else(|_| Err(Outcome::Failed("the caller broke".into())));
    match (arrived, dialled) {
        (Ok(()), _) => Ok(()),
        (Err(_), Err(why)) => Err(why),
        (Err(why), Ok(())) => Err(why),
    }
}

fn listen_at(probe: &Probe) -> Result<TcpListener, Errno> {
    let local: IpAddr = match probe.to {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let fd = tcp(probe.to)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::ReusePort, &true)?;
    bind(
        fd.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::new(local, probe.port)),
    )?;
    listen(&fd, Backlog::new(16).unwrap_or(Backlog::MAXCONN))?;
    let listener = TcpListener::from(fd);
    listener
        .set_nonblocking(true)
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
    Ok(listener)
}

/// What the next accepted connection says about where its caller wanted to go.
fn accepted(listener: &TcpListener, meant: SocketAddr) -> Option<Result<(), Outcome>> {
    let (stream, _) = listener.accept().ok()?;
    let original = match meant {
        SocketAddr::V4(_) => getsockopt(&stream, sockopt::OriginalDst).map(|a| {
            let ip = Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
            SocketAddr::new(ip.into(), u16::from_be(a.sin_port))
        }),
        SocketAddr::V6(_) => getsockopt(&stream, sockopt::Ip6tOriginalDst).map(|a| {
            let ip = Ipv6Addr::from(a.sin6_addr.s6_addr);
            SocketAddr::new(ip.into(), u16::from_be(a.sin6_port))
        }),
    };
    Some(match original {
        Ok(original) if original == meant => Ok(()),
        Ok(original) => Err(Outcome::Failed(format!(
            "it arrives, but its original destination reads {original}"
        ))),
        Err(e) => Err(Outcome::Failed(format!(
            "it arrives, but its original destination cannot be read: {e}"
        ))),
    })
}

fn dial(probe: &Probe, deadline: Instant) -> Result<(), Outcome> {
    if let Some((uid, gid)) = probe.owner
        && !act_as(uid, gid)
    {
        return Err(Outcome::NotPossible(format!(
            "acting as user {uid} and group {gid} is not allowed"
        )));
    }
    loop {
        match dial_once(probe) {
            Ok(()) => return Ok(()),
            Err(e @ (Errno::ENETUNREACH | Errno::EHOSTUNREACH)) if probe.from.is_none() => {
                return Err(Outcome::NotPossible(format!(
                    "no route to {}: {e}",
                    probe.to.ip()
                )));
            }
            Err(e) if Instant::now() + Duration::from_millis(100) >= deadline => {
                return Err(Outcome::Failed(e.desc().into()));
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn dial_once(probe: &Probe) -> Result<(), Errno> {
    let fd = tcp(probe.to)?;
    if let Some(from) = probe.from {
        bind(
            fd.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::new(from, 0)),
        )?;
    }
    // Bounds the connect as well.
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(1, 0))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(probe.to))
}

fn tcp(to: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// Takes on a user's identity for the sockets of this thread; false if that is not allowed.
fn act_as(uid: u32, gid: u32) -> bool {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setfsgid(gid);
    setfsuid(uid);
    // Asking for an impossible identity changes nothing and tells the present one.
    setfsgid(Gid::from_raw(u32::MAX)) == gid && setfsuid(Uid::from_raw(u32::MAX)) == uid
}
