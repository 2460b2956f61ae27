//! The state folder: where everything of one mesh lies, and the status file through which commands find its processes.
//!
//! Nothing here outlives `down`. Namespaces and mounts are not in this folder at all: they hang on processes, so they
//! end with them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Result};

/// Paths below the state folder.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// The folder given, or `$OUTRIGGER_STATE`, or `/run/outrigger/local`.
    pub(crate) fn new(given: Option<PathBuf>) -> Self {
        let root = given
            .or_else(|| std::env::var_os("OUTRIGGER_STATE").map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from("/run/outrigger/local"));
        Self {
            root: std::path::absolute(&root).unwrap_or(root),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The completed objects, which the control plane watches.
    pub(crate) fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    /// The keys of the control plane's authority, and the roots that it gives out.
    pub(crate) fn authority(&self) -> PathBuf {
        self.root.join("authority")
    }

    /// The public keys of who signs service account tokens; a folder, so that the file in it can be replaced.
    pub(crate) fn token_keys(&self) -> PathBuf {
        self.root.join("token-keys")
    }

    /// This program and the links by which pod templates name it, readable by every user.
    pub(crate) fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    pub(crate) fn pod(&self, namespace: &str, name: &str) -> PathBuf {
        self.root.join("pods").join(format!("{name}.{namespace}"))
    }

    pub(crate) fn supervisor_log(&self) -> PathBuf {
        self.root.join("supervisor.log")
    }

    pub(crate) fn status_file(&self) -> PathBuf {
        self.root.join("status.json")
    }

    /// The status of the running mesh; an error that says so where none runs.
    pub(crate) fn status(&self) -> Result<Status> {
        let path = self.status_file();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Usage(format!(
                    "no mesh runs in {}: start one with `outrigger local up -f DIR`, or name its folder with --state",
                    self.root.display()
                )));
            }
            Err(e) => return Err(e).doing(|| format!("read {}", path.display())),
        };
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::Usage(format!(
                "{} cannot be read ({e}): it was written by another version; run `outrigger local down`",
                path.display()
            ))
        })
    }

    pub(crate) fn write_status(&self, status: &Status) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(status).expect("a status is plain data");
        write_atomically(&self.status_file(), &bytes)
    }
}

/// Replaces a file in one step: a reader sees the old content or the new, never a part.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    // The leading dot keeps readers that take every *.yaml of a folder from seeing the half-written file.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    fs::write(&temporary, bytes).doing(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, path).doing(|| format!("rename onto {}", path.display()))
}

/// What runs, as written to `status.json` at each change.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    /// The supervisor's process.
    pub(crate) supervisor: i32,
    /// When the supervisor started, in clock ticks after boot: tells it from a later process with the same id.
    pub(crate) supervisor_start: u64,
    /// Whether every pod has come up once since `up`.
    pub(crate) settled: bool,
    pub(crate) pods: Vec<PodStatus>,
    /// Ports of this machine that lead into pods.
    pub(crate) forwards: Vec<Forward>,
    /// What is wrong with the user's folder now.
    pub(crate) problems: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodStatus {
    pub(crate) name: String,
    pub(crate) namespace: String,
    /// The workload that it belongs to, as `kind/name` in lower case; `pod/NAME` for a bare pod.
    pub(crate) workload: String,
    pub(crate) address: String,
    /// Kubernetes' phase: Pending, Running, Succeeded, Failed.
    pub(crate) phase: String,
    pub(crate) ready: bool,
    /// The process that holds the namespaces.
    pub(crate) holder: i32,
    /// Inode of the network namespace, as `/proc/PID/ns/net` shows it.
    pub(crate) net_namespace: u64,
    /// What keeps the pod from being ready, where something does.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
    /// The container that commands mean where none is named.
    #[serde(default)]
    pub(crate) default_container: String,
    pub(crate) containers: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerStatus {
    pub(crate) name: String,
    /// An init container that ends before the others start.
    pub(crate) init: bool,
    /// `waiting`, `running` or `terminated`.
    pub(crate) state: String,
    pub(crate) pid: i32,
    /// Inode of its mount namespace; zero while it does not run.
    pub(crate) mount_namespace: u64,
    pub(crate) uid: u32,
    pub(crate) ready: bool,
    pub(crate) restarts: u32,
    /// How it ended last.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) last_exit: String,
}

/// A port of this machine that leads into a pod.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Forward {
    /// `127.0.0.1:PORT` on this machine.
    pub(crate) host: String,
    /// The name and namespace of the Service that asked for it.
    pub(crate) service: String,
    pub(crate) namespace: String,
    pub(crate) port_name: String,
    pub(crate) port: u16,
}

impl Status {
    /// The pod that a user means: `reviews-v1`, `reviews-v1.default`, `pod/…`, or `deploy/NAME` for its first pod.
    pub(crate) fn find(&self, wanted: &str, namespace: Option<&str>) -> Result<&PodStatus> {
        let (kind, name) = match wanted.split_once('/') {
            Some((kind, name)) => (Some(kind.to_ascii_lowercase()), name),
            None => (None, wanted),
        };
        let fits_kind = |pod: &PodStatus| match kind.as_deref() {
            None | Some("pod" | "po" | "pods") => pod.name == name,
            Some(kind) => {
                let kind = match kind {
                    "deploy" | "deployments" | "deployments.apps" => "deployment",
                    "sts" | "statefulsets" => "statefulset",
                    "ds" | "daemonsets" => "daemonset",
                    "rs" | "replicasets" => "replicaset",
                    "jobs" => "job",
                    "cj" | "cronjobs" => "cronjob",
                    other => other,
                };
                pod.workload == format!("{kind}/{name}")
            }
        };
        let in_namespace = |pod: &&PodStatus| namespace.is_none_or(|n| n == pod.namespace);
        let exact: Vec<_> = self
            .pods
            .iter()
            .filter(|p| fits_kind(p))
            .filter(in_namespace)
            .collect();
        if let Some(pod) = exact
            .iter()
            .find(|p| p.namespace == "default")
            .or(exact.first())
        {
            // Without -n the name must be unmistakable, unless one is in `default`, as with kubectl.
            if namespace.is_none()
                && exact.iter().any(|p| p.namespace != pod.namespace)
                && pod.namespace != "default"
            {
                return Err(Error::Usage(format!(
                    "{wanted:?} is in several namespaces ({}): choose with -n",
                    exact
                        .iter()
                        .map(|p| p.namespace.as_str())
                        .collect::<Vec<_>>()
                        .join(", ")
                )));
            }
            return Ok(pod);
        }
        // istioctl's form, NAME.NAMESPACE.
        if let Some(pod) = self
            .pods
            .iter()
            .find(|p| format!("{}.{}", p.name, p.namespace) == name)
        {
            return Ok(pod);
        }
        let mut names: Vec<_> = self
            .pods
            .iter()
            .map(|p| format!("{}.{}", p.name, p.namespace))
            .collect();
        names.sort();
        Err(Error::Usage(format!(
            "no pod {wanted:?}; there are {}",
            names.join(", ")
        )))
    }
}

/// The start time of a process in clock ticks after boot, `None` where there is no such process.
pub(crate) fn process_start(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces; fields after it are counted from `state`, the third.
    let rest = stat.rsplit_once(')')?.1;
    let mut fields = rest.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The inode of a namespace of a process (`net`, `mnt`), zero where it cannot be read.
pub(crate) fn namespace_inode(pid: i32, kind: &str) -> u64 {
    fs::read_link(format!("/proc/{pid}/ns/{kind}"))
        .ok()
        .and_then(|l| {
            let text = l.to_string_lossy().into_owned();
            text.split(['[', ']']).nth(1).and_then(|n| n.parse().ok())
        })
        .unwrap_or(0)
}

/// Every process of this machine.
pub(crate) fn processes() -> Vec<i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let pod = |name: &str, namespace: &str, workload: &str| PodStatus {
            name: name.into(),
            namespace: namespace.into(),
            workload: workload.into(),
            ..PodStatus::default()
        };
        Status {
            pods: vec![
                pod("reviews-v1", "default", "deployment/reviews-v1"),
                pod("web", "a", "deployment/web"),
                pod("web", "b", "deployment/web"),
                pod("db-0", "a", "statefulset/db"),
            ],
            ..Status::default()
        }
    }

    #[test]
    fn pods_are_found_by_the_names_users_type() {
        let s = status();
        assert_eq!(s.find("reviews-v1", None).unwrap().name, "reviews-v1");
        assert_eq!(
            s.find("deploy/reviews-v1", None).unwrap().name,
            "reviews-v1"
        );
        assert_eq!(s.find("sts/db", Some("a")).unwrap().name, "db-0");
        assert_eq!(s.find("web.b", None).unwrap().namespace, "b");
        assert_eq!(s.find("web", Some("b")).unwrap().namespace, "b");
    }

    #[test]
    fn a_name_in_two_namespaces_or_nowhere_is_refused() {
        let s = status();
        let e = s.find("web", None).unwrap_err().to_string();
        assert!(e.contains("choose with -n"), "{e}");
        let e = s.find("nope", None).unwrap_err().to_string();
        assert!(e.contains("reviews-v1.default"), "{e}");
    }

    #[test]
    fn this_process_is_known_by_its_start() {
        let pid = std::process::id() as i32;
        assert!(process_start(pid).is_some());
        assert_ne!(namespace_inode(pid, "net"), 0);
        assert!(processes().contains(&pid));
    }
}
