//! The agent of a node: puts the plug-in and its credentials there, keeps it in the network's chain, and captures pods that
//! started before it was (again) in place. It goes by the environment of its pod:
//!
//! | variable | default | meaning |
//! |---|---|---|
//! | `NODE_NAME`, `POD_NAMESPACE` | | where it runs |
//! | `CNI_BIN_DIR` | `/host/opt/cni/bin` | the node's plug-ins |
//! | `CNI_NET_DIR` | `/host/etc/cni/net.d` | the node's network configurations |
//! | `CNI_NET_DIR_ON_NODE` | `/etc/cni/net.d` | how the node calls that folder |
//! | `EXCLUDE_NAMESPACES` | | namespaces whose pods are left alone, with commas |
//! | `NATIVE_NFTABLES` | `false` | whether nft writes the rules |

mod chain;
mod repair;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use serde_json::{Value, json};

use crate::CniError;

/// What the agent was told.
#[derive(Debug)]
struct Settings {
    node: String,
    namespace: String,
    bin: PathBuf,
    net: PathBuf,
    net_on_node: String,
    excluded: Vec<String>,
    native: bool,
}

/// Runs the agent until SIGTERM; `ready` asks whether one has done its work here.
pub(crate) fn main(args: &[OsString]) -> ExitCode {
    let settings = match Settings::of_environment(&|name| env::var(name).ok()) {
        Ok(settings) => settings,
        Err(e) => {
            eprintln!("error\t{e}");
            return ExitCode::from(2);
        }
    };
    let outcome = match args.first().and_then(|a| a.to_str()) {
        None => run(&settings),
        Some("ready") => ready(&settings),
        Some(other) => {
            eprintln!("outrigger cni node: unexpected argument {other:?}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error\t{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &Settings) -> Result<(), CniError> {
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGTERM);
    wanted.add(Signal::SIGINT);
    let signals = wanted
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&wanted, SfdFlags::SFD_NONBLOCK))
        .map_err(|e| io("signals", &e))?;
    let mut last = String::new();
    let mut repaired = repair::Done::new();
    loop {
        let mut work = || -> Result<(), CniError> {
            program(settings)?;
            credentials(settings)?;
            chain::keep(settings)?;
            repair::all(settings, &mut repaired)
        };
        // Whatever is missing now (a network that is not set up yet, an API server that is away) may come.
        let said = work().err().map(|e| e.to_string()).unwrap_or_default();
        if said != last {
            match said.as_str() {
                "" => eprintln!("info\tthe plug-in is in place"),
                problem => eprintln!("warning\t{problem}"),
            }
            last = said;
        }
        for _ in 0..LOOKS {
            thread::sleep(LOOK);
            if matches!(signals.read_signal(), Ok(Some(_))) {
                return remove(settings);
            }
        }
    }
}

/// An agent that ends takes the plug-in out: with its token gone, it could only refuse pods.
fn remove(settings: &Settings) -> Result<(), CniError> {
    chain::leave(settings)?;
    for path in [settings.kubeconfig(), settings.plugin()] {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(io(&path.display().to_string(), &e));
            }
            _ => {}
        }
    }
    eprintln!("info\tthe plug-in is taken out");
    Ok(())
}

fn ready(settings: &Settings) -> Result<(), CniError> {
    for path in [settings.kubeconfig(), settings.plugin()] {
        fs::metadata(&path).map_err(|e| io(&path.display().to_string(), &e))?;
    }
    chain::is_kept(settings)
}

/// The running program is the plug-in as well.
fn program(settings: &Settings) -> Result<(), CniError> {
    let ours = fs::read("/proc/self/exe").map_err(|e| io("/proc/self/exe", &e))?;
    let path = settings.plugin();
    // Read whole only if the length says that it may be the same.
    let same = fs::metadata(&path).is_ok_and(|m| m.len() == ours.len() as u64)
        && fs::read(&path).is_ok_and(|there| there == ours);
    match same {
        true => Ok(()),
        false => replace(&path, &ours, 0o755),
    }
}

/// A kubeconfig with this pod's token, which the kubelet renews before it ends.
fn credentials(settings: &Settings) -> Result<(), CniError> {
    let account = Path::new(ACCOUNT);
    let read = |name: &str| {
        let path = account.join(name);
        fs::read(&path).map_err(|e| io(&path.display().to_string(), &e))
    };
    let token = String::from_utf8_lossy(&read("token")?).trim().to_owned();
    let address = |name: &'static str| {
        env::var(name).map_err(|_| CniError::Environment {
            name,
            why: "it is not set: the agent runs in a pod".into(),
        })
    };
    let (host, port) = (
        address("KUBERNETES_SERVICE_HOST")?,
        address("KUBERNETES_SERVICE_PORT")?,
    );
    let host = match host.contains(':') {
        true => format!("[{host}]"),
        false => host,
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "istio-cni",
        "clusters": [{"name": "local", "cluster": {
            "server": format!("https://{host}:{port}"),
            "certificate-authority-data": BASE64_STANDARD.encode(read("ca.crt")?),
        }}],
        "users": [{"name": "istio-cni", "user": {"token": token}}],
        "contexts": [{"name": "istio-cni", "context": {"cluster": "local", "user": "istio-cni"}}],
    });
    let path = settings.kubeconfig();
    let text = format!("{config:#}\n");
    match fs::read(&path).is_ok_and(|there| there == text.as_bytes()) {
        true => Ok(()),
        false => replace(&path, text.as_bytes(), 0o600),
    }
}

/// Puts a file in place, never half of it.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CniError> {
    base::file::replace(path, bytes, mode).map_err(|e| io(&path.display().to_string(), &e))
}

impl Settings {
    fn of_environment(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let needed = |name: &'static str| {
            get(name)
                .filter(|v| !v.is_empty())
                .ok_or(CniError::Environment {
                    name,
                    why: "it is not set: the DaemonSet sets it".into(),
                })
        };
        let or = |name: &str, default: &str| get(name).unwrap_or_else(|| default.to_owned());
        let excluded = or("EXCLUDE_NAMESPACES", "");
        let names = excluded.split(',').map(str::trim);
        Ok(Settings {
            node: needed("NODE_NAME")?,
            namespace: needed("POD_NAMESPACE")?,
            bin: or("CNI_BIN_DIR", "/host/opt/cni/bin").into(),
            net: or("CNI_NET_DIR", "/host/etc/cni/net.d").into(),
            net_on_node: or("CNI_NET_DIR_ON_NODE", "/etc/cni/net.d"),
            excluded: names.filter(|n| !n.is_empty()).map(str::to_owned).collect(),
            native: or("NATIVE_NFTABLES", "false") == "true",
        })
    }

    fn plugin(&self) -> PathBuf {
        self.bin.join(TYPE)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.net.join(KUBECONFIG)
    }

    /// Our entry of the chain.
    fn entry(&self) -> Value {
        json!({
            "type": TYPE,
            "kubeconfig": format!("{}/{KUBECONFIG}", self.net_on_node),
            "exclude_namespaces": self.excluded,
            "pod_namespace": self.namespace,
            "native_nftables": self.native,
        })
    }
}

fn io(what: &str, why: &dyn std::fmt::Display) -> CniError {
    CniError::Io {
        what: what.to_owned(),
        why: why.to_string(),
    }
}

/// The plug-in's name in chains, and of its file.
const TYPE: &str = "istio-cni";
/// Sorts behind every configuration, and is none.
const KUBECONFIG: &str = "ZZZ-istio-cni-kubeconfig";
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Between two looks for the end, and how many of them make a round.
const LOOK: Duration = Duration::from_millis(250);
const LOOKS: u32 = 8;
