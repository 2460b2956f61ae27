//! `ps`: every process of every pod.

use std::{collections::HashMap, fmt::Write as _, fs};

use serde_json::{Value, json};

use crate::state::{PodStatus, Status, namespace_inode, processes};

/// A process of a pod.
struct Row {
    namespace: String,
    pod: String,
    container: String,
    pid: i32,
    uid: u32,
    address: String,
    network: u64,
    command: String,
}

/// The table of processes, and what is not ready.
pub(crate) fn table(status: &Status, namespace: Option<&str>) -> String {
    let mut lines = vec![
        [
            "NAMESPACE",
            "POD",
            "CONTAINER",
            "READY",
            "PID",
            "UID",
            "ADDRESS",
            "NETNS",
            "COMMAND",
        ]
        .map(str::to_owned),
    ];
    let pods: Vec<_> = status
        .pods
        .iter()
        .filter(|p| namespace.is_none_or(|n| n == p.namespace))
        .collect();
    for row in rows(&pods) {
        let ready = pods
            .iter()
            .find(|p| p.name == row.pod && p.namespace == row.namespace)
            .map(|p| {
                let of_container = p
                    .containers
                    .iter()
                    .find(|c| c.name == row.container)
                    .map(|c| c.ready);
                of_container.unwrap_or(p.ready)
            });
        lines.push([
            row.namespace,
            row.pod,
            row.container,
            if ready == Some(true) { "yes" } else { "no" }.to_owned(),
            row.pid.to_string(),
            row.uid.to_string(),
            row.address,
            row.network.to_string(),
            row.command,
        ]);
    }
    let mut out = columns(&lines);
    for pod in pods.iter().filter(|p| !p.ready) {
        let _ = writeln!(
            out,
            "{}.{}: {} {}",
            pod.name, pod.namespace, pod.phase, pod.reason
        );
    }
    for f in &status.forwards {
        let _ = writeln!(
            out,
            "http://{} -> {}.{} port {} ({})",
            f.host, f.service, f.namespace, f.port, f.port_name
        );
    }
    for problem in &status.problems {
        let _ = writeln!(out, "problem: {problem}");
    }
    out
}

/// The same as data.
pub(crate) fn as_json(status: &Status, namespace: Option<&str>) -> Value {
    let pods: Vec<_> = status
        .pods
        .iter()
        .filter(|p| namespace.is_none_or(|n| n == p.namespace))
        .collect();
    let processes: Vec<_> = rows(&pods)
        .into_iter()
        .map(|r| {
            json!({"namespace": r.namespace, "pod": r.pod, "container": r.container, "pid": r.pid, "uid": r.uid,
                "address": r.address, "networkNamespace": r.network, "command": r.command})
        })
        .collect();
    json!({"pods": pods, "processes": processes, "forwards": status.forwards, "problems": status.problems})
}

fn rows(pods: &[&PodStatus]) -> Vec<Row> {
    let by_network: HashMap<u64, &PodStatus> = pods
        .iter()
        .filter(|p| p.net_namespace != 0)
        .map(|p| (p.net_namespace, *p))
        .collect();
    let mut rows: Vec<Row> = processes()
        .into_iter()
        .filter_map(|pid| {
            let network = namespace_inode(pid, "net");
            let pod = by_network.get(&network)?;
            let mounts = namespace_inode(pid, "mnt");
            let container = pod
                .containers
                .iter()
                .find(|c| c.pid == pid || c.mount_namespace == mounts);
            Some(Row {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                // The process that holds the namespaces belongs to the pod itself.
                container: container.map_or_else(|| "-".to_owned(), |c| c.name.clone()),
                pid,
                uid: uid(pid)?,
                address: pod.address.clone(),
                network,
                command: command(pid),
            })
        })
        .collect();
    rows.sort_by(|a, b| (&a.namespace, &a.pod, a.pid).cmp(&(&b.namespace, &b.pod, b.pid)));
    rows
}

fn uid(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

fn command(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let args: Vec<_> = bytes
        .split(|b| *b == 0)
        .map(String::from_utf8_lossy)
        .collect();
    args.join(" ").trim_end().to_owned()
}

/// Left-aligned columns with three spaces between them, the last one as long as it likes.
fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |i: usize| {
        lines
            .iter()
            .map(|l| l[i].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::new();
    for line in lines {
        for (i, cell) in line.iter().enumerate() {
            if i + 1 == N {
                out.push_str(cell);
            } else {
                let _ = write!(out, "{cell:<width$}   ", width = widths[i]);
            }
        }
        out.push('\n');
    }
    out
}
