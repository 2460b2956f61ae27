//! What outlives the run: links and maps, pinned in the BPF file system.
//!
//! `/sys/fs/bpf/outrigger/NETNS/SHAPE/` belongs to the network namespace with that inode number. A shape is a version of
//! the programs with the sizes of their maps: as long as it stays, a new policy is written into the maps that are there.
//! `complete` is pinned last, so that a run that was killed can be told from one that ended.

use std::{
    collections::HashSet,
    fs::{self, File},
    net::IpAddr,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData, SkStorage, SockHash, SockMap};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{
    cgroup,
    policy::{Lists, RULE, Record, mapped},
    programs::{self, PROGRAMS, Part, Shape},
    sys,
};
use crate::{Error, config::split};

/// The maps that all pods of a node share where bytes may go between their proxies.
pub(super) const SHARED: [&str; 3] = ["pairs", "neighbours", "states"];
/// All of them.
const MAPS: [&str; 11] = [
    "generation",
    "settings",
    "rules",
    "hits",
    "counters",
    "addresses",
    "neighbours",
    "states",
    "origins",
    "listeners",
    "pairs",
];

/// `struct tuple`: netns, local and remote address, their ports.
pub(super) type Tuple = [u8; 48];
/// Packets by rule, in the order of [`Lists`].
pub(super) type Hits = [[Vec<u64>; 2]; 2];
/// `struct settings`.
type SettingsBytes = [u8; 72];
/// `struct state`.
type StateBytes = [u8; 120];

/// What is decided and by which rules; see `struct settings`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) lists: Lists,
    /// The pod's address in each family, in the programs' form.
    pub(super) pod: [[u8; 16]; 2],
    pub(super) outbound_port: u16,
    pub(super) inbound_port: u16,
    pub(super) accelerate: bool,
    pub(super) accelerate_node: bool,
}

/// The folder of this machine, made if need be, and locked against other runs while the value lives.
pub(super) fn lock() -> Result<Flock<File>, Error> {
    let fail = |why: String| Error::Ebpf(format!("{BPFFS}: {why}"));
    if !is_mounted() {
        // In a mount namespace of its own (`ip netns exec`, a container) the mount would end with this run, and the
        // programs with it.
        if !mounts_stay() {
            return Err(fail(
                "no BPF file system is mounted in this mount namespace, and programs must be kept in one that stays: \
                 run this from the node (--network-namespace PATH), or mount the node's /sys/fs/bpf here"
                    .into(),
            ));
        }
        mount_here()?;
    }
    fs::create_dir_all(ROOT).map_err(|e| fail(e.to_string()))?;
    let folder = File::open(ROOT).map_err(|e| fail(e.to_string()))?;
    Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, e)| fail(e.to_string()))
}

fn is_mounted() -> bool {
    statfs(BPFFS).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_here() -> Result<(), Error> {
    let none: Option<&str> = None;
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none).map_err(|e| {
        Error::Ebpf(format!(
            "{BPFFS}: the BPF file system cannot be mounted: {e}"
        ))
    })
}

/// Mounts the BPF file system where it is missing, for a process whose mount namespace lasts as long as its pods.
pub(super) fn ensure_mounted() -> Result<(), Error> {
    if is_mounted() {
        return Ok(());
    }
    mount_here()
}

/// Whether any run has kept anything on this machine.
pub(super) fn used() -> bool {
    Path::new(ROOT).is_dir()
}

/// Whether all processes that led to this one are in its mount namespace, as far as they can be seen.
fn mounts_stay() -> bool {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let parent = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("PPid:"))?;
        line.trim().parse().ok().filter(|p| *p != 0)
    };
    let own = namespace(std::process::id());
    std::iter::successors(Some(std::process::id()), |pid| parent(*pid))
        .filter_map(namespace)
        .all(|found| Some(found) == own)
}

/// The network namespace of this thread.
pub(super) fn netns() -> Result<(File, u64), Error> {
    let path = "/proc/thread-self/ns/net";
    let fail = |why| Error::File {
        path: path.into(),
        why,
    };
    let file = File::open(path).map_err(fail)?;
    let inode = file.metadata().map_err(fail)?.ino();
    Ok((file, inode))
}

/// The folder of maps that pods share under a name.
pub(super) fn shared(name: &str) -> PathBuf {
    Path::new(SHARED_ROOT).join(name)
}

/// Makes that folder; what is in it are maps by name.
pub(super) fn make_shared(folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(|e| Error::Ebpf(format!("{}: {e}", folder.display())))
}

/// Removes the folders of shared maps that no pod uses any more.
fn sweep_shared() {
    let pods = children(Path::new(ROOT));
    for folder in children(Path::new(SHARED_ROOT)) {
        let name = format!(
            "-{}",
            folder.file_name().unwrap_or_default().to_string_lossy()
        );
        let sets = pods.iter().flat_map(|pod| children(pod));
        // A set's name ends with that of its maps, or has it before the programs that are not used.
        let used = |set: &PathBuf| set.to_string_lossy().contains(&format!("sockmap{name}"));
        if !sets
            .filter(|s| !s.starts_with(SHARED_ROOT))
            .any(|set| used(&set))
        {
            for map in children(&folder) {
                let _ = fs::remove_file(map);
            }
            let _ = fs::remove_dir(&folder);
        }
    }
    let _ = fs::remove_dir(SHARED_ROOT);
}

/// Programs and maps of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) folder: PathBuf,
}

/// Those of a network namespace, complete ones first.
pub(super) fn sets(netns: u64) -> Vec<Set> {
    let mut out: Vec<Set> = children(&Path::new(ROOT).join(netns.to_string()))
        .into_iter()
        .map(|folder| Set { folder })
        .collect();
    out.sort_by_key(|set| !set.complete());
    out
}

/// Removes what belongs to pods that are gone: the cgroup or the network namespace that links were attached to is no more.
pub(super) fn sweep() {
    let pods = children(Path::new(ROOT));
    let groups = if pods.is_empty() {
        None
    } else {
        cgroup::numbers()
    };
    for pod in pods {
        if pod.ends_with("shared") {
            continue;
        }
        for folder in children(&pod) {
            let set = Set { folder };
            if set.complete() && set.abandoned(groups.as_ref()) {
                set.erase();
            }
        }
        // Only where nothing is left in it.
        let _ = fs::remove_dir(&pod);
    }
    sweep_shared();
}

/// Whether what the link was attached to is no more, or the link was detached.
pub(super) fn gone(link: &OwnedFd) -> bool {
    sys::field(link, "cgroup_id") == Some(0) || sys::field(link, "netns_ino") == Some(0)
}

/// Whether anything is in the network namespace with that number: a thread, or a mount that keeps it.
fn netns_lives(inode: u64) -> bool {
    let name = format!("net:[{inode}]");
    let there = |task: &PathBuf| {
        fs::read_link(task.join("ns/net")).is_ok_and(|link| link.to_str() == Some(&name))
    };
    fs::read_to_string("/proc/self/mountinfo").is_ok_and(|mounts| mounts.contains(&name))
        || children(Path::new("/proc"))
            .iter()
            .any(|process| children(&process.join("task")).iter().any(there))
}

impl Set {
    /// Whether its pod is gone. One link that somebody has detached does not say so: the others of the cgroup stay, and
    /// the guard puts it back.
    ///
    /// A cgroup's links tell of its end, but only when its last socket is gone, and a connection that was never ended well
    /// keeps one for minutes: a cgroup whose folder is removed counts as gone, too.
    fn abandoned(&self, groups: Option<&HashSet<u64>>) -> bool {
        let links = self.links();
        let fields = |name| {
            let found = links.iter().filter_map(|(_, link)| sys::field(link, name));
            found.collect::<Vec<u64>>()
        };
        let (of, netns) = (fields("cgroup_id"), fields("netns_ino"));
        let removed = |id: &u64| *id != 0 && groups.is_some_and(|all| !all.contains(id));
        let ended = !of.is_empty() && of.iter().all(|id| *id == 0);
        let inode = self.folder.parent().and_then(Path::file_name);
        let inode = inode.and_then(|name| name.to_str()?.parse().ok());
        ended || of.iter().any(removed) || netns.contains(&0) && !inode.is_some_and(netns_lives)
    }

    /// The place of a set; nothing is made yet.
    pub(super) fn of(netns: u64, name: &str) -> Set {
        Set {
            folder: Path::new(ROOT).join(netns.to_string()).join(name),
        }
    }

    /// Whether the run that made it came to its end.
    pub(super) fn complete(&self) -> bool {
        self.folder.join(COMPLETE).exists()
    }

    /// Pins the maps.
    pub(super) fn keep_maps(&self, ebpf: &aya::Ebpf) -> Result<(), Error> {
        fs::create_dir_all(&self.folder).map_err(|e| self.fail(&e))?;
        for name in MAPS {
            let map = ebpf
                .map(name)
                .ok_or_else(|| self.fail(&format!("there is no map {name}")))?;
            map.pin(self.map_path(name))
                .map_err(|e| self.fail(&chain(&e)))?;
        }
        Ok(())
    }

    /// Pins a program's link.
    pub(super) fn keep_link(&self, name: &str, link: &OwnedFd) -> Result<(), Error> {
        sys::pin(link, &self.folder.join(name)).map_err(|e| self.fail(&e))
    }

    /// Marks it as whole.
    pub(super) fn seal(&self) -> Result<(), Error> {
        let map =
            MapData::from_pin(self.map_path("generation")).map_err(|e| self.fail(&chain(&e)))?;
        map.pin(self.folder.join(COMPLETE))
            .map_err(|e| self.fail(&chain(&e)))
    }

    /// Its maps, and its mark.
    pub(super) fn pinned_maps(&self) -> Vec<PathBuf> {
        let maps = MAPS.iter().map(|name| self.map_path(name));
        maps.chain([self.folder.join(COMPLETE)]).collect()
    }

    /// Its links by program.
    pub(super) fn links(&self) -> Vec<(&'static str, OwnedFd)> {
        PROGRAMS
            .iter()
            .filter_map(|p| Some((p.name, sys::open_pin(&self.folder.join(p.name)).ok()?)))
            .collect()
    }

    /// The parts that its programs do not do; without `dns` nothing is captured of DNS.
    pub(super) fn missing(&self, dns: bool) -> Vec<Part> {
        let links = self.links();
        let absent = PROGRAMS
            .iter()
            .filter(|p| (dns || !p.dns) && links.iter().all(|(name, _)| *name != p.name));
        absent.flat_map(|p| p.parts).copied().collect()
    }

    /// Whether every link is attached, and those for sockets to that group.
    pub(super) fn attached_to(&self, group: u64) -> bool {
        self.links()
            .iter()
            .all(|(_, link)| match sys::field(link, "cgroup_id") {
                Some(id) => id == group,
                None => !gone(link),
            })
    }

    /// Takes the programs away that make connections be captured.
    pub(super) fn close_entries(&self) {
        for (name, link) in self.links() {
            if PROGRAMS.iter().any(|p| p.name == name && p.entry) {
                // What is detached already is what is wanted.
                let _ = sys::detach(&link);
                let _ = fs::remove_file(self.folder.join(name));
            }
        }
    }

    /// Takes everything away.
    pub(super) fn erase(&self) {
        for (name, link) in self.links() {
            let _ = sys::detach(&link);
            let _ = fs::remove_file(self.folder.join(name));
        }
        for file in children(&self.folder) {
            let _ = fs::remove_file(file);
        }
        let _ = fs::remove_dir(&self.folder);
        if let Some(pod) = self.folder.parent() {
            let _ = fs::remove_dir(pod);
        }
    }

    /// Waits until every captured connection has reached the proxy, and the proxy has asked where it was meant to go;
    /// not for ever. How many have not.
    pub(super) fn wait(&self, end: Instant) -> Result<usize, Error> {
        let origins: HashMap<MapData, Tuple, [u8; 20]> = self.map("origins", Map::HashMap)?;
        let mut before = usize::MAX;
        loop {
            let left = origins.keys().filter(Result::is_ok).count();
            if left == 0 && before == 0 || Instant::now() >= end {
                return Ok(left);
            }
            before = left;
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Connections whose bytes go from socket to socket.
    pub(super) fn pairs(&self) -> Result<Vec<Tuple>, Error> {
        let pairs: SockHash<MapData, Tuple> = self.map("pairs", Map::SockHash)?;
        Ok(pairs.keys().filter_map(Result::ok).collect())
    }

    /// Rules that one generation may have.
    pub(super) fn capacity(&self) -> Result<u32, Error> {
        let rules: Array<MapData, [u8; RULE]> = self.map("rules", Map::Array)?;
        Ok(rules.len() / 2)
    }

    /// Puts a policy in force, from one packet to the next.
    pub(super) fn write(&self, policy: &Policy) -> Result<(), Error> {
        let mut generation: Array<MapData, u32> = self.map("generation", Map::Array)?;
        let mut settings: Array<MapData, SettingsBytes> = self.map("settings", Map::Array)?;
        let mut rules: Array<MapData, [u8; RULE]> = self.map("rules", Map::Array)?;
        let mut hits: Array<MapData, u64> = self.map("hits", Map::Array)?;
        let fail = |e: aya::maps::MapError| self.fail(&chain(&e));
        let next = 1 - generation.get(&0, 0).map_err(fail)?.min(1);
        let mut at = next * (rules.len() / 2);
        let (mut first, mut count) = (Vec::new(), Vec::new());
        for list in policy.lists.iter().flatten() {
            first.push(at);
            count.push(list.len() as u32);
            for record in list {
                rules.set(at, record.bytes(), 0).map_err(fail)?;
                hits.set(at, 0, 0).map_err(fail)?;
                at += 1;
            }
        }
        settings
            .set(next, policy.bytes(&first, &count), 0)
            .map_err(fail)?;
        generation.set(0, next, 0).map_err(fail)
    }

    /// The policy in force, with the packets that each rule met.
    pub(super) fn read(&self) -> Result<(Policy, Hits), Error> {
        let generation: Array<MapData, u32> = self.map("generation", Map::Array)?;
        let settings: Array<MapData, SettingsBytes> = self.map("settings", Map::Array)?;
        let rules: Array<MapData, [u8; RULE]> = self.map("rules", Map::Array)?;
        let hits: Array<MapData, u64> = self.map("hits", Map::Array)?;
        let fail = |e: aya::maps::MapError| self.fail(&chain(&e));
        let bytes = settings
            .get(&generation.get(&0, 0).map_err(fail)?, 0)
            .map_err(fail)?;
        let word =
            |n: usize| u32::from_ne_bytes(bytes[4 * n..4 * n + 4].try_into().expect("four bytes"));
        let mut lists = Lists::default();
        let mut met = Hits::default();
        for n in 0..4 {
            for at in word(n)..word(n).saturating_add(word(4 + n)).min(rules.len()) {
                lists[n / 2][n % 2].push(Record::read(&rules.get(&at, 0).map_err(fail)?));
                met[n / 2][n % 2].push(hits.get(&at, 0).map_err(fail)?);
            }
        }
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let address = |at: usize| bytes[at..at + 16].try_into().expect("sixteen bytes");
        let policy = Policy {
            lists,
            pod: [address(32), address(48)],
            outbound_port: half(64),
            inbound_port: half(66),
            accelerate: bytes[68] != 0,
            accelerate_node: bytes[69] != 0,
        };
        Ok((policy, met))
    }

    /// Counters beside those of the rules, in the order of `shared.h`.
    pub(super) fn counters(&self) -> Result<Vec<u64>, Error> {
        let counters: Array<MapData, u64> = self.map("counters", Map::Array)?;
        Ok(counters.iter().filter_map(Result::ok).collect())
    }

    /// Tells the programs which addresses are this pod's; those that were are forgotten.
    pub(super) fn set_addresses(&self, list: &[IpAddr], neighbours: bool) -> Result<(), Error> {
        let fail = |e: aya::maps::MapError| self.fail(&chain(&e));
        let mut own: HashMap<MapData, [u8; 16], u32> = self.map("addresses", Map::HashMap)?;
        let list: Vec<[u8; 16]> = list.iter().map(|a| mapped(*a)).collect();
        for address in &list {
            own.insert(address, 1, 0).map_err(fail)?;
        }
        let there: Vec<_> = own.keys().filter_map(Result::ok).collect();
        for address in there.iter().filter(|a| !list.contains(a)) {
            let _ = own.remove(address);
        }
        if neighbours {
            let mut all: HashMap<MapData, [u8; 16], u32> = self.map("neighbours", Map::HashMap)?;
            for address in &list {
                all.insert(address, 1, 0).map_err(fail)?;
            }
        }
        Ok(())
    }

    /// Takes this pod's addresses from what pods share; gives them.
    pub(super) fn leave_neighbours(&self) -> Result<Vec<[u8; 16]>, Error> {
        let own: HashMap<MapData, [u8; 16], u32> = self.map("addresses", Map::HashMap)?;
        let own: Vec<_> = own.keys().filter_map(Result::ok).collect();
        let mut all: HashMap<MapData, [u8; 16], u32> = self.map("neighbours", Map::HashMap)?;
        for address in &own {
            let _ = all.remove(address);
        }
        Ok(own)
    }

    /// Makes a socket that listens already known to the programs.
    pub(super) fn adopt(
        &self,
        socket: &OwnedFd,
        port: u16,
        inbound: bool,
        slot: u32,
    ) -> Result<(), Error> {
        let fail = |e: aya::maps::MapError| self.fail(&chain(&e));
        let mut states: SkStorage<MapData, StateBytes> = self.map("states", Map::SkStorage)?;
        let mut state = [0; 120];
        state[20..22].copy_from_slice(&port.to_ne_bytes());
        state[22] = LISTENER;
        states.insert(socket, state, 0).map_err(fail)?;
        if inbound {
            let mut listeners: SockMap<MapData> = self.map("listeners", Map::SockMap)?;
            listeners.set(slot, socket, 0).map_err(fail)?;
        }
        Ok(())
    }

    fn map<T>(&self, name: &str, kind: fn(MapData) -> Map) -> Result<T, Error>
    where
        T: TryFrom<Map, Error = aya::maps::MapError>,
    {
        let data = MapData::from_pin(self.map_path(name)).map_err(|e| self.fail(&chain(&e)))?;
        T::try_from(kind(data)).map_err(|e| self.fail(&chain(&e)))
    }

    pub(super) fn map_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("map_{name}"))
    }

    fn fail(&self, why: &dyn std::fmt::Display) -> Error {
        Error::Ebpf(format!("{}: {why}", self.folder.display()))
    }
}

impl Policy {
    fn bytes(&self, first: &[u32], count: &[u32]) -> SettingsBytes {
        let mut out = Vec::with_capacity(72);
        for n in first.iter().chain(count) {
            out.extend(n.to_ne_bytes());
        }
        out.extend(self.pod.concat());
        out.extend(self.outbound_port.to_ne_bytes());
        out.extend(self.inbound_port.to_ne_bytes());
        out.extend([self.accelerate.into(), self.accelerate_node.into(), 0, 0]);
        out.try_into()
            .expect("the fields add up to the size of the settings")
    }

    /// Whether DNS queries of the app are captured.
    pub(super) fn captures_dns(&self) -> bool {
        self.lists[0].iter().flatten().any(Record::redirects_udp)
    }

    /// Whether any bytes go from socket to socket.
    pub(super) fn accelerates(&self) -> bool {
        self.accelerate || self.accelerate_node
    }

    /// How many rules it has.
    pub(super) fn len(&self) -> u32 {
        self.lists.iter().flatten().map(|l| l.len() as u32).sum()
    }
}

/// The name of a set: the programs' text and what of the settings is fixed when they are loaded.
pub(super) fn name(shape: &Shape<'_>) -> String {
    // FNV-1a; it tells versions apart, no more.
    let hash = programs::OBJECT
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        });
    let shared = shape.shared.and_then(Path::file_name).unwrap_or_default();
    let without: Vec<String> = split(shape.without)
        .iter()
        .map(|w| format!("-{w}"))
        .collect();
    format!(
        "{hash:016x}-{}-{}{}-{}{}",
        shape.capacity,
        if shape.accelerate { "sockmap" } else { "plain" },
        if shape.dns { "-dns" } else { "" },
        shared.to_string_lossy(),
        without.concat()
    )
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.path()).collect()
}

/// An error with what caused it.
fn chain(e: &dyn std::error::Error) -> String {
    let mut out = e.to_string();
    let mut source = e.source();
    while let Some(inner) = source {
        let text = inner.to_string();
        if !out.contains(&text) {
            out = format!("{out}: {text}");
        }
        source = inner.source();
    }
    out
}

const BPFFS: &str = "/sys/fs/bpf";
const ROOT: &str = "/sys/fs/bpf/outrigger";
const SHARED_ROOT: &str = "/sys/fs/bpf/outrigger/shared";
const COMPLETE: &str = "complete";
const LISTENER: u8 = 3;
