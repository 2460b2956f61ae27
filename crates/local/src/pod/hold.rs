//! The process that makes a pod's namespaces and keeps them: `outrigger local hold SPEC`.
//!
//! It talks with the supervisor over its standard streams: prints `namespaces` when they exist, waits for a line (by
//! then its network card has been put there), sets the network up, prints `up`, and then waits for its input to close.
//! The supervisor's end therefore ends it too, and with it the namespaces.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::Signal,
};
use serde::{Deserialize, Serialize};

use super::root;
use crate::{
    error::{Doing, Result},
    node::network::ip_batch,
};

/// What the holder has to build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HoldSpec {
    /// An empty folder on which the pod's root file system is mounted (in the pod's mount namespace only).
    pub(crate) root: PathBuf,
    /// The folder with the programs that appear as /usr/local/bin.
    pub(crate) bin: PathBuf,
    pub(crate) hostname: String,
    pub(crate) address: String,
    /// The node's address on the bridge.
    pub(crate) gateway: String,
    /// Contents of /etc/hosts and /etc/resolv.conf.
    pub(crate) hosts: String,
    pub(crate) resolv_conf: String,
}

/// Makes the namespaces and stays.
pub(crate) fn hold(spec: &Path) -> Result<()> {
    let text = fs::read(spec).doing(|| format!("read {}", spec.display()))?;
    let spec: HoldSpec = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .doing(|| "read the pod's specification".to_owned())?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .doing(|| "tie the pod to its supervisor".to_owned())?;
    unshare(
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .doing(|| "make the pod's namespaces (root is needed)".to_owned())?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .doing(|| "keep the pod's mounts to itself".to_owned())?;
    fs::write("/proc/sys/kernel/hostname", &spec.hostname)
        .doing(|| "set the host name".to_owned())?;
    // As container runtimes do: any user may listen on port 80 of a namespace of its own.
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
        .doing(|| "open low ports".to_owned())?;
    root::build(&spec)?;

    let mut lines = io::stdin().lines();
    say("namespaces")?;
    lines.next();
    ip_batch(&format!(
        "link set lo up\n\
         link set eth0 up\n\
         address add {address}/32 dev eth0\n\
         route add {gateway} dev eth0 scope link\n\
         route add default via {gateway} src {address}\n",
        address = spec.address,
        gateway = spec.gateway,
    ))?;
    enter_root(&spec.root)?;
    say("up")?;
    // Nothing more is sent: this returns when the supervisor has gone or lets the pod go.
    lines.next();
    Ok(())
}

fn enter_root(root: &Path) -> Result<()> {
    std::env::set_current_dir(root).doing(|| format!("enter {}", root.display()))?;
    nix::unistd::pivot_root(".", ".").doing(|| "make it the root".to_owned())?;
    // Both roots are stacked on `.` now; the old one lies on top.
    umount2(".", MntFlags::MNT_DETACH).doing(|| "let the old root go".to_owned())?;
    std::env::set_current_dir("/").doing(|| "enter the new root".to_owned())
}

fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .doing(|| "answer the supervisor".to_owned())
}
