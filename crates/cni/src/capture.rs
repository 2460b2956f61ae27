//! In the pod's network namespace: the same program that istio-init runs, with the same flags.

use std::fs::File;

use intercept::{Config, apply, nft, program, surroundings::Addresses};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::CniError;

/// Writes the rules; a pod that has them already is left as it is, one with others gets these.
pub(crate) fn add(netns: &str, flags: &[String], native: bool) -> Result<(), CniError> {
    let mut config = enter(netns, flags, native)?;
    let rules = program::rules(&config)?;
    let mut log = |text: String| eprintln!("info\t{text}");
    if native {
        return Ok(nft::apply(&config, &rules, &mut log)?);
    }
    match apply::apply(&config, &rules, &mut log) {
        // Only then is it worth the time to look for what others left, in every family.
        Err(intercept::Error::Conflict(_)) => {
            config.reconcile = true;
            Ok(apply::apply(&config, &rules, &mut log)?)
        }
        outcome => Ok(outcome?),
    }
}

/// What differs from what [`add`] writes, a sentence each.
pub(crate) fn check(netns: &str, flags: &[String], native: bool) -> Result<Vec<String>, CniError> {
    let config = enter(netns, flags, native)?;
    let rules = program::rules(&config)?;
    Ok(match native {
        true => nft::listing()?
            .is_none()
            .then(|| "the tables of nft are missing".to_owned())
            .into_iter()
            .collect(),
        false => apply::verify(&config, &rules)?,
    })
}

fn enter(netns: &str, flags: &[String], native: bool) -> Result<Config, CniError> {
    let io = |e: std::io::Error| CniError::Io {
        what: netns.into(),
        why: e.to_string(),
    };
    let namespace = File::open(netns).map_err(io)?;
    sandbox();
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|e| io(e.into()))?;
    let mut args = flags.to_vec();
    args.push("--cni-mode".into());
    args.extend(["--network-namespace".into(), netns.into()]);
    if native {
        args.push("--native-nftables".into());
    }
    // The node's environment is not the pod's.
    let mut config = Config::from_args(&args, &|_| None)?;
    config.fill_from_pod(&Addresses::of_this_pod()?)?;
    config.validate()?;
    Ok(config)
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
