//! In the pod's network namespace: the same program that istio-init runs, with the same flags.

use std::{fs::File, path::Path};

use intercept::{Config, apply, ebpf, nft, program, surroundings::Addresses};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::{CniError, cgroup, conf::Conf};

/// A pod that is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Captured {
    /// `NAMESPACE/NAME`.
    pub(crate) id: String,
    /// Kubernetes' uid of it, or nothing where nobody says.
    pub(crate) uid: String,
    /// Its rules, as flags of istio-iptables.
    pub(crate) flags: Vec<String>,
}

/// Writes the rules; a pod that has them already is left as it is, one with others gets these.
pub(crate) fn add(netns: &str, pod: &Captured, conf: &Conf) -> Result<(), CniError> {
    let mut config = enter(netns, pod, conf)?;
    let rules = program::rules(&config)?;
    let mut log = |text: String| eprintln!("info\t{text}");
    let mut write = |config: &Config| match config.ebpf() {
        true => ebpf::apply(config, &rules, &mut log),
        false if config.native_nftables => nft::apply(config, &rules, &mut log),
        false => apply::apply(config, &rules, &mut log),
    };
    match write(&config) {
        // Only then is it worth the time to look for what others left, in every family.
        Err(intercept::Error::Conflict(_)) => {
            config.reconcile = true;
            Ok(write(&config)?)
        }
        outcome => Ok(outcome?),
    }
}

/// What differs from what [`add`] writes, a sentence each.
pub(crate) fn check(netns: &str, pod: &Captured, conf: &Conf) -> Result<Vec<String>, CniError> {
    let config = enter(netns, pod, conf)?;
    let rules = program::rules(&config)?;
    Ok(if config.ebpf() {
        ebpf::verify(&config, &rules)?
    } else if config.native_nftables {
        nft::verify(&rules)?
    } else {
        apply::verify(&config, &rules)?
    })
}

/// Rules live in the pod's namespace and go with it; programs are kept on the node and must be taken away, also those
/// of pods whose namespace is gone already.
pub(crate) fn delete(netns: &str) -> Result<(), CniError> {
    if !ebpf::used() {
        return Ok(());
    }
    if let Ok(namespace) = File::open(netns) {
        join(netns, namespace)?;
        ebpf::remove(&mut |text| eprintln!("info\t{text}"))?;
    }
    ebpf::sweep();
    Ok(())
}

fn join(netns: &str, namespace: File) -> Result<(), CniError> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|e| CniError::Io {
        what: netns.into(),
        why: e.to_string(),
    })
}

fn enter(netns: &str, pod: &Captured, conf: &Conf) -> Result<Config, CniError> {
    let mut args = pod.flags.clone();
    args.push("--cni-mode".into());
    args.extend(["--network-namespace".into(), netns.into()]);
    if conf.native_nftables {
        args.push("--native-nftables".into());
    }
    if conf.ebpf_fallback {
        args.push("--ebpf-fallback".into());
    }
    if !conf.ebpf_sockmap.is_empty() {
        args.extend(["--ebpf-sockmap".into(), conf.ebpf_sockmap.clone()]);
    }
    // The node's environment is not the pod's.
    let mut config = Config::from_args(&args, &|_| None)?;
    config.tproxy_notrack = conf.tproxy_notrack && config.tproxy();
    let namespace = File::open(netns).map_err(|e| CniError::Io {
        what: netns.into(),
        why: e.to_string(),
    })?;
    if config.ebpf() {
        config.ebpf_cgroup = group(pod)?;
    } else {
        // Programs are pinned in the node's file system, which must be seen for that.
        sandbox();
    }
    join(netns, namespace)?;
    config.fill_from_pod(&Addresses::of_this_pod()?)?;
    config.validate()?;
    Ok(config)
}

/// The pod's cgroup.
fn group(pod: &Captured) -> Result<String, CniError> {
    let root = ebpf::cgroup_mount()?;
    let found = cgroup::of_pod(Path::new(&root), &pod.uid);
    let path = found.ok_or_else(|| CniError::Pod {
        pod: pod.id.clone(),
        why: format!(
            "interception mode EBPF attaches to the pod's cgroup, and below {} there is none for uid {:?}: kubelet \
             makes it unless it runs with --cgroups-per-qos=false",
            root.display(),
            pod.uid
        ),
    })?;
    Ok(path.display().to_string())
}

/// Owners are numbers here, and iptables must not ask the node's name services about them, which may hang in a
/// namespace that is half made. It works without, so what cannot be done is told and left.
fn sandbox() {
    let private = || -> nix::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .or_else(|_| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none))?;
        let file = "/etc/nsswitch.conf";
        if std::path::Path::new(file).exists() {
            mount(Some("/dev/null"), file, none, MsFlags::MS_BIND, none)?;
        }
        Ok(())
    };
    if let Err(e) = private() {
        eprintln!("warning\tthe node's name services are not kept out: {e}");
    }
}
