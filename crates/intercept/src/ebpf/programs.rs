//! Loading and attaching: which programs there are, what each is for, and what it means when the kernel refuses one.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, SockHash},
    programs::{Program, ProgramError},
};

use super::{
    cgroup::Group,
    store::{self, Tuple},
    sys,
};
use crate::{Error, config::split};

/// A part of the capture that can be done by programs or by iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// What the pod calls, and its DNS.
    Outbound,
    /// What calls the pod.
    Inbound,
    /// Bytes from socket to socket.
    Accelerate,
}

/// A program of the object.
#[derive(Debug)]
pub(super) struct Known {
    /// Its name, and that of its pinned link.
    pub(super) name: &'static str,
    /// The parts that do not work without it.
    pub(super) parts: &'static [Part],
    /// What it does, and since which Linux the kernel can.
    pub(super) what: &'static str,
    /// Where it is attached: `enum bpf_attach_type`.
    pub(super) hook: u32,
    /// Whether it makes new connections be captured; such are attached last and detached first.
    pub(super) entry: bool,
    /// Whether it is there for DNS alone: it is not loaded where none is captured.
    pub(super) dns: bool,
}

impl Known {
    /// Whether a policy of these parts, with DNS or without, needs it.
    pub(super) fn is_needed(&self, parts: &[Part], dns: bool) -> bool {
        self.parts.iter().any(|part| parts.contains(part)) && (dns || !self.dns)
    }

    const fn for_dns(mut self) -> Known {
        self.dns = true;
        self
    }
}

const fn known(
    name: &'static str,
    parts: &'static [Part],
    hook: u32,
    entry: bool,
    what: &'static str,
) -> Known {
    Known {
        name,
        parts,
        what,
        hook,
        entry,
        dns: false,
    }
}

use Part::{Accelerate, Inbound, Outbound};

/// In the order in which they are attached: a run that is killed in the middle leaves nothing that captures without
/// being able to tell the proxy where to.
pub(super) const PROGRAMS: &[Known] = &[
    known(
        "tell",
        &[Outbound, Inbound],
        21,
        false,
        "answers SO_ORIGINAL_DST (cgroup/getsockopt, Linux 5.3)",
    ),
    known(
        "follow",
        &[Outbound, Inbound, Accelerate],
        3,
        false,
        "follows connections (sockops with netns cookie, Linux 5.15)",
    ),
    known(
        "getpeername4",
        &[Outbound],
        29,
        false,
        "shows the app whom it called (cgroup/getpeername4, Linux 5.8)",
    ),
    known(
        "getpeername6",
        &[Outbound],
        30,
        false,
        "shows the app whom it called by IPv6",
    ),
    known(
        "recvmsg4",
        &[Outbound],
        19,
        false,
        "shows the app which server answered (cgroup/recvmsg4, Linux 5.2)",
    )
    .for_dns(),
    known(
        "recvmsg6",
        &[Outbound],
        20,
        false,
        "shows the app which server answered by IPv6",
    )
    .for_dns(),
    known(
        "pass_on",
        &[Accelerate],
        SK_MSG_VERDICT,
        false,
        "passes bytes from socket to socket (sk_msg with socket storage, Linux 5.8)",
    ),
    known(
        "steer",
        &[Inbound],
        SK_LOOKUP,
        true,
        "leads inbound calls to the proxy (sk_lookup, Linux 5.17 for bpf_loop)",
    ),
    known(
        "sendmsg4",
        &[Outbound],
        14,
        true,
        "leads DNS queries to the agent (cgroup/sendmsg4, Linux 5.17 for bpf_loop)",
    )
    .for_dns(),
    known(
        "sendmsg6",
        &[Outbound],
        15,
        true,
        "leads DNS queries to the agent by IPv6",
    )
    .for_dns(),
    known(
        "connect4",
        &[Outbound],
        10,
        true,
        "leads outbound calls to the proxy (cgroup/connect4, Linux 5.17 for bpf_loop)",
    ),
    known(
        "connect6",
        &[Outbound],
        11,
        true,
        "leads outbound calls of IPv6 sockets to the proxy",
    ),
];

/// The one hook that is a map's and has no link.
pub(super) const SK_MSG_VERDICT: u32 = 7;
const SK_LOOKUP: u32 = 36;

/// Sizes and places of maps.
pub(super) struct Shape<'a> {
    /// Rules of one generation.
    pub(super) capacity: u32,
    /// Bytes go from socket to socket.
    pub(super) accelerate: bool,
    /// DNS queries are captured.
    pub(super) dns: bool,
    /// Where the maps are that all pods of the node share.
    pub(super) shared: Option<&'a Path>,
    /// Programs that are not used.
    pub(super) without: &'a str,
}

/// The programs, verified by the kernel, with their maps; nothing is attached yet.
pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    /// Parts that cannot be had here.
    pub(super) missing: Vec<Missing>,
}

/// A part that cannot be done by programs.
pub(super) struct Missing {
    pub(super) part: Part,
    /// Which program is missing, and what the kernel said.
    pub(super) why: String,
    /// Whether it is the operator's wish.
    pub(super) allowed: bool,
}

/// Loads every program that `parts` need, but for those that are not to be used.
pub(super) fn load(shape: &Shape<'_>, parts: &[Part]) -> Result<Loaded, Error> {
    let without = split(shape.without);
    if let Some(name) = without
        .iter()
        .find(|w| PROGRAMS.iter().all(|p| p.name != **w))
    {
        let names: Vec<&str> = PROGRAMS.iter().map(|p| p.name).collect();
        return Err(Error::Invalid(format!(
            "invalid value {name:?} for --ebpf-without: the programs are {}",
            names.join(", ")
        )));
    }
    if OBJECT.is_empty() {
        return Err(Error::Ebpf(
            "this program was built without the eBPF programs, because clang was not there: build it with clang \
             (apt-get install clang), or use REDIRECT or TPROXY"
                .into(),
        ));
    }
    let pairs = if shape.accelerate { 16_384 } else { 1 };
    let neighbours = if shape.shared.is_some() { 4_096 } else { 1 };
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries("rules", 2 * shape.capacity)
        .map_max_entries("hits", 2 * shape.capacity)
        .map_max_entries("pairs", pairs)
        .map_max_entries("neighbours", neighbours);
    if let Some(shared) = shape.shared {
        store::make_shared(shared)?;
        for name in store::SHARED {
            loader.map_pin_path(name, shared.join(name));
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(|e| Error::Ebpf(refusal(e)))?;
    let mut refused = load_all(&mut ebpf, |known| {
        known.is_needed(parts, shape.dns) && !without.contains(&known.name)
    });
    let mut missing = Vec::new();
    for known in PROGRAMS {
        if !known.is_needed(parts, shape.dns) {
            continue;
        }
        let (why, allowed) = if without.contains(&known.name) {
            let why = format!("--ebpf-without names {}, which {}", known.name, known.what);
            (why, true)
        } else if let Some(e) = refused.remove(known.name) {
            let why = format!(
                "this kernel does not take the program {}, which {}: {}",
                known.name,
                known.what,
                reason(&e)
            );
            (why, false)
        } else {
            continue;
        };
        missing.extend(known.parts.iter().map(|part| Missing {
            part: *part,
            why: why.clone(),
            allowed,
        }));
    }
    Ok(Loaded { ebpf, missing })
}

/// Loads those programs of the object that are `wanted`, each on a thread of its own: the kernel verifies a program in some
/// milliseconds of CPU, and a pod waits for all of them. Returns what the kernel did not take.
fn load_all(
    ebpf: &mut Ebpf,
    wanted: impl Fn(&Known) -> bool,
) -> HashMap<&'static str, ProgramError> {
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    let mut taken = |known: &'static Known| (known.name, programs.remove(known.name));
    std::thread::scope(|scope| {
        let loads: Vec<_> = PROGRAMS
            .iter()
            .filter(|known| wanted(known))
            .map(&mut taken)
            .map(|(name, program)| {
                let load = move || program.map_or(Err(ProgramError::NotLoaded), load_one);
                (name, scope.spawn(load))
            })
            .collect();
        let ended = loads.into_iter().filter_map(|(name, load)| {
            let done = load.join().unwrap_or(Err(ProgramError::NotLoaded));
            Some((name, done.err()?))
        });
        ended.collect()
    })
}

fn load_one(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(p) => p.load(),
        Program::CgroupSockopt(p) => p.load(),
        Program::SockOps(p) => p.load(),
        Program::SkMsg(p) => p.load(),
        Program::SkLookup(p) => p.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)
}

/// Attaches one loaded program; the link, or nothing where it belongs to a map and lives as long as that.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    known: &Known,
    group: &Group,
    netns: &File,
) -> Result<Option<OwnedFd>, Error> {
    let fail = |e: &dyn std::fmt::Display, to: &dyn std::fmt::Display| {
        Error::Ebpf(format!(
            "the program {} cannot be attached to {to}: {e}",
            known.name
        ))
    };
    if known.hook == SK_MSG_VERDICT {
        let map = ebpf
            .map("pairs")
            .ok_or_else(|| fail(&"there is no map of that name", &"pairs"))?;
        let pairs: SockHash<&MapData, Tuple> =
            SockHash::try_from(map).map_err(|e| fail(&e, &"pairs"))?;
        let fd = pairs.fd().try_clone().map_err(|e| fail(&e, &"pairs"))?;
        if let Ok(Program::SkMsg(p)) = program(ebpf, known.name) {
            let id = p.attach(&fd).map_err(|e| fail(&e, &"pairs"))?;
            let link = p.take_link(id).map_err(|e| fail(&e, &"pairs"))?;
            // The map keeps it: dropping the link would take it away again.
            std::mem::forget(link);
        }
        return Ok(None);
    }
    let program = program(ebpf, known.name).map_err(|e| fail(&e, &"anything"))?;
    let fd = program.fd().map_err(|e| fail(&e, &"anything"))?;
    let link = match known.hook {
        SK_LOOKUP => sys::link(fd.as_fd(), netns.as_fd(), known.hook)
            .map_err(|e| fail(&e, &"the network namespace")),
        _ => File::open(&group.path)
            .and_then(|folder| sys::link(fd.as_fd(), folder.as_fd(), known.hook))
            .map_err(|e| fail(&e, &group.path.display())),
    };
    link.map(Some)
}

/// What a refused object means.
fn refusal(e: EbpfError) -> String {
    let mut out = format!("the eBPF programs cannot be loaded: {e}");
    let mut source = std::error::Error::source(&e);
    while let Some(inner) = source {
        let text = inner.to_string();
        if !out.ends_with(&text) {
            out = format!("{out}: {text}");
        }
        source = inner.source();
    }
    out.push_str(" (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are needed, and a kernel with BTF)");
    out
}

/// The kernel's error and the last word of its verifier.
fn reason(e: &ProgramError) -> String {
    match e {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            let last = log
                .lines()
                .rev()
                .find(|l| !l.trim().is_empty() && !l.starts_with("processed "));
            match last {
                Some(line) => format!("{io_error} ({})", line.trim()),
                None => io_error.to_string(),
            }
        }
        e => e.to_string(),
    }
}

/// What clang made of `bpf/capture.bpf.c`, or nothing where there was no clang. The loader wants it aligned.
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture.bpf.o"));
