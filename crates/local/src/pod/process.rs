//! Starting a container's process, keeping its output, and ending everything that it left.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    process::{Child, Command},
};

use super::{
    environment::{self, References},
    image::Images,
    run::{DEFAULT_CAPABILITIES, RunSpec},
    volume,
};
use crate::{
    error::{Doing, Error, Result},
    objects::{list, text},
    state::{namespace_inode, processes},
};

/// The specification of a container's process. An error names what it lacks.
pub(crate) fn specify(
    container: &Value,
    refs: &References<'_>,
    images: &Images,
    holder: i32,
    volumes: &Path,
) -> Result<RunSpec, String> {
    let image_name = text(container, &["image"]);
    let image = images.find(image_name);
    let command = strings(container, "command")?;
    if image.is_none() && command.is_empty() {
        return Err(format!(
            "image {image_name:?} stands for no program here: give the container a `command`, or start the mesh with \
             --image NAME=COMMAND"
        ));
    }
    let known = image.is_some();
    let image = image.unwrap_or_default();
    let env = environment::variables(container, &image.env, refs)?;
    let own_command = !command.is_empty();
    let mut args = if own_command {
        command
    } else {
        image.entrypoint
    };
    args.extend(strings(container, "args")?);
    let mut args: Vec<String> = args.iter().map(|a| environment::expand(a, &env)).collect();
    // istio-init runs the agent's image with the tool's name as its first argument.
    if args.len() > 1 && args[0].ends_with("/pilot-agent") && args[1] == "istio-iptables" {
        args.remove(0);
    }
    // Programs in the kernel are the node's, as are the file systems that keep them.
    let on_node = args.first().is_some_and(|a| a.ends_with("istio-iptables"))
        && args.windows(2).any(|w| w[0] == "-m" && w[1] == "EBPF");
    let own = &container["securityContext"];
    let of_pod = &refs.pod["spec"]["securityContext"];
    let number = |name: &str| {
        own[name]
            .as_u64()
            .or_else(|| of_pod[name].as_u64())
            .map(|n| n as u32)
    };
    let given_uid = number("runAsUser");
    let default_uid = if known {
        image.uid
    } else {
        super::image::APP_USER
    };
    let uid = given_uid.unwrap_or(default_uid);
    if uid == 0
        && own["runAsNonRoot"]
            .as_bool()
            .or(of_pod["runAsNonRoot"].as_bool())
            == Some(true)
    {
        return Err("securityContext: runAsNonRoot forbids user 0".to_owned());
    }
    // Kubernetes leaves the group to the image, and root's where a user is given by number only.
    let gid = number("runAsGroup").unwrap_or(if given_uid.is_some() { 0 } else { uid });
    let mut groups: Vec<u32> = list(of_pod, &["supplementalGroups"])
        .iter()
        .filter_map(|g| g.as_u64().map(|g| g as u32))
        .collect();
    groups.extend(of_pod["fsGroup"].as_u64().map(|g| g as u32));
    Ok(RunSpec {
        holder,
        cgroup: None,
        on_node,
        join_mounts: None,
        dies_with_parent: true,
        mounts: volume::mounts(volumes, container, refs.pod)?,
        read_only_root: own["readOnlyRootFilesystem"] == Value::Bool(true),
        args,
        env,
        directory: match text(container, &["workingDir"]) {
            "" => "/".to_owned(),
            d => d.to_owned(),
        },
        uid,
        gid,
        groups,
        capabilities: capabilities(own),
        no_new_privileges: own["allowPrivilegeEscalation"] == Value::Bool(false),
    })
}

fn strings(container: &Value, field: &str) -> Result<Vec<String>, String> {
    list(container, &[field])
        .iter()
        .enumerate()
        .map(|(i, v)| match v {
            Value::String(s) => Ok(s.clone()),
            other => Err(format!(
                "{field}[{i}]: {other} is not text: put it in quotes"
            )),
        })
        .collect()
}

fn capabilities(security: &Value) -> Vec<String> {
    let names = |field: &str| -> Vec<String> {
        list(security, &["capabilities", field])
            .iter()
            .filter_map(|c| c.as_str().map(str::to_owned))
            .collect()
    };
    if security["privileged"] == Value::Bool(true) {
        return vec!["ALL".to_owned()];
    }
    let drop = names("drop");
    let mut kept: Vec<String> = DEFAULT_CAPABILITIES
        .iter()
        .map(|c| (*c).to_owned())
        .filter(|c| !drop.iter().any(|d| d == "ALL" || d == c))
        .collect();
    kept.extend(names("add"));
    kept
}

/// Starts `outrigger local run` on a specification, with its output in `log`.
pub(crate) fn start(program: &Path, spec: &RunSpec, spec_file: &Path, log: &Path) -> Result<Child> {
    let bytes = serde_json::to_vec(spec).expect("a specification is plain data");
    fs::write(spec_file, bytes).doing(|| format!("write {}", spec_file.display()))?;
    let what = || "make a pipe".to_owned();
    let (writer, reader) = pipe::pipe().doing(what)?;
    let writer = writer.into_blocking_fd().doing(what)?;
    // Programs open /dev/stdout anew, which asks for the right to: the pipe belongs to the container's user.
    nix::unistd::fchown(writer.as_fd(), Some(spec.uid.into()), Some(spec.gid.into()))
        .doing(what)?;
    let second = writer.try_clone().doing(what)?;
    let child = Command::new(program)
        .args(["local", "run"])
        .arg(spec_file)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(second)
        .process_group(0)
        .spawn()
        .doing(|| format!("start {}", program.display()))?;
    tokio::task::spawn_local(keep_output(reader, log.to_owned()));
    Ok(child)
}

/// Copies output into a file until its last writer has gone; a file that grows too long is set aside once.
async fn keep_output(mut from: pipe::Receiver, log: PathBuf) {
    let open = || async {
        tokio::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .await
    };
    let Ok(mut file) = open().await else { return };
    let mut size = file.metadata().await.map_or(0, |m| m.len());
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                // A full disk must not stop the container: what cannot be kept is dropped.
                if file.write_all(&buffer[..n]).await.is_ok() {
                    let _ = file.flush().await;
                }
                size += n as u64;
            }
        }
        if size > LOG_LIMIT {
            let _ = tokio::fs::rename(&log, log.with_extension("old.log")).await;
            match open().await {
                Ok(new) => file = new,
                Err(_) => return,
            }
            size = 0;
        }
    }
}

/// Bytes after which a log file is set aside.
const LOG_LIMIT: u64 = 16 * 1024 * 1024;

/// Sends a signal to every process of a mount or network namespace; returns how many there were.
pub(crate) fn signal_namespace(kind: &str, inode: u64, signal: Signal) -> usize {
    if inode == 0 {
        return 0;
    }
    let own = namespace_inode(std::process::id() as i32, kind);
    if inode == own {
        return 0;
    }
    let members: Vec<_> = processes()
        .into_iter()
        .filter(|p| namespace_inode(*p, kind) == inode)
        .collect();
    for pid in &members {
        // It may have ended by itself meanwhile.
        let _ = kill(Pid::from_raw(*pid), signal);
    }
    members.len()
}

/// Runs a command inside a running container and tells whether it succeeded.
pub(crate) async fn execute(
    program: &Path,
    spec: &RunSpec,
    container_pid: i32,
    spec_file: &Path,
) -> Result<bool> {
    let spec = RunSpec {
        join_mounts: Some(container_pid),
        mounts: Vec::new(),
        ..spec.clone()
    };
    let bytes = serde_json::to_vec(&spec).expect("a specification is plain data");
    fs::write(spec_file, bytes).doing(|| format!("write {}", spec_file.display()))?;
    let status = Command::new(program)
        .args(["local", "run"])
        .arg(spec_file)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .doing(|| format!("start {}", program.display()))?;
    Ok(status.success())
}

/// An error that says which pod and container it is about.
pub(crate) fn in_pod(pod: &str, container: &str, message: impl std::fmt::Display) -> Error {
    Error::Pod {
        pod: pod.to_owned(),
        message: format!("container {container:?}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::HashMap;

    fn specified(container: Value) -> Result<RunSpec, String> {
        let pod = json!({"metadata": {"name": "web", "namespace": "a"}, "spec": {"serviceAccountName": "sa"}});
        let refs = References {
            pod: &pod,
            config_maps: &HashMap::new(),
            secrets: &HashMap::new(),
            roots: None,
        };
        specify(&container, &refs, &Images::default(), 1, Path::new("/v"))
    }

    #[test]
    fn commands_come_from_the_image_or_the_container() {
        let s = specified(json!({"image": "proxyv2", "args": ["istio-iptables", "-p", "15001"],
            "securityContext": {"runAsUser": 0, "runAsGroup": 0, "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}})).unwrap();
        assert_eq!(s.args, ["istio-iptables", "-p", "15001"]);
        assert_eq!(
            (s.uid, s.gid, s.capabilities),
            (0, 0, vec!["NET_ADMIN".to_owned()])
        );
        let s = specified(json!({"image": "curl", "command": ["sleep", "$(N)"], "env": [{"name": "N", "value": "9"}]})).unwrap();
        assert_eq!(
            (s.args, s.uid),
            (vec!["sleep".to_owned(), "9".to_owned()], 1000)
        );
        let s = specified(json!({"image": "proxyv2:1", "args": ["proxy", "sidecar"]})).unwrap();
        assert_eq!(
            (s.args[0].as_str(), s.uid, s.gid),
            ("/usr/local/bin/pilot-agent", 1337, 1337)
        );
    }

    #[test]
    fn an_image_without_a_program_is_named() {
        let e = specified(json!({"image": "nginx:1"})).unwrap_err();
        assert!(e.contains("nginx:1") && e.contains("--image"), "{e}");
        let e = specified(
            json!({"image": "proxyv2", "securityContext": {"runAsUser": 0, "runAsNonRoot": true}}),
        )
        .unwrap_err();
        assert!(e.contains("runAsNonRoot"), "{e}");
    }
}
