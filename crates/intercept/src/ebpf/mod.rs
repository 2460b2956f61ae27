//! Mode EBPF: the capture without address translation and connection tracking.
//!
//! The rules are those that iptables would get; [`policy`] turns them into records that programs in the kernel walk
//! (`bpf/capture.bpf.c` tells how a connection goes). [`programs`] loads and attaches, [`store`] keeps links and maps in
//! the BPF file system, [`listeners`] finds a proxy that was there before, [`cut`] ends what cannot be handed back.
//!
//! A new policy for programs that are there is one write of a number. Everything else (first run, other programs, other
//! map sizes) is a whole new set beside the old one, which goes when the new one captures; going means: nothing new is
//! captured, what is under way reaches the proxy, then the rest is taken away.

mod cgroup;
mod cut;
mod listeners;
mod policy;
mod programs;
pub mod report;
mod store;
mod sys;
mod watch;

use std::{
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use nix::fcntl::Flock;

use self::{
    cgroup::Group,
    programs::{Known, Loaded, Missing, PROGRAMS, Part, SK_MSG_VERDICT, Shape},
    store::{Policy, Set},
};
use crate::{
    Error,
    apply::{self, Log},
    config::{Config, split},
    model::{Rule, Table},
    routes,
    surroundings::{self, Addresses},
};

pub(crate) use cgroup::Inside;
pub use cgroup::mount as cgroup_mount;
pub(crate) use watch::Watch;

/// Puts `rules` in force for this network namespace and the pod's cgroup, or removes ours if that is asked for.
pub fn apply(config: &Config, rules: &[Rule], log: Log<'_>) -> Result<(), Error> {
    if config.cleanup_only {
        remove(log)?;
        return match apply::apply(config, &[], log) {
            // Nothing that iptables could have left.
            Err(Error::Backend(_)) => routes::remove(config, &[]),
            outcome => outcome,
        };
    }
    let group = Group::find(&config.ebpf_cgroup)?;
    let sharing = Sharing::of(config);
    let addresses = own_addresses()?;
    let wanted = policy(config, rules, &sharing, &addresses)?;
    if config.dry_run {
        log(format!(
            "The programs would be attached to {} and walk these rules:\n{}",
            group.path.display(),
            report::rules(&wanted, None)
        ));
        return Ok(());
    }
    let locked = store::lock()?;
    store::sweep();
    let (netns, inode) = store::netns()?;
    let sets = store::sets(inode);
    let shared = sharing.name.as_deref().map(store::shared);
    let shape = Shape {
        capacity: wanted.len().next_power_of_two().max(64),
        accelerate: wanted.accelerates(),
        dns: wanted.captures_dns(),
        shared: shared.as_deref(),
        without: &config.ebpf_without,
    };
    let name = store::name(&shape);
    let current = sets
        .iter()
        .find(|s| s.complete() && s.attached_to(group.id))
        .filter(|s| s.capacity().is_ok() && lacking(s, config, &wanted).is_empty());
    let differences = match current {
        Some(set) => differences(set, &wanted)?,
        None => Vec::new(),
    };
    if !differences.is_empty() && !config.reconcile && !config.force_apply {
        return Err(Error::Conflict(format!(
            "eBPF programs with another policy are in place; nothing was changed. --reconcile replaces it, \
             --cleanup-only removes them:\n  {}",
            differences.join("\n  ")
        )));
    }
    for difference in &differences {
        log(format!("replacing: {difference}"));
    }
    if let Some(set) = current
        && set.folder.ends_with(&name)
    {
        let rest = left_to_iptables(rules, &set.missing(wanted.captures_dns()));
        check_iptables(config, &rest)?;
        set.set_addresses(&addresses.0, wanted.accelerate_node)?;
        match differences.is_empty() && !config.force_apply {
            true => log("The programs and their rules are already in place; nothing to do.".into()),
            false => {
                set.write(&wanted)?;
                log("The programs walk the new rules.".into());
            }
        }
        // What a run that was killed left beside it.
        sets.iter().filter(|s| *s != set).for_each(Set::erase);
        return by_iptables(config, &rest, log);
    }
    let loaded = programs::load(&shape, &parts(&wanted))?;
    let missing = fall_back(config, &loaded, log)?;
    let rest = left_to_iptables(rules, &missing);
    check_iptables(config, &rest)?;
    // A set of that name that is not whole or not attached is what a killed run left.
    let set = Set::of(inode, &name);
    set.erase();
    let made = attach(
        loaded, &set, &wanted, &addresses, &missing, &group, &netns, log,
    )
    .and_then(|()| by_iptables(config, &rest, log));
    if let Err(e) = made {
        set.erase();
        return Err(e);
    }
    for old in sets.iter().filter(|s| **s != set) {
        retire(old, log);
    }
    drop(locked);
    Ok(())
}

/// The rules of the parts that the programs do not do.
fn left_to_iptables(rules: &[Rule], missing: &[Part]) -> Vec<Rule> {
    let (out, inbound) = (
        missing.contains(&Part::Outbound),
        missing.contains(&Part::Inbound),
    );
    let left = rules.iter().filter(|r| match (r.table, r.chain) {
        (Table::Nat, "PREROUTING" | "ISTIO_INBOUND") => inbound,
        // Calls of the proxy to its own pod lead there as well.
        (Table::Nat, "ISTIO_IN_REDIRECT") => inbound || out,
        _ => out,
    });
    left.cloned().collect()
}

/// Refuses to capture beside rules of iptables that would capture as well.
fn check_iptables(config: &Config, rest: &[Rule]) -> Result<(), Error> {
    if config.reconcile {
        return Ok(());
    }
    let found = apply::foreign(config, rest);
    if found.is_empty() {
        return Ok(());
    }
    Err(Error::Conflict(format!(
        "ISTIO rules of iptables are in place and would capture as well; nothing was changed. --reconcile takes \
         them away:\n  {}",
        found.join("\n  ")
    )))
}

/// The programs capture by now: what iptables is left with is written, and what it led to the proxy before ends in its
/// own time.
fn by_iptables(config: &Config, rest: &[Rule], log: Log<'_>) -> Result<(), Error> {
    if !rest.is_empty() {
        return apply::apply(config, rest, log);
    }
    if config.reconcile {
        let config = Config {
            cleanup_only: true,
            ..config.clone()
        };
        match apply::apply(&config, &[], log) {
            Err(Error::Backend(_)) | Ok(()) => {}
            Err(e) => return Err(e),
        }
    }
    routes::add(config)
}

/// Takes the programs of this network namespace away; whether there were any.
pub fn remove(log: Log<'_>) -> Result<bool, Error> {
    let (_, inode) = store::netns()?;
    let sets = store::sets(inode);
    if sets.is_empty() {
        return Ok(false);
    }
    let _locked: Flock<_> = store::lock()?;
    for set in &sets {
        retire(set, log);
    }
    store::sweep();
    Ok(true)
}

/// Whether any programs were ever kept on this machine.
pub fn used() -> bool {
    store::used()
}

/// Mounts the BPF file system in this mount namespace where it is missing. For who keeps the namespace for as long as the
/// pods live: elsewhere what is kept there would be lost with it.
///
/// # Errors
/// The system's word, where it does not let us.
pub fn mount() -> Result<(), Error> {
    store::ensure_mounted()
}

/// Removes what belongs to pods that are gone, if anything was ever kept here.
pub fn sweep() {
    if store::used()
        && let Ok(_locked) = store::lock()
    {
        store::sweep();
    }
}

/// Whether the programs were built: clang was there then.
pub fn built() -> bool {
    !programs::OBJECT.is_empty()
}

/// Whether programs of ours are attached to this network namespace.
pub fn present() -> bool {
    store::netns().is_ok_and(|(_, inode)| store::sets(inode).iter().any(Set::complete))
}

/// How what is there differs from `rules`, a sentence each.
pub fn verify(config: &Config, rules: &[Rule]) -> Result<Vec<String>, Error> {
    let group = Group::find(&config.ebpf_cgroup)?;
    let wanted = policy(config, rules, &Sharing::of(config), &own_addresses()?)?;
    let (_, inode) = store::netns()?;
    let sets = store::sets(inode);
    let Some(set) = sets.iter().find(|s| s.complete()) else {
        return Ok(vec!["no eBPF programs capture here".into()]);
    };
    let mut out = differences(set, &wanted)?;
    for known in lacking(set, config, &wanted) {
        out.push(format!(
            "the program {}, which {}, is gone",
            known.name, known.what
        ));
    }
    if !set.attached_to(group.id) {
        out.push(format!(
            "the programs are not all attached to {}",
            group.path.display()
        ));
    }
    Ok(out)
}

/// Programs that the set should have and does not: somebody took them away. Where programs may be left to iptables
/// nobody knows which were meant to be there.
fn lacking(set: &Set, config: &Config, wanted: &Policy) -> Vec<&'static Known> {
    if config.ebpf_fallback {
        return Vec::new();
    }
    let without = split(&config.ebpf_without);
    let parts: Vec<Part> = parts(wanted)
        .into_iter()
        .filter(|part| {
            let mut unused = PROGRAMS.iter().filter(|p| without.contains(&p.name));
            unused.all(|p| !p.parts.contains(part))
        })
        .collect();
    let links = set.links();
    let dns = wanted.captures_dns();
    let needed = PROGRAMS
        .iter()
        .filter(|p| p.hook != SK_MSG_VERDICT && p.is_needed(&parts, dns));
    needed
        .filter(|p| links.iter().all(|(name, _)| *name != p.name))
        .collect()
}

/// Which connections may go from socket to socket (`--ebpf-sockmap`).
struct Sharing {
    /// Between app and proxy.
    accelerate: bool,
    /// The name under which proxies of this node share their sockets.
    name: Option<String>,
}

impl Sharing {
    fn of(config: &Config) -> Sharing {
        let (what, name) = config
            .ebpf_sockmap
            .split_once('=')
            .unwrap_or((&config.ebpf_sockmap, "default"));
        Sharing {
            accelerate: matches!(what, "pod" | "node"),
            name: matches!(what, "proxies" | "node").then(|| name.into()),
        }
    }
}

/// The pod's addresses without ::6, which stands on `lo` after the first run for the proxy alone.
fn own_addresses() -> Result<Addresses, Error> {
    let mut addresses = Addresses::of_this_pod()?;
    addresses.0.retain(|a| *a != PASSTHROUGH_V6);
    Ok(addresses)
}

fn policy(
    config: &Config,
    rules: &[Rule],
    sharing: &Sharing,
    addresses: &Addresses,
) -> Result<Policy, Error> {
    let port = |flag: &str, text: &str| {
        surroundings::port(text, "tcp").ok_or_else(|| {
            Error::Invalid(format!(
                "invalid value {text:?} for {flag}: a port is needed"
            ))
        })
    };
    let pod = |v6| {
        addresses
            .of_family(v6)
            .map(policy::mapped)
            .unwrap_or_default()
    };
    Ok(Policy {
        lists: policy::compile(rules)?,
        pod: [pod(false), pod(true)],
        outbound_port: port("--envoy-port", &config.proxy_port)?,
        inbound_port: port("--inbound-capture-port", &config.inbound_capture_port)?,
        accelerate: sharing.accelerate,
        accelerate_node: sharing.name.is_some(),
    })
}

fn parts(policy: &Policy) -> Vec<Part> {
    let mut out = vec![Part::Outbound, Part::Inbound];
    if policy.accelerates() {
        out.push(Part::Accelerate);
    }
    out
}

/// The parts that are left to iptables, if that is allowed.
fn fall_back(config: &Config, loaded: &Loaded, log: Log<'_>) -> Result<Vec<Part>, Error> {
    let mut out = Vec::new();
    for Missing { part, why, allowed } in &loaded.missing {
        if !config.ebpf_fallback && !allowed {
            return Err(Error::Ebpf(format!(
                "{why}. --ebpf-fallback leaves what needs it to iptables"
            )));
        }
        if out.contains(part) {
            continue;
        }
        let instead = match part {
            Part::Outbound => "outbound calls are left to iptables",
            Part::Inbound => "inbound calls are left to iptables",
            Part::Accelerate => "bytes go through the TCP stack",
        };
        log(format!("warning: {why}; {instead}"));
        out.push(*part);
    }
    Ok(out)
}

#[allow(clippy::too_many_arguments)]
fn attach(
    mut loaded: Loaded,
    set: &Set,
    policy: &Policy,
    addresses: &Addresses,
    without: &[Part],
    group: &Group,
    netns: &std::fs::File,
    log: Log<'_>,
) -> Result<(), Error> {
    set.keep_maps(&loaded.ebpf)?;
    set.set_addresses(&addresses.0, policy.accelerate_node)?;
    set.write(policy)?;
    let wanted: Vec<Part> = parts(policy)
        .into_iter()
        .filter(|p| !without.contains(p))
        .collect();
    let mut links = Vec::new();
    for known in programs::PROGRAMS {
        if known.is_needed(&wanted, policy.captures_dns())
            && let Some(link) = programs::attach(&mut loaded.ebpf, known, group, netns)?
        {
            set.keep_link(known.name, &link)?;
            links.push(known.name);
        }
        if known.name == "follow" {
            adopt(set, policy, log)?;
        }
    }
    set.seal()?;
    log(format!(
        "Attached to {} and to the network namespace: {}",
        group.path.display(),
        links.join(", ")
    ));
    log(format!(
        "The programs walk these rules:\n{}",
        report::rules(policy, None)
    ));
    Ok(())
}

/// A proxy that listened before is made known before anything is led to it.
fn adopt(set: &Set, policy: &Policy, log: Log<'_>) -> Result<(), Error> {
    let found = listeners::find([policy.outbound_port, policy.inbound_port]);
    let mut slot = 0;
    for (socket, port) in &found {
        let inbound = *port == policy.inbound_port;
        set.adopt(socket, *port, inbound, slot)?;
        slot += u32::from(inbound);
    }
    if !found.is_empty() {
        log(format!(
            "{} sockets of the proxy were listening already",
            found.len()
        ));
    }
    Ok(())
}

/// Takes a set away without cutting what is under way.
fn retire(set: &Set, log: Log<'_>) {
    set.close_entries();
    let end = Instant::now() + DRAIN;
    let policy = set.read().map(|(policy, _)| policy);
    let accelerated = policy.as_ref().is_ok_and(Policy::accelerates);
    if let Ok(left) = set.wait(end)
        && left > 0
    {
        log(format!(
            "warning: {left} captured connections have not reached the proxy and lose their destination"
        ));
    }
    if accelerated && let Err(e) = end_pairs(set, policy.is_ok_and(|p| p.accelerate_node), end, log)
    {
        log(format!("warning: {e}"));
    }
    set.erase();
}

/// Waits for connections whose bytes go from socket to socket, and ends those that stay.
fn end_pairs(set: &Set, shared: bool, end: Instant, log: Log<'_>) -> Result<(), Error> {
    let own = match shared {
        true => set.leave_neighbours()?,
        false => Vec::new(),
    };
    loop {
        let mut left = set.pairs()?;
        // A map that pods share has the others' as well.
        left.retain(|t| !shared || own.iter().any(|a| t[8..24] == a[..] || t[24..40] == a[..]));
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            log(format!(
                "warning: {} accelerated connections are still open and are cut",
                left.len()
            ));
            return cut::destroy(&left);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn differences(set: &Set, wanted: &Policy) -> Result<Vec<String>, Error> {
    Ok(report::differences(&set.read()?.0, wanted))
}

const PASSTHROUGH_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));
/// How long connections that are under way are waited for.
const DRAIN: Duration = Duration::from_secs(5);
