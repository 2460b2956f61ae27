//! Sockets of a proxy that listened before the programs came: found in /proc, and made known.

use std::{collections::HashSet, fs, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Copies of the sockets of this network namespace that listen at one of `ports`, with their port.
pub(super) fn find(ports: [u16; 2]) -> Vec<(OwnedFd, u16)> {
    let mut wanted: Vec<(u64, u16)> = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        wanted.extend(
            text.lines()
                .filter_map(listening)
                .filter(|(_, port)| ports.contains(port)),
        );
    }
    let mut out = Vec::new();
    let mut seen = HashSet::new();
    if wanted.is_empty() {
        return out;
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        for file in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let Ok(target) = fs::read_link(file.path()) else {
                continue;
            };
            let inode = target
                .to_str()
                .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            let Some((inode, port)) = wanted.iter().find(|(i, _)| Some(*i) == inode) else {
                continue;
            };
            let number = file.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(number), Some(pid)) = (number, Pid::from_raw(pid))
                && !seen.contains(inode)
                && let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
                && let Ok(copy) = pidfd_getfd(process, number, PidfdGetfdFlags::empty())
            {
                seen.insert(*inode);
                out.push((copy, *port));
            }
        }
    }
    out
}

/// Inode and port of a line of /proc/net/tcp, if that socket listens.
fn listening(line: &str) -> Option<(u64, u16)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.get(3) != Some(&"0A") {
        return None;
    }
    let port = u16::from_str_radix(words.get(1)?.rsplit(':').next()?, 16).ok()?;
    Some((words.get(9)?.parse().ok()?, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_told_from_others() {
        let line = "   0: 00000000:3A9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1337        0 4242 1 0";
        assert_eq!(listening(line), Some((4242, 15006)));
        assert_eq!(listening(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(listening("sl local_address rem_address"), None);
    }
}
