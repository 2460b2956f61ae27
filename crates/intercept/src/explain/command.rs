//! `outrigger intercept explain`: the command line of the walk.

use std::{
    fs,
    io::Read,
    net::{IpAddr, SocketAddr},
};

use super::{Packet, Ruleset, State, native, walk};
use crate::{
    Error,
    backend::Backend,
    config::Config,
    flags::{self, Flag, Kind, Values},
    nft, program, surroundings,
    surroundings::Addresses,
};

/// Usage of the command.
pub const USAGE: &str = "\
Usage: outrigger intercept explain --from ADDR[:PORT] --to IP:PORT [flags] [-- istio-iptables flags]

Walks the first packet of a connection through the rules and prints each rule it meets, whether that matches and why
not, and where the packet ends. The rules are those of --rules, or those that the istio-iptables flags after -- would
write, or, without either, those of this network namespace.
";

/// Reads the command line and gives the story.
pub fn run(args: &[String]) -> Result<String, Error> {
    let split = args.iter().position(|a| a == "--");
    let (own, program) = args.split_at(split.unwrap_or(args.len()));
    let values = flags::parse(FLAGS, own)?;
    if values.get("help").is_some_and(|v| v == "true") {
        return Ok(help());
    }
    let mut packet = packet(&values)?;
    let rules = match (values.get("rules"), split) {
        (Some(_), Some(_)) => {
            return Err(Error::Usage(
                "--rules and istio-iptables flags after -- exclude each other".into(),
            ));
        }
        (Some(file), None) => Ruleset::parse(&read(file)?)?,
        (None, Some(_)) => of_flags(&program[1..], &packet)?,
        (None, None) => {
            packet.own = Addresses::of_this_pod()?.0;
            of_kernel(&packet)?
        }
    };
    if !values.contains_key("out-interface") && packet.input.is_none() {
        packet.output = Some(route(&packet).into());
    }
    Ok(walk(&rules, &packet).text)
}

/// Where the kernel sends what has no other route: what goes to the machine itself stays on `lo`.
fn route(packet: &Packet) -> &'static str {
    if packet.is_own(packet.to) || packet.to == packet.from {
        "lo"
    } else {
        "eth0"
    }
}

fn packet(values: &Values) -> Result<Packet, Error> {
    let needed = |flag: &str| {
        values
            .get(flag)
            .ok_or_else(|| Error::Usage(format!("--{flag} is needed; see --help")))
    };
    let bad = |flag: &str, value: &str, what: &str| {
        Error::Usage(format!("invalid argument {value:?} for --{flag}: {what}"))
    };
    let to = needed("to")?;
    let to: SocketAddr = to
        .parse()
        .map_err(|_| bad("to", to, "IP:PORT or [IP]:PORT is expected"))?;
    let text = needed("from")?;
    let (from, from_port): (IpAddr, _) = match (text.parse::<SocketAddr>(), text.parse()) {
        (Ok(address), _) => (address.ip(), Some(address.port())),
        (_, Ok(ip)) => (ip, None),
        _ => return Err(bad("from", text, "an address, with or without port")),
    };
    if from.is_ipv4() != to.is_ipv4() {
        return Err(bad("from", text, "not of the same family as --to"));
    }
    let id = |flag: &str, named: fn(&str) -> Option<String>| match values.get(flag) {
        None => Ok(None),
        Some(text) => match text.parse().ok().or_else(|| named(text)?.parse().ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(bad(flag, text, "a number or a name of this machine")),
        },
    };
    let uid = id("uid", surroundings::user_id)?;
    let gid = id("gid", surroundings::group_id)?;
    let input = values.get("in-interface").cloned();
    if input.is_some() && (uid.is_some() || gid.is_some() || values.contains_key("out-interface")) {
        return Err(Error::Usage(
            "a packet with --in-interface comes from elsewhere: it has no --uid, --gid or --out-interface".into(),
        ));
    }
    let number = |flag: &str| match values.get(flag) {
        None => Ok(0),
        Some(text) => match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        }
        .map_err(|_| bad(flag, text, "a number is expected")),
    };
    let state = match values.get("ctstate").map(String::as_str) {
        None | Some("NEW") => State::New,
        Some("ESTABLISHED") => State::Established,
        Some("INVALID") => State::Invalid,
        Some(other) => return Err(bad("ctstate", other, "NEW, ESTABLISHED or INVALID")),
    };
    let own = match values.get("pod-ip") {
        None => Vec::new(),
        Some(list) => crate::config::split(list)
            .into_iter()
            .map(|ip| ip.parse().map_err(|_| bad("pod-ip", ip, "an address")))
            .collect::<Result<_, _>>()?,
    };
    Ok(Packet {
        protocol: values
            .get("proto")
            .map_or("tcp".into(), |p| p.to_lowercase()),
        from,
        from_port,
        to: to.ip(),
        to_port: to.port(),
        output: match input {
            Some(_) => None,
            None => Some(values.get("out-interface").cloned().unwrap_or_default()),
        },
        input,
        uid,
        // As with a process that was started plainly: its group has its user's number.
        gid: gid.or(uid),
        mark: number("mark")?,
        connection_mark: number("connmark")?,
        state,
        own,
    })
}

fn read(file: &str) -> Result<String, Error> {
    let fail = |why| Error::File {
        path: file.into(),
        why,
    };
    if file == "-" {
        let mut text = String::new();
        let input = std::io::stdin().lock();
        input
            .take(MAX_RULES)
            .read_to_string(&mut text)
            .map_err(fail)?;
        return Ok(text);
    }
    let mut text = String::new();
    let input = fs::File::open(file).map_err(fail)?;
    input
        .take(MAX_RULES)
        .read_to_string(&mut text)
        .map_err(fail)?;
    Ok(text)
}

/// The rules that istio-iptables would write with those flags in a pod of the packet's families.
fn of_flags(args: &[String], packet: &Packet) -> Result<Ruleset, Error> {
    let mut config = Config::from_args(args, &|name| std::env::var(name).ok())?;
    config.enable_inbound_ipv6 = packet.to.is_ipv6();
    if config.redirect_dns && !config.capture_all_dns {
        let servers = surroundings::resolvers("/etc/resolv.conf")?;
        (config.dns_servers_v4, config.dns_servers_v6) =
            servers.into_iter().partition(IpAddr::is_ipv4);
    }
    config.validate()?;
    Ok(Ruleset::ours(&program::rules(&config)?, packet.family()))
}

fn of_kernel(packet: &Packet) -> Result<Ruleset, Error> {
    let mut sets = Vec::new();
    let mut reasons = Vec::new();
    for suffix in ["nft", "legacy"] {
        match Backend::saved(packet.family(), suffix) {
            Ok(text) => sets.push(Ruleset::parse(&text)?),
            Err(e) => reasons.push(e.to_string()),
        }
    }
    if sets.is_empty() {
        return Err(Error::Backend(format!(
            "the rules of this network namespace cannot be read: {}",
            reasons.join("; ")
        )));
    }
    let mut full = sets.into_iter().filter(|s| !s.is_empty());
    match (full.next(), full.next()) {
        (Some(_), Some(_)) => Err(Error::Conflict(
            "both iptables-nft and iptables-legacy hold rules here, and the kernel asks both: clean one of them \
             up, or give the output of one to --rules"
                .into(),
        )),
        (Some(set), None) => Ok(set),
        (None, _) => match nft::listing()? {
            Some(listing) => Ruleset::parse(&native::save(&listing, packet.family())?),
            None => Ok(Ruleset::default()),
        },
    }
}

fn help() -> String {
    let mut out = format!("{USAGE}\nFlags:\n");
    for flag in FLAGS {
        out.push_str(&format!("  --{:<16}{}\n", flag.long, flag.help));
    }
    out
}

const fn text(long: &'static str, help: &'static str) -> Flag {
    Flag {
        long,
        short: None,
        kind: Kind::Text,
        help,
    }
}

/// More than any pod's rules, and little enough to be held.
const MAX_RULES: u64 = 64 << 20;

const FLAGS: &[Flag] = &[
    text("from", "source address, with or without port"),
    text("to", "destination address and port"),
    text(
        "uid",
        "user of the sending socket, for a packet made in the pod",
    ),
    text("gid", "group of the sending socket (the number of --uid)"),
    text(
        "in-interface",
        "interface by which the packet comes in; without it the packet is made in the pod",
    ),
    text(
        "out-interface",
        "interface by which it leaves (lo to the pod itself, else eth0)",
    ),
    text("proto", "tcp, udp, icmp ... (tcp)"),
    text("mark", "firewall mark of the packet (0)"),
    text("connmark", "mark of its connection (0)"),
    text("ctstate", "NEW, ESTABLISHED or INVALID (NEW)"),
    text(
        "pod-ip",
        "the pod's addresses, comma-separated, where the rules are not this namespace's",
    ),
    text(
        "rules",
        "a file with the output of iptables-save or ip6tables-save; - is standard input",
    ),
    Flag {
        long: "help",
        short: Some('h'),
        kind: Kind::Switch,
        help: "print this",
    },
];
