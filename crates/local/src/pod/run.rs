//! The process that becomes a container: `outrigger local run SPEC`.
//!
//! It starts as a fresh, single-threaded program of root's, enters the pod's namespaces, makes a mount namespace of its
//! own with the container's volumes, gives up its rights and turns into the container's program. Its process id is the
//! container's from the first moment. `exec` comes this way too, into the mounts of a running container.

use std::{
    ffi::CString,
    fs,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::signal::Signal,
    unistd::{Gid, Uid, execve, setgid, setgroups, setuid},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    thread::{CapabilitySet, CapabilitySets},
};
use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Result};

/// Everything about one container's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunSpec {
    /// The process that holds the pod's namespaces.
    pub(crate) holder: i32,
    /// The pod's cgroup, where this machine has cgroup2.
    pub(crate) cgroup: Option<PathBuf>,
    /// Only the pod's network is entered, and root's rights are kept: what writes eBPF programs works from the node.
    pub(crate) on_node: bool,
    /// For `exec`: a process of the container, whose mounts are entered instead of making new ones.
    pub(crate) join_mounts: Option<i32>,
    /// Whether the process dies with its parent: containers do, what a user runs by `exec` does by itself.
    pub(crate) dies_with_parent: bool,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) read_only_root: bool,
    /// Program and arguments; the program is looked up in `PATH` of `env`.
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) directory: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// Kubernetes' names (`NET_ADMIN`) of the capabilities that root keeps.
    pub(crate) capabilities: Vec<String>,
    pub(crate) no_new_privileges: bool,
}

/// A volume of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// A file or folder of this machine.
    pub(crate) source: PathBuf,
    /// The path in the container.
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

/// Reads the specification and becomes the container. Returns only where that fails.
pub(crate) fn run(spec: &Path) -> Result<()> {
    let text = fs::read(spec).doing(|| format!("read {}", spec.display()))?;
    let spec: RunSpec = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .doing(|| "read the container's specification".to_owned())?;
    become_container(&spec)
}

/// Becomes the container. Must be called while this program has a single thread.
pub(crate) fn become_container(spec: &RunSpec) -> Result<()> {
    let parent = nix::unistd::getppid();
    if let Some(cgroup) = &spec.cgroup {
        let procs = cgroup.join("cgroup.procs");
        fs::write(&procs, "0").doing(|| format!("enter {}", procs.display()))?;
    }
    if spec.on_node {
        enter(spec.holder, &["net"])?;
        tie(spec, parent)?;
        return exec(spec, &find_program(spec)?);
    }
    // Trees are taken here, where the sources can be seen, and put into the container's mounts further down.
    let mut trees = Vec::new();
    for m in &spec.mounts {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, &m.source, flags | OpenTreeFlags::AT_RECURSIVE)
            .doing(|| format!("take the volume {}", m.source.display()))?;
        trees.push(tree);
    }
    enter(spec.holder, &["net", "uts", "ipc"])?;
    match spec.join_mounts {
        Some(pid) => enter(pid, &["mnt"])?,
        None => {
            enter(spec.holder, &["mnt"])?;
            unshare(CloneFlags::CLONE_NEWNS).doing(|| "make the container's mounts".to_owned())?;
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .doing(|| "keep the container's mounts to itself".to_owned())?;
            for (m, tree) in spec.mounts.iter().zip(trees) {
                attach(m, tree)?;
            }
            if spec.read_only_root {
                protect(Path::new("/"))?;
            }
        }
    }
    std::env::set_current_dir(&spec.directory).doing(|| format!("enter {}", spec.directory))?;
    let program = find_program(spec)?;
    drop_rights(spec)?;
    // A change of user clears the setting, so this comes after.
    tie(spec, parent)?;
    exec(spec, &program)
}

/// Lets the process end with its parent, which may have gone before this.
fn tie(spec: &RunSpec, parent: nix::unistd::Pid) -> Result<()> {
    if !spec.dies_with_parent {
        return Ok(());
    }
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .doing(|| "tie the container to its supervisor".to_owned())?;
    match nix::unistd::getppid() == parent {
        true => Ok(()),
        false => Err(Error::Usage("the supervisor has gone".to_owned())),
    }
}

/// Turns into the program. Returns only where that fails.
fn exec(spec: &RunSpec, program: &str) -> Result<()> {
    let text =
        |s: &str| CString::new(s).map_err(|_| Error::Usage(format!("{s:?} holds a NUL byte")));
    let args = spec
        .args
        .iter()
        .map(|a| text(a))
        .collect::<Result<Vec<_>>>()?;
    let env = spec
        .env
        .iter()
        .map(|(k, v)| text(&format!("{k}={v}")))
        .collect::<Result<Vec<_>>>()?;
    let failed =
        execve(&text(program)?, &args, &env).expect_err("exec returns only to tell of an error");
    Err(failed).doing(|| format!("start {program}"))
}

fn enter(pid: i32, kinds: &[&str]) -> Result<()> {
    for kind in kinds {
        let path = format!("/proc/{pid}/ns/{kind}");
        let file = File::open(&path).doing(|| format!("open {path} (has the pod ended?)"))?;
        setns(file, CloneFlags::empty()).doing(|| format!("enter {path}"))?;
    }
    Ok(())
}

fn attach(m: &Mount, tree: OwnedFd) -> Result<()> {
    let what = || format!("mount a volume on {}", m.target.display());
    // After the namespace was entered the source may be out of sight: the tree itself tells what it is.
    let is_dir = rustix::fs::fstat(&tree)
        .map(|s| rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::Directory)
        .doing(what)?;
    if is_dir {
        fs::create_dir_all(&m.target).doing(what)?;
    } else {
        if let Some(parent) = m.target.parent() {
            fs::create_dir_all(parent).doing(what)?;
        }
        if !m.target.exists() {
            File::create(&m.target).doing(what)?;
        }
    }
    move_mount(
        tree,
        "",
        CWD,
        &m.target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .doing(what)?;
    if m.read_only {
        protect(&m.target)
    } else {
        Ok(())
    }
}

fn protect(target: &Path) -> Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .doing(|| format!("protect {}", target.display()))
}

fn find_program(spec: &RunSpec) -> Result<String> {
    let name = spec
        .args
        .first()
        .filter(|a| !a.is_empty())
        .ok_or_else(|| Error::Usage("the container has no command".to_owned()))?;
    if name.contains('/') {
        return Ok(name.clone());
    }
    let path = spec
        .env
        .iter()
        .find(|(k, _)| k == "PATH")
        .map_or(DEFAULT_PATH, |(_, v)| v.as_str());
    path.split(':')
        .map(|dir| format!("{dir}/{name}"))
        .find(|p| fs::metadata(p).is_ok_and(|m| m.is_file()))
        .ok_or_else(|| Error::Usage(format!("{name:?} is not in the container's PATH ({path})")))
}

fn drop_rights(spec: &RunSpec) -> Result<()> {
    let keep = capability_set(&spec.capabilities)?;
    for bit in CapabilitySet::all().iter() {
        if !keep.contains(bit) {
            // A capability that this kernel does not know cannot be in the set either.
            let _ = rustix::thread::remove_capability_from_bounding_set(bit);
        }
    }
    let groups: Vec<Gid> = spec.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).doing(|| "set the groups".to_owned())?;
    setgid(Gid::from_raw(spec.gid)).doing(|| format!("become group {}", spec.gid))?;
    if spec.uid == 0 {
        let had = rustix::thread::capabilities(None)
            .doing(|| "read capabilities".to_owned())?
            .permitted;
        let sets = CapabilitySets {
            effective: keep & had,
            permitted: keep & had,
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, sets).doing(|| "drop capabilities".to_owned())?;
    } else {
        // Gives up every capability on the way, as the kernel does for any user but root.
        setuid(Uid::from_raw(spec.uid)).doing(|| format!("become user {}", spec.uid))?;
    }
    if spec.no_new_privileges {
        rustix::thread::set_no_new_privs(true).doing(|| "forbid new rights".to_owned())?;
    }
    Ok(())
}

fn capability_set(names: &[String]) -> Result<CapabilitySet> {
    let mut set = CapabilitySet::empty();
    for name in names {
        if name == "ALL" {
            return Ok(CapabilitySet::all());
        }
        let plain = name.strip_prefix("CAP_").unwrap_or(name);
        set |= CapabilitySet::from_name(plain)
            .ok_or_else(|| Error::Usage(format!("no capability is called {name:?}")))?;
    }
    Ok(set)
}

/// What a container of Debian has; `env` of the pod may replace it.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What container runtimes leave to root by default.
pub(crate) const DEFAULT_CAPABILITIES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];
