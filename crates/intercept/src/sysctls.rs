//! Settings of the network namespace that `--tproxy-notrack` needs: marks that stay with sockets.
//!
//! With `tcp_fwmark_accept` a socket that is accepted has the mark of the packet that opened the connection, and with
//! `fwmark_reflect` an answer of the kernel itself (a reset) has that of what it answers. They lead the app's answers
//! back to the proxy where no entry of connection tracking keeps the mark.

use std::fs;

use crate::Error;

const NAMES: [&str; 3] = [
    "ipv4/tcp_fwmark_accept",
    "ipv4/fwmark_reflect",
    "ipv6/fwmark_reflect",
];

/// Makes marks stay with sockets.
pub(crate) fn keep_marks() -> Result<(), Error> {
    NAMES.into_iter().filter(|name| !is(name, "1")).try_for_each(|name| {
        let path = path(name);
        // A kernel without IPv6 has none to keep.
        if name.starts_with("ipv6") && fs::metadata(&path).is_err() {
            return Ok(());
        }
        fs::write(&path, "1").map_err(|why| Error::Surroundings {
            what: path,
            why: format!(
                "{why}; --tproxy-notrack needs it to be 1, and the /proc/sys of an unprivileged container cannot be \
                 written: set net.{} in the pod's securityContext.sysctls, or let the CNI plug-in write the rules",
                name.replace('/', ".")
            ),
        })
    })
}

/// As the kernel has them. What cannot be written was not set here either.
pub(crate) fn forget_marks() {
    for name in NAMES.into_iter().filter(|name| is(name, "1")) {
        let _ = fs::write(path(name), "0");
    }
}

fn is(name: &str, value: &str) -> bool {
    fs::read_to_string(path(name)).is_ok_and(|text| text.trim() == value)
}

/// The kernel shows those of the network namespace that the thread is in.
fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}
