//! The bridge, its addresses and the pods' cards.

use std::{
    fs,
    io::Write,
    net::Ipv4Addr,
    process::{Command, Stdio},
};

use crate::error::{Doing, Error, Result};

/// The node's address on the bridge: every pod's next hop.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// Where the name server answers, as in most clusters the tenth service address.
pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// First address of the pods' range (/16).
pub(crate) const POD_RANGE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 0);
/// First address of the services' range (/16).
pub(crate) const SERVICE_RANGE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);

const BRIDGE: &str = "pods0";

/// Sets up the namespace that this process has just made.
pub(crate) fn set_up_node() -> Result<()> {
    ip_batch(&format!(
        "link set lo up\n\
         link add {BRIDGE} type bridge\n\
         address add {GATEWAY}/16 dev {BRIDGE}\n\
         address add {DNS}/32 dev lo\n\
         link set {BRIDGE} up\n\
         route add unreachable {SERVICE_RANGE}/16\n"
    ))?;
    for (key, value) in [
        ("ip_forward", "1"),
        // Pods are each other's neighbours on the bridge, but are not to be told so: their packets must pass here.
        ("conf/all/send_redirects", "0"),
        ("conf/pods0/send_redirects", "0"),
    ] {
        let path = format!("/proc/sys/net/ipv4/{key}");
        fs::write(&path, value).doing(|| format!("write {path}"))?;
    }
    Ok(())
}

/// Puts a pod's card into its namespace and the other end on the bridge.
pub(crate) fn plug(index: u32, holder: i32) -> Result<()> {
    ip_batch(&format!(
        "link add pod{index} type veth peer name eth0 netns {holder}\n\
         link set pod{index} master {BRIDGE}\n\
         link set pod{index} up\n"
    ))
}

/// Runs `ip -batch` in the namespace of this process.
pub(crate) fn ip_batch(commands: &str) -> Result<()> {
    feed("ip", &["-batch", "-"], commands)
}

/// Runs a program of the machine with this text as its input.
pub(crate) fn feed(program: &str, args: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(args)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .doing(|| format!("start {program} (Debian: apt-get install iproute2 iptables)"))?;
    // The program may end before it has read everything; its own message tells more than a broken pipe.
    let _ = child
        .stdin
        .take()
        .map(|mut i| i.write_all(input.as_bytes()));
    let output = child
        .wait_with_output()
        .doing(|| format!("wait for {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Program {
        program: format!("{program} {}", args.join(" ")),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
