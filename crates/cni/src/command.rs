//! The protocol: a command in the environment, the configuration on standard input, a result on standard output.

use std::{env, ffi::OsString, io::Read, process::ExitCode, thread, time::Duration};

use serde_json::{Value, json};

use crate::{
    CniError, api,
    capture::{self, Captured},
    conf::{Conf, Source, VERSIONS},
    files, node,
    pod::{Verdict, judge},
};

/// Runs the plug-in.
pub fn main(args: Vec<OsString>) -> ExitCode {
    match args.get(1).map(|a| a.to_string_lossy().into_owned()) {
        Some(flag) if matches!(flag.as_str(), "-h" | "--help" | "help") => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some(agent) if agent == "node" => return node::main(&args[2..]),
        Some(other) => {
            eprintln!("outrigger cni: unexpected argument {other:?}\n\n{USAGE}");
            return ExitCode::from(2);
        }
        None => {}
    }
    let mut version = VERSIONS[VERSIONS.len() - 1].to_owned();
    match run(&mut version) {
        Ok(Some(result)) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error\t{e}");
            let error = json!({"cniVersion": version, "code": e.code(), "msg": e.to_string()});
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// `version` becomes that of the configuration, once that is known.
fn run(version: &mut String) -> Result<Option<Value>, CniError> {
    let command = variable("CNI_COMMAND")?;
    if command == "VERSION" {
        return Ok(Some(json!({
            "cniVersion": version,
            "supportedVersions": VERSIONS,
        })));
    }
    if !matches!(command.as_str(), "ADD" | "CHECK" | "DEL") {
        return Err(CniError::Environment {
            name: "CNI_COMMAND",
            why: format!("{command:?} is not ADD, CHECK, DEL or VERSION"),
        });
    }
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(MAX_CONF)
        .read_to_string(&mut text)
        .map_err(|e| CniError::Io {
            what: "standard input".into(),
            why: e.to_string(),
        })?;
    let conf = Conf::parse(&text)?;
    *version = conf.version.clone();
    if command == "DEL" {
        capture::delete(&env::var("CNI_NETNS").unwrap_or_default())?;
        return Ok(None);
    }
    if command == "CHECK" && conf.previous.is_none() {
        return Err(CniError::Config {
            field: "prevResult".into(),
            why: "CHECK needs the result of ADD".into(),
        });
    }
    if let Some(pod) = captured(&conf)? {
        let netns = variable("CNI_NETNS")?;
        if command == "CHECK" {
            let found = capture::check(&netns, &pod, &conf)?;
            if !found.is_empty() {
                return Err(CniError::Changed(found.join("\n  ")));
            }
            return Ok(None);
        }
        capture::add(&netns, &pod, &conf)?;
    }
    if command == "CHECK" {
        return Ok(None);
    }
    let mut result = conf.previous.unwrap_or(json!({}));
    result["cniVersion"] = conf.version.into();
    Ok(Some(result))
}

/// The pod; none where it is left alone.
fn captured(conf: &Conf) -> Result<Option<Captured>, CniError> {
    let args = env::var("CNI_ARGS").unwrap_or_default();
    let (name, namespace) = pod_of(&args)?;
    if name.is_empty() || namespace.is_empty() {
        eprintln!("info\tnot a pod of Kubernetes: left alone");
        return Ok(None);
    }
    let id = format!("{namespace}/{name}");
    if conf.excluded.contains(&namespace) {
        eprintln!("info\tpod {id}: its namespace is excluded");
        return Ok(None);
    }
    let Some(source) = &conf.source else {
        return Err(CniError::Config {
            field: "kubeconfig".into(),
            why: "it is needed to ask for the pod (or outrigger_pods, a folder of objects)".into(),
        });
    };
    let mut problem = String::new();
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let found = match source {
            Source::Kubeconfig(path) => api::pod(path, &namespace, &name),
            Source::Folder(path) => files::pod(path, &namespace, &name),
        };
        match found {
            Ok(Some(pod)) => {
                return match judge(&id, &pod)? {
                    Verdict::Skip(why) => {
                        eprintln!("info\tpod {id}: left alone: {why}");
                        Ok(None)
                    }
                    Verdict::Capture(flags) => {
                        // The runtime's word counts: a pod of the same name may have come since.
                        let known = pod["metadata"]["uid"].as_str().unwrap_or_default();
                        let given = value_of(&args, "K8S_POD_UID");
                        let uid = given.unwrap_or_else(|| known.to_owned());
                        Ok(Some(Captured { id, uid, flags }))
                    }
                };
            }
            Ok(None) => problem = "no such pod".into(),
            Err(e @ (CniError::Config { .. } | CniError::Unsupported { .. })) => return Err(e),
            Err(e) => problem = e.to_string(),
        }
        // The node agent brings the credentials that are missing: its own pod must not wait for them.
        if namespace == conf.own_namespace && name.starts_with(OWN_PODS) {
            eprintln!("info\tpod {id}: the node agent itself, left alone ({problem})");
            return Ok(None);
        }
        eprintln!("warning\tpod {id}: {problem}");
    }
    Err(CniError::Pod {
        pod: id,
        why: problem,
    })
}

/// Name and namespace from `CNI_ARGS`, `KEY=VALUE;KEY=VALUE`. They become part of a path, so only Kubernetes' own
/// characters are taken.
fn pod_of(args: &str) -> Result<(String, String), CniError> {
    let value = |key: &str| value_of(args, key).unwrap_or_default();
    let (name, namespace) = (value("K8S_POD_NAME"), value("K8S_POD_NAMESPACE"));
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    for part in [&name, &namespace] {
        if part.len() > 253 || part.starts_with('.') || !part.chars().all(fine) {
            return Err(CniError::Environment {
                name: "CNI_ARGS",
                why: format!("{part:?} is not a name of Kubernetes"),
            });
        }
    }
    Ok((name, namespace))
}

/// A value of `CNI_ARGS`, if it is not empty.
fn value_of(args: &str, key: &str) -> Option<String> {
    let mut pairs = args.split(';').filter_map(|p| p.split_once('='));
    let (_, value) = pairs.find(|(k, _)| *k == key)?;
    (!value.is_empty()).then(|| value.to_owned())
}

fn variable(name: &'static str) -> Result<String, CniError> {
    match env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        _ => Err(CniError::Environment {
            name,
            why: "it is not set: this program is started by a container runtime".into(),
        }),
    }
}

const USAGE: &str = "\
Usage: CNI_COMMAND=ADD|CHECK|DEL|VERSION CNI_NETNS=... CNI_ARGS=... outrigger cni < NETWORK-CONFIGURATION

The CNI plug-in: captures a pod's traffic from the node, by the pod's annotations. Container runtimes start it, behind
the network's own plug-ins in a list of type istio-cni. Keys of its own: kubeconfig (or kubernetes.kubeconfig),
exclude_namespaces, pod_namespace, native_nftables, tproxy_notrack (for pods with interceptionMode TPROXY), ebpf_sockmap
and ebpf_fallback (EBPF; all three as the flags of istio-iptables), outrigger_pods (a folder with Pod objects instead of
the API).

outrigger cni node [ready]: run on a node, in a pod, to put the plug-in there and to capture pods that were faster.
";

const MAX_CONF: u64 = 16 << 20;
/// As the real plug-in: half a minute for a pod that the API does not show yet.
const ATTEMPTS: u32 = 30;
const PAUSE: Duration = Duration::from_secs(1);
const OWN_PODS: &str = "istio-cni-node-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_named_by_the_runtime() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_UID=x";
        assert_eq!(pod_of(args).unwrap(), ("web-1".into(), "shop".into()));
        assert_eq!(pod_of("").unwrap(), (String::new(), String::new()));
        for bad in [
            "K8S_POD_NAME=../x",
            "K8S_POD_NAME=a/b",
            "K8S_POD_NAMESPACE=A",
        ] {
            assert_eq!(pod_of(bad).unwrap_err().code(), 4, "{bad}");
        }
    }
}
