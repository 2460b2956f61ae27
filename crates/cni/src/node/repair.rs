//! Pods that started while the plug-in was not in the chain: their validation says so with an exit status of its own, and
//! they are captured then, from here. The kubelet starts the validation again, which then finds what it looks for.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use super::{Settings, TYPE, io};
use crate::{CniError, api};

/// What was done already: a pod, and which start of its validation found no capture.
pub(super) type Done = BTreeSet<(String, i64)>;

/// Looks through the pods of this node.
pub(super) fn all(settings: &Settings, done: &mut Done) -> Result<(), CniError> {
    let mut seen = Done::new();
    let path = settings.kubeconfig();
    let path = path.to_string_lossy();
    for pod in api::pods_of(&path, &settings.node)? {
        if let Some(start) = uncaptured(&pod) {
            let text = |key: &str| pod["metadata"][key].as_str().unwrap_or_default().to_owned();
            let (namespace, name, uid) = (text("namespace"), text("name"), text("uid"));
            let key = (uid.clone(), start);
            seen.insert(key.clone());
            if done.contains(&key) {
                continue;
            }
            match one(settings, &path, &namespace, &name, &uid) {
                Ok(()) => {
                    eprintln!("info\tpod {namespace}/{name} started without capture: repaired")
                }
                Err(e) => {
                    seen.remove(&key);
                    eprintln!("warning\tpod {namespace}/{name} started without capture: {e}");
                }
            }
        }
    }
    *done = seen;
    Ok(())
}

/// How often the validation of a pod was started again, if its last end was that it found no capture.
fn uncaptured(pod: &Value) -> Option<i64> {
    let statuses = pod["status"]["initContainerStatuses"].as_array();
    let validation = statuses
        .into_iter()
        .flatten()
        .find(|s| s["name"] == VALIDATION)?;
    let ended = |state: &str| validation[state]["terminated"]["exitCode"] == NOT_CAPTURED;
    let waits = validation["state"]["waiting"].is_object();
    let starts = validation["restartCount"].as_i64().unwrap_or(0);
    (ended("state") || (waits && ended("lastState"))).then_some(starts)
}

/// Runs the plug-in as the runtime would have.
fn one(
    settings: &Settings,
    kubeconfig: &str,
    namespace: &str,
    name: &str,
    uid: &str,
) -> Result<(), CniError> {
    let Some(process) = process_of(Path::new("/proc"), uid) else {
        return Err(io(
            "its network",
            &"no process of it is seen (hostPID is needed)",
        ));
    };
    let mut conf = settings.entry();
    conf["cniVersion"] = "1.0.0".into();
    conf["name"] = TYPE.into();
    conf["kubeconfig"] = kubeconfig.into();
    conf["prevResult"] = json!({});
    let failed = |e: std::io::Error| io("the plug-in", &e);
    let mut child = Command::new("/proc/self/exe")
        // The program is chosen by its name.
        .arg0(TYPE)
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", uid)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_NETNS", format!("/proc/{process}/ns/net"))
        .env(
            "CNI_ARGS",
            format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input
            .write_all(conf.to_string().as_bytes())
            .map_err(failed)?;
    }
    let ended = child.wait_with_output().map_err(failed)?;
    match ended.status.success() {
        true => Ok(()),
        false => Err(io(
            "the plug-in",
            &String::from_utf8_lossy(&ended.stdout).trim(),
        )),
    }
}

/// Some process of a pod, by its control group, whose path has the pod's id (with low lines under systemd).
fn process_of(proc: &Path, uid: &str) -> Option<u32> {
    if uid.is_empty() {
        return None;
    }
    let other = uid.replace('-', "_");
    for entry in fs::read_dir(proc).ok()?.flatten() {
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Ok(groups) = fs::read_to_string(entry.path().join("cgroup")) else {
            continue;
        };
        if groups.contains(uid) || groups.contains(&other) {
            return Some(number);
        }
    }
    None
}

/// The init container that asks whether the pod is captured, and the status by which it says no.
const VALIDATION: &str = "istio-validation";
const NOT_CAPTURED: i32 = 126;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_end_of_the_validation_counts() {
        let pod = |status: Value| {
            json!({"status": {"initContainerStatuses": [
                {"name": "other", "state": {"terminated": {"exitCode": 126}}},
                status,
            ]}})
        };
        let named = |mut status: Value| {
            status["name"] = VALIDATION.into();
            pod(status)
        };
        assert!(Some(0) == uncaptured(&named(json!({"state": {"terminated": {"exitCode": 126}}}))));
        assert!(
            Some(0)
                == uncaptured(&named(json!({
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": 126}},
                })))
        );
        let runs_again =
            json!({"state": {"running": {}}, "lastState": {"terminated": {"exitCode": 126}}});
        assert!(uncaptured(&named(runs_again)).is_none());
        assert!(uncaptured(&named(json!({"state": {"terminated": {"exitCode": 0}}}))).is_none());
        assert!(uncaptured(&named(json!({"state": {"terminated": {"exitCode": 1}}}))).is_none());
        assert!(uncaptured(&json!({})).is_none());
    }

    #[test]
    fn a_process_is_found_by_either_form_of_the_id() {
        let proc = tempfile::tempdir().unwrap();
        let put = |id: &str, text: &str| {
            fs::create_dir(proc.path().join(id)).unwrap();
            fs::write(proc.path().join(id).join("cgroup"), text).unwrap();
        };
        put("7", "0::/kubepods/burstable/podaaaa-bb/cri-1\n");
        put("8", "0::/kubepods.slice/kubepods-podcccc_dd.slice/x\n");
        put("self", "0::/kubepods/podeeee-ff\n");
        assert_eq!(process_of(proc.path(), "aaaa-bb"), Some(7));
        assert_eq!(process_of(proc.path(), "cccc-dd"), Some(8));
        assert_eq!(process_of(proc.path(), "eeee-ff"), None);
        assert_eq!(process_of(proc.path(), ""), None);
    }
}
